//! A connection at the level of protocol frames: what proxied sessions, COPY, apply and replication speak through.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::{fmt, io};

use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _};
use tokio_util::io::poll_read_buf;

use crate::config::Secret;
use crate::postgres::frame::{LOGIN_FRAME_MAX, MAX_FRAME_BYTES, data_row, parameter_status, take_frame};
use crate::postgres::stall::StallWatch;
use crate::postgres::stream::Parked;
use crate::postgres::{Frame, RawError, Stream, settings};
use crate::wire::message;

/// How much is read from the socket at a time, at least.
const READ_BYTES: usize = 16 * 1024;

/// How a login proves itself. `Debug` names the kind alone; wiped when dropped.
#[derive(Clone, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub enum Credential {
    /// Nothing to show (trust, peer, certificate).
    None,
    /// A password, for whatever the server asks.
    Password(Secret),
    /// A SCRAM client key (32 bytes), recovered from a client's own proof. The server key checks the server.
    ScramKeys {
        /// RFC 5802 ClientKey.
        client_key: [u8; 32],
        /// RFC 5802 ServerKey.
        server_key: [u8; 32],
    },
    /// `md5` verifier (`md5` and 32 hexadecimal digits): enough to log in to a server that asks for md5.
    Md5Hash(Secret),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Password(_) => "Password(…)",
            Self::ScramKeys { .. } => "ScramKeys(…)",
            Self::Md5Hash(_) => "Md5Hash(…)",
        })
    }
}

impl Credential {
    /// Whether it proves the same. Takes as long whatever differs within a kind.
    pub fn is_same_as(&self, other: &Self) -> bool {
        use subtle::ConstantTimeEq as _;
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Password(one), Self::Password(two)) | (Self::Md5Hash(one), Self::Md5Hash(two)) => {
                bool::from(one.expose().as_bytes().ct_eq(two.expose().as_bytes()))
            }
            (
                Self::ScramKeys { client_key, server_key },
                Self::ScramKeys { client_key: other_client, server_key: other_server },
            ) => bool::from(client_key.ct_eq(other_client) & server_key.ct_eq(other_server)),
            (Self::None | Self::Password(_) | Self::Md5Hash(_) | Self::ScramKeys { .. }, _) => false,
        }
    }
}

/// Everything a startup packet and an authentication exchange need.
#[derive(Clone, Debug)]
pub struct Login {
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// Proof.
    pub credential: Credential,
    /// Further startup parameters, in order (`application_name`, `options`, `replication`, …).
    pub parameters: Vec<(String, String)>,
}

impl Login {
    /// Whether a connection that was opened with the one could have been opened with the other, and would be the same.
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.user == other.user
            && self.database == other.database
            && self.parameters == other.parameters
            && self.credential.is_same_as(&other.credential)
    }
}

/// Result rows in text form; NULL is `None`.
pub type TextRows = Vec<Vec<Option<String>>>;

/// An open connection that has been authenticated and has said ReadyForQuery once.
///
/// Dropping it closes the socket without a Terminate; the server notices when it next reads.
pub struct RawConnection {
    /// The socket.
    pub stream: Stream,
    /// Bytes read and not yet consumed.
    pub read_buf: BytesMut,
    /// BackendKeyData: process id.
    pub pid: i32,
    /// BackendKeyData: secret, 4 bytes in protocol 3.0, up to 256 in 3.2.
    pub cancel_key: Vec<u8>,
    /// ParameterStatus values reported so far, in order of first report.
    pub parameters: Vec<(String, String)>,
    /// `source` or `target`, for messages.
    label: Arc<str>,
    /// Longest frame that is held whole.
    frame_max: usize,
    /// The last ReadyForQuery: `I`, `T` or `E`.
    status: u8,
    /// NotificationResponse frames that arrived between the answers of a control query.
    notifications: Vec<Frame>,
    /// ReadyForQuery that our own queries still await. Not 0 between calls: one of them was dropped half-way, and
    /// whatever is read next answers that one.
    awaited: u32,
    /// Notices that the link has stalled; only our own connections have one.
    watch: Option<StallWatch>,
}

/// A connection between two threads: see [`RawConnection::park`].
pub struct ParkedConnection {
    stream: Parked,
    rest: Box<dyn FnOnce(Stream) -> RawConnection + Send>,
}

impl fmt::Debug for ParkedConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ParkedConnection")
    }
}

impl ParkedConnection {
    /// Goes on on the runtime of the calling thread.
    pub fn resume(self) -> io::Result<RawConnection> {
        Ok((self.rest)(self.stream.resume()?))
    }
}

impl fmt::Debug for RawConnection {
    /// Neither the cancel key nor what is in the buffers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RawConnection({}, pid {}, status {:?})", self.label, self.pid, char::from(self.status))
    }
}

impl RawConnection {
    /// A stream that is about to log in to `label`.
    pub(super) fn before_login(stream: Stream, label: &str) -> Self {
        Self {
            stream,
            read_buf: BytesMut::new(),
            pid: 0,
            cancel_key: Vec::new(),
            parameters: Vec::new(),
            label: Arc::from(label),
            frame_max: LOGIN_FRAME_MAX,
            status: b'I',
            notifications: Vec::new(),
            awaited: 0,
            watch: None,
        }
    }

    /// From now on a link that stalls while an answer is awaited is given up.
    pub(super) fn watched_by(&mut self, watch: Option<StallWatch>) {
        self.watch = watch;
    }

    /// Takes the watch out, for who goes on with the stream alone.
    pub(super) fn take_watch(&mut self) -> Option<StallWatch> {
        self.watch.take()
    }

    /// Takes the connection from its runtime, so that another thread can go on with it.
    pub fn park(self) -> io::Result<ParkedConnection> {
        let Self {
            stream,
            read_buf,
            pid,
            cancel_key,
            parameters,
            label,
            status,
            notifications,
            awaited,
            frame_max,
            watch,
        } = self;
        let stream = stream.park()?;
        let rest = Box::new(move |stream| Self {
            stream,
            read_buf,
            pid,
            cancel_key,
            parameters,
            label,
            status,
            notifications,
            awaited,
            frame_max,
            watch,
        });
        Ok(ParkedConnection { stream, rest })
    }

    /// The server has let us in: from now on its messages may be as long as PostgreSQL makes them.
    pub(super) fn logged_in(&mut self) {
        self.frame_max = MAX_FRAME_BYTES;
    }

    /// Longer messages than that are not held from now on: they are errors.
    pub fn bound_frames(&mut self, bytes: usize) {
        self.frame_max = bytes;
    }

    /// `source` or `target`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Transaction status of the last ReadyForQuery: `I` idle, `T` in a transaction, `E` in a failed one.
    pub fn transaction_status(&self) -> u8 {
        self.status
    }

    /// The last value that the server reported for `name`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// `server_version_num`, from the `server_version` that the server reported; 0 where it reported none.
    pub fn version_num(&self) -> u32 {
        self.parameter("server_version").and_then(settings::version_num).unwrap_or(0)
    }

    /// NotificationResponse frames that came in during [`Self::simple_query`] and its like, oldest first; they are
    /// the session's, so whoever owns the session passes them on.
    pub fn take_notifications(&mut self) -> Vec<Frame> {
        std::mem::take(&mut self.notifications)
    }

    /// Writes `bytes` and flushes.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), RawError> {
        let watch = while_awaited(&self.watch, self.awaited);
        let stream = &mut self.stream;
        let written = StallWatch::wait_for(watch, async {
            stream.write_all(bytes).await?;
            stream.flush().await
        });
        written.await.map_err(|error| self.lost("sending", error))
    }

    /// Announces a query of our own, whose ReadyForQuery is then awaited. An error where an earlier one was abandoned:
    /// its answer would be taken for that of the next.
    pub(super) fn expect_ready(&mut self) -> Result<(), RawError> {
        if self.awaited > 0 {
            let abandoned = io::Error::other("an earlier command was abandoned half-way");
            return Err(self.lost("starting a command", abandoned));
        }
        self.awaited = 1;
        Ok(())
    }

    /// Writes some of `bytes` or, where the server takes none, reads what it sends; returns how many were written. So
    /// neither side waits for the other to read. Flushing is the caller's.
    pub(super) async fn write_or_read(&mut self, bytes: &[u8]) -> Result<usize, RawError> {
        self.read_buf.reserve(READ_BYTES);
        let watch = while_awaited(&self.watch, self.awaited);
        let (stream, read_buf) = (&mut self.stream, &mut self.read_buf);
        let step = poll_fn(|cx| {
            let refused = match Pin::new(&mut *stream).poll_write(cx, bytes) {
                Poll::Ready(Ok(count)) if count > 0 => return Poll::Ready(Ok(count)),
                Poll::Ready(Ok(_)) => Some(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Err(error)) => Some(error),
                Poll::Pending => None,
            };
            // A server that takes no more may still have said why: that is read before the failure is reported.
            match (poll_read_buf(Pin::new(&mut *stream), cx, read_buf), refused) {
                (Poll::Ready(Ok(count)), _) if count > 0 => Poll::Ready(Ok(0)),
                (_, Some(error)) => Poll::Ready(Err(error)),
                (Poll::Ready(Ok(_)), None) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                (Poll::Ready(Err(error)), None) => Poll::Ready(Err(error)),
                (Poll::Pending, None) => Poll::Pending,
            }
        });
        StallWatch::wait_for(watch, step).await.map_err(|error| self.lost("sending", error))
    }

    /// Writes all of `bytes`, reading whatever comes meanwhile into `read_buf`, and takes what has arrived by the end. For
    /// many messages at once: a server whose answers nobody reads stops reading too.
    pub async fn send_and_read(&mut self, mut bytes: &[u8]) -> Result<(), RawError> {
        while !bytes.is_empty() {
            let sent = self.write_or_read(bytes).await?;
            bytes = &bytes[sent..];
        }
        self.flush().await?;
        self.read_buf.reserve(READ_BYTES);
        poll_fn(|cx| {
            // The end of the stream is left for the next write or read to meet.
            let _arrived = poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read_buf);
            Poll::Ready(())
        })
        .await;
        Ok(())
    }

    pub(super) async fn flush(&mut self) -> Result<(), RawError> {
        let watch = while_awaited(&self.watch, self.awaited);
        // Behind TLS it is here that what was written waits.
        let flushed = StallWatch::wait_for(watch, self.stream.flush());
        flushed.await.map_err(|error| self.lost("sending", error))
    }

    /// A whole frame that has been read already.
    pub(super) fn frame_at_hand(&mut self) -> Result<Option<Frame>, RawError> {
        let frame = take_frame(&mut self.read_buf, self.frame_max).map_err(|what| self.violation(what))?;
        if let Some(frame) = &frame {
            self.note(frame)?;
        }
        Ok(frame)
    }

    pub(super) fn keep_notification(&mut self, frame: Frame) {
        self.notifications.push(frame);
    }

    /// Waits for more bytes, with room for `room` of them.
    pub(super) async fn read_more(&mut self, room: usize) -> Result<(), RawError> {
        self.read_buf.reserve(room);
        let watch = while_awaited(&self.watch, self.awaited);
        match StallWatch::wait_for(watch, self.stream.read_buf(&mut self.read_buf)).await {
            Ok(0) => Err(self.lost("reading", io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(()),
            Err(error) => Err(self.lost("reading", error)),
        }
    }

    /// The next message, whatever it is; ParameterStatus is noted in `parameters` and returned all the same.
    /// Dropping the future loses nothing: what was read stays in `read_buf`.
    pub async fn next_frame(&mut self) -> Result<Frame, RawError> {
        loop {
            if let Some(frame) = self.frame_at_hand()? {
                return Ok(frame);
            }
            self.read_more(READ_BYTES).await?;
        }
    }

    /// Runs `sql` as one simple query and returns the rows of all its results. An error ends it, and is returned
    /// after ReadyForQuery, so the connection can be used again. This destroys the session's unnamed statement.
    pub async fn simple_query(&mut self, sql: &str) -> Result<TextRows, RawError> {
        self.send_query(sql).await?;
        self.collect_rows().await
    }

    /// The same with two that are sent together; the second one is run whatever becomes of the first. The rows of the second,
    /// and the transaction status between the two.
    pub async fn simple_queries(&mut self, first: &str, second: &str) -> Result<(u8, TextRows), RawError> {
        self.expect_ready()?;
        self.awaited = 2;
        let mut messages = BytesMut::new();
        for sql in [first, second] {
            frontend::query(sql, &mut messages).map_err(|error| self.violation(error.to_string()))?;
        }
        self.send(&messages).await?;
        let first = match self.collect_rows().await {
            Err(broken @ (RawError::Io { .. } | RawError::Protocol { .. })) => return Err(broken),
            answered @ (Ok(_) | Err(RawError::Server { .. })) => answered,
        };
        let between = self.status;
        let second = self.collect_rows().await?;
        first.map(|_| (between, second))
    }

    /// Sends a simple query and leaves its answer to the caller.
    pub(super) async fn send_query(&mut self, sql: &str) -> Result<(), RawError> {
        self.expect_ready()?;
        let mut message = BytesMut::new();
        frontend::query(sql, &mut message).map_err(|error| self.violation(error.to_string()))?;
        self.send(&message).await
    }

    /// Runs one statement through the extended protocol as the *named* statement `statement` (and a portal of the same
    /// name), which are closed again: the session's unnamed statement and portal stay as they are. Parameters are in
    /// text form, their types inferred. Ends in a Sync, so outside a transaction block it is its own transaction.
    pub async fn query_named(
        &mut self,
        statement: &str,
        sql: &str,
        params: &[Option<&str>],
    ) -> Result<TextRows, RawError> {
        let mut message = BytesMut::new();
        encode_named(statement, sql, params, &mut message).map_err(|error| self.violation(error.to_string()))?;
        self.expect_ready()?;
        self.send(&message).await?;
        let answer = self.collect_rows().await;
        if let Err(RawError::Server { .. }) = answer {
            // An error skips to Sync, past the Close: the statement may be there still. Closing one that is not there
            // is no error, and a failed transaction allows it. Where the link is gone, the first error tells more.
            message.clear();
            frontend::close(b'S', statement, &mut message).map_err(|error| self.violation(error.to_string()))?;
            frontend::sync(&mut message);
            self.expect_ready()?;
            if self.send(&message).await.is_ok() {
                let _closed = self.collect_rows().await;
            }
        }
        answer
    }

    /// Sends Terminate and waits until the server has closed the connection: then its backend has ended. Not bounded in
    /// time, because only the caller knows what an unproven end means.
    pub async fn terminate(mut self) -> Result<(), RawError> {
        self.send(&[b'X', 0, 0, 0, 4]).await?;
        loop {
            self.read_buf.clear();
            match StallWatch::wait_for(self.watch.as_ref(), self.stream.read_buf(&mut self.read_buf)).await {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // A peer that has closed and still finds our bytes unread resets the connection: closed all the same.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(self.lost("ending the session", error)),
            }
        }
    }

    /// Collects rows until ReadyForQuery. The first error is returned once ReadyForQuery has come, or at once where
    /// the server closes the connection after it.
    pub(super) async fn collect_rows(&mut self) -> Result<TextRows, RawError> {
        let mut rows = TextRows::new();
        let mut failure = None;
        loop {
            let frame = match self.next_frame().await {
                Ok(frame) => frame,
                Err(error) => return Err(failure.unwrap_or(error)),
            };
            match frame.tag {
                b'D' => rows.push(data_row(&frame.body).ok_or_else(|| self.violation("malformed DataRow".to_owned()))?),
                b'E' => failure = failure.or(Some(RawError::from_error_response(&frame.body))),
                b'A' => self.notifications.push(frame),
                b'Z' => return failure.map_or(Ok(rows), Err),
                // COPY FROM STDIN has no data here.
                b'G' => {
                    let mut refusal = BytesMut::new();
                    frontend::copy_fail("no data for COPY in a control query", &mut refusal)
                        .map_err(|error| self.violation(error.to_string()))?;
                    self.send(&refusal).await?;
                }
                b'1' | b'2' | b'3' | b'C' | b'I' | b'N' | b'S' | b'T' | b'H' | b'd' | b'c' | b'n' | b's' | b't' => {}
                other => {
                    return Err(self.violation(format!("message {:?} in answer to a query", char::from(other))));
                }
            }
        }
    }

    /// Keeps what a frame says about the session itself.
    fn note(&mut self, frame: &Frame) -> Result<(), RawError> {
        match frame.tag {
            b'S' => {
                let (name, value) = parameter_status(&frame.body)
                    .ok_or_else(|| self.violation("malformed ParameterStatus".to_owned()))?;
                message::note_parameter(&mut self.parameters, &name, &value);
            }
            b'Z' => match frame.body[..] {
                [status @ (b'I' | b'T' | b'E')] => {
                    self.status = status;
                    self.awaited = self.awaited.saturating_sub(1);
                }
                _ => return Err(self.violation("malformed ReadyForQuery".to_owned())),
            },
            _ => {}
        }
        Ok(())
    }

    pub(super) fn lost(&self, doing: &str, source: io::Error) -> RawError {
        RawError::Io { label: self.label.to_string(), doing: doing.to_owned(), source }
    }

    pub(super) fn violation(&self, what: String) -> RawError {
        RawError::Protocol { label: self.label.to_string(), what }
    }
}

/// Only where the server owes an answer its silence may be a stalled link's: who listens is silent too.
fn while_awaited(watch: &Option<StallWatch>, awaited: u32) -> Option<&StallWatch> {
    watch.as_ref().filter(|_| awaited > 0)
}

/// Parse, Bind, Describe, Execute, Close of portal and statement, Sync.
fn encode_named(name: &str, sql: &str, params: &[Option<&str>], out: &mut BytesMut) -> io::Result<()> {
    frontend::parse(name, sql, [], out)?;
    let bound = frontend::bind(
        name,
        name,
        [],
        params,
        |param, out| match param {
            Some(text) => {
                out.extend_from_slice(text.as_bytes());
                Ok(IsNull::No)
            }
            None => Ok(IsNull::Yes),
        },
        [],
        out,
    );
    bound.map_err(|error| match error {
        frontend::BindError::Conversion(error) => io::Error::other(error.to_string()),
        frontend::BindError::Serialization(error) => error,
    })?;
    frontend::execute(name, 0, out)?;
    frontend::close(b'P', name, out)?;
    frontend::close(b'S', name, out)?;
    frontend::sync(out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        for credential in [
            Credential::Password(Secret::new("hidden")),
            Credential::Md5Hash(Secret::new("hidden")),
            Credential::ScramKeys { client_key: [77; 32], server_key: [77; 32] },
        ] {
            let login = Login { user: "u".to_owned(), database: "d".to_owned(), credential, parameters: Vec::new() };
            let shown = format!("{login:?}");
            assert!(!shown.contains("hidden") && !shown.contains("77"), "{shown}");
        }
    }
}
