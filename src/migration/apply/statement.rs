//! The SQL of a change, by its shape. Pure.
//!
//! Every statement must hit exactly one row, except TRUNCATE. Names are always quoted and qualified: `search_path` is
//! `pg_catalog` while we apply.

use super::shape::TargetColumn;
use crate::ident::{QualifiedName, quote_ident, quote_literal};

/// A column and its type on the target, in the order of the parameters.
pub(super) type Parameter<'a> = (&'a str, &'a TargetColumn);

/// How a row is found.
pub(super) enum Match<'a> {
    /// By its key; the index finds it.
    Key(Vec<Parameter<'a>>),
    /// By all its values. There may be several alike: any one of them is as good, but only one.
    Whole(Vec<Parameter<'a>>),
}

/// `OVERRIDING SYSTEM VALUE`, because a GENERATED ALWAYS identity has had its value given on the source.
pub(super) fn insert(table: &QualifiedName, columns: &[Parameter<'_>]) -> String {
    if columns.is_empty() {
        return format!("INSERT INTO {table} DEFAULT VALUES");
    }
    let names = columns.iter().map(|(name, _)| quote_ident(name)).collect::<Vec<_>>().join(", ");
    let values = (1..=columns.len()).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ");
    format!("INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE VALUES ({values})")
}

/// The parameters of `set` come first.
pub(super) fn update(table: &QualifiedName, set: &[Parameter<'_>], matched: &Match<'_>) -> String {
    let assignments = set
        .iter()
        .enumerate()
        .map(|(index, (name, _))| format!("{} = ${}", quote_ident(name), index + 1))
        .collect::<Vec<_>>()
        .join(", ");
    format!("UPDATE ONLY {table} SET {assignments} WHERE {}", condition(table, matched, set.len() + 1))
}

/// Puts a new row in the place of the old one, for a `GENERATED ALWAYS` identity that may have changed: no UPDATE can set
/// it. `kept` are the columns that were not sent.
pub(super) fn replace(table: &QualifiedName, set: &[Parameter<'_>], kept: &[&str], matched: &Match<'_>) -> String {
    let names = set.iter().map(|(name, _)| *name).chain(kept.iter().copied()).map(quote_ident);
    let names = names.collect::<Vec<_>>().join(", ");
    let sent = set.iter().enumerate().map(|(index, (_, column))| format!("${}::{}", index + 1, column.type_sql));
    let kept = kept.iter().map(|name| format!("old.{}", quote_ident(name)));
    let values = sent.chain(kept).collect::<Vec<_>>().join(", ");
    format!(
        "WITH old AS (DELETE FROM ONLY {table} WHERE {} RETURNING *) \
         INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM old",
        condition(table, matched, set.len() + 1)
    )
}

/// Removes the one row.
pub(super) fn delete(table: &QualifiedName, matched: &Match<'_>) -> String {
    format!("DELETE FROM ONLY {table} WHERE {}", condition(table, matched, 1))
}

/// Changes nothing and finds the row: for an update whose every column is unchanged.
pub(super) fn touch(table: &QualifiedName, matched: &Match<'_>) -> String {
    format!("SELECT FROM ONLY {table} WHERE {}", condition(table, matched, 1))
}

/// Sets of rows by their keys: parameters are arrays, keys first, then the columns to `set`, all of one length. A text
/// becomes a value by the type's own input function.
pub(super) fn update_set(table: &QualifiedName, keys: &[Parameter<'_>], set: &[Parameter<'_>]) -> String {
    let assignments = set
        .iter()
        .enumerate()
        .map(|(index, (name, column))| format!("{} = u.v{index}::{}", quote_ident(name), column.type_sql));
    let assignments = assignments.collect::<Vec<_>>().join(", ");
    format!("UPDATE ONLY {table} AS t SET {assignments} FROM {} WHERE {}", unnest(keys, set), found(keys))
}

/// See [`update_set`].
pub(super) fn delete_set(table: &QualifiedName, keys: &[Parameter<'_>]) -> String {
    format!("DELETE FROM ONLY {table} AS t USING {} WHERE {}", unnest(keys, &[]), found(keys))
}

/// Changes nothing and counts the rows: for updates that leave every value as it was.
pub(super) fn touch_set(table: &QualifiedName, keys: &[Parameter<'_>]) -> String {
    format!("SELECT FROM ONLY {table} AS t, {} WHERE {}", unnest(keys, &[]), found(keys))
}

/// Functions in a select list give their rows one by one; in FROM the server would store them all first.
fn unnest(keys: &[Parameter<'_>], set: &[Parameter<'_>]) -> String {
    let names = (0..keys.len()).map(|index| format!("k{index}")).chain((0..set.len()).map(|index| format!("v{index}")));
    let columns = (1..).zip(keys.iter().chain(set)).zip(names).map(|((number, (_, column)), name)| {
        format!("pg_catalog.unnest(${number}::{}) AS {name}", column.element().array_sql())
    });
    format!("(SELECT {}) AS u", columns.collect::<Vec<_>>().join(", "))
}

fn found(keys: &[Parameter<'_>]) -> String {
    let terms = keys.iter().enumerate().map(|(index, (name, column))| {
        let operator = column.equality.as_deref().unwrap_or("pg_catalog.=");
        format!("t.{} OPERATOR({operator}) u.k{index}::{}", quote_ident(name), column.type_sql)
    });
    terms.collect::<Vec<_>>().join(" AND ")
}

/// COPY in text form; a generated identity takes what it is given.
pub(super) fn copy_in(table: &QualifiedName, columns: &[Parameter<'_>]) -> String {
    let names = columns.iter().map(|(name, _)| quote_ident(name)).collect::<Vec<_>>().join(", ");
    format!("COPY {table} ({names}) FROM STDIN")
}

/// One statement for all tables, so that foreign keys among them do not hinder. Never CASCADE: what the source's
/// cascade reached is in the list already. Sequences are left alone, whatever the source's did: rows come with their values,
/// and a cutover brings sequences over, which a TRUNCATE that is applied behind that must not undo. Rows are deleted one by
/// one where a foreign key comes from a table that no stream names (the root of a partitioned one, or an unlogged one), and
/// where checks of rows that were applied before are still to be made.
pub(super) fn truncate(tables: &[&QualifiedName]) -> String {
    let list = tables.iter().map(|table| format!("ONLY {table}")).collect::<Vec<_>>().join(", ");
    let deletes: String = tables.iter().map(|table| format!("DELETE FROM ONLY {table}; ")).collect();
    let refused = "feature_not_supported OR object_in_use";
    let body = format!("BEGIN TRUNCATE {list} CONTINUE IDENTITY; EXCEPTION WHEN {refused} THEN {deletes}END");
    format!("DO {}", quote_literal(&body))
}

fn condition(table: &QualifiedName, matched: &Match<'_>, first: usize) -> String {
    let all = |columns: &[Parameter<'_>], compare: fn(&TargetColumn, &str, usize) -> String| {
        if columns.is_empty() {
            return "true".to_owned();
        }
        let terms = columns.iter().enumerate().map(|(index, (name, column))| compare(column, name, first + index));
        terms.collect::<Vec<_>>().join(" AND ")
    };
    match matched {
        Match::Key(columns) => all(columns, TargetColumn::equals),
        Match::Whole(columns) => {
            format!("ctid = (SELECT ctid FROM ONLY {table} WHERE {} LIMIT 1)", all(columns, TargetColumn::same_text))
        }
    }
}
