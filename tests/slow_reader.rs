//! A client that does not read: the server waits for it, and the proxy's memory does not grow.
//!
//! Alone in its process, because that is what is measured.

mod support;
#[path = "proxy/wire_client.rs"]
#[expect(dead_code, reason = "only what a client that reads slowly needs")]
mod wire_client;

use support::proxy::LoneProxy;
use support::{connect, one_cluster, wait_for};
use wire_client::{WireClient, query};

const ROWS: u64 = 1024;
const ROW_BYTES: u64 = 1 << 20;
/// What a gigabyte that waits may add to the memory of this process; the server's and the kernel's buffers are not in it.
const MORE_AT_MOST_KB: u64 = 32 * 1024;

/// Resident memory of this process, which the proxy is a part of.
fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

/// What no kernel tells is not asked.
fn can_measure() -> bool {
    std::path::Path::new("/proc/self/status").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_that_nobody_reads_stays_on_the_server() {
    let cluster = one_cluster("slow_reader");
    let proxy = LoneProxy::start(&cluster, &cluster);
    let direct = connect(&cluster, "postgres").await;
    let mut client = WireClient::connect(proxy.port).await;
    client.start(&[("user", "postgres"), ("database", "postgres")]).await;
    client.until_ready().await;
    let before = if can_measure() { resident_kb() } else { 0 };
    client.send(&query(&format!("SELECT repeat('x', {ROW_BYTES}) FROM generate_series(1, {ROWS})"))).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'";
    wait_for("the server to wait for its client", || async {
        direct.query_one(waiting, &[]).await.expect("asked").get::<_, i64>(0) == 1
    })
    .await;
    if can_measure() {
        let more = resident_kb().saturating_sub(before);
        assert!(more < MORE_AT_MOST_KB, "{more} kB more");
    }
    let (mut received, mut most) = (0, 0);
    while let Some(message) = client.next().await {
        match message.tag {
            'D' => received += message.body.len() as u64,
            'Z' => break,
            _ => {}
        }
        if can_measure() {
            most = most.max(resident_kb());
        }
    }
    assert!(received >= ROWS * ROW_BYTES, "everything comes: {received}");
    assert!(most.saturating_sub(before) < MORE_AT_MOST_KB, "{} kB more", most - before);
    proxy.stop().await;
}
