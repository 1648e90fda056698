//! What is expected from the server, message by message, on a connection where not everything that was sent is the
//! client's. Pure.
//!
//! The ledger ([`crate::wire::ledger`]) says when a session is quiet; here it is said what each answer belongs to: to a
//! Parse of ours that the client must not see answered, or to one of the client's, whose name is valid only from then
//! on. Servers answer in order, and after an error they skip everything up to the next Sync.
//!
//! Around COPY nobody can always tell what an answer belongs to. Then [`Expected::is_confused`] says so, and the
//! connection is not given to another client.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::proxy::pool::Statement;
use crate::wire::frame::backend;

/// More than this and the rest waits for answers.
const SENT_MAX: usize = 16 * 1024;

/// A message that was sent, by what has to be known of it when it is answered.
#[derive(Debug)]
pub(super) enum Sent {
    /// The client's Parse of a named statement. `known`: the connection had it, so that a Close of nothing was sent
    /// in its place, whose answer is shown as that of a Parse.
    Parse {
        name: Box<[u8]>,
        statement: Arc<Statement>,
        known: bool,
    },
    /// The client's Parse of a name that is taken: under the name of the statement that it stands for the server has one
    /// already, and says so.
    Taken {
        name: Box<[u8]>,
        taken: u64,
        statement: Arc<Statement>,
    },
    /// The client's unnamed Parse.
    ParseUnnamed,
    /// A Parse of ours: the connection lacked the statement.
    Added(Arc<Statement>),
    /// A Parse of ours: the connection lacked the client's unnamed statement.
    AddedUnnamed,
    /// A Close of ours: room for another statement.
    Evicted(Arc<Statement>),
    /// A Close of ours of the unnamed statement, which was another client's.
    ClosedUnnamed,
    /// The client's Close of a named statement.
    Close(Box<[u8]>),
    /// Close of a portal, or of the unnamed statement.
    CloseOther,
    Bind,
    Describe,
    Execute,
    /// Execute of a DEALLOCATE of one of the client's statements: on the server another one is taken away.
    Deallocate {
        name: Box<[u8]>,
        instead: Arc<Statement>,
    },
    Sync,
    Query,
    Call,
}

/// What an answer means.
#[derive(Debug)]
pub(super) enum Meaning {
    /// Nothing but what it says.
    Plain,
    /// It answers something of ours: the client does not see it.
    Ours,
    /// The name stands for the statement from now on. `known`: shown as ParseComplete, whatever it was.
    Named { name: Box<[u8]>, statement: Arc<Statement>, known: bool },
    /// The name was not taken any more, and the server has the client's text under the name of the statement with the
    /// number `taken`.
    Overwritten { name: Box<[u8]>, taken: u64, statement: Arc<Statement> },
    /// The name stands for nothing any more.
    Closed(Box<[u8]>),
    /// An error. Everything up to the next Sync was skipped: [`Expected::skipped`].
    Failed,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Expected {
    sent: VecDeque<Sent>,
    /// How many of them change what a name stands for.
    names: usize,
    /// Bytes of the texts that become a client's own if they are answered well.
    bytes: usize,
    /// What was skipped, for who has counted on it.
    skipped: Vec<Sent>,
    /// The server skips up to a Sync that was not sent yet.
    skipping: bool,
    confused: bool,
}

impl Expected {
    /// Something is being sent.
    #[inline]
    pub(super) fn push(&mut self, sent: Sent) {
        if self.skipping {
            match sent {
                Sent::Sync => self.skipping = false,
                sent => {
                    self.skipped.push(sent);
                    return;
                }
            }
        }
        self.names += usize::from(sent.changes_names());
        self.bytes += sent.new_bytes();
        self.sent.push_back(sent);
    }

    /// Whether nothing is expected.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty() && !self.skipping
    }

    /// Whether so much is expected that nothing more should be sent. A server that waits for a Sync has sent the first
    /// answers long before: it holds back eight kilobytes of them at most.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.sent.len() >= SENT_MAX
    }

    /// Bytes of texts that are the client's from now on unless the server refuses them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the counts agree with what is expected.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_consistent(&self) -> bool {
        self.names == self.sent.iter().filter(|sent| sent.changes_names()).count()
            && self.bytes == self.sent.iter().map(Sent::new_bytes).sum::<usize>()
    }

    /// Whether some answer did not belong to what was sent.
    pub(super) fn is_confused(&self) -> bool {
        self.confused
    }

    /// Forgets everything, for another connection.
    pub(super) fn clear(&mut self) {
        self.sent.clear();
        self.skipped.clear();
        (self.names, self.bytes, self.skipping, self.confused) = (0, 0, false, false);
    }

    #[inline]
    pub(super) fn has_skipped(&self) -> bool {
        !self.skipped.is_empty()
    }

    /// What was skipped since the last call.
    pub(super) fn skipped(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.skipped)
    }

    /// Whether something under way says which unnamed statement the server will have.
    pub(super) fn decides_unnamed(&self) -> bool {
        let decides =
            |sent: &Sent| matches!(sent, Sent::ParseUnnamed | Sent::AddedUnnamed | Sent::ClosedUnnamed | Sent::Query);
        self.sent.iter().any(decides)
    }

    /// What `name` will stand for when everything sent is answered well; None: what is under way says nothing of it.
    pub(super) fn pending(&self, name: &[u8]) -> Option<Option<Arc<Statement>>> {
        if self.names == 0 {
            return None;
        }
        self.sent.iter().rev().find_map(|sent| match sent {
            Sent::Parse { name: known, statement, .. } if **known == *name => Some(Some(statement.clone())),
            Sent::Close(known) | Sent::Deallocate { name: known, .. } if **known == *name => Some(None),
            _ => None,
        })
    }

    /// The server has sent a message with this tag. Nothing of it changes while the connection reads a COPY's data.
    #[inline]
    pub(super) fn answered(&mut self, tag: u8) -> Meaning {
        use backend::*;
        match tag {
            PARSE_COMPLETE => match self.pop() {
                Some(Sent::Parse { name, statement, known: false }) => Meaning::Named { name, statement, known: false },
                Some(Sent::Added(_) | Sent::AddedUnnamed) => Meaning::Ours,
                Some(Sent::ParseUnnamed) => Meaning::Plain,
                Some(Sent::Taken { name, taken, statement }) => Meaning::Overwritten { name, taken, statement },
                other => self.confuse(other),
            },
            CLOSE_COMPLETE => match self.pop() {
                Some(Sent::Parse { name, statement, known: true }) => Meaning::Named { name, statement, known: true },
                Some(Sent::Evicted(_) | Sent::ClosedUnnamed) => Meaning::Ours,
                Some(Sent::Close(name)) => Meaning::Closed(name),
                Some(Sent::CloseOther) => Meaning::Plain,
                other => self.confuse(other),
            },
            BIND_COMPLETE => match self.pop() {
                Some(Sent::Bind) => Meaning::Plain,
                other => self.confuse(other),
            },
            NO_DATA | ROW_DESCRIPTION => self.step(|sent| matches!(sent, Sent::Describe)),
            COMMAND_COMPLETE if matches!(self.sent.front(), Some(Sent::Deallocate { .. })) => match self.pop() {
                Some(Sent::Deallocate { name, .. }) => Meaning::Closed(name),
                other => self.confuse(other),
            },
            COMMAND_COMPLETE | EMPTY_QUERY_RESPONSE | PORTAL_SUSPENDED => {
                self.step(|sent| matches!(sent, Sent::Execute))
            }
            COPY_IN_RESPONSE => {
                // Syncs behind the COPY that were sent before anybody knew of it are ignored by the server.
                while matches!(self.sent.get(1), Some(Sent::Sync)) {
                    self.sent.remove(1);
                }
                Meaning::Plain
            }
            ERROR_RESPONSE => self.failed(),
            READY_FOR_QUERY => {
                if matches!(self.sent.front(), Some(Sent::Sync | Sent::Query | Sent::Call)) {
                    self.pop();
                } else {
                    self.confused = true;
                }
                Meaning::Plain
            }
            _ => Meaning::Plain,
        }
    }

    /// An answer to a step of the extended protocol, or one of the many that a Query may get.
    fn step(&mut self, is_it: impl Fn(&Sent) -> bool) -> Meaning {
        match self.sent.front() {
            Some(Sent::Query | Sent::Call) => {}
            Some(front) if is_it(front) => drop(self.pop()),
            _ => self.confused = true,
        }
        Meaning::Plain
    }

    fn failed(&mut self) -> Meaning {
        match self.sent.front() {
            // The server's farewell, an error of the commit, or one of a Query's.
            None | Some(Sent::Sync | Sent::Query | Sent::Call) => Meaning::Plain,
            Some(_) => {
                while let Some(sent) = self.sent.front() {
                    if matches!(sent, Sent::Sync) {
                        return Meaning::Failed;
                    }
                    let sent = self.pop();
                    self.skipped.extend(sent);
                }
                self.skipping = true;
                Meaning::Failed
            }
        }
    }

    fn pop(&mut self) -> Option<Sent> {
        let sent = self.sent.pop_front();
        self.names -= usize::from(sent.as_ref().is_some_and(Sent::changes_names));
        self.bytes -= sent.as_ref().map_or(0, Sent::new_bytes);
        sent
    }

    fn confuse(&mut self, other: Option<Sent>) -> Meaning {
        self.skipped.extend(other);
        self.confused = true;
        Meaning::Plain
    }
}

impl Sent {
    fn changes_names(&self) -> bool {
        matches!(self, Self::Parse { .. } | Self::Close(_) | Self::Deallocate { .. })
    }

    fn new_bytes(&self) -> usize {
        match self {
            Self::Parse { statement, .. } | Self::Taken { statement, .. } => statement.tail.len(),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::handoff::Traces;

    fn statement(id: u64) -> Arc<Statement> {
        Arc::new(Statement {
            id,
            name: b"x".as_slice().into(),
            tail: Box::default(),
            traces: Traces::NONE,
            meaning: None,
            takes: None,
        })
    }

    fn parse(name: &[u8], id: u64) -> Sent {
        Sent::Parse { name: name.into(), statement: statement(id), known: false }
    }

    #[test]
    fn a_name_is_valid_once_its_parse_is_answered_and_ours_are_not_shown() {
        let mut expected = Expected::default();
        for sent in [Sent::Evicted(statement(9)), parse(b"a", 1), Sent::Bind, Sent::Execute, Sent::Sync] {
            expected.push(sent);
        }
        assert!(matches!(expected.pending(b"a"), Some(Some(found)) if found.id == 1));
        assert!(expected.pending(b"b").is_none());
        assert!(matches!(expected.answered(b'3'), Meaning::Ours));
        assert!(matches!(expected.answered(b'1'), Meaning::Named { statement, .. } if statement.id == 1));
        assert!(expected.pending(b"a").is_none());
        for tag in *b"2CZ" {
            assert!(matches!(expected.answered(tag), Meaning::Plain));
        }
        assert!(expected.is_empty() && !expected.is_confused());
    }

    #[test]
    fn what_is_skipped_after_an_error_leaves_nothing_behind() {
        let mut expected = Expected::default();
        for sent in [Sent::Bind, parse(b"a", 1), Sent::Sync, parse(b"b", 2)] {
            expected.push(sent);
        }
        assert!(matches!(expected.answered(b'E'), Meaning::Failed));
        assert_eq!(expected.skipped().len(), 2);
        assert!(expected.pending(b"a").is_none());
        expected.answered(b'Z');
        assert!(matches!(expected.answered(b'E'), Meaning::Failed));
        assert!(!expected.is_empty());
        // Sent while the server skips: skipped too, up to the Sync.
        expected.push(parse(b"c", 3));
        assert_eq!(expected.skipped().len(), 2);
        expected.push(Sent::Sync);
        expected.answered(b'Z');
        assert!(expected.is_empty() && !expected.is_confused());
    }

    #[test]
    fn a_simple_query_may_be_answered_at_length() {
        let mut expected = Expected::default();
        expected.push(Sent::Query);
        for tag in *b"TDCTDCIEZ" {
            expected.answered(tag);
        }
        assert!(expected.is_empty() && !expected.is_confused());
    }

    #[test]
    fn syncs_that_a_copy_ignores_are_not_waited_for() {
        let mut expected = Expected::default();
        for sent in [Sent::Execute, Sent::Sync] {
            expected.push(sent);
        }
        expected.answered(b'G');
        expected.push(Sent::Sync);
        expected.answered(b'C');
        expected.answered(b'Z');
        assert!(expected.is_empty() && !expected.is_confused());
    }

    #[test]
    fn an_answer_to_nothing_confuses() {
        let mut expected = Expected::default();
        expected.answered(b'1');
        assert!(expected.is_confused());
        expected.clear();
        assert!(!expected.is_confused());
    }
}
