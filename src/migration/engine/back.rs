//! The work on a migration that was cut over: what is written on the target goes back to the source, so that the cutover
//! can be taken back with nothing lost.
//!
//! It is the same stream as before with both servers exchanged, without hand-overs, and begins behind the boundary of the
//! cutover. The source stays fenced for everybody else; our own sessions get in through its door
//! ([`crate::catalog::door`]). Nothing here changes the state of the migration: a stream that cannot go on is shown, and
//! a rollback is refused for as long as nobody knows how far it is.

use std::collections::HashMap;
use std::sync::Arc;

use super::context::Context;
use super::error::WorkError;
use super::lag_watch::Watch;
use super::live::DatabaseLive;
use crate::catalog::door::Door;
use crate::catalog::migrations::CatalogError;
use crate::catalog::streams::{Direction, progress_key};
use crate::migration::backoff::Backoff;
use crate::migration::stream::history::HistoryError;
use crate::migration::stream::{self, StreamContext, StreamError, Trouble, describe};

/// Codes of what the stream cannot go on after.
const LASTING: [&str; 4] = ["slot_missing", "slot_lost", "slot_ahead", "source_history"];

/// Before a cutover the migration would be made anew.
const NO_WAY_BACK: &str =
    "the target stays in use, and the cutover cannot be taken back any more: complete the migration";

/// The worker of one database.
pub(super) struct BackWork {
    pub(super) context: Arc<Context>,
    pub(super) live: Arc<DatabaseLive>,
}

impl BackWork {
    /// Follows the target until another engine takes over. There is nothing that trying again could make worse, so it is
    /// tried for ever; what was wrong is shown meanwhile.
    pub(super) async fn run(&self) -> WorkError {
        let mut backoff = Backoff::of_work();
        loop {
            let mut error = Box::pin(self.once()).await;
            if error.is_fenced() {
                match self.not_really_fenced().await {
                    Some(why) => error = why,
                    None => return error,
                }
            }
            let (retries, wait) = backoff.failed();
            let last_error = describe(&error);
            tracing::warn!(
                migration = self.context.live.name(),
                database = self.live.name,
                retries,
                error = last_error,
                "the stream back was interrupted and begins again"
            );
            self.live.broken.send_replace(Some(last_error.clone()));
            self.live.stream.trouble.send_replace(Some(Trouble { retries, last_error }));
            let mut problem = error.problem(Some(&self.live.name));
            if LASTING.contains(&problem.code.as_str()) {
                problem.hint = Some(NO_WAY_BACK.to_owned());
            }
            self.context.live.publish(|status| status.error = Some(problem));
            tokio::time::sleep(wait).await;
        }
    }

    /// Why the progress is refused although no engine has taken over; none: one has. The progress of the stream back is on
    /// the source, but engines are counted on the target: of one that was restored, the source knows later engines.
    async fn not_really_fenced(&self) -> Option<WorkError> {
        match self.context.catalog.is_latest().await {
            Ok(true) => {
                let server = self.context.target.label().to_owned();
                Some(StreamError::from(HistoryError::Forgotten { server }).into())
            }
            Ok(false) => None,
            Err(error) => Some(error.into()),
        }
    }

    async fn once(&self) -> WorkError {
        let stream = match self.stream_context().await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        self.live.broken.send_replace(None);
        self.context.live.publish(|status| status.error = None);
        let watch = Watch { context: &self.context, live: &self.live };
        // Dropping either loses nothing.
        tokio::select! {
            error = stream::run(&stream, &self.live.stream) => error.into(),
            error = watch.run() => error,
        }
    }

    async fn stream_context(&self) -> Result<StreamContext, WorkError> {
        let (context, name) = (&self.context, self.context.live.name());
        let rows = context.catalog.databases(name).await?;
        let row = rows.into_iter().find(|row| row.database == self.live.name);
        let row = row.filter(|row| row.direction == Direction::Reverse);
        let unreadable =
            || CatalogError::Unreadable { what: format!("no stream back for database {}", self.live.name) };
        let row = row.ok_or_else(unreadable)?;
        let slot_start = row.slot_start.ok_or_else(unreadable)?;
        Ok(StreamContext {
            source: context.target.clone(),
            target: context.source.clone(),
            database: row.database.clone(),
            migration: progress_key(name, row.epoch),
            generation: context.catalog.generation(),
            slot: row.slot,
            slot_start,
            publication: row.publication,
            hand_overs: HashMap::new(),
            boundary: Some(row.epoch),
            reserve: self.live.reserve.clone(),
            door: Some(Door::new(&context.source, &context.config.control.database, &row.database, &self.live.turns)),
            queue_bytes: context.config.migration.apply_queue_bytes,
            metrics: context.metrics.clone(),
            failpoints: context.failpoints.clone(),
        })
    }
}
