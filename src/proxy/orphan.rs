//! What is left when a client vanishes in the middle of something.
//!
//! Its backend goes on: an autocommit statement runs to its end and commits, whether anybody reads the answer or not.
//! The session therefore stays inside its gate until the server has said `ReadyForQuery('I')` to everything that was
//! sent, or the server says that the process is gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;

use super::Shared;
use super::backend::Backend;
use super::entry::Entry;
use crate::wire::frame::backend as tags;
use crate::wire::ledger::Ledger;
use crate::wire::message;
use crate::wire::scanner::{Scanner, Sink};

/// Answers are read and thrown away in pieces of this size.
const SINK_BYTES: usize = 16 * 1024;

/// How long a backend that has nothing to do may take to close.
const CLOSING: Duration = Duration::from_secs(5);

/// A backend without a client.
pub(super) struct Remains {
    pub(super) backend: Backend,
    pub(super) ledger: Ledger,
    pub(super) scanner: Scanner,
    /// Not everything that was meant for the server has been written to it, so it would wait for the rest.
    pub(super) cut: bool,
    /// The link to it is gone, or cannot be trusted.
    pub(super) lost: bool,
}

/// Follows answers that nobody gets.
pub(super) struct Answers<'a>(pub(super) &'a mut Ledger);

impl Sink for Answers<'_> {
    fn frame(&mut self, tag: u8, body: &[u8]) {
        match tag {
            tags::READY_FOR_QUERY => {
                if let Ok(status) = message::read_ready_for_query(body) {
                    self.0.ready(status);
                }
            }
            tag => self.0.answered(tag),
        }
    }
}

/// Returns once the backend can do nothing any more on behalf of the client.
pub(super) async fn bury(shared: &Arc<Shared>, entry: &Arc<Entry>, mut remains: Remains) {
    let (server, pid) = (remains.backend.server, remains.backend.connection.pid);
    tracing::info!(session = entry.id(), server = %server, pid, "client gone in the middle of something; its backend is watched");
    if !remains.cut && !remains.lost && read_to_the_end(&mut remains).await {
        if remains.ledger.is_quiet() {
            // It said I and has nothing to do: whether it closes now or later changes nothing.
            let _closed = tokio::time::timeout(CLOSING, remains.backend.connection.terminate()).await;
            return;
        }
        // In a transaction: Terminate aborts it.
        let _sent = remains.backend.connection.send(&message::TERMINATE).await;
    }
    // Where a frame was cut, or the server waits for this client, the closed socket ends it.
    drop(remains.backend);
    shared.departures.gone(server, pid).await;
    tracing::info!(session = entry.id(), server = %server, pid, "the backend of a vanished client has ended");
}

/// Reads what the server answers until nothing is outstanding. False: the server waits for the client, or is lost.
async fn read_to_the_end(remains: &mut Remains) -> bool {
    let mut piece = vec![0; SINK_BYTES];
    loop {
        if remains.ledger.server_waits() {
            return false;
        }
        if !remains.ledger.awaits_ready() {
            return true;
        }
        match remains.backend.connection.stream.read(&mut piece).await {
            Ok(0) | Err(_) => return false,
            Ok(count) => {
                if remains.scanner.scan(&piece[..count], &mut Answers(&mut remains.ledger)).is_err() {
                    return false;
                }
            }
        }
    }
}
