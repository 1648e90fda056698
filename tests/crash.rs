//! The real daemon, killed: at every failpoint of a cutover, and at random moments of copy and stream, under write load.
//!
//! After each restart it must serve from exactly one side and go on by itself. At the end every acknowledged write must
//! be on the target, once. Kills are SIGKILL from outside, while the daemon hangs at the failpoint.

mod support;

use std::time::Duration;

use pgcutover::cutover::steps::{ALL_FAILPOINTS, ROLLBACK_FAILPOINTS};
use pgcutover::demo::compare;
use pgcutover::demo::shop::SHOP;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use support::world::{COMPLETED, NAME, READY, World};
use support::{connect, connect_with, shop, wait_for};

/// Before the decision a crash leads back to the source, and the next cutover begins as if there had been none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_the_decision_it_resumes_on_the_source() {
    let mut world = World::begin(0.01).await;
    let application = world.application(6);
    world.migrate().await;
    for name in ALL_FAILPOINTS.iter().filter(|name| !is_after_the_decision(name)) {
        let failpoints = match name.strip_prefix("abort.") {
            Some(_) => format!("decide.before_decision=error;{name}=hang"),
            None => format!("{name}=hang"),
        };
        world.crash_at(READY, "cutover", &failpoints, name).await;
        assert_eq!(world.serving_port().await, world.source.port(), "{name}");
        world.wait_until(READY).await;
        let ((fences, _), (_, decisions)) = (world.rows(&world.source).await, world.rows(&world.target).await);
        assert!(fences.iter().all(|outcome| outcome.as_deref() == Some("aborted")), "{name}: {fences:?}");
        assert!(decisions.iter().all(|outcome| outcome == "aborted"), "{name}: {decisions:?}");
        world.wait_for_writes(&application, 20).await;
    }
    world.must_switch("cutover");
    world.wait_for_writes(&application, 200).await;
    assert_eq!(world.serving_port().await, world.target.port());
    let outcomes = application.finish().await;
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
}

/// From the decision on a crash leads to the target.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_the_decision_it_goes_on_on_the_target() {
    let mut world = World::begin(0.01).await;
    for (round, name) in ALL_FAILPOINTS.iter().filter(|name| is_after_the_decision(name)).enumerate() {
        if round > 0 {
            world.begin_again().await;
        }
        let application = world.application(6);
        world.migrate().await;
        world.crash_at(READY, "cutover", &format!("{name}=hang"), name).await;
        assert_eq!(world.serving_port().await, world.target.port(), "{name}");
        world.wait_until(COMPLETED).await;
        let ((fences, _), (_, decisions)) = (world.rows(&world.source).await, world.rows(&world.target).await);
        assert_eq!((fences, decisions), (vec![Some("decided".to_owned())], vec!["decided".to_owned()]), "{name}");
        world.must_be_shut(&world.source).await;
        world.wait_for_writes(&application, 200).await;
        let outcomes = application.finish().await;
        shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    }
}

/// A fault of the program in one cutover ends that attempt alone: what it left is settled, nobody who is served notices, and the
/// next attempt begins as if there had been none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_whose_task_dies_at_any_step_costs_no_client_anything() {
    // Each takes some seconds, so every run takes half of them.
    let mut dice = rand::rng();
    let mut names = [ALL_FAILPOINTS, ROLLBACK_FAILPOINTS].concat();
    names.retain(|_| dice.random_bool(0.5));
    println!("it dies at {names:?}");
    let dying: String = names.iter().map(|name| format!("{name}=panic;")).collect();
    let world = World::begin_with(0.01, |options| options.failpoints(&dying)).await;
    let application = world.application(6);
    world.migrate().await;
    let has_died = |name: &str| world.daemon.log().contains(&format!("failpoint=\"{name}\" action=Panic"));
    let left = || names.iter().copied().filter(|name| !has_died(name)).collect::<Vec<_>>();
    // A rehearsal gets as far as the decision, and takes everything back.
    let mut rehearses = true;
    for _ in 0..3 * names.len() {
        let before = left();
        if before.is_empty() {
            break;
        }
        let order = if world.state() == READY { "cutover" } else { "rollback" };
        // Then one gives up by itself, because somebody stays inside.
        let gives_up = !rehearses && before.iter().any(|name| name.starts_with("abort."));
        let stays = if gives_up { Some(connect_with(&world.daemon.client(SHOP)).await) } else { None };
        if let Some(stays) = &stays {
            stays.batch_execute("BEGIN; SELECT FROM shop.film LIMIT 1").await.expect("is inside");
        }
        let how: &[&str] = match (rehearses, gives_up) {
            (true, _) => &["--dry-run"],
            (false, true) => &["--drain-timeout", "300ms"],
            (false, false) => &[],
        };
        let arguments = [&["migration", order, NAME], how].concat();
        let went_through = world.daemon.command(&arguments).status.success();
        drop(stays);
        let after = left();
        assert!(went_through || after.len() < before.len(), "{arguments:?} fails, and nobody died");
        wait_for("the migration to be at rest", || async {
            [READY, COMPLETED].contains(&world.state().as_str())
                && world.view()["databases"][0]["latency_bytes"].is_u64()
        })
        .await;
        world.wait_for_writes(&application, 20).await;
        wait_for("nobody to be prepared for a move", || async {
            let status = world.daemon.json(&["status"]);
            let sessions = status["sessions"].as_array().cloned().unwrap_or_default();
            sessions.iter().all(|session| session["prepared"] == false)
        })
        .await;
        let status = world.daemon.json(&["status"]);
        assert_ne!(status["cutovers"][NAME]["outcome"], "running", "{status}");
        rehearses &= !went_through;
    }
    assert_eq!(left(), Vec::<&str>::new());
    if world.state() == READY {
        world.daemon.must(&["migration", "cutover", NAME]);
    }
    world.wait_for_writes(&application, 50).await;
    assert_eq!(world.serving_port().await, world.target.port());
    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
}

/// Kills at random moments while tables are copied and changes streamed: the migration goes on, and what arrives is the
/// source. One seed replays: `CRASH_SEED=… cargo test --test crash random`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments_of_copy_and_stream_it_goes_on() {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("CRASH_SEED={seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut world = World::begin(0.03).await;
    let application = world.application(6);
    world.daemon.kill();
    // Tables are small; waiting in each keeps the copy long enough to be hit.
    world.daemon.set_failpoints("copy.snapshot_taken=sleep:400ms;copy.committed=sleep:400ms");
    world.daemon.start_again();
    world.daemon.must(&["migration", "create", NAME, "--database", SHOP]);
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(dice.random_range(50..2_500))).await;
        world.daemon.restart();
    }
    world.daemon.restart_with("");
    world.wait_until(READY).await;
    for _ in 0..4 {
        world.wait_for_writes(&application, 50).await;
        tokio::time::sleep(Duration::from_millis(dice.random_range(0..500))).await;
        world.daemon.restart();
        world.wait_until(READY).await;
    }
    // Nobody writes from here on, so that every table can be compared.
    let outcomes = application.finish().await;
    world.must_switch("cutover");
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    let differences = compare::differences(&source, &target).await.expect("both can be read");
    assert_eq!(differences, Vec::<String>::new());
}

fn is_after_the_decision(failpoint: &str) -> bool {
    failpoint.starts_with("switch.") || failpoint == "decide.after_decision"
}
