//! Which column values identify a row of each table to the stream.
//!
//! Publishing UPDATE and DELETE of a table that has no replica identity makes the *application's* statement fail
//! (`cannot update table … because it does not have a replica identity`). Identities are therefore decided, and where the
//! operator allows it mended, before the publication is made.

use std::time::Duration;

use crate::config::WithoutIdentity;
use crate::ident::QualifiedName;
use crate::migration::made::{Journal, JournalError};
use crate::postgres::Control;

/// What identifies a row.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// The primary key.
    PrimaryKey,
    /// The index named by `REPLICA IDENTITY USING INDEX`.
    Index(String),
    /// The whole old row.
    Full,
    /// Nothing: UPDATE and DELETE cannot be published.
    None,
}

/// What is to be done about a table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// It is usable as it is.
    Nothing,
    /// [`mend`] sets `REPLICA IDENTITY FULL`; `undo` is the statement that sets it back.
    SetFull {
        /// The statement that restores what was there.
        undo: String,
    },
    /// The policy forbids mending.
    Refuse,
}

/// One table's identity.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableIdentity {
    /// The table.
    pub table: QualifiedName,
    /// Its OID on the source.
    pub oid: u32,
    /// What identifies a row now.
    pub identity: Identity,
    /// What is to be done.
    pub remedy: Remedy,
}

/// Identities could not be decided or mended.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The catalogues could not be read.
    #[error("the replica identities of the source's tables could not be read")]
    Read(#[source] tokio_postgres::Error),
    /// The table stayed locked.
    #[error("{table} stayed locked for {waited:?}, so its replica identity could not be set; blocked by {blockers}")]
    Locked {
        /// The table.
        table: QualifiedName,
        /// Over all attempts.
        waited: Duration,
        /// Process ids and application names.
        blockers: String,
    },
    /// The statement failed.
    #[error("the replica identity of {table} could not be set to FULL")]
    Alter {
        /// The table.
        table: QualifiedName,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Every ordinary table that is migrated from this database, with its identity, by name.
pub async fn plan(source: &Control, policy: WithoutIdentity) -> Result<Vec<TableIdentity>, IdentityError> {
    let _ = (source, policy);
    unimplemented!()
}

/// Sets `REPLICA IDENTITY FULL` where the plan says so, each attempt bounded by `lock_timeout`, so that the
/// application never queues behind us for longer. Recorded first; does nothing for other remedies.
pub async fn mend(
    source: &Control,
    database: &str,
    table: &TableIdentity,
    lock_timeout: Duration,
    journal: &dyn Journal,
) -> Result<(), IdentityError> {
    let _ = (source, database, table, lock_timeout, journal);
    unimplemented!()
}
