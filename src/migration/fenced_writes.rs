//! Tells, from what a server that was left has committed, the writes of strangers from our own. Pure.
//!
//! The server is fenced, so whatever commits there was written past the fence, or by ourselves: the applier of the stream
//! back updates its progress row in every transaction, a repair touches the same table, and markers and boundaries are
//! written by themselves. So a transaction is ours if it touches a table of ours that is published:
//!
//! ```text
//! Begin  Insert public.orders  Update pgcutover.progress  Commit      ours: the applier's
//! Begin  Insert pgcutover.boundary (2)  Commit                        a cutover that leads here is being decided
//! Begin  Insert public.orders  Commit                                 a stranger's
//! ```
//!
//! Only names and numbers are kept; a value is looked at nowhere but in our own boundary. What is kept of a transaction is
//! bounded by the number of published tables, however large it is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use crate::catalog::watches::WriteKind;
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::pgoutput::{DecodeError, Message, Relation, Timestamp, Tuple, TupleValue, decode};
use crate::switch::Epoch;

/// Our own schema.
const SCHEMA: &str = "pgcutover";

/// Changes of one transaction, or of several: rows for each table and kind.
pub type Changes = BTreeMap<(Arc<QualifiedName>, WriteKind), u64>;

/// A transaction that has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// Where its commit record ends.
    pub end_lsn: Lsn,
    /// When it committed.
    pub at: Timestamp,
    /// Who wrote it.
    pub whose: Whose,
}

/// Who wrote a transaction.
#[derive(Debug, PartialEq, Eq)]
pub enum Whose {
    /// We did, or nothing was written that is published.
    Ours,
    /// A cutover of this number that leads to the server: if it is decided, what follows is the application's.
    Boundary(Epoch),
    /// Somebody who got past the fence.
    Strangers(Changes),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Sieve {
    relations: HashMap<u32, Known>,
    open: Option<Open>,
}

#[derive(Debug)]
enum Known {
    Ours,
    Boundary { epoch: usize },
    Table(Arc<QualifiedName>),
}

#[derive(Debug, Default)]
struct Open {
    ours: bool,
    boundary: Option<Epoch>,
    changes: Changes,
}

impl Sieve {
    /// Whether a transaction has begun and not ended yet.
    pub fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Takes one message of protocol version 1; tells of a transaction once it has ended.
    pub fn take(&mut self, data: &Bytes) -> Result<Option<Ended>, DecodeError> {
        let kind = match data.first() {
            Some(b'I') => WriteKind::Insert,
            Some(b'U') => WriteKind::Update,
            Some(b'D') => WriteKind::Delete,
            _ => return self.take_other(decode(data, false)?),
        };
        let missing = || DecodeError::Truncated { message: char::from(data[0]), field: "relation" };
        let oid = data.get(1..5).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes).ok_or_else(missing)?;
        if let Some(Known::Boundary { epoch }) = self.relations.get(&oid) {
            let written = match decode(data, false)? {
                Message::Insert(insert) => epoch_of(&insert.new, *epoch),
                Message::Update(update) => epoch_of(&update.new, *epoch),
                _ => None,
            };
            if let Some(open) = &mut self.open {
                open.boundary = open.boundary.max(written);
            }
        }
        self.count(oid, kind);
        Ok(None)
    }

    fn take_other(&mut self, message: Message) -> Result<Option<Ended>, DecodeError> {
        match message {
            Message::Begin(_) => self.open = Some(Open::default()),
            Message::Relation(relation) => self.learn(&relation),
            Message::Truncate(truncate) => {
                truncate.relations.iter().for_each(|oid| self.count(*oid, WriteKind::Truncate));
            }
            Message::Commit(commit) => {
                let Open { ours, boundary, changes } = self.open.take().unwrap_or_default();
                let whose = match boundary {
                    Some(epoch) => Whose::Boundary(epoch),
                    None if ours || changes.is_empty() => Whose::Ours,
                    None => Whose::Strangers(changes),
                };
                return Ok(Some(Ended { end_lsn: commit.end_lsn, at: commit.timestamp, whose }));
            }
            // Nothing that protocol version 1 sends changes a row otherwise.
            _ => {}
        }
        Ok(None)
    }

    fn learn(&mut self, relation: &Relation) {
        let epoch = || relation.columns.iter().position(|column| column.name == "epoch");
        let known = match (relation.schema.as_str(), relation.name.as_str(), epoch()) {
            (SCHEMA, "boundary", Some(epoch)) => Known::Boundary { epoch },
            (SCHEMA, ..) => Known::Ours,
            (schema, name, _) => Known::Table(Arc::new(QualifiedName::new(schema, name))),
        };
        self.relations.insert(relation.oid, known);
    }

    fn count(&mut self, oid: u32, kind: WriteKind) {
        let Some(open) = &mut self.open else { return };
        match self.relations.get(&oid) {
            Some(Known::Table(table)) => *open.changes.entry((table.clone(), kind)).or_default() += 1,
            Some(Known::Ours | Known::Boundary { .. }) => open.ours = true,
            // It was sent before its first change, always.
            None => {}
        }
    }
}

fn epoch_of(new: &Tuple, column: usize) -> Option<Epoch> {
    match new.values.get(column) {
        Some(TupleValue::Text(text)) => std::str::from_utf8(text).ok()?.parse().ok().map(Epoch),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDERS: u32 = 16_400;
    const ITEMS: u32 = 16_410;
    const PROGRESS: u32 = 16_420;
    const BOUNDARY: u32 = 16_430;

    fn text(message: &mut Vec<u8>, text: &str) {
        message.extend_from_slice(text.as_bytes());
        message.push(0);
    }

    /// A table with one column, as pgoutput describes it.
    fn relation(oid: u32, schema: &str, name: &str, column: &str) -> Bytes {
        let mut message = vec![b'R'];
        message.extend_from_slice(&oid.to_be_bytes());
        text(&mut message, schema);
        text(&mut message, name);
        message.push(b'd');
        message.extend_from_slice(&1u16.to_be_bytes());
        message.push(1);
        text(&mut message, column);
        message.extend_from_slice(&20u32.to_be_bytes());
        message.extend_from_slice(&(-1i32).to_be_bytes());
        message.into()
    }

    fn begin(lsn: u64) -> Bytes {
        let mut message = vec![b'B'];
        message.extend_from_slice(&lsn.to_be_bytes());
        message.extend_from_slice(&7i64.to_be_bytes());
        message.extend_from_slice(&742u32.to_be_bytes());
        message.into()
    }

    fn commit(lsn: u64) -> Bytes {
        let mut message = vec![b'C', 0];
        message.extend_from_slice(&lsn.to_be_bytes());
        message.extend_from_slice(&(lsn + 0x30).to_be_bytes());
        message.extend_from_slice(&7i64.to_be_bytes());
        message.into()
    }

    /// A change of one kind, with a tuple of one value.
    fn row(tag: u8, oid: u32, value: &str) -> Bytes {
        let mut message = vec![tag];
        message.extend_from_slice(&oid.to_be_bytes());
        message.push(if tag == b'D' { b'K' } else { b'N' });
        message.extend_from_slice(&1u16.to_be_bytes());
        message.push(b't');
        message.extend_from_slice(&u32::try_from(value.len()).expect("short").to_be_bytes());
        message.extend_from_slice(value.as_bytes());
        message.into()
    }

    fn truncate(oids: &[u32]) -> Bytes {
        let mut message = vec![b'T'];
        message.extend_from_slice(&u32::try_from(oids.len()).expect("few").to_be_bytes());
        message.push(0);
        oids.iter().for_each(|oid| message.extend_from_slice(&oid.to_be_bytes()));
        message.into()
    }

    fn sieve() -> Sieve {
        let mut sieve = Sieve::default();
        for (oid, schema, name, column) in [
            (ORDERS, "public", "orders", "id"),
            (ITEMS, "public", "items", "id"),
            (PROGRESS, "pgcutover", "progress", "lane"),
            (BOUNDARY, "pgcutover", "boundary", "epoch"),
        ] {
            assert_eq!(sieve.take(&relation(oid, schema, name, column)), Ok(None));
        }
        sieve
    }

    fn whose(sieve: &mut Sieve, changes: &[Bytes]) -> Whose {
        assert_eq!(sieve.take(&begin(0x1A000)), Ok(None));
        assert!(sieve.in_transaction());
        for change in changes {
            assert_eq!(sieve.take(change), Ok(None));
        }
        let ended = sieve.take(&commit(0x1A000)).expect("decodes").expect("ends");
        assert_eq!((ended.end_lsn, ended.at), (Lsn(0x1A030), Timestamp(7)));
        assert!(!sieve.in_transaction());
        ended.whose
    }

    #[test]
    fn strangers_are_told_from_the_applier_by_its_progress() {
        let mut sieve = sieve();
        let insert = row(b'I', ORDERS, "1");
        assert_eq!(whose(&mut sieve, &[insert.clone(), row(b'U', PROGRESS, "0")]), Whose::Ours);
        assert_eq!(whose(&mut sieve, &[row(b'U', PROGRESS, "0"), insert.clone()]), Whose::Ours, "in any order");
        assert_eq!(whose(&mut sieve, &[]), Whose::Ours, "nothing that is published");
        let written =
            [insert.clone(), insert, row(b'D', ORDERS, "1"), row(b'U', ITEMS, "1"), truncate(&[ORDERS, ITEMS])];
        let Whose::Strangers(found) = whose(&mut sieve, &written) else { panic!("nobody of ours wrote this") };
        let found: Vec<_> =
            found.iter().map(|((table, kind), rows)| (table.name.as_str(), kind.as_str(), *rows)).collect();
        let expected = [
            ("items", "update", 1),
            ("items", "truncate", 1),
            ("orders", "insert", 2),
            ("orders", "delete", 1),
            ("orders", "truncate", 1),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_boundary_tells_its_cutover() {
        let mut sieve = sieve();
        assert_eq!(whose(&mut sieve, &[row(b'I', BOUNDARY, "2")]), Whose::Boundary(Epoch(2)));
        assert_eq!(whose(&mut sieve, &[row(b'U', BOUNDARY, "3")]), Whose::Boundary(Epoch(3)), "decided again");
        assert_eq!(whose(&mut sieve, &[row(b'D', BOUNDARY, "3")]), Whose::Ours, "removed by hand");
    }

    #[test]
    fn bytes_that_are_no_message_are_an_error() {
        let mut sieve = sieve();
        for bad in [&b""[..], b"I", b"I\0\0\0", b"?", b"B\0"] {
            assert!(sieve.take(&Bytes::from_static(bad)).is_err(), "{bad:?}");
        }
    }
}
