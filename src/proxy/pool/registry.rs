//! All pools of this process, and the bounds over several of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::central::Central;
use crate::config::Config;
use crate::postgres::Credential;
use crate::proxy::sessions::{PooledBackend, Sessions};
use crate::switch::ServerRole;

/// See the module.
pub(in crate::proxy) struct Pools {
    config: Arc<Config>,
    /// Where backends of pools are listed that no session holds.
    pub(super) sessions: Arc<Sessions>,
    pools: Mutex<HashMap<(String, String), Arc<Central>>>,
    counts: Mutex<Counts>,
    /// One for each worker: somebody wants what lies idle there.
    desks: Box<[Notify]>,
}

/// Connections that are open or being opened.
#[derive(Debug, Default)]
struct Counts {
    of_database: HashMap<String, usize>,
    of_user: HashMap<String, usize>,
}

/// What a connection is counted as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// One of those that clients are given.
    Serving,
    /// It takes another one's place at a switch. Until then it is not counted: what is prepared must keep nobody waiting.
    Successor,
}

/// A connection's place among those that may be open; given up when dropped.
pub(in crate::proxy) struct Seat {
    central: Arc<Central>,
    standing: Standing,
    /// Known once the connection is open.
    backend: Option<PooledBackend>,
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").field("backend", &self.backend).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pools {
    pub(in crate::proxy) fn new(config: Arc<Config>, sessions: Arc<Sessions>) -> Self {
        let desks = (0..config.listen.workers.max(1)).map(|_| Notify::new()).collect();
        Self { config, sessions, pools: Mutex::default(), counts: Mutex::default(), desks }
    }

    /// The pool of `user` in `database`; its connections log in with what the last client has proved.
    pub(in crate::proxy) fn of(self: &Arc<Self>, database: &str, user: &str, credential: &Credential) -> Arc<Central> {
        let mut pools = lock(&self.pools);
        let pool = pools
            .entry((database.to_owned(), user.to_owned()))
            .or_insert_with(|| Arc::new(Central::new(self, &self.config, database, user)));
        pool.set_credential(credential);
        pool.clone()
    }

    /// Somebody wants what lies idle on `worker`.
    pub(super) fn call(&self, worker: usize) {
        if let Some(desk) = self.desks.get(worker) {
            desk.notify_one();
        }
    }

    /// Resolves when somebody has called.
    pub(in crate::proxy) async fn called(&self, worker: usize) {
        match self.desks.get(worker) {
            Some(desk) => desk.notified().await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn workers(&self) -> usize {
        self.desks.len()
    }

    /// A place for one more connection, if the bounds of its database and its user allow it.
    pub(super) fn count_up(&self, central: &Central) -> bool {
        self.count_up_if(central, |count, bound| bound == 0 || count < bound)
    }

    fn count_up_if(&self, central: &Central, allows: impl Fn(usize, usize) -> bool) -> bool {
        let mut counts = lock(&self.counts);
        let Counts { of_database, of_user } = &mut *counts;
        let (database, user) = (of_database.get(&central.database), of_user.get(&central.user));
        let has_room = |count: Option<&usize>, bound: usize| allows(count.copied().unwrap_or(0), bound);
        if !has_room(database, central.sizes.max_db_connections) || !has_room(user, central.sizes.max_user_connections)
        {
            return false;
        }
        *of_database.entry(central.database.clone()).or_default() += 1;
        *of_user.entry(central.user.clone()).or_default() += 1;
        true
    }

    fn count_down(&self, central: &Central) {
        let mut counts = lock(&self.counts);
        let Counts { of_database, of_user } = &mut *counts;
        for (counts, name) in [(of_database, &central.database), (of_user, &central.user)] {
            match counts.get_mut(name) {
                Some(count) if *count > 1 => *count -= 1,
                // Nothing is left: the name must not stay for ever.
                Some(_) | None => drop(counts.remove(name)),
            }
        }
    }

    /// Pools that no worker and no connection has any more.
    pub(in crate::proxy) fn forget_unused(&self) {
        lock(&self.pools).retain(|_, pool| Arc::strong_count(pool) > 1);
    }

    /// Pools that share a bound with `central`.
    fn neighbours(&self, central: &Central) -> Vec<Arc<Central>> {
        let pools = lock(&self.pools);
        let near = |pool: &&Arc<Central>| pool.database == central.database || pool.user == central.user;
        pools.values().filter(near).cloned().collect()
    }

    /// Whether some pool that shares a bound with `central` waits because that bound is reached.
    pub(super) fn is_wanted_by_neighbours(&self, central: &Central) -> bool {
        let bounded = central.sizes.max_db_connections > 0 || central.sizes.max_user_connections > 0;
        bounded && self.neighbours(central).iter().any(|pool| pool.is_starved() && !std::ptr::eq(&**pool, central))
    }
}

impl Seat {
    /// For a connection that is about to be opened; `central` has counted it.
    pub(super) fn new(central: Arc<Central>) -> Self {
        Self { central, standing: Standing::Serving, backend: None }
    }

    /// For a connection to the server that a cutover leads to.
    pub(super) fn of_successor(central: Arc<Central>) -> Self {
        Self { central, standing: Standing::Successor, backend: None }
    }

    /// Its connection is one of those that clients are given from now on.
    #[inline]
    pub(super) fn serve(&mut self) {
        if self.standing == Standing::Successor {
            self.standing = Standing::Serving;
            // The bounds over pools are met again when the old connections close.
            self.central.pools.count_up_if(&self.central, |_, _| true);
            self.central.sat_down();
        }
    }

    /// The connection is open, or was exchanged for this one: its backend is no stranger.
    pub(in crate::proxy) fn sit(&mut self, server: ServerRole, pid: i32) {
        if let Some(left) = self.backend.take() {
            self.central.pools.sessions.forget_pooled(&left);
        }
        let (database, user) = (self.central.database.clone(), self.central.user.clone());
        let backend = PooledBackend { database, user, server, pid, opened: Instant::now() };
        self.central.pools.sessions.note_pooled(backend.clone());
        self.backend = Some(backend);
    }
}

impl Seat {
    /// When its connection was opened, if it is.
    pub(super) fn opened(&self) -> Option<Instant> {
        self.backend.as_ref().map(|backend| backend.opened)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let pools = &self.central.pools;
        if let Some(backend) = &self.backend {
            pools.sessions.forget_pooled(backend);
        }
        if self.standing == Standing::Successor {
            return;
        }
        pools.count_down(&self.central);
        self.central.stood_up();
        for neighbour in pools.neighbours(&self.central) {
            neighbour.wake_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Server;

    #[test]
    fn a_pool_that_nobody_has_goes_and_leaves_no_name_behind() {
        let config = Arc::new(Config::new(Server::new("a", 1, "u"), Server::new("b", 1, "u")));
        let pools = Arc::new(Pools::new(config, Arc::default()));
        let credential = Credential::None;
        let pool = pools.of("shop", "ann", &credential);
        let mut seat = pool.seat_up_to(1).expect("room");
        seat.sit(ServerRole::Source, 7);
        drop(pool);
        pools.forget_unused();
        assert_eq!(lock(&pools.pools).len(), 1, "its connection is there");
        drop(seat);
        pools.forget_unused();
        assert!(lock(&pools.pools).is_empty());
        let counts = lock(&pools.counts);
        assert!(counts.of_database.is_empty() && counts.of_user.is_empty());
    }
}
