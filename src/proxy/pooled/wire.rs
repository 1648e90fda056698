//! The loop: reads, lets pass, writes, in both directions, as far as the sockets allow.

use std::task::{Context, Poll};

use super::{Place, PooledSession, Step};
use crate::proxy::flow::{self, Progress};
use crate::proxy::hold::says_terminate;
use crate::proxy::session::End;

impl PooledSession {
    /// Serves as much as the sockets allow. Ready when something else is to be done.
    pub(super) fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        if self.entry.has_orders() {
            return Poll::Ready(Step::Orders);
        }
        let mut rounds = 0;
        loop {
            let up = match self.pump_up(cx) {
                Ok(up) => up,
                Err(step) => return Poll::Ready(step),
            };
            let down = match self.pump_down(cx) {
                Ok(down) => down,
                Err(step) => return Poll::Ready(step),
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
        if let Err(step) = self.watch_waiting_client(cx) {
            return Poll::Ready(step);
        }
        self.up.buffer.release();
        self.up.out.release();
        self.down.buffer.release();
        self.unnamed.release();
        Poll::Pending
    }

    /// Client to server, at most a block.
    fn pump_up(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        let was_full = self.up.buffer.is_full();
        let read = self.read_client(cx)?;
        self.pass_frames()?;
        let written = self.write_server(cx)?;
        if self.up.terminated {
            // Only the end of the stream is of interest now.
            self.up.buffer.consume(self.up.buffer.len());
            // A transaction that it leaves open is rolled back, and a COPY that it leaves open fails.
            let is_answered = !self.ledger.awaits_ready() || self.ledger.server_waits();
            if is_answered && self.up.out.is_empty() && self.down.buffer.is_empty() {
                return Err(Step::End(End::ClientLeft));
            }
        }
        // Who has said Terminate has closed as it should; one who has not is gone, and wants nothing any more.
        if self.up.ended && self.up.out.is_empty() && !says_terminate(self.up.buffer.filled()) {
            return Err(Step::End(End::ClientLeft));
        }
        // Room that was made, also by throwing away, is read into at once: nothing else has us woken when more comes.
        let has_room = if was_full && !self.up.buffer.is_full() { Progress::Some } else { Progress::None };
        Ok(read.or(has_room).or(written))
    }

    fn read_client(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        if self.up.ended || self.up.buffer.is_full() {
            return Ok(Progress::None);
        }
        match flow::read(&mut self.client, &mut self.up.buffer, cx) {
            Poll::Pending => Ok(Progress::None),
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

    fn write_server(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        let Some(link) = &mut self.link else { return Ok(Progress::None) };
        let mut most = self.up.out.len();
        match flow::write(&mut link.backend.connection.stream, &mut self.up.out, &mut most, cx) {
            Err(_) => self.after_write_error(cx),
            Ok(0) => Ok(Progress::None),
            Ok(count) => {
                self.local.meters.sent_up(count);
                if self.up.out.is_empty() && self.ledger.readies() != self.entered_turn {
                    // The rest of a COPY that had failed before all of it was sent: no answer will end our stay inside.
                    self.leave_if_quiet()?;
                }
                Ok(Progress::Some)
            }
        }
    }

    /// The server may have said why before it closed.
    fn after_write_error(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        while let Ok(Progress::Some) = self.read_server(cx) {
            if self.down.buffer.is_full() {
                break;
            }
        }
        Err(Step::End(End::ServerLost))
    }

    /// Server to client, at most a block.
    fn pump_down(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        let read = match self.read_server(cx) {
            Ok(read) => read,
            Err(step @ (Step::Settle | Step::Mend)) => {
                // The client need not wait for what is done after its transaction.
                self.write_client(cx)?;
                return Err(step);
            }
            Err(step) => return Err(step),
        };
        let written = self.write_client(cx)?;
        Ok(read.or(written))
    }

    fn read_server(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        let Some(link) = &mut self.link else { return Ok(Progress::None) };
        if self.down.buffer.is_full() {
            return Ok(Progress::None);
        }
        match flow::read(&mut link.backend.connection.stream, &mut self.down.buffer, cx) {
            Poll::Pending => Ok(Progress::None),
            Poll::Ready(Ok(0) | Err(_)) => Err(Step::End(End::ServerLost)),
            Poll::Ready(Ok(count)) => {
                self.down.buffer.fill(count);
                self.look_at_answers()?;
                Ok(Progress::Some)
            }
        }
    }

    fn write_client(&mut self, cx: &mut Context<'_>) -> Result<Progress, Step> {
        if self.brake.is_on() && self.brake.holds(self.local.database.write_delay(), cx) {
            return Ok(Progress::None);
        }
        match flow::write(&mut self.client, &mut self.down.buffer, &mut self.down.looked_at, cx) {
            Err(_) => Err(Step::End(End::ClientLeft)),
            Ok(0) => Ok(Progress::None),
            Ok(count) => {
                self.local.meters.sent_down(count);
                Ok(Progress::Some)
            }
        }
    }
}
