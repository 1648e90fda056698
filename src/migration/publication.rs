//! The publication and slot of one database, where its stream begins, and the visibility barrier behind that.
//!
//! The order is everything:
//!
//! ```text
//! publication   a slot decodes with the catalogue of its time: one made before the publication does not find it
//! slot          from here on every commit could be streamed
//! catalogue     a transaction of ours changes the catalogue, and whatever ran beside it ends
//! start         S: what committed before is not streamed
//! barrier       a transaction of ours with xid B commits, and is flushed
//! snapshots     only with xmin > B: whatever committed before S has then become visible. (Its commit record can
//!               be written long before it is visible: with synchronous replication until the standby answers.)
//! ```
//!
//! The catalogue is changed because a slot may begin with one that is too old. The changes that a transaction makes to the
//! catalogue while the slot is being made are not noticed before SNAPBUILD_FULL_SNAPSHOT (`DecodeHeap2Op` passes over them),
//! nor is the transaction then counted among those that the next catalogue snapshot sees (`SnapBuildCommitTxn`). Rows that
//! are written afterwards are decoded as if it had not been: after a TRUNCATE that ends in "could not map filenode", after
//! an ADD COLUMN the column is missing, and nothing says so. The next transaction that changes the catalogue gives everybody
//! a new snapshot, which is whole. Seen with PostgreSQL 15.20 and 18.4.

use std::collections::HashMap;
use std::time::Duration;

use tokio_postgres::GenericClient;

use crate::ident::{QualifiedName, quote_ident, quote_literal};
use crate::lsn::Lsn;
use crate::postgres::Control;
use crate::sqlstate;

/// Tries to lock tables of the publication.
const ATTEMPTS: u32 = 30;

/// One turn of waiting for writers when a publication is dropped; PostgreSQL's `deadlock_timeout` is one second.
const DROP_LOCK_TIMEOUT: Duration = Duration::from_millis(300);

/// Publication or slot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PublicationError {
    /// A statement failed.
    #[error("{doing} failed on the source")]
    Query {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Transactions that had to end first did not.
    #[error(
        "transactions that were open when {what} was made were still running after {waited:?}: {blockers}; end them and retry"
    )]
    StillRunning {
        /// What has to come after them.
        what: &'static str,
        /// How long.
        waited: Duration,
        /// Who.
        blockers: String,
    },
}

/// What a new slot is followed from.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Flushed; what committed before it is not streamed.
    pub position: Lsn,
    /// An xid, with epoch: a snapshot whose xmin is greater sees all that committed before [`Self::position`].
    pub barrier: u64,
}

fn failed(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> PublicationError {
    move |source| PublicationError::Query { doing, source }
}

/// Our own tables in a publication: the marker and the boundary, which an applier recognises, and its progress, by which
/// what it has written itself is told from what strangers have. None of them is ever applied.
const OURS: [&str; 3] = ["marker", "boundary", "progress"];

/// What it means when tables of the publication are renamed while it is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renames {
    /// The same is done on the other server, in the order of the stream.
    Carried,
    /// A stream says of a row only what its table is called. Of two tables that swapped their names each would be given the
    /// rows of the other, without an error anywhere: so names are kept.
    Unforeseen,
}

/// The tables of a publication, by OID, under the names that they had when it was made.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Names(HashMap<u32, QualifiedName>);

impl Names {
    /// What a table was called that has the name of another one now. A name that none of them had is no danger: the other
    /// server does not know it.
    pub fn taken(&self, oid: u32, is: &QualifiedName) -> Option<&QualifiedName> {
        self.0.get(&oid).filter(|was| *was != is && self.0.values().any(|name| name == is))
    }
}

/// Makes the publication of these tables and our own, anew if it is there. It takes a lock on each table that
/// lets reads and writes pass, but waits behind ALTER TABLE and the like.
pub async fn create(
    source: &mut Control,
    name: &str,
    tables: &[QualifiedName],
    renames: Renames,
    lock_timeout: Duration,
) -> Result<(), PublicationError> {
    let publication = quote_ident(name);
    let ours = OURS.map(|name| QualifiedName::new("pgcutover", name));
    let list: Vec<String> = tables.iter().chain(&ours).map(|table| format!("ONLY {table}")).collect();
    // Where rows are identified as a whole, the application's UPDATE would fail without (`pub_contains_invalid_column`).
    let generated = if source.version_num() >= 180_000 { " WITH (publish_generated_columns = stored)" } else { "" };
    let script = format!(
        "SET LOCAL lock_timeout = {}; CREATE PUBLICATION {publication} FOR TABLE {}{generated}",
        lock_timeout.as_millis().max(1),
        list.join(", ")
    );
    drop_publication(source, name).await?;
    let mut attempt = 1;
    loop {
        let transaction = source.transaction().await.map_err(failed("CREATE PUBLICATION"))?;
        match transaction.batch_execute(&script).await {
            Ok(()) => {
                if renames == Renames::Unforeseen {
                    keep_names(&transaction, name).await.map_err(failed("COMMENT ON PUBLICATION"))?;
                }
                return transaction.commit().await.map_err(failed("CREATE PUBLICATION"));
            }
            Err(error) if error.code().is_some_and(|code| code.code() == "55P03") && attempt < ATTEMPTS => {
                transaction.rollback().await.map_err(failed("CREATE PUBLICATION"))?;
                attempt += 1;
                tokio::time::sleep(lock_timeout.min(Duration::from_secs(1))).await;
            }
            Err(error) => return Err(failed("CREATE PUBLICATION")(error)),
        }
    }
}

/// The tables of a publication that [`create`] has made, ours left out. Read where they are written down: the view
/// `pg_publication_tables` of PostgreSQL 18 waits for whoever has locked one of them exclusively.
pub async fn published(server: &Control, name: &str) -> Result<Vec<QualifiedName>, tokio_postgres::Error> {
    let tables = members(&**server, name).await?.into_iter().map(|(_, table)| table);
    Ok(tables.filter(|table| table.schema != "pgcutover").collect())
}

/// Writes the names into the publication's comment, which is there as long as the publication is.
async fn keep_names(transaction: &impl GenericClient, name: &str) -> Result<(), tokio_postgres::Error> {
    let names = Names(members(transaction, name).await?.into_iter().collect());
    // Strings alone, so it cannot fail.
    let comment = serde_json::to_string(&names).unwrap_or_default();
    let comment = format!("COMMENT ON PUBLICATION {} IS {}", quote_ident(name), quote_literal(&comment));
    transaction.batch_execute(&comment).await
}

/// What [`create`] has kept; nothing where renames are carried, or an earlier version has made the publication.
pub async fn names(server: &Control, name: &str) -> Result<Names, tokio_postgres::Error> {
    let sql =
        "SELECT pg_catalog.obj_description(oid, 'pg_publication') FROM pg_catalog.pg_publication WHERE pubname = $1";
    let row = server.query_opt(sql, &[&name]).await?;
    let comment: Option<String> = row.and_then(|row| row.get(0));
    Ok(comment.and_then(|comment| serde_json::from_str(&comment).ok()).unwrap_or_default())
}

/// Tables of the publication that have another one's name now, with the name that they had.
pub async fn renamed(
    server: &Control,
    name: &str,
) -> Result<Vec<(QualifiedName, QualifiedName)>, tokio_postgres::Error> {
    let names = names(server, name).await?;
    let now = members(&**server, name).await?.into_iter();
    Ok(now.filter_map(|(oid, is)| names.taken(oid, &is).cloned().map(|was| (is, was))).collect())
}

async fn members(server: &impl GenericClient, name: &str) -> Result<Vec<(u32, QualifiedName)>, tokio_postgres::Error> {
    let rows = server
        .query(
            "SELECT n.nspname::text, c.relname::text, c.oid
               FROM pg_catalog.pg_publication p
               JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid
               JOIN pg_catalog.pg_class c ON c.oid = r.prrelid
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
              WHERE p.pubname = $1 ORDER BY 1, 2",
            &[&name],
        )
        .await?;
    let member =
        |row: &tokio_postgres::Row| (row.get(2), QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)));
    Ok(rows.iter().map(member).collect())
}

/// The statement that removes it and succeeds when it is not there.
pub fn drop_publication_sql(name: &str) -> String {
    format!("DROP PUBLICATION IF EXISTS {}", quote_ident(name))
}

/// Removes the publication, each of its tables at a moment when nobody writes to it; nothing when it is not there. A
/// statement that has just looked up which publications its table is in, and then finds one of them gone, fails with an
/// internal error (`GetRelationPublicationActions` in PostgreSQL's relcache.c), and that statement would be the
/// application's. One lock at a time, waited for in turns that are shorter than `deadlock_timeout`: so no transaction of
/// the application ever waits for us while we wait for it.
pub async fn drop_publication(source: &Control, name: &str) -> Result<(), PublicationError> {
    let doing = "DROP PUBLICATION";
    let tables = members(&**source, name).await.map_err(failed(doing))?;
    let mut turns = ATTEMPTS;
    for (_, table) in &tables {
        take_out(source, name, table, &mut turns).await?;
    }
    // Where somebody writes for longer than we wait, what is left of the danger is a moment.
    source.batch_execute(&drop_publication_sql(name)).await.map_err(failed(doing))
}

/// Takes a table out of the publication. Leaves it in when `turns`, the waits that are left, are used up.
async fn take_out(
    source: &Control,
    name: &str,
    table: &QualifiedName,
    turns: &mut u32,
) -> Result<(), PublicationError> {
    let doing = "ALTER PUBLICATION … DROP TABLE";
    let guarded = format!(
        "BEGIN; SET LOCAL lock_timeout = {}; LOCK TABLE ONLY {table} IN SHARE MODE; \
         ALTER PUBLICATION {} DROP TABLE ONLY {table}; COMMIT",
        DROP_LOCK_TIMEOUT.as_millis(),
        quote_ident(name)
    );
    while *turns > 0 {
        let Err(error) = source.batch_execute(&guarded).await else { return Ok(()) };
        source.batch_execute("ROLLBACK").await.map_err(failed(doing))?;
        match error.code().map(tokio_postgres::error::SqlState::code) {
            Some(sqlstate::LOCK_NOT_AVAILABLE) => *turns -= 1,
            // The table or the publication is gone, or the one is not in the other any more.
            Some("42P01" | "42704") => return Ok(()),
            _ => return Err(failed(doing)(error)),
        }
        tokio::time::sleep(DROP_LOCK_TIMEOUT).await;
    }
    Ok(())
}

/// The statement that removes the slot and succeeds when it is not there; fails while a walsender uses it.
pub fn drop_slot_sql(name: &str) -> String {
    format!(
        "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
        quote_literal(name)
    )
}

/// Ends a walsender that holds the slot, then removes the slot; nothing when it is not there.
pub async fn drop_slot(source: &Control, name: &str) -> Result<(), PublicationError> {
    let doing = "dropping the replication slot";
    let mut attempts = 0;
    loop {
        attempts += 1;
        source
            .execute(
                "SELECT pg_catalog.pg_terminate_backend(active_pid) FROM pg_catalog.pg_replication_slots
                  WHERE slot_name = $1 AND active_pid IS NOT NULL",
                &[&name],
            )
            .await
            .map_err(failed(doing))?;
        let Err(error) = source.batch_execute(&drop_slot_sql(name)).await else { return Ok(()) };
        match error.code().map(tokio_postgres::error::SqlState::code) {
            // One that was being made goes with the session that was making it.
            Some(sqlstate::UNDEFINED_OBJECT) => return Ok(()),
            Some("55006") if attempts <= ATTEMPTS => tokio::time::sleep(Duration::from_millis(200)).await,
            _ => return Err(failed(doing)(error)),
        }
    }
}

/// Where the stream of a slot that was made on `server` just now begins. Waits up to `limit` for transactions that are open.
pub async fn start(server: &mut Control, limit: Duration) -> Result<Start, PublicationError> {
    let doing = "changing the catalogue behind the slot";
    let change = "SET LOCAL synchronous_commit = local; COMMENT ON TABLE pgcutover.marker IS 'Positions of the stream'";
    let transaction = server.transaction().await.map_err(failed(doing))?;
    transaction.batch_execute(change).await.map_err(failed(doing))?;
    transaction.commit().await.map_err(failed(doing))?;
    // They may have written before the change, and be decoded without it.
    outlast(server, Outlast::Writers, "the slot", limit).await?;
    let position = "SELECT pg_catalog.pg_current_wal_insert_lsn()";
    let position = server.query_one(position, &[]).await.map_err(failed("reading where the stream begins"))?.get(0);
    Ok(Start { position, barrier: barrier(server).await? })
}

/// Whose end is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlast {
    /// Transactions that have changed something, which are those that have an xid.
    Writers,
    /// And statements of this database that wait for a lock of a table: a definition that they are about to change is
    /// changed as if nothing had been made since. (Seen only by roles that are shown others' statements.)
    WritersAndWaiters,
}

/// Waits up to `limit` until those have ended that run on `server` now, in any database. `what` was made just before.
pub async fn outlast(
    server: &mut Control,
    whom: Outlast,
    what: &'static str,
    limit: Duration,
) -> Result<(), PublicationError> {
    let doing = "waiting for transactions";
    let began = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(20);
    let now = "SELECT pg_catalog.txid_current(), pg_catalog.clock_timestamp()::text";
    let row = server.query_one(now, &[]).await.map_err(failed(doing))?;
    let (xid, at): (i64, String) = (row.get(0), row.get(1));
    let waiters = whom == Outlast::WritersAndWaiters;
    loop {
        let row = server.query_one(STILL_RUNNING, &[&xid, &at, &waiters]).await.map_err(failed(doing))?;
        let (writers, blockers): (bool, Option<String>) = (row.get(0), row.get(1));
        if !writers && blockers.is_none() {
            return Ok(());
        }
        if began.elapsed() > limit {
            let blockers = blockers.unwrap_or_else(|| "somebody who is not shown to the role".to_owned());
            if !writers {
                tracing::warn!(blockers, "these have waited for locks since {what} was made, and are not waited for");
                return Ok(());
            }
            return Err(PublicationError::StillRunning { what, waited: began.elapsed(), blockers });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// Whether a transaction with an xid up to $1 runs, with names for such; where $3, with those of who has waited for a lock
/// since $2.
const STILL_RUNNING: &str = "
    WITH old AS (SELECT pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot()) <= $1 AS xids)
    SELECT old.xids, (SELECT pg_catalog.string_agg(who, ', ') FROM (
        SELECT 'pid ' || a.pid || ' (' || coalesce(nullif(a.application_name, ''), 'no name') || ')' AS who
          FROM pg_catalog.pg_stat_activity a
         WHERE a.pid <> pg_catalog.pg_backend_pid()
           AND (old.xids AND a.backend_xid IS NOT NULL AND a.xact_start < $2::text::timestamptz
                OR $3 AND a.datname = pg_catalog.current_database() AND a.backend_type = 'client backend'
                   AND a.state = 'active' AND a.wait_event_type = 'Lock' AND a.wait_event = 'relation'
                   AND a.query_start < $2::text::timestamptz)
        UNION ALL
        SELECT 'prepared transaction ' || x.gid FROM pg_catalog.pg_prepared_xacts x
         WHERE old.xids AND x.prepared < $2::text::timestamptz
        LIMIT 5) AS waited_for)
      FROM old";

/// Commits a transaction of our own and returns its xid, with epoch. It is flushed, with all that was written before, so a
/// source that crashes does not give the same positions to others. No standby is waited for.
async fn barrier(source: &mut Control) -> Result<u64, PublicationError> {
    let doing = "the visibility barrier";
    let transaction = source.transaction().await.map_err(failed(doing))?;
    transaction.batch_execute("SET LOCAL synchronous_commit = local").await.map_err(failed(doing))?;
    let write = "SELECT pg_catalog.txid_current() FROM pg_catalog.pg_logical_emit_message(true, 'pgcutover', 'start')";
    let row = transaction.query_one(write, &[]).await.map_err(failed(doing))?;
    transaction.commit().await.map_err(failed(doing))?;
    Ok(row.get::<_, i64>(0).cast_unsigned())
}
