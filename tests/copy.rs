//! From a dump to copied rows, on real servers: definitions, roles and rows of the target equal the source's.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use pgcutover::catalog::journal::MadeObject;
use pgcutover::config::{self, Config, Environment, Migration, WithoutIdentity};
use pgcutover::demo::cluster::Cluster;
use pgcutover::failpoint::Failpoints;
use pgcutover::migration::copy::{
    self, CopiedRows, CopyContext, CopyError, CopyProgress, RecordError, SourceTable, Stage, TableRecorder, Workers,
};
use pgcutover::migration::identity::{self, Identity, Remedy};
use pgcutover::migration::made::{Journal, JournalError};
use pgcutover::migration::materialized;
use pgcutover::migration::roles::{self, RoleAction};
use pgcutover::migration::schema::{self, Archive, Existing, PgDump, RestoreTarget};
use pgcutover::migration::snapshot::HandOver;
use pgcutover::postgres::{Connector, InstanceId};

const DATABASE: &str = "shop \"Größe\"";

/// Two servers and what a migration is configured with.
struct Rig {
    source_cluster: Cluster,
    target_cluster: Cluster,
    source: Connector,
    target: Connector,
    config: Migration,
    whole: Config,
    journal: Recorded,
}

/// A journal and a record of tables in memory.
#[derive(Clone, Default)]
struct Recorded {
    made: Arc<Mutex<Vec<MadeObject>>>,
    snapshots: Arc<Mutex<HashMap<String, HandOver>>>,
    copied: Arc<Mutex<BTreeMap<String, CopiedRows>>>,
    indexed: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Journal for Recorded {
    async fn record(&self, made: &MadeObject) -> Result<(), JournalError> {
        self.made.lock().unwrap().push(made.clone());
        Ok(())
    }
}

#[async_trait]
impl TableRecorder for Recorded {
    async fn snapshot_taken(&self, table: &SourceTable, hand_over: &HandOver) -> Result<(), RecordError> {
        self.snapshots.lock().unwrap().insert(table.name.name.clone(), hand_over.clone());
        Ok(())
    }
    async fn rows_copied(&self, table: &SourceTable, copied: CopiedRows) -> Result<(), RecordError> {
        self.copied.lock().unwrap().insert(table.name.name.clone(), copied);
        Ok(())
    }
    async fn indexes_built(&self, table: &SourceTable) -> Result<(), RecordError> {
        self.indexed.lock().unwrap().push(table.name.name.clone());
        Ok(())
    }
}

impl CopyProgress for Recorded {
    fn started(&self, _: &SourceTable, _: usize) {}
    fn moved(&self, _: &SourceTable, _: u64, _: u64) {}
    fn indexes(&self, _: &SourceTable, _: usize, _: usize) {}
}

fn configuration(source: &Cluster, target: &Cluster) -> Config {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pgcutover.toml");
    let section = |name: &str, cluster: &Cluster| {
        format!(
            "[{name}]\nhost = {:?}\nport = {}\nuser = \"postgres\"\nsslmode = \"disable\"\n",
            cluster.host(),
            cluster.port()
        )
    };
    let text =
        format!("[listen]\naddress = \"127.0.0.1:6432\"\n{}{}", section("source", source), section("target", target));
    std::fs::write(&path, text).unwrap();
    config::load(Some(&path), &Environment::default()).unwrap_or_else(|error| panic!("{error}"))
}

impl Rig {
    fn start() -> Self {
        let (source_cluster, target_cluster) = support::two_clusters();
        let whole = configuration(&source_cluster, &target_cluster);
        let config = Migration {
            copy_workers: 3,
            index_workers: 2,
            part_bytes: 256 * 1024,
            without_identity: WithoutIdentity::Full,
            slot_timeout: Duration::from_secs(20),
            lock_timeout: Duration::from_millis(500),
            ..whole.migration.clone()
        };
        let whole = Config { migration: config.clone(), ..whole };
        let instance = InstanceId::random();
        let source = Connector::new(&whole.source, "source", &instance).unwrap();
        let target = Connector::new(&whole.target, "target", &instance).unwrap();
        Self { whole, source_cluster, target_cluster, source, target, config, journal: Recorded::default() }
    }

    /// Runs statements on the source, in the database that is migrated.
    async fn on_source(&self, sql: &str) {
        let client = support::connect(&self.source_cluster, DATABASE).await;
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    }

    async fn make_source(&self, sql: &str) {
        let client = support::connect(&self.source_cluster, "postgres").await;
        client.batch_execute(&format!("CREATE DATABASE \"{}\"", DATABASE.replace('"', "\"\""))).await.unwrap();
        self.on_source(sql).await;
    }

    async fn pg_dump(&self) -> PgDump {
        let majors = [&self.source_cluster, &self.target_cluster].map(|cluster| u32::from(cluster.major()));
        schema::find_pg_dump(&self.config, majors[0], majors[1]).await.unwrap()
    }

    async fn dump(&self) -> Archive {
        schema::dump(&self.pg_dump().await, &self.source, DATABASE, self.config.lock_timeout).await.unwrap()
    }

    /// The database and everything before the rows.
    async fn restore_pre_data(&self, archive: &Archive) {
        schema::create_database(&self.source, &self.target, DATABASE, Existing::Keep, &self.journal).await.unwrap();
        let report = schema::restore_pre_data(&self.restore_target(), archive).await.unwrap();
        assert_eq!(report.failures, []);
    }

    fn restore_target(&self) -> RestoreTarget<'_> {
        RestoreTarget { connector: &self.target, database: DATABASE, guard: None }
    }

    fn context(&self, barrier_xid: Option<u64>) -> CopyContext {
        CopyContext {
            source: self.source.clone(),
            target: self.target.clone(),
            database: DATABASE.to_owned(),
            config: self.config.clone(),
            workers: Workers::new(&self.config),
            barrier_xid,
            guard: None,
            recorder: Arc::new(self.journal.clone()),
            progress: Arc::new(self.journal.clone()),
            failpoints: Failpoints::none(),
        }
    }

    async fn tables(&self) -> Vec<(SourceTable, Stage)> {
        let control = self.source.control(DATABASE, "test").await.unwrap();
        let tables = copy::list_tables(&control).await.unwrap();
        tables.into_iter().map(|table| (table, Stage::Rows)).collect()
    }

    async fn copy(&self, archive: &Archive) -> Result<(), CopyError> {
        let report = copy::copy_database(&self.context(None), &self.tables().await, archive).await?;
        assert_eq!(report.failures, []);
        Ok(())
    }

    /// Everything after the rows.
    async fn finish(&self, archive: &Archive) {
        let target = self.restore_target();
        for report in [
            schema::restore_after_copy(&target, archive).await.unwrap(),
            schema::restore_foreign_keys(&target, archive).await.unwrap(),
            schema::restore_last(&target, archive).await.unwrap(),
        ] {
            assert_eq!(report.failures, []);
        }
        assert_eq!(materialized::refresh(&self.source, &self.target, DATABASE).await.unwrap(), []);
        schema::analyze(&self.target, DATABASE).await.unwrap();
    }

    async fn assert_same_definitions(&self) {
        let pg_dump = self.pg_dump().await;
        let lock_timeout = self.config.lock_timeout;
        let source = schema::definitions(&pg_dump, &self.source, DATABASE, lock_timeout).await.unwrap();
        let target = schema::definitions(&pg_dump, &self.target, DATABASE, lock_timeout).await.unwrap();
        for (line, (left, right)) in source.lines().zip(target.lines()).enumerate() {
            assert_eq!(left, right, "definitions differ at line {line}");
        }
        assert_eq!(source.len(), target.len());
    }

    /// A digest of every table's rows, on both sides.
    async fn assert_same_rows(&self) {
        let tables = self.tables().await;
        let (source, target) = (
            support::connect(&self.source_cluster, DATABASE).await,
            support::connect(&self.target_cluster, DATABASE).await,
        );
        for (table, _) in tables {
            let digest = format!(
                "SELECT count(*), coalesce(md5(string_agg(t::text, E'\\n' ORDER BY t::text)), '') FROM ONLY {} t",
                table.name
            );
            let read = async |client: &tokio_postgres::Client| {
                let row = client.query_one(digest.as_str(), &[]).await.unwrap();
                (row.get::<_, i64>(0), row.get::<_, String>(1))
            };
            assert_eq!(read(&source).await, read(&target).await, "{}", table.name);
        }
    }
}

/// Everything that is awkward about definitions.
const AWKWARD: &str = r#"
CREATE ROLE "App Owner"; CREATE ROLE reader;
CREATE SCHEMA "Ünïcode ""quoted""" AUTHORIZATION "App Owner";
SET search_path = "Ünïcode ""quoted""", public;
CREATE TYPE mood AS ENUM ('sad', 'ok', 'very; happy');
CREATE TYPE pair AS (a int, b mood);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TABLE "Tändrä" (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "Upper ""Case""" text, m mood, ms mood[],
  p pair, ps pair[], d positive, n numeric(10,2), b bytea, j jsonb, ts timestamptz, iv interval, f float8, r int4range,
  kept regclass, x xml);
INSERT INTO "Tändrä" ("Upper ""Case""", m, ms, p, ps, d, n, b, j, ts, iv, f, r, kept, x)
  SELECT E'tab\tnew\nline\\back ' || i, 'ok', ARRAY['sad', 'very; happy']::mood[], ROW(i, 'ok')::pair,
    ARRAY[ROW(i, 'sad')]::pair[], i, i / 7.0, decode(md5(i::text), 'hex'), jsonb_build_object('i', i),
    '2020-01-01'::timestamptz + i * interval '1 hour', i * interval '1 month 1 second', sqrt(i), int4range(i, i + 2),
    'pg_class', '<a>1</a>'
  FROM generate_series(1, 500) i;
INSERT INTO "Tändrä" ("Upper ""Case""") VALUES (NULL), (''), ('\N'), ('\.');
CREATE TABLE abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijk (a int);
INSERT INTO abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijk VALUES (1), (2);
CREATE TABLE nothing ();
INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
CREATE TABLE "empty" (a int);
CREATE TABLE dropped (a int, b int, c text); ALTER TABLE dropped DROP COLUMN b; INSERT INTO dropped VALUES (1, 'x');
CREATE TABLE parent (id int, note text); CREATE TABLE child (extra int) INHERITS (parent);
INSERT INTO parent VALUES (1, 'p'); INSERT INTO child VALUES (2, 'c', 3);
CREATE TABLE measured (day date NOT NULL, value int, PRIMARY KEY (day, value)) PARTITION BY RANGE (day);
CREATE TABLE measured_1 PARTITION OF measured FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE measured_2 PARTITION OF measured FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
CREATE INDEX ON measured (value);
INSERT INTO measured SELECT '2020-06-01'::date + i, i FROM generate_series(1, 500) i;
CREATE TABLE big (id bigint PRIMARY KEY, v text);
INSERT INTO big SELECT i * 3 - 20000, repeat(md5(i::text), 4) FROM generate_series(1, 15000) i;
CREATE INDEX big_v ON big (v); ALTER TABLE big CLUSTER ON big_v; ALTER TABLE big REPLICA IDENTITY FULL;
CREATE TABLE line (id int PRIMARY KEY, big_id bigint REFERENCES big ON DELETE CASCADE, code int);
INSERT INTO line SELECT i, i * 3 - 20000, i FROM generate_series(1, 100) i;
ALTER TABLE line ADD CONSTRAINT loose FOREIGN KEY (code) REFERENCES line (id) NOT VALID;
ALTER TABLE line ADD CONSTRAINT checked CHECK (code > 50) NOT VALID;
COMMENT ON CONSTRAINT loose ON line IS 'a comment; Type: TABLE';
CREATE UNIQUE INDEX line_code ON line (code) WHERE code > 3;
CREATE FUNCTION body() RETURNS trigger LANGUAGE plpgsql AS $f$
BEGIN
  /*

--
-- TOC entry 1 (class 0 OID 0)
-- Name: fake; Type: TABLE; Schema: public; Owner: nobody
--

  */
  RETURN NEW;
END $f$;
CREATE TRIGGER tr BEFORE UPDATE ON line FOR EACH ROW EXECUTE PROCEDURE body();
ALTER TABLE line DISABLE TRIGGER tr;
COMMENT ON TRIGGER tr ON line IS E'ends so:\nSET default_tablespace = ';
CREATE RULE ru AS ON DELETE TO line DO ALSO NOTHING;
CREATE POLICY po ON line FOR SELECT USING (code > 1); ALTER TABLE line ENABLE ROW LEVEL SECURITY;
CREATE VIEW v AS SELECT id, count(*) FROM big GROUP BY big.id, big.v;
CREATE MATERIALIZED VIEW mv AS SELECT count(*) AS n FROM v;
CREATE MATERIALIZED VIEW mw AS SELECT n + 1 AS n FROM mv; CREATE UNIQUE INDEX ON mw (n);
CREATE MATERIALIZED VIEW unfilled AS SELECT 1 AS one WITH NO DATA;
CREATE STATISTICS st ON id, v FROM big;
CREATE SEQUENCE loose_sequence INCREMENT 7;
GRANT SELECT ON line TO reader WITH GRANT OPTION;
ALTER DEFAULT PRIVILEGES FOR ROLE "App Owner" GRANT SELECT ON TABLES TO reader;
ALTER TABLE big OWNER TO "App Owner";
CREATE EVENT TRIGGER et ON ddl_command_end EXECUTE PROCEDURE pg_catalog.tsvector_update_trigger();
"#;

#[tokio::test(flavor = "multi_thread")]
async fn awkward_definitions_and_rows_arrive_the_same() {
    let rig = Rig::start();
    // An event trigger needs a function of its own type.
    let awkward = AWKWARD.replace(
        "CREATE EVENT TRIGGER et ON ddl_command_end EXECUTE PROCEDURE pg_catalog.tsvector_update_trigger();",
        "CREATE FUNCTION et() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
         CREATE EVENT TRIGGER et ON ddl_command_end EXECUTE PROCEDURE et();",
    );
    rig.make_source(&awkward).await;
    if rig.source_cluster.major() >= 12 {
        rig.on_source(
            "CREATE TABLE computed (a int, b int GENERATED ALWAYS AS (a * 2) STORED, c int);
             INSERT INTO computed (a, c) VALUES (1, 2), (3, 4);
             CREATE TABLE only_computed (b int GENERATED ALWAYS AS (1) STORED); INSERT INTO only_computed DEFAULT VALUES;",
        )
        .await;
    }
    roles::copy_roles(&rig.source, &rig.target, &rig.journal).await.unwrap();
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    rig.finish(&archive).await;
    rig.assert_same_rows().await;
    rig.assert_same_definitions().await;

    let copied = rig.journal.copied.lock().unwrap().clone();
    assert_eq!(copied["big"].rows, 15_000);
    assert_eq!(copied["nothing"].rows, 3);
    assert_eq!(copied.len(), rig.journal.indexed.lock().unwrap().len());
    assert_eq!(copied.len(), rig.journal.snapshots.lock().unwrap().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_can_be_repeated() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a SELECT i, md5(i::text) FROM generate_series(1, 20000) i;
         CREATE TABLE b (id int REFERENCES a); INSERT INTO b VALUES (7); CREATE INDEX ON b (id);",
    )
    .await;
    for _ in 0..2 {
        roles::copy_roles(&rig.source, &rig.target, &rig.journal).await.unwrap();
        // A dump of its own each time, as after a restart.
        let archive = rig.dump().await;
        rig.restore_pre_data(&archive).await;
        rig.copy(&archive).await.unwrap();
        rig.assert_same_rows().await;
    }
    let archive = rig.dump().await;
    rig.finish(&archive).await;
    rig.finish(&archive).await;
    let again = schema::restore_foreign_keys(&rig.restore_target(), &archive).await.unwrap();
    assert_eq!((again.executed, again.already_done), (0, 2));
    rig.assert_same_definitions().await;
}
