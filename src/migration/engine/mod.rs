//! The engine: owns the migrations of a target, carries out orders, shows how far they are.
//!
//! ```text
//! Engine ── looks for the lock in the target's control database; with it comes a generation
//!   └─ Actor (one for each migration) ── the only one who changes its state: durable, then visible, then acted upon
//!        └─ Worker ── prerequisites, validation, roles
//!             └─ DatabaseWork (one for each database, in parallel) ── publication, slot, schema, copy, stream
//! ```
//!
//! The target may be down at any time, also at the start: the engine then looks for it in the background, and answers
//! from what it knew; what migrations make the source keep is bounded meanwhile too. The proxy does not depend on it.
//!
//! # Failpoints
//!
//! | name | just after |
//! | --- | --- |
//! | `engine.after_state` | a change of state became durable, before anybody sees it |
//! | `engine.after_roles` | the roles were brought in line |
//! | `engine.after_identities` | replica identities were set |
//! | `engine.after_publication` | the publication was made |
//! | `engine.after_slot` | the slot was made, before its start is recorded |
//! | `engine.after_barrier` | the visibility barrier, before slot start and barrier are recorded |
//! | `engine.after_database` | the target's database and progress row were made |
//! | `engine.after_schema` | the definitions were restored, before that is recorded |
//! | `engine.after_copy` | rows and indexes are there, before that is recorded |
//! | `engine.after_constraints` | foreign keys and triggers are there, before that is recorded |
//! | `return.after_publication`, `return.after_slot` | publication, slot of the stream back were made |
//! | `return.after_prepared` | the stream back is recorded as prepared |
//! | `return.after_turn` | it became the current stream, before the other one is removed |
//! | `watch.after_start` | the watch over a fenced server has begun to read |
//! | `watch.before_keep` | (just before) what it has found is made durable |
//! | `watch.after_keep` | that is durable, before the slot is told |
//! | `engine.before_undo` | (just before) an object is removed |
//! | `apply.before_commit`, `apply.after_commit` | around COMMIT of an apply transaction |
//! | `stream.before_confirm` | (just before) the slot is told what is durable |
//!
//! The copy's own are listed in [`super::copy::CopyContext::failpoints`].

mod actor;
mod back;
mod cancel;
mod context;
mod database;
mod definitions;
mod error;
mod fence_watch;
mod gauges;
mod lag_watch;
mod late;
mod lease;
mod live;
mod ownership;
mod recorder;
mod source_guard;
mod source_watch;
mod synchronise;
mod table_live;
mod turn;
mod validation;
mod verification;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use self::actor::{Actor, Command};
use self::context::Context;
use self::live::{Current, DatabaseLive, Live, Status, Step};
use self::ownership::Ownership;
use crate::catalog::decision::Outcome;
use crate::catalog::migrations::{CatalogError, EngineLock, MigrationCatalog, MigrationRow, NewDatabase};
use crate::catalog::streams::Direction;
use crate::catalog::{Place, bootstrap};
use crate::config::Config;
use crate::failpoint::Failpoints;
use crate::migration::copy::Workers;
use crate::migration::state::State;
use crate::migration::stream::describe;
use crate::migration::verify::TableResult;
use crate::migration::view::{CancelReport, MigrationSpec, MigrationView, TableView};
use crate::postgres::Connector;
use crate::shutdown::Tasks;
use crate::switch::Epoch;
use crate::telemetry::metrics::Metrics;

pub use error::EngineError;
pub use lease::{CutoverLease, DatabaseHandle, StreamBroken};
pub use ownership::NotHere;
pub use validation::Applied;

/// How often a lock that another engine has is asked for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How often the connection that holds the lock is tried.
const LOCK_CHECK: Duration = Duration::from_secs(2);

/// How long tasks may take to stop; they hold nothing that a crash would not leave too.
const GRACE: Duration = Duration::from_secs(10);

/// What the engine works with.
pub struct EngineDeps {
    /// The configuration.
    pub config: Arc<Config>,
    /// The server that holds the data.
    pub source: Connector,
    /// The server that the data moves to.
    pub target: Connector,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Owner of the engine's tasks.
    pub tasks: Tasks,
    /// Test points.
    pub failpoints: Failpoints,
}

/// See the module.
pub struct Engine {
    deps: EngineDeps,
    owner: watch::Sender<Ownership>,
    migrations: RwLock<BTreeMap<String, Entry>>,
    /// Counts up with every change of a state.
    changes: watch::Sender<u64>,
    /// Verdicts of cutovers that were told while nobody could take note: before the migrations were known, or between two
    /// engines.
    verdicts: Mutex<HashMap<String, Outcome>>,
    /// Held while a cutover begins: an earlier verdict must not be told to it.
    begins: tokio::sync::Mutex<()>,
    /// Held while a migration is accepted: of two that want the same database one must see the other.
    creates: tokio::sync::Mutex<()>,
    /// Why it is not the owner, as logged last.
    last_reason: Mutex<String>,
    /// One budget of connections for every database of every migration.
    workers: Workers,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("owner", &*self.owner.borrow()).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Entry {
    live: Arc<Live>,
    commands: mpsc::Sender<Command>,
}

/// Whether the migration was cut over before. Where it is waiting for a cutover that was rolled back, which leaves the target
/// fenced.
fn has_come_back(live: &Live) -> bool {
    live.databases.iter().any(|database| database.current().epoch > Epoch(0))
}

impl Engine {
    /// Starts to look for the target's migrations, and to work on them, in tasks of `deps.tasks`.
    pub fn start(deps: EngineDeps) -> Arc<Self> {
        let tasks = deps.tasks.clone();
        let engine = Arc::new(Self {
            workers: Workers::new(&deps.config.migration),
            deps,
            owner: watch::Sender::new(Ownership::Untried),
            migrations: RwLock::default(),
            changes: watch::Sender::new(0),
            verdicts: Mutex::default(),
            begins: tokio::sync::Mutex::default(),
            creates: tokio::sync::Mutex::default(),
            last_reason: Mutex::default(),
        });
        let owning = engine.clone();
        tasks.spawn(async move { owning.own().await });
        tasks.spawn(source_guard::guard(engine.clone()));
        engine
    }

    /// Accepts a migration and begins to work on it.
    pub async fn create(&self, mut spec: MigrationSpec) -> Result<MigrationView, EngineError> {
        let (catalog, actors) = self.owned()?;
        // First: with the name of one that is there, nothing else about the order matters.
        if self.entry(spec.name.as_str()).is_ok() {
            return Err(CatalogError::Exists(spec.name.to_string()).into());
        }
        if spec.databases.is_empty() {
            spec.databases = self.all_databases().await?;
        }
        spec.databases.sort();
        let _only = self.creates.lock().await;
        self.check(&spec)?;
        let name = spec.name.to_string();
        let databases: Vec<NewDatabase> = spec
            .databases
            .iter()
            .map(|database| NewDatabase {
                database: database.clone(),
                slot: format!("pgcutover_{:016x}", rand::random::<u64>()),
                publication: format!("pgcutover_{name}"),
            })
            .collect();
        let definition = serde_json::to_value(&spec).unwrap_or_default();
        let state = State::PerformingPreRequisiteSteps;
        catalog.insert(&name, &definition, state.substate(), &databases).await?;
        tracing::info!(migration = name, databases = ?spec.databases, mode = ?spec.mode, option = ?spec.option, "accepted");
        let databases = databases
            .into_iter()
            .map(|new| {
                let (direction, epoch) = (Direction::Forward, Epoch(0));
                let current = Current { direction, epoch, slot: new.slot, publication: new.publication };
                Arc::new(DatabaseLive::new(new.database, current, Step::Waiting))
            })
            .collect();
        let status = Status { state, error: None, validation: None, finished_at: None };
        let live = Arc::new(Live::new(spec, self.source_address(), live::unix_now(), databases, status));
        let entry = self.employ(live.clone(), catalog, &actors);
        self.migrations.write().unwrap_or_else(PoisonError::into_inner).insert(name, entry);
        self.changes.send_modify(|changes| *changes += 1);
        Ok(live.view())
    }

    /// Every migration, newest first.
    pub fn list(&self) -> Result<Vec<MigrationView>, EngineError> {
        let entries = self.entries();
        if entries.is_empty() {
            // An empty list is an answer only from who has read the catalogue.
            self.owned()?;
        }
        let mut views: Vec<MigrationView> = entries.iter().map(|entry| entry.live.view()).collect();
        views.sort_by(|a, b| b.started_at.total_cmp(&a.started_at));
        Ok(views)
    }

    /// One migration.
    pub fn show(&self, name: &str) -> Result<MigrationView, EngineError> {
        Ok(self.entry(name)?.live.view())
    }

    /// The tables of a migration.
    pub fn tables(&self, name: &str) -> Result<Vec<TableView>, EngineError> {
        Ok(self.entry(name)?.live.tables())
    }

    /// Counts up whenever a migration changed its state, was accepted, or was read from the catalogue.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Stops a migration and removes what was made for it on both servers; leaves the target's data. Comes back when
    /// that is done, with what was removed and what is left. If something is left that could not be removed, the
    /// migration stays Cancelling and can be cancelled again.
    pub async fn cancel(&self, name: &str) -> Result<CancelReport, EngineError> {
        self.order(name, Command::Cancel).await
    }

    /// Begins again where a failed migration ended.
    pub async fn retry(&self, name: &str) -> Result<(), EngineError> {
        self.order(name, Command::Retry).await
    }

    /// Takes a migration that is ready for its cutover. Refused when the target lacks what was defined on the source since
    /// the migration began, when a rule of its validation that is about replication fails now, and, with `require_verified`, when anything differs.
    pub async fn begin_cutover(self: &Arc<Self>, name: &str) -> Result<CutoverLease, EngineError> {
        let live = self.entry(name)?.live;
        if live.state() == State::WaitingForCutoverTrigger {
            if !has_come_back(&live) {
                Box::pin(self.check_drift(&live, Direction::Forward)).await?;
            }
            Box::pin(self.must_still_hold(&live)).await?;
            if self.deps.config.cutover.require_verified {
                Box::pin(self.must_be_equal(&live)).await?;
            }
        }
        self.begin(name, Direction::Forward).await?;
        Ok(CutoverLease::new(self.clone(), self.entry(name)?.live))
    }

    /// Takes a migration that was cut over, to take the cutover back.
    pub async fn begin_rollback(self: &Arc<Self>, name: &str) -> Result<CutoverLease, EngineError> {
        self.begin(name, Direction::Reverse).await?;
        Ok(CutoverLease::new(self.clone(), self.entry(name)?.live))
    }

    /// One at a time: a verdict that could not be told when it fell belongs to the cutover before, and is told first.
    async fn begin(&self, name: &str, direction: Direction) -> Result<(), EngineError> {
        let _only = self.begins.lock().await;
        let untold = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        if let Some(outcome) = untold {
            self.settle_cutover(name, outcome).await?;
        }
        self.order(name, |reply| Command::Begin(direction, reply)).await
    }

    /// Ends the stream by which a cutover could have been rolled back. Comes back when that is done, with what was removed
    /// and what is left. If something could not be removed, it is tried again in the background.
    pub async fn complete(&self, name: &str) -> Result<CancelReport, EngineError> {
        self.order(name, Command::Complete).await
    }

    /// See [`CutoverLease::prepare_return`].
    async fn prepare_return(&self, name: &str, epoch: Epoch) -> Result<Vec<String>, EngineError> {
        let why_not = self.order(name, |reply| Command::PrepareReturn(epoch, reply)).await?;
        Ok(self.entry(name)?.live.fenced_note().into_iter().chain(why_not).collect())
    }

    /// See [`CutoverLease::foresee_return`].
    async fn foresee_return(&self, live: &Live) -> Result<Option<String>, EngineError> {
        let (from, to) = live.state().direction().ends(&self.deps.source, &self.deps.target);
        let control = &self.deps.config.control.database;
        let foreseen = async {
            match late::cannot_apply([from, to], control).await? {
                None => turn::cannot_send(to, control, live.databases.len(), &turn::watching(live)).await,
                why => Ok(why),
            }
        };
        foreseen.await.map_err(|error: error::WorkError| EngineError::Return(describe(&error)))
    }

    /// Tells what became of a cutover, also of one that an earlier life of this process has begun. A migration that is
    /// not being cut over is left as it is.
    pub async fn settle_cutover(&self, name: &str, outcome: Outcome) -> Result<(), EngineError> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), outcome);
        match self.entry(name) {
            Ok(_) => {}
            // It is read later, and finds the verdict then.
            Err(EngineError::Unavailable(_) | EngineError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
        let settled = self.order(name, |reply| Command::Settle(outcome, reply)).await;
        if settled.is_ok() {
            self.verdicts.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        }
        settled
    }

    /// Source and target.
    fn connectors(&self) -> (Connector, Connector) {
        (self.deps.source.clone(), self.deps.target.clone())
    }

    fn source_address(&self) -> String {
        format!("{}:{}", self.deps.config.source.host, self.deps.config.source.port)
    }

    fn entries(&self) -> Vec<Entry> {
        self.migrations.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn entry(&self, name: &str) -> Result<Entry, EngineError> {
        let found = self.migrations.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        match found {
            Some(entry) => Ok(entry),
            None => self.owned().and(Err(EngineError::NotFound(name.to_owned()))),
        }
    }

    /// Why it does not run in this process; none: it does.
    pub fn not_here(&self) -> Option<NotHere> {
        self.owner.borrow().not_here()
    }

    /// Resolves once it runs here, or does not for another reason than `why`. Dropping the future loses nothing.
    pub async fn no_longer(&self, why: NotHere) {
        let mut owner = self.owner.subscribe();
        // The sender lives as long as this does.
        drop(owner.wait_for(|owner| owner.not_here() != Some(why)).await);
    }

    fn owned(&self) -> Result<(MigrationCatalog, Tasks), EngineError> {
        let owner = self.owner.borrow();
        match &*owner {
            Ownership::Yes { catalog, actors } => Ok((catalog.clone(), actors.clone())),
            Ownership::Untried | Ownership::No(_) | Ownership::Another => {
                Err(EngineError::Unavailable(owner.why_not().unwrap_or_default().to_owned()))
            }
        }
    }

    async fn order<T>(
        &self,
        name: &str,
        command: impl FnOnce(oneshot::Sender<Result<T, EngineError>>) -> Command,
    ) -> Result<T, EngineError> {
        // Its migrations stay known when the engine is lost, and nobody works on them.
        let stopped = || match self.owned() {
            Err(why) => why,
            Ok(_) => EngineError::Unavailable("it has just begun anew; give the order again".to_owned()),
        };
        let entry = self.entry(name)?;
        let (reply, answer) = oneshot::channel();
        entry.commands.send(command(reply)).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// What cannot be accepted.
    fn check(&self, spec: &MigrationSpec) -> Result<(), EngineError> {
        let bad = |message: String| Err(EngineError::BadRequest(message));
        if spec.databases.is_empty() {
            return bad("the source has no database to migrate".to_owned());
        }
        if let Some(pair) = spec.databases.windows(2).find(|pair| pair[0] == pair[1]) {
            return bad(format!("database {:?} is named twice", pair[0]));
        }
        for entry in self.entries() {
            let (live, state) = (&entry.live, entry.live.state());
            // Whatever else has come to its end still has to undo what the next one would find made, and need.
            let only_validated =
                state == State::Completed && live.databases.iter().all(|database| database.step() == Step::Waiting);
            if only_validated || matches!(state, State::Cancelled | State::Closed) {
                continue;
            }
            if let Some(taken) = spec.databases.iter().find(|name| live.database(name).is_some()) {
                let name = live.name();
                let order = if matches!(state, State::Completed | State::Closing) { "complete" } else { "cancel" };
                return bad(format!("database {taken:?} belongs to migration {name:?}; {order} that migration first"));
            }
        }
        Ok(())
    }

    /// Every table must have been found equal since it was last written to.
    async fn must_be_equal(&self, live: &Live) -> Result<(), EngineError> {
        let report = self.verify_changed(live.name()).await?;
        if report.differences == 0 {
            return Ok(());
        }
        let tables = report.tables.iter().map(|table| format!("table {}", table.result.table()));
        let definitions = report.definitions.iter().flat_map(|found| &found.definitions);
        let definitions = definitions.map(|found| format!("{} {}", found.kind, found.name));
        let first: Vec<String> = tables.chain(definitions).take(3).collect();
        Err(EngineError::Unverified { differences: report.differences, first: first.join(", ") })
    }

    /// Every database of the source that can be connected to, without templates and without the control database.
    async fn all_databases(&self) -> Result<Vec<String>, EngineError> {
        let control_database = &self.deps.config.control.database;
        let source = self.deps.source.control(control_database, "databases").await?;
        let rows = source
            .query(
                "SELECT datname::text FROM pg_catalog.pg_database
                  WHERE datallowconn AND NOT datistemplate AND datname <> $1 ORDER BY 1",
                &[control_database],
            )
            .await
            .map_err(EngineError::Databases)?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Gives a migration its actor.
    fn employ(&self, live: Arc<Live>, catalog: MigrationCatalog, actors: &Tasks) -> Entry {
        let deps = &self.deps;
        let context = Arc::new(Context {
            config: deps.config.clone(),
            source: deps.source.clone(),
            target: deps.target.clone(),
            catalog,
            metrics: deps.metrics.clone(),
            failpoints: deps.failpoints.clone(),
            workers: self.workers.clone(),
            live: live.clone(),
            changes: self.changes.clone(),
        });
        let (actor, commands) = Actor::new(context, actors.clone());
        actors.spawn(actor.run());
        Entry { live, commands }
    }

    /// Looks for the lock, works while it is held, and begins again when it is lost.
    async fn own(&self) {
        loop {
            match Box::pin(self.take_over()).await {
                Ok(Some((catalog, lock))) => Box::pin(self.work_while_owner(catalog, lock)).await,
                Ok(None) => self.not_owner(Ownership::Another),
                Err(error) => self.not_owner(Ownership::No(describe(&*error))),
            }
            // A sleep and a token: nothing is lost by dropping either.
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = self.deps.tasks.stopping() => return,
            }
        }
    }

    fn not_owner(&self, now: Ownership) {
        let reason = now.why_not().unwrap_or_default();
        let was =
            std::mem::replace(&mut *self.last_reason.lock().unwrap_or_else(PoisonError::into_inner), reason.to_owned());
        if was != reason {
            tracing::warn!(reason, "the engine does not run here for now");
        }
        self.owner.send_replace(now);
    }

    async fn take_over(
        &self,
    ) -> Result<Option<(MigrationCatalog, EngineLock)>, Box<dyn std::error::Error + Send + Sync>> {
        let database = &self.deps.config.control.database;
        let control = self.deps.target.control(database, "engine").await?;
        bootstrap(&control, Place::TargetControl).await?;
        Ok(MigrationCatalog::take_over(&self.deps.target, database).await?)
    }

    /// Until the lock is lost or the engine stops.
    async fn work_while_owner(&self, catalog: MigrationCatalog, lock: EngineLock) {
        let actors = self.deps.tasks.child();
        let generation = catalog.generation().0;
        tracing::info!(generation, "the engine runs here");
        self.last_reason.lock().unwrap_or_else(PoisonError::into_inner).clear();
        match Box::pin(self.load(&catalog, &actors)).await {
            Ok(()) => {
                self.owner.send_replace(Ownership::Yes { catalog, actors: actors.clone() });
                self.changes.send_modify(|changes| *changes += 1);
                let reason = tokio::select! {
                    () = lock.lost(LOCK_CHECK) => {
                        tracing::warn!(generation, "the engine lock is lost; the work stops");
                        "the connection to the target that held the engine lock was lost"
                    }
                    () = self.deps.tasks.stopping() => "it is stopping",
                };
                self.not_owner(Ownership::No(reason.to_owned()));
                self.break_streams("the engine does not run here any more");
            }
            Err(error) => self.not_owner(Ownership::No(describe(&error))),
        }
        let left = actors.join(GRACE).await;
        if left > 0 {
            tracing::error!(left, "tasks of the engine did not stop in time");
        }
    }

    /// A cutover that waits for a stream learns that it waits in vain. Who runs the engine next has streams of its own.
    fn break_streams(&self, reason: &str) {
        for database in self.entries().iter().flat_map(|entry| &entry.live.databases) {
            database.broken.send_replace(Some(reason.to_owned()));
        }
    }

    /// Reads the migrations and goes on with them. They become visible together: half a list would be a wrong one.
    async fn load(&self, catalog: &MigrationCatalog, actors: &Tasks) -> Result<(), CatalogError> {
        let mut entries = BTreeMap::new();
        for row in catalog.all().await? {
            let name = row.name.clone();
            let Some(live) = self.revive(catalog, row).await? else {
                tracing::error!(
                    migration = name,
                    "the catalogue holds a migration that this version does not understand"
                );
                continue;
            };
            let entry = self.employ(live, catalog.clone(), actors);
            entries.insert(name, entry);
        }
        let known: Vec<(String, Entry)> = entries.iter().map(|(name, entry)| (name.clone(), entry.clone())).collect();
        let before = std::mem::replace(&mut *self.migrations.write().unwrap_or_else(PoisonError::into_inner), entries);
        // What an earlier ownership of the engine has counted is counted anew by what replaces it.
        for database in before.values().flat_map(|entry| &entry.live.databases) {
            database.uncount(&self.deps.metrics);
        }
        // Only now: a verdict that is told from here on finds the migration, one from before is found here.
        for (name, entry) in known {
            let verdict = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied();
            if let Some(outcome) = verdict {
                let (reply, _nobody) = oneshot::channel();
                // The actor has just been started and has room; one that is not being cut over leaves it at that.
                let _ = entry.commands.try_send(Command::Settle(outcome, reply));
            }
        }
        Ok(())
    }

    /// A migration as the catalogue has it; none: it cannot be read.
    async fn revive(&self, catalog: &MigrationCatalog, row: MigrationRow) -> Result<Option<Arc<Live>>, CatalogError> {
        let (Ok(spec), Ok(state)) = (serde_json::from_value::<MigrationSpec>(row.definition), row.state.parse()) else {
            return Ok(None);
        };
        let mut databases = Vec::new();
        for database in catalog.databases(&row.name).await? {
            let Some(step) = Step::parse(&database.step) else { return Ok(None) };
            let current = Current::of(&database);
            let live = DatabaseLive::new(database.database, current, step);
            if let Some(next) = &database.next {
                live.set_prepared(&next.slot);
            }
            live.load_tables(&catalog.tables(&row.name, &live.name).await?);
            live.fenced.set_watch(database.watch);
            live.fenced.found.send_replace(catalog.fenced_writes(&row.name, &live.name).await?);
            for verified in catalog.verified(&row.name).await?.into_iter().filter(|row| row.database == live.name) {
                let found = serde_json::from_value::<TableResult>(verified.result).ok();
                live.update_table(&verified.table, |table| table.verification = found.map(|found| found.summary()));
            }
            databases.push(Arc::new(live));
        }
        let status = Status {
            state,
            error: row.error.and_then(|error| serde_json::from_value(error).ok()),
            validation: row.validation,
            finished_at: row.finished_at,
        };
        Ok(Some(Arc::new(Live::new(spec, self.source_address(), row.created_at, databases, status))))
    }
}
