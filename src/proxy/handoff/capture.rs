//! Reads a session's state from its own backend, in one round trip for almost every session.
//!
//! Everything is one implicit transaction, so that what is set for reading (an encoding of our own, no statement
//! time-out) ends with it. Until that is set the session's own time-out is in force, because behind another value it
//! would not be seen whether the session has set it: where it ends the reading, that is done once more without it.
//!
//! The session may have any `search_path`, with operators and functions of its own in front: every name here says
//! pg_catalog, and constructs that look an operator up by its bare name (`=`, `IN`, `CASE x WHEN`) are not used.

use bytes::{Bytes, BytesMut};

use crate::postgres::RawConnection;
use crate::sqlstate::QUERY_CANCELED;

use super::exchange::{Answer, Pipeline, Row};
use super::state::{Backslashes, Identity, Origin, SessionState, Statement, Transport, TypeForm, TypeName, Unnamed};
use super::tracked::UnnamedStatement;
use super::{Blocker, HandoffError, Tracked};

/// The statement name that this module uses on a client's backend, closed again in the same batch.
pub(super) const OWN_STATEMENT: &[u8] = b"pgcutover_handoff";

/// Types with OIDs below this have the same one on every server and in every major (`src/include/access/transam.h`:
/// from 10000 on initdb assigns them, from 16384 on the running server).
pub const FIRST_UNSTABLE_OID: u32 = 10_000;

const READING: &str = "reading a session's state";

const STATEMENT_TIMEOUT: &str = "statement_timeout";

/// So often is a query tried that takes next to no time and yet was ended, by a very short time-out or a late cancel.
const ATTEMPTS: usize = 5;

/// Settings of the session, and those of the names in `$2` that have a value and are not declared (custom settings are
/// not in pg_settings). It runs in whatever encoding the client has, so everything comes as hexadecimal digits of the
/// transport encoding, `$1`. Left out: what is read apart, what belongs to a transaction, what only reports.
const SETTINGS: &str = "WITH s AS (SELECT name, source FROM pg_catalog.pg_settings) \
    SELECT pg_catalog.encode(pg_catalog.convert_to(n.name, $1::pg_catalog.name), 'hex'), \
        pg_catalog.encode(pg_catalog.convert_to(n.value, $1::pg_catalog.name), 'hex') \
    FROM (SELECT s.name, pg_catalog.current_setting(s.name) FROM s \
        WHERE s.source OPERATOR(pg_catalog.=) 'session' AND s.name OPERATOR(pg_catalog.<>) ALL \
        ('{role,session_authorization,is_superuser,in_hot_standby,seed,\
        transaction_isolation,transaction_read_only,transaction_deferrable}'::pg_catalog.text[]) \
        UNION ALL SELECT c.name, pg_catalog.current_setting(c.name, true) \
        FROM pg_catalog.unnest($2::pg_catalog.text[]) c(name) \
        WHERE pg_catalog.current_setting(c.name, true) IS NOT NULL AND NOT EXISTS (SELECT FROM s \
        WHERE pg_catalog.lower(s.name COLLATE pg_catalog.\"C\") OPERATOR(pg_catalog.=) \
        pg_catalog.lower(c.name COLLATE pg_catalog.\"C\"))) n(name, value)";

/// The same where there are no names to ask for, which planned and run takes a third of the time: it is read in the pause,
/// of every session that has run anything since it was read first. Not from pg_settings, whose rules cost as much again:
/// that view is all of this function and nothing else, under the same rights (`src/backend/catalog/system_views.sql`).
const DECLARED_SETTINGS: &str = "SELECT pg_catalog.encode(pg_catalog.convert_to(s.name, $1::pg_catalog.name), 'hex'), \
        pg_catalog.encode(pg_catalog.convert_to(pg_catalog.current_setting(s.name), $1::pg_catalog.name), 'hex') \
    FROM pg_catalog.pg_show_all_settings() s \
    WHERE s.source OPERATOR(pg_catalog.=) 'session' AND s.name OPERATOR(pg_catalog.<>) ALL \
        ('{role,session_authorization,is_superuser,in_hot_standby,seed,\
        transaction_isolation,transaction_read_only,transaction_deferrable}'::pg_catalog.text[])";

/// After the settings, because it hides the session's own until the transaction ends.
const PREPARE_TO_READ: &str = "SELECT pg_catalog.set_config('client_encoding', $1::pg_catalog.text, true), \
    pg_catalog.set_config('statement_timeout', '0', true)";

/// For longer than the transaction: majors before 11 count from its beginning, with what was set then.
const SET_ASIDE: &str = "SELECT own.was, pg_catalog.set_config('statement_timeout', '0', false) \
    FROM (SELECT pg_catalog.current_setting('statement_timeout') OFFSET 0) own(was)";

/// RESET, and then `$1` again where that is something else: the session has set it, and it is said. Nothing tells
/// whether a session that has what RESET leads to has set that.
const GIVE_BACK: &str = "SELECT CASE WHEN pg_catalog.set_config('statement_timeout', NULL, false) \
        OPERATOR(pg_catalog.<>) $1::pg_catalog.text \
    THEN pg_catalog.set_config('statement_timeout', $1::pg_catalog.text, false) END";

/// Who it is, and how much it holds that cannot move. `session_user` is the role after SET SESSION AUTHORIZATION,
/// usesysid the role that logged in.
const IDENTITY: &str = "SELECT CASE WHEN session_user OPERATOR(pg_catalog.<>) pg_catalog.pg_get_userbyid(a.usesysid) \
    THEN session_user END, pg_catalog.current_setting('role'), \
    pg_catalog.current_setting('standard_conforming_strings'), \
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_cursor() c WHERE c.is_holdable), pg_catalog.pg_my_temp_schema() \
    FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) a";

/// Asked of sessions that have a temporary schema only. Whatever is in a schema depends on it, operators and collations
/// as well as tables; that is how a server finds what it removes when the session ends (`RemoveTempRelations`).
const TEMPORARY: &str = "SELECT pg_catalog.count(*) FROM pg_catalog.pg_depend d \
    WHERE d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass::pg_catalog.oid \
    AND d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()";

const STATEMENTS: &str = "SELECT p.name, p.statement, p.from_sql, \
    pg_catalog.array_to_string(p.parameter_types::pg_catalog.oid[], ',') FROM pg_catalog.pg_prepared_statement() p \
    WHERE p.name OPERATOR(pg_catalog.<>) 'pgcutover_handoff'";

/// Names of the parameter types whose OIDs differ between servers; `$1`: those of the unnamed statement. Most sessions
/// have none, so the names are looked up one by one (`OFFSET 0` keeps it so) rather than by reading all of pg_type.
const TYPES: &str = "SELECT used.oid, named.* \
    FROM (SELECT pg_catalog.unnest(p.parameter_types::pg_catalog.oid[]) \
        FROM pg_catalog.pg_prepared_statements p WHERE p.name OPERATOR(pg_catalog.<>) 'pgcutover_handoff' \
        UNION SELECT pg_catalog.unnest($1::pg_catalog.oid[])) used(oid) \
    CROSS JOIN LATERAL (SELECT n.nspname, COALESCE(e.typname, t.typname), e.oid IS NOT NULL \
        FROM pg_catalog.pg_type t \
        LEFT JOIN pg_catalog.pg_type e \
            ON e.oid OPERATOR(pg_catalog.=) t.typelem AND e.typarray OPERATOR(pg_catalog.=) t.oid \
        JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) COALESCE(e.typnamespace, t.typnamespace) \
        WHERE t.oid OPERATOR(pg_catalog.=) used.oid OFFSET 0) named \
    WHERE used.oid OPERATOR(pg_catalog.>=) '10000'::pg_catalog.oid";

const CHANNELS: &str = "SELECT c FROM pg_catalog.pg_listening_channels() c";

const LOCKS: &str = "SELECT pg_catalog.count(*) FROM pg_catalog.pg_lock_status() l \
    WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
    AND l.granted";

/// Reads the state of the session that owns `connection`, which must be at a safe point: nothing unanswered, no
/// transaction. `tracked` must have been told so ([`Tracked::at_safe_point`]). `catalogue_names` are custom settings
/// that policies and functions of the database use (see [`super::catalogue_settings`]).
///
/// Notifications that arrive meanwhile are appended to `for_client` as whole messages, also when this fails. The future
/// must not be dropped before it ends: the backend's answers would be left for the client to read. After
/// [`HandoffError::Refused`] and [`HandoffError::TooLarge`] the backend serves its client as before; after any other error
/// it is to be closed.
pub async fn capture(
    connection: &mut RawConnection,
    tracked: &Tracked,
    catalogue_names: &[String],
    for_client: &mut BytesMut,
) -> Result<SessionState, HandoffError> {
    let state = read_all(connection, tracked, catalogue_names, for_client).await;
    if !state.as_ref().is_err_and(was_cancelled) {
        return state;
    }
    let was = set_aside(connection, for_client).await?;
    let state = read_all(connection, tracked, catalogue_names, for_client).await;
    if !matches!(state, Ok(_) | Err(HandoffError::Refused { .. } | HandoffError::TooLarge { .. })) {
        return state;
    }
    let own = give_back(connection, &was, for_client).await?;
    let mut state = state?;
    match own {
        Some(value) => drop(state.settings.insert(STATEMENT_TIMEOUT.to_owned(), value)),
        None => drop(state.settings.remove(STATEMENT_TIMEOUT)),
    }
    Ok(state)
}

fn was_cancelled(error: &HandoffError) -> bool {
    matches!(error, HandoffError::Refused { sqlstate, .. } if sqlstate == QUERY_CANCELED)
}

/// From here on no statement of the session is ended for its time; says what its time-out was.
async fn set_aside(connection: &mut RawConnection, for_client: &mut BytesMut) -> Result<Bytes, HandoffError> {
    let [was, _] = read_row(connection, &(SET_ASIDE, Vec::new()), for_client).await?;
    was.ok_or_else(odd)
}

/// Gives the session its time-out again; says which, where it is the session's own.
async fn give_back(
    connection: &mut RawConnection,
    was: &[u8],
    for_client: &mut BytesMut,
) -> Result<Option<Bytes>, HandoffError> {
    match read_row(connection, &(GIVE_BACK, vec![was]), for_client).await {
        Ok([own]) => Ok(own.map(|value| Bytes::copy_from_slice(&value))),
        // Without it the backend is not its client's any more.
        Err(HandoffError::Refused { .. }) => {
            Err(HandoffError::Protocol { doing: READING, what: "an error in answer to a RESET" })
        }
        Err(error) => Err(error),
    }
}

/// The one row of a query that takes next to no time.
async fn read_row<const N: usize>(
    connection: &mut RawConnection,
    query: &Query<'_>,
    for_client: &mut BytesMut,
) -> Result<[Option<Bytes>; N], HandoffError> {
    let mut attempts = 1;
    let mut sets = loop {
        match read(connection, std::slice::from_ref(query), for_client).await {
            Err(error) if was_cancelled(&error) && attempts < ATTEMPTS => attempts += 1,
            answered => break answered?,
        }
    };
    let row = sets.pop().and_then(|rows| rows.into_iter().next());
    row.and_then(columns).ok_or_else(odd)
}

fn odd() -> HandoffError {
    HandoffError::Protocol { doing: READING, what: "a result of another shape than was asked for" }
}

async fn read_all(
    connection: &mut RawConnection,
    tracked: &Tracked,
    catalogue_names: &[String],
    for_client: &mut BytesMut,
) -> Result<SessionState, HandoffError> {
    let transport = transport_of(connection);
    let unnamed = match tracked.unnamed() {
        UnnamedStatement::Absent => Unnamed::Absent,
        UnnamedStatement::Body(body) => Unnamed::Body(Bytes::copy_from_slice(body)),
        UnnamedStatement::TooLong => Unnamed::TooLong,
    };
    let names = custom_names(connection, tracked, catalogue_names);
    let name_list = array_literal(names.iter().map(|name| name.as_bytes()));
    let settings: Query<'_> = match names.is_empty() {
        true => (DECLARED_SETTINGS, vec![transport.as_bytes()]),
        false => (SETTINGS, vec![transport.as_bytes(), &name_list]),
    };
    let prepare_to_read = (PREPARE_TO_READ, vec![transport.as_bytes()]);
    let [identity, statements, channels, locks] = [IDENTITY, STATEMENTS, CHANNELS, LOCKS].map(|sql| (sql, Vec::new()));
    let queries = [settings, prepare_to_read.clone(), identity, statements, channels, locks];
    let sets = read(connection, &queries, for_client).await?;
    let unnamed_types: Vec<_> = unnamed_parameter_types(&unnamed).iter().map(u32::to_string).collect();
    let (mut state, temporary) = read_state(sets, transport, unnamed).ok_or_else(odd)?;
    if temporary == Schema::Made {
        let sets = read(connection, &[prepare_to_read.clone(), (TEMPORARY, Vec::new())], for_client).await?;
        count_temporary(&mut state, sets).ok_or_else(odd)?;
    }
    let unstable = |statement: &Statement| statement.parameter_types.iter().any(|oid| *oid >= FIRST_UNSTABLE_OID);
    // Hardly any session has them; planning that question takes longer than asking all others.
    if !unnamed_types.is_empty() || state.statements.values().any(unstable) {
        let unnamed_types = array_literal(unnamed_types.iter().map(String::as_bytes));
        let queries = [prepare_to_read.clone(), (TYPES, vec![&unnamed_types[..]])];
        let types = read(connection, &queries, for_client).await?.pop().ok_or_else(odd)?;
        read_types(&mut state, types).ok_or_else(odd)?;
    }
    if tracked.names_overflowed() {
        state.blockers.push(Blocker::TooManyCustomSettings);
    }
    Ok(state)
}

/// A statement of our own, and its parameters.
type Query<'a> = (&'static str, Vec<&'a [u8]>);

/// Runs these in one transaction; returns the rows of each.
async fn read(
    connection: &mut RawConnection,
    queries: &[Query<'_>],
    for_client: &mut BytesMut,
) -> Result<Vec<Vec<Row>>, HandoffError> {
    let mut pipeline = Pipeline::default();
    for (sql, parameters) in queries {
        let parameters: Vec<_> = parameters.iter().copied().map(Some).collect();
        pipeline.run(OWN_STATEMENT, sql.as_bytes(), &parameters);
    }
    pipeline.sync();
    // After an error the server has skipped the Close: close again, in a unit of its own.
    pipeline.close(OWN_STATEMENT);
    pipeline.sync();
    let answers = pipeline.exchange(connection, for_client, READING).await?;
    answers.into_iter().next().unwrap_or(Answer::Done(Vec::new())).rows(READING)
}

/// Whether a session has a schema for temporary objects, which stays when the last of them is gone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Schema {
    None,
    Made,
}

fn count_temporary(state: &mut SessionState, mut sets: Vec<Vec<Row>>) -> Option<()> {
    let [count] = columns(sets.pop()?.into_iter().next()?)?;
    match number(&count?)? {
        0 => {}
        count => state.blockers.push(Blocker::TemporaryObjects { count }),
    }
    Some(())
}

fn read_state(sets: Vec<Vec<Row>>, transport: Transport, unnamed: Unnamed) -> Option<(SessionState, Schema)> {
    let [settings, _, identity, statements, channels, locks] = <[Vec<Row>; 6]>::try_from(sets).ok()?;
    let mut state = SessionState { transport, unnamed, ..SessionState::default() };

    for row in settings {
        let [name, value] = columns(row)?;
        state.settings.insert(String::from_utf8(unhex(&name?)?).ok()?, unhex(&value?)?.into());
    }

    let [session_authorization, role, strings, cursors, temporary] = columns(identity.into_iter().next()?)?;
    state.identity = Identity { session_authorization, role: Some(role?) };
    let backslashes = if strings.as_deref() == Some(b"off") { Backslashes::Escape } else { Backslashes::Plain };
    match number(&cursors?)? {
        0 => {}
        count => state.blockers.push(Blocker::HoldableCursors { count }),
    }
    let temporary = if number(&temporary?)? == 0 { Schema::None } else { Schema::Made };

    for row in statements {
        let [name, text, from_sql, parameter_types] = columns(row)?;
        let origin = if &from_sql?[..] == b"t" { Origin::Sql { backslashes } } else { Origin::Protocol };
        let statement = Statement { text: text?, origin, parameter_types: oid_list(&parameter_types?)? };
        state.statements.insert(name?, statement);
    }
    for row in channels {
        let [channel] = columns(row)?;
        state.channels.insert(channel?);
    }
    let [locks] = columns(locks.into_iter().next()?)?;
    match number(&locks?)? {
        0 => {}
        count => state.blockers.push(Blocker::AdvisoryLocks { count }),
    }
    Some((state, temporary))
}

fn read_types(state: &mut SessionState, types: Vec<Row>) -> Option<()> {
    for row in types {
        let [oid, schema, name, is_array] = columns(row)?;
        let form = if &is_array?[..] == b"t" { TypeForm::ArrayOver } else { TypeForm::Itself };
        state.types.insert(oid_of(&oid?)?, TypeName { schema: schema?, name: name?, form });
    }
    Some(())
}

/// The encoding in which texts can be read whole: in a SQL_ASCII database nothing may be converted.
fn transport_of(connection: &RawConnection) -> Transport {
    let is_sql_ascii = connection.parameter("server_encoding") == Some("SQL_ASCII");
    if is_sql_ascii { Transport::SqlAscii } else { Transport::Utf8 }
}

/// Candidates for custom settings. Names that the server could not read in the client's encoding, or not hold in its own,
/// would fail the whole capture; they are left out.
fn custom_names<'a>(connection: &RawConnection, tracked: &'a Tracked, catalogue_names: &'a [String]) -> Vec<&'a str> {
    let all_utf8 = ["client_encoding", "server_encoding"].iter().all(|name| connection.parameter(name) == Some("UTF8"));
    let names = tracked.names().chain(catalogue_names.iter().map(String::as_str));
    names.filter(|name| all_utf8 || name.is_ascii()).collect()
}

/// Parameter types that the client gave with its unnamed Parse.
pub(super) fn unnamed_parameter_types(unnamed: &Unnamed) -> Vec<u32> {
    let Unnamed::Body(body) = unnamed else { return Vec::new() };
    unnamed_types_at(body)
        .map(|start| {
            body[start..]
                .chunks_exact(4)
                .map(|oid| u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]))
                .filter(|oid| *oid >= FIRST_UNSTABLE_OID)
                .collect()
        })
        .unwrap_or_default()
}

/// Where the OIDs of the parameter types begin in the body of an unnamed Parse.
pub(super) fn unnamed_types_at(body: &[u8]) -> Option<usize> {
    let text_end = 1 + body.get(1..)?.iter().position(|byte| *byte == 0)?;
    let start = text_end + 3;
    (body.len() >= start).then_some(start)
}

/// `{"…","…"}`, as the input function of arrays reads it.
pub(super) fn array_literal<'a>(items: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = vec![b'{'];
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.push(b'"');
        for byte in item {
            if matches!(byte, b'"' | b'\\') {
                out.push(b'\\');
            }
            out.push(*byte);
        }
        out.push(b'"');
    }
    out.push(b'}');
    out
}

pub(super) fn columns<const N: usize>(row: Row) -> Option<[Option<Bytes>; N]> {
    row.try_into().ok()
}

fn unhex(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = digits.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?));
    pairs.collect()
}

fn number(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

pub(super) fn oid_of(bytes: &[u8]) -> Option<u32> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

fn oid_list(bytes: &[u8]) -> Option<Vec<u32>> {
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    bytes.split(|byte| *byte == b',').map(oid_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_quoted() {
        assert_eq!(array_literal([&b"a.b"[..], b"q\"\\,{}"].into_iter()), b"{\"a.b\",\"q\\\"\\\\,{}\"}");
        assert_eq!(array_literal(std::iter::empty()), b"{}");
    }

    #[test]
    fn the_types_of_an_unnamed_parse_are_found() {
        let body = Bytes::from_static(b"\0SELECT $1\0\0\x02\0\0\0\x17\0\0\x40\x01");
        assert_eq!(unnamed_parameter_types(&Unnamed::Body(body)), [0x4001]);
        assert_eq!(unnamed_parameter_types(&Unnamed::Body(Bytes::from_static(b"\0SELECT"))), Vec::<u32>::new());
    }

    #[test]
    fn hexadecimal_digits_are_read() {
        assert_eq!(unhex(b"00e4Ff"), Some(vec![0, 0xe4, 0xff]));
        assert_eq!(unhex(b""), Some(vec![]));
        assert_eq!((unhex(b"0"), unhex(b"0g")), (None, None));
    }

    #[test]
    fn oid_lists_are_read() {
        assert_eq!(oid_list(b""), Some(vec![]));
        assert_eq!(oid_list(b"23,25"), Some(vec![23, 25]));
        assert_eq!(oid_list(b"23,x"), None);
    }
}
