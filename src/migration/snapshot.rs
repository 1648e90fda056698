//! The snapshot a table was copied under, and which streamed transactions it already contains.
//!
//! A table is handed over from its copy to the stream without a gap and without a double: a streamed transaction is
//! skipped for the table iff its commit LSN is below the table's hand-over position `L` **and** its top-level xid was
//! visible in the table's snapshot. `L = pg_current_wal_insert_lsn()` is read after the snapshot was taken, so whatever
//! is visible has its commit record below `L`. Past `L` the snapshot is retired: xids in the stream are 32 bits wide and
//! come again.
//!
//! ```text
//! snapshot 740:745:741     xid 739 committed at 0/1A0   visible      → skipped, the copy has it
//! L = 0/200                xid 741 committed at 0/1F0   in progress  → applied, although its commit is below L
//!                          xid 746 committed at 0/210   above L      → applied, without a look at the snapshot
//! ```

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::lsn::Lsn;

/// `txid_current_snapshot()` of the transaction that a table was copied under.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TxidSnapshot {
    /// Lowest transaction still in progress, with its epoch (64 bits). Everything below has ended.
    pub xmin: u64,
    /// First transaction that had not ended, as far as the snapshot knows; everything from here on is invisible.
    pub xmax: u64,
    /// In progress between the two.
    pub xip: Vec<u64>,
}

impl TxidSnapshot {
    /// Whether the transaction with the 32-bit id `xid` is visible. `xid` must have committed, and must be within 2^31 of
    /// the snapshot: the caller guarantees it by asking only below the hand-over position.
    pub fn sees(&self, xid: u32) -> bool {
        if precedes(xid, low(self.xmin)) {
            return true;
        }
        precedes(xid, low(self.xmax)) && !self.xip.iter().any(|&running| low(running) == xid)
    }
}

/// The snapshot of a table's copy together with the position up to which it has to be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// What the copy saw.
    pub snapshot: TxidSnapshot,
    /// `L`: `pg_current_wal_insert_lsn()` read after the snapshot was taken.
    pub position: Lsn,
}

impl HandOver {
    /// Whether the copy already contains what the transaction `xid` did to the table. `commit_lsn` is where its commit
    /// record starts (`final_lsn` of pgoutput's Begin).
    pub fn contains(&self, commit_lsn: Lsn, xid: u32) -> bool {
        commit_lsn < self.position && self.snapshot.sees(xid)
    }
}

/// `a` is older than `b` on the circle of 32-bit xids (TransactionIdPrecedes of transam.c).
fn precedes(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

fn low(xid: u64) -> u32 {
    (xid & 0xFFFF_FFFF) as u32
}

/// The text is not `xmin:xmax:xip,xip`.
#[derive(Debug, thiserror::Error)]
#[error("not a txid_snapshot: {0:?}")]
pub struct ParseSnapshotError(String);

impl FromStr for TxidSnapshot {
    type Err = ParseSnapshotError;

    /// Reads the text form of `txid_snapshot` and `pg_snapshot`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseSnapshotError(text.to_owned());
        let mut parts = text.split(':');
        let (Some(xmin), Some(xmax), Some(xip), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(bad());
        };
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| bad());
        let xip = xip.split(',').filter(|part| !part.is_empty()).map(number).collect::<Result<_, _>>()?;
        Ok(Self { xmin: number(xmin)?, xmax: number(xmax)?, xip })
    }
}

impl std::fmt::Display for TxidSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let xip = self.xip.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        write!(f, "{}:{}:{xip}", self.xmin, self.xmax)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visibility_follows_the_snapshot_also_across_the_wrap() {
        let plain: TxidSnapshot = "740:745:741,743".parse().expect("valid");
        assert_eq!(plain.to_string(), "740:745:741,743");
        for (xid, seen) in
            [(739, true), (740, true), (741, false), (742, true), (743, false), (744, true), (745, false)]
        {
            assert_eq!(plain.sees(xid), seen, "{xid}");
        }
        let epoch = 3_u64 << 32;
        let wrapped = TxidSnapshot { xmin: epoch - 2, xmax: epoch + 5, xip: vec![epoch - 1, epoch + 3] };
        for (xid, seen) in [(u32::MAX - 5, true), (u32::MAX, false), (3, false), (4, true), (5, false), (100, false)] {
            assert_eq!(wrapped.sees(xid), seen, "{xid}");
        }
        for bad in ["", "1:2", "1:2:3:4", "a:b:", "1:2:x"] {
            assert!(bad.parse::<TxidSnapshot>().is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn past_the_hand_over_position_the_snapshot_is_not_asked() {
        let hand_over = HandOver { snapshot: "740:745:741".parse().expect("valid"), position: Lsn(0x200) };
        assert!(hand_over.contains(Lsn(0x1A0), 739));
        assert!(!hand_over.contains(Lsn(0x1F0), 741));
        assert!(!hand_over.contains(Lsn(0x200), 739), "a wrapped xid past L is a new transaction");
    }
}
