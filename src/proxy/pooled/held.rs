//! A client that waits: for a fence to open, or for a connection.
//!
//! It keeps what it has read in its one buffer and reads on until that is full, so that three things are noticed: a
//! Terminate behind a fence, a client that is gone, and a cancel. Nothing of what waits has been sent to a server.

use std::task::Context;
use std::time::Instant;

use super::passing::Passage;
use super::{Place, PooledSession, Step};
use crate::proxy::client_error::ClientError;
use crate::proxy::entry::SessionState;
use crate::proxy::hold::{has_gone, says_terminate};
use crate::proxy::session::End;
use crate::wire::frame::{HEADER_BYTES, Header, frontend};
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;

impl PooledSession {
    /// A fence holds the session.
    pub(super) fn hold(&mut self) -> Result<(), Step> {
        if !matches!(self.place, Place::Held { .. }) {
            let now = Instant::now();
            self.place = Place::Held { since: now };
            self.entry.set_state_at(SessionState::Held, now);
            self.look_for_terminate()?;
        }
        Ok(())
    }

    fn is_waiting(&self) -> bool {
        matches!(self.place, Place::Held { .. } | Place::Waiting { .. })
    }

    /// A client that says Terminate while a fence holds it is let go.
    pub(super) fn look_for_terminate(&self) -> Result<(), Step> {
        if says_terminate(self.up.buffer.filled()) { Err(Step::End(End::ClientLeft)) } else { Ok(()) }
    }

    /// A waiting session's client has cancelled: an error, what it asked for is thrown away, and it is ready again.
    pub(super) fn answer_cancel(&mut self) {
        self.cancelled = false;
        let waited_too_long = std::mem::take(&mut self.waited_too_long);
        if !self.is_waiting() {
            // Its wait has ended since it was cancelled, and what it asks for may be running.
            if !waited_too_long {
                self.cancel_on_server(None);
            }
            return;
        }
        self.stop_waiting();
        let now = Instant::now();
        self.place = Place::Outside;
        self.entry.set_state_at(SessionState::Idle, now);
        let Ok(Some(header)) = Header::parse(self.up.buffer.filled()) else { return };
        let mut answer = Vec::new();
        let why = if waited_too_long { ClientError::WaitTimeout } else { ClientError::CancelledWhileHeld };
        why.encode(&mut answer);
        if header.tag == frontend::QUERY {
            // Cancelled or not, a Query destroys the unnamed statement.
            self.unnamed.token = 0;
        }
        if matches!(header.tag, frontend::QUERY | frontend::FUNCTION_CALL) {
            self.up.discard_left = HEADER_BYTES + header.body_bytes as usize;
            message::ready_for_query(&mut answer, TransactionStatus::Idle);
        } else {
            self.up.discard_to_sync = true;
        }
        self.say(&answer);
    }

    /// After a cancel in the extended protocol: everything is thrown away up to the Sync, which is answered here.
    pub(super) fn discard_cancelled(&mut self, header: Header) -> Passage {
        if header.tag == frontend::SYNC {
            self.up.discard_to_sync = false;
            self.say_ready(TransactionStatus::Idle);
        }
        self.up.discard_left = HEADER_BYTES + header.body_bytes as usize;
        Passage::Done
    }

    pub(super) fn watch_waiting_client(&mut self, cx: &mut Context<'_>) -> Result<(), Step> {
        let is_deaf = self.is_waiting() && self.up.buffer.is_full();
        match has_gone(&mut self.look_again, is_deaf, &self.client, cx) {
            true => Err(Step::End(End::ClientLeft)),
            false => Ok(()),
        }
    }
}
