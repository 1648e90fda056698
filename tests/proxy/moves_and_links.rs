//! Moves of sessions while links break, frames are cut, or orders of the next cutover come before they are done.

use std::time::Duration;

use pgcutover::demo::cluster::Cluster;
use pgcutover::failpoint::Failpoints;
use pgcutover::proxy::{MoveOrder, MoveOutcome, SessionState};
use pgcutover::switch::{Epoch, ServerRole};
use tokio::io::AsyncReadExt as _;

use crate::places::{POSTGRES, TO_TARGET, WHERE_AM_I, databases, soon, two_places};
use crate::rig::{Rig, server, text};
use crate::support::{PATIENCE, connect, wait_for};
use crate::wire::{Order, Wire};
use crate::wire_client::{WireClient, query, rows};

/// Two servers, and the wire to one of them.
struct Two {
    failpoints: Failpoints,
    source: Cluster,
    target: Cluster,
    to_source: Wire,
}

async fn two(failpoints: &str) -> (Two, Rig) {
    let (source, target) = two_places().await;
    let to_source = Wire::to(&source).await;
    let failpoints = Failpoints::parse(failpoints).expect("valid");
    let rig = Rig::start_with(to_source.server(), server(&target), failpoints.clone(), |_| {});
    (Two { failpoints, source, target, to_source }, rig)
}

impl Two {
    /// A client, and which connection to the source is its own.
    async fn client(&self, rig: &Rig) -> (WireClient, usize) {
        let client = rig.wire(POSTGRES).await;
        (client, self.to_source.count() - 1)
    }
}

/// A client that listens, prepared for the target, to which half of a notification has come.
async fn half_told(two: &Two, rig: &Rig) -> (WireClient, usize) {
    let (mut client, link) = two.client(rig).await;
    client.send(&query("LISTEN news")).await;
    client.until_ready().await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert_eq!(reports[0].outcome, MoveOutcome::Ready, "{reports:?}");
    two.to_source.order(link, Order::Tear);
    let news = format!("NOTIFY news, '{}'", "x".repeat(1000));
    connect(&two.source, POSTGRES).await.batch_execute(&news).await.expect("sent");
    client.stream.peek(&mut [0; 1]).await.expect("still connected");
    (client, link)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_cut_ends_before_the_other_server_speaks() {
    let (two, rig) = two("").await;
    let (mut client, link) = half_told(&two, &rig).await;
    let database = rig.database();
    database.fence();
    client.send(&query(WHERE_AM_I)).await;
    rig.until(SessionState::Held).await;
    database.wait_empty().await;
    rig.sessions.settle_moves(&databases(), soon()).await;
    database.open(ServerRole::Target, Epoch(1));
    let followed = wait_for("it to follow", || async { rig.sessions.list()[0].server == Some(ServerRole::Target) });
    // Longer than a move asks the old server for its last words.
    let followed = tokio::time::timeout(Duration::from_secs(2), followed).await;
    assert!(followed.is_err(), "half a frame is with the client");
    two.to_source.order(link, Order::Pass);
    let messages = client.until_ready().await;
    let told = &messages[0];
    assert_eq!((told.tag, told.body.len()), ('A', 4 + "news\0".len() + 1001), "{messages:?}");
    assert!(told.body.ends_with(b"xxx\0"), "{told:?}");
    assert_eq!(rows(&messages), ["target"]);
    database.fence();
    tokio::time::timeout(PATIENCE, database.wait_empty()).await.expect("it has left the gate");
    database.reopen();
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_frame_is_cut_for_ever_ends() {
    let (two, rig) = two("").await;
    let (mut client, link) = half_told(&two, &rig).await;
    let database = rig.database();
    database.fence();
    rig.sessions.settle_moves(&databases(), soon()).await;
    two.to_source.order(link, Order::Drop);
    wait_for("the loss to be noticed", || async {
        rig.sessions.list().iter().all(|session| session.backend_pid.is_none())
    })
    .await;
    database.open(ServerRole::Target, Epoch(1));
    let mut heard = Vec::new();
    let to_the_end = client.stream.read_to_end(&mut heard);
    tokio::time::timeout(PATIENCE, to_the_end).await.expect("the session ends").expect("in good order");
    assert!(heard.starts_with(b"A") && heard.ends_with(b"xxx"), "nothing is put into the frame");
    rig.until_no_session().await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_prepared_backend_is_ended_moves_all_the_same() {
    let (two, rig) = two("").await;
    let database = rig.database();
    let (mut idle, _) = two.client(&rig).await;
    let (mut busy, _) = two.client(&rig).await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert!(reports.iter().all(|report| report.outcome == MoveOutcome::Ready), "{reports:?}");
    busy.send(&query("SET app.tenant = '7'")).await;
    busy.until_ready().await;
    let direct = connect(&two.target, POSTGRES).await;
    let others = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    text(&direct, &format!("SELECT count(pg_terminate_backend(pid)) {others}")).await;
    wait_for("both to end", || async { text(&direct, &format!("SELECT count(*) {others}")).await == "0" }).await;
    database.fence();
    database.wait_empty().await;
    let reports = rig.sessions.settle_moves(&databases(), soon()).await;
    assert!(reports.iter().all(|report| report.outcome == MoveOutcome::Ready), "{reports:?}");
    database.open(ServerRole::Target, Epoch(1));
    idle.send(&query(WHERE_AM_I)).await;
    assert_eq!(rows(&idle.until_ready().await), ["target"]);
    busy.send(&query("SELECT name || current_setting('app.tenant') FROM place")).await;
    assert_eq!(rows(&busy.until_ready().await), ["target7"]);
    rig.stop().await;
}

/// When the next order comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Before the session has been woken.
    AtOnce,
    /// While a PAUSE keeps it from following.
    Paused,
}

async fn follows_in_spite_of(next: Next) {
    let (two, rig) = two("").await;
    let database = rig.database();
    let (mut client, link) = two.client(&rig).await;
    client.send(&query("SET app.tenant = '7'")).await;
    client.until_ready().await;
    if next == Next::Paused {
        database.pause().expect("no cutover yet");
    }
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    database.wait_empty().await;
    rig.sessions.settle_moves(&databases(), soon()).await;
    // What it has is on the target only.
    two.to_source.order(link, Order::Drop);
    wait_for("the loss to be noticed", || async { rig.sessions.list()[0].backend_pid.is_none() }).await;
    database.open(ServerRole::Target, Epoch(1));
    let back = MoveOrder { to: ServerRole::Source, epoch: Epoch(2) };
    let reports = rig.sessions.prepare_moves(&databases(), back, soon()).await;
    let expected = if next == Next::Paused { MoveOutcome::Busy } else { MoveOutcome::Ready };
    assert_eq!(reports[0].outcome, expected);
    rig.sessions.discard_moves(&databases());
    database.resume();
    client.send(&query("SELECT name || current_setting('app.tenant') FROM place")).await;
    let messages = client.until_ready().await;
    assert_eq!(rows(&messages), ["target7"], "{messages:?}");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decided_move_is_made_before_the_next_one_is_prepared() {
    follows_in_spite_of(Next::AtOnce).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decided_move_outlives_a_dry_run_in_a_pause() {
    follows_in_spite_of(Next::Paused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_left_without_a_server_by_an_abort_is_told_without_doubt() {
    let (two, rig) = two("").await;
    let database = rig.database();
    let (mut client, link) = two.client(&rig).await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    database.wait_empty().await;
    two.to_source.order(link, Order::Drop);
    wait_for("the loss to be noticed", || async { rig.sessions.list()[0].backend_pid.is_none() }).await;
    rig.sessions.discard_moves(&databases());
    database.reopen();
    client.send(&query(WHERE_AM_I)).await;
    let error = client.next().await.expect("an error");
    assert_eq!(error.code(), "08006");
    assert!(!String::from_utf8_lossy(&error.body).contains("not known"), "nothing of it was under way");
    rig.until_no_session().await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_on_its_way_hits_no_reading_of_a_sessions_state() {
    let (two, rig) = two("").await;
    let (mut client, _) = two.client(&rig).await;
    // With a setting of its own, its settings are read through a view, which can be locked.
    client.send(&query("SET app.tenant = '7'")).await;
    client.until_ready().await;
    two.to_source.order_next(Order::Wait);
    let late = two.to_source.count();
    client.send(&query("SELECT pg_sleep(1)")).await;
    rig.until(SessionState::Active).await;
    let cancelling = async {
        client.cancel(rig.port).await;
        client.until_ready().await
    };
    let direct = connect(&two.source, POSTGRES).await;
    rig.sessions.learn_names(POSTGRES, TO_TARGET, &direct).await.expect("read");
    let preparing = async {
        wait_for("the cancel to set out", || async { two.to_source.count() > late }).await;
        rig.until(SessionState::Idle).await;
        direct.batch_execute("BEGIN; LOCK TABLE pg_catalog.pg_settings IN ACCESS EXCLUSIVE MODE").await.expect("free");
        rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await
    };
    let arriving = async {
        let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        let looks = connect(&two.source, POSTGRES).await;
        let reading = wait_for("its state to be read", || async { text(&looks, waits).await == "1" });
        // It is not to be read before the cancel has arrived; if it is, the cancel hits it.
        let _too_early = tokio::time::timeout(Duration::from_secs(4), reading).await;
        two.to_source.order(late, Order::Pass);
        let _too_early = tokio::time::timeout(Duration::from_secs(1), std::future::pending::<()>()).await;
        direct.batch_execute("COMMIT").await.expect("held");
    };
    let (messages, reports, ()) = tokio::join!(cancelling, preparing, arriving);
    assert_eq!(rows(&messages), [""], "the statement had ended by itself");
    assert_eq!(reports[0].outcome, MoveOutcome::Ready, "{reports:?}");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_a_session_moves_hits_what_its_client_has_asked_for() {
    let (two, rig) = two("session.adopt=hold").await;
    let database = rig.database();
    let (mut client, _) = two.client(&rig).await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    client.send(&query("SELECT pg_sleep(5)")).await;
    rig.until(SessionState::Held).await;
    database.open(ServerRole::Target, Epoch(1));
    wait_for("it to move", || async { two.failpoints.is_held("session.adopt") }).await;
    let moving = async {
        // The cancel waits for its answer, and it is to be there before the session has moved.
        let _in_between = tokio::time::timeout(Duration::from_millis(500), std::future::pending::<()>()).await;
        two.failpoints.release("session.adopt");
    };
    tokio::join!(client.cancel(rig.port), moving);
    let messages = client.until_ready().await;
    let error = messages.iter().find(|message| message.tag == 'E');
    assert_eq!(error.expect("it is not run to its end").code(), "57014");
    // One that comes with nothing asked hits nothing that comes later.
    client.cancel(rig.port).await;
    client.send(&query(WHERE_AM_I)).await;
    assert_eq!(rows(&client.until_ready().await), ["target"]);
    rig.stop().await;
}
