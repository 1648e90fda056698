//! Carries out orders.
//!
//! What changes state runs in a task of its own: an operator who hangs up must not stop a cutover half way.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arc_swap::ArcSwap;

use super::command::{Command, CutoverRequest, Filter, ShadowRequest};
use super::error::{AdminError, ErrorKind};
use super::live::{self, Live};
use super::parts::{Clients, Cutovers, Daemon, Migrations};
use super::reply::Reply;
use super::stats::{PERIOD, Periods};
use super::table::Table;
use super::view::{ClientView, CutoverView, LiveView, MigrationBrief, MigrationEntry, RouteView, StatusView};
use super::{gauges, pgbouncer, show};
use crate::catalog::streams::Direction;
use crate::config::{Config, Server};
use crate::migration::preflight::{Level, Outcome, RuleResult};
use crate::migration::view::{MigrationName, MigrationView, Problem};
use crate::proxy::shadow::{ShadowError, ShadowOrder};
use crate::shutdown::Tasks;
use crate::switch::{Route, Switchboard};
use crate::telemetry::metrics::Metrics;

/// How long a scrape waits for the engine's answer.
const SCRAPE_BOUND: std::time::Duration = std::time::Duration::from_secs(1);

/// How long shadow reads last unless told otherwise.
const SHADOW_LASTS: std::time::Duration = std::time::Duration::from_secs(600);

/// The state in which a migration can be cut over.
const READY: &str = "WaitingForUserAction";

/// What the service works with.
pub struct ServiceDeps {
    /// The configuration in force; a reload replaces it.
    pub config: Arc<ArcSwap<Config>>,
    /// Routes.
    pub switchboard: Arc<Switchboard>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The engine.
    pub migrations: Arc<dyn Migrations>,
    /// The cutover.
    pub cutovers: Arc<dyn Cutovers>,
    /// The sessions.
    pub clients: Arc<dyn Clients>,
    /// The process.
    pub daemon: Arc<dyn Daemon>,
    /// Owner of the orders that run.
    pub tasks: Tasks,
}

/// Carries out orders for console, HTTP and command line. Cheap to clone.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

pub(super) struct Inner {
    pub(super) deps: ServiceDeps,
    started: Instant,
    periods: Periods,
    live: Live,
    /// When RECONNECT was ordered for a database, in seconds since the Unix epoch.
    pub(super) reconnects: Mutex<BTreeMap<String, f64>>,
    /// See [`Inner::staying`].
    pub(super) leaving: Mutex<bool>,
    /// Nobody can connect yet.
    opening: AtomicBool,
    /// Nobody new is let in any more.
    pub(super) closing: AtomicBool,
}

impl Service {
    /// A service over these parts.
    pub fn new(deps: ServiceDeps) -> Self {
        let reconnects = Mutex::default();
        let (started, periods, live) = (Instant::now(), Periods::new(), Live::new());
        let inner = Arc::new(Inner {
            deps,
            started,
            periods,
            live,
            reconnects,
            leaving: Mutex::default(),
            opening: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        });
        let observer = inner.clone();
        inner.deps.tasks.spawn(async move { observer.observe().await });
        let turning = inner.clone();
        inner.deps.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(PERIOD) => {}
                    // Safe to drop: it only waits.
                    () = turning.deps.tasks.stopping() => return,
                }
                turning.periods.turn(&turning.deps.switchboard, &turning.deps.metrics);
            }
        });
        Self(inner)
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.0.deps.config.load_full()
    }

    /// What Prometheus reads: gauges are set from the live state first.
    pub async fn metrics(&self) -> Result<String, AdminError> {
        let deps = &self.0.deps;
        deps.metrics.ready.set(i64::from(self.not_ready().is_none()));
        gauges::set_limits(&deps.metrics, &deps.config.load());
        let (clients, idle_servers) = (deps.clients.list(), deps.clients.idle_servers());
        gauges::set_sessions(&deps.metrics, &deps.switchboard, &clients, &idle_servers);
        // A scrape does not wait for an engine that is still looking for its target, nor for a server that does not answer.
        let mut is_any_active = false;
        if let Ok(Ok(migrations)) = tokio::time::timeout(SCRAPE_BOUND, deps.migrations.list()).await {
            gauges::set_migrations(&deps.metrics, &migrations);
            is_any_active = migrations.iter().any(is_active);
        }
        let blockers = if is_any_active {
            tokio::time::timeout(SCRAPE_BOUND, deps.cutovers.blockers()).await.ok().and_then(Result::ok)
        } else {
            None
        };
        gauges::set_blockers(&deps.metrics, blockers.map(|found| found.len()));
        deps.metrics.render().map_err(|error| AdminError::from_chain(ErrorKind::Failed, &error))
    }

    /// Carries out `command`. Dropping the future does not stop what it has begun, unless that only waits.
    pub async fn execute(&self, command: Command) -> Result<Reply, AdminError> {
        self.execute_until(command, std::future::pending()).await
    }

    /// The same for who may take the order back while it waits: a PAUSE then lets go on what it has held. All other
    /// orders run to their end.
    pub async fn execute_until(
        &self,
        command: Command,
        cancelled: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Reply, AdminError> {
        if !command.changes_state() {
            return self.0.read(command).await;
        }
        let (name, about) = (command.name(), command.migration().map(ToString::to_string));
        let (mut sender, receiver) = tokio::sync::oneshot::channel();
        let inner = self.0.clone();
        self.0.deps.tasks.spawn(async move {
            let (only_waits, can_be_left) = (command.only_waits(), command.can_be_left());
            let result = tokio::select! {
                result = inner.change(command, cancelled) => result,
                // Safe to drop: nothing is half done.
                () = sender.closed(), if only_waits => return,
                // How far it has come is kept.
                () = inner.deps.tasks.stopping(), if can_be_left => {
                    Err(AdminError::new(ErrorKind::Unavailable, "the daemon is stopping"))
                }
            };
            match &result {
                Ok(_) => tracing::info!(command = name, "order carried out"),
                Err(error) => tracing::warn!(command = name, %error, "order refused or failed"),
            }
            let refused = result.as_ref().err();
            let text = refused.map_or_else(|| format!("order {name}"), |error| format!("order {name}: {error}"));
            inner.live.note_order(about, text, refused.is_some());
            // Nobody may be listening any more.
            let _ = sender.send(result);
        });
        receiver.await.unwrap_or_else(|_| Err(AdminError::new(ErrorKind::Unavailable, "the daemon is stopping")))
    }

    /// The live state, whenever it changes. `None` comes first where nothing is known yet.
    pub fn follow(&self) -> tokio::sync::watch::Receiver<Option<Arc<LiveView>>> {
        self.0.live.follow()
    }

    /// Why clients are not served; `None`: they are.
    pub fn not_ready(&self) -> Option<String> {
        self.0.not_ready()
    }

    /// Until [`Self::open`] nobody can connect, wherever databases are known to run: balancers are told.
    pub fn expect_to_open(&self) {
        self.0.opening.store(true, Ordering::Relaxed);
    }

    /// From now on clients can connect.
    pub fn open(&self) {
        self.0.opening.store(false, Ordering::Relaxed);
    }

    /// From now on clients are not let in: balancers are told.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
    }

    /// From now on orders are refused that would bring something into force which another process, that takes over, does
    /// not learn of. What has come into force before this returns can be seen.
    pub fn seal(&self) {
        *self.0.leaving() = true;
    }

    /// Nobody has taken over: these orders are carried out again.
    pub fn unseal(&self) {
        *self.0.leaving() = false;
    }
}

impl Inner {
    async fn read(&self, command: Command) -> Result<Reply, AdminError> {
        let deps = &self.deps;
        let config = deps.config.load_full();
        match command {
            Command::Help => Ok(Reply::Table(show::help())),
            Command::Version => Ok(Reply::Table(show::version())),
            Command::Config => {
                let defaults = Config::new(Server::new("", 5432, ""), Server::new("", 5432, ""));
                Ok(Reply::Table(show::config(&config, &defaults)))
            }
            Command::Databases => {
                let (clients, idle) = (deps.clients.list(), deps.clients.idle_servers());
                Ok(Reply::Table(show::databases(&config, &deps.switchboard, &clients, &idle)))
            }
            Command::Pools => {
                let (clients, idle) = (deps.clients.list(), deps.clients.idle_servers());
                Ok(Reply::Table(show::pools(&config, &clients, &idle)))
            }
            Command::Clients => Ok(Reply::Table(show::sessions(&config, &self.clients(), show::Side::Client))),
            Command::Servers => {
                let servers = [self.clients(), deps.clients.idle_servers()].concat();
                Ok(Reply::Table(show::sessions(&config, &servers, show::Side::Server)))
            }
            Command::Stats => Ok(Reply::Table(self.periods.stats(&deps.switchboard, &deps.metrics))),
            Command::StatsTotals => Ok(Reply::Table(self.periods.totals(&deps.switchboard, &deps.metrics))),
            Command::StatsAverages => Ok(Reply::Table(self.periods.averages(&deps.switchboard, &deps.metrics))),
            Command::Totals => Ok(Reply::Table(self.periods.sums(&deps.switchboard, &deps.metrics))),
            Command::Sockets => Ok(Reply::Table(show::sockets(&config, &self.clients(), false))),
            Command::ActiveSockets => Ok(Reply::Table(show::sockets(&config, &self.clients(), true))),
            Command::Mem => Ok(Reply::Table(pgbouncer::mem(&config, &deps.clients.list()))),
            Command::State => Ok(Reply::Table(pgbouncer::state(&deps.switchboard))),
            Command::DnsHosts => Ok(Reply::Table(Table::new(pgbouncer::DNS_HOSTS))),
            Command::DnsZones => Ok(Reply::Table(Table::new(pgbouncer::DNS_ZONES))),
            Command::Peers => Ok(Reply::Table(Table::new(pgbouncer::PEERS))),
            Command::Lists => {
                let (clients, idle) = (deps.clients.list(), deps.clients.idle_servers());
                Ok(Reply::Table(show::lists(&deps.switchboard, &clients, &idle)))
            }
            Command::Users => {
                let (clients, idle) = (deps.clients.list(), deps.clients.idle_servers());
                Ok(Reply::Table(show::users(&config, &clients, &idle)))
            }
            Command::Members => Ok(Reply::Members(deps.cutovers.members().await?)),
            Command::Blockers => Ok(Reply::Blockers(deps.cutovers.blockers().await?)),
            Command::Status => Ok(Reply::Status(Box::new(self.status(&config).await))),
            Command::Migrations(filter) => {
                let entry = |migration| MigrationEntry {
                    migration,
                    source_server_type: config.source.kind.as_str().to_owned(),
                };
                Ok(Reply::Migrations(self.list(filter).await?.into_iter().map(entry).collect()))
            }
            Command::Migration(name) => Ok(Reply::Migration(Box::new(explained(deps.migrations.show(&name).await?)))),
            Command::Tables(name) => Ok(Reply::Tables(deps.migrations.tables(&name).await?)),
            Command::Validation(name) => Ok(Reply::Validation(deps.migrations.validation(&name).await?)),
            Command::Verification(name) => {
                Ok(Reply::Verification(deps.migrations.verification(&name).await?.map(Box::new)))
            }
            Command::ShadowOf(name) => {
                deps.migrations.show(&name).await?;
                Ok(Reply::Shadow(deps.clients.shadow_of(name.as_str()).map(Box::new)))
            }
            Command::CutoverOf(name) => {
                deps.migrations.show(&name).await?;
                Ok(Reply::Cutover(deps.cutovers.progress(&name).await?))
            }
            Command::History(name) => {
                deps.migrations.show(&name).await?;
                Ok(Reply::History(self.live.history(name.as_str())))
            }
            Command::Events => Ok(Reply::Events(self.live.events())),
            Command::Check => Ok(Reply::Checked(deps.daemon.check().await)),
            Command::Create(_)
            | Command::Cutover(..)
            | Command::Rollback(..)
            | Command::Complete(_)
            | Command::Cancel(_)
            | Command::Retry(_)
            | Command::Verify(..)
            | Command::Shadow(..)
            | Command::Fix(..)
            | Command::Reload
            | Command::Pause(_)
            | Command::Resume(_)
            | Command::Disable(_)
            | Command::Enable(_)
            | Command::Reconnect(_)
            | Command::WaitClose(_)
            | Command::Set { .. }
            | Command::Kill(_)
            | Command::KillClient(_)
            | Command::KillDatabase(_)
            | Command::Shutdown(_) => {
                Err(AdminError::new(ErrorKind::Failed, "an order that changes state was only read"))
            }
        }
    }

    async fn change(&self, command: Command, cancelled: impl Future<Output = ()>) -> Result<Reply, AdminError> {
        let deps = &self.deps;
        match command {
            Command::Create(spec) => {
                deps.migrations.create(spec).await?;
                Ok(Reply::Done("CREATE MIGRATION"))
            }
            Command::Cutover(name, request) => {
                let request = self.with_defaults(request);
                Ok(Reply::Cutover(Some(deps.cutovers.run(&name, Direction::Forward, request).await?)))
            }
            Command::Rollback(name, request) => {
                let request = self.with_defaults(request);
                Ok(Reply::Cutover(Some(deps.cutovers.run(&name, Direction::Reverse, request).await?)))
            }
            Command::Complete(name) => Ok(Reply::Cancelled(deps.migrations.complete(&name).await?)),
            Command::Cancel(name) => {
                deps.cutovers.stop(&name).await?;
                // Most often there are none.
                let _ended = deps.clients.end_shadow(name.as_str(), "the migration is cancelled").await;
                Ok(Reply::Cancelled(deps.migrations.cancel(&name).await?))
            }
            Command::Verify(name, request) => {
                Ok(Reply::Verified(Box::new(deps.migrations.verify(&name, request).await?)))
            }
            Command::Shadow(name, request) => self.shadow(name, request).await,
            Command::Fix(name, request) => {
                let report = deps.migrations.fix(&name, request).await?;
                if report.applied {
                    for done in &report.statements {
                        let text = format!("fix {}: {} {}: {}", report.rule, done.server, done.database, done.sql);
                        self.live.note_order(Some(name.to_string()), text, false);
                    }
                }
                Ok(Reply::Fixed(report))
            }
            Command::Retry(name) => {
                deps.migrations.retry(&name).await?;
                Ok(Reply::Done("RETRY"))
            }
            Command::Reload => {
                let _staying = self.staying()?;
                Ok(Reply::Reloaded(deps.daemon.reload()?))
            }
            Command::Kill(pid) => match deps.clients.end(pid) {
                0 => {
                    let message = format!("no session has a server side with process id {pid}");
                    Err(AdminError::new(ErrorKind::NotFound, message).hint("SHOW CLIENTS lists them as remote_pid"))
                }
                1 => Ok(Reply::Done("KILL")),
                _ => {
                    let message = format!("sessions on both servers have a server side with process id {pid}");
                    Err(AdminError::new(ErrorKind::Conflict, message).hint("KILL_CLIENT with the id of SHOW CLIENTS"))
                }
            },
            Command::Shutdown(when) => {
                deps.daemon.shutdown(when);
                Ok(Reply::Done("SHUTDOWN"))
            }
            Command::Pause(database) => self.pause(database, cancelled).await,
            Command::Resume(database) => self.resume(database),
            Command::Disable(database) => self.set_disabled(&database, true).await,
            Command::Enable(database) => self.set_disabled(&database, false).await,
            Command::Reconnect(database) => self.reconnect(database),
            Command::WaitClose(database) => self.wait_close(database).await,
            Command::Set { key, value } => {
                let _staying = self.staying()?;
                deps.daemon.set(&key, &value).map(|()| Reply::Done("SET"))
            }
            Command::KillClient(id) if deps.clients.end_client(id) => Ok(Reply::Done("KILL_CLIENT")),
            Command::KillClient(id) => {
                let message = format!("there is no session with id {id}");
                Err(AdminError::new(ErrorKind::NotFound, message).hint("SHOW CLIENTS lists them as id"))
            }
            Command::KillDatabase(database) => self.kill_database(&database).await,
            other => self.read(other).await,
        }
    }

    fn with_defaults(&self, request: CutoverRequest) -> CutoverRequest {
        let defaults = &self.deps.config.load().cutover;
        CutoverRequest {
            dry_run: request.dry_run,
            max_pause: request.max_pause.or(Some(defaults.max_pause)),
            drain_timeout: request.drain_timeout.or(Some(defaults.drain_timeout)),
            stragglers: request.stragglers.or(Some(defaults.stragglers)),
            force: request.force,
        }
    }

    async fn list(&self, filter: Filter) -> Result<Vec<MigrationView>, AdminError> {
        let mut list = self.deps.migrations.list().await?;
        list.retain(|migration| filter == Filter::All || is_active(migration));
        list.sort_by(|a, b| b.started_at.total_cmp(&a.started_at));
        Ok(list.into_iter().map(explained).collect())
    }

    fn not_ready(&self) -> Option<String> {
        if self.closing.load(Ordering::Relaxed) {
            return Some("pgcutover is stopping".to_owned());
        }
        let databases = self.deps.switchboard.all();
        let unknown = databases.iter().find_map(|database| match &*database.route() {
            Route::Unknown { reason } => Some(format!("database {}: {reason}", database.name())),
            Route::To { .. } => None,
        });
        // Where every known database is served, others may not be: that is no reason to call this process not ready.
        let unknown = unknown.or_else(|| self.refused_elsewhere().filter(|_| databases.is_empty()));
        unknown.or_else(|| self.opening.load(Ordering::Relaxed).then(|| "pgcutover is starting".to_owned()))
    }

    /// Why databases are refused that no cutover has covered; `None`: they are served.
    fn refused_elsewhere(&self) -> Option<String> {
        match &*self.deps.switchboard.initial() {
            Route::Unknown { reason } => Some(reason.clone()),
            Route::To { .. } => None,
        }
    }

    /// Shadow reads begin where a cutover could.
    async fn shadow(&self, name: MigrationName, request: ShadowRequest) -> Result<Reply, AdminError> {
        let clients = &self.deps.clients;
        let migration = self.deps.migrations.show(&name).await?;
        let view = if request.stop {
            clients.end_shadow(name.as_str(), "stopped by an operator").await
        } else if !(1..=100).contains(&request.share) {
            return Err(AdminError::new(ErrorKind::Invalid, "the share of shadow reads is 1 to 100 percent"));
        } else if migration.state != READY {
            let message = format!("migration {name} is not ready to cut over");
            return Err(
                AdminError::new(ErrorKind::Conflict, message).hint("before that the target has no rows to read")
            );
        } else {
            let databases = migration.databases.into_iter().map(|database| database.name).collect();
            let (migration, lasts) = (name.to_string(), request.lasts.unwrap_or(SHADOW_LASTS));
            clients.shadow(ShadowOrder { migration, databases, share: request.share, lasts }).await
        };
        let kind = |error: &ShadowError| match error {
            ShadowError::IsOn(_) | ShadowError::IsOff(_) | ShadowError::NotOnSource(_) | ShadowError::Leaving(_) => {
                ErrorKind::Conflict
            }
            ShadowError::NoProxy | ShadowError::Unknown { .. } => ErrorKind::Unavailable,
        };
        let view = view.map_err(|error| AdminError::from_chain(kind(&error), &error))?;
        Ok(Reply::Shadow(Some(Box::new(view))))
    }

    /// Looks at everything until the tasks are told to stop.
    async fn observe(&self) {
        let deps = &self.deps;
        loop {
            tokio::select! {
                // Both arms only wait or read, so dropping them is safe.
                () = async { let is_active = self.look().await; self.live.pause(is_active).await } => {}
                () = deps.tasks.stopping() => return,
            }
        }
    }

    /// Returns whether any migration is active, as far as that is known.
    async fn look(&self) -> bool {
        let (deps, config) = (&self.deps, self.deps.config.load());
        let migrations = self.list(Filter::All).await.ok();
        let mut cutovers: BTreeMap<String, CutoverView> = BTreeMap::new();
        for migration in migrations.iter().flatten() {
            if let Ok(name) = migration.name.parse()
                && let Ok(Some(cutover)) = deps.cutovers.progress(&name).await
            {
                cutovers.insert(migration.name.clone(), cutover);
            }
        }
        for migration in migrations.iter().flatten().filter(|migration| migration.state != READY) {
            if deps.clients.shadow_of(&migration.name).is_some_and(|shadow| shadow.running) {
                let _ended = deps.clients.end_shadow(&migration.name, "the migration has gone on").await;
            }
        }
        let is_active = migrations.as_ref().is_none_or(|migrations| migrations.iter().any(is_active));
        // Sessions are looked through for those who look only: there may be very many.
        let sessions = self.live.is_followed().then(|| deps.clients.list());
        let routes = self.routes(sessions.as_deref());
        let (copied_rows, copied_bytes) = (deps.metrics.copy_rows.get(), deps.metrics.copy_bytes.get());
        self.live.observe(migrations.as_deref().unwrap_or_default(), &cutovers, &routes, (copied_rows, copied_bytes));
        if sessions.is_none() {
            return is_active;
        }
        let source_server_type = config.source.kind.as_str();
        let entry = |migration| MigrationEntry {
            migration: MigrationView { validation: None, ..migration },
            source_server_type: source_server_type.to_owned(),
        };
        self.live.send(LiveView {
            at: live::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            not_ready: self.not_ready(),
            source: format!("{}:{}", config.source.host, config.source.port),
            target: format!("{}:{}", config.target.host, config.target.port),
            routes,
            migrations: migrations.map(|list| list.into_iter().map(entry).collect()),
            cutovers,
            copied_rows,
            copied_bytes,
            newest_event: self.live.newest_event(),
        });
        is_active
    }

    /// Where each database runs; without `sessions` nobody is counted.
    fn routes(&self, sessions: Option<&[ClientView]>) -> Vec<RouteView> {
        let databases = self.deps.switchboard.all();
        let routes = databases.iter().map(|database| {
            let of_database = |session: &&ClientView| session.database == database.name();
            let own = sessions.map_or(0, |sessions| sessions.iter().filter(of_database).count());
            let (server, reason) = match &*database.route() {
                Route::To { server, .. } => (Some(*server), None),
                Route::Unknown { reason } => (None, Some(reason.clone())),
            };
            RouteView {
                database: database.name().to_owned(),
                server,
                epoch: database.epoch().0,
                held: database.is_fenced(),
                write_delay_ms: database.write_delay().as_secs_f64() * 1000.0,
                reason,
                sessions: own,
                inside: sessions.map_or(0, |_| database.inside()),
            }
        });
        routes.collect()
    }

    async fn status(&self, config: &Config) -> StatusView {
        let deps = &self.deps;
        let sessions = deps.clients.list();
        let routes = self.routes(Some(&sessions));
        let reason = self.not_ready();
        let brief = |m: MigrationView| MigrationBrief { name: m.name, state: m.state, substate: m.substate };
        StatusView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            refused_elsewhere: self.refused_elsewhere(),
            ready: reason.is_none(),
            reason,
            source: format!("{}:{}", config.source.host, config.source.port),
            target: format!("{}:{}", config.target.host, config.target.port),
            proxies: deps.cutovers.members().await.ok(),
            routes,
            sessions,
            blockers: deps.cutovers.blockers().await.ok(),
            migrations: self.list(Filter::All).await.ok().map(|list| list.into_iter().map(brief).collect()),
        }
    }
}

/// A failed validation has its reason in its rules: says it where every other reason stands, so that nobody has to look
/// in two places.
fn explained(mut migration: MigrationView) -> MigrationView {
    let rules = migration.validation.clone().filter(|_| migration.error.is_none());
    let rules: Vec<RuleResult> = rules.and_then(|rules| serde_json::from_value(rules).ok()).unwrap_or_default();
    let mut failed = rules.iter().filter(|rule| rule.outcome == Outcome::Failed);
    if migration.state == "ValidationFailed"
        && let Some(first) = failed.next()
    {
        let evidence = first.evidence.join("; ");
        let more = match failed.count() {
            0 => String::new(),
            count => format!(", and {count} more failed: see `migration validation {}`", migration.name),
        };
        migration.error = Some(Problem {
            code: first.code.clone(),
            message: format!("{}: {evidence}{more}", first.code),
            object: match &first.level {
                Level::Instance => None,
                Level::Database(name) => Some(format!("database {name}")),
            },
            hint: Some(first.fix.clone()).filter(|fix| !fix.is_empty()),
        });
    }
    migration
}

/// Whether work on it may still be going on.
pub fn is_active(migration: &MigrationView) -> bool {
    matches!(migration.state.as_str(), "InProgress" | "WaitingForUserAction")
}

/// The name, or the error that the order is answered with.
pub fn migration_name(text: &str) -> Result<MigrationName, AdminError> {
    text.parse().map_err(|error| AdminError::from_chain(ErrorKind::Invalid, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_validation_says_its_first_reason_and_the_mend() {
        let rule = |code: &str, outcome: &str| {
            serde_json::json!({"code": code, "level": {"database": "shop"}, "outcome": outcome, "evidence": ["e"],
                "evidence_total": 1, "why": "w", "fix": "f"})
        };
        let view = serde_json::json!({
            "name": "m1", "state": "ValidationFailed", "substate": "ValidationFailed", "mode": "online",
            "option": "validate", "cutover_when_ready": false, "databases": [], "error": null, "started_at": 1.0,
            "finished_at": null, "duration_seconds": 2.5, "source": "a:1",
            "validation": [rule("encoding", "Warning"), rule("target_empty", "Failed"), rule("large_objects", "Failed")],
        });
        let error = explained(serde_json::from_value(view).expect("a view")).error.expect("explained");
        assert_eq!(error.code, "target_empty");
        assert_eq!(error.message, "target_empty: e, and 1 more failed: see `migration validation m1`");
        assert_eq!((error.object.as_deref(), error.hint.as_deref()), (Some("database shop"), Some("f")));
    }
}
