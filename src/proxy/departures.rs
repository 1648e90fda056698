//! Proof that a backend has ended.
//!
//! A closed socket proves nothing: a cut link looks the same, and a statement goes on and commits behind it. Only the
//! server can say that a process is gone, so it is asked, as often and as long as it takes.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use crate::postgres::{Connector, Control};
use crate::switch::ServerRole;

const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// `backend_start` tells a backend from another one that got its process id later; it is NULL for who may not see it.
const PRESENT: &str = "SELECT backend_start::pg_catalog.text FROM pg_catalog.pg_stat_activity WHERE pid = $1";

/// Asks the servers. Shared by all workers; its connections belong to the main runtime.
#[derive(Debug)]
pub(super) struct Departures {
    control_database: String,
    connectors: [Connector; 2],
    controls: [Mutex<Option<Arc<Control>>>; 2],
    runtime: tokio::runtime::Handle,
}

impl Departures {
    pub(super) fn new(
        control_database: String,
        source: Connector,
        target: Connector,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        Self { control_database, connectors: [source, target], controls: [Mutex::new(None), Mutex::new(None)], runtime }
    }

    /// Resolves once the backend `pid` of `server` is known to be gone. There is no time-out: as long as nobody knows,
    /// it may be at work.
    pub(super) async fn gone(self: &Arc<Self>, server: ServerRole, pid: i32) {
        let this = self.clone();
        let watch = self.runtime.spawn(async move { this.watch(server, pid).await });
        if watch.await.is_err() {
            // The main runtime is being shut down, and the process with it.
            std::future::pending::<()>().await;
        }
    }

    async fn watch(&self, server: ServerRole, pid: i32) {
        let (mut wait, mut started, mut reported) = (FIRST_WAIT, None::<String>, false);
        loop {
            match self.start_of(server, pid).await {
                Ok(None) => return,
                Ok(Some(start)) => match (&started, start) {
                    (Some(known), Some(now)) if *known != now => return,
                    (None, Some(now)) => started = Some(now),
                    (Some(_) | None, _) => {}
                },
                Err(error) => {
                    if !std::mem::replace(&mut reported, true) {
                        tracing::warn!(server = %server, pid, error, "cannot ask whether a backend has ended; asking on");
                    }
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// `None`: there is no such process; `Some(start)`: when it started, where that may be seen.
    async fn start_of(&self, server: ServerRole, pid: i32) -> Result<Option<Option<String>>, String> {
        let control = self.control(server).await?;
        match control.query(PRESENT, &[&pid]).await {
            Ok(rows) => rows.first().map(|row| row.try_get(0)).transpose().map_err(|error| error.to_string()),
            Err(error) => {
                self.controls[server as usize].lock().await.take();
                Err(error.to_string())
            }
        }
    }

    async fn control(&self, server: ServerRole) -> Result<Arc<Control>, String> {
        let mut slot = self.controls[server as usize].lock().await;
        if let Some(open) = slot.as_ref().filter(|open| !open.is_closed()) {
            return Ok(open.clone());
        }
        let opened = self.connectors[server as usize].control(&self.control_database, "departures").await;
        let opened = Arc::new(opened.map_err(|error| error.to_string())?);
        *slot = Some(opened.clone());
        Ok(opened)
    }
}
