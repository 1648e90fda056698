//! Turns in which sessions open the backend that they move to.
//!
//! Starting a backend costs the server that a cutover leads to a few milliseconds of a processor, and reading a session's
//! state costs the one that it leaves as much; all at once they would be felt by every client. So a few go at a time while
//! clients run, and nobody waits in the pause. A turn must never be waited for inside a gate that a pause waits for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// At least so many at a time.
const FEWEST_AT_ONCE: usize = 2;

/// One more at a time for each so many sessions. Where the processors are busy more at a time are ready no sooner, and are
/// felt; this is for servers that are far away.
const SESSIONS_PER_TURN: usize = 256;

/// Nobody has to wait.
const UNLIMITED: usize = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Turns(Mutex<Arc<Semaphore>>);

/// Somebody's turn; over when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
}

impl Default for Turns {
    fn default() -> Self {
        Self(Mutex::new(Arc::new(Semaphore::new(UNLIMITED))))
    }
}

impl Turns {
    /// So many sessions are about to be asked, while clients run.
    pub(super) fn begin(&self, sessions: usize) {
        let at_once = (sessions / SESSIONS_PER_TURN).max(FEWEST_AT_ONCE);
        *self.lock() = Arc::new(Semaphore::new(at_once));
    }

    /// The pause: who has not had a turn yet goes at once.
    pub(super) fn hurry(&self) {
        self.lock().add_permits(UNLIMITED);
    }

    /// Nobody moves any more: who waits gets no turn.
    pub(super) fn give_up(&self) {
        let fresh = Arc::new(Semaphore::new(UNLIMITED));
        std::mem::replace(&mut *self.lock(), fresh).close();
    }

    /// Waits for a turn; none: it was given up.
    pub(super) async fn next(&self) -> Option<Turn> {
        let turns = self.lock().clone();
        turns.acquire_owned().await.ok().map(|permit| Turn { _permit: permit })
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Semaphore>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn few_go_at_a_time_until_the_pause_and_nobody_once_it_was_given_up() {
        let turns = Turns::default();
        turns.begin(800);
        let running: Vec<_> = (0..3).map(|_| turns.next().now_or_never().expect("a turn")).collect();
        let mut waiting = Box::pin(turns.next());
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(running);
        assert!(waiting.now_or_never().flatten().is_some());

        turns.begin(1);
        let _running = [turns.next().now_or_never(), turns.next().now_or_never()];
        let mut waiting = Box::pin(turns.next());
        assert!(waiting.as_mut().now_or_never().is_none());
        turns.hurry();
        assert!(waiting.now_or_never().flatten().is_some());

        turns.begin(1);
        let _running = [turns.next().now_or_never(), turns.next().now_or_never()];
        let mut waiting = Box::pin(turns.next());
        assert!(waiting.as_mut().now_or_never().is_none());
        turns.give_up();
        assert!(waiting.now_or_never().expect("an answer").is_none());
        assert!(turns.next().now_or_never().flatten().is_some(), "late ones are not held up");
    }
}
