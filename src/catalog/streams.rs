//! Which stream carries the changes of a database, and which one is prepared to carry them the other way.
//!
//! ```text
//!                      current                    next                                             watch
//! migrating            forward, epoch 0           –                                                –
//! cutover 1 prepares   forward, epoch 0           epoch 1: slot and publication on the target      –
//! cutover 1 decided    reverse, epoch 1           –                                                the forward slot
//! rollback 2 prepares  reverse, epoch 1           epoch 2: slot and publication on the source      the forward slot
//! rollback 2 aborted   reverse, epoch 1           –          those of epoch 2 are dropped          the forward slot
//! rollback 3 decided   forward, epoch 3           –          the forward slot is dropped           the reverse slot
//! ```
//!
//! The slot of the stream that has ended is not dropped: it watches the server that was left ([`super::watches`]).
//!
//! The stream of epoch E begins behind the boundary row of E; everything before it came from the other side.

use super::migrations::{CatalogError, MigrationCatalog};
use super::watches::OldSlot;
use crate::lsn::Lsn;
use crate::switch::{Epoch, ServerRole};

/// Which way a stream flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From `[source]` to `[target]`.
    Forward,
    /// From `[target]` to `[source]`.
    Reverse,
}

impl Direction {
    /// The text in the catalogue, in views and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Reverse => "reverse",
        }
    }

    /// Reads [`Self::as_str`].
    pub fn parse(text: &str) -> Result<Self, CatalogError> {
        match text {
            "forward" => Ok(Self::Forward),
            "reverse" => Ok(Self::Reverse),
            other => Err(CatalogError::Unreadable { what: format!("direction {other:?}") }),
        }
    }

    /// The server that a stream comes from, and a cutover leaves.
    pub fn from(self) -> ServerRole {
        match self {
            Self::Forward => ServerRole::Source,
            Self::Reverse => ServerRole::Target,
        }
    }

    /// The server that it leads to.
    pub fn to(self) -> ServerRole {
        self.from().other()
    }

    /// What belongs to source and target, put into the order from, to.
    pub fn ends<T>(self, source: T, target: T) -> (T, T) {
        match self {
            Self::Forward => (source, target),
            Self::Reverse => (target, source),
        }
    }
}

/// A stream that is prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextStream {
    /// The cutover that prepares it.
    pub epoch: Epoch,
    /// Its slot, on the server that the cutover leads to.
    pub slot: String,
    /// Its publication there.
    pub publication: String,
    /// Where the stream of the slot begins; none: the slot may not have been made.
    pub slot_start: Option<Lsn>,
}

/// The key of a stream's progress row. The first stream of a migration has the migration's name; names have no slash.
pub fn progress_key(migration: &str, epoch: Epoch) -> String {
    match epoch {
        Epoch(0) => migration.to_owned(),
        Epoch(epoch) => format!("{migration}/{epoch}"),
    }
}

impl MigrationCatalog {
    /// Keeps the stream that a cutover prepares, in place of one that an earlier attempt has left.
    pub async fn set_next(&self, migration: &str, database: &str, next: &NextStream) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration_database d
                 SET next_epoch = $3, next_slot = $4, next_publication = $5, next_start = $6, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND e.generation = $7",
                &[
                    &migration,
                    &database,
                    &next.epoch.0.cast_signed(),
                    &next.slot,
                    &next.publication,
                    &next.slot_start,
                    &self.generation().0,
                ],
            )
            .await
            .map_err(|source| CatalogError::query("keep the stream that is prepared", source))?;
        self.must_be_one(written)
    }

    /// Forgets the stream that an aborted cutover has prepared.
    pub async fn drop_next(&self, migration: &str, database: &str) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration_database d
                 SET next_epoch = NULL, next_slot = NULL, next_publication = NULL, next_start = NULL, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND e.generation = $3",
                &[&migration, &database, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("forget the stream that was prepared", source))?;
        self.must_be_one(written)
    }

    /// The prepared stream becomes the current one, the other way round; where none is prepared, no stream is current.
    /// What becomes of the slot of the one before is said by `old`.
    /// Does nothing when the current one flows `to_be` already.
    pub async fn turn(
        &self,
        migration: &str,
        database: &str,
        to_be: Direction,
        old: OldSlot,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        client
            .execute(
                "UPDATE pgcutover.migration_database d
                 SET direction = $3, epoch = coalesce(next_epoch, 0),
                     slot = CASE WHEN next_start IS NULL THEN '' ELSE next_slot END,
                     publication = CASE WHEN next_start IS NULL THEN '' ELSE next_publication END,
                     slot_start = next_start,
                     watch_epoch = coalesce(next_epoch, 0), watch_stream = epoch,
                     watch_slot = CASE WHEN $5 THEN nullif(slot, '') END, watch_publication = publication,
                     watch_position = NULL, watch_ended = NULL,
                     next_epoch = NULL, next_slot = NULL, next_publication = NULL, next_start = NULL, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND d.direction <> $3 AND e.generation = $4",
                &[&migration, &database, &to_be.as_str(), &self.generation().0, &(old == OldSlot::Watches)],
            )
            .await
            .map_err(|source| CatalogError::query("turn the stream round", source))?;
        Ok(())
    }

    /// No stream is current any more, and nothing is watched.
    pub async fn end_stream(&self, migration: &str, database: &str) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration_database d
                 SET slot = '', publication = '', watch_slot = NULL, changed_at = now()
                 FROM pgcutover.engine e
                 WHERE d.migration = $1 AND d.database = $2 AND e.generation = $3",
                &[&migration, &database, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("end the stream", source))?;
        self.must_be_one(written)
    }
}
