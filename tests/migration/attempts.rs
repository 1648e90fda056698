//! One cutover after another of the same migration: what one has left is not the next one's.

use std::time::{Duration, Instant};

use pgcutover::catalog::decision::Outcome;
use pgcutover::switch::Epoch;

use crate::support::{connect, wait_for};
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

/// Our schema stays there when a migration of the control database itself is cancelled, and with it was kept what had been
/// restored: the next one restored nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_control_database_that_was_emptied_is_migrated_again() {
    let world = World::same_major();
    let source = connect(&world.source, "postgres").await;
    source.batch_execute("CREATE TABLE held (k int PRIMARY KEY); INSERT INTO held VALUES (1)").await.expect("made");
    let running = world.engine("");
    for name in ["first", "second"] {
        create(&running, spec(name, &["postgres"])).await;
        reach(&running, name, "WaitingForCutoverTrigger").await;
        running.engine.cancel(name).await.expect("accepted");
        reach(&running, name, "Cancelled").await;
        let target = connect(&world.target, "postgres").await;
        target.batch_execute("DROP TABLE held").await.expect("it was brought over");
    }
    running.stop().await;
}

/// The cutover is taken back all the same: what is missing is the way to the target, and that is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_leaves_no_room_for_a_stream_says_what_is_missing() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("full", &["shop"])).await;
    reach(&running, "full", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("full").await.expect("ready");
    lease.prepare_return(Epoch(1)).await.expect("prepared");
    lease.finish(Outcome::Decided).await.expect("recorded");
    reach(&running, "full", "Completed").await;
    let source = connect(&world.source, "postgres").await;
    let drop_all = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active";
    wait_for("the slot that was left to be free", || async {
        source.batch_execute(drop_all).await.is_ok()
            && source
                .query_one("SELECT count(*) FROM pg_replication_slots", &[])
                .await
                .expect("counts")
                .get::<_, i64>(0)
                == 0
    })
    .await;
    let fill = "SELECT pg_create_physical_replication_slot('full_' || n)
                  FROM generate_series(1, current_setting('max_replication_slots')::int) n";
    source.batch_execute(fill).await.expect("free slots");
    let lease = running.engine.begin_rollback("full").await.expect("possible");
    let notes = lease.prepare_return(Epoch(2)).await.expect("it goes on without");
    assert!(notes.iter().any(|note| note.contains("free replication slots")), "{notes:?}");
    lease.finish(Outcome::Decided).await.expect("recorded");
    let failed = || async { running.engine.show("full").is_ok_and(|view| view.substate == "Failed") };
    wait_for("the failure", failed).await;
    let error = running.engine.show("full").expect("known").error.expect("why");
    assert!(error.code == "slot_missing" && error.message.contains("was rolled back"), "{error:?}");
    running.stop().await;
}
