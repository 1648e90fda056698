//! Rules that are a query of one database for what must not be there, or what an operator has to know: what a dump and a
//! stream do not carry, and what behaves differently once it is restored.
//!
//! Every query yields a text for each finding and the statement that mends just that one, or null.

use super::Outcome;
use super::database::Finding;
use super::definition::{Apply, Definition, Hosted, When};

pub(super) const FINDINGS: &[Finding] = &[
    Finding {
        definition: Definition {
            code: "unreadable_large_objects",
            why: "large objects are read by the source's login role",
            evidence: "their numbers",
            fix: "GRANT SELECT ON LARGE OBJECT … TO the source's login role, make it a member of their owners, or log in as a superuser",
            apply: Apply::Refused("a role cannot give itself rights: another one has to"),
            ..Finding::DEFINITION
        },
        query: "SELECT 'large object ' || m.oid, format('GRANT SELECT ON LARGE OBJECT %s TO %I', m.oid, current_user) FROM pg_largeobject_metadata m \
                CROSS JOIN (SELECT rolsuper AS sees_all FROM pg_roles WHERE rolname = current_user) me \
                WHERE NOT (me.sees_all OR current_setting('lo_compat_privileges')::boolean OR pg_has_role(m.lomowner, 'USAGE') \
                OR EXISTS (SELECT FROM aclexplode(m.lomacl) a WHERE a.privilege_type = 'SELECT' \
                AND CASE a.grantee WHEN 0 THEN true ELSE pg_has_role(a.grantee, 'USAGE') END)) \
                ORDER BY m.oid LIMIT 1000",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "temporary_tables",
            when: When::BeforeOnline,
            worst: Outcome::Warning,
            why: "a session that holds temporary tables cannot be moved: the cutover waits for it or ends it",
            evidence: "the tables",
            fix: "let those sessions drop them or DISCARD TEMP before the cutover, or choose to have them ended: `--stragglers terminate`",
            ..Finding::DEFINITION
        },
        query: "SELECT format('%I.%I', n.nspname, c.relname), NULL FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relpersistence = 't' AND c.relkind = 'r' ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "always_triggers",
            when: When::Repeatedly,
            why: "they fire on replicated changes too and would act a second time on the target",
            evidence: "the triggers and rules",
            fix: "ALTER TABLE … ENABLE TRIGGER … (or RULE …) for those that are ENABLE ALWAYS, DISABLE for ENABLE REPLICA, until the \
                  migration is complete",
            apply: Apply::Since(0),
            ..Finding::DEFINITION
        },
        query: "SELECT format('trigger %I on %I.%I', t.tgname, n.nspname, c.relname), format('ALTER TABLE %I.%I %s TRIGGER %I', \
                n.nspname, c.relname, CASE t.tgenabled WHEN 'A' THEN 'ENABLE' ELSE 'DISABLE' END, t.tgname) FROM pg_trigger t \
                JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE t.tgenabled IN ('A', 'R') AND NOT t.tgisinternal AND {ours} UNION ALL \
                SELECT format('rule %I on %I.%I', r.rulename, n.nspname, c.relname), format('ALTER TABLE %I.%I %s RULE %I', \
                n.nspname, c.relname, CASE r.ev_enabled WHEN 'A' THEN 'ENABLE' ELSE 'DISABLE' END, r.rulename) FROM pg_rewrite r \
                JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE r.ev_enabled IN ('A', 'R') AND {ours}",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "row_security",
            why: "rows that the policies hide from the source's login role would not be copied",
            evidence: "the tables",
            fix: "log in to the source as a superuser, or ALTER ROLE … BYPASSRLS for its login role",
            hosted: Hosted::Words {
                amazon: "migrate as the role that owns the tables, without FORCE ROW LEVEL SECURITY, or as a member of rds_superuser with BYPASSRLS",
                azure: "ALTER ROLE … BYPASSRLS for the login role, as the server's administrator",
                google: "ALTER ROLE … BYPASSRLS for the login role, as a member of cloudsqlsuperuser",
            },
            apply: Apply::Refused("a role cannot give itself rights: another one has to"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%I.%I', n.nspname, c.relname), format('ALTER ROLE %I BYPASSRLS', current_user) \
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                CROSS JOIN (SELECT rolsuper OR rolbypassrls AS sees_all FROM pg_roles WHERE rolname = current_user) me \
                WHERE c.relrowsecurity AND c.relkind = 'r' AND NOT me.sees_all AND {ours} \
                AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')) ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "unreadable_tables",
            why: "every row is read by the source's login role",
            evidence: "the tables and sequences",
            fix: "GRANT USAGE ON the SCHEMA and SELECT ON the TABLE to the source's login role, or log in as a superuser",
            apply: Apply::Refused("a role cannot give itself rights: another one has to"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%I.%I', n.nspname, c.relname), format('GRANT USAGE ON SCHEMA %I TO %I; GRANT SELECT ON %I.%I TO %I', \
                n.nspname, current_user, n.nspname, c.relname, current_user) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't' AND {ours} \
                AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "table_ownership",
            why: "only its owner may add a table to a publication or set its replica identity",
            evidence: "the tables",
            fix: "GRANT the owning role TO the source's login role, or log in as a superuser",
            apply: Apply::Refused("a role cannot give itself rights: another one has to"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%I.%I', n.nspname, c.relname), format('GRANT %I TO %I', pg_get_userbyid(c.relowner), current_user) \
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {ours} AND NOT pg_has_role(c.relowner, 'USAGE') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "tables_with_oids",
            why: "PostgreSQL 12 and newer know no tables WITH OIDS",
            evidence: "the tables",
            fix: "ALTER TABLE … SET WITHOUT OIDS, after what uses the column oid has been changed",
            apply: Apply::Refused("the numbers of the rows would be lost"),
            ..Finding::DEFINITION
        },
        versions: (0, 119_999),
        query: "SELECT format('%I.%I', n.nspname, c.relname), format('ALTER TABLE %I.%I SET WITHOUT OIDS', n.nspname, c.relname) \
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind IN ('r', 'p') AND c.relhasoids AND {ours} ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "removed_types",
            why: "PostgreSQL 12 and newer do not have the types abstime, reltime and tinterval",
            evidence: "the columns",
            fix: "ALTER TABLE … ALTER COLUMN … TYPE timestamptz, interval or text",
            apply: Apply::Refused("it rewrites the table, which is locked meanwhile"),
            ..Finding::DEFINITION
        },
        versions: (0, 119_999),
        query: "SELECT format('%I.%I.%I', n.nspname, c.relname, a.attname), CASE WHEN c.relkind IN ('r', 'p') THEN \
                format('ALTER TABLE %I.%I ALTER COLUMN %I TYPE %s USING %I::text::%s', n.nspname, c.relname, a.attname, w.wanted, \
                a.attname, w.wanted) END FROM pg_attribute a \
                JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid CROSS JOIN LATERAL (SELECT CASE btrim(t.typname, '_') WHEN 'abstime' THEN 'timestamptz' \
                WHEN 'reltime' THEN 'interval' ELSE 'text' END || CASE WHEN t.typname LIKE '\\_%' THEN '[]' ELSE '' END AS wanted) w \
                WHERE NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm') AND {ours} \
                AND t.typnamespace = 'pg_catalog'::regnamespace \
                AND btrim(t.typname, '_') IN ('abstime', 'reltime', 'tinterval') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "invalid_indexes",
            worst: Outcome::Warning,
            why: "pg_dump leaves indexes out that are not valid",
            evidence: "the indexes",
            fix: "REINDEX INDEX CONCURRENTLY or DROP them (before PostgreSQL 12 REINDEX locks the table); those that end in _ccnew or \
                  _ccold are left over from a REINDEX CONCURRENTLY that failed: DROP INDEX CONCURRENTLY",
            apply: Apply::Since(120_000),
            ..Finding::DEFINITION
        },
        // Leftovers first, so that none is in the way of a new one of the same name.
        query: "SELECT format('%I.%I', n.nspname, c.relname), CASE WHEN l.over THEN format('DROP INDEX CONCURRENTLY %I.%I', n.nspname, c.relname) \
                ELSE format('REINDEX INDEX %s%I.%I', CASE WHEN current_setting('server_version_num')::int >= 120000 THEN 'CONCURRENTLY ' ELSE '' END, \
                n.nspname, c.relname) END FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
                JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL (SELECT c.relname ~ '_cc(new|old)[0-9]*$' \
                AND NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conindid = c.oid) AND NOT c.relispartition AS over) l \
                WHERE NOT i.indisvalid AND c.relkind = 'i' AND {ours} ORDER BY l.over DESC, 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "subscriptions",
            when: When::RepeatedlyOnline,
            why: "an enabled subscription goes on writing to the source after the cutover, and is not carried over",
            evidence: "their names",
            fix: "ALTER SUBSCRIPTION … DISABLE, and make it anew on the target after the cutover",
            apply: Apply::Refused("what it brings would stop coming"),
            ..Finding::DEFINITION
        },
        query: "SELECT s.subname::text, format('ALTER SUBSCRIPTION %I DISABLE', s.subname) FROM pg_subscription s \
                JOIN pg_database d ON d.oid = s.subdbid \
                WHERE d.datname = current_database() AND s.subenabled ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "publications",
            worst: Outcome::Warning,
            why: "publications are not carried over; their subscribers follow the source, which gets no changes after the cutover",
            evidence: "their names",
            fix: "make them anew on the target, let their subscribers follow it, and drop them here",
            apply: Apply::Refused("its subscribers would fail"),
            ..Finding::DEFINITION
        },
        query: "SELECT pubname::text, format('DROP PUBLICATION %I', pubname) FROM pg_publication WHERE pubname !~ '^pgcutover' ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "publications_of_all_tables",
            worst: Outcome::Warning,
            why: "the tables that pgcutover makes in its schema are published too: a subscriber that lacks them stops at their first \
                  change, and its slot makes the source keep write-ahead log",
            evidence: "their names",
            fix: "when the migration has begun, make these tables on every subscriber, which then goes on: pg_dump --schema-only \
                  --table 'pgcutover.*' of the source's database, after CREATE SCHEMA pgcutover",
            ..Finding::DEFINITION
        },
        query: "SELECT pubname::text, NULL FROM pg_publication WHERE puballtables ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "shared_labels",
            worst: Outcome::Warning,
            why: "security labels of roles and databases belong to the cluster and are not carried over: what a provider hides by \
                  them would be seen on the target",
            evidence: "the roles and databases, the providers and the labels",
            fix: "SECURITY LABEL … ON ROLE … (or DATABASE) on the target before the cutover",
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s, by provider %I: %s', o.name, l.provider, l.label), NULL \
                FROM pg_shseclabel l JOIN LATERAL (\
                SELECT format('ROLE %I', rolname) FROM pg_roles WHERE oid = l.objoid AND l.classoid = 'pg_authid'::regclass UNION ALL \
                SELECT format('DATABASE %I', datname) FROM pg_database WHERE oid = l.objoid AND l.classoid = 'pg_database'::regclass \
                AND datname = current_database()) o (name) ON true ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "foreign_tables",
            worst: Outcome::Warning,
            why: "the definition is carried over; the target must reach the foreign server too, and user mappings hold passwords",
            evidence: "the foreign servers, and user mappings whose options only a superuser or their owner may read",
            fix: "check that the target's host may connect to these servers; give mappings that could not be read their options by \
                  ALTER USER MAPPING … OPTIONS (ADD …) on the target",
            ..Finding::DEFINITION
        },
        query: "SELECT format('server %I', srvname), NULL FROM pg_foreign_server UNION ALL \
                SELECT format('user mapping of %s for server %I: its options cannot be read', m.usename, m.srvname), NULL \
                FROM pg_user_mappings m JOIN pg_roles me ON me.rolname = current_user \
                WHERE m.umoptions IS NULL AND NOT me.rolsuper ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "event_triggers",
            worst: Outcome::Warning,
            why: "one that is ENABLE ALWAYS or REPLICA fires on what pgcutover itself defines on the target; an ordinary one fires on \
                  the publication, tables and functions that it makes on the source, and drops at the end, and the migration \
                  fails where it refuses them",
            evidence: "their names, and on what they fire",
            fix: "ALTER EVENT TRIGGER … ENABLE for those that are ENABLE ALWAYS, DISABLE for ENABLE REPLICA, until the migration is complete; \
                  let the functions of ordinary ones pass what the source's login role defines",
            apply: Apply::Since(0),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%I on %s', evtname, evtevent), CASE evtenabled WHEN 'A' THEN format('ALTER EVENT TRIGGER %I ENABLE', evtname) \
                WHEN 'R' THEN format('ALTER EVENT TRIGGER %I DISABLE', evtname) END FROM pg_event_trigger \
                WHERE evtname !~ '^pgcutover_' AND (evtenabled IN ('A', 'R') \
                OR evtenabled = 'O' AND evtevent IN ('ddl_command_start', 'ddl_command_end', 'sql_drop') AND (evttags IS NULL OR evttags && ARRAY[\
                'CREATE PUBLICATION', 'ALTER PUBLICATION', 'DROP PUBLICATION', 'CREATE SCHEMA', 'CREATE TABLE', 'ALTER TABLE', 'CREATE FUNCTION', \
                'GRANT', 'COMMENT', 'DROP SCHEMA', 'DROP TABLE', 'DROP FUNCTION'])) ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "wraparound",
            worst: Outcome::Warning,
            why: "a slot and a long copy hold back vacuum; a database that is this near to the end of its transaction or multixact ids stops \
                  taking writes before they are through",
            evidence: "how many are used",
            fix: "VACUUM (FREEZE) the database before the migration, and end what holds back vacuum: old transactions, prepared \
                  transactions, unused slots",
            apply: Apply::Refused("it reads the whole database: choose the hour yourself"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s %s are used of 2147483648', u.age, u.what), 'VACUUM (FREEZE)' FROM pg_database \
                CROSS JOIN LATERAL (VALUES ('transaction ids', age(datfrozenxid)), ('multixact ids', mxid_age(datminmxid))) u(what, age) \
                WHERE datname = current_database() AND u.age > 1500000000",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "index_search_path",
            worst: Outcome::Warning,
            why: "definitions are restored, rows copied and applied, and materialized views refreshed, with an empty \
                  search_path: a function that looks up names without a schema fails there, and with it the index or \
                  materialized view that calls it, or the rows of a table whose check, generated column or domain does",
            evidence: "the indexes, materialized views, constraints and columns, and the functions",
            fix: "ALTER FUNCTION … SET search_path = …, with the schemas that its body means",
            apply: Apply::Refused("which schemas its body means, only its author knows"),
            ..Finding::DEFINITION
        },
        // A generated column depends on its function itself, or by its expression: that differs from major to major. A
        // materialized view calls what the views call that it reads.
        query: "WITH RECURSIVE reads AS (SELECT v.oid AS materialized, v.oid AS view FROM pg_class v \
                WHERE v.relkind = 'm' AND v.relispopulated UNION SELECT r.materialized, d.refobjid FROM reads r \
                JOIN pg_rewrite w ON w.ev_class = r.view \
                JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid \
                AND d.refclassid = 'pg_class'::regclass JOIN pg_class s ON s.oid = d.refobjid AND s.relkind = 'v') \
                SELECT DISTINCT format('%s calls %s', u.name, p.oid::regprocedure), \
                format('ALTER FUNCTION %s SET search_path = %I, pg_temp', p.oid::regprocedure, n.nspname) \
                FROM (SELECT 'pg_class'::regclass AS classid, i.oid, 0 AS part, i.oid::regclass::text AS name \
                FROM pg_class i WHERE i.relkind IN ('i', 'I') UNION ALL \
                SELECT 'pg_rewrite'::regclass, w.oid, 0, format('materialized view %s', r.materialized::regclass) \
                FROM reads r JOIN pg_rewrite w ON w.ev_class = r.view UNION ALL \
                SELECT 'pg_constraint'::regclass, k.oid, 0, format('check %I of %s', k.conname, \
                CASE k.contypid WHEN 0 THEN k.conrelid::regclass::text ELSE 'domain ' || format_type(k.contypid, NULL) END) \
                FROM pg_constraint k WHERE k.contype = 'c' UNION ALL \
                SELECT x.classid, x.oid, x.part, format('generated column %s.%I', a.attrelid::regclass, a.attname) \
                FROM pg_attrdef e JOIN pg_attribute a ON a.attrelid = e.adrelid AND a.attnum = e.adnum \
                CROSS JOIN LATERAL (VALUES ('pg_attrdef'::regclass, e.oid, 0), ('pg_class'::regclass, a.attrelid, a.attnum::int)) \
                AS x (classid, oid, part) WHERE coalesce(to_jsonb(a) ->> 'attgenerated', '') <> '') u \
                JOIN pg_depend d ON d.classid = u.classid AND d.objid = u.oid AND d.objsubid = u.part \
                JOIN pg_proc p ON p.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass \
                JOIN pg_language l ON l.oid = p.prolang JOIN pg_namespace n ON n.oid = p.pronamespace \
                WHERE l.lanname NOT IN ('internal', 'c') AND {ours} \
                AND NOT EXISTS (SELECT FROM unnest(p.proconfig) s WHERE s LIKE 'search\\_path=%') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "catalogue_grants",
            why: "grants on objects of the system are carried over with the others of a database, which only a superuser of the \
                  target may do, and only where its major still has the object",
            evidence: "the grants",
            fix: "log in to the target as a superuser, or REVOKE them here and have the target's administrator grant the same",
            apply: Apply::Refused("who relies on them would be refused"),
            ..Finding::DEFINITION
        },
        to_superusers: Some(Outcome::Warning),
        query: "SELECT format('%s to %s on %s', a.privilege_type || o.columns, g.grantee, g.name), \
                format('REVOKE %s ON %s FROM %s', a.privilege_type || o.columns, g.name, g.grantee) FROM ( \
                SELECT 'pg_class'::regclass AS class, c.oid, 0 AS part, '' AS columns, c.relowner AS owner, \
                c.relacl AS acl, acldefault('r', c.relowner) AS usual FROM pg_class c \
                WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relkind <> 'S' UNION ALL \
                SELECT 'pg_class'::regclass, c.oid, t.attnum, format(' (%I)', t.attname), c.relowner, t.attacl, \
                acldefault('c', c.relowner) FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid WHERE c.relnamespace = 'pg_catalog'::regnamespace UNION ALL \
                SELECT 'pg_proc'::regclass, p.oid, 0, '', p.proowner, p.proacl, acldefault('f', p.proowner) \
                FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace) o \
                CROSS JOIN LATERAL aclexplode(o.acl) a \
                CROSS JOIN LATERAL (SELECT CASE WHEN a.grantee = 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS grantee, \
                CASE o.class WHEN 'pg_proc'::regclass THEN 'FUNCTION ' || o.oid::regprocedure ELSE o.oid::regclass::text END AS name) g \
                WHERE o.oid < 16384 AND a.grantee <> o.owner AND NOT EXISTS (SELECT FROM aclexplode(coalesce((SELECT i.initprivs \
                FROM pg_init_privs i WHERE i.objoid = o.oid AND i.classoid = o.class AND i.objsubid = o.part), o.usual)) b \
                WHERE b.grantee = a.grantee AND b.privilege_type = a.privilege_type) ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "hash_of_enum",
            why: "labels of enums are hashed by their numbers, which are others on the target: rows are refused there \
                  by the partition that they come from",
            evidence: "the partitioned tables, and what they are partitioned by",
            fix: "partition them by LIST of the enum, or by HASH of a column of another type (text), before the \
                  migration",
            ..Finding::DEFINITION
        },
        versions: (110_000, u32::MAX),
        // By the operator class of a pseudo-type: one that somebody made for the enum itself may hash its labels. What
        // an expression yields is not followed further than that.
        query: "WITH RECURSIVE key AS (SELECT c.oid, format('%I.%I by %s', n.nspname, c.relname, \
                pg_get_partkeydef(c.oid)) AS shown, f.typname = 'anyenum' AS is_enum, a.atttypid \
                FROM pg_partitioned_table p JOIN pg_class c ON c.oid = p.partrelid \
                JOIN pg_namespace n ON n.oid = c.relnamespace \
                CROSS JOIN LATERAL unnest(p.partattrs::int2[], p.partclass::oid[]) AS k (part, class) \
                JOIN pg_opclass o ON o.oid = k.class JOIN pg_type f ON f.oid = o.opcintype AND f.typtype = 'p' \
                LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.part AND k.part <> 0 \
                WHERE p.partstrat = 'h' AND {ours} AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_class'::regclass AND x.objid = c.oid AND x.deptype = 'e')), \
                used AS (SELECT oid, atttypid AS type FROM key UNION \
                SELECT u.oid, x.type FROM used u JOIN pg_type t ON t.oid = u.type CROSS JOIN LATERAL ( \
                SELECT t.typbasetype WHERE t.typtype = 'd' \
                UNION ALL SELECT t.typelem WHERE t.typcategory = 'A' AND t.typelem <> 0 \
                UNION ALL SELECT r.rngsubtype FROM pg_range r \
                WHERE t.oid IN (r.rngtypid, (to_jsonb(r) ->> 'rngmultitypid')::oid) \
                UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' AND a.attrelid = t.typrelid \
                AND a.attnum > 0 AND NOT a.attisdropped) x (type)) \
                SELECT DISTINCT k.shown, NULL::text FROM key k WHERE k.is_enum OR EXISTS (SELECT FROM used u \
                JOIN pg_type t ON t.oid = u.type WHERE u.oid = k.oid AND t.typtype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "unvalidated_domains",
            why: "a constraint of a domain that is NOT VALID is not asked where a column stays as it is: an UPDATE of such \
                  a row succeeds on the source, and the target, which is given the whole row, refuses it",
            evidence: "the domains and constraints",
            fix: "mend the values that violate them, then ALTER DOMAIN … VALIDATE CONSTRAINT; or DROP CONSTRAINT",
            apply: Apply::Refused("every table that has the domain is read, and cannot be written meanwhile"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s, %I', format_type(t.oid, NULL), k.conname), \
                format('ALTER DOMAIN %s VALIDATE CONSTRAINT %I', format_type(t.oid, NULL), k.conname) \
                FROM pg_constraint k JOIN pg_type t ON t.oid = k.contypid JOIN pg_namespace n ON n.oid = t.typnamespace \
                WHERE NOT k.convalidated AND {ours} AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_type'::regclass AND x.objid = t.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
];
