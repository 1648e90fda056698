//! What the copy changes on either server, told to the journal before it is done.
//!
//! Cancel undoes or lists exactly what stands there, so nothing in this part of the program may create, alter or drop an
//! object without an entry that was durable first. Contents of migrated databases are the exception: they are the
//! target's data, and stay. An entry never holds a secret: a replaced verifier is noted, not quoted.

use async_trait::async_trait;

use crate::catalog::journal::{Journal as Catalogue, MadeObject, Side};

/// `REPLICA IDENTITY` of a source table.
pub const REPLICA_IDENTITY: &str = "replica_identity";
/// A role that did not exist.
pub const ROLE: &str = "role";
/// The name of a role that this migration had made.
pub const ROLE_NAME: &str = "role_name";
/// Attributes of a role that existed.
pub const ROLE_ATTRIBUTES: &str = "role_attributes";
/// The password verifier of a role that existed.
pub const ROLE_PASSWORD: &str = "role_password";
/// A membership.
pub const ROLE_MEMBERSHIP: &str = "role_membership";
/// A right of a role on a parameter or a tablespace.
pub const CLUSTER_RIGHT: &str = "cluster_right";
/// A setting of a role.
pub const ROLE_SETTING: &str = "role_setting";
/// A database that did not exist.
pub const DATABASE: &str = "database";
/// A database that was dropped because the operator asked for it.
pub const DATABASE_DROPPED: &str = "database_dropped";

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
    /// Records an intent. The same intent may be recorded again after a crash; the first entry stays.
    async fn record(&self, made: &MadeObject) -> Result<(), JournalError>;
}

#[async_trait]
impl Journal for Catalogue {
    async fn record(&self, made: &MadeObject) -> Result<(), JournalError> {
        Catalogue::record(self, made)
            .await
            .map_err(|source| JournalError { object: made.name.clone(), source: Box::new(source) })
    }
}

/// The same journal for what is brought the other way: what is made, is made on the other server.
pub struct Mirrored<'a>(pub &'a dyn Journal);

#[async_trait]
impl Journal for Mirrored<'_> {
    async fn record(&self, made: &MadeObject) -> Result<(), JournalError> {
        let side = match made.side {
            Side::Source => Side::Target,
            Side::Target => Side::Source,
        };
        self.0.record(&MadeObject { side, ..made.clone() }).await
    }
}
