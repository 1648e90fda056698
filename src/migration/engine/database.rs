//! The work on one database: from nothing to a stream that follows the source. Every step can be done again; what is
//! done is in the catalogue, so a restart goes on behind the last completed one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::context::{Context, must_lead_away};
use super::definitions;
use super::error::WorkError;
use super::lag_watch::Watch;
use super::live::{DatabaseLive, Step};
use super::recorder::Recorder;
use super::synchronise::keep_carried_database;
use crate::catalog::door::Door;
use crate::catalog::journal::{Journal, MadeObject, Side};
use crate::catalog::progress::{self, LANE};
use crate::catalog::streams::progress_key;
use crate::catalog::tables::{DatabaseRow, TableRow, TableState};
use crate::catalog::{Place, bootstrap};
use crate::config::Ddl;
use crate::ident::{QualifiedName, quote_ident, quote_literal};
use crate::lsn::Lsn;
use crate::migration::backoff::Backoff;
use crate::migration::copy::{self, CopyContext, SourceTable, Stage};
use crate::migration::ddl::carry::{self, COMMANDS};
use crate::migration::ddl::{self, DdlError};
use crate::migration::identity::{self, Remedy};
use crate::migration::publication::{Names, Renames};
use crate::migration::schema::{self, Archive, Existing, PgDump, RestoreFailure, RestoreTarget};
use crate::migration::sequences::SequencePair;
use crate::migration::snapshot::HandOver;
use crate::migration::stream::{self, StreamContext, describe, history};
use crate::migration::verify::align::{self, Sides, Still};
use crate::migration::view::Mode;
use crate::migration::{late, made, materialized, publication, unstreamed};
use crate::postgres::Control;
use crate::postgres::walsender::ReplicationConnection;
use crate::sqlstate;
use crate::switch::Epoch;

/// How often it is looked whether the target has caught up.
const LAG_INTERVAL: Duration = Duration::from_millis(500);

/// The worker of one database.
pub(super) struct DatabaseWork {
    pub(super) context: Arc<Context>,
    pub(super) live: Arc<DatabaseLive>,
    pub(super) pg_dump: PgDump,
    /// Set once the database is ready to be cut over.
    pub(super) ready: watch::Sender<bool>,
}

impl DatabaseWork {
    /// Works until the offline copy is complete, or for ever; interrupted work is begun again.
    pub(super) async fn run(&self) -> Result<(), WorkError> {
        let mut backoff = Backoff::of_work();
        loop {
            let step = self.live.step();
            let error = match Box::pin(self.once()).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if !error.is_transient() {
                self.live.broken.send_replace(Some(describe(&error)));
                return Err(error);
            }
            if self.live.step() > step {
                backoff.progressed();
            }
            let (retries, wait) = backoff.failed();
            let last_error = describe(&error);
            tracing::warn!(
                migration = self.context.live.name(),
                database = self.live.name,
                retries,
                error = last_error,
                "the work was interrupted and begins again"
            );
            self.live.stream.trouble.send_replace(Some(stream::Trouble { retries, last_error }));
            tokio::time::sleep(wait).await;
        }
    }

    async fn once(&self) -> Result<(), WorkError> {
        let mut row = self.row().await?;
        self.live.set_step(Step::parse(&row.step).unwrap_or(Step::Waiting));
        if self.live.step() < Step::Published {
            Box::pin(self.publish(&mut row)).await?;
        }
        if row.slot.is_empty() {
            return Err(WorkError::NoStream(row.database));
        }
        let (Some(slot_start), Some(barrier)) = (row.slot_start, row.barrier) else {
            let what = format!("database {} without its slot's start", row.database);
            return Err(crate::catalog::migrations::CatalogError::Unreadable { what }.into());
        };
        if self.live.step() < Step::Copied {
            self.slot_is_there(&row).await?;
        }
        let mut archive = None;
        if self.live.step() < Step::Restored {
            if self.context.live.spec.overwrite_target {
                // What is there is not dropped for definitions that nobody has.
                self.archive(&mut archive).await?;
            }
            // The one keeps the source busy, the other the target. Both are waited for: neither is left half-way.
            let (dumped, made) =
                tokio::join!(self.archive(&mut archive), Box::pin(self.make_database(&row, slot_start)));
            made?;
            Box::pin(self.restore(&mut row, dumped?)).await?;
        }
        if self.live.step() < Step::Copied {
            let archive = self.archive(&mut archive).await?;
            Box::pin(self.copy(&mut row, barrier, archive)).await?;
        }
        let tables = self.context.catalog.tables(self.migration(), &row.database).await?;
        self.live.load_tables(&tables);
        if self.is_past_offline_stream().await? {
            return self.end_offline().await;
        }
        let stream = self.stream_context(&row, slot_start, &tables)?;
        let last = stream.hand_overs.values().map(|hand_over| hand_over.position).max().unwrap_or(Lsn::ZERO);
        let watch = Watch { context: &self.context, live: &self.live };
        // The stream never ends by itself; the work beside it ends when an offline copy is complete.
        tokio::select! {
            error = stream::run(&stream, &self.live.stream) => return Err(error.into()),
            done = self.finish(row, last, archive) => done?,
            error = watch.run() => return Err(error),
        }
        self.end_offline().await
    }

    /// Rows that no stream can bring up to date are not worth copying.
    async fn slot_is_there(&self, row: &DatabaseRow) -> Result<(), WorkError> {
        let source = self.context.source_control(&row.database, "slot").await?;
        let found = source
            .query_opt("SELECT FROM pg_catalog.pg_replication_slots WHERE slot_name = $1", &[&row.slot])
            .await
            .map_err(|source| WorkError::Query { doing: "looking for the slot on the source", source })?;
        match found {
            Some(_) => Ok(()),
            None => Err(stream::StreamError::SlotMissing { slot: row.slot.clone() }.into()),
        }
    }

    fn migration(&self) -> &str {
        self.context.live.name()
    }

    async fn row(&self) -> Result<DatabaseRow, WorkError> {
        let rows = self.context.catalog.databases(self.migration()).await?;
        rows.into_iter().find(|row| row.database == self.live.name).ok_or_else(|| {
            let what = format!("no row for database {}", self.live.name);
            crate::catalog::migrations::CatalogError::Unreadable { what }.into()
        })
    }

    /// Makes a step durable, then visible.
    async fn completed(&self, row: &mut DatabaseRow, step: Step) -> Result<(), WorkError> {
        row.step = step.as_str().to_owned();
        self.context.catalog.set_database(self.migration(), row).await?;
        self.live.set_step(step);
        tracing::info!(migration = self.migration(), database = row.database, step = step.as_str(), "step completed");
        Ok(())
    }

    fn journal(&self) -> Journal {
        Journal::new(self.context.catalog.clone(), self.migration())
    }

    fn made(&self, side: Side, kind: &str, name: &str, undo: String) -> MadeObject {
        MadeObject {
            side,
            database: Some(self.live.name.clone()),
            kind: kind.to_owned(),
            name: name.to_owned(),
            undo: Some(undo),
            note: String::new(),
        }
    }

    /// Event triggers, replica identities, publication, slot, start of the stream, barrier; in this order.
    async fn publish(&self, row: &mut DatabaseRow) -> Result<(), WorkError> {
        let journal = self.journal();
        let mut source = self.context.source_control(&row.database, "publish").await?;
        let ours = "DROP TABLE IF EXISTS pgcutover.marker, pgcutover.boundary, pgcutover.progress, pgcutover.sequence_position";
        let parts = ["marker", "boundary", "progress", "sequence_positions"];
        let undo = self.context.undo_schema(&row.database, ours, &parts);
        journal.record(&self.made(Side::Source, "schema", "pgcutover", undo)).await?;
        bootstrap(&source, Place::SourceDatabase).await?;

        match self.context.config.migration.ddl {
            Ddl::Refuse => self.refuse_ddl(&source, &journal).await?,
            Ddl::Apply => self.record_ddl(&mut source, &journal, &row.publication).await?,
            Ddl::Detect => {}
        }
        let slot_timeout = self.context.config.migration.slot_timeout;
        if self.context.config.migration.ddl != Ddl::Detect {
            // What they have changed is in no list yet, and no trigger has seen it.
            let whom = publication::Outlast::WritersAndWaiters;
            publication::outlast(&mut source, whom, "the event triggers", slot_timeout).await?;
        }
        let identities = identity::plan(&source, self.context.config.migration.without_identity).await?;
        let refused = identities.iter().filter(|table| table.remedy == Remedy::Refuse);
        let refused: Vec<String> = refused.map(|table| table.table.to_string()).collect();
        if !refused.is_empty() {
            return Err(WorkError::NoIdentity(refused));
        }
        let lock_timeout = self.context.config.migration.lock_timeout;
        for table in &identities {
            identity::mend(Side::Source, &source, &row.database, table, lock_timeout, &journal).await?;
        }
        self.context.failpoints.hit("engine.after_identities").await?;

        let tables = copy::list_tables(&source).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let listed: Vec<(QualifiedName, i64, i64)> = tables
            .iter()
            .map(|table| (table.name.clone(), table.rows_estimate.map_or(0, signed), signed(table.bytes)))
            .collect();
        self.context.catalog.add_tables(self.migration(), &row.database, &listed).await?;
        self.live.load_tables(&self.context.catalog.tables(self.migration(), &row.database).await?);

        let undo = publication::drop_publication_sql(&row.publication);
        let made = self.made(Side::Source, "publication", &row.publication, undo);
        self.not_somebody_elses(&source, &journal, &made).await?;
        journal.record(&made).await?;
        let made = self.made(Side::Source, "slot", &row.slot, publication::drop_slot_sql(&row.slot));
        journal.record(&made).await?;
        // A slot from before a crash is older than the publication that is made now.
        publication::drop_slot(&source, &row.slot).await?;
        let mut names: Vec<QualifiedName> = tables.into_iter().map(|table| table.name).collect();
        let mut renames = Renames::Unforeseen;
        if self.context.config.migration.ddl == Ddl::Apply {
            names.push(QualifiedName::new(COMMANDS.0, COMMANDS.1));
            renames = Renames::Carried;
        }
        publication::create(&mut source, &row.publication, &names, renames, lock_timeout).await?;
        self.context.failpoints.hit("engine.after_publication").await?;

        let mut replication = ReplicationConnection::connect(&self.context.source, &row.database).await?;
        replication.create_logical_slot(&row.slot, slot_timeout).await?;
        replication.terminate().await?;
        self.context.failpoints.hit("engine.after_slot").await?;
        let start = publication::start(&mut source, slot_timeout).await?;
        (row.slot_start, row.barrier) = (Some(start.position), Some(start.barrier));
        self.context.failpoints.hit("engine.after_barrier").await?;
        self.completed(row, Step::Published).await
    }

    /// Has the source record changes of definitions.
    async fn record_ddl(&self, source: &mut Control, journal: &Journal, publication: &str) -> Result<(), WorkError> {
        let undo = carry::UNDO_IDENTITIES_SQL.to_owned();
        journal.record(&self.made(Side::Source, made::REPLICA_IDENTITY, "pgcutover.full_identity", undo)).await?;
        journal.record(&self.made(Side::Source, "event_trigger", "pgcutover_ddl", ddl::UNDO_SQL.to_owned())).await?;
        definitions::record(&self.context, source, publication).await
    }

    /// Has the source refuse changes of definitions, where the role may do that.
    async fn refuse_ddl(&self, source: &Control, journal: &Journal) -> Result<(), WorkError> {
        let undo = ddl::UNDO_SQL.to_owned();
        journal.record(&self.made(Side::Source, "event_trigger", "pgcutover_ddl", undo)).await?;
        match ddl::refuse(&**source, self.migration()).await {
            Ok(()) => Ok(()),
            Err(DdlError::NotAllowed) => {
                tracing::warn!(
                    migration = self.migration(),
                    database = self.live.name,
                    "the role may not create event triggers: changes of definitions are not refused, only found out"
                );
                Ok(())
            }
            Err(DdlError::Query(source)) => {
                Err(WorkError::Query { doing: "making the event trigger that refuses DDL on the source", source })
            }
        }
    }

    async fn not_somebody_elses(
        &self,
        source: &Control,
        journal: &Journal,
        made: &MadeObject,
    ) -> Result<(), WorkError> {
        if journal.list().await?.contains(made) {
            return Ok(());
        }
        let found = source
            .query_opt("SELECT FROM pg_catalog.pg_publication WHERE pubname = $1", &[&made.name])
            .await
            .map_err(|source| WorkError::Query { doing: "looking for publications on the source", source })?;
        if found.is_some() { Err(WorkError::PublicationTaken(made.name.clone())) } else { Ok(()) }
    }

    /// The definitions, dumped once for this attempt.
    async fn archive<'a>(&self, kept: &'a mut Option<Archive>) -> Result<&'a Archive, WorkError> {
        if kept.is_none() {
            let lock_timeout = self.context.config.migration.lock_timeout;
            let dumped = schema::dump(&self.pg_dump, &self.context.source, &self.live.name, lock_timeout).await?;
            *kept = Some(dumped);
        }
        Ok(kept.as_ref().expect("just filled"))
    }

    /// The database, and our progress row in it.
    async fn make_database(&self, row: &DatabaseRow, slot_start: Lsn) -> Result<(), WorkError> {
        let journal = self.journal();
        let (source, target) = (&self.context.source, &self.context.target);
        let is_control = row.database == self.context.config.control.database;
        // Ours is gone on with: what somebody has mended in it is not lost, and what we have restored is marked.
        let name = quote_ident(&row.database);
        let is_it = |made: &MadeObject| made.kind == made::DATABASE && made.side == Side::Target && made.name == name;
        let ours = journal.list().await?.iter().any(is_it);
        let existing = if self.context.live.spec.overwrite_target && !is_control && !ours {
            Existing::Drop
        } else {
            Existing::Keep
        };
        if existing == Existing::Drop {
            let home = &self.context.config.control.database;
            let (from, to) = (source.control(home, "overwrite").await?, target.control(home, "overwrite").await?);
            must_lead_away(std::iter::once(row.database.as_str()), &from, &to).await?;
        }
        let carried = schema::create_database(source, target, &row.database, existing, &journal).await?;
        keep_carried_database(&self.context.catalog, self.migration(), &row.database, &carried).await?;
        let migration = quote_literal(self.migration());
        // What was restored is remembered too: it would not be restored again.
        let forget = format!(
            "{}; DROP TABLE IF EXISTS pgcutover.restored_entry; DELETE FROM pgcutover.progress WHERE migration = {migration}",
            late::FORGET
        );
        let undo = self.context.undo_schema(&row.database, &forget, &[]);
        journal.record(&self.made(Side::Target, "schema", "pgcutover", undo)).await?;
        let control = target.control(&row.database, "restore").await?;
        bootstrap(&control, Place::TargetDatabase).await?;
        progress::claim(&*control, self.migration(), self.context.catalog.generation(), slot_start).await?;
        drop(control);
        self.context.failpoints.hit("engine.after_database").await?;
        Ok(())
    }

    /// Everything that comes before the rows.
    async fn restore(&self, row: &mut DatabaseRow, archive: &Archive) -> Result<(), WorkError> {
        let guard = self.guard(Guard::Locking);
        let restored = schema::restore_pre_data(&self.restore_target(&guard), archive).await?;
        all_restored(restored.failures)?;
        self.restore_identities(&self.journal()).await?;
        self.nothing_would_fire().await?;
        self.context.failpoints.hit("engine.after_schema").await?;
        self.completed(row, Step::Restored).await
    }

    /// The definitions were dumped while tables of the source had the replica identity that we had set: the target's are
    /// given the one that was there before.
    async fn restore_identities(&self, journal: &Journal) -> Result<(), WorkError> {
        let control = self.context.target.control(&self.live.name, "restore").await?;
        for made in journal.list().await? {
            let is_ours = made.kind == made::REPLICA_IDENTITY && made.side == Side::Source;
            let (true, Some(undo)) = (is_ours && made.database.as_ref() == Some(&self.live.name), made.undo) else {
                continue;
            };
            let doing = "giving the target's tables their own replica identity";
            control.batch_execute(&undo).await.map_err(|source| WorkError::Query { doing, source })?;
        }
        Ok(())
    }

    fn restore_target<'a>(&'a self, guard: &'a str) -> RestoreTarget<'a> {
        RestoreTarget { connector: &self.context.target, database: &self.live.name, guard: Some(guard) }
    }

    /// Query by which every writing transaction makes sure that no other engine has taken over.
    fn guard(&self, how: Guard) -> String {
        let lock = match how {
            Guard::Locking => " FOR SHARE",
            Guard::Looking => "",
        };
        format!(
            "SELECT 1 FROM pgcutover.progress WHERE migration = {} AND lane = {LANE} AND generation = {}{lock}",
            quote_literal(self.migration()),
            self.context.catalog.generation().0
        )
    }

    /// Rows and indexes of every table that does not have them yet.
    async fn copy(&self, row: &mut DatabaseRow, barrier: u64, archive: &Archive) -> Result<(), WorkError> {
        // After a restart the row is still another engine's.
        let control = self.context.target.control(&row.database, "copy-claim").await?;
        let start = row.slot_start.unwrap_or_default();
        let (migration, generation) = (self.migration(), self.context.catalog.generation());
        progress::claim(&*control, migration, generation, start).await?;
        let rows = self.context.catalog.tables(migration, &row.database).await?;
        self.live.load_tables(&rows);
        let source = self.context.source_control(&row.database, "copy-list").await?;
        // Of tables that are copied, the source has flushed what their snapshots saw; those in hand are copied anew.
        let copied = rows.iter().filter(|row| matches!(row.state, TableState::Copied | TableState::Ready));
        let reached = copied.filter_map(|row| row.hand_over).max().unwrap_or(start).max(start);
        history::check(&self.context.source, &source, &control, migration, generation, reached).await?;
        drop(control);
        let listed = copy::list_tables(&source).await?;
        let names = publication::names(&source, &row.publication).await;
        let names = names.map_err(|source| WorkError::Query { doing: "reading the publication", source })?;
        drop(source);
        let planned = listed.iter().map(|table| (table.name.clone(), archive.table_entries(table.oid).len()));
        self.live.plan_indexes(planned);
        self.live.count(&self.context.metrics);
        let tables = left_to_copy(&rows, listed, &names)?;
        let recorder = Arc::new(Recorder {
            catalog: self.context.catalog.clone(),
            migration: self.migration().to_owned(),
            database: self.live.clone(),
            metrics: self.context.metrics.clone(),
        });
        let context = CopyContext {
            source: self.context.source.clone(),
            target: self.context.target.clone(),
            database: row.database.clone(),
            config: self.context.config.migration.clone(),
            workers: self.context.workers.clone(),
            barrier_xid: Some(barrier),
            guard: Some(self.guard(Guard::Locking)),
            recorder: recorder.clone(),
            progress: recorder,
            failpoints: self.context.failpoints.clone(),
        };
        let report = copy::copy_database(&context, &tables, archive).await?;
        all_restored(report.failures)?;
        // Before their indexes are built.
        self.carry_unstreamed(&row.database).await?;
        let guard = self.guard(Guard::Locking);
        let restored = schema::restore_after_copy(&self.restore_target(&guard), archive).await?;
        all_restored(restored.failures)?;
        self.context.failpoints.hit("engine.after_copy").await?;
        self.completed(row, Step::Copied).await
    }

    /// Unlogged tables and large objects, as they are now.
    async fn carry_unstreamed(&self, database: &str) -> Result<(), WorkError> {
        let source = self.context.source_control(database, "unstreamed").await?;
        let target = self.context.target.control(database, "unstreamed").await?;
        let carried = unstreamed::bring_over(&source, &target).await?;
        if carried != unstreamed::Carried::default() {
            tracing::info!(migration = self.migration(), database, ?carried, "carried what no stream carries");
        }
        Ok(())
    }

    /// The same while nothing is applied: until what is returned is dropped, the target is what a snapshot of the source shows.
    async fn carry_unstreamed_and_stand(&self, database: &str) -> Result<Still, WorkError> {
        let sides = Sides {
            source: self.context.source.clone(),
            target: self.context.target.clone(),
            database: database.to_owned(),
            gate: Some(self.live.stream.gate.clone()),
            door: None,
        };
        let still = align::still(&sides).await.map_err(|error| WorkError::Still(Box::new(error)))?;
        unstreamed::carry(&still.source, &still.target).await?;
        Ok(still)
    }

    fn stream_context(
        &self,
        row: &DatabaseRow,
        slot_start: Lsn,
        tables: &[TableRow],
    ) -> Result<StreamContext, WorkError> {
        let mut hand_overs = HashMap::new();
        // A stream that begins at a cutover knows nothing of copies.
        let tables = if row.epoch == Epoch(0) { tables } else { &[] };
        for table in tables {
            if table.state == TableState::Ready && table.snapshot.is_none() && table.hand_over.is_none() {
                // It came by the stream.
                continue;
            }
            let unreadable = || crate::catalog::migrations::CatalogError::Unreadable {
                what: format!("table {} without the snapshot of its copy", table.table),
            };
            let snapshot = table.snapshot.as_deref().and_then(|text| text.parse().ok()).ok_or_else(unreadable)?;
            let position = table.hand_over.ok_or_else(unreadable)?;
            hand_overs.insert(table.table.clone(), HandOver { snapshot, position });
        }
        Ok(StreamContext {
            source: self.context.source.clone(),
            target: self.context.target.clone(),
            database: row.database.clone(),
            migration: progress_key(self.migration(), row.epoch),
            generation: self.context.catalog.generation(),
            slot: row.slot.clone(),
            slot_start,
            publication: row.publication.clone(),
            hand_overs,
            reserve: self.live.reserve.clone(),
            boundary: (row.epoch > Epoch(0)).then_some(row.epoch),
            // A rollback has left the target fenced.
            door: (row.epoch > Epoch(0)).then(|| {
                Door::new(&self.context.target, &self.context.config.control.database, &row.database, &self.live.turns)
            }),
            queue_bytes: self.context.config.migration.apply_queue_bytes,
            metrics: self.context.metrics.clone(),
            failpoints: self.context.failpoints.clone(),
        })
    }

    /// Beside the stream: once it has caught up, what had to wait for that. Ends only for an offline migration.
    async fn finish(&self, mut row: DatabaseRow, last: Lsn, mut archive: Option<Archive>) -> Result<(), WorkError> {
        self.past_hand_overs(&row, last).await?;
        self.caught_up().await;
        if self.live.step() < Step::Constrained {
            definitions::shut(&self.context, &row).await?;
            let archive = self.archive(&mut archive).await?;
            // As near as can be to the rows that their foreign keys refer to.
            self.carry_unstreamed(&row.database).await?;
            self.context.failpoints.hit("engine.before_constraints").await?;
            // No lock on the progress row here: the stream needs it all the time.
            let guard = self.guard(Guard::Looking);
            let target = self.restore_target(&guard);
            let mut failures = self.constrain(&target, &guard, archive).await?;
            if failures.iter().any(|failure| failure.sqlstate == sqlstate::FOREIGN_KEY_VIOLATION) {
                // Rows of an unlogged table, perhaps, whose parents the stream has removed since.
                let still = self.carry_unstreamed_and_stand(&row.database).await?;
                failures = self.constrain(&target, &guard, archive).await?;
                drop(still);
            }
            all_restored(failures)?;
            let (from, to) = (&self.context.source, &self.context.target);
            all_restored(materialized::refresh(from, to, &row.database, None).await?.failures)?;
            schema::analyze(to, &row.database).await?;
            self.context.failpoints.hit("engine.after_constraints").await?;
            definitions::open(&self.context, &row).await?;
            self.completed(&mut row, Step::Constrained).await?;
        }
        drop(archive);
        self.caught_up().await;
        match self.context.live.spec.mode {
            Mode::Online => {
                self.ready.send_replace(true);
                if self.context.config.migration.ddl == Ddl::Apply && row.epoch == Epoch(0) {
                    return definitions::follow(&self.context, &self.live).await;
                }
                std::future::pending().await
            }
            Mode::Offline => self.settle_offline(&row).await,
        }
    }

    /// Waits until every table's hand-over is behind us. A marker committed now is behind all of them; the position
    /// itself may never be seen: an insert position can stand past a page header that nothing ever flushes.
    async fn past_hand_overs(&self, row: &DatabaseRow, last: Lsn) -> Result<(), WorkError> {
        if self.live.stream.applied.borrow().seen >= last {
            return Ok(());
        }
        self.marker_applied(row, "caught-up").await
    }

    /// Waits until the lag is small enough for a cutover.
    async fn caught_up(&self) {
        let enough = self.context.config.cutover.max_lag_at_start_bytes;
        let mut applied = self.live.stream.applied.subscribe();
        while self.live.lag().is_none_or(|lag| lag.bytes > enough) {
            // The lag is measured again all the time, the position changes when something is applied.
            tokio::select! {
                () = tokio::time::sleep(LAG_INTERVAL) => {}
                _ = applied.changed() => {}
            }
        }
    }

    /// Commits a marker on the source and waits until the target has everything up to it.
    async fn marker_applied(&self, row: &DatabaseRow, purpose: &str) -> Result<(), WorkError> {
        let source = self.context.source_control(&row.database, &format!("{purpose}-marker")).await?;
        let nonce = format!("{purpose}-{:016x}", rand::random::<u64>());
        source
            .execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce])
            .await
            .map_err(|source| WorkError::Query { doing: "writing the marker row on the source", source })?;
        let mut applied = self.live.stream.applied.subscribe();
        let reached = applied.wait_for(|applied| applied.has_reached(&nonce)).await;
        reached.map(|_| ()).map_err(|_| WorkError::Stopping)
    }

    /// Everything the source has committed by now, and its sequences.
    async fn settle_offline(&self, row: &DatabaseRow) -> Result<(), WorkError> {
        self.marker_applied(row, "offline").await?;
        let source = self.context.source_control(&row.database, "offline-sequences").await?;
        let target = self.context.target.control(&row.database, "offline-sequences").await?;
        SequencePair::prepare(&source, &target).await?;
        self.carry_unstreamed(&row.database).await
    }
}

/// Whether the guard keeps a later engine from claiming the row while the transaction runs.
#[derive(Clone, Copy)]
enum Guard {
    Locking,
    Looking,
}

/// Nothing that could not be restored is passed over.
fn all_restored(failures: Vec<RestoreFailure>) -> Result<(), WorkError> {
    if failures.is_empty() { Ok(()) } else { Err(WorkError::Restore(failures)) }
}

/// What is left to do for each table of the catalogue.
fn left_to_copy(
    rows: &[TableRow],
    listed: Vec<SourceTable>,
    names: &Names,
) -> Result<Vec<(SourceTable, Stage)>, WorkError> {
    let mut listed: HashMap<QualifiedName, SourceTable> =
        listed.into_iter().map(|table| (table.name.clone(), table)).collect();
    let mut left = Vec::new();
    for row in rows {
        let stage = match row.state {
            TableState::Waiting | TableState::Copying | TableState::Failed => Stage::Rows,
            TableState::Copied => Stage::Indexes,
            TableState::Ready => continue,
        };
        // One that another has given its name to is not the table that the publication was made of.
        let table = listed.remove(&row.table).filter(|table| names.taken(table.oid, &table.name).is_none());
        let table = table.ok_or_else(|| WorkError::TableGone(row.table.to_string()))?;
        left.push((table, stage));
    }
    Ok(left)
}
