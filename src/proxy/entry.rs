//! One session as the rest of the process sees it: what may be known of it, and what it can be told to do.
//!
//! A session lives on one worker thread and owns its sockets. Orders are put into its [`Entry`]'s mailbox and the session's
//! task is woken; answers come back through one-shot channels. Nobody outside a session's own task ever touches its sockets.

#[cfg(test)]
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::client_error::ClientError;
use super::handoff::Blocker;
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
    /// Inside a transaction that its client has declared read-only, while a cutover holds everybody else.
    Reading = 7,
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
            7 => Self::Reading,
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
    /// Why it cannot be moved: as of the last attempt, until it runs something more.
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
    /// Epoch of the move whose other backend has the session's state as it is now; 0: none.
    settled_for: AtomicU64,
    /// None: the session takes no orders any more.
    mailbox: Mutex<Option<Vec<Order>>>,
    /// Looked at in every poll of the relay, so that an empty mailbox costs one load.
    has_orders: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    pub(super) fn new(id: u64, client_address: String) -> Self {
        Self {
            id,
            client_address,
            connected: Instant::now(),
            facts: Mutex::default(),
            state: AtomicU8::new(SessionState::Login as u8),
            since_ms: AtomicU64::new(0),
            backend_pid: AtomicI32::new(0),
            settled_for: AtomicU64::new(0),
            mailbox: Mutex::new(Some(Vec::new())),
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
        // Both at once for who reads them: the number alone may be another process on the other server.
        let mut facts = lock(&self.facts);
        facts.server = backend.map(|(role, _)| role);
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

    /// It has gone on since its last move was given up: what stood in its way then may be gone.
    pub(super) fn forget_blockers(&self) {
        let mut facts = lock(&self.facts);
        if facts.moving == MoveState::None {
            facts.blockers = Vec::new();
        }
    }

    /// Set by the session's own task, which takes it back before it lets anything more pass.
    pub(super) fn set_settled_for(&self, epoch: Option<Epoch>) {
        self.settled_for.store(epoch.map_or(0, |epoch| epoch.0), Ordering::Release);
    }

    /// Whether it has nothing to bring over for the move of `epoch`. What is read while the gate is closed, and after
    /// everybody has left it, stays so.
    pub(super) fn is_settled_for(&self, epoch: Epoch) -> bool {
        epoch.0 != 0 && self.settled_for.load(Ordering::Acquire) == epoch.0
    }

    fn backend_pid(&self) -> Option<i32> {
        Some(self.backend_pid.load(Ordering::Acquire)).filter(|&pid| pid != 0)
    }

    /// Its backend: where it is, and its process id.
    pub(super) fn backend(&self) -> Option<(ServerRole, i32)> {
        let facts = lock(&self.facts);
        facts.server.zip(self.backend_pid())
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
            in_transaction: matches!(state, SessionState::Active | SessionState::Reading | SessionState::Orphan),
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

    pub(super) fn database(&self) -> String {
        lock(&self.facts).database.clone()
    }

    pub(super) fn is_of(&self, databases: &[String]) -> bool {
        databases.contains(&lock(&self.facts).database)
    }

    /// Puts an order into the mailbox and wakes the session. With a session that takes none any more it is dropped, so that
    /// whoever waits for an answer learns at once that there will be none.
    pub(super) fn order(&self, order: Order) {
        match &mut *lock(&self.mailbox) {
            Some(orders) => orders.push(order),
            None => return,
        }
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
        mailbox.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The session ends: it takes no orders any more, those that are on their way included.
    pub(super) fn take_no_more_orders(&self) {
        drop(lock(&self.mailbox).take());
        self.has_orders.store(false, Ordering::Release);
    }
}
