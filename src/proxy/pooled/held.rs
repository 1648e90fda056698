//! A client that waits: for a fence to open, or for a connection.
//!
//! It keeps what it has read in its one buffer and reads on until that is full, so that three things are noticed: a
//! Terminate, a client that is gone, and a cancel. Nothing of what waits has been sent to a server.

use std::future::Future as _;
use std::task::Context;
use std::time::{Duration, Instant};

use super::passing::Passage;
use super::{Place, PooledSession, Step};
use crate::proxy::client_error::ClientError;
use crate::proxy::hold::is_closed;
use crate::proxy::session::End;
use crate::proxy::sessions::SessionState;
use crate::wire::frame::{HEADER_BYTES, Header, frontend};
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;

/// How often a waiting client is looked at whose buffer is full, so that reading does not tell that it is gone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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

    /// A waiting client that says Terminate is let go.
    pub(super) fn look_for_terminate(&self) -> Result<(), Step> {
        let mut frames = self.up.buffer.filled();
        while let Ok(Some(header)) = Header::parse(frames) {
            if header.tag == frontend::TERMINATE {
                return Err(Step::End(End::ClientLeft));
            }
            match frames.get(HEADER_BYTES + header.body_bytes as usize..) {
                Some(rest) => frames = rest,
                None => break,
            }
        }
        Ok(())
    }

    /// A waiting session's client has cancelled: an error, what it asked for is thrown away, and it is ready again.
    pub(super) fn answer_cancel(&mut self) {
        self.cancelled = false;
        let waited_too_long = std::mem::take(&mut self.waited_too_long);
        if !self.is_waiting() {
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

    /// With a full buffer nothing is read, so the end of the stream is looked for in another way.
    pub(super) fn watch_waiting_client(&mut self, cx: &mut Context<'_>) -> Result<(), Step> {
        if !self.is_waiting() || !self.up.buffer.is_full() {
            self.look_again = None;
            return Ok(());
        }
        loop {
            let timer = self.look_again.get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK_EVERY)));
            if timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            self.look_again = None;
            if is_closed(&self.client) {
                return Err(Step::End(End::ClientLeft));
            }
        }
    }
}
