//! What a cutover watches between its comparison and its pause.

use pgcutover::migration::standstill::{Broken, Standstill};

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
