//! Decisions: which of two servers a cutover has made active, or that it has been called off.
//!
//! A row `(epoch, 'decided' | 'aborted')` is inserted once, in the control database of the server that the cutover
//! leads to, and never changed. The unique key is the whole protocol: whoever wants to decide or to abort inserts, and
//! then reads what stands there. An insert waits for one in flight with the same key, so two parties that meet the same
//! cutover read the same outcome.

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use super::RecordError;
use super::claims::ServerIdentity;
use crate::switch::Epoch;

/// Tables of a control database. Idempotent.
pub(super) const DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.decision (
    epoch             bigint PRIMARY KEY,
    outcome           text NOT NULL CHECK (outcome IN ('decided', 'aborted')),
    migration         text NOT NULL,
    databases         text[] NOT NULL,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    made_at           timestamptz NOT NULL DEFAULT now()
);
";

/// Tables of a migrated database on the target: where in its history the switch lies. The reverse stream discards
/// everything up to and including the commit of this row. Idempotent.
pub(super) const BOUNDARY_DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.boundary (
    epoch   bigint PRIMARY KEY,
    made_at timestamptz NOT NULL DEFAULT now()
);
";

/// What became of a cutover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The server that it leads to is active. Nothing takes this back.
    Decided,
    /// It was called off; the server it started from stays active.
    Aborted,
}

impl Outcome {
    /// As it stands in the catalogue.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Decided => "decided",
            Self::Aborted => "aborted",
        }
    }

    pub(super) fn parse(text: &str) -> Result<Self, RecordError> {
        match text {
            "decided" => Ok(Self::Decided),
            "aborted" => Ok(Self::Aborted),
            other => Err(RecordError::Unreadable { what: format!("outcome {other:?}") }),
        }
    }
}

/// What the decision is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Number of the cutover.
    pub epoch: Epoch,
    /// Name of the migration.
    pub migration: String,
    /// The databases that switch together.
    pub databases: Vec<String>,
}

/// Proposes `wanted` for `case`, on the server that the cutover leads to, and returns what stands there afterwards:
/// the first proposal that was committed. `identity` is that server's own.
///
/// Waits for another proposal in flight. When this fails after the statement was sent, the outcome is in doubt: ask
/// again on a new connection.
pub async fn propose(
    control: &impl GenericClient,
    case: &Case,
    wanted: Outcome,
    identity: &ServerIdentity,
) -> Result<Outcome, RecordError> {
    let epoch = super::epoch_to_sql(case.epoch);
    // One round trip. The answer ends with ReadyForQuery, which the server sends when the row is committed.
    let written = control
        .query_typed(
            "INSERT INTO pgcutover.decision (epoch, outcome, migration, databases, system_identifier, timeline)
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (epoch) DO NOTHING RETURNING outcome",
            &[
                (&epoch, Type::INT8),
                (&wanted.as_str(), Type::TEXT),
                (&case.migration, Type::TEXT),
                (&case.databases, Type::TEXT_ARRAY),
                (&identity.system_identifier, Type::TEXT),
                (&identity.timeline, Type::INT4),
            ],
        )
        .await
        .map_err(|source| RecordError::query("write a decision down", source))?;
    if let Some(row) = written.first() {
        return Outcome::parse(row.get(0));
    }
    let read = read(control, case.epoch).await?;
    read.ok_or_else(|| RecordError::Unreadable { what: format!("no decision {epoch} right after it was written") })
}

/// What stands there for `epoch`, if anything is committed.
pub async fn read(control: &impl GenericClient, epoch: Epoch) -> Result<Option<Outcome>, RecordError> {
    let row = control
        .query_opt("SELECT outcome FROM pgcutover.decision WHERE epoch = $1", &[&super::epoch_to_sql(epoch)])
        .await
        .map_err(|source| RecordError::query("read a decision", source))?;
    row.map(|row| Outcome::parse(row.get(0))).transpose()
}

/// Marks the place of the switch in the history of one target database. Written once for each epoch. It is durable with
/// the decision at the latest, which follows it in the same server's WAL: a session whose `synchronous_commit` is off need
/// not wait for it.
pub async fn write_boundary(client: &impl GenericClient, epoch: Epoch) -> Result<(), RecordError> {
    client
        .query_typed(
            "INSERT INTO pgcutover.boundary (epoch) VALUES ($1) ON CONFLICT (epoch) DO UPDATE SET made_at = now()",
            &[(&super::epoch_to_sql(epoch), Type::INT8)],
        )
        .await
        .map_err(|source| RecordError::query("write the boundary row", source))?;
    Ok(())
}
