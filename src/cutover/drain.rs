//! The drain: everything that was let in ends, and everything that was written arrives.
//!
//! ```text
//! the gates are empty ─┬─ a marker is written ───────────────────────────────────┬─▶ it has arrived
//!                      ├─ nobody is left on the server ─▶ sequences are read, set ┤
//!                      └─ the tables are locked ─────────────────────────────────┘
//!                                             nothing was written behind the marker?
//! ```
//!
//! That is the usual case. Where somebody is in the way, or the server is not shut, each waits for the one before: nobody is
//! left, the tables are locked, the marker is written, it has arrived, sequences are brought over. What a marker is and what
//! it proves: [`super::marker`].

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::time::timeout_at;
use tokio_postgres::types::Type;

use super::CutoverError;
use super::hard_fence::{self, Looking, Obstacle, Shutting};
use super::marker::Marker;
use super::parts::Lease;
use super::work::{Line, LineSessions, Unmoved, Work};
use crate::config::{Ddl, FencePolicy, Reads, Stragglers};
use crate::failpoint::Failpoints;
use crate::migration::standstill::Broken;
use crate::migration::unstreamed::{self, Carried};
use crate::postgres::Control;
use crate::proxy::{MoveReport, SessionState, SessionView};
use crate::sqlstate;

/// Between two looks at the server.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Locks on tables are not waited for any longer while it is still being looked who might hold others.
const LOCKS_AT_ONCE: Duration = Duration::from_millis(50);

/// What the drain leaves: nobody can write any more, and this stands behind everything that was written.
#[derive(Debug)]
pub(super) struct LastWord {
    marker: Marker,
    sequences: Sequences,
}

/// Whether sequences stand on the other server where they stand here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sequences {
    /// They do.
    Brought,
    /// They are brought over when everything has arrived.
    Due,
}

impl Work {
    /// Waits until nobody is inside and nobody works on the server; after `drain_timeout` the policy decides. Then nobody can
    /// write any more, and a marker stands behind everything that was written.
    pub(super) async fn drain_sessions(&mut self) -> Result<LastWord, CutoverError> {
        let begun = Instant::now();
        let deadline = begun + self.options.drain_timeout;
        let (waits, since) = match self.options.reads {
            Reads::Pause => ("running transactions end", self.timings.closed()),
            Reads::Continue => ("the last reads end", begun),
        };
        if timeout_at(deadline.into(), self.wait_empty()).await.is_ok() {
            self.timings.step(waits, since);
            self.end_replication().await?;
            self.failpoint("drain.after_sessions").await?;
            if let Some(drained) = self.secure_at_once().await? {
                return Ok(drained);
            }
            let since = Instant::now();
            if timeout_at(deadline.into(), self.wait_quiet()).await.is_ok_and(|quiet| quiet.is_ok()) {
                self.timings.step("nothing is left on the server", since);
                return self.secure().await;
            }
        }
        self.judge_stragglers().await?;
        // Ordered is not ended: only the proof counts. max_pause bounds this wait.
        self.wait_quiet().await?;
        self.end_replication().await?;
        self.failpoint("drain.after_sessions").await?;
        self.secure().await
    }

    /// With nobody inside, behind a hard fence: all that is to be done on the server that is left, at the same time. None:
    /// somebody is in the way, nothing is locked, and it is to be done one after the other.
    async fn secure_at_once(&mut self) -> Result<Option<LastWord>, CutoverError> {
        if self.options.fence != FencePolicy::Hard || self.options.dry_run {
            return Ok(None);
        }
        let since = Instant::now();
        // Where definitions are applied, one that is still on its way may make a sequence or set it.
        let sequences = if self.options.ddl == Ddl::Apply { Sequences::Due } else { Sequences::Brought };
        let look = async { (matches!(self.is_quiet().await, Ok(true)), since.elapsed()) };
        let lock = async { (self.lock_tables(LOCKS_AT_ONCE).await, since.elapsed()) };
        let mark = async { (self.write_marker("").await, since.elapsed()) };
        let bring = async {
            let brought = if sequences == Sequences::Brought { self.bring_moved_sequences().await } else { Ok(()) };
            (brought, since.elapsed())
        };
        let ((is_quiet, looked), (locked, locking), (marker, marking), (brought, bringing)) = match self.shutting {
            // Who is not found now cannot have taken a number behind the reading.
            Shutting::Everybody => {
                let look_then_bring = async {
                    let looked = look.await;
                    let brought = if looked.0 { bring.await } else { (Ok(()), looked.1) };
                    (looked, brought)
                };
                let (marked, (looked, brought), locked) = tokio::join!(mark, look_then_bring, lock);
                (looked, locked, marked, brought)
            }
            // A superuser may come in even now: only behind the locks can no row take a number that is not brought over.
            Shutting::AllButSuperusers => {
                let (marked, looked, locked) = tokio::join!(mark, look, lock);
                (looked, locked, marked, bring.await)
            }
        };
        let (true, Ok(notes), Ok(marker), Ok(())) = (is_quiet, locked, marker, brought) else {
            self.release_tables().await?;
            return Ok(None);
        };
        self.notes.extend(notes);
        self.timings.took("marker is written", marking);
        self.timings.took("nothing is left on the server", looked);
        self.timings.took("tables are locked", locking);
        if sequences == Sequences::Brought {
            self.timings.took("sequences are brought over", bringing);
        }
        let since = Instant::now();
        let is_last = self.is_last(&marker).await?;
        self.timings.step("nothing was written behind the marker", since);
        let marker = if is_last { marker } else { self.write_last_marker().await? };
        Ok(Some(LastWord { marker, sequences }))
    }

    /// Locks the tables and writes the marker behind everything, with nobody left on the server.
    async fn secure(&mut self) -> Result<LastWord, CutoverError> {
        if !self.options.dry_run {
            let since = Instant::now();
            let notes = self.lock_tables(self.options.drain_timeout).await?;
            self.notes.extend(notes);
            self.timings.step("tables are locked", since);
        }
        Ok(LastWord { marker: self.write_last_marker().await?, sequences: Sequences::Due })
    }

    async fn write_last_marker(&mut self) -> Result<Marker, CutoverError> {
        let since = Instant::now();
        let marker = self.write_marker("").await?;
        self.timings.step("marker is written, with nobody left", since);
        Ok(marker)
    }

    /// The drain while reads go on (`reads = "continue"`): who may write is waited for, and what was written arrives. From
    /// then on reads are held as well, so that [`Work::drain_sessions`] finds a target that is close behind. It is the one
    /// that counts: nothing that a "read" has written meanwhile is missed by it.
    pub(super) async fn drain_writers(&mut self) -> Result<(), CutoverError> {
        let deadline = Instant::now() + self.options.drain_timeout;
        let closed = self.timings.closed();
        if !timeout_at(deadline.into(), self.wait_writers()).await.is_ok_and(|left| left.is_ok()) {
            self.judge_stragglers().await?;
            self.wait_writers().await?;
        }
        self.timings.step("running transactions end, but for reads", closed);
        let since = Instant::now();
        let marker = self.write_marker("-reads").await?;
        wait_applied(&*self.lease, &self.case.databases, &marker.nonce, &self.failpoints).await?;
        self.timings.step("what they wrote has arrived, while reads go on", since);
        self.lines.iter().for_each(|line| line.gate.fence_reads());
        Ok(())
    }

    /// Like [`Work::wait_quiet`], but does not wait for reads that go on.
    async fn wait_writers(&self) -> Result<(), CutoverError> {
        for line in &self.lines {
            line.gate.wait_writers().await;
        }
        self.wait_nothing_left().await
    }

    /// `drain_timeout` is over: by policy, those who are in the way are ended or the cutover is.
    async fn judge_stragglers(&mut self) -> Result<(), CutoverError> {
        let blockers = self.blockers().await?;
        match self.options.stragglers {
            // A dry run ends nobody, whatever the policy.
            Stragglers::Terminate if !self.options.dry_run => self.end_stragglers(&blockers).await,
            Stragglers::Abort | Stragglers::Terminate => {
                let waited = self.options.drain_timeout;
                let what = format!("transactions did not end within drain_timeout of {waited:?}");
                Err(CutoverError::Blocked { what, obstacles: blockers })
            }
        }
    }

    /// Replication connections through the proxy to the server that is left.
    pub(super) fn replicating(&self) -> Vec<SessionView> {
        let mut all: Vec<_> = self.lines.iter().flat_map(|line| self.sessions.replicating(&line.name)).collect();
        all.retain(|session| session.server == Some(self.from.role));
        all
    }

    /// Ends replication connections and waits for the proof. They are outside the gates, and those that name a database
    /// take SQL as well: one could take a number of a sequence behind its reading. The switch would end them anyhow.
    /// With the gates empty none can come. A dry run ends nobody. max_pause bounds the wait.
    async fn end_replication(&mut self) -> Result<(), CutoverError> {
        let (replicating, since) = (self.replicating(), Instant::now());
        if replicating.is_empty() || self.options.dry_run {
            return Ok(());
        }
        let sessions: Vec<u64> = replicating.iter().map(|session| session.id).collect();
        let pids: Vec<i32> = replicating.iter().filter_map(|session| session.backend_pid).collect();
        let told = "terminating replication connection: the database is moving to another server";
        self.sessions.end(&sessions, sqlstate::ADMIN_SHUTDOWN, told);
        for pid in &pids {
            // Where the client does not read its last words, this is quicker than the session's end.
            if let Err(error) = hard_fence::terminate(&self.from.control, *pid).await {
                tracing::info!(pid, %error, "a replication connection is ended by the proxy alone");
            }
        }
        while self.is_one_there(&pids).await? {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        self.sessions_ended += pids.len() as u64;
        self.timings.step("replication connections end", since);
        Ok(())
    }

    async fn is_one_there(&self, pids: &[i32]) -> Result<bool, CutoverError> {
        let row = self
            .from
            .control
            .query_typed_one(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity(NULL) WHERE pid = ANY($1))",
                &[(&pids, Type::INT4_ARRAY)],
            )
            .await
            .map_err(|source| CutoverError::query("look for replication connections", source))?;
        Ok(row.get(0))
    }

    /// Waits until everybody has left the gates.
    async fn wait_empty(&self) {
        for line in &self.lines {
            line.gate.wait_empty().await;
        }
    }

    /// The same, and until nothing is left on the server that the gates know nothing of. Prepared transactions are, and who
    /// would end them is held: so they are let in for that.
    async fn wait_quiet(&self) -> Result<(), CutoverError> {
        loop {
            self.wait_empty().await;
            if self.is_quiet().await? {
                return Ok(());
            }
            if self.prepared_transactions().await?.is_empty() {
                tokio::time::sleep(LOOK_AGAIN).await;
            } else {
                self.let_finish().await?;
            }
        }
    }

    /// Lets in who ends a prepared transaction, until there is none. Whoever has come in is waited for by the caller.
    async fn let_finish(&self) -> Result<(), CutoverError> {
        /// However it ends: `drain_timeout` drops this in the middle.
        struct Finishing<'a>(&'a [Line]);
        impl Drop for Finishing<'_> {
            fn drop(&mut self) {
                self.0.iter().for_each(|line| line.gate.fence_reads());
            }
        }
        let _until_dropped = Finishing(&self.lines);
        self.lines.iter().for_each(|line| line.gate.let_finish());
        while !self.prepared_transactions().await?.is_empty() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    async fn wait_nothing_left(&self) -> Result<(), CutoverError> {
        while !self.is_quiet().await? {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// Whether nothing is left on the server, as of now.
    async fn is_quiet(&self) -> Result<bool, CutoverError> {
        let looking = if self.options.dry_run { Looking::LeftOverOfSessions } else { Looking::LeftOver };
        let (left, prepared) = tokio::try_join!(self.backends(looking), self.prepared_transactions())?;
        Ok(left.is_empty() && prepared.is_empty())
    }

    /// Backends that are at work, or have written and not committed.
    async fn busy(&self) -> Result<Vec<Obstacle>, CutoverError> {
        let looking = if self.options.dry_run { Looking::WorkOfSessions } else { Looking::Work };
        self.backends(looking).await
    }

    async fn backends(&self, looking: Looking) -> Result<Vec<Obstacle>, CutoverError> {
        hard_fence::backends(&self.from.control, &self.case.databases, &self.known(), looking).await
    }

    async fn prepared_transactions(&self) -> Result<Vec<Obstacle>, CutoverError> {
        let rows = self
            .from
            .control
            .query_typed(
                "SELECT d.datname, gid, extract(epoch FROM clock_timestamp() - prepared)::float8
                 FROM pg_catalog.pg_prepared_xact() p JOIN pg_catalog.pg_database d ON d.oid = p.dbid
                 WHERE d.datname = ANY($1)",
                &[(&self.case.databases, Type::TEXT_ARRAY)],
            )
            .await
            .map_err(|source| CutoverError::query("look for prepared transactions", source))?;
        let obstacle = |row: &tokio_postgres::Row| Obstacle {
            pid: 0,
            database: row.get(0),
            application_name: String::new(),
            doing: format!("transaction prepared as {:?}: COMMIT PREPARED or ROLLBACK PREPARED", row.get::<_, &str>(1)),
            age_seconds: row.get(2),
        };
        Ok(rows.iter().map(obstacle).collect())
    }

    /// Who keeps the drain from ending: what the server shows, and sessions that are inside without the server knowing.
    async fn blockers(&self) -> Result<Vec<Obstacle>, CutoverError> {
        let mut blockers = self.busy().await?;
        if self.lines.iter().any(|line| line.gate.lets_reads_in()) {
            // Sessions that read may be at work when the server is asked, and they are not in the way.
            let waited: Vec<SessionView> = self.lines.iter().flat_map(|line| self.stragglers(line)).collect();
            let ours = self.known().pids;
            let is_waited = |pid: i32| waited.iter().any(|session| session.backend_pid == Some(pid));
            blockers.retain(|blocker| !ours.contains(&blocker.pid) || is_waited(blocker.pid));
        }
        blockers.extend(self.prepared_transactions().await?);
        for line in &self.lines {
            for straggler in self.stragglers(line) {
                let pid = straggler.backend_pid.unwrap_or(0);
                if pid == 0 || !blockers.iter().any(|blocker| blocker.pid == pid) {
                    blockers.push(Obstacle {
                        pid,
                        database: line.name.clone(),
                        application_name: straggler.application_name,
                        doing: format!("session {} has not been answered", straggler.client_pid),
                        age_seconds: straggler.for_time.as_secs_f64(),
                    });
                }
            }
        }
        Ok(blockers)
    }

    /// Sessions that are waited for.
    fn stragglers(&self, line: &Line) -> Vec<SessionView> {
        let mut stragglers = self.sessions.stragglers(&line.name);
        stragglers.retain(|session| !goes_on(line, session));
        stragglers
    }

    /// Tells stragglers that they are ended, and ends their backends.
    async fn end_stragglers(&mut self, blockers: &[Obstacle]) -> Result<(), CutoverError> {
        let mut ended = std::collections::HashSet::new();
        for line in &self.lines {
            let stragglers = self.stragglers(line);
            let sessions: Vec<u64> = stragglers.iter().map(|straggler| straggler.id).collect();
            self.sessions.end(
                &sessions,
                sqlstate::ADMIN_SHUTDOWN,
                "ended by an operator's order: the database is moving",
            );
            ended.extend(stragglers.iter().filter_map(|straggler| straggler.backend_pid));
        }
        ended.extend(blockers.iter().map(|blocker| blocker.pid));
        ended.remove(&0);
        for pid in &ended {
            hard_fence::terminate(&self.from.control, *pid).await?;
        }
        self.sessions_ended += ended.len() as u64;
        Ok(())
    }

    /// Takes our own lock on every migrated table, kept until the decision: whoever got round the fence waits here.
    /// A dry run takes none, because it must not keep anybody waiting but the proxy's own sessions. Waits at most `wait`
    /// for each. Returns what the operator should know.
    async fn lock_tables(&self, wait: Duration) -> Result<Vec<String>, CutoverError> {
        let shares = self.lines.iter().flat_map(|line| Some((line, line.sessions.as_ref()?.lock_shares())));
        let taken = shares.flat_map(|(line, shares)| {
            shares.map(move |(session, tables)| self.lock_share(&line.name, session, tables, wait))
        });
        Ok(try_join_all(taken).await?.into_iter().flatten().collect())
    }

    /// Lets go of all tables again.
    async fn release_tables(&self) -> Result<(), CutoverError> {
        let sessions = self.lines.iter().filter_map(|line| line.sessions.as_ref());
        let released = sessions.flat_map(|sessions| &sessions.locks).map(|locks| locks.batch_execute("ROLLBACK"));
        try_join_all(released).await.map_err(|source| CutoverError::query("release the tables", source))?;
        Ok(())
    }

    async fn lock_share(
        &self,
        database: &str,
        session: &Control,
        tables: &[String],
        wait: Duration,
    ) -> Result<Option<String>, CutoverError> {
        // ONLY: partitions are published, and so locked, by themselves.
        let wait = wait.as_millis().max(1);
        let script = format!(
            "BEGIN; SET LOCAL lock_timeout = {wait}; LOCK TABLE ONLY {} IN EXCLUSIVE MODE",
            tables.join(", ONLY ")
        );
        let Err(error) = session.batch_execute(&script).await else { return Ok(None) };
        let code = error.code().map_or("", |code| code.code());
        match code {
            // 53200: more tables than the lock table holds. The hard fence has proven already that nobody is there.
            sqlstate::INSUFFICIENT_PRIVILEGE | "53200" if self.options.fence == FencePolicy::Hard => {
                session.batch_execute("ROLLBACK").await.map_err(|source| CutoverError::query("roll back", source))?;
                Ok(Some(format!("tables of {database:?} were not locked: {}", super::explain(&error))))
            }
            sqlstate::LOCK_NOT_AVAILABLE => {
                let what = format!("the tables of {database:?} could not be locked within drain_timeout");
                Err(CutoverError::Blocked { what, obstacles: self.blockers().await? })
            }
            _ => Err(CutoverError::query("lock the migrated tables", error)),
        }
    }

    /// Waits until every database has durably applied its marker. Meanwhile held sessions bring their other backend up to
    /// date, and it is looked whether definitions were changed and large objects made: nobody writes any more, and none needs
    /// the other. Sessions that cannot are ended or stop the cutover. Then come the sequences that could not be brought over
    /// before.
    pub(super) async fn arrive(&mut self, last: LastWord, deadline: Instant) -> Result<(), CutoverError> {
        let LastWord { marker: Marker { nonce, .. }, sequences } = last;
        // Half of what is left of the pause, so that a session which does not answer is named, not max_pause.
        let since = Instant::now();
        let in_time = since + deadline.saturating_duration_since(since) / 2;
        let (sessions, lease, failpoints) = (self.sessions.clone(), self.lease.clone(), self.failpoints.clone());
        let databases = self.case.databases.clone();
        let settled = async { Ok((sessions.settle_moves(&databases, in_time).await, since.elapsed())) };
        let applied = async {
            wait_applied(&*lease, &databases, &nonce, &failpoints).await?;
            Ok::<_, CutoverError>(since.elapsed())
        };
        let ((reports, settled), applied, (), first_large_objects) =
            tokio::try_join!(settled, applied, self.stands_still(), self.first_large_objects())?;
        for (line, are_there) in self.lines.iter_mut().zip(first_large_objects) {
            line.sessions.iter_mut().for_each(|sessions| sessions.first_large_objects = are_there);
        }
        self.timings.took("sessions are up to date", settled);
        self.timings.took("everything has arrived", applied);
        self.judge_moves(&reports)?;
        if sequences == Sequences::Due {
            let since = Instant::now();
            self.bring_sequences().await?;
            self.timings.step("sequences are brought over", since);
        }
        Ok(())
    }

    /// Whether the definitions are still those that were compared, and tables that no stream carries empty, now that nobody
    /// can change that.
    async fn stands_still(&self) -> Result<(), CutoverError> {
        if self.options.dry_run && self.options.ddl == Ddl::Apply {
            // Nothing keeps commands from being carried over while it runs.
            return Ok(());
        }
        let look = async |line: &Line| {
            let Some(sessions) = &line.sessions else { return Ok(()) };
            let broken = sessions.standstill.broken(&sessions.marker).await;
            let broken = broken.map_err(|source| CutoverError::query("look at definitions once more", source))?;
            let (name, role) = (&line.name, self.from.role);
            match broken {
                None => Ok(()),
                Some(Broken::Definitions) => Err(CutoverError::Definitions(format!(
                    "definitions of database {name:?} were changed, or rights on them, on the {role} while the cutover was \
                     being prepared, behind their comparison"
                ))),
                Some(Broken::Rights) => Err(CutoverError::Definitions(format!(
                    "roles, their passwords, memberships or settings, or rights on database {name:?} were changed on the {role} \
                     while the cutover was being prepared, behind the moment in which they were brought over: give the order \
                     again"
                ))),
                Some(Broken::Rows(tables)) => Err(CutoverError::Definitions(format!(
                    "rows of {} in database {name:?} were written on the {role} while the cutover was being prepared; these \
                     tables were made since the migration began, and are in no stream",
                    tables.join(", ")
                ))),
            }
        };
        try_join_all(self.lines.iter().map(look)).await.map(drop)
    }

    /// For each database, whether there are large objects now and there was nothing to carry when prepare looked.
    async fn first_large_objects(&self) -> Result<Vec<bool>, CutoverError> {
        let look = async |line: &Line| match &line.sessions {
            Some(LineSessions { unstreamed: None, marker, .. }) => unstreamed::has_large_objects(marker).await,
            Some(_) | None => Ok(false),
        };
        Ok(try_join_all(self.lines.iter().map(look)).await?)
    }

    /// Unlogged tables and large objects, now that nobody writes.
    pub(super) async fn carry_unstreamed(&mut self) -> Result<(), CutoverError> {
        for line in &self.lines {
            let Some(sessions) = &line.sessions else { continue };
            let (from, to) = match &sessions.unstreamed {
                Some((from, to)) => (from, to),
                // The server is shut: these two are what there is.
                None if sessions.first_large_objects => (&sessions.marker, &sessions.onward),
                None => continue,
            };
            let Carried { tables, large_objects } = unstreamed::bring_over(from, to).await?;
            if tables + large_objects > 0 {
                let name = &line.name;
                self.notes.push(format!(
                    "carried inside the pause for {name:?}: {tables} unlogged tables, {large_objects} large objects"
                ));
            }
        }
        Ok(())
    }

    /// What becomes of sessions that cannot be moved.
    fn judge_moves(&mut self, reports: &[MoveReport]) -> Result<(), CutoverError> {
        let Unmoved { busy, mut stuck } = self.take_moves(reports);
        stuck.extend(busy);
        let sessions: Vec<u64> = stuck.iter().map(|session| session.id).collect();
        self.check_moves(stuck)?;
        if !sessions.is_empty() && !self.options.dry_run {
            self.sessions.end(&sessions, sqlstate::ADMIN_SHUTDOWN, "this session cannot be moved to the new server");
            self.sessions_ended += sessions.len() as u64;
        }
        Ok(())
    }
}

/// Waits until every database has durably applied the marker.
async fn wait_applied(
    lease: &dyn Lease,
    databases: &[String],
    nonce: &str,
    failpoints: &Failpoints,
) -> Result<(), CutoverError> {
    // Tests show with it that their checker finds what a drain that does not wait would lose.
    if failpoints.skips("drain.wait_applied") {
        return Ok(());
    }
    let waits = databases.iter().map(|database| lease.wait_marker(database, nonce));
    try_join_all(waits).await.map(drop).map_err(CutoverError::Engine)
}

/// Whether a session that is inside need not leave yet.
fn goes_on(line: &Line, session: &SessionView) -> bool {
    session.state == SessionState::Reading && line.gate.lets_reads_in()
}
