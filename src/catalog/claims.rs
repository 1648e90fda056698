//! What one server says about who is active: its identity, its fences and its decisions, read in one snapshot.

use tokio_postgres::GenericClient;

use super::RecordError;
use super::decision::Outcome;
use crate::switch::Epoch;

/// Which server this is, whatever its address. Both parts are recorded with every fence and decision.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ServerIdentity {
    /// `pg_control_system().system_identifier`: made by initdb, shared with every physical standby.
    pub system_identifier: String,
    /// The timeline that is written to: one higher after each promotion.
    pub timeline: i32,
}

/// A fence as it is claimed: this server gave its databases up for a cutover that leads elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceClaim {
    /// Number of the cutover.
    pub epoch: Epoch,
    /// Name of the migration.
    pub migration: String,
    /// The databases that are fenced.
    pub databases: Vec<String>,
    /// The server that wrote the row.
    pub on: ServerIdentity,
    /// The server that holds the decision.
    pub leads_to: ServerIdentity,
    /// What became of it, as far as it was noted here.
    pub outcome: Option<Outcome>,
}

/// A decision as it is claimed: this server has become active, or the cutover was called off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecisionClaim {
    /// Number of the cutover.
    pub epoch: Epoch,
    /// Name of the migration.
    pub migration: String,
    /// What was decided.
    pub outcome: Outcome,
    /// The databases that it covers.
    pub databases: Vec<String>,
    /// The server that wrote the row.
    pub on: ServerIdentity,
}

/// Everything that one server claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Who says so; a standby has no timeline of its own to write to and claims nothing that counts.
    pub identity: ServerIdentity,
    /// Whether it is in recovery: it may be behind, so what is missing here may exist.
    pub standby: bool,
    /// Fences, by epoch.
    pub fences: Vec<FenceClaim>,
    /// Decisions, by epoch.
    pub decisions: Vec<DecisionClaim>,
}

/// Identity of the server, and whether it is in recovery.
pub async fn identify(control: &impl GenericClient) -> Result<(ServerIdentity, bool), RecordError> {
    // pg_walfile_name starts with the timeline as eight hexadecimal digits; pg_control_checkpoint lags a promotion.
    let row = control
        .query_one(
            "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system())::text,
                    pg_catalog.pg_is_in_recovery(),
                    CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0
                         ELSE ('x' || substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8))
                              ::bit(32)::integer END",
            &[],
        )
        .await
        .map_err(|source| RecordError::query("identify the server", source))?;
    Ok((ServerIdentity { system_identifier: row.get(0), timeline: row.get(2) }, row.get(1)))
}

/// Reads everything that the server of this control session claims. A server without our schema claims nothing.
pub async fn read(control: &impl GenericClient) -> Result<Claims, RecordError> {
    let (identity, standby) = identify(control).await?;
    let there = super::has_table(control, "fence").await? && super::has_table(control, "decision").await?;
    let mut claims = Claims { identity, standby, fences: Vec::new(), decisions: Vec::new() };
    if !there {
        return Ok(claims);
    }
    // One statement, one snapshot: a fence must not be read without the decision that ended it.
    let rows = control
        .query(
            "SELECT 'fence', epoch, migration, databases, system_identifier, timeline, leads_to, leads_to_timeline,
                    outcome
             FROM pgcutover.fence
             UNION ALL
             SELECT 'decision', epoch, migration, databases, system_identifier, timeline, NULL, NULL, outcome
             FROM pgcutover.decision
             ORDER BY 2",
            &[],
        )
        .await
        .map_err(|source| RecordError::query("read fences and decisions", source))?;
    for row in rows {
        let epoch = super::epoch_from_sql(row.get(1))?;
        let on = ServerIdentity { system_identifier: row.get(4), timeline: row.get(5) };
        let outcome = row.get::<_, Option<&str>>(8).map(Outcome::parse).transpose()?;
        match (row.get::<_, &str>(0), outcome) {
            ("decision", Some(outcome)) => {
                let migration = row.get(2);
                claims.decisions.push(DecisionClaim { epoch, migration, outcome, databases: row.get(3), on });
            }
            _ => claims.fences.push(FenceClaim {
                epoch,
                migration: row.get(2),
                databases: row.get(3),
                on,
                leads_to: ServerIdentity { system_identifier: row.get(6), timeline: row.get(7) },
                outcome,
            }),
        }
    }
    Ok(claims)
}
