//! One wait: what becomes of it is decided by two threads, whoever serves the line and whoever waits. Pure.
//!
//! ```text
//! Not ──begin──▶ Since ──call──▶ Called ──end──▶ Ended ──take──▶ Not
//!  ▲               │                │              │
//!  └─────leave─────┴──────leave─────┴────leave─────┘
//! ```
//!
//! Between `call` (whoever serves has taken somebody out of the line) and `end` (it gives what it has) a connection may be
//! made ready for another thread. Who waits may leave in between, because its client cancels or goes away, and may even
//! wait anew. So `end` gives only to who is still called and hands back anything else: what is given to somebody who has
//! left would lie there, lost to all others. Must never drop what it was given while its lock is held.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// See the module. `T`: what a wait comes to.
#[derive(Debug)]
pub(super) struct Wait<T>(Mutex<State<T>>);

#[derive(Debug)]
enum State<T> {
    Not,
    Since(Instant),
    Called,
    Ended(T),
}

impl<T> Default for Wait<T> {
    fn default() -> Self {
        Self(Mutex::new(State::Not))
    }
}

impl<T> Wait<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, state: State<T>) -> State<T> {
        std::mem::replace(&mut *self.state(), state)
    }

    /// Waits from now on. Together with joining the line. Returns what an earlier wait came to, if nobody has taken it.
    #[must_use = "it may be a connection, which others wait for"]
    pub(super) fn begin(&self, now: Instant) -> Option<T> {
        ended(self.replace(State::Since(now)))
    }

    /// Since when it waits, if nobody has called it yet.
    pub(super) fn since(&self) -> Option<Instant> {
        match *self.state() {
            State::Since(since) => Some(since),
            State::Not | State::Called | State::Ended(_) => None,
        }
    }

    /// It has left the line because it is its turn. Together with leaving the line.
    pub(super) fn call(&self) {
        let mut state = self.state();
        if let State::Since(_) = *state {
            *state = State::Called;
        }
    }

    /// What the wait has come to; returned if whoever was called has left meanwhile.
    pub(super) fn end(&self, outcome: T) -> Option<T> {
        let mut state = self.state();
        if let State::Called = *state {
            *state = State::Ended(outcome);
            return None;
        }
        Some(outcome)
    }

    /// What it has come to, once.
    pub(super) fn take(&self) -> Option<T> {
        let mut state = self.state();
        match *state {
            State::Ended(_) => ended(std::mem::replace(&mut *state, State::Not)),
            State::Not | State::Since(_) | State::Called => None,
        }
    }

    /// Waits no more. After leaving the line. Returns what it has come to, if nobody has taken it.
    #[must_use = "it may be a connection, which others wait for"]
    pub(super) fn leave(&self) -> Option<T> {
        ended(self.replace(State::Not))
    }
}

fn ended<T>(state: State<T>) -> Option<T> {
    match state {
        State::Ended(outcome) => Some(outcome),
        State::Not | State::Since(_) | State::Called => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called() -> Wait<u8> {
        let wait = Wait::default();
        assert_eq!(wait.begin(Instant::now()), None);
        wait.call();
        wait
    }

    #[test]
    fn who_waits_is_called_and_takes_what_it_is_given_once() {
        let wait = called();
        assert!(wait.since().is_none());
        assert_eq!(wait.take(), None);
        assert_eq!(wait.end(1), None);
        assert_eq!((wait.take(), wait.take()), (Some(1), None));
    }

    #[test]
    fn who_leaves_after_it_was_called_is_given_nothing() {
        let wait = called();
        assert_eq!(wait.leave(), None);
        assert_eq!(wait.end(1), Some(1));
        assert_eq!(wait.take(), None);
    }

    #[test]
    fn who_leaves_with_something_given_hands_it_back() {
        let wait = called();
        assert_eq!(wait.end(1), None);
        assert_eq!(wait.leave(), Some(1));
        assert_eq!(wait.take(), None);
    }

    #[test]
    fn who_has_come_back_is_not_given_anything_before_it_is_called_again() {
        let wait = called();
        assert_eq!(wait.leave(), None);
        assert_eq!(wait.begin(Instant::now()), None);
        assert_eq!(wait.end(1), Some(1), "it stands in the line once more");
        wait.call();
        // Of two that serve it, one gives.
        assert_eq!((wait.end(2), wait.end(1)), (None, Some(1)));
        assert_eq!(wait.begin(Instant::now()), Some(2));
    }
}
