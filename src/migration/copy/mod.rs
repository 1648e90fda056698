//! Rows: every table under a snapshot of its own, its bytes passed from source to target unparsed, its indexes built as
//! soon as it ends.
//!
//! ```text
//! source                                                   stream
//!   slot made                                                from here
//!   barrier: a transaction with xid B commits
//!   LOCK TABLE t ACCESS SHARE   (no TRUNCATE, no rewrite from now on)
//!   snapshot, xmin > B          (everything before the slot is visible)
//!   L = insert LSN              (every commit the snapshot sees begins before L)
//!   recorded durably: xmin, xmax, xip, L
//!   COPY t
//!   WAL flushed past L          (a crash takes back nothing that the snapshot saw)
//! ```
//!
//! A streamed transaction is skipped for `t` iff its commit LSN < L and its top-level xid is visible in the snapshot.

mod dispatch;
mod holder;
mod indexes;
mod pace;
mod pairs;
mod parts;
mod table;
mod tables;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::config::Migration;
use crate::failpoint::{self, Failpoints};
use crate::ident::QualifiedName;
use crate::migration::schema::{Archive, RestoreFailure, SchemaError};
use crate::migration::snapshot::HandOver;
use crate::postgres::{self, ConnectError, Connector, Control, RawError};

use pace::Pace;
pub(in crate::migration) use pace::Traffic;

/// A table to copy.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceTable {
    /// Its name.
    pub name: QualifiedName,
    /// Its OID on the source.
    pub oid: u32,
    /// Heap and TOAST, in bytes, when it was listed.
    pub bytes: u64,
    /// The planner's estimate; none: never analysed.
    pub rows_estimate: Option<u64>,
    /// A configuration table of an extension (`pg_extension_config_dump`): the target's CREATE EXTENSION has made it.
    pub of_extension: bool,
    /// Rows to copy of such a table: the `WHERE …` that the extension registered.
    pub filter: Option<String>,
}

/// What a table's copy amounted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CopiedRows {
    /// Rows, as both servers counted them.
    pub rows: u64,
    /// Bytes of COPY data.
    pub bytes: u64,
}

impl CopiedRows {
    fn add(&mut self, more: Self) {
        self.rows += more.rows;
        self.bytes += more.bytes;
    }
}

/// The engine's record of tables. Each call is durable when it returns; an error stops the table.
#[async_trait]
pub trait TableRecorder: Send + Sync {
    /// Before the first row of a copy is read. Replaces what an earlier attempt recorded.
    async fn snapshot_taken(&self, table: &SourceTable, hand_over: &HandOver) -> Result<(), RecordError>;
    /// After the last row was committed on the target.
    async fn rows_copied(&self, table: &SourceTable, copied: CopiedRows) -> Result<(), RecordError>;
    /// After the last of the table's own indexes and constraints; the table is ready for its stream.
    async fn indexes_built(&self, table: &SourceTable) -> Result<(), RecordError>;
}

/// The engine's record could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the progress of the copy could not be recorded")]
pub struct RecordError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Told as it happens, for views and metrics; never blocks.
pub trait CopyProgress: Send + Sync {
    /// A copy of this table begins (again).
    fn started(&self, table: &SourceTable);
    /// More rows and bytes were handed to the target; not yet committed.
    fn moved(&self, table: &SourceTable, rows: u64, bytes: u64);
    /// So many indexes and constraints of the table are built, of so many.
    fn indexes(&self, table: &SourceTable, built: usize, total: usize);
    /// One connection more (1) builds indexes of the table, or one fewer (-1) does.
    fn building(&self, table: &SourceTable, change: isize);
}

/// Bounds on concurrency and speed, shared by all databases of all migrations.
#[derive(Clone, Debug)]
pub struct Workers {
    copy: Arc<Semaphore>,
    index: Arc<Semaphore>,
    pace: Arc<Pace>,
}

impl Workers {
    /// As configured.
    pub fn new(config: &Migration) -> Self {
        Self {
            copy: Arc::new(Semaphore::new(config.copy_workers.max(1))),
            index: Arc::new(Semaphore::new(config.index_workers.max(1))),
            pace: Arc::new(Pace::new(config.copy_rate_bytes)),
        }
    }

    /// Halts the copy, lets it go on, or lifts its limits.
    pub(in crate::migration) fn direct(&self, traffic: Traffic) {
        self.pace.direct(traffic);
    }
}

/// What a copy needs to know.
#[derive(Clone)]
pub struct CopyContext {
    /// The server that holds the data.
    pub source: Connector,
    /// The server that the data moves to.
    pub target: Connector,
    /// The database.
    pub database: String,
    /// `[migration]`
    pub config: Migration,
    /// Shared bounds.
    pub workers: Workers,
    /// Xid of the transaction that was committed after the slot was made; snapshots must have `xmin` above it. None in
    /// offline mode.
    pub barrier_xid: Option<u64>,
    /// Query that must return a row, run first in every writing transaction on the target; it should lock that row FOR
    /// SHARE, so that a superseded engine cannot write beside its successor.
    pub guard: Option<String>,
    /// Durable progress.
    pub recorder: Arc<dyn TableRecorder>,
    /// Live progress.
    pub progress: Arc<dyn CopyProgress>,
    /// `copy.snapshot_taken`, `copy.part_committed`, `copy.committed`, `copy.recorded`, `copy.indexes_built`.
    pub failpoints: Failpoints,
}

impl CopyContext {
    async fn hit(&self, point: &'static str, table: &SourceTable) -> Result<(), CopyError> {
        let passed = self.failpoints.hit(point).await;
        passed.map_err(|source| CopyError::Failpoint { table: table.name.clone(), source })
    }
}

/// What is left to do for a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Rows, then indexes.
    Rows,
    /// Indexes only: its rows were copied before a restart.
    Indexes,
}

/// What a copy of a database came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Tables whose rows were copied now.
    pub tables: usize,
    /// Their rows and bytes.
    pub copied: CopiedRows,
    /// Indexes and constraints that could not be built.
    pub failures: Vec<RestoreFailure>,
}

/// A table could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// No session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A catalogue could not be read.
    #[error("the tables of the source could not be listed")]
    List(#[source] tokio_postgres::Error),
    /// A connection or a server failed.
    #[error("{table}: {doing} failed on the {server}")]
    Server {
        /// The table.
        table: QualifiedName,
        /// `source` or `target`.
        server: &'static str,
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: Box<RawError>,
    },
    /// The COPY itself failed.
    #[error("{table}: its rows could not be copied")]
    Copy {
        /// The table.
        table: QualifiedName,
        /// Why, and on which side.
        source: postgres::CopyError,
    },
    /// The table stayed locked.
    #[error("{table} stayed locked on the source for {waited:?} by {blockers}; end that transaction and retry")]
    Locked {
        /// The table.
        table: QualifiedName,
        /// Over all attempts.
        waited: Duration,
        /// Process ids and application names.
        blockers: String,
    },
    /// No snapshot came that surely shows everything from before the slot.
    #[error(
        "{table}: transactions from before the slot were still running after {waited:?}: {blockers}; end them and retry"
    )]
    Barrier {
        /// The table.
        table: QualifiedName,
        /// How long.
        waited: Duration,
        /// Who.
        blockers: String,
    },
    /// A source that restarts ends it, too.
    #[error("{table}: the transaction with the snapshot that its readers share has ended")]
    HolderGone {
        /// The table.
        table: QualifiedName,
    },
    /// The table is gone.
    #[error(
        "{table} was dropped, or dropped and made again, while the migration ran; cancel it and start it again, with no change of definitions meanwhile"
    )]
    Vanished {
        /// The table.
        table: QualifiedName,
    },
    /// The table was altered.
    #[error(
        "{table} was altered after its definition was dumped: {difference}; cancel the migration and start it again, with no change of definitions meanwhile"
    )]
    Columns {
        /// The table.
        table: QualifiedName,
        /// What differs.
        difference: String,
    },
    /// Source and target do not agree.
    #[error(
        "{table}: the source sent {sent} rows and the target took {taken}; something on the target drops rows, such as a trigger or rule of its own"
    )]
    Count {
        /// The table.
        table: QualifiedName,
        /// Rows the source counted.
        sent: u64,
        /// Rows the target counted.
        taken: u64,
    },
    /// The server's answer makes no sense.
    #[error("{table}: its {what} could not be read")]
    Unreadable {
        /// The table.
        table: QualifiedName,
        /// What.
        what: &'static str,
    },
    /// Indexes could not even be tried.
    #[error("{table}: its indexes could not be built")]
    Indexes {
        /// The table.
        table: QualifiedName,
        /// Why.
        source: Box<SchemaError>,
    },
    /// Another engine has taken over.
    #[error("{table}: another engine has taken the migration over")]
    Superseded {
        /// The table.
        table: QualifiedName,
    },
    /// The record could not be written.
    #[error("{table}: its progress could not be recorded")]
    Record {
        /// The table.
        table: QualifiedName,
        /// Why.
        source: RecordError,
    },
    /// The program is stopping.
    #[error("the copy was stopped")]
    Stopped,
    /// A test made it fail.
    #[error("{table}")]
    Failpoint {
        /// The table.
        table: QualifiedName,
        /// Which.
        source: failpoint::Failed,
    },
}

impl CopyError {
    /// Whether another attempt may succeed: a link broke, a server is restarting, a lock was in the way.
    fn may_pass(&self) -> bool {
        let sqlstate = match self {
            Self::HolderGone { .. } => return true,
            Self::Connect(error) => match error.sqlstate() {
                None => return true,
                Some(code) => code,
            },
            Self::Server { source, .. } => match &**source {
                RawError::Io { .. } => return true,
                RawError::Server { code, .. } => code,
                RawError::Protocol { .. } => return false,
            },
            Self::Copy { source, .. } => match &*source.source {
                RawError::Io { .. } => return true,
                RawError::Server { code, .. } => code,
                RawError::Protocol { .. } => return false,
            },
            _ => return false,
        };
        // Connection exceptions, transaction rollbacks, too many connections, lock not available, operator intervention
        // other than a cancelled query.
        ["08", "40", "53300", "55P03", "57P"].iter().any(|class| sqlstate.starts_with(class))
    }
}

/// Ordinary tables of the database that are migrated (leaves of partitioned tables, not their parents), largest first.
/// Both the publication and the copy are made from this list.
pub async fn list_tables(source: &Control) -> Result<Vec<SourceTable>, CopyError> {
    tables::list(source, tables::MEASURED).await.map_err(CopyError::List)
}

/// The same by name, with no sizes: whoever asks does not wait for somebody who has locked a table.
pub async fn list_tables_unmeasured(source: &Control) -> Result<Vec<SourceTable>, tokio_postgres::Error> {
    tables::list(source, tables::UNMEASURED).await
}

/// Copies `tables` and builds their indexes, as many at a time as [`Workers`] allows. Dropping the future stops
/// everything at once; what was recorded stays true.
pub async fn copy_database(
    context: &CopyContext,
    tables: &[(SourceTable, Stage)],
    archive: &Archive,
) -> Result<CopyReport, CopyError> {
    dispatch::run(context, tables, &Arc::new(archive.clone())).await
}
