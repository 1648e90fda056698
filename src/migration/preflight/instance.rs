//! Rules about the two servers: which they are, and what they are set up with.

use std::collections::HashMap;
use std::error::Error;

use super::definition::{Apply, Definition, Hosted};
use super::{Outcome, RuleResult, Servers, Statement, column};
use crate::catalog::journal::Side;
use crate::ident::{quote_ident, quote_literal};
use crate::migration::schema::{database_parameters, find_pg_dump};
use crate::postgres::{Connector, Control};

/// Connections that a migration opens beside those of its workers.
const OWN_CONNECTIONS: i64 = 10;

/// What most rules here are.
const SERVER: Definition = Definition::USUAL;

const CONNECT: Definition = Definition {
    why: "both servers must let pgcutover in, in the control database too",
    evidence: "the version and whether the link is encrypted, or what the server answered",
    fix: "check address, user, password and sslmode of this server, its pg_hba.conf, and control.database",
    hosted: Hosted::Words {
        amazon: "check address, user, password and sslmode, the security group and the parameter rds.force_ssl",
        azure: "check address, user, password and sslmode, and the firewall rules or the virtual network of the server",
        google: "check address, user, password and sslmode, and the authorized networks or the private address",
    },
    ..SERVER
};

pub(super) const CONNECT_SOURCE: Definition = Definition { code: "connect_source", ..CONNECT };
pub(super) const CONNECT_TARGET: Definition = Definition { code: "connect_target", on: Side::Target, ..CONNECT };

const VERSION: Definition = Definition {
    code: "version",
    why: "logical decoding by pgoutput came with PostgreSQL 10, and definitions are not written for older servers",
    evidence: "both majors",
    fix: "use a source of version 10 or newer and a target that is not older than it",
    on: Side::Target,
    ..SERVER
};

const PRIMARY: Definition = Definition {
    why: "a standby takes no writes, and a snapshot taken there does not fit the stream",
    evidence: "that the server is in recovery",
    fix: "name the primary in the configuration, or promote the standby: SELECT pg_promote()",
    apply: Apply::Refused("a promoted standby no longer follows its primary"),
    ..SERVER
};

const SOURCE_PRIMARY: Definition = Definition { code: "source_primary", ..PRIMARY };
const TARGET_PRIMARY: Definition = Definition { code: "target_primary", on: Side::Target, ..PRIMARY };

const TARGET_WRITABLE: Definition = Definition {
    code: "target_writable",
    worst: Outcome::Warning,
    why: "the application's transactions would be read-only on the target after the cutover; services set this when a disk is \
          full",
    evidence: "where default_transaction_read_only is on",
    fix: "ALTER SYSTEM RESET default_transaction_read_only on the target and reload it; give it more storage if that was why",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "set default_transaction_read_only to 0 in the parameter group",
        azure: "give the server more storage: it is read-only while less than 5 % are free",
        google: "give the instance more storage, or set the flag default_transaction_read_only to off",
    },
    apply: Apply::Since(0),
    ..SERVER
};

const PG_DUMP: Definition = Definition {
    code: "pg_dump",
    why: "definitions are dumped by pg_dump, which must be at least as new as the source; only one as new as the target can \
          compare the two in the end",
    evidence: "the one that was found and its version",
    fix: "install the client package of the target's version on the host of pgcutover, or set migration.bindir",
    ..SERVER
};

const CONNECTIONS: Definition = Definition {
    worst: Outcome::Warning,
    why: "copying, building indexes and streaming each have connections of their own, beside the application's; after the \
          cutover every session of the source has one on the target",
    evidence: "connections that are free, and how many are needed",
    fix: "raise max_connections and restart the server, or lower migration.copy_workers and index_workers",
    hosted: Hosted::Parameter("max_connections"),
    apply: Apply::Refused("the server has to be restarted for it"),
    ..SERVER
};

const SOURCE_CONNECTIONS: Definition = Definition { code: "source_connections", ..CONNECTIONS };
const TARGET_CONNECTIONS: Definition = Definition { code: "target_connections", on: Side::Target, ..CONNECTIONS };

const PRELOAD_LIBRARIES: Definition = Definition {
    code: "shared_preload_libraries",
    worst: Outcome::Warning,
    why: "extensions that must be preloaded do not work, or cannot be created, without",
    evidence: "libraries that the source preloads and the target does not",
    fix: "add these libraries to shared_preload_libraries of the target and restart it, or drop their use",
    on: Side::Target,
    hosted: Hosted::Parameter("shared_preload_libraries"),
    apply: Apply::Refused("the target has to be restarted for it, and does not start without the library"),
    ..SERVER
};

const UNKNOWN_SETTINGS: Definition = Definition {
    code: "unknown_settings",
    worst: Outcome::Warning,
    why: "ALTER DATABASE … SET and ALTER ROLE … SET of parameters that the target does not know, or of values that it \
          does not take, are left out",
    evidence: "the parameters",
    fix: "look up what replaced them in the target's release notes, and RESET them on the source if nothing is lost",
    apply: Apply::Refused("it changes how the application's sessions run on the source"),
    ..SERVER
};

const SERVER_PARAMETERS: Definition = Definition {
    code: "server_parameters",
    worst: Outcome::Warning,
    why: "these parameters change what statements mean, show or are allowed to do, and the servers differ in them",
    evidence: "each parameter with its value on the source and on the target",
    fix: "ALTER SYSTEM SET the source's value on the target, then SELECT pg_reload_conf(); some take a restart",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "set the source's values in the target's parameter group",
        azure: "set the source's values as server parameters of the target",
        google: "set the source's values as database flags of the target",
    },
    apply: Apply::Since(0),
    ..SERVER
};

const WORKER_PROCESSES: Definition = Definition {
    code: "worker_processes",
    worst: Outcome::Warning,
    why: "parallel queries, parallel index builds and workers of extensions take their processes from this number; a target \
          with fewer is slower, and the last extension to start finds none",
    evidence: "max_worker_processes of both",
    fix: "raise max_worker_processes of the target to that of the source, and restart it",
    on: Side::Target,
    hosted: Hosted::Parameter("max_worker_processes"),
    apply: Apply::Refused("the target has to be restarted for it"),
    ..SERVER
};

const CONTROL_DATABASE: Definition = Definition {
    code: "control_database",
    why: "the control database holds the decisions of cutovers, so it cannot be dropped and made again",
    evidence: "its name",
    fix: "set control.database to another database, or migrate this one without overwriting",
    on: Side::Target,
    ..SERVER
};

pub(super) const DEFINITIONS: [&Definition; 12] = [
    &VERSION,
    &SOURCE_PRIMARY,
    &TARGET_PRIMARY,
    &TARGET_WRITABLE,
    &PG_DUMP,
    &SOURCE_CONNECTIONS,
    &TARGET_CONNECTIONS,
    &PRELOAD_LIBRARIES,
    &UNKNOWN_SETTINGS,
    &SERVER_PARAMETERS,
    &WORKER_PROCESSES,
    &CONTROL_DATABASE,
];

/// Parameters that are not tried: they would change our session, or name what is in a database or on a server, which
/// ALTER ROLE and ALTER DATABASE take for what will be there one day.
const UNTRIED: [&str; 6] = [
    "client_encoding",
    "default_table_access_method",
    "default_tablespace",
    "default_text_search_config",
    "role",
    "session_authorization",
];

/// Parameters of which only a smaller value on the target matters.
const AT_LEAST: [&str; 2] = ["max_locks_per_transaction", "max_prepared_transactions"];

/// Parameters that are compared. What a newer major has another default for is left out unless somebody set it.
const COMPARED: [&str; 30] = [
    "array_nulls",
    "backslash_quote",
    "bytea_output",
    "DateStyle",
    "default_text_search_config",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "extra_float_digits",
    "IntervalStyle",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "lock_timeout",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "quote_all_identifiers",
    "row_security",
    "search_path",
    "standard_conforming_strings",
    "statement_timeout",
    "synchronous_commit",
    "TimeZone",
    "track_commit_timestamp",
    "transaction_timeout",
    "transform_null_equals",
    "xmlbinary",
    "xmloption",
    "default_transaction_read_only",
];

/// The settings of a session whose search_path is anybody's: it names no operator, cast or function that could be
/// looked up there.
const SETTINGS: &str = "SELECT name, setting, boot_val, context, source FROM pg_catalog.pg_settings";

/// Sources of values that are not the server's: what is set for a role or a database is carried over with it.
const NOT_THE_SERVERS: [&str; 3] = ["user", "database", "database user"];

/// A parameter as a session finds it that sets none itself.
pub(super) struct Parameter {
    pub(super) value: String,
    chosen: bool,
    restart: bool,
}

impl Servers<'_> {
    /// Every rule of this file that is asked now.
    pub(super) async fn instance(&self) -> Vec<RuleResult> {
        let mut results = Vec::new();
        for definition in DEFINITIONS {
            if self.asks(definition) {
                results.push(self.instance_rule(definition).await);
            }
        }
        results
    }

    async fn instance_rule(&self, definition: &'static Definition) -> RuleResult {
        match definition.code {
            "version" => self.version(),
            "source_primary" => self.primary(definition, self.source).await,
            "target_primary" => self.primary(definition, self.target).await,
            "target_writable" => self.writable().await,
            "pg_dump" => self.pg_dump().await,
            "source_connections" => self.connections(definition, self.source).await,
            "target_connections" => self.connections(definition, self.target).await,
            "shared_preload_libraries" => self.preload_libraries().await,
            "unknown_settings" => self.unknown_settings().await,
            "server_parameters" => self.server_parameters().await,
            "worker_processes" => self.worker_processes().await,
            _ => self.control_database(),
        }
    }

    fn version(&self) -> RuleResult {
        let (from, to) = (self.source.version_num() / 10_000, self.target.version_num() / 10_000);
        let evidence = format!("source {from}, target {to}");
        self.rule(&VERSION).expect(from >= 10 && to >= from, Outcome::Failed, evidence)
    }

    async fn primary(&self, definition: &'static Definition, control: &Control) -> RuleResult {
        let promote = if control.version_num() >= 120_000 {
            vec![self.statement(definition.on, "SELECT pg_catalog.pg_promote()")]
        } else {
            Vec::new()
        };
        let rule = self.rule(definition).mended_by(promote);
        match control.query_one("SELECT pg_is_in_recovery()", &[]).await {
            Ok(row) if row.get(0) => rule.failed(vec![format!("the {} is in recovery", definition.on)]),
            Ok(_) => rule.succeeded(),
            Err(error) => rule.unknown(&error),
        }
    }

    async fn writable(&self) -> RuleResult {
        let rule = self.rule(&TARGET_WRITABLE);
        let settings = "SELECT coalesce('database ' || quote_ident(d.datname), 'all databases') FROM pg_db_role_setting s \
                        LEFT JOIN pg_database d ON d.oid = s.setdatabase WHERE s.setrole = 0 \
                        AND (d.datname IS NULL OR d.datname::text = ANY ($1)) \
                        AND EXISTS (SELECT FROM unnest(s.setconfig) u \
                        WHERE CASE lower(split_part(u, '=', 1)) WHEN 'default_transaction_read_only' THEN split_part(u, '=', 2)::boolean END)";
        let mut found = match column(self.target, settings, &[&self.preflight.databases]).await {
            Ok(found) => found,
            Err(error) => return rule.unknown(&error),
        };
        let mut statements: Vec<Statement> = found
            .iter()
            .filter_map(|place| place.strip_prefix("database "))
            .map(|name| format!("ALTER DATABASE {name} RESET default_transaction_read_only"))
            .map(|sql| self.statement(Side::Target, sql))
            .collect();
        match self.parameters(self.preflight.target).await {
            Ok(all) if all.get("default_transaction_read_only").is_some_and(|parameter| parameter.value == "on") => {
                found.push("the server's configuration".to_owned());
                statements.extend(self.on_target("ALTER SYSTEM SET default_transaction_read_only = off"));
                statements.extend(self.on_target("SELECT pg_catalog.pg_reload_conf()"));
            }
            Ok(_) => {}
            Err(error) => return rule.unknown(&*error),
        }
        rule.mended_by(statements).unless_any(Outcome::Warning, found)
    }

    async fn pg_dump(&self) -> RuleResult {
        let rule = self.rule(&PG_DUMP);
        let (from, to) = (self.source.version_num() / 10_000, self.target.version_num() / 10_000);
        match find_pg_dump(&self.preflight.config.migration, from, to).await {
            Ok(found) => {
                let evidence = format!("{} is version {}", found.path.display(), found.major);
                rule.expect(found.major >= to, Outcome::Warning, evidence)
            }
            Err(error) => rule.failed(vec![error.to_string()]),
        }
    }

    async fn connections(&self, definition: &'static Definition, control: &Control) -> RuleResult {
        let rule = self.rule(definition);
        let workers = self.preflight.config.migration.copy_workers + self.preflight.config.migration.index_workers;
        let query = "SELECT current_setting('max_connections')::int8, current_setting('superuser_reserved_connections')::int8, \
                     (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL)";
        // What kind of process one of another role is, only pg_monitor is shown; they all have a role and a database.
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE (backend_type = 'client backend' \
                        OR backend_type IS NULL AND datid IS NOT NULL AND usesysid IS NOT NULL) \
                        AND application_name !~ '^pgcutover/'";
        let read = async {
            let row = control.query_one(query, &[]).await?;
            // Those of the source come to the target.
            let moved: i64 = match definition.on {
                Side::Source => 0,
                Side::Target => self.source.query_one(sessions, &[]).await?.get(0),
            };
            Ok::<_, tokio_postgres::Error>((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2), moved))
        };
        match read.await {
            Ok((most, reserved, used, moved)) => {
                let needed = i64::try_from(workers).unwrap_or(i64::MAX).saturating_add(OWN_CONNECTIONS + moved);
                let free = most - reserved - used;
                let enough = used + reserved + needed + OWN_CONNECTIONS;
                let raise = format!("ALTER SYSTEM SET max_connections = {enough}");
                let rule = rule.mended_by(vec![self.statement(definition.on, raise)]);
                rule.expect(free >= needed, Outcome::Warning, format!("{free} free, up to {needed} used"))
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn preload_libraries(&self) -> RuleResult {
        let rule = self.rule(&PRELOAD_LIBRARIES);
        let query = "SELECT btrim(btrim(u), '\"') FROM unnest(string_to_array(current_setting('shared_preload_libraries'), ',')) u \
                     WHERE btrim(u) <> ''";
        let read = async {
            let there = column(self.target, query, &[]).await?;
            let here = column(self.source, query, &[]).await?;
            let missing: Vec<String> = here.into_iter().filter(|name| !there.contains(name)).collect();
            Ok::<_, tokio_postgres::Error>((there, missing))
        };
        match read.await {
            Ok((there, missing)) => {
                let all: Vec<String> = there.iter().chain(&missing).map(|name| quote_literal(name)).collect();
                let set = format!("ALTER SYSTEM SET shared_preload_libraries = {}", all.join(", "));
                rule.mended_by(self.on_target(set)).unless_any(Outcome::Warning, missing)
            }
            // Only pg_read_all_settings may look; an extension that needs a library fails by itself.
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) => {
                rule.answer(Outcome::Warning, vec!["not allowed to read shared_preload_libraries".to_owned()])
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn unknown_settings(&self) -> RuleResult {
        let rule = self.rule(&UNKNOWN_SETTINGS);
        let query = "SELECT lower(split_part(u, '=', 1)), format('ALTER %s RESET %I', \
                     CASE WHEN r.rolname IS NULL AND d.datname IS NULL THEN 'ROLE ALL' \
                          WHEN r.rolname IS NULL THEN 'DATABASE ' || quote_ident(d.datname) \
                          ELSE 'ROLE ' || quote_ident(r.rolname) || coalesce(' IN DATABASE ' || quote_ident(d.datname), '') END, \
                     split_part(u, '=', 1)), substr(u, strpos(u, '=') + 1) \
                     FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole \
                     LEFT JOIN pg_database d ON d.oid = s.setdatabase CROSS JOIN unnest(s.setconfig) u ORDER BY 1, 2";
        let read = async {
            let known = database_parameters(self.target).await?;
            let mut found: Vec<(String, String)> = Vec::new();
            for row in self.source.query(query, &[]).await? {
                let (name, reset, value): (String, String, String) = (row.get(0), row.get(1), row.get(2));
                if name.contains('.') {
                    continue;
                }
                if !known.contains(&name) {
                    found.push((name, reset));
                } else if self.refuses(&name, &value).await? {
                    found.push((format!("a value of {name}"), reset));
                }
            }
            Ok::<Vec<(String, String)>, tokio_postgres::Error>(found)
        };
        match read.await {
            Ok(unknown) => {
                let (mut names, reset): (Vec<String>, Vec<String>) = unknown.into_iter().unzip();
                names.dedup();
                let statements = reset.into_iter().map(|sql| self.statement(Side::Source, sql)).collect();
                rule.mended_by(statements).unless_any(Outcome::Warning, names)
            }
            Err(error) => rule.unknown(&error),
        }
    }

    /// Whether the target says that the parameter cannot have this value.
    async fn refuses(&self, name: &str, value: &str) -> Result<bool, tokio_postgres::Error> {
        if UNTRIED.contains(&name) {
            return Ok(false);
        }
        // For this statement alone, and in no transaction block: other rules use the same session meanwhile.
        let set = "SELECT pg_catalog.set_config($1, $2, true)";
        match self.target.query_one(set, &[&name, &value]).await {
            Ok(_) => Ok(false),
            // What may not be set here and now is no matter.
            Err(error) => match error.code() {
                Some(code) => Ok(*code == tokio_postgres::error::SqlState::INVALID_PARAMETER_VALUE),
                None => Err(error),
            },
        }
    }

    /// What a session of any role in any database finds that does not set anything itself, unlike ours; without what the
    /// login role or the control database has a value of its own for.
    pub(super) async fn parameters(
        &self,
        server: &Connector,
    ) -> Result<HashMap<String, Parameter>, Box<dyn Error + Send + Sync>> {
        let mut login = server.own_login(&self.preflight.config.control.database, "validation");
        login.parameters.retain(|(name, _)| name != "options");
        let mut connection = Box::pin(server.raw(&login)).await?;
        let rows = connection.simple_query(SETTINGS).await?;
        // The answer is here; how the session ends does not matter.
        let _ended = connection.terminate().await;
        let parameter = |row: Vec<Option<String>>| {
            let [name, value, default, context, source] = <[Option<String>; 5]>::try_from(row).ok()?;
            let (name, chosen, restart) = (name?, value != default, context? == "postmaster");
            let compared = COMPARED.contains(&name.as_str()) && !NOT_THE_SERVERS.contains(&source?.as_str());
            Some((name, Parameter { value: value?, chosen, restart })).filter(|_| compared)
        };
        Ok(rows.into_iter().filter_map(parameter).collect())
    }

    async fn server_parameters(&self) -> RuleResult {
        let rule = self.rule(&SERVER_PARAMETERS);
        let read = async {
            Ok::<_, Box<dyn Error + Send + Sync>>((
                self.parameters(self.preflight.source).await?,
                self.parameters(self.preflight.target).await?,
            ))
        };
        let (source, target) = match read.await {
            Ok(both) => both,
            Err(error) => return rule.unknown(&*error),
        };
        let mut differ: Vec<(&String, &Parameter, &Parameter)> = source
            .iter()
            .filter(|(name, _)| *name != "default_transaction_read_only")
            .filter_map(|(name, here)| Some((name, here, target.get(name)?)))
            .filter(|(name, here, there)| {
                let number = |text: &str| text.parse::<i64>().unwrap_or(0);
                let less = number(&there.value) < number(&here.value);
                here.value != there.value
                    && (here.chosen || there.chosen)
                    && (less || !AT_LEAST.contains(&name.as_str()))
            })
            .collect();
        differ.sort_by_key(|(name, ..)| *name);
        let shown = differ.iter().map(|(name, here, there)| {
            let restart = if there.restart { " (takes a restart)" } else { "" };
            format!("{name}: source {}, target {}{restart}", here.value, there.value)
        });
        let mut statements: Vec<Statement> = differ
            .iter()
            // A list of names is not one literal.
            .filter(|(name, ..)| *name != "search_path")
            .map(|(name, here, _)| format!("ALTER SYSTEM SET {} = {}", quote_ident(name), quote_literal(&here.value)))
            .map(|sql| self.statement(Side::Target, sql))
            .collect();
        statements.extend(self.on_target("SELECT pg_catalog.pg_reload_conf()"));
        let shown = shown.collect();
        rule.mended_by(statements).unless_any(Outcome::Warning, shown)
    }

    async fn worker_processes(&self) -> RuleResult {
        let rule = self.rule(&WORKER_PROCESSES);
        let query = "SELECT current_setting('max_worker_processes')::int8";
        let read = async {
            let source: i64 = self.source.query_one(query, &[]).await?.get(0);
            let target: i64 = self.target.query_one(query, &[]).await?.get(0);
            Ok::<_, tokio_postgres::Error>((source, target))
        };
        match read.await {
            Ok((source, target)) => {
                let raise = format!("ALTER SYSTEM SET max_worker_processes = {source}");
                let evidence = format!("source {source}, target {target}");
                rule.mended_by(self.on_target(raise)).expect(target >= source, Outcome::Warning, evidence)
            }
            Err(error) => rule.unknown(&error),
        }
    }

    fn control_database(&self) -> RuleResult {
        let control = &self.preflight.config.control.database;
        let hit = self.preflight.overwrite_target && self.preflight.databases.contains(control);
        let found = if hit { vec![control.clone()] } else { Vec::new() };
        self.rule(&CONTROL_DATABASE).unless_any(Outcome::Failed, found)
    }
}
