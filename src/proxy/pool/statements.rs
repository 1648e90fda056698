//! Prepared statements of the protocol that clients share.
//!
//! A statement is known by its text, the types of its parameters, and what its text means (`search_path`, `DateStyle`
//! and the like are looked at when it is prepared). On a server connection it has a name of ours; each client has its
//! own names for it.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState};
use std::sync::{Arc, Weak};

use crate::proxy::handoff::{SessionState, Traces};

/// What every name of ours begins with. No client may name one of them.
pub(in crate::proxy) const NAME_PREFIX: &[u8] = b"pgcutover_s";

/// Bytes of statements that one server connection has, unless a single one has more. They outlive the clients that sent
/// them: without this bound one client could fill every connection with its largest.
const HELD_BYTES: usize = 16 << 20;

/// A prepared statement.
#[derive(Debug)]
pub(in crate::proxy) struct Statement {
    /// Never used again, so that a name stands for one statement on every connection of the pool.
    pub(in crate::proxy) id: u64,
    /// Its name on every server connection that has it.
    pub(in crate::proxy) name: Box<[u8]>,
    /// The body of its Parse message behind the name: the text, the parameter types.
    pub(in crate::proxy) tail: Box<[u8]>,
    /// What executing it may leave behind.
    pub(in crate::proxy) traces: Traces,
    /// The settings that its text was sent under: it is shared by those who have them, so it must not be prepared under
    /// others. None: it is one client's alone.
    pub(in crate::proxy) meaning: Option<Arc<SessionState>>,
    /// It is a client's DEALLOCATE of a statement of its own.
    pub(in crate::proxy) takes: Option<Taken>,
}

/// What a client's DEALLOCATE takes away. On the server the statement may be others' too, so something without a text is
/// taken away there in its stead.
#[derive(Clone, Debug)]
pub(in crate::proxy) struct Taken {
    /// The client's name for it.
    pub(in crate::proxy) name: Box<[u8]>,
    /// What the server takes away.
    pub(in crate::proxy) instead: Arc<Statement>,
}

impl Taken {
    /// The DEALLOCATE as the client means it, as the tail of a Parse.
    pub(in crate::proxy) fn tail(&self) -> Vec<u8> {
        let mut tail = b"DEALLOCATE \"".to_vec();
        for byte in &self.name {
            tail.extend(std::iter::repeat_n(*byte, if *byte == b'"' { 2 } else { 1 }));
        }
        tail.extend(b"\"\0\0\0");
        tail
    }
}

/// All statements of a pool that some client or connection still has.
#[derive(Default)]
pub(super) struct Statements {
    /// By meaning (one object each, see [`super::Profile`]), then by what the client sent.
    known: HashMap<usize, Meaning>,
    hashes: RandomState,
    next_id: u64,
    /// How many there may be before those that are gone are looked for.
    sweep_at: usize,
    count: usize,
}

struct Meaning {
    /// Keeps the address, which is the key, from standing for another one.
    _meaning: Arc<SessionState>,
    /// By the hash of what the client sent: a text is kept once, and no longer than its statement.
    statements: HashMap<u64, Vec<Weak<Statement>>>,
}

impl Statements {
    /// The statement that a client means by `tail`. `traces` are what its text may leave behind.
    pub(super) fn of(&mut self, meaning: &Arc<SessionState>, tail: &[u8], traces: Traces) -> Arc<Statement> {
        let key = Arc::as_ptr(meaning) as usize;
        let hash = self.hashes.hash_one(tail);
        let alike = self.known.get(&key).and_then(|of| of.statements.get(&hash)).into_iter().flatten();
        if let Some(known) = alike.filter_map(Weak::upgrade).find(|known| *known.tail == *tail) {
            return known;
        }
        self.count += 1;
        if self.count > self.sweep_at {
            self.sweep();
        }
        let statement = self.make(tail, traces, Some(meaning.clone()), None);
        let of =
            self.known.entry(key).or_insert_with(|| Meaning { _meaning: meaning.clone(), statements: HashMap::new() });
        of.statements.entry(hash).or_default().push(Arc::downgrade(&statement));
        statement
    }

    /// A statement that nobody else can mean: its text was sent where settings were not those of the session.
    pub(super) fn alone(&mut self, tail: &[u8], traces: Traces) -> Arc<Statement> {
        self.make(tail, traces, None, None)
    }

    /// A client's DEALLOCATE of its statement of this name.
    pub(super) fn deallocate(&mut self, name: &[u8]) -> Arc<Statement> {
        let taken = Taken { name: name.into(), instead: self.alone(b"\0\0\0", Traces::NONE) };
        let tail = [b"DEALLOCATE \"", &*taken.instead.name, b"\"\0\0\0"].concat();
        self.make(&tail, Traces::NONE, None, Some(taken))
    }

    fn make(
        &mut self,
        tail: &[u8],
        traces: Traces,
        meaning: Option<Arc<SessionState>>,
        takes: Option<Taken>,
    ) -> Arc<Statement> {
        self.next_id += 1;
        let id = self.next_id;
        let mut name = NAME_PREFIX.to_vec();
        name.extend_from_slice(format!("{id:x}").as_bytes());
        Arc::new(Statement { id, name: name.into(), tail: tail.into(), traces, meaning, takes })
    }

    fn sweep(&mut self) {
        for of in self.known.values_mut() {
            of.statements.retain(|_, alike| {
                alike.retain(|statement| statement.strong_count() > 0);
                !alike.is_empty()
            });
        }
        self.known.retain(|_, of| !of.statements.is_empty());
        self.count = self.known.values().flat_map(|of| of.statements.values()).map(Vec::len).sum();
        self.sweep_at = (self.count * 2).max(1024);
    }
}

/// The statements that one server connection has, the longest unused first to go.
#[derive(Debug, Default)]
pub(in crate::proxy) struct Held {
    statements: HashMap<u64, Use, BuildHasherDefault<IdHasher>>,
    bytes: usize,
    tick: u64,
}

#[derive(Debug)]
struct Use {
    statement: Arc<Statement>,
    last: u64,
}

impl Held {
    /// Whether the connection has it; it then counts as used now.
    #[inline]
    pub(in crate::proxy) fn touch(&mut self, id: u64) -> bool {
        self.tick += 1;
        match self.statements.get_mut(&id) {
            Some(used) => {
                used.last = self.tick;
                true
            }
            None => false,
        }
    }

    /// The connection has it from now on.
    pub(in crate::proxy) fn add(&mut self, statement: Arc<Statement>) {
        self.tick += 1;
        self.bytes += statement.tail.len();
        if let Some(before) = self.statements.insert(statement.id, Use { statement, last: self.tick }) {
            self.bytes -= before.statement.tail.len();
        }
    }

    /// It does not have it any more.
    pub(in crate::proxy) fn remove(&mut self, id: u64) {
        if let Some(gone) = self.statements.remove(&id) {
            self.bytes -= gone.statement.tail.len();
        }
    }

    /// The one that was not used for the longest time, if there are `limit` or more, or too many bytes of them for
    /// another one of so many `bytes`.
    pub(in crate::proxy) fn to_evict(&self, limit: usize, bytes: usize) -> Option<Arc<Statement>> {
        if self.statements.len() < limit && self.bytes + bytes <= HELD_BYTES {
            return None;
        }
        self.statements.values().min_by_key(|used| used.last).map(|used| used.statement.clone())
    }

    /// Keeps those that are still there.
    pub(in crate::proxy) fn retain(&mut self, is_there: impl Fn(&Statement) -> bool) {
        self.statements.retain(|_, used| is_there(&used.statement));
        self.bytes = self.iter().map(|statement| statement.tail.len()).sum();
    }

    /// It has none any more.
    pub(in crate::proxy) fn clear(&mut self) {
        self.statements.clear();
        self.bytes = 0;
    }

    /// All of them.
    pub(in crate::proxy) fn iter(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.statements.values().map(|used| &used.statement)
    }
}

/// Numbers that we hand out ourselves need no strong hash.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_types_and_meaning_tell_statements_apart() {
        let mut statements = Statements::default();
        let (here, there) = (Arc::new(SessionState::default()), Arc::new(SessionState::default()));
        let first = statements.of(&here, b"SELECT 1\0\0\0", Traces::NONE);
        assert_eq!(statements.of(&here, b"SELECT 1\0\0\0", Traces::NONE).id, first.id);
        assert_ne!(statements.of(&here, b"SELECT 1\0\0\x01\0\0\0\x17", Traces::NONE).id, first.id);
        assert_ne!(statements.of(&there, b"SELECT 1\0\0\0", Traces::NONE).id, first.id);
        assert_ne!(statements.alone(b"SELECT 1\0\0\0", Traces::NONE).id, first.id);
        assert!(first.name.starts_with(NAME_PREFIX));
        // What nobody has is forgotten in time.
        for number in 0..5000 {
            statements.of(&here, format!("SELECT {number}\0\0\0").as_bytes(), Traces::NONE);
        }
        assert!(statements.count < 2500);
        assert_eq!(statements.of(&here, b"SELECT 1\0\0\0", Traces::NONE).id, first.id);
    }

    #[test]
    fn the_longest_unused_one_goes_first() {
        let mut statements = Statements::default();
        let mut held = Held::default();
        let all: Vec<_> = (0..3).map(|number| statements.alone(&[number], Traces::NONE)).collect();
        all.iter().for_each(|statement| held.add(statement.clone()));
        assert!(held.touch(all[0].id) && !held.touch(99));
        assert_eq!(held.to_evict(4, 1).map(|one| one.id), None);
        assert_eq!(held.to_evict(3, 1).map(|one| one.id), Some(all[1].id));
        held.remove(all[1].id);
        assert_eq!(held.to_evict(2, 1).map(|one| one.id), Some(all[2].id));
    }

    #[test]
    fn a_connection_has_so_many_bytes_of_them_and_nobody_keeps_the_text_of_one_that_is_gone() {
        let mut statements = Statements::default();
        let mut held = Held::default();
        let here = Arc::new(SessionState::default());
        let large = |first: u8| vec![first; HELD_BYTES / 4];
        let all: Vec<_> = (0..4).map(|number| statements.of(&here, &large(number), Traces::NONE)).collect();
        all.iter().for_each(|statement| held.add(statement.clone()));
        held.add(all[0].clone());
        assert_eq!(held.bytes, HELD_BYTES);
        assert_eq!(held.to_evict(200, 0).map(|one| one.id), None);
        assert_eq!(held.to_evict(200, 1).map(|one| one.id), Some(all[1].id));
        held.remove(all[1].id);
        held.retain(|statement| statement.id != all[2].id);
        assert_eq!(held.bytes, HELD_BYTES / 2);
        assert_eq!(held.to_evict(200, HELD_BYTES / 2).map(|one| one.id), None);
        assert_eq!(statements.of(&here, &large(3), Traces::NONE).id, all[3].id);
        // A single one that is larger than all of them may be finds room, because nothing else is there.
        held.clear();
        assert_eq!((held.bytes, held.to_evict(200, 2 * HELD_BYTES).map(|one| one.id)), (0, None));
        let watched = Arc::downgrade(&all[3]);
        drop(all);
        assert_eq!(watched.strong_count(), 0);
    }
}
