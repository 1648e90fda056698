//! Finding what is stored for a user: in the users file, or by the auth query on the active server.
//!
//! The control connection for the query is kept open and belongs to the main runtime; a worker only waits for the
//! answer. Answers are remembered for `auth.verifier_cache`, misses too, so that a flood of logins costs the server
//! little. Of many logins of one user at once, one asks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as AsyncMutex;

use super::users_file::{self, Stored};
use crate::config;
use crate::postgres::{ConnectError, Connector, Control};
use crate::sqlstate;
use crate::switch::ServerRole;
use crate::wire::scram::Verifier;

/// How long an answer is trusted although a proof against it has failed.
const KEPT_IN_DOUBT: Duration = Duration::from_secs(1);
/// Users remembered at one time; beyond it, the cache is emptied.
const CACHED_MAX: usize = 10_000;

/// What is stored for a user could not be found out.
#[derive(Debug, thiserror::Error)]
pub(in crate::proxy) enum VerifierError {
    /// The users file cannot be read.
    #[error("auth.users_file {path}: {source}")]
    UsersFile {
        /// Its name.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The active server cannot be reached.
    #[error("auth query: {0}")]
    Connect(#[source] Arc<ConnectError>),
    /// The query was refused for lack of rights.
    #[error(
        "auth query: the role {user:?} of [{server}] may not read password verifiers ({message}); either let it, or \
         point auth.auth_query to a SECURITY DEFINER function, or list the users in auth.users_file"
    )]
    Forbidden {
        /// `source` or `target`.
        server: String,
        /// Our role there.
        user: String,
        /// The server's words.
        message: String,
    },
    /// The query failed otherwise.
    #[error("auth query on the {server}: {message}")]
    Query {
        /// `source` or `target`.
        server: String,
        /// The server's words.
        message: String,
    },
}

impl VerifierError {
    /// Whether trying again later may help.
    pub(in crate::proxy) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
}

/// When it was read, and what was stored, if anything.
type Remembered = (Instant, Option<Stored>);

/// Looks up verifiers. Shared by all workers.
#[derive(Debug)]
pub(in crate::proxy) struct Verifiers {
    query: String,
    control_database: String,
    keep: Duration,
    file: Option<HashMap<String, Stored>>,
    source: Connector,
    target: Connector,
    runtime: tokio::runtime::Handle,
    sessions: [AsyncMutex<Option<Arc<Control>>>; 2],
    cache: Mutex<HashMap<(ServerRole, String), Remembered>>,
    /// Seed of made-up salts.
    secret: [u8; 32],
}

impl Verifiers {
    /// Reads the users file; `runtime` keeps the control connections. `seed` is a secret that outlasts this process;
    /// without one, the salts of unknown users change at a restart, and those of known users do not.
    pub(in crate::proxy) fn new(
        config: &config::Config,
        source: Connector,
        target: Connector,
        runtime: tokio::runtime::Handle,
        seed: Option<[u8; 32]>,
    ) -> Result<Self, VerifierError> {
        let file = config.auth.users_file.as_ref().map(|path| {
            let text = std::fs::read_to_string(path)
                .map_err(|source| VerifierError::UsersFile { path: path.display().to_string(), source })?;
            let (users, bad) = users_file::parse(&text);
            if !bad.is_empty() {
                tracing::warn!(path = %path.display(), lines = ?bad, "users file: lines that make no sense are ignored");
            }
            Ok(users)
        });
        Ok(Self {
            query: config.auth.auth_query.clone(),
            control_database: config.control.database.clone(),
            keep: config.auth.verifier_cache,
            file: file.transpose()?,
            source,
            target,
            runtime,
            sessions: [AsyncMutex::new(None), AsyncMutex::new(None)],
            cache: Mutex::default(),
            secret: seed.unwrap_or_else(rand::random),
        })
    }

    /// A verifier that fits no password, always the same for the same name.
    pub(in crate::proxy) fn made_up(&self, user: &str) -> Verifier {
        Verifier::made_up(user, &self.secret)
    }

    /// What the users file says, if there is one.
    pub(in crate::proxy) fn in_file(&self, user: &str) -> Option<Stored> {
        self.file.as_ref()?.get(user).cloned()
    }

    /// What is stored for `user`; `None`: no such user, or no password.
    pub(in crate::proxy) async fn find(
        self: &Arc<Self>,
        active: ServerRole,
        user: &str,
    ) -> Result<Option<Stored>, VerifierError> {
        if let Some(stored) = self.in_file(user) {
            return Ok(Some(stored));
        }
        if self.query.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.remembered(active, user) {
            return Ok(known);
        }
        let (this, name) = (self.clone(), user.to_owned());
        let asked = self.runtime.spawn(async move { this.ask(active, &name).await });
        asked.await.unwrap_or_else(|failure| {
            let server = active.to_string();
            Err(VerifierError::Query { server, message: format!("the lookup was aborted: {failure}") })
        })
    }

    fn remembered(&self, active: ServerRole, user: &str) -> Option<Option<Stored>> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, stored) = cache.get(&(active, user.to_owned()))?;
        (at.elapsed() < self.keep).then(|| stored.clone())
    }

    fn remember(&self, active: ServerRole, user: &str, stored: Option<Stored>) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHED_MAX {
            cache.clear();
        }
        cache.insert((active, user.to_owned()), (Instant::now(), stored));
    }

    /// A proof failed: forgets what is known of `user`, whose password may have been changed. What was read a moment
    /// ago is kept, so that guessing does not become a load on the server.
    pub(in crate::proxy) fn doubt(&self, active: ServerRole, user: &str) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (active, user.to_owned());
        if cache.get(&key).is_some_and(|(at, _)| at.elapsed() > KEPT_IN_DOUBT) {
            cache.remove(&key);
        }
    }

    async fn ask(&self, active: ServerRole, user: &str) -> Result<Option<Stored>, VerifierError> {
        let connector = match active {
            ServerRole::Source => &self.source,
            ServerRole::Target => &self.target,
        };
        let mut session = self.sessions[active as usize].lock().await;
        // Somebody who waited for the lock may find that the one before has asked for the same user.
        if let Some(known) = self.remembered(active, user) {
            return Ok(known);
        }
        let rows = match session.as_ref().filter(|session| !session.is_closed()) {
            Some(open) => open.query(&self.query, &[&user]).await,
            None => {
                let opened = connector.control(&self.control_database, "auth").await;
                let opened = Arc::new(opened.map_err(|error| VerifierError::Connect(Arc::new(error)))?);
                *session = Some(opened.clone());
                opened.query(&self.query, &[&user]).await
            }
        };
        let rows = rows.map_err(|error| {
            if error.is_closed() {
                *session = None;
            }
            describe(connector, &error)
        })?;
        let stored = rows.first().and_then(|row| row.try_get::<_, Option<String>>(1).ok().flatten());
        let stored = stored.and_then(|text| Stored::read(&text));
        self.remember(active, user, stored.clone());
        Ok(stored)
    }
}

fn describe(connector: &Connector, error: &tokio_postgres::Error) -> VerifierError {
    let server = connector.label().to_owned();
    match error.as_db_error() {
        Some(refusal) if refusal.code().code() == sqlstate::INSUFFICIENT_PRIVILEGE => VerifierError::Forbidden {
            server,
            user: connector.server().user.clone(),
            message: refusal.message().to_owned(),
        },
        Some(refusal) => VerifierError::Query { server, message: refusal.message().to_owned() },
        None => VerifierError::Query { server, message: error.to_string() },
    }
}
