//! Comparing two databases, table by table, by what is in them.
//!
//! A table's digest does not depend on the order of rows: the number of rows and the sum of a hash of each row's text.

use std::fmt::Write as _;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error};

use crate::ident::{QualifiedName, quote_literal};

/// Two tables with equal digests hold equal rows, but for a chance of one in 2^60.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// Rows counted.
    pub rows: i64,
    /// Sum of 60 bits of each row's md5, as text.
    pub sum: String,
}

/// Settings under which both servers write values in the same way, whatever their major and their defaults.
const SAME_TEXT: &str = "SET extra_float_digits = 0; SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres';
    SET TimeZone = 'UTC'; SET bytea_output = 'hex'; SET search_path = pg_catalog; SET row_security = off";

/// Prepares `client` for [`digest`].
pub async fn pin_text(client: &Client) -> Result<(), Error> {
    client.batch_execute(SAME_TEXT).await
}

/// Digest of the rows of `table` for which `condition` holds; `parameters` belong to the condition.
pub async fn digest(
    client: &Client,
    table: &QualifiedName,
    condition: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Digest, Error> {
    let sql = format!(
        "SELECT count(*), coalesce(sum(('x' || substr(md5(t::text), 1, 15))::bit(60)::bigint::numeric), 0)::text
         FROM ONLY {table} t WHERE {condition}"
    );
    let row = client.query_one(sql.as_str(), parameters).await?;
    Ok(Digest { rows: row.get(0), sum: row.get(1) })
}

/// Every table with rows of its own and every materialised view, without the catalogues and what pgcutover keeps.
pub async fn tables(client: &Client) -> Result<Vec<QualifiedName>, Error> {
    relations(client, "'r', 'm'").await
}

async fn relations(client: &Client, kinds: &str) -> Result<Vec<QualifiedName>, Error> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ({kinds}) AND c.relpersistence <> 't' AND n.nspname <> 'pgcutover'
           AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' ORDER BY 1, 2"
    );
    let rows = client.query(sql.as_str(), &[]).await?;
    Ok(rows.iter().map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
}

/// Last value of every sequence, and whether it was handed out.
pub async fn sequences(client: &Client) -> Result<Vec<(QualifiedName, i64, bool)>, Error> {
    let mut found = Vec::new();
    for name in relations(client, "'S'").await? {
        let row = client.query_one(format!("SELECT last_value, is_called FROM {name}").as_str(), &[]).await?;
        found.push((name, row.get(0), row.get(1)));
    }
    Ok(found)
}

/// Indexes, constraints, triggers and views, each as one line that should be the same on both servers. Not-null
/// constraints are left out: PostgreSQL 18 lists them, older majors do not.
pub async fn objects(client: &Client) -> Result<Vec<String>, Error> {
    let visible = "n.nspname <> 'pgcutover' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'";
    let mut sql = String::new();
    let namespace = |column: &str| format!("JOIN pg_catalog.pg_namespace n ON n.oid = {column}");
    let _ = write!(
        sql,
        "SELECT 'index ' || pg_catalog.pg_get_indexdef(i.indexrelid) || CASE WHEN i.indisvalid THEN '' ELSE ' invalid' END
           FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indrelid {} WHERE {visible}
         UNION ALL SELECT 'constraint ' || c.relname || ' ' || k.conname || ' ' || k.contype::text
                || CASE WHEN k.convalidated THEN '' ELSE ' not valid' END
           FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid {}
           WHERE k.contype <> 'n' AND {visible}
         UNION ALL SELECT 'trigger ' || c.relname || ' ' || t.tgname || ' ' || t.tgenabled::text
           FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid {}
           WHERE NOT t.tgisinternal AND {visible}
         UNION ALL SELECT 'relation ' || c.relname || ' ' || c.relkind::text FROM pg_catalog.pg_class c {} WHERE {visible}
         ORDER BY 1",
        namespace("c.relnamespace"),
        namespace("c.relnamespace"),
        namespace("c.relnamespace"),
        namespace("c.relnamespace"),
    );
    Ok(client.query(sql.as_str(), &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Everything in which two databases that nobody writes to differ, one line each; empty: they are equal.
pub async fn differences(source: &Client, target: &Client) -> Result<Vec<String>, Error> {
    pin_text(source).await?;
    pin_text(target).await?;
    let mut found = different_lines(&objects(source).await?, &objects(target).await?);
    let on_target = tables(target).await?;
    for table in tables(source).await? {
        if !on_target.contains(&table) {
            // Already among the lines about relations.
            continue;
        }
        let (here, there) = (digest(source, &table, "true", &[]).await?, digest(target, &table, "true", &[]).await?);
        if here != there {
            found.push(format!(
                "{table}: source has {} rows, target {}, or their content differs",
                here.rows, there.rows
            ));
        }
    }
    let on_target = sequences(target).await?;
    for (name, value, called) in sequences(source).await? {
        let there = on_target.iter().find(|(other, ..)| *other == name);
        if there.is_some_and(|(_, other, other_called)| (*other, *other_called) != (value, called)) {
            found.push(format!("sequence {name}: {value} on the source, {there:?} on the target"));
        }
    }
    Ok(found)
}

/// Lines that are on one side only.
pub fn different_lines(source: &[String], target: &[String]) -> Vec<String> {
    let only = |here: &[String], there: &[String], side: &str| -> Vec<String> {
        here.iter().filter(|line| !there.contains(line)).map(|line| format!("only on the {side}: {line}")).collect()
    };
    let mut lines = only(source, target, "source");
    lines.extend(only(target, source, "target"));
    lines
}

/// `ARRAY[…]` of numbers as a literal, for conditions that are used on servers of any major.
pub fn bigint_array(numbers: &[i64]) -> String {
    let list: Vec<String> = numbers.iter().map(i64::to_string).collect();
    format!("{}::bigint[]", quote_literal(&format!("{{{}}}", list.join(","))))
}
