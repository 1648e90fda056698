//! Counters by database in PgBouncer's shapes: totals since the start, and averages over the last period.
//!
//! `total_query_time` is the time spent in transactions, like `total_xact_time`: no clock is read between the statements
//! of a transaction. Parse and Bind messages are not counted apart and are NULL.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::table::Kind::{Integer, Text};
use super::table::{Cell, Column, Table};
use crate::switch::Switchboard;
use crate::telemetry::metrics::{ByteDirection, Metrics};

/// Length of a period, as PgBouncer's default `stats_period`.
pub(super) const PERIOD: Duration = Duration::from_secs(60);

pub(super) const STATS: &[Column] = &[
    ("database", Text),
    ("total_server_assignment_count", Integer),
    ("total_xact_count", Integer),
    ("total_query_count", Integer),
    ("total_received", Integer),
    ("total_sent", Integer),
    ("total_xact_time", Integer),
    ("total_query_time", Integer),
    ("total_wait_time", Integer),
    ("total_client_parse_count", Integer),
    ("total_server_parse_count", Integer),
    ("total_bind_count", Integer),
    ("avg_server_assignment_count", Integer),
    ("avg_xact_count", Integer),
    ("avg_query_count", Integer),
    ("avg_recv", Integer),
    ("avg_sent", Integer),
    ("avg_xact_time", Integer),
    ("avg_query_time", Integer),
    ("avg_wait_time", Integer),
    ("avg_client_parse_count", Integer),
    ("avg_server_parse_count", Integer),
    ("avg_bind_count", Integer),
    // What PgBouncer up to 1.7 called total_query_count; exporters of that age ask for it.
    ("total_requests", Integer),
];
/// `SHOW STATS_TOTALS` and `SHOW STATS_AVERAGES`.
pub(super) const STATS_PART: &[Column] = &[
    ("database", Text),
    ("server_assignment_count", Integer),
    ("xact_count", Integer),
    ("query_count", Integer),
    ("bytes_received", Integer),
    ("bytes_sent", Integer),
    ("xact_time", Integer),
    ("query_time", Integer),
    ("wait_time", Integer),
    ("client_parse_count", Integer),
    ("server_parse_count", Integer),
    ("bind_count", Integer),
];
pub(super) const TOTALS: &[Column] = &[("name", Text), ("value", Integer)];

/// Names in `SHOW TOTALS`, in the order of [`Counts::cells`].
const NAMES: [&str; 11] = [
    "server_assignment_count",
    "xact_count",
    "query_count",
    "client_bytes",
    "server_bytes",
    "xact_time",
    "query_time",
    "wait_time",
    "client_parse_count",
    "server_parse_count",
    "bind_count",
];

/// What is counted for a database. Times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    transactions: u64,
    queries: u64,
    received_bytes: u64,
    sent_bytes: u64,
    transaction_us: u64,
    wait_us: u64,
}

impl Counts {
    fn of(metrics: &Metrics, database: &str) -> Self {
        let bytes = |direction: ByteDirection| metrics.bytes.with_label_values(&[database, direction.as_str()]).get();
        let micros = |seconds: f64| u64::try_from(Duration::from_secs_f64(seconds).as_micros()).unwrap_or(u64::MAX);
        Self {
            transactions: metrics.transactions.with_label_values(&[database]).get(),
            queries: metrics.queries.with_label_values(&[database]).get(),
            received_bytes: bytes(ByteDirection::FromClient),
            sent_bytes: bytes(ByteDirection::ToClient),
            transaction_us: micros(metrics.transaction_time.with_label_values(&[database]).get()),
            wait_us: micros(metrics.client_wait_time.with_label_values(&[database]).get()),
        }
    }

    /// Counts and waits for each second, the time in transactions for each transaction, as PgBouncer has them.
    fn average(self, earlier: Self, time: Duration) -> Self {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
        let grown = |now: u64, then: u64| now.saturating_sub(then);
        let each_second = |now, then| grown(now, then).saturating_mul(1000) / millis;
        let transactions = grown(self.transactions, earlier.transactions);
        Self {
            transactions: each_second(self.transactions, earlier.transactions),
            queries: each_second(self.queries, earlier.queries),
            received_bytes: each_second(self.received_bytes, earlier.received_bytes),
            sent_bytes: each_second(self.sent_bytes, earlier.sent_bytes),
            transaction_us: grown(self.transaction_us, earlier.transaction_us) / transactions.max(1),
            wait_us: each_second(self.wait_us, earlier.wait_us),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            transactions: self.transactions + other.transactions,
            queries: self.queries + other.queries,
            received_bytes: self.received_bytes + other.received_bytes,
            sent_bytes: self.sent_bytes + other.sent_bytes,
            transaction_us: self.transaction_us + other.transaction_us,
            wait_us: self.wait_us + other.wait_us,
        }
    }

    /// In the order of PgBouncer's columns.
    fn cells(self) -> [Cell; 11] {
        [
            Cell::Null,
            self.transactions.into(),
            self.queries.into(),
            self.received_bytes.into(),
            self.sent_bytes.into(),
            self.transaction_us.into(),
            self.transaction_us.into(),
            self.wait_us.into(),
            Cell::Null,
            Cell::Null,
            Cell::Null,
        ]
    }
}

/// All databases at one time.
#[derive(Debug)]
struct Snapshot {
    at: Instant,
    counts: BTreeMap<String, Counts>,
}

impl Snapshot {
    fn take(switchboard: &Switchboard, metrics: &Metrics) -> Self {
        let counts = |name: &str| (name.to_owned(), Counts::of(metrics, name));
        let counts = switchboard.all().iter().map(|database| counts(database.name())).collect();
        Self { at: Instant::now(), counts }
    }

    fn of(&self, database: &str) -> Counts {
        self.counts.get(database).copied().unwrap_or_default()
    }
}

/// Remembers where the last period began and ended.
#[derive(Debug)]
pub(super) struct Periods(Mutex<(Snapshot, Option<Snapshot>)>);

impl Periods {
    /// The first period begins now.
    pub(super) fn new() -> Self {
        Self(Mutex::new((Snapshot { at: Instant::now(), counts: BTreeMap::new() }, None)))
    }

    /// A period ends, the next one begins.
    pub(super) fn turn(&self, switchboard: &Switchboard, metrics: &Metrics) {
        let mut periods = self.lock();
        let ended = Snapshot::take(switchboard, metrics);
        if let Some(begun) = periods.1.replace(ended) {
            periods.0 = begun;
        }
    }

    /// Totals of each database, and averages of its last period; until one has ended, of the time since the start.
    fn read(&self, switchboard: &Switchboard, metrics: &Metrics) -> Vec<(String, Counts, Counts)> {
        let now = Snapshot::take(switchboard, metrics);
        let periods = self.lock();
        let (begin, end) = (&periods.0, periods.1.as_ref().unwrap_or(&now));
        let time = end.at.saturating_duration_since(begin.at);
        let row =
            |(name, totals): (&String, &Counts)| (name.clone(), *totals, end.of(name).average(begin.of(name), time));
        now.counts.iter().map(row).collect()
    }

    fn lock(&self) -> MutexGuard<'_, (Snapshot, Option<Snapshot>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `SHOW STATS`
    pub(super) fn stats(&self, switchboard: &Switchboard, metrics: &Metrics) -> Table {
        let row = |(name, totals, averages): (String, Counts, Counts)| {
            let (all, each) = (totals.cells(), averages.cells());
            std::iter::once(name.into()).chain(all).chain(each).chain([totals.queries.into()]).collect()
        };
        Table { columns: STATS, rows: self.read(switchboard, metrics).into_iter().map(row).collect() }
    }

    /// `SHOW STATS_TOTALS`
    pub(super) fn totals(&self, switchboard: &Switchboard, metrics: &Metrics) -> Table {
        self.part(switchboard, metrics, |totals, _| totals)
    }

    /// `SHOW STATS_AVERAGES`
    pub(super) fn averages(&self, switchboard: &Switchboard, metrics: &Metrics) -> Table {
        self.part(switchboard, metrics, |_, averages| averages)
    }

    fn part(&self, switchboard: &Switchboard, metrics: &Metrics, pick: fn(Counts, Counts) -> Counts) -> Table {
        let row = |(name, totals, averages): (String, Counts, Counts)| {
            std::iter::once(name.into()).chain(pick(totals, averages).cells()).collect()
        };
        Table { columns: STATS_PART, rows: self.read(switchboard, metrics).into_iter().map(row).collect() }
    }

    /// `SHOW TOTALS`: all databases together.
    pub(super) fn sums(&self, switchboard: &Switchboard, metrics: &Metrics) -> Table {
        let sum = |(all, each): (Counts, Counts), (_, totals, averages): (String, Counts, Counts)| {
            (all.plus(totals), each.plus(averages))
        };
        let (all, each) = self.read(switchboard, metrics).into_iter().fold(Default::default(), sum);
        let mut table = Table::new(TOTALS);
        for (prefix, counts) in [("total", all), ("avg", each)] {
            for (name, cell) in NAMES.iter().zip(counts.cells()) {
                table.push(vec![format!("{prefix}_{name}").into(), cell]);
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_those_of_the_time_between() {
        let earlier = Counts { transactions: 100, transaction_us: 5_000, sent_bytes: 7, ..Counts::default() };
        let now = Counts { transactions: 300, queries: 10, transaction_us: 25_000, sent_bytes: 2_007, ..earlier };
        let each = now.average(earlier, Duration::from_secs(4));
        let expected =
            Counts { transactions: 50, queries: 2, transaction_us: 100, sent_bytes: 500, ..Counts::default() };
        assert_eq!(each, expected);
        assert_eq!(now.average(now, Duration::ZERO), Counts::default(), "nothing happened in no time");
    }
}
