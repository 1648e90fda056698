//! Premigration validation, on real servers: each rule finds what it is for, and a sound source passes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "the copy's tests use the rest of it")]
#[path = "support/rig.rs"]
mod rig;
mod support;

use std::collections::BTreeMap;

use pgcutover::config::{Config, FencePolicy, WithoutIdentity};
use pgcutover::migration::preflight::{self, Mode, Outcome, Preflight, RuleResult};
use pgcutover::postgres::Connector;
use rig::{DATABASE, Rig};

async fn validate(
    rig: &Rig,
    source: &Connector,
    config: &Config,
    overwrite_target: bool,
) -> BTreeMap<String, RuleResult> {
    let preflight = Preflight {
        source,
        target: &rig.target,
        databases: &[DATABASE.to_owned()],
        config,
        mode: Mode::Online,
        overwrite_target,
    };
    let results = preflight::validate(&preflight).await;
    for result in &results {
        let mended = result.outcome == Outcome::Succeeded || !result.fix.is_empty();
        assert!(mended && !result.why.is_empty(), "a rule says why, and what to do: {result:?}");
    }
    results.into_iter().map(|result| (result.code.clone(), result)).collect()
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
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_finds_what_it_is_for() {
    let rig = Rig::start_with(
        |source| {
            source.setting("max_replication_slots", "0").setting("wal_level", "replica").setting("max_wal_senders", "0")
        },
        |target| target,
    );
    rig.make_source(
        "CREATE TABLE keyed (id int PRIMARY KEY); CREATE TABLE bare (id int);
         CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
         SELECT lo_from_bytea(4711, 'x');
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER always BEFORE INSERT ON keyed FOR EACH ROW EXECUTE PROCEDURE f();
         ALTER TABLE keyed ENABLE ALWAYS TRIGGER always;
         CREATE POLICY p ON keyed USING (false); ALTER TABLE keyed ENABLE ROW LEVEL SECURITY;
         CREATE ROLE limited LOGIN; CREATE ROLE stubborn LOGIN; ALTER ROLE stubborn SET default_transaction_read_only = off;
         ALTER ROLE stubborn SET default_transaction_isolation = 'serializable';
         CREATE PUBLICATION theirs FOR TABLE keyed;",
    )
    .await;
    let there = support::connect(&rig.target_cluster, "postgres").await;
    there
        .batch_execute(&format!(
            "CREATE DATABASE \"{}\" TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'",
            DATABASE.replace('"', "\"\"")
        ))
        .await
        .unwrap();
    support::connect(&rig.target_cluster, DATABASE)
        .await
        .batch_execute("CREATE TABLE left_over (id int)")
        .await
        .unwrap();
    let mut config = rig.whole.clone();
    config.migration.without_identity = WithoutIdentity::Refuse;
    config.control.fence = FencePolicy::Soft;
    config.cutover.max_unstreamed_bytes = 1;
    let results = validate(&rig, &rig.source, &config, false).await;
    for (code, evidence) in [
        ("wal_level", "replica"),
        ("replication_slots", "0 free"),
        ("wal_senders", "0 free"),
        ("large_objects", "1 large objects"),
        ("unlogged_tables", "unlogged"),
        ("always_triggers", "trigger always on public.keyed"),
        ("replica_identity", "bare"),
        ("target_empty", "public.left_over"),
        ("encoding", "SQL_ASCII"),
        ("fence_settings", "role stubborn"),
    ] {
        let result = &results[code];
        assert_eq!(result.outcome, Outcome::Failed, "{result:#?}");
        assert!(result.evidence.iter().any(|found| found.contains(evidence)), "{result:#?}");
    }
    assert_eq!(results["publications"].outcome, Outcome::Warning);
    assert_eq!(results["publications"].evidence, ["theirs"]);
    assert_eq!(validate(&rig, &rig.source, &config, true).await["target_empty"].outcome, Outcome::Warning);

    // With the rights of an ordinary role.
    let mut limited = rig.whole.source.clone();
    limited.user = "limited".to_owned();
    let limited = Connector::new(&limited, "source", rig.source.instance()).unwrap();
    let results = validate(&rig, &limited, &config, false).await;
    for code in
        ["row_security", "unreadable_tables", "unreadable_large_objects", "table_ownership", "replication_right"]
    {
        assert_eq!(results[code].outcome, Outcome::Failed, "{:#?}", results[code]);
    }
    for code in ["password_verifiers", "source_signal"] {
        assert_eq!(results[code].outcome, Outcome::Warning, "{:#?}", results[code]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_reached_is_a_failed_rule() {
    let rig = Rig::start();
    let mut nowhere = rig.whole.source.clone();
    nowhere.user = "nobody at all".to_owned();
    let nowhere = Connector::new(&nowhere, "source", rig.source.instance()).unwrap();
    let results = validate(&rig, &nowhere, &rig.whole, false).await;
    assert_eq!(results["connect_source"].outcome, Outcome::Failed);
    assert_eq!(results["connect_target"].outcome, Outcome::Succeeded);
    assert!(!preflight::may_proceed(&results.into_values().collect::<Vec<_>>()));
}

/// For each rule: what makes it speak, what it must then name, and the fix after which it is silent.
const MENDED: &[(&str, &str, &str, &str)] = &[
    (
        "wraparound",
        "UPDATE pg_database SET datfrozenxid = '2694967296' WHERE datname = current_database()",
        "of 2147483648",
        "VACUUM (FREEZE)",
    ),
    (
        "scheduled_jobs",
        "CREATE SCHEMA cron; CREATE TABLE cron.job (jobid int PRIMARY KEY, active boolean); INSERT INTO cron.job VALUES (1, true)",
        "1 active jobs",
        "DELETE FROM cron.job",
    ),
    (
        "index_search_path",
        "CREATE FUNCTION keyed_by(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1; END';
         CREATE INDEX by_function ON t (keyed_by(id))",
        "by_function calls public.keyed_by(integer)",
        "ALTER FUNCTION keyed_by(int) SET search_path = public",
    ),
    (
        "catalogue_grants",
        "CREATE ROLE curious; GRANT SELECT ON pg_authid TO curious",
        "SELECT to curious on pg_authid",
        "REVOKE SELECT ON pg_authid FROM curious",
    ),
    (
        "c_functions",
        "CREATE FUNCTION in_c() RETURNS language_handler LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_call_handler'",
        "public.in_c() in $libdir/plpgsql",
        "DROP FUNCTION in_c()",
    ),
    (
        "text_only_types",
        "CREATE TYPE shown; CREATE FUNCTION shown_in(cstring) RETURNS shown LANGUAGE internal IMMUTABLE STRICT AS 'textin';
         CREATE FUNCTION shown_out(shown) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
         CREATE TYPE shown (INPUT = shown_in, OUTPUT = shown_out, LIKE = text);
         CREATE TABLE has_shown (id int PRIMARY KEY, s shown)",
        "public.has_shown.s is public.shown",
        "ALTER TABLE has_shown ALTER s TYPE text USING NULL",
    ),
    (
        "object_numbers",
        "CREATE TABLE has_numbers (id int PRIMARY KEY, c regclass)",
        "public.has_numbers.c is regclass",
        "ALTER TABLE has_numbers ALTER c TYPE text",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_fix_that_is_followed_makes_its_rule_silent() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let client = support::connect(&rig.source_cluster, DATABASE).await;
    let before = validate(&rig, &rig.source, &rig.whole, false).await;
    for (code, make, ..) in MENDED {
        assert_eq!(before[*code].outcome, Outcome::Succeeded, "{:#?}", before[*code]);
        client.batch_execute(make).await.unwrap_or_else(|error| panic!("{code}: {error:?}"));
    }
    let spoken = validate(&rig, &rig.source, &rig.whole, false).await;
    for (code, _, named, fix) in MENDED {
        let result = &spoken[*code];
        assert_eq!(result.outcome, Outcome::Warning, "{result:#?}");
        assert!(result.evidence.iter().any(|found| found.contains(named)), "{result:#?}");
        client.batch_execute(fix).await.unwrap_or_else(|error| panic!("{code}: {error:?}"));
    }
    let after = validate(&rig, &rig.source, &rig.whole, false).await;
    for (code, ..) in MENDED {
        assert_eq!(after[*code].outcome, Outcome::Succeeded, "{:#?}", after[*code]);
    }
}
