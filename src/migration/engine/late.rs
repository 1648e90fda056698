//! What the engine has to do with definitions that come late ([`crate::migration::late`]): keeping them for a cutover,
//! making them at the end of an offline migration, validating foreign keys when sessions are on the target.

use std::convert::Infallible;
use std::time::Duration;

use super::context::Context;
use super::database::DatabaseWork;
use super::error::{EngineError, WorkError};
use super::live::{DatabaseLive, Live, Step};
use crate::config::Ddl;
use crate::migration::backoff::Backoff;
use crate::migration::late;
use crate::migration::schema::{self, Archive, RestoreFailure, RestoreTarget};
use crate::migration::stream::describe;
use crate::migration::view::{Mode, Problem};
use crate::postgres::{Connector, Control};

/// Nobody but an abandoned session of ours is in the tables when an offline migration ends.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether the role of `server` may have its writes fire nothing.
async fn may_replicate_silently(control: &Control) -> Result<bool, WorkError> {
    let doing = "trying to set session_replication_role";
    late::may_replicate_silently(control).await.map_err(|source| WorkError::Query { doing, source })
}

impl DatabaseWork {
    /// Before the first row: where the target's role may not keep anything from firing there, nothing may be there yet.
    pub(super) async fn nothing_would_fire(&self) -> Result<(), WorkError> {
        let control = self.context.target.control(&self.live.name, "late").await?;
        if may_replicate_silently(&control).await? {
            return Ok(());
        }
        let doing = "looking what would fire on the target";
        let mut firing = late::firing(&control).await.map_err(|source| WorkError::Query { doing, source })?;
        if self.context.config.migration.ddl == Ddl::Apply {
            firing.push("whatever is carried over by migration.ddl = \"apply\"".to_owned());
        }
        if firing.is_empty() { Ok(()) } else { Err(WorkError::WouldFire(firing)) }
    }

    /// Foreign keys, triggers, rules and policies, now or for the cutover. Returns what the target refuses.
    pub(super) async fn constrain(
        &self,
        target: &RestoreTarget<'_>,
        guard: &str,
        archive: &Archive,
    ) -> Result<Vec<RestoreFailure>, WorkError> {
        let mut control = self.context.target.control(&self.live.name, "late").await?;
        if may_replicate_silently(&control).await? {
            late::forget(&control).await?;
            let mut failures = schema::restore_foreign_keys(target, archive).await?.failures;
            if failures.is_empty() {
                failures = schema::restore_last(target, archive).await?.failures;
            }
            return Ok(failures);
        }
        let failures = late::keep(&mut control, guard, archive).await?;
        let definitions = late::waiting(&control).await?;
        tracing::warn!(
            migration = self.context.live.name(),
            database = self.live.name,
            definitions,
            "the target's role may not set session_replication_role: foreign keys, triggers, rules and policies come with \
             the cutover, which cannot be rolled back"
        );
        Ok(failures)
    }

    /// Whether an offline migration had come to its end when it was interrupted: nothing may be applied any more.
    pub(super) async fn is_past_offline_stream(&self) -> Result<bool, WorkError> {
        if self.context.live.spec.mode == Mode::Online || self.live.step() < Step::Constrained {
            return Ok(false);
        }
        let control = self.context.target.control(&self.live.name, "late").await?;
        Ok(late::made(&control).await? > 0)
    }

    /// Everything that has waited for the end of the stream, which is over.
    pub(super) async fn end_offline(&self) -> Result<(), WorkError> {
        let control = self.context.target.control(&self.live.name, "late").await?;
        late::release(&control, LOCK_TIMEOUT).await?;
        let failures = late::validate(&control).await?;
        if failures.is_empty() { Ok(()) } else { Err(WorkError::Restore(failures)) }
    }
}

/// Why nothing could be applied to one of these servers once they have foreign keys and triggers, in words for the
/// operator: whoever cuts over between them cannot come back.
pub(super) async fn cannot_apply(
    servers: [&Connector; 2],
    control_database: &str,
) -> Result<Option<String>, WorkError> {
    for server in servers {
        let control = server.control(control_database, "return").await?;
        if !may_replicate_silently(&control).await? {
            let label = server.label();
            return Ok(Some(format!(
                "this cutover cannot be rolled back: the {label}'s login role may not set session_replication_role, so \
                 nothing can be applied there once it has foreign keys and triggers"
            )));
        }
    }
    Ok(None)
}

/// Refuses to forget foreign keys that are to be validated.
pub(super) async fn all_validated(context: &Context) -> Result<(), EngineError> {
    for database in with_definitions(&context.live) {
        let control = context.target.control(&database.name, "late").await?;
        let left = late::unvalidated(&control).await;
        let left = left.map_err(|source| EngineError::Late { database: database.name.clone(), source })?;
        if left > 0 {
            return Err(EngineError::Return(format!(
                "{left} foreign keys of database {} are still being validated; complete the migration when they are",
                database.name
            )));
        }
    }
    Ok(())
}

fn with_definitions(live: &Live) -> impl Iterator<Item = &std::sync::Arc<DatabaseLive>> {
    live.databases.iter().filter(|database| database.step() == Step::Constrained)
}

/// After a cutover: validates what it has made without looking at rows, database by database; then there is nothing left
/// to do. What the rows do not satisfy is told, and looked at again by `retry`.
pub(super) async fn validate(context: &Context) -> Infallible {
    for database in with_definitions(&context.live) {
        let mut backoff = Backoff::of_work();
        loop {
            match validate_one(context, database).await {
                Ok(failures) => {
                    if let Some(first) = failures.first() {
                        tracing::error!(migration = context.live.name(), database = database.name, %first, "not validated");
                        let problem = not_valid(&failures, &database.name);
                        context.live.publish(|status| status.error = problem);
                    }
                    break;
                }
                Err(error) => {
                    let error = describe(&error);
                    tracing::warn!(
                        migration = context.live.name(),
                        database = database.name,
                        error,
                        "not validated yet"
                    );
                    tokio::time::sleep(backoff.failed().1).await;
                }
            }
        }
        database.set_validating(0);
    }
    std::future::pending().await
}

async fn validate_one(context: &Context, database: &DatabaseLive) -> Result<Vec<RestoreFailure>, WorkError> {
    let control = context.target.control(&database.name, "late").await?;
    let waiting = late::unvalidated(&control).await?;
    database.set_validating(waiting);
    let failures = late::validate(&control).await?;
    if waiting > 0 {
        let (migration, database) = (context.live.name(), &database.name);
        tracing::info!(
            migration,
            database,
            foreign_keys = waiting,
            violated = failures.len(),
            "foreign keys validated"
        );
    }
    Ok(failures)
}

fn not_valid(failures: &[RestoreFailure], database: &str) -> Option<Problem> {
    let first = failures.first()?;
    Some(Problem {
        code: "not_valid".to_owned(),
        message: format!(
            "{} foreign keys of database {database} hold for what is written since the cutover, and rows from before it \
             violate them, the first: {first}",
            failures.len()
        ),
        object: Some(format!("{} {}", first.kind, first.object)),
        hint: Some("mend those rows on the target, then retry; or drop the foreign keys".to_owned()),
    })
}
