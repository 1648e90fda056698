//! How long the answers of writing transactions are held back, while a cutover waits for the other server to catch up.
//!
//! A value beside the gate that sessions read with what the server sends, without an order: who sees it late is slowed down
//! late. Nothing rests on it: it must never decide who may pass. Only a cutover that is being prepared sets it, and sets it back.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Database;

impl Database {
    /// Slows writing transactions down by this much each; zero: not at all, and who is held back is let go at once.
    pub fn set_write_delay(&self, delay: Duration) {
        let microseconds = u32::try_from(delay.as_micros()).unwrap_or(u32::MAX);
        let before = self.write_delay_us.swap(microseconds, Ordering::Relaxed);
        if before > 0 && microseconds == 0 {
            self.changed.notify_waiters();
        }
    }

    /// By how much each writing transaction is slowed down now; zero: not at all.
    #[inline]
    pub fn write_delay(&self) -> Duration {
        Duration::from_micros(self.write_delay_us.load(Ordering::Relaxed).into())
    }
}
