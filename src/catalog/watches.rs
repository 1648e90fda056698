//! The watch over a server that a cutover has left: which slot watches, and what it has found.
//!
//! The slot of the stream that ended with the cutover is kept. Everything that commits behind what that stream has
//! applied was written past the fence, by somebody whom it did not stop, or by our own applier of the stream back.
//!
//! ```text
//! server left    … last write  marker 0/1A000  |  stranger 0/1B000  our applier 0/1C000
//! stream         applied up to 0/1A030         |  ended
//! watch          begins at 0/1A030             |  counts            knows it by its progress row
//! ```
//!
//! Counts and the position behind them are written in one transaction, before the slot is confirmed: a restart counts
//! nothing twice. What is found is kept until the migration is, over rollbacks and further cutovers. No values, ever.

use super::migrations::{CatalogError, MigrationCatalog};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::switch::{Epoch, ServerRole};

/// The watch over the database of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// The cutover that left the server; 0: one that cannot be taken back.
    pub epoch: Epoch,
    /// The slot, on the server that was left.
    pub slot: String,
    /// Its publication there.
    pub publication: String,
    /// The stream that has ended: the watch begins behind what it has applied.
    pub stream: Epoch,
    /// What commits before this position has been looked at; none: nothing was found yet.
    pub position: Option<Lsn>,
    /// Why nobody looks any more; none: somebody does.
    pub ended: Option<String>,
}

/// What becomes of a stream's slot when another stream takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldSlot {
    /// It watches the server that was left.
    Watches,
    /// It is dropped: no server was left.
    Goes,
}

/// How a table was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteKind {
    /// INSERT, or COPY.
    Insert,
    /// UPDATE
    Update,
    /// DELETE
    Delete,
    /// TRUNCATE
    Truncate,
}

impl WriteKind {
    /// The text in the catalogue and in views.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Truncate => "truncate",
        }
    }
}

/// What was found of one kind in one table.
#[derive(Clone, Debug, PartialEq)]
pub struct FencedWrite {
    /// The cutover that had left the server.
    pub epoch: Epoch,
    /// The server that was left.
    pub server: ServerRole,
    /// The table.
    pub table: QualifiedName,
    /// [`WriteKind::as_str`]
    pub kind: String,
    /// Rows, or times it was truncated.
    pub changes: u64,
    /// Commit of the first one, in seconds since the Unix epoch, by the clock of that server.
    pub first_at: f64,
    /// Commit of the last one.
    pub last_at: f64,
}

impl MigrationCatalog {
    /// Adds what was found, and keeps that everything before `position` has been looked at. Adds nothing and returns false
    /// when that was known already, or when another slot watches by now.
    pub async fn add_fenced_writes(
        &self,
        migration: &str,
        database: &str,
        watch: &Watch,
        found: &[FencedWrite],
        position: Lsn,
    ) -> Result<bool, CatalogError> {
        let client = self.client().await?;
        let epochs = |list: &[FencedWrite]| list.iter().map(|one| one.epoch.0.cast_signed()).collect::<Vec<i64>>();
        let texts = |of: fn(&FencedWrite) -> &str| found.iter().map(of).collect::<Vec<&str>>();
        let changes: Vec<i64> = found.iter().map(|one| i64::try_from(one.changes).unwrap_or(i64::MAX)).collect();
        let times = |of: fn(&FencedWrite) -> f64| found.iter().map(of).collect::<Vec<f64>>();
        let servers: Vec<String> = found.iter().map(|one| one.server.to_string()).collect();
        let written = client
            .execute(
                "WITH looked AS (
                     UPDATE pgcutover.migration_database d SET watch_position = $4, changed_at = now()
                     FROM pgcutover.engine e
                     WHERE d.migration = $1 AND d.database = $2 AND d.watch_slot = $3
                       AND (d.watch_position IS NULL OR d.watch_position < $4) AND e.generation = $5
                     RETURNING 1)
                 INSERT INTO pgcutover.fenced_write AS w
                     (migration, database, server, epoch, schema_name, table_name, kind, changes, first_at, last_at)
                 SELECT $1, $2, f.server, f.epoch, f.schema_name, f.table_name, f.kind, f.changes,
                        to_timestamp(f.first_at), to_timestamp(f.last_at)
                 FROM looked, unnest($6::text[], $7::bigint[], $8::text[], $9::text[], $10::text[], $11::bigint[],
                                     $12::float8[], $13::float8[])
                          f (server, epoch, schema_name, table_name, kind, changes, first_at, last_at)
                 ON CONFLICT (migration, database, server, epoch, schema_name, table_name, kind) DO UPDATE
                 SET changes = w.changes + excluded.changes, first_at = least(w.first_at, excluded.first_at),
                     last_at = greatest(w.last_at, excluded.last_at)",
                &[
                    &migration,
                    &database,
                    &watch.slot,
                    &position,
                    &self.generation().0,
                    &servers,
                    &epochs(found),
                    &texts(|one| one.table.schema.as_str()),
                    &texts(|one| one.table.name.as_str()),
                    &texts(|one| one.kind.as_str()),
                    &changes,
                    &times(|one| one.first_at),
                    &times(|one| one.last_at),
                ],
            )
            .await
            .map_err(|source| CatalogError::query("keep what was written on a fenced server", source))?;
        Ok(written > 0)
    }

    /// What was found so far in a database, by server, cutover, table and kind.
    pub async fn fenced_writes(&self, migration: &str, database: &str) -> Result<Vec<FencedWrite>, CatalogError> {
        let client = self.client().await?;
        let rows = client
            .query(
                "SELECT server, epoch, schema_name, table_name, kind, changes,
                        extract(epoch FROM first_at)::float8, extract(epoch FROM last_at)::float8
                 FROM pgcutover.fenced_write WHERE migration = $1 AND database = $2
                 ORDER BY epoch, server, schema_name, table_name, kind",
                &[&migration, &database],
            )
            .await
            .map_err(|source| CatalogError::query("read what was written on fenced servers", source))?;
        let write = |row: &tokio_postgres::Row| FencedWrite {
            server: if row.get::<_, &str>(0) == "source" { ServerRole::Source } else { ServerRole::Target },
            epoch: Epoch(row.get::<_, i64>(1).cast_unsigned()),
            table: QualifiedName::new(row.get::<_, String>(2), row.get::<_, String>(3)),
            kind: row.get(4),
            changes: u64::try_from(row.get::<_, i64>(5)).unwrap_or(0),
            first_at: row.get(6),
            last_at: row.get(7),
        };
        Ok(rows.iter().map(write).collect())
    }

    /// Nobody looks any more; the slot is to be dropped.
    pub async fn end_watch(&self, migration: &str, database: &str, why: &str) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration_database d SET watch_ended = $3, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND e.generation = $4",
                &[&migration, &database, &why, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("end a watch", source))?;
        self.must_be_one(written)
    }
}
