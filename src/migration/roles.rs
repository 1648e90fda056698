//! Roles, memberships, settings and password verifiers: shared objects that no dump of a database and no stream carries.
//!
//! The proxy logs a client in to either server with what the client itself proved, so a role's verifier must be the same
//! on both. Verifiers never reach a log, an error or the journal.

use crate::migration::made::{Journal, JournalError};
use crate::postgres::{ConnectError, Connector};

/// What became of one role.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RoleReport {
    /// The role.
    pub role: String,
    /// What was done.
    pub action: RoleAction,
    /// What the operator should know: attributes that could not be given, verifiers that differ and stay.
    pub warnings: Vec<String>,
}

/// What was done with a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoleAction {
    /// It was the same already.
    Unchanged,
    /// It was made.
    Created,
    /// Attributes, verifier, memberships or settings were brought in line.
    Altered,
}

/// Roles could not be carried over.
#[derive(Debug, thiserror::Error)]
pub enum RolesError {
    /// No session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A catalogue could not be read.
    #[error("the roles of the {server} could not be read")]
    Read {
        /// `source` or `target`.
        server: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// A role could not be made or altered.
    #[error(
        "role {role} could not be {doing} on the target; give the target's login role the right to, or make the role by hand"
    )]
    Write {
        /// The role.
        role: String,
        /// `created`, `altered`, …
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Brings the target's roles in line with the source's: every role whose name does not start with `pg_`, its attributes,
/// verifier (where it can be read), memberships and settings. Settings of a role in a database come with
/// [`super::schema::create_database`]. Idempotent.
pub async fn copy_roles(
    source: &Connector,
    target: &Connector,
    journal: &dyn Journal,
) -> Result<Vec<RoleReport>, RolesError> {
    let _ = (source, target, journal);
    unimplemented!()
}
