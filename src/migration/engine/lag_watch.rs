//! How far the stream of a database is behind, measured all the time, whichever way it flows.

use std::time::Duration;

use super::context::Context;
use super::error::WorkError;
use super::gauges::Gauges;
use super::live::DatabaseLive;
use crate::catalog::streams::Direction;
use crate::migration::stream::describe;
use crate::migration::wal_limit::SlotWal;
use crate::postgres::Control;

/// How often the position of the server that the changes come from is looked at.
const LAG_INTERVAL: Duration = Duration::from_millis(500);

/// See the module.
pub(super) struct Watch<'a> {
    pub(super) context: &'a Context,
    pub(super) live: &'a DatabaseLive,
}

impl Watch<'_> {
    /// A look that fails makes the lag unknown, and is tried again.
    pub(super) async fn run(&self) -> WorkError {
        let mut connection = None;
        loop {
            if let Err(error) = self.look(&mut connection).await {
                connection = None;
                self.live.forget_lag();
                self.gauges().clear();
                if error.is_fenced() {
                    return error;
                }
                tracing::debug!(database = self.live.name, error = describe(&error), "the lag could not be measured");
            }
            tokio::time::sleep(LAG_INTERVAL).await;
        }
    }

    fn gauges(&self) -> Gauges<'_> {
        let direction = self.live.current().direction;
        Gauges {
            metrics: &self.context.metrics,
            migration: self.context.live.name(),
            database: &self.live.name,
            direction,
        }
    }

    async fn look(&self, connection: &mut Option<Control>) -> Result<(), WorkError> {
        let current = self.live.current();
        let from = match connection {
            Some(from) => from,
            None => connection.insert(match current.direction {
                Direction::Forward => self.context.source_control(&self.live.name, "lag").await?,
                Direction::Reverse => self.context.target.control(&self.live.name, "lag").await?,
            }),
        };
        let row = from
            .query_one(
                "SELECT pg_catalog.pg_current_wal_flush_lsn(),
                        (SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_flush_lsn(), s.restart_lsn)::bigint
                           FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = $1),
                        (SELECT (pg_catalog.to_jsonb(s) ->> 'safe_wal_size')::bigint
                           FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = $1)",
                &[&current.slot],
            )
            .await
            .map_err(|source| WorkError::Query { doing: "looking at the position of the stream's server", source })?;
        self.live.observe(row.get(0));
        let gauges = self.gauges();
        gauges.lag(self.live.lag());
        if current.direction == Direction::Reverse {
            // The source's own slots are looked at by `source_watch`, which knows what they may keep.
            let unsigned = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
            let retained = row.get::<_, Option<i64>>(1).map(unsigned);
            let safe = row.get::<_, Option<i64>>(2).map(unsigned);
            gauges.slot(retained.map(|retained| SlotWal { retained, safe }), None);
        }
        Ok(())
    }
}
