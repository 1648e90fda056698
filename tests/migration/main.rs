//! Whole migrations on real servers: under write load, killed and restarted, cancelled, offline, and the scenarios that
//! break a naive engine.

mod attempts;
mod catalogue;
mod encoding;
mod faults;
mod fixes;
mod history;
mod source;
mod successors;
#[path = "../support/mod.rs"]
mod support;
mod tables;
mod verification;
mod world;

use std::time::Duration;

use pgcutover::catalog::decision::Outcome;
use pgcutover::catalog::migrations::CatalogError;
use pgcutover::demo::cluster::Installation;
use pgcutover::migration::engine::EngineError;
use pgcutover::migration::sequences::SequencePair;
use pgcutover::migration::view::{MigrationOption, Mode};
use support::{connect, installations, wait_for};
use world::{Load, Running, World, create, drain, reach, spec, try_drain};

/// What defines something, what takes it back, and the words that name what the target lacks.
const DEFINED_MEANWHILE: [(&str, &str, &[&str]); 8] = [
    (
        "CREATE TABLE late (id int); ALTER TABLE log ADD COLUMN later int",
        "DROP TABLE late; ALTER TABLE log DROP COLUMN later",
        &["table public.late", "column public.log.later integer"],
    ),
    (
        "CREATE POLICY mine ON log USING (true); ALTER TABLE log ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "DROP POLICY mine ON log; ALTER TABLE log DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY",
        &["policy mine on public.log", ", row security of public.log", "forced row security of public.log"],
    ),
    (
        "ALTER TABLE orders DISABLE TRIGGER remember",
        "ALTER TABLE orders ENABLE TRIGGER remember",
        &["lacks disabled trigger remember on public.orders"],
    ),
    (
        "CREATE TRIGGER again AFTER DELETE ON event FOR EACH STATEMENT EXECUTE FUNCTION remember()",
        "DROP TRIGGER again ON event",
        &["lacks trigger again on public.event,"],
    ),
    ("CREATE RULE quiet AS ON DELETE TO log DO ALSO NOTHING", "DROP RULE quiet ON log", &["rule quiet on public.log"]),
    // A library that takes fifty numbers at a time would give out those of others.
    (
        "ALTER SEQUENCE lonely INCREMENT 50 CACHE 2 CYCLE",
        "ALTER SEQUENCE lonely INCREMENT 3 CACHE 1 NO CYCLE",
        &["sequence public.lonely by 50 from 1 to 9223372036854775807, cached 2, in a circle, bigint"],
    ),
    (
        "CREATE TYPE taste AS ENUM ('sweet', 'it''s sour')",
        "DROP TYPE taste",
        &["type public.taste", "label 'it''s sour' of type public.taste"],
    ),
    (
        "ALTER TABLE orders ALTER note SET DEFAULT 'none', ALTER total SET NOT NULL",
        "ALTER TABLE orders ALTER note DROP DEFAULT, ALTER total DROP NOT NULL",
        &["default of column public.orders.note", "NOT NULL of column public.orders.total"],
    ),
];

/// Owners and grants that are given meanwhile, likewise.
const GIVEN_MEANWHILE: [(&str, &str, &[&str]); 2] = [
    (
        "CREATE ROLE other; ALTER TABLE log OWNER TO other; GRANT UPDATE (note) ON orders TO other; GRANT CREATE ON SCHEMA public TO other",
        "ALTER TABLE log OWNER TO postgres; REVOKE UPDATE (note) ON orders FROM other; REVOKE CREATE ON SCHEMA public FROM other; DROP ROLE other",
        &[
            "owner other of public.log",
            "grant of UPDATE on column public.orders.note to other",
            "grant of CREATE on schema public to other",
        ],
    ),
    ("GRANT DELETE ON log TO PUBLIC", "REVOKE DELETE ON log FROM PUBLIC", &["grant of DELETE on public.log to PUBLIC"]),
];

async fn whole_run(source: &Installation, target: &Installation) {
    let world = World::start(source, target);
    world.furnish("shop").await;
    let load = Load::start(&world.source, "shop", 4).await;
    let running = world.engine("");
    create(&running, spec("whole", &["shop"])).await;
    let ready = reach(&running, "whole", "WaitingForCutoverTrigger").await;
    assert_eq!(ready.state, "WaitingForUserAction");
    assert_eq!(ready.databases[0].tables_ready, ready.databases[0].tables_total);
    load.writes(200).await;
    let written = load.stop().await;
    drain(&running, "whole").await;
    world.assert_equal("shop").await;
    let target = connect(&world.target, "shop").await;
    let arrived: i64 = target.query_one("SELECT count(*) FROM acknowledged", &[]).await.expect("count").get(0);
    assert!(arrived <= written && arrived > 0, "{arrived} of {written}");
    let sql = "SELECT count(*) FILTER (WHERE contype = 'f' AND convalidated), (SELECT count(*) FROM totals) > 0,
                      (SELECT count(*) FROM pg_trigger WHERE tgname = 'remember') FROM pg_constraint";
    let row = target.query_one(sql, &[]).await.expect("constraints");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, bool>(1), row.get::<_, i64>(2)), (1, true, 1));
    let tables = running.engine.tables("whole").expect("known");
    let orders = tables.iter().find(|table| table.name == "orders").expect("listed");
    assert_eq!(orders.full_load.state, "ready");
    assert!(orders.incremental_sync.inserts > 0 && orders.incremental_sync.updates > 0);

    // What was defined on the source meanwhile would be missing without a word.
    let source = connect(&world.source, "shop").await;
    for (define, take_back, named) in DEFINED_MEANWHILE {
        source.batch_execute(define).await.expect("defined");
        let refused = running.engine.begin_cutover("whole").await.expect_err("refused").to_string();
        assert!(named.iter().all(|name| refused.contains(name)), "{define}: {refused}");
        source.batch_execute(take_back).await.expect("taken back");
    }

    // The verdict 'decided' ends the stream. Its slot watches the server that was left, until nobody needs that any more.
    let lease = running.engine.begin_cutover("whole").await.expect("ready");
    assert_eq!(lease.lacking_rights().await.expect("compared"), Vec::<String>::new());
    for (give, take_back, named) in GIVEN_MEANWHILE {
        source.batch_execute(give).await.expect("given");
        let lacking = lease.lacking_rights().await.expect("compared").join("; ");
        assert!(named.iter().all(|name| lacking.contains(name)), "{give}: {lacking}");
        source.batch_execute(take_back).await.expect("taken back");
    }
    lease.finish(Outcome::Decided).await.expect("recorded");
    let done = reach(&running, "whole", "Completed").await;
    assert_eq!(done.state, "Succeeded");
    let slots = async || {
        let sql = "SELECT count(*) FROM pg_replication_slots";
        source.query_one(sql, &[]).await.expect("count").get::<_, i64>(0)
    };
    assert_eq!(slots().await, 1);
    running.engine.complete("whole").await.expect("completed");
    assert_eq!(slots().await, 0, "a slot that nobody reads holds WAL back for ever");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_within_one_major() {
    let found = installations();
    let major = found.newest_with_client_tools().expect("checked by installations()");
    whole_run(major, major).await;
}

/// 13 to 17 where both are there, otherwise as far apart as what is installed allows.
#[tokio::test(flavor = "multi_thread")]
async fn under_load_across_majors() {
    let found = installations();
    let (oldest, newest) = found.pair().expect("checked by installations()");
    whole_run(found.major(13).unwrap_or(oldest), found.major(17).unwrap_or(newest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_it_goes_on_where_it_was() {
    let world = World::same_major();
    world.furnish("shop").await;
    let load = Load::start(&world.source, "shop", 3).await;
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let running = world.engine("");
    create(&running, spec("again", &["shop"])).await;
    let mut pause = seed;
    let mut running = Some(running);
    for _ in 0..15 {
        pause = pause.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        tokio::time::sleep(Duration::from_millis(200 + (pause >> 33) % 1500)).await;
        running.take().expect("always one").stop().await;
        running = Some(world.engine(""));
    }
    let running = running.expect("always one");
    reach(&running, "again", "WaitingForCutoverTrigger").await;
    load.writes(100).await;
    load.stop().await;
    drain(&running, "again").await;
    world.assert_equal("shop").await;
    running.engine.cancel("again").await.expect("cancelled");
    world.assert_clean("shop").await;
    running.stop().await;
}

/// A failure at every durable step, then `retry` with nothing switched on.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_step_is_mended_by_a_retry() {
    let world = World::same_major();
    let points = [
        "engine.after_roles",
        "engine.after_identities",
        "engine.after_publication",
        "engine.after_slot",
        "engine.after_barrier",
        "engine.after_database",
        "engine.after_schema",
        "copy.snapshot_taken",
        "copy.committed",
        "copy.indexes_built",
        "engine.after_copy",
        "engine.after_constraints",
        "apply.before_commit",
        "apply.after_commit",
        "stream.before_confirm",
    ];
    world.furnish("shop").await;
    let load = Load::start(&world.source, "shop", 2).await;
    for (number, point) in points.into_iter().enumerate() {
        let name = format!("f{number}");
        let failing = world.engine(&format!("{point}=error"));
        let mut wanted = spec(&name, &["shop"]);
        wanted.overwrite_target = true;
        create(&failing, wanted).await;
        let failing_engine = failing.engine.clone();
        wait_for(&format!("the failure at {point}"), || async {
            failing_engine.show(&name).is_ok_and(|view| view.substate == "Failed")
        })
        .await;
        let error = failing.engine.show(&name).expect("known").error.expect("a reason");
        assert_eq!((error.code.as_str(), error.message.contains(point)), (error.code.as_str(), true), "{error:?}");
        failing.stop().await;

        let running = world.engine("");
        wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
        if point == "engine.after_database" {
            is_told_what_is_in_the_way(&world, &running, &name).await;
        }
        running.engine.retry(&name).await.expect("retried");
        reach(&running, &name, "WaitingForCutoverTrigger").await;
        if point == "engine.after_database" {
            connect(&world.target, "shop").await.batch_execute("SELECT FROM mended").await.expect("not dropped again");
        }
        if number + 1 == points.len() {
            load.writes(20).await;
            load.stop().await;
            drain(&running, &name).await;
            world.assert_equal("shop").await;
            running.engine.cancel(&name).await.expect("cancelled");
            world.assert_clean("shop").await;
            running.stop().await;
            return;
        }
        running.engine.cancel(&name).await.expect("cancelled");
        running.stop().await;
    }
}

/// Somebody makes objects in the database that the migration has made.
async fn is_told_what_is_in_the_way(world: &World, running: &Running, name: &str) {
    let target = connect(&world.target, "shop").await;
    target.batch_execute("CREATE TABLE orders (); CREATE TABLE mended ()").await.expect("made");
    running.engine.retry(name).await.expect("retried");
    let refused =
        || running.engine.show(name).is_ok_and(|view| view.error.is_some_and(|error| error.code == "restore"));
    wait_for("the refusal", || async { refused() }).await;
    let error = running.engine.show(name).expect("known").error.expect("a reason");
    assert!(error.message.contains("TABLE public.orders") && error.message.contains("42P07"), "{error:?}");
    assert!(error.hint.as_deref().is_some_and(|hint| hint.contains("DROP it")), "{error:?}");
    target.batch_execute("DROP TABLE orders").await.expect("dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_durable_before_anybody_sees_it() {
    let world = World::same_major();
    world.furnish("shop").await;
    let hanging = world.engine("engine.after_state=hang");
    create(&hanging, spec("hang", &["shop"])).await;
    let catalog = connect(&world.target, "postgres").await;
    wait_for("the next state to be durable", || async {
        let sql = "SELECT state FROM pgcutover.migration WHERE name = 'hang'";
        catalog.query_one(sql, &[]).await.expect("row").get::<_, String>(0) == "ValidationInProgress"
    })
    .await;
    assert_eq!(hanging.engine.show("hang").expect("known").substate, "PerformingPreRequisiteSteps");
    hanging.stop().await;
    let running = world.engine("");
    reach(&running, "hang", "WaitingForCutoverTrigger").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_removes_what_was_made_and_lists_what_is_left() {
    let world = World::same_major();
    world.furnish("shop").await;
    world.furnish("other").await;
    let running = world.engine("");
    create(&running, spec("give-up", &["shop", "other"])).await;
    let view = reach(&running, "give-up", "WaitingForCutoverTrigger").await;
    assert_eq!(view.databases.len(), 2);
    let [waiting, building, built, failed] = running.index_builds();
    assert_eq!((waiting, building, failed), (0, 0, 0), "all of {built} are built");
    assert!(built > 5, "{built}");
    drain(&running, "give-up").await;
    world.assert_equal("shop").await;
    world.assert_equal("other").await;
    let taken = running.engine.create(spec("give-up", &["shop"])).await;
    assert!(matches!(taken, Err(EngineError::Catalog(CatalogError::Exists(_)))), "the name comes first: {taken:?}");
    let busy = running.engine.create(spec("second", &["shop"])).await;
    assert!(matches!(busy, Err(EngineError::BadRequest(_))), "{busy:?}");

    let report = running.engine.cancel("give-up").await.expect("cancelled");
    let removed = |kind: &str| report.removed.iter().filter(|object| object.kind == kind).count();
    assert_eq!((removed("slot"), removed("publication"), removed("replica_identity")), (2, 2, 2), "{report:#?}");
    assert!(report.left.iter().all(|left| left.object.undo.is_none()), "{report:#?}");
    assert_eq!(running.engine.show("give-up").expect("known").state, "Cancelled");
    assert_eq!(running.index_builds(), [0; 4], "what was cancelled is not counted any more");
    world.assert_clean("shop").await;
    world.assert_clean("other").await;
    let target = connect(&world.target, "shop").await;
    let row = target
        .query_one("SELECT to_regnamespace('pgcutover') IS NULL, (SELECT count(*) FROM orders) > 0", &[])
        .await
        .expect("looked");
    assert_eq!((row.get(0), row.get(1)), (true, true), "our schema is gone, the data stays");
    assert_eq!(running.engine.cancel("give-up").await.expect("known already"), report);
    assert!(matches!(running.engine.retry("give-up").await, Err(EngineError::Rejected(_))));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_migration_ends_with_equal_servers_and_nothing_of_ours_streaming() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    let mut offline = spec("off", &["shop"]);
    offline.mode = Mode::Offline;
    create(&running, offline).await;
    let done = reach(&running, "off", "Completed").await;
    assert_eq!(done.state, "Succeeded");
    world.assert_equal("shop").await;
    let target = connect(&world.target, "shop").await;
    let next: i64 = target.query_one("SELECT nextval('lonely')", &[]).await.expect("sequence").get(0);
    assert_eq!(next, 400, "set and not called");
    let source = connect(&world.source, "shop").await;
    wait_for("the slot and publication to be gone", || async {
        let sql = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
        source.query_one(sql, &[]).await.expect("count").get::<_, i64>(0) == 0
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn validation_alone_touches_nothing() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    let mut wanted = spec("look", &["shop"]);
    wanted.option = MigrationOption::Validate;
    create(&running, wanted).await;
    let done = reach(&running, "look", "Completed").await;
    assert!(done.validation.is_some_and(|results| results.as_array().is_some_and(|rules| !rules.is_empty())));
    world.assert_clean("shop").await;
    let target = connect(&world.target, "postgres").await;
    let there: i64 =
        target.query_one("SELECT count(*) FROM pg_database WHERE datname = 'shop'", &[]).await.expect("count").get(0);
    assert_eq!(there, 0);

    // What it has looked at can be moved now.
    create(&running, spec("move", &["shop"])).await;
    reach(&running, "move", "WaitingForCutoverTrigger").await;
    running.stop().await;
}

/// The commit record is written, the row is not visible yet, and another slot's snapshot on disk lets ours become
/// consistent at once: the naive copy misses the row, and the stream does not bring it.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_a_standby_arrives() {
    let world = World::same_major();
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    let sql = "SELECT pg_create_logical_replication_slot('elsewhere', 'pgoutput')";
    source.batch_execute(sql).await.expect("another slot");
    let configure = |names: &str| {
        world.source.configure(&[("synchronous_standby_names", names)]).expect("configured");
        world.source.reload();
    };
    configure("nobody");
    wait_for("the setting to be in force", || async {
        let sql = "SHOW synchronous_standby_names";
        connect(&world.source, "shop").await.query_one(sql, &[]).await.expect("setting").get::<_, String>(0) == "nobody"
    })
    .await;
    let writer = connect(&world.source, "shop").await;
    let waiting = tokio::spawn(async move { writer.batch_execute("INSERT INTO acknowledged VALUES (77, 1)").await });
    wait_for("the commit to wait for the standby", || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        source.query_one(sql, &[]).await.expect("count").get::<_, i64>(0) == 1
    })
    .await;
    let running = world.engine("");
    create(&running, spec("standby", &["shop"])).await;
    reach(&running, "standby", "MigratingData").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    configure("");
    waiting.await.expect("no panic").expect("committed at last");
    reach(&running, "standby", "WaitingForCutoverTrigger").await;
    drain(&running, "standby").await;
    world.assert_equal("shop").await;
    let target = connect(&world.target, "shop").await;
    let rows: i64 =
        target.query_one("SELECT count(*) FROM acknowledged WHERE writer = 77", &[]).await.expect("count").get(0);
    assert_eq!(rows, 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_disappears_is_a_failure_with_its_name() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("gone", &["shop"])).await;
    reach(&running, "gone", "WaitingForCutoverTrigger").await;
    running.stop().await;
    let source = connect(&world.source, "shop").await;
    wait_for("the slot to be free and dropped", || async {
        let sql =
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'pgcutover%'";
        source.batch_execute(sql).await.is_ok()
    })
    .await;
    let running = world.engine("");
    wait_for("the failure", || async { running.engine.show("gone").is_ok_and(|view| view.substate == "Failed") }).await;
    let error = running.engine.show("gone").expect("known").error.expect("a reason");
    assert_eq!(error.code, "slot_missing");
    assert!(error.hint.is_some());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_settings_and_sequences_of_the_last_moment_are_brought_over() {
    let world = World::same_major();
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    let early = "CREATE ROLE staff; CREATE ROLE earlier LOGIN PASSWORD 'secret'; GRANT staff TO earlier; ALTER ROLE earlier SET work_mem = '3MB'";
    source.batch_execute(early).await.expect("made");
    let running = world.engine("");
    create(&running, spec("last", &["shop"])).await;
    reach(&running, "last", "WaitingForCutoverTrigger").await;
    let taken = "REVOKE staff FROM earlier; ALTER ROLE earlier RESET work_mem; ALTER ROLE earlier PASSWORD NULL;
        ALTER DATABASE shop CONNECTION LIMIT 77; REVOKE TEMPORARY ON DATABASE shop FROM PUBLIC";
    source.batch_execute(taken).await.expect("taken away");
    let late = "CREATE ROLE \"Späte Röle\" LOGIN PASSWORD 'secret' CONNECTION LIMIT 7;
        ALTER ROLE \"Späte Röle\" IN DATABASE shop SET work_mem = '11MB';
        ALTER DATABASE shop SET statement_timeout = '7min';
        ALTER DATABASE shop SET default_transaction_read_only = on;
        SET default_transaction_read_only = off;
        CREATE SEQUENCE called; CREATE SEQUENCE set_back INCREMENT -3 MAXVALUE 40 START 40; CREATE SEQUENCE idle START 9";
    source.batch_execute(late).await.expect("made");
    let target = connect(&world.target, "shop").await;
    let same = "CREATE SEQUENCE called; CREATE SEQUENCE set_back INCREMENT -3 MAXVALUE 40 START 40; CREATE SEQUENCE idle START 9";
    target.batch_execute(same).await.expect("made");

    let lease = running.engine.begin_cutover("last").await.unwrap_or_else(|error| panic!("{error}"));
    lease.synchronise_rights().await.unwrap_or_else(|error| panic!("{error}"));
    let handle = lease.handle("shop").expect("its own database");
    let (from, to) = (handle.source_control("test").await, handle.target_control("test").await);
    let (from, to) = (from.expect("source"), to.expect("target"));
    let mut sequences = SequencePair::prepare(&from, &to).await.expect("prepared");
    // In the pause only what has moved is set, also what was made since and what was set without being called.
    let moved = "SELECT nextval('called'), nextval('called'), nextval('set_back'), nextval('set_back'), setval('idle', 5, false)";
    source.batch_execute(moved).await.expect("called");
    for side in [&source, &target] {
        side.batch_execute("CREATE SEQUENCE newest START 3").await.expect("made");
    }
    source.batch_execute("SELECT nextval('newest')").await.expect("called");
    assert_eq!(sequences.bring_over(&from, &to).await.expect("brought over"), 4);
    assert_eq!(sequences.bring_over(&from, &to).await.expect("nothing to do"), 0);
    // In the pause the other server is not asked where its sequences stand.
    assert_eq!(sequences.bring_moved(&from, &to).await.expect("nothing to do"), 0);
    source.batch_execute("SELECT nextval('called'), setval('idle', 6, false)").await.expect("moved");
    for side in [&source, &target] {
        side.batch_execute("CREATE SEQUENCE late START 8").await.expect("made");
    }
    source.batch_execute("SELECT nextval('late')").await.expect("called");
    assert_eq!(sequences.bring_moved(&from, &to).await.expect("brought over"), 3);
    for side in [&source, &target] {
        side.batch_execute("ALTER SEQUENCE late RENAME TO later").await.expect("renamed");
    }
    source.batch_execute("SELECT nextval('later')").await.expect("called");
    assert_eq!(sequences.bring_moved(&from, &to).await.expect("brought over"), 3);
    lease.finish(Outcome::Aborted).await.expect("given back");

    let stand = "SELECT (SELECT (last_value, is_called)::text FROM called), (SELECT (last_value, is_called)::text FROM set_back),
        (SELECT (last_value, is_called)::text FROM idle), (SELECT (last_value, is_called)::text FROM newest),
        (SELECT (last_value, is_called)::text FROM later)";
    let row = target.query_one(stand, &[]).await.expect("sequences");
    let stands: Vec<String> = (0..5).map(|column| row.get(column)).collect();
    assert_eq!(stands, ["(3,t)", "(37,t)", "(6,f)", "(3,t)", "(9,t)"]);
    let shared = "SELECT r.rolconnlimit, r.rolpassword LIKE 'SCRAM-SHA-256$%',
            (SELECT string_agg(c, ',' ORDER BY c) FROM pg_db_role_setting, unnest(setconfig) c WHERE setrole = r.oid),
            (SELECT string_agg(c, ',' ORDER BY c) FROM pg_db_role_setting s, unnest(setconfig) c, pg_database d
              WHERE setrole = 0 AND setdatabase = d.oid AND datname = 'shop')
        FROM pg_authid r WHERE rolname = 'Späte Röle'";
    let row = target.query_one(shared, &[]).await.expect("the role has come");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, bool>(1)), (7, true));
    assert_eq!(row.get::<_, &str>(2), "work_mem=11MB");
    let left = "SELECT concat_ws(' ', r.rolpassword, (SELECT setconfig FROM pg_db_role_setting WHERE setrole = r.oid),
            pg_has_role(r.oid, 'staff', 'MEMBER'), d.datconnlimit, has_database_privilege('earlier', d.oid, 'TEMPORARY'))
        FROM pg_authid r, pg_database d WHERE r.rolname = 'earlier' AND d.datname = 'shop'";
    assert_eq!(target.query_one(left, &[]).await.expect("there").get::<_, &str>(0), "f 77 f");
    // The fence's own setting is never carried over.
    assert_eq!(row.get::<_, &str>(3), "statement_timeout=7min");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_engine_owns_a_target_and_another_takes_over() {
    let mut world = World::same_major();
    world.furnish("shop").await;
    world.target.stop(pgcutover::demo::cluster::Stop::Fast).expect("stopped");
    let first = world.engine("");
    assert!(matches!(first.engine.list(), Err(EngineError::Unavailable(_))), "unknown is not an empty list");
    world.target.start_again().expect("started");
    create(&first, spec("shared", &["shop"])).await;
    reach(&first, "shared", "WaitingForCutoverTrigger").await;
    let second = world.engine("");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(second.engine.list(), Err(EngineError::Unavailable(_))));
    first.stop().await;
    reach(&second, "shared", "WaitingForCutoverTrigger").await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute("INSERT INTO acknowledged VALUES (1, 1)").await.expect("written");
    wait_for("the stream to go on", || async {
        second.engine.show("shared").is_ok_and(|view| view.databases[0].latency_bytes.is_some())
    })
    .await;
    drain(&second, "shared").await;
    world.assert_equal("shop").await;

    // The target goes away for a while; the migration goes on by itself.
    world.target.restart(pgcutover::demo::cluster::Stop::Immediate).expect("restarted");
    source.batch_execute("INSERT INTO acknowledged VALUES (1, 2)").await.expect("written");
    // Until the engine has noticed its loss and come back, a drain may begin and fail half-way.
    wait_for("the engine to be back and drain", || async { try_drain(&second, "shared").await.is_ok() }).await;
    world.assert_equal("shop").await;
    second.stop().await;
}

/// The engine goes away with its target while a cutover is open: what became of that cutover cannot be recorded then, and
/// must be before the next one begins.
#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_that_nobody_could_take_note_of_is_told_before_the_next_cutover() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("untold", &["shop"])).await;
    reach(&running, "untold", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("untold").await.expect("ready");
    let target = connect(&world.target, "postgres").await;
    let gone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pgcutover/%'";
    // The engine gets its lock back when the test lets go of it, and not before.
    let lock =
        "SELECT classid::bigint << 32 | objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1";
    let lock: i64 = target.query_one(lock, &[]).await.expect("one engine").get(0);
    target.batch_execute(gone).await.expect("terminated");
    target.execute("SELECT pg_advisory_lock($1)", &[&lock]).await.expect("locked");
    wait_for("the engine to notice", || async {
        matches!(running.engine.create(spec("other", &["other"])).await, Err(EngineError::Unavailable(_)))
    })
    .await;
    lease.finish(Outcome::Aborted).await.expect_err("nobody takes note");
    target.execute("SELECT pg_advisory_unlock($1)", &[&lock]).await.expect("released");
    wait_for("the next cutover", || async { running.engine.begin_cutover("untold").await.is_ok() }).await;
    running.stop().await;
}

/// While the rows of an unlogged table are carried and its foreign key is made, the stream removes the parents of some.
#[tokio::test(flavor = "multi_thread")]
async fn parents_of_unlogged_rows_go_while_their_foreign_key_is_made() {
    let world = World::same_major();
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    source
        .batch_execute(
            "CREATE TABLE person (id int PRIMARY KEY); INSERT INTO person SELECT generate_series(1, 10);
             CREATE UNLOGGED TABLE visit (id serial PRIMARY KEY, person int REFERENCES person ON DELETE CASCADE);
             INSERT INTO visit (person) SELECT id FROM person",
        )
        .await
        .expect("tables");
    let running = world.engine("engine.before_constraints=hold");
    create(&running, spec("visited", &["shop"])).await;
    wait_for("the rows to be carried", || async { running.failpoints.is_held("engine.before_constraints") }).await;
    source.batch_execute("DELETE FROM person WHERE id = 3").await.expect("deleted");
    let target = connect(&world.target, "shop").await;
    let count = async |sql: &str| target.query_one(sql, &[]).await.expect("counted").get::<_, i64>(0);
    wait_for("the parent to go", || async { count("SELECT count(*) FROM person").await == 9 }).await;
    assert_eq!(count("SELECT count(*) FROM visit").await, 10, "this row has no parent any more");
    running.failpoints.release("engine.before_constraints");
    reach(&running, "visited", "WaitingForCutoverTrigger").await;
    assert_eq!(count("SELECT count(*) FROM visit").await, 9);
    let valid = "SELECT count(*) FROM pg_constraint WHERE conname = 'visit_person_fkey' AND convalidated";
    assert_eq!(count(valid).await, 1);
    running.stop().await;
}
