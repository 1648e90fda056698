//! How far the apply of one database is: a row in the target database itself, updated in the same transaction as the
//! rows it covers. That, and nothing else, makes the apply exactly-once.
//!
//! ```text
//! source WAL   … Begin 0/1A000 … Commit 0/1A000 (its record ends at 0/1A030) … Begin 0/1B000 …
//! target       BEGIN; rows; UPDATE progress SET commit_lsn = 0/1A000, end_lsn = 0/1A030; COMMIT
//! slot         confirmed 0/1A030 only after that COMMIT has been answered
//! restart      START_REPLICATION 0/1A030: the next transaction is the one at 0/1B000
//! ```

use tokio_postgres::GenericClient;

use super::claims::ServerIdentity;
use super::migrations::{CatalogError, Generation};
use crate::lsn::Lsn;

/// The only lane there is for now. Each lane of a parallel apply will have its own row.
pub const LANE: i32 = 0;

/// Tables of a migrated database on the target. Idempotent.
pub const TARGET_DATABASE_DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.progress (
    migration   text NOT NULL,
    lane        integer NOT NULL,
    generation  bigint NOT NULL,
    commit_lsn  pg_lsn NOT NULL,
    end_lsn     pg_lsn NOT NULL,
    marker      text,
    changed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, lane)
);
ALTER TABLE pgcutover.progress ADD COLUMN IF NOT EXISTS followed_system text,
                               ADD COLUMN IF NOT EXISTS followed_timeline integer;
";

/// Tables of a migrated database on the source: the row whose update tells the drain of a cutover that everything before
/// it has been applied. It is published, recognised by the applier, and never applied as data. Idempotent.
pub const SOURCE_DATABASE_DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.marker (
    id          integer PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    nonce       text NOT NULL
);
INSERT INTO pgcutover.marker (nonce) VALUES ('') ON CONFLICT DO NOTHING;
";

/// The progress of one lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where the commit record of the last applied transaction starts.
    pub commit_lsn: Lsn,
    /// Where the next transaction is read from: the end of that commit record, or a later keepalive position.
    pub end_lsn: Lsn,
    /// Nonce of the last marker that was applied.
    pub marker: Option<String>,
}

/// Claims the lane for `generation`, making the row at `start` when it is not there, and returns where it stands.
/// Fails when a later engine has claimed it.
pub async fn claim(
    client: &impl GenericClient,
    migration: &str,
    generation: Generation,
    start: Lsn,
) -> Result<Progress, CatalogError> {
    let row = client
        .query_opt(
            "INSERT INTO pgcutover.progress AS p (migration, lane, generation, commit_lsn, end_lsn)
             VALUES ($1, $2, $3, $4, $4)
             ON CONFLICT (migration, lane) DO UPDATE SET generation = excluded.generation
             WHERE p.generation <= excluded.generation
             RETURNING commit_lsn, end_lsn, marker",
            &[&migration, &LANE, &generation.0, &start],
        )
        .await
        .map_err(|source| CatalogError::query("claim the apply progress", source))?;
    let row = row.ok_or(CatalogError::Fenced(generation.0))?;
    Ok(Progress { commit_lsn: row.get(0), end_lsn: row.get(1), marker: row.get(2) })
}

/// The progress as it is stored; none before the stream has begun.
pub async fn read(client: &impl GenericClient, migration: &str) -> Result<Option<Progress>, CatalogError> {
    let row = client
        .query_opt(
            "SELECT commit_lsn, end_lsn, marker FROM pgcutover.progress WHERE migration = $1 AND lane = $2",
            &[&migration, &LANE],
        )
        .await
        .map_err(|source| CatalogError::query("read the apply progress", source))?;
    Ok(row.map(|row| Progress { commit_lsn: row.get(0), end_lsn: row.get(1), marker: row.get(2) }))
}

/// The server whose changes are applied, as it was last seen; none before it was looked at.
pub async fn followed(client: &impl GenericClient, migration: &str) -> Result<Option<ServerIdentity>, CatalogError> {
    let row = client
        .query_opt(
            "SELECT followed_system, followed_timeline FROM pgcutover.progress
             WHERE migration = $1 AND lane = $2 AND followed_system IS NOT NULL",
            &[&migration, &LANE],
        )
        .await
        .map_err(|source| CatalogError::query("read which server is followed", source))?;
    Ok(row.map(|row| ServerIdentity { system_identifier: row.get(0), timeline: row.get(1) }))
}

/// Keeps which server is followed. The lane must have been claimed.
pub async fn follow(
    client: &impl GenericClient,
    migration: &str,
    generation: Generation,
    server: &ServerIdentity,
) -> Result<(), CatalogError> {
    let kept = client
        .execute(
            "UPDATE pgcutover.progress SET followed_system = $1, followed_timeline = $2
             WHERE migration = $3 AND lane = $4 AND generation = $5",
            &[&server.system_identifier, &server.timeline, &migration, &LANE, &generation.0],
        )
        .await
        .map_err(|source| CatalogError::query("keep which server is followed", source))?;
    if kept == 1 { Ok(()) } else { Err(CatalogError::Fenced(generation.0)) }
}

/// Text of the statement that an apply transaction ends with: parameters commit_lsn, end_lsn, marker (null: keep),
/// migration, lane, generation. It must hit exactly one row; none means that a later engine has claimed the lane.
pub const UPDATE_SQL: &str = "UPDATE pgcutover.progress \
    SET commit_lsn = $1::pg_lsn, end_lsn = $2::pg_lsn, marker = coalesce($3::text, marker), changed_at = now() \
    WHERE migration = $4::text AND lane = $5::int AND generation = $6::bigint";
