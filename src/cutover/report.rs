//! What a cutover answers: the JSON of SPEC section 1, and what it met on the way.

use std::time::{Duration, Instant};

use super::hard_fence::Obstacle;
use super::phase::Phase;

/// How a cutover ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CutoverOutcome {
    /// Everything runs on the other server.
    Switched,
    /// Everything was undone; it runs where it ran before.
    Aborted,
    /// A dry run went through to the point where it would have decided.
    DryRun,
}

/// Milliseconds spent in each phase; one that was not reached counts 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PhasesMs {
    /// Guardrails, moves of idle sessions, soft fence.
    pub prepare: u64,
    /// Gates and hard fence.
    pub pause: u64,
    /// Running transactions, replication to zero.
    pub drain: u64,
    /// Sequences, boundary rows, the decision.
    pub decide: u64,
    /// Routes and gates.
    pub switch: u64,
}

/// One part of the pause. Some run beside each other, so the sum may be more than the pause.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct PauseStep {
    /// What was done or waited for.
    pub step: &'static str,
    /// How long, in milliseconds.
    pub ms: f64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CutoverReport {
    /// How it ended.
    pub outcome: CutoverOutcome,
    /// Why it was aborted; empty otherwise.
    pub reason: String,
    /// From the closing of the gates to their opening, in milliseconds; 0 when they were never closed.
    pub pause_ms: u64,
    /// Time by phase.
    pub phases_ms: PhasesMs,
    /// What the pause was spent on, in the order of the protocol.
    pub pause_steps: Vec<PauseStep>,
    /// Sessions that were moved, or would have been.
    pub sessions_moved: u64,
    /// Sessions that were ended, strangers included.
    pub sessions_ended: u64,
    /// Number of the cutover.
    pub epoch: u64,
    /// What stood in the way when it was aborted.
    pub blockers: Vec<Obstacle>,
    /// What the operator should know all the same.
    pub notes: Vec<String>,
}

impl CutoverReport {
    /// Whether a command exits 0: switched, or a dry run that would have.
    pub fn is_success(&self) -> bool {
        matches!(self.outcome, CutoverOutcome::Switched | CutoverOutcome::DryRun)
    }
}

/// Where a running cutover stands, for observers.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CutoverProgress {
    /// Number of the cutover.
    pub epoch: u64,
    /// What it is doing.
    pub phase: Phase,
    /// Milliseconds since it was accepted.
    pub elapsed_ms: u64,
    /// Milliseconds since the gates were closed, while they are.
    pub paused_ms: Option<u64>,
}

/// Stop watch of one cutover. Phases follow each other; what runs after the last one is not counted.
#[derive(Clone, Debug)]
pub(super) struct Timings {
    began: Instant,
    phase_began: Instant,
    paused: Option<Instant>,
    pause: Option<Duration>,
    phases: PhasesMs,
    steps: Vec<PauseStep>,
}

impl Timings {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { began: now, phase_began: now, paused: None, pause: None, phases: PhasesMs::default(), steps: Vec::new() }
    }

    /// The time since the last call belongs to `phase`.
    pub(super) fn lap(&mut self, phase: Phase) {
        let now = Instant::now();
        let spent = millis(now - self.phase_began);
        self.phase_began = now;
        match phase {
            Phase::Prepare => self.phases.prepare += spent,
            Phase::Pause => self.phases.pause += spent,
            Phase::Drain => self.phases.drain += spent,
            Phase::Decide | Phase::Deciding | Phase::InDoubt => self.phases.decide += spent,
            Phase::Switch => self.phases.switch += spent,
            Phase::Switched | Phase::Aborting | Phase::Aborted => {}
        }
    }

    /// The gates are being closed.
    pub(super) fn gates_closed(&mut self) {
        self.paused = Some(Instant::now());
    }

    /// When the gates were closed; now, as long as they are open.
    pub(super) fn closed(&self) -> Instant {
        self.paused.unwrap_or_else(Instant::now)
    }

    /// The gates have been opened.
    pub(super) fn gates_opened(&mut self) {
        self.pause = self.pause.or_else(|| self.paused.map(|since| since.elapsed()));
    }

    /// A part of the pause that began at `since` has ended.
    pub(super) fn step(&mut self, step: &'static str, since: Instant) {
        self.took(step, since.elapsed());
    }

    /// A part of the pause took so long.
    pub(super) fn took(&mut self, step: &'static str, time: Duration) {
        self.steps.push(PauseStep { step, ms: (time.as_secs_f64() * 1e5).round() / 100.0 });
    }

    pub(super) fn steps(&self) -> Vec<PauseStep> {
        self.steps.clone()
    }

    pub(super) fn elapsed_ms(&self) -> u64 {
        millis(self.began.elapsed())
    }

    pub(super) fn paused_ms(&self) -> Option<u64> {
        self.paused.filter(|_| self.pause.is_none()).map(|since| millis(since.elapsed()))
    }

    pub(super) fn pause_ms(&self) -> u64 {
        self.pause.map_or(0, millis)
    }

    pub(super) fn phases(&self) -> PhasesMs {
        self.phases
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
