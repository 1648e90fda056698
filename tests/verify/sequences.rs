//! Where sequences stand: what a dry run has left is no difference, whatever becomes of the source's; what somebody uses is.

use pgcutover::migration::gate::Gate;
use pgcutover::migration::sequences::SequencePair;
use pgcutover::migration::verify::align::Sides;
use pgcutover::migration::verify::definitions;
use pgcutover::postgres::Connector;
use tokio_postgres::Client;

use crate::support::streamed::Streamed;
use crate::support::{connect, installations, wait_for};

const SEQUENCES: &str = r#"
CREATE TABLE anchor (id int PRIMARY KEY);
CREATE SEQUENCE plain; CREATE SEQUENCE "The Down" INCREMENT -2 MAXVALUE 90 START 90; CREATE SEQUENCE late START 100;
CREATE SEQUENCE round MAXVALUE 5 CYCLE; CREATE SEQUENCE untouched START 7; CREATE SEQUENCE wide INCREMENT 10;
"#;

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// What a cutover does before it pauses anything, and all that stays of a dry run.
async fn rehearse(from: &Connector, to: &Connector) {
    let (from, to) = (from.control("shop", "test").await.expect("from"), to.control("shop", "test").await.expect("to"));
    SequencePair::prepare(&from, &to).await.expect("brought over");
}

/// Name and difference, of the sequences; nothing else may differ.
async fn found(from: &Connector, to: &Connector, gate: Option<Gate>) -> Vec<(String, String)> {
    let (source, target) = (from.clone(), to.clone());
    let sides = Sides { source, target, database: "shop".to_owned(), gate, door: None };
    let found = definitions::compare(&sides).await.expect("compared");
    assert!(found.iter().all(|one| one.kind == "sequence"), "{found:?}");
    let mut found: Vec<_> = found.into_iter().map(|one| (one.name, one.difference)).collect();
    found.sort();
    found
}

fn ahead(names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|name| ((*name).to_owned(), "ahead".to_owned())).collect()
}

const NOTHING: &[&str] = &[];

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_is_ahead_only_where_somebody_has_moved_it() {
    let all = installations();
    let majors = all.pair().expect("checked by installations()");
    let bench = Streamed::between(majors, SEQUENCES, &["anchor"]).await;
    let (source, target) = (&bench.context.source, &bench.context.target);
    let (here, there) = (connect(&bench.source, "shop").await, connect(&bench.target, "shop").await);
    let to_come = || found(source, target, Some(Gate::default()));

    // Before anything was brought over: behind, and where they were made, although the source's was set below that.
    let used = r#"SELECT nextval('plain'), nextval('wide'), nextval('"The Down"'), setval('late', 3), nextval('round') FROM generate_series(1, 4)"#;
    run(&here, used).await;
    assert_eq!(to_come().await, ahead(NOTHING), "nobody has used them");

    // A dry run leaves them where the source's stood; those are set back, come round, or are made anew.
    rehearse(source, target).await;
    assert_eq!(to_come().await, ahead(NOTHING));
    let back = r#"SELECT setval('plain', 2), setval('"The Down"', 90, false), nextval('round'), nextval('round');
        ALTER SEQUENCE wide RESTART; ALTER SEQUENCE late RESTART WITH 1"#;
    run(&here, back).await;
    assert_eq!(to_come().await, ahead(NOTHING), "they stand where the dry run has set them");
    assert_eq!(found(source, target, None).await.len(), 5, "where no cutover is to come, all of them are told");

    // Whoever uses them, or sets them further, is found out.
    let meddled = r#"SELECT nextval('plain'), nextval('"The Down"'), nextval('untouched'), setval('late', 500, false);
        ALTER SEQUENCE wide RESTART WITH 1001"#;
    run(&there, meddled).await;
    let told = ["public.\"The Down\"", "public.late", "public.plain", "public.untouched", "public.wide"];
    assert_eq!(to_come().await, ahead(&told));

    // The next attempt sets them right, also where it is given up half-way and the source's go back once more.
    rehearse(source, target).await;
    assert_eq!(to_come().await, ahead(NOTHING));
    run(&here, "SELECT setval('plain', 70)").await;
    let (from, to) =
        (source.control("shop", "test").await.expect("from"), target.control("shop", "test").await.expect("to"));
    let mut pair = SequencePair::prepare(&from, &to).await.expect("prepared");
    run(&here, "SELECT setval('plain', 90), setval('wide', 90)").await;
    assert_eq!(pair.bring_over(&from, &to).await.expect("in the pause"), 2);
    run(&here, "SELECT setval('plain', 1), setval('wide', 1)").await;
    assert_eq!(to_come().await, ahead(NOTHING));

    // After a switch the server that was left stands where it was left, and the other one's go back.
    run(&here, "SELECT setval('plain', 1000), setval('wide', 1000)").await;
    pair.bring_over(&from, &to).await.expect("in the pause");
    run(&there, "SELECT setval('plain', 5), nextval('wide')").await;
    let back = || found(target, source, Some(Gate::default()));
    assert_eq!(back().await, ahead(NOTHING), "it stands where it was left");
    run(&here, "SELECT nextval('plain')").await;
    assert_eq!(back().await, ahead(&["public.plain"]), "somebody has used the server that was left");
}

/// It was given up while a `setval` waited for somebody's lock. Carried out later, it would set back what is in use by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_attempt_was_about_to_set_is_not_set_after_the_next_one() {
    let all = installations();
    let majors = all.pair().expect("checked by installations()");
    let definitions = "CREATE TABLE anchor (id int PRIMARY KEY); CREATE SEQUENCE first; CREATE SEQUENCE second";
    let bench = Streamed::between(majors, definitions, &["anchor"]).await;
    let (source, target) = (&bench.context.source, &bench.context.target);
    let (here, there) = (connect(&bench.source, "shop").await, connect(&bench.target, "shop").await);

    let control = async |server: &Connector| server.control("shop", "test").await.expect("a session");
    let (from, to) = (control(source).await, control(target).await);
    let mut given_up = SequencePair::prepare(&from, &to).await.expect("prepared");
    let setter = to.pid();
    run(&here, "SELECT setval('first', 50), setval('second', 50)").await;
    run(&there, "BEGIN; ALTER SEQUENCE first CACHE 2").await;
    let setting = tokio::spawn(async move { given_up.bring_over(&from, &to).await });
    let state = async || {
        let sql = "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $1";
        there.query_opt(sql, &[&setter]).await.expect("readable").map(|row| row.get::<_, Option<String>>(0))
    };
    wait_for("the lock to be waited for", || async { state().await == Some(Some("Lock".to_owned())) }).await;
    setting.abort();
    assert!(setting.await.expect_err("it is given up").is_cancelled());
    assert!(state().await.is_some(), "the server is not told before the statement has ended");

    // The first one stands on both servers where it stood; so the next attempt waits for nobody.
    run(&here, "SELECT setval('first', 1, false), setval('second', 900)").await;
    let (from, to) = (control(source).await, control(target).await);
    let _next = SequencePair::prepare(&from, &to).await.expect("prepared");
    run(&there, "ROLLBACK").await;
    wait_for("the session that was given up to be gone", || async { state().await.is_none() }).await;
    let stand = "SELECT (SELECT (last_value, is_called)::text FROM first) || (SELECT (last_value, is_called)::text FROM second)";
    let stand: String = there.query_one(stand, &[]).await.expect("readable").get(0);
    assert_eq!(stand, "(1,f)(900,t)");
}

/// No dump names what was added to an extension, and what its versions make differs.
#[tokio::test(flavor = "multi_thread")]
async fn sequences_of_extensions_need_not_be_on_the_target() {
    let all = installations();
    let majors = all.pair().expect("checked by installations()");
    let bench = Streamed::between(majors, "CREATE TABLE anchor (id int PRIMARY KEY)", &["anchor"]).await;
    let here = connect(&bench.source, "shop").await;
    let add = "CREATE TABLE queue (id int GENERATED ALWAYS AS IDENTITY); ALTER EXTENSION plpgsql ADD TABLE queue;
        CREATE SEQUENCE member; ALTER EXTENSION plpgsql ADD SEQUENCE member; SELECT nextval('member')";
    run(&here, add).await;
    rehearse(&bench.context.source, &bench.context.target).await;

    run(&here, "CREATE SEQUENCE ordinary").await;
    let control = async |server: &Connector| server.control("shop", "test").await.expect("a session");
    let (from, to) = (control(&bench.context.source).await, control(&bench.context.target).await);
    let missing = SequencePair::prepare(&from, &to).await.expect_err("it is the application's own");
    assert_eq!(missing.to_string(), "sequences are missing on the target: public.ordinary");
}
