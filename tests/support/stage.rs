//! A stage for cutovers: two clusters, a coordinator in this process, and an engine whose stream is instant.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use pgcutover::catalog::decision::Outcome;
use pgcutover::catalog::streams::Direction;
use pgcutover::catalog::{Place, bootstrap};
use pgcutover::config::Config;
use pgcutover::cutover::coordinator::{Coordinator, CoordinatorDeps, CutoverOptions};
use pgcutover::cutover::parts::{Engine, Lease, Replication};
use pgcutover::cutover::report::CutoverReport;
use pgcutover::demo::cluster::Cluster;
use pgcutover::failpoint::Failpoints;
use pgcutover::postgres::{Connector, InstanceId, Stream};
use pgcutover::proxy::{ConsoleHandler, ConsoleKey, Proxy, ProxyDeps, Sessions};
use pgcutover::shutdown::Tasks;
use pgcutover::switch::{Epoch, Route, ServerRole, Switchboard};
use pgcutover::telemetry::metrics::Metrics;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::link::Link;
use super::{PATIENCE, connect, two_clusters, wait_for};

/// Name of the migration.
pub const NAME: &str = "move";

/// An engine that is always ready and has always applied everything.
#[derive(Clone, Default)]
pub struct Instantly {
    databases: Vec<String>,
    pub finished: Arc<Mutex<Vec<Outcome>>>,
    pub settled: Arc<Mutex<Vec<Outcome>>>,
    pub changes: Arc<watch::Sender<u64>>,
    /// How far the target is behind, in bytes; none: not known.
    pub lag_bytes: Arc<Mutex<Option<u64>>>,
    /// It takes no migration, and does not answer, as when it waits for somebody's lock.
    pub is_waiting: Arc<AtomicBool>,
    /// It takes long to act on the outcome of a cutover.
    pub is_settling: Arc<AtomicBool>,
}

#[async_trait]
impl Engine for Instantly {
    async fn begin_cutover(&self, _: &str, _: Direction) -> Result<Arc<dyn Lease>, String> {
        if self.is_waiting.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(Arc::new(self.clone()))
    }
    async fn cutover_settled(&self, _: &str, outcome: Outcome) -> Result<(), String> {
        while self.is_settling.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.settled.lock().expect("not poisoned").push(outcome);
        Ok(())
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

#[async_trait]
impl Lease for Instantly {
    fn databases(&self) -> Vec<String> {
        self.databases.clone()
    }
    fn lag_bytes(&self) -> Option<u64> {
        *self.lag_bytes.lock().expect("not poisoned")
    }
    async fn compare_definitions(&self) -> Result<(), String> {
        Ok(())
    }
    async fn lacking_rights(&self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
    async fn synchronise_rights(&self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
    async fn synchronise(&self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
    async fn prepare_return(&self, _: Epoch) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
    async fn foresee_return(&self) -> Result<Option<String>, String> {
        Ok(None)
    }
    fn replication(&self, _: &str) -> Replication {
        Replication { slot: "slot".to_owned(), publication: "publication".to_owned() }
    }
    async fn wait_marker(&self, _: &str, _: &str) -> Result<(), String> {
        Ok(())
    }
    async fn finish(&self, outcome: Outcome) -> Result<(), String> {
        self.finished.lock().expect("not poisoned").push(outcome);
        Ok(())
    }
}

/// Whether a life has a proxy.
enum Clients {
    None,
    Proxied,
    /// The same, sharing so many server connections.
    Pooled(usize),
}

/// Answers nobody.
struct NoConsole;

impl ConsoleHandler for NoConsole {
    fn admits(&self, _: &str) -> bool {
        false
    }

    fn serve(&self, _: Stream, _: String, _: ConsoleKey) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
}

/// Two clusters with a database `shop` on both, published on the source.
pub struct Stage {
    pub source: Cluster,
    pub target: Cluster,
    /// For a login at either server, and for sessions that are busy when a cutover is prepared. Long, because a machine that
    /// runs everything at once is slow to log in; tests with such sessions shorten it.
    pub connect_timeout: Duration,
}

impl Stage {
    /// The verdict of the first cutover, in the target's rows, by a hand that is none of its coordinator's.
    pub async fn somebody_writes(&self, outcome: &str) {
        let verdict = format!(
            "INSERT INTO pgcutover.decision SELECT 1, '{outcome}', 'move', '{{shop}}', system_identifier::text, 1
             FROM pg_control_system()"
        );
        connect(&self.target, "postgres").await.batch_execute(&verdict).await.expect("the first decision");
    }

    pub async fn set() -> Self {
        Self::on(two_clusters()).await
    }

    /// On these clusters, which are empty.
    pub async fn on((source, target): (Cluster, Cluster)) -> Self {
        let stage = Self { source, target, connect_timeout: PATIENCE };
        stage.furnish().await;
        stage
    }

    /// Puts everything back to the beginning on the same clusters: starting others costs seconds.
    pub async fn reset(&self) {
        for cluster in [&self.source, &self.target] {
            let admin = connect(cluster, "postgres").await;
            admin.batch_execute("DROP SCHEMA pgcutover CASCADE").await.expect("ours");
            wait_for("nobody in the database", || async { admin.batch_execute("DROP DATABASE shop").await.is_ok() })
                .await;
        }
        self.furnish().await;
    }

    async fn furnish(&self) {
        for cluster in [&self.source, &self.target] {
            connect(cluster, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("a new database");
            let schema =
                "CREATE TABLE item (id bigserial PRIMARY KEY, name text); CREATE SEQUENCE never_called START 7";
            connect(cluster, "shop").await.batch_execute(schema).await.expect("a new schema");
        }
        let life = self.life("");
        let places = [
            (&life.source, "postgres", Place::SourceControl),
            (&life.target, "postgres", Place::TargetControl),
            (&life.source, "shop", Place::SourceDatabase),
            (&life.target, "shop", Place::TargetDatabase),
        ];
        for (connector, database, place) in places {
            let control = connector.control(database, "test").await.expect("the server runs");
            bootstrap(&control, place).await.expect("the schema can be made");
        }
        let publish = "CREATE PUBLICATION publication FOR TABLE item, pgcutover.marker";
        connect(&self.source, "shop").await.batch_execute(publish).await.expect("a new publication");
    }

    fn config(&self) -> Config {
        let text = format!(
            "[source]\nhost = \"127.0.0.1\"\nport = {}\nuser = \"postgres\"\n[target]\nhost = \"127.0.0.1\"\nport = {}\n\
             user = \"postgres\"\n[listen]\naddress = \"127.0.0.1:0\"\nworkers = 2\n[auth]\nmethod = \"trust\"\n",
            self.source.port(),
            self.target.port()
        );
        let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a temporary file");
        std::fs::write(file.path(), text).expect("the file is writable");
        pgcutover::config::load(Some(file.path()), &Default::default()).expect("a valid configuration")
    }

    /// One life of a coordinator, with its own tasks and switchboard, and nobody connected.
    pub fn life(&self, failpoints: &str) -> Life {
        self.begin(failpoints, None, Clients::None)
    }

    /// The same, reaching the target through `link`.
    pub fn life_through(&self, failpoints: &str, link: &Link) -> Life {
        self.begin(failpoints, Some(link), Clients::None)
    }

    /// The same behind a real proxy that trusts everyone.
    pub fn life_with_proxy(&self, failpoints: &str) -> Life {
        self.begin(failpoints, None, Clients::Proxied)
    }

    /// The same where clients share `size` connections by transaction.
    pub fn life_with_pool(&self, failpoints: &str, size: usize) -> Life {
        self.begin(failpoints, None, Clients::Pooled(size))
    }

    fn begin(&self, failpoints: &str, link: Option<&Link>, clients: Clients) -> Life {
        let mut config = self.config();
        if let Clients::Pooled(size) = clients {
            config.pool.mode = pgcutover::config::PoolMode::Transaction;
            config.pool.default_pool_size = size;
        }
        if let Some(link) = link {
            config.target.port = link.address.port();
        }
        for server in [&mut config.source, &mut config.target] {
            server.connect_timeout = self.connect_timeout;
        }
        config.limits.client_login_timeout = PATIENCE;
        let instance = InstanceId::random();
        let source = Connector::new(&config.source, "source", &instance).expect("no certificates to read");
        let target = Connector::new(&config.target, "target", &instance).expect("no certificates to read");
        let unresolved = Route::Unknown { reason: "starting".to_owned() };
        let switchboard = Arc::new(Switchboard::new(unresolved));
        let engine = Instantly {
            databases: vec!["shop".to_owned()],
            lag_bytes: Arc::new(Mutex::new(Some(0))),
            ..Instantly::default()
        };
        let (tasks, config) = (Tasks::new(), Arc::new(config));
        let metrics = Arc::new(Metrics::new().expect("a fresh registry"));
        let proxy = match clients {
            Clients::None => None,
            Clients::Proxied | Clients::Pooled(_) => {
                let deps = ProxyDeps {
                    config: config.clone(),
                    switchboard: switchboard.clone(),
                    source: source.clone(),
                    target: target.clone(),
                    metrics: metrics.clone(),
                    console: Arc::new(NoConsole),
                    sessions: Arc::default(),
                    tasks: tasks.clone(),
                    failpoints: Failpoints::none(),
                };
                Some(Proxy::start(deps).expect("a free port"))
            }
        };
        let failpoints = Failpoints::parse(failpoints).expect("valid failpoints");
        let coordinator = Coordinator::start(CoordinatorDeps {
            config,
            switchboard: switchboard.clone(),
            sessions: proxy.as_ref().map_or_else(|| Arc::new(Sessions::default()), Proxy::sessions),
            engine: Arc::new(engine.clone()),
            source: source.clone(),
            target: target.clone(),
            metrics,
            failpoints: failpoints.clone(),
            tasks: tasks.clone(),
        });
        Life { coordinator, switchboard, engine, source, target, tasks, proxy, failpoints }
    }

    /// Settings of databases and roles on the source, as the catalogues hold them.
    pub async fn settings(&self) -> Vec<String> {
        let client = connect(&self.source, "postgres").await;
        let rows = client
            .query(
                "SELECT format('%s %s %s', datname, datallowconn, datconnlimit) FROM pg_database
                 UNION ALL
                 SELECT format('%s %s %s', setdatabase, setrole, setconfig) FROM pg_db_role_setting ORDER BY 1",
                &[],
            )
            .await
            .expect("catalogues can be read");
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// `fence: outcome` and `decision: outcome` rows, in order.
    pub async fn rows(&self) -> (Vec<Option<String>>, Vec<String>) {
        let fences = connect(&self.source, "postgres").await;
        let fences = fences.query("SELECT outcome FROM pgcutover.fence ORDER BY epoch", &[]).await.expect("readable");
        let decisions = connect(&self.target, "postgres").await;
        let decisions =
            decisions.query("SELECT outcome FROM pgcutover.decision ORDER BY epoch", &[]).await.expect("readable");
        (fences.iter().map(|row| row.get(0)).collect(), decisions.iter().map(|row| row.get(0)).collect())
    }
}

pub struct Life {
    pub coordinator: Arc<Coordinator>,
    pub switchboard: Arc<Switchboard>,
    pub engine: Instantly,
    pub source: Connector,
    pub target: Connector,
    pub tasks: Tasks,
    /// None: there are no sessions.
    pub proxy: Option<Proxy>,
    /// Those of its coordinator.
    pub failpoints: Failpoints,
}

impl Life {
    pub async fn resolved(self) -> Self {
        self.coordinator.resolve_at_startup().await;
        self
    }

    pub fn options(&self) -> CutoverOptions {
        CutoverOptions { max_pause: PATIENCE, drain_timeout: PATIENCE / 2, ..self.coordinator.default_options() }
    }

    /// Begins a cutover and returns when it is held at `failpoint`, until [`Failpoints::release`].
    pub async fn cut_over_up_to(&self, failpoint: &str, options: CutoverOptions) -> JoinHandle<CutoverReport> {
        let coordinator = self.coordinator.clone();
        let running =
            tokio::spawn(async move { coordinator.run(NAME, options).await.expect("the migration is ready") });
        wait_for(&format!("failpoint {failpoint}"), || async {
            assert!(!running.is_finished(), "the cutover has ended before {failpoint}");
            self.failpoints.is_held(failpoint)
        })
        .await;
        running
    }

    /// Every task of the coordinator ends when it is told to.
    pub async fn stop(&self) {
        assert_eq!(self.tasks.join(PATIENCE).await, 0, "tasks go on");
    }

    pub async fn cut_over(&self) -> CutoverReport {
        self.cut_over_with(self.options()).await
    }

    pub async fn cut_over_with(&self, options: CutoverOptions) -> CutoverReport {
        self.coordinator.run(NAME, options).await.expect("the migration is ready")
    }

    pub fn route(&self) -> Route {
        (*self.switchboard.database("shop").route()).clone()
    }

    pub fn runs_on(&self, server: ServerRole, epoch: u64) -> bool {
        let database = self.switchboard.database("shop");
        !database.is_fenced() && self.route() == Route::To { server, epoch: Epoch(epoch) }
    }

    /// Parameters of a client of the proxy.
    pub fn client(&self, application_name: &str) -> tokio_postgres::Config {
        let address = self.proxy.as_ref().and_then(Proxy::address).expect("a life with a proxy");
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(address.port())
            .user("postgres")
            .dbname("shop")
            .application_name(application_name);
        config
    }
}
