//! Transactions that may be samples of shadow reads, on their way: what the client sends and what it is sent is copied.
//!
//! Nothing here may wait, or keep a frame back. While no shadow reads are on, `sampling` is empty.

use std::time::Instant;

use super::{Place, PooledSession};
use crate::proxy::shadow::Sampling;
use crate::switch::ServerRole;
use crate::wire::frame::{Header, frontend, take_cstr};

impl PooledSession {
    /// A transaction begins while shadow reads may be on.
    #[cold]
    pub(super) fn begin_sample(&mut self) {
        if self.server != Some(ServerRole::Source) {
            self.sampling = None;
            return;
        }
        // One whose connection was of no use begins again, and has sent nothing.
        if self.sampling.is_none() {
            let desk = &self.worker.shared.sessions.shadow;
            self.sampling = Sampling::begin(desk, &self.login, &self.profile, &self.told);
        }
    }

    /// A frame of the client's is about to be sent on.
    #[cold]
    pub(super) fn sample_frame(&mut self, header: Header) {
        let Some(sampling) = self.sampling.take() else { return };
        let body = self.body(header);
        let mut names = body;
        let name =
            (header.tag == frontend::BIND).then(|| take_cstr(&mut names).and_then(|_portal| take_cstr(&mut names)));
        self.sampling = match name.flatten() {
            None => sampling.on_client_frame(header, body, None),
            Some([]) => {
                let known = self.unnamed.body.get(1..).filter(|_| self.unnamed.token != 0);
                sampling.on_client_frame(header, body, known)
            }
            Some(name) => {
                let statement = self.statement_of(name);
                sampling.on_client_frame(header, body, statement.as_ref().map(|statement| &statement.tail[..]))
            }
        };
    }

    /// The next `count` bytes of the server's go to the client.
    #[cold]
    pub(super) fn sample_answer(&mut self, count: usize) {
        let bytes = &self.down.buffer.filled()[self.down.looked_at..][..count];
        self.sampling = self.sampling.take().and_then(|sampling| sampling.on_server_bytes(bytes));
    }

    /// The transaction is over: everything that was asked is answered.
    #[cold]
    pub(super) fn end_sample(&mut self) {
        let (Some(sampling), Place::Inside { since }) = (self.sampling.take(), self.place) else { return };
        sampling.end(Instant::now().saturating_duration_since(since));
    }
}
