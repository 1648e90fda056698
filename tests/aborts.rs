//! A cutover, a rollback or a dry run that does not switch leaves both servers as they were, whichever step it ended at:
//! everything that dumps and catalogues show of them is compared, before and after.
//!
//! What may stay is in one schema, `pgcutover`, with the rows that say how each attempt ended; its tables are compared too,
//! from the first attempt on. A target's sequences may stand where the source's stood, which no dump of definitions shows.

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use pgcutover::cutover::steps::{ALL_FAILPOINTS, ROLLBACK_FAILPOINTS};
use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::shop::SHOP;
use support::world::{COMPLETED, NAME, READY, World};
use support::{PATIENCE, connect, connect_with, shop, wait_for};

/// What the engine does for the way back, before anything is fenced.
const RETURN_FAILPOINTS: [&str; 3] = ["return.after_publication", "return.after_slot", "return.after_prepared"];

/// Objects of the whole server, one line each. Positions of slots move by themselves.
const OF_THE_SERVER: &str = "
    SELECT format('database %s %s %s %s %s', datname, datdba::regrole, datallowconn, datconnlimit, datacl) FROM pg_database
    UNION ALL SELECT format('setting %s %s %s', setdatabase, setrole, setconfig) FROM pg_db_role_setting
    UNION ALL SELECT format('slot %s %s %s %s', slot_name, plugin, database, temporary) FROM pg_replication_slots
    UNION ALL SELECT format('subscription %s', subname) FROM pg_subscription
    UNION ALL SELECT format('origin %s', roname) FROM pg_replication_origin
    UNION ALL SELECT format('prepared transaction %s', gid) FROM pg_prepared_xacts
    UNION ALL SELECT format('configured %s %s', name, setting) FROM pg_file_settings
    UNION ALL SELECT format('session of the cutover: %s', application_name) FROM pg_stat_activity
              WHERE application_name ~ '^pgcutover/.*/(cutover|return|drift|unstreamed)'
    UNION ALL SELECT format('lock %s %s', mode, relation) FROM pg_locks
              WHERE granted AND mode IN ('ExclusiveLock', 'AccessExclusiveLock') AND locktype = 'relation'
    UNION ALL SELECT format('advisory lock %s', objid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2
              AND pid IN (SELECT pid FROM pg_stat_activity WHERE application_name ~ '/cutover')
    ORDER BY 1";

/// Objects of one database that a dump without our schema leaves out.
const OF_THE_DATABASE: &str = "
    SELECT format('published %s %s.%s', pubname, schemaname, tablename) FROM pg_publication_tables
    UNION ALL SELECT format('publication %s %s %s %s', pubname, pubinsert, pubupdate, pubdelete) FROM pg_publication
    UNION ALL SELECT format('event trigger %s %s', evtname, evtenabled) FROM pg_event_trigger
    UNION ALL SELECT format('ours: %s', oid::regclass) FROM pg_class
              WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'pgcutover') AND relkind = 'r'
    ORDER BY 1";

/// At every step of a cutover, of a dry run, and then of a rollback.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_does_not_switch_leaves_both_servers_as_they_were() {
    let mut world = World::begin(0.01).await;
    let admin = connect(&world.source, "postgres").await;
    admin
        .batch_execute(
            "CREATE ROLE writer; ALTER ROLE writer SET default_transaction_read_only = off;
             CREATE ROLE reader; ALTER ROLE reader IN DATABASE shop SET default_transaction_read_only = on;
             ALTER DATABASE shop SET work_mem = '5MB'; ALTER DATABASE shop CONNECTION LIMIT 77",
        )
        .await
        .expect("a superuser may");
    let application = world.application(6);
    world.migrate().await;

    // The first attempt makes the tables of our own that stay.
    abort_at(&mut world, "cutover", READY, "prepare.before_fence").await;
    let before = Both::settled(&world, Entered::Both).await;
    for name in ALL_FAILPOINTS.iter().filter(|name| is_before_the_decision(name)).chain(&RETURN_FAILPOINTS) {
        abort_at(&mut world, "cutover", READY, name).await;
        before.must_be_found_again(&world, name).await;
        world.wait_for_writes(&application, 10).await;
    }

    world.daemon.restart_with("");
    world.wait_until(READY).await;
    world.wait_for_writes(&application, 10).await;
    let rehearse = || world.daemon.json(&["migration", "cutover", NAME, "--dry-run"]);
    let mut report = rehearse();
    // A short pause may fall between the clients' transactions.
    let begun = Instant::now();
    while report["sessions_held"] == 0 && begun.elapsed() < PATIENCE {
        report = rehearse();
    }
    assert_eq!(report["outcome"], "dry-run", "{report}");
    must_say_what_it_would_do(&report);
    before.must_be_found_again(&world, "a dry run").await;

    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    // The source is shut, and only its catalogues of the whole server can be read.
    let before = Both::settled(&world, Entered::Target).await;
    let steps = ALL_FAILPOINTS.iter().filter(|name| is_before_the_decision(name)).chain(ROLLBACK_FAILPOINTS);
    for name in steps.chain(&RETURN_FAILPOINTS).filter(|name| !name.starts_with("switch.")) {
        abort_at(&mut world, "rollback", COMPLETED, name).await;
        before.must_be_found_again(&world, name).await;
        world.wait_for_writes(&application, 10).await;
    }
    let outcomes = application.finish().await;
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
}

/// What only a rehearsal finds out can be asked for afterwards, with whose it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_kept_a_rehearsal_from_moving_every_session_can_be_found_out() {
    let world = World::begin(0.01).await;
    world.migrate().await;
    let mut config = world.daemon.client(SHOP);
    let client = connect_with(config.application_name("report")).await;
    client.batch_execute("CREATE TEMP TABLE mine (id int)").await.expect("anybody may");
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("answers").get(0);
    let answer = world.daemon.command(&["migration", "cutover", NAME, "--dry-run", "--output", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap_or_default();
    assert_eq!(report["outcome"], "aborted", "{report}");
    let named = report["blockers"][0].as_str().expect("one");
    assert!(named.starts_with(&format!("pid {pid} (\"report\")")) && named.contains("cannot be moved"), "{report}");
    let listed = world.daemon.json(&["show", "blockers"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(
        (&listed[0]["pid"], &listed[0]["user"]),
        (&serde_json::json!(pid), &serde_json::json!("postgres")),
        "{listed}"
    );
    assert!(listed[0]["client"].is_string(), "{listed}");
    client.batch_execute("DROP TABLE mine").await.expect("its own");
    wait_for("nobody to be listed", || async { world.daemon.json(&["show", "blockers"]) == serde_json::json!([]) })
        .await;
}

/// The report of a dry run under load with a hard fence, as a superuser.
fn must_say_what_it_would_do(report: &serde_json::Value) {
    let would: Vec<(String, String)> = report["would"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| {
            let word = |key: &str| one[key].as_str().expect("a word").to_owned();
            (word("action"), word("detail"))
        })
        .collect();
    for (action, detail) in [
        ("move-sessions", "6 sessions from the source to the target"),
        ("make-way-back", "a publication and a replication slot in each database of the target"),
        ("change-setting", "ALTER DATABASE \"shop\" SET default_transaction_read_only = on (now not set)"),
        (
            "change-setting",
            "ALTER ROLE \"writer\" IN DATABASE \"shop\" SET default_transaction_read_only = on (now not set)",
        ),
        (
            "shut-database",
            "ALTER DATABASE \"shop\" ALLOW_CONNECTIONS false (now ALLOW_CONNECTIONS true CONNECTION LIMIT 77)",
        ),
    ] {
        assert!(would.contains(&(action.to_owned(), detail.to_owned())), "{action} {detail} is not in {would:#?}");
    }
    for action in ["set-sequences", "lock-tables"] {
        let found = would.iter().find(|(known, _)| known == action);
        assert!(
            found.is_some_and(|(_, detail)| detail.starts_with(|first: char| first.is_ascii_digit())),
            "{would:#?}"
        );
    }
    assert!(!would.iter().any(|(action, _)| action == "end-session"), "nobody bypasses the proxy: {would:#?}");
    // What the clients felt of it: they write without a break, so some of them waited.
    let (held, longest) = (report["sessions_held"].as_u64(), report["longest_hold_ms"].as_f64());
    assert!(held.is_some_and(|held| (1..=6).contains(&held)), "{report}");
    let pause = report["pause_ms"].as_f64().expect("a number");
    assert!(longest.is_some_and(|longest| longest > 0.0 && longest <= pause + 1.0), "{report}");
}

/// Orders it with a daemon whose step fails. What an abort itself passes is passed by one that is late.
async fn abort_at(world: &mut World, order: &str, state: &str, name: &str) {
    let failpoints = match name.strip_prefix("abort.") {
        Some(_) => format!("decide.before_decision=error;{name}=error"),
        None => format!("{name}=error"),
    };
    world.daemon.restart_with(&failpoints);
    world.wait_until(state).await;
    let answer = world.daemon.command(&["migration", order, NAME, "--output", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap_or_default();
    assert_eq!(report["outcome"], "aborted", "{order} {name}: {report} {}", String::from_utf8_lossy(&answer.stderr));
    assert!(report["reason"].as_str().is_some_and(|reason| reason.contains("failpoint")), "{order} {name}: {report}");
    world.wait_until(state).await;
}

fn is_before_the_decision(name: &str) -> bool {
    !name.starts_with("switch.") && name != "decide.after_decision"
}

/// Whose database lets us in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Entered {
    Both,
    Target,
}

/// What the two servers are, by name of what was looked at.
#[derive(Debug, PartialEq)]
struct Both {
    entered: Entered,
    seen: Vec<(String, String)>,
}

impl Both {
    /// What stays the same when it is looked at twice: whatever the step before left to be put away has gone.
    async fn settled(world: &World, entered: Entered) -> Self {
        let begun = Instant::now();
        let mut last = Err("nothing was read yet".to_owned());
        loop {
            let now = Self::of(world, entered).await;
            match (last, now) {
                (Ok(last), Ok(now)) if last == now => return now,
                (_, now) => {
                    assert!(begun.elapsed() < PATIENCE, "the servers do not come to rest: {now:#?}");
                    last = now;
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// An error where something was dropped while it was read.
    async fn of(world: &World, entered: Entered) -> Result<Self, String> {
        let mut seen = Vec::new();
        for cluster in [&world.source, &world.target] {
            let server = lines(cluster, "postgres", OF_THE_SERVER).await?;
            seen.push((format!("{} server", cluster.name()), server));
            seen.push((format!("{} globals", cluster.name()), dump(cluster, "pg_dumpall", &["--globals-only"])?));
            let shut = matches!(entered, Entered::Target) && cluster.port() == world.source.port();
            for database in ["postgres", SHOP].into_iter().filter(|database| *database != SHOP || !shut) {
                let dumped = dump(cluster, "pg_dump", &["--schema-only", "-N", "pgcutover", database])?;
                seen.push((format!("{} dump of {database}", cluster.name()), dumped));
                let found = lines(cluster, database, OF_THE_DATABASE).await?;
                seen.push((format!("{} objects of {database}", cluster.name()), found));
            }
        }
        Ok(Self { entered, seen })
    }

    /// Some of it is put back after the order has been answered.
    async fn must_be_found_again(&self, world: &World, after: &str) {
        wait_for(&format!("both servers to be as before {after}"), || async {
            let now = match Self::of(world, self.entered).await {
                Ok(now) => now,
                Err(error) => {
                    println!("after {after}: {error}");
                    return false;
                }
            };
            let changed: Vec<String> =
                self.seen.iter().zip(&now.seen).filter(|(then, now)| then != now).map(differences).collect();
            for change in &changed {
                println!("after {after}: {change}");
            }
            changed.is_empty()
        })
        .await;
    }
}

/// Lines that only one of the two has.
fn differences((then, now): (&(String, String), &(String, String))) -> String {
    let only = |a: &str, b: &str, sign: &str| -> String {
        a.lines()
            .filter(|line| !b.lines().any(|other| other == *line))
            .map(|line| format!("\n  {sign} {line}"))
            .collect()
    };
    format!("{}{}{}", then.0, only(&then.1, &now.1, "-"), only(&now.1, &then.1, "+"))
}

async fn lines(cluster: &Cluster, database: &str, query: &str) -> Result<String, String> {
    let client = connect(cluster, database).await;
    let rows = client.query(query, &[]).await.map_err(|error| format!("{database}: {error:?}"))?;
    Ok(rows.iter().map(|row| row.get::<_, String>(0) + "\n").collect())
}

/// A dump without the key that newer programs put into each of their own.
fn dump(cluster: &Cluster, program: &str, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(cluster.bindir().join(program));
    command.args(["-h", cluster.host(), "-p", &cluster.port().to_string(), "-U", "postgres"]).args(arguments);
    let done = command.output().expect("the program can be run");
    if !done.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&done.stderr)));
    }
    let text = String::from_utf8(done.stdout).expect("UTF-8");
    let kept = text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
    Ok(kept.collect::<Vec<_>>().join("\n"))
}
