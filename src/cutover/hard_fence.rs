//! The hard fence: the server that is left accepts no connection to the databases any more, and strangers are ended.
//!
//! As superuser `ALLOW_CONNECTIONS false` shuts everybody out; otherwise `CONNECTION LIMIT 0` shuts out everybody but
//! superusers. Both leave open sessions alone, so strangers are terminated, again and again, until two views agree:
//!
//! ```text
//! backend                                            we
//!   lock pg_database row (shown in pg_locks)           ALTER DATABASE … ; COMMIT
//!   read it: connections allowed?                      pg_locks: anybody starting?
//!   enter pg_stat_activity                             pg_stat_activity: any stranger?
//!   release the lock
//! ```
//!
//! A backend that read the row before our commit still holds the lock when it enters pg_stat_activity
//! (`InitPostgres` in `postinit.c`), so reading pg_locks first and pg_stat_activity second misses nobody.

use std::time::{Duration, Instant};

use tokio_postgres::types::Type;

use super::CutoverError;
use crate::catalog::decision::Case;
use crate::catalog::door::is_a_strangers;
use crate::catalog::fence;
use crate::ident::quote_ident;
use crate::postgres::Control;

/// Between two looks at the server.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The fence does not stand any more.
const OVERTAKEN: CutoverError = CutoverError::Stopped("another pgcutover has aborted this cutover in our place");

/// Backends that need not be strangers to us: the proxy's own sessions are known by pid, our control and replication
/// sessions by their name, the walsenders of our slots by the slot.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// Backends of proxied sessions, those whose client has vanished included.
    pub(super) pids: Vec<i32>,
    /// `pgcutover/<instance>/`: start of the application_name of everything that this process opens for itself.
    pub(super) own_prefix: String,
    /// Our replication slots.
    pub(super) slots: Vec<String>,
}

/// A backend that stands in the way.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Obstacle {
    /// Process id on the server that is left.
    pub pid: i32,
    /// Its database.
    pub database: String,
    /// What it calls itself.
    pub application_name: String,
    /// What it is doing, in words.
    pub doing: String,
    /// Age of its transaction, or of its query where it has none, in seconds.
    pub age_seconds: f64,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pid, database, application_name, doing, age_seconds } = self;
        write!(f, "pid {pid} ({application_name:?}) in {database:?}: {doing} for {age_seconds:.1}s")
    }
}

/// How a database is shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shutting {
    /// Nobody comes in: `ALLOW_CONNECTIONS false`, which takes a superuser.
    Everybody,
    /// Nobody but superusers: `CONNECTION LIMIT 0`.
    AllButSuperusers,
}

impl Shutting {
    /// What the role of this session may do.
    pub(super) async fn of(control: &Control) -> Result<Self, CutoverError> {
        let row = control
            .query_one("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user", &[])
            .await
            .map_err(|source| CutoverError::query("look whether we are a superuser", source))?;
        Ok(if row.get(0) { Self::Everybody } else { Self::AllButSuperusers })
    }

    /// The statement that shuts `database`.
    pub(super) fn statement(self, database: &str) -> String {
        let how = match self {
            Self::Everybody => "ALLOW_CONNECTIONS false",
            Self::AllButSuperusers => "CONNECTION LIMIT 0",
        };
        format!("ALTER DATABASE {} {how};", quote_ident(database))
    }
}

/// Which backends are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looking {
    /// Everybody who is not known.
    Strangers,
    /// Everybody who is not ours and is not idle, or has written something; `known.pids` are looked at too.
    Work,
    /// The same among `known.pids` only: a dry run leaves strangers alone.
    WorkOfSessions,
    /// What empty gates do not prove: strangers at work, and whoever has written something. Our sessions' backends may be
    /// at work, because their state is being read.
    LeftOver,
    /// The same among `known.pids` only.
    LeftOverOfSessions,
}

/// What shutting the databases came to.
#[derive(Debug)]
pub(super) struct Shut {
    /// Strangers that were ended.
    pub(super) ended: u64,
    /// How long shutting took; what is left of the whole is what strangers took to leave.
    pub(super) within: Duration,
}

/// Shuts the databases of a cutover whose fence stands; they are open again when the fence is lifted
/// (`soft_fence::lift`). Then terminates strangers until there are none and none can be starting. Bounded by the caller.
/// `known` is asked again before anybody is terminated, because the proxy may still be opening backends of sessions that
/// were let in before the gates closed.
pub(super) async fn shut(
    control: &Control,
    case: &Case,
    shutting: Shutting,
    known: impl Fn() -> Known,
) -> Result<Shut, CutoverError> {
    let since = Instant::now();
    let shut = async { shut_doors(control, case, shutting).await.map(|()| since.elapsed()) };
    // Sent together, carried out in this order: it is looked behind the shut doors.
    let (within, found) = tokio::join!(shut, look_outside(control, case, known()));
    let (within, mut found) = (within?, found?);
    let mut ended = std::collections::HashSet::new();
    loop {
        let Outside { starting, mut strangers } = found;
        if starting == 0 && strangers.is_empty() {
            return Ok(Shut { ended: ended.len() as u64, within });
        }
        if !fence::is_open(&**control, case.epoch).await? {
            return Err(OVERTAKEN);
        }
        let known_by_now = known().pids;
        strangers.retain(|stranger| !known_by_now.contains(&stranger.pid));
        for stranger in strangers {
            if ended.insert(stranger.pid) {
                let Obstacle { pid, database, application_name, .. } = &stranger;
                tracing::warn!(pid, database, application_name, "ending a session that bypasses the proxy");
            }
            terminate(control, stranger.pid).await?;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        found = look_outside(control, case, known()).await?;
    }
}

/// One transaction in one round trip, while the server is busy with those who are still inside. A coordinator that was
/// stopped for a while may find that another one has aborted in its place and lifted the fence: what it shut now, nobody
/// would open again. The lock on the row keeps the two apart, and a row that is not to be held fails the transaction.
async fn shut_doors(control: &Control, case: &Case, shutting: Shutting) -> Result<(), CutoverError> {
    let failed = |source| CutoverError::query("shut the databases", source);
    let script: String = case.databases.iter().map(|database| shutting.statement(database)).collect();
    let (begun, held, noted, shut, committed) = tokio::join!(
        control.batch_execute("BEGIN"),
        fence::hold_open(&**control, case.epoch),
        fence::note_hard(&**control, case.epoch),
        control.batch_execute(&script),
        control.batch_execute("COMMIT"),
    );
    begun.map_err(failed)?;
    // After a failure the rest has failed as well, and COMMIT was a ROLLBACK: the first one says why.
    if !held? {
        return Err(OVERTAKEN);
    }
    noted?;
    shut.map_err(failed)?;
    committed.map_err(failed)
}

/// Who may be inside the databases without our knowing.
struct Outside {
    starting: i64,
    strangers: Vec<Obstacle>,
}

async fn look_outside(control: &Control, case: &Case, known: Known) -> Result<Outside, CutoverError> {
    // Sent together, answered in this order.
    let (starting, strangers) = tokio::try_join!(
        starting(control, &case.databases, &known),
        backends(control, &case.databases, &known, Looking::Strangers)
    )?;
    Ok(Outside { starting, strangers })
}

/// Ends one backend: it sees 57P01. Its end is not proven by this call.
pub(super) async fn terminate(control: &Control, pid: i32) -> Result<(), CutoverError> {
    control
        .execute("SELECT pg_catalog.pg_terminate_backend($1)", &[&pid])
        .await
        .map_err(|source| CutoverError::query(&format!("terminate backend {pid}"), source))?;
    Ok(())
}

/// How many backends hold the lock that starting up takes on their database.
async fn starting(control: &Control, databases: &[String], known: &Known) -> Result<i64, CutoverError> {
    let row = control
        .query_typed_one(
            "SELECT count(*) FROM pg_catalog.pg_lock_status() l JOIN pg_catalog.pg_database d ON d.oid = l.objid
             WHERE l.locktype = 'object' AND l.classid = 'pg_catalog.pg_database'::regclass
               AND d.datname = ANY($1) AND l.pid <> ALL($2) AND l.pid <> pg_catalog.pg_backend_pid()",
            &[(&databases, Type::TEXT_ARRAY), (&known.pids, Type::INT4_ARRAY)],
        )
        .await
        .map_err(|source| CutoverError::query("look for starting backends", source))?;
    Ok(row.get(0))
}

/// Backends of the databases that stand in the way.
pub(super) async fn backends(
    control: &Control,
    databases: &[String],
    known: &Known,
    looking: Looking,
) -> Result<Vec<Obstacle>, CutoverError> {
    // The functions behind the views, which take a fraction of the time with a thousand backends. What a role without
    // pg_monitor may not see is NULL, and NULL counts as being in the way.
    let condition = match looking {
        Looking::Strangers => "pid <> ALL($2)",
        Looking::Work => "(state IS DISTINCT FROM 'idle' OR backend_xid IS NOT NULL) AND $2::int[] IS NOT NULL",
        Looking::WorkOfSessions => "pid = ANY($2) AND (state IS DISTINCT FROM 'idle' OR backend_xid IS NOT NULL)",
        Looking::LeftOver => "(pid <> ALL($2) AND state IS DISTINCT FROM 'idle' OR backend_xid IS NOT NULL)",
        Looking::LeftOverOfSessions => "pid = ANY($2) AND backend_xid IS NOT NULL",
    };
    let strangers = is_a_strangers(3);
    let rows = control
        .query_typed(
            &format!(
                "SELECT a.pid, d.datname, coalesce(application_name, ''), coalesce(state, 'state not visible'),
                        coalesce(extract(epoch FROM clock_timestamp() - coalesce(xact_start, query_start, backend_start)),
                                 0)::float8
                 FROM pg_catalog.pg_stat_get_activity(NULL) a JOIN pg_catalog.pg_database d ON d.oid = a.datid
                 WHERE d.datname = ANY($1) AND pid <> pg_catalog.pg_backend_pid()
                   AND {condition} AND {strangers}
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_get_replication_slots() s
                                   WHERE s.active_pid = a.pid AND s.slot_name = ANY($4))
                 ORDER BY 5 DESC"
            ),
            &[
                (&databases, Type::TEXT_ARRAY),
                (&known.pids, Type::INT4_ARRAY),
                (&known.own_prefix, Type::TEXT),
                (&known.slots, Type::TEXT_ARRAY),
            ],
        )
        .await
        .map_err(|source| CutoverError::query("look at the backends", source))?;
    Ok(rows
        .iter()
        .map(|row| Obstacle {
            pid: row.get(0),
            database: row.get(1),
            application_name: row.get(2),
            doing: row.get(3),
            age_seconds: row.get(4),
        })
        .collect())
}
