//! The life of a migration as a pure machine: what may follow what, and what has to be done about it.
//!
//! ```text
//! PerformingPreRequisiteSteps → ValidationInProgress → MigratingData → WaitingForCutoverTrigger ⇄ CompletingMigration
//!            ↑  └──────────────┬──────┴───────────────────┴──┬───────────────┘                        ↓
//!            └─── retry ── ValidationFailed, Failed ──── cancel ──→ Cancelling → Cancelled          Completed ⇄ RollingBack
//!                                                                                                    ↓            ↓
//!                                                                                  Closed ← Closing ─┘  WaitingForCutoverTrigger
//! ```
//!
//! The databases run on the target from Completed on, and on the source again when a rollback has led back to
//! WaitingForCutoverTrigger; it may go on like this as often as wanted, until `complete` closes the migration.
//!
//! No sockets, no clock, no tokio. Every pair of state and event is in `state_table.txt`, which a test compares with
//! this file; there is no catch-all arm, so a new state or event does not compile until every pair has been thought of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::catalog::streams::Direction;

/// Where a migration stands. The pair of names that operators see is [`State::name`] and [`State::substate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// Set by `create` and `retry`: both servers are reached, the control schema is made.
    PerformingPreRequisiteSteps,
    /// Set by the worker: the rules of the premigration validation run.
    ValidationInProgress,
    /// Set by the worker: schema, full load, indexes, catching up.
    MigratingData,
    /// Set by the worker once everything is copied and streams: ready to cut over.
    WaitingForCutoverTrigger,
    /// Set by the cutover when it begins. Only the cutover's verdict leaves this state.
    CompletingMigration,
    /// Set by the cutover's decision, by an offline migration's end, or by a passed validation that was all that was asked.
    /// After a cutover what is written on the target goes back to the source, and it can be rolled back.
    Completed,
    /// Set by the rollback when it begins. Only its verdict leaves this state.
    RollingBack,
    /// Set by `complete`: the stream back is being removed. A restart goes on removing.
    Closing,
    /// Set once that is done: there is no way back.
    Closed,
    /// Set by the worker: a rule failed. Nothing was copied.
    ValidationFailed,
    /// Set by the worker: it cannot go on by itself. What was made stays, for `retry` or `cancel`.
    Failed,
    /// Set by `cancel`: what was made is being removed. A restart goes on removing.
    Cancelling,
    /// Set once nothing of ours is left but what is listed.
    Cancelled,
}

/// What can happen to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Both servers were reached and the control schema is there.
    PrerequisitesMet,
    /// No rule failed, and data is to be migrated.
    ValidationPassed,
    /// No rule failed, and nothing more was asked.
    ValidatedOnly,
    /// A rule failed.
    ValidationRejected,
    /// Every table is copied, every hand-over position is passed, the lag is small.
    CaughtUp,
    /// The consistent copy of an offline migration is complete.
    CopiedOffline,
    /// A cutover wants the migration for itself.
    CutoverBegun,
    /// The cutover or rollback has the decision 'aborted' on record, or never fenced anything.
    CutoverAborted,
    /// The cutover or rollback has the decision 'decided' on record.
    CutoverDecided,
    /// A rollback wants the migration for itself.
    RollbackBegun,
    /// An operator needs no way back any more.
    CompleteAsked,
    /// The worker cannot go on.
    WorkFailed,
    /// An operator says that the reason is mended.
    RetryAsked,
    /// An operator gives up.
    CancelAsked,
    /// Everything in the journal was removed, or is listed as left.
    Undone,
}

impl Event {
    /// What an operator can order.
    const ORDERS: [Self; 5] =
        [Self::CutoverBegun, Self::RollbackBegun, Self::CompleteAsked, Self::RetryAsked, Self::CancelAsked];

    /// What somebody wants to do who brings it about, as a person says it.
    fn deed(self) -> &'static str {
        match self {
            Self::PrerequisitesMet => "begin the validation",
            Self::ValidationPassed => "begin to copy",
            Self::ValidatedOnly => "end after its validation",
            Self::ValidationRejected => "end because of its validation",
            Self::CaughtUp => "call it ready to cut over",
            Self::CopiedOffline => "end after its copy",
            Self::CutoverBegun => "cut over",
            Self::CutoverAborted => "take a cutover back",
            Self::CutoverDecided => "end a cutover",
            Self::RollbackBegun => "roll back",
            Self::CompleteAsked => "complete",
            Self::WorkFailed => "let it fail",
            Self::RetryAsked => "retry",
            Self::CancelAsked => "cancel",
            Self::Undone => "end the removal of what it made",
        }
    }
}

/// What can be ordered in `state`, for who has ordered something else.
fn possible(state: State) -> String {
    let orders: Vec<&str> =
        Event::ORDERS.into_iter().filter(|order| transition(state, *order).is_ok()).map(Event::deed).collect();
    match orders.as_slice() {
        [] => "nothing can be ordered now".to_owned(),
        orders => format!("possible now: {}", orders.join(", ")),
    }
}

/// What the driver must do after a transition was made durable, in order. Every effect can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Start the worker; it finds out from the catalogue what is already done.
    StartWork,
    /// Stop the worker and wait until it has ended.
    StopWork,
    /// Remove everything that the journal names.
    Undo,
    /// Make the streams fit the state: the one that was prepared by a decided cutover becomes the current one, and every
    /// other slot and publication is dropped, because a slot that nobody reads keeps its WAL for ever.
    Align,
    /// Drop every stream.
    EndStreams,
    /// Do nothing until the cutover's verdict is known.
    AwaitVerdict,
}

/// The event has no place in the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {}: the migration is {state}; {}", event.deed(), possible(*state))]
pub struct Rejected {
    /// Where the migration stands.
    pub state: State,
    /// What was asked of it.
    pub event: Event,
}

/// The state after `event`, and what has to be done then.
#[deny(clippy::wildcard_enum_match_arm)]
pub fn transition(state: State, event: Event) -> Result<(State, Vec<Effect>), Rejected> {
    use Effect as F;
    use Event as E;
    use State as S;
    let rejected = Err(Rejected { state, event });
    match state {
        S::PerformingPreRequisiteSteps => match event {
            E::PrerequisitesMet => Ok((S::ValidationInProgress, vec![])),
            E::WorkFailed => Ok((S::Failed, vec![F::StopWork])),
            E::CancelAsked => Ok((S::Cancelling, vec![F::StopWork, F::Undo])),
            E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::CompleteAsked
            | E::RetryAsked
            | E::Undone => rejected,
        },
        S::ValidationInProgress => match event {
            E::ValidationPassed => Ok((S::MigratingData, vec![])),
            E::ValidatedOnly => Ok((S::Completed, vec![F::StopWork])),
            E::ValidationRejected => Ok((S::ValidationFailed, vec![F::StopWork])),
            E::WorkFailed => Ok((S::Failed, vec![F::StopWork])),
            E::CancelAsked => Ok((S::Cancelling, vec![F::StopWork, F::Undo])),
            E::PrerequisitesMet
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::CompleteAsked
            | E::RetryAsked
            | E::Undone => rejected,
        },
        S::MigratingData => match event {
            E::CaughtUp => Ok((S::WaitingForCutoverTrigger, vec![])),
            E::CopiedOffline => Ok((S::Completed, vec![F::StopWork, F::Align])),
            E::WorkFailed => Ok((S::Failed, vec![F::StopWork])),
            E::CancelAsked => Ok((S::Cancelling, vec![F::StopWork, F::Undo])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::CompleteAsked
            | E::RetryAsked
            | E::Undone => rejected,
        },
        S::WaitingForCutoverTrigger => match event {
            E::CutoverBegun => Ok((S::CompletingMigration, vec![])),
            E::WorkFailed => Ok((S::Failed, vec![F::StopWork])),
            E::CancelAsked => Ok((S::Cancelling, vec![F::StopWork, F::Undo])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::CompleteAsked
            | E::RetryAsked
            | E::Undone => rejected,
        },
        // A worker that fails here is told to the cutover, which aborts: failing the migration by ourselves would take
        // the ground from under a decision that may already be on its way.
        S::CompletingMigration => match event {
            E::CutoverAborted => Ok((S::WaitingForCutoverTrigger, vec![F::StartWork, F::Align])),
            E::CutoverDecided => Ok((S::Completed, vec![F::StopWork, F::Align, F::StartWork])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::RollbackBegun
            | E::CompleteAsked
            | E::WorkFailed
            | E::RetryAsked
            | E::CancelAsked
            | E::Undone => rejected,
        },
        S::Completed => match event {
            E::RollbackBegun => Ok((S::RollingBack, vec![])),
            // Asked by an operator who has mended what kept the stream back from flowing.
            E::RetryAsked => Ok((S::Completed, vec![F::StopWork, F::Align, F::StartWork])),
            E::CompleteAsked => Ok((S::Closing, vec![F::StopWork, F::EndStreams])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::WorkFailed
            | E::CancelAsked
            | E::Undone => rejected,
        },
        // As in CompletingMigration.
        S::RollingBack => match event {
            E::CutoverAborted => Ok((S::Completed, vec![F::StartWork, F::Align])),
            E::CutoverDecided => Ok((S::WaitingForCutoverTrigger, vec![F::StopWork, F::Align, F::StartWork])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::RollbackBegun
            | E::CompleteAsked
            | E::WorkFailed
            | E::RetryAsked
            | E::CancelAsked
            | E::Undone => rejected,
        },
        S::Closing => match event {
            // Asked again because a server could not be reached the first time.
            E::CompleteAsked => Ok((S::Closing, vec![F::EndStreams])),
            E::Undone => Ok((S::Closed, vec![])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::WorkFailed
            | E::RetryAsked
            | E::CancelAsked => rejected,
        },
        S::ValidationFailed | S::Failed => match event {
            E::RetryAsked => Ok((S::PerformingPreRequisiteSteps, vec![F::StartWork])),
            E::CancelAsked => Ok((S::Cancelling, vec![F::StopWork, F::Undo])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::CompleteAsked
            | E::WorkFailed
            | E::Undone => rejected,
        },
        S::Cancelling => match event {
            // Asked again because a server could not be reached the first time.
            E::CancelAsked => Ok((S::Cancelling, vec![F::Undo])),
            E::Undone => Ok((S::Cancelled, vec![])),
            E::PrerequisitesMet
            | E::ValidationPassed
            | E::ValidatedOnly
            | E::ValidationRejected
            | E::CaughtUp
            | E::CopiedOffline
            | E::CutoverBegun
            | E::CutoverAborted
            | E::CutoverDecided
            | E::RollbackBegun
            | E::CompleteAsked
            | E::WorkFailed
            | E::RetryAsked => rejected,
        },
        S::Closed | S::Cancelled => rejected,
    }
}

/// What a restart does with a migration that stands in `state`.
#[deny(clippy::wildcard_enum_match_arm)]
pub fn resume(state: State) -> Vec<Effect> {
    match state {
        State::PerformingPreRequisiteSteps | State::ValidationInProgress | State::MigratingData => {
            vec![Effect::StartWork]
        }
        State::CompletingMigration | State::RollingBack => vec![Effect::AwaitVerdict],
        // The process may have ended between the verdict and what follows from it.
        State::WaitingForCutoverTrigger | State::Completed => vec![Effect::Align, Effect::StartWork],
        State::Closing => vec![Effect::EndStreams],
        State::Cancelling => vec![Effect::Undo],
        State::ValidationFailed | State::Failed | State::Cancelled | State::Closed => vec![],
    }
}

impl State {
    /// Every state, in the order of a migration's life.
    pub const ALL: [Self; 13] = [
        Self::PerformingPreRequisiteSteps,
        Self::ValidationInProgress,
        Self::MigratingData,
        Self::WaitingForCutoverTrigger,
        Self::CompletingMigration,
        Self::Completed,
        Self::RollingBack,
        Self::Closing,
        Self::Closed,
        Self::ValidationFailed,
        Self::Failed,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// The state that users of the managed services know.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerformingPreRequisiteSteps
            | Self::ValidationInProgress
            | Self::MigratingData
            | Self::CompletingMigration
            | Self::RollingBack
            | Self::Cancelling => "InProgress",
            Self::WaitingForCutoverTrigger => "WaitingForUserAction",
            Self::Completed | Self::Closing | Self::Closed => "Succeeded",
            Self::ValidationFailed => "ValidationFailed",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
        }
    }

    /// The substate; also the text in the catalogue.
    pub fn substate(self) -> &'static str {
        match self {
            Self::PerformingPreRequisiteSteps => "PerformingPreRequisiteSteps",
            Self::ValidationInProgress => "ValidationInProgress",
            Self::MigratingData => "MigratingData",
            Self::WaitingForCutoverTrigger => "WaitingForCutoverTrigger",
            Self::CompletingMigration => "CompletingMigration",
            Self::Completed => "Completed",
            Self::RollingBack => "RollingBack",
            Self::Closing => "Closing",
            Self::Closed => "Closed",
            Self::ValidationFailed => "ValidationFailed",
            Self::Failed => "Failed",
            Self::Cancelling => "Cancelling",
            Self::Cancelled => "Cancelled",
        }
    }

    /// Which way the changes flow in this state.
    pub fn direction(self) -> Direction {
        match self {
            Self::PerformingPreRequisiteSteps
            | Self::ValidationInProgress
            | Self::MigratingData
            | Self::WaitingForCutoverTrigger
            | Self::CompletingMigration
            | Self::ValidationFailed
            | Self::Failed
            | Self::Cancelling
            | Self::Cancelled => Direction::Forward,
            Self::Completed | Self::RollingBack | Self::Closing | Self::Closed => Direction::Reverse,
        }
    }

    /// Whether work may still be going on: what `list --filter active` shows.
    pub fn is_active(self) -> bool {
        match self {
            Self::PerformingPreRequisiteSteps
            | Self::ValidationInProgress
            | Self::MigratingData
            | Self::WaitingForCutoverTrigger
            | Self::CompletingMigration
            | Self::RollingBack
            | Self::Closing
            | Self::Cancelling => true,
            Self::Completed | Self::Closed | Self::ValidationFailed | Self::Failed | Self::Cancelled => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.substate())
    }
}

/// The catalogue holds a state this program does not know: it was written by a newer one.
#[derive(Debug, thiserror::Error)]
#[error("unknown migration state {0:?}")]
pub struct UnknownState(String);

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|state| state.substate() == text).ok_or_else(|| UnknownState(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 15] = [
        Event::PrerequisitesMet,
        Event::ValidationPassed,
        Event::ValidatedOnly,
        Event::ValidationRejected,
        Event::CaughtUp,
        Event::CopiedOffline,
        Event::CutoverBegun,
        Event::CutoverAborted,
        Event::CutoverDecided,
        Event::RollbackBegun,
        Event::CompleteAsked,
        Event::WorkFailed,
        Event::RetryAsked,
        Event::CancelAsked,
        Event::Undone,
    ];

    fn table() -> String {
        let mut lines = Vec::new();
        for state in State::ALL {
            for event in EVENTS {
                let result = match transition(state, event) {
                    Ok((to, effects)) => format!("{to} {effects:?}"),
                    Err(_) => "-".to_owned(),
                };
                lines.push(format!("{:<28}{:<20}{result}", state.to_string(), format!("{event:?}")));
            }
            lines.push(format!("{:<28}{:<20}{:?}", state.to_string(), "(restart)", resume(state)));
        }
        lines.join("\n") + "\n"
    }

    #[test]
    fn every_state_times_every_event_is_as_committed() {
        assert_eq!(table(), include_str!("state_table.txt"), "the machine and its committed table differ");
    }

    #[test]
    fn what_is_not_possible_is_said_in_the_words_of_orders() {
        let said = |state, event| transition(state, event).expect_err("not possible").to_string();
        let expected = "cannot cut over: the migration is Completed; possible now: roll back, complete, retry";
        assert_eq!(said(State::Completed, Event::CutoverBegun), expected);
        let expected = "cannot retry: the migration is Cancelled; nothing can be ordered now";
        assert_eq!(said(State::Cancelled, Event::RetryAsked), expected);
        for event in EVENTS {
            assert!(!event.deed().contains(char::is_uppercase), "{event:?} is told by the name of its variant");
        }
    }

    #[test]
    fn nothing_leaves_a_final_state_and_names_survive_the_catalogue() {
        for state in State::ALL {
            assert_eq!(state.substate().parse::<State>().expect("known"), state);
        }
        for event in EVENTS {
            assert!(transition(State::Cancelled, event).is_err());
            assert!(transition(State::Closed, event).is_err());
        }
        assert!("Tomorrow".parse::<State>().is_err());
    }
}
