//! Verification of whole migrations: under load, across majors, interrupted, and where something was done to the target.

use pgcutover::catalog::decision::Outcome;
use pgcutover::demo::cluster::Installation;
use pgcutover::migration::engine::EngineError;
use pgcutover::migration::verify::DifferenceKind;
use pgcutover::migration::view::VerifyReport;

use crate::support::{PATIENCE, connect, installations, wait_for};
use crate::world::{Load, Running, World, create, reach, spec};

/// Objects of most kinds, beside those of the shop. Nothing may differ after a migration.
const MORE: &str = r#"
CREATE DOMAIN short AS varchar(20) CHECK (value <> '');
CREATE VIEW dear AS SELECT orders.id, upper(orders.note) AS note FROM orders WHERE orders.total > 100 AND orders.id IN (1, 2);
CREATE FUNCTION twice(a int, b text DEFAULT 'z') RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a * 2';
CREATE AGGREGATE total_of (int) (sfunc = int4pl, stype = int, initcond = '0');
CREATE RULE quiet AS ON DELETE TO customer DO ALSO NOTHING;
CREATE POLICY own ON event FOR SELECT USING (kind <> 'secret');
CREATE STATISTICS both_of ON customer, total FROM orders;
CREATE CAST (mood AS int) WITH INOUT;
CREATE TEXT SEARCH CONFIGURATION plain (COPY = simple);
GRANT SELECT ON orders TO PUBLIC; GRANT UPDATE (note) ON orders TO PUBLIC; REVOKE ALL ON FUNCTION twice FROM PUBLIC;
COMMENT ON TABLE orders IS 'what was bought'; COMMENT ON COLUMN orders.total IS 'in euro';
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;
"#;

/// What is done to the target, and the definition that differs then.
const CHANGED: &[(&str, &str, &str, &str)] = &[
    ("ALTER TABLE orders ALTER total SET DEFAULT 7", "column", "public.orders.total", "differs"),
    ("ALTER SEQUENCE lonely INCREMENT 5", "sequence", "public.lonely", "differs"),
    ("SELECT setval('orders_id_seq', 999999999)", "sequence", "public.orders_id_seq", "ahead"),
    ("DROP INDEX orders_customer", "index", "public.orders_customer", "missing"),
    ("CREATE TABLE strange (id int)", "table", "public.strange", "extra"),
    (
        "ALTER TABLE orders DROP CONSTRAINT orders_customer_fkey",
        "constraint",
        "public.orders.orders_customer_fkey",
        "missing",
    ),
    ("ALTER TABLE orders DISABLE TRIGGER remember", "trigger", "public.orders.remember", "differs"),
    ("ALTER TYPE mood ADD VALUE 'glad'", "enum", "public.mood", "differs"),
    ("REVOKE SELECT ON orders FROM PUBLIC", "grant on relation", "public.orders", "differs"),
    ("COMMENT ON COLUMN orders.total IS 'in dollar'", "comment", "class public.orders.total", "differs"),
    (
        "CREATE OR REPLACE VIEW dear AS SELECT orders.id, upper(orders.note) AS note FROM orders WHERE orders.total > 101 AND orders.id IN (1, 2)",
        "view",
        "public.dear",
        "differs",
    ),
    (
        "CREATE OR REPLACE FUNCTION twice(a int, b text DEFAULT 'z') RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a * 3'",
        "function",
        "public.twice(a integer, b text)",
        "differs",
    ),
    ("ALTER POLICY own ON event USING (kind <> 'other')", "policy", "public.event.own", "differs"),
];

async fn ready(source: &Installation, target: &Installation) -> (World, Running) {
    let world = World::start(source, target);
    world.furnish("shop").await;
    connect(&world.source, "shop").await.batch_execute(MORE).await.expect("more");
    let running = world.engine("");
    create(&running, spec("checked", &["shop"])).await;
    reach(&running, "checked", "WaitingForCutoverTrigger").await;
    (world, running)
}

/// A migration that is cut over only when nothing differs.
async fn required() -> (World, Running) {
    let found = installations();
    let major = found.newest_with_client_tools().expect("checked by installations()");
    let mut world = World::start(major, major);
    std::sync::Arc::get_mut(&mut world.config).expect("nobody else has it").cutover.require_verified = true;
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("checked", &["shop"])).await;
    reach(&running, "checked", "WaitingForCutoverTrigger").await;
    (world, running)
}

async fn verify(running: &Running) -> VerifyReport {
    running.engine.verify("checked").await.unwrap_or_else(|error| panic!("{error:?}"))
}

async fn whole(source: &Installation, target: &Installation) {
    let (world, running) = ready(source, target).await;
    let load = Load::start(&world.source, "shop", 3).await;
    load.writes(20).await;
    let report = verify(&running).await;
    assert_eq!((report.differences, &report.tables, &report.definitions), (0, &vec![], &vec![]));
    assert_eq!(report.tables_compared, 6, "leaves of partitioned tables each for itself");
    assert!(report.rows_compared > 25_000, "{}", report.rows_compared);
    load.writes(20).await;
    load.stop().await;

    let there = connect(&world.target, "shop").await;
    there.batch_execute("SET session_replication_role = replica").await.expect("no trigger fires");
    // A row that the load cannot have removed.
    let kept = "INSERT INTO event VALUES (9000000, 'b', 'kept')";
    connect(&world.source, "shop").await.batch_execute(kept).await.expect("inserted");
    wait_for("it to arrive", || async {
        let count = there.query_one("SELECT count(*) FROM event WHERE id = 9000000", &[]).await;
        count.expect("counted").get::<_, i64>(0) == 1
    })
    .await;
    let damage = "UPDATE customer SET mood = 'sad' WHERE id = 3; DELETE FROM event WHERE id = 9000000;
                  INSERT INTO acknowledged VALUES (77, 1)";
    there.batch_execute(damage).await.expect("damaged");
    for (sql, ..) in CHANGED {
        there.batch_execute(sql).await.expect(sql);
    }
    let report = verify(&running).await;
    let rows: Vec<(String, DifferenceKind, String)> = report
        .tables
        .iter()
        .flat_map(|table| table.result.listed.iter().map(|row| (table.result.name.clone(), row.kind, row.shown_key())))
        .collect();
    let row = |table: &str, kind, key: &str| (table.to_owned(), kind, key.to_owned());
    assert_eq!(rows.len(), 3, "{rows:?}");
    assert!(rows.contains(&row("customer", DifferenceKind::Differs, "(3)")), "{rows:?}");
    assert!(rows.contains(&row("event_b", DifferenceKind::Missing, "(9000000, b)")), "{rows:?}");
    assert!(rows.contains(&row("acknowledged", DifferenceKind::Extra, "(77, 1)")), "{rows:?}");
    let found = &report.definitions[0].definitions;
    for (sql, kind, name, difference) in CHANGED {
        let named = found.iter().any(|found| {
            (found.kind.as_str(), found.name.as_str(), found.difference.as_str()) == (*kind, *name, *difference)
        });
        assert!(named, "{sql}: {found:#?}");
    }
    assert_eq!(report.differences, 3 + found.len() as u64);
    let tables = running.engine.tables("checked").expect("known");
    let shown =
        |name: &str| tables.iter().find(|table| table.name == name).and_then(|table| table.verification.clone());
    assert_eq!((shown("customer").as_deref(), shown("orders").as_deref()), (Some("1 difference"), Some("equal")));
    running.stop().await;
    // What was found outlives the process.
    let running = world.engine("");
    wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
    let tables = running.engine.tables("checked").expect("known");
    assert!(tables.iter().any(|table| table.verification.as_deref() == Some("1 difference")));
    let kept = running.engine.verification("checked").await.expect("readable");
    assert_eq!(kept.as_ref(), Some(&report), "rows and definitions, as they were told");
    running.stop().await;
}

/// The stream that a verification would go on beside ends with the lock.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_loses_its_lock_gives_up_its_verification() {
    let found = installations();
    let major = found.newest_with_client_tools().expect("checked by installations()");
    let (world, running) = ready(major, major).await;
    let (holder, looker) = (connect(&world.target, "shop").await, connect(&world.target, "shop").await);
    holder.batch_execute("BEGIN; LOCK TABLE orders IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    let verifying = tokio::spawn({
        let engine = running.engine.clone();
        async move { engine.verify("checked").await }
    });
    wait_for("the verification to wait for the table", || async {
        let waiting = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'orders'::regclass LIMIT 1";
        looker.query_opt(waiting, &[]).await.expect("readable").is_some()
    })
    .await;
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted";
    connect(&world.target, "postgres").await.batch_execute(kill).await.expect("a superuser may");
    let ended = tokio::time::timeout(PATIENCE, verifying).await.expect("given up").expect("no panic");
    assert!(matches!(ended, Err(EngineError::Unavailable(_))), "{ended:?}");
    holder.batch_execute("ROLLBACK").await.expect("released");
    wait_for("the engine to verify again", || async {
        running.engine.verify("checked").await.is_ok_and(|report| report.differences == 0)
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_under_load_and_every_damage_is_named() {
    let found = installations();
    let major = found.newest_with_client_tools().expect("checked by installations()");
    whole(major, major).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_under_load_and_every_damage_is_named_across_majors() {
    let found = installations();
    let (oldest, newest) = found.pair().expect("checked by installations()");
    whole(found.major(13).unwrap_or(oldest), found.major(18).unwrap_or(newest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_to_is_compared_again_and_nothing_else() {
    let found = installations();
    let major = found.newest_with_client_tools().expect("checked by installations()");
    let (world, running) = ready(major, major).await;
    assert_eq!(verify(&running).await.differences, 0);
    let there = connect(&world.target, "shop").await;
    there.batch_execute("UPDATE customer SET mood = 'sad' WHERE id = 3").await.expect("damaged");
    let again = running.engine.verify_changed("checked").await.expect("verified");
    assert_eq!(again.differences, 0, "customer was found equal, and nothing came along the stream since");
    let here = connect(&world.source, "shop").await;
    here.batch_execute("UPDATE customer SET mood = 'happy' WHERE id = 4").await.expect("written");
    let updated = || async {
        let tables = running.engine.tables("checked").expect("known");
        tables.iter().any(|table| table.name == "customer" && table.incremental_sync.updates > 0)
    };
    wait_for("the update to arrive", updated).await;
    let again = running.engine.verify_changed("checked").await.expect("verified");
    assert_eq!(again.differences, 1, "{again:#?}");
    let refused = running.engine.verify("nobody").await.expect_err("unknown");
    assert!(refused.to_string().contains("nobody"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cutover_that_requires_it_begins_only_when_nothing_differs() {
    let (world, running) = required().await;
    let lease = running.engine.begin_cutover("checked").await.expect("equal, which was found out now");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    reach(&running, "checked", "WaitingForCutoverTrigger").await;
    let there = connect(&world.target, "shop").await;
    there.batch_execute("UPDATE customer SET mood = 'sad' WHERE id = 3").await.expect("damaged");
    let here = connect(&world.source, "shop").await;
    here.batch_execute("UPDATE customer SET mood = 'happy' WHERE id = 4").await.expect("written");
    let updated = || async {
        let tables = running.engine.tables("checked").expect("known");
        tables.iter().any(|table| table.name == "customer" && table.incremental_sync.updates > 0)
    };
    wait_for("the update to arrive", updated).await;
    let refused = running.engine.begin_cutover("checked").await.expect_err("customer differs").to_string();
    assert!(refused.contains("1 places") && refused.contains("customer"), "{refused}");
    there.batch_execute("UPDATE customer SET mood = 'ok' WHERE id = 3").await.expect("mended");
    let lease = running.engine.begin_cutover("checked").await.expect("what differed is compared again");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    running.stop().await;
}

/// ALTER TABLE that writes every row anew sends none along the stream, and leaves names and types as they are.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_rewritten_without_a_word_is_compared_again_before_a_cutover() {
    let (world, running) = required().await;
    assert_eq!(verify(&running).await.differences, 0);
    let here = connect(&world.source, "shop").await;
    for (sql, table) in [
        ("ALTER TABLE orders ALTER extra TYPE jsonb USING coalesce(extra, '{}') || '{\"x\": 1}'", "orders"),
        ("ALTER TABLE event DROP COLUMN body; ALTER TABLE event ADD COLUMN body text", "event"),
    ] {
        here.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let found = running.engine.verify_changed("checked").await.expect("verified");
        let named = found.tables.iter().any(|one| one.result.name.starts_with(table) && one.result.differences > 0);
        assert!(named, "{sql}: {found:#?}");
        let refused = running.engine.begin_cutover("checked").await.map(drop).expect_err("they differ").to_string();
        assert!(refused.contains(table), "{refused}");
        // The same there.
        let there = connect(&world.target, "shop").await;
        there.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let again = running.engine.verify_changed("checked").await.expect("verified");
        assert_eq!(again.differences, 0, "{sql}: {again:#?}");
    }

    // Behind that comparison, and before the cutover has its own eye on definitions.
    let lease = running.engine.begin_cutover("checked").await.expect("equal");
    for harmless in ["TRUNCATE log", "VACUUM FULL acknowledged"] {
        here.batch_execute(harmless).await.expect("the stream knows");
    }
    lease.compare_definitions().await.expect("nothing was altered");
    let upper = "ALTER TABLE log ALTER what TYPE text USING upper(what)";
    here.batch_execute(upper).await.expect("rewritten");
    let refused = lease.compare_definitions().await.expect_err("it was altered").to_string();
    assert!(refused.contains("\"log\" was altered or replaced"), "{refused}");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    reach(&running, "checked", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("checked").await.expect("it is empty on both servers");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    running.stop().await;
}
