//! What must hold before a cutover begins. Read-only; an operator who is refused here has lost nothing.
//!
//! Who orders it with `--force` goes past what can only cost time or connections: a lag that is known and too large, more than
//! `max_unstreamed` to carry in the pause, and too few connections or files. What a miss of theirs can come to is an abort, by
//! `max_pause` or by sessions that could not be moved. And owners and grants, without which sessions are refused what they may do
//! on the other server. Nothing else is gone past. A new guardrail is not either, unless it is put through [`Work::refuse_unless_forced`].

use std::time::{Duration, Instant};

use super::CutoverError;
use super::soft_fence;
use super::work::{LineSessions, UnmovedSession, Work};
use crate::config::{FencePolicy, Stragglers};
use crate::migration::unstreamed;
use crate::postgres::Control;
use crate::proxy::{SessionView, descriptors};
use crate::switch::Route;
use crate::wire::startup::parse_bool;

/// Tables, columns and sequences of a database, one line each; the two servers must agree. What has to be quoted differs
/// between majors (`json` is a keyword since PostgreSQL 16), so names are compared without quotes.
const FINGERPRINT: &str = "
    SELECT format('column %s.%s.%s %s%s', n.nspname, c.relname, a.attname,
                  replace(pg_catalog.format_type(a.atttypid, a.atttypmod), '\"', ''), CASE WHEN a.attnotnull THEN ' not null' ELSE '' END)
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE format('\"%s\".\"%s\"', replace(n.nspname, '\"', '\"\"'), replace(c.relname, '\"', '\"\"')) = ANY($1)
    UNION ALL
    SELECT format('sequence %s.%s', n.nspname, c.relname)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname <> 'pgcutover'
    ORDER BY 1";

/// Between two looks at a lag that is not known.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long a lag that is too large is watched, to say what becomes of it; it is measured twice a second.
const TREND: Duration = Duration::from_secs(3);

/// Connections that a cutover opens for itself on the server that it leads to, for each database.
const OWN_CONNECTIONS: i64 = 5;

/// At most this many differences are named.
const NAMED: usize = 10;

impl Work {
    /// Checks everything that needs no session in the databases yet.
    pub(super) async fn check_guardrails(&mut self) -> Result<(), CutoverError> {
        for line in &self.lines {
            match &*line.gate.route() {
                Route::To { server, epoch } if *server == self.from.role && *epoch == line.earlier => {}
                Route::To { server, .. } => {
                    return Err(CutoverError::Guardrail(format!("database {:?} runs on the {server}", line.name)));
                }
                Route::Unknown { reason } => {
                    return Err(CutoverError::Guardrail(format!(
                        "it is not known where database {:?} runs: {reason}",
                        line.name
                    )));
                }
            }
        }
        if self.case.databases.contains(&self.control_database) && self.options.fence == FencePolicy::Hard {
            return Err(CutoverError::Guardrail(format!(
                "the control database {:?} is itself being migrated, and shutting it would shut us out: set [control] \
                 database to another one, or [control] fence = \"soft\"",
                self.control_database
            )));
        }
        self.check_lag().await?;
        self.check_writable().await?;
        self.check_unstreamed().await?;
        self.check_capacity().await?;
        self.note_long_transactions().await
    }

    /// Refuses because of something that can cost time or connections and never data; `--force` notes it and goes on.
    fn refuse_unless_forced(&mut self, refusal: String) -> Result<(), CutoverError> {
        if !self.options.force {
            return Err(CutoverError::Forceable(refusal));
        }
        // Some are asked twice.
        if !self.forced.contains(&refusal) {
            tracing::warn!(migration = self.case.migration, refusal, "gone past a guardrail, by --force");
            self.forced.push(refusal);
        }
        Ok(())
    }

    /// Unknown lag is not zero lag. A stream that has just begun again gets a moment to say how far it is.
    async fn check_lag(&mut self) -> Result<(), CutoverError> {
        let allowed = self.options.max_lag_at_start_bytes;
        let patience = self.from.connector.server().connect_timeout;
        let mut unknown_until = None;
        let slowdown = Some(self.options.throttle_for).filter(|_| !self.options.throttle_writes.is_zero());
        let slowed_until = Instant::now() + slowdown.unwrap_or_default();
        loop {
            let lag = self.lease.lag_bytes();
            if lag.is_some() {
                unknown_until = None;
            }
            match lag {
                Some(lag) if lag <= allowed => return Ok(()),
                Some(_) if Instant::now() < slowed_until => tokio::time::sleep(LOOK_AGAIN).await,
                Some(lag) => {
                    tokio::time::sleep(TREND).await;
                    let later = self.lease.lag_bytes().unwrap_or(lag);
                    if later <= allowed {
                        return Ok(());
                    }
                    let mut refusal = forecast(lag, later, allowed);
                    if let Some(time) = slowdown {
                        let delay = self.options.throttle_writes;
                        refusal = format!(
                            "{refusal}; {time:?} of writes slowed down by up to {delay:?} each were not enough"
                        );
                    }
                    return self.refuse_unless_forced(refusal);
                }
                None if Instant::now() < *unknown_until.get_or_insert_with(|| Instant::now() + patience) => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                None => {
                    let message =
                        "how far the target is behind is not known: `migration show` says what the stream does";
                    return Err(CutoverError::Guardrail(message.to_owned()));
                }
            }
        }
    }

    /// The databases that are about to become active must accept connections and writes.
    async fn check_writable(&self) -> Result<(), CutoverError> {
        let rows = self
            .to
            .control
            .query(
                "SELECT d.datname, d.datallowconn, d.datconnlimit,
                        (SELECT substr(c, strpos(c, '=') + 1)::boolean
                         FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) c
                         WHERE s.setdatabase = d.oid AND s.setrole = 0
                           AND lower(split_part(c, '=', 1)) = 'default_transaction_read_only'),
                        (SELECT substr(c, strpos(c, '=') + 1)::boolean
                         FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) c
                         WHERE s.setdatabase = 0 AND s.setrole = 0
                           AND lower(split_part(c, '=', 1)) = 'default_transaction_read_only')
                 FROM pg_catalog.pg_database d WHERE d.datname = ANY($1)",
                &[&self.case.databases],
            )
            .await
            .map_err(|source| CutoverError::query("look at the databases that are led to", source))?;
        let configured = self.is_configured_read_only().await?;
        let to = self.to.role;
        for name in &self.case.databases {
            let Some(row) = rows.iter().find(|row| row.get::<_, &str>(0) == name) else {
                return Err(CutoverError::Guardrail(format!("database {name:?} does not exist on the {to}")));
            };
            let (of_database, of_all): (Option<bool>, Option<bool>) = match &self.home {
                None => (row.get(3), row.get(4)),
                // The fence that stands there is ours, and is lifted when the databases come back. What the database
                // was set to before that is what its sessions ran with.
                Some(home) => {
                    let saved = home.fence.saved.iter().find(|saved| saved.name == *name);
                    (saved.and_then(|saved| saved.read_only.as_ref()).map(|_| false), row.get(4))
                }
            };
            if self.home.is_none() && (!row.get::<_, bool>(1) || row.get::<_, i32>(2) == 0) {
                return Err(CutoverError::Guardrail(format!(
                    "database {name:?} accepts no connections on the {to}: ALTER DATABASE … ALLOW_CONNECTIONS true \
                     CONNECTION LIMIT -1"
                )));
            }
            if let Some(from_where) = read_only_by(of_database, of_all, configured) {
                return Err(CutoverError::Guardrail(format!(
                    "database {name:?} is read-only by default on the {to}: {from_where}"
                )));
            }
        }
        Ok(())
    }

    /// Whether the server that is led to says so itself; our own sessions there pin it and cannot tell.
    async fn is_configured_read_only(&self) -> Result<bool, CutoverError> {
        let asked = self.to.connector.server_setting(&self.control_database, soft_fence::READ_ONLY).await?;
        let value = match asked {
            Some(value) => value,
            // Hidden by a setting of our own role, or of the control database.
            None => soft_fence::server_default(&*self.to.control).await?,
        };
        // In a file it stands as somebody wrote it.
        Ok(parse_bool(&value) == Some(true))
    }

    /// What no stream carries is carried in the pause; what does not get there in time is an abort by `max_pause`.
    async fn check_unstreamed(&mut self) -> Result<(), CutoverError> {
        for name in self.case.databases.clone() {
            let session = self.from.connector.control(&name, "unstreamed").await?;
            let fits = unstreamed::weigh(&session).await?.must_fit(self.options.max_unstreamed_bytes);
            if let Err(too_large) = fits {
                self.refuse_unless_forced(format!("database {name:?}: {too_large}"))?;
            }
        }
        Ok(())
    }

    /// Each session needs a connection there before its old one is closed.
    async fn check_capacity(&mut self) -> Result<(), CutoverError> {
        let moves = |session: &SessionView| {
            session.server == Some(self.from.role) && !session.pooled && self.case.databases.contains(&session.database)
        };
        let sessions = self.sessions.list().iter().filter(|session| moves(session)).count();
        let own = OWN_CONNECTIONS * i64::try_from(self.lines.len()).unwrap_or(i64::MAX);
        let wanted = i64::try_from(sessions).unwrap_or(i64::MAX).saturating_add(own);
        let row = self
            .to
            .control
            .query_one(
                "SELECT pg_catalog.current_setting('max_connections')::bigint
                        - pg_catalog.current_setting('superuser_reserved_connections')::bigint
                        - coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::bigint
                        - (SELECT coalesce(sum(numbackends), 0) FROM pg_catalog.pg_stat_database)::bigint",
                &[],
            )
            .await
            .map_err(|source| CutoverError::query("count the free connections", source))?;
        let free: i64 = row.get(0);
        let mut lacking = Vec::new();
        if wanted > free {
            lacking.push(format!(
                "the {} has {} free connections, and {sessions} sessions would move there, besides {own} of the cutover's \
                 own: raise max_connections there, or end sessions",
                self.to.role,
                free.max(0)
            ));
        }
        if let Some(free) = descriptors::free().filter(|free| wanted.unsigned_abs() > *free) {
            lacking.push(format!(
                "pgcutover may open {free} more files, and needs {wanted} for the sessions that would move: raise LimitNOFILE \
                 of its unit (ulimit -n) and start it again"
            ));
        }
        match (self.options.stragglers, lacking.is_empty()) {
            (Stragglers::Abort, false) => self.refuse_unless_forced(lacking.join("; ")),
            (Stragglers::Abort | Stragglers::Terminate, _) => {
                self.notes.extend(lacking);
                Ok(())
            }
        }
    }

    /// Transactions that are older than the drain may take are told to the operator; they may end in time.
    async fn note_long_transactions(&mut self) -> Result<(), CutoverError> {
        let looking = super::hard_fence::Looking::Work;
        let busy =
            super::hard_fence::backends(&self.from.control, &self.case.databases, &self.known(), looking).await?;
        for obstacle in busy {
            if obstacle.age_seconds > self.options.drain_timeout.as_secs_f64() {
                tracing::warn!(
                    pid = obstacle.pid,
                    age_seconds = obstacle.age_seconds,
                    "long transaction before a cutover"
                );
                self.notes.push(format!("long transaction before the cutover: {obstacle}"));
            }
        }
        Ok(())
    }

    /// What the engine compares: all that a session would miss on the other server.
    pub(super) async fn compare_definitions(&self) -> Result<(), CutoverError> {
        self.lease.compare_definitions().await.map_err(CutoverError::Definitions)
    }

    /// Sessions are refused there what they may do now; no row hangs on it, and what a role of the old server's own services was
    /// given cannot always be given there.
    pub(super) async fn check_rights(&mut self) -> Result<(), CutoverError> {
        for lacking in self.lease.lacking_rights().await.map_err(CutoverError::Definitions)? {
            let role = self.to.role;
            self.refuse_unless_forced(format!("the {role} lacks {lacking}: give the same there"))?;
        }
        Ok(())
    }

    /// Compares what the two servers hold, through the sessions that prepare has opened.
    pub(super) async fn check_fingerprints(&self) -> Result<(), CutoverError> {
        for line in &self.lines {
            let Some(sessions) = &line.sessions else { continue };
            let publication = self.lease.replication(&line.name).publication;
            let tables = published_tables(&sessions.marker, &publication).await?;
            check_fingerprint(&line.name, sessions, &tables).await?;
        }
        Ok(())
    }

    /// Whether sessions that cannot be moved stop the cutover now or are ended in the pause.
    pub(super) fn check_moves(&mut self, stuck: Vec<UnmovedSession>) -> Result<(), CutoverError> {
        if stuck.is_empty() {
            return Ok(());
        }
        match self.options.stragglers {
            Stragglers::Abort => {
                let (words, obstacles) = stuck.into_iter().map(|session| (session.words, session.obstacle)).unzip();
                Err(CutoverError::Sessions { words, obstacles })
            }
            Stragglers::Terminate => {
                self.notes.extend(stuck.into_iter().map(|session| format!("cannot be moved: {}", session.words)));
                Ok(())
            }
        }
    }
}

/// What makes a database read-only by default, and what ends that: the first one that is set wins, a database's own
/// value, that of all databases, the server's (`process_settings` in PostgreSQL's `postinit.c`). Roles with values of
/// their own are not asked.
fn read_only_by(of_database: Option<bool>, of_all: Option<bool>, configured: bool) -> Option<&'static str> {
    match (of_database, of_all, configured) {
        (Some(true), _, _) => Some("ALTER DATABASE … RESET default_transaction_read_only there"),
        (None, Some(true), _) => Some("ALTER ROLE ALL RESET default_transaction_read_only there"),
        (None, None, true) => Some(
            "its configuration has default_transaction_read_only = on, which services set when the disk is full: give \
             it more storage if that was why, and ALTER SYSTEM RESET default_transaction_read_only; SELECT \
             pg_reload_conf() there",
        ),
        (Some(false), _, _) | (None, Some(false), _) | (None, None, false) => None,
    }
}

/// Why a cutover is refused that is `later` bytes behind, having been `lag` bytes behind [`TREND`] ago.
fn forecast(lag: u64, later: u64, allowed: u64) -> String {
    let behind = format!("the target is {later} bytes behind, max_lag_at_start is {allowed}");
    let per_second = lag.abs_diff(later) as f64 / TREND.as_secs_f64();
    if later >= lag {
        return format!(
            "{behind}, and it does not come closer ({per_second:.0} bytes a second further away): changes come faster than \
             they are applied. Look for tables without a primary key, for locks and at the disks of the target, or choose a \
             quieter hour"
        );
    }
    let seconds = (later - allowed) as f64 / per_second;
    format!(
        "{behind}: it comes closer by {per_second:.0} bytes a second, so try again in about {:.0} seconds",
        seconds.ceil()
    )
}

/// Quoted names of the tables that the stream carries, ours left out.
pub(super) async fn published_tables(control: &Control, publication: &str) -> Result<Vec<String>, CutoverError> {
    let tables = crate::migration::publication::published(control, publication).await;
    let tables = tables.map_err(|source| CutoverError::query("list the published tables", source))?;
    Ok(tables.iter().map(ToString::to_string).collect())
}

async fn check_fingerprint(database: &str, sessions: &LineSessions, tables: &[String]) -> Result<(), CutoverError> {
    let read = async |control: &Control| -> Result<std::collections::BTreeSet<String>, CutoverError> {
        let rows = control.query(FINGERPRINT, &[&tables]).await;
        let rows = rows.map_err(|source| CutoverError::query("compare tables and columns", source))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    let (here, there) = (read(&sessions.marker).await?, read(&sessions.onward).await?);
    let missing = here.difference(&there).map(|line| format!("missing there: {line}"));
    // A column more on the other side is harmless to what the stream brings, a sequence more as well.
    let differences: Vec<String> = missing.take(NAMED).collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(CutoverError::Guardrail(format!(
        "tables or sequences of {database:?} have changed since they were copied ({}): make the same change on the other \
         server, or copy them again",
        differences.join("; ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_setting_that_is_there_says_whether_a_database_is_read_only() {
        let says = |of_database, of_all, configured| read_only_by(of_database, of_all, configured).is_some();
        for (of_database, of_all, configured, read_only) in [
            (None, None, false, false),
            (None, None, true, true),
            (None, Some(false), true, false),
            (None, Some(true), false, true),
            (Some(false), Some(true), true, false),
            (Some(true), Some(false), false, true),
        ] {
            assert_eq!(says(of_database, of_all, configured), read_only, "{of_database:?} {of_all:?} {configured}");
        }
        let is_on = |value| parse_bool(value) == Some(true);
        assert!(is_on("ON") && is_on("true") && !is_on("off") && !is_on(""));
    }

    #[test]
    fn a_lag_that_is_too_large_is_foretold() {
        let closer = forecast(40_000_000, 31_000_000, 16_000_000);
        assert!(closer.contains("closer by 3000000 bytes a second, so try again in about 5 seconds"), "{closer}");
        for later in [40_000_000, 43_000_000] {
            let never = forecast(40_000_000, later, 16_000_000);
            assert!(never.contains("does not come closer"), "{never}");
        }
    }
}
