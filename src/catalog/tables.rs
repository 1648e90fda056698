//! Databases and tables of a migration: how far each is, and where each table is handed over from its copy to the stream.

use super::migrations::{CatalogError, MigrationCatalog};
use super::streams::{Direction, NextStream};
use super::watches::Watch;
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::switch::Epoch;

/// A database of a migration as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseRow {
    /// Its name, the same on both servers.
    pub database: String,
    /// The last step that was completed.
    pub step: String,
    /// Name of its replication slot on the source.
    pub slot: String,
    /// Name of its publication on the source.
    pub publication: String,
    /// Where the stream of the slot begins; none: the slot may not have been made.
    pub slot_start: Option<Lsn>,
    /// `B`: snapshots for copies must have `xmin` above it. 64 bits, with epoch.
    pub barrier: Option<u64>,
    /// Which way its stream flows; slot and publication are on the server that it comes from.
    pub direction: Direction,
    /// The cutover at whose boundary the stream begins; 0: the first stream, which begins where the copies ended.
    pub epoch: Epoch,
    /// The stream that a cutover has prepared, to flow the other way once it is decided.
    pub next: Option<NextStream>,
    /// The slot that watches the server which the last cutover has left.
    pub watch: Option<Watch>,
}

/// How far the copy of a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableState {
    /// Nothing has been done.
    Waiting,
    /// Rows are being copied; a restart empties the table and begins again.
    Copying,
    /// All rows are there; a restart does not copy it again.
    Copied,
    /// Indexes and constraints are there too.
    Ready,
    /// The copy failed.
    Failed,
}

impl TableState {
    const ALL: [Self; 5] = [Self::Waiting, Self::Copying, Self::Copied, Self::Ready, Self::Failed];

    /// The text in the catalogue.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Copying => "copying",
            Self::Copied => "copied",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// A table of a migration as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct TableRow {
    /// The table, a leaf or a plain one.
    pub table: QualifiedName,
    /// How far it is.
    pub state: TableState,
    /// `txid_snapshot` that it was copied under, in PostgreSQL's text form.
    pub snapshot: Option<String>,
    /// `L`, past which every streamed transaction is applied.
    pub hand_over: Option<Lsn>,
    /// Estimate of its rows when the copy began.
    pub rows_total: Option<i64>,
    /// Its size when the copy began, in bytes.
    pub bytes_total: Option<i64>,
    /// Rows copied.
    pub rows: i64,
    /// Bytes copied.
    pub bytes: i64,
    /// Why its copy failed.
    pub error: Option<serde_json::Value>,
}

/// What changed with a table.
#[derive(Clone, Debug, PartialEq)]
pub struct TableChange<'a> {
    /// The table.
    pub table: &'a QualifiedName,
    /// Its new state.
    pub state: TableState,
    /// Snapshot and `L` of its copy; none: they stay as they are.
    pub hand_over: Option<(String, Lsn)>,
    /// Rows copied.
    pub rows: i64,
    /// Bytes copied.
    pub bytes: i64,
}

impl MigrationCatalog {
    /// The databases of a migration, by name.
    pub async fn databases(&self, migration: &str) -> Result<Vec<DatabaseRow>, CatalogError> {
        let client = self.client().await?;
        let rows = client
            .query(
                "SELECT database, step, slot, publication, slot_start, barrier, direction, epoch,
                        next_epoch, next_slot, next_publication, next_start,
                        watch_epoch, watch_slot, watch_publication, watch_position, watch_ended, watch_stream
                 FROM pgcutover.migration_database WHERE migration = $1 ORDER BY database",
                &[&migration],
            )
            .await
            .map_err(|source| CatalogError::query("read the databases of a migration", source))?;
        rows.iter()
            .map(|row| {
                let next = |epoch: i64| NextStream {
                    epoch: Epoch(epoch.cast_unsigned()),
                    slot: row.get(9),
                    publication: row.get(10),
                    slot_start: row.get(11),
                };
                let watch = |slot: String| Watch {
                    epoch: Epoch(row.get::<_, Option<i64>>(12).unwrap_or_default().cast_unsigned()),
                    slot,
                    publication: row.get::<_, Option<String>>(14).unwrap_or_default(),
                    stream: Epoch(row.get::<_, Option<i64>>(17).unwrap_or_default().cast_unsigned()),
                    position: row.get(15),
                    ended: row.get(16),
                };
                Ok(DatabaseRow {
                    database: row.get(0),
                    step: row.get(1),
                    slot: row.get(2),
                    publication: row.get(3),
                    slot_start: row.get(4),
                    barrier: row.get::<_, Option<i64>>(5).map(i64::cast_unsigned),
                    direction: Direction::parse(row.get(6))?,
                    epoch: Epoch(row.get::<_, i64>(7).cast_unsigned()),
                    next: row.get::<_, Option<i64>>(8).map(next),
                    watch: row.get::<_, Option<String>>(13).map(watch),
                })
            })
            .collect()
    }

    /// What is kept of a database's settings and grants that were brought over, if they were.
    pub async fn carried(&self, migration: &str, database: &str) -> Result<Option<serde_json::Value>, CatalogError> {
        let client = self.client().await?;
        let select = "SELECT carried FROM pgcutover.migration_database WHERE migration = $1 AND database = $2";
        let row = client.query_opt(select, &[&migration, &database]).await;
        let row = row.map_err(|source| CatalogError::query("read what was brought over of a database", source))?;
        Ok(row.and_then(|row| row.get(0)))
    }

    /// Keeps what has been brought over of a database's settings and grants.
    pub async fn set_carried(
        &self,
        migration: &str,
        database: &str,
        carried: &serde_json::Value,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration_database d SET carried = $3, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND e.generation = $4",
                &[&migration, &database, carried, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("keep what was brought over of a database", source))?;
        self.must_be_one(written)
    }

    /// Keeps the last completed step of a database with the slot's start and the barrier.
    pub async fn set_database(&self, migration: &str, row: &DatabaseRow) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration_database d
                 SET step = $3, slot_start = $4, barrier = $5, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND e.generation = $6",
                &[
                    &migration,
                    &row.database,
                    &row.step,
                    &row.slot_start,
                    &row.barrier.map(u64::cast_signed),
                    &self.generation().0,
                ],
            )
            .await
            .map_err(|source| CatalogError::query("keep the step of a database", source))?;
        self.must_be_one(written)
    }

    /// Writes down the tables that are to be copied; those already there stay as they are, and those that an earlier attempt
    /// has written down and that nobody has begun are forgotten where they are not among these.
    pub async fn add_tables(
        &self,
        migration: &str,
        database: &str,
        tables: &[(QualifiedName, i64, i64)],
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let schemas: Vec<&str> = tables.iter().map(|(table, ..)| table.schema.as_str()).collect();
        let names: Vec<&str> = tables.iter().map(|(table, ..)| table.name.as_str()).collect();
        let rows: Vec<i64> = tables.iter().map(|(_, rows, _)| *rows).collect();
        let bytes: Vec<i64> = tables.iter().map(|(.., bytes)| *bytes).collect();
        client
            .execute(
                "WITH now AS (
                     SELECT * FROM unnest($3::text[], $4::text[], $5::bigint[], $6::bigint[])
                         AS t (schema_name, table_name, row_count, byte_count)),
                 gone AS (
                     DELETE FROM pgcutover.migration_table t USING pgcutover.engine e
                      WHERE t.migration = $1 AND t.database = $2 AND t.state = 'waiting' AND e.generation = $7
                        AND NOT EXISTS (SELECT FROM now n
                                         WHERE n.schema_name = t.schema_name AND n.table_name = t.table_name))
                 INSERT INTO pgcutover.migration_table
                     (migration, database, schema_name, table_name, state, rows_total, bytes_total)
                 SELECT $1, $2, n.schema_name, n.table_name, 'waiting', n.row_count, n.byte_count
                   FROM pgcutover.engine e, now n
                  WHERE e.generation = $7
                 ON CONFLICT DO NOTHING",
                &[&migration, &database, &schemas, &names, &rows, &bytes, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("write the tables down", source))?;
        Ok(())
    }

    /// Makes the list of tables of a database what it is now: those that are not written down are ready, and those that are
    /// not there any more are forgotten.
    pub async fn set_tables(
        &self,
        migration: &str,
        database: &str,
        tables: &[QualifiedName],
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let (schemas, names): (Vec<&str>, Vec<&str>) =
            tables.iter().map(|table| (table.schema.as_str(), table.name.as_str())).unzip();
        client
            .execute(
                "WITH now AS (
                     SELECT * FROM ROWS FROM (unnest($3::text[]), unnest($4::text[])) AS t (schema_name, table_name)),
                 gone AS (
                     DELETE FROM pgcutover.migration_table t USING pgcutover.engine e
                      WHERE t.migration = $1 AND t.database = $2 AND e.generation = $5
                        AND NOT EXISTS (SELECT FROM now n
                                         WHERE n.schema_name = t.schema_name AND n.table_name = t.table_name))
                 INSERT INTO pgcutover.migration_table (migration, database, schema_name, table_name, state)
                 SELECT $1, $2, n.schema_name, n.table_name, 'ready' FROM pgcutover.engine e, now n
                  WHERE e.generation = $5
                 ON CONFLICT DO NOTHING",
                &[&migration, &database, &schemas, &names, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("write the tables down", source))?;
        Ok(())
    }

    /// The tables of one database of a migration, by name.
    pub async fn tables(&self, migration: &str, database: &str) -> Result<Vec<TableRow>, CatalogError> {
        let client = self.client().await?;
        let rows = client
            .query(
                "SELECT schema_name, table_name, state, snapshot, hand_over, rows_total, bytes_total, rows, bytes, error
                 FROM pgcutover.migration_table WHERE migration = $1 AND database = $2
                 ORDER BY schema_name, table_name",
                &[&migration, &database],
            )
            .await
            .map_err(|source| CatalogError::query("read the tables of a migration", source))?;
        rows.iter()
            .map(|row| {
                let state: &str = row.get(2);
                Ok(TableRow {
                    table: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
                    state: TableState::ALL
                        .into_iter()
                        .find(|known| known.as_str() == state)
                        .ok_or_else(|| CatalogError::Unreadable { what: format!("table state {state:?}") })?,
                    snapshot: row.get(3),
                    hand_over: row.get(4),
                    rows_total: row.get(5),
                    bytes_total: row.get(6),
                    rows: row.get(7),
                    bytes: row.get(8),
                    error: row.get(9),
                })
            })
            .collect()
    }

    /// Makes a change of a table durable.
    pub async fn set_table(
        &self,
        migration: &str,
        database: &str,
        change: &TableChange<'_>,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let (snapshot, hand_over) = change.hand_over.clone().unzip();
        let written = client
            .execute(
                "UPDATE pgcutover.migration_table t
                 SET state = $5, snapshot = coalesce($6, snapshot), hand_over = coalesce($7, hand_over),
                     rows = $8, bytes = $9, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE t.migration = $1 AND t.database = $2 AND t.schema_name = $3 AND t.table_name = $4
                   AND e.generation = $10",
                &[
                    &migration,
                    &database,
                    &change.table.schema,
                    &change.table.name,
                    &change.state.as_str(),
                    &snapshot,
                    &hand_over,
                    &change.rows,
                    &change.bytes,
                    &self.generation().0,
                ],
            )
            .await
            .map_err(|source| CatalogError::query("keep the state of a table", source))?;
        self.must_be_one(written)
    }
}
