//! The session's side: a sampled transaction is noted on its way, and nothing of it is held back.
//!
//! A sample begins with the first frame of a transaction and ends when the session is at a safe point again, so what the
//! server sends in between answers it. Bytes are copied as they pass, up to a bound; looking at them is left to the task
//! that runs the sample.
//!
//! What the session has set up is learned as a cutover learns it ([`crate::proxy::handoff`]): its own backend is asked, at
//! the safe point after a sampled transaction and when the client has sent nothing more. That is one round trip, once,
//! and again after a statement that may have changed it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::tally::Skip;
use super::{Run, Sample, Slot, lock};
use crate::postgres::Login;
use crate::proxy::handoff::{SessionState, is_name_byte, traces};
use crate::proxy::moves::Unmoved;
use crate::proxy::session::{End, Session};
use crate::switch::ServerRole;
use crate::wire::frame::{HEADER_BYTES, Header, frontend, take_cstr};
use crate::wire::message;

/// The largest request that is kept, in bytes.
pub(super) const REQUEST_BYTES: usize = 16 << 10;

/// The largest answer that is kept, in bytes.
pub(super) const ANSWER_BYTES: usize = 64 << 10;

/// Named statements that a session has prepared since its state was read, in bytes of their Parse messages.
const PARSES_BYTES: usize = 32 << 10;

/// A session is not asked for its state again before this has passed.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

/// What is kept of a session's state, in bytes: its settings, and the statements that still fit beside them.
const STATE_BYTES: usize = 64 << 10;

/// Names of statements that may set something, in bytes, of one session.
const SETTERS_BYTES: usize = 4 << 10;

/// What is known of the session's state.
#[derive(Default)]
enum Known {
    /// It has to be read, or read again.
    #[default]
    Nothing,
    /// It can be given to another backend.
    State {
        /// Settings and role.
        settings: Arc<SessionState>,
        /// By name: what a Parse has after it. Of the session's statements those that are not too long.
        statements: HashMap<Bytes, Bytes>,
    },
    /// It has what no other backend can be given.
    Unfit,
}

/// What a session has been seen to set up. A run has hold of it too, so that nothing of it outlasts the run in a session
/// that does nothing any more.
#[derive(Default)]
pub(super) struct Learned {
    known: Known,
    /// Parse messages of named statements that have come since: name, and what follows it.
    parses: Vec<(Bytes, Bytes)>,
    /// So many of them have been answered and are there.
    settled: usize,
    setters: Setters,
    is_over: bool,
}

/// Names of statements whose text may set something, so that each Bind of one may.
#[derive(Default)]
struct Setters {
    names: HashSet<Bytes>,
    bytes: usize,
    /// There are more than are kept: any may be one.
    overflowed: bool,
}

impl Setters {
    fn note(&mut self, name: &[u8]) {
        if self.names.contains(name) {
            return;
        }
        if self.bytes + name.len() > SETTERS_BYTES || self.names.len() >= SETTERS_BYTES / 16 {
            self.overflowed = true;
            return;
        }
        self.bytes += name.len();
        self.names.insert(Bytes::copy_from_slice(name));
    }

    fn has(&self, name: &[u8]) -> bool {
        self.overflowed || self.names.contains(name)
    }
}

/// Whether a text may change what outlasts its transaction. EXECUTE runs what was prepared, which is not looked up.
fn may_set(text: &[u8], length: usize) -> bool {
    traces(text, length).outlive() || has_word(text, b"execute") || text.windows(3).any(|at| is(at, b"u&\""))
}

fn is(text: &[u8], word: &[u8]) -> bool {
    text.eq_ignore_ascii_case(word)
}

fn has_word(text: &[u8], word: &[u8]) -> bool {
    let is_name = |at: Option<usize>| at.and_then(|at| text.get(at)).is_some_and(|byte| is_name_byte(*byte));
    let mut found = text.windows(word.len()).enumerate().filter(|(_, part)| is(part, word));
    found.any(|(at, _)| !is_name(at.checked_sub(1)) && !is_name(Some(at + word.len())))
}

impl Learned {
    /// The run is over.
    pub(super) fn forget(&mut self) {
        *self = Self { is_over: true, ..Self::default() };
    }

    /// What was known need not hold any more.
    fn distrust(&mut self) {
        self.known = Known::Nothing;
        self.parses.clear();
        self.settled = 0;
    }

    /// A frame of the client's, with as much of its body as is at hand.
    fn on_client_frame(&mut self, header: Header, body: &[u8]) {
        let length = header.body_bytes as usize;
        match header.tag {
            frontend::QUERY if may_set(body, length) => self.distrust(),
            frontend::PARSE => {
                let mut text = body;
                let name = take_cstr(&mut text).unwrap_or_default();
                let before = body.len() - text.len();
                if may_set(before_zero(text), if body.len() < length { length } else { 0 }) {
                    self.distrust();
                    self.setters.note(name);
                }
                if !name.is_empty() && body.len() == length {
                    self.remember(name, &body[before..]);
                }
            }
            frontend::BIND => {
                let mut rest = body;
                let name = take_cstr(&mut rest).and_then(|_portal| take_cstr(&mut rest));
                if name.is_none_or(|name| self.setters.has(name)) {
                    self.distrust();
                }
            }
            // A function is not looked up by its number.
            frontend::FUNCTION_CALL => self.distrust(),
            frontend::CLOSE if body.first() == Some(&b'S') => {
                let Some(name) = take_cstr(&mut &body[1..]) else { return self.distrust() };
                if let Some(at) = self.parses.iter().position(|(known, _)| known == name) {
                    self.parses.remove(at);
                    self.settled -= usize::from(at < self.settled);
                }
                // Its name may come to stand for another text.
                if let Known::State { statements, .. } = &mut self.known {
                    statements.remove(name);
                }
            }
            _ => {}
        }
    }

    /// A Parse of a name that the session has already fails, and leaves the earlier one: the first counts until a Close.
    fn remember(&mut self, name: &[u8], tail: &[u8]) {
        let kept: usize = self.parses.iter().map(|(name, tail)| name.len() + tail.len()).sum();
        let is_new = !self.parses.iter().any(|(known, _)| known == name);
        if is_new && !self.is_over && kept + name.len() + tail.len() <= PARSES_BYTES {
            self.parses.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(tail)));
        }
    }

    /// The session's state has been read. `is_fit`: another backend can be given it.
    fn learn(&mut self, state: &SessionState, is_fit: bool) {
        self.distrust();
        self.setters = Setters::default();
        if self.is_over {
            return;
        }
        for (name, text) in state.texts() {
            if text.is_none_or(|text| may_set(text, 0)) {
                self.setters.note(name);
            }
        }
        let mut kept = state.settings_bytes();
        if !is_fit || kept > STATE_BYTES {
            self.known = Known::Unfit;
            return;
        }
        let mut statements = HashMap::new();
        for (name, text) in state.texts() {
            let bytes = name.len() + text.map_or(0, <[u8]>::len);
            if kept + bytes > STATE_BYTES {
                continue;
            }
            if let Some(tail) = state.parse_of(name).filter(|tail| tail.len() <= REQUEST_BYTES) {
                kept += name.len() + tail.len();
                statements.insert(Bytes::copy_from_slice(name), tail);
            }
        }
        self.known = Known::State { settings: Arc::new(state.detached_settings()), statements };
    }

    /// What a Bind of an earlier statement needs: its text and parameter types, as a Parse message has them after the name.
    fn prepared(&self, statements: &HashMap<Bytes, Bytes>, request: &[u8]) -> Result<Option<Bytes>, Skip> {
        let Ok(Some(header)) = Header::parse(request) else { return Err(Skip::NotARead) };
        if header.tag != frontend::BIND {
            return Ok(None);
        }
        let mut body = &request[HEADER_BYTES..];
        let (Some(_portal), Some(name)) = (take_cstr(&mut body), take_cstr(&mut body)) else {
            return Err(Skip::NotARead);
        };
        if let Some((_, tail)) = self.parses.iter().find(|(known, _)| known == name) {
            return Ok(Some(tail.clone()));
        }
        statements.get(name).cloned().map(Some).ok_or(Skip::NotKnown)
    }
}

fn before_zero(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Shadow reads as one session has them, from the first sample of a run on.
pub(in crate::proxy) struct Shadowing {
    run: Arc<Run>,
    login: Arc<Login>,
    learned: Arc<Mutex<Learned>>,
    taking: Option<Taking>,
    /// The state is wanted at the next safe point.
    wanted: bool,
    looked: Option<Instant>,
    /// Leave to look now.
    turn: Option<Slot>,
    has_failed: bool,
    _seat: Slot,
}

/// A sample that is being taken.
pub(super) struct Taking {
    pub(super) request: Vec<u8>,
    pub(super) answer: Vec<u8>,
    /// The frame that ends the transaction has been sent.
    is_asked: bool,
    pub(super) slot: Slot,
}

impl Taking {
    pub(super) fn new(slot: Slot) -> Self {
        Self { request: Vec::new(), answer: Vec::new(), is_asked: false, slot }
    }

    /// A frame of the client's; `body` is as much of it as is at hand. An error: it is no sample any more.
    pub(super) fn on_client_frame(&mut self, header: Header, body: &[u8]) -> Result<(), Skip> {
        let length = header.body_bytes as usize;
        if self.is_asked {
            // More than one statement: what answers which is not told apart here.
            return Err(Skip::NotARead);
        }
        match header.tag {
            frontend::QUERY | frontend::SYNC => self.is_asked = true,
            frontend::PARSE | frontend::BIND | frontend::DESCRIBE | frontend::EXECUTE => {}
            _ => return Err(Skip::NotARead),
        }
        if body.len() < length || self.request.len() + length > REQUEST_BYTES {
            return Err(Skip::TooLarge);
        }
        message::raw(&mut self.request, header.tag, body);
        Ok(())
    }

    /// The client is sent these bytes.
    pub(super) fn on_server_bytes(&mut self, bytes: &[u8]) -> Result<(), Skip> {
        if self.answer.len() + bytes.len() > ANSWER_BYTES {
            return Err(Skip::TooLarge);
        }
        self.answer.extend_from_slice(bytes);
        Ok(())
    }
}

impl Shadowing {
    fn new(run: Arc<Run>, login: Arc<Login>, seat: Slot) -> Self {
        let learned = run.learner();
        Self {
            run,
            login,
            learned,
            taking: None,
            wanted: false,
            looked: None,
            turn: None,
            has_failed: false,
            _seat: seat,
        }
    }

    fn skip(&mut self, why: Skip) {
        self.taking = None;
        self.run.skipped(why);
    }

    /// A frame passes to the server; `body` is as much of it as is at hand.
    pub(in crate::proxy) fn on_client_frame(&mut self, header: Header, body: &[u8]) {
        lock(&self.learned).on_client_frame(header, body);
        if let Some(Err(why)) = self.taking.as_mut().map(|taking| taking.on_client_frame(header, body)) {
            self.skip(why);
        }
    }

    /// The server has sent these bytes.
    pub(in crate::proxy) fn on_server_bytes(&mut self, bytes: &[u8]) {
        if let Some(Err(why)) = self.taking.as_mut().map(|taking| taking.on_server_bytes(bytes)) {
            self.skip(why);
        }
    }

    /// The server has sent an error: what it skips after it is not there.
    pub(in crate::proxy) fn on_server_error(&mut self) {
        self.has_failed = true;
    }

    /// The session is at a safe point after a transaction that took so long.
    fn end(&mut self, took: Duration) {
        let mut learned = lock(&self.learned);
        let learned = &mut *learned;
        let has_failed = std::mem::take(&mut self.has_failed);
        if has_failed {
            learned.parses.truncate(learned.settled);
        }
        learned.settled = learned.parses.len();
        let Some(taking) = self.taking.take() else { return };
        if has_failed {
            return self.run.skipped(Skip::Failed);
        }
        let (settings, statements) = match &learned.known {
            Known::State { settings, statements } => (settings.clone(), statements),
            Known::Unfit => return self.run.skipped(Skip::Session),
            Known::Nothing => {
                self.wanted = true;
                return self.run.skipped(Skip::NotKnown);
            }
        };
        let prepared = match learned.prepared(statements, &taking.request) {
            Ok(prepared) => prepared,
            Err(why) => return self.run.skipped(why),
        };
        self.run.push(Sample {
            login: self.login.clone(),
            state: settings,
            request: taking.request,
            prepared,
            answer: taking.answer,
            took,
            _slot: taking.slot,
        });
    }
}

impl Session {
    /// A transaction begins while shadow reads are on: it may be a sample.
    #[cold]
    pub(in crate::proxy) fn begin_sample(&mut self) {
        let Some(run) = self.worker.shared.sessions.shadow.current() else {
            self.shadow = None;
            return;
        };
        if self.backend.as_ref().is_none_or(|own| own.server != ServerRole::Source) || !run.is_chosen() {
            return;
        }
        if !run.covers(self.local.database.name()) {
            return;
        }
        run.sampled();
        if self.shadow.as_ref().is_none_or(|shadow| !Arc::ptr_eq(&shadow.run, &run)) {
            self.shadow = None;
            let Some(seat) = run.seat() else { return run.skipped(Skip::Busy) };
            self.shadow = Some(Box::new(Shadowing::new(run.clone(), run.login(&self.login), seat)));
        }
        let Some(shadow) = &mut self.shadow else { return };
        match run.slot() {
            Some(slot) => shadow.taking = Some(Taking::new(slot)),
            None => run.skipped(Skip::Busy),
        }
    }

    /// The transaction that may have been a sample is over.
    #[cold]
    pub(in crate::proxy) fn end_sample(&mut self, took: Duration) {
        let Some(shadow) = &mut self.shadow else { return };
        shadow.end(took);
        if shadow.run.is_over() {
            self.shadow = None;
        }
    }

    /// Whether the session's own backend is to be asked now what the session has set up.
    #[cold]
    pub(in crate::proxy) fn is_to_be_looked_at(&mut self) -> bool {
        let Some(shadow) = &self.shadow else { return false };
        let is_due = shadow.wanted
            && !shadow.run.is_over()
            && shadow.looked.is_none_or(|at| at.elapsed() >= BETWEEN_LOOKS)
            && self.is_at_safe_point()
            && self.up.buffer.is_empty()
            && self.down.buffer.is_empty()
            && self.moving.is_none()
            && self.backend.as_ref().is_some_and(|own| own.server == ServerRole::Source)
            && !self.local.database.is_fenced();
        let Some(shadow) = self.shadow.as_mut().filter(|_| is_due) else { return false };
        // Those that get no leave are due again the next time that their session stands here.
        shadow.turn = shadow.run.look();
        shadow.turn.is_some()
    }

    /// Asks it. The client's next statement waits for the answer, if it comes meanwhile.
    pub(in crate::proxy) async fn look_for_shadow(&mut self) -> Result<(), End> {
        let Some(shadow) = &mut self.shadow else { return Ok(()) };
        shadow.wanted = false;
        shadow.looked = Some(Instant::now());
        // Given up here, however this ends.
        let _turn = shadow.turn.take();
        let Some(names) = shadow.run.names(self.local.database.name()) else { return Ok(()) };
        // Statements in another encoding, or with escapes that are read otherwise, are not judged here.
        let reported = self.backend.as_ref().map(|own| &own.connection);
        let says = |name, expected| reported.is_some_and(|own| own.parameter(name) == Some(expected));
        let is_plain = says("client_encoding", "UTF8") && says("standard_conforming_strings", "on");
        let state = match self.capture(&names).await {
            Ok(state) => Some(state),
            Err(Unmoved::Because(_)) => None,
            Err(Unmoved::OwnLost) => return Err(End::ServerLost),
        };
        let Some(shadow) = &mut self.shadow else { return Ok(()) };
        let mut learned = lock(&shadow.learned);
        match state {
            Some(state) => learned.learn(&state, is_plain && state.blockers().is_empty()),
            None => {
                learned.distrust();
                learned.known = Known::Unfit;
            }
        }
        Ok(())
    }
}
