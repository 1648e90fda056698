//! The stream of one database on real PostgreSQL: a hand-made publication and slot, every shape of change, lost
//! connections on both sides, and the failures that must never be skipped.

mod support;

use pgcutover::demo::cluster::Stop;
use pgcutover::lsn::Lsn;
use pgcutover::migration::stream::{StreamError, StreamStatus};
use support::streamed::Streamed as Bench;
use support::{connect, installations, wait_for};
use tokio_postgres::error::SqlState;

/// One table of every kind that needs care, the same on both servers.
const TABLES: &str = r#"
CREATE TABLE plain (id int PRIMARY KEY, note text);
CREATE TABLE "Odd ""Name" ("Key" text, "a b" int, PRIMARY KEY ("Key"));
CREATE TABLE toasted (id int PRIMARY KEY, big text, small int);
ALTER TABLE toasted ALTER big SET STORAGE EXTERNAL;
CREATE TABLE always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text);
CREATE TABLE side_identity (k int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, big text, note text);
ALTER TABLE side_identity ALTER big SET STORAGE EXTERNAL;
CREATE TABLE computed (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED, note text);
CREATE TABLE keyless (a int, b text, c float8, d jsonb);
ALTER TABLE keyless REPLICA IDENTITY FULL;
CREATE TABLE by_index (a int NOT NULL, b int NOT NULL, c text, UNIQUE (b, a));
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_b_a_key;
CREATE TABLE parts (id int, region text, note text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parts_north PARTITION OF parts FOR VALUES IN ('north');
CREATE TABLE parts_south PARTITION OF parts FOR VALUES IN ('south');
CREATE TABLE empty ();
CREATE TABLE swapped (id int PRIMARY KEY, u int UNIQUE);
CREATE TABLE numbers (s smallint, b bigint, i int, v numeric, PRIMARY KEY (s, b));
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent);
CREATE TABLE lists (id int PRIMARY KEY, items text[]);
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trigger fired'; END $$;
"#;

/// Every kind of change. Run on the source only.
const CHANGES: &str = r#"
INSERT INTO plain SELECT g, 'note ' || g FROM generate_series(1, 100) g;
UPDATE plain SET note = NULL WHERE id = 1;
UPDATE plain SET id = 1000 WHERE id = 2;
DELETE FROM plain WHERE id BETWEEN 10 AND 20;
INSERT INTO "Odd ""Name" VALUES ('it''s', 1), ('back\slash', 2);
UPDATE "Odd ""Name" SET "a b" = 3, "Key" = 'new' WHERE "a b" = 2;
INSERT INTO toasted VALUES (1, repeat('x', 100000), 1);
UPDATE toasted SET small = 2;
UPDATE toasted SET id = 2;
INSERT INTO always (note) VALUES ('a'), ('b');
UPDATE always SET note = 'c' WHERE id = 1;
UPDATE always SET id = DEFAULT WHERE id = 2;
INSERT INTO side_identity (k, big, note) VALUES (1, repeat('y', 100000), 'a');
UPDATE side_identity SET note = 'b';
UPDATE side_identity SET n = DEFAULT;
INSERT INTO computed (id, note) VALUES (1, 'a'), (2, 'b');
UPDATE computed SET id = 5 WHERE id = 2;
INSERT INTO keyless VALUES (1, 'same', 0.1, '{"a": 1}'), (1, 'same', 0.1, '{"a": 1}'), (NULL, NULL, 'NaN', NULL);
UPDATE keyless SET b = 'one of two' WHERE ctid = (SELECT ctid FROM keyless WHERE b = 'same' LIMIT 1);
DELETE FROM keyless WHERE a IS NULL;
INSERT INTO by_index VALUES (1, 2, 'a'), (3, 4, 'b');
UPDATE by_index SET a = 9 WHERE b = 2;
DELETE FROM by_index WHERE b = 4;
INSERT INTO parts VALUES (1, 'north', 'a'), (2, 'south', 'b');
UPDATE parts SET region = 'south' WHERE id = 1;
INSERT INTO empty DEFAULT VALUES;
INSERT INTO numbers VALUES (32767, 9223372036854775807, 2147483647, 1.10), (-32768, -9223372036854775808, -2147483648, 'NaN'),
    (0, 0, NULL, NULL), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (4, 4, 4, 4), (5, 5, 5, 5);
INSERT INTO parent VALUES (1), (2);
INSERT INTO child VALUES (1, 1), (2, 2);
INSERT INTO lists VALUES (1, ARRAY['a', NULL, 'NULL']);
TRUNCATE parent CASCADE;
INSERT INTO parent VALUES (3);
INSERT INTO child VALUES (3, 3);
"#;

const ALL: [&str; 16] = [
    "plain",
    "\"Odd \"\"Name\"",
    "toasted",
    "always",
    "side_identity",
    "computed",
    "keyless",
    "by_index",
    "parts_north",
    "parts_south",
    "empty",
    "swapped",
    "numbers",
    "parent",
    "child",
    "lists",
];

impl Bench {
    async fn start(majors: (u16, u16)) -> Self {
        let found = installations();
        let major = |major| found.major(major).unwrap_or_else(|| panic!("PostgreSQL {major} is not there"));
        let bench = Self::between((major(majors.0), major(majors.1)), TABLES, &ALL).await;
        // Neither a trigger nor a setting of the database changes what is applied.
        let triggers = "CREATE TRIGGER t BEFORE INSERT ON plain FOR EACH ROW EXECUTE FUNCTION fail();
                        ALTER DATABASE shop SET array_nulls = off; ALTER DATABASE shop SET bytea_output = escape";
        connect(&bench.target, "shop").await.batch_execute(triggers).await.expect("trigger");
        bench
    }

    /// Waits until everything the source has done so far is applied.
    async fn drain(&self, status: &StreamStatus, nonce: &str) {
        let source = connect(&self.source, "shop").await;
        source.execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce]).await.expect("marker");
        let mut applied = status.applied.subscribe();
        let wanted = applied.wait_for(|applied| applied.has_reached(nonce));
        let _applied = tokio::time::timeout(support::PATIENCE, wanted).await.expect("in time").expect("running");
    }

    async fn assert_equal(&self) {
        let (source, target) = (connect(&self.source, "shop").await, connect(&self.target, "shop").await);
        for table in ALL {
            assert_eq!(rows(&source, table).await, rows(&target, table).await, "{table}");
        }
    }
}

/// A table's rows as text, in order, and their number.
async fn rows(client: &tokio_postgres::Client, table: &str) -> (String, i64) {
    let sql = format!("SELECT coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), ''), count(*) FROM {table} t");
    let row = client.query_one(&sql, &[]).await.expect("rows");
    (row.get(0), row.get(1))
}

async fn every_change(majors: (u16, u16)) {
    let bench = Bench::start(majors).await;
    let (status, running) = bench.run();
    connect(&bench.source, "shop").await.batch_execute(CHANGES).await.expect("one transaction");
    bench.drain(&status, "first").await;
    bench.assert_equal().await;
    assert_eq!(status.counters.of(&pgcutover::ident::QualifiedName::new("public", "plain")).inserts, 100);

    // Numbers travel as such, at the edges of their types too, and null where they are null.
    let sql = "UPDATE numbers SET i = coalesce(i, -7), v = v * 2; UPDATE numbers SET i = NULL WHERE s = 1;
               DELETE FROM numbers WHERE s BETWEEN 2 AND 4";
    connect(&bench.source, "shop").await.batch_execute(sql).await.expect("changed");
    bench.drain(&status, "numbers").await;
    bench.assert_equal().await;

    // A new shape of a table that is streaming already.
    for cluster in [&bench.target, &bench.source] {
        let sql = "ALTER TABLE plain ADD COLUMN extra int";
        connect(cluster, "shop").await.batch_execute(sql).await.expect("altered");
    }
    let sql = "UPDATE plain SET extra = id; INSERT INTO plain VALUES (5000, 'x', 5000)";
    connect(&bench.source, "shop").await.batch_execute(sql).await.expect("changed");
    bench.drain(&status, "second").await;
    bench.assert_equal().await;

    // While nothing of ours happens, the slot moves on all the same.
    let source = connect(&bench.source, "shop").await;
    let before: Lsn = source.query_one("SELECT pg_current_wal_insert_lsn()", &[]).await.expect("LSN").get(0);
    source.batch_execute("CREATE TABLE not_published AS SELECT generate_series(1, 10000)").await.expect("made");
    wait_for("the slot to be confirmed while idle", || async {
        let sql = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 's'";
        source.query_one(sql, &[]).await.expect("slot").get::<_, Lsn>(0) > before
    })
    .await;
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_arrives_in_the_same_major() {
    every_change((any_major(), any_major())).await;
}

/// From 12 on, because of the generated columns.
#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_arrives_from_the_oldest_in_the_newest() {
    let found = installations();
    let mut majors = found.all().iter().map(|installation| installation.major).filter(|major| *major >= 12);
    let oldest = majors.next().expect("at least one");
    every_change((oldest, majors.next_back().unwrap_or(oldest))).await;
}

/// The major with client tools, which every machine that builds this has.
fn any_major() -> u16 {
    installations().newest_with_client_tools().expect("checked by installations()").major
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_connections_and_restarts_neither_lose_nor_double() {
    let bench = Bench::start((any_major(), any_major())).await;
    let (mut status, mut running) = bench.run();
    let source = connect(&bench.source, "shop").await;
    let killers = (connect(&bench.source, "postgres").await, connect(&bench.target, "postgres").await);
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pgcutover/%'";
    let mut next = 0;
    for round in 0..12 {
        let from = next + 1;
        next += 500;
        let sql = format!(
            "INSERT INTO plain SELECT g, 'x' FROM generate_series({from}, {next}) g;
             INSERT INTO keyless SELECT g, 'x', g, NULL FROM generate_series({from}, {next}) g;"
        );
        for row in from..=next {
            // Single-row transactions, so that kills fall between and into batches.
            if row % 50 == 0 {
                source.execute("INSERT INTO parent VALUES ($1)", &[&(100_000 + row)]).await.expect("insert");
            }
        }
        source.batch_execute(&sql).await.expect("insert");
        match round % 3 {
            0 => drop(killers.0.query(kill, &[]).await.expect("killed on the source")),
            1 => drop(killers.1.query(kill, &[]).await.expect("killed on the target")),
            _ => {
                running.abort();
                (status, running) = bench.run();
            }
        }
    }
    bench.drain(&status, "end").await;
    bench.assert_equal().await;
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_larger_than_the_queue_flows_through() {
    let bench = Bench::start((any_major(), any_major())).await;
    let (status, running) = bench.run();
    let sql = "INSERT INTO toasted SELECT g, repeat('z', 20000), g FROM generate_series(1, 2000) g;
               UPDATE toasted SET small = small + 1;
               INSERT INTO toasted VALUES (0, repeat('larger than the queue', 200000), 0), (-1, 'behind it', 0);";
    connect(&bench.source, "shop").await.batch_execute(sql).await.expect("44 MB in one transaction");
    bench.drain(&status, "large").await;
    let sql = "INSERT INTO plain VALUES (1, 'before it'); UPDATE toasted SET big = repeat(big, 2) WHERE id = 0";
    connect(&bench.source, "shop").await.batch_execute(sql).await.expect("8 MB in one value");
    bench.drain(&status, "larger").await;
    bench.assert_equal().await;
    running.abort();
}

/// Where transactions of a thousand rows follow each other there is hardly a moment between two. What is applied becomes
/// durable all the same, bit by bit, and not when the source pauses.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_long_transactions_becomes_durable_bit_by_bit() {
    let bench = Bench::start((any_major(), any_major())).await;
    let (source, target) = (connect(&bench.source, "shop").await, connect(&bench.target, "shop").await);
    let told = "ALTER TABLE parent ADD COLUMN written_by bigint DEFAULT txid_current()";
    target.batch_execute(told).await.expect("on the target only");
    for transaction in 0..60 {
        let sql = format!(
            "INSERT INTO parent SELECT g FROM generate_series({transaction} * 1000 + 1, {transaction} * 1000 + 1000) g"
        );
        source.batch_execute(&sql).await.expect("inserted");
    }
    let (status, running) = bench.run();
    bench.drain(&status, "end").await;
    let sql = "SELECT max(rows) FROM (SELECT count(*) AS rows FROM parent GROUP BY written_by) w";
    let largest: i64 = target.query_one(sql, &[]).await.expect("counted").get(0);
    // The queue here is so small that a part of one fills a piece: the next end of a transaction is taken.
    assert!(largest <= 2000, "{largest} rows in one transaction");
    target.batch_execute("ALTER TABLE parent DROP COLUMN written_by").await.expect("dropped");
    bench.assert_equal().await;
    running.abort();
}

/// Each transaction of the source locks one table. What is gathered of them while the target is busy would lock them all in
/// one transaction, more than the target has room for.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_over_many_tables_does_not_use_up_the_locks_of_the_target() {
    let found = installations();
    let major = found.major(any_major()).expect("checked by any_major()");
    let mut bench = Bench::between((major, major), "CREATE TABLE busy (id int PRIMARY KEY)", &["busy"]).await;
    bench.context.queue_bytes = 64 << 20;
    let each = |statement: &str, then: &str| {
        format!("DO 'BEGIN FOR i IN 1..3000 LOOP EXECUTE format(''{statement}'', i); {then} END LOOP; END'")
    };
    for cluster in [&bench.source, &bench.target] {
        let made = each("CREATE TABLE many_%s (id int PRIMARY KEY)", "");
        connect(cluster, "shop").await.batch_execute(&made).await.expect("made");
    }
    let source = connect(&bench.source, "shop").await;
    source.batch_execute(&each("ALTER PUBLICATION p ADD TABLE many_%s", "")).await.expect("published");
    bench.target.configure(&[("max_locks_per_transaction", "10"), ("max_connections", "20")]).expect("configured");
    bench.target.restart(Stop::Fast).expect("restarted");

    // Once the tables are known, what comes of them is gathered at once.
    let (status, running) = bench.run();
    source.batch_execute(&each("INSERT INTO many_%s VALUES (1)", "COMMIT;")).await.expect("inserted");
    bench.drain(&status, "known").await;
    let busy = connect(&bench.target, "shop").await;
    busy.batch_execute("BEGIN; LOCK TABLE busy").await.expect("locked");
    source.batch_execute("INSERT INTO busy VALUES (1)").await.expect("inserted");
    source.batch_execute(&each("INSERT INTO many_%s VALUES (2)", "COMMIT;")).await.expect("inserted");
    let end: Lsn = source.query_one("SELECT pg_current_wal_lsn()", &[]).await.expect("LSN").get(0);
    let sent = format!("SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sent_lsn >= '{end}')");
    wait_for("the backlog to be sent", || async {
        source.query_one(&sent, &[]).await.expect("read").get::<_, bool>(0)
    })
    .await;
    busy.batch_execute("COMMIT").await.expect("unlocked");
    bench.drain(&status, "end").await;
    for number in 1..=3000 {
        let table = pgcutover::ident::QualifiedName::new("public", format!("many_{number}"));
        assert_eq!(status.counters.of(&table).inserts, 2, "{table}");
    }
    running.abort();
}

/// Rows that exchange the values of a unique column cannot be changed at once: the target refuses the net effect, and takes
/// the changes in the order in which the source made them. In a transaction of its own, and in the middle of a long one.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_applied_at_once_is_applied_in_order() {
    let bench = Bench::start((any_major(), any_major())).await;
    let source = connect(&bench.source, "shop").await;
    let fill = "INSERT INTO swapped SELECT g, g FROM generate_series(1, 1000) g";
    source.batch_execute(fill).await.expect("filled");
    let (status, running) = bench.run();
    bench.drain(&status, "filled").await;
    let swap = "UPDATE swapped SET u = -u; UPDATE swapped SET u = 1001 + u";
    source.batch_execute(swap).await.expect("swapped");
    bench.drain(&status, "swapped").await;
    bench.assert_equal().await;
    let long = format!(
        "INSERT INTO plain SELECT g, 'x' FROM generate_series(1, 15000) g; {swap}; UPDATE plain SET note = 'y';
         {swap}; DELETE FROM plain WHERE id % 2 = 0; UPDATE plain SET id = -id;"
    );
    source.batch_execute(&long).await.expect("in the middle");
    bench.drain(&status, "long").await;
    bench.assert_equal().await;
    running.abort();
}

/// Two texts that the collation of their column takes for one are two rows all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_is_found_by_what_it_says_and_not_by_what_its_collation_makes_of_it() {
    let major = any_major();
    let found = installations();
    let major = found.major(15).or_else(|| found.major(major)).expect("checked by any_major()");
    let tables = "CREATE TABLE names (name text, n int); ALTER TABLE names REPLICA IDENTITY FULL";
    let bench = Bench::between((major, major), tables, &["names"]).await;
    for cluster in [&bench.source, &bench.target] {
        let collate = "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
                       ALTER TABLE names ALTER name TYPE text COLLATE nocase";
        if let Err(error) = connect(cluster, "shop").await.batch_execute(collate).await {
            assert_eq!(error.code().map(SqlState::code), Some("0A000"), "{error:?}");
            eprintln!("not tested: this server was built without ICU");
            return;
        }
    }
    let (status, running) = bench.run();
    let source = connect(&bench.source, "shop").await;
    source
        .batch_execute(
            "INSERT INTO names VALUES ('Bob', 1), ('bob', 1), ('BOB', 1);
             DELETE FROM names WHERE name = 'bob' COLLATE \"C\"; UPDATE names SET name = 'Rob' WHERE name = 'BOB' COLLATE \"C\"",
        )
        .await
        .expect("written");
    bench.drain(&status, "deleted").await;
    let left = "SELECT string_agg(name, ' ' ORDER BY name COLLATE \"C\") FROM names";
    for cluster in [&bench.source, &bench.target] {
        let left: String = connect(cluster, "shop").await.query_one(left, &[]).await.expect("read").get(0);
        assert_eq!(left, "Bob Rob");
    }
    running.abort();
}

/// The same of types whose values are cast to text by a function that does not tell them apart, or that leaves blanks out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_is_found_by_what_it_says_and_not_by_what_a_cast_makes_of_it() {
    let found = installations();
    let major = found.major(any_major()).expect("checked by any_major()");
    let tables = "CREATE TYPE mood AS ENUM ('sad', 'glad', 'mad'); CREATE DOMAIN felt AS mood;
        CREATE FUNCTION hidden(mood) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''***''::text';
        CREATE CAST (mood AS text) WITH FUNCTION hidden(mood);
        CREATE TABLE names (m mood, f felt, b bpchar, n int); ALTER TABLE names REPLICA IDENTITY FULL";
    let bench = Bench::between((major, major), tables, &["names"]).await;
    let (status, running) = bench.run();
    let source = connect(&bench.source, "shop").await;
    source
        .batch_execute(
            "INSERT INTO names VALUES ('sad', 'sad', 'a', 1), ('glad', 'sad', 'a', 1), ('glad', 'mad', 'a', 1),
                 ('glad', 'mad', 'a ', 1), (NULL, 'mad', 'a ', 1);
             DELETE FROM names WHERE m = 'glad' AND f::mood = 'sad'; DELETE FROM names WHERE m = 'glad' AND octet_length(b) = 2;
             UPDATE names SET n = 2 WHERE m IS NULL",
        )
        .await
        .expect("written");
    bench.drain(&status, "deleted").await;
    let left = "SELECT string_agg(format('%s %s %s%s', m, f, octet_length(b), n), ',' ORDER BY m) FROM names";
    for cluster in [&bench.source, &bench.target] {
        let left: String = connect(cluster, "shop").await.query_one(left, &[]).await.expect("read").get(0);
        assert_eq!(left, "sad sad 11,glad mad 11, mad 22");
    }
    running.abort();
}

/// Keys WITHOUT OVERLAPS come with PostgreSQL 18. Their index is no btree, and finds rows all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_with_a_temporal_key_are_found_by_its_index() {
    let found = installations();
    let Some(major) = found.all().iter().find(|installation| installation.major >= 18) else {
        eprintln!("not tested: PostgreSQL 18 is not there");
        return;
    };
    // Ranges alone need no extension.
    let tables = "
        CREATE TABLE price (item int4range, valid daterange, cents int, PRIMARY KEY (item, valid WITHOUT OVERLAPS));
        CREATE TABLE whole (item int4range, valid daterange, cents int, PRIMARY KEY (item, valid WITHOUT OVERLAPS));
        ALTER TABLE whole REPLICA IDENTITY FULL";
    let names = ["price", "whole"];
    let bench = Bench::between((major, major), tables, &names).await;
    let (status, running) = bench.run();
    let (source, target) = (connect(&bench.source, "shop").await, connect(&bench.target, "shop").await);
    for table in names {
        // Many at once, and one by itself.
        let fill = format!(
            "INSERT INTO {table} SELECT int4range(g, g + 1), daterange('2026-01-01', '2027-01-01'), g
             FROM generate_series(1, 100) g"
        );
        let many = format!(
            "UPDATE {table} SET cents = cents + 1;
             UPDATE {table} SET valid = daterange('2030-01-01', '2031-01-01') WHERE item = '[7,8)';
             INSERT INTO {table} VALUES ('[7,8)', '[2026-06-01,2030-01-01)', 0);
             DELETE FROM {table} WHERE lower(item) > 90"
        );
        let one = format!("UPDATE {table} SET valid = '[2027-01-01,2028-01-01)', cents = 0 WHERE item = '[5,6)'");
        for (step, sql) in [fill, many, one].iter().enumerate() {
            source.batch_execute(sql).await.expect("changed");
            bench.drain(&status, &format!("{table} {step}")).await;
        }
    }
    running.abort();
    for table in names {
        let counted = format!(
            "SELECT n_tup_upd + n_tup_del, coalesce(seq_scan, 0) FROM pg_stat_user_tables WHERE relname = '{table}'"
        );
        wait_for("what the session has counted", || async {
            target.query_one(&counted, &[]).await.expect("read").get::<_, i64>(0) > 90
        })
        .await;
        let row = target.query_one(&counted, &[]).await.expect("read");
        let (changes, scans): (i64, i64) = (row.get(0), row.get(1));
        assert!(scans < 10, "{table} was scanned {scans} times for {changes} changes");
        assert_eq!(rows(&source, table).await, rows(&target, table).await, "{table}");
    }
}

/// A backlog of whole transactions fills many pieces: while one is refused and executed again, the one behind it is encoded
/// already, with statements that are then gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_with_swaps_and_truncations_arrives_whole() {
    let bench = Bench::start((any_major(), any_major())).await;
    let source = connect(&bench.source, "shop").await;
    let fill = "INSERT INTO swapped SELECT g, g FROM generate_series(1, 200) g;
                INSERT INTO plain SELECT g, 'x' FROM generate_series(1, 200) g;
                INSERT INTO toasted SELECT g, repeat('t', 3000), g FROM generate_series(1, 200) g";
    source.batch_execute(fill).await.expect("filled");
    for round in 1..=60 {
        let step = match round % 6 {
            0 => "UPDATE swapped SET u = -u; UPDATE swapped SET u = 201 + u",
            1 => "UPDATE plain SET note = coalesce(note, '') || 'y'; UPDATE plain SET id = id + 1000 WHERE id % 7 = 0",
            2 => "UPDATE toasted SET small = small + 1; UPDATE toasted SET big = big || 'u' WHERE id % 10 = 0",
            3 => "DELETE FROM plain WHERE id % 11 = 0; INSERT INTO parent SELECT coalesce(max(id), 0) + 1 FROM parent",
            4 => {
                "INSERT INTO keyless SELECT g, 'k', NULL, NULL FROM generate_series(1, 50) g; DELETE FROM keyless WHERE a > 40"
            }
            _ => "TRUNCATE numbers; INSERT INTO numbers SELECT g, g, NULL, g FROM generate_series(1, 300) g",
        };
        source.batch_execute(step).await.expect("changed");
        let single = "UPDATE swapped SET u = 5000 WHERE id = $1";
        source.execute(single, &[&round]).await.expect("moved away");
        let back = "UPDATE swapped SET u = 5000 + id WHERE id = $1";
        source.execute(back, &[&round]).await.expect("moved back");
    }
    let (status, running) = bench.run();
    bench.drain(&status, "end").await;
    bench.assert_equal().await;
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_lose_changes_is_a_failure_and_never_skipped() {
    let bench = Bench::start((any_major(), any_major())).await;
    let source = connect(&bench.source, "shop").await;
    let target = connect(&bench.target, "shop").await;
    let (status, running) = bench.run();
    bench.drain(&status, "begun").await;
    running.abort();
    let _aborted = running.await;

    // Somebody has advanced the slot behind our back.
    wait_for("the walsender to be gone", || async {
        let sql = "SELECT active FROM pg_replication_slots WHERE slot_name = 's'";
        !source.query_one(sql, &[]).await.expect("slot").get::<_, bool>(0)
    })
    .await;
    source.batch_execute("INSERT INTO plain VALUES (1, 'lost')").await.expect("insert");
    let advance = "SELECT pg_replication_slot_advance('s', pg_current_wal_lsn())";
    source.batch_execute(advance).await.expect("advanced");
    let (_status, running) = bench.run();
    let error = running.await.expect("no panic");
    assert!(matches!(error, StreamError::SlotAhead { .. }), "{error}");

    // An engine that was replaced writes nothing.
    target.batch_execute("UPDATE pgcutover.progress SET generation = 2").await.expect("taken over");
    let (_status, running) = bench.run();
    assert!(matches!(running.await.expect("no panic"), StreamError::Catalog(_)));

    // The slot is gone.
    target.batch_execute("UPDATE pgcutover.progress SET generation = 1").await.expect("set back");
    source.batch_execute("SELECT pg_drop_replication_slot('s')").await.expect("dropped");
    let (_status, running) = bench.run();
    let error = running.await.expect("no panic");
    assert!(matches!(error, StreamError::SlotMissing { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_replaced_while_streaming_commits_nothing_more() {
    let bench = Bench::start((any_major(), any_major())).await;
    let (status, running) = bench.run();
    bench.drain(&status, "begun").await;
    let target = connect(&bench.target, "shop").await;
    target.batch_execute("UPDATE pgcutover.progress SET generation = 2").await.expect("taken over");
    let source = connect(&bench.source, "shop").await;
    source.batch_execute("INSERT INTO plain VALUES (1, 'not for us')").await.expect("insert");
    let error = running.await.expect("no panic");
    assert!(error.to_string().contains("taken over"), "{error}");
    let rows: i64 = target.query_one("SELECT count(*) FROM plain", &[]).await.expect("count").get(0);
    assert_eq!(rows, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_missing_on_the_target_stops_the_stream_without_quoting_it() {
    let bench = Bench::start((any_major(), any_major())).await;
    let (status, running) = bench.run();
    let source = connect(&bench.source, "shop").await;
    source.batch_execute("INSERT INTO by_index VALUES (1, 1, 'secret')").await.expect("insert");
    bench.drain(&status, "begun").await;
    connect(&bench.target, "shop").await.batch_execute("DELETE FROM by_index").await.expect("tampered");
    source.batch_execute("UPDATE by_index SET c = 'secret too'").await.expect("update");
    let error = running.await.expect("no panic");
    assert_eq!((error.code(), error.table().as_deref()), ("target_differs", Some("\"public\".\"by_index\"")));
    assert!(!error.to_string().contains("secret"), "{error}");
}

/// Two who wait for the stream at the same time: what arrives together becomes durable together, and neither is missed.
#[tokio::test(flavor = "multi_thread")]
async fn markers_that_arrive_together_are_all_seen() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    let bench = Bench::between((newest, newest), TABLES, &ALL).await;
    let source = connect(&bench.source, "shop").await;
    for nonce in ["one", "other", "third"] {
        source.execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce]).await.expect("marker");
    }
    let (status, running) = bench.run();
    for nonce in ["third", "one", "other"] {
        let mut applied = status.applied.subscribe();
        let wanted = applied.wait_for(|applied| applied.has_reached(nonce));
        let _applied = tokio::time::timeout(support::PATIENCE, wanted).await.expect("in time").expect("running");
    }
    running.abort();
}

/// A truncation ends what is sent at a time, in the middle of its transaction: what is said to be there must be committed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_to_be_applied_can_be_seen() {
    let bench = Bench::start((any_major(), any_major())).await;
    let (status, running) = bench.run();
    bench.drain(&status, "begun").await;
    let (source, target) = (connect(&bench.source, "shop").await, connect(&bench.target, "shop").await);
    for round in 1..=20_i64 {
        let sql = format!("INSERT INTO parent VALUES ({round}); TRUNCATE numbers");
        source.batch_execute(&sql).await.expect("changed");
        let end: Lsn = source.query_one("SELECT pg_current_wal_lsn()", &[]).await.expect("LSN").get(0);
        let mut applied = status.applied.subscribe();
        let wanted = applied.wait_for(|applied| applied.seen >= end);
        let _applied = tokio::time::timeout(support::PATIENCE, wanted).await.expect("in time").expect("running");
        let rows: i64 = target.query_one("SELECT count(*) FROM parent", &[]).await.expect("count").get(0);
        assert_eq!(rows, round);
    }
    running.abort();
}
