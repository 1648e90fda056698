//! A write-ahead log whose insert position stands past a page header that nothing flushes: whoever waits until that
//! position has been replicated waits for ever. Neither catching up nor a cutover's drain may do so.

mod support;

use std::time::{Duration, Instant};

use support::daemon::{Daemon, DaemonOptions};
use support::stopped::Stopped;
use support::{PATIENCE, connect, two_clusters_with, wait_for};
use tokio_postgres::Client;

const PAGE_BYTES: u64 = 8192;
/// `SizeOfXLogShortPHD` (xlog_internal.h): what an insert position at the start of a page has skipped.
const PAGE_HEADER_BYTES: u64 = 24;

async fn position(client: &Client, function: &str) -> u64 {
    let sql = format!("SELECT ({function}() - '0/0'::pg_lsn)::int8");
    client.query_one(&sql, &[]).await.expect("a position").get::<_, i64>(0).cast_unsigned()
}

/// Writes records until the insert position stands just past a page header, and nothing behind it.
async fn strand(client: &Client) -> bool {
    let emit = "SELECT pg_logical_emit_message(false, 'x', repeat('x', $1::int4))";
    let mut overhead = 64;
    for _ in 0..200 {
        let before = position(client, "pg_current_wal_insert_lsn").await;
        if before % PAGE_BYTES == PAGE_HEADER_BYTES {
            return true;
        }
        let left = PAGE_BYTES - before % PAGE_BYTES;
        // A record that is too small to fill the page exactly, or too large for a length of one byte, is tried later.
        let content = if left > overhead + 320 { left - overhead } else { 400 };
        client.query_one(emit, &[&i32::try_from(content).expect("less than a page")]).await.expect("a record");
        let after = position(client, "pg_current_wal_insert_lsn").await;
        if after / PAGE_BYTES == before / PAGE_BYTES && content > 255 {
            overhead = after - before - content;
        }
    }
    false
}

/// Strands the position again and again for a while, as records of others come in between.
async fn keep_stranded(client: &Client, time: Duration) -> bool {
    let end = Instant::now() + time;
    let mut stranded = false;
    while Instant::now() < end || !stranded && Instant::now() < end + PATIENCE {
        if strand(client).await {
            let insert = position(client, "pg_current_wal_insert_lsn").await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            stranded |= position(client, "pg_current_wal_flush_lsn").await < insert;
        }
    }
    stranded
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_catching_up_nor_the_drain_waits_for_a_stranded_position() {
    let quiet = |options: pgcutover::demo::cluster::ClusterOptions| {
        options.setting("autovacuum", "off").setting("checkpoint_timeout", "1h")
    };
    let (source, target) = two_clusters_with(quiet, |options| options);
    let admin = connect(&source, "postgres").await;
    admin.batch_execute("CREATE DATABASE shop").await.expect("created");
    // Its snapshots of running transactions would move the position on after 15 seconds.
    let _stopped = Stopped::process(&admin, "background writer").await;
    let shop = connect(&source, "shop").await;
    shop.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 10)")
        .await
        .expect("filled");
    let options = DaemonOptions::default()
        .section("cutover", "max_pause = \"120s\"\ndrain_timeout = \"60s\"")
        .failpoints("engine.after_schema=sleep:2500ms;drain.after_sessions=sleep:2500ms");
    let daemon = Daemon::start(&source, &target, options);

    daemon.must(&["migration", "create", "move", "--database", "shop"]);
    wait_for("the first failpoint", || async { daemon.log().contains("failpoint=\"engine.after_schema\"") }).await;
    assert!(keep_stranded(&admin, Duration::from_secs(3)).await, "the position was stranded");
    wait_for("the migration to be ready", || async {
        daemon.json(&["migration", "show", "move"])["substate"] == "WaitingForCutoverTrigger"
    })
    .await;

    let mut order = std::process::Command::new(env!("CARGO_BIN_EXE_pgcutover"))
        .args(["migration", "cutover", "move", "-c"])
        .arg(daemon.config_path())
        .spawn()
        .expect("the program can be run");
    wait_for("the second failpoint", || async { daemon.log().contains("failpoint=\"drain.after_sessions\"") }).await;
    assert!(strand(&admin).await, "the position was stranded in the pause");
    assert!(order.wait().expect("it ends").success(), "the cutover switched");
    let moved = support::connect_with(&daemon.client("shop")).await;
    let row = moved.query_one("SELECT count(*), inet_server_port() FROM t", &[]).await.expect("served");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i32>(1)), (10, i32::from(target.port())));
}
