//! What verifications found, table by table, and of large tables range by range: a restart goes on behind what was
//! compared, and a cutover that requires a verification can look it up. Holds no values but keys: those of rows that
//! differ, and the bounds of ranges until their table is done.

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
ALTER TABLE pgcutover.verification_run ADD COLUMN IF NOT EXISTS stream text NOT NULL DEFAULT '';
ALTER TABLE pgcutover.verification_run ADD COLUMN IF NOT EXISTS report jsonb;
CREATE TABLE IF NOT EXISTS pgcutover.verification_begun (
    migration    text NOT NULL,
    database     text NOT NULL,
    schema_name  text NOT NULL,
    table_name   text NOT NULL,
    plan         jsonb NOT NULL,
    began_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, database, schema_name, table_name)
);
CREATE TABLE IF NOT EXISTS pgcutover.verification_chunk (
    migration    text NOT NULL,
    database     text NOT NULL,
    schema_name  text NOT NULL,
    table_name   text NOT NULL,
    number       bigint NOT NULL,
    result       jsonb NOT NULL,
    verified_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, database, schema_name, table_name, number),
    FOREIGN KEY (migration, database, schema_name, table_name) REFERENCES pgcutover.verification_begun ON DELETE CASCADE
);
";

/// A large table that is being compared range by range, as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct BegunRow {
    /// The database.
    pub database: String,
    /// The table.
    pub table: QualifiedName,
    /// Its ranges.
    pub plan: serde_json::Value,
    /// Numbers and results of those that were compared.
    pub chunks: Vec<(u32, serde_json::Value)>,
}

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
    /// Begins a run along a stream. One along the same stream that was interrupted goes on: its results stay. Earlier ones
    /// are forgotten otherwise, and so are those of a run that was begun more than a day ago: they tell of then.
    pub async fn begin_verification(&self, migration: &str, stream: &str) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "WITH engine AS (SELECT FROM pgcutover.engine WHERE generation = $2),
                 open AS (
                     SELECT FROM pgcutover.verification_run
                      WHERE migration = $1 AND NOT complete AND stream = $3 AND began_at > now() - interval '1 day'),
                 forgotten AS (
                     DELETE FROM pgcutover.verification
                      WHERE migration = $1 AND NOT EXISTS (SELECT FROM open) AND EXISTS (SELECT FROM engine)),
                 void AS (
                     DELETE FROM pgcutover.verification_begun
                      WHERE migration = $1 AND NOT EXISTS (SELECT FROM open) AND EXISTS (SELECT FROM engine))
                 INSERT INTO pgcutover.verification_run (migration, complete, stream)
                 SELECT $1, false, $3 FROM engine
                 ON CONFLICT (migration) DO UPDATE SET complete = false, stream = excluded.stream,
                     began_at = CASE WHEN EXISTS (SELECT FROM open) THEN verification_run.began_at ELSE now() END",
                &[&migration, &self.generation().0, &stream],
            )
            .await
            .map_err(|source| CatalogError::query("begin a verification", source))?;
        self.must_be_one(written)
    }

    /// Keeps what a run came to, in place of what the one before it did. Whether one was interrupted stays as it is.
    pub async fn keep_report(&self, migration: &str, report: &serde_json::Value) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "INSERT INTO pgcutover.verification_run (migration, complete, report)
                 SELECT $1, true, $2 FROM pgcutover.engine WHERE generation = $3
                 ON CONFLICT (migration) DO UPDATE SET report = excluded.report",
                &[&migration, report, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("keep the report of a verification", source))?;
        self.must_be_one(written)
    }

    /// What the last run that came to its end came to; none: there was none.
    pub async fn report(&self, migration: &str) -> Result<Option<serde_json::Value>, CatalogError> {
        let client = self.client().await?;
        let row = client
            .query_opt("SELECT report FROM pgcutover.verification_run WHERE migration = $1", &[&migration])
            .await
            .map_err(|source| CatalogError::query("read the report of the verification", source))?;
        Ok(row.and_then(|row| row.get(0)))
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

    /// Keeps into which ranges a table is divided. What was kept of it earlier is forgotten.
    pub async fn begin_table(
        &self,
        migration: &str,
        database: &str,
        table: &QualifiedName,
        plan: &serde_json::Value,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "WITH engine AS (SELECT FROM pgcutover.engine WHERE generation = $6),
                 void AS (
                     DELETE FROM pgcutover.verification_chunk
                      WHERE (migration, database, schema_name, table_name) = ($1, $2, $3, $4) AND EXISTS (SELECT FROM engine))
                 INSERT INTO pgcutover.verification_begun (migration, database, schema_name, table_name, plan)
                 SELECT $1, $2, $3, $4, $5 FROM engine
                 ON CONFLICT (migration, database, schema_name, table_name)
                 DO UPDATE SET plan = excluded.plan, began_at = now()",
                &[&migration, &database, &table.schema, &table.name, plan, &self.generation().0],
            )
            .await
            .map_err(|source| CatalogError::query("keep the ranges of a table", source))?;
        self.must_be_one(written)
    }

    /// Keeps what was found in one range.
    pub async fn set_chunk(
        &self,
        migration: &str,
        database: &str,
        table: &QualifiedName,
        number: u32,
        result: &serde_json::Value,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "INSERT INTO pgcutover.verification_chunk (migration, database, schema_name, table_name, number, result)
                 SELECT $1, $2, $3, $4, $5, $6 FROM pgcutover.engine WHERE generation = $7
                 ON CONFLICT (migration, database, schema_name, table_name, number)
                 DO UPDATE SET result = excluded.result, verified_at = now()",
                &[
                    &migration,
                    &database,
                    &table.schema,
                    &table.name,
                    &i64::from(number),
                    result,
                    &self.generation().0,
                ],
            )
            .await
            .map_err(|source| CatalogError::query("keep the verification of a range", source))?;
        self.must_be_one(written)
    }

    /// The tables that an interrupted run has come to.
    pub async fn begun(&self, migration: &str) -> Result<Vec<BegunRow>, CatalogError> {
        let client = self.client().await?;
        let failed = |source| CatalogError::query("read the verification's ranges", source);
        let rows = client
            .query(
                "SELECT database, schema_name, table_name, plan FROM pgcutover.verification_begun WHERE migration = $1",
                &[&migration],
            )
            .await
            .map_err(failed)?;
        let mut begun = Vec::new();
        for row in &rows {
            let table = QualifiedName::new(row.get::<_, String>(1), row.get::<_, String>(2));
            let database: String = row.get(0);
            let chunks = client
                .query(
                    "SELECT number, result FROM pgcutover.verification_chunk
                      WHERE (migration, database, schema_name, table_name) = ($1, $2, $3, $4)",
                    &[&migration, &database, &table.schema, &table.name],
                )
                .await
                .map_err(failed)?;
            let chunk = |row: &tokio_postgres::Row| Some((u32::try_from(row.get::<_, i64>(0)).ok()?, row.get(1)));
            let chunks = chunks.iter().filter_map(chunk).collect();
            begun.push(BegunRow { database, table, plan: row.get(3), chunks });
        }
        Ok(begun)
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
                "WITH engine AS (SELECT FROM pgcutover.engine WHERE generation = $6),
                 done AS (
                     DELETE FROM pgcutover.verification_begun
                      WHERE (migration, database, schema_name, table_name) = ($1, $2, $3, $4) AND EXISTS (SELECT FROM engine))
                 INSERT INTO pgcutover.verification (migration, database, schema_name, table_name, result)
                 SELECT $1, $2, $3, $4, $5 FROM engine
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
