//! Runs samples on the target.
//!
//! ```text
//! log in as the session did, read-only by default; give the backend the session's settings and role
//! BEGIN READ ONLY; SET LOCAL statement_timeout …       whatever our judgement was worth: nothing is written
//! [Parse] Bind Describe Execute Sync                    one statement: the extended protocol takes no more
//! ROLLBACK
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::compare::{Answer, Match};
use super::judge::{Avoided, judge};
use super::taking::ANSWER_BYTES;
use super::tally::{Outcome, Skip};
use super::{APPLICATION, DOUBTS, Doubt, ENDING, Run, Sample, lock};
use crate::postgres::{Connector, Login, RawError};
use crate::proxy::Shared;
use crate::proxy::backend::{self, Backend};
use crate::proxy::handoff::{FIRST_UNSTABLE_OID, SessionState, apply_delta, delta};
use crate::switch::ServerRole;
use crate::wire::frame::{self, backend as tags, frontend, take_cstr};
use crate::wire::message;

/// A statement may take as long as this, or as so many times what it took on the source.
const STATEMENT: Duration = Duration::from_secs(5);
const TIMES_SOURCE: u32 = 4;
const STATEMENT_MOST: Duration = Duration::from_secs(60);

/// What everything around it may take.
const AROUND: Duration = Duration::from_secs(5);

/// The longest answer that is read: the source's was shorter by as much as the target describes of what it sends.
const ANSWERED_BYTES: usize = 2 * ANSWER_BYTES;

/// Between two attempts to reach a target that is not to be had.
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_MOST: Duration = Duration::from_secs(30);

/// Volatile functions; then what views and policies say, and without a text what no replication brings: foreign tables,
/// sequences, unlogged tables, and tables that have one of them as a part.
const FUNCTIONS: &str = "SELECT DISTINCT p.proname::text FROM pg_catalog.pg_proc p WHERE p.provolatile = 'v'";
const RELATIONS: &str = "WITH RECURSIVE away(oid) AS ( \
        SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relkind IN ('f', 'S') OR c.relpersistence = 'u' \
        UNION SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN away ON away.oid = i.inhrelid) \
    SELECT c.relname::text, NULL::text FROM away JOIN pg_catalog.pg_class c ON c.oid = away.oid \
    UNION ALL SELECT c.relname::text, pg_catalog.pg_get_viewdef(c.oid) FROM pg_catalog.pg_class c \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.relkind = 'v' AND n.nspname NOT IN ('pg_catalog', 'information_schema') \
    UNION ALL SELECT c.relname::text, 'SELECT ' || pg_catalog.pg_get_expr(p.polqual, p.polrelid) \
        FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid WHERE p.polqual IS NOT NULL";

/// Asks a database which names a sample must not have.
pub(super) async fn avoided(target: &Connector, database: &str) -> Result<Avoided, String> {
    let control = target.control(database, "shadow").await.map_err(|error| error.to_string())?;
    let asked = async {
        let functions = control.query(FUNCTIONS, &[]).await?;
        Ok::<_, tokio_postgres::Error>((functions, control.query(RELATIONS, &[]).await?))
    };
    let asked = asked.await.map_err(|error| error.to_string());
    control.close().await;
    let (functions, relations) = asked?;
    let mut avoided =
        Avoided { functions: functions.iter().map(|row| row.get(0)).collect(), relations: HashSet::new() };
    let relations: Vec<(String, Option<String>)> = relations.iter().map(|row| (row.get(0), row.get(1))).collect();
    // A view may be over a view.
    loop {
        let before = avoided.relations.len();
        for (name, text) in &relations {
            let is_plain = text.as_ref().is_some_and(|text| judge(text.as_bytes(), &avoided).is_ok());
            if !is_plain {
                avoided.relations.insert(name.clone());
            }
        }
        if avoided.relations.len() == before {
            return Ok(avoided);
        }
    }
}

/// One statement as it is sent.
pub(super) struct Call {
    /// What a Parse has after the name.
    parse: Bytes,
    /// Whether the client had it parsed before.
    was_prepared: bool,
    /// What a Bind has after the names.
    bind: Vec<u8>,
}

impl Call {
    /// Reads the client's frames: a Query, or one Bind and one Execute with what belongs to them.
    pub(super) fn of(request: &[u8], prepared: Option<&Bytes>) -> Result<Self, Skip> {
        let mut rest = request;
        let (mut parse, mut bind, mut executes) = (None, None, 0);
        while !rest.is_empty() {
            let Ok(Some((header, mut body))) = frame::first(rest) else { return Err(Skip::NotARead) };
            rest = &rest[frame::HEADER_BYTES + body.len()..];
            match header.tag {
                frontend::QUERY => {
                    let parse = [body, b"\0\0"].concat().into();
                    return Ok(Self { parse, was_prepared: false, bind: vec![0; 6] });
                }
                frontend::PARSE if parse.is_none() && bind.is_none() => {
                    let name = take_cstr(&mut body).ok_or(Skip::NotARead)?;
                    parse = Some((name, body));
                }
                frontend::BIND if bind.is_none() => {
                    let _portal = take_cstr(&mut body).ok_or(Skip::NotARead)?;
                    let name = take_cstr(&mut body).ok_or(Skip::NotARead)?;
                    if parse.is_some_and(|(parsed, _)| parsed != name) {
                        return Err(Skip::NotARead);
                    }
                    bind = Some(body);
                }
                frontend::EXECUTE => {
                    let _portal = take_cstr(&mut body).ok_or(Skip::NotARead)?;
                    // A part of the rows is no answer to compare.
                    if body != [0; 4] {
                        return Err(Skip::NotARead);
                    }
                    executes += 1;
                }
                frontend::DESCRIBE | frontend::SYNC => {}
                _ => return Err(Skip::NotARead),
            }
        }
        let (Some(bind), 1) = (bind, executes) else { return Err(Skip::NotARead) };
        let was_prepared = parse.is_none();
        let tail = match parse {
            Some((_, tail)) => Bytes::copy_from_slice(tail),
            None => prepared.cloned().ok_or(Skip::NotKnown)?,
        };
        let mut types = &tail[..];
        take_cstr(&mut types).ok_or(Skip::NotARead)?;
        let own = types
            .get(2..)
            .unwrap_or_default()
            .chunks_exact(4)
            .any(|oid| oid.first_chunk().is_some_and(|oid| u32::from_be_bytes(*oid) >= FIRST_UNSTABLE_OID));
        if own {
            return Err(Skip::NotComparable);
        }
        Ok(Self { parse: tail, was_prepared, bind: bind.to_vec() })
    }

    /// The statement's text.
    pub(super) fn text(&self) -> &[u8] {
        self.parse.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    fn parse_into(&self, out: &mut Vec<u8>) {
        message::parse_raw(out, b"", &self.parse);
    }

    fn bind_into(&self, out: &mut Vec<u8>) {
        message::raw(out, frontend::BIND, &[b"\0\0", &self.bind[..]].concat());
        message::raw(out, frontend::DESCRIBE, b"P\0");
        message::raw(out, frontend::EXECUTE, &[0; 5]);
        out.extend_from_slice(&message::SYNC);
    }
}

/// A connection to one server, and what it has been given.
#[derive(Default)]
pub(super) struct Link(Option<Open>);

struct Open {
    login: Arc<Login>,
    state: SessionState,
    backend: Backend,
    /// A statement is on it: its end is not proven.
    is_busy: bool,
}

/// Why a server has not answered.
pub(super) enum Unanswered {
    /// It cannot be reached, or it refuses the login; then with SQLSTATE.
    Closed(Option<String>),
    /// It cannot be given what the session has set up.
    Unlike,
    /// It was lost or too slow.
    Lost,
    /// It said more than is kept.
    TooMuch,
}

impl From<RawError> for Unanswered {
    fn from(_: RawError) -> Self {
        Self::Lost
    }
}

impl Link {
    pub(super) fn login(&self) -> Option<&Arc<Login>> {
        self.0.as_ref().map(|open| &open.login)
    }

    /// Runs `call` as the session that it came from would.
    pub(super) async fn run(
        &mut self,
        shared: &Shared,
        server: ServerRole,
        login: &Arc<Login>,
        state: &SessionState,
        call: &Call,
        took: Duration,
    ) -> Result<(Answer, Duration), Unanswered> {
        let statement = (took * TIMES_SOURCE).clamp(STATEMENT, STATEMENT_MOST);
        let answered = async {
            self.become_like(shared, server, login, state).await?;
            let Some(open) = &mut self.0 else { return Err(Unanswered::Lost) };
            open.is_busy = true;
            let answer = open.exchange(call, statement).await?;
            open.is_busy = false;
            Ok(answer)
        };
        let config = &shared.config;
        let connecting = match server {
            ServerRole::Source => config.source.connect_timeout,
            ServerRole::Target => config.target.connect_timeout,
        };
        let bound = statement + AROUND + connecting;
        let answered = tokio::time::timeout(bound, answered).await.unwrap_or(Err(Unanswered::Lost));
        if answered.is_err() {
            self.close(shared).await;
        }
        answered
    }

    async fn become_like(
        &mut self,
        shared: &Shared,
        server: ServerRole,
        login: &Arc<Login>,
        state: &SessionState,
    ) -> Result<(), Unanswered> {
        if self.0.as_ref().is_some_and(|open| !open.login.is_same_as(login)) {
            self.close(shared).await;
        }
        let wanted = state.clone().into_settings().with_settings([("application_name", APPLICATION)]);
        // RESET leaves a custom setting empty, and to the session it is unknown.
        let names = wanted.custom_names();
        if self.0.as_ref().is_some_and(|open| open.state.custom_names().iter().any(|name| !names.contains(name))) {
            self.close(shared).await;
        }
        if self.0.is_none() {
            let database = shared.switchboard.database(&login.database);
            let opened = backend::open_aside(shared, login, &database, server).await;
            let mut backend = opened.map_err(|error| Unanswered::Closed(error.sqlstate().map(str::to_owned)))?;
            backend.connection.bound_frames(ANSWERED_BYTES);
            let (login, state) = (login.clone(), SessionState::default());
            self.0 = Some(Open { login, state, backend, is_busy: false });
        }
        let Some(open) = &mut self.0 else { return Err(Unanswered::Lost) };
        if open.state == wanted {
            return Ok(());
        }
        open.is_busy = true;
        let change = delta(&open.state, &wanted);
        let report = apply_delta(&mut open.backend.connection, &change).await.map_err(|_| Unanswered::Lost)?;
        open.is_busy = false;
        open.state = wanted;
        // Nobody may read with other settings, or as another role, than the session has.
        if report.blockers().is_empty() { Ok(()) } else { Err(Unanswered::Unlike) }
    }

    /// Closes the connection; what may still run there is cancelled first.
    pub(super) async fn close(&mut self, shared: &Shared) {
        let Some(open) = self.0.take() else { return };
        let connection = open.backend.connection;
        let closing = async {
            if open.is_busy {
                // It ends at its time-out otherwise.
                let _told = shared.connector(open.backend.server).cancel(connection.pid, &connection.cancel_key).await;
            }
            // The server notices a closed socket too.
            let _closed = connection.terminate().await;
        };
        let _in_time = tokio::time::timeout(ENDING / 2, closing).await;
    }
}

impl Open {
    async fn exchange(&mut self, call: &Call, statement: Duration) -> Result<(Answer, Duration), Unanswered> {
        let begin = format!(
            "BEGIN READ ONLY; SET LOCAL statement_timeout = {0}; SET LOCAL lock_timeout = {0}",
            statement.as_millis()
        );
        self.simple(&begin).await?;
        let mut out = Vec::new();
        call.parse_into(&mut out);
        if call.was_prepared {
            out.extend_from_slice(&message::SYNC);
            self.backend.connection.send(&out).await?;
            let prepared = self.answer().await?;
            if prepared.failure.is_some() {
                self.simple("ROLLBACK").await?;
                return Ok((prepared, Duration::ZERO));
            }
            out.clear();
        }
        call.bind_into(&mut out);
        let asked = Instant::now();
        self.backend.connection.send(&out).await?;
        let answer = self.answer().await?;
        let took = asked.elapsed();
        self.simple("ROLLBACK").await?;
        Ok((answer, took))
    }

    async fn simple(&mut self, sql: &str) -> Result<(), Unanswered> {
        self.backend.connection.simple_query(sql).await?;
        Ok(())
    }

    async fn answer(&mut self) -> Result<Answer, Unanswered> {
        let mut bytes = Vec::new();
        loop {
            let frame = self.backend.connection.next_frame().await.map_err(|error| match error {
                // A message that is longer than any that is held.
                RawError::Protocol { .. } => Unanswered::TooMuch,
                error => error.into(),
            })?;
            if bytes.len() + frame.body.len() > ANSWERED_BYTES {
                return Err(Unanswered::TooMuch);
            }
            if frame.tag == tags::READY_FOR_QUERY {
                return Answer::parse(bytes).ok_or(Unanswered::Lost);
            }
            message::raw(&mut bytes, frame.tag, &frame.body);
        }
    }
}

/// Owns a run's tasks: they end with it, and it ends with its time, with the fence, and with the process.
pub(super) async fn drive(shared: Arc<Shared>, run: Arc<Run>) {
    let mut tasks = JoinSet::new();
    // One of the connections is for answers that differ.
    for _ in 1..shared.limits.load().shadow_connections.max(2) {
        tasks.spawn(work(shared.clone(), run.clone()));
    }
    tasks.spawn(super::recheck::work(shared.clone(), run.clone()));
    tokio::select! {
        // Every arm only waits, so dropping it is safe.
        () = run.ended() => {}
        () = tokio::time::sleep_until(run.ends_at.into()) => run.end("its time is over"),
        () = shared.tasks.stopping() => run.end("the daemon stops"),
    }
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(ENDING, all).await.is_err() {
        tasks.shutdown().await;
    }
    lock(&run.queue).clear();
    lock(&run.doubts).clear();
    run.forget();
    run.in_doubt.store(0, Ordering::Release);
    run.closed.send_replace(true);
}

/// Takes samples from the queue and runs them, on one connection.
async fn work(shared: Arc<Shared>, run: Arc<Run>) {
    let mut link = Link::default();
    let mut back_off = BACK_OFF;
    loop {
        let pause = tokio::select! {
            biased;
            // What is left on the server is cancelled below.
            () = run.ended() => break,
            // A sample that is dropped half way is not counted: the run is over.
            unreachable = one(&shared, &run, &mut link) => unreachable,
        };
        if !pause {
            back_off = BACK_OFF;
            continue;
        }
        tokio::select! {
            // Both only wait.
            () = run.ended() => break,
            () = tokio::time::sleep(back_off) => back_off = (back_off * 2).min(BACK_OFF_MOST),
        }
    }
    link.close(&shared).await;
}

/// Returns whether the target could not be reached.
async fn one(shared: &Shared, run: &Run, link: &mut Link) -> bool {
    let sample = run.next(link.login()).await;
    let call = match run.judged(&sample) {
        Ok(call) => call,
        Err(why) => {
            run.skipped(why);
            return false;
        }
    };
    let Sample { login, state, answer, took, _slot, .. } = sample;
    let Some(answer) = Answer::parse(answer).filter(|answer| answer.is_complete) else {
        run.skipped(Skip::NotARead);
        return false;
    };
    if run.is_refused(&login) {
        run.skipped(Skip::Session);
        return false;
    }
    let answered = link.run(shared, ServerRole::Target, &login, &state, &call, took).await;
    let mut tally = lock(&run.tally);
    match answered {
        Ok((theirs, target_took)) => {
            if let Some(sqlstate) = &theirs.failure {
                tally.failed(call.text(), sqlstate);
                tally.ended(Outcome::Failed, &run.metrics);
                return false;
            }
            tally.took(call.text(), took, target_took, &run.metrics);
            match answer.compare(&theirs) {
                Match::Equal => tally.ended(Outcome::Equal, &run.metrics),
                Match::Reordered => tally.ended(Outcome::Reordered, &run.metrics),
                Match::NotComparable => tally.ended(Outcome::NotComparable, &run.metrics),
                Match::Unequal => {
                    drop(tally);
                    doubt(run, Doubt { login, state, call, answer, _slot });
                }
            }
        }
        Err(Unanswered::TooMuch) => {
            drop(tally);
            doubt(run, Doubt { login, state, call, answer, _slot });
        }
        Err(Unanswered::Unlike) => {
            tally.skipped(Skip::Session, &run.metrics);
            run.refused(&login);
        }
        Err(Unanswered::Closed(Some(sqlstate))) => {
            tally.failed(call.text(), &sqlstate);
            tally.ended(Outcome::Failed, &run.metrics);
            run.refused(&login);
        }
        Err(Unanswered::Closed(None) | Unanswered::Lost) => {
            tally.ended(Outcome::Unreachable, &run.metrics);
            return true;
        }
    }
    false
}

/// To be looked at again, if not too many are.
fn doubt(run: &Run, doubt: Doubt) {
    let mut doubts = lock(&run.doubts);
    if doubts.len() < DOUBTS {
        doubts.push_back(doubt);
        run.in_doubt.fetch_add(1, Ordering::AcqRel);
        run.doubted.notify_one();
    } else {
        drop(doubts);
        lock(&run.tally).ended(Outcome::Undecided, &run.metrics);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(list: &[(u8, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        list.iter().for_each(|(tag, body)| message::raw(&mut out, *tag, body));
        out
    }

    #[test]
    fn one_statement_is_taken_from_either_protocol() {
        let query = Call::of(&frames(&[(b'Q', b"SELECT 1\0")]), None).expect("one");
        assert_eq!((query.text(), &query.parse[..]), (&b"SELECT 1"[..], &b"SELECT 1\0\0\0"[..]));
        let (bind, execute) = ((b'B', &b"\0s\0\0\0\0\0\0\0"[..]), (b'E', &b"\0\0\0\0\0"[..]));
        let parse = (b'P', &b"s\0SELECT $1\0\0\x01\0\0\0\x17"[..]);
        let sync = (b'S', &b""[..]);
        let all = Call::of(&frames(&[parse, bind, (b'D', b"P\0"), execute, sync]), None).expect("one");
        assert_eq!((all.text(), all.was_prepared), (&b"SELECT $1"[..], false));
        let known = Bytes::from_static(b"SELECT 7\0\0\0");
        let later = Call::of(&frames(&[bind, execute, sync]), Some(&known)).expect("one");
        assert_eq!((later.text(), later.was_prepared), (&b"SELECT 7"[..], true));
        let refused = |list: &[(u8, &[u8])], prepared| Call::of(&frames(list), prepared).err();
        assert_eq!(refused(&[bind, execute, sync], None), Some(Skip::NotKnown));
        assert_eq!(refused(&[parse, sync], None), Some(Skip::NotARead));
        assert_eq!(refused(&[bind, execute, bind, execute, sync], Some(&known)), Some(Skip::NotARead));
        assert_eq!(refused(&[bind, (b'E', b"\0\0\0\0\x05"), sync], Some(&known)), Some(Skip::NotARead));
        let own = (b'P', &b"s\0SELECT $1\0\0\x01\0\0\x40\x01"[..]);
        assert_eq!(refused(&[own, bind, execute, sync], None), Some(Skip::NotComparable));
    }
}
