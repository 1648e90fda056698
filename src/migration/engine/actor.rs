//! The one place through which the state of a migration changes: durable first, then visible, then acted upon.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::cancel::{self, Shut};
use super::context::Context;
use super::error::{EngineError, WorkError};
use super::fence_watch;
use super::gauges::Gauges;
use super::late;
use super::live::unix_now;
use super::source_watch;
use super::turn;
use super::worker::{WorkEnd, Worker};
use crate::catalog::decision::Outcome;
use crate::catalog::streams::Direction;
use crate::migration::state::{Effect, Event, State, resume, transition};
use crate::migration::stream::describe;
use crate::migration::view::{CancelReport, Problem};
use crate::shutdown::Tasks;
use crate::switch::Epoch;

/// How long until something that failed is tried again by itself.
const AGAIN: Duration = Duration::from_secs(5);

/// What an actor is asked to do. The answer comes when it is durable.
pub(super) enum Command {
    /// From the worker: something happened.
    Report(Event, oneshot::Sender<Result<(), WorkError>>),
    /// An operator gives up.
    Cancel(oneshot::Sender<Result<CancelReport, EngineError>>),
    /// An operator wants it tried again.
    Retry(oneshot::Sender<Result<(), EngineError>>),
    /// A cutover begins, or a rollback.
    Begin(Direction, oneshot::Sender<Result<(), EngineError>>),
    /// It prepares the stream that will flow the other way; answered with why there will be none.
    PrepareReturn(Epoch, oneshot::Sender<Result<Option<String>, EngineError>>),
    /// An operator needs no way back any more.
    Complete(oneshot::Sender<Result<CancelReport, EngineError>>),
    /// A cutover has ended.
    Settle(Outcome, oneshot::Sender<Result<(), EngineError>>),
}

/// See the module.
pub(super) struct Actor {
    pub(super) context: Arc<Context>,
    pub(super) commands: mpsc::Receiver<Command>,
    /// For the worker.
    pub(super) sender: mpsc::Sender<Command>,
    pub(super) tasks: Tasks,
    work: Option<JoinHandle<WorkEnd>>,
    /// An event of the worker, or an undoing, that could not be recorded yet.
    unfinished: Option<Unfinished>,
}

/// What has to be tried again.
enum Unfinished {
    /// The state after the worker's end is not durable yet.
    End(Event, Option<Problem>),
    /// The verdict of the cutover is not durable yet.
    Verdict(Outcome),
    /// The streams do not fit the state yet.
    Align,
    /// The streams are not gone yet.
    EndStreams,
}

impl Actor {
    pub(super) fn new(context: Arc<Context>, tasks: Tasks) -> (Self, mpsc::Sender<Command>) {
        let (sender, commands) = mpsc::channel(16);
        let actor = Self { context, commands, sender: sender.clone(), tasks, work: None, unfinished: None };
        (actor, sender)
    }

    /// Goes on from the state in which the catalogue has it, until the engine stops.
    pub(super) async fn run(mut self) {
        let live = &self.context.live;
        self.context.metrics.migration_state.with_label_values(&[live.name(), live.state().substate()]).set(1);
        for effect in resume(self.context.live.state()) {
            self.perform(effect).await;
        }
        let tasks = self.tasks.clone();
        let context = self.context.clone();
        let (watching, stopped) = (self.context.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            // A watch goes on from where it was kept.
            tokio::select! {
                () = fence_watch::watch(watching) => {}
                () = stopped.stopping() => {}
            }
        });
        let mut source = std::pin::pin!(source_watch::watch(context.clone()));
        loop {
            let retry = self.unfinished.is_some();
            // A channel, a handle that is only borrowed, a sleep, a watch that is kept and a token: nothing is lost by
            // dropping a wait for them.
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => break,
                },
                end = finished(&mut self.work) => {
                    self.work = None;
                    self.ended(end).await;
                }
                () = tokio::time::sleep(AGAIN), if retry => self.try_again().await,
                finding = &mut source => {
                    self.give_up_slots(&finding).await;
                    source.set(source_watch::watch(context.clone()));
                }
                () = tasks.stopping() => break,
            }
        }
        self.stop_work().await;
    }

    async fn obey(&mut self, command: Command) {
        // Whoever asked may have gone; what was done stays done.
        match command {
            Command::Report(event, reply) => {
                let _ = reply.send(self.change(event, None).await);
            }
            Command::Cancel(reply) => {
                let _ = reply.send(self.cancel().await);
            }
            Command::Retry(reply) => {
                let _ = reply.send(self.ordered(Event::RetryAsked).await);
            }
            Command::Begin(direction, reply) => {
                let _ = reply.send(self.begin(direction).await);
            }
            Command::PrepareReturn(epoch, reply) => {
                let _ = reply.send(self.prepare_return(epoch).await);
            }
            Command::Complete(reply) => {
                let _ = reply.send(self.complete().await);
            }
            Command::Settle(outcome, reply) => {
                let _ = reply.send(self.settle(outcome).await);
            }
        }
    }

    async fn ordered(&mut self, event: Event) -> Result<(), EngineError> {
        transition(self.context.live.state(), event)?;
        self.change(event, None).await.map_err(|error| EngineError::Unavailable(describe(&error)))
    }

    /// The verdict of a cutover. One that is known already changes nothing; one that cannot be recorded now is recorded
    /// as soon as it can be.
    async fn settle(&mut self, outcome: Outcome) -> Result<(), EngineError> {
        // Told by itself or by whoever asks first; it must not be told once more of the next attempt.
        self.unfinished.take_if(|unfinished| matches!(unfinished, Unfinished::Verdict(_)));
        if !self.is_being_cut_over() {
            return Ok(());
        }
        let event = match outcome {
            Outcome::Decided => Event::CutoverDecided,
            Outcome::Aborted => Event::CutoverAborted,
        };
        if outcome == Outcome::Decided {
            // Recorded or not: sessions write on the other server now, and nothing is applied over that.
            self.stop_work().await;
        }
        let settled = self.ordered(event).await;
        if settled.is_err() {
            self.unfinished = Some(Unfinished::Verdict(outcome));
        }
        settled
    }

    /// A cutover or rollback has begun, and its verdict is not known here.
    fn is_being_cut_over(&self) -> bool {
        matches!(self.context.live.state(), State::CompletingMigration | State::RollingBack)
    }

    async fn prepare_return(&self, epoch: Epoch) -> Result<Option<String>, EngineError> {
        if !self.is_being_cut_over() {
            let message = format!("migration {:?} is not being cut over any more", self.context.live.name());
            return Err(EngineError::Return(message));
        }
        let prepared = Box::pin(turn::prepare(&self.context, epoch)).await;
        prepared.map_err(|error| EngineError::Return(describe(&error)))
    }

    async fn begin(&mut self, direction: Direction) -> Result<(), EngineError> {
        // What an attempt before has left would be taken for what this one prepares, or be removed together with it.
        if self.unfinished.take_if(|unfinished| matches!(unfinished, Unfinished::Align)).is_some() {
            self.align().await;
            if matches!(self.unfinished, Some(Unfinished::Align)) {
                let name = self.context.live.name();
                let message = format!(
                    "what an earlier cutover of migration {name:?} has prepared could not be removed yet; it is tried again"
                );
                return Err(EngineError::Return(message));
            }
        }
        match direction {
            Direction::Forward => self.ordered(Event::CutoverBegun).await,
            Direction::Reverse => {
                let mut databases = self.context.live.databases.iter();
                let state = self.context.live.state();
                if state == State::Completed && databases.any(|database| !database.current().flows()) {
                    let name = self.context.live.name();
                    let message =
                        format!("there is no stream back for migration {name:?}, so it cannot be rolled back");
                    return Err(EngineError::Return(message));
                }
                self.ordered(Event::RollbackBegun).await
            }
        }
    }

    async fn complete(&mut self) -> Result<CancelReport, EngineError> {
        if self.context.live.state() != State::Closed {
            if self.context.live.state() == State::Completed {
                late::all_validated(&self.context).await?;
            }
            self.ordered(Event::CompleteAsked).await?;
        }
        Ok(self.context.live.cancelled().unwrap_or_default())
    }

    async fn cancel(&mut self) -> Result<CancelReport, EngineError> {
        if self.context.live.state() == State::Cancelled
            && let Some(report) = self.context.live.cancelled()
        {
            return Ok(report);
        }
        self.ordered(Event::CancelAsked).await?;
        Ok(self.context.live.cancelled().unwrap_or_default())
    }

    /// The worker has ended.
    async fn ended(&mut self, end: WorkEnd) {
        let WorkEnd::Event(event, problem) = end else { return };
        if matches!(self.context.live.state(), State::CompletingMigration | State::RollingBack | State::Completed) {
            // The cutover learns it from the stream and aborts; work that is begun again then fails again.
            return;
        }
        if let Err(error) = self.change(event, problem.clone()).await {
            if error.is_fenced() {
                return;
            }
            tracing::warn!(
                migration = self.context.live.name(),
                error = describe(&error),
                "the end is not recorded yet"
            );
            self.unfinished = Some(Unfinished::End(event, problem));
        }
    }

    /// The source cannot afford the migration any longer, or has thrown away what it needs. One that had failed before
    /// keeps slots too.
    async fn give_up_slots(&mut self, finding: &source_watch::Finding) {
        let problem = finding.problem();
        tracing::error!(migration = self.context.live.name(), problem = problem.message, "the slots are dropped");
        self.stop_work().await;
        // Where this fails the watch finds the slot again.
        let dropped = Box::pin(cancel::undo(&self.context, turn::is_stream, Shut::Stays)).await;
        let _listed = self.what_is_left(dropped);
        if self.context.live.state() == State::Failed {
            self.context.live.publish(|status| status.error = Some(problem));
        } else {
            self.ended(WorkEnd::Event(Event::WorkFailed, Some(problem))).await;
        }
    }

    async fn try_again(&mut self) {
        match self.unfinished.take() {
            Some(Unfinished::End(event, problem)) => self.ended(WorkEnd::Event(event, problem)).await,
            Some(Unfinished::Verdict(outcome)) => {
                if let Err(error) = self.settle(outcome).await {
                    tracing::warn!(migration = self.context.live.name(), %error, "the verdict is not recorded yet");
                }
            }
            Some(Unfinished::Align) => self.align().await,
            Some(Unfinished::EndStreams) => self.end_streams().await,
            None => {}
        }
    }

    /// The choke point: checks, makes durable, publishes, acts.
    async fn change(&mut self, event: Event, problem: Option<Problem>) -> Result<(), WorkError> {
        let live = self.context.live.clone();
        let from = live.state();
        let (to, effects) = match transition(from, event) {
            Ok(next) => next,
            Err(rejected) => {
                // A worker that reports what a command has overtaken; the command's effects have dealt with it.
                tracing::debug!(migration = live.name(), %rejected, "event without a place");
                return Ok(());
            }
        };
        let finished = !to.is_active();
        let error = problem.as_ref().map(|problem| serde_json::to_value(problem).unwrap_or_default());
        self.context.catalog.set_state(live.name(), to.substate(), error.as_ref(), finished).await?;
        self.context.failpoints.hit("engine.after_state").await?;
        live.publish(|status| {
            status.state = to;
            status.error = problem;
            status.finished_at = finished.then(unix_now);
        });
        self.context.changes.send_modify(|changes| *changes += 1);
        let gauge = &self.context.metrics.migration_state;
        gauge.with_label_values(&[live.name(), from.substate()]).set(0);
        gauge.with_label_values(&[live.name(), to.substate()]).set(1);
        tracing::info!(
            migration = live.name(),
            %from,
            %to,
            ?event,
            generation = self.context.catalog.generation().0,
            "state changed"
        );
        for effect in effects {
            self.perform(effect).await;
        }
        Ok(())
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::StartWork => self.start_work(),
            Effect::StopWork => self.stop_work().await,
            Effect::Undo => self.undo().await,
            Effect::Align => self.align().await,
            Effect::EndStreams => self.end_streams().await,
            Effect::AwaitVerdict => {}
        }
    }

    fn start_work(&mut self) {
        if self.work.as_ref().is_some_and(|work| !work.is_finished()) {
            return;
        }
        let worker = Worker { context: self.context.clone(), commands: self.sender.clone() };
        self.work = Some(tokio::spawn(worker.run()));
    }

    /// Stops at once: whatever the work is in the middle of can be done again.
    async fn stop_work(&mut self) {
        if let Some(work) = self.work.take() {
            work.abort();
            // Either it had ended, or it was aborted.
            let _ended = work.await;
        }
        for database in &self.context.live.databases {
            database.forget_lag();
            let (metrics, migration) = (&self.context.metrics, self.context.live.name());
            for direction in [Direction::Forward, Direction::Reverse] {
                Gauges { metrics, migration, database: &database.name, direction }.clear();
            }
        }
    }

    async fn undo(&mut self) {
        for database in &self.context.live.databases {
            database.fenced.set_watch(None);
            database.uncount(&self.context.metrics);
        }
        let undone = match Box::pin(cancel::undo(&self.context, |_| true, Shut::Entered)).await {
            Ok(undone) => undone,
            Err(error) => {
                let problem = error.problem(None);
                tracing::warn!(
                    migration = self.context.live.name(),
                    error = describe(&error),
                    "the cancel was interrupted"
                );
                self.context.live.publish(|status| status.error = Some(problem));
                return;
            }
        };
        self.context.live.set_cancelled(&undone.report);
        if !undone.complete {
            let problem = Problem {
                code: "left".to_owned(),
                message: "not everything could be removed".to_owned(),
                object: undone.report.left.first().map(|left| format!("{} {}", left.object.kind, left.object.name)),
                hint: Some("mend the cause and cancel again; the report names what is left".to_owned()),
            };
            self.context.live.publish(|status| status.error = Some(problem));
            return;
        }
        if let Err(error) = Box::pin(self.change(Event::Undone, None)).await {
            tracing::warn!(
                migration = self.context.live.name(),
                error = describe(&error),
                "the cancel is not recorded yet"
            );
        }
    }

    /// Makes the streams fit the state; tried again until every slot is where it belongs.
    async fn align(&mut self) {
        let aligned = Box::pin(turn::align(&self.context, self.context.live.state().direction())).await;
        let left = self.what_is_left(aligned);
        // A publication that stays is listed until `complete`; a slot that stays holds WAL back.
        if left.is_none_or(|report| report.left.iter().any(|left| left.object.kind == "slot")) {
            self.unfinished = Some(Unfinished::Align);
        }
    }

    /// Drops every stream; the migration is closed once that is done.
    async fn end_streams(&mut self) {
        let ended = Box::pin(turn::end(&self.context)).await;
        let Some(mut report) = self.what_is_left(ended) else {
            self.unfinished = Some(Unfinished::EndStreams);
            return;
        };
        let tombstones = turn::tombstones(&self.context).await;
        let complete = report.left.is_empty();
        report.left.extend(tombstones);
        self.context.live.set_cancelled(&report);
        if !complete {
            self.unfinished = Some(Unfinished::EndStreams);
            return;
        }
        if let Err(error) = Box::pin(self.change(Event::Undone, None)).await {
            tracing::warn!(
                migration = self.context.live.name(),
                error = describe(&error),
                "not recorded as closed yet"
            );
            self.unfinished = Some(Unfinished::EndStreams);
        }
    }

    /// The report, with what is left logged; none when it is to be tried again.
    fn what_is_left(&self, undone: Result<cancel::Undone, WorkError>) -> Option<CancelReport> {
        match undone {
            Ok(undone) => {
                for left in &undone.report.left {
                    tracing::warn!(
                        migration = self.context.live.name(),
                        kind = left.object.kind,
                        name = left.object.name,
                        reason = left.reason,
                        "not removed yet"
                    );
                }
                Some(undone.report)
            }
            Err(error) => {
                tracing::warn!(
                    migration = self.context.live.name(),
                    error = describe(&error),
                    "the streams are not in order yet"
                );
                None
            }
        }
    }
}

/// Resolves when the work has ended; never while there is none.
async fn finished(work: &mut Option<JoinHandle<WorkEnd>>) -> WorkEnd {
    match work {
        Some(handle) => handle.await.unwrap_or_else(|error| {
            let problem = Problem {
                code: "internal".to_owned(),
                message: format!("the worker ended unexpectedly: {error}"),
                object: None,
                hint: Some("retry goes on where it ended; please report this".to_owned()),
            };
            WorkEnd::Event(Event::WorkFailed, Some(problem))
        }),
        None => std::future::pending().await,
    }
}
