//! How this process is taken over from: when it may be, and what it gives up in which order.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{CUTOVER_GRACE, Daemon, ENGINE_GRACE, HTTP_GRACE, join};
use crate::proxy::takeover::{Handle, Purpose, Request};
use crate::switch::{Route, Switchboard};

impl Daemon {
    /// Resolves once a successor is ready to accept. Where there is no socket for it, never. Dropping this leaves a
    /// successor without an answer; it then gives up.
    pub(super) async fn successor(&self, requests: Option<&mut mpsc::Receiver<Request>>) -> Request {
        let Some(requests) = requests else { return std::future::pending().await };
        while let Some(mut request) = requests.recv().await {
            if let Err(reason) = self.seal().await {
                tracing::warn!(reason, "a takeover is refused");
                request.refuse(&reason).await;
                continue;
            }
            tracing::info!("a successor is given the listeners");
            let handed = match self.all_handles() {
                Ok(handles) => request.hand_over(handles).await,
                Err(error) => Err(error),
            };
            match handed {
                Ok(()) => return request,
                Err(error) => {
                    tracing::error!(%error, "the successor did not get ready; this process goes on");
                    self.coordinator.unseal();
                    self.service.unseal();
                }
            }
        }
        std::future::pending().await
    }

    /// What a successor would not know of must not be in force, nor come into force from now on.
    async fn seal(&self) -> Result<(), String> {
        // Orders first: what they have brought into force by then is found.
        self.service.seal();
        let sealed = match obstacle(&self.switchboard) {
            Some(reason) => Err(reason),
            None => self.coordinator.seal().await.map_err(str::to_owned),
        };
        if sealed.is_err() {
            self.service.unseal();
        }
        sealed
    }

    fn all_handles(&self) -> std::io::Result<Vec<Handle>> {
        let mut handles = self.proxy.handles()?;
        if let Some(http) = &self.http {
            handles.push(Handle { purpose: Purpose::Http, socket: http.try_clone()?.into() });
        }
        Ok(handles)
    }

    /// Gives up everything but the sessions. Returns when the last of them has ended.
    pub(super) async fn retire(&mut self, successor: Request) {
        self.proxy.hand_over().await;
        successor.closed().await;
        self.http = None;
        self.console_tasks.stop();
        join("cutovers and orders", &self.cutover_tasks, CUTOVER_GRACE).await;
        join("engine", &self.engine_tasks, ENGINE_GRACE).await;
        join("HTTP", &self.http_tasks, HTTP_GRACE).await;
        tracing::info!(clients = self.proxy.clients(), "taken over from; serving sessions to their end");
        self.proxy.emptied().await;
        tracing::info!("the last session has ended");
    }
}

fn obstacle(switchboard: &Arc<Switchboard>) -> Option<String> {
    if switchboard.is_paused() {
        return Some("everything is paused: RESUME first".to_owned());
    }
    switchboard.all().iter().find_map(|database| {
        let name = database.name();
        if matches!(&*database.route(), Route::Unknown { .. }) {
            return Some(format!("it is not known which server is active for database {name:?}"));
        }
        if database.is_fenced_by_cutover() || database.prepare_window().is_some() {
            return Some(format!("a cutover of database {name:?} is under way"));
        }
        if database.is_paused() {
            return Some(format!("database {name:?} is paused: RESUME it first"));
        }
        database.is_disabled().then(|| format!("database {name:?} is disabled: ENABLE it first"))
    })
}
