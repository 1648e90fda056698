//! Into the buckets that differ: their rows of both servers side by side, in the order of the hashes of their keys.
//!
//! The servers sort, by numbers, so memory here is bounded whatever is wrong. A row that differs has two hashes, and the
//! bucket of each differs too: one holds a hash that the other server lacks there.

use std::pin::Pin;

use futures_util::StreamExt as _;
use tokio_postgres::{Row, RowStream};

use super::repair::{DAMAGE, Damage};
use super::round::Readers;
use super::table::{Plan, Side};
use super::{DifferenceKind, LISTED, RowDifference, VerifyError, streamed};
use crate::postgres::Control;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) differences: u64,
    pub(super) listed: Vec<RowDifference>,
    /// All of them, as far as a repair takes them on.
    pub(super) damage: Damage,
}

/// Rows with one key hash.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    key: i64,
    /// Hash and shown key of each row, by hash.
    rows: Vec<(i64, Vec<Option<String>>)>,
}

/// Compares the rows of `buckets`, of the part `number` where each is compared on its own.
pub(super) async fn rows(
    plan: &Plan,
    readers: Readers<'_>,
    number: u32,
    buckets: &[i64],
) -> Result<Found, VerifyError> {
    plan.join(readers).await?;
    let mut from = Groups::open(readers.source, &plan.rows_sql(Side::Source, number, buckets)).await?;
    let mut to = Groups::open(readers.target, &plan.rows_sql(Side::Target, number, buckets)).await?;
    let mut found = Found::default();
    let keyed = !plan.key.is_empty();
    let (mut left, mut right) = (from.next().await?, to.next().await?);
    loop {
        let order = match (&left, &right) {
            (None, None) => break,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(left), Some(right)) => left.key.cmp(&right.key),
        };
        let here = if order.is_le() { std::mem::replace(&mut left, from.next().await?) } else { None };
        let there = if order.is_ge() { std::mem::replace(&mut right, to.next().await?) } else { None };
        found.compare(here, there, keyed);
    }
    drop((from, to));
    readers.leave().await?;
    Ok(found)
}

impl Found {
    /// Two groups of the same key hash; one may be missing.
    fn compare(&mut self, source: Option<Group>, target: Option<Group>, keyed: bool) {
        let hash = source.as_ref().or(target.as_ref()).map(|group| group.key);
        let before = self.differences;
        let mut missing = source.map(|group| group.rows).unwrap_or_default();
        let mut extra = target.map(|group| group.rows).unwrap_or_default();
        missing.retain(|(hash, _)| match extra.iter().position(|(other, _)| other == hash) {
            Some(same) => {
                extra.swap_remove(same);
                false
            }
            None => true,
        });
        let mut extra = extra.into_iter();
        for (_, key) in missing {
            let differs = keyed && extra.next().is_some();
            self.note(if differs { DifferenceKind::Differs } else { DifferenceKind::Missing }, key, keyed);
        }
        for (_, key) in extra {
            self.note(DifferenceKind::Extra, key, keyed);
        }
        if !keyed && self.differences > before && self.damage.hashes.len() < DAMAGE {
            self.damage.hashes.extend(hash);
        }
    }

    fn note(&mut self, kind: DifferenceKind, key: Vec<Option<String>>, keyed: bool) {
        self.differences += 1;
        if keyed && self.damage.keys.len() < DAMAGE {
            self.damage.keys.push(key.clone());
        }
        if self.listed.len() < LISTED {
            self.listed.push(RowDifference { kind, key });
        }
    }
}

/// Reads one server's rows group by group.
struct Groups {
    rows: Pin<Box<RowStream>>,
    next: Option<Row>,
}

impl Groups {
    async fn open(server: &Control, sql: &str) -> Result<Self, VerifyError> {
        let doing = "reading rows that differ";
        let none: [&str; 0] = [];
        let rows = server.query_raw(sql, none).await.map_err(VerifyError::query(doing))?;
        let mut rows = Box::pin(rows);
        let next = rows.next().await.map(streamed(doing)).transpose()?;
        Ok(Self { rows, next })
    }

    /// The rows of a table without a key that are many times the same are one group; only their number and the first
    /// few places are kept.
    async fn next(&mut self) -> Result<Option<Group>, VerifyError> {
        let Some(first) = self.next.take() else { return Ok(None) };
        let mut group = Group { key: first.get(0), rows: vec![(first.get(1), first.get(2))] };
        while let Some(row) = self.rows.next().await.map(streamed("reading rows that differ")).transpose()? {
            if row.get::<_, i64>(0) != group.key {
                self.next = Some(row);
                break;
            }
            let shown = if group.rows.len() < LISTED { row.get(2) } else { Vec::new() };
            group.rows.push((row.get(1), shown));
        }
        Ok(Some(group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(hashes: &[i64]) -> Option<Group> {
        let rows = hashes.iter().map(|&hash| (hash, vec![Some(format!("k{hash}"))])).collect();
        Some(Group { key: 1, rows })
    }

    fn kinds(source: Option<Group>, target: Option<Group>, keyed: bool) -> Vec<DifferenceKind> {
        let mut found = Found::default();
        found.compare(source, target, keyed);
        assert_eq!(found.differences, found.listed.len() as u64);
        found.listed.iter().map(|row| row.kind).collect()
    }

    #[test]
    fn a_key_on_both_sides_differs_and_duplicates_are_counted() {
        use DifferenceKind::{Differs, Extra, Missing};
        assert_eq!(kinds(group(&[1]), group(&[1]), true), []);
        assert_eq!(kinds(group(&[1]), group(&[2]), true), [Differs]);
        assert_eq!(kinds(group(&[1]), None, true), [Missing]);
        assert_eq!(kinds(None, group(&[1]), true), [Extra]);
        assert_eq!(kinds(group(&[5, 5]), group(&[5]), false), [Missing]);
        assert_eq!(kinds(group(&[5]), group(&[5, 5, 5]), false), [Extra, Extra]);
        assert_eq!(kinds(group(&[1, 2]), group(&[2, 2]), true), [Differs], "a key that is there twice");
    }
}
