//! The session's side: a sampled transaction is noted on its way, and nothing of it is held back.
//!
//! A sample begins with the first frame of a transaction and ends when the session is at a safe point again, so what the
//! server sends in between answers it. Bytes are copied as they pass, up to a bound; looking at them is left to the task
//! that runs the sample.
//!
//! What the session has set up is learned as a cutover learns it ([`crate::proxy::handoff`]): its own backend is asked, at
//! the safe point after a sampled transaction and when the client has sent nothing more. That is one round trip, once,
//! and again after a statement that may have changed it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::tally::Skip;
use super::{Run, Sample, Slot};
use crate::postgres::Login;
use crate::proxy::handoff::{SessionState, traces};
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

/// What is known of the session's state.
enum Known {
    /// It has to be read, or read again.
    Nothing,
    /// It can be given to another backend.
    State(Arc<SessionState>),
    /// It has what no other backend can be given.
    Unfit,
}

/// Shadow reads as one session has them, from the first sample of a run on.
pub(in crate::proxy) struct Shadowing {
    run: Arc<Run>,
    login: Arc<Login>,
    known: Known,
    /// Parse messages of named statements that have come since: name, and what follows it.
    parses: Vec<(Bytes, Bytes)>,
    /// So many of them have been answered and are there.
    settled: usize,
    taking: Option<Taking>,
    /// The state is wanted at the next safe point.
    wanted: bool,
    looked: Option<Instant>,
    has_failed: bool,
    _seat: Slot,
}

/// A sample that is being taken.
struct Taking {
    request: Vec<u8>,
    answer: Vec<u8>,
    /// The frame that ends the transaction has been sent.
    is_asked: bool,
    slot: Slot,
}

impl Shadowing {
    fn new(run: Arc<Run>, login: Arc<Login>, seat: Slot) -> Self {
        Self {
            run,
            login,
            known: Known::Nothing,
            parses: Vec::new(),
            settled: 0,
            taking: None,
            wanted: false,
            looked: None,
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
        let length = header.body_bytes as usize;
        match header.tag {
            frontend::QUERY => self.look_at(body, length),
            frontend::PARSE => {
                let mut text = body;
                let name = take_cstr(&mut text).unwrap_or_default();
                let before = body.len() - text.len();
                self.look_at(text, length - before.min(length));
                if !name.is_empty() && body.len() == length {
                    self.remember(name, text);
                }
            }
            frontend::CLOSE if body.first() == Some(&b'S') => {
                let name = take_cstr(&mut &body[1..]).unwrap_or_default();
                if let Some(at) = self.parses.iter().position(|(known, _)| known == name) {
                    self.parses.remove(at);
                    self.settled -= usize::from(at < self.settled);
                }
            }
            _ => {}
        }
        let Some(taking) = &mut self.taking else { return };
        if taking.is_asked {
            // More than one statement: what answers which is not told apart here.
            return self.skip(Skip::NotARead);
        }
        match header.tag {
            frontend::QUERY | frontend::SYNC => taking.is_asked = true,
            frontend::PARSE | frontend::BIND | frontend::DESCRIBE | frontend::EXECUTE => {}
            _ => return self.skip(Skip::NotARead),
        }
        if body.len() < length || taking.request.len() + length > REQUEST_BYTES {
            return self.skip(Skip::TooLarge);
        }
        message::raw(&mut taking.request, header.tag, body);
    }

    /// Whether a text may change what the next one means.
    fn look_at(&mut self, text: &[u8], length: usize) {
        if traces(text, length).outlive() {
            self.known = Known::Nothing;
            self.parses.clear();
            self.settled = 0;
        }
    }

    /// A Parse of a name that the session has already fails, and leaves the earlier one: the first counts until a Close.
    fn remember(&mut self, name: &[u8], tail: &[u8]) {
        let kept: usize = self.parses.iter().map(|(name, tail)| name.len() + tail.len()).sum();
        let is_new = !self.parses.iter().any(|(known, _)| known == name);
        if is_new && kept + name.len() + tail.len() <= PARSES_BYTES {
            self.parses.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(tail)));
        }
    }

    /// The server has sent these bytes.
    pub(in crate::proxy) fn on_server_bytes(&mut self, bytes: &[u8]) {
        let Some(taking) = &mut self.taking else { return };
        if taking.answer.len() + bytes.len() > ANSWER_BYTES {
            return self.skip(Skip::TooLarge);
        }
        taking.answer.extend_from_slice(bytes);
    }

    /// The server has sent an error: what it skips after it is not there.
    pub(in crate::proxy) fn on_server_error(&mut self) {
        self.has_failed = true;
    }

    /// The session is at a safe point after a transaction that took so long.
    fn end(&mut self, took: Duration) {
        if std::mem::take(&mut self.has_failed) {
            self.parses.truncate(self.settled);
            if self.taking.is_some() {
                return self.skip(Skip::Failed);
            }
        }
        self.settled = self.parses.len();
        let Some(taking) = self.taking.take() else { return };
        let state = match &self.known {
            Known::State(state) => state.clone(),
            Known::Unfit => return self.run.skipped(Skip::Session),
            Known::Nothing => {
                self.wanted = true;
                return self.run.skipped(Skip::NotKnown);
            }
        };
        let prepared = match self.prepared(&state, &taking.request) {
            Ok(prepared) => prepared,
            Err(why) => return self.run.skipped(why),
        };
        self.run.push(Sample {
            login: self.login.clone(),
            state,
            request: taking.request,
            prepared,
            answer: taking.answer,
            took,
            _slot: taking.slot,
        });
    }

    /// What a Bind of an earlier statement needs: its text and parameter types, as a Parse message has them after the name.
    fn prepared(&self, state: &SessionState, request: &[u8]) -> Result<Option<Bytes>, Skip> {
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
        let tail = state.parse_of(name).ok_or(Skip::NotKnown)?;
        if tail.len() > REQUEST_BYTES { Err(Skip::TooLarge) } else { Ok(Some(tail)) }
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
            Some(slot) => {
                let (request, answer) = (Vec::new(), Vec::new());
                shadow.taking = Some(Taking { request, answer, is_asked: false, slot });
            }
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
    pub(in crate::proxy) fn is_to_be_looked_at(&self) -> bool {
        let Some(shadow) = &self.shadow else { return false };
        shadow.wanted
            && shadow.looked.is_none_or(|at| at.elapsed() >= BETWEEN_LOOKS)
            && self.is_at_safe_point()
            && self.up.buffer.is_empty()
            && self.moving.is_none()
            && self.backend.as_ref().is_some_and(|own| own.server == ServerRole::Source)
            && !self.local.database.is_fenced()
    }

    /// Asks it. The client's next statement waits for the answer, if it comes meanwhile.
    pub(in crate::proxy) async fn look_for_shadow(&mut self) -> Result<(), End> {
        let Some(shadow) = &mut self.shadow else { return Ok(()) };
        shadow.wanted = false;
        shadow.looked = Some(Instant::now());
        let Some(names) = shadow.run.names(self.local.database.name()) else { return Ok(()) };
        // Statements in another encoding, or with escapes that are read otherwise, are not judged here.
        let reported = self.backend.as_ref().map(|own| &own.connection);
        let says = |name, expected| reported.is_some_and(|own| own.parameter(name) == Some(expected));
        let is_plain = says("client_encoding", "UTF8") && says("standard_conforming_strings", "on");
        let known = match self.capture(&names).await {
            Ok(state) if is_plain && state.blockers().is_empty() => Known::State(Arc::new(state)),
            Ok(_) | Err(Unmoved::Because(_)) => Known::Unfit,
            Err(Unmoved::OwnLost) => return Err(End::ServerLost),
        };
        if let Some(shadow) = &mut self.shadow {
            shadow.known = known;
            shadow.parses.clear();
            shadow.settled = 0;
        }
        Ok(())
    }
}
