//! Whether a frame of the client may pass: the gate, and a connection of the pool.

use std::sync::Arc;
use std::time::Instant;

use super::{Mending, Place, PooledSession, StashState, Step};
use crate::proxy::client_error::ClientError;
use crate::proxy::entry::SessionState;
use crate::proxy::handoff::changed_parameters;
use crate::proxy::pool::Link;
use crate::proxy::reads::{self, ByDefault};
use crate::proxy::session::End;
use crate::switch::Epoch;
use crate::wire::frame::{self, FrameError, HEADER_BYTES, Header, frontend};
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;

/// What becomes of the next frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passage {
    /// It was passed, answered or thrown away: the next one may be looked at.
    Done,
    /// Not now.
    Blocked,
}

/// With so much on its way to the server, the rest waits. A frame's rewritten head fits into what is left of a block.
const OUT_ENOUGH: usize = 32 * 1024;

impl PooledSession {
    /// Looks at the frames that have been read and lets pass what may.
    pub(super) fn pass_frames(&mut self) -> Result<(), Step> {
        if self.up.terminated {
            return Ok(());
        }
        loop {
            let held = self.up.buffer.len();
            if self.up.discard_left > 0 {
                let gone = self.up.discard_left.min(held);
                self.up.buffer.consume(gone);
                self.up.discard_left -= gone;
                if self.up.discard_left > 0 {
                    return Ok(());
                }
                continue;
            }
            // Nor does anything pass whose answer, which may be ours, would find no room.
            if self.up.out.len() >= OUT_ENOUGH || self.down.buffer.is_full() {
                return Ok(());
            }
            if self.up.body_left > 0 {
                let passing = self.up.body_left.min(held).min(OUT_ENOUGH);
                self.up.out.append(&self.up.buffer.filled()[..passing]);
                self.up.buffer.consume(passing);
                self.up.body_left -= passing;
                if passing == 0 {
                    return Ok(());
                }
                continue;
            }
            let header = match Header::parse(self.up.buffer.filled()) {
                Ok(None) => return Ok(()),
                Ok(Some(header)) => header,
                Err(error) => return self.refuse_frame(error),
            };
            if !frame::is_frontend_tag(header.tag) {
                return self.refuse_frame(FrameError::FrontendTag(header.tag));
            }
            if u64::from(header.body_bytes) > self.worker.shared.config.limits.max_message_bytes {
                return self.refuse_frame(FrameError::Length);
            }
            if self.pass(header)? == Passage::Blocked {
                return Ok(());
            }
        }
    }

    /// As PostgreSQL: the session ends. What is already on its way is written first, so that its effect is not in doubt.
    pub(super) fn refuse_frame(&self, error: FrameError) -> Result<(), Step> {
        if !self.up.out.is_empty() {
            return Ok(());
        }
        Err(Step::End(End::Told(ClientError::Protocol(error.to_string().into()))))
    }

    fn pass(&mut self, header: Header) -> Result<Passage, Step> {
        if header.tag == frontend::TERMINATE {
            return self.terminate();
        }
        if self.up.discard_to_sync {
            return Ok(self.discard_cancelled(header));
        }
        if !self.is_at_hand(header)? {
            return Ok(Passage::Blocked);
        }
        if self.link.is_none() {
            if self.brake.is_on() {
                return Ok(Passage::Blocked);
            }
            if let Some(done) = self.pass_without_server(header) {
                return Ok(done);
            }
            if self.admit(header)? == Passage::Blocked {
                return Ok(Passage::Blocked);
            }
        } else if !self.may_pass_inside(header.tag) {
            return Ok(Passage::Blocked);
        }
        self.forward(header)
    }

    /// What came before Terminate is sent and answered first. Nothing behind it is looked at.
    fn terminate(&mut self) -> Result<Passage, Step> {
        if !self.up.out.is_empty() {
            return Ok(Passage::Blocked);
        }
        if !self.ledger.awaits_ready() && !self.brake.is_on() {
            return Err(Step::End(End::ClientLeft));
        }
        self.up.terminated = true;
        Ok(Passage::Blocked)
    }

    /// Inside, nothing passes a Sync or Query that is unanswered while a fence or somebody in the line waits for the
    /// transaction to end.
    fn may_pass_inside(&self, tag: u8) -> bool {
        if self.ledger.is_full() || self.expected.is_full() || self.mending == Mending::Batch {
            return false;
        }
        let is_copy = matches!(tag, frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL);
        let is_wanted = || self.pool.central.is_waited_for() || self.local.database.is_fenced() || self.brake.is_on();
        !self.ledger.awaits_ready() || is_copy || self.ledger.is_copying_in() || !is_wanted()
    }

    /// Outside: what needs no server.
    fn pass_without_server(&mut self, header: Header) -> Option<Passage> {
        let whole = HEADER_BYTES + header.body_bytes as usize;
        match header.tag {
            // The rest of a COPY that has failed, or a Flush with nothing to flush.
            frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL | frontend::FLUSH => {}
            frontend::SYNC => self.say_ready(TransactionStatus::Idle),
            frontend::QUERY if self.is_own_deallocate(header) => self.deallocate_here(header, TransactionStatus::Idle),
            _ => return None,
        }
        self.up.discard_left = whole;
        Some(Passage::Done)
    }

    /// Appends a ReadyForQuery of our own to what the client is sent.
    pub(super) fn say_ready(&mut self, status: TransactionStatus) {
        let mut answer = Vec::new();
        message::ready_for_query(&mut answer, status);
        self.say(&answer);
    }

    /// Appends whole messages of our own to what the client is sent. Only where the server's stream is at a boundary.
    pub(super) fn say(&mut self, messages: &[u8]) {
        debug_assert_eq!(self.down.looked_at, self.down.buffer.len(), "nothing of the server's is cut");
        self.down.buffer.append(messages);
        self.down.looked_at += messages.len();
    }

    /// A connection, and admission.
    fn admit(&mut self, header: Header) -> Result<Passage, Step> {
        loop {
            let database = &self.local.database;
            let is_fenced = database.is_fenced();
            let goes_on = if is_fenced { self.going_on(header) } else { None };
            if is_fenced && goes_on.is_none() {
                self.stop_waiting();
                self.hold()?;
                return Ok(Passage::Blocked);
            }
            let Some(server) = self.pool.server_at(database.epoch()) else {
                self.hold()?;
                return Ok(Passage::Blocked);
            };
            let link = match self.place {
                Place::Waiting { .. } => match self.waiter.take() {
                    Some(Ok(link)) => link,
                    Some(Err(error)) => return Err(Step::End(End::Told(error))),
                    None => {
                        self.pool.open_for_waiting();
                        return Ok(Passage::Blocked);
                    }
                },
                _ => match self.pool.check_out(&self.profile, server) {
                    Some(link) => link,
                    None => {
                        self.wait();
                        return Ok(Passage::Blocked);
                    }
                },
            };
            let now = Instant::now();
            let entered = if goes_on.is_some() { self.member.try_enter_reading() } else { self.member.try_enter() };
            let Some(admission) = entered else {
                self.pool.give_back(link, now);
                self.hold()?;
                return Ok(Passage::Blocked);
            };
            if self.pool.server_at(admission.epoch) == Some(link.server()) {
                let state = goes_on.unwrap_or(SessionState::Active);
                if state == SessionState::Reading {
                    self.worker.shared.sessions.count_read();
                }
                self.begin(link, admission.epoch, state, now)?;
                return Ok(Passage::Done);
            }
            // The database has moved since the connection was given.
            self.member.leave();
            link.close();
            self.place = Place::Outside;
        }
    }

    /// What it does if the next frame is one of those that go on in a pause.
    fn going_on(&self, header: Header) -> Option<SessionState> {
        let text_of = |name: &[u8]| self.names.get(name).map(|statement| &statement.tail[..]);
        reads::going_on(&self.local.database, header.tag, self.body(header), ByDefault::of(&self.told), text_of)
    }

    /// What the client has asked for before it said Terminate is done when its turn comes, as a server does it.
    fn wait(&mut self) {
        let now = Instant::now();
        let since = match self.place {
            Place::Held { since } => since,
            _ => now,
        };
        self.place = Place::Waiting { since };
        self.entry.set_state_at(SessionState::Waiting, now);
        self.pool.wait(&self.waiter);
    }

    pub(super) fn stop_waiting(&mut self) {
        if let Place::Waiting { .. } = self.place {
            self.pool.stop_waiting(&self.waiter);
            self.place = Place::Outside;
        }
    }

    fn begin(&mut self, link: Box<Link>, epoch: Epoch, state: SessionState, now: Instant) -> Result<(), Step> {
        if let Place::Held { since } | Place::Waiting { since } = self.place {
            self.local.meters.waited(now - since);
        }
        self.place = Place::Inside { since: now };
        self.epoch = epoch;
        self.entered_turn = self.ledger.readies();
        self.entry.set_state_at(state, now);
        // The server first: a process id is one of a server's.
        if self.server != Some(link.server()) {
            self.server = Some(link.server());
            self.entry.set_server(link.server());
        }
        self.entry.set_backend_pid(link.pid());
        self.traces = self.profile.leaves;
        self.takers.clear();
        self.stash.frames.clear();
        self.stash.state = StashState::Open;
        if self.local.is_shadowed.get() {
            self.begin_sample();
        }
        let fits = Arc::ptr_eq(&link.profile, &self.profile);
        let is_checked = link.idle_for(now) <= self.pool.central.settings().server_check_delay;
        self.link = Some(link);
        if !fits || !is_checked {
            return Err(Step::Fit);
        }
        self.tell_changes();
        Ok(())
    }

    /// Tells the client what its connection reports otherwise than the last one.
    pub(super) fn tell_changes(&mut self) {
        let Some(link) = &mut self.link else { return };
        if Arc::ptr_eq(&link.reported, &self.told) {
            return;
        }
        if *link.reported == *self.told {
            link.reported = self.told.clone();
            return;
        }
        let mut changes = Vec::new();
        for (name, value) in changed_parameters(&self.told, &link.reported) {
            message::parameter_status(&mut changes, &name, &value);
        }
        self.told = link.reported.clone();
        self.say(&changes);
    }

    /// The transaction is over if everything that was asked is answered with `I`: the connection goes back and the gate
    /// is left, unless something is to be looked at first.
    pub(super) fn leave_if_quiet(&mut self) -> Result<(), Step> {
        let is_quiet = self.ledger.is_quiet() && self.up.out.is_empty() && self.up.body_left == 0;
        if !is_quiet || self.down.body_left > 0 || self.down.looked_at < self.down.buffer.len() {
            return Ok(());
        }
        if self.link.is_none() {
            return Ok(());
        }
        if self.mending == Mending::Batch {
            return Err(Step::Mend);
        }
        if self.sampling.is_some() {
            self.end_sample();
        }
        let Some(link) = &mut self.link else { return Ok(()) };
        if self.ledger.is_uncertain() || self.expected.is_confused() || !self.expected.is_empty() {
            link.spoiled = true;
        }
        let is_known = !self.traces.outlive()
            && self.mending == Mending::None
            && self.cancels.is_empty()
            && !link.spoiled
            && self.has_reported_nothing();
        let settings = self.pool.central.settings();
        if !is_known || settings.server_reset_query_always || settings.max_prepared_statements == 0 {
            return Err(Step::Settle);
        }
        self.leave(Instant::now());
        Ok(())
    }

    /// Whether every reported parameter is as it was before the transaction.
    fn has_reported_nothing(&mut self) -> bool {
        let Some(link) = &mut self.link else { return true };
        if Arc::ptr_eq(&link.reported, &self.told) {
            return true;
        }
        if *link.reported == *self.told {
            link.reported = self.told.clone();
            return true;
        }
        false
    }

    /// Gives the connection back and leaves the gate.
    pub(super) fn leave(&mut self, now: Instant) {
        if let Place::Inside { since } = self.place {
            self.local.meters.took(now - since, self.ledger.readies().wrapping_sub(self.entered_turn));
        }
        self.place = Place::Outside;
        self.entry.set_state_at(SessionState::Idle, now);
        self.entry.set_backend_pid(0);
        if let Some(link) = self.link.take() {
            self.pool.give_back(link, now);
        }
        self.member.leave();
    }
}
