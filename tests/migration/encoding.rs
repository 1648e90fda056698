//! Databases in other encodings than UTF8, and in none: SQL_ASCII holds any bytes, which nobody can convert.

use crate::support::connect;
use crate::world::{World, create, digest, drain, reach, spec};

/// `{text}` makes a text that is not UTF-8 in the database's encoding, of a number `g`.
const ROWS: &str = "
CREATE TABLE value (id int PRIMARY KEY, v text, w text[], note varchar(20) DEFAULT 'x');
CREATE TABLE key (k text PRIMARY KEY, n int);
CREATE TABLE bare (v text);
INSERT INTO value SELECT g, {text}, ARRAY[{text}, NULL] FROM generate_series(1, 200) g;
INSERT INTO key SELECT {text} || g, g FROM generate_series(1, 200) g;
INSERT INTO bare SELECT {text} FROM generate_series(1, 50) g;";

/// One by one, and as sets.
const CHANGES: [&str; 6] = [
    "INSERT INTO value SELECT g, {text}, ARRAY[{text}] FROM generate_series(1001, 1100) g",
    "UPDATE value SET v = v || {text} FROM generate_series(1, 150) g WHERE id = g",
    "UPDATE key SET k = {text} || 'new' FROM generate_series(7, 7) g WHERE n = g",
    "UPDATE key SET n = -n WHERE n % 3 = 0",
    "DELETE FROM key WHERE n % 5 = 0",
    "DELETE FROM bare WHERE ctid IN (SELECT ctid FROM bare LIMIT 10)",
];

async fn moves(encoding: &str, text: &str) {
    let world = World::same_major();
    let make = format!("CREATE DATABASE shop TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
    connect(&world.source, "postgres").await.batch_execute(&make).await.expect("made");
    let source = connect(&world.source, "shop").await;
    source.batch_execute(&ROWS.replace("{text}", text)).await.expect("filled");
    let running = world.engine("");
    create(&running, spec("bytes", &["shop"])).await;
    reach(&running, "bytes", "WaitingForCutoverTrigger").await;
    for change in CHANGES {
        source
            .batch_execute(&change.replace("{text}", text))
            .await
            .unwrap_or_else(|error| panic!("{change}: {error:?}"));
    }
    drain(&running, "bytes").await;
    let target = connect(&world.target, "shop").await;
    for table in ["value", "key", "bare"] {
        assert_eq!(digest(&source, table).await, digest(&target, table).await, "{encoding}: {table}");
    }
    let sql = "SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = 'shop'";
    assert_eq!(target.query_one(sql, &[]).await.expect("readable").get::<_, String>(0), encoding);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_in_no_encoding_arrive_as_they_are() {
    moves("SQL_ASCII", r"convert_from('\xe9ff41'::bytea || set_byte('\x80', 0, 128 + g % 128), 'SQL_ASCII')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn characters_of_another_encoding_arrive() {
    moves("LATIN1", r"convert_from(set_byte('\xe941', 0, 161 + g % 90), 'LATIN1')").await;
}
