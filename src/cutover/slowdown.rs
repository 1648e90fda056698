//! Slows writes down while a cutover is prepared and the other server is too far behind (`throttle_writes`), so that the lag
//! comes below what a pause can take.
//!
//! ```text
//! delay of each writing transaction
//!   throttle_writes |          ________     as long as the cutover is prepared, and not beyond:
//!                   |        /              it ends with the pause, with an abort, with whatever ends the cutover
//!                 0 |______/
//!                          ½  1             lag, in parts of max_lag_at_start
//! ```
//!
//! It follows the lag as it is measured. One that is not known is neither zero nor large: the delay stays what it was, and a
//! cutover that cannot learn its lag is refused in time, which ends it. It is nobody's guardrail: the proxy may heed it late.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::parts::Lease;
use super::work::{CutoverOptions, Work};
use crate::switch::Database;

/// Between two looks at the lag, which is measured twice a second.
const STEP: Duration = Duration::from_millis(250);

/// Keeps the delay right as long as it is polled; there is none any more when it is dropped.
pub(super) struct Slowdown {
    law: Law,
    migration: String,
    gates: Vec<Arc<Database>>,
    lease: Arc<dyn Lease>,
    slowed: Arc<Slowed>,
    delay: Duration,
}

/// What a slowdown has come to, for the report.
#[derive(Debug, Default)]
pub(super) struct Slowed {
    largest_us: AtomicU64,
}

impl Slowed {
    /// The largest delay that there was; none: there was none.
    pub(super) fn largest(&self) -> Option<Duration> {
        Some(Duration::from_micros(self.largest_us.load(Ordering::Relaxed))).filter(|largest| !largest.is_zero())
    }
}

/// How long a delay belongs to a lag.
#[derive(Clone, Copy, Debug)]
struct Law {
    /// Zero: nothing is slowed down.
    largest: Duration,
    /// A lag with which the cutover goes on.
    allowed_bytes: u64,
}

impl Law {
    fn of(options: &CutoverOptions) -> Self {
        Self { largest: options.throttle_writes, allowed_bytes: options.max_lag_at_start_bytes }
    }

    /// Nothing up to half of what is allowed, then more with every byte, and everything from there on.
    fn delay(&self, lag_bytes: u64) -> Duration {
        let begins = self.allowed_bytes / 2;
        let above = lag_bytes.saturating_sub(begins);
        let whole = (self.allowed_bytes - begins).max(1);
        self.largest.mul_f64((above as f64 / whole as f64).min(1.0))
    }
}

impl Slowdown {
    pub(super) fn of(work: &Work) -> Self {
        Self {
            law: Law::of(&work.options),
            migration: work.case.migration.clone(),
            gates: work.lines.iter().map(|line| line.gate.clone()).collect(),
            lease: work.lease.clone(),
            slowed: work.slowed.clone(),
            delay: Duration::ZERO,
        }
    }

    /// Goes on until `step` has ended.
    pub(super) async fn beside<T>(self, step: impl Future<Output = T>) -> T {
        tokio::select! {
            // Dropping the slowdown is how it ends; the step is polled first, and is over when it is dropped.
            biased;
            done = step => done,
            never = self.run() => match never {},
        }
    }

    async fn run(mut self) -> Infallible {
        if self.law.largest.is_zero() {
            return std::future::pending().await;
        }
        loop {
            if let Some(lag) = self.lease.lag_bytes() {
                self.set(self.law.delay(lag));
            }
            tokio::time::sleep(STEP).await;
        }
    }

    fn set(&mut self, delay: Duration) {
        let before = std::mem::replace(&mut self.delay, delay);
        if before == delay {
            return;
        }
        let migration = &self.migration;
        match (before.is_zero(), delay.is_zero()) {
            (true, _) => tracing::info!(migration, ?delay, "writes are slowed down until the lag is small"),
            (_, true) => tracing::info!(migration, "writes are not slowed down any more"),
            _ => tracing::debug!(migration, ?delay, "writes are slowed down"),
        }
        self.gates.iter().for_each(|gate| gate.set_write_delay(delay));
        let microseconds = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.slowed.largest_us.fetch_max(microseconds, Ordering::Relaxed);
    }
}

impl Drop for Slowdown {
    fn drop(&mut self) {
        self.set(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_grows_with_the_lag_between_two_bounds() {
        let law = Law { largest: Duration::from_millis(80), allowed_bytes: 1000 };
        let delays = [0, 500, 501, 750, 999, 1000, u64::MAX].map(|lag| law.delay(lag).as_micros());
        assert_eq!(delays, [0, 0, 160, 40_000, 79_840, 80_000, 80_000]);
        // Nothing is allowed: whatever there is, is too much.
        assert_eq!(Law { allowed_bytes: 0, ..law }.delay(0), Duration::ZERO);
        assert_eq!(Law { allowed_bytes: 0, ..law }.delay(1), law.largest);
        assert_eq!(Law { largest: Duration::ZERO, ..law }.delay(u64::MAX), Duration::ZERO);
    }

    /// Clients that each wait for their answers, and a server that applies less than they would write.
    #[test]
    fn a_lag_that_would_grow_for_ever_comes_below_what_is_allowed() {
        let (clients, takes, bytes, applies) = (16.0, 0.001, 1000.0, 2_000_000.0);
        let after = |law: Law| {
            let mut lag = 50_000_000.0_f64;
            for _ in 0..400 {
                let each = takes + law.delay(lag as u64).as_secs_f64();
                let written = clients / each * bytes;
                lag = (lag + (written - applies) * STEP.as_secs_f64()).max(0.0);
            }
            lag
        };
        let law = Law { largest: Duration::from_millis(20), allowed_bytes: 16_000_000 };
        assert!(after(law) < 16_000_000.0, "{}", after(law));
        assert!(after(law) > 8_000_000.0, "no more than is needed: {}", after(law));
        assert!(after(Law { largest: Duration::ZERO, ..law }) > 1_000_000_000.0);
    }
}
