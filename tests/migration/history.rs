//! A source that is not what it was: restored, failed over to a standby that lagged, or to one that did not. Its slot comes
//! along each time, so nothing but its history tells. After a cutover the same of the target.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI64, Ordering};

use pgcutover::catalog::decision::Outcome;
use pgcutover::demo::cluster::{Cluster, Stop};
use pgcutover::switch::Epoch;

use crate::support::{connect, wait_for};
use crate::world::{Running, World, create, drain, reach, spec};

/// A copy of a stopped server's files, with their owners.
struct Kept {
    data: PathBuf,
    _directory: tempfile::TempDir,
}

fn run(command: &mut Command) {
    assert!(command.status().expect("can be run").success(), "{command:?}");
}

fn stop_and_keep(cluster: &mut Cluster) -> Kept {
    cluster.stop(Stop::Fast).expect("stopped");
    let directory = tempfile::tempdir().expect("a directory");
    let data = directory.path().join("data");
    run(Command::new("cp").arg("-a").arg(cluster.data_dir()).arg(&data));
    Kept { data, _directory: directory }
}

/// What the server has done since is gone.
fn take_back(cluster: &mut Cluster, kept: &Kept, standby: bool) {
    if cluster.pid().is_some() {
        cluster.stop(Stop::Immediate).expect("stopped");
    }
    let data = cluster.data_dir();
    run(Command::new("sh")
        .arg("-c")
        .arg(r#"find "$0" -mindepth 1 -delete && cp -a "$1"/. "$0""#)
        .arg(&data)
        .arg(&kept.data));
    if standby {
        // Of the same owner as the rest.
        let signal = |from: &Path| run(Command::new("cp").arg("-a").arg(from).arg(data.join("standby.signal")));
        signal(&data.join("PG_VERSION"));
    }
    cluster.start_again().expect("started");
}

impl World {
    /// The standby that was started becomes the source, on another timeline.
    async fn promote(&self) {
        let admin = connect(&self.source, "postgres").await;
        admin.batch_execute("SELECT pg_promote()").await.expect("promoted");
        wait_for("the end of recovery", || async {
            let row = admin.query_one("SELECT pg_is_in_recovery()", &[]).await.expect("readable");
            !row.get::<_, bool>(0)
        })
        .await;
    }
}

/// Another row each time.
const WRITE: &str = "INSERT INTO acknowledged SELECT 9, max(n) + 1 FROM (SELECT n FROM acknowledged UNION SELECT 0) a";

/// A migration that follows, stopped; with it the state of the source before what it has applied last.
async fn followed(name: &str) -> (World, Kept) {
    let mut world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec(name, &["shop"])).await;
    reach(&running, name, "WaitingForCutoverTrigger").await;
    running.stop().await;
    let kept = stop_and_keep(&mut world.source);
    world.source.start_again().expect("started");
    let running = world.engine("");
    reach(&running, name, "WaitingForCutoverTrigger").await;
    connect(&world.source, "shop").await.batch_execute(WRITE).await.expect("written");
    drain(&running, name).await;
    running.stop().await;
    (world, kept)
}

async fn fails_with_what_to_do(world: &World, name: &str, words: &str) {
    let running = world.engine("");
    wait_for("the failure", || async { running.engine.show(name).is_ok_and(|view| view.substate == "Failed") }).await;
    let error = running.engine.show(name).expect("known").error.expect("a reason");
    assert_eq!(error.code, "source_history", "{error:?}");
    assert!(error.message.contains(words) && error.hint.is_some(), "{error:?}");
    // Trying again does not pass over it.
    running.engine.retry(name).await.expect("accepted");
    wait_for("the second failure", || async { running.engine.show(name).is_ok_and(|view| view.substate == "Failed") })
        .await;
    running.engine.cancel(name).await.expect("cancelled");
    world.assert_clean("shop").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_restored_is_not_followed() {
    let (mut world, kept) = followed("restored").await;
    take_back(&mut world.source, &kept, false);
    fails_with_what_to_do(&world, "restored", "taken back").await;
}

/// It has written past the position at which the target stands after somebody has looked, and its slot says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_restored_is_not_followed_when_it_has_written_as_much_again() {
    let (mut world, kept) = followed("passed").await;
    take_back(&mut world.source, &kept, false);
    let said = |running: &Running| {
        let view = running.engine.show("passed").ok().filter(|view| view.substate == "Failed");
        view.and_then(|view| view.error).map(|error| error.message).unwrap_or_default()
    };
    let running = world.engine("");
    wait_for("the failure", || async { said(&running).contains("taken back") }).await;
    running.stop().await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute(WRITE).await.expect("written");
    let far = "SELECT pg_logical_emit_message(false, 'far', repeat('x', 1024 * 1024)) FROM generate_series(1, 20)";
    source.batch_execute(far).await.expect("written");
    // That it was found is kept on the target: another engine knows it too.
    let running = world.engine("");
    wait_for("the failure of before", || async { said(&running).contains("taken back") }).await;
    running.engine.retry("passed").await.expect("accepted");
    wait_for("another one", || async { said(&running).contains("had been taken back") }).await;
    running.stop().await;
    fails_with_what_to_do(&world, "passed", "had been taken back").await;
}

/// The new primary has written past the position at which the target stands before anybody looks.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_lagged_is_not_followed_however_far_it_is_now() {
    let (mut world, kept) = followed("lagged").await;
    take_back(&mut world.source, &kept, true);
    world.promote().await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute(WRITE).await.expect("written");
    let far = "SELECT pg_logical_emit_message(false, 'far', repeat('x', 1024 * 1024)) FROM generate_series(1, 20)";
    source.batch_execute(far).await.expect("written");
    fails_with_what_to_do(&world, "lagged", "was promoted at").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_has_everything_is_followed_on() {
    let (mut world, _) = followed("promoted").await;
    let kept = stop_and_keep(&mut world.source);
    take_back(&mut world.source, &kept, true);
    // While it is a standby it is waited for.
    let running = world.engine("");
    wait_for("the reason why it waits", || async {
        let Ok(view) = running.engine.show("promoted") else { return false };
        assert_ne!(view.substate, "Failed", "{:?}", view.error);
        let why = view.databases[0].last_error.clone().unwrap_or_default();
        why.contains("in recovery") || why.contains("read-only transaction")
    })
    .await;
    world.promote().await;
    connect(&world.source, "shop").await.batch_execute(WRITE).await.expect("written");
    wait_for("the stream", || async {
        running.engine.show("promoted").is_ok_and(|view| view.databases[0].latency_bytes.is_some())
    })
    .await;
    drain(&running, "promoted").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

/// The generation that has claimed the progress of the stream back, once it is later than this one.
async fn claimed(world: &World, before: i64) -> i64 {
    let source = connect(&world.source, "shop").await;
    let found = AtomicI64::new(before);
    wait_for("the stream back", || async {
        let sql = "SELECT generation FROM pgcutover.progress WHERE migration = 'back/1'";
        let row = source.query_opt(sql, &[]).await.expect("readable");
        found.store(row.map_or(before, |row| row.get(0)), Ordering::Relaxed);
        found.load(Ordering::Relaxed) > before
    })
    .await;
    found.into_inner()
}

/// The source has been written to by engines that the target has forgotten; no other one has taken over.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_was_restored_is_told_after_any_number_of_starts() {
    let mut world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("back", &["shop"])).await;
    reach(&running, "back", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("back").await.expect("ready");
    lease.prepare_return(Epoch(1)).await.expect("prepared");
    lease.finish(Outcome::Decided).await.expect("recorded");
    reach(&running, "back", "Completed").await;
    let mut generation = claimed(&world, 0).await;
    running.stop().await;
    let kept = stop_and_keep(&mut world.target);
    world.target.start_again().expect("started");
    for _ in 0..2 {
        let running = world.engine("");
        generation = claimed(&world, generation).await;
        running.stop().await;
    }
    take_back(&mut world.target, &kept, false);
    let running = world.engine("");
    wait_for("the reason", || async {
        let error = running.engine.show("back").ok().and_then(|view| view.error);
        error.is_some_and(|error| {
            let is_told = error.code == "source_history" && error.message.contains("taken back");
            is_told && error.hint.is_some_and(|hint| hint.contains("complete"))
        })
    })
    .await;
    running.stop().await;
}
