//! A new process takes over from the one that serves: nobody is refused, nothing is lost, cancels find their session,
//! and no cutover forgets who is still served by the old one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use support::daemon::{Daemon, DaemonOptions};
use support::{connect_with, wait_for};

/// A daemon that can be taken over from, and its socket.
async fn daemon(mode: &str) -> (support::daemon::Daemon, std::path::PathBuf, [pgcutover::demo::cluster::Cluster; 2]) {
    let (source, target) = support::two_clusters();
    let admin = support::connect(&source, "postgres").await;
    admin.batch_execute("CREATE DATABASE shop").await.unwrap();
    let shop = support::connect(&source, "shop").await;
    shop.batch_execute("CREATE TABLE orders (id bigint PRIMARY KEY)").await.unwrap();
    let options = DaemonOptions::default()
        .section("listen", "takeover_socket = \"takeover.sock\"")
        .section("pool", &format!("mode = \"{mode}\""));
    let daemon = Daemon::start(&source, &target, options);
    let socket = daemon.config_path().with_file_name("takeover.sock");
    wait_for("the socket for a successor", || async { socket.exists() }).await;
    (daemon, socket, [source, target])
}

/// Lets a successor take over and waits until it has. Returns the process that ran before.
async fn take_over(daemon: &mut Daemon, socket: &std::path::Path) -> Child {
    let mut old = daemon.succeed();
    let retired = socket.with_extension(format!("sock.{}", old.id()));
    // One that has nobody to serve ends at once.
    wait_for("the predecessor to step back", || {
        let back = retired.exists() || old.try_wait().unwrap().is_some();
        std::future::ready(back && socket.exists())
    })
    .await;
    old
}

async fn wait_for_end(process: &mut Child) {
    wait_for("the predecessor to end", || std::future::ready(process.try_wait().unwrap().is_some())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_that_the_process_is_another_one() {
    nobody_notices("session").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_where_server_connections_are_pooled_by_transaction() {
    nobody_notices("transaction").await;
}

async fn nobody_notices(mode: &str) {
    let (mut daemon, socket, _clusters) = daemon(mode).await;
    // A transaction that is open throughout, and a statement that runs.
    let long = connect_with(&daemon.client("shop")).await;
    long.batch_execute("BEGIN; INSERT INTO orders VALUES (1)").await.unwrap();
    let sleeper = connect_with(&daemon.client("shop")).await;
    let cancel = sleeper.cancel_token();
    let asleep = tokio::spawn(async move { sleeper.batch_execute("SELECT pg_sleep(600)").await });

    let (stop, connected) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (config, stop, connected) = (daemon.client("shop"), stop.clone(), connected.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let client = support::try_connect(&config).await.map_err(|error| format!("connect: {error:?}"))?;
                    client.query_one("SELECT 1", &[]).await.map_err(|error| format!("query: {error:?}"))?;
                    connected.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Ok::<(), String>(())
            })
        })
        .collect();
    let some = |more: u64| {
        let (connected, wanted) = (connected.clone(), connected.load(Ordering::Relaxed) + more);
        async move { wait_for("more clients", || async { connected.load(Ordering::Relaxed) >= wanted }).await }
    };
    some(50).await;
    let mut old = take_over(&mut daemon, &socket).await;
    some(100).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        assert_eq!(client.await.unwrap(), Ok(()), "{}", daemon.log());
    }

    // The cancel goes to the new process, the statement runs in the old one.
    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let error = asleep.await.unwrap().expect_err("cancelled");
    assert_eq!(error.code().map(|code| code.code()), Some("57014"));
    long.batch_execute("INSERT INTO orders VALUES (2); COMMIT").await.unwrap();

    // The engine has moved; a cutover waits for those that the old process serves.
    let created = daemon.json(&["migration", "create", "m1", "--database", "shop", "--wait"]);
    assert_eq!(created["substate"], json!("WaitingForCutoverTrigger"), "{created}");
    let members = daemon.json(&["show", "members"]);
    let roles: Vec<_> = members.as_array().unwrap().iter().map(|member| member["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["leader", "retired"]);
    let refused = daemon.command(&["migration", "cutover", "m1"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("still serves"), "{said}");
    // Not forgotten by a new process that is killed either.
    daemon.restart();
    let refused = daemon.command(&["migration", "cutover", "m1"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("still serves"), "{refused:?}");

    drop(long);
    wait_for_end(&mut old).await;
    assert!(old.wait().unwrap().success());
    wait_for("the migration to be ready again", || async {
        daemon.json(&["migration", "show", "m1"])["substate"] == json!("WaitingForCutoverTrigger")
    })
    .await;
    let report = daemon.json(&["migration", "cutover", "m1"]);
    assert_eq!(report["outcome"], json!("switched"), "{report}");
    let after = connect_with(&daemon.client("shop")).await;
    let count: i64 = after.query_one("SELECT count(*) FROM orders", &[]).await.unwrap().get(0);
    assert_eq!(count, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_is_refused_where_it_would_lose_something_and_the_old_process_goes_on() {
    let (mut daemon, socket, _clusters) = daemon("session").await;
    let client = connect_with(&daemon.client("shop")).await;
    client.batch_execute("SELECT 1").await.unwrap();
    daemon.must(&["pause", "shop"]);
    let refused = daemon.command(&["run", "--takeover"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("is paused: RESUME it first"), "{said}");
    daemon.must(&["resume", "shop"]);
    client.batch_execute("SELECT 1").await.expect("it goes on");
    // What is ordered while a successor gets ready would end with this process.
    let mut successor = tokio::net::UnixStream::connect(&socket).await.unwrap();
    successor.write_all(b"\"take_over\"\n").await.unwrap();
    assert_ne!(successor.read(&mut [0; 1024]).await.unwrap(), 0, "it is given the listeners");
    let lost: [&[&str]; 6] = [
        &["pause", "shop"],
        &["pause"],
        &["disable", "shop"],
        &["kill-database", "shop"],
        &["set", "limits.idle_timeout", "1h"],
        &["reload"],
    ];
    for order in lost {
        let refused = daemon.command(order);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("another process is taking over"), "{order:?}: {said}");
    }
    client.batch_execute("SELECT 1").await.expect("neither held nor ended");
    drop(successor);
    wait_for("orders to be taken again", || async { daemon.command(&["pause", "shop"]).status.success() }).await;
    daemon.must(&["resume", "shop"]);
    // One after the other, as often as wanted.
    let mut first = take_over(&mut daemon, &socket).await;
    let mut second = take_over(&mut daemon, &socket).await;
    connect_with(&daemon.client("shop")).await.batch_execute("SELECT 1").await.unwrap();
    wait_for_end(&mut second).await;
    client.batch_execute("SELECT 1").await.expect("served by the first of three");
    // What would look as if it held or ended everybody.
    for order in [&["pause", "shop"], &["kill-database", "shop"]] {
        let refused = daemon.command(order);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(&format!("process {}", first.id())), "{order:?}: {said}");
    }
    let mut kill = std::process::Command::new("kill");
    assert!(kill.args(["-TERM", &first.id().to_string()]).status().unwrap().success());
    wait_for_end(&mut first).await;
    assert!(client.batch_execute("SELECT 1").await.is_err(), "its operator has ended it");
    let members = daemon.json(&["show", "members"]);
    assert_eq!(members.as_array().unwrap().len(), 1, "{members}");
}

/// What the service manager is told, in the words of sd_notify(3).
#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_is_told_of_every_change() {
    let (source, target) = support::two_clusters();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = tokio::net::UnixDatagram::bind(&path).unwrap();
    let told = async || {
        let mut bytes = [0; 256];
        let count = tokio::time::timeout(support::PATIENCE, manager.recv(&mut bytes)).await.expect("told").unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    };
    let mut options = DaemonOptions::default().section("listen", "takeover_socket = \"takeover.sock\"");
    options.environment.push(("NOTIFY_SOCKET".to_owned(), path.display().to_string()));
    let mut daemon = Daemon::start(&source, &target, options);
    let socket = daemon.config_path().with_file_name("takeover.sock");
    assert_eq!(told().await, "READY=1");
    let signal = |pid: u32, name: &str| {
        let sent = std::process::Command::new("kill").args([name, &pid.to_string()]).status().unwrap();
        assert!(sent.success());
    };
    signal(daemon.pid().unwrap(), "-HUP");
    assert_eq!(told().await, "RELOADING=1");
    assert_eq!(told().await, "READY=1");
    let mut old = take_over(&mut daemon, &socket).await;
    let pid = daemon.pid().unwrap();
    assert_eq!(told().await, format!("MAINPID={pid}\nREADY=1"), "the old process says nothing of its end");
    wait_for_end(&mut old).await;
    signal(pid, "-TERM");
    assert_eq!(told().await, "STOPPING=1");
}

/// Who connects while there is no process waits in the queue of the manager's listener.
#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_may_listen_for_it() {
    let (source, target) = support::two_clusters();
    let sockets = tempfile::tempdir().unwrap();
    let options = DaemonOptions::default().section("listen", &format!("unix_socket_dir = {:?}", sockets.path()));
    let mut daemon = Daemon::prepare(&source, &target, options);
    let tcp = std::net::TcpListener::bind(("127.0.0.1", daemon.port)).unwrap();
    let path = sockets.path().join(format!(".s.PGSQL.{}", daemon.port));
    let unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let listeners = || [tcp.try_clone().unwrap().into(), unix.try_clone().unwrap().into()];
    let mut by_socket = tokio_postgres::Config::new();
    by_socket.host_path(sockets.path()).port(daemon.port).user("postgres").dbname("postgres");
    for _ in 0..2 {
        let early = [daemon.client("postgres"), by_socket.clone()];
        let early = early.map(|config| tokio::spawn(async move { support::try_connect(&config).await }));
        daemon.spawn_activated(listeners());
        for connecting in early {
            let client = connecting.await.unwrap().expect("it waited");
            client.batch_execute("SELECT 1").await.unwrap();
        }
        let pid = daemon.pid().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        daemon.wait_for_end();
        assert!(path.exists(), "the socket's file is the manager's");
    }
    // Where the manager passes nothing, the process listens itself, and at once.
    drop((tcp, unix));
    daemon.start_again();
    connect_with(&by_socket).await.batch_execute("SELECT 1").await.unwrap();
}
