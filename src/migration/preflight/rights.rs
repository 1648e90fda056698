//! Rules about what the login roles may do.

use std::collections::HashSet;

use super::definition::{Apply, Definition, Hosted, When};
use super::{Outcome, RuleResult, Servers, column};
use crate::catalog::journal::Side;
use crate::config::{Ddl, ServerKind};
use crate::ident::quote_ident;
use crate::migration::schema::database_parameters;
use crate::migration::settings::Setting;
use crate::postgres::Control;

/// What all rules here are.
const RIGHT: Definition =
    Definition { apply: Apply::Refused("a role cannot give itself rights: another one has to"), ..Definition::USUAL };

const CREATE_ROLES: Definition = Definition {
    code: "create_roles",
    why: "roles and their grants are carried over before definitions that name them",
    evidence: "roles that the target does not have",
    fix: "ALTER ROLE … CREATEROLE for the target's login role, or make these roles on the target by hand",
    on: Side::Target,
    ..RIGHT
};

const ROLE_MAKERS: Definition = Definition {
    code: "role_makers",
    worst: Outcome::Warning,
    why: "from PostgreSQL 16 on CREATEROLE is not enough to alter, drop or grant a role that somebody else has made, \
          as pgcutover makes those that the target does not have: it takes the ADMIN option on the role as well",
    evidence: "roles with CREATEROLE that are no superusers, where the source is older and the target is not",
    fix: "GRANT the roles that they look after TO them WITH ADMIN OPTION, on the source before the migration or on the \
          target before the cutover",
    on: Side::Target,
    apply: Apply::ByHand,
    ..RIGHT
};

/// Without the role that asks, which is ours.
const MAKERS: &str = "\
SELECT rolname::text FROM pg_roles
 WHERE rolcreaterole AND NOT rolsuper AND rolname !~ '^pg_' AND rolname <> current_user ORDER BY 1";

/// Tried, because nothing else tells: superusers may, and from PostgreSQL 15 on who was granted it.
const REPLICA_ROLE: Definition = Definition {
    code: "session_replication_role",
    why: "triggers, rules and foreign keys of the target must not act a second time on what is copied and applied. Without the \
          right they come with the cutover, inside its pause (foreign keys are validated after it), and it cannot be rolled \
          back; with migration.ddl = \"apply\" it is a failure",
    evidence: "what the server answered",
    fix: "make the target's login role a superuser, or from PostgreSQL 15 on: GRANT SET ON PARAMETER \
          session_replication_role TO it",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "GRANT rds_superuser TO the target's login role",
        azure: "GRANT azure_pg_admin TO the target's login role, or log in as the server's administrator",
        google: "GRANT cloudsqlsuperuser (AlloyDB: alloydbsuperuser) TO the target's login role",
    },
    ..RIGHT
};

/// Neither stands for the other: the proxy knows passwords by the file, and the target's roles are made without.
const NO_VERIFIERS: &str = "list the passwords in [auth] users_file, and set the same ones on the target by hand: the \
                            service shows no verifiers";

const VERIFIERS: Definition = Definition {
    code: "password_verifiers",
    worst: Outcome::Warning,
    why: "clients are logged in to the target with what they proved to the proxy, which needs the same verifier there",
    evidence: "whether pg_authid can be read",
    fix: "GRANT SELECT ON pg_catalog.pg_authid TO the source's login role in the control database, log in as a superuser, or \
          set the same passwords on the target by hand",
    hosted: Hosted::Words { amazon: NO_VERIFIERS, azure: NO_VERIFIERS, google: NO_VERIFIERS },
    ..RIGHT
};

const SIGNAL: Definition = Definition {
    worst: Outcome::Warning,
    why: "at the cutover, or at a rollback, sessions that bypass the proxy are ended",
    evidence: "what the login role is not",
    fix: "GRANT pg_signal_backend, pg_monitor TO the login role",
    ..RIGHT
};

const SOURCE_SIGNAL: Definition = Definition { code: "source_signal", ..SIGNAL };
const TARGET_SIGNAL: Definition = Definition { code: "target_signal", on: Side::Target, ..SIGNAL };

const APPLY_DDL: Definition = Definition {
    code: "apply_ddl",
    when: When::BeforeOnline,
    why: "event triggers that carry definitions over (migration.ddl = \"apply\") add tables of every owner to the publication",
    evidence: "that the source's login role is no superuser",
    fix: "log in to the source as a superuser, or set migration.ddl to \"refuse\" (where the role may make event triggers) or to \
          \"detect\"",
    hosted: Hosted::Words {
        amazon: "set migration.ddl to \"refuse\" or \"detect\": the service has no superuser",
        azure: "set migration.ddl to \"refuse\" or \"detect\": the service has no superuser",
        google: "set migration.ddl to \"refuse\" or \"detect\": the service has no superuser",
    },
    ..RIGHT
};

const EVERYONES_SETTINGS: Definition = Definition {
    code: "settings_of_everyone",
    worst: Outcome::Warning,
    why: "what ALTER ROLE ALL has set holds in every session of the source; only a superuser may set it on the target, and a value \
          that the target has of its own stays, because other databases there live by it",
    evidence: "the settings that will not be carried over",
    fix: "ALTER ROLE ALL SET … on the target, as a superuser, or ALTER DATABASE … SET … there",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "set these parameters in the target's parameter group, or ALTER DATABASE … SET … there",
        azure: "set these server parameters of the target, or ALTER DATABASE … SET … there",
        google: "set these flags of the target, or ALTER DATABASE … SET … there",
    },
    ..RIGHT
};

const DATABASES_SETTINGS: Definition = Definition {
    code: "settings_of_databases",
    worst: Outcome::Warning,
    why: "what ALTER DATABASE … SET has set is set on the target by its login role, which may set neither the \
          parameters of superusers nor those of an application unless it is one; they are left out, and sessions go \
          without",
    evidence: "the settings that will not be carried over",
    fix: "GRANT SET ON PARAMETER … TO the target's login role (from PostgreSQL 15 on), make it a superuser, or set \
          them there as a superuser before the cutover",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "set these parameters in the target's parameter group, or have the application set its own at connect",
        azure: "set these server parameters of the target, or have the application set its own at connect",
        google: "set these flags of the target, or have the application set its own at connect",
    },
    ..RIGHT
};

/// Database, or role in a database, and setting.
const OF_DATABASES: &str = "\
SELECT CASE WHEN r.rolname IS NULL THEN '' ELSE format('ROLE %I IN ', r.rolname) END
       || format('DATABASE %I', d.datname), u
  FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase LEFT JOIN pg_roles r ON r.oid = s.setrole
 CROSS JOIN unnest(s.setconfig) AS u
 WHERE d.datname::text = ANY ($1) AND (s.setrole = 0 OR r.oid IS NOT NULL) ORDER BY 1, 2";

/// Which of the parameters $1 the login role may not set. One that is not listed belongs to a library or to an
/// application, and is a superuser's as long as nobody has said otherwise.
const REFUSED: &str = "\
SELECT p.name FROM unnest($1::text[]) AS p (name) LEFT JOIN pg_settings s ON lower(s.name) = lower(p.name)
 WHERE coalesce(s.context, 'superuser') IN ('superuser', 'superuser-backend')
   AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)";

pub(super) const DEFINITIONS: [&Definition; 9] = [
    &CREATE_ROLES,
    &ROLE_MAKERS,
    &REPLICA_ROLE,
    &VERIFIERS,
    &SOURCE_SIGNAL,
    &TARGET_SIGNAL,
    &APPLY_DDL,
    &EVERYONES_SETTINGS,
    &DATABASES_SETTINGS,
];

impl Servers<'_> {
    /// Every rule of this file that is asked now.
    pub(super) async fn rights(&self) -> Vec<RuleResult> {
        let mut results = Vec::new();
        for definition in DEFINITIONS.into_iter().filter(|definition| self.asks(definition)) {
            results.push(match definition.code {
                "create_roles" => self.create_roles().await,
                "role_makers" => self.role_makers().await,
                "session_replication_role" => self.replica_role().await,
                "password_verifiers" => self.verifiers().await,
                "apply_ddl" => self.apply_ddl().await,
                "settings_of_everyone" => self.settings_of_everyone().await,
                "settings_of_databases" => self.settings_of_databases().await,
                "source_signal" => self.signal(definition, self.source).await,
                _ => self.signal(definition, self.target).await,
            });
        }
        results
    }

    /// The login role of one server, quoted.
    pub(super) fn login(&self, side: Side) -> String {
        let connector = match side {
            Side::Source => self.preflight.source,
            Side::Target => self.preflight.target,
        };
        quote_ident(&connector.server().user)
    }

    async fn create_roles(&self) -> RuleResult {
        let grant = format!("ALTER ROLE {} CREATEROLE", self.login(Side::Target));
        let rule = self.rule(&CREATE_ROLES).mended_by(self.on_target(grant));
        let names = "SELECT rolname::text FROM pg_roles WHERE rolname !~ '^pg_'";
        let right = "SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user";
        let read = async {
            let there: HashSet<String> = column(self.target, names, &[]).await?.into_iter().collect();
            let here = column(self.source, names, &[]).await?;
            let missing = here.into_iter().filter(|name| !there.contains(name)).collect();
            let may: bool = self.target.query_one(right, &[]).await?.get(0);
            Ok::<(Vec<String>, bool), tokio_postgres::Error>((missing, may))
        };
        match read.await {
            Ok((missing, false)) => rule.unless_any(Outcome::Failed, missing),
            Ok((_, true)) => rule.succeeded(),
            Err(error) => rule.unknown(&error),
        }
    }

    async fn role_makers(&self) -> RuleResult {
        let rule = self.rule(&ROLE_MAKERS);
        if self.source.version_num() >= 160_000 || self.target.version_num() < 160_000 {
            return rule.succeeded();
        }
        match column(self.source, MAKERS, &[]).await {
            Ok(found) => rule.unless_any(Outcome::Warning, found),
            Err(error) => rule.unknown(&error),
        }
    }

    /// What lets a login role set `session_replication_role`.
    pub(super) fn replica_role_grant(&self, side: Side) -> String {
        let login = self.login(side);
        let server = match side {
            Side::Source => self.source,
            Side::Target => self.target,
        };
        match self.preflight.kind(side) {
            ServerKind::AwsRds | ServerKind::AwsAurora => format!("GRANT rds_superuser TO {login}"),
            ServerKind::Azure => format!("GRANT azure_pg_admin TO {login}"),
            ServerKind::GcpCloudSql => format!("GRANT cloudsqlsuperuser TO {login}"),
            ServerKind::GcpAlloyDb => format!("GRANT alloydbsuperuser TO {login}"),
            ServerKind::Postgres | ServerKind::Other if server.version_num() >= 150_000 => {
                format!("GRANT SET ON PARAMETER session_replication_role TO {login}")
            }
            ServerKind::Postgres | ServerKind::Other => format!("ALTER ROLE {login} SUPERUSER"),
        }
    }

    async fn replica_role(&self) -> RuleResult {
        let rule = self.rule(&REPLICA_ROLE).mended_by(self.on_target(self.replica_role_grant(Side::Target)));
        // For this statement alone, and in no transaction block: other rules use the same session meanwhile.
        let set = "SELECT pg_catalog.set_config('session_replication_role', 'replica', true)";
        match self.target.batch_execute(set).await {
            Ok(()) => rule.succeeded(),
            Err(error) => {
                let evidence =
                    error.as_db_error().map_or_else(|| error.to_string(), |refusal| refusal.message().to_owned());
                match self.preflight.config.migration.ddl {
                    Ddl::Apply => rule.failed(vec![evidence]),
                    Ddl::Refuse | Ddl::Detect => rule.answer(Outcome::Warning, vec![evidence]),
                }
            }
        }
    }

    async fn verifiers(&self) -> RuleResult {
        let grant = format!("GRANT SELECT ON pg_catalog.pg_authid TO {}", self.login(Side::Source));
        let rule = self.rule(&VERIFIERS).mended_by(self.on_source(grant));
        match self.source.query_one("SELECT has_table_privilege('pg_authid', 'SELECT')", &[]).await {
            Ok(row) => {
                let readable: bool = row.get(0);
                rule.expect(readable, Outcome::Warning, format!("pg_authid readable: {readable}"))
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn settings_of_everyone(&self) -> RuleResult {
        let rule = self.rule(&EVERYONES_SETTINGS);
        let settings =
            "SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setrole = 0 AND setdatabase = 0 ORDER BY 1";
        let superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
        let read = async {
            let here = column(self.source, settings, &[]).await?;
            let there = column(self.target, settings, &[]).await?;
            let superuser: bool = self.target.query_one(superuser, &[]).await?.get(0);
            let known = database_parameters(self.target).await?;
            Ok::<_, tokio_postgres::Error>((here, there, superuser, known))
        };
        let (here, there, superuser, known) = match read.await {
            Ok(read) => read,
            Err(error) => return rule.unknown(&error),
        };
        let there: Vec<Setting> = there.iter().filter_map(|text| Setting::parse(text)).collect();
        let stays = |setting: &Setting| {
            let has_another = there.iter().any(|other| other.name == setting.name);
            // Another rule tells of settings that the target does not know.
            let is_known = setting.is_custom() || known.contains(&setting.name.to_lowercase());
            is_known && !there.contains(setting) && (!superuser || has_another)
        };
        let left: Vec<Setting> = here.iter().filter_map(|text| Setting::parse(text)).filter(stays).collect();
        let shown = left.iter().map(Setting::clause).collect();
        let statements = left.iter().flat_map(|left| self.on_target(format!("ALTER ROLE ALL {}", left.clause())));
        rule.mended_by(statements.collect()).unless_any(Outcome::Warning, shown)
    }

    async fn settings_of_databases(&self) -> RuleResult {
        let rule = self.rule(&DATABASES_SETTINGS);
        let databases = self.preflight.databases;
        let grantable = self.target.version_num() >= 150_000;
        let refused = if grantable {
            format!("{REFUSED} AND NOT has_parameter_privilege(p.name, 'SET')")
        } else {
            REFUSED.to_owned()
        };
        let read = async {
            let there = self.target.query(OF_DATABASES, &[&databases]).await?;
            let there: HashSet<(String, String)> = there.iter().map(|row| (row.get(0), row.get(1))).collect();
            let known = database_parameters(self.target).await?;
            let mut wanted: Vec<(String, String)> = Vec::new();
            for row in self.source.query(OF_DATABASES, &[&databases]).await? {
                let (whose, text): (String, String) = (row.get(0), row.get(1));
                let Some(setting) = Setting::parse(&text) else { continue };
                // Another rule tells of settings that the target does not know.
                let is_known = setting.is_custom() || known.contains(&setting.name.to_lowercase());
                if is_known && !there.contains(&(whose.clone(), text)) {
                    wanted.push((whose, setting.name));
                }
            }
            let names: Vec<&String> = wanted.iter().map(|(_, name)| name).collect();
            let refused: HashSet<String> = column(self.target, &refused, &[&names]).await?.into_iter().collect();
            wanted.retain(|(_, name)| refused.contains(name));
            Ok::<_, tokio_postgres::Error>(wanted)
        };
        let left = match read.await {
            Ok(left) => left,
            Err(error) => return rule.unknown(&error),
        };
        let login = self.login(Side::Target);
        let grant = |name: &str| {
            if grantable {
                format!("GRANT SET ON PARAMETER {} TO {login}", quote_ident(name))
            } else {
                format!("ALTER ROLE {login} SUPERUSER")
            }
        };
        let statements = left.iter().flat_map(|(_, name)| self.on_target(grant(name))).collect();
        let shown = left.iter().map(|(whose, name)| format!("ALTER {whose} SET {}", quote_ident(name))).collect();
        rule.mended_by(statements).unless_any(Outcome::Warning, shown)
    }

    async fn apply_ddl(&self) -> RuleResult {
        let grant = format!("ALTER ROLE {} SUPERUSER", self.login(Side::Source));
        let rule = self.rule(&APPLY_DDL).mended_by(self.on_source(grant));
        if self.preflight.config.migration.ddl != Ddl::Apply {
            return rule.succeeded();
        }
        match self.source.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = current_user", &[]).await {
            Ok(row) if row.get(0) => rule.succeeded(),
            Ok(_) => rule.failed(vec![format!("{} is no superuser", self.login(Side::Source))]),
            Err(error) => rule.unknown(&error),
        }
    }

    async fn signal(&self, definition: &'static Definition, control: &Control) -> RuleResult {
        let grant = format!("GRANT pg_signal_backend, pg_monitor TO {}", self.login(definition.on));
        let rule = self.rule(definition).mended_by(vec![self.statement(definition.on, grant)]);
        let query = "SELECT rolsuper OR (pg_has_role('pg_signal_backend', 'USAGE') AND pg_has_role('pg_monitor', 'USAGE')) \
                     FROM pg_roles WHERE rolname = current_user";
        match control.query_one(query, &[]).await {
            Ok(row) if row.get(0) => rule.succeeded(),
            Ok(_) => rule.answer(Outcome::Warning, vec!["neither a superuser nor a member of both".to_owned()]),
            Err(error) => rule.unknown(&error),
        }
    }
}
