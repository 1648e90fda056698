//! Premigration validation: is everything there that a migration needs, and nothing that it would lose?
//!
//! Read-only on both servers. Every rule answers with evidence, why it matters and what mends it; a rule that could not
//! be evaluated is Failed, never Succeeded.

mod database;
pub mod definition;
mod extensions;
mod findings;
mod forecast;
mod instance;
mod jobs;
mod locale;
mod objects;
mod replication;
mod rights;
mod unknown;
mod unstreamed;

use tokio_postgres::types::ToSql;

pub use self::definition::{Apply, Definition, Subject, When};
use crate::catalog::journal::Side;
use crate::config::{Config, ServerKind};
use crate::migration::stream::{transient_query, transient_raw, transient_sqlstate};
pub use crate::migration::view::Mode;
use crate::postgres::{ConnectError, Connector, Control};

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
    /// What mends just what was found, ready to be run in this order; empty: nothing to be done, or not by SQL.
    #[serde(default)]
    pub statements: Vec<Statement>,
    /// Whether it was answered. Not kept: what is on record is what could be found out.
    #[serde(skip)]
    pub asking: Asking,
}

/// How asking went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asking {
    /// The rule was evaluated, or never will be as things are.
    #[default]
    Done,
    /// A server could not be reached, or was lost: asking again may help.
    Interrupted,
}

/// One statement of a fix.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct Statement {
    /// On which server.
    pub server: Side,
    /// Connected to which database.
    pub database: String,
    /// The statement.
    pub sql: String,
}

/// Most items of evidence that a rule quotes.
pub const EVIDENCE_MAX: usize = 20;

/// Most statements that a rule names.
pub const STATEMENTS_MAX: usize = 200;

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
    /// Names of this migration's own slots on the source, whether they are there or not.
    pub slots: &'a [String],
}

impl std::fmt::Display for Statement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, database {}: {};", self.server, self.database, self.sql)
    }
}

/// Every query is asked once, and compiling it takes longer than running it. jit comes with PostgreSQL 11.
const SESSION: &str = "SET default_transaction_read_only = on; \
    SELECT pg_catalog.set_config(name, 'off', false) FROM pg_catalog.pg_settings WHERE name = 'jit'";

impl Preflight<'_> {
    fn kind(&self, side: Side) -> ServerKind {
        match side {
            Side::Source => self.source.server().kind,
            Side::Target => self.target.server().kind,
        }
    }

    /// A session that writes nothing, whatever is called in it.
    async fn session(&self, side: Side, database: &str) -> Result<Control, ConnectError> {
        let server = match side {
            Side::Source => self.source,
            Side::Target => self.target,
        };
        let session = server.control(database, "validation").await?;
        // Where this fails the session is gone, and whoever asks next is told.
        let _set = session.batch_execute(SESSION).await;
        Ok(session)
    }
}

/// Every rule there is, in the order in which they are evaluated.
pub fn rules() -> impl Iterator<Item = &'static Definition> {
    let findings = findings::FINDINGS.iter().chain(objects::FINDINGS).map(|finding| &finding.definition);
    [&instance::CONNECT_SOURCE, &instance::CONNECT_TARGET]
        .into_iter()
        .chain(instance::DEFINITIONS)
        .chain(rights::DEFINITIONS)
        .chain(replication::DEFINITIONS)
        .chain(database::DEFINITIONS)
        .chain(locale::DEFINITIONS)
        .chain(unstreamed::DEFINITIONS)
        .chain(jobs::DEFINITIONS)
        .chain(extensions::DEFINITIONS)
        .chain(unknown::DEFINITIONS)
        .chain(forecast::DEFINITIONS)
        .chain(findings)
}

/// Evaluates every rule, instance level first, then database by database. Never fails itself: a server that cannot be
/// reached is a Failed rule.
pub async fn validate(preflight: &Preflight<'_>) -> Vec<RuleResult> {
    evaluate(preflight, Round::First).await
}

/// Evaluates those that are to hold as long as changes are streamed.
pub async fn validate_again(preflight: &Preflight<'_>) -> Vec<RuleResult> {
    evaluate(preflight, Round::Repeated).await
}

/// Which of the rules are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    First,
    Repeated,
}

async fn evaluate(preflight: &Preflight<'_>, round: Round) -> Vec<RuleResult> {
    let control = &preflight.config.control.database;
    let ((source, first), (target, second)) = tokio::join!(
        connect(preflight, &instance::CONNECT_SOURCE, control),
        connect(preflight, &instance::CONNECT_TARGET, control),
    );
    let mut results = vec![first, second];
    let (Some(source), Some(target)) = (source, target) else { return results };
    let servers = Servers { preflight, source: &source, target: &target, round };
    let about_instances = async {
        let mut results = servers.instance().await;
        results.extend(servers.rights().await);
        results.extend(servers.replication().await);
        results
    };
    let about_databases = async {
        let mut results = Vec::new();
        for name in preflight.databases {
            results.extend(database::check(&servers, name).await);
        }
        results
    };
    // The latter ask in sessions of their own, mostly, and watch the source for a while.
    let (instances, databases) = tokio::join!(Box::pin(about_instances), Box::pin(about_databases));
    results.extend(instances.into_iter().chain(databases));
    results
}

/// Both servers, entered through the control databases.
#[derive(Clone, Copy)]
struct Servers<'a> {
    preflight: &'a Preflight<'a>,
    source: &'a Control,
    target: &'a Control,
    round: Round,
}

impl Servers<'_> {
    /// Whether this rule is asked now.
    fn asks(&self, definition: &Definition) -> bool {
        match (self.round, definition.when) {
            (Round::First, When::Before | When::Repeatedly) => true,
            (Round::First, When::BeforeOnline | When::RepeatedlyOnline)
            | (Round::Repeated, When::Repeatedly | When::RepeatedlyOnline) => self.preflight.mode == Mode::Online,
            (Round::Repeated, When::Before | When::BeforeOnline) => false,
        }
    }

    fn rule(&self, definition: &'static Definition) -> Rule {
        Rule::new(definition, Level::Instance, self.preflight.kind(definition.on))
    }

    /// A statement in the control database of one server.
    fn statement(&self, server: Side, sql: impl Into<String>) -> Statement {
        Statement { server, database: self.preflight.config.control.database.clone(), sql: sql.into() }
    }

    fn on_source(&self, sql: impl Into<String>) -> Vec<Statement> {
        vec![self.statement(Side::Source, sql)]
    }

    fn on_target(&self, sql: impl Into<String>) -> Vec<Statement> {
        vec![self.statement(Side::Target, sql)]
    }
}

/// Whether a migration may go on.
pub fn may_proceed(results: &[RuleResult]) -> bool {
    results.iter().all(|result| result.outcome != Outcome::Failed)
}

async fn connect(
    preflight: &Preflight<'_>,
    definition: &'static Definition,
    database: &str,
) -> (Option<Control>, RuleResult) {
    let rule = Rule::new(definition, Level::Instance, preflight.kind(definition.on));
    let encryption = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl";
    match preflight.session(definition.on, database).await {
        Ok(control) => {
            let tls = match column(&control, encryption, &[]).await {
                Ok(found) => found.into_iter().next().unwrap_or_else(|| "not encrypted".to_owned()),
                Err(_) => "encryption not known".to_owned(),
            };
            let result = rule.noted(vec![format!("server_version_num {}, {tls}", control.version_num())]);
            (Some(control), result)
        }
        Err(error) => (None, rule.not_connected(&error)),
    }
}

/// A rule that is about to be answered.
#[derive(Clone, Debug)]
struct Rule {
    definition: &'static Definition,
    level: Level,
    kind: ServerKind,
    statements: Vec<Statement>,
}

impl Rule {
    fn new(definition: &'static Definition, level: Level, kind: ServerKind) -> Self {
        Self { definition, level, kind, statements: Vec::new() }
    }

    /// What mends it, should it not succeed.
    fn mended_by(mut self, statements: Vec<Statement>) -> Self {
        self.statements = statements;
        self
    }

    fn answer(self, outcome: Outcome, mut evidence: Vec<String>) -> RuleResult {
        let evidence_total = evidence.len();
        evidence.truncate(EVIDENCE_MAX);
        let (mut fix, mut statements) = (String::new(), Vec::new());
        if outcome != Outcome::Succeeded {
            fix = self.definition.fix_on(self.kind);
            for statement in self.statements {
                if Definition::allows(self.kind, &statement) && !statements.contains(&statement) {
                    statements.push(statement);
                }
            }
            statements.truncate(STATEMENTS_MAX);
        }
        RuleResult {
            code: self.definition.code.to_owned(),
            level: self.level,
            outcome,
            evidence,
            evidence_total,
            why: self.definition.why.to_owned(),
            fix,
            statements,
            asking: Asking::Done,
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

    /// No session could be opened.
    fn not_connected(self, error: &ConnectError) -> RuleResult {
        RuleResult { asking: asking(error), ..self.failed(vec![error.to_string()]) }
    }

    /// It could not be evaluated.
    fn unknown(self, error: &(dyn std::error::Error + 'static)) -> RuleResult {
        let mut text = error.to_string();
        let mut inner = error.source();
        while let Some(next) = inner {
            text = format!("{text}: {next}");
            inner = next.source();
        }
        RuleResult { asking: asking(error), ..self.failed(vec![format!("could not be evaluated: {text}")]) }
    }
}

/// Whether it was a server that was lost, or busy.
fn asking(error: &(dyn std::error::Error + 'static)) -> Asking {
    let interrupted = |cause: &(dyn std::error::Error + 'static)| {
        let refused = cause.downcast_ref().map(|error: &ConnectError| error.sqlstate().is_none_or(transient_sqlstate));
        refused
            .or_else(|| cause.downcast_ref().map(transient_query))
            .or_else(|| cause.downcast_ref().map(transient_raw))
    };
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    if causes.find_map(interrupted).unwrap_or(false) { Asking::Interrupted } else { Asking::Done }
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
        let rule = Rule::new(&instance::CONNECT_SOURCE, Level::Instance, ServerKind::Postgres);
        let result = rule.clone().unless_any(Outcome::Warning, (0..100).map(|n| n.to_string()).collect());
        assert_eq!((result.evidence.len(), result.evidence_total), (EVIDENCE_MAX, 100));
        assert_eq!((result.outcome, result.fix.as_str()), (Outcome::Warning, instance::CONNECT_SOURCE.fix));
        let fine = rule.clone().unless_any(Outcome::Warning, Vec::new());
        assert_eq!((fine.outcome, fine.fix.as_str()), (Outcome::Succeeded, ""));
        assert!(may_proceed(&[result, fine]));
        assert!(!may_proceed(&[rule.unknown(&std::fmt::Error)]), "what is unknown is not fine");
    }

    #[test]
    fn nobody_is_told_to_run_what_a_service_forbids() {
        let alter = |sql: &str| Statement { server: Side::Source, database: "d".to_owned(), sql: sql.to_owned() };
        let both = vec![alter("ALTER SYSTEM SET x = 1"), alter("GRANT a TO b"), alter("GRANT a TO b")];
        let asked = |kind| {
            let rule = Rule::new(&instance::CONNECT_SOURCE, Level::Instance, kind).mended_by(both.clone());
            rule.failed(Vec::new()).statements.len()
        };
        assert_eq!((asked(ServerKind::Postgres), asked(ServerKind::AwsRds)), (2, 1));
    }

    #[test]
    fn codes_are_used_once() {
        let mut codes: Vec<&str> = rules().map(|rule| rule.code).collect();
        let all = codes.len();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), all);
    }
}
