//! Looks after the source while a migration weighs on it: what the slots make it keep, and how far its standbys are behind.
//!
//! It runs as long as the migration's actor does, also while the migration has failed and waits for somebody: its slots
//! still keep write-ahead log then. While there is no actor, because the target is lost, [`super::source_guard`] does
//! so.

use std::sync::Arc;
use std::time::Duration;

use super::context::Context;
use super::error::WorkError;
use super::gauges::Gauges;
use super::live::{DatabaseLive, SlotLive, Step};
use crate::catalog::streams::Direction;
use crate::config::units::format_size;
use crate::migration::copy::Traffic;
use crate::migration::state::State;
use crate::migration::stream::{StreamError, describe};
use crate::migration::view::Problem;
use crate::migration::wal_limit::{SlotWal, Verdict, judge};
use crate::postgres::Control;
use crate::telemetry::metrics::Metrics;

/// How often the source is looked at.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// Of the slots named in $1; read by [`kept`].
pub(super) const SLOTS: &str = "\
SELECT s.slot_name::text, pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), s.restart_lsn)::bigint,
       (pg_catalog.to_jsonb(s) ->> 'safe_wal_size')::bigint, pg_catalog.to_jsonb(s) ->> 'wal_status',
       pg_catalog.to_jsonb(s) ->> 'invalidation_reason'
  FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = ANY ($1)";

/// Physical standbys alone: a logical subscriber that is behind does not fall further behind by our reading. A server that
/// has nothing to send reports no lag.
const STANDBYS: &str = "\
SELECT coalesce(extract(epoch FROM max(r.replay_lag)), 0)::float8
  FROM pg_catalog.pg_stat_replication r
 WHERE r.state IN ('streaming', 'catchup') AND r.application_name !~ '^pgcutover/'
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')";

/// Why the migration cannot go on.
#[derive(Debug)]
pub(super) enum Finding {
    /// A slot keeps more than the configuration allows.
    Exceeded { database: String, slot: String, retained: u64, limit: u64 },
    /// A slot is of no use any more. While tables are copied nobody else would notice.
    Lost { database: String, error: WorkError },
}

impl Finding {
    /// For the operator.
    pub(super) fn problem(&self) -> Problem {
        let (database, slot, retained, limit) = match self {
            Self::Exceeded { database, slot, retained, limit } => (database, slot, retained, limit),
            Self::Lost { database, error } => return error.problem(Some(database)),
        };
        Problem {
            code: "wal_limit".to_owned(),
            message: format!(
                "replication slot {slot} made the source keep {} MB of write-ahead log, and migration.max_retained_wal is {}: the slot was dropped, before the source's disk fills",
                retained >> 20,
                format_size(*limit)
            ),
            object: Some(format!("database {database}")),
            hint: Some(
                "cancel the migration; raise migration.max_retained_wal if the source has room, or choose a quieter hour, and create it again with --overwrite-target"
                    .to_owned(),
            ),
        }
    }
}

/// Resolves when a slot keeps too much or is lost. Can be begun again at any time.
pub(super) async fn watch(context: Arc<Context>) -> Finding {
    let mut connection = None;
    loop {
        let state = context.live.state();
        let watched = (state.is_active() || state == State::Failed) && state.direction() == Direction::Forward;
        // A cutover ends within seconds, one way or the other; the slot is looked at again afterwards.
        if watched && state != State::CompletingMigration {
            match look(&context, &mut connection).await {
                Ok(Some(finding)) => return finding,
                Ok(None) => {}
                Err(error) => {
                    connection = None;
                    tracing::debug!(
                        migration = context.live.name(),
                        error = describe(&error),
                        "the source could not be looked at"
                    );
                }
            }
        } else {
            connection = None;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn look(context: &Context, connection: &mut Option<Control>) -> Result<Option<Finding>, WorkError> {
    let with_slots: Vec<_> =
        context.live.databases.iter().filter(|database| database.step() >= Step::Published).collect();
    if with_slots.is_empty() {
        return Ok(None);
    }
    let source = match connection {
        Some(source) => source,
        None => connection.insert(context.source_control(&context.config.control.database, "watch").await?),
    };
    let failed = |source| WorkError::Query { doing: "looking at what the source keeps", source };
    let names: Vec<String> = with_slots.iter().map(|database| database.current().slot).collect();
    let rows = source.query(SLOTS, &[&names]).await.map_err(failed)?;
    let limit = context.config.migration.max_retained_wal_bytes;
    let mut worst = Verdict::Fine;
    for row in rows {
        let name: &str = row.get(0);
        let Some(index) = names.iter().position(|known| known == name) else { continue };
        let Some(database) = with_slots.get(index) else { continue };
        if row.get::<_, Option<&str>>(3) == Some("lost") {
            // It keeps nothing. Who has been told of it once knows.
            if context.live.state() == State::Failed {
                continue;
            }
            let why = row.get::<_, Option<&str>>(4).unwrap_or("lost").to_owned();
            let error = StreamError::SlotLost { slot: name.to_owned(), why };
            return Ok(Some(Finding::Lost { database: database.name.clone(), error: error.into() }));
        }
        let Some(wal) = kept(&row) else { continue };
        let verdict = show(&context.metrics, context.live.name(), database, wal, limit);
        worst = worst.max(verdict);
        if let (Verdict::Exceeded, Some(limit)) = (verdict, limit) {
            let (database, slot) = (database.name.clone(), name.to_owned());
            return Ok(Some(Finding::Exceeded { database, slot, retained: wal.retained, limit }));
        }
    }
    let traffic = if worst >= Verdict::Warning { Traffic::Unlimited } else { standbys(context, source).await? };
    context.workers.direct(traffic);
    Ok(None)
}

/// What a slot keeps, by its row of [`SLOTS`]; none: nothing.
pub(super) fn kept(row: &tokio_postgres::Row) -> Option<SlotWal> {
    let unsigned = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
    if row.get::<_, Option<&str>>(3) == Some("lost") {
        return None;
    }
    let retained = row.get::<_, Option<i64>>(1).map(unsigned)?;
    Some(SlotWal { retained, safe: row.get::<_, Option<i64>>(2).map(unsigned) })
}

/// Shows what the slot of a stream keeps, and says so in the log when that is, or is no longer, much.
pub(super) fn show(
    metrics: &Metrics,
    migration: &str,
    database: &DatabaseLive,
    wal: SlotWal,
    limit: Option<u64>,
) -> Verdict {
    let verdict = judge(wal, limit);
    if database.show_slot(SlotLive { wal, limit, warning: verdict >= Verdict::Warning }) {
        let (retained, safe) = (wal.retained, wal.safe);
        if verdict >= Verdict::Warning {
            tracing::warn!(
                migration,
                database = database.name,
                retained,
                ?safe,
                ?limit,
                "the source keeps much write-ahead log for the migration; no limit on the copy's speed is in force"
            );
        } else {
            tracing::info!(migration, database = database.name, retained, "the source keeps less again");
        }
    }
    Gauges { metrics, migration, database: &database.name, direction: Direction::Forward }.slot(Some(wal), limit);
    verdict
}

async fn standbys(context: &Context, source: &Control) -> Result<Traffic, WorkError> {
    let Some(most) = context.config.migration.max_standby_lag else { return Ok(Traffic::Limited) };
    let row = source.query_one(STANDBYS, &[]).await;
    let row = row.map_err(|source| WorkError::Query { doing: "looking at the source's standbys", source })?;
    Ok(if row.get::<_, f64>(0) > most.as_secs_f64() { Traffic::Halted } else { Traffic::Limited })
}
