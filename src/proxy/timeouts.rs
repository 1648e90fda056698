//! Time-outs of sessions, found by one sweep of each worker over its sessions.
//!
//! There is no timer for a session and no clock is read for a message. Where a time-out is on, the sweep looks at the
//! states that sessions keep anyway and asks those to look at themselves that may be over; a session alone knows
//! whether its statement runs or its transaction is idle. Between two sweeps it sleeps, unless the time-outs are others
//! now; with every time-out off it does nothing at all.
//!
//! A step is a tenth of the shortest time-out. None fires early: what the sweep did not see begin counts from the
//! first look. Each fires at most two steps late.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::client_error::ClientError;
use super::entry::{Entry, Order, SessionState};
use super::session::{End, Place, Session};
use super::worker::Worker;
use crate::config::Limits;
use crate::config::limits::Timeouts;

/// Bounds of a step. The longer one keeps thousands of idle sessions from costing anything.
const SHORTEST_STEP: Duration = Duration::from_millis(10);
const LONGEST_STEP: Duration = Duration::from_secs(10);
/// A statement that was cancelled because of `query_timeout` has so long to end; then the session ends.
const CANCEL_GRACE: Duration = Duration::from_secs(30);

/// What a session was seen doing inside a transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Tells one statement, or the idle time after one, from the next.
    turn: u32,
    running: bool,
    since: Instant,
    cancelled: bool,
}

/// Looks after the sessions of one worker until it is dropped.
pub(super) async fn sweep(worker: Rc<Worker>) {
    let mut changed = worker.shared.limits_changed.subscribe();
    let mut last = tokio::time::Instant::now();
    loop {
        // Marked as seen before they are read, so that no change falls between.
        changed.mark_unchanged();
        let limits = worker.shared.limits.load_full();
        let shortest = limits.shortest_timeouts();
        let step = step(&shortest);
        tokio::select! {
            // None loses anything when it is dropped: they only wait. The sender lives as long as the worker.
            _ = changed.changed() => continue,
            () = tokio::time::sleep_until(last + step.unwrap_or_default()), if step.is_some() => {}
        }
        let step = step.unwrap_or_default();
        last = tokio::time::Instant::now();
        let now = Instant::now();
        worker.each_entry(|entry| {
            if is_due(entry, &limits, &shortest, step, now) {
                entry.order(Order::Look);
            }
        });
    }
}

fn step(shortest: &Timeouts) -> Option<Duration> {
    shortest.shortest().map(|shortest| (shortest / 10).clamp(SHORTEST_STEP, LONGEST_STEP))
}

pub(super) fn has_passed(timeout: Duration, time: Duration) -> bool {
    !timeout.is_zero() && time >= timeout
}

/// Whether a session should look at itself. The cheap question first: most are not near any time-out.
fn is_due(entry: &Entry, limits: &Limits, shortest: &Timeouts, step: Duration, now: Instant) -> bool {
    let (in_state, connected) = entry.ages(now);
    let own = || entry.timeouts(limits);
    match entry.state() {
        SessionState::Idle => {
            (has_passed(shortest.idle, in_state) && has_passed(own().idle, in_state))
                || (has_passed(shortest.lifetime, connected) && has_passed(own().lifetime, connected))
        }
        SessionState::Held => has_passed(shortest.query_wait, in_state) && has_passed(own().query_wait, in_state),
        // What began after the last sweep can wait for the next one.
        SessionState::Active | SessionState::Reading => {
            let (query, idle, whole) = (shortest.query, shortest.idle_transaction, shortest.transaction);
            in_state >= step && !(query.is_zero() && idle.is_zero() && whole.is_zero())
        }
        // Waiting for a connection has a bound of the pool's own.
        SessionState::Login | SessionState::Waiting | SessionState::Orphan | SessionState::Replication => false,
    }
}

/// What a session inside a transaction is doing.
pub(super) struct Inside {
    pub(super) entered: Instant,
    /// Which statement it was then.
    pub(super) entered_turn: u32,
    pub(super) turn: u32,
    /// A statement runs; otherwise the transaction is idle.
    pub(super) is_running: bool,
    /// The client has not read everything yet: it is slow, not idle.
    pub(super) has_unread: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    /// The statement is to be cancelled.
    Cancel,
}

impl Inside {
    /// Looks whether a time-out has passed. `seen` is what was seen at the last look.
    pub(super) fn look(&self, seen: &mut Option<Seen>, timeouts: &Timeouts, now: Instant) -> Result<Due, End> {
        if has_passed(timeouts.transaction, now - self.entered) {
            return Err(End::Told(ClientError::TransactionTimeout));
        }
        let (turn, running) = (self.turn, self.is_running);
        let current = match *seen {
            Some(seen) if seen.turn == turn && seen.running == running => seen,
            // The first statement has begun when the transaction did; of any other the begin was not seen.
            Some(_) | None => {
                let since = if running && turn == self.entered_turn { self.entered } else { now };
                Seen { turn, running, since, cancelled: false }
            }
        };
        *seen = Some(current);
        let time = now - current.since;
        if !running {
            let over = has_passed(timeouts.idle_transaction, time) && !self.has_unread;
            return if over { Err(End::Told(ClientError::IdleTransactionTimeout)) } else { Ok(Due::Nothing) };
        }
        if !has_passed(timeouts.query, time) {
            return Ok(Due::Nothing);
        }
        if !current.cancelled {
            *seen = Some(Seen { cancelled: true, ..current });
            return Ok(Due::Cancel);
        }
        if time >= timeouts.query + CANCEL_GRACE {
            return Err(End::Told(ClientError::QueryTimeout));
        }
        Ok(Due::Nothing)
    }
}

/// The same for a session outside. A client that has not read everything yet is slow, not idle.
pub(super) fn look_outside(entry: &Entry, has_unread: bool, timeouts: &Timeouts, now: Instant) -> Result<(), End> {
    let (idle, connected) = entry.ages(now);
    if has_unread {
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

impl Session {
    /// Looks whether a time-out has passed, and does what belongs to it.
    pub(super) fn look(&mut self) -> Result<(), End> {
        if self.member.is_none() {
            return Ok(());
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_a_tenth_of_the_shortest_time_out_within_bounds() {
        let of = |idle_ms, query_ms| {
            let (idle, query) = (Duration::from_millis(idle_ms), Duration::from_millis(query_ms));
            step(&Timeouts { idle, query, ..Timeouts::default() })
        };
        assert_eq!(of(0, 0), None);
        assert_eq!(of(5_000, 0), Some(Duration::from_millis(500)));
        assert_eq!(of(60_000, 20), Some(SHORTEST_STEP));
        assert_eq!(of(60_000, 0), Some(Duration::from_secs(6)));
        assert_eq!(of(600_000, 0), Some(LONGEST_STEP));
    }
}
