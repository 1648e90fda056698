//! The proxy alone, in the test's own process, and cutovers reduced to what sessions see of them.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use pgcutover::config;
use pgcutover::demo::cluster::Cluster;
use pgcutover::failpoint::Failpoints;
use pgcutover::postgres::{Connector, InstanceId, Stream};
use pgcutover::proxy::{ConsoleHandler, ConsoleKey, MoveOrder, MoveOutcome, MoveReport, Proxy, ProxyDeps, Sessions};
use pgcutover::shutdown::Tasks;
use pgcutover::switch::{Epoch, Route, ServerRole, Switchboard};
use pgcutover::telemetry::metrics::Metrics;

/// A proxy that believes everyone.
pub struct LoneProxy {
    proxy: Proxy,
    tasks: Tasks,
    switchboard: Arc<Switchboard>,
    /// Its sessions.
    pub sessions: Arc<Sessions>,
    /// Where it listens on loopback.
    pub port: u16,
    epoch: u64,
}

impl LoneProxy {
    /// A proxy in front of two servers, which may be the same one.
    pub fn start(source: &Cluster, target: &Cluster) -> Self {
        let mut settings = config::Config::new(super::server(source), super::server(target));
        settings.listen.address = Some("127.0.0.1:0".parse().expect("an address"));
        settings.auth.method = config::AuthMethod::Trust;
        settings.limits.client_login_timeout = super::PATIENCE;
        let instance = InstanceId::random();
        let connector = |server, label| Connector::new(server, label, &instance).expect("no TLS to prepare");
        let switchboard = Arc::new(Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) }));
        let tasks = Tasks::new();
        let proxy = Proxy::start(ProxyDeps {
            source: connector(&settings.source, "source"),
            target: connector(&settings.target, "target"),
            config: Arc::new(settings),
            switchboard: switchboard.clone(),
            metrics: Arc::new(Metrics::new().expect("names are distinct")),
            console: Arc::new(NoConsole),
            sessions: Arc::default(),
            tasks: tasks.clone(),
            failpoints: Failpoints::none(),
        })
        .expect("starts");
        let port = proxy.address().expect("listens on TCP").port();
        Self { sessions: proxy.sessions(), proxy, tasks, switchboard, port, epoch: 0 }
    }

    /// Where the next move leads: to and fro.
    fn next(&self) -> MoveOrder {
        let to = if self.epoch.is_multiple_of(2) { ServerRole::Target } else { ServerRole::Source };
        MoveOrder { to, epoch: Epoch(self.epoch + 1) }
    }

    /// Lets the sessions of `database` get ready to move.
    pub async fn prepare(&self, database: &str) -> Vec<MoveReport> {
        let deadline = tokio::time::Instant::now() + super::PATIENCE;
        self.sessions.prepare_moves(&[database.to_owned()], self.next(), deadline.into()).await
    }

    /// Pauses, brings over what has changed, and opens the gate on the other side. Returns how it went for each.
    pub async fn switch(&mut self, name: &str) -> Vec<MoveReport> {
        let MoveOrder { to, epoch } = self.next();
        let database = self.switchboard.database(name);
        let deadline = tokio::time::Instant::now() + super::PATIENCE;
        database.fence();
        database.wait_empty().await;
        let settled = self.sessions.settle_moves(&[name.to_owned()], deadline.into()).await;
        database.open(to, epoch);
        self.epoch += 1;
        settled
    }

    /// Both, for sessions that nothing keeps.
    pub async fn move_all(&mut self, database: &str) {
        for reports in [self.prepare(database).await, self.switch(database).await] {
            assert!(reports.iter().all(|report| report.outcome == MoveOutcome::Ready), "{reports:?}");
        }
    }

    /// Ends every session.
    pub async fn stop(self) {
        self.tasks.stop();
        assert!(self.proxy.stop(super::PATIENCE).await, "every session has ended");
    }
}

/// Nobody asks for the console here.
struct NoConsole;

impl ConsoleHandler for NoConsole {
    fn admits(&self, _: &str) -> bool {
        false
    }

    fn serve(&self, _: Stream, _: String, _: ConsoleKey) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
}
