//! Executes pieces on one connection to the target, pipelined, inside one transaction at a time.
//!
//! ```text
//! BEGIN  deletes updates COPY … UPDATE progress Sync      one piece, one round trip; every row count is then checked
//! COMMIT Sync                                             sent only now: a fenced or mistaken transaction is never committed
//! ```
//!
//! While the target works on a piece, the next one is encoded ([`Encoding`]); it is sent after the COMMIT.
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
use super::gather::{End, Part, Parts, Piece};
use super::plan::{Change, Operation};
use super::plan_table::{RowChange, Table};
use crate::catalog::migrations::Generation;
use crate::catalog::progress::{LANE, UPDATE_SQL};
use crate::ident::QualifiedName;
use crate::migration::late;
use crate::migration::stream::transient_sqlstate;
use crate::pgoutput::{self, Message};
use crate::postgres::{EncodeError, Outcome, Pipeline, PipelineError, RawConnection, RawError, Sent, TextRows};
use crate::sqlstate;

/// Changes that are executed one by one are sent when they come to this many bytes …
const CHUNK_BYTES: usize = 256 * 1024;
/// … or this many steps.
const CHUNK_STEPS: usize = 1000;

/// Sets are not worth it for fewer changes than this.
const SMALL_PIECE: usize = 8;

/// A buffer larger than this is not kept for the next piece.
const KEPT_BYTES: usize = 16 << 20;

/// What an applying session needs, besides what every session of ours has. jit comes with PostgreSQL 11.
const SESSION: &str = "\
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
    /// The target refused a change of a definition.
    #[error("{tag}, carried over from the source (number {id} in pgcutover.command there), was refused by the target")]
    Command {
        /// `CREATE TABLE`
        tag: String,
        /// Which.
        id: String,
        /// Why.
        source: PipelineError,
    },
    /// The role may not have its changes fire nothing, and something would.
    #[error(
        "the login role may not set session_replication_role, and changes that it applied would fire: {}", .0.join(", ")
    )]
    WouldFire(Vec<String>),
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
    pub(super) session: Session,
    pub(super) encoding: Encoding,
}

/// The connection to the target.
#[derive(Debug)]
pub(super) struct Session {
    connection: RawConnection,
    /// For what is not encoded beforehand; its memory is kept.
    chunk: Chunk,
}

/// Makes messages of pieces, in the order in which they will be executed.
#[derive(Debug)]
pub(super) struct Encoding {
    encoder: Encoder,
    migration: String,
    generation: Generation,
    /// When what was encoded last has been executed, and committed where it ended.
    standing: Standing,
    checks: Checks,
    /// Memory for the next piece.
    spare: Pipeline,
}

/// What becomes of deferrable constraints, which a statement of the source may have met only at its end, and one of ours,
/// for a single row, would not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checks {
    /// As replica, nobody checks them.
    Never,
    /// At the end of the transaction.
    AtTheEnd,
}

/// How the target's transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// There is none.
    Closed,
    Open,
    /// Open, with a savepoint.
    Savepoint,
}

/// A piece that is ready to be sent.
#[derive(Debug)]
pub(super) struct Ready {
    piece: Piece,
    chunk: Chunk,
    undo: Undo,
    /// What it was encoded for.
    before: Standing,
}

/// What goes back to before a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Undo {
    /// Nothing: its changes are executed one by one already.
    Never,
    Transaction,
    Savepoint,
}

/// A piece that the target works on.
#[derive(Debug)]
pub(super) struct Working {
    sent: Sent,
    piece: Piece,
    undo: Undo,
    chunk: Chunk,
}

impl Executor {
    /// Takes a fresh connection to the migrated database and prepares it for applying.
    pub async fn new(
        mut connection: RawConnection,
        migration: &str,
        generation: Generation,
    ) -> Result<Self, ExecuteError> {
        let checks = fire_nothing(&mut connection).await?;
        let set = connection.simple_query(SESSION).await;
        set.map_err(|error| failed("setting up the session", error.into()))?;
        let mut session = Session { connection, chunk: Chunk::default() };
        for (name, sql) in [
            ("begin", "BEGIN"),
            ("defer", "SET CONSTRAINTS ALL DEFERRED"),
            ("rollback", "ROLLBACK"),
            ("savepoint", "SAVEPOINT piece"),
            ("release", "RELEASE SAVEPOINT piece"),
            ("undo", "ROLLBACK TO SAVEPOINT piece"),
            ("progress", UPDATE_SQL),
        ] {
            session.chunk.pipeline.parse(name, sql, &[])?;
            session.chunk.purposes.push(Purpose::Control("preparing statements"));
        }
        session.flush().await?;
        let encoding = Encoding {
            encoder: Encoder::default(),
            migration: migration.to_owned(),
            generation,
            standing: Standing::Closed,
            checks,
            spare: Pipeline::new(),
        };
        Ok(Self { session, encoding })
    }

    /// After [`Session::answered`]: executes the piece in another way where it was refused, and then encodes `next` again,
    /// because none of its statements may be there. Everything has been answered and every row count was right when this
    /// returns; what is left is [`Session::commit`].
    pub(super) async fn settle(
        &mut self,
        working: Working,
        outcome: Result<(), ExecuteError>,
        next: Option<&mut Ready>,
    ) -> Result<(), ExecuteError> {
        let Working { piece, undo, chunk, .. } = working;
        self.encoding.spare = chunk.pipeline;
        let Err(error) = outcome else { return Ok(()) };
        let again = match undo {
            Undo::Never => None,
            Undo::Transaction => Some("rollback"),
            Undo::Savepoint => Some("undo"),
        };
        let Some(again) = again.filter(|_| other_way_may_help(&error)) else { return Err(error) };
        tracing::debug!(error = %error, "a set of changes was refused, and is applied change by change");
        let (encoding, chunk) = (&mut self.encoding, &mut self.session.chunk);
        chunk.control(again, "undoing a piece")?;
        if undo == Undo::Transaction {
            encoding.begin(chunk)?;
        }
        // What was to be prepared in the piece may not have been.
        encoding.encoder.forget(chunk)?;
        for (table, message) in &piece.messages {
            let chunk = &mut self.session.chunk;
            self.encoding.encoder.row(table, &row_change(message)?, chunk)?;
            if chunk.pipeline.encoded_bytes() >= CHUNK_BYTES || chunk.pipeline.steps() >= CHUNK_STEPS {
                self.session.flush().await?;
            }
        }
        self.encoding.end_of(&piece, &mut self.session.chunk)?;
        self.session.flush().await?;
        if let Some(next) = next {
            self.encoding.again(next)?;
        }
        Ok(())
    }
}

/// Triggers, rules and foreign keys of the source have had their effects, which are in the stream. A role that may not keep
/// the target's from firing applies to a server that has none ([`crate::migration::late`]).
async fn fire_nothing(connection: &mut RawConnection) -> Result<Checks, ExecuteError> {
    let failed = |error: RawError| failed("setting up the session", error.into());
    match connection.simple_query(late::REPLICA).await {
        Err(error) if error.sqlstate() == Some(sqlstate::INSUFFICIENT_PRIVILEGE) => {}
        set => return set.map(|_| Checks::Never).map_err(failed),
    }
    let firing = connection.simple_query(late::FIRING).await.map_err(failed)?;
    if firing.is_empty() {
        tracing::info!("the role may not set session_replication_role; nothing that is there would fire");
        return Ok(Checks::AtTheEnd);
    }
    Err(ExecuteError::WouldFire(firing.into_iter().flatten().flatten().collect()))
}

/// Whether it can help to execute the changes of a piece one by one.
fn other_way_may_help(error: &ExecuteError) -> bool {
    match error {
        ExecuteError::Refused { sqlstate, .. } => !transient_sqlstate(sqlstate),
        ExecuteError::WrongCount { .. } => true,
        ExecuteError::Fenced
        | ExecuteError::WouldFire(_)
        | ExecuteError::Command { .. }
        | ExecuteError::Decode(_)
        | ExecuteError::Connection { .. }
        | ExecuteError::Unsendable(_) => false,
    }
}

impl Encoding {
    /// Encodes a piece and its end, if it has one: the progress row. What was encoded before will have been executed, and
    /// committed where it ended, before this is sent.
    pub(super) fn ready(&mut self, mut piece: Piece) -> Result<Ready, ExecuteError> {
        let mut chunk = Chunk { pipeline: std::mem::take(&mut self.spare), ..Chunk::default() };
        let before = self.standing;
        if before == Standing::Closed {
            self.begin(&mut chunk)?;
            self.standing = Standing::Open;
        }
        let undo = if piece.messages.len() <= SMALL_PIECE {
            for (table, message) in &piece.messages {
                self.encoder.row(table, &row_change(message)?, &mut chunk)?;
            }
            Undo::Never
        } else {
            let undo = self.begin_sets(before, &mut chunk)?;
            for part in std::mem::take(&mut piece.parts) {
                self.encoder.part(part, &mut chunk)?;
            }
            undo
        };
        self.end_of(&piece, &mut chunk)?;
        if piece.end.is_some() {
            self.standing = Standing::Closed;
        }
        Ok(Ready { piece, chunk, undo, before })
    }

    fn begin(&self, chunk: &mut Chunk) -> Result<(), EncodeError> {
        chunk.control("begin", "BEGIN")?;
        match self.checks {
            Checks::Never => Ok(()),
            Checks::AtTheEnd => chunk.control("defer", "SET CONSTRAINTS"),
        }
    }

    /// Sees to it that what follows can be undone.
    fn begin_sets(&mut self, before: Standing, chunk: &mut Chunk) -> Result<Undo, ExecuteError> {
        match before {
            Standing::Closed => return Ok(Undo::Transaction),
            Standing::Open => {}
            Standing::Savepoint => chunk.control("release", "RELEASE SAVEPOINT")?,
        }
        chunk.control("savepoint", "SAVEPOINT")?;
        self.standing = Standing::Savepoint;
        Ok(Undo::Savepoint)
    }

    /// Encodes once more what was encoded last.
    fn again(&mut self, last: &mut Ready) -> Result<(), ExecuteError> {
        let mut piece = std::mem::take(&mut last.piece);
        piece.parts = parts_of(&piece.messages)?;
        self.standing = last.before;
        *last = self.ready(piece)?;
        Ok(())
    }

    /// What comes behind the changes of a piece.
    fn end_of(&mut self, piece: &Piece, chunk: &mut Chunk) -> Result<(), ExecuteError> {
        if let Some(truncation) = &piece.truncate
            && let Some(first) = truncation.tables.first()
        {
            chunk.sql(&truncation.sql, Purpose::Truncate { table: first.name.clone() })?;
        }
        if let Some(command) = &piece.command {
            for sql in command.statements() {
                chunk.sql(&sql, Purpose::Command { tag: command.tag.clone(), id: command.id.clone() })?;
            }
        }
        self.encoder.retire(&piece.retired, chunk)?;
        if let Some(end) = &piece.end {
            self.record_progress(end, chunk)?;
        }
        Ok(())
    }

    fn record_progress(&self, end: &End, chunk: &mut Chunk) -> Result<(), ExecuteError> {
        let parameters = [
            Some(end.commit_lsn.to_string()),
            Some(end.end_lsn.to_string()),
            end.markers.last().cloned(),
            Some(self.migration.clone()),
            Some(LANE.to_string()),
            Some(self.generation.0.to_string()),
        ];
        chunk.pipeline.execute("progress", parameters.iter().map(|text| text.as_deref().map(str::as_bytes)))?;
        chunk.did(Purpose::Progress);
        Ok(())
    }
}

/// The changes of these messages, as [`super::gather`] gathered them before.
fn parts_of(messages: &[(Arc<Table>, Bytes)]) -> Result<Vec<Part>, ExecuteError> {
    let mut parts = Parts::default();
    for (table, message) in messages {
        parts.add(Change { table: table.clone(), row: row_change(message)? });
    }
    Ok(parts.take())
}

impl Session {
    /// Sends a piece: the target works on it when this returns.
    pub(super) async fn send(&mut self, ready: Ready) -> Working {
        let Ready { piece, mut chunk, undo, .. } = ready;
        let large = chunk.pipeline.encoded_bytes() > KEPT_BYTES;
        let sent = self.connection.send_pipeline(&mut chunk.pipeline).await;
        if large {
            // One large value must not keep its memory for ever.
            chunk.pipeline = Pipeline::new();
        }
        Working { sent, piece, undo, chunk }
    }

    /// Waits for the answers to a piece and checks every row count. Dropping the future loses nothing.
    pub(super) async fn answered(&mut self, working: &mut Working) -> Result<(), ExecuteError> {
        let outcome = self.connection.answered(&mut working.sent).await;
        judge(&mut working.chunk, outcome)
    }

    /// The rows of a query, read where the transaction stands. Nothing may be under way.
    pub(super) async fn look(&mut self, sql: &str) -> Result<TextRows, ExecuteError> {
        let doing = "reading the columns of a table";
        self.connection.simple_query(sql).await.map_err(|error| failed(doing, error.into()))
    }

    /// Sends what has been encoded, waits for its answers and checks every row count.
    async fn flush(&mut self) -> Result<(), ExecuteError> {
        if self.chunk.pipeline.is_empty() {
            return Ok(());
        }
        let large = self.chunk.pipeline.encoded_bytes() > KEPT_BYTES;
        let outcome = self.connection.run(&mut self.chunk.pipeline).await;
        if large {
            self.chunk.pipeline = Pipeline::new();
        }
        judge(&mut self.chunk, outcome)
    }

    /// Commits. When it returns, the transaction is on the target's disk (`synchronous_commit` is pinned).
    pub(super) async fn commit(&mut self) -> Result<(), ExecuteError> {
        self.chunk.pipeline.commit();
        // COMMIT goes through the unnamed statement: two steps.
        self.chunk.purposes.push(Purpose::Control("COMMIT"));
        self.chunk.did(Purpose::Control("COMMIT"));
        self.flush().await
    }
}

/// What the answers to a chunk come to.
fn judge(chunk: &mut Chunk, outcome: Result<Outcome, PipelineError>) -> Result<(), ExecuteError> {
    let purposes = std::mem::take(&mut chunk.purposes);
    let executed = std::mem::take(&mut chunk.executed);
    let outcome = outcome.map_err(|error| refused(&purposes, error))?;
    executed.into_iter().zip(outcome.affected).try_for_each(|(purpose, rows)| check(purpose, rows))
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
        Purpose::Truncate { .. } | Purpose::Command { .. } | Purpose::Control(_) => Ok(()),
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
        (Some(Purpose::Command { tag, id }), _) => {
            ExecuteError::Command { tag: tag.clone(), id: id.clone(), source: error }
        }
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
