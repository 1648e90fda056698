//! Gathers changes into pieces: as much as one round trip to the target is to do. No sockets, no clock.
//!
//! A piece holds whole transactions of the source, or a part of one that is larger than a piece: that one then spreads over
//! several pieces inside one transaction of the target. It holds the changes twice: their net effect by table, which is what
//! is normally executed, and the messages in their order, for the case that the target refuses the former.

use std::sync::Arc;

use bytes::Bytes;
use hashbrown::HashMap;
use tokio::sync::OwnedSemaphorePermit;

use super::command::Command;
use super::plan::{Change, Committed, Operation, Truncation};
use super::plan_net::Net;
use super::plan_table::{RowChange, Table};
use crate::lsn::Lsn;
use crate::pgoutput::Tuple;

/// With this many changes a piece is worth being executed by itself: the target works while the rest is still being read.
const WORTHWHILE_CHANGES: usize = 4_000;
/// A piece is full with this many changes …
const FULL_CHANGES: usize = 20_000;
/// … or with messages that occupy so much of the queue's memory: 8 MiB, and less where the queue has less than 64.
const FULL_BYTES: usize = 8 << 20;
const FULL_PART: usize = 8;
/// A part of either, with which it is better ended where a transaction of the source ends than filled to the last: a
/// transaction of the target that never ends makes nothing durable.
const NEARLY: (usize, usize) = (3, 4);
/// With changes of so many tables, too: the target's transaction locks each of them and each of their indexes until it ends,
/// and there is room for some 6,400 locks of all sessions as servers come (`max_locks_per_transaction` of every connection).
/// What one transaction of the source has locked, one of the target can.
const MANY_TABLES: usize = 256;

/// As much as is executed at a time.
#[derive(Debug, Default)]
pub(super) struct Piece {
    /// By table, in the order of their first change.
    pub(super) parts: Vec<Part>,
    /// The same changes, in their order.
    pub(super) messages: Vec<(Arc<Table>, Bytes)>,
    /// What comes last, and neither of them beside the other.
    pub(super) truncate: Option<Truncation>,
    /// Likewise.
    pub(super) command: Option<Command>,
    /// Set when it ends with a transaction of the source: then the target's transaction ends too.
    pub(super) end: Option<End>,
    /// Tables that no later change will name.
    pub(super) retired: Vec<u64>,
    /// Given back when the piece is done with.
    memory: Option<OwnedSemaphorePermit>,
}

/// The changes of one table.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) table: Arc<Table>,
    /// To be executed in this order; other tables' changes may come before or after.
    pub(super) runs: Vec<Run>,
    pub(super) counts: Counts,
}

/// How often each thing was done by the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) inserts: u64,
    pub(super) updates: u64,
    pub(super) deletes: u64,
    pub(super) truncates: u64,
}

/// Changes that are executed together.
#[derive(Debug)]
pub(super) enum Run {
    /// Of rows with keys.
    Net(Net),
    /// Rows that are only added.
    Inserts(Vec<Tuple>),
    /// One that can be executed only by itself.
    Row(RowChange),
}

/// Changes by table, in the order of their first change.
#[derive(Debug, Default)]
pub(super) struct Parts {
    parts: Vec<Part>,
    by_table: HashMap<u64, usize>,
}

/// What the progress row will say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    pub(super) commit_lsn: Lsn,
    pub(super) end_lsn: Lsn,
    /// The last is what the progress row will say.
    pub(super) markers: Vec<String>,
    pub(super) transactions: u64,
    /// Those of them that have changed definitions.
    pub(super) alterations: u64,
}

/// How much is in a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fill {
    /// It grows until there is nothing else to do.
    Little,
    /// It goes where the target is ready for it and a transaction of the source ends.
    Worthwhile,
    /// It goes where a transaction of the source ends.
    NearlyFull,
    /// Nothing may be added before it has gone.
    Full,
}

/// Fills one piece after the other.
#[derive(Debug)]
pub(super) struct Gatherer {
    piece: Piece,
    parts: Parts,
    /// Permits of the queue's memory with which a piece is full.
    full_permits: usize,
    transactions: u64,
    alterations: u64,
    markers: Vec<String>,
}

impl Piece {
    /// Whether there is nothing to execute but the end.
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.truncate.is_none() && self.command.is_none()
    }
}

impl Counts {
    fn count(&mut self, operation: Operation) {
        *match operation {
            Operation::Insert => &mut self.inserts,
            Operation::Update => &mut self.updates,
            Operation::Delete => &mut self.deletes,
            Operation::Truncate => &mut self.truncates,
        } += 1;
    }
}

impl Default for Gatherer {
    fn default() -> Self {
        Self::new(usize::MAX, 1)
    }
}

impl Gatherer {
    /// For a queue of `queue_bytes`, of which one permit stands for `permit_bytes`. A piece must never need more than
    /// there is: nothing more could be read, and it would wait for more for ever.
    pub(super) fn new(queue_bytes: usize, permit_bytes: usize) -> Self {
        let full_permits = (FULL_BYTES.min(queue_bytes / FULL_PART) / permit_bytes).max(1);
        Self {
            piece: Piece::default(),
            parts: Parts::default(),
            full_permits,
            transactions: 0,
            alterations: 0,
            markers: Vec::new(),
        }
    }

    /// Whether there is nothing to execute.
    pub(super) fn is_empty(&self) -> bool {
        self.piece.is_empty()
    }

    /// Whether there is anything to record: rows, or transactions of the source that came to nothing here.
    pub(super) fn has_marker(&self) -> bool {
        !self.markers.is_empty()
    }

    /// How far it is filled.
    pub(super) fn fill(&self) -> Fill {
        let held = self.piece.memory.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let changes = self.piece.messages.len();
        let ended = self.piece.truncate.is_some() || self.piece.command.is_some();
        let reaches =
            |(part, whole)| changes * whole >= FULL_CHANGES * part || held * whole >= self.full_permits * part;
        if ended || reaches((1, 1)) {
            Fill::Full
        } else if reaches(NEARLY) || self.parts.parts.len() >= MANY_TABLES {
            Fill::NearlyFull
        } else if changes >= WORTHWHILE_CHANGES {
            Fill::Worthwhile
        } else {
            Fill::Little
        }
    }

    /// Gives the memory of messages back that came to nothing.
    pub(super) fn release(&mut self) {
        self.piece.memory = None;
    }

    /// Keeps the memory of messages occupied until the piece is done with.
    pub(super) fn hold(&mut self, memory: OwnedSemaphorePermit) {
        match &mut self.piece.memory {
            Some(held) => held.merge(memory),
            None => self.piece.memory = Some(memory),
        }
    }

    /// Adds a change, with the message that it was read from.
    pub(super) fn change(&mut self, change: Change, message: Bytes) {
        self.piece.messages.push((change.table.clone(), message));
        self.parts.add(change);
    }

    /// Ends the piece with tables that are emptied: what follows must not be moved before it, nor the other way round.
    pub(super) fn truncate(&mut self, truncation: Truncation) {
        for table in &truncation.tables {
            self.parts.part(table).counts.count(Operation::Truncate);
        }
        self.piece.truncate = Some(truncation);
    }

    /// Ends the piece with a change of a definition.
    pub(super) fn command(&mut self, command: Command) {
        self.piece.command = Some(command);
    }

    /// A transaction of the source is complete.
    pub(super) fn committed(&mut self, committed: Committed) {
        self.transactions += 1;
        self.alterations += u64::from(committed.altered);
        self.markers.extend(committed.marker);
    }

    /// Tables that later changes will not name.
    pub(super) fn retire(&mut self, tables: Vec<u64>) {
        self.piece.retired.extend(tables);
    }

    /// The piece as it is, in the middle of a transaction of the source.
    pub(super) fn take(&mut self) -> Piece {
        Piece { parts: self.parts.take(), ..std::mem::take(&mut self.piece) }
    }

    /// The piece, ended: everything up to these positions is in it or was in one before.
    pub(super) fn take_ended(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Piece {
        let mut piece = self.take();
        let transactions = std::mem::take(&mut self.transactions);
        let alterations = std::mem::take(&mut self.alterations);
        let markers = std::mem::take(&mut self.markers);
        piece.end = Some(End { commit_lsn, end_lsn, markers, transactions, alterations });
        piece
    }
}

impl Parts {
    /// Adds a change.
    pub(super) fn add(&mut self, change: Change) {
        let part = self.part(&change.table);
        part.counts.count(change.row.operation());
        part.add(change.row);
    }

    /// What was added.
    pub(super) fn take(&mut self) -> Vec<Part> {
        self.by_table.clear();
        std::mem::take(&mut self.parts)
    }

    fn part(&mut self, table: &Arc<Table>) -> &mut Part {
        let index = *self.by_table.entry(table.id).or_insert(self.parts.len());
        if index == self.parts.len() {
            self.parts.push(Part { table: table.clone(), runs: Vec::new(), counts: Counts::default() });
        }
        &mut self.parts[index]
    }
}

impl Part {
    fn add(&mut self, row: RowChange) {
        if self.table.folds() {
            if !matches!(self.runs.last(), Some(Run::Net(_))) {
                self.runs.push(Run::Net(Net::default()));
            }
            let Some(Run::Net(net)) = self.runs.last_mut() else { unreachable!("just pushed") };
            let Err(row) = net.add(&self.table, row) else { return };
            if net.is_empty() {
                self.runs.pop();
            }
            self.runs.push(Run::Row(row));
            return;
        }
        match (row, self.runs.last_mut()) {
            (RowChange::Insert(new), Some(Run::Inserts(rows))) => rows.push(new),
            (RowChange::Insert(new), _) => self.runs.push(Run::Inserts(vec![new])),
            (row @ (RowChange::Update { .. } | RowChange::Delete(_)), _) => self.runs.push(Run::Row(row)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::apply::shape::{ColumnKind, KeyPart, TableShape, TargetColumn};
    use crate::pgoutput::{Column, Relation, ReplicaIdentity, TupleValue};

    fn table(number: u32) -> Arc<Table> {
        let id = Column { key: true, name: "id".to_owned(), type_oid: 23, type_modifier: -1 };
        let relation = Relation {
            xid: None,
            oid: number,
            schema: "s".to_owned(),
            name: format!("t{number}"),
            replica_identity: ReplicaIdentity::Default,
            columns: vec![id],
        };
        let id = TargetColumn {
            type_sql: "integer".to_owned(),
            kind: ColumnKind::Plain,
            equality: Some("pg_catalog.=".to_owned()),
            primary_key: KeyPart::Unique,
            cast_from_text: false,
            cast_to_text: false,
        };
        let shape = TableShape::new([("id".to_owned(), id)]);
        Arc::new(Table::map(u64::from(number), relation, shape, |_| None).expect("mapped"))
    }

    #[test]
    fn changes_of_many_tables_nearly_fill_a_piece() {
        let mut gatherer = Gatherer::default();
        let row = |value: &'static str| {
            RowChange::Insert(Tuple { values: vec![TupleValue::Text(Bytes::from_static(value.as_bytes()))] })
        };
        for number in 1..=300 {
            let table = table(number);
            gatherer.change(Change { table: table.clone(), row: row("1") }, Bytes::new());
            gatherer.change(Change { table, row: row("2") }, Bytes::new());
            let wanted = if number < 256 { Fill::Little } else { Fill::NearlyFull };
            assert_eq!(gatherer.fill(), wanted, "{number} tables");
        }
        assert_eq!(gatherer.take().parts.len(), 300);
        assert_eq!(gatherer.fill(), Fill::Little, "of the next one");
    }
}
