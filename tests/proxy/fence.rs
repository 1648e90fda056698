//! Admission: who is held, who may go on, and what is noticed meanwhile.

use std::time::Duration;

use pgcutover::proxy::SessionState;
use pgcutover::switch::{Epoch, PrepareWindow, ServerRole};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::rig::{Rig, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire_client::{WireClient, extended, frame, query, rows, sync};

/// Long enough for something that should not happen to happen.
const A_WHILE: Duration = Duration::from_millis(150);

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_goes_on_under_the_fence_and_the_next_one_is_held() {
    let cluster = one_cluster("held");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let (mut inside, mut outside) = (rig.wire("postgres").await, rig.wire("postgres").await);
    inside.send(&query("BEGIN")).await;
    inside.until_ready().await;
    assert_eq!(database.inside(), 1);
    database.fence();
    outside.send(&query("SELECT 1")).await;
    rig.until(SessionState::Held).await;
    assert!(outside.is_silent(A_WHILE).await);
    inside.send(&[query("SELECT 1"), query("SELECT 2"), query("COMMIT"), query("SELECT 3")].concat()).await;
    for expected in ["TDCZT", "TDCZT", "CZI"] {
        assert_eq!(inside.tags_until_ready().await, expected);
    }
    database.wait_empty().await;
    assert!(inside.is_silent(A_WHILE).await, "the statement behind COMMIT is held");
    database.reopen();
    assert_eq!(inside.tags_until_ready().await, "TDCZI");
    assert_eq!(outside.tags_until_ready().await, "TDCZI");
    assert_eq!(database.inside(), 0);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_pipeline_is_held_too_and_loses_nothing() {
    let cluster = one_cluster("endless");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let client = rig.wire("postgres").await;
    let (mut read, mut write) = client.stream.into_split();
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let writer = tokio::spawn(async move {
        let batch = [extended("SELECT 7"), sync()].concat();
        let mut sent = 0u64;
        while !*stopped.borrow_and_update() {
            write.write_all(&batch).await.expect("sent");
            sent += 1;
        }
        (write, sent)
    });
    let reader = tokio::spawn(async move {
        let (mut seen, mut piece) = (0u64, vec![0; 65536]);
        while let Ok(count @ 1..) = read.read(&mut piece).await {
            seen += count as u64;
        }
        seen
    });
    tokio::time::sleep(A_WHILE).await;
    for _ in 0..20 {
        database.fence();
        tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("the pipeline is held");
        database.reopen();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.send_replace(true);
    let (mut write, sent) = writer.await.expect("ends");
    write.write_all(&frame(b'X', &[])).await.expect("sent");
    // ParseComplete 5, BindComplete 5, DataRow 12, CommandComplete 14, ReadyForQuery 6.
    assert_eq!(reader.await.expect("ends"), sent * 42);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_without_a_sync_count_as_inside() {
    let cluster = one_cluster("unsynced");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let mut client = rig.wire("postgres").await;
    client.send(&[extended("SELECT 1"), frame(b'H', &[])].concat()).await;
    for expected in "12DC".chars() {
        assert_eq!(client.next().await.map(|message| message.tag), Some(expected));
    }
    database.fence();
    assert_eq!(database.inside(), 1);
    client.send(&[extended("SELECT 2"), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "12DCZI");
    database.wait_empty().await;
    database.reopen();
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_finished_under_the_fence() {
    let cluster = one_cluster("copyfence");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let mut client = rig.wire("postgres").await;
    client.send(&query("CREATE TABLE t(a int)")).await;
    client.until_ready().await;
    for start in [query("COPY t FROM STDIN"), [extended("COPY t FROM STDIN"), sync()].concat()] {
        client.send(&start).await;
        while client.next().await.map(|message| message.tag) != Some('G') {}
        database.fence();
        client.send(&[frame(b'd', b"1\n"), frame(b'd', b"2\n")].concat()).await;
        let end = if start[0] == b'Q' { frame(b'c', &[]) } else { [frame(b'c', &[]), sync()].concat() };
        client.send(&end).await;
        assert_eq!(client.tags_until_ready().await, "CZI");
        database.wait_empty().await;
        database.reopen();
    }
    client.send(&query("SELECT count(*) FROM t")).await;
    assert_eq!(rows(&client.until_ready().await), ["4"]);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_client_may_leave() {
    let cluster = one_cluster("leaving");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    database.fence();
    // Login is held as well, so connect before the fence.
    database.reopen();
    for farewell in [Some(frame(b'X', &[])), None] {
        let mut client = rig.wire("postgres").await;
        database.fence();
        client.send(&query("INSERT INTO t VALUES (1)")).await;
        rig.until(SessionState::Held).await;
        match farewell {
            Some(terminate) => {
                client.send(&terminate).await;
                assert_eq!(client.next().await, None);
            }
            None => drop(client),
        }
        rig.until_no_session().await;
        database.wait_empty().await;
        database.reopen();
    }
    assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "0", "what was held was never sent");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_waits_for_the_fence_and_goes_where_the_database_is_then() {
    let (source, target) = crate::support::two_clusters();
    let rig = Rig::start(crate::rig::server(&source), crate::rig::server(&target), |_| {});
    let database = rig.database();
    database.fence();
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "postgres")]).await;
    rig.until(SessionState::Login).await;
    assert!(client.is_silent(A_WHILE).await || client.next().await.is_some_and(|message| message.tag == 'R'));
    // One that gives up meanwhile is noticed.
    let mut gone = WireClient::connect(rig.port).await;
    gone.start(&[("user", "postgres")]).await;
    wait_for("the second login", || async { rig.sessions.list().len() == 2 }).await;
    drop(gone);
    wait_for("its end", || async { rig.sessions.list().len() == 1 }).await;
    database.open(ServerRole::Target, Epoch(1));
    client.until_ready().await;
    client.send(&query("SHOW server_version_num")).await;
    assert_eq!(
        rows(&client.until_ready().await)[0].parse::<u32>().expect("a number") / 10000,
        u32::from(target.major())
    );
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_known_server_logins_are_refused_and_sessions_held() {
    let cluster = one_cluster("unknown");
    let rig = Rig::over(&cluster);
    let database = rig.database();
    let mut held = rig.wire("postgres").await;
    database.set_unknown("both servers claim to be old".to_owned());
    held.send(&query("SELECT 1")).await;
    rig.until(SessionState::Held).await;
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "postgres")]).await;
    let messages = client.until_ready().await;
    let error = messages.last().expect("an error");
    assert_eq!(error.code(), "57P03");
    assert!(String::from_utf8_lossy(&error.body).contains("both servers claim to be old"));
    database.open(ServerRole::Source, Epoch(0));
    assert_eq!(held.tags_until_ready().await, "TDCZI");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_prepare_window_a_backend_starts_as_if_there_were_no_fence() {
    let cluster = one_cluster("window");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    direct
        .batch_execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        .await
        .expect("fenced softly");
    let show = "SHOW default_transaction_read_only";
    // A stranger's fence is felt, and nobody is given a connection on which it was.
    let felt = rig.connect("postgres").await;
    assert_eq!(text(&felt, show).await, "on");
    drop(felt);
    rig.until_no_session().await;
    let reported = cluster.major() >= 14;
    assert!(!reported || rig.sessions.idle_backends().is_empty());
    let window = PrepareWindow { epoch: Epoch(1), earlier_read_only: "off".to_owned(), earlier_of_roles: [].into() };
    rig.database().set_prepare_window(Some((ServerRole::Source, window)));
    assert_eq!(text(&rig.connect("postgres").await, show).await, "off");
    let mut own = rig.client("postgres");
    own.options("-c default_transaction_read_only=on");
    assert_eq!(text(&crate::support::connect_with(&own).await, show).await, "on", "the client's own wish");
    rig.stop().await;
}
