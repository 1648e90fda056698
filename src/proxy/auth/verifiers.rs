//! Finding what is stored for a user: in the users file, or by the auth query on the active server.
//!
//! The control connection for the query is kept open and belongs to the main runtime; a worker only waits for the
//! answer. Answers are remembered for `auth.verifier_cache`, misses too, so that a flood of logins costs the server
//! little. Of many logins of one user at once, one asks.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Mutex as AsyncMutex, Semaphore};
use tokio_postgres::types::Timestamp;

use super::users_file::Stored;
use crate::postgres::{ConnectError, Connector, Control};
use crate::sqlstate;
use crate::switch::ServerRole;
use crate::wire::scram::Verifier;

/// How long an answer is trusted although a proof against it has failed.
const KEPT_IN_DOUBT: Duration = Duration::from_secs(1);
/// See [`Verifiers::satisfies`].
const CHECKS_MAX: usize = 2;
/// Users remembered at one time; beyond it, the cache is emptied.
const CACHED_MAX: usize = 10_000;

/// What every role may read of another one. Answered like `auth_query`.
const STANDING: &str = "SELECT rolname, NULL::pg_catalog.text, rolvaliduntil AS valid_until, rolcanlogin AS can_login \
     FROM pg_catalog.pg_roles WHERE rolname = $1";

/// What is asked about a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Question {
    /// What its proof is checked against, and the rest: `auth_query`.
    Proof,
    /// [`STANDING`].
    Standing,
}

impl Question {
    fn query(self, lookup: &Lookup) -> &str {
        match self {
            Self::Proof => &lookup.query,
            Self::Standing => STANDING,
        }
    }
}

/// What is stored for a user could not be found out.
#[derive(Debug, thiserror::Error)]
pub(in crate::proxy) enum VerifierError {
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

/// What is known of a role.
#[derive(Clone, Debug)]
pub(in crate::proxy) struct Account {
    stored: Option<Stored>,
    valid_until: Option<SystemTime>,
    /// LOGIN; told to those alone who have proved that they are the role.
    pub(in crate::proxy) can_login: bool,
}

impl Account {
    /// What a client can be checked against now. A password that has expired is none, as in PostgreSQL.
    pub(in crate::proxy) fn usable(&self, now: SystemTime) -> Option<Stored> {
        self.stored.clone().filter(|_| !self.has_expired(now))
    }

    /// Whether its password is none any more.
    pub(in crate::proxy) fn has_expired(&self, now: SystemTime) -> bool {
        self.valid_until.is_some_and(|until| until < now)
    }
}

/// Where accounts are looked up; part of what a reload replaces.
#[derive(Debug)]
pub(in crate::proxy) struct Lookup {
    /// Empty: nobody beyond the file is known.
    pub(in crate::proxy) query: String,
    /// Database that the query runs in.
    pub(in crate::proxy) database: String,
    /// How long an answer is remembered.
    pub(in crate::proxy) keep: Duration,
    /// The users file, if there is one.
    pub(in crate::proxy) users: HashMap<String, Stored>,
}

impl Lookup {
    /// Whether everybody who is known has an md5 verifier.
    fn is_md5_only(&self) -> bool {
        self.query.is_empty()
            && !self.users.is_empty()
            && self.users.values().all(|stored| matches!(stored, Stored::Md5(_)))
    }
}

/// What was known, if anything.
#[derive(Debug)]
struct Remembered {
    at: Instant,
    /// A proof against it has failed: it is asked for again, and kept until then for the keys that were derived from it.
    doubted: bool,
    account: Option<Account>,
}

/// A control session and the database it is in.
type Session = Option<(String, Arc<Control>)>;

/// Looks up verifiers. Shared by all workers.
#[derive(Debug)]
pub(in crate::proxy) struct Verifiers {
    source: Connector,
    target: Connector,
    runtime: tokio::runtime::Handle,
    sessions: [AsyncMutex<Session>; 2],
    /// `password_encryption` of the server is md5.
    makes_md5: [AtomicBool; 2],
    cache: Mutex<HashMap<(ServerRole, Question, String), Remembered>>,
    /// Clear text passwords that may be checked at one time: each keeps a core busy for milliseconds.
    checks: Arc<Semaphore>,
    /// Seed of made-up salts.
    secret: [u8; 32],
}

impl Verifiers {
    /// `runtime` keeps the control connections. `seed` is a secret that outlasts this process; without one, the salts of
    /// unknown users change at a restart, and those of known users do not.
    pub(in crate::proxy) fn new(
        source: Connector,
        target: Connector,
        runtime: tokio::runtime::Handle,
        seed: Option<[u8; 32]>,
    ) -> Self {
        Self {
            source,
            target,
            runtime,
            sessions: [AsyncMutex::new(None), AsyncMutex::new(None)],
            makes_md5: Default::default(),
            cache: Mutex::default(),
            checks: Arc::new(Semaphore::new(CHECKS_MAX)),
            secret: seed.unwrap_or_else(rand::random),
        }
    }

    /// Remembers nothing any more: the query may be another one now.
    pub(in crate::proxy) fn forget(&self) {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A verifier that fits no password, always the same for the same name.
    pub(in crate::proxy) fn made_up(&self, user: &str) -> Verifier {
        Verifier::made_up(user, &self.secret)
    }

    /// Whether an unknown user is asked for md5 where the method leaves it open. As PostgreSQL: what a role that was made
    /// now would have.
    pub(in crate::proxy) fn made_up_is_md5(&self, lookup: &Lookup, active: ServerRole) -> bool {
        lookup.is_md5_only() || !lookup.query.is_empty() && self.makes_md5[active as usize].load(Ordering::Relaxed)
    }

    /// Whether a clear text password satisfies a verifier. Computed off the worker, which has other clients.
    pub(in crate::proxy) async fn satisfies(&self, verifier: Verifier, password: &[u8]) -> bool {
        let password = zeroize::Zeroizing::new(password.to_vec());
        let Ok(permit) = self.checks.clone().acquire_owned().await else { return false };
        let checked = self.runtime.spawn_blocking(move || {
            let _until_done = permit;
            verifier.is_satisfied_by(&password)
        });
        checked.await.unwrap_or(false)
    }

    /// What is known of `user`; `None`: nothing.
    pub(in crate::proxy) async fn find(
        self: &Arc<Self>,
        lookup: &Arc<Lookup>,
        active: ServerRole,
        user: &str,
    ) -> Result<Option<Account>, VerifierError> {
        if let Some(stored) = lookup.users.get(user) {
            return Ok(Some(Account { stored: Some(stored.clone()), valid_until: None, can_login: true }));
        }
        if lookup.query.is_empty() {
            return Ok(None);
        }
        self.learn(Question::Proof, lookup, active, user).await
    }

    /// What the active server says of a role whose proof was not the server's; `None`: there is no such role.
    pub(in crate::proxy) async fn standing(
        self: &Arc<Self>,
        lookup: &Arc<Lookup>,
        active: ServerRole,
        user: &str,
    ) -> Result<Option<Account>, VerifierError> {
        self.learn(Question::Standing, lookup, active, user).await
    }

    async fn learn(
        self: &Arc<Self>,
        question: Question,
        lookup: &Arc<Lookup>,
        active: ServerRole,
        user: &str,
    ) -> Result<Option<Account>, VerifierError> {
        if let Some(known) = self.remembered(question, lookup, active, user) {
            return Ok(known);
        }
        let (this, lookup, name) = (self.clone(), lookup.clone(), user.to_owned());
        let asked = self.runtime.spawn(async move { this.ask(question, &lookup, active, &name).await });
        asked.await.unwrap_or_else(|failure| {
            let server = active.to_string();
            Err(VerifierError::Query { server, message: format!("the lookup was aborted: {failure}") })
        })
    }

    fn remembered(
        &self,
        question: Question,
        lookup: &Lookup,
        active: ServerRole,
        user: &str,
    ) -> Option<Option<Account>> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let known = cache.get(&(active, question, user.to_owned()))?;
        (!known.doubted && known.at.elapsed() < lookup.keep).then(|| known.account.clone())
    }

    fn remember(&self, question: Question, active: ServerRole, user: &str, account: &mut Option<Account>) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHED_MAX {
            cache.clear();
        }
        let key = (active, question, user.to_owned());
        let stored = account.as_mut().and_then(|account| account.stored.as_mut());
        let earlier = cache.get(&key).and_then(|known| known.account.as_ref()?.stored.as_ref());
        if let (Some(stored), Some(earlier)) = (stored, earlier) {
            stored.keep_work_of(earlier);
        }
        cache.insert(key, Remembered { at: Instant::now(), doubted: false, account: account.clone() });
    }

    /// A proof failed: `user` is asked for again, because its password may have been changed. What was read a moment ago
    /// is trusted all the same, so that guessing does not become a load on the server.
    pub(in crate::proxy) fn doubt(&self, active: ServerRole, user: &str) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = cache.get_mut(&(active, Question::Proof, user.to_owned())) {
            known.doubted |= known.at.elapsed() > KEPT_IN_DOUBT;
        }
    }

    async fn ask(
        &self,
        question: Question,
        lookup: &Lookup,
        active: ServerRole,
        user: &str,
    ) -> Result<Option<Account>, VerifierError> {
        let connector = match active {
            ServerRole::Source => &self.source,
            ServerRole::Target => &self.target,
        };
        let mut session = self.sessions[active as usize].lock().await;
        // Somebody who waited for the lock may find that the one before has asked for the same user.
        if let Some(known) = self.remembered(question, lookup, active, user) {
            return Ok(known);
        }
        let open = match session.as_ref() {
            Some((database, open)) if *database == lookup.database && !open.is_closed() => open.clone(),
            Some(_) | None => {
                let opened = connector.control(&lookup.database, "auth").await;
                let opened = Arc::new(opened.map_err(|error| VerifierError::Connect(Arc::new(error)))?);
                let setting = opened.query_one("SELECT pg_catalog.current_setting('password_encryption')", &[]).await;
                let setting = setting.and_then(|row| row.try_get::<_, String>(0));
                let setting = setting.map_err(|error| describe(connector, &error))?;
                // Up to PostgreSQL 13, `on` means md5.
                self.makes_md5[active as usize].store(setting != "scram-sha-256", Ordering::Relaxed);
                *session = Some((lookup.database.clone(), opened.clone()));
                opened
            }
        };
        let mut account = match open.query(question.query(lookup), &[&user]).await {
            Ok(rows) => rows.first().map(|row| account(connector, row)).transpose()?,
            // Longer than any role's name can be.
            Err(error) if error.code().is_some_and(|code| code.code() == sqlstate::NAME_TOO_LONG) => None,
            Err(error) => {
                if error.is_closed() {
                    *session = None;
                }
                return Err(describe(connector, &error));
            }
        };
        self.remember(question, active, user, &mut account);
        Ok(account)
    }
}

/// Reads a row: name and verifier by position, as PgBouncer's queries have them, the rest by name where it is there.
fn account(connector: &Connector, row: &tokio_postgres::Row) -> Result<Account, VerifierError> {
    let wrong = |column: &str, expected: &str| VerifierError::Query {
        server: connector.label().to_owned(),
        message: format!("the column {column} is not {expected}"),
    };
    let has = |name: &str| row.columns().iter().any(|column| column.name() == name);
    let stored: Option<String> = row.try_get(1).map_err(|_| wrong("2, the verifier,", "text"))?;
    let valid_until = match has("valid_until") {
        true => row
            .try_get::<_, Option<Timestamp<SystemTime>>>("valid_until")
            .map_err(|_| wrong("valid_until", "a timestamp with time zone"))?,
        false => None,
    };
    let can_login = match has("can_login") {
        true => row.try_get::<_, Option<bool>>("can_login").map_err(|_| wrong("can_login", "a boolean"))?,
        false => None,
    };
    Ok(Account {
        stored: stored.map(zeroize::Zeroizing::new).and_then(|text| Stored::read(&text)),
        valid_until: valid_until.and_then(|until| match until {
            Timestamp::Value(until) => Some(until),
            Timestamp::PosInfinity => None,
            Timestamp::NegInfinity => Some(SystemTime::UNIX_EPOCH),
        }),
        can_login: can_login.unwrap_or(true),
    })
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
