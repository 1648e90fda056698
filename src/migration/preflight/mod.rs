//! Premigration validation: is everything there that a migration needs, and nothing that it would lose?
//!
//! Read-only on both servers. Every rule answers with evidence, why it matters and what mends it; a rule that could not
//! be evaluated is Failed, never Succeeded.

mod database;
mod findings;
mod instance;

use tokio_postgres::types::ToSql;

use crate::config::Config;
pub use crate::migration::view::Mode;
use crate::postgres::{Connector, Control};

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The servers.
    Instance,
    /// One database.
    Database(String),
}

/// How a rule came out.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub enum Outcome {
    /// Nothing to do.
    Succeeded,
    /// Carries on, but the operator should know.
    Warning,
    /// The migration would fail or lose something.
    Failed,
}

/// One rule's answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct RuleResult {
    /// Stable name, such as `wal_level` or `large_objects`.
    pub code: String,
    /// What the rule is about.
    pub level: Level,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found, at most [`EVIDENCE_MAX`] items.
    pub evidence: Vec<String>,
    /// How many items there are in truth.
    pub evidence_total: usize,
    /// Why it matters.
    pub why: String,
    /// The SQL or setting that mends it; empty when succeeded.
    pub fix: String,
}

/// Most items of evidence that a rule quotes.
pub const EVIDENCE_MAX: usize = 20;

/// What a validation looks at.
#[derive(Clone, Copy, Debug)]
pub struct Preflight<'a> {
    /// The server that holds the data.
    pub source: &'a Connector,
    /// The server that the data moves to.
    pub target: &'a Connector,
    /// Databases to migrate.
    pub databases: &'a [String],
    /// The whole configuration.
    pub config: &'a Config,
    /// How the source is used meanwhile.
    pub mode: Mode,
    /// Whether databases of the target may be dropped.
    pub overwrite_target: bool,
}

/// Evaluates every rule, instance level first, then database by database. Never fails itself: a server that cannot be
/// reached is a Failed rule.
pub async fn validate(preflight: &Preflight<'_>) -> Vec<RuleResult> {
    let mut results = Vec::new();
    let control = &preflight.config.control.database;
    let source = connect(preflight.source, control, &mut results).await;
    let target = connect(preflight.target, control, &mut results).await;
    let (Some(source), Some(target)) = (source, target) else { return results };
    results.extend(instance::check(preflight, &source, &target).await);
    for name in preflight.databases {
        results.extend(database::check(preflight, name, &source, &target).await);
    }
    results
}

/// Whether a migration may go on.
pub fn may_proceed(results: &[RuleResult]) -> bool {
    results.iter().all(|result| result.outcome != Outcome::Failed)
}

async fn connect(server: &Connector, database: &str, results: &mut Vec<RuleResult>) -> Option<Control> {
    let code = if server.label() == "source" { "connect_source" } else { "connect_target" };
    let rule = Rule::new(code, Level::Instance)
        .why("both servers must let pgcutover in, in the control database too")
        .fix("check address, user, password and sslmode of this server, its pg_hba.conf, and control.database");
    match server.control(database, "validation").await {
        Ok(control) => {
            results.push(rule.noted(vec![format!("server_version_num {}", control.version_num())]));
            Some(control)
        }
        Err(error) => {
            results.push(rule.failed(vec![error.to_string()]));
            None
        }
    }
}

/// A rule that is about to be answered.
#[derive(Clone, Debug)]
struct Rule {
    code: &'static str,
    level: Level,
    why: &'static str,
    fix: String,
}

impl Rule {
    fn new(code: &'static str, level: Level) -> Self {
        Self { code, level, why: "", fix: String::new() }
    }

    fn why(mut self, why: &'static str) -> Self {
        self.why = why;
        self
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }

    fn answer(self, outcome: Outcome, mut evidence: Vec<String>) -> RuleResult {
        let evidence_total = evidence.len();
        evidence.truncate(EVIDENCE_MAX);
        let fix = if outcome == Outcome::Succeeded { String::new() } else { self.fix };
        RuleResult {
            code: self.code.to_owned(),
            level: self.level,
            outcome,
            evidence,
            evidence_total,
            why: self.why.to_owned(),
            fix,
        }
    }

    fn succeeded(self) -> RuleResult {
        self.answer(Outcome::Succeeded, Vec::new())
    }

    /// Succeeded, with something worth showing.
    fn noted(self, evidence: Vec<String>) -> RuleResult {
        self.answer(Outcome::Succeeded, evidence)
    }

    fn failed(self, evidence: Vec<String>) -> RuleResult {
        self.answer(Outcome::Failed, evidence)
    }

    /// Succeeded where nothing was found, `otherwise` where something was.
    fn unless_any(self, otherwise: Outcome, evidence: Vec<String>) -> RuleResult {
        if evidence.is_empty() { self.succeeded() } else { self.answer(otherwise, evidence) }
    }

    /// Succeeded where `fine`.
    fn expect(self, fine: bool, otherwise: Outcome, evidence: String) -> RuleResult {
        self.answer(if fine { Outcome::Succeeded } else { otherwise }, vec![evidence])
    }

    /// It could not be evaluated.
    fn unknown(self, error: &dyn std::error::Error) -> RuleResult {
        let mut text = error.to_string();
        let mut inner = error.source();
        while let Some(next) = inner {
            text = format!("{text}: {next}");
            inner = next.source();
        }
        self.failed(vec![format!("could not be evaluated: {text}")])
    }
}

/// The first column of a query, as evidence.
async fn column(
    control: &Control,
    query: &str,
    params: &[&(dyn ToSql + Sync)],
) -> Result<Vec<String>, tokio_postgres::Error> {
    Ok(control.query(query, params).await?.iter().map(|row| row.get(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_capped_and_counted() {
        let rule = Rule::new("x", Level::Instance).fix("do it");
        let result = rule.clone().unless_any(Outcome::Warning, (0..100).map(|n| n.to_string()).collect());
        assert_eq!((result.evidence.len(), result.evidence_total), (EVIDENCE_MAX, 100));
        assert_eq!((result.outcome, result.fix.as_str()), (Outcome::Warning, "do it"));
        let fine = rule.clone().unless_any(Outcome::Warning, Vec::new());
        assert_eq!((fine.outcome, fine.fix.as_str()), (Outcome::Succeeded, ""));
        assert!(may_proceed(&[result, fine]));
        assert!(!may_proceed(&[rule.unknown(&std::fmt::Error)]), "what is unknown is not fine");
    }
}
