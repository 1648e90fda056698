//! From changes to the steps of a pipeline, and what each step must have done. No sockets.
//!
//! Statements are prepared once for each table and shape, and kept. Values go as texts; a set of rows goes as arrays (of
//! integers where the columns are such), which cost the target less than a statement for each row, and new rows go by COPY.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::executor::ExecuteError;
use super::gather::{Part, Run};
use super::plan::Operation;
use super::plan_net::Sets;
use super::plan_table::{Key, RowChange, RowShape, Table, text};
use super::shape::{Element, integer};
use super::statement;
use crate::ident::QualifiedName;
use crate::pgoutput::{OldTuple, Tuple, TupleValue};
use crate::postgres::{EncodeError, Pipeline};

/// Fewer rows than this are executed one by one.
const SET_ROWS: usize = 3;

/// A row of more than this is executed by itself, whatever it belongs to.
const LARGE_ROW_BYTES: usize = 1 << 20;

/// Statements kept; when there are more, all are given up. Shapes are few, except where large values make every
/// combination of unchanged columns its own.
const MAX_STATEMENTS: usize = 2000;

/// What a step of the chunk belongs to.
#[derive(Clone, Debug)]
pub(super) enum Purpose {
    /// Changes of so many rows, each of which must be there.
    Change { table: Arc<QualifiedName>, operation: Operation, rows: u64 },
    /// Tables are emptied.
    Truncate { table: Arc<QualifiedName> },
    /// A definition is changed by the command with this tag and number.
    Command { tag: String, id: String },
    /// Needed for the transaction.
    Control(&'static str),
    /// The progress row.
    Progress,
}

/// Steps, and what they are for.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) pipeline: Pipeline,
    /// For each step.
    pub(super) purposes: Vec<Purpose>,
    /// For each step that counts rows.
    pub(super) executed: Vec<Purpose>,
}

/// What a prepared statement does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Row(RowShape),
    Deletes,
    Updates(Vec<u16>),
    Copy,
}

/// Knows what is prepared on one connection.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    tables: HashMap<u64, HashMap<Kind, Arc<str>>>,
    next: u64,
    kept: usize,
}

impl Chunk {
    /// Adds a statement without parameters that is prepared under this name.
    pub(super) fn control(&mut self, name: &str, doing: &'static str) -> Result<(), EncodeError> {
        self.pipeline.execute(name, [])?;
        self.did(Purpose::Control(doing));
        Ok(())
    }

    /// Adds a statement that is executed once.
    pub(super) fn sql(&mut self, sql: &str, purpose: Purpose) -> Result<(), EncodeError> {
        self.pipeline.execute_sql(sql)?;
        self.purposes.push(purpose.clone());
        self.did(purpose);
        Ok(())
    }

    /// An executing step was added.
    pub(super) fn did(&mut self, purpose: Purpose) {
        self.purposes.push(purpose.clone());
        self.executed.push(purpose);
    }
}

impl Encoder {
    /// Gives up what was prepared for tables that will not be named again.
    pub(super) fn retire(&mut self, tables: &[u64], chunk: &mut Chunk) -> Result<(), EncodeError> {
        for table in tables {
            for statement in self.tables.remove(table).unwrap_or_default().into_values() {
                self.kept -= 1;
                chunk.pipeline.close(&statement)?;
                chunk.purposes.push(Purpose::Control("closing statements"));
            }
        }
        Ok(())
    }

    /// Forgets what is prepared: none of it may be relied on after an error.
    pub(super) fn forget(&mut self, chunk: &mut Chunk) -> Result<(), EncodeError> {
        let tables: Vec<u64> = self.tables.keys().copied().collect();
        self.retire(&tables, chunk)
    }

    /// Adds one change by itself.
    pub(super) fn row(&mut self, table: &Table, change: &RowChange, chunk: &mut Chunk) -> Result<(), EncodeError> {
        let (shape, parameters) = table.row(change);
        let purpose = Purpose::Change { table: table.name.clone(), operation: change.operation(), rows: 1 };
        let statement = self.prepared(table, Kind::Row(shape), &purpose, chunk)?;
        chunk.pipeline.execute(&statement, parameters.iter().map(|value| value.as_deref()))?;
        chunk.did(purpose);
        Ok(())
    }

    /// Adds the changes of one table, in as few statements as possible.
    pub(super) fn part(&mut self, part: Part, chunk: &mut Chunk) -> Result<(), ExecuteError> {
        let table = &*part.table;
        for run in part.runs {
            match run {
                Run::Net(net) => self.sets(table, net.into_sets(), chunk)?,
                Run::Inserts(rows) => self.inserts(table, rows, chunk)?,
                Run::Row(row) => self.row(table, &row, chunk)?,
            }
        }
        Ok(())
    }

    fn sets(&mut self, table: &Table, sets: Sets, chunk: &mut Chunk) -> Result<(), EncodeError> {
        self.deletes(table, &sets.deletes, chunk)?;
        self.updates(table, sets.updates, chunk)?;
        self.inserts(table, sets.inserts, chunk)
    }

    fn deletes(&mut self, table: &Table, keys: &[Key], chunk: &mut Chunk) -> Result<(), EncodeError> {
        let elements = elements(&table.parameters(table.key_columns().unwrap_or_default()));
        let fits = |key: &Key| elements.iter().zip(key.values()).all(|(element, value)| element.holds(value));
        if keys.len() < SET_ROWS || !keys.iter().all(fits) {
            let as_row = |key| RowChange::Delete(OldTuple::Key(table.key_tuple(key)));
            return keys.iter().try_for_each(|key| self.row(table, &as_row(key), chunk));
        }
        let purpose = purpose(table, Operation::Delete, keys.len());
        let statement = self.prepared(table, Kind::Deletes, &purpose, chunk)?;
        chunk.pipeline.execute_binary(&statement, elements.len(), |column, out| {
            array(out, elements[column], keys.len(), keys.iter().map(|key| key.values().get(column)));
        })?;
        chunk.did(purpose);
        Ok(())
    }

    /// Updates that set the same columns go together.
    fn updates(&mut self, table: &Table, rows: Vec<(Key, Tuple)>, chunk: &mut Chunk) -> Result<(), EncodeError> {
        let mut whole = Vec::new();
        let mut others: HashMap<Vec<u16>, Vec<(Key, Tuple)>> = HashMap::new();
        for (key, new) in rows {
            if is_large(&new) {
                self.row(table, &RowChange::Update { old: None, new }, chunk)?;
            } else if new.values.contains(&TupleValue::UnchangedToast) {
                others.entry(table.changed_columns(&new)).or_default().push((key, new));
            } else {
                whole.push((key, new));
            }
        }
        if let Some((_, first)) = whole.first() {
            others.entry(table.changed_columns(first)).or_default().append(&mut whole);
        }
        for (set, rows) in others {
            self.update_set(table, set, rows, chunk)?;
        }
        Ok(())
    }

    fn update_set(
        &mut self,
        table: &Table,
        set: Vec<u16>,
        rows: Vec<(Key, Tuple)>,
        chunk: &mut Chunk,
    ) -> Result<(), EncodeError> {
        let keys = table.key_columns().map_or(0, <[u16]>::len);
        let mut elements = elements(&table.parameters(table.key_columns().unwrap_or_default()));
        elements.extend(self::elements(&table.parameters(&set)));
        let fits = |(key, new): &(Key, Tuple)| {
            let values = key.values().iter().map(Some).chain(set.iter().map(|&column| value(new, column)));
            elements.iter().zip(values).all(|(element, value)| value.is_none_or(|text| element.holds(text)))
        };
        if rows.len() < SET_ROWS || !rows.iter().all(fits) {
            let mut as_row = |new| self.row(table, &RowChange::Update { old: None, new }, chunk);
            return rows.into_iter().try_for_each(|(_, new)| as_row(new));
        }
        let purpose = purpose(table, Operation::Update, rows.len());
        let statement = self.prepared(table, Kind::Updates(set.clone()), &purpose, chunk)?;
        chunk.pipeline.execute_binary(&statement, elements.len(), |index, out| {
            let element = elements[index];
            match index.checked_sub(keys).and_then(|index| set.get(index)) {
                None => array(out, element, rows.len(), rows.iter().map(|(key, _)| key.values().get(index))),
                Some(&column) => array(out, element, rows.len(), rows.iter().map(|(_, new)| value(new, column))),
            }
        })?;
        chunk.did(purpose);
        Ok(())
    }

    fn inserts(&mut self, table: &Table, mut rows: Vec<Tuple>, chunk: &mut Chunk) -> Result<(), EncodeError> {
        let columns = table.insert_columns();
        if rows.len() < SET_ROWS || columns.is_empty() {
            return rows.into_iter().try_for_each(|new| self.row(table, &RowChange::Insert(new), chunk));
        }
        for large in rows.extract_if(.., |row| is_large(row)) {
            self.row(table, &RowChange::Insert(large), chunk)?;
        }
        let purpose = purpose(table, Operation::Insert, rows.len());
        let statement = self.prepared(table, Kind::Copy, &purpose, chunk)?;
        chunk.pipeline.copy_in(&statement, rows.iter().map(|row| |out: &mut BytesMut| copy_row(out, row, &columns)))?;
        chunk.did(purpose);
        Ok(())
    }

    /// The name of the statement, prepared now if it is not yet.
    fn prepared(
        &mut self,
        table: &Table,
        kind: Kind,
        purpose: &Purpose,
        chunk: &mut Chunk,
    ) -> Result<Arc<str>, EncodeError> {
        if let Some(name) = self.tables.get(&table.id).and_then(|statements| statements.get(&kind)) {
            return Ok(name.clone());
        }
        if self.kept >= MAX_STATEMENTS {
            self.forget(chunk)?;
        }
        let name: Arc<str> = format!("s{}", self.next).into();
        self.next += 1;
        let keys = table.parameters(table.key_columns().unwrap_or_default());
        let sql = match &kind {
            Kind::Row(shape) => table.row_sql(shape),
            Kind::Deletes => statement::delete_set(&table.name, &keys),
            Kind::Updates(set) if set.is_empty() => statement::touch_set(&table.name, &keys),
            Kind::Updates(set) => statement::update_set(&table.name, &keys, &table.parameters(set)),
            Kind::Copy => statement::copy_in(&table.name, &table.parameters(&table.insert_columns())),
        };
        chunk.pipeline.parse(&name, &sql, &[])?;
        chunk.purposes.push(purpose.clone());
        self.tables.entry(table.id).or_default().insert(kind, name.clone());
        self.kept += 1;
        Ok(name)
    }
}

fn purpose(table: &Table, operation: Operation, rows: usize) -> Purpose {
    Purpose::Change { table: table.name.clone(), operation, rows: u64::try_from(rows).unwrap_or(u64::MAX) }
}

fn is_large(tuple: &Tuple) -> bool {
    tuple.values.iter().filter_map(text).map(Bytes::len).sum::<usize>() > LARGE_ROW_BYTES
}

fn value(tuple: &Tuple, column: u16) -> Option<&Bytes> {
    tuple.values.get(usize::from(column)).and_then(text)
}

fn elements(columns: &[statement::Parameter<'_>]) -> Vec<Element> {
    columns.iter().map(|(_, column)| column.element()).collect()
}

/// An array as `array_recv` takes it: dimensions, flags, type, length, lower bound, then each value with its length. All
/// values are such as the element holds.
fn array<'v>(out: &mut BytesMut, element: Element, count: usize, values: impl Iterator<Item = Option<&'v Bytes>>) {
    let length = |bytes: usize| i32::try_from(bytes).unwrap_or(i32::MAX);
    out.put_i32(1);
    // Says that there may be nulls; the server looks for itself.
    out.put_i32(1);
    out.put_u32(element.oid());
    out.put_i32(length(count));
    out.put_i32(1);
    for value in values {
        match (value, element) {
            (Some(bytes), Element::Text) => {
                out.put_i32(length(bytes.len()));
                out.extend_from_slice(bytes);
            }
            (Some(bytes), Element::Integer(width)) => {
                out.put_i32(i32::from(width));
                out.put_int(integer(bytes).unwrap_or_default(), usize::from(width));
            }
            (None, _) => out.put_i32(-1),
        }
    }
}

/// A line of COPY's text form.
fn copy_row(out: &mut BytesMut, row: &Tuple, columns: &[u16]) {
    for (index, &column) in columns.iter().enumerate() {
        if index > 0 {
            out.put_u8(b'\t');
        }
        match value(row, column) {
            Some(bytes) => copy_value(out, bytes),
            None => out.extend_from_slice(b"\\N"),
        }
    }
    out.put_u8(b'\n');
}

fn copy_value(out: &mut BytesMut, mut rest: &[u8]) {
    out.reserve(rest.len() + 1);
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\t' | b'\n' | b'\r')) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(match rest[at] {
            b'\\' => b"\\\\",
            b'\t' => b"\\t",
            b'\n' => b"\\n",
            _ => b"\\r",
        });
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_copy_escapes_what_would_end_it() {
        let text = |value: &'static str| TupleValue::Text(Bytes::from_static(value.as_bytes()));
        let row =
            Tuple { values: vec![text("a\tb\\c\nd\re"), text("not this"), TupleValue::Null, text(""), text("\\.")] };
        let mut out = BytesMut::new();
        copy_row(&mut out, &row, &[0, 2, 3, 4]);
        assert_eq!(out, &b"a\\tb\\\\c\\nd\\re\t\\N\t\t\\\\.\n"[..]);
    }

    #[test]
    fn an_array_is_laid_out_as_the_server_reads_it() {
        let (one, none) = (Bytes::from_static(b"x"), None);
        let mut out = BytesMut::new();
        array(&mut out, Element::Text, 2, [Some(&one), none].into_iter());
        let expected =
            [&[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 25, 0, 0, 0, 2, 0, 0, 0, 1][..], &[0, 0, 0, 1, b'x'], &[255; 4]];
        assert_eq!(out, expected.concat());
        let (minus_two, mut out) = (Bytes::from_static(b"-2"), BytesMut::new());
        array(&mut out, Element::Integer(4), 2, [Some(&minus_two), None].into_iter());
        let values = [&[0, 0, 0, 4, 255, 255, 255, 254][..], &[255; 4]].concat();
        assert_eq!(out[8..12], [0, 0, 0, 23]);
        assert_eq!(out[20..], values);
    }
}
