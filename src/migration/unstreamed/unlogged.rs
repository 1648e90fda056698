//! Unlogged tables: their rows, as text, in the encoding of the database that they come from.

use futures_util::{SinkExt as _, TryStreamExt as _};
use tokio_postgres::{Client, Row};

use super::UnstreamedError;
use crate::ident::{QualifiedName, quote_literal};
use crate::postgres::Control;

/// Unlogged tables that hold rows themselves, and are the user's.
const LIST: &str = "
SELECT n.nspname::text, c.relname::text, pg_catalog.pg_table_size(c.oid)
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence = 'u' AND n.nspname !~ '^pg_'
   AND n.nspname NOT IN ('information_schema', 'pgcutover')
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                    WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
 ORDER BY 3 DESC, 1, 2";

/// Columns that COPY takes values for, as a list for SQL, and the encoding of the database; PostgreSQL 12 brought
/// generated columns.
const COLUMNS: &str = "
SELECT coalesce(string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY a.attnum), ''),
       pg_catalog.current_setting('server_encoding')
  FROM pg_catalog.pg_attribute a
 WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped
   AND coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') = ''";

/// Whether a foreign key refers to the table, which TRUNCATE refuses then.
const REFERENCED: &str = "
SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint
                WHERE contype = 'f' AND confrelid = pg_catalog.to_regclass($1))";

/// With their size on disk, largest first.
pub(super) async fn list(server: &Client) -> Result<Vec<(QualifiedName, u64)>, tokio_postgres::Error> {
    let table = |row: &Row| {
        let size = u64::try_from(row.get::<_, i64>(2)).unwrap_or(0);
        (QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)), size)
    };
    Ok(server.query(LIST, &[]).await?.iter().map(table).collect())
}

/// Replaces the rows of the tables that differ. Returns how many those were.
pub(super) async fn bring_over(from: &Control, to: &Control) -> Result<usize, UnstreamedError> {
    let listed = list(from).await.map_err(UnstreamedError::query("unlogged tables", "listing them"))?;
    let mut carried = 0;
    for (table, _) in listed {
        let hashed = hash_sql(&table, from.version_num().min(to.version_num()));
        let (here, there) = tokio::join!(fingerprint(from, &hashed), fingerprint(to, &hashed));
        let here = here.map_err(UnstreamedError::query(&table, "reading its rows"))?;
        let there = there.map_err(UnstreamedError::query(&table, "reading its rows on the other server"))?;
        if here != there {
            replace(from, to, &table).await?;
            carried += 1;
        }
    }
    Ok(carried)
}

/// Number of rows, and the sum of a hash of each as the server shows it: in any order, and every row counts. Where two
/// majors show a value differently, the table is carried without need.
fn hash_sql(table: &QualifiedName, oldest: u32) -> String {
    let hash = if oldest >= 110_000 {
        "pg_catalog.hashtextextended(ROW(t.*)::text COLLATE \"C\", 0)"
    } else {
        "('x' || substr(md5(convert_to(ROW(t.*)::text, 'UTF8')), 1, 16))::bit(64)::bigint"
    };
    format!("SELECT count(*), coalesce(sum({hash}), 0)::text FROM ONLY {table} t")
}

async fn fingerprint(server: &Client, hashed: &str) -> Result<(i64, String), tokio_postgres::Error> {
    let row = server.query_one(hashed, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn replace(from: &Client, to: &Client, table: &QualifiedName) -> Result<(), UnstreamedError> {
    let failed = |doing| UnstreamedError::query(table, doing);
    let name = table.to_string();
    let row = from.query_one(COLUMNS, &[&name]).await.map_err(failed("reading its columns"))?;
    let (columns, encoding): (&str, &str) = (row.get(0), row.get(1));
    let columns = if columns.is_empty() { String::new() } else { format!(" ({columns})") };
    let options = format!("WITH (FORMAT text, ENCODING {})", quote_literal(encoding));
    to.batch_execute("BEGIN").await.map_err(failed("beginning a transaction on the other server"))?;
    let emptying = failed("emptying it on the other server");
    let referenced = to.query_one(REFERENCED, &[&name]).await;
    let referenced: bool = referenced.map_err(failed("looking for foreign keys on the other server"))?.get(0);
    let empty = if referenced { format!("DELETE FROM ONLY {name}") } else { format!("TRUNCATE ONLY {name}") };
    to.batch_execute(&empty).await.map_err(emptying)?;
    let rows = from.copy_out(&format!("COPY {name}{columns} TO STDOUT {options}")).await;
    let mut rows = std::pin::pin!(rows.map_err(failed("reading its rows"))?);
    let taken = to.copy_in(&format!("COPY {name}{columns} FROM STDIN {options}")).await;
    let mut taken = std::pin::pin!(taken.map_err(failed("writing its rows on the other server"))?);
    while let Some(data) = rows.try_next().await.map_err(failed("reading its rows"))? {
        taken.send(data).await.map_err(failed("writing its rows on the other server"))?;
    }
    taken.as_mut().finish().await.map_err(failed("writing its rows on the other server"))?;
    to.batch_execute("COMMIT").await.map_err(failed("committing its rows on the other server"))
}
