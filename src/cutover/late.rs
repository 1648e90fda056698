//! Foreign keys and triggers that come with the cutover ([`crate::migration::late`]): made when nothing is applied any more,
//! committed when the decision is known, and before anybody is let in. Without them nobody may be.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;

use super::CutoverError;
use super::work::Work;
use crate::catalog::{Place, bootstrap};
use crate::migration::late;
use crate::postgres::{ConnectError, Connector};
use crate::sqlstate;

/// Between two attempts on a server that does not answer.
const TRY_AGAIN: Duration = Duration::from_millis(250);

/// Bound on the wait for locks where no cutover gives one: nobody has been let in.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

impl Work {
    /// Makes them in transactions that stay open.
    pub(super) async fn make_late_definitions(&mut self) -> Result<(), CutoverError> {
        let since = Instant::now();
        let lock_timeout = self.options.drain_timeout;
        let sessions = self.lines.iter().filter_map(|line| line.sessions.as_ref()?.late.as_ref());
        let made = try_join_all(sessions.map(|late| late::make(late, lock_timeout))).await?;
        if !made.is_empty() {
            self.timings.step("foreign keys and triggers are made", since);
        }
        Ok(())
    }

    /// Puts them in force: the cutover is decided. What cannot be committed is made anew; nobody is let in meanwhile. Fails
    /// only when the process stops: the next start goes on.
    pub(super) async fn commit_late_definitions(&mut self) -> Result<(), CutoverError> {
        let since = Instant::now();
        let mut any = false;
        for line in &mut self.lines {
            let Some(session) = line.sessions.as_mut().and_then(|sessions| sessions.late.take()) else { continue };
            any = true;
            let Err(error) = late::commit(&session).await else { continue };
            tracing::error!(database = line.name, %error, "foreign keys and triggers are made anew");
            drop(session);
            line.gate.set_unknown(reason(&error.into()));
            while let Err(error) = release(&self.to.connector, &line.name).await {
                tracing::error!(database = line.name, %error, "foreign keys and triggers are not in force yet: trying again");
                if self.orders.tasks.is_stopping() {
                    return Err(error);
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
        }
        if any {
            self.timings.step("foreign keys and triggers are in force", since);
        }
        Ok(())
    }
}

/// Makes what a cutover to this server was interrupted in, in these databases. Returns those in which that is not so yet,
/// with the reason: nobody may be let in.
pub(super) async fn settle(
    server: &Connector,
    databases: impl IntoIterator<Item = String>,
) -> BTreeMap<String, String> {
    let mut unsettled = BTreeMap::new();
    for database in databases {
        if let Err(error) = Box::pin(release(server, &database)).await {
            tracing::warn!(database, %error, "foreign keys and triggers are not in force yet");
            unsettled.insert(database, reason(&error));
        }
    }
    unsettled
}

fn reason(error: &CutoverError) -> String {
    format!("the cutover is decided, and its foreign keys and triggers are not in force yet: {error}")
}

async fn release(server: &Connector, database: &str) -> Result<(), CutoverError> {
    let control = match server.control(database, "late").await {
        // Somebody has dropped it since: there is nothing to let anybody into.
        Err(error) if is_gone(&error) => return Ok(()),
        session => session?,
    };
    if late::waiting(&control).await? == 0 {
        return Ok(());
    }
    // What is run has to be our own.
    bootstrap(&control, Place::TargetDatabase).await?;
    late::release(&control, LOCK_TIMEOUT).await?;
    tracing::info!(database, "foreign keys and triggers are in force");
    Ok(())
}

fn is_gone(error: &ConnectError) -> bool {
    error.sqlstate() == Some(sqlstate::INVALID_CATALOG_NAME)
}
