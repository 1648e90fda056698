//! What a cutover works with, passed by value from step to step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::CutoverError;
use super::forecast::Intention;
use super::hard_fence::{Known, Obstacle, Shutting};
use super::parts::Lease;
use super::phase::{Event, Phase};
use super::report::{CutoverOutcome, CutoverProgress, CutoverReport, Timings};
use super::slowdown::Slowed;
use super::undo::Undo;
use crate::catalog::claims::ServerIdentity;
use crate::catalog::decision::Case;
use crate::catalog::fence::Standing;
use crate::catalog::streams::Direction;
use crate::config::{Ddl, FencePolicy, Reads, Stragglers};
use crate::failpoint::{Failed, Failpoints};
use crate::migration::sequences::SequencePair;
use crate::migration::standstill::Standstill;
use crate::postgres::{Connector, Control};
use crate::proxy::{MoveOrder, MoveOutcome, MoveReport, SessionView, Sessions};
use crate::shutdown::Tasks;
use crate::switch::{Database, Epoch, ServerRole};

/// What the operator asked for; bounds come from the configuration where the command does not give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutoverOptions {
    /// Forward: a cutover. Reverse: a rollback, the same with source and target exchanged.
    pub direction: Direction,
    /// Everything up to the decision, without fencing the server, then resume where it ran.
    pub dry_run: bool,
    /// From the closing of the gates to the sending of the decision.
    pub max_pause: Duration,
    /// For running transactions to end.
    pub drain_timeout: Duration,
    /// What happens to those that do not.
    pub stragglers: Stragglers,
    /// Not begun with more than this to replay, in bytes.
    pub max_lag_at_start_bytes: u64,
    /// Not begun with more than this in a database that no stream carries, in bytes.
    pub max_unstreamed_bytes: u64,
    /// The largest delay of a writing transaction while it is prepared; zero: none is slowed down.
    pub throttle_writes: Duration,
    /// How long that may take to bring a lag below `max_lag_at_start`.
    pub throttle_for: Duration,
    /// Transactions that are declared read-only, in the pause.
    pub reads: Reads,
    /// Guardrails that only guard time and connections are noted and gone past; all others are heeded all the same.
    pub force: bool,
    /// How strongly the server that is left is fenced.
    pub fence: FencePolicy,
    /// What becomes of definitions that change: those that are applied may make sequences, and set them.
    pub ddl: Ddl,
}

/// One of the two servers of a cutover.
pub(super) struct Side {
    pub(super) role: ServerRole,
    pub(super) connector: Connector,
    /// Session in the control database.
    pub(super) control: Control,
    pub(super) identity: ServerIdentity,
}

/// One database of the migration.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) gate: Arc<Database>,
    /// The epoch that its route stood at when the cutover began.
    pub(super) earlier: Epoch,
    /// Sessions that are open before the databases are shut: marker and sequences, table locks, the other server.
    pub(super) sessions: Option<LineSessions>,
}

/// Control sessions in one database, opened by prepare.
pub(super) struct LineSessions {
    pub(super) marker: Control,
    /// Each locks its share of the tables, see [`LineSessions::lock_shares`].
    pub(super) locks: Vec<Control>,
    pub(super) onward: Control,
    pub(super) sequences: SequencePair,
    /// Of the definitions that were compared; asked through `marker`.
    pub(super) standstill: Standstill,
    /// From here to there, where there was something that no stream carries when prepare looked.
    pub(super) unstreamed: Option<(Control, Control)>,
    /// The first large objects were made after that.
    pub(super) first_large_objects: bool,
    /// There, where foreign keys and triggers come with the cutover. From the drain on in the transaction that makes them.
    pub(super) late: Option<Control>,
    /// Quoted names of the tables that are brought over, by the stream or otherwise.
    pub(super) tables: Vec<String>,
}

impl LineSessions {
    /// Which session locks which tables.
    pub(super) fn lock_shares(&self) -> impl Iterator<Item = (&Control, &[String])> {
        let share = self.tables.len().div_ceil(self.locks.len().max(1)).max(1);
        self.locks.iter().zip(self.tables.chunks(share))
    }
}

/// Who may tell a cutover to give up.
#[derive(Clone, Debug)]
pub(super) struct Orders {
    /// The operator.
    pub(super) cancel: CancellationToken,
    /// The process, when it stops.
    pub(super) tasks: Tasks,
}

/// Everything. Owned by the step that is current; nobody else can touch it.
pub(super) struct Work {
    pub(super) options: CutoverOptions,
    pub(super) case: Case,
    /// Name of the database that holds fences and decisions, on both servers.
    pub(super) control_database: String,
    /// The server that is left.
    pub(super) from: Side,
    /// The server that it leads to. Its control session holds the lock that says this coordinator lives.
    pub(super) to: Side,
    /// How the server that is left can be shut.
    pub(super) shutting: Shutting,
    /// The fence that still stands on the server that a rollback leads back to.
    pub(super) home: Option<Standing>,
    pub(super) lines: Vec<Line>,
    pub(super) sessions: Arc<Sessions>,
    pub(super) lease: Arc<dyn Lease>,
    pub(super) failpoints: Failpoints,
    pub(super) orders: Orders,
    pub(super) undo: Undo,
    /// Something is left to be noted, lifted or shut on a server, which can be done later.
    pub(super) leaves_chores: Arc<AtomicBool>,
    pub(super) phase: Phase,
    pub(super) progress: watch::Sender<Option<CutoverProgress>>,
    pub(super) timings: Timings,
    pub(super) notes: Vec<String>,
    /// By how much writes were slowed down.
    pub(super) slowed: Arc<Slowed>,
    /// Guardrails that were gone past.
    pub(super) forced: Vec<String>,
    /// What a dry run leaves undone.
    pub(super) would: Vec<Intention>,
    pub(super) sessions_moved: u64,
    pub(super) sessions_ended: u64,
    /// Transactions that had gone on in pauses before this one.
    pub(super) reads_before: u64,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("case", &self.case).field("phase", &self.phase).finish_non_exhaustive()
    }
}

impl Work {
    /// Reports an event: the one place where the phase changes.
    pub(super) fn advance(&mut self, event: Event) -> Result<(), CutoverError> {
        let from = self.phase;
        let to = from.after(event).map_err(|rejected| CutoverError::Unexpected(rejected.to_string()))?;
        self.timings.lap(from);
        self.phase = to;
        tracing::info!(
            migration = self.case.migration,
            epoch = self.case.epoch.0,
            from = from.as_str(),
            to = to.as_str(),
            "cutover"
        );
        self.publish();
        Ok(())
    }

    /// Notes what could not be done on a server and is tried again in the background.
    pub(super) fn leave_chore(&mut self, what: &str, error: &CutoverError) {
        tracing::warn!(epoch = self.case.epoch.0, %error, what, "could not be done; it is tried again in the background");
        self.notes.push(format!("{what}: {error}; it is tried again in the background"));
        self.leaves_chores.store(true, Ordering::SeqCst);
    }

    /// Shows observers where the cutover stands.
    pub(super) fn publish(&self) {
        self.progress.send_replace(Some(CutoverProgress {
            direction: self.options.direction,
            epoch: self.case.epoch.0,
            phase: self.phase,
            elapsed_ms: self.timings.elapsed_ms(),
            paused_ms: self.timings.paused_ms(),
        }));
    }

    pub(super) async fn failpoint(&self, name: &'static str) -> Result<(), Failed> {
        self.failpoints.hit(name).await
    }

    /// Backends on the server that is left which are not strangers, as of now.
    pub(super) fn known(&self) -> Known {
        let (databases, server) = (&self.case.databases, self.from.role);
        Known {
            pids: databases.iter().flat_map(|database| self.sessions.backend_pids(server, database)).collect(),
            own_prefix: self.from.connector.instance().application_name(""),
            slots: databases.iter().map(|database| self.lease.replication(database).slot).collect(),
        }
    }

    /// Opens the gates to `server`, having noted for how long they have kept sessions waiting.
    pub(super) fn open_gates(&mut self, server: ServerRole, epoch_of: impl Fn(&Line) -> Epoch) {
        let waits = self.sessions.holds(&self.case.databases);
        for line in &self.lines {
            line.gate.open(server, epoch_of(line));
        }
        self.timings.gates_opened();
        self.timings.held(waits.len() as u64, waits.into_iter().max().unwrap_or_default());
    }

    /// Where sessions are to be moved.
    pub(super) fn move_order(&self) -> MoveOrder {
        MoveOrder { to: self.to.role, epoch: self.case.epoch }
    }

    /// Counts what has moved and returns, in words, what cannot.
    pub(super) fn take_moves(&mut self, reports: &[MoveReport]) -> Unmoved {
        self.sessions_moved = reports.iter().filter(|report| report.outcome == MoveOutcome::Ready).count() as u64;
        let mut unmoved = Unmoved::default();
        for MoveReport { session, outcome } in reports {
            let words = match outcome {
                MoveOutcome::Ready => continue,
                MoveOutcome::Busy => {
                    unmoved.busy.push(describe(session, "not at a safe point"));
                    continue;
                }
                MoveOutcome::Blocked(blockers) => {
                    blockers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                }
                MoveOutcome::Failed(reason) => reason.clone(),
            };
            unmoved.stuck.push(describe(session, &words));
        }
        unmoved
    }

    fn slowed_note(&self) -> Option<String> {
        let largest = self.slowed.largest()?;
        Some(format!("while it was prepared, each writing transaction was delayed by up to {} ms", largest.as_millis()))
    }

    /// The report, as things stand.
    pub(super) fn report(&self, outcome: CutoverOutcome, error: Option<&CutoverError>) -> CutoverReport {
        CutoverReport {
            direction: self.options.direction,
            outcome,
            reason: error.map(ToString::to_string).unwrap_or_default(),
            hint: error.and_then(CutoverError::hint),
            forceable: error.is_some_and(CutoverError::is_forceable),
            forced: self.forced.clone(),
            pause_ms: self.timings.pause_ms(),
            phases_ms: self.timings.phases(),
            prepare_steps: self.timings.prepare_steps(),
            pause_steps: self.timings.pause_steps(),
            sessions_held: self.timings.sessions_held(),
            longest_hold_ms: self.timings.longest_hold_ms(),
            would: if outcome == CutoverOutcome::DryRun { self.would.clone() } else { Vec::new() },
            sessions_moved: self.sessions_moved,
            sessions_ended: self.sessions_ended,
            epoch: self.case.epoch.0,
            blockers: error.map(|error| error.obstacles().to_vec()).unwrap_or_default(),
            notes: self.notes.iter().cloned().chain(self.slowed_note()).collect(),
        }
    }
}

/// Sessions that a round of moves has left behind.
#[derive(Debug, Default)]
pub(super) struct Unmoved {
    /// Not at a safe point yet; they go on trying.
    pub(super) busy: Vec<UnmovedSession>,
    /// Cannot be moved.
    pub(super) stuck: Vec<UnmovedSession>,
}

/// A session that is left behind, and why.
#[derive(Debug)]
pub(super) struct UnmovedSession {
    pub(super) id: u64,
    /// For operators.
    pub(super) words: String,
    /// The same for a list of all that stood in the way.
    pub(super) obstacle: Obstacle,
}

fn describe(session: &SessionView, why: &str) -> UnmovedSession {
    let SessionView { id, user, application_name, client_address, client_pid, .. } = session;
    let words = format!("session {client_pid} of {user:?} ({application_name:?}, from {client_address}): {why}");
    let now = if session.in_transaction { "at work" } else { "idle" };
    let obstacle = Obstacle {
        pid: session.backend_pid.unwrap_or(*client_pid),
        database: session.database.clone(),
        application_name: application_name.clone(),
        doing: format!("cannot be moved: {why}; {now}"),
        age_seconds: session.for_time.as_secs_f64(),
    };
    UnmovedSession { id: *id, words, obstacle }
}

/// Runs a step that may be given up: until `deadline` at the latest, and until somebody says stop. The step is dropped
/// then; whatever it may have begun is in [`Undo`] already.
pub(super) async fn bounded<T>(
    orders: &Orders,
    pause: Option<(Instant, Duration)>,
    step: impl Future<Output = Result<T, CutoverError>>,
) -> Result<T, CutoverError> {
    let pause_ends = async {
        match pause {
            Some((deadline, limit)) => {
                tokio::time::sleep_until(deadline.into()).await;
                limit
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // Dropping the waits loses nothing; dropping the step is what giving up means.
        biased;
        done = step => done,
        () = orders.cancel.cancelled() => Err(CutoverError::Stopped("the cutover was cancelled")),
        () = orders.tasks.stopping() => Err(CutoverError::Stopped("pgcutover is stopping")),
        limit = pause_ends => Err(CutoverError::MaxPause(limit)),
    }
}
