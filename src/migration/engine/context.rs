//! What every worker of one migration needs.

use std::sync::Arc;

use tokio::sync::watch;

use super::error::WorkError;
use super::live::Live;
use super::validation::Servers;
use crate::catalog::claims;
use crate::catalog::migrations::MigrationCatalog;
use crate::catalog::resolve::{self, Verdict};
use crate::config::Config;
use crate::failpoint::Failpoints;
use crate::migration::copy::Workers;
use crate::postgres::{Connector, Control};
use crate::switch::ServerRole;
use crate::telemetry::metrics::Metrics;

pub(super) struct Context {
    pub(super) config: Arc<Config>,
    pub(super) source: Connector,
    pub(super) target: Connector,
    pub(super) catalog: MigrationCatalog,
    pub(super) metrics: Arc<Metrics>,
    pub(super) failpoints: Failpoints,
    pub(super) workers: Workers,
    pub(super) live: Arc<Live>,
    /// Counts up with every change of a state.
    pub(super) changes: watch::Sender<u64>,
}

impl Context {
    /// What the validation asks.
    pub(super) fn servers(&self) -> Servers<'_> {
        Servers { source: &self.source, target: &self.target, config: &self.config }
    }

    /// A control session on the source whose own commits wait for no standby: what we make there is worth nothing on
    /// another server, because the slot is not there.
    pub(super) async fn source_control(&self, database: &str, purpose: &str) -> Result<Control, WorkError> {
        let control = self.source.control(database, purpose).await?;
        control
            .batch_execute("SET synchronous_commit = local")
            .await
            .map_err(|source| WorkError::Query { doing: "preparing a session on the source", source })?;
        Ok(control)
    }

    /// Removes the pgcutover schema of a migrated database. In the control database only our part of it: fences,
    /// decisions and other migrations stay. `parts` are the entries of `pgcutover.part` to strike out.
    pub(super) fn undo_schema(&self, database: &str, ours: &str, parts: &[&str]) -> String {
        if database != self.config.control.database {
            return "DROP SCHEMA IF EXISTS pgcutover CASCADE".to_owned();
        }
        if parts.is_empty() {
            return ours.to_owned();
        }
        let parts = parts.join("', '");
        format!("DO $$ BEGIN {ours}; DELETE FROM pgcutover.part WHERE name IN ('{parts}'); END $$")
    }
}

/// A migration leads away from the server that is in use: what the other one holds is somebody's only copy, or stale.
pub(super) async fn must_lead_away(
    databases: impl Iterator<Item = &'_ str>,
    source: &Control,
    target: &Control,
) -> Result<(), WorkError> {
    let (from, to) = (claims::read(&**source).await?, claims::read(&**target).await?);
    for database in databases {
        let reason = match resolve::resolve(database, Some(&from), Some(&to)) {
            Verdict::Active { server: ServerRole::Source, .. } => continue,
            Verdict::Active { server: ServerRole::Target, epoch } => {
                format!("it is in use on the target since cutover {}", epoch.0)
            }
            Verdict::Undecided { epoch, .. } => format!("cutover {} is not settled", epoch.0),
            Verdict::Refuse { reason } => reason,
        };
        return Err(WorkError::NotTheSource { database: database.to_owned(), reason });
    }
    Ok(())
}
