//! What is left of many changes of one table: its net effect, row by row. Pure.
//!
//! Within one transaction of the target nobody sees what is in between, so a row that was updated a thousand times is
//! updated once, and one that came and went leaves nothing. What is left is executed in three sets: deletes, then
//! updates, then inserts. Keys make that safe: an update here never changes a key, and a key that is inserted is either
//! new or its row is deleted first. Another unique constraint can still be in the way (two rows that swapped their values);
//! then the target refuses, and the executor applies the same changes again, one by one in their own order.
//!
//! ```text
//! U 1 a=1 · U 1 a=2, b unchanged        → update 1: a=2, and b if the first one had it
//! I 7 · U 7 · D 7                       → nothing
//! D 3 · I 3                             → delete 3, insert 3
//! U 3→4 (its key changes)               → delete 3, insert 4, when every value of the new row is known
//! ```

use std::hash::BuildHasher as _;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use super::plan_table::{Key, RowChange, Table};
use crate::pgoutput::{OldTuple, Tuple, TupleValue};

/// The net effect on rows that have keys.
#[derive(Debug, Default)]
pub struct Net {
    rows: Vec<Row>,
    /// Where each key is among the rows, which hold it.
    by_key: HashTable<usize>,
    hasher: DefaultHashBuilder,
}

/// One key.
#[derive(Debug)]
struct Row {
    key: Key,
    /// The row that was there before is to be removed.
    delete: bool,
    now: Now,
}

/// What the key is to have afterwards.
#[derive(Debug)]
enum Now {
    /// No row, or the one that is there as it is.
    Nothing,
    /// A new row.
    Insert(Tuple),
    /// The row that is there with the values that were sent.
    Update(Tuple),
}

/// What is left, in the order in which it may be executed.
#[derive(Debug, Default)]
pub struct Sets {
    /// Rows that go.
    pub deletes: Vec<Key>,
    /// Rows that change, and what they get.
    pub updates: Vec<(Key, Tuple)>,
    /// Rows that come.
    pub inserts: Vec<Tuple>,
}

impl Net {
    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Adds a change; gives it back where it cannot be folded into what is known. The net effect so far is then to be
    /// executed first, and after that the change.
    pub fn add(&mut self, table: &Table, change: RowChange) -> Result<(), RowChange> {
        match change {
            RowChange::Insert(new) => match table.key_in(&new) {
                Some(key) => self.insert(key, new).map_err(RowChange::Insert),
                None => Err(RowChange::Insert(new)),
            },
            RowChange::Delete(OldTuple::Key(old)) => match table.key_in(&old).map(|key| self.delete(key)) {
                Some(Ok(())) => Ok(()),
                Some(Err(())) | None => Err(RowChange::Delete(OldTuple::Key(old))),
            },
            RowChange::Delete(OldTuple::Full(old)) => match table.key_in(&old).map(|key| self.delete(key)) {
                Some(Ok(())) => Ok(()),
                Some(Err(())) | None => Err(RowChange::Delete(OldTuple::Full(old))),
            },
            RowChange::Update { old, new } => {
                let keys = match &old {
                    None => table.key_in(&new).map(|key| (key, None)),
                    Some(OldTuple::Key(tuple) | OldTuple::Full(tuple)) => {
                        let before = table.key_in(tuple);
                        before.and_then(|before| match table.key_in(&new) {
                            Some(now) if now == before => Some((now, None)),
                            now => now.map(|now| (before, Some(now))),
                        })
                    }
                };
                let folded = match keys {
                    Some((key, None)) => self.update(key, new),
                    Some((before, Some(now))) => self.rename(before, now, new),
                    None => Err(new),
                };
                folded.map_err(|new| RowChange::Update { old, new })
            }
        }
    }

    /// The row of a key, and whether it was known before.
    fn entry(&mut self, key: Key) -> (&mut Row, bool) {
        let Self { rows, by_key, hasher } = self;
        let hash = hasher.hash_one(&key);
        let same = |&index: &usize| rows.get(index).is_some_and(|row| row.key == key);
        let rehash = |&index: &usize| rows.get(index).map_or(0, |row| hasher.hash_one(&row.key));
        let (index, known) = match by_key.entry(hash, same, rehash) {
            Entry::Occupied(entry) => (*entry.get(), true),
            Entry::Vacant(entry) => (*entry.insert(rows.len()).get(), false),
        };
        if !known {
            rows.push(Row { key, delete: false, now: Now::Nothing });
        }
        (&mut rows[index], known)
    }

    fn known(&self, key: &Key) -> Option<&Row> {
        let found = self.by_key.find(self.hasher.hash_one(key), |&index| self.rows[index].key == *key);
        found.and_then(|&index| self.rows.get(index))
    }

    fn insert(&mut self, key: Key, new: Tuple) -> Result<(), Tuple> {
        let (row, _) = self.entry(key);
        match row.now {
            Now::Nothing => {
                row.now = Now::Insert(new);
                Ok(())
            }
            Now::Insert(_) | Now::Update(_) => Err(new),
        }
    }

    fn update(&mut self, key: Key, new: Tuple) -> Result<(), Tuple> {
        let (row, known) = self.entry(key);
        match &mut row.now {
            Now::Insert(before) | Now::Update(before) => {
                overlay(before, new);
                Ok(())
            }
            // Gone, and changed all the same.
            Now::Nothing if known => Err(new),
            Now::Nothing => {
                row.now = Now::Update(new);
                Ok(())
            }
        }
    }

    fn delete(&mut self, key: Key) -> Result<(), ()> {
        let (row, known) = self.entry(key);
        match row.now {
            Now::Nothing if known => return Err(()),
            Now::Insert(_) => {}
            Now::Nothing | Now::Update(_) => row.delete = true,
        }
        row.now = Now::Nothing;
        Ok(())
    }

    /// The row of one key becomes the row of another. Values that were not sent must be known from before.
    fn rename(&mut self, before: Key, now: Key, mut new: Tuple) -> Result<(), Tuple> {
        let old = self.known(&before);
        let taken = self.known(&now).is_some_and(|row| !matches!(row.now, Now::Nothing));
        let gone = old.is_some_and(|row| matches!(row.now, Now::Nothing));
        if taken || gone {
            return Err(new);
        }
        if let Some(Row { now: Now::Insert(values) | Now::Update(values), .. }) = old {
            let mut whole = values.clone();
            if has_holes(&new) {
                overlay(&mut whole, new.clone());
                if has_holes(&whole) {
                    return Err(new);
                }
                new = whole;
            }
        } else if has_holes(&new) {
            return Err(new);
        }
        let deleted = self.delete(before);
        debug_assert!(deleted.is_ok(), "a row that is gone was given back above");
        self.insert(now, new)
    }

    /// What is left.
    pub fn into_sets(self) -> Sets {
        let mut sets = Sets::default();
        for row in self.rows {
            match row.now {
                Now::Nothing => {}
                Now::Insert(new) => sets.inserts.push(new),
                Now::Update(new) => {
                    sets.updates.push((row.key, new));
                    continue;
                }
            }
            if row.delete {
                sets.deletes.push(row.key);
            }
        }
        sets
    }
}

fn has_holes(tuple: &Tuple) -> bool {
    tuple.values.contains(&TupleValue::UnchangedToast)
}

/// Every value that was sent replaces the one before it.
fn overlay(before: &mut Tuple, new: Tuple) {
    for (before, new) in before.values.iter_mut().zip(new.values) {
        if new != TupleValue::UnchangedToast {
            *before = new;
        }
    }
}
