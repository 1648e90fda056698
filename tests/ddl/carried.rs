//! `ddl = "apply"` without an engine: every kind of command, in stream order, and everything that is refused.

use std::time::Duration;

use pgcutover::config::{self, Environment};
use pgcutover::demo::cluster::{Cluster, Installation};
use pgcutover::demo::compare;
use pgcutover::migration::ddl::carry::{self, Carry};
use pgcutover::migration::schema;
use pgcutover::migration::stream::{StreamError, StreamStatus};
use pgcutover::sqlstate;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::streamed::Streamed;
use crate::support::{self, connect, connect_with, installations};

const TABLES: &str = "
CREATE ROLE owner; CREATE ROLE reader;
CREATE TABLE a (id int PRIMARY KEY, v text, n int);
CREATE TABLE b (id int PRIMARY KEY, a int);
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE TABLE moods (id int PRIMARY KEY, m mood);
CREATE TABLE ranged (at timestamptz) PARTITION BY RANGE (at);
CREATE DOMAIN stamped AS timestamptz DEFAULT now();
CREATE FUNCTION \"next-no\"() RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
CREATE FUNCTION \"näxt\"() RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN new; END $$;
CREATE TRIGGER kept BEFORE UPDATE ON a FOR EACH ROW EXECUTE PROCEDURE nothing();
CREATE TABLE stamps (id int PRIMARY KEY, at stamped);
";

/// What the databases have and what flows between them.
struct Carried {
    bench: Streamed,
    source: Client,
    status: StreamStatus,
    running: JoinHandle<StreamError>,
}

impl Carried {
    async fn start() -> Self {
        let found = installations();
        Self::between(found.pair().expect("checked by installations()")).await
    }

    async fn between(majors: (&Installation, &Installation)) -> Self {
        let bench = Streamed::between(majors, TABLES, &["a", "b", "moods"]).await;
        let mut maker = bench.context.source.control("shop", "test").await.expect("source");
        let target = bench.context.target.control("shop", "test").await.expect("target");
        let carry =
            Carry { migration: "m", publication: "p", full_identity: true, target_version: target.version_num() };
        carry::make(&mut maker, carry).await.expect("made");
        maker.batch_execute("ALTER PUBLICATION p ADD TABLE pgcutover.command").await.expect("published");
        let source = connect(&bench.source, "shop").await;
        source.batch_execute("INSERT INTO a SELECT g, 'v', g FROM generate_series(1, 50) g").await.expect("filled");
        let (status, running) = bench.run();
        let carried = Self { bench, source, status, running };
        carried.drain("begun").await;
        carried
    }

    async fn open(&self) {
        let maker = self.bench.context.source.control("shop", "test").await.expect("source");
        assert!(carry::set_gate(&*maker, None).await.expect("set"));
    }

    async fn drain(&self, nonce: &str) {
        let source = connect(&self.bench.source, "shop").await;
        source.execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce]).await.expect("marker");
        let mut applied = self.status.applied.subscribe();
        let wanted = applied.wait_for(|applied| applied.has_reached(nonce));
        let reached = tokio::time::timeout(support::PATIENCE, wanted).await;
        assert!(reached.is_ok_and(|reached| reached.is_ok()), "{nonce}: {:?}", self.status.trouble.borrow());
    }

    async fn run(&self, sql: &str) {
        self.source.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    }

    async fn refused(&self, sql: &str, why: &str) {
        let error = self.source.batch_execute(sql).await.expect_err(sql);
        let told = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
        assert!(told.message().contains("is refused while the database is being moved"), "{sql}: {error:?}");
        assert!(told.message().contains(why), "{sql}: {}", told.message());
        assert_eq!(told.code().code(), "55000", "{sql}");
        self.source.batch_execute("ROLLBACK").await.expect("rolled back");
    }

    /// The dumps and the rows of both.
    async fn assert_equal(&self) {
        let (source, target) = (&self.bench.source, &self.bench.target);
        let (from, to) = (connect(source, "shop").await, connect(target, "shop").await);
        let tools = installations().newest_with_client_tools().map(|installation| installation.major);
        if tools.is_some_and(|major| major >= target.major()) {
            let (here, there) = (definitions(self, source).await, definitions(self, target).await);
            for (left, right) in here.iter().zip(&there) {
                assert_eq!(left, right);
            }
            assert_eq!(here.len(), there.len());
        } else {
            eprintln!("pg_dump is too old to read the target: what it has is compared by name and type");
            let (from, to) = (connect(source, "shop").await, connect(target, "shop").await);
            let found = compare::differences(&from, &to).await.expect("read");
            // Sequences are brought over by a cutover.
            let found: Vec<_> = found.into_iter().filter(|line| !line.starts_with("sequence")).collect();
            assert_eq!(found, Vec::<String>::new());
        }
        let tables = "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE c.relkind = 'r' AND n.nspname !~ '^pg' AND n.nspname <> 'information_schema' ORDER BY 1";
        for row in from.query(tables, &[]).await.expect("listed") {
            let table: &str = row.get(0);
            let digest =
                format!("SELECT coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '') FROM ONLY {table} t");
            let read = async |client: &Client| client.query_one(&digest, &[]).await.expect("read").get::<_, String>(0);
            assert_eq!(read(&from).await, read(&to).await, "{table}");
        }
    }
}

/// Line by line, without what the source has for as long as it is followed.
async fn definitions(carried: &Carried, cluster: &Cluster) -> Vec<String> {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("pgcutover.toml");
    let server = |name: &str, cluster: &Cluster| {
        format!("[{name}]\nhost = {:?}\nport = {}\nuser = \"postgres\"\n", cluster.host(), cluster.port())
    };
    let (source, target) = (&carried.bench.source, &carried.bench.target);
    let listen = "[listen]\naddress = \"127.0.0.1:6432\"\n";
    let text = format!("{listen}{}{}", server("source", source), server("target", target));
    std::fs::write(&path, text).expect("written");
    let mut config = config::load(Some(&path), &Environment::default()).unwrap_or_else(|error| panic!("{error}"));
    // The newest reads servers of every major.
    config.migration.bindir = installations().newest_with_client_tools().map(|tools| tools.bindir.clone());
    let majors = [u32::from(source.major()), u32::from(target.major())];
    let pg_dump = schema::find_pg_dump(&config.migration, majors[0], majors[1]).await.expect("found");
    let connector =
        if std::ptr::eq(cluster, source) { &carried.bench.context.source } else { &carried.bench.context.target };
    let text = schema::definitions(&pg_dump, connector, "shop", Duration::from_secs(5)).await.expect("dumped");
    let entries = text.split("\n-- ").filter(|entry| !entry.starts_with("EVENT TRIGGER pgcutover"));
    let lines = entries.flat_map(|entry| entry.lines().map(unnamed).collect::<Vec<_>>());
    lines.filter(|line| !line.is_empty() && !line.contains("REPLICA IDENTITY FULL")).collect()
}

/// PostgreSQL 18 names what says NOT NULL, by what a table was called when it was made.
fn unnamed(line: &str) -> String {
    match line.split_once(" CONSTRAINT ") {
        Some((before, named)) => match named.split_once("_not_null NOT NULL") {
            Some((_, after)) => format!("{before} NOT NULL{after}"),
            None => line.to_owned(),
        },
        None => line.to_owned(),
    }
}

/// Each in a transaction of its own, with rows written between them that only fit behind them.
const COMMANDS: &[&str] = &[
    "ALTER TABLE a ADD COLUMN added text",
    "UPDATE a SET added = 'x' WHERE id < 5",
    "ALTER TABLE a ADD COLUMN filled int NOT NULL DEFAULT 7",
    "INSERT INTO a (id, v, n) VALUES (100, 'after', 1)",
    "ALTER TABLE a ALTER COLUMN n TYPE bigint",
    "UPDATE a SET n = 5000000000 WHERE id = 100",
    "ALTER TABLE a ALTER COLUMN n TYPE numeric(20, 2) USING n * 2",
    "ALTER TABLE a RENAME COLUMN v TO renamed",
    "UPDATE a SET renamed = 'y' WHERE id = 2",
    "ALTER TABLE a DROP COLUMN filled",
    "ALTER TABLE a ALTER COLUMN added SET DEFAULT now()::text, ALTER COLUMN renamed SET NOT NULL",
    "ALTER TABLE a ADD CONSTRAINT positive CHECK (id > 0)",
    "CREATE TABLE made (id serial PRIMARY KEY, a int REFERENCES a, m mood DEFAULT 'sad')",
    "INSERT INTO made (a) VALUES (1), (2)",
    "CREATE TABLE keyless (x int, y text)",
    "INSERT INTO keyless VALUES (1, 'a'), (1, 'a'), (2, 'b')",
    "UPDATE keyless SET y = 'c' WHERE x = 2",
    "DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless)",
    "ALTER TYPE mood ADD VALUE 'new'",
    "INSERT INTO moods VALUES (1, 'new')",
    "ALTER TYPE mood RENAME TO temper",
    "INSERT INTO moods VALUES (2, 'glad')",
    "UPDATE made SET m = 'new' WHERE id = 1",
    "ALTER TABLE moods RENAME TO tempers",
    "INSERT INTO tempers VALUES (3, 'sad')",
    "CREATE SCHEMA side CREATE TABLE inner_one (id int PRIMARY KEY) CREATE VIEW inner_view AS SELECT 1 AS one",
    "INSERT INTO side.inner_one VALUES (1)",
    "SET search_path = side, public",
    "CREATE TABLE found_by_path (id int PRIMARY KEY)",
    "INSERT INTO found_by_path VALUES (1)",
    "RESET search_path",
    "SET ROLE owner",
    "RESET ROLE",
    "GRANT ALL ON SCHEMA public TO owner",
    "SET ROLE owner",
    "CREATE TABLE owned (id int PRIMARY KEY, at date DEFAULT '2020-01-02')",
    "INSERT INTO owned VALUES (1)",
    "RESET ROLE",
    "CREATE UNIQUE INDEX ON a (renamed, id)",
    "CREATE INDEX \"odd; name\" ON a ((lower(renamed))) -- a comment; with one",
    "ALTER INDEX \"odd; name\" RENAME TO even",
    "DROP INDEX even",
    "CREATE SEQUENCE counted START 5",
    "ALTER SEQUENCE counted INCREMENT 3",
    "CREATE VIEW seen AS SELECT id FROM a WHERE renamed <> ';'",
    "CREATE OR REPLACE VIEW seen AS SELECT id, added FROM a",
    "CREATE FUNCTION two() RETURNS int LANGUAGE plpgsql AS $body$ DECLARE x int := 1; BEGIN RETURN x + 1; END $body$",
    "CREATE OR REPLACE FUNCTION early() RETURNS int LANGUAGE sql AS 'SELECT 1; SELECT 2'",
    "CREATE TRIGGER touched BEFORE UPDATE ON a FOR EACH ROW EXECUTE PROCEDURE nothing()",
    "ALTER TABLE a DISABLE TRIGGER touched",
    "ALTER TABLE stamps ADD CONSTRAINT late CHECK (at > '2000-01-01')",
    "CREATE RULE two AS ON UPDATE TO tempers DO ALSO (SELECT (1); SELECT 2)",
    "ALTER TABLE a ENABLE ROW LEVEL SECURITY",
    "CREATE POLICY mine ON a USING (id > 1)",
    "COMMENT ON TABLE a IS E'it\\'s; a comment'",
    "GRANT SELECT ON a TO reader",
    "REVOKE SELECT ON a FROM reader",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO reader",
    "/* first; */ CREATE TABLE /* here */ commented (id int PRIMARY KEY);",
    "INSERT INTO commented VALUES (1)",
    "BEGIN",
    "INSERT INTO b VALUES (1, 1)",
    "ALTER TABLE b ADD COLUMN inside text",
    "INSERT INTO b VALUES (2, 2, 'in the same transaction')",
    "CREATE TABLE together (id int PRIMARY KEY, v text)",
    "INSERT INTO together SELECT g, 'v' FROM generate_series(1, 100) g",
    "ALTER TABLE together ALTER COLUMN v TYPE varchar(10)",
    "UPDATE together SET v = 'w' WHERE id % 2 = 0",
    "ALTER TABLE b DROP COLUMN a",
    "UPDATE b SET inside = 'twice' WHERE id = 1",
    "COMMIT",
    "BEGIN",
    "SAVEPOINT s",
    "ALTER TABLE b ADD COLUMN never text",
    "INSERT INTO b VALUES (3, 'x', 'y')",
    "ROLLBACK TO SAVEPOINT s",
    "INSERT INTO b VALUES (3, 'x')",
    "COMMIT",
    "CREATE TABLE parts (id int, k int, PRIMARY KEY (id, k)) PARTITION BY LIST (k)",
    "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)",
    "CREATE TABLE parts_2 (id int, k int, PRIMARY KEY (id, k))",
    "INSERT INTO parts_2 VALUES (1, 2)",
    "ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES IN (2)",
    "INSERT INTO parts VALUES (1, 1), (2, 2)",
    "UPDATE parts SET k = 2 WHERE k = 1 AND id = 7",
    "ALTER TABLE keyless ADD PRIMARY KEY (x)",
    "UPDATE keyless SET y = 'keyed' WHERE x = 1",
    "CREATE TEMP TABLE passing AS SELECT 1 AS x",
    "CREATE INDEX ON passing (x)",
    "DROP TABLE passing",
    "CREATE TABLE IF NOT EXISTS a (id int)",
    "DROP TABLE IF EXISTS nowhere",
    "DROP TABLE commented",
    "CREATE TABLE commented (other text PRIMARY KEY)",
    "INSERT INTO commented VALUES ('made again')",
    "TRUNCATE together",
    "DROP VIEW seen",
    "DROP FUNCTION two()",
    "DROP SCHEMA side CASCADE",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_command_is_executed_where_it_stands() {
    let carried = Carried::start().await;
    carried.open().await;
    // PostgreSQL 10 has no key on a partitioned table, and its stream brings no TRUNCATE.
    let old = carried.bench.source.major() < 11;
    let newer = |sql: &str| sql.contains("parts") || sql.starts_with("TRUNCATE");
    for (number, sql) in COMMANDS.iter().enumerate().filter(|(_, sql)| !old || !newer(sql)) {
        carried.run(sql).await;
        // Most arrive together with others, some alone.
        if number % 7 == 0 && !sql.starts_with("SET") {
            carried.drain(&format!("after {number}")).await;
        }
    }
    carried.drain("all").await;
    carried.assert_equal().await;
    assert!(carried.status.applied.borrow().alterations > 40);

    // The same is found when the stream goes on in a new session.
    carried.running.abort();
    let (status, running) = carried.bench.run();
    let carried = Carried { status, running, ..carried };
    carried.run("ALTER TABLE a ADD COLUMN last int").await;
    carried.run("UPDATE a SET last = id, added = NULL; INSERT INTO made (a) VALUES (3)").await;
    carried.drain("again").await;
    carried.assert_equal().await;
    carried.running.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_carried_is_refused_by_name() {
    let carried = Carried::start().await;
    carried.refused("ALTER TABLE a ADD COLUMN early int", "tables are being copied").await;
    carried.open().await;
    carried.run("CREATE TEMP TABLE passing (id int); CREATE TEMP TABLE \"odd; one\" (id int)").await;
    for (sql, why) in [
        ("CREATE TABLE c AS SELECT 1 AS x", "this kind of command is not carried over"),
        ("SELECT 1 AS x INTO c", "this kind of command is not carried over"),
        ("CREATE MATERIALIZED VIEW m AS SELECT 1 AS x", "this kind of command is not carried over"),
        ("CREATE PUBLICATION theirs FOR ALL TABLES", "this kind of command is not carried over"),
        ("CREATE TABLE c (id int); CREATE TABLE d (id int)", "several commands were sent at once"),
        ("CREATE TABLE c (id int); SELECT 1", "several commands were sent at once"),
        ("CREATE TABLE c (id int) /* outer /* inner */ */", "cannot be told what the command consists of"),
        ("DO $$ BEGIN CREATE TABLE c (id int); END $$", "it was run by another command"),
        ("CREATE INDEX CONCURRENTLY i ON a (n)", "CONCURRENTLY"),
        ("GRANT SELECT ON a TO SESSION_USER", "SESSION_USER is another role"),
        ("CREATE TABLE bounded PARTITION OF ranged FOR VALUES FROM (now()) TO ('2999-01-01')", "the bounds may differ"),
        ("ALTER TYPE mood RENAME VALUE 'sad' TO 'low'", "transactions that are open"),
        ("ALTER TABLE a ADD COLUMN r float8 DEFAULT random()", "random()"),
        ("ALTER TABLE a ADD COLUMN r timestamptz DEFAULT now()", "now"),
        ("ALTER TABLE a ADD COLUMN r timestamptz DEFAULT CURRENT_TIMESTAMP", "current_timestamp"),
        ("ALTER TABLE a ADD COLUMN r serial", "the numbers that the rows are given may differ"),
        (
            "ALTER TABLE a ADD COLUMN r int GENERATED ALWAYS AS IDENTITY",
            "the numbers that the rows are given may differ",
        ),
        ("ALTER TABLE a ADD COLUMN r stamped", "domain has a default"),
        ("ALTER TABLE a ALTER COLUMN n TYPE float8 USING random() * n", "random()"),
        ("ALTER TABLE a ADD COLUMN r \"serial\"", "the numbers that the rows are given may differ"),
        ("ALTER TABLE a ADD COLUMN r int DEFAULT \"next-no\"()", "next-no()"),
        ("ALTER TABLE a ADD COLUMN r int DEFAULT public.\"näxt\" ()", "näxt()"),
        ("ALTER TABLE a ADD COLUMN r int DEFAULT näxt()", "näxt()"),
        ("ALTER TABLE a ADD COLUMN r float8 DEFAULT random/* or so */()", "random()"),
        ("ALTER TABLE a ENABLE ALWAYS TRIGGER kept", "a second time on the target"),
        ("ALTER TABLE a ENABLE REPLICA TRIGGER kept", "a second time on the target"),
        ("DROP OWNED BY reader", "this kind of command is not carried over"),
        ("CREATE INDEX CONCURRENTLY i ON a (n) /* outer /* inner */ */", "CONCURRENTLY"),
        ("CREATE RULE none AS ON DELETE TO b DO NOTHING; SELECT (1)", "several commands were sent at once"),
        ("ALTER SCHEMA public RENAME TO private", "schema of another name"),
        ("CREATE VIEW c AS SELECT 'passing' AS name", "it may be about a temporary object"),
        ("GRANT SELECT ON passing TO reader", "it may be about a temporary object"),
        ("COMMENT ON TABLE a IS 'odd; one'", "it may be about a temporary object"),
        ("DROP TABLE b, passing", "it is about temporary objects and others"),
    ] {
        carried.refused(sql, why).await;
    }
    carried.run("SET standard_conforming_strings = off").await;
    carried.refused(r"COMMENT ON TABLE a IS 'a\''; DROP TABLE b --'", "several commands were sent at once").await;
    carried.run(r"COMMENT ON TABLE a IS 'it\'s; one command'").await;
    carried.run("SET standard_conforming_strings = on").await;

    // Names that only contain one are no such names.
    carried.run("COMMENT ON TABLE b IS 'surpassing'").await;

    // What a caller's search_path leads to is never run with our rights.
    let trap = "CREATE SCHEMA evil; CREATE FUNCTION evil.trap(text, text) RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN IF current_user = 'postgres' THEN CREATE TEMP TABLE sprung (x int); END IF; RETURN false; END $$;
                CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, PROCEDURE = evil.trap);
                GRANT USAGE ON SCHEMA evil TO PUBLIC";
    for cluster in [&carried.bench.source, &carried.bench.target] {
        let mut config = cluster.config("shop");
        config.application_name("pgcutover/test");
        connect_with(&config).await.batch_execute(trap).await.expect("set");
    }
    carried.run("GRANT CREATE ON SCHEMA public TO reader").await;
    carried.run("SET ROLE reader").await;
    carried.run("SET search_path = evil, pg_catalog, public").await;
    carried.run("CREATE TABLE public.bait (id int PRIMARY KEY)").await;
    carried.run("RESET search_path").await;
    carried.run("RESET ROLE").await;
    let sprung = "SELECT to_regclass('pg_temp.sprung') IS NULL";
    assert!(carried.source.query_one(sprung, &[]).await.expect("read").get::<_, bool>(0));

    // Nobody but the function writes commands, and nobody calls it.
    let forged = "INSERT INTO pgcutover.command (xid, statement_at, tag, command, role, settings)
                  VALUES (1, now(), 'DROP TABLE', 'DROP TABLE a', 'postgres', '{}')";
    for sql in [forged, "SELECT pgcutover.record_ddl('ddl_command_end', 'DROP TABLE', 'postgres', 'none', '{}')"] {
        carried.run("SET ROLE reader").await;
        let error = carried.source.batch_execute(sql).await.expect_err(sql);
        assert_eq!(error.code().expect("the server's").code(), sqlstate::INSUFFICIENT_PRIVILEGE, "{error}");
        carried.run("RESET ROLE").await;
    }
    carried.drain("refused").await;
    carried.run("DROP TABLE passing, \"odd; one\"").await;
    carried.assert_equal().await;
    carried.running.abort();
}

/// The first comes through the stream as the key (tenant), which many rows share.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_table_is_let_in_whose_rows_cannot_be_told_apart() {
    let found = installations();
    // Generated columns come with PostgreSQL 12, virtual ones with 18.
    let (oldest, newest) = (found.all().iter().find(|one| one.major >= 12), found.newest_with_client_tools());
    let newest = newest.expect("checked by installations()");
    let mut sources = vec![oldest.unwrap_or(newest), newest];
    sources.dedup_by_key(|installation| installation.major);
    for source in sources.into_iter().filter(|source| source.major >= 12) {
        let carried = Carried::between((source, newest)).await;
        carried.open().await;
        let table = "CREATE TABLE o (tenant int, n int, code int GENERATED ALWAYS AS (n * 10) STORED,
                     PRIMARY KEY (tenant, code))";
        carried.refused(table, "rows of public.o would be identified by the generated column code").await;
        let table = "CREATE TABLE c (id int PRIMARY KEY, n int, g int NOT NULL GENERATED ALWAYS AS (n) STORED UNIQUE)";
        carried.run(table).await;
        let index = "ALTER TABLE c REPLICA IDENTITY USING INDEX c_g_key";
        carried.refused(index, "rows of public.c would be identified by the generated column g").await;
        carried.run("CREATE TABLE keyless (a int)").await;
        if source.major >= 18 {
            let table = "CREATE TABLE v (a int, b int GENERATED ALWAYS AS (a + 1))";
            carried.refused(table, "its virtual column b is in no publication").await;
            let column = "ALTER TABLE keyless ADD b int GENERATED ALWAYS AS (a) VIRTUAL";
            carried.refused(column, "public.keyless is identified by whole rows").await;
            carried.run("CREATE TABLE v (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a + 1))").await;
            carried.run("INSERT INTO v VALUES (1), (2); UPDATE v SET a = 3 WHERE a = 1").await;
        }
        let rows = "INSERT INTO c (id, n) VALUES (1, 1), (2, 2); INSERT INTO keyless VALUES (1), (1), (2);
                    UPDATE c SET n = 5 WHERE id = 2; DELETE FROM keyless WHERE a = 2";
        carried.run(rows).await;
        carried.drain("written").await;
        carried.assert_equal().await;
        carried.running.abort();
    }
}

/// What the target does not take stops the stream before anything behind it is applied, and is tried again as it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_the_target_refuses_stops_the_stream() {
    let carried = Carried::start().await;
    carried.open().await;
    let target = connect(&carried.bench.target, "shop").await;
    target.batch_execute("DROP ROLE reader").await.expect("dropped");
    carried.run("BEGIN").await;
    carried.run("UPDATE a SET v = 'before'").await;
    carried.run("GRANT SELECT ON a TO reader").await;
    carried.run("UPDATE a SET v = 'behind'").await;
    carried.run("COMMIT").await;
    let error = carried.running.await.expect("no panic");
    assert_eq!(error.code(), "ddl");
    let told = format!("{error}: {:?}", std::error::Error::source(&error));
    assert!(
        !error.is_transient() && told.contains("GRANT") && told.contains("number 1 in pgcutover.command"),
        "{told}"
    );
    let changed = "SELECT count(*) FROM a WHERE v <> 'v'";
    assert_eq!(target.query_one(changed, &[]).await.expect("read").get::<_, i64>(0), 0, "nothing of it is there");
    target.batch_execute("CREATE ROLE reader").await.expect("mended");
    let (status, running) = carried.bench.run();
    let carried = Carried { status, running, ..carried };
    carried.drain("mended").await;
    carried.assert_equal().await;
    carried.running.abort();
}
