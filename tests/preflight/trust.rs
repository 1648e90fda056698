//! What a validation must not believe, and must not run: objects of other roles under names that it looks for, and what a
//! login role that may see little is not shown.

use std::time::Duration;

use pgcutover::catalog::{Place, bootstrap};
use pgcutover::config::{Config, Migration, Server, ServerKind, SslMode};
use pgcutover::migration::late;
use pgcutover::migration::preflight::{Mode, Outcome, Preflight, Statement};
use pgcutover::postgres::Connector;

use crate::rig::{DATABASE, Rig};
use crate::{answers, between, found, logged_in_as, newest_pair, obey, silent, support, validate};

fn rig() -> Rig {
    let (source, target) = newest_pair();
    Rig::of(support::two_clusters_of((&source, &target), |options| options, |options| options))
}

/// Every one of these functions would make its owner a superuser.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_anybodys_is_run_with_the_login_roles_rights() {
    let rig = rig();
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE mallory;
         DO $$ BEGIN EXECUTE format('ALTER DATABASE %I OWNER TO mallory', current_database()); END $$;
         SET ROLE mallory;
         CREATE SCHEMA cron; CREATE SCHEMA pgcutover; CREATE SCHEMA evil;
         CREATE FUNCTION evil.rise() RETURNS bigint LANGUAGE plpgsql AS
             'BEGIN ALTER ROLE mallory SUPERUSER; RETURN 1; END';
         CREATE VIEW cron.job AS SELECT evil.rise() AS jobid, true AS active, current_database()::text AS database;
         CREATE VIEW pgcutover.part AS SELECT 'marker'::text AS name, evil.rise()::int AS version;
         CREATE VIEW pgcutover.late_definition AS SELECT 'waiting'::text AS state, 'k' AS kind WHERE evil.rise() = 1;
         CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE plpgsql AS
             'BEGIN PERFORM evil.rise(); RETURN true; END';
         CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, PROCEDURE = evil.same);
         DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = evil, pg_catalog', current_database()); END $$",
    )
    .await;
    // The database of a role that is no superuser, and the control database too.
    let mut config = rig.whole.clone();
    config.control.database = DATABASE.to_owned();
    let there = support::connect(&rig.target_cluster, "postgres").await;
    there.batch_execute(&format!("CREATE DATABASE \"{}\"", DATABASE.replace('"', "\"\""))).await.unwrap();
    let results = validate(&rig, &rig.source, &config, false).await;
    silent(&results, "scheduled_jobs");
    silent(&results, "server_parameters");
    let control = rig.source.control(DATABASE, "test").await.unwrap();
    for place in [Place::SourceDatabase, Place::SourceControl] {
        let refused = bootstrap(&control, place).await.expect_err("not ours");
        assert!(refused.to_string().contains("belongs to mallory"), "{refused}");
    }
    let refused = late::waiting(&control).await.expect_err("not ours");
    assert!(refused.to_string().contains("belongs to mallory"), "{refused}");
    let risen = "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'";
    assert!(!control.query_one(risen, &[]).await.unwrap().get::<_, bool>(0));
    // Once it is gone, ours is made. What is written there is done in our name: default privileges open it to nobody.
    control.batch_execute("DROP SCHEMA pgcutover CASCADE").await.unwrap();
    let open = "ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO mallory, PUBLIC; ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO mallory";
    control.batch_execute(open).await.unwrap();
    bootstrap(&control, Place::SourceDatabase).await.unwrap();
    let may = "SELECT has_schema_privilege('mallory', 'pgcutover', 'USAGE')";
    let may_use = async || control.query_one(may, &[]).await.unwrap().get::<_, bool>(0);
    assert!(!may_use().await);
    // What is granted later is meant.
    control.batch_execute("GRANT USAGE ON SCHEMA pgcutover TO mallory").await.unwrap();
    bootstrap(&control, Place::SourceControl).await.unwrap();
    assert!(may_use().await);
}

/// pg_cron itself is not needed: a table that belongs to an extension of its name is all that is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_read_where_pg_cron_is_installed() {
    let (source, target) = newest_pair();
    let rig = Rig::of(support::two_clusters_of(
        (&source, &target),
        |options| options.setting("cron.database_name", "jobs"),
        |options| options,
    ));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    support::connect(&rig.source_cluster, "postgres").await.batch_execute("CREATE DATABASE jobs").await.unwrap();
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "scheduled_jobs");
    let home = support::connect(&rig.source_cluster, "jobs").await;
    home.batch_execute(
        "UPDATE pg_extension SET extname = 'pg_cron' WHERE extname = 'plpgsql'; CREATE SCHEMA cron;
         CREATE TABLE cron.job (jobid int PRIMARY KEY, active boolean, database text);
         CREATE FUNCTION cron.unschedule(int) RETURNS boolean LANGUAGE sql AS 'DELETE FROM cron.job WHERE jobid = $1 RETURNING true'",
    )
    .await
    .unwrap();
    let insert = "INSERT INTO cron.job VALUES (1, true, $1), (2, false, $1), (3, true, 'another')";
    home.execute(insert, &[&DATABASE]).await.unwrap();
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "scheduled_jobs");
    home.batch_execute("ALTER EXTENSION pg_cron ADD TABLE cron.job").await.unwrap();
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    found(&results, "scheduled_jobs", "job 1, of pg_cron in database jobs");
    assert_eq!(results["scheduled_jobs"].evidence_total, 1);
    obey(&rig, &results["scheduled_jobs"].statements).await;
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "scheduled_jobs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_shown_to_the_login_role_is_not_taken_for_nothing() {
    let rig = rig();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE limited LOGIN").await;
    let limited = logged_in_as(&rig.whole.source, "limited", "source", &rig);
    let long_transaction = Duration::ZERO;
    let strict =
        Config { migration: Migration { long_transaction, ..rig.whole.migration.clone() }, ..rig.whole.clone() };
    let writer = support::connect(&rig.source_cluster, DATABASE).await;
    writer.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let results = validate(&rig, &limited, &strict, false).await;
    found(&results, "long_transactions", "could not be evaluated");
    obey(&rig, &results["long_transactions"].statements).await;
    found(&validate(&rig, &limited, &strict, false).await, "long_transactions", "pid ");
    writer.batch_execute("ROLLBACK").await.unwrap();
    silent(&validate(&rig, &limited, &strict, false).await, "long_transactions");

    // Sessions of another role that will come to the target: one more than it has room for.
    let admin = support::connect(&rig.source_cluster, "postgres").await;
    admin.batch_execute("REVOKE pg_monitor FROM limited").await.unwrap();
    let raise = "ALTER SYSTEM SET max_connections = 40";
    support::connect(&rig.target_cluster, "postgres").await.batch_execute(raise).await.unwrap();
    let mut rig = rig;
    rig.target_cluster.restart(pgcutover::demo::cluster::Stop::Fast).unwrap();
    let results = validate(&rig, &limited, &rig.whole, false).await;
    silent(&results, "target_connections");
    let numbers: Vec<usize> = results["target_connections"].evidence[0]
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect();
    let mut sessions = Vec::new();
    for _ in 0..=numbers[0] - numbers[1] + 1 {
        sessions.push(support::connect(&rig.source_cluster, DATABASE).await);
    }
    found(&validate(&rig, &limited, &rig.whole, false).await, "target_connections", "free, up to");
    drop(sessions);
    support::wait_for("room on the target again", || async {
        let results = validate(&rig, &limited, &rig.whole, false).await;
        results["target_connections"].outcome == Outcome::Succeeded
    })
    .await;
}

/// Only what this very migration uses is not counted against it.
#[tokio::test(flavor = "multi_thread")]
async fn slots_of_another_migration_are_not_free() {
    let (source, target) = newest_pair();
    let rig = Rig::of(support::two_clusters_of(
        (&source, &target),
        |options| options.setting("max_replication_slots", "1"),
        |options| options,
    ));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    rig.on_source("SELECT pg_create_logical_replication_slot('pgcutover_other', 'pgoutput')").await;
    let (databases, slots) = ([DATABASE.to_owned()], ["pgcutover_other".to_owned()]);
    let preflight = Preflight {
        source: &rig.source,
        target: &rig.target,
        databases: &databases,
        config: &rig.whole,
        mode: Mode::Online,
        overwrite_target: false,
        slots: &[],
    };
    found(&answers(&preflight).await, "replication_slots", "0 free, 1 needed");
    silent(&answers(&Preflight { slots: &slots, ..preflight }).await, "replication_slots");
    // An offline migration streams too.
    let offline = answers(&Preflight { mode: Mode::Offline, ..preflight }).await;
    found(&offline, "replication_slots", "0 free, 1 needed");
    assert!(!offline.contains_key("fence_settings"), "there will be no fence");
}

/// A fix that would do harm is not among the statements.
#[tokio::test(flavor = "multi_thread")]
async fn statements_do_no_harm() {
    let rig = rig();
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE writer; CREATE ROLE limited LOGIN;
         ALTER ROLE writer SET default_transaction_read_only = off; ALTER ROLE postgres SET statement_timeout = '1h';
         CREATE INDEX t_pkey_ccnew1 ON t (id); UPDATE pg_index SET indisvalid = false WHERE indexrelid = 't_pkey_ccnew1'::regclass;
         CREATE FUNCTION guard() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
         CREATE EVENT TRIGGER guarding ON ddl_command_start WHEN TAG IN ('CREATE PUBLICATION') EXECUTE PROCEDURE guard();
         CREATE EVENT TRIGGER dropping ON sql_drop WHEN TAG IN ('DROP PUBLICATION') EXECUTE PROCEDURE guard();
         CREATE EVENT TRIGGER apart ON sql_drop WHEN TAG IN ('DROP VIEW') EXECUTE PROCEDURE guard();
         CREATE FUNCTION fine(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1; END';
         CREATE FUNCTION sure(int) RETURNS int LANGUAGE plpgsql IMMUTABLE SET search_path = '' AS 'BEGIN RETURN $1; END';
         CREATE DOMAIN small AS int CONSTRAINT \"Is\" CHECK (fine(VALUE) < 9); CREATE TABLE checked (id int PRIMARY KEY, v int,
           CONSTRAINT odd CHECK (fine(v) > 0), CONSTRAINT sure CHECK (sure(v) > 0));
         CREATE VIEW seen AS SELECT fine(1) AS f; CREATE MATERIALIZED VIEW kept AS SELECT f, sure(f) AS s FROM seen;
         CREATE MATERIALIZED VIEW unfilled AS SELECT fine(1) AS f WITH NO DATA;
         GRANT EXECUTE ON FUNCTION pg_ls_dir(text) TO writer; GRANT SELECT (rolname) ON pg_authid TO writer",
    )
    .await;
    let generates = rig.source_cluster.major() >= 12;
    if generates {
        rig.on_source("ALTER TABLE checked ADD \"G\" int GENERATED ALWAYS AS (fine(v)) STORED").await;
    }
    let client = support::connect(&rig.target_cluster, "postgres").await;
    client.batch_execute("CREATE ROLE limited LOGIN").await.unwrap();
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    for calls in [
        "check odd of public.checked",
        "check \"Is\" of domain public.small",
        "materialized view public.kept",
        "generated column public.checked.\"G\"",
    ] {
        if generates || !calls.starts_with("generated") {
            found(&results, "index_search_path", &format!("{calls} calls public.fine(integer)"));
        }
    }
    assert_eq!(
        results["index_search_path"].evidence.len(),
        if generates { 4 } else { 3 },
        "the other is sure of its names"
    );
    let none: [Statement; 0] = [];
    // What a role brings with it is not the server's.
    silent(&results, "server_parameters");
    found(&results, "invalid_indexes", "public.t_pkey_ccnew1");
    assert!(results["invalid_indexes"].statements[0].sql.starts_with("DROP INDEX CONCURRENTLY "));
    obey(&rig, &results["invalid_indexes"].statements).await;
    found(&results, "event_triggers", "guarding on ddl_command_start");
    found(&results, "event_triggers", "dropping on sql_drop");
    assert_eq!(results["event_triggers"].evidence.len(), 2, "what fires on what is never done is no matter");
    assert_eq!(results["event_triggers"].statements, none);
    found(&results, "catalogue_grants", "EXECUTE to writer on FUNCTION pg_ls_dir(text)");
    found(&results, "catalogue_grants", "SELECT (rolname) to writer on pg_authid");
    assert_eq!(results["catalogue_grants"].outcome, Outcome::Warning, "a superuser grants the same");

    // To others they are a failure; and a service is told what it allows.
    let of_rds = |server: &Server| Server { kind: ServerKind::AwsRds, ..server.clone() };
    let source = logged_in_as(&of_rds(&rig.whole.source), "limited", "source", &rig);
    let target = logged_in_as(&of_rds(&rig.whole.target), "limited", "target", &rig);
    let limited = between(&source, &target, &rig.whole, false).await;
    assert_eq!(limited["catalogue_grants"].outcome, Outcome::Failed);
    assert_eq!(limited["replication_right"].statements[0].sql, "GRANT rds_replication TO \"limited\"");
    assert_eq!(limited["session_replication_role"].statements[0].sql, "GRANT rds_superuser TO \"limited\"");
    assert_eq!(limited["password_verifiers"].statements, none);

    obey(&rig, &results["catalogue_grants"].statements).await;
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "catalogue_grants");

    // The role writes because of its setting.
    let control = rig.source.control(DATABASE, "test").await.unwrap();
    let database = format!("ALTER DATABASE \"{}\"", DATABASE.replace('"', "\"\""));
    control.batch_execute(&format!("{database} SET default_transaction_read_only = yes")).await.unwrap();
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    found(&results, "fence_settings", "role writer, which would be read-only without it");
    assert_eq!(results["fence_settings"].statements, none);
    control.batch_execute(&format!("{database} RESET default_transaction_read_only")).await.unwrap();
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    obey(&rig, &results["fence_settings"].statements).await;
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "fence_settings");
}

/// A few megabytes are enough, wherever they are stored.
#[tokio::test(flavor = "multi_thread")]
async fn a_forecast_reads_no_more_than_its_sample() {
    let rig = rig();
    rig.make_source(
        "CREATE TABLE more_heap (id int, note text); INSERT INTO more_heap SELECT g, repeat('x', 100) FROM generate_series(1, 1000) g;
         CREATE TABLE wide (note text); ALTER TABLE wide ALTER note SET STORAGE EXTERNAL;
         INSERT INTO wide SELECT repeat('x', 100000) FROM generate_series(1, 300)",
    )
    .await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    // 30 MB are there; what is read is more than 8 MB by less than a piece, and so told in kB.
    let copy = &results["forecast"].evidence[1];
    let read = copy.split("at which ").nth(1).and_then(|rest| rest.split("kB of public.wide were read").next());
    let kilobytes: Option<u64> = read.and_then(|number| number.parse().ok());
    assert!(kilobytes.is_some_and(|read| (8192..9 * 1024).contains(&read)), "{copy}");
}

/// A library or an extension that is older there, and a server that cannot do what sslmode asks for.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_has_in_another_version_is_named() {
    let rig = rig();
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY); UPDATE pg_extension SET extversion = '99.0' WHERE extname = 'plpgsql'",
    )
    .await;
    // Not every build knows ICU.
    let direct = support::connect(&rig.source_cluster, DATABASE).await;
    let sorted = "CREATE COLLATION sorted (provider = icu, locale = 'und');
                  UPDATE pg_collation SET collversion = '0.1' WHERE collname = 'sorted'";
    let made = direct.batch_execute(sorted).await;
    let knows_icu = made.is_ok();
    if let Err(error) = made {
        assert_eq!(error.code().map(|code| code.code()), Some("0A000"), "{error:?}");
    }
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    found(&results, "extensions", "plpgsql: 99.0 on the source");
    assert_eq!(results["extensions"].outcome, Outcome::Warning, "it is there");
    if knows_icu {
        found(&results, "collations", "public.sorted: ICU is 0.1 on the source");
        rig.on_source("ALTER COLLATION sorted REFRESH VERSION").await;
    }
    rig.on_source("UPDATE pg_extension SET extversion = '1.0' WHERE extname = 'plpgsql'").await;
    let results = validate(&rig, &rig.source, &rig.whole, false).await;
    silent(&results, "collations");
    silent(&results, "extensions");

    let mut server = rig.whole.source.clone();
    server.sslmode = SslMode::Require;
    let encrypted = Connector::new(&server, "source", rig.source.instance()).unwrap();
    let results = validate(&rig, &encrypted, &rig.whole, false).await;
    assert_eq!(results["connect_source"].outcome, Outcome::Failed, "{:?}", results["connect_source"]);
    silent(&validate(&rig, &rig.source, &rig.whole, false).await, "connect_source");
}
