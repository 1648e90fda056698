//! What every migration of these tests needs: two servers with a shop, an engine, a load, and the proof that both servers
//! hold the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use pgcutover::catalog::decision::Outcome;
use pgcutover::config::Config;
use pgcutover::demo::cluster::{Cluster, ClusterOptions, Installation};
use pgcutover::failpoint::Failpoints;
use pgcutover::migration::engine::{CutoverLease, Engine, EngineDeps};
use pgcutover::migration::view::{MigrationOption, MigrationSpec, MigrationView, Mode};
use pgcutover::postgres::{Connector, InstanceId};
use pgcutover::shutdown::Tasks;
use pgcutover::telemetry::metrics::Metrics;
use tokio::task::JoinHandle;

use crate::support::{PATIENCE, cluster_options, connect, installations, server, wait_for};

/// A small shop with everything that a migration has to carry.
pub const SHOP: &str = r#"
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

pub const TABLES: [&str; 5] = ["customer", "orders", "log", "event", "acknowledged"];

/// Two servers and what an engine needs to move one to the other.
pub struct World {
    pub source: Cluster,
    pub target: Cluster,
    pub config: Arc<Config>,
}

/// An engine in this process; stopping it drops everything it has in hand, as a crash does.
pub struct Running {
    pub engine: Arc<Engine>,
    pub tasks: Tasks,
    pub metrics: Arc<Metrics>,
    pub failpoints: Failpoints,
}

impl Running {
    /// Indexes and constraints that wait, are built now, are done, and have failed.
    pub fn index_builds(&self) -> [i64; 4] {
        ["waiting", "running", "done", "failed"]
            .map(|state| self.metrics.index_builds.with_label_values(&[state]).get())
    }

    pub async fn stop(self) {
        assert_eq!(self.tasks.join(PATIENCE).await, 0, "tasks must stop");
    }
}

impl World {
    pub fn start(source: &Installation, target: &Installation) -> Self {
        Self::start_with(source, target, |options| options)
    }

    pub fn start_with(
        source: &Installation,
        target: &Installation,
        change: impl FnOnce(ClusterOptions) -> ClusterOptions,
    ) -> Self {
        let (source, target) =
            Cluster::start_two(change(cluster_options(source, "source")), cluster_options(target, "target"))
                .unwrap_or_else(|error| panic!("{error}"));
        let mut config = Config::new(server(&source), server(&target));
        config.migration.copy_workers = 3;
        config.migration.index_workers = 2;
        // The newest pg_dump reads sources of every major.
        config.migration.bindir = installations().newest_with_client_tools().map(|tools| tools.bindir.clone());
        Self { source, target, config: Arc::new(config) }
    }

    pub fn same_major() -> Self {
        let found = installations();
        let major = found.newest_with_client_tools().expect("checked by installations()");
        Self::start(major, major)
    }

    /// The same with the configuration changed.
    pub fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = (*self.config).clone();
        change(&mut config);
        self.config = Arc::new(config);
        self
    }

    pub fn engine(&self, failpoints: &str) -> Running {
        let instance = InstanceId::random();
        let connector = |server, label| Connector::new(server, label, &instance).expect("connector");
        let tasks = Tasks::new();
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let failpoints = Failpoints::parse(failpoints).expect("valid");
        let engine = Engine::start(EngineDeps {
            config: self.config.clone(),
            source: connector(&self.config.source, "source"),
            target: connector(&self.config.target, "target"),
            metrics: metrics.clone(),
            tasks: tasks.clone(),
            failpoints: failpoints.clone(),
        });
        Running { engine, tasks, metrics, failpoints }
    }

    pub async fn furnish(&self, database: &str) {
        let sql = format!("CREATE DATABASE {database}");
        connect(&self.source, "postgres").await.batch_execute(&sql).await.expect("database");
        connect(&self.source, database).await.batch_execute(SHOP).await.expect("shop");
    }

    pub async fn assert_equal(&self, database: &str) {
        let (source, target) = (connect(&self.source, database).await, connect(&self.target, database).await);
        for table in TABLES {
            let (from, to) = (digest(&source, table).await, digest(&target, table).await);
            assert_eq!(from, to, "{database}.{table}");
        }
    }

    /// Nothing of ours is left on the source but the control schema.
    pub async fn assert_clean(&self, database: &str) {
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
pub async fn digest(client: &tokio_postgres::Client, table: &str) -> (i64, String) {
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

pub fn spec(name: &str, databases: &[&str]) -> MigrationSpec {
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
pub async fn create(running: &Running, spec: MigrationSpec) -> MigrationView {
    wait_for("the engine to own the target", || async { running.engine.list().is_ok() }).await;
    running.engine.create(spec).await.unwrap_or_else(|error| panic!("{error}"))
}

/// Waits for a substate; one that is not wanted and final panics with its reason.
pub async fn reach(running: &Running, name: &str, wanted: &str) -> MigrationView {
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

pub fn failed_rules(view: &MigrationView) -> Vec<&serde_json::Value> {
    let results = view.validation.as_ref().and_then(|results| results.as_array());
    results.into_iter().flatten().filter(|rule| rule["outcome"] == "Failed").collect()
}

/// An application that writes until it is stopped.
pub struct Load {
    pub stop: Arc<AtomicBool>,
    pub acknowledged: Arc<AtomicI64>,
    pub writers: Vec<JoinHandle<()>>,
}

impl Load {
    pub async fn start(source: &Cluster, database: &str, writers: i32) -> Self {
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
    pub async fn writes(&self, more: i64) {
        let until = self.acknowledged.load(Ordering::Relaxed) + more;
        wait_for("the load to write", || async {
            assert!(self.writers.iter().all(|writer| !writer.is_finished()), "a writer has failed");
            self.acknowledged.load(Ordering::Relaxed) >= until
        })
        .await;
    }

    pub async fn stop(self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.expect("no write fails");
        }
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// One transaction that touches every kind of table; any error ends the test.
pub async fn write(client: &tokio_postgres::Client, writer: i32, n: i64) {
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

/// With the load stopped, waits until everything is on the target, as a cutover does. An engine that has just lost its
/// lock with a server, or is about to notice, is asked again.
pub async fn drain(running: &Running, name: &str) {
    wait_for("everything to be on the target", || async {
        let drained = try_drain(running, name).await;
        if let Err(error) = &drained {
            eprintln!("not drained: {error}");
        }
        drained.is_ok()
    })
    .await;
}

pub async fn try_drain(running: &Running, name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let lease = running.engine.begin_cutover(name).await?;
    let drained = drain_under(&lease).await;
    lease.finish(Outcome::Aborted).await?;
    drained
}

pub async fn drain_under(lease: &CutoverLease) -> Result<(), Box<dyn std::error::Error>> {
    for database in lease.databases() {
        let handle = lease.handle(&database).expect("its own database");
        let nonce = format!("test-{:x}", rand::random::<u64>());
        let source = handle.source_control("test").await?;
        source.execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce]).await?;
        tokio::time::timeout(PATIENCE, handle.wait_marker(&nonce)).await??;
    }
    Ok(())
}
