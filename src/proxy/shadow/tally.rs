//! What shadow reads have found: counts, latencies and statements by fingerprint. Never a value.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::ShadowView;
use super::judge::normalised;
use crate::telemetry::metrics::Metrics;

/// So many of the latest latencies are kept for percentiles.
const LATENCIES: usize = 4096;

/// So many statements are told apart; further ones are counted without a name.
const STATEMENTS: usize = 500;

/// So many of them are listed.
const LISTED: usize = 20;

/// Why a sampled transaction was not run on the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Skip {
    /// It is not a single statement that only reads.
    NotARead,
    /// It uses what differs between servers or from one time to the next.
    NotComparable,
    /// The session has something that the target cannot be given.
    Session,
    /// The session's state, or its statement's text, is not known (yet).
    NotKnown,
    /// The statement or its answer is larger than a sample may be.
    TooLarge,
    /// It failed on the source.
    Failed,
    /// As many samples as may be wait for the target.
    Busy,
}

impl Skip {
    /// Every one.
    pub(super) const ALL: [Self; 7] =
        [Self::NotARead, Self::NotComparable, Self::Session, Self::NotKnown, Self::TooLarge, Self::Failed, Self::Busy];

    /// In views and metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NotARead => "not_a_read",
            Self::NotComparable => "not_comparable",
            Self::Session => "session",
            Self::NotKnown => "not_known",
            Self::TooLarge => "too_large",
            Self::Failed => "failed",
            Self::Busy => "busy",
        }
    }
}

/// What a sample that went to the target has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Outcome {
    /// The same rows in the same order.
    Equal,
    /// The same rows in another order.
    Reordered,
    /// Other rows at first, the same once the target had applied what the source had.
    CaughtUp,
    /// Other rows though the target had applied all and the source still answers as before.
    Different,
    /// Other rows, and it could not be found out why.
    Undecided,
    /// Its values cannot be compared.
    NotComparable,
    /// The target refused it.
    Failed,
    /// The target, or the login there, was not to be had.
    Unreachable,
}

impl Outcome {
    /// Every one.
    pub(super) const ALL: [Self; 8] = [
        Self::Equal,
        Self::Reordered,
        Self::CaughtUp,
        Self::Different,
        Self::Undecided,
        Self::NotComparable,
        Self::Failed,
        Self::Unreachable,
    ];

    /// In views and metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Reordered => "reordered",
            Self::CaughtUp => "caught_up",
            Self::Different => "different",
            Self::Undecided => "undecided",
            Self::NotComparable => "not_comparable",
            Self::Failed => "failed",
            Self::Unreachable => "unreachable",
        }
    }
}

/// The latest latencies, in microseconds.
#[derive(Debug, Default)]
struct Latencies {
    kept: Vec<u32>,
    next: usize,
}

impl Latencies {
    fn add(&mut self, time: Duration) {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        if self.kept.len() < LATENCIES {
            self.kept.push(micros);
        } else {
            self.kept[self.next] = micros;
            self.next = (self.next + 1) % LATENCIES;
        }
    }

    fn view(&self) -> Option<LatencyView> {
        let mut sorted = self.kept.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        let at = |percent: usize| f64::from(sorted[last * percent / 100]) / 1000.0;
        Some(LatencyView { p50: at(50), p95: at(95), p99: at(99) })
    }
}

#[derive(Debug, Default)]
struct Statement {
    text: String,
    runs: u64,
    different: u64,
    failed: BTreeMap<String, u64>,
    source: Duration,
    target: Duration,
}

/// Everything that one run has found.
#[derive(Debug, Default)]
pub(super) struct Tally {
    sampled: u64,
    skipped: BTreeMap<Skip, u64>,
    outcomes: BTreeMap<Outcome, u64>,
    sqlstates: BTreeMap<String, u64>,
    source: Latencies,
    target: Latencies,
    statements: HashMap<u64, Statement>,
}

impl Tally {
    pub(super) fn sampled(&mut self) {
        self.sampled += 1;
    }

    pub(super) fn skipped(&mut self, why: Skip, metrics: &Metrics) {
        *self.skipped.entry(why).or_default() += 1;
        metrics.shadow_reads_skipped.with_label_values(&[why.as_str()]).inc();
    }

    pub(super) fn ended(&mut self, outcome: Outcome, metrics: &Metrics) {
        *self.outcomes.entry(outcome).or_default() += 1;
        metrics.shadow_reads.with_label_values(&[outcome.as_str()]).inc();
    }

    /// Both servers have answered.
    pub(super) fn took(&mut self, text: &[u8], source: Duration, target: Duration, metrics: &Metrics) {
        self.source.add(source);
        self.target.add(target);
        metrics.shadow_read_seconds.with_label_values(&["source"]).observe(source.as_secs_f64());
        metrics.shadow_read_seconds.with_label_values(&["target"]).observe(target.as_secs_f64());
        if let Some(statement) = self.statement(text) {
            statement.runs += 1;
            statement.source += source;
            statement.target += target;
        }
    }

    pub(super) fn different(&mut self, text: &[u8]) {
        if let Some(statement) = self.statement(text) {
            statement.different += 1;
        }
    }

    pub(super) fn failed(&mut self, text: &[u8], sqlstate: &str) {
        *self.sqlstates.entry(sqlstate.to_owned()).or_default() += 1;
        if let Some(statement) = self.statement(text) {
            *statement.failed.entry(sqlstate.to_owned()).or_default() += 1;
        }
    }

    fn statement(&mut self, text: &[u8]) -> Option<&mut Statement> {
        let text = normalised(text);
        let digest = Sha256::digest(text.as_bytes());
        let fingerprint = u64::from_be_bytes(*digest.first_chunk()?);
        if self.statements.len() >= STATEMENTS && !self.statements.contains_key(&fingerprint) {
            return None;
        }
        Some(self.statements.entry(fingerprint).or_insert_with(|| Statement { text, ..Statement::default() }))
    }

    pub(super) fn sampled_so_far(&self) -> u64 {
        self.sampled
    }

    pub(super) fn skips(&self) -> BTreeMap<String, u64> {
        named(Skip::ALL.map(|why| (why.as_str(), self.skipped.get(&why))))
    }

    pub(super) fn outcomes(&self) -> BTreeMap<String, u64> {
        named(Outcome::ALL.map(|outcome| (outcome.as_str(), self.outcomes.get(&outcome))))
    }

    pub(super) fn sqlstates(&self) -> BTreeMap<String, u64> {
        self.sqlstates.clone()
    }

    pub(super) fn latencies(&self) -> (Option<LatencyView>, Option<LatencyView>) {
        (self.source.view(), self.target.view())
    }

    /// What differs and what fails first, then what the target takes longest for beyond the source.
    pub(super) fn listed(&self) -> Vec<ShadowStatementView> {
        let mut all: Vec<_> = self.statements.iter().collect();
        all.sort_by_key(|(fingerprint, statement)| {
            let wrong = statement.different + statement.failed.values().sum::<u64>();
            let longer = statement.target.saturating_sub(statement.source);
            std::cmp::Reverse((wrong, longer, **fingerprint))
        });
        let mean = |total: Duration, runs: u64| (runs > 0).then(|| total.as_secs_f64() * 1000.0 / runs as f64);
        let view = |(fingerprint, statement): (&u64, &Statement)| ShadowStatementView {
            fingerprint: format!("{fingerprint:016x}"),
            statement: statement.text.clone(),
            runs: statement.runs,
            different: statement.different,
            failed: statement.failed.clone(),
            source_ms: mean(statement.source, statement.runs),
            target_ms: mean(statement.target, statement.runs),
        };
        all.into_iter().take(LISTED).map(view).collect()
    }
}

fn named<const N: usize>(counts: [(&str, Option<&u64>); N]) -> BTreeMap<String, u64> {
    counts.into_iter().map(|(name, count)| (name.to_owned(), count.copied().unwrap_or(0))).collect()
}

/// Latencies in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct LatencyView {
    /// Half of them were shorter.
    pub p50: f64,
    /// 95 of 100 were shorter.
    pub p95: f64,
    /// 99 of 100 were shorter.
    pub p99: f64,
}

/// One statement among the samples, without its values.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct ShadowStatementView {
    /// The same for texts that differ in literals, numbers, comments and spaces alone.
    pub fingerprint: String,
    /// The text with `?` in place of every literal and number, cut where it is long.
    pub statement: String,
    /// How often both servers have answered.
    pub runs: u64,
    /// How often they differed.
    pub different: u64,
    /// How often the target refused it, by SQLSTATE.
    pub failed: BTreeMap<String, u64>,
    /// Mean latency on the source, as its clients had it.
    pub source_ms: Option<f64>,
    /// Mean latency on the target.
    pub target_ms: Option<f64>,
}

impl ShadowView {
    /// The same line by line, for a console: what a line is about, its name, its value. What is zero is left out.
    pub fn lines(&self) -> Vec<[String; 3]> {
        let line = |what: &str, name: &str, value: String| [what.to_owned(), name.to_owned(), value];
        let state = match &self.ended {
            None => format!("running for {:.0} more seconds, {} % of the transactions", self.seconds_left, self.share),
            Some(why) => format!("ended: {why}"),
        };
        let mut lines =
            vec![line("shadow reads", "state", state), line("transactions", "sampled", self.sampled.to_string())];
        let counts = [("skipped", &self.skipped), ("read", &self.outcomes), ("failed with", &self.failed)];
        for (what, counts) in counts {
            let found = counts.iter().filter(|(_, count)| **count > 0);
            lines.extend(found.map(|(name, count)| line(what, name, count.to_string())));
        }
        if self.waiting > 0 {
            lines.push(line("read", "looked at again", self.waiting.to_string()));
        }
        for (server, latency) in [("source", &self.source_ms), ("target", &self.target_ms)] {
            if let Some(LatencyView { p50, p95, p99 }) = latency {
                lines.push(line("latency", server, format!("p50 {p50:.3} ms, p95 {p95:.3} ms, p99 {p99:.3} ms")));
            }
        }
        for one in &self.statements {
            let mut words = vec![format!("{} runs", one.runs), format!("{} different", one.different)];
            words.extend(one.failed.iter().map(|(sqlstate, count)| format!("{count} failed with {sqlstate}")));
            let latency = one.source_ms.zip(one.target_ms);
            words.extend(latency.map(|(source, target)| format!("{source:.3} ms, on the target {target:.3} ms")));
            lines.push(line("statement", &one.fingerprint, format!("{}: {}", words.join(", "), one.statement)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_that_differ_in_values_are_one_and_those_that_differ_come_first() {
        let metrics = Metrics::new().expect("a registry");
        let mut tally = Tally::default();
        let ms = Duration::from_millis;
        tally.took(b"SELECT 1", ms(1), ms(9), &metrics);
        for text in [&b"SELECT * FROM t WHERE a = 'secret'"[..], b"select * from t  where a = 17"] {
            tally.took(text, ms(1), ms(2), &metrics);
        }
        tally.different(b"SELECT * FROM t WHERE a = 'other'");
        tally.failed(b"SELECT * FROM u", "42P01");
        let listed = tally.listed();
        assert_eq!(listed.len(), 3);
        assert!(!format!("{listed:?}").contains("secret"));
        let differing = listed.iter().find(|one| one.different == 1).expect("listed");
        assert_eq!((differing.runs, differing.target_ms), (2, Some(2.0)));
        assert_eq!(listed[2].statement, "select ?", "what is only slow comes last");
        assert_eq!(tally.sqlstates(), BTreeMap::from([("42P01".to_owned(), 1)]));
        for number in 0..2 * STATEMENTS {
            tally.failed(format!("SELECT a{number}").as_bytes(), "42703");
        }
        assert_eq!(tally.statements.len(), STATEMENTS);
    }

    #[test]
    fn percentiles_are_those_of_the_latest() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.view(), None);
        (0..LATENCIES as u64).for_each(|_| latencies.add(Duration::from_secs(9)));
        (0..LATENCIES as u64).for_each(|number| latencies.add(Duration::from_micros(number)));
        let view = latencies.view().expect("some");
        assert!((view.p50 - 2.047).abs() < 0.001 && (view.p99 - 4.054).abs() < 0.001, "{view:?}");
    }
}
