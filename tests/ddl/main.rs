//! Changes of definitions on the source while a migration runs: refused where that is configured, and found out in any
//! case before a cutover.

mod carried;
mod engine;
#[path = "../support/mod.rs"]
mod support;

use support::daemon::{Daemon, DaemonOptions};
use support::{connect, two_clusters, wait_for};

const NAME: &str = "move";

const TABLES: &str = "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY);
    CREATE MATERIALIZED VIEW m AS SELECT count(*) FROM a; CREATE UNIQUE INDEX ON m (count); INSERT INTO a VALUES (1, 'x'); INSERT INTO b VALUES (1);";

async fn ready(daemon: &Daemon) {
    wait_for("the migration to be ready", || async {
        let view = daemon.json(&["migration", "show", NAME]);
        assert!(view["error"].is_null(), "{view}");
        view["substate"] == "WaitingForCutoverTrigger"
    })
    .await;
}

const OURS: &str = "SELECT count(*) FROM pg_event_trigger WHERE evtname LIKE 'pgcutover%'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_are_refused_until_the_migration_ends() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
    let client = connect(&source, "shop").await;
    client.batch_execute(TABLES).await.expect("tables");
    let options = DaemonOptions::default()
        .section("migration", "ddl = \"refuse\"")
        .section("cutover", "max_pause = \"60s\"\ndrain_timeout = \"30s\"");
    let daemon = Daemon::start(&source, &target, options);
    daemon.must(&["migration", "create", NAME, "--database", "shop"]);
    ready(&daemon).await;
    for refused in [
        "ALTER TABLE a ADD c int",
        "CREATE TABLE c (id int)",
        "DROP TABLE b",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ] {
        let error = client.batch_execute(refused).await.expect_err(refused);
        let error = error.as_db_error().expect("the server's");
        assert_eq!(error.code().code(), "55000", "{refused}: {error}");
        assert!(error.message().contains("while the database is being moved"), "{refused}: {error}");
        assert!(error.detail().is_some_and(|detail| detail.contains(NAME)) && error.hint().is_some(), "{refused}");
    }
    for allowed in [
        "CREATE TEMP TABLE t (id serial PRIMARY KEY, v text); CREATE INDEX ON t (v); DROP TABLE t",
        "REFRESH MATERIALIZED VIEW m",
        "REFRESH MATERIALIZED VIEW CONCURRENTLY m",
        "SELECT lo_create(4711); COMMENT ON LARGE OBJECT 4711 IS 'it comes whole'",
        "INSERT INTO a VALUES (2, 'y')",
        "TRUNCATE b",
    ] {
        client.batch_execute(allowed).await.unwrap_or_else(|error| panic!("{allowed}: {error:?}"));
    }
    let on_target: i64 = connect(&target, "shop").await.query_one(OURS, &[]).await.expect("counted").get(0);
    assert_eq!(on_target, 0, "it is the source's alone");

    daemon.must(&["migration", "cancel", NAME]);
    wait_for("everything to be removed", || async {
        client.query_one(OURS, &[]).await.expect("counted").get::<_, i64>(0) == 0
    })
    .await;
    client.batch_execute("ALTER TABLE a ADD c int").await.expect("allowed again");
}

/// A table that was made again has its old name and its old columns, and nobody streams its rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_was_made_again_stops_the_cutover() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
    let client = connect(&source, "shop").await;
    client.batch_execute(TABLES).await.expect("tables");
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());
    daemon.must(&["migration", "create", NAME, "--database", "shop"]);
    ready(&daemon).await;
    let again = "DROP TABLE b; CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (2)";
    client.batch_execute(again).await.expect("made again");
    let output = daemon.command(&["migration", "cutover", NAME]);
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && told.contains("changes of table public.b"), "{told}");
}

/// A cutover compares again when it has made everything that takes long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_made_while_a_cutover_is_prepared_stops_it() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
    let client = connect(&source, "shop").await;
    client.batch_execute(TABLES).await.expect("tables");
    let options = DaemonOptions::default().failpoints("prepare.after_return=sleep:5000ms");
    let daemon = Daemon::start(&source, &target, options);
    daemon.must(&["migration", "create", NAME, "--database", "shop"]);
    ready(&daemon).await;
    let mut order = daemon.begin(&["migration", "cutover", NAME]);
    wait_for("the cutover to be prepared", || async { daemon.log().contains("failpoint=\"prepare.after_return\"") })
        .await;
    client.batch_execute("CREATE TABLE n AS SELECT 1 AS id").await.expect("made");
    let ended = order.wait().expect("it ends");
    let log = daemon.log();
    assert!(!ended.success() && log.contains("table public.n, defined on the source"), "{ended}: {log}");
}

/// One that was made on both servers by hand is in no stream: it may be there, and must be empty, there and back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_was_made_on_both_servers_must_be_empty() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
    connect(&source, "shop").await.batch_execute(TABLES).await.expect("tables");
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());
    daemon.must(&["migration", "create", NAME, "--database", "shop"]);
    ready(&daemon).await;
    for cluster in [&source, &target] {
        connect(cluster, "shop").await.batch_execute("CREATE TABLE n (id int)").await.expect("made");
    }
    for (order, here, then) in [("cutover", &source, "Completed"), ("rollback", &target, "WaitingForCutoverTrigger")] {
        connect(here, "shop").await.batch_execute("INSERT INTO n VALUES (1)").await.expect("written");
        let output = daemon.command(&["migration", order, NAME]);
        let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success() && told.contains("lacks rows of table public.n"), "{order}: {told}");
        connect(here, "shop").await.batch_execute("TRUNCATE n").await.expect("emptied");
        let report = daemon.json(&["migration", order, NAME]);
        assert_eq!(report["outcome"], "switched", "{order}: {report}");
        wait_for("the streams to be turned", || async {
            daemon.json(&["migration", "show", NAME])["substate"] == then
        })
        .await;
    }
}

/// Somebody who has locked a table, and has gone home, does not keep an order waiting that nobody expects any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_does_not_wait_for_a_locked_table() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
    connect(&source, "shop").await.batch_execute(TABLES).await.expect("tables");
    let options = DaemonOptions::default().section("migration", "ddl = \"apply\"\nlock_timeout = \"300ms\"");
    let daemon = Daemon::start(&source, &target, options);
    daemon.must(&["migration", "create", NAME, "--database", "shop"]);
    ready(&daemon).await;
    let silent = connect(&source, "shop").await;
    // Of a table that is migrated only numbers and names are asked for.
    silent.batch_execute("BEGIN; LOCK TABLE a").await.expect("locked");
    let report = daemon.json(&["migration", "cutover", NAME, "--dry-run"]);
    assert_eq!(report["outcome"], "dry-run", "{report}");
    let by_hand = "SET session_replication_role = replica; CREATE TABLE n (id int)";
    for cluster in [&source, &target] {
        connect(cluster, "shop").await.batch_execute(by_hand).await.expect("made");
    }
    silent.batch_execute("COMMIT; BEGIN; LOCK TABLE n").await.expect("locked");
    let output = daemon.command(&["migration", "cutover", NAME]);
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && told.contains("lock_timeout") && told.contains("public.n by pid"), "{told}");
    silent.batch_execute("COMMIT").await.expect("let go");
    for cluster in [&source, &target] {
        let by_hand = "SET session_replication_role = replica; DROP TABLE n";
        connect(cluster, "shop").await.batch_execute(by_hand).await.expect("dropped");
    }
    let report = daemon.json(&["migration", "cutover", NAME]);
    assert_eq!(report["outcome"], "switched", "{report}");
}

/// What was defined on the target meanwhile is named, with a hint that leads to statements which work on a server that is shut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_says_what_the_source_lacks_and_how_to_define_it_there() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
    connect(&source, "shop").await.batch_execute(TABLES).await.expect("tables");
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());
    daemon.must(&["migration", "create", NAME, "--database", "shop"]);
    ready(&daemon).await;
    daemon.must(&["migration", "cutover", NAME]);
    wait_for("the stream back", || async { daemon.json(&["migration", "show", NAME])["substate"] == "Completed" })
        .await;
    let made = "CREATE TABLE n (id int)";
    connect(&target, "shop").await.batch_execute(made).await.expect("made");
    let output = daemon.command(&["migration", "rollback", NAME, "--output", "json"]);
    let refused: serde_json::Value = serde_json::from_slice(&output.stdout).expect("an answer");
    assert_eq!((&refused["outcome"], &refused["pause_ms"]), (&"aborted".into(), &0.into()), "{refused}");
    let reason = refused["reason"].as_str().expect("a reason");
    assert!(
        reason.starts_with("database shop: the source lacks column public.n.id integer, table public.n"),
        "{reason}"
    );
    let hint = refused["hint"].as_str().expect("a hint");
    let heading = "Something has to be defined on the server that was left";
    let runbook = include_str!("../../docs/runbook.md");
    assert!(hint.contains(heading) && runbook.contains(&format!("### {heading}\n")), "{hint}");

    let admin = connect(&source, "postgres").await;
    admin.batch_execute("ALTER DATABASE shop ALLOW_CONNECTIONS true").await.expect("a superuser may");
    let shut = connect(&source, "shop").await;
    for command in ["SET default_transaction_read_only = off", made] {
        shut.batch_execute(command).await.expect(command);
    }
    admin.batch_execute("ALTER DATABASE shop ALLOW_CONNECTIONS false").await.expect("a superuser may");
    let report = daemon.json(&["migration", "rollback", NAME]);
    assert_eq!(report["outcome"], "switched", "{report}");
}
