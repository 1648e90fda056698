//! Roles, memberships, settings, rights on parameters and tablespaces, password verifiers: shared objects that no dump of a
//! database and no stream carries.
//!
//! The proxy logs a client in to either server with what the client itself proved, so a role's verifier must be the same
//! on both. Verifiers never reach a log, an error or the journal.

mod carried;
mod everyone;
mod rights;
mod server;
mod taken;

use std::collections::HashSet;

pub use self::carried::Carried;
use self::server::{Attributes, Membership, Role, Roles, valid_until};
use crate::catalog::journal::{MadeObject, Side};
use crate::ident::{quote_ident, quote_literal};
use crate::migration::made::{self, Journal, JournalError};
use crate::migration::schema::database_parameters;
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
        "role {role} could not be {doing} on the {server}; give our login role the right to, or make the role by hand"
    )]
    Write {
        /// The role.
        role: String,
        /// `created`, `altered`, …
        doing: &'static str,
        /// `source` or `target`.
        server: String,
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
/// verifier (where it can be read), memberships, settings, rights on parameters and tablespaces, and the settings of everyone. Settings of a
/// role in a database come with [`super::schema::create_database`]. Idempotent.
///
/// `carried` is what came of the last time, in either direction: what was there then and is missing on the source now was
/// taken away since, and is taken away on the target too. It is brought up to date where the whole succeeds.
pub async fn copy_roles(
    source: &Connector,
    target: &Connector,
    journal: &dyn Journal,
    carried: &mut Carried,
) -> Result<Vec<RoleReport>, RolesError> {
    let from = source.control(&maintenance_database(source).await?, "roles").await?;
    let to = target.control(&maintenance_database(target).await?, "roles").await?;
    let read = |server: &Connector| {
        let server = server.label().to_owned();
        move |source| RolesError::Read { server, source }
    };
    let mut wanted = Roles::read(&from).await.map_err(read(source))?;
    // Roles are the server's, and several migrations may begin at the same time. Held until the session ends.
    to.batch_execute(ONE_AT_A_TIME).await.map_err(read(target))?;
    let found = Roles::read(&to).await.map_err(read(target))?;
    let superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
    let superuser: bool = to.query_one(superuser, &[]).await.map_err(read(target))?.get(0);
    quiet(&to).await;
    let mut writer = Writer {
        control: &to,
        journal,
        from: source.label(),
        to: target.label(),
        own: &target.server().user,
        known: database_parameters(&to).await.map_err(read(target))?,
        found,
        verifiers_readable: wanted.verifiers_readable,
        before: carried.clone(),
        made: HashSet::new(),
    };
    let mut reports = writer.follow_renames(&wanted, source.label()).await?;
    writer.before.leave(&mut wanted, &writer.found, target.label());
    for role in &wanted.roles {
        let mut report = writer.role(role).await?;
        if !superuser && !role.attributes.superuser {
            writer.join(&role.name).await?.note(&mut report);
        }
        reports.push(report);
    }
    // First, so that of two roles the one can become a member of the other that was a member of it.
    writer.take_memberships(&wanted, &mut reports).await?;
    for membership in &wanted.memberships {
        let done = writer.membership(membership).await?;
        if let Some(report) = reports.iter_mut().find(|report| report.role == membership.member) {
            done.note(report);
        }
    }
    reports.extend(writer.settings_of_everyone(&wanted).await?);
    reports.extend(writer.gone(&wanted, source.label()));
    let rights =
        rights::copy((&from, source.label()), (&to, target.label()), journal, &writer.before.rights, &mut reports)
            .await?;
    let after = Roles::read(&to).await.map_err(read(target))?;
    let Writer { before, made, .. } = writer;
    *carried = before.next(&wanted, source.label(), &after, target.label(), &made, rights);
    Ok(reports)
}

/// Roles can be read from any database; the usual one may be gone.
async fn maintenance_database(server: &Connector) -> Result<String, ConnectError> {
    match server.control("postgres", "roles").await {
        Err(error) if error.sqlstate() == Some(sqlstate::INVALID_CATALOG_NAME) => Ok("template1".to_owned()),
        other => other.map(|_| "postgres".to_owned()),
    }
}

/// Keeps verifiers out of the server's log, as far as our rights go.
async fn quiet(control: &Control) {
    for setting in ["log_statement = none", "log_min_duration_statement = -1", "log_min_error_statement = panic"] {
        if control.batch_execute(&format!("SET {setting}")).await.is_err() {
            tracing::debug!(setting, "not allowed to keep statements out of the server's log");
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
    /// Both of them; of two warnings the later one.
    fn and(self, then: Self) -> Self {
        Self { changed: self.changed || then.changed, warning: then.warning.or(self.warning) }
    }

    fn note(self, report: &mut RoleReport) {
        if self.changed && report.action == RoleAction::Unchanged {
            report.action = RoleAction::Altered;
        }
        report.warnings.extend(self.warning);
    }
}

/// Writes to the target what differs.
struct Writer<'a> {
    control: &'a Control,
    journal: &'a dyn Journal,
    /// `source` and `target`, as the configuration calls them: in a rollback the other way round.
    from: &'a str,
    to: &'a str,
    /// The role that we log in with ourselves.
    own: &'a str,
    /// Parameters that the target knows.
    known: HashSet<String>,
    found: Roles,
    verifiers_readable: bool,
    /// What came of the last time.
    before: Carried,
    /// Roles that were made now.
    made: HashSet<String>,
}

impl Writer<'_> {
    fn unread(&self, source: tokio_postgres::Error) -> RolesError {
        RolesError::Read { server: self.to.to_owned(), source }
    }

    fn unwritten(&self, role: &str, doing: &'static str, source: tokio_postgres::Error) -> RolesError {
        RolesError::Write { role: role.to_owned(), doing, server: self.to.to_owned(), source }
    }

    /// It stays as it is on the server that is led to, and the operator is told.
    fn not_allowed(&self, doing: &str) -> Done {
        let to = self.to;
        let warning =
            format!("it could not be {doing}: the {to}'s login role has not the right, so it stays as it is there");
        Done { changed: false, warning: Some(warning) }
    }

    async fn role(&mut self, role: &Role) -> Result<RoleReport, RolesError> {
        let found = self.found.roles.iter().find(|found| found.name == role.name).cloned();
        let mut report = RoleReport { role: role.name.clone(), action: RoleAction::Unchanged, warnings: Vec::new() };
        match &found {
            None => {
                self.create(role).await?.note(&mut report);
                self.made.insert(role.name.clone());
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
        let comment_there = found.and_then(|found| found.comment);
        let had_one = self.before.roles.get(&role.name).is_some_and(|had| had.comment);
        if role.comment != comment_there && (role.comment.is_some() || had_one) {
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
            let warning = format!("its attributes differ on the {}; left, because pgcutover logs in with it", self.to);
            return Ok(Done { changed: false, warning: Some(warning) });
        }
        let note = format!(
            "was{}{} before it was brought in line with the {}",
            found.attributes.options(None),
            valid_until(found, None),
            self.from
        );
        self.record(made::ROLE_ATTRIBUTES, &role.name, &note).await?;
        let name = quote_ident(&role.name);
        let statement = |wanted: &Attributes| {
            format!("ALTER ROLE {name}{}{}", wanted.options(Some(&found.attributes)), valid_until(role, Some(found)))
        };
        let modest = role.attributes.modest(Some(&found.attributes));
        let fallback = (modest != role.attributes).then(|| statement(&modest));
        match self.with_fallback(role, "altered", &statement(&role.attributes), fallback).await {
            Err(error) if error.is_right() => Ok(self.not_allowed("altered")),
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
                let (from, to) = (self.from, self.to);
                let warning = format!(
                    "SUPERUSER, REPLICATION or BYPASSRLS could not be given: the {to}'s login role has not the right; \
                     sessions of this role may be refused what they could do on the {from}"
                );
                Ok(Done { changed: true, warning: Some(warning) })
            }
            (done, _) => done.map(|()| Done { changed: true, warning: None }),
        }
    }

    async fn verifier(&self, role: &Role, found: Option<&Role>) -> Result<Done, RolesError> {
        let (from, to) = (self.from, self.to);
        if !self.verifiers_readable {
            let warning = format!(
                "its password verifier cannot be read on the {from}; set the same password on the {to}, or clients of \
                 this role cannot be moved"
            );
            return Ok(Done { changed: false, warning: role.attributes.login.then_some(warning) });
        }
        let before = found.and_then(|found| found.verifier.as_ref());
        let Some(verifier) = role.verifier.as_ref() else { return self.take_password(role, found).await };
        if Some(verifier) == before {
            return Ok(Done::default());
        }
        if found.is_some() && !self.found.verifiers_readable {
            let warning = format!("whether its password is the same on the {to} cannot be read");
            return Ok(Done { changed: false, warning: Some(warning) });
        }
        if role.name == self.own {
            let warning = format!(
                "its password verifier differs on the {to} and was left, because pgcutover logs in with it; clients \
                 that log in as this role cannot be moved"
            );
            return Ok(Done { changed: false, warning: Some(warning) });
        }
        if found.is_some() {
            let note = format!(
                "had another password; it was replaced by the {from}'s, and the old one cannot be brought back"
            );
            self.record(made::ROLE_PASSWORD, &role.name, &note).await?;
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
                done.warning = Some(format!("the {} does not know its setting {}; left out", self.to, setting.name));
                continue;
            }
            if found.is_some() {
                let object = format!("{}.{}", role.name, setting.name);
                self.record(made::ROLE_SETTING, &object, "was set to another value, or not at all").await?;
            }
            let statement = format!("ALTER ROLE {} {}", quote_ident(&role.name), setting.clause());
            let set = match self.where_allowed(role, "given its settings", &statement).await {
                Err(error) if error.is_value() => {
                    let (to, name) = (self.to, &setting.name);
                    let warning = format!("the {to} does not take its value of {name}; left out");
                    Done { changed: false, warning: Some(warning) }
                }
                set => set?,
            };
            done = done.and(set);
        }
        Ok(done.and(self.take_settings(role, before).await?))
    }

    async fn membership(&self, wanted: &Membership) -> Result<Done, RolesError> {
        let found = self.found.membership(&wanted.role, &wanted.member);
        // The ADMIN option that only the target has given stays.
        let had_admin = self.before.admin(&wanted.role, &wanted.member);
        let admin = wanted.admin || found.is_some_and(|found| found.admin && !had_admin);
        let wanted = &Membership { admin, ..wanted.clone() };
        if !admin && found.is_some_and(|found| found.admin) {
            let done = self.revoke(&wanted.role, &wanted.member, "ADMIN OPTION FOR ").await?;
            if done.warning.is_some() || self.control.version_num() < 160_000 {
                return Ok(done);
            }
        }
        let same = found.is_some_and(|found| {
            found.admin == wanted.admin
                && (wanted.inherit.is_none() || found.inherit == wanted.inherit)
                && (wanted.set.is_none() || found.set == wanted.set)
        });
        if same {
            return Ok(Done::default());
        }
        let known = self.control.query_opt("SELECT 1 FROM pg_roles WHERE rolname::text = $1", &[&wanted.role]).await;
        if known.map_err(|source| self.unread(source))?.is_none() {
            let warning = format!("it is a member of {}, which the {} does not have", wanted.role, self.to);
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
        match self.control.batch_execute(&format!("{grant}{options}")).await {
            Ok(()) => Ok(Done { changed: true, warning: None }),
            Err(source) => {
                let circle = source.code().is_some_and(|code| code.code() == "0LP01");
                let error = self.unwritten(&wanted.member, "given its memberships", source);
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
        let right = if self.control.version_num() >= 160_000 { "SET" } else { "MEMBER" };
        let query = format!("SELECT pg_has_role($1::text::name, '{right}') AND pg_has_role($1::text::name, 'USAGE')");
        if role == self.own
            || self.control.query_one(query.as_str(), &[&role]).await.map_err(|source| self.unread(source))?.get(0)
        {
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
            Err(error) if error.is_right() => Ok(self.not_allowed(doing)),
            done => done.map(|()| Done { changed: true, warning: None }),
        }
    }

    async fn run(&self, role: &Role, doing: &'static str, sql: &str) -> Result<(), RolesError> {
        let done = self.control.batch_execute(sql).await;
        done.map_err(|source| self.unwritten(&role.name, doing, source))
    }
}

impl RolesError {
    /// Whether it was the rights that did not reach.
    fn is_right(&self) -> bool {
        self.is_written_with(sqlstate::INSUFFICIENT_PRIVILEGE)
    }

    /// Whether it was the value of a setting: what it may be differs from major to major, and with what a server was
    /// built with and its host has (locales, time zones).
    fn is_value(&self) -> bool {
        self.is_written_with(sqlstate::INVALID_PARAMETER_VALUE)
    }

    fn is_written_with(&self, code: &str) -> bool {
        match self {
            Self::Write { source, .. } => source.code().map(tokio_postgres::error::SqlState::code) == Some(code),
            Self::Connect(_) | Self::Read { .. } | Self::Journal(_) => false,
        }
    }
}
