//! Time-outs of a pooled session: what [`crate::proxy::timeouts`] says of every session, where this one keeps it.

use std::time::Instant;

use super::{Place, PooledSession};
use crate::proxy::session::End;
use crate::proxy::timeouts::{Due, Inside, has_passed, look_outside};

impl PooledSession {
    /// Looks whether a time-out has passed, and does what belongs to it.
    pub(super) fn look(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let timeouts = self.worker.shared.limits.load().timeouts_of(&self.login.user, &self.login.database);
        let has_unread = !self.down.buffer.is_empty();
        match self.place {
            Place::Outside => look_outside(&self.entry, has_unread, &timeouts, now),
            Place::Held { since } => {
                if has_passed(timeouts.query_wait, now - since) && !self.local.database.is_fenced_by_cutover() {
                    (self.waited_too_long, self.cancelled) = (true, true);
                }
                Ok(())
            }
            // The pool has a bound of its own.
            Place::Waiting { .. } => Ok(()),
            Place::Inside { since } => {
                let inside = Inside {
                    entered: since,
                    entered_turn: self.entered_turn,
                    turn: self.ledger.readies(),
                    is_running: self.ledger.awaits_ready() || self.ledger.server_waits(),
                    has_unread,
                };
                if inside.look(&mut self.seen, &timeouts, now)? == Due::Cancel {
                    tracing::info!(session = self.entry.id(), "query_timeout: the statement is cancelled");
                    self.cancel_on_server(None);
                }
                Ok(())
            }
        }
    }
}
