-- kind, name and definition of every object that a migration carries over. Runs on every version from 10 on: what came
-- later is looked up through to_jsonb. The search path is pg_catalog, so every other name is written with its schema.
WITH member AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
namespace AS (
    SELECT oid, nspname FROM pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'pgcutover')),
relation AS (
    SELECT c.oid, c.relkind, c.relowner, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity, c.reloptions, c.relpartbound,
           c.relacl, format('%I.%I', n.nspname, c.relname) AS name
      FROM pg_class c JOIN namespace n ON n.oid = c.relnamespace
     WHERE c.relpersistence <> 't'
       AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_class'::regclass AND m.objid = c.oid)),
routine AS (
    SELECT p.oid, p.proowner, p.proacl, to_jsonb(p) AS j,
           format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS name
      FROM pg_proc p JOIN namespace n ON n.oid = p.pronamespace
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_proc'::regclass AND m.objid = p.oid)),
type AS (
    SELECT t.oid, t.typtype, t.typcategory, t.typrelid, t.typowner, t.typacl, t.typbasetype, t.typtypmod, t.typnotnull, t.typdefault,
           format('%I.%I', n.nspname, t.typname) AS name
      FROM pg_type t JOIN namespace n ON n.oid = t.typnamespace
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_type'::regclass AND m.objid = t.oid)),
-- MAINTAIN came with version 17, and only in what owners have by default.
granted (kind, name, owner, acl) AS (
    SELECT 'grant on schema', quote_ident(n.nspname), n.nspowner, n.nspacl FROM pg_namespace n JOIN namespace o ON o.oid = n.oid
     WHERE n.nspname <> 'public'
       AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_namespace'::regclass AND m.objid = n.oid)
    UNION ALL SELECT 'grant on relation', name, relowner, relacl FROM relation
    UNION ALL SELECT 'grant on function', name, proowner, coalesce(proacl, acldefault('f', proowner)) FROM routine
    UNION ALL SELECT 'grant on type', name, typowner, coalesce(typacl, acldefault('T', typowner)) FROM type
     WHERE typtype IN ('e', 'd', 'r') OR typtype = 'c' AND typrelid IN (SELECT oid FROM relation WHERE relkind = 'c')
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
       concat_ws(' ', pg_get_userbyid(relowner), relpersistence, relrowsecurity, relforcerowsecurity,
           (SELECT string_agg(o, ',' ORDER BY o) FROM unnest(relation.reloptions) o),
           CASE WHEN relkind = 'p' THEN pg_get_partkeydef(oid) END, pg_get_expr(relpartbound, oid),
           (SELECT string_agg(i.inhparent::regclass::text, ',' ORDER BY i.inhseqno) FROM pg_inherits i WHERE i.inhrelid = relation.oid),
           CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END)
  FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
UNION ALL
SELECT 'column', r.name || '.' || quote_ident(a.attname),
       concat_ws(' ', format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.attnotnull THEN 'NOT NULL' END, pg_get_expr(d.adbin, d.adrelid),
           nullif(a.attidentity::text, ''), nullif(to_jsonb(a) ->> 'attgenerated', ''), a.attstorage,
           CASE WHEN a.attcollation <> t.typcollation THEN a.collation_name END)
  FROM relation r
  JOIN (SELECT x.*, (SELECT format('%I.%I', n.nspname, c.collname) FROM pg_collation c
                       JOIN pg_namespace n ON n.oid = c.collnamespace WHERE c.oid = x.attcollation) AS collation_name
          FROM pg_attribute x) a ON a.attrelid = r.oid
  JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'index', i.name, pg_get_indexdef(i.oid)
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
SELECT 'statistics', format('%I.%I', n.nspname, s.stxname), pg_get_statisticsobjdef(s.oid)
  FROM pg_statistic_ext s JOIN namespace n ON n.oid = s.stxnamespace
UNION ALL
SELECT 'function', name,
       concat_ws(' ', pg_get_userbyid(proowner), pg_get_function_result(oid),
           CASE WHEN coalesce(j ->> 'prokind', CASE j ->> 'proisagg' WHEN 'true' THEN 'a' ELSE 'f' END) <> 'a'
                THEN pg_get_functiondef(oid) END)
  FROM routine
UNION ALL
SELECT 'aggregate', r.name,
       concat_ws(' ', a.aggkind, a.aggtransfn, a.aggfinalfn, a.aggcombinefn, format_type(a.aggtranstype, NULL), a.agginitval)
  FROM pg_aggregate a JOIN routine r ON r.oid = a.aggfnoid
UNION ALL
SELECT CASE typtype WHEN 'e' THEN 'enum' WHEN 'd' THEN 'domain' WHEN 'r' THEN 'range' ELSE 'base type' END, name,
       concat_ws(' ', pg_get_userbyid(typowner),
           (SELECT string_agg(quote_literal(e.enumlabel), ',' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = type.oid),
           CASE WHEN typtype = 'd' THEN concat_ws(' ', format_type(typbasetype, typtypmod), typnotnull, typdefault) END,
           (SELECT format_type(g.rngsubtype, NULL) FROM pg_range g WHERE g.rngtypid = type.oid))
  FROM type WHERE typtype IN ('e', 'd', 'r') OR typtype = 'b' AND typcategory <> 'A'
UNION ALL
SELECT 'sequence', r.name,
       concat_ws(' ', pg_get_userbyid(r.relowner), format_type(s.seqtypid, NULL), s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle)
  FROM pg_sequence s JOIN relation r ON r.oid = s.seqrelid
UNION ALL
SELECT 'extension', quote_ident(extname), n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
UNION ALL
SELECT 'operator', format('%I.%s (%s, %s)', n.nspname, o.oprname, format_type(o.oprleft, NULL), format_type(o.oprright, NULL)),
       concat_ws(' ', format_type(o.oprresult, NULL), o.oprcode, o.oprcanmerge, o.oprcanhash)
  FROM pg_operator o JOIN namespace n ON n.oid = o.oprnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_operator'::regclass AND m.objid = o.oid)
UNION ALL
SELECT 'operator class', format('%I.%I using %I', n.nspname, o.opcname, a.amname),
       concat_ws(' ', format_type(o.opcintype, NULL), o.opcdefault)
  FROM pg_opclass o JOIN namespace n ON n.oid = o.opcnamespace JOIN pg_am a ON a.oid = o.opcmethod
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_opclass'::regclass AND m.objid = o.oid)
UNION ALL
SELECT 'cast', format('%s as %s', format_type(c.castsource, NULL), format_type(c.casttarget, NULL)),
       concat_ws(' ', nullif(c.castfunc, 0)::regproc, c.castcontext, c.castmethod)
  FROM pg_cast c
 WHERE c.oid >= 16384
   AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_cast'::regclass AND m.objid = c.oid)
UNION ALL
SELECT 'collation', format('%I.%I', n.nspname, c.collname),
       concat_ws(' ', c.collprovider, c.collcollate, coalesce(to_jsonb(c) ->> 'collisdeterministic', 'true'))
  FROM pg_collation c JOIN namespace n ON n.oid = c.collnamespace
UNION ALL
SELECT 'conversion', format('%I.%I', n.nspname, c.conname), c.conproc::text
  FROM pg_conversion c JOIN namespace n ON n.oid = c.connamespace
UNION ALL
SELECT 'text search configuration', format('%I.%I', n.nspname, c.cfgname),
       (SELECT string_agg(m.maptokentype || ':' || m.mapdict::regdictionary, ',' ORDER BY m.maptokentype, m.mapseqno)
          FROM pg_ts_config_map m WHERE m.mapcfg = c.oid)
  FROM pg_ts_config c JOIN namespace n ON n.oid = c.cfgnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_ts_config'::regclass AND m.objid = c.oid)
UNION ALL
SELECT 'text search dictionary', format('%I.%I', n.nspname, d.dictname), d.dictinitoption
  FROM pg_ts_dict d JOIN namespace n ON n.oid = d.dictnamespace
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_ts_dict'::regclass AND m.objid = d.oid)
UNION ALL
SELECT 'language', quote_ident(l.lanname), concat_ws(' ', l.lanpltrusted, l.lanplcallfoid::regproc)
  FROM pg_language l
 WHERE l.lanispl AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_language'::regclass AND m.objid = l.oid)
UNION ALL
SELECT 'event trigger', quote_ident(e.evtname), concat_ws(' ', e.evtevent, e.evtfoid::regproc, e.evtenabled, array_to_string(e.evttags, ','))
  FROM pg_event_trigger e
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_event_trigger'::regclass AND m.objid = e.oid)
UNION ALL
SELECT 'foreign data wrapper', quote_ident(f.fdwname), concat_ws(' ', nullif(f.fdwhandler, 0)::regproc, array_to_string(f.fdwoptions, ','))
  FROM pg_foreign_data_wrapper f
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_foreign_data_wrapper'::regclass AND m.objid = f.oid)
UNION ALL
SELECT 'foreign server', quote_ident(s.srvname), concat_ws(' ', s.srvtype, s.srvversion, array_to_string(s.srvoptions, ','))
  FROM pg_foreign_server s
UNION ALL
SELECT 'user mapping', quote_ident(u.srvname) || ' for ' || coalesce(u.usename, 'public'), '' FROM pg_user_mappings u
UNION ALL
SELECT g.kind, g.name,
       (SELECT string_agg(concat_ws(' ', CASE WHEN x.grantee = 0 THEN 'public' ELSE pg_get_userbyid(x.grantee)::text END,
                                    x.privilege_type, x.is_grantable), ',' ORDER BY x.grantee = 0, pg_get_userbyid(x.grantee), x.privilege_type)
          FROM aclexplode(g.acl) x WHERE x.grantee <> g.owner AND x.privilege_type <> 'MAINTAIN')
  FROM granted g WHERE g.acl IS NOT NULL
UNION ALL
SELECT 'default privileges', format('%s %s %s', pg_get_userbyid(d.defaclrole), n.nspname, d.defaclobjtype),
       (SELECT string_agg(concat_ws(' ', CASE WHEN x.grantee = 0 THEN 'public' ELSE pg_get_userbyid(x.grantee)::text END, x.privilege_type),
                          ',' ORDER BY x.grantee = 0, pg_get_userbyid(x.grantee), x.privilege_type)
          FROM (SELECT x.* FROM aclexplode(d.defaclacl) x) x WHERE x.privilege_type <> 'MAINTAIN')
  FROM pg_default_acl d LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace
UNION ALL
SELECT 'comment', concat_ws(' ', r.name, quote_ident(a.attname)), d.description
  FROM pg_description d JOIN relation r ON r.oid = d.objoid AND d.classoid = 'pg_class'::regclass
  LEFT JOIN pg_attribute a ON a.attrelid = d.objoid AND a.attnum = d.objsubid AND d.objsubid > 0
UNION ALL
SELECT 'comment', r.name, d.description
  FROM pg_description d JOIN routine r ON r.oid = d.objoid AND d.classoid = 'pg_proc'::regclass
