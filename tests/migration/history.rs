//! A source that is not what it was: restored, failed over to a standby that lagged, or to one that did not. Its slot comes
//! along each time, so nothing but its history tells.

use std::path::{Path, PathBuf};
use std::process::Command;

use pgcutover::demo::cluster::Stop;

use crate::support::{connect, wait_for};
use crate::world::{World, create, drain, reach, spec};

/// A copy of a stopped server's files, with their owners.
struct Kept {
    data: PathBuf,
    _directory: tempfile::TempDir,
}

fn run(command: &mut Command) {
    assert!(command.status().expect("can be run").success(), "{command:?}");
}

impl World {
    fn stop_and_keep(&mut self) -> Kept {
        self.source.stop(Stop::Fast).expect("stopped");
        let directory = tempfile::tempdir().expect("a directory");
        let data = directory.path().join("data");
        run(Command::new("cp").arg("-a").arg(self.source.data_dir()).arg(&data));
        Kept { data, _directory: directory }
    }

    /// What the server has done since is gone.
    fn take_back(&mut self, kept: &Kept, standby: bool) {
        if self.source.pid().is_some() {
            self.source.stop(Stop::Immediate).expect("stopped");
        }
        let data = self.source.data_dir();
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
        self.source.start_again().expect("started");
    }

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
    let kept = world.stop_and_keep();
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
    world.take_back(&kept, false);
    fails_with_what_to_do(&world, "restored", "taken back").await;
}

/// The new primary has written past the position at which the target stands before anybody looks.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_lagged_is_not_followed_however_far_it_is_now() {
    let (mut world, kept) = followed("lagged").await;
    world.take_back(&kept, true);
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
    let kept = world.stop_and_keep();
    world.take_back(&kept, true);
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
