//! Further rules that are a query for what must not be there, or what an operator has to know: what a dump and a stream
//! do not carry, and what behaves differently once it is restored.

use super::Outcome;
use super::database::{EVERY, Finding};

pub(super) const FINDINGS: &[Finding] = &[
    Finding {
        code: "wraparound",
        why: "a slot and a long copy hold back vacuum; a database that is this near to the end of its transaction ids stops \
              taking writes before they are through",
        fix: "VACUUM (FREEZE) the database before the migration, and end what holds back vacuum: old transactions, prepared \
              transactions, unused slots",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('%s transaction ids are used of 2147483648', age(datfrozenxid)) FROM pg_database \
                WHERE datname = current_database() AND age(datfrozenxid) > 1500000000",
    },
    Finding {
        code: "scheduled_jobs",
        why: "jobs of pg_cron stay with the source: none would run on the target after the cutover",
        fix: "note the rows of cron.job, SELECT cron.unschedule(jobid) when the cutover begins, and cron.schedule(…) them on the \
              target after it",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT n || ' active jobs in cron.job' FROM (SELECT CASE WHEN to_regclass('cron.job') IS NOT NULL THEN \
                (xpath('//n/text()', query_to_xml('SELECT count(*) AS n FROM cron.job WHERE active', false, false, '')))[1]::text \
                END AS n) AS found WHERE n <> '0'",
    },
    Finding {
        code: "index_search_path",
        why: "definitions are restored with an empty search_path: a function that looks up names without a schema fails \
              there, and with it the index or constraint that calls it",
        fix: "ALTER FUNCTION … SET search_path = …, with the schemas that its body means",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT DISTINCT format('%s calls %s', d.objid::regclass, p.oid::regprocedure) \
                FROM pg_depend d JOIN pg_proc p ON p.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass \
                JOIN pg_class i ON i.oid = d.objid AND d.classid = 'pg_class'::regclass AND i.relkind IN ('i', 'I') \
                JOIN pg_language l ON l.oid = p.prolang JOIN pg_namespace n ON n.oid = p.pronamespace \
                WHERE l.lanname NOT IN ('internal', 'c') AND {ours} \
                AND NOT EXISTS (SELECT FROM unnest(p.proconfig) s WHERE s LIKE 'search\\_path=%') ORDER BY 1",
    },
    Finding {
        code: "catalogue_grants",
        why: "grants on objects of the system are in no dump of a database: who relies on them is refused on the target",
        fix: "REVOKE them, or GRANT the same on the target by hand",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('%s to %s on %s', a.privilege_type, CASE WHEN a.grantee = 0 THEN 'public' \
                ELSE pg_get_userbyid(a.grantee)::text END, c.oid::regclass) \
                FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a \
                WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.oid < 16384 AND a.grantee <> c.relowner \
                AND NOT EXISTS (SELECT FROM pg_init_privs i CROSS JOIN LATERAL aclexplode(i.initprivs) b \
                                 WHERE i.objoid = c.oid AND i.classoid = 'pg_class'::regclass AND i.objsubid = 0 \
                                   AND b.grantee = a.grantee AND b.privilege_type = a.privilege_type) ORDER BY 1",
    },
    Finding {
        code: "c_functions",
        why: "the shared library that such a function names must be on the target's host too, built for its major",
        fix: "install the library on the target's host, or drop the function (managed services take none but those of their \
              extensions)",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('%s in %s', p.oid::regprocedure, p.probin) FROM pg_proc p \
                JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang \
                WHERE l.lanname = 'c' AND {ours} AND NOT EXISTS (SELECT FROM pg_depend d \
                WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e') ORDER BY 1",
    },
    Finding {
        code: "text_only_types",
        why: "values of these types have no binary form: their tables are copied as text, which is slower, and a binary cursor \
              of the application fails on either server",
        fix: "nothing has to be done; CREATE TYPE … with SEND and RECEIVE functions gives a type a binary form",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('%s.%I is %s', c.oid::regclass, a.attname, format_type(t.oid, NULL)) \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped \
                AND {ours} AND (t.typsend = 0 OR t.typreceive = 0) ORDER BY 1",
    },
    Finding {
        code: "object_numbers",
        why: "columns of these types hold the numbers of objects, which are others on the target; what has a name is found \
              there again by it, while a column of type oid keeps a number that means nothing",
        fix: "store names: ALTER TABLE … ALTER COLUMN … TYPE text",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('%s.%I is %s', c.oid::regclass, a.attname, format_type(t.oid, NULL)) \
                FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped \
                AND {ours} AND t.typnamespace = 'pg_catalog'::regnamespace \
                AND btrim(t.typname, '_') IN ('oid', 'regclass', 'regproc', 'regprocedure', 'regoper', 'regoperator', 'regtype', \
                'regrole', 'regnamespace', 'regconfig', 'regdictionary', 'regcollation') ORDER BY 1",
    },
];
