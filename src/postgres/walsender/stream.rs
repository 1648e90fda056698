//! A running stream: the reading half with its owner, the writing half with a task that sends statuses.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};
use std::{fmt, io};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::WalsenderError;
use super::nap::{Age, Naps};
use crate::lsn::Lsn;
use crate::postgres::frame::{MAX_FRAME_BYTES, take_frame};
use crate::postgres::stall::{Silence, StallWatch};
use crate::postgres::{Frame, RawConnection, RawError, Stream};

/// Every status asks for a keepalive in return, so a stream this silent is dead. Generous: old servers answer nothing
/// while they decode a long transaction of which nothing is published. Where the server can be asked what its walsender
/// does, a dead link is noticed earlier ([`StallWatch`]).
const MAX_SILENCE: Duration = Duration::from_secs(600);

/// Memory that messages are read into, piece by piece.
const READ_BYTES: usize = 256 * 1024;

/// Read from the socket at a time, at least.
const MIN_ROOM_BYTES: usize = 32 * 1024;

/// Microseconds from 1970-01-01 to 2000-01-01, PostgreSQL's epoch.
const POSTGRES_EPOCH_US: u128 = 946_684_800_000_000;

/// Changed positions are gathered for this long; the server writes the slot to disk for some of them.
const MIN_GAP: Duration = Duration::from_millis(100);

/// One message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicationMessage {
    /// One message of the output plugin.
    XLogData {
        /// Position of the record that it was decoded from.
        start: Lsn,
        /// The same again, in logical replication.
        end: Lsn,
        /// When it was sent, in microseconds since 2000-01-01 00:00:00 UTC by the source's clock.
        sent_at_us: i64,
        /// The plugin's message, for `pgoutput::decode`.
        data: Bytes,
    },
    /// The server is alive. The answer it may ask for is given by the stream itself.
    Keepalive {
        /// Everything that commits before this position has been sent.
        end: Lsn,
        /// The server was waiting for a status.
        reply_requested: bool,
    },
}

/// Whether the runtime has asked the system which sockets can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    NotAsked,
    Asked,
}

/// What the writing task has to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outgoing {
    written: Lsn,
    flushed: Lsn,
    applied: Lsn,
    /// Counts up whenever a status must go out at once.
    urgent: u64,
    /// Say goodbye after the next status.
    ending: bool,
}

/// Reports positions, from any task, without waiting: also while nobody reads the stream. Cheap to clone; after the
/// stream has ended it does nothing.
#[derive(Clone, Debug)]
pub struct Feedback {
    outgoing: Arc<watch::Sender<Outgoing>>,
}

impl Feedback {
    /// Reports what was received, what is durable on the target, and what is visible there. `flushed` releases the
    /// source's WAL up to there for ever. A position behind one reported earlier changes nothing.
    pub fn send_status(&self, written: Lsn, flushed: Lsn, applied: Lsn) {
        self.outgoing.send_if_modified(|outgoing| {
            let before = *outgoing;
            outgoing.written = before.written.max(written);
            outgoing.flushed = before.flushed.max(flushed);
            outgoing.applied = before.applied.max(applied);
            before != *outgoing
        });
    }

    /// Sends the status at once.
    fn hurry(&self) {
        self.outgoing.send_modify(|outgoing| outgoing.urgent += 1);
    }
}

/// A running stream. Dropping it closes the connection; the server then releases the slot when it notices.
pub struct ReplicationStream {
    socket: ReadHalf<Stream>,
    read_buf: BytesMut,
    label: String,
    feedback: Feedback,
    naps: Naps,
    watch: Option<StallWatch>,
    silence: Silence,
    /// Holds the writing half; ended by [`Self::stop`] or by dropping.
    writer: JoinHandle<io::Result<()>>,
}

impl fmt::Debug for ReplicationStream {
    /// Not what is in the buffer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReplicationStream({}, {:?})", self.label, self.feedback)
    }
}

impl ReplicationStream {
    pub(super) fn new(mut connection: RawConnection, period: Duration) -> Self {
        let label = connection.label().to_owned();
        let mut watch = connection.take_watch();
        // The server answers statuses, and says nothing else while it has nothing to say.
        watch.iter_mut().for_each(|watch| watch.looks_at_most_every(2 * period));
        let (socket, write_half) = tokio::io::split(connection.stream);
        let (outgoing, said) = watch::channel(Outgoing::default());
        let writer = tokio::spawn(write_statuses(write_half, said, period));
        let feedback = Feedback { outgoing: Arc::new(outgoing) };
        let naps = Naps::new();
        Self {
            socket,
            read_buf: connection.read_buf,
            label,
            feedback,
            naps,
            watch,
            silence: Silence::default(),
            writer,
        }
    }

    /// A handle to report positions with.
    pub fn feedback(&self) -> Feedback {
        self.feedback.clone()
    }

    /// Says that nothing else runs on this thread: while changes come without end, it then sleeps between two reads, which
    /// spares the server the waking.
    pub fn has_own_thread(&mut self) {
        self.naps.own_thread = true;
    }

    /// Says how old what comes is. Only on a thread of its own it makes a difference.
    pub fn is_of_age(&mut self, age: Age) {
        self.naps.age = age;
    }

    /// See [`Feedback::send_status`].
    pub fn send_status(&self, written: Lsn, flushed: Lsn, applied: Lsn) {
        self.feedback.send_status(written, flushed, applied);
    }

    /// The next message. Dropping the future loses nothing. An error ends the stream.
    pub async fn next(&mut self) -> Result<ReplicationMessage, WalsenderError> {
        loop {
            let frame = self.next_frame().await?;
            if let Some(message) = self.understand(frame)? {
                return Ok(message);
            }
        }
    }

    /// A message that has come already; none: the next one must be waited for. Dropping the future loses nothing.
    pub async fn at_hand(&mut self) -> Result<Option<ReplicationMessage>, WalsenderError> {
        loop {
            while let Some(frame) = self.frame_at_hand()? {
                if let Some(message) = self.understand(frame)? {
                    return Ok(Some(message));
                }
            }
            if self.naps.due() || !self.read_at_once().await? {
                return Ok(None);
            }
        }
    }

    fn understand(&self, frame: Frame) -> Result<Option<ReplicationMessage>, WalsenderError> {
        match frame.tag {
            b'd' => {
                let message = replication_message(frame.body)
                    .ok_or_else(|| self.violation("malformed replication message".to_owned()))?;
                if let ReplicationMessage::Keepalive { reply_requested: true, .. } = message {
                    self.feedback.hurry();
                }
                Ok(Some(message))
            }
            b'E' => Err(RawError::from_error_response(&frame.body).into()),
            b'N' | b'S' => Ok(None),
            // CopyDone and CommandComplete: the server shuts down, or its walsender was told to.
            b'c' | b'C' => Err(self.lost(io::ErrorKind::UnexpectedEof.into()).into()),
            other => Err(self.violation(format!("message {:?} in the stream", char::from(other))).into()),
        }
    }

    /// Sends the last status and ends the connection; when it returns, the walsender is gone and the slot is free.
    pub async fn stop(mut self) -> Result<(), WalsenderError> {
        self.feedback.outgoing.send_modify(|outgoing| outgoing.ending = true);
        let said_goodbye = async {
            // Read on, so that a walsender blocked on a full socket comes to our goodbye.
            loop {
                self.read_buf.clear();
                self.read_buf.reserve(READ_BYTES);
                match self.socket.read_buf(&mut self.read_buf).await {
                    Ok(0) => return Ok(()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
        };
        let ended = match tokio::time::timeout(MAX_SILENCE, said_goodbye).await {
            Ok(ended) => ended,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        ended.map_err(|error| self.lost(error))?;
        Ok(())
    }

    fn frame_at_hand(&mut self) -> Result<Option<Frame>, RawError> {
        take_frame(&mut self.read_buf, MAX_FRAME_BYTES).map_err(|what| self.violation(what))
    }

    async fn next_frame(&mut self) -> Result<Frame, RawError> {
        loop {
            if let Some(frame) = self.frame_at_hand()? {
                return Ok(frame);
            }
            if !self.naps.due() && self.read_at_once().await? {
                continue;
            }
            // The rest of a long message is on its way.
            if self.naps.own_thread && self.read_buf.len() < MIN_ROOM_BYTES {
                self.naps.take();
            }
            self.make_room();
            let read = self.socket.read_buf(&mut self.read_buf);
            let read = async {
                match &self.watch {
                    Some(watch) => watch.wait_in(&mut self.silence, read).await,
                    None => read.await,
                }
            };
            match tokio::time::timeout(MAX_SILENCE, read).await {
                Ok(read) => self.has_read(read)?,
                Err(_) => return Err(self.lost(io::ErrorKind::TimedOut.into())),
            }
        }
    }

    /// Reads what can be read without waiting; false: nothing can.
    async fn read_at_once(&mut self) -> Result<bool, RawError> {
        self.make_room();
        for driver in [Driver::NotAsked, Driver::Asked] {
            if driver == Driver::Asked {
                // The runtime takes a socket that gave less than it could for an empty one, until it has asked the system.
                tokio::task::yield_now().await;
            }
            if let Poll::Ready(read) = futures_util::poll!(pin!(self.socket.read_buf(&mut self.read_buf))) {
                return self.has_read(read).map(|()| true);
            }
        }
        Ok(false)
    }

    /// Messages keep the whole piece of memory that they were read into: it is used up before there is another.
    fn make_room(&mut self) {
        if self.read_buf.capacity() - self.read_buf.len() < MIN_ROOM_BYTES {
            self.read_buf.reserve(READ_BYTES);
        }
    }

    fn has_read(&mut self, read: io::Result<usize>) -> Result<(), RawError> {
        match read {
            Ok(0) => Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                self.naps.read(count);
                Ok(())
            }
            Err(error) => Err(self.lost(error)),
        }
    }

    fn lost(&self, source: io::Error) -> RawError {
        RawError::Io { label: self.label.clone(), doing: "streaming changes".to_owned(), source }
    }

    fn violation(&self, what: String) -> RawError {
        RawError::Protocol { label: self.label.clone(), what }
    }
}

impl Drop for ReplicationStream {
    fn drop(&mut self) {
        // The writing half must not outlive the reading half: the socket would stay open, and the slot taken.
        self.writer.abort();
    }
}

/// Sends statuses until told to stop, until every [`Feedback`] is gone, or until the link breaks (which the reading
/// side notices too, and reports).
async fn write_statuses(
    mut socket: WriteHalf<Stream>,
    mut said: watch::Receiver<Outgoing>,
    period: Duration,
) -> io::Result<()> {
    loop {
        let outgoing = *said.borrow_and_update();
        socket.write_all(&status_message(&outgoing, SystemTime::now())).await?;
        socket.flush().await?;
        if outgoing.ending {
            // Terminate: the walsender ends at once, even in the middle of a transaction.
            socket.write_all(&[b'X', 0, 0, 0, 4]).await?;
            return socket.flush().await;
        }
        if until_due(&mut said, &outgoing, period).await.is_err() {
            return Ok(());
        }
    }
}

/// Waits until the next status is due: at once when urgent, soon after a change, else after `period`.
async fn until_due(
    said: &mut watch::Receiver<Outgoing>,
    sent: &Outgoing,
    period: Duration,
) -> Result<(), watch::error::RecvError> {
    let mut due = Instant::now() + period;
    loop {
        tokio::select! {
            // A sleep and a watch both lose nothing when dropped: the deadline and the value are kept outside.
            () = tokio::time::sleep_until(due) => return Ok(()),
            changed = said.changed() => {
                changed?;
                let outgoing = *said.borrow_and_update();
                if outgoing.ending || outgoing.urgent != sent.urgent {
                    return Ok(());
                }
                due = due.min(Instant::now() + MIN_GAP);
            }
        }
    }
}

/// CopyData with a standby status update that asks for a keepalive in return.
fn status_message(outgoing: &Outgoing, now: SystemTime) -> BytesMut {
    let unix_us = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let now_us = i64::try_from(unix_us.saturating_sub(POSTGRES_EPOCH_US)).unwrap_or(i64::MAX);
    let mut message = BytesMut::with_capacity(39);
    message.put_u8(b'd');
    message.put_u32(38);
    message.put_u8(b'r');
    message.put_u64(outgoing.written.0);
    message.put_u64(outgoing.flushed.0);
    message.put_u64(outgoing.applied.0);
    message.put_i64(now_us);
    message.put_u8(1);
    message
}

/// The content of a CopyData; `None` where it is malformed.
pub(in crate::postgres) fn replication_message(mut body: Bytes) -> Option<ReplicationMessage> {
    let (kind, header) = (*body.first()?, body.get(1..)?);
    match kind {
        b'w' if header.len() >= 24 => {
            body.advance(1);
            let (start, end, sent_at_us) = (Lsn(body.get_u64()), Lsn(body.get_u64()), body.get_i64());
            Some(ReplicationMessage::XLogData { start, end, sent_at_us, data: body })
        }
        b'k' if header.len() == 17 => {
            body.advance(1);
            let (end, _sent_at) = (Lsn(body.get_u64()), body.get_u64());
            Some(ReplicationMessage::Keepalive { end, reply_requested: body.get_u8() != 0 })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn naps_lose_nothing_of_a_backlog() {
        let (ours, mut server) = tokio::net::UnixStream::pair().expect("a pair");
        let connection = RawConnection::before_login(Stream::Unix(ours), "source");
        let mut stream = ReplicationStream::new(connection, Duration::from_secs(10));
        stream.has_own_thread();
        stream.is_of_age(Age::Old);
        let total = 3000;
        let sending = tokio::spawn(async move {
            for number in 0..total {
                let message = [&b"d\0\0\0\x26w"[..], &[0; 24], format!("{number:09}").as_bytes()].concat();
                server.write_all(&message).await.expect("somebody reads");
            }
            server
        });
        let (mut received, mut next) = (0, Some(stream.next().await.expect("a message")));
        while let Some(message) = next {
            let ReplicationMessage::XLogData { data, .. } = message else { panic!("{message:?}") };
            assert_eq!(data, format!("{received:09}"));
            received += 1;
            next = match stream.at_hand().await.expect("the stream is whole") {
                None if received < total => Some(stream.next().await.expect("a message")),
                at_hand => at_hand,
            };
        }
        assert_eq!(received, total);
        drop(sending.await.expect("sent"));
    }

    #[test]
    fn status_is_laid_out_as_documented() {
        let outgoing = Outgoing { written: Lsn(3), flushed: Lsn(2), applied: Lsn(1), ..Outgoing::default() };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(946_684_801);
        let mut expected = vec![b'd', 0, 0, 0, 38, b'r'];
        for value in [3u64, 2, 1, 1_000_000] {
            expected.extend(value.to_be_bytes());
        }
        expected.push(1);
        assert_eq!(status_message(&outgoing, now)[..], expected[..]);
    }

    #[test]
    fn messages_are_read_and_malformed_ones_refused() {
        let data = [&[b'w'][..], &[0; 7], &[5], &[0; 7], &[6], &[0; 7], &[7], b"B"].concat();
        let body = Bytes::from_static(b"B");
        let expected = ReplicationMessage::XLogData { start: Lsn(5), end: Lsn(6), sent_at_us: 7, data: body };
        assert_eq!(replication_message(Bytes::from(data)), Some(expected));
        let keepalive = [&[b'k'][..], &[0; 7], &[9], &[0; 8], &[1]].concat();
        let expected = ReplicationMessage::Keepalive { end: Lsn(9), reply_requested: true };
        assert_eq!(replication_message(Bytes::from(keepalive)), Some(expected));
        for bad in [&b""[..], b"w", b"k12345678", b"x12345678901234567890123456789"] {
            assert_eq!(replication_message(Bytes::copy_from_slice(bad)), None, "{bad:?}");
        }
    }

    #[test]
    fn reported_positions_never_go_back() {
        let (outgoing, said) = watch::channel(Outgoing::default());
        let feedback = Feedback { outgoing: Arc::new(outgoing) };
        feedback.send_status(Lsn(9), Lsn(5), Lsn(5));
        feedback.send_status(Lsn(7), Lsn(6), Lsn(4));
        let seen = *said.borrow();
        assert_eq!((seen.written, seen.flushed, seen.applied), (Lsn(9), Lsn(6), Lsn(5)));
    }

    /// The writing task alone, over a socket pair that nobody reads on our side.
    struct Writer {
        server: tokio::net::UnixStream,
        feedback: Feedback,
        task: JoinHandle<io::Result<()>>,
        _read_half: ReadHalf<Stream>,
    }

    impl Writer {
        fn start(period: Duration) -> Self {
            let (ours, server) = tokio::net::UnixStream::pair().expect("socket pair");
            let (read_half, write_half) = tokio::io::split(Stream::Unix(ours));
            let (outgoing, said) = watch::channel(Outgoing::default());
            let feedback = Feedback { outgoing: Arc::new(outgoing) };
            let task = tokio::spawn(write_statuses(write_half, said, period));
            Self { server, feedback, task, _read_half: read_half }
        }

        /// The flushed position of the next status that the server gets.
        async fn flushed(&mut self) -> u64 {
            let mut status = [0u8; 39];
            self.server.read_exact(&mut status).await.expect("a status");
            u64::from_be_bytes(status[14..22].try_into().expect("8 bytes"))
        }
    }

    #[tokio::test]
    async fn statuses_flow_while_nobody_reads_or_reports() {
        let mut writer = Writer::start(Duration::from_millis(1));
        for _ in 0..5 {
            assert_eq!(writer.flushed().await, 0);
        }
    }

    /// With a period of an hour, what arrives has been sent for its own reason.
    #[tokio::test]
    async fn changes_requests_and_the_end_do_not_wait_for_the_period() {
        let mut writer = Writer::start(Duration::from_secs(3600));
        assert_eq!(writer.flushed().await, 0);
        writer.feedback.send_status(Lsn(7), Lsn(7), Lsn(7));
        writer.feedback.send_status(Lsn(8), Lsn(8), Lsn(8));
        assert_eq!(writer.flushed().await, 8, "changes are gathered");
        writer.feedback.hurry();
        assert_eq!(writer.flushed().await, 8);
        writer.feedback.send_status(Lsn(9), Lsn(9), Lsn(9));
        writer.feedback.outgoing.send_modify(|outgoing| outgoing.ending = true);
        assert_eq!(writer.flushed().await, 9, "the last status comes before the goodbye");
        let mut goodbye = [0; 5];
        writer.server.read_exact(&mut goodbye).await.expect("goodbye");
        assert_eq!(goodbye, [b'X', 0, 0, 0, 4]);
        writer.task.await.expect("no panic").expect("no error");
    }
}
