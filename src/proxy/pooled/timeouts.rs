//! Time-outs of a pooled session: what [`crate::proxy::timeouts`] says of every session, where this one keeps it.

use std::time::Instant;

use super::{Place, PooledSession};
use crate::config::limits::Timeouts;
use crate::proxy::client_error::ClientError;
use crate::proxy::session::End;
use crate::proxy::timeouts::{CANCEL_GRACE, Seen, has_passed};

impl PooledSession {
    /// Looks whether a time-out has passed, and does what belongs to it.
    pub(super) fn look(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let timeouts = self.worker.shared.limits.load().timeouts_of(&self.login.user, &self.login.database);
        match self.place {
            Place::Outside => self.look_outside(&timeouts, now),
            Place::Held { since } => {
                if has_passed(timeouts.query_wait, now - since) && !self.local.database.is_fenced_by_cutover() {
                    self.waited_too_long = true;
                    self.cancelled = true;
                }
                Ok(())
            }
            // The pool has a bound of its own.
            Place::Waiting { .. } => Ok(()),
            Place::Inside { since } if has_passed(timeouts.transaction, now - since) => {
                Err(End::Told(ClientError::TransactionTimeout))
            }
            Place::Inside { since } => self.look_inside(&timeouts, since, now),
        }
    }

    fn look_outside(&self, timeouts: &Timeouts, now: Instant) -> Result<(), End> {
        let (idle, connected) = self.entry.ages(now);
        // A client that has not read everything yet is slow, not idle.
        if !self.down.buffer.is_empty() {
            return Ok(());
        }
        if has_passed(timeouts.idle, idle) {
            return Err(End::Told(ClientError::IdleTimeout));
        }
        if has_passed(timeouts.lifetime, connected) {
            return Err(End::Told(ClientError::LifetimeReached));
        }
        Ok(())
    }

    fn look_inside(&mut self, timeouts: &Timeouts, entered: Instant, now: Instant) -> Result<(), End> {
        let (turn, running) = (self.ledger.readies(), self.ledger.awaits_ready() || self.ledger.server_waits());
        let seen = match self.seen {
            Some(seen) if seen.turn == turn && seen.running == running => seen,
            // The first statement has begun when the transaction did; of any other the begin was not seen.
            Some(_) | None => {
                let since = if running && turn == self.entered_turn { entered } else { now };
                Seen { turn, running, since, cancelled: false }
            }
        };
        self.seen = Some(seen);
        let time = now - seen.since;
        if !running {
            let over = has_passed(timeouts.idle_transaction, time) && self.down.buffer.is_empty();
            return if over { Err(End::Told(ClientError::IdleTransactionTimeout)) } else { Ok(()) };
        }
        if !has_passed(timeouts.query, time) {
            return Ok(());
        }
        if !seen.cancelled {
            tracing::info!(session = self.entry.id(), "query_timeout: the statement is cancelled");
            self.seen = Some(Seen { cancelled: true, ..seen });
            self.cancel_on_server(None);
        } else if time >= timeouts.query + CANCEL_GRACE {
            return Err(End::Told(ClientError::QueryTimeout));
        }
        Ok(())
    }
}
