//! Every protocol in both directions, unchanged.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use pgcutover::proxy::SessionState;
use pgcutover::switch::ServerRole;

use crate::rig::{Rig, Sockets, server, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire_client::{WireClient, bind, execute, extended, frame, parse, query, rows, sync, tags};

async fn queries_go_through_in_every_protocol(sockets: Sockets) {
    let cluster = one_cluster("basics");
    let rig = Rig::on(&cluster, sockets);
    let client = rig.connect("postgres").await;
    assert_eq!(text(&client, "SELECT 1").await, "1");
    let row = client.query_one("SELECT $1::int + 1", &[&41]).await.expect("extended");
    assert_eq!(row.get::<_, i32>(0), 42);
    client
        .batch_execute("CREATE TABLE t(a int, b text); BEGIN; INSERT INTO t VALUES (1, 'x'); COMMIT")
        .await
        .expect("ddl");
    let big = "y".repeat(5_000_000);
    client.execute("INSERT INTO t VALUES (2, $1)", &[&big]).await.expect("large up");
    let row = client.query_one("SELECT b FROM t WHERE a = 2", &[]).await.expect("large down");
    assert!(row.get::<_, String>(0) == big);
    let failure = client.query_one("SELECT 1/0", &[]).await.expect_err("an error is passed on");
    assert_eq!(failure.code().map(|code| code.code()), Some("22012"));
    let sessions = rig.sessions.list();
    assert_eq!(sessions.len(), 1);
    assert_eq!((sessions[0].user.as_str(), sessions[0].server), ("postgres", Some(ServerRole::Source)));
    drop(client);
    rig.until_no_session().await;
    wait_for("counters", || async { rig.metrics.transactions.with_label_values(&["postgres"]).get() >= 6 }).await;
    rig.stop().await;
}

async fn pipelines_suspended_portals_and_errors_keep_their_order(sockets: Sockets) {
    let cluster = one_cluster("pipelines");
    let rig = Rig::on(&cluster, sockets);
    let mut client = rig.wire("postgres").await;
    let batch = [
        extended("SELECT 1"),
        sync(),
        extended("SELECT 1/0"),
        extended("SELECT 2"),
        sync(),
        query("SELECT 3; SELECT 4"),
    ];
    client.send(&batch.concat()).await;
    assert_eq!(client.tags_until_ready().await, "12DCZI");
    assert_eq!(client.tags_until_ready().await, "1EZI");
    assert_eq!(client.tags_until_ready().await, "TDCTDCZI");
    // A portal that is left and taken up again, with a Flush between.
    let series = [query("BEGIN"), parse("", "SELECT generate_series(1, 5)"), bind(""), execute(2), frame(b'H', &[])];
    client.send(&series.concat()).await;
    assert_eq!(client.tags_until_ready().await, "CZT");
    for expected in "12DDs".chars() {
        assert_eq!(client.next().await.map(|message| message.tag), Some(expected));
    }
    assert!(rig.until(SessionState::Active).await.in_transaction);
    client.send(&[execute(0), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "DDDCZT");
    client.send(&query("COMMIT")).await;
    assert_eq!(client.tags_until_ready().await, "CZI");
    rig.until(SessionState::Idle).await;
    // Many small frames in one write, more than a block.
    let many: Vec<u8> = (0..5000).flat_map(|_| [extended("SELECT 7"), sync()].concat()).collect();
    let (mut read, mut write) = client.stream.into_split();
    let sending = tokio::spawn(async move {
        tokio::io::AsyncWriteExt::write_all(&mut write, &many).await.expect("sent");
        write
    });
    let mut seen = 0;
    let mut piece = vec![0; 65536];
    let mut ready = 0;
    while ready < 5000 {
        let count = tokio::io::AsyncReadExt::read(&mut read, &mut piece).await.expect("answers");
        assert!(count > 0);
        seen += count;
        // Each answer has the same length: 1, 2, D, C, Z.
        ready = seen / 42;
    }
    drop(sending.await.expect("sent"));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn function_calls_and_empty_queries_are_answered() {
    let cluster = one_cluster("calls");
    let rig = Rig::over(&cluster);
    let mut client = rig.wire("postgres").await;
    client.send(&query("SELECT 'pg_catalog.version'::regproc::oid")).await;
    let oid: u32 = rows(&client.until_ready().await)[0].parse().expect("an oid");
    let call = [&oid.to_be_bytes()[..], &[0, 0, 0, 0, 0, 0]].concat();
    client.send(&[frame(b'F', &call), query("")].concat()).await;
    assert_eq!(client.tags_until_ready().await, "VZI");
    assert_eq!(client.tags_until_ready().await, "IZI");
    rig.until(SessionState::Idle).await;
    rig.stop().await;
}

async fn copy_goes_both_ways_and_fails_in_every_way(sockets: Sockets) {
    let cluster = one_cluster("copies");
    let rig = Rig::on(&cluster, sockets);
    let client = rig.connect("postgres").await;
    client.batch_execute("CREATE TABLE t(a int, b text)").await.expect("created");
    // tokio-postgres copies through the extended protocol and sends a Sync that the server swallows.
    let sink = client.copy_in::<_, Bytes>("COPY t FROM STDIN").await.expect("copy");
    let mut sink = std::pin::pin!(sink);
    for chunk in 0..100 {
        let lines: String = (0..1000).map(|line| format!("{}\t{}\n", chunk * 1000 + line, "z".repeat(100))).collect();
        sink.send(Bytes::from(lines)).await.expect("sent");
    }
    assert_eq!(sink.finish().await.expect("copied"), 100_000);
    rig.until(SessionState::Idle).await;
    let rows = client.copy_out("COPY t TO STDOUT").await.expect("copy");
    let bytes: usize =
        rows.map(|piece| piece.expect("data").len()).fold(0, |sum, length| async move { sum + length }).await;
    assert!(bytes > 10_000_000);
    rig.until(SessionState::Idle).await;
    drop(client);
    rig.until_no_session().await;

    let mut client = rig.wire("postgres").await;
    // Simple protocol: bad data, the rest of which comes after the error.
    client.send(&query("COPY t FROM STDIN")).await;
    assert_eq!(client.next().await.map(|message| message.tag), Some('G'));
    client.send(&frame(b'd', b"no number\n")).await;
    assert_eq!(client.tags_until_ready().await, "EZI");
    client.send(&[frame(b'd', b"1\tx\n"), frame(b'c', &[])].concat()).await;
    client.send(&query("SELECT 1")).await;
    assert_eq!(client.tags_until_ready().await, "TDCZI");
    rig.until(SessionState::Idle).await;
    // Much of it: the server is done with the statement while the data is still on its way, and nothing answers that.
    client.send(&query("COPY t FROM STDIN")).await;
    assert_eq!(client.next().await.map(|message| message.tag), Some('G'));
    let much = frame(b'd', &vec![b'1'; 1 << 20]).repeat(8);
    client.send(&[frame(b'd', b"no number\n"), much, frame(b'c', &[])].concat()).await;
    assert_eq!(client.tags_until_ready().await, "EZI");
    rig.until(SessionState::Idle).await;
    // Extended protocol, as libpq does it: Sync behind Execute, then bad data, then CopyDone and Sync.
    client.send(&[extended("COPY t FROM STDIN"), sync()].concat()).await;
    for expected in "12G".chars() {
        assert_eq!(client.next().await.map(|message| message.tag), Some(expected));
    }
    client.send(&[frame(b'd', b"no number\n"), frame(b'c', &[]), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "EZI");
    client.send(&query("SELECT 1")).await;
    assert_eq!(client.tags_until_ready().await, "TDCZI");
    rig.until(SessionState::Idle).await;
    // The client gives up.
    client.send(&query("COPY t FROM STDIN")).await;
    assert_eq!(client.next().await.map(|message| message.tag), Some('G'));
    client.send(&frame(b'f', b"changed my mind\0")).await;
    assert_eq!(client.tags_until_ready().await, "EZI");
    rig.until(SessionState::Idle).await;
    rig.stop().await;
}

async fn notifications_reach_an_idle_session(sockets: Sockets) {
    let cluster = one_cluster("notify");
    let rig = Rig::on(&cluster, sockets);
    let mut client = rig.wire("postgres").await;
    client.send(&query("LISTEN news")).await;
    assert_eq!(client.tags_until_ready().await, "CZI");
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("NOTIFY news, 'hello'").await.expect("sent");
    let message = client.next().await.expect("a notification");
    assert_eq!(message.tag, 'A');
    assert!(message.body.windows(5).any(|window| window == b"hello"));
    client.send(&query("SET application_name = 'renamed'")).await;
    assert_eq!(client.tags_until_ready().await, "CSZI");
    assert_eq!(rig.sessions.list()[0].application_name, "renamed");
    rig.stop().await;
}

async fn a_slow_reader_holds_the_server_back_and_gets_everything(sockets: Sockets) {
    let cluster = one_cluster("slow");
    let rig = Rig::on(&cluster, sockets);
    let mut client = rig.wire("postgres").await;
    client.send(&query("SELECT repeat('x', 1000) FROM generate_series(1, 100000)")).await;
    let direct = connect(&cluster, "postgres").await;
    wait_for("the server to wait for its reader", || async {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'";
        text(&direct, waits).await == "1"
    })
    .await;
    let messages = client.until_ready().await;
    assert_eq!(messages.iter().filter(|message| message.tag == 'D').count(), 100_000);
    rig.stop().await;
}

/// What a server does not read yet stays with the client, but for little: a client that sends without a pause would
/// otherwise have sent everything before it looks for an error.
async fn a_slow_server_holds_the_client_back_and_gets_everything(sockets: Sockets) {
    const QUERIES: usize = 32;
    let cluster = one_cluster("slow-server");
    let rig = Rig::on(&cluster, sockets);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("SELECT pg_advisory_lock(1)").await.expect("locked");
    let mut client = rig.wire("postgres").await;
    let (reader, mut writer) = client.stream.into_split();
    let flood = tokio::spawn(async move {
        let large = query(&format!("SELECT length('{}')", "x".repeat(1 << 20)));
        for message in std::iter::once(query("SELECT pg_advisory_xact_lock(1)")).chain(vec![large; QUERIES]) {
            tokio::io::AsyncWriteExt::write_all(&mut writer, &message).await.expect("sent");
        }
        writer
    });
    let sent = || rig.metrics.bytes.with_label_values(&["postgres", "from_client"]).get();
    // Counters are handed over once a second.
    let (mut before, mut unchanged) = (0, 0);
    while unchanged < 3 {
        tokio::time::sleep(Duration::from_millis(1100)).await;
        unchanged = if before > 0 && sent() == before { unchanged + 1 } else { 0 };
        before = sent();
    }
    assert!(before < 1 << 20, "{before} bytes went on to a server that does not read");
    direct.batch_execute("SELECT pg_advisory_unlock(1)").await.expect("unlocked");
    client.stream = reader.reunite(flood.await.expect("everything was sent")).expect("one stream");
    for _ in 0..=QUERIES {
        assert_eq!(client.tags_until_ready().await, "TDCZI");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_handshake_answers_as_postgresql_does() {
    let cluster = one_cluster("handshake");
    let rig = Rig::over(&cluster);
    let request = |code: u32| [8u32.to_be_bytes(), (1234 << 16 | code).to_be_bytes()].concat();
    let mut client = WireClient::connect(rig.port).await;
    for code in [5680, 5679] {
        client.send(&request(code)).await;
        let mut answer = [0; 1];
        tokio::io::AsyncReadExt::read_exact(&mut client.stream, &mut answer).await.expect("an answer");
        assert_eq!(&answer, b"N");
    }
    client.start_version(3 << 16 | 2, &[("user", "postgres"), ("_pq_.newer", "1"), ("application_name", "app")]).await;
    let messages = client.until_ready().await;
    assert_eq!(messages[0].tag, 'v');
    assert_eq!(messages[0].body, b"\0\x03\0\0\0\0\0\x01_pq_.newer\0");
    assert!(tags(&messages).ends_with("KZI"));
    assert_eq!(rig.sessions.list()[0].application_name, "app");
    client.send(&query("SHOW application_name")).await;
    assert_eq!(rows(&client.until_ready().await), ["app"]);
    client.send(&frame(b'X', &[])).await;
    assert_eq!(client.next().await, None);

    for (packet, code) in [
        (20_000u32.to_be_bytes().to_vec(), "08P01"),
        ([8u32.to_be_bytes(), (2u32 << 16).to_be_bytes()].concat(), "0A000"),
        ([&17u32.to_be_bytes()[..], &(3u32 << 16).to_be_bytes(), b"database\0"].concat(), "08P01"),
    ] {
        let mut client = WireClient::connect(rig.port).await;
        client.send(&packet).await;
        assert_eq!(client.next().await.expect("an error").code(), code);
        assert_eq!(client.next().await, None);
    }
    // What a direct connection would have said is said.
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "postgres"), ("database", "nowhere")]).await;
    let messages = client.until_ready().await;
    assert_eq!(messages.last().expect("an error").code(), "3D000");
    // An unknown message ends the session, as it does in PostgreSQL.
    let mut client = rig.wire("postgres").await;
    client.send(&frame(b'!', b"?")).await;
    assert_eq!(client.next().await.expect("an error").code(), "08P01");
    rig.stop().await;
}

async fn a_backend_that_is_ended_says_so_to_its_client(sockets: Sockets) {
    let cluster = one_cluster("ended");
    let rig = Rig::on(&cluster, sockets);
    let direct = connect(&cluster, "postgres").await;
    for sql in ["", "BEGIN"] {
        let mut client = rig.wire("postgres").await;
        client.send(&query(sql)).await;
        client.until_ready().await;
        let pid = rig.sessions.list()[0].backend_pid.expect("has one");
        text(&direct, &format!("SELECT pg_terminate_backend({pid})")).await;
        assert_eq!(client.next().await.expect("an error").code(), "57P01");
        assert_eq!(client.next().await, None);
        rig.until_no_session().await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_connections_pass_and_end_at_a_switch() {
    let cluster = one_cluster("walsender");
    let rig = Rig::over(&cluster);
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "postgres"), ("database", "postgres"), ("replication", "database")]).await;
    client.until_ready().await;
    client.send(&query("IDENTIFY_SYSTEM")).await;
    assert_eq!(client.tags_until_ready().await, "TDCZI");
    let database = rig.database();
    database.fence();
    database.wait_empty().await;
    client.send(&query("IDENTIFY_SYSTEM")).await;
    assert_eq!(client.tags_until_ready().await, "TDCZI", "exempt from admission");
    database.open(ServerRole::Target, pgcutover::switch::Epoch(1));
    assert_eq!(client.next().await.expect("an error").code(), "57P01");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_kept() {
    let cluster = one_cluster("limits");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.limits.max_client_connections = 2;
        config.limits.max_message_bytes = 1000;
    });
    let (mut first, _second) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let mut third = WireClient::connect(rig.port).await;
    third.start(&[("user", "postgres")]).await;
    assert_eq!(third.next().await.expect("an error").code(), "53300");
    drop(third);
    first.send(&query(&"x".repeat(2000))).await;
    assert_eq!(first.next().await.expect("an error").code(), "08P01");
    wait_for("a free place", || async { rig.sessions.list().len() == 1 }).await;
    rig.reload(|config| config.limits.client_login_timeout = Duration::from_millis(300));
    let mut silent = WireClient::connect(rig.port).await;
    assert_eq!(silent.next().await, None, "closed at the login time-out");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_id_that_a_client_is_told_is_that_of_its_backend() {
    let cluster = one_cluster("pid");
    let rig = Rig::over(&cluster);
    let (mut client, mut other) = (rig.wire("postgres").await, rig.wire("postgres").await);
    for client in [&mut client, &mut other] {
        client.send(&query("SELECT pg_backend_pid()")).await;
        let told = client.key.expect("logged in").0;
        assert_eq!(rows(&client.until_ready().await), [told.to_string()]);
    }
    client.send(&query("LISTEN ch")).await;
    client.until_ready().await;
    other.send(&query("NOTIFY ch")).await;
    let notification = client.next().await.expect("a notification");
    assert_eq!((notification.tag, &notification.body[..4]), ('A', &other.key.expect("logged in").0.to_be_bytes()[..]));
    rig.stop().await;
}

/// What must hold whether sockets are served by a ring or polled, as where the kernel has none.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {$(
        mod $name {
            #[tokio::test(flavor = "multi_thread")]
            async fn on_a_ring() {
                super::$name(super::Sockets::Ring).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn polled() {
                super::$name(super::Sockets::Polled).await;
            }
        }
    )*};
}

on_both! {
    queries_go_through_in_every_protocol,
    pipelines_suspended_portals_and_errors_keep_their_order,
    copy_goes_both_ways_and_fails_in_every_way,
    notifications_reach_an_idle_session,
    a_slow_reader_holds_the_server_back_and_gets_everything,
    a_slow_server_holds_the_client_back_and_gets_everything,
    a_backend_that_is_ended_says_so_to_its_client,
}
