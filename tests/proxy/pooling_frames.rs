//! Transaction pooling, frame by frame: where a cut, an order of frames or a text must not mislead the proxy.

use pgcutover::config::{self, PoolMode};
use pgcutover::proxy::SessionState;

use crate::pooling::{ask, first_row, pooled, pooled_with};
use crate::rig::{Rig, server};
use crate::support::{one_cluster, wait_for};
use crate::wire_client::{Message, WireClient, bind, execute, extended, frame, parse, query, rows, sync, tags};

/// The code of the first error; empty where there is none.
fn refusal(messages: &[Message]) -> String {
    messages.iter().find(|message| message.tag == 'E').map(Message::code).unwrap_or_default()
}

fn deallocate(name: &str) -> Vec<u8> {
    extended(&format!("DEALLOCATE {name}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_where_a_block_ends_is_seen() {
    let cluster = one_cluster("cut");
    let rig = pooled_with(&cluster, 1, |config| config.limits.buffer_bytes = 8192);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    // PostgreSQL sends 8192 bytes at a time: the cut wanders through every message behind the row.
    for length in 8100..8140 {
        // After a short answer the block is a small one.
        assert_eq!(first_row(&mut ann, "SELECT 'ann'").await, "ann");
        let row = first_row(&mut ann, &format!("SELECT repeat('x', {length})")).await;
        assert_eq!(row.len(), length);
        assert_eq!(first_row(&mut bob, "SELECT 'bob'").await, "bob", "{length}");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_statement_is_prepared_only_under_the_settings_it_was_meant_under() {
    let cluster = one_cluster("meaning");
    // One worker: the connection that is not in use is the only one that can be given.
    let rig = pooled_with(&cluster, 2, |config| config.listen.workers = 1);
    let text = |number: i32| format!("SELECT date '01/02/2026', {number}");
    for (number, (before, after)) in [
        (query("BEGIN; SET LOCAL DateStyle = 'ISO, DMY'"), query("COMMIT")),
        (query("SET DateStyle = 'ISO, DMY'"), query("RESET DateStyle")),
    ]
    .into_iter()
    .enumerate()
    {
        let text = text(number as i32);
        let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
        let mut carl = rig.wire("postgres").await;
        ask(&mut ann, &[parse("a", &text), sync()].concat()).await;
        let first = first_row(&mut bob, "BEGIN; SELECT pg_backend_pid()").await;
        // On the other connection, under other settings.
        ask(&mut ann, &before).await;
        assert_ne!(first_row(&mut ann, "SELECT pg_backend_pid()").await, first);
        for _ in 0..2 {
            let used = ask(&mut ann, &[bind("a"), execute(0), sync()].concat()).await;
            assert_eq!(rows(&used).len(), 1, "{used:?}");
        }
        ask(&mut ann, &after).await;
        assert_ne!(first_row(&mut carl, "SELECT pg_backend_pid()").await, first);
        let batch = [parse("b", &text), bind("b"), execute(0), sync()].concat();
        assert_eq!(rows(&ask(&mut carl, &batch).await), ["2026-01-02"]);
        // Nor does ann's own name stand for it for good.
        assert_eq!(rows(&ask(&mut ann, &[bind("a"), execute(0), sync()].concat()).await), ["2026-01-02"]);
        // A name that is taken is still taken.
        ask(&mut ann, &before).await;
        assert_eq!(refusal(&ask(&mut ann, &[parse("a", &text), sync()].concat()).await), "42P05");
        ask(&mut ann, &query("ROLLBACK")).await;
        ask(&mut bob, &query("COMMIT")).await;
    }
    rig.stop().await;
}

/// FunctionCall with arguments in text.
fn call(oid: u32, arguments: &[&str]) -> Vec<u8> {
    let mut body = oid.to_be_bytes().to_vec();
    body.extend([0, 0]);
    body.extend((arguments.len() as u16).to_be_bytes());
    for argument in arguments {
        body.extend((argument.len() as u32).to_be_bytes());
        body.extend(argument.as_bytes());
    }
    body.extend([0, 0]);
    frame(b'F', &body)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_call_leaves_is_its_clients_own() {
    let cluster = one_cluster("fastpath");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let look = "SELECT concat_ws(',', current_setting('work_mem'), nullif(current_setting('app.tenant', true), ''))";
    let fresh = first_row(&mut bob, look).await;
    let set_config = first_row(&mut ann, "SELECT 'set_config'::regproc::oid").await.parse().expect("a number");
    for (name, value) in [("work_mem", "99MB"), ("app.tenant", "ann")] {
        let answer = ask(&mut ann, &call(set_config, &[name, value, "f"])).await;
        assert_eq!(tags(&answer), "VZI");
        assert_eq!(first_row(&mut bob, look).await, fresh, "{name}");
    }
    assert_eq!(first_row(&mut ann, "SHOW work_mem").await, "99MB");
    // pg_advisory_lock(bigint)
    assert_eq!(tags(&ask(&mut ann, &call(2880, &["7"])).await), "VZI");
    wait_for("the pin", || async { rig.sessions.list().iter().any(|session| session.pinned.is_some()) }).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_the_server_skips_leaves_the_unnamed_statement_uncertain() {
    let cluster = one_cluster("skipped");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ask(&mut bob, &[parse("", "SELECT 'bob'"), sync()].concat()).await;
    let skipped = [bind("nobody"), query("SELECT 1"), sync()].concat();
    assert_eq!(tags(&ask(&mut ann, &skipped).await), "EZI");
    let used = ask(&mut ann, &[bind(""), execute(0), sync()].concat()).await;
    assert_eq!(refusal(&used), "26000", "{used:?}");
    assert_eq!(rows(&ask(&mut bob, &[bind(""), execute(0), sync()].concat()).await), ["bob"]);
    // One that comes behind the skipped ones is there.
    let late = [parse("", "SELECT nonsense"), sync(), parse("", "SELECT 'late'"), sync()].concat();
    ann.send(&late).await;
    assert_eq!([ann.tags_until_ready().await, ann.tags_until_ready().await], ["EZI", "1ZI"]);
    assert_eq!(rows(&ask(&mut ann, &[bind(""), execute(0), sync()].concat()).await), ["late"]);
    // Frame by frame: the proxy knows of the error when the Query comes.
    ann.send(&[bind("nobody"), frame(b'H', &[])].concat()).await;
    assert_eq!(ann.next().await.expect("an error").tag, 'E');
    assert_eq!(tags(&ask(&mut ann, &[query("SELECT 1"), sync()].concat()).await), "ZI");
    assert_eq!(refusal(&ask(&mut ann, &[bind(""), execute(0), sync()].concat()).await), "26000");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deallocates_take_away_what_each_of_them_names() {
    let cluster = one_cluster("deallocates");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let prepare = async |client: &mut WireClient| {
        let names: Vec<u8> = ["a", "b", "c"].iter().flat_map(|name| parse(name, &format!("SELECT '{name}'"))).collect();
        let answer = ask(client, &[names, sync()].concat()).await;
        assert_eq!(tags(&answer), "111ZI", "{answer:?}");
    };
    let has = async |client: &mut WireClient, name: &str| {
        let answer = ask(client, &[bind(name), execute(0), sync()].concat()).await;
        assert!(rows(&answer) == [name] || refusal(&answer) == "26000", "{answer:?}");
        refusal(&answer).is_empty()
    };
    prepare(&mut ann).await;
    prepare(&mut bob).await;
    // Several in one batch.
    let answer = ask(&mut ann, &[deallocate("a"), deallocate("b"), sync()].concat()).await;
    assert_eq!(tags(&answer), "12C12CZI", "{answer:?}");
    assert_eq!([has(&mut ann, "a").await, has(&mut ann, "b").await, has(&mut ann, "c").await], [false, false, true]);
    assert_eq!(refusal(&ask(&mut ann, &[parse("a", "SELECT 'a'"), sync()].concat()).await), "");
    // One that is not executed takes nothing away, nor does one that is skipped.
    ask(&mut ann, &[parse("", "DEALLOCATE a"), bind(""), sync()].concat()).await;
    ask(&mut ann, &[bind("nobody"), deallocate("a"), sync()].concat()).await;
    assert_eq!(tags(&ask(&mut ann, &[deallocate("c"), sync()].concat()).await), "12CZI");
    assert_eq!([has(&mut ann, "a").await, has(&mut ann, "c").await], [true, false]);
    // The name can be used again in the same batch, for the same text.
    let again = [deallocate("a"), parse("a", "SELECT 'a'"), bind("a"), execute(0), sync()].concat();
    let answer = ask(&mut ann, &again).await;
    assert_eq!((tags(&answer), rows(&answer)), ("12C12DCZI".to_owned(), vec!["a".to_owned()]), "{answer:?}");
    // As a statement with a name, which can be used again.
    for _ in 0..2 {
        let named = [parse("x", "DEALLOCATE a"), bind("x"), execute(0), sync()].concat();
        let answer = ask(&mut ann, &named).await;
        assert_eq!(tags(&answer), "12CZI", "{answer:?}");
        assert!(!has(&mut ann, "a").await);
        ask(&mut ann, &[frame(b'C', b"Sx\0"), parse("a", "SELECT 'a'"), sync()].concat()).await;
    }
    // A Query behind another one; and one that the server skips.
    ann.send(&[query("SELECT 5"), query("DEALLOCATE a"), query("SELECT 6")].concat()).await;
    let answers = [ann.until_ready().await, ann.until_ready().await, ann.until_ready().await];
    assert_eq!(answers.map(|answer| tags(&answer)), ["TDCZI", "CZI", "TDCZI"]);
    assert!(!has(&mut ann, "a").await);
    ask(&mut ann, &[parse("a", "SELECT 'a'"), sync()].concat()).await;
    let skipped = [bind("nobody"), query("DEALLOCATE a"), sync()].concat();
    assert_eq!(tags(&ask(&mut ann, &skipped).await), "EZI");
    assert!(has(&mut ann, "a").await);
    for name in ["a", "b", "c"] {
        assert!(has(&mut bob, name).await, "{name}");
    }
    // Also where the client keeps its connection from then on.
    ask(&mut ann, &[parse("x", "DEALLOCATE a"), sync()].concat()).await;
    ask(&mut ann, &query("LISTEN news")).await;
    wait_for("the pin", || async { rig.sessions.list().iter().any(|session| session.pinned.is_some()) }).await;
    assert_eq!(tags(&ask(&mut ann, &[bind("x"), execute(0), sync()].concat()).await), "2CZI");
    assert!(!has(&mut ann, "a").await);
    rig.stop().await;
}

/// Sends it all at once, behind it Terminate, and says what is answered before the end.
/// Statements that clients share have one name on a connection: who says their own is free again, and what it stands for
/// now, must not give that name another text.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_given_up_and_taken_at_once_takes_nobody_elses() {
    let cluster = one_cluster("overwritten");
    let rig = pooled(&cluster, 1);
    let forget = "CREATE FUNCTION forget() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$";
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ask(&mut ann, &query(forget)).await;
    let (shared, run) = (parse("s", "SELECT 'shared'"), [bind("s"), execute(0), sync()].concat());
    ask(&mut bob, &[shared.clone(), sync()].concat()).await;
    let in_a_batch = [parse("", "DEALLOCATE ALL"), bind(""), execute(0)].concat();
    for (number, (before, batches)) in
        [(query("DISCARD ALL"), 2), (in_a_batch, 1), (query("SELECT forget()"), 2)].into_iter().enumerate()
    {
        ask(&mut ann, &[shared.clone(), sync()].concat()).await;
        let own = format!("own {number}");
        let text = format!("SELECT '{own}'");
        ann.send(&[before, parse("s", &text), run.clone()].concat()).await;
        for left in (0..batches).rev() {
            let answered = ann.until_ready().await;
            assert_eq!(refusal(&answered), "", "{own}");
            assert!(left > 0 || rows(&answered) == [own.as_str()], "{own}: {answered:?}");
        }
        assert_eq!(rows(&ask(&mut bob, &run).await), ["shared"], "{own}");
        let mut carl = rig.wire("postgres").await;
        assert_eq!(rows(&ask(&mut carl, &[shared.clone(), run.clone()].concat()).await), ["shared"], "{own}");
        assert_eq!(rows(&ask(&mut ann, &run).await), [own.as_str()]);
        ask(&mut ann, &query("DEALLOCATE ALL")).await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_prepared_behind_the_rollback_of_a_failed_transaction_is_no_duplicate() {
    let cluster = one_cluster("rollback_and_parse");
    let rig = pooled(&cluster, 1);
    let mut client = rig.wire("postgres").await;
    ask(&mut client, &[parse("known", "SELECT 'known'"), sync()].concat()).await;
    assert_eq!(refusal(&ask(&mut client, &query("BEGIN; SELECT 1/0")).await), "22012");
    let again = [query("ROLLBACK"), parse("again", "SELECT 'known'"), bind("again"), execute(0), sync()].concat();
    client.send(&again).await;
    client.until_ready().await;
    let answered = client.until_ready().await;
    assert_eq!((refusal(&answered).as_str(), rows(&answered)), ("", vec!["known".to_owned()]));
    rig.stop().await;
}

/// The shared connection has the statement already.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_is_prepared_by_name_ends_a_failed_transaction() {
    let cluster = one_cluster("rollback_by_name");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let end = |name: &str| [parse(name, "ROLLBACK"), bind(name), execute(0), sync()].concat();
    let look = |name: &str| [parse(name, "SELECT 'known'"), bind(name), execute(0), sync()].concat();
    for client in [&mut ann, &mut bob] {
        assert_eq!(refusal(&ask(client, &look("look")).await), "");
        for name in ["once", "twice"] {
            assert_eq!(refusal(&ask(client, &query("BEGIN; SELECT 1/0")).await), "22012");
            assert_eq!(refusal(&ask(client, &look("again")).await), "25P02");
            assert_eq!(refusal(&ask(client, &end(name)).await), "", "{name}");
            assert_eq!(first_row(client, "SELECT now() = statement_timestamp()").await, "t");
        }
        assert_eq!(rows(&ask(client, &look("again")).await), ["known"]);
        assert_eq!(refusal(&ask(client, &[bind("once"), execute(0), sync()].concat()).await), "");
    }
    rig.stop().await;
}

async fn said_before_the_end(rig: &Rig, frames: &[u8]) -> String {
    let (mut early, mut client) = (rig.wire("postgres").await, rig.wire("postgres").await);
    // There is a connection, for which nobody waits.
    first_row(&mut early, "SELECT 1").await;
    drop(early);
    client.send(&[frames, &frame(b'X', &[])].concat()).await;
    let mut said = Vec::new();
    while let Some(message) = client.next().await {
        said.push(message);
    }
    rig.until_no_session().await;
    tags(&said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_says_everything_at_once_and_leaves_is_let_go() {
    let cluster = one_cluster("leaves");
    let rig = pooled_with(&cluster, 1, |config| config.listen.workers = 1);
    let mut owner = rig.wire("postgres").await;
    ask(&mut owner, &query("CREATE TABLE t(a int)")).await;
    drop(owner);
    rig.until_no_session().await;
    for (frames, answer) in [
        (query("SELECT 1"), "TDCZI"),
        (query("BEGIN"), "CZT"),
        (query("LISTEN news"), "CZI"),
        (query("BEGIN; SELECT 1/0"), "CEZE"),
        ([extended("SELECT 1"), sync()].concat(), "12DCZI"),
        // The server waits for data that will not come.
        (query("COPY t FROM STDIN"), "G"),
    ] {
        assert_eq!(said_before_the_end(&rig, &frames).await, answer);
    }
    // The connection is nobody's: the next client gets one.
    let mut next = rig.wire("postgres").await;
    assert_eq!(first_row(&mut next, "SELECT count(*) FROM pg_listening_channels()").await, "0");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_before_terminate_is_done_though_it_has_to_wait() {
    let cluster = one_cluster("asked");
    let rig = pooled_with(&cluster, 1, |config| config.listen.workers = 1);
    let mut holder = rig.wire("postgres").await;
    ask(&mut holder, &query("CREATE TABLE t(a int)")).await;
    let alone = async || wait_for("its end", || async { rig.sessions.list().len() == 1 }).await;
    // One that stays until it is answered, one that closes at once, and one that vanishes without a word.
    for (says, closes, done) in [(true, false, "2"), (true, true, "4"), (false, true, "4")] {
        ask(&mut holder, &query("BEGIN")).await;
        let mut client = rig.wire("postgres").await;
        let asked = [query("INSERT INTO t VALUES (1)"), query("INSERT INTO t VALUES (2)")].concat();
        client.send(&[asked, if says { frame(b'X', &[]) } else { Vec::new() }].concat()).await;
        rig.until(SessionState::Waiting).await;
        let client = Some(client).filter(|_| !closes);
        if !says {
            alone().await;
        }
        ask(&mut holder, &query("COMMIT")).await;
        if let Some(mut client) = client {
            assert_eq!(client.tags_until_ready().await + &client.tags_until_ready().await, "CZICZI");
            assert_eq!(client.next().await, None);
        }
        alone().await;
        assert_eq!(first_row(&mut holder, "SELECT count(*) FROM t").await, done);
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_sent_again_is_answered_before_its_client_is_let_go() {
    let cluster = one_cluster("againandleave");
    let rig = pooled_with(&cluster, 1, |config| config.listen.workers = 1);
    let mut other = rig.wire("postgres").await;
    ask(&mut other, &query("CREATE TABLE t(a int); INSERT INTO t VALUES (1)")).await;
    let mut client = rig.wire("postgres").await;
    ask(&mut client, &[parse("s", "SELECT * FROM t"), bind("s"), execute(0), sync()].concat()).await;
    ask(&mut other, &query("ALTER TABLE t ALTER a TYPE text")).await;
    client.send(&[bind("s"), execute(0), sync(), frame(b'X', &[])].concat()).await;
    assert_eq!(client.tags_until_ready().await, "2DCZI");
    assert_eq!(client.next().await, None);
    rig.stop().await;
}

/// The view's UPDATE is a SET, and EXPLAIN ANALYZE does what it explains.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_a_session_by_another_name_is_nobody_elses() {
    let cluster = one_cluster("other_names");
    let rig = pooled(&cluster, 2);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ask(&mut ann, &query("UPDATE pg_settings SET setting = '77s' WHERE name = 'statement_timeout'")).await;
    let shown = first_row(&mut bob, "SHOW statement_timeout").await;
    assert_eq!((shown.as_str(), first_row(&mut ann, "SHOW statement_timeout").await.as_str()), ("0", "77s"));
    ask(&mut ann, &query("EXPLAIN ANALYZE CREATE TEMP TABLE mine AS SELECT 1 AS a")).await;
    let mut carl = rig.wire("postgres").await;
    for client in [&mut bob, &mut carl] {
        assert_eq!(first_row(client, "SELECT to_regclass('mine') IS NULL").await, "t");
    }
    assert_eq!(first_row(&mut ann, "SELECT a FROM mine").await, "1");
    rig.stop().await;
}

/// To read what a client has set takes longer than that.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_a_short_statement_timeout_is_served_and_keeps_it() {
    let cluster = one_cluster("impatient");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    for _ in 0..20 {
        ask(&mut ann, &query("SET statement_timeout = 1")).await;
        assert_eq!(first_row(&mut bob, "SHOW statement_timeout").await, "0");
    }
    let shown = loop {
        let answer = ask(&mut ann, &query("SHOW statement_timeout")).await;
        // A busy machine takes its time.
        if refusal(&answer) != "57014" {
            break rows(&answer);
        }
    };
    assert_eq!(shown, ["1ms"]);
    rig.stop().await;
}

/// As drivers ask what a statement's parameters are before they bind them.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_unnamed_statement_is_bound_where_its_client_is_next() {
    let cluster = one_cluster("long_unnamed");
    let rig = pooled(&cluster, 1);
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    for length in [20_000, 3_000_000, 100] {
        let text = |what: &str| what.repeat(length);
        for (client, what) in [(&mut ann, "a"), (&mut bob, "b")] {
            let prepared = ask(client, &[parse("", &format!("SELECT '{}'", text(what))), sync()].concat()).await;
            assert_eq!(tags(&prepared), "1ZI");
        }
        for _ in 0..2 {
            for (client, what) in [(&mut ann, "a"), (&mut bob, "b")] {
                let used = ask(client, &[bind(""), execute(0), sync()].concat()).await;
                assert!(refusal(&used).is_empty() && rows(&used) == [text(what)], "{what} of {length}");
            }
        }
    }
    ask(&mut ann, &query("SELECT 1")).await;
    assert_eq!(refusal(&ask(&mut ann, &[bind(""), sync()].concat()).await), "26000");
    rig.stop().await;
}

/// Over a Unix socket each small answer takes much of what the server can send before somebody reads.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_many_statements_can_keep_its_connection() {
    let cluster = one_cluster("many_statements");
    let local = || config::Server { host: cluster.socket_dir().display().to_string(), ..server(&cluster) };
    let rig = Rig::start(local(), local(), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = 1;
    });
    let mut client = rig.wire("postgres").await;
    let filler = "x".repeat(1000);
    for number in 0..1000 {
        let text = format!("SELECT '{number}', '{filler}'");
        let answer = ask(&mut client, &[parse(&format!("s{number}"), &text), sync()].concat()).await;
        assert_eq!(tags(&answer), "1ZI");
    }
    assert_eq!(tags(&ask(&mut client, &query("LISTEN news")).await), "CZI");
    assert_eq!(first_row(&mut client, "SELECT 1").await, "1");
    assert!(rig.sessions.list().iter().all(|session| session.pinned.is_some()));
    for name in ["s0", "s999"] {
        assert_eq!(rows(&ask(&mut client, &[bind(name), execute(0), sync()].concat()).await), [&name[1..]]);
    }
    rig.stop().await;
}
