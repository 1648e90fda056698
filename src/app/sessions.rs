//! The proxy's sessions as the cutover and operators see them.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;

use crate::admin::parts::Clients;
use crate::admin::view::ClientView;
use crate::cutover::parts;
use crate::proxy::{self, MoveOrder, SessionState, SessionView};
use crate::sqlstate;
use crate::switch::{Epoch, ServerRole};

/// See the module. One registry behind two traits.
pub(super) struct SessionDesk(pub(super) Arc<proxy::Sessions>);

#[async_trait]
impl parts::Sessions for SessionDesk {
    fn backend_pids(&self, database: &str) -> Vec<i32> {
        self.0.backend_pids(database)
    }

    fn stragglers(&self, database: &str) -> Vec<parts::Straggler> {
        let straggler = |view: SessionView| parts::Straggler { session: view.id, pid: view.backend_pid };
        self.0.stragglers(database).into_iter().map(straggler).collect()
    }

    async fn prepare_moves(
        &self,
        databases: &[String],
        to: ServerRole,
        epoch: Epoch,
        deadline: Instant,
    ) -> Vec<parts::MoveReport> {
        let reports = self.0.prepare_moves(databases, MoveOrder { to, epoch }, deadline).await;
        reports.into_iter().map(report).collect()
    }

    async fn settle_moves(&self, databases: &[String], deadline: Instant) -> Vec<parts::MoveReport> {
        self.0.settle_moves(databases, deadline).await.into_iter().map(report).collect()
    }

    fn discard_moves(&self, databases: &[String]) {
        self.0.discard_moves(databases);
    }

    fn end(&self, sessions: &[u64], sqlstate: &'static str, message: &str) {
        self.0.end(sessions, sqlstate, message);
    }
}

fn report(report: proxy::MoveReport) -> parts::MoveReport {
    let view = report.session;
    let outcome = match report.outcome {
        proxy::MoveOutcome::Ready => parts::MoveOutcome::Ready,
        proxy::MoveOutcome::Busy => parts::MoveOutcome::Busy,
        proxy::MoveOutcome::Blocked(blockers) => {
            parts::MoveOutcome::Blocked(blockers.iter().map(|blocker| named(&view, blocker)).collect())
        }
        proxy::MoveOutcome::Failed(reason) => parts::MoveOutcome::Failed(named(&view, &reason)),
    };
    parts::MoveReport { session: view.id, outcome }
}

/// The operator finds the session by its process id and by what its client calls itself.
fn named(view: &SessionView, reason: &dyn std::fmt::Display) -> String {
    let pid = view.backend_pid.map_or("unknown".to_owned(), |pid| pid.to_string());
    format!("pid {pid} ({:?}, user {:?}, database {:?}): {reason}", view.application_name, view.user, view.database)
}

impl Clients for SessionDesk {
    fn list(&self) -> Vec<ClientView> {
        let now = SystemTime::now();
        self.0.list().into_iter().map(|view| client(view, now)).collect()
    }

    fn end(&self, backend_pid: i32) -> bool {
        let ids: Vec<u64> =
            self.0.list().iter().filter(|view| view.backend_pid == Some(backend_pid)).map(|view| view.id).collect();
        let message = "terminating connection due to administrator command";
        self.0.end(&ids, sqlstate::ADMIN_SHUTDOWN, message) > 0
    }
}

fn client(view: SessionView, now: SystemTime) -> ClientView {
    let connected = now.checked_sub(view.connected_for).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let state = match view.state {
        SessionState::Login => "login",
        SessionState::Idle => "idle",
        SessionState::Active => "active",
        SessionState::Held => "waiting",
        SessionState::Orphan => "orphan",
        SessionState::Replication => "replication",
    };
    ClientView {
        id: view.id,
        user: view.user,
        database: view.database,
        client: view.client_address,
        tls: Some(view.tls),
        application_name: Some(view.application_name),
        server: view.server,
        backend_pid: view.backend_pid,
        state: state.to_owned(),
        in_transaction: view.in_transaction,
        connected_at: connected.map(|at| at.as_secs_f64()),
        since_seconds: Some(view.for_time.as_secs_f64()),
        blockers: view.blockers.iter().map(ToString::to_string).collect(),
    }
}
