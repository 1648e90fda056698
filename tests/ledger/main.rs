//! A ledger kept by clients of the proxy, checked across cutovers, rollbacks, aborts and crashes.
//!
//! Clients write numbered entries and move money between accounts, and remember what they were told; they read what they
//! have written, and never see it go back. Meanwhile a seeded schedule orders cutovers and rollbacks and lets things go
//! wrong: processes killed and stopped, servers stopped, links cut and stalled, steps that fail. At the end what the
//! clients remember is compared with what the server holds, and both servers with each other.
//!
//! ```text
//! cargo test --test ledger                                          a few schedules
//! LEDGER_SEEDS=1000 cargo test --test ledger seeded -- --nocapture  so many
//! LEDGER_SEED=42 cargo test --test ledger seeded -- --nocapture     that one
//! LEDGER_STAGES=4                                                   so many at a time, each on servers of its own
//! ```
//!
//! A checker that cannot fail shows nothing: with a drain that does not wait (failpoint `drain.wait_applied=skip`) it must find what is lost.

#[path = "../support/mod.rs"]
mod support;

mod clients;
mod schedule;

use std::sync::Mutex;

use clients::{Clients, Violations};
use schedule::Schedule;
use support::world::{COMPLETED, READY};
use tokio::runtime::Builder;

/// Schedules that every run of the tests takes.
const SHARE: u64 = 3;

#[test]
fn seeded_schedules_of_faults_lose_double_and_reorder_nothing() {
    let read = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, count) = match read("LEDGER_SEED") {
        Some(seed) => (seed, 1),
        None => {
            let first = read("LEDGER_FIRST").unwrap_or_else(|| u64::from(rand::random::<u32>()));
            (first, read("LEDGER_SEEDS").unwrap_or(SHARE))
        }
    };
    // Most of a schedule is waiting, so several stages can share a machine. Each has a runtime: orders block its threads.
    let left = Mutex::new(first..first + count);
    let work = async || {
        let mut stage = schedule::Stage::set("").await;
        loop {
            let next = left.lock().expect("no stage failed").next();
            let Some(seed) = next else { break };
            play(&mut stage, seed).await;
        }
    };
    std::thread::scope(|threads| {
        for _ in 0..read("LEDGER_STAGES").unwrap_or(1).min(count) {
            threads.spawn(|| {
                let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
                runtime.block_on(work());
            });
        }
    });
    println!("{count} schedules, no violation");
}

/// One schedule from its beginning to what it left.
async fn play(stage: &mut schedule::Stage, seed: u64) {
    let schedule = Schedule::of(seed);
    println!("LEDGER_SEED={seed} {:?}", schedule.steps);
    stage.forget_entries().await;
    let clients = Clients::start(&stage.world.daemon, seed);
    for step in &schedule.steps {
        stage.play(step).await;
    }
    // Everything is well again, and there is one more switch with nobody in the way.
    stage.settle().await;
    clients.go_on_writing().await;
    let memories = clients.finish().await;
    let order = if stage.world.state() == READY { "cutover" } else { "rollback" };
    stage.must_switch(order).await;
    let violations = stage.check(&memories).await;
    assert_eq!(violations, Violations::default(), "LEDGER_SEED={seed} {schedule:?}");
    let errors: u64 = memories.iter().map(|memory| memory.errors).sum();
    assert!(errors == 0 || schedule.may_be_felt(), "LEDGER_SEED={seed}: {errors} errors from {schedule:?}");
}

/// The same checker on a drain that does not wait for what was written: it must not stay silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checker_finds_what_a_lying_drain_loses() {
    // The apply lags behind by more than a pause takes on a busy machine, so that there is something to lose.
    let mut stage = schedule::Stage::set("drain.wait_applied=skip;apply.before_commit=sleep:3000ms").await;
    let clients = Clients::start(&stage.world.daemon, 1);
    clients.go_on_writing().await;
    stage.must_switch("cutover").await;
    stage.world.wait_until(COMPLETED).await;
    let memories = clients.finish().await;
    let found = stage.check(&memories).await;
    // What is late may arrive behind the switch: then nothing is missing in the end, but clients have seen it missing.
    assert!(found.lost + found.not_read + found.went_back + found.sums > 0, "{found:?}");
}
