//! What a cutover watches between its comparison and its pause: by itself, and in cutovers that are held there.

use pgcutover::cutover::report::CutoverOutcome;
use pgcutover::migration::standstill::{Broken, Standstill};
use pgcutover::switch::ServerRole;

use crate::support::stage::Stage;
use crate::support::streamed::Streamed;
use crate::support::{connect, installations};

const TABLES: &str = "
CREATE TABLE kept (id int PRIMARY KEY, body text);
INSERT INTO kept SELECT g, 'b' || g FROM generate_series(1, 100) g;
CREATE MATERIALIZED VIEW seen AS SELECT id FROM kept;
CREATE SEQUENCE numbers; CREATE ROLE clerk; CREATE ROLE boss; CREATE DOMAIN short AS text;
CREATE TABLE parts (id int, size numeric(10, 2)) PARTITION BY RANGE (id);
CREATE TABLE part PARTITION OF parts FOR VALUES FROM (1) TO (10);";

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_written_anew_behind_the_comparison_are_seen_and_what_is_streamed_is_not() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    let bench = Streamed::between((newest, newest), TABLES, &["kept"]).await;
    let session = bench.context.source.control("shop", "test").await.expect("a session");
    let application = connect(&bench.source, "shop").await;
    let after = async |sql: &str| {
        let standstill = Standstill::begin(&session, "p").await.expect("begun");
        application.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        standstill.broken(&session).await.expect("looked at")
    };
    for harmless in [
        "UPDATE kept SET body = 'c'",
        "TRUNCATE kept; INSERT INTO kept VALUES (1, 'b')",
        "REFRESH MATERIALIZED VIEW seen",
        "VACUUM FULL kept",
        "ANALYZE",
        "CLUSTER kept USING kept_pkey",
        "TRUNCATE kept RESTART IDENTITY",
        "SELECT setval('numbers', 500)",
        "ALTER DATABASE shop SET default_transaction_read_only = off",
        "ALTER DATABASE shop CONNECTION LIMIT 90",
        "VACUUM FULL pg_proc",
        "VACUUM FULL pg_authid",
    ] {
        assert_eq!(after(harmless).await, None, "{harmless}");
    }
    for altered in [
        "ALTER TABLE kept ALTER body TYPE text USING upper(body)",
        "ALTER TABLE kept DROP COLUMN body; ALTER TABLE kept ADD COLUMN body text",
        "CREATE TABLE other (id int)",
        "ALTER SEQUENCE numbers INCREMENT BY 50",
        "ALTER TABLE parts ALTER size TYPE numeric(12, 2)",
        "BEGIN; ALTER TABLE parts DETACH PARTITION part;
         ALTER TABLE parts ATTACH PARTITION part FOR VALUES FROM (1) TO (20); COMMIT",
        "ALTER DOMAIN short ADD CHECK (length(VALUE) < 9)",
        "ALTER TABLE kept FORCE ROW LEVEL SECURITY",
        "ALTER TABLE kept ALTER body SET DEFAULT 'x'",
        "GRANT SELECT ON kept TO clerk",
        "GRANT UPDATE (body) ON kept TO clerk",
        "GRANT USAGE ON SCHEMA public TO clerk",
        "ALTER TABLE kept OWNER TO clerk",
    ] {
        assert_eq!(after(altered).await, Some(Broken::Definitions), "{altered}");
    }
    for granted in [
        "ALTER ROLE clerk PASSWORD 'p'",
        "ALTER ROLE clerk IN DATABASE shop SET work_mem = '8MB'",
        "GRANT boss TO clerk",
        "ALTER ROLE boss RENAME TO chief",
        "GRANT CREATE ON DATABASE shop TO clerk",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO clerk",
    ] {
        assert_eq!(after(granted).await, Some(Broken::Rights), "{granted}");
    }
}

/// Definitions were compared before; what is made behind that is in no stream and on no other server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn definitions_that_change_while_a_cutover_is_prepared_stop_it() {
    let stage = Stage::set().await;
    let shop = connect(&stage.source, "shop").await;
    let view = "CREATE MATERIALIZED VIEW seen AS SELECT count(*) FROM item; CREATE UNIQUE INDEX ON seen (count)";
    shop.batch_execute(view).await.expect("made");
    let life = stage.life("prepare.before_fence=hold").resolved().await;
    for made in [
        "BEGIN; CREATE TABLE n (id int); INSERT INTO n VALUES (1); COMMIT",
        "ALTER TABLE item ADD more int",
        "ALTER TABLE item RENAME name TO label",
        "ALTER TABLE item ALTER label TYPE varchar",
        "DROP TABLE n; CREATE TABLE n (id int)",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "ALTER TABLE n ADD CHECK (id > 0)",
        // From here on names, types and kinds are as they were.
        "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 2'",
        "ALTER SEQUENCE item_id_seq INCREMENT BY 50",
        "ALTER TABLE item ALTER label TYPE varchar(50)",
        "ALTER TABLE n ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE n ALTER id SET DEFAULT 3",
        "GRANT SELECT ON n TO PUBLIC",
    ] {
        let running = life.cut_over_up_to("prepare.before_fence", life.options()).await;
        connect(&stage.source, "shop")
            .await
            .batch_execute(made)
            .await
            .unwrap_or_else(|error| panic!("{made}: {error:?}"));
        life.failpoints.release("prepare.before_fence");
        let report = running.await.expect("no panic");
        assert_eq!(report.outcome, CutoverOutcome::Aborted, "{made}: {report:?}");
        assert!(report.reason.contains("definitions of database \"shop\" were changed"), "{made}: {}", report.reason);
        assert!(life.runs_on(ServerRole::Source, 0), "{made}");
        connect(&stage.target, "shop").await.batch_execute(made).await.expect("the same there");
    }
    let shop = connect(&stage.source, "shop").await;
    // These change the catalogue too, and nothing that anybody would miss.
    let running = life.cut_over_up_to("prepare.before_fence", life.options()).await;
    for other in [
        "CREATE TEMP TABLE t (id serial PRIMARY KEY, v text)",
        "CREATE INDEX ON t (v)",
        "TRUNCATE item",
        "VACUUM FULL item",
        "ANALYZE item",
        "REFRESH MATERIALIZED VIEW seen",
        "REFRESH MATERIALIZED VIEW CONCURRENTLY seen",
        "REINDEX TABLE item",
        "REINDEX TABLE CONCURRENTLY item",
    ] {
        shop.batch_execute(other).await.unwrap_or_else(|error| panic!("{other}: {error:?}"));
    }
    life.failpoints.release("prepare.before_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
}

/// They have been brought over by then, and would be as they were before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_that_change_while_a_cutover_is_prepared_stop_it() {
    let stage = Stage::set().await;
    let life = stage.life("prepare.before_fence=hold").resolved().await;
    let source = connect(&stage.source, "postgres").await;
    source.batch_execute("CREATE ROLE clerk; CREATE ROLE boss").await.expect("made");
    for changed in [
        "ALTER ROLE clerk PASSWORD 'new'",
        "ALTER ROLE clerk SET work_mem = '8MB'",
        "GRANT boss TO clerk",
        "REVOKE TEMPORARY ON DATABASE shop FROM PUBLIC",
    ] {
        let running = life.cut_over_up_to("prepare.before_fence", life.options()).await;
        source.batch_execute(changed).await.unwrap_or_else(|error| panic!("{changed}: {error:?}"));
        life.failpoints.release("prepare.before_fence");
        let report = running.await.expect("no panic");
        assert_eq!(report.outcome, CutoverOutcome::Aborted, "{changed}: {report:?}");
        assert!(report.reason.starts_with("roles, their passwords"), "{changed}: {}", report.reason);
        assert!(!report.reason.contains("SCRAM"), "{}", report.reason);
    }
    assert!(life.runs_on(ServerRole::Source, 0));
}

/// There was nothing for which sessions would have been kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_large_object_comes_with_the_pause() {
    let stage = Stage::set().await;
    let life = stage.life("prepare.before_fence=hold").resolved().await;
    let running = life.cut_over_up_to("prepare.before_fence", life.options()).await;
    let made = "SELECT lo_from_bytea(4711, 'first')";
    connect(&stage.source, "shop").await.batch_execute(made).await.expect("made");
    life.failpoints.release("prepare.before_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    let there = connect(&stage.target, "shop").await.query_one("SELECT lo_get(4711)", &[]).await.expect("it came");
    assert_eq!(there.get::<_, &[u8]>(0), b"first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_come_to_a_table_of_no_stream_stop_a_cutover() {
    let stage = Stage::set().await;
    for cluster in [&stage.source, &stage.target] {
        connect(cluster, "shop").await.batch_execute("CREATE TABLE apart (id int)").await.expect("made");
    }
    let life = stage.life("prepare.before_fence=hold").resolved().await;
    let running = life.cut_over_up_to("prepare.before_fence", life.options()).await;
    connect(&stage.source, "shop").await.batch_execute("INSERT INTO apart VALUES (1)").await.expect("written");
    life.failpoints.release("prepare.before_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    assert!(report.reason.starts_with("rows of public.apart in database \"shop\""), "{}", report.reason);
    connect(&stage.source, "shop").await.batch_execute("TRUNCATE apart").await.expect("emptied");
    life.failpoints.release("prepare.before_fence");
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
}
