//! From a dump to copied rows, on real servers: definitions, roles and rows of the target equal the source's.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod carried;
mod cluster_rights;
mod dump;
mod grants;
#[path = "../support/objects.rs"]
mod objects;
#[path = "../support/rig.rs"]
mod rig;
mod source_crash;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use pgcutover::catalog::journal::Side;
use pgcutover::config::{Migration, WithoutIdentity};
use pgcutover::failpoint::Failpoints;
use pgcutover::migration::copy::{self, CopyContext, CopyError, Stage};
use pgcutover::migration::identity::{self, Identity, Remedy};
use pgcutover::migration::schema::{self, RestoreTarget};
use rig::{DATABASE, Rig};

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
CREATE TABLE measured (day date NOT NULL, value int) PARTITION BY RANGE (day);
CREATE TABLE measured_1 PARTITION OF measured FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE measured_2 PARTITION OF measured FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
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
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let awkward = match target.batch_execute("SELECT '<a>1</a>'::xml").await {
        Ok(()) => awkward,
        // Built without libxml: such a server cannot take what an XML column holds.
        Err(_) => awkward.replace("'<a>1</a>'", "NULL"),
    };
    rig.make_source(&awkward).await;
    if rig.source_cluster.major() >= 11 {
        rig.on_source(
            "CREATE TABLE keyed (day date, value int REFERENCES \"Ünïcode \"\"quoted\"\"\".line, PRIMARY KEY (day, value))
               PARTITION BY RANGE (day);
             CREATE TABLE keyed_1 PARTITION OF keyed FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
             CREATE TABLE keyed_2 PARTITION OF keyed FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
             CREATE INDEX ON keyed (value);
             INSERT INTO keyed SELECT '2020-06-01'::date + i, i % 100 + 1 FROM generate_series(1, 500) i;",
        )
        .await;
    }
    if rig.source_cluster.major() >= 12 {
        rig.on_source(
            "CREATE TABLE computed (a int, b int GENERATED ALWAYS AS (a * 2) STORED, c int);
             INSERT INTO computed (a, c) VALUES (1, 2), (3, 4);
             CREATE TABLE only_computed (b int GENERATED ALWAYS AS (1) STORED); INSERT INTO only_computed DEFAULT VALUES;",
        )
        .await;
    }
    rig.copy_roles().await.unwrap();
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
        rig.copy_roles().await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_locked_before_its_snapshot_is_taken() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE cut (id int PRIMARY KEY); INSERT INTO cut SELECT generate_series(1, 1000);
         CREATE TABLE early (id int PRIMARY KEY); INSERT INTO early SELECT generate_series(1, 1000);",
    )
    .await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    // Between listing and lock: nothing is read, and that is right.
    rig.on_source("TRUNCATE early").await;
    let context =
        CopyContext { failpoints: Failpoints::parse("copy.snapshot_taken=sleep:1000ms").unwrap(), ..rig.context(None) };
    let copying = tokio::spawn(async move { copy::copy_database(&context, &tables, &archive).await });
    support::wait_for("the snapshot of cut", async || rig.journal.snapshots.lock().unwrap().contains_key("cut")).await;
    // Between snapshot and COPY: it has to wait, or the copy would silently read nothing.
    rig.on_source("TRUNCATE cut").await;
    copying.await.unwrap().unwrap();
    let copied = rig.journal.copied.lock().unwrap().clone();
    assert_eq!((copied["cut"].rows, copied["early"].rows), (1000, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_definition_is_an_error_that_names_it() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE gone (id int);").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    rig.on_source("ALTER TABLE t ALTER COLUMN v TYPE bigint").await;
    let one = |name: &str| -> Vec<_> { tables.iter().filter(|(table, _)| table.name.name == name).cloned().collect() };
    let error = copy::copy_database(&rig.context(None), &one("t"), &archive).await.unwrap_err();
    assert!(matches!(&error, CopyError::Columns { difference, .. } if difference.contains("v bigint")), "{error}");
    rig.on_source("DROP TABLE gone; CREATE TABLE gone (id int)").await;
    let error = copy::copy_database(&rig.context(None), &one("gone"), &archive).await.unwrap_err();
    assert!(matches!(error, CopyError::Vanished { .. }), "another table of the same name is not published: {error}");
    rig.on_source("DROP TABLE gone").await;
    let error = copy::copy_database(&rig.context(None), &one("gone"), &archive).await.unwrap_err();
    assert!(matches!(error, CopyError::Vanished { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_waits_for_what_was_running_before_the_slot() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    let writer = support::connect(&rig.source_cluster, DATABASE).await;
    writer.batch_execute("SET application_name = 'slow writer'; BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let row = support::connect(&rig.source_cluster, DATABASE).await.query_one("SELECT txid_current()", &[]).await;
    let barrier = u64::try_from(row.unwrap().get::<_, i64>(0)).unwrap();

    let short = CopyContext {
        config: Migration { slot_timeout: Duration::from_millis(300), ..rig.config.clone() },
        ..rig.context(Some(barrier))
    };
    let error = copy::copy_database(&short, &tables, &archive).await.unwrap_err();
    assert!(matches!(&error, CopyError::Barrier { blockers, .. } if blockers.contains("slow writer")), "{error}");
    assert!(rig.journal.snapshots.lock().unwrap().is_empty());

    let context = rig.context(Some(barrier));
    let copying = tokio::spawn(async move { copy::copy_database(&context, &tables, &archive).await });
    let waiting = support::connect(&rig.source_cluster, DATABASE).await;
    support::wait_for("a reader that has given its snapshot back", async || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgcutover/%/copy' AND query = 'ROLLBACK'";
        waiting.query_one(query, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    writer.batch_execute("COMMIT").await.unwrap();
    copying.await.unwrap().unwrap();
    assert_eq!(rig.journal.copied.lock().unwrap()["t"].rows, 1);
    let snapshot = rig.journal.snapshots.lock().unwrap()["t"].clone();
    assert!(snapshot.snapshot.xmin > barrier);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_a_standby_is_not_missed() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    let admin = support::connect(&rig.source_cluster, DATABASE).await;
    let set = async |names: &str| {
        admin.batch_execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'")).await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    };
    set("nobody").await;
    let writer = support::connect(&rig.source_cluster, DATABASE).await;
    let writing = tokio::spawn(async move { writer.batch_execute("INSERT INTO t VALUES (1)").await });
    // Its commit record is written; it is not visible.
    support::wait_for("a commit that waits for a standby", async || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        admin.query_one(query, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    // Here the slot would be made: it finds that commit in the past. Then the barrier.
    admin.batch_execute("SET synchronous_commit = local").await.unwrap();
    let barrier = admin.query_one("SELECT txid_current()", &[]).await.unwrap().get::<_, i64>(0);
    let context = rig.context(Some(u64::try_from(barrier).unwrap()));
    let copying = tokio::spawn(async move { copy::copy_database(&context, &tables, &archive).await });
    support::wait_for("a reader that waits for the barrier", async || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgcutover/%/copy' AND query = 'ROLLBACK'";
        admin.query_one(query, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    set("").await;
    writing.await.unwrap().unwrap();
    copying.await.unwrap().unwrap();
    assert_eq!(rig.journal.copied.lock().unwrap()["t"].rows, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_cut_off_is_done_again_and_a_superseded_one_not_at_all() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY, v text);
         INSERT INTO t SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 20000) i",
    )
    .await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    assert!(tables[0].0.bytes > rig.config.part_bytes, "more than one part");
    let cut = CopyContext { failpoints: Failpoints::parse("copy.part_committed=hang").unwrap(), ..rig.context(None) };
    tokio::select! {
        _ended = copy::copy_database(&cut, &tables, &archive) => panic!("it hangs after a part"),
        () = support::wait_for("a part", async || cut.failpoints.is_held("copy.part_committed")) => {}
    }

    let superseded = CopyContext { guard: Some("SELECT 1 WHERE false".to_owned()), ..rig.context(None) };
    let error = copy::copy_database(&superseded, &tables, &archive).await.unwrap_err();
    assert!(matches!(error, CopyError::Superseded { .. }), "{error}");
    let target = RestoreTarget { guard: Some("SELECT 1 WHERE false"), ..rig.restore_target() };
    assert!(matches!(schema::restore_after_copy(&target, &archive).await, Err(schema::SchemaError::Superseded { .. })));

    let context = CopyContext { guard: Some("SELECT 1".to_owned()), ..rig.context(None) };
    let report = copy::copy_database(&context, &tables, &archive).await.unwrap();
    assert_eq!((report.tables, report.copied.rows), (1, 20_000));
    rig.assert_same_rows().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_is_named_and_can_be_tried_again() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int, v int); INSERT INTO t VALUES (1, 1); CREATE UNIQUE INDEX t_v ON t (v);")
        .await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    let stand_in = support::connect(&rig.target_cluster, DATABASE).await;
    stand_in.batch_execute("CREATE SEQUENCE public.t_v").await.unwrap();
    let report = copy::copy_database(&rig.context(None), &tables, &archive).await.unwrap();
    let failure = &report.failures[0];
    assert_eq!(
        (failure.kind.as_str(), failure.object.as_str(), failure.sqlstate.as_str()),
        ("INDEX", "public.t_v", "42P07")
    );
    assert!(rig.journal.indexed.lock().unwrap().is_empty(), "such a table is not ready");
    stand_in.batch_execute("DROP SEQUENCE public.t_v").await.unwrap();
    let only_indexes: Vec<_> = tables.iter().map(|(table, _)| (table.clone(), Stage::Indexes)).collect();
    let report = copy::copy_database(&rig.context(None), &only_indexes, &archive).await.unwrap();
    assert_eq!((report.tables, report.failures.len()), (0, 0));
    assert_eq!(*rig.journal.indexed.lock().unwrap(), ["t"]);
    rig.finish(&archive).await;
    rig.assert_same_definitions().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_are_found_and_mended() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE keyed (id int PRIMARY KEY);
         CREATE TABLE late (id int PRIMARY KEY DEFERRABLE);
         CREATE TABLE indexed (id int NOT NULL); CREATE UNIQUE INDEX i ON indexed (id);
         ALTER TABLE indexed REPLICA IDENTITY USING INDEX i;
         CREATE TABLE bare (id int); CREATE TABLE silent (id int PRIMARY KEY); ALTER TABLE silent REPLICA IDENTITY NOTHING;
         CREATE TABLE whole (id int); ALTER TABLE whole REPLICA IDENTITY FULL;",
    )
    .await;
    let control = rig.source.control(DATABASE, "test").await.unwrap();
    let plan = identity::plan(&control, WithoutIdentity::Full).await.unwrap();
    let found: BTreeMap<&str, &Identity> =
        plan.iter().map(|table| (table.table.name.as_str(), &table.identity)).collect();
    let expected = [
        ("bare", Identity::None),
        ("indexed", Identity::Index("i".to_owned())),
        ("keyed", Identity::PrimaryKey),
        ("late", Identity::None),
        ("silent", Identity::None),
        ("whole", Identity::Full),
    ];
    assert_eq!(found, expected.iter().map(|(name, identity)| (*name, identity)).collect());

    for table in &plan {
        identity::mend(Side::Source, &control, DATABASE, table, Duration::from_millis(200), &rig.journal)
            .await
            .unwrap();
    }
    let again = identity::plan(&control, WithoutIdentity::Refuse).await.unwrap();
    assert!(again.iter().all(|table| table.remedy == Remedy::Nothing));
    let made = rig.journal.made.lock().unwrap().clone();
    assert_eq!(made.len(), 3);
    for made in made {
        control.batch_execute(made.undo.as_deref().unwrap()).await.unwrap();
    }
    let back = identity::plan(&control, WithoutIdentity::Full).await.unwrap();
    assert_eq!(back, plan, "undone, it is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_keys_give_way_to_an_applier() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int REFERENCES a); INSERT INTO a VALUES (1);
         INSERT INTO b VALUES (1)",
    )
    .await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    // An applier that holds one table and then wants the other: a foreign key locks both.
    let applier = support::connect(&rig.target_cluster, DATABASE).await;
    applier.batch_execute("BEGIN; INSERT INTO a VALUES (2)").await.unwrap();
    let (connector, archived) = (rig.target.clone(), archive.clone());
    let adding = tokio::spawn(async move {
        let target = RestoreTarget { connector: &connector, database: DATABASE, guard: None };
        schema::restore_foreign_keys(&target, &archived).await
    });
    let watcher = support::connect(&rig.target_cluster, DATABASE).await;
    support::wait_for("a foreign key that waits", async || {
        let query = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        watcher.query_one(query, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    applier.batch_execute("INSERT INTO b VALUES (2); COMMIT").await.expect("the applier is never the victim");
    let report = adding.await.unwrap().unwrap();
    assert_eq!((report.failures, report.executed), (Vec::new(), 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_a_lost_backend_finished_is_done() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let tables = rig.tables().await;
    // The engine dies while its index is being built, and the next one starts before that is done.
    let lost = support::connect(&rig.target_cluster, DATABASE).await;
    copy::copy_database(&rig.context(None), &tables, &archive).await.unwrap();
    let last = "DELETE FROM pgcutover.restored_entry WHERE restored_at = \
                (SELECT max(restored_at) FROM pgcutover.restored_entry) RETURNING entry";
    let key: String = lost.query_one(last, &[]).await.unwrap().get(0);
    lost.batch_execute(
        "ALTER TABLE t DROP CONSTRAINT t_pkey; BEGIN; ALTER TABLE t ADD CONSTRAINT t_pkey PRIMARY KEY (id)",
    )
    .await
    .unwrap();
    let archived = archive.clone();
    let connector = rig.target.clone();
    let building = tokio::spawn(async move {
        let target = RestoreTarget { connector: &connector, database: DATABASE, guard: None };
        schema::restore_after_copy(&target, &archived).await
    });
    support::wait_for("the second build", async || {
        let query = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        lost.query_one(query, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    lost.execute("INSERT INTO pgcutover.restored_entry (entry) VALUES ($1)", &[&key]).await.unwrap();
    lost.batch_execute("COMMIT").await.unwrap();
    assert_eq!(building.await.unwrap().unwrap().failures, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_rights_suffice() {
    let mut rig = Rig::start();
    if rig.target_cluster.major() < 15 {
        eprintln!("below PostgreSQL 15 only a superuser may set session_replication_role");
        return;
    }
    let admin = support::connect(&rig.source_cluster, "postgres").await;
    admin
        .batch_execute(
            "CREATE ROLE app LOGIN; CREATE ROLE reader; CREATE ROLE migrator LOGIN REPLICATION; GRANT app TO migrator",
        )
        .await
        .unwrap();
    rig.make_source(
        "CREATE SCHEMA s AUTHORIZATION app; SET ROLE app; CREATE TABLE s.t (id int PRIMARY KEY, v text);
         INSERT INTO s.t SELECT i, i::text FROM generate_series(1, 100) i; CREATE INDEX ON s.t (v);
         CREATE TABLE s.u (id int REFERENCES s.t); INSERT INTO s.u VALUES (1); GRANT SELECT ON s.t TO reader;
         CREATE FUNCTION s.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER tr BEFORE INSERT ON s.t FOR EACH ROW EXECUTE PROCEDURE s.f();
         CREATE MATERIALIZED VIEW s.m AS SELECT count(*) FROM s.t; RESET ROLE;
         -- As up to PostgreSQL 14.
         ALTER SCHEMA public OWNER TO postgres;",
    )
    .await;
    let database = format!("\"{}\"", DATABASE.replace('"', "\"\""));
    admin
        .batch_execute(&format!(
            "ALTER DATABASE {database} OWNER TO app; ALTER DATABASE {database} SET work_mem = '5MB'"
        ))
        .await
        .unwrap();
    let there = support::connect(&rig.target_cluster, "postgres").await;
    there
        .batch_execute(
            "CREATE ROLE migrator LOGIN CREATEDB CREATEROLE; GRANT SET ON PARAMETER session_replication_role TO migrator",
        )
        .await
        .unwrap();
    rig.log_in_as("migrator");
    let reports = rig.copy_roles().await.unwrap();
    let app = reports.iter().find(|report| report.role == "app").unwrap();
    assert!(app.warnings.iter().any(|warning| warning.contains("verifier cannot be read")), "{app:?}");
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    rig.finish(&archive).await;
    rig.assert_same_rows().await;
    rig.assert_same_definitions().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_extensions_table_only_the_users_rows_are_replaced() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE TABLE config (id int, v text); INSERT INTO config VALUES (1, 'built in'), (100, 'mine'), (101, 'too')",
    )
    .await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    // As CREATE EXTENSION of a newer version would have filled it.
    let there = support::connect(&rig.target_cluster, DATABASE).await;
    there.batch_execute("INSERT INTO config VALUES (1, 'newer'), (100, 'left by an attempt before')").await.unwrap();
    let mut tables = rig.tables().await;
    (tables[0].0.of_extension, tables[0].0.filter) = (true, Some("WHERE id >= 100".to_owned()));
    let report = copy::copy_database(&rig.context(None), &tables, &archive).await.unwrap();
    assert_eq!(report.copied.rows, 2);
    let text = "SELECT string_agg(v, ',' ORDER BY id) FROM config";
    assert_eq!(there.query_one(text, &[]).await.unwrap().get::<_, String>(0), "newer,mine,too");
}

/// Foreign keys that a newer version of the extension has brought, with a column more, before any row is there.
#[tokio::test(flavor = "multi_thread")]
async fn an_extensions_table_may_be_referred_to_and_have_more_columns() {
    let rig = Rig::start();
    rig.make_source("CREATE TABLE config (id int, v text); INSERT INTO config VALUES (1, 'one'), (2, 'two')").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let there = support::connect(&rig.target_cluster, DATABASE).await;
    let newer = "ALTER TABLE config ADD UNIQUE (id), ADD more int DEFAULT 7;
                 CREATE TABLE refers (id int REFERENCES config (id)); INSERT INTO config VALUES (3, 'left by an attempt')";
    there.batch_execute(newer).await.unwrap();
    let mut tables = rig.tables().await;
    let refused = copy::copy_database(&rig.context(None), &tables, &archive).await.unwrap_err();
    assert!(refused.to_string().contains("the target alone has more integer"), "of an ordinary table it is: {refused}");
    tables[0].0.of_extension = true;
    let report = copy::copy_database(&rig.context(None), &tables, &archive).await.unwrap();
    assert_eq!(report.copied.rows, 2);
    let text = "SELECT string_agg(v || more, ',' ORDER BY id) FROM config";
    assert_eq!(there.query_one(text, &[]).await.unwrap().get::<_, String>(0), "one7,two7");
}

/// The extension itself is not needed: a table that belongs to one of its name is all that is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_pg_cron_are_not_brought_where_they_would_run() {
    let rig = Rig::start();
    rig.make_source(
        "CREATE SCHEMA cron; CREATE TABLE cron.job (jobid int PRIMARY KEY); ALTER EXTENSION plpgsql ADD TABLE cron.job;
         UPDATE pg_extension SET extconfig = ARRAY['cron.job'::regclass::oid], extcondition = ARRAY['']
          WHERE extname = 'plpgsql'; CREATE TABLE own (id int)",
    )
    .await;
    let listed = async || {
        let tables = rig.tables().await;
        tables.iter().map(|(table, _)| (table.name.to_string(), table.of_extension)).collect::<Vec<_>>()
    };
    let own = || ("\"public\".\"own\"".to_owned(), false);
    assert_eq!(listed().await, [("\"cron\".\"job\"".to_owned(), true), own()]);
    let here = support::connect(&rig.source_cluster, DATABASE).await;
    here.batch_execute("UPDATE pg_extension SET extname = 'pg_cron' WHERE extname = 'plpgsql'").await.unwrap();
    assert_eq!(listed().await, [own()]);
}
