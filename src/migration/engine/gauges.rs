//! What the metrics show of one database's replication. A series is absent while its value is not known: a value that is no
//! longer true must never stand there.

use prometheus::IntGaugeVec;

use crate::catalog::streams::Direction;
use crate::migration::lag::Lag;
use crate::migration::wal_limit::SlotWal;
use crate::telemetry::metrics::Metrics;

/// The series of one database.
pub(super) struct Gauges<'a> {
    pub(super) metrics: &'a Metrics,
    pub(super) migration: &'a str,
    pub(super) database: &'a str,
    /// Which way the changes flow.
    pub(super) direction: Direction,
}

impl Gauges<'_> {
    /// How far the server that is applied to is behind.
    pub(super) fn lag(&self, lag: Option<Lag>) {
        let stream = [self.migration, self.database, self.direction.as_str()];
        let bytes = lag.map(|lag| i64::try_from(lag.bytes).unwrap_or(i64::MAX));
        show(&self.metrics.replication_lag_bytes, &stream, bytes);
        match lag {
            Some(lag) => self.metrics.replication_latency_seconds.with_label_values(&stream).set(lag.seconds),
            None => drop(self.metrics.replication_latency_seconds.remove_label_values(&stream)),
        }
    }

    /// Nothing is known any more.
    pub(super) fn clear(&self) {
        self.lag(None);
        self.slot(None, None);
    }

    /// Whether the server that was left is watched, and how many changes were written past fences, as long as one stands.
    pub(super) fn fence(&self, watched: Option<bool>, changes: u64) {
        let database = [self.migration, self.database];
        show(&self.metrics.fence_watched, &database, watched.map(i64::from));
        show(&self.metrics.fenced_writes, &database, watched.map(|_| i64::try_from(changes).unwrap_or(i64::MAX)));
    }

    /// What the slot makes its server keep, and what it may.
    pub(super) fn slot(&self, wal: Option<SlotWal>, limit: Option<u64>) {
        let slot = [self.migration, self.database];
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        show(&self.metrics.slot_retained_wal_bytes, &slot, wal.map(|wal| signed(wal.retained)));
        show(&self.metrics.slot_safe_wal_bytes, &slot, wal.and_then(|wal| wal.safe).map(signed));
        show(&self.metrics.slot_wal_limit_bytes, &slot, wal.map(|_| limit.map_or(0, signed)));
    }
}

fn show(gauge: &IntGaugeVec, labels: &[&str], value: Option<i64>) {
    match value {
        Some(value) => gauge.with_label_values(labels).set(value),
        // One that was never set cannot be removed, which is as well.
        None => drop(gauge.remove_label_values(labels)),
    }
}
