//! `ddl = "apply"` with the daemon: under load and kills, from the source to the target and back, and a command that the
//! target does not take.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::compare;
use pgcutover::demo::shop::SHOP;
use tokio::task::JoinHandle;

use crate::support::daemon::{Daemon, DaemonOptions};
use crate::support::{connect, shop, two_clusters, wait_for};
use crate::{NAME, OURS, ready};

const TABLES: &str = "CREATE TABLE a (id serial PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY, v text);
    CREATE TYPE mood AS ENUM ('sad'); INSERT INTO a (v) SELECT 'v' FROM generate_series(1, 500);
    INSERT INTO b SELECT g, 'v' FROM generate_series(1, 100) g;";

/// Options for a machine that does everything at once.
fn options() -> DaemonOptions {
    DaemonOptions::default()
        .section("migration", "ddl = \"apply\"")
        .section("cutover", "max_pause = \"60s\"\ndrain_timeout = \"30s\"\nmax_lag_at_start = \"1GB\"")
}

async fn begin() -> (Cluster, Cluster, Daemon) {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute(&format!("CREATE DATABASE {SHOP}")).await.expect("made");
    connect(&source, SHOP).await.batch_execute(TABLES).await.expect("tables");
    let daemon = Daemon::start(&source, &target, options());
    daemon.must(&["migration", "create", NAME, "--database", SHOP]);
    ready(&daemon).await;
    (source, target, daemon)
}

/// Writes until it is told to stop; returns how often it has.
async fn writer(source: &Cluster, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    let client = connect(source, SHOP).await;
    tokio::spawn(async move {
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            rounds += 1;
            let sql = format!(
                "INSERT INTO a (v) VALUES ('w'); UPDATE b SET v = 'w{rounds}' WHERE id = {}; DELETE FROM a WHERE id = {rounds}",
                rounds % 100
            );
            client.batch_execute(&sql).await.expect("nobody hinders the application");
        }
        rounds
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn definitions_change_under_load_and_kills_and_both_servers_stay_equal() {
    let (source, target, mut daemon) = begin().await;
    let stop = Arc::new(AtomicBool::new(false));
    let writing = writer(&source, stop.clone()).await;
    let client = connect(&source, SHOP).await;
    for (round, failpoint) in ["", "apply.before_commit=hang", "apply.after_commit=hang", ""].into_iter().enumerate() {
        daemon.restart_with(failpoint);
        for sql in [
            format!("CREATE TABLE made_{round} (id serial PRIMARY KEY, v text)"),
            format!("INSERT INTO made_{round} (v) SELECT 'x' FROM generate_series(1, 200)"),
            format!("ALTER TABLE a ADD COLUMN c{round} int DEFAULT {round}"),
            format!("UPDATE a SET c{round} = id WHERE id % 10 = 0"),
            format!("ALTER TYPE mood ADD VALUE 'mood {round}'"),
            format!("ALTER TABLE made_{round} ADD COLUMN m mood DEFAULT 'mood {round}'"),
            format!("INSERT INTO made_{round} (v) VALUES ('with a mood')"),
        ] {
            client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
        }
        // Killed when the first is under way, about to be committed, just committed, and when the last has come.
        let wanted =
            ["number=\"1\"", "apply.before_commit\" action", "apply.after_commit\" action", "number=\"16\""][round];
        wait_for(wanted, || async { daemon.log().contains(wanted) }).await;
        daemon.kill();
    }
    daemon.set_failpoints("");
    daemon.start_again();
    client.batch_execute("DROP TABLE made_0").await.expect("dropped");
    client.batch_execute("CREATE TABLE keyless (x int, y text)").await.expect("made");
    client
        .batch_execute("INSERT INTO keyless VALUES (1, 'a'), (2, 'b'); UPDATE keyless SET y = 'c'")
        .await
        .expect("rows");
    stop.store(true, Ordering::Relaxed);
    assert!(writing.await.expect("no panic") > 0);
    ready(&daemon).await;
    wait_for("the new tables to be listed", || async {
        let listed = daemon.json(&["migration", "tables", NAME]).to_string();
        listed.contains("keyless") && listed.contains("made_3") && !listed.contains("made_0")
    })
    .await;
    let verified = daemon.json(&["migration", "verify", NAME]);
    assert_eq!(verified["differences"], 0, "{verified}");
    drop(client);

    let report = daemon.json(&["migration", "cutover", NAME]);
    assert_eq!(report["outcome"], "switched", "{report}");
    shop::open_fenced(&source).await;
    let (from, to) = (connect(&source, SHOP).await, connect(&target, SHOP).await);
    assert_eq!(compare::differences(&from, &to).await.expect("read"), Vec::<String>::new());
    drop((from, to));
    let to = connect(&target, SHOP).await;
    let sql = "INSERT INTO made_3 (v) VALUES ('back'); INSERT INTO keyless VALUES (3, 'back'); UPDATE a SET v = 'back'";
    to.batch_execute(sql).await.expect("written on the target");
    drop(to);
    wait_for("the way back to be followed", || async {
        daemon.json(&["migration", "show", NAME])["databases"][0]["latency_bytes"] == 0
    })
    .await;
    let report = daemon.json(&["migration", "rollback", NAME]);
    assert_eq!(report["outcome"], "switched", "{report}");
    let back = connect(&source, SHOP).await;
    for table in ["made_3", "keyless", "a"] {
        let column = if table == "keyless" { "y" } else { "v" };
        let sql = format!("SELECT count(*) > 0 FROM {table} WHERE {column} = 'back'");
        assert!(back.query_one(&sql, &[]).await.expect("read").get::<_, bool>(0), "{table}");
    }
}

/// It stops where it says which command it was, goes on after a retry, and a cancel leaves nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_the_target_does_not_take_is_tried_again() {
    let (source, target, daemon) = begin().await;
    let client = connect(&source, SHOP).await;
    client.batch_execute("CREATE ROLE late").await.expect("no event trigger sees roles");
    client.batch_execute("GRANT SELECT ON a TO late").await.expect("recorded");
    client.batch_execute("CREATE TABLE behind (x int)").await.expect("recorded");
    wait_for("the migration to stop", || async { daemon.json(&["migration", "show", NAME])["state"] == "Failed" })
        .await;
    let view = daemon.json(&["migration", "show", NAME]);
    assert_eq!(view["error"]["code"], "ddl", "{view}");
    let message = view["error"]["message"].as_str().expect("text");
    assert!(
        message.contains("GRANT") && message.contains("pgcutover.command") && message.contains("late"),
        "{message}"
    );
    assert!(view["error"]["hint"].as_str().is_some_and(|hint| hint.contains("retry")), "{view}");
    let there = connect(&target, SHOP).await;
    let behind = "SELECT to_regclass('behind') IS NULL";
    assert!(there.query_one(behind, &[]).await.expect("read").get::<_, bool>(0), "nothing passes it");

    there.batch_execute("CREATE ROLE late").await.expect("mended");
    daemon.must(&["migration", "retry", NAME]);
    ready(&daemon).await;
    wait_for("what came behind it", || async { !there.query_one(behind, &[]).await.expect("read").get::<_, bool>(0) })
        .await;

    daemon.must(&["migration", "cancel", NAME]);
    wait_for("everything to be removed", || async {
        client.query_one(OURS, &[]).await.expect("counted").get::<_, i64>(0) == 0
            && client
                .query_one("SELECT to_regnamespace('pgcutover') IS NULL", &[])
                .await
                .expect("read")
                .get::<_, bool>(0)
    })
    .await;
    let identity = "SELECT relreplident::text FROM pg_class WHERE relname = 'behind'";
    assert_eq!(client.query_one(identity, &[]).await.expect("read").get::<_, &str>(0), "d", "set back");
    client.batch_execute("CREATE TABLE after AS SELECT 1 AS x").await.expect("allowed again");
}
