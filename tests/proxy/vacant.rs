//! Session mode: a connection that its client has left is the next client's only if that one cannot tell.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgcutover::config::{self, Config};
use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::SessionState;
use pgcutover::switch::{Epoch, PrepareWindow, ServerRole};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::places::{POSTGRES, WHERE_AM_I, two_places};
use crate::rig::{Rig, server, text};
use crate::support::{connect, one_cluster, two_clusters, wait_for};
use crate::wire_client::{WireClient, extended, frame, parse, query, rows, sync, tags};

/// Longer than a test takes.
fn patient(config: &mut Config) {
    config.pool.server_linger = Duration::from_secs(600);
}

fn over(cluster: &Cluster) -> Rig {
    Rig::start(server(cluster), server(cluster), patient)
}

async fn first_row(client: &mut WireClient, sql: &str) -> String {
    client.send(&query(sql)).await;
    let answer = client.until_ready().await;
    rows(&answer).first().cloned().unwrap_or_else(|| panic!("{sql}: {}", tags(&answer)))
}

async fn pid(client: &mut WireClient) -> String {
    first_row(client, "SELECT pg_backend_pid()").await
}

/// Says Terminate and waits until the proxy is done with the session, and there is none any more.
async fn leave(rig: &Rig, client: WireClient) {
    leave_one(rig, client).await;
    assert_eq!(rig.sessions.list().len(), 0);
}

/// The same, where others stay.
async fn leave_one(rig: &Rig, mut client: WireClient) {
    let staying = rig.sessions.list().len() - 1;
    client.send(&frame(b'X', &[])).await;
    // A notification may still have been on its way to it.
    while let Some(message) = client.next().await {
        assert_eq!(message.tag, 'A', "{message:?}");
    }
    wait_for("the session to end", || async { rig.sessions.list().len() == staying }).await;
}

async fn with(rig: &Rig, parameters: &[(&str, &str)]) -> WireClient {
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[&[("user", POSTGRES), ("database", POSTGRES)], parameters].concat()).await;
    let answer = client.tags_until_ready().await;
    assert!(answer.ends_with("ZI"), "{answer}");
    client
}

/// What a session can find out about itself.
const STATE: &str = "SELECT pg_catalog.concat_ws(E'\\n', session_user, current_user, \
    (SELECT string_agg(name || '=' || setting || '/' || source || '/' || coalesce(reset_val, ''), E'\\n' ORDER BY name) \
     FROM pg_catalog.pg_settings WHERE name NOT LIKE '%collect_normalized%'), \
    (SELECT string_agg(name, ',') FROM pg_catalog.pg_prepared_statements), \
    (SELECT string_agg(name, ',') FROM pg_catalog.pg_cursors WHERE is_holdable), \
    (SELECT string_agg(channel, ',') FROM pg_catalog.pg_listening_channels() channel), \
    (SELECT string_agg(relname, ',') FROM pg_catalog.pg_class WHERE relpersistence = 't'), \
    (SELECT count(*) FROM pg_catalog.pg_locks WHERE locktype = 'advisory'))";

/// Before the minor releases of November 2024, DISCARD ALL took it away.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_the_login_gave_is_the_next_clients_too() {
    let cluster = one_cluster("login_role");
    let made = "CREATE ROLE helper; CREATE ROLE ann LOGIN IN ROLE helper; ALTER ROLE ann SET role = 'helper'";
    connect(&cluster, POSTGRES).await.batch_execute(made).await.expect("made");
    let rig = over(&cluster);
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", "ann"), ("database", POSTGRES)]).await;
        assert!(client.tags_until_ready().await.ends_with("ZI"));
        assert_eq!(first_row(&mut client, "SELECT current_user").await, "helper");
        seen.push(pid(&mut client).await);
        leave(&rig, client).await;
    }
    assert_eq!(seen[0], seen[1], "one connection");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_client_before_is_there() {
    let cluster = one_cluster("vacant");
    let direct = connect(&cluster, POSTGRES).await;
    direct.batch_execute("CREATE ROLE helper; CREATE SEQUENCE numbers").await.expect("made");
    let rig = over(&cluster);
    let name = [("application_name", "shop"), ("DateStyle", "German")];
    let mut first = with(&rig, &name).await;
    let fresh = first_row(&mut first, STATE).await;
    let own = pid(&mut first).await;
    first.send(&parse("kept", "SELECT 'kept'")).await;
    first.send(&sync()).await;
    first.until_ready().await;
    for sql in [
        "SET work_mem = '123MB'",
        "SET application_name = 'another'",
        "SET TimeZone = 'Asia/Tokyo'",
        "SET search_path = public",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE, ISOLATION LEVEL SERIALIZABLE",
        "PREPARE by_sql AS SELECT 1",
        "LISTEN news",
        "SELECT pg_advisory_lock(7), pg_advisory_lock_shared(8, 9)",
        "DECLARE held CURSOR WITH HOLD FOR SELECT 1",
        "SELECT nextval('numbers')",
        "SET ROLE helper",
        "SET SESSION AUTHORIZATION helper",
    ] {
        first.send(&query(sql)).await;
        let answer = first.tags_until_ready().await;
        assert!(answer.ends_with("ZI") && !answer.contains('E'), "{sql}: {answer}");
    }
    assert_ne!(first_row(&mut first, STATE).await, fresh);
    // Told to the one who listened, or to nobody. (A connection on which something arrives while it is left is closed.)
    direct.batch_execute("NOTIFY news, 'late'").await.expect("told");
    assert_eq!(first.next().await.expect("a notification").tag, 'A');
    leave(&rig, first).await;
    direct.batch_execute("NOTIFY news, 'too late'").await.expect("told");
    let mut second = with(&rig, &name).await;
    assert_eq!(pid(&mut second).await, own, "it is the same connection");
    assert_eq!(first_row(&mut second, STATE).await, fresh);
    second.send(&query("SELECT currval('numbers')")).await;
    assert!(second.until_ready().await.iter().any(|message| message.tag == 'E' && message.code() == "55000"));
    second.send(&query("RESET ALL")).await;
    assert_eq!(second.tags_until_ready().await, "CZI", "what it began with is what it asked for");
    assert_eq!(text(&direct, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").await, "0");
    rig.stop().await;
}

/// A temporary schema stays when all in it is gone, and a custom setting is empty from then on, not unknown.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_reset_takes_off_is_not_handed_on() {
    let cluster = one_cluster("vacant_kept");
    let rig = over(&cluster);
    for sql in [
        "CREATE TEMP TABLE basket(a int)",
        "SET search_path = pg_temp; SELECT current_schema()",
        "SET app.tenant = 'seven'",
        "BEGIN; SELECT set_config('app.tenant', 'seven', true); COMMIT",
    ] {
        let mut first = with(&rig, &[]).await;
        let own = pid(&mut first).await;
        first.send(&query(sql)).await;
        assert!(first.tags_until_ready().await.ends_with("ZI"), "{sql}");
        leave(&rig, first).await;
        let mut second = with(&rig, &[]).await;
        assert_ne!(pid(&mut second).await, own, "after {sql}");
        let seen = "SELECT pg_my_temp_schema() || coalesce(current_setting('app.tenant', true), ' unknown')";
        assert_eq!(first_row(&mut second, seen).await, "0 unknown", "after {sql}");
        leave(&rig, second).await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_client_that_would_have_got_the_same_gets_it() {
    let cluster = one_cluster("vacantsame");
    let direct = connect(&cluster, POSTGRES).await;
    direct.batch_execute("CREATE ROLE other LOGIN").await.expect("made");
    direct.batch_execute("CREATE DATABASE elsewhere").await.expect("made");
    let rig = over(&cluster);
    let told = |answer: &[crate::wire_client::Message]| -> Vec<Vec<u8>> {
        answer.iter().filter(|message| message.tag == 'S').map(|message| message.body.clone()).collect()
    };
    let start = async |user: &str, database: &str, parameters: &[(&str, &str)]| {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[&[("user", user), ("database", database)], parameters].concat()).await;
        let answer = client.until_ready().await;
        (told(&answer), client)
    };
    let (first_told, mut first) = start(POSTGRES, POSTGRES, &[("application_name", "a")]).await;
    let own = pid(&mut first).await;
    leave(&rig, first).await;
    for (user, database, parameters) in [
        ("other", POSTGRES, &[("application_name", "a")][..]),
        (POSTGRES, "elsewhere", &[("application_name", "a")]),
        (POSTGRES, POSTGRES, &[("application_name", "b")]),
        (POSTGRES, POSTGRES, &[("application_name", "a"), ("options", "-c geqo=off")]),
        (POSTGRES, POSTGRES, &[]),
    ] {
        let (_, mut client) = start(user, database, parameters).await;
        assert_ne!(pid(&mut client).await, own, "{user} {database} {parameters:?}");
        drop(client);
    }
    rig.until_no_session().await;
    let (second_told, mut second) = start(POSTGRES, POSTGRES, &[("application_name", "a")]).await;
    assert_eq!(pid(&mut second).await, own);
    assert_eq!(second_told, first_told, "it is told what a new login is told");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_in_the_middle_of_something_is_nobodys() {
    let cluster = one_cluster("vacantbusy");
    let rig = over(&cluster);
    for unfinished in [
        query("BEGIN"),
        query("BEGIN; SELECT 1/0"),
        query("SELECT pg_sleep(0.3)"),
        extended("SELECT 1"),
        query("COPY (SELECT 1) TO STDOUT; BEGIN"),
        query("CREATE TEMP TABLE t(a int); COPY t FROM STDIN"),
        // A frame that is cut.
        query("SELECT 1")[..7].to_vec(),
    ] {
        let mut client = rig.wire(POSTGRES).await;
        let own = pid(&mut client).await;
        client.send(&unfinished).await;
        if unfinished[0] == b'Q' && unfinished.len() > 7 {
            wait_for("the server to have it", || async {
                rig.sessions.list().iter().any(|one| one.state == SessionState::Active)
                    || unfinished.starts_with(&query("SELECT pg_sleep(0.3)")[..8])
            })
            .await;
        }
        drop(client);
        rig.until_no_session().await;
        let mut next = rig.wire(POSTGRES).await;
        let is_cut_before_the_server = unfinished.len() == 7;
        assert_eq!(pid(&mut next).await == own, is_cut_before_the_server, "{unfinished:?}");
        assert_eq!(first_row(&mut next, "SELECT count(*) FROM pg_class WHERE relpersistence = 't'").await, "0");
        // So that the next round begins with a new one.
        next.send(&query("BEGIN")).await;
        next.until_ready().await;
        drop(next);
        rig.until_no_session().await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_leaves_none_of_the_old_server() {
    let (source, target) = two_places().await;
    let rig = Rig::start(server(&source), server(&target), patient);
    let database = rig.database();
    let waiting = || rig.sessions.idle_backends().iter().map(|one| one.server).collect::<Vec<_>>();
    let mut early = rig.wire(POSTGRES).await;
    let mut client = rig.wire(POSTGRES).await;
    let kept = pid(&mut client).await;
    client.send(&frame(b'X', &[])).await;
    wait_for("one to wait", || async { waiting() == [ServerRole::Source] }).await;
    assert!(
        rig.sessions.backend_pids(ServerRole::Source, POSTGRES).contains(&kept.parse().expect("a number")),
        "a cutover knows it as ours"
    );
    // While a fence stands, a login is given what it would have had before; a connection that was given nothing is
    // not the same.
    let earlier =
        PrepareWindow { epoch: Epoch(1), earlier_read_only: "off".to_owned(), earlier_of_roles: Default::default() };
    database.set_prepare_window(Some((ServerRole::Source, earlier)));
    let mut within = rig.wire(POSTGRES).await;
    let given = pid(&mut within).await;
    assert_ne!(given, kept);
    leave_one(&rig, within).await;
    assert_eq!(waiting().len(), 2);
    let mut within = rig.wire(POSTGRES).await;
    assert_eq!(pid(&mut within).await, given, "both were given the same");
    database.set_prepare_window(None);
    leave_one(&rig, within).await;
    let mut after = rig.wire(POSTGRES).await;
    assert_eq!(pid(&mut after).await, kept, "neither was given anything");
    leave_one(&rig, after).await;
    assert_eq!(waiting().len(), 2);
    database.fence();
    // Under the fence nothing is done on the old server any more: who leaves now leaves nothing.
    drop(early.stream);
    rig.until_no_session().await;
    assert_eq!(waiting().len(), 2);
    early = WireClient::connect(rig.port).await;
    early.start(&[("user", POSTGRES), ("database", POSTGRES)]).await;
    rig.until(SessionState::Login).await;
    database.open(ServerRole::Target, Epoch(1));
    early.until_ready().await;
    assert_eq!(first_row(&mut early, WHERE_AM_I).await, "target");
    wait_for("the old one to be closed", || async { waiting().is_empty() }).await;
    let count = "SELECT count(*) FROM pg_stat_activity WHERE pid = ";
    let direct = connect(&source, POSTGRES).await;
    wait_for("its end", || async { text(&direct, &format!("{count}{kept}")).await == "0" }).await;
    leave(&rig, early).await;
    // And back: what waited at the target before is not what waits there later.
    assert_eq!(waiting(), [ServerRole::Target]);
    database.fence();
    database.open(ServerRole::Source, Epoch(2));
    let mut again = rig.wire(POSTGRES).await;
    assert_eq!(first_row(&mut again, WHERE_AM_I).await, "source");
    wait_for("the old one to be closed", || async { waiting().is_empty() }).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_has_moved_leaves_nothing() {
    let (source, target) = two_clusters();
    let rig = Rig::start(server(&source), server(&target), patient);
    let mut client = rig.wire(POSTGRES).await;
    first_row(&mut client, "SELECT 1").await;
    rig.database().fence();
    rig.database().open(ServerRole::Target, Epoch(1));
    first_row(&mut client, "SELECT 1").await;
    leave(&rig, client).await;
    assert_eq!(rig.sessions.idle_backends(), []);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn they_wait_no_longer_than_configured_and_make_room_when_the_server_is_full() {
    let cluster = one_cluster("vacantroom");
    let direct = connect(&cluster, POSTGRES).await;
    direct.batch_execute("CREATE ROLE few LOGIN NOSUPERUSER CONNECTION LIMIT 2").await.expect("made");
    direct.batch_execute("CREATE DATABASE shut_soon").await.expect("made");
    let rig = over(&cluster);
    let waiting = || rig.sessions.idle_backends().len();
    let as_few = async |name: &str| {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", "few"), ("database", POSTGRES), ("application_name", name)]).await;
        (client.tags_until_ready().await, client)
    };
    let (_, first) = as_few("a").await;
    let (_, second) = as_few("b").await;
    drop((first, second));
    wait_for("both to wait", || async { waiting() == 2 }).await;
    let (answer, third) = as_few("c").await;
    assert!(answer.ends_with("ZI"), "{answer}");
    assert_eq!(waiting(), 0);
    drop(third);
    rig.stop().await;
    // No more than so many.
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        patient(config);
        config.pool.default_pool_size = 2;
    });
    let clients = [rig.wire("shut_soon").await, rig.wire("shut_soon").await, rig.wire("shut_soon").await];
    drop(clients);
    rig.until_no_session().await;
    // One that is being closed is listed until it has ended.
    wait_for("the third to be closed", || async { rig.sessions.idle_backends().len() == 2 }).await;
    rig.stop().await;
    // And each only for a while: PostgreSQL waits for them too, though not for ever.
    let rig =
        Rig::start(server(&cluster), server(&cluster), |config| config.pool.server_linger = Duration::from_secs(2));
    let client = rig.wire("shut_soon").await;
    drop(client);
    wait_for("it to be free", || async { direct.batch_execute("DROP DATABASE shut_soon").await.is_ok() }).await;
    rig.stop().await;
    // Not at all.
    for change in [
        |pool: &mut config::Pool| pool.server_linger = Duration::ZERO,
        |pool: &mut config::Pool| {
            pool.server_reset_query.clear();
        },
    ] {
        let rig = Rig::start(server(&cluster), server(&cluster), |config| {
            patient(config);
            change(&mut config.pool);
        });
        let client = rig.wire(POSTGRES).await;
        leave(&rig, client).await;
        assert_eq!(rig.sessions.idle_backends(), []);
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_has_ended_is_not_given_to_anybody() {
    let cluster = one_cluster("vacantended");
    let direct = connect(&cluster, POSTGRES).await;
    let rig = over(&cluster);
    let mut client = rig.wire(POSTGRES).await;
    let own = pid(&mut client).await;
    leave(&rig, client).await;
    assert_eq!(text(&direct, &format!("SELECT pg_terminate_backend({own})")).await, "t");
    let count = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {own}");
    wait_for("its end", || async { text(&direct, &count).await == "0" }).await;
    let mut next = rig.wire(POSTGRES).await;
    assert_ne!(pid(&mut next).await, own);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_closes_them() {
    let cluster = one_cluster("vacantretired");
    let rig = over(&cluster);
    let mut early = rig.wire(POSTGRES).await;
    first_row(&mut early, "SELECT 1").await;
    let client = rig.wire(POSTGRES).await;
    drop(client);
    wait_for("one to wait", || async { rig.sessions.idle_backends().len() == 1 }).await;
    rig.sessions.retire(POSTGRES);
    wait_for("it to be closed", || async { rig.sessions.idle_backends().is_empty() }).await;
    // Opened before, left afterwards.
    leave(&rig, early).await;
    wait_for("that one to be closed, too", || async { rig.sessions.idle_backends().is_empty() }).await;
    let late = rig.wire(POSTGRES).await;
    leave(&rig, late).await;
    assert_eq!(rig.sessions.idle_backends().len(), 1);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_custom_setting_that_a_function_has_made_ends_the_connection() {
    let cluster = one_cluster("vacantcustom");
    let direct = connect(&cluster, POSTGRES).await;
    let make = "CREATE FUNCTION set_tenant(text) RETURNS text LANGUAGE plpgsql AS \
                $$ BEGIN RETURN set_config('app.tenant', $1, false); END $$; \
                CREATE FUNCTION of_login() RETURNS text LANGUAGE sql AS $$ SELECT current_setting('app.shop') $$; \
                ALTER DATABASE postgres SET app.shop = 'one'";
    direct.batch_execute(make).await.expect("made");
    let rig = over(&cluster);
    let unknown = "SELECT coalesce(current_setting('app.tenant', true), 'unknown')";
    let mut client = rig.wire(POSTGRES).await;
    let own = pid(&mut client).await;
    leave(&rig, client).await;
    // What every login has is no trace.
    let mut client = rig.wire(POSTGRES).await;
    assert_eq!(pid(&mut client).await, own);
    assert_eq!(first_row(&mut client, "SELECT of_login()").await, "one");
    assert_eq!(first_row(&mut client, unknown).await, "unknown");
    assert_eq!(first_row(&mut client, "SELECT set_tenant('7')").await, "7");
    leave(&rig, client).await;
    let mut client = rig.wire(POSTGRES).await;
    assert_ne!(pid(&mut client).await, own);
    assert_eq!(first_row(&mut client, unknown).await, "unknown");
    // Nor is one kept on which a name was computed.
    let own = pid(&mut client).await;
    first_row(&mut client, "SELECT set_config('app.' || 'other', '7', false)").await;
    leave(&rig, client).await;
    let mut client = rig.wire(POSTGRES).await;
    assert_ne!(pid(&mut client).await, own);
    rig.stop().await;
}

/// What a scripted server does when it is told to wipe a connection.
#[derive(Clone)]
struct Wiping {
    says: Vec<u8>,
    then: Then,
}

#[derive(Clone, Copy, PartialEq)]
enum Then {
    Go,
    Close,
    Silence,
}

/// Answers every query with the number of the connection; DISCARD ALL as the script says, the last line for ever.
async fn scripted(script: Arc<Mutex<VecDeque<Wiping>>>) -> config::Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        let mut number = 0;
        while let Ok((stream, _)) = listener.accept().await {
            number += 1;
            tokio::spawn(serve(stream, number, script.clone()));
        }
    });
    config::Server::new("127.0.0.1", port, POSTGRES)
}

fn done() -> Vec<u8> {
    frame(b'C', b"DISCARD ALL\0")
}

fn ready(status: u8) -> Vec<u8> {
    frame(b'Z', &[status])
}

/// What the proxy's own session asks in the extended protocol: for its pid, and for names, of which there are none.
fn extended_answer(tag: u8, body: &[u8], asks_pid: &mut bool) -> Vec<u8> {
    match tag {
        b'P' => {
            *asks_pid = body.windows(14).any(|part| part == b"pg_backend_pid");
            frame(b'1', b"")
        }
        b'D' => {
            let oid: u8 = if *asks_pid { 23 } else { 25 };
            let column = [&b"x\0"[..], &[0; 6], &[0, 0, 0, oid, 0, 4, 0xff, 0xff, 0xff, 0xff, 0, 0]].concat();
            [frame(b't', &[0, 0]), frame(b'T', &[&[0, 1][..], &column].concat())].concat()
        }
        b'B' => frame(b'2', b""),
        b'E' if *asks_pid => [frame(b'D', &[0, 1, 0, 0, 0, 4, 0, 0, 0, 7]), frame(b'C', b"SELECT 1\0")].concat(),
        b'E' => frame(b'C', b"SELECT 0\0"),
        b'C' => frame(b'3', b""),
        b'S' => ready(b'I'),
        _ => Vec::new(),
    }
}

async fn serve(mut stream: TcpStream, number: i32, script: Arc<Mutex<VecDeque<Wiping>>>) -> std::io::Result<()> {
    let packet = async |stream: &mut TcpStream| {
        let mut length = [0; 4];
        stream.read_exact(&mut length).await?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
        stream.read_exact(&mut body).await.map(|_| body)
    };
    while packet(&mut stream).await?[..4] != (3u32 << 16).to_be_bytes() {
        stream.write_all(b"N").await?;
    }
    let mut hello = frame(b'R', &[0; 4]);
    for (name, value) in [("server_version", "15.1"), ("is_superuser", "on")] {
        hello.extend(frame(b'S', format!("{name}\0{value}\0").as_bytes()));
    }
    hello.extend(frame(b'K', &[number.to_be_bytes(), [7; 4]].concat()));
    hello.extend(ready(b'I'));
    stream.write_all(&hello).await?;
    let mut asks_pid = false;
    loop {
        let tag = stream.read_u8().await?;
        let body = packet(&mut stream).await?;
        if tag == b'X' {
            return Ok(());
        }
        if tag != b'Q' {
            stream.write_all(&extended_answer(tag, &body, &mut asks_pid)).await?;
            continue;
        }
        let is_of_proxy = body.windows(14).any(|part| part == b"my_temp_schema");
        let text = if is_of_proxy { "0".to_owned() } else { number.to_string() };
        let row = [&[0, 1][..], &(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
        let mut answer = [frame(b'D', &row), frame(b'C', b"SELECT 1\0"), ready(b'I')].concat();
        let mut then = Then::Go;
        if body == b"DISCARD ALL\0" {
            let mut script = script.lock().expect("lives");
            let line = if script.len() > 1 { script.pop_front() } else { script.front().cloned() };
            let line = line.expect("a line");
            (answer, then) = (line.says, line.then);
        }
        stream.write_all(&answer).await?;
        match then {
            Then::Go => {}
            Then::Close => return Ok(()),
            Then::Silence => std::future::pending().await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_is_not_what_it_should_be_ends_the_connection() {
    let good = Wiping { says: [done(), ready(b'I')].concat(), then: Then::Go };
    let error = frame(b'E', b"SERROR\0C57014\0Mcancelled\0\0");
    let superuser = frame(b'S', b"is_superuser\0off\0");
    let stray = frame(b'D', &[0, 0]);
    let notice = frame(b'N', b"SNOTICE\0C00000\0Mall good\0\0");
    let notification = frame(b'A', b"\0\0\0\x01news\0late\0");
    let script = Arc::new(Mutex::new(VecDeque::from([good.clone()])));
    let rig_server = scripted(script.clone()).await;
    let rig = Rig::start(rig_server.clone(), rig_server, patient);
    for (what, says, then, is_kept) in [
        ("a reset", [done(), ready(b'I')].concat(), Then::Go, true),
        ("a notice", [notice, done(), ready(b'I')].concat(), Then::Go, true),
        ("a last notification", [notification.clone(), done(), ready(b'I')].concat(), Then::Go, true),
        (
            "a report as at the login",
            [frame(b'S', b"is_superuser\0on\0"), done(), ready(b'I')].concat(),
            Then::Go,
            true,
        ),
        ("an error", [error.clone(), ready(b'I')].concat(), Then::Go, false),
        ("an error behind it", [done(), error.clone(), ready(b'I')].concat(), Then::Go, false),
        ("a transaction", [done(), ready(b'T')].concat(), Then::Go, false),
        ("a failed transaction", [done(), ready(b'E')].concat(), Then::Go, false),
        ("another report", [superuser, done(), ready(b'I')].concat(), Then::Go, false),
        ("a new report", [frame(b'S', b"new\0one\0"), done(), ready(b'I')].concat(), Then::Go, false),
        ("one answer too many", [done(), ready(b'I'), stray].concat(), Then::Go, false),
        ("one ReadyForQuery too many", [done(), ready(b'I'), ready(b'I')].concat(), Then::Go, false),
        ("a notification afterwards", [done(), ready(b'I'), notification].concat(), Then::Go, true),
        ("a cut frame afterwards", [done(), ready(b'I'), vec![b'S', 0]].concat(), Then::Go, false),
        ("an end afterwards", [done(), ready(b'I')].concat(), Then::Close, false),
        ("an end", done(), Then::Close, false),
        ("silence", done(), Then::Silence, false),
        ("no protocol", b"what?".to_vec(), Then::Go, false),
    ] {
        let mut client = rig.wire(POSTGRES).await;
        let own = first_row(&mut client, "SELECT").await;
        script.lock().expect("lives").push_front(Wiping { says, then });
        leave(&rig, client).await;
        if what == "an end afterwards" {
            // Nobody hears it before somebody wants the connection. It is sent with the answer; this lets it arrive.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(rig.database().inside(), 0, "{what}");
        let mut next = rig.wire(POSTGRES).await;
        let given = first_row(&mut next, "SELECT").await;
        assert_eq!(given == own, is_kept, "{what}");
        leave(&rig, next).await;
    }
    rig.stop().await;
}
