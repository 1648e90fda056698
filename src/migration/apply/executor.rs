//! Executes planned statements on one connection to the target, pipelined, inside one transaction at a time.
//!
//! ```text
//! BEGIN  change change … change Sync        one chunk, one round trip
//!        change … UPDATE progress Sync      every row count has been checked when this is answered
//! COMMIT Sync                               sent only now: a fenced or mistaken transaction is never committed
//! ```
//!
//! When the connection is lost between COMMIT and its answer, the outcome is found out by the next claim of the progress
//! row, which waits for this transaction's lock on it.

use std::collections::HashSet;
use std::sync::Arc;

use super::plan::{Change, Operation, Value};
use crate::catalog::migrations::Generation;
use crate::catalog::progress::{LANE, UPDATE_SQL};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::postgres::{EncodeError, Pipeline, PipelineError, RawConnection};

/// A chunk is sent when it has this many bytes …
const CHUNK_BYTES: usize = 256 * 1024;
/// … or this many steps.
const CHUNK_STEPS: usize = 1000;

/// A statement failed, or did something else than it should have. Names table and operation, never a value.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The target refused a change.
    #[error("{operation} of table {table} was refused by the target with SQLSTATE {sqlstate}")]
    Refused {
        /// The table.
        table: Arc<QualifiedName>,
        /// What was tried.
        operation: Operation,
        /// Why, as far as it can be told without quoting data.
        sqlstate: String,
    },
    /// A change did not hit exactly one row: source and target differ.
    #[error(
        "{operation} of table {table} hit {rows} rows instead of one: the target's table was changed by someone else"
    )]
    WrongCount {
        /// The table.
        table: Arc<QualifiedName>,
        /// What was done.
        operation: Operation,
        /// Rows that it hit.
        rows: u64,
    },
    /// Another engine has claimed the progress row.
    #[error("another pgcutover has taken over the apply; nothing was committed")]
    Fenced,
    /// The transaction's own statements failed, or the connection did.
    #[error("{doing} on the target failed")]
    Connection {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: PipelineError,
    },
    /// A change does not fit PostgreSQL's protocol, such as a value of more than a gigabyte.
    #[error("a change could not be sent to the target")]
    Unsendable(#[from] EncodeError),
}

/// What a step of the chunk belongs to.
#[derive(Clone, Debug)]
enum Purpose {
    Change { table: Arc<QualifiedName>, operation: Operation },
    Control(&'static str),
    Progress,
}

/// See the module.
#[derive(Debug)]
pub struct Executor {
    connection: RawConnection,
    migration: String,
    generation: Generation,
    chunk: Pipeline,
    /// For each step of the chunk.
    purposes: Vec<Purpose>,
    /// For each step of the chunk that counts rows.
    executed: Vec<Purpose>,
    prepared: HashSet<u64>,
    open: bool,
}

impl Executor {
    /// Takes a fresh connection to the migrated database and prepares it for applying: no trigger, rule or foreign key
    /// fires, because the source's have fired already and their effects are in the stream.
    pub async fn new(
        mut connection: RawConnection,
        migration: &str,
        generation: Generation,
    ) -> Result<Self, ExecuteError> {
        let set = connection.simple_query("SET session_replication_role = replica").await;
        set.map_err(|error| failed("setting session_replication_role", error.into()))?;
        let mut executor = Self {
            connection,
            migration: migration.to_owned(),
            generation,
            chunk: Pipeline::new(),
            purposes: Vec::new(),
            executed: Vec::new(),
            prepared: HashSet::new(),
            open: false,
        };
        for (name, sql) in [("begin", "BEGIN"), ("progress", UPDATE_SQL)] {
            executor.chunk.parse(name, sql, &[])?;
            executor.purposes.push(Purpose::Control("preparing statements"));
        }
        executor.flush().await?;
        Ok(executor)
    }

    /// Whether a transaction is open on the target.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Adds a change to the transaction, which is opened if there is none.
    pub async fn change(&mut self, change: Change) -> Result<(), ExecuteError> {
        self.begin()?;
        let purpose = Purpose::Change { table: change.table, operation: change.operation };
        let name = statement_name(change.statement.id);
        if self.prepared.insert(change.statement.id) {
            self.chunk.parse(&name, &change.statement.sql, &[])?;
            self.purposes.push(purpose.clone());
        }
        self.execute(&name, &change.parameters, purpose)?;
        if self.chunk.encoded_bytes() >= CHUNK_BYTES || self.chunk.steps() >= CHUNK_STEPS {
            self.flush().await?;
        }
        Ok(())
    }

    /// Gives up prepared statements that will not be used again.
    pub fn retire(&mut self, statements: &[u64]) -> Result<(), ExecuteError> {
        for id in statements {
            if self.prepared.remove(id) {
                self.chunk.close(&statement_name(*id))?;
                self.purposes.push(Purpose::Control("closing statements"));
            }
        }
        Ok(())
    }

    /// Sends what has been gathered, waits for its answers and checks every row count.
    pub async fn flush(&mut self) -> Result<(), ExecuteError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let large = self.chunk.encoded_bytes() > 4 * CHUNK_BYTES;
        let outcome = self.connection.run(&mut self.chunk).await;
        if large {
            // One large value must not keep its memory for ever.
            self.chunk = Pipeline::new();
        }
        let purposes = std::mem::take(&mut self.purposes);
        let executed = std::mem::take(&mut self.executed);
        let outcome = outcome.map_err(|error| refused(&purposes, error))?;
        executed.into_iter().zip(outcome.affected).try_for_each(|(purpose, rows)| check(purpose, rows))
    }

    /// Writes the progress into the transaction (its own, when none is open) and waits until everything was answered
    /// and every row count was right. Then only COMMIT is left.
    pub async fn record_progress(
        &mut self,
        commit_lsn: Lsn,
        end_lsn: Lsn,
        marker: Option<&str>,
    ) -> Result<(), ExecuteError> {
        self.begin()?;
        let parameters = [
            Some(commit_lsn.to_string()),
            Some(end_lsn.to_string()),
            marker.map(str::to_owned),
            Some(self.migration.clone()),
            Some(LANE.to_string()),
            Some(self.generation.0.to_string()),
        ];
        let parameters = parameters.map(|text| text.map(|text| Value::from(text.into_bytes())));
        self.execute("progress", &parameters, Purpose::Progress)?;
        self.flush().await
    }

    /// Commits. When it returns, the transaction is on the target's disk (`synchronous_commit` is pinned).
    pub async fn commit(&mut self) -> Result<(), ExecuteError> {
        self.chunk.commit();
        // COMMIT goes through the unnamed statement: two steps.
        self.purposes.extend([Purpose::Control("COMMIT"), Purpose::Control("COMMIT")]);
        self.executed.push(Purpose::Control("COMMIT"));
        self.flush().await?;
        self.open = false;
        Ok(())
    }

    fn begin(&mut self) -> Result<(), ExecuteError> {
        if !self.open {
            self.execute("begin", &[], Purpose::Control("BEGIN"))?;
            self.open = true;
        }
        Ok(())
    }

    fn execute(&mut self, name: &str, parameters: &[Option<Value>], purpose: Purpose) -> Result<(), ExecuteError> {
        self.chunk.execute(name, parameters.iter().map(|value| value.as_deref()))?;
        self.purposes.push(purpose.clone());
        self.executed.push(purpose);
        Ok(())
    }
}

/// A change hits exactly one row; the progress row is there unless a later engine has claimed it.
fn check(purpose: Purpose, rows: u64) -> Result<(), ExecuteError> {
    match purpose {
        Purpose::Change { operation: Operation::Truncate, .. } | Purpose::Control(_) => Ok(()),
        Purpose::Change { .. } | Purpose::Progress if rows == 1 => Ok(()),
        Purpose::Change { table, operation } => Err(ExecuteError::WrongCount { table, operation, rows }),
        Purpose::Progress => Err(ExecuteError::Fenced),
    }
}

/// Whose fault it is.
fn refused(purposes: &[Purpose], error: PipelineError) -> ExecuteError {
    let PipelineError::Step { step, error: answer } = &error else { return failed("applying changes", error) };
    match (purposes.get(*step), answer.sqlstate()) {
        (Some(Purpose::Change { table, operation }), Some(sqlstate)) => {
            ExecuteError::Refused { table: table.clone(), operation: *operation, sqlstate: sqlstate.to_owned() }
        }
        (Some(Purpose::Control(doing)), _) => failed(doing, error),
        (Some(Purpose::Progress), _) => failed("recording the progress", error),
        (Some(Purpose::Change { .. }) | None, _) => failed("applying changes", error),
    }
}

fn failed(doing: &'static str, source: PipelineError) -> ExecuteError {
    ExecuteError::Connection { doing, source }
}

fn statement_name(id: u64) -> String {
    format!("s{id}")
}
