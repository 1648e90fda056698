//! When a thread that does nothing but read a stream sleeps between two reads, and for how long.
//!
//! A walsender carries every message to a reader that waits for it by itself; what comes while the reader sleeps is put
//! together. So while changes come without end, the reader naps. It must never nap where little comes, nor make anybody wait
//! who would notice: only a backlog is slept through for longer than a few milliseconds.

use std::time::Duration;

use tokio::time::Instant;

/// When so much has come within so short a time, more will come: worth a nap.
const BUSY: (usize, Duration) = (4096, Duration::from_millis(10));

/// How long the reading thread sleeps then.
const NAP: Duration = Duration::from_millis(1);

/// How much after the last nap makes the next one long, and how long: until the walsender has filled what it may.
const LONG_NAP: (usize, Duration) = (6 * 1024, Duration::from_millis(4));

/// How long that one is while what comes is history: nobody waits for an old change.
const BACKLOG_NAP: Duration = Duration::from_millis(10);

/// Where less than so much has come since the last nap, because the walsender is slow, it is even longer.
const SLOW_BACKLOG: (usize, Duration) = (128 * 1024, Duration::from_millis(20));

/// A read that brought less than this has met the end of what was there. Who then reads on gets message by message.
const SHORT_READ_BYTES: usize = 2048;

/// What the source sends now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Changes that were made a moment ago.
    Fresh,
    /// A backlog.
    Old,
}

/// A thread that reads, and what it has read.
#[derive(Debug)]
pub(super) struct Naps {
    /// Nothing else runs on the thread; otherwise it never sleeps.
    pub(super) own_thread: bool,
    /// Of what comes.
    pub(super) age: Age,
    /// When the last nap ended, or little came, and the bytes that have come since.
    window: (Instant, usize),
    /// The last read was a short one.
    drained: bool,
}

impl Naps {
    pub(super) fn new() -> Self {
        Self { own_thread: false, age: Age::Fresh, window: (Instant::now(), 0), drained: false }
    }

    /// So much has come at a time.
    pub(super) fn read(&mut self, bytes: usize) {
        self.window.1 += bytes;
        self.drained = bytes < SHORT_READ_BYTES;
    }

    /// Whether it is time for a nap although more may have come already.
    pub(super) fn due(&self) -> bool {
        self.own_thread && self.age == Age::Old && self.drained
    }

    /// Sleeps, with the whole thread, while changes come without end.
    pub(super) fn take(&mut self) {
        let (since, bytes) = self.window;
        let passed = since.elapsed();
        if bytes >= BUSY.0 && passed < BUSY.1 {
            std::thread::sleep(length(bytes, self.age));
        } else if passed < BUSY.1 {
            return;
        }
        self.window = (Instant::now(), 0);
    }
}

/// How long to sleep when so much has come since the last nap.
fn length(bytes: usize, age: Age) -> Duration {
    match age {
        _ if bytes < LONG_NAP.0 => NAP,
        Age::Fresh => LONG_NAP.1,
        Age::Old if bytes < SLOW_BACKLOG.0 => SLOW_BACKLOG.1,
        Age::Old => BACKLOG_NAP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_backlog_is_slept_through() {
        for (bytes, age, nap_ms) in [
            (LONG_NAP.0 - 1, Age::Fresh, 1),
            (LONG_NAP.0 - 1, Age::Old, 1),
            (LONG_NAP.0, Age::Fresh, 4),
            (LONG_NAP.0, Age::Old, 20),
            (SLOW_BACKLOG.0, Age::Fresh, 4),
            (SLOW_BACKLOG.0, Age::Old, 10),
        ] {
            assert_eq!(length(bytes, age), Duration::from_millis(nap_ms), "{bytes} bytes, {age:?}");
        }
    }

    #[test]
    fn a_short_read_of_a_backlog_is_the_last_before_a_nap() {
        let mut naps = Naps { own_thread: true, age: Age::Old, ..Naps::new() };
        assert!(!naps.due(), "nothing was read");
        naps.read(SHORT_READ_BYTES - 1);
        assert!(naps.due());
        naps.read(SHORT_READ_BYTES);
        assert!(!naps.due());
        naps = Naps { drained: true, age: Age::Fresh, ..naps };
        assert!(!naps.due(), "somebody may wait for it");
        naps = Naps { age: Age::Old, own_thread: false, ..naps };
        assert!(!naps.due(), "others would have to wait");
    }
}
