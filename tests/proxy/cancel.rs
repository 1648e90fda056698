//! Cancels reach the statement they are meant for, and held statements too.

use pgcutover::proxy::SessionState;

use crate::rig::{Rig, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire_client::{extended, query, sync};

#[tokio::test(flavor = "multi_thread")]
async fn a_running_statement_is_cancelled() {
    let cluster = one_cluster("cancel");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    let (mut client, mut other) = (rig.wire("postgres").await, rig.wire("postgres").await);
    for batch in [query("SELECT pg_sleep(600)"), [extended("SELECT pg_sleep(600)"), sync()].concat()] {
        client.send(&batch).await;
        other.send(&query("SELECT pg_sleep(1)")).await;
        // A cancel that comes before the statement is lost.
        let asleep =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE '%pg_sleep(600)%'";
        wait_for("the statement to run", || async { text(&direct, asleep).await == "1" }).await;
        client.cancel(rig.port).await;
        let messages = client.until_ready().await;
        assert_eq!(messages.iter().find(|message| message.tag == 'E').expect("an error").code(), "57014");
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
