//! Verification, repair and the mending of rules through the daemon, as an operator orders them: before a cutover, after it
//! along the stream back, and after a rollback.

mod support;

use std::io::{Read as _, Write as _};

use pgcutover::demo::shop::SHOP;
use serde_json::Value;
use support::world::{COMPLETED, NAME, READY, World};
use support::{connect, wait_for};

async fn text(cluster: &pgcutover::demo::cluster::Cluster, sql: &str) -> Option<String> {
    let client = connect(cluster, SHOP).await;
    client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn verify(world: &World) -> Value {
    world.daemon.json(&["migration", "verify", NAME])
}

fn assert_equal(report: &Value, when: &str) {
    assert_eq!(report["differences"], 0, "{when}: {report:#}");
    assert!(report["rows_compared"].as_u64() > Some(100), "{when}: {report:#}");
}

/// One after the other, and with the application writing all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_direction_of_the_stream_is_verified_and_repaired() {
    let world = World::begin(0.01).await;
    // The application uses it up and sets it back, on whichever server it runs.
    let turned = "CREATE SEQUENCE shop.turned; SELECT setval('shop.turned', 50)";
    connect(&world.source, SHOP).await.batch_execute(turned).await.expect("made");
    let application = world.application(4);
    world.migrate().await;
    world.wait_for_writes(&application, 50).await;
    assert_equal(&verify(&world), "before the cutover");
    // One that is given up, on a busy machine, may leave it there too.
    wait_for("a dry run to bring the sequence over", || async {
        let rehearsed = world.daemon.command(&["migration", "cutover", NAME, "--dry-run", "--output", "json"]);
        assert!(!rehearsed.stdout.is_empty(), "{rehearsed:?}");
        text(&world.target, "SELECT last_value::text FROM shop.turned").await.as_deref() == Some("50")
    })
    .await;
    text(&world.source, "SELECT setval('shop.turned', 2)::text").await;
    assert_equal(&verify(&world), "after a dry run");

    // Damage on the target: found, and repaired.
    let there = connect(&world.target, SHOP).await;
    // Of a table that the application only reads: what it writes to mends itself.
    let victim = "SELECT min(id)::text FROM shop.film";
    let id = text(&world.target, victim).await.expect("a film");
    let harm =
        format!("SET session_replication_role = replica; UPDATE shop.film SET title = title || '!' WHERE id = {id}");
    there.batch_execute(&harm).await.expect("damaged");
    let output = world.daemon.command(&["migration", "verify", NAME, "--output", "json"]);
    assert_eq!(output.status.code(), Some(1), "differences are no success");
    let repaired = world.daemon.json(&["migration", "verify", NAME, "--repair"]);
    assert_equal(&repaired, "after the repair");
    assert_eq!(repaired["repaired"], 1, "{repaired:#}");
    let control = connect(&world.target, "postgres").await;
    let journal =
        control.query_one("SELECT table_name, what::text FROM pgcutover.repair", &[]).await.expect("journalled");
    assert_eq!((journal.get(0), journal.get(1)), ("film", format!("{{\"keys\": [[\"{id}\"]]}}").as_str()));

    // There: the server that was left follows, and is shut.
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    world.wait_for_writes(&application, 50).await;
    text(&world.target, "SELECT setval('shop.turned', 1)::text").await;
    assert_equal(&verify(&world), "after the cutover");
    world.must_be_shut(&world.source).await;

    // And back.
    world.must_switch("rollback");
    world.wait_until(READY).await;
    world.wait_for_writes(&application, 50).await;
    assert_equal(&verify(&world), "after the rollback");
    world.must_be_shut(&world.target).await;
    support::shop::nobody_noticed(&application.finish().await);
}

/// The daemon is killed in the middle of a large table; what was compared of it is not compared again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_middle_of_a_table_it_goes_on_behind_what_was_compared() {
    const ROWS: i64 = 20_000;
    // It rests for most of the time, so that it can be killed before its end.
    let slow = "verify_workers = 1\nverify_part_size = \"128kB\"\nverify_load = 4\nverify_load_busy = 4";
    let mut world = World::begin_with(0.01, |options| options.section("migration", slow)).await;
    let make = format!(
        "CREATE TABLE large (id bigint PRIMARY KEY, body text NOT NULL);
         INSERT INTO large SELECT g, repeat('b', 100) FROM generate_series(1, {ROWS}) g"
    );
    connect(&world.source, SHOP).await.batch_execute(&make).await.expect("made");
    world.migrate().await;
    // One at either end.
    let there = connect(&world.target, SHOP).await;
    let harm = format!("UPDATE large SET body = body || ' ' WHERE id = 1; DELETE FROM large WHERE id = {ROWS}");
    there.batch_execute(&harm).await.expect("damaged");
    let control = connect(&world.target, "postgres").await;
    let compared = || async {
        let sql = "SELECT count(*) FROM pgcutover.verification_chunk WHERE table_name = 'large'";
        control.query_one(sql, &[]).await.expect("counted").get::<_, i64>(0)
    };
    let mut verifying = world.daemon.begin(&["migration", "verify", NAME]);
    wait_for("some ranges to be compared", || async { compared().await >= 3 }).await;
    world.daemon.kill();
    verifying.wait().expect("it ended");
    let before = compared().await;
    let sql = "SELECT jsonb_array_length(plan -> 'bounds')::int8 + 1 FROM pgcutover.verification_begun WHERE table_name = 'large'";
    let ranges: i64 = control.query_one(sql, &[]).await.expect("begun").get(0);
    assert!(before < ranges, "{before} of {ranges}");
    // What differed is looked at again.
    let equal = "SELECT coalesce(sum((result ->> 'rows')::int8), 0)::int8 FROM pgcutover.verification_chunk
                  WHERE result ->> 'differences' = '0'";
    let rows: i64 = control.query_one(equal, &[]).await.expect("rows").get(0);

    world.daemon.restart();
    world.wait_until(READY).await;
    let output = world.daemon.command(&["migration", "verify", NAME, "--output", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    let large = report["tables"].as_array().and_then(|tables| tables.iter().find(|table| table["name"] == "large"));
    let large = large.unwrap_or_else(|| panic!("not listed: {report:#}"));
    assert_eq!((&large["rows"], &large["differences"]), (&Value::from(ROWS), &Value::from(2)), "{large:#}");
    assert_eq!(large["listed"][0], serde_json::json!({"kind": "differs", "key": ["1"]}), "{large:#}");
    assert_eq!(large["listed"][1], serde_json::json!({"kind": "missing", "key": [ROWS.to_string()]}), "{large:#}");
    // Of this process; the shop's own tables are counted too, those that were done before are not.
    let metrics = metrics(&world);
    let total = report["rows_compared"].as_u64().expect("a number");
    let read = metrics.lines().find_map(|line| line.strip_prefix("pgcutover_verify_rows_total "));
    let read: u64 = read.and_then(|text| text.trim().parse().ok()).unwrap_or_else(|| panic!("{metrics}"));
    assert!(read + rows.unsigned_abs() <= total, "{read} rows were read behind {rows}, of {total}");
    assert_eq!(compared().await, 0, "kept until the table is done");
}

/// Rules about replication are asked again, refuse a cutover, and are mended on request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_that_fails_later_is_told_refuses_the_cutover_and_is_mended() {
    let world =
        World::begin_with(0.01, |options| options.section("migration", "validation_interval = \"200ms\"")).await;
    let here = connect(&world.source, SHOP).await;
    let make = "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER always BEFORE INSERT ON shop.customer FOR EACH ROW EXECUTE PROCEDURE later()";
    here.batch_execute(make).await.expect("made");
    world.migrate().await;
    let rule = |code: &str| {
        let rules = world.daemon.command(&["migration", "validation", NAME, "--output", "json"]);
        let rules: Value = serde_json::from_slice(&rules.stdout).expect("JSON");
        rules.as_array().and_then(|rules| rules.iter().find(|rule| rule["code"] == code)).cloned().expect("the rule")
    };
    assert_eq!(rule("always_triggers")["outcome"], "Succeeded");
    here.batch_execute("ALTER TABLE shop.customer ENABLE ALWAYS TRIGGER always").await.expect("altered");
    wait_for("the rule to fail", || async { rule("always_triggers")["outcome"] == "Failed" }).await;
    let refused = world.daemon.command(&["migration", "cutover", NAME]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned() + &String::from_utf8_lossy(&refused.stdout);
    assert!(!refused.status.success() && said.contains("always_triggers"), "{said}");

    // Shown, and nothing done.
    let shown =
        world.daemon.command(&["migration", "validation", NAME, "--fix", "always_triggers", "--output", "json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(
        (&shown["applied"], shown["statements"].as_array().map(Vec::len)),
        (&Value::Bool(false), Some(1)),
        "{shown:#}"
    );
    assert_eq!(
        text(&world.source, "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'always'").await.as_deref(),
        Some("A")
    );
    // Run, and among the events.
    let run = world.daemon.json(&["migration", "validation", NAME, "--fix", "always_triggers", "--yes"]);
    assert_eq!(
        (&run["applied"], &run["found"][0]["outcome"]),
        (&Value::Bool(true), &Value::from("Succeeded")),
        "{run:#}"
    );
    assert_eq!(
        text(&world.source, "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'always'").await.as_deref(),
        Some("O")
    );
    assert_eq!(rule("always_triggers")["outcome"], "Succeeded", "at once on record");
    let console = connect_console(&world).await;
    let events = console.simple_query("SHOW EVENTS").await.expect("events");
    assert!(format!("{events:?}").contains("ENABLE TRIGGER always"), "{events:?}");

    // What could cost something is shown and refused.
    here.batch_execute("CREATE UNLOGGED TABLE passing (id int PRIMARY KEY)").await.expect("made");
    let refused = world.daemon.command(&["migration", "validation", NAME, "--fix", "unlogged_tables", "--yes"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("rewrites the table"), "{said}");
    assert_eq!(
        text(&world.source, "SELECT relpersistence::text FROM pg_class WHERE relname = 'passing'").await.as_deref(),
        Some("u")
    );
    let unknown = world.daemon.command(&["migration", "validation", NAME, "--fix", "no_such_rule"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no_such_rule"));
}

async fn connect_console(world: &World) -> tokio_postgres::Client {
    support::connect_with(&world.daemon.client("pgcutover")).await
}

fn metrics(world: &World) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", world.daemon.admin_port)).expect("it listens");
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").expect("asked");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answered");
    text
}
