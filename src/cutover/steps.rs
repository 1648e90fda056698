//! The protocol of a cutover: one type for each step, each consuming the one before it.
//!
//! ```text
//! Ready ─prepare→ Prepared ─pause→ Paused ─drain→ Drained ─decide→ Decided ─switch→ report
//!   │                │                │              │       │
//!   │                │                │              │       ├→ InDoubt ─settle→ Decided, or aborted
//!   └────────────────┴────────────────┴──────────────┘       └→ aborted (read from the other server)
//!                     abort: undo everything
//! ```
//!
//! A wrong order does not compile; neither does an abort after the decision was sent, because what could abort has been
//! consumed. A step that fails hands back everything it was given in a [`Stopped`], whose only use is to be undone.

use std::time::{Duration, Instant};

use super::CutoverError;
use super::guardrails::published_tables;
use super::hard_fence;
use super::home;
use super::phase::Event;
use super::report::{CutoverOutcome, CutoverReport};
use super::settle::{self, Answer};
use super::slowdown::Slowdown;
use super::soft_fence::{self, Before};
use super::work::{Line, LineSessions, Work, bounded};
use crate::catalog::decision::Outcome;
use crate::catalog::fence::Fence;
use crate::catalog::{Place, bootstrap};
use crate::config::{FencePolicy, Reads};
use crate::migration::sequences::SequencePair;
use crate::migration::standstill::Standstill;
use crate::migration::{late, unstreamed};
use crate::postgres::Control;

/// Every failpoint of a cutover, in the order in which one that goes well passes them, then those of an abort. Crash
/// tests walk this list.
pub const ALL_FAILPOINTS: &[&str] = &[
    "prepare.after_return",
    "prepare.before_fence",
    "prepare.after_fence",
    "pause.after_gate",
    "pause.after_hard_fence",
    "drain.after_sessions",
    "drain.after_marker",
    "drain.after_applied",
    "decide.before_boundary",
    "decide.before_decision",
    "decide.after_decision",
    "switch.before_open",
    "switch.after_open",
    "switch.after_note",
    "switch.after_finish",
    "abort.before_decision",
    "abort.after_decision",
    "abort.after_lift",
];

/// Those that only a rollback passes besides, in the same order.
pub const ROLLBACK_FAILPOINTS: &[&str] = &["prepare.after_ajar", "switch.after_return"];

/// Between two questions while the decision is in doubt.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// A session that is not in its turn for a move waits so long for each that there is.
const PREPARES_WITHIN: Duration = Duration::from_millis(50);

/// A lock that conflicts with no writer is not waited for any longer.
const WARMING_LOCK_TIMEOUT: Duration = Duration::from_millis(100);

/// A session locks so many tables, and then another one locks as well: with thousands of connections each takes the server tens
/// of microseconds.
const TABLES_PER_SESSION: usize = 250;

/// At most so many sessions lock the tables of a database.
const MOST_LOCK_SESSIONS: usize = 4;

/// After the gates have opened.
const BREATH: Duration = Duration::from_millis(250);

/// Between two looks at sessions that are logging in.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The cutover was accepted; nothing has been done.
#[derive(Debug)]
pub(super) struct Ready(pub(super) Box<Work>);

/// Sessions have their other backend, the server that is left is fenced softly.
#[derive(Debug)]
pub(super) struct Prepared(Box<Work>);

/// No transaction begins any more, and the server lets nobody in.
#[derive(Debug)]
pub(super) struct Paused(Box<Work>, Pause);

/// Everything that was ever written there is durable on the other server.
#[derive(Debug)]
pub(super) struct Drained(Box<Work>, Pause);

/// `decided` was read. There is no way back.
#[derive(Debug)]
pub(super) struct Decided(Box<Work>);

/// The decision was sent and the answer lost.
#[derive(Debug)]
pub(super) struct InDoubt(Box<Work>);

/// A step did not go through. Undo it.
#[derive(Debug)]
pub(super) struct Stopped(Box<Work>, CutoverError);

/// What the other server answered to the decision.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Go on.
    Decided(Decided),
    /// Somebody aborted before the decision arrived, or it was never sent.
    Stopped(Stopped),
    /// Ask again.
    InDoubt(InDoubt),
}

/// When the pause must have ended.
#[derive(Clone, Copy, Debug)]
struct Pause {
    deadline: Instant,
    limit: Duration,
}

impl Stopped {
    /// Undoes everything; it runs where it ran before.
    pub(super) async fn abort(self) -> CutoverReport {
        let Self(work, error) = self;
        tracing::warn!(migration = work.case.migration, epoch = work.case.epoch.0, %error, "cutover aborted");
        work.undo(CutoverOutcome::Aborted, Some(error)).await
    }
}

/// Runs a step on the work, so that whatever it has begun is still in our hands when it fails or is dropped.
macro_rules! attempt {
    ($work:ident, $pause:expr, $step:expr) => {{
        let orders = $work.orders.clone();
        let pause: Option<Pause> = $pause;
        let bound = pause.map(|pause| (pause.deadline, pause.limit));
        match Box::pin(bounded(&orders, bound, $step)).await {
            Ok(done) => done,
            Err(error) => return Err(Stopped($work, error)),
        }
    }};
}

impl Ready {
    /// Checks the guardrails, lets sessions prepare their move, and fences softly.
    pub(super) async fn prepare(self) -> Result<Prepared, Stopped> {
        let Self(mut work) = self;
        attempt!(work, None, Slowdown::of(&work).beside(work.prepare()));
        match work.advance(Event::StepDone) {
            Ok(()) => Ok(Prepared(work)),
            Err(error) => Err(Stopped(work, error)),
        }
    }
}

impl Prepared {
    /// Closes the gates and shuts the server.
    pub(super) async fn pause(self) -> Result<Paused, Stopped> {
        let Self(mut work) = self;
        let limit = work.options.max_pause;
        let pause = Pause { deadline: Instant::now() + limit, limit };
        attempt!(work, Some(pause), work.pause());
        match work.advance(Event::StepDone) {
            Ok(()) => Ok(Paused(work, pause)),
            Err(error) => Err(Stopped(work, error)),
        }
    }
}

impl Paused {
    /// Waits until everything that was let in has ended and everything written has arrived.
    pub(super) async fn drain(self) -> Result<Drained, Stopped> {
        let Self(mut work, pause) = self;
        attempt!(work, Some(pause), work.drain(pause.deadline));
        match work.advance(Event::StepDone) {
            Ok(()) => Ok(Drained(work, pause)),
            Err(error) => Err(Stopped(work, error)),
        }
    }
}

impl Drained {
    /// Whether it was asked only how long it would take.
    pub(super) fn is_dry_run(&self) -> bool {
        self.0.options.dry_run
    }

    /// The planned end of a dry run.
    pub(super) async fn resume(self) -> CutoverReport {
        self.0.undo(CutoverOutcome::DryRun, None).await
    }

    /// Writes the boundaries, then sends the decision.
    pub(super) async fn decide(self) -> Verdict {
        let Self(work, pause) = self;
        let mut work = match write_target(work, pause).await {
            Ok(work) => work,
            Err(stopped) => return Verdict::Stopped(stopped),
        };
        // The last moment at which max_pause can fire.
        if Instant::now() >= pause.deadline {
            let error = CutoverError::MaxPause(pause.limit);
            return Verdict::Stopped(Stopped(work, error));
        }
        if let Err(error) = work.advance(Event::Sent) {
            return Verdict::Stopped(Stopped(work, error));
        }
        let since = Instant::now();
        let answer = Box::pin(work.send_decision()).await;
        work.timings.step("the decision is durable", since);
        take_answer(work, answer)
    }
}

async fn write_target(mut work: Box<Work>, pause: Pause) -> Result<Box<Work>, Stopped> {
    attempt!(work, Some(pause), async {
        work.failpoint("decide.before_boundary").await?;
        let since = Instant::now();
        work.write_boundaries().await?;
        work.timings.step("boundary is written", since);
        work.failpoint("decide.before_decision").await?;
        Ok(())
    });
    Ok(work)
}

/// Only an answer that was read moves the cutover on.
fn take_answer(mut work: Box<Work>, answer: Answer) -> Verdict {
    let (event, lost) = match answer {
        Answer::Read(Outcome::Decided) => (Event::ReadDecided, None),
        Answer::Read(Outcome::Aborted) => (Event::ReadAborted, None),
        Answer::Lost(error) => (Event::AnswerLost, Some(error)),
    };
    // In doubt and no answer again: still in doubt.
    if !(event == Event::AnswerLost && work.phase == super::phase::Phase::InDoubt)
        && let Err(error) = work.advance(event)
    {
        tracing::error!(%error, "cutover");
    }
    match (event, lost) {
        (Event::ReadDecided, _) => Verdict::Decided(Decided(work)),
        (_, Some(error)) => {
            tracing::warn!(epoch = work.case.epoch.0, %error, "the decision is in doubt");
            Verdict::InDoubt(InDoubt(work))
        }
        (_, None) => {
            let error = CutoverError::Stopped("the cutover was aborted before its decision arrived");
            Verdict::Stopped(Stopped(work, error))
        }
    }
}

impl InDoubt {
    /// Stays fenced and asks until an answer is read. New sessions are refused with 57P03 meanwhile, held ones stay held.
    /// Ends without an answer only when the process stops: the next start asks.
    pub(super) async fn settle(self) -> Verdict {
        let Self(mut work) = self;
        for line in &work.lines {
            line.gate.set_unknown(format!(
                "cutover {} is being decided and the {} does not answer",
                work.case.epoch, work.to.role
            ));
        }
        loop {
            let answer = Box::pin(work.ask_again()).await;
            match take_answer(work, answer) {
                Verdict::InDoubt(Self(again)) => work = again,
                verdict @ (Verdict::Decided(_) | Verdict::Stopped(_)) => return verdict,
            }
            if work.orders.tasks.is_stopping() {
                return Verdict::InDoubt(Self(work));
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// What can be said when the process stops before an answer was read. Nothing is undone.
    pub(super) fn give_up(self) -> CutoverReport {
        let error =
            CutoverError::Stopped("pgcutover stopped while the decision was in doubt; the next start settles it");
        self.0.report(CutoverOutcome::Aborted, Some(&error))
    }
}

impl Decided {
    /// Publishes the routes, opens the gates, and tidies up. Nothing in here can fail the cutover.
    pub(super) async fn switch(self) -> CutoverReport {
        let Self(mut work) = self;
        work.pass("decide.after_decision").await;
        work.pass("switch.before_open").await;
        if let Err(error) = work.commit_late_definitions().await {
            work.notes.push(format!("{error}; the next start makes them and lets sessions go on"));
            return work.report(CutoverOutcome::Switched, None);
        }
        let (to, epoch) = (work.to.role, work.case.epoch);
        work.open_gates(to, |_| epoch);
        work.lines.iter().for_each(|line| line.gate.set_prepare_window(None));
        work.pass("switch.after_open").await;
        work.give_back().await;
        if let Err(error) = work.advance(Event::Finished) {
            tracing::error!(%error, "cutover");
        }
        if let Err(error) = settle::note_decided(&work.from.control, work.case.epoch).await {
            work.leave_chore(&format!("the {} could not be told that it was left", work.from.role), &error);
        }
        work.pass("switch.after_note").await;
        work.let_sessions_go_on().await;
        if let Err(reason) = work.lease.finish(Outcome::Decided).await {
            tracing::error!(reason, "the engine could not finish the migration; the next start tries again");
            work.notes.push(format!("the engine could not finish the migration: {reason}"));
        }
        // Not before the stream has ended: whoever waits for our locks on the tables of the old server writes as soon as
        // they are gone, and that would be applied to the server which is in use.
        work.lines.iter_mut().for_each(|line| line.sessions = None);
        work.pass("switch.after_finish").await;
        work.report(CutoverOutcome::Switched, None)
    }
}

impl Work {
    async fn prepare(&mut self) -> Result<(), CutoverError> {
        let since = Instant::now();
        self.check_guardrails().await?;
        self.enter_home().await?;
        if self.home.is_some() {
            // For a first cutover it was compared before it began; a fenced server could not be entered until now.
            self.compare_definitions().await?;
        }
        self.check_rights().await?;
        self.timings.step("guardrails", since);
        let since = Instant::now();
        // Large objects have owners.
        self.bring_rights().await?;
        let notes = self.lease.synchronise().await.map_err(CutoverError::Synchronise)?;
        self.notes.extend(notes);
        self.timings.step("roles, settings and what no stream carries", since);
        if !self.options.dry_run {
            // Before the fence: making a slot waits for every transaction that is open on the other server.
            let since = Instant::now();
            let notes = self.lease.prepare_return(self.case.epoch).await.map_err(CutoverError::Engine)?;
            self.notes.extend(notes);
            self.timings.step("the way back", since);
            self.failpoint("prepare.after_return").await?;
        }
        let since = Instant::now();
        self.open_sessions().await?;
        // Until now anybody may have made others; from now on the standstills tell.
        self.bring_rights().await?;
        self.check_rights().await?;
        self.compare_definitions().await?;
        self.check_fingerprints().await?;
        self.timings.step("our own sessions and a last comparison", since);
        let sessions = u32::try_from(self.sessions.list().len()).unwrap_or(u32::MAX);
        let patience = self.to.connector.server().connect_timeout + self.options.drain_timeout;
        let deadline = Instant::now() + patience + PREPARES_WITHIN.saturating_mul(sessions);
        self.undo.moves = true;
        let since = Instant::now();
        let reports = self.sessions.prepare_moves(&self.case.databases, self.move_order(), deadline).await;
        self.timings.step("sessions are prepared", since);
        let unmoved = self.take_moves(&reports);
        self.check_moves(unmoved.stuck)?;
        if self.options.dry_run {
            self.would = self.foresee().await?;
            return Ok(());
        }
        self.failpoint("prepare.before_fence").await?;
        let since = Instant::now();
        self.raise_soft_fence().await?;
        self.timings.step("the soft fence", since);
        let since = Instant::now();
        // What has moved since they were brought over first need not be set in the pause.
        self.bring_sequences().await?;
        self.timings.step("sequences once more", since);
        self.failpoint("prepare.after_fence").await?;
        Ok(())
    }

    /// Roles with their passwords, memberships and settings, and the settings of the databases.
    async fn bring_rights(&mut self) -> Result<(), CutoverError> {
        for note in self.lease.synchronise_rights().await.map_err(CutoverError::Synchronise)? {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        Ok(())
    }

    /// A rollback leads to a server that is still fenced: our sessions are to get in, and to write there.
    async fn enter_home(&mut self) -> Result<(), CutoverError> {
        let Some(home) = &self.home else { return Ok(()) };
        let mut windows = home::windows(&self.to.control, &home.fence, self.case.epoch).await?;
        for line in &self.lines {
            let window = windows.remove(&line.name).map(|window| (self.to.role, window));
            line.gate.set_return_window(window);
        }
        self.undo.ajar = true;
        home::set_ajar(&mut self.to.control, home).await?;
        self.failpoint("prepare.after_ajar").await?;
        Ok(())
    }

    /// The server that a rollback has led back to gets its settings back. Until then our sessions there are given the
    /// default that they would have had.
    async fn give_back(&mut self) {
        let Some(home) = self.home.take() else { return };
        self.undo.ajar = false;
        match home::give_back(&mut self.to.control, &home.fence, self.case.epoch).await {
            Ok(()) => self.lines.iter().for_each(|line| line.gate.set_return_window(None)),
            Err(error) => {
                self.leave_chore(&format!("the fence of the {} could not be lifted", self.to.role), &error);
            }
        }
        self.pass("switch.after_return").await;
    }

    /// What is not urgent any more leaves the processors to the sessions that have just gone on.
    pub(super) async fn let_sessions_go_on(&self) {
        tokio::time::sleep(BREATH).await;
    }

    async fn open_sessions(&mut self) -> Result<(), CutoverError> {
        let order = self.move_order();
        for line in &mut self.lines {
            let onward = self.to.connector.control(&line.name, "cutover").await?;
            bootstrap(&onward, Place::TargetDatabase).await?;
            let marker = self.from.connector.control(&line.name, "cutover-marker").await?;
            let failed = |source| CutoverError::query("prepare the sessions of the pause", source);
            self.sessions.learn_names(&line.name, order, &marker).await.map_err(failed)?;
            // What is set here need not be set in the pause, and the statements are planned.
            let sequences = SequencePair::prepare(&marker, &onward).await?;
            let publication = self.lease.replication(&line.name).publication;
            let standstill = Standstill::begin(&marker, &publication).await.map_err(failed)?;
            let weight = unstreamed::weigh(&marker).await?;
            let mut tables = published_tables(&marker, &publication).await?;
            tables.extend(weight.tables.iter().map(|(table, _)| table.to_string()));
            // What the other server has alone was removed here, and is to go there too.
            let unstreamed = if weight.is_nothing() && !unstreamed::has_large_objects(&onward).await? {
                None
            } else {
                let from = self.from.connector.control(&line.name, "cutover-unstreamed").await?;
                Some((from, self.to.connector.control(&line.name, "cutover-unstreamed").await?))
            };
            let late = match late::waiting(&onward).await? {
                0 => None,
                definitions => {
                    let name = &line.name;
                    self.notes.push(format!(
                        "{definitions} foreign keys, triggers, rules and policies of {name:?} come with the cutover, in its pause"
                    ));
                    Some(self.to.connector.control(name, "cutover-late").await?)
                }
            };
            // The boundary is durable with the decision, which follows it.
            onward.batch_execute("SET synchronous_commit = off").await.map_err(failed)?;
            let mut sessions = LineSessions {
                sequences,
                standstill,
                unstreamed,
                first_large_objects: false,
                late,
                tables,
                locks: Vec::new(),
                marker,
                onward,
            };
            if !self.options.dry_run {
                for _ in 0..sessions.tables.len().div_ceil(TABLES_PER_SESSION).min(MOST_LOCK_SESSIONS) {
                    sessions.locks.push(self.from.connector.control(&line.name, "cutover-locks").await?);
                }
                for (session, tables) in sessions.lock_shares() {
                    look_up(session, tables).await.map_err(failed)?;
                }
            }
            line.sessions = Some(sessions);
        }
        Ok(())
    }

    async fn raise_soft_fence(&mut self) -> Result<(), CutoverError> {
        let before = soft_fence::read_before(&*self.from.control, &self.case.databases, self.case.epoch).await?;
        let fence = Fence {
            case: self.case.clone(),
            on: self.from.identity.clone(),
            leads_to: self.to.identity.clone(),
            saved: before.iter().map(|Before { saved, .. }| saved.clone()).collect(),
        };
        // Noted, and the windows opened, before the fence can be felt: its commit may be lost on the way back.
        self.undo.fence = Some(fence.clone());
        for Before { saved, window, .. } in before {
            if let Some(line) = self.lines.iter().find(|line| line.name == saved.name) {
                line.gate.set_prepare_window(Some((self.from.role, window)));
            }
        }
        for role in soft_fence::raise(&mut self.from.control, &fence).await? {
            self.notes
                .push(format!("role {role:?} sets default_transaction_read_only itself and could not be overridden"));
        }
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), CutoverError> {
        self.undo.gates = true;
        self.reads_before = self.sessions.reads_in_pauses();
        self.timings.gates_closed();
        for line in &self.lines {
            match self.options.reads {
                Reads::Pause => line.gate.fence(),
                Reads::Continue => line.gate.fence_writers(),
            }
        }
        self.publish();
        // Those that are at a safe point begin at once; the others when their transaction has ended.
        self.sessions.begin_settling(&self.case.databases);
        self.failpoint("pause.after_gate").await?;
        let since = Instant::now();
        self.wait_for_logins().await;
        self.timings.step("logins end", since);
        if self.options.fence == FencePolicy::Hard && !self.options.dry_run {
            let since = Instant::now();
            let shut = hard_fence::shut(&self.from.control, &self.case, self.shutting, || self.known()).await?;
            self.sessions_ended += shut.ended;
            self.timings.took("the server is shut", shut.within);
            self.timings.took("strangers have left", since.elapsed().saturating_sub(shut.within));
        }
        self.failpoint("pause.after_hard_fence").await?;
        Ok(())
    }

    /// A login opens its backend inside the gate, and its client would feel the shut door. Those that are on their way
    /// are let through; one that takes longer than a transaction may is refused.
    async fn wait_for_logins(&self) {
        let logging_in = |line: &Line| line.gate.inside() > self.sessions.stragglers(&line.name).len();
        let deadline = Instant::now() + self.options.drain_timeout;
        while self.lines.iter().any(logging_in) && Instant::now() < deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn drain(&mut self, deadline: Instant) -> Result<(), CutoverError> {
        if self.options.reads == Reads::Continue {
            self.drain_writers().await?;
        }
        let last = self.drain_sessions().await?;
        let reads = self.sessions.reads_in_pauses() - self.reads_before;
        if reads > 0 {
            self.notes.push(format!("{reads} read-only transactions went on during the pause (reads = \"continue\")"));
        }
        self.failpoint("drain.after_marker").await?;
        self.arrive(last, deadline).await?;
        let since = Instant::now();
        self.carry_unstreamed().await?;
        self.timings.step("what no stream carries is brought over", since);
        if !self.options.dry_run {
            self.make_late_definitions().await?;
        }
        self.failpoint("drain.after_applied").await?;
        Ok(())
    }
}

/// Has the session look up now what it would look up in the pause to lock these tables; with a thousand of them that takes
/// longer than the locks do. Nothing is kept, and where it does not succeed it is done then.
async fn look_up(locks: &Control, tables: &[String]) -> Result<(), tokio_postgres::Error> {
    let script = format!(
        "BEGIN; SET LOCAL lock_timeout = {}; LOCK TABLE ONLY {} IN ACCESS SHARE MODE",
        WARMING_LOCK_TIMEOUT.as_millis(),
        tables.join(", ONLY ")
    );
    if let Err(error) = locks.batch_execute(&script).await {
        tracing::debug!(%error, "the tables were not looked up beforehand");
    }
    locks.batch_execute("ROLLBACK").await
}
