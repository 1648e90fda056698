//! The hot path: frames from client to backend and back, without a timer or an allocation for a message.
//!
//! ```text
//! client ──read──▶ up.buffer ──clear──▶ written to the backend      clear: tag and length of each frame, the gate
//! client ◀─write── down.buffer ◀─scan── read from the backend       scan: tags, ReadyForQuery, ParameterStatus
//! ```
//!
//! Each direction owns at most one block of memory; when it is full nothing more is read, which holds the other side
//! back. A frame never has to fit in a block. One wake-up of the task does as much as the sockets allow: with an
//! edge-triggered poller a read that does not fill its block has emptied the socket, so no second read finds out, and
//! a socket that was found empty is not asked again before the next wake-up. Sockets of a ring ([`crate::postgres::ring`])
//! behave the same, at the price of a copy of what is small: system calls cost more than that.
//!
//! # Who may pass
//!
//! Outside, the first frame of a transaction asks the gate; if it is fenced, the frame and all behind it stay in the
//! buffer and the session is *held*. Inside, everything passes, but under a fence nothing passes a Sync or Query whose
//! ReadyForQuery has not come: if that says `I` the session leaves and is held, so an endless pipeline ends there too.

use std::task::{Context, Poll};
use std::time::Instant;

use super::brake::Brake;
use super::client_error::ClientError;
use super::entry::{Entry, SessionState};
use super::flow::{self, Progress};
use super::handoff::Tracked;
use super::session::{End, Place, Session, Step};
use super::shadow::Shadowing;
use crate::wire::frame::{self, FrameError, HEADER_BYTES, Header, backend as server, frontend};
use crate::wire::ledger::Ledger;
use crate::wire::message;
use crate::wire::scanner::Sink;

/// Whether the next frame may go to the server.
pub(super) enum Passage {
    /// It may.
    Free,
    /// Not now.
    Blocked,
    /// The server would ignore it: it is thrown away here.
    Pointless,
    /// Admitted, but the backend is not on the active server.
    Elsewhere(Step),
}

impl Session {
    /// Relays as much as the sockets allow. Ready when something else is to be done.
    pub(super) fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        if self.entry.has_orders() {
            return Poll::Ready(Step::Orders);
        }
        if let Some(step) = self.poll_move(cx) {
            return Poll::Ready(step);
        }
        if let Some(step) = self.catch_up_with_route() {
            return Poll::Ready(step);
        }
        (self.up.is_drained, self.down.is_drained) = (false, false);
        let mut rounds = 0;
        loop {
            let up = match self.pump_up(cx) {
                Ok(up) => up,
                Err(step) => return Poll::Ready(step),
            };
            let down = match self.pump_down(cx) {
                Ok(down) => down,
                Err(End::ServerLost) if self.survives_loss() => Progress::Some,
                Err(end) => return Poll::Ready(Step::End(end)),
            };
            if up == Progress::None && down == Progress::None {
                break;
            }
            rounds += 1;
            if rounds == flow::BLOCKS_AT_ONCE {
                flow::go_on_after_poller(cx);
                break;
            }
        }
        if self.cancelled {
            self.answer_cancel();
            cx.waker().wake_by_ref();
        }
        if let Err(step) = self.watch_held_client(cx) {
            return Poll::Ready(step);
        }
        if let Some(step) = self.ready_to_move() {
            return Poll::Ready(step);
        }
        if self.shadow.is_some() && self.is_to_be_looked_at() {
            return Poll::Ready(Step::Look);
        }
        if self.is_to_board() {
            return Poll::Ready(Step::Board);
        }
        self.up.buffer.release();
        self.down.buffer.release();
        Poll::Pending
    }

    /// A safe point: nothing asked is unanswered, and no frame is cut, in either direction.
    pub(super) fn is_at_safe_point(&self) -> bool {
        !self.is_inside() && self.is_quiet()
    }

    #[inline]
    pub(super) fn is_inside(&self) -> bool {
        matches!(self.place, Place::Inside { .. })
    }

    fn is_quiet(&self) -> bool {
        self.ledger.is_quiet() && self.down.scanner.is_at_boundary() && self.up.cleared == 0 && self.up.body_left == 0
    }

    /// After a switch, a session without activity follows at once: it may be waiting for notifications.
    pub(super) fn catch_up_with_route(&mut self) -> Option<Step> {
        let database = &self.local.database;
        if database.epoch() == self.epoch || self.is_inside() {
            return None;
        }
        // Under a PAUSE too: the server that was left may be written to again, and no fence holds such a connection.
        let Some(member) = &self.member else {
            return Some(Step::End(End::Told(ClientError::ReplicationEnded)));
        };
        if database.is_fenced() || !self.is_quiet() {
            return None;
        }
        let admission = member.try_enter()?;
        self.enter();
        Some(Step::Adopt(admission.epoch))
    }

    /// Client to backend, at most a block.
    fn pump_up(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        let read = self.read_client(cx)?;
        self.clear()?;
        let written = self.write_backend(cx)?;
        if self.up.terminated {
            // Only the end of the stream is of interest now.
            self.up.buffer.consume(self.up.buffer.len());
            // A COPY that it leaves open fails: the server waits for its data, and would for ever.
            let is_answered = !self.ledger.awaits_ready() || self.ledger.server_waits();
            if is_answered && self.down.buffer.is_empty() {
                return Err(Step::End(End::ClientLeft));
            }
        }
        if self.up.ended && self.up.cleared == 0 {
            return Err(Step::End(End::ClientLeft));
        }
        Ok(read.or(written))
    }

    fn read_client(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        if self.up.is_drained || self.up.ended || self.up.buffer.is_full() {
            return Ok(Progress::None);
        }
        match flow::read(&mut self.client, &mut self.up.buffer, cx) {
            Poll::Pending => {
                self.up.is_drained = true;
                Ok(Progress::None)
            }
            Poll::Ready(Err(_)) => Err(Step::End(End::ClientLeft)),
            Poll::Ready(Ok(0)) => {
                self.up.ended = true;
                Ok(Progress::Some)
            }
            Poll::Ready(Ok(count)) => {
                self.up.buffer.fill(count);
                if matches!(self.place, Place::Held { .. }) {
                    self.look_for_terminate()?;
                }
                Ok(Progress::Some)
            }
        }
    }

    fn write_backend(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        let Some(backend) = &mut self.backend else { return Ok(Progress::None) };
        let up = &mut self.up;
        match flow::write(&mut backend.connection.stream, &mut up.buffer, &mut up.cleared, cx) {
            Err(_) => self.after_write_error(cx),
            Ok(0) => Ok(Progress::None),
            Ok(count) => {
                self.local.meters.sent_up(count);
                if self.up.cleared == 0 && !self.ledger.awaits_ready() {
                    // The rest of a COPY that had failed before all of it was sent: no answer will end our stay inside.
                    self.leave_if_quiet();
                }
                Ok(Progress::Some)
            }
        }
    }

    /// The server may have said why before it closed.
    fn after_write_error(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        while let Ok(Progress::Some) = self.read_backend(cx) {
            if self.down.buffer.is_full() {
                break;
            }
        }
        Err(Step::End(End::ServerLost))
    }

    /// Looks at the frames that have been read and lets pass what may.
    fn clear(&mut self) -> Result<(), Step> {
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
            if self.up.body_left > 0 {
                let passing = self.up.body_left.min(held - self.up.cleared);
                self.up.cleared += passing;
                self.up.body_left -= passing;
                if self.up.body_left > 0 {
                    return Ok(());
                }
                continue;
            }
            if self.member.is_none() {
                // A replication connection: nothing is looked at.
                self.up.cleared = held;
                return Ok(());
            }
            let header = match Header::parse(&self.up.buffer.filled()[self.up.cleared..]) {
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
            match self.may_pass(header)? {
                Passage::Free => self.pass(header),
                Passage::Blocked => return Ok(()),
                Passage::Pointless => self.up.discard_left = HEADER_BYTES + header.body_bytes as usize,
                Passage::Elsewhere(step) => return Err(step),
            }
        }
    }

    /// As PostgreSQL: the session ends. What is already cleared is written first, so that its effect is not in doubt.
    fn refuse_frame(&self, error: FrameError) -> Result<(), Step> {
        if self.up.cleared > 0 {
            return Ok(());
        }
        Err(Step::End(End::Told(ClientError::Protocol(error.to_string().into()))))
    }

    #[inline]
    fn pass(&mut self, header: Header) {
        let body_bytes = header.body_bytes as usize;
        if is_tracked(header.tag) || self.is_read_bind(header.tag) {
            let frame = &self.up.buffer.filled()[self.up.cleared..];
            let body = &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + body_bytes)];
            self.tracked.on_client_frame(header.tag, body, body_bytes);
        }
        if let Some(shadow) = &mut self.shadow {
            let frame = &self.up.buffer.filled()[self.up.cleared + HEADER_BYTES..];
            shadow.on_client_frame(header, &frame[..frame.len().min(body_bytes)]);
        }
        self.ledger.forwarded(header.tag);
        self.touched = true;
        self.up.cleared += HEADER_BYTES;
        self.up.body_left = body_bytes;
    }

    #[inline]
    fn may_pass(&mut self, header: Header) -> Result<Passage, Step> {
        if header.tag == frontend::TERMINATE {
            return self.terminate();
        }
        if self.up.discard_to_sync {
            return Ok(self.discard_cancelled(header));
        }
        let is_read = matches!(header.tag, frontend::QUERY | frontend::PARSE | frontend::CLOSE);
        if (is_read || self.is_read_bind(header.tag)) && !self.is_whole(header) {
            return Ok(Passage::Blocked);
        }
        if self.is_inside() {
            return Ok(self.may_pass_inside(header.tag));
        }
        if matches!(header.tag, frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL | frontend::FLUSH) {
            // The rest of a COPY that has failed, or a Flush with nothing to flush: no answer would end our stay inside.
            return Ok(if self.up.cleared > 0 { Passage::Blocked } else { Passage::Pointless });
        }
        let Some(member) = &self.member else { return Ok(Passage::Free) };
        if self.brake.is_on() {
            return Ok(Passage::Blocked);
        }
        match member.try_enter() {
            Some(admission) if admission.epoch != self.epoch && !self.is_quiet() => {
                // The old backend is in the middle of a frame: what the client is sent of the new one comes behind its end.
                member.leave();
                Ok(Passage::Blocked)
            }
            Some(admission) if admission.epoch == self.epoch && self.backend.is_none() => {
                // Outside, so that nothing is in doubt.
                member.leave();
                Err(Step::End(End::ServerLost))
            }
            Some(admission) => {
                self.enter();
                if admission.epoch == self.epoch {
                    if self.local.is_shadowed.get() {
                        self.begin_sample();
                    }
                    Ok(Passage::Free)
                } else {
                    Ok(Passage::Elsewhere(Step::Adopt(admission.epoch)))
                }
            }
            None if self.enter_beside(header) => Ok(Passage::Free),
            None => {
                self.hold()?;
                Ok(Passage::Blocked)
            }
        }
    }

    /// What came before Terminate is sent and answered first. Nothing behind it is looked at.
    fn terminate(&mut self) -> Result<Passage, Step> {
        if self.up.cleared > 0 {
            return Ok(Passage::Blocked);
        }
        if !self.ledger.awaits_ready() && !self.brake.is_on() {
            return Err(Step::End(End::ClientLeft));
        }
        self.up.terminated = true;
        Ok(Passage::Blocked)
    }

    fn may_pass_inside(&self, tag: u8) -> Passage {
        if self.ledger.is_full() {
            return Passage::Blocked;
        }
        let is_copy = matches!(tag, frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL);
        let is_to_wait = || self.local.database.is_fenced() || self.brake.is_on();
        if self.ledger.awaits_ready() && is_to_wait() && !is_copy && !self.ledger.is_copying_in() {
            return Passage::Blocked;
        }
        Passage::Free
    }

    /// Bind is looked at only in sessions that name settings by parameters.
    #[inline]
    fn is_read_bind(&self, tag: u8) -> bool {
        tag == frontend::BIND && self.tracked.reads_binds()
    }

    /// Statements that are read for tracking pass only when they are whole, unless they are larger than a block.
    fn is_whole(&self, header: Header) -> bool {
        let wanted = HEADER_BYTES + header.body_bytes as usize;
        let at_hand = self.up.buffer.len() - self.up.cleared;
        at_hand >= wanted || (self.up.buffer.is_full() && self.up.cleared == 0)
    }

    #[inline]
    pub(super) fn enter(&mut self) {
        self.enter_as(SessionState::Active);
    }

    pub(super) fn enter_as(&mut self, state: SessionState) {
        let now = Instant::now();
        if let Place::Held { since } = self.place {
            self.local.meters.waited(now - since);
        }
        self.entered_turn = self.ledger.readies();
        if self.moving.is_some() {
            self.entry.set_settled_for(None);
        }
        self.go(Place::Inside { since: now }, state, now);
    }

    /// The session stands elsewhere from now on.
    pub(super) fn go(&mut self, place: Place, state: SessionState, now: Instant) {
        self.place = place;
        self.entry.set_state_at(state, now);
    }

    /// Leaves the gate if everything that was asked is answered with `I`.
    pub(super) fn leave_if_quiet(&mut self) {
        let Place::Inside { since } = self.place else { return };
        if !self.is_quiet() {
            return;
        }
        let now = Instant::now();
        self.go(Place::Outside, SessionState::Idle, now);
        self.local.meters.took(now - since, self.ledger.readies().wrapping_sub(self.entered_turn));
        if let Some(member) = &self.member {
            member.leave();
        }
        if self.shadow.is_some() {
            self.end_sample(now - since);
        }
        if std::mem::take(&mut self.shows_blockers) {
            self.entry.forget_blockers();
        }
    }

    /// Backend to client, at most a block.
    fn pump_down(&mut self, cx: &mut Context<'_>) -> Result<Progress, End> {
        let read = self.read_backend(cx)?;
        let written = self.write_client(cx)?;
        Ok(read.or(written))
    }

    fn read_backend(&mut self, cx: &mut Context<'_>) -> Result<Progress, End> {
        let Some(backend) = &mut self.backend else { return Ok(Progress::None) };
        if self.down.is_drained || self.down.buffer.is_full() {
            return Ok(Progress::None);
        }
        let count = match flow::read(&mut backend.connection.stream, &mut self.down.buffer, cx) {
            Poll::Pending => {
                self.down.is_drained = true;
                return Ok(Progress::None);
            }
            Poll::Ready(Ok(0) | Err(_)) => return Err(End::ServerLost),
            Poll::Ready(Ok(count)) => count,
        };
        if self.down.buffer.room()[0] == server::ERROR_RESPONSE && self.is_farewell() {
            // The old server ends a session that goes on elsewhere: its client need not know.
            return Err(End::ServerLost);
        }
        self.down.buffer.fill(count);
        self.look_at_answers(count)?;
        Ok(Progress::Some)
    }

    /// Whether an ErrorResponse now answers nothing, and the session can do without this backend.
    fn is_farewell(&self) -> bool {
        self.down.scanner.is_at_boundary() && self.is_at_safe_point() && self.is_prepared()
    }

    /// Follows the last `count` bytes of the down buffer.
    pub(super) fn look_at_answers(&mut self, count: usize) -> Result<(), End> {
        let Some(backend) = &mut self.backend else { return Ok(()) };
        let filled = self.down.buffer.filled();
        let mut answers = Answers {
            ledger: &mut self.ledger,
            tracked: &mut self.tracked,
            reported: &mut backend.connection.parameters,
            entry: &self.entry,
            last_was_error: &mut self.down.last_was_error,
            brake: &mut self.brake,
            slows: !self.local.database.write_delay().is_zero(),
            shadow: &mut self.shadow,
        };
        if self.down.scanner.scan(&filled[filled.len() - count..], &mut answers).is_err() {
            tracing::error!(session = self.entry.id(), "the server does not speak the protocol; the session is ended");
            return Err(End::ServerLost);
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.on_server_bytes(&filled[filled.len() - count..]);
        }
        self.leave_if_quiet();
        Ok(())
    }

    fn write_client(&mut self, cx: &mut Context<'_>) -> Result<Progress, End> {
        if self.brake.is_on() && self.brake.holds(self.local.database.write_delay(), cx) {
            return Ok(Progress::None);
        }
        let mut most = self.down.buffer.len();
        match flow::write(&mut self.client, &mut self.down.buffer, &mut most, cx) {
            Err(_) => Err(End::ClientLeft),
            Ok(0) => Ok(Progress::None),
            Ok(count) => {
                self.local.meters.sent_down(count);
                Ok(Progress::Some)
            }
        }
    }

    /// Bytes that the login or a handoff has read from the backend and not used.
    pub(super) fn absorb_leftovers(&mut self) -> Result<(), End> {
        let Some(backend) = &mut self.backend else { return Ok(()) };
        let bytes = std::mem::take(&mut backend.connection.read_buf);
        if bytes.is_empty() {
            return Ok(());
        }
        self.down.buffer.append(&bytes);
        self.look_at_answers(bytes.len())
    }
}

/// Frames that the handoff needs to know of.
#[inline]
fn is_tracked(tag: u8) -> bool {
    matches!(tag, frontend::QUERY | frontend::PARSE | frontend::CLOSE | frontend::SYNC | frontend::FUNCTION_CALL)
}

/// Told of every frame that the server sends.
struct Answers<'a> {
    ledger: &'a mut Ledger,
    tracked: &'a mut Tracked,
    reported: &'a mut Vec<(String, String)>,
    entry: &'a Entry,
    last_was_error: &'a mut bool,
    brake: &'a mut Brake,
    /// Writes are slowed down.
    slows: bool,
    shadow: &'a mut Option<Box<Shadowing>>,
}

impl Sink for Answers<'_> {
    #[inline]
    fn frame(&mut self, tag: u8, body: &[u8]) {
        *self.last_was_error = tag == server::ERROR_RESPONSE;
        match tag {
            server::READY_FOR_QUERY => {
                self.tracked.on_server_frame(tag);
                if let Ok(status) = message::read_ready_for_query(body) {
                    self.ledger.ready(status);
                    self.brake.ready(status, self.slows);
                }
            }
            server::COMMAND_COMPLETE if self.slows => {
                self.brake.completed(body);
                self.ledger.answered(tag);
            }
            server::COPY_IN_RESPONSE if self.slows => {
                self.brake.copies_in();
                self.ledger.answered(tag);
            }
            server::ERROR_RESPONSE => {
                if let Some(shadow) = self.shadow {
                    shadow.on_server_error();
                }
                self.ledger.answered(tag);
            }
            server::PARAMETER_STATUS => self.note_parameter(body),
            server::PARSE_COMPLETE => {
                self.tracked.on_server_frame(tag);
                self.ledger.answered(tag);
            }
            _ => self.ledger.answered(tag),
        }
    }

    #[inline]
    fn reads_commands(&self) -> bool {
        self.slows
    }
}

impl Answers<'_> {
    fn note_parameter(&mut self, body: &[u8]) {
        let Some((name, value)) = message::read_parameter_status(body) else { return };
        message::note_parameter(self.reported, name, value);
        if name == "application_name" {
            self.entry.set_application_name(value);
        }
    }
}
