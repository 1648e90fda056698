//! Writes are slowed down while a cutover is prepared and the other server is too far behind. How far it is, the tests say.

mod support;

use std::time::Duration;

use pgcutover::cutover::coordinator::CutoverOptions;
use pgcutover::cutover::report::CutoverOutcome;
use pgcutover::switch::ServerRole;
use support::stage::{Life, NAME, Stage};
use support::{PATIENCE, connect_with, wait_for};

const DELAY: Duration = Duration::from_millis(20);
const FAR_BEHIND: Option<u64> = Some(1 << 40);

fn behind(life: &Life, bytes: Option<u64>) {
    *life.engine.lag_bytes.lock().expect("not poisoned") = bytes;
}

async fn wait_for_delay(life: &Life, delay: Duration) {
    let database = life.switchboard.database("shop");
    wait_for(&format!("a delay of {delay:?}"), || async { database.write_delay() == delay }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_are_slowed_down_until_the_cutover_can_go_on_and_not_beyond() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("prepare.before_fence=hold").resolved().await;
    let options = CutoverOptions { throttle_writes: DELAY, throttle_for: PATIENCE, ..life.options() };
    let client = connect_with(&life.client("writer")).await;
    let run = |options| {
        let coordinator = life.coordinator.clone();
        tokio::spawn(async move { coordinator.run(NAME, options).await.expect("the migration is ready") })
    };

    // Whoever gives it up ends the delay.
    behind(&life, FAR_BEHIND);
    let running = run(options);
    wait_for_delay(&life, DELAY).await;
    for n in 0..5 {
        client.execute("INSERT INTO item (name) VALUES ($1)", &[&n.to_string()]).await.expect("slow, and no error");
        client.query_one("SELECT count(*) FROM item", &[]).await.expect("readable");
    }
    assert!(life.coordinator.cancel(NAME));
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    assert_eq!(life.switchboard.database("shop").write_delay(), Duration::ZERO);
    assert!(report.notes.iter().any(|note| note.contains("delayed by up to 20 ms")), "{report:?}");

    // It follows the lag, as long as the cutover is prepared; it goes on at what is allowed.
    let running = run(options);
    wait_for_delay(&life, DELAY).await;
    let allowed = options.max_lag_at_start_bytes;
    behind(&life, Some(allowed / 4 * 3));
    wait_for("the cutover to go on", || async { life.failpoints.is_held("prepare.before_fence") }).await;
    wait_for_delay(&life, DELAY / 2).await;
    behind(&life, Some(allowed / 2));
    wait_for_delay(&life, Duration::ZERO).await;
    behind(&life, FAR_BEHIND);
    wait_for_delay(&life, DELAY).await;
    life.failpoints.release("prepare.before_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert_eq!(life.switchboard.database("shop").write_delay(), Duration::ZERO);
    client.execute("INSERT INTO item (name) VALUES ('there')", &[]).await.expect("it writes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_that_is_not_helped_by_it_is_refused_and_says_so() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    behind(&life, FAR_BEHIND);
    let options = CutoverOptions { throttle_writes: DELAY, throttle_for: Duration::from_millis(100), ..life.options() };
    let report = life.cut_over_with(options).await;
    assert_eq!((report.outcome, report.forceable), (CutoverOutcome::Aborted, true), "{report:?}");
    assert!(report.reason.contains("slowed down by up to 20ms each were not enough"), "{report:?}");
    assert_eq!(life.switchboard.database("shop").write_delay(), Duration::ZERO);
    assert!(life.runs_on(ServerRole::Source, 0));
}
