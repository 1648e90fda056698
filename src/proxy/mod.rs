//! The proxy: what applications connect to.
//!
//! # One query, from socket to backend and back
//!
//! 1. [`listener`] accepts a connection and gives it to one [`worker`], a thread with its own runtime.
//! 2. [`login`] takes it to a session: [`handshake`] negotiates TLS and reads the startup packet; [`auth`] lets the
//!    client prove who it is, as the rules and files say that [`access`] has read; once admitted, a backend is opened
//!    as that user ([`backend`]), and the client is told that it is ready.
//! 3. [`session`] owns both sockets from then on, and does whatever is rare: orders, a switch, the end.
//! 4. [`relay`] is the hot path: it reads the client's bytes, looks at tag and length of each frame, asks the gate of
//!    [`crate::switch`] before the first frame of a transaction, and writes the bytes to the backend unchanged. On the way
//!    back it looks for ReadyForQuery, and leaves the gate when the session is at a safe point.
//!    The sockets are served by the worker's [`crate::postgres::ring`] where the kernel has io_uring: the relay reads and
//!    writes as ever, and what all sessions of a worker have to send goes out in one system call.
//! 5. [`hold`]: a session whose next frame may not pass keeps reading into its one buffer, so that Terminate, a lost
//!    client and a cancel are noticed.
//! 6. [`moves`] takes a session to the other server at a cutover, with the help of [`handoff`].
//! 7. [`shadow`] runs a share of the reads on the target too, where it was ordered.
//! 8. [`vacant`]: a connection that its client has left waits a little for another one.
//! 9. [`orphan`] stays behind when a client vanishes in the middle of something: the gate is left only when the server
//!    has said that it is over, or its process is gone.
//!
//! In transaction mode a session has a backend only while a transaction runs: [`pooled`] is its session and its relay,
//! [`pool`] has the connections.
//!
//! A process is replaced without a refused connection: [`takeover`].
//!
//! The data path knows nothing of migrations: it sees gates and routes.

mod access;
mod auth;
mod backend;
mod brake;
mod buffers;
mod cancel;
mod catalogue_names;
mod certificate;
mod client_error;
mod complaints;
mod departures;
pub mod descriptors;
mod distinguished_name;
mod entry;
mod flow;
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
mod reads;
mod relay;
mod session;
mod sessions;
pub mod shadow;
pub mod takeover;
mod timeouts;
mod tls;
mod turns;
mod vacant;
mod worker;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use crate::config::{Config, DEFAULT_PORT, Limits};
use crate::failpoint::Failpoints;
use crate::postgres::ring::Ring;
use crate::postgres::{Connector, Stream};
use crate::shutdown::Tasks;
use crate::switch::{ServerRole, Switchboard};
use crate::telemetry::metrics::Metrics;

pub use access::AccessError;
pub use cancel::ConsoleKey;
pub use entry::{MoveOrder, MoveOutcome, MoveState, SessionState, SessionView};
use listener::Listener;
pub use sessions::{MoveReport, PooledBackend, Sessions};
use takeover::{Handle, Rendezvous};

/// The database name that leads to the administration console.
pub const CONSOLE_DATABASE: &str = "pgcutover";

/// The name that it has in PgBouncer, for exporters and scripts that know no other.
const CONSOLE_ALIAS: &str = "pgbouncer";

/// How often it is looked whether every session has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long a listener may take to close; it waits for a worker's queue at most.
const CLOSING_LISTENERS: Duration = Duration::from_secs(5);

/// Connections that wait for a worker to take them.
const ACCEPT_QUEUE: usize = 256;

/// Serves clients of the database [`CONSOLE_DATABASE`].
pub trait ConsoleHandler: Send + Sync {
    /// Whether `user` may use the console at all. Asked at login; the list may change while the program runs.
    fn admits(&self, user: &str) -> bool;

    /// Takes over a client that has proved that it is `user`, who is admitted. AuthenticationOk has been sent and
    /// nothing after it. What the client cancels is asked for by `key`. Runs on the main runtime.
    fn serve(&self, stream: Stream, user: String, key: ConsoleKey) -> BoxFuture<'static, ()>;
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
    /// The socket for takeovers cannot be used.
    #[error("[listen] takeover_socket: {0}")]
    Takeover(#[from] takeover::TakeoverError),
    /// A listener cannot be handed over.
    #[error("cannot hand a listener over: {0}")]
    Handle(std::io::Error),
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
    /// Told of every reload.
    limits_changed: watch::Sender<()>,
    /// Client connections by role, database and address.
    places: Arc<limits::Places>,
    pools: Arc<pool::Pools>,
    /// Connections that wait for another client, in session mode.
    vacancies: vacant::Vacancies,
    /// Closed when no worker has a session any more and none can get one.
    workers_alive: watch::Sender<()>,
    /// Client connections at this moment, in handshake too.
    clients: AtomicUsize,
    /// Where predecessors are found.
    rendezvous: Option<Rendezvous>,
    /// The main runtime, for what must not run on a worker.
    runtime: tokio::runtime::Handle,
    failpoints: Failpoints,
    /// What is not logged for each client.
    complaints: complaints::Complaints,
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
    /// The listeners that accept.
    listening: Tasks,
    /// Until they do, and the queues of the workers.
    waiting: Mutex<Option<(Vec<Listener>, Senders)>>,
    /// What a successor is given.
    handles: Mutex<Vec<Handle>>,
    handed_over: Arc<AtomicBool>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Binds the listeners, starts the workers and accepts. Must be called on the main runtime.
    pub fn start(deps: ProxyDeps) -> Result<Self, ProxyError> {
        let proxy = Self::prepare(deps, Vec::new())?;
        proxy.listen();
        Ok(proxy)
    }

    /// The same without accepting yet, on listeners of a predecessor or the service manager where there are any.
    pub fn prepare(deps: ProxyDeps, mut inherited: Vec<Handle>) -> Result<Self, ProxyError> {
        let runtime = tokio::runtime::Handle::current();
        let mut listeners = bind(&deps.config, &mut inherited)?;
        let handed_over = Arc::<AtomicBool>::default();
        listeners.iter_mut().for_each(|listener| listener.stay_when(&handed_over));
        let rendezvous = deps.config.listen.takeover_socket.clone().map(Rendezvous::new);
        let handles = match rendezvous {
            Some(_) => listeners.iter().map(Listener::handle).collect::<Result<_, _>>().map_err(ProxyError::Handle)?,
            None => Vec::new(),
        };
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
        let vacancies = vacant::Vacancies::new(deps.config.clone(), deps.sessions.clone(), runtime.clone());
        let shared = Arc::new(Shared {
            limits: ArcSwap::from_pointee(deps.config.limits.clone()),
            limits_changed: watch::Sender::new(()),
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
            vacancies,
            workers_alive: watch::Sender::new(()),
            clients: AtomicUsize::new(0),
            rendezvous: rendezvous.clone(),
            runtime,
            failpoints: deps.failpoints,
            complaints: complaints::Complaints::default(),
            tasks: deps.tasks.clone(),
        });
        shared.sessions.shadow.belongs_to(&shared);
        let (senders, workers) = start_workers(&shared)?;
        let listening = deps.tasks.child();
        let (waiting, handles) = (Mutex::new(Some((listeners, senders))), Mutex::new(handles));
        Ok(Self { shared, address, listening, waiting, handles, handed_over, workers })
    }

    /// Begins to accept.
    pub fn listen(&self) {
        let Some((listeners, senders)) = lock(&self.waiting).take() else { return };
        for listener in listeners {
            self.listening.spawn(listener.run(senders.clone(), self.listening.clone()));
        }
    }

    /// Opens the socket where a successor asks; `None`: none is configured.
    pub fn expect_successor(&self) -> Result<Option<mpsc::Receiver<takeover::Request>>, ProxyError> {
        let Some(rendezvous) = &self.shared.rendezvous else { return Ok(None) };
        let socket = rendezvous.bind()?;
        let (sender, requests) = mpsc::channel(1);
        tokio::spawn(takeover::serve(socket, Arc::new(Serving(self.shared.clone())), sender));
        Ok(Some(requests))
    }

    /// The listening sockets once more.
    pub fn handles(&self) -> std::io::Result<Vec<Handle>> {
        let again = |one: &Handle| Ok(Handle { purpose: one.purpose.clone(), socket: one.socket.try_clone()? });
        lock(&self.handles).iter().map(again).collect()
    }

    /// A successor has the listeners: nobody is accepted any more, and nothing of them is kept or removed.
    pub async fn hand_over(&self) {
        self.handed_over.store(true, Ordering::Release);
        self.stop_accepting().await;
        self.shared.vacancies.shut();
        lock(&self.handles).clear();
        if let Some(Err(error)) = self.shared.rendezvous.as_ref().map(Rendezvous::retire) {
            tracing::error!(%error, "the takeover socket could not be renamed: the successor does not find this process");
        }
    }

    /// Removes the takeover socket.
    pub fn leave(&self) {
        if let Some(rendezvous) = &self.shared.rendezvous {
            rendezvous.leave(self.handed_over.load(Ordering::Acquire));
        }
    }

    /// Resolves when every session has ended by itself. The listeners must have been closed.
    pub async fn emptied(&self) {
        while !self.workers.iter().all(std::thread::JoinHandle::is_finished) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Client connections at this moment.
    pub fn clients(&self) -> usize {
        self.shared.clients.load(Ordering::Acquire)
    }

    /// The registry that cutover and admin work with.
    pub fn sessions(&self) -> Arc<Sessions> {
        self.shared.sessions.clone()
    }

    /// Takes what a reload can change over from the configuration that it is called with.
    pub fn follower(&self) -> impl Fn(&Config) + Send + Sync + 'static {
        let shared = self.shared.clone();
        move |config| {
            shared.limits.store(Arc::new(config.limits.clone()));
            shared.limits_changed.send_replace(());
        }
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
        self.shared.vacancies.shut();
        let threads = tokio::task::spawn_blocking(move || {
            for worker in self.workers {
                // A worker that panicked has reported it already.
                let _joined = worker.join();
            }
        });
        tokio::time::timeout(grace, threads).await.is_ok()
    }
}

/// What other processes of this proxy ask of this one.
struct Serving(Arc<Shared>);

impl takeover::Served for Serving {
    fn clients(&self) -> usize {
        self.0.clients.load(Ordering::Acquire)
    }

    fn cancel(&self, pid: i32, key: &[u8]) -> BoxFuture<'static, ()> {
        let (shared, key) = (self.0.clone(), key.to_vec());
        Box::pin(async move {
            login::cancel_own(&shared, pid, &key).await;
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(config: &Config, inherited: &mut Vec<Handle>) -> Result<Vec<Listener>, ProxyError> {
    let mut listeners = Vec::new();
    let mut port = DEFAULT_PORT;
    if let Some(address) = config.listen.address {
        let bound = match Listener::inherited_tcp(address, &config.listen.tcp, inherited) {
            Ok(None) => Listener::tcp(address, &config.listen.tcp),
            Ok(Some(listener)) => Ok(listener),
            Err(error) => Err(error),
        };
        let listener = bound.map_err(|source| ProxyError::Listen { address: address.to_string(), source })?;
        port = listener.tcp_address().map_or(address.port(), |bound| bound.port());
        listeners.push(listener);
    }
    if let Some(directory) = &config.listen.unix_socket_dir {
        let bound = match Listener::inherited_unix(directory, port, inherited) {
            Ok(None) => Listener::unix(directory, port),
            Ok(Some(listener)) => Ok(listener),
            Err(error) => Err(error),
        };
        let address = directory.display().to_string();
        listeners.push(bound.map_err(|source| ProxyError::Listen { address, source })?);
    }
    for unused in inherited.drain(..) {
        tracing::warn!(purpose = ?unused.purpose, "a listener that was passed on is not one of the configuration: closed");
    }
    if listeners.is_empty() { Err(ProxyError::Nowhere) } else { Ok(listeners) }
}

/// Where accepted connections go: a queue for each worker.
type Senders = Vec<mpsc::Sender<listener::Accepted>>;

type Workers = (Senders, Vec<std::thread::JoinHandle<()>>);

fn start_workers(shared: &Arc<Shared>) -> Result<Workers, ProxyError> {
    let (mut senders, mut threads) = (Vec::new(), Vec::new());
    for number in 0..shared.config.listen.workers.max(1) {
        let (sender, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let shared = shared.clone();
        let (report, started) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            let ring = Arc::new(OnceLock::<Ring>::new());
            let sleeps = ring.clone();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .on_thread_unpark(move || sleeps.get().into_iter().for_each(Ring::look))
                .build_local(tokio::runtime::LocalOptions::default());
            let (runtime, outcome) = match runtime {
                Ok(runtime) => (Some(runtime), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // Nobody listens only when starting was given up.
            let _heard = report.send(outcome);
            if let Some(runtime) = runtime {
                runtime.block_on(worker::Worker::run(shared, number, &ring, accepted));
            }
        });
        threads.push(thread.map_err(ProxyError::Thread)?);
        started.recv().unwrap_or(Ok(())).map_err(ProxyError::Thread)?;
        senders.push(sender);
    }
    Ok((senders, threads))
}
