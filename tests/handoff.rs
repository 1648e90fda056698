//! A session's state, read from one real server and replayed on another.
//!
//! From the oldest installed major to the newest, and where it matters also to itself.

mod support;

use bytes::BytesMut;
use pgcutover::config;
use pgcutover::demo::cluster::{Cluster, Installation};
use pgcutover::postgres::{Connector, Credential, InstanceId, Login, RawConnection};
use pgcutover::proxy::handoff::{
    Blocker, ReplayReport, SessionState, StatementFailure, Tracked, apply_delta, capture, catalogue_settings,
    changed_parameters, delta, replay, replay_and_plan,
};
use postgres_protocol::message::frontend;
use support::{cluster_options, connect, installations};

/// A client's session as the relay sees it: its backend, and what was noticed.
struct Session {
    backend: RawConnection,
    tracked: Tracked,
}

impl Session {
    async fn open(cluster: &Cluster, user: &str, parameters: &[(&str, &str)]) -> Self {
        let server = config::Server { user: user.to_owned(), ..support::server(cluster) };
        let connector = Connector::new(&server, "source", &InstanceId::random()).expect("no TLS to prepare");
        let login = Login {
            user: user.to_owned(),
            database: "app".to_owned(),
            credential: Credential::None,
            parameters: parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        };
        Self { backend: connector.raw(&login).await.expect("logs in"), tracked: Tracked::new() }
    }

    /// A simple query of the client's.
    async fn query(&mut self, sql: &str) -> Vec<Vec<Option<String>>> {
        let body = [sql.as_bytes(), b"\0"].concat();
        self.tracked.on_client_frame(b'Q', &body, body.len());
        let rows = self.backend.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        self.tracked.on_server_frame(b'Z');
        rows
    }

    /// Frames of the client's, which end in one Sync; returns the tags of the answer.
    async fn frames(&mut self, frames: &[u8]) -> String {
        let mut rest = frames;
        while let Some((header, _)) = rest.split_at_checked(5) {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            self.tracked.on_client_frame(header[0], &rest[5..=length], length - 4);
            rest = &rest[length + 1..];
        }
        self.backend.send(frames).await.expect("sent");
        let mut tags = String::new();
        loop {
            let frame = self.backend.next_frame().await.expect("answered");
            self.tracked.on_server_frame(frame.tag);
            tags.push(char::from(frame.tag));
            if frame.tag == b'Z' {
                return tags;
            }
        }
    }

    async fn parse(&mut self, name: &str, sql: &str, types: &[u32]) -> String {
        let mut out = BytesMut::new();
        frontend::parse(name, sql, types.iter().copied(), &mut out).expect("encodes");
        frontend::sync(&mut out);
        self.frames(&out).await
    }

    /// Binds and executes a statement with text parameters.
    async fn execute(&mut self, name: &str, parameters: &[&str]) -> String {
        let mut out = BytesMut::new();
        let write = |value: &&str, buffer: &mut BytesMut| {
            buffer.extend_from_slice(value.as_bytes());
            Ok(postgres_protocol::IsNull::No)
        };
        let bound = frontend::bind("", name, [], parameters, write, [], &mut out);
        assert!(bound.is_ok(), "encodes");
        frontend::execute("", 0, &mut out).expect("encodes");
        frontend::sync(&mut out);
        self.frames(&out).await
    }

    async fn capture(&mut self) -> SessionState {
        let mut for_client = BytesMut::new();
        self.tracked.at_safe_point();
        capture(&mut self.backend, &self.tracked, &[], &mut for_client).await.expect("captured")
    }

    /// The same session on `cluster`, opened as the relay opens it.
    async fn moved(&mut self, cluster: &Cluster, user: &str, parameters: &[(&str, &str)]) -> (Self, ReplayReport) {
        let state = self.capture().await;
        assert_eq!(state.blockers(), []);
        let mut other = Self::open(cluster, user, parameters).await;
        let report = replay(&mut other.backend, &state).await.expect("replayed");
        assert_eq!(report.blockers(), []);
        (other, report)
    }

    /// One text, without touching the unnamed statement.
    async fn text(&mut self, sql: &str) -> Option<String> {
        let rows = self.backend.query_named("test", sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten()
    }
}

/// The oldest complete major to itself.
async fn same_major(setup: &[&str]) -> (Cluster, Cluster) {
    let found = installations();
    let (old, _) = found.pair().expect("checked by installations()");
    start(old, old, setup).await
}

/// The oldest complete major to the newest.
async fn oldest_to_newest(setup: &[&str]) -> (Cluster, Cluster) {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    start(old, new, setup).await
}

async fn start(old: &Installation, new: &Installation, setup: &[&str]) -> (Cluster, Cluster) {
    let two = Cluster::start_two(cluster_options(old, "source"), cluster_options(new, "target"));
    let (source, target) = two.unwrap_or_else(|error| panic!("{error}"));
    // OIDs on the target are others than on the source.
    let padding = "CREATE TYPE pad AS (a int); CREATE TABLE padding ()";
    connect(&target, "postgres").await.batch_execute(padding).await.expect("made");
    for cluster in [&source, &target] {
        connect(cluster, "postgres").await.batch_execute("CREATE DATABASE app").await.expect("made");
        let client = connect(cluster, "app").await;
        for sql in setup {
            client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
    }
    (source, target)
}

const STARTUP: &[(&str, &str)] = &[("application_name", "first"), ("DateStyle", "ISO, DMY")];

#[tokio::test]
async fn settings_and_roles_arrive_as_they_were() {
    let setup = [
        "CREATE ROLE \"Odd \"\"role\" NOLOGIN",
        "CREATE ROLE login LOGIN",
        "GRANT \"Odd \"\"role\" TO login",
        "CREATE SCHEMA \"Größe, x\"",
    ];
    for (source, target) in [same_major(&setup).await, oldest_to_newest(&setup).await] {
        let mut old = Session::open(&source, "login", STARTUP).await;
        for sql in [
            "SET search_path TO \"Größe, x\", \"$user\", public",
            "SET application_name = 'it''s \\ \"quoted\" Größe'",
            "SET TimeZone = 'Asia/Kolkata'",
            "SET work_mem = '12345kB'",
            "SET statement_timeout = '7min'",
            "SET DateStyle = 'SQL, MDY'",
            "SET extra_float_digits = 0",
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY",
            "SET app.tenant_id = 'Größe ''7'' \\'",
            "SELECT set_config('app.\u{fc}ser', 'x', false)",
            "BEGIN; SET LOCAL app.passing = 'gone'; SET LOCAL lock_timeout = '3s'; COMMIT",
            "SET lc_messages = 'C'; RESET lc_messages",
            "SET ROLE \"Odd \"\"role\"",
        ] {
            // Some of these are for superusers only in some majors.
            if !sql.starts_with("SET lc_messages") {
                old.query(sql).await;
            }
        }
        let (mut new, report) = old.moved(&target, "login", STARTUP).await;
        assert_eq!(report, ReplayReport::default());
        for name in [
            "search_path",
            "application_name",
            "TimeZone",
            "work_mem",
            "statement_timeout",
            "DateStyle",
            "extra_float_digits",
            "default_transaction_isolation",
            "default_transaction_read_only",
            "app.tenant_id",
            "app.\u{fc}ser",
            "app.passing",
            "lock_timeout",
            "client_encoding",
            "role",
            "is_superuser",
        ] {
            let ask = format!("SELECT pg_catalog.current_setting('{name}', true)");
            assert_eq!(new.text(&ask).await, old.text(&ask).await, "{name}");
        }
        for ask in ["SELECT current_user::pg_catalog.text", "SELECT session_user::pg_catalog.text"] {
            assert_eq!(new.text(ask).await, old.text(ask).await, "{ask}");
        }
        assert_eq!(new.text("SELECT pg_catalog.current_setting('app.passing')").await.as_deref(), Some(""));
        // RESET leads to what the session started with, as before.
        for session in [&mut old, &mut new] {
            session.query("RESET ALL").await;
            assert_eq!(session.text("SELECT current_setting('DateStyle')").await.as_deref(), Some("ISO, DMY"));
            assert_eq!(session.text("SELECT current_setting('application_name')").await.as_deref(), Some("first"));
            assert_eq!(
                session.text("SELECT count(*)::text FROM pg_settings WHERE source = 'session'").await.as_deref(),
                Some("0")
            );
        }
    }
}

/// To read what the session has takes longer than that.
#[tokio::test]
async fn a_short_statement_timeout_arrives_too() {
    let setup = ["CREATE ROLE plain LOGIN", "CREATE ROLE hasty LOGIN", "ALTER ROLE hasty SET statement_timeout = 1"];
    let (source, target) = oldest_to_newest(&setup).await;
    let fresh = Session::open(&source, "plain", &[]).await.capture().await;
    let mut old = Session::open(&source, "plain", &[]).await;
    old.query("SET statement_timeout = 1").await;
    for _ in 0..10 {
        let (mut new, _) = old.moved(&target, "plain", &[]).await;
        let (here, there) = (old.capture().await, new.capture().await);
        assert!(here == there && here != fresh);
    }
    // The role's is not the session's own.
    assert!(Session::open(&source, "hasty", &[]).await.capture().await == fresh);
}

#[tokio::test]
async fn session_authorization_and_its_settings_arrive() {
    let setup = ["CREATE ROLE low LOGIN", "CREATE ROLE other NOLOGIN", "GRANT other TO low"];
    let (source, target) = oldest_to_newest(&setup).await;
    let mut old = Session::open(&source, "postgres", &[]).await;
    old.query("SET session_replication_role = replica").await;
    old.query("SET SESSION AUTHORIZATION low").await;
    old.query("SET ROLE other").await;
    let (mut new, _) = old.moved(&target, "postgres", &[]).await;
    let ask = "SELECT session_user || ' ' || current_user || ' ' || current_setting('session_replication_role')";
    assert_eq!(new.text(ask).await.as_deref(), Some("low other replica"));
    new.query("RESET ROLE; RESET SESSION AUTHORIZATION").await;
    assert_eq!(new.text(ask).await.as_deref(), Some("postgres postgres replica"));
}

#[tokio::test]
async fn prepared_statements_keep_names_types_and_plans_of_their_own_kind() {
    let setup = [
        "CREATE SCHEMA \"s \"\"x\"",
        "CREATE TYPE \"s \"\"x\".mood AS ENUM ('glad', 'sad')",
        "CREATE DOMAIN \"s \"\"x\".pin AS int CHECK (value > 0)",
        "CREATE TABLE \"s \"\"x\".t (m \"s \"\"x\".mood, ms \"s \"\"x\".mood[], p \"s \"\"x\".pin, j jsonb)",
        "CREATE TABLE counted (n int)",
    ];
    for (source, target) in [same_major(&setup).await, oldest_to_newest(&setup).await] {
        // Types that were made later have other numbers on the target.
        for cluster in [&source, &target] {
            let extra = if std::ptr::eq(cluster, &target) { "CREATE TYPE early AS (a int); " } else { "" };
            let sql = format!("{extra}CREATE TYPE late AS ENUM ('a', 'b')");
            connect(cluster, "app").await.batch_execute(&sql).await.expect("made");
        }
        let mut old = Session::open(&source, "postgres", &[]).await;
        old.query("SET search_path TO \"s \"\"x\", public").await;
        let mood = "INSERT INTO t (m, ms, p, j) VALUES ($1, $2, $3, $4) RETURNING m";
        assert_eq!(old.parse("named", mood, &[]).await, "1Z");
        assert_eq!(old.parse("it's \"odd\" Größe", "SELECT $1::late, $2::int8, $3::late[]", &[]).await, "1Z");
        old.query("PREPARE \"Sql one\" (late, int) AS SELECT $1, $2 + 1; INSERT INTO counted VALUES (1)").await;
        old.query("PREPARE two AS SELECT ';', $$;$$ -- ;").await;
        old.query("CREATE TABLE only_here (a int)").await;
        assert_eq!(old.parse("lost", "SELECT * FROM only_here WHERE a = $1", &[]).await, "1Z");

        let (mut new, report) = old.moved(&target, "postgres", &[]).await;
        assert_eq!(report.failed_statements.len(), 1);
        assert_eq!(&report.failed_statements[0].name[..], b"lost");
        assert_eq!(report.failed_statements[0].reason, StatementFailure::Refused { sqlstate: "42P01".to_owned() });
        let listed = "SELECT string_agg(format('%s|%s|%s|%s', name, parameter_types, from_sql, \
            CASE WHEN from_sql THEN '' ELSE statement END), ';' ORDER BY name) FROM pg_prepared_statements \
            WHERE name NOT IN ('test', 'lost')";
        assert_eq!(new.text(listed).await, old.text(listed).await);
        assert_eq!(new.execute("named", &["sad", "{glad,sad}", "3", "{}"]).await, "2DCZ");
        assert_eq!(new.execute("it's \"odd\" Größe", &["b", "7", "{a,b}"]).await, "2DCZ");
        assert_eq!(new.query("EXECUTE \"Sql one\" ('a', 41)").await, [[Some("a".to_owned()), Some("42".to_owned())]]);
        assert_eq!(new.query("EXECUTE two").await, [[Some(";".to_owned()), Some(";".to_owned())]]);
        assert_eq!(
            new.text("SELECT count(*)::text FROM counted").await.as_deref(),
            Some("0"),
            "nothing was executed twice"
        );
        assert_eq!(new.execute("lost", &["1"]).await, "EZ");
    }
}

#[tokio::test]
async fn the_unnamed_statement_survives_on_both_sides() {
    let setup = ["CREATE TYPE mood AS ENUM ('glad', 'sad')"];
    for (source, target) in [same_major(&setup).await, oldest_to_newest(&setup).await] {
        connect(&target, "app")
            .await
            .batch_execute("DROP TYPE mood; CREATE TYPE mood AS ENUM ('glad', 'sad')")
            .await
            .expect("made");
        let mut old = Session::open(&source, "postgres", &[]).await;
        let oid: u32 = old.text("SELECT 'mood'::regtype::oid::text").await.expect("a row").parse().expect("a number");
        old.query("LISTEN \"Größe \"\"x\"\" $\"").await;
        assert_eq!(old.parse("", "SELECT $1, $2", &[oid, 25]).await, "1Z");
        let (mut new, report) = old.moved(&target, "postgres", &[]).await;
        assert_eq!(report, ReplayReport::default());
        assert_eq!(old.execute("", &["sad", "x"]).await, "2DCZ", "reading the state has left it alone");
        assert_eq!(new.execute("", &["sad", "x"]).await, "2DCZ");
        assert_eq!(new.execute("", &["angry", "x"]).await, "EZ", "and it has the type it had");
        assert_eq!(
            new.text("SELECT string_agg(c, ',') FROM pg_listening_channels() c").await.as_deref(),
            Some("Größe \"x\" $")
        );
        // Nothing of ours is left.
        for session in [&mut old, &mut new] {
            assert_eq!(
                session.text("SELECT count(*)::text FROM pg_prepared_statements WHERE name <> 'test'").await.as_deref(),
                Some("0")
            );
        }
        // A session that never had one gets none.
        let mut plain = Session::open(&source, "postgres", &[]).await;
        let (mut moved, _) = plain.moved(&target, "postgres", &[]).await;
        assert_eq!(moved.execute("", &[]).await, "EZ");
    }
}

#[tokio::test]
async fn a_hostile_search_path_changes_nothing() {
    let setup = [
        "CREATE SCHEMA evil",
        "CREATE FUNCTION evil.set_config(text, text, boolean) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE FUNCTION evil.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE FUNCTION evil.eq(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE FUNCTION evil.eq(oid, oid) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE FUNCTION evil.eq(name, name) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$",
        "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, PROCEDURE = evil.eq)",
        "CREATE OPERATOR evil.<> (LEFTARG = text, RIGHTARG = text, PROCEDURE = evil.eq)",
        "CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, PROCEDURE = evil.eq)",
        "CREATE OPERATOR evil.>= (LEFTARG = oid, RIGHTARG = oid, PROCEDURE = evil.eq)",
        "CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, PROCEDURE = evil.eq)",
        "CREATE TYPE evil.text AS ENUM ('evil')",
        "CREATE TYPE evil.mood AS ENUM ('glad')",
        "CREATE VIEW evil.pg_settings AS SELECT 1 / 0 AS name",
        "CREATE VIEW evil.pg_prepared_statements AS SELECT 1 / 0 AS name",
    ];
    let (source, target) = oldest_to_newest(&setup).await;
    let mut old = Session::open(&source, "postgres", &[]).await;
    old.query("SET search_path TO evil, pg_catalog").await;
    old.query("SET app.x = '1'").await;
    assert_eq!(old.parse("s", "SELECT $1::mood", &[]).await, "1Z");
    old.query("LISTEN evil").await;
    let (mut new, report) = old.moved(&target, "postgres", &[]).await;
    assert_eq!(report, ReplayReport::default());
    assert_eq!(new.execute("s", &["glad"]).await, "2DCZ");
    assert_eq!(new.text("SELECT pg_catalog.current_setting('search_path')").await.as_deref(), Some("evil, pg_catalog"));
}

#[tokio::test]
async fn other_client_encodings_lose_nothing() {
    let (source, target) = oldest_to_newest(&["CREATE TABLE \"Größe\" (a int)"]).await;
    let mut old = Session::open(&source, "postgres", &[("client_encoding", "LATIN1")]).await;
    // The texts of this test are ASCII as sent, and are not as stored.
    old.query("SET app.x = U&'Gr\\00F6\\00DFe \\20AC'").await;
    old.query("PREPARE p AS SELECT U&'\\00F6', a FROM U&\"Gr\\00F6\\00DFe\"").await;
    let (mut new, report) = old.moved(&target, "postgres", &[("client_encoding", "LATIN1")]).await;
    assert_eq!(report, ReplayReport::default());
    let ask = "SELECT encode(convert_to(current_setting('app.x'), 'UTF8'), 'hex') || current_setting('client_encoding') \
        || (SELECT source FROM pg_settings WHERE name = 'client_encoding')";
    assert_eq!(new.text(ask).await.as_deref(), Some("4772c3b6c39f6520e282acLATIN1client"));
    assert_eq!(old.text(ask).await.as_deref(), Some("4772c3b6c39f6520e282acLATIN1client"));
    assert_eq!(new.parse("", "EXECUTE p", &[]).await, "1Z");
    assert_eq!(new.execute("", &[]).await, "2CZ");
    // Changed in the session, it is the session's again, and the client was told only of what changed.
    old.query("SET client_encoding = 'WIN1252'").await;
    let (mut new, _) = old.moved(&target, "postgres", &[("client_encoding", "LATIN1")]).await;
    assert_eq!(new.text("SELECT current_setting('client_encoding')").await.as_deref(), Some("WIN1252"));
    let changed = changed_parameters(&old.backend.parameters, &new.backend.parameters);
    assert!(
        changed
            .iter()
            .all(|(name, _)| name == "server_version"
                || !old.backend.parameters.iter().any(|(known, _)| known == name)),
        "{changed:?}"
    );
}

#[tokio::test]
async fn bytes_of_a_database_without_encoding_arrive() {
    let found = installations();
    let (old, _) = found.pair().expect("checked by installations()");
    let two = Cluster::start_two(cluster_options(old, "source"), cluster_options(old, "target"));
    let (source, target) = two.unwrap_or_else(|error| panic!("{error}"));
    for cluster in [&source, &target] {
        let sql = "CREATE DATABASE app TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'";
        connect(cluster, "postgres").await.batch_execute(sql).await.expect("made");
    }
    let mut session = Session::open(&source, "postgres", &[("client_encoding", "SQL_ASCII")]).await;
    session.query("SET app.x = E'\\344 \\377'").await;
    let mut out = BytesMut::new();
    out.extend_from_slice(b"P\0\0\0\x17\xe4s\0SELECT '\xff'::text\0\0\0");
    let length = u32::try_from(out.len() - 1).expect("short");
    out[1..5].copy_from_slice(&length.to_be_bytes());
    frontend::sync(&mut out);
    assert_eq!(session.frames(&out).await, "1Z");
    let (mut new, report) = session.moved(&target, "postgres", &[("client_encoding", "SQL_ASCII")]).await;
    assert_eq!(report, ReplayReport::default());
    let ask = "SELECT encode(current_setting('app.x')::bytea || name::bytea || (statement::bytea), 'hex') FROM pg_prepared_statements WHERE name <> 'test'";
    assert_eq!(
        new.text(ask).await.as_deref(),
        Some("e420ffe47353454c45435420 27ff273a3a74657874".replace(' ', "").as_str())
    );
}

#[tokio::test]
async fn statements_that_are_planned_ahead_have_not_run() {
    let (source, target) = oldest_to_newest(&["CREATE TABLE t (a int)", "CREATE SEQUENCE s"]).await;
    let mut old = Session::open(&source, "postgres", &[]).await;
    for (name, sql) in [
        ("add", "INSERT INTO t VALUES (nextval('s') + $1) RETURNING a"),
        ("begin", "BEGIN"),
        ("fails", "SELECT 1 / 0"),
        ("find", "SELECT a, nextval('s') FROM t WHERE a = $1 FOR UPDATE"),
    ] {
        old.parse(name, sql, &[]).await;
    }
    old.query("PREPARE remove(int) AS DELETE FROM t WHERE a = $1").await;
    let state = old.capture().await;
    let mut new = Session::open(&target, "postgres", &[]).await;
    let report = replay_and_plan(&mut new.backend, &state).await.expect("replayed");
    assert_eq!(report, ReplayReport::default());

    assert_eq!(new.text("SELECT count(*)::text || (SELECT is_called FROM s) FROM t").await.as_deref(), Some("0false"));
    let settings = "SELECT current_setting('plan_cache_mode') || ' ' || current_setting('lock_timeout')";
    assert_eq!(new.text(settings).await.as_deref(), Some("auto 0"));
    // Majors before 14 do not say how often a statement was planned.
    let plans = "SELECT string_agg(name || coalesce(to_jsonb(p) ->> 'generic_plans', '1'), ' ' ORDER BY name) \
        FROM pg_prepared_statements p WHERE name NOT IN ('test', 'begin')";
    assert_eq!(new.text(plans).await.as_deref(), Some("add1 fails0 find1 remove1"));
    assert_eq!(new.execute("add", &["4"]).await, "2DCZ");
    assert_eq!(new.execute("find", &["5"]).await, "2DCZ");

    // The plan for all children of a table may be large.
    new.query("CREATE TABLE child () INHERITS (t)").await;
    let mut other = Session::open(&target, "postgres", &[]).await;
    replay_and_plan(&mut other.backend, &state).await.expect("replayed");
    if other.text("SELECT current_setting('server_version_num')::int >= 140000").await.as_deref() == Some("t") {
        assert_eq!(other.text(plans).await.as_deref(), Some("add0 fails0 find0 remove0"));
    }
}

#[tokio::test]
async fn a_delta_brings_over_what_changed_and_nothing_else() {
    let (source, target) = oldest_to_newest(&["CREATE ROLE other", "CREATE TABLE t (a int)"]).await;
    let mut old = Session::open(&source, "postgres", &[]).await;
    old.query("SET work_mem = '5MB'; SET app.gone = 'x'; SET application_name = 'a'").await;
    old.query("LISTEN one").await;
    old.query("LISTEN two").await;
    old.query("PREPARE sql AS SELECT 1").await;
    old.parse("kept", "SELECT 1", &[]).await;
    old.parse("closed", "SELECT 2", &[]).await;
    old.parse("", "SELECT 3", &[]).await;
    let first = old.capture().await;
    let mut new = Session::open(&target, "postgres", &[]).await;
    replay(&mut new.backend, &first).await.expect("replayed");

    old.execute("kept", &[]).await;
    let again = old.capture().await;
    assert!(delta(&first, &again).is_empty(), "a session that ran plain statements needs nothing");

    old.query("RESET work_mem; RESET app.gone; SET application_name = 'b'; SET ROLE other").await;
    old.query("UNLISTEN one").await;
    old.query("LISTEN three").await;
    old.query("DEALLOCATE sql; DEALLOCATE closed; PREPARE closed AS SELECT 4").await;
    let second = old.capture().await;
    let change = delta(&first, &second);
    let report = apply_delta(&mut new.backend, &change).await.expect("applied");
    assert_eq!(ReplayReport::default().then(&change, report), ReplayReport::default());
    for ask in [
        "SELECT string_agg(name || '=' || setting, ';' ORDER BY name) FROM pg_settings WHERE source = 'session'",
        "SELECT current_setting('work_mem') || current_setting('app.gone', true)",
        "SELECT current_user::text",
        "SELECT string_agg(c, ',' ORDER BY c) FROM pg_listening_channels() c",
        "SELECT string_agg(name || from_sql, ',' ORDER BY name) FROM pg_prepared_statements WHERE name <> 'test'",
    ] {
        assert_eq!(new.text(ask).await, old.text(ask).await, "{ask}");
    }
    assert_eq!(new.execute("", &[]).await, "EZ", "the simple queries have destroyed the unnamed statement");

    old.query("DISCARD ALL").await;
    let third = old.capture().await;
    apply_delta(&mut new.backend, &delta(&second, &third)).await.expect("applied");
    assert_eq!(new.text("SELECT current_user || (SELECT count(*) FROM pg_prepared_statements WHERE name <> 'test') || (SELECT count(*) FROM pg_listening_channels())").await.as_deref(), Some("postgres00"));
}

#[tokio::test]
async fn what_cannot_move_is_named() {
    let (source, target) = oldest_to_newest(&["CREATE TABLE t (a int)", "CREATE ROLE login LOGIN"]).await;
    for (sql, expected) in [
        (
            "SELECT pg_advisory_lock(1), pg_advisory_lock(1), pg_advisory_lock_shared(1, 2)",
            Blocker::AdvisoryLocks { count: 2 },
        ),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", Blocker::HoldableCursors { count: 1 }),
        ("CREATE TEMP TABLE mine (a int)", Blocker::TemporaryObjects { count: 1 }),
        ("CREATE TYPE pg_temp.mine AS ENUM ('a')", Blocker::TemporaryObjects { count: 1 }),
        (
            "CREATE FUNCTION pg_temp.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            Blocker::TemporaryObjects { count: 1 },
        ),
    ] {
        let mut session = Session::open(&source, "postgres", &[]).await;
        session.query(sql).await;
        assert_eq!(session.capture().await.blockers(), [expected], "{sql}");
        // Given up, it blocks no longer.
        session.query("DISCARD ALL").await;
        session.query("DROP FUNCTION IF EXISTS pg_temp.mine").await;
        session.query("DROP TYPE IF EXISTS pg_temp.mine").await;
        assert_eq!(session.capture().await.blockers(), [], "{sql}");
    }

    let mut session = Session::open(&source, "postgres", &[]).await;
    session.query("BEGIN").await;
    session.tracked.at_safe_point();
    let refused = capture(&mut session.backend, &session.tracked, &[], &mut BytesMut::new()).await;
    assert!(refused.is_err(), "an open transaction is no safe point");

    let mut session = Session::open(&source, "postgres", &[]).await;
    for number in 0..300 {
        session.query(&format!("SET app.x{number} = 1")).await;
    }
    assert_eq!(session.capture().await.blockers(), [Blocker::TooManyCustomSettings]);

    // Refused by the other server only.
    connect(&source, "app").await.batch_execute("CREATE ROLE only_here; GRANT only_here TO login; CREATE TEXT SEARCH CONFIGURATION only_here (COPY = simple)").await.expect("made");
    let mut session = Session::open(&source, "login", &[]).await;
    session.query("SET default_text_search_config = 'public.only_here'").await;
    session.query("SET ROLE only_here").await;
    let state = session.capture().await;
    let mut other = Session::open(&target, "login", &[]).await;
    let report = replay(&mut other.backend, &state).await.expect("replayed");
    let kinds: Vec<_> = report.blockers().iter().map(ToString::to_string).collect();
    assert_eq!(
        kinds,
        [
            "its setting \"default_text_search_config\" is refused by the other server (22023)",
            "its role is refused by the other server (22023)",
        ]
    );
    connect(&source, "app").await.batch_execute("DROP TEXT SEARCH CONFIGURATION only_here").await.expect("dropped");
}

#[tokio::test]
async fn notifications_that_come_meanwhile_are_the_clients() {
    let (source, _target) = oldest_to_newest(&[]).await;
    let mut session = Session::open(&source, "postgres", &[]).await;
    session.query("LISTEN news").await;
    connect(&source, "app").await.batch_execute("NOTIFY news, 'one'").await.expect("sent");
    let mut for_client = BytesMut::new();
    session.tracked.at_safe_point();
    while for_client.is_empty() {
        capture(&mut session.backend, &session.tracked, &[], &mut for_client).await.expect("captured");
    }
    assert_eq!(for_client[0], b'A');
    assert!(for_client.ends_with(b"news\0one\0"));
}

#[tokio::test]
async fn the_catalogue_names_settings_that_no_statement_shows() {
    let setup = [
        "CREATE TABLE t (tenant int DEFAULT current_setting('app.def')::int CHECK (tenant::text <> current_setting('app.chk', true)))",
        "CREATE POLICY p ON t USING (tenant = current_setting('App.Tenant')::int) WITH CHECK (current_setting('app.w', true) IS NULL)",
        "CREATE VIEW v AS SELECT current_setting('app.v', true)",
        "CREATE FUNCTION f(text) RETURNS text LANGUAGE sql AS $$ SELECT set_config('app.f', $1, false) $$",
        "ALTER DATABASE app SET app.db = '1'",
    ];
    let (source, target) = oldest_to_newest(&setup).await;
    let names = catalogue_settings(&connect(&source, "app").await).await.expect("read");
    assert_eq!(names, ["app.chk", "app.db", "app.def", "app.f", "app.tenant", "app.v", "app.w"]);
    let mut session = Session::open(&source, "postgres", &[]).await;
    session.query("SELECT f('seven')").await;
    session.tracked.at_safe_point();
    let state = capture(&mut session.backend, &session.tracked, &names, &mut BytesMut::new()).await.expect("captured");
    let mut other = Session::open(&target, "postgres", &[]).await;
    replay(&mut other.backend, &state).await.expect("replayed");
    assert_eq!(other.text("SELECT current_setting('app.f')").await.as_deref(), Some("seven"));
}

/// Without names to ask for the settings are read by a shorter query. It must find the same.
#[tokio::test]
async fn settings_are_found_whether_or_not_there_are_names_to_ask_for() {
    let setup =
        ["CREATE ROLE login LOGIN", "ALTER ROLE login SET work_mem = '5MB'", "ALTER DATABASE app SET geqo = off"];
    let (old, new) = oldest_to_newest(&setup).await;
    for cluster in [&old, &new] {
        let options = [("application_name", "begun"), ("options", "-c lock_timeout=7s")];
        let mut session = Session::open(cluster, "login", &options).await;
        let bare = session.capture().await;
        let told = ["SET application_name = 'told'", "SET TIME ZONE 'Asia/Tokyo'", "SET client_encoding = LATIN1"];
        for sql in told.iter().chain(&["SET work_mem = '6MB'", "SELECT set_config('search_path', 'pg_temp', false)"]) {
            session.query(sql).await;
            let without = session.capture().await;
            let names = ["no.such".to_owned()];
            let with = capture(&mut session.backend, &session.tracked, &names, &mut BytesMut::new()).await;
            assert!(without == with.expect("captured"), "after {sql}");
            assert!(without != bare, "after {sql}");
        }
    }
}

#[tokio::test]
async fn a_large_state_moves_in_one_go() {
    let (source, target) = oldest_to_newest(&[]).await;
    let mut old = Session::open(&source, "postgres", &[]).await;
    let filler = "x".repeat(4000);
    for number in 0..3000 {
        let mut out = BytesMut::new();
        let text = format!("SELECT '{filler}', {number}");
        frontend::parse(&format!("s{number}"), &text, [], &mut out).expect("encodes");
        frontend::sync(&mut out);
        old.frames(&out).await;
    }
    let (mut new, report) = old.moved(&target, "postgres", &[]).await;
    assert_eq!(report, ReplayReport::default());
    assert_eq!(new.execute("s2999", &[]).await, "2DCZ");
}
