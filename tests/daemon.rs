//! The daemon as an operator uses it: commands, exit statuses, signals, a reload, a restart – and what is never said.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use pgcutover::demo::cluster::{Cluster, ClusterAuth, Stop};
use serde_json::{Value, json};

use support::daemon::{Daemon, DaemonOptions};

const OWN_PASSWORD: &str = "0wn-passw0rd-of-pgcutover";
const APP_PASSWORD: &str = "app-passw0rd";
const TOKEN: &str = "t0ken-of-the-operator";
const ROW_VALUE: &str = "a-row-value-that-is-nobodys-business";
/// Everything that must not be found anywhere.
const SECRETS: [&str; 4] = [OWN_PASSWORD, APP_PASSWORD, TOKEN, ROW_VALUE];

/// A shop with an application of its own, on clusters that want SCRAM.
async fn shop() -> (Cluster, Cluster) {
    let scram = |options: pgcutover::demo::cluster::ClusterOptions| {
        options.auth(ClusterAuth::Scram { password: OWN_PASSWORD.to_owned() })
    };
    let (source, target) = support::two_clusters_with(scram, scram);
    let admin = support::connect(&source, "postgres").await;
    admin.batch_execute("CREATE DATABASE shop").await.unwrap();
    admin.batch_execute(&format!("CREATE ROLE app LOGIN PASSWORD '{APP_PASSWORD}'")).await.unwrap();
    let sql = "CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text);
               GRANT ALL ON orders TO app; INSERT INTO orders (note) SELECT g FROM generate_series(1, 1000) g";
    support::connect(&source, "shop").await.batch_execute(sql).await.unwrap();
    (source, target)
}

/// Status and both outputs of `pgcutover ARGUMENTS -c CONFIG`; none of it may hold a secret.
fn command(daemon: &Daemon, arguments: &[&str]) -> (i32, String, String) {
    let output = daemon.command(arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    for secret in SECRETS {
        assert!(!out.contains(secret) && !err.contains(secret), "{arguments:?} says a secret:\n{out}{err}");
    }
    (output.status.code().unwrap_or(-1), out, err)
}

fn signal(daemon: &Daemon, name: &str) {
    let pid = daemon.pid().expect("it runs").to_string();
    assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().expect("kill can be run").success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_by_the_command_line_from_the_first_check_to_a_restart() {
    let (mut source, target) = shop().await;
    let options = DaemonOptions::default()
        .section("telemetry", "log = \"debug,pgcutover=trace\"\nformat = \"json\"")
        .section("admin", &format!("token = \"{TOKEN}\""));
    let mut daemon = Daemon::prepare(&source, &target, options);

    let (status, _, err) = command(&daemon, &["status"]);
    assert_eq!(status, 3, "not running yet: {err}");
    assert!(err.contains("cannot reach the daemon"), "{err}");
    let (status, out, _) = command(&daemon, &["check", "--output", "json"]);
    assert_eq!(status, 0, "{out}");
    daemon.start_again();

    let (status, _, err) = command(&daemon, &["migration", "show", "none"]);
    assert_eq!((status, err.contains("no migration named")), (1, true), "{err}");
    let app = {
        let mut config = daemon.client("shop");
        support::connect_with(config.user("app").password(APP_PASSWORD)).await
    };
    let insert = app.prepare("INSERT INTO orders (note) VALUES ($1)").await.unwrap();
    app.execute(&insert, &[&ROW_VALUE]).await.unwrap();

    let shown = daemon.json(&["migration", "create", "first", "--database", "shop", "--wait"]);
    assert_eq!(shown["substate"], json!("WaitingForCutoverTrigger"), "{shown}");
    let tables = daemon.json(&["migration", "tables", "first"]);
    assert_eq!(tables[0]["full_load"]["rows"], json!(1001), "{tables}");
    let dry = daemon.json(&["migration", "cutover", "first", "--dry-run"]);
    assert_eq!(dry["outcome"], json!("dry-run"), "{dry}");
    app.execute(&insert, &[&ROW_VALUE]).await.unwrap();
    let report = daemon.json(&["migration", "cutover", "first"]);
    assert_eq!((&report["outcome"], &report["sessions_moved"]), (&json!("switched"), &json!(1)), "{report}");
    // The same connection, the same prepared statement, the other server.
    app.execute(&insert, &[&ROW_VALUE]).await.unwrap();
    let port: i32 = app.query_one("SELECT inet_server_port()", &[]).await.unwrap().get(0);
    assert_eq!(port, i32::from(target.port()));
    let (status, _, err) = command(&daemon, &["migration", "cutover", "first"]);
    assert_eq!(status, 1, "it is over: {err}");
    let (_, status, _) = command(&daemon, &["status"]);
    assert!(status.contains("target"), "{status}");

    daemon.restart();
    let mut config = daemon.client("shop");
    let app = support::connect_with(config.user("app").password(APP_PASSWORD)).await;
    let row = app.query_one("SELECT count(*), inet_server_port() FROM orders", &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i32>(1)), (1003, i32::from(target.port())));
    let list = daemon.json(&["migration", "list"]);
    assert_eq!((&list[0]["name"], &list[0]["state"]), (&json!("first"), &json!("Succeeded")));

    // The old server is switched off: what was moved is served, and that the old one is silent is said once.
    source.stop(Stop::Fast).unwrap();
    let said_before = daemon.log().matches("cannot read what this server says").count();
    daemon.restart();
    let app = support::connect_with(&config).await;
    app.query_one("SELECT count(*) FROM orders", &[]).await.unwrap();
    let (status, out, err) = command(&daemon, &["status"]);
    assert_eq!((status, out.lines().next().is_some_and(|line| line.ends_with(" serving"))), (0, true), "{out}{err}");
    assert!(out.contains("databases that no cutover has covered are refused"), "{out}");
    let asked = || daemon.log().matches("still cannot be read").count();
    support::wait_for("the server to be asked again", || async { asked() >= 2 }).await;
    assert_eq!(daemon.log().matches("cannot read what this server says").count(), said_before + 1);

    let log = daemon.log();
    assert!(log.lines().any(|line| line.contains("state changed")), "the story is told");
    for secret in SECRETS {
        let found = log.lines().find(|line| line.contains(secret));
        assert!(found.is_none(), "{found:?}");
    }
}

/// The daemon may be restarted, or another may take over, while somebody waits for a copy that takes hours.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_migration_waits_through_a_restart() {
    let (source, target) = shop().await;
    let options = DaemonOptions::default()
        .section("admin", &format!("token = \"{TOKEN}\""))
        .failpoints("copy.snapshot_taken=sleep:2000ms");
    let mut daemon = Daemon::start(&source, &target, options);
    let mut waits = daemon.begin(&["migration", "create", "first", "--database", "shop", "--wait"]);
    support::wait_for("the migration to be seen", || async {
        command(&daemon, &["migration", "show", "first"]).0 == 0
    })
    .await;
    // It is asked for twice a second.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    daemon.restart();
    let ended = tokio::task::spawn_blocking(move || waits.wait().expect("a child")).await.expect("no panic");
    assert!(ended.success(), "{ended}");
    assert_eq!(daemon.json(&["migration", "show", "first"])["state"], "WaitingForUserAction");
}

/// Until the servers have said who is active nobody is let in, and that may take a while. What an operator tightens then holds.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_reloaded_while_the_daemon_starts_is_in_force_when_it_serves() {
    let (source, target) = support::two_clusters();
    let mut daemon = Daemon::start(&source, &target, DaemonOptions::default());
    daemon.kill();
    let (file, rules) = (daemon.config_path(), daemon.directory().join("pg_hba.conf"));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&rules, "local all all trust\nhost all nobody all trust\n").unwrap();
    let servers = [source.pid().expect("it runs"), target.pid().expect("it runs")];
    servers.iter().for_each(|postmaster| pgcutover::demo::cluster::send_signal(*postmaster, "STOP"));
    let logged = daemon.log_bytes();
    daemon.spawn();
    let says = |words: &str| daemon.log_since(logged).contains(words);
    support::wait_for("HTTP to listen", || async { says("HTTP listens") }).await;
    std::fs::write(&file, text.replace("method = \"trust\"", "hba_file = \"pg_hba.conf\"")).unwrap();
    let changes = daemon.json(&["reload"]);
    assert_eq!(changes["applied"], json!(["auth.method", "auth.hba_file"]));
    assert!(!says("proxy::listener: listening"), "it is still starting");
    servers.iter().for_each(|postmaster| pgcutover::demo::cluster::send_signal(*postmaster, "CONT"));
    support::wait_for("the daemon to serve", || async { daemon.json(&["status"])["ready"] == true }).await;
    let code = loop {
        let refused = support::try_connect(&daemon.client("postgres")).await.expect_err("nobody but nobody");
        match refused.code().map(|code| code.code().to_owned()) {
            Some(code) if code != "57P03" => break code,
            _ => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
        }
    };
    assert_eq!(code, "28000");
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reload_and_stop_and_a_wrong_configuration_changes_nothing() {
    let (source, target) = support::two_clusters();
    let mut daemon = Daemon::start(&source, &target, DaemonOptions::default());
    let file = daemon.config_path();
    let text = std::fs::read_to_string(&file).unwrap();

    std::fs::write(&file, text.replace("[\"postgres\"]", "[\"postgres\", \"ann\"]")).unwrap();
    signal(&daemon, "HUP");
    let users = || {
        let config: Value = daemon.json(&["show", "config"]);
        let rows = config.as_array().unwrap().clone();
        rows.into_iter().find(|row| row["key"] == "admin.users").unwrap()["value"].clone()
    };
    support::wait_for("the reload", || async { users() == "postgres,ann" }).await;

    std::fs::write(&file, text.replace("users", "user")).unwrap();
    let (status, _, err) = command(&daemon, &["--output", "json", "migration", "show", "a_b"]);
    let told: Value = serde_json::from_str(&err).expect("one object");
    assert_eq!((status, &told["error"]["code"]), (2, &json!("usage")), "{err}");
    let (status, _, err) = command(&daemon, &["reload"]);
    assert_eq!(status, 1, "{err}");
    assert!(err.contains("unknown key `user` in [admin]; did you mean `users`?"), "{err}");
    std::fs::write(&file, &text).unwrap();
    assert_eq!(users(), "postgres,ann", "the old one stays in force");
    std::fs::write(&file, text.replace("[limits]", "[limits]\nbuffer = \"16kB\"")).unwrap();
    let changes = daemon.json(&["reload"]);
    assert_eq!(changes, json!({"applied": ["admin.users"], "needs_restart": ["limits.buffer"]}));

    // A file that the configuration names is part of it.
    let rules = daemon.directory().join("pg_hba.conf");
    let with_rules = text.replace("method = \"trust\"", "hba_file = \"pg_hba.conf\"");
    std::fs::write(&rules, "local all all trust\nhost all nobody all trust\n").unwrap();
    std::fs::write(&file, &with_rules).unwrap();
    let changes = daemon.json(&["reload"]);
    assert_eq!(changes["applied"], json!(["auth.method", "auth.hba_file"]));
    let refused = support::try_connect(&daemon.client("postgres")).await.expect_err("nobody but nobody");
    assert_eq!(refused.code().unwrap().code(), "28000");
    std::fs::write(&rules, "host all all all trust\nhost all all 10.0.0.0/64 trust\n").unwrap();
    let (status, _, err) = command(&daemon, &["reload"]);
    assert_eq!(status, 1, "{err}");
    assert!(err.contains("pg_hba.conf:2: \"10.0.0.0/64\" is not an address"), "{err}");
    assert!(support::try_connect(&daemon.client("postgres")).await.is_err(), "the old rules stay in force");
    let (status, out, err) = command(&daemon, &["check"]);
    assert!(status != 0 && format!("{out}{err}").contains("pg_hba.conf:2:"), "{status}: {out}{err}");
    std::fs::write(&file, &text).unwrap();
    daemon.json(&["reload"]);

    let client = support::connect_with(&daemon.client("postgres")).await;
    signal(&daemon, "TERM");
    daemon.wait_for_end();
    assert!(client.simple_query("SELECT 1").await.is_err(), "its session was ended");
    let log = daemon.log();
    assert!(log.contains("told to stop") && log.contains("stopped"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_is_changed_live_and_a_shutdown_waits_for_clients() {
    let (source, target) = support::two_clusters();
    let mut daemon = Daemon::start(&source, &target, DaemonOptions::default());
    let client = support::connect_with(&daemon.client("postgres")).await;
    let console = support::connect_with(&daemon.client("pgbouncer")).await;
    let timeout = async || {
        let rows = console.query("SHOW CONFIG", &[]).await.unwrap();
        let row = rows.iter().find(|row| row.get::<_, &str>("key") == "limits.query_timeout").unwrap();
        row.get::<_, String>("value")
    };
    console.batch_execute("SET query_timeout = 0.2").await.unwrap();
    assert_eq!(timeout().await, "200ms");
    let error = client.batch_execute("SELECT pg_sleep(60)").await.expect_err("too long");
    assert_eq!(error.code().map(|code| code.code()), Some("57014"));
    let (status, _, err) = command(&daemon, &["set", "source.host", "elsewhere"]);
    assert_eq!((status, err.contains("source.host needs a restart")), (1, true), "{err}");
    let (status, _, err) = command(&daemon, &["set", "limits.no_such", "1"]);
    assert_eq!((status, err.contains("there is no setting")), (1, true), "{err}");
    console.batch_execute("RELOAD").await.unwrap();
    assert_eq!(timeout().await, "0s", "the file's value again");

    // Off, as every other of them.
    console.batch_execute("SET client_login_timeout = 0").await.unwrap();
    drop(support::connect_with(&daemon.client("postgres")).await);

    assert_eq!(daemon.json(&["status"])["ready"], true);
    console.batch_execute("SHUTDOWN WAIT_FOR_CLIENTS").await.unwrap();
    support::wait_for("new clients to be refused", || async {
        support::try_connect(&daemon.client("postgres")).await.is_err()
    })
    .await;
    assert_eq!(daemon.json(&["status"])["ready"], false, "balancers are told");
    client.batch_execute("SELECT 1").await.expect("it goes on");
    assert!(!daemon.has_ended());
    drop(client);
    daemon.wait_for_end();
}

/// Who cannot wait any longer for a client that does not go says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_that_waits_for_clients_is_told_to_wait_for_transactions_alone() {
    let (source, target) = support::two_clusters();
    let mut daemon = Daemon::start(&source, &target, DaemonOptions::default());
    let idle = support::connect_with(&daemon.client("postgres")).await;
    let console = support::connect_with(&daemon.client("pgcutover")).await;
    console.batch_execute("SHUTDOWN WAIT_FOR_CLIENTS").await.unwrap();
    support::wait_for("new clients to be refused", || async {
        support::try_connect(&daemon.client("postgres")).await.is_err()
    })
    .await;
    idle.batch_execute("SELECT 1").await.expect("it is waited for");
    console.batch_execute("SHUTDOWN WAIT_FOR_SERVERS").await.unwrap();
    daemon.wait_for_end();
    assert!(idle.simple_query("SELECT 1").await.is_err(), "its session was ended");
}

/// What is known to be away is said, and not waited for until it might have come.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_refuses_keeps_nobody_waiting() {
    let (source, mut target) = support::two_clusters();
    target.stop(Stop::Fast).unwrap();
    let mut daemon = Daemon::start(&source, &target, DaemonOptions::default());
    let begun = Instant::now();
    let (status, _, err) = command(&daemon, &["migration", "list"]);
    assert!(status == 1 && err.contains("target"), "{status} {err}");
    let (_, out, err) = command(&daemon, &["status"]);
    assert!(!out.is_empty(), "{err}");
    signal(&daemon, "TERM");
    daemon.wait_for_end();
    // It was half a minute for each.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

/// Ctrl-C in psql: who thinks better of a PAUSE while it waits must not leave everybody held.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_waits_is_cancelled_like_a_statement() {
    let (source, target) = support::two_clusters();
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());
    let busy = support::connect_with(&daemon.client("postgres")).await;
    busy.batch_execute("BEGIN; SELECT 1").await.unwrap();
    let console = support::connect_with(&daemon.client("pgcutover")).await;
    let cancel = console.cancel_token();
    let pausing = tokio::spawn(async move { console.batch_execute("PAUSE postgres").await });
    let watching = support::connect_with(&daemon.client("pgcutover")).await;
    support::wait_for("the database to be paused", || async {
        let rows = watching.query("SHOW DATABASES", &[]).await.unwrap();
        rows.iter().any(|row| row.get::<_, &str>("name") == "postgres" && row.get::<_, i64>("paused") == 1)
    })
    .await;
    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let error = pausing.await.unwrap().expect_err("taken back");
    assert_eq!(error.code().map(|code| code.code()), Some("57014"));
    let client = support::connect_with(&daemon.client("postgres")).await;
    client.simple_query("SELECT 1").await.expect("nobody is held");

    // The command line's way.
    let mut pause = Command::new(env!("CARGO_BIN_EXE_pgcutover"));
    pause.args(["pause", "postgres", "-c"]).arg(daemon.config_path()).stderr(std::process::Stdio::piped());
    let pause = pause.spawn().unwrap();
    let paused = || async {
        let rows = watching.query("SHOW DATABASES", &[]).await.unwrap();
        rows.iter().any(|row| row.get::<_, &str>("name") == "postgres" && row.get::<_, i64>("paused") == 1)
    };
    support::wait_for("the database to be paused", paused).await;
    assert!(Command::new("kill").args(["-INT", &pause.id().to_string()]).status().unwrap().success());
    let ended = tokio::task::spawn_blocking(|| pause.wait_with_output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!((ended.status.code(), said.contains("`pgcutover resume postgres`")), (Some(130), true), "{said}");
    support::wait_for("the pause to be taken back", || async { !paused().await }).await;
    client.simple_query("SELECT 1").await.expect("nobody is held");
    busy.batch_execute("COMMIT").await.expect("it was let be");
}
