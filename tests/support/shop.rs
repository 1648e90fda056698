//! The demo's shop and application, for tests that kill, abort or restart under load.
//!
//! ```ignore
//! let size = shop::build(&source, 0.02).await;
//! let application = shop::application(&daemon, 16, size);
//! …                                                  // kill, restart, cut over
//! let outcomes = application.finish().await;
//! shop::nothing_lost(&outcomes, &source, &target).await;
//! ```

use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::ledger::{self, ClientLedger, Reconciliation};
use pgcutover::demo::shop::{self, SHOP, Size};
use pgcutover::demo::workload::{Outcome, Workload};

use crate::support::connect;
use crate::support::daemon::Daemon;

/// Password of the role `shop`, which the application logs in with where a password is asked for.
pub const PASSWORD: &str = "a shop's password";

/// Makes role, database and tables; scale 0.02 is about 8000 rows.
pub async fn build(cluster: &Cluster, scale: f64) -> Size {
    let admin = connect(cluster, "postgres").await;
    admin
        .batch_execute(&format!("CREATE ROLE {SHOP} LOGIN PASSWORD 'a shop''s password'"))
        .await
        .expect("a new cluster");
    admin.batch_execute(&format!("CREATE DATABASE {SHOP}")).await.expect("a new cluster");
    let size = Size::at_scale(scale);
    let client = connect(cluster, SHOP).await;
    shop::build(&client, cluster.major(), size).await.expect("the schema fits every major");
    size
}

/// The application, connected to the daemon's proxy.
pub fn application(daemon: &Daemon, clients: usize, size: Size) -> Workload {
    let mut config = daemon.client(SHOP);
    config.user(SHOP).password(PASSWORD);
    Workload::start(&config, clients, size)
}

/// What became of the application's writes; `target` is where they must be.
pub async fn reconcile(outcomes: &[Outcome], source: &Cluster, target: &Cluster) -> Reconciliation {
    let ledgers: Vec<ClientLedger> = outcomes.iter().map(|outcome| outcome.ledger.clone()).collect();
    let source = ledger::recorded(&connect(source, SHOP).await).await.expect("the source's log is readable");
    let target = ledger::recorded(&connect(target, SHOP).await).await.expect("the target's log is readable");
    ledger::reconcile(&ledgers, &source, &target)
}

/// Opens a source that a cutover has fenced, so that it can be read. Its read-only default stays.
pub async fn open_fenced(source: &Cluster) {
    let admin = connect(source, "postgres").await;
    for change in ["ALLOW_CONNECTIONS true", "CONNECTION LIMIT -1"] {
        admin.batch_execute(&format!("ALTER DATABASE {SHOP} {change}")).await.expect("a superuser may");
    }
}

/// After a cutover: a superuser opens the shut database and writes there, four rows of one table in all, which leaves nothing.
pub async fn write_past_the_fence(cluster: &Cluster) {
    let admin = connect(cluster, "postgres").await;
    let settings = "SELECT datallowconn, datconnlimit FROM pg_database WHERE datname = $1";
    let fenced = admin.query_one(settings, &[&SHOP]).await.expect("readable");
    open_fenced(cluster).await;
    let client = connect(cluster, SHOP).await;
    client.batch_execute("SET default_transaction_read_only = off").await.expect("anybody may");
    client
        .batch_execute(
            "INSERT INTO shop.film (id, title, rate, length, languages)
             SELECT 900000000 + n, 'never shown', 1, '1 hour', '{}' FROM generate_series(1, 2) n;
             DELETE FROM shop.film WHERE id > 900000000;",
        )
        .await
        .expect("a superuser may");
    for change in [
        format!("ALLOW_CONNECTIONS {}", fenced.get::<_, bool>(0)),
        format!("CONNECTION LIMIT {}", fenced.get::<_, i32>(1)),
    ] {
        admin.batch_execute(&format!("ALTER DATABASE {SHOP} {change}")).await.expect("a superuser may");
    }
}

/// After a cutover: every acknowledged write is on the target once, and nothing is on the source alone.
pub async fn nothing_lost(outcomes: &[Outcome], source: &Cluster, target: &Cluster) {
    open_fenced(source).await;
    let found = reconcile(outcomes, source, target).await;
    let harmless = Reconciliation { acknowledged: found.acknowledged, in_doubt: found.in_doubt, ..Default::default() };
    assert_eq!(found, harmless);
}

/// No client had an error or opened a second connection.
pub fn nobody_noticed(outcomes: &[Outcome]) {
    for outcome in outcomes {
        assert_eq!((outcome.error_count, outcome.reconnects), (0, 0), "{:#?}", outcome.errors);
    }
}
