//! How our own sessions get into the databases of a server that a cutover has left: the fence shuts everybody out, the
//! applier of the reverse stream included.
//!
//! ```text
//! open    ALLOW_CONNECTIONS true, CONNECTION LIMIT 0      only superusers could come in now, read-only by default
//!         our session connects
//! close   ALLOW_CONNECTIONS false                         who slipped in meanwhile is ended
//! ```
//!
//! A role without superuser's rights can set the connection limit only: open is then "no limit" for that moment. Each
//! step locks the fence row, so that it never opens what a rollback or an abort has just changed. Does nothing where no
//! fence stands, where it is soft, or where a rollback keeps the databases open.

use std::sync::Arc;
use std::time::Duration;

use super::RecordError;
use crate::ident::quote_ident;
use crate::postgres::{ConnectError, Connector, Control};

/// How often, and after what time again, a door is shut that could not be shut behind somebody.
const SHUT_TRIES: u32 = 300;
const SHUT_AGAIN: Duration = Duration::from_secs(1);

/// Lets those who come through the doors of one database in one after the other: each shuts the door behind itself, and
/// would shut out who comes a moment later.
#[derive(Clone, Debug, Default)]
pub struct Turns(Arc<tokio::sync::Mutex<()>>);

/// The way into one database of one server.
#[derive(Clone, Debug)]
pub struct Door {
    turns: Turns,
    connector: Connector,
    control_database: String,
    database: String,
}

/// The door could not be opened or shut.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The control database could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A statement failed.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Shuts the door if it is dropped before it was emptied.
struct ShutBehind(Option<Door>);

impl Drop for ShutBehind {
    fn drop(&mut self) {
        if let Some(door) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(door.shut_later());
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Open,
    Shut,
}

impl Door {
    /// The way into `database` of the server of `connector`, for those who take `turns`.
    pub fn new(connector: &Connector, control_database: &str, database: &str, turns: &Turns) -> Self {
        Self {
            turns: turns.clone(),
            connector: connector.clone(),
            control_database: control_database.to_owned(),
            database: database.to_owned(),
        }
    }

    /// Runs `connect` while the door is open, and shuts it, however that ended. Where the caller goes away meanwhile, or the
    /// door cannot be shut at once, that is done in the background.
    pub async fn through<T, E: From<DoorError>>(&self, connect: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let _turn = self.turns.0.lock().await;
        let mut control = self.control().await?;
        // Before it is opened: whether a commit whose answer is lost was made is not known.
        let mut behind = ShutBehind(Some(self.clone()));
        if !turn(&mut control, &self.database, Turn::Open).await.map_err(DoorError::from)? {
            behind.0 = None;
            return connect.await;
        }
        let connected = connect.await;
        self.shut(&mut control).await?;
        behind.0 = None;
        connected
    }

    /// Shuts it after somebody who has opened it and was killed before shutting it. Whoever goes through does so anyway:
    /// this is for when nobody does any more.
    pub async fn shut_again(&self) -> Result<(), DoorError> {
        let _turn = self.turns.0.lock().await;
        self.shut(&mut self.control().await?).await
    }

    async fn control(&self) -> Result<Control, DoorError> {
        Ok(self.connector.control(&self.control_database, "door").await?)
    }

    async fn shut(&self, control: &mut Control) -> Result<(), DoorError> {
        // Left ajar meanwhile, or opened for good, it is others who come in by right.
        if turn(control, &self.database, Turn::Shut).await? {
            self.expel(control).await?;
        }
        Ok(())
    }

    async fn shut_later(self) {
        for _ in 0..SHUT_TRIES {
            match self.shut_again().await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(database = self.database, %error, "a fenced database could not be shut; it is tried again");
                }
            }
            tokio::time::sleep(SHUT_AGAIN).await;
        }
        tracing::error!(
            database = self.database,
            "a fenced database was not shut; whoever goes through its door next shuts it"
        );
    }

    /// Ends whoever came in beside us. Backends that are starting hold a lock on the database's row; they are waited for.
    async fn expel(&self, control: &Control) -> Result<(), RecordError> {
        let failed = |source| RecordError::query("end sessions on the server that was left", source);
        let (own, strangers) = (self.connector.instance().application_name(""), is_a_strangers(2));
        loop {
            let row = control
                .query_one(
                    &format!("SELECT (SELECT count(*) FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.objid
                              WHERE l.locktype = 'object' AND l.classid = 'pg_catalog.pg_database'::regclass
                                AND d.datname = $1 AND l.pid <> pg_catalog.pg_backend_pid()),
                            (SELECT count(*) FROM
                               (SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
                                 WHERE datname = $1 AND {strangers}) ended)"),
                    &[&self.database, &own],
                )
                .await
                .map_err(failed)?;
            if row.get::<_, i64>(0) == 0 && row.get::<_, i64>(1) == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A condition on `pg_stat_activity`: neither a session of ours, whose names begin with the text parameter `$own_prefix`, nor a
/// worker of the server's own. That name can be read and taken by everybody: it counts only together with our login role.
pub fn is_a_strangers(own_prefix: u8) -> String {
    format!(
        "(left(application_name, length(${own_prefix})) = ${own_prefix}
           AND usesysid = (SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolname = session_user)) IS NOT TRUE
         AND coalesce(backend_type, '') NOT IN ('autovacuum worker', 'parallel worker')"
    )
}

/// Opens or shuts one database, if it is there and a hard fence stands over it that is not ajar. Returns whether one does.
async fn turn(control: &mut Control, database: &str, turn: Turn) -> Result<bool, RecordError> {
    let failed = |source| RecordError::query("open the door of a fenced database", source);
    if !super::has_table(&**control, "fence").await? {
        return Ok(false);
    }
    let there = control
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute
                             WHERE attrelid = pg_catalog.to_regclass('pgcutover.fence') AND attname = 'ajar'),
                    (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)",
            &[],
        )
        .await
        .map_err(failed)?;
    if !there.get::<_, bool>(0) {
        return Ok(false);
    }
    let superuser: bool = there.get(1);
    let transaction = control.transaction().await.map_err(failed)?;
    let standing = transaction
        .query_opt(
            "SELECT epoch FROM pgcutover.fence
             WHERE outcome = 'decided' AND returned_by IS NULL AND hard AND NOT ajar AND $1 = ANY(databases)
               AND EXISTS (SELECT FROM pg_catalog.pg_database d WHERE d.datname = $1::text)
             ORDER BY epoch DESC LIMIT 1 FOR UPDATE",
            &[&database],
        )
        .await
        .map_err(failed)?;
    if standing.is_none() {
        return Ok(false);
    }
    transaction.batch_execute(&statements(database, superuser, turn)).await.map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    Ok(true)
}

fn statements(database: &str, superuser: bool, turn: Turn) -> String {
    let database = quote_ident(database);
    match (superuser, turn) {
        (true, Turn::Open) => {
            format!("ALTER DATABASE {database} CONNECTION LIMIT 0; ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        }
        (true, Turn::Shut) => format!("ALTER DATABASE {database} ALLOW_CONNECTIONS false"),
        (false, Turn::Open) => format!("ALTER DATABASE {database} CONNECTION LIMIT -1"),
        (false, Turn::Shut) => format!("ALTER DATABASE {database} CONNECTION LIMIT 0"),
    }
}
