//! One cutover after another of the same migration: what one has left is not the next one's.

use std::time::{Duration, Instant};

use pgcutover::catalog::decision::Outcome;
use pgcutover::switch::Epoch;

use crate::support::connect;
use crate::world::{World, create, reach, spec};

/// Longer than the engine waits before it tries again what it could not do.
const AFTER_THE_NEXT_TRY: Duration = Duration::from_secs(7);

/// It could not be recorded when it fell, and was told when the next cutover began; that one has no verdict yet.
#[tokio::test(flavor = "multi_thread")]
async fn the_verdict_of_one_cutover_is_not_told_of_the_next() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("again", &["shop"])).await;
    reach(&running, "again", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("again").await.expect("ready");
    let target = connect(&world.target, "postgres").await;
    target
        .batch_execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON pgcutover.migration FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await
        .expect("made");
    lease.finish(Outcome::Aborted).await.expect_err("it cannot be recorded");
    target.batch_execute("DROP TRIGGER refuse ON pgcutover.migration").await.expect("dropped");
    let lease = running.engine.begin_cutover("again").await.expect("the verdict is told first");
    lease.prepare_return(Epoch(1)).await.expect("prepared");
    let until = Instant::now() + AFTER_THE_NEXT_TRY;
    while Instant::now() < until {
        let substate = running.engine.show("again").expect("there").substate;
        assert_eq!(substate, "CompletingMigration", "it was taken away from its cutover");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    lease.finish(Outcome::Aborted).await.expect("recorded");
    running.stop().await;
}

/// Removed later it would be removed together with what the next cutover has prepared.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_cutover_has_left_is_removed_before_the_next_begins() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("engine.before_undo=error");
    create(&running, spec("left", &["shop"])).await;
    reach(&running, "left", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("left").await.expect("ready");
    lease.prepare_return(Epoch(1)).await.expect("prepared");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    lease.prepare_return(Epoch(1)).await.expect_err("it is over");
    let refused = running.engine.begin_cutover("left").await.expect_err("something is left").to_string();
    assert!(refused.contains("could not be removed yet"), "{refused}");
    running.stop().await;
    let running = world.engine("");
    reach(&running, "left", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("left").await.expect("nothing is left");
    lease.prepare_return(Epoch(2)).await.expect("prepared");
    lease.finish(Outcome::Decided).await.expect("recorded");
    let view = reach(&running, "left", "Completed").await;
    assert!(view.databases[0].rollback_possible, "{view:?}");
    running.stop().await;
}
