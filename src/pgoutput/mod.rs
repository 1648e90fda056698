//! Decoder of pgoutput, the output plugin of PostgreSQL's own logical replication (PostgreSQL documentation, "Logical
//! Replication Message Formats"; `src/backend/replication/logical/proto.c`).
//!
//! Pure: bytes in, [`Message`] out; values are slices of the input, nothing is copied. It keeps no state: what relation
//! an oid stands for, and which transaction a row belongs to, is for whoever holds the stream. It never panics, whatever
//! the bytes, and never guesses: a message that is too short, too long or unknown is an error, because a change that was
//! read wrongly is worse than a migration that stopped.
//!
//! # What a stream looks like
//!
//! One message is the payload of one XLogData of the replication stream (`postgres::walsender`). Version 1 of the
//! protocol sends whole transactions in commit order, each after it has committed:
//!
//! ```text
//! B  final_lsn=0/16B2D10 xid=742                       Begin; final_lsn is where the commit record starts
//! R  oid=16385 public.film (film_id key, title, …)     before the first change of a table, and again after it changed
//! I  16385 N(1, "Alien")                               Insert: new row
//! U  16385 N(1, "Aliens")                              Update: identity unchanged, so no old tuple
//! U  16385 K(1, n) N(2, "Aliens")                      Update: identity changed, K has the identity's columns only
//! U  16385 O(…) N(…)                                   Update under REPLICA IDENTITY FULL
//! D  16385 K(2, n)                                     Delete
//! T  16385 cascade                                     Truncate
//! C  commit_lsn=0/16B2D10 end_lsn=0/16B2D40            Commit; end_lsn is where the next record starts
//! ```
//!
//! Two things that look alike are not: in a `K` tuple, [`TupleValue::Null`] stands in every column outside the identity
//! and says nothing about the row; in `N` and `O` it is NULL. [`TupleValue::UnchangedToast`] is a large value that the
//! update did not touch: the row on the target keeps what it has.
//!
//! Version 2 (PostgreSQL 14) adds streamed transactions: blocks `S … E` of transactions still running, ended by `c` or
//! `A`; inside a block every message starts with the xid of its (sub)transaction, which is why [`decode`] must be told.
//! Version 3 (15) adds two-phase commit (`b P K r p`), version 4 (16) parallel streaming (`A` with position and time).

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod message;
mod reader;
#[cfg(test)]
mod tests;
mod unfinished;

use bytes::Bytes;

pub use message::{
    Begin, Column, Commit, Delete, Insert, LogicalMessage, Message, OldTuple, Origin, Relation, ReplicaIdentity,
    Timestamp, Truncate, Tuple, TupleValue, TypeName, Update,
};
use reader::Reader;
pub use unfinished::{BeginPrepare, CommitPrepared, Prepare, RollbackPrepared, StreamAbort, StreamCommit, StreamStart};

/// Bytes that are no pgoutput message. Names the part, never the content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No such message type.
    #[error("unknown pgoutput message type {0:#04x}")]
    UnknownMessage(u8),
    /// The message ends before this field does.
    #[error("pgoutput message {message:?} ends inside {field}")]
    Truncated {
        /// Message type.
        message: char,
        /// What was being read.
        field: &'static str,
    },
    /// Bytes are left over.
    #[error("pgoutput message {message:?} has {bytes} bytes too many")]
    Trailing {
        /// Message type.
        message: char,
        /// How many.
        bytes: usize,
    },
    /// A field holds what it cannot hold.
    #[error("pgoutput message {message:?}: invalid {field}")]
    Invalid {
        /// Message type.
        message: char,
        /// Which field.
        field: &'static str,
    },
    /// An empty XLogData.
    #[error("empty pgoutput message")]
    Empty,
}

/// Decodes one message. `streaming`: it stands between Stream Start and Stream Stop, where changes begin with their xid.
pub fn decode(data: &Bytes, streaming: bool) -> Result<Message, DecodeError> {
    let Some(&tag) = data.first() else { return Err(DecodeError::Empty) };
    let mut reader = Reader::new(data, tag);
    let message = match tag {
        b'B' => Message::Begin(Begin::read(&mut reader)?),
        b'C' => Message::Commit(Commit::read(&mut reader)?),
        b'O' => Message::Origin(Origin::read(&mut reader)?),
        b'R' => Message::Relation(Relation::read(&mut reader, streaming)?),
        b'Y' => Message::Type(TypeName::read(&mut reader, streaming)?),
        b'I' => Message::Insert(Insert::read(&mut reader, streaming)?),
        b'U' => Message::Update(Update::read(&mut reader, streaming)?),
        b'D' => Message::Delete(Delete::read(&mut reader, streaming)?),
        b'T' => Message::Truncate(Truncate::read(&mut reader, streaming)?),
        b'M' => Message::Logical(LogicalMessage::read(&mut reader, streaming)?),
        b'S' => Message::StreamStart(StreamStart::read(&mut reader)?),
        b'E' => Message::StreamStop,
        b'c' => Message::StreamCommit(StreamCommit::read(&mut reader)?),
        b'A' => Message::StreamAbort(StreamAbort::read(&mut reader)?),
        b'b' => Message::BeginPrepare(BeginPrepare::read(&mut reader)?),
        b'P' => Message::Prepare(Prepare::read(&mut reader)?),
        b'K' => Message::CommitPrepared(CommitPrepared::read(&mut reader)?),
        b'r' => Message::RollbackPrepared(RollbackPrepared::read(&mut reader)?),
        b'p' => Message::StreamPrepare(Prepare::read(&mut reader)?),
        other => return Err(DecodeError::UnknownMessage(other)),
    };
    reader.finish()?;
    Ok(message)
}
