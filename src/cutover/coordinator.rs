//! Takes the order for a cutover and sees it through, whatever becomes of who gave it.
//!
//! One cutover at a time runs in a process. It runs in a task of its own: a client of the API that goes away, or a
//! command line that is interrupted, leaves a cutover that ends by itself. A cutover whose task dies is settled like one
//! that a crash has left.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::CutoverError;
use super::hard_fence::{self, Known, Looking, Obstacle, Shutting};
use super::home;
use super::leadership::claim_coordination;
use super::parts::{Engine, Lease};
use super::phase::Phase;
use super::report::{CutoverProgress, CutoverReport, Timings};
use super::startup::{Resolver, is_closed};
use super::steps::{Ready, Verdict};
use super::undo::Undo;
use super::work::{Line, Orders, Side, Work, bounded};
use crate::catalog::decision::{Case, Outcome};
use crate::catalog::resolve::{self, Verdict as Claimed};
use crate::catalog::streams::Direction;
use crate::catalog::{Place, bootstrap, claims};
use crate::config::Config;
use crate::failpoint::Failpoints;
use crate::postgres::Connector;
use crate::proxy::Sessions;
use crate::shutdown::Tasks;
use crate::switch::{Database, Epoch, Route, ServerRole, Switchboard};
use crate::telemetry::metrics::Metrics;

pub use super::work::CutoverOptions;

/// How long an order waits for the resolution of another cutover, or of the start, to end.
const WAIT_FOR_TURN: Duration = Duration::from_secs(5);

/// Between two attempts to take the lock.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a coordinator works with.
pub struct CoordinatorDeps {
    /// Bounds and policies.
    pub config: Arc<Config>,
    /// Routes and gates.
    pub switchboard: Arc<Switchboard>,
    /// The proxied sessions.
    pub sessions: Arc<Sessions>,
    /// The migrations.
    pub engine: Arc<dyn Engine>,
    /// `[source]`
    pub source: Connector,
    /// `[target]`
    pub target: Connector,
    /// Where phases and outcomes are counted.
    pub metrics: Arc<Metrics>,
    /// Points at which tests kill us.
    pub failpoints: Failpoints,
    /// Owner of the tasks.
    pub tasks: Tasks,
}

struct Running {
    progress: watch::Receiver<Option<CutoverProgress>>,
    cancel: CancellationToken,
    /// Set when it has ended.
    report: Option<CutoverReport>,
    /// Its databases, and where they ran when it began; none once it has ended.
    served: Vec<(Arc<Database>, Arc<Route>)>,
}

/// The running cutover of a migration, or its last one.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one for each migration")]
pub enum CutoverState {
    /// It runs.
    Running(CutoverProgress),
    /// It has ended.
    Ended(CutoverReport),
}

/// See the module. Shared as `Arc`.
pub struct Coordinator {
    deps: CoordinatorDeps,
    resolver: Arc<Resolver>,
    /// A successor takes over: no cutover begins here any more.
    sealed: AtomicBool,
    /// The last cutover of each migration.
    running: Mutex<HashMap<String, Running>>,
    /// When the last look for long work began, and what it found.
    long_work: tokio::sync::Mutex<Option<(Instant, Vec<Obstacle>)>>,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator").finish_non_exhaustive()
    }
}

impl Coordinator {
    /// A coordinator that does nothing until it is told to. Call [`Self::resolve_at_startup`] before clients are let in.
    pub fn start(deps: CoordinatorDeps) -> Arc<Self> {
        let resolver = Resolver::new(
            deps.switchboard.clone(),
            deps.sessions.clone(),
            deps.engine.clone(),
            deps.source.clone(),
            deps.target.clone(),
            deps.config.control.database.clone(),
        );
        Arc::new(Self {
            deps,
            resolver: Arc::new(resolver),
            sealed: AtomicBool::new(false),
            long_work: tokio::sync::Mutex::default(),
            running: Mutex::new(HashMap::new()),
        })
    }

    /// Finds out who is active, settles what a crash has left, and sets the routes. Returns after one attempt; where
    /// something could not be settled it is tried again in the background until it is. The engine is told there, too.
    pub async fn resolve_at_startup(&self) {
        self.resolver.clone().resolve_at_startup(&self.deps.tasks).await;
    }

    /// What the command does when it names no bounds of its own.
    pub fn default_options(&self) -> CutoverOptions {
        let cutover = &self.deps.config.cutover;
        CutoverOptions {
            direction: Direction::Forward,
            dry_run: false,
            max_pause: cutover.max_pause,
            drain_timeout: cutover.drain_timeout,
            stragglers: cutover.stragglers,
            reads: cutover.reads,
            throttle_writes: cutover.throttle_writes,
            throttle_for: cutover.throttle_for,
            force: false,
            max_lag_at_start_bytes: cutover.max_lag_at_start_bytes,
            max_unstreamed_bytes: cutover.max_unstreamed_bytes,
            fence: self.deps.config.control.fence,
            ddl: self.deps.config.migration.ddl,
        }
    }

    /// Runs the cutover of `migration` to its end. An error says that it was not begun; everything else is in the report.
    pub async fn run(
        self: &Arc<Self>,
        migration: &str,
        options: CutoverOptions,
    ) -> Result<CutoverReport, CutoverError> {
        let (report, answer) = oneshot::channel();
        let (coordinator, name) = (self.clone(), migration.to_owned());
        self.deps.tasks.spawn(async move {
            let inner = {
                let (coordinator, name) = (coordinator.clone(), name.clone());
                tokio::spawn(async move { coordinator.run_to_the_end(&name, options).await })
            };
            let ended = match inner.await {
                Ok(ended) => ended,
                Err(died) => {
                    tracing::error!(migration = name, error = %died, "the cutover's task died; settling what it left");
                    coordinator.resolver.clone().resolve_until_settled(&coordinator.deps.tasks).await;
                    coordinator.forget(&name);
                    Err(CutoverError::Unexpected("the cutover's task died; what it left was settled".to_owned()))
                }
            };
            // Nobody may be listening any more.
            let _ = report.send(ended);
        });
        answer.await.unwrap_or(Err(CutoverError::Stopped("pgcutover is stopping")))
    }

    /// Takes back what nobody but this process remembers of a cutover whose task died. Where it was not decided,
    /// sessions stay on the server that served before, and what they have on the other one is closed. Databases that
    /// nobody is let into yet are left to whoever opens them.
    fn forget(&self, migration: &str) {
        let served = self.running().remove(migration).map(|running| running.served).unwrap_or_default();
        let stayed = served.iter().filter(|(database, before)| database.route() == *before && !is_closed(database));
        let stayed: Vec<String> = stayed
            .map(|(database, _)| {
                database.set_prepare_window(None);
                database.set_return_window(None);
                database.name().to_owned()
            })
            .collect();
        self.deps.sessions.discard_moves(&stayed);
    }

    /// From now on no cutover begins here, because another process takes over; `Err`: one is running, or something is
    /// being settled.
    pub async fn seal(&self) -> Result<(), &'static str> {
        self.sealed.store(true, Ordering::SeqCst);
        // Whoever gets the next turn sees the seal.
        if tokio::time::timeout(WAIT_FOR_TURN, self.resolver.turn()).await.is_ok() {
            return Ok(());
        }
        self.unseal();
        Err("a cutover is under way, or one is being settled")
    }

    /// Nobody has taken over: cutovers may begin again.
    pub fn unseal(&self) {
        self.sealed.store(false, Ordering::SeqCst);
    }

    /// The running or last cutover of `migration`; none since this process began: `None`.
    pub fn progress(&self, migration: &str) -> Option<CutoverState> {
        let running = self.running();
        let running = running.get(migration)?;
        match &running.report {
            Some(report) => Some(CutoverState::Ended(report.clone())),
            None => running.progress.borrow().clone().map(CutoverState::Running),
        }
    }

    /// Tells a running cutover to give up. Has no effect once its decision has been sent. Returns whether one was running.
    pub fn cancel(&self, migration: &str) -> bool {
        let running = self.running();
        let Some(running) = running.get(migration).filter(|running| running.report.is_none()) else { return false };
        running.cancel.cancel();
        true
    }

    /// Work in databases that the proxy serves, on the server where they run, that is older than the drain of a cutover
    /// or rollback would wait for.
    pub async fn long_work(&self) -> Result<Vec<Obstacle>, CutoverError> {
        // Each look takes a connection of ours on the server: whoever had to wait for one that has begun since shares it.
        let asked = Instant::now();
        let mut last = self.long_work.lock().await;
        if let Some((_, busy)) = last.as_ref().filter(|(began, _)| *began >= asked) {
            return Ok(busy.clone());
        }
        let began = Instant::now();
        let busy = Box::pin(self.look_for_long_work()).await?;
        *last = Some((began, busy.clone()));
        Ok(busy)
    }

    async fn look_for_long_work(&self) -> Result<Vec<Obstacle>, CutoverError> {
        let mut busy = Vec::new();
        for (role, server) in [(ServerRole::Source, &self.deps.source), (ServerRole::Target, &self.deps.target)] {
            let here = |route: &Route| matches!(route, Route::To { server, .. } if *server == role);
            let all = self.deps.switchboard.all();
            let databases = all.iter().filter(|database| here(&database.route()));
            let databases: Vec<String> = databases.map(|database| database.name().to_owned()).collect();
            if databases.is_empty() {
                continue;
            }
            let control = server.control(&self.deps.config.control.database, "blockers").await?;
            let own_prefix = server.instance().application_name("");
            let known = Known { pids: Vec::new(), own_prefix, slots: Vec::new() };
            busy.extend(hard_fence::backends(&control, &databases, &known, Looking::Work).await?);
        }
        busy.retain(|obstacle| obstacle.age_seconds > self.deps.config.cutover.drain_timeout.as_secs_f64());
        Ok(busy)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run_to_the_end(&self, migration: &str, options: CutoverOptions) -> Result<CutoverReport, CutoverError> {
        let Ok(turn) = tokio::time::timeout(WAIT_FOR_TURN, self.resolver.turn()).await else {
            return Err(CutoverError::Guardrail(
                "another cutover is running, or one is still being settled".to_owned(),
            ));
        };
        if self.sealed.load(Ordering::SeqCst) {
            return Err(CutoverError::Guardrail("another process is taking over from this one".to_owned()));
        }
        let direction = options.direction;
        let phase = Phase::Prepare;
        let (progress, seen) =
            watch::channel(Some(CutoverProgress { direction, epoch: 0, phase, elapsed_ms: 0, paused_ms: None }));
        let cancel = CancellationToken::new();
        let running = Running { progress: seen, cancel: cancel.clone(), report: None, served: Vec::new() };
        // Before anything that may wait for somebody: what is shown can be stopped.
        let earlier = self.running().insert(migration.to_owned(), running);
        let orders = Orders { cancel, tasks: self.deps.tasks.clone() };
        let begun = async {
            // The lock first: whoever settles leaves alone what has a living coordinator, from the engine's first note on.
            let sides = self.take_sides(direction, migration).await?;
            let lease = self.deps.engine.begin_cutover(migration, direction).await;
            // The migration is not where it can be taken, or is not here: that says all.
            Ok((sides, lease.map_err(CutoverError::Guardrail)?))
        };
        // Where the engine has taken it all the same, it is told that nobody works on it.
        let (sides, lease) = match Box::pin(bounded(&orders, None, begun)).await {
            Ok(begun) => begun,
            Err(error) => {
                let mut running = self.running();
                running.remove(migration);
                running.extend(earlier.map(|earlier| (migration.to_owned(), earlier)));
                return Err(error);
            }
        };
        // Made here where nobody has asked for them yet: sessions that come while it is prepared are to be found too.
        let databases = lease.databases().into_iter().map(|name| self.deps.switchboard.database(&name));
        let served = databases.map(|database| (database.clone(), database.route())).collect();
        if let Some(running) = self.running().get_mut(migration) {
            running.served = served;
        }
        let mut leaves_chores = Arc::<AtomicBool>::default();
        let report = match Box::pin(self.accept(sides, migration, options, lease.clone(), orders, progress)).await {
            Ok(work) => {
                leaves_chores = work.leaves_chores.clone();
                Box::pin(walk(work)).await
            }
            Err(error) => {
                tracing::warn!(migration, %error, "cutover not begun");
                if let Err(reason) = lease.finish(Outcome::Aborted).await {
                    tracing::warn!(migration, reason, "the engine did not take the migration back");
                }
                CutoverReport::not_begun(options.direction, &error)
            }
        };
        drop(turn);
        report.count(&self.deps.metrics, options.max_pause);
        if let Some(running) = self.running().get_mut(migration) {
            running.report = Some(report.clone());
            running.served.clear();
        }
        tracing::info!(migration, outcome = ?report.outcome, pause_ms = report.pause_ms, reason = report.reason, "cutover ended");
        if self.deps.switchboard.all().iter().any(|database| is_closed(database)) {
            // In doubt, or contradictory: the rows decide.
            self.resolver.clone().resolve_until_settled(&self.deps.tasks).await;
        } else if leaves_chores.load(Ordering::SeqCst) {
            self.resolver.clone().settle_in_background(&self.deps.tasks);
        }
        Ok(report)
    }

    /// Sessions in the control databases of both servers that hold the coordinator's lock: whoever settles asks the one
    /// that holds the decision, the engine's state is told to who asks the target.
    async fn take_sides(&self, direction: Direction, migration: &str) -> Result<(Side, Side), CutoverError> {
        let target = self.side_with_lock(ServerRole::Target, migration).await?;
        let source = self.side_with_lock(ServerRole::Source, migration).await?;
        Ok(direction.ends(source, target))
    }

    async fn side_with_lock(&self, role: ServerRole, migration: &str) -> Result<Side, CutoverError> {
        let database = &self.deps.config.control.database;
        let (connector, place) = match role {
            ServerRole::Source => (&self.deps.source, Place::SourceControl),
            ServerRole::Target => (&self.deps.target, Place::TargetControl),
        };
        let side = side(role, connector, database, place).await?;
        // A session that has just ended, ours or that of a process that was killed, holds it for a moment longer.
        let deadline = Instant::now() + WAIT_FOR_TURN;
        while !claim_coordination(&side.control, migration).await? {
            if Instant::now() >= deadline {
                return Err(CutoverError::Guardrail(format!(
                    "another coordinator is working on migration {migration:?}; it ends, or its session on the {role} ends"
                )));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(side)
    }

    /// Everything else that a cutover needs to begin: a number, the databases, the fence to come back through.
    async fn accept(
        &self,
        (from, to): (Side, Side),
        migration: &str,
        options: CutoverOptions,
        lease: Arc<dyn Lease>,
        orders: Orders,
        progress: watch::Sender<Option<CutoverProgress>>,
    ) -> Result<Box<Work>, CutoverError> {
        let control_database = self.deps.config.control.database.clone();
        let (left, led_to) = (claims::read(&*from.control).await?, claims::read(&*to.control).await?);
        let epoch = Epoch(resolve::highest_epoch(&left, &led_to).0 + 1);
        // Its settings would be saved as those from before, and lifting it would open what we have shut.
        if let Some(fence) = left.fences.iter().find(|fence| fence.outcome.is_none()) {
            return Err(CutoverError::Guardrail(format!(
                "the fence of cutover {} has not been lifted yet; pgcutover goes on trying, or start it again",
                fence.epoch
            )));
        }
        let home = home::find(&to.control, migration).await?;
        if options.direction == Direction::Reverse && home.is_none() {
            return Err(CutoverError::Guardrail(format!(
                "no fence of migration {migration:?} stands on the {}: it was not left by a cutover, or the cutover is \
                 still being noted there",
                to.role
            )));
        }
        // The same two, in the order of their roles again.
        let (of_source, of_target) = options.direction.ends(&left, &led_to);
        let databases = lease.databases();
        let mut lines = Vec::new();
        for name in &databases {
            match resolve::resolve(name, Some(of_source), Some(of_target)) {
                Claimed::Active { server, epoch: earlier } if server == from.role => {
                    lines.push(Line {
                        name: name.clone(),
                        gate: self.deps.switchboard.database(name),
                        earlier,
                        sessions: None,
                    });
                }
                Claimed::Active { server, .. } => {
                    return Err(CutoverError::Guardrail(format!("database {name:?} runs on the {server} already")));
                }
                Claimed::Undecided { epoch, .. } => {
                    return Err(CutoverError::Guardrail(format!("cutover {epoch} of {name:?} is still undecided")));
                }
                Claimed::Refuse { reason } => return Err(CutoverError::Guardrail(reason)),
            }
        }
        // The one that a rollback has lifted is noted so; until then its settings would be taken for those from before.
        if home::find(&from.control, migration).await?.is_some() {
            return Err(CutoverError::Guardrail(format!(
                "the settings of the {} from before an earlier cutover are not restored yet; start pgcutover again",
                from.role
            )));
        }
        let work = Work {
            options,
            shutting: Shutting::of(&from.control).await?,
            case: Case { epoch, migration: migration.to_owned(), databases },
            control_database,
            from,
            to,
            home,
            lines,
            sessions: self.deps.sessions.clone(),
            lease,
            failpoints: self.deps.failpoints.clone(),
            orders,
            undo: Undo::default(),
            leaves_chores: Arc::default(),
            phase: Phase::Prepare,
            progress,
            timings: Timings::start(),
            notes: Vec::new(),
            slowed: Arc::default(),
            forced: Vec::new(),
            would: Vec::new(),
            sessions_moved: 0,
            sessions_ended: 0,
            reads_before: 0,
        };
        work.publish();
        Ok(Box::new(work))
    }
}

/// The whole story of one cutover.
async fn walk(work: Box<Work>) -> CutoverReport {
    let before_the_decision = async {
        let prepared = Ready(work).prepare().await?;
        let paused = prepared.pause().await?;
        paused.drain().await
    };
    let drained = match Box::pin(before_the_decision).await {
        Ok(drained) => drained,
        Err(stopped) => return Box::pin(stopped.abort()).await,
    };
    if drained.is_dry_run() {
        return Box::pin(drained.resume()).await;
    }
    let mut verdict = Box::pin(drained.decide()).await;
    if let Verdict::InDoubt(in_doubt) = verdict {
        verdict = Box::pin(in_doubt.settle()).await;
    }
    match verdict {
        Verdict::Decided(decided) => Box::pin(decided.switch()).await,
        Verdict::Stopped(stopped) => Box::pin(stopped.abort()).await,
        Verdict::InDoubt(in_doubt) => in_doubt.give_up(),
    }
}

async fn side(
    role: ServerRole,
    connector: &Connector,
    control_database: &str,
    place: Place,
) -> Result<Side, CutoverError> {
    let control = connector.control(control_database, "cutover").await?;
    let (identity, standby) = claims::identify(&*control).await?;
    if standby {
        return Err(CutoverError::Guardrail(format!("the {role} is a standby (in recovery)")));
    }
    bootstrap(&control, place).await?;
    Ok(Side { role, connector: connector.clone(), control, identity })
}
