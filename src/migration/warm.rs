//! Warms a server before a cutover leads to it, so that the first minute after the switch is not the slow one: what the
//! other server reads most is read here beforehand, and tables that the planner knows nothing of are analysed.
//!
//! What is read most is asked of the cumulative statistics: blocks touched for each page that a table or an index has.
//! The most touched comes first, until the shared buffers would be full or the time is over. `pg_prewarm` does the
//! reading: where it is not installed, in a transaction that is rolled back, so that nothing of it stays. Where it cannot
//! be had, tables are read through, which fills the operating system's memory at least.
//!
//! Nothing here is a reason against a cutover: what could not be warmed stays cold.

use std::time::{Duration, Instant};

use crate::ident::{QualifiedName, quote_ident};
use crate::postgres::Control;

/// Blocks that are read by one statement: one that is cut off in the middle is not missed for long.
const CHUNK_BLOCKS: i64 = 8192;

/// How the target was warmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// By `pg_prewarm`, into the shared buffers.
    Prewarm,
    /// By reading tables through; indexes stay cold.
    Reading,
}

/// What was warmed in one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warmed {
    /// Tables and indexes.
    pub relations: u64,
    /// Their size, in bytes.
    pub bytes: u64,
    /// How.
    pub by: Means,
    /// Tables that had no statistics and have them now.
    pub analysed: u64,
    /// The time was over before everything was read that there is room for.
    pub cut_short: bool,
}

/// A table or an index, or what a table keeps out of line, whose own name is another on every server.
struct Hot {
    name: QualifiedName,
    part: Part,
    is_index: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Itself,
    Toast,
    ToastIndex,
}

/// Warms one database on `to` with what is hot on `from`: at most `budget_bytes`, and not beyond `deadline`.
pub async fn warm(
    from: &Control,
    to: &Control,
    budget_bytes: u64,
    deadline: Instant,
) -> Result<Warmed, tokio_postgres::Error> {
    let analysed = analyse_unknown(to, deadline).await?;
    let hot = hot(from).await?;
    let (by, schema) = means(to).await?;
    let read = read(to, &hot, schema.as_deref(), budget_bytes, deadline).await;
    // Takes the extension back, where it was made for this; says no more than a warning otherwise.
    let ended = to.batch_execute("ROLLBACK; RESET statement_timeout").await;
    let (relations, bytes, cut_short) = read?;
    ended?;
    Ok(Warmed { relations, bytes, by, analysed, cut_short })
}

/// How much the shared buffers of a server hold, in bytes.
pub async fn shared_buffers(control: &Control) -> Result<u64, tokio_postgres::Error> {
    let query = "SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('shared_buffers'))";
    Ok(control.query_one(query, &[]).await?.get::<_, i64>(0).unsigned_abs())
}

/// Everything that was read since the statistics began, the most read page by page first.
async fn hot(from: &Control) -> Result<Vec<Hot>, tokio_postgres::Error> {
    let query = "\
        WITH read AS ( \
            SELECT relid, relid AS sized, heap_blks_read + heap_blks_hit AS blocks, 0 AS part \
              FROM pg_catalog.pg_statio_user_tables \
            UNION ALL SELECT s.relid, c.reltoastrelid, s.toast_blks_read + s.toast_blks_hit, 1 \
              FROM pg_catalog.pg_statio_user_tables s JOIN pg_catalog.pg_class c ON c.oid = s.relid \
            UNION ALL SELECT s.relid, i.indexrelid, s.tidx_blks_read + s.tidx_blks_hit, 2 \
              FROM pg_catalog.pg_statio_user_tables s JOIN pg_catalog.pg_class c ON c.oid = s.relid \
              JOIN pg_catalog.pg_index i ON i.indrelid = c.reltoastrelid \
            UNION ALL SELECT indexrelid, indexrelid, idx_blks_read + idx_blks_hit, 0 \
              FROM pg_catalog.pg_statio_user_indexes) \
        SELECT n.nspname::text, c.relname::text, read.part, c.relkind = 'i' \
        FROM read JOIN pg_catalog.pg_class c ON c.oid = read.relid JOIN pg_catalog.pg_class s ON s.oid = read.sized \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE read.blocks > 0 AND n.nspname <> 'pgcutover' AND c.relpersistence = 'p' \
        ORDER BY read.blocks::float8 / greatest(s.relpages, 1) DESC, 1, 2";
    let rows = from.query(query, &[]).await?;
    let hot = |row: &tokio_postgres::Row| Hot {
        name: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        part: match row.get(2) {
            0 => Part::Itself,
            1 => Part::Toast,
            _ => Part::ToastIndex,
        },
        is_index: row.get(3),
    };
    Ok(rows.iter().map(hot).collect())
}

/// The schema that `pg_prewarm` is in, now; a transaction may be open because of it.
async fn means(to: &Control) -> Result<(Means, Option<String>), tokio_postgres::Error> {
    let installed = "SELECT n.nspname::text FROM pg_catalog.pg_extension e
                       JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'pg_prewarm'";
    if let Some(row) = to.query_opt(installed, &[]).await? {
        return Ok((Means::Prewarm, Some(row.get(0))));
    }
    to.batch_execute("BEGIN").await?;
    // It may not be there, or not be ours to install.
    match to.batch_execute("CREATE EXTENSION pg_prewarm SCHEMA pgcutover").await {
        Ok(()) => Ok((Means::Prewarm, Some("pgcutover".to_owned()))),
        Err(error) if error.as_db_error().is_some() => {
            to.batch_execute("ROLLBACK").await?;
            Ok((Means::Reading, None))
        }
        Err(lost) => Err(lost),
    }
}

/// How many relations and bytes were read, and whether the time was over before the end.
async fn read(
    to: &Control,
    hot: &[Hot],
    prewarm: Option<&str>,
    budget_bytes: u64,
    deadline: Instant,
) -> Result<(u64, u64, bool), tokio_postgres::Error> {
    let (mut relations, mut bytes) = (0, 0);
    for hot in hot {
        if prewarm.is_none() && (hot.is_index || hot.part != Part::Itself) {
            continue;
        }
        let Some((oid, size, block)) = measure(to, hot).await? else { continue };
        let room = budget_bytes.saturating_sub(bytes) / block;
        let blocks = i64::try_from(room.min(size)).unwrap_or(i64::MAX);
        if blocks == 0 {
            continue;
        }
        let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
            return Ok((relations, bytes, true));
        };
        match prewarm {
            // Rows that are new are at the end.
            Some(schema) => {
                let size = i64::try_from(size).unwrap_or(i64::MAX);
                let sql =
                    format!("SELECT {}.pg_prewarm($1::oid::regclass, 'buffer', 'main', $2, $3)", quote_ident(schema));
                let mut first = size - blocks;
                while first < size {
                    let last = (first + CHUNK_BLOCKS).min(size) - 1;
                    to.query_one(&sql, &[&oid, &first, &last]).await?;
                    bytes += (last + 1 - first).unsigned_abs() * block;
                    first = last + 1;
                    if Instant::now() >= deadline && first < size {
                        return Ok((relations, bytes, true));
                    }
                }
            }
            None => {
                if !through(to, &hot.name, left).await? {
                    return Ok((relations, bytes, true));
                }
                bytes += blocks.unsigned_abs() * block;
            }
        }
        relations += 1;
    }
    Ok((relations, bytes, false))
}

/// The relation's number here, its pages, and the size of one in bytes; none: it is not here.
async fn measure(to: &Control, hot: &Hot) -> Result<Option<(u32, u64, u64)>, tokio_postgres::Error> {
    let oid = match hot.part {
        Part::Itself => "c.oid",
        Part::Toast => "c.reltoastrelid",
        Part::ToastIndex => {
            "(SELECT i.indexrelid FROM pg_catalog.pg_index i WHERE i.indrelid = c.reltoastrelid LIMIT 1)"
        }
    };
    let query = format!(
        "SELECT r.oid, pg_catalog.pg_relation_size(r.oid), pg_catalog.current_setting('block_size')::bigint
           FROM pg_catalog.pg_class c JOIN pg_catalog.pg_class r ON r.oid = {oid}
          WHERE c.oid = pg_catalog.to_regclass($1) AND r.relkind IN ('r', 'm', 'i', 't')"
    );
    let row = to.query_opt(&query, &[&hot.name.to_string()]).await?;
    Ok(row.map(|row| {
        let (size, block) = (row.get::<_, i64>(1).unsigned_abs(), row.get::<_, i64>(2).unsigned_abs());
        (row.get(0), size / block, block)
    }))
}

/// Reads a table. Returns whether there was time enough.
async fn through(to: &Control, table: &QualifiedName, left: Duration) -> Result<bool, tokio_postgres::Error> {
    bounded(to, &format!("SELECT count(*) FROM ONLY {table}"), left).await
}

/// Tables with rows and without statistics, such as those that a role could not analyse when they were copied.
async fn analyse_unknown(to: &Control, deadline: Instant) -> Result<u64, tokio_postgres::Error> {
    let query = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c
                   JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND pg_catalog.pg_relation_size(c.oid) > 0
                    AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgcutover') AND c.relnatts > 0
                    AND NOT EXISTS (SELECT FROM pg_catalog.pg_stats s
                                     WHERE s.schemaname = n.nspname AND s.tablename = c.relname)
                    AND pg_catalog.pg_has_role(c.relowner, 'USAGE')
                  ORDER BY pg_catalog.pg_relation_size(c.oid), 1, 2";
    let mut analysed = 0;
    for row in to.query(query, &[]).await? {
        let table = QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else { break };
        if !bounded(to, &format!("ANALYZE {table}"), left).await? {
            break;
        }
        analysed += 1;
    }
    to.batch_execute("RESET statement_timeout").await?;
    Ok(analysed)
}

/// Runs a statement for so long at most. Returns whether it came to its end.
async fn bounded(to: &Control, sql: &str, left: Duration) -> Result<bool, tokio_postgres::Error> {
    let limit = left.as_millis().clamp(1, i32::MAX as u128);
    to.batch_execute(&format!("SET statement_timeout = {limit}")).await?;
    match to.batch_execute(sql).await {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::QUERY_CANCELED) => Ok(false),
        Err(error) => Err(error),
    }
}
