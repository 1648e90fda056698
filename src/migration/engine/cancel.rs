//! Removing what was made.
//!
//! The journal is the list; nothing else is touched. An object is struck out only after its removal has succeeded, and
//! every removal succeeds when there is nothing to remove, so a cancel that was interrupted is simply done again.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::context::Context;
use super::error::WorkError;
use super::turn::SERVED;
use crate::catalog::door::Door;
use crate::catalog::journal::{Journal, MadeObject, Side};
use crate::migration::ddl;
use crate::migration::made::REPLICA_IDENTITY;
use crate::migration::publication;
use crate::migration::stream::describe;
use crate::migration::view::{CancelReport, Left};
use crate::postgres::Control;
use crate::sqlstate;

/// What keeps definitions as they are, or records them.
const EVENT_TRIGGER: &str = "event_trigger";

/// What tables are published by.
const PUBLICATION: &str = "publication";

/// Attempts at a lock that somebody of the application holds, each `lock_timeout` long. After them the object is left.
const LOCK_ATTEMPTS: u32 = 12;

/// Kinds that are removed first, because they hold WAL back or hinder the application; the rest in reverse order.
fn rank(object: &MadeObject) -> u8 {
    match object.kind.as_str() {
        "slot" => 0,
        // Before anything else of ours is changed there.
        EVENT_TRIGGER => 1,
        PUBLICATION => 2,
        REPLICA_IDENTITY => 3,
        _ => 4,
    }
}

/// Undoes those entries of the journal that `chosen` picks. Whether everything that could be undone was, is told by
/// [`Undone::complete`].
pub(super) async fn undo(
    context: &Context,
    chosen: impl Fn(&MadeObject) -> bool,
    shut: Shut,
) -> Result<Undone, WorkError> {
    let journal = Journal::new(context.catalog.clone(), context.live.name());
    let mut objects: Vec<MadeObject> = journal.list().await?.into_iter().filter(chosen).collect();
    objects.reverse();
    objects.sort_by_key(rank);
    let taken_over = context.catalog.taken_over(context.live.name()).await?;
    let mut sessions = Sessions { context, shut, open: HashMap::new() };
    let mut undone = Undone { report: CancelReport::default(), complete: true };
    // Where tables are still published, updates of those without an identity would fail.
    let mut published: HashSet<(Side, Option<String>)> = HashSet::new();
    for object in objects {
        if object.kind == REPLICA_IDENTITY && published.contains(&(object.side, object.database.clone())) {
            undone.complete = false;
            let reason = "its publication could not be removed, and the application's updates need it".to_owned();
            undone.report.left.push(Left { object, reason });
            continue;
        }
        let Some(sql) = object.undo.clone() else {
            let reason = if object.note.is_empty() { "stays on purpose".to_owned() } else { object.note.clone() };
            undone.report.left.push(Left { object, reason });
            continue;
        };
        // It found that made, and needs it all the same.
        let heir = object.database.as_ref().and_then(|database| taken_over.get(database));
        if let Some(heir) = heir.filter(|_| SERVED.contains(&object.kind.as_str())) {
            undone.complete = false;
            let reason = format!("migration {heir:?} needs it; complete or cancel that one first");
            undone.report.left.push(Left { object, reason });
            continue;
        }
        context.failpoints.hit("engine.before_undo").await?;
        match sessions.remove(&object, &sql).await {
            Ok(()) => {
                journal.forget(&object).await?;
                tracing::info!(
                    migration = context.live.name(),
                    side = %object.side,
                    kind = object.kind,
                    name = object.name,
                    "removed"
                );
                undone.report.removed.push(object);
            }
            Err(error) => {
                undone.complete = false;
                if object.kind == PUBLICATION {
                    published.insert((object.side, object.database.clone()));
                }
                undone.report.left.push(Left { object, reason: describe(&error) });
            }
        }
    }
    Ok(undone)
}

/// `datallowconn` is off, or the connection limit is reached.
fn is_shut(sqlstate: &str) -> bool {
    matches!(sqlstate, "55000" | "53300")
}

/// What about objects in a database that a fence keeps shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shut {
    /// They stay for now: nobody reads them, and the door is opened for a moment only, but opened.
    Stays,
    /// They are removed.
    Entered,
}

/// What became of it.
pub(super) struct Undone {
    pub(super) report: CancelReport,
    /// Nothing is left but what stays on purpose.
    pub(super) complete: bool,
}

/// Executes what undoes something, in one transaction. Statements of the application queue behind a lock that is waited for, so
/// it is not waited for long at a time.
async fn patiently(session: &Control, sql: &str, lock_timeout: Duration) -> Result<(), WorkError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let Err(source) = session.batch_execute(sql).await else { return Ok(()) };
        let is_locked = source.code().is_some_and(|code| code.code() == sqlstate::LOCK_NOT_AVAILABLE);
        if !is_locked || attempts == LOCK_ATTEMPTS {
            return Err(WorkError::Query { doing: "removing it", source });
        }
        // What queued behind us gets its turn.
        tokio::time::sleep(lock_timeout.min(Duration::from_secs(1))).await;
    }
}

/// One session for each database of each server.
struct Sessions<'a> {
    context: &'a Context,
    shut: Shut,
    open: HashMap<(Side, String), Control>,
}

impl Sessions<'_> {
    async fn remove(&mut self, object: &MadeObject, sql: &str) -> Result<(), WorkError> {
        let control = self.context.config.control.database.clone();
        let database = object.database.clone().unwrap_or_else(|| control.clone());
        let is_slot = object.kind == "slot";
        let lock_timeout = self.context.config.migration.lock_timeout;
        let session = match self.session(object.side, &database).await {
            Ok(session) => session,
            // A database that refuses connections still lets its slots be dropped from elsewhere.
            Err(_) if is_slot && database != control => self.session(object.side, &control).await?,
            Err(WorkError::Connect(error)) if error.sqlstate() == Some(sqlstate::INVALID_CATALOG_NAME) => {
                // The database is gone, and with it what was in it.
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if is_slot {
            return Ok(publication::drop_slot(session, &object.name).await?);
        }
        if object.kind == PUBLICATION {
            return Ok(publication::drop_publication(session, &object.name).await?);
        }
        if object.kind == EVENT_TRIGGER {
            patiently(session, ddl::DISARM_SQL, lock_timeout).await?;
        }
        patiently(session, sql, lock_timeout).await
    }

    async fn session(&mut self, side: Side, database: &str) -> Result<&Control, WorkError> {
        let key = (side, database.to_owned());
        if self.open.get(&key).is_none_or(|session| session.is_closed()) {
            let connect = || async {
                match side {
                    Side::Source => self.context.source_control(database, "cancel").await,
                    Side::Target => Ok(self.context.target.control(database, "cancel").await?),
                }
            };
            let session = match connect().await {
                // A fence keeps it shut; its door lets us in.
                Err(WorkError::Connect(error))
                    if self.shut == Shut::Entered && error.sqlstate().is_some_and(is_shut) =>
                {
                    let server = match side {
                        Side::Source => &self.context.source,
                        Side::Target => &self.context.target,
                    };
                    let control = &self.context.config.control.database;
                    let turns = self.context.live.database(database).map(|live| live.turns.clone()).unwrap_or_default();
                    Door::new(server, control, database, &turns).through(connect()).await?
                }
                other => other?,
            };
            let bound = self.context.config.migration.lock_timeout.as_millis().max(1);
            let set = session.batch_execute(&format!("SET lock_timeout = {bound}")).await;
            set.map_err(|source| WorkError::Query { doing: "bounding the wait for locks", source })?;
            self.open.insert(key.clone(), session);
        }
        Ok(self.open.get(&key).expect("just opened"))
    }
}
