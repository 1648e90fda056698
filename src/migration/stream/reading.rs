//! Reading the stream, on a thread of its own.
//!
//! A walsender sends every message by itself. A receiver that waits for each is woken for each, and the waking is done by
//! the walsender: that takes it about as long as decoding the change. So while changes come without end, the reader sleeps for
//! a moment and then takes all that has come, which nearly doubles what the source sends. Nothing else may run on this
//! thread, because a runtime with work left would be woken all the same. When little comes, nothing is delayed.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::{PERMIT_BYTES, StreamContext};
use crate::lsn::Lsn;
use crate::migration::apply::applier::Received;
use crate::pgoutput::{self, Message};
use crate::postgres::RawError;
use crate::postgres::walsender::{
    Age, Feedback, ReplicationConnection, ReplicationMessage, ReplicationStream, WalsenderError,
};

/// Messages that have come together go through the queue together, up to this size.
const TOGETHER_BYTES: usize = 32 * 1024;

/// What a message costs beside its bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 128;

/// A transaction that the source sends so much later than it was committed belongs to a backlog.
const BACKLOG_US: i64 = 1_000_000;

/// A stream that is being read. Dropping it ends the reading; the socket to the source is then closed.
#[derive(Debug)]
pub(super) struct Reading {
    thread: JoinHandle<WalsenderError>,
    started: Option<oneshot::Receiver<Feedback>>,
    /// Closed when this is dropped.
    _stop: oneshot::Sender<()>,
}

impl Reading {
    /// Starts to read the context's slot at `from` into the queue. Where it is, is told to `received`.
    pub(super) fn begin(
        context: &StreamContext,
        from: Lsn,
        queue: mpsc::Sender<Received>,
        received: Arc<watch::Sender<Lsn>>,
    ) -> Self {
        let (start, started) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let context = context.clone();
        let thread = tokio::task::spawn_blocking(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(source) => {
                    let (label, doing) = ("source".to_owned(), "starting to read".to_owned());
                    return RawError::Io { label, doing, source }.into();
                }
            };
            runtime.block_on(async {
                // Whoever has dropped the other end does not ask for an answer.
                tokio::select! {
                    error = read(&context, from, start, queue, &received) => error,
                    _ = stopped => WalsenderError::Raw(interrupted()),
                }
            })
        });
        Self { thread, started: Some(started), _stop: stop }
    }

    /// Waits until the stream has begun.
    pub(super) async fn started(&mut self) -> Result<Feedback, WalsenderError> {
        let feedback = match self.started.take() {
            Some(started) => started.await.ok(),
            None => None,
        };
        match feedback {
            Some(feedback) => Ok(feedback),
            None => Err(self.failed().await),
        }
    }

    /// Waits until the stream has ended. Nothing is lost by dropping the future.
    pub(super) async fn failed(&mut self) -> WalsenderError {
        (&mut self.thread).await.unwrap_or_else(|_| WalsenderError::Raw(interrupted()))
    }
}

fn interrupted() -> RawError {
    let source = std::io::ErrorKind::Interrupted.into();
    RawError::Io { label: "source".to_owned(), doing: "reading the stream".to_owned(), source }
}

async fn read(
    context: &StreamContext,
    from: Lsn,
    start: oneshot::Sender<Feedback>,
    queue: mpsc::Sender<Received>,
    received: &watch::Sender<Lsn>,
) -> WalsenderError {
    let started = async {
        let replication = ReplicationConnection::connect(&context.source, &context.database).await?;
        replication.start(&context.slot, from, &context.publication, 1).await
    };
    let mut stream = match started.await {
        Ok(stream) => stream,
        Err(error) => return error,
    };
    stream.has_own_thread();
    if start.send(stream.feedback()).is_err() {
        return WalsenderError::Raw(interrupted());
    }
    match into_queue(stream, queue, received, context.queue_bytes).await {
        Ok(()) => std::future::pending().await,
        Err(error) => error,
    }
}

/// Reads as long as there is memory for it; returns when nobody takes it any more: the applier has ended, and its error is
/// the one to report.
async fn into_queue(
    mut stream: ReplicationStream,
    queue: mpsc::Sender<Received>,
    received: &watch::Sender<Lsn>,
    queue_bytes: usize,
) -> Result<(), WalsenderError> {
    let permits = (queue_bytes / PERMIT_BYTES).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
    let memory = Arc::new(Semaphore::new(permits));
    let mut next = None;
    loop {
        let message = match next.take() {
            Some(message) => message,
            None => stream.next().await?,
        };
        let (item, position) = match message {
            ReplicationMessage::XLogData { mut end, sent_at_us, data, .. } => {
                let mut age = age_of(&data, sent_at_us);
                let mut together = Together::of(data);
                // What has come with it goes with it.
                while together.cost < TOGETHER_BYTES && next.is_none() {
                    match stream.at_hand().await? {
                        Some(ReplicationMessage::XLogData { end: later, sent_at_us, data, .. })
                            if data.len() < TOGETHER_BYTES =>
                        {
                            age = age_of(&data, sent_at_us).or(age);
                            end = end.max(later);
                            together.add(&data);
                        }
                        Some(other) => next = Some(other),
                        None => break,
                    }
                }
                if let Some(age) = age {
                    stream.is_of_age(age);
                }
                // A message as large as the queue must not wait for all of it: what came before it in its transaction keeps
                // some until that ends.
                let cost = together.cost.div_ceil(PERMIT_BYTES).min((permits / 2).max(1));
                let cost = u32::try_from(cost).unwrap_or(u32::MAX);
                let memory = memory.clone().acquire_many_owned(cost).await.expect("never closed");
                (Received::Data { messages: together.into_messages(), memory }, end)
            }
            ReplicationMessage::Keepalive { end, .. } => (Received::UpTo(end), end),
        };
        received.send_if_modified(|known| std::mem::replace(known, position.max(*known)) < position);
        if queue.send(item).await.is_err() {
            return Ok(());
        }
    }
}

/// How old a transaction is that begins here, by the source's own clock.
fn age_of(data: &Bytes, sent_at_us: i64) -> Option<Age> {
    if data.first() != Some(&b'B') {
        return None;
    }
    match pgoutput::decode(data, false) {
        Ok(Message::Begin(begin)) if sent_at_us.saturating_sub(begin.timestamp.0) > BACKLOG_US => Some(Age::Old),
        // What cannot be read is reported where it is applied.
        Ok(_) | Err(_) => Some(Age::Fresh),
    }
}

/// Messages that go through the queue together. They are copied into memory of their own: what they were read into is
/// shared with the reading thread, and two threads that count the same references all the time slow each other down; it
/// would also be kept as a whole by the last of them.
#[derive(Debug)]
struct Together {
    /// The first one, where it is too long to be copied: nothing comes with it.
    long: Option<Bytes>,
    copied: BytesMut,
    lengths: Vec<usize>,
    cost: usize,
}

impl Together {
    fn of(first: Bytes) -> Self {
        let mut together = Self { long: None, copied: BytesMut::new(), lengths: Vec::new(), cost: 0 };
        if first.len() < TOGETHER_BYTES {
            together.add(&first);
        } else {
            together.cost = cost_of(&first);
            together.long = Some(first);
        }
        together
    }

    fn add(&mut self, data: &Bytes) {
        self.copied.extend_from_slice(data);
        self.lengths.push(data.len());
        self.cost += cost_of(data);
    }

    fn into_messages(self) -> Vec<Bytes> {
        let mut copied = self.copied.freeze();
        self.long.into_iter().chain(self.lengths.into_iter().map(|length| copied.split_to(length))).collect()
    }
}

fn cost_of(data: &Bytes) -> usize {
    data.len() + MESSAGE_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_as_old_as_its_commit_when_it_is_sent() {
        let begin = |committed_us: i64| {
            Bytes::from([&b"B"[..], &[0; 8], &committed_us.to_be_bytes(), &[0, 0, 2, 230]].concat())
        };
        assert_eq!(age_of(&begin(5_000_000), 5_000_000 + BACKLOG_US), Some(Age::Fresh));
        assert_eq!(age_of(&begin(5_000_000), 5_000_001 + BACKLOG_US), Some(Age::Old));
        assert_eq!(age_of(&begin(5_000_000), 0), Some(Age::Fresh), "a clock that was set back");
        assert_eq!(age_of(&Bytes::from_static(b"I"), i64::MAX), None);
    }

    #[test]
    fn messages_come_out_as_they_went_in() {
        let mut together = Together::of(Bytes::from_static(b"first"));
        together.add(&Bytes::new());
        together.add(&Bytes::from_static(b"third"));
        assert_eq!(together.cost, 10 + 3 * MESSAGE_OVERHEAD_BYTES);
        assert_eq!(together.into_messages(), [&b"first"[..], b"", b"third"]);
        let long = Bytes::from(vec![7; TOGETHER_BYTES]);
        let alone = Together::of(long.clone());
        assert!(alone.cost >= TOGETHER_BYTES, "nothing is added to it");
        assert_eq!(alone.into_messages(), [long]);
    }
}
