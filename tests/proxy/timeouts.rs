//! Time-outs: what the client is told, and that nothing of it goes on on the server.

use std::time::{Duration, Instant};

use pgcutover::config::PoolMode;
use pgcutover::config::limits::{Override, Timeouts};
use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::SessionState;

use crate::rig::{Rig, server, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire_client::{WireClient, extended, frame, query, sync};

const SHORT: Duration = Duration::from_millis(200);

/// Where something else has to be done in less time, however busy the machine is.
const LONGER: Duration = Duration::from_secs(3);

fn rig(cluster: &Cluster, mode: PoolMode, timeouts: Timeouts) -> Rig {
    Rig::start(server(cluster), server(cluster), |config| {
        config.limits.timeouts = timeouts;
        config.pool.mode = mode;
    })
}

/// A client feels the same in both.
const MODES: [PoolMode; 2] = [PoolMode::Session, PoolMode::Transaction];

/// SQLSTATE of the next message, which is an error.
async fn code(client: &mut WireClient) -> String {
    loop {
        let message = client.next().await.expect("an error");
        match message.tag {
            'E' => return message.code(),
            _ => continue,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_is_cancelled_on_the_server_and_the_session_goes_on() {
    let cluster = one_cluster("query_timeout");
    tokio::join!(
        cancelled_by_a_timeout(&cluster, PoolMode::Session),
        cancelled_by_a_timeout(&cluster, PoolMode::Transaction)
    );
    let direct = connect(&cluster, "postgres").await;
    let left = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%sleep(60)%' \
                AND pid <> pg_backend_pid()";
    assert_eq!(text(&direct, left).await, "0");
}

async fn cancelled_by_a_timeout(cluster: &Cluster, mode: PoolMode) {
    let rig = rig(cluster, mode, Timeouts { query: LONGER, ..Timeouts::default() });
    let mut client = rig.wire("postgres").await;
    for slow in [query("SELECT pg_sleep(60)"), [extended("SELECT pg_sleep(60)"), sync()].concat()] {
        let asked = Instant::now();
        client.send(&slow).await;
        assert_eq!(code(&mut client).await, "57014");
        assert!(asked.elapsed() >= LONGER, "never early");
        assert_eq!(client.tags_until_ready().await, "ZI");
    }
    // In a transaction each statement counts by itself, the idle time between them does not.
    client.send(&query("BEGIN")).await;
    client.until_ready().await;
    tokio::time::sleep(LONGER + SHORT).await;
    client.send(&query("SELECT pg_sleep(0.05)")).await;
    assert!(client.tags_until_ready().await.ends_with("ZT"), "it had not used up its time");
    client.send(&query("SELECT pg_sleep(60)")).await;
    assert_eq!(code(&mut client).await, "57014");
    assert_eq!(client.tags_until_ready().await, "ZE");
    client.send(&query("ROLLBACK")).await;
    assert!(client.tags_until_ready().await.ends_with("ZI"));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_transaction_is_rolled_back_and_only_then_left() {
    let cluster = one_cluster("idle_transaction");
    for mode in MODES {
        let rig = rig(&cluster, mode, Timeouts { idle_transaction: SHORT, ..Timeouts::default() });
        let direct = connect(&cluster, "postgres").await;
        direct.batch_execute("CREATE TABLE IF NOT EXISTS t(a int)").await.expect("created");
        let mut client = rig.wire("postgres").await;
        client.send(&query("BEGIN; INSERT INTO t VALUES (1); SELECT pg_sleep(0.5)")).await;
        assert!(client.tags_until_ready().await.ends_with("ZT"), "a statement that runs is not idle");
        assert_eq!(code(&mut client).await, "25P03");
        assert_eq!(client.next().await, None);
        rig.database().fence();
        tokio::time::timeout(crate::support::PATIENCE, rig.database().wait_empty()).await.expect("it ends");
        let left = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        assert_eq!(text(&direct, left).await, "0", "the gate was left before the server had ended it");
        assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "0");
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_has_its_time_whatever_it_does_and_its_statement_is_not_left_behind() {
    let cluster = one_cluster("transaction");
    for mode in MODES {
        let rig = rig(&cluster, mode, Timeouts { transaction: SHORT, ..Timeouts::default() });
        let direct = connect(&cluster, "postgres").await;
        direct.batch_execute("CREATE TABLE IF NOT EXISTS t(a int)").await.expect("created");
        let mut client = rig.wire("postgres").await;
        client.send(&query("INSERT INTO t SELECT 1 FROM pg_sleep(60)")).await;
        assert_eq!(code(&mut client).await, "25P04");
        rig.until_no_session().await;
        let left = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'INSERT INTO t%'";
        wait_for("the statement to end", || async { text(&direct, left).await == "0" }).await;
        assert_eq!(text(&direct, "SELECT count(*) FROM t").await, "0");
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_and_an_old_one_are_ended_and_others_are_not() {
    let cluster = one_cluster("idle");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        let never = Override::default().timeout("idle_timeout", Duration::ZERO);
        config.limits.databases.insert("template1".to_owned(), never);
    });
    let spared = rig.connect("template1").await;
    let mut inside = rig.wire("postgres").await;
    inside.send(&query("BEGIN")).await;
    inside.until_ready().await;
    let mut idle = rig.wire("postgres").await;
    rig.reload(|config| config.limits.timeouts.idle = SHORT);
    assert_eq!(code(&mut idle).await, "57P05");
    assert_eq!(idle.next().await, None);
    assert!(inside.is_silent(2 * SHORT).await, "a session in a transaction is not idle");
    spared.simple_query("SELECT 1").await.expect("spared");
    rig.reload(|config| {
        config.limits.timeouts.idle = Duration::ZERO;
        config.limits.timeouts.lifetime = SHORT;
    });
    let mut old = rig.wire("postgres").await;
    assert_eq!(code(&mut old).await, "57P01");
    assert!(inside.is_silent(2 * SHORT).await, "its transaction may end first");
    inside.send(&query("COMMIT")).await;
    assert!(inside.tags_until_ready().await.ends_with("ZI"));
    assert_eq!(code(&mut inside).await, "57P01");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_behind_a_pause_is_told_and_who_waits_for_a_cutover_is_not() {
    let cluster = one_cluster("query_wait");
    for mode in MODES {
        let rig = rig(&cluster, mode, Timeouts::default());
        let database = rig.database();
        let mut client = rig.wire("postgres").await;
        // From here on there is a connection to the server, which nobody has to wait for.
        client.send(&query("SELECT 0")).await;
        client.until_ready().await;
        rig.reload(|config| config.limits.timeouts.query_wait = SHORT);
        database.fence();
        client.send(&query("SELECT 1")).await;
        rig.until(SessionState::Held).await;
        assert!(client.is_silent(3 * SHORT).await, "max_pause bounds this wait");
        database.reopen();
        assert!(client.tags_until_ready().await.ends_with("ZI"));

        assert_eq!(database.pause(), Ok(true));
        for held in [query("SELECT 1"), [extended("SELECT 1"), sync()].concat()] {
            client.send(&held).await;
            assert_eq!(code(&mut client).await, "57014");
            assert_eq!(client.tags_until_ready().await, "ZI", "the session goes on");
        }
        let mut late = WireClient::connect(rig.port).await;
        late.start(&[("user", "postgres"), ("database", "postgres")]).await;
        // Where a login needs no server connection it is over, and the first transaction waits.
        late.send(&query("SELECT 1")).await;
        assert_eq!(code(&mut late).await, "57014", "{mode:?}: a login waits no longer either");
        assert!(database.resume());
        client.send(&query("SELECT 2")).await;
        assert!(client.tags_until_ready().await.ends_with("ZI"));
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn held_sessions_are_let_in_gradually_when_asked_and_all_of_them() {
    let cluster = one_cluster("resume_rate");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.limits.resume_rate = 2);
    let database = rig.database();
    let mut clients = Vec::new();
    for _ in 0..12 {
        clients.push(rig.wire("postgres").await);
    }
    assert_eq!(database.pause(), Ok(true));
    for client in &mut clients {
        client.send(&query("SELECT 1")).await;
    }
    let held = || rig.sessions.list().iter().filter(|one| one.state == SessionState::Held).count();
    wait_for("every session to be held", || async { held() == 12 }).await;
    let resumed = Instant::now();
    database.resume();
    for client in &mut clients {
        assert!(client.tags_until_ready().await.ends_with("ZI"));
    }
    // Two workers with six sessions each and one a step: the last came after five steps.
    assert!(resumed.elapsed() >= Duration::from_millis(50));
    // A fence in the middle of it holds again whoever was not let in.
    assert_eq!(database.pause(), Ok(true));
    for client in &mut clients {
        client.send(&query("SELECT 1")).await;
    }
    wait_for("every session to be held", || async { held() == 12 }).await;
    database.resume();
    database.fence();
    database.wait_empty().await;
    assert_eq!(database.inside(), 0);
    database.reopen();
    for client in &mut clients {
        assert!(client.tags_until_ready().await.ends_with("ZI"));
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_that_waited_are_let_in_gradually_too() {
    let cluster = one_cluster("resume_logins");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.limits.resume_rate = 2);
    drop(rig.wire("postgres").await);
    rig.until_no_session().await;
    let database = rig.database();
    assert_eq!(database.pause(), Ok(true));
    let mut clients = Vec::new();
    for _ in 0..12 {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", "postgres"), ("database", "postgres")]).await;
        clients.push(client);
    }
    let waiting = || rig.sessions.list().iter().filter(|one| one.database == "postgres").count();
    wait_for("every login to wait", || async { waiting() == 12 }).await;
    let resumed = Instant::now();
    database.resume();
    for client in &mut clients {
        assert!(client.tags_until_ready().await.ends_with("ZI"));
    }
    // Two workers with six logins each, at best, and one a step: the last came after five steps.
    assert!(resumed.elapsed() >= Duration::from_millis(50));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_stops_leaves_no_statement_behind() {
    let cluster = one_cluster("stop");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    let mut client = rig.wire("postgres").await;
    client.send(&query("SELECT pg_sleep(300)")).await;
    let mut copying = rig.wire("postgres").await;
    copying.send(&query("CREATE TABLE t(a int); COPY t FROM STDIN")).await;
    copying.send(&frame(b'd', b"1\n")).await;
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%sleep(300)%' AND pid <> pg_backend_pid()";
    wait_for("the statement to run", || async { text(&direct, asleep).await == "1" }).await;
    rig.stop().await;
    assert_eq!(code(&mut client).await, "57P01");
    assert_eq!(text(&direct, asleep).await, "0");
}
