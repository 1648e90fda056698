//! Clients that mean harm, or are broken: the proxy serves on, and its memory is bounded.

use std::time::Duration;

use pgcutover::config::{AuthMethod, PoolMode};
use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use pgcutover::proxy::SessionState;
use pgcutover::switch::{Epoch, ServerRole};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::evil_server::{EvilServer, Misdeed, Stage, Then};
use crate::rig::{Rig, server, text};
use crate::support::{PATIENCE, cluster_options, installations, one_cluster, wait_for};
use crate::tls::Authority;
use crate::wire_client::{Message, WireClient, bind, execute, frame, parse, query, rows, sync};

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
    // Half of what was sent: other tests of this process need memory too.
    assert!(resident_bytes() < before + (75 << 20), "{} bytes more", resident_bytes() - before);
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

/// A cluster whose role has a SCRAM verifier.
fn password_cluster(name: &str) -> Cluster {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    Cluster::start(cluster_options(newest, name).auth(ClusterAuth::Scram { password: "super".to_owned() }))
        .unwrap_or_else(|error| panic!("{error}"))
}

/// Memory that the attacks below may cost: each of them sends, or would send, many times as much.
const ROOM_BYTES: u64 = 160 << 20;

#[track_caller]
fn assert_bounded(before: u64, what: &str) {
    let now = resident_bytes();
    assert!(now < before + ROOM_BYTES, "{what}: {} MB more", (now - before) >> 20);
}

/// Whether the proxy closes this connection, with a word or without.
async fn is_closed(client: &mut WireClient, what: &str) {
    while let Some(message) = client.next().await {
        assert!(matches!(message.tag, 'E' | 'N' | 'R' | 'S' | 'K' | 'v'), "{what}: {message:?}");
    }
}

fn startup_packet(parameters: &[u8]) -> Vec<u8> {
    let body = [&(3u32 << 16).to_be_bytes()[..], parameters].concat();
    [&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn half_messages_before_login_end_with_the_login_timeout() {
    let cluster = password_cluster("half");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.auth.method = AuthMethod::Auto;
        config.limits.client_login_timeout = Duration::from_millis(500);
    });
    let whole = startup_packet(b"user\0postgres\0database\0postgres\0\0");
    let ssl_request = [&8u32.to_be_bytes()[..], &80_877_103u32.to_be_bytes()].concat();
    let sasl = frame(b'p', b"SCRAM-SHA-256\0\0\0\0\x10n,,n=,r=abcdefgh");
    let cases: [(&str, Vec<u8>); 9] = [
        ("nothing", Vec::new()),
        ("half a length", whole[..2].to_vec()),
        ("a length", whole[..4].to_vec()),
        ("half a startup packet", whole[..20].to_vec()),
        ("half a cancel request", [&16u32.to_be_bytes()[..], &80_877_102u32.to_be_bytes(), &[0; 3]].concat()),
        ("no password", whole.clone()),
        ("half a password", [&whole[..], &sasl[..7]].concat()),
        ("half an exchange", [&whole[..], &sasl].concat()),
        ("nothing after SSLRequest", ssl_request),
    ];
    let mut clients = Vec::new();
    for (what, bytes) in cases {
        let mut client = WireClient::connect(rig.port).await;
        client.send(&bytes).await;
        clients.push((what, client));
    }
    for (what, mut client) in clients {
        if what == "nothing after SSLRequest" {
            // The one byte that says no.
            client.stream.read_exact(&mut [0; 1]).await.expect("an answer");
        }
        is_closed(&mut client, what).await;
    }
    rig.until_no_session().await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_packets_that_cannot_be_are_refused_at_once() {
    let cluster = one_cluster("startup");
    let rig = Rig::over(&cluster);
    for length in [0u32, 3, 4, 7, 10_001, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let mut client = WireClient::connect(rig.port).await;
        client.send(&length.to_be_bytes()).await;
        assert_eq!(client.next().await.expect("an error").code(), "08P01", "{length:#x}");
        assert_eq!(client.next().await, None);
    }
    // As long as a packet may be, and never an end in it; then a client that goes on and on.
    let pairs = b"a\0b\0".repeat(2498);
    for parameters in [pairs.clone(), b"user\0ann".to_vec(), b"database\0shop\0\0".to_vec(), vec![0xff; 9000]] {
        let mut client = WireClient::connect(rig.port).await;
        client.send(&startup_packet(&parameters)).await;
        let error = client.next().await.expect("an error");
        assert!(matches!(error.code().as_str(), "08P01" | "28000"), "{error:?}");
    }
    let mut client = WireClient::connect(rig.port).await;
    client.send(&10_000u32.to_be_bytes()).await;
    let before = resident_bytes();
    // It stops reading, or has closed already: both are right.
    let endless = async { while client.stream.write_all(&pairs).await.is_ok() {} };
    let _stopped = tokio::time::timeout(Duration::from_secs(2), endless).await;
    assert_bounded(before, "endless startup parameters");
    assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_tags_end_the_session_and_messages_inside_a_copy_do_not_confuse_it() {
    let cluster = one_cluster("tags");
    let rig = Rig::over(&cluster);
    for tag in (0..=255u8).filter(|tag| !b"BCDEFHPQSXcdf".contains(tag)) {
        let mut client = rig.wire("postgres").await;
        client.send(&frame(tag, b"anything\0")).await;
        assert_eq!(client.next().await.expect("an error").code(), "08P01", "{tag:#x}");
        assert_eq!(client.next().await, None, "{tag:#x}");
    }
    rig.until_no_session().await;
    let setup = rig.connect("postgres").await;
    setup.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    drop(setup);
    for inside in [query("SELECT 1"), parse("s", "SELECT 1"), bind("s"), frame(b'F', &[0; 8]), frame(b'C', b"Ss\0")] {
        let mut client = rig.wire("postgres").await;
        client.send(&query("COPY t FROM STDIN")).await;
        assert_eq!(client.next().await.expect("an answer").tag, 'G');
        client.send(&[frame(b'd', b"1\n"), inside, frame(b'c', &[]), sync(), query("SELECT 2")].concat()).await;
        let messages = client.until_ready().await;
        assert!(messages.iter().any(|message| message.tag == 'E'), "the server refuses it: {messages:?}");
        drop(client);
        rig.until_no_session().await;
        assert_eq!(rig.database().inside(), 0);
    }
    assert_eq!(text(&rig.connect("postgres").await, "SELECT count(*) FROM t").await, "0");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_whose_content_cannot_be_are_refused_and_nobody_else_is_hurt() {
    let cluster = one_cluster("content");
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let rig = Rig::start(server(&cluster), server(&cluster), |config| config.pool.mode = mode);
        for tag in *b"PBDECF" {
            for body in [&b""[..], b"x", b"S", b"abc", b"Sabc", b"S\0extra", b"\0\0", b"s\0\0\xff", b"\0s\0\xff\xff"] {
                let mut client = rig.wire("postgres").await;
                client.send(&[frame(tag, body), sync()].concat()).await;
                let answers = client.until_ready().await;
                let first =
                    answers.first().unwrap_or_else(|| panic!("{mode:?} {} {body:?}: no answer", char::from(tag)));
                assert_eq!(first.tag, 'E', "{mode:?} {} {body:?}: {first:?}", char::from(tag));
            }
        }
        assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1");
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_cancels_and_of_tls_handshakes_that_never_end_pass() {
    let cluster = one_cluster("floods");
    let authority = Authority::new();
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.listen.tls = Some(authority.server());
    });
    let before = resident_bytes();
    let mut victim = rig.wire("postgres").await;
    victim.send(&query("SELECT pg_sleep(1)")).await;
    for number in 0..1000u32 {
        let mut other = WireClient::connect(rig.port).await;
        let key = [80_877_102, number.wrapping_mul(0x9E37_79B9), number.wrapping_mul(0x85EB_CA6B)];
        let packet: Vec<u8> = [16].iter().chain(&key).flat_map(|word: &u32| word.to_be_bytes()).collect();
        other.send(&packet).await;
        assert_eq!(other.next().await, None);
    }
    assert_eq!(victim.tags_until_ready().await, "TDCZI", "nobody was cancelled");
    // Long enough for who means well on a busy machine.
    rig.reload(|config| config.limits.client_login_timeout = Duration::from_secs(10));
    let mut half_open = Vec::new();
    for number in 0..400 {
        let mut client = WireClient::connect(rig.port).await;
        if number % 2 == 0 {
            client.send(&[&8u32.to_be_bytes()[..], &80_877_103u32.to_be_bytes()].concat()).await;
            client.stream.read_exact(&mut [0; 1]).await.expect("an answer");
        }
        // A ClientHello that announces 16 kB and never comes.
        client.send(&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f]).await;
        half_open.push(client);
    }
    assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1", "they hold nobody up");
    assert_bounded(before, "half-open TLS handshakes");
    for client in &mut half_open {
        let mut rest = Vec::new();
        // Closed by the login time-out, with or without a TLS alert.
        let closed = tokio::time::timeout(PATIENCE, client.stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "the login time-out ends it");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_is_never_read_stops_its_client_and_fills_no_memory() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        flood_in(mode).await;
    }
}

async fn flood_in(mode: PoolMode) {
    let cluster = one_cluster("pipeline");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.pool.mode = mode);
    let before = resident_bytes();
    let attacks = [
        ("large answers", query("SELECT repeat('x', 100000)")),
        ("small answers", query("")),
        ("Syncs alone", sync()),
        ("extended, never synchronised", [parse("", "SELECT 1"), bind(""), execute(0)].concat()),
    ];
    for (what, piece) in attacks {
        let mut greedy = rig.wire("postgres").await;
        let block = piece.repeat((1 << 20) / piece.len());
        let mut sent = 0u64;
        let flood = async {
            while sent < 1 << 30 && greedy.stream.write_all(&block).await.is_ok() {
                sent += block.len() as u64;
            }
        };
        let _stopped = tokio::time::timeout(Duration::from_secs(3), flood).await;
        assert!(sent < 1 << 30, "{what}: the proxy has read a gigabyte that nobody took from it");
        assert_bounded(before, what);
        assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1", "{what}: another is served");
        drop(greedy);
        rig.until_no_session().await;
    }
    // Thrown away as fast as it comes: outside of a COPY it means nothing.
    let mut client = rig.wire("postgres").await;
    let block = frame(b'd', &[b'x'; 1 << 20]);
    for _ in 0..256 {
        client.send(&block).await;
    }
    client.send(&query("SELECT 7")).await;
    assert_eq!(rows(&client.until_ready().await), ["7"]);
    assert_bounded(before, "CopyData outside of a COPY");
    drop(client);
    rig.stop().await;
}

/// A message of `tag` that announces 2 GB, or 1 GB, less a little.
fn announced(tag: u8, length: u32) -> Vec<u8> {
    [&[tag][..], &length.to_be_bytes()].concat()
}

fn notices(_: u64) -> Vec<u8> {
    frame(b'N', b"SNOTICE\0C00000\0Mhello\0\0").repeat(200)
}

fn parameters(number: u64) -> Vec<u8> {
    let one = |at: u64| frame(b'S', format!("app.p{}\0{}\0", number * 20 + at, "x".repeat(1000)).as_bytes());
    (0..20).flat_map(one).collect()
}

fn zeros(_: u64) -> Vec<u8> {
    vec![0; 64 << 10]
}

fn misdeeds() -> Vec<Misdeed> {
    use Stage::{Login, Statement};
    use Then::{Close, Endless, Silence};
    let misdeed = |database, stage, says: &[u8], then| Misdeed { database, stage, says: says.to_vec(), then };
    let rows = announced(b'D', 0x3fff_0000);
    vec![
        misdeed("login_closed", Login, b"", Close),
        misdeed("login_silence", Login, b"", Silence),
        misdeed("login_http", Login, b"HTTP/1.1 400 Bad Request\r\n\r\n", Close),
        misdeed("login_half", Login, b"R\0\0\0", Close),
        misdeed("login_half_silence", Login, b"R\0\0\0\x08\0", Silence),
        misdeed("login_length_0", Login, &announced(b'R', 0), Silence),
        misdeed("login_length_3", Login, &announced(b'R', 3), Silence),
        misdeed("login_negative", Login, &announced(b'R', 0x8000_0000), Silence),
        misdeed("login_2gb", Login, &announced(b'R', 0x7fff_ffff), Endless(zeros)),
        misdeed("login_1gb", Login, &announced(b'N', 0x3fff_0000), Endless(zeros)),
        misdeed("login_unknown_request", Login, &frame(b'R', &99u32.to_be_bytes()), Silence),
        misdeed("login_empty_request", Login, &frame(b'R', b""), Silence),
        misdeed("login_notices", Login, b"", Endless(notices)),
        misdeed("login_parameters", Login, &frame(b'R', &[0; 4]), Endless(parameters)),
        misdeed("login_row", Login, &[frame(b'R', &[0; 4]), frame(b'D', b"\0\0")].concat(), Silence),
        misdeed("statement_closed", Statement, b"", Close),
        misdeed("statement_half", Statement, b"T\0\0\0\x40abc", Close),
        misdeed("statement_length_0", Statement, &announced(b'C', 0), Silence),
        misdeed("statement_length_3", Statement, &announced(b'C', 3), Silence),
        misdeed("statement_negative", Statement, &announced(b'C', u32::MAX), Silence),
        misdeed("statement_2gb", Statement, &announced(b'D', 0x7fff_ffff), Endless(zeros)),
        misdeed("statement_1gb", Statement, &rows, Endless(zeros)),
        misdeed("statement_notices", Statement, b"", Endless(notices)),
        misdeed("statement_parameters", Statement, b"", Endless(parameters)),
        misdeed("statement_ready_too_long", Statement, &frame(b'Z', &[b'I'; 100]), Close),
        misdeed("statement_ready_status", Statement, &frame(b'Z', b"?"), Close),
        misdeed(
            "statement_ready_twice",
            Statement,
            &[frame(b'C', b"X\0"), frame(b'Z', b"I").repeat(9)].concat(),
            Close,
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_break_the_protocol_hurt_only_their_own_sessions() {
    let cluster = one_cluster("evil");
    let real = server(&cluster);
    let evil = EvilServer::start(&real, misdeeds()).await;
    // Who is silent at the login is soon given up at the source; all others are led to the target, which has time.
    let rig = Rig::start(evil.config(&real, Duration::from_secs(1)), evil.config(&real, PATIENCE), |_| {});
    let others = misdeeds().into_iter().filter(|misdeed| misdeed.stage != Stage::Login).map(|misdeed| misdeed.database);
    for database in others.chain(["postgres"]) {
        rig.board.database(database).open(ServerRole::Target, Epoch(1));
    }
    let before = resident_bytes();
    for misdeed in misdeeds() {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", "postgres"), ("database", misdeed.database)]).await;
        if misdeed.stage == Stage::Login {
            let messages = client.until_ready().await;
            assert!(messages.iter().all(|message| message.tag != 'Z'), "{}: let in", misdeed.database);
            assert_eq!(messages.last().map(Message::code).as_deref(), Some("08001"), "{}", misdeed.database);
        } else {
            assert_eq!(client.until_ready().await.last().map(|message| message.tag), Some('Z'));
            client.send(&query("SELECT 1")).await;
            if let Then::Endless(_) = misdeed.then {
                // The client reads nothing: neither side's endless talk may pile up in between.
                let sent = || evil.sent.load(std::sync::atomic::Ordering::Relaxed);
                wait_for("the server to be held back", || async {
                    let before = sent();
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    sent() == before
                })
                .await;
            } else if let Then::Close = misdeed.then {
                while client.next().await.is_some() {}
            }
        }
        assert_bounded(before, misdeed.database);
        assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1", "{}", misdeed.database);
        drop(client);
        evil.end_misdeeds();
        rig.until_no_session().await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_talk_of_a_server_passes_through_without_piling_up() {
    let cluster = one_cluster("talk");
    let real = server(&cluster);
    let evil = EvilServer::start(&real, misdeeds()).await;
    let rig = Rig::start(evil.config(&real, PATIENCE), evil.config(&real, PATIENCE), |_| {});
    let before = resident_bytes();
    for database in ["statement_notices", "statement_parameters", "statement_1gb"] {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", "postgres"), ("database", database)]).await;
        client.until_ready().await;
        client.send(&query("SELECT 1")).await;
        let mut block = vec![0; 1 << 20];
        for _ in 0..256 {
            client.stream.read_exact(&mut block).await.expect("as the server goes on");
        }
        assert_bounded(before, database);
    }
    assert_eq!(text(&rig.connect("postgres").await, "SELECT 1").await, "1");
    evil.end_misdeeds();
    rig.stop().await;
}
