//! The throw-away clusters themselves: every other test on real PostgreSQL relies on them.

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgcutover::demo::cluster::{Cluster, ClusterAuth, ClusterOptions, Stop};
use support::{connect, installations, one_cluster, try_connect};

#[tokio::test]
async fn every_installed_major_starts_and_decodes_logically() {
    for installation in installations().all() {
        let cluster = Cluster::start(ClusterOptions::new(installation, "any")).expect("starts");
        let row = connect(&cluster, "postgres").await.query_one("SHOW wal_level", &[]).await.expect("answers");
        assert_eq!(row.get::<_, String>(0), "logical", "major {}", installation.major);
        assert_eq!(cluster.major(), installation.major);
    }
}

#[tokio::test]
async fn data_outlives_a_stop_and_a_kill_and_nothing_outlives_drop() {
    let mut cluster = one_cluster("restart");
    let data = cluster.data_dir();
    connect(&cluster, "postgres").await.batch_execute("CREATE TABLE t AS SELECT 1 AS a").await.expect("created");
    for how in [Stop::Fast, Stop::Immediate, Stop::Kill] {
        let port = cluster.port();
        cluster.stop(how).expect("stops");
        assert!(try_connect(&cluster.config("postgres")).await.is_err(), "stopped by {how:?}");
        cluster.start_again().expect("starts again");
        assert_eq!(cluster.port(), port);
        let client = connect(&cluster, "postgres").await;
        client.query_one("SELECT a FROM t", &[]).await.expect("the table is still there");
    }
    let config = cluster.config("postgres");
    drop(cluster);
    assert!(try_connect(&config).await.is_err(), "gone with the value");
    assert!(!data.exists());
}

#[tokio::test]
async fn passwords_are_asked_for() {
    let found = installations();
    for installation in found.all() {
        for auth in
            [ClusterAuth::Scram { password: "it's \"odd\"".into() }, ClusterAuth::Md5 { password: "odd\\".into() }]
        {
            let cluster = Cluster::start(ClusterOptions::new(installation, "auth").auth(auth)).expect("starts");
            connect(&cluster, "postgres").await;
            let mut wrong = cluster.config("postgres");
            wrong.password("wrong");
            let refused = try_connect(&wrong).await.expect_err("refused");
            assert_eq!(refused.code().map(|code| code.code()), Some("28P01"));
        }
    }
}

/// Runs itself as a child that is killed while it holds a cluster.
#[tokio::test]
async fn a_killed_owner_takes_its_servers_with_it() {
    if std::env::var_os("PGCUTOVER_TEST_HOLD_CLUSTER").is_some() {
        let cluster = one_cluster("orphan");
        println!("held {} {}", cluster.port(), cluster.socket_dir().display());
        std::thread::sleep(Duration::from_secs(600));
    }
    let program = std::env::current_exe().expect("tests know their path");
    let mut owner = Command::new(program)
        .args(["--exact", "a_killed_owner_takes_its_servers_with_it", "--nocapture"])
        .env("PGCUTOVER_TEST_HOLD_CLUSTER", "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let output = std::io::BufReader::new(owner.stdout.take().expect("piped"));
    let line = std::io::BufRead::lines(output)
        .map_while(Result::ok)
        .find_map(|line| line.split_once("held ").map(|(_, held)| held.to_owned()))
        .expect("the owner says what it holds");
    let (port, directory) = line.split_once(' ').expect("port and directory");
    owner.kill().expect("killed");
    owner.wait().expect("ended");

    let deadline = Instant::now() + support::PATIENCE;
    while std::path::Path::new(directory).join("data").exists() {
        assert!(Instant::now() < deadline, "{directory} was left behind");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port.parse().expect("a port")).user("postgres");
    assert!(try_connect(&config).await.is_err(), "the server ended too");
}
