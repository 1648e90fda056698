//! Verifies a migration: every table of every database against the source, with both live. What is found is durable table
//! by table, and range by range of large ones, so that an interrupted verification goes on where it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;

use super::live::{DatabaseLive, Live};
use super::table_live::Verified;
use super::{Engine, EngineError};
use crate::catalog::door::Door;
use crate::catalog::migrations::{CatalogError, MigrationCatalog};
use crate::catalog::streams::Direction;
use crate::catalog::verification::BegunRow;
use crate::ident::QualifiedName;
use crate::migration::state::State;
use crate::migration::verify::align::Sides;
use crate::migration::verify::chunks::{Begun, ChunkResult};
use crate::migration::verify::identity::{self, Identities};
use crate::migration::verify::{self, Damaged, Observer, TableResult, VerifyContext, definitions};
use crate::migration::view::{Mode, VerificationView, VerifiedDatabase, VerifyReport};
use crate::switch::Epoch;
use crate::telemetry::metrics::Metrics;

/// Which tables are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// All of them; those that an interrupted run has found equal, not long ago, are not read again.
    Every,
    /// Those that were never compared, that differed, or that were written to, rewritten or altered since.
    Changed,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
struct Work {
    scope: Scope,
    /// Of the stream: after a cutover the target is the one that is followed.
    direction: Direction,
    /// Whether there is one.
    streams: bool,
    damaged: Damaged,
}

/// What is to be read of one database.
struct DatabaseWork {
    database: Arc<DatabaseLive>,
    sides: Sides,
    wanted: Vec<QualifiedName>,
    /// Those of them that an interrupted run has come to.
    begun: HashMap<QualifiedName, Begun>,
    /// What tables are on both servers: looked up before anything is read.
    identities: HashMap<QualifiedName, Identities>,
}

impl Work {
    fn new(scope: Scope, direction: Direction, streams: bool) -> Self {
        Self { scope, direction, streams, damaged: Damaged::Listed }
    }

    /// Tells the stream that is compared along from those before and after it.
    fn stream(&self, live: &Live) -> String {
        let epochs = live.databases.iter().map(|database| database.current().epoch.to_string());
        format!("{} {}", self.direction.as_str(), epochs.collect::<Vec<_>>().join(" "))
    }

    /// What an interrupted run has left of large tables. Ranges that differ are read again: they may have been mended.
    fn resumed(row: BegunRow) -> Option<(QualifiedName, Begun)> {
        let mut begun: Begun = serde_json::from_value(row.plan).ok()?;
        let chunk = |(number, result)| Some((number, serde_json::from_value::<ChunkResult>(result).ok()?));
        let keeps = |(_, result): &(u32, ChunkResult)| result.differences == 0;
        begun.done = row.chunks.into_iter().filter_map(chunk).filter(keeps).collect();
        Some((row.table, begun))
    }
}

impl Engine {
    /// Compares source and target, table by table and definition by definition. Comes back when all of it was compared.
    pub async fn verify(&self, name: &str) -> Result<VerifyReport, EngineError> {
        self.compare(name, Scope::Every, Damaged::Listed).await
    }

    /// The same, and writes the rows of the server that is in use over those of the other that differ.
    pub async fn repair(&self, name: &str) -> Result<VerifyReport, EngineError> {
        self.compare(name, Scope::Every, Damaged::Repaired).await
    }

    /// Makes sure that every table was found equal since it was last written to: compares again what was not.
    pub async fn verify_changed(&self, name: &str) -> Result<VerifyReport, EngineError> {
        self.compare(name, Scope::Changed, Damaged::Listed).await
    }

    /// What the last verification found, also after a restart. Of one that has not come to its end, where none had before,
    /// the tables that it has compared. `None`: nothing was compared.
    pub async fn verification(&self, name: &str) -> Result<Option<VerifyReport>, EngineError> {
        let live = self.entry(name)?.live;
        if let Some(report) = live.verified() {
            return Ok(Some(report));
        }
        let (catalog, _actors) = self.owned()?;
        if let Some(report) = catalog.report(name).await?.and_then(|kept| serde_json::from_value(kept).ok()) {
            return Ok(Some(report));
        }
        let mut report = VerifyReport::default();
        for row in catalog.verified(name).await? {
            if let Ok(result) = serde_json::from_value(row.result) {
                report.add_table(&row.database, result);
            }
        }
        Ok(Some(report).filter(|report| report.tables_compared > 0))
    }

    async fn compare(&self, name: &str, scope: Scope, damaged: Damaged) -> Result<VerifyReport, EngineError> {
        let (catalog, actors) = self.owned()?;
        let live = self.entry(name)?.live;
        let Ok(_alone) = live.verifying.try_lock() else {
            return Err(EngineError::BadRequest(format!("migration {name:?} is being verified already")));
        };
        let state = live.state();
        let streams = live.databases.iter().all(|database| database.current().flows());
        let work = match (state, live.spec.mode) {
            (State::WaitingForCutoverTrigger, _) => Work { damaged, ..Work::new(scope, Direction::Forward, true) },
            (State::Completed, Mode::Online) if streams => {
                Work { damaged, ..Work::new(scope, Direction::Reverse, true) }
            }
            (State::Completed, Mode::Offline) if damaged == Damaged::Listed => {
                Work::new(scope, Direction::Forward, false)
            }
            (State::Completed, Mode::Offline) => {
                let message = format!(
                    "migration {name:?} is complete and follows nothing any more: its target may have rows of its own, which a repair would remove"
                );
                return Err(EngineError::BadRequest(message));
            }
            _ => {
                return Err(EngineError::BadRequest(format!(
                    "migration {name:?} is {state}; it can be verified while it waits for its cutover, as long as it can be rolled back, or when an offline migration is complete"
                )));
            }
        };
        let mut changes = self.changes();
        // What was compared is on record; dropping the rest loses nothing.
        tokio::select! {
            report = Box::pin(self.compare_databases(&live, &catalog, work)) => report,
            () = async { while live.state() == state && changes.changed().await.is_ok() {} } => {
                live.set_verification(None);
                Err(EngineError::Unavailable(format!("migration {name:?} is {} now", live.state())))
            }
            // With them goes the stream whose gate this holds; another engine, or this one later on, begins with new ones.
            () = actors.stopping() => {
                live.set_verification(None);
                Err(EngineError::Unavailable("it is stopping, or has lost its lock".to_owned()))
            }
        }
    }

    async fn compare_databases(
        &self,
        live: &Arc<Live>,
        catalog: &MigrationCatalog,
        order: Work,
    ) -> Result<VerifyReport, EngineError> {
        let scope = order.scope;
        let began = tokio::time::Instant::now();
        if scope == Scope::Every {
            catalog.begin_verification(live.name(), &order.stream(live)).await?;
        }
        let known = catalog.verified(live.name()).await?;
        let mut left = if scope == Scope::Every { catalog.begun(live.name()).await? } else { Vec::new() };
        let mut work = Vec::new();
        let (mut report, mut bytes_total, mut bytes_before, mut rows_before) = (VerifyReport::default(), 0, 0, 0);
        for database in &live.databases {
            let mut wanted = Vec::new();
            let here = left.extract_if(.., |row| row.database == database.name);
            let begun: HashMap<QualifiedName, Begun> = here.filter_map(Work::resumed).collect();
            let sides = self.sides(database, order);
            let looked_up = identity::identities(&sides, &database.table_names()).await;
            let failed = |source| EngineError::Verify { database: database.name.clone(), source: Box::new(source) };
            let identities = looked_up.map_err(failed)?;
            for (table, bytes) in database.table_sizes() {
                let row = known.iter().find(|row| row.database == database.name && row.table == table);
                let result = row.and_then(|row| serde_json::from_value::<TableResult>(row.result.clone()).ok());
                let (verified, now) = (database.verified(&table), identities.get(&table));
                let is_same = |verified: &Verified| Some(&verified.identities) == now;
                // What differed may have been mended, or is to be.
                let still = |result: &TableResult| {
                    result.is_equal()
                        && match scope {
                            // Of what an earlier process has compared it is not known.
                            Scope::Every => verified.as_ref().is_none_or(is_same),
                            Scope::Changed => verified.as_ref().is_some_and(|verified| {
                                is_same(verified) && verified.changes == database.changes(&table)
                            }),
                        }
                };
                match result.filter(still) {
                    Some(result) => report.add_table(&database.name, result),
                    None => {
                        bytes_total += bytes;
                        if let Some(begun) = begun.get(&table) {
                            let done = begun.sum();
                            bytes_before += bytes / (begun.bounds.len() as u64 + 1) * begun.done.len() as u64;
                            rows_before += done.rows;
                        }
                        wanted.push(table);
                    }
                }
            }
            work.push(DatabaseWork { database: database.clone(), sides, wanted, begun, identities });
        }
        let progress = Arc::new(Progress {
            bytes: AtomicU64::new(bytes_before),
            bytes_before,
            rows: AtomicU64::new(rows_before),
            tables: AtomicU64::new(report.tables_compared),
            differences: AtomicU64::new(report.differences),
            bytes_total,
            tables_total: live.databases.iter().map(|database| database.table_sizes().len() as u64).sum(),
            began,
            live: live.clone(),
            metrics: self.deps.metrics.clone(),
        });
        progress.publish();
        let outcome = self.compare_tables(live, catalog, work, order, &progress, &mut report).await;
        live.set_verification(None);
        outcome?;
        catalog.keep_report(live.name(), &serde_json::to_value(&report).unwrap_or_default()).await?;
        // After the report: a run that is not marked as complete is gone on with.
        if scope == Scope::Every {
            catalog.end_verification(live.name()).await?;
        }
        tracing::info!(
            migration = live.name(),
            tables = report.tables_compared,
            rows = report.rows_compared,
            differences = report.differences,
            "verified"
        );
        live.set_verified(report.clone());
        Ok(report)
    }

    async fn compare_tables(
        &self,
        live: &Arc<Live>,
        catalog: &MigrationCatalog,
        work: Vec<DatabaseWork>,
        order: Work,
        progress: &Arc<Progress>,
        report: &mut VerifyReport,
    ) -> Result<(), EngineError> {
        let config = &self.deps.config.migration;
        for DatabaseWork { database, sides, wanted, begun, identities } in work {
            let verified = |table: &QualifiedName| {
                let identities = identities.get(table)?.clone();
                Some((table.clone(), Verified { changes: database.changes(table), identities }))
            };
            let keeper = Keeper {
                progress: progress.clone(),
                catalog: catalog.clone(),
                migration: live.name().to_owned(),
                // Counted before the snapshot: a change that comes in between is compared, and asked for once more.
                // Of what was compared earlier nobody counts.
                verified: wanted
                    .iter()
                    .filter(|table| begun.get(table).is_none_or(|begun| begun.done.is_empty()))
                    .filter_map(verified)
                    .collect(),
                database: database.clone(),
            };
            let context = VerifyContext {
                sides,
                damaged: order.damaged,
                workers: config.verify_workers,
                part_bytes: config.verify_part_bytes,
                load_percent: config.verify_load_percent,
                busy_percent: config.verify_busy_percent,
                observer: Arc::new(keeper),
            };
            let failed = |source| EngineError::Verify { database: database.name.clone(), source: Box::new(source) };
            for result in verify::tables(&context, wanted, begun).await.map_err(failed)? {
                report.add_table(&database.name, result);
            }
            let found = definitions::compare(&context.sides).await.map_err(failed)?;
            report.add_definitions(VerifiedDatabase { database: database.name.clone(), definitions: found });
        }
        Ok(())
    }

    fn sides(&self, database: &DatabaseLive, order: Work) -> Sides {
        let (source, target) = self.connectors();
        let (source, target) = order.direction.ends(&source, &target);
        Sides {
            source: source.clone(),
            target: target.clone(),
            database: database.name.clone(),
            gate: order.streams.then(|| database.stream.gate.clone()),
            // A server that was left is shut.
            door: (database.current().epoch > Epoch(0)).then(|| {
                let door = Door::new(target, &self.deps.config.control.database, &database.name, &database.turns);
                Arc::new(tokio::sync::Mutex::new(door))
            }),
        }
    }

    /// Where a cutover is to find tables equal: none of them was altered since it was compared. Asked once more when the
    /// cutover watches definitions itself ([`crate::migration::standstill`]); until then anybody may have altered some.
    /// A table that was emptied was written to, and the stream brings that as it does any other row.
    pub(super) async fn must_be_as_verified(&self, live: &Live) -> Result<(), EngineError> {
        if !self.deps.config.cutover.require_verified || live.state().direction() != Direction::Forward {
            return Ok(());
        }
        for database in &live.databases {
            let verified: Vec<(QualifiedName, Verified)> = database
                .table_names()
                .into_iter()
                .filter_map(|table| database.verified(&table).map(|verified| (table, verified)))
                .collect();
            let tables: Vec<QualifiedName> = verified.iter().map(|(table, _)| table.clone()).collect();
            // A server that was left is open to us by now.
            let sides =
                Sides { door: None, ..self.sides(database, Work::new(Scope::Changed, Direction::Forward, true)) };
            let failed = |source| EngineError::Verify { database: database.name.clone(), source: Box::new(source) };
            let now = identity::identities(&sides, &tables).await.map_err(failed)?;
            let altered = |(table, verified): &&(QualifiedName, Verified)| {
                now.get(table).is_none_or(|now| verified.identities.is_altered(now))
            };
            if let Some((table, _)) = verified.iter().find(altered) {
                return Err(EngineError::Altered { database: database.name.clone(), table: table.clone() });
            }
        }
        Ok(())
    }
}

/// How far a verification is.
struct Progress {
    bytes: AtomicU64,
    /// Read by a run that was interrupted.
    bytes_before: u64,
    rows: AtomicU64,
    tables: AtomicU64,
    differences: AtomicU64,
    bytes_total: u64,
    tables_total: u64,
    began: tokio::time::Instant,
    live: Arc<Live>,
    metrics: Arc<Metrics>,
}

impl Progress {
    fn publish(&self) {
        let done = self.bytes.load(Ordering::Relaxed);
        let elapsed = self.began.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let eta = done
            .checked_sub(self.bytes_before)
            .filter(|read| *read > 0)
            .map(|read| elapsed * self.bytes_total.saturating_sub(done) as f64 / read as f64);
        self.live.set_verification(Some(VerificationView {
            tables_compared: self.tables.load(Ordering::Relaxed),
            tables_total: self.tables_total,
            rows_compared: self.rows.load(Ordering::Relaxed),
            bytes_compared: done,
            bytes_total: self.bytes_total,
            differences: self.differences.load(Ordering::Relaxed),
            eta_seconds: eta,
        }));
    }
}

/// Keeps the results of one database.
struct Keeper {
    progress: Arc<Progress>,
    catalog: MigrationCatalog,
    migration: String,
    database: Arc<DatabaseLive>,
    /// What each table was when it was about to be read. Those that an earlier process has begun are not in it.
    verified: HashMap<QualifiedName, Verified>,
}

#[async_trait]
impl Observer for Keeper {
    fn moved(&self, rows: u64, bytes: u64) {
        self.progress.rows.fetch_add(rows, Ordering::Relaxed);
        self.progress.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.progress.metrics.verify_rows.inc_by(rows);
        self.progress.publish();
    }

    async fn repairing(&self, table: &QualifiedName, what: &serde_json::Value) -> Result<(), CatalogError> {
        self.catalog.repairing(&self.migration, &self.database.name, table, what).await
    }

    async fn begun(&self, table: &QualifiedName, begun: &Begun) -> Result<(), CatalogError> {
        let plan = serde_json::to_value(begun).unwrap_or_default();
        self.catalog.begin_table(&self.migration, &self.database.name, table, &plan).await
    }

    async fn chunk(&self, table: &QualifiedName, number: u32, result: &ChunkResult) -> Result<(), CatalogError> {
        let result = serde_json::to_value(result).unwrap_or_default();
        self.catalog.set_chunk(&self.migration, &self.database.name, table, number, &result).await
    }

    async fn finished(&self, result: &TableResult) -> Result<(), CatalogError> {
        let table = result.table();
        let json = serde_json::to_value(result).unwrap_or_default();
        self.catalog.set_verified(&self.migration, &self.database.name, &table, &json).await?;
        self.database.update_table(&table, |live| {
            live.verification = Some(result.summary());
            live.verified = self.verified.get(&table).cloned();
        });
        self.progress.metrics.verify_mismatches.inc_by(result.differences);
        self.progress.tables.fetch_add(1, Ordering::Relaxed);
        self.progress.differences.fetch_add(result.differences, Ordering::Relaxed);
        self.progress.publish();
        Ok(())
    }
}
