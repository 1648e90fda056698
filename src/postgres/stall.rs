//! Notices a link that is open and carries nothing: something between us and the server (a proxy, a tunnel, a load
//! balancer) still acknowledges what either side sends, and passes none of it on. The kernel sees nothing wrong with it.
//!
//! Silence alone proves nothing, because a server may work on one statement for hours. So after [`StallWatch::patience`]
//! the server is asked over another connection what the process behind this one does. If it waits for us, and does so
//! still after as long again without a byte, then what it waits for, or what it has answered, lies in between: its
//! process is ended, so that its locks go with it, and whoever waited is told that the link broke. A server that cannot be
//! asked has said nothing, and the waiting goes on.
//!
//! Nor does a server learn over such a link that a connection was closed on our side: its process would keep its locks
//! for ever, and whoever goes on in its place would wait for them. So closed ones are remembered ([`Departed`]) and looked
//! for a while later.

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::{Connector, Control, Stream};

/// What looks are for, in their `application_name`. Nobody looks after those.
const LOOK: &str = "link";

/// Looks try this database first: that of a connection may be shut or gone, and every database shows all processes.
const ANY_DATABASE: &str = "postgres";

/// So often a process that is still there is looked for.
const TRIES: u32 = 20;

/// Looks after one connection of ours, from its login until it is dropped.
#[derive(Debug)]
pub(super) struct StallWatch {
    connector: Connector,
    database: String,
    /// As the server shows it: a process of another connection may get the same number later.
    application_name: String,
    pid: i32,
    patience: Duration,
}

/// What the server says of the process.
enum Doing {
    /// It waits for us, or is gone.
    Waiting,
    /// It works, or waits for something else.
    Working,
    /// The server could not be asked.
    Unknown,
}

impl StallWatch {
    /// None where `stall_timeout` is zero.
    pub(super) fn over(connector: &Connector, database: &str, application_name: &str, pid: i32) -> Option<Self> {
        let patience = connector.server().stall_timeout;
        (!patience.is_zero()).then(|| Self {
            connector: connector.clone(),
            database: database.to_owned(),
            application_name: application_name.to_owned(),
            pid,
            patience,
        })
    }

    /// Waits for `step`, which needs the server to do something, and gives it up with [`io::ErrorKind::TimedOut`] where
    /// the link has stalled. Without a watch it just waits.
    pub(super) async fn wait_for<T>(watch: Option<&Self>, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        match watch {
            // Boxed, because sessions wait here too, and have no watch.
            Some(watch) => Box::pin(watch.wait_in(&mut Silence::default(), step)).await,
            None => step.await,
        }
    }

    /// The same, of a silence that lasts longer than one wait: who waits may turn to something else in between.
    pub(super) async fn wait_in<T>(
        &self,
        silence: &mut Silence,
        step: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let mut step = pin!(step);
        loop {
            let due = *silence.since.get_or_insert_with(Instant::now) + self.patience;
            tokio::select! {
                // What is there is not kept waiting for a look; a look that is dropped has only asked.
                biased;
                done = &mut step => {
                    *silence = Silence::default();
                    return done;
                }
                () = tokio::time::sleep_until(due) => {}
            }
            tokio::select! {
                biased;
                done = &mut step => {
                    *silence = Silence::default();
                    return done;
                }
                has_stalled = silence.looks.look(self) => {
                    if has_stalled {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    silence.since = Some(Instant::now());
                }
            }
        }
    }

    /// Does not look more often than this: a server that has nothing to say is silent for that long.
    pub(super) fn looks_at_most_every(&mut self, period: Duration) {
        self.patience = self.patience.max(period);
    }

    /// A type of its own, because a control session is itself watched by this.
    fn ask(&self, and_end_it: bool) -> BoxFuture<'_, Doing> {
        let asked = async move {
            let control = self.connector.to_look(&self.database).await?;
            let rows = control
                .query(
                    "SELECT a.wait_event_type IN ('Client', 'Activity') FROM pg_catalog.pg_stat_activity a
                     WHERE a.pid = $1 AND a.application_name = $2",
                    &[&self.pid, &self.application_name],
                )
                .await
                .ok()?;
            let waits = rows.first().is_none_or(|row| row.get::<_, Option<bool>>(0) == Some(true));
            if waits && and_end_it {
                tracing::warn!(server = self.connector.label(), pid = self.pid, "the link has stalled and is given up");
                // A number that is another's by now is left alone. If it cannot be ended, the link is given up all the same.
                let _ended = control
                    .execute(
                        "SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
                         WHERE a.pid = $1 AND a.application_name = $2",
                        &[&self.pid, &self.application_name],
                    )
                    .await;
            }
            control.close().await;
            Some(if waits { Doing::Waiting } else { Doing::Working })
        };
        let limit = self.connector.server().connect_timeout;
        Box::pin(async move { tokio::time::timeout(limit, asked).await.ok().flatten().unwrap_or(Doing::Unknown) })
    }
}

impl Drop for StallWatch {
    fn drop(&mut self) {
        let Self { connector, database, application_name, pid, patience } = self;
        if *application_name == connector.instance().application_name(LOOK) {
            return;
        }
        let (database, application_name) = (std::mem::take(database), std::mem::take(application_name));
        connector.departed().note(connector, Gone { database, application_name, pid: *pid, tries: 0 }, *patience);
    }
}

/// Connections to one server that were closed on our side, as far as their processes may still be there.
#[derive(Debug, Default)]
pub(super) struct Departed(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    gone: Vec<Gone>,
    /// Somebody looks for them.
    is_looked_after: bool,
}

#[derive(Debug)]
struct Gone {
    database: String,
    application_name: String,
    pid: i32,
    tries: u32,
}

impl Departed {
    fn note(&self, connector: &Connector, gone: Gone, patience: Duration) {
        let Some(runtime) = connector.runtime() else { return };
        let mut list = self.list();
        list.gone.push(gone);
        if !std::mem::replace(&mut list.is_looked_after, true) {
            runtime.spawn(connector.clone().look_for_departed(patience));
        }
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connector {
    async fn to_look(&self, database: &str) -> Option<Control> {
        for database in [ANY_DATABASE, database] {
            if let Ok(control) = Box::pin(self.control(database, LOOK)).await {
                return Some(control);
            }
        }
        None
    }

    /// Ends, after `patience`, the processes of closed connections that still wait for us, until none is left.
    async fn look_for_departed(self, patience: Duration) {
        loop {
            tokio::time::sleep(patience).await;
            let looked_for = std::mem::take(&mut self.departed().list().gone);
            let limit = self.server().connect_timeout;
            let found = tokio::time::timeout(limit, self.end_departed(&looked_for)).await.ok().flatten();
            let is_left = |gone: &Gone| found.as_ref().is_none_or(|there| there.contains(&gone.pid));
            let left = looked_for.into_iter().filter(|gone| gone.tries < TRIES && is_left(gone));
            let left = left.map(|gone| Gone { tries: gone.tries + 1, ..gone });
            let mut list = self.departed().list();
            list.gone.extend(left);
            if list.gone.is_empty() {
                list.is_looked_after = false;
                return;
            }
        }
    }

    /// Which of them are still there; those that wait for us are told to end. None: the server could not be asked.
    async fn end_departed(&self, gone: &[Gone]) -> Option<Vec<i32>> {
        let database = &gone.first()?.database;
        let control = self.to_look(database).await?;
        let pids: Vec<i32> = gone.iter().map(|gone| gone.pid).collect();
        let names: Vec<&str> = gone.iter().map(|gone| gone.application_name.as_str()).collect();
        let rows = control
            .query(
                "SELECT a.pid, CASE WHEN a.wait_event_type IN ('Client', 'Activity') THEN pg_catalog.pg_terminate_backend(a.pid) END
                 FROM pg_catalog.pg_stat_activity a
                 WHERE (a.pid, a.application_name) IN (SELECT * FROM ROWS FROM (
                     pg_catalog.unnest($1::int[]), pg_catalog.unnest($2::text[])))",
                &[&pids, &names],
            )
            .await
            .ok()?;
        control.close().await;
        Some(rows.iter().map(|row| row.get(0)).collect())
    }
}

/// How long nothing has come, and what looks have found meanwhile.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// Its beginning, or the last look.
    since: Option<Instant>,
    looks: Looks,
}

/// Looks that follow one another while nothing comes.
#[derive(Debug, Default)]
struct Looks {
    /// The last one found the server waiting for us.
    found_waiting: bool,
}

impl Looks {
    /// Whether this was the second in a row to find that.
    async fn look(&mut self, watch: &StallWatch) -> bool {
        match watch.ask(self.found_waiting).await {
            Doing::Waiting if self.found_waiting => true,
            Doing::Waiting => {
                self.found_waiting = true;
                false
            }
            Doing::Working => {
                self.found_waiting = false;
                false
            }
            Doing::Unknown => false,
        }
    }
}

/// What has passed over a control session's socket, for who watches it from beside.
#[derive(Debug, Default)]
pub(super) struct Meter {
    received_bytes: AtomicU64,
    /// Something was sent after what was received last.
    is_owed: AtomicBool,
    /// Known once the server has said which process serves the session.
    watch: OnceLock<StallWatch>,
}

impl Meter {
    /// From now on the session is looked after.
    pub(super) fn watched_by(&self, watch: Option<StallWatch>) {
        // There is one login to a session.
        watch.into_iter().for_each(|watch| self.watch.set(watch).expect("the first"));
    }

    /// Ends once an answer has been owed for so long that the link must have stalled; never where `patience` is zero.
    pub(super) async fn stalled(&self, patience: Duration) {
        if patience.is_zero() {
            return std::future::pending().await;
        }
        let mut looks = Looks::default();
        let mut received_before = self.received_bytes.load(Ordering::Relaxed);
        loop {
            tokio::time::sleep(patience).await;
            let received = self.received_bytes.load(Ordering::Relaxed);
            if received != received_before || !self.is_owed.load(Ordering::Relaxed) {
                received_before = received;
                looks = Looks::default();
            } else if let Some(watch) = self.watch.get()
                && looks.look(watch).await
            {
                return;
            }
        }
    }
}

/// A stream that counts.
pub(super) struct Metered {
    stream: Stream,
    meter: Arc<Meter>,
}

impl Metered {
    pub(super) fn new(stream: Stream) -> (Self, Arc<Meter>) {
        let meter = Arc::new(Meter::default());
        (Self { stream, meter: meter.clone() }, meter)
    }
}

impl AsyncRead for Metered {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let held = into.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, into);
        let count = into.filled().len() - held;
        if count > 0 {
            this.meter.received_bytes.fetch_add(count as u64, Ordering::Relaxed);
            this.meter.is_owed.store(false, Ordering::Relaxed);
        }
        read
    }
}

impl AsyncWrite for Metered {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.meter.is_owed.store(true, Ordering::Relaxed);
        Pin::new(&mut this.stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
