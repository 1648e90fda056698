//! Pooled clients and a switch of their database: those that hold nothing just go on, the others move.

use std::time::Duration;

use pgcutover::config::PoolMode;
use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::{MoveOrder, MoveOutcome, SessionState};
use pgcutover::switch::{Epoch, ServerRole};

use crate::places::{POSTGRES, TO_TARGET, WHERE_AM_I, databases, soon, two_places};
use crate::rig::{Rig, server, text};
use crate::support::{connect, wait_for};
use crate::wire_client::{WireClient, bind, execute, parse, query, rows, sync, tags};

async fn two(size: usize) -> (Cluster, Cluster, Rig) {
    let (source, target) = two_places().await;
    let rig = Rig::start(server(&source), server(&target), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = size;
    });
    (source, target, rig)
}

/// Backends of the proxy's clients and pools on a server.
async fn backends(cluster: &Cluster) -> String {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = 'postgres' \
                 AND pid <> pg_backend_pid() AND application_name NOT LIKE 'pgcutover/%'";
    text(&connect(cluster, POSTGRES).await, count).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_a_connection_go_on_at_the_other_server() {
    let (source, target, rig) = two(2).await;
    let database = rig.database();
    let mut clients = Vec::new();
    for number in 0..4 {
        let mut client = rig.wire(POSTGRES).await;
        client.send(&query(&format!("SET app.number = '{number}'"))).await;
        client.until_ready().await;
        client
            .send(&[parse("where", "SELECT name || current_setting('app.number') FROM place"), sync()].concat())
            .await;
        client.until_ready().await;
        clients.push(client);
    }
    let mut busy = rig.wire(POSTGRES).await;
    busy.send(&query("BEGIN")).await;
    busy.until_ready().await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert!(reports.iter().all(|report| report.outcome == MoveOutcome::Ready), "{reports:?}");
    assert_ne!(backends(&target).await, "0", "connections are there before the pause");
    database.fence();
    clients[0].send(&query(WHERE_AM_I)).await;
    rig.until(SessionState::Held).await;
    busy.send(&query(WHERE_AM_I)).await;
    assert_eq!(rows(&busy.until_ready().await), ["source"], "who is in a transaction ends it where it began");
    busy.send(&query("COMMIT")).await;
    busy.until_ready().await;
    tokio::time::timeout(crate::support::PATIENCE, database.wait_empty()).await.expect("nobody is inside");
    rig.sessions.settle_moves(&databases(), soon()).await;
    database.open(ServerRole::Target, Epoch(1));
    // Settings, statements and what is reported are those of the client, on the other server.
    let messages = clients[0].until_ready().await;
    assert_eq!(rows(&messages), ["target"]);
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(&[bind("where"), execute(0), sync()].concat()).await;
        let messages = client.until_ready().await;
        assert_eq!(rows(&messages), [format!("target{number}")], "{}", tags(&messages));
    }
    wait_for("the old connections to close", || async { backends(&source).await == "0" }).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_client_moves_with_what_it_has() {
    let (_source, target, rig) = two(4).await;
    let database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    for sql in ["SET app.tenant = '7'", "LISTEN news"] {
        client.send(&query(sql)).await;
        client.until_ready().await;
    }
    wait_for("the pin", || async { rig.sessions.list()[0].pinned.is_some() }).await;
    client.send(&[parse("s", "SELECT name || current_setting('app.tenant') FROM place"), sync()].concat()).await;
    client.until_ready().await;
    // Its unnamed statement is from before the pin.
    let mut other = rig.wire(POSTGRES).await;
    other.send(&[parse("", "SELECT 'unnamed ' || name FROM place"), sync()].concat()).await;
    other.until_ready().await;
    other.send(&[parse("listen", "LISTEN news"), bind("listen"), execute(0), sync()].concat()).await;
    other.until_ready().await;
    wait_for("its pin", || async { rig.sessions.list().iter().all(|session| session.pinned.is_some()) }).await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert_eq!(reports[0].outcome, MoveOutcome::Ready, "{reports:?}");
    database.fence();
    database.wait_empty().await;
    rig.sessions.settle_moves(&databases(), soon()).await;
    database.open(ServerRole::Target, Epoch(1));
    client.send(&[bind("s"), execute(0), sync()].concat()).await;
    assert_eq!(rows(&client.until_ready().await), ["target7"]);
    other.send(&[bind(""), execute(0), sync()].concat()).await;
    assert_eq!(rows(&other.until_ready().await), ["unnamed target"]);
    connect(&target, POSTGRES).await.batch_execute("NOTIFY news, 'there'").await.expect("sent");
    assert_eq!(client.next().await.expect("told").tag, 'A');
    assert_eq!(rig.sessions.backend_pids(ServerRole::Source, POSTGRES), [0; 0], "nothing is left there");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_leaves_nothing_on_the_other_server() {
    let (_source, target, rig) = two(2).await;
    let database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    client.send(&query(WHERE_AM_I)).await;
    rig.until(SessionState::Held).await;
    rig.sessions.settle_moves(&databases(), soon()).await;
    rig.sessions.discard_moves(&databases());
    database.reopen();
    assert_eq!(rows(&client.until_ready().await), ["source"]);
    wait_for("what was prepared to close", || async { backends(&target).await == "0" }).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_takes_no_place_of_those_that_serve() {
    let (_source, target, rig) = two(2).await;
    let mut busy = rig.wire(POSTGRES).await;
    busy.send(&query("BEGIN")).await;
    busy.until_ready().await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert_ne!(backends(&target).await, "0");
    // There is room for two, and one is open.
    let mut other = rig.wire(POSTGRES).await;
    other.send(&query(WHERE_AM_I)).await;
    let served = tokio::time::timeout(Duration::from_secs(20), other.until_ready()).await;
    assert_eq!(rows(&served.expect("it need not wait for the other one's transaction")), ["source"]);
    busy.send(&query("COMMIT")).await;
    busy.until_ready().await;
    let mut third = rig.wire(POSTGRES).await;
    let database = rig.database();
    database.fence();
    database.wait_empty().await;
    database.open(ServerRole::Target, Epoch(1));
    // From now on they are those that serve: while two are in use a third client waits.
    for client in [&mut busy, &mut other] {
        client.send(&query("BEGIN")).await;
        client.until_ready().await;
    }
    third.send(&query(WHERE_AM_I)).await;
    rig.until(SessionState::Waiting).await;
    other.send(&query("COMMIT")).await;
    assert_eq!(rows(&third.until_ready().await), ["target"]);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_the_other_server_refuses_stops_the_cutover_and_nobody_else() {
    let (source, target, rig) = two(2).await;
    connect(&source, POSTGRES).await.batch_execute("CREATE ROLE app LOGIN").await.expect("created");
    connect(&target, POSTGRES).await.batch_execute("CREATE ROLE app NOLOGIN").await.expect("created");
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "app"), ("database", POSTGRES)]).await;
    client.until_ready().await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    let refused = MoveOutcome::Failed("the other server refuses the session's login (28000)".to_owned());
    assert_eq!(reports[0].outcome, refused);
    client.send(&query("SELECT 1")).await;
    assert_eq!(rows(&client.until_ready().await), ["1"]);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_reaches_a_pool_whose_last_client_has_left() {
    let (_source, target, rig) = two(2).await;
    for attempt in 1..3 {
        let mut client = rig.wire(POSTGRES).await;
        client.send(&query("SELECT 1")).await;
        client.until_ready().await;
        rig.sessions.prepare_moves(&databases(), MoveOrder { epoch: Epoch(attempt), ..TO_TARGET }, soon()).await;
        assert_ne!(backends(&target).await, "0", "attempt {attempt}");
        drop(client);
        rig.until_no_session().await;
        rig.sessions.discard_moves(&databases());
        wait_for("what was prepared to close", || async { backends(&target).await == "0" }).await;
    }
    rig.stop().await;
}
