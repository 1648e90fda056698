//! Pipelines of extended-protocol units on a backend that a client owns.
//!
//! Everything goes through named statements, because the unnamed one is the client's. Each unit ends in its own Sync, so
//! that one failure costs only its unit, and the whole pipeline is written while the answers are read: one round trip,
//! however much there is, and no deadlock when neither side's socket buffer holds all of it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::postgres::RawConnection;
use crate::wire::message;

use super::HandoffError;

/// Bound on what one pipeline's answers may take, in bytes. A session with more prepared statement text than this is
/// not moved.
const ANSWER_LIMIT_BYTES: usize = 64 << 20;

/// PostgreSQL makes no longer ones (`MaxAllocSize`).
const MESSAGE_MOST_BYTES: usize = 0x4000_0000;

/// Room that is made at a time for what is read.
const READ_BYTES: usize = 64 << 10;

/// A row: text values as the server sent them.
pub(super) type Row = Vec<Option<Bytes>>;

/// How a unit ended.
#[derive(Debug)]
pub(super) enum Answer {
    /// The rows of each Execute, in order.
    Done(Vec<Vec<Row>>),
    /// SQLSTATE of the error that ended the unit.
    Refused(String),
}

impl Answer {
    /// The rows, or the error as one of `doing`.
    pub(super) fn rows(self, doing: &'static str) -> Result<Vec<Vec<Row>>, HandoffError> {
        match self {
            Self::Done(sets) => Ok(sets),
            Self::Refused(sqlstate) => Err(HandoffError::Refused { doing, sqlstate }),
        }
    }
}

/// Messages that have not been sent yet.
#[derive(Default)]
pub(super) struct Pipeline {
    out: BytesMut,
    units: usize,
}

impl Pipeline {
    /// Parse. Texts are bytes, because a database in SQL_ASCII holds any.
    pub(super) fn parse(&mut self, name: &[u8], text: &[u8], parameter_types: &[u32]) {
        self.message(b'P', |body| {
            put_cstr(body, name);
            put_cstr(body, text);
            // More than 32767 parameters cannot come from a server.
            body.put_u16(u16::try_from(parameter_types.len()).unwrap_or(u16::MAX));
            for oid in parameter_types {
                body.put_u32(*oid);
            }
        });
    }

    /// Parse, with a body that the client sent.
    pub(super) fn parse_body(&mut self, parse: &[u8]) {
        self.message(b'P', |body| body.put_slice(parse));
    }

    /// Bind to the unnamed portal, which no client has outside a transaction, and Execute. Text in, text out.
    pub(super) fn execute(&mut self, name: &[u8], parameters: &[Option<&[u8]>]) {
        self.bind(name, parameters);
        self.message(b'E', |body| {
            put_cstr(body, b"");
            body.put_u32(0);
        });
    }

    /// Bind to the unnamed portal: the server plans the statement and runs nothing.
    pub(super) fn bind(&mut self, name: &[u8], parameters: &[Option<&[u8]>]) {
        self.message(b'B', |body| {
            put_cstr(body, b"");
            put_cstr(body, name);
            body.put_u16(0);
            body.put_u16(u16::try_from(parameters.len()).unwrap_or(u16::MAX));
            for parameter in parameters {
                match parameter {
                    Some(value) => {
                        body.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
                        body.put_slice(value);
                    }
                    None => body.put_i32(-1),
                }
            }
            body.put_u16(0);
        });
    }

    /// Close of a statement; no error when there is none.
    pub(super) fn close(&mut self, name: &[u8]) {
        self.message(b'C', |body| {
            body.put_u8(b'S');
            put_cstr(body, name);
        });
    }

    /// Parse, Bind, Execute and Close of one of our own statements.
    pub(super) fn run(&mut self, name: &[u8], text: &[u8], parameters: &[Option<&[u8]>]) {
        self.parse(name, text, &[]);
        self.execute(name, parameters);
        self.close(name);
    }

    /// Ends a unit.
    pub(super) fn sync(&mut self) {
        self.message(b'S', |_| {});
        self.units += 1;
    }

    fn message(&mut self, tag: u8, write: impl FnOnce(&mut BytesMut)) {
        self.out.put_u8(tag);
        let start = self.out.len();
        self.out.put_u32(0);
        write(&mut self.out);
        let length = u32::try_from(self.out.len() - start).unwrap_or(u32::MAX);
        self.out[start..start + 4].copy_from_slice(&length.to_be_bytes());
    }

    /// Sends everything and reads one answer for each unit. Notifications that arrive meanwhile are the client's:
    /// they are appended to `for_client` as they came, also when an error is returned. What is too large is read to its
    /// end too, and dropped: only [`HandoffError::Lost`], [`HandoffError::Protocol`] and [`HandoffError::NotIdle`] leave
    /// answers of ours behind.
    pub(super) async fn exchange(
        self,
        connection: &mut RawConnection,
        for_client: &mut BytesMut,
        doing: &'static str,
    ) -> Result<Vec<Answer>, HandoffError> {
        if self.units == 0 {
            return Ok(Vec::new());
        }
        let RawConnection { stream, read_buf, parameters, .. } = connection;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let write = async {
            writer.write_all(&self.out).await?;
            writer.flush().await
        };
        let mut answers = Answers { expected: self.units, ..Answers::default() };
        let read = async {
            let mut skipped = 0;
            loop {
                loop {
                    let now = read_buf.len().min(skipped);
                    read_buf.advance(now);
                    skipped -= now;
                    match next_frame(read_buf, doing)? {
                        Next::Message(tag, body) => answers.take(tag, body, parameters, for_client, doing)?,
                        Next::Partial => break,
                        Next::TooLarge(bytes) => {
                            answers.give_up();
                            skipped = bytes;
                        }
                    }
                }
                if answers.done.len() == answers.expected {
                    return Ok(());
                }
                let read = reader.read_buf(read_buf).await.map_err(|source| HandoffError::Lost { doing, source })?;
                answers.bytes += read;
                if read == 0 {
                    return Err(HandoffError::Lost { doing, source: std::io::ErrorKind::UnexpectedEof.into() });
                }
                if answers.bytes > ANSWER_LIMIT_BYTES {
                    answers.give_up();
                }
            }
        };
        let write = async { write.await.map_err(|source| HandoffError::Lost { doing, source }) };
        tokio::try_join!(write, read)?;
        if answers.is_too_large {
            return Err(HandoffError::TooLarge { limit_bytes: ANSWER_LIMIT_BYTES });
        }
        Ok(answers.done)
    }
}

/// The answers read so far.
#[derive(Default)]
struct Answers {
    done: Vec<Answer>,
    expected: usize,
    bytes: usize,
    /// What comes is read and dropped.
    is_too_large: bool,
    sets: Vec<Vec<Row>>,
    rows: Vec<Row>,
    refused: Option<String>,
}

impl Answers {
    /// Keeps nothing of them, and only counts.
    fn give_up(&mut self) {
        self.is_too_large = true;
        self.rows.clear();
        self.sets.clear();
        for done in &mut self.done {
            *done = Answer::Done(Vec::new());
        }
    }

    fn take(
        &mut self,
        tag: u8,
        mut body: Bytes,
        parameters: &mut Vec<(String, String)>,
        for_client: &mut BytesMut,
        doing: &'static str,
    ) -> Result<(), HandoffError> {
        match tag {
            // ParseComplete, BindComplete, CloseComplete, NoData, RowDescription, ParameterDescription, NoticeResponse.
            b'1' | b'2' | b'3' | b'n' | b'T' | b't' | b'N' => {}
            b'D' | b'C' | b'I' if self.is_too_large => {}
            b'D' => self.rows.push(data_row(&mut body).ok_or(HandoffError::Protocol { doing, what: "a bad DataRow" })?),
            b'C' | b'I' => self.sets.push(std::mem::take(&mut self.rows)),
            b'E' => self.refused = Some(sqlstate(&body)),
            b'A' => {
                for_client.put_u8(b'A');
                for_client.put_u32(u32::try_from(body.len() + 4).unwrap_or(u32::MAX));
                for_client.put_slice(&body);
            }
            b'S' => note_parameter(&body, parameters),
            b'Z' => {
                if body.first() != Some(&b'I') {
                    return Err(HandoffError::NotIdle);
                }
                self.rows.clear();
                let sets = std::mem::take(&mut self.sets);
                self.done.push(match self.refused.take() {
                    Some(sqlstate) => Answer::Refused(sqlstate),
                    None => Answer::Done(sets),
                });
                if self.done.len() > self.expected {
                    return Err(HandoffError::Protocol { doing, what: "a ReadyForQuery nobody asked for" });
                }
            }
            _ => return Err(HandoffError::Protocol { doing, what: "a message that has no place here" }),
        }
        Ok(())
    }
}

/// What stands next in a buffer.
#[derive(Debug)]
enum Next {
    Message(u8, Bytes),
    Partial,
    /// A message that is not held whole, of so many bytes from here.
    TooLarge(usize),
}

fn next_frame(buffer: &mut BytesMut, doing: &'static str) -> Result<Next, HandoffError> {
    let Some(header) = buffer.get(..5) else { return Ok(Next::Partial) };
    let tag = header[0];
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length < 4 {
        return Err(HandoffError::Protocol { doing, what: "a message shorter than its own length" });
    }
    if length > ANSWER_LIMIT_BYTES {
        // Only rows are that long.
        return match tag {
            b'D' if length <= MESSAGE_MOST_BYTES => Ok(Next::TooLarge(length + 1)),
            _ => Err(HandoffError::Protocol { doing, what: "a message that is too long" }),
        };
    }
    if buffer.len() < length + 1 {
        // Room for what comes next, not for what the length promises: it may lie.
        buffer.reserve((length + 1 - buffer.len()).min(READ_BYTES));
        return Ok(Next::Partial);
    }
    let mut message = buffer.split_to(length + 1);
    message.advance(5);
    Ok(Next::Message(tag, message.freeze()))
}

fn data_row(body: &mut Bytes) -> Option<Row> {
    let columns = body.try_get_u16().ok()?;
    let mut row = Vec::with_capacity(usize::from(columns));
    for _ in 0..columns {
        let length = body.try_get_i32().ok()?;
        row.push(match usize::try_from(length) {
            Err(_) => None,
            Ok(length) if length <= body.len() => Some(body.split_to(length)),
            Ok(_) => return None,
        });
    }
    Some(row)
}

/// SQLSTATE of an ErrorResponse. The rest of it may quote data and is dropped here.
fn sqlstate(body: &[u8]) -> String {
    body.split(|byte| *byte == 0)
        .find_map(|field| field.strip_prefix(b"C"))
        .map_or_else(|| "XX000".to_owned(), |code| String::from_utf8_lossy(code).into_owned())
}

/// Keeps the connection's reported parameters current.
fn note_parameter(body: &[u8], parameters: &mut Vec<(String, String)>) {
    let mut fields = body.split(|byte| *byte == 0).map(|field| String::from_utf8_lossy(field).into_owned());
    let (Some(name), Some(value)) = (fields.next(), fields.next()) else { return };
    message::note_parameter(parameters, &name, &value);
}

/// Texts that come from a server or a client hold no zero byte; cutting at one keeps the framing whole if ever.
fn put_cstr(body: &mut BytesMut, text: &[u8]) {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    body.put_slice(&text[..end]);
    body.put_u8(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(answers: &mut Answers, tag: u8, body: &'static [u8]) -> Result<BytesMut, HandoffError> {
        let mut for_client = BytesMut::new();
        let mut parameters = vec![("TimeZone".to_owned(), "UTC".to_owned())];
        answers.take(tag, Bytes::from_static(body), &mut parameters, &mut for_client, "testing")?;
        Ok(for_client)
    }

    #[test]
    fn messages_have_the_layout_of_the_protocol() {
        let mut pipeline = Pipeline::default();
        pipeline.parse(b"n", b"SELECT $1", &[23]);
        pipeline.execute(b"n", &[Some(b"7"), None]);
        pipeline.close(b"n");
        pipeline.sync();
        assert_eq!(
            &pipeline.out[..],
            b"P\0\0\0\x16n\0SELECT $1\0\0\x01\0\0\0\x17\
              B\0\0\0\x16\0n\0\0\0\0\x02\0\0\0\x017\xff\xff\xff\xff\0\0\
              E\0\0\0\x09\0\0\0\0\0C\0\0\0\x07Sn\0S\0\0\0\x04"
        );
        assert_eq!(pipeline.units, 1);
    }

    #[test]
    fn a_failed_unit_gives_its_sqlstate_and_nothing_of_its_rows() {
        let mut answers = Answers { expected: 2, ..Answers::default() };
        take(&mut answers, b'D', b"\0\x01\0\0\0\x01x").expect("a row");
        take(&mut answers, b'E', b"SERROR\0C42P01\0Msecret\0\0").expect("an error");
        take(&mut answers, b'Z', b"I").expect("ready");
        take(&mut answers, b'D', b"\0\x02\0\0\0\x01y\xff\xff\xff\xff").expect("a row");
        take(&mut answers, b'C', b"SELECT 1\0").expect("complete");
        take(&mut answers, b'Z', b"I").expect("ready");
        assert!(matches!(&answers.done[0], Answer::Refused(code) if code == "42P01"));
        let Answer::Done(sets) = &answers.done[1] else { panic!("the second unit succeeded") };
        assert_eq!(*sets, vec![vec![vec![Some(Bytes::from_static(b"y")), None]]]);
    }

    #[test]
    fn notifications_are_kept_for_the_client_as_they_came() {
        let mut answers = Answers { expected: 1, ..Answers::default() };
        assert_eq!(
            &take(&mut answers, b'A', b"\0\0\0\x01ch\0pay\0").expect("kept")[..],
            b"A\0\0\0\x0f\0\0\0\x01ch\0pay\0"
        );
    }

    #[test]
    fn bytes_that_make_no_sense_are_errors() {
        let mut answers = Answers { expected: 1, ..Answers::default() };
        assert!(take(&mut answers, b'D', b"\0\x01\0\0\0\x05x").is_err());
        assert!(take(&mut answers, b'G', b"").is_err());
        assert!(matches!(take(&mut answers, b'Z', b"T"), Err(HandoffError::NotIdle)));
        assert!(next_frame(&mut BytesMut::from(&b"Z\0\0\0\x01"[..]), "testing").is_err());
        assert!(next_frame(&mut BytesMut::from(&b"Z\xff\xff\xff\xff"[..]), "testing").is_err());
        assert!(matches!(next_frame(&mut BytesMut::from(&b"Z\0\0\0\x05"[..]), "testing"), Ok(Next::Partial)));
    }

    #[test]
    fn what_is_too_large_is_read_to_its_end() {
        let mut answers = Answers { expected: 1, ..Answers::default() };
        take(&mut answers, b'D', b"\0\x01\0\0\0\x01x").expect("a row");
        answers.give_up();
        take(&mut answers, b'D', b"\0\x01\0\0\0\x01y").expect("a row");
        take(&mut answers, b'C', b"SELECT 2\0").expect("complete");
        assert!(answers.rows.is_empty() && answers.sets.is_empty());
        take(&mut answers, b'Z', b"I").expect("ready");
        assert_eq!(answers.done.len(), answers.expected);
        let long = next_frame(&mut BytesMut::from(&b"D\x04\0\0\x01"[..]), "testing");
        assert!(matches!(long, Ok(Next::TooLarge(0x0400_0002))), "{long:?}");
        assert!(next_frame(&mut BytesMut::from(&b"T\x04\0\0\x01"[..]), "testing").is_err());
    }
}
