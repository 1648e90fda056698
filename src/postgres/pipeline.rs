//! Many statements in one round trip, for the applier (PostgreSQL documentation, "Extended Query: Pipelining").
//!
//! A [`Pipeline`] encodes steps into one buffer: BEGIN, thousands of executions of named prepared statements, the
//! progress row, COMMIT. [`RawConnection::run`] sends it with one Sync and reads the answers **while** it writes: a
//! server stops reading once its own answers find no room, and two sides that both only write wait for each other for
//! ever. Answers are reduced to row counts as they come, so memory stays at the encoded steps and one number for each.
//!
//! A transaction too large for one buffer is several runs: inside BEGIN … COMMIT a Sync ends nothing.
//!
//! After an error the server skips to the Sync; the error is returned with the index of the step that failed. When the
//! link breaks after COMMIT was sent, nobody knows whether it took effect: only the progress row on the server does.

use std::{fmt, io};

use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;

use crate::postgres::frame::affected_rows;
use crate::postgres::{Frame, RawConnection, RawError};

/// What a step is, and so what answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// ParseComplete.
    Parse,
    /// BindComplete, rows, CommandComplete.
    Execute,
    /// BindComplete, CopyInResponse, CommandComplete.
    Copy,
    /// As [`Step::Execute`], with the tag `COMMIT`: a transaction that had failed ends in `ROLLBACK`, without any error.
    Commit,
    /// ParameterDescription, then RowDescription or NoData.
    Describe,
    /// CloseComplete.
    Close,
}

/// Rows of a COPY are gathered into messages of about this size.
const COPY_MESSAGE_BYTES: usize = 64 * 1024;

/// Steps in the order in which they will run.
#[derive(Default)]
pub struct Pipeline {
    encoded: BytesMut,
    steps: Vec<Step>,
}

impl fmt::Debug for Pipeline {
    /// Not the parameters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pipeline({} steps, {} bytes)", self.steps.len(), self.encoded.len())
    }
}

/// Why a pipeline failed.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// A step failed; those before it took effect as far as their transaction does, those after it did not run.
    #[error("step {step} of the pipeline failed: {error}")]
    Step {
        /// Index, as returned when the step was added.
        step: usize,
        /// The server's error.
        error: Box<RawError>,
    },
    /// COMMIT found a transaction that had failed before, and rolled it back.
    #[error("the transaction had failed before, the server rolled it back")]
    RolledBack,
    /// The link broke (the server's last words, where it had any), or the protocol was violated. If COMMIT had been
    /// sent, whether it took effect is not known.
    #[error(transparent)]
    Raw(#[from] RawError),
}

impl PipelineError {
    /// The SQLSTATE of the step that failed.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Step { error, .. } => error.sqlstate(),
            Self::Raw(error) => error.sqlstate(),
            Self::RolledBack => None,
        }
    }
}

/// A step cannot be put into a message: a zero byte in text, more than 65535 parameters, a message past 2 GiB.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode a statement: {0}")]
pub struct EncodeError(String);

impl From<io::Error> for EncodeError {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// What a pipeline did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Rows affected by each executed step, in order; 0 for commands that count none.
    pub affected: Vec<u64>,
    /// Parameter types of each described statement, in order.
    pub parameter_types: Vec<Vec<u32>>,
}

impl Pipeline {
    /// No steps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Steps so far.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Size of the encoded steps, in bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.encoded.len()
    }

    /// Forgets all steps; keeps the memory for the next ones.
    pub fn clear(&mut self) {
        self.encoded.clear();
        self.steps.clear();
    }

    /// Prepares `sql` as `name`; types that are 0 or left out are inferred.
    pub fn parse(&mut self, name: &str, sql: &str, types: &[u32]) -> Result<usize, EncodeError> {
        frontend::parse(name, sql, types.iter().copied(), &mut self.encoded)?;
        Ok(self.push(Step::Parse))
    }

    /// Runs the prepared `statement` with parameters in text form.
    pub fn execute<'p>(
        &mut self,
        statement: &str,
        params: impl IntoIterator<Item = Option<&'p [u8]>>,
    ) -> Result<usize, EncodeError> {
        let before = self.encoded.len();
        let bound = frontend::bind("", statement, [], params, text_parameter, [], &mut self.encoded);
        self.bound(before, bound)?;
        frontend::execute("", 0, &mut self.encoded)?;
        Ok(self.push(Step::Execute))
    }

    /// Runs the prepared `statement` with `count` parameters in binary form; `write` is called with the index of each.
    pub fn execute_binary(
        &mut self,
        statement: &str,
        count: usize,
        mut write: impl FnMut(usize, &mut BytesMut),
    ) -> Result<usize, EncodeError> {
        let before = self.encoded.len();
        let serialize = |index: usize, out: &mut BytesMut| {
            write(index, out);
            Ok(IsNull::No)
        };
        let bound = frontend::bind("", statement, [1], 0..count, serialize, [], &mut self.encoded);
        self.bound(before, bound)?;
        frontend::execute("", 0, &mut self.encoded)?;
        Ok(self.push(Step::Execute))
    }

    /// Runs the prepared `COPY … FROM STDIN` with these rows, each of which writes itself. Nothing waits for the server
    /// to say that it is ready for them: what it does not want it throws away up to the Sync.
    pub fn copy_in<R>(&mut self, statement: &str, rows: impl IntoIterator<Item = R>) -> Result<usize, EncodeError>
    where
        R: FnOnce(&mut BytesMut),
    {
        let before = self.encoded.len();
        let none: [Option<&[u8]>; 0] = [];
        let bound = frontend::bind("", statement, [], none, text_parameter, [], &mut self.encoded);
        self.bound(before, bound)?;
        frontend::execute("", 0, &mut self.encoded)?;
        let mut start = None;
        for row in rows {
            let at = *start.get_or_insert_with(|| {
                let at = self.encoded.len();
                self.encoded.extend_from_slice(&[b'd', 0, 0, 0, 0]);
                at
            });
            row(&mut self.encoded);
            if self.encoded.len() - at >= COPY_MESSAGE_BYTES {
                self.end_copy_data(at)?;
                start = None;
            }
        }
        if let Some(at) = start {
            self.end_copy_data(at)?;
        }
        frontend::copy_done(&mut self.encoded);
        Ok(self.push(Step::Copy))
    }

    /// Fills in the length of the message that begins `at`.
    fn end_copy_data(&mut self, at: usize) -> Result<(), EncodeError> {
        let length = i32::try_from(self.encoded.len() - at - 1);
        let length = length.map_err(|_| EncodeError("a row of more than 2 GiB".to_owned()))?;
        self.encoded[at + 1..at + 5].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }

    /// A message cut short would take the next one for its rest.
    fn bound(&mut self, before: usize, bound: Result<(), frontend::BindError>) -> Result<(), EncodeError> {
        bound.map_err(|error| {
            self.encoded.truncate(before);
            match error {
                frontend::BindError::Conversion(error) => EncodeError(error.to_string()),
                frontend::BindError::Serialization(error) => error.into(),
            }
        })
    }

    /// Runs `sql` without parameters, through the unnamed statement.
    pub fn execute_sql(&mut self, sql: &str) -> Result<usize, EncodeError> {
        self.parse("", sql, &[])?;
        self.execute("", [])
    }

    /// COMMIT, and its answer must be that it committed.
    pub fn commit(&mut self) -> usize {
        self.execute_sql("COMMIT").expect("a constant without zero bytes");
        *self.steps.last_mut().expect("just pushed") = Step::Commit;
        self.steps.len() - 1
    }

    /// Asks for the parameter types of a prepared statement.
    pub fn describe(&mut self, statement: &str) -> Result<usize, EncodeError> {
        frontend::describe(b'S', statement, &mut self.encoded)?;
        Ok(self.push(Step::Describe))
    }

    /// Forgets a prepared statement; one that does not exist is no error.
    pub fn close(&mut self, statement: &str) -> Result<usize, EncodeError> {
        frontend::close(b'S', statement, &mut self.encoded)?;
        Ok(self.push(Step::Close))
    }

    fn push(&mut self, step: Step) -> usize {
        self.steps.push(step);
        self.steps.len() - 1
    }
}

fn text_parameter(
    param: Option<&[u8]>,
    out: &mut BytesMut,
) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
    Ok(match param {
        Some(text) => {
            out.extend_from_slice(text);
            IsNull::No
        }
        None => IsNull::Yes,
    })
}

/// A pipeline whose answers are awaited.
#[derive(Debug)]
pub struct Sent {
    answers: Answers,
    /// What sending met with.
    failure: Option<RawError>,
}

impl RawConnection {
    /// Runs all steps with one Sync, and clears the pipeline. After a [`PipelineError::Step`] or
    /// [`PipelineError::RolledBack`] the connection can be used again; an open transaction has then failed. Not to be
    /// dropped before it is done: the connection then refuses further work.
    pub async fn run(&mut self, pipeline: &mut Pipeline) -> Result<Outcome, PipelineError> {
        let mut sent = self.send_pipeline(pipeline).await;
        self.answered(&mut sent).await
    }

    /// The first half of [`Self::run`]: the server has all steps, and works on them.
    pub async fn send_pipeline(&mut self, pipeline: &mut Pipeline) -> Sent {
        frontend::sync(&mut pipeline.encoded);
        let mut answers = Answers::new(std::mem::take(&mut pipeline.steps));
        let failure = self.send_steps(&pipeline.encoded, &mut answers).await.err();
        pipeline.clear();
        Sent { answers, failure }
    }

    /// The other half. Nothing is lost by dropping the future before it is done, as long as it is called again.
    pub async fn answered(&mut self, sent: &mut Sent) -> Result<Outcome, PipelineError> {
        let received = match sent.failure.take() {
            Some(failure) => Err(failure),
            None => self.take_answers(&mut sent.answers).await,
        };
        std::mem::take(&mut sent.answers).verdict(received)
    }

    /// Writes, and takes the answers that come meanwhile.
    async fn send_steps(&mut self, mut unsent: &[u8], answers: &mut Answers) -> Result<(), RawError> {
        self.expect_ready()?;
        while !unsent.is_empty() {
            let sent = self.write_or_read(unsent).await;
            // Even where the link broke: the server may have said why.
            while let Some(frame) = self.frame_at_hand()? {
                self.take_answer(answers, frame)?;
            }
            unsent = &unsent[sent?..];
        }
        self.flush().await
    }

    /// Takes answers until ReadyForQuery.
    async fn take_answers(&mut self, answers: &mut Answers) -> Result<(), RawError> {
        while !answers.ready {
            let frame = self.next_frame().await?;
            self.take_answer(answers, frame)?;
        }
        Ok(())
    }

    fn take_answer(&mut self, answers: &mut Answers, frame: Frame) -> Result<(), RawError> {
        match frame.tag {
            b'N' | b'S' => Ok(()),
            b'A' => {
                self.keep_notification(frame);
                Ok(())
            }
            _ => answers.take(&frame).map_err(|Unexpected| {
                let what = format!("message {:?} in answer to step {}", char::from(frame.tag), answers.step);
                self.violation(what)
            }),
        }
    }
}

/// A message came that does not answer the step whose turn it is.
struct Unexpected;

/// Goes through the answers step by step. Pure.
#[derive(Debug, Default)]
struct Answers {
    steps: Vec<Step>,
    /// The step whose answer is awaited.
    step: usize,
    outcome: Outcome,
    failure: Option<PipelineError>,
    /// ReadyForQuery has come.
    ready: bool,
}

impl Answers {
    fn new(steps: Vec<Step>) -> Self {
        Self { steps, ..Self::default() }
    }

    fn take(&mut self, frame: &Frame) -> Result<(), Unexpected> {
        match (frame.tag, self.steps.get(self.step)) {
            (b'E', _) => {
                let error = Box::new(RawError::from_error_response(&frame.body));
                self.failure.get_or_insert(PipelineError::Step { step: self.step, error });
            }
            // The answer to Sync; after an error it comes early.
            (b'Z', None) => self.ready = true,
            (b'Z', Some(_)) if matches!(self.failure, Some(PipelineError::Step { .. })) => self.ready = true,
            (b'1', Some(Step::Parse)) | (b'3', Some(Step::Close)) => self.step += 1,
            (b'2' | b'D' | b'T', Some(Step::Execute | Step::Commit)) | (b'2' | b'G', Some(Step::Copy)) => {}
            // EmptyQueryResponse.
            (b'I', Some(Step::Execute)) => self.executed(0),
            (b'C', Some(Step::Execute | Step::Copy)) => self.executed(affected_rows(&frame.body).unwrap_or(0)),
            (b'C', Some(Step::Commit)) => {
                if frame.body[..] != *b"COMMIT\0" {
                    self.failure.get_or_insert(PipelineError::RolledBack);
                }
                self.executed(0);
            }
            (b't', Some(Step::Describe)) => {
                self.outcome.parameter_types.push(parameter_types(&frame.body).ok_or(Unexpected)?);
            }
            (b'T' | b'n', Some(Step::Describe)) => self.step += 1,
            _ => return Err(Unexpected),
        }
        Ok(())
    }

    fn executed(&mut self, rows: u64) {
        self.outcome.affected.push(rows);
        self.step += 1;
    }

    fn verdict(self, exchanged: Result<(), RawError>) -> Result<Outcome, PipelineError> {
        match (exchanged, self.failure) {
            (Ok(()), None) => Ok(self.outcome),
            (Ok(()), Some(failure)) => Err(failure),
            // The server's last words tell more than the lost link, but no ReadyForQuery has said what took effect.
            (Err(RawError::Io { .. }), Some(PipelineError::Step { error, .. })) => Err(PipelineError::Raw(*error)),
            (Err(error), _) => Err(PipelineError::Raw(error)),
        }
    }
}

/// The oids of a ParameterDescription.
fn parameter_types(body: &[u8]) -> Option<Vec<u32>> {
    let (count, oids) = body.split_first_chunk::<2>()?;
    let (oids, rest) = oids.as_chunks::<4>();
    (rest.is_empty() && oids.len() == usize::from(u16::from_be_bytes(*count)))
        .then(|| oids.iter().map(|oid| u32::from_be_bytes(*oid)).collect())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn frame(tag: u8, body: &'static [u8]) -> Frame {
        Frame { tag, body: Bytes::from_static(body) }
    }

    fn answers(steps: &[Step], frames: &[(u8, &'static [u8])]) -> Result<Outcome, PipelineError> {
        let mut answers = Answers::new(steps.to_vec());
        for (tag, body) in frames {
            let taken = answers.take(&frame(*tag, body));
            assert!(taken.is_ok(), "{:?} must be expected at step {}", char::from(*tag), answers.step);
        }
        assert!(answers.ready);
        answers.verdict(Ok(()))
    }

    const READY: (u8, &[u8]) = (b'Z', b"I");

    #[test]
    fn answers_find_their_steps() {
        let steps = [Step::Parse, Step::Execute, Step::Describe, Step::Execute, Step::Close, Step::Copy, Step::Commit];
        let frames: &[(u8, &[u8])] = &[
            (b'1', b""),
            (b'2', b""),
            (b'C', b"UPDATE 3\0"),
            (b't', &[0, 2, 0, 0, 0, 23, 0, 0, 0, 25]),
            (b'n', b""),
            (b'2', b""),
            (b'D', b"\0\0"),
            (b'C', b"INSERT 0 1\0"),
            (b'3', b""),
            (b'2', b""),
            (b'G', b"\0\0\0"),
            (b'C', b"COPY 7\0"),
            (b'2', b""),
            (b'C', b"COMMIT\0"),
            READY,
        ];
        let outcome = answers(&steps, frames).expect("no failure");
        assert_eq!(outcome, Outcome { affected: vec![3, 1, 7, 0], parameter_types: vec![vec![23, 25]] });
    }

    #[test]
    fn the_first_error_is_reported_with_its_step() {
        let steps = [Step::Execute, Step::Execute, Step::Commit];
        let frames: &[(u8, &[u8])] =
            &[(b'2', b""), (b'C', b"INSERT 0 1\0"), (b'2', b""), (b'E', b"SERROR\0C23505\0Mduplicate\0\0"), READY];
        match answers(&steps, frames) {
            Err(PipelineError::Step { step: 1, error }) => assert_eq!(error.sqlstate(), Some("23505")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_commit_that_rolled_back_is_no_success() {
        let frames: &[(u8, &[u8])] = &[(b'2', b""), (b'C', b"ROLLBACK\0"), READY];
        assert!(matches!(answers(&[Step::Commit], frames), Err(PipelineError::RolledBack)));
    }

    #[test]
    fn what_answers_nothing_is_refused() {
        let mut answers = Answers::new(vec![Step::Parse]);
        assert!(answers.take(&frame(b'Z', b"I")).is_err(), "ReadyForQuery before the last answer");
        assert!(answers.take(&frame(b'C', b"SELECT 1\0")).is_err());
        assert_eq!(parameter_types(&[0, 2, 0, 0, 0, 23]), None);
    }
}
