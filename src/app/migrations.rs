//! The engine as the cutover and operators see it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::admin::command::{FixRequest, VerifyRequest};
use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::parts::Migrations;
use crate::catalog::decision::Outcome;
use crate::catalog::migrations::CatalogError;
use crate::catalog::streams::Direction;
use crate::cutover::parts::{self, Replication};
use crate::migration::engine::{Applied, CutoverLease, DatabaseHandle, Engine, EngineError, NotHere};
use crate::migration::preflight::RuleResult;
use crate::migration::view::{
    CancelReport, FixReport, MigrationName, MigrationSpec, MigrationView, TableView, VerifyReport,
};
use crate::shutdown::Tasks;
use crate::switch::Epoch;

/// After the start of the process the engine needs a moment to find its target. Who asks waits until it has tried, but
/// not longer.
const TIME_TO_BEGIN: Duration = Duration::from_secs(30);

/// After the start of the process what has failed may succeed the next time, a few seconds later; and a process that
/// was taken over from may still be giving its engine up.
const TIME_TO_TRY_AGAIN: Duration = Duration::from_secs(10);

/// What the engine is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// To show what it knows.
    ToShow,
    /// To do something.
    ToDo,
}

/// See the module.
pub(super) struct EngineDesk {
    engine: Arc<Engine>,
    began: tokio::time::Instant,
    /// Who waits for the engine stops waiting when these are told to stop.
    tasks: Tasks,
}

impl EngineDesk {
    /// `engine` has just been started.
    pub(super) fn new(engine: Arc<Engine>, tasks: Tasks) -> Self {
        Self { engine, began: tokio::time::Instant::now(), tasks }
    }

    /// The engine, once it runs here, or nothing is to be waited for.
    async fn engine(&self, wanted: Wanted) -> &Arc<Engine> {
        while let Some(why) = self.engine.not_here() {
            tokio::select! {
                // Nothing is lost by dropping any of these.
                () = self.engine.no_longer(why) => {}
                () = tokio::time::sleep_until(self.began + patience(why, wanted)) => break,
                () = self.tasks.stopping() => break,
            }
        }
        &self.engine
    }
}

/// Until when, from the start of the process, an engine is waited for that does not run for this reason.
fn patience(why: NotHere, wanted: Wanted) -> Duration {
    match (why, wanted) {
        (NotHere::Untried, _) => TIME_TO_BEGIN,
        (NotHere::Another, _) | (NotHere::Away, Wanted::ToDo) => TIME_TO_TRY_AGAIN,
        (NotHere::Away, Wanted::ToShow) => Duration::ZERO,
    }
}

#[async_trait]
impl Migrations for EngineDesk {
    async fn create(&self, spec: MigrationSpec) -> Result<(), AdminError> {
        self.engine(Wanted::ToDo).await.create(spec).await.map(|_view| ()).map_err(|error| refused(&error))
    }

    async fn list(&self) -> Result<Vec<MigrationView>, AdminError> {
        self.engine(Wanted::ToShow).await.list().map_err(|error| refused(&error))
    }

    async fn show(&self, name: &MigrationName) -> Result<MigrationView, AdminError> {
        self.engine(Wanted::ToShow).await.show(name.as_str()).map_err(|error| refused(&error))
    }

    async fn tables(&self, name: &MigrationName) -> Result<Vec<TableView>, AdminError> {
        self.engine(Wanted::ToShow).await.tables(name.as_str()).map_err(|error| refused(&error))
    }

    async fn validation(&self, name: &MigrationName) -> Result<Vec<RuleResult>, AdminError> {
        let Some(rules) = self.show(name).await?.validation else { return Ok(Vec::new()) };
        serde_json::from_value(rules).map_err(|error| {
            AdminError::new(ErrorKind::Failed, format!("the validation on record is not understood: {error}"))
        })
    }

    async fn cancel(&self, name: &MigrationName) -> Result<CancelReport, AdminError> {
        self.engine(Wanted::ToDo).await.cancel(name.as_str()).await.map_err(|error| refused(&error))
    }

    async fn complete(&self, name: &MigrationName) -> Result<CancelReport, AdminError> {
        self.engine(Wanted::ToDo).await.complete(name.as_str()).await.map_err(|error| refused(&error))
    }

    async fn verify(&self, name: &MigrationName, request: VerifyRequest) -> Result<VerifyReport, AdminError> {
        let engine = self.engine(Wanted::ToDo).await;
        let report =
            if request.repair { engine.repair(name.as_str()).await } else { engine.verify(name.as_str()).await };
        report.map_err(|error| refused(&error))
    }

    async fn verification(&self, name: &MigrationName) -> Result<Option<VerifyReport>, AdminError> {
        self.engine(Wanted::ToShow).await.verification(name.as_str()).await.map_err(|error| refused(&error))
    }

    async fn fix(&self, name: &MigrationName, request: FixRequest) -> Result<FixReport, AdminError> {
        let apply = if request.apply { Applied::Now } else { Applied::No };
        self.engine(Wanted::ToDo).await.fix(name.as_str(), &request.rule, apply).await.map_err(|error| refused(&error))
    }

    async fn retry(&self, name: &MigrationName) -> Result<(), AdminError> {
        self.engine(Wanted::ToDo).await.retry(name.as_str()).await.map_err(|error| refused(&error))
    }
}

fn refused(error: &EngineError) -> AdminError {
    let (kind, hint) = match error {
        EngineError::NotFound(_) => (ErrorKind::NotFound, Some("`migration list` shows those that exist")),
        EngineError::BadRequest(_) => (ErrorKind::Invalid, None),
        EngineError::Catalog(CatalogError::Exists(_)) => {
            (ErrorKind::Conflict, Some("choose another name; names are never used twice on one target"))
        }
        EngineError::Rejected(_)
        | EngineError::Drifted { .. }
        | EngineError::Return(_)
        | EngineError::Invalid(_)
        | EngineError::Fix { .. }
        | EngineError::Unverified { .. }
        | EngineError::Altered { .. } => (ErrorKind::Conflict, None),
        EngineError::Unavailable(_)
        | EngineError::Connect(_)
        | EngineError::Catalog(_)
        | EngineError::Databases(_)
        | EngineError::Roles(_)
        | EngineError::Schema(_)
        | EngineError::Verify { .. }
        | EngineError::Unstreamed { .. }
        | EngineError::Drift { .. }
        | EngineError::Locked { .. }
        | EngineError::Late { .. } => (ErrorKind::Unavailable, None),
    };
    let refused = AdminError::from_chain(kind, error);
    match hint {
        Some(hint) => refused.hint(hint),
        None => refused,
    }
}

#[async_trait]
impl parts::Engine for EngineDesk {
    async fn begin_cutover(&self, migration: &str, direction: Direction) -> Result<Arc<dyn parts::Lease>, String> {
        let lease = match direction {
            Direction::Forward => self.engine.begin_cutover(migration).await,
            Direction::Reverse => self.engine.begin_rollback(migration).await,
        };
        let lease = lease.map_err(|error| refused(&error).message)?;
        Ok(Arc::new(Lease(Mutex::new(Some(lease)))))
    }

    async fn cutover_settled(&self, migration: &str, outcome: Outcome) -> Result<(), String> {
        self.engine.settle_cutover(migration, outcome).await.map_err(|error| refused(&error).message)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.engine.changes()
    }
}

/// The engine's lease is used up when it is finished; none after that.
struct Lease(Mutex<Option<CutoverLease>>);

impl Lease {
    fn with<T>(&self, use_it: impl FnOnce(&CutoverLease) -> T) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(use_it)
    }

    fn handle(&self, database: &str) -> Option<DatabaseHandle> {
        self.with(|lease| lease.handle(database)).flatten()
    }
}

#[async_trait]
impl parts::Lease for Lease {
    fn databases(&self) -> Vec<String> {
        self.with(CutoverLease::databases).unwrap_or_default()
    }

    fn lag_bytes(&self) -> Option<u64> {
        self.with(CutoverLease::lag).flatten().map(|lag| lag.bytes)
    }

    async fn compare_definitions(&self) -> Result<(), String> {
        let Some(lease) = self.with(CutoverLease::clone) else { return Ok(()) };
        lease.compare_definitions().await.map_err(|error| refused(&error).message)
    }

    async fn lacking_rights(&self) -> Result<Vec<String>, String> {
        let Some(lease) = self.with(CutoverLease::clone) else { return Ok(Vec::new()) };
        lease.lacking_rights().await.map_err(|error| refused(&error).message)
    }

    async fn synchronise_rights(&self) -> Result<Vec<String>, String> {
        let Some(lease) = self.with(CutoverLease::clone) else { return Ok(Vec::new()) };
        lease.synchronise_rights().await.map_err(|error| refused(&error).message)
    }

    async fn synchronise(&self) -> Result<Vec<String>, String> {
        let Some(lease) = self.with(CutoverLease::clone) else { return Ok(Vec::new()) };
        lease.synchronise().await.map_err(|error| refused(&error).message)
    }

    async fn prepare_return(&self, epoch: Epoch) -> Result<Vec<String>, String> {
        let Some(lease) = self.with(CutoverLease::clone) else { return Ok(Vec::new()) };
        lease.prepare_return(epoch).await.map_err(|error| refused(&error).message)
    }

    async fn foresee_return(&self) -> Result<Option<String>, String> {
        let Some(lease) = self.with(CutoverLease::clone) else { return Ok(None) };
        lease.foresee_return().await.map_err(|error| refused(&error).message)
    }

    fn replication(&self, database: &str) -> Replication {
        let names = self.handle(database).map(|handle| (handle.slot(), handle.publication()));
        let (slot, publication) = names.unwrap_or_default();
        Replication { slot, publication }
    }

    async fn wait_marker(&self, database: &str, nonce: &str) -> Result<(), String> {
        let handle = self.handle(database).ok_or_else(|| format!("database {database:?} is not leased"))?;
        handle.wait_marker(nonce).await.map_err(|error| error.to_string())
    }

    async fn finish(&self, outcome: Outcome) -> Result<(), String> {
        let lease = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(lease) = lease else { return Ok(()) };
        lease.finish(outcome).await.map_err(|error| refused(&error).message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_looks_does_not_wait_for_what_is_known_to_be_away() {
        assert_eq!(patience(NotHere::Away, Wanted::ToShow), Duration::ZERO);
        assert_eq!(patience(NotHere::Another, Wanted::ToShow), TIME_TO_TRY_AGAIN);
        assert_eq!(patience(NotHere::Away, Wanted::ToDo), TIME_TO_TRY_AGAIN);
        assert_eq!(patience(NotHere::Untried, Wanted::ToShow), TIME_TO_BEGIN);
    }
}
