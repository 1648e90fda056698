//! What no logical stream carries, with the real daemon: unlogged tables, large objects and materialized views arrive with
//! the copy, what changes afterwards arrives with the cutover and goes back with the rollback, and what is too large for
//! the pause is refused by name.

mod support;

use std::collections::{BTreeSet, HashMap};

use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::shop::SHOP;
use support::connect;
use support::daemon::{Daemon, DaemonOptions};
use support::wait_for;
use support::world::{COMPLETED, NAME, READY, World};

/// Objects of more than one piece, with holes, and of none at all; the names of roles need quotes.
const FURNITURE: &str = r#"
CREATE ROLE "Lo ""owner" ; CREATE ROLE reader;
CREATE TABLE parent (id int PRIMARY KEY); INSERT INTO parent SELECT generate_series(1, 10);
CREATE UNLOGGED TABLE counter (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE, t text,
    "column t" text);
CREATE UNLOGGED TABLE of_counter (counter int REFERENCES counter ON DELETE CASCADE);
CREATE UNLOGGED TABLE none ();
INSERT INTO none DEFAULT VALUES;
INSERT INTO counter SELECT g, 1 + g % 10, CASE WHEN g % 7 > 0 THEN E'a\tb\\n' || g END, '' FROM generate_series(1, 2000) g;
INSERT INTO of_counter SELECT id FROM counter;
CREATE UNLOGGED TABLE up (id int PRIMARY KEY, n int); INSERT INTO up SELECT g, g FROM generate_series(1, 5) g;
CREATE UNLOGGED TABLE down (up int REFERENCES up, pad text); INSERT INTO down SELECT 1 + g % 5, repeat('p', 100) FROM generate_series(1, 900) g;
CREATE TABLE heard (id bigserial PRIMARY KEY, what text);
CREATE FUNCTION hear() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO heard (what) VALUES (TG_OP); RETURN NEW; END $$;
CREATE TRIGGER hear AFTER INSERT OR DELETE ON up FOR EACH ROW EXECUTE FUNCTION hear();
CREATE SEQUENCE of_nobody; SELECT setval('of_nobody', 41);
CREATE MATERIALIZED VIEW parents AS SELECT count(*) AS n FROM parent;
SELECT lo_from_bytea(5000 + g, convert_to(repeat('l', g), 'UTF8')) FROM generate_series(1, 700) g;
SELECT lo_create(9001), lo_create(9002), lo_create(9003);
SELECT lo_put(9001, 3 * 1048576 + 17, 'far out'), lo_put(9001, 5, 'near'), lo_put(9003, 0, 'goes');
COMMENT ON LARGE OBJECT 9001 IS 'it''s';
ALTER LARGE OBJECT 9002 OWNER TO "Lo ""owner";
GRANT SELECT ON LARGE OBJECT 9002 TO reader WITH GRANT OPTION; GRANT UPDATE ON LARGE OBJECT 9001 TO PUBLIC;
"#;

/// Everything of the kind, as text.
const STATE: &str = "
SELECT 'counter ' || c::text FROM counter c UNION ALL SELECT 'of ' || c::text FROM of_counter c
UNION ALL SELECT 'up ' || u::text FROM up u UNION ALL SELECT 'down ' || d::text FROM down d
UNION ALL SELECT 'heard ' || h::text FROM heard h
UNION ALL SELECT 'none' FROM none UNION ALL SELECT 'nobody ' || last_value FROM of_nobody
UNION ALL SELECT 'view ' || n FROM parents
UNION ALL SELECT format('%s %s %s %s %s', m.oid, m.lomowner::regrole, md5(lo_get(m.oid)), obj_description(m.oid, 'pg_largeobject'),
    (SELECT string_agg(format('%s %s %s', a.grantee::regrole, a.privilege_type, a.is_grantable), ',' ORDER BY a.grantee::regrole::text, 1)
       FROM aclexplode(coalesce(m.lomacl, acldefault('L', m.lomowner))) a)) FROM pg_largeobject_metadata m
ORDER BY 1";

async fn state(cluster: &Cluster) -> BTreeSet<String> {
    let rows = connect(cluster, SHOP).await.query(STATE, &[]).await.expect("readable");
    // Lines that are equal count too.
    let mut seen = HashMap::new();
    rows.iter()
        .map(|row| {
            let line: String = row.get(0);
            let count = seen.entry(line.clone()).and_modify(|count| *count += 1).or_insert(1);
            format!("{line} #{count}")
        })
        .collect()
}

fn assert_same(left: &BTreeSet<String>, right: &BTreeSet<String>) {
    let differences: Vec<&String> = left.symmetric_difference(right).collect();
    assert!(differences.is_empty(), "{differences:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_stream_carries_goes_there_and_back() {
    let world = World::begin(0.01).await;
    let source = connect(&world.source, SHOP).await;
    source.batch_execute(FURNITURE).await.expect("a superuser may");
    world.migrate().await;
    // Sequences are brought over by the cutover.
    let without_sequence =
        |state: BTreeSet<String>| state.into_iter().filter(|line| !line.starts_with("nobody")).collect();
    assert_same(&without_sequence(state(&world.source).await), &without_sequence(state(&world.target).await));
    let view = world.view();
    for (rule, evidence) in [("unlogged_tables", "counter"), ("large_objects", "703 large objects")] {
        let results = view["validation"].as_array().expect("validated");
        let found = results.iter().find(|result| result["code"] == rule).expect(rule);
        assert_eq!(found["outcome"], "Warning", "{found}");
        assert!(found["evidence"].to_string().contains(evidence), "{found}");
    }

    // Rows and objects come, change and go.
    source
        .batch_execute(
            "UPDATE counter SET t = 'new' WHERE id % 100 = 0; DELETE FROM parent WHERE id = 3; TRUNCATE none;
             UPDATE up SET n = -n; INSERT INTO up VALUES (6, 6);
             SELECT lo_put(9001, 2000000, 'changed'), lo_unlink(9003), lo_from_bytea(0, 'another'), setval('of_nobody', 99);
             ALTER LARGE OBJECT 9001 OWNER TO reader; REFRESH MATERIALIZED VIEW parents",
        )
        .await
        .expect("written");
    let mut before = state(&world.source).await;
    let rehearsal = world.daemon.json(&["migration", "cutover", NAME, "--dry-run"]);
    assert_eq!(rehearsal["outcome"], "dry-run", "{rehearsal}");
    source.batch_execute("INSERT INTO counter VALUES (-1, 1, 'after the rehearsal')").await.expect("written");
    drop(source);
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    let there = state(&world.target).await;
    before.insert("counter (-1,1,\"after the rehearsal\",) #1".to_owned());
    assert_same(&there, &before);

    // And the other way round.
    let target = connect(&world.target, SHOP).await;
    target
        .batch_execute(
            "DELETE FROM of_counter; DELETE FROM counter WHERE id % 2 = 0; INSERT INTO counter VALUES (-2);
             UPDATE up SET n = 0 WHERE id = 5; INSERT INTO up VALUES (7, 7);
             SELECT lo_unlink(oid) FROM pg_largeobject_metadata WHERE oid < 5300; SELECT lo_from_bytea(77, 'there');
             DELETE FROM parent WHERE id = 4; REFRESH MATERIALIZED VIEW parents",
        )
        .await
        .expect("written");
    drop(target);
    let there = state(&world.target).await;
    world.must_switch("rollback");
    world.wait_until(READY).await;
    assert_same(&state(&world.source).await, &there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_costs_no_data_is_refused_by_name_and_can_be_forced() {
    let mut world = World::begin(0.01).await;
    world.daemon.kill();
    let options = DaemonOptions::default().section("cutover", "max_unstreamed = \"10kB\"\nmax_lag_at_start = \"1GB\"");
    world.daemon = Daemon::start(&world.source, &world.target, options);
    let source = connect(&world.source, SHOP).await;
    source.batch_execute("CREATE UNLOGGED TABLE large AS SELECT generate_series(1, 5000) AS g").await.expect("made");

    let refused = world.daemon.command(&["migration", "create", NAME, "--database", SHOP, "--wait"]);
    assert!(!refused.status.success());
    let view = world.view();
    assert_eq!(view["substate"], "ValidationFailed", "{view}");
    let results = view["validation"].as_array().expect("validated");
    let failed = results.iter().filter(|result| result["outcome"] == "Failed").collect::<Vec<_>>();
    assert!(failed.len() == 1 && failed[0]["code"] == "unlogged_tables", "{failed:?}");
    assert!(failed[0]["evidence"].to_string().contains("large"), "{failed:?}");

    // Without a validation it is copied, and the cutover refuses it before anything is paused.
    world.daemon.must(&["migration", "cancel", NAME]);
    world.daemon.must(&["migration", "create", "again", "--database", SHOP, "--option", "migrate", "--wait"]);
    let answer = world.daemon.command(&["migration", "cutover", "again", "--output", "json"]);
    let aborted: serde_json::Value = serde_json::from_slice(&answer.stdout).expect("an answer");
    assert_eq!((&aborted["outcome"], &aborted["pause_ms"]), (&"aborted".into(), &0.into()), "{aborted}");
    let reason = aborted["reason"].as_str().expect("a reason");
    assert!(reason.contains("\"large\"") && reason.contains("max_unstreamed of 10kB"), "{reason}");
    assert_eq!(aborted["forceable"], true, "{aborted}");
    // It costs time and no data, so who says so goes past it; what it would take in the pause, the rehearsal has taken.
    let rehearsal = world.daemon.json(&["migration", "cutover", "again", "--dry-run", "--force"]);
    assert_eq!(rehearsal["outcome"], "dry-run", "{rehearsal}");
    let forced = rehearsal["forced"].as_array().expect("a list");
    assert!(forced.len() == 1 && forced[0].to_string().contains("max_unstreamed of 10kB"), "{rehearsal}");
    // Nor does a right that the target lacks.
    source.batch_execute("TRUNCATE large; GRANT DELETE ON large TO PUBLIC").await.expect("made smaller");
    let answer = world.daemon.command(&["migration", "cutover", "again", "--dry-run", "--output", "json"]);
    let aborted: serde_json::Value = serde_json::from_slice(&answer.stdout).expect("an answer");
    let reason = aborted["reason"].as_str().expect("a reason");
    assert!(reason.contains("the target lacks grant of DELETE on public.large to PUBLIC in database"), "{reason}");
    assert_eq!(aborted["forceable"], true, "{aborted}");
    let rehearsal = world.daemon.json(&["migration", "cutover", "again", "--dry-run", "--force"]);
    assert!(rehearsal["forced"].to_string().contains("grant of DELETE"), "{rehearsal}");
    source.batch_execute("REVOKE DELETE ON large FROM PUBLIC").await.expect("taken back");
    drop(source);
    let switched = world.daemon.json(&["migration", "cutover", "again"]);
    assert_eq!(switched["outcome"], "switched", "{switched}");
    let there = connect(&world.target, SHOP).await;
    let left: i64 = there.query_one("SELECT count(*) FROM large", &[]).await.expect("it is there").get(0);
    assert_eq!(left, 0);
}

/// Between the moment in which these are brought over for the first time and the fence anybody may change them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_while_the_way_back_is_made_goes_with_the_cutover() {
    let slow = |options: DaemonOptions| options.failpoints("prepare.after_return=sleep:5000ms");
    let world = World::begin_with(0.01, slow).await;
    let source = connect(&world.source, SHOP).await;
    let made = "CREATE ROLE clerk LOGIN PASSWORD 'old'; SELECT lo_from_bytea(4711, 'the only one')";
    source.batch_execute(made).await.expect("made");
    world.migrate().await;
    let mut order = world.daemon.begin(&["migration", "cutover", NAME]);
    wait_for("the way back", || async { world.daemon.log().contains("failpoint=\"prepare.after_return\"") }).await;
    let changed = "ALTER ROLE clerk PASSWORD 'new'; ALTER ROLE clerk SET work_mem = '8MB'; CREATE ROLE boss;
                   GRANT boss TO clerk; SELECT lo_unlink(4711)";
    source.batch_execute(changed).await.expect("changed");
    assert!(order.wait().expect("it ends").success(), "{}", world.daemon.log());
    let seen = "SELECT (SELECT string_agg(rolname || rolpassword, ' ') FROM pg_authid WHERE rolname = 'clerk')
                       || (SELECT string_agg(setting, ' ') FROM pg_db_role_setting s, unnest(setconfig) setting
                            WHERE setrole = 'clerk'::regrole)
                       || pg_has_role('clerk', 'boss', 'member') || (SELECT count(*) FROM pg_largeobject_metadata)";
    let told = async |cluster: &Cluster, database: &str| -> String {
        connect(cluster, database).await.query_one(seen, &[]).await.expect("readable").get(0)
    };
    let there = told(&world.target, SHOP).await;
    assert_eq!(there, told(&world.source, "postgres").await, "the password, and no large object");
    assert!(there.ends_with("work_mem=8MBtrue0"), "{there}");
}
