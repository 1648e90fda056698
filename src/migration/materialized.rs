//! Materialized views: no dump without data fills them, no stream carries them, so they are refreshed on the target.

use crate::ident::QualifiedName;
use crate::migration::schema::{RestoreFailure, SchemaError};
use crate::postgres::{Connector, Control};

/// What became of the materialized views.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// Those that could not be refreshed.
    pub failures: Vec<RestoreFailure>,
    /// Those that were left as they were, because of their size.
    pub left: Vec<QualifiedName>,
}

/// Refreshes, in the order of their dependencies, the materialized views of `database` that are populated on the source.
/// One that cannot be refreshed is a recorded failure; the others go on. With a limit, those are left as they are that
/// would make it more than so many bytes, as large as they are on the target now.
pub async fn refresh(
    source: &Connector,
    target: &Connector,
    database: &str,
    limit_bytes: Option<u64>,
) -> Result<Refreshed, SchemaError> {
    let read = |error| SchemaError::Read { database: database.to_owned(), source: error };
    let populated = populated(&source.control(database, "refresh").await?).await.map_err(read)?;
    let mut refreshed = Refreshed::default();
    if populated.is_empty() {
        return Ok(refreshed);
    }
    let control = target.control(database, "refresh").await?;
    let mut room = limit_bytes;
    for view in populated {
        if let Some(room) = &mut room {
            let size = "SELECT coalesce(pg_catalog.pg_table_size(pg_catalog.to_regclass($1)), 0)";
            let size: i64 = control.query_one(size, &[&view.to_string()]).await.map_err(read)?.get(0);
            let Some(rest) = room.checked_sub(size.unsigned_abs()) else {
                refreshed.left.push(view);
                continue;
            };
            *room = rest;
        }
        let Err(error) = control.batch_execute(&format!("REFRESH MATERIALIZED VIEW {view}")).await else { continue };
        let Some(refusal) = error.as_db_error() else {
            return Err(SchemaError::Lost { object: format!("MATERIALIZED VIEW {view}"), source: error });
        };
        refreshed.failures.push(RestoreFailure {
            kind: "MATERIALIZED VIEW DATA".to_owned(),
            object: view.to_string(),
            sqlstate: refusal.code().code().to_owned(),
            message: refusal.message().to_owned(),
        });
    }
    Ok(refreshed)
}

/// Populated materialized views, each after those it reads, directly or through views. What a function reads stands in no
/// catalogue: such views keep the order in which they were made.
async fn populated(source: &Control) -> Result<Vec<QualifiedName>, tokio_postgres::Error> {
    let query = "\
        WITH RECURSIVE uses AS ( \
            SELECT DISTINCT r.ev_class AS view, d.refobjid AS used FROM pg_rewrite r \
            JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass \
            JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('v', 'm') WHERE d.refobjid <> r.ev_class), \
        depth AS ( \
            SELECT c.oid, 0 AS level FROM pg_class c WHERE c.relkind IN ('v', 'm') \
            UNION SELECT u.view, d.level + 1 FROM depth d JOIN uses u ON u.used = d.oid WHERE d.level < 1000) \
        SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        JOIN depth d ON d.oid = c.oid \
        WHERE c.relkind = 'm' AND c.relispopulated AND n.nspname <> 'pgcutover' \
        GROUP BY c.oid, n.nspname, c.relname ORDER BY max(d.level), c.oid";
    let rows = source.query(query, &[]).await?;
    Ok(rows.iter().map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
}
