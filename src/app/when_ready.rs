//! Migrations that were created with "cut over when ready": the order that nobody has to type.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cutovers::CutoverDesk;
use crate::admin::command::{Command, CutoverRequest};
use crate::admin::reply::Reply;
use crate::admin::service::{Service, migration_name};
use crate::shutdown::Tasks;

/// How often it is looked.
const INTERVAL: Duration = Duration::from_secs(1);

/// After a cutover that was aborted; what stood in its way may take a while to go.
const PAUSE_AFTER_ABORT: Duration = Duration::from_secs(30);

/// Looks for them until the tasks are told to stop.
pub(super) fn spawn(desk: Arc<CutoverDesk>, service: Service, tasks: &Tasks) {
    let stopping = tasks.clone();
    tasks.spawn(async move {
        let mut not_before: HashMap<String, Instant> = HashMap::new();
        loop {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                // Safe to drop: it only waits.
                () = stopping.stopping() => return,
            }
            for migration in desk.due().await {
                if not_before.get(&migration.name).is_some_and(|at| Instant::now() < *at) {
                    continue;
                }
                if !cut_over(&service, &migration.name).await {
                    not_before.insert(migration.name, Instant::now() + PAUSE_AFTER_ABORT);
                }
            }
        }
    });
}

async fn cut_over(service: &Service, name: &str) -> bool {
    let Ok(name) = migration_name(name) else { return false };
    tracing::info!(migration = %name, "ready, and to be cut over without being told");
    match service.execute(Command::Cutover(name.clone(), CutoverRequest::default())).await {
        Ok(Reply::Cutover(Some(report))) if report.outcome == "switched" => true,
        Ok(Reply::Cutover(Some(report))) => {
            tracing::warn!(migration = %name, reason = report.reason, "cutover aborted; it is tried again later");
            false
        }
        // Logged by the service.
        Ok(_) | Err(_) => false,
    }
}
