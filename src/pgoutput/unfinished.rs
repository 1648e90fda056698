//! Messages about transactions that have not committed yet: streamed while they run (version 2), or prepared (version 3).

use crate::lsn::Lsn;
use crate::pgoutput::reader::Reader;
use crate::pgoutput::{Commit, DecodeError, Timestamp};

/// A block of a transaction that is still running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamStart {
    /// Top-level transaction id.
    pub xid: u32,
    /// The transaction's first block.
    pub first: bool,
}

impl StreamStart {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let xid = reader.u32("xid")?;
        match reader.u8("first segment")? {
            0 => Ok(Self { xid, first: false }),
            1 => Ok(Self { xid, first: true }),
            _ => Err(reader.invalid("first segment")),
        }
    }
}

/// A streamed transaction committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamCommit {
    /// Top-level transaction id.
    pub xid: u32,
    /// The same as for a transaction that was not streamed.
    pub commit: Commit,
}

impl StreamCommit {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { xid: reader.u32("xid")?, commit: Commit::read(reader)? })
    }
}

/// A streamed transaction, or a subtransaction of it, rolled back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamAbort {
    /// Top-level transaction id.
    pub xid: u32,
    /// What rolled back; equals `xid` for the whole.
    pub subtransaction_xid: u32,
    /// Position and time of the rollback, in version 4 with parallel streaming.
    pub aborted: Option<(Lsn, Timestamp)>,
}

impl StreamAbort {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let xid = reader.u32("xid")?;
        let subtransaction_xid = reader.u32("subtransaction xid")?;
        let aborted = match reader.remaining() {
            0 => None,
            _ => Some((reader.lsn("abort LSN")?, reader.timestamp("abort time")?)),
        };
        Ok(Self { xid, subtransaction_xid, aborted })
    }
}

/// A transaction that will end in a [`Prepare`] begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeginPrepare {
    /// Where the prepare record starts.
    pub prepare_lsn: Lsn,
    /// Where it ends.
    pub end_lsn: Lsn,
    /// When it was prepared.
    pub timestamp: Timestamp,
    /// Top-level transaction id.
    pub xid: u32,
    /// Name given to PREPARE TRANSACTION.
    pub gid: String,
}

impl BeginPrepare {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            prepare_lsn: reader.lsn("prepare LSN")?,
            end_lsn: reader.lsn("end LSN")?,
            timestamp: reader.timestamp("prepare time")?,
            xid: reader.u32("xid")?,
            gid: reader.string("gid")?,
        })
    }
}

/// PREPARE TRANSACTION, streamed or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepare {
    /// Where the prepare record starts.
    pub prepare_lsn: Lsn,
    /// Where it ends.
    pub end_lsn: Lsn,
    /// When it was prepared.
    pub timestamp: Timestamp,
    /// Top-level transaction id.
    pub xid: u32,
    /// Name.
    pub gid: String,
}

impl Prepare {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.no_flags()?;
        Ok(Self {
            prepare_lsn: reader.lsn("prepare LSN")?,
            end_lsn: reader.lsn("end LSN")?,
            timestamp: reader.timestamp("prepare time")?,
            xid: reader.u32("xid")?,
            gid: reader.string("gid")?,
        })
    }
}

/// COMMIT PREPARED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitPrepared {
    /// Where the commit record starts.
    pub commit_lsn: Lsn,
    /// Where it ends.
    pub end_lsn: Lsn,
    /// When it committed.
    pub timestamp: Timestamp,
    /// Top-level transaction id.
    pub xid: u32,
    /// Name.
    pub gid: String,
}

impl CommitPrepared {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.no_flags()?;
        Ok(Self {
            commit_lsn: reader.lsn("commit LSN")?,
            end_lsn: reader.lsn("end LSN")?,
            timestamp: reader.timestamp("commit time")?,
            xid: reader.u32("xid")?,
            gid: reader.string("gid")?,
        })
    }
}

/// ROLLBACK PREPARED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RollbackPrepared {
    /// Where the prepare record ends.
    pub prepare_end_lsn: Lsn,
    /// Where the rollback record ends.
    pub rollback_end_lsn: Lsn,
    /// When it was prepared.
    pub prepare_timestamp: Timestamp,
    /// When it rolled back.
    pub rollback_timestamp: Timestamp,
    /// Top-level transaction id.
    pub xid: u32,
    /// Name.
    pub gid: String,
}

impl RollbackPrepared {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.no_flags()?;
        Ok(Self {
            prepare_end_lsn: reader.lsn("prepare end LSN")?,
            rollback_end_lsn: reader.lsn("rollback end LSN")?,
            prepare_timestamp: reader.timestamp("prepare time")?,
            rollback_timestamp: reader.timestamp("rollback time")?,
            xid: reader.u32("xid")?,
            gid: reader.string("gid")?,
        })
    }
}
