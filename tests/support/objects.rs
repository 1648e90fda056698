//! Every kind of object that a database can hold arrives: a dump of the target equals a dump of the source.
//!
//! `objects.sql` holds one of each that PostgreSQL 10 knows; what came later stands here, by the major that brought
//! it.

use crate::rig::{DATABASE, Rig};
use crate::support;

const OBJECTS: &str = include_str!("objects.sql");

/// The major that brought it, and what it brought.
const LATER: &[(u16, &str)] = &[
    (
        11,
        "CREATE PROCEDURE app.proc(INOUT a int) LANGUAGE plpgsql AS 'BEGIN a := a + 1; END';
         COMMENT ON PROCEDURE app.proc IS 'p';
         CREATE TABLE app.hashed (id int NOT NULL, v text, PRIMARY KEY (id)) PARTITION BY HASH (id);
         CREATE TABLE app.hashed_0 PARTITION OF app.hashed FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE app.hashed_1 PARTITION OF app.hashed FOR VALUES WITH (MODULUS 2, REMAINDER 1) WITH (fillfactor = 80);
         CREATE INDEX hashed_v ON app.hashed (v) INCLUDE (id); COMMENT ON INDEX app.hashed_v IS 'on every partition';
         CREATE INDEX ON ONLY app.hashed (v DESC);
         INSERT INTO app.hashed SELECT g, 'v' FROM generate_series(1, 50) g;
         CREATE TABLE app.ranged (at int, ref int REFERENCES app.main (id) ON DELETE CASCADE) PARTITION BY RANGE (at);
         CREATE TABLE app.ranged_1 PARTITION OF app.ranged FOR VALUES FROM (0) TO (10);
         CREATE TABLE app.ranged_rest PARTITION OF app.ranged DEFAULT; INSERT INTO app.ranged VALUES (1, 100), (11, 105);
         CREATE TRIGGER on_all AFTER INSERT ON app.ranged FOR EACH ROW EXECUTE PROCEDURE app.fire();
         ALTER TABLE app.ranged_1 DISABLE TRIGGER on_all;
         ALTER INDEX app.main_expr ALTER COLUMN 1 SET STATISTICS 300;
         ALTER TABLE app.main ADD added int NOT NULL DEFAULT 5;",
    ),
    (
        12,
        "CREATE TABLE app.computed (a int, b int GENERATED ALWAYS AS (a * 2) STORED); INSERT INTO app.computed VALUES (1);
         CREATE TABLE app.to_parted (id int, hashed int REFERENCES app.hashed (id)); INSERT INTO app.to_parted VALUES (1, 2);
         CREATE ACCESS METHOD heap_too TYPE TABLE HANDLER heap_tableam_handler; COMMENT ON ACCESS METHOD heap_too IS 'a';
         CREATE TABLE app.on_am (a int) USING heap_too; INSERT INTO app.on_am VALUES (1);
         CREATE STATISTICS app.mcv (mcv) ON a, b FROM app.computed;",
    ),
    (13, "ALTER STATISTICS app.main_st SET STATISTICS 200; CREATE TYPE app.again; CREATE TRIGGER before_all BEFORE INSERT ON app.ranged FOR EACH ROW EXECUTE FUNCTION app.fire();"),
    (
        14,
        "CREATE FUNCTION app.body(a int) RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT a + 1; END;
         CREATE TYPE app.spans AS RANGE (SUBTYPE = int, MULTIRANGE_TYPE_NAME = app.many_spans);
         CREATE TABLE app.multi (a int4multirange, b app.many_spans, c text COMPRESSION pglz);
         INSERT INTO app.multi VALUES ('{[1,2), [5,6)}', '{[1,3)}', repeat('x', 5000));
         CREATE STATISTICS app.expr_st ON (a + b) FROM app.computed;
         CREATE FUNCTION app.sub(s jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT s';
         CREATE TABLE app.looked_up (id int PRIMARY KEY, b int); INSERT INTO app.looked_up VALUES (1, 10), (2, 20);
         CREATE FUNCTION app.by_key(x int) RETURNS int LANGUAGE sql IMMUTABLE
             BEGIN ATOMIC SELECT k.b FROM app.looked_up k WHERE k.id = x GROUP BY k.id; END;
         CREATE TABLE app.by_keys (x int); INSERT INTO app.by_keys VALUES (1), (2), (3);
         CREATE INDEX by_keys_b ON app.by_keys (app.by_key(x)); COMMENT ON INDEX app.by_keys_b IS 'needs a function that needs a key';",
    ),
    (
        15,
        "CREATE TABLE app.nulls (a int, b int, c int, UNIQUE NULLS NOT DISTINCT (a));
         ALTER TABLE app.nulls ADD PRIMARY KEY (b), ADD FOREIGN KEY (a, c) REFERENCES app.pairs (a, c) ON DELETE SET NULL (c);
         INSERT INTO app.nulls VALUES (NULL, 1, NULL);
         CREATE VIEW app.invoker WITH (security_invoker) AS SELECT * FROM app.nulls;",
    ),
    (17, "ALTER TABLE app.computed ALTER b SET EXPRESSION AS (a * 3);"),
    (
        18,
        "CREATE TABLE app.newest (a int, b int GENERATED ALWAYS AS (a * 2) VIRTUAL, r int4range,
             CONSTRAINT there NOT NULL a NO INHERIT, CONSTRAINT loose CHECK (a > 0) NOT ENFORCED);
         INSERT INTO app.newest (a) VALUES (1);
         CREATE TABLE app.unsure (a int); ALTER TABLE app.unsure ADD CONSTRAINT not_yet NOT NULL a NOT VALID;",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_object_arrives() {
    let rig = Rig::start();
    rig.make_source(OBJECTS).await;
    let major = rig.source_cluster.major();
    for (since, sql) in LATER.iter().filter(|(since, _)| *since <= major) {
        if *since == 15 {
            rig.on_source("CREATE TABLE app.pairs (a int, c int, PRIMARY KEY (a, c))").await;
        }
        rig.on_source(sql).await;
    }
    // Some servers are built without ICU. They list the collation `unicode` all the same, but none that initdb found.
    let icu = "SELECT EXISTS (SELECT FROM pg_collation WHERE collname = 'und-x-icu')";
    let mut with_icu = major >= 12;
    for cluster in [&rig.source_cluster, &rig.target_cluster] {
        with_icu &= support::connect(cluster, "template1").await.query_one(icu, &[]).await.unwrap().get::<_, bool>(0);
    }
    if with_icu {
        let blind = "CREATE COLLATION app.blind (PROVIDER = icu, LOCALE = 'und-u-ks-level2', DETERMINISTIC = false)";
        rig.on_source(blind).await;
    }
    rig.copy_roles().await.unwrap();
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    rig.finish(&archive).await;
    rig.assert_same_rows().await;
    rig.assert_same_definitions().await;

    // What no dump tells.
    let validated = "SELECT count(*) FILTER (WHERE convalidated), count(*) FROM pg_constraint WHERE contype = 'f'";
    let source = support::connect(&rig.source_cluster, DATABASE).await;
    let target = support::connect(&rig.target_cluster, DATABASE).await;
    let of = |row: tokio_postgres::Row| (row.get::<_, i64>(0), row.get::<_, i64>(1));
    let (there, here) =
        (source.query_one(validated, &[]).await.unwrap(), target.query_one(validated, &[]).await.unwrap());
    assert_eq!(of(there), of(here), "validated foreign keys");
    let statistics = "SELECT coalesce(string_agg(c.oid::regclass::text, ', '), '') FROM pg_class c
                        JOIN pg_namespace n ON n.oid = c.relnamespace
                       WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^(pg|information|pgcutover)' AND c.relnatts > 0
                         AND pg_relation_size(c.oid) > 0 AND NOT EXISTS (SELECT FROM pg_stats s
                             WHERE s.schemaname = n.nspname AND s.tablename = c.relname)";
    assert_eq!(target.query_one(statistics, &[]).await.unwrap().get::<_, String>(0), "", "every table is analysed");
}
