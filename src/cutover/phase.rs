//! Where a cutover stands. Pure: events in, phases out; the steps report, observers read.
//!
//! ```text
//! prepare → pause → drain → decide → deciding → switch → switched
//!    └────────┴───────┴───────┴─→ aborting → aborted      ↑ │
//!                                     ↑                   │ │
//!                                     └──── in-doubt ─────┘ ↓
//!                                               ↑──── deciding
//! ```
//!
//! Until the decision has been sent, everything can be taken back. From `deciding` on only the answer of the server that
//! the cutover leads to counts; `max_pause` cannot fire there any more.

/// What a cutover is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Guardrails, moves of idle sessions, soft fence. Set when the cutover is accepted.
    Prepare,
    /// New transactions are held, the server is fenced. Set by a finished prepare.
    Pause,
    /// Running transactions end, replication is brought to zero. Set by a finished pause.
    Drain,
    /// Sequences and boundary rows are written. Set by a finished drain.
    Decide,
    /// The decision has been sent and not been answered. Set immediately before sending.
    Deciding,
    /// The answer was lost. Set by a failed or late answer; ends only when an answer is read.
    InDoubt,
    /// Decided: routes are published, gates opened. Set by reading `decided`.
    Switch,
    /// Everything runs on the other server.
    Switched,
    /// Everything is being undone. Set by an error, a time-out, an order, or by reading `aborted`.
    Aborting,
    /// Everything runs where it ran before.
    Aborted,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A step that can be taken back has ended well.
    StepDone,
    /// The decision is being sent.
    Sent,
    /// The answer did not come.
    AnswerLost,
    /// `decided` was read.
    ReadDecided,
    /// `aborted` was read.
    ReadAborted,
    /// A step failed, a bound was reached, or an operator said so.
    GiveUp,
    /// The last thing to do after a decision, or after giving up, has been done.
    Finished,
}

/// The event cannot happen in this phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cutover in phase {phase:?} cannot take {event:?}")]
pub struct Rejected {
    /// Where the cutover stands.
    pub phase: Phase,
    /// What was reported.
    pub event: Event,
}

impl Phase {
    /// All phases, for tables.
    pub const ALL: [Self; 10] = [
        Self::Prepare,
        Self::Pause,
        Self::Drain,
        Self::Decide,
        Self::Deciding,
        Self::InDoubt,
        Self::Switch,
        Self::Switched,
        Self::Aborting,
        Self::Aborted,
    ];

    /// Name as in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Pause => "pause",
            Self::Drain => "drain",
            Self::Decide => "decide",
            Self::Deciding => "deciding",
            Self::InDoubt => "in-doubt",
            Self::Switch => "switch",
            Self::Switched => "switched",
            Self::Aborting => "aborting",
            Self::Aborted => "aborted",
        }
    }

    /// Whether the cutover has ended.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Switched | Self::Aborted)
    }

    /// Whether giving up is still this coordinator's choice.
    pub fn may_give_up(self) -> bool {
        match self {
            Self::Prepare | Self::Pause | Self::Drain | Self::Decide => true,
            Self::Deciding | Self::InDoubt | Self::Switch | Self::Switched | Self::Aborting | Self::Aborted => false,
        }
    }

    /// The phase after `event`.
    pub fn after(self, event: Event) -> Result<Self, Rejected> {
        let next = match (self, event) {
            (Self::Prepare, Event::StepDone) => Self::Pause,
            (Self::Pause, Event::StepDone) => Self::Drain,
            (Self::Drain, Event::StepDone) => Self::Decide,
            (Self::Decide, Event::Sent) => Self::Deciding,
            (Self::Deciding, Event::AnswerLost) => Self::InDoubt,
            (Self::Deciding | Self::InDoubt, Event::ReadDecided) => Self::Switch,
            (Self::Deciding | Self::InDoubt, Event::ReadAborted) => Self::Aborting,
            (Self::Prepare | Self::Pause | Self::Drain | Self::Decide, Event::GiveUp) => Self::Aborting,
            (Self::Switch, Event::Finished) => Self::Switched,
            (Self::Aborting, Event::Finished) => Self::Aborted,
            (phase, event) => return Err(Rejected { phase, event }),
        };
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 7] = [
        Event::StepDone,
        Event::Sent,
        Event::AnswerLost,
        Event::ReadDecided,
        Event::ReadAborted,
        Event::GiveUp,
        Event::Finished,
    ];

    /// Every phase against every event; what is not listed is rejected.
    const TABLE: &str = "\
prepare StepDone pause
prepare GiveUp aborting
pause StepDone drain
pause GiveUp aborting
drain StepDone decide
drain GiveUp aborting
decide Sent deciding
decide GiveUp aborting
deciding AnswerLost in-doubt
deciding ReadDecided switch
deciding ReadAborted aborting
in-doubt ReadDecided switch
in-doubt ReadAborted aborting
switch Finished switched
aborting Finished aborted
";

    #[test]
    fn every_phase_meets_every_event() {
        let mut found = String::new();
        for phase in Phase::ALL {
            for event in EVENTS {
                if let Ok(next) = phase.after(event) {
                    found.push_str(&format!("{} {event:?} {}\n", phase.as_str(), next.as_str()));
                }
                assert_eq!(phase.after(Event::GiveUp).is_ok(), phase.may_give_up());
            }
        }
        assert_eq!(found, TABLE);
    }
}
