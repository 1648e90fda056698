//! Large tables in ranges of their key. What was compared stays compared: an interrupted run goes on behind it.
//!
//! Ranges of blocks can only be compared as a whole, under one pair of snapshots: a row has another place on each server,
//! and after each update. A range of the key has the same rows on both servers at every moment at which the two show the
//! same transactions. So each range is a comparison of its own and on record as soon as it is done; the next one may be
//! read under snapshots that were taken later, and none has to live for as long as a large table takes.
//!
//! ```text
//! S1  (… , 40]  equal, recorded      S1  (40, 80]  equal, recorded      the process is killed
//!     the application changes rows 17 and 95: the stream brings both
//! S2  (80, 120] compared             S2  (120, …)  compared             1 to 80 is not read again
//! ```
//!
//! Only by a primary key, which has no NULL, and only by columns that every server sorts alike: never by a collation. And
//! only where rows lie in the order of their key, so that no page is read for many ranges; a sample of pages tells.
//! Every other table is read by blocks, and from its beginning after an interruption.
//!
//! Bounds are keys of rows: they are kept beside the results of the run, and never shown, logged or told.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::expression::Column;
use super::{LISTED, RowDifference, VerifyError};
use crate::ident::{QualifiedName, quote_ident, quote_literal};
use crate::postgres::Control;

/// Smaller tables are read by blocks.
const LEAST: u32 = 4;

/// Pages that are looked at for each range.
const SAMPLED: u64 = 30;

/// At least, and at most, for a table.
const SAMPLE: (u64, u64) = (300, 20_000);

/// Ranges that a page may have rows of, on the average.
const SPREAD: f64 = 3.0;

/// Types that sort alike on every server and in every version, NaN and infinities included.
const SORTED: [&str; 11] =
    ["int2", "int4", "int8", "oid", "numeric", "date", "time", "timestamp", "timestamptz", "uuid", "bytea"];

/// How far the comparison of a large table has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// What the bounds belong to: key, columns and table as both servers have them. Where these are others, all of it is void.
    pub layout: String,
    /// The last key of each range as text; the last range has none.
    pub bounds: Vec<Vec<String>>,
    /// Those that were compared, by number.
    #[serde(skip)]
    pub done: BTreeMap<u32, ChunkResult>,
}

/// What the comparison of one range came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkResult {
    /// Its rows on the source.
    pub rows: u64,
    /// Rows that differ, are missing on the target or stand there alone.
    pub differences: u64,
    /// The first of them.
    pub listed: Vec<RowDifference>,
}

impl Begun {
    /// How many ranges there are.
    pub(super) fn chunks(&self) -> u32 {
        u32::try_from(self.bounds.len() + 1).unwrap_or(u32::MAX)
    }

    /// Those that are to be compared yet.
    pub(super) fn left(&self) -> Vec<u32> {
        (0..self.chunks()).filter(|number| !self.done.contains_key(number)).collect()
    }

    /// All of them together.
    pub(in crate::migration) fn sum(&self) -> ChunkResult {
        self.done.values().fold(ChunkResult::default(), |mut sum, chunk| {
            sum.rows += chunk.rows;
            sum.differences += chunk.differences;
            sum.listed.extend(chunk.listed.iter().take(LISTED - sum.listed.len()).cloned());
            sum
        })
    }

    /// The condition under which a row belongs to a range.
    pub(super) fn range(&self, key: &[Column], number: u32) -> String {
        let names: Vec<String> = key.iter().map(|column| quote_ident(&column.name)).collect();
        let at = |bound: &Vec<String>, operator: &str| {
            let literal =
                |(column, part): (&Column, &String)| format!("{}::pg_catalog.{}", quote_literal(part), column.base);
            let values: Vec<String> = key.iter().zip(bound).map(literal).collect();
            match (names.as_slice(), values.as_slice()) {
                ([name], [value]) => format!("{name} {operator} {value}"),
                _ => format!("ROW({}) {operator} ROW({})", names.join(", "), values.join(", ")),
            }
        };
        let number = number as usize;
        let from = number.checked_sub(1).and_then(|before| self.bounds.get(before)).map(|bound| at(bound, ">"));
        let to = self.bounds.get(number).map(|bound| at(bound, "<="));
        from.into_iter().chain(to).collect::<Vec<_>>().join(" AND ")
    }
}

/// The first columns of a key that every server sorts alike.
pub(super) fn sorted(key: &[String], source: &[Column], target: &[Column]) -> Vec<Column> {
    let column = |columns: &[Column], name: &String| columns.iter().find(|column| column.name == *name).cloned();
    let alike = |name: &String| {
        let (from, to) = (column(source, name)?, column(target, name)?);
        (from.base == to.base && SORTED.contains(&from.base.as_str())).then_some(from)
    };
    key.iter().map_while(alike).collect()
}

/// A table as one server has it.
#[derive(Clone, Copy)]
pub(super) struct Pages<'a> {
    pub(super) server: &'a Control,
    pub(super) blocks: u64,
}

/// Divides a table into about `parts` ranges of `key`; none where that would not do.
pub(super) async fn divide(
    source: Pages<'_>,
    target: Pages<'_>,
    table: &QualifiedName,
    key: &[Column],
    parts: u32,
) -> Result<Option<Vec<Vec<String>>>, VerifyError> {
    if parts < LEAST || key.is_empty() {
        return Ok(None);
    }
    let (bounds, there) = tokio::try_join!(sample(source, table, key, parts), sample(target, table, key, parts))?;
    let enough = |bounds: &[Vec<String>]| 2 * (bounds.len() + 1) >= parts as usize;
    Ok((bounds.spread <= SPREAD && there.spread <= SPREAD && enough(&bounds.bounds)).then_some(bounds.bounds))
}

struct Sample {
    bounds: Vec<Vec<String>>,
    /// Ranges that a page has rows of, on the average.
    spread: f64,
}

/// Looks at some pages, outside of any snapshot: whatever the bounds are, every row is in one range.
async fn sample(pages: Pages<'_>, table: &QualifiedName, key: &[Column], parts: u32) -> Result<Sample, VerifyError> {
    let wanted = (u64::from(parts) * SAMPLED).clamp(SAMPLE.0, SAMPLE.1);
    #[expect(clippy::cast_precision_loss, reason = "a share of pages")]
    let percent = (100.0 * wanted as f64 / pages.blocks.max(1) as f64).min(100.0);
    let names: Vec<String> = key.iter().map(|column| quote_ident(&column.name)).collect();
    let texts: Vec<String> = names.iter().map(|name| format!("{name}::text")).collect();
    let sql = format!(
        "WITH s AS (SELECT ARRAY[{}] AS key, row_number() OVER (ORDER BY {}) - 1 AS n, (ctid::text::point)[0] AS block
                      FROM ONLY {table} TABLESAMPLE SYSTEM ({percent})),
              c AS (SELECT count(*) AS total FROM s),
              p AS (SELECT avg(chunks)::float8 AS spread
                      FROM (SELECT count(DISTINCT s.n * {parts} / c.total) AS chunks FROM s, c GROUP BY s.block) AS page)
         SELECT s.key, p.spread FROM s, c, p
          WHERE s.n > 0 AND s.n * {parts} / c.total <> (s.n - 1) * {parts} / c.total ORDER BY s.n",
        texts.join(", "),
        names.join(", "),
    );
    let rows = pages.server.query(&sql, &[]).await.map_err(VerifyError::query("looking at some pages of a table"))?;
    let mut bounds: Vec<Vec<String>> = rows.iter().map(|row| row.get(0)).collect();
    bounds.dedup();
    Ok(Sample { bounds, spread: rows.first().map_or(0.0, |row| row.get(1)) })
}

#[cfg(test)]
mod tests {
    use super::super::DifferenceKind;
    use super::*;

    fn column(name: &str, base: &str) -> Column {
        Column {
            name: name.to_owned(),
            type_name: base.to_owned(),
            base: base.to_owned(),
            output: String::new(),
            shape: None,
            domain_over: None,
        }
    }

    fn begun(bounds: &[&[&str]]) -> Begun {
        let bounds = bounds.iter().map(|bound| bound.iter().map(|part| (*part).to_owned()).collect()).collect();
        Begun { bounds, ..Begun::default() }
    }

    #[test]
    fn ranges_meet_and_the_outer_ones_are_open() {
        let one = begun(&[&["40"], &["80"]]);
        let key = [column("The Key", "int4")];
        assert_eq!(one.chunks(), 3);
        assert_eq!(one.range(&key, 0), "\"The Key\" <= '40'::pg_catalog.int4");
        assert_eq!(one.range(&key, 1), "\"The Key\" > '40'::pg_catalog.int4 AND \"The Key\" <= '80'::pg_catalog.int4");
        assert_eq!(one.range(&key, 2), "\"The Key\" > '80'::pg_catalog.int4");
        let two = begun(&[&["1", "2020-01-01"]]);
        let key = [column("a", "int8"), column("b", "date")];
        assert_eq!(two.range(&key, 1), "ROW(\"a\", \"b\") > ROW('1'::pg_catalog.int8, '2020-01-01'::pg_catalog.date)");
    }

    #[test]
    fn a_key_counts_up_to_the_first_column_that_servers_may_sort_differently() {
        let key = ["a", "b", "c"].map(str::to_owned);
        let here = [column("c", "int4"), column("b", "text"), column("a", "int4")];
        let names = |columns: Vec<Column>| columns.into_iter().map(|column| column.name).collect::<Vec<_>>();
        assert_eq!(names(sorted(&key, &here, &here)), ["a"]);
        let there = [column("a", "int8"), column("b", "text"), column("c", "int4")];
        assert_eq!(names(sorted(&key, &here, &there)), [""; 0], "another type there");
    }

    #[test]
    fn what_is_left_and_what_all_came_to() {
        let mut begun = begun(&[&["1"], &["2"]]);
        let row = |key: &str| RowDifference { kind: DifferenceKind::Missing, key: vec![Some(key.to_owned())] };
        let chunk = |rows, listed: &[&str]| ChunkResult {
            rows,
            differences: 60 * listed.len() as u64,
            listed: listed.iter().flat_map(|key| std::iter::repeat_n(row(key), 60)).collect(),
        };
        begun.done.insert(2, chunk(5, &["z"]));
        begun.done.insert(0, chunk(7, &["a"]));
        assert_eq!(begun.left(), [1]);
        let sum = begun.sum();
        assert_eq!((sum.rows, sum.differences, sum.listed.len()), (12, 120, LISTED));
        assert_eq!(sum.listed.first(), Some(&row("a")), "in the order of the key");
    }
}
