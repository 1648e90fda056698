//! The messages of pgoutput, and how each is read. Field order is that of the PostgreSQL documentation.

use bytes::Bytes;

use crate::lsn::Lsn;
use crate::pgoutput::reader::Reader;
use crate::pgoutput::{
    BeginPrepare, CommitPrepared, DecodeError, Prepare, RollbackPrepared, StreamAbort, StreamCommit, StreamStart,
};

/// Microseconds since 2000-01-01 00:00:00 UTC, the clock of the server that wrote the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Microseconds since 1970-01-01 00:00:00 UTC.
    pub fn unix_micros(self) -> i64 {
        self.0.saturating_add(946_684_800_000_000)
    }
}

/// One decoded message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// `B`
    Begin(Begin),
    /// `C`
    Commit(Commit),
    /// `O`
    Origin(Origin),
    /// `R`
    Relation(Relation),
    /// `Y`
    Type(TypeName),
    /// `I`
    Insert(Insert),
    /// `U`
    Update(Update),
    /// `D`
    Delete(Delete),
    /// `T`
    Truncate(Truncate),
    /// `M`, sent only when the `messages` option is on.
    Logical(LogicalMessage),
    /// `S`
    StreamStart(StreamStart),
    /// `E`
    StreamStop,
    /// `c`
    StreamCommit(StreamCommit),
    /// `A`
    StreamAbort(StreamAbort),
    /// `b`
    BeginPrepare(BeginPrepare),
    /// `P`
    Prepare(Prepare),
    /// `K`
    CommitPrepared(CommitPrepared),
    /// `r`
    RollbackPrepared(RollbackPrepared),
    /// `p`
    StreamPrepare(Prepare),
}

/// A transaction begins. It has committed already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Where the commit record starts; equals `commit_lsn` of the [`Commit`] that ends it.
    pub final_lsn: Lsn,
    /// When it committed.
    pub timestamp: Timestamp,
    /// Top-level transaction id.
    pub xid: u32,
}

impl Begin {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            final_lsn: reader.lsn("final LSN")?,
            timestamp: reader.timestamp("commit time")?,
            xid: reader.u32("xid")?,
        })
    }
}

/// A transaction ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Where the commit record starts.
    pub commit_lsn: Lsn,
    /// Where the commit record ends: confirming this position confirms the transaction.
    pub end_lsn: Lsn,
    /// When it committed.
    pub timestamp: Timestamp,
}

impl Commit {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.no_flags()?;
        Ok(Self {
            commit_lsn: reader.lsn("commit LSN")?,
            end_lsn: reader.lsn("end LSN")?,
            timestamp: reader.timestamp("commit time")?,
        })
    }
}

/// The transaction came to the source by replication from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Commit position on that origin.
    pub commit_lsn: Lsn,
    /// Name of the replication origin.
    pub name: String,
}

impl Origin {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { commit_lsn: reader.lsn("origin LSN")?, name: reader.string("origin name")? })
    }
}

/// `pg_class.relreplident`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// `d`: the primary key.
    Default,
    /// `n`
    Nothing,
    /// `f`
    Full,
    /// `i`: an index.
    Index,
}

/// What a table looks like; sent before its first change and again after it was altered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// `pg_class.oid` on the source.
    pub oid: u32,
    /// Schema; the empty name on the wire means pg_catalog and is given as such here.
    pub schema: String,
    /// Table.
    pub name: String,
    /// What old tuples hold.
    pub replica_identity: ReplicaIdentity,
    /// Published columns, in order; dropped and (before PostgreSQL 18) generated ones are left out.
    pub columns: Vec<Column>,
}

/// A published column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Part of the replica identity; under FULL, every column is.
    pub key: bool,
    /// Name.
    pub name: String,
    /// `pg_type.oid` on the source.
    pub type_oid: u32,
    /// `atttypmod`, -1 where there is none.
    pub type_modifier: i32,
}

impl Relation {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        let xid = reader.streamed_xid(streaming)?;
        let oid = reader.u32("relation oid")?;
        let schema = schema_name(reader)?;
        let name = reader.string("relation name")?;
        let replica_identity = match reader.u8("replica identity")? {
            b'd' => ReplicaIdentity::Default,
            b'n' => ReplicaIdentity::Nothing,
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            _ => return Err(reader.invalid("replica identity")),
        };
        let count = reader.u16("number of columns")?;
        let columns = (0..count).map(|_| Column::read(reader)).collect::<Result<_, _>>()?;
        Ok(Self { xid, oid, schema, name, replica_identity, columns })
    }
}

impl Column {
    fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            key: match reader.u8("column flags")? {
                0 => false,
                1 => true,
                _ => return Err(reader.invalid("column flags")),
            },
            name: reader.string("column name")?,
            type_oid: reader.u32("column type")?,
            type_modifier: reader.i32("type modifier")?,
        })
    }
}

/// The name of a type that is not built in; sent before the [`Relation`] that uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeName {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// `pg_type.oid` on the source.
    pub oid: u32,
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
}

impl TypeName {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        Ok(Self {
            xid: reader.streamed_xid(streaming)?,
            oid: reader.u32("type oid")?,
            schema: schema_name(reader)?,
            name: reader.string("type name")?,
        })
    }
}

/// Schema of a relation or type: pgoutput sends an empty name for pg_catalog.
fn schema_name(reader: &mut Reader<'_>) -> Result<String, DecodeError> {
    let schema = reader.string("schema")?;
    Ok(if schema.is_empty() { "pg_catalog".to_owned() } else { schema })
}

/// One value of a tuple.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TupleValue {
    /// `n`: NULL; in a key tuple also every column outside the identity.
    Null,
    /// `u`: a large value that the update left as it was; not sent.
    UnchangedToast,
    /// `t`: output of the type's output function.
    Text(Bytes),
    /// `b`: output of the type's send function.
    Binary(Bytes),
}

/// The values of a row, in the order of [`Relation::columns`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// One for each published column.
    pub values: Vec<TupleValue>,
}

impl Tuple {
    fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = reader.u16("number of values")?;
        // A count that lies reserves no more than the message could hold.
        let mut values = Vec::with_capacity(usize::from(count).min(reader.remaining()));
        for _ in 0..count {
            values.push(TupleValue::read(reader)?);
        }
        Ok(Self { values })
    }
}

impl TupleValue {
    fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(match reader.u8("kind of value")? {
            b'n' => Self::Null,
            b'u' => Self::UnchangedToast,
            b't' => Self::Text(reader.counted_bytes("value")?),
            b'b' => Self::Binary(reader.counted_bytes("value")?),
            _ => return Err(reader.invalid("kind of value")),
        })
    }
}

/// A row was inserted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Insert {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// Table.
    pub relation: u32,
    /// The row.
    pub new: Tuple,
}

impl Insert {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        let xid = reader.streamed_xid(streaming)?;
        let relation = reader.u32("relation oid")?;
        match reader.u8("kind of tuple")? {
            b'N' => Ok(Self { xid, relation, new: Tuple::read(reader)? }),
            _ => Err(reader.invalid("kind of tuple")),
        }
    }
}

/// What is known of a row before it was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OldTuple {
    /// `K`: the identity's columns; all others are [`TupleValue::Null`], which says nothing about them.
    Key(Tuple),
    /// `O`: the whole row (REPLICA IDENTITY FULL).
    Full(Tuple),
}

/// A row was updated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// Table.
    pub relation: u32,
    /// `Key` where the identity changed, `Full` under REPLICA IDENTITY FULL; none: the identity is that of `new`.
    pub old: Option<OldTuple>,
    /// The row as it is now.
    pub new: Tuple,
}

impl Update {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        let xid = reader.streamed_xid(streaming)?;
        let relation = reader.u32("relation oid")?;
        let mut kind = reader.u8("kind of tuple")?;
        let old = match kind {
            b'K' => Some(OldTuple::Key(Tuple::read(reader)?)),
            b'O' => Some(OldTuple::Full(Tuple::read(reader)?)),
            _ => None,
        };
        if old.is_some() {
            kind = reader.u8("kind of tuple")?;
        }
        match kind {
            b'N' => Ok(Self { xid, relation, old, new: Tuple::read(reader)? }),
            _ => Err(reader.invalid("kind of tuple")),
        }
    }
}

/// A row was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delete {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// Table.
    pub relation: u32,
    /// Which row.
    pub old: OldTuple,
}

impl Delete {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        let xid = reader.streamed_xid(streaming)?;
        let relation = reader.u32("relation oid")?;
        let old = match reader.u8("kind of tuple")? {
            b'K' => OldTuple::Key(Tuple::read(reader)?),
            b'O' => OldTuple::Full(Tuple::read(reader)?),
            _ => return Err(reader.invalid("kind of tuple")),
        };
        Ok(Self { xid, relation, old })
    }
}

/// Tables were truncated by one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truncate {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// CASCADE was said.
    pub cascade: bool,
    /// RESTART IDENTITY was said.
    pub restart_identity: bool,
    /// The tables, those that CASCADE reached among them.
    pub relations: Vec<u32>,
}

impl Truncate {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        let xid = reader.streamed_xid(streaming)?;
        let count = reader.u32("number of relations")?;
        let options = reader.u8("options")?;
        if options & !3 != 0 {
            return Err(reader.invalid("options"));
        }
        // Collected one by one: a count that lies ends at the end of the message and reserves nothing.
        let mut relations = Vec::new();
        for _ in 0..count {
            relations.push(reader.u32("relation oid")?);
        }
        Ok(Self { xid, cascade: options & 1 != 0, restart_identity: options & 2 != 0, relations })
    }
}

/// `pg_logical_emit_message`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalMessage {
    /// (Sub)transaction, in a streamed block.
    pub xid: Option<u32>,
    /// Part of its transaction, or sent the moment it was written.
    pub transactional: bool,
    /// Position of the message.
    pub lsn: Lsn,
    /// Prefix given by the sender.
    pub prefix: String,
    /// Content.
    pub content: Bytes,
}

impl LogicalMessage {
    pub(super) fn read(reader: &mut Reader<'_>, streaming: bool) -> Result<Self, DecodeError> {
        Ok(Self {
            xid: reader.streamed_xid(streaming)?,
            transactional: match reader.u8("flags")? {
                0 => false,
                1 => true,
                _ => return Err(reader.invalid("flags")),
            },
            lsn: reader.lsn("message LSN")?,
            prefix: reader.string("prefix")?,
            content: reader.counted_bytes("content")?,
        })
    }
}
