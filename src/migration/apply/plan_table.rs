//! A table of the source with where its changes go on the target: which columns are written, and what identifies a row.
//! Pure: no sockets, no clock.

use std::sync::Arc;

use bytes::Bytes;

use super::plan::{Operation, PlanError};
use super::shape::{ColumnKind, KeyPart, TableShape, TargetColumn};
use super::statement::{self, Match, Parameter};
use crate::ident::QualifiedName;
use crate::migration::snapshot::HandOver;
use crate::pgoutput::{Begin, OldTuple, Relation, ReplicaIdentity, Tuple, TupleValue};

/// A change of one row, as the source sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowChange {
    /// A new row.
    Insert(Tuple),
    /// Another version of a row.
    Update {
        /// As in [`crate::pgoutput::Update`].
        old: Option<OldTuple>,
        /// The row as it is now.
        new: Tuple,
    },
    /// A row is gone.
    Delete(OldTuple),
}

impl RowChange {
    /// What it does.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Insert(_) => Operation::Insert,
            Self::Update { .. } => Operation::Update,
            Self::Delete(_) => Operation::Delete,
        }
    }
}

/// A relation of the source, mapped.
#[derive(Debug)]
pub struct Table {
    /// Never used twice by one planner.
    pub id: u64,
    /// The same on both servers.
    pub name: Arc<QualifiedName>,
    /// Its columns, in the order of the stream's tuples.
    columns: Vec<(String, TargetColumn)>,
    /// Columns of the target, also those that are not in the stream.
    shape: TableShape,
    hand_over: Option<HandOver>,
    identity: Identity,
    folds: bool,
}

/// What identifies a row in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Identity {
    /// Columns with unique values that are never null: those of the replica identity or, under REPLICA IDENTITY FULL,
    /// those of the target's primary key, unless that is deferrable: rows may share it until the transaction ends.
    Key(Vec<u16>),
    /// All values; several rows may be alike.
    Whole,
    /// Nothing: there are only inserts.
    Nothing,
}

/// The values of a row's identity. Two are equal iff their texts are: equal texts are one value, and a value whose text
/// changed is sent as another key, even where an operator takes them for equal (`1.0` and `1.00`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key(Values);

/// Most keys have one column.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Values {
    One(Bytes),
    Several(Vec<Bytes>),
}

impl Key {
    /// In the order of [`Table::key_columns`].
    pub fn values(&self) -> &[Bytes] {
        match &self.0 {
            Values::One(value) => std::slice::from_ref(value),
            Values::Several(values) => values,
        }
    }
}

/// What the text of a statement for one row depends on, besides the table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowShape {
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
    values: Vec<Option<Bytes>>,
}

impl Table {
    pub(super) fn map(
        id: u64,
        relation: Relation,
        mut shape: TableShape,
        hand_over: impl FnOnce(&QualifiedName) -> Option<HandOver>,
    ) -> Result<Self, PlanError> {
        let name = QualifiedName::new(&relation.schema, &relation.name);
        if shape.columns.is_empty() && !relation.columns.is_empty() {
            return Err(PlanError::NoTable(name));
        }
        let mut columns = Vec::with_capacity(relation.columns.len());
        for column in &relation.columns {
            let Some(target) = shape.columns.get(&column.name) else {
                return Err(PlanError::NoColumn { table: name, column: column.name.clone() });
            };
            columns.push((column.name.clone(), target.clone()));
        }
        let positions = |wanted: &dyn Fn(usize) -> bool| -> Vec<u16> {
            (0_u16..)
                .zip(&relation.columns)
                .filter(|(index, _)| wanted(usize::from(*index)))
                .map(|(index, _)| index)
                .collect()
        };
        let identity = match relation.replica_identity {
            ReplicaIdentity::Full => {
                let keys = positions(&|index| columns[index].1.primary_key == KeyPart::Unique);
                if !keys.is_empty() && keys.len() == shape.primary_key.len() {
                    Identity::Key(keys)
                } else {
                    Identity::Whole
                }
            }
            ReplicaIdentity::Default | ReplicaIdentity::Index | ReplicaIdentity::Nothing => {
                let keys = positions(&|index| relation.columns[index].key);
                match left_out(&relation, &shape) {
                    _ if keys.is_empty() => Identity::Nothing,
                    Some(column) => return Err(PlanError::PartOfKey { table: name, column: column.clone() }),
                    None => Identity::Key(keys),
                }
            }
        };
        shape.columns.shrink_to_fit();
        let hand_over = hand_over(&name);
        let mut table = Self { id, name: Arc::new(name), columns, shape, hand_over, identity, folds: false };
        table.folds = table.may_fold();
        Ok(table)
    }

    /// Whether the copy holds what this transaction did.
    pub(super) fn has_copied(&self, begin: &Begin) -> bool {
        self.hand_over.as_ref().is_some_and(|hand_over| hand_over.contains(begin.final_lsn, begin.xid))
    }

    /// Whether the change can be understood at all: nothing about it is guessed later.
    pub(super) fn check(&self, change: &RowChange) -> Result<(), PlanError> {
        match change {
            RowChange::Insert(new) => self.check_tuple(new),
            RowChange::Update { old, new } => {
                self.check_tuple(new)?;
                match old {
                    Some(old) => self.check_old(old, Operation::Update),
                    // The identity did not change, so the new row has it.
                    None => self.needs_key(Operation::Update),
                }
            }
            RowChange::Delete(old) => self.check_old(old, Operation::Delete),
        }
    }

    fn check_old(&self, old: &OldTuple, operation: Operation) -> Result<(), PlanError> {
        match old {
            OldTuple::Key(tuple) => {
                self.check_tuple(tuple)?;
                self.needs_key(operation)
            }
            OldTuple::Full(tuple) => self.check_tuple(tuple),
        }
    }

    fn needs_key(&self, operation: Operation) -> Result<(), PlanError> {
        match self.identity {
            Identity::Key(_) => Ok(()),
            Identity::Whole | Identity::Nothing => {
                Err(PlanError::NoIdentity { table: (*self.name).clone(), operation })
            }
        }
    }

    /// As many values as columns, all of them text: binary was not asked for.
    fn check_tuple(&self, tuple: &Tuple) -> Result<(), PlanError> {
        if tuple.values.len() != self.columns.len() {
            return Err(PlanError::OutOfPlace("a row of another width than its relation"));
        }
        if tuple.values.iter().any(|value| matches!(value, TupleValue::Binary(_))) {
            return Err(PlanError::OutOfPlace("a value in binary form"));
        }
        Ok(())
    }

    /// Columns that identify a row, where there are any.
    pub fn key_columns(&self) -> Option<&[u16]> {
        match &self.identity {
            Identity::Key(columns) => Some(columns),
            Identity::Whole | Identity::Nothing => None,
        }
    }

    /// Whether the changes of a batch may be reduced to their net effect, in sets: rows have keys, and no column needs
    /// more than an assignment.
    pub fn folds(&self) -> bool {
        self.folds
    }

    fn may_fold(&self) -> bool {
        let Some(keys) = self.key_columns() else { return false };
        (0_u16..).zip(&self.columns).all(|(index, (_, column))| {
            let unknown = keys.contains(&index) && column.equality.is_none();
            !unknown && !column.cast_from_text && (column.kind != ColumnKind::IdentityAlways || keys.contains(&index))
        })
    }

    /// The key in a tuple that has it.
    pub fn key_in(&self, tuple: &Tuple) -> Option<Key> {
        let value = |&index: &u16| match tuple.values.get(usize::from(index))? {
            TupleValue::Text(bytes) => Some(bytes.clone()),
            TupleValue::Null | TupleValue::UnchangedToast | TupleValue::Binary(_) => None,
        };
        match self.key_columns()? {
            [column] => value(column).map(|value| Key(Values::One(value))),
            columns => columns.iter().map(value).collect::<Option<Vec<_>>>().map(|values| Key(Values::Several(values))),
        }
    }

    /// A tuple that holds this key and nothing else.
    pub fn key_tuple(&self, key: &Key) -> Tuple {
        let mut tuple = Tuple { values: vec![TupleValue::Null; self.columns.len()] };
        for (&column, value) in self.key_columns().unwrap_or_default().iter().zip(key.values()) {
            if let Some(slot) = tuple.values.get_mut(usize::from(column)) {
                *slot = TupleValue::Text(value.clone());
            }
        }
        tuple
    }

    /// Columns that an insert gives.
    pub fn insert_columns(&self) -> Vec<u16> {
        self.columns_where(|column| column.kind != ColumnKind::Generated)
    }

    fn columns_where(&self, wanted: impl Fn(&TargetColumn) -> bool) -> Vec<u16> {
        (0_u16..).zip(&self.columns).filter(|(_, (_, column))| wanted(column)).map(|(index, _)| index).collect()
    }

    /// Columns that a change of `tuple` sets in a row whose key stays.
    pub fn changed_columns(&self, tuple: &Tuple) -> Vec<u16> {
        let keys = self.key_columns().unwrap_or_default();
        let mut set = self.writable(tuple);
        set.retain(|index| !keys.contains(index));
        set
    }

    /// Positions of the columns of `tuple` that were sent and may be written.
    fn writable(&self, tuple: &Tuple) -> Vec<u16> {
        let sent = (0_u16..).zip(&tuple.values).filter(|(index, value)| {
            **value != TupleValue::UnchangedToast && self.kind(*index) != ColumnKind::Generated
        });
        sent.map(|(index, _)| index).collect()
    }

    fn kind(&self, index: u16) -> ColumnKind {
        self.columns.get(usize::from(index)).map(|(_, column)| column.kind).unwrap_or_default()
    }

    /// Name and type of the columns at these positions.
    pub(super) fn parameters(&self, indexes: &[u16]) -> Vec<Parameter<'_>> {
        let columns = indexes.iter().filter_map(|&index| self.columns.get(usize::from(index)));
        columns.map(|(name, column)| (name.as_str(), column)).collect()
    }

    /// The statement for one row: what its text depends on, and its parameters.
    pub fn row(&self, change: &RowChange) -> (RowShape, Vec<Option<Bytes>>) {
        match change {
            RowChange::Insert(new) => {
                let set = self.writable(new);
                let parameters = values(new, &set);
                (RowShape { form: Form::Insert, set, matched: Vec::new(), find: Find::Key }, parameters)
            }
            RowChange::Update { old, new } => {
                let row = self.identify(old.as_ref(), new);
                let mut set = self.writable(new);
                let form = if set.iter().any(|&index| self.may_be_new_identity(old.as_ref(), new, index)) {
                    Form::Replace
                } else {
                    set.retain(|&index| self.kind(index) != ColumnKind::IdentityAlways);
                    Form::Update
                };
                let mut parameters = values(new, &set);
                parameters.extend(row.values);
                (RowShape { form, set, matched: row.columns, find: row.find }, parameters)
            }
            RowChange::Delete(OldTuple::Key(old) | OldTuple::Full(old)) => {
                let row = self.identified(old);
                (RowShape { form: Form::Delete, set: Vec::new(), matched: row.columns, find: row.find }, row.values)
            }
        }
    }

    /// The text of the statement for rows of this shape.
    pub fn row_sql(&self, shape: &RowShape) -> String {
        let set = self.parameters(&shape.set);
        let matched = self.parameters(&shape.matched);
        let found = match shape.find {
            Find::Key => Match::Key(matched),
            Find::Whole => Match::Whole(matched),
        };
        match shape.form {
            Form::Insert => statement::insert(&self.name, &set),
            Form::Replace => statement::replace(&self.name, &set, &self.not_set(&set), &found),
            Form::Update if set.is_empty() => statement::touch(&self.name, &found),
            Form::Update => statement::update(&self.name, &set, &found),
            Form::Delete => statement::delete(&self.name, &found),
        }
    }

    /// Whether the update gives the `GENERATED ALWAYS` identity at `index` a value that it may not have had.
    fn may_be_new_identity(&self, old: Option<&OldTuple>, new: &Tuple, index: u16) -> bool {
        if self.kind(index) != ColumnKind::IdentityAlways {
            return false;
        }
        let is_key = self.key_columns().is_some_and(|keys| keys.contains(&index));
        let index = usize::from(index);
        match old {
            Some(OldTuple::Full(old)) => old.values.get(index) != new.values.get(index),
            Some(OldTuple::Key(old)) if is_key => old.values.get(index) != new.values.get(index),
            // Without an old tuple the key is as it was; of other columns nothing is known.
            Some(OldTuple::Key(_)) => true,
            None => !is_key,
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

    fn identify(&self, old: Option<&OldTuple>, new: &Tuple) -> Identified {
        match old {
            Some(OldTuple::Key(tuple) | OldTuple::Full(tuple)) => self.identified(tuple),
            None => self.identified(new),
        }
    }

    /// By the key, where there is one: its index then finds the row. A null in another column of a key tuple says
    /// nothing.
    fn identified(&self, tuple: &Tuple) -> Identified {
        let (find, columns) = match (&self.identity, self.key_in(tuple)) {
            (Identity::Key(keys), Some(_)) => (Find::Key, keys.clone()),
            (Identity::Key(_) | Identity::Whole | Identity::Nothing, _) => (Find::Whole, self.writable(tuple)),
        };
        Identified { find, values: values(tuple, &columns), columns }
    }
}

/// A generated column of the target's primary key that is not in that of the source. PostgreSQL before 18 leaves such
/// columns out of the stream, and flags the others as if they were the whole key (`logicalrep_write_attrs` in proto.c).
/// Keys that differ otherwise are let pass: somebody may be changing both servers by hand, one after the other.
fn left_out<'a>(relation: &Relation, shape: &'a TableShape) -> Option<&'a String> {
    if relation.replica_identity != ReplicaIdentity::Default {
        return None;
    }
    let is_generated = |name: &str| shape.columns.get(name).is_some_and(|column| column.kind == ColumnKind::Generated);
    let is_key = |name: &str| relation.columns.iter().any(|column| column.key && column.name == name);
    shape.primary_key.iter().find(|name| is_generated(name) && !is_key(name))
}

/// The values at these positions.
fn values(tuple: &Tuple, indexes: &[u16]) -> Vec<Option<Bytes>> {
    indexes.iter().map(|&index| tuple.values.get(usize::from(index)).and_then(text).cloned()).collect()
}

/// A value that was sent and is not null.
pub(super) fn text(value: &TupleValue) -> Option<&Bytes> {
    match value {
        TupleValue::Text(bytes) => Some(bytes),
        TupleValue::Null | TupleValue::UnchangedToast | TupleValue::Binary(_) => None,
    }
}
