//! Sessions that follow their database to another server.

use std::time::{Duration, Instant};

use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::{MoveOutcome, MoveState, SessionState};
use pgcutover::switch::{Epoch, ServerRole};

use crate::places::{POSTGRES, TO_TARGET, WHERE_AM_I, databases, soon, two_places};
use crate::rig::{Rig, server, text};
use crate::support::{PATIENCE, connect};
use crate::wire_client::{bind, execute, parse, query, rows, sync, tags};

async fn two() -> (Cluster, Cluster, Rig) {
    let (source, target) = two_places().await;
    let rig = Rig::start(server(&source), server(&target), |_| {});
    (source, target, rig)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_session_goes_on_with_everything_it_had() {
    let (_source, target, rig) = two().await;
    let database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    client.send(&query("SET app.tenant = '7'; SET work_mem = '5MB'; LISTEN news")).await;
    client.until_ready().await;
    client.send(&[parse("mine", WHERE_AM_I), sync()].concat()).await;
    client.until_ready().await;
    client.send(&[parse("", "SELECT current_setting('app.tenant')"), sync()].concat()).await;
    client.until_ready().await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].outcome, MoveOutcome::Ready, "{reports:?}");
    assert_eq!(rig.sessions.list()[0].moving, MoveState::Prepared);
    // Still on the source, with its unnamed statement.
    client.send(&[bind("mine"), execute(0), bind(""), execute(0), sync()].concat()).await;
    assert_eq!(rows(&client.until_ready().await), ["source", "7"]);
    // Touched: what changed since must come along.
    client.send(&query("SET app.tenant = '8'")).await;
    client.until_ready().await;
    client.send(&[parse("", "SELECT current_setting('app.tenant')"), sync()].concat()).await;
    client.until_ready().await;
    database.fence();
    database.wait_empty().await;
    client.send(&[bind("mine"), execute(0), bind(""), execute(0), sync()].concat()).await;
    rig.until(SessionState::Held).await;
    let reports = rig.sessions.settle_moves(&databases(), soon()).await;
    assert_eq!(reports[0].outcome, MoveOutcome::Ready, "{reports:?}");
    database.open(ServerRole::Target, Epoch(1));
    let messages = client.until_ready().await;
    assert_eq!(rows(&messages), ["target", "8"]);
    let reported = messages.iter().any(|message| message.tag == 'S' && message.body.starts_with(b"TimeZone\0"));
    assert!(reported, "{}", tags(&messages));
    client.send(&query("SHOW work_mem")).await;
    assert_eq!(rows(&client.until_ready().await), ["5MB"]);
    connect(&target, POSTGRES).await.batch_execute("NOTIFY news, 'from the target'").await.expect("sent");
    assert_eq!(client.next().await.map(|message| message.tag), Some('A'));
    let view = &rig.sessions.list()[0];
    assert_eq!((view.server, view.moving), (Some(ServerRole::Target), MoveState::Moved));
    rig.stop().await;
}

/// Few are let in at a time: the one who waited longest has said what it had to say, and is gone, before the listener
/// has followed.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_held_is_heard_though_it_leaves_before_the_listener_has_followed() {
    let (source, target) = two_places().await;
    let rig = Rig::start(server(&source), server(&target), |config| {
        config.limits.resume_rate = 1;
        config.pool.server_linger = Duration::ZERO;
    });
    let database = rig.database();
    let mut listener = rig.wire(POSTGRES).await;
    listener.send(&query("LISTEN news")).await;
    listener.until_ready().await;
    let mut speaker = rig.wire(POSTGRES).await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    speaker.send(&query("NOTIFY news, 'said'")).await;
    rig.until(SessionState::Held).await;
    database.wait_empty().await;
    rig.sessions.settle_moves(&databases(), soon()).await;
    database.open(ServerRole::Target, Epoch(1));
    speaker.until_ready().await;
    drop(speaker);
    let heard = tokio::time::timeout(PATIENCE, async {
        loop {
            let message = listener.next().await.expect("still connected");
            if message.tag == 'A' {
                return message.body;
            }
        }
    });
    assert!(heard.await.expect("the notification").ends_with(b"said\0"));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_listener_follows_at_once_and_old_backends_close() {
    let (source, target, rig) = two().await;
    let database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    client.send(&query("LISTEN news")).await;
    client.until_ready().await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    database.wait_empty().await;
    // Sent before the switch, one on each side: the source's is kept, the target's own is not the client's to hear.
    connect(&source, POSTGRES).await.batch_execute("NOTIFY news, 'old'").await.expect("sent");
    connect(&target, POSTGRES).await.batch_execute("NOTIFY news, 'applied'").await.expect("sent");
    rig.sessions.settle_moves(&databases(), soon()).await;
    database.open(ServerRole::Target, Epoch(1));
    let direct = connect(&source, POSTGRES).await;
    let left = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() \
                AND application_name NOT LIKE 'pgcutover/%'";
    crate::support::wait_for("the old backend to end", || async { text(&direct, left).await == "0" }).await;
    connect(&target, POSTGRES).await.batch_execute("NOTIFY news, 'new'").await.expect("sent");
    let mut heard = Vec::new();
    while heard.len() < 2 {
        let message = client.next().await.expect("still connected");
        if message.tag == 'A' {
            let mut rest = &message.body[4..];
            let mut next = || {
                let end = rest.iter().position(|byte| *byte == 0).expect("terminated");
                let text = String::from_utf8_lossy(&rest[..end]).into_owned();
                rest = &rest[end + 1..];
                text
            };
            next();
            heard.push(next());
        }
    }
    assert_eq!(heard, ["old", "new"]);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_never_prepared_moves_itself() {
    let (_source, _target, rig) = two().await;
    let database = rig.database();
    let mut idle = rig.wire(POSTGRES).await;
    let mut client = rig.wire(POSTGRES).await;
    client.send(&query("SET app.tenant = '9'")).await;
    client.until_ready().await;
    database.fence();
    client.send(&query("SELECT name || current_setting('app.tenant') FROM place")).await;
    database.wait_empty().await;
    database.open(ServerRole::Target, Epoch(1));
    assert_eq!(rows(&client.until_ready().await), ["target9"]);
    idle.send(&query(WHERE_AM_I)).await;
    assert_eq!(rows(&idle.until_ready().await), ["target"]);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_sessions_are_settled_and_busy_ones_follow_at_their_safe_point() {
    let (_source, _target, rig) = two().await;
    let database = rig.database();
    let mut busy = rig.wire(POSTGRES).await;
    busy.send(&query("BEGIN")).await;
    busy.until_ready().await;
    let reports =
        rig.sessions.prepare_moves(&databases(), TO_TARGET, Instant::now() + Duration::from_millis(300)).await;
    assert_eq!(reports[0].outcome, MoveOutcome::Busy);
    let mut late = rig.wire(POSTGRES).await;
    busy.send(&query("COMMIT")).await;
    busy.until_ready().await;
    crate::support::wait_for("the busy one to prepare", || async {
        rig.sessions.list().iter().any(|session| session.moving == MoveState::Prepared)
    })
    .await;
    database.fence();
    database.wait_empty().await;
    let reports = rig.sessions.settle_moves(&databases(), soon()).await;
    assert_eq!(reports.len(), 2);
    assert!(reports.iter().all(|report| report.outcome == MoveOutcome::Ready), "{reports:?}");
    database.open(ServerRole::Target, Epoch(1));
    for client in [&mut busy, &mut late] {
        client.send(&query(WHERE_AM_I)).await;
        assert_eq!(rows(&client.until_ready().await), ["target"]);
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_leaves_the_session_where_it_was() {
    let (_source, target, rig) = two().await;
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
    let direct = connect(&target, POSTGRES).await;
    let left =
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    crate::support::wait_for("prepared backends to close", || async { text(&direct, left).await == "0" }).await;
    assert_eq!(rig.sessions.list()[0].moving, MoveState::None);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_move_is_named_and_ends_when_the_operator_says_so() {
    let (_source, _target, rig) = two().await;
    let database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    client.send(&query("CREATE TEMPORARY TABLE mine(a int)")).await;
    client.until_ready().await;
    let reports = rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    assert!(matches!(&reports[0].outcome, MoveOutcome::Blocked(blockers) if blockers.len() == 1), "{reports:?}");
    assert_eq!(rig.sessions.list()[0].blockers.len(), 1);
    // It goes away, and the session can be moved.
    client.send(&query("DROP TABLE mine")).await;
    client.until_ready().await;
    database.fence();
    let reports = rig.sessions.settle_moves(&databases(), soon()).await;
    assert_eq!(reports[0].outcome, MoveOutcome::Ready);
    rig.sessions.discard_moves(&databases());
    database.reopen();
    client.send(&query("CREATE TEMPORARY TABLE mine(a int)")).await;
    client.until_ready().await;
    database.fence();
    database.open(ServerRole::Target, Epoch(1));
    let error = client.next().await.expect("an error");
    assert_eq!((error.tag, error.code().as_str()), ('E', "57P01"));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stood_in_the_way_of_a_move_is_shown_until_the_session_runs_something_more() {
    let (_source, _target, rig) = two().await;
    let _database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    client.send(&query("CREATE TEMPORARY TABLE mine(a int)")).await;
    client.until_ready().await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    rig.sessions.discard_moves(&databases());
    let given_up = || async { rig.sessions.list()[0].moving == MoveState::None };
    crate::support::wait_for("the move to be given up", given_up).await;
    assert_eq!(rig.sessions.list()[0].blockers.len(), 1);
    client.send(&query("DROP TABLE mine")).await;
    client.until_ready().await;
    let forgotten = || async { rig.sessions.list()[0].blockers.is_empty() };
    crate::support::wait_for("what stood in the way to be forgotten", forgotten).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_old_backend_is_ended_first_does_not_notice() {
    let (source, _target, rig) = two().await;
    let database = rig.database();
    let mut client = rig.wire(POSTGRES).await;
    rig.sessions.prepare_moves(&databases(), TO_TARGET, soon()).await;
    database.fence();
    database.wait_empty().await;
    rig.sessions.settle_moves(&databases(), soon()).await;
    let pid = rig.sessions.list()[0].backend_pid.expect("has one");
    text(&connect(&source, POSTGRES).await, &format!("SELECT pg_terminate_backend({pid})")).await;
    crate::support::wait_for("the loss to be noticed", || async { rig.sessions.list()[0].backend_pid.is_none() }).await;
    client.send(&query(WHERE_AM_I)).await;
    database.open(ServerRole::Target, Epoch(1));
    assert_eq!(rows(&client.until_ready().await), ["target"]);
    rig.stop().await;
}
