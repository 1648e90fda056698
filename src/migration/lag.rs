//! How far the target is behind, in bytes and in seconds, without trusting either server's clock. Pure: the time is
//! passed in.
//!
//! The source's position is looked at now and then. The lag in seconds is the age of the oldest position that has not
//! been applied yet; in bytes it is the distance to the newest. What was not looked at recently is not known, and
//! unknown is never zero.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::lsn::Lsn;

/// An observation older than this says nothing any more.
const FRESH: Duration = Duration::from_secs(10);

/// Observations kept.
const KEPT: usize = 600;

/// How far the target is behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lag {
    /// Bytes of WAL.
    pub bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Observations of one database.
#[derive(Debug, Default)]
pub struct LagMeter {
    /// Positions of the source that were not applied when last looked at, oldest first.
    waiting: VecDeque<(Instant, Lsn)>,
    last: Option<(Instant, Lsn)>,
}

impl LagMeter {
    /// At `now` the source had written up to `written`.
    pub fn observe(&mut self, now: Instant, written: Lsn, applied: Lsn) {
        self.waiting.retain(|(_, position)| *position > applied);
        if written > applied && self.waiting.back().is_none_or(|(_, position)| *position < written) {
            if self.waiting.len() == KEPT {
                // Thinned out, the oldest stays.
                let mut index = 0;
                self.waiting.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
            }
            self.waiting.push_back((now, written));
        }
        self.last = Some((now, written));
    }

    /// The lag at `now`, when `applied` has been applied; none: not known.
    pub fn lag(&self, now: Instant, applied: Lsn) -> Option<Lag> {
        let (looked, written) = self.last?;
        if now.saturating_duration_since(looked) > FRESH {
            return None;
        }
        let oldest = self.waiting.iter().find(|(_, position)| *position > applied);
        let seconds = oldest.map_or(0.0, |(since, _)| now.saturating_duration_since(*since).as_secs_f64());
        Some(Lag { bytes: written.bytes_since(applied), seconds })
    }

    /// Nothing is known any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_the_age_of_the_oldest_position_that_is_missing() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut meter = LagMeter::default();
        assert_eq!(meter.lag(at(0), Lsn(0)), None, "unknown is not zero");
        meter.observe(at(0), Lsn(100), Lsn(100));
        assert_eq!(meter.lag(at(0), Lsn(100)), Some(Lag { bytes: 0, seconds: 0.0 }));
        meter.observe(at(1), Lsn(200), Lsn(100));
        meter.observe(at(2), Lsn(300), Lsn(100));
        assert_eq!(meter.lag(at(4), Lsn(100)), Some(Lag { bytes: 200, seconds: 3.0 }));
        assert_eq!(meter.lag(at(4), Lsn(200)), Some(Lag { bytes: 100, seconds: 2.0 }));
        assert_eq!(meter.lag(at(4), Lsn(300)), Some(Lag { bytes: 0, seconds: 0.0 }));
        assert_eq!(meter.lag(at(20), Lsn(300)), None, "an old look says nothing");
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_stays() {
        let start = Instant::now();
        let mut meter = LagMeter::default();
        for second in 0..5000_u64 {
            meter.observe(start + Duration::from_secs(second), Lsn(second + 1), Lsn(0));
        }
        assert!(meter.waiting.len() <= KEPT);
        let lag = meter.lag(start + Duration::from_secs(5000), Lsn(0)).expect("known");
        assert_eq!((lag.bytes, lag.seconds), (5000, 5000.0));
    }
}
