//! Random transactions: any change of any table, savepoints, aborts, two-phase commits, and definitions where they are
//! carried. What fails is rolled back, as an application would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio_postgres::Client;

use crate::definitions;
use crate::schema::{Key, Table, Unique, literal};
use crate::support::try_connect;

/// Keys come from a small range, so that transactions meet.
const KEYS: i32 = 60;

/// What all writers share.
pub struct Workload {
    pub tables: Vec<Table>,
    /// Definitions change too.
    pub ddl: bool,
    pub config: tokio_postgres::Config,
    pub stop: AtomicBool,
    pub committed: AtomicU64,
}

/// Writes until told to stop, connecting again whenever the server was away.
pub async fn write(workload: Arc<Workload>, seed: u64, number: u64) {
    let mut dice = StdRng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(number));
    let mut prepared = 0;
    while !workload.stop.load(Ordering::Relaxed) {
        let Ok(client) = try_connect(&workload.config).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // As whoever prepares transactions must: what a crash left prepared keeps its locks, and others wait for them.
        if end_prepared(&client, &format!("writer {number} %")).await.is_err() {
            continue;
        }
        while !workload.stop.load(Ordering::Relaxed) && !client.is_closed() {
            prepared += 1;
            let name = format!("writer {number} {prepared}");
            if transaction(&client, &workload, &mut dice, &name).await {
                workload.committed.fetch_add(1, Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(dice.random_range(0..4))).await;
        }
    }
}

/// Ends the transactions of the client's database that are prepared under such a name.
pub async fn end_prepared(client: &Client, like: &str) -> Result<(), tokio_postgres::Error> {
    let sql = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND gid LIKE $1 ORDER BY gid";
    for (number, row) in client.query(sql, &[&like]).await?.iter().enumerate() {
        let gid: &str = row.get(0);
        let how = if number % 2 == 0 { "COMMIT" } else { "ROLLBACK" };
        client.batch_execute(&format!("{how} PREPARED '{gid}'")).await?;
    }
    Ok(())
}

/// Whether it committed.
async fn transaction(client: &Client, workload: &Workload, dice: &mut StdRng, name: &str) -> bool {
    let single = dice.random_ratio(1, 3);
    let mut failed = false;
    let deferred = dice.random_ratio(1, 4);
    if !single {
        let begin = if deferred { "BEGIN; SET CONSTRAINTS ALL DEFERRED" } else { "BEGIN" };
        failed |= client.batch_execute(begin).await.is_err();
    }
    for _ in 0..if single { 1 } else { dice.random_range(1..9) } {
        // The dice fall the same way whether or not a statement succeeds.
        let savepoint = !single && dice.random_ratio(1, 4);
        let (back, released) = (dice.random_ratio(1, 2), dice.random_ratio(1, 3));
        let sql = if workload.ddl && dice.random_ratio(1, 25) {
            definitions::statement(&workload.tables, dice)
        } else {
            statement(&workload.tables, dice)
        };
        if failed {
            continue;
        }
        if savepoint {
            failed |= client.batch_execute("SAVEPOINT s").await.is_err();
        }
        let done = client.batch_execute(&sql).await;
        if savepoint && (back || done.is_err()) {
            // A savepoint that is not released has the next ones inside it.
            failed |= client.batch_execute("ROLLBACK TO SAVEPOINT s").await.is_err();
        } else {
            failed |= done.is_err();
            if savepoint && released && !failed {
                failed |= client.batch_execute("RELEASE SAVEPOINT s").await.is_err();
            }
        }
    }
    let (abort, two_phase) = (dice.random_ratio(1, 6), dice.random_ratio(1, 8));
    if single {
        return !failed;
    }
    if failed || abort {
        let _ = client.batch_execute("ROLLBACK").await;
        return false;
    }
    if two_phase {
        let commit = format!("COMMIT PREPARED '{name}'");
        if client.batch_execute(&format!("PREPARE TRANSACTION '{name}'")).await.is_err() {
            let _ = client.batch_execute("ROLLBACK").await;
            return false;
        }
        return client.batch_execute(&commit).await.is_ok();
    }
    client.batch_execute("COMMIT").await.is_ok()
}

fn statement(tables: &[Table], dice: &mut StdRng) -> String {
    let key = dice.random_range(0..KEYS);
    match dice.random_range(0..28) {
        0 => format!("INSERT INTO base VALUES ({key}, 'x') ON CONFLICT (k) DO UPDATE SET v = base.v || excluded.v"),
        1 => format!("UPDATE base SET v = v || 'y' WHERE k = {key}"),
        2 => format!("INSERT INTO derived VALUES ({}, 'd', 1) ON CONFLICT DO NOTHING", 1000 + key),
        3 => format!("DELETE FROM derived WHERE k = {}", 1000 + key),
        4 => "INSERT INTO nothing DEFAULT VALUES".to_owned(),
        5 => format!(
            "INSERT INTO parts SELECT g, g % 3, 'p' FROM generate_series({key}, {key} + 5) g ON CONFLICT DO NOTHING"
        ),
        6 => format!("UPDATE parts SET region = (region + 1) % 3, v = v || '!' WHERE k = {key}"),
        7 => format!("DELETE FROM parts WHERE k = {key}"),
        // What refers to it goes or changes with it.
        8 => format!("DELETE FROM ONLY base WHERE k = {key}"),
        9 => format!("UPDATE base SET k = k + {} WHERE k = {key}", KEYS / 2),
        10 if dice.random_ratio(1, 8) => "TRUNCATE base CASCADE".to_owned(),
        10 if dice.random_ratio(1, 8) => "TRUNCATE ONLY base, parts_1, nothing RESTART IDENTITY CASCADE".to_owned(),
        11 | 12 => format!(
            "INSERT INTO ranged SELECT g, g % 4, 'r' FROM generate_series({key}, {key} + 9) g ON CONFLICT DO NOTHING"
        ),
        13 => format!("UPDATE ranged SET k = (k + 20) % {KEYS}, v = v || '!' WHERE k = {key}"),
        14 => format!("UPDATE ranged SET kt = kt + 1 WHERE k % 9 = {}", key % 9),
        15 => format!(
            "WITH gone AS (DELETE FROM ranged WHERE k = {key} RETURNING *)
             INSERT INTO parts SELECT k, kt % 3, v FROM gone ON CONFLICT DO NOTHING"
        ),
        16 => "SELECT pg_catalog.pg_logical_emit_message(true, 'somebody', 'else''s')".to_owned(),
        _ => of_table(&tables[dice.random_range(0..tables.len())], dice),
    }
}

fn of_table(table: &Table, dice: &mut StdRng) -> String {
    let key = dice.random_range(0..KEYS);
    let name = &table.name;
    let unique = table.unique != Unique::Not;
    match dice.random_range(0..17) {
        0..5 => insert(table, dice, key, 1),
        5 => {
            let rows = dice.random_range(2..40);
            insert(table, dice, key * 100, rows)
        }
        6..9 => {
            let (column, kind) = &table.columns[dice.random_range(0..table.columns.len())];
            format!("UPDATE {name} SET {column} = {} WHERE k = {key}", literal(*kind, dice))
        }
        9 => {
            let (column, kind) = &table.columns[dice.random_range(0..table.columns.len())];
            format!("UPDATE {name} SET {column} = {} WHERE k % 7 = {}", literal(*kind, dice), key % 7)
        }
        10 if table.key == Key::Always => format!("UPDATE {name} SET k = DEFAULT WHERE k = {key}"),
        10 if table.key == Key::Numeric => format!("UPDATE {name} SET k = k + 0.0 WHERE k = {key}"),
        10 if table.key == Key::Pair && dice.random() => {
            format!("UPDATE {name} SET kt = upper(kt::text) WHERE k % 5 = {}", key % 5)
        }
        10 if table.key == Key::Deferred => format!("UPDATE {name} SET k = k + 1 WHERE k >= {key}"),
        10 => format!("UPDATE {name} SET k = k + {} WHERE k = {key}", dice.random_range(1..5)),
        11 if unique => format!(
            "WITH two AS (SELECT k, u, lead(u) OVER w AS next, lag(u) OVER w AS last FROM {name}
              WHERE u IS NOT NULL WINDOW w AS (ORDER BY u) LIMIT 2)
             UPDATE {name} t SET u = coalesce(two.next, two.last) FROM two WHERE t.k = two.k AND t.u = two.u"
        ),
        11 => format!("UPDATE {name} SET k = k WHERE k = {key}"),
        12 if unique && dice.random() => format!("UPDATE {name} SET u = u + 1 WHERE u >= {key}"),
        12 if unique => format!(
            "UPDATE {name} SET u = -u WHERE k = {key}; UPDATE {name} SET u = 1 - coalesce(u, 0) WHERE k = {key}"
        ),
        12 | 13 => format!("DELETE FROM {name} WHERE k = {key}"),
        14 => format!("DELETE FROM {name} WHERE k % 11 = {}; {}", key % 11, insert(table, dice, key, 1)),
        15 if unique => format!("DELETE FROM {name} WHERE u = {key}; UPDATE {name} SET u = {key} WHERE k = {key}"),
        _ if table.truncates && dice.random_ratio(1, 4) => format!("TRUNCATE {name}"),
        _ => format!("DELETE FROM {name} WHERE ctid = (SELECT min(ctid) FROM {name})"),
    }
}

fn insert(table: &Table, dice: &mut StdRng, key: i32, rows: i32) -> String {
    let mut names = vec!["k".to_owned()];
    let mut values = vec![match table.key {
        Key::Numeric => format!("g{}", ["::numeric", " + 0.0", " + 0.00"][dice.random_range(0..3)]),
        Key::Int | Key::Always | Key::Pair | Key::Index | Key::WholeRow | Key::Full | Key::Deferred | Key::Nothing => {
            "g".to_owned()
        }
    }];
    if table.key == Key::Pair {
        names.push("kt".to_owned());
        values.push("'a\\b' || g % 2".to_owned());
    }
    for ((column, _), value) in table.columns.iter().zip(table.values(dice)) {
        names.push(column.clone());
        values.push(value);
    }
    if table.unique != Unique::Not {
        names.push("u".to_owned());
        values.push(format!("g + {}", dice.random_range(0..3) * 10));
    }
    if table.parent {
        names.push("parent".to_owned());
        let nth = dice.random_range(0..20);
        values.push(format!("(SELECT b.k FROM ONLY base b ORDER BY b.k LIMIT 1 OFFSET {nth})"));
    }
    // What is checked at the end is no reason not to insert a row.
    let conflict = if table.key == Key::Deferred || matches!(table.unique, Unique::Deferred | Unique::Deferrable) {
        format!("WHERE NOT EXISTS (SELECT FROM {} t WHERE t.k = g)", table.name)
    } else {
        "ON CONFLICT DO NOTHING".to_owned()
    };
    format!(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM generate_series({key}, {}) g {conflict}",
        table.name,
        names.join(", "),
        values.join(", "),
        key + rows - 1
    )
}
