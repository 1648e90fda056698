//! Definitions: a dump by `pg_dump`, cut into its entries, restored one by one with every error recorded.
//!
//! ```text
//! dump ─ create_database ─ restore_pre_data ─ (copy, with the indexes of each table) ─ restore_after_copy
//!      ─ (catch-up) ─ restore_foreign_keys ─ restore_last ─ materialized::refresh ─ analyze
//! ```
//!
//! Every entry that was executed is remembered in the target database in the same transaction, so each step can be
//! repeated after a crash and does only what is missing. An error is never ignored: it comes back with its object.

mod archive;
mod database;
mod dump;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod restore;
mod toc;

use std::path::PathBuf;
use std::time::Duration;

use crate::config::Migration;
use crate::ident::QualifiedName;
use crate::migration::made::{Journal, JournalError};
use crate::postgres::{ConnectError, Connector};

pub use archive::Archive;
pub use database::CarriedDatabase;
pub(in crate::migration) use database::{is_same_icu_locale, parameters as database_parameters};

pub(in crate::migration) use restore::{Locking, Restorer};
pub(in crate::migration) use toc::Entry;
pub use toc::TocError;

/// A `pg_dump` that can read the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgDump {
    /// The program.
    pub path: PathBuf,
    /// Its major version.
    pub major: u32,
}

/// One entry could not be restored.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{kind} {object} could not be restored: {sqlstate} {message}")]
pub struct RestoreFailure {
    /// `TABLE`, `INDEX`, `FK CONSTRAINT`, … as pg_dump says it.
    pub kind: String,
    /// Schema and name, as pg_dump says it.
    pub object: String,
    /// What the target answered; `?????` when it did not.
    pub sqlstate: String,
    /// The target's message.
    pub message: String,
}

impl RestoreFailure {
    /// Whether an object of that name is there, which this migration has not made: its own are marked.
    pub fn is_in_the_way(&self) -> bool {
        // Schemas, relations, columns, functions, and all other objects.
        ["42P06", "42P07", "42701", "42723", "42710"].contains(&self.sqlstate.as_str())
    }
}

/// What a restore step did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RestoreReport {
    /// Entries executed now.
    pub executed: usize,
    /// Entries that an earlier run had executed.
    pub already_done: usize,
    /// Entries that could not be.
    pub failures: Vec<RestoreFailure>,
}

/// What happens to a database that the target has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is used as it is (validation made sure that it is empty, or a crashed run made it).
    Keep,
    /// It is dropped first: `--overwrite-target`, and only until this migration has made its own.
    Drop,
}

/// Whose the connection limit of a database is, on the server that is led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionLimit {
    /// It is brought over.
    IsCarried,
    /// A fence stands, and gives back what it has saved.
    IsTheFences,
}

/// What came of bringing a database in line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// How many statements it took.
    pub changed: usize,
    /// What stays different, and why.
    pub left: Vec<String>,
}

/// Definitions could not be dumped or restored.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// No session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// No usable program.
    #[error(
        "no pg_dump of version {needed} or newer was found ({found}); install the client package of the target's version or set migration.bindir"
    )]
    NoPgDump {
        /// The source's major.
        needed: u32,
        /// What was found.
        found: String,
    },
    /// pg_dump failed.
    #[error("{} could not dump database {database}: {why}", program.display())]
    Dump {
        /// The database.
        database: String,
        /// The program.
        program: PathBuf,
        /// Its complaints.
        why: String,
    },
    /// pg_dump lost its server, or the session that holds its snapshot did: trying again may help.
    #[error("{} lost the server while it dumped database {database}: {why}", program.display())]
    DumpLost {
        /// The database.
        database: String,
        /// The program.
        program: PathBuf,
        /// Its complaints.
        why: String,
    },
    /// The dump could not be cut.
    #[error("the dump of database {database} could not be cut into its entries")]
    Split {
        /// The database.
        database: String,
        /// Why.
        source: TocError,
    },
    /// A catalogue could not be read.
    #[error("the catalogues of database {database} could not be read")]
    Read {
        /// The database.
        database: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// A database could not be made or changed.
    #[error("database {database}: {doing} failed on the target")]
    Database {
        /// The database.
        database: String,
        /// What was being done.
        doing: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The database is there already and differs.
    #[error(
        "database {database} exists on the target with {found}, the source has {wanted}; drop it there or create the migration with --overwrite-target"
    )]
    Differs {
        /// The database.
        database: String,
        /// What the target has.
        found: String,
        /// What the source has.
        wanted: String,
    },
    /// No such database.
    #[error("database {0} does not exist on the source")]
    NoDatabase(String),
    /// The session broke.
    #[error("the session on the target was lost while {object} was restored; retry goes on where it ended")]
    Lost {
        /// Kind and name.
        object: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Another engine has taken over.
    #[error("another engine has taken the migration over, so {object} was not restored")]
    Superseded {
        /// Kind and name.
        object: String,
    },
}

/// Where definitions are restored.
#[derive(Clone, Copy, Debug)]
pub struct RestoreTarget<'a> {
    /// The server that the data moves to.
    pub connector: &'a Connector,
    /// The database.
    pub database: &'a str,
    /// See [`super::copy::CopyContext::guard`].
    pub guard: Option<&'a str>,
}

/// The `pg_dump` to use: `bindir`, then `PATH`, then the usual places. It must be at least as new as the source; the
/// target's own major is preferred, because a newer one may write what the target does not read.
pub async fn find_pg_dump(config: &Migration, source_major: u32, target_major: u32) -> Result<PgDump, SchemaError> {
    dump::find(config, source_major, target_major).await
}

/// Dumps the definitions of `database`, without pgcutover's own schema, publications and subscriptions.
pub async fn dump(
    pg_dump: &PgDump,
    source: &Connector,
    database: &str,
    lock_timeout: Duration,
) -> Result<Archive, SchemaError> {
    dump::dump(pg_dump, source, database, lock_timeout).await
}

/// Makes `database` on the target with the source's encoding, locale and owner, and carries over its settings,
/// connection limit, comment and grants, and the settings of roles in it. Idempotent with [`Existing::Keep`].
/// Returns what both servers have by now.
pub async fn create_database(
    source: &Connector,
    target: &Connector,
    database: &str,
    existing: Existing,
    journal: &dyn Journal,
) -> Result<CarriedDatabase, SchemaError> {
    database::create(source, target, database, existing, journal).await
}

/// Brings the settings of `database`, and of roles in it, its owner, grants, comment and connection limit in line with the
/// source's once more, also by resetting what both had by `carried`, which is brought up to date, and the source no
/// longer has; the settings in `except` (in lower case) are left alone: those that a fence has set. Whether connections
/// are allowed at all is the fence's alone.
pub async fn sync_database(
    source: &Connector,
    target: &Connector,
    database: &str,
    except: &[&str],
    limit: ConnectionLimit,
    carried: &mut CarriedDatabase,
) -> Result<Synced, SchemaError> {
    database::sync(source, target, database, except, limit, carried).await
}

/// Types, functions, tables, views: everything before the rows.
pub async fn restore_pre_data(target: &RestoreTarget<'_>, archive: &Archive) -> Result<RestoreReport, SchemaError> {
    let mut restorer = Restorer::open(*target, archive, "schema").await?;
    restorer.entries(&archive.pre_data, Locking::Patient).await?;
    Ok(restorer.finish())
}

/// What needs rows or the tables' own indexes and does not hinder applying: indexes of partitioned tables, statistics,
/// grants, comments. Call it once every table is copied.
pub async fn restore_after_copy(target: &RestoreTarget<'_>, archive: &Archive) -> Result<RestoreReport, SchemaError> {
    let mut restorer = Restorer::open(*target, archive, "schema").await?;
    // Normally done by the copy; here for tables that nobody copied.
    let mut tables: Vec<_> = archive.by_table.iter().collect();
    tables.sort_by_key(|(oid, _)| **oid);
    for (_, entries) in tables {
        restorer.entries(entries, Locking::Patient).await?;
    }
    restorer.entries(&archive.after_copy, Locking::Brief).await?;
    Ok(restorer.finish())
}

/// Foreign keys, once the stream has caught up: added NOT VALID and then validated where PostgreSQL can, so that
/// applying waits only for a moment. One that is NOT VALID on the source stays so.
pub async fn restore_foreign_keys(target: &RestoreTarget<'_>, archive: &Archive) -> Result<RestoreReport, SchemaError> {
    let mut restorer = Restorer::open(*target, archive, "schema").await?;
    restorer.foreign_keys(&archive.foreign_keys).await?;
    Ok(restorer.finish())
}

/// Triggers, rules, policies, event triggers, and what hangs on them.
pub async fn restore_last(target: &RestoreTarget<'_>, archive: &Archive) -> Result<RestoreReport, SchemaError> {
    let mut restorer = Restorer::open(*target, archive, "schema").await?;
    restorer.entries(&archive.last, Locking::Brief).await?;
    Ok(restorer.finish())
}

/// `ANALYZE` of what has no statistics yet, or not all: tables that [`analyze_table`] was not called for, parents,
/// materialised views, and tables with statistics objects or indexes on expressions.
pub async fn analyze(target: &Connector, database: &str) -> Result<(), SchemaError> {
    let control = target.control(database, "analyze").await?;
    let failed = |source| SchemaError::Database { database: database.to_owned(), doing: "ANALYZE".to_owned(), source };
    for row in control.query(WITHOUT_STATISTICS, &[]).await.map_err(failed)? {
        let analyze = format!("ANALYZE {}", row.get::<_, &str>(0));
        match control.batch_execute(&analyze).await {
            // Somebody has dropped it meanwhile.
            Err(error) if error.code().is_some_and(|code| code.code() == "42P01") => {}
            done => done.map_err(failed)?,
        }
    }
    Ok(())
}

/// Building an index on a table tells how many rows it has, and nothing of what they hold: statistics of columns are
/// looked for. Empty tables have none either, and those of tables that the role may not read are not shown to it.
const WITHOUT_STATISTICS: &str = "\
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_'
   AND (c.relkind = 'm' AND c.relispopulated OR c.relkind = 'p'
        OR c.relkind = 'r' AND (c.relhassubclass
             OR NOT EXISTS (SELECT FROM pg_catalog.pg_stats s
                             WHERE s.schemaname = n.nspname AND s.tablename = c.relname)
             OR EXISTS (SELECT FROM pg_catalog.pg_statistic_ext s WHERE s.stxrelid = c.oid)
             OR EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indexprs IS NOT NULL)))
 ORDER BY c.relkind DESC, 1";

/// `ANALYZE` of one table, as soon as its indexes are there.
pub(in crate::migration) async fn analyze_table(
    target: &Connector,
    database: &str,
    table: &QualifiedName,
) -> Result<(), SchemaError> {
    let control = target.control(database, "analyze").await?;
    let analyzed = control.batch_execute(&format!("ANALYZE {table}")).await;
    analyzed.map_err(|source| SchemaError::Database {
        database: database.to_owned(),
        doing: format!("ANALYZE {table}"),
        source,
    })
}

/// The definitions of `database` on `server` as pg_dump writes them, without what differs from run to run: what source
/// and target are compared by after a migration.
pub async fn definitions(
    pg_dump: &PgDump,
    server: &Connector,
    database: &str,
    lock_timeout: Duration,
) -> Result<String, SchemaError> {
    dump::definitions(pg_dump, server, database, lock_timeout).await
}
