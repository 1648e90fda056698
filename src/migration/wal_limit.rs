//! Whether the source can afford what a migration makes it keep. Pure.
//!
//! A replication slot keeps write-ahead log until the target has it. While rows are copied nothing is given up, so on a
//! busy source it may fill the disk and stop production. `max_slot_wal_keep_size` bounds it on the server (the slot is
//! then lost); without that only we can end it in time.

/// What one slot keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotWal {
    /// Bytes of WAL that the source keeps for it.
    pub(super) retained: u64,
    /// Bytes that can still be written before the server itself drops the slot; none: it never does (or is older than
    /// PostgreSQL 13).
    pub(super) safe: Option<u64>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// Nothing.
    Fine,
    /// An operator should know, and nothing may hold the copy up.
    Warning,
    /// The slot must go.
    Exceeded,
}

/// Judges a slot by the configured limit (none: no limit). A warning comes at half of it, or with three quarters of what the
/// server allows used up.
pub(super) fn judge(wal: SlotWal, limit: Option<u64>) -> Verdict {
    if limit.is_some_and(|limit| wal.retained >= limit) {
        return Verdict::Exceeded;
    }
    let half = limit.is_some_and(|limit| wal.retained >= limit / 2);
    let short = wal.safe.is_some_and(|safe| safe < wal.retained / 3);
    if half || short { Verdict::Warning } else { Verdict::Fine }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_is_a_warning_and_all_is_the_end() {
        let of = |retained, safe, limit| judge(SlotWal { retained, safe }, limit);
        assert_eq!(of(u64::MAX, None, None), Verdict::Fine, "without a limit of any kind");
        assert_eq!(of(49, None, Some(100)), Verdict::Fine);
        assert_eq!(of(50, None, Some(100)), Verdict::Warning);
        assert_eq!(of(100, None, Some(100)), Verdict::Exceeded);
        assert_eq!(of(74, Some(26), None), Verdict::Fine);
        assert_eq!(of(78, Some(22), None), Verdict::Warning, "the server itself ends it soon");
        assert_eq!(of(1, Some(0), Some(1000)), Verdict::Fine, "nothing is kept yet");
    }
}
