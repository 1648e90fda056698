//! The proxy's sessions as operators see them.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::admin::parts::Clients;
use crate::admin::view::ClientView;
use crate::proxy::shadow::{ShadowError, ShadowOrder, ShadowView};
use crate::proxy::{self, MoveState, PooledBackend, SessionState, SessionView};
use crate::sqlstate;

/// See the module.
pub(super) struct SessionDesk(pub(super) Arc<proxy::Sessions>);

#[async_trait::async_trait]
impl Clients for SessionDesk {
    fn list(&self) -> Vec<ClientView> {
        let now = SystemTime::now();
        let mut clients: Vec<_> = self.0.list().into_iter().map(|view| client(view, now)).collect();
        for client in clients.iter_mut().filter(|client| client.pooled) {
            let backend = client.server.zip(client.backend_pid);
            client.close_needed = backend.is_some_and(|(server, pid)| self.0.is_retired(server, pid));
        }
        clients
    }

    fn idle_servers(&self) -> Vec<ClientView> {
        let idle = self.0.idle_backends().into_iter();
        let view = |backend: PooledBackend| ClientView {
            user: backend.user,
            database: backend.database,
            server: Some(backend.server),
            backend_pid: Some(backend.pid),
            state: "idle".to_owned(),
            pooled: true,
            close_needed: self.0.is_retired(backend.server, backend.pid),
            ..ClientView::default()
        };
        idle.map(view).collect()
    }

    fn reconnect(&self, database: &str) {
        self.0.retire(database);
    }

    fn end(&self, backend_pid: i32) -> usize {
        let ids: Vec<u64> =
            self.0.list().iter().filter(|view| view.backend_pid == Some(backend_pid)).map(|view| view.id).collect();
        // On each server it is another process: which of them is meant is not known.
        if let [one] = ids[..] { self.end_all(&[one]) } else { ids.len() }
    }

    fn end_client(&self, id: u64) -> bool {
        self.end_all(&[id]) > 0
    }

    fn end_database(&self, database: &str) -> usize {
        let ids: Vec<u64> = self.0.list().iter().filter(|view| view.database == database).map(|view| view.id).collect();
        self.end_all(&ids)
    }

    async fn shadow(&self, order: ShadowOrder) -> Result<ShadowView, ShadowError> {
        self.0.shadow_reads().ok_or(ShadowError::NoProxy)?.start(order).await
    }

    async fn end_shadow(&self, migration: &str, why: &'static str) -> Result<ShadowView, ShadowError> {
        self.0.shadow_reads().ok_or(ShadowError::NoProxy)?.stop(migration, why).await
    }

    fn shadow_of(&self, migration: &str) -> Option<ShadowView> {
        self.0.shadow_reads()?.view(migration)
    }
}

impl SessionDesk {
    fn end_all(&self, ids: &[u64]) -> usize {
        self.0.end(ids, sqlstate::ADMIN_SHUTDOWN, "terminating connection due to administrator command")
    }
}

fn client(view: SessionView, now: SystemTime) -> ClientView {
    let connected = now.checked_sub(view.connected_for).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let state = match view.state {
        SessionState::Login => "login",
        SessionState::Idle => "idle",
        SessionState::Active | SessionState::Reading => "active",
        SessionState::Held | SessionState::Waiting => "waiting",
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
        held: view.state == SessionState::Held,
        in_transaction: view.in_transaction,
        connected_at: connected.map(|at| at.as_secs_f64()),
        since_seconds: Some(view.for_time.as_secs_f64()),
        blockers: view.blockers.iter().map(ToString::to_string).collect(),
        prepared: view.moving == MoveState::Prepared,
        // Of a session with a connection of its own, known to the service alone.
        close_needed: false,
        pooled: view.pooled,
        pinned: view.pinned,
    }
}
