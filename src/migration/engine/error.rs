//! What the engine answers when it cannot, and why a worker cannot go on.

use std::time::Duration;

use crate::catalog::RecordError;
use crate::catalog::door::DoorError;
use crate::catalog::migrations::CatalogError;
use crate::failpoint;
use crate::ident::QualifiedName;
use crate::migration::apply::applier::ApplyError;
use crate::migration::apply::plan::PlanError;
use crate::migration::copy::CopyError;
use crate::migration::ddl::DdlError;
use crate::migration::drift::Drift;
use crate::migration::identity::IdentityError;
use crate::migration::late::LateError;
use crate::migration::made::JournalError;
use crate::migration::publication::PublicationError;
use crate::migration::roles::RolesError;
use crate::migration::schema::{RestoreFailure, SchemaError};
use crate::migration::sequences::SequenceError;
use crate::migration::state::Rejected;
use crate::migration::stream::{StreamError, describe, transient_query, transient_raw, transient_sqlstate};
use crate::migration::unstreamed::UnstreamedError;
use crate::migration::verify::VerifyError;
use crate::migration::view::Problem;
use crate::postgres::walsender::WalsenderError;
use crate::postgres::{ConnectError, RawError};

/// An order could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No such migration.
    #[error("there is no migration named {0:?}")]
    NotFound(String),
    /// The order has no place where the migration stands.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// The order makes no sense.
    #[error("{0}")]
    BadRequest(String),
    /// This process does not run the engine at the moment.
    #[error("the engine is not running here: {0}")]
    Unavailable(String),
    /// The catalogue could not be read or written; nothing was changed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The source's databases could not be listed.
    #[error("the databases of the source could not be listed")]
    Databases(#[source] tokio_postgres::Error),
    /// The definitions could not be compared.
    #[error("the definitions of database {database} could not be compared")]
    Drift {
        /// The database.
        database: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The same, because somebody has locked tables.
    #[error(
        "the definitions of database {database} could not be compared within lock_timeout of {waited:?}: locked exclusively are {by}; wait until that has ended, or end it"
    )]
    Locked {
        /// The database.
        database: String,
        /// For how long.
        waited: Duration,
        /// Tables, and who has locked them.
        by: String,
    },
    /// Rules of the validation that held before the migration began do not hold now.
    #[error("rules of the validation fail now: {0}; `migration validation` tells what mends them")]
    Invalid(String),
    /// A statement of a fix failed; those before it were run.
    #[error("the fix stopped at: {statement}")]
    Fix {
        /// Where and what.
        statement: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The configuration wants source and target to be equal before a cutover.
    #[error(
        "source and target differ in {differences} places, among them {first}, and [cutover] require_verified is set: `migration verify` lists them"
    )]
    Unverified {
        /// How many.
        differences: u64,
        /// Some of them.
        first: String,
    },
    /// A cutover is to find every table equal, and this one is not what was compared.
    #[error(
        "database {database}: table {table} was altered or replaced since it was verified, and [cutover] require_verified is set: order the cutover again, which verifies it first"
    )]
    Altered {
        /// The database.
        database: String,
        /// The table.
        table: QualifiedName,
    },
    /// A verification could not be carried to its end; what it has found so far is kept.
    #[error("database {database} could not be verified to the end: verify it again to go on")]
    Verify {
        /// The database.
        database: String,
        /// Why.
        source: Box<VerifyError>,
    },
    /// Something was defined on the source after the migration began.
    #[error(
        "database {database}: the target lacks {drift}, defined on the source since the migration began; cancel the migration and create it again, or define the same on the target and empty tables that were made since: no stream carries their rows"
    )]
    Drifted {
        /// The database.
        database: String,
        /// What.
        drift: Drift,
    },
    /// Definitions that come late could not be tried out, or are in the way.
    #[error("database {database}: {source}")]
    Late {
        /// The database.
        database: String,
        /// Why.
        source: LateError,
    },
    /// Roles could not be brought over again.
    #[error(transparent)]
    Roles(#[from] RolesError),
    /// The settings of a database could not be brought over again.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// What no stream carries could not be brought over again.
    #[error("database {database}: {source}")]
    Unstreamed {
        /// The database.
        database: String,
        /// Why.
        source: UnstreamedError,
    },
    /// The stream back could not be prepared, or not be removed.
    #[error("{0}")]
    Return(String),
}

/// A worker cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Bootstrap(#[from] RecordError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{doing} failed")]
    Query { doing: &'static str, source: tokio_postgres::Error },
    #[error("{} tables have no replica identity and may not be given one: {}", .0.len(), .0.join(", "))]
    NoIdentity(Vec<String>),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Publication(#[from] PublicationError),
    /// The apply could not be held where a snapshot of the source looks.
    #[error(transparent)]
    Still(Box<VerifyError>),
    #[error("publication {0} exists on the source already and is not this migration's")]
    PublicationTaken(String),
    #[error(transparent)]
    Ddl(#[from] DdlError),
    #[error(transparent)]
    Slot(#[from] WalsenderError),
    #[error(transparent)]
    Door(#[from] DoorError),
    #[error(transparent)]
    Roles(#[from] RolesError),
    #[error(transparent)]
    Schema(Box<SchemaError>),
    #[error("{} definitions could not be restored on the target, the first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Restore(Vec<RestoreFailure>),
    #[error(transparent)]
    Copy(Box<CopyError>),
    #[error("table {0} is not on the source any more")]
    TableGone(String),
    #[error("database {0} was rolled back, and no stream could be made that would lead to the target again")]
    NoStream(String),
    #[error(transparent)]
    Stream(Box<StreamError>),
    #[error("the target's login role may not set session_replication_role, and the target has: {}", .0.join(", "))]
    WouldFire(Vec<String>),
    #[error("database {database:?} of the source is not the one in use, and must not replace the target's: {reason}")]
    NotTheSource { database: String, reason: String },
    #[error(transparent)]
    Late(#[from] LateError),
    #[error(transparent)]
    Sequences(#[from] SequenceError),
    #[error(transparent)]
    Unstreamed(#[from] UnstreamedError),
    #[error(transparent)]
    Failpoint(#[from] failpoint::Failed),
    #[error("the engine is stopping")]
    Stopping,
}

impl From<SchemaError> for WorkError {
    fn from(error: SchemaError) -> Self {
        Self::Schema(Box::new(error))
    }
}

impl From<CopyError> for WorkError {
    fn from(error: CopyError) -> Self {
        Self::Copy(Box::new(error))
    }
}

impl From<StreamError> for WorkError {
    fn from(error: StreamError) -> Self {
        Self::Stream(Box::new(error))
    }
}

impl WorkError {
    /// Whether another engine has taken over: there is nothing to record and nobody to tell.
    pub(super) fn is_fenced(&self) -> bool {
        match self {
            Self::Catalog(CatalogError::Fenced(_)) | Self::Stopping => true,
            Self::Copy(error) if matches!(**error, CopyError::Superseded { .. }) => true,
            Self::Schema(error) if matches!(**error, SchemaError::Superseded { .. }) => true,
            Self::Stream(error) if matches!(**error, StreamError::Catalog(CatalogError::Fenced(_))) => true,
            other => chain(other).any(|cause| matches!(cause.downcast_ref(), Some(CatalogError::Fenced(_)))),
        }
    }

    /// Whether trying again can help without anybody doing anything about it.
    pub(super) fn is_transient(&self) -> bool {
        if let Some(error) = self.connect_error() {
            return connect_is_transient(error);
        }
        match self {
            Self::Connect(error) => connect_is_transient(error),
            Self::Catalog(error) => catalog_is_transient(error),
            Self::Stream(error) => error.is_transient(),
            Self::Schema(error) if matches!(**error, SchemaError::DumpLost { .. }) => true,
            Self::Slot(WalsenderError::Raw(error)) => transient_raw(error),
            Self::Sequences(SequenceError::Held(_)) => true,
            Self::Restore(failures) => failures.iter().all(|failure| restore_is_transient(&failure.sqlstate)),
            // The next attempt takes a snapshot of its own.
            Self::Copy(error) if matches!(**error, CopyError::HolderGone { .. }) => true,
            Self::Still(error) => matches!(**error, VerifyError::NoCommonSnapshot { .. }) || error.is_transient(),
            Self::NoIdentity(_)
            | Self::PublicationTaken(_)
            | Self::TableGone(_)
            | Self::NoStream(_)
            | Self::WouldFire(_)
            | Self::NotTheSource { .. }
            | Self::Failpoint(_)
            | Self::Slot(_)
            | Self::Stopping => false,
            Self::Bootstrap(_)
            | Self::Door(_)
            | Self::Ddl(_)
            | Self::Journal(_)
            | Self::Query { .. }
            | Self::Identity(_)
            | Self::Publication(_)
            | Self::Roles(_)
            | Self::Schema(_)
            | Self::Copy(_)
            | Self::Unstreamed(_)
            | Self::Late(_)
            | Self::Sequences(_) => chain(self).find_map(cause_is_transient).unwrap_or(false),
        }
    }

    /// The failed connection behind an error that passes it on as its own.
    fn connect_error(&self) -> Option<&ConnectError> {
        match self {
            Self::Connect(error) | Self::Roles(RolesError::Connect(error)) => Some(error),
            Self::Slot(WalsenderError::Connect(error)) => Some(error),
            Self::Schema(error) => match &**error {
                SchemaError::Connect(error) => Some(error),
                _ => None,
            },
            Self::Copy(error) => match &**error {
                CopyError::Connect(error) => Some(error),
                CopyError::Indexes { source, .. } => match &**source {
                    SchemaError::Connect(error) => Some(error),
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        }
    }

    /// For the operator. Never quotes a row.
    pub(super) fn problem(&self, database: Option<&str>) -> Problem {
        let (code, hint) = match self {
            Self::Connect(_) | Self::Door(_) => {
                ("connection", "check that both servers run and that the configured role may log in")
            }
            Self::Catalog(_) | Self::Bootstrap(_) | Self::Journal(_) => {
                ("catalog", "the configured role must be able to create and write the pgcutover schema")
            }
            Self::Query { .. } => ("query", ""),
            Self::NoIdentity(_) => (
                "replica_identity",
                "give each table a primary key, or set REPLICA IDENTITY, or set migration.without_identity = \"full\"",
            ),
            Self::Identity(_) => ("replica_identity", "end the transactions that lock the table, then retry"),
            Self::Slot(WalsenderError::SlotTimeout { .. })
            | Self::Publication(PublicationError::StillRunning { .. }) => {
                ("slot_timeout", "end the transactions that have been open for long, then retry")
            }
            Self::Publication(_) | Self::PublicationTaken(_) => {
                ("publication", "the configured role must own the tables or be a superuser")
            }
            Self::Slot(_) => ("slot", "wal_level must be logical, with free replication slots and walsenders"),
            Self::Ddl(_) => {
                ("ddl", "log in to the source as a superuser, or set migration.ddl to \"refuse\" or \"detect\"")
            }
            Self::Roles(_) => ("roles", ""),
            Self::Schema(_) => ("schema", ""),
            Self::Restore(failures) if failures.iter().any(RestoreFailure::is_in_the_way) => {
                ("restore", IN_THE_WAY_HINT)
            }
            Self::Restore(_) => ("restore", "mend the cause on the target (a missing extension, say), then retry"),
            Self::Copy(_) => ("copy", ""),
            Self::TableGone(_) => ("table_gone", "cancel the migration and create it again"),
            Self::NoStream(_) => {
                ("slot_missing", "cancel the migration and create it again with --overwrite-target; the source serves")
            }
            Self::Stream(error) => (error.code(), stream_hint(error)),
            Self::WouldFire(_) => ("would_fire", WOULD_FIRE_HINT),
            Self::NotTheSource { .. } => {
                ("not_the_source", "cancel it; `pgcutover status` says which server is in use")
            }
            Self::Late(_) => ("late_definitions", ""),
            Self::Sequences(_) => ("sequences", ""),
            Self::Unstreamed(_) | Self::Still(_) => ("unstreamed", ""),
            Self::Failpoint(_) => ("failpoint", ""),
            Self::Stopping => ("stopping", ""),
        };
        let object = match self {
            Self::Stream(error) => error.table(),
            Self::Restore(failures) => failures.first().map(|failure| format!("{} {}", failure.kind, failure.object)),
            _ => None,
        };
        Problem {
            code: code.to_owned(),
            message: describe(self),
            object: object.or_else(|| database.map(|name| format!("database {name}"))),
            hint: Some(hint).filter(|hint| !hint.is_empty()).map(str::to_owned),
        }
    }
}

/// Triggers and foreign keys act on rows that are written for the second time.
const WOULD_FIRE_HINT: &str = "let the server's login role set session_replication_role (GRANT SET ON PARAMETER, from \
    PostgreSQL 15 on), then retry; where no service gives that right, leave out the extension that brings them";

/// What the migration has made itself is marked, and not made again.
const IN_THE_WAY_HINT: &str = "the target's database has an object of that name which this migration has not made: DROP it \
    there, then retry; or cancel the migration and create it again with --overwrite-target";

fn stream_hint(error: &StreamError) -> &'static str {
    if matches!(error, StreamError::Apply(ApplyError::Plan(PlanError::Renamed { .. }))) {
        return "where nothing was written to it since, give it back its name on the source and retry; otherwise cancel the \
                migration and create it again with --overwrite-target";
    }
    if matches!(error, StreamError::Apply(ApplyError::Plan(PlanError::PartOfKey { .. }))) {
        return "cancel the migration, give the table a key without generated columns, and create the migration again with \
                --overwrite-target";
    }
    match error.code() {
        "slot_missing" | "slot_lost" | "slot_ahead" | "source_history" => {
            "the target cannot catch up any more: cancel the migration and create it again with --overwrite-target"
        }
        "would_fire" => WOULD_FIRE_HINT,
        "schema_differs" => "make the same change of definition on the target, then retry",
        "ddl" => "see to it that the target takes the command (an extension or a role that it lacks, say), then retry",
        "target_differs" => {
            "somebody else writes to the target: cancel the migration and create it again with --overwrite-target"
        }
        _ => "",
    }
}

fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

fn connect_is_transient(error: &ConnectError) -> bool {
    error.sqlstate().is_none_or(transient_sqlstate)
}

/// Whether a definition that was refused may be taken later. No file of an extension comes by itself (58P01), and no limit
/// that was configured goes (53400).
fn restore_is_transient(sqlstate: &str) -> bool {
    transient_sqlstate(sqlstate) && !["58P01", "53400"].contains(&sqlstate)
}

fn catalog_is_transient(error: &CatalogError) -> bool {
    match error {
        CatalogError::Connect { source, .. } => connect_is_transient(source),
        CatalogError::Query { source, .. } => transient_query(source),
        CatalogError::Fenced(_) | CatalogError::Unreadable { .. } | CatalogError::Exists(_) => false,
    }
}

/// Whether a cause is one that may pass; none: it does not say.
fn cause_is_transient(cause: &(dyn std::error::Error + 'static)) -> Option<bool> {
    if let Some(error) = cause.downcast_ref::<tokio_postgres::Error>() {
        return Some(transient_query(error));
    }
    if let Some(error) = cause.downcast_ref::<RawError>() {
        return Some(transient_raw(error));
    }
    if let Some(error) = cause.downcast_ref::<Box<RawError>>() {
        return Some(transient_raw(error));
    }
    if let Some(error) = cause.downcast_ref::<CatalogError>() {
        return Some(catalog_is_transient(error));
    }
    cause.downcast_ref::<ConnectError>().map(connect_is_transient)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> RawError {
        RawError::Io {
            label: "source".to_owned(),
            doing: "reading".to_owned(),
            source: std::io::ErrorKind::ConnectionReset.into(),
        }
    }

    #[test]
    fn a_lost_connection_is_tried_again_wherever_it_was_lost() {
        let table = crate::ident::QualifiedName::new("s", "t");
        let copy = CopyError::Server { table, server: "source", doing: "COPY", source: Box::new(lost()) };
        assert!(WorkError::from(copy).is_transient());
        assert!(WorkError::Slot(WalsenderError::Raw(lost())).is_transient());
        assert!(!WorkError::TableGone("s.t".to_owned()).is_transient());
    }

    fn refused(sqlstate: &str) -> RestoreFailure {
        RestoreFailure {
            kind: "TABLE".to_owned(),
            object: "s.t".to_owned(),
            sqlstate: sqlstate.to_owned(),
            message: String::new(),
        }
    }

    #[test]
    fn a_snapshot_that_was_lost_is_taken_again() {
        let table = crate::ident::QualifiedName::new("s", "t");
        assert!(WorkError::from(CopyError::HolderGone { table: table.clone() }).is_transient());
        assert!(!WorkError::from(CopyError::Vanished { table }).is_transient());
    }

    #[test]
    fn what_was_refused_for_the_moment_is_tried_again() {
        for code in ["57P01", "57014", "55P03", "40P01", "53100", "53300", "58030"] {
            assert!(WorkError::Restore(vec![refused(code), refused("40P01")]).is_transient(), "{code}");
            assert!(!WorkError::Restore(vec![refused(code), refused("42704")]).is_transient(), "{code}");
        }
        for code in ["58P01", "53400", "23503"] {
            assert!(!WorkError::Restore(vec![refused(code)]).is_transient(), "{code}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_to_be_dropped() {
        let hint = |sqlstate: &str| WorkError::Restore(vec![refused(sqlstate)]).problem(None).hint.expect("one");
        for code in ["42P06", "42P07", "42701", "42710", "42723"] {
            assert!(hint(code).contains("DROP it there"), "{code}");
        }
        assert!(!hint("42704").contains("DROP it"));
    }

    #[test]
    fn a_fenced_engine_is_recognised_behind_other_errors() {
        let fenced = || CatalogError::Fenced(3);
        let journal = JournalError { object: "x".to_owned(), source: Box::new(fenced()) };
        assert!(WorkError::Journal(journal).is_fenced());
        assert!(WorkError::Catalog(fenced()).is_fenced());
        assert!(!WorkError::NoIdentity(vec![]).is_fenced());
    }
}
