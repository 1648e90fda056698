//! The registry of sessions: what cutover and admin may know of them and order them to do.
//!
//! From outside a session is an [`Entry`]; see there how orders reach it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::{oneshot, watch};

use super::catalogue_names::CatalogueNames;
use super::client_error::ClientError;
use super::entry::{Entry, MoveOrder, MoveOutcome, Order, SessionState, SessionView, lock};
use super::shadow::{Desk, ShadowReads};
use super::turns::Turns;
use crate::switch::{Epoch, ServerRole};

/// Most backends of a database that are remembered when sessions have left them.
const LEFT_MAX: usize = 16_384;

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

/// All sessions of this process.
#[derive(Debug, Default)]
pub struct Sessions {
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    /// The proxy stops: who comes now is told so.
    closing: AtomicBool,
    /// Sessions that could not follow their database and were ended.
    left_behind: AtomicU64,
    /// Transactions that went on in a pause.
    reads: AtomicU64,
    /// The last move that was ordered for each database.
    ordered: Mutex<HashMap<String, MoveOrder>>,
    /// In which sessions open a backend for their move.
    pub(super) turns: Turns,
    pub(super) catalogue_names: CatalogueNames,
    /// Reads that run on the target too.
    pub(super) shadow: Desk,
    /// Backends of pools by database, whether a session has them now or none.
    pooled: Mutex<HashMap<(ServerRole, i32), PooledBackend>>,
    /// By database, backends that sessions have left since a move was ordered last.
    left: Mutex<HashMap<String, HashSet<(ServerRole, i32)>>>,
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

impl Registration {
    /// The session's backend is its own no more.
    pub(super) fn leave_backend(&self) {
        if let Some(left) = self.entry.backend() {
            self.sessions.note_left(&self.entry.database(), left);
        }
        self.entry.set_backend(None);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.sessions.entries).remove(&self.entry.id());
        self.leave_backend();
        // Whoever has found the entry before may order something yet.
        self.entry.take_no_more_orders();
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
        entries.sort_by_key(|entry| entry.id());
        entries
    }

    fn of(&self, databases: &[String]) -> Vec<Arc<Entry>> {
        self.entries().into_iter().filter(|entry| entry.is_of(databases)).collect()
    }

    /// Every session, oldest first.
    pub fn list(&self) -> Vec<SessionView> {
        self.entries().iter().map(|entry| entry.view()).collect()
    }

    /// Process ids of the backends on `server` that sessions of `database` run on or share, orphans included. On the
    /// other server the same numbers are other processes.
    pub fn backend_pids(&self, server: ServerRole, database: &str) -> Vec<i32> {
        let own = self.of(&[database.to_owned()]).into_iter().filter_map(|entry| entry.backend());
        let mut pids: Vec<i32> = own.filter(|(of, _)| *of == server).map(|(_, pid)| pid).collect();
        let is_there = |one: &&PooledBackend| one.server == server && one.database == database;
        pids.extend(lock(&self.pooled).values().filter(is_there).map(|one| one.pid));
        pids
    }

    /// Process ids of the backends from which sessions of `database` may have sent notifications on `server` since a move
    /// was ordered: who has sent some and is gone is among them.
    pub(super) fn senders(&self, server: ServerRole, database: &str) -> HashSet<i32> {
        let mut pids: HashSet<i32> = self.backend_pids(server, database).into_iter().collect();
        let left = lock(&self.left);
        let left = left.get(database).into_iter().flatten();
        pids.extend(left.filter(|(of, _)| *of == server).map(|(_, pid)| *pid));
        pids
    }

    fn note_left(&self, database: &str, backend: (ServerRole, i32)) {
        let mut left = lock(&self.left);
        // Before any move has been ordered nobody will ask.
        let Some(left) = left.get_mut(database) else { return };
        // Long after a switch everybody has followed, and nobody asks any more.
        if left.len() < LEFT_MAX {
            left.insert(backend);
        }
    }

    /// A backend of a pool of `database`.
    pub(super) fn note_pooled(&self, backend: PooledBackend) {
        lock(&self.pooled).insert((backend.server, backend.pid), backend);
    }

    /// It is gone, or will be soon.
    pub(super) fn forget_pooled(&self, backend: &PooledBackend) {
        let mut pooled = lock(&self.pooled);
        let key = (backend.server, backend.pid);
        // The server may have given the same process id to the next one meanwhile.
        if pooled.get(&key) == Some(backend) {
            pooled.remove(&key);
            self.note_left(&backend.database, key);
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

    /// Whether the backend of a pool on `server` with this process id is still open though it was retired.
    pub fn is_retired(&self, server: ServerRole, pid: i32) -> bool {
        let known = lock(&self.pooled).get(&(server, pid)).map(|backend| (backend.database.clone(), backend.opened));
        known.is_some_and(|(database, opened)| self.retired(&database).is_some_and(|by| opened <= by))
    }

    /// Backends of pools that no session holds now, by server and process id.
    pub fn idle_backends(&self) -> Vec<PooledBackend> {
        let held: HashSet<_> = self.entries().iter().filter_map(|entry| entry.backend()).collect();
        let is_idle = |one: &&PooledBackend| !held.contains(&(one.server, one.pid));
        let mut idle: Vec<_> = lock(&self.pooled).values().filter(is_idle).cloned().collect();
        idle.sort_by_key(|one| (one.server, one.pid));
        idle
    }

    /// Sessions of `database` whose client is gone while their backend may still be at work.
    pub fn orphans(&self, database: &str) -> Vec<SessionView> {
        self.views(database, |state| state == SessionState::Orphan)
    }

    /// Sessions of `database` that are inside, orphans included.
    pub fn stragglers(&self, database: &str) -> Vec<SessionView> {
        let inside = |state| matches!(state, SessionState::Active | SessionState::Reading | SessionState::Orphan);
        self.views(database, inside)
    }

    fn views(&self, database: &str, wanted: impl Fn(SessionState) -> bool) -> Vec<SessionView> {
        let entries = self.of(&[database.to_owned()]);
        entries.iter().filter(|entry| wanted(entry.state())).map(|entry| entry.view()).collect()
    }

    /// Replication connections of `database`, which no gate waits for.
    pub fn replicating(&self, database: &str) -> Vec<SessionView> {
        self.views(database, |state| state == SessionState::Replication)
    }

    /// Ends these sessions; their clients get a FATAL error with this code and message. A session that is inside keeps
    /// counting as inside until its backend's end is proven. Returns how many there were.
    pub fn end(&self, session_ids: &[u64], sqlstate: &str, message: &str) -> usize {
        let error = ClientError::Ordered { code: sqlstate.to_owned(), message: message.to_owned() };
        let entries = self.entries();
        let chosen: Vec<_> = entries.iter().filter(|entry| session_ids.contains(&entry.id())).collect();
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

    /// Orders for shadow reads; `None`: there is no proxy yet.
    pub fn shadow_reads(&self) -> Option<ShadowReads> {
        self.shadow.reads()
    }

    /// How many sessions were ended since the start because they could not follow their database.
    pub fn left_behind(&self) -> u64 {
        self.left_behind.load(Ordering::Relaxed)
    }

    pub(super) fn count_left_behind(&self) {
        self.left_behind.fetch_add(1, Ordering::Relaxed);
    }

    /// How many transactions since the start were let in because they read, while a cutover held everybody else.
    pub fn reads_in_pauses(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    pub(super) fn count_read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
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
            lock(&self.left).insert(database.clone(), HashSet::new());
        }
        // Its connections are closed before anything is counted or looked for. Who begins later finds the order.
        self.shadow.end("a cutover is prepared").await;
        self.turns.begin(self.of(databases).len());
        self.ask(databases, deadline, |order, reply| Order::Prepare { order, reply }).await
    }

    /// Whether a move has been ordered that the database, at this epoch, has not seen yet.
    pub(super) fn is_to_move(&self, database: &str, epoch: Epoch) -> bool {
        lock(&self.ordered).get(database).is_some_and(|order| order.epoch > epoch)
    }

    /// Whether this is the last move that was ordered for the database, and it has not been given up.
    pub(super) fn is_ordered(&self, database: &str, order: MoveOrder) -> bool {
        lock(&self.ordered).get(database) == Some(&order)
    }

    /// The gates have just been closed: sessions at a safe point bring over at once what changed since
    /// [`Sessions::prepare_moves`], the others as soon as they are. [`Sessions::settle_moves`] waits for all of them.
    pub fn begin_settling(&self, databases: &[String]) {
        self.turns.hurry();
        let ordered = lock(&self.ordered).clone();
        for entry in self.of(databases).into_iter().filter(is_movable) {
            let Some(order) = ordered.get(&entry.database()).copied() else { continue };
            if entry.is_settled_for(order.epoch) {
                continue;
            }
            // Nobody hears this answer; the one that counts is asked for later.
            let (reply, _) = oneshot::channel();
            entry.order(Order::Settle { order, reply });
        }
    }

    /// In the pause, with nobody inside: brings over what changed since [`Sessions::prepare_moves`], or everything where
    /// nothing was prepared, as with sessions that logged in meanwhile. Who has been idle is not woken for it.
    pub async fn settle_moves(&self, databases: &[String], deadline: Instant) -> Vec<MoveReport> {
        self.ask(databases, deadline, |order, reply| Order::Settle { order, reply }).await
    }

    /// For how long each session of these databases has been held that is.
    pub fn holds(&self, databases: &[String]) -> Vec<Duration> {
        let now = Instant::now();
        let held = self.of(databases).into_iter().filter(|entry| entry.state() == SessionState::Held);
        held.map(|entry| entry.ages(now).0).collect()
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
            let answer = if entry.is_settled_for(wanted.epoch) {
                None
            } else {
                let (reply, answer) = oneshot::channel();
                entry.order(order(wanted, reply));
                Some(answer)
            };
            Some(async move {
                let Some(answer) = answer else {
                    return Some(MoveReport { session: entry.view(), outcome: MoveOutcome::Ready });
                };
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

    #[test]
    fn a_process_id_is_one_of_a_servers() {
        let sessions = Arc::new(Sessions::default());
        let (database, user) = ("shop".to_owned(), "ann".to_owned());
        let here = PooledBackend { database, user, server: ServerRole::Source, pid: 7, opened: Instant::now() };
        let there = PooledBackend { server: ServerRole::Target, ..here.clone() };
        sessions.note_pooled(here.clone());
        sessions.note_pooled(there.clone());
        assert_eq!(sessions.idle_backends(), [here.clone(), there.clone()]);
        let session = sessions.register("a".to_owned());
        session.set_identity("ann", "shop", "", 1, false);
        session.set_backend(Some((ServerRole::Source, 7)));
        assert_eq!(sessions.idle_backends(), [there]);
        sessions.forget_pooled(&here);
        session.set_backend(Some((ServerRole::Source, 8)));
        assert_eq!(sessions.backend_pids(ServerRole::Source, "shop"), [8]);
        assert_eq!(sessions.backend_pids(ServerRole::Target, "shop"), [7]);
        sessions.retire("shop");
        assert!(sessions.is_retired(ServerRole::Target, 7) && !sessions.is_retired(ServerRole::Source, 7));
    }

    #[tokio::test]
    async fn who_has_nothing_to_bring_over_is_not_woken_in_the_pause() {
        let sessions = Arc::new(Sessions::default());
        let session = sessions.register("a".to_owned());
        session.set_identity("ann", "shop", "", 1, false);
        session.set_state(SessionState::Idle);
        let order = MoveOrder { to: ServerRole::Target, epoch: Epoch(7) };
        let databases = ["shop".to_owned()];
        lock(&sessions.ordered).insert("shop".to_owned(), order);

        session.set_settled_for(Some(Epoch(7)));
        sessions.begin_settling(&databases);
        let reports = sessions.settle_moves(&databases, Instant::now()).await;
        assert_eq!(reports.iter().map(|report| &report.outcome).collect::<Vec<_>>(), [&MoveOutcome::Ready]);
        assert!(!session.has_orders());

        // It has run something since, or was settled for another cutover.
        for settled_for in [None, Some(Epoch(6))] {
            session.set_settled_for(settled_for);
            let reports = sessions.settle_moves(&databases, Instant::now()).await;
            assert_eq!(reports.iter().map(|report| &report.outcome).collect::<Vec<_>>(), [&MoveOutcome::Busy]);
            assert!(session.has_orders());
            drop(session.take_orders());
        }
    }

    #[tokio::test]
    async fn who_orders_something_of_a_session_that_has_just_ended_is_answered() {
        let sessions = Arc::new(Sessions::default());
        let session = sessions.register("a".to_owned());
        // Found before the session ended, and told after.
        let entry = Arc::clone(&session);
        drop(session);
        let (done, dealt_with) = oneshot::channel();
        entry.order(Order::Cancel { done });
        assert!(dealt_with.await.is_err(), "dropped");
        assert!(!entry.has_orders());
    }
}
