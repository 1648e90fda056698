//! What the server says: which of it the client sees, and what follows from it.

use super::expected::Meaning;
use super::{Mending, PooledSession, StashState, Step};
use crate::proxy::pool::STATEMENT_PREFIX;
use crate::proxy::session::End;
use crate::wire::error;
use crate::wire::frame::{HEADER_BYTES, Header, backend};
use crate::wire::ledger::TransactionStatus;

/// Whether the client sees a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Yes,
    No,
    /// With another tag.
    As(u8),
}

impl PooledSession {
    /// Looks at what has been read. A frame that is ours is taken out.
    pub(super) fn look_at_answers(&mut self) -> Result<(), Step> {
        loop {
            let held = self.down.buffer.len() - self.down.looked_at;
            if self.down.body_left > 0 {
                let passing = self.down.body_left.min(held);
                self.show(passing);
                self.down.body_left -= passing;
                if self.down.body_left > 0 {
                    return Ok(());
                }
                self.leave_if_quiet()?;
                continue;
            }
            let looked_at = self.down.looked_at;
            let rest = &self.down.buffer.filled()[looked_at..];
            let header = match Header::parse(rest) {
                Ok(Some(header)) => header,
                Ok(None) => return Ok(()),
                Err(_) => {
                    tracing::error!(
                        session = self.entry.id(),
                        "the server does not speak the protocol; the session is ended"
                    );
                    return Err(Step::End(End::ServerLost));
                }
            };
            let whole = HEADER_BYTES + header.body_bytes as usize;
            let is_whole = held >= whole;
            let is_read = matches!(
                header.tag,
                backend::READY_FOR_QUERY
                    | backend::PARAMETER_STATUS
                    | backend::ERROR_RESPONSE
                    | backend::COMMAND_COMPLETE
            );
            // What stands in front of it goes to the client first. Only a frame that fills the block alone passes unread.
            if is_read && !is_whole && (looked_at > 0 || !self.down.buffer.is_full()) {
                return Ok(());
            }
            let shown = self.answered(header, is_whole);
            match shown {
                Shown::Yes => {}
                Shown::No => {
                    // Only small frames, and errors that are there as a whole, are not shown.
                    self.down.buffer.remove(looked_at, whole.min(held));
                    self.end_of_frame(header)?;
                    continue;
                }
                Shown::As(tag) => self.down.buffer.set(looked_at, tag),
            }
            let passing = whole.min(held);
            self.show(passing);
            self.down.body_left = whole - passing;
            self.end_of_frame(header)?;
        }
    }

    /// The next `count` bytes may be written to the client.
    fn show(&mut self, count: usize) {
        if self.sampling.is_some() {
            self.sample_answer(count);
        }
        self.down.looked_at += count;
    }

    /// Whether the transaction is over, where it may be: at a ReadyForQuery, and after what a server says unasked, which
    /// may have come along behind one.
    fn end_of_frame(&mut self, header: Header) -> Result<(), Step> {
        match header.tag {
            backend::READY_FOR_QUERY
            | backend::PARAMETER_STATUS
            | backend::NOTICE_RESPONSE
            | backend::NOTIFICATION_RESPONSE => self.leave_if_quiet(),
            _ => Ok(()),
        }
    }

    fn answered(&mut self, header: Header, is_whole: bool) -> Shown {
        let tag = header.tag;
        self.down.last_was_error = tag == backend::ERROR_RESPONSE;
        if let Some(sampling) = self.sampling.as_mut().filter(|_| self.down.last_was_error) {
            sampling.on_server_error();
        }
        if tag == backend::COMMAND_COMPLETE && is_whole && self.slows() {
            let body = &self.down.buffer.filled()[self.down.looked_at + HEADER_BYTES..];
            self.brake.completed(&body[..header.body_bytes as usize]);
        }
        match tag {
            backend::READY_FOR_QUERY => return self.ready(),
            backend::PARAMETER_STATUS => {
                if is_whole {
                    let body = &self.down.buffer.filled()[self.down.looked_at + HEADER_BYTES..];
                    let body = &body[..header.body_bytes as usize];
                    if let Some(link) = &mut self.link {
                        link.note_parameter(body);
                    }
                }
                return Shown::Yes;
            }
            backend::COPY_IN_RESPONSE if self.slows() => self.brake.copies_in(),
            backend::ERROR_RESPONSE if is_whole => self.look_at_error(header),
            backend::COMMAND_COMPLETE if is_whole && self.traces.outlive() => self.look_at_command(header),
            _ => {}
        }
        self.ledger.answered(tag);
        let shown = match self.expected.answered(tag) {
            Meaning::Plain => Shown::Yes,
            Meaning::Ours => Shown::No,
            Meaning::Named { name, statement, known } => {
                self.names.insert(name, statement);
                if known { Shown::As(backend::PARSE_COMPLETE) } else { Shown::Yes }
            }
            Meaning::Overwritten { name, taken, statement } => {
                if let Some(link) = &mut self.link {
                    link.held.remove(taken);
                }
                // Nobody else may find it there.
                self.mending = Mending::Statements;
                self.names.insert(name, statement);
                Shown::Yes
            }
            Meaning::Closed(name) => {
                self.names.remove(&name);
                Shown::Yes
            }
            Meaning::Failed => {
                self.undo_skipped();
                Shown::Yes
            }
        };
        let shown = if self.mending == Mending::Batch { Shown::No } else { shown };
        if shown != Shown::No {
            self.stash.state = StashState::Useless;
        }
        shown
    }

    /// Whether writes are slowed down.
    fn slows(&self) -> bool {
        !self.local.database.write_delay().is_zero()
    }

    fn ready(&mut self) -> Shown {
        let status = self.down.buffer.filled().get(self.down.looked_at + HEADER_BYTES).copied();
        if let Some(status) = status.and_then(TransactionStatus::from_byte) {
            self.ledger.ready(status);
            let slows = self.slows();
            self.brake.ready(status, slows);
        }
        self.expected.answered(backend::READY_FOR_QUERY);
        if self.mending == Mending::Batch { Shown::No } else { Shown::Yes }
    }

    /// A statement whose plan has become useless, or that a connection has lost, is prepared anew. Where nothing of its
    /// batch was answered and no transaction is open, the batch is then sent again: the server has done nothing with it.
    fn look_at_error(&mut self, header: Header) {
        let body = &self.down.buffer.filled()[self.down.looked_at + HEADER_BYTES..][..header.body_bytes as usize];
        let code = error::field(body, b'C').unwrap_or_default();
        let is_mendable = match code {
            // "cached plan must not change result type"
            b"0A000" => error::field(body, b'R') == Some(b"RevalidateCachedQuery"),
            b"26000" => {
                let message = error::field(body, b'M').unwrap_or_default();
                message.windows(STATEMENT_PREFIX.len()).any(|part| part == STATEMENT_PREFIX)
            }
            _ => false,
        };
        if is_mendable {
            let alone = self.stash.state == StashState::Whole && self.ledger.status() == TransactionStatus::Idle;
            self.mending = if alone { Mending::Batch } else { Mending::Statements };
        }
    }

    /// Commands that take prepared statements away.
    fn look_at_command(&mut self, header: Header) {
        let body = &self.down.buffer.filled()[self.down.looked_at + HEADER_BYTES..][..header.body_bytes as usize];
        match body {
            b"DEALLOCATE ALL\0" | b"DISCARD ALL\0" => {
                self.names.clear();
                self.stand_ins.clear();
                self.unnamed.token = 0;
            }
            _ => {}
        }
    }
}
