//! Links that break: what is in doubt is said to be, nothing is sent twice, and the gate waits for proof.

use std::time::Duration;

use pgcutover::failpoint::Failpoints;
use pgcutover::proxy::SessionState;

use crate::rig::{Rig, server, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire::{Order, Wire};
use crate::wire_client::query;

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_link_is_in_doubt_and_the_gate_waits_for_the_backends_end() {
    let cluster = one_cluster("cut");
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    let wire = Wire::to(&cluster).await;
    let rig = Rig::start(wire.server(), wire.server(), |_| {});
    let database = rig.database();
    let mut client = rig.wire("postgres").await;
    let session = wire.count() - 1;
    // It runs for as long as we hold the lock.
    direct.batch_execute("SELECT pg_advisory_lock(7)").await.expect("free");
    client.send(&query("INSERT INTO t SELECT 1 FROM pg_advisory_xact_lock(7)")).await;
    let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    wait_for("the statement to run", || async { text(&direct, waits).await == "1" }).await;
    wire.order(session, Order::Cut);
    let error = client.next().await.expect("an error");
    assert_eq!(error.code(), "08006");
    assert!(String::from_utf8_lossy(&error.body).contains("not known"), "it is said to be in doubt");
    rig.until(SessionState::Orphan).await;
    database.fence();
    direct.batch_execute("SELECT pg_advisory_unlock(7)").await.expect("held");
    wait_for("it to go on and commit", || async { text(&direct, "SELECT count(*) FROM t").await == "1" }).await;
    let emptied = tokio::time::timeout(Duration::from_secs(1), database.wait_empty()).await;
    assert!(emptied.is_err(), "the backend is still there");
    assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "1", "once");
    wire.order(session, Order::Drop);
    tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("its end is proven");
    rig.until_no_session().await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_whose_link_breaks_is_told_without_doubt() {
    let cluster = one_cluster("idlecut");
    let wire = Wire::to(&cluster).await;
    let rig = Rig::start(wire.server(), wire.server(), |_| {});
    let mut client = rig.wire("postgres").await;
    wire.order(wire.count() - 1, Order::Drop);
    let error = client.next().await.expect("an error");
    assert_eq!(error.code(), "08006");
    assert!(!String::from_utf8_lossy(&error.body).contains("not known"));
    assert_eq!(client.next().await, None);
    rig.until_no_session().await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_leaves_the_gate_to_the_servers_word() {
    let cluster = one_cluster("panic");
    let failpoints = Failpoints::parse("session.orders=error").expect("valid");
    let rig = Rig::start_with(server(&cluster), server(&cluster), failpoints, |_| {});
    let database = rig.database();
    let direct = connect(&cluster, "postgres").await;
    let mut client = rig.wire("postgres").await;
    client.send(&query("BEGIN")).await;
    client.until_ready().await;
    let view = rig.until(SessionState::Active).await;
    let pid = view.backend_pid.expect("has one");
    rig.sessions.end(&[view.id], "57P01", "never said");
    assert_eq!(client.next().await.expect("an error").code(), "XX000");
    database.fence();
    tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("its end is proven");
    let alive = text(&direct, &format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")).await;
    assert_eq!(alive, "0");
    database.reopen();
    // The worker serves on.
    assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1");
}
