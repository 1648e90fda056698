//! Keeps what the copy reports: durably in the catalogue, live for the views, counted in the metrics.

use std::sync::Arc;

use async_trait::async_trait;

use super::live::DatabaseLive;
use crate::catalog::migrations::MigrationCatalog;
use crate::catalog::tables::{TableChange, TableState};
use crate::migration::copy::{CopiedRows, CopyProgress, RecordError, SourceTable, TableRecorder};
use crate::migration::snapshot::HandOver;
use crate::telemetry::metrics::Metrics;

/// The recorder of one database.
pub(super) struct Recorder {
    pub(super) catalog: MigrationCatalog,
    pub(super) migration: String,
    pub(super) database: Arc<DatabaseLive>,
    pub(super) metrics: Arc<Metrics>,
}

impl Recorder {
    async fn set(
        &self,
        table: &SourceTable,
        state: TableState,
        hand_over: Option<&HandOver>,
        copied: CopiedRows,
    ) -> Result<(), RecordError> {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let change = TableChange {
            table: &table.name,
            state,
            hand_over: hand_over.map(|hand_over| (hand_over.snapshot.to_string(), hand_over.position)),
            rows: signed(copied.rows),
            bytes: signed(copied.bytes),
        };
        let written = self.catalog.set_table(&self.migration, &self.database.name, &change).await;
        written.map_err(|error| RecordError(Box::new(error)))?;
        self.database.update_table(&table.name, |live| {
            live.state = Some(state);
            (live.rows, live.bytes) = (copied.rows, copied.bytes);
        });
        self.database.count(&self.metrics);
        Ok(())
    }
}

#[async_trait]
impl TableRecorder for Recorder {
    async fn snapshot_taken(&self, table: &SourceTable, hand_over: &HandOver) -> Result<(), RecordError> {
        self.set(table, TableState::Copying, Some(hand_over), CopiedRows::default()).await
    }

    async fn rows_copied(&self, table: &SourceTable, copied: CopiedRows) -> Result<(), RecordError> {
        self.set(table, TableState::Copied, None, copied).await?;
        let CopiedRows { rows, bytes } = copied;
        tracing::info!(database = self.database.name, table = %table.name, rows, bytes, "rows copied");
        Ok(())
    }

    async fn indexes_built(&self, table: &SourceTable) -> Result<(), RecordError> {
        let live = self.database.table(&table.name);
        self.set(table, TableState::Ready, None, CopiedRows { rows: live.rows, bytes: live.bytes }).await
    }
}

impl CopyProgress for Recorder {
    fn started(&self, table: &SourceTable) {
        tracing::info!(database = self.database.name, table = %table.name, "copying");
        self.database.update_table(&table.name, |live| {
            (live.rows, live.bytes, live.copying_since) = (0, 0, Some(std::time::Instant::now()));
        });
    }

    fn moved(&self, table: &SourceTable, rows: u64, bytes: u64) {
        self.database.update_table(&table.name, |live| {
            live.rows += rows;
            live.bytes += bytes;
        });
        self.metrics.copy_rows.inc_by(rows);
        self.metrics.copy_bytes.inc_by(bytes);
    }

    fn indexes(&self, table: &SourceTable, built: usize, total: usize) {
        self.database.update_table(&table.name, |live| {
            let indexes = live.indexes.get_or_insert_default();
            (indexes.built, indexes.total) = (built, total);
        });
        self.database.count(&self.metrics);
    }

    fn building(&self, table: &SourceTable, change: isize) {
        self.database.update_table(&table.name, |live| {
            let indexes = live.indexes.get_or_insert_default();
            indexes.building = indexes.building.saturating_add_signed(change);
        });
        self.database.count(&self.metrics);
    }
}
