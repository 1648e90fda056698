//! Transaction pooling in front of a real server: many clients on few connections, each as if it were alone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use pgcutover::config::{Config, PoolMode};
use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::SessionState;
use pgcutover::switch::ServerRole;
use tokio_postgres::Client;

use crate::rig::{Rig, server, text};
use crate::support::{PATIENCE, connect, one_cluster, wait_for};
use crate::wire_client::{WireClient, bind, execute, extended, frame, parse, query, rows, sync};

/// A proxy in transaction mode whose pools have `size` connections.
pub fn pooled(cluster: &Cluster, size: usize) -> Rig {
    pooled_with(cluster, size, |_| {})
}

pub fn pooled_with(cluster: &Cluster, size: usize, change: impl FnOnce(&mut Config)) -> Rig {
    Rig::start(server(cluster), server(cluster), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = size;
        change(config);
    })
}

/// Backends that the proxy has open in `postgres`.
async fn backends(direct: &Client) -> usize {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'postgres' AND backend_type = 'client backend' \
                 AND pid <> pg_backend_pid() AND application_name NOT LIKE 'pgcutover/%'";
    text(direct, count).await.parse().expect("a number")
}

fn describe(name: &str) -> Vec<u8> {
    frame(b'D', format!("S{name}\0").as_bytes())
}

fn close(name: &str) -> Vec<u8> {
    frame(b'C', format!("S{name}\0").as_bytes())
}

pub async fn ask(client: &mut WireClient, bytes: &[u8]) -> Vec<crate::wire_client::Message> {
    client.send(bytes).await;
    client.until_ready().await
}

pub async fn first_row(client: &mut WireClient, sql: &str) -> String {
    let messages = ask(client, &query(sql)).await;
    rows(&messages).into_iter().next().unwrap_or_else(|| panic!("{sql}: {messages:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_share_few_connections() {
    let cluster = one_cluster("share");
    let rig = pooled(&cluster, 2);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    let mut clients = Vec::new();
    for number in 0..16 {
        let client = rig.connect("postgres").await;
        clients.push(tokio::spawn(async move {
            let insert = client.prepare("INSERT INTO t VALUES ($1)").await.expect("prepared");
            for round in 0..20i32 {
                assert_eq!(
                    text(&client, &format!("SELECT {}", number * 100 + round)).await,
                    (number * 100 + round).to_string()
                );
                client.execute(&insert, &[&round]).await.expect("inserted");
                client.batch_execute("BEGIN").await.expect("begun");
                let pid = text(&client, "SELECT pg_backend_pid()").await;
                assert_eq!(text(&client, "SELECT pg_backend_pid()").await, pid, "one transaction, one connection");
                client.batch_execute("ROLLBACK").await.expect("rolled back");
            }
            client
        }));
    }
    let mut done = Vec::new();
    for client in clients {
        done.push(client.await.expect("no panic"));
    }
    assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "320");
    assert!(backends(&direct).await <= 2);
    wait_for("all to be given back", || async {
        rig.sessions.list().iter().all(|session| session.backend_pid.is_none())
    })
    .await;
    assert_eq!(
        rig.sessions.backend_pids(ServerRole::Source, "postgres").len(),
        backends(&direct).await,
        "idle ones are no strangers"
    );
    drop(done);
    rig.until_no_session().await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_follow_their_client_and_nobody_else() {
    let cluster = one_cluster("settings");
    let rig = pooled(&cluster, 1);
    connect(&cluster, "postgres").await.batch_execute("CREATE ROLE reader").await.expect("created");
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let look = "SELECT concat_ws(',', current_setting('work_mem'), current_setting('TimeZone'), current_user, \
                nullif(current_setting('app.tenant', true), ''))";
    let fresh = first_row(&mut bob, look).await;
    for set in ["SET work_mem = '7MB'", "SET TimeZone = 'Asia/Tokyo'", "SET ROLE reader", "SET app.tenant = 'ann'"] {
        ask(&mut ann, &query(set)).await;
        assert_eq!(first_row(&mut bob, look).await, fresh, "{set}");
    }
    assert_eq!(first_row(&mut ann, look).await, "7MB,Asia/Tokyo,reader,ann");
    // Through a function, in the extended protocol, with the name among the parameters.
    ask(&mut bob, &[extended("SELECT set_config('work_mem', '9MB', false)"), sync()].concat()).await;
    assert_eq!(first_row(&mut bob, "SHOW work_mem").await, "9MB");
    assert_eq!(first_row(&mut ann, "SHOW work_mem").await, "7MB");
    // What is local ends with its transaction, what is rolled back never was.
    let batch = "BEGIN; SET LOCAL app.tenant = 'x'; SELECT set_config('work_mem', '1MB', true); COMMIT";
    ask(&mut ann, &query(batch)).await;
    ask(&mut ann, &query("BEGIN; SET work_mem = '2MB'; ROLLBACK")).await;
    assert_eq!(first_row(&mut bob, "SHOW work_mem").await, "9MB");
    assert_eq!(first_row(&mut ann, look).await, "7MB,Asia/Tokyo,reader,ann");
    // RESET leads back.
    for reset in ["RESET ALL", "RESET ROLE"] {
        ask(&mut ann, &query(reset)).await;
    }
    assert_eq!(first_row(&mut bob, "SHOW work_mem").await, "9MB");
    assert_eq!(first_row(&mut ann, look).await, fresh);
    ask(&mut bob, &query("DISCARD ALL")).await;
    assert_eq!(first_row(&mut bob, look).await, fresh);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_parameters_are_the_clients_own_and_reported() {
    let cluster = one_cluster("startup");
    let rig = pooled(&cluster, 1);
    let start = async |parameters: &[(&str, &str)]| {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[&[("user", "postgres"), ("database", "postgres")], parameters].concat()).await;
        let messages = client.until_ready().await;
        (client, messages)
    };
    let (mut ann, greeting) = start(&[
        ("application_name", "ann"),
        ("options", "-c app.x=1 -c DateStyle=German"),
        ("client_encoding", "LATIN1"),
    ])
    .await;
    let reported = |messages: &[crate::wire_client::Message], name: &str| {
        let found = messages.iter().filter(|message| message.tag == 'S').find_map(|message| {
            let text = String::from_utf8_lossy(&message.body).into_owned();
            text.strip_prefix(&format!("{name}\0")).map(|value| value.trim_end_matches('\0').to_owned())
        });
        found.unwrap_or_default()
    };
    assert_eq!(reported(&greeting, "application_name"), "ann");
    assert_eq!(reported(&greeting, "client_encoding"), "LATIN1");
    assert!(reported(&greeting, "DateStyle").starts_with("German"));
    let (mut bob, greeting) = start(&[]).await;
    assert_eq!(reported(&greeting, "client_encoding"), "UTF8");
    assert!(reported(&greeting, "DateStyle").starts_with("ISO"));
    let look = "SELECT concat_ws(',', current_setting('application_name'), current_setting('client_encoding'), \
                current_setting('app.x', true), '2026-11-21'::date)";
    assert_eq!(first_row(&mut ann, look).await, "ann,LATIN1,1,21.11.2026");
    assert!(!first_row(&mut bob, look).await.contains("ann"));
    ask(&mut ann, &query("SET application_name = 'other'")).await;
    ask(&mut ann, &query("RESET application_name")).await;
    assert_eq!(first_row(&mut ann, "SHOW application_name").await, "ann", "what it connected with");
    // A second one like the first is greeted alike, without asking a server.
    let (_again, second) = start(&[
        ("application_name", "ann"),
        ("options", "-c app.x=1 -c DateStyle=German"),
        ("client_encoding", "LATIN1"),
    ])
    .await;
    assert_eq!(reported(&second, "client_encoding"), "LATIN1");
    for role in [("role", "pg_monitor"), ("options", "-c ROLE=pg_monitor")] {
        assert_eq!(first_row(&mut start(&[role]).await.0, "SELECT current_user").await, "pg_monitor");
    }
    for (name, code, words) in
        [("work_mem", "22023", "invalid value for"), ("nonsense", "42704", "unrecognized configuration")]
    {
        let (_, refused) = start(&[(name, "lots")]).await;
        let error = refused.iter().find(|message| message.tag == 'E').expect("refused");
        assert_eq!((error.code(), error.words()), (code.to_owned(), format!("{words} parameter \"{name}\"")));
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_statements_are_there_on_whichever_connection() {
    let cluster = one_cluster("prepared");
    let rig = pooled_with(&cluster, 2, |config| config.pool.max_prepared_statements = 3);
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(rig.wire("postgres").await);
    }
    // The same name stands for another statement in each client; more statements than a connection may have.
    for (number, client) in clients.iter_mut().enumerate() {
        for name in 0..4 {
            let sql = format!("SELECT '{number}-{name}', pg_backend_pid()");
            let messages =
                ask(client, &[parse(&format!("s{name}"), &sql), describe(&format!("s{name}")), sync()].concat()).await;
            assert_eq!(crate::wire_client::tags(&messages), "1tTZI");
        }
    }
    for round in 0..6 {
        for (number, client) in clients.iter_mut().enumerate() {
            let name = (round + number) % 4;
            let statement = format!("s{name}");
            let messages = ask(client, &[bind(&statement), execute(0), bind("s0"), execute(0), sync()].concat()).await;
            assert_eq!(crate::wire_client::tags(&messages), "2DC2DCZI");
            assert_eq!(rows(&messages), [format!("{number}-{name}"), format!("{number}-0")]);
        }
    }
    let direct = connect(&cluster, "postgres").await;
    assert!(backends(&direct).await <= 2);
    let client = &mut clients[0];
    // A name is valid once its Parse has succeeded, and not before.
    let failed = ask(client, &[parse("bad", "SELECT nonsense"), bind("bad"), execute(0), sync()].concat()).await;
    assert_eq!(failed[0].code(), "42703");
    assert_eq!(ask(client, &[bind("bad"), execute(0), sync()].concat()).await[0].code(), "26000");
    let skipped = ask(client, &[bind("bad"), parse("late", "SELECT 1"), sync()].concat()).await;
    assert_eq!(skipped[0].code(), "26000");
    assert_eq!(ask(client, &[bind("late"), sync()].concat()).await[0].code(), "26000");
    // A name that is taken, a Close, the name again, all as with a server of its own.
    assert_eq!(ask(client, &[parse("s0", "SELECT 1"), sync()].concat()).await[0].code(), "42P05");
    let again = ask(client, &[close("s0"), parse("s0", "SELECT 'new'"), bind("s0"), execute(0), sync()].concat()).await;
    assert_eq!((crate::wire_client::tags(&again), rows(&again)), ("312DCZI".to_owned(), vec!["new".to_owned()]));
    assert_eq!(rows(&ask(&mut clients[1], &[bind("s0"), execute(0), sync()].concat()).await), ["1-0"]);
    // Names of ours are nobody's.
    for name in 1..20 {
        let probe = ask(&mut clients[2], &[bind(&format!("pgcutover_s{name:x}")), sync()].concat()).await;
        assert_eq!(probe[0].code(), "26000");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unnamed_statement_is_the_clients_own() {
    let cluster = one_cluster("unnamed");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ask(&mut ann, &[parse("", "SELECT 'ann'"), sync()].concat()).await;
    let none = ask(&mut bob, &[bind(""), execute(0), sync()].concat()).await;
    assert_eq!(none[0].code(), "26000", "another client's is not to be seen");
    ask(&mut bob, &[parse("", "SELECT 'bob'"), sync()].concat()).await;
    for _ in 0..2 {
        assert_eq!(rows(&ask(&mut ann, &[bind(""), execute(0), sync()].concat()).await), ["ann"]);
        assert_eq!(rows(&ask(&mut bob, &[describe(""), bind(""), execute(0), sync()].concat()).await), ["bob"]);
    }
    // A simple Query destroys it.
    ask(&mut ann, &query("SELECT 1")).await;
    assert_eq!(ask(&mut ann, &[bind(""), sync()].concat()).await[0].code(), "26000");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_are_taken_away_by_sql_as_drivers_do() {
    let cluster = one_cluster("deallocate");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    for client in [&mut ann, &mut bob] {
        let names: Vec<u8> = ["a", "B\"c", "d"].iter().flat_map(|name| parse(name, "SELECT 1")).collect();
        ask(client, &[names, sync()].concat()).await;
    }
    let gone = async |client: &mut WireClient, name: &str| {
        let messages = ask(client, &[bind(name), execute(0), sync()].concat()).await;
        messages[0].tag == 'E' && messages[0].code() == "26000"
    };
    // Outside and inside a transaction, and through the extended protocol.
    assert_eq!(crate::wire_client::tags(&ask(&mut ann, &query("DEALLOCATE a")).await), "CZI");
    ask(&mut ann, &query("BEGIN")).await;
    assert_eq!(crate::wire_client::tags(&ask(&mut ann, &query("DEALLOCATE PREPARE \"B\"\"c\"")).await), "CZT");
    ask(&mut ann, &query("COMMIT")).await;
    assert_eq!(crate::wire_client::tags(&ask(&mut ann, &[extended("DEALLOCATE d"), sync()].concat()).await), "12CZI");
    for name in ["a", "B\"c", "d"] {
        assert!(gone(&mut ann, name).await && !gone(&mut bob, name).await, "{name}");
    }
    assert_eq!(ask(&mut ann, &query("DEALLOCATE a")).await[0].code(), "26000");
    ask(&mut bob, &query("DEALLOCATE ALL")).await;
    assert!(gone(&mut bob, "a").await);
    ask(&mut ann, &[parse("a", "SELECT 'again'"), sync()].concat()).await;
    assert_eq!(rows(&ask(&mut ann, &[bind("a"), execute(0), sync()].concat()).await), ["again"]);
    ask(&mut bob, &query("DISCARD PLANS")).await;
    assert!(!gone(&mut ann, "a").await);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_that_became_useless_are_made_anew() {
    let cluster = one_cluster("plans");
    let rig = pooled(&cluster, 1);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int); INSERT INTO t VALUES (1)").await.expect("created");
    let mut client = rig.wire("postgres").await;
    ask(&mut client, &[parse("s", "SELECT * FROM t"), sync()].concat()).await;
    let use_it = [bind("s"), execute(0), sync()].concat();
    assert_eq!(rows(&ask(&mut client, &use_it).await), ["1"]);
    direct.batch_execute("ALTER TABLE t ALTER a TYPE text").await.expect("altered");
    let mended = ask(&mut client, &use_it).await;
    assert_eq!((crate::wire_client::tags(&mended), rows(&mended)), ("2DCZI".to_owned(), vec!["1".to_owned()]));
    // Behind the proxy's back.
    ask(&mut client, &query("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")).await;
    assert_eq!(rows(&ask(&mut client, &use_it).await), ["1"]);
    // In a transaction the client is told, and the next one goes well.
    ask(&mut client, &query("BEGIN")).await;
    direct.batch_execute("ALTER TABLE t ALTER a TYPE varchar").await.expect("altered");
    assert_eq!(ask(&mut client, &use_it).await[0].code(), "0A000");
    ask(&mut client, &query("ROLLBACK")).await;
    assert_eq!(rows(&ask(&mut client, &use_it).await), ["1"]);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_shared_keeps_its_connection() {
    let cluster = one_cluster("pins");
    let rig = pooled(&cluster, 8);
    let cases = [
        ("LISTEN news", "LISTEN"),
        ("SELECT pg_advisory_lock(7)", "advisory lock"),
        ("CREATE TEMP TABLE mine(a int)", "temporary object"),
        ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT", "cursor WITH HOLD"),
        ("PREPARE p AS SELECT 'mine'", "PREPARE"),
    ];
    let mut pinned = Vec::new();
    for (sql, why) in cases {
        let mut client = rig.wire("postgres").await;
        ask(&mut client, &[parse("before", "SELECT 'before'"), sync()].concat()).await;
        ask(&mut client, &query(sql)).await;
        wait_for("the pin to be shown", || async {
            rig.sessions.list().iter().any(|session| session.pinned.as_deref() == Some(why))
        })
        .await;
        // Its statements are there under its own names.
        assert_eq!(rows(&ask(&mut client, &[bind("before"), execute(0), sync()].concat()).await), ["before"], "{sql}");
        pinned.push(client);
    }
    let mut other = rig.wire("postgres").await;
    assert_eq!(first_row(&mut other, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").await, "1");
    ask(&mut other, &query("NOTIFY news, 'x'")).await;
    assert_eq!(pinned[0].next().await.expect("told").tag, 'A');
    assert_eq!(first_row(&mut pinned[2], "SELECT count(*) FROM mine").await, "0");
    assert_eq!(first_row(&mut pinned[3], "FETCH c").await, "1");
    assert_eq!(first_row(&mut pinned[4], "EXECUTE p").await, "mine");
    assert_eq!(rows(&ask(&mut pinned[4], &[bind("p"), execute(0), sync()].concat()).await), ["mine"]);
    // A lock that its own transaction gives back keeps nothing.
    ask(&mut other, &query("BEGIN; SELECT pg_advisory_lock(8); SELECT pg_advisory_unlock(8); COMMIT")).await;
    assert_eq!(rig.sessions.list().iter().filter(|session| session.pinned.is_some()).count(), 5);
    // They leave, and take everything with them.
    drop(pinned);
    wait_for("the pinned ones to end", || async { rig.sessions.list().len() == 1 }).await;
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    wait_for("their backends to end", || async { text(&connect(&cluster, "postgres").await, locks).await == "0" })
        .await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_ever_and_all_get_their_turn() {
    let cluster = one_cluster("fair");
    let rig = pooled_with(&cluster, 1, |config| config.limits.timeouts.query_wait = PATIENCE);
    let stop = Arc::new(AtomicBool::new(false));
    let counts: Vec<Arc<AtomicUsize>> = (0..12).map(|_| Arc::default()).collect();
    let (mut clients, mut tasks) = (Vec::new(), Vec::new());
    // All are there before the first of them begins.
    for _ in &counts {
        clients.push(rig.connect("postgres").await);
    }
    for (client, count) in clients.into_iter().zip(&counts) {
        let (stop, count) = (stop.clone(), count.clone());
        tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                client.simple_query("SELECT 1").await.expect("served");
                count.fetch_add(1, Ordering::SeqCst);
            }
        }));
    }
    wait_for("everybody to be served", || async { counts.iter().all(|count| count.load(Ordering::SeqCst) >= 50) })
        .await;
    stop.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.expect("no panic");
    }
    let (least, most) =
        (counts.iter().map(|c| c.load(Ordering::SeqCst)).min(), counts.iter().map(|c| c.load(Ordering::SeqCst)).max());
    assert!(most < least.map(|least| least * 4), "{least:?} to {most:?}");
    // One that holds the only connection; another one waits too long.
    rig.reload(|config| config.limits.timeouts.query_wait = Duration::from_secs(1));
    let (mut holder, mut waiter) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ask(&mut holder, &query("BEGIN")).await;
    waiter.send(&query("SELECT 1")).await;
    rig.until(SessionState::Waiting).await;
    let refused = waiter.next().await.expect("told");
    assert_eq!((refused.tag, refused.code().as_str()), ('E', "53300"));
    assert_eq!(waiter.next().await, None);
    ask(&mut holder, &query("COMMIT")).await;
    assert_eq!(first_row(&mut holder, "SELECT 'on'").await, "on");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_hits_its_own_statement_and_nobody_elses() {
    let cluster = one_cluster("poolcancel");
    let rig = pooled(&cluster, 1);
    let direct = connect(&cluster, "postgres").await;
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ann.send(&query("SELECT pg_sleep(600)")).await;
    // A cancel that comes before the statement is lost.
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    wait_for("the statement to run", || async { text(&direct, asleep).await == "1" }).await;
    bob.send(&query("SELECT 'waited'")).await;
    rig.until(SessionState::Waiting).await;
    // Bob's waits: it is cancelled without a server.
    bob.cancel(rig.port).await;
    assert_eq!(bob.until_ready().await[0].code(), "57014");
    bob.send(&query("SELECT 'waited'")).await;
    ann.cancel(rig.port).await;
    let cancelled = ann.until_ready().await;
    assert_eq!(cancelled.iter().find(|message| message.tag == 'E').expect("an error").code(), "57014");
    assert_eq!(rows(&bob.until_ready().await), ["waited"]);
    // Cancels that come just as the statement ends never hit the next one.
    for round in 0..40 {
        ann.send(&query("SELECT 1")).await;
        let (cancel, _) = tokio::join!(ann.cancel(rig.port), async {
            let messages = ask(&mut bob, &query(&format!("SELECT {round}, pg_sleep(0.002)"))).await;
            assert_eq!(rows(&messages), [round.to_string()]);
        });
        let () = cancel;
        ann.until_ready().await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_never_given_back_in_the_middle_of_something() {
    let cluster = one_cluster("dirty");
    let rig = pooled(&cluster, 1);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");
    let cut = query(&format!("SELECT '{}'", "x".repeat(3_000_000)));
    let cases: [Vec<u8>; 5] = [
        query("BEGIN; INSERT INTO t VALUES (1)"),
        query("BEGIN; SELECT 1/0"),
        [query("COPY t FROM STDIN"), frame(b'd', b"1\n")].concat(),
        [extended("INSERT INTO t VALUES (1)"), frame(b'H', &[])].concat(),
        cut[..1_000_000].to_vec(),
    ];
    for bytes in cases {
        let mut client = rig.wire("postgres").await;
        client.send(&bytes).await;
        rig.until(SessionState::Active).await;
        drop(client);
        let mut next = rig.wire("postgres").await;
        let clean = "SELECT count(*) || ',' || (pg_current_xact_id_if_assigned() IS NULL) FROM t";
        assert_eq!(first_row(&mut next, clean).await, "0,true");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_pipelines_and_large_values_pass_whole() {
    let cluster = one_cluster("bulk");
    let rig = pooled(&cluster, 2);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a text)").await.expect("created");
    let mut client = rig.wire("postgres").await;
    let row = format!("{}\n", "y".repeat(100_000));
    let mut copy = query("COPY t FROM STDIN");
    (0..20).for_each(|_| copy.extend(frame(b'd', row.as_bytes())));
    copy.extend(frame(b'c', &[]));
    assert_eq!(crate::wire_client::tags(&ask(&mut client, &copy).await), "GCZI");
    let out = ask(&mut client, &query("COPY t TO STDOUT")).await;
    assert_eq!(
        out.iter().filter(|message| message.tag == 'd').map(|message| message.body.len()).sum::<usize>(),
        2_000_020
    );
    let big = "z".repeat(2_000_000);
    assert_eq!(first_row(&mut client, &format!("SELECT '{big}'")).await, big);
    // A long statement, shared; a longer one, unnamed; a parameter that streams.
    let long = format!("SELECT '{}'", "w".repeat(300_000));
    assert_eq!(
        rows(&ask(&mut client, &[parse("long", &long), bind("long"), execute(0), sync()].concat()).await)[0].len(),
        300_000
    );
    assert_eq!(rows(&ask(&mut client, &[bind("long"), execute(0), sync()].concat()).await)[0].len(), 300_000);
    let value = vec![b'v'; 1_500_000];
    let mut body = b"\0p\0\0\0\0\x01".to_vec();
    body.extend((value.len() as u32).to_be_bytes());
    body.extend(&value);
    body.extend([0, 0]);
    let batch = [parse("p", "SELECT length($1::text)"), frame(b'B', &body), execute(0), sync()].concat();
    assert_eq!(rows(&ask(&mut client, &batch).await), ["1500000"]);
    // Many batches at once, answered in order.
    let pipeline: Vec<u8> =
        (0..200).flat_map(|number| [extended(&format!("SELECT {number}")), sync()].concat()).collect();
    client.send(&pipeline).await;
    for number in 0..200 {
        assert_eq!(rows(&client.until_ready().await), [number.to_string()]);
    }
    // A COPY in the extended protocol, with its Sync sent before the server could say that it wants data.
    let copy = [extended("COPY t FROM STDIN"), sync(), frame(b'd', b"a\n"), frame(b'c', &[]), sync()].concat();
    assert_eq!(crate::wire_client::tags(&ask(&mut client, &copy).await), "12GCZI");
    assert_eq!(first_row(&mut client, "SELECT count(*) FROM t").await, "21");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_checked_retired_and_kept_as_configured() {
    let cluster = one_cluster("retire");
    let rig = pooled_with(&cluster, 3, |config| {
        config.pool.min_pool_size = 2;
        config.pool.server_check_delay = Duration::ZERO;
        config.pool.server_lifetime = Duration::from_secs(2);
    });
    let direct = connect(&cluster, "postgres").await;
    let mut client = rig.wire("postgres").await;
    wait_for("the least number of connections", || async { backends(&direct).await >= 2 }).await;
    let pid = first_row(&mut client, "SELECT pg_backend_pid()").await;
    // Ended behind our back: the next client does not notice.
    let all = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type = 'client backend' \
               AND pid <> pg_backend_pid()";
    text(&direct, all).await;
    assert_ne!(first_row(&mut client, "SELECT pg_backend_pid()").await, pid);
    // Old ones are replaced.
    let pids = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    let seen = async || -> BTreeSet<String> {
        let rows = direct.query(pids, &[]).await.expect("answered");
        rows.iter().map(|row| row.get::<_, i32>(0).to_string()).collect()
    };
    let before = seen().await;
    wait_for("all of them to be replaced", || async { seen().await.is_disjoint(&before) }).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_over_databases_and_users_hold() {
    let cluster = one_cluster("bounds");
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN; CREATE ROLE bob LOGIN").await.expect("created");
    let rig = pooled_with(&cluster, 5, |config| config.pool.max_db_connections = 2);
    let start = async |user: &str| {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", user), ("database", "postgres")]).await;
        client.until_ready().await;
        client
    };
    let mut clients = Vec::new();
    for user in ["ann", "bob", "postgres", "ann", "bob", "postgres"] {
        clients.push((user, start(user).await));
    }
    for _ in 0..3 {
        for (user, client) in &mut clients {
            assert_eq!(first_row(client, "SELECT current_user").await, *user);
            assert!(backends(&direct).await <= 3, "two, and one that is closing");
        }
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reserve_is_opened_for_who_waits_long() {
    let cluster = one_cluster("reserve");
    let rig = pooled_with(&cluster, 1, |config| {
        config.pool.reserve_pool_size = 1;
        config.pool.reserve_pool_timeout = Duration::from_millis(100);
    });
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ask(&mut ann, &query("BEGIN")).await;
    assert_eq!(first_row(&mut bob, "SELECT 'reserve'").await, "reserve");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_that_change_a_session_unseen_are_wiped_where_asked() {
    let cluster = one_cluster("wipe");
    let rig = pooled_with(&cluster, 1, |config| config.pool.server_reset_query_always = true);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let make = "CREATE FUNCTION sly() RETURNS text LANGUAGE sql AS $$ SELECT set_config('work_mem', '3MB', false) $$";
    ask(&mut ann, &query(make)).await;
    let fresh = first_row(&mut bob, "SHOW work_mem").await;
    assert_eq!(first_row(&mut ann, "SELECT sly()").await, "3MB");
    assert_eq!(first_row(&mut bob, "SHOW work_mem").await, fresh);
    ask(&mut ann, &query("SET work_mem = '4MB'")).await;
    ask(&mut bob, &query("SELECT 1")).await;
    assert_eq!(first_row(&mut ann, "SHOW work_mem").await, "4MB");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbench_runs_prepared_with_many_clients_on_two_connections() {
    let cluster = one_cluster("bench");
    let rig = pooled(&cluster, 2);
    let pgbench = |arguments: &[&str]| {
        let mut command = std::process::Command::new(cluster.bindir().join("pgbench"));
        command.args(["-h", "127.0.0.1", "-p", &rig.port.to_string(), "-U", "postgres"]).args(arguments);
        let output = command.arg("postgres").output().expect("pgbench runs");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    tokio::task::block_in_place(|| pgbench(&["-i", "-s", "2", "-q"]));
    for mode in ["simple", "extended", "prepared"] {
        // A thread for each client: pgbench prepares synchronously, so that a client which waits for a connection would
        // keep the others of its thread from ending the transactions that hold them.
        let said = tokio::task::block_in_place(|| pgbench(&["-M", mode, "-c", "16", "-j", "16", "-t", "40", "-n"]));
        assert!(said.contains("processed: 640/640"), "{said}");
    }
    let direct = connect(&cluster, "postgres").await;
    assert_eq!(text(&direct, "SELECT count(*) FROM pgbench_history").await, "1920");
    wait_for("both to be given back", || async { rig.sessions.idle_backends().len() == 2 }).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_closes_idle_connections_at_once_and_others_when_they_are_given_back() {
    let cluster = one_cluster("reconnect");
    let rig = pooled_with(&cluster, 3, |_| {});
    let (mut busy, mut idle) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let busy_pid = first_row(&mut busy, "BEGIN; SELECT pg_backend_pid()").await;
    let idle_pid = first_row(&mut idle, "SELECT pg_backend_pid()").await;
    let open = || rig.sessions.idle_backends().iter().map(|one| one.pid.to_string()).collect::<Vec<_>>();
    wait_for("it to be given back", || async { open().contains(&idle_pid) }).await;
    rig.sessions.retire("elsewhere");
    assert_eq!(first_row(&mut idle, "SELECT pg_backend_pid()").await, idle_pid);
    rig.sessions.retire("postgres");
    wait_for("idle connections to go", || async { open().is_empty() }).await;
    let number = busy_pid.parse().expect("a number");
    assert!(rig.sessions.is_retired(ServerRole::Source, number));
    assert_ne!(first_row(&mut idle, "SELECT pg_backend_pid()").await, idle_pid);
    assert_eq!(first_row(&mut busy, "SELECT pg_backend_pid()").await, busy_pid, "a transaction ends where it began");
    busy.send(&query("COMMIT")).await;
    busy.until_ready().await;
    wait_for("it to be given up", || async { !rig.sessions.is_retired(ServerRole::Source, number) }).await;
    assert_ne!(first_row(&mut busy, "SELECT pg_backend_pid()").await, busy_pid);
    rig.stop().await;
}
