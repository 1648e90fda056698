-- kind, name and definition of every object that a migration carries over. Runs on every version from 10 on: what came
-- later is looked up through to_jsonb. The search path is pg_catalog, so every other name is written with its schema.
WITH member AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
namespace AS (
    SELECT oid, nspname FROM pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'pgcutover')),
relation AS (
    SELECT c.oid, c.relkind, c.relowner, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity, c.reloptions, c.relpartbound,
           c.relacl, c.reloftype, c.reltoastrelid, c.reltablespace,
           (SELECT a.amname FROM pg_am a WHERE a.oid = c.relam AND a.amname <> 'heap' AND c.relkind IN ('r', 'm')) AS method, format('%I.%I', n.nspname, c.relname) AS name
      FROM pg_class c JOIN namespace n ON n.oid = c.relnamespace
     WHERE c.relpersistence <> 't'
       AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_class'::regclass AND m.objid = c.oid)),
routine AS (
    SELECT p.oid, p.proowner, p.proacl, to_jsonb(p) AS j,
           -- Since version 14 the word IN stands before every argument of a procedure that only goes in.
           format('%I.%I(%s)', n.nspname, p.proname, CASE to_jsonb(p) ->> 'prokind'
               WHEN 'p' THEN regexp_replace(a.arguments, '(^|, )IN ', '\1', 'g') ELSE a.arguments END) AS name
      FROM pg_proc p JOIN namespace n ON n.oid = p.pronamespace
     CROSS JOIN LATERAL (SELECT pg_get_function_identity_arguments(p.oid) AS arguments) a
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_proc'::regclass AND m.objid = p.oid)
       -- The constructors of a range come with it, and since version 14 there are more of them.
       AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'i')),
type AS (
    SELECT t.oid, t.typtype, t.typcategory, t.typrelid, t.typowner, t.typacl, t.typbasetype, t.typtypmod, t.typnotnull, t.typdefault,
           t.typlen, t.typbyval, t.typalign, t.typstorage, t.typispreferred, t.typdelim, t.typinput, t.typoutput, t.typreceive, t.typsend,
           t.typmodin, t.typmodout, t.typanalyze, t.typelem, to_jsonb(t) ->> 'typsubscript' AS subscript,
           (SELECT format('%I.%I', m.nspname, c.collname) FROM pg_collation c JOIN pg_namespace m ON m.oid = c.collnamespace
             WHERE c.oid = t.typcollation AND t.typtype = 'd'
               AND t.typcollation <> (SELECT b.typcollation FROM pg_type b WHERE b.oid = t.typbasetype)) AS collation_name,
           format('%I.%I', n.nspname, t.typname) AS name
      FROM pg_type t JOIN namespace n ON n.oid = t.typnamespace
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_type'::regclass AND m.objid = t.oid)),
-- MAINTAIN came with version 17, and only in what owners have by default.
granted (kind, name, owner, acl) AS (
    SELECT 'grant on schema', quote_ident(n.nspname), n.nspowner,
           -- Whose schema public is has changed with version 15. What everybody may do there has too, but pg_dump says that.
           CASE WHEN n.nspname <> 'public' THEN coalesce(n.nspacl, acldefault('n', n.nspowner))
                ELSE nullif(ARRAY(SELECT x FROM unnest(n.nspacl) x CROSS JOIN LATERAL aclexplode(ARRAY[x]) e
                                   WHERE e.grantee <> n.nspowner GROUP BY x), '{}') END
      FROM pg_namespace n JOIN namespace o ON o.oid = n.oid
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_namespace'::regclass AND m.objid = n.oid)
    UNION ALL SELECT 'grant on relation', name, relowner, coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
      FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    UNION ALL SELECT 'grant on function', name, proowner, coalesce(proacl, acldefault('f', proowner)) FROM routine
    UNION ALL SELECT 'grant on type', name, typowner, coalesce(typacl, acldefault('T', typowner)) FROM type
     WHERE typtype IN ('e', 'd', 'r') OR typtype = 'c' AND typrelid IN (SELECT oid FROM relation WHERE relkind = 'c')
    UNION ALL SELECT 'grant on language', quote_ident(l.lanname), l.lanowner, coalesce(l.lanacl, acldefault('l', l.lanowner)) FROM pg_language l
     WHERE l.lanispl AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_language'::regclass AND m.objid = l.oid)
    UNION ALL SELECT 'grant on foreign data wrapper', quote_ident(f.fdwname), f.fdwowner, coalesce(f.fdwacl, acldefault('F', f.fdwowner)) FROM pg_foreign_data_wrapper f
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_foreign_data_wrapper'::regclass AND m.objid = f.oid)
    UNION ALL SELECT 'grant on foreign server', quote_ident(s.srvname), s.srvowner, coalesce(s.srvacl, acldefault('S', s.srvowner)) FROM pg_foreign_server s
    UNION ALL SELECT 'grant on column', r.name || '.' || quote_ident(a.attname), r.relowner, a.attacl
      FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid WHERE a.attacl IS NOT NULL AND NOT a.attisdropped)
SELECT 'schema'::text, quote_ident(n.nspname)::text,
       CASE WHEN n.nspname = 'public' THEN '' ELSE pg_get_userbyid(n.nspowner) END::text
  FROM pg_namespace n JOIN namespace o ON o.oid = n.oid
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_namespace'::regclass AND m.objid = n.oid)
UNION ALL
SELECT CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
                    WHEN 'p' THEN 'partitioned table' WHEN 'c' THEN 'composite type' ELSE 'table' END,
       name,
       concat_ws(' ', pg_get_userbyid(relowner), CASE WHEN relkind <> 'p' THEN relpersistence END, relrowsecurity, relforcerowsecurity,
           (SELECT string_agg(o, ',' ORDER BY o) FROM unnest(relation.reloptions) o),
           (SELECT string_agg('toast.' || o, ',' ORDER BY o) FROM pg_class t, unnest(t.reloptions) o WHERE t.oid = relation.reltoastrelid),
           nullif(reloftype, 0)::regtype, method,
           (SELECT s.srvname || ' ' || coalesce(array_to_string(f.ftoptions, ','), '') FROM pg_foreign_table f JOIN pg_foreign_server s ON s.oid = f.ftserver
             WHERE f.ftrelid = relation.oid),
           (SELECT 'clustered on ' || x.indexrelid::regclass FROM pg_index x WHERE x.indrelid = relation.oid AND x.indisclustered),
           CASE WHEN relkind = 'p' THEN pg_get_partkeydef(oid) END, pg_get_expr(relpartbound, oid),
           (SELECT string_agg(i.inhparent::regclass::text, ',' ORDER BY i.inhseqno) FROM pg_inherits i WHERE i.inhrelid = relation.oid),
           CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END)
  FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
UNION ALL
SELECT 'column', r.name || '.' || quote_ident(a.attname),
       concat_ws(' ', format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.attnotnull THEN 'NOT NULL' END, pg_get_expr(d.adbin, d.adrelid),
           -- Since version 17 partitions have an identity from their parents.
           CASE WHEN r.relpartbound IS NULL THEN nullif(a.attidentity::text, '') END, nullif(to_jsonb(a) ->> 'attgenerated', ''),
           a.attstorage,
           nullif(to_jsonb(a) ->> 'attcompression', ''), nullif(to_jsonb(a) ->> 'attstattarget', '-1'),
           -- Minor releases such as 15.20 note versions of columns there.
           (SELECT string_agg(o, ',' ORDER BY o) FROM unnest(a.attoptions) o WHERE o NOT LIKE 'pg\_attver=%'), array_to_string(a.attfdwoptions, ','),
           CASE WHEN a.attcollation <> t.typcollation THEN a.collation_name END)
  FROM relation r
  JOIN (SELECT x.*, (SELECT format('%I.%I', n.nspname, c.collname) FROM pg_collation c
                       JOIN pg_namespace n ON n.oid = c.collnamespace WHERE c.oid = x.attcollation) AS collation_name
          FROM pg_attribute x) a ON a.attrelid = r.oid
  JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
-- Columns that are inherited stand where the parent has them: a dump makes those of a child first.
SELECT 'column order', r.name, string_agg(quote_ident(a.attname), ',' ORDER BY a.attnum)
  FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE r.relkind IN ('r', 'p', 'f', 'c') AND (a.attinhcount = 0 OR r.relpartbound IS NOT NULL)
 GROUP BY r.name
UNION ALL
-- With an asterisk: that of the database, whichever it is.
SELECT 'tablespace', r.name, CASE r.reltablespace WHEN 0 THEN '*' ELSE '' END || t.spcname
  FROM relation r JOIN pg_tablespace t
    ON t.oid = coalesce(nullif(r.reltablespace, 0), (SELECT d.dattablespace FROM pg_database d WHERE d.datname = current_database()))
 WHERE r.relkind IN ('r', 'm', 'i', 'p', 'I')
   AND NOT EXISTS (SELECT FROM pg_index x WHERE x.indexrelid = r.oid AND NOT x.indisvalid AND r.relkind = 'i')
UNION ALL
SELECT 'index', i.name,
       concat_ws(' ', pg_get_indexdef(i.oid),
           (SELECT string_agg(a.attnum || '=' || t.target, ',' ORDER BY a.attnum)
              FROM pg_attribute a CROSS JOIN LATERAL (SELECT nullif(to_jsonb(a) ->> 'attstattarget', '-1') AS target) t
             WHERE a.attrelid = i.oid AND t.target <> '0'))
  FROM pg_index x JOIN relation i ON i.oid = x.indexrelid
 WHERE x.indisvalid
UNION ALL
SELECT 'constraint', coalesce(r.name, t.name) || '.' || quote_ident(k.conname), pg_get_constraintdef(k.oid)
  FROM pg_constraint k LEFT JOIN relation r ON r.oid = k.conrelid LEFT JOIN type t ON t.oid = k.contypid
 WHERE coalesce(r.name, t.name) IS NOT NULL AND k.contype IN ('c', 'f', 'p', 'u', 'x')
   AND coalesce(to_jsonb(k) ->> 'conparentid', '0') = '0' AND coalesce(k.coninhcount, 0) = 0
UNION ALL
SELECT 'trigger', r.name || '.' || quote_ident(g.tgname), pg_get_triggerdef(g.oid) || ' ' || g.tgenabled::text
  FROM pg_trigger g JOIN relation r ON r.oid = g.tgrelid
 WHERE NOT g.tgisinternal AND coalesce(to_jsonb(g) ->> 'tgparentid', '0') = '0'
UNION ALL
SELECT 'rule', r.name || '.' || quote_ident(w.rulename), pg_get_ruledef(w.oid) || ' ' || w.ev_enabled::text
  FROM pg_rewrite w JOIN relation r ON r.oid = w.ev_class WHERE w.rulename <> '_RETURN'
UNION ALL
SELECT 'policy', r.name || '.' || quote_ident(p.polname),
       concat_ws(' ', p.polcmd, p.polpermissive, pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid),
           (SELECT string_agg(u.name, ',' ORDER BY u.name COLLATE "C")
              FROM (SELECT CASE WHEN x = 0 THEN 'public' ELSE pg_get_userbyid(x)::text END AS name FROM unnest(p.polroles) x) u))
  FROM pg_policy p JOIN relation r ON r.oid = p.polrelid
UNION ALL
SELECT 'statistics', format('%I.%I', n.nspname, s.stxname),
       concat_ws(' ', pg_get_userbyid(s.stxowner), pg_get_statisticsobjdef(s.oid), nullif(to_jsonb(s) ->> 'stxstattarget', '-1'))
  FROM pg_statistic_ext s JOIN namespace n ON n.oid = s.stxnamespace
UNION ALL
SELECT CASE j ->> 'prokind' WHEN 'p' THEN 'procedure' ELSE 'function' END, name,
       concat_ws(' ', pg_get_userbyid(proowner), pg_get_function_result(oid),
           CASE WHEN coalesce(j ->> 'prokind', CASE j ->> 'proisagg' WHEN 'true' THEN 'a' ELSE 'f' END) <> 'a'
                THEN pg_get_functiondef(oid) END)
  FROM routine
UNION ALL
SELECT 'aggregate', r.name,
       concat_ws(' ', a.aggkind, a.aggnumdirectargs, a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, a.aggdeserialfn,
           a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn, a.aggfinalextra, a.aggmfinalextra, nullif(a.aggsortop, 0)::regoperator,
           format_type(a.aggtranstype, NULL), format_type(nullif(a.aggmtranstype, 0), NULL), a.aggtransspace, a.aggmtransspace,
           a.agginitval, a.aggminitval,
           -- What PostgreSQL 10 does not know yet is what later ones do by themselves.
           coalesce(to_jsonb(a) ->> 'aggfinalmodify', CASE a.aggkind WHEN 'n' THEN 'r' ELSE 'w' END),
           coalesce(to_jsonb(a) ->> 'aggmfinalmodify', CASE a.aggkind WHEN 'n' THEN 'r' ELSE 'w' END),
           r.j ->> 'proparallel')
  FROM pg_aggregate a JOIN routine r ON r.oid = a.aggfnoid
UNION ALL
SELECT CASE typtype WHEN 'e' THEN 'enum' WHEN 'd' THEN 'domain' WHEN 'r' THEN 'range' ELSE 'base type' END, name,
       concat_ws(' ', pg_get_userbyid(typowner),
           (SELECT string_agg(quote_literal(e.enumlabel), ',' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = type.oid),
           CASE WHEN typtype = 'd' THEN concat_ws(' ', format_type(typbasetype, typtypmod), typnotnull, typdefault, collation_name) END,
           (SELECT concat_ws(' ', format_type(g.rngsubtype, NULL), o.opcname, c.collname, nullif(g.rngcanonical::oid, 0)::regproc, nullif(g.rngsubdiff::oid, 0)::regproc)
              FROM pg_range g JOIN pg_opclass o ON o.oid = g.rngsubopc LEFT JOIN pg_collation c ON c.oid = g.rngcollation WHERE g.rngtypid = type.oid),
           CASE WHEN typtype = 'b' THEN concat_ws(' ', typlen, typbyval, typalign, typstorage, typcategory, typispreferred, typdelim, typinput, typoutput,
               typreceive, typsend, typmodin, typmodout, typanalyze, nullif(nullif(subscript, '-'), '0'), format_type(nullif(typelem, 0), NULL), typdefault) END)
  FROM type WHERE typtype IN ('e', 'd', 'r', 'p') OR typtype = 'b' AND typcategory <> 'A'
UNION ALL
SELECT 'sequence', r.name,
       concat_ws(' ', pg_get_userbyid(r.relowner), format_type(s.seqtypid, NULL), s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle,
           r.relpersistence,
           (SELECT format('owned by %s.%I %s', d.refobjid::regclass, a.attname, d.deptype) FROM pg_depend d
              JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_class'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')))
  FROM pg_sequence s JOIN relation r ON r.oid = s.seqrelid
UNION ALL
SELECT 'extension', quote_ident(extname), n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
UNION ALL
SELECT 'extension version', quote_ident(extname), extversion FROM pg_extension
UNION ALL
SELECT 'operator', format('%I.%s (%s, %s)', n.nspname, o.oprname, format_type(nullif(o.oprleft, 0), NULL), format_type(nullif(o.oprright, 0), NULL)),
       concat_ws(' ', pg_get_userbyid(o.oprowner), format_type(o.oprresult, NULL), o.oprcode, o.oprcanmerge, o.oprcanhash,
           nullif(o.oprcom, 0)::regoperator, nullif(o.oprnegate, 0)::regoperator, o.oprrest, o.oprjoin)
  FROM pg_operator o JOIN namespace n ON n.oid = o.oprnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_operator'::regclass AND m.objid = o.oid)
UNION ALL
SELECT 'operator class', format('%I.%I using %I', n.nspname, o.opcname, a.amname),
       concat_ws(' ', pg_get_userbyid(o.opcowner), f.opfname, format_type(o.opcintype, NULL), o.opcdefault, format_type(nullif(o.opckeytype, 0), NULL))
  FROM pg_opclass o JOIN namespace n ON n.oid = o.opcnamespace JOIN pg_am a ON a.oid = o.opcmethod JOIN pg_opfamily f ON f.oid = o.opcfamily
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_opclass'::regclass AND m.objid = o.oid)
UNION ALL
SELECT 'operator family', format('%I.%I using %I', n.nspname, f.opfname, a.amname),
       concat_ws(' ', pg_get_userbyid(f.opfowner),
           (SELECT string_agg(concat_ws(' ', x.amopstrategy, x.amoppurpose, x.amopopr::regoperator), ',' ORDER BY x.amoplefttype::regtype::text COLLATE "C", x.amoprighttype::regtype::text COLLATE "C", x.amopstrategy)
              FROM pg_amop x WHERE x.amopfamily = f.oid),
           (SELECT string_agg(concat_ws(' ', x.amprocnum, x.amproc::regprocedure), ',' ORDER BY x.amproclefttype::regtype::text COLLATE "C", x.amprocrighttype::regtype::text COLLATE "C", x.amprocnum)
              FROM pg_amproc x WHERE x.amprocfamily = f.oid))
  FROM pg_opfamily f JOIN namespace n ON n.oid = f.opfnamespace JOIN pg_am a ON a.oid = f.opfmethod
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_opfamily'::regclass AND m.objid = f.oid)
UNION ALL
SELECT 'access method', quote_ident(a.amname), concat_ws(' ', a.amtype, a.amhandler)
  FROM pg_am a WHERE a.oid >= 16384 AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_am'::regclass AND m.objid = a.oid)
UNION ALL
SELECT 'transform', format('%s for %s', format_type(t.trftype, NULL), l.lanname), concat_ws(' ', t.trffromsql, t.trftosql)
  FROM pg_transform t JOIN pg_language l ON l.oid = t.trflang
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_transform'::regclass AND m.objid = t.oid)
UNION ALL
SELECT 'cast', format('%s as %s', format_type(c.castsource, NULL), format_type(c.casttarget, NULL)),
       concat_ws(' ', nullif(c.castfunc, 0)::regproc, c.castcontext, c.castmethod)
  FROM pg_cast c
 WHERE c.oid >= 16384
   AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_cast'::regclass AND m.objid = c.oid)
   -- A range has one to its multirange from 14 on, by itself.
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_cast'::regclass AND d.objid = c.oid AND d.deptype = 'i')
UNION ALL
SELECT 'collation', format('%I.%I', n.nspname, c.collname),
       concat_ws(' ', pg_get_userbyid(c.collowner), c.collprovider, c.collencoding, coalesce(to_jsonb(c) ->> 'collisdeterministic', 'true'),
           coalesce(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', CASE WHEN c.collprovider = 'i' THEN c.collcollate END),
           CASE WHEN c.collprovider = 'c' THEN c.collcollate || ' ' || c.collctype END, to_jsonb(c) ->> 'collicurules')
  FROM pg_collation c JOIN namespace n ON n.oid = c.collnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_collation'::regclass AND m.objid = c.oid)
UNION ALL
SELECT 'conversion', format('%I.%I', n.nspname, c.conname),
       concat_ws(' ', pg_get_userbyid(c.conowner), pg_encoding_to_char(c.conforencoding), pg_encoding_to_char(c.contoencoding), c.conproc, c.condefault)
  FROM pg_conversion c JOIN namespace n ON n.oid = c.connamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_conversion'::regclass AND m.objid = c.oid)
UNION ALL
SELECT 'text search configuration', format('%I.%I', n.nspname, c.cfgname),
       concat_ws(' ', pg_get_userbyid(c.cfgowner), p.prsname,
           (SELECT string_agg(m.maptokentype || ':' || m.mapdict::regdictionary, ',' ORDER BY m.maptokentype, m.mapseqno)
              FROM pg_ts_config_map m WHERE m.mapcfg = c.oid))
  FROM pg_ts_config c JOIN namespace n ON n.oid = c.cfgnamespace JOIN pg_ts_parser p ON p.oid = c.cfgparser
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_ts_config'::regclass AND m.objid = c.oid)
UNION ALL
SELECT 'text search dictionary', format('%I.%I', n.nspname, d.dictname), concat_ws(' ', pg_get_userbyid(d.dictowner), t.tmplname, d.dictinitoption)
  FROM pg_ts_dict d JOIN namespace n ON n.oid = d.dictnamespace JOIN pg_ts_template t ON t.oid = d.dicttemplate
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_ts_dict'::regclass AND m.objid = d.oid)
UNION ALL
SELECT 'text search parser', format('%I.%I', n.nspname, p.prsname), concat_ws(' ', p.prsstart, p.prstoken, p.prsend, p.prsheadline, p.prslextype)
  FROM pg_ts_parser p JOIN namespace n ON n.oid = p.prsnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_ts_parser'::regclass AND m.objid = p.oid)
UNION ALL
SELECT 'text search template', format('%I.%I', n.nspname, t.tmplname), concat_ws(' ', t.tmplinit, t.tmpllexize)
  FROM pg_ts_template t JOIN namespace n ON n.oid = t.tmplnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_ts_template'::regclass AND m.objid = t.oid)
UNION ALL
SELECT 'language', quote_ident(l.lanname),
       concat_ws(' ', pg_get_userbyid(l.lanowner), l.lanpltrusted, l.lanplcallfoid::regproc, nullif(l.laninline, 0)::regproc, nullif(l.lanvalidator, 0)::regproc)
  FROM pg_language l
 WHERE l.lanispl AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_language'::regclass AND m.objid = l.oid)
UNION ALL
SELECT 'event trigger', quote_ident(e.evtname), concat_ws(' ', pg_get_userbyid(e.evtowner), e.evtevent, e.evtfoid::regproc, e.evtenabled, array_to_string(e.evttags, ','))
  FROM pg_event_trigger e
 WHERE e.evtname !~ '^pgcutover_ddl'
   AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_event_trigger'::regclass AND m.objid = e.oid)
UNION ALL
SELECT 'foreign data wrapper', quote_ident(f.fdwname), concat_ws(' ', pg_get_userbyid(f.fdwowner), nullif(f.fdwhandler, 0)::regproc, nullif(f.fdwvalidator, 0)::regproc, array_to_string(f.fdwoptions, ','))
  FROM pg_foreign_data_wrapper f
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_foreign_data_wrapper'::regclass AND m.objid = f.oid)
UNION ALL
SELECT 'foreign server', quote_ident(s.srvname),
       concat_ws(' ', pg_get_userbyid(s.srvowner), f.fdwname, s.srvtype, s.srvversion, array_to_string(s.srvoptions, ','))
  FROM pg_foreign_server s JOIN pg_foreign_data_wrapper f ON f.oid = s.srvfdw
UNION ALL
SELECT 'user mapping', quote_ident(u.srvname) || ' for ' || coalesce(u.usename, 'public'), array_to_string(u.umoptions, ',')
  FROM pg_user_mappings u
UNION ALL
SELECT g.kind, g.name,
       string_agg(concat_ws(' ', CASE WHEN x.grantee = 0 THEN 'public' ELSE pg_get_userbyid(x.grantee)::text END, x.privilege_type, x.is_grantable,
                            CASE WHEN x.grantor <> g.owner THEN 'by ' || pg_get_userbyid(x.grantor) END),
                  ',' ORDER BY x.grantee = 0, pg_get_userbyid(x.grantee)::text COLLATE "C", x.privilege_type COLLATE "C",
                               pg_get_userbyid(x.grantor)::text COLLATE "C")
  FROM granted g CROSS JOIN LATERAL aclexplode(g.acl) x WHERE x.privilege_type <> 'MAINTAIN' GROUP BY g.kind, g.name
UNION ALL
SELECT 'default privileges', format('%s %s %s', pg_get_userbyid(d.defaclrole), n.nspname, d.defaclobjtype),
       (SELECT string_agg(concat_ws(' ', CASE WHEN x.grantee = 0 THEN 'public' ELSE pg_get_userbyid(x.grantee)::text END, x.privilege_type, x.is_grantable),
                          ',' ORDER BY x.grantee = 0, pg_get_userbyid(x.grantee), x.privilege_type)
          FROM (SELECT x.* FROM aclexplode(d.defaclacl) x) x WHERE x.privilege_type <> 'MAINTAIN')
  FROM pg_default_acl d LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace
UNION ALL
SELECT 'comment', regexp_replace(d.classoid::regclass::text, '^pg_', '') || ' ' || i.identity, d.description
  FROM pg_description d, LATERAL pg_identify_object(d.classoid, d.objoid, d.objsubid) i
 WHERE (d.objoid >= 16384 OR d.classoid = 'pg_namespace'::regclass AND d.objoid = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = 'public'))
   AND d.classoid NOT IN ('pg_extension'::regclass, 'pg_publication'::regclass, 'pg_subscription'::regclass)
   AND coalesce(i.schema, '') !~ '^"?(pg_toast|pg_temp|pgcutover)'
   AND NOT EXISTS (SELECT FROM member m WHERE m.classid = d.classoid AND m.objid = d.objoid)
UNION ALL
SELECT 'security label', regexp_replace(l.classoid::regclass::text, '^pg_', '') || ' ' || i.identity, l.provider || ' ' || l.label
  FROM pg_seclabel l, LATERAL pg_identify_object(l.classoid, l.objoid, l.objsubid) i
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = l.classoid AND m.objid = l.objoid)
