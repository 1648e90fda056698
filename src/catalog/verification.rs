//! What verifications found, table by table: a restart goes on behind the last table that was compared, and a cutover
//! that requires a verification can look it up. Holds no values but the keys of rows that differ.

use super::migrations::{CatalogError, MigrationCatalog};
use crate::ident::QualifiedName;

/// Tables of the target's control database. Idempotent.
pub const TARGET_CONTROL_DDL: &str = r"
CREATE TABLE IF NOT EXISTS pgcutover.verification (
    migration    text NOT NULL,
    database     text NOT NULL,
    schema_name  text NOT NULL,
    table_name   text NOT NULL,
    result       jsonb NOT NULL,
    verified_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, database, schema_name, table_name)
);
CREATE TABLE IF NOT EXISTS pgcutover.repair (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    migration    text NOT NULL,
    database     text NOT NULL,
    schema_name  text NOT NULL,
    table_name   text NOT NULL,
    what         jsonb NOT NULL,
    began_at     timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS pgcutover.verification_run (
    migration    text PRIMARY KEY,
    complete     boolean NOT NULL,
    began_at     timestamptz NOT NULL DEFAULT now()
);
";

/// The result for one table, as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifiedRow {
    /// The database.
    pub database: String,
    /// The table.
    pub table: QualifiedName,
    /// What was found.
    pub result: serde_json::Value,
}

impl MigrationCatalog {
    /// Begins a run. One that was interrupted goes on: its results stay. Earlier ones are forgotten otherwise.
    pub async fn begin_verification(&self, migration: &str) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "WITH open AS (
                     SELECT FROM pgcutover.verification_run WHERE migration = $1 AND NOT complete),
                 forgotten AS (
                     DELETE FROM pgcutover.verification WHERE migration = $1 AND NOT EXISTS (SELECT FROM open))
                 INSERT INTO pgcutover.verification_run (migration, complete)
                 SELECT $1, false FROM pgcutover.engine WHERE generation = $2
                 ON CONFLICT (migration) DO UPDATE SET complete = false",
                &[&migration, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("begin a verification", source))?;
        self.must_be_one(written)
    }

    /// Every table of the run was compared.
    pub async fn end_verification(&self, migration: &str) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.verification_run r SET complete = true
                   FROM pgcutover.engine e WHERE r.migration = $1 AND e.generation = $2",
                &[&migration, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("end a verification", source))?;
        self.must_be_one(written)
    }

    /// Keeps what was found in one table.
    pub async fn set_verified(
        &self,
        migration: &str,
        database: &str,
        table: &QualifiedName,
        result: &serde_json::Value,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "INSERT INTO pgcutover.verification (migration, database, schema_name, table_name, result)
                 SELECT $1, $2, $3, $4, $5 FROM pgcutover.engine WHERE generation = $6
                 ON CONFLICT (migration, database, schema_name, table_name)
                 DO UPDATE SET result = excluded.result, verified_at = now()",
                &[&migration, &database, &table.schema, &table.name, result, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("keep the verification of a table", source))?;
        self.must_be_one(written)
    }

    /// Journals rows that are about to be written or removed: keys and counts, never values.
    pub async fn repairing(
        &self,
        migration: &str,
        database: &str,
        table: &QualifiedName,
        what: &serde_json::Value,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "INSERT INTO pgcutover.repair (migration, database, schema_name, table_name, what)
                 SELECT $1, $2, $3, $4, $5 FROM pgcutover.engine WHERE generation = $6",
                &[&migration, &database, &table.schema, &table.name, what, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("journal a repair", source))?;
        self.must_be_one(written)
    }

    /// Everything on record, by database and table.
    pub async fn verified(&self, migration: &str) -> Result<Vec<VerifiedRow>, CatalogError> {
        let client = self.client().await?;
        let rows = client
            .query(
                "SELECT database, schema_name, table_name, result FROM pgcutover.verification WHERE migration = $1
                 ORDER BY database, schema_name, table_name",
                &[&migration],
            )
            .await
            .map_err(|source| CatalogError::query("read the verification", source))?;
        let row = |row: &tokio_postgres::Row| VerifiedRow {
            database: row.get(0),
            table: QualifiedName::new(row.get::<_, String>(1), row.get::<_, String>(2)),
            result: row.get(3),
        };
        Ok(rows.iter().map(row).collect())
    }
}
