//! Whole migrations on real servers: under write load, killed and restarted, cancelled, offline, and the scenarios that
//! break a naive engine.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use pgcutover::catalog::decision::Outcome;
use pgcutover::config::{Config, Server};
use pgcutover::demo::cluster::{Cluster, ClusterOptions, Installation};
use pgcutover::failpoint::Failpoints;
use pgcutover::migration::engine::{CutoverLease, Engine, EngineDeps, EngineError};
use pgcutover::migration::sequences::SequencePair;
use pgcutover::migration::view::{MigrationOption, MigrationSpec, MigrationView, Mode};
use pgcutover::postgres::{Connector, InstanceId};
use pgcutover::shutdown::Tasks;
use pgcutover::telemetry::metrics::Metrics;
use support::{PATIENCE, connect, installations, wait_for};
use tokio::task::JoinHandle;

/// A small shop with everything that a migration has to carry.
const SHOP: &str = r#"
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE TABLE customer (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text UNIQUE NOT NULL, mood mood DEFAULT 'ok',
    shout text GENERATED ALWAYS AS (upper(email)) STORED);
CREATE TABLE orders (id serial PRIMARY KEY, customer int NOT NULL REFERENCES customer, total numeric(12, 2), note text,
    tags text[], extra jsonb, blob bytea, at timestamptz DEFAULT now());
ALTER TABLE orders ALTER note SET STORAGE EXTERNAL;
CREATE INDEX orders_customer ON orders (customer);
CREATE TABLE log (at timestamptz DEFAULT clock_timestamp(), what text, n float8);
CREATE TABLE event (id bigint, kind text, body text, PRIMARY KEY (id, kind)) PARTITION BY LIST (kind);
CREATE TABLE event_a PARTITION OF event FOR VALUES IN ('a');
CREATE TABLE event_b PARTITION OF event FOR VALUES IN ('b');
CREATE TABLE acknowledged (writer int, n bigint, PRIMARY KEY (writer, n));
CREATE SEQUENCE lonely START 7 INCREMENT 3;
SELECT setval('lonely', 400, false);
CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO log (what, n) VALUES (TG_OP, NEW.id); RETURN NEW; END $$;
CREATE TRIGGER remember AFTER INSERT OR UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION remember();
CREATE MATERIALIZED VIEW totals AS SELECT customer, sum(total) FROM orders GROUP BY 1;
INSERT INTO customer (email) SELECT 'c' || g || '@example.org' FROM generate_series(1, 500) g;
INSERT INTO orders (customer, total, note, tags, extra, blob)
    SELECT 1 + g % 500, g / 7.0, repeat('n', g % 4000), ARRAY['a', NULL, 'b''"'], '{"k": [1, null]}', '\x00ff'
    FROM generate_series(1, 20000) g;
INSERT INTO event SELECT g, CASE WHEN g % 2 = 0 THEN 'a' ELSE 'b' END, 'body ' || g FROM generate_series(1, 10000) g;
"#;

const TABLES: [&str; 5] = ["customer", "orders", "log", "event", "acknowledged"];

/// Two servers and what an engine needs to move one to the other.
struct World {
    source: Cluster,
    target: Cluster,
    config: Arc<Config>,
}

/// An engine in this process; stopping it drops everything it has in hand, as a crash does.
struct Running {
    engine: Arc<Engine>,
    tasks: Tasks,
}

impl Running {
    async fn stop(self) {
        assert_eq!(self.tasks.join(Duration::from_secs(30)).await, 0, "tasks must stop");
    }
}

impl World {
    fn start(source: &Installation, target: &Installation) -> Self {
        Self::start_with(source, target, |options| options)
    }

    fn start_with(
        source: &Installation,
        target: &Installation,
        change: impl FnOnce(ClusterOptions) -> ClusterOptions,
    ) -> Self {
        let (source, target) =
            Cluster::start_two(change(ClusterOptions::new(source, "source")), ClusterOptions::new(target, "target"))
                .unwrap_or_else(|error| panic!("{error}"));
        let server = |cluster: &Cluster| Server::new(cluster.host(), cluster.port(), "postgres");
        let mut config = Config::new(server(&source), server(&target));
        config.migration.copy_workers = 3;
        config.migration.index_workers = 2;
        // The newest pg_dump reads sources of every major.
        config.migration.bindir = support::installations().newest_with_client_tools().map(|tools| tools.bindir.clone());
        Self { source, target, config: Arc::new(config) }
    }

    fn same_major() -> Self {
        let found = installations();
        let major = found.newest_with_client_tools().expect("checked by installations()");
        Self::start(major, major)
    }

    fn engine(&self, failpoints: &str) -> Running {
        let instance = InstanceId::random();
        let connector = |server, label| Connector::new(server, label, &instance).expect("connector");
        let tasks = Tasks::new();
        let engine = Engine::start(EngineDeps {
            config: self.config.clone(),
            source: connector(&self.config.source, "source"),
            target: connector(&self.config.target, "target"),
            metrics: Arc::new(Metrics::new().expect("metrics")),
            tasks: tasks.clone(),
            failpoints: Failpoints::parse(failpoints).expect("valid"),
        });
        Running { engine, tasks }
    }

    async fn furnish(&self, database: &str) {
        let sql = format!("CREATE DATABASE {database}");
        connect(&self.source, "postgres").await.batch_execute(&sql).await.expect("database");
        connect(&self.source, database).await.batch_execute(SHOP).await.expect("shop");
    }

    async fn assert_equal(&self, database: &str) {
        let (source, target) = (connect(&self.source, database).await, connect(&self.target, database).await);
        for table in TABLES {
            let (from, to) = (digest(&source, table).await, digest(&target, table).await);
            assert_eq!(from, to, "{database}.{table}");
        }
    }

    /// Nothing of ours is left on the source but the control schema.
    async fn assert_clean(&self, database: &str) {
        let source = connect(&self.source, database).await;
        let left = source
            .query_one(
                "SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_publication),
                        (SELECT count(*) FROM pg_namespace WHERE nspname = 'pgcutover'),
                        (SELECT count(*) FROM pg_class WHERE relreplident = 'f')",
                &[],
            )
            .await
            .expect("counts");
        let left: Vec<i64> = (0..4).map(|column| left.get(column)).collect();
        assert_eq!(left, [0, 0, 0, 0], "slots, publications, schemas, identities");
    }
}

/// Number of rows and a hash of them all, independent of their order and of the server's major.
async fn digest(client: &tokio_postgres::Client, table: &str) -> (i64, String) {
    let sql = format!(
        "SET extra_float_digits = 1; SELECT count(*)::text, coalesce(md5(string_agg(md5(t::text), '' ORDER BY md5(t::text))), '') FROM {table} t"
    );
    let answer = client.simple_query(&sql).await.expect("digest");
    let row = answer
        .iter()
        .find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        })
        .expect("one row");
    (row.get(0).expect("count").parse().expect("number"), row.get(1).expect("hash").to_owned())
}

fn spec(name: &str, databases: &[&str]) -> MigrationSpec {
    MigrationSpec {
        name: name.parse().expect("valid"),
        databases: databases.iter().map(|database| (*database).to_owned()).collect(),
        mode: Mode::Online,
        option: MigrationOption::ValidateAndMigrate,
        overwrite_target: false,
        cutover_when_ready: false,
    }
}

/// Asks until the engine has found its target.
async fn create(running: &Running, spec: MigrationSpec) -> MigrationView {
    wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
    running.engine.create(spec).await.unwrap_or_else(|error| panic!("{error}"))
}

/// Waits for a substate; one that is not wanted and final panics with its reason.
async fn reach(running: &Running, name: &str, wanted: &str) -> MigrationView {
    let deadline = std::time::Instant::now() + 3 * PATIENCE;
    loop {
        if let Ok(view) = running.engine.show(name) {
            if view.substate == wanted {
                return view;
            }
            let ended = ["Failed", "ValidationFailed", "Cancelled", "Completed"].contains(&view.substate.as_str());
            assert!(!ended, "{}: {:?} {:?}", view.substate, view.error, failed_rules(&view));
            assert!(std::time::Instant::now() < deadline, "{wanted} not reached: {view:#?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn failed_rules(view: &MigrationView) -> Vec<&serde_json::Value> {
    let results = view.validation.as_ref().and_then(|results| results.as_array());
    results.into_iter().flatten().filter(|rule| rule["outcome"] == "Failed").collect()
}

/// An application that writes until it is stopped.
struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicI64>,
    writers: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start(source: &Cluster, database: &str, writers: i32) -> Self {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let mut tasks = Vec::new();
        for writer in 0..writers {
            let client = connect(source, database).await;
            let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
            tasks.push(tokio::spawn(async move {
                let mut n = 0_i64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    write(&client, writer, n).await;
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Self { stop, acknowledged, writers: tasks }
    }

    /// Waits until it has written so much more.
    async fn writes(&self, more: i64) {
        let until = self.acknowledged.load(Ordering::Relaxed) + more;
        wait_for("the load to write", || async {
            assert!(self.writers.iter().all(|writer| !writer.is_finished()), "a writer has failed");
            self.acknowledged.load(Ordering::Relaxed) >= until
        })
        .await;
    }

    async fn stop(self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.expect("no write fails");
        }
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// One transaction that touches every kind of table; any error ends the test.
async fn write(client: &tokio_postgres::Client, writer: i32, n: i64) {
    let id = i64::from(writer) * 10_000_000 + n + 100_000;
    let sql = format!(
        "BEGIN;
         INSERT INTO acknowledged VALUES ({writer}, {n});
         INSERT INTO customer (email) VALUES ('w{writer}-{n}');
         INSERT INTO orders (customer, total, note) VALUES (1 + {n} % 500, {n}, repeat('o', {n} % 5000));
         UPDATE orders SET total = total + 1, extra = '{{\"n\": {n}}}' WHERE id = 1 + ({n}::bigint * 7919 + {writer}) % 20000;
         INSERT INTO event VALUES ({id}, 'a', 'new');
         UPDATE event SET kind = 'b' WHERE id = {id} AND {n} % 3 = 0;
         DELETE FROM event WHERE id = 1 + ({n}::bigint * 104729) % 10000;
         UPDATE log SET n = n + 0.5 WHERE ctid = (SELECT ctid FROM log WHERE what = 'INSERT' LIMIT 1) AND {n} % 10 = 0;
         DELETE FROM orders WHERE id = 1 + ({n}::bigint * 31337 + {writer}) % 20000 AND {n} % 5 = 0;
         {}
         COMMIT;",
        if n % 50 == 0 { "TRUNCATE log;" } else { "" }
    );
    if let Err(error) = client.batch_execute(&sql).await {
        let deadlock = error.code().is_some_and(|code| code.code() == "40P01");
        assert!(deadlock, "the application must never see an error: {error:?}");
        client.batch_execute("ROLLBACK").await.expect("rolled back");
    }
}

/// With the load stopped, waits until everything is on the target, as a cutover does.
async fn drain(running: &Running, name: &str) {
    try_drain(running, name).await.unwrap_or_else(|error| panic!("{error}"));
}

async fn try_drain(running: &Running, name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let lease = running.engine.begin_cutover(name).await?;
    let drained = drain_under(&lease).await;
    lease.finish(Outcome::Aborted).await?;
    drained
}

async fn drain_under(lease: &CutoverLease) -> Result<(), Box<dyn std::error::Error>> {
    for database in lease.databases() {
        let handle = lease.handle(&database).expect("its own database");
        let nonce = format!("test-{:x}", rand::random::<u64>());
        let source = handle.source_control("test").await?;
        source.execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce]).await?;
        tokio::time::timeout(PATIENCE, handle.wait_marker(&nonce)).await??;
    }
    Ok(())
}

async fn whole_run(source: &Installation, target: &Installation) {
    let world = World::start(source, target);
    world.furnish("shop").await;
    let load = Load::start(&world.source, "shop", 4).await;
    let running = world.engine("");
    create(&running, spec("whole", &["shop"])).await;
    let ready = reach(&running, "whole", "WaitingForCutoverTrigger").await;
    assert_eq!(ready.state, "WaitingForUserAction");
    assert_eq!(ready.databases[0].tables_ready, ready.databases[0].tables_total);
    load.writes(200).await;
    let written = load.stop().await;
    drain(&running, "whole").await;
    world.assert_equal("shop").await;
    let target = connect(&world.target, "shop").await;
    let arrived: i64 = target.query_one("SELECT count(*) FROM acknowledged", &[]).await.expect("count").get(0);
    assert!(arrived <= written && arrived > 0, "{arrived} of {written}");
    let sql = "SELECT count(*) FILTER (WHERE contype = 'f' AND convalidated), (SELECT count(*) FROM totals) > 0,
                      (SELECT count(*) FROM pg_trigger WHERE tgname = 'remember') FROM pg_constraint";
    let row = target.query_one(sql, &[]).await.expect("constraints");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, bool>(1), row.get::<_, i64>(2)), (1, true, 1));
    let tables = running.engine.tables("whole").expect("known");
    let orders = tables.iter().find(|table| table.name == "orders").expect("listed");
    assert_eq!(orders.full_load.state, "ready");
    assert!(orders.incremental_sync.inserts > 0 && orders.incremental_sync.updates > 0);

    // What was defined on the source meanwhile would be missing without a word.
    let source = connect(&world.source, "shop").await;
    source.batch_execute("CREATE TABLE late (id int); ALTER TABLE log ADD COLUMN later int").await.expect("defined");
    let refused = running.engine.begin_cutover("whole").await.expect_err("refused").to_string();
    assert!(refused.contains("late") && refused.contains("later"), "{refused}");
    source.batch_execute("DROP TABLE late; ALTER TABLE log DROP COLUMN later").await.expect("taken back");

    // The verdict 'decided' ends the stream and frees the source's WAL.
    let lease = running.engine.begin_cutover("whole").await.expect("ready");
    lease.finish(Outcome::Decided).await.expect("recorded");
    let done = reach(&running, "whole", "Completed").await;
    assert_eq!(done.state, "Succeeded");
    let slots: i64 = source.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.expect("count").get(0);
    assert_eq!(slots, 0, "a slot that nobody reads holds WAL back for ever");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_within_one_major() {
    let found = installations();
    let major = found.newest_with_client_tools().expect("checked by installations()");
    whole_run(major, major).await;
}

/// 13 to 17 where both are there, otherwise as far apart as what is installed allows.
#[tokio::test(flavor = "multi_thread")]
async fn under_load_across_majors() {
    let found = installations();
    let (oldest, newest) = found.pair().expect("checked by installations()");
    whole_run(found.major(13).unwrap_or(oldest), found.major(17).unwrap_or(newest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_it_goes_on_where_it_was() {
    let world = World::same_major();
    world.furnish("shop").await;
    let load = Load::start(&world.source, "shop", 3).await;
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let running = world.engine("");
    create(&running, spec("again", &["shop"])).await;
    let mut pause = seed;
    let mut running = Some(running);
    for _ in 0..15 {
        pause = pause.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        tokio::time::sleep(Duration::from_millis(200 + (pause >> 33) % 1500)).await;
        running.take().expect("always one").stop().await;
        running = Some(world.engine(""));
    }
    let running = running.expect("always one");
    reach(&running, "again", "WaitingForCutoverTrigger").await;
    load.writes(100).await;
    load.stop().await;
    drain(&running, "again").await;
    world.assert_equal("shop").await;
    running.engine.cancel("again").await.expect("cancelled");
    world.assert_clean("shop").await;
    running.stop().await;
}

/// A failure at every durable step, then `retry` with nothing switched on.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_step_is_mended_by_a_retry() {
    let world = World::same_major();
    let points = [
        "engine.after_roles",
        "engine.after_identities",
        "engine.after_publication",
        "engine.after_slot",
        "engine.after_barrier",
        "engine.after_database",
        "engine.after_schema",
        "copy.snapshot_taken",
        "copy.committed",
        "copy.indexes_built",
        "engine.after_copy",
        "engine.after_constraints",
        "apply.before_commit",
        "apply.after_commit",
        "stream.before_confirm",
    ];
    world.furnish("shop").await;
    let load = Load::start(&world.source, "shop", 2).await;
    for (number, point) in points.into_iter().enumerate() {
        let name = format!("f{number}");
        let failing = world.engine(&format!("{point}=error"));
        let mut wanted = spec(&name, &["shop"]);
        wanted.overwrite_target = true;
        create(&failing, wanted).await;
        let failing_engine = failing.engine.clone();
        wait_for(&format!("the failure at {point}"), || async {
            failing_engine.show(&name).is_ok_and(|view| view.substate == "Failed")
        })
        .await;
        let error = failing.engine.show(&name).expect("known").error.expect("a reason");
        assert_eq!((error.code.as_str(), error.message.contains(point)), (error.code.as_str(), true), "{error:?}");
        failing.stop().await;

        let running = world.engine("");
        wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
        running.engine.retry(&name).await.expect("retried");
        reach(&running, &name, "WaitingForCutoverTrigger").await;
        if number + 1 == points.len() {
            load.writes(20).await;
            load.stop().await;
            drain(&running, &name).await;
            world.assert_equal("shop").await;
            running.engine.cancel(&name).await.expect("cancelled");
            world.assert_clean("shop").await;
            running.stop().await;
            return;
        }
        running.engine.cancel(&name).await.expect("cancelled");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_durable_before_anybody_sees_it() {
    let world = World::same_major();
    world.furnish("shop").await;
    let hanging = world.engine("engine.after_state=hang");
    create(&hanging, spec("hang", &["shop"])).await;
    let catalog = connect(&world.target, "postgres").await;
    wait_for("the next state to be durable", || async {
        let sql = "SELECT state FROM pgcutover.migration WHERE name = 'hang'";
        catalog.query_one(sql, &[]).await.expect("row").get::<_, String>(0) == "ValidationInProgress"
    })
    .await;
    assert_eq!(hanging.engine.show("hang").expect("known").substate, "PerformingPreRequisiteSteps");
    hanging.stop().await;
    let running = world.engine("");
    reach(&running, "hang", "WaitingForCutoverTrigger").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_removes_what_was_made_and_lists_what_is_left() {
    let world = World::same_major();
    world.furnish("shop").await;
    world.furnish("other").await;
    let running = world.engine("");
    create(&running, spec("give-up", &["shop", "other"])).await;
    let view = reach(&running, "give-up", "WaitingForCutoverTrigger").await;
    assert_eq!(view.databases.len(), 2);
    drain(&running, "give-up").await;
    world.assert_equal("shop").await;
    world.assert_equal("other").await;
    let busy = running.engine.create(spec("second", &["shop"])).await;
    assert!(matches!(busy, Err(EngineError::BadRequest(_))), "{busy:?}");

    let report = running.engine.cancel("give-up").await.expect("cancelled");
    let removed = |kind: &str| report.removed.iter().filter(|object| object.kind == kind).count();
    assert_eq!((removed("slot"), removed("publication"), removed("replica_identity")), (2, 2, 2), "{report:#?}");
    assert!(report.left.iter().all(|left| left.object.undo.is_none()), "{report:#?}");
    assert_eq!(running.engine.show("give-up").expect("known").state, "Cancelled");
    world.assert_clean("shop").await;
    world.assert_clean("other").await;
    let target = connect(&world.target, "shop").await;
    let row = target
        .query_one("SELECT to_regnamespace('pgcutover') IS NULL, (SELECT count(*) FROM orders) > 0", &[])
        .await
        .expect("looked");
    assert_eq!((row.get(0), row.get(1)), (true, true), "our schema is gone, the data stays");
    assert_eq!(running.engine.cancel("give-up").await.expect("known already"), report);
    assert!(matches!(running.engine.retry("give-up").await, Err(EngineError::Rejected(_))));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_migration_ends_with_equal_servers_and_nothing_of_ours_streaming() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    let mut offline = spec("off", &["shop"]);
    offline.mode = Mode::Offline;
    create(&running, offline).await;
    let done = reach(&running, "off", "Completed").await;
    assert_eq!(done.state, "Succeeded");
    world.assert_equal("shop").await;
    let target = connect(&world.target, "shop").await;
    let next: i64 = target.query_one("SELECT nextval('lonely')", &[]).await.expect("sequence").get(0);
    assert_eq!(next, 400, "set and not called");
    let source = connect(&world.source, "shop").await;
    wait_for("the slot and publication to be gone", || async {
        let sql = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
        source.query_one(sql, &[]).await.expect("count").get::<_, i64>(0) == 0
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn validation_alone_touches_nothing() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    let mut wanted = spec("look", &["shop"]);
    wanted.option = MigrationOption::Validate;
    create(&running, wanted).await;
    let done = reach(&running, "look", "Completed").await;
    assert!(done.validation.is_some_and(|results| results.as_array().is_some_and(|rules| !rules.is_empty())));
    world.assert_clean("shop").await;
    let target = connect(&world.target, "postgres").await;
    let there: i64 =
        target.query_one("SELECT count(*) FROM pg_database WHERE datname = 'shop'", &[]).await.expect("count").get(0);
    assert_eq!(there, 0);
    running.stop().await;
}

/// The commit record is written, the row is not visible yet, and another slot's snapshot on disk lets ours become
/// consistent at once: the naive copy misses the row, and the stream does not bring it.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_a_standby_arrives() {
    let world = World::same_major();
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    let sql = "SELECT pg_create_logical_replication_slot('elsewhere', 'pgoutput')";
    source.batch_execute(sql).await.expect("another slot");
    let configure = |names: &str| {
        world.source.configure(&[("synchronous_standby_names", names)]).expect("configured");
        world.source.reload();
    };
    configure("nobody");
    wait_for("the setting to be in force", || async {
        let sql = "SHOW synchronous_standby_names";
        connect(&world.source, "shop").await.query_one(sql, &[]).await.expect("setting").get::<_, String>(0) == "nobody"
    })
    .await;
    let writer = connect(&world.source, "shop").await;
    let waiting = tokio::spawn(async move { writer.batch_execute("INSERT INTO acknowledged VALUES (77, 1)").await });
    wait_for("the commit to wait for the standby", || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        source.query_one(sql, &[]).await.expect("count").get::<_, i64>(0) == 1
    })
    .await;
    let running = world.engine("");
    create(&running, spec("standby", &["shop"])).await;
    reach(&running, "standby", "MigratingData").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    configure("");
    waiting.await.expect("no panic").expect("committed at last");
    reach(&running, "standby", "WaitingForCutoverTrigger").await;
    drain(&running, "standby").await;
    world.assert_equal("shop").await;
    let target = connect(&world.target, "shop").await;
    let rows: i64 =
        target.query_one("SELECT count(*) FROM acknowledged WHERE writer = 77", &[]).await.expect("count").get(0);
    assert_eq!(rows, 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_disappears_is_a_failure_with_its_name() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("gone", &["shop"])).await;
    reach(&running, "gone", "WaitingForCutoverTrigger").await;
    running.stop().await;
    let source = connect(&world.source, "shop").await;
    wait_for("the slot to be free and dropped", || async {
        let sql =
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'pgcutover%'";
        source.batch_execute(sql).await.is_ok()
    })
    .await;
    let running = world.engine("");
    wait_for("the failure", || async { running.engine.show("gone").is_ok_and(|view| view.substate == "Failed") }).await;
    let error = running.engine.show("gone").expect("known").error.expect("a reason");
    assert_eq!(error.code, "slot_missing");
    assert!(error.hint.is_some());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_settings_and_sequences_of_the_last_moment_are_brought_over() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("last", &["shop"])).await;
    reach(&running, "last", "WaitingForCutoverTrigger").await;
    let source = connect(&world.source, "shop").await;
    let late = "CREATE ROLE \"Späte Röle\" LOGIN PASSWORD 'secret' CONNECTION LIMIT 7;
        ALTER ROLE \"Späte Röle\" IN DATABASE shop SET work_mem = '11MB';
        ALTER DATABASE shop SET statement_timeout = '7min';
        ALTER DATABASE shop SET default_transaction_read_only = on;
        SET default_transaction_read_only = off;
        CREATE SEQUENCE called; CREATE SEQUENCE set_back INCREMENT -3 MAXVALUE 40 START 40; CREATE SEQUENCE idle START 9";
    source.batch_execute(late).await.expect("made");
    let target = connect(&world.target, "shop").await;
    let same = "CREATE SEQUENCE called; CREATE SEQUENCE set_back INCREMENT -3 MAXVALUE 40 START 40; CREATE SEQUENCE idle START 9";
    target.batch_execute(same).await.expect("made");

    let lease = running.engine.begin_cutover("last").await.unwrap_or_else(|error| panic!("{error}"));
    lease.synchronise().await.unwrap_or_else(|error| panic!("{error}"));
    let handle = lease.handle("shop").expect("its own database");
    let (from, to) = (handle.source_control("test").await, handle.target_control("test").await);
    let (from, to) = (from.expect("source"), to.expect("target"));
    let mut sequences = SequencePair::prepare(&from, &to).await.expect("prepared");
    // In the pause only what has moved is set, also what was made since and what was set without being called.
    let moved = "SELECT nextval('called'), nextval('called'), nextval('set_back'), nextval('set_back'), setval('idle', 5, false)";
    source.batch_execute(moved).await.expect("called");
    for side in [&source, &target] {
        side.batch_execute("CREATE SEQUENCE newest START 3").await.expect("made");
    }
    source.batch_execute("SELECT nextval('newest')").await.expect("called");
    assert_eq!(sequences.bring_over(&from, &to).await.expect("brought over"), 4);
    assert_eq!(sequences.bring_over(&from, &to).await.expect("nothing to do"), 0);
    lease.finish(Outcome::Aborted).await.expect("given back");

    let stand = "SELECT (SELECT (last_value, is_called)::text FROM called), (SELECT (last_value, is_called)::text FROM set_back),
        (SELECT (last_value, is_called)::text FROM idle), (SELECT (last_value, is_called)::text FROM newest)";
    let row = target.query_one(stand, &[]).await.expect("sequences");
    let stands: Vec<String> = (0..4).map(|column| row.get(column)).collect();
    assert_eq!(stands, ["(2,t)", "(37,t)", "(5,f)", "(3,t)"]);
    let shared = "SELECT r.rolconnlimit, r.rolpassword LIKE 'SCRAM-SHA-256$%',
            (SELECT string_agg(c, ',' ORDER BY c) FROM pg_db_role_setting, unnest(setconfig) c WHERE setrole = r.oid),
            (SELECT string_agg(c, ',' ORDER BY c) FROM pg_db_role_setting s, unnest(setconfig) c, pg_database d
              WHERE setrole = 0 AND setdatabase = d.oid AND datname = 'shop')
        FROM pg_authid r WHERE rolname = 'Späte Röle'";
    let row = target.query_one(shared, &[]).await.expect("the role has come");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, bool>(1)), (7, true));
    assert_eq!(row.get::<_, &str>(2), "work_mem=11MB");
    // The fence's own setting is never carried over.
    assert_eq!(row.get::<_, &str>(3), "statement_timeout=7min");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_engine_owns_a_target_and_another_takes_over() {
    let mut world = World::same_major();
    world.furnish("shop").await;
    world.target.stop(pgcutover::demo::cluster::Stop::Fast).expect("stopped");
    let first = world.engine("");
    assert!(matches!(first.engine.list(), Err(EngineError::Unavailable(_))), "unknown is not an empty list");
    world.target.start_again().expect("started");
    create(&first, spec("shared", &["shop"])).await;
    reach(&first, "shared", "WaitingForCutoverTrigger").await;
    let second = world.engine("");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(second.engine.list(), Err(EngineError::Unavailable(_))));
    first.stop().await;
    reach(&second, "shared", "WaitingForCutoverTrigger").await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute("INSERT INTO acknowledged VALUES (1, 1)").await.expect("written");
    wait_for("the stream to go on", || async {
        second.engine.show("shared").is_ok_and(|view| view.databases[0].latency_bytes.is_some())
    })
    .await;
    drain(&second, "shared").await;
    world.assert_equal("shop").await;

    // The target goes away for a while; the migration goes on by itself.
    world.target.restart(pgcutover::demo::cluster::Stop::Immediate).expect("restarted");
    source.batch_execute("INSERT INTO acknowledged VALUES (1, 2)").await.expect("written");
    // Until the engine has noticed its loss and come back, a drain may begin and fail half-way.
    wait_for("the engine to be back and drain", || async { try_drain(&second, "shared").await.is_ok() }).await;
    world.assert_equal("shop").await;
    second.stop().await;
}
