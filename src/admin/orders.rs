//! PAUSE, RESUME and the other orders that PgBouncer has, on databases and their sessions.
//!
//! PAUSE is the gate that a cutover uses, closed for another reason: what it promises, it promises for the same cause.
//! It is refused while a cutover is under way, and stays in force through a cutover that begins later: the sessions
//! then go on, on the other server, at RESUME.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::error::{AdminError, ErrorKind};
use super::reply::Reply;
use super::service::Inner;
use super::view::ClientView;
use crate::switch::{Database, PausedAll};

/// How often WAIT_CLOSE looks.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

type Answer = Result<Reply, AdminError>;

/// What a PAUSE has closed.
enum Closed {
    One(Arc<Database>),
    All(PausedAll),
}

impl Closed {
    fn databases(&self) -> &[Arc<Database>] {
        match self {
            Self::One(database) => std::slice::from_ref(database),
            Self::All(paused) => &paused.databases,
        }
    }
}

impl Inner {
    /// For who brings something into force that a successor would not know of. To be held until it is in force: who
    /// hands over looks at what is in force after that.
    pub(super) fn staying(&self) -> Result<MutexGuard<'_, bool>, AdminError> {
        let leaving = self.leaving();
        if *leaving {
            let error = AdminError::new(ErrorKind::Conflict, "another process is taking over from this one");
            return Err(error.hint("give the order again when it has: that process answers then"));
        }
        Ok(leaving)
    }

    /// Whether a successor is getting ready, or has taken over.
    pub(super) fn leaving(&self) -> MutexGuard<'_, bool> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// PAUSE: answers once every transaction that was running has ended. One that is cancelled before that opens what
    /// it has closed, as PgBouncer's does; one whose client has gone stays in force, as there.
    pub(super) async fn pause(&self, database: Option<String>, cancelled: impl Future<Output = ()>) -> Answer {
        self.deps.cutovers.has_every_client("a pause").await?;
        let closed = self.close_gates(database)?;
        tokio::select! {
            // Both arms only wait, so dropping them is safe.
            emptied = self.emptied(closed.databases()) => emptied.map(|()| Reply::Done("PAUSE")),
            () = cancelled => {
                self.open_again(&closed);
                Err(AdminError::cancelled())
            }
        }
    }

    /// Waits until nobody is inside of these databases, which are paused.
    async fn emptied(&self, databases: &[Arc<Database>]) -> Result<(), AdminError> {
        for database in databases {
            tracing::info!(database = database.name(), "paused by an operator");
            tokio::select! {
                // Each arm only waits, so dropping it is safe.
                () = database.wait_empty() => {}
                () = resumed(database) => {
                    let message = format!("database {:?} was resumed before its transactions had ended", database.name());
                    return Err(AdminError::new(ErrorKind::Conflict, message));
                }
                () = self.deps.tasks.stopping() => {
                    return Err(AdminError::new(ErrorKind::Unavailable, "the daemon is stopping"));
                }
            }
        }
        Ok(())
    }

    /// Takes a PAUSE back.
    fn open_again(&self, closed: &Closed) {
        match closed {
            Closed::One(database) => _ = database.resume(),
            Closed::All(paused) => self.deps.switchboard.take_back(paused),
        }
        tracing::info!("a pause was cancelled while it waited");
    }

    /// Holds new transactions from now on, and says of which databases.
    fn close_gates(&self, database: Option<String>) -> Result<Closed, AdminError> {
        let _staying = self.staying()?;
        let Some(name) = &database else {
            if self.deps.switchboard.is_paused() {
                return Err(AdminError::new(ErrorKind::Conflict, "already paused"));
            }
            return self.deps.switchboard.pause_all().map(Closed::All).map_err(|name| under_way(&name));
        };
        let database = self.known(name)?;
        if !database.pause().map_err(|_| under_way(name))? {
            return Err(AdminError::new(ErrorKind::Conflict, format!("database {name:?} is paused already")));
        }
        Ok(Closed::One(database))
    }

    /// RESUME
    pub(super) fn resume(&self, database: Option<String>) -> Answer {
        let was_paused = match &database {
            Some(name) => self.known(name)?.resume(),
            None => self.deps.switchboard.resume_all(),
        };
        if was_paused {
            tracing::info!(database, "resumed by an operator");
            return Ok(Reply::Done("RESUME"));
        }
        Err(AdminError::new(ErrorKind::Conflict, "it is not paused"))
    }

    /// DISABLE and ENABLE
    pub(super) async fn set_disabled(&self, name: &str, disabled: bool) -> Answer {
        if let Err(unknown) = self.known(name) {
            // Before any client asks for it, too; but a name that was mistyped must not look as if it were refused.
            if !self.is_migrated(name).await? {
                return Err(unknown);
            }
        }
        let _staying = self.staying()?;
        self.deps.switchboard.database(name).set_disabled(disabled);
        Ok(Reply::Done(if disabled { "DISABLE" } else { "ENABLE" }))
    }

    /// KILL of a database: new transactions and sessions are held before the present ones are ended.
    pub(super) async fn kill_database(&self, name: &str) -> Answer {
        self.deps.cutovers.has_every_client("a kill").await?;
        let _staying = self.staying()?;
        let _first = self.known(name)?.pause().map_err(|_| under_way(name))?;
        let ended = self.deps.clients.end_database(name);
        tracing::info!(database = name, ended, "sessions ended by an operator; paused until RESUME");
        Ok(Reply::Done("KILL"))
    }

    /// RECONNECT: every server connection that is open now is to go. One that a session has for itself goes with it, a
    /// shared one when it is given back, and what nobody has goes at once.
    pub(super) fn reconnect(&self, database: Option<String>) -> Answer {
        let names = match database {
            Some(name) => vec![self.known(&name)?.name().to_owned()],
            None => self.deps.switchboard.all().iter().map(|database| database.name().to_owned()).collect(),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        names.iter().for_each(|name| self.deps.clients.reconnect(name));
        self.reconnects().extend(names.into_iter().map(|name| (name, now)));
        Ok(Reply::Done("RECONNECT"))
    }

    /// WAIT_CLOSE
    pub(super) async fn wait_close(&self, database: Option<String>) -> Answer {
        if let Some(name) = &database {
            self.known(name)?;
        }
        let concerned = |client: &ClientView| {
            client.close_needed && database.as_ref().is_none_or(|database| client.database == *database)
        };
        while self.clients().iter().chain(&self.deps.clients.idle_servers()).any(concerned) {
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = self.deps.tasks.stopping() => {
                    return Err(AdminError::new(ErrorKind::Unavailable, "the daemon is stopping"));
                }
            }
        }
        Ok(Reply::Done("WAIT_CLOSE"))
    }

    /// Whether a database is one of a migration, though no client has asked for it yet.
    async fn is_migrated(&self, name: &str) -> Result<bool, AdminError> {
        let migrations = self.deps.migrations.list().await?;
        Ok(migrations.iter().any(|migration| migration.databases.iter().any(|database| database.name == name)))
    }

    /// The sessions, with what RECONNECT wants of them.
    pub(super) fn clients(&self) -> Vec<ClientView> {
        let reconnects = self.reconnects();
        let mut clients = self.deps.clients.list();
        for client in clients.iter_mut().filter(|client| !client.pooled) {
            let ordered = reconnects.get(&client.database);
            client.close_needed = ordered.zip(client.connected_at).is_some_and(|(ordered, since)| since < *ordered);
        }
        clients
    }

    fn reconnects(&self) -> MutexGuard<'_, std::collections::BTreeMap<String, f64>> {
        self.reconnects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, name: &str) -> Result<Arc<Database>, AdminError> {
        self.deps.switchboard.existing(name).ok_or_else(|| {
            AdminError::new(ErrorKind::NotFound, format!("no such database: {name}"))
                .hint("SHOW DATABASES lists those that clients have asked for")
        })
    }
}

fn under_way(database: &str) -> AdminError {
    AdminError::new(ErrorKind::Conflict, format!("a cutover of database {database:?} is under way"))
        .hint("it holds and releases new transactions itself")
}

async fn resumed(database: &Database) {
    while database.is_paused() {
        // A change between the look and the wait would be missed, so the wait is bounded.
        let _change = tokio::time::timeout(LOOK_AGAIN, database.changed()).await;
    }
}
