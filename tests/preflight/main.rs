//! Premigration validation, on real servers: every rule is made to fail, names what it found, and is silent once its own
//! fix was followed.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod builds;
mod lines;
#[expect(dead_code, reason = "the copy's tests use the rest of it")]
#[path = "../support/rig.rs"]
mod rig;
#[path = "../support/mod.rs"]
mod support;
mod trust;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lines::{At, GUARDED, LINES, Line, Mend, OTHERS, RIGHTS, SETTINGS};
use pgcutover::catalog::journal::Side;
use pgcutover::config::{Config, FencePolicy, Migration, ServerKind, WithoutIdentity};
use pgcutover::demo::cluster::{Cluster, Installation, Stop};
use pgcutover::migration::preflight::{self, Apply, Mode, Outcome, Preflight, RuleResult, Statement};
use pgcutover::postgres::Connector;
use rig::{DATABASE, Rig};
use tokio_postgres::Client;

type Results = BTreeMap<String, RuleResult>;

async fn validate(rig: &Rig, source: &Connector, config: &Config, overwrite_target: bool) -> Results {
    between(source, &rig.target, config, overwrite_target).await
}

async fn between(source: &Connector, target: &Connector, config: &Config, overwrite_target: bool) -> Results {
    let databases = [DATABASE.to_owned()];
    let mode = Mode::Online;
    answers(&Preflight { source, target, databases: &databases, config, mode, overwrite_target, slots: &[] }).await
}

fn logged_in_as(server: &pgcutover::config::Server, user: &str, label: &str, rig: &Rig) -> Connector {
    let mut server = server.clone();
    server.user = user.to_owned();
    Connector::new(&server, label, rig.source.instance()).unwrap()
}

async fn answers(preflight: &Preflight<'_>) -> Results {
    let results = preflight::validate(preflight).await;
    for result in &results {
        let mended = result.outcome == Outcome::Succeeded || !result.fix.is_empty();
        assert!(mended && !result.why.is_empty(), "a rule says why, and what to do: {result:?}");
        let rule = preflight::rules().find(|rule| rule.code == result.code).expect("a rule of the list");
        assert!(result.outcome <= rule.worst, "worse than documented: {result:?}");
        let by_hand = rule.apply == Apply::ByHand;
        assert!(!by_hand || result.statements.is_empty(), "said to be mended by hand: {result:?}");
    }
    results.into_iter().map(|result| (result.code.clone(), result)).collect()
}

fn found(results: &Results, code: &str, evidence: &str) {
    let result = &results[code];
    assert_ne!(result.outcome, Outcome::Succeeded, "{result:#?}");
    assert!(result.evidence.iter().any(|item| item.contains(evidence)), "{evidence}: {result:#?}");
}

fn silent(results: &Results, code: &str) {
    assert_eq!(results[code].outcome, Outcome::Succeeded, "{:#?}", results[code]);
}

/// Runs what a rule names, as a superuser.
async fn obey(rig: &Rig, statements: &[Statement]) {
    assert!(!statements.is_empty(), "it names no statement");
    for statement in statements {
        let cluster = match statement.server {
            Side::Source => &rig.source_cluster,
            Side::Target => &rig.target_cluster,
        };
        let client = support::connect(cluster, &statement.database).await;
        client.batch_execute(&statement.sql).await.unwrap_or_else(|error| panic!("{statement:?}: {error:?}"));
    }
}

fn newest_pair() -> (Installation, Installation) {
    let found = support::installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    (newest.clone(), newest.clone())
}

/// Reads files and hashes of no database: a list in one place, and the code in another.
#[test]
fn every_rule_has_a_line() {
    let rules: BTreeSet<&str> = preflight::rules().map(|rule| rule.code).collect();
    let tested: Vec<&str> = LINES
        .iter()
        .map(|line| line.code)
        .chain(RIGHTS.iter().map(|(code, _)| *code))
        .chain(SETTINGS.iter().map(|(code, ..)| *code))
        .chain(OTHERS.iter().copied())
        .collect();
    let once: BTreeSet<&str> = tested.iter().copied().collect();
    assert_eq!(once.len(), tested.len(), "a rule has two lines");
    assert_eq!(once, rules);
    let source = concat!(include_str!("main.rs"), include_str!("trust.rs"));
    for code in OTHERS {
        assert!(source.contains(&format!("\"{code}\"")), "{code} is tested nowhere");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_source_passes() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    let bad: Vec<_> = results.values().filter(|result| result.outcome != Outcome::Succeeded).collect();
    // What an old source or an old pg_dump cannot help.
    let told = ["truncate", "pg_dump"];
    assert!(bad.iter().all(|result| told.contains(&result.code.as_str())), "{bad:#?}");
    let missing: Vec<&str> =
        preflight::rules().map(|rule| rule.code).filter(|code| !results.contains_key(*code)).collect();
    assert_eq!(missing, [""; 0], "every rule answers");
    assert_eq!(results["truncate"].outcome == Outcome::Warning, rig.source_cluster.major() < 11);
}

/// Of the second rule a target that is as old as the source makes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_does_not_know_is_named() {
    let rig = Rig::start();
    let with_children = (12..16).contains(&rig.source_cluster.major());
    rig.make_source(
        "CREATE TABLE whole (a int NOT NULL, b int) PARTITION BY LIST (b);
         CREATE TABLE part (a int NOT NULL GENERATED BY DEFAULT AS IDENTITY, b int);
         ALTER TABLE whole ATTACH PARTITION part FOR VALUES IN (1);
         CREATE TABLE named (id int PRIMARY KEY, \"system_user\" text);
         CREATE COLLATION of_icu FROM \"POSIX\"; UPDATE pg_collation SET collprovider = 'i' WHERE collname = 'of_icu'",
    )
    .await;
    if with_children {
        rig.on_source(
            "CREATE TABLE plain (a int PRIMARY KEY, b int);
             CREATE TABLE child (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a) STORED) INHERITS (plain)",
        )
        .await;
    }
    let target = support::connect(&rig.target_cluster, "postgres").await;
    target.batch_execute("DELETE FROM pg_collation WHERE collname = 'und-x-icu'").await.unwrap();
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    let features = &results["build_features"];
    assert_eq!(features.outcome, Outcome::Failed, "{features:?}");
    assert!(features.evidence.contains(&"collation public.of_icu is of ICU".to_owned()), "{features:?}");
    let identities = &results["identity_columns"];
    let refused = (10..17).contains(&rig.source_cluster.major()) && rig.target_cluster.major() >= 17;
    assert_eq!(identities.evidence, if refused { vec!["public.part.a"] } else { Vec::new() });
    let children = &results["generated_children"];
    let refused = with_children && rig.target_cluster.major() >= 16;
    assert_eq!(children.outcome, if refused { Outcome::Failed } else { Outcome::Succeeded }, "{children:?}");
    assert_eq!(children.evidence, if refused { vec!["public.child.b"] } else { Vec::new() });
    let words = &results["reserved_words"];
    let reserved = rig.source_cluster.major() < 16 && rig.target_cluster.major() >= 16;
    assert_eq!(words.evidence, if reserved { vec!["public.named.system_user"] } else { Vec::new() });
    // What the fixes say.
    rig.on_source("ALTER TABLE named RENAME \"system_user\" TO \"who\"").await;
    if !identities.statements.is_empty() {
        obey(&rig, &identities.statements).await;
    }
    if with_children {
        rig.on_source("ALTER TABLE child NO INHERIT plain").await;
    }
    rig.on_source("DROP COLLATION of_icu").await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    for code in ["identity_columns", "generated_children", "build_features", "reserved_words"] {
        silent(&results, code);
    }
}

async fn run(client: &Client, cluster: &Cluster, statements: &[&str]) {
    for sql in statements {
        let sql = sql.replace("{home}", &cluster.socket_dir().display().to_string());
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

/// Every line is broken, then every line is mended.
async fn broken_and_mended(majors: (&Installation, &Installation)) {
    let rig = Rig::of(support::two_clusters_of(majors, |options| options, |options| options));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let source = support::connect(&rig.source_cluster, DATABASE).await;
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let side = |at| match at {
        At::Source => (&source, &rig.source_cluster),
        At::Target => (&target, &rig.target_cluster),
    };
    let major = rig.source_cluster.major();
    // Where the two are of one major, the target knows whatever the source does.
    let apart = major < rig.target_cluster.major();
    let lines: Vec<&Line> = LINES
        .iter()
        .filter(|line| (line.majors.0..=line.majors.1).contains(&major))
        .filter(|line| apart || line.code != "unknown_settings")
        .collect();
    let before = validate(&rig, &rig.source, &rig.whole, false).await;
    for line in &lines {
        silent(&before, line.code);
        let (client, cluster) = side(line.at);
        run(client, cluster, line.breaks).await;
    }
    let spoken = validate(&rig, &rig.source, &rig.whole, false).await;
    for line in &lines {
        found(&spoken, line.code, line.names);
        match line.mend {
            Mend::Printed => obey(&rig, &spoken[line.code].statements).await,
            Mend::By(at, statements) => {
                assert!(spoken[line.code].statements.is_empty(), "{} names a statement after all", line.code);
                let (client, cluster) = side(at);
                run(client, cluster, statements).await;
            }
        }
    }
    let after = validate(&rig, &rig.source, &rig.whole, false).await;
    for line in &lines {
        silent(&after, line.code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fix_that_is_followed_makes_its_rule_silent() {
    let (source, target) = newest_pair();
    broken_and_mended((&source, &target)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fix_that_is_followed_makes_its_rule_silent_on_the_oldest_source() {
    let found = support::installations();
    broken_and_mended(found.pair().expect("checked by installations()")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_missing_are_named_and_given() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    rig.on_source(GUARDED).await;
    support::connect(&rig.target_cluster, "postgres").await.batch_execute("CREATE ROLE limited LOGIN").await.unwrap();
    let before = validate(&rig, &rig.source, &rig.whole, false).await;
    let source = logged_in_as(&rig.whole.source, "limited", "source", &rig);
    let target = logged_in_as(&rig.whole.target, "limited", "target", &rig);
    let limited = between(&source, &target, &rig.whole, false).await;
    for (code, evidence) in RIGHTS {
        silent(&before, code);
        found(&limited, code, evidence);
    }
    for (code, _) in RIGHTS {
        obey(&rig, &limited[*code].statements).await;
    }
    let after = between(&source, &target, &rig.whole, false).await;
    for (code, _) in RIGHTS {
        silent(&after, code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_are_wrong_are_named_and_set() {
    let (source, target) = newest_pair();
    let major = source.major;
    let settings = |at: At| SETTINGS.iter().filter(move |line| line.1 == at && line.4 <= major);
    let set = |at| {
        move |options| {
            settings(at).fold(options, |options: pgcutover::demo::cluster::ClusterOptions, line| {
                options.setting(line.2, line.3)
            })
        }
    };
    let mut rig = Rig::of(support::two_clusters_of(
        (&source, &target),
        |options| set(At::Source)(options).setting("superuser_reserved_connections", "3"),
        |options| set(At::Target)(options).setting("max_wal_senders", "5"),
    ));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    let spoken = validate(&rig, &rig.source, &rig.whole, false).await;
    for (code, ..) in settings(At::Source).chain(settings(At::Target)) {
        found(&spoken, code, "");
        obey(&rig, &spoken[*code].statements).await;
    }
    rig.source_cluster.restart(Stop::Fast).unwrap();
    rig.target_cluster.restart(Stop::Fast).unwrap();
    let after = validate(&rig, &rig.source, &rig.whole, false).await;
    for (code, ..) in settings(At::Source).chain(settings(At::Target)) {
        silent(&after, code);
    }
    // The same on a managed service: its own words, and no ALTER SYSTEM.
    let mut managed = rig.whole.source.clone();
    managed.kind = ServerKind::AwsRds;
    let managed = Connector::new(&managed, "source", rig.source.instance()).unwrap();
    support::connect(&rig.source_cluster, "postgres")
        .await
        .batch_execute("ALTER SYSTEM RESET wal_level")
        .await
        .unwrap();
    rig.source_cluster.restart(Stop::Fast).unwrap();
    let hosted = &validate(&rig, &managed, &rig.whole, false).await["wal_level"];
    assert!(hosted.fix.contains("rds.logical_replication") && hosted.statements.is_empty(), "{hosted:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_that_may_do_less_on_the_target_are_named() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE maker CREATEROLE; CREATE ROLE chief CREATEROLE SUPERUSER",
    )
    .await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    let less = rig.source_cluster.major() < 16 && rig.target_cluster.major() >= 16;
    assert_eq!(results["role_makers"].evidence, if less { vec!["maker"] } else { Vec::new() });
}

/// Which values there are differs from major to major, and with locales and time zones.
#[tokio::test(flavor = "multi_thread")]
async fn values_that_the_target_does_not_take_are_named() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE dated; ALTER ROLE dated SET work_mem = '8MB';
         ALTER ROLE dated SET lock_timeout = '1s'; UPDATE pg_db_role_setting
            SET setconfig = '{work_mem=nonsense,lock_timeout=1s}' WHERE setrole = 'dated'::regrole",
    )
    .await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    assert_eq!(results["unknown_settings"].evidence, ["a value of work_mem"]);
    obey(&rig, &results["unknown_settings"].statements).await;
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "unknown_settings");
}

/// A list of what may be installed, as services have it.
#[tokio::test(flavor = "multi_thread")]
async fn an_extension_that_a_service_does_not_allow_is_named() {
    let (source, target) = newest_pair();
    let allow =
        |options: pgcutover::demo::cluster::ClusterOptions| options.setting("azure.extensions", "PG_TRGM,other");
    let rig = Rig::of(support::two_clusters_of((&source, &target), |options| options, allow));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "extensions");
    // Not every installation has one to create: this one is said to be there.
    let client = support::connect(&rig.target_cluster, "postgres").await;
    let other = client
        .query_opt(
            "SELECT name::text FROM pg_available_extensions WHERE name NOT IN ('plpgsql', 'pg_trgm') LIMIT 1",
            &[],
        )
        .await
        .unwrap();
    let Some(other) = other.map(|row| row.get::<_, String>(0)) else { return };
    rig.on_source(&format!("UPDATE pg_extension SET extname = '{other}' WHERE extname = 'plpgsql'")).await;
    found(&validate(&rig, &rig.source, &rig.whole, false).await, "extensions", "is not in azure.extensions");
    // What Azure begins with allows none.
    let none = "ALTER ROLE postgres SET azure.extensions = ''";
    client.batch_execute(none).await.unwrap();
    found(&validate(&rig, &rig.source, &rig.whole, false).await, "extensions", "is not in azure.extensions");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_depends_on_the_order_is_named() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    let there = support::connect(&rig.target_cluster, "postgres").await;
    let name = DATABASE.replace('"', "\"\"");
    let make =
        format!("CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'");
    there.batch_execute(&make).await.unwrap();
    let left_over = support::connect(&rig.target_cluster, DATABASE).await;
    left_over.batch_execute("CREATE TABLE left_over (id int)").await.unwrap();
    drop(left_over);
    let mut config = rig.whole.clone();
    config.migration.without_identity = WithoutIdentity::Refuse;
    config.control.fence = FencePolicy::Soft;
    config.cutover.max_unstreamed_bytes = 1;
    rig.on_source("SELECT lo_from_bytea(4711, 'x'); CREATE UNLOGGED TABLE passing (id int PRIMARY KEY); CREATE TABLE bare (id int); CREATE ROLE stubborn; ALTER ROLE stubborn SET default_transaction_read_only = off")
        .await;
    let results = validate(&rig, &rig.source, &config, false).await;
    found(&results, "target_empty", "public.left_over");
    found(&results, "encoding", "SQL_ASCII");
    // The policies that make more of it.
    for code in ["unlogged_tables", "large_objects", "replica_identity", "fence_settings", "target_empty", "encoding"] {
        assert_eq!(results[code].outcome, Outcome::Failed, "{code}");
    }
    assert_eq!(validate(&rig, &rig.source, &config, true).await["target_empty"].outcome, Outcome::Warning);
    assert_eq!(results["encoding"].statements, results["target_empty"].statements);
    obey(&rig, &results["target_empty"].statements).await;
    let results = validate(&rig, &rig.source, &config, false).await;
    silent(&results, "target_empty");
    silent(&results, "encoding");

    // An order of the operator that cannot be followed.
    let databases = ["postgres".to_owned(), "nowhere".to_owned()];
    let preflight = |overwrite_target| Preflight {
        source: &rig.source,
        target: &rig.target,
        databases: &databases,
        config: &rig.whole,
        mode: Mode::Online,
        overwrite_target,
        slots: &[],
    };
    let results = answers(&preflight(true)).await;
    found(&results, "control_database", "postgres");
    found(&results, "database_exists", "nowhere");
    silent(&answers(&preflight(false)).await, "control_database");
    support::connect(&rig.source_cluster, "postgres").await.batch_execute("CREATE DATABASE nowhere").await.unwrap();
    silent(&answers(&preflight(false)).await, "database_exists");

    // A directory without pg_dump.
    let bindir = Some(rig.source_cluster.data_dir());
    let without = Config { migration: Migration { bindir, ..rig.whole.migration.clone() }, ..rig.whole.clone() };
    let results = validate(&rig, &rig.source, &without, false).await;
    assert_eq!(results["pg_dump"].outcome, Outcome::Failed);
    assert_ne!(validate(&rig, &rig.source, &rig.whole, false).await["pg_dump"].outcome, Outcome::Failed);

    // The wrong way round.
    let other_way = Preflight { source: &rig.target, target: &rig.source, ..preflight(false) };
    if rig.source_cluster.major() < rig.target_cluster.major() {
        found(&answers(&other_way).await, "version", "source");
    }
    silent(&results, "version");
    assert_eq!(results["truncate"].outcome == Outcome::Warning, rig.source_cluster.major() < 11);

    // A transaction that is older than it may be.
    let busy = support::connect(&rig.source_cluster, DATABASE).await;
    busy.batch_execute("BEGIN; SELECT 1").await.unwrap();
    let long_transaction = Duration::ZERO;
    let strict =
        Config { migration: Migration { long_transaction, ..rig.whole.migration.clone() }, ..rig.whole.clone() };
    let results = validate(&rig, &rig.source, &strict, false).await;
    found(&results, "long_transactions", "pid ");
    obey(&rig, &results["long_transactions"].statements).await;
    support::wait_for("the transaction to be gone", || async { busy.is_closed() }).await;
    silent(&validate(&rig, &rig.source, &strict, false).await, "long_transactions");
}

/// Where nobody is a standby, whoever commits waits: so nothing is written behind the setting.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_anybody_for_its_standby_is_named() {
    let (source, target) = newest_pair();
    let rig = Rig::of(support::two_clusters_of((&source, &target), |options| options, |options| options));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    let admin = support::connect(&rig.source_cluster, "postgres").await;
    for (standbys, anybody) in [("FIRST 1 (near, \"*\")", true), ("ANY 1 (*)", true), ("near, \"*far\"", false)] {
        admin.batch_execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")).await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        support::wait_for("the configuration to be read again", || async {
            let session = support::connect(&rig.source_cluster, "postgres").await;
            let row = session.query_one("SHOW synchronous_standby_names", &[]).await.unwrap();
            row.get::<_, String>(0) == standbys
        })
        .await;
        let results = validate(&rig, &rig.source, &rig.whole, false).await;
        if anybody {
            found(&results, "sync_standbys", &format!("source: synchronous_standby_names = {standbys}"));
        } else {
            silent(&results, "sync_standbys");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_grows_beyond_what_a_slot_may_keep_is_foretold() {
    let (source, target) = newest_pair();
    let rig = Rig::of(support::two_clusters_of((&source, &target), |options| options, |options| options));
    rig.make_source(
        "CREATE TABLE t (id int, note text); INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 20000) g",
    )
    .await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    silent(&results, "forecast");
    let evidence = results["forecast"].evidence.join("\n");
    for part in ["of tables", "public.t were read", "write-ahead log: ", "a slot may keep 100GB"] {
        assert!(evidence.contains(part), "{part}: {evidence}");
    }
    // It grows while somebody writes; what a slot may keep is set to nothing.
    let writer = support::connect(&rig.source_cluster, DATABASE).await;
    let busy =
        tokio::spawn(async move { while writer.batch_execute("INSERT INTO t VALUES (1, 'more')").await.is_ok() {} });
    let max_retained_wal_bytes = Some(1);
    let narrow =
        Config { migration: Migration { max_retained_wal_bytes, ..rig.whole.migration.clone() }, ..rig.whole.clone() };
    found(&validate(&rig, &rig.source, &narrow, false).await, "forecast", "a slot may keep 1B");
    // What the fix says: more room.
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "forecast");
    busy.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_reached_or_follows_another_is_named() {
    let (source, target) = newest_pair();
    let mut rig = Rig::of(support::two_clusters_of((&source, &target), |options| options, |options| options));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    for (server, label, code, other) in [
        (&rig.whole.source, "source", "connect_source", "connect_target"),
        (&rig.whole.target, "target", "connect_target", "connect_source"),
    ] {
        let mut nowhere = server.clone();
        nowhere.user = "nobody at all".to_owned();
        let nowhere = Connector::new(&nowhere, label, rig.source.instance()).unwrap();
        let databases = [DATABASE.to_owned()];
        let (source, target) = if label == "source" { (&nowhere, &rig.target) } else { (&rig.source, &nowhere) };
        let (config, mode) = (&rig.whole, Mode::Online);
        let preflight =
            Preflight { source, target, databases: &databases, config, mode, overwrite_target: false, slots: &[] };
        let results = answers(&preflight).await;
        found(&results, code, "nobody at all");
        silent(&results, other);
        assert!(!preflight::may_proceed(&results.into_values().collect::<Vec<_>>()));
    }
    for cluster in [&mut rig.source_cluster, &mut rig.target_cluster] {
        cluster.stop(Stop::Fast).unwrap();
        let (path, text) =
            if cluster.major() >= 12 { ("standby.signal", "") } else { ("recovery.conf", "standby_mode = on\n") };
        std::fs::write(cluster.data_dir().join(path), text).unwrap();
        cluster.start_again().unwrap();
    }
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    for code in ["source_primary", "target_primary"] {
        found(&results, code, "in recovery");
        if source.major >= 12 {
            obey(&rig, &results[code].statements).await;
        }
    }
    if source.major >= 12 {
        let results = validate(&rig, &rig.source, &rig.whole, false).await;
        silent(&results, "source_primary");
        silent(&results, "target_primary");
        silent(&results, "connect_source");
    }
}
