//! What a cutover watches between its comparison and its pause.

use pgcutover::migration::standstill::{Broken, Standstill};

use crate::support::streamed::Streamed;
use crate::support::{connect, installations};

const TABLES: &str = "
CREATE TABLE kept (id int PRIMARY KEY, body text);
INSERT INTO kept SELECT g, 'b' || g FROM generate_series(1, 100) g;
CREATE MATERIALIZED VIEW seen AS SELECT id FROM kept;";

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
    ] {
        assert_eq!(after(harmless).await, None, "{harmless}");
    }
    for altered in [
        "ALTER TABLE kept ALTER body TYPE text USING upper(body)",
        "ALTER TABLE kept DROP COLUMN body; ALTER TABLE kept ADD COLUMN body text",
        "CREATE TABLE other (id int)",
    ] {
        assert_eq!(after(altered).await, Some(Broken::Definitions), "{altered}");
    }
}
