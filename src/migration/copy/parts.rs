//! Cutting a large table into parts that cover every row once. Pure.
//!
//! Parts are cut one after the other, as they are asked for: large ones first, smaller ones towards the end, so that
//! whoever reads the last part keeps the others waiting for a moment only (guided self-scheduling).
//!
//! A bound is a value or absent, never a sentinel: the first part is open below where keys may be anything, and the last
//! is open above, so that a row beyond what was known when the cuts were made is copied all the same.

/// What a table is cut along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    /// Blocks of the heap; efficient where TID range scans exist (PostgreSQL 14).
    Blocks(u64),
    /// An integer primary key, from its least value to its greatest.
    Key {
        /// The column, quoted.
        column: String,
        min: i64,
        max: i64,
    },
    /// It cannot be cut.
    None,
}

/// One part: from `from` (inclusive) to `to` (exclusive).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) from: Option<i128>,
    pub(super) to: Option<i128>,
}

/// The whole table.
pub(super) const WHOLE: Part = Part { from: None, to: None };

/// A part below this is not worth a transaction of its own.
pub(super) const LEAST_BYTES: u64 = 8 * 1024 * 1024;

/// What is left of a table to cut.
#[derive(Clone, Debug)]
pub(super) struct Cutter {
    low: i128,
    high: i128,
    /// Where the next part begins; none: everything is cut.
    next: Option<i128>,
    /// Bounds on a part's width.
    least: i128,
    most: i128,
}

impl Cutter {
    /// For a table of `bytes`, in parts of at most about `part_bytes`.
    pub(super) fn new(axis: &Axis, bytes: u64, part_bytes: u64) -> Self {
        let (low, high) = match axis {
            Axis::Blocks(blocks) => (0, i128::from(*blocks)),
            Axis::Key { min, max, .. } => (i128::from(*min), i128::from(*max) + 1),
            Axis::None => (0, 1),
        };
        let span = (high - low).max(1);
        // Rows are taken to be spread evenly.
        let width = |part: u64| (span.saturating_mul(i128::from(part)) / i128::from(bytes.max(1))).clamp(1, span);
        let most = width(part_bytes);
        Self { low, high: low + span, next: Some(low), least: width(LEAST_BYTES.min(part_bytes)).min(most), most }
    }

    /// The next part, for one of `readers` that share the rest.
    pub(super) fn cut(&mut self, readers: usize) -> Option<Part> {
        let from = self.next?;
        let rest = self.high - from;
        let share = rest / (2 * i128::try_from(readers.max(1)).unwrap_or(1));
        let width = share.clamp(self.least, self.most);
        // A remainder that is not worth a part goes with this one.
        let to = (rest - width >= self.least).then_some(from + width);
        self.next = to;
        Some(Part { from: (from > self.low).then_some(from), to })
    }

    /// Whether further readers would find something to do.
    pub(super) fn is_worth_sharing(&self) -> bool {
        self.next.is_some_and(|next| self.high - next >= 2 * self.least)
    }
}

impl Part {
    /// `WHERE …` for this part, without the word; none: every row.
    pub(super) fn condition(&self, axis: &Axis) -> Option<String> {
        let value = |bound: i128| match axis {
            Axis::Blocks(_) => format!("'({bound},0)'::tid"),
            // A negative literal's sign would bind looser than the cast.
            Axis::Key { .. } | Axis::None => format!("('{bound}'::int8)"),
        };
        let column = match axis {
            Axis::Blocks(_) => "ctid",
            Axis::Key { column, .. } => column,
            Axis::None => return None,
        };
        let from = self.from.map(|bound| format!("{column} >= {}", value(bound)));
        let to = self.to.map(|bound| format!("{column} < {}", value(bound)));
        match (from, to) {
            (Some(from), Some(to)) => Some(format!("{from} AND {to}")),
            (one, other) => one.or(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GB: u64 = 1 << 30;

    fn all(mut cutter: Cutter, readers: usize) -> Vec<Part> {
        std::iter::from_fn(|| cutter.cut(readers)).collect()
    }

    proptest! {
        #[test]
        fn every_value_is_in_exactly_one_part(
            min in any::<i64>(), max in any::<i64>(), bytes in 0..100 * GB, part in 1..GB,
            readers in prop::collection::vec(1_usize..9, 1..5), value in any::<i64>(),
        ) {
            let axis = Axis::Key { column: "k".to_owned(), min: min.min(max), max: min.max(max) };
            let mut cutter = Cutter::new(&axis, bytes, part.max(bytes / 1000));
            // Readers come and go meanwhile.
            let mut readers = readers.into_iter().cycle();
            let parts: Vec<Part> = std::iter::from_fn(|| cutter.cut(readers.next().unwrap_or(1))).collect();
            let within = |part: &&Part| {
                part.from.is_none_or(|from| i128::from(value) >= from) && part.to.is_none_or(|to| i128::from(value) < to)
            };
            prop_assert_eq!(parts.iter().filter(within).count(), 1);
        }
    }

    #[test]
    fn the_ends_are_open() {
        let axis = Axis::Blocks(100);
        let conditions: Vec<_> =
            all(Cutter::new(&axis, 99 * GB, 33 * GB), 1).iter().map(|part| part.condition(&axis)).collect();
        assert_eq!(conditions[0].as_deref(), Some("ctid < '(33,0)'::tid"));
        assert_eq!(conditions[1].as_deref(), Some("ctid >= '(33,0)'::tid AND ctid < '(66,0)'::tid"));
        assert!(
            conditions.last().and_then(Option::as_deref).is_some_and(|last| !last.contains(" AND ")),
            "{conditions:?}"
        );
        assert_eq!(all(Cutter::new(&Axis::Blocks(0), 0, GB), 5), [WHOLE]);
        assert_eq!(all(Cutter::new(&Axis::None, GB, GB), 5), [WHOLE]);
        assert_eq!(WHOLE.condition(&axis), None);
    }

    #[test]
    fn parts_shrink_towards_the_end() {
        let parts = all(Cutter::new(&Axis::Blocks(131_072), GB, GB), 4);
        let widths: Vec<i128> = parts.iter().map(|part| part.to.unwrap_or(131_072) - part.from.unwrap_or(0)).collect();
        assert_eq!(widths[0], 131_072 / 8, "the rest is shared, twice over");
        assert!(widths.windows(2).all(|pair| pair[0] >= pair[1] || pair[1] < 2 * 1024), "{widths:?}");
        assert!(widths.iter().all(|width| *width >= 1024), "none below 8 MB: {widths:?}");
        assert_eq!(all(Cutter::new(&Axis::Blocks(1000), LEAST_BYTES, GB), 4), [WHOLE]);
    }
}
