//! A proxy in this process, in front of whatever servers a test has.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use pgcutover::config::{self, AuthMethod, Config};
use pgcutover::demo::cluster::Cluster;
use pgcutover::failpoint::Failpoints;
use pgcutover::postgres::{Connector, InstanceId, Stream};
use pgcutover::proxy::{ConsoleHandler, ConsoleKey, Proxy, ProxyDeps, SessionState, SessionView, Sessions};
use pgcutover::shutdown::Tasks;
use pgcutover::switch::{Database, Epoch, Route, ServerRole, Switchboard};
use pgcutover::telemetry::metrics::Metrics;
use tokio_postgres::{Client, Config as ClientConfig, SimpleQueryMessage};

pub use crate::support::server;
use crate::support::{self, wait_for};
use crate::wire_client::WireClient;

/// Says who got there and closes.
struct Console {
    users: Vec<String>,
}

impl ConsoleHandler for Console {
    fn admits(&self, user: &str) -> bool {
        self.users.iter().any(|known| known == user)
    }

    fn serve(&self, mut stream: Stream, user: String, _: ConsoleKey) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            use tokio::io::AsyncWriteExt as _;
            let _ = stream.write_all(format!("console for {user}").as_bytes()).await;
        })
    }
}

/// `[listen] io_uring`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sockets {
    Ring,
    Polled,
}

pub struct Rig {
    proxy: Option<Proxy>,
    pub sessions: Arc<Sessions>,
    pub board: Arc<Switchboard>,
    tasks: Tasks,
    pub port: u16,
    pub metrics: Arc<Metrics>,
    /// What it was started with.
    pub config: Arc<Config>,
}

impl Rig {
    /// One server in both roles.
    pub fn over(cluster: &Cluster) -> Self {
        Self::start(server(cluster), server(cluster), |_| {})
    }

    /// The same, with its sockets served like this.
    pub fn on(cluster: &Cluster, sockets: Sockets) -> Self {
        let is_ring = sockets == Sockets::Ring;
        Self::start(server(cluster), server(cluster), |config| config.listen.io_uring = is_ring)
    }

    /// Clients are believed, unless `change` says otherwise.
    pub fn start(source: config::Server, target: config::Server, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_with(source, target, Failpoints::none(), change)
    }

    pub fn start_with(
        source: config::Server,
        target: config::Server,
        failpoints: Failpoints,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = Config::new(source, target);
        config.listen.address = Some("127.0.0.1:0".parse().expect("valid"));
        config.listen.workers = 2;
        config.auth.method = AuthMethod::Trust;
        // A busy machine takes its time; tests of these bounds set them.
        config.limits.client_login_timeout = support::PATIENCE;
        change(&mut config);
        let config = Arc::new(config);
        let instance = InstanceId::random();
        let connector = |server, label| Connector::new(server, label, &instance).expect("no TLS to prepare");
        let board = Arc::new(Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) }));
        let tasks = Tasks::new();
        let metrics = Arc::new(Metrics::new().expect("names are distinct"));
        let deps = ProxyDeps {
            source: connector(&config.source, "source"),
            target: connector(&config.target, "target"),
            console: Arc::new(Console { users: config.admin.users.clone() }),
            config: config.clone(),
            switchboard: board.clone(),
            metrics: metrics.clone(),
            sessions: Arc::default(),
            tasks: tasks.clone(),
            failpoints,
        };
        let proxy = Proxy::start(deps).expect("starts");
        let port = proxy.address().map_or(0, |address| address.port());
        Self { sessions: proxy.sessions(), proxy: Some(proxy), board, tasks, port, metrics, config }
    }

    /// What a reload does to the proxy.
    pub fn reload(&self, change: impl FnOnce(&mut Config)) {
        self.try_reload(change).expect("what it names can be read");
    }

    /// The same, where a file may be wrong.
    pub fn try_reload(&self, change: impl FnOnce(&mut Config)) -> Result<(), String> {
        let mut config = Config::clone(&self.config);
        change(&mut config);
        let proxy = self.proxy.as_ref().expect("it runs");
        proxy.access_reader()(&config).map_err(|error| error.to_string())?;
        proxy.follower()(&config);
        Ok(())
    }

    /// How a client reaches the proxy.
    pub fn client(&self, database: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.host("127.0.0.1").port(self.port).user("postgres").dbname(database);
        config.ssl_mode(tokio_postgres::config::SslMode::Disable);
        config
    }

    pub async fn connect(&self, database: &str) -> Client {
        support::connect_with(&self.client(database)).await
    }

    /// A client that speaks frames, logged in.
    pub async fn wire(&self, database: &str) -> WireClient {
        let mut client = WireClient::connect(self.port).await;
        client.start(&[("user", "postgres"), ("database", database)]).await;
        client.until_ready().await;
        client
    }

    pub fn database(&self) -> Arc<Database> {
        self.board.database("postgres")
    }

    /// Waits until the only session is in this state.
    pub async fn until(&self, state: SessionState) -> SessionView {
        wait_for(&format!("a session in state {state:?}"), || async {
            self.sessions.list().iter().any(|session| session.state == state)
        })
        .await;
        self.sessions.list().into_iter().find(|session| session.state == state).expect("just seen")
    }

    pub async fn until_no_session(&self) {
        wait_for("every session to end", || async { self.sessions.list().is_empty() }).await;
    }

    pub async fn stop(mut self) {
        self.tasks.stop();
        if let Some(proxy) = self.proxy.take() {
            assert!(proxy.stop(support::PATIENCE).await, "every session ends");
        }
        assert_eq!(self.tasks.join(support::PATIENCE).await, 0);
    }
}

/// The first column of the first row, in text.
pub async fn text(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = rows.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    row.unwrap_or_default()
}
