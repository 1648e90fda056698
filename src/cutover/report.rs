//! What a cutover answers: the JSON of SPEC section 1, and what it met on the way.

use std::time::{Duration, Instant};

use super::CutoverError;
use super::forecast::Intention;
use super::hard_fence::Obstacle;
use super::phase::Phase;
use crate::catalog::streams::Direction;
use crate::telemetry::metrics::{self, Metrics};

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

/// One part of prepare or of the pause. Some run beside each other, so the sum may be more than the whole.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct TimedStep {
    /// What was done or waited for.
    pub step: &'static str,
    /// How long, in milliseconds.
    pub ms: f64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CutoverReport {
    /// Forward: a cutover. Reverse: a rollback.
    pub direction: Direction,
    /// How it ended.
    pub outcome: CutoverOutcome,
    /// Why it was aborted; empty otherwise.
    pub reason: String,
    /// What mends that.
    pub hint: Option<&'static str>,
    /// Whether the same order with `--force` goes past that.
    pub forceable: bool,
    /// Guardrails that it went past because of `--force`.
    pub forced: Vec<String>,
    /// From the closing of the gates to their opening, in milliseconds; 0 when they were never closed.
    pub pause_ms: u64,
    /// Time by phase.
    pub phases_ms: PhasesMs,
    /// What prepare was spent on, in the order of the protocol.
    pub prepare_steps: Vec<TimedStep>,
    /// What the pause was spent on, in the order of the protocol.
    pub pause_steps: Vec<TimedStep>,
    /// Sessions that waited for the gates to open.
    pub sessions_held: u64,
    /// The longest that any of them waited for that, in milliseconds.
    pub longest_hold_ms: f64,
    /// What a real cutover would have done, after a dry run.
    pub would: Vec<Intention>,
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
    /// Of one that was refused before anything was done.
    pub(super) fn not_begun(direction: Direction, error: &CutoverError) -> Self {
        Self {
            direction,
            outcome: CutoverOutcome::Aborted,
            reason: error.to_string(),
            hint: error.hint(),
            forceable: error.is_forceable(),
            forced: Vec::new(),
            pause_ms: 0,
            phases_ms: PhasesMs::default(),
            prepare_steps: Vec::new(),
            pause_steps: Vec::new(),
            sessions_held: 0,
            longest_hold_ms: 0.0,
            would: Vec::new(),
            sessions_moved: 0,
            sessions_ended: 0,
            epoch: 0,
            blockers: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Whether a command exits 0: switched, or a dry run that would have.
    pub fn is_success(&self) -> bool {
        matches!(self.outcome, CutoverOutcome::Switched | CutoverOutcome::DryRun)
    }

    /// Counts it; `max_pause` is what it was allowed.
    pub(super) fn count(&self, metrics: &Metrics, max_pause: Duration) {
        let outcome = match self.outcome {
            CutoverOutcome::Switched => metrics::Outcome::Switched,
            CutoverOutcome::Aborted => metrics::Outcome::Aborted,
            CutoverOutcome::DryRun => metrics::Outcome::DryRun,
        };
        metrics.cutovers.with_label_values(&[self.direction.as_str(), outcome.as_str()]).inc();
        let phases = self.phases_ms;
        for (phase, spent_ms) in [
            (metrics::Phase::Prepare, phases.prepare),
            (metrics::Phase::Pause, phases.pause),
            (metrics::Phase::Drain, phases.drain),
            (metrics::Phase::Decide, phases.decide),
            (metrics::Phase::Switch, phases.switch),
        ] {
            if spent_ms > 0 {
                let seconds = Duration::from_millis(spent_ms).as_secs_f64();
                metrics.cutover_phase_seconds.with_label_values(&[phase.as_str()]).observe(seconds);
            }
        }
        let pause = Duration::from_millis(self.pause_ms);
        if !pause.is_zero() {
            metrics.cutover_pause_seconds.observe(pause.as_secs_f64());
        }
        if pause > max_pause {
            metrics.cutover_pauses_above_budget.inc();
        }
    }
}

/// Where a running cutover stands, for observers.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CutoverProgress {
    /// Forward: a cutover. Reverse: a rollback.
    pub direction: Direction,
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
    prepare_steps: Vec<TimedStep>,
    pause_steps: Vec<TimedStep>,
    /// How many sessions waited for the gates to open, and how long the first of them.
    held: (u64, Duration),
}

impl Timings {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            phase_began: now,
            paused: None,
            pause: None,
            phases: PhasesMs::default(),
            prepare_steps: Vec::new(),
            pause_steps: Vec::new(),
            held: (0, Duration::ZERO),
        }
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

    /// So many sessions wait for the gates, the first for so long; they are about to be opened.
    pub(super) fn held(&mut self, sessions: u64, longest: Duration) {
        self.held = (sessions, longest);
    }

    pub(super) fn sessions_held(&self) -> u64 {
        self.held.0
    }

    pub(super) fn longest_hold_ms(&self) -> f64 {
        rounded_ms(self.held.1)
    }

    /// A part of prepare, or of the pause once the gates are closed, that began at `since` has ended.
    pub(super) fn step(&mut self, step: &'static str, since: Instant) {
        self.took(step, since.elapsed());
    }

    /// Such a part took so long.
    pub(super) fn took(&mut self, step: &'static str, time: Duration) {
        let steps = if self.paused.is_none() { &mut self.prepare_steps } else { &mut self.pause_steps };
        steps.push(TimedStep { step, ms: rounded_ms(time) });
    }

    pub(super) fn prepare_steps(&self) -> Vec<TimedStep> {
        self.prepare_steps.clone()
    }

    pub(super) fn pause_steps(&self) -> Vec<TimedStep> {
        self.pause_steps.clone()
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

/// Milliseconds to two places.
fn rounded_ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_above_its_budget_is_counted() {
        let metrics = Metrics::new().expect("names are distinct");
        let refused = CutoverReport::not_begun(Direction::Reverse, &CutoverError::Stopped("in a test"));
        let report = |pause_ms| CutoverReport { pause_ms, ..refused.clone() };
        report(2000).count(&metrics, Duration::from_secs(2));
        assert_eq!(metrics.cutover_pauses_above_budget.get(), 0);
        report(2001).count(&metrics, Duration::from_secs(2));
        assert_eq!(metrics.cutover_pauses_above_budget.get(), 1);
        assert_eq!(metrics.cutovers.with_label_values(&["reverse", "aborted"]).get(), 2);
    }
}
