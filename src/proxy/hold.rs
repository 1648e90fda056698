//! A session that is held: its next frame may not pass.
//!
//! It keeps what it has read in its one buffer and reads on until that is full, so that three things are noticed: a
//! Terminate, a client that is gone, and a cancel. Nothing of what is held has been sent to a server, so all of it may be
//! dropped without a trace.

use std::future::Future as _;
use std::pin::Pin;
use std::task::Context;
use std::time::{Duration, Instant};

use super::client_error::ClientError;
use super::entry::SessionState;
use super::relay::Passage;
use super::session::{End, Place, Session, Step};
use crate::postgres::Stream;
use crate::wire::frame::{HEADER_BYTES, Header, frontend};
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;

/// How often a held client is looked at whose buffer is full, so that reading does not tell that it is gone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Session {
    pub(super) fn hold(&mut self) -> Result<(), Step> {
        if !matches!(self.place, Place::Held { .. }) {
            let now = Instant::now();
            self.go(Place::Held { since: now }, SessionState::Held, now);
            self.look_for_terminate()?;
        }
        Ok(())
    }

    /// A held client that says Terminate, or behind whose messages the end of its stream stands, is let go.
    pub(super) fn look_for_terminate(&self) -> Result<(), Step> {
        if says_terminate(self.up.buffer.filled()) { Err(Step::End(End::ClientLeft)) } else { Ok(()) }
    }

    /// A held session's client has cancelled: an error, what it asked for is thrown away, and it is ready again.
    pub(super) fn answer_cancel(&mut self) {
        if !matches!(self.place, Place::Held { .. }) {
            self.cancelled = false;
            let waited_too_long = std::mem::take(&mut self.waited_too_long);
            let done = self.cancelled_by.take();
            if self.is_inside() && !waited_too_long {
                // It has been let in since it was cancelled, and what it asks for may be running.
                self.cancel_on_server(done);
            }
            return;
        }
        if !self.down.scanner.is_at_boundary() {
            return;
        }
        self.cancelled = false;
        drop(self.cancelled_by.take());
        let waited_too_long = std::mem::take(&mut self.waited_too_long);
        let Ok(Some(header)) = Header::parse(self.up.buffer.filled()) else { return };
        if header.tag == frontend::SYNC {
            // Nothing is asked that could be cancelled.
            return;
        }
        let mut answer = Vec::new();
        let why = if waited_too_long { ClientError::WaitTimeout } else { ClientError::CancelledWhileHeld };
        why.encode(&mut answer);
        if matches!(header.tag, frontend::QUERY | frontend::FUNCTION_CALL) {
            self.up.discard_left = HEADER_BYTES + header.body_bytes as usize;
            message::ready_for_query(&mut answer, TransactionStatus::Idle);
        } else {
            self.up.discard_to_sync = true;
        }
        self.down.buffer.append(&answer);
        self.go(Place::Outside, SessionState::Idle, Instant::now());
    }

    /// After a cancel in the extended protocol: everything is thrown away up to the Sync, which is answered here.
    pub(super) fn discard_cancelled(&mut self, header: Header) -> Passage {
        if self.up.cleared > 0 || !self.down.scanner.is_at_boundary() {
            return Passage::Blocked;
        }
        if header.tag == frontend::SYNC {
            self.up.discard_to_sync = false;
            let mut answer = Vec::new();
            message::ready_for_query(&mut answer, TransactionStatus::Idle);
            self.down.buffer.append(&answer);
        }
        Passage::Pointless
    }

    pub(super) fn watch_held_client(&mut self, cx: &mut Context<'_>) -> Result<(), Step> {
        let is_deaf = matches!(self.place, Place::Held { .. }) && self.up.buffer.is_full();
        match has_gone(&mut self.look_again, is_deaf, &self.client, cx) {
            true => Err(Step::End(End::ClientLeft)),
            false => Ok(()),
        }
    }
}

/// Whether there is a Terminate among whole frames.
pub(super) fn says_terminate(mut frames: &[u8]) -> bool {
    while let Ok(Some(header)) = Header::parse(frames) {
        if header.tag == frontend::TERMINATE {
            return true;
        }
        match frames.get(HEADER_BYTES + header.body_bytes as usize..) {
            Some(rest) => frames = rest,
            None => break,
        }
    }
    false
}

/// With a full buffer nothing is read, so while a waiting client is `is_deaf` the end of its stream is looked for now and then.
pub(super) fn has_gone(timer: &mut LookAgain, is_deaf: bool, client: &Stream, cx: &mut Context<'_>) -> bool {
    if !is_deaf {
        *timer = None;
        return false;
    }
    loop {
        let next = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK_EVERY)));
        if next.as_mut().poll(cx).is_pending() {
            return false;
        }
        *timer = None;
        if client.is_closed_by_peer() {
            return true;
        }
    }
}

/// When a waiting client with a full buffer is looked at again.
pub(super) type LookAgain = Option<Pin<Box<tokio::time::Sleep>>>;
