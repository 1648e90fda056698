//! Where this program has set the sequences of a database: rows in that database, on the server that they were set on.
//!
//! A dry run or an aborted cutover leaves the sequences of the other server where it set them, and the application may set
//! its own back at any time. Only with these rows can a verification tell a sequence that was set from one that was used.
//!
//! `setval` is not transactional, so a row is written in a transaction of its own *before* the sequence is set, and rows of
//! earlier values are kept until the next cutover prepares: a crash in between leaves a row too many, never one too few.

use std::collections::HashSet;

use tokio_postgres::GenericClient;

use super::{RecordError, has_table};
use crate::ident::QualifiedName;

/// A table of every migrated database, on both servers. Idempotent.
pub const DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.sequence_position (
    schema_name    text NOT NULL,
    sequence_name  text NOT NULL,
    last_value     bigint NOT NULL,
    is_called      boolean NOT NULL,
    set_at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (schema_name, sequence_name, last_value, is_called)
);
";

/// Text of the statement that notes positions before they are set: schemas, names, last values, whether they were called.
pub const NOTE_SQL: &str = "INSERT INTO pgcutover.sequence_position (schema_name, sequence_name, last_value, is_called) \
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::boolean[]) ON CONFLICT DO NOTHING";

/// Text of the statement that notes these positions, of every sequence there is, and forgets all others.
pub const NOTE_ONLY_SQL: &str = "WITH wanted AS (\
        SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::boolean[]) AS s (schema_name, name, value, called)), \
    others AS (\
        DELETE FROM pgcutover.sequence_position p WHERE NOT EXISTS (SELECT FROM wanted s \
         WHERE (s.schema_name, s.name, s.value, s.called) = (p.schema_name, p.sequence_name, p.last_value, p.is_called))) \
    INSERT INTO pgcutover.sequence_position (schema_name, sequence_name, last_value, is_called) \
    SELECT * FROM wanted ON CONFLICT DO NOTHING";

/// Where a sequence stood.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Position {
    /// The sequence.
    pub name: QualifiedName,
    /// The value it gave last, or will give next when it was not called.
    pub last_value: i64,
    /// Whether `last_value` was given already.
    pub is_called: bool,
}

/// Every position that is noted in this database.
pub async fn noted(client: &impl GenericClient) -> Result<HashSet<Position>, RecordError> {
    if !has_table(client, "sequence_position").await? {
        return Ok(HashSet::new());
    }
    let sql = "SELECT schema_name, sequence_name, last_value, is_called FROM pgcutover.sequence_position";
    let rows = client.query(sql, &[]).await;
    let rows = rows.map_err(|source| RecordError::query("read where sequences were set", source))?;
    let position = |row: &tokio_postgres::Row| Position {
        name: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        last_value: row.get(2),
        is_called: row.get(3),
    };
    Ok(rows.iter().map(position).collect())
}
