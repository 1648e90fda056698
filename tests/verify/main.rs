//! Verification on real PostgreSQL: nothing is reported while the application writes, everything that was planted is.
//!
//! `PGCUTOVER_VERIFY_RUNS=100 cargo test --test verify moving` is the long form, and `… random_place` that of what is
//! planted; `PGCUTOVER_VERIFY_SEED` repeats one run.

mod kinds;
mod planted;
mod replaced;
mod resumed;
mod sequences;
mod standstill;
#[path = "../support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use pgcutover::catalog::migrations::CatalogError;
use pgcutover::demo::cluster::Installation;
use pgcutover::ident::QualifiedName;
use pgcutover::migration::stream::StreamStatus;
use pgcutover::migration::verify::align::Sides;
use pgcutover::migration::verify::chunks::{Begun, ChunkResult};
use pgcutover::migration::verify::{self, Damaged, DifferenceKind, Observer, TableResult, VerifyContext};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use support::streamed::Streamed as Bench;
use support::{connect, installations};
use tokio::task::JoinHandle;

const TABLES: &str = r#"
CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL, note text);
CREATE TABLE named ("The Key" text, part int, body text, PRIMARY KEY ("The Key", part));
CREATE TABLE heap (a int, b text);
ALTER TABLE heap REPLICA IDENTITY FULL;
CREATE TABLE emptied (id int PRIMARY KEY);
CREATE DOMAIN short AS varchar(20);
CREATE TYPE pair AS (x int, y text);
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN dmood AS mood;
CREATE DOMAIN moods AS mood[];
CREATE DOMAIN ratio AS float8;
CREATE TYPE measure AS (x ratio, l float4[], at point, t text);
CREATE TYPE span AS RANGE (SUBTYPE = float8);
CREATE DOMAIN spans AS span;
CREATE TABLE wide (id int PRIMARY KEY, n numeric, f8 float8, f4 float4, fa float8[], b bytea, t text, c char(5), v short,
    j jsonb, ts timestamp, tz timestamptz, d date, u uuid, m mood, p pair, pt point, r int4range, i interval, k money,
    bit bit(8), net inet, flag bool, cm measure, am measure[], sp span, pa point[], po polygon, dm dmood, dp spans, ar moods);
CREATE TABLE nothing ();
CREATE TABLE moody (m dmood, n int, x text, PRIMARY KEY (m, n));
CREATE TABLE scaled (f float8 PRIMARY KEY, part ratio, v float8);
CREATE TABLE loose (f float8, p point);
ALTER TABLE loose REPLICA IDENTITY FULL;
"#;

const NAMES: [&str; 9] = ["account", "named", "heap", "emptied", "wide", "nothing", "moody", "scaled", "loose"];

const ROWS: &str = r#"
INSERT INTO account SELECT g, 100, 'note ' || g FROM generate_series(1, 420) g;
INSERT INTO named SELECT chr(64 + g % 26) || g, g, repeat('b', g * 20) FROM generate_series(1, 200) g;
INSERT INTO heap SELECT g % 20, 'same' FROM generate_series(1, 200) g;
INSERT INTO heap SELECT 77, 'same' FROM generate_series(1, 5) g;
INSERT INTO emptied SELECT generate_series(1, 50);
INSERT INTO wide SELECT g, 1.50 * g, g / 3.0, g / 7.0, ARRAY[0.1, g], decode(md5(g::text), 'hex'), '', 'ab', 'cd', '{"a": 1.0}',
    '2020-01-01 01:02:03.000004', '2020-01-01 01:02:03.000004+00', '2020-02-29', md5(g::text)::uuid, 'ok', (g, NULL::text)::pair,
    point(g / 3.0, 0), '[1,5)', '1 day 02:00', 12.5, B'10101010', '10.0.0.1', true
    FROM generate_series(1, 50) g;
INSERT INTO wide (id, f8, f4) VALUES (100, 'NaN', '-Infinity'), (101, '-0', 0), (102, 'Infinity' , '1e-40');
UPDATE wide SET cm = ROW(g.x, ARRAY[g.x, 'NaN'], point(g.x, 1), 't')::measure, am = ARRAY[ROW(g.x, NULL, NULL, 'a')::measure, NULL],
    sp = span(g.x, g.x + 1, '(]'), pa = ARRAY[point(0, g.x)] FROM (SELECT i, i / 3.0::float8 AS x FROM generate_series(1, 30) i) g WHERE id = g.i;
UPDATE wide SET cm = ROW(NULL, NULL, NULL, NULL)::measure, am = '{}', sp = 'empty', pa = '[5:5]={NULL}' WHERE id BETWEEN 40 AND 44;
UPDATE wide SET po = polygon(path '((0,0),(1,1),(2,0))' + point(id / 3.0, 0)), dm = 'ok', dp = span(id, id / 3.0 + 1 + id), ar = '{sad,ok}'
    WHERE id <= 30;
INSERT INTO nothing DEFAULT VALUES;
INSERT INTO moody SELECT 'sad', g, 's' || g FROM generate_series(1, 40) g;
INSERT INTO moody SELECT 'ok', g, 'o' || g FROM generate_series(1, 40) g;
INSERT INTO scaled SELECT g / 3.0, g / 7.0, g / 9.0 FROM generate_series(1, 40) g;
INSERT INTO loose SELECT g / 3.0, point(g / 7.0, 1) FROM generate_series(1, 40) g;
"#;

#[derive(Default)]
struct Told {
    rows: AtomicU64,
    tables: AtomicU64,
    journalled: AtomicU64,
    chunks: AtomicU64,
}

#[async_trait]
impl Observer for Told {
    fn moved(&self, rows: u64, _bytes: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }
    async fn begun(&self, _table: &QualifiedName, _begun: &Begun) -> Result<(), CatalogError> {
        Ok(())
    }
    async fn chunk(&self, _table: &QualifiedName, _number: u32, _result: &ChunkResult) -> Result<(), CatalogError> {
        self.chunks.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    async fn finished(&self, _result: &TableResult) -> Result<(), CatalogError> {
        self.tables.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    async fn repairing(&self, _table: &QualifiedName, _what: &serde_json::Value) -> Result<(), CatalogError> {
        self.journalled.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Bench {
    async fn start(source: &Installation, target: &Installation) -> Self {
        Self::between((source, target), &format!("{TABLES}{ROWS}"), &NAMES).await
    }

    async fn verify(&self, status: &StreamStatus) -> HashMap<String, TableResult> {
        self.compare(status, Damaged::Listed).await
    }

    async fn compare(&self, status: &StreamStatus, damaged: Damaged) -> HashMap<String, TableResult> {
        let sides = Sides {
            source: self.context.source.clone(),
            target: self.context.target.clone(),
            database: "shop".to_owned(),
            gate: Some(status.gate.clone()),
            door: None,
        };
        let told = Arc::new(Told::default());
        let context = VerifyContext {
            sides,
            workers: 2,
            part_bytes: 32 << 20,
            load_percent: 100,
            busy_percent: 100,
            observer: told.clone(),
            damaged,
        };
        let tables = NAMES.iter().map(|name| QualifiedName::new("public", *name)).collect();
        let results =
            tokio::time::timeout(5 * support::PATIENCE, verify::tables(&context, tables, HashMap::new())).await;
        let results = results.expect("in time").expect("verified");
        assert_eq!(told.tables.load(Ordering::Relaxed), results.len() as u64);
        let repaired = results.iter().any(|result| result.repaired > 0);
        assert_eq!(
            told.journalled.load(Ordering::Relaxed) > 0,
            repaired,
            "journalled what is repaired, and nothing else"
        );
        results.into_iter().map(|result| (result.name.clone(), result)).collect()
    }
}

/// One application session: transfers, texts, duplicates, key changes, rollbacks, and TRUNCATE where it is streamed;
/// every other transaction without waiting for the disk, so that transactions become visible out of their order.
async fn write(client: tokio_postgres::Client, mut random: StdRng, truncates: bool, stop: Arc<AtomicBool>) -> u64 {
    let mut committed = 0;
    while !stop.load(Ordering::Relaxed) {
        let (a, b) = (random.random_range(1..=400), random.random_range(1..=400));
        let change = match random.random_range(0..20) {
            0..6 => format!(
                "UPDATE account SET balance = balance - 1 WHERE id = {a}; UPDATE account SET balance = balance + 1 WHERE id = {b}"
            ),
            6..9 => format!("INSERT INTO account VALUES ({}, 0, NULL) ON CONFLICT DO NOTHING", 1000 + a),
            9..11 => format!("DELETE FROM account WHERE id = {}", 1000 + b),
            11 => format!("UPDATE named SET body = body || 'x' WHERE part = {}", a % 200),
            12 => format!("UPDATE named SET \"The Key\" = 'k' || {b} WHERE part = {}", a % 200),
            13..15 => format!("INSERT INTO heap SELECT {} , 'same' FROM generate_series(1, {})", a % 20, 1 + b % 3),
            15 => {
                format!("DELETE FROM heap WHERE ctid = ANY (ARRAY(SELECT ctid FROM heap WHERE a = {} LIMIT 2))", a % 20)
            }
            16 => format!("UPDATE wide SET n = n + 0.10, f8 = random(), tz = clock_timestamp() WHERE id = {}", a % 50),
            17 => format!("INSERT INTO account VALUES ({}, 1, 'never'); ROLLBACK", 5000 + a),
            18 if truncates && a % 10 == 0 => "TRUNCATE emptied".to_owned(),
            18 => format!("INSERT INTO emptied VALUES ({a}) ON CONFLICT DO NOTHING"),
            _ => "SAVEPOINT s; INSERT INTO heap VALUES (99, 'x'); ROLLBACK TO s; INSERT INTO heap VALUES (98, 'y')"
                .to_owned(),
        };
        let sync = if random.random_bool(0.5) { "on" } else { "off" };
        // Deadlocks are part of it.
        match client.batch_execute(&format!("BEGIN; SET LOCAL synchronous_commit = {sync}; {change}; COMMIT")).await {
            Ok(()) => committed += 1,
            Err(_) => client.batch_execute("ROLLBACK").await.expect("rolled back"),
        }
    }
    committed
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// The application: four sessions that write until it is stopped.
struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<u64>>,
}

impl Load {
    async fn start(bench: &Bench, seed: u64) -> Self {
        let (stop, truncates) = (Arc::new(AtomicBool::new(false)), bench.source.major() >= 11);
        let mut writers = Vec::new();
        for number in 0..4 {
            let random = StdRng::seed_from_u64(seed.wrapping_add(number));
            let client = connect(&bench.source, "shop").await;
            writers.push(tokio::spawn(write(client, random, truncates, stop.clone())));
        }
        Self { stop, writers }
    }

    /// Transactions that were committed.
    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut committed = 0;
        for writer in self.writers {
            committed += writer.await.expect("a writer");
        }
        assert!(committed > 0, "nobody wrote");
        committed
    }
}

/// `runs` verifications under load; each sees a seed of its own and must find no difference.
async fn moving(source: &Installation, target: &Installation, runs: u64) {
    let bench = Bench::start(source, target).await;
    let (status, running) = bench.run();
    let first = from_environment("PGCUTOVER_VERIFY_SEED");
    let runs = if first.is_some() { 1 } else { runs };
    for run in 0..runs {
        let seed = first.unwrap_or_else(rand::random);
        let load = Load::start(&bench, seed).await;
        let results = bench.verify(&status).await;
        let committed = load.stop().await;
        assert!(!running.is_finished(), "the stream goes on");
        for result in results.values() {
            assert_eq!((result.differences, &result.problem), (0, &None), "seed {seed}: {result:?}");
        }
        assert!(results["account"].rows >= 400 && results["wide"].rows == 53);
        println!("run {run}: seed {seed}: {committed} transactions meanwhile, no difference");
    }
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_differs_on_a_moving_target() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    moving(newest, newest, from_environment("PGCUTOVER_VERIFY_RUNS").unwrap_or(4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_differs_on_a_moving_target_of_another_major() {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    moving(old, new, from_environment("PGCUTOVER_VERIFY_RUNS").unwrap_or(3)).await;
}

/// What is done to the target, in which table it shows, how, and on which rows. None of these rows is one that the
/// application changes or deletes by itself: a stream that misses such a row ends.
const PLANTED: &[(&str, &str, DifferenceKind, &[&str])] = &[
    ("UPDATE wide SET b = set_bit(b, 3, 1 - get_bit(b, 3)) WHERE id = 7", "wide", DifferenceKind::Differs, &["7"]),
    ("UPDATE wide SET f8 = f8 + 1e-15 WHERE id = 2", "wide", DifferenceKind::Differs, &["2"]),
    ("UPDATE wide SET f8 = 0 WHERE id = 101", "wide", DifferenceKind::Differs, &["101"]),
    ("UPDATE wide SET fa[2] = 3.0000000000000004 WHERE id = 3", "wide", DifferenceKind::Differs, &["3"]),
    ("UPDATE wide SET pt = point(pt[0] + 1e-15, pt[1]) WHERE id = 1", "wide", DifferenceKind::Differs, &["1"]),
    ("UPDATE wide SET cm.x = (cm).x + 1e-15 WHERE id = 2", "wide", DifferenceKind::Differs, &["2"]),
    ("UPDATE wide SET cm.at = point((cm).at[0] + 1e-15, 1) WHERE id = 2", "wide", DifferenceKind::Differs, &["2"]),
    ("UPDATE wide SET cm = NULL WHERE id = 41", "wide", DifferenceKind::Differs, &["41"]),
    ("UPDATE wide SET am[1].x = (am[1]).x + 1e-15 WHERE id = 2", "wide", DifferenceKind::Differs, &["2"]),
    ("UPDATE wide SET am = am || am[2] WHERE id = 2", "wide", DifferenceKind::Differs, &["2"]),
    (
        "UPDATE wide SET sp = span(lower(sp) + 1e-15, upper(sp), '(]') WHERE id = 2",
        "wide",
        DifferenceKind::Differs,
        &["2"],
    ),
    ("UPDATE wide SET sp = span(lower(sp), upper(sp), '[]') WHERE id = 2", "wide", DifferenceKind::Differs, &["2"]),
    ("UPDATE wide SET pa = '[6:6]={NULL}' WHERE id = 42", "wide", DifferenceKind::Differs, &["42"]),
    ("UPDATE wide SET po = polygon(path(po) + point(1e-15, 0)) WHERE id = 1", "wide", DifferenceKind::Differs, &["1"]),
    ("UPDATE wide SET dm = 'sad' WHERE id = 6", "wide", DifferenceKind::Differs, &["6"]),
    ("UPDATE wide SET dp = NULL WHERE id = 6", "wide", DifferenceKind::Differs, &["6"]),
    ("UPDATE wide SET ar = '{ok}' WHERE id = 6", "wide", DifferenceKind::Differs, &["6"]),
    ("UPDATE moody SET x = NULL WHERE n = 7", "moody", DifferenceKind::Differs, &["ok", "sad"]),
    ("UPDATE scaled SET v = v + 1e-15 WHERE part < 1", "scaled", DifferenceKind::Differs, &[]),
    ("DELETE FROM scaled WHERE part > 5", "scaled", DifferenceKind::Missing, &[]),
    ("DELETE FROM loose WHERE f > 10", "loose", DifferenceKind::Missing, &[]),
    ("UPDATE wide SET n = 7.5 WHERE id = 5", "wide", DifferenceKind::Differs, &["5"]),
    ("UPDATE wide SET j = '{\"a\": 1.00}' WHERE id = 5", "wide", DifferenceKind::Differs, &["5"]),
    ("UPDATE wide SET t = NULL WHERE id = 5", "wide", DifferenceKind::Differs, &["5"]),
    ("UPDATE wide SET p = (5, '') WHERE id = 5", "wide", DifferenceKind::Differs, &["5"]),
    ("UPDATE wide SET ts = ts + interval '1 microsecond' WHERE id = 5", "wide", DifferenceKind::Differs, &["5"]),
    ("UPDATE wide SET bit = B'10101011' WHERE id = 9", "wide", DifferenceKind::Differs, &["9"]),
    ("UPDATE wide SET n = NULL, t = 'x' WHERE id IN (8, 9)", "wide", DifferenceKind::Differs, &["8", "9"]),
    ("DELETE FROM account WHERE id = 417", "account", DifferenceKind::Missing, &["417"]),
    ("INSERT INTO account VALUES (0, 0, '')", "account", DifferenceKind::Extra, &["0"]),
    (
        "UPDATE account SET balance = CASE id WHEN 1 THEN 101 ELSE 99 END WHERE id IN (1, 2)",
        "account",
        DifferenceKind::Differs,
        &["1", "2"],
    ),
    ("TRUNCATE emptied", "emptied", DifferenceKind::Missing, &[]),
    ("INSERT INTO nothing DEFAULT VALUES", "nothing", DifferenceKind::Extra, &[]),
    (
        "DELETE FROM heap WHERE ctid = (SELECT ctid FROM heap WHERE a = 77 LIMIT 1)",
        "heap",
        DifferenceKind::Missing,
        &[],
    ),
    ("INSERT INTO heap VALUES (77, 'same')", "heap", DifferenceKind::Extra, &[]),
];

async fn planted(source: &Installation, target: &Installation) {
    let bench = Bench::start(source, target).await;
    let (status, running) = bench.run();
    let client = connect(&bench.target, "shop").await;
    let whole = bench.verify(&status).await;
    assert!(whole.values().all(|result| result.differences == 0 && result.problem.is_none()), "{whole:#?}");
    for (sql, table, kind, keys) in PLANTED {
        client.batch_execute(&format!("CREATE TABLE saved AS TABLE {table}; {sql}")).await.expect(sql);
        let results = bench.verify(&status).await;
        let found = &results[*table];
        assert!(found.differences > 0, "not found: {sql}");
        assert!(found.listed.iter().all(|row| row.kind == *kind), "{sql}: {:?}", found.listed);
        if !keys.is_empty() {
            let mut listed: Vec<String> = found.listed.iter().filter_map(|row| row.key[0].clone()).collect();
            listed.sort();
            assert_eq!(
                (listed.as_slice(), found.differences),
                (keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>().as_slice(), keys.len() as u64),
                "{sql}"
            );
        }
        let others: u64 =
            results.values().filter(|result| result.name != *table).map(|result| result.differences).sum();
        assert_eq!(others, 0, "{sql}: and nothing else");
        let back = format!("TRUNCATE {table}; INSERT INTO {table} SELECT * FROM saved; DROP TABLE saved");
        client.batch_execute(&back).await.expect("put back");
    }
    // Duplicates that changed places: the same rows, in other numbers.
    client.batch_execute("UPDATE heap SET a = CASE a WHEN 4 THEN 5 ELSE a END WHERE ctid = (SELECT ctid FROM heap WHERE a = 4 LIMIT 1)").await.expect("swapped");
    let heap = &bench.verify(&status).await["heap"];
    let kinds: Vec<DifferenceKind> = heap.listed.iter().map(|row| row.kind).collect();
    assert_eq!(heap.differences, 2);
    assert!(kinds.contains(&DifferenceKind::Missing) && kinds.contains(&DifferenceKind::Extra), "{kinds:?}");
    // A column that only the source has is no comparison.
    connect(&bench.source, "shop")
        .await
        .batch_execute("ALTER TABLE emptied ADD COLUMN more int")
        .await
        .expect("altered");
    let problem = bench.verify(&status).await["emptied"].problem.clone().expect("told");
    assert!(problem.contains("more"), "{problem}");
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_planted_is_found() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    planted(newest, newest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_planted_is_found_across_majors() {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    planted(old, new).await;
}

/// Every kind of damage at once, repaired while the application writes; nothing differs afterwards.
async fn repaired(source: &Installation, target: &Installation) {
    let bench = Bench::start(source, target).await;
    let (status, running) = bench.run();
    let seed = from_environment("PGCUTOVER_VERIFY_SEED").unwrap_or_else(rand::random);
    let load = Load::start(&bench, seed).await;
    let client = connect(&bench.target, "shop").await;
    // The stream locks rows in an order of its own.
    for (sql, ..) in PLANTED {
        while let Err(error) = client.batch_execute(sql).await {
            assert_eq!(error.code().map(|code| code.code()), Some("40P01"), "{sql}: {error}");
        }
    }
    let more = "INSERT INTO heap SELECT g, 'never there' FROM generate_series(1, 50) g; UPDATE named SET body = NULL WHERE part < 50";
    client.batch_execute(more).await.expect("more damage");
    // One that came and one that went are the same again.
    let other = "DELETE FROM heap WHERE ctid = (SELECT ctid FROM heap WHERE a = 77 LIMIT 1)";
    client.batch_execute(other).await.expect("more damage");
    let results = bench.compare(&status, Damaged::Repaired).await;
    for result in results.values() {
        assert_eq!((result.differences, &result.problem), (0, &None), "seed {seed}: {result:?}");
    }
    for name in NAMES {
        // What the application truncated or rewrote meanwhile, it has repaired itself.
        assert!(results[name].repaired > 0 || name == "emptied", "seed {seed}: {:?}", results[name]);
    }
    let committed = load.stop().await;
    assert!(!running.is_finished(), "the stream goes on");
    let again = bench.verify(&status).await;
    assert!(again.values().all(|result| result.is_equal()), "seed {seed}: {again:#?}");
    println!("seed {seed}: repaired under {committed} transactions");
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_planted_is_repaired_under_load() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    repaired(newest, newest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_planted_is_repaired_under_load_across_majors() {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    repaired(old, new).await;
}
