//! Builds everything, owns the tasks, and stops them in order.
//!
//! # Order of start
//!
//! logs → connectors → engine → coordinator: who is active? → HTTP and console → the proxy listens. Nobody is let in
//! before it is known which server is active; where that cannot be found out, clients are refused with the reason while
//! it is asked again.
//!
//! With `--takeover` the listeners come from the process that serves, and it is told to stop accepting last, when all of
//! this has been done ([`crate::proxy::takeover`]).
//!
//! # Order of stop
//!
//! A cutover that runs ends first, because it needs the proxy and the engine. Then the proxy ends its sessions, then the
//! engine stops at a place from which it goes on, HTTP last.

mod activation;
mod control;
mod cutovers;
mod migrations;
mod sessions;
mod successor;
mod supervisor;
mod when_ready;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;

use self::control::Control;
use self::cutovers::CutoverDesk;
use self::migrations::EngineDesk;
use self::sessions::SessionDesk;
use self::supervisor::{Change, Supervisor};
use crate::admin::command::ShutdownWhen;
use crate::admin::console::Console;
use crate::admin::http;
use crate::admin::service::{Service, ServiceDeps};
use crate::config::Config;
use crate::cutover::coordinator::{Coordinator, CoordinatorDeps};
use crate::failpoint::Failpoints;
use crate::migration::engine::{Engine, EngineDeps};
use crate::postgres::{Connector, InstanceId, Stream};
use crate::proxy::takeover::{Handle, Purpose, Rendezvous, Successor};
use crate::proxy::{ConsoleHandler, ConsoleKey, Proxy, ProxyDeps};
use crate::shutdown::Tasks;
use crate::switch::{Route, Switchboard};
use crate::telemetry;
use crate::telemetry::metrics::Metrics;

pub use self::control::environment;

/// For a running cutover to abort, or to end what it has decided.
const CUTOVER_GRACE: Duration = Duration::from_secs(30);
/// For sessions to be told that they are ended.
const SESSIONS_GRACE: Duration = Duration::from_secs(5);
/// For the engine to write down how far it is.
const ENGINE_GRACE: Duration = Duration::from_secs(15);
/// How often it is looked whether everybody has gone.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// For the last answer of HTTP.
const HTTP_GRACE: Duration = Duration::from_secs(2);

/// Runs the daemon until it is told to stop. `path` is read again at a reload.
pub fn run(config: Config, path: Option<PathBuf>, begin: Begin) -> anyhow::Result<()> {
    let log = telemetry::init(&config.telemetry)?;
    let failpoints = Failpoints::parse(&std::env::var("PGCUTOVER_FAILPOINTS").unwrap_or_default())?;
    if failpoints.any() {
        tracing::warn!("failpoints are switched on: this process is under test");
    }
    crate::proxy::descriptors::raise_limit();
    let activated = activation::listeners(config.admin.address)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start")?;
    let ended = runtime.block_on(async move {
        let live = Arc::new(ArcSwap::from_pointee(config));
        let supervisor = Arc::new(Supervisor::from_environment());
        let control = Arc::new(Control::new(path, live.clone(), log, supervisor));
        control.clone().obey_signals().await.context("cannot listen to signals")?;
        let mut daemon = tokio::select! {
            started = Daemon::start(live, control.clone(), failpoints, begin, activated) => started?,
            // Safe to drop: nobody has been let in yet.
            () = control.stopping() => return Ok(()),
        };
        let mut requests = daemon.proxy.expect_successor()?;
        control.tell(if begin == Begin::Takeover { Change::TakenOver } else { Change::Ready });
        let successor = tokio::select! {
            () = control.stopping() => None,
            // Safe to drop: it closes the listeners and then only waits.
            () = daemon.wind_down(&control) => None,
            successor = daemon.successor(requests.as_mut()) => Some(successor),
        };
        // With a successor the service goes on.
        match successor {
            None => control.tell(Change::Stopping),
            Some(successor) => tokio::select! {
                () = control.stopping() => {}
                // Dropped only when told to stop: what is not given up yet is then given up by that.
                () = daemon.retire(successor) => {}
            },
        }
        daemon.stop().await;
        Ok(())
    });
    // What did not end in time is not waited for again.
    runtime.shutdown_background();
    ended
}

/// How the process gets its listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It binds those that the service manager has not opened.
    Fresh,
    /// From the process that serves.
    Takeover,
}

/// Everything that runs.
struct Daemon {
    coordinator: Arc<Coordinator>,
    service: Service,
    /// The HTTP listener once more, for a successor.
    http: Option<std::net::TcpListener>,
    /// Sessions of the console.
    console_tasks: Tasks,
    proxy: Proxy,
    switchboard: Arc<Switchboard>,
    /// Listeners, and what follows sessions.
    proxy_tasks: Tasks,
    /// Cutovers and operators' orders.
    cutover_tasks: Tasks,
    engine_tasks: Tasks,
    http_tasks: Tasks,
}

impl Daemon {
    async fn start(
        live: Arc<ArcSwap<Config>>,
        control: Arc<Control>,
        failpoints: Failpoints,
        begin: Begin,
        mut inherited: Vec<Handle>,
    ) -> anyhow::Result<Self> {
        let config = live.load_full();
        let rendezvous = config.listen.takeover_socket.clone().map(Rendezvous::new);
        let successor = match begin {
            Begin::Fresh => None,
            Begin::Takeover => {
                let rendezvous = rendezvous.as_ref().context("--takeover needs [listen] takeover_socket")?;
                let (successor, handed_over) = Successor::ask(rendezvous.path()).await?;
                inherited.extend(handed_over);
                Some(successor)
            }
        };
        let instance = InstanceId::random();
        tracing::info!(version = env!("CARGO_PKG_VERSION"), instance = instance.as_str(), "starting");
        let source = Connector::new(&config.source, "source", &instance)?;
        let target = Connector::new(&config.target, "target", &instance)?;
        let metrics = Arc::new(Metrics::new()?);
        let switchboard = Arc::new(Switchboard::new(Route::Unknown { reason: "pgcutover is starting".to_owned() }));
        let [proxy_tasks, cutover_tasks, engine_tasks, http_tasks] = std::array::from_fn(|_| Tasks::new());
        let sessions = Arc::new(crate::proxy::Sessions::default());
        let session_desk = Arc::new(SessionDesk(sessions.clone()));

        let engine = Engine::start(EngineDeps {
            config: config.clone(),
            source: source.clone(),
            target: target.clone(),
            metrics: metrics.clone(),
            tasks: engine_tasks.clone(),
            failpoints: failpoints.clone(),
        });
        let engine = Arc::new(EngineDesk::new(engine, cutover_tasks.clone()));
        let coordinator = Coordinator::start(CoordinatorDeps {
            config: config.clone(),
            switchboard: switchboard.clone(),
            sessions: sessions.clone(),
            engine: engine.clone(),
            source: source.clone(),
            target: target.clone(),
            metrics: metrics.clone(),
            failpoints: failpoints.clone(),
            tasks: cutover_tasks.clone(),
        });
        let cutovers = Arc::new(CutoverDesk {
            coordinator: coordinator.clone(),
            config: live.clone(),
            migrations: engine.clone(),
            clients: session_desk.clone(),
            rendezvous,
            instance,
        });
        let service = Service::new(ServiceDeps {
            config: live.clone(),
            switchboard: switchboard.clone(),
            metrics: metrics.clone(),
            migrations: engine,
            cutovers: cutovers.clone(),
            clients: session_desk,
            daemon: control.clone(),
            tasks: cutover_tasks.clone(),
        });
        service.expect_to_open();
        control.obey_through(service.clone());
        let (mut http, mut http_waits) = (None, None);
        if let Some(address) = config.admin.address {
            let listener = http_listener(address, &mut inherited);
            let listener = listener.with_context(|| format!("[admin] address: cannot listen on {address}"))?;
            tracing::info!(address = %listener.local_addr()?, "HTTP listens");
            http = Some(listener.try_clone()?);
            let listener = tokio::net::TcpListener::from_std(listener)?;
            match begin {
                Begin::Fresh => http::serve(listener, service.clone(), &http_tasks),
                // The predecessor answers for the clients, until they come here.
                Begin::Takeover => http_waits = Some(listener),
            }
        }
        coordinator.resolve_at_startup().await;
        when_ready::spawn(cutovers, service.clone(), &cutover_tasks);
        let console_tasks = proxy_tasks.child();
        let prepared_with = config.clone();
        let deps = ProxyDeps {
            config,
            switchboard: switchboard.clone(),
            source,
            target,
            metrics,
            console: Arc::new(ConsoleDesk {
                console: Console::new(service.clone(), console_tasks.clone()),
                service: service.clone(),
            }),
            sessions,
            tasks: proxy_tasks.clone(),
            failpoints,
        };
        let proxy = Proxy::prepare(deps, inherited)?;
        if let Some(successor) = successor {
            successor.ready().await;
        }
        if let Some(listener) = http_waits {
            http::serve(listener, service.clone(), &http_tasks);
        }
        proxy.listen();
        service.open();
        control.consult(proxy.access_reader());
        control.follow(proxy.follower());
        control.catch_up(&prepared_with);
        Ok(Self {
            coordinator,
            service,
            http,
            console_tasks,
            proxy,
            switchboard,
            proxy_tasks,
            cutover_tasks,
            engine_tasks,
            http_tasks,
        })
    }

    /// Waits for the order to stop later, and then until the time has come. Who waits for clients may be told to wait
    /// for transactions alone; not the other way round, because those who have none are held then.
    async fn wind_down(&self, control: &Control) {
        let mut orders = control.winding_down();
        let mut when = orders.next().await;
        self.service.close();
        self.proxy.stop_accepting().await;
        while when == ShutdownWhen::Clients {
            tokio::select! {
                // Both arms only wait, so dropping them is safe.
                () = self.clients_gone() => return,
                next = orders.next() => when = next,
            }
        }
        if when == ShutdownWhen::Servers {
            self.transactions_ended().await;
        }
    }

    async fn clients_gone(&self) {
        while !self.proxy.sessions().list().is_empty() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Holds new transactions, and waits for those that run.
    async fn transactions_ended(&self) {
        // A cutover that is under way ends by itself, and with it its hold on transactions.
        while let Err(database) = self.switchboard.pause_all() {
            tracing::info!(database, "waiting for a cutover to end");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        for database in self.switchboard.all() {
            database.wait_empty().await;
        }
    }

    async fn stop(self) {
        self.service.close();
        join("cutovers and orders", &self.cutover_tasks, CUTOVER_GRACE).await;
        self.proxy_tasks.stop();
        self.proxy.leave();
        if !self.proxy.stop(SESSIONS_GRACE).await {
            tracing::warn!("not every session ended in time");
        }
        join("proxy", &self.proxy_tasks, SESSIONS_GRACE).await;
        join("engine", &self.engine_tasks, ENGINE_GRACE).await;
        join("HTTP", &self.http_tasks, HTTP_GRACE).await;
        tracing::info!("stopped");
    }
}

/// The HTTP listener that a predecessor or the service manager has handed over for this address, or a new one.
fn http_listener(address: SocketAddr, inherited: &mut Vec<Handle>) -> std::io::Result<std::net::TcpListener> {
    if let Some(index) = inherited.iter().position(|one| one.purpose == Purpose::Http) {
        let listener = std::net::TcpListener::from(inherited.swap_remove(index).socket);
        if listener.local_addr()? == address || address.port() == 0 {
            return Ok(listener);
        }
    }
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn join(what: &str, tasks: &Tasks, grace: Duration) {
    let left = tasks.join(grace).await;
    if left > 0 {
        tracing::warn!(what, left, "tasks did not end in time");
    }
}

/// The console behind the proxy's own listener.
struct ConsoleDesk {
    console: Console,
    service: Service,
}

impl ConsoleHandler for ConsoleDesk {
    fn admits(&self, user: &str) -> bool {
        let admin = &self.service.config().admin;
        admin.users.iter().chain(&admin.stats_users).any(|known| known == user)
    }

    fn serve(&self, stream: Stream, user: String, key: ConsoleKey) -> BoxFuture<'static, ()> {
        Box::pin(self.console.clone().serve(stream, user, key))
    }
}
