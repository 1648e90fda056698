//! Random databases, moved while random transactions run and the engine, the source and the target are killed at random.
//! Afterwards source and target are equal.
//!
//! `make random SEEDS=200` runs that many seeds; a seed is printed before it begins, and
//! `RANDOM_SEED=… cargo test --test randomised` runs that one alone. The statements of a seed are always the same; how they
//! meet each other and the kills is not.

#[path = "../support/mod.rs"]
mod support;

mod definitions;
mod schema;
mod workload;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgcutover::demo::cluster::{Cluster, ClusterOptions, Stop};
use pgcutover::demo::compare;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use schema::Servers;
use support::daemon::{Daemon, DaemonOptions};
use support::{connect, installations, two_clusters_with, wait_for, wait_for_within};
use workload::Workload;

/// A migration under load and kills on a busy machine.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(240);

const WRITERS: u64 = 3;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_random_database_arrives_whole_whatever_is_killed() {
    let seeds: Vec<u64> = match from_environment("RANDOM_SEED") {
        Some(seed) => vec![seed],
        None => (0..from_environment("RANDOM_SEEDS").unwrap_or(2)).map(|_| u64::from(rand::random::<u32>())).collect(),
    };
    let newer = installations().pair().is_some_and(|(source, _)| source.major >= 13);
    let settings = |options: ClusterOptions| {
        options.setting("max_prepared_transactions", "10").setting("max_replication_slots", "20")
    };
    // Most transactions with large values are sent while they run.
    let streaming = |options: ClusterOptions| {
        if newer { settings(options).setting("logical_decoding_work_mem", "64kB") } else { settings(options) }
    };
    let (mut source, mut target) = two_clusters_with(streaming, settings);
    let servers = able(&source, &target).await;
    for (number, seed) in seeds.iter().enumerate() {
        println!("RANDOM_SEED={seed} ({} of {})", number + 1, seeds.len());
        one(&mut source, &mut target, &servers, *seed).await;
    }
}

/// What both can do that not every server can.
async fn able(source: &Cluster, target: &Cluster) -> Servers {
    let (from, to) = (connect(source, "postgres").await, connect(target, "postgres").await);
    let extensions = async |client: &tokio_postgres::Client| -> Vec<String> {
        let rows = client.query("SELECT name::text FROM pg_available_extensions ORDER BY 1", &[]).await;
        rows.expect("listed").iter().map(|row| row.get(0)).collect()
    };
    let (mut here, there) = (extensions(&from).await, extensions(&to).await);
    here.retain(|name| there.contains(name));
    let xml = "SELECT '<a/>'::xml";
    let xml = from.batch_execute(xml).await.is_ok() && to.batch_execute(xml).await.is_ok();
    Servers { source_major: source.major(), extensions: here, xml }
}

/// One database from the first table to the comparison.
async fn one(source: &mut Cluster, target: &mut Cluster, servers: &Servers, seed: u64) {
    let mut dice = StdRng::seed_from_u64(seed);
    let database = format!("seed_{seed}");
    let (tables, sql) = schema::tables(&mut dice, servers);
    let ddl = dice.random_ratio(1, 3);
    connect(source, "postgres").await.batch_execute(&format!("CREATE DATABASE {database}")).await.expect("made");
    let client = connect(source, &database).await;
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    drop(client);
    let workload = Arc::new(Workload {
        tables,
        ddl,
        config: source.config(&database),
        stop: AtomicBool::new(false),
        committed: AtomicU64::new(0),
    });
    let writers: Vec<_> =
        (0..WRITERS).map(|number| tokio::spawn(workload::write(workload.clone(), seed, number))).collect();
    wait_for("something to copy", || async { workload.committed.load(Ordering::Relaxed) > 100 }).await;

    let options = DaemonOptions::default();
    let options = if ddl { options.section("migration", "ddl = \"apply\"") } else { options };
    let mut daemon = Daemon::start(source, target, options);
    let name = format!("move-{seed}");
    daemon.must(&["migration", "create", &name, "--database", &database, "--option", "migrate"]);
    for _ in 0..dice.random_range(3..8) {
        tokio::time::sleep(Duration::from_millis(dice.random_range(100..1500))).await;
        match dice.random_range(0..4) {
            0 | 1 => daemon.restart(),
            2 => source.restart(Stop::Immediate).expect("the source comes back"),
            _ => target.restart(Stop::Immediate).expect("the target comes back"),
        }
        // An application without a server is no load.
        let more = workload.committed.load(Ordering::Relaxed) + dice.random_range(10..150);
        wait_for("the writers to go on", || async { workload.committed.load(Ordering::Relaxed) > more }).await;
    }
    workload.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("no panic");
    }
    workload::end_prepared(&connect(source, &database).await, "%").await.expect("ended");
    wait_for_within(MIGRATION_PATIENCE, "the migration to be ready", || async {
        let state = state(&daemon, &name);
        assert!(!state.contains("Fail"), "{state}\n{sql}");
        state == "WaitingForCutoverTrigger"
    })
    .await;
    let (from, to) = (connect(source, &database).await, connect(target, &database).await);
    let mut differences = Vec::new();
    // What was committed last may still be on its way, behind a wait for a server that was killed; nothing more comes.
    let deadline = Instant::now() + MIGRATION_PATIENCE;
    while Instant::now() < deadline {
        // A table that goes while it is read is the last change of a definition on its way.
        let found = compare::differences(&from, &to).await;
        differences = found.unwrap_or_else(|error| vec![format!("they cannot be read: {error:?}")]);
        // Sequences are set by a cutover.
        differences.retain(|difference| !difference.starts_with("sequence"));
        if differences.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(differences, Vec::<String>::new(), "\n{}\n{sql}", state(&daemon, &name));
    drop((from, to));
    // What the program finds by itself, definitions included.
    let mut report = serde_json::Value::Null;
    wait_for("a verification that no restart of the engine interrupts", || {
        let output = daemon.command(&["migration", "verify", &name, "--output", "json"]);
        report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        std::future::ready(report["differences"].is_u64())
    })
    .await;
    assert_eq!(report["differences"], serde_json::json!(0), "{report}\n{sql}");
    println!("  {} transactions, equal", workload.committed.load(Ordering::Relaxed));
    // An engine that has just noticed that its connection was killed with the target takes no orders.
    wait_for("the cancel", || {
        let cancelled = daemon.command(&["migration", "cancel", &name]).status.success();
        std::future::ready(cancelled || state(&daemon, &name) == "Cancelled")
    })
    .await;
    daemon.kill();
    for (cluster, database) in [(&*source, &database), (&*target, &database)] {
        let admin = connect(cluster, "postgres").await;
        let drop = format!("DROP DATABASE {database}");
        wait_for("nobody in the database", || async { admin.batch_execute(&drop).await.is_ok() }).await;
    }
}

fn state(daemon: &Daemon, name: &str) -> String {
    let output = daemon.command(&["migration", "show", name, "--output", "json"]);
    let Ok(view) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else { return "no answer".to_owned() };
    let substate = view["substate"].as_str().unwrap_or("?").to_owned();
    if view["error"].is_null() { substate } else { format!("{substate}: {}", view["error"]) }
}
