//! Migrations in the catalogue of the target's control database: what was asked, where each stands, who may write.
//!
//! One engine at a time owns the migrations of a target. An advisory lock elects it; the generation it takes then fences
//! it: every write names the generation and must hit its row, so an engine that was replaced without noticing changes
//! nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::Mutex;

use super::RecordError;
use crate::postgres::{ConnectError, Connector, Control};
use crate::switch::ServerRole;

/// Tables of the target's control database that belong to migrations. Idempotent.
pub const TARGET_CONTROL_DDL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgcutover;
CREATE TABLE IF NOT EXISTS pgcutover.engine (
    id          integer PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    generation  bigint NOT NULL
);
INSERT INTO pgcutover.engine (generation) VALUES (0) ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS pgcutover.migration (
    name        text PRIMARY KEY,
    definition  jsonb NOT NULL,
    state       text NOT NULL,
    error       jsonb,
    validation  jsonb,
    generation  bigint NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    changed_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);
ALTER TABLE pgcutover.migration ADD COLUMN IF NOT EXISTS roles jsonb;
CREATE TABLE IF NOT EXISTS pgcutover.migration_database (
    migration   text NOT NULL REFERENCES pgcutover.migration ON DELETE CASCADE,
    database    text NOT NULL,
    step        text NOT NULL,
    slot        text NOT NULL,
    publication text NOT NULL,
    slot_start  pg_lsn,
    barrier     bigint,
    changed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, database)
);
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS direction text NOT NULL DEFAULT 'forward';
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS next_epoch bigint;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS next_slot text;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS next_publication text;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS next_start pg_lsn;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS watch_epoch bigint;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS watch_slot text;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS watch_publication text;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS watch_position pg_lsn;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS watch_stream bigint;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS watch_ended text;
ALTER TABLE pgcutover.migration_database ADD COLUMN IF NOT EXISTS carried jsonb;
CREATE TABLE IF NOT EXISTS pgcutover.migration_table (
    migration   text NOT NULL,
    database    text NOT NULL,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    state       text NOT NULL,
    snapshot    text,
    hand_over   pg_lsn,
    rows_total  bigint,
    bytes_total bigint,
    rows        bigint NOT NULL DEFAULT 0,
    bytes       bigint NOT NULL DEFAULT 0,
    error       jsonb,
    changed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, database, schema_name, table_name),
    FOREIGN KEY (migration, database) REFERENCES pgcutover.migration_database ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS pgcutover.fenced_write (
    migration    text NOT NULL,
    database     text NOT NULL,
    server       text NOT NULL,
    epoch        bigint NOT NULL,
    schema_name  text NOT NULL,
    table_name   text NOT NULL,
    kind         text NOT NULL,
    changes      bigint NOT NULL,
    first_at     timestamptz NOT NULL,
    last_at      timestamptz NOT NULL,
    PRIMARY KEY (migration, database, server, epoch, schema_name, table_name, kind),
    FOREIGN KEY (migration, database) REFERENCES pgcutover.migration_database ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS pgcutover.made (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    migration   text NOT NULL REFERENCES pgcutover.migration ON DELETE CASCADE,
    server      text NOT NULL,
    database    text NOT NULL,
    kind        text NOT NULL,
    name        text NOT NULL,
    undo        text,
    note        text NOT NULL DEFAULT '',
    made_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (migration, server, database, kind, name)
);
";

/// Key of the advisory lock, in the target's control database, whose holder runs the engine (`pgcut` in ASCII, then 1).
const ENGINE_LOCK: i64 = 0x7067_6375_7400_0001;

/// Which engine wrote something: counts up with every engine that took over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub i64);

/// The catalogue could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The control database could not be reached.
    #[error("could not reach the control database {database:?} of the target")]
    Connect {
        /// Its name.
        database: String,
        /// Why.
        source: ConnectError,
    },
    /// A statement failed.
    #[error("could not {what} in the target's control database")]
    Query {
        /// What was being done.
        what: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// Another engine has taken over; nothing was written.
    #[error("another pgcutover has taken over this target's migrations; generation {0} is over")]
    Fenced(i64),
    /// A row holds what this program does not understand: a newer one wrote it.
    #[error("the catalogue holds something this version does not know: {what}")]
    Unreadable {
        /// What was found.
        what: String,
    },
    /// The name is taken.
    #[error("a migration named {0:?} exists already on this target")]
    Exists(String),
}

impl CatalogError {
    pub(crate) fn query(what: &str, source: tokio_postgres::Error) -> Self {
        Self::Query { what: what.to_owned(), source }
    }
}

/// A handle on the catalogue, bound to one generation. Cheap to clone; reconnects by itself.
#[derive(Clone)]
pub struct MigrationCatalog {
    target: Connector,
    database: String,
    generation: Generation,
    client: Arc<Mutex<Option<Arc<Control>>>>,
}

impl std::fmt::Debug for MigrationCatalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationCatalog")
            .field("database", &self.database)
            .field("generation", &self.generation)
            .finish()
    }
}

/// The engine lock, held as long as the connection lives.
pub struct EngineLock {
    client: Control,
}

impl std::fmt::Debug for EngineLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineLock").finish_non_exhaustive()
    }
}

impl EngineLock {
    /// Resolves once the lock may have been lost. Asks the server every `every`, because a connection can be dead for a
    /// long time before anybody notices.
    pub async fn lost(&self, every: std::time::Duration) {
        while !self.client.is_closed() {
            tokio::time::sleep(every).await;
            match tokio::time::timeout(every * 3, self.client.simple_query("SELECT")).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => return,
            }
        }
    }
}

/// A migration as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrationRow {
    /// Its name.
    pub name: String,
    /// What was asked, without secrets.
    pub definition: serde_json::Value,
    /// Text of the state.
    pub state: String,
    /// Why it failed.
    pub error: Option<serde_json::Value>,
    /// Results of the last validation.
    pub validation: Option<serde_json::Value>,
    /// Seconds since the Unix epoch.
    pub created_at: f64,
    /// Seconds since the Unix epoch.
    pub finished_at: Option<f64>,
}

impl MigrationCatalog {
    /// Tries to become the engine of this target: takes the lock and, with it, the next generation. `None` when another
    /// engine has it. The schema must be there.
    pub async fn take_over(target: &Connector, database: &str) -> Result<Option<(Self, EngineLock)>, CatalogError> {
        let connect = |purpose: &'static str| async move {
            target
                .control(database, purpose)
                .await
                .map_err(|source| CatalogError::Connect { database: database.to_owned(), source })
        };
        let client = connect("engine-lock").await?;
        let taken: bool = client
            .query_one("SELECT pg_catalog.pg_try_advisory_lock($1)", &[&ENGINE_LOCK])
            .await
            .map_err(|source| CatalogError::query("take the engine lock", source))?
            .get(0);
        if !taken {
            return Ok(None);
        }
        let generation: i64 = client
            .query_one("UPDATE pgcutover.engine SET generation = generation + 1 RETURNING generation", &[])
            .await
            .map_err(|source| CatalogError::query("take the next generation", source))?
            .get(0);
        client
            .execute("UPDATE pgcutover.migration SET generation = $1", &[&generation])
            .await
            .map_err(|source| CatalogError::query("take over the migrations", source))?;
        let catalog = Self {
            target: target.clone(),
            database: database.to_owned(),
            generation: Generation(generation),
            client: Arc::new(Mutex::new(None)),
        };
        Ok(Some((catalog, EngineLock { client })))
    }

    /// The generation that this handle writes as.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether this is still the engine that the catalogue knows last. Whoever takes over counts up there before it writes
    /// anything anywhere.
    pub async fn is_latest(&self) -> Result<bool, CatalogError> {
        let client = self.client().await?;
        let row = client
            .query_one("SELECT generation FROM pgcutover.engine", &[])
            .await
            .map_err(|source| CatalogError::query("read which engine was the last", source))?;
        Ok(row.get::<_, i64>(0) == self.generation.0)
    }

    /// A live session in the control database.
    pub async fn client(&self) -> Result<Arc<Control>, CatalogError> {
        let mut client = self.client.lock().await;
        match client.as_ref() {
            Some(open) if !open.is_closed() => Ok(open.clone()),
            Some(_) | None => {
                let opened = self
                    .target
                    .control(&self.database, "catalog")
                    .await
                    .map_err(|source| CatalogError::Connect { database: self.database.clone(), source })?;
                Ok(client.insert(Arc::new(opened)).clone())
            }
        }
    }

    /// A write hit its row, or another engine has taken over.
    pub(crate) fn must_be_one(&self, rows: u64) -> Result<(), CatalogError> {
        if rows == 1 { Ok(()) } else { Err(CatalogError::Fenced(self.generation.0)) }
    }

    /// Accepts a migration, with its databases, in one transaction.
    pub async fn insert(
        &self,
        name: &str,
        definition: &serde_json::Value,
        state: &str,
        databases: &[NewDatabase],
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let (names, slots): (Vec<&str>, Vec<&str>) =
            databases.iter().map(|database| (database.database.as_str(), database.slot.as_str())).unzip();
        let publications: Vec<&str> = databases.iter().map(|database| database.publication.as_str()).collect();
        let inserted = client
            .query_one(
                "WITH owner AS (SELECT FROM pgcutover.engine WHERE generation = $4),
                      made AS (INSERT INTO pgcutover.migration (name, definition, state, generation)
                               SELECT $1, $2, $3, $4 FROM owner ON CONFLICT DO NOTHING RETURNING name),
                      parts AS (INSERT INTO pgcutover.migration_database (migration, database, step, slot, publication)
                                SELECT made.name, part.database, 'Waiting', part.slot, part.publication
                                FROM made, unnest($5::text[], $6::text[], $7::text[]) part (database, slot, publication))
                 SELECT (SELECT count(*) FROM owner), (SELECT count(*) FROM made)",
                &[&name, definition, &state, &self.generation.0, &names, &slots, &publications],
            )
            .await
            .map_err(|source| CatalogError::query("write the migration down", source))?;
        match (inserted.get::<_, i64>(0), inserted.get::<_, i64>(1)) {
            (0, _) => Err(CatalogError::Fenced(self.generation.0)),
            (_, 0) => Err(CatalogError::Exists(name.to_owned())),
            _ => Ok(()),
        }
    }

    /// Every migration, oldest first.
    pub async fn all(&self) -> Result<Vec<MigrationRow>, CatalogError> {
        let client = self.client().await?;
        let rows = client
            .query(
                "SELECT name, definition, state, error, validation, extract(epoch FROM created_at)::float8,
                        extract(epoch FROM finished_at)::float8
                 FROM pgcutover.migration ORDER BY created_at, name",
                &[],
            )
            .await
            .map_err(|source| CatalogError::query("read the migrations", source))?;
        Ok(rows
            .iter()
            .map(|row| MigrationRow {
                name: row.get(0),
                definition: row.get(1),
                state: row.get(2),
                error: row.get(3),
                validation: row.get(4),
                created_at: row.get(5),
                finished_at: row.get(6),
            })
            .collect())
    }

    /// Databases of a migration that one which was accepted later has, too, and may be using: its name by theirs.
    pub async fn taken_over(&self, name: &str) -> Result<HashMap<String, String>, CatalogError> {
        let client = self.client().await?;
        let rows = client
            .query(
                "SELECT mine.database, later.name
                 FROM pgcutover.migration own
                 JOIN pgcutover.migration_database mine ON mine.migration = own.name
                 JOIN pgcutover.migration_database d ON d.database = mine.database
                 JOIN pgcutover.migration later ON later.name = d.migration AND later.created_at > own.created_at
                 WHERE own.name = $1 AND later.state NOT IN ('Cancelled', 'Closed')
                   AND NOT (later.state = 'Completed' AND d.step = 'Waiting')",
                &[&name],
            )
            .await
            .map_err(|source| CatalogError::query("look for later migrations of the same databases", source))?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Makes a change of state durable. `finished` also sets the time at which the migration ended.
    pub async fn set_state(
        &self,
        name: &str,
        state: &str,
        error: Option<&serde_json::Value>,
        finished: bool,
    ) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration
                 SET state = $2, error = $3, changed_at = now(), finished_at = CASE WHEN $4 THEN now() END
                 WHERE name = $1 AND generation = $5",
                &[&name, &state, &error, &finished, &self.generation.0],
            )
            .await
            .map_err(|source| CatalogError::query("write the state down", source))?;
        self.must_be_one(written)
    }

    /// What is kept of the roles that were brought over, if they were.
    pub async fn roles(&self, name: &str) -> Result<Option<serde_json::Value>, CatalogError> {
        let client = self.client().await?;
        let row = client.query_opt("SELECT roles FROM pgcutover.migration WHERE name = $1", &[&name]).await;
        let row = row.map_err(|source| CatalogError::query("read what roles were brought over", source))?;
        Ok(row.and_then(|row| row.get(0)))
    }

    /// Keeps what roles have been brought over.
    pub async fn set_roles(&self, name: &str, roles: &serde_json::Value) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration SET roles = $2 WHERE name = $1 AND generation = $3",
                &[&name, roles, &self.generation.0],
            )
            .await
            .map_err(|source| CatalogError::query("keep what roles were brought over", source))?;
        self.must_be_one(written)
    }

    /// Keeps the results of a validation.
    pub async fn set_validation(&self, name: &str, validation: &serde_json::Value) -> Result<(), CatalogError> {
        let client = self.client().await?;
        let written = client
            .execute(
                "UPDATE pgcutover.migration SET validation = $2 WHERE name = $1 AND generation = $3",
                &[&name, validation, &self.generation.0],
            )
            .await
            .map_err(|source| CatalogError::query("keep the validation", source))?;
        self.must_be_one(written)
    }
}

/// A migration that is being cut over or rolled back, as far as the engine has noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completing {
    /// Its name.
    pub name: String,
    /// Where its databases go.
    pub leads_to: ServerRole,
    /// They move together.
    pub databases: Vec<String>,
}

/// Names of the migrations that were cancelled. A target without our schema has none.
pub async fn cancelled(control: &Control) -> Result<HashSet<String>, CatalogError> {
    if !is_there(control).await? {
        return Ok(HashSet::new());
    }
    let rows = control.query("SELECT name FROM pgcutover.migration WHERE state = 'Cancelled'", &[]).await;
    let rows = rows.map_err(|source| CatalogError::query("read the migrations that were cancelled", source))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn is_there(control: &Control) -> Result<bool, CatalogError> {
    super::has_table(&**control, "migration").await.map_err(|error| match error {
        RecordError::Query { what, source } => CatalogError::Query { what, source },
        error => CatalogError::Unreadable { what: error.to_string() },
    })
}

/// The migrations that are being cut over or rolled back. Needs no generation: it only reads. A target without our
/// schema has none.
pub async fn completing(control: &Control) -> Result<Vec<Completing>, CatalogError> {
    let failed = |source| CatalogError::query("read the migrations that are being cut over", source);
    if !is_there(control).await? {
        return Ok(Vec::new());
    }
    let rows = control
        .query(
            "SELECT m.name, m.state, array_agg(d.database ORDER BY d.database)
             FROM pgcutover.migration m JOIN pgcutover.migration_database d ON d.migration = m.name
             WHERE m.state IN ('CompletingMigration', 'RollingBack') GROUP BY m.name, m.state ORDER BY m.name",
            &[],
        )
        .await
        .map_err(failed)?;
    let completing = |row: &tokio_postgres::Row| Completing {
        name: row.get(0),
        leads_to: if row.get::<_, &str>(1) == "RollingBack" { ServerRole::Source } else { ServerRole::Target },
        databases: row.get(2),
    };
    Ok(rows.iter().map(completing).collect())
}

/// A database of a migration that is being accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDatabase {
    /// Its name, the same on both servers.
    pub database: String,
    /// Name of its replication slot.
    pub slot: String,
    /// Name of its publication.
    pub publication: String,
}
