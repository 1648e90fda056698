//! What a cutover holds of a migration: nobody else changes it until the verdict is given.

use std::sync::Arc;

use super::Engine;
use super::error::EngineError;
use super::live::{DatabaseLive, Live};
use crate::catalog::decision::Outcome;
use crate::migration::lag::Lag;
use crate::postgres::{ConnectError, Connector, Control};
use crate::switch::Epoch;

/// A migration that is being cut over. It must be given back by [`CutoverLease::finish`]: dropping it leaves the
/// migration in CompletingMigration until the verdict is told to [`Engine::settle_cutover`].
#[derive(Clone, Debug)]
pub struct CutoverLease {
    engine: Arc<Engine>,
    live: Arc<Live>,
}

/// Waiting for the marker is in vain.
#[derive(Debug, thiserror::Error)]
#[error("the stream of database {database} has ended: {reason}")]
pub struct StreamBroken {
    /// The database.
    pub database: String,
    /// Why.
    pub reason: String,
}

impl CutoverLease {
    pub(super) fn new(engine: Arc<Engine>, live: Arc<Live>) -> Self {
        Self { engine, live }
    }

    /// Name of the migration.
    pub fn migration(&self) -> &str {
        self.live.name()
    }

    /// Its databases, by name.
    pub fn databases(&self) -> Vec<String> {
        self.live.databases.iter().map(|database| database.name.clone()).collect()
    }

    /// The largest lag of its databases; none when one is not known.
    pub fn lag(&self) -> Option<Lag> {
        let none = Lag { bytes: 0, seconds: 0.0 };
        self.live.databases.iter().try_fold(none, |worst, database| {
            let lag = database.lag()?;
            Some(Lag { bytes: worst.bytes.max(lag.bytes), seconds: worst.seconds.max(lag.seconds) })
        })
    }

    /// One of its databases.
    pub fn handle(&self, database: &str) -> Option<DatabaseHandle> {
        let live = self.live.database(database)?.clone();
        let (source, target) = self.engine.connectors();
        Some(DatabaseHandle { live, source, target })
    }

    /// Compares the definitions of both servers: what the one that the cutover leads to lacks is an error, and so is a table
    /// that was altered since it was verified, where it has to be.
    pub async fn compare_definitions(&self) -> Result<(), EngineError> {
        Box::pin(self.engine.check_drift(&self.live, self.live.state().direction())).await?;
        Box::pin(self.engine.must_be_as_verified(&self.live)).await
    }

    /// Owners and grants that the server lacks to which the cutover leads, named by database.
    pub async fn lacking_rights(&self) -> Result<Vec<String>, EngineError> {
        self.engine.lacking_rights(&self.live).await
    }

    /// Brings over once more roles with their passwords, memberships and settings, and the settings of the databases.
    /// Returns what an operator should know.
    pub async fn synchronise_rights(&self) -> Result<Vec<String>, EngineError> {
        self.engine.synchronise_rights(&self.live).await
    }

    /// Brings over once more what no stream carries and may have changed since the copy: large objects, unlogged tables and
    /// materialized views; and warms the server that it is brought to. Returns what an operator should know.
    pub async fn synchronise(&self) -> Result<Vec<String>, EngineError> {
        self.engine.synchronise(&self.live).await
    }

    /// Makes publication and slot on the server that the cutover `epoch` leads to, in every database, for the stream that
    /// will carry what is written there back. Returns what an operator should know.
    pub async fn prepare_return(&self, epoch: Epoch) -> Result<Vec<String>, EngineError> {
        self.engine.prepare_return(self.live.name(), epoch).await
    }

    /// Why [`Self::prepare_return`] would make no stream back now; none: it would. Changes nothing.
    pub async fn foresee_return(&self) -> Result<Option<String>, EngineError> {
        self.engine.foresee_return(&self.live).await
    }

    /// Gives the migration back with the verdict.
    pub async fn finish(&self, outcome: Outcome) -> Result<(), EngineError> {
        self.engine.settle_cutover(self.live.name(), outcome).await
    }
}

/// One database of a migration that is being cut over.
#[derive(Clone, Debug)]
pub struct DatabaseHandle {
    live: Arc<DatabaseLive>,
    source: Connector,
    target: Connector,
}

impl DatabaseHandle {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.live.name
    }

    /// Its replication slot on the server that the changes come from.
    pub fn slot(&self) -> String {
        self.live.current().slot
    }

    /// Its publication there.
    pub fn publication(&self) -> String {
        self.live.current().publication
    }

    /// How far the target is behind; none when it is not known.
    pub fn lag(&self) -> Option<Lag> {
        self.live.lag()
    }

    /// A control session in this database on the source.
    pub async fn source_control(&self, purpose: &str) -> Result<Control, ConnectError> {
        self.source.control(&self.live.name, purpose).await
    }

    /// A control session in this database on the target.
    pub async fn target_control(&self, purpose: &str) -> Result<Control, ConnectError> {
        self.target.control(&self.live.name, purpose).await
    }

    /// Resolves once every lane has durably applied the commit that set the marker to `nonce`. Everything that the
    /// source committed before it is then on the target's disk.
    pub async fn wait_marker(&self, nonce: &str) -> Result<(), StreamBroken> {
        let mut applied = self.live.stream.applied.subscribe();
        let mut broken = self.live.broken.subscribe();
        let mut trouble = self.live.stream.trouble.subscribe();
        let failed = |reason: String| StreamBroken { database: self.live.name.clone(), reason };
        // Waiting for values loses nothing when dropped.
        tokio::select! {
            reached = applied.wait_for(|applied| applied.has_reached(nonce)) => {
                reached.map(|_| ()).map_err(|_| failed("it was taken down".to_owned()))
            }
            reason = broken.wait_for(Option::is_some) => {
                let reason = reason.ok().and_then(|reason| reason.clone());
                Err(failed(reason.unwrap_or_else(|| "it was taken down".to_owned())))
            }
            // It cannot begin again while the server that it reads is shut, and clients wait.
            trouble = trouble.wait_for(Option::is_some) => {
                let why = trouble.ok().and_then(|trouble| trouble.clone()).map(|trouble| trouble.last_error);
                Err(failed(format!("it was interrupted, and a pause does not wait for it: {}", why.unwrap_or_default())))
            }
        }
    }
}
