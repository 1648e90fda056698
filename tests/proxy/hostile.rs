//! Clients that mean harm, or are broken: the proxy serves on, and its memory is bounded.

use std::time::Duration;

use pgcutover::proxy::SessionState;
use tokio::io::AsyncWriteExt as _;

use crate::rig::{Rig, text};
use crate::support::{one_cluster, wait_for};
use crate::wire_client::{WireClient, frame, query};

/// Resident memory of this process, in bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    status.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("a number") * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_at_any_stage_ends_only_its_own_connection() {
    let cluster = one_cluster("nonsense");
    let rig = Rig::over(&cluster);
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut noise = move |length: usize| -> Vec<u8> {
        (0..length)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect()
    };
    for round in 0..60 {
        let mut client = if round % 2 == 0 { WireClient::connect(rig.port).await } else { rig.wire("postgres").await };
        let mut bytes = noise(1 + round * 7);
        if round % 3 == 0 {
            // A tag that exists, with a length that does not fit.
            bytes.splice(0..0, frame(b"QPBESHdcfFCDX"[round % 13], &[]));
        }
        // The proxy may close at any moment.
        let _sent = client.stream.write_all(&bytes).await;
    }
    for length in [0u32, 3, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let mut client = rig.wire("postgres").await;
        client.send(&[&b"Q"[..], &length.to_be_bytes()].concat()).await;
        assert_eq!(client.next().await.expect("an error").code(), "08P01", "{length:#x}");
    }
    rig.until_no_session().await;
    assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_larger_than_memory_should_be_is_streamed_and_its_client_may_vanish() {
    let cluster = one_cluster("huge");
    let rig = Rig::over(&cluster);
    let mut client = rig.wire("postgres").await;
    let before = resident_bytes();
    let length = 200u32 << 20;
    client.send(&[&b"Q"[..], &(length + 4).to_be_bytes(), b"SELECT length('"].concat()).await;
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..150 {
        client.send(&piece).await;
    }
    assert!(resident_bytes() < before + (64 << 20), "{} bytes more", resident_bytes() - before);
    assert_eq!(rig.until(SessionState::Active).await.user, "postgres");
    drop(client);
    rig.until_no_session().await;
    assert_eq!(rig.database().inside(), 0);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_client_cannot_fill_memory_and_its_end_is_noticed() {
    let cluster = one_cluster("heldflood");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let (mut greedy, mut client) = (rig.wire("postgres").await, rig.wire("postgres").await);
    database.fence();
    let flood = query(&"x".repeat(1000)).repeat(20_000);
    let sent = tokio::time::timeout(Duration::from_millis(500), greedy.stream.write_all(&flood)).await;
    assert!(sent.is_err(), "the proxy stops reading");
    // More than the proxy's buffer and less than the kernel's, so that the end of the stream arrives.
    client.send(&flood[..100_000]).await;
    drop(client);
    wait_for("its end to be noticed", || async { rig.sessions.list().len() == 1 }).await;
    rig.sessions.end(&[rig.sessions.list()[0].id], "57P01", "enough");
    rig.until_no_session().await;
    database.wait_empty().await;
    database.reopen();
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_connections_is_bounded_and_passes() {
    let cluster = one_cluster("flood");
    let rig = Rig::over(&cluster);
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(WireClient::connect(rig.port).await);
    }
    assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1", "the silent ones hold nobody up");
    drop(silent);
    rig.stop().await;
}
