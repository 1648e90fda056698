//! The stream of one database: from the source's slot to the target's progress row, again after every lost connection.
//!
//! # What is durable, and what the slot is told
//!
//! ```text
//! slot confirmed   0/1A030
//! progress row     0/1A030            claimed for our generation: every commit must find it there
//! START_REPLICATION 0/1A030           a transaction that commits at 0/1B000 (record ends at 0/1B050) arrives
//! target COMMIT    rows + 0/1B050     crash here: the slot sends from 0/1A030 … no: we ask from 0/1B050, nothing twice
//! feedback         flushed 0/1B050    only now; the slot's WAL up to there may go
//! ```
//!
//! START_REPLICATION silently moves forward to the slot's confirmed position. If that is ahead of the progress row,
//! something else has confirmed changes that the target never got; they can never be asked for again. That is a failure
//! which a person must see, never something to skip. A slot that is not there is the same: it is never made again.
//!
//! The queue between reading and applying is bounded in bytes. While it is full nothing is read, and the walsender
//! client goes on sending feedback by itself.

pub mod history;
mod reading;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use self::history::HistoryError;
use self::reading::Reading;
use super::apply::applier::{Applied, Applier, ApplyError, Counters, Tally};
use super::apply::executor::{ExecuteError, Executor};
use super::apply::plan::Planner;
use super::backoff::Backoff;
use super::gate::Gate;
use super::publication;
use super::reserve::Reserve;
use super::snapshot::HandOver;
use crate::catalog::door::{Door, DoorError};
use crate::catalog::migrations::{CatalogError, Generation};
use crate::catalog::{Place, RecordError, bootstrap, progress};
use crate::failpoint::{self, Failpoints};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::postgres::walsender::{Feedback, WalsenderError};
use crate::postgres::{ConnectError, Connector, Control, PipelineError, RawConnection, RawError, without_values};
use crate::switch::Epoch;
use crate::telemetry::metrics::Metrics;

/// Items that may wait in the queue, besides the bound in bytes.
const QUEUE_ITEMS: usize = 8192;

/// Items between the gate and the apply, beside those in the queue.
const PASSING_ITEMS: usize = 64;

/// Bytes that one permit of the queue's memory stands for.
const PERMIT_BYTES: usize = 256;

/// What a stream needs to know.
#[derive(Clone, Debug)]
pub struct StreamContext {
    /// The server that the changes come from.
    pub source: Connector,
    /// The server that they are applied to.
    pub target: Connector,
    /// The database, the same name on both.
    pub database: String,
    /// The migration that the progress row belongs to.
    pub migration: String,
    /// The engine that may write.
    pub generation: Generation,
    /// The slot to read.
    pub slot: String,
    /// Where it begins: the progress of a stream that has not begun.
    pub slot_start: Lsn,
    /// The publication.
    pub publication: String,
    /// For each table, what its copy contains.
    pub hand_overs: HashMap<QualifiedName, HandOver>,
    /// For a stream that begins at a cutover: its number, at whose boundary the stream begins.
    pub boundary: Option<Epoch>,
    /// Sessions for the first attempt of a stream that begins at a cutover, opened before the fence shut the database that
    /// is applied to.
    pub reserve: Arc<Reserve<ApplySessions>>,
    /// How to get into that database later.
    pub door: Option<Door>,
    /// Bound on what has been read and not yet been sent to the target, in bytes.
    pub queue_bytes: usize,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Test points.
    pub failpoints: Failpoints,
}

/// A session for questions, and the one that applies.
pub type ApplySessions = (Control, RawConnection);

/// Opens them.
pub async fn open_apply_sessions(target: &Connector, database: &str) -> Result<ApplySessions, ConnectError> {
    let control = target.control(database, "apply-control").await?;
    let connection = Box::pin(target.raw(&target.own_login(database, "apply"))).await?;
    Ok((control, connection))
}

/// What a stream tells about itself.
#[derive(Clone, Debug)]
pub struct StreamStatus {
    /// How far the apply is.
    pub applied: watch::Sender<Applied>,
    /// Row counters.
    pub counters: Arc<Counters>,
    /// Where a verification holds the apply.
    pub gate: Gate,
    /// Lost connections since the last success, and why the last was lost.
    pub trouble: watch::Sender<Option<Trouble>>,
}

impl Default for StreamStatus {
    fn default() -> Self {
        Self {
            applied: watch::Sender::new(Applied::default()),
            counters: Arc::new(Counters::default()),
            gate: Gate::default(),
            trouble: watch::Sender::new(None),
        }
    }
}

/// Why the stream is not running at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Attempts since the last success.
    pub retries: u32,
    /// Why the last one ended.
    pub last_error: String,
}

/// The stream ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A connection could not be opened.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The progress row could not be claimed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Slot or publication could not be looked at.
    #[error("the replication slot and its publication could not be looked at on the source")]
    Slot(#[source] tokio_postgres::Error),
    /// The slot is gone.
    #[error(
        "replication slot {slot} is not on the source any more: changes since the last confirmed one are lost to the target"
    )]
    SlotMissing {
        /// Its name.
        slot: String,
    },
    /// The source has thrown away WAL that the slot needs.
    #[error("replication slot {slot} was invalidated by the source ({why}): changes that the target needs are gone")]
    SlotLost {
        /// Its name.
        slot: String,
        /// What the source says.
        why: String,
    },
    /// Something else has confirmed changes that the target never got.
    #[error(
        "replication slot {slot} is confirmed up to {confirmed}, but the target has applied only up to {applied}: the changes between are lost to the target"
    )]
    SlotAhead {
        /// Its name.
        slot: String,
        /// `confirmed_flush_lsn`.
        confirmed: Lsn,
        /// Progress on the target.
        applied: Lsn,
    },
    /// The server that is followed is not what it was.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// The tables of the progress could not be made.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The walsender failed.
    #[error(transparent)]
    Walsender(#[from] WalsenderError),
    /// Applying failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The fenced database could not be entered.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// A test asked for it.
    #[error(transparent)]
    Failpoint(#[from] failpoint::Failed),
}

impl StreamError {
    /// Whether trying again can help without anybody doing anything about it.
    pub fn is_transient(&self) -> bool {
        match self {
            // 55000: another process comes through the same door, and has shut it behind itself.
            Self::Connect(error) => {
                error.sqlstate().is_none_or(|sqlstate| transient_sqlstate(sqlstate) || sqlstate == "55000")
            }
            Self::History(error) => error.is_transient(),
            Self::Record(RecordError::Query { source, .. }) => transient_query(source),
            // A fence that is being raised or lifted at this moment.
            Self::Door(_) => true,
            Self::Catalog(CatalogError::Connect { source, .. }) => source.sqlstate().is_none_or(transient_sqlstate),
            Self::Catalog(CatalogError::Query { source, .. }) | Self::Slot(source) => transient_query(source),
            Self::Catalog(CatalogError::Fenced(_) | CatalogError::Unreadable { .. } | CatalogError::Exists(_))
            | Self::Record(_)
            | Self::SlotMissing { .. }
            | Self::SlotLost { .. }
            | Self::SlotAhead { .. }
            | Self::Failpoint(_) => false,
            Self::Walsender(error) => match error {
                WalsenderError::Connect(error) => error.sqlstate().is_none_or(transient_sqlstate),
                WalsenderError::SlotInUse { .. } => true,
                WalsenderError::SlotMissing { .. }
                | WalsenderError::SlotExists { .. }
                | WalsenderError::SlotLost { .. }
                | WalsenderError::SlotTimeout { .. } => false,
                WalsenderError::Raw(error) => transient_raw(error),
            },
            Self::Apply(error) => match error {
                ApplyError::Execute(ExecuteError::Connection { source, .. }) => transient_pipeline(source),
                ApplyError::Execute(ExecuteError::Refused { sqlstate, .. }) => transient_sqlstate(sqlstate),
                ApplyError::Execute(ExecuteError::Command { source, .. }) => transient_pipeline(source),
                ApplyError::Shape { source, .. } => transient_query(source),
                ApplyError::StreamEnded => true,
                ApplyError::Execute(
                    ExecuteError::WrongCount { .. }
                    | ExecuteError::Fenced
                    | ExecuteError::WouldFire(_)
                    | ExecuteError::Decode(_)
                    | ExecuteError::Unsendable(_),
                )
                | ApplyError::Decode(_)
                | ApplyError::Plan(_)
                | ApplyError::Failpoint(_) => false,
            },
        }
    }

    /// A word for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect(_) | Self::Door(_) => "connection",
            Self::Catalog(_) | Self::Record(_) | Self::History(HistoryError::Record(_)) => "catalog",
            Self::History(HistoryError::InRecovery { .. }) => "replication",
            Self::History(_) => "source_history",
            Self::SlotMissing { .. } | Self::Walsender(WalsenderError::SlotMissing { .. }) => "slot_missing",
            Self::SlotLost { .. } | Self::Walsender(WalsenderError::SlotLost { .. }) => "slot_lost",
            Self::Slot(_) | Self::Walsender(_) => "replication",
            Self::SlotAhead { .. } => "slot_ahead",
            Self::Apply(ApplyError::Execute(ExecuteError::WrongCount { .. })) => "target_differs",
            Self::Apply(ApplyError::Execute(ExecuteError::Command { .. })) => "ddl",
            Self::Apply(ApplyError::Execute(ExecuteError::WouldFire(_))) => "would_fire",
            Self::Apply(ApplyError::Plan(_)) => "schema_differs",
            Self::Apply(_) => "apply",
            Self::Failpoint(_) => "failpoint",
        }
    }

    /// The table it is about.
    pub fn table(&self) -> Option<String> {
        match self {
            Self::Apply(ApplyError::Execute(
                ExecuteError::WrongCount { table, .. } | ExecuteError::Refused { table, .. },
            )) => Some(table.to_string()),
            Self::Apply(ApplyError::Shape { table, .. }) => Some(table.to_string()),
            Self::Apply(_)
            | Self::Connect(_)
            | Self::Door(_)
            | Self::Catalog(_)
            | Self::Slot(_)
            | Self::SlotMissing { .. }
            | Self::SlotLost { .. }
            | Self::SlotAhead { .. }
            | Self::History(_)
            | Self::Record(_)
            | Self::Walsender(_)
            | Self::Failpoint(_) => None,
        }
    }
}

/// Connection failures, shortages, lost races, and a server that takes no writes for now (25006: it is a standby): PostgreSQL
/// documentation, appendix A.
pub(super) fn transient_sqlstate(sqlstate: &str) -> bool {
    matches!(sqlstate.get(..2), Some("08" | "53" | "57" | "58"))
        || matches!(sqlstate, "25006" | "40001" | "40P01" | "55006" | "55P03" | "25P02" | "25P03")
}

pub(super) fn transient_raw(error: &RawError) -> bool {
    match error {
        RawError::Io { .. } => true,
        RawError::Server { code, .. } => transient_sqlstate(code),
        RawError::Protocol { .. } => false,
    }
}

fn transient_pipeline(error: &PipelineError) -> bool {
    match error {
        PipelineError::Step { error, .. } => transient_raw(error),
        PipelineError::Raw(error) => transient_raw(error),
        PipelineError::RolledBack => true,
    }
}

/// An error without SQLSTATE is a lost connection.
pub(super) fn transient_query(error: &tokio_postgres::Error) -> bool {
    error.code().is_none_or(|code| transient_sqlstate(code.code()))
}

/// Streams until something happens that trying again cannot mend. Dropping it at any moment loses nothing.
pub async fn run(context: &StreamContext, status: &StreamStatus) -> StreamError {
    let mut backoff = Backoff::of_stream();
    loop {
        let before = status.applied.borrow().durable;
        let error = match Box::pin(attempt(context, status)).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if !error.is_transient() {
            return error;
        }
        if status.applied.borrow().durable > before {
            backoff.progressed();
        }
        let (retries, wait) = backoff.failed();
        tracing::warn!(
            database = context.database,
            migration = context.migration,
            retries,
            wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            error = describe(&error),
            "the stream was interrupted and begins again"
        );
        status.trouble.send_replace(Some(Trouble { retries, last_error: describe(&error) }));
        tokio::time::sleep(wait).await;
    }
}

/// An error with its causes, in one line. Values of rows are not in it, as far as a server's answer tells that they are.
pub(super) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let (mut text, mut cause) = look(error);
    while let Some(inner) = cause {
        let (inner_text, next) = look(inner);
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = next;
    }
    text
}

/// An error by itself, and what is behind it. Behind a server's answer is the same once more, with everything it said.
fn look<'a>(error: &'a (dyn std::error::Error + 'static)) -> (String, Option<&'a (dyn std::error::Error + 'static)>) {
    match error.downcast_ref().and_then(tokio_postgres::Error::as_db_error) {
        Some(answer) => (without_values(answer), None),
        None => (error.to_string(), error.source()),
    }
}

/// Sessions in the database that is applied to: those that were kept for the first attempt, or new ones, through the
/// door where it is fenced.
async fn apply_sessions(context: &StreamContext) -> Result<ApplySessions, StreamError> {
    let connect = async { Ok::<_, StreamError>(open_apply_sessions(&context.target, &context.database).await?) };
    let kept = context.boundary.and_then(|epoch| context.reserve.take(epoch));
    match (kept.filter(|(control, _)| !control.is_closed()), &context.door) {
        (Some(open), _) => Ok(open),
        (None, Some(door)) => Box::pin(door.through(connect)).await,
        (None, None) => connect.await,
    }
}

/// One connection's life.
async fn attempt(context: &StreamContext, status: &StreamStatus) -> Result<Infallible, StreamError> {
    let (target, connection) = Box::pin(apply_sessions(context)).await?;
    let target = Arc::new(target);
    // Of an earlier version, perhaps.
    bootstrap(&target, Place::TargetDatabase).await?;
    let progress = progress::claim(&**target, &context.migration, context.generation, context.slot_start).await?;
    let source = context.source.control(&context.database, "stream-control").await?;
    check_slot(&source, &context.slot, progress.end_lsn).await?;
    let copied = context.hand_overs.values().map(|hand_over| hand_over.position).max().unwrap_or(Lsn::ZERO);
    let reached = progress.end_lsn.max(copied);
    let (migration, generation) = (&context.migration, context.generation);
    if let Err(found) = history::check(&context.source, &source, &target, migration, generation, reached).await {
        history::keep_taken_back(&found, &target, migration, generation, progress.end_lsn).await?;
        return Err(found);
    }
    let names = publication::names(&source, &context.publication).await.map_err(StreamError::Slot)?;
    drop(source);

    let executor = Executor::new(connection, &context.migration, context.generation).await.map_err(ApplyError::from)?;
    let (sender, queue) = mpsc::channel(QUEUE_ITEMS);
    let (passed_on, passed) = mpsc::channel(PASSING_ITEMS);
    let passage = status.gate.open();
    let received = Arc::new(watch::Sender::new(Lsn::ZERO));
    let mut reading = Reading::begin(context, progress.end_lsn, sender, received.clone());
    let feedback = reading.started().await?;
    tracing::info!(
        database = context.database,
        migration = context.migration,
        slot = context.slot,
        from = %progress.end_lsn,
        "streaming"
    );
    status.trouble.send_replace(None);

    let planner = match context.boundary {
        // A marker was applied, and those before the boundary are not: so the boundary is behind us.
        Some(epoch) if progress.marker.is_none() => Planner::behind_boundary(epoch),
        Some(_) | None => Planner::new(context.hand_overs.clone()),
    }
    .of_tables(names);
    let applier = Applier::new(
        planner,
        executor,
        target,
        &progress,
        status.applied.clone(),
        Tally { tables: status.counters.clone(), metrics: context.metrics.clone() },
        context.failpoints.clone(),
    )
    .from_queue(context.queue_bytes, PERMIT_BYTES);
    // Whichever ends first ends the attempt; the others are dropped: the socket to the source is closed, and the
    // target rolls back what was not committed.
    tokio::select! {
        error = reading.failed() => Err(error.into()),
        never = passage.run(queue, passed_on, status.applied.subscribe()) => match never {},
        error = applier.run(passed) => Err(error.into()),
        error = confirm(&feedback, status.applied.subscribe(), &received, &context.failpoints) => Err(error.into()),
    }
}

/// The slot must be there, usable, and not ahead of what the target has. A walsender of ours that is left over from a
/// connection that broke is ended, because it keeps the slot until it notices.
async fn check_slot(source: &Control, slot: &str, applied: Lsn) -> Result<(), StreamError> {
    let row = source
        .query_opt(
            "SELECT s.confirmed_flush_lsn, to_jsonb(s) ->> 'wal_status' IS NOT DISTINCT FROM 'lost',
                    coalesce(to_jsonb(s) ->> 'invalidation_reason', 'lost'),
                    (SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a
                      WHERE a.pid = s.active_pid AND a.application_name LIKE 'pgcutover/%')
               FROM pg_replication_slots s WHERE s.slot_name = $1",
            &[&slot],
        )
        .await
        .map_err(StreamError::Slot)?;
    let Some(row) = row else { return Err(StreamError::SlotMissing { slot: slot.to_owned() }) };
    if row.get(1) {
        return Err(StreamError::SlotLost { slot: slot.to_owned(), why: row.get(2) });
    }
    let confirmed = row.get::<_, Option<Lsn>>(0).unwrap_or_default();
    if confirmed > applied {
        return Err(StreamError::SlotAhead { slot: slot.to_owned(), confirmed, applied });
    }
    Ok(())
}

/// Tells the slot what is durable.
async fn confirm(
    feedback: &Feedback,
    mut applied: watch::Receiver<Applied>,
    received: &watch::Sender<Lsn>,
    failpoints: &Failpoints,
) -> failpoint::Failed {
    let mut confirmed = Lsn::ZERO;
    loop {
        let durable = applied.borrow_and_update().durable;
        if durable > confirmed {
            if let Err(failed) = failpoints.hit("stream.before_confirm").await {
                return failed;
            }
            feedback.send_status(durable.max(*received.borrow()), durable, durable);
            confirmed = durable;
        }
        if applied.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_mend_itself_is_tried_again() {
        for transient in ["08006", "25006", "53300", "57P01", "57P03", "40P01", "55006"] {
            assert!(transient_sqlstate(transient), "{transient}");
        }
        for lasting in ["23505", "42P01", "22P02", "42501", "28P01"] {
            assert!(!transient_sqlstate(lasting), "{lasting}");
        }
        let missing = StreamError::SlotMissing { slot: "s".to_owned() };
        assert!(!missing.is_transient());
        let ahead = StreamError::SlotAhead { slot: "s".to_owned(), confirmed: Lsn(2), applied: Lsn(1) };
        assert!(!ahead.is_transient());
        assert_eq!(ahead.code(), "slot_ahead");
    }
}
