//! COPY at the level of its bytes: what one server sends is handed on unparsed (PostgreSQL documentation, "Message
//! Flow: COPY Operations").
//!
//! ```text
//! COPY … TO STDOUT                      COPY … FROM STDIN
//! us              the server            us              the server
//! Query        →                        Query        →
//!              ←  CopyOutResponse                    ←  CopyInResponse
//!              ←  CopyData …            CopyData …   →
//!              ←  CopyDone              CopyDone     →
//!              ←  CommandComplete                    ←  CommandComplete
//!              ←  ReadyForQuery                      ←  ReadyForQuery
//! ```
//!
//! A server sends one CopyData for each row and takes any cut: pieces are gathered here into larger messages, and a long
//! one is handed on as it comes ([`CopyOut::hand_on`]). Memory stays at two buffers, whatever the size of a value. Errors name the side that is guilty: the one that broke, never the one that
//! waited. Dropping a [`CopyOut`] or [`CopyIn`] before its end leaves the connection in the middle of a COPY; it then
//! refuses further work, and dropping it makes the server roll back.

use std::fmt;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use postgres_protocol::message::frontend;

use crate::postgres::frame::affected_rows;
use crate::postgres::{Frame, RawConnection, RawError};

/// Pieces are gathered into CopyData messages of about this size.
const MESSAGE_BYTES: usize = 64 * 1024;

/// Room to read ahead of a COPY out: fewer and larger reads.
const READ_BYTES: usize = 256 * 1024;

/// A server sends what 8 kB buffers hold. Where a read brought less than this, the next one waits for [`GATHER`], so that
/// it brings more: most of what a copy costs us is the number of reads.
const FULL_READ_BYTES: usize = 64 * 1024;

/// Well below what a socket's buffer takes to fill up.
const GATHER: Duration = Duration::from_millis(1);

/// Short copies do not wait.
const GATHER_AFTER_BYTES: u64 = 1024 * 1024;

/// Tag and length of a CopyData.
const HEADER_BYTES: usize = 5;

/// Which half of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// COPY … TO STDOUT.
    Out,
    /// COPY … FROM STDIN.
    In,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Out => "out of",
            Self::In => "into",
        })
    }
}

/// A COPY failed on this side. The server's message may quote data: not for clients, not for logs.
#[derive(Debug, thiserror::Error)]
#[error("COPY {direction} the {label}: {source}")]
pub struct CopyError {
    /// Out of this server, or into it.
    pub direction: Direction,
    /// `source` or `target`: the side that failed.
    pub label: String,
    /// What happened there.
    pub source: Box<RawError>,
}

impl CopyError {
    fn new(direction: Direction, connection: &RawConnection, source: RawError) -> Self {
        Self { direction, label: connection.label().to_owned(), source: Box::new(source) }
    }

    /// The SQLSTATE, where the server refused.
    pub fn sqlstate(&self) -> Option<&str> {
        self.source.sqlstate()
    }
}

impl RawConnection {
    /// Starts `COPY … TO STDOUT`.
    pub async fn copy_out(&mut self, sql: &str) -> Result<CopyOut<'_>, CopyError> {
        match begin(self, sql, b'H').await {
            Ok(()) => {
                self.read_buf.reserve(READ_BYTES);
                Ok(CopyOut { connection: self, rows: None, rest: 0, read: 0, short: false })
            }
            Err(error) => Err(CopyError::new(Direction::Out, self, error)),
        }
    }

    /// Starts `COPY … FROM STDIN`.
    pub async fn copy_in(&mut self, sql: &str) -> Result<CopyIn<'_>, CopyError> {
        match begin(self, sql, b'G').await {
            Ok(()) => Ok(CopyIn { connection: self, message: empty_message() }),
            Err(error) => Err(CopyError::new(Direction::In, self, error)),
        }
    }
}

/// Sends the COPY and waits for the response that opens it.
async fn begin(connection: &mut RawConnection, sql: &str, response: u8) -> Result<(), RawError> {
    connection.send_query(sql).await?;
    let frame = answer(connection).await?;
    if frame.tag == response {
        return Ok(());
    }
    Err(connection.violation(format!("message {:?} in answer to COPY", char::from(frame.tag))))
}

/// The next frame that belongs to the COPY. An ErrorResponse is an error, returned once the connection is ready again.
async fn answer(connection: &mut RawConnection) -> Result<Frame, RawError> {
    loop {
        let frame = connection.next_frame().await?;
        match frame.tag {
            b'N' | b'S' => {}
            b'A' => connection.keep_notification(frame),
            b'E' => return Err(refusal(connection, &frame).await),
            _ => return Ok(frame),
        }
    }
}

/// What an ErrorResponse says, once the connection is ready again.
async fn refusal(connection: &mut RawConnection, error: &Frame) -> RawError {
    let error = RawError::from_error_response(&error.body);
    // After a FATAL error no ReadyForQuery comes; the first error tells more than the lost link.
    let _ready = connection.collect_rows().await;
    error
}

/// Reads CommandComplete and ReadyForQuery; returns the rows that the command counted.
async fn finish(connection: &mut RawConnection, complete: Frame) -> Result<u64, RawError> {
    if complete.tag != b'C' {
        return Err(connection.violation(format!("message {:?} at the end of COPY", char::from(complete.tag))));
    }
    let rows =
        affected_rows(&complete.body).ok_or_else(|| connection.violation("COPY without a row count".to_owned()))?;
    connection.collect_rows().await?;
    Ok(rows)
}

/// A running COPY out.
#[derive(Debug)]
pub struct CopyOut<'a> {
    connection: &'a mut RawConnection,
    rows: Option<u64>,
    /// Bytes of the CopyData in hand that have not been handed on.
    rest: usize,
    /// Bytes read so far.
    read: u64,
    /// The last read brought little.
    short: bool,
}

/// How far [`gather`] came, and why no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gathered {
    /// Bytes that are done with.
    used: usize,
    stop: Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The message has no more room.
    Full,
    /// More is to be read first.
    Empty,
    /// A message follows that is no CopyData.
    Other,
    /// A CopyData cannot be so long.
    Malformed(u32),
}

/// Moves the payload of CopyData messages from what was `read` into `message`, as far as there is any and it has room.
/// `rest` is what the message in hand has left. There are millions of rows: this loop is most of what a copy costs us.
fn gather(read: &[u8], rest: &mut usize, message: &mut BytesMut, moved: &mut Moved) -> Gathered {
    let mut unused = read;
    let stop = loop {
        if *rest > 0 {
            let room = (HEADER_BYTES + MESSAGE_BYTES).saturating_sub(message.len());
            let (piece, later) = unused.split_at((*rest).min(unused.len()).min(room));
            message.extend_from_slice(piece);
            unused = later;
            *rest -= piece.len();
            moved.bytes += piece.len() as u64;
            if *rest > 0 {
                break if unused.is_empty() { Stop::Empty } else { Stop::Full };
            }
        }
        match unused.split_first_chunk::<HEADER_BYTES>() {
            Some(([b'd', length @ ..], later)) => {
                let length = u32::from_be_bytes(*length);
                match usize::try_from(length).ok().and_then(|length| length.checked_sub(4)) {
                    Some(body) => *rest = body,
                    None => break Stop::Malformed(length),
                }
                unused = later;
                moved.messages += 1;
            }
            Some(_) => break Stop::Other,
            None => break Stop::Empty,
        }
    };
    Gathered { used: read.len() - unused.len(), stop }
}

/// Messages and bytes of data that were handed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// CopyData messages: one for each row, and in binary one for the trailer.
    pub messages: u64,
    /// Their payload.
    pub bytes: u64,
}

impl CopyOut<'_> {
    /// The payload of the next CopyData, one row in text form and at least one row's part in binary; `None` once all
    /// have come and the server has said that the COPY is complete. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CopyError> {
        if self.rows.is_some() {
            return Ok(None);
        }
        self.advance().await.map_err(|error| CopyError::new(Direction::Out, self.connection, error))
    }

    /// Rows that the server says it sent; known once [`Self::next`] has returned `None`.
    pub fn rows(&self) -> Option<u64> {
        self.rows
    }

    /// Hands what has come on to `writer`, until about `most` bytes have been or the COPY is complete; `None`: it was
    /// before. Rows are counted and not looked at; a message is passed on before all of it has come. Not to be dropped
    /// before it is done.
    pub async fn hand_on(&mut self, writer: &mut CopyIn<'_>, most: u64) -> Result<Option<Moved>, CopyError> {
        if self.rows.is_some() {
            return Ok(None);
        }
        let mut moved = Moved::default();
        while moved.bytes < most {
            let Gathered { used, stop } =
                gather(&self.connection.read_buf, &mut self.rest, &mut writer.message, &mut moved);
            self.connection.read_buf.advance(used);
            match stop {
                Stop::Full => writer.flush().await.map_err(|error| writer.guilty(error))?,
                Stop::Empty => self.read_more().await.map_err(|error| self.guilty(error))?,
                Stop::Malformed(length) => {
                    let error = self.connection.violation(format!("CopyData of length {length}"));
                    return Err(self.guilty(error));
                }
                // CopyDone, an error, or a notice in between.
                Stop::Other => {
                    if !self.after_data().await.map_err(|error| self.guilty(error))? {
                        break;
                    }
                }
            }
        }
        Ok(Some(moved))
    }

    async fn read_more(&mut self) -> Result<(), RawError> {
        if self.short && self.read > GATHER_AFTER_BYTES {
            tokio::time::sleep(GATHER).await;
        }
        let before = self.connection.read_buf.len();
        self.connection.read_more(READ_BYTES).await?;
        let read = self.connection.read_buf.len() - before;
        self.short = read < FULL_READ_BYTES;
        self.read += read as u64;
        Ok(())
    }

    fn guilty(&self, error: RawError) -> CopyError {
        CopyError::new(Direction::Out, self.connection, error)
    }

    /// A message that is no CopyData; whether more of those may come.
    async fn after_data(&mut self) -> Result<bool, RawError> {
        let frame = self.connection.next_frame().await?;
        match frame.tag {
            b'N' | b'S' | b'c' => Ok(true),
            b'A' => {
                self.connection.keep_notification(frame);
                Ok(true)
            }
            b'E' => Err(refusal(self.connection, &frame).await),
            _ => {
                self.rows = Some(finish(self.connection, frame).await?);
                Ok(false)
            }
        }
    }

    async fn advance(&mut self) -> Result<Option<Bytes>, RawError> {
        loop {
            let frame = answer(self.connection).await?;
            match frame.tag {
                b'd' => return Ok(Some(frame.body)),
                // CopyDone; CommandComplete follows.
                b'c' => {}
                _ => {
                    self.rows = Some(finish(self.connection, frame).await?);
                    return Ok(None);
                }
            }
        }
    }
}

/// A running COPY in.
pub struct CopyIn<'a> {
    connection: &'a mut RawConnection,
    /// A CopyData in the making: room for the header, then data.
    message: BytesMut,
}

impl fmt::Debug for CopyIn<'_> {
    /// Not the data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyIn({:?}, {} bytes gathered)", self.connection, self.message.len())
    }
}

fn empty_message() -> BytesMut {
    let mut message = BytesMut::with_capacity(HEADER_BYTES + MESSAGE_BYTES);
    message.put_bytes(0, HEADER_BYTES);
    message
}

impl CopyIn<'_> {
    /// Hands over more data; cuts need not fall between rows. An error that the server has sent meanwhile is returned
    /// here, at the latest by [`Self::finish`]. Not to be dropped before it is done: part of a message may be sent.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), CopyError> {
        let mut rest = data;
        loop {
            let room = (HEADER_BYTES + MESSAGE_BYTES).saturating_sub(self.message.len());
            let (fits, more) = rest.split_at(room.min(rest.len()));
            self.message.extend_from_slice(fits);
            rest = more;
            if rest.is_empty() {
                return Ok(());
            }
            self.flush().await.map_err(|error| self.guilty(error))?;
        }
    }

    /// Ends the data, and returns the rows that the server has taken.
    pub async fn finish(mut self) -> Result<u64, CopyError> {
        self.complete().await.map_err(|error| self.guilty(error))
    }

    /// Gives up: the server rolls back what it had taken. `reason` goes to the server's log. The connection can be used
    /// again after this.
    pub async fn fail(self, reason: &str) -> Result<(), CopyError> {
        let connection = self.connection;
        let refused = async {
            let mut message = BytesMut::new();
            frontend::copy_fail(reason, &mut message).map_err(|error| connection.violation(error.to_string()))?;
            connection.send(&message).await?;
            answer(connection).await
        };
        match refused.await {
            // 57014: COPY from stdin failed, which is what was asked for.
            Err(RawError::Server { .. }) => Ok(()),
            Err(error) => Err(CopyError::new(Direction::In, connection, error)),
            Ok(frame) => {
                let error = connection.violation(format!("message {:?} after CopyFail", char::from(frame.tag)));
                Err(CopyError::new(Direction::In, connection, error))
            }
        }
    }

    fn guilty(&self, error: RawError) -> CopyError {
        CopyError::new(Direction::In, self.connection, error)
    }

    async fn complete(&mut self) -> Result<u64, RawError> {
        self.flush().await?;
        let mut done = BytesMut::new();
        frontend::copy_done(&mut done);
        self.connection.send(&done).await?;
        let complete = answer(self.connection).await?;
        finish(self.connection, complete).await
    }

    /// Sends what has been gathered, and looks whether the server has an error to tell.
    async fn flush(&mut self) -> Result<(), RawError> {
        let mut sent = Ok(());
        if self.message.len() > HEADER_BYTES {
            let length = u32::try_from(self.message.len() - 1).expect("gathered messages are short");
            self.message[0] = b'd';
            self.message[1..HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
            sent = self.connection.send_and_read(&self.message).await;
            self.message.truncate(HEADER_BYTES);
            // A fast sender never waits, and a runtime learns of arrived bytes only between two tasks.
            tokio::task::yield_now().await;
        }
        // Even where the link broke: the server may have said why. Before CopyDone it says nothing but notices and that.
        while let Some(frame) = self.connection.frame_at_hand()? {
            match frame.tag {
                b'N' | b'S' => {}
                b'A' => self.connection.keep_notification(frame),
                b'E' => {
                    let error = RawError::from_error_response(&frame.body);
                    // The server drops whatever data still comes and is ready for the next query.
                    let _ready = self.connection.collect_rows().await;
                    return Err(error);
                }
                other => {
                    return Err(self.connection.violation(format!("message {:?} during COPY", char::from(other))));
                }
            }
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn copy_data(payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len() + 4).expect("short");
        [b"d", &length.to_be_bytes()[..], payload].concat()
    }

    /// Everything that comes of a stream that is read in pieces of these sizes.
    fn gathered(stream: &[u8], mut pieces: impl Iterator<Item = usize>) -> (Vec<u8>, Moved, Stop) {
        let (mut rest, mut moved, mut out) = (0, Moved::default(), Vec::new());
        let (mut message, mut read, mut at) = (empty_message(), Vec::new(), 0);
        loop {
            let Gathered { used, stop } = gather(&read, &mut rest, &mut message, &mut moved);
            read.drain(..used);
            assert!(message.len() <= HEADER_BYTES + MESSAGE_BYTES, "{}", message.len());
            match stop {
                Stop::Empty if at < stream.len() => {
                    let to = (at + pieces.next().unwrap_or(1).max(1)).min(stream.len());
                    read.extend_from_slice(&stream[at..to]);
                    at = to;
                    continue;
                }
                Stop::Full => assert_eq!(message.len(), HEADER_BYTES + MESSAGE_BYTES),
                Stop::Empty | Stop::Other | Stop::Malformed(_) => {}
            }
            out.extend_from_slice(&message[HEADER_BYTES..]);
            message.truncate(HEADER_BYTES);
            if stop != Stop::Full {
                return (out, moved, stop);
            }
        }
    }

    proptest! {
        #[test]
        fn every_byte_is_handed_on_wherever_the_cuts_fall(
            rows in prop::collection::vec(prop_oneof![8 => 0_usize..200, 1 => Just(MESSAGE_BYTES), 1 => Just(3 * MESSAGE_BYTES)], 0..20),
            pieces in prop::collection::vec((1_usize..20, 10_000_usize..100_000), 1..5),
        ) {
            let payloads: Vec<Vec<u8>> = (1_u8..).zip(&rows).map(|(byte, &length)| vec![byte; length]).collect();
            let mut stream: Vec<u8> = payloads.iter().flat_map(|payload| copy_data(payload)).collect();
            stream.extend_from_slice(b"c\0\0\0\x04");
            let (out, moved, stop) = gathered(&stream, pieces.into_iter().flat_map(|(few, many)| [few, many]).cycle());
            prop_assert_eq!(stop, Stop::Other);
            prop_assert!(out == payloads.concat());
            let bytes = rows.iter().sum::<usize>() as u64;
            prop_assert_eq!(moved, Moved { messages: rows.len() as u64, bytes });
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_told() {
        let stream = [copy_data(b"row"), b"d\0\0\0\x03".to_vec()].concat();
        assert_eq!(
            gathered(&stream, std::iter::repeat(4)),
            (b"row".to_vec(), Moved { messages: 1, bytes: 3 }, Stop::Malformed(3))
        );
    }
}
