//! The journal of everything we make on either server, with the statement that removes it.
//!
//! An entry is written **before** the object is made and removed after the object is gone: a crash leaves at worst an
//! entry without an object, never an object that nobody knows of. Undo statements therefore succeed when there is
//! nothing to undo. An entry without an undo statement is listed by a cancel as left on purpose.

use serde::{Deserialize, Serialize};

use super::migrations::{CatalogError, MigrationCatalog};

/// Which server an object was made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// `[source]` of the configuration.
    Source,
    /// `[target]` of the configuration.
    Target,
}

impl Side {
    fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One object that we make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MadeObject {
    /// On which server.
    pub side: Side,
    /// Connected to which database it was made and is undone; none: an object of the whole server.
    pub database: Option<String>,
    /// What it is: `slot`, `publication`, `schema`, `replica_identity`, `role`, …
    pub kind: String,
    /// Its name, as an operator would write it.
    pub name: String,
    /// One statement that removes it and succeeds when it is not there; none: it stays.
    pub undo: Option<String>,
    /// What it was before, or why it stays; may be empty.
    pub note: String,
}

/// The journal of one migration. Cheap to clone; writes are fenced by the engine's generation.
#[derive(Clone, Debug)]
pub struct Journal {
    catalog: MigrationCatalog,
    migration: String,
}

impl Journal {
    /// The journal of `migration` in the catalogue of the target's control database.
    pub fn new(catalog: MigrationCatalog, migration: &str) -> Self {
        Self { catalog, migration: migration.to_owned() }
    }

    /// Writes down that `object` is about to be made. An entry that is already there is kept: its undo statement holds the
    /// value from before our first change.
    pub async fn record(&self, object: &MadeObject) -> Result<(), CatalogError> {
        let client = self.catalog.client().await?;
        let written = client
            .execute(
                "INSERT INTO pgcutover.made (migration, server, database, kind, name, undo, note)
                 SELECT $1, $2, $3, $4, $5, $6, $7 FROM pgcutover.engine WHERE generation = $8
                 ON CONFLICT (migration, server, database, kind, name) DO UPDATE SET name = excluded.name",
                &[
                    &self.migration,
                    &object.side.as_str(),
                    &object.database.as_deref().unwrap_or_default(),
                    &object.kind,
                    &object.name,
                    &object.undo,
                    &object.note,
                    &self.catalog.generation().0,
                ],
            )
            .await
            .map_err(|source| CatalogError::query("write the journal", source))?;
        self.catalog.must_be_one(written)
    }

    /// Strikes out an object that is gone.
    pub async fn forget(&self, object: &MadeObject) -> Result<(), CatalogError> {
        let client = self.catalog.client().await?;
        client
            .execute(
                "DELETE FROM pgcutover.made
                 WHERE migration = $1 AND server = $2 AND database = $3 AND kind = $4 AND name = $5",
                &[
                    &self.migration,
                    &object.side.as_str(),
                    &object.database.as_deref().unwrap_or_default(),
                    &object.kind,
                    &object.name,
                ],
            )
            .await
            .map_err(|source| CatalogError::query("strike out of the journal", source))?;
        Ok(())
    }

    /// Everything that is there, in the order in which it was made.
    pub async fn list(&self) -> Result<Vec<MadeObject>, CatalogError> {
        let client = self.catalog.client().await?;
        let rows = client
            .query(
                "SELECT server, database, kind, name, undo, note FROM pgcutover.made WHERE migration = $1 ORDER BY id",
                &[&self.migration],
            )
            .await
            .map_err(|source| CatalogError::query("read the journal", source))?;
        Ok(rows
            .iter()
            .map(|row| MadeObject {
                side: if row.get::<_, &str>(0) == "source" { Side::Source } else { Side::Target },
                database: Some(row.get::<_, String>(1)).filter(|name| !name.is_empty()),
                kind: row.get(2),
                name: row.get(3),
                undo: row.get(4),
                note: row.get(5),
            })
            .collect())
    }
}
