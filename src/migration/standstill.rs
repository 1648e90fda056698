//! Whether the definitions of a server are still those that were compared, and tables that no stream carries still empty.
//!
//! Definitions are compared before a cutover fences anything, and until its pause anybody may make others: a table that is
//! made meanwhile is in no stream, and its rows would be missing without an error anywhere. So what the catalogue shows is
//! summed up, the definitions are compared after that, and they are summed up again when nobody is left who could change
//! them: two sums that are equal say that what was compared is what there is.
//!
//! The sum is one prepared statement that takes no lock: 8 ms where there are 1,000 tables of ten columns. It knows objects by
//! number, name and type and not by the transaction that wrote them, because TRUNCATE and REFRESH rewrite rows of the
//! catalogue too. Temporary objects and ours do not count; nor do the numbers of indexes, which REINDEX CONCURRENTLY changes.

use tokio_postgres::Statement;

use super::{drift, publication};
use crate::postgres::Control;

const SUM: &str = "
WITH namespace AS (
    SELECT oid FROM pg_catalog.pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'pgcutover')),
relation AS (
    SELECT c.oid, c.relname, c.relnamespace, c.relkind, c.relpersistence
      FROM pg_catalog.pg_class c JOIN namespace n ON n.oid = c.relnamespace
     WHERE c.relpersistence <> 't'),
fact (a, b, name) AS (
    SELECT CASE WHEN relkind IN ('i', 'I') THEN 0 ELSE oid::bigint END,
           (relnamespace::bigint << 16) | (pg_catalog.ascii(relkind::text) << 8) | pg_catalog.ascii(relpersistence::text),
           relname
      FROM relation
    UNION ALL
    SELECT (a.attrelid::bigint << 16) | a.attnum,
           (a.atttypid::bigint << 2) | (a.attnotnull::int << 1) | a.atthasdef::int, a.attname
      FROM pg_catalog.pg_attribute a JOIN relation r ON r.oid = a.attrelid
     WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f') AND a.attnum > 0
    UNION ALL
    SELECT i.inhrelid::bigint, i.inhparent::bigint, 'parent'
      FROM pg_catalog.pg_inherits i JOIN relation r ON r.oid = i.inhrelid WHERE r.relkind NOT IN ('i', 'I')
    UNION ALL
    SELECT k.conrelid::bigint, pg_catalog.ascii(k.contype::text), k.conname
      FROM pg_catalog.pg_constraint k JOIN relation r ON r.oid = k.conrelid WHERE k.contype IN ('c', 'f', 'p', 'u', 'x')
    UNION ALL
    SELECT g.tgrelid::bigint, pg_catalog.ascii(g.tgenabled::text), g.tgname
      FROM pg_catalog.pg_trigger g JOIN relation r ON r.oid = g.tgrelid WHERE NOT g.tgisinternal
    UNION ALL
    SELECT w.ev_class::bigint, pg_catalog.ascii(w.ev_enabled::text), w.rulename
      FROM pg_catalog.pg_rewrite w JOIN relation r ON r.oid = w.ev_class
    UNION ALL
    SELECT p.polrelid::bigint, 0, p.polname FROM pg_catalog.pg_policy p JOIN relation r ON r.oid = p.polrelid
    UNION ALL
    SELECT p.oid::bigint, 0, p.proname FROM pg_catalog.pg_proc p JOIN namespace n ON n.oid = p.pronamespace
    UNION ALL
    SELECT t.oid::bigint, 0, t.typname FROM pg_catalog.pg_type t JOIN namespace n ON n.oid = t.typnamespace
     WHERE t.typtype IN ('e', 'd', 'r')
    UNION ALL
    SELECT e.enumtypid::bigint, 0, e.enumlabel FROM pg_catalog.pg_enum e)
SELECT count(*),
       coalesce(sum(pg_catalog.hashint8(a # (pg_catalog.hashint8(b)::bigint << 32) # pg_catalog.hashname(name))), 0)::bigint
  FROM fact";

/// How many definitions there are, and the sum of a hash of each.
type Sum = (i64, i64);

/// What the definitions of a database came to when it was begun.
#[derive(Debug)]
pub struct Standstill {
    statement: Statement,
    begun_at: Sum,
    /// Asks which of the tables that no stream carries hold rows; none: there are no such tables.
    rows_apart: Option<String>,
}

/// What has come in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Something was defined, changed or dropped.
    Definitions,
    /// Rows of these tables, which are in no stream.
    Rows(Vec<String>),
}

impl Standstill {
    /// Sums up what there is in the database of this session. Definitions that are compared from now on are those.
    pub async fn begin(server: &Control, publication: &str) -> Result<Self, tokio_postgres::Error> {
        if server.version_num() >= 110_000 {
            // With tens of thousands of tables the statement is dear enough to be compiled, which takes longer than it does.
            server.batch_execute("SET jit = off").await?;
        }
        let statement = server.prepare(SUM).await?;
        let begun_at = sum(server, &statement).await?;
        let published = publication::published(server, publication).await?;
        let rows_apart = drift::rows_apart(&drift::apart(server, &published).await?);
        Ok(Self { statement, begun_at, rows_apart })
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
        if sum? != self.begun_at {
            return Ok(Some(Broken::Definitions));
        }
        let tables: Vec<String> = rows?.iter().map(|row| row.get(0)).collect();
        Ok(if tables.is_empty() { None } else { Some(Broken::Rows(tables)) })
    }
}

async fn sum(server: &Control, statement: &Statement) -> Result<Sum, tokio_postgres::Error> {
    let row = server.query_one(statement, &[]).await?;
    Ok((row.get(0), row.get(1)))
}
