//! Writes the source's rows over those of the target that differ, while both are live.
//!
//! ```text
//! hold        the apply stands where a snapshot of the source looks (gate): nothing of what comes later is there yet
//! lock        the table on the target, against every other writer
//! look        is it still held? Then the target's table is the snapshot's, but for the damage
//! write       the rows of these keys are removed and those of the snapshot written, in one transaction
//! let go      what is streamed next finds the rows that it expects
//! ```
//!
//! A stream that broke and began again meanwhile lets the hold end, and is found at *look*; one that breaks behind it
//! waits for the lock. Tables with a key are mended by their keys, a batch for each hold. In tables without one, equal
//! rows are counted by their hash, and as many are removed or added as there are too many or too few; the apply is held
//! while the table is read.
//!
//! What is about to be written is journalled first: keys and counts, never values.

use std::pin::Pin;

use futures_util::StreamExt as _;
use serde_json::json;
use tokio_postgres::Row;

use super::align::{Still, still};
use super::expression::Column;
use super::table::{Plan, Side};
use super::{VerifyContext, VerifyError, streamed};
use crate::ident::{quote_ident, quote_literal};
use crate::migration::late;
use crate::postgres::Control;

/// Rows of a table that one round of repairs takes on.
pub(super) const DAMAGE: usize = 100_000;

/// Keys that are mended while the apply is held once.
const BATCH: usize = 1000;

/// Bytes of rows that are written at a time.
const CHUNK: usize = 4 << 20;

/// Wait for the lock on the target's table.
const LOCK_TIMEOUT_MS: u32 = 2000;

/// What is wrong in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Keys of rows that differ, are missing or are too many.
    pub(super) keys: Vec<Vec<Option<String>>>,
    /// Of a table without a key: hashes of rows that are there in other numbers.
    pub(super) hashes: Vec<i64>,
}

impl Damage {
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.hashes.is_empty()
    }

    /// As much more as one round of repairs takes on.
    pub(super) fn add(&mut self, more: Self) {
        self.keys.extend(more.keys.into_iter().take(DAMAGE.saturating_sub(self.keys.len())));
        self.hashes.extend(more.hashes.into_iter().take(DAMAGE.saturating_sub(self.hashes.len())));
    }
}

/// Mends one table, and returns how many rows were removed or written to do so.
pub(super) async fn table(context: &VerifyContext, plan: &Plan, damage: &Damage) -> Result<u64, VerifyError> {
    let mut repaired = 0;
    if plan.key.is_empty() {
        let still = still(&context.sides).await?;
        return by_count(context, plan, &damage.hashes, &still).await;
    }
    for keys in damage.keys.chunks(BATCH) {
        let still = still(&context.sides).await?;
        by_key(context, plan, keys, &still).await?;
        repaired += keys.len() as u64;
    }
    Ok(repaired)
}

async fn by_key(
    context: &VerifyContext,
    plan: &Plan,
    keys: &[Vec<Option<String>>],
    still: &Still,
) -> Result<(), VerifyError> {
    context.observer.repairing(&plan.table, &json!({ "keys": keys })).await?;
    begin(plan, still).await?;
    let wanted = |side| chosen(plan, side, keys);
    execute(&still.target, &format!("DELETE FROM ONLY {} AS t USING {}", plan.table, wanted(Side::Target))).await?;
    let sql = format!("SELECT {} FROM ONLY {} AS t, {}", shown(plan), plan.table, wanted(Side::Source));
    let mut writer = Writer::new(plan, &still.target).await?;
    let mut rows = stream(&still.source, &sql).await?;
    while let Some(row) = next(&mut rows).await? {
        writer.add(row.get(0), 1).await?;
    }
    writer.flush().await?;
    execute(&still.target, "COMMIT").await
}

async fn by_count(context: &VerifyContext, plan: &Plan, hashes: &[i64], still: &Still) -> Result<u64, VerifyError> {
    begin(plan, still).await?;
    let (here, there) = (
        count(plan, Side::Source, hashes, &still.source).await?,
        count(plan, Side::Target, hashes, &still.target).await?,
    );
    let of = |list: &[(i64, i64)], hash| list.iter().find(|(other, _)| *other == hash).map_or(0, |(_, rows)| *rows);
    let (mut surplus, mut lacking) = (Vec::new(), Vec::new());
    for hash in hashes {
        match of(&there, *hash) - of(&here, *hash) {
            0 => {}
            more @ 1.. => surplus.push((*hash, more)),
            less => lacking.push((*hash, -less)),
        }
    }
    let rows = |list: &[(i64, i64)]| list.iter().map(|(_, rows)| rows.unsigned_abs()).sum::<u64>();
    let (too_many, too_few) = (rows(&surplus), rows(&lacking));
    context.observer.repairing(&plan.table, &json!({ "removed": too_many, "written": too_few })).await?;
    if !surplus.is_empty() {
        let list: Vec<String> =
            surplus.iter().map(|(hash, rows)| format!("({hash}::bigint, {rows}::bigint)")).collect();
        let sql = format!(
            "WITH surplus (h, n) AS (VALUES {}), numbered AS (
                SELECT r.place, r.h, row_number() OVER (PARTITION BY r.h) AS number
                  FROM (SELECT ctid AS place, {} AS h FROM ONLY {} {} OFFSET 0) AS r WHERE r.h IN (SELECT h FROM surplus))
             DELETE FROM ONLY {} WHERE ctid = ANY (ARRAY(
                SELECT numbered.place FROM numbered JOIN surplus USING (h) WHERE numbered.number <= surplus.n))",
            list.join(", "),
            plan.hasher.hash(plan.columns(Side::Target)),
            plan.table,
            plan.filter,
            plan.table
        );
        execute(&still.target, &sql).await?;
    }
    if !lacking.is_empty() {
        let wanted: Vec<i64> = lacking.iter().map(|(hash, _)| *hash).collect();
        let sql = format!(
            "SELECT DISTINCT ON (r.h) r.shown, r.h FROM (SELECT {} AS h, {} AS shown FROM ONLY {} AS t {} OFFSET 0) AS r
              WHERE r.h IN ({})",
            plan.hasher.hash(plan.columns(Side::Source)),
            shown(plan),
            plan.table,
            plan.filter,
            list(&wanted)
        );
        let mut writer = Writer::new(plan, &still.target).await?;
        let mut found = stream(&still.source, &sql).await?;
        while let Some(row) = next(&mut found).await? {
            writer.add(row.get(0), of(&lacking, row.get(1))).await?;
        }
        writer.flush().await?;
    }
    execute(&still.target, "COMMIT").await?;
    Ok(too_many + too_few)
}

/// Writes nothing that stays, but the transaction has touched the progress: so the watch over a fenced server knows it for
/// ours ([`crate::migration::fenced_writes`]). A row of its own, so that it waits for nobody.
const SIGNATURE: &str = "\
    INSERT INTO pgcutover.progress (migration, lane, generation, commit_lsn, end_lsn) \
    VALUES ('/repair', pg_catalog.pg_backend_pid(), 0, '0/0', '0/0'); \
    DELETE FROM pgcutover.progress WHERE migration = '/repair' AND lane = pg_catalog.pg_backend_pid()";

/// Nobody else writes to the table from here on, and nobody has since the snapshot.
async fn begin(plan: &Plan, still: &Still) -> Result<(), VerifyError> {
    let failed = VerifyError::query("looking what a repair would fire");
    let silently = if late::may_replicate_silently(&still.target).await.map_err(&failed)? {
        "SET LOCAL session_replication_role = replica;"
    } else {
        let firing = late::firing(&still.target).await.map_err(failed)?;
        if !firing.is_empty() {
            return Err(VerifyError::WouldFire(firing));
        }
        ""
    };
    let sql = format!(
        "BEGIN; {silently} SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; \
         LOCK TABLE ONLY {} IN SHARE ROW EXCLUSIVE MODE; {SIGNATURE}",
        plan.table
    );
    execute(&still.target, &sql).await?;
    if still.stands() { Ok(()) } else { Err(VerifyError::Moved) }
}

async fn execute(server: &Control, sql: &str) -> Result<(), VerifyError> {
    server.batch_execute(sql).await.map_err(VerifyError::query("repairing a table"))
}

async fn stream(server: &Control, sql: &str) -> Result<Pin<Box<tokio_postgres::RowStream>>, VerifyError> {
    let none: [&str; 0] = [];
    Ok(Box::pin(server.query_raw(sql, none).await.map_err(VerifyError::query("reading rows to repair"))?))
}

async fn next(rows: &mut Pin<Box<tokio_postgres::RowStream>>) -> Result<Option<Row>, VerifyError> {
    rows.next().await.map(streamed("reading rows to repair")).transpose()
}

async fn count(plan: &Plan, side: Side, hashes: &[i64], server: &Control) -> Result<Vec<(i64, i64)>, VerifyError> {
    let sql = format!(
        "SELECT h, count(*) FROM (SELECT {} AS h FROM ONLY {} {} OFFSET 0) AS r WHERE h IN ({}) GROUP BY 1",
        plan.hasher.hash(plan.columns(side)),
        plan.table,
        plan.filter,
        list(hashes)
    );
    let rows = server.query(&sql, &[]).await.map_err(VerifyError::query("counting rows to repair"))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn list(hashes: &[i64]) -> String {
    let texts: Vec<String> = hashes.iter().map(i64::to_string).collect();
    texts.join(", ")
}

/// The row as texts, one for each column.
fn shown(plan: &Plan) -> String {
    let exact = |column| plan.hasher.exact(column, Some("t"));
    let columns: Vec<String> = plan.columns(Side::Source).iter().map(exact).collect();
    format!("ARRAY[{}]::text[]", columns.join(", "))
}

/// The keys as a list named `k`, and the condition under which a row of `t` has one of them. Types that are built in are
/// looked up by their index.
fn chosen(plan: &Plan, side: Side, keys: &[Vec<Option<String>>]) -> String {
    let columns: Vec<&Column> =
        plan.key.iter().filter_map(|name| plan.columns(side).iter().find(|column| column.name == *name)).collect();
    let literal = |(column, part): (&&Column, &Option<String>)| {
        let part = part.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal);
        let shown_as = if column.is_built_in() { column.type_name.as_str() } else { "text" };
        format!("CAST({part} AS {shown_as})")
    };
    let rows: Vec<String> = keys
        .iter()
        .map(|key| format!("({})", columns.iter().zip(key).map(literal).collect::<Vec<_>>().join(", ")))
        .collect();
    let names: Vec<String> = (0..columns.len()).map(|number| format!("k{number}")).collect();
    let equal = |(number, column): (usize, &&Column)| {
        if column.is_built_in() {
            format!("t.{} = k.k{number}", quote_ident(&column.name))
        } else {
            format!("{} = k.k{number} COLLATE \"C\"", column.shown(Some("t")))
        }
    };
    let equal: Vec<String> = columns.iter().enumerate().map(equal).collect();
    format!("(VALUES {}) AS k ({}) WHERE {}", rows.join(", "), names.join(", "), equal.join(" AND "))
}

/// Collects rows and writes them in chunks.
struct Writer<'a> {
    server: &'a Control,
    head: String,
    /// Which of the columns may be written: a generated one is computed.
    ordinary: Vec<bool>,
    chunk: String,
}

impl<'a> Writer<'a> {
    async fn new(plan: &Plan, server: &'a Control) -> Result<Self, VerifyError> {
        let rows = server
            .query(
                "SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0
                    AND coalesce(to_jsonb(a) ->> 'attgenerated', '') <> ''",
                &[&plan.target_oid()],
            )
            .await
            .map_err(VerifyError::query("reading columns"))?;
        let generated: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let columns = plan.columns(Side::Target);
        let ordinary: Vec<bool> = columns.iter().map(|column| !generated.contains(&column.name)).collect();
        let names = columns.iter().zip(&ordinary).filter(|(_, ordinary)| **ordinary);
        let names: Vec<String> = names.map(|(column, _)| quote_ident(&column.name)).collect();
        let head = if names.is_empty() {
            format!("INSERT INTO {} DEFAULT VALUES", plan.table)
        } else {
            format!("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ", plan.table, names.join(", "))
        };
        Ok(Self { server, head, ordinary, chunk: String::new() })
    }

    async fn add(&mut self, row: Vec<Option<String>>, times: i64) -> Result<(), VerifyError> {
        let parts = row.iter().zip(&self.ordinary).filter(|(_, ordinary)| **ordinary);
        let parts: Vec<String> =
            parts.map(|(part, _)| part.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal)).collect();
        for _ in 0..times {
            if parts.is_empty() {
                execute(self.server, &self.head).await?;
                continue;
            }
            let separator = if self.chunk.is_empty() { self.head.as_str() } else { ", " };
            self.chunk.push_str(&format!("{separator}({})", parts.join(", ")));
            if self.chunk.len() >= CHUNK {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), VerifyError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        execute(self.server, &std::mem::take(&mut self.chunk)).await
    }
}
