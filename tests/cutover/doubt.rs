//! Who is active, where that is in doubt: a decision that somebody else has written, servers that come back one after the other,
//! and locks that were lost before the decision.

use pgcutover::config::FencePolicy;
use pgcutover::cutover::coordinator::CutoverOptions;
use pgcutover::cutover::report::CutoverOutcome;
use pgcutover::demo::cluster::Stop;
use pgcutover::switch::{Epoch, Route, ServerRole};

use crate::support::link::Link;
use crate::support::stage::{NAME, Stage};
use crate::support::{PATIENCE, connect, wait_for};

/// Somebody else has decided it: the rows say where sessions go on, whatever this coordinator wanted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_that_finds_a_decision_leaves_nobody_waiting() {
    let stage = Stage::set().await;
    let life = stage.life("decide.before_boundary=hold").resolved().await;
    let running = life.cut_over_up_to("decide.before_boundary", life.options()).await;
    stage.somebody_writes("decided").await;
    assert!(life.coordinator.cancel(NAME));
    let report = running.await.expect("no panic");
    assert!(report.reason.contains("a person must look at both servers"), "{report:?}");
    assert!(report.hint.is_some_and(|hint| hint.contains("`pgcutover status`")), "{report:?}");
    wait_for("the gate to open", || async { life.runs_on(ServerRole::Target, 1) }).await;
    assert_eq!(stage.rows().await.0, [Some("decided".to_owned())]);
    life.stop().await;
}

/// As after a power cut: the server that was left is back first, and says nothing of a decision that stands on the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_before_both_servers_lets_nobody_onto_the_one_that_was_left() {
    let mut stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    assert_eq!(life.cut_over().await.outcome, CutoverOutcome::Switched);
    life.stop().await;
    drop(life);
    for cluster in [&mut stage.source, &mut stage.target] {
        cluster.stop(Stop::Immediate).expect("stopped");
    }
    let life = stage.life("").resolved().await;
    // `Life::route` would make the database known.
    let route = |name: &str| (*life.switchboard.route_of(name)).clone();
    assert!(matches!(route("shop"), Route::Unknown { .. }), "{:?}", route("shop"));
    stage.source.start_again().expect("started");
    let on_source = Route::To { server: ServerRole::Source, epoch: Epoch(0) };
    wait_for("the source to be read", || async { route("no cutover's") == on_source }).await;
    assert!(matches!(route("shop"), Route::Unknown { .. }), "{:?}", route("shop"));
    stage.target.start_again().expect("started");
    wait_for("the decision to be read", || async { life.runs_on(ServerRole::Target, 1) }).await;
    life.stop().await;
}

/// Under a soft fence it is our locks alone that keep a stranger from writing behind the marker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_that_has_lost_its_locks_does_not_decide() {
    let stage = Stage::set().await;
    let life = stage.life("decide.before_boundary=hold").resolved().await;
    let options = CutoverOptions { fence: FencePolicy::Soft, ..life.options() };
    let running = life.cut_over_up_to("decide.before_boundary", options).await;
    let stranger = connect(&stage.source, "shop").await;
    let lost =
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE '%/cutover-locks'";
    let ended: i64 = stranger.query_one(lost, &[]).await.expect("ended").get(0);
    assert_eq!(ended, 1);
    let script = "BEGIN READ WRITE; INSERT INTO item (name) VALUES ('behind the marker'); COMMIT";
    stranger.batch_execute(script).await.expect("written");
    life.failpoints.release("decide.before_boundary");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "the row is on the source alone: {report:?}");
    assert!(report.reason.contains("keep the migrated tables locked"), "{report:?}");
    assert!(life.runs_on(ServerRole::Source, 0));
}

/// It has promised nothing yet, so nobody has to wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_does_not_wait_for_a_target_that_says_nothing() {
    let mut stage = Stage::set().await;
    // For longer than this test waits for anything.
    stage.connect_timeout = 2 * PATIENCE;
    let link = Link::to(stage.target.address()).await;
    let life = stage.life_through("drain.after_applied=hold", &link).resolved().await;
    let running = life.cut_over_up_to("drain.after_applied", life.options()).await;
    link.stall(true);
    assert!(life.coordinator.cancel(NAME));
    wait_for("the gate to open", || async { life.runs_on(ServerRole::Source, 0) }).await;
    let source = connect(&stage.source, "shop").await;
    source.batch_execute("INSERT INTO item (name) VALUES ('after')").await.expect("the fence is lifted");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    link.stall(false);
    life.stop().await;
}
