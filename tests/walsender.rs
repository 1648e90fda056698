//! The walsender's client and the pgoutput decoder against real servers of every installed major.

mod support;

use std::time::Duration;

use bytes::Bytes;
use pgcutover::demo::cluster::{Cluster, Stop};
use pgcutover::lsn::Lsn;
use pgcutover::pgoutput::{self, Message, OldTuple, ReplicaIdentity, Tuple, TupleValue};
use pgcutover::postgres::walsender::{
    ReplicationConnection, ReplicationMessage, ReplicationStream, WalsenderError, WhenInUse,
};
use pgcutover::postgres::{Connector, InstanceId};
use support::{cluster_options, connect, installations, one_cluster, wait_for};
use tokio_postgres::Client;

fn connector(cluster: &Cluster) -> Connector {
    Connector::new(&support::server(cluster), "source", &InstanceId::random()).expect("no certificates to read")
}

async fn replication(cluster: &Cluster) -> ReplicationConnection {
    ReplicationConnection::connect(&connector(cluster), "postgres").await.expect("connects in replication mode")
}

/// The next message of the plugin; keepalives are passed over.
async fn next_message(stream: &mut ReplicationStream) -> Message {
    loop {
        match stream.next().await.expect("the stream goes on") {
            ReplicationMessage::XLogData { data, .. } => return pgoutput::decode(&data, false).expect("pgoutput"),
            ReplicationMessage::Keepalive { .. } => {}
        }
    }
}

/// The messages up to the next Commit, and where that ends.
async fn next_transaction(stream: &mut ReplicationStream) -> (Vec<Message>, Lsn) {
    let mut messages = Vec::new();
    loop {
        match next_message(stream).await {
            Message::Commit(commit) => return (messages, commit.end_lsn),
            message => messages.push(message),
        }
    }
}

async fn confirmed(admin: &Client, slot: &str) -> Lsn {
    let sql = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = $1";
    admin.query_one(sql, &[&slot]).await.expect("the slot is there").get(0)
}

async fn slots(admin: &Client) -> i64 {
    admin.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.expect("answers").get(0)
}

fn row(values: &[Option<&'static str>]) -> Tuple {
    let value = |value: &Option<&'static str>| match value {
        Some(text) => TupleValue::Text(Bytes::from_static(text.as_bytes())),
        None => TupleValue::Null,
    };
    Tuple { values: values.iter().map(value).collect() }
}

const TABLES: &str = "CREATE TABLE public.t (id int PRIMARY KEY, at timestamptz, raw bytea, big text);
    ALTER TABLE public.t ALTER COLUMN big SET STORAGE EXTERNAL;
    CREATE TABLE public.f (a int, b text); ALTER TABLE public.f REPLICA IDENTITY FULL;
    CREATE TABLE public.unpublished (a int);
    CREATE PUBLICATION \"Odd \"\"name\"\"\" FOR TABLE public.t, public.f;
    ALTER ROLE postgres SET datestyle = 'German'; ALTER ROLE postgres SET bytea_output = 'escape';
    ALTER ROLE postgres SET timezone = 'Asia/Tokyo'";

const CHANGES: &str = "BEGIN;
    INSERT INTO public.t VALUES (1, '2024-02-29 12:00:00+00', '\\x00ff', repeat('x', 10000));
    UPDATE public.t SET raw = NULL WHERE id = 1;
    UPDATE public.t SET id = 2;
    DELETE FROM public.t;
    INSERT INTO public.f VALUES (1, 'a');
    UPDATE public.f SET b = 'b';
    COMMIT";

#[tokio::test]
async fn every_major_streams_its_changes() {
    for installation in installations().all() {
        let cluster = Cluster::start(cluster_options(installation, "walsender")).expect("starts");
        let admin = connect(&cluster, "postgres").await;
        admin.batch_execute(TABLES).await.expect("made");
        let mut control = replication(&cluster).await;
        assert_eq!(control.version_num() / 10_000, u32::from(installation.major));
        let flushed = admin.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.expect("answers");
        let flushed: Lsn = flushed.get::<_, &str>(0).parse().expect("a position");
        let created = control.create_logical_slot("s", support::PATIENCE).await.expect("made");
        assert!(created.consistent_point >= flushed);
        assert!(matches!(
            control.create_logical_slot("s", support::PATIENCE).await,
            Err(WalsenderError::SlotExists { .. })
        ));
        admin.batch_execute(CHANGES).await.expect("changed");

        let reader = replication(&cluster).await;
        let versions = [Some(1), (installation.major >= 14).then_some(2), (installation.major >= 16).then_some(4)];
        let mut stream = reader.start("s", Lsn::ZERO, "Odd \"name\"", 1).await.expect("starts");
        check_changes(&mut stream, &cluster).await;
        stream.stop().await.expect("stops");
        // Nothing was confirmed: every version of the protocol sends the same again.
        for version in versions.into_iter().flatten() {
            let reader = replication(&cluster).await;
            let mut stream = reader.start("s", Lsn::ZERO, "Odd \"name\"", version).await.expect("starts");
            check_changes(&mut stream, &cluster).await;
            stream.stop().await.expect("stops");
        }
        if installation.major >= 11 {
            admin.batch_execute("TRUNCATE public.t, public.f RESTART IDENTITY").await.expect("truncated");
            let mut stream =
                replication(&cluster).await.start("s", Lsn::ZERO, "Odd \"name\"", 1).await.expect("starts");
            next_transaction(&mut stream).await;
            let (messages, _) = next_transaction(&mut stream).await;
            let truncate = messages.iter().find_map(|message| match message {
                Message::Truncate(truncate) => Some(truncate),
                _ => None,
            });
            let truncate = truncate.unwrap_or_else(|| panic!("{messages:?}"));
            assert!(truncate.restart_identity && !truncate.cascade && truncate.relations.len() == 2);
            stream.stop().await.expect("stops");
        }
        control.drop_slot("s", WhenInUse::Fail).await.expect("nobody uses it");
        assert!(matches!(control.drop_slot("s", WhenInUse::Fail).await, Err(WalsenderError::SlotMissing { .. })));
        control.terminate().await.expect("ends");
    }
}

/// What [`CHANGES`] must decode to, whatever settings the role has.
async fn check_changes(stream: &mut ReplicationStream, cluster: &Cluster) {
    let (messages, end_lsn) = next_transaction(stream).await;
    let mut messages = messages.into_iter();
    let mut next = || messages.next().unwrap_or_else(|| panic!("a message is missing on {}", cluster.major()));
    let Message::Begin(begin) = next() else { panic!("no Begin") };
    assert!(begin.final_lsn < end_lsn && begin.xid > 0);
    let Message::Relation(t) = next() else { panic!("no Relation") };
    assert_eq!((t.schema.as_str(), t.name.as_str()), ("public", "t"));
    assert_eq!(t.replica_identity, ReplicaIdentity::Default);
    let columns: Vec<_> = t.columns.iter().map(|column| (column.name.as_str(), column.key, column.type_oid)).collect();
    assert_eq!(columns, [("id", true, 23), ("at", false, 1184), ("raw", false, 17), ("big", false, 25)]);

    let Message::Insert(insert) = next() else { panic!("no Insert") };
    let at = Some("2024-02-29 12:00:00+00");
    assert_eq!(insert.new.values[..3], row(&[Some("1"), at, Some("\\x00ff")]).values[..]);
    let toasted = |tuple: &Tuple, id: &'static str| {
        assert_eq!(tuple.values[..3], row(&[Some(id), at, None]).values[..]);
        assert_eq!(tuple.values[3], TupleValue::UnchangedToast);
    };
    let Message::Update(update) = next() else { panic!("no Update") };
    assert_eq!((update.relation, update.old), (t.oid, None));
    toasted(&update.new, "1");
    let Message::Update(update) = next() else { panic!("no Update") };
    assert_eq!(update.old, Some(OldTuple::Key(row(&[Some("1"), None, None, None]))));
    toasted(&update.new, "2");
    let Message::Delete(delete) = next() else { panic!("no Delete") };
    assert_eq!(delete.old, OldTuple::Key(row(&[Some("2"), None, None, None])));

    let Message::Relation(f) = next() else { panic!("no Relation") };
    assert_eq!(f.replica_identity, ReplicaIdentity::Full);
    let Message::Insert(insert) = next() else { panic!("no Insert") };
    assert_eq!((insert.relation, insert.new), (f.oid, row(&[Some("1"), Some("a")])));
    let Message::Update(update) = next() else { panic!("no Update") };
    assert_eq!(update.old, Some(OldTuple::Full(row(&[Some("1"), Some("a")]))));
    assert_eq!(update.new, row(&[Some("1"), Some("b")]));
    assert_eq!(messages.next(), None);
}

/// Somebody else's slot is told apart from every other failure, and WAIT waits for it.
#[tokio::test]
async fn a_slot_in_use_is_told_apart() {
    let found = installations();
    for installation in [found.all().first(), found.all().last()].into_iter().flatten() {
        let cluster = Cluster::start(cluster_options(installation, "in-use")).expect("starts");
        check_slot_in_use(&cluster).await;
    }
}

async fn check_slot_in_use(cluster: &Cluster) {
    let admin = connect(cluster, "postgres").await;
    admin.batch_execute("CREATE PUBLICATION p FOR ALL TABLES").await.expect("made");
    let mut control = replication(cluster).await;
    control.create_logical_slot("s", support::PATIENCE).await.expect("made");
    let stream = replication(cluster).await.start("s", Lsn::ZERO, "p", 1).await.expect("starts");
    let second = replication(cluster).await.start("s", Lsn::ZERO, "p", 1).await;
    assert!(matches!(second, Err(WalsenderError::SlotInUse { .. })), "{second:?}");
    let dropped = control.drop_slot("s", WhenInUse::Fail).await;
    assert!(matches!(dropped, Err(WalsenderError::SlotInUse { .. })), "{dropped:?}");
    let missing = replication(cluster).await.start("nope", Lsn::ZERO, "p", 1).await;
    assert!(matches!(missing, Err(WalsenderError::SlotMissing { .. })), "{missing:?}");

    let waiter = tokio::spawn(async move { control.drop_slot("s", WhenInUse::Wait).await });
    wait_for("the drop to wait for the slot", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ReplicationSlotDrop'";
        admin.query_one(sql, &[]).await.expect("answers").get::<_, i64>(0) == 1
    })
    .await;
    drop(stream);
    waiter.await.expect("no panic").expect("dropped as soon as it was free");
    assert_eq!(slots(&admin).await, 0);
}

/// `stop` returns when the slot is free, with the last report confirmed, even in the middle of a large transaction.
#[tokio::test]
async fn stop_confirms_the_last_report_and_frees_the_slot() {
    let cluster = one_cluster("stop");
    let admin = connect(&cluster, "postgres").await;
    admin.batch_execute("CREATE TABLE public.t (a text); CREATE PUBLICATION p FOR ALL TABLES").await.expect("made");
    let mut control = replication(&cluster).await;
    control.create_logical_slot("s", support::PATIENCE).await.expect("made");
    admin.batch_execute("INSERT INTO public.t VALUES ('first')").await.expect("changed");
    admin
        .batch_execute("INSERT INTO public.t SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
        .await
        .expect("changed");
    let mut stream = replication(&cluster).await.start("s", Lsn::ZERO, "p", 1).await.expect("starts");
    let (_, end_lsn) = next_transaction(&mut stream).await;
    assert!(matches!(next_message(&mut stream).await, Message::Begin(_)));
    stream.send_status(end_lsn, end_lsn, end_lsn);
    stream.stop().await.expect("stops in the middle");
    assert_eq!(confirmed(&admin, "s").await, end_lsn);
    control.drop_slot("s", WhenInUse::Fail).await.expect("the slot is free at once");
}

/// The applier is blocked and reads nothing for longer than `wal_sender_timeout`; the link lives, reports arrive, and
/// afterwards the stream goes on where it was.
#[tokio::test]
async fn feedback_flows_while_nobody_reads() {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    let options = cluster_options(newest, "blocked").setting("wal_sender_timeout", "6s");
    let cluster = Cluster::start(options).expect("starts");
    let admin = connect(&cluster, "postgres").await;
    admin.batch_execute("CREATE TABLE public.t (a text); CREATE PUBLICATION p FOR ALL TABLES").await.expect("made");
    replication(&cluster).await.create_logical_slot("s", support::PATIENCE).await.expect("made");
    let mut stream = replication(&cluster).await.start("s", Lsn::ZERO, "p", 1).await.expect("starts");
    admin.batch_execute("INSERT INTO public.t VALUES ('first')").await.expect("changed");
    let (_, end_lsn) = next_transaction(&mut stream).await;

    // More than every buffer on the way holds.
    admin
        .batch_execute("INSERT INTO public.t SELECT repeat('x', 1000) FROM generate_series(1, 50000)")
        .await
        .expect("changed");
    let feedback = stream.feedback();
    feedback.send_status(end_lsn, end_lsn, end_lsn);
    wait_for("the report to be confirmed", async || confirmed(&admin, "s").await == end_lsn).await;
    let blocked_since = std::time::Instant::now();
    wait_for("more than the server's time-out", async || blocked_since.elapsed() > Duration::from_secs(8)).await;
    let (messages, large_end) = next_transaction(&mut stream).await;
    assert_eq!(messages.len(), 50_001);

    // Idle: keepalives bring positions of what is not published, and they can be confirmed.
    admin.batch_execute("CREATE TABLE public.other AS SELECT 1 AS a").await.expect("made");
    let idle_end = loop {
        match stream.next().await.expect("alive") {
            ReplicationMessage::Keepalive { end, .. } if end > large_end => break end,
            ReplicationMessage::Keepalive { .. } | ReplicationMessage::XLogData { .. } => {}
        }
    };
    feedback.send_status(idle_end, idle_end, idle_end);
    wait_for("the idle position to be confirmed", async || confirmed(&admin, "s").await >= idle_end).await;
}

/// A slot that cannot be made in time is given up on the server too: nothing is left that would hold back WAL.
#[tokio::test]
async fn a_slot_that_takes_too_long_leaves_nothing_behind() {
    let cluster = one_cluster("slow-slot");
    let admin = connect(&cluster, "postgres").await;
    let mut busy = connect(&cluster, "postgres").await;
    let transaction = busy.transaction().await.expect("begins");
    transaction.batch_execute("CREATE TABLE public.t (a int)").await.expect("takes an xid");
    let mut control = replication(&cluster).await;
    let error = control.create_logical_slot("s", Duration::from_millis(300)).await.expect_err("waits for the xid");
    assert!(matches!(error, WalsenderError::SlotTimeout { .. }), "{error}");
    assert_eq!(slots(&admin).await, 0);
    transaction.commit().await.expect("commits");
    control.create_logical_slot("s", support::PATIENCE).await.expect("the connection is still usable");
    assert_eq!(slots(&admin).await, 1);
}

/// The end of the server is an error of the stream, not the end of the changes. A server that is asked to stop waits
/// until all it wrote has been confirmed, so positions of keepalives must be.
#[tokio::test]
async fn a_server_that_stops_ends_the_stream_with_an_error() {
    let mut cluster = one_cluster("stopping");
    let admin = connect(&cluster, "postgres").await;
    admin.batch_execute("CREATE PUBLICATION p FOR ALL TABLES").await.expect("made");
    replication(&cluster).await.create_logical_slot("s", support::PATIENCE).await.expect("made");
    let mut stream = replication(&cluster).await.start("s", Lsn::ZERO, "p", 1).await.expect("starts");
    drop(admin);
    let reader = tokio::spawn(async move {
        loop {
            match stream.next().await {
                Ok(ReplicationMessage::Keepalive { end, .. }) => stream.send_status(end, end, end),
                Ok(ReplicationMessage::XLogData { .. }) => {}
                Err(error) => return error,
            }
        }
    });
    let stopped = tokio::task::spawn_blocking(move || cluster.stop(Stop::Fast)).await.expect("no panic");
    stopped.expect("stops");
    let error = reader.await.expect("no panic");
    assert!(matches!(error, WalsenderError::Raw(_)), "{error}");
}
