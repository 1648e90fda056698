//! Which column values identify a row of each table to the stream.
//!
//! Publishing UPDATE and DELETE of a table that has no replica identity makes the *application's* statement fail
//! (`cannot update table … because it does not have a replica identity`). Identities are therefore decided, and where the
//! operator allows it mended, before the publication is made.

use std::time::Duration;

use tokio::time::Instant;

use crate::catalog::journal::{MadeObject, Side};
use crate::config::WithoutIdentity;
use crate::ident::QualifiedName;
use crate::migration::copy;
use crate::migration::made::{self, Journal, JournalError};
use crate::postgres::Control;
use crate::sqlstate;

/// Attempts at the lock, each `lock_timeout` long and as far apart.
const LOCK_ATTEMPTS: u32 = 60;

/// What identifies a row.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// The primary key.
    PrimaryKey,
    /// The index named by `REPLICA IDENTITY USING INDEX`.
    Index(String),
    /// The whole old row.
    Full,
    /// Nothing: UPDATE and DELETE cannot be published.
    None,
}

/// What is to be done about a table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// It is usable as it is.
    Nothing,
    /// [`mend`] sets `REPLICA IDENTITY FULL`; `undo` is the statement that sets it back.
    SetFull {
        /// The statement that restores what was there.
        undo: String,
    },
    /// The policy forbids mending.
    Refuse,
}

/// One table's identity.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableIdentity {
    /// The table.
    pub table: QualifiedName,
    /// Its OID on the source.
    pub oid: u32,
    /// What identifies a row now.
    pub identity: Identity,
    /// What is to be done.
    pub remedy: Remedy,
}

/// Identities could not be decided or mended.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The catalogues could not be read.
    #[error("the replica identities of the source's tables could not be read")]
    Read(#[source] tokio_postgres::Error),
    /// The table stayed locked.
    #[error("{table} stayed locked for {waited:?}, so its replica identity could not be set; blocked by {blockers}")]
    Locked {
        /// The table.
        table: QualifiedName,
        /// Over all attempts.
        waited: Duration,
        /// Process ids and application names.
        blockers: String,
    },
    /// The statement failed.
    #[error("the replica identity of {table} could not be set to FULL")]
    Alter {
        /// The table.
        table: QualifiedName,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Every ordinary table that is migrated from this database, with its identity, by name.
pub async fn plan(source: &Control, policy: WithoutIdentity) -> Result<Vec<TableIdentity>, IdentityError> {
    // A deferrable key identifies nothing: it may be violated in the middle of a transaction
    // (RelationGetIndexList in PostgreSQL's relcache.c).
    let query = "\
        SELECT n.nspname::text, c.relname::text, c.oid, c.relreplident::text, \
               EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid), \
               (SELECT x.relname::text FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid \
                WHERE i.indrelid = c.oid AND i.indisreplident AND i.indimmediate AND i.indisvalid LIMIT 1), \
               EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped \
                          AND to_jsonb(a) ->> 'attgenerated' = 'v') \
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.oid = ANY ($1) ORDER BY 1, 2";
    let tables = copy::list_tables_unmeasured(source).await.map_err(IdentityError::Read)?;
    let oids: Vec<u32> = tables.iter().map(|table| table.oid).collect();
    let rows = source.query(query, &[&oids]).await.map_err(IdentityError::Read)?;
    Ok(rows
        .iter()
        .map(|row| {
            let table = QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1));
            let (chosen, index): (String, Option<String>) = (row.get(3), row.get(5));
            let identity = identity(&chosen, row.get(4), index);
            // From PostgreSQL 18 on no publication has such columns, and FULL would be all of them: UPDATE and DELETE of
            // the application would fail.
            let is_virtual: bool = row.get(6);
            let remedy = match remedy(&table, &identity, &chosen, policy) {
                Remedy::SetFull { .. } if is_virtual => Remedy::Refuse,
                Remedy::Nothing if is_virtual && identity == Identity::Full => Remedy::Refuse,
                other => other,
            };
            TableIdentity { table, oid: row.get(2), identity, remedy }
        })
        .collect())
}

/// What `relreplident` comes to.
fn identity(chosen: &str, primary_key: bool, index: Option<String>) -> Identity {
    match (chosen, index) {
        ("f", _) => Identity::Full,
        ("d", _) if primary_key => Identity::PrimaryKey,
        ("i", Some(index)) => Identity::Index(index),
        _ => Identity::None,
    }
}

fn remedy(table: &QualifiedName, identity: &Identity, chosen: &str, policy: WithoutIdentity) -> Remedy {
    if *identity != Identity::None {
        return Remedy::Nothing;
    }
    match policy {
        WithoutIdentity::Refuse => Remedy::Refuse,
        // `USING INDEX` of an index that is gone cannot be said again; DEFAULT identifies as little.
        WithoutIdentity::Full => Remedy::SetFull {
            undo: format!(
                "ALTER TABLE IF EXISTS ONLY {table} REPLICA IDENTITY {}",
                if chosen == "n" { "NOTHING" } else { "DEFAULT" }
            ),
        },
    }
}

/// Sets `REPLICA IDENTITY FULL` where the plan says so, each attempt bounded by `lock_timeout`, so that the
/// application never queues behind us for longer. Recorded first; does nothing for other remedies. `control` is
/// connected to the server of `side`: a stream may come from either.
pub async fn mend(
    side: Side,
    control: &Control,
    database: &str,
    table: &TableIdentity,
    lock_timeout: Duration,
    journal: &dyn Journal,
) -> Result<(), IdentityError> {
    let Remedy::SetFull { undo } = &table.remedy else { return Ok(()) };
    let name = &table.table;
    let made = MadeObject {
        side,
        database: Some(database.to_owned()),
        kind: made::REPLICA_IDENTITY.to_owned(),
        name: name.to_string(),
        undo: Some(undo.clone()),
        note: "had no usable replica identity; FULL while it is migrated".to_owned(),
    };
    journal.record(&made).await?;
    let alter = format!(
        "BEGIN; SET LOCAL lock_timeout = {}; ALTER TABLE ONLY {name} REPLICA IDENTITY FULL; COMMIT",
        lock_timeout.as_millis().max(1)
    );
    let began = Instant::now();
    for _ in 0..LOCK_ATTEMPTS {
        let Err(error) = control.batch_execute(&alter).await else {
            tracing::info!(database, table = %name, "replica identity set to FULL");
            return Ok(());
        };
        let refused = |source| IdentityError::Alter { table: name.clone(), source };
        if error.code().map(tokio_postgres::error::SqlState::code) != Some(sqlstate::LOCK_NOT_AVAILABLE) {
            let refusal = refused(error);
            // The session may be used for the next table; where it is lost, the first error tells more.
            let _ended = control.batch_execute("ROLLBACK").await;
            return Err(refusal);
        }
        control.batch_execute("ROLLBACK").await.map_err(refused)?;
        // What queued behind us gets its turn.
        tokio::time::sleep(lock_timeout.min(Duration::from_secs(1))).await;
    }
    let blockers = lock_holders(control, table.oid).await.map_err(IdentityError::Read)?;
    Err(IdentityError::Locked { table: name.clone(), waited: began.elapsed(), blockers })
}

async fn lock_holders(control: &Control, oid: u32) -> Result<String, tokio_postgres::Error> {
    let query = "SELECT DISTINCT format('pid %s (%s)', l.pid, coalesce(nullif(a.application_name, ''), 'no name')) \
                 FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
                 WHERE l.locktype = 'relation' AND l.relation = $1 AND l.granted LIMIT 5";
    let rows = control.query(query, &[&oid]).await?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    Ok(if names.is_empty() { "somebody who has gone since".to_owned() } else { names.join(", ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_identifies_a_row() {
        assert_eq!(identity("d", true, None), Identity::PrimaryKey);
        assert_eq!(identity("d", false, Some("unused".to_owned())), Identity::None);
        assert_eq!(identity("i", true, Some("x".to_owned())), Identity::Index("x".to_owned()));
        assert_eq!(identity("i", true, None), Identity::None, "its index was dropped");
        assert_eq!(identity("n", true, None), Identity::None, "NOTHING, although there is a key");
        assert_eq!(identity("f", false, None), Identity::Full);
    }

    #[test]
    fn what_was_there_comes_back() {
        let table = QualifiedName::new("s", "t");
        let undo = |chosen| match remedy(&table, &Identity::None, chosen, WithoutIdentity::Full) {
            Remedy::SetFull { undo } => undo,
            other => panic!("{other:?}"),
        };
        assert_eq!(undo("n"), "ALTER TABLE IF EXISTS ONLY \"s\".\"t\" REPLICA IDENTITY NOTHING");
        assert_eq!(undo("d"), "ALTER TABLE IF EXISTS ONLY \"s\".\"t\" REPLICA IDENTITY DEFAULT");
        assert_eq!(remedy(&table, &Identity::None, "d", WithoutIdentity::Refuse), Remedy::Refuse);
        assert_eq!(remedy(&table, &Identity::Full, "f", WithoutIdentity::Refuse), Remedy::Nothing);
    }
}
