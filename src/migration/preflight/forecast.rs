//! How long the copy may take and how much write-ahead log the source would keep meanwhile: from a short sample, shown
//! with what it rests on.
//!
//! The sample reads the first few megabytes of the largest table over one connection, as the copy does, and looks how far the
//! source's log grows in that moment. Writing on the target and building indexes are not in it. It is a forecast as of a
//! person who has watched for a second, and says so; nothing but a warning rests on it.

use std::time::{Duration, Instant};

use super::database::{Database, Finding};
use super::definition::{Definition, Hosted, When};
use super::{Outcome, RuleResult};
use crate::config::units::{format_duration, format_size};
use crate::sqlstate;

const FORECAST: Definition = Definition {
    code: "forecast",
    worst: Outcome::Warning,
    when: When::Before,
    why: "the source keeps its write-ahead log from the first table to the moment in which the target has caught up; when \
          that is more than max_slot_wal_keep_size or migration.max_retained_wal, the migration fails",
    evidence: "sizes; how fast a sample was read, and the time for all of it at that pace; how fast the log grew meanwhile, \
               and what a slot would keep in that time",
    fix: "raise max_slot_wal_keep_size and migration.max_retained_wal if the source has room, raise migration.copy_workers, or \
          choose a quieter hour",
    hosted: Hosted::Same,
    ..Finding::DEFINITION
};

pub(super) const DEFINITIONS: [&Definition; 1] = [&FORECAST];

/// Bytes of the largest table after which no more are read.
const SAMPLE_BYTES: u64 = 8 << 20;

/// Answers of a server to which the sample does without a table. The last two: it is gone, or is no table any more.
const REFUSALS: [&str; 4] = [sqlstate::INSUFFICIENT_PRIVILEGE, sqlstate::LOCK_NOT_AVAILABLE, "42P01", "42809"];

/// The log is watched for at least so long,
const WATCH: Duration = Duration::from_millis(500);

/// or for this part of the time that reading every table will take, where that is less,
const WATCH_SHARE: u32 = 16;

/// but not for less than this.
const LEAST_WATCH: Duration = Duration::from_millis(100);

/// Bytes of all tables and of their indexes, then the name of the largest table, if any has rows. What is stored beside
/// a table counts: a small heap may point at gigabytes.
const SIZES: &str = "
WITH ours AS (
    SELECT c.oid, pg_table_size(c.oid) AS bytes, pg_indexes_size(c.oid) AS index_bytes, pg_relation_size(c.oid) AS heap
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_')
SELECT (SELECT coalesce(sum(bytes), 0) FROM ours)::int8, (SELECT coalesce(sum(index_bytes), 0) FROM ours)::int8,
       (SELECT oid::regclass::text FROM ours WHERE heap > 0 ORDER BY bytes DESC LIMIT 1)";

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    table_bytes: u64,
    index_bytes: u64,
    /// The table that was read from, how much of it, and how long that took.
    sample: Option<(String, u64, Duration)>,
    /// How far the log grew, and in what time; none: it is not kept.
    log: Option<(u64, Duration)>,
    /// What a slot may keep.
    limit: Option<u64>,
    workers: usize,
}

impl Database<'_> {
    /// See the module.
    pub(super) async fn forecast(&self) -> RuleResult {
        let rule = self.rule(&FORECAST);
        match self.look().await {
            Ok(seen) => {
                let (outcome, evidence) = judge(&seen);
                rule.answer(outcome, evidence)
            }
            Err(error) => rule.unknown(&*error),
        }
    }

    async fn look(&self) -> Result<Seen, Box<dyn std::error::Error + Send + Sync>> {
        let config = &self.servers.preflight.config.migration;
        let unsigned = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        let position = async || -> Result<Option<crate::lsn::Lsn>, tokio_postgres::Error> {
            let row = self
                .session
                .query_one("SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn() END", &[]);
            Ok(row.await?.get(0))
        };
        let (before, began) = (position().await?, Instant::now());
        let row = self.session.query_one(SIZES, &[]).await?;
        let mut seen = Seen {
            table_bytes: unsigned(row.get(0)),
            index_bytes: unsigned(row.get(1)),
            workers: config.copy_workers,
            ..Seen::default()
        };
        if let Some(table) = row.get::<_, Option<String>>(2) {
            seen.sample = self.read(&table).await?;
        }
        tokio::time::sleep(watch(&seen).saturating_sub(began.elapsed())).await;
        if let (Some(before), Some(after)) = (before, position().await?) {
            seen.log = Some((after.0.saturating_sub(before.0), began.elapsed()));
        }
        let limit = self
            .session
            .query_opt(
                "SELECT setting::int8 * 1048576 FROM pg_settings WHERE name = 'max_slot_wal_keep_size' AND setting::int8 >= 0",
                &[],
            )
            .await?;
        let limits = [limit.map(|row| unsigned(row.get(0))), config.max_retained_wal_bytes];
        seen.limit = limits.into_iter().flatten().min();
        Ok(seen)
    }

    /// Reads the beginning of a table, as the copy does, over a connection that is then given up in the middle of it.
    async fn read(
        &self,
        table: &str,
    ) -> Result<Option<(String, u64, Duration)>, Box<dyn std::error::Error + Send + Sync>> {
        let source = self.servers.preflight.source;
        let mut connection = Box::pin(source.raw(&source.own_login(self.name, "validation"))).await?;
        connection.simple_query("SET lock_timeout = 1000").await?;
        let encoding = connection.simple_query("SELECT quote_literal(current_setting('server_encoding'))").await?;
        let encoding = encoding.into_iter().flatten().flatten().next().unwrap_or_default();
        let began = Instant::now();
        // Not COPY (SELECT …), which would take a view too that somebody has put in the table's place meanwhile.
        let copy = format!("COPY {table} TO STDOUT WITH (ENCODING {encoding})");
        let mut rows = match connection.copy_out(&copy).await {
            // Another rule says that it may not be read; or it is no table any more, or locked just now.
            Err(error) if error.sqlstate().is_some_and(|code| REFUSALS.contains(&code)) => return Ok(None),
            rows => rows?,
        };
        let mut bytes = 0_u64;
        while bytes < SAMPLE_BYTES {
            match rows.next().await? {
                Some(part) => bytes += part.len() as u64,
                None => break,
            }
        }
        Ok((bytes > 0).then(|| (table.to_owned(), bytes, began.elapsed())))
    }
}

/// How long the log is watched: who moves little need not wait for as long as that takes.
fn watch(seen: &Seen) -> Duration {
    let Some((_, bytes, took)) = &seen.sample else { return LEAST_WATCH };
    let seconds = seen.table_bytes / per_second(*bytes, *took).max(1);
    (Duration::from_secs(seconds) / WATCH_SHARE).clamp(LEAST_WATCH, WATCH)
}

/// The forecast, with what it rests on. Pure.
fn judge(seen: &Seen) -> (Outcome, Vec<String>) {
    let mut evidence = vec![format!(
        "{} of tables and {} of indexes",
        format_size(rounded(seen.table_bytes)),
        format_size(rounded(seen.index_bytes))
    )];
    let Some((table, bytes, took)) = &seen.sample else {
        evidence.push("there are no rows of which a sample could be read".to_owned());
        return (Outcome::Succeeded, evidence);
    };
    let pace = per_second(*bytes, *took).max(1);
    let seconds = seen.table_bytes / pace + 1;
    evidence.push(format!(
        "copy: {} or less by {} workers at the pace of one, {} a second, at which {} of {table} were read; writing and \
         building indexes are not in it and may take as long again",
        format_duration(Duration::from_secs(seconds)),
        seen.workers,
        format_size(rounded(pace)),
        format_size(rounded(*bytes)),
    ));
    let Some((grown, watched)) = seen.log else { return (Outcome::Succeeded, evidence) };
    let rate = per_second(grown, watched);
    // Writing and indexes as long again.
    let kept = rate.saturating_mul(2 * seconds);
    evidence.push(format!(
        "write-ahead log: {} a second, watched for {} ms; a slot would keep about {} in twice that time",
        format_size(rounded(rate)),
        watched.as_millis(),
        format_size(rounded(kept)),
    ));
    let Some(limit) = seen.limit else { return (Outcome::Succeeded, evidence) };
    evidence.push(format!("a slot may keep {}", format_size(limit)));
    (if kept > limit / 2 { Outcome::Warning } else { Outcome::Succeeded }, evidence)
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(micros)).unwrap_or(u64::MAX)
}

/// To the unit of which there are ten or more, so that no more is claimed than is known.
fn rounded(bytes: u64) -> u64 {
    let unit = (0..4).rev().map(|power| 1_u64 << (10 * power)).find(|unit| bytes / unit >= 10).unwrap_or(1);
    bytes / unit * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_outgrows_what_a_slot_may_keep_is_a_warning() {
        let seen = Seen {
            table_bytes: 100 << 30,
            index_bytes: 10 << 30,
            sample: Some(("big".to_owned(), 8 << 20, Duration::from_millis(100))),
            log: Some((1 << 20, Duration::from_secs(1))),
            limit: Some(100 << 30),
            workers: 4,
        };
        let (outcome, evidence) = judge(&seen);
        // 100 GB at 80 MB a second are 1280 seconds; 1 MB a second, for twice that, are 2.5 GB.
        assert_eq!(outcome, Outcome::Succeeded, "{evidence:#?}");
        assert!(evidence[2].contains("1MB a second") && evidence.len() == 4, "{evidence:#?}");
        assert_eq!(judge(&Seen { limit: Some(2 << 30), ..seen.clone() }).0, Outcome::Warning);
        assert_eq!(watch(&seen), WATCH);
        assert_eq!(watch(&Seen { table_bytes: 320 << 20, ..seen.clone() }), Duration::from_millis(250), "4 seconds");
        assert_eq!(watch(&Seen { table_bytes: 0, ..seen.clone() }), LEAST_WATCH);
        assert_eq!(judge(&Seen { log: None, ..seen.clone() }).1.len(), 2, "nothing is kept");
        assert_eq!(judge(&Seen { sample: None, ..seen }).0, Outcome::Succeeded, "nothing to copy");
    }
}
