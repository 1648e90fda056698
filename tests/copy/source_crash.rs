//! A source that crashes forgets what it had not flushed: positions and transaction ids come again. A copy must neither
//! wait for ids that were taken back nor hand over to the stream at a position that was.

use pgcutover::demo::cluster::Stop;
use pgcutover::lsn::Lsn;
use pgcutover::migration::copy;

use crate::rig::{DATABASE, Rig};
use crate::support;
use crate::support::stopped::Stopped;

async fn number(client: &tokio_postgres::Client, sql: &str) -> u64 {
    client.query_one(sql, &[]).await.expect(sql).get::<_, i64>(0).cast_unsigned()
}

const NEXT_XID: &str = "SELECT txid_snapshot_xmax(txid_current_snapshot())";

#[tokio::test(flavor = "multi_thread")]
async fn a_barrier_that_was_taken_back_is_reached_though_nobody_writes() {
    let mut rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    let source = support::connect(&rig.source_cluster, DATABASE).await;
    let _stopped = Stopped::process(&source, "walwriter").await;
    // As the barrier: it writes nothing, so nothing is flushed for it.
    let mut barrier = 0;
    for _ in 0..5 {
        barrier = number(&source, "SELECT txid_current()").await;
    }
    rig.source_cluster.restart(Stop::Immediate).expect("the source comes back");
    let source = support::connect(&rig.source_cluster, DATABASE).await;
    assert!(number(&source, NEXT_XID).await <= barrier, "the ids were taken back");
    let report = copy::copy_database(&rig.context(Some(barrier)), &tables, &archive).await.expect("copied");
    assert_eq!(report.copied.rows, 2);
    assert!(rig.journal.snapshots.lock().expect("whole")["t"].snapshot.xmin > barrier);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_table_was_copied_with_outlives_a_crash_of_the_source() {
    let mut rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY, note text); CREATE TABLE other (note text)").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    let source = support::connect(&rig.source_cluster, DATABASE).await;
    // Ended for the snapshot, and not flushed: a crash would give these ids and positions to others.
    let _stopped = Stopped::process(&source, "walwriter").await;
    for unflushed in [
        "SET synchronous_commit = off; INSERT INTO t VALUES (1, 'committed')",
        "BEGIN; INSERT INTO other SELECT repeat('x', 100) FROM generate_series(1, 500); ROLLBACK",
    ] {
        source.batch_execute(unflushed).await.expect("written");
    }
    copy::copy_database(&rig.context(None), &tables, &archive).await.expect("copied");
    rig.source_cluster.restart(Stop::Immediate).expect("the source comes back");

    let hand_over = rig.journal.snapshots.lock().expect("whole")["t"].clone();
    let source = support::connect(&rig.source_cluster, DATABASE).await;
    let next = number(&source, NEXT_XID).await;
    assert!(next >= hand_over.snapshot.xmax, "xid {next} comes again: the snapshot was {}", hand_over.snapshot);
    let position = number(&source, "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::int8").await;
    assert!(position >= hand_over.position.0, "{} comes again, the copy was at {}", Lsn(position), hand_over.position);
    assert_eq!(number(&source, "SELECT count(*) FROM t").await, 1, "a row that was copied is there");
}
