//! The registry of sessions: what cutover and admin may know of them and order them to do.
//!
//! A session lives on one worker thread and owns its sockets; from outside it is an [`Entry`]. Orders are put into the
//! entry's mailbox and the session's task is woken; answers come back through one-shot channels. Nobody outside a
//! session's own task ever touches its sockets.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::{oneshot, watch};

use super::catalogue_names::CatalogueNames;
use super::client_error::ClientError;
use super::handoff::Blocker;
use super::turns::Turns;
use crate::config::Limits;
use crate::config::limits::Timeouts;
use crate::switch::{Epoch, ServerRole};

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum SessionState {
    /// Authenticating, or waiting for its first backend.
    Login = 0,
    /// At a safe point.
    Idle = 1,
    /// Inside a transaction or statement.
    Active = 2,
    /// A fence holds its next transaction.
    Held = 3,
    /// Its client is gone and its backend's end is not proven yet.
    Orphan = 4,
    /// A replication connection, which is exempt from admission.
    Replication = 5,
    /// Waits for a connection of its pool.
    Waiting = 6,
}

impl SessionState {
    fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Login,
            1 => Self::Idle,
            2 => Self::Active,
            3 => Self::Held,
            4 => Self::Orphan,
            6 => Self::Waiting,
            _ => Self::Replication,
        }
    }
}

/// Where a session stands with a move to the other server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveState {
    /// No move is in preparation.
    #[default]
    None,
    /// Ordered and not ready.
    Preparing,
    /// Its state is on a backend of the other server.
    Prepared,
    /// It has moved to the server it runs on.
    Moved,
    /// Something it holds cannot be moved.
    Blocked,
    /// An attempt failed.
    Failed,
}

/// A session as seen from outside.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SessionView {
    /// Its number in this process.
    pub id: u64,
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// `address:port`, or `unix`.
    pub client_address: String,
    /// What the client calls itself.
    pub application_name: String,
    /// Process id that its client knows, for cancels.
    pub client_pid: i32,
    /// Where its backend is.
    pub server: Option<ServerRole>,
    /// Process id of its backend.
    pub backend_pid: Option<i32>,
    /// What it does.
    pub state: SessionState,
    /// How long it has been doing that.
    pub for_time: Duration,
    /// Since the connection was accepted.
    pub connected_for: Duration,
    /// Whether it is inside a transaction or statement.
    pub in_transaction: bool,
    /// Whether the client speaks TLS.
    pub tls: bool,
    /// A move in preparation.
    pub moving: MoveState,
    /// Why it cannot be moved.
    pub blockers: Vec<Blocker>,
    /// Whether it has a backend for each transaction, or for as long as it lives.
    pub pooled: bool,
    /// Why a pooled session keeps its backend all the same.
    pub pinned: Option<String>,
}

/// Where sessions are to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveOrder {
    /// The other server.
    pub to: ServerRole,
    /// The cutover that wants it.
    pub epoch: Epoch,
}

/// How far a session came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MoveOutcome {
    /// Its state is on the other server.
    Ready,
    /// Not at a safe point in time; it goes on trying.
    Busy,
    /// It holds something that cannot be moved.
    Blocked(Vec<Blocker>),
    /// The attempt failed, in words that are safe to show.
    Failed(String),
}

/// A session's answer to an order.
#[derive(Clone, Debug)]
pub struct MoveReport {
    /// The session, as it was when it answered.
    pub session: SessionView,
    /// How far it came.
    pub outcome: MoveOutcome,
}

/// A backend that sessions share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PooledBackend {
    /// Database.
    pub database: String,
    /// Role.
    pub user: String,
    /// Where it is.
    pub server: ServerRole,
    /// Its process id.
    pub pid: i32,
    /// When it was opened.
    pub opened: Instant,
}

/// What a session is told from outside.
#[derive(Debug)]
pub(super) enum Order {
    /// A client asked for a cancel; the sender is dropped once it has been dealt with.
    Cancel { done: oneshot::Sender<()> },
    /// End, telling the client this.
    End(ClientError),
    /// Be ready to move.
    Prepare { order: MoveOrder, reply: oneshot::Sender<MoveOutcome> },
    /// Bring over what changed since.
    Settle { order: MoveOrder, reply: oneshot::Sender<MoveOutcome> },
    /// Forget the move.
    Discard,
    /// Look whether a time-out has passed.
    Look,
}

/// What does not change often, for views.
#[derive(Debug, Default)]
struct Facts {
    user: String,
    database: String,
    application_name: String,
    client_pid: i32,
    server: Option<ServerRole>,
    moving: MoveState,
    blockers: Vec<Blocker>,
    tls: bool,
    pooled: bool,
    pinned: Option<String>,
}

/// One session, seen from other threads.
#[derive(Debug)]
pub struct Entry {
    id: u64,
    client_address: String,
    connected: Instant,
    facts: Mutex<Facts>,
    state: AtomicU8,
    /// Milliseconds from `connected` to the last change of state.
    since_ms: AtomicU64,
    backend_pid: AtomicI32,
    mailbox: Mutex<Vec<Order>>,
    /// Looked at in every poll of the relay, so that an empty mailbox costs one load.
    has_orders: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    fn new(id: u64, client_address: String) -> Self {
        Self {
            id,
            client_address,
            connected: Instant::now(),
            facts: Mutex::default(),
            state: AtomicU8::new(SessionState::Login as u8),
            since_ms: AtomicU64::new(0),
            backend_pid: AtomicI32::new(0),
            mailbox: Mutex::default(),
            has_orders: AtomicBool::new(false),
            waker: Mutex::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn for_tests(id: u64) -> Arc<Self> {
        Arc::new(Self::new(id, "test".to_owned()))
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// `address:port`, or `unix`.
    pub(super) fn client_address(&self) -> &str {
        &self.client_address
    }

    /// What it does.
    pub(super) fn state(&self) -> SessionState {
        SessionState::from_u8(self.state.load(Ordering::Acquire))
    }

    /// Set by the session's own task.
    pub(super) fn set_state(&self, state: SessionState) {
        self.set_state_at(state, Instant::now());
    }

    /// The same for who knows the time already. Nobody else writes, so plain stores do.
    #[inline]
    pub(super) fn set_state_at(&self, state: SessionState, now: Instant) {
        self.state.store(state as u8, Ordering::Release);
        self.since_ms.store((now - self.connected).as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn set_identity(&self, user: &str, database: &str, application_name: &str, client_pid: i32, tls: bool) {
        let mut facts = lock(&self.facts);
        user.clone_into(&mut facts.user);
        database.clone_into(&mut facts.database);
        application_name.clone_into(&mut facts.application_name);
        facts.client_pid = client_pid;
        facts.tls = tls;
    }

    pub(super) fn set_client_pid(&self, client_pid: i32) {
        lock(&self.facts).client_pid = client_pid;
    }

    pub(super) fn set_application_name(&self, application_name: &str) {
        application_name.clone_into(&mut lock(&self.facts).application_name);
    }

    pub(super) fn set_backend(&self, backend: Option<(ServerRole, i32)>) {
        lock(&self.facts).server = backend.map(|(role, _)| role);
        self.backend_pid.store(backend.map_or(0, |(_, pid)| pid), Ordering::Release);
    }

    /// A backend for each transaction: it has none now.
    pub(super) fn set_pooled(&self) {
        lock(&self.facts).pooled = true;
    }

    /// It keeps the backend that it has.
    pub(super) fn set_pinned(&self, why: String) {
        lock(&self.facts).pinned = Some(why);
    }

    /// The backend of a pooled session: without a lock, for the hot path. None: 0.
    #[inline]
    pub(super) fn set_backend_pid(&self, pid: i32) {
        self.backend_pid.store(pid, Ordering::Release);
    }

    pub(super) fn set_server(&self, server: ServerRole) {
        lock(&self.facts).server = Some(server);
    }

    pub(super) fn set_moving(&self, moving: MoveState, blockers: Vec<Blocker>) {
        let mut facts = lock(&self.facts);
        facts.moving = moving;
        facts.blockers = blockers;
    }

    fn backend_pid(&self) -> Option<i32> {
        Some(self.backend_pid.load(Ordering::Acquire)).filter(|&pid| pid != 0)
    }

    /// What is known of it now.
    pub(super) fn view(&self) -> SessionView {
        let facts = lock(&self.facts);
        let state = self.state();
        let connected_for = self.connected.elapsed();
        let since = Duration::from_millis(self.since_ms.load(Ordering::Relaxed));
        SessionView {
            id: self.id,
            user: facts.user.clone(),
            database: facts.database.clone(),
            client_address: self.client_address.clone(),
            application_name: facts.application_name.clone(),
            client_pid: facts.client_pid,
            server: facts.server,
            backend_pid: self.backend_pid(),
            state,
            for_time: connected_for.saturating_sub(since),
            connected_for,
            in_transaction: matches!(state, SessionState::Active | SessionState::Orphan),
            tls: facts.tls,
            moving: facts.moving,
            blockers: facts.blockers.clone(),
            pooled: facts.pooled,
            pinned: facts.pinned.clone(),
        }
    }

    /// How long it has been in its state, and connected.
    pub(super) fn ages(&self, now: Instant) -> (Duration, Duration) {
        let connected = now.saturating_duration_since(self.connected);
        (connected.saturating_sub(Duration::from_millis(self.since_ms.load(Ordering::Relaxed))), connected)
    }

    /// Its time-outs.
    pub(super) fn timeouts(&self, limits: &Limits) -> Timeouts {
        let facts = lock(&self.facts);
        limits.timeouts_of(&facts.user, &facts.database)
    }

    fn database(&self) -> String {
        lock(&self.facts).database.clone()
    }

    fn is_of(&self, databases: &[String]) -> bool {
        databases.contains(&lock(&self.facts).database)
    }

    /// Puts an order into the mailbox and wakes the session.
    pub(super) fn order(&self, order: Order) {
        lock(&self.mailbox).push(order);
        self.has_orders.store(true, Ordering::Release);
        self.wake();
    }

    /// Wakes the session's task, which then looks around.
    pub(super) fn wake(&self) {
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake_by_ref();
        }
    }

    /// The session's task, which stays the same from here on.
    pub(super) fn set_waker(&self, waker: &Waker) {
        *lock(&self.waker) = Some(waker.clone());
    }

    /// Resolves when there are orders. For the one task of this session.
    pub(super) async fn ordered(&self) {
        std::future::poll_fn(|cx| {
            self.set_waker(cx.waker());
            if self.has_orders() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    /// Whether the mailbox must be emptied.
    #[inline]
    pub(super) fn has_orders(&self) -> bool {
        self.has_orders.load(Ordering::Acquire)
    }

    /// Empties the mailbox.
    pub(super) fn take_orders(&self) -> Vec<Order> {
        let mut mailbox = lock(&self.mailbox);
        self.has_orders.store(false, Ordering::Release);
        std::mem::take(&mut *mailbox)
    }
}

/// All sessions of this process.
#[derive(Debug, Default)]
pub struct Sessions {
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    /// The proxy stops: who comes now is told so.
    closing: AtomicBool,
    /// Sessions that could not follow their database and were ended.
    left_behind: AtomicU64,
    /// The last move that was ordered for each database.
    ordered: Mutex<HashMap<String, MoveOrder>>,
    /// In which sessions open a backend for their move.
    pub(super) turns: Turns,
    pub(super) catalogue_names: CatalogueNames,
    /// Backends of pools by database, whether a session has them now or none.
    pooled: Mutex<HashMap<i32, PooledBackend>>,
    /// When RECONNECT was last ordered, by database.
    retired: Mutex<HashMap<String, Instant>>,
    /// Told of each RECONNECT.
    retirements: watch::Sender<()>,
    next_id: AtomicU64,
}

/// A session's place in the registry; given up when dropped.
#[derive(Debug)]
pub(super) struct Registration {
    sessions: Arc<Sessions>,
    entry: Arc<Entry>,
}

impl std::ops::Deref for Registration {
    type Target = Arc<Entry>;
    fn deref(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.sessions.entries).remove(&self.entry.id);
        // Whoever waits for an answer learns that there will be none.
        self.entry.take_orders();
    }
}

impl Sessions {
    /// Registers a connection that asks for a session.
    pub(super) fn register(self: &Arc<Self>, client_address: String) -> Registration {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(Entry::new(id, client_address));
        lock(&self.entries).insert(id, entry.clone());
        if self.closing.load(Ordering::Acquire) {
            entry.order(Order::End(ClientError::Terminated));
        }
        Registration { sessions: self.clone(), entry }
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        let mut entries: Vec<_> = lock(&self.entries).values().cloned().collect();
        entries.sort_by_key(|entry| entry.id);
        entries
    }

    fn of(&self, databases: &[String]) -> Vec<Arc<Entry>> {
        self.entries().into_iter().filter(|entry| entry.is_of(databases)).collect()
    }

    /// Every session, oldest first.
    pub fn list(&self) -> Vec<SessionView> {
        self.entries().iter().map(|entry| entry.view()).collect()
    }

    /// Process ids of the backends that sessions of `database` run on or share, orphans included.
    pub fn backend_pids(&self, database: &str) -> Vec<i32> {
        let mut pids: Vec<i32> =
            self.of(&[database.to_owned()]).iter().filter_map(|entry| entry.backend_pid()).collect();
        pids.extend(lock(&self.pooled).values().filter(|one| one.database == database).map(|one| one.pid));
        pids
    }

    /// A backend of a pool of `database`.
    pub(super) fn note_pooled(&self, backend: PooledBackend) {
        lock(&self.pooled).insert(backend.pid, backend);
    }

    /// It is gone, or will be soon.
    pub(super) fn forget_pooled(&self, backend: &PooledBackend) {
        let mut pooled = lock(&self.pooled);
        // The other server may have given the same process id meanwhile.
        if pooled.get(&backend.pid) == Some(backend) {
            pooled.remove(&backend.pid);
        }
    }

    /// RECONNECT: no connection of `database` that is open now is used again once the session that has it ends, or its
    /// transaction where connections are shared. Those that nobody has are closed.
    pub fn retire(&self, database: &str) {
        lock(&self.retired).insert(database.to_owned(), Instant::now());
        self.retirements.send_replace(());
    }

    pub(super) fn retired(&self, database: &str) -> Option<Instant> {
        lock(&self.retired).get(database).copied()
    }

    pub(super) fn retirements(&self) -> watch::Receiver<()> {
        self.retirements.subscribe()
    }

    /// Whether the backend of a pool with this process id is still open though it was retired.
    pub fn is_retired(&self, pid: i32) -> bool {
        let known = lock(&self.pooled).get(&pid).map(|backend| (backend.database.clone(), backend.opened));
        known.is_some_and(|(database, opened)| self.retired(&database).is_some_and(|by| opened <= by))
    }

    /// Backends of pools that no session holds now, by process id.
    pub fn idle_backends(&self) -> Vec<PooledBackend> {
        let held: HashSet<i32> = self.entries().iter().filter_map(|entry| entry.backend_pid()).collect();
        let mut idle: Vec<_> = lock(&self.pooled).values().filter(|one| !held.contains(&one.pid)).cloned().collect();
        idle.sort_by_key(|one| one.pid);
        idle
    }

    /// Sessions of `database` whose client is gone while their backend may still be at work.
    pub fn orphans(&self, database: &str) -> Vec<SessionView> {
        self.views(database, |state| state == SessionState::Orphan)
    }

    /// Sessions of `database` that are inside, orphans included.
    pub fn stragglers(&self, database: &str) -> Vec<SessionView> {
        self.views(database, |state| matches!(state, SessionState::Active | SessionState::Orphan))
    }

    fn views(&self, database: &str, wanted: impl Fn(SessionState) -> bool) -> Vec<SessionView> {
        let entries = self.of(&[database.to_owned()]);
        entries.iter().filter(|entry| wanted(entry.state())).map(|entry| entry.view()).collect()
    }

    /// Ends these sessions; their clients get a FATAL error with this code and message. A session that is inside keeps
    /// counting as inside until its backend's end is proven. Returns how many there were.
    pub fn end(&self, session_ids: &[u64], sqlstate: &str, message: &str) -> usize {
        let error = ClientError::Ordered { code: sqlstate.to_owned(), message: message.to_owned() };
        let entries = self.entries();
        let chosen: Vec<_> = entries.iter().filter(|entry| session_ids.contains(&entry.id)).collect();
        chosen.iter().for_each(|entry| entry.order(Order::End(error.clone())));
        chosen.len()
    }

    /// Ends every session, because the proxy stops.
    pub(super) fn end_all(&self) {
        self.closing.store(true, Ordering::Release);
        for entry in self.entries() {
            entry.order(Order::End(ClientError::Terminated));
        }
    }

    /// How many sessions were ended since the start because they could not follow their database.
    pub fn left_behind(&self) -> u64 {
        self.left_behind.load(Ordering::Relaxed)
    }

    pub(super) fn count_left_behind(&self) {
        self.left_behind.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads what moves from `database` will need to know of its objects. `session` is one of the cutover's own, on the
    /// server that is left; with the database shut, sessions could not ask for it themselves.
    pub async fn learn_names(
        &self,
        database: &str,
        order: MoveOrder,
        session: &tokio_postgres::Client,
    ) -> Result<(), tokio_postgres::Error> {
        self.catalogue_names.learn(order.to.other(), database, order.epoch, session).await
    }

    /// Lets every session of these databases open a backend on the other server, with its state, at its next safe
    /// point. Returns at the deadline at the latest; busy sessions go on trying until [`Sessions::discard_moves`].
    pub async fn prepare_moves(&self, databases: &[String], order: MoveOrder, deadline: Instant) -> Vec<MoveReport> {
        for database in databases {
            lock(&self.ordered).insert(database.clone(), order);
        }
        self.turns.begin(self.of(databases).len());
        self.ask(databases, deadline, |order, reply| Order::Prepare { order, reply }).await
    }

    /// The gates have just been closed: sessions at a safe point bring over at once what changed since
    /// [`Sessions::prepare_moves`], the others as soon as they are. [`Sessions::settle_moves`] waits for all of them.
    pub fn begin_settling(&self, databases: &[String]) {
        self.turns.hurry();
        let ordered = lock(&self.ordered).clone();
        for entry in self.of(databases).into_iter().filter(is_movable) {
            let Some(order) = ordered.get(&entry.database()).copied() else { continue };
            // Nobody hears this answer; the one that counts is asked for later.
            let (reply, _) = oneshot::channel();
            entry.order(Order::Settle { order, reply });
        }
    }

    /// In the pause: brings over what changed since [`Sessions::prepare_moves`], or everything where nothing was
    /// prepared, as with sessions that logged in meanwhile.
    pub async fn settle_moves(&self, databases: &[String], deadline: Instant) -> Vec<MoveReport> {
        self.ask(databases, deadline, |order, reply| Order::Settle { order, reply }).await
    }

    /// An abort: prepared backends are closed.
    pub fn discard_moves(&self, databases: &[String]) {
        lock(&self.ordered).retain(|database, _| !databases.contains(database));
        self.turns.give_up();
        self.of(databases).iter().for_each(|entry| entry.order(Order::Discard));
    }

    async fn ask(
        &self,
        databases: &[String],
        deadline: Instant,
        order: impl Fn(MoveOrder, oneshot::Sender<MoveOutcome>) -> Order,
    ) -> Vec<MoveReport> {
        let ordered = lock(&self.ordered).clone();
        let asked = self.of(databases).into_iter().filter(is_movable).filter_map(|entry| {
            let wanted = *ordered.get(&entry.database())?;
            let (reply, answer) = oneshot::channel();
            entry.order(order(wanted, reply));
            Some(async move {
                match tokio::time::timeout_at(deadline.into(), answer).await {
                    Ok(Ok(outcome)) => Some(MoveReport { session: entry.view(), outcome }),
                    // The session has ended meanwhile: nothing to move.
                    Ok(Err(_)) => None,
                    Err(_) => Some(MoveReport { session: entry.view(), outcome: MoveOutcome::Busy }),
                }
            })
        });
        join_all(asked).await.into_iter().flatten().collect()
    }
}

/// A session in login has no state yet and connects to whichever server is active when it is let in; orphans and
/// replication connections are not moved.
fn is_movable(entry: &Arc<Entry>) -> bool {
    !matches!(entry.state(), SessionState::Login | SessionState::Orphan | SessionState::Replication)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_that_does_not_answer_is_busy_and_one_that_ends_is_not_reported() {
        let sessions = Arc::new(Sessions::default());
        let (silent, ending) = (sessions.register("a".to_owned()), sessions.register("b".to_owned()));
        for session in [&silent, &ending] {
            session.set_identity("ann", "shop", "", 1, false);
            session.set_state(SessionState::Idle);
        }
        let order = MoveOrder { to: ServerRole::Target, epoch: Epoch(1) };
        let deadline = Instant::now() + Duration::from_millis(20);
        let databases = ["shop".to_owned()];
        let id = silent.id();
        let (reports, ()) = tokio::join!(sessions.prepare_moves(&databases, order, deadline), async {
            tokio::task::yield_now().await;
            drop(ending);
        });
        assert_eq!(reports.len(), 1);
        assert_eq!((reports[0].session.id, &reports[0].outcome), (id, &MoveOutcome::Busy));
        assert!(silent.has_orders());
        assert_eq!(silent.take_orders().len(), 1);
    }
}
