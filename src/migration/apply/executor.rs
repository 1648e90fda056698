//! Executes pieces on one connection to the target, pipelined, inside one transaction at a time.
//!
//! ```text
//! BEGIN  deletes updates COPY … UPDATE progress Sync      one piece, one round trip; every row count is then checked
//! COMMIT Sync                                             sent only now: a fenced or mistaken transaction is never committed
//! ```
//!
//! A piece is executed as sets, which may be refused where its changes one by one are not: two rows that swapped the values
//! of a unique column. Then it is undone (a later piece of a long transaction has a savepoint for this) and executed again
//! in the source's own order. What fails then is an error, and names the one change.
//!
//! The planner is kept from reading whole tables for a handful of keys: every set is found by its index.
//!
//! When the connection is lost between COMMIT and its answer, the outcome is found out by the next claim of the progress
//! row, which waits for this transaction's lock on it.

use std::sync::Arc;

use bytes::Bytes;

use super::encode::{Chunk, Encoder, Purpose};
use super::gather::{End, Piece};
use super::plan::Operation;
use super::plan_table::{RowChange, Table};
use crate::catalog::migrations::Generation;
use crate::catalog::progress::{LANE, UPDATE_SQL};
use crate::ident::QualifiedName;
use crate::migration::stream::transient_sqlstate;
use crate::pgoutput::{self, Message};
use crate::postgres::{EncodeError, Pipeline, PipelineError, RawConnection};

/// Changes that are executed one by one are sent when they come to this many bytes …
const CHUNK_BYTES: usize = 256 * 1024;
/// … or this many steps.
const CHUNK_STEPS: usize = 1000;

/// Sets are not worth it for fewer changes than this.
const SMALL_PIECE: usize = 8;

/// A buffer larger than this is not kept for the next piece.
const KEPT_BYTES: usize = 16 << 20;

/// What an applying session needs, besides what every session of ours has. Nothing fires: the source's triggers, rules
/// and foreign keys have done so already, and their effects are in the stream. jit comes with PostgreSQL 11.
const SESSION: &str = "SET session_replication_role = replica; \
    SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; \
    SELECT pg_catalog.set_config(name, 'off', false) FROM pg_catalog.pg_settings WHERE name = 'jit'";

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
        "{operation} of table {table} hit {rows} rows instead of {wanted}: the target's table was changed by someone else"
    )]
    WrongCount {
        /// The table.
        table: Arc<QualifiedName>,
        /// What was done.
        operation: Operation,
        /// Rows that it hit.
        rows: u64,
        /// Rows that it should have hit.
        wanted: u64,
    },
    /// Another engine has claimed the progress row.
    #[error("another pgcutover has taken over the apply; nothing was committed")]
    Fenced,
    /// What was sent is no change of a row.
    #[error("the source sent a change that cannot be read")]
    Decode(#[from] crate::pgoutput::DecodeError),
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

/// See the module.
#[derive(Debug)]
pub struct Executor {
    connection: RawConnection,
    migration: String,
    generation: Generation,
    encoder: Encoder,
    chunk: Chunk,
    open: bool,
    /// The open transaction has a savepoint.
    savepoint: bool,
}

impl Executor {
    /// Takes a fresh connection to the migrated database and prepares it for applying.
    pub async fn new(
        mut connection: RawConnection,
        migration: &str,
        generation: Generation,
    ) -> Result<Self, ExecuteError> {
        let set = connection.simple_query(SESSION).await;
        set.map_err(|error| failed("setting up the session", error.into()))?;
        let (encoder, chunk) = (Encoder::default(), Chunk::default());
        let migration = migration.to_owned();
        let mut executor = Self { connection, migration, generation, encoder, chunk, open: false, savepoint: false };
        for (name, sql) in [
            ("begin", "BEGIN"),
            ("rollback", "ROLLBACK"),
            ("savepoint", "SAVEPOINT piece"),
            ("release", "RELEASE SAVEPOINT piece"),
            ("undo", "ROLLBACK TO SAVEPOINT piece"),
            ("progress", UPDATE_SQL),
        ] {
            executor.chunk.pipeline.parse(name, sql, &[])?;
            executor.chunk.purposes.push(Purpose::Control("preparing statements"));
        }
        executor.flush().await?;
        Ok(executor)
    }

    /// Executes a piece, and writes its end, if it has one, into the progress row. Everything has been answered and every
    /// row count was right when this returns; what is left is [`Executor::commit`].
    pub(super) async fn execute(&mut self, mut piece: Piece) -> Result<(), ExecuteError> {
        let was_open = self.open;
        self.begin()?;
        if piece.messages.len() <= SMALL_PIECE {
            self.one_by_one(&piece.messages).await?;
            return self.end_of(&piece).await;
        }
        if was_open {
            if self.savepoint {
                self.chunk.control("release", "RELEASE SAVEPOINT")?;
            }
            self.chunk.control("savepoint", "SAVEPOINT")?;
            self.savepoint = true;
        }
        for part in std::mem::take(&mut piece.parts) {
            self.encoder.part(part, &mut self.chunk)?;
        }
        if was_open {
            if let Err(error) = self.flush().await {
                self.undo("undo", error)?;
                self.one_by_one(&piece.messages).await?;
            }
            return self.end_of(&piece).await;
        }
        if let Err(error) = self.end_of(&piece).await {
            self.undo("rollback", error)?;
            self.chunk.control("begin", "BEGIN")?;
            self.one_by_one(&piece.messages).await?;
            return self.end_of(&piece).await;
        }
        Ok(())
    }

    /// Goes back to before the piece, if that can help.
    fn undo(&mut self, how: &str, error: ExecuteError) -> Result<(), ExecuteError> {
        match &error {
            ExecuteError::Refused { sqlstate, .. } if !transient_sqlstate(sqlstate) => {}
            ExecuteError::WrongCount { .. } => {}
            ExecuteError::Refused { .. }
            | ExecuteError::Fenced
            | ExecuteError::Decode(_)
            | ExecuteError::Connection { .. }
            | ExecuteError::Unsendable(_) => return Err(error),
        }
        tracing::debug!(error = %error, "a set of changes was refused, and is applied change by change");
        self.chunk.control(how, "undoing a piece")?;
        // What was to be prepared in the piece may not have been.
        Ok(self.encoder.forget(&mut self.chunk)?)
    }

    async fn one_by_one(&mut self, messages: &[(Arc<Table>, Bytes)]) -> Result<(), ExecuteError> {
        for (table, message) in messages {
            self.encoder.row(table, &row_change(message)?, &mut self.chunk)?;
            if self.chunk.pipeline.encoded_bytes() >= CHUNK_BYTES || self.chunk.pipeline.steps() >= CHUNK_STEPS {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// What comes behind the changes of a piece.
    async fn end_of(&mut self, piece: &Piece) -> Result<(), ExecuteError> {
        if let Some(truncation) = &piece.truncate
            && let Some(first) = truncation.tables.first()
        {
            self.chunk.sql(&truncation.sql, Purpose::Truncate { table: first.name.clone() })?;
        }
        self.encoder.retire(&piece.retired, &mut self.chunk)?;
        if let Some(end) = &piece.end {
            self.record_progress(end)?;
        }
        self.flush().await
    }

    fn record_progress(&mut self, end: &End) -> Result<(), ExecuteError> {
        let parameters = [
            Some(end.commit_lsn.to_string()),
            Some(end.end_lsn.to_string()),
            end.marker.clone(),
            Some(self.migration.clone()),
            Some(LANE.to_string()),
            Some(self.generation.0.to_string()),
        ];
        self.chunk.pipeline.execute("progress", parameters.iter().map(|text| text.as_deref().map(str::as_bytes)))?;
        self.chunk.did(Purpose::Progress);
        Ok(())
    }

    /// Sends what has been encoded, waits for its answers and checks every row count.
    async fn flush(&mut self) -> Result<(), ExecuteError> {
        if self.chunk.pipeline.is_empty() {
            return Ok(());
        }
        let large = self.chunk.pipeline.encoded_bytes() > KEPT_BYTES;
        let outcome = self.connection.run(&mut self.chunk.pipeline).await;
        if large {
            // One large value must not keep its memory for ever.
            self.chunk.pipeline = Pipeline::new();
        }
        let purposes = std::mem::take(&mut self.chunk.purposes);
        let executed = std::mem::take(&mut self.chunk.executed);
        let outcome = outcome.map_err(|error| refused(&purposes, error))?;
        executed.into_iter().zip(outcome.affected).try_for_each(|(purpose, rows)| check(purpose, rows))
    }

    /// Commits. When it returns, the transaction is on the target's disk (`synchronous_commit` is pinned).
    pub(super) async fn commit(&mut self) -> Result<(), ExecuteError> {
        self.chunk.pipeline.commit();
        // COMMIT goes through the unnamed statement: two steps.
        self.chunk.purposes.push(Purpose::Control("COMMIT"));
        self.chunk.did(Purpose::Control("COMMIT"));
        self.flush().await?;
        (self.open, self.savepoint) = (false, false);
        Ok(())
    }

    fn begin(&mut self) -> Result<(), ExecuteError> {
        if !self.open {
            self.chunk.control("begin", "BEGIN")?;
            self.open = true;
        }
        Ok(())
    }
}

/// The change in a message that was planned once already.
fn row_change(message: &Bytes) -> Result<RowChange, ExecuteError> {
    match pgoutput::decode(message, false)? {
        Message::Insert(insert) => Ok(RowChange::Insert(insert.new)),
        Message::Update(update) => Ok(RowChange::Update { old: update.old, new: update.new }),
        Message::Delete(delete) => Ok(RowChange::Delete(delete.old)),
        _ => Err(pgoutput::DecodeError::Empty.into()),
    }
}

/// A change hits exactly one row; the progress row is there unless a later engine has claimed it.
fn check(purpose: Purpose, rows: u64) -> Result<(), ExecuteError> {
    match purpose {
        Purpose::Truncate { .. } | Purpose::Control(_) => Ok(()),
        Purpose::Change { rows: wanted, .. } if rows == wanted => Ok(()),
        Purpose::Progress if rows == 1 => Ok(()),
        Purpose::Change { table, operation, rows: wanted } => {
            Err(ExecuteError::WrongCount { table, operation, rows, wanted })
        }
        Purpose::Progress => Err(ExecuteError::Fenced),
    }
}

/// Whose fault it is.
fn refused(purposes: &[Purpose], error: PipelineError) -> ExecuteError {
    let PipelineError::Step { step, error: answer } = &error else { return failed("applying changes", error) };
    match (purposes.get(*step), answer.sqlstate()) {
        (Some(Purpose::Change { table, operation, .. }), Some(sqlstate)) => {
            ExecuteError::Refused { table: table.clone(), operation: *operation, sqlstate: sqlstate.to_owned() }
        }
        (Some(Purpose::Truncate { table }), Some(sqlstate)) => ExecuteError::Refused {
            table: table.clone(),
            operation: Operation::Truncate,
            sqlstate: sqlstate.to_owned(),
        },
        (Some(Purpose::Control(doing)), _) => failed(doing, error),
        (Some(Purpose::Progress), _) => failed("recording the progress", error),
        (Some(Purpose::Change { .. } | Purpose::Truncate { .. }) | None, _) => failed("applying changes", error),
    }
}

fn failed(doing: &'static str, source: PipelineError) -> ExecuteError {
    ExecuteError::Connection { doing, source }
}
