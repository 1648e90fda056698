//! What was defined on the source after the migration began.
//!
//! No logical stream carries definitions. A table that was made meanwhile is in no publication: its rows would be missing
//! after a cutover, without an error anywhere. A column added to a table that nobody writes to says nothing either. So
//! the definitions of both servers are compared before a cutover begins, and what the target lacks is named.
//!
//! A table that was dropped and made again has its name and its columns, and is in no publication all the same: every
//! table of the migration must still be published, under the name that it had at first. And a table that was made on both servers by hand is in none either: it
//! may be there, and hold no rows.
//!
//! Compared is what a session would miss, or be kept from without it: names, columns with their types, NOT NULL, whether a
//! column has a default or is generated, partitions and children, indexes, constraints, functions, types with the labels
//! of enums, triggers and whether they are disabled (of others than ordinary ones a rule of the validation tells), rules,
//! policies and row security; and, by itself because no row hangs on it, owners and grants. What they say in detail is
//! compared by verification. Objects of extensions belong to the extension's version and are left out.

use std::collections::{BTreeSet, HashSet};

use tokio_postgres::GenericClient;

use super::copy::{self, SourceTable};
use super::publication;
use crate::ident::{QualifiedName, quote_literal};
use crate::postgres::Control;

/// Differences that are named; the rest is counted.
const NAMED: usize = 5;

/// What the queries below are about.
const OBJECTS: &str = "
WITH member AS (
    SELECT classid, objid FROM pg_catalog.pg_depend WHERE deptype = 'e'),
namespace AS (
    SELECT oid, nspname FROM pg_catalog.pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'pgcutover')),
relation AS (
    SELECT c.oid, c.relkind, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity, c.relpartbound, c.relowner, c.relacl,
           pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
      FROM pg_catalog.pg_class c JOIN namespace n ON n.oid = c.relnamespace
     WHERE c.relpersistence <> 't'
       AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_catalog.pg_class'::regclass AND m.objid = c.oid)),
col AS (
    SELECT r.name || '.' || pg_catalog.quote_ident(a.attname) AS name, a.attnotnull, a.atthasdef, r.relowner, a.attacl,
           -- Since version 17 partitions have it from their parents.
           CASE WHEN r.relpartbound IS NULL THEN a.attidentity ELSE '' END AS attidentity,
           pg_catalog.format_type(a.atttypid, a.atttypmod) AS type
      FROM relation r JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
     WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f') AND a.attnum > 0 AND NOT a.attisdropped),
type AS (
    SELECT t.oid, pg_catalog.format('%I.%I', n.nspname, t.typname) AS name
      FROM pg_catalog.pg_type t JOIN namespace n ON n.oid = t.typnamespace
     WHERE t.typtype IN ('e', 'd', 'r')
       AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_catalog.pg_type'::regclass AND m.objid = t.oid)),
routine AS (
    SELECT p.proowner, p.proacl,
           -- Since version 14 the word IN stands before every argument of a procedure that only goes in.
           pg_catalog.format('%I.%I(%s)', n.nspname, p.proname, CASE pg_catalog.to_jsonb(p) ->> 'prokind'
               WHEN 'p' THEN pg_catalog.regexp_replace(a.arguments, '(^|, )IN ', '\\1', 'g') ELSE a.arguments END) AS name
      FROM pg_catalog.pg_proc p JOIN namespace n ON n.oid = p.pronamespace
     CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_function_identity_arguments(p.oid) AS arguments) a
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_catalog.pg_proc'::regclass AND m.objid = p.oid)
       -- The constructors of a range come with it, and since version 14 there are more of them.
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                        WHERE d.classid = 'pg_catalog.pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'i')),
owned (name, owner, acl) AS (
    SELECT 'schema ' || n.nspname, s.nspowner, coalesce(s.nspacl, pg_catalog.acldefault('n', s.nspowner))
      FROM namespace n JOIN pg_catalog.pg_namespace s ON s.oid = n.oid
     WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_catalog.pg_namespace'::regclass AND m.objid = n.oid)
    UNION ALL SELECT name, relowner, relacl FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
    UNION ALL SELECT 'column ' || name, relowner, attacl FROM col WHERE attacl IS NOT NULL
    UNION ALL SELECT 'function ' || name, proowner, coalesce(proacl, pg_catalog.acldefault('f', proowner)) FROM routine)";

/// One line for each thing that must be there on both servers. The types are written the same by every major.
/// Constraints that partitions have from their parents are left out: the server names them, each major its own way.
const DEFINITIONS: &str = "
SELECT CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
                    WHEN 'f' THEN 'foreign table'
                    ELSE CASE WHEN relkind = 'r' AND relpersistence = 'u' THEN 'unlogged table' ELSE 'table' END END || ' ' || name
  FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
UNION ALL
SELECT 'sequence ' || r.name || ' by ' || s.seqincrement || ' from ' || s.seqmin || ' to ' || s.seqmax || ', cached ' || s.seqcache
       || CASE WHEN s.seqcycle THEN ', in a circle' ELSE '' END || ', ' || pg_catalog.format_type(s.seqtypid, NULL)
  FROM relation r JOIN pg_catalog.pg_sequence s ON s.seqrelid = r.oid
UNION ALL
SELECT 'column ' || name || ' ' || type FROM col
UNION ALL
SELECT 'partition or child ' || c.name || ' of ' || p.name
       || coalesce(' ' || pg_catalog.regexp_replace(pg_catalog.pg_get_expr(c.relpartbound, c.oid), '\\s', '', 'g'), '')
  FROM pg_catalog.pg_inherits i JOIN relation c ON c.oid = i.inhrelid JOIN relation p ON p.oid = i.inhparent
 WHERE c.relkind IN ('r', 'p', 'f')
UNION ALL
SELECT 'NOT NULL of column ' || name FROM col WHERE attnotnull
UNION ALL
SELECT 'default of column ' || name FROM col WHERE atthasdef OR attidentity <> ''
UNION ALL
SELECT 'row security of ' || name FROM relation WHERE relrowsecurity
UNION ALL
SELECT 'forced row security of ' || name FROM relation WHERE relforcerowsecurity
UNION ALL
SELECT 'policy ' || pg_catalog.quote_ident(p.polname) || ' on ' || r.name
  FROM pg_catalog.pg_policy p JOIN relation r ON r.oid = p.polrelid
UNION ALL
SELECT CASE g.tgenabled WHEN 'D' THEN 'disabled ' ELSE '' END || 'trigger ' || pg_catalog.quote_ident(g.tgname) || ' on ' || r.name
  FROM pg_catalog.pg_trigger g JOIN relation r ON r.oid = g.tgrelid
 WHERE NOT g.tgisinternal AND coalesce(pg_catalog.to_jsonb(g) ->> 'tgparentid', '0') = '0'
UNION ALL
SELECT 'rule ' || pg_catalog.quote_ident(w.rulename) || ' on ' || r.name
  FROM pg_catalog.pg_rewrite w JOIN relation r ON r.oid = w.ev_class
 WHERE w.rulename <> '_RETURN'
UNION ALL
SELECT 'type ' || name FROM type
UNION ALL
SELECT 'label ' || pg_catalog.quote_literal(e.enumlabel) || ' of type ' || t.name
  FROM type t JOIN pg_catalog.pg_enum e ON e.enumtypid = t.oid
UNION ALL
SELECT 'index ' || i.name || ' on ' || r.name
  FROM pg_catalog.pg_index x JOIN relation i ON i.oid = x.indexrelid JOIN relation r ON r.oid = x.indrelid
 WHERE x.indisvalid
UNION ALL
SELECT 'constraint ' || pg_catalog.quote_ident(k.conname) || ' on ' || r.name
  FROM pg_catalog.pg_constraint k JOIN relation r ON r.oid = k.conrelid
 WHERE k.contype IN ('c', 'f', 'p', 'u', 'x') AND coalesce(pg_catalog.to_jsonb(k) ->> 'conparentid', '0') = '0'
UNION ALL
SELECT 'function ' || name FROM routine";

/// Objects, and who may do what with each.
const RIGHTS: &str = "
-- Whose schema public is depends on the major.
SELECT name, 'owner ' || pg_catalog.pg_get_userbyid(owner) || ' of ' || name FROM owned
 WHERE name <> 'schema public' AND name NOT LIKE 'column %'
UNION ALL
-- MAINTAIN came with version 17.
SELECT name, 'grant of ' || x.privilege_type || ' on ' || name || ' to ' || coalesce(g.rolname, 'PUBLIC')
  FROM owned o CROSS JOIN LATERAL pg_catalog.aclexplode(o.acl) x LEFT JOIN pg_catalog.pg_roles g ON g.oid = x.grantee
 WHERE x.grantee <> o.owner AND (x.grantee = 0 OR g.oid IS NOT NULL) AND x.privilege_type <> 'MAINTAIN'
UNION ALL
-- Before version 15 it was not the default, and is not taken away by moving to a later one.
SELECT name, 'refusal of CREATE on schema public to PUBLIC' FROM owned o
 WHERE name = 'schema public' AND NOT EXISTS (
       SELECT FROM pg_catalog.aclexplode(o.acl) x WHERE x.grantee = 0 AND x.privilege_type = 'CREATE')";

/// What the target lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// `table public.new`, `column …`; at most a few.
    pub named: Vec<String>,
    /// How many there are.
    pub total: usize,
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.named.join(", "))?;
        match self.total - self.named.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Compares the definitions of one database; none when the target has everything, `tables` are all in `publication`, and no
/// other table holds rows.
pub async fn compare(
    source: &Control,
    target: &Control,
    publication: &str,
    tables: &[QualifiedName],
) -> Result<Option<Drift>, tokio_postgres::Error> {
    let mut wanted = definitions(&**source).await?;
    let found = definitions(&**target).await?;
    let published = publication::published(source, publication).await?;
    // The target lacks their rows, whatever its definitions are.
    let named: HashSet<&QualifiedName> = published.iter().collect();
    let unpublished = tables.iter().filter(|table| !named.contains(table));
    wanted.extend(unpublished.map(|table| format!("changes of table {}", plain(table))));
    let renamed = publication::renamed(source, publication).await?;
    wanted.extend(
        renamed.iter().map(|(is, was)| format!("rows of table {}, which was {} before", plain(is), plain(was))),
    );
    if let Some(held) = rows_apart(&apart(source, &published).await?) {
        let rows = source.query(&held, &[]).await?;
        wanted.extend(rows.iter().map(|row| format!("rows of table {}", row.get::<_, &str>(0))));
    }
    Ok(missing(&wanted, &found))
}

/// Compares who owns what and who may use it, of what is on both servers.
pub async fn compare_rights(source: &Control, target: &Control) -> Result<Option<Drift>, tokio_postgres::Error> {
    let (here, there) = (rights(&**source).await?, rights(&**target).await?);
    let objects: HashSet<&String> = there.iter().map(|(object, _)| object).collect();
    let is_there = |object: &String| objects.contains(object) || object.starts_with("column ");
    let wanted = here.into_iter().filter(|(object, _)| is_there(object)).map(|(_, right)| right).collect();
    let found = there.iter().map(|(_, right)| right.clone()).collect();
    Ok(missing(&wanted, &found))
}

/// Tables that a migration would bring over and that are in no publication of its: they were made since, on both servers.
/// Nothing brings their rows over.
pub(in crate::migration) async fn apart(
    server: &Control,
    published: &[QualifiedName],
) -> Result<Vec<SourceTable>, tokio_postgres::Error> {
    let published: HashSet<&QualifiedName> = published.iter().collect();
    let mut tables = copy::list_tables_unmeasured(server).await?;
    tables.retain(|table| !published.contains(&table.name));
    Ok(tables)
}

/// A statement that returns the names of those that hold rows; none: there are no tables.
pub(in crate::migration) fn rows_apart(tables: &[SourceTable]) -> Option<String> {
    let one = |table: &SourceTable| {
        let (name, filter) = (&table.name, table.filter.as_deref().unwrap_or_default());
        format!("SELECT {} WHERE EXISTS (SELECT FROM ONLY {name} {filter})", quote_literal(&plain(name)))
    };
    (!tables.is_empty()).then(|| tables.iter().map(one).collect::<Vec<_>>().join(" UNION ALL "))
}

fn plain(table: &QualifiedName) -> String {
    format!("{}.{}", table.schema, table.name)
}

/// Tables of this database that somebody has locked exclusively, with who has; at most a few.
pub(in crate::migration) async fn lockers(server: &Control) -> Result<Vec<String>, tokio_postgres::Error> {
    Ok(server.query(LOCKERS, &[]).await?.iter().map(|row| row.get(0)).collect())
}

const LOCKERS: &str = "
SELECT pg_catalog.format('%I.%I by %s', n.nspname, c.relname,
           coalesce('pid ' || l.pid || coalesce(' (' || nullif(a.application_name, '') || ')', ''), 'a prepared transaction'))
  FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
 WHERE l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
   AND l.mode = 'AccessExclusiveLock' AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid() AND c.relkind IN ('r', 'p', 'm')
 ORDER BY 1 LIMIT 5";

/// Without quotes: what is a keyword, and so needs them, differs between majors (`json` since PostgreSQL 16).
async fn definitions(client: &impl GenericClient) -> Result<BTreeSet<String>, tokio_postgres::Error> {
    let rows = client.query(format!("{OBJECTS}{DEFINITIONS}").as_str(), &[]).await?;
    Ok(rows.iter().map(|row| row.get::<_, &str>(0).replace('"', "")).collect())
}

/// Objects with their owners and grants.
async fn rights(client: &impl GenericClient) -> Result<Vec<(String, String)>, tokio_postgres::Error> {
    let rows = client.query(format!("{OBJECTS}{RIGHTS}").as_str(), &[]).await?;
    let plain = |row: &tokio_postgres::Row, column: usize| row.get::<_, &str>(column).replace('"', "");
    Ok(rows.iter().map(|row| (plain(row, 0), plain(row, 1))).collect())
}

fn missing(wanted: &BTreeSet<String>, found: &BTreeSet<String>) -> Option<Drift> {
    let missing: Vec<&String> = wanted.difference(found).collect();
    (!missing.is_empty()).then(|| Drift {
        named: missing.iter().take(NAMED).map(|name| (*name).clone()).collect(),
        total: missing.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_target_lacks_is_named_and_what_it_has_more_is_not() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(missing(&set(&["table a"]), &set(&["table a", "table b"])), None);
        let many: Vec<String> = (0..8).map(|number| format!("table t{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let drift = missing(&set(&many), &set(&["table t0"])).expect("seven are missing");
        assert_eq!(drift.to_string(), "table t1, table t2, table t3, table t4, table t5 and 2 more");
    }
}
