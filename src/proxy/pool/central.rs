//! What all workers share of one pool: who waits, how many connections there are, and who logs in.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::line::Line;
use super::link::{Link, ParkedLink};
use super::profile::{Profile, Profiles, Startup};
use super::registry::{Pools, Seat};
use super::statements::{Statement, Statements};
use super::wait::Wait;
use crate::config::{Config, Pool, PoolSizes};
use crate::postgres::{Credential, Login};
use crate::proxy::client_error::ClientError;
use crate::proxy::entry::Entry;
use crate::proxy::handoff::{SessionState, Traces};

/// After a login that the server refused, so long none is tried while others live.
const LOGIN_RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub(in crate::proxy) struct Central {
    pub(in crate::proxy) database: String,
    pub(in crate::proxy) user: String,
    pub(in crate::proxy) sizes: PoolSizes,
    pub(super) pools: Arc<Pools>,
    config: Arc<Config>,
    credential: Mutex<Credential>,
    state: Mutex<State>,
    /// How many wait; read by who gives back.
    waiting: AtomicUsize,
    /// How many lie idle on each worker; read by who waits.
    idle: Box<[AtomicUsize]>,
    /// Somebody waits, and a bound over several pools keeps a connection from being opened.
    starved: AtomicBool,
    profiles: Mutex<Profiles>,
    statements: Mutex<Statements>,
}

#[derive(Default)]
struct State {
    line: Line<Arc<Waiter>>,
    /// Open or being opened.
    connections: usize,
    opening: usize,
    /// No login is tried before, unless there is no connection at all.
    not_before: Option<Instant>,
}

/// Somebody who waits for a connection. Kept by its session and used again.
pub(in crate::proxy) struct Waiter {
    worker: usize,
    entry: Arc<Entry>,
    wait: Wait<Result<Handed, ClientError>>,
}

/// A connection that changes hands.
enum Handed {
    Here(Box<Link>),
    Parked(Box<ParkedLink>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waiter {
    pub(in crate::proxy) fn new(worker: usize, entry: Arc<Entry>) -> Arc<Self> {
        Arc::new(Self { worker, entry, wait: Wait::default() })
    }

    /// What the wait has come to, if it has ended.
    pub(in crate::proxy) fn take(&self) -> Option<Result<Box<Link>, ClientError>> {
        // Out of file descriptors or the like: the client is told what a failed connection is told.
        let here = |handed: Handed| handed.resume().map_err(|_| ClientError::ServerUnreachable);
        self.wait.take().map(|outcome| outcome.and_then(here))
    }

    /// Ends the wait of somebody who was called; what it is given is returned if it has left meanwhile.
    fn give(&self, handed: Handed) -> Option<Handed> {
        let unwanted = self.wait.end(Ok(handed)).and_then(Result::ok);
        if unwanted.is_none() {
            self.entry.wake();
        }
        unwanted
    }

    /// The same without a connection.
    fn refuse(&self, error: ClientError) {
        // Who has left meanwhile does not have to be told.
        if self.wait.end(Err(error)).is_none() {
            self.entry.wake();
        }
    }
}

impl Handed {
    /// On the runtime of the calling thread.
    fn resume(self) -> io::Result<Box<Link>> {
        match self {
            Self::Here(link) => Ok(link),
            Self::Parked(parked) => parked.resume().map(Box::new),
        }
    }
}

impl Central {
    pub(super) fn new(pools: &Arc<Pools>, config: &Arc<Config>, database: &str, user: &str) -> Self {
        Self {
            database: database.to_owned(),
            user: user.to_owned(),
            sizes: config.pool.sizes(database, user),
            config: config.clone(),
            credential: Mutex::new(Credential::None),
            state: Mutex::default(),
            waiting: AtomicUsize::new(0),
            idle: (0..pools.workers()).map(|_| AtomicUsize::new(0)).collect(),
            starved: AtomicBool::new(false),
            profiles: Mutex::default(),
            statements: Mutex::default(),
            pools: pools.clone(),
        }
    }

    pub(in crate::proxy) fn settings(&self) -> &Pool {
        &self.config.pool
    }

    /// What a client has proved, for the connections to come. One that was let in without a proof leaves what others have
    /// proved: the server may ask for it.
    pub(super) fn set_credential(&self, credential: &Credential) {
        let mut known = lock(&self.credential);
        if !matches!(credential, Credential::None) || matches!(*known, Credential::None) {
            credential.clone_into(&mut known);
        }
    }

    /// What a connection of the pool logs in with. Settings of clients come later.
    pub(super) fn login(&self) -> Login {
        Login {
            user: self.user.clone(),
            database: self.database.clone(),
            credential: lock(&self.credential).clone(),
            parameters: Vec::new(),
        }
    }

    /// The profile with this state.
    pub(in crate::proxy) fn profile(&self, state: SessionState) -> Arc<Profile> {
        lock(&self.profiles).of(state)
    }

    /// What a client that starts like this has, once one such client has been served.
    pub(in crate::proxy) fn profile_of_startup(&self, startup: &Startup) -> Option<Arc<Profile>> {
        lock(&self.profiles).of_startup(startup)
    }

    pub(in crate::proxy) fn note_startup(&self, startup: Startup, profile: &Arc<Profile>) {
        lock(&self.profiles).note_startup(startup, profile);
    }

    /// The statement that a client with `profile` means by `tail`.
    pub(in crate::proxy) fn statement(&self, profile: &Profile, tail: &[u8], traces: Traces) -> Arc<Statement> {
        lock(&self.statements).of(&profile.meaning, tail, traces)
    }

    /// A statement that is nobody else's.
    pub(in crate::proxy) fn own_statement(&self, tail: &[u8], traces: Traces) -> Arc<Statement> {
        lock(&self.statements).alone(tail, traces)
    }

    /// A client's DEALLOCATE of its statement of this name.
    pub(in crate::proxy) fn deallocate(&self, name: &[u8]) -> Arc<Statement> {
        lock(&self.statements).deallocate(name)
    }

    /// Whether somebody waits. Whoever gives back has said before that the connection is idle.
    #[inline]
    pub(in crate::proxy) fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    pub(super) fn is_starved(&self) -> bool {
        self.starved.load(Ordering::Acquire)
    }

    /// So many lie idle on `worker` now. What is read afterwards of who waits is no older.
    #[inline]
    pub(super) fn set_idle(&self, worker: usize, count: usize) {
        self.idle[worker].store(count, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Joins the line and calls every worker that has an idle connection.
    pub(super) fn join(&self, waiter: &Arc<Waiter>) {
        let forgotten = {
            let mut state = lock(&self.state);
            let forgotten = waiter.wait.begin(Instant::now());
            state.line.join(waiter.worker, waiter.clone());
            self.waiting.store(state.line.len(), Ordering::Relaxed);
            forgotten
        };
        // A connection gives its seat up when it is dropped, which takes the lock.
        debug_assert!(forgotten.is_none(), "whoever waited has taken what it came to");
        drop(forgotten);
        fence(Ordering::SeqCst);
        for (worker, idle) in self.idle.iter().enumerate() {
            if idle.load(Ordering::Relaxed) > 0 {
                self.pools.call(worker);
            }
        }
    }

    /// Leaves the line; what was handed over meanwhile is returned.
    pub(super) fn leave(&self, waiter: &Arc<Waiter>) -> Option<Box<Link>> {
        {
            let mut state = lock(&self.state);
            state.line.leave(|other| Arc::ptr_eq(other, waiter));
            self.waiting.store(state.line.len(), Ordering::Release);
        }
        waiter.wait.leave()?.ok()?.resume().ok()
    }

    /// Whose turn it is on `worker`. It has left the line and waits to be given something.
    fn call_next(&self, worker: usize) -> Option<Arc<Waiter>> {
        let mut state = lock(&self.state);
        let next = state.line.next_for(worker);
        self.waiting.store(state.line.len(), Ordering::Release);
        next.inspect(|waiter| waiter.wait.call())
    }

    /// Those for whom `leaves` holds have left the line and wait to be told why.
    fn call_all(&self, state: &mut State, leaves: impl Fn(&Waiter) -> bool) -> Vec<Arc<Waiter>> {
        let called = state.line.leave(|waiter| leaves(waiter));
        self.waiting.store(state.line.len(), Ordering::Release);
        called.iter().for_each(|waiter| waiter.wait.call());
        called
    }

    /// Gives a connection of `worker` to whoever's turn it is; returned when nobody waits.
    pub(super) fn hand_over(&self, mut link: Box<Link>, worker: usize) -> Option<Box<Link>> {
        while let Some(waiter) = self.call_next(worker) {
            let handed = if waiter.worker == worker {
                Handed::Here(link)
            } else {
                match link.park() {
                    Ok(parked) => Handed::Parked(Box::new(parked)),
                    Err(_) => {
                        // Its seat is free again with it; the waiter is told what a failed connection is told.
                        waiter.refuse(ClientError::ServerUnreachable);
                        return None;
                    }
                }
            };
            // Who has left meanwhile needs none: it is the next one's.
            link = waiter.give(handed)?.resume().ok()?;
        }
        Some(link)
    }

    /// A seat for one more connection, if one is wanted and allowed.
    pub(super) fn seat_for_waiting(self: &Arc<Self>) -> Option<Seat> {
        let mut state = lock(&self.state);
        let wanted = state.line.len() > state.opening;
        let Some(first) = state.line.first().filter(|_| wanted) else {
            self.starved.store(false, Ordering::Release);
            return None;
        };
        let patience = self.settings().reserve_pool_timeout;
        // Zero: there is no reserve, as with PgBouncer.
        let late = !patience.is_zero() && first.wait.since().is_some_and(|since| since.elapsed() >= patience);
        let limit = self.sizes.pool_size + if late { self.sizes.reserve_pool_size } else { 0 };
        self.take_seat(&mut state, limit)
    }

    /// A seat for a connection that is kept open, used or not; `goal`: how many there should be.
    pub(super) fn seat_up_to(self: &Arc<Self>, goal: usize) -> Option<Seat> {
        let mut state = lock(&self.state);
        self.take_seat(&mut state, goal.min(self.sizes.pool_size))
    }

    /// A seat beyond the pool's size, for a connection that takes another one's place at a switch.
    pub(super) fn seat_for_successor(self: &Arc<Self>) -> Seat {
        Seat::of_successor(self.clone())
    }

    fn take_seat(self: &Arc<Self>, state: &mut State, limit: usize) -> Option<Seat> {
        let is_tired = state.not_before.is_some_and(|at| Instant::now() < at) && state.connections > 0;
        if state.connections >= limit || is_tired {
            return None;
        }
        if !self.pools.count_up(self) {
            self.starved.store(state.line.len() > 0, Ordering::Release);
            return None;
        }
        self.starved.store(false, Ordering::Release);
        state.connections += 1;
        state.opening += 1;
        Some(Seat::new(self.clone()))
    }

    /// An attempt to open a connection has ended. Where it has failed and there is no other connection, those who wait
    /// are told; otherwise they go on waiting for one of the others.
    pub(super) fn opened(&self, failure: Option<&ClientError>) {
        let refused = {
            let mut state = lock(&self.state);
            state.opening = state.opening.saturating_sub(1);
            state.not_before = failure.map(|_| Instant::now() + LOGIN_RETRY);
            // The failed one still has its seat.
            let others = state.connections.saturating_sub(1);
            if failure.is_some() && others == 0 { self.call_all(&mut state, |_| true) } else { Vec::new() }
        };
        for waiter in refused {
            waiter.refuse(failure.cloned().unwrap_or(ClientError::ServerUnreachable));
        }
    }

    /// A successor is one of the pool's connections now.
    pub(super) fn sat_down(&self) {
        lock(&self.state).connections += 1;
    }

    /// A connection's seat is free.
    pub(super) fn stood_up(&self) {
        let mut state = lock(&self.state);
        state.connections = state.connections.saturating_sub(1);
    }

    /// Whoever waits longest looks whether a connection may be opened.
    pub(super) fn wake_first(&self) {
        if self.is_waited_for() {
            let first = lock(&self.state).line.first().cloned();
            if let Some(waiter) = first {
                waiter.entry.wake();
            }
        }
    }

    /// Those who have waited for longer than `bound` are told; zero: nobody is.
    pub(super) fn end_long_waits(&self, bound: Duration) {
        if bound.is_zero() || !self.is_waited_for() {
            return;
        }
        let late = {
            let mut state = lock(&self.state);
            self.call_all(&mut state, |waiter| waiter.wait.since().is_some_and(|since| since.elapsed() >= bound))
        };
        late.iter().for_each(|waiter| waiter.refuse(ClientError::QueryWaitTimeout));
    }

    /// How many workers share the pool.
    pub(super) fn pools_workers(&self) -> usize {
        self.idle.len()
    }

    /// Whether another pool waits for room that an idle connection of this one takes.
    pub(super) fn pools_want_room(&self) -> bool {
        self.pools.is_wanted_by_neighbours(self)
    }

    /// Connections that are open or being opened, without those that are prepared for a switch.
    pub(in crate::proxy) fn connections(&self) -> usize {
        lock(&self.state).connections
    }
}
