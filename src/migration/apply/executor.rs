//! Executes planned statements on one connection to the target, pipelined, inside one transaction at a time.
//!
//! ```text
//! BEGIN  change change … change Sync        chunk 1, sent
//!        change change … change Sync        chunk 2, sent; then the answers of chunk 1 are read
//!        change … UPDATE progress Sync      every answer is read and every row count checked
//! COMMIT Sync                               sent only now: a fenced or mistaken transaction is never committed
//! ```
//!
//! At most two chunks are unanswered, and an answer is a few dozen bytes, so neither side ever blocks on a full socket
//! while the other does the same. When the connection is lost between COMMIT and its answer, the outcome is found out by
//! the next claim of the progress row, which waits for this transaction's lock on it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;

use super::plan::{Change, Operation, Value};
use crate::catalog::migrations::Generation;
use crate::catalog::progress::{LANE, UPDATE_SQL};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::postgres::{Frame, RawConnection, RawError};

/// A chunk is sent when it has this many bytes …
const CHUNK_BYTES: usize = 64 * 1024;
/// … or this many statements.
const CHUNK_STATEMENTS: usize = 256;

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
        source: RawError,
    },
}

/// What the next CommandComplete belongs to.
#[derive(Debug)]
enum Expected {
    Change { table: Arc<QualifiedName>, operation: Operation },
    Control(&'static str),
    Progress,
    Sync,
}

/// See the module.
#[derive(Debug)]
pub struct Executor {
    connection: RawConnection,
    migration: String,
    generation: Generation,
    out: BytesMut,
    statements_in_chunk: usize,
    unanswered_chunks: usize,
    expected: VecDeque<Expected>,
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
        let failed = |doing| move |source| ExecuteError::Connection { doing, source };
        connection
            .simple_query("SET session_replication_role = replica")
            .await
            .map_err(failed("setting session_replication_role"))?;
        let mut executor = Self {
            connection,
            migration: migration.to_owned(),
            generation,
            out: BytesMut::new(),
            statements_in_chunk: 0,
            unanswered_chunks: 0,
            expected: VecDeque::new(),
            prepared: HashSet::new(),
            open: false,
        };
        for (name, sql) in [("begin", "BEGIN"), ("commit", "COMMIT"), ("progress", UPDATE_SQL)] {
            executor.encode(|out| frontend::parse(name, sql, [], out))?;
        }
        executor.finish_chunk().await?;
        executor.settle().await?;
        Ok(executor)
    }

    /// Whether a transaction is open on the target.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Adds a change to the transaction, which is opened if there is none.
    pub async fn change(&mut self, change: Change) -> Result<(), ExecuteError> {
        if !self.open {
            self.control("begin", "BEGIN")?;
            self.open = true;
        }
        let name = statement_name(change.statement.id);
        if self.prepared.insert(change.statement.id) {
            self.encode(|out| frontend::parse(&name, &change.statement.sql, [], out))?;
        }
        self.execute(&name, &change.parameters)?;
        self.expected.push_back(Expected::Change { table: change.table, operation: change.operation });
        self.statements_in_chunk += 1;
        if self.out.len() >= CHUNK_BYTES || self.statements_in_chunk >= CHUNK_STATEMENTS {
            self.finish_chunk().await?;
        }
        Ok(())
    }

    /// Gives up prepared statements that will not be used again.
    pub fn retire(&mut self, statements: &[u64]) -> Result<(), ExecuteError> {
        for id in statements {
            if self.prepared.remove(id) {
                self.encode(|out| frontend::close(b'S', &statement_name(*id), out))?;
            }
        }
        Ok(())
    }

    /// Sends what has been gathered, without waiting for its answers.
    pub async fn flush(&mut self) -> Result<(), ExecuteError> {
        if self.out.is_empty() { Ok(()) } else { self.finish_chunk().await }
    }

    /// Writes the progress into the transaction (its own, when none is open) and waits until everything was answered
    /// and every row count was right. Then only COMMIT is left.
    pub async fn record_progress(
        &mut self,
        commit_lsn: Lsn,
        end_lsn: Lsn,
        marker: Option<&str>,
    ) -> Result<(), ExecuteError> {
        if !self.open {
            self.control("begin", "BEGIN")?;
            self.open = true;
        }
        let text = |value: String| Some(Value::Text(value.into()));
        let parameters = [
            text(commit_lsn.to_string()),
            text(end_lsn.to_string()),
            marker.and_then(|marker| text(marker.to_owned())),
            text(self.migration.clone()),
            text(LANE.to_string()),
            text(self.generation.0.to_string()),
        ];
        self.execute("progress", &parameters)?;
        self.expected.push_back(Expected::Progress);
        self.finish_chunk().await?;
        self.settle().await
    }

    /// Commits. When it returns, the transaction is on the target's disk (`synchronous_commit` is pinned).
    pub async fn commit(&mut self) -> Result<(), ExecuteError> {
        self.control("commit", "COMMIT")?;
        self.finish_chunk().await?;
        self.settle().await?;
        self.open = false;
        Ok(())
    }

    fn control(&mut self, name: &str, what: &'static str) -> Result<(), ExecuteError> {
        self.execute(name, &[])?;
        self.expected.push_back(Expected::Control(what));
        Ok(())
    }

    /// Bind and Execute through the unnamed portal.
    fn execute(&mut self, statement: &str, parameters: &[Option<Value>]) -> Result<(), ExecuteError> {
        let formats = parameters.iter().map(|value| i16::from(matches!(value, Some(Value::Binary(_)))));
        let bound = frontend::bind(
            "",
            statement,
            formats,
            parameters,
            |value, out| {
                let Some(Value::Text(bytes) | Value::Binary(bytes)) = value else { return Ok(IsNull::Yes) };
                out.extend_from_slice(bytes);
                Ok(IsNull::No)
            },
            [],
            &mut self.out,
        );
        bound.map_err(|error| match error {
            frontend::BindError::Conversion(error) => self.unsendable(error.to_string()),
            frontend::BindError::Serialization(error) => self.unsendable(error.to_string()),
        })?;
        self.encode(|out| frontend::execute("", 0, out))
    }

    fn encode(&mut self, write: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<(), ExecuteError> {
        write(&mut self.out).map_err(|error| self.unsendable(error.to_string()))
    }

    /// A message does not fit PostgreSQL's protocol, such as a value of more than a gigabyte.
    fn unsendable(&self, what: String) -> ExecuteError {
        let source = RawError::Protocol { label: self.connection.label().to_owned(), what };
        ExecuteError::Connection { doing: "encoding a change", source }
    }

    /// Ends the chunk, sends it, and reads the answers of the one before.
    async fn finish_chunk(&mut self) -> Result<(), ExecuteError> {
        frontend::sync(&mut self.out);
        self.expected.push_back(Expected::Sync);
        self.connection
            .send(&self.out)
            .await
            .map_err(|source| ExecuteError::Connection { doing: "sending changes", source })?;
        self.out.clear();
        if self.out.capacity() > 4 * CHUNK_BYTES {
            // One large value must not keep its memory for ever.
            self.out = BytesMut::with_capacity(2 * CHUNK_BYTES);
        }
        self.statements_in_chunk = 0;
        self.unanswered_chunks += 1;
        if self.unanswered_chunks > 1 {
            self.read_chunk().await?;
        }
        Ok(())
    }

    /// Reads every answer that is due.
    async fn settle(&mut self) -> Result<(), ExecuteError> {
        while self.unanswered_chunks > 0 {
            self.read_chunk().await?;
        }
        Ok(())
    }

    async fn read_chunk(&mut self) -> Result<(), ExecuteError> {
        loop {
            let frame = self
                .connection
                .next_frame()
                .await
                .map_err(|source| ExecuteError::Connection { doing: "waiting for the answers to changes", source })?;
            match frame.tag {
                b'C' | b'I' => self.completed(&frame)?,
                b'E' => return Err(self.refused(RawError::from_error_response(&frame.body))),
                b'Z' => {
                    let _sync = self.expected.pop_front();
                    self.unanswered_chunks -= 1;
                    return Ok(());
                }
                // ParseComplete, BindComplete, CloseComplete, rows of a touch, notices, settings, notifications.
                _ => {}
            }
        }
    }

    fn completed(&mut self, frame: &Frame) -> Result<(), ExecuteError> {
        let rows = affected_rows(&frame.body);
        match self.expected.pop_front() {
            Some(Expected::Change { operation: Operation::Truncate, .. } | Expected::Control(_)) => Ok(()),
            Some(Expected::Change { table, operation }) => match rows {
                Some(1) => Ok(()),
                rows => Err(ExecuteError::WrongCount { table, operation, rows: rows.unwrap_or(0) }),
            },
            Some(Expected::Progress) => {
                if rows == Some(1) {
                    Ok(())
                } else {
                    Err(ExecuteError::Fenced)
                }
            }
            Some(Expected::Sync) | None => Err(ExecuteError::Connection {
                doing: "matching answers to changes",
                source: RawError::Protocol {
                    label: self.connection.label().to_owned(),
                    what: "an answer too many".to_owned(),
                },
            }),
        }
    }

    /// The error belongs to the oldest statement without an answer.
    fn refused(&mut self, error: RawError) -> ExecuteError {
        match (self.expected.pop_front(), error.sqlstate()) {
            (Some(Expected::Change { table, operation }), Some(sqlstate)) => {
                ExecuteError::Refused { table, operation, sqlstate: sqlstate.to_owned() }
            }
            (Some(Expected::Control(doing)), _) => ExecuteError::Connection { doing, source: error },
            (Some(Expected::Progress), _) => {
                ExecuteError::Connection { doing: "recording the progress", source: error }
            }
            (Some(Expected::Change { .. } | Expected::Sync) | None, _) => {
                ExecuteError::Connection { doing: "applying changes", source: error }
            }
        }
    }
}

fn statement_name(id: u64) -> String {
    format!("s{id}")
}

/// The last number of a command tag: `INSERT 0 1`, `UPDATE 1`, `SELECT 1`.
fn affected_rows(body: &[u8]) -> Option<u64> {
    let tag = body.strip_suffix(&[0]).unwrap_or(body);
    std::str::from_utf8(tag).ok()?.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_counts_are_read_from_command_tags() {
        assert_eq!(affected_rows(b"INSERT 0 1\0"), Some(1));
        assert_eq!(affected_rows(b"UPDATE 12\0"), Some(12));
        assert_eq!(affected_rows(b"BEGIN\0"), None);
    }
}
