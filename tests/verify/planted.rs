//! One difference of every kind, planted in a random place of a random table while the application writes: all of them are
//! found, at their keys, and nothing else is.
//!
//! Every run makes tables of its own on the same two servers, with random keys, an order of columns and a size of their own.
//! Rows of even number are left alone by the application, so that what is planted there stays until it is looked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgcutover::demo::cluster::Installation;
use pgcutover::ident::QualifiedName;
use pgcutover::migration::stream::StreamError;
use pgcutover::migration::verify::align::Sides;
use pgcutover::migration::verify::{self, Damaged, DifferenceKind, RowDifference, VerifyContext, definitions};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::streamed::Streamed;
use crate::support::{PATIENCE, connect, installations, wait_for_within};
use crate::{Told, from_environment};

const TYPES: &str = "
CREATE DOMAIN short AS varchar(40);
CREATE TYPE pair AS (x numeric, y text);
CREATE TABLE anchor (id int PRIMARY KEY);";

/// Name, type, and value in the row of number `g`.
const COLUMNS: &[(&str, &str, &str)] = &[
    ("i2", "smallint", "g % 30000"),
    ("i4", "int", "g * 7919"),
    ("i8", "bigint", "g * 1000003::int8 * 1000003"),
    ("f4", "real", "g / 7.0"),
    ("f8", "float8", "g / 3.0"),
    ("n", "numeric", "g * 1.50"),
    ("t", "text", "repeat(md5(g::text), 1 + g % 5 + CASE WHEN g % 50 = 0 THEN 200 ELSE 0 END)"),
    ("v", "short", "md5((g + 1)::text)"),
    ("b", "bytea", "decode(repeat(md5(g::text), 1 + g % 3), 'hex')"),
    ("u", "uuid", "md5((g + 2)::text)::uuid"),
    ("bits", "bit(16)", "(g % 65536)::bit(16)"),
    ("ts", "timestamp", "timestamp '2020-01-01 01:02:03.000004' + g * interval '1 second'"),
    ("tz", "timestamptz", "timestamptz '2020-01-01 01:02:03.000004+00' + g * interval '1 second'"),
    ("d", "date", "date '2020-02-29' + g % 1000"),
    ("flag", "bool", "g % 3 = 0"),
    ("ia", "int[]", "ARRAY[g, NULL, g * 2]"),
    ("na", "numeric[]", "ARRAY[g * 1.50, NULL]"),
    ("j", "json", "'{\"a\": 1.50}'"),
    ("jb", "jsonb", "jsonb_build_object('a', g * 1.50)"),
    ("zt", "text", "(g * 1.50)::text"),
    ("zp", "pair", "(g * 1.50, NULL)::pair"),
    ("e1", "text", "CASE WHEN g % 4 = 0 THEN '' END"),
    ("e2", "bytea", "CASE WHEN g % 4 = 0 THEN ''::bytea END"),
    ("e3", "int[]", "CASE WHEN g % 4 = 0 THEN '{}'::int[] END"),
    ("e4", "text[]", "CASE WHEN g % 4 = 0 THEN ARRAY[''] ELSE ARRAY[NULL]::text[] END"),
    ("e5", "pair", "CASE WHEN g % 4 = 0 THEN (g, '')::pair ELSE (g, NULL)::pair END"),
    ("e6", "short", "CASE WHEN g % 4 = 0 THEN '' END"),
];

/// Columns of keys, and their values in the row of number `g`.
const KEYS: &[&[(&str, &str, &str)]] = &[
    &[("id", "int", "g")],
    &[("id", "bigint", "g * -1000003::int8")],
    &[("id", "text", "'k' || g")],
    &[("\"The Key\"", "uuid", "md5(g::text)::uuid")],
    &[("part", "int", "g % 5"), ("id", "text", "'k' || g")],
    &[("id", "numeric", "g * 1.5")],
    &[("id", "timestamptz", "timestamptz '2000-01-01 00:00+00' + g * interval '1 minute'"), ("n8", "int8", "g")],
];

/// Tables of one run that have a key; each gets one difference.
const KINDS: [&str; 5] = ["bit", "missing", "extra", "empty", "zeros"];

/// A table of one run.
struct Table {
    name: String,
    rows: i32,
    key: &'static [(&'static str, &'static str, &'static str)],
    columns: Vec<&'static (&'static str, &'static str, &'static str)>,
}

impl Table {
    fn random(name: String, random: &mut StdRng) -> Self {
        let rows = match random.random_range(0..20) {
            0..5 => random.random_range(2..=6),
            5..14 => random.random_range(10..=900),
            14..19 => random.random_range(1000..=5000),
            _ => random.random_range(12_000..=25_000),
        };
        let mut columns: Vec<_> = COLUMNS.iter().collect();
        columns.shuffle(random);
        Self { name, rows, key: KEYS[random.random_range(0..KEYS.len())], columns }
    }

    fn all(&self) -> impl Iterator<Item = &(&'static str, &'static str, &'static str)> {
        self.key.iter().chain(self.columns.iter().copied())
    }

    fn create(&self, external: bool) -> String {
        let columns: Vec<String> = self.all().map(|(name, of, _)| format!("{name} {of}")).collect();
        let key: Vec<&str> = self.key.iter().map(|(name, ..)| *name).collect();
        let mut sql = format!(
            "CREATE TABLE {} (g int NOT NULL, {}, PRIMARY KEY ({}))",
            self.name,
            columns.join(", "),
            key.join(", ")
        );
        if external {
            sql.push_str(&format!("; ALTER TABLE {} ALTER t SET STORAGE EXTERNAL", self.name));
        }
        sql
    }

    /// Rows of these numbers.
    fn insert(&self, numbers: &str) -> String {
        let values: Vec<&str> = self.all().map(|(.., value)| *value).collect();
        format!("INSERT INTO {} SELECT g, {} FROM {numbers} AS g", self.name, values.join(", "))
    }

    /// The number of a row that is left alone.
    fn quiet(&self, random: &mut StdRng) -> i32 {
        2 * random.random_range(1..=self.rows / 2)
    }

    async fn key_of(&self, client: &Client, g: i32) -> Vec<Option<String>> {
        let key: Vec<String> = self.key.iter().map(|(name, ..)| format!("{name}::text")).collect();
        let sql = format!("SELECT ARRAY[{}] FROM {} WHERE g = {g}", key.join(", "), self.name);
        client.query_one(&sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }
}

/// Sets one column of a row, and says how.
async fn set(client: &Client, table: &Table, g: i32, column: &str, value: &str) -> String {
    change(client, format!("UPDATE {} SET {column} = {value} WHERE g = {g}", table.name)).await
}

/// Runs a statement that must change one row; again where the stream was in its way.
async fn change(client: &Client, sql: String) -> String {
    loop {
        match client.execute(&sql, &[]).await {
            Ok(changed) => assert_eq!(changed, 1, "{sql}"),
            Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => continue,
            Err(error) => panic!("{sql}: {error:?}"),
        }
        return sql;
    }
}

/// Columns of which one bit can be turned.
const BITS: [&str; 16] =
    ["i2", "i4", "i8", "f4", "f8", "t", "v", "b", "u", "bits", "ts", "tz", "d", "flag", "ia", "e5"];

/// Turns one bit of one value.
async fn turn_a_bit(client: &Client, table: &Table, g: i32, random: &mut StdRng) -> String {
    let c = BITS[random.random_range(0..BITS.len())];
    let turned = |of: &str, bit: u32| format!("set_bit({of}, {bit}, 1 - get_bit({of}, {bit}))");
    let since = |of: &str, bit: u32| {
        let microseconds = format!("(extract(epoch from {c} - {of} '2000-01-01') * 1000000)::int8");
        format!("{of} '2000-01-01' + ({microseconds} # (1::int8 << {bit})) * interval '1 microsecond'")
    };
    let sql = format!("SELECT f4, f8 FROM {} WHERE g = {g}", table.name);
    let floats = client.query_one(&sql, &[]).await.expect("two numbers");
    let value = match c {
        "i2" => format!("{c} # (1 << {})::int2", random.random_range(0..15)),
        "i4" => format!("{c} # (1 << {})", random.random_range(0..32)),
        "i8" => format!("{c} # (1::int8 << {})", random.random_range(0..64)),
        "f4" => {
            let old = floats.get::<_, f32>(0).to_bits();
            format!("'{:e}'::real", f32::from_bits(old ^ (1 << random.random_range(0..23))))
        }
        "f8" => {
            let old = floats.get::<_, f64>(1).to_bits();
            format!("'{:e}'::float8", f64::from_bits(old ^ (1 << random.random_range(0..52))))
        }
        // Only bits that leave a letter a letter of some kind.
        "t" | "v" => {
            let bit = 8 * random.random_range(0..32_u32) + random.random_range(0..7);
            format!("convert_from({}, 'UTF8')", turned(&format!("convert_to({c}, 'UTF8')"), bit))
        }
        "b" => turned(c, random.random_range(0..128)),
        "u" => {
            let bytes = format!("decode(replace({c}::text, '-', ''), 'hex')");
            format!("encode({}, 'hex')::uuid", turned(&bytes, random.random_range(0..128)))
        }
        "bits" => turned(c, random.random_range(0..16)),
        "ts" => since("timestamp", random.random_range(0..45)),
        "tz" => since("timestamptz", random.random_range(0..45)),
        "d" => format!("date '2000-01-01' + (({c} - date '2000-01-01') # (1 << {}))", random.random_range(0..14)),
        "flag" => format!("NOT {c}"),
        "ia" => format!("ARRAY[{c}[1], {c}[2], {c}[3] # (1 << {})]", random.random_range(0..32)),
        _ => format!("((({c}).x::int8 # (1::int8 << {}))::numeric, ({c}).y)::pair", random.random_range(0..40)),
    };
    set(client, table, g, c, &value).await
}

/// Puts NULL where something empty is, or the other way round.
async fn empty_for_null(client: &Client, table: &Table, g: i32, random: &mut StdRng) -> String {
    let (column, empty, null) = [
        ("e1", "''", "NULL"),
        ("e2", "''::bytea", "NULL"),
        ("e3", "'{}'::int[]", "NULL"),
        ("e4", "ARRAY['']", "ARRAY[NULL]::text[]"),
        ("e5", "((e5).x, '')::pair", "((e5).x, NULL)::pair"),
        ("e6", "''", "NULL"),
    ][random.random_range(0..6)];
    let there = if g % 4 == 0 { null } else { empty };
    set(client, table, g, column, there).await
}

/// Adds zeros behind the point, which change no number.
async fn add_zeros(client: &Client, table: &Table, g: i32, random: &mut StdRng) -> String {
    let zeros = random.random_range(1..=3);
    let longer = |of: &str| format!("round({of}, scale({of}) + {zeros})");
    let (column, value) = match random.random_range(0..6) {
        0 => ("n", longer("n")),
        1 => ("na", format!("ARRAY[{}, na[2]]", longer("na[1]"))),
        2 => ("j", "replace(j::text, '}', '0}')::json".to_owned()),
        3 => ("jb", format!("jsonb_build_object('a', {})", longer("(jb ->> 'a')::numeric"))),
        4 => ("zt", "zt || '0'".to_owned()),
        _ => ("zp", format!("({}, (zp).y)::pair", longer("(zp).x"))),
    };
    set(client, table, g, column, &value).await
}

/// A row that must be listed: how, and with which key, where it has one.
type Wanted = (DifferenceKind, Option<Vec<Option<String>>>);

/// What was planted, where it must be found, and as what.
struct Planted {
    sql: String,
    table: String,
    rows: Vec<Wanted>,
}

async fn plant(client: &Client, kind: &str, table: &Table, random: &mut StdRng) -> Planted {
    let g = table.quiet(random);
    let mut key = table.key_of(client, g).await;
    let (sql, difference) = match kind {
        "bit" => (turn_a_bit(client, table, g, random).await, DifferenceKind::Differs),
        "empty" => (empty_for_null(client, table, g, random).await, DifferenceKind::Differs),
        "zeros" => (add_zeros(client, table, g, random).await, DifferenceKind::Differs),
        "missing" => {
            let sql = format!("DELETE FROM {} WHERE g = {g}", table.name);
            (change(client, sql).await, DifferenceKind::Missing)
        }
        _ => {
            // Beyond all numbers that the application uses.
            let new = random.random_range(50_000..130_000) * 2;
            let sql = change(client, table.insert(&format!("generate_series({new}, {new})"))).await;
            key = table.key_of(client, new).await;
            (sql, DifferenceKind::Extra)
        }
    };
    Planted { sql, table: table.name.clone(), rows: vec![(difference, Some(key))] }
}

/// Rows of a table without a key, equal ones among them: of the even numbers `a` there are two, three or four.
fn twice(name: &str, values: i32) -> String {
    format!(
        "INSERT INTO {name} SELECT a, md5(a::text) FROM generate_series(0, {values}) a,
         LATERAL generate_series(1, 2 + (a / 2) % 3) n"
    )
}

/// Has two values change places of which one is there once more than the other: as many rows, and the same values.
async fn swap_duplicates(client: &Client, name: &str, values: i32, random: &mut StdRng) -> Planted {
    let of = |count: i32, random: &mut StdRng| 2 * (3 * random.random_range(0..=(values / 2 - 2) / 3) + count - 2);
    let fewer = random.random_range(2..=3);
    let (few, many) = (of(fewer, random), of(fewer + 1, random));
    let sql = format!(
        "UPDATE {name} SET a = {few}, b = md5('{few}') WHERE ctid = (SELECT ctid FROM {name} WHERE a = {many} LIMIT 1)"
    );
    let sql = change(client, sql).await;
    let rows = vec![(DifferenceKind::Missing, None), (DifferenceKind::Extra, None)];
    Planted { sql, table: name.to_owned(), rows }
}

/// A change of a sequence, and how it is told.
fn of_a_sequence(name: &str, random: &mut StdRng) -> (String, &'static str) {
    match random.random_range(0..7) {
        0 => (format!("SELECT setval('{name}', {})", random.random_range(500_000..900_000)), "ahead"),
        1 => (format!("ALTER SEQUENCE {name} INCREMENT {}", random.random_range(3..9)), "differs"),
        2 => (format!("ALTER SEQUENCE {name} MAXVALUE {}", random.random_range(1_000_000..2_000_000)), "differs"),
        3 => (format!("ALTER SEQUENCE {name} MINVALUE {}", random.random_range(-9..0)), "differs"),
        4 => (format!("ALTER SEQUENCE {name} START {}", random.random_range(8..99)), "differs"),
        5 => (format!("ALTER SEQUENCE {name} CACHE {}", random.random_range(2..99)), "differs"),
        _ => (format!("ALTER SEQUENCE {name} CYCLE"), "differs"),
    }
}

/// Columns with defaults, and what they become.
const DEFAULTS: &[(&str, &str, &str)] = &[
    ("whole", "int DEFAULT 7", "8"),
    ("amount", "numeric DEFAULT 1.50", "1.5"),
    ("word", "text DEFAULT 'x'", "'x '"),
    ("instant", "timestamptz DEFAULT now()", "clock_timestamp()"),
    ("yes", "bool DEFAULT true", "false"),
    ("bare", "text", "''"),
    ("empty", "text DEFAULT ''", "NULL"),
    ("list", "int[] DEFAULT '{1,2}'", "'{1,3}'"),
];

/// A change of a default, and the column.
fn of_a_default(name: &str, random: &mut StdRng) -> (String, String) {
    let (column, _, other) = DEFAULTS[random.random_range(0..DEFAULTS.len())];
    let what = if column != "bare" && random.random_bool(0.3) {
        "DROP DEFAULT".to_owned()
    } else {
        format!("SET DEFAULT {other}")
    };
    (format!("ALTER TABLE {name} ALTER {column} {what}"), format!("public.{name}.{column}"))
}

/// Between two transactions of a session of the application: a hundred runs are to be had beside other work.
const PACE: Duration = Duration::from_millis(10);

/// The application: changes rows of odd numbers, and nothing else.
async fn write(client: Client, tables: Arc<Vec<Table>>, run: u64, mut random: StdRng, stop: Arc<AtomicBool>) -> u64 {
    let mut committed = 0;
    while !stop.load(Ordering::Relaxed) {
        let table = &tables[random.random_range(0..tables.len())];
        let (name, g) = (&table.name, 1 + 2 * random.random_range(0..=table.rows / 2));
        let sql = match random.random_range(0..8) {
            0..3 => format!("UPDATE {name} SET n = n + 0.10, f8 = random(), t = t || 'x' WHERE g = {g}"),
            3 => format!("DELETE FROM {name} WHERE g = {g}"),
            4..6 => format!("{} ON CONFLICT DO NOTHING", table.insert(&format!("generate_series({g}, {g})"))),
            6 => format!("INSERT INTO twice_{run} VALUES ({g}, 'x'), ({g}, 'x'); SELECT nextval('counter_{run}')"),
            _ => format!(
                "DELETE FROM twice_{run} WHERE ctid = ANY (ARRAY(SELECT ctid FROM twice_{run} WHERE a = {g} LIMIT 1))"
            ),
        };
        let end = if random.random_bool(0.1) { "ROLLBACK" } else { "COMMIT" };
        match client.batch_execute(&format!("BEGIN; {sql}; {end}")).await {
            Ok(()) => committed += 1,
            // Deadlocks are part of it.
            Err(error) => {
                assert_eq!(error.code().map(|code| code.code()), Some("40P01"), "{sql}: {error:?}");
                client.batch_execute("ROLLBACK").await.expect("rolled back");
            }
        }
        tokio::time::sleep(PACE).await;
    }
    committed
}

/// Two servers, the stream between them, and what is planted.
struct Field {
    bench: Streamed,
    running: JoinHandle<StreamError>,
    here: Client,
    there: Client,
}

impl Field {
    async fn both(&self, sql: &str) {
        for client in [&self.here, &self.there] {
            client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
    }

    /// Waits until the target has what the source was told so far.
    async fn caught_up(&mut self, number: i32, seed: u64) {
        self.here.execute("INSERT INTO anchor VALUES ($1)", &[&number]).await.expect("anchored");
        let arrived = async || {
            let found = self.there.query_opt("SELECT FROM anchor WHERE id = $1", &[&number]).await;
            found.expect("asked").is_some() || self.running.is_finished()
        };
        wait_for_within(10 * PATIENCE, &format!("the stream to catch up, seed {seed}"), arrived).await;
        if self.running.is_finished() {
            panic!("seed {seed}: the stream ended: {:?}", (&mut self.running).await);
        }
    }

    /// One run: tables, rows, the application, the differences, and what a verification says to them.
    async fn run(&mut self, gate: &pgcutover::migration::gate::Gate, run: u64, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let tables: Vec<Table> = KINDS.iter().map(|kind| Table::random(format!("{kind}_{run}"), &mut random)).collect();
        let (twice_name, sequence, plain) = (format!("twice_{run}"), format!("counter_{run}"), format!("plain_{run}"));
        let values = random.random_range(12..=800);
        for table in &tables {
            self.both(&table.create(random.random_bool(0.3))).await;
        }
        let defaults: Vec<String> = DEFAULTS.iter().map(|(name, of, _)| format!("{name} {of}")).collect();
        let make = format!(
            "CREATE TABLE {twice_name} (a int, b text); ALTER TABLE {twice_name} REPLICA IDENTITY FULL;
             CREATE SEQUENCE {sequence}; CREATE TABLE {plain} (id int PRIMARY KEY, {})",
            defaults.join(", ")
        );
        self.both(&make).await;
        let mut names: Vec<String> = tables.iter().map(|table| table.name.clone()).collect();
        names.push(twice_name.clone());
        let list = names.join(", ");
        self.here.batch_execute(&format!("ALTER PUBLICATION p ADD TABLE {list}")).await.expect("published");
        for table in &tables {
            let sql = table.insert(&format!("generate_series(1, {})", table.rows));
            self.here.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
        self.here.batch_execute(&twice(&twice_name, values)).await.expect("rows");
        let number = i32::try_from(run).expect("few runs");
        self.caught_up(2 * number, seed).await;

        let (stop, tables) = (Arc::new(AtomicBool::new(false)), Arc::new(tables));
        let mut writers = Vec::new();
        for _ in 0..3 {
            let (client, random) = (connect(&self.bench.source, "shop").await, StdRng::seed_from_u64(random.random()));
            writers.push(tokio::spawn(write(client, tables.clone(), run, random, stop.clone())));
        }
        let mut planted = Vec::new();
        for (kind, table) in KINDS.iter().zip(tables.iter()) {
            planted.push(plant(&self.there, kind, table, &mut random).await);
        }
        planted.push(swap_duplicates(&self.there, &twice_name, values, &mut random).await);
        let (of_sequence, how) = of_a_sequence(&sequence, &mut random);
        let (of_default, column) = of_a_default(&plain, &mut random);
        for sql in [&of_sequence, &of_default] {
            self.there.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }

        let sides = Sides {
            source: self.bench.context.source.clone(),
            target: self.bench.context.target.clone(),
            database: "shop".to_owned(),
            gate: Some(gate.clone()),
            door: None,
        };
        let observed = Arc::new(Told::default());
        let context = VerifyContext {
            sides,
            workers: random.random_range(1..=4),
            part_bytes: [64 << 10, 256 << 10, 32 << 20][random.random_range(0..3)],
            load_percent: 100,
            busy_percent: 100,
            observer: observed.clone(),
            damaged: Damaged::Listed,
        };
        let wanted = names.iter().map(|name| QualifiedName::new("public", name)).collect();
        let results = verify::tables(&context, wanted, HashMap::new())
            .await
            .unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
        let found = definitions::compare(&context.sides).await.expect("definitions");
        stop.store(true, Ordering::Relaxed);
        let mut committed = 0;
        for writer in writers {
            committed += writer.await.expect("a writer");
        }

        assert_eq!(results.len(), planted.len(), "seed {seed}");
        for Planted { sql, table, rows } in &planted {
            let result = results.iter().find(|result| result.name == *table).expect("compared");
            let fits = |(listed, (kind, key)): (&RowDifference, &Wanted)| {
                listed.kind == *kind && key.as_ref().is_none_or(|key| listed.key == *key)
            };
            let mut listed = result.listed.clone();
            listed.sort_by_key(|row| row.kind == DifferenceKind::Extra);
            assert!(
                result.problem.is_none() && listed.len() == rows.len() && listed.iter().zip(rows).all(fits),
                "seed {seed}: {sql}: {result:?}"
            );
            assert_eq!(result.differences, rows.len() as u64, "seed {seed}: {sql}");
        }
        let mut told: Vec<(&str, &str, &str)> =
            found.iter().map(|found| (found.kind.as_str(), found.name.as_str(), found.difference.as_str())).collect();
        told.sort_unstable();
        let counter = format!("public.{sequence}");
        let wanted = [("column", column.as_str(), "differs"), ("sequence", counter.as_str(), how)];
        assert_eq!(told, wanted, "seed {seed}: {of_sequence}; {of_default}");
        let rows: i32 = tables.iter().map(|table| table.rows).sum();
        println!(
            "run {run}: seed {seed}: {0} of {0} found among {rows} rows ({1} ranges of keys), {committed} transactions meanwhile",
            planted.len() + wanted.len(),
            observed.chunks.load(Ordering::Relaxed)
        );

        self.caught_up(2 * number + 1, seed).await;
        self.here.batch_execute(&format!("ALTER PUBLICATION p DROP TABLE {list}")).await.expect("no longer published");
        self.both(&format!("DROP TABLE {list}, {plain}; DROP SEQUENCE {sequence}")).await;
    }
}

async fn runs(source: &Installation, target: &Installation, runs: u64) {
    let bench = Streamed::between((source, target), TYPES, &["anchor"]).await;
    let (status, running) = bench.run();
    let (here, there) = (connect(&bench.source, "shop").await, connect(&bench.target, "shop").await);
    let mut field = Field { bench, running, here, there };
    let first = from_environment("PGCUTOVER_VERIFY_SEED");
    for run in 0..first.map_or(runs, |_| 1) {
        field.run(&status.gate, run, first.unwrap_or_else(rand::random)).await;
    }
    field.running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_planted_in_a_random_place_is_found() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    runs(newest, newest, from_environment("PGCUTOVER_VERIFY_RUNS").unwrap_or(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_planted_in_a_random_place_is_found_across_majors() {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    runs(old, new, from_environment("PGCUTOVER_VERIFY_RUNS").unwrap_or(3)).await;
}
