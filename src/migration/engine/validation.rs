//! The validation after its first time: asked again while a migration streams and before its cutover, and mended where
//! the operator asks for it.

use std::time::Duration;

use super::live::Live;
use super::{Engine, EngineError};
use crate::catalog::journal::Side;
use crate::catalog::migrations::{CatalogError, MigrationCatalog};
use crate::config::Config;
use crate::migration::preflight::{self, Apply, Asking, Definition, Level, Outcome, Preflight, RuleResult, Statement};
use crate::migration::view::{FixReport, MigrationOption, Mode};
use crate::postgres::Connector;

/// Between two looks at a rule whose fix has a server read its configuration again.
const RELOAD_WAIT: Duration = Duration::from_millis(200);

/// So many: where a parameter takes a restart, it differs after that too.
const RELOAD_ATTEMPTS: u32 = 25;

/// Which rules are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Everything,
    /// Those that must hold as long as changes are streamed.
    AboutReplication,
}

/// Whether statements of a fix are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// They are shown.
    No,
    /// They are run, unless the rule refuses that.
    Now,
}

/// What is asked, and how it is configured.
#[derive(Clone, Copy)]
pub(super) struct Servers<'a> {
    pub(super) source: &'a Connector,
    pub(super) target: &'a Connector,
    pub(super) config: &'a Config,
}

/// Asks about a migration.
pub(super) async fn ask(servers: &Servers<'_>, live: &Live, asked: Asked) -> Vec<RuleResult> {
    let databases: Vec<String> = live.databases.iter().map(|database| database.name.clone()).collect();
    let slots: Vec<String> = live.databases.iter().map(|database| database.current().slot).collect();
    let preflight = Preflight {
        source: servers.source,
        target: servers.target,
        databases: &databases,
        config: servers.config,
        mode: live.spec.mode,
        overwrite_target: live.spec.overwrite_target,
        slots: &slots,
    };
    match asked {
        Asked::Everything => preflight::validate(&preflight).await,
        Asked::AboutReplication => preflight::validate_again(&preflight).await,
    }
}

/// Puts newer answers in the place of those on record, and tells of rules that have become worse. A server that cannot
/// be reached just now says nothing about the rest.
pub(super) async fn keep(catalog: &MigrationCatalog, live: &Live, fresh: &[RuleResult]) -> Result<(), CatalogError> {
    let Some(known) = live.status().validation else { return Ok(()) };
    let Ok(before) = serde_json::from_value::<Vec<RuleResult>>(known) else { return Ok(()) };
    let mut after = before.clone();
    for result in fresh.iter().filter(|result| tells(result)) {
        let Some(place) = after.iter_mut().find(|known| same_rule(known, result)) else { continue };
        if result.outcome > place.outcome {
            let level = match &result.level {
                Level::Instance => "",
                Level::Database(name) => name,
            };
            tracing::warn!(
                migration = live.name(),
                rule = result.code,
                database = level,
                evidence = result.evidence.first(),
                fix = result.fix,
                "a rule of the validation does not hold any more"
            );
        }
        place.clone_from(result);
    }
    if after == before {
        return Ok(());
    }
    let json = serde_json::to_value(&after).unwrap_or_default();
    catalog.set_validation(live.name(), &json).await?;
    live.publish(|status| status.validation = Some(json.clone()));
    Ok(())
}

/// Whether an answer is about what was asked. `database_exists` is answered again only where a session in a database could
/// not be opened; nothing would take that back once it can.
fn tells(result: &RuleResult) -> bool {
    result.asking == Asking::Done && !is_about_connecting(result) && result.code != "database_exists"
}

fn is_about_connecting(result: &RuleResult) -> bool {
    result.code.starts_with("connect_")
}

fn same_rule(one: &RuleResult, other: &RuleResult) -> bool {
    (&one.code, &one.level) == (&other.code, &other.level)
}

impl Engine {
    fn servers(&self) -> Servers<'_> {
        Servers { source: &self.deps.source, target: &self.deps.target, config: &self.deps.config }
    }

    /// Rules about replication must hold now. Whoever did without the validation does without this too.
    pub(super) async fn must_still_hold(&self, live: &Live) -> Result<(), EngineError> {
        if live.spec.mode == Mode::Offline || live.spec.option == MigrationOption::Migrate {
            return Ok(());
        }
        let (catalog, _actors) = self.owned()?;
        let results = ask(&self.servers(), live, Asked::AboutReplication).await;
        keep(&catalog, live, &results).await?;
        let failed = results.iter().filter(|result| result.outcome == Outcome::Failed);
        let named: Vec<String> = failed
            .map(|rule| format!("{} ({})", rule.code, rule.evidence.first().map_or("", String::as_str)))
            .collect();
        if named.is_empty() { Ok(()) } else { Err(EngineError::Invalid(named.join(", "))) }
    }

    /// Shows what mends a rule now, and runs it where that is asked for and the rule allows it: statement by statement,
    /// with the configured bound on each lock.
    pub async fn fix(&self, name: &str, rule: &str, apply: Applied) -> Result<FixReport, EngineError> {
        let (catalog, _actors) = self.owned()?;
        let live = self.entry(name)?.live;
        let Some(definition) = preflight::rules().find(|definition| definition.code == rule) else {
            let message = format!("there is no rule {rule:?}: `migration validation {name}` lists them");
            return Err(EngineError::BadRequest(message));
        };
        let found = self.answers(&live, rule).await;
        let statements: Vec<Statement> = found.iter().flat_map(|result| result.statements.clone()).collect();
        let refused = self.refusal(definition, &statements).await?;
        let mut report = FixReport { rule: rule.to_owned(), applied: false, refused, statements, found };
        if apply == Applied::No || report.statements.is_empty() {
            return Ok(report);
        }
        if let Some(why) = &report.refused {
            let message = format!("the fix of rule {rule} is not run for you, because {why}");
            return Err(EngineError::BadRequest(message));
        }
        for statement in &report.statements {
            self.run(name, rule, statement).await?;
        }
        report.applied = true;
        report.found = self.answers(&live, rule).await;
        // A server reads its configuration again when it gets to it.
        let reloads = report.statements.iter().any(|statement| statement.sql.contains("pg_reload_conf("));
        let still = |report: &FixReport| report.found.iter().any(|result| result.outcome != Outcome::Succeeded);
        for _ in 0..RELOAD_ATTEMPTS {
            if !reloads || !still(&report) {
                break;
            }
            tokio::time::sleep(RELOAD_WAIT).await;
            report.found = self.answers(&live, rule).await;
        }
        keep(&catalog, &live, &report.found).await?;
        Ok(report)
    }

    async fn answers(&self, live: &Live, rule: &str) -> Vec<RuleResult> {
        let mut results = ask(&self.servers(), live, Asked::Everything).await;
        // A server that cannot be reached is why there is no answer.
        let unreachable = |result: &RuleResult| is_about_connecting(result) && result.outcome == Outcome::Failed;
        results.retain(|result| result.code == rule || unreachable(result));
        results
    }

    fn server(&self, side: Side) -> &Connector {
        match side {
            Side::Source => &self.deps.source,
            Side::Target => &self.deps.target,
        }
    }

    /// Why the statements are not run.
    async fn refusal(&self, definition: &Definition, statements: &[Statement]) -> Result<Option<String>, EngineError> {
        match definition.apply {
            Apply::Refused(why) => Ok(Some(why.to_owned())),
            Apply::ByHand | Apply::Since(0) => Ok(None),
            Apply::Since(version) => {
                let Some(first) = statements.first() else { return Ok(None) };
                let control = self.server(first.server).control(&first.database, "fix").await?;
                let old = control.version_num() < version;
                Ok(old.then(|| format!("before PostgreSQL {} it locks what it mends", version / 10_000)))
            }
        }
    }

    async fn run(&self, migration: &str, rule: &str, statement: &Statement) -> Result<(), EngineError> {
        let Statement { server, database, sql } = statement;
        let failed = |source| EngineError::Fix { statement: statement.to_string(), source };
        let control = self.server(*server).control(database, "fix").await?;
        // What waits CONCURRENTLY is in nobody's way; given up, it would leave an invalid index behind.
        let bound = self.deps.config.migration.lock_timeout.as_millis().max(1);
        let bound = if sql.contains(" INDEX CONCURRENTLY ") { 0 } else { bound };
        control.batch_execute(&format!("SET lock_timeout = {bound}")).await.map_err(failed)?;
        control.batch_execute(sql).await.map_err(failed)?;
        tracing::info!(migration, rule, server = %server, database, sql, "a fix was run");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was lost in the middle says nothing that would have to be taken back.
    #[test]
    fn only_answers_are_put_on_record() {
        let result = |code: &str, asking| RuleResult {
            code: code.to_owned(),
            level: Level::Instance,
            outcome: Outcome::Failed,
            evidence: Vec::new(),
            evidence_total: 0,
            why: String::new(),
            fix: String::new(),
            statements: Vec::new(),
            asking,
        };
        assert!(tells(&result("wal_level", Asking::Done)));
        assert!(!tells(&result("wal_level", Asking::Interrupted)));
        assert!(!tells(&result("connect_source", Asking::Done)));
        assert!(!tells(&result("database_exists", Asking::Done)));
    }
}
