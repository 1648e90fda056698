//! Rules about functions, types and other objects of one database, each a query as in [`super::findings`].

use super::Outcome;
use super::database::{Finding, Unless};
use super::definition::{Apply, Definition, When};

pub(super) const FINDINGS: &[Finding] = &[
    Finding {
        definition: Definition {
            code: "c_functions",
            worst: Outcome::Warning,
            why: "the shared library that such a function names must be on the target's host too, built for its major",
            evidence: "the functions and libraries",
            fix: "install the library on the target's host, or drop the function (managed services take none but those of their \
                  extensions)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s in %s', p.oid::regprocedure, p.probin), format('DROP FUNCTION %s', p.oid::regprocedure) FROM pg_proc p \
                JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang \
                WHERE l.lanname = 'c' AND {ours} AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_proc'::regclass AND x.objid = p.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "text_only_types",
            worst: Outcome::Warning,
            why: "values of these types have no binary form: their tables are copied as text, which is slower, and a binary cursor \
                  of the application fails on either server",
            evidence: "the columns",
            fix: "nothing has to be done; CREATE TYPE … with SEND and RECEIVE functions gives a type a binary form",
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s.%I is %s', c.oid::regclass, a.attname, format_type(t.oid, NULL)), NULL \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped \
                AND {ours} AND (t.typsend = 0 OR t.typreceive = 0) ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "object_numbers",
            worst: Outcome::Warning,
            why: "columns of these types hold the numbers of objects, which are others on the target; what has a name is found \
                  there again by it, while a column of type oid keeps a number that means nothing",
            evidence: "the columns",
            fix: "store names: ALTER TABLE … ALTER COLUMN … TYPE text",
            apply: Apply::Refused("it rewrites the table, which is locked meanwhile"),
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s.%I is %s', c.oid::regclass, a.attname, format_type(t.oid, NULL)), \
                format('ALTER TABLE %s ALTER COLUMN %I TYPE text%s', c.oid::regclass, a.attname, CASE WHEN t.typcategory = 'A' THEN '[]' ELSE '' END) \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped \
                AND {ours} AND t.typnamespace = 'pg_catalog'::regnamespace \
                AND btrim(t.typname, '_') IN ('oid', 'regclass', 'regproc', 'regprocedure', 'regoper', 'regoperator', 'regtype', \
                'regrole', 'regnamespace', 'regconfig', 'regdictionary', 'regcollation') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "type_numbers",
            worst: Outcome::Warning,
            why: "types that are not built in have other numbers on the target: parameters of prepared statements are translated \
                  when a session is moved, but a driver that remembers the numbers of result columns must look them up again",
            evidence: "the types, and how many columns are of each",
            fix: "let drivers ask for types by name at each connect, or have those sessions reconnect after the cutover; nothing has to be \
                  done where results are read as text",
            ..Finding::DEFINITION
        },
        query: "SELECT format('%s, %s columns', format_type(e.oid, NULL), count(*)), NULL \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid JOIN pg_type e ON e.oid = CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE t.oid END \
                WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped AND {ours} AND e.oid >= 16384 AND e.typtype <> 'd' \
                GROUP BY e.oid ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "generated_columns",
            worst: Outcome::Warning,
            why: "the target computes generated columns itself: where the expression calls a function of your own, which may read \
                  tables or settings, it may come to another value there",
            evidence: "the columns and functions",
            fix: "see that the function is immutable in truth; ALTER TABLE … ALTER COLUMN … DROP EXPRESSION makes the column an ordinary one",
            apply: Apply::Refused("the column would no longer be computed"),
            ..Finding::DEFINITION
        },
        versions: (120_000, u32::MAX),
        query: "SELECT DISTINCT format('%s.%I calls %s', c.oid::regclass, a.attname, p.oid::regprocedure), \
                CASE WHEN current_setting('server_version_num')::int >= 130000 AND a.attgenerated = 's' THEN \
                format('ALTER TABLE %s ALTER COLUMN %I DROP EXPRESSION', c.oid::regclass, a.attname) END \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum \
                JOIN pg_depend d ON d.refclassid = 'pg_proc'::regclass AND (d.classid = 'pg_attrdef'::regclass AND d.objid = e.oid \
                OR d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = a.attnum) \
                JOIN pg_proc p ON p.oid = d.refobjid WHERE a.attgenerated <> '' AND {ours} ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "generated_identity",
            when: When::Repeatedly,
            why: "generated columns are not in the stream: rows cannot be told apart by a replica identity that holds one, and from \
                  PostgreSQL 18 on UPDATE and DELETE of a published table fail in the application",
            evidence: "the tables and columns",
            fix: "ALTER TABLE … REPLICA IDENTITY USING INDEX one without generated columns, or DROP EXPRESSION of the column",
            apply: Apply::Refused("the column would no longer be computed"),
            ..Finding::DEFINITION
        },
        versions: (120_000, u32::MAX),
        query: "SELECT format('%s.%I', c.oid::regclass, a.attname), CASE WHEN current_setting('server_version_num')::int >= 130000 AND a.attgenerated = 's' THEN \
                format('ALTER TABLE %s ALTER COLUMN %I DROP EXPRESSION', c.oid::regclass, a.attname) END \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_index i ON i.indrelid = c.oid AND a.attnum = ANY (i.indkey::int2[]) \
                AND (c.relreplident = 'd' AND i.indisprimary OR c.relreplident = 'i' AND i.indisreplident) \
                WHERE a.attgenerated <> '' AND c.relkind = 'r' AND {ours} ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "user_casts",
            why: "casts without a function are made by superusers alone, and the target's login role is none",
            evidence: "the casts",
            fix: "log in to the target as a superuser, or DROP CAST (managed services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT format('cast (%s AS %s)', format_type(c.castsource, NULL), format_type(c.casttarget, NULL)), \
                format('DROP CAST (%s AS %s)', format_type(c.castsource, NULL), format_type(c.casttarget, NULL)) FROM pg_cast c \
                WHERE c.castmethod = 'b' AND c.oid >= 16384 AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_cast'::regclass AND x.objid = c.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "user_languages",
            why: "procedural languages that are no extension are made by superusers alone, and the target's login role is none",
            evidence: "the languages",
            fix: "log in to the target as a superuser, or DROP LANGUAGE (managed services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT lanname::text, format('DROP LANGUAGE %I', lanname) FROM pg_language l \
                WHERE l.oid >= 16384 AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_language'::regclass AND x.objid = l.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "text_search_parsers",
            why: "parsers and templates of text search are made by superusers alone, and the target's login role is none",
            evidence: "the parsers and templates",
            fix: "log in to the target as a superuser, or DROP TEXT SEARCH PARSER or TEMPLATE (managed services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT format('%s %I.%I', lower(kind), n.nspname, name), format('DROP TEXT SEARCH %s %I.%I', kind, n.nspname, name) \
                FROM (SELECT 'PARSER' AS kind, p.oid, p.prsname AS name, p.prsnamespace AS schema, 'pg_ts_parser'::regclass AS class FROM pg_ts_parser p \
                UNION ALL SELECT 'TEMPLATE', t.oid, t.tmplname, t.tmplnamespace, 'pg_ts_template'::regclass FROM pg_ts_template t) AS found \
                JOIN pg_namespace n ON n.oid = found.schema WHERE found.oid >= 16384 AND NOT EXISTS (SELECT FROM pg_depend d \
                WHERE d.classid = found.class AND d.objid = found.oid AND d.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "base_types",
            why: "base types are made by superusers alone, and the target's login role is none",
            evidence: "the types",
            fix: "log in to the target as a superuser, or DROP TYPE (managed services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT format_type(t.oid, NULL), format('DROP TYPE %s CASCADE', format_type(t.oid, NULL)) FROM pg_type t \
                JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.typtype = 'b' AND t.oid >= 16384 AND t.typisdefined \
                AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid) AND {ours} AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_type'::regclass AND x.objid = t.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "operator_families",
            why: "operator classes and families are made by superusers alone, and the target's login role is none",
            evidence: "the families",
            fix: "log in to the target as a superuser, or DROP OPERATOR FAMILY (managed services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT format('%I.%I for %s', n.nspname, f.opfname, m.amname), \
                format('DROP OPERATOR FAMILY %I.%I USING %I CASCADE', n.nspname, f.opfname, m.amname) FROM pg_opfamily f \
                JOIN pg_am m ON m.oid = f.opfmethod JOIN pg_namespace n ON n.oid = f.opfnamespace \
                WHERE f.oid >= 16384 AND {ours} AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_opfamily'::regclass AND x.objid = f.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "superuser_functions",
            why: "functions that are LEAKPROOF, or in a language that is not trusted (c, internal, plpython3u, …), \
                  are made by superusers alone, and the target's login role is none",
            evidence: "the functions",
            fix: "log in to the target as a superuser, or ALTER FUNCTION … NOT LEAKPROOF, DROP FUNCTION (managed \
                  services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it, or what its views and policies are planned by"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        // Those of base types go with them, which have a rule of their own; those of ranges are made by the server.
        query: "SELECT format('function %s', p.oid::regprocedure), CASE WHEN l.lanpltrusted THEN 'ALTER' ELSE 'DROP' \
                END || CASE to_jsonb(p) ->> 'prokind' WHEN 'p' THEN ' PROCEDURE ' ELSE ' FUNCTION ' END \
                || p.oid::regprocedure || CASE WHEN l.lanpltrusted THEN ' NOT LEAKPROOF' ELSE '' END FROM pg_proc p \
                JOIN pg_language l ON l.oid = p.prolang JOIN pg_namespace n ON n.oid = p.pronamespace \
                WHERE (p.proleakproof OR NOT l.lanpltrusted) AND {ours} \
                AND NOT EXISTS (SELECT FROM pg_aggregate g WHERE g.aggfnoid = p.oid) \
                AND NOT EXISTS (SELECT FROM pg_type t WHERE p.oid IN (t.typinput, t.typoutput, t.typreceive, \
                t.typsend, t.typmodin, t.typmodout, t.typanalyze)) AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_proc'::regclass AND x.objid = p.oid AND x.deptype IN ('e', 'i')) ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "superuser_objects",
            why: "foreign data wrappers and access methods are made by superusers alone, and the target's login role \
                  is none",
            evidence: "the wrappers and access methods that are no extension's",
            fix: "log in to the target as a superuser, or DROP FOREIGN DATA WRAPPER, DROP ACCESS METHOD (managed \
                  services: those of their extensions only)",
            apply: Apply::Refused("the application would lose it"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT format('foreign data wrapper %I', w.fdwname), \
                format('DROP FOREIGN DATA WRAPPER %I CASCADE', w.fdwname) \
                FROM pg_foreign_data_wrapper w WHERE w.oid >= 16384 AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_foreign_data_wrapper'::regclass AND x.objid = w.oid AND x.deptype = 'e') \
                UNION ALL \
                SELECT format('access method %I', m.amname), format('DROP ACCESS METHOD %I CASCADE', m.amname) \
                FROM pg_am m WHERE m.oid >= 16384 AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_am'::regclass AND x.objid = m.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
    Finding {
        definition: Definition {
            code: "event_trigger_rights",
            worst: Outcome::Warning,
            why: "event triggers are made by superusers, and with some managed services by their administrators: the \
                  target's login role is no superuser, and where it may not either, the migration fails when \
                  everything has been copied",
            evidence: "the event triggers",
            fix: "log in to the target as a superuser, or as the administrator of a service that allows it; or DROP \
                  EVENT TRIGGER",
            apply: Apply::Refused("what it guards would be unguarded"),
            ..Finding::DEFINITION
        },
        unless: Unless::TargetSuperuser,
        query: "SELECT t.evtname::text, format('DROP EVENT TRIGGER %I', t.evtname) FROM pg_event_trigger t \
                WHERE t.evtname !~ '^pgcutover_' AND NOT EXISTS (SELECT FROM pg_depend x \
                WHERE x.classid = 'pg_event_trigger'::regclass AND x.objid = t.oid AND x.deptype = 'e') ORDER BY 1",
        ..Finding::OF_EVERY_VERSION
    },
];
