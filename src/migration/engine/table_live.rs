//! The full load of one table as it goes on, and the sums over all of them that the gauges show.

use std::time::Instant;

use crate::catalog::tables::TableState;
use crate::migration::verify::identity::Identities;
use crate::telemetry::metrics::WorkState;

/// Tables and indexes of a full load, by state in the order of [`WorkState::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) tables: [i64; WorkState::ALL.len()],
    pub(super) indexes: [i64; WorkState::ALL.len()],
}

impl Counted {
    /// The sums. Indexes are known once the definitions were dumped; each connection that builds has one of them in hand.
    pub(super) fn of<'a>(tables: impl Iterator<Item = &'a TableLive>) -> Self {
        let mut counted = Self::default();
        let at = |state: WorkState| WorkState::ALL.iter().position(|one| *one == state).unwrap_or_default();
        for table in tables {
            let state = match table.state.unwrap_or(TableState::Waiting) {
                TableState::Waiting => WorkState::Waiting,
                TableState::Copying => WorkState::Running,
                TableState::Copied | TableState::Ready => WorkState::Done,
                TableState::Failed => WorkState::Failed,
            };
            counted.tables[at(state)] += 1;
            let IndexesLive { built, total, building } = table.indexes.unwrap_or_default();
            let signed = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
            let left = total.saturating_sub(built);
            counted.indexes[at(WorkState::Done)] += signed(built.min(total));
            if state == WorkState::Failed {
                counted.indexes[at(WorkState::Failed)] += signed(left);
            } else {
                counted.indexes[at(WorkState::Running)] += signed(building.min(left));
                counted.indexes[at(WorkState::Waiting)] += signed(left.saturating_sub(building));
            }
        }
        counted
    }
}

/// Indexes and constraints of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct IndexesLive {
    pub(super) built: usize,
    pub(super) total: usize,
    /// Connections that build some now.
    pub(super) building: usize,
}

/// One table's full load.
#[derive(Clone, Debug, Default)]
pub(super) struct TableLive {
    pub(super) state: Option<TableState>,
    pub(super) rows: u64,
    pub(super) bytes: u64,
    pub(super) rows_total: Option<u64>,
    pub(super) bytes_total: Option<u64>,
    /// None: not known yet.
    pub(super) indexes: Option<IndexesLive>,
    /// Since when its rows are copied; none: not in this process, or they are not.
    pub(super) copying_since: Option<Instant>,
    /// What the last verification found, in a word.
    pub(super) verification: Option<String>,
    /// What the table was when it was about to be verified; none: not by this process.
    pub(super) verified: Option<Verified>,
}

/// What tells whether the rows of a table may be others than those that were compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verified {
    /// Row changes that had come along the stream.
    pub(super) changes: u64,
    /// A rewrite sends none.
    pub(super) identities: Identities,
}

impl TableLive {
    /// Bytes per second, and seconds that are left; none: not known. The share that is done is told by rows where their
    /// number is estimated, because bytes of COPY are not those of the table.
    pub(super) fn speed(&self, now: Instant) -> (Option<u64>, Option<f64>) {
        let seconds = match (self.state, self.copying_since) {
            (Some(TableState::Copying), Some(since)) => (now - since).as_secs_f64(),
            _ => return (None, None),
        };
        if seconds < 0.5 || self.bytes == 0 {
            return (None, None);
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let (bytes, left) = {
            let share = |done: u64, total: Option<u64>| {
                total.filter(|total| *total > 0).map(|total| (done as f64 / total as f64).clamp(1e-9, 1.0))
            };
            let share = share(self.rows, self.rows_total).or(share(self.bytes, self.bytes_total));
            (self.bytes as f64 / seconds, share.map(|share| seconds * (1.0 - share) / share))
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, and no table is so large"
        )]
        (Some(bytes as u64), left)
    }

    /// How far its indexes are, for a column of a table.
    pub(super) fn indexes_shown(&self) -> String {
        match (self.state, self.indexes) {
            (Some(TableState::Ready), _) => "built".to_owned(),
            (_, Some(IndexesLive { built, total, .. })) => format!("{built}/{total}"),
            (_, None) => "pending".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(state: TableState, built: usize, total: usize, building: usize) -> TableLive {
        let indexes = Some(IndexesLive { built, total, building });
        TableLive { state: Some(state), indexes, ..TableLive::default() }
    }

    /// In the order of [`WorkState::ALL`]: waiting, running, done, failed.
    #[track_caller]
    fn counts(tables: &[TableLive], expected_tables: [i64; 4], expected_indexes: [i64; 4]) {
        let counted = Counted::of(tables.iter());
        assert_eq!((counted.tables, counted.indexes), (expected_tables, expected_indexes));
    }

    #[test]
    fn every_index_is_in_one_state_from_the_plan_to_the_end() {
        counts(&[TableLive::default()], [1, 0, 0, 0], [0, 0, 0, 0]);
        counts(&[table(TableState::Waiting, 0, 3, 0)], [1, 0, 0, 0], [3, 0, 0, 0]);
        counts(&[table(TableState::Copying, 0, 3, 0)], [0, 1, 0, 0], [3, 0, 0, 0]);
        // Its rows are there, and no connection is free for its indexes.
        counts(&[table(TableState::Copied, 0, 3, 0)], [0, 0, 1, 0], [3, 0, 0, 0]);
        counts(&[table(TableState::Copied, 0, 3, 2)], [0, 0, 1, 0], [1, 2, 0, 0]);
        // Between the last index and its report.
        counts(&[table(TableState::Copied, 3, 3, 1)], [0, 0, 1, 0], [0, 0, 3, 0]);
        counts(&[table(TableState::Ready, 3, 3, 0)], [0, 0, 1, 0], [0, 0, 3, 0]);
        counts(&[table(TableState::Failed, 1, 3, 0)], [0, 0, 0, 1], [0, 0, 1, 2]);
        let several = [table(TableState::Copied, 1, 4, 1), table(TableState::Waiting, 0, 2, 0)];
        counts(&several, [1, 0, 1, 0], [4, 1, 1, 0]);
    }

    #[test]
    fn the_column_says_how_many_of_how_many() {
        assert_eq!(TableLive::default().indexes_shown(), "pending");
        assert_eq!(table(TableState::Copying, 0, 3, 0).indexes_shown(), "0/3");
        assert_eq!(table(TableState::Copied, 2, 3, 1).indexes_shown(), "2/3");
        assert_eq!(table(TableState::Ready, 3, 3, 0).indexes_shown(), "built");
    }
}
