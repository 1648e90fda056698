//! From decoded changes to statements: which columns are written, how the row is found, what is skipped. Pure: no
//! sockets, no clock.
//!
//! A change is never guessed at: a table or column that the target does not have, or a row that cannot be identified,
//! is an error that stops the migration, because a change that was applied wrongly is worse than one that was not.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::shape::{ColumnKind, TableShape, TargetColumn};
use super::statement::{self, Match, Parameter};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::snapshot::HandOver;
use crate::pgoutput::{
    Begin, Commit, Delete, Insert, Message, OldTuple, Relation, Timestamp, Truncate, Tuple, TupleValue, Update,
};

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

/// A statement that is prepared once and executed often.
#[derive(Debug, PartialEq, Eq)]
pub struct Statement {
    /// Never used twice by one planner.
    pub id: u64,
    /// Its text.
    pub sql: String,
}

/// One statement to execute.
#[derive(Clone, Debug)]
pub struct Change {
    /// What to execute.
    pub statement: Arc<Statement>,
    /// Its parameters; `None` is NULL.
    pub parameters: Vec<Option<Value>>,
    /// What it does.
    pub operation: Operation,
    /// To which table; the first one of a TRUNCATE.
    pub table: Arc<QualifiedName>,
    /// All tables of a TRUNCATE; empty otherwise.
    pub truncated: Vec<Arc<QualifiedName>>,
}

/// A value in text form, as the source sent it.
pub type Value = Bytes;

/// What a message asks for.
#[derive(Debug)]
pub enum Planned {
    /// Nothing: it was remembered, or its effect is in the copy already.
    Nothing,
    /// A transaction of the source begins.
    Begin,
    /// A statement.
    Change(Box<Change>),
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
    /// Statements that it came to.
    pub changes: u64,
}

/// The stream cannot be applied. Names tables and columns, never values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The target lacks the table.
    #[error("table {0} is not on the target")]
    NoTable(QualifiedName),
    /// The target lacks a column.
    #[error("column {column:?} of table {table} is not on the target")]
    NoColumn {
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

/// A relation of the source with where it goes.
#[derive(Debug)]
struct Mapped {
    relation: Relation,
    name: Arc<QualifiedName>,
    shape: TableShape,
    hand_over: Option<HandOver>,
    statements: HashMap<ShapeKey, Arc<Statement>>,
}

/// What the text of a statement depends on, besides the relation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ShapeKey {
    form: Form,
    set: Vec<u16>,
    matched: Vec<u16>,
    find: Find,
}

/// Kind of statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Form {
    Insert,
    Update,
    /// An update that has to give a row another `GENERATED ALWAYS` identity.
    Replace,
    Delete,
}

/// How a row is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Find {
    Key,
    Whole,
}

/// Which row an old tuple means: by which columns, and their values.
struct Identified {
    find: Find,
    columns: Vec<u16>,
    values: Vec<Option<Value>>,
}

#[derive(Debug)]
enum Destination {
    /// A migrated table.
    Table(Box<Mapped>),
    /// The marker table, which is recognised and not applied.
    Marker {
        /// Position of the nonce in its tuples.
        nonce: usize,
    },
}

/// The transaction of the source that is being read.
#[derive(Debug)]
struct Open {
    begin: Begin,
    marker: Option<String>,
    changes: u64,
}

/// Plans the changes of one stream.
#[derive(Debug)]
pub struct Planner {
    relations: HashMap<u32, Destination>,
    hand_overs: HashMap<QualifiedName, HandOver>,
    open: Option<Open>,
    next_statement: u64,
    prepared: usize,
    retired: Vec<u64>,
}

/// Statements kept per stream; when there are more, all are given up. Shapes are few, except where large values make
/// every combination of unchanged columns its own.
const MAX_STATEMENTS: usize = 2000;

/// Schema and name of the marker table.
const MARKER: (&str, &str) = ("pgcutover", "marker");

impl Planner {
    /// A planner that skips what the copies contain already.
    pub fn new(hand_overs: HashMap<QualifiedName, HandOver>) -> Self {
        Self { relations: HashMap::new(), hand_overs, open: None, next_statement: 0, prepared: 0, retired: Vec::new() }
    }

    /// Whether the target's shape of `relation` is needed to map it.
    pub fn needs_shape(relation: &Relation) -> bool {
        (relation.schema.as_str(), relation.name.as_str()) != MARKER
    }

    /// Learns what a relation looks like, on the source and on the target. Statements for what it looked like before
    /// are given up.
    pub fn relation(&mut self, relation: Relation, shape: Option<TableShape>) -> Result<(), PlanError> {
        if let Some(Destination::Table(old)) = self.relations.remove(&relation.oid) {
            self.prepared -= old.statements.len();
            self.retired.extend(old.statements.values().map(|statement| statement.id));
        }
        let oid = relation.oid;
        let destination = if Self::needs_shape(&relation) {
            Destination::Table(Box::new(self.map(relation, shape.unwrap_or_default())?))
        } else {
            let nonce = relation.columns.iter().position(|column| column.name == "nonce");
            Destination::Marker { nonce: nonce.ok_or(PlanError::OutOfPlace("marker table without a nonce"))? }
        };
        self.relations.insert(oid, destination);
        Ok(())
    }

    fn map(&self, relation: Relation, shape: TableShape) -> Result<Mapped, PlanError> {
        let name = QualifiedName::new(&relation.schema, &relation.name);
        if shape.columns.is_empty() && !relation.columns.is_empty() {
            return Err(PlanError::NoTable(name));
        }
        if let Some(missing) = relation.columns.iter().find(|column| !shape.columns.contains_key(&column.name)) {
            return Err(PlanError::NoColumn { table: name, column: missing.name.clone() });
        }
        let hand_over = self.hand_overs.get(&name).cloned();
        Ok(Mapped { relation, name: Arc::new(name), shape, hand_over, statements: HashMap::new() })
    }

    /// Statements that will not be asked for again.
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
                if self.open.replace(Open { begin, marker: None, changes: 0 }).is_some() {
                    return Err(PlanError::OutOfPlace("a transaction begins inside another"));
                }
                Ok(Planned::Begin)
            }
            Message::Commit(commit) => self.commit(&commit).map(Planned::Commit),
            Message::Insert(insert) => self.change(insert.relation, |mapped, keys| mapped.insert(&insert, keys)),
            Message::Update(update) => {
                if let Some(Destination::Marker { nonce }) = self.relations.get(&update.relation) {
                    let value = update.new.values.get(*nonce).and_then(text);
                    let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
                    open.marker = value.or(open.marker.take());
                    return Ok(Planned::Nothing);
                }
                self.change(update.relation, |mapped, keys| mapped.update(&update, keys))
            }
            Message::Delete(delete) => self.change(delete.relation, |mapped, keys| mapped.delete(&delete, keys)),
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

    fn commit(&mut self, commit: &Commit) -> Result<Committed, PlanError> {
        let open = self.open.take().ok_or(PlanError::OutOfPlace("a transaction ends that never began"))?;
        if open.begin.final_lsn != commit.commit_lsn {
            return Err(PlanError::OutOfPlace("a transaction ends at another position than it announced"));
        }
        Ok(Committed {
            commit_lsn: commit.commit_lsn,
            end_lsn: commit.end_lsn,
            timestamp: commit.timestamp,
            marker: open.marker,
            changes: open.changes,
        })
    }

    /// Plans a change of one relation; `shape` finds its statement and parameters.
    fn change<F>(&mut self, oid: u32, shape: F) -> Result<Planned, PlanError>
    where
        F: FnOnce(&mut Mapped, &mut Statements) -> Result<Change, PlanError>,
    {
        let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
        let destination =
            self.relations.get_mut(&oid).ok_or(PlanError::OutOfPlace("a change of an unknown relation"))?;
        let mapped = match destination {
            Destination::Marker { .. } => return Ok(Planned::Nothing),
            Destination::Table(mapped) => mapped,
        };
        if mapped.has_copied(&open.begin) {
            return Ok(Planned::Nothing);
        }
        let mut statements = Statements { next: self.next_statement, made: 0 };
        let change = shape(mapped, &mut statements)?;
        open.changes += 1;
        self.next_statement = statements.next;
        self.prepared += statements.made;
        if self.prepared > MAX_STATEMENTS {
            self.forget_statements(change.statement.id);
        }
        Ok(Planned::Change(Box::new(change)))
    }

    /// Gives up every statement but the one that was just planned.
    fn forget_statements(&mut self, keep: u64) {
        self.prepared = 0;
        for destination in self.relations.values_mut() {
            if let Destination::Table(mapped) = destination {
                mapped.statements.retain(|_, statement| {
                    statement.id == keep || {
                        self.retired.push(statement.id);
                        false
                    }
                });
                self.prepared += mapped.statements.len();
            }
        }
    }

    fn truncate(&mut self, truncate: &Truncate) -> Result<Planned, PlanError> {
        let open = self.open.as_mut().ok_or(PlanError::OutOfPlace("a change outside a transaction"))?;
        let mut tables = Vec::new();
        for oid in &truncate.relations {
            match self.relations.get(oid).ok_or(PlanError::OutOfPlace("a change of an unknown relation"))? {
                Destination::Table(mapped) if !mapped.has_copied(&open.begin) => tables.push(mapped.name.clone()),
                Destination::Table(_) | Destination::Marker { .. } => {}
            }
        }
        let Some(first) = tables.first().cloned() else { return Ok(Planned::Nothing) };
        open.changes += 1;
        let names: Vec<&QualifiedName> = tables.iter().map(AsRef::as_ref).collect();
        let sql = statement::truncate(&names, truncate.restart_identity);
        let id = self.next_statement;
        self.next_statement += 1;
        self.retired.push(id);
        Ok(Planned::Change(Box::new(Change {
            statement: Arc::new(Statement { id, sql }),
            parameters: Vec::new(),
            operation: Operation::Truncate,
            table: first,
            truncated: tables,
        })))
    }
}

/// Numbers for statements that a change had to make.
struct Statements {
    next: u64,
    made: usize,
}

impl Mapped {
    fn has_copied(&self, begin: &Begin) -> bool {
        self.hand_over.as_ref().is_some_and(|hand_over| hand_over.contains(begin.final_lsn, begin.xid))
    }

    /// Positions of the columns of `tuple` that were sent and may be written.
    fn writable(&self, tuple: &Tuple) -> Vec<u16> {
        (0_u16..)
            .zip(&tuple.values)
            .filter(|(index, value)| {
                **value != TupleValue::UnchangedToast && self.kind(*index) != ColumnKind::Generated
            })
            .map(|(index, _)| index)
            .collect()
    }

    fn target_column(&self, index: u16) -> Option<&TargetColumn> {
        let column = self.relation.columns.get(usize::from(index))?;
        self.shape.columns.get(&column.name)
    }

    fn kind(&self, index: u16) -> ColumnKind {
        self.target_column(index).map(|column| column.kind).unwrap_or_default()
    }

    fn columns(&self, indexes: &[u16]) -> Vec<Parameter<'_>> {
        indexes
            .iter()
            .filter_map(|&index| {
                let column = self.relation.columns.get(usize::from(index))?;
                Some((column.name.as_str(), self.shape.columns.get(&column.name)?))
            })
            .collect()
    }

    /// As many values as columns, all of them text: binary was not asked for.
    fn check(&self, tuple: &Tuple) -> Result<(), PlanError> {
        if tuple.values.len() != self.relation.columns.len() {
            return Err(PlanError::OutOfPlace("a row of another width than its relation"));
        }
        if tuple.values.iter().any(|value| matches!(value, TupleValue::Binary(_))) {
            return Err(PlanError::OutOfPlace("a value in binary form"));
        }
        Ok(())
    }

    /// The statement of this shape, made if it is new.
    fn statement(
        &mut self,
        key: ShapeKey,
        numbers: &mut Statements,
        text: impl FnOnce(&Self, &ShapeKey) -> String,
    ) -> Arc<Statement> {
        if let Some(known) = self.statements.get(&key) {
            return known.clone();
        }
        let statement = Arc::new(Statement { id: numbers.next, sql: text(self, &key) });
        numbers.next += 1;
        numbers.made += 1;
        self.statements.insert(key, statement.clone());
        statement
    }

    fn insert(&mut self, insert: &Insert, numbers: &mut Statements) -> Result<Change, PlanError> {
        self.check(&insert.new)?;
        let set = self.writable(&insert.new);
        let parameters = values(&insert.new, &set);
        let key = ShapeKey { form: Form::Insert, set, matched: Vec::new(), find: Find::Key };
        let statement =
            self.statement(key, numbers, |mapped, key| statement::insert(&mapped.name, &mapped.columns(&key.set)));
        Ok(self.planned(statement, parameters, Operation::Insert))
    }

    fn update(&mut self, update: &Update, numbers: &mut Statements) -> Result<Change, PlanError> {
        self.check(&update.new)?;
        let row = match &update.old {
            Some(old) => self.identify(old, Operation::Update)?,
            // The identity did not change, so the new row has it.
            None => {
                let columns = self.key_columns(Operation::Update)?;
                Identified { find: Find::Key, values: values(&update.new, &columns), columns }
            }
        };
        let mut set = self.writable(&update.new);
        let form = if set.iter().any(|&index| self.may_be_new_identity(update, index)) {
            Form::Replace
        } else {
            set.retain(|&index| self.kind(index) != ColumnKind::IdentityAlways);
            Form::Update
        };
        let mut parameters = values(&update.new, &set);
        parameters.extend(row.values);
        let key = ShapeKey { form, set, matched: row.columns, find: row.find };
        let statement = self.statement(key, numbers, |mapped, key| {
            let found = mapped.matching(key);
            let set = mapped.columns(&key.set);
            match key.form {
                Form::Replace => statement::replace(&mapped.name, &set, &mapped.not_set(&set), &found),
                Form::Insert | Form::Update | Form::Delete if set.is_empty() => statement::touch(&mapped.name, &found),
                Form::Insert | Form::Update | Form::Delete => statement::update(&mapped.name, &set, &found),
            }
        });
        Ok(self.planned(statement, parameters, Operation::Update))
    }

    /// Whether the update gives the `GENERATED ALWAYS` identity at `index` a value that it may not have had.
    fn may_be_new_identity(&self, update: &Update, index: u16) -> bool {
        if self.kind(index) != ColumnKind::IdentityAlways {
            return false;
        }
        let index = usize::from(index);
        let is_key = self.relation.columns.get(index).is_some_and(|column| column.key);
        match &update.old {
            Some(OldTuple::Full(old)) => old.values.get(index) != update.new.values.get(index),
            Some(OldTuple::Key(old)) if is_key => old.values.get(index) != update.new.values.get(index),
            // Without an old tuple the key is as it was; of other columns nothing is known.
            Some(OldTuple::Key(_)) | None => !is_key || update.old.is_some(),
        }
    }

    /// Columns of the target that a replacing row must take over from the old one.
    fn not_set(&self, set: &[Parameter<'_>]) -> Vec<&str> {
        let mut kept: Vec<&str> = self
            .shape
            .columns
            .iter()
            .filter(|(name, column)| column.kind != ColumnKind::Generated && !set.iter().any(|(set, _)| set == name))
            .map(|(name, _)| name.as_str())
            .collect();
        kept.sort_unstable();
        kept
    }

    fn delete(&mut self, delete: &Delete, numbers: &mut Statements) -> Result<Change, PlanError> {
        let row = self.identify(&delete.old, Operation::Delete)?;
        let key = ShapeKey { form: Form::Delete, set: Vec::new(), matched: row.columns, find: row.find };
        let statement =
            self.statement(key, numbers, |mapped, key| statement::delete(&mapped.name, &mapped.matching(key)));
        Ok(self.planned(statement, row.values, Operation::Delete))
    }

    fn matching(&self, key: &ShapeKey) -> Match<'_> {
        let columns = self.columns(&key.matched);
        match key.find {
            Find::Key => Match::Key(columns),
            Find::Whole => Match::Whole(columns),
        }
    }

    fn identify(&self, old: &OldTuple, operation: Operation) -> Result<Identified, PlanError> {
        match old {
            OldTuple::Key(tuple) => {
                self.check(tuple)?;
                let columns = self.key_columns(operation)?;
                Ok(Identified { find: Find::Key, values: values(tuple, &columns), columns })
            }
            OldTuple::Full(tuple) => {
                self.check(tuple)?;
                let (find, columns) = match self.primary_key(tuple) {
                    Some(keys) => (Find::Key, keys),
                    None => (Find::Whole, self.writable(tuple)),
                };
                Ok(Identified { find, values: values(tuple, &columns), columns })
            }
        }
    }

    /// The columns of the replica identity. A null in any other column of a key tuple says nothing.
    fn key_columns(&self, operation: Operation) -> Result<Vec<u16>, PlanError> {
        let columns = (0_u16..).zip(&self.relation.columns);
        let keys: Vec<u16> = columns.filter(|(_, column)| column.key).map(|(index, _)| index).collect();
        if keys.is_empty() {
            return Err(PlanError::NoIdentity { table: (*self.name).clone(), operation });
        }
        Ok(keys)
    }

    /// Positions of the target's primary key, if the whole row that was sent has it: the index then finds the row.
    fn primary_key(&self, tuple: &Tuple) -> Option<Vec<u16>> {
        let columns = &self.relation.columns;
        let position = |name: &String| {
            let index = columns.iter().position(|column| column.name == *name)?;
            matches!(tuple.values.get(index)?, TupleValue::Text(_)).then_some(index)
        };
        let found: Option<Vec<u16>> = self
            .shape
            .primary_key
            .iter()
            .map(|name| position(name).and_then(|index| u16::try_from(index).ok()))
            .collect();
        found.filter(|found| !found.is_empty())
    }

    fn planned(&self, statement: Arc<Statement>, parameters: Vec<Option<Value>>, operation: Operation) -> Change {
        Change { statement, parameters, operation, table: self.name.clone(), truncated: Vec::new() }
    }
}

/// The values at these positions.
fn values(tuple: &Tuple, indexes: &[u16]) -> Vec<Option<Value>> {
    indexes
        .iter()
        .map(|&index| match tuple.values.get(usize::from(index)) {
            Some(TupleValue::Text(bytes)) => Some(bytes.clone()),
            Some(TupleValue::Null | TupleValue::UnchangedToast | TupleValue::Binary(_)) | None => None,
        })
        .collect()
}

fn text(value: &TupleValue) -> Option<String> {
    match value {
        TupleValue::Text(bytes) => String::from_utf8(bytes.to_vec()).ok(),
        TupleValue::Null | TupleValue::UnchangedToast | TupleValue::Binary(_) => None,
    }
}
