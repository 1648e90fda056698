//! Cutting a large table into parts that cover every row once. Pure.
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

/// How many parts a table of `bytes` is worth.
pub(super) fn wanted(bytes: u64, part_bytes: u64) -> usize {
    // More than this brings nothing: a failed part makes the whole table be copied again anyway.
    usize::try_from(bytes.div_ceil(part_bytes.max(1))).unwrap_or(usize::MAX).clamp(1, 10_000)
}

/// Cuts the axis into at most `wanted` parts of the same width.
pub(super) fn cut(axis: &Axis, wanted: usize) -> Vec<Part> {
    let (low, high) = match axis {
        Axis::Blocks(blocks) => (0, i128::from(*blocks)),
        Axis::Key { min, max, .. } => (i128::from(*min), i128::from(*max) + 1),
        Axis::None => return vec![WHOLE],
    };
    let span = (high - low).max(1);
    let count = i128::try_from(wanted.max(1)).unwrap_or(1).min(span);
    let bound = |at: i128| (at > 0 && at < count).then(|| low + span * at / count);
    (0..count).map(|at| Part { from: bound(at), to: bound(at + 1) }).collect()
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

    proptest! {
        #[test]
        fn every_value_is_in_exactly_one_part(min in any::<i64>(), max in any::<i64>(), wanted in 1_usize..50, value in any::<i64>()) {
            let axis = Axis::Key { column: "k".to_owned(), min: min.min(max), max: min.max(max) };
            let parts = cut(&axis, wanted);
            let within = |part: &&Part| {
                part.from.is_none_or(|from| i128::from(value) >= from) && part.to.is_none_or(|to| i128::from(value) < to)
            };
            prop_assert_eq!(parts.iter().filter(within).count(), 1);
            prop_assert!(parts.len() <= wanted);
        }
    }

    #[test]
    fn the_ends_are_open() {
        let axis = Axis::Blocks(100);
        let conditions: Vec<_> = cut(&axis, 3).iter().map(|part| part.condition(&axis)).collect();
        assert_eq!(
            conditions.iter().flatten().map(String::as_str).collect::<Vec<_>>(),
            ["ctid < '(33,0)'::tid", "ctid >= '(33,0)'::tid AND ctid < '(66,0)'::tid", "ctid >= '(66,0)'::tid"]
        );
        assert_eq!(cut(&Axis::Blocks(0), 5), [WHOLE]);
        assert_eq!(cut(&Axis::None, 5), [WHOLE]);
        assert_eq!(WHOLE.condition(&axis), None);
    }

    #[test]
    fn parts_follow_the_size() {
        assert_eq!([0, 1, 10, 11, 25].map(|bytes| wanted(bytes, 10)), [1, 1, 1, 2, 3]);
        assert_eq!(wanted(u64::MAX, 0), 10_000);
    }
}
