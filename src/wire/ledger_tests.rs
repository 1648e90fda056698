//! The ledger against a model of the server: whatever is pipelined and however late the answers come, a quiet ledger
//! means a server with nothing left to execute.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// What a client may send, and what the server will make of it.
#[derive(Clone, Copy, Debug)]
enum Sent {
    Step { fails: bool },
    CopyStep { fails_at_once: bool },
    Query { fails: bool },
    CopyQuery { fails_at_once: bool },
    Call,
    Sync,
    Flush,
    Data { fails: bool },
    Done,
    Fail,
}

impl Sent {
    fn tag(self) -> u8 {
        match self {
            Self::Step { .. } | Self::CopyStep { .. } => frontend::EXECUTE,
            Self::Query { .. } | Self::CopyQuery { .. } => frontend::QUERY,
            Self::Call => frontend::FUNCTION_CALL,
            Self::Sync => frontend::SYNC,
            Self::Flush => frontend::FLUSH,
            Self::Data { .. } => frontend::COPY_DATA,
            Self::Done => frontend::COPY_DONE,
            Self::Fail => frontend::COPY_FAIL,
        }
    }

    fn is_copy(self) -> bool {
        matches!(self, Self::CopyStep { .. } | Self::CopyQuery { .. })
    }

    /// Frames that change nothing when a server outside a transaction reads them.
    fn is_harmless(self) -> bool {
        matches!(self, Self::Sync | Self::Flush | Self::Data { .. } | Self::Done | Self::Fail)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Copying {
    No,
    Simple,
    Extended,
}

/// `PostgresMain` and `CopyGetData`, as far as the order of answers goes.
struct Server {
    inbox: VecDeque<Sent>,
    outbox: VecDeque<u8>,
    copying: Copying,
    skipping: bool,
    open: bool,
}

impl Server {
    fn say(&mut self, tags: &[u8]) {
        self.outbox.extend(tags);
    }

    fn step(&mut self) {
        let Some(frame) = self.inbox.pop_front() else { return };
        if self.copying != Copying::No {
            return self.copy_step(frame);
        }
        if self.skipping && !matches!(frame, Sent::Sync) {
            return;
        }
        match frame {
            Sent::Step { fails: false } => {
                self.open = true;
                self.say(b"C");
            }
            Sent::Step { fails: true } => self.extended_error(),
            Sent::CopyStep { fails_at_once } => {
                self.open = true;
                self.say(b"G");
                self.copying = Copying::Extended;
                if fails_at_once {
                    self.copy_error();
                }
            }
            Sent::Query { fails } => {
                self.say(if fails { b"EZ" } else { b"CZ" });
                self.open = false;
            }
            Sent::CopyQuery { fails_at_once } => {
                self.say(b"G");
                self.copying = Copying::Simple;
                if fails_at_once {
                    self.copy_error();
                }
            }
            Sent::Call => {
                self.say(b"VZ");
                self.open = false;
            }
            Sent::Sync => {
                self.skipping = false;
                self.open = false;
                self.say(b"Z");
            }
            Sent::Flush | Sent::Data { .. } | Sent::Done | Sent::Fail => {}
        }
    }

    fn copy_step(&mut self, frame: Sent) {
        match frame {
            Sent::Sync | Sent::Flush | Sent::Data { fails: false } => {}
            Sent::Done => {
                let simple = self.copying == Copying::Simple;
                self.copying = Copying::No;
                self.open &= !simple;
                self.say(if simple { b"CZ" } else { b"C" });
            }
            _ => self.copy_error(),
        }
    }

    fn copy_error(&mut self) {
        if self.copying == Copying::Simple {
            self.say(b"EZ");
            self.open = false;
        } else {
            self.extended_error();
        }
        self.copying = Copying::No;
    }

    fn extended_error(&mut self) {
        self.say(b"E");
        self.skipping = true;
        self.open = false;
    }

    /// Whether something that was sent could still execute.
    fn is_at_rest(&self) -> bool {
        let harmless = self.inbox.iter().all(|frame| frame.is_harmless());
        harmless && !self.open && self.copying == Copying::No
    }
}

fn sent() -> impl Strategy<Value = Sent> {
    prop_oneof![
        4 => prop::bool::weighted(0.2).prop_map(|fails| Sent::Step { fails }),
        2 => prop::bool::weighted(0.3).prop_map(|fails_at_once| Sent::CopyStep { fails_at_once }),
        2 => prop::bool::weighted(0.2).prop_map(|fails| Sent::Query { fails }),
        2 => prop::bool::weighted(0.3).prop_map(|fails_at_once| Sent::CopyQuery { fails_at_once }),
        1 => Just(Sent::Call),
        5 => Just(Sent::Sync),
        1 => Just(Sent::Flush),
        3 => prop::bool::weighted(0.2).prop_map(|fails| Sent::Data { fails }),
        2 => Just(Sent::Done),
        1 => Just(Sent::Fail),
    ]
}

/// One turn: the client forwards, the server works, or an answer arrives.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Forward(Sent),
    Work,
    Deliver,
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![3 => sent().prop_map(Turn::Forward), 3 => Just(Turn::Work), 4 => Just(Turn::Deliver)]
}

fn deliver(ledger: &mut Ledger, server: &mut Server) {
    match server.outbox.pop_front() {
        Some(backend::READY_FOR_QUERY) => ledger.ready(TransactionStatus::Idle),
        Some(tag) => ledger.answered(tag),
        None => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn quiet_means_that_the_server_has_nothing_left_to_execute(turns in prop::collection::vec(turn(), 1..60)) {
        let mut ledger = Ledger::new();
        let mut server = Server {
            inbox: VecDeque::new(), outbox: VecDeque::new(), copying: Copying::No, skipping: false, open: false,
        };
        for &turn in &turns {
            match turn {
                Turn::Forward(frame) => {
                    ledger.forwarded(frame.tag());
                    server.inbox.push_back(frame);
                }
                Turn::Work => server.step(),
                Turn::Deliver => deliver(&mut ledger, &mut server),
            }
            prop_assert!(!ledger.is_quiet() || server.is_at_rest(), "quiet too early");
        }
        // Whatever happened, a client that ends its copy and syncs gets back to a quiet session.
        for frame in [Sent::Fail, Sent::Sync, Sent::Sync] {
            ledger.forwarded(frame.tag());
            server.inbox.push_back(frame);
            while !server.inbox.is_empty() || !server.outbox.is_empty() {
                server.step();
                deliver(&mut ledger, &mut server);
                prop_assert!(!ledger.is_quiet() || server.is_at_rest(), "quiet too early");
            }
        }
        let well_behaved = !turns.iter().any(|turn| matches!(turn, Turn::Forward(frame) if frame.is_copy()));
        prop_assert!(ledger.is_quiet() || (ledger.lost && !well_behaved), "never quiet again: {ledger:?}");
    }
}

#[test]
fn libpq_sends_a_sync_behind_the_copy_and_one_at_its_end() {
    let mut ledger = Ledger::new();
    for tag in *b"PBDES" {
        ledger.forwarded(tag);
    }
    for tag in *b"12nG" {
        ledger.answered(tag);
    }
    assert!(!ledger.awaits_ready(), "the first Sync is swallowed");
    assert!(!ledger.is_quiet());
    for tag in *b"ddcS" {
        ledger.forwarded(tag);
    }
    ledger.answered(b'C');
    assert!(!ledger.is_quiet());
    ledger.ready(TransactionStatus::Idle);
    assert!(ledger.is_quiet() && !ledger.is_uncertain());
}

#[test]
fn a_copy_that_fails_leaves_its_sync_uncertain_and_the_session_usable() {
    for answered in [false, true] {
        let mut ledger = Ledger::new();
        ledger.forwarded(b'E');
        ledger.forwarded(b'S');
        ledger.answered(b'G');
        ledger.forwarded(b'd');
        ledger.answered(b'E');
        ledger.forwarded(b'c');
        ledger.forwarded(b'S');
        ledger.ready(TransactionStatus::Idle);
        assert!(ledger.is_quiet() && ledger.is_uncertain());
        if answered {
            ledger.ready(TransactionStatus::Idle);
            assert!(!ledger.is_uncertain());
        }
        ledger.forwarded(b'Q');
        ledger.answered(b'C');
        ledger.ready(TransactionStatus::Idle);
        assert!(ledger.is_quiet() && !ledger.is_uncertain());
    }
}

#[test]
fn frames_without_a_sync_keep_the_session_inside() {
    let mut ledger = Ledger::new();
    for tag in *b"PBEH" {
        ledger.forwarded(tag);
    }
    for tag in *b"12C" {
        ledger.answered(tag);
    }
    assert!(!ledger.is_quiet() && ledger.server_waits());
    ledger.forwarded(b'S');
    ledger.ready(TransactionStatus::InBlock);
    assert!(!ledger.is_quiet(), "in a transaction block");
}

#[test]
fn a_query_behind_a_failed_step_is_discarded_by_the_server() {
    let mut ledger = Ledger::new();
    for tag in *b"PQ" {
        ledger.forwarded(tag);
    }
    ledger.answered(b'E');
    assert!(!ledger.awaits_ready() && !ledger.is_quiet());
    ledger.forwarded(b'Q');
    ledger.forwarded(b'S');
    ledger.ready(TransactionStatus::Idle);
    assert!(ledger.is_quiet());
}

#[test]
fn after_an_unasked_ready_nothing_is_certain() {
    let mut ledger = Ledger::new();
    ledger.ready(TransactionStatus::Idle);
    assert!(!ledger.is_quiet());
}
