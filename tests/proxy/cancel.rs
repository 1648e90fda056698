//! Cancels reach the statement they are meant for, and held statements too.

use std::time::{Duration, Instant};

use pgcutover::proxy::SessionState;

use crate::rig::Rig;
use crate::support::one_cluster;
use crate::wire_client::{extended, query, sync};

#[tokio::test(flavor = "multi_thread")]
async fn a_running_statement_is_cancelled() {
    let cluster = one_cluster("cancel");
    let rig = Rig::over(&cluster);
    let (mut client, mut other) = (rig.wire("postgres").await, rig.wire("postgres").await);
    for batch in [query("SELECT pg_sleep(60)"), [extended("SELECT pg_sleep(60)"), sync()].concat()] {
        client.send(&batch).await;
        other.send(&query("SELECT pg_sleep(0.5)")).await;
        rig.until(SessionState::Active).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        client.cancel(rig.port).await;
        let messages = client.until_ready().await;
        assert_eq!(messages.iter().find(|message| message.tag == 'E').expect("an error").code(), "57014");
        assert!(begun.elapsed() < Duration::from_secs(20));
        assert_eq!(other.tags_until_ready().await, "TDCZI", "nobody else is hit");
    }
    // A cancel with nothing running does nothing.
    rig.until(SessionState::Idle).await;
    client.cancel(rig.port).await;
    client.send(&query("SELECT 1")).await;
    assert_eq!(client.tags_until_ready().await, "TDCZI");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_statement_is_cancelled_without_a_server() {
    let cluster = one_cluster("cancelheld");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let mut client = rig.wire("postgres").await;
    database.fence();
    client.send(&query("SELECT 1")).await;
    rig.until(SessionState::Held).await;
    client.cancel(rig.port).await;
    let messages = client.until_ready().await;
    assert_eq!((messages.len(), messages[0].code().as_str()), (2, "57014"));
    // Extended: everything up to the Sync goes, also what comes later.
    client.send(&extended("SELECT 1")).await;
    rig.until(SessionState::Held).await;
    client.cancel(rig.port).await;
    assert_eq!(client.next().await.expect("an error").code(), "57014");
    client.send(&[extended("SELECT 2"), sync(), query("SELECT 3")].concat()).await;
    assert_eq!(client.tags_until_ready().await, "ZI");
    rig.until(SessionState::Held).await;
    database.reopen();
    assert_eq!(client.tags_until_ready().await, "TDCZI");
    rig.stop().await;
}
