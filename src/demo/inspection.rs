//! What both servers hold at the end: the proof, or the list of what is wrong.
//!
//! The application went on writing on the target, and the stream back has carried a part of that to the source, in the
//! target's order of commits. The last write of each client there is the *boundary*. Every row whose last writer is at or
//! before the boundary must be the same on both sides; rows that were written or deleted on the target after it are left
//! out on both.

use std::collections::HashMap;
use std::fmt::Write as _;

use tokio_postgres::{Client, Error};

use crate::demo::compare::{self, Digest};
use crate::demo::ledger::{self, CLIENT_SPAN};
use crate::ident::QualifiedName;

/// What [`inspect`] found.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// Write numbers on the source, with the number of rows.
    pub source_writes: HashMap<i64, i64>,
    /// Write numbers on the target, with the number of rows.
    pub target_writes: HashMap<i64, i64>,
    /// Tables and materialised views compared.
    pub tables_compared: u64,
    /// Rows compared in them.
    pub rows_compared: u64,
    /// Each difference, one line.
    pub differences: Vec<String>,
}

/// Compares the shop on both servers. `clients` is how many the application had.
pub async fn inspect(source: &Client, target: &Client, clients: usize) -> Result<Inspection, Error> {
    compare::pin_text(source).await?;
    compare::pin_text(target).await?;
    let mut found = Inspection {
        source_writes: ledger::recorded(source).await?,
        target_writes: ledger::recorded(target).await?,
        ..Inspection::default()
    };
    let boundary = Boundary::new(&ledger::boundary(&found.source_writes, clients));
    let tables = compare::tables(source).await?;
    for table in &tables {
        let (here, there) = digests(source, target, table, &boundary).await?;
        found.tables_compared += 1;
        found.rows_compared += u64::try_from(here.rows).unwrap_or(0);
        if here.rows != there.rows {
            found.differences.push(format!("{table}: {} rows on the source, {} on the target", here.rows, there.rows));
        } else if here != there {
            found.differences.push(format!("{table}: the same number of rows, with different content"));
        }
    }
    found
        .differences
        .extend(compare::different_lines(&compare::objects(source).await?, &compare::objects(target).await?));
    found.differences.extend(sequences_behind(source, target).await?);
    Ok(found)
}

/// Conditions on `write_no`.
struct Boundary {
    /// True for rows whose last writer is at or before the boundary.
    before: String,
}

impl Boundary {
    fn new(last: &[i64]) -> Self {
        let array = compare::bigint_array(last);
        let before = format!("(t.write_no = 0 OR t.write_no <= ({array})[(t.write_no / {CLIENT_SPAN})::integer])");
        Self { before }
    }
}

async fn digests(
    source: &Client,
    target: &Client,
    table: &QualifiedName,
    boundary: &Boundary,
) -> Result<(Digest, Digest), Error> {
    if !has_write_number(source, table).await? {
        let here = compare::digest(source, table, "true", &[]).await?;
        return Ok((here, compare::digest(target, table, "true", &[]).await?));
    }
    let later = touched_later(target, table, boundary).await?;
    let not_later = format!("t.id NOT IN (SELECT unnest({}))", compare::bigint_array(&later));
    let here = compare::digest(source, table, &not_later, &[]).await?;
    let there = compare::digest(target, table, &boundary.before, &[]).await?;
    Ok((here, there))
}

async fn has_write_number(client: &Client, table: &QualifiedName) -> Result<bool, Error> {
    let sql = "SELECT count(*) FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
               WHERE a.attname = 'write_no' AND n.nspname = $1::text AND c.relname = $2::text";
    Ok(client.query_one(sql, &[&table.schema, &table.name]).await?.get::<_, i64>(0) > 0)
}

/// Rows that were written, or deleted, on the target after the boundary.
async fn touched_later(target: &Client, table: &QualifiedName, boundary: &Boundary) -> Result<Vec<i64>, Error> {
    let before = &boundary.before;
    let mut sql = format!("SELECT t.id::bigint FROM {table} t WHERE NOT {before}");
    if table.name == "reservation" {
        let _ = write!(
            sql,
            " UNION SELECT t.ref FROM {}.write_log t WHERE t.kind = 'unreserve' AND t.ref IS NOT NULL AND NOT {before}",
            crate::ident::quote_ident(&table.schema)
        );
    }
    Ok(target.query(sql.as_str(), &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// A sequence behind its old place would hand out numbers that are taken.
async fn sequences_behind(source: &Client, target: &Client) -> Result<Vec<String>, Error> {
    let on_target = compare::sequences(target).await?;
    let mut behind = Vec::new();
    for (name, value, called) in compare::sequences(source).await? {
        match on_target.iter().find(|(other, ..)| *other == name) {
            None => behind.push(format!("sequence {name} is not on the target")),
            Some((_, there, there_called)) if (*there, *there_called) < (value, called) => {
                behind.push(format!("sequence {name}: {value} on the source, {there} on the target"));
            }
            Some(_) => {}
        }
    }
    Ok(behind)
}
