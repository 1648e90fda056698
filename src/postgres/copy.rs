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
            let buffer = &mut self.connection.read_buf;
            if self.rest > 0 && !buffer.is_empty() {
                let piece = self.rest.min(buffer.len());
                writer.send(&buffer[..piece]).await?;
                buffer.advance(piece);
                self.rest -= piece;
                moved.bytes += piece as u64;
                continue;
            }
            match buffer.split_first_chunk::<HEADER_BYTES>() {
                Some(([b'd', a, b, c, d], _)) if self.rest == 0 => {
                    let length = u32::from_be_bytes([*a, *b, *c, *d]);
                    let Some(body) = usize::try_from(length).ok().and_then(|length| length.checked_sub(4)) else {
                        let error = self.connection.violation(format!("CopyData of length {length}"));
                        return Err(CopyError::new(Direction::Out, self.connection, error));
                    };
                    self.rest = body;
                    buffer.advance(HEADER_BYTES);
                    moved.messages += 1;
                }
                Some(_) if self.rest == 0 => {
                    // CopyDone, an error, or a notice in between.
                    let more = self.after_data().await.map_err(|error| self.guilty(error))?;
                    if !more {
                        break;
                    }
                }
                Some(_) | None => self.read_more().await.map_err(|error| self.guilty(error))?,
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
            self.flush().await.map_err(|error| CopyError::new(Direction::In, self.connection, error))?;
        }
    }

    /// Ends the data, and returns the rows that the server has taken.
    pub async fn finish(mut self) -> Result<u64, CopyError> {
        self.complete().await.map_err(|error| CopyError::new(Direction::In, self.connection, error))
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
