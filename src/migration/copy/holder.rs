//! The transaction on the source that a table is copied under.
//!
//! The lock comes first: TRUNCATE and ALTERs that rewrite are not MVCC-safe, and a COPY under a snapshot from before them
//! silently reads nothing. The snapshot comes second, and must be past the barrier. The position comes last.

use std::time::Duration;

use tokio::time::Instant;

use super::parts::Axis;
use super::tables::{self, Column, single};
use super::{CopyContext, CopyError, SourceTable};
use crate::ident::{quote_ident, quote_literal};
use crate::lsn::Lsn;
use crate::migration::snapshot::{HandOver, TxidSnapshot};
use crate::postgres::{RawConnection, RawError};
use crate::sqlstate;

/// `undefined_table`
const UNDEFINED_TABLE: &str = "42P01";

/// `invalid_parameter_value` or, from 17 on, [`sqlstate::UNDEFINED_OBJECT`]: a snapshot that nobody holds any more. One whose
/// holder ends at that moment is [`sqlstate::OBJECT_NOT_IN_PREREQUISITE_STATE`].
const INVALID_PARAMETER_VALUE: &str = "22023";

/// Attempts at the lock, each `lock_timeout` long.
const LOCK_ATTEMPTS: u32 = 60;

/// A locked table with its snapshot.
pub(super) struct Holder {
    pub(super) connection: RawConnection,
    pub(super) hand_over: HandOver,
    pub(super) columns: Vec<Column>,
    /// `UTF8`, `LATIN1`, …
    pub(super) encoding: String,
}

impl Holder {
    /// Locks the table and takes its snapshot, on a connection to the source.
    pub(super) async fn open(
        context: &CopyContext,
        table: &SourceTable,
        mut connection: RawConnection,
    ) -> Result<Self, CopyError> {
        let began = Instant::now();
        let mut pause = Duration::from_millis(20);
        let snapshot = loop {
            lock(context, table, &mut connection).await?;
            let snapshot = take_snapshot(table, &mut connection).await?;
            match context.barrier_xid {
                Some(barrier) if snapshot.xmin <= barrier => {}
                Some(_) | None => break snapshot,
            }
            // Something from before the barrier is still running, or committed and not yet visible. Or this is a standby that
            // was promoted without the barrier: where nobody writes, it would never be reached.
            if context.barrier_xid.is_some_and(|barrier| snapshot.xmax <= barrier) {
                query(table, &mut connection, "using up an xid", "SELECT txid_current()").await?;
            }
            query(table, &mut connection, "releasing the lock", "ROLLBACK").await?;
            if began.elapsed() > context.config.slot_timeout {
                let blockers = old_transactions(&mut connection, snapshot.xmin).await;
                return Err(CopyError::Barrier { table: table.name.clone(), waited: began.elapsed(), blockers });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        };
        let position = "SELECT pg_current_wal_insert_lsn(), current_setting('server_encoding')";
        let rows = query(table, &mut connection, "reading the position", position).await?;
        let position: Option<Lsn> = single(&rows).and_then(|text| text.parse().ok());
        let encoding = rows.first().and_then(|row| row.get(1).cloned().flatten());
        let (Some(position), Some(encoding)) = (position, encoding) else {
            return Err(unreadable(table, "position"));
        };
        check_same_table(table, &mut connection).await?;
        let columns = tables::columns(&mut connection, &table.name).await;
        let columns = columns.map_err(|error| source_error(table, "reading its columns", error))?;
        Ok(Self { connection, hand_over: HandOver { snapshot, position }, columns, encoding })
    }

    /// What the table can be cut along, as large as it is now.
    pub(super) async fn axis(&mut self, table: &SourceTable) -> Result<Axis, CopyError> {
        if self.connection.version_num() >= 140_000 {
            let sql = format!("SELECT pg_relation_size({}::oid) / current_setting('block_size')::int8", table.oid);
            let rows = query(table, &mut self.connection, "measuring it", &sql).await?;
            let blocks = single(&rows).and_then(|text| text.parse().ok()).ok_or_else(|| unreadable(table, "size"))?;
            return Ok(Axis::Blocks(blocks));
        }
        let sql = format!(
            "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
             WHERE i.indrelid = {}::oid AND i.indisprimary AND i.indisvalid AND i.indnatts = 1 \
             AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)",
            table.oid
        );
        let rows = query(table, &mut self.connection, "looking for its key", &sql).await?;
        let Some(column) = single(&rows).map(quote_ident) else { return Ok(Axis::None) };
        let sql = format!("SELECT min({column})::int8, max({column})::int8 FROM ONLY {}", table.name);
        let rows = query(table, &mut self.connection, "measuring its key", &sql).await?;
        let bound = |at: usize| rows.first()?.get(at)?.as_deref()?.parse::<i64>().ok();
        Ok(match (bound(0), bound(1)) {
            (Some(min), Some(max)) => Axis::Key { column, min, max },
            // No row is visible.
            _ => Axis::None,
        })
    }

    /// Ends the transaction, and with it the lock, and returns the connection once the source cannot forget any more what
    /// the snapshot saw end. Its records may not have been flushed when it was taken: a source that crashes then gives
    /// the same positions and xids to other transactions, and the stream would skip those for this table.
    pub(super) async fn end(mut self, table: &SourceTable) -> Result<RawConnection, CopyError> {
        query(table, &mut self.connection, "ending its transaction", "COMMIT").await?;
        // It writes, so its commit is flushed, and with it whatever was written before. No standby is waited for.
        let flush = "BEGIN READ WRITE; SET LOCAL synchronous_commit = local; \
                     SELECT pg_logical_emit_message(true, 'pgcutover', 'copied'); COMMIT";
        query(table, &mut self.connection, "making its snapshot durable", flush).await?;
        Ok(self.connection)
    }

    /// Lets further connections read under this snapshot while this one holds it.
    pub(super) async fn export(&mut self, table: &SourceTable) -> Result<String, CopyError> {
        let rows = query(table, &mut self.connection, "exporting its snapshot", "SELECT pg_export_snapshot()").await?;
        single(&rows).map(str::to_owned).ok_or_else(|| unreadable(table, "snapshot"))
    }
}

/// A further reader under the holder's snapshot, with a lock of its own: a COPY that only asked for one later could queue
/// behind an ALTER TABLE that waits for the holder, which waits for the COPY.
pub(super) async fn join(
    context: &CopyContext,
    table: &SourceTable,
    snapshot: &str,
    connection: &mut RawConnection,
) -> Result<(), CopyError> {
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; SET LOCAL lock_timeout = {}",
        quote_literal(snapshot),
        context.config.lock_timeout.as_millis().max(1),
    );
    connection.simple_query(&sql).await.map_err(|error| {
        if error.sqlstate().is_some_and(is_of_a_lost_snapshot) {
            return CopyError::HolderGone { table: table.name.clone() };
        }
        source_error(table, "joining its snapshot", error)
    })?;
    let lock = format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE", table.name);
    query(table, connection, "locking it once more", &lock).await?;
    Ok(())
}

/// Whether SET TRANSACTION SNAPSHOT is answered so when nobody holds the snapshot.
fn is_of_a_lost_snapshot(sqlstate: &str) -> bool {
    [INVALID_PARAMETER_VALUE, sqlstate::UNDEFINED_OBJECT, sqlstate::OBJECT_NOT_IN_PREREQUISITE_STATE]
        .contains(&sqlstate)
}

/// Begins a transaction and locks the table in it; LOCK TABLE takes no snapshot.
async fn lock(context: &CopyContext, table: &SourceTable, connection: &mut RawConnection) -> Result<(), CopyError> {
    let began = Instant::now();
    let timeout = context.config.lock_timeout.as_millis().max(1);
    let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = {timeout}");
    let lock = format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE", table.name);
    for attempt in 1.. {
        query(table, connection, "beginning its transaction", &begin).await?;
        let Err(error) = connection.simple_query(&lock).await else { return Ok(()) };
        match error.sqlstate() {
            Some(UNDEFINED_TABLE) => return Err(CopyError::Vanished { table: table.name.clone() }),
            Some(sqlstate::LOCK_NOT_AVAILABLE) => {}
            _ => return Err(source_error(table, "locking it", error)),
        }
        query(table, connection, "giving up its lock", "ROLLBACK").await?;
        if attempt >= LOCK_ATTEMPTS {
            let blockers = lock_holders(connection, table).await;
            return Err(CopyError::Locked { table: table.name.clone(), waited: began.elapsed(), blockers });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn take_snapshot(table: &SourceTable, connection: &mut RawConnection) -> Result<TxidSnapshot, CopyError> {
    let rows = query(table, connection, "taking its snapshot", "SELECT txid_current_snapshot()").await?;
    single(&rows).and_then(|text| text.parse().ok()).ok_or_else(|| unreadable(table, "snapshot"))
}

/// A table that was dropped and made again under the same name is not the one that is published.
async fn check_same_table(table: &SourceTable, connection: &mut RawConnection) -> Result<(), CopyError> {
    let sql = format!(
        "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname = {} AND c.relname = {} AND c.relkind = 'r'",
        quote_literal(&table.name.schema),
        quote_literal(&table.name.name)
    );
    let rows = query(table, connection, "looking it up", &sql).await?;
    if single(&rows) == Some(table.oid.to_string().as_str()) {
        return Ok(());
    }
    Err(CopyError::Vanished { table: table.name.clone() })
}

/// Who holds a lock that excludes readers, for the message.
async fn lock_holders(connection: &mut RawConnection, table: &SourceTable) -> String {
    let sql = format!(
        "SELECT l.pid || ' (' || coalesce(nullif(a.application_name, ''), 'no name') || ')' FROM pg_locks l \
         LEFT JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.relation = {}::oid \
         AND l.mode = 'AccessExclusiveLock' AND l.locktype = 'relation' ORDER BY l.granted DESC LIMIT 5",
        table.oid
    );
    names(connection, &sql).await
}

/// Who keeps the snapshot's xmin down, for the message.
async fn old_transactions(connection: &mut RawConnection, xmin: u64) -> String {
    let sql = format!(
        "SELECT 'pid ' || pid || ' (' || coalesce(nullif(application_name, ''), 'no name') || ')' \
         FROM pg_stat_activity WHERE backend_xid::text = '{low}' UNION ALL \
         SELECT 'prepared transaction ' || gid FROM pg_prepared_xacts WHERE transaction::text = '{low}' LIMIT 5",
        low = xmin & 0xFFFF_FFFF
    );
    names(connection, &sql).await
}

async fn names(connection: &mut RawConnection, sql: &str) -> String {
    let rows = connection.simple_query(sql).await.unwrap_or_default();
    let found: Vec<String> = rows.into_iter().flatten().flatten().collect();
    if found.is_empty() { "somebody who has gone since".to_owned() } else { found.join(", ") }
}

async fn query(
    table: &SourceTable,
    connection: &mut RawConnection,
    doing: &'static str,
    sql: &str,
) -> Result<crate::postgres::TextRows, CopyError> {
    connection.simple_query(sql).await.map_err(|error| source_error(table, doing, error))
}

fn source_error(table: &SourceTable, doing: &'static str, source: RawError) -> CopyError {
    CopyError::Server { table: table.name.clone(), server: "source", doing, source: Box::new(source) }
}

fn unreadable(table: &SourceTable, what: &'static str) -> CopyError {
    CopyError::Unreadable { table: table.name.clone(), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_lost_in_three_ways() {
        for code in ["22023", "42704", "55000"] {
            assert!(is_of_a_lost_snapshot(code), "{code}");
        }
        assert!(!is_of_a_lost_snapshot("42501"));
    }
}
