//! Slows a session's writes down while a cutover waits for the other server to catch up (`throttle_writes`).
//!
//! The answer to a transaction that has written is held back, after the server has ended it: its locks are free, its
//! connection may serve others, the gate has been left. To the client it is a server that commits slowly, and what it sends
//! meanwhile waits. What has written is told by the server's own words (CommandComplete), so reads are never held back,
//! whatever texts, drivers or prepared statements they come by; writes inside a function that is SELECTed are not seen.
//!
//! While nothing is slowed down this costs a look at two fields for each wake-up of a session and no clock is read. Nothing
//! rests on it: it must never lose or reorder a byte, and whatever ends a session ends the wait.

use std::future::Future as _;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::wire::ledger::TransactionStatus;

/// Commands that write, by the first word of what the server says of them. COPY says its direction beforehand.
const WRITING: [&[u8]; 10] =
    [b"INSERT", b"UPDATE", b"DELETE", b"MERGE", b"TRUNCATE", b"CALL", b"DO", b"CREATE", b"ALTER", b"DROP"];

/// Transactions whose answers are waited for at most, at once: a client that sends many without waiting for any must not be
/// silent for so long that somebody takes it for dead.
const AT_ONCE: u32 = 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Brake {
    /// The transaction that is open has written.
    wrote: bool,
    /// Transactions that have written and ended, and are still to be waited for.
    due: u32,
    /// Until when answers are held back.
    until: Option<Instant>,
    /// Wakes the task then.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Brake {
    /// The server says that a command has been carried out.
    pub(super) fn completed(&mut self, words: &[u8]) {
        self.wrote |= has_written(words);
    }

    /// The client copies rows in.
    pub(super) fn copies_in(&mut self) {
        self.wrote = true;
    }

    /// The server is ready for more. `slows`: whether writes are slowed down at all.
    #[inline]
    pub(super) fn ready(&mut self, status: TransactionStatus, slows: bool) {
        if status == TransactionStatus::Idle && std::mem::take(&mut self.wrote) && slows {
            self.due = (self.due + 1).min(AT_ONCE);
        }
    }

    /// Whether answers may be held back: see [`Brake::holds`]. Nothing of a new transaction is let pass meanwhile.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.due > 0 || self.until.is_some()
    }

    /// Whether answers are held back now; the task is woken when they are not any more. `delay` is that of one transaction.
    pub(super) fn holds(&mut self, delay: Duration, cx: &mut Context<'_>) -> bool {
        while let Some(until) = self.held_until(delay, Instant::now()) {
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            if timer.deadline() != until {
                timer.as_mut().reset(until);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return true;
            }
        }
        self.timer = None;
        false
    }

    /// Until when answers are held back; none: they are not, as of `now`.
    fn held_until(&mut self, delay: Duration, now: Instant) -> Option<Instant> {
        let due = std::mem::take(&mut self.due);
        if due > 0 {
            let begins = self.until.map_or(now, |until| until.max(now));
            self.until = Some((begins + delay * due).min(now + delay * AT_ONCE));
        }
        // Nobody is slowed down any more: who was held back is let go.
        self.until = self.until.filter(|until| !delay.is_zero() && *until > now);
        self.until
    }
}

/// Whether the body of a CommandComplete tells of something written. What has found no row has written nothing.
fn has_written(words: &[u8]) -> bool {
    let words = words.strip_suffix(b"\0").unwrap_or(words);
    let first = words.split(|byte| *byte == b' ').next().unwrap_or_default();
    let is_nothing = words.ends_with(b" 0");
    words == b"COMMIT PREPARED" || WRITING.contains(&first) && !is_nothing
}

#[cfg(test)]
mod tests {
    use super::TransactionStatus::{Idle, InBlock};
    use super::*;

    const DELAY: Duration = Duration::from_millis(50);

    #[test]
    fn what_has_written_is_told_from_what_has_read() {
        for (words, wrote) in [
            (&b"INSERT 0 1\0"[..], true),
            (b"INSERT 0 10\0", true),
            (b"INSERT 0 0\0", false),
            (b"UPDATE 3\0", true),
            (b"UPDATE 0\0", false),
            (b"DELETE 1\0", true),
            (b"MERGE 2\0", true),
            (b"TRUNCATE TABLE\0", true),
            (b"CREATE TABLE\0", true),
            (b"DROP TABLE\0", true),
            (b"DO\0", true),
            (b"CALL\0", true),
            (b"COMMIT PREPARED\0", true),
            (b"SELECT 5\0", false),
            (b"COPY 5\0", false),
            (b"BEGIN\0", false),
            (b"COMMIT\0", false),
            (b"DECLARE CURSOR\0", false),
            (b"SET\0", false),
            (b"", false),
        ] {
            assert_eq!(has_written(words), wrote, "{:?}", String::from_utf8_lossy(words));
        }
    }

    #[test]
    fn the_answer_to_a_transaction_that_wrote_is_held_back_and_no_other() {
        let (mut brake, now) = (Brake::default(), Instant::now());
        brake.completed(b"SELECT 1\0");
        brake.ready(Idle, true);
        assert!(!brake.is_on(), "a read");
        brake.completed(b"INSERT 0 1\0");
        brake.ready(InBlock, true);
        assert!(!brake.is_on(), "its transaction goes on");
        brake.completed(b"SELECT 1\0");
        brake.completed(b"COMMIT\0");
        brake.ready(Idle, true);
        assert!(brake.is_on());
        assert_eq!(brake.held_until(DELAY, now), Some(now + DELAY));
        assert_eq!(brake.held_until(DELAY, now + DELAY / 2), Some(now + DELAY));
        assert!(brake.held_until(DELAY, now + DELAY).is_none() && !brake.is_on());
        brake.copies_in();
        brake.ready(Idle, true);
        assert_eq!(brake.held_until(DELAY, now), Some(now + DELAY));
        assert!(brake.held_until(Duration::ZERO, now).is_none() && !brake.is_on(), "let go at once");
        // What was written before counts for nothing later.
        brake.completed(b"INSERT 0 1\0");
        brake.ready(Idle, false);
        brake.ready(Idle, true);
        assert!(!brake.is_on());
    }

    #[test]
    fn transactions_that_end_together_are_waited_for_one_by_one_up_to_a_bound() {
        let (mut brake, now) = (Brake::default(), Instant::now());
        let wrote = |brake: &mut Brake, times| {
            for _ in 0..times {
                brake.completed(b"UPDATE 1\0");
                brake.ready(Idle, true);
            }
        };
        wrote(&mut brake, 2);
        assert_eq!(brake.held_until(DELAY, now), Some(now + DELAY * 2));
        wrote(&mut brake, 1);
        assert_eq!(brake.held_until(DELAY, now + DELAY), Some(now + DELAY * 3));
        wrote(&mut brake, 1000);
        assert_eq!(brake.held_until(DELAY, now + DELAY), Some(now + DELAY * (1 + AT_ONCE)));
        wrote(&mut brake, 1000);
        assert_eq!(brake.held_until(DELAY, now + DELAY), Some(now + DELAY * (1 + AT_ONCE)));
    }
}
