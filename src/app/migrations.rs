//! The engine as the cutover and operators see it.

use std::sync::Arc;

use async_trait::async_trait;

use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::parts::Migrations;
use crate::catalog::decision::Outcome;
use crate::config::Config;
use crate::cutover::parts;
use crate::failpoint::Failpoints;
use crate::migration::preflight::RuleResult;
use crate::migration::view::{CancelReport, MigrationName, MigrationSpec, MigrationView, TableView};
use crate::postgres::Connector;
use crate::shutdown::Tasks;
use crate::telemetry::metrics::Metrics;

/// See the module.
pub(super) struct EngineDesk {}

impl EngineDesk {
    pub(super) fn start(
        _config: &Arc<Config>,
        _source: &Connector,
        _target: &Connector,
        _metrics: &Arc<Metrics>,
        _tasks: &Tasks,
        _failpoints: &Failpoints,
    ) -> Self {
        Self {}
    }
}

fn absent() -> AdminError {
    AdminError::new(ErrorKind::Unsupported, "this build has no migration engine")
}

#[async_trait]
impl Migrations for EngineDesk {
    async fn create(&self, _spec: MigrationSpec) -> Result<(), AdminError> {
        Err(absent())
    }
    async fn list(&self) -> Result<Vec<MigrationView>, AdminError> {
        Ok(Vec::new())
    }
    async fn show(&self, _name: &MigrationName) -> Result<MigrationView, AdminError> {
        Err(absent())
    }
    async fn tables(&self, _name: &MigrationName) -> Result<Vec<TableView>, AdminError> {
        Err(absent())
    }
    async fn validation(&self, _name: &MigrationName) -> Result<Vec<RuleResult>, AdminError> {
        Err(absent())
    }
    async fn cancel(&self, _name: &MigrationName) -> Result<CancelReport, AdminError> {
        Err(absent())
    }
    async fn retry(&self, _name: &MigrationName) -> Result<(), AdminError> {
        Err(absent())
    }
}

#[async_trait]
impl parts::Engine for EngineDesk {
    async fn databases(&self, _migration: &str) -> Result<Vec<String>, String> {
        Err(absent().message)
    }
    async fn begin_cutover(&self, _migration: &str) -> Result<Arc<dyn parts::Lease>, String> {
        Err(absent().message)
    }
    async fn cutover_settled(&self, _migration: &str, _outcome: Outcome) -> Result<(), String> {
        Ok(())
    }
}
