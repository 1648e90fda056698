//! How long to wait before work that was interrupted is begun again: twice as long each time, up to a bound. No clock: it
//! tells the wait, and its caller sleeps.

use std::time::Duration;

/// First and longest wait before the work on a database, or on a migration, is begun again.
const OF_WORK: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// First and longest wait before the lost connection of a stream is made again.
const OF_STREAM: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Attempts in a row that failed.
#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    retries: u32,
}

impl Backoff {
    /// For the work on a database or on a migration.
    pub(super) fn of_work() -> Self {
        Self::new(OF_WORK)
    }

    /// For the connections of a stream.
    pub(super) fn of_stream() -> Self {
        Self::new(OF_STREAM)
    }

    fn new((first, longest): (Duration, Duration)) -> Self {
        Self { first, longest, next: first, retries: 0 }
    }

    /// The last attempt got further than the one before: what fails now fails for the first time.
    pub(super) fn progressed(&mut self) {
        *self = Self::new((self.first, self.longest));
    }

    /// An attempt has failed. Returns how many have in a row, and how long to wait before the next.
    pub(super) fn failed(&mut self) -> (u32, Duration) {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        self.retries += 1;
        (self.retries, wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_twice_the_last_up_to_the_longest_and_progress_begins_anew() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::of_work();
        let waits: Vec<_> = (0..7).map(|_| backoff.failed()).collect();
        let expected = [500, 1000, 2000, 4000, 8000, 15_000, 15_000];
        assert_eq!(waits, (1..).zip(expected.map(ms)).collect::<Vec<_>>());
        backoff.progressed();
        assert_eq!(backoff.failed(), (1, ms(500)));
        assert_eq!(Backoff::of_stream().failed(), (1, ms(200)));
    }
}
