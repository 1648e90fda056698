//! Rules about one database.

use std::collections::HashMap;

use super::definition::{Apply, Definition, Hosted, Subject, When};
use super::{Level, Outcome, Rule, RuleResult, Servers, Statement, column, findings, objects};
use crate::catalog::journal::Side;
use crate::ident::quote_ident;
use crate::migration::identity::{self, Remedy};
use crate::postgres::Control;

/// Tables that are migrated: what [`crate::migration::copy::list_tables`] lists, near enough for a rule.
pub(super) const OURS: &str = "n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_'";

/// A rule that is a query for what must not be there.
pub(super) struct Finding {
    pub(super) definition: Definition,
    /// First and last version of the source that it applies to.
    pub(super) versions: (u32, u32),
    /// Where it does not matter.
    pub(super) unless: Unless,
    /// How it comes out where the target's login role is a superuser; none: as everywhere.
    pub(super) to_superusers: Option<Outcome>,
    /// Yields a text for each finding, and the statement that mends it or null; `{ours}` stands for [`OURS`].
    pub(super) query: &'static str,
}

/// Where a finding does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unless {
    /// It always does.
    Never,
    /// The target's login role may do everything.
    TargetSuperuser,
}

impl Finding {
    /// What is not said of a definition.
    pub(super) const DEFINITION: Definition = DATABASE;

    /// What is not said of a finding.
    pub(super) const OF_EVERY_VERSION: Self =
        Self { definition: DATABASE, versions: (0, u32::MAX), unless: Unless::Never, to_superusers: None, query: "" };
}

const DATABASE: Definition = Definition { subject: Subject::Database, ..Definition::USUAL };

const EXISTS: Definition = Definition {
    code: "database_exists",
    why: "what is migrated must be there",
    evidence: "what the server answered",
    fix: "check the name; a template, or a database that allows no connections, cannot be migrated",
    ..DATABASE
};

const TARGET_EMPTY: Definition = Definition {
    code: "target_empty",
    why: "rows and definitions that are there already would be mixed with those of the source",
    evidence: "tables, views and sequences of the target",
    fix: "DROP DATABASE … on the target, or create the migration with --overwrite-target",
    on: Side::Target,
    apply: Apply::Refused("what is in it would be lost"),
    ..DATABASE
};

const IDENTITY: Definition = Definition {
    code: "replica_identity",
    when: When::Repeatedly,
    why: "UPDATE and DELETE of a published table without a replica identity fail in the application",
    evidence: "the tables",
    fix: "add primary keys, or ALTER TABLE … REPLICA IDENTITY FULL; with migration.without_identity = \"full\" that is set \
          meanwhile",
    apply: Apply::Since(0),
    ..DATABASE
};

const EXTENSIONS: Definition = Definition {
    code: "extensions",
    why: "definitions that use an extension need it on the target",
    evidence: "extensions that the target does not have or allow, or has in a version that is not newer",
    fix: "install the extension's package, of a version that is not older, on the target's host, or DROP EXTENSION on the source",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "add it to rds.allowed_extensions of the target's parameter group; what the service does not offer must be \
                 dropped on the source",
        azure: "add it to the target's server parameter azure.extensions; what the service does not offer must be dropped on \
                the source",
        google: "set the target's flag for it (such as cloudsql.enable_pg_cron); what the service does not offer must be \
                 dropped on the source",
    },
    ..DATABASE
};

const TABLESPACES: Definition = Definition {
    code: "tablespaces",
    why: "definitions name the tablespaces that their tables and indexes are in",
    evidence: "tablespaces that the target does not have",
    fix: "CREATE TABLESPACE … with the same names on the target",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "CREATE TABLESPACE … with the same names on the target: the service accepts any LOCATION",
        azure: "the service has no tablespaces: move the tables, ALTER TABLE … SET TABLESPACE pg_default",
        google: "the service has no tablespaces: move the tables, ALTER TABLE … SET TABLESPACE pg_default",
    },
    ..DATABASE
};

pub(super) const DEFINITIONS: [&Definition; 5] = [&EXISTS, &TARGET_EMPTY, &IDENTITY, &EXTENSIONS, &TABLESPACES];

/// One database that is asked for.
pub(super) struct Database<'a> {
    pub(super) servers: &'a Servers<'a>,
    pub(super) name: &'a str,
    /// In it, on the source.
    pub(super) session: Control,
    target_superuser: bool,
}

/// Every rule of one database that is asked now.
pub(super) async fn check(servers: &Servers<'_>, name: &str) -> Vec<RuleResult> {
    let exists = Rule::new(&EXISTS, Level::Database(name.to_owned()), servers.preflight.kind(Side::Source));
    let session = match servers.preflight.session(Side::Source, name).await {
        Ok(session) => session,
        Err(error) => return vec![exists.not_connected(&error)],
    };
    let superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
    // Where it cannot be asked, every rule that needs the answer finds what it looks for.
    let target_superuser = servers.target.query_one(superuser, &[]).await.is_ok_and(|row| row.get(0));
    let database = Database { servers, name, session, target_superuser };
    if !servers.asks(&EXISTS) {
        return database.findings().await;
    }
    let others = async {
        let mut results = vec![exists.succeeded()];
        results.extend(database.target().await);
        results.push(database.collations().await);
        results.push(database.extensions().await);
        results.push(database.tablespaces().await);
        results.extend(database.unknown().await);
        results.extend(database.unstreamed().await);
        results.push(database.scheduled_jobs().await);
        results.push(database.extension_tables().await);
        (results, database.findings().await)
    };
    // It watches for a while, which is time enough for the others.
    let (forecast, (mut results, findings)) = tokio::join!(database.forecast(), others);
    results.push(forecast);
    results.extend(findings);
    results
}

impl Database<'_> {
    async fn findings(&self) -> Vec<RuleResult> {
        let mut results = Vec::new();
        for finding in findings::FINDINGS.iter().chain(objects::FINDINGS) {
            if self.servers.asks(&finding.definition) {
                results.push(self.find(finding).await);
            }
        }
        if self.servers.asks(&IDENTITY) {
            results.push(self.identities().await);
        }
        results
    }

    pub(super) fn rule(&self, definition: &'static Definition) -> Rule {
        let kind = self.servers.preflight.kind(definition.on);
        Rule::new(definition, Level::Database(self.name.to_owned()), kind)
    }

    /// A statement in this database of the source.
    pub(super) fn statement(&self, sql: impl Into<String>) -> Statement {
        Statement { server: Side::Source, database: self.name.to_owned(), sql: sql.into() }
    }

    /// Removes this database of the target.
    pub(super) fn drop_database(&self) -> Vec<Statement> {
        self.servers.on_target(format!("DROP DATABASE {}", quote_ident(self.name)))
    }

    async fn find(&self, finding: &'static Finding) -> RuleResult {
        let rule = self.rule(&finding.definition);
        let (first, last) = finding.versions;
        let matters = match finding.unless {
            Unless::Never => true,
            Unless::TargetSuperuser => !self.target_superuser,
        };
        if !matters || !(first..=last).contains(&self.session.version_num()) {
            return rule.succeeded();
        }
        match self.session.query(finding.query.replace("{ours}", OURS).as_str(), &[]).await {
            Ok(rows) => {
                let statements = rows.iter().filter_map(|row| row.get::<_, Option<String>>(1));
                let statements = statements.map(|sql| self.statement(sql)).collect();
                let found = rows.iter().map(|row| row.get(0)).collect();
                let outcome = finding.to_superusers.filter(|_| self.target_superuser);
                rule.mended_by(statements).unless_any(outcome.unwrap_or(finding.definition.worst), found)
            }
            Err(error) => rule.unknown(&error),
        }
    }

    /// Whether something is in the target's database.
    pub(super) async fn is_empty(&self) -> RuleResult {
        let rule = self.rule(&TARGET_EMPTY).mended_by(self.drop_database());
        let query = format!(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE {OURS} AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass \
             AND d.objid = c.oid AND d.deptype = 'e') \
             UNION ALL SELECT 'large object ' || oid FROM pg_largeobject_metadata ORDER BY 1"
        );
        match self.servers.preflight.session(Side::Target, self.name).await {
            Err(error) => rule.not_connected(&error),
            Ok(session) => match column(&session, &query, &[]).await {
                Ok(found) => rule.unless_any(Outcome::Failed, found),
                Err(error) => rule.unknown(&error),
            },
        }
    }

    /// There is no such database on the target, or it will be dropped.
    pub(super) fn will_be_empty(&self, exists: bool) -> RuleResult {
        let evidence = format!("the target's database {} will be dropped", quote_ident(self.name));
        let found = if exists { vec![evidence] } else { Vec::new() };
        self.rule(&TARGET_EMPTY).unless_any(Outcome::Warning, found)
    }

    async fn identities(&self) -> RuleResult {
        let rule = self.rule(&IDENTITY);
        match identity::plan(&self.session, self.servers.preflight.config.migration.without_identity).await {
            Ok(mut plan) => {
                plan.retain(|table| table.remedy != Remedy::Nothing);
                let refused = plan.iter().any(|table| table.remedy == Remedy::Refuse);
                let full = |table| self.statement(format!("ALTER TABLE {table} REPLICA IDENTITY FULL"));
                let rule = rule.mended_by(plan.iter().map(|table| full(&table.table)).collect());
                let outcome = if refused { Outcome::Failed } else { Outcome::Warning };
                rule.unless_any(outcome, plan.iter().map(|table| table.table.to_string()).collect())
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn extensions(&self) -> RuleResult {
        let rule = self.rule(&EXTENSIONS);
        let used = "SELECT extname::text, extversion FROM pg_extension ORDER BY 1";
        let there = "SELECT name::text, default_version FROM pg_available_extensions";
        // Services keep lists of what may be created.
        // An empty one, which is what Azure begins with, allows none.
        let allowed = "SELECT name, string_to_array(lower(replace(current_setting(name, true), ' ', '')), ',') \
                       FROM unnest(ARRAY['azure.extensions', 'rds.allowed_extensions']) AS name \
                       WHERE current_setting(name, true) <> '*'";
        let target = self.servers.target;
        let read = async {
            let there: HashMap<String, Option<String>> =
                target.query(there, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
            let allowed: Vec<(String, Vec<String>)> =
                target.query(allowed, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
            let (mut missing, mut older, mut other) = (Vec::new(), Vec::new(), Vec::new());
            for row in self.session.query(used, &[]).await? {
                let (extension, version): (String, String) = (row.get(0), row.get(1));
                let forbids = |(_, list): &&(String, Vec<String>)| extension != "plpgsql" && !list.contains(&extension);
                match (there.get(&extension), allowed.iter().find(forbids)) {
                    (None, _) => missing.push(format!("{extension} {version}")),
                    (Some(_), Some((list, _))) => missing.push(format!("{extension} is not in {list}")),
                    (Some(Some(default)), None) if *default != version => {
                        let list = if is_newer(default, &version) { &mut other } else { &mut older };
                        list.push(format!("{extension}: {version} on the source, {default} on the target"));
                    }
                    (Some(_), None) => {}
                }
            }
            Ok::<[Vec<String>; 3], tokio_postgres::Error>([missing, older, other])
        };
        match read.await {
            // A newer version is what a newer major has; it is worth knowing and nothing more.
            Ok([missing, older, other]) if missing.is_empty() && older.is_empty() => rule.noted(other),
            Ok([missing, older, _]) => {
                let outcome = if missing.is_empty() { Outcome::Warning } else { Outcome::Failed };
                rule.answer(outcome, missing.into_iter().chain(older).collect())
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn tablespaces(&self) -> RuleResult {
        let rule = self.rule(&TABLESPACES);
        let used = "SELECT DISTINCT t.spcname::text FROM pg_tablespace t JOIN pg_class c ON c.reltablespace = t.oid \
                    WHERE t.spcname !~ '^pg_' ORDER BY 1";
        let read = async {
            let there = column(self.servers.target, "SELECT spcname::text FROM pg_tablespace", &[]).await?;
            let used = column(&self.session, used, &[]).await?;
            Ok::<Vec<String>, tokio_postgres::Error>(used.into_iter().filter(|space| !there.contains(space)).collect())
        };
        match read.await {
            Ok(missing) => rule.unless_any(Outcome::Failed, missing),
            Err(error) => rule.unknown(&error),
        }
    }
}

/// Whether version `there` of an extension comes after `here`: by their numbers, which is how nearly all are named. What
/// cannot be told is not newer.
fn is_newer(there: &str, here: &str) -> bool {
    let numbers = |version: &str| -> Vec<u64> {
        version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    numbers(there) > numbers(here)
}

#[cfg(test)]
mod tests {
    use super::is_newer;

    #[test]
    fn versions_of_extensions_are_compared_by_their_numbers() {
        for (there, here) in [("1.10", "1.9"), ("3.4.2", "3.4"), ("2.14.0-dev", "2.9.1")] {
            assert!(is_newer(there, here) && !is_newer(here, there), "{there} after {here}");
        }
        assert!(!is_newer("unpackaged", "1.0") && !is_newer("1.0", "1.0"));
    }
}
