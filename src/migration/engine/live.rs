//! What is going on at the moment, shared between the worker that does it and the views that show it.
//!
//! The catalogue holds what survives; this holds what changes by the second. State is changed by the actor alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::table_live::{Counted, IndexesLive, TableLive, Verified};
use crate::catalog::door::Turns;
use crate::catalog::streams::Direction;
use crate::catalog::tables::{DatabaseRow, TableRow, TableState};
use crate::catalog::watches::{FencedWrite, Watch};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::apply::applier::Applied;
use crate::migration::lag::{Lag, LagMeter};
use crate::migration::reserve::Reserve;
use crate::migration::state::State;
use crate::migration::stream::{ApplySessions, StreamStatus};
use crate::migration::view::{
    CancelReport, DatabaseView, FenceWatchView, FencedWriteView, FullLoadView, MigrationSpec, MigrationView, Problem,
    TableView, VerificationView, VerifyReport,
};
use crate::migration::wal_limit::SlotWal;
use crate::postgres::walsender::ReplicationConnection;
use crate::switch::Epoch;
use crate::telemetry::metrics::{Metrics, WorkState};

/// One migration.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) spec: MigrationSpec,
    pub(super) source: String,
    pub(super) started_at: f64,
    pub(super) databases: Vec<Arc<DatabaseLive>>,
    status: watch::Sender<Status>,
    cancelled: Mutex<Option<CancelReport>>,
    /// Held by whoever verifies.
    pub(super) verifying: tokio::sync::Mutex<()>,
    verification: Mutex<Option<VerificationView>>,
    /// What the last verification of this process found.
    verified: Mutex<Option<VerifyReport>>,
}

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Status {
    pub(super) state: State,
    pub(super) error: Option<Problem>,
    pub(super) validation: Option<serde_json::Value>,
    pub(super) finished_at: Option<f64>,
}

/// One database of a migration.
#[derive(Debug)]
pub(super) struct DatabaseLive {
    pub(super) name: String,
    pub(super) stream: StreamStatus,
    /// Opened by a cutover before it shuts the database that the next stream applies to.
    pub(super) reserve: Arc<Reserve<ApplySessions>>,
    /// Of all who come through a fence's door into this database.
    pub(super) turns: Turns,
    /// The watch over the server that was left.
    pub(super) fenced: FencedLive,
    /// Why its worker has ended; none while it runs.
    pub(super) broken: watch::Sender<Option<String>>,
    inner: Mutex<Inner>,
}

/// What is known of writes on fenced servers.
#[derive(Debug, Default)]
pub(super) struct FencedLive {
    /// Opened by a cutover before it shuts the database that is watched afterwards.
    pub(super) reserve: Reserve<ReplicationConnection>,
    /// What is watched now.
    pub(super) watch: watch::Sender<Option<Watch>>,
    /// What was found, ever.
    pub(super) found: watch::Sender<Vec<FencedWrite>>,
    /// Whether somebody looks; none: there is nothing to watch.
    pub(super) looking: watch::Sender<Option<Looking>>,
}

impl FencedLive {
    /// From now on this is watched. Nobody looks at the one before any more, even before its slot is dropped.
    pub(super) fn set_watch(&self, watch: Option<Watch>) {
        self.watch.send_if_modified(|watched| std::mem::replace(watched, watch.clone()) != watch);
    }

    /// The slot that watches, or did so until the watch was given up.
    pub(super) fn watched_slot(&self) -> Option<String> {
        self.watch.borrow().as_ref().map(|watch| watch.slot.clone())
    }
}

/// Whether somebody looks at what is written on the server that was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Looking {
    Yes,
    /// And why not.
    No(String),
}

#[derive(Debug)]
struct Inner {
    step: Step,
    current: Current,
    /// The slot that a cutover has prepared last, on the server that it leads to.
    prepared: Option<String>,
    tables: BTreeMap<QualifiedName, TableLive>,
    lag: LagMeter,
    slot: Option<SlotLive>,
    /// What the gauges of full loads have of it.
    counted: Counted,
    /// Foreign keys that a cutover has made without looking at rows, and that are not validated yet.
    validating: usize,
}

impl Inner {
    fn recount(&mut self, counted: Counted, metrics: &Metrics) {
        let before = std::mem::replace(&mut self.counted, counted);
        for (index, state) in WorkState::ALL.iter().enumerate() {
            let label = [state.as_str()];
            metrics.copy_tables.with_label_values(&label).add(counted.tables[index] - before.tables[index]);
            metrics.index_builds.with_label_values(&label).add(counted.indexes[index] - before.indexes[index]);
        }
    }
}

/// What the slot of a database makes the source keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotLive {
    pub(super) wal: SlotWal,
    /// As configured.
    pub(super) limit: Option<u64>,
    /// It is much.
    pub(super) warning: bool,
}

/// The stream that carries the changes of a database now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Current {
    /// Which way it flows.
    pub(super) direction: Direction,
    /// The cutover at whose boundary it begins.
    pub(super) epoch: Epoch,
    /// On the server that it comes from; empty: there is no stream.
    pub(super) slot: String,
    /// Likewise.
    pub(super) publication: String,
}

impl Current {
    pub(super) fn of(row: &DatabaseRow) -> Self {
        Self {
            direction: row.direction,
            epoch: row.epoch,
            slot: row.slot.clone(),
            publication: row.publication.clone(),
        }
    }

    /// Whether there is a stream.
    pub(super) fn flows(&self) -> bool {
        !self.slot.is_empty()
    }
}

/// The last step of a database that was completed, in their order. Stored in the catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// Nothing was made.
    Waiting,
    /// Publication, slot and barrier are there.
    Published,
    /// The tables are there.
    Restored,
    /// All rows and indexes are there; the stream may begin.
    Copied,
    /// Foreign keys, triggers and the rest are there.
    Constrained,
}

impl Step {
    const ALL: [Self; 5] = [Self::Waiting, Self::Published, Self::Restored, Self::Copied, Self::Constrained];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "Waiting",
            Self::Published => "Published",
            Self::Restored => "Restored",
            Self::Copied => "Copied",
            Self::Constrained => "Constrained",
        }
    }

    /// What is going on after it, for operators.
    fn doing(self) -> &'static str {
        match self {
            Self::Waiting => "Preparing",
            Self::Published => "RestoringSchema",
            Self::Restored => "CopyingData",
            Self::Copied => "CatchingUp",
            Self::Constrained => "Streaming",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.as_str() == text)
    }
}

impl Live {
    pub(super) fn new(
        spec: MigrationSpec,
        source: String,
        started_at: f64,
        databases: Vec<Arc<DatabaseLive>>,
        status: Status,
    ) -> Self {
        Self {
            spec,
            source,
            started_at,
            databases,
            status: watch::Sender::new(status),
            cancelled: Mutex::new(None),
            verifying: tokio::sync::Mutex::default(),
            verification: Mutex::default(),
            verified: Mutex::default(),
        }
    }

    pub(super) fn name(&self) -> &str {
        self.spec.name.as_str()
    }

    pub(super) fn state(&self) -> State {
        self.status.borrow().state
    }

    pub(super) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub(super) fn publish(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    pub(super) fn cancelled(&self) -> Option<CancelReport> {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_cancelled(&self, report: &CancelReport) {
        *self.cancelled.lock().unwrap_or_else(PoisonError::into_inner) = Some(report.clone());
    }

    /// How far the verification is; none: none runs.
    pub(super) fn set_verification(&self, view: Option<VerificationView>) {
        *self.verification.lock().unwrap_or_else(PoisonError::into_inner) = view;
    }

    pub(super) fn verified(&self) -> Option<VerifyReport> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_verified(&self, report: VerifyReport) {
        *self.verified.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }

    pub(super) fn database(&self, name: &str) -> Option<&Arc<DatabaseLive>> {
        self.databases.iter().find(|database| database.name == name)
    }

    pub(super) fn view(&self) -> MigrationView {
        let status = self.status();
        let now = unix_now();
        MigrationView {
            name: self.name().to_owned(),
            state: status.state.name().to_owned(),
            substate: status.state.substate().to_owned(),
            mode: self.spec.mode,
            option: self.spec.option,
            // Whoever has rolled back says when it is cut over again.
            cutover_when_ready: self.spec.cutover_when_ready && !super::has_come_back(self),
            databases: self.databases.iter().map(|database| database.view(status.state)).collect(),
            error: status.error,
            started_at: self.started_at,
            finished_at: status.finished_at,
            duration_seconds: (status.finished_at.unwrap_or(now) - self.started_at).max(0.0),
            source: self.source.clone(),
            verification: self.verification.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            validation: status.validation,
        }
    }

    /// What somebody has written on servers that were left; none: nothing.
    pub(super) fn fenced_note(&self) -> Option<String> {
        let found = self.databases.iter().flat_map(|live| {
            live.fenced
                .found
                .borrow()
                .iter()
                .map(|one| format!("{}.{}", live.name, FencedWriteView::of(one)))
                .collect::<Vec<_>>()
        });
        let found: Vec<String> = found.collect();
        (!found.is_empty()).then(|| {
            format!(
                "written past the fence by somebody else, and on that server alone: {}; `migration verify` lists the rows",
                found.join(", ")
            )
        })
    }

    pub(super) fn tables(&self) -> Vec<TableView> {
        self.databases.iter().flat_map(|database| database.table_views()).collect()
    }
}

/// Seconds since the Unix epoch.
pub(super) fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

impl DatabaseLive {
    pub(super) fn new(name: String, current: Current, step: Step) -> Self {
        Self {
            name,
            stream: StreamStatus::default(),
            reserve: Arc::default(),
            turns: Turns::default(),
            fenced: FencedLive::default(),
            broken: watch::Sender::new(None),
            inner: Mutex::new(Inner {
                step,
                current,
                prepared: None,
                tables: BTreeMap::new(),
                lag: LagMeter::default(),
                counted: Counted::default(),
                slot: None,
                validating: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn step(&self) -> Step {
        self.lock().step
    }

    pub(super) fn current(&self) -> Current {
        self.lock().current.clone()
    }

    /// Another stream carries the changes from now on; nobody may be applying. Positions of the other server mean nothing
    /// any more.
    pub(super) fn set_current(&self, current: Current) {
        let mut inner = self.lock();
        if inner.current == current {
            return;
        }
        inner.current = current;
        inner.lag.forget();
        inner.slot = None;
        drop(inner);
        self.stream.applied.send_replace(Applied::default());
        self.stream.trouble.send_replace(None);
    }

    /// A cutover prepares this slot.
    pub(super) fn set_prepared(&self, slot: &str) {
        self.lock().prepared = Some(slot.to_owned());
    }

    /// Every slot that may be on the source for it. After a cutover those are what watches the server that was left, and
    /// what a rollback has prepared.
    pub(super) fn slots_on_source(&self) -> Vec<String> {
        let watches = self.fenced.watched_slot();
        let inner = self.lock();
        let slots = match inner.current.direction {
            Direction::Forward => [Some(inner.current.slot.clone()), None],
            Direction::Reverse => [watches, inner.prepared.clone()],
        };
        slots.into_iter().flatten().filter(|slot| !slot.is_empty()).collect()
    }

    /// So many foreign keys are left to validate.
    pub(super) fn set_validating(&self, foreign_keys: usize) {
        self.lock().validating = foreign_keys;
    }

    pub(super) fn set_step(&self, step: Step) {
        self.lock().step = step;
    }

    pub(super) fn load_tables(&self, rows: &[TableRow]) {
        let unsigned = |number: i64| u64::try_from(number).unwrap_or(0);
        let tables = rows.iter().map(|row| {
            let live = TableLive {
                state: Some(row.state),
                rows: unsigned(row.rows),
                bytes: unsigned(row.bytes),
                rows_total: row.rows_total.map(unsigned),
                bytes_total: row.bytes_total.map(unsigned),
                indexes: None,
                copying_since: None,
                verification: None,
                verified: None,
            };
            (row.table.clone(), live)
        });
        let tables: Vec<_> = tables.collect();
        let mut inner = self.lock();
        let mut earlier = std::mem::take(&mut inner.tables);
        for (name, mut live) in tables {
            if let Some(earlier) = earlier.remove(&name) {
                (live.verification, live.verified) = (earlier.verification, earlier.verified);
            }
            inner.tables.insert(name, live);
        }
    }

    pub(super) fn update_table(&self, table: &QualifiedName, change: impl FnOnce(&mut TableLive)) {
        let mut inner = self.lock();
        change(inner.tables.entry(table.clone()).or_default());
    }

    /// How many indexes and constraints each table has, as they were dumped. Those of a table that is ready are built.
    pub(super) fn plan_indexes(&self, planned: impl Iterator<Item = (QualifiedName, usize)>) {
        let mut inner = self.lock();
        for (table, total) in planned {
            // Others are not migrated: they were made since.
            let Some(live) = inner.tables.get_mut(&table) else { continue };
            let built = if live.state == Some(TableState::Ready) { total } else { 0 };
            live.indexes = Some(IndexesLive { built, total, building: 0 });
        }
    }

    pub(super) fn table(&self, table: &QualifiedName) -> TableLive {
        self.lock().tables.get(table).cloned().unwrap_or_default()
    }

    /// Every table with its size when its copy began.
    pub(super) fn table_sizes(&self) -> Vec<(QualifiedName, u64)> {
        self.lock().tables.iter().map(|(name, table)| (name.clone(), table.bytes_total.unwrap_or(0))).collect()
    }

    /// Row changes that the table has seen since this process began.
    pub(super) fn changes(&self, table: &QualifiedName) -> u64 {
        let seen = self.stream.counters.of(table);
        seen.inserts + seen.updates + seen.deletes + seen.truncates
    }

    /// What the table was when it was last verified by this process.
    pub(super) fn verified(&self, table: &QualifiedName) -> Option<Verified> {
        self.lock().tables.get(table).and_then(|table| table.verified.clone())
    }

    /// The tables that are migrated.
    pub(super) fn table_names(&self) -> Vec<QualifiedName> {
        self.lock().tables.keys().cloned().collect()
    }

    /// Brings the gauges of full loads up to date: they are the sums over all databases, so each adds what has changed of
    /// its own since it was counted last.
    pub(super) fn count(&self, metrics: &Metrics) {
        let mut inner = self.lock();
        let counted = Counted::of(inner.tables.values());
        inner.recount(counted, metrics);
    }

    /// Takes what was counted of it out of the gauges: its full load is of no interest any more.
    pub(super) fn uncount(&self, metrics: &Metrics) {
        self.lock().recount(Counted::default(), metrics);
    }

    pub(super) fn observe(&self, written: Lsn) {
        let applied = self.stream.applied.borrow().seen;
        self.lock().lag.observe(Instant::now(), written, applied);
    }

    /// Notes what the slot keeps; whether it has become, or is no longer, worth a warning.
    pub(super) fn show_slot(&self, slot: SlotLive) -> bool {
        let before = self.lock().slot.replace(slot);
        before.is_some_and(|before| before.warning) != slot.warning
    }

    pub(super) fn forget_lag(&self) {
        self.lock().lag.forget();
    }

    /// How far the target is behind; none when it is not known, which is so while the stream is interrupted.
    pub(super) fn lag(&self) -> Option<Lag> {
        if self.stream.trouble.borrow().is_some() || self.broken.borrow().is_some() {
            return None;
        }
        let applied = self.stream.applied.borrow().seen;
        // A stream that has not begun, or not begun anew after a turn, says nothing about how far the other server is.
        if applied == Lsn::ZERO {
            return None;
        }
        self.lock().lag.lag(Instant::now(), applied)
    }

    fn view(&self, state: State) -> DatabaseView {
        let lag = self.lag();
        let trouble = self.stream.trouble.borrow().clone();
        let inner = self.lock();
        let ready = inner.tables.values().filter(|table| table.state == Some(TableState::Ready)).count();
        DatabaseView {
            name: self.name.clone(),
            state: match (state.is_active(), inner.current.direction) {
                (true, Direction::Forward) => inner.step.doing(),
                (false, _) if inner.validating > 0 => "ValidatingForeignKeys",
                (_, Direction::Reverse) if inner.current.flows() => "StreamingBack",
                _ => state.substate(),
            }
            .to_owned(),
            direction: inner.current.direction.as_str().to_owned(),
            rollback_possible: state == State::Completed && inner.current.flows(),
            latency_bytes: lag.map(|lag| lag.bytes),
            latency_seconds: lag.map(|lag| lag.seconds),
            // Rows can be counted only once they are received; with nothing behind there is none.
            pending_changes: lag.filter(|lag| lag.bytes == 0).map(|_| 0),
            tables_total: inner.tables.len(),
            tables_ready: ready,
            retries: trouble.as_ref().map_or(0, |trouble| trouble.retries),
            last_error: trouble.map(|trouble| trouble.last_error),
            retained_wal_bytes: inner.slot.map(|slot| slot.wal.retained),
            retained_wal_limit_bytes: inner.slot.and_then(|slot| slot.limit),
            safe_wal_bytes: inner.slot.and_then(|slot| slot.wal.safe),
            wal_warning: inner.slot.is_some_and(|slot| slot.warning),
            fence_watch: self.fenced.looking.borrow().as_ref().map(|looking| FenceWatchView {
                server: inner.current.direction.to().to_string(),
                watched: *looking == Looking::Yes,
                trouble: match looking {
                    Looking::Yes => None,
                    Looking::No(why) => Some(why.clone()),
                },
            }),
            fenced_writes: self.fenced.found.borrow().iter().map(FencedWriteView::of).collect(),
        }
    }

    fn table_views(&self) -> Vec<TableView> {
        let caught_up = self.lag().is_some_and(|lag| lag.bytes == 0);
        let inner = self.lock();
        let now = Instant::now();
        let view = |(name, table): (&QualifiedName, &TableLive)| {
            let (bytes_per_second, seconds_left) = table.speed(now);
            let state = table.state.unwrap_or(TableState::Waiting);
            TableView {
                database: self.name.clone(),
                schema: name.schema.clone(),
                name: name.name.clone(),
                full_load: FullLoadView {
                    state: state.as_str().to_owned(),
                    rows: table.rows,
                    bytes: table.bytes,
                    rows_total: table.rows_total,
                    bytes_total: table.bytes_total,
                    bytes_per_second,
                    seconds_left,
                },
                incremental_sync: crate::migration::view::IncrementalView {
                    pending: caught_up.then_some(0),
                    ..self.stream.counters.of(name)
                },
                indexes: table.indexes_shown(),
                verification: table.verification.clone(),
                error: None,
            }
        };
        inner.tables.iter().map(view).collect()
    }
}
