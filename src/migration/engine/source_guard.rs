//! Bounds what the source keeps for migrations while nobody can work on them: the target is lost, and with it the
//! engine's lock and catalogue. That is when a slot keeps most, on a source that goes on in production.
//!
//! ```text
//! engine runs     source_watch (one for each actor)    at the limit the migration fails, recorded on the target
//! target lost     this, with what was known last       at the limit the slot goes; nothing can be recorded
//! target back     source_watch; the stream begins      finds its slot missing, and fails with what is to be done
//! ```
//!
//! It must never drop a slot that somebody reads: another process may have taken over, and brought things on since. So
//! that is asked by the statement that drops it. What is over the limit and read by nobody, that process would drop too.

use std::convert::Infallible;
use std::sync::Arc;

use super::error::WorkError;
use super::gauges::Gauges;
use super::live::{DatabaseLive, Live};
use super::ownership::Ownership;
use super::source_watch::{self, Finding, INTERVAL, SLOTS};
use super::{Engine, EngineDeps};
use crate::catalog::streams::Direction;
use crate::migration::stream::describe;
use crate::migration::view::Problem;
use crate::postgres::Control;

/// Slot $1, if it keeps $2 bytes or more and nobody reads it. One that somebody begins to read at this moment is
/// refused (55006).
const DROP: &str = "\
SELECT pg_catalog.pg_drop_replication_slot(s.slot_name) FROM pg_catalog.pg_replication_slots s
 WHERE s.slot_name = $1 AND NOT s.active
   AND pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), s.restart_lsn) >= $2::bigint";

/// See the module. Ends when the engine stops.
pub(super) async fn guard(engine: Arc<Engine>) {
    // What it drops it drops with one statement.
    tokio::select! {
        () = whenever_lost(&engine) => {}
        () = engine.deps.tasks.stopping() => {}
    }
}

async fn whenever_lost(engine: &Engine) {
    let mut owner = engine.owner.subscribe();
    let is_lost = |owner: &Ownership| matches!(owner, Ownership::No(_));
    loop {
        if owner.wait_for(is_lost).await.is_err() {
            return;
        }
        let lives = engine.entries().into_iter().map(|entry| entry.live).collect();
        let guard = SourceGuard { deps: &engine.deps, lives };
        // As above; whoever runs the engine now would drop it too.
        tokio::select! {
            never = guard.run() => match never {},
            () = async { drop(owner.wait_for(|owner| !is_lost(owner)).await) } => {}
        }
        guard.forget();
    }
}

struct SourceGuard<'a> {
    deps: &'a EngineDeps,
    /// The migrations as they were when the engine was lost.
    lives: Vec<Arc<Live>>,
}

impl SourceGuard<'_> {
    /// Looks at the source again and again. Dropping it at any moment loses nothing.
    async fn run(&self) -> Infallible {
        let mut connection = None;
        loop {
            if let Err(error) = self.look(&mut connection).await {
                connection = None;
                self.forget();
                tracing::debug!(error = describe(&error), "the source could not be looked at");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// What the slots keep is not known any more.
    fn forget(&self) {
        for (live, database) in self.databases() {
            self.gauges(live, database).slot(None, None);
        }
    }

    fn databases(&self) -> Vec<(&Live, &DatabaseLive)> {
        let mut databases = Vec::new();
        for live in &self.lives {
            databases.extend(live.databases.iter().map(move |database| (&**live, &**database)));
        }
        databases
    }

    fn gauges<'b>(&'b self, live: &'b Live, database: &'b DatabaseLive) -> Gauges<'b> {
        let (metrics, direction) = (&*self.deps.metrics, Direction::Forward);
        Gauges { metrics, migration: live.name(), database: &database.name, direction }
    }

    async fn look(&self, connection: &mut Option<Control>) -> Result<(), WorkError> {
        let names: Vec<String> = self.databases().iter().flat_map(|(_, database)| database.slots_on_source()).collect();
        if names.is_empty() {
            return Ok(());
        }
        let source = match connection {
            Some(source) => source,
            None => connection.insert(self.deps.source.control(&self.deps.config.control.database, "watch").await?),
        };
        let failed = |source| WorkError::Query { doing: "looking at what the source keeps", source };
        let rows = source.query(SLOTS, &[&names]).await.map_err(failed)?;
        let limit = self.deps.config.migration.max_retained_wal_bytes;
        for (live, database) in self.databases() {
            let streams = database.current().direction == Direction::Forward;
            for slot in database.slots_on_source() {
                let row = rows.iter().find(|row| row.get::<_, &str>(0) == slot);
                let wal = row.and_then(source_watch::kept);
                match wal {
                    // Of the others nothing is shown while the engine runs either.
                    Some(wal) if streams => {
                        source_watch::show(&self.deps.metrics, live.name(), database, wal, limit);
                    }
                    Some(_) => {}
                    None => self.gauges(live, database).slot(None, None),
                }
                if let (Some(wal), Some(limit)) = (wal, limit)
                    && wal.retained >= limit
                {
                    self.give_up(source, (live, database), &slot, wal.retained, limit).await?;
                }
            }
        }
        Ok(())
    }

    async fn give_up(
        &self,
        source: &Control,
        (live, database): (&Live, &DatabaseLive),
        slot: &str,
        retained: u64,
        limit: u64,
    ) -> Result<(), WorkError> {
        let bytes = i64::try_from(limit).unwrap_or(i64::MAX);
        let dropped = source.execute(DROP, &[&slot, &bytes]).await;
        let dropped = dropped.map_err(|source| WorkError::Query { doing: "dropping the replication slot", source })?;
        if dropped == 0 {
            // Somebody reads it.
            return Ok(());
        }
        let found = Finding::Exceeded { database: database.name.clone(), slot: slot.to_owned(), retained, limit };
        let hint = "bring the target back, cancel the migration, and create it again with --overwrite-target";
        let problem = Problem { hint: Some(hint.to_owned()), ..found.problem() };
        tracing::error!(
            migration = live.name(),
            database = database.name,
            slot,
            reason = problem.message,
            "the slot is dropped: the target could not be reached"
        );
        if database.current().direction == Direction::Forward {
            live.publish(|status| status.error = Some(problem));
        }
        Ok(())
    }
}
