//! A table that is replaced, dropped or altered between the moment in which it is looked at and that in which it is read, and
//! one that a server will not have read at all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use pgcutover::catalog::migrations::CatalogError;
use pgcutover::ident::QualifiedName;
use pgcutover::migration::verify::align::Sides;
use pgcutover::migration::verify::chunks::{Begun, ChunkResult};
use pgcutover::migration::verify::{self, Damaged, DifferenceKind, Observer, TableResult, VerifyContext};

use crate::support::streamed::Streamed;
use crate::support::{connect, installations};

const ROWS: u64 = 9000;

const NAMES: [&str; 6] = ["renamed", "dropped", "altered", "viewed", "restless", "refused"];

/// Has the rows of `refused` chosen as an extension chooses those of its own tables, by a function that is gone.
const REFUSE: &str =
    "UPDATE pg_extension SET extconfig = ARRAY['refused'::regclass::oid], extcondition = ARRAY['WHERE gone(id)']
     WHERE extname = 'plpgsql'";

/// What is done on both servers to a table as soon as it was looked at, for the first time or once more; `{other}` is 0 on the
/// source, 1 on the target.
fn done_to(table: &str, times: usize) -> &'static str {
    match (table, times) {
        // The next time it is to be locked.
        ("restless", 0) => "ALTER TABLE restless ADD COLUMN more int",
        ("restless", 1) => "DROP TABLE restless",
        (table, 0) => done_once_to(table),
        _ => "",
    }
}

fn done_once_to(table: &str) -> &'static str {
    match table {
        "renamed" => {
            "BEGIN; ALTER TABLE renamed RENAME TO renamed_old; CREATE TABLE renamed (id int PRIMARY KEY, body text);
             INSERT INTO renamed VALUES (1, 'same'), (2, 'other {other}'), (3, 'same'); COMMIT"
        }
        "dropped" => "DROP TABLE dropped",
        "altered" => "ALTER TABLE altered DROP COLUMN body",
        _ => "BEGIN; ALTER TABLE viewed RENAME TO viewed_old; CREATE VIEW viewed AS SELECT * FROM viewed_old; COMMIT",
    }
}

struct Meddler {
    source: tokio_postgres::Client,
    target: tokio_postgres::Client,
    done: Mutex<HashMap<String, usize>>,
}

#[async_trait]
impl Observer for Meddler {
    fn moved(&self, _rows: u64, _bytes: u64) {}
    async fn begun(&self, table: &QualifiedName, _begun: &Begun) -> Result<(), CatalogError> {
        let times = {
            let mut done = self.done.lock().expect("names");
            let times = done.entry(table.name.clone()).or_default();
            *times += 1;
            *times - 1
        };
        for (client, other) in [(&self.source, "0"), (&self.target, "1")] {
            let sql = done_to(&table.name, times).replace("{other}", other);
            client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
        Ok(())
    }
    async fn chunk(&self, _table: &QualifiedName, _number: u32, _result: &ChunkResult) -> Result<(), CatalogError> {
        Ok(())
    }
    async fn finished(&self, _result: &TableResult) -> Result<(), CatalogError> {
        Ok(())
    }
    async fn repairing(&self, _table: &QualifiedName, _what: &serde_json::Value) -> Result<(), CatalogError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_table_any_more_is_not_taken_for_it() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    let tables: Vec<String> = NAMES
        .iter()
        .map(|name| {
            format!(
                "CREATE TABLE {name} (id int PRIMARY KEY, kept text, body text);
                 INSERT INTO {name} SELECT g, 'k', repeat('b', 200) FROM generate_series(1, {ROWS}) g;"
            )
        })
        .collect();
    let bench = Streamed::between((newest, newest), &tables.concat(), &NAMES).await;
    let (status, running) = bench.run();
    connect(&bench.source, "shop").await.batch_execute(REFUSE).await.expect("refused");
    let meddler = Arc::new(Meddler {
        source: connect(&bench.source, "shop").await,
        target: connect(&bench.target, "shop").await,
        done: Mutex::default(),
    });
    let context = VerifyContext {
        sides: Sides {
            source: bench.context.source.clone(),
            target: bench.context.target.clone(),
            database: "shop".to_owned(),
            gate: Some(status.gate.clone()),
            door: None,
        },
        workers: 2,
        part_bytes: 64 << 10,
        load_percent: 100,
        busy_percent: 100,
        observer: meddler.clone(),
        damaged: Damaged::Listed,
    };
    let wanted = NAMES.iter().map(|name| QualifiedName::new("public", *name)).collect();
    let results = verify::tables(&context, wanted, HashMap::new()).await.expect("verified");
    // What is filtered is read by blocks.
    assert_eq!(meddler.done.lock().expect("names").len(), NAMES.len() - 1, "each was read in ranges");
    let results: HashMap<&str, &TableResult> = results.iter().map(|result| (result.name.as_str(), result)).collect();

    let renamed = results["renamed"];
    assert_eq!((renamed.rows, renamed.differences), (3, 1), "the table that has the name now: {renamed:?}");
    assert_eq!((renamed.listed[0].kind, renamed.listed[0].shown_key()), (DifferenceKind::Differs, "(2)".to_owned()));
    for gone in ["dropped", "viewed", "restless"] {
        let problem = results[gone].problem.as_deref();
        assert_eq!(problem, Some("the table is not on both servers"), "{:?}", results[gone]);
    }
    let refused = results["refused"];
    let said = "it cannot be read: function gone(integer) does not exist";
    assert_eq!(
        refused.problem.as_deref(),
        Some(said),
        "and nothing of it keeps the others from being read: {refused:?}"
    );
    let altered = results["altered"];
    assert_eq!((altered.rows, altered.differences, &altered.problem), (ROWS, 0, &None), "{altered:?}");
    running.abort();
}
