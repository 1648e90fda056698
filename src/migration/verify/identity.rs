//! What is behind the name of a table: other rows may be there as soon as it is something else, and no stream has brought them.
//!
//! ALTER TABLE with a new type and USING, or a column that is dropped and added again, writes every row anew and tells nobody:
//! names and types stay what they are, and no counter of streamed rows moves. What changes is here.

use std::collections::HashMap;
use std::fmt;

use super::VerifyError;
use super::align::Sides;
use crate::ident::QualifiedName;
use crate::postgres::Control;

/// Not the same any more once a table was replaced, rewritten, truncated, or given other columns. The file changes with what
/// makes its rows others, and is another table's where the name is. A column's row in the catalogue is written by whoever
/// alters it, and not by TRUNCATE or VACUUM.
const IDENTITIES: &str = "
SELECT w.schema, w.name, c.oid, c.relfilenode,
       (SELECT string_agg(a.attnum || ' ' || a.atttypid || ' ' || a.xmin || ' ' || a.attname, ',' ORDER BY a.attnum)
          FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
  FROM unnest($1::text[], $2::text[]) AS w (schema, name)
  JOIN pg_namespace n ON n.nspname = w.schema::name
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name::name
 WHERE c.relkind = 'r'";

/// What a table is on one server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) oid: u32,
    file: u32,
    columns: Option<String>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}({})", self.oid, self.file, self.columns.as_deref().unwrap_or_default())
    }
}

/// What a table is on both servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identities {
    source: Identity,
    target: Identity,
}

impl Identities {
    /// Whether it is another table now, or was altered; one that was only emptied was not.
    pub fn is_altered(&self, now: &Self) -> bool {
        let altered = |before: &Identity, now: &Identity| (before.oid, &before.columns) != (now.oid, &now.columns);
        altered(&self.source, &now.source) || altered(&self.target, &now.target)
    }
}

/// Those of `tables` that are on both servers: one question to each.
pub async fn identities(
    sides: &Sides,
    tables: &[QualifiedName],
) -> Result<HashMap<QualifiedName, Identities>, VerifyError> {
    let (source, target) = tokio::try_join!(sides.enter_source("verify"), sides.enter_target("verify"))?;
    let (source, mut target) = tokio::try_join!(look_up(&source, tables), look_up(&target, tables))?;
    let both = |(table, source)| target.remove(&table).map(|target| (table, Identities { source, target }));
    Ok(source.into_iter().filter_map(both).collect())
}

/// None: there is no table of that name.
pub(super) async fn identity(server: &Control, table: &QualifiedName) -> Result<Option<Identity>, VerifyError> {
    Ok(look_up(server, std::slice::from_ref(table)).await?.remove(table))
}

async fn look_up(server: &Control, tables: &[QualifiedName]) -> Result<HashMap<QualifiedName, Identity>, VerifyError> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let rows = server.query(IDENTITIES, &[&schemas, &names]).await.map_err(VerifyError::query("looking tables up"))?;
    let read = |row: &tokio_postgres::Row| {
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        (QualifiedName::new(&schema, &name), Identity { oid: row.get(2), file: row.get(3), columns: row.get(4) })
    };
    Ok(rows.iter().map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_alone_is_no_alteration() {
        let one = |oid, file, columns: &str| Identity { oid, file, columns: Some(columns.to_owned()) };
        let both = |source| Identities { source, target: one(9, 9, "1 23 700 id") };
        let before = both(one(1, 1, "1 23 700 id"));
        assert!(!before.is_altered(&both(one(1, 2, "1 23 700 id"))), "TRUNCATE");
        assert!(before.is_altered(&both(one(1, 2, "1 23 701 id"))), "ALTER TABLE");
        assert!(before.is_altered(&both(one(2, 2, "1 23 700 id"))), "another one of that name");
        let after = Identities { target: one(9, 8, "1 23 800 id"), ..before.clone() };
        assert!(before.is_altered(&after), "on the target");
    }
}
