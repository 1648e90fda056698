//! For each rule: what makes it speak, what it must then name, and what mends it.

/// On which server, and in which database, a statement runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The database that is migrated.
    Source,
    /// The control database.
    Target,
}

/// How a rule becomes silent again.
#[derive(Clone, Copy, Debug)]
pub enum Mend {
    /// By the statements that the rule itself names.
    Printed,
    /// By these, where the rule names none: they do what its fix says in words.
    By(At, &'static [&'static str]),
}

/// One rule that statements make speak. `{home}` stands for a directory that the server may write to.
pub struct Line {
    pub code: &'static str,
    pub at: At,
    pub breaks: &'static [&'static str],
    /// What the evidence must name.
    pub names: &'static str,
    pub mend: Mend,
    /// First and last major of the source on which it can be broken.
    pub majors: (u16, u16),
}

const fn line(code: &'static str, breaks: &'static [&'static str], names: &'static str, mend: Mend) -> Line {
    Line { code, at: At::Source, breaks, names, mend, majors: (10, u16::MAX) }
}

/// Rules about what is in the databases, all at once, as superusers.
pub const LINES: &[Line] = &[
    // First, because others wait for it.
    line(
        "prepared_transactions",
        &[
            "CREATE TABLE booked (id int PRIMARY KEY)",
            "BEGIN; INSERT INTO booked VALUES (2); PREPARE TRANSACTION 'forgotten'",
        ],
        "forgotten in database",
        Mend::Printed,
    ),
    line("large_objects", &["SELECT lo_from_bytea(4711, 'x')"], "1 large objects, ", Mend::Printed),
    line(
        "unlogged_tables",
        &["CREATE UNLOGGED TABLE \"Un\" (id int PRIMARY KEY)"],
        "\"public\".\"Un\", ",
        Mend::Printed,
    ),
    line(
        "extension_tables",
        &[
            "CREATE TABLE kept (id int PRIMARY KEY)",
            "INSERT INTO kept VALUES (1)",
            "ALTER EXTENSION plpgsql ADD TABLE kept",
        ],
        "public.kept of ",
        Mend::Printed,
    ),
    line(
        "temporary_tables",
        &["CREATE TEMPORARY TABLE passing (id int)"],
        ".passing",
        Mend::By(At::Source, &["DROP TABLE passing"]),
    ),
    line(
        "always_triggers",
        &[
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            "CREATE TRIGGER always BEFORE INSERT ON t FOR EACH ROW EXECUTE PROCEDURE f()",
            "ALTER TABLE t ENABLE ALWAYS TRIGGER always",
            "CREATE TRIGGER replica BEFORE INSERT ON t FOR EACH ROW EXECUTE PROCEDURE f()",
            "ALTER TABLE t ENABLE REPLICA TRIGGER replica",
            "CREATE RULE quiet AS ON DELETE TO t DO ALSO NOTHING",
            "ALTER TABLE t ENABLE ALWAYS RULE quiet",
        ],
        "rule quiet on public.t",
        Mend::Printed,
    ),
    Line {
        majors: (10, 11),
        ..line("tables_with_oids", &["CREATE TABLE old (id int PRIMARY KEY) WITH OIDS"], "public.old", Mend::Printed)
    },
    Line {
        majors: (10, 11),
        ..line(
            "removed_types",
            &["CREATE TABLE older (id int PRIMARY KEY, a abstime, r reltime, i tinterval, l abstime[])"],
            "public.older.a",
            Mend::Printed,
        )
    },
    line(
        "invalid_indexes",
        &[
            "CREATE INDEX broken ON t (id)",
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken'::regclass",
        ],
        "public.broken",
        Mend::Printed,
    ),
    line(
        "subscriptions",
        &[
            "CREATE SUBSCRIPTION incoming CONNECTION 'host=127.0.0.1 port=1' PUBLICATION p WITH (connect = false)",
            "ALTER SUBSCRIPTION incoming ENABLE",
        ],
        "incoming",
        Mend::Printed,
    ),
    line("publications", &["CREATE PUBLICATION theirs FOR TABLE t"], "theirs", Mend::Printed),
    line(
        "publications_of_all_tables",
        &["CREATE PUBLICATION everything FOR ALL TABLES WITH (publish = 'insert')"],
        "everything",
        Mend::By(At::Source, &["DROP PUBLICATION IF EXISTS everything"]),
    ),
    line(
        "shared_labels",
        &[
            "CREATE ROLE masked",
            "INSERT INTO pg_shseclabel SELECT oid, 'pg_authid'::regclass, 'anon', 'MASKED' FROM pg_roles WHERE rolname = 'masked'",
        ],
        "ROLE masked, by provider anon",
        Mend::By(At::Source, &["DELETE FROM pg_shseclabel"]),
    ),
    line(
        "foreign_tables",
        &["CREATE FOREIGN DATA WRAPPER wrapper", "CREATE SERVER elsewhere FOREIGN DATA WRAPPER wrapper"],
        "server elsewhere",
        Mend::By(At::Source, &["DROP SERVER elsewhere"]),
    ),
    line(
        "event_triggers",
        &[
            "CREATE FUNCTION e() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'",
            "CREATE EVENT TRIGGER watching ON sql_drop WHEN TAG IN ('DROP VIEW') EXECUTE PROCEDURE e()",
            "ALTER EVENT TRIGGER watching ENABLE ALWAYS",
        ],
        "watching",
        Mend::Printed,
    ),
    line(
        "wraparound",
        &[
            "UPDATE pg_database SET datfrozenxid = '2694967296', datminmxid = '2694967296' WHERE datname = current_database()",
        ],
        "multixact ids are used of 2147483648",
        Mend::Printed,
    ),
    line(
        "index_search_path",
        &[
            "CREATE FUNCTION keyed_by(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1; END'",
            "CREATE INDEX by_function ON t (keyed_by(id))",
        ],
        "by_function calls public.keyed_by(integer)",
        Mend::Printed,
    ),
    line(
        "catalogue_grants",
        &["CREATE ROLE curious", "GRANT SELECT ON pg_authid TO curious"],
        "SELECT to curious on pg_authid",
        Mend::Printed,
    ),
    Line {
        majors: (11, u16::MAX),
        ..line(
            "hash_of_enum",
            &[
                "CREATE TYPE shade AS ENUM ('light', 'dark')",
                "CREATE DOMAIN shades AS shade[]",
                "CREATE TABLE shaded (s shade PRIMARY KEY) PARTITION BY HASH (s)",
                "CREATE TABLE of_shades (l shades PRIMARY KEY) PARTITION BY HASH (l)",
            ],
            "public.of_shades by HASH (l)",
            Mend::By(At::Source, &["DROP TABLE shaded, of_shades"]),
        )
    },
    line(
        "unvalidated_domains",
        &[
            "CREATE DOMAIN \"Qty\" AS int",
            "CREATE TABLE counted (id int PRIMARY KEY, q \"Qty\")",
            "ALTER DOMAIN \"Qty\" ADD CONSTRAINT \"no debt\" CHECK (VALUE >= 0) NOT VALID",
        ],
        "public.\"Qty\", \"no debt\"",
        Mend::Printed,
    ),
    line(
        "c_functions",
        &["CREATE FUNCTION in_c() RETURNS language_handler LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_call_handler'"],
        "public.in_c() in $libdir/plpgsql",
        Mend::Printed,
    ),
    line(
        "text_only_types",
        &[
            "CREATE TYPE shown",
            "CREATE FUNCTION shown_in(cstring) RETURNS shown LANGUAGE internal IMMUTABLE STRICT AS 'textin'",
            "CREATE FUNCTION shown_out(shown) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout'",
            "CREATE TYPE shown (INPUT = shown_in, OUTPUT = shown_out, LIKE = text)",
            "CREATE TABLE has_shown (id int PRIMARY KEY, s shown)",
        ],
        "public.has_shown.s is public.shown",
        Mend::By(At::Source, &["ALTER TABLE has_shown ALTER s TYPE text USING NULL"]),
    ),
    line(
        "object_numbers",
        &["CREATE TABLE has_numbers (id int PRIMARY KEY, c regclass, l oid[])"],
        "public.has_numbers.c is regclass",
        Mend::Printed,
    ),
    line(
        "type_numbers",
        &["CREATE TYPE mood AS ENUM ('sad', 'ok')", "CREATE TABLE felt (id int PRIMARY KEY, m mood, l mood[])"],
        "public.mood, 2 columns",
        Mend::By(At::Source, &["DROP TABLE felt"]),
    ),
    Line {
        majors: (13, u16::MAX),
        ..line(
            "generated_columns",
            &[
                "CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * $1'",
                "CREATE TABLE made (id int PRIMARY KEY, d int GENERATED ALWAYS AS (twice(id)) STORED)",
            ],
            "public.made.d calls public.twice(integer)",
            Mend::Printed,
        )
    },
    Line {
        majors: (13, u16::MAX),
        ..line(
            "generated_identity",
            &["CREATE TABLE keyed (a int, b int GENERATED ALWAYS AS (a + 1) STORED, PRIMARY KEY (b))"],
            "public.keyed.b",
            Mend::Printed,
        )
    },
    line("replica_identity", &["CREATE TABLE bare (id int)"], "\"bare\"", Mend::Printed),
    line(
        "fence_settings",
        &["CREATE ROLE stubborn", "ALTER ROLE stubborn SET default_transaction_read_only = off"],
        "role stubborn",
        Mend::Printed,
    ),
    Line {
        majors: (10, 11),
        ..line(
            "unknown_settings",
            &["CREATE ROLE dated", "ALTER ROLE dated SET default_with_oids = on"],
            "default_with_oids",
            Mend::Printed,
        )
    },
    line(
        "collations",
        &[
            "CREATE COLLATION lost FROM \"POSIX\"",
            "UPDATE pg_collation SET collcollate = 'xx_YY', collctype = 'xx_YY' WHERE collname = 'lost'",
        ],
        "the target has no locale xx_YY",
        Mend::By(At::Source, &["DROP COLLATION lost"]),
    ),
    line(
        "extensions",
        &["UPDATE pg_extension SET extname = 'unheard of' WHERE extname = 'plpgsql'"],
        "unheard of",
        Mend::By(At::Source, &["UPDATE pg_extension SET extname = 'plpgsql' WHERE extname = 'unheard of'"]),
    ),
    line(
        "tablespaces",
        &[
            "COPY (SELECT 1) TO PROGRAM 'cat >/dev/null; mkdir -p {home}/space'",
            "CREATE TABLESPACE space LOCATION '{home}/space'",
            "CREATE TABLE far (id int PRIMARY KEY) TABLESPACE space",
        ],
        "space",
        Mend::By(
            At::Target,
            &[
                "COPY (SELECT 1) TO PROGRAM 'cat >/dev/null; mkdir -p {home}/space'",
                "CREATE TABLESPACE space LOCATION '{home}/space'",
            ],
        ),
    ),
];

/// Rules that an ordinary role breaks. What they name is run by a superuser.
pub const RIGHTS: &[(&str, &str)] = &[
    ("replication_right", "neither REPLICATION nor SUPERUSER"),
    ("row_security", "public.guarded"),
    ("unreadable_tables", "public.guarded"),
    ("unreadable_large_objects", "large object 4711"),
    ("table_ownership", "public.guarded"),
    ("password_verifiers", "false"),
    ("source_signal", "neither a superuser"),
    ("target_signal", "neither a superuser"),
    ("create_roles", "owner"),
    ("apply_ddl", "no superuser"),
    ("session_replication_role", "permission denied"),
    ("create_database", "may not create databases"),
    ("settings_of_everyone", "SET \"app.everyone\" TO 'it''s'"),
    ("settings_of_databases", "SET \"app.of_database\""),
    ("user_casts", "cast (public.shown AS bytea)"),
    ("user_languages", "mine"),
    ("text_search_parsers", "parser public.words"),
    ("base_types", "public.shown"),
    ("operator_families", "public.fam for btree"),
    ("superuser_functions", "function public.hidden(integer)"),
    ("superuser_objects", "access method own_btree"),
    ("event_trigger_rights", "watching all"),
];

/// What the source holds for them.
pub const GUARDED: &str = "
    CREATE ROLE limited LOGIN; CREATE ROLE owner; ALTER ROLE ALL SET app.everyone = 'it''s'; SELECT lo_from_bytea(4711, 'x');
    DO 'BEGIN EXECUTE format(''ALTER DATABASE %I SET app.of_database = 1'', current_database()); END';
    CREATE TABLE guarded (id int PRIMARY KEY); CREATE POLICY p ON guarded USING (false);
    ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; ALTER TABLE guarded FORCE ROW LEVEL SECURITY; ALTER TABLE guarded OWNER TO owner;
    ALTER TABLE t OWNER TO owner;
    CREATE TYPE shown;
    CREATE FUNCTION shown_in(cstring) RETURNS shown LANGUAGE internal IMMUTABLE STRICT AS 'textin';
    CREATE FUNCTION shown_out(shown) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
    CREATE TYPE shown (INPUT = shown_in, OUTPUT = shown_out, LIKE = text);
    CREATE CAST (shown AS bytea) WITHOUT FUNCTION;
    CREATE LANGUAGE mine HANDLER plpgsql_call_handler;
    CREATE TEXT SEARCH PARSER words (START = prsd_start, GETTOKEN = prsd_nexttoken, END = prsd_end, LEXTYPES = prsd_lextype);
    CREATE OPERATOR FAMILY fam USING btree; CREATE TYPE span AS RANGE (SUBTYPE = int);
    CREATE FUNCTION hidden(int) RETURNS boolean LANGUAGE sql IMMUTABLE LEAKPROOF AS 'SELECT $1 > 0';
    CREATE FUNCTION inner_one(int) RETURNS int LANGUAGE internal AS 'int4up';
    CREATE AGGREGATE largest(int) (SFUNC = int4larger, STYPE = int);
    CREATE FOREIGN DATA WRAPPER wrapper; CREATE ACCESS METHOD own_btree TYPE INDEX HANDLER bthandler;
    CREATE FUNCTION e() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
    CREATE EVENT TRIGGER \"watching all\" ON ddl_command_end EXECUTE PROCEDURE e();";

/// Rules that a setting breaks: server, setting, value, and the first major that has it. What they name is run, and both
/// servers are restarted.
pub const SETTINGS: &[(&str, At, &str, &str, u16)] = &[
    ("wal_level", At::Source, "wal_level", "replica", 10),
    ("replication_slots", At::Source, "max_replication_slots", "0", 10),
    ("wal_senders", At::Source, "max_wal_senders", "0", 10),
    ("slot_wal_size", At::Source, "max_slot_wal_keep_size", "64MB", 13),
    ("slot_idle_timeout", At::Source, "idle_replication_slot_timeout", "1d", 18),
    ("source_connections", At::Source, "max_connections", "15", 10),
    ("target_connections", At::Target, "max_connections", "15", 10),
    ("shared_preload_libraries", At::Source, "shared_preload_libraries", "plpgsql", 10),
    ("worker_processes", At::Target, "max_worker_processes", "3", 10),
    ("way_back", At::Target, "wal_level", "replica", 10),
    ("server_parameters", At::Source, "statement_timeout", "1h", 10),
    ("target_writable", At::Target, "default_transaction_read_only", "on", 10),
];

/// Rules that each have a test of their own in `main.rs` or `trust.rs`.
pub const OTHERS: &[&str] = &[
    "connect_source",
    "connect_target",
    "version",
    "source_primary",
    "target_primary",
    "pg_dump",
    "control_database",
    "database_exists",
    "sync_standbys",
    "truncate",
    "long_transactions",
    "forecast",
    "target_empty",
    "encoding",
    "build_features",
    "generated_children",
    "identity_columns",
    "reserved_words",
    "role_makers",
    "scheduled_jobs",
];
