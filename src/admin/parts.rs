//! What the service drives, as traits: the engine, the cutover, the sessions and the daemon itself.
//!
//! They keep this layer testable without servers, and the same test drives console and HTTP against one fake.

use async_trait::async_trait;

use super::command::{CutoverRequest, FixRequest, ShutdownWhen, VerifyRequest};
use super::error::AdminError;
use super::view::{BlockerView, CheckView, ClientView, CutoverView, MemberView};
use crate::catalog::streams::Direction;
use crate::config::Changes;
use crate::migration::preflight::RuleResult;
use crate::migration::view::{
    CancelReport, FixReport, MigrationName, MigrationSpec, MigrationView, TableView, VerifyReport,
};
use crate::proxy::shadow::{ShadowError, ShadowOrder, ShadowView};

/// The engine's side.
#[async_trait]
pub trait Migrations: Send + Sync {
    /// Accepts a migration; its work begins in the background.
    async fn create(&self, spec: MigrationSpec) -> Result<(), AdminError>;
    /// Every migration, newest first.
    async fn list(&self) -> Result<Vec<MigrationView>, AdminError>;
    /// One migration.
    async fn show(&self, name: &MigrationName) -> Result<MigrationView, AdminError>;
    /// Its tables.
    async fn tables(&self, name: &MigrationName) -> Result<Vec<TableView>, AdminError>;
    /// The answers of its premigration validation; empty while there are none.
    async fn validation(&self, name: &MigrationName) -> Result<Vec<RuleResult>, AdminError>;
    /// Removes what it made.
    async fn cancel(&self, name: &MigrationName) -> Result<CancelReport, AdminError>;
    /// Ends the stream by which a cutover could have been rolled back.
    async fn complete(&self, name: &MigrationName) -> Result<CancelReport, AdminError>;
    /// Compares source and target; comes back when it is done.
    async fn verify(&self, name: &MigrationName, request: VerifyRequest) -> Result<VerifyReport, AdminError>;
    /// What the last verification found; `None`: there was none.
    async fn verification(&self, name: &MigrationName) -> Result<Option<VerifyReport>, AdminError>;
    /// Shows what mends a rule of the validation, and runs it where that was asked for.
    async fn fix(&self, name: &MigrationName, request: FixRequest) -> Result<FixReport, AdminError>;
    /// Goes on after a failure.
    async fn retry(&self, name: &MigrationName) -> Result<(), AdminError>;
}

/// The cutover's side.
#[async_trait]
pub trait Cutovers: Send + Sync {
    /// Runs a cutover to its end. Must not be dropped half way: the service runs it in a task of its own.
    /// Forward is a cutover, reverse a rollback.
    async fn run(
        &self,
        name: &MigrationName,
        direction: Direction,
        request: CutoverRequest,
    ) -> Result<CutoverView, AdminError>;
    /// The cutover that runs, or the last one; `None`: there was none since this process began.
    async fn progress(&self, name: &MigrationName) -> Result<Option<CutoverView>, AdminError>;
    /// Makes a cutover that runs give up, and waits until it has; nothing when none runs or it is decided already.
    async fn stop(&self, name: &MigrationName) -> Result<(), AdminError>;
    /// What would keep sessions from being moved.
    async fn blockers(&self) -> Result<Vec<BlockerView>, AdminError>;
    /// Refuses `order` (`a cutover`), which would not reach the clients that a process is still serving from which this one
    /// has taken over.
    async fn has_every_client(&self, _order: &str) -> Result<(), AdminError> {
        Ok(())
    }
    /// The proxies that take part.
    async fn members(&self) -> Result<Vec<MemberView>, AdminError>;
}

/// The proxy's side.
#[async_trait]
pub trait Clients: Send + Sync {
    /// Every client session.
    fn list(&self) -> Vec<ClientView>;
    /// Server connections of pools that no session has now, each as a session with the number 0 that has nothing else.
    fn idle_servers(&self) -> Vec<ClientView> {
        Vec::new()
    }
    /// RECONNECT: server connections of a database that nobody has now are closed, shared ones when they are given back.
    fn reconnect(&self, _database: &str) {}
    /// Ends the session whose server side has this process id, with 57P01. Returns how many have it: where there are
    /// several, on different servers, none of them is ended.
    fn end(&self, backend_pid: i32) -> usize;
    /// Ends the session with this number, with 57P01. False: there is none.
    fn end_client(&self, id: u64) -> bool;
    /// Ends every session of a database, with 57P01. Returns how many there were.
    fn end_database(&self, database: &str) -> usize;
    /// Begins shadow reads.
    async fn shadow(&self, _order: ShadowOrder) -> Result<ShadowView, ShadowError> {
        Err(ShadowError::NoProxy)
    }
    /// Ends those of a migration.
    async fn end_shadow(&self, migration: &str, _why: &'static str) -> Result<ShadowView, ShadowError> {
        Err(ShadowError::IsOff(migration.to_owned()))
    }
    /// What they have found, running or last.
    fn shadow_of(&self, _migration: &str) -> Option<ShadowView> {
        None
    }
}

/// The daemon's side.
#[async_trait]
pub trait Daemon: Send + Sync {
    /// Connects to both servers and looks at them.
    async fn check(&self) -> CheckView;
    /// Reads the configuration again and applies what can change live.
    fn reload(&self) -> Result<Changes, AdminError>;
    /// Changes one setting (`section.key`) until the next reload.
    fn set(&self, key: &str, value: &str) -> Result<(), AdminError>;
    /// Begins an orderly shutdown.
    fn shutdown(&self, when: ShutdownWhen);
}
