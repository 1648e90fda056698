//! Replication connections: PostgreSQL's own programs through the proxy, and the refusal by configuration.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use pgcutover::config::{PoolMode, ReplicationPolicy};
use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::SessionState;
use pgcutover::switch::{Epoch, ServerRole};

use crate::rig::{Rig, server, text};
use crate::support::{self, connect, one_cluster, wait_for};
use crate::wire_client::{WireClient, query, rows};

/// The program, where the installation has it; a minimal one has only the server and the tools for dumps.
fn program(cluster: &Cluster, name: &str) -> Option<Command> {
    let path = cluster.bindir().join(name);
    if !path.exists() {
        eprintln!("left out: {} does not exist", path.display());
        return None;
    }
    Some(Command::new(path))
}

fn through<'a>(command: &'a mut Command, rig: &Rig) -> &'a mut Command {
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &rig.port.to_string()])
}

fn must(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn is_written(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).expect("a directory");
    entries.flatten().any(|entry| entry.metadata().is_ok_and(|data| data.len() > 0))
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresqls_own_programs_work_through_the_proxy() {
    let cluster = one_cluster("replication");
    let rig = Rig::over(&cluster);
    let direct = connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE TABLE t(a int)").await.expect("created");

    // What every one of them begins with.
    let mut walsender = WireClient::connect(rig.port).await;
    walsender.start(&[("user", "postgres"), ("database", "postgres"), ("replication", "database")]).await;
    walsender.until_ready().await;
    walsender.send(&query("IDENTIFY_SYSTEM")).await;
    let answer = walsender.until_ready().await;
    let identifier = text(&direct, "SELECT system_identifier FROM pg_control_system()").await;
    assert_eq!(rows(&answer), [identifier]);
    rig.until(SessionState::Replication).await;
    drop(walsender);

    let directory = tempfile::tempdir().expect("a directory");
    if let Some(mut backup) = program(&cluster, "pg_basebackup") {
        let path = directory.path().join("backup");
        must(
            &through(&mut backup, &rig)
                .arg("-D")
                .arg(&path)
                .args(["-X", "stream", "-c", "fast"])
                .output()
                .expect("runs"),
        );
        assert!(path.join("backup_label").exists() && path.join("PG_VERSION").exists());
        assert!(is_written(&path.join("pg_wal")), "the WAL came over a second connection");
    }
    if let Some(mut receive) = program(&cluster, "pg_receivewal") {
        let path = directory.path().join("wal");
        std::fs::create_dir(&path).expect("created");
        let mut process = through(&mut receive, &rig).arg("-D").arg(&path).spawn().expect("runs");
        wait_for("WAL to arrive", || {
            let arrived = is_written(&path);
            async move { arrived }
        })
        .await;
        assert!(process.try_wait().expect("a child").is_none(), "it goes on");
        process.kill().expect("ended");
        process.wait().expect("ended");
    }
    if let Some(mut create) = program(&cluster, "pg_recvlogical") {
        let slot = ["-d", "postgres", "--slot", "s1"];
        must(&through(&mut create, &rig).args(slot).args(["--create-slot", "-P", "pgoutput"]).output().expect("runs"));
        assert_eq!(text(&direct, "SELECT slot_name FROM pg_replication_slots").await, "s1");
        let mut drop_slot = program(&cluster, "pg_recvlogical").expect("it was there");
        must(&through(&mut drop_slot, &rig).args(slot).arg("--drop-slot").output().expect("runs"));
    }
    rig.until_no_session().await;
    rig.stop().await;
}

/// Under a PAUSE too: it holds no such connection, and the server that was left must not be written to.
#[tokio::test(flavor = "multi_thread")]
async fn a_switch_ends_them_with_a_reason() {
    for is_paused in [false, true] {
        let cluster = one_cluster("replication_switch");
        let rig = Rig::over(&cluster);
        let database = rig.database();
        let mut walsender = WireClient::connect(rig.port).await;
        walsender.start(&[("user", "postgres"), ("database", "postgres"), ("replication", "true")]).await;
        walsender.until_ready().await;
        if is_paused {
            assert_eq!(database.pause(), Ok(true));
        }
        database.fence();
        tokio::time::timeout(support::PATIENCE, database.wait_empty()).await.expect("they are exempt");
        database.open(ServerRole::Target, Epoch(1));
        let told = tokio::time::timeout(support::PATIENCE, walsender.next()).await;
        assert_eq!(told.expect("it is told").expect("an error").code(), "57P01");
        rig.until_no_session().await;
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn they_are_refused_by_configuration() {
    let cluster = one_cluster("replication_refused");
    let rig =
        Rig::start(server(&cluster), server(&cluster), |config| config.listen.replication = ReplicationPolicy::Refuse);
    for wanted in ["true", "database", "on", "1"] {
        let mut walsender = WireClient::connect(rig.port).await;
        walsender.start(&[("user", "postgres"), ("database", "postgres"), ("replication", wanted)]).await;
        let refused = walsender.next().await.expect("an error");
        assert_eq!((refused.tag, refused.code().as_str()), ('E', "28000"), "{wanted}");
        assert!(String::from_utf8_lossy(&refused.body).contains("replication connections are refused by this proxy"));
    }
    rig.wire("postgres").await;
    if let Some(mut receive) = program(&cluster, "pg_receivewal") {
        let directory = tempfile::tempdir().expect("a directory");
        let receive = through(&mut receive, &rig).arg("--no-loop").arg("-D").arg(directory.path());
        let output = receive.stdin(Stdio::null()).output().expect("runs");
        assert!(String::from_utf8_lossy(&output.stderr).contains("refused by this proxy"), "{output:?}");
    }
    rig.stop().await;
}

/// For every beginning of "false" a server makes an ordinary backend, which a gate must hold.
#[tokio::test(flavor = "multi_thread")]
async fn who_says_no_in_few_letters_is_held_like_everybody() {
    let cluster = one_cluster("replication_no");
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let rig = Rig::start(server(&cluster), server(&cluster), |config| config.pool.mode = mode);
        let database = rig.database();
        for no in ["fa", "fal", "fals", "FALS", "of", "0"] {
            let mut client = WireClient::connect(rig.port).await;
            client.start(&[("user", "postgres"), ("database", "postgres"), ("replication", no)]).await;
            client.until_ready().await;
            database.fence();
            client.send(&query("SELECT 1")).await;
            rig.until(SessionState::Held).await;
            database.reopen();
            assert!(client.tags_until_ready().await.ends_with("CZI"), "{no}");
            drop(client);
            rig.until_no_session().await;
        }
        for nothing in ["", "o", "maybe", "DATABASE"] {
            let mut client = WireClient::connect(rig.port).await;
            client.start(&[("user", "postgres"), ("database", "postgres"), ("replication", nothing)]).await;
            let refused = client.next().await.expect("an error");
            assert_eq!((refused.tag, refused.code().as_str()), ('E', "22023"), "{nothing}");
        }
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_physical_replication_makes_up_leave_nothing_behind() {
    let cluster = one_cluster("invented");
    let rig = Rig::over(&cluster);
    for number in 0..5 {
        let mut walsender = WireClient::connect(rig.port).await;
        let name = format!("invented{number}");
        walsender.start(&[("user", "postgres"), ("database", &name), ("replication", "true")]).await;
        assert!(walsender.tags_until_ready().await.ends_with("ZI"));
        walsender.send(&query("IDENTIFY_SYSTEM")).await;
        assert!(walsender.tags_until_ready().await.ends_with("CZI"));
    }
    rig.until_no_session().await;
    let known: Vec<_> = rig.board.all().iter().map(|database| database.name().to_owned()).collect();
    assert_eq!(known, ["replication"]);
    assert!(!rig.metrics.render().expect("rendered").contains("invented"));
    rig.stop().await;
}
