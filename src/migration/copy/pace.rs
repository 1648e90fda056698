//! How fast rows may be read from the source: a limit in bytes per second, and a halt while its standbys are behind.
//!
//! Both are lifted when the source runs short of room for its write-ahead log: what its replication slot keeps can only be
//! given up after the copy, so going slower then would make things worse.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// What is read without a wait after a time of rest.
const BURST: Duration = Duration::from_millis(100);

/// Why the copy goes as it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::migration) enum Traffic {
    /// As fast as the limit allows.
    #[default]
    Limited,
    /// Not at all: the source's standbys are behind.
    Halted,
    /// As fast as both servers can.
    Unlimited,
}

/// Shared by everybody who copies.
#[derive(Debug)]
pub(in crate::migration) struct Pace {
    bytes_per_second: Option<u64>,
    traffic: watch::Sender<Traffic>,
    bucket: Mutex<Option<Bucket>>,
}

impl Pace {
    /// With a limit, or without.
    pub(in crate::migration) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, traffic: watch::Sender::default(), bucket: Mutex::default() }
    }

    /// Changes what holds for everybody from now on.
    pub(in crate::migration) fn direct(&self, traffic: Traffic) {
        self.traffic.send_if_modified(|now| std::mem::replace(now, traffic) != traffic);
    }

    /// Called after `bytes` were moved; waits as long as that was too much. Without a limit and a halt it costs one look.
    pub(super) async fn moved(&self, bytes: u64) {
        let traffic = *self.traffic.borrow();
        match (traffic, self.bytes_per_second) {
            (Traffic::Unlimited, _) | (Traffic::Limited, None) => return,
            (Traffic::Limited | Traffic::Halted, _) => {}
        }
        let mut changes = self.traffic.subscribe();
        let wait = self.bytes_per_second.map_or(Duration::ZERO, |rate| {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            bucket.get_or_insert(Bucket { free_at: now }).take(now, bytes, rate)
        });
        // Neither a sleep nor a look at a value loses anything by being dropped.
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = changes.wait_for(|traffic| *traffic == Traffic::Unlimited) => {}
        }
        // The sender lives in self.
        let _moving = changes.wait_for(|traffic| *traffic != Traffic::Halted).await;
    }
}

/// When everything that was taken so far is paid for.
#[derive(Debug)]
struct Bucket {
    free_at: Instant,
}

impl Bucket {
    /// Takes `bytes` at `now`; how long to wait for them.
    fn take(&mut self, now: Instant, bytes: u64, rate: u64) -> Duration {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 52 bits")]
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.free_at = self.free_at.max(earliest) + cost;
        self.free_at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_rate_is_kept_over_time_and_a_rest_is_not_saved_up() {
        let start = Instant::now();
        let mut bucket = Bucket { free_at: start };
        let mut now = start;
        for _ in 0..100 {
            now += bucket.take(now, 500, 1000);
        }
        assert_eq!(now - start, Duration::from_secs(50), "100 times half a second");
        let later = now + Duration::from_secs(3600);
        assert_eq!(bucket.take(later, 1000, 1000), Duration::from_millis(900), "an hour of rest is worth a burst");
    }

    #[tokio::test]
    async fn a_halt_lasts_until_it_is_lifted_and_an_emergency_lifts_everything() {
        let pace = Pace::new(None);
        assert!(pace.moved(u64::MAX).now_or_never().is_some(), "no limit, no wait");
        pace.direct(Traffic::Halted);
        let mut halted = Box::pin(pace.moved(1));
        assert!(halted.as_mut().now_or_never().is_none());
        pace.direct(Traffic::Limited);
        halted.await;

        // Years of waiting.
        let pace = Pace::new(Some(1));
        let mut slow = Box::pin(pace.moved(u64::from(u32::MAX)));
        assert!(slow.as_mut().now_or_never().is_none());
        pace.direct(Traffic::Unlimited);
        slow.await;
        assert!(pace.moved(u64::from(u32::MAX)).now_or_never().is_some(), "the debt is forgiven");
    }
}
