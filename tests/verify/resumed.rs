//! A large table is compared range by range, and an interrupted run goes on behind the last one.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use pgcutover::catalog::migrations::CatalogError;
use pgcutover::demo::cluster::Installation;
use pgcutover::ident::QualifiedName;
use pgcutover::migration::gate::Gate;
use pgcutover::migration::verify::align::Sides;
use pgcutover::migration::verify::chunks::{Begun, ChunkResult};
use pgcutover::migration::verify::{self, Damaged, DifferenceKind, Observer, TableResult, VerifyContext};
use tokio::sync::Notify;

use crate::support::streamed::Streamed;
use crate::support::{connect, installations, wait_for};

/// `ordered` lies in the order of its key, which `scattered` does not.
const TABLES: &str = "
CREATE TABLE ordered (tenant int, at timestamptz, n int NOT NULL, body text, PRIMARY KEY (tenant, at));
CREATE TABLE scattered (id uuid PRIMARY KEY, n int NOT NULL, body text);";

const ROWS: i32 = 9000;

fn fill() -> String {
    format!(
        "INSERT INTO ordered SELECT g / 1000, '2020-01-01 00:00+00'::timestamptz + g * interval '1 minute', g, repeat('b', 200)
           FROM generate_series(1, {ROWS}) g;
         INSERT INTO scattered SELECT md5(g::text)::uuid, g, repeat('b', 200) FROM generate_series(1, {ROWS}) g"
    )
}

/// Keeps what it is told, and from some range on lets the run wait for ever.
#[derive(Default)]
struct Record {
    begun: Mutex<HashMap<QualifiedName, Begun>>,
    chunks: Mutex<BTreeMap<u32, ChunkResult>>,
    rows: AtomicU64,
    /// So many ranges are let through; none: all.
    until: Option<usize>,
    reached: Notify,
}

impl Record {
    fn until(chunks: Option<usize>) -> Arc<Self> {
        Arc::new(Self { until: chunks, ..Self::default() })
    }

    fn numbers(&self) -> Vec<u32> {
        self.chunks.lock().expect("numbers").keys().copied().collect()
    }

    /// What a catalogue would give back.
    fn left(&self) -> HashMap<QualifiedName, Begun> {
        let mut begun = self.begun.lock().expect("begun").clone();
        for begun in begun.values_mut() {
            begun.done = self.chunks.lock().expect("chunks").clone();
        }
        begun
    }
}

#[async_trait]
impl Observer for Record {
    fn moved(&self, rows: u64, _bytes: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }
    async fn begun(&self, table: &QualifiedName, begun: &Begun) -> Result<(), CatalogError> {
        self.begun.lock().expect("begun").insert(table.clone(), begun.clone());
        Ok(())
    }
    async fn chunk(&self, _table: &QualifiedName, number: u32, result: &ChunkResult) -> Result<(), CatalogError> {
        let full = {
            let mut chunks = self.chunks.lock().expect("chunks");
            let full = self.until.is_some_and(|until| chunks.len() >= until);
            if !full {
                chunks.insert(number, result.clone());
            }
            full
        };
        if full {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(())
    }
    async fn finished(&self, _result: &TableResult) -> Result<(), CatalogError> {
        Ok(())
    }
    async fn repairing(&self, _table: &QualifiedName, _what: &serde_json::Value) -> Result<(), CatalogError> {
        Ok(())
    }
}

fn context(bench: &Streamed, gate: &Gate, observer: Arc<Record>, damaged: Damaged) -> VerifyContext {
    let sides = Sides {
        source: bench.context.source.clone(),
        target: bench.context.target.clone(),
        database: "shop".to_owned(),
        gate: Some(gate.clone()),
        door: None,
    };
    VerifyContext { sides, workers: 2, part_bytes: 64 << 10, load_percent: 100, busy_percent: 100, observer, damaged }
}

/// The application: moves rows of odd number, to other keys too.
async fn write(client: tokio_postgres::Client, stop: Arc<AtomicBool>) {
    let mut n = 1;
    while !stop.load(Ordering::Relaxed) {
        n = 1 + (n + 774) % ROWS / 2 * 2;
        let sql = format!(
            "UPDATE ordered SET body = body || 'x', at = at + interval '1 second' * ({n} % 30) WHERE n = {n};
             UPDATE scattered SET body = body || 'x' WHERE n = {n}; DELETE FROM ordered WHERE n = {n} - 8 AND n % 5 = 1"
        );
        client.batch_execute(&sql).await.expect("written");
    }
}

async fn goes_on(source: &Installation, target: &Installation) {
    let bench = Streamed::between((source, target), TABLES, &["ordered", "scattered"]).await;
    let (status, running) = bench.run();
    let here = connect(&bench.source, "shop").await;
    let there = connect(&bench.target, "shop").await;
    here.batch_execute(&fill()).await.expect("rows");
    let arrived = || async {
        let counted = there.query_one("SELECT (SELECT count(*) FROM ordered) + (SELECT count(*) FROM scattered)", &[]);
        counted.await.expect("counted").get::<_, i64>(0) == 2 * i64::from(ROWS)
    };
    wait_for("the rows to arrive", arrived).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write(connect(&bench.source, "shop").await, stop.clone()));

    // One at either end of the table.
    let damage = format!("UPDATE ordered SET body = NULL WHERE n = 2; DELETE FROM ordered WHERE n = {}", ROWS - 2);
    there.batch_execute(&damage).await.expect("damaged");
    let ordered = QualifiedName::new("public", "ordered");
    let tables = || vec![ordered.clone(), QualifiedName::new("public", "scattered")];
    let first = Record::until(Some(10));
    // One worker, so that the first range is done before the end comes.
    let verifying = VerifyContext { workers: 1, ..context(&bench, &status.gate, first.clone(), Damaged::Listed) };
    tokio::select! {
        ended = verify::tables(&verifying, tables(), HashMap::new()) => panic!("it ended: {ended:?}"),
        () = first.reached.notified() => {}
    }
    let left = first.left();
    assert_eq!(left.keys().collect::<Vec<_>>(), [&ordered], "the other lies in no order and is compared as a whole");
    let chunks = u32::try_from(left[&ordered].bounds.len() + 1).expect("few");
    assert!(chunks > 20, "{chunks}");
    assert!(left[&ordered].done[&0].differences == 1, "one was found before the end came: {left:?}");

    // Another run, under other snapshots.
    let second = Record::until(None);
    let verifying = context(&bench, &status.gate, second.clone(), Damaged::Listed);
    let results = verify::tables(&verifying, tables(), left.clone()).await.expect("verified");
    assert!(second.begun.lock().expect("begun").is_empty(), "nothing begins anew");
    let mut numbers = [first.numbers(), second.numbers()].concat();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..chunks).collect::<Vec<_>>(), "each range once");
    let result = results.iter().find(|result| result.name == "ordered").expect("compared");
    let kinds: Vec<DifferenceKind> = result.listed.iter().map(|row| row.kind).collect();
    assert_eq!(
        (result.differences, kinds.as_slice()),
        (2, [DifferenceKind::Differs, DifferenceKind::Missing].as_slice()),
        "{result:?}"
    );
    let other = results.iter().find(|result| result.name == "scattered").expect("compared");
    assert!(other.is_equal() && other.rows == 9000, "{other:?}");
    let read = second.rows.load(Ordering::Relaxed) - other.rows;
    assert!(read < result.rows, "{read} of {} rows were read again", result.rows);

    // What was compared of other columns is void.
    let alter = "ALTER TABLE ordered ADD COLUMN more int";
    there.batch_execute(alter).await.expect("altered");
    here.batch_execute(alter).await.expect("altered");
    let third = Record::until(None);
    let verifying = context(&bench, &status.gate, third.clone(), Damaged::Repaired);
    let results = verify::tables(&verifying, vec![ordered.clone()], left).await.expect("verified");
    let begun = third.begun.lock().expect("begun")[&ordered].clone();
    assert_eq!(third.numbers().len(), begun.bounds.len() + 1, "all of it again");
    assert_eq!((results[0].differences, results[0].repaired), (0, 2), "and repaired: {:?}", results[0]);
    stop.store(true, Ordering::Relaxed);
    writer.await.expect("a writer");

    // And so is what was compared of other rows: no stream carries these.
    let fourth = Record::until(Some(5));
    let verifying = VerifyContext { workers: 1, ..context(&bench, &status.gate, fourth.clone(), Damaged::Listed) };
    tokio::select! {
        ended = verify::tables(&verifying, vec![ordered.clone()], HashMap::new()) => panic!("it ended: {ended:?}"),
        () = fourth.reached.notified() => {}
    }
    here.batch_execute("ALTER TABLE ordered ALTER body TYPE text USING body || 'z'").await.expect("rewritten");
    let verifying = context(&bench, &status.gate, Record::until(None), Damaged::Listed);
    let results = verify::tables(&verifying, vec![ordered.clone()], fourth.left()).await.expect("verified");
    assert_eq!(results[0].differences, results[0].rows, "{:?}", results[0].problem);
    assert!(!running.is_finished(), "the stream goes on");
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_goes_on_within_a_table() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    goes_on(newest, newest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_goes_on_within_a_table_across_majors() {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    goes_on(old, new).await;
}

/// A snapshot that is held keeps every version of a row that is updated meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn no_snapshot_is_held_while_it_rests() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    let bench = Streamed::between((newest, newest), TABLES, &["ordered", "scattered"]).await;
    let here = connect(&bench.source, "shop").await;
    // The rows are on both servers before the stream begins.
    connect(&bench.target, "shop").await.batch_execute(&fill()).await.expect("rows");
    here.batch_execute(&format!("ALTER PUBLICATION p DROP TABLE ordered, scattered; {}", fill())).await.expect("rows");
    here.batch_execute("ALTER PUBLICATION p ADD TABLE ordered, scattered").await.expect("published");
    let (status, running) = bench.run();
    // Somebody is at work there all the time, without a snapshot.
    let other = connect(&bench.source, "shop").await;
    other.batch_execute("BEGIN").await.expect("begun");
    let record = Record::until(None);
    let slow =
        VerifyContext { workers: 1, busy_percent: 1, ..context(&bench, &status.gate, record.clone(), Damaged::Listed) };
    let tables = vec![QualifiedName::new("public", "ordered")];
    let verifying = tokio::spawn(async move { verify::tables(&slow, tables, HashMap::new()).await });
    let compared = || record.numbers().len();
    wait_for("a range to be compared", || async { compared() > 0 }).await;
    let held = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgcutover/%/verify-snapshot'";
    wait_for("its snapshot to be gone", || async {
        here.query_one(held, &[]).await.expect("sessions").get::<_, i64>(0) == 0
    })
    .await;
    assert!(!verifying.is_finished(), "before the end");
    let before = compared();
    wait_for("another range to be compared", || async { compared() > before }).await;
    verifying.abort();
    running.abort();
}
