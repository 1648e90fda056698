//! Counters of a worker: plain cells that are handed to the metrics once a second, so that no two cores contend for a
//! cache line at every transaction.

use std::cell::Cell;
use std::time::Duration;

use prometheus::{Histogram, IntCounter};

use crate::telemetry::metrics::{ByteDirection, Metrics};

/// What is counted for one database on one worker.
pub(super) struct DatabaseMeters {
    pub(super) transactions: Cell<u64>,
    pub(super) bytes_from_client: Cell<u64>,
    pub(super) bytes_to_client: Cell<u64>,
    totals: Totals,
}

/// Where it is handed to.
struct Totals {
    transactions: IntCounter,
    bytes_from_client: IntCounter,
    bytes_to_client: IntCounter,
    client_wait_seconds: Histogram,
}

/// Adds without a read-modify-write of anything shared.
#[inline]
pub(super) fn add(counter: &Cell<u64>, amount: u64) {
    counter.set(counter.get().wrapping_add(amount));
}

impl DatabaseMeters {
    pub(super) fn new(metrics: &Metrics, database: &str) -> Self {
        let bytes = |direction: ByteDirection| metrics.bytes.with_label_values(&[database, direction.as_str()]);
        Self {
            transactions: Cell::new(0),
            bytes_from_client: Cell::new(0),
            bytes_to_client: Cell::new(0),
            totals: Totals {
                transactions: metrics.transactions.with_label_values(&[database]),
                bytes_from_client: bytes(ByteDirection::FromClient),
                bytes_to_client: bytes(ByteDirection::ToClient),
                client_wait_seconds: metrics.client_wait_seconds.clone(),
            },
        }
    }

    /// A transaction waited so long for its admission. Those that did not wait are not observed one by one.
    pub(super) fn waited(&self, time: Duration) {
        self.totals.client_wait_seconds.observe(time.as_secs_f64());
    }

    /// Hands over what was counted since the last time.
    pub(super) fn flush(&self) {
        self.totals.transactions.inc_by(self.transactions.take());
        self.totals.bytes_from_client.inc_by(self.bytes_from_client.take());
        self.totals.bytes_to_client.inc_by(self.bytes_to_client.take());
    }
}
