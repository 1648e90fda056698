//! Sessions that a cutover opens in a database before it shuts it, for who comes to work there behind the fence.

use std::sync::{Mutex, PoisonError};

use crate::switch::Epoch;

/// One of them, used once, and only by what that cutover brings: the stream that still runs goes to the other server, and
/// may have to begin again while this is kept.
#[derive(Debug)]
pub struct Reserve<T>(Mutex<Option<(Epoch, T)>>);

impl<T> Default for Reserve<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Reserve<T> {
    /// Keeps it for what begins with this cutover, in place of what was kept.
    pub fn keep(&self, epoch: Epoch, session: T) {
        *self.lock() = Some((epoch, session));
    }

    /// What was kept for what began with this cutover. Anything else stays.
    pub fn take(&self, epoch: Epoch) -> Option<T> {
        self.lock().take_if(|(kept_for, _)| *kept_for == epoch).map(|(_, session)| session)
    }

    /// Closes it.
    pub fn empty(&self) {
        self.lock().take();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Epoch, T)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_it_was_kept_for_takes_it() {
        let reserve = Reserve::default();
        reserve.keep(Epoch(2), "session");
        assert_eq!(reserve.take(Epoch(1)), None);
        assert_eq!(reserve.take(Epoch(2)), Some("session"));
        assert_eq!(reserve.take(Epoch(2)), None);
    }
}
