//! What the copy changes on either server, told to the journal before it is done.
//!
//! Cancel undoes or lists exactly what stands here, so nothing in this part of the program may create, alter or drop an
//! object without a [`Made`] that was durable first. Contents of migrated databases are the exception: they are the
//! target's data, and stay.

use async_trait::async_trait;

use crate::switch::ServerRole;

/// What kind of thing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MadeKind {
    /// `REPLICA IDENTITY` of a source table.
    ReplicaIdentity,
    /// A role that did not exist.
    Role,
    /// Attributes of a role that existed.
    RoleAttributes,
    /// The password verifier of a role that existed.
    RolePassword,
    /// A membership.
    RoleMembership,
    /// A setting of a role.
    RoleSetting,
    /// A database that did not exist.
    Database,
    /// A database that was dropped because the operator asked for it.
    DatabaseDropped,
}

/// One change. Never holds a secret: a replaced verifier is noted, not quoted.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Made {
    /// Where.
    pub server: ServerRole,
    /// In which database; none: an object of the whole server.
    pub database: Option<String>,
    /// What.
    pub kind: MadeKind,
    /// Its name, quoted as SQL.
    pub object: String,
    /// SQL that takes it back, to be run in `database`; none: it stays, and is listed.
    pub undo: Option<String>,
    /// For the list: what it was before, or why it stays.
    pub note: String,
}

/// The journal could not be written; the change was therefore not made.
#[derive(Debug, thiserror::Error)]
#[error("the journal could not be written, so {object} was left as it is")]
pub struct JournalError {
    /// What was about to be changed.
    pub object: String,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Where changes are written down. Durable when [`Journal::record`] returns.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Records an intent. The same intent may be recorded again after a crash.
    async fn record(&self, made: Made) -> Result<(), JournalError>;
}
