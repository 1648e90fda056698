//! Sending a client's frame on: under our names, with what its connection lacks put in front.

use std::sync::Arc;

use super::expected::Sent;
use super::passing::Passage;
use super::{PooledSession, StashState, Step};
use crate::proxy::client_error::ClientError;
use crate::proxy::handoff::{Deallocated, SessionState, Traces, call_traces, deallocated, traces};
use crate::proxy::pool::{STATEMENT_PREFIX, Statement, Taken};
use crate::proxy::session::End;
use crate::wire::frame::{FrameError, HEADER_BYTES, Header, frontend, take_cstr};
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;

/// The largest Parse that is held as a whole. A longer unnamed one streams through, and can be bound only on the
/// connection that it went to; a longer named one is refused.
const PARSE_MAX: usize = 4 << 20;

/// The largest batch that can be sent again.
const STASH_MAX: usize = 8 * 1024;

/// So many portals at once are known to take statements away.
const TAKERS_MAX: usize = 64;

/// A name that no statement has: to close it does nothing, to bind it fails.
const NOBODY: &[u8] = b"pgcutover_none";

impl PooledSession {
    /// Whether as much of the frame is there as must be looked at before it passes.
    pub(super) fn is_at_hand(&mut self, header: Header) -> Result<bool, Step> {
        let whole = HEADER_BYTES + header.body_bytes as usize;
        let buffer = &self.up.buffer;
        if buffer.len() >= whole {
            if header.tag == frontend::PARSE && !self.body(header).contains(&0) {
                // A name without an end, which could not be replaced by ours.
                return self.refuse_frame(FrameError::Length).map(|()| false);
            }
            return Ok(true);
        }
        match header.tag {
            frontend::PARSE if buffer.is_full() && whole <= PARSE_MAX => {
                self.up.buffer.grow(whole);
                Ok(false)
            }
            frontend::PARSE if buffer.is_full() && buffer.filled().get(HEADER_BYTES) != Some(&0) => {
                Err(Step::End(End::Told(ClientError::StatementTooLarge)))
            }
            frontend::QUERY | frontend::PARSE => Ok(buffer.is_full()),
            frontend::BIND => {
                let zeros = buffer.filled()[HEADER_BYTES..].iter().filter(|byte| **byte == 0).take(2).count();
                if zeros < 2 && buffer.is_full() {
                    return self.refuse_frame(FrameError::Length).map(|()| false);
                }
                // Where values are looked at, as many as fit into a block.
                Ok(zeros == 2 && (!self.tracked.reads_binds() || buffer.is_full()))
            }
            frontend::EXECUTE if self.takers.is_empty() => Ok(true),
            frontend::DESCRIBE | frontend::CLOSE | frontend::EXECUTE if buffer.is_full() => {
                self.refuse_frame(FrameError::Length).map(|()| false)
            }
            frontend::DESCRIBE | frontend::CLOSE | frontend::EXECUTE => Ok(false),
            // Its function's number.
            frontend::FUNCTION_CALL => Ok(buffer.len() >= HEADER_BYTES + 4),
            _ => Ok(true),
        }
    }

    /// What is at hand of the frame's body.
    pub(super) fn body(&self, header: Header) -> &[u8] {
        let frame = self.up.buffer.filled();
        &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + header.body_bytes as usize)]
    }

    /// Sends a frame on. The session is inside and has a connection.
    pub(super) fn forward(&mut self, header: Header) -> Result<Passage, Step> {
        if header.tag == frontend::QUERY && self.is_deallocated_here(header) {
            let is_cut = self.down.looked_at < self.down.buffer.len() || self.down.body_left > 0;
            if !self.expected.is_empty() || is_cut {
                return Ok(Passage::Blocked);
            }
            self.deallocate_here(header, self.ledger.status());
            self.up.discard_left = HEADER_BYTES + header.body_bytes as usize;
            return Ok(Passage::Done);
        }
        if self.hangs_on_an_answer(header.tag) {
            return Ok(Passage::Blocked);
        }
        if self.sampling.is_some() {
            self.sample_frame(header);
        }
        match header.tag {
            frontend::QUERY => self.forward_query(header),
            frontend::PARSE if self.has_too_many_for(header) => {
                return Err(Step::End(End::Told(ClientError::TooManyStatements)));
            }
            frontend::PARSE => self.forward_parse(header),
            frontend::BIND => self.forward_bind(header),
            frontend::DESCRIBE => self.forward_describe(header),
            frontend::CLOSE => self.forward_close(header),
            frontend::EXECUTE => self.forward_execute(header),
            frontend::FUNCTION_CALL => self.forward_call(header),
            // Ignored by a server that reads a COPY.
            frontend::SYNC if !self.ledger.is_copying_in() => self.copy_frame(header, Sent::Sync),
            _ => {
                self.stash_frame(header);
                self.ledger.forwarded(header.tag);
                self.pass_whole(header);
            }
        }
        self.undo_skipped();
        Ok(Passage::Done)
    }

    /// Whether what is under way decides what the frame means: which statements there are, where a text may take them
    /// away (DISCARD ALL), and whether the transaction that has failed goes on. All of it was sent, so an answer comes.
    fn hangs_on_an_answer(&self, tag: u8) -> bool {
        let names_a_statement = matches!(tag, frontend::PARSE | frontend::BIND | frontend::DESCRIBE | frontend::CLOSE);
        names_a_statement
            && self.ledger.awaits_ready()
            && !self.ledger.server_waits()
            && (self.traces.outlive() || self.ledger.status() == TransactionStatus::Failed)
    }

    /// Notes a frame that goes to the server, and what answers it.
    fn note(&mut self, tag: u8, sent: Sent) {
        self.ledger.forwarded(tag);
        self.expected.push(sent);
    }

    fn copy_frame(&mut self, header: Header, sent: Sent) {
        self.stash_frame(header);
        self.note(header.tag, sent);
        self.pass_whole(header);
    }

    /// Moves a frame as it is, as far as it is at hand.
    fn pass_whole(&mut self, header: Header) {
        let whole = HEADER_BYTES + header.body_bytes as usize;
        let at_hand = whole.min(self.up.buffer.len());
        self.up.out.append(&self.up.buffer.filled()[..at_hand]);
        self.up.buffer.consume(at_hand);
        self.up.body_left = whole - at_hand;
    }

    /// Moves a frame of which the first `used` bytes of its body were replaced by `head`.
    fn pass_rewritten(&mut self, header: Header, used: usize, head: &[&[u8]]) {
        let body = head.iter().map(|part| part.len()).sum::<usize>() + header.body_bytes as usize - used;
        self.start_frame(header.tag, body);
        head.iter().for_each(|part| self.up.out.append(part));
        self.up.buffer.consume(HEADER_BYTES + used);
        let rest = header.body_bytes as usize - used;
        let at_hand = rest.min(self.up.buffer.len());
        self.up.out.append(&self.up.buffer.filled()[..at_hand]);
        self.up.buffer.consume(at_hand);
        self.up.body_left = rest - at_hand;
    }

    fn start_frame(&mut self, tag: u8, body: usize) {
        let length = u32::try_from(body + 4).unwrap_or(u32::MAX).to_be_bytes();
        self.up.out.append(&[tag, length[0], length[1], length[2], length[3]]);
    }

    /// A frame of ours.
    fn send_own(&mut self, tag: u8, parts: &[&[u8]], sent: Sent) {
        self.start_frame(tag, parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| self.up.out.append(part));
        self.note(tag, sent);
    }

    /// Keeps a copy of the frame while the transaction may turn out to be one batch that has to be sent again.
    fn stash_frame(&mut self, header: Header) {
        let whole = HEADER_BYTES + header.body_bytes as usize;
        let is_extended = !matches!(
            header.tag,
            frontend::QUERY | frontend::FUNCTION_CALL | frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL
        );
        let fits = self.up.buffer.len() >= whole && self.stash.frames.len() + whole <= STASH_MAX;
        if self.stash.state != StashState::Open || !is_extended || !fits {
            self.stash.state = StashState::Useless;
            return;
        }
        self.stash.frames.extend_from_slice(&self.up.buffer.filled()[..whole]);
        if header.tag == frontend::SYNC {
            self.stash.state = StashState::Whole;
        }
    }

    fn forward_query(&mut self, header: Header) {
        self.stash.state = StashState::Useless;
        let body = self.body(header);
        let found = traces(body, header.body_bytes as usize);
        if found.outlive() {
            // Not `self.body`: two parts of the session are used at once.
            let frame = self.up.buffer.filled();
            let body = &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + header.body_bytes as usize)];
            self.tracked.on_client_frame(header.tag, body, header.body_bytes as usize);
        }
        self.traces |= found;
        // "a simple Query message also destroys the unnamed statement" (protocol-flow, "Extended Query").
        self.unnamed.token = 0;
        if let Some(link) = &mut self.link {
            link.unnamed = 0;
        }
        self.note(frontend::QUERY, Sent::Query);
        self.pass_whole(header);
    }

    fn forward_call(&mut self, header: Header) {
        let found = call_traces(self.body(header));
        if found.outlive() {
            let frame = self.up.buffer.filled();
            let body = &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + header.body_bytes as usize)];
            self.tracked.on_client_frame(header.tag, body, header.body_bytes as usize);
        }
        self.traces |= found;
        self.copy_frame(header, Sent::Call);
    }

    /// Whether a Parse gives the client one named statement more than it may have, or more bytes of them. None of the
    /// others can be given up for it: the client counts on each, and their texts are kept nowhere else.
    fn has_too_many_for(&self, header: Header) -> bool {
        let settings = self.pool.central.settings();
        let (most, most_bytes) = (settings.max_client_statements, settings.max_client_statement_bytes);
        let bytes = (self.names.bytes() + self.expected.bytes()) as u64 + u64::from(header.body_bytes);
        let (is_many, is_much) = (most > 0 && self.names.len() >= most, most_bytes > 0 && bytes > most_bytes);
        if !is_many && !is_much {
            return false;
        }
        let name = self.body(header).split(|byte| *byte == 0).next().unwrap_or_default();
        !name.is_empty() && (is_much || self.names.get(name).is_none())
    }

    fn forward_parse(&mut self, header: Header) {
        self.stash_frame(header);
        let body_bytes = header.body_bytes as usize;
        let body = self.body(header);
        let name_end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
        let tail = body.get(name_end + 1..).unwrap_or_default();
        let text = &tail[..tail.iter().position(|byte| *byte == 0).unwrap_or(tail.len())];
        let seen_whole = body.len() == body_bytes;
        let found = if seen_whole { traces(text, text.len()) } else { Traces::SESSION };
        let taken_away = if found.outlive() && seen_whole { deallocated(text) } else { None };
        if found.outlive() {
            let frame = self.up.buffer.filled();
            let body = &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + body_bytes)];
            self.tracked.on_client_frame(header.tag, body, body_bytes);
        }
        let deallocate = match taken_away {
            Some(Deallocated::Name(name)) if self.statement_of(&name).is_some() => {
                Some(self.pool.central.deallocate(&name))
            }
            Some(_) | None => None,
        };
        if name_end == 0 {
            return match deallocate {
                Some(deallocate) => self.forward_deallocate(header, &deallocate),
                None => self.forward_unnamed(header, found, seen_whole),
            };
        }
        let name: Box<[u8]> = self.body(header)[..name_end].into();
        if let Some(statement) = self.statement_of(&name) {
            // The name is taken: the server says so when it is asked for ours once more. Unless a function has taken all
            // statements away, or what stands before it in this batch does.
            let own = self.pool.central.own_statement(&self.body(header)[name_end + 1..], found);
            let statement = self.ensure(statement);
            self.note(frontend::PARSE, Sent::Taken { name, taken: statement.id, statement: own });
            return self.pass_rewritten(header, name_end + 1, &[&statement.name, b"\0"]);
        }
        if let Some(statement) = deallocate {
            self.give_room(&statement);
            self.up.buffer.consume(HEADER_BYTES + body_bytes);
            let parts: [&[u8]; 3] = [&statement.name, b"\0", &statement.tail];
            return self.send_own(
                frontend::PARSE,
                &parts,
                Sent::Parse { name, statement: statement.clone(), known: false },
            );
        }
        let statement = self.statement_now(&self.body(header)[name_end + 1..], found);
        let known = self.link.as_mut().is_some_and(|link| link.held.touch(statement.id));
        if known && self.ledger.status() == TransactionStatus::Failed {
            // The server decides: it refuses most of them in a failed transaction, where it would not refuse a Close, and
            // takes what ends the transaction. Under a name of its own, because it has that of the statement.
            let own = self.pool.central.own_statement(&self.body(header)[name_end + 1..], found);
            self.give_room(&own);
            self.note(frontend::PARSE, Sent::Parse { name, statement: own.clone(), known: false });
            return self.pass_rewritten(header, name_end + 1, &[&own.name, b"\0"]);
        }
        if known {
            self.up.buffer.consume(HEADER_BYTES + body_bytes);
            let sent = Sent::Parse { name, statement, known };
            return self.send_own(frontend::CLOSE, &[b"S", NOBODY, b"\0"], sent);
        }
        self.give_room(&statement);
        self.note(frontend::PARSE, Sent::Parse { name, statement: statement.clone(), known });
        self.pass_rewritten(header, name_end + 1, &[&statement.name, b"\0"]);
    }

    fn forward_unnamed(&mut self, header: Header, found: Traces, seen_whole: bool) {
        self.next_token = self.next_token.wrapping_add(1).max(1);
        self.unnamed.token = self.entry.id() << 32 | u64::from(self.next_token);
        self.unnamed.traces = found;
        self.unnamed.takes = None;
        let body_bytes = header.body_bytes as usize;
        self.unnamed.make_room(body_bytes);
        if seen_whole {
            let frame = &self.up.buffer.filled()[HEADER_BYTES..];
            self.unnamed.body.extend_from_slice(&frame[..body_bytes]);
        }
        if let Some(link) = &mut self.link {
            link.unnamed = self.unnamed.token;
        }
        self.note(frontend::PARSE, Sent::ParseUnnamed);
        self.pass_whole(header);
    }

    /// An unnamed DEALLOCATE of a statement that has another name on the server.
    fn forward_deallocate(&mut self, header: Header, statement: &Statement) {
        self.up.buffer.consume(HEADER_BYTES + header.body_bytes as usize);
        self.next_token = self.next_token.wrapping_add(1).max(1);
        self.unnamed.token = self.entry.id() << 32 | u64::from(self.next_token);
        self.unnamed.traces = statement.traces;
        self.unnamed.takes.clone_from(&statement.takes);
        self.unnamed.make_room(1 + statement.tail.len());
        self.unnamed.body.push(0);
        self.unnamed.body.extend_from_slice(&statement.tail);
        if let Some(link) = &mut self.link {
            link.unnamed = self.unnamed.token;
        }
        self.send_own(frontend::PARSE, &[b"\0", &statement.tail], Sent::ParseUnnamed);
    }

    /// Notes whether executing the portal that a Bind makes takes a statement of the client's away.
    fn note_portal(&mut self, header: Header, takes: Option<&Taken>) {
        if takes.is_none() && self.takers.is_empty() {
            return;
        }
        let portal: Box<[u8]> = take_cstr(&mut self.body(header)).unwrap_or_default().into();
        self.takers.retain(|(known, _)| *known != portal);
        let Some(taken) = takes.cloned() else { return };
        self.ensure(taken.instead.clone());
        if self.takers.len() == TAKERS_MAX {
            self.takers.remove(0);
        }
        self.takers.push((portal, taken));
    }

    fn forward_execute(&mut self, header: Header) {
        let portal = take_cstr(&mut self.body(header)).unwrap_or_default();
        let Some(at) = self.takers.iter().position(|(known, _)| **known == *portal) else {
            return self.copy_frame(header, Sent::Execute);
        };
        let (_, Taken { name, instead }) = self.takers.swap_remove(at);
        if let Some(link) = &mut self.link {
            link.held.remove(instead.id);
        }
        self.copy_frame(header, Sent::Deallocate { name, instead });
    }

    fn forward_bind(&mut self, header: Header) {
        self.stash_frame(header);
        if self.tracked.reads_binds() {
            let frame = self.up.buffer.filled();
            let body = &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + header.body_bytes as usize)];
            self.tracked.on_client_frame(header.tag, body, header.body_bytes as usize);
        }
        let mut rest = self.body(header);
        let portal_bytes = take_cstr(&mut rest).map_or(0, |portal| portal.len() + 1);
        let name = take_cstr(&mut rest).unwrap_or_default();
        if name.is_empty() {
            self.ensure_unnamed();
            let takes = self.unnamed.takes.clone().filter(|_| self.unnamed.token != 0);
            self.note_portal(header, takes.as_ref());
            self.traces |= self.unnamed.traces;
            self.note(frontend::BIND, Sent::Bind);
            return self.pass_whole(header);
        }
        let name_bytes = name.len() + 1;
        let statement = self.statement_of(name);
        let is_ours = name.starts_with(STATEMENT_PREFIX);
        match statement {
            Some(statement) => {
                let statement = self.ensure(statement);
                self.note_portal(header, statement.takes.as_ref());
                self.traces |= statement.traces;
                self.note(frontend::BIND, Sent::Bind);
                self.pass_bind(header, portal_bytes, name_bytes, &statement.name);
            }
            None if is_ours => {
                self.note(frontend::BIND, Sent::Bind);
                self.pass_bind(header, portal_bytes, name_bytes, NOBODY);
            }
            None => {
                self.note(frontend::BIND, Sent::Bind);
                self.pass_whole(header);
            }
        }
    }

    fn pass_bind(&mut self, header: Header, portal_bytes: usize, name_bytes: usize, name: &[u8]) {
        let body = header.body_bytes as usize - name_bytes + name.len() + 1;
        self.start_frame(frontend::BIND, body);
        let portal = HEADER_BYTES..HEADER_BYTES + portal_bytes;
        self.up.out.append(&self.up.buffer.filled()[portal]);
        self.up.out.append(name);
        self.up.out.append(b"\0");
        let used = portal_bytes + name_bytes;
        self.up.buffer.consume(HEADER_BYTES + used);
        let rest = header.body_bytes as usize - used;
        let at_hand = rest.min(self.up.buffer.len());
        self.up.out.append(&self.up.buffer.filled()[..at_hand]);
        self.up.buffer.consume(at_hand);
        self.up.body_left = rest - at_hand;
    }

    fn forward_describe(&mut self, header: Header) {
        self.stash_frame(header);
        match self.named(header) {
            Some([]) => self.ensure_unnamed(),
            Some(name) => {
                let is_ours = name.starts_with(STATEMENT_PREFIX);
                let used = header.body_bytes as usize;
                if let Some(statement) = self.statement_of(name) {
                    let statement = self.ensure(statement);
                    self.note(frontend::DESCRIBE, Sent::Describe);
                    return self.pass_rewritten(header, used, &[b"S", &statement.name, b"\0"]);
                }
                if is_ours {
                    self.note(frontend::DESCRIBE, Sent::Describe);
                    return self.pass_rewritten(header, used, &[b"S", NOBODY, b"\0"]);
                }
            }
            None => {}
        }
        self.note(frontend::DESCRIBE, Sent::Describe);
        self.pass_whole(header);
    }

    /// The server does not know the name, or knows it from a PREPARE: it may close it.
    fn forward_close(&mut self, header: Header) {
        self.stash_frame(header);
        let used = header.body_bytes as usize;
        let sent = match self.named(header) {
            Some([]) => {
                self.unnamed.token = 0;
                if let Some(link) = &mut self.link {
                    link.unnamed = 0;
                }
                Sent::CloseOther
            }
            Some(name) if name.starts_with(STATEMENT_PREFIX) => {
                let name = name.into();
                self.note(frontend::CLOSE, Sent::Close(name));
                return self.pass_rewritten(header, used, &[b"S", NOBODY, b"\0"]);
            }
            Some(name) => Sent::Close(name.into()),
            None => Sent::CloseOther,
        };
        self.note(frontend::CLOSE, sent);
        self.pass_whole(header);
    }

    /// The statement that a Describe or Close names; None: a portal.
    fn named(&self, header: Header) -> Option<&[u8]> {
        let mut rest = self.body(header).strip_prefix(b"S")?;
        take_cstr(&mut rest)
    }

    /// What a name of the client's stands for.
    pub(super) fn statement_of(&self, name: &[u8]) -> Option<Arc<Statement>> {
        match self.expected.pending(name) {
            Some(pending) => pending,
            None => self.names.get(name).cloned(),
        }
    }

    /// The statement that a text is which is sent now.
    fn statement_now(&self, tail: &[u8], traces: Traces) -> Arc<Statement> {
        let central = &self.pool.central;
        if self.traces.change_meaning() {
            central.own_statement(tail, traces)
        } else {
            central.statement(&self.profile, tail, traces)
        }
    }

    /// Whether a statement that is shared under these settings is what its text means now.
    fn is_meant_now(&self, meaning: &Arc<SessionState>) -> bool {
        !self.traces.change_meaning() && Arc::ptr_eq(meaning, &self.profile.meaning)
    }

    /// Sees to it that the connection has a statement, and says which: where it cannot be prepared as it was meant,
    /// another one stands in for it, so that nobody who shares it is given what other settings make of its text.
    fn ensure(&mut self, statement: Arc<Statement>) -> Arc<Statement> {
        let Some(link) = &mut self.link else { return statement };
        if link.held.touch(statement.id) {
            return statement;
        }
        let is_as_meant = statement.meaning.as_ref().is_none_or(|meaning| self.is_meant_now(meaning));
        let statement = if is_as_meant { statement } else { self.stand_in(&statement) };
        if self.link.as_mut().is_some_and(|link| link.held.touch(statement.id)) {
            return statement;
        }
        self.give_room(&statement);
        let parts: [&[u8]; 3] = [&statement.name, b"\0", &statement.tail];
        self.send_own(frontend::PARSE, &parts, Sent::Added(statement.clone()));
        statement
    }

    /// What the text of `statement` is under the settings of this moment. Kept, so that it is prepared once.
    fn stand_in(&mut self, statement: &Arc<Statement>) -> Arc<Statement> {
        let fits = |known: &Statement| match &known.meaning {
            Some(meaning) => self.is_meant_now(meaning),
            None => self.traces.change_meaning(),
        };
        if let Some(known) = self.stand_ins.get(&statement.id).filter(|known| fits(known)) {
            return known.clone();
        }
        let made = self.statement_now(&statement.tail, statement.traces);
        if self.stand_ins.len() > self.names.len() || self.stand_ins.bytes() > self.names.bytes() {
            // Most of them stand in for names that were given up.
            self.stand_ins.clear();
        }
        self.stand_ins.insert(statement.id, made.clone());
        made
    }

    /// The connection is about to get a statement; others go for it.
    fn give_room(&mut self, statement: &Arc<Statement>) {
        let limit = self.pool.central.settings().max_prepared_statements.max(1);
        while let Some(link) = &mut self.link {
            let Some(evicted) = link.held.to_evict(limit, statement.tail.len()) else {
                link.held.add(statement.clone());
                return;
            };
            link.held.remove(evicted.id);
            let name = evicted.name.clone();
            self.send_own(frontend::CLOSE, &[b"S", &name, b"\0"], Sent::Evicted(evicted));
        }
    }

    /// Sees to it that the connection has the client's unnamed statement, or none.
    fn ensure_unnamed(&mut self) {
        let Some(link) = &mut self.link else { return };
        if link.unnamed == self.unnamed.token {
            return;
        }
        link.unnamed = self.unnamed.token;
        if self.unnamed.token == 0 || self.unnamed.body.is_empty() {
            link.unnamed = 0;
            return self.send_own(frontend::CLOSE, &[b"S\0"], Sent::ClosedUnnamed);
        }
        let body = std::mem::take(&mut self.unnamed.body);
        self.send_own(frontend::PARSE, &[&body], Sent::AddedUnnamed);
        self.unnamed.body = body;
    }

    /// The server has skipped what was counted on.
    pub(super) fn undo_skipped(&mut self) {
        if !self.expected.has_skipped() {
            return;
        }
        let skipped = self.expected.skipped();
        let is_decided_later = self.expected.decides_unnamed();
        let Some(link) = &mut self.link else { return };
        for sent in skipped.into_iter().rev() {
            match sent {
                Sent::Added(statement) | Sent::Parse { statement, known: false, .. } => {
                    link.held.remove(statement.id);
                }
                Sent::Evicted(statement) | Sent::Deallocate { instead: statement, .. } => link.held.add(statement),
                Sent::ParseUnnamed | Sent::AddedUnnamed | Sent::ClosedUnnamed | Sent::CloseOther | Sent::Query
                    if is_decided_later => {}
                // Not certain which one the server has now; a Query would have destroyed it.
                Sent::ParseUnnamed | Sent::CloseOther | Sent::Query => {
                    self.unnamed.token = 0;
                    link.unnamed = u64::MAX;
                }
                Sent::AddedUnnamed | Sent::ClosedUnnamed => link.unnamed = u64::MAX,
                _ => {}
            }
        }
    }

    /// Whether a Query is a DEALLOCATE, and nothing else, of a statement that has another name on the server.
    pub(super) fn is_own_deallocate(&self, header: Header) -> bool {
        let body = self.body(header);
        if body.len() < header.body_bytes as usize {
            return false;
        }
        matches!(deallocated(body), Some(Deallocated::Name(name)) if self.statement_of(&name).is_some())
    }

    /// Whether such a Query is answered here once everything before it is answered. Where the server fails or skips it,
    /// or waits for more, it is the server's.
    fn is_deallocated_here(&self, header: Header) -> bool {
        let comes = self.ledger.awaits_ready() || self.expected.is_empty();
        comes
            && !self.ledger.server_waits()
            && self.ledger.status() != TransactionStatus::Failed
            && self.is_own_deallocate(header)
    }

    /// Does what such a Query asks for, and answers it.
    pub(super) fn deallocate_here(&mut self, header: Header, status: TransactionStatus) {
        if let Some(Deallocated::Name(name)) = deallocated(self.body(header)) {
            self.names.remove(&*name);
        }
        self.unnamed.token = 0;
        let mut answer = Vec::new();
        message::command_complete(&mut answer, "DEALLOCATE");
        message::ready_for_query(&mut answer, status);
        self.say(&answer);
    }
}
