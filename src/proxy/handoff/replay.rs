//! Gives a backend a session's state, in one round trip, or two where types have to be looked up by name.
//!
//! The order matters. The role is the session's own while settings are made, because a session may have set as a
//! superuser what it could not set as the role it took on later. Settings come before statements, because a statement
//! is read with the `search_path` in force. Settings that make a transaction wait or fail come after that, then the
//! client's encoding, then the time-outs that could end our own work, which are off until then, and last of all the
//! unnamed statement, which nothing may follow.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};

use crate::postgres::RawConnection;

use super::capture::{FIRST_UNSTABLE_OID, OWN_STATEMENT, array_literal, columns, oid_of, unnamed_types_at};
use super::delta::{Delta, TIMEOUTS, UnnamedChange, delta};
use super::exchange::{Answer, Pipeline, Row};
use super::prepare::prepare_command;
use super::state::{Origin, SessionState, Statement, TypeForm, TypeName};
use super::{Blocker, HandoffError};

const REPLAYING: &str = "replaying a session's state";

const SET: &str = "SELECT pg_catalog.set_config($1::pg_catalog.text, $2::pg_catalog.text, false)";

/// Until the transaction ends: a plan for any parameters, which does not count among those that the server compares later,
/// and no waiting for whoever changes a table.
const PLAN_GENERICALLY: &str = "SELECT pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', true), \
    pg_catalog.set_config('lock_timeout', '100ms', true)";

/// So many of a session's statements are planned ahead: each costs the server that is not in use yet some time, and memory.
const PLANNED_AHEAD: usize = 32;

/// Foreign tables, whose servers may not be in reach, and tables with many children, whose plans for any parameters are large:
/// where there are such, statements are planned when they are used.
const FAR_OR_MANY: &str =
    "SELECT 1 WHERE EXISTS (SELECT FROM pg_catalog.pg_foreign_table) OR EXISTS (SELECT FROM pg_catalog.pg_inherits)";

/// `$1` schemas, `$2` names, `$3` whether the array type over it is meant.
const TYPES: &str = "SELECT w.position, CASE WHEN w.is_array THEN t.typarray ELSE t.oid END \
    FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[]), \
    pg_catalog.unnest($3::pg_catalog.bool[])) WITH ORDINALITY w(schema, name, is_array, position) \
    JOIN pg_catalog.pg_namespace n ON n.nspname OPERATOR(pg_catalog.=) w.schema::pg_catalog.name \
    JOIN pg_catalog.pg_type t ON t.typnamespace OPERATOR(pg_catalog.=) n.oid \
    AND t.typname OPERATOR(pg_catalog.=) w.name::pg_catalog.name";

/// Settings made after the statements, [`TIMEOUTS`] apart: they end, delay or refuse what runs.
const LATE: [&str; 7] = [
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "log_statement",
];

/// The first version with `transaction_timeout`.
const TRANSACTION_TIMEOUT_VERSION: u32 = 170_000;

/// Settings that newer majors do without, and that never changed a result: not to have them is no reason to stay.
const GONE: [&str; 4] = [
    "force_parallel_mode",
    "operator_precedence_warning",
    "replacement_sort_tuples",
    "vacuum_cleanup_index_scale_factor",
];

/// undefined_object: how a setting is refused that the server does not know.
const UNKNOWN_SETTING: &str = "42704";

/// What could not be replayed. Empty for almost every session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplayReport {
    /// Statements that do not exist on the new backend: their first use there fails. They do not stop a cutover.
    pub failed_statements: Vec<FailedStatement>,
    /// Whether the unnamed statement does not exist there either.
    pub unnamed_failed: bool,
    failed: BTreeMap<Failed, String>,
}

/// A statement that could not be prepared again.
#[derive(Clone, PartialEq, Eq)]
pub struct FailedStatement {
    /// Its name, as bytes of the database's encoding.
    pub name: Bytes,
    /// Why.
    pub reason: StatementFailure,
}

impl std::fmt::Debug for FailedStatement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FailedStatement").field("reason", &self.reason).finish_non_exhaustive()
    }
}

/// Why a statement could not be prepared again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatementFailure {
    /// The server refused it.
    Refused {
        /// SQLSTATE.
        sqlstate: String,
    },
    /// A parameter's type does not exist there.
    MissingType,
    /// It was prepared by SQL inside a longer text, and it is not certain which part of that.
    Ambiguous,
}

/// What a unit was for, where its failure is remembered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Failed {
    Setting(String),
    Role,
    Channel(Bytes),
}

/// What a unit was for.
enum Step {
    /// Ours: its failure ends the handoff.
    Own,
    Types,
    Of(Failed),
    Statement(Bytes),
    Unnamed,
    /// Closing what may not be there.
    Ignored,
}

impl ReplayReport {
    /// What the other server refused without which the session would not be the same.
    pub fn blockers(&self) -> Vec<Blocker> {
        self.failed
            .iter()
            .map(|(what, sqlstate)| match what {
                Failed::Setting(name) => Blocker::Setting { name: name.clone(), sqlstate: sqlstate.clone() },
                Failed::Role => Blocker::Role { sqlstate: sqlstate.clone() },
                Failed::Channel(_) => Blocker::Listen { sqlstate: sqlstate.clone() },
            })
            .collect()
    }

    /// Brings the report of an earlier replay up to date with what `delta` has changed since.
    pub fn then(mut self, delta: &Delta, later: ReplayReport) -> ReplayReport {
        self.failed_statements.retain(|failed| !delta.close.contains(&failed.name));
        self.failed_statements.extend(later.failed_statements);
        if !matches!(delta.unnamed, UnnamedChange::Keep) {
            self.unnamed_failed = later.unnamed_failed;
        }
        self.failed.retain(|what, _| match what {
            Failed::Setting(name) => delta.settings.iter().all(|(changed, _)| changed != name),
            Failed::Role => !delta.changes_settings(),
            Failed::Channel(channel) => !delta.unlisten.contains(channel),
        });
        self.failed.extend(later.failed);
        self
    }
}

/// Gives a fresh backend the state of a session.
///
/// A future that is dropped, and an error, leave the backend half done: it is to be closed.
pub async fn replay(connection: &mut RawConnection, state: &SessionState) -> Result<ReplayReport, HandoffError> {
    apply_delta(connection, &delta(&SessionState::default(), state)).await
}

/// The same while there is time: the backend also plans what was prepared, so that it does not look up everything that the
/// statements name when they are first used, with all other sessions doing so at the same moment.
pub async fn replay_and_plan(
    connection: &mut RawConnection,
    state: &SessionState,
) -> Result<ReplayReport, HandoffError> {
    bring(connection, &delta(&SessionState::default(), state), Plans::Now).await
}

/// Brings a backend from one state to another. No round trip when there is nothing to do. The first state must have
/// been replayed there: see [`replay`], also for what an error means.
pub async fn apply_delta(connection: &mut RawConnection, delta: &Delta) -> Result<ReplayReport, HandoffError> {
    bring(connection, delta, Plans::AtFirstUse).await
}

/// When statements are planned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plans {
    AtFirstUse,
    Now,
}

async fn bring(connection: &mut RawConnection, delta: &Delta, plans: Plans) -> Result<ReplayReport, HandoffError> {
    let mut report = ReplayReport::default();
    if delta.is_empty() {
        return Ok(report);
    }
    let plans = match plans {
        Plans::Now if !delta.prepare.is_empty() => plans_ahead(connection, &mut report).await?,
        plans => plans,
    };
    let known = if connection.version_num() < TRANSACTION_TIMEOUT_VERSION { 1 } else { 2 };
    let timeouts = &TIMEOUTS[..known];
    let mut script = Script::default();
    script.begin(delta, timeouts);
    let wanted = wanted_types(delta);
    let mut translated = BTreeMap::new();
    if !wanted.is_empty() {
        script.look_up(&wanted);
        if let Some(rows) = script.run(connection, &mut report).await? {
            translated = read_types(&wanted, rows)
                .ok_or(HandoffError::Protocol { doing: REPLAYING, what: "another result than was asked for" })?;
        }
        script = Script::default();
    }
    script.statements(delta, &translated, &mut report);
    script.channels(delta);
    if plans == Plans::Now {
        script.plan(delta);
    }
    script.end(delta, timeouts, &translated, &mut report);
    script.run(connection, &mut report).await?;
    Ok(report)
}

/// Planning looks at everything that a statement names, and starting a query connects to other servers.
async fn plans_ahead(connection: &mut RawConnection, report: &mut ReplayReport) -> Result<Plans, HandoffError> {
    let mut script = Script::default();
    script.pipeline.run(b"pgcutover_handoff_plan", FAR_OR_MANY.as_bytes(), &[]);
    script.sync(Step::Types);
    match script.run(connection, report).await {
        Ok(found) if found.as_ref().is_some_and(Vec::is_empty) => Ok(Plans::Now),
        Ok(_) | Err(HandoffError::Refused { .. }) => Ok(Plans::AtFirstUse),
        Err(error) => Err(error),
    }
}

/// Types among the parameters of what is to be prepared whose OIDs are not the same everywhere.
fn wanted_types(delta: &Delta) -> Vec<(u32, &TypeName)> {
    let mut used: Vec<u32> = delta
        .prepare
        .values()
        .filter(|statement| statement.origin == Origin::Protocol)
        .flat_map(|statement| statement.parameter_types.iter().copied())
        .collect();
    if let UnnamedChange::Parse(body) = &delta.unnamed {
        used.extend(body_types(body));
    }
    used.sort_unstable();
    used.dedup();
    used.into_iter()
        .filter(|oid| *oid >= FIRST_UNSTABLE_OID)
        .filter_map(|oid| delta.types.get(&oid).map(|name| (oid, name)))
        .collect()
}

fn body_types(body: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let start = unnamed_types_at(body).unwrap_or(body.len());
    body[start..].chunks_exact(4).map(|oid| u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]))
}

/// OIDs on this server by the OIDs on the other.
type Translated = BTreeMap<u32, u32>;

fn read_types(wanted: &[(u32, &TypeName)], rows: Vec<Row>) -> Option<Translated> {
    let mut translated = Translated::new();
    for row in rows {
        let [position, oid] = columns(row)?;
        let index = usize::try_from(oid_of(&position?)?).ok()?.checked_sub(1)?;
        match oid_of(&oid?)? {
            0 => {}
            oid => drop(translated.insert(wanted.get(index)?.0, oid)),
        }
    }
    Some(translated)
}

fn translate(oid: u32, translated: &Translated) -> Option<u32> {
    if oid < FIRST_UNSTABLE_OID { Some(oid) } else { translated.get(&oid).copied() }
}

/// The body of an unnamed Parse with its parameter types translated.
fn translate_body(body: &Bytes, translated: &Translated) -> Option<Bytes> {
    if body_types(body).all(|oid| oid < FIRST_UNSTABLE_OID) {
        return Some(body.clone());
    }
    let mut out = BytesMut::from(&body[..unnamed_types_at(body)?]);
    for oid in body_types(body) {
        out.put_u32(translate(oid, translated)?);
    }
    Some(out.freeze())
}

fn is_harmless(what: &Failed, sqlstate: &str) -> bool {
    matches!(what, Failed::Setting(name) if sqlstate == UNKNOWN_SETTING && GONE.contains(&name.as_str()))
}

/// A pipeline, and what each of its units is for.
#[derive(Default)]
struct Script {
    pipeline: Pipeline,
    steps: Vec<Step>,
}

impl Script {
    fn sync(&mut self, step: Step) {
        self.pipeline.sync();
        self.steps.push(step);
    }

    fn set(&mut self, name: &[u8], value: Option<&[u8]>, step: Step) {
        self.pipeline.execute(OWN_STATEMENT, &[Some(name), value]);
        self.sync(step);
    }

    /// No time-outs, our own encoding, then settings and the role.
    fn begin(&mut self, delta: &Delta, timeouts: &[&str]) {
        // One unit with the first of them: nothing else is done under what was in force before, which may be another's.
        self.pipeline.parse(OWN_STATEMENT, SET.as_bytes(), &[]);
        for name in timeouts {
            self.set(name.as_bytes(), Some(b"0"), Step::Own);
        }
        self.set(b"client_encoding", Some(delta.transport.as_bytes()), Step::Own);
        if !delta.changes_settings() {
            return;
        }
        self.set(b"role", Some(b"none"), Step::Own);
        if delta.identity.before.session_authorization.is_some() {
            self.set(b"session_authorization", None, Step::Own);
        }
        self.settings(delta, timeouts, |name| !LATE.contains(&name));
        if let Some(user) = &delta.identity.after.session_authorization {
            self.set(b"session_authorization", Some(user), Step::Of(Failed::Role));
        }
        if let Some(role) = &delta.identity.after.role {
            self.set(b"role", Some(role), Step::Of(Failed::Role));
        }
    }

    /// Without those that are set apart from the others: the client's encoding, and time-outs.
    fn settings(&mut self, delta: &Delta, timeouts: &[&str], wanted: impl Fn(&str) -> bool) {
        for (name, value) in &delta.settings {
            if name != "client_encoding" && !timeouts.contains(&name.as_str()) && wanted(name) {
                self.set(name.as_bytes(), value.as_deref(), Step::Of(Failed::Setting(name.clone())));
            }
        }
    }

    fn look_up(&mut self, wanted: &[(u32, &TypeName)]) {
        let schemas = array_literal(wanted.iter().map(|(_, name)| &name.schema[..]));
        let names = array_literal(wanted.iter().map(|(_, name)| &name.name[..]));
        let forms = array_literal(wanted.iter().map(|(_, name)| match name.form {
            TypeForm::Itself => &b"f"[..],
            TypeForm::ArrayOver => b"t",
        }));
        let name = b"pgcutover_handoff_types";
        self.pipeline.run(name, TYPES.as_bytes(), &[Some(&schemas), Some(&names), Some(&forms)]);
        self.sync(Step::Types);
    }

    fn statements(&mut self, delta: &Delta, translated: &Translated, report: &mut ReplayReport) {
        for name in &delta.close {
            self.pipeline.close(name);
            self.sync(Step::Ignored);
        }
        for (name, statement) in &delta.prepare {
            if let Err(reason) = self.statement(name, statement, translated) {
                report.failed_statements.push(FailedStatement { name: name.clone(), reason });
            }
        }
    }

    fn statement(
        &mut self,
        name: &Bytes,
        statement: &Statement,
        translated: &Translated,
    ) -> Result<(), StatementFailure> {
        match statement.origin {
            Origin::Protocol => {
                let types: Option<Vec<u32>> =
                    statement.parameter_types.iter().map(|oid| translate(*oid, translated)).collect();
                self.pipeline.parse(name, &statement.text, &types.ok_or(StatementFailure::MissingType)?);
            }
            Origin::Sql { backslashes } => {
                let command = prepare_command(&statement.text, name, backslashes).ok_or(StatementFailure::Ambiguous)?;
                self.pipeline.run(b"pgcutover_handoff_prepare", command, &[]);
            }
        }
        self.sync(Step::Statement(name.clone()));
        Ok(())
    }

    /// Has statements planned, none of them run. What cannot be planned now fails at its first use, if ever.
    fn plan(&mut self, delta: &Delta) {
        let name = b"pgcutover_handoff_plan";
        self.pipeline.parse(name, PLAN_GENERICALLY.as_bytes(), &[]);
        self.sync(Step::Ignored);
        for (statement, Statement { parameter_types, .. }) in delta.prepare.iter().take(PLANNED_AHEAD) {
            self.pipeline.execute(name, &[]);
            self.pipeline.bind(statement, &vec![None; parameter_types.len()]);
            self.sync(Step::Ignored);
        }
        self.pipeline.close(name);
        self.sync(Step::Ignored);
    }

    fn channels(&mut self, delta: &Delta) {
        let commands = [(&b"UNLISTEN \""[..], &delta.unlisten), (b"LISTEN \"", &delta.listen)];
        for (verb, channels) in commands {
            for channel in channels {
                let mut command = verb.to_vec();
                for byte in channel {
                    command.extend(std::iter::repeat_n(*byte, if *byte == b'"' { 2 } else { 1 }));
                }
                command.push(b'"');
                self.pipeline.run(b"pgcutover_handoff_listen", &command, &[]);
                self.sync(Step::Of(Failed::Channel(channel.clone())));
            }
        }
    }

    /// Late settings, the client's encoding, its time-outs, the unnamed statement.
    fn end(&mut self, delta: &Delta, timeouts: &[&str], translated: &Translated, report: &mut ReplayReport) {
        self.settings(delta, timeouts, |name| LATE.contains(&name));
        let failed = Failed::Setting("client_encoding".to_owned());
        self.set(b"client_encoding", delta.client_encoding.as_deref(), Step::Of(failed));
        // The one for statements last: the others are set by statements.
        for (name, value) in timeouts.iter().zip(&delta.timeouts).rev() {
            self.set(name.as_bytes(), value.as_deref(), Step::Of(Failed::Setting((*name).to_owned())));
        }
        self.pipeline.close(OWN_STATEMENT);
        self.sync(Step::Own);
        match &delta.unnamed {
            UnnamedChange::Keep => {}
            UnnamedChange::Close => {
                self.pipeline.close(b"");
                self.sync(Step::Ignored);
            }
            UnnamedChange::Parse(body) => match translate_body(body, translated) {
                Some(body) => {
                    self.pipeline.parse_body(&body);
                    self.sync(Step::Unnamed);
                }
                None => report.unnamed_failed = true,
            },
        }
    }

    /// Sends it all; returns the rows of the type lookup, if there was one.
    async fn run(
        self,
        connection: &mut RawConnection,
        report: &mut ReplayReport,
    ) -> Result<Option<Vec<Row>>, HandoffError> {
        // Whatever is notified on this backend now was sent on the other server before the switch: the client has it
        // from there.
        let mut discarded = BytesMut::new();
        let answers = self.pipeline.exchange(connection, &mut discarded, REPLAYING).await?;
        let mut types = None;
        for (step, answer) in self.steps.into_iter().zip(answers) {
            match step {
                Step::Own => drop(answer.rows(REPLAYING)?),
                Step::Types => types = answer.rows(REPLAYING)?.pop(),
                Step::Of(what) => {
                    if let Answer::Refused(sqlstate) = answer
                        && !is_harmless(&what, &sqlstate)
                    {
                        report.failed.insert(what, sqlstate);
                    }
                }
                Step::Statement(name) => {
                    if let Answer::Refused(sqlstate) = answer {
                        let reason = StatementFailure::Refused { sqlstate };
                        report.failed_statements.push(FailedStatement { name, reason });
                    }
                }
                Step::Unnamed => report.unnamed_failed |= matches!(answer, Answer::Refused(_)),
                Step::Ignored => {}
            }
        }
        Ok(types)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(what: Failed) -> ReplayReport {
        ReplayReport { failed: BTreeMap::from([(what, "22023".to_owned())]), ..ReplayReport::default() }
    }

    #[test]
    fn what_a_delta_has_mended_blocks_no_longer() {
        let before = refused(Failed::Setting("app.x".to_owned()));
        assert_eq!(before.blockers().len(), 1);
        let mended = Delta { settings: vec![("app.x".to_owned(), None)], ..Delta::default() };
        assert_eq!(before.clone().then(&mended, ReplayReport::default()).blockers(), []);
        assert_eq!(before.then(&Delta::default(), ReplayReport::default()).blockers().len(), 1);
    }

    #[test]
    fn settings_that_newer_majors_have_dropped_are_missed_by_nobody() {
        let setting = |name: &str| Failed::Setting(name.to_owned());
        assert!(is_harmless(&setting("force_parallel_mode"), UNKNOWN_SETTING));
        assert!(!is_harmless(&setting("force_parallel_mode"), "42501"));
        assert!(!is_harmless(&setting("app.tenant"), UNKNOWN_SETTING));
        assert!(!is_harmless(&Failed::Role, UNKNOWN_SETTING));
    }

    #[test]
    fn a_failed_statement_that_was_closed_is_forgotten() {
        let name = Bytes::from_static(b"s");
        let reason = StatementFailure::MissingType;
        let before = ReplayReport {
            failed_statements: vec![FailedStatement { name: name.clone(), reason }],
            ..ReplayReport::default()
        };
        let closed = Delta { close: [name].into(), ..Delta::default() };
        assert_eq!(before.then(&closed, ReplayReport::default()), ReplayReport::default());
    }

    #[test]
    fn parameter_types_of_an_unnamed_parse_are_translated_in_place() {
        let body = Bytes::from_static(b"\0SELECT $1, $2\0\0\x02\0\0\0\x17\0\0\x40\x01");
        let translated = Translated::from([(0x4001, 0x5002)]);
        let expected = Bytes::from_static(b"\0SELECT $1, $2\0\0\x02\0\0\0\x17\0\0\x50\x02");
        assert_eq!(translate_body(&body, &translated), Some(expected));
        assert_eq!(translate_body(&body, &Translated::new()), None, "a type that is not there");
        let plain = Bytes::from_static(b"\0SELECT $1\0\0\x01\0\0\0\x17");
        assert_eq!(translate_body(&plain, &Translated::new()), Some(plain.clone()));
    }
}
