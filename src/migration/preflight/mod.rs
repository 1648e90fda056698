//! Premigration validation: is everything there that a migration needs, and nothing that it would lose?
//!
//! Read-only on both servers. Every rule answers with evidence, why it matters and what mends it; a rule that could not
//! be evaluated is Failed, never Succeeded.

use crate::config::Config;
use crate::postgres::Connector;

/// How the source is used while it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The application keeps writing; changes are streamed.
    Online,
    /// The application is stopped; a copy is enough.
    Offline,
}

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The servers.
    Instance,
    /// One database.
    Database(String),
}

/// How a rule came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Outcome {
    /// Nothing to do.
    Succeeded,
    /// Carries on, but the operator should know.
    Warning,
    /// The migration would fail or lose something.
    Failed,
}

/// One rule's answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
    let _ = preflight;
    unimplemented!()
}
