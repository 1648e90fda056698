//! Whether the definitions of a server are still those that were compared, rights those that were brought over, and tables
//! that no stream carries still empty.
//!
//! Definitions are compared before a cutover fences anything, and until its pause anybody may make others: a table that is
//! made meanwhile is in no stream, and its rows would be missing without an error anywhere. Roles and rights are brought over
//! before that too: a password that was changed meanwhile would be the old one again. So what the catalogue shows is summed
//! up, definitions are compared and rights brought over after that, and it is summed up again when nobody is left who could
//! change it: two sums that are equal say that what was compared is what there is.
//!
//! The sum is one prepared statement that takes no lock: 10 to 20 ms where there are 1,000 tables of ten columns. It knows
//! relations by number, name and properties and not by the transaction that wrote them, because TRUNCATE and REFRESH rewrite
//! rows of the catalogue too; what these leave alone, such as functions, defaults and parameters of sequences, it knows by
//! the transaction. Temporary objects and ours do not count; nor do the numbers of indexes, which REINDEX CONCURRENTLY changes.
//!
//! ALTER TABLE with a new type and USING may leave names and types as they are, write every row anew, and send none along a
//! stream. It gives the table another file, as TRUNCATE does, which a stream brings. So the files are summed up beside the
//! definitions, and only where they are others, which transactions have written the rows of columns: TRUNCATE writes none.

use tokio_postgres::Statement;

use super::{drift, publication};
use crate::postgres::Control;

/// `{roles}` stands for what can be read of roles.
const SUM: &str = "
WITH namespace AS (
    SELECT oid, pg_catalog.hashtext(xmin::text)::bigint AS written, nspname FROM pg_catalog.pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'pgcutover')),
relation AS (
    SELECT c.oid, c.relname, c.relnamespace, c.relkind, c.relpersistence, c.relfilenode, c.relowner, c.relacl,
           c.relrowsecurity, c.relforcerowsecurity, c.relpartbound
      FROM pg_catalog.pg_class c JOIN namespace n ON n.oid = c.relnamespace
     WHERE c.relpersistence <> 't'),
fact (a, b, name) AS (
    SELECT CASE WHEN relkind IN ('i', 'I') THEN 0 ELSE oid::bigint END,
           ((relnamespace::bigint << 16) | (pg_catalog.ascii(relkind::text) << 8) | pg_catalog.ascii(relpersistence::text))
           # (relrowsecurity::int::bigint << 50) # (relforcerowsecurity::int::bigint << 51) # (relowner::bigint << 20)
           # (coalesce(pg_catalog.hash_array(relacl), 0)::bigint << 24)
           # (coalesce(pg_catalog.hashtext(relpartbound::text), 0)::bigint << 28),
           relname
      FROM relation
    UNION ALL
    SELECT (a.attrelid::bigint << 16) | a.attnum,
           ((a.atttypid::bigint << 4) | ((a.attidentity = 'a')::int << 3) | ((a.attidentity = 'd')::int << 2)
            | (a.attnotnull::int << 1) | a.atthasdef::int)
           # (a.atttypmod::bigint << 36) # (a.attcollation::bigint << 20)
           # (coalesce(pg_catalog.hash_array(a.attacl), 0)::bigint << 24),
           a.attname
      FROM pg_catalog.pg_attribute a JOIN relation r ON r.oid = a.attrelid
     WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f') AND a.attnum > 0
    UNION ALL
    SELECT (d.adrelid::bigint << 16) | d.adnum, pg_catalog.hashtext(d.xmin::text)::bigint, 'default'
      FROM pg_catalog.pg_attrdef d JOIN relation r ON r.oid = d.adrelid
    UNION ALL
    SELECT s.seqrelid::bigint, pg_catalog.hashtext(s.xmin::text)::bigint, 'sequence'
      FROM pg_catalog.pg_sequence s JOIN relation r ON r.oid = s.seqrelid
    UNION ALL
    SELECT i.inhrelid::bigint, i.inhparent::bigint, 'parent'
      FROM pg_catalog.pg_inherits i JOIN relation r ON r.oid = i.inhrelid WHERE r.relkind NOT IN ('i', 'I')
    UNION ALL
    SELECT (k.conrelid::bigint << 32) | k.contypid::bigint, pg_catalog.ascii(k.contype::text), k.conname
      FROM pg_catalog.pg_constraint k JOIN namespace n ON n.oid = k.connamespace WHERE k.contype IN ('c', 'f', 'p', 'u', 'x')
    UNION ALL
    SELECT g.tgrelid::bigint, pg_catalog.hashtext(g.xmin::text)::bigint, g.tgname
      FROM pg_catalog.pg_trigger g JOIN relation r ON r.oid = g.tgrelid WHERE NOT g.tgisinternal
    UNION ALL
    SELECT w.ev_class::bigint, pg_catalog.hashtext(w.xmin::text)::bigint, w.rulename
      FROM pg_catalog.pg_rewrite w JOIN relation r ON r.oid = w.ev_class
    UNION ALL
    SELECT p.polrelid::bigint, pg_catalog.hashtext(p.xmin::text)::bigint, p.polname
      FROM pg_catalog.pg_policy p JOIN relation r ON r.oid = p.polrelid
    UNION ALL
    SELECT p.oid::bigint, pg_catalog.hashtext(p.xmin::text)::bigint, p.proname
      FROM pg_catalog.pg_proc p JOIN namespace n ON n.oid = p.pronamespace
    UNION ALL
    SELECT t.oid::bigint, pg_catalog.hashtext(t.xmin::text)::bigint, t.typname
      FROM pg_catalog.pg_type t JOIN namespace n ON n.oid = t.typnamespace
     WHERE t.typtype IN ('e', 'd', 'r')
    UNION ALL
    SELECT oid::bigint, written, nspname FROM namespace
    UNION ALL
    SELECT e.enumtypid::bigint, 0, e.enumlabel FROM pg_catalog.pg_enum e),
right_of (a, b, name) AS (
    {roles}
    UNION ALL
    SELECT (roleid::bigint << 32) | member::bigint, pg_catalog.hashtext(xmin::text)::bigint, 'member'
      FROM pg_catalog.pg_auth_members
    UNION ALL
    SELECT (s.setdatabase::bigint << 32) | s.setrole::bigint, pg_catalog.hashtext(setting)::bigint, 'setting'
      FROM pg_catalog.pg_db_role_setting s CROSS JOIN LATERAL pg_catalog.unnest(s.setconfig) setting
     WHERE pg_catalog.split_part(setting, '=', 1) <> 'default_transaction_read_only'
    UNION ALL
    SELECT datdba::bigint, coalesce(pg_catalog.hash_array(datacl), 0)::bigint, datname
      FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()
    UNION ALL
    SELECT defaclrole::bigint, pg_catalog.hashtext(xmin::text)::bigint, 'default' FROM pg_catalog.pg_default_acl)
SELECT count(*),
       coalesce(sum(pg_catalog.hashint8(a # (pg_catalog.hashint8(b)::bigint << 32) # pg_catalog.hashname(name))), 0)::bigint,
       (SELECT coalesce(sum(pg_catalog.hashint8((oid::bigint << 32) # relfilenode::bigint)), 0)::bigint
          FROM relation WHERE relkind = 'r'),
       (SELECT coalesce(sum(pg_catalog.hashint8(a # (pg_catalog.hashint8(b)::bigint << 32) # pg_catalog.hashname(name))),
                        0)::bigint
          FROM right_of)
  FROM fact";

/// Roles where passwords can be read, and so are brought over: a new one is a new row.
const ROLES: &str =
    "SELECT r.oid::bigint, pg_catalog.hashtext(r.xmin::text)::bigint, r.rolname FROM pg_catalog.pg_authid r";

/// Roles as everybody sees them.
const ROLES_SHOWN: &str = "
    SELECT r.oid::bigint, pg_catalog.hashtext(pg_catalog.concat_ws(',', r.rolsuper, r.rolinherit, r.rolcreaterole,
               r.rolcreatedb, r.rolcanlogin, r.rolreplication, r.rolconnlimit, r.rolvaliduntil, r.rolbypassrls))::bigint, r.rolname
      FROM pg_catalog.pg_roles r";

/// Which transactions have written the rows of columns.
const WRITTEN: &str = "
SELECT coalesce(sum(pg_catalog.hashint8(((a.attrelid::bigint << 16) | a.attnum) # (a.xmin::text::bigint << 32))), 0)::bigint
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND a.attnum > 0
   AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgcutover')";

/// What the catalogue comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sum {
    /// How many definitions there are, and the sum of a hash of each.
    definitions: (i64, i64),
    /// The same of the files of tables.
    files: i64,
    /// And of roles and what they may do beside owning and being granted objects.
    rights: i64,
}

/// What the definitions of a database came to when it was begun.
#[derive(Debug)]
pub struct Standstill {
    statement: Statement,
    begun_at: Sum,
    /// The sum of [`WRITTEN`]; it is asked once more only where a table has another file.
    columns_written: i64,
    /// Asks which of the tables that no stream carries hold rows; none: there are no such tables.
    rows_apart: Option<String>,
}

/// What has come in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Something was defined, changed, granted or dropped.
    Definitions,
    /// Roles, their passwords, memberships or settings, or rights on the database.
    Rights,
    /// Rows of these tables, which are in no stream.
    Rows(Vec<String>),
}

impl Standstill {
    /// Sums up what there is in the database of this session. Definitions that are compared from now on are those, and
    /// rights that are brought over.
    pub async fn begin(server: &Control, publication: &str) -> Result<Self, tokio_postgres::Error> {
        if server.version_num() >= 110_000 {
            // With tens of thousands of tables the statement is dear enough to be compiled, which takes longer than it does.
            server.batch_execute("SET jit = off").await?;
        }
        let reads = "SELECT pg_catalog.has_table_privilege('pg_catalog.pg_authid', 'SELECT')";
        let reads_passwords: bool = server.query_typed_one(reads, &[]).await?.get(0);
        let roles = if reads_passwords { ROLES } else { ROLES_SHOWN };
        let statement = server.prepare(&SUM.replace("{roles}", roles)).await?;
        // First, so that what comes in between is seen.
        let columns_written = written(server).await?;
        let begun_at = sum(server, &statement).await?;
        let published = publication::published(server, publication).await?;
        let rows_apart = drift::rows_apart(&drift::apart(server, &published).await?);
        Ok(Self { statement, begun_at, columns_written, rows_apart })
    }

    /// What has come since; asked through the same session.
    pub async fn broken(&self, server: &Control) -> Result<Option<Broken>, tokio_postgres::Error> {
        let rows = async {
            match &self.rows_apart {
                Some(select) => server.query_typed(select, &[]).await,
                None => Ok(Vec::new()),
            }
        };
        let sum = sum(server, &self.statement);
        // A table that is gone is no failure to be told: what was defined has changed.
        let (sum, rows) = tokio::join!(sum, rows);
        let sum = sum?;
        let is_rewritten =
            async || Ok(sum.files != self.begun_at.files && written(server).await? != self.columns_written);
        if sum.definitions != self.begun_at.definitions || is_rewritten().await? {
            return Ok(Some(Broken::Definitions));
        }
        if sum.rights != self.begun_at.rights {
            return Ok(Some(Broken::Rights));
        }
        let tables: Vec<String> = rows?.iter().map(|row| row.get(0)).collect();
        Ok(if tables.is_empty() { None } else { Some(Broken::Rows(tables)) })
    }
}

async fn sum(server: &Control, statement: &Statement) -> Result<Sum, tokio_postgres::Error> {
    let row = server.query_one(statement, &[]).await?;
    Ok(Sum { definitions: (row.get(0), row.get(1)), files: row.get(2), rights: row.get(3) })
}

async fn written(server: &Control) -> Result<i64, tokio_postgres::Error> {
    Ok(server.query_typed_one(WRITTEN, &[]).await?.get(0))
}
