//! The coordinator as operators see it: orders and answers in their words.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;

use crate::admin::command::CutoverRequest;
use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::parts::{Clients, Cutovers, Migrations};
use crate::admin::view::{BlockerView, ClientView, CutoverView, IntentionView, MemberView, PhasesView, TimedStepView};
use crate::catalog::streams::Direction;
use crate::config::Config;
use crate::cutover::CutoverError;
use crate::cutover::coordinator::{Coordinator, CutoverOptions, CutoverState};
use crate::cutover::forecast::Intention;
use crate::cutover::hard_fence::Obstacle;
use crate::cutover::report::{CutoverReport, TimedStep};
use crate::migration::view::{MigrationName, MigrationView};
use crate::postgres::InstanceId;
use crate::proxy::takeover::{Predecessor, Rendezvous};

/// For a cutover that was told to give up.
const STOP_BOUND: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct CutoverDesk {
    pub(super) coordinator: Arc<Coordinator>,
    pub(super) config: Arc<ArcSwap<Config>>,
    pub(super) migrations: Arc<dyn Migrations>,
    pub(super) clients: Arc<dyn Clients>,
    /// Where those are found that this process has taken over from.
    pub(super) rendezvous: Option<Rendezvous>,
    pub(super) instance: InstanceId,
}

#[async_trait]
impl Cutovers for CutoverDesk {
    async fn run(
        &self,
        name: &MigrationName,
        direction: Direction,
        request: CutoverRequest,
    ) -> Result<CutoverView, AdminError> {
        // Says "no such migration" before anything else does.
        self.migrations.show(name).await?;
        self.has_every_client("a cutover").await?;
        let (config, defaults) = (self.config.load(), self.coordinator.default_options());
        let options = CutoverOptions {
            direction,
            dry_run: request.dry_run,
            max_pause: request.max_pause.unwrap_or(config.cutover.max_pause),
            drain_timeout: request.drain_timeout.unwrap_or(config.cutover.drain_timeout),
            stragglers: request.stragglers.unwrap_or(config.cutover.stragglers),
            reads: config.cutover.reads,
            throttle_writes: config.cutover.throttle_writes,
            throttle_for: config.cutover.throttle_for,
            force: request.force,
            max_lag_at_start_bytes: config.cutover.max_lag_at_start_bytes,
            ..defaults
        };
        let report = self.coordinator.run(name.as_str(), options).await.map_err(|error| refused(&error))?;
        Ok(view(&report))
    }

    async fn progress(&self, name: &MigrationName) -> Result<Option<CutoverView>, AdminError> {
        Ok(self.coordinator.progress(name.as_str()).map(|state| match state {
            CutoverState::Running(progress) => CutoverView {
                direction: Some(progress.direction),
                outcome: "running".to_owned(),
                phase: word(progress.phase),
                pause_ms: progress.paused_ms.unwrap_or(0),
                epoch: Some(progress.epoch).filter(|epoch| *epoch > 0),
                ..CutoverView::default()
            },
            CutoverState::Ended(report) => view(&report),
        }))
    }

    async fn stop(&self, name: &MigrationName) -> Result<(), AdminError> {
        if !self.coordinator.cancel(name.as_str()) {
            return Ok(());
        }
        let over = async {
            while matches!(self.coordinator.progress(name.as_str()), Some(CutoverState::Running(_))) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let late = |_| AdminError::new(ErrorKind::Conflict, format!("the cutover of {name} has not ended yet"));
        tokio::time::timeout(STOP_BOUND, over).await.map_err(late)
    }

    async fn blockers(&self) -> Result<Vec<BlockerView>, AdminError> {
        let sessions = self.clients.list();
        let mut blockers: Vec<BlockerView> = sessions.iter().flat_map(of_session).collect();
        let obstacles = self.coordinator.long_work().await.map_err(|error| refused(&error))?;
        // A session of ours that is long at work is shown once, by what the server says of it.
        blockers.retain(|blocker| !obstacles.iter().any(|obstacle| Some(obstacle.pid) == blocker.pid));
        blockers.extend(obstacles.into_iter().map(|obstacle| {
            let is_its = |one: &&ClientView| one.backend_pid == Some(obstacle.pid) && one.database == obstacle.database;
            let session = sessions.iter().find(is_its);
            of_obstacle(obstacle, session)
        }));
        Ok(blockers)
    }

    async fn has_every_client(&self, order: &str) -> Result<(), AdminError> {
        let Some(one) = self.predecessors().await.into_iter().next() else { return Ok(()) };
        let message = format!(
            "process {}, which this one has taken over from, still serves {} clients: {order} would not include them",
            one.pid, one.clients
        );
        let hint = "wait until they have gone, or end that process (SIGTERM)";
        Err(AdminError::new(ErrorKind::Conflict, message).hint(hint))
    }

    async fn members(&self) -> Result<Vec<MemberView>, AdminError> {
        let mut members = vec![MemberView {
            instance: self.instance.as_str().to_owned(),
            address: self.config.load().listen.address.map(|address| address.to_string()),
            role: "leader".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }];
        // One proxy is supported; beside it there may be processes that it has taken over from.
        members.extend(self.predecessors().await.into_iter().map(|one| MemberView {
            instance: format!("process {}, {} clients", one.pid, one.clients),
            address: None,
            role: "retired".to_owned(),
            version: String::new(),
        }));
        Ok(members)
    }
}

impl CutoverDesk {
    async fn predecessors(&self) -> Vec<Predecessor> {
        match &self.rendezvous {
            Some(rendezvous) => rendezvous.predecessors().await,
            None => Vec::new(),
        }
    }

    /// Migrations that were created with "cut over when ready" and are ready now.
    pub(super) async fn due(&self) -> Vec<MigrationView> {
        let due = |migration: &MigrationView| {
            migration.cutover_when_ready && migration.substate == "WaitingForCutoverTrigger"
        };
        match self.migrations.list().await {
            Ok(list) => list.into_iter().filter(due).collect(),
            Err(_) => Vec::new(),
        }
    }
}

fn phases(report: &CutoverReport) -> PhasesView {
    let phases = report.phases_ms;
    PhasesView {
        prepare: phases.prepare,
        pause: phases.pause,
        drain: phases.drain,
        decide: phases.decide,
        switch: phases.switch,
    }
}

fn steps(steps: &[TimedStep]) -> Vec<TimedStepView> {
    steps.iter().map(|one| TimedStepView { step: one.step.to_owned(), ms: one.ms }).collect()
}

fn intention(one: &Intention) -> IntentionView {
    IntentionView {
        action: word(one.action).unwrap_or_default(),
        database: one.database.clone(),
        detail: one.detail.clone(),
    }
}

fn view(report: &CutoverReport) -> CutoverView {
    CutoverView {
        direction: Some(report.direction),
        outcome: word(report.outcome).unwrap_or_default(),
        reason: report.reason.clone(),
        hint: report.hint.map(str::to_owned),
        forceable: report.forceable,
        forced: report.forced.clone(),
        pause_ms: report.pause_ms,
        phases_ms: phases(report),
        prepare_steps: steps(&report.prepare_steps),
        pause_steps: steps(&report.pause_steps),
        sessions_held: report.sessions_held,
        longest_hold_ms: report.longest_hold_ms,
        would: report.would.iter().map(intention).collect(),
        sessions_moved: report.sessions_moved,
        sessions_ended: report.sessions_ended,
        epoch: Some(report.epoch).filter(|epoch| *epoch > 0),
        phase: None,
        blockers: report.blockers.iter().map(ToString::to_string).collect(),
        notes: report.notes.clone(),
    }
}

/// The word that serde writes for a unit variant.
fn word(value: impl serde::Serialize) -> Option<String> {
    serde_json::to_value(value).ok()?.as_str().map(str::to_owned)
}

/// A cutover that was not begun.
fn refused(error: &CutoverError) -> AdminError {
    let kind = match error {
        CutoverError::Connect(_) | CutoverError::Stopped(_) => ErrorKind::Unavailable,
        CutoverError::Guardrail(_)
        | CutoverError::Forceable(_)
        | CutoverError::Definitions(_)
        | CutoverError::Engine(_)
        | CutoverError::Blocked { .. }
        | CutoverError::Sessions { .. }
        | CutoverError::MaxPause(_) => ErrorKind::Conflict,
        CutoverError::Query { .. }
        | CutoverError::Record(_)
        | CutoverError::Catalog(_)
        | CutoverError::Sequences(_)
        | CutoverError::Unstreamed(_)
        | CutoverError::Late(_)
        | CutoverError::Synchronise(_)
        | CutoverError::Failpoint(_)
        | CutoverError::Unexpected(_) => ErrorKind::Failed,
    };
    let refused = AdminError::new(kind, error.to_string());
    match error.hint() {
        Some(hint) => refused.hint(hint),
        None => refused,
    }
}

/// `session` is the one of ours whose backend it is.
fn of_obstacle(obstacle: Obstacle, session: Option<&ClientView>) -> BlockerView {
    BlockerView {
        reason: format!("{} for {:.1}s", obstacle.doing, obstacle.age_seconds),
        database: obstacle.database,
        pid: Some(obstacle.pid),
        user: session.map(|session| session.user.clone()),
        application_name: Some(obstacle.application_name),
        client: session.map(|session| session.client.clone()),
        code: "long_transaction".to_owned(),
        hint: Some("let it end, or end the session".to_owned()),
    }
}

fn of_session(client: &ClientView) -> Vec<BlockerView> {
    let blocker = |reason: &String| BlockerView {
        database: client.database.clone(),
        pid: client.backend_pid,
        user: Some(client.user.clone()),
        application_name: client.application_name.clone(),
        client: Some(client.client.clone()),
        code: "session_state".to_owned(),
        reason: reason.clone(),
        hint: Some("let the client give it up, or end the session with KILL".to_owned()),
    };
    client.blockers.iter().map(blocker).collect()
}
