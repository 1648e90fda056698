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
    /// By hash.
    rows: Vec<Same>,
}

/// Rows with one hash: more than one in tables without a key alone, and then perhaps very many.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Same {
    hash: i64,
    count: u64,
    /// The keys of the first of them.
    shown: Vec<Vec<Option<String>>>,
}

impl Same {
    /// Takes so many away, those first of which nothing is known.
    fn take(&mut self, count: u64) {
        self.count -= count;
        self.shown.truncate(usize::try_from(self.count).unwrap_or(usize::MAX));
    }
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
        for same in &mut missing {
            let Some(other) = extra.iter_mut().find(|other| other.hash == same.hash) else { continue };
            let both = same.count.min(other.count);
            same.take(both);
            other.take(both);
        }
        missing.retain(|same| same.count > 0);
        extra.retain(|same| same.count > 0);
        // A key is there once on each server, or something is very wrong.
        let mut changed = if keyed { extra.iter().map(|same| same.count).sum() } else { 0 };
        for Same { count, shown, .. } in missing {
            let differ = count.min(changed);
            changed -= differ;
            let (first, rest) = shown.split_at(shown.len().min(usize::try_from(differ).unwrap_or(usize::MAX)));
            self.note(DifferenceKind::Differs, differ, first, keyed);
            self.note(DifferenceKind::Missing, count - differ, rest, keyed);
            extra.iter_mut().fold(differ, |left, same| {
                let gone = left.min(same.count);
                same.take(gone);
                left - gone
            });
        }
        for Same { count, shown, .. } in extra {
            self.note(DifferenceKind::Extra, count, &shown, keyed);
        }
        if !keyed && self.differences > before && self.damage.hashes.len() < DAMAGE {
            self.damage.hashes.extend(hash);
        }
    }

    /// So many rows, of which the first ones' keys are known.
    fn note(&mut self, kind: DifferenceKind, count: u64, shown: &[Vec<Option<String>>], keyed: bool) {
        self.differences += count;
        if keyed {
            let room = DAMAGE - self.damage.keys.len().min(DAMAGE);
            self.damage.keys.extend(shown.iter().take(room).cloned());
        }
        let room = LISTED - self.listed.len().min(LISTED);
        self.listed.extend(shown.iter().take(room).map(|key| RowDifference { kind, key: key.clone() }));
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
        let same = |row: &Row| Same { hash: row.get(1), count: 1, shown: vec![row.get(2)] };
        let mut group = Group { key: first.get(0), rows: vec![same(&first)] };
        while let Some(row) = self.rows.next().await.map(streamed("reading rows that differ")).transpose()? {
            if row.get::<_, i64>(0) != group.key {
                self.next = Some(row);
                break;
            }
            match group.rows.last_mut() {
                Some(last) if last.hash == row.get::<_, i64>(1) => {
                    last.count += 1;
                    if last.shown.len() < LISTED {
                        last.shown.push(row.get(2));
                    }
                }
                _ => group.rows.push(same(&row)),
            }
        }
        Ok(Some(group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(hashes: &[i64]) -> Option<Group> {
        let mut rows: Vec<Same> = Vec::new();
        for &hash in hashes {
            let key = vec![Some(format!("k{hash}"))];
            match rows.iter_mut().find(|same| same.hash == hash) {
                Some(same) => {
                    same.count += 1;
                    same.shown.push(key);
                }
                None => rows.push(Same { hash, count: 1, shown: vec![key] }),
            }
        }
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
