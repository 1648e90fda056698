//! Roles, memberships, settings, rights on parameters and password verifiers: shared objects that no dump of a database and no stream carries.
//!
//! The proxy logs a client in to either server with what the client itself proved, so a role's verifier must be the same
//! on both. Verifiers never reach a log, an error or the journal.

mod parameters;

use std::collections::HashSet;

use tokio_postgres::Row;

use crate::catalog::journal::{MadeObject, Side};
use crate::config::Secret;
use crate::ident::{quote_ident, quote_literal};
use crate::migration::made::{self, Journal, JournalError};
use crate::migration::schema::database_parameters;
use crate::migration::settings::Setting;
use crate::postgres::{ConnectError, Connector, Control};
use crate::sqlstate;

/// What became of one role.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RoleReport {
    /// The role.
    pub role: String,
    /// What was done.
    pub action: RoleAction,
    /// What the operator should know: attributes that could not be given, verifiers that differ and stay.
    pub warnings: Vec<String>,
}

/// What was done with a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoleAction {
    /// It was the same already.
    Unchanged,
    /// It was made.
    Created,
    /// Attributes, verifier, memberships or settings were brought in line.
    Altered,
}

/// Roles could not be carried over.
#[derive(Debug, thiserror::Error)]
pub enum RolesError {
    /// No session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A catalogue could not be read.
    #[error("the roles of the {server} could not be read")]
    Read {
        /// `source` or `target`.
        server: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// A role could not be made or altered.
    #[error(
        "role {role} could not be {doing} on the target; give the target's login role the right to, or make the role by hand"
    )]
    Write {
        /// The role.
        role: String,
        /// `created`, `altered`, …
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Waits until nobody else brings roles over.
const ONE_AT_A_TIME: &str = "SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtext('pgcutover roles'))";

/// Brings the target's roles in line with the source's: every role whose name does not start with `pg_`, its attributes,
/// verifier (where it can be read), memberships, settings and rights on parameters. Settings of a role in a database come with
/// [`super::schema::create_database`]. Idempotent.
pub async fn copy_roles(
    source: &Connector,
    target: &Connector,
    journal: &dyn Journal,
) -> Result<Vec<RoleReport>, RolesError> {
    let from = source.control(&maintenance_database(source).await?, "roles").await?;
    let to = target.control(&maintenance_database(target).await?, "roles").await?;
    let read = |server: &Connector| {
        let server = server.label().to_owned();
        move |source| RolesError::Read { server, source }
    };
    let wanted = Roles::read(&from).await.map_err(read(source))?;
    // Roles are the server's, and several migrations may begin at the same time. Held until the session ends.
    to.batch_execute(ONE_AT_A_TIME).await.map_err(read(target))?;
    let found = Roles::read(&to).await.map_err(read(target))?;
    let superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
    let superuser: bool = to.query_one(superuser, &[]).await.map_err(read(target))?.get(0);
    quiet(&to).await;
    let mut writer = Writer {
        control: &to,
        journal,
        own: &target.server().user,
        known: database_parameters(&to).await.map_err(read(target))?,
        found,
        verifiers_readable: wanted.verifiers_readable,
    };
    let mut reports = Vec::new();
    for role in &wanted.roles {
        let mut report = writer.role(role).await?;
        if !superuser && !role.attributes.superuser {
            writer.join(&role.name).await?.note(&mut report);
        }
        reports.push(report);
    }
    for membership in &wanted.memberships {
        let done = writer.membership(membership).await?;
        if let Some(report) = reports.iter_mut().find(|report| report.role == membership.member) {
            done.note(report);
        }
    }
    parameters::copy(&from, &to, journal, &mut reports).await?;
    Ok(reports)
}

/// Roles can be read from any database; the usual one may be gone.
async fn maintenance_database(server: &Connector) -> Result<String, ConnectError> {
    match server.control("postgres", "roles").await {
        Err(error) if error.sqlstate() == Some(sqlstate::INVALID_CATALOG_NAME) => Ok("template1".to_owned()),
        other => other.map(|_| "postgres".to_owned()),
    }
}

/// Keeps verifiers out of the target's log, as far as our rights go.
async fn quiet(control: &Control) {
    for setting in ["log_statement = none", "log_min_duration_statement = -1", "log_min_error_statement = panic"] {
        if control.batch_execute(&format!("SET {setting}")).await.is_err() {
            tracing::debug!(setting, "not allowed to keep statements out of the target's log");
        }
    }
}

/// What a server has.
struct Roles {
    roles: Vec<Role>,
    memberships: Vec<Membership>,
    verifiers_readable: bool,
}

/// One role, as `pg_authid` has it.
#[derive(Clone)]
struct Role {
    name: String,
    attributes: Attributes,
    /// `VALID UNTIL`, in ISO form.
    valid_until: Option<String>,
    verifier: Option<Secret>,
    comment: Option<String>,
    settings: Vec<Setting>,
    /// Made by initdb, the owner of everything that is built in.
    bootstrap: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Attributes {
    superuser: bool,
    inherit: bool,
    create_role: bool,
    create_db: bool,
    login: bool,
    replication: bool,
    bypass_rls: bool,
    connection_limit: i32,
}

/// A membership with its options; those that came with PostgreSQL 16 are none below it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Membership {
    role: String,
    member: String,
    admin: bool,
    inherit: Option<bool>,
    set: Option<bool>,
}

impl Roles {
    async fn read(control: &Control) -> Result<Self, tokio_postgres::Error> {
        let readable = control.query_one("SELECT has_table_privilege('pg_authid', 'SELECT')", &[]).await?.get(0);
        let (table, verifier) = if readable { ("pg_authid", "r.rolpassword") } else { ("pg_roles", "NULL::text") };
        let query = format!(
            "SELECT r.rolname::text, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, \
             r.rolreplication, r.rolbypassrls, r.rolconnlimit, r.rolvaliduntil::text, {verifier}, \
             shobj_description(r.oid, 'pg_authid'), r.oid = 10, coalesce(s.setconfig, '{{}}') \
             FROM {table} r LEFT JOIN pg_db_role_setting s ON s.setrole = r.oid AND s.setdatabase = 0 \
             WHERE r.rolname !~ '^pg_' ORDER BY r.oid"
        );
        let roles = control.query(query.as_str(), &[]).await?.iter().map(Role::from_row).collect();
        let options = if control.version_num() >= 160_000 {
            "bool_or(m.inherit_option), bool_or(m.set_option)"
        } else {
            "NULL::bool, NULL::bool"
        };
        // From PostgreSQL 16 on one membership may have been granted by several; together they give what any gives.
        let query = format!(
            "SELECT r.rolname::text, u.rolname::text, bool_or(m.admin_option), {options} FROM pg_auth_members m \
             JOIN pg_roles r ON r.oid = m.roleid JOIN pg_roles u ON u.oid = m.member \
             WHERE u.rolname !~ '^pg_' GROUP BY 1, 2 ORDER BY 1, 2"
        );
        let memberships = control
            .query(query.as_str(), &[])
            .await?
            .iter()
            .map(|row| Membership {
                role: row.get(0),
                member: row.get(1),
                admin: row.get(2),
                inherit: row.get(3),
                set: row.get(4),
            })
            .collect();
        Ok(Self { roles, memberships, verifiers_readable: readable })
    }
}

impl Role {
    fn from_row(row: &Row) -> Self {
        let settings: Vec<String> = row.get(13);
        Self {
            name: row.get(0),
            attributes: Attributes {
                superuser: row.get(1),
                inherit: row.get(2),
                create_role: row.get(3),
                create_db: row.get(4),
                login: row.get(5),
                replication: row.get(6),
                bypass_rls: row.get(7),
                connection_limit: row.get(8),
            },
            // Never ending is the same, said or unsaid.
            valid_until: row.get::<_, Option<String>>(9).filter(|until| until != "infinity"),
            verifier: row.get::<_, Option<String>>(10).map(Secret::new),
            comment: row.get(11),
            settings: settings.iter().filter_map(|text| Setting::parse(text)).collect(),
            bootstrap: row.get(12),
        }
    }
}

impl Attributes {
    /// As options of CREATE ROLE and ALTER ROLE; those that only a superuser may give, and only where they differ from
    /// `found`, since to name them at all needs the right.
    fn options(&self, found: Option<&Self>) -> String {
        let word = |on: bool, name: &str| format!(" {}{name}", if on { "" } else { "NO" });
        let mut options = String::new();
        for (on, before, name) in [
            (self.superuser, found.is_some_and(|found| found.superuser), "SUPERUSER"),
            (self.replication, found.is_some_and(|found| found.replication), "REPLICATION"),
            (self.bypass_rls, found.is_some_and(|found| found.bypass_rls), "BYPASSRLS"),
        ] {
            if on != before {
                options.push_str(&word(on, name));
            }
        }
        for (on, name) in [
            (self.inherit, "INHERIT"),
            (self.create_role, "CREATEROLE"),
            (self.create_db, "CREATEDB"),
            (self.login, "LOGIN"),
        ] {
            options.push_str(&word(on, name));
        }
        options.push_str(&format!(" CONNECTION LIMIT {}", self.connection_limit));
        options
    }

    /// Without what only a superuser may give.
    fn modest(&self, found: Option<&Self>) -> Self {
        let was = |pick: fn(&Self) -> bool| found.is_some_and(pick);
        Self {
            superuser: was(|found| found.superuser),
            replication: was(|found| found.replication),
            bypass_rls: was(|found| found.bypass_rls),
            ..self.clone()
        }
    }
}

/// What one step did.
#[derive(Default)]
struct Done {
    changed: bool,
    warning: Option<String>,
}

impl Done {
    fn note(self, report: &mut RoleReport) {
        if self.changed && report.action == RoleAction::Unchanged {
            report.action = RoleAction::Altered;
        }
        report.warnings.extend(self.warning);
    }
}

/// It stays as it is on the target, and the operator is told.
fn not_allowed(doing: &str) -> Done {
    let warning =
        format!("it could not be {doing}: the target's login role has not the right, so it stays as it is there");
    Done { changed: false, warning: Some(warning) }
}

/// Writes to the target what differs.
struct Writer<'a> {
    control: &'a Control,
    journal: &'a dyn Journal,
    /// The role that we log in with ourselves.
    own: &'a str,
    /// Parameters that the target knows.
    known: HashSet<String>,
    found: Roles,
    verifiers_readable: bool,
}

impl Writer<'_> {
    async fn role(&mut self, role: &Role) -> Result<RoleReport, RolesError> {
        let found = self.found.roles.iter().find(|found| found.name == role.name).cloned();
        let mut report = RoleReport { role: role.name.clone(), action: RoleAction::Unchanged, warnings: Vec::new() };
        match &found {
            None => {
                self.create(role).await?.note(&mut report);
                report.action = RoleAction::Created;
            }
            // The superusers that initdb made own what is built in; each server keeps its own.
            Some(found) if role.bootstrap || found.bootstrap => {}
            Some(found) if found.attributes != role.attributes || found.valid_until != role.valid_until => {
                self.alter(role, found).await?.note(&mut report);
            }
            Some(_) => {}
        }
        self.verifier(role, found.as_ref()).await?.note(&mut report);
        self.settings(role, found.as_ref()).await?.note(&mut report);
        if role.comment.is_some() && role.comment != found.and_then(|found| found.comment) {
            let comment = role.comment.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal);
            let statement = format!("COMMENT ON ROLE {} IS {comment}", quote_ident(&role.name));
            self.where_allowed(role, "commented on", &statement).await?.note(&mut report);
        }
        Ok(report)
    }

    async fn create(&self, role: &Role) -> Result<Done, RolesError> {
        let name = quote_ident(&role.name);
        self.record(made::ROLE, &role.name, "stays: it may own what was copied, and sessions may use it").await?;
        let full = format!("CREATE ROLE {name}{}{}", role.attributes.options(None), valid_until(role, None));
        let modest = role.attributes.modest(None);
        let fallback = format!("CREATE ROLE {name}{}{}", modest.options(None), valid_until(role, None));
        self.with_fallback(role, "created", &full, (modest != role.attributes).then_some(fallback)).await
    }

    async fn alter(&self, role: &Role, found: &Role) -> Result<Done, RolesError> {
        if role.name == self.own {
            let warning = "its attributes differ on the target; left, because pgcutover logs in with it".to_owned();
            return Ok(Done { changed: false, warning: Some(warning) });
        }
        let note = format!(
            "was{}{} before it was brought in line with the source",
            found.attributes.options(None),
            valid_until(found, None)
        );
        self.record(made::ROLE_ATTRIBUTES, &role.name, &note).await?;
        let name = quote_ident(&role.name);
        let statement = |wanted: &Attributes| {
            format!("ALTER ROLE {name}{}{}", wanted.options(Some(&found.attributes)), valid_until(role, Some(found)))
        };
        let modest = role.attributes.modest(Some(&found.attributes));
        let fallback = (modest != role.attributes).then(|| statement(&modest));
        match self.with_fallback(role, "altered", &statement(&role.attributes), fallback).await {
            Err(error) if error.is_right() => Ok(not_allowed("altered")),
            done => done,
        }
    }

    /// Runs `full`, or `fallback` where rights do not reach, with a warning.
    async fn with_fallback(
        &self,
        role: &Role,
        doing: &'static str,
        full: &str,
        fallback: Option<String>,
    ) -> Result<Done, RolesError> {
        match (self.run(role, doing, full).await, fallback) {
            (Err(error), Some(fallback)) if error.is_right() => {
                self.run(role, doing, &fallback).await?;
                let warning = "SUPERUSER, REPLICATION or BYPASSRLS could not be given: the target's login role has not \
                               the right; sessions of this role may be refused what they could do on the source";
                Ok(Done { changed: true, warning: Some(warning.to_owned()) })
            }
            (done, _) => done.map(|()| Done { changed: true, warning: None }),
        }
    }

    async fn verifier(&self, role: &Role, found: Option<&Role>) -> Result<Done, RolesError> {
        if !self.verifiers_readable {
            let warning = "its password verifier cannot be read on the source; set the same password on the target, or \
                           clients of this role cannot be moved";
            return Ok(Done { changed: false, warning: role.attributes.login.then(|| warning.to_owned()) });
        }
        let before = found.and_then(|found| found.verifier.as_ref());
        let Some(verifier) = role.verifier.as_ref().filter(|verifier| Some(*verifier) != before) else {
            return Ok(Done::default());
        };
        if found.is_some() && !self.found.verifiers_readable {
            let warning = "whether its password is the same on the target cannot be read";
            return Ok(Done { changed: false, warning: Some(warning.to_owned()) });
        }
        if role.name == self.own {
            let warning = "its password verifier differs on the target and was left, because pgcutover logs in with it; \
                           clients that log in as this role cannot be moved";
            return Ok(Done { changed: false, warning: Some(warning.to_owned()) });
        }
        if found.is_some() {
            let note = "had another password; it was replaced by the source's, and the old one cannot be brought back";
            self.record(made::ROLE_PASSWORD, &role.name, note).await?;
        }
        let statement = zeroize::Zeroizing::new(format!(
            "ALTER ROLE {} PASSWORD {}",
            quote_ident(&role.name),
            quote_literal(verifier.expose())
        ));
        self.where_allowed(role, "given its password", &statement).await
    }

    async fn settings(&self, role: &Role, found: Option<&Role>) -> Result<Done, RolesError> {
        let mut done = Done::default();
        let before = found.map_or(&[][..], |found| &found.settings);
        for setting in role.settings.iter().filter(|setting| !before.contains(setting)) {
            if !setting.is_custom() && !self.known.contains(&setting.name.to_lowercase()) {
                done.warning = Some(format!("the target does not know its setting {}; left out", setting.name));
                continue;
            }
            if found.is_some() {
                let object = format!("{}.{}", role.name, setting.name);
                self.record(made::ROLE_SETTING, &object, "was set to another value, or not at all").await?;
            }
            let statement = format!("ALTER ROLE {} {}", quote_ident(&role.name), setting.clause());
            let set = self.where_allowed(role, "given its settings", &statement).await?;
            done = Done { changed: done.changed || set.changed, warning: set.warning.or(done.warning) };
        }
        Ok(done)
    }

    async fn membership(&self, wanted: &Membership) -> Result<Done, RolesError> {
        let found =
            self.found.memberships.iter().find(|found| (&found.role, &found.member) == (&wanted.role, &wanted.member));
        let same = found.is_some_and(|found| {
            found.admin == wanted.admin
                && (wanted.inherit.is_none() || found.inherit == wanted.inherit)
                && (wanted.set.is_none() || found.set == wanted.set)
        });
        if same {
            return Ok(Done::default());
        }
        let known = self.control.query_opt("SELECT 1 FROM pg_roles WHERE rolname::text = $1", &[&wanted.role]).await;
        if known.map_err(|source| RolesError::Read { server: "target".to_owned(), source })?.is_none() {
            let warning = format!("it is a member of {}, which the target does not have", wanted.role);
            return Ok(Done { changed: false, warning: Some(warning) });
        }
        let grant = format!("GRANT {} TO {}", quote_ident(&wanted.role), quote_ident(&wanted.member));
        let undo = format!("REVOKE {} FROM {}", quote_ident(&wanted.role), quote_ident(&wanted.member));
        let made = MadeObject {
            side: Side::Target,
            database: None,
            kind: made::ROLE_MEMBERSHIP.to_owned(),
            name: format!("{} to {}", wanted.role, wanted.member),
            undo: None,
            note: format!("stays with its role; {undo} takes it back"),
        };
        self.journal.record(&made).await?;
        let options = wanted.options(self.control.version_num());
        let role = &wanted.member;
        let done = self.control.batch_execute(&format!("{grant}{options}")).await;
        match done {
            Ok(()) => Ok(Done { changed: true, warning: None }),
            Err(source) => {
                let circle = source.code().is_some_and(|code| code.code() == "0LP01");
                let error = RolesError::Write { role: role.clone(), doing: "given its memberships", source };
                let why = match (circle, error.is_right()) {
                    // Whoever makes a role is its member from PostgreSQL 16 on: on each server ours is of the other's.
                    (true, _) => "the other is a member of it already",
                    (false, true) => "no right to",
                    (false, false) => return Err(error),
                };
                let warning = format!("membership in {} could not be granted: {why}", wanted.role);
                Ok(Done { changed: false, warning: Some(warning) })
            }
        }
    }

    /// Makes our own role a member, so that it can give objects to the role and fill its tables. Only needed where our
    /// role is no superuser.
    async fn join(&self, role: &str) -> Result<Done, RolesError> {
        let read = |source| RolesError::Read { server: "target".to_owned(), source };
        let right = if self.control.version_num() >= 160_000 { "SET" } else { "MEMBER" };
        let query = format!("SELECT pg_has_role($1::text::name, '{right}') AND pg_has_role($1::text::name, 'USAGE')");
        if role == self.own || self.control.query_one(query.as_str(), &[&role]).await.map_err(read)?.get(0) {
            return Ok(Done::default());
        }
        let (name, own) = (quote_ident(role), quote_ident(self.own));
        let made = MadeObject {
            side: Side::Target,
            database: None,
            kind: made::ROLE_MEMBERSHIP.to_owned(),
            name: format!("{role} to {}", self.own),
            undo: Some(format!("REVOKE {name} FROM {own}")),
            note: "so that pgcutover can give objects to it".to_owned(),
        };
        self.journal.record(&made).await?;
        let options = if self.control.version_num() >= 160_000 { " WITH INHERIT true, SET true" } else { "" };
        let granted = self.control.batch_execute(&format!("GRANT {name} TO {own}{options}")).await;
        let warning = granted
            .err()
            .map(|_| format!("{} could not be made a member of it: objects that it owns cannot be restored", self.own));
        Ok(Done { changed: false, warning })
    }

    async fn record(&self, kind: &str, name: &str, note: &str) -> Result<(), JournalError> {
        let made = MadeObject {
            side: Side::Target,
            database: None,
            kind: kind.to_owned(),
            name: quote_ident(name),
            undo: None,
            note: note.to_owned(),
        };
        self.journal.record(&made).await
    }

    /// Runs a statement about a role, or says that our rights do not reach: a managed service keeps its own roles to itself,
    /// and what they are does not matter to what is moved.
    async fn where_allowed(&self, role: &Role, doing: &'static str, sql: &str) -> Result<Done, RolesError> {
        match self.run(role, doing, sql).await {
            Err(error) if error.is_right() => Ok(not_allowed(doing)),
            done => done.map(|()| Done { changed: true, warning: None }),
        }
    }

    async fn run(&self, role: &Role, doing: &'static str, sql: &str) -> Result<(), RolesError> {
        let done = self.control.batch_execute(sql).await;
        done.map_err(|source| RolesError::Write { role: role.name.clone(), doing, source })
    }
}

impl Membership {
    fn options(&self, target_version: u32) -> String {
        if target_version < 160_000 {
            return if self.admin { " WITH ADMIN OPTION".to_owned() } else { String::new() };
        }
        let mut options = vec![format!("ADMIN {}", self.admin)];
        // Below 16 inheriting is an attribute of the member, which has been carried over and is the default here.
        options.extend(self.inherit.map(|inherit| format!("INHERIT {inherit}")));
        options.extend(self.set.map(|set| format!("SET {set}")));
        format!(" WITH {}", options.join(", "))
    }
}

fn valid_until(role: &Role, found: Option<&Role>) -> String {
    match (&role.valid_until, found.and_then(|found| found.valid_until.as_ref())) {
        (Some(until), _) => format!(" VALID UNTIL {}", quote_literal(until)),
        (None, Some(_)) => " VALID UNTIL 'infinity'".to_owned(),
        (None, None) => String::new(),
    }
}

impl RolesError {
    /// Whether it was the rights that did not reach.
    fn is_right(&self) -> bool {
        match self {
            Self::Write { source, .. } => {
                source.code().map(tokio_postgres::error::SqlState::code) == Some(sqlstate::INSUFFICIENT_PRIVILEGE)
            }
            Self::Connect(_) | Self::Read { .. } | Self::Journal(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Attributes {
        Attributes {
            superuser: false,
            inherit: true,
            create_role: false,
            create_db: false,
            login: true,
            replication: false,
            bypass_rls: false,
            connection_limit: -1,
        }
    }

    #[test]
    fn what_needs_a_superuser_is_named_only_where_it_changes() {
        let common = " INHERIT NOCREATEROLE NOCREATEDB LOGIN CONNECTION LIMIT -1";
        assert_eq!(plain().options(None), common);
        let repl = Attributes { replication: true, ..plain() };
        assert_eq!(repl.options(None), format!(" REPLICATION{common}"));
        assert_eq!(repl.options(Some(&repl)), common);
        assert_eq!(plain().options(Some(&repl)), format!(" NOREPLICATION{common}"));
        assert_eq!(repl.modest(None), plain());
        assert_eq!(plain().modest(Some(&repl)), repl);
    }

    #[test]
    fn memberships_say_what_the_target_understands() {
        let membership =
            |inherit, set| Membership { role: "a".to_owned(), member: "b".to_owned(), admin: true, inherit, set };
        assert_eq!(membership(None, None).options(150_000), " WITH ADMIN OPTION");
        assert_eq!(membership(None, None).options(160_000), " WITH ADMIN true");
        let full = membership(Some(false), Some(true));
        assert_eq!(full.options(170_000), " WITH ADMIN true, INHERIT false, SET true");
    }
}
