//! Watches the server that a cutover has left: whoever gets past the fence and writes there is found, counted, shown and
//! reported. It never applies anything, and never holds what it looks after: the fence stands without it.
//!
//! It reads the slot of the stream that ended ([`crate::catalog::watches`]), from where that stream stood, through a
//! session that the cutover has opened beforehand, later through the fence's door. What it has looked at is confirmed all
//! the time, so the server keeps no write-ahead log for it; if that fails for so long that `max_retained_wal` is reached,
//! the watch is given up and says so. What was found is durable before it is confirmed, and what was not looked at for a
//! while, because a server or this program was down, is looked at afterwards.
//!
//! ```text
//! fenced server   … 0/1B000 stranger   0/1C000 our applier   0/1D000 boundary of cutover 2   0/1E000 the application
//! watch           counted, kept        passed over           waits for the verdict: aborted → goes on
//!                                                                                   decided → the watch has moved
//! ```

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use super::context::Context;
use super::error::WorkError;
use super::gauges::Gauges;
use super::live::{DatabaseLive, Looking};
use crate::catalog::door::{Door, DoorError};
use crate::catalog::progress;
use crate::catalog::streams::{Direction, progress_key};
use crate::catalog::watches::{FencedWrite, Watch, WriteKind};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::backoff::Backoff;
use crate::migration::fenced_writes::{Changes, Sieve, Whose};
use crate::migration::publication;
use crate::migration::state::State;
use crate::migration::stream::describe;
use crate::migration::wal_limit::{SlotWal, Verdict, judge};
use crate::pgoutput::{DecodeError, Timestamp};
use crate::postgres::walsender::{ReplicationConnection, ReplicationMessage, WalsenderError};
use crate::postgres::{Connector, Control};

/// How often what was found is made durable, and what was looked at is confirmed.
const KEEP: Duration = Duration::from_millis(500);

/// How often it is looked how much the server keeps for the watch.
const GUARD: Duration = Duration::from_secs(5);

/// How often it is asked what became of a cutover.
const ASK: Duration = Duration::from_millis(100);

/// Waits for a walsender of ours that has lost its client to let go of the slot.
const RELEASES: u32 = 50;

/// Why nobody looks at the moment.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error(transparent)]
    Work(#[from] WorkError),
    #[error(transparent)]
    Walsender(#[from] WalsenderError),
    #[error("what the fenced server sends cannot be read")]
    Decode(#[from] DecodeError),
    #[error("where the watch begins is not known: the stream that ended has left no progress")]
    NoBeginning,
    #[error("the watch has moved on meanwhile")]
    Moved,
}

impl From<DoorError> for WatchError {
    fn from(error: DoorError) -> Self {
        Self::Work(error.into())
    }
}

fn failed(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> WatchError {
    move |source| WatchError::Work(WorkError::Query { doing, source })
}

/// Watches whatever is to be watched of a migration, as long as it is polled.
pub(super) async fn watch(context: Arc<Context>) {
    let each: Vec<FenceWatch<'_>> =
        context.live.databases.iter().map(|live| FenceWatch { context: &context, live }).collect();
    futures_util::future::join_all(each.iter().map(FenceWatch::run)).await;
}

/// Gives a watch up, and drops its slot on `server`. Does nothing where there is none.
pub(super) async fn end(
    context: &Context,
    live: &DatabaseLive,
    server: &Connector,
    why: &str,
) -> Result<(), WorkError> {
    let Some(mut watch) = live.fenced.watch.borrow().clone() else { return Ok(()) };
    context.catalog.end_watch(context.live.name(), &live.name, why).await?;
    let slot = watch.slot.clone();
    watch.ended = Some(why.to_owned());
    live.fenced.set_watch(Some(watch));
    let control = server.control(&context.config.control.database, "fence-watch").await?;
    publication::drop_slot(&control, &slot).await?;
    tracing::warn!(
        migration = context.live.name(),
        database = live.name,
        server = server.label(),
        why,
        "writes on the fenced server are not watched any more"
    );
    Ok(())
}

struct FenceWatch<'a> {
    context: &'a Context,
    live: &'a DatabaseLive,
}

impl FenceWatch<'_> {
    /// Looks at what is to be watched now, and at something else as soon as that is.
    async fn run(&self) {
        let mut watched = self.live.fenced.watch.subscribe();
        loop {
            let watch = watched.borrow_and_update().clone();
            // What was being looked at is looked at again from where it was kept.
            let why = tokio::select! {
                changed = watched.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    continue;
                }
                why = self.over(watch.as_ref()) => why,
            };
            // Not beside the wait for a change: that it has ended is one, and its slot would stay.
            self.give_up(watch.as_ref(), &why).await;
        }
    }

    /// Resolves with the reason once the watch must not go on.
    async fn over(&self, watch: Option<&Watch>) -> String {
        let Some(watch) = watch else {
            self.show(None);
            return std::future::pending().await;
        };
        if let Some(why) = &watch.ended {
            self.show(Some(Looking::No(why.clone())));
            return std::future::pending().await;
        }
        let retained = tokio::select! {
            never = self.patiently(watch) => match never {},
            retained = self.guard(watch) => retained,
        };
        format!(
            "the {} kept {} MB of write-ahead log for it (migration.max_retained_wal)",
            self.label(),
            retained >> 20
        )
    }

    /// Tries until the slot is gone, or something else is to be watched. For one that stays, all WAL is kept.
    async fn give_up(&self, watch: Option<&Watch>, why: &str) {
        let slot = watch.map(|watch| watch.slot.clone());
        while self.live.fenced.watched_slot() == slot {
            let Err(error) = end(self.context, self.live, self.server(), why).await else { return };
            self.show(Some(Looking::No(describe(&error))));
            tokio::time::sleep(GUARD).await;
        }
    }

    async fn patiently(&self, watch: &Watch) -> Infallible {
        let mut backoff = Backoff::of_stream();
        loop {
            let Err(error) = Box::pin(self.follow(watch, &mut backoff)).await;
            let (retries, wait) = backoff.failed();
            let error = describe(&error);
            tracing::debug!(
                migration = self.context.live.name(),
                database = self.live.name,
                retries,
                error,
                "the fenced server is not watched for now"
            );
            self.show(Some(Looking::No(error)));
            tokio::time::sleep(wait).await;
        }
    }

    /// Which way the changes flow while this watch is kept.
    fn direction(&self) -> Direction {
        self.live.current().direction
    }

    /// The server that was left, and the one that is in use.
    fn servers(&self) -> (&Connector, &Connector) {
        let (in_use, left) = self.direction().ends(&self.context.source, &self.context.target);
        (left, in_use)
    }

    fn server(&self) -> &Connector {
        self.servers().0
    }

    fn label(&self) -> &str {
        self.server().label()
    }

    fn show(&self, looking: Option<Looking>) {
        let gauges = self.gauges();
        let total = self.live.fenced.found.borrow().iter().map(|one| one.changes).sum();
        gauges.fence(looking.as_ref().map(|looking| *looking == Looking::Yes), total);
        self.live.fenced.looking.send_replace(looking);
    }

    fn gauges(&self) -> Gauges<'_> {
        let (metrics, migration) = (&*self.context.metrics, self.context.live.name());
        Gauges { metrics, migration, database: &self.live.name, direction: self.direction() }
    }

    async fn follow(&self, watch: &Watch, backoff: &mut Backoff) -> Result<Infallible, WatchError> {
        let (context, database) = (self.context, &self.live.name);
        let (left, in_use) = self.servers();
        let control_database = &context.config.control.database;
        let control = left.control(control_database, "fence-watch").await.map_err(WorkError::from)?;
        let position = self.position(watch, in_use).await?;
        release(&control, &watch.slot).await?;
        let replication = match self.live.fenced.reserve.take(watch.epoch) {
            Some(open) => open,
            None => {
                let connect =
                    async { Ok::<_, WatchError>(Box::pin(ReplicationConnection::connect(left, database)).await?) };
                Door::new(left, control_database, database, &self.live.turns).through(connect).await?
            }
        };
        drop(control);
        let mut stream = replication.start(&watch.slot, position, &watch.publication, 1).await?;
        context.failpoints.hit("watch.after_start").await.map_err(WorkError::from)?;
        tracing::info!(
            migration = context.live.name(),
            database,
            server = left.label(),
            slot = watch.slot,
            from = %position,
            "writes on the fenced server are watched"
        );
        backoff.progressed();
        self.show(Some(Looking::Yes));
        let feedback = stream.feedback();
        let (mut sieve, mut found) = (Sieve::default(), Found::default());
        let (mut looked, mut confirmed) = (position, position);
        let mut keep = tokio::time::interval(KEEP);
        loop {
            // A message that is not taken is taken next time, and so is the beat of a clock.
            let message = tokio::select! {
                message = stream.next() => message?,
                _ = keep.tick() => {
                    self.keep(watch, &mut found, looked).await?;
                    if looked > confirmed {
                        feedback.send_status(looked, looked, looked);
                        confirmed = looked;
                    }
                    continue;
                }
            };
            let ended = match message {
                ReplicationMessage::XLogData { data, .. } => sieve.take(&data)?,
                ReplicationMessage::Keepalive { end, .. } => {
                    if !sieve.in_transaction() {
                        looked = looked.max(end);
                    }
                    None
                }
            };
            let Some(ended) = ended else { continue };
            match ended.whose {
                Whose::Boundary(epoch) if epoch > watch.epoch => {
                    self.keep(watch, &mut found, looked).await?;
                    self.verdict().await;
                }
                Whose::Ours | Whose::Boundary(_) => {}
                Whose::Strangers(changes) => found.add(changes, ended.at),
            }
            looked = ended.end_lsn;
        }
    }

    /// Where to look on: behind what was kept last, or behind what the stream that ended had applied.
    async fn position(&self, watch: &Watch, in_use: &Connector) -> Result<Lsn, WatchError> {
        let (catalog, migration) = (&self.context.catalog, self.context.live.name());
        let rows = catalog.databases(migration).await.map_err(WorkError::from)?;
        let row = rows.into_iter().find(|row| row.database == self.live.name);
        let stored =
            row.and_then(|row| row.watch).filter(|stored| stored.slot == watch.slot).ok_or(WatchError::Moved)?;
        if let Some(position) = stored.position {
            return Ok(position);
        }
        let control = in_use.control(&self.live.name, "fence-watch").await.map_err(WorkError::from)?;
        let applied =
            progress::read(&*control, &progress_key(migration, watch.stream)).await.map_err(WorkError::from)?;
        applied.map(|applied| applied.end_lsn).ok_or(WatchError::NoBeginning)
    }

    /// Makes durable what was found before `looked`, then shows it.
    async fn keep(&self, watch: &Watch, found: &mut Found, looked: Lsn) -> Result<(), WatchError> {
        if found.0.is_empty() {
            return Ok(());
        }
        let (catalog, migration, database) = (&self.context.catalog, self.context.live.name(), &self.live.name);
        let server = self.direction().to();
        let writes: Vec<FencedWrite> = std::mem::take(found)
            .0
            .into_iter()
            .map(|((table, kind), (changes, first, last))| FencedWrite {
                epoch: watch.epoch,
                server,
                table: (*table).clone(),
                kind: kind.as_str().to_owned(),
                changes,
                first_at: seconds(first),
                last_at: seconds(last),
            })
            .collect();
        self.context.failpoints.hit("watch.before_keep").await.map_err(WorkError::from)?;
        let added = catalog.add_fenced_writes(migration, database, watch, &writes, looked).await;
        self.context.failpoints.hit("watch.after_keep").await.map_err(WorkError::from)?;
        if !added.map_err(WorkError::from)? {
            return Err(WatchError::Moved);
        }
        let all = catalog.fenced_writes(migration, database).await.map_err(WorkError::from)?;
        let before = self.live.fenced.found.send_replace(all);
        let known = |one: &FencedWrite| {
            before.iter().any(|known| (known.epoch, &known.table, &known.kind) == (one.epoch, &one.table, &one.kind))
        };
        for FencedWrite { table, kind, changes, .. } in writes.iter().filter(|one| !known(one)) {
            tracing::error!(
                migration,
                database,
                %server,
                %table,
                kind,
                changes,
                "somebody writes on the fenced server, past the fence: the server in use does not have it"
            );
        }
        self.show(Some(Looking::Yes));
        Ok(())
    }

    /// Resolves once the cutover that leads to this server was aborted. Once it is decided, something else is watched.
    async fn verdict(&self) {
        let direction = self.direction();
        loop {
            let state = self.context.live.state();
            if !matches!(state, State::CompletingMigration | State::RollingBack) && state.direction() == direction {
                return;
            }
            tokio::time::sleep(ASK).await;
        }
    }

    /// Resolves with how much the server keeps for the watch, once that is too much.
    async fn guard(&self, watch: &Watch) -> u64 {
        let mut connection = None;
        let mut warned = false;
        loop {
            match self.kept(watch, &mut connection).await {
                Ok(wal) => match judge(wal, self.context.config.migration.max_retained_wal_bytes) {
                    Verdict::Exceeded => return wal.retained,
                    Verdict::Warning if !warned => {
                        warned = true;
                        let (migration, server, retained) = (self.context.live.name(), self.label(), wal.retained);
                        tracing::warn!(
                            migration,
                            server,
                            retained,
                            "much write-ahead log is kept for the watch over the fence"
                        );
                    }
                    Verdict::Warning | Verdict::Fine => {}
                },
                Err(error) => {
                    connection = None;
                    tracing::debug!(error = describe(&error), "what the fenced server keeps could not be looked at");
                }
            }
            tokio::time::sleep(GUARD).await;
        }
    }

    async fn kept(&self, watch: &Watch, connection: &mut Option<Control>) -> Result<SlotWal, WatchError> {
        let server = match connection {
            Some(server) => server,
            None => {
                let opened = self.server().control(&self.context.config.control.database, "fence-watch").await;
                connection.insert(opened.map_err(WorkError::from)?)
            }
        };
        let row = server
            .query_opt(
                "SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), s.restart_lsn)::bigint,
                        (pg_catalog.to_jsonb(s) ->> 'safe_wal_size')::bigint
                   FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = $1",
                &[&watch.slot],
            )
            .await
            .map_err(failed("looking at what the fenced server keeps"))?;
        let bytes = |column| row.as_ref().and_then(|row| row.get::<_, Option<i64>>(column));
        let unsigned = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        Ok(SlotWal { retained: bytes(0).map_or(0, unsigned), safe: bytes(1).map(unsigned) })
    }
}

/// The slot must be there and usable. A walsender of ours whose client is gone is ended and waited for.
async fn release(control: &Control, slot: &str) -> Result<(), WatchError> {
    for _ in 0..RELEASES {
        let row = control
            .query_opt(
                "SELECT s.active_pid IS NOT NULL, coalesce(pg_catalog.to_jsonb(s) ->> 'wal_status', ''),
                        (SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
                          WHERE a.pid = s.active_pid AND a.application_name LIKE 'pgcutover/%')
                   FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = $1",
                &[&slot],
            )
            .await
            .map_err(failed("looking for the slot of the watch"))?;
        let slot = || slot.to_owned();
        let row = row.ok_or_else(|| WalsenderError::SlotMissing { slot: slot() })?;
        if row.get::<_, &str>(1) == "lost" {
            let message = "the server has dropped write-ahead log that it needs".to_owned();
            return Err(WalsenderError::SlotLost { slot: slot(), message }.into());
        }
        if !row.get::<_, bool>(0) {
            return Ok(());
        }
        tokio::time::sleep(ASK).await;
    }
    Err(WalsenderError::SlotInUse { slot: slot.to_owned(), message: "it is not let go of".to_owned() }.into())
}

/// What was found and is not durable yet: rows, first and last commit of each table and kind.
#[derive(Debug, Default)]
struct Found(BTreeMap<(Arc<QualifiedName>, WriteKind), (u64, Timestamp, Timestamp)>);

impl Found {
    fn add(&mut self, changes: Changes, at: Timestamp) {
        for (what, rows) in changes {
            let (sum, first, last) = self.0.entry(what).or_insert((0, at, at));
            (*sum, *first, *last) = (*sum + rows, (*first).min(at), (*last).max(at));
        }
    }
}

/// Seconds since the Unix epoch.
#[expect(clippy::cast_precision_loss, reason = "microseconds of a time are exact for centuries")]
fn seconds(at: Timestamp) -> f64 {
    at.unix_micros() as f64 / 1e6
}
