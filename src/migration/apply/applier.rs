//! The apply loop of one database: takes what the stream brings, in order, and makes it durable on the target.
//!
//! Whole transactions of the source are gathered into one transaction of the target while more is waiting, up to a
//! size; a transaction that is larger than that flows through as it is read. The progress row changes in the same
//! transaction. Positions that hold nothing of ours (keepalives, empty transactions) are written to the progress row
//! too, but not more often than [`IDLE_INTERVAL`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::Instant;

use super::executor::{ExecuteError, Executor};
use super::plan::{Change, Committed, Operation, PlanError, Planned, Planner};
use super::shape::{ColumnKind, SHAPE_SQL, TableShape, TargetColumn};
use crate::catalog::progress::Progress;
use crate::failpoint::{self, Failpoints};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::view::IncrementalView;
use crate::pgoutput::{self, Message, Relation};
use crate::postgres::Control;
use crate::telemetry::metrics::{self, Metrics};

/// A target transaction is ended after the source transaction with which it reaches this many changes.
const BATCH_CHANGES: u64 = 2000;

/// Shortest time between two writes of a progress that covers no rows.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// What the stream hands over.
#[derive(Debug)]
pub enum Received {
    /// One pgoutput message, with the memory that it occupies.
    Data {
        /// The message.
        data: Bytes,
        /// Given back when the message has been sent to the target.
        memory: OwnedSemaphorePermit,
    },
    /// Everything that commits before this position has been received.
    UpTo(Lsn),
}

/// How far the apply is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// On the target's disk, progress row included: what the slot may be told.
    pub durable: Lsn,
    /// Applied and on disk, or known to hold nothing of ours; at or ahead of `durable`. A lag is measured against this.
    pub seen: Lsn,
    /// Nonce of the last marker that is durable.
    pub marker: Option<String>,
    /// Transactions of the source applied by this process.
    pub transactions: u64,
}

/// Row counters of each table, since the process began. Shared with the views.
#[derive(Debug, Default)]
pub struct Counters {
    tables: Mutex<HashMap<QualifiedName, IncrementalView>>,
}

impl Counters {
    /// What the table has seen.
    pub fn of(&self, table: &QualifiedName) -> IncrementalView {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).get(table).copied().unwrap_or_default()
    }

    fn add(&self, batch: &HashMap<(Arc<QualifiedName>, Operation), u64>) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        for ((table, operation), count) in batch {
            if !tables.contains_key(&**table) {
                tables.insert((**table).clone(), IncrementalView::default());
            }
            let Some(counters) = tables.get_mut(&**table) else { continue };
            match operation {
                Operation::Insert => counters.inserts += count,
                Operation::Update => counters.updates += count,
                Operation::Delete => counters.deletes += count,
                Operation::Truncate => counters.truncates += count,
            }
        }
    }
}

/// Where applied rows are counted.
#[derive(Clone, Debug)]
pub struct Tally {
    /// By table, for the views.
    pub tables: Arc<Counters>,
    /// By operation, for the metrics.
    pub metrics: Arc<Metrics>,
}

impl Tally {
    fn add(&self, batch: &Batch) {
        self.tables.add(&batch.rows);
        self.metrics.apply_transactions.inc_by(batch.transactions);
        for ((_, operation), count) in &batch.rows {
            let operation = match operation {
                Operation::Insert => metrics::Operation::Insert,
                Operation::Update => metrics::Operation::Update,
                Operation::Delete => metrics::Operation::Delete,
                Operation::Truncate => metrics::Operation::Truncate,
            };
            self.metrics.apply_rows.with_label_values(&[operation.as_str()]).inc_by(*count);
        }
    }
}

/// Applying stopped.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A message could not be decoded.
    #[error("the source sent a change that cannot be read")]
    Decode(#[from] pgoutput::DecodeError),
    /// A change does not fit the target.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A change could not be executed.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// The target's catalogue could not be read.
    #[error("the columns of table {table} could not be read on the target")]
    Shape {
        /// The table.
        table: QualifiedName,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// A test asked for it.
    #[error(transparent)]
    Failpoint(#[from] failpoint::Failed),
    /// The stream ended.
    #[error("the stream has ended")]
    StreamEnded,
}

/// See the module.
#[derive(Debug)]
pub struct Applier {
    planner: Planner,
    executor: Executor,
    /// For the target's catalogue.
    control: Arc<Control>,
    applied: watch::Sender<Applied>,
    tally: Tally,
    failpoints: Failpoints,
    /// What the progress row will say after the next commit.
    commit_lsn: Lsn,
    end_lsn: Lsn,
    marker: Option<String>,
    batch: Batch,
    /// When a progress that covers no rows was last written.
    idle_written: Instant,
}

/// What the open transaction of the target holds.
#[derive(Debug, Default)]
struct Batch {
    changes: u64,
    transactions: u64,
    rows: HashMap<(Arc<QualifiedName>, Operation), u64>,
}

impl Applier {
    /// Goes on from `progress`.
    pub fn new(
        planner: Planner,
        executor: Executor,
        control: Arc<Control>,
        progress: &Progress,
        applied: watch::Sender<Applied>,
        tally: Tally,
        failpoints: Failpoints,
    ) -> Self {
        applied.send_modify(|applied| {
            applied.durable = progress.end_lsn;
            applied.seen = applied.seen.max(progress.end_lsn);
            applied.marker.clone_from(&progress.marker);
        });
        Self {
            planner,
            executor,
            control,
            applied,
            tally,
            failpoints,
            commit_lsn: progress.commit_lsn,
            end_lsn: progress.end_lsn,
            marker: None,
            batch: Batch::default(),
            idle_written: Instant::now(),
        }
    }

    /// Applies until something fails. Dropping it in between loses nothing: the target rolls an open transaction back.
    pub async fn run(mut self, mut queue: mpsc::Receiver<Received>) -> ApplyError {
        loop {
            if let Err(error) = self.step(&mut queue).await {
                return error;
            }
        }
    }

    /// Takes one item, or uses the time in which there is none.
    async fn step(&mut self, queue: &mut mpsc::Receiver<Received>) -> Result<(), ApplyError> {
        match queue.try_recv() {
            Ok(received) => return self.take(received).await,
            Err(mpsc::error::TryRecvError::Disconnected) => return Err(ApplyError::StreamEnded),
            Err(mpsc::error::TryRecvError::Empty) => {}
        }
        if self.planner.in_transaction() {
            self.executor.flush().await?;
        } else if self.executor.is_open() {
            return self.commit().await;
        }
        let due = self.idle_due();
        // Receiving from a queue and waiting for a moment both lose nothing when dropped.
        tokio::select! {
            received = queue.recv() => self.take(received.ok_or(ApplyError::StreamEnded)?).await,
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.commit().await,
        }
    }

    /// When a progress that covers no rows is to be written; none: there is nothing to write.
    fn idle_due(&self) -> Option<Instant> {
        let behind = self.end_lsn > self.applied.borrow().durable;
        (behind && !self.planner.in_transaction()).then(|| self.idle_written + IDLE_INTERVAL)
    }

    async fn take(&mut self, received: Received) -> Result<(), ApplyError> {
        match received {
            Received::UpTo(position) => {
                // In the middle of a transaction a keepalive's position is not yet ours to claim.
                if !self.planner.in_transaction() {
                    self.end_lsn = self.end_lsn.max(position);
                    if !self.executor.is_open() {
                        self.saw(self.end_lsn);
                    }
                }
                Ok(())
            }
            Received::Data { data, memory } => {
                let message = pgoutput::decode(&data, false)?;
                let done = self.message(message).await;
                drop(memory);
                done
            }
        }
    }

    async fn message(&mut self, message: Message) -> Result<(), ApplyError> {
        let planned = match message {
            Message::Relation(relation) => {
                let shape = if Planner::needs_shape(&relation) { Some(self.shape(&relation).await?) } else { None };
                self.planner.relation(relation, shape)?;
                self.executor.retire(&self.planner.take_retired())?;
                return Ok(());
            }
            other => self.planner.plan(other)?,
        };
        match planned {
            Planned::Nothing | Planned::Begin => Ok(()),
            Planned::Change(change) => self.change(*change).await,
            Planned::Commit(committed) => self.committed(committed).await,
        }
    }

    async fn change(&mut self, change: Change) -> Result<(), ApplyError> {
        self.batch.changes += 1;
        if change.truncated.is_empty() {
            *self.batch.rows.entry((change.table.clone(), change.operation)).or_default() += 1;
        }
        for table in &change.truncated {
            *self.batch.rows.entry((table.clone(), change.operation)).or_default() += 1;
        }
        self.executor.change(change).await?;
        let retired = self.planner.take_retired();
        Ok(self.executor.retire(&retired)?)
    }

    async fn committed(&mut self, committed: Committed) -> Result<(), ApplyError> {
        self.commit_lsn = committed.commit_lsn;
        self.end_lsn = self.end_lsn.max(committed.end_lsn);
        self.batch.transactions += 1;
        let marked = committed.marker.is_some();
        self.marker = committed.marker.or(self.marker.take());
        if marked || self.batch.changes >= BATCH_CHANGES {
            return self.commit().await;
        }
        if !self.executor.is_open() {
            self.saw(self.end_lsn);
        }
        Ok(())
    }

    /// Everything up to `position` is applied and durable, or was nothing of ours.
    fn saw(&self, position: Lsn) {
        self.applied.send_if_modified(|applied| {
            let ahead = position > applied.seen;
            applied.seen = applied.seen.max(position);
            ahead
        });
    }

    /// Ends the target's transaction with the progress in it, and makes it known.
    async fn commit(&mut self) -> Result<(), ApplyError> {
        self.executor.record_progress(self.commit_lsn, self.end_lsn, self.marker.as_deref()).await?;
        self.failpoints.hit("apply.before_commit").await?;
        self.executor.commit().await?;
        self.failpoints.hit("apply.after_commit").await?;
        self.idle_written = Instant::now();
        let batch = std::mem::take(&mut self.batch);
        self.tally.add(&batch);
        let (marker, durable) = (self.marker.take(), self.end_lsn);
        self.applied.send_modify(|applied| {
            applied.durable = durable;
            applied.seen = applied.seen.max(durable);
            applied.transactions += batch.transactions;
            if marker.is_some() {
                applied.marker = marker;
            }
        });
        Ok(())
    }

    /// Reads what the relation looks like on the target.
    async fn shape(&self, relation: &Relation) -> Result<TableShape, ApplyError> {
        let table = QualifiedName::new(&relation.schema, &relation.name);
        let rows = self.control.query(SHAPE_SQL, &[&table.to_string()]).await;
        let rows = rows.map_err(|source| ApplyError::Shape { table, source })?;
        Ok(TableShape::new(rows.iter().map(|row| {
            let column = TargetColumn {
                type_sql: row.get(1),
                kind: ColumnKind::from_catalogue(row.get(2)),
                equality: row.get(3),
                primary_key: row.get(4),
            };
            (row.get(0), column)
        })))
    }
}
