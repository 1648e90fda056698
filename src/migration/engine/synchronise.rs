//! What a cutover asks for before its pause: definitions compared, and everything brought over once more that no stream
//! carries and may have changed since the copy.

use std::time::Instant;

use super::Engine;
use super::definitions;
use super::error::EngineError;
use super::live::Live;
use crate::catalog::fence::{self, Standing};
use crate::catalog::journal::Journal;
use crate::catalog::migrations::{CatalogError, MigrationCatalog};
use crate::catalog::streams::Direction;
use crate::config::Ddl;
use crate::migration::made::Mirrored;
use crate::migration::roles::{self, Carried, RoleReport, RolesError};
use crate::migration::schema::{CarriedDatabase, ConnectionLimit};
use crate::migration::stream::describe;
use crate::migration::{drift, late, materialized, schema, unstreamed, warm};
use crate::postgres::Connector;
use crate::sqlstate;
use crate::switch::Epoch;

/// The one setting of a database that is ours: the fence's.
const READ_ONLY_SETTING: &str = "default_transaction_read_only";

/// Brings roles over from the first to the second of `ends`, and keeps what was brought for the next time.
pub(super) async fn bring_roles_over<E: From<CatalogError> + From<RolesError>>(
    catalog: &MigrationCatalog,
    migration: &str,
    direction: Direction,
    (from, to): (&Connector, &Connector),
) -> Result<Vec<RoleReport>, E> {
    let unreadable = |error| CatalogError::Unreadable { what: format!("roles that were brought over: {error}") };
    let mut carried = match catalog.roles(migration).await? {
        Some(kept) => serde_json::from_value(kept).map_err(unreadable)?,
        None => Carried::default(),
    };
    let journal = Journal::new(catalog.clone(), migration);
    let reports = match direction {
        Direction::Forward => roles::copy_roles(from, to, &journal, &mut carried).await?,
        Direction::Reverse => roles::copy_roles(from, to, &Mirrored(&journal), &mut carried).await?,
    };
    catalog.set_roles(migration, &serde_json::to_value(&carried).map_err(unreadable)?).await?;
    Ok(reports)
}

fn unreadable_database(error: serde_json::Error) -> CatalogError {
    CatalogError::Unreadable { what: format!("a database that was brought over: {error}") }
}

/// What `database` had on both servers the last time.
async fn carried_database(
    catalog: &MigrationCatalog,
    migration: &str,
    database: &str,
) -> Result<CarriedDatabase, CatalogError> {
    match catalog.carried(migration, database).await? {
        Some(kept) => serde_json::from_value(kept).map_err(unreadable_database),
        None => Ok(CarriedDatabase::default()),
    }
}

/// Keeps that for the next time.
pub(super) async fn keep_carried_database(
    catalog: &MigrationCatalog,
    migration: &str,
    database: &str,
    carried: &CarriedDatabase,
) -> Result<(), CatalogError> {
    let carried = serde_json::to_value(carried).map_err(unreadable_database)?;
    catalog.set_carried(migration, database, &carried).await
}

impl Engine {
    /// See [`super::CutoverLease::synchronise_rights`].
    pub(super) async fn synchronise_rights(&self, live: &Live) -> Result<Vec<String>, EngineError> {
        let (catalog, _actors) = self.owned()?;
        let direction = live.state().direction();
        let (from, to) = direction.ends(&self.deps.source, &self.deps.target);
        let reports = bring_roles_over::<EngineError>(&catalog, live.name(), direction, (from, to)).await?;
        let note = |report: RoleReport| {
            report.warnings.into_iter().map(move |warning| format!("role {:?}: {warning}", report.role))
        };
        let mut notes: Vec<String> = reports.into_iter().flat_map(note).collect();
        for database in &live.databases {
            let (name, except) = (&database.name, [READ_ONLY_SETTING]);
            let fences = self.fence_stands(to, name).await?;
            let mut carried = carried_database(&catalog, live.name(), name).await?;
            let synced = schema::sync_database(from, to, name, &except, fences, &mut carried).await?;
            keep_carried_database(&catalog, live.name(), name, &carried).await?;
            if synced.changed > 0 {
                let changed = synced.changed;
                tracing::info!(migration = live.name(), database = database.name, changed, "properties brought over");
            }
            notes.extend(synced.left.into_iter().map(|left| format!("database {:?}: {left}", database.name)));
        }
        Ok(notes)
    }

    /// See [`super::CutoverLease::synchronise`].
    pub(super) async fn synchronise(&self, live: &Live) -> Result<Vec<String>, EngineError> {
        let (from, to) = live.state().direction().ends(&self.deps.source, &self.deps.target);
        let mut notes = Vec::new();
        for database in &live.databases {
            self.bring_over_unstreamed(from, to, &database.name).await?;
            notes.extend(self.refresh_once_more(from, to, &database.name).await?);
        }
        notes.extend(self.warm(live, from, to).await);
        Ok(notes)
    }

    /// Whether the limit of connections on `to` is that of a fence, which still stands where a cutover leads back.
    async fn fence_stands(&self, to: &Connector, database: &str) -> Result<ConnectionLimit, EngineError> {
        let control = to.control(&self.deps.config.control.database, "synchronise").await?;
        let standing = fence::standing(&*control).await.map_err(|error| EngineError::Return(describe(&error)))?;
        let of_this = |standing: &Standing| standing.fence.case.databases.iter().any(|name| name == database);
        Ok(if standing.iter().any(of_this) { ConnectionLimit::IsTheFences } else { ConnectionLimit::IsCarried })
    }

    /// What the server that is left reads most, into the memory of the other. Returns what could not be done.
    async fn warm(&self, live: &Live, from: &Connector, to: &Connector) -> Vec<String> {
        let limit = self.deps.config.cutover.warm_target;
        if limit.is_zero() {
            return Vec::new();
        }
        let deadline = Instant::now() + limit;
        let mut notes = Vec::new();
        for database in &live.databases {
            let name = &database.name;
            let warming = async {
                let to = to.control(name, "warm").await?;
                let from = from.control(name, "warm").await?;
                // Every database has an equal part.
                let budget = warm::shared_buffers(&to).await? / live.databases.len() as u64;
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(warm::warm(&from, &to, budget, deadline).await?)
            };
            match Box::pin(warming).await {
                Ok(warmed) => {
                    tracing::info!(migration = live.name(), database = name, ?warmed, "warmed");
                    if warmed.cut_short {
                        let mb = warmed.bytes >> 20;
                        notes.push(format!("{name:?} is warm in part, {mb} MB of it: warm_target was over"));
                    }
                }
                Err(error) => notes.push(format!("{name:?} could not be warmed: {}", describe(&*error))),
            }
        }
        notes
    }

    /// Unlogged tables and large objects, so that little is left for the pause.
    async fn bring_over_unstreamed(&self, from: &Connector, to: &Connector, database: &str) -> Result<(), EngineError> {
        let failed = |source| EngineError::Unstreamed { database: database.to_owned(), source };
        let from = from.control(database, "unstreamed").await?;
        let to = to.control(database, "unstreamed").await?;
        unstreamed::bring_over(&from, &to).await.map_err(failed)?;
        Ok(())
    }

    /// Materialized views, so that they show what the application has written since the copy. What could not be done is no
    /// reason against a cutover: it is told.
    async fn refresh_once_more(
        &self,
        from: &Connector,
        to: &Connector,
        database: &str,
    ) -> Result<Vec<String>, EngineError> {
        let limit = self.deps.config.cutover.max_unstreamed_bytes;
        let refreshed = materialized::refresh(from, to, database, Some(limit)).await?;
        let left = refreshed.left.iter().map(|view| {
            format!(
                "materialized view {view} of {database:?} is larger than max_unstreamed leaves room for and shows what it did \
                 after the copy: REFRESH MATERIALIZED VIEW {view}"
            )
        });
        let failed = refreshed.failures.iter().map(|failure| format!("{database:?}: {failure}"));
        Ok(left.chain(failed).collect())
    }

    /// Both servers must have the same definitions.
    pub(super) async fn check_drift(&self, live: &Live, direction: Direction) -> Result<(), EngineError> {
        let (from, to) = direction.ends(&self.deps.source, &self.deps.target);
        for database in &live.databases {
            let source = from.control(&database.name, "drift").await?;
            let target = to.control(&database.name, "drift").await?;
            let lock_timeout = self.deps.config.migration.lock_timeout;
            let failed = |source| EngineError::Drift { database: database.name.clone(), source };
            for session in [&source, &target] {
                let bounded = format!("SET lock_timeout = {}", lock_timeout.as_millis().max(1));
                session.batch_execute(&bounded).await.map_err(failed)?;
            }
            if self.deps.config.migration.ddl == Ddl::Apply && database.current().epoch == Epoch(0) {
                // What is on its way is no difference.
                let (catalog, _actors) = self.owned()?;
                let seen = async {
                    definitions::applied(&source, database).await?;
                    definitions::refresh_tables(&catalog, live.name(), database, &source, &target).await
                };
                Box::pin(seen).await.map_err(|error| EngineError::Unavailable(describe(&error)))?;
            }
            // What is kept for this cutover is compared as it will be; the end of the session takes it back.
            let tried = late::rehearse(&target).await;
            tried.map_err(|source| EngineError::Late { database: database.name.clone(), source })?;
            let publication = database.current().publication;
            let compared = drift::compare(&source, &target, &publication, &database.table_names()).await;
            let drift = match compared {
                Ok(drift) => drift,
                Err(error) if error.code().is_some_and(|code| code.code() == sqlstate::LOCK_NOT_AVAILABLE) => {
                    let (database, waited) = (database.name.clone(), lock_timeout);
                    let mut by = drift::lockers(&source).await.unwrap_or_default();
                    by.extend(drift::lockers(&target).await.unwrap_or_default());
                    if by.is_empty() {
                        by.push("tables of somebody who has let go since, or is not shown".to_owned());
                    }
                    return Err(EngineError::Locked { database, waited, by: by.join(", ") });
                }
                Err(error) => return Err(failed(error)),
            };
            if let Some(drift) = drift {
                if direction == Direction::Reverse {
                    return Err(EngineError::Return(format!(
                        "database {}: the source lacks {drift}, defined on the target since the cutover; define the same \
                         on the source, and empty tables that were made since: no stream carries their rows",
                        database.name
                    )));
                }
                return Err(EngineError::Drifted { database: database.name.clone(), drift });
            }
        }
        Ok(())
    }

    /// Owners and grants that the server lacks to which the cutover leads, named by database.
    pub(super) async fn lacking_rights(&self, live: &Live) -> Result<Vec<String>, EngineError> {
        let (from, to) = live.state().direction().ends(&self.deps.source, &self.deps.target);
        let mut lacking = Vec::new();
        for name in live.databases.iter().map(|database| &database.name) {
            let (source, target) = (from.control(name, "drift").await?, to.control(name, "drift").await?);
            let compared = drift::compare_rights(&source, &target).await;
            let compared = compared.map_err(|source| EngineError::Drift { database: name.clone(), source })?;
            lacking.extend(compared.map(|drift| format!("{drift} in database {name:?}")));
        }
        Ok(lacking)
    }
}
