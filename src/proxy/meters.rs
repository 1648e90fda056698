//! Counters of a worker: plain cells that are handed to the metrics once a second, so that no two cores contend for a
//! cache line at every transaction. Gauges are not kept here: they are read off the registry of sessions when asked for.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use prometheus::local::LocalHistogram;
use prometheus::{Counter, IntCounter};

use crate::telemetry::metrics::{ByteDirection, Metrics};

/// What is counted for one database on one worker.
pub(super) struct DatabaseMeters {
    transactions: Tally,
    queries: Tally,
    transaction_time: Stopwatch,
    client_wait_time: Stopwatch,
    bytes_from_client: Tally,
    bytes_to_client: Tally,
    client_wait_seconds: RefCell<LocalHistogram>,
    transaction_seconds: RefCell<LocalHistogram>,
}

/// Something that is counted up.
struct Tally {
    since_flush: Cell<u64>,
    total: IntCounter,
}

impl Tally {
    fn new(total: IntCounter) -> Self {
        Self { since_flush: Cell::new(0), total }
    }

    #[inline]
    fn add(&self, amount: u64) {
        self.since_flush.set(self.since_flush.get().wrapping_add(amount));
    }

    fn flush(&self) {
        self.total.inc_by(self.since_flush.take());
    }
}

/// Time that is summed up.
struct Stopwatch {
    since_flush: Cell<Duration>,
    total: Counter,
}

impl Stopwatch {
    fn new(total: Counter) -> Self {
        Self { since_flush: Cell::default(), total }
    }

    #[inline]
    fn add(&self, time: Duration) {
        self.since_flush.set(self.since_flush.get().saturating_add(time));
    }

    fn flush(&self) {
        self.total.inc_by(self.since_flush.take().as_secs_f64());
    }
}

impl DatabaseMeters {
    pub(super) fn new(metrics: &Metrics, database: &str) -> Self {
        let bytes = |direction: ByteDirection| metrics.bytes.with_label_values(&[database, direction.as_str()]);
        Self {
            transactions: Tally::new(metrics.transactions.with_label_values(&[database])),
            queries: Tally::new(metrics.queries.with_label_values(&[database])),
            transaction_time: Stopwatch::new(metrics.transaction_time.with_label_values(&[database])),
            client_wait_time: Stopwatch::new(metrics.client_wait_time.with_label_values(&[database])),
            bytes_from_client: Tally::new(bytes(ByteDirection::FromClient)),
            bytes_to_client: Tally::new(bytes(ByteDirection::ToClient)),
            client_wait_seconds: RefCell::new(metrics.client_wait_seconds.local()),
            transaction_seconds: RefCell::new(metrics.transaction_seconds.local()),
        }
    }

    /// Bytes that were written to the backend.
    #[inline]
    pub(super) fn sent_up(&self, bytes: usize) {
        self.bytes_from_client.add(bytes as u64);
    }

    /// Bytes that were written to the client.
    #[inline]
    pub(super) fn sent_down(&self, bytes: usize) {
        self.bytes_to_client.add(bytes as u64);
    }

    /// A transaction waited so long for its admission. Those that did not wait are not observed.
    pub(super) fn waited(&self, time: Duration) {
        self.client_wait_time.add(time);
        self.client_wait_seconds.borrow_mut().observe(time.as_secs_f64());
    }

    /// A transaction of so many queries has ended.
    #[inline]
    pub(super) fn took(&self, time: Duration, queries: u32) {
        self.transactions.add(1);
        self.queries.add(u64::from(queries));
        self.transaction_time.add(time);
        self.transaction_seconds.borrow_mut().observe(time.as_secs_f64());
    }

    /// Hands over what was counted since the last time.
    pub(super) fn flush(&self) {
        self.transactions.flush();
        self.queries.flush();
        self.transaction_time.flush();
        self.client_wait_time.flush();
        self.bytes_from_client.flush();
        self.bytes_to_client.flush();
        self.client_wait_seconds.borrow().flush();
        self.transaction_seconds.borrow().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_shows_after_a_flush() {
        let metrics = Metrics::new().expect("names are distinct");
        let meters = DatabaseMeters::new(&metrics, "shop");
        meters.took(Duration::from_millis(500), 3);
        meters.sent_up(7);
        meters.flush();
        assert_eq!(metrics.transactions.with_label_values(&["shop"]).get(), 1);
        assert_eq!(metrics.bytes.with_label_values(&["shop", "from_client"]).get(), 7);
        assert_eq!(metrics.transaction_seconds.get_sample_count(), 1);
        assert_eq!(metrics.queries.with_label_values(&["shop"]).get(), 3);
        assert_eq!(metrics.transaction_time.with_label_values(&["shop"]).get(), 0.5);
    }
}
