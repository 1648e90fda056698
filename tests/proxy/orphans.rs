//! Clients that vanish in the middle of something: the gate counts them until the server has finished with them.

use std::time::Duration;

use pgcutover::proxy::SessionState;

use crate::rig::{Rig, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire_client::{extended, frame, query};

#[tokio::test(flavor = "multi_thread")]
async fn an_autocommit_statement_goes_on_and_is_waited_for() {
    let cluster = one_cluster("autocommit");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    for terminate in [false, true] {
        let database = rig.database();
        let mut client = rig.wire("postgres").await;
        // It runs for as long as we hold the lock.
        direct.batch_execute("SELECT pg_advisory_lock(7)").await.expect("free");
        client.send(&query("INSERT INTO t SELECT 1 FROM pg_advisory_xact_lock(7)")).await;
        rig.until(SessionState::Active).await;
        if terminate {
            client.send(&frame(b'X', &[])).await;
        }
        drop(client);
        rig.until(SessionState::Orphan).await;
        database.fence();
        assert_eq!(database.inside(), 1);
        assert_eq!(rig.sessions.orphans("postgres").len(), 1);
        assert_eq!(rig.sessions.stragglers("postgres").len(), 1);
        direct.batch_execute("SELECT pg_advisory_unlock(7)").await.expect("held");
        tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("it ends");
        let committed = text(&direct, "SELECT count(*) FROM t").await;
        assert_eq!(committed, if terminate { "2" } else { "1" }, "it was committed before the gate was left");
        database.reopen();
        rig.until_no_session().await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_a_copy_and_a_cut_frame_are_ended() {
    let cluster = one_cluster("ended");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    let cut = query(&format!("SELECT '{}'", "x".repeat(5_000_000)));
    let cases: [(&str, Vec<Vec<u8>>); 5] = [
        ("in a transaction", vec![query("BEGIN; INSERT INTO t VALUES (1)")]),
        ("in a failed transaction", vec![query("BEGIN; SELECT 1/0")]),
        ("in a copy", vec![query("COPY t FROM STDIN"), frame(b'd', b"1\n")]),
        ("without a Sync", vec![extended("INSERT INTO t VALUES (1)"), frame(b'H', &[])]),
        ("in the middle of a frame", vec![cut[..2_000_000].to_vec()]),
    ];
    for (case, frames) in cases {
        let database = rig.database();
        let mut client = rig.wire("postgres").await;
        let pid = rig.sessions.list()[0].backend_pid.expect("has one");
        for frame in frames {
            client.send(&frame).await;
            // Let it reach the server.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        wait_for(case, || async { database.inside() == 1 }).await;
        drop(client);
        database.fence();
        tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect(case);
        let alive = text(&direct, &format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")).await;
        assert_eq!(alive, "0", "{case}: the gate was left before its backend had ended");
        database.reopen();
        rig.until_no_session().await;
    }
    assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "0");
    rig.stop().await;
}

/// As at a server: it does not wait for the rest of the data, nor for the client to close its socket.
#[tokio::test(flavor = "multi_thread")]
async fn terminate_within_a_copy_ends_it() {
    let cluster = one_cluster("copy_terminate");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    let database = rig.database();
    let (copy, leave) = (query("COPY t FROM STDIN"), [frame(b'd', b"1\n"), frame(b'X', &[])].concat());
    for is_told_first in [true, false] {
        let mut client = rig.wire("postgres").await;
        if is_told_first {
            client.send(&copy).await;
            assert_eq!(client.next().await.expect("an answer").tag, 'G');
            client.send(&leave).await;
        } else {
            client.send(&[&copy[..], &leave].concat()).await;
            assert_eq!(client.next().await.expect("an answer").tag, 'G');
        }
        assert_eq!(client.next().await, None, "the session has ended");
        database.fence();
        tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("it ends");
        assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "0");
        database.reopen();
        rig.until_no_session().await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_end_is_told_and_proven() {
    let cluster = one_cluster("ordered");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let mut client = rig.wire("postgres").await;
    client.send(&query("BEGIN")).await;
    client.until_ready().await;
    let id = rig.sessions.list()[0].id;
    database.fence();
    assert_eq!(rig.sessions.end(&[id], "57P01", "the database is moving"), 1);
    assert_eq!(client.next().await.expect("an error").code(), "57P01");
    tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("it ends");
    rig.until_no_session().await;
    rig.stop().await;
}
