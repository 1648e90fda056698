//! The work on one migration, from the state in which the catalogue has it. It changes no state itself: it asks the
//! actor to, and goes on once the change is durable.

use std::sync::Arc;

use futures_util::future::{try_join, try_join_all};
use tokio::sync::{mpsc, oneshot, watch};

use super::actor::Command;
use super::back::BackWork;
use super::context::{Context, must_lead_away};
use super::database::DatabaseWork;
use super::error::WorkError;
use super::late;
use super::live::Step;
use super::synchronise::bring_roles_over;
use super::validation::{self, Asked};
use crate::catalog::streams::Direction;
use crate::catalog::{Place, bootstrap};
use crate::migration::backoff::Backoff;
use crate::migration::preflight::{Asking, Outcome, RuleResult};
use crate::migration::schema;
use crate::migration::state::{Event, State};
use crate::migration::stream::{Trouble, describe};
use crate::migration::view::{MigrationOption, Mode, Problem};

/// How often a validation that is interrupted is begun again: about a minute.
const MAX_INTERRUPTIONS: u32 = 8;

/// How the work ended.
#[derive(Debug)]
pub(super) enum WorkEnd {
    /// With an event that ends a state.
    Event(Event, Option<Problem>),
    /// Another engine has taken over, or this one is stopping: there is nothing to say.
    Silent,
}

pub(super) struct Worker {
    pub(super) context: Arc<Context>,
    pub(super) commands: mpsc::Sender<Command>,
}

impl Worker {
    /// Works until there is nothing left to do, or something happens that only a person can mend.
    pub(super) async fn run(self) -> WorkEnd {
        match Box::pin(self.work()).await {
            Ok((event, problem)) => WorkEnd::Event(event, problem),
            Err((error, _)) if error.is_fenced() => WorkEnd::Silent,
            Err((error, database)) => {
                tracing::error!(
                    migration = self.context.live.name(),
                    database,
                    error = describe(&error),
                    "the migration cannot go on"
                );
                WorkEnd::Event(Event::WorkFailed, Some(error.problem(database.as_deref())))
            }
        }
    }

    async fn work(&self) -> Result<(Event, Option<Problem>), (WorkError, Option<String>)> {
        let plain = |error| (error, None);
        if self.state().direction() == Direction::Reverse {
            return Err(tokio::select! {
                // Never ends; what it has validated is kept.
                never = late::validate(&self.context) => match never {},
                error = self.follow_back() => error,
            });
        }
        if self.state() == State::PerformingPreRequisiteSteps {
            self.patiently("prerequisites", || self.prerequisites()).await.map_err(plain)?;
            self.report(Event::PrerequisitesMet).await.map_err(plain)?;
        }
        if self.state() == State::ValidationInProgress {
            if let Some(end) = self.validate().await.map_err(plain)? {
                return Ok(end);
            }
            self.report(Event::ValidationPassed).await.map_err(plain)?;
        }
        let roles = async {
            if self.live_steps().any(|step| step < Step::Copied) {
                self.patiently("roles", || self.roles()).await?;
            }
            Ok(())
        };
        let (pg_dump, ()) = try_join(self.patiently("pg_dump", || self.pg_dump()), roles).await.map_err(plain)?;
        let mut ready = Vec::new();
        let works: Vec<DatabaseWork> = self
            .context
            .live
            .databases
            .iter()
            .map(|live| {
                live.broken.send_replace(None);
                let (sender, receiver) = watch::channel(false);
                ready.push(receiver);
                let context = self.context.clone();
                DatabaseWork { context, live: live.clone(), pg_dump: pg_dump.clone(), ready: sender }
            })
            .collect();
        let all = try_join_all(
            works
                .iter()
                .map(|work| async move { work.run().await.map_err(|error| (error, Some(work.live.name.clone()))) }),
        );
        tokio::select! {
            // Never ends; what it has found is kept.
            never = self.keep_validating() => match never {},
            done = all => done.map(|_| (Event::CopiedOffline, None)),
            error = self.tell_when_ready(ready) => Err((error, None)),
        }
    }

    /// After a cutover: every database's stream back, until another engine takes over.
    async fn follow_back(&self) -> (WorkError, Option<String>) {
        let databases = self.context.live.databases.iter().filter(|live| live.current().flows());
        let works: Vec<BackWork> =
            databases.map(|live| BackWork { context: self.context.clone(), live: live.clone() }).collect();
        if works.is_empty() {
            return std::future::pending().await;
        }
        let (error, ..) = futures_util::future::select_all(works.iter().map(|work| Box::pin(work.run()))).await;
        (error, None)
    }

    fn state(&self) -> State {
        self.context.live.state()
    }

    fn live_steps(&self) -> impl Iterator<Item = Step> {
        self.context.live.databases.iter().map(|database| database.step())
    }

    /// Tries again as long as the reason may pass by itself.
    async fn patiently<T, F>(&self, what: &str, attempt: impl Fn() -> F) -> Result<T, WorkError>
    where
        F: Future<Output = Result<T, WorkError>>,
    {
        let mut backoff = Backoff::of_work();
        loop {
            match Box::pin(attempt()).await {
                Err(error) if error.is_transient() => {
                    let error = describe(&error);
                    tracing::warn!(migration = self.context.live.name(), what, error, "interrupted, begins again");
                    let (retries, wait) = backoff.failed();
                    for database in &self.context.live.databases {
                        let trouble = Trouble { retries, last_error: error.clone() };
                        database.stream.trouble.send_replace(Some(trouble));
                    }
                    tokio::time::sleep(wait).await;
                }
                other => return other,
            }
        }
    }

    /// Has the actor change the state; comes back once that is durable.
    async fn report(&self, event: Event) -> Result<(), WorkError> {
        let once = || async {
            let (reply, answer) = oneshot::channel();
            self.commands.send(Command::Report(event, reply)).await.map_err(|_| WorkError::Stopping)?;
            answer.await.map_err(|_| WorkError::Stopping)?
        };
        self.patiently("state", once).await
    }

    /// Both servers are reached, and our schema is in the target's control database.
    async fn prerequisites(&self) -> Result<(), WorkError> {
        let database = &self.context.config.control.database;
        let source = self.context.source.control(database, "prerequisites").await?;
        let target = self.context.target.control(database, "prerequisites").await?;
        bootstrap(&target, Place::TargetControl).await?;
        let databases = self.context.live.databases.iter().map(|database| database.name.as_str());
        must_lead_away(databases, &source, &target).await?;
        tracing::info!(
            migration = self.context.live.name(),
            source = source.version_num(),
            target = target.version_num(),
            "both servers are reached"
        );
        Ok(())
    }

    /// Runs the rules; an event when that is the end. What a migration has made itself would fail them, so one that has
    /// begun is not validated again.
    async fn validate(&self) -> Result<Option<(Event, Option<Problem>)>, WorkError> {
        let spec = &self.context.live.spec;
        if spec.option == MigrationOption::Migrate || self.live_steps().any(|step| step > Step::Waiting) {
            return Ok(None);
        }
        let results = self.answers().await;
        let json = serde_json::to_value(&results).unwrap_or_default();
        self.patiently("validation", || async {
            Ok(self.context.catalog.set_validation(self.context.live.name(), &json).await?)
        })
        .await?;
        self.context.live.publish(|status| status.validation = Some(json.clone()));
        let failed: Vec<&RuleResult> = results.iter().filter(|result| result.outcome == Outcome::Failed).collect();
        tracing::info!(migration = self.context.live.name(), rules = results.len(), failed = failed.len(), "validated");
        Ok(match spec.option {
            _ if !failed.is_empty() => Some((Event::ValidationRejected, Some(rejection(&failed)))),
            MigrationOption::Validate => Some((Event::ValidatedOnly, None)),
            MigrationOption::Migrate | MigrationOption::ValidateAndMigrate => None,
        })
    }

    /// What the rules say. A server that is lost meanwhile says nothing about any of them: they are asked again, though not
    /// for ever, because a question that brings a server down will always do so.
    async fn answers(&self) -> Vec<RuleResult> {
        let mut backoff = Backoff::of_work();
        loop {
            let results = validation::ask(&self.context.servers(), &self.context.live, Asked::Everything).await;
            let Some(lost) = results.iter().find(|rule| rule.asking == Asking::Interrupted) else { return results };
            let last_error = lost.evidence.first().cloned().unwrap_or_default();
            let (retries, wait) = backoff.failed();
            if retries > MAX_INTERRUPTIONS {
                return results;
            }
            tracing::warn!(
                migration = self.context.live.name(),
                rule = lost.code,
                retries,
                error = last_error,
                "the validation was interrupted and begins again"
            );
            for database in &self.context.live.databases {
                database.stream.trouble.send_replace(Some(Trouble { retries, last_error: last_error.clone() }));
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Asks the rules about replication again and again, as long as there is work.
    async fn keep_validating(&self) -> std::convert::Infallible {
        let spec = &self.context.live.spec;
        let asked = spec.mode == Mode::Online && spec.option != MigrationOption::Migrate;
        let interval = self.context.config.migration.validation_interval;
        if !asked || interval.is_zero() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(interval).await;
            if matches!(self.state(), State::MigratingData | State::WaitingForCutoverTrigger) {
                let (servers, live) = (self.context.servers(), &self.context.live);
                let results = validation::ask(&servers, live, Asked::AboutReplication).await;
                if let Err(error) = validation::keep(&self.context.catalog, live, &results).await {
                    let error = describe(&error);
                    tracing::debug!(migration = live.name(), error, "the validation could not be kept");
                }
            }
        }
    }

    async fn roles(&self) -> Result<(), WorkError> {
        let context = &self.context;
        let (name, ends) = (context.live.name(), (&context.source, &context.target));
        let reports = bring_roles_over::<WorkError>(&context.catalog, name, Direction::Forward, ends).await?;
        for report in reports {
            for warning in report.warnings {
                tracing::warn!(migration = self.context.live.name(), role = report.role, warning, "role");
            }
        }
        self.context.failpoints.hit("engine.after_roles").await?;
        Ok(())
    }

    async fn pg_dump(&self) -> Result<schema::PgDump, WorkError> {
        let database = &self.context.config.control.database;
        let source = self.context.source.control(database, "version").await?;
        let target = self.context.target.control(database, "version").await?;
        let major = |version_num: u32| version_num / 10_000;
        let config = &self.context.config.migration;
        Ok(schema::find_pg_dump(config, major(source.version_num()), major(target.version_num())).await?)
    }

    /// Reports once that every database is ready. Never ends otherwise.
    async fn tell_when_ready(&self, ready: Vec<watch::Receiver<bool>>) -> WorkError {
        for mut database in ready {
            if database.wait_for(|ready| *ready).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        if self.state() == State::MigratingData
            && let Err(error) = self.report(Event::CaughtUp).await
        {
            return error;
        }
        std::future::pending().await
    }
}

/// Names the rules that failed; the first one's fix comes as the hint.
fn rejection(failed: &[&RuleResult]) -> Problem {
    let codes: Vec<&str> = failed.iter().map(|rule| rule.code.as_str()).collect();
    let first = failed.first();
    Problem {
        code: "validation".to_owned(),
        message: format!("the premigration validation failed: {}", codes.join(", ")),
        object: first.and_then(|rule| rule.evidence.first().cloned()),
        hint: first.map(|rule| rule.fix.clone()).filter(|fix| !fix.is_empty()),
    }
}
