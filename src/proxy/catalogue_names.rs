//! Names of custom settings that a database's own objects use, read once for each database and cutover.
//!
//! A cutover reads them on a session that it holds before the server is shut, because a session that is the first of its
//! database in the pause could not read them any more. Sessions that find none (no cutover of this process ordered
//! their move) read them themselves.
//!
//! Outside a cutover they are asked for all the time, where a client leaves its connection to the next one, and objects
//! come and go: what was read lately will do.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::handoff::catalogue_settings;
use crate::postgres::Connector;
use crate::switch::{Epoch, ServerRole};

/// After so long they are read anew.
const LATELY: Duration = Duration::from_secs(60);

/// The cutover for which names were read, and the names.
type NamesAt = (Epoch, Arc<Vec<String>>);

/// When they were read; `None`: they could not be.
type LateNames = (Instant, Option<Arc<Vec<String>>>);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct CatalogueNames {
    known: Mutex<HashMap<(ServerRole, String), NamesAt>>,
    lately: Mutex<HashMap<(ServerRole, String), LateNames>>,
}

impl CatalogueNames {
    /// Reads the names of `database` on `server` through a session that is open there.
    pub(super) async fn learn(
        &self,
        server: ServerRole,
        database: &str,
        epoch: Epoch,
        session: &tokio_postgres::Client,
    ) -> Result<(), tokio_postgres::Error> {
        let names = Arc::new(catalogue_settings(session).await?);
        self.known.lock().await.insert((server, database.to_owned()), (epoch, names));
        Ok(())
    }

    /// The names of `database`, for who has time: nobody waits for what is read here.
    pub(super) async fn aside(
        &self,
        server: ServerRole,
        connector: &Connector,
        database: &str,
        epoch: Epoch,
    ) -> Result<Arc<Vec<String>>, String> {
        let key = (server, database.to_owned());
        if let Some((_, names)) = self.known.lock().await.get(&key).filter(|(at, _)| *at == epoch) {
            return Ok(names.clone());
        }
        read(connector, database, "shadow").await
    }

    /// The names of `database` as they were lately; none where they could not be read. Of many sessions that ask at once,
    /// one reads and the others wait.
    pub(super) async fn lately(
        &self,
        server: ServerRole,
        connector: &Connector,
        database: &str,
        now: Instant,
    ) -> Option<Arc<Vec<String>>> {
        let mut lately = self.lately.lock().await;
        let key = (server, database.to_owned());
        if let Some((_, names)) = lately.get(&key).filter(|(at, _)| now.saturating_duration_since(*at) < LATELY) {
            return names.clone();
        }
        let names = read(connector, database, "vacant").await;
        if let Err(error) = &names {
            tracing::warn!(
                database,
                error,
                "connections that clients leave are closed: which custom settings the database's objects make is unknown"
            );
        }
        let names = names.ok();
        lately.insert(key, (now, names.clone()));
        names
    }

    /// The names of `database`. Of many sessions that ask at once, one reads and the others wait.
    pub(super) async fn of(
        &self,
        server: ServerRole,
        connector: &Connector,
        database: &str,
        epoch: Epoch,
    ) -> Result<Arc<Vec<String>>, String> {
        let mut known = self.known.lock().await;
        let key = (server, database.to_owned());
        if let Some((_, names)) = known.get(&key).filter(|(at, _)| *at == epoch) {
            return Ok(names.clone());
        }
        let names = read(connector, database, "handoff").await?;
        known.insert(key, (epoch, names.clone()));
        Ok(names)
    }
}

async fn read(connector: &Connector, database: &str, purpose: &str) -> Result<Arc<Vec<String>>, String> {
    let control = connector.control(database, purpose).await.map_err(|error| error.to_string())?;
    let names = catalogue_settings(&control).await.map_err(|error| error.to_string());
    control.close().await;
    names.map(Arc::new)
}
