//! The real daemon, killed: at every failpoint of a cutover, and at random moments of copy and stream, under write load.
//!
//! After each restart it must serve from exactly one side and go on by itself. At the end every acknowledged write must
//! be on the target, once. Kills are SIGKILL from outside, while the daemon hangs at the failpoint.

mod support;

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use pgcutover::cutover::steps::ALL_FAILPOINTS;
use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::compare;
use pgcutover::demo::shop::{SHOP, Size};
use pgcutover::demo::workload::Workload;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use support::daemon::{Daemon, DaemonOptions};
use support::{connect, shop, try_connect, two_clusters, wait_for, wait_for_within};

const NAME: &str = "move";

/// A copy under load on a busy machine.
const COPY_PATIENCE: Duration = Duration::from_secs(180);

/// Two clusters with the shop on the source, a daemon, and the application connected to it.
struct World {
    source: Cluster,
    target: Cluster,
    daemon: Daemon,
    size: Size,
}

impl World {
    async fn begin(scale: f64) -> Self {
        let (source, target) = two_clusters();
        let size = shop::build(&source, scale).await;
        // A machine that runs everything at once is no measure for pauses.
        let options = DaemonOptions::default()
            .section("cutover", "max_pause = \"60s\"\ndrain_timeout = \"30s\"\nmax_lag_at_start = \"1GB\"");
        let daemon = Daemon::start(&source, &target, options);
        Self { source, target, daemon, size }
    }

    /// Puts the clusters back to the beginning: starting others costs more.
    async fn begin_again(&mut self) {
        self.daemon.kill();
        let source = connect(&self.source, "postgres").await;
        wait_for("the slots to be free", || async {
            let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
            source.batch_execute(drop).await.is_ok()
        })
        .await;
        for cluster in [&self.source, &self.target] {
            let admin = connect(cluster, "postgres").await;
            admin.batch_execute("DROP SCHEMA pgcutover CASCADE").await.expect("ours");
            wait_for("nobody in the shop", || async { admin.batch_execute("DROP DATABASE shop").await.is_ok() }).await;
            admin.batch_execute("DROP ROLE shop").await.expect("it owns nothing any more");
        }
        self.size = shop::build(&self.source, 0.01).await;
        self.daemon.set_failpoints("");
        self.daemon.start_again();
    }

    /// Begins the migration and waits until it can be cut over.
    async fn migrate(&self) {
        self.daemon.must(&["migration", "create", NAME, "--database", SHOP]);
        self.wait_until_ready().await;
    }

    async fn wait_until_ready(&self) {
        wait_for_within(COPY_PATIENCE, "the migration to be ready", || async {
            let state = self.state();
            assert!(!state.contains("Fail"), "{state}");
            state == "WaitingForUserAction/WaitingForCutoverTrigger"
        })
        .await;
    }

    /// State and substate, or why they cannot be told just now.
    fn state(&self) -> String {
        let output = self.daemon.command(&["migration", "show", NAME, "--output", "json"]);
        let Ok(view) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else {
            return format!("no answer: {}", String::from_utf8_lossy(&output.stderr));
        };
        let word = |key: &str| view[key].as_str().unwrap_or("?").to_owned();
        format!("{}/{}", word("state"), word("substate"))
    }

    fn application(&self) -> Workload {
        shop::application(&self.daemon, 6, self.size)
    }

    /// Restarts the daemon with these failpoints, orders the cutover, and kills the daemon when it hangs.
    async fn crash_at(&mut self, failpoints: &str, name: &str) {
        self.daemon.kill();
        self.daemon.set_failpoints(failpoints);
        self.daemon.start_again();
        self.wait_until_ready().await;
        let mut order = self.daemon.begin(&["migration", "cutover", NAME]);
        let seen = format!("failpoint=\"{name}\"");
        let before = self.daemon.log().matches(&seen).count();
        wait_for(&format!("failpoint {name}"), || async { self.daemon.log().matches(&seen).count() > before }).await;
        self.daemon.kill();
        order.wait().expect("the command ends when its daemon does");
        self.daemon.set_failpoints("");
        self.daemon.start_again();
    }

    /// The port of the server that the proxy leads to, as soon as it serves.
    async fn serving_port(&self) -> u16 {
        let found = AtomicU16::new(0);
        wait_for("the proxy to serve", || async {
            let Ok(client) = try_connect(&self.daemon.client(SHOP)).await else { return false };
            let Ok(row) = client.query_one("SELECT inet_server_port()", &[]).await else { return false };
            found.store(u16::try_from(row.get::<_, i32>(0)).expect("a port"), Ordering::Relaxed);
            true
        })
        .await;
        found.into_inner()
    }

    /// Rows that say who is active: outcomes of fences on the source, of decisions on the target.
    async fn rows(&self) -> (Vec<Option<String>>, Vec<String>) {
        let fences = connect(&self.source, "postgres").await;
        let fences = fences.query("SELECT outcome FROM pgcutover.fence ORDER BY epoch", &[]).await.expect("readable");
        let decisions = connect(&self.target, "postgres").await;
        let decisions =
            decisions.query("SELECT outcome FROM pgcutover.decision ORDER BY epoch", &[]).await.expect("readable");
        (fences.iter().map(|row| row.get(0)).collect(), decisions.iter().map(|row| row.get(0)).collect())
    }

    /// The application goes on writing.
    async fn wait_for_writes(&self, application: &Workload, more: u64) {
        let writes = || application.tally().writes.load(Ordering::Relaxed);
        let wanted = writes() + more;
        wait_for("writes", || async { writes() > wanted }).await;
    }
}

/// Before the decision a crash leads back to the source, and the next cutover begins as if there had been none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_the_decision_it_resumes_on_the_source() {
    let mut world = World::begin(0.01).await;
    let application = world.application();
    world.migrate().await;
    for name in ALL_FAILPOINTS.iter().filter(|name| !is_after_the_decision(name)) {
        let failpoints = match name.strip_prefix("abort.") {
            Some(_) => format!("decide.before_decision=error;{name}=hang"),
            None => format!("{name}=hang"),
        };
        world.crash_at(&failpoints, name).await;
        assert_eq!(world.serving_port().await, world.source.port(), "{name}");
        world.wait_until_ready().await;
        let (fences, decisions) = world.rows().await;
        assert!(fences.iter().all(|outcome| outcome.as_deref() == Some("aborted")), "{name}: {fences:?}");
        assert!(decisions.iter().all(|outcome| outcome == "aborted"), "{name}: {decisions:?}");
        world.wait_for_writes(&application, 20).await;
    }
    let report = world.daemon.json(&["migration", "cutover", NAME]);
    assert_eq!(report["outcome"], "switched", "{report}");
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
        let application = world.application();
        world.migrate().await;
        world.crash_at(&format!("{name}=hang"), name).await;
        assert_eq!(world.serving_port().await, world.target.port(), "{name}");
        wait_for("the migration to be completed", || async { world.state() == "Succeeded/Completed" }).await;
        assert_eq!(world.rows().await, (vec![Some("decided".to_owned())], vec!["decided".to_owned()]), "{name}");
        let direct = try_connect(&world.source.config(SHOP)).await;
        assert!(direct.is_err(), "{name}: the old server lets writers in");
        world.wait_for_writes(&application, 200).await;
        let outcomes = application.finish().await;
        shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    }
}

/// Kills at random moments while tables are copied and changes streamed: the migration goes on, and what arrives is the
/// source. One seed replays: `CRASH_SEED=… cargo test --test crash random`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments_of_copy_and_stream_it_goes_on() {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("CRASH_SEED={seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut world = World::begin(0.03).await;
    let application = world.application();
    world.daemon.kill();
    // Tables are small; waiting in each keeps the copy long enough to be hit.
    world.daemon.set_failpoints("copy.snapshot_taken=sleep:400ms;copy.committed=sleep:400ms");
    world.daemon.start_again();
    world.daemon.must(&["migration", "create", NAME, "--database", SHOP]);
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(dice.random_range(50..2_500))).await;
        world.daemon.restart();
    }
    world.daemon.set_failpoints("");
    world.daemon.restart();
    world.wait_until_ready().await;
    for _ in 0..4 {
        world.wait_for_writes(&application, 50).await;
        tokio::time::sleep(Duration::from_millis(dice.random_range(0..500))).await;
        world.daemon.restart();
        world.wait_until_ready().await;
    }
    // Nobody writes from here on, so that every table can be compared.
    let outcomes = application.finish().await;
    let report = world.daemon.json(&["migration", "cutover", NAME]);
    assert_eq!(report["outcome"], "switched", "{report}");
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    let differences = compare::differences(&source, &target).await.expect("both can be read");
    assert_eq!(differences, Vec::<String>::new());
}

fn is_after_the_decision(failpoint: &str) -> bool {
    failpoint.starts_with("switch.") || failpoint == "decide.after_decision"
}
