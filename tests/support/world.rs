//! Two clusters with the shop on the source, the daemon, and the application connected to it: for tests that cut over, roll
//! back, kill and start again under load.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::shop::{SHOP, Size};
use pgcutover::demo::workload::Workload;

use super::daemon::{Daemon, DaemonOptions};
use super::{connect, shop, try_connect, two_clusters, wait_for, wait_for_within};

/// Name of the migration.
pub const NAME: &str = "move";

/// A copy under load on a busy machine.
const COPY_PATIENCE: Duration = Duration::from_secs(180);

/// What `migration show` says of a migration that is ready to be cut over.
pub const READY: &str = "WaitingForUserAction/WaitingForCutoverTrigger";

/// What it says of one that was cut over.
pub const COMPLETED: &str = "Succeeded/Completed";

/// See the module.
pub struct World {
    pub source: Cluster,
    pub target: Cluster,
    pub daemon: Daemon,
    pub size: Size,
}

impl World {
    pub async fn begin(scale: f64) -> Self {
        Self::begin_with(scale, |options| options).await
    }

    /// The same with the daemon's options changed.
    pub async fn begin_with(scale: f64, change: impl FnOnce(DaemonOptions) -> DaemonOptions) -> Self {
        let (source, target) = two_clusters();
        let size = shop::build(&source, scale).await;
        let options = DaemonOptions::default().section("cutover", "max_lag_at_start = \"1GB\"");
        let daemon = Daemon::start(&source, &target, change(options));
        Self { source, target, daemon, size }
    }

    /// Puts the clusters back to the beginning: starting others costs more.
    pub async fn begin_again(&mut self) {
        self.daemon.kill();
        for cluster in [&self.source, &self.target] {
            let admin = connect(cluster, "postgres").await;
            wait_for("the slots to be free", || async {
                let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
                admin.batch_execute(drop).await.is_ok()
            })
            .await;
            admin.batch_execute("DROP SCHEMA pgcutover CASCADE").await.expect("ours");
            wait_for("nobody in the shop", || async { admin.batch_execute("DROP DATABASE shop").await.is_ok() }).await;
            admin.batch_execute("DROP ROLE shop").await.expect("it owns nothing any more");
        }
        self.size = shop::build(&self.source, 0.01).await;
        self.daemon.set_failpoints("");
        self.daemon.start_again();
    }

    /// Begins the migration and waits until it can be cut over.
    pub async fn migrate(&self) {
        self.daemon.must(&["migration", "create", NAME, "--database", SHOP]);
        self.wait_until(READY).await;
    }

    /// Orders a cutover or a rollback, which must go through, and returns its report.
    #[track_caller]
    pub fn must_switch(&self, order: &str) -> serde_json::Value {
        let report = self.daemon.json(&["migration", order, NAME]);
        assert_eq!(report["outcome"], "switched", "{order}: {report}");
        report
    }

    /// Waits until the migration is in this state and substate, with a stream whose lag is known.
    pub async fn wait_until(&self, wanted: &str) {
        wait_for_within(COPY_PATIENCE, &format!("the migration to be {wanted}"), || async {
            let view = self.view();
            let state = state_of(&view);
            assert!(!state.contains("Fail"), "{state}");
            state == wanted && view["databases"][0]["latency_bytes"].is_u64()
        })
        .await;
    }

    /// `migration show`; `null` while the daemon does not answer.
    pub fn view(&self) -> serde_json::Value {
        let output = self.daemon.command(&["migration", "show", NAME, "--output", "json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// State and substate.
    pub fn state(&self) -> String {
        state_of(&self.view())
    }

    pub fn application(&self, clients: usize) -> Workload {
        shop::application(&self.daemon, clients, self.size)
    }

    /// Restarts the daemon with these failpoints, waits for the state, gives the order, and kills the daemon when it hangs.
    pub async fn crash_at(&mut self, wanted: &str, order: &str, failpoints: &str, name: &str) {
        self.daemon.restart_with(failpoints);
        self.wait_until(wanted).await;
        let mut order = self.daemon.begin(&["migration", order, NAME]);
        let seen = format!("failpoint=\"{name}\"");
        let before = self.daemon.log().matches(&seen).count();
        wait_for(&format!("failpoint {name}"), || async { self.daemon.log().matches(&seen).count() > before }).await;
        self.daemon.kill();
        order.wait().expect("the command ends when its daemon does");
        self.daemon.set_failpoints("");
        self.daemon.start_again();
    }

    /// The port of the server that the proxy leads to, as soon as it serves.
    pub async fn serving_port(&self) -> u16 {
        self.serving_port_of(SHOP).await
    }

    /// The same for another database.
    pub async fn serving_port_of(&self, database: &str) -> u16 {
        let found = AtomicU16::new(0);
        wait_for("the proxy to serve", || async {
            let Ok(client) = try_connect(&self.daemon.client(database)).await else { return false };
            let Ok(row) = client.query_one("SELECT inet_server_port()", &[]).await else { return false };
            found.store(u16::try_from(row.get::<_, i32>(0)).expect("a port"), Ordering::Relaxed);
            true
        })
        .await;
        found.into_inner()
    }

    /// Rows that say who is active, of one server: outcomes of its fences, and of its decisions.
    pub async fn rows(&self, cluster: &Cluster) -> (Vec<Option<String>>, Vec<String>) {
        let control = connect(cluster, "postgres").await;
        let fences = control.query("SELECT outcome FROM pgcutover.fence ORDER BY epoch", &[]).await.expect("readable");
        let decisions =
            control.query("SELECT outcome FROM pgcutover.decision ORDER BY epoch", &[]).await.expect("readable");
        (fences.iter().map(|row| row.get(0)).collect(), decisions.iter().map(|row| row.get(0)).collect())
    }

    /// The application goes on writing.
    pub async fn wait_for_writes(&self, application: &Workload, more: u64) {
        let writes = || application.tally().writes.load(Ordering::Relaxed);
        let wanted = writes() + more;
        wait_for("writes", || async { writes() > wanted }).await;
    }

    /// Nobody gets in, apart from the moment in which our own sessions do.
    pub async fn must_be_shut(&self, cluster: &Cluster) {
        wait_for("the server that was left to let nobody in", || async {
            try_connect(&cluster.config(SHOP)).await.is_err()
        })
        .await;
    }
}

fn state_of(view: &serde_json::Value) -> String {
    let word = |key: &str| view[key].as_str().unwrap_or("?").to_owned();
    format!("{}/{}", word("state"), word("substate"))
}
