//! From the stream's messages to changes of the target's tables: where each goes, and what is skipped. Pure: no sockets,
//! no clock.
//!
//! A change is never guessed at: a table or column that the target does not have, or a row that cannot be identified,
//! is an error that stops the migration, because a change that was applied wrongly is worse than one that was not.

use std::collections::HashMap;
use std::sync::Arc;

use super::command::{Columns, Command};
use super::plan_table::{self, RowChange, Table};
use super::shape::TableShape;
use super::statement;
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::ddl::carry::COMMANDS;
use crate::migration::publication::Names;
use crate::migration::snapshot::HandOver;
use crate::pgoutput::{Begin, Commit, Message, Relation, Timestamp, Truncate, Tuple};
use crate::switch::Epoch;

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A row is added.
    Insert,
    /// A row is changed.
    Update,
    /// A row is removed.
    Delete,
    /// Tables are emptied.
    Truncate,
}

impl Operation {
    /// As SQL says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
        }
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One change of one row.
#[derive(Clone, Debug)]
pub struct Change {
    /// Of which table.
    pub table: Arc<Table>,
    /// What was done.
    pub row: RowChange,
}

/// Tables that were emptied by one command.
#[derive(Clone, Debug)]
pub struct Truncation {
    /// The command for the target.
    pub sql: String,
    /// The tables, at least one.
    pub tables: Vec<Arc<Table>>,
}

/// What a message asks for.
#[derive(Debug)]
pub enum Planned {
    /// Nothing: it was remembered, or its effect is in the copy already.
    Nothing,
    /// A transaction of the source begins.
    Begin,
    /// A row is to be changed.
    Change(Change),
    /// Tables are to be emptied.
    Truncate(Truncation),
    /// A definition is to be changed.
    Command(Command),
    /// The transaction of the source is complete.
    Commit(Committed),
}

/// A complete transaction of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Where its commit record starts.
    pub commit_lsn: Lsn,
    /// Where its commit record ends.
    pub end_lsn: Lsn,
    /// When it committed, by the source's clock.
    pub timestamp: Timestamp,
    /// The nonce that it wrote into the marker row.
    pub marker: Option<String>,
    /// Changes that it came to.
    pub changes: u64,
    /// It has changed definitions.
    pub altered: bool,
}

/// The stream cannot be applied. Names tables and columns, never values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The target lacks the table.
    #[error("table {0} is not on the target")]
    NoTable(QualifiedName),
    /// The table was given the name of another, whose rows the target has under it.
    #[error("table {is} is another one now: it was {was} when the rows were brought over")]
    Renamed {
        /// Its name now.
        is: QualifiedName,
        /// Its name then.
        was: QualifiedName,
    },
    /// The target lacks a column.
    #[error("column {column:?} of table {table} is not on the target")]
    NoColumn {
        /// The table.
        table: QualifiedName,
        /// The column.
        column: String,
    },
    /// The target's primary key has a generated column that the stream lacks: the rest of it identifies no row.
    #[error("column {column:?} of the primary key of table {table} is generated, and not in the source's stream")]
    PartOfKey {
        /// The table.
        table: QualifiedName,
        /// The column.
        column: String,
    },
    /// The source did not say which row.
    #[error("{operation} of table {table} came without a replica identity")]
    NoIdentity {
        /// The table.
        table: QualifiedName,
        /// UPDATE or DELETE.
        operation: Operation,
    },
    /// The order of the messages makes no sense.
    #[error("the source's stream makes no sense: {0}")]
    OutOfPlace(&'static str),
}

#[derive(Debug)]
enum Destination {
    /// A migrated table.
    Table(Arc<Table>),
    /// The marker table, which is recognised and not applied.
    Marker {
        /// Position of the nonce in its tuples.
        nonce: usize,
    },
    /// The boundary table, likewise.
    Boundary {
        /// Position of the epoch in its tuples.
        epoch: usize,
    },
    /// The table of commands, which are executed.
    Commands(Columns),
    /// Another table of ours, which is no business of the other server.
    Ours,
}

/// The transaction of the source that is being read.
#[derive(Debug)]
struct Open {
    begin: Begin,
    marker: Option<String>,
    /// It wrote the boundary that is waited for.
    at_boundary: bool,
    changes: u64,
    altered: bool,
}

/// Plans the changes of one stream.
#[derive(Debug)]
pub struct Planner {
    /// Looked at for every change.
    relations: hashbrown::HashMap<u32, Destination>,
    hand_overs: HashMap<QualifiedName, HandOver>,
    /// What the tables were called when their rows were brought over.
    names: Names,
    open: Option<Open>,
    /// Everything up to and including the commit that writes this boundary is discarded; none: it is behind us.
    boundary: Option<Epoch>,
    next_table: u64,
    retired: Vec<u64>,
}

/// Our own schema: nothing in it is ever applied.
const SCHEMA: &str = "pgcutover";

impl Planner {
    /// A planner that skips what the copies contain already.
    pub fn new(hand_overs: HashMap<QualifiedName, HandOver>) -> Self {
        Self {
            relations: hashbrown::HashMap::new(),
            hand_overs,
            names: Names::default(),
            open: None,
            boundary: None,
            next_table: 0,
            retired: Vec::new(),
        }
    }

    /// A planner of a stream that begins behind the boundary of `epoch`: what the other side sent before the switch came
    /// from here, and goes no further. The commit of the boundary counts as a marker, so that the progress row says
    /// durably that it is behind us.
    pub fn behind_boundary(epoch: Epoch) -> Self {
        Self { boundary: Some(epoch), ..Self::new(HashMap::new()) }
    }

    /// The same, where no table may have taken another's name.
    #[must_use]
    pub fn of_tables(self, names: Names) -> Self {
        Self { names, ..self }
    }

    /// Whether the target's shape of `relation` is needed to map it.
    pub fn needs_shape(relation: &Relation) -> bool {
        relation.schema != SCHEMA
    }

    /// Learns what a relation looks like, on the source and on the target. What it looked like before is given up.
    pub fn relation(&mut self, relation: Relation, shape: Option<TableShape>) -> Result<(), PlanError> {
        if let Some(Destination::Table(old)) = self.relations.remove(&relation.oid) {
            self.retired.push(old.id);
        }
        let oid = relation.oid;
        let is = QualifiedName::new(&relation.schema, &relation.name);
        if let Some(was) = self.names.taken(oid, &is) {
            return Err(PlanError::Renamed { was: was.clone(), is });
        }
        let destination = if Self::needs_shape(&relation) {
            let id = self.next_table;
            self.next_table += 1;
            let hand_overs = &self.hand_overs;
            let table = Table::map(id, relation, shape.unwrap_or_default(), |name| hand_overs.get(name).cloned())?;
            Destination::Table(Arc::new(table))
        } else {
            let column = |wanted: &str| relation.columns.iter().position(|column| column.name == wanted);
            match relation.name.as_str() {
                "boundary" => {
                    let epoch = column("epoch").ok_or(PlanError::OutOfPlace("boundary table without an epoch"))?;
                    Destination::Boundary { epoch }
                }
                "marker" => {
                    let nonce = column("nonce").ok_or(PlanError::OutOfPlace("marker table without a nonce"))?;
                    Destination::Marker { nonce }
                }
                name if name == COMMANDS.1 => Destination::Commands(Columns::of(&relation)?),
                _ => Destination::Ours,
            }
        };
        self.relations.insert(oid, destination);
        Ok(())
    }

    /// Tables that no later change will name.
    pub fn take_retired(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.retired)
    }

    /// Whether a transaction of the source is being read.
    pub fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Plans one message. Relations go to [`Planner::relation`].
    pub fn plan(&mut self, message: Message) -> Result<Planned, PlanError> {
        match message {
            Message::Begin(begin) => {
                if self
                    .open
                    .replace(Open { begin, marker: None, at_boundary: false, changes: 0, altered: false })
                    .is_some()
                {
                    return Err(PlanError::OutOfPlace("a transaction begins inside another"));
                }
                Ok(Planned::Begin)
            }
            Message::Commit(commit) => self.commit(&commit).map(Planned::Commit),
            Message::Insert(insert) => {
                self.look_for_boundary(insert.relation, &insert.new);
                if let Some(Destination::Commands(columns)) = self.relations.get(&insert.relation) {
                    let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
                    (open.changes, open.altered) = (open.changes + 1, true);
                    return Ok(Planned::Command(columns.read(&insert.new)?));
                }
                self.change(insert.relation, RowChange::Insert(insert.new))
            }
            Message::Update(update) => {
                self.look_for_boundary(update.relation, &update.new);
                if let Some(Destination::Marker { nonce }) = self.relations.get(&update.relation) {
                    let value = update.new.values.get(*nonce).and_then(plan_table::text);
                    let value = value.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
                    let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
                    if self.boundary.is_none() {
                        open.marker = value.or(open.marker.take());
                    }
                    return Ok(Planned::Nothing);
                }
                self.change(update.relation, RowChange::Update { old: update.old, new: update.new })
            }
            Message::Delete(delete) => self.change(delete.relation, RowChange::Delete(delete.old)),
            Message::Truncate(truncate) => self.truncate(&truncate),
            Message::Relation(_) => Err(PlanError::OutOfPlace("a relation without its shape")),
            Message::Origin(_) | Message::Type(_) | Message::Logical(_) => Ok(Planned::Nothing),
            Message::StreamStart(_)
            | Message::StreamStop
            | Message::StreamCommit(_)
            | Message::StreamAbort(_)
            | Message::BeginPrepare(_)
            | Message::Prepare(_)
            | Message::CommitPrepared(_)
            | Message::RollbackPrepared(_)
            | Message::StreamPrepare(_) => {
                Err(PlanError::OutOfPlace("a message that protocol version 1 does not have"))
            }
        }
    }

    /// A retried decision updates the row that it finds, so both insert and update can be the boundary.
    fn look_for_boundary(&mut self, relation: u32, new: &Tuple) {
        let Some(Destination::Boundary { epoch }) = self.relations.get(&relation) else { return };
        let written = new.values.get(*epoch).and_then(plan_table::text);
        let written = written.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok()).map(Epoch);
        if let Some(open) = &mut self.open
            && self.boundary.is_some()
            && written == self.boundary
        {
            open.at_boundary = true;
        }
    }

    fn commit(&mut self, commit: &Commit) -> Result<Committed, PlanError> {
        let mut open = self.open.take().ok_or(PlanError::OutOfPlace("a transaction ends that never began"))?;
        if open.begin.final_lsn != commit.commit_lsn {
            return Err(PlanError::OutOfPlace("a transaction ends at another position than it announced"));
        }
        if open.at_boundary
            && let Some(epoch) = self.boundary.take()
        {
            open.marker = Some(format!("boundary-{epoch}"));
        }
        Ok(Committed {
            commit_lsn: commit.commit_lsn,
            end_lsn: commit.end_lsn,
            timestamp: commit.timestamp,
            marker: open.marker,
            changes: open.changes,
            altered: open.altered,
        })
    }

    fn change(&mut self, oid: u32, row: RowChange) -> Result<Planned, PlanError> {
        let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
        let destination = self.relations.get(&oid).ok_or(PlanError::OutOfPlace("a change of an unknown relation"))?;
        let table = match destination {
            Destination::Marker { .. }
            | Destination::Boundary { .. }
            | Destination::Commands(_)
            | Destination::Ours => {
                return Ok(Planned::Nothing);
            }
            Destination::Table(table) => table,
        };
        if self.boundary.is_some() || table.has_copied(&open.begin) {
            return Ok(Planned::Nothing);
        }
        table.check(&row)?;
        open.changes += 1;
        Ok(Planned::Change(Change { table: table.clone(), row }))
    }

    fn truncate(&mut self, truncate: &Truncate) -> Result<Planned, PlanError> {
        let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
        let mut tables = Vec::new();
        for oid in &truncate.relations {
            match self.relations.get(oid).ok_or(PlanError::OutOfPlace("a change of an unknown relation"))? {
                Destination::Table(table) if self.boundary.is_none() && !table.has_copied(&open.begin) => {
                    tables.push(table.clone());
                }
                Destination::Table(_)
                | Destination::Marker { .. }
                | Destination::Boundary { .. }
                | Destination::Commands(_)
                | Destination::Ours => {}
            }
        }
        if tables.is_empty() {
            return Ok(Planned::Nothing);
        }
        open.changes += 1;
        let names: Vec<&QualifiedName> = tables.iter().map(|table| &*table.name).collect();
        let sql = statement::truncate(&names);
        Ok(Planned::Truncate(Truncation { sql, tables }))
    }
}
