//! One migration after another of the same database: what the first has left to undo is not undone under the second.

use pgcutover::migration::view::{MigrationSpec, Mode};

use crate::support::{connect, wait_for};
use crate::world::{World, create, drain, reach, spec};

/// Copies the shop and ends.
fn trial() -> MigrationSpec {
    MigrationSpec { mode: Mode::Offline, ..spec("trial", &["shop"]) }
}

/// Moves the shop, over what the trial has left on the target.
fn moving() -> MigrationSpec {
    MigrationSpec { overwrite_target: true, ..spec("move", &["shop"]) }
}

/// A table without a key: the server refuses this while changes are published and nothing identifies its rows.
async fn update_without_a_key(world: &World) {
    let update = "UPDATE log SET n = n + 1 WHERE what = 'nothing'";
    connect(&world.source, "shop").await.batch_execute(update).await.expect("the application's updates go through");
}

/// Replica identities and our schema, which the trial would take away when it is completed.
#[tokio::test(flavor = "multi_thread")]
async fn an_offline_migration_is_completed_before_the_next_begins() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, trial()).await;
    reach(&running, "trial", "Completed").await;
    let refused = running.engine.create(moving()).await.expect_err("the trial has something to undo").to_string();
    assert!(refused.contains("\"trial\"; complete that migration first"), "{refused}");

    running.engine.complete("trial").await.expect("completed");
    reach(&running, "trial", "Closed").await;
    world.assert_clean("shop").await;
    create(&running, moving()).await;
    reach(&running, "move", "WaitingForCutoverTrigger").await;
    update_without_a_key(&world).await;
    drain(&running, "move").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

/// As an older version let them begin: the trial was over for it as soon as it had copied.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_later_migration_needs_stays_until_that_is_over() {
    let world = World::same_major();
    world.furnish("shop").await;
    let set_state = async |state: &str| {
        let catalog = connect(&world.target, "postgres").await;
        let sql = "UPDATE pgcutover.migration SET state = $1 WHERE name = 'trial'";
        assert_eq!(catalog.execute(sql, &[&state]).await.expect("set"), 1);
    };
    let running = world.engine("");
    create(&running, trial()).await;
    reach(&running, "trial", "Completed").await;
    running.stop().await;
    set_state("Closed").await;
    let running = world.engine("");
    create(&running, moving()).await;
    reach(&running, "move", "WaitingForCutoverTrigger").await;
    running.stop().await;
    set_state("Completed").await;

    let running = world.engine("");
    wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
    let report = running.engine.complete("trial").await.expect("accepted");
    let left = |kind: &str| report.left.iter().filter(|left| left.object.kind == kind).count();
    assert_eq!((left("schema"), left("replica_identity")), (2, 1), "{report:#?}");
    update_without_a_key(&world).await;
    drain(&running, "move").await;
    world.assert_equal("shop").await;

    running.engine.cancel("move").await.expect("cancelled");
    wait_for("the trial to be closed", || async {
        running.engine.show("trial").is_ok_and(|view| view.substate == "Closed")
    })
    .await;
    world.assert_clean("shop").await;
    running.stop().await;
}

/// Each would have its stream, and write to the same tables of the target.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_migrations_that_want_a_database_at_once_one_has_it() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
    let (engine, wanted) = (&running.engine, |name: &str| spec(name, &["shop"]));
    let (one, other) = tokio::join!(engine.create(wanted("one")), engine.create(wanted("other")));
    assert_eq!([one.is_ok(), other.is_ok()].iter().filter(|accepted| **accepted).count(), 1, "{one:?} {other:?}");
    running.stop().await;
}
