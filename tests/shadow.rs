//! Shadow reads: what runs on the target too, how it compares, and that nobody but the operator notices.

mod support;

use std::process::Command;
use std::time::Duration;

use pgcutover::cutover::report::CutoverOutcome;
use pgcutover::proxy::shadow::{ShadowOrder, ShadowReads, ShadowView};
use support::stage::{Life, NAME, Stage};
use support::{connect, connect_with, wait_for};
use tokio_postgres::Client;

const SLOT: &str = "pgcutover_0123456789abcdef";

fn reads(life: &Life) -> ShadowReads {
    life.proxy.as_ref().expect("a proxy").sessions().shadow_reads().expect("they have their proxy")
}

/// All of the transactions, for longer than any test.
fn order() -> ShadowOrder {
    ShadowOrder {
        migration: NAME.to_owned(),
        databases: vec!["shop".to_owned()],
        share: 100,
        lasts: Duration::from_secs(600),
    }
}

fn view(life: &Life) -> ShadowView {
    reads(life).view(NAME).expect("they were ordered")
}

fn outcome(life: &Life, name: &str) -> u64 {
    view(life).outcomes[name]
}

async fn on_both(stage: &Stage, sql: &str) {
    for cluster in [&stage.source, &stage.target] {
        connect(cluster, "shop").await.batch_execute(sql).await.expect("valid on both");
    }
}

/// Connections of shadow reads on the target.
async fn connections(stage: &Stage) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgcutover shadow reads'";
    connect(&stage.target, "postgres").await.query_one(sql, &[]).await.expect("answers").get(0)
}

/// Runs `sql` until `done`: the first sample of a session only makes its state known, and workers look once a second.
async fn until(life: &Life, client: &Client, sql: &str, done: impl Fn(&ShadowView) -> bool) {
    wait_for(sql, || async {
        client.simple_query(sql).await.expect("the client notices nothing");
        done(&view(life))
    })
    .await;
}

/// Both protocols, statements prepared before and after the order; and nothing on the target while none is ordered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_reads_are_counted_equal_and_writes_stay_away() {
    let stage = Stage::set().await;
    on_both(&stage, "INSERT INTO item (name) SELECT 'item ' || n FROM generate_series(1, 100) n").await;
    let life = stage.life_with_proxy("").resolved().await;
    let client = connect_with(&life.client("app")).await;
    let before = client.prepare("SELECT name FROM item WHERE id = $1").await.expect("prepared");
    client.query(&before, &[&1i64]).await.expect("answers");
    assert_eq!(connections(&stage).await, 0, "nothing is ordered");
    assert_eq!(reads(&life).view(NAME), None);

    reads(&life).start(order()).await.expect("both servers answer");
    until(&life, &client, "SELECT count(*) FROM item", |view| view.outcomes["equal"] > 0).await;
    wait_for("a statement prepared before", || async {
        let equal = outcome(&life, "equal");
        client.query(&before, &[&7i64]).await.expect("answers");
        wait_for("its outcome", || async { view(&life).sampled == settled(&life) }).await;
        outcome(&life, "equal") > equal
    })
    .await;
    let after = client.prepare("SELECT id, name FROM item WHERE name LIKE $1 ORDER BY id").await.expect("prepared");
    wait_for("a statement prepared after", || async {
        let equal = outcome(&life, "equal");
        client.query(&after, &[&"item 1%"]).await.expect("answers");
        wait_for("its outcome", || async { view(&life).sampled == settled(&life) }).await;
        outcome(&life, "equal") > equal
    })
    .await;

    // A write, open or in disguise: the function says that it only reads, so only the target's transaction is in the way.
    on_both(
        &stage,
        "CREATE FUNCTION lies() RETURNS int LANGUAGE plpgsql VOLATILE AS \
         $$ BEGIN INSERT INTO item (name) VALUES ('lie'); RETURN 1; END $$; \
         CREATE FUNCTION hides() RETURNS int LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN lies(); END $$",
    )
    .await;
    // Known to the run from its start on: so it begins anew.
    reads(&life).stop(NAME, "the test").await.expect("they are on");
    reads(&life).start(order()).await.expect("again");
    until(&life, &client, "SELECT hides()", |view| view.failed.values().sum::<u64>() > 0).await;
    client.batch_execute("INSERT INTO item (name) VALUES ('one')").await.expect("on the source");
    client.simple_query("SELECT lies()").await.expect("on the source");
    wait_for("everything to be settled", || async { view(&life).sampled == settled(&life) }).await;
    let target = connect(&stage.target, "shop").await;
    let count: i64 = target.query_one("SELECT count(*) FROM item", &[]).await.expect("answers").get(0);
    assert_eq!(count, 100, "nothing was written on the target");
    let view = view(&life);
    assert!(view.failed.keys().all(|sqlstate| sqlstate == "25006"), "{view:?}");
    assert!(view.skipped["not_a_read"] > 0 && view.skipped["not_comparable"] > 0, "{view:?}");

    reads(&life).stop(NAME, "the test").await.expect("they are on");
    wait_for("no connection", || async { connections(&stage).await == 0 }).await;
}

/// Samples that are neither under way nor in doubt.
fn settled(life: &Life) -> u64 {
    let view = view(life);
    view.skipped.values().sum::<u64>() + view.outcomes.values().sum::<u64>()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_difference_is_told_from_a_target_that_is_behind_and_shows_no_value() {
    let stage = Stage::set().await;
    on_both(&stage, "INSERT INTO item (name) VALUES ('public'), ('secret one')").await;
    let source = connect(&stage.source, "shop").await;
    let make = format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')");
    source.simple_query(&make).await.expect("the source has wal_level logical");
    let life = stage.life_with_proxy("").resolved().await;
    let client = connect_with(&life.client("app")).await;
    reads(&life).start(order()).await.expect("both servers answer");
    let read = "SELECT name FROM item WHERE name LIKE 'secret%'";
    until(&life, &client, read, |view| view.outcomes["equal"] > 0).await;
    wait_for("everything to be settled", || async { view(&life).sampled == settled(&life) }).await;

    // The target has not got the change yet: it is in doubt, and neither equal nor different, until it has.
    source.batch_execute("UPDATE item SET name = 'secret two' WHERE name = 'secret one'").await.expect("updated");
    client.simple_query(read).await.expect("answers");
    wait_for("a first look", || async { view(&life).waiting > 0 }).await;
    assert_eq!(outcome(&life, "different"), 0);
    let target = connect(&stage.target, "shop").await;
    target.batch_execute("UPDATE item SET name = 'secret two' WHERE name = 'secret one'").await.expect("updated");
    let advance = format!("SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_flush_lsn())");
    wait_for("the sample to be settled", || async {
        // Something to advance past an insert position that nothing flushes.
        source.simple_query("SELECT pg_logical_emit_message(true, 'x', '')").await.expect("logged");
        source.simple_query(&advance).await.expect("it advances");
        outcome(&life, "caught_up") > 0
    })
    .await;
    assert_eq!(outcome(&life, "different"), 0);

    // One that stays.
    target.batch_execute("UPDATE item SET name = 'secret three' WHERE name = 'secret two'").await.expect("updated");
    client.simple_query(read).await.expect("answers");
    wait_for("the difference", || async {
        source.simple_query("SELECT pg_logical_emit_message(true, 'x', '')").await.expect("logged");
        source.simple_query(&advance).await.expect("it advances");
        outcome(&life, "different") > 0
    })
    .await;
    let view = view(&life);
    let listed: Vec<_> = view.statements.iter().filter(|statement| statement.different > 0).collect();
    assert_eq!(listed.len(), 1, "{view:?}");
    assert_eq!(listed[0].statement, "select name from item where name like ?");
    assert!(!format!("{view:?}").contains("secret"), "{view:?}");
    assert!(view.source_ms.is_some() && view.target_ms.is_some(), "{view:?}");
    reads(&life).stop(NAME, "the test").await.expect("they are on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_role_reads_what_it_may_read_with_its_own_settings() {
    let stage = Stage::set().await;
    for cluster in [&stage.source, &stage.target] {
        let admin = connect(cluster, "postgres").await;
        admin.batch_execute("CREATE ROLE ann LOGIN; CREATE ROLE bob LOGIN").await.expect("new roles");
    }
    on_both(
        &stage,
        "CREATE TABLE note (owner text, tenant text, body text); GRANT SELECT ON note TO ann, bob; \
         INSERT INTO note VALUES ('ann', 't1', 'a1'), ('ann', 't2', 'a2'), ('bob', 't1', 'b1'); \
         ALTER TABLE note ENABLE ROW LEVEL SECURITY; \
         CREATE POLICY own ON note USING (owner = current_user AND tenant = current_setting('app.tenant', true))",
    )
    .await;
    for life in [stage.life_with_proxy(""), stage.life_with_pool("", 2)] {
        let life = life.resolved().await;
        reads(&life).start(order()).await.expect("both servers answer");
        let mut clients = Vec::new();
        for (user, tenant) in [("ann", "t1"), ("ann", "t2"), ("bob", "t1"), ("bob", "t2")] {
            let mut config = life.client("app");
            let client = connect_with(config.user(user)).await;
            client.batch_execute(&format!("SET app.tenant = '{tenant}'")).await.expect("settable");
            clients.push(client);
        }
        for client in &clients {
            let before = outcome(&life, "equal");
            until(&life, client, "SELECT body FROM note", |view| view.outcomes["equal"] > before).await;
        }
        for _ in 0..20 {
            for client in &clients {
                client.simple_query("SELECT body FROM note").await.expect("answers");
            }
        }
        wait_for("everything to be settled", || async { view(&life).sampled == settled(&life) }).await;
        let view = view(&life);
        let run: u64 = view.outcomes.values().sum();
        assert_eq!((view.outcomes["equal"], view.waiting), (run, 0), "every one is equal: {view:?}");
        assert!(run >= 40, "{view:?}");
        reads(&life).stop(NAME, "the test").await.expect("they are on");
    }
}

/// What sets something is prepared once and run again by its name alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_prepared_statement_sets_is_there_for_the_next_sample() {
    let stage = Stage::set().await;
    for cluster in [&stage.source, &stage.target] {
        let admin = connect(cluster, "postgres").await;
        admin.batch_execute("CREATE ROLE ann LOGIN; CREATE ROLE bob; GRANT bob TO ann").await.expect("new roles");
    }
    on_both(
        &stage,
        "CREATE TABLE note (owner text, tenant text, body text); GRANT SELECT ON note TO ann, bob; \
         INSERT INTO note VALUES ('ann', 't1', 'a1'), ('ann', 't2', 'a2'), ('bob', 't1', 'b1'), ('bob', 't2', 'b2'); \
         ALTER TABLE note ENABLE ROW LEVEL SECURITY; \
         CREATE POLICY own ON note USING (owner = current_user AND tenant = current_setting('app.tenant', true))",
    )
    .await;
    let life = stage.life_with_proxy("").resolved().await;
    let mut config = life.client("app");
    let client = connect_with(config.user("ann")).await;
    let tenant = client.prepare("SELECT set_config('app.tenant', $1, false)").await.expect("prepared");
    let bob = client.prepare("SET ROLE bob").await.expect("prepared");
    let ann = client.prepare("RESET ROLE").await.expect("prepared");
    let sql = "PREPARE tenant (text) AS SELECT set_config('app.tenant', $1, false)";
    client.batch_execute(sql).await.expect("prepared");
    // From here on nothing is parsed but the reads.
    reads(&life).start(order()).await.expect("both servers answer");
    for round in 0..2 {
        for (step, expected) in
            [("bind t1", "a1"), ("bind t2", "a2"), ("t1", "a1"), ("t2", "a2"), ("bob", "b2"), ("ann", "a2")]
        {
            match step {
                "bind t1" => drop(client.query(&tenant, &[&"t1"]).await.expect("set")),
                "bind t2" => drop(client.query(&tenant, &[&"t2"]).await.expect("set")),
                "bob" => drop(client.execute(&bob, &[]).await.expect("set")),
                "ann" => drop(client.execute(&ann, &[]).await.expect("set")),
                by_name => client.batch_execute(&format!("EXECUTE tenant('{by_name}')")).await.expect("set"),
            }
            let before = outcome(&life, "equal");
            until(&life, &client, "SELECT body FROM note", |view| view.outcomes["equal"] > before).await;
            let rows = client.query("SELECT body FROM note", &[]).await.expect("answers");
            let bodies: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            assert_eq!(bodies, [expected], "{step} in round {round}");
        }
    }
    wait_for("everything to be settled", || async { view(&life).sampled == settled(&life) }).await;
    let view = view(&life);
    let run: u64 = view.outcomes.values().sum();
    assert_eq!((view.outcomes["equal"], view.waiting), (run, 0), "every one is equal: {view:?}");
    reads(&life).stop(NAME, "the test").await.expect("they are on");
}

/// Every process of a server, held.
struct Held(Vec<String>);

impl Held {
    fn all_of(pids: Vec<String>) -> Self {
        assert!(Command::new("kill").arg("-STOP").args(&pids).status().expect("kill can be run").success());
        Self(pids)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _status = Command::new("kill").arg("-CONT").args(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_go_on_while_the_target_does_not_answer() {
    let stage = Stage::set().await;
    for life in [stage.life_with_proxy(""), stage.life_with_pool("", 1)] {
        let life = life.resolved().await;
        let client = connect_with(&life.client("app")).await;
        reads(&life).start(order()).await.expect("both servers answer");
        until(&life, &client, "SELECT name FROM item", |view| view.outcomes["equal"] > 0).await;
        let target = connect(&stage.target, "postgres").await;
        let sql = "SELECT pid::text FROM pg_stat_activity WHERE application_name = 'pgcutover shadow reads'";
        let pids: Vec<String> = target.query(sql, &[]).await.expect("answers").iter().map(|row| row.get(0)).collect();
        assert!(!pids.is_empty());
        let held = Held::all_of(pids);
        let before = view(&life);
        for _ in 0..1000 {
            client.simple_query("SELECT name FROM item").await.expect("the client notices nothing");
        }
        let during = view(&life);
        assert!(during.sampled >= before.sampled + 1000, "{during:?}");
        assert!(during.skipped["busy"] >= 800, "what waits is bounded, and the rest counted: {during:?}");
        assert_eq!(during.outcomes["equal"], before.outcomes["equal"], "the target has answered nothing");
        drop(held);
        reads(&life).stop(NAME, "the test").await.expect("they are on");
        wait_for("no connection", || async { connections(&stage).await == 0 }).await;
    }
}

/// Clients that share connections: each read runs with what its own client has set, by the text that its name stands for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_transaction_pooling_a_sample_has_its_clients_settings_and_statements() {
    let stage = Stage::set().await;
    on_both(
        &stage,
        "CREATE SCHEMA a CREATE TABLE thing (id int, name text); CREATE SCHEMA b CREATE TABLE thing (id int, name text); \
         INSERT INTO a.thing VALUES (1, 'of a'); INSERT INTO b.thing VALUES (1, 'of b'); \
         CREATE FUNCTION touch() RETURNS int LANGUAGE plpgsql VOLATILE AS \
         $$ BEGIN INSERT INTO item (name) VALUES ('touched'); RETURN 1; END $$; \
         CREATE FUNCTION hides() RETURNS int LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN touch(); END $$",
    )
    .await;
    let life = stage.life_with_pool("", 2).resolved().await;
    reads(&life).start(order()).await.expect("both servers answer");
    let mut clients = Vec::new();
    for schema in ["a", "b", "a"] {
        let client = connect_with(&life.client("app")).await;
        client.batch_execute(&format!("SET search_path = {schema}, public")).await.expect("settable");
        let named = client.prepare("SELECT name FROM thing WHERE id = $1").await.expect("prepared");
        clients.push((schema, client, named));
    }
    // Prepared under one path, and run under another one from here on.
    let (schema, client, _) = &mut clients[2];
    *schema = "b";
    client.batch_execute("SET search_path = b, public").await.expect("settable");
    for (schema, client, named) in &clients {
        let before = outcome(&life, "equal");
        wait_for("a sample", || async {
            let row = client.query_one(named, &[&1i32]).await.expect("answers");
            assert_eq!(row.get::<_, String>(0), format!("of {schema}"));
            outcome(&life, "equal") > before
        })
        .await;
    }
    let before: u64 = view(&life).outcomes.values().sum();
    for _ in 0..10 {
        for (_, client, named) in &clients {
            client.query_one(named, &[&1i32]).await.expect("answers");
            client.simple_query("SELECT name FROM thing").await.expect("answers");
        }
    }
    wait_for("everything to be settled", || async { view(&life).sampled == settled(&life) }).await;
    let read = view(&life);
    let run: u64 = read.outcomes.values().sum();
    assert_eq!((read.outcomes["equal"], read.waiting), (run, 0), "every one is equal: {read:?}");
    assert!(run >= before + 60, "none was left out: {read:?}");

    // A write, open or in disguise; a transaction block; a statement that fails.
    let (_, client, _) = &clients[0];
    until(&life, client, "SELECT hides()", |view| view.failed.values().sum::<u64>() > 0).await;
    client.batch_execute("INSERT INTO item (name) VALUES ('one')").await.expect("on the source");
    client.simple_query("SELECT touch()").await.expect("on the source");
    client.batch_execute("BEGIN; SELECT 1; COMMIT").await.expect("on the source");
    client.simple_query("SELECT 1 / 0").await.expect_err("on the source");
    wait_for("everything to be settled", || async { view(&life).sampled == settled(&life) }).await;
    let view = view(&life);
    for (why, count) in [("not_a_read", 2), ("not_comparable", 1), ("failed", 1)] {
        assert!(view.skipped[why] >= count, "{why}: {view:?}");
    }
    assert!(view.failed.keys().all(|sqlstate| sqlstate == "25006"), "{view:?}");
    let target = connect(&stage.target, "shop").await;
    let count: i64 = target.query_one("SELECT count(*) FROM item", &[]).await.expect("answers").get(0);
    assert_eq!(count, 0, "nothing was written on the target");
    reads(&life).stop(NAME, "the test").await.expect("they are on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_ends_them_and_is_not_in_their_way() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("").resolved().await;
    let client = connect_with(&life.client("app")).await;
    reads(&life).start(order()).await.expect("both servers answer");
    assert!(reads(&life).start(order()).await.is_err(), "one at a time");
    until(&life, &client, "SELECT name FROM item", |view| view.outcomes["equal"] > 0).await;
    assert!(connections(&stage).await > 0);
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    let ended = view(&life);
    assert_eq!((ended.running, ended.ended.as_deref()), (false, Some("a cutover is prepared")));
    wait_for("no connection", || async { connections(&stage).await == 0 }).await;
    client.batch_execute("INSERT INTO item (name) VALUES ('after')").await.expect("on the target");
    assert_eq!(view(&life).sampled, ended.sampled);
    assert!(reads(&life).start(order()).await.is_err(), "clients are on the target");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_end_with_their_time_and_a_missing_table_is_told_by_its_code() {
    let stage = Stage::set().await;
    connect(&stage.source, "shop").await.batch_execute("CREATE TABLE extra (id int)").await.expect("a table");
    let life = stage.life_with_proxy("").resolved().await;
    let client = connect_with(&life.client("app")).await;
    reads(&life).start(ShadowOrder { lasts: Duration::from_secs(20), ..order() }).await.expect("both servers answer");
    until(&life, &client, "SELECT * FROM extra", |view| view.outcomes["failed"] > 0).await;
    assert!(view(&life).failed.contains_key("42P01"), "{:?}", view(&life));
    wait_for("their end", || async { !view(&life).running }).await;
    assert_eq!(view(&life).ended.as_deref(), Some("its time is over"));
    wait_for("no connection", || async { connections(&stage).await == 0 }).await;
}
