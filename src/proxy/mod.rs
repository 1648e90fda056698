//! The proxy: what applications connect to.
//!
//! # One query, from socket to backend and back
//!
//! 1. [`listener`] accepts a connection and gives it to one [`worker`], a thread with its own runtime.
//! 2. [`handshake`] negotiates TLS and reads the startup packet; [`auth`] lets the client prove who it is, as the rules
//!    and files say that [`access`] has read.
//! 3. [`session`] waits for admission, opens a backend as that user ([`backend`]), and tells the client that it is ready.
//! 4. [`relay`] is the hot path: it reads the client's bytes, looks at tag and length of each frame, asks the gate of
//!    [`crate::switch`] before the first frame of a transaction, and writes the bytes to the backend unchanged. On the way
//!    back it looks for ReadyForQuery, and leaves the gate when the session is at a safe point.
//! 5. [`hold`]: a session whose next frame may not pass keeps reading into its one buffer, so that Terminate, a lost
//!    client and a cancel are noticed.
//! 6. [`moves`] takes a session to the other server at a cutover, with the help of [`handoff`].
//! 7. [`orphan`] stays behind when a client vanishes in the middle of something: the gate is left only when the server
//!    has said that it is over, or its process is gone.
//!
//! The data path knows nothing of migrations: it sees gates and routes.

mod access;
mod auth;
mod backend;
mod buffers;
mod cancel;
mod catalogue_names;
mod certificate;
mod client_error;
mod departures;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handoff;
mod handshake;
mod hold;
mod limits;
mod listener;
mod login;
mod meters;
mod moves;
mod orphan;
mod pool;
mod pooled;
mod relay;
mod session;
mod sessions;
mod timeouts;
mod tls;
mod worker;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::config::{Config, Limits};
use crate::failpoint::Failpoints;
use crate::postgres::{Connector, Stream};
use crate::shutdown::Tasks;
use crate::switch::{ServerRole, Switchboard};
use crate::telemetry::metrics::Metrics;

pub use access::AccessError;
use listener::Listener;
pub use sessions::{MoveOrder, MoveOutcome, MoveReport, MoveState, SessionState, SessionView, Sessions};

/// The database name that leads to the administration console.
pub const CONSOLE_DATABASE: &str = "pgcutover";

/// The name that it has in PgBouncer, for exporters and scripts that know no other.
const CONSOLE_ALIAS: &str = "pgbouncer";

/// Port in the name of the Unix socket where there is no TCP listener.
const DEFAULT_UNIX_PORT: u16 = 6432;

/// How long a listener may take to close; it waits for a worker's queue at most.
const CLOSING_LISTENERS: Duration = Duration::from_secs(5);

/// Connections that wait for a worker to take them.
const ACCEPT_QUEUE: usize = 256;

/// Serves clients of the database [`CONSOLE_DATABASE`].
pub trait ConsoleHandler: Send + Sync {
    /// Whether `user` may use the console at all. Asked at login; the list may change while the program runs.
    fn admits(&self, user: &str) -> bool;

    /// Takes over a client that has proved that it is `user`, who is admitted. AuthenticationOk has been sent and
    /// nothing after it. Runs on the main runtime.
    fn serve(&self, stream: Stream, user: String, parameters: Vec<(String, String)>) -> BoxFuture<'static, ()>;
}

/// What the proxy is made of.
pub struct ProxyDeps {
    /// Validated configuration.
    pub config: Arc<Config>,
    /// Gates and routes.
    pub switchboard: Arc<Switchboard>,
    /// `[source]`
    pub source: Connector,
    /// `[target]`
    pub target: Connector,
    /// Where is counted.
    pub metrics: Arc<Metrics>,
    /// The administration console.
    pub console: Arc<dyn ConsoleHandler>,
    /// Where sessions are registered. Made before the proxy, so that it is known who is active before anybody is let in.
    pub sessions: Arc<Sessions>,
    /// Owns the accepting tasks; told to stop, the proxy accepts nobody any more.
    pub tasks: Tasks,
    /// Named points where tests interfere.
    pub failpoints: Failpoints,
}

/// The proxy could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// An address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address or path.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Neither an address nor a socket directory is configured.
    #[error("[listen] names neither an address nor a unix_socket_dir")]
    Nowhere,
    /// A file of certificates or rules cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A thread could not be started.
    #[error("cannot start a worker thread: {0}")]
    Thread(std::io::Error),
}

/// Reads every file that clients' access depends on (certificates, rules, maps, users), and keeps nothing.
pub fn check_files(config: &Config) -> Result<(), AccessError> {
    access::Access::load(config).map(drop)
}

/// What all workers share.
struct Shared {
    config: Arc<Config>,
    switchboard: Arc<Switchboard>,
    source: Connector,
    target: Connector,
    metrics: Arc<Metrics>,
    console: Arc<dyn ConsoleHandler>,
    sessions: Arc<Sessions>,
    keys: Arc<cancel::CancelKeys>,
    verifiers: Arc<auth::Verifiers>,
    departures: Arc<departures::Departures>,
    /// Certificates and rules; replaced by a reload.
    access: ArcSwap<access::Access>,
    /// `[limits]` in force; a reload replaces them.
    limits: ArcSwap<Limits>,
    /// Client connections by role, database and address.
    places: Arc<limits::Places>,
    pools: Arc<pool::Pools>,
    /// Client connections at this moment, in handshake too.
    clients: AtomicUsize,
    /// The main runtime, for what must not run on a worker.
    runtime: tokio::runtime::Handle,
    failpoints: Failpoints,
    /// Told to stop when the proxy accepts nobody any more.
    tasks: Tasks,
}

impl Shared {
    fn connector(&self, server: ServerRole) -> &Connector {
        match server {
            ServerRole::Source => &self.source,
            ServerRole::Target => &self.target,
        }
    }
}

/// The running proxy.
pub struct Proxy {
    shared: Arc<Shared>,
    address: Option<SocketAddr>,
    /// The listeners.
    listening: Tasks,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Binds the listeners and starts the workers. Must be called on the main runtime.
    pub fn start(deps: ProxyDeps) -> Result<Self, ProxyError> {
        let runtime = tokio::runtime::Handle::current();
        let listeners = bind(&deps.config)?;
        let address = listeners.iter().find_map(Listener::tcp_address);
        let access = Arc::new(access::Access::load(&deps.config)?);
        access.show_in(&deps.metrics);
        access.prepare(&deps.tasks, &runtime);
        let seed = access.tls.as_ref().map(|tls| tls.seed);
        let verifiers = auth::Verifiers::new(deps.source.clone(), deps.target.clone(), runtime.clone(), seed);
        let departures = departures::Departures::new(
            deps.config.control.database.clone(),
            deps.source.clone(),
            deps.target.clone(),
            runtime.clone(),
        );
        let pools = Arc::new(pool::Pools::new(deps.config.clone(), deps.sessions.clone()));
        let shared = Arc::new(Shared {
            limits: ArcSwap::from_pointee(deps.config.limits.clone()),
            places: Arc::default(),
            config: deps.config,
            switchboard: deps.switchboard,
            source: deps.source,
            target: deps.target,
            metrics: deps.metrics,
            console: deps.console,
            sessions: deps.sessions,
            keys: Arc::default(),
            verifiers: Arc::new(verifiers),
            departures: Arc::new(departures),
            access: ArcSwap::new(access),
            pools,
            clients: AtomicUsize::new(0),
            runtime,
            failpoints: deps.failpoints,
            tasks: deps.tasks.clone(),
        });
        let (senders, workers) = start_workers(&shared)?;
        let listening = deps.tasks.child();
        for listener in listeners {
            listening.spawn(listener.run(senders.clone(), listening.clone()));
        }
        Ok(Self { shared, address, listening, workers })
    }

    /// The registry that cutover and admin work with.
    pub fn sessions(&self) -> Arc<Sessions> {
        self.shared.sessions.clone()
    }

    /// Takes what a reload can change over from the configuration that it is called with.
    pub fn follower(&self) -> impl Fn(&Config) + Send + Sync + 'static {
        let shared = self.shared.clone();
        move |config| shared.limits.store(Arc::new(config.limits.clone()))
    }

    /// Reads certificates, rules and users again, as a configuration names them. What cannot be read changes nothing.
    pub fn access_reader(&self) -> impl Fn(&Config) -> Result<(), AccessError> + Send + Sync + 'static {
        let shared = self.shared.clone();
        move |config| {
            let access = Arc::new(access::Access::load(config)?.with_work_of(&shared.access.load()));
            access.show_in(&shared.metrics);
            access.prepare(&shared.tasks, &shared.runtime);
            shared.access.store(access);
            shared.verifiers.forget();
            Ok(())
        }
    }

    /// The TCP address that clients connect to.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Accepts nobody any more; who is connected goes on. Returns once the listeners are closed.
    pub async fn stop_accepting(&self) {
        self.listening.join(CLOSING_LISTENERS).await;
    }

    /// Ends every session with 57P01 and waits for the workers, at most `grace`. The tasks that were passed at start
    /// must have been told to stop. Returns whether every session ended in time.
    pub async fn stop(self, grace: Duration) -> bool {
        self.shared.sessions.end_all();
        let threads = tokio::task::spawn_blocking(move || {
            for worker in self.workers {
                // A worker that panicked has reported it already.
                let _joined = worker.join();
            }
        });
        tokio::time::timeout(grace, threads).await.is_ok()
    }
}

fn bind(config: &Config) -> Result<Vec<Listener>, ProxyError> {
    let mut listeners = Vec::new();
    let mut port = DEFAULT_UNIX_PORT;
    if let Some(address) = config.listen.address {
        let bound = Listener::tcp(address, &config.listen.tcp);
        let listener = bound.map_err(|source| ProxyError::Listen { address: address.to_string(), source })?;
        port = listener.tcp_address().map_or(address.port(), |bound| bound.port());
        listeners.push(listener);
    }
    if let Some(directory) = &config.listen.unix_socket_dir {
        let bound = Listener::unix(directory, port);
        let address = directory.display().to_string();
        listeners.push(bound.map_err(|source| ProxyError::Listen { address, source })?);
    }
    if listeners.is_empty() { Err(ProxyError::Nowhere) } else { Ok(listeners) }
}

type Workers = (Vec<mpsc::Sender<listener::Accepted>>, Vec<std::thread::JoinHandle<()>>);

fn start_workers(shared: &Arc<Shared>) -> Result<Workers, ProxyError> {
    let (mut senders, mut threads) = (Vec::new(), Vec::new());
    for number in 0..shared.config.listen.workers.max(1) {
        let (sender, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let shared = shared.clone();
        let (report, started) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build_local(tokio::runtime::LocalOptions::default());
            let (runtime, outcome) = match runtime {
                Ok(runtime) => (Some(runtime), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // Nobody listens only when starting was given up.
            let _heard = report.send(outcome);
            if let Some(runtime) = runtime {
                runtime.block_on(worker::Worker::run(shared, number, accepted));
            }
        });
        threads.push(thread.map_err(ProxyError::Thread)?);
        started.recv().unwrap_or(Ok(())).map_err(ProxyError::Thread)?;
        senders.push(sender);
    }
    Ok((senders, threads))
}
