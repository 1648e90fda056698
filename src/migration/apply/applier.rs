//! The apply loop of one database: takes what the stream brings, in order, and makes it durable on the target.
//!
//! While the target works on one piece, the next is encoded, and the one after that gathered: whole transactions of the source become one transaction of
//! the target, up to a size; a transaction that is larger than that flows through in pieces as it is read, and the target's
//! ends with it. The less the target has to do, the smaller the pieces: it is not to wait for what could be done. The progress
//! row changes in the same transaction. Positions that hold nothing of ours (keepalives, empty transactions) are written to the progress row
//! too, but not more often than [`IDLE_INTERVAL`].

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::executor::{Encoding, ExecuteError, Executor, Ready};
use super::gather::{Counts, End, Fill, Gatherer, Part, Piece};
use super::plan::{PlanError, Planned, Planner};
use super::shapes::Shapes;
use crate::catalog::progress::Progress;
use crate::failpoint::{self, Failpoints};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::view::IncrementalView;
use crate::pgoutput::{self, Message, Relation};
use crate::postgres::{Control, TextRows};
use crate::telemetry::metrics::{self, Metrics};

/// While changes come without end, pieces that are not full follow each other at this distance: fewer and larger
/// transactions cost the target less. A first one after a while goes at once, and so does a marker.
const PIECE_INTERVAL: Duration = Duration::from_millis(5);

/// Items taken from the queue before the other half gets its turn.
const TURN: usize = 64;

/// Pieces that are with the worker: the target works on one, the other is ready for it.
const TURNS: u32 = 2;

/// Shortest time between two writes of a progress that covers no rows.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// What the stream hands over.
#[derive(Debug)]
pub enum Received {
    /// pgoutput messages in their order, with the memory that they occupy.
    Data {
        /// The messages.
        messages: Vec<Bytes>,
        /// Given back when the target has them.
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
    /// Nonces of the last markers that are durable, the newest last. Several, because markers that arrive together become
    /// durable together, and who waits for one of them must not miss it.
    pub markers: VecDeque<String>,
    /// Transactions of the source applied by this process.
    pub transactions: u64,
    /// Those of them that have changed definitions.
    pub alterations: u64,
}

/// Markers that are remembered: more than can be waited for at one time.
const MARKERS_KEPT: usize = 8;

impl Applied {
    /// Whether the marker is durable, and with it everything that was committed before it.
    pub fn has_reached(&self, nonce: &str) -> bool {
        self.markers.iter().any(|marker| marker == nonce)
    }

    fn mark(&mut self, markers: impl IntoIterator<Item = String>) {
        for marker in markers {
            if !self.has_reached(&marker) {
                self.markers.push_back(marker);
            }
        }
        let forgotten = self.markers.len().saturating_sub(MARKERS_KEPT);
        self.markers.drain(..forgotten);
    }
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

    fn add(&self, parts: &[(Arc<QualifiedName>, Counts)]) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        for (table, counts) in parts {
            if !tables.contains_key(&**table) {
                tables.insert((**table).clone(), IncrementalView::default());
            }
            let Some(counters) = tables.get_mut(&**table) else { continue };
            counters.inserts += counts.inserts;
            counters.updates += counts.updates;
            counters.deletes += counts.deletes;
            counters.truncates += counts.truncates;
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
    fn add(&self, done: &Done) {
        self.tables.add(&done.parts);
        self.metrics.apply_transactions.inc_by(done.transactions);
        for (_, counts) in &done.parts {
            for (operation, count) in [
                (metrics::Operation::Insert, counts.inserts),
                (metrics::Operation::Update, counts.updates),
                (metrics::Operation::Delete, counts.deletes),
                (metrics::Operation::Truncate, counts.truncates),
            ] {
                if count > 0 {
                    self.metrics.apply_rows.with_label_values(&[operation.as_str()]).inc_by(count);
                }
            }
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
    intake: Intake,
    worker: Worker,
}

/// From messages to pieces.
#[derive(Debug)]
struct Intake {
    planner: Planner,
    gatherer: Gatherer,
    shapes: Shapes,
    applied: Arc<watch::Sender<Applied>>,
    /// Of the last transaction of the source that is in a piece or was before, and what is behind it.
    commit_lsn: Lsn,
    end_lsn: Lsn,
    /// Up to here a piece was handed over.
    handed_lsn: Lsn,
    /// When the last piece was handed over.
    handed_at: Instant,
    /// What was handed over last was the beginning of a transaction: the target's is open, and nobody sees what it did.
    open: bool,
}

/// A query, for when the worker has nothing else to do.
struct Look {
    sql: String,
    rows: oneshot::Sender<TextRows>,
}

/// A piece, and the worker's time.
struct Order {
    piece: Piece,
    turn: OwnedSemaphorePermit,
}

/// The way to the worker.
pub(super) struct Link {
    orders: mpsc::Sender<Order>,
    turns: Arc<Semaphore>,
    looks: mpsc::Sender<Look>,
}

impl Link {
    async fn turn(&self) -> OwnedSemaphorePermit {
        self.turns.clone().acquire_owned().await.expect("never closed")
    }

    /// A turn, if one can be had without waiting.
    fn free_turn(&self) -> Option<OwnedSemaphorePermit> {
        self.turns.clone().try_acquire_owned().ok()
    }

    /// Waits until the worker has nothing to do.
    async fn idle(&self) -> OwnedSemaphorePermit {
        self.turns.clone().acquire_many_owned(TURNS).await.expect("never closed")
    }

    /// The rows of a query in the session that applies, behind everything that was handed over: what is applied and not
    /// committed counts.
    pub(super) async fn look(&self, sql: String) -> Result<TextRows, ApplyError> {
        let _nothing_under_way = self.idle().await;
        let (rows, answer) = oneshot::channel();
        self.looks.send(Look { sql, rows }).await.map_err(|_| ApplyError::StreamEnded)?;
        // Where the worker fails, its error is the one to report.
        answer.await.map_err(|_| ApplyError::StreamEnded)
    }
}

/// From pieces to the target's disk.
#[derive(Debug)]
struct Worker {
    executor: Executor,
    applied: Arc<watch::Sender<Applied>>,
    tally: Tally,
    failpoints: Failpoints,
    done: Done,
}

/// What the open transaction of the target holds.
#[derive(Debug, Default)]
struct Done {
    transactions: u64,
    parts: Vec<(Arc<QualifiedName>, Counts)>,
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
            applied.mark(progress.marker.clone());
        });
        let applied = Arc::new(applied);
        let intake = Intake {
            planner,
            gatherer: Gatherer::default(),
            shapes: Shapes::new(control),
            applied: applied.clone(),
            commit_lsn: progress.commit_lsn,
            end_lsn: progress.end_lsn,
            handed_lsn: progress.end_lsn,
            handed_at: Instant::now(),
            open: false,
        };
        Self { intake, worker: Worker { executor, applied, tally, failpoints, done: Done::default() } }
    }

    /// Takes changes from a queue with so much memory, of which one permit stands for `permit_bytes`.
    #[must_use]
    pub fn from_queue(mut self, queue_bytes: usize, permit_bytes: usize) -> Self {
        self.intake.gatherer = Gatherer::new(queue_bytes, permit_bytes);
        self
    }

    /// Applies until something fails. Dropping it in between loses nothing: the target rolls an open transaction back.
    pub async fn run(self, queue: mpsc::Receiver<Received>) -> ApplyError {
        let (orders, taken) = mpsc::channel(1);
        let (looks, asked) = mpsc::channel(1);
        let link = Link { orders, turns: Arc::new(Semaphore::new(TURNS as usize)), looks };
        // Both halves run until one fails; nothing of the other is needed then.
        tokio::select! {
            error = self.intake.run(queue, link) => error,
            error = self.worker.run(taken, asked) => error,
        }
    }
}

impl Intake {
    async fn run(mut self, mut queue: mpsc::Receiver<Received>, link: Link) -> ApplyError {
        loop {
            if let Err(error) = self.step(&mut queue, &link).await {
                return error;
            }
        }
    }

    /// Takes what is at hand; then hands over what there is, as soon as the worker has time for it and it is due.
    async fn step(&mut self, queue: &mut mpsc::Receiver<Received>, link: &Link) -> Result<(), ApplyError> {
        for _ in 0..TURN {
            match queue.try_recv() {
                Ok(received) => self.take(received, link).await?,
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(ApplyError::StreamEnded),
                Err(mpsc::error::TryRecvError::Empty) => break,
            }
        }
        let due = self.due();
        let ready = async {
            tokio::time::sleep_until(due.unwrap_or_else(Instant::now)).await;
            // What is not full grows until the worker has nothing else to do.
            link.idle().await.split(1).expect("there are more")
        };
        // Receiving from a queue, waiting for a moment and for a turn all lose nothing when dropped.
        tokio::select! {
            turn = ready, if due.is_some() => self.hand_over(turn, link).await,
            received = queue.recv() => self.take(received.ok_or(ApplyError::StreamEnded)?, link).await,
        }
    }

    /// When what there is should be handed over; none: there is nothing, or a transaction has not come whole.
    fn due(&self) -> Option<Instant> {
        if self.planner.in_transaction() {
            None
        } else if self.open || self.gatherer.has_marker() {
            Some(Instant::now())
        } else if !self.gatherer.is_empty() {
            Some(self.handed_at + PIECE_INTERVAL)
        } else {
            (self.end_lsn > self.handed_lsn).then(|| self.handed_at + IDLE_INTERVAL)
        }
    }

    async fn hand_over(&mut self, turn: OwnedSemaphorePermit, link: &Link) -> Result<(), ApplyError> {
        self.open = self.planner.in_transaction();
        let piece = if self.open {
            self.gatherer.take()
        } else {
            self.handed_lsn = self.end_lsn;
            self.gatherer.take_ended(self.commit_lsn, self.end_lsn)
        };
        self.handed_at = Instant::now();
        link.orders.send(Order { piece, turn }).await.map_err(|_| ApplyError::StreamEnded)
    }

    async fn take(&mut self, received: Received, link: &Link) -> Result<(), ApplyError> {
        match received {
            Received::UpTo(position) => {
                // In the middle of a transaction a keepalive's position is not yet ours to claim.
                if !self.planner.in_transaction() {
                    self.end_lsn = self.end_lsn.max(position);
                    self.saw(&link.turns);
                }
                Ok(())
            }
            Received::Data { messages, memory } => {
                self.gatherer.hold(memory);
                for data in messages {
                    let alteration = self.message(data, link).await?;
                    let fill = self.gatherer.fill();
                    // The target's transaction can end only where one of the source does.
                    let may_end = !self.planner.in_transaction();
                    let turn = if fill == Fill::Full && self.gatherer.is_empty() && !alteration {
                        self.gatherer.release();
                        None
                    } else if fill == Fill::Full || alteration || may_end && (fill == Fill::NearlyFull || self.open) {
                        Some(link.turn().await)
                    } else if fill == Fill::Worthwhile && may_end {
                        link.free_turn()
                    } else {
                        None
                    };
                    if let Some(turn) = turn {
                        self.hand_over(turn, link).await?;
                    }
                }
                self.saw(&link.turns);
                Ok(())
            }
        }
    }

    /// Returns whether a transaction has ended that changed definitions: a value that it added to an enum can be used only
    /// once it is committed.
    async fn message(&mut self, data: Bytes, link: &Link) -> Result<bool, ApplyError> {
        let message = pgoutput::decode(&data, false)?;
        if self.shapes.is_stale(&message) {
            for relation in self.shapes.take_stale(&message) {
                self.learn(relation, link).await?;
            }
        }
        let planned = match message {
            Message::Relation(relation) => {
                self.learn(relation, link).await?;
                return Ok(false);
            }
            other => self.planner.plan(other)?,
        };
        match planned {
            Planned::Nothing | Planned::Begin => {}
            Planned::Change(change) => self.gatherer.change(change, data),
            Planned::Truncate(truncation) => self.gatherer.truncate(truncation),
            Planned::Command(command) => {
                tracing::info!(tag = command.tag, number = command.id, "a definition is changed as on the source");
                self.shapes.altered();
                self.gatherer.command(command);
            }
            Planned::Commit(committed) => {
                self.commit_lsn = committed.commit_lsn;
                self.end_lsn = self.end_lsn.max(committed.end_lsn);
                let altered = committed.altered;
                self.gatherer.committed(committed);
                return Ok(altered);
            }
        }
        Ok(false)
    }

    async fn learn(&mut self, relation: Relation, link: &Link) -> Result<(), ApplyError> {
        let shape = if Planner::needs_shape(&relation) { Some(self.shapes.of(&relation, link).await?) } else { None };
        self.planner.relation(relation, shape)?;
        self.gatherer.retire(self.planner.take_retired());
        Ok(())
    }

    /// Makes it known that everything so far was nothing of ours, or is done with.
    fn saw(&self, turns: &Semaphore) {
        let nothing_left = self.gatherer.is_empty()
            && !self.gatherer.has_marker()
            && !self.open
            && turns.available_permits() == TURNS as usize;
        if nothing_left && !self.planner.in_transaction() {
            self.applied.send_if_modified(|applied| {
                let ahead = self.end_lsn > applied.seen;
                applied.seen = applied.seen.max(self.end_lsn);
                ahead
            });
        }
    }
}

/// An order that has been encoded.
struct Prepared {
    ready: Ready,
    end: Option<End>,
    counted: Vec<(Arc<QualifiedName>, Counts)>,
    turn: OwnedSemaphorePermit,
}

impl Order {
    fn prepare(self, encoding: &mut Encoding) -> Result<Prepared, ApplyError> {
        let Self { piece, turn } = self;
        let counted = piece.parts.iter().map(|Part { table, counts, .. }| (table.name.clone(), *counts)).collect();
        let end = piece.end.clone();
        Ok(Prepared { ready: encoding.ready(piece)?, end, counted, turn })
    }
}

impl Worker {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>, mut looks: mpsc::Receiver<Look>) -> ApplyError {
        let mut next = None;
        loop {
            let prepared = match next.take() {
                Some(prepared) => Ok(prepared),
                // Receiving loses nothing when dropped. Once the other half has ended, its error is the one to report.
                None => tokio::select! {
                    Some(order) = orders.recv() => order.prepare(&mut self.executor.encoding),
                    Some(look) = looks.recv() => match self.executor.session.look(&look.sql).await {
                        Ok(rows) => {
                            // Who has asked is there, or nothing is needed any more.
                            let _asker_gone = look.rows.send(rows);
                            continue;
                        }
                        Err(error) => Err(error.into()),
                    },
                    else => std::future::pending().await,
                },
            };
            let worked = match prepared {
                Ok(prepared) => self.work(prepared, &mut orders, &mut next).await,
                Err(error) => Err(error),
            };
            if let Err(error) = worked {
                return error;
            }
        }
    }

    /// Executes a piece and, where it ends, makes it durable and known; meanwhile the next one is encoded.
    async fn work(
        &mut self,
        prepared: Prepared,
        orders: &mut mpsc::Receiver<Order>,
        next: &mut Option<Prepared>,
    ) -> Result<(), ApplyError> {
        let Prepared { ready, end, counted, turn } = prepared;
        self.done.parts.extend(counted);
        let Executor { session, encoding } = &mut self.executor;
        let mut working = session.send(ready).await;
        let outcome = loop {
            // Answers that have been taken are kept outside; receiving from a queue loses nothing when dropped.
            tokio::select! {
                outcome = session.answered(&mut working) => break outcome,
                Some(order) = orders.recv(), if next.is_none() => *next = Some(order.prepare(encoding)?),
            }
        };
        let later = next.as_mut().map(|next| &mut next.ready);
        self.executor.settle(working, outcome, later).await?;
        if let Some(end) = end {
            self.commit(end).await?;
        }
        drop(turn);
        Ok(())
    }

    async fn commit(&mut self, end: End) -> Result<(), ApplyError> {
        self.failpoints.hit("apply.before_commit").await?;
        self.executor.session.commit().await?;
        self.failpoints.hit("apply.after_commit").await?;
        let done = Done { transactions: end.transactions, ..std::mem::take(&mut self.done) };
        self.tally.add(&done);
        self.applied.send_modify(|applied| {
            applied.durable = end.end_lsn;
            applied.seen = applied.seen.max(end.end_lsn);
            applied.transactions += end.transactions;
            applied.alterations += end.alterations;
            applied.mark(end.markers);
        });
        Ok(())
    }
}
