//! Fences: a server's own note that it has given databases up for a cutover that leads to another server.
//!
//! The row is written in the same transaction as the settings that fence the databases, and its outcome in the same
//! transaction as their restoration, so that neither is ever true without the other. `ALTER DATABASE` changes shared
//! catalogues: one transaction in the control database fences every database of a migration.
//!
//! Rows are never deleted. A row with the outcome `decided` is the server's tombstone: it tells a configuration that
//! still names this server where its databases have gone.
//!
//! ```text
//! outcome   hard   ajar   returned_by   the databases
//! –         –      –      –             read-only by default
//! –         true   –      –             … and shut
//! aborted                 –             as they were before
//! decided   true   false  –             shut; our own sessions get in through the door (see [`super::door`])
//! decided   true   true   –             open and read-only by default: a rollback is being prepared
//! decided                 2             as they were before: cutover 2 has brought them back
//! ```

use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::RecordError;
use super::claims::ServerIdentity;
use super::decision::{Case, Outcome};
use crate::switch::Epoch;

/// Tables of a control database. Idempotent.
pub(super) const DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.fence (
    epoch             bigint PRIMARY KEY,
    migration         text NOT NULL,
    databases         text[] NOT NULL,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    leads_to          text NOT NULL,
    leads_to_timeline integer NOT NULL,
    saved             jsonb NOT NULL,
    outcome           text CHECK (outcome IN ('decided', 'aborted')),
    made_at           timestamptz NOT NULL DEFAULT now(),
    ended_at          timestamptz,
    hard              boolean NOT NULL DEFAULT false,
    ajar              boolean NOT NULL DEFAULT false,
    returned_by       bigint
);
ALTER TABLE pgcutover.fence ADD COLUMN IF NOT EXISTS hard boolean NOT NULL DEFAULT false;
ALTER TABLE pgcutover.fence ADD COLUMN IF NOT EXISTS ajar boolean NOT NULL DEFAULT false;
ALTER TABLE pgcutover.fence ADD COLUMN IF NOT EXISTS returned_by bigint;
";

/// Everything that a fence row says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// Number, migration, databases.
    pub case: Case,
    /// The server that is fenced.
    pub on: ServerIdentity,
    /// The server that will hold the decision.
    pub leads_to: ServerIdentity,
    /// What restores the databases exactly as they were.
    pub saved: Vec<SavedDatabase>,
}

/// One database as it was before the fence.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedDatabase {
    /// Its name.
    pub name: String,
    /// `ALTER DATABASE … SET default_transaction_read_only`, if there was one.
    pub read_only: Option<String>,
    /// Roles whose own setting would have outranked the database's: the fence overrides it for this database.
    pub roles: Vec<SavedRole>,
    /// `datallowconn`.
    pub allow_connections: bool,
    /// `datconnlimit`.
    pub connection_limit: i32,
}

/// One role whose setting contradicts the fence.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedRole {
    /// Its name.
    pub name: String,
    /// `ALTER ROLE … IN DATABASE … SET default_transaction_read_only`, if there was one.
    pub read_only: Option<String>,
}

/// Writes the row. Part of the transaction that fences. Fails when the epoch is taken: one coordinator owns an epoch.
pub async fn insert(transaction: &impl GenericClient, fence: &Fence) -> Result<(), RecordError> {
    transaction
        .execute(
            "INSERT INTO pgcutover.fence (epoch, migration, databases, system_identifier, timeline, leads_to,
                                          leads_to_timeline, saved)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            &[
                &super::epoch_to_sql(fence.case.epoch),
                &fence.case.migration,
                &fence.case.databases,
                &fence.on.system_identifier,
                &fence.on.timeline,
                &fence.leads_to.system_identifier,
                &fence.leads_to.timeline,
                &saved_to_json(&fence.saved)?,
            ],
        )
        .await
        .map_err(|source| RecordError::query("write the fence row", source))?;
    Ok(())
}

/// The row of `epoch`, with its outcome as far as it was noted.
pub async fn read(control: &impl GenericClient, epoch: Epoch) -> Result<Option<(Fence, Option<Outcome>)>, RecordError> {
    let row = control
        .query_opt(
            "SELECT migration, databases, system_identifier, timeline, leads_to, leads_to_timeline, saved, outcome
             FROM pgcutover.fence WHERE epoch = $1",
            &[&super::epoch_to_sql(epoch)],
        )
        .await
        .map_err(|source| RecordError::query("read the fence row", source))?;
    let Some(row) = row else { return Ok(None) };
    let saved = serde_json::from_value(row.get(6))
        .map_err(|error| RecordError::Unreadable { what: format!("saved settings of fence {epoch}: {error}") })?;
    let fence = Fence {
        case: Case { epoch, migration: row.get(0), databases: row.get(1) },
        on: ServerIdentity { system_identifier: row.get(2), timeline: row.get(3) },
        leads_to: ServerIdentity { system_identifier: row.get(4), timeline: row.get(5) },
        saved,
    };
    let outcome = row.get::<_, Option<&str>>(7).map(Outcome::parse).transpose()?;
    Ok(Some((fence, outcome)))
}

/// What [`end`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The outcome was noted just now; an abort restores the saved settings in the same transaction.
    Now,
    /// It had been noted before; everything that belongs to it has been done.
    Before,
}

/// Whether the fence of `epoch` stands without an outcome; if so, nobody can note one before the transaction ends. If not,
/// the transaction has failed, so that what was sent behind this is not carried out.
pub async fn hold_open(transaction: &impl GenericClient, epoch: Epoch) -> Result<bool, RecordError> {
    let held = transaction
        .query_typed(
            "SELECT 1 / pg_catalog.count(*)
             FROM (SELECT FROM pgcutover.fence WHERE epoch = $1 AND outcome IS NULL FOR UPDATE) AS held",
            &[(&super::epoch_to_sql(epoch), Type::INT8)],
        )
        .await;
    match held {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some(&SqlState::DIVISION_BY_ZERO) => Ok(false),
        Err(source) => Err(RecordError::query("hold a fence row", source)),
    }
}

/// Whether the fence of `epoch` stands without an outcome, at this moment.
pub async fn is_open(client: &impl GenericClient, epoch: Epoch) -> Result<bool, RecordError> {
    Ok(read(client, epoch).await?.is_some_and(|(_, outcome)| outcome.is_none()))
}

/// Notes that the databases of `epoch` are being shut for everybody. Part of the transaction that does it.
pub async fn note_hard(transaction: &impl GenericClient, epoch: Epoch) -> Result<(), RecordError> {
    transaction
        .query_typed(
            "UPDATE pgcutover.fence SET hard = true WHERE epoch = $1",
            &[(&super::epoch_to_sql(epoch), Type::INT8)],
        )
        .await
        .map_err(|source| RecordError::query("note that the databases are shut", source))?;
    Ok(())
}

/// Fences that stand since a decision: their databases have gone and not come back. By epoch.
pub async fn standing(control: &impl GenericClient) -> Result<Vec<Standing>, RecordError> {
    let failed = |source| RecordError::query("read the fences that stand", source);
    if !super::has_table(control, "fence").await? {
        return Ok(Vec::new());
    }
    // A row that an earlier version wrote has none of the later columns, and is left as it is.
    let rows = control
        .query(
            "SELECT epoch, coalesce((to_jsonb(f) ->> 'ajar')::boolean, false),
                    coalesce((to_jsonb(f) ->> 'hard')::boolean, false)
             FROM pgcutover.fence f
             WHERE outcome = 'decided' AND to_jsonb(f) ->> 'returned_by' IS NULL ORDER BY epoch",
            &[],
        )
        .await
        .map_err(failed)?;
    let mut standing = Vec::new();
    for row in rows {
        let Some((fence, _)) = read(control, super::epoch_from_sql(row.get(0))?).await? else { continue };
        standing.push(Standing { fence, ajar: row.get(1), hard: row.get(2) });
    }
    Ok(standing)
}

/// A fence that stands since a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The fence.
    pub fence: Fence,
    /// Whether a rollback has opened it for a while.
    pub ajar: bool,
    /// Whether the databases are shut, and not only read-only by default.
    pub hard: bool,
}

/// Notes that a standing fence is, or is no more, ajar for a rollback. Part of the transaction that opens or shuts.
/// Returns false, and notes nothing, when it does not stand.
pub async fn note_ajar(transaction: &impl GenericClient, epoch: Epoch, ajar: bool) -> Result<bool, RecordError> {
    let noted = transaction
        .execute(
            "UPDATE pgcutover.fence SET ajar = $2
             WHERE epoch = $1 AND outcome = 'decided' AND returned_by IS NULL",
            &[&super::epoch_to_sql(epoch), &ajar],
        )
        .await
        .map_err(|source| RecordError::query("note that a fence is ajar", source))?;
    Ok(noted == 1)
}

/// Notes that the databases of the fence `epoch` have come back by the cutover `by`. Part of the transaction that
/// restores them. Returns false, and notes nothing, when that was noted before.
pub async fn note_returned(transaction: &impl GenericClient, epoch: Epoch, by: Epoch) -> Result<bool, RecordError> {
    let noted = transaction
        .execute(
            "UPDATE pgcutover.fence SET returned_by = $2, ajar = false
             WHERE epoch = $1 AND outcome = 'decided' AND returned_by IS NULL",
            &[&super::epoch_to_sql(epoch), &super::epoch_to_sql(by)],
        )
        .await
        .map_err(|source| RecordError::query("note that databases have come back", source))?;
    Ok(noted == 1)
}

/// Notes the outcome of a fence. Part of the transaction that acts on it.
///
/// A row that is not there is written with the outcome: the transaction that was to insert it may still be in flight
/// on a connection that was lost, and either waits for us and fails, or is waited for here and then ended like any other.
/// Fails when the opposite has been noted: then two parties have read different decisions, which must never happen.
pub async fn end(transaction: &impl GenericClient, fence: &Fence, outcome: Outcome) -> Result<Ended, RecordError> {
    let epoch = super::epoch_to_sql(fence.case.epoch);
    let noted = transaction
        .query_opt(
            "INSERT INTO pgcutover.fence AS f (epoch, migration, databases, system_identifier, timeline, leads_to,
                                               leads_to_timeline, saved, outcome, ended_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, now())
             ON CONFLICT (epoch) DO UPDATE SET outcome = excluded.outcome, ended_at = excluded.ended_at
             WHERE f.outcome IS NULL
             RETURNING 1",
            &[
                &epoch,
                &fence.case.migration,
                &fence.case.databases,
                &fence.on.system_identifier,
                &fence.on.timeline,
                &fence.leads_to.system_identifier,
                &fence.leads_to.timeline,
                &saved_to_json(&fence.saved)?,
                &outcome.as_str(),
            ],
        )
        .await
        .map_err(|source| RecordError::query("note the outcome in the fence row", source))?;
    if noted.is_some() {
        return Ok(Ended::Now);
    }
    match read(transaction, fence.case.epoch).await? {
        Some((_, Some(stands))) if stands == outcome => Ok(Ended::Before),
        Some((_, stands)) => Err(RecordError::Contradiction { epoch: fence.case.epoch, wanted: outcome, stands }),
        None => Err(RecordError::Unreadable { what: format!("fence row {epoch} vanished") }),
    }
}

fn saved_to_json(saved: &[SavedDatabase]) -> Result<serde_json::Value, RecordError> {
    serde_json::to_value(saved).map_err(|error| RecordError::Unreadable { what: format!("saved settings: {error}") })
}
