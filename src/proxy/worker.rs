//! A worker: one thread, one current-thread runtime, and every session that was given to it.
//!
//! Both sockets of a session live on its worker, so relaying wakes no other thread. What sessions of one worker share
//! (spare buffers, counters, the watch on a database's gate) is reached through `Rc` and costs no atomics.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::noop_waker_ref;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Shared;
use super::buffers::Pool;
use super::entry::{Entry, SessionState};
use super::listener::Accepted;
use super::meters::DatabaseMeters;
use super::pool::LocalPool;
use crate::postgres::Credential;
use crate::postgres::ring::Ring;
use crate::switch::Database;

/// What the sessions of one worker share.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Rc<Pool>,
    /// Serves the sockets of sessions that relay; none where the kernel has no io_uring, or forbids it.
    pub(super) ring: Option<Ring>,
    databases: RefCell<HashMap<String, Rc<LocalDatabase>>>,
    /// Which worker it is.
    number: usize,
    /// Its parts of the pools, by database and user.
    pools: RefCell<HashMap<(String, String), Rc<LocalPool>>>,
}

/// A database as one worker sees it.
pub(super) struct LocalDatabase {
    /// Gate and route.
    pub(super) database: Arc<Database>,
    /// Counted without contention, handed to the metrics once a second.
    pub(super) meters: DatabaseMeters,
    /// Some transactions are sampled for shadow reads; looked up once a second.
    pub(super) is_shadowed: Cell<bool>,
    /// Sessions to be woken when gate or route change.
    sessions: RefCell<HashMap<u64, Arc<Entry>>>,
    /// `limits.resume_rate` as far as this worker goes, and when the next login that was held may be let in.
    shared: Arc<Shared>,
    next_turn: Cell<tokio::time::Instant>,
}

/// A session's wish to be woken when its database's gate changes; ends when dropped.
pub(super) struct Watch {
    local: Rc<LocalDatabase>,
    id: u64,
}

impl Worker {
    fn new(shared: Arc<Shared>, number: usize, place: &OnceLock<Ring>) -> Rc<Self> {
        let pool = Pool::new(shared.config.limits.buffer_bytes);
        let ring = shared.config.listen.io_uring.then(Ring::open).and_then(|opened| {
            opened.inspect_err(|error| tracing::info!(%error, "the kernel offers no io_uring; sockets are polled")).ok()
        });
        let ring = ring.map(|ring| place.get_or_init(|| ring).clone());
        Rc::new(Self { shared, pool, ring, databases: RefCell::default(), number, pools: RefCell::default() })
    }

    /// Serves sockets until the channel closes and every session has ended. Whoever runs the thread finds its ring in `place`.
    pub(super) async fn run(
        shared: Arc<Shared>,
        number: usize,
        place: &OnceLock<Ring>,
        mut accepted: mpsc::Receiver<Accepted>,
    ) {
        let alive = shared.workers_alive.subscribe();
        let worker = Self::new(shared, number, place);
        let sessions = tokio_util::task::TaskTracker::new();
        let ring = worker.ring.clone().map(|ring| tokio::task::spawn_local(ring.drive()));
        let timeouts = tokio::task::spawn_local(super::timeouts::sweep(worker.clone()));
        let upkeep = tokio::task::spawn_local(worker.clone().keep_up());
        while let Some(socket) = accepted.recv().await {
            // Boxed here once: the task then holds a pointer, and the handshake's part is freed before the relay.
            sessions.spawn_local(Box::pin(super::session::serve(worker.clone(), socket)));
        }
        sessions.close();
        sessions.wait().await;
        // The last sockets are closed in the ring's next turn.
        tokio::task::yield_now().await;
        ring.iter().for_each(JoinHandle::abort);
        timeouts.abort();
        upkeep.abort();
        drop(alive);
        // A connection behind TLS that went to another worker is still registered with this one's runtime.
        worker.shared.workers_alive.closed().await;
        worker.databases.borrow().values().for_each(|local| local.meters.flush());
    }

    /// The database `name`, watched from its first use on. Only for clients that have proved who they are.
    pub(super) fn database(&self, name: &str) -> Rc<LocalDatabase> {
        if let Some(known) = self.databases.borrow().get(name) {
            return known.clone();
        }
        let database = self.shared.switchboard.database(name);
        let local = Rc::new(LocalDatabase {
            meters: DatabaseMeters::new(&self.shared.metrics, name),
            is_shadowed: Cell::new(self.shared.sessions.shadow.is_on_for(name)),
            sessions: RefCell::default(),
            shared: self.shared.clone(),
            next_turn: Cell::new(tokio::time::Instant::now()),
            database,
        });
        // Listening begins before the first session looks at the gate, so that no change falls between.
        let first = listen(&local.database);
        tokio::task::spawn_local(watch(local.clone(), first));
        self.databases.borrow_mut().insert(name.to_owned(), local.clone());
        local
    }

    /// Shows every session of this worker that is logged in.
    pub(super) fn each_entry(&self, mut look: impl FnMut(&Entry)) {
        for local in self.databases.borrow().values() {
            local.sessions.borrow().values().for_each(|entry| look(entry));
        }
    }

    /// This worker's part of the pool of `user` in a database.
    pub(super) fn pool(
        &self,
        local: &Rc<LocalDatabase>,
        database: &str,
        user: &str,
        credential: &Credential,
    ) -> Rc<LocalPool> {
        let central = self.shared.pools.of(database, user, credential);
        let mut pools = self.pools.borrow_mut();
        let pool = pools
            .entry((database.to_owned(), user.to_owned()))
            .or_insert_with(|| LocalPool::new(central, self.shared.clone(), self.number, local.clone()));
        pool.clone()
    }

    /// Hands idle connections to who waits elsewhere. Once a second looks through all of them, and hands over what was
    /// counted: one timer for both, because a thread that has nothing else to do pays for each time it is woken.
    async fn keep_up(self: Rc<Self>) {
        let mut every_second = tokio::time::interval(Duration::from_secs(1));
        every_second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut retirements = self.shared.sessions.retirements();
        loop {
            let called = tokio::select! {
                // None loses anything when it is dropped: a call is remembered, and so is a change.
                () = self.shared.pools.called(self.number) => true,
                _ = every_second.tick() => false,
                _ = retirements.changed() => {
                    self.shared.vacancies.close_retired();
                    self.pools.borrow().values().for_each(|pool| pool.retire());
                    continue;
                }
            };
            if !called {
                for local in self.databases.borrow().values() {
                    local.meters.flush();
                    local.is_shadowed.set(self.shared.sessions.shadow.is_on_for(local.database.name()));
                }
                if self.number == 0 {
                    self.shared.vacancies.look_after();
                }
            }
            let pools: Vec<_> = self.pools.borrow().values().cloned().collect();
            for pool in pools {
                if called { pool.serve_waiting() } else { pool.look_after() }
            }
            if !called {
                // Nobody has it and nothing is open: its secrets go with it.
                self.pools.borrow_mut().retain(|_, pool| Rc::strong_count(pool) > 1 || !pool.is_empty());
                self.shared.pools.forget_unused();
            }
        }
    }
}

impl LocalDatabase {
    /// So many are let in each [`LET_IN_EVERY`] on this worker; none: all at once.
    fn resume_rate(&self) -> Option<usize> {
        let rate = self.shared.limits.load().resume_rate;
        (rate > 0).then(|| rate.div_ceil(self.shared.config.listen.workers.max(1)))
    }

    /// When a login that was held may come in, each after the one before.
    pub(super) fn next_turn(&self) -> tokio::time::Instant {
        let now = tokio::time::Instant::now();
        let Some(rate) = self.resume_rate() else { return now };
        let turn = self.next_turn.get().max(now);
        self.next_turn.set(turn + LET_IN_EVERY / u32::try_from(rate).unwrap_or(u32::MAX));
        turn
    }

    /// From now on `entry` is woken when gate or route change.
    pub(super) fn watch(self: &Rc<Self>, entry: &Arc<Entry>) -> Watch {
        self.sessions.borrow_mut().insert(entry.id(), entry.clone());
        Watch { local: self.clone(), id: entry.id() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.local.sessions.borrow_mut().remove(&self.id);
    }
}

type Change = Pin<Box<dyn Future<Output = ()>>>;

/// A future that resolves at the next change; listening has begun when this returns.
fn listen(database: &Arc<Database>) -> Change {
    let database = database.clone();
    let mut change: Change = Box::pin(async move { database.changed().await });
    match change.as_mut().poll(&mut Context::from_waker(noop_waker_ref())) {
        Poll::Pending => change,
        Poll::Ready(()) => Box::pin(std::future::ready(())),
    }
}

/// Wakes the sessions at every change of gate or route.
async fn watch(local: Rc<LocalDatabase>, mut change: Change) {
    let shared = local.shared.clone();
    loop {
        change.await;
        // First listen again, then wake: a change during the waking is not missed.
        change = listen(&local.database);
        shared.vacancies.keep_only(local.database.name(), local.database.epoch());
        if local.database.is_fenced() {
            local.sessions.borrow().values().for_each(|entry| entry.wake());
            continue;
        }
        let mut entries: Vec<_> = local.sessions.borrow().values().cloned().collect();
        entries.sort_by_key(|entry| (entry.state() != SessionState::Held, entry.id()));
        let (first, groups) = match local.resume_rate() {
            Some(rate) => (Duration::ZERO, (entries, rate)),
            None => {
                // One that answers still may have read what its client wants next.
                let waits = |entry: &Arc<Entry>| entry.state() != SessionState::Idle;
                let (waiting, others): (Vec<_>, Vec<_>) = entries.into_iter().partition(waits);
                waiting.iter().for_each(|entry| entry.wake());
                (AFTER_THE_HELD, (others, IDLE_AT_ONCE))
            }
        };
        tokio::task::spawn_local(wake_gradually(first, groups));
    }
}

/// How long passes between two groups of sessions that are let in gradually.
const LET_IN_EVERY: Duration = Duration::from_millis(10);

/// How long those that were held have the processors to themselves.
const AFTER_THE_HELD: Duration = Duration::from_millis(50);

/// Sessions that nobody waits for follow so many at a time: hundreds that exchange their backends at once would hold up those
/// that were held.
const IDLE_AT_ONCE: usize = 32;

/// Wakes sessions, so many at a time. Waking admits nobody: each still asks the gate itself, so one that is woken late, or by
/// its client before its turn, breaks nothing.
async fn wake_gradually(first: Duration, (entries, at_once): (Vec<Arc<Entry>>, usize)) {
    tokio::time::sleep(first).await;
    for group in entries.chunks(at_once) {
        group.iter().for_each(|entry| entry.wake());
        tokio::time::sleep(LET_IN_EVERY).await;
    }
}
