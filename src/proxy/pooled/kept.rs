//! Statements that a pooled client keeps, and how many bytes of text they are.
//!
//! The server keeps only some of them at a time, so it is this process whose memory they fill: whoever adds one here
//! asks for the bytes before. A statement under two names counts twice.

use std::borrow::Borrow;
use std::collections::{HashMap, hash_map};
use std::hash::Hash;
use std::sync::Arc;

use crate::proxy::pool::Statement;

/// Statements by what the client knows them by.
#[derive(Debug)]
pub(super) struct Kept<K> {
    of: HashMap<K, Arc<Statement>>,
    bytes: usize,
}

impl<K> Default for Kept<K> {
    fn default() -> Self {
        Self { of: HashMap::new(), bytes: 0 }
    }
}

impl<K: Eq + Hash> Kept<K> {
    pub(super) fn len(&self) -> usize {
        self.of.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// Of all their texts and parameter types.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&Arc<Statement>>
    where
        K: Borrow<Q>,
    {
        self.of.get(key)
    }

    pub(super) fn insert(&mut self, key: K, statement: Arc<Statement>) {
        self.bytes += statement.tail.len();
        if let Some(before) = self.of.insert(key, statement) {
            self.bytes -= before.tail.len();
        }
    }

    pub(super) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
    {
        if let Some(gone) = self.of.remove(key) {
            self.bytes -= gone.tail.len();
        }
    }

    pub(super) fn clear(&mut self) {
        self.of.clear();
        self.bytes = 0;
    }

    pub(super) fn iter(&self) -> hash_map::Iter<'_, K, Arc<Statement>> {
        self.of.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::handoff::Traces;

    #[test]
    fn bytes_are_those_of_what_is_there() {
        let of = |length| {
            let (name, tail) = (Box::default(), vec![0_u8; length].into());
            Arc::new(Statement { id: 1, name, tail, traces: Traces::NONE, meaning: None, takes: None })
        };
        let mut kept: Kept<Box<[u8]>> = Kept::default();
        kept.insert((*b"a").into(), of(3));
        kept.insert((*b"b").into(), of(5));
        kept.insert((*b"a").into(), of(10));
        assert_eq!((kept.len(), kept.bytes()), (2, 15));
        kept.remove(&b"b"[..]);
        kept.remove(&b"c"[..]);
        assert_eq!((kept.len(), kept.bytes()), (1, 10));
        kept.clear();
        assert_eq!((kept.is_empty(), kept.bytes()), (true, 0));
    }
}
