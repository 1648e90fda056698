//! Foreign keys, triggers, rules and policies of a target whose login role may not set `session_replication_role`.
//!
//! Applied rows would fire them there, and what they do has come with the stream already. So they are not restored before
//! the stream is over:
//!
//! ```text
//! constraints      their definitions are kept in the target database, and tried out: executed, and rolled back
//! dry run          the same once more, when the definitions of both servers are compared
//! drain            everything has been applied: all of them in one transaction, foreign keys NOT VALID, not committed yet
//! decide           ‹aborted›: rolled back
//! switch           committed, and only then are sessions let in; who finds them missing after a crash makes them first
//! after            foreign keys are validated
//! ```
//!
//! An apply to such a server looks first that nothing there would fire ([`firing`]). Nothing of ours may be applied to it
//! once they are there, which is why such a cutover has no way back: what a rollback leads to could not be followed again.

use std::time::Duration;

use super::schema::{Archive, RestoreFailure};
use crate::catalog::{self, RecordError};
use crate::postgres::Control;
use crate::sqlstate;

const TABLE: &str = "CREATE SCHEMA IF NOT EXISTS pgcutover; \
    CREATE TABLE IF NOT EXISTS pgcutover.late_definition ( \
        position int PRIMARY KEY, kind text NOT NULL, object text NOT NULL, sql text NOT NULL, validate text, \
        state text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'made', 'validated', 'violated')))";

/// Forgets what a migration of this database has kept.
pub(in crate::migration) const FORGET: &str = "DROP TABLE IF EXISTS pgcutover.late_definition";

/// What a session does that writes rows which have had their effects: nothing fires.
pub(super) const REPLICA: &str = "SET session_replication_role = replica";

/// What would fire on rows that are written without [`REPLICA`]: triggers, rules and foreign keys, of extensions too.
/// Triggers of deferrable constraints other than foreign keys are checks that hold for these rows as well.
pub(super) const FIRING: &str = "\
WITH relation AS (
    SELECT c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_'
       AND n.nspname NOT IN ('information_schema', 'pgcutover'))
SELECT 'trigger ' || pg_catalog.quote_ident(t.tgname) || ' on ' || r.name
  FROM pg_catalog.pg_trigger t JOIN relation r ON r.oid = t.tgrelid
 WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A')
UNION ALL
SELECT 'foreign key ' || pg_catalog.quote_ident(k.conname) || ' on ' || r.name
  FROM pg_catalog.pg_constraint k JOIN relation r ON r.oid = k.conrelid WHERE k.contype = 'f'
UNION ALL
SELECT 'rule ' || pg_catalog.quote_ident(w.rulename) || ' on ' || r.name
  FROM pg_catalog.pg_rewrite w JOIN relation r ON r.oid = w.ev_class
 WHERE w.ev_type <> '1' AND w.ev_enabled IN ('O', 'A')
ORDER BY 1 LIMIT 5";

/// Shorter than `deadlock_timeout` (1s), so that where an applier and we wait for each other it is we who give way.
const BRIEF_LOCK_TIMEOUT: Duration = Duration::from_millis(400);

/// Attempts at locks that an applier may hold.
const LOCK_ATTEMPTS: u32 = 150;

/// A definition that comes late.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::migration) struct Definition {
    /// `FK CONSTRAINT`, `TRIGGER`, … as pg_dump says it.
    pub(in crate::migration) kind: String,
    /// Schema and name, as pg_dump says it.
    pub(in crate::migration) object: String,
    /// What makes it.
    pub(in crate::migration) sql: String,
    /// What validates it afterwards.
    pub(in crate::migration) validate: Option<String>,
}

/// The definitions that come late could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum LateError {
    /// One of them, or all.
    #[error("{object}: {doing} failed on the target")]
    Failed {
        /// Which, or all of them.
        object: String,
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The schema that they are kept in is not ours, or cannot be looked at.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl LateError {
    fn of_all(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Self {
        move |source| Self::Failed { object: "definitions that come late".to_owned(), doing, source }
    }

    fn waited_for_a_lock(&self) -> bool {
        let Self::Failed { source, .. } = self else { return false };
        source.code().is_some_and(|code| [sqlstate::LOCK_NOT_AVAILABLE, "40P01"].contains(&code.code()))
    }
}

/// How the definitions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One by one: an error names its definition.
    Each,
    /// In one message.
    Together,
}

/// Whether the session's role may have its own writes fire nothing. Tried, because nothing else tells: superusers may,
/// from PostgreSQL 15 on who was granted it, and whom a service lets. In no transaction.
pub async fn may_replicate_silently(control: &Control) -> Result<bool, tokio_postgres::Error> {
    let tried = format!("BEGIN READ ONLY; {}; ROLLBACK", REPLICA.replacen("SET ", "SET LOCAL ", 1));
    let Err(error) = control.batch_execute(&tried).await else { return Ok(true) };
    if !is_refused(&error) {
        return Err(error);
    }
    control.batch_execute("ROLLBACK").await?;
    Ok(false)
}

/// Has what the session writes from now on fire nothing, where its role may. In no transaction.
pub(in crate::migration) async fn write_silently(control: &Control) -> Result<(), tokio_postgres::Error> {
    match control.batch_execute(REPLICA).await {
        Err(error) if !is_refused(&error) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn is_refused(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code() == sqlstate::INSUFFICIENT_PRIVILEGE)
}

/// What would fire, in words; a few of them.
pub async fn firing(control: &Control) -> Result<Vec<String>, tokio_postgres::Error> {
    Ok(control.query(FIRING, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Keeps the definitions of `archive`, in place of what an earlier attempt has kept, and tries them out. `guard` is a query
/// that must return a row. Returns those that the target refuses.
pub(in crate::migration) async fn keep(
    control: &mut Control,
    guard: &str,
    archive: &Archive,
) -> Result<Vec<RestoreFailure>, LateError> {
    let definitions = archive.late(control.version_num());
    let failed = || LateError::of_all("keeping them");
    control.batch_execute(TABLE).await.map_err(failed())?;
    let transaction = control.transaction().await.map_err(failed())?;
    // Divides by zero where another engine has taken over.
    let check = format!("SELECT 1 / pg_catalog.count(*) FROM ({guard}) AS pgcutover_guard");
    transaction.query(&check, &[]).await.map_err(failed())?;
    transaction.batch_execute("DELETE FROM pgcutover.late_definition").await.map_err(failed())?;
    let insert =
        "INSERT INTO pgcutover.late_definition (position, kind, object, sql, validate) VALUES ($1, $2, $3, $4, $5)";
    for (position, Definition { kind, object, sql, validate }) in (0i32..).zip(&definitions) {
        transaction.execute(insert, &[&position, kind, object, sql, validate]).await.map_err(failed())?;
    }
    transaction.commit().await.map_err(failed())?;
    let tried = rehearse(control).await;
    if tried.is_ok() {
        control.batch_execute("ROLLBACK").await.map_err(failed())?;
    }
    match tried {
        Ok(_) => Ok(Vec::new()),
        Err(LateError::Failed { object, source, .. }) if source.as_db_error().is_some() => {
            let refusal = source.as_db_error();
            let sqlstate = refusal.map_or_else(String::new, |refusal| refusal.code().code().to_owned());
            let message = refusal.map_or_else(String::new, |refusal| refusal.message().to_owned());
            let (kind, object) = object.split_once(": ").map_or(("", object.as_str()), |(kind, object)| (kind, object));
            Ok(vec![RestoreFailure { kind: kind.to_owned(), object: object.to_owned(), sqlstate, message }])
        }
        Err(error) => Err(error),
    }
}

/// Forgets what an earlier migration of this database has kept.
pub(in crate::migration) async fn forget(control: &Control) -> Result<(), LateError> {
    control.batch_execute(FORGET).await.map_err(LateError::of_all("forgetting them"))
}

/// How many wait to be made.
pub async fn waiting(control: &Control) -> Result<usize, LateError> {
    count(control, "state = 'waiting' AND kind <> 'SETTINGS'").await
}

/// How many are made, and so forbid that anything is applied here.
pub async fn made(control: &Control) -> Result<usize, LateError> {
    count(control, "state <> 'waiting'").await
}

/// How many foreign keys are made and not validated yet.
pub async fn unvalidated(control: &Control) -> Result<usize, LateError> {
    count(control, "state = 'made' AND validate IS NOT NULL").await
}

async fn count(control: &Control, which: &str) -> Result<usize, LateError> {
    if !catalog::has_table(&**control, "late_definition").await? {
        return Ok(0);
    }
    let query = format!("SELECT pg_catalog.count(*) FROM pgcutover.late_definition WHERE {which}");
    let counted = control.query_one(&query, &[]).await.map_err(LateError::of_all("reading them"))?;
    let counted: i64 = counted.get(0);
    Ok(usize::try_from(counted).unwrap_or(0))
}

/// Executes what is waiting in a transaction that is left open, for somebody to look at the result and roll it back; where
/// nothing waits no transaction is begun. An applier may be at work: it waits meanwhile. Returns how many there are.
pub async fn rehearse(control: &Control) -> Result<usize, LateError> {
    let definitions = waiting(control).await?;
    if definitions == 0 {
        return Ok(0);
    }
    let mut attempts = 0;
    loop {
        attempts += 1;
        match execute(control, BRIEF_LOCK_TIMEOUT, Way::Each).await {
            Err(error) if error.waited_for_a_lock() && attempts < LOCK_ATTEMPTS => {
                tokio::time::sleep(BRIEF_LOCK_TIMEOUT / 4).await;
            }
            done => return done.map(|()| definitions),
        }
    }
}

/// Executes what is waiting in a transaction that is left open: [`commit`] ends it. Nothing may be applied any more.
pub async fn make(control: &Control, lock_timeout: Duration) -> Result<(), LateError> {
    execute(control, lock_timeout, Way::Together).await
}

/// Ends the transaction of [`make`]: the definitions are in force, durably.
pub async fn commit(control: &Control) -> Result<(), LateError> {
    control.batch_execute("COMMIT").await.map_err(LateError::of_all("committing them"))
}

/// Makes what is waiting, at once. Whoever is doing so already is waited for.
pub async fn release(control: &Control, lock_timeout: Duration) -> Result<(), LateError> {
    if waiting(control).await? == 0 {
        return Ok(());
    }
    make(control, lock_timeout).await?;
    commit(control).await
}

async fn execute(control: &Control, lock_timeout: Duration, way: Way) -> Result<(), LateError> {
    let executed = execute_in_transaction(control, lock_timeout, way).await;
    if executed.is_err() {
        // Where the connection is lost the server does it.
        let _ = control.batch_execute("ROLLBACK").await;
    }
    executed
}

async fn execute_in_transaction(control: &Control, lock_timeout: Duration, way: Way) -> Result<(), LateError> {
    let begin = format!(
        "BEGIN; SET LOCAL lock_timeout = {}; LOCK TABLE pgcutover.late_definition IN SHARE ROW EXCLUSIVE MODE",
        lock_timeout.as_millis().max(1)
    );
    control.batch_execute(&begin).await.map_err(LateError::of_all("locking them"))?;
    let read =
        "SELECT kind || ': ' || object, sql FROM pgcutover.late_definition WHERE state = 'waiting' ORDER BY position";
    let rows = control.query(read, &[]).await.map_err(LateError::of_all("reading them"))?;
    match way {
        Way::Each => {
            for row in &rows {
                let (object, sql): (String, &str) = (row.get(0), row.get(1));
                let made = control.batch_execute(sql).await;
                made.map_err(|source| LateError::Failed { object, doing: "making it", source })?;
            }
        }
        Way::Together => {
            let sql: Vec<&str> = rows.iter().map(|row| row.get(1)).collect();
            control.batch_execute(&sql.join("\n;\n")).await.map_err(LateError::of_all("making them"))?;
        }
    }
    let done = "UPDATE pgcutover.late_definition SET state = 'made' WHERE state = 'waiting'";
    control.batch_execute(done).await.map_err(LateError::of_all("marking them"))
}

/// Validates what was made without looking at the rows that were there. Sessions read and write meanwhile. Returns what the
/// rows do not satisfy: it stays in force for what is written from now on.
pub async fn validate(control: &Control) -> Result<Vec<RestoreFailure>, LateError> {
    if made(control).await? == 0 {
        return Ok(Vec::new());
    }
    let read = "SELECT position, kind, object, validate FROM pgcutover.late_definition \
                WHERE state IN ('made', 'violated') AND validate IS NOT NULL ORDER BY position";
    let rows = control.query(read, &[]).await.map_err(LateError::of_all("reading them"))?;
    let mut failures = Vec::new();
    for row in rows {
        let (position, kind, object, sql): (i32, String, String, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        let (state, failure) = match control.batch_execute(sql).await {
            Ok(()) => ("validated", None),
            Err(error) => {
                let refusal = error.as_db_error().map(|refusal| (refusal.code().code().to_owned(), refusal.message()));
                match refusal {
                    Some((sqlstate, message)) if sqlstate == sqlstate::FOREIGN_KEY_VIOLATION => {
                        let message = message.to_owned();
                        ("violated", Some(RestoreFailure { kind, object, sqlstate, message }))
                    }
                    // Somebody has dropped it, or its table.
                    Some((sqlstate, _)) if ["42704", "42P01", "3F000"].contains(&sqlstate.as_str()) => {
                        ("validated", None)
                    }
                    _ => return Err(LateError::Failed { object, doing: "validating it", source: error }),
                }
            }
        };
        let mark = "UPDATE pgcutover.late_definition SET state = $2 WHERE position = $1";
        control.execute(mark, &[&position, &state]).await.map_err(LateError::of_all("marking them"))?;
        failures.extend(failure);
    }
    Ok(failures)
}
