//! Executing entries on the target: each in a transaction of its own, together with the mark that it is done.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::Duration;

use super::archive::{Archive, ForeignKey};
use super::toc::Entry;
use super::{RestoreFailure, RestoreReport, RestoreTarget, SchemaError};
use crate::ident::quote_literal;
use crate::postgres::Control;
use crate::sqlstate;

/// Marks of executed entries, in the target database.
const MARKS: &str = "CREATE SCHEMA IF NOT EXISTS pgcutover; \
                     CREATE TABLE IF NOT EXISTS pgcutover.restored_entry \
                     (entry text PRIMARY KEY, restored_at timestamptz NOT NULL DEFAULT pg_catalog.now())";

/// Shorter than `deadlock_timeout` (1s), so that where an applier and we wait for each other it is we who give way.
const BRIEF_LOCK_TIMEOUT: Duration = Duration::from_millis(400);

/// Attempts at a lock that an applier may hold.
const LOCK_ATTEMPTS: u32 = 150;

/// A session on the target that executes entries.
pub(in crate::migration) struct Restorer<'a> {
    control: Control,
    target: RestoreTarget<'a>,
    done: HashSet<String>,
    /// See [`Archive::public_is_the_makers`].
    public_is_the_makers: bool,
    report: RestoreReport,
}

impl<'a> Restorer<'a> {
    /// Opens the session with the settings that dumps are written for.
    pub(in crate::migration) async fn open(
        target: RestoreTarget<'a>,
        archive: &Archive,
        purpose: &str,
    ) -> Result<Self, SchemaError> {
        let control = target.connector.control(target.database, purpose).await?;
        let settings = settings(archive, "");
        let read = |error| SchemaError::Read { database: target.database.to_owned(), source: error };
        let exists = control.query_one("SELECT pg_catalog.to_regclass('pgcutover.restored_entry') IS NOT NULL", &[]);
        if !exists.await.map_err(read)?.get::<_, bool>(0) {
            control.batch_execute(MARKS).await.map_err(read)?;
        }
        control.batch_execute(&settings).await.map_err(read)?;
        // A backend whose engine was killed then ends soon, not after hours of building an index. Before PostgreSQL 14,
        // and where the system cannot tell, it goes on: its mark is found (see `step`).
        if control.version_num() >= 140_000
            && let Err(error) = control.batch_execute("SET client_connection_check_interval = '5s'").await
        {
            tracing::debug!(%error, "the target does not watch over its clients");
        }
        let public_is_the_makers = archive.public_is_the_makers;
        Ok(Self { control, target, done: HashSet::new(), public_is_the_makers, report: RestoreReport::default() })
    }

    /// Reads which of these entries an earlier run executed.
    async fn read_marks(&mut self, keys: Vec<String>) -> Result<(), SchemaError> {
        let read = "SELECT entry FROM pgcutover.restored_entry WHERE entry = ANY ($1)";
        let rows = self.control.query(read, &[&keys]).await;
        let rows = rows.map_err(|source| SchemaError::Read { database: self.target.database.to_owned(), source })?;
        self.done.extend(rows.iter().map(|row| row.get::<_, String>(0)));
        Ok(())
    }

    /// Sets a parameter for the rest of the session.
    pub(in crate::migration) async fn set(&self, name: &str, value: &str) -> Result<(), SchemaError> {
        let set = self.control.execute("SELECT pg_catalog.set_config($1, $2, false)", &[&name, &value]).await;
        set.map(|_| ()).map_err(|source| SchemaError::Read { database: self.target.database.to_owned(), source })
    }

    async fn is_marked(&self, key: &str) -> Result<bool, SchemaError> {
        let read = "SELECT FROM pgcutover.restored_entry WHERE entry = $1";
        let row = self.control.query_opt(read, &[&key]).await;
        let row = row.map_err(|source| SchemaError::Read { database: self.target.database.to_owned(), source })?;
        Ok(row.is_some())
    }

    /// Executes entries in order, but for those that an earlier run executed.
    pub(in crate::migration) async fn entries(
        &mut self,
        entries: &[Entry],
        locking: Locking,
    ) -> Result<(), SchemaError> {
        self.read_marks(entries.iter().map(|entry| entry.key.clone()).collect()).await?;
        for entry in entries {
            self.step(entry, &entry.key, &entry.sql, locking).await?;
        }
        Ok(())
    }

    /// Adds foreign keys; see [`super::restore_foreign_keys`].
    pub(super) async fn foreign_keys(&mut self, keys: &[ForeignKey]) -> Result<(), SchemaError> {
        let marks = keys.iter().flat_map(|key| [key.entry.key.clone(), validated(&key.entry)]).collect();
        self.read_marks(marks).await?;
        for key in keys {
            self.foreign_key(key).await?;
        }
        Ok(())
    }

    async fn foreign_key(&mut self, key: &ForeignKey) -> Result<(), SchemaError> {
        let entry = &key.entry;
        let Some((add, validate)) = key.in_two_steps(self.control.version_num()) else {
            return self.step(entry, &entry.key, &entry.sql, Locking::Brief).await.map(|_| ());
        };
        if self.step(entry, &entry.key, &add, Locking::Brief).await? {
            self.step(entry, &validated(entry), validate, Locking::Brief).await?;
        }
        Ok(())
    }

    /// What was done since the session was opened.
    pub(in crate::migration) fn finish(self) -> RestoreReport {
        self.report
    }

    /// Executes `sql` and marks `key` in one transaction. Returns whether it is done; a refusal is recorded.
    async fn step(&mut self, entry: &Entry, key: &str, sql: &str, locking: Locking) -> Result<bool, SchemaError> {
        if self.done.contains(key) {
            self.report.already_done += 1;
            return Ok(true);
        }
        let lock_timeout = match locking {
            Locking::Patient => Duration::ZERO,
            Locking::Brief => BRIEF_LOCK_TIMEOUT,
        };
        let mut text = self.transaction_text(entry, key, &by_members(&entry.kind, sql), lock_timeout);
        let mut may_be_left_out = self.may_be_left_out(entry);
        let mut attempts = 0;
        loop {
            attempts += 1;
            let Err(error) = self.control.batch_execute(&text).await else { break };
            let Some(refusal) = error.as_db_error() else {
                return Err(SchemaError::Lost { object: format!("{} {}", entry.kind, entry.object()), source: error });
            };
            let code = refusal.code().code().to_owned();
            let message = refusal.message().to_owned();
            self.roll_back(entry).await?;
            if self.is_marked(key).await? {
                // A backend that had lost its engine went on to the end of this very entry.
                self.done.insert(key.to_owned());
                self.report.already_done += 1;
                return Ok(true);
            }
            if code == sqlstate::INSUFFICIENT_PRIVILEGE
                && let Some(stays) = may_be_left_out.take()
            {
                tracing::warn!(database = self.target.database, object = entry.object(), message, "{stays}");
                text = self.transaction_text(entry, key, "", lock_timeout);
                continue;
            }
            let may_wait = [sqlstate::LOCK_NOT_AVAILABLE, "40P01"].contains(&code.as_str());
            if locking == Locking::Brief && may_wait && attempts < LOCK_ATTEMPTS {
                // Whoever holds the lock gets the time to end its transaction before we queue in front of others again.
                tokio::time::sleep(BRIEF_LOCK_TIMEOUT / 4).await;
                continue;
            }
            let failure = RestoreFailure { kind: entry.kind.clone(), object: entry.object(), sqlstate: code, message };
            tracing::error!(
                database = self.target.database,
                kind = failure.kind,
                object = failure.object,
                sqlstate = failure.sqlstate,
                "definition could not be restored"
            );
            self.report.failures.push(failure);
            return Ok(false);
        }
        self.done.insert(key.to_owned());
        self.report.executed += 1;
        Ok(true)
    }

    /// What stays as it is where our rights do not reach, for an entry that nothing is lost without.
    fn may_be_left_out(&self, entry: &Entry) -> Option<&'static str> {
        if self.public_is_the_makers && gives_public_away(entry) {
            Some("schema public keeps the owner that it has")
        } else if comments_on_extension(entry) {
            Some("the extension keeps the comment that it has")
        } else {
            None
        }
    }

    /// After a refused entry: ends its transaction, and finds out whether it was the guard that refused.
    async fn roll_back(&self, entry: &Entry) -> Result<(), SchemaError> {
        let object = || format!("{} {}", entry.kind, entry.object());
        let lost = |source| SchemaError::Lost { object: object(), source };
        self.control.batch_execute("ROLLBACK").await.map_err(lost)?;
        if let Some(guard) = self.target.guard
            && self.control.query(guard, &[]).await.map_err(lost)?.is_empty()
        {
            return Err(SchemaError::Superseded { object: object() });
        }
        Ok(())
    }

    /// One message for the whole transaction: over a long line the round trips of thousands of entries are what costs.
    fn transaction_text(&self, entry: &Entry, key: &str, sql: &str, lock_timeout: Duration) -> String {
        let guard = self.target.guard.map_or_else(String::new, |guard| {
            // Divides by zero, and so ends the transaction, when the guard's row is not there.
            format!("SELECT 1 / pg_catalog.count(*) FROM ({guard}) AS pgcutover_guard;\n")
        });
        let settings: String =
            entry.settings.iter().map(|setting| format!("{}\n", setting.replacen("SET ", "SET LOCAL ", 1))).collect();
        format!(
            "BEGIN;\nSET LOCAL lock_timeout = {};\n{guard}{settings}{sql}\n;\
             INSERT INTO pgcutover.restored_entry (entry) VALUES ({});\nCOMMIT",
            lock_timeout.as_millis(),
            quote_literal(key),
        )
    }
}

/// Statements that set, with `scope` behind SET, what dumps are written for.
pub(super) fn settings(archive: &Archive, scope: &str) -> String {
    let strings = if archive.standard_strings { "on" } else { "off" };
    format!(
        "SET {scope}search_path = ''; SET {scope}check_function_bodies = off; SET {scope}xmloption = content; \
         SET {scope}client_min_messages = warning; SET {scope}standard_conforming_strings = {strings}"
    )
}

/// pg_dump becomes whoever has granted something that he does not own, which only a superuser may. A member may act as that
/// role, and what he then grants is granted by it.
fn by_members<'a>(kind: &str, sql: &'a str) -> Cow<'a, str> {
    const BECOME: &str = "SET SESSION AUTHORIZATION ";
    if !kind.ends_with("ACL") || !sql.contains(BECOME) {
        return Cow::Borrowed(sql);
    }
    let lines = sql.lines().map(|line| match line.strip_prefix(BECOME) {
        Some(role) if role != "DEFAULT;" => format!("SET ROLE {role}\n"),
        Some(_) => "RESET ROLE;\n".to_owned(),
        None if line == "RESET SESSION AUTHORIZATION;" => "RESET ROLE;\n".to_owned(),
        None => format!("{line}\n"),
    });
    Cow::Owned(lines.collect())
}

/// Whether all that the entry does is to say whose schema public is. Every database has one; that it belongs to who made the
/// cluster is nothing that an application needs, and not everybody may give it away.
fn gives_public_away(entry: &Entry) -> bool {
    let mut statements = entry.sql.lines().filter(|line| !line.is_empty() && !line.starts_with("--"));
    entry.kind == "SCHEMA"
        && statements.next().is_some_and(|first| first.starts_with("ALTER SCHEMA public OWNER TO "))
        && statements.next().is_none()
}

/// Whether all that the entry does is to comment on an extension, which only its owner may: one that is there already
/// may belong to whoever set up the server. CREATE EXTENSION itself gives it the comment of its control file.
fn comments_on_extension(entry: &Entry) -> bool {
    entry.kind == "COMMENT" && entry.name.starts_with("EXTENSION ")
}

/// The mark of a foreign key's second step.
fn validated(entry: &Entry) -> String {
    format!("{}/validated", entry.key)
}

/// How long an entry may wait for locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::migration) enum Locking {
    /// As long as it takes: nobody else is in these tables.
    Patient,
    /// A moment, again and again: an applier is at work.
    Brief,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_granted_is_granted_as_them() {
        let dumped =
            "SET SESSION AUTHORIZATION \"it's\";\nGRANT SELECT ON TABLE s.t TO r;\nRESET SESSION AUTHORIZATION;\n";
        let acted = "SET ROLE \"it's\";\nGRANT SELECT ON TABLE s.t TO r;\nRESET ROLE;\n";
        assert_eq!(by_members("ACL", dumped), acted);
        assert_eq!(by_members("FUNCTION", dumped), dumped, "what a function does is its own business");
        assert!(matches!(by_members("ACL", "GRANT SELECT ON TABLE s.t TO r;\n"), Cow::Borrowed(_)));
    }
}
