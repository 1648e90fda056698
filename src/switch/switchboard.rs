//! Databases by name: gates, route and the sessions that are registered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::Notify;

use self::reading::Cells;
use super::gate::{Admission, Epoch, Gate};

mod delay;
mod reading;

/// Which of the two configured servers.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ServerRole {
    /// `[source]` of the configuration.
    Source,
    /// `[target]` of the configuration.
    Target,
}

impl ServerRole {
    /// The server on the other side of a cutover.
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl std::fmt::Display for ServerRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// Where a database's transactions run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// On this server since this epoch.
    To {
        /// The active server.
        server: ServerRole,
        /// The cutover that made it active; 0 for the original source.
        epoch: Epoch,
    },
    /// Nobody is known to be active; new sessions are refused with 57P03 and this reason (safe to show to clients).
    Unknown {
        /// Why, in words for a client.
        reason: String,
    },
}

/// What a backend of the old server needs to know when it is started from prepare on: the soft fence has already made
/// read-only the default, and a session of an acknowledged member must not feel it, nor keep it after an abort.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrepareWindow {
    /// The cutover being prepared.
    pub epoch: Epoch,
    /// `default_transaction_read_only` as it was for the database before the fence (`on` or `off`).
    pub earlier_read_only: String,
    /// Roles with a value of their own, for this database or everywhere, by name.
    pub earlier_of_roles: HashMap<String, String>,
}

impl PrepareWindow {
    /// The value that a backend of `role` would have started with before the fence.
    pub fn earlier_read_only_of(&self, role: &str) -> &str {
        self.earlier_of_roles.get(role).unwrap_or(&self.earlier_read_only)
    }
}

/// Who keeps a gate closed: it opens when nobody does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ClosedBy {
    /// A cutover, or nobody is known to be active.
    cutover: bool,
    /// PAUSE.
    operator: bool,
}

/// A cutover is under way: it alone may close and open the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cutover of this database is under way")]
pub struct CutoverUnderWay;

/// One database: its gate, its route and who is inside.
#[derive(Debug)]
pub struct Database {
    name: String,
    gate: Gate,
    /// Open only in a pause, for those who go on in it: see [`reading`].
    reads: Gate,
    /// None but those enter by it who end a prepared transaction.
    finishing: AtomicBool,
    route: ArcSwap<Route>,
    /// For the server that a cutover leads away from.
    prepare: ArcSwapOption<(ServerRole, PrepareWindow)>,
    /// The same for the server that a rollback leads back to, whose fence stands until it has.
    returning: ArcSwapOption<(ServerRole, PrepareWindow)>,
    members: Mutex<HashMap<u64, Arc<Cells>>>,
    next_member: AtomicU64,
    /// See [`delay`]; zero: writes are not slowed down.
    write_delay_us: AtomicU32,
    /// DISABLE: new sessions are refused.
    disabled: AtomicBool,
    /// A session left while the gate was fenced.
    left: Notify,
    /// Who keeps the gate closed. Locked for every change of the gate.
    closed_by: Mutex<ClosedBy>,
    /// The gate was opened, or the route became known or unknown.
    changed: Notify,
}

/// A session's registration; its cell is counted until this is dropped.
#[derive(Debug)]
pub struct Member {
    database: Arc<Database>,
    cells: Arc<Cells>,
    id: u64,
}

impl Member {
    /// The database this session belongs to.
    pub fn database(&self) -> &Arc<Database> {
        &self.database
    }

    /// Enters for one transaction, or `None` when the gate is fenced.
    pub fn try_enter(&self) -> Option<Admission> {
        self.database.gate.enter(&self.cells.any)
    }

    /// Enters, waiting while the gate is fenced. Cancel-safe: a dropped future leaves the cell idle.
    pub async fn enter(&self) -> Admission {
        loop {
            let changed = self.database.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(admission) = self.try_enter() {
                return admission;
            }
            changed.await;
        }
    }

    /// Leaves: the server has said `ReadyForQuery('I')`, or its process is known to be gone. Nothing else proves that
    /// a statement has ended.
    pub fn leave(&self) {
        if self.cells.leave(&self.database.gate, &self.database.reads) {
            self.database.left.notify_waiters();
        }
    }

    /// Whether this session is inside.
    pub fn is_inside(&self) -> bool {
        self.cells.is_busy()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.database.lock_members().remove(&self.id);
        self.database.left.notify_waiters();
    }
}

impl Database {
    fn new(name: &str, route: Route) -> Self {
        let epoch = match &route {
            Route::To { epoch, .. } => *epoch,
            Route::Unknown { .. } => Epoch(0),
        };
        Self {
            name: name.to_owned(),
            gate: Gate::open_at(epoch),
            reads: reading::closed(),
            finishing: AtomicBool::new(false),
            route: ArcSwap::from_pointee(route),
            prepare: ArcSwapOption::empty(),
            returning: ArcSwapOption::empty(),
            members: Mutex::new(HashMap::new()),
            next_member: AtomicU64::new(0),
            write_delay_us: AtomicU32::new(0),
            disabled: AtomicBool::new(false),
            left: Notify::new(),
            closed_by: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Registers a session.
    pub fn join(self: &Arc<Self>) -> Member {
        let id = self.next_member.fetch_add(1, Ordering::Relaxed);
        let cells = Arc::<Cells>::default();
        self.lock_members().insert(id, cells.clone());
        Member { database: self.clone(), cells, id }
    }

    /// The route. Meaningful only between entering and leaving; before that it may change at any moment.
    pub fn route(&self) -> Arc<Route> {
        self.route.load_full()
    }

    /// Whether the gate holds new transactions.
    pub fn is_fenced(&self) -> bool {
        self.gate.is_fenced()
    }

    /// The epoch of the gate.
    pub fn epoch(&self) -> Epoch {
        self.gate.epoch()
    }

    /// Set from the soft fence of a cutover that this process acknowledged to its end.
    pub fn prepare_window(&self) -> Option<Arc<(ServerRole, PrepareWindow)>> {
        self.prepare.load_full()
    }

    /// Opens or closes the prepare window, with the server that it is for.
    pub fn set_prepare_window(&self, window: Option<(ServerRole, PrepareWindow)>) {
        self.prepare.store(window.map(Arc::new));
    }

    /// Opens or closes the window of a server that a rollback leads back to.
    pub fn set_return_window(&self, window: Option<(ServerRole, PrepareWindow)>) {
        self.returning.store(window.map(Arc::new));
    }

    /// What a backend that `role` starts on `server` must be given as its read-only default; none: nothing.
    pub fn read_only_default(&self, server: ServerRole, role: &str) -> Option<String> {
        let windows = [self.returning.load_full(), self.prepare.load_full()];
        let window = windows.into_iter().flatten().find(|window| window.0 == server)?;
        Some(window.1.earlier_read_only_of(role).to_owned())
    }

    /// Holds new transactions from now on. Does not wait for those that run: see [`Database::wait_empty`].
    pub fn fence(&self) {
        let mut closed_by = self.lock_closed_by();
        closed_by.cutover = true;
        self.reads.fence();
        self.gate.fence();
        drop(closed_by);
        // Sessions between two statements of a pipeline look at the gate themselves; idle ones need no wake-up.
        self.left.notify_waiters();
    }

    /// How many sessions are inside.
    pub fn inside(&self) -> usize {
        self.lock_members().values().filter(|cells| cells.is_busy()).count()
    }

    /// Waits until nobody is inside. The gate must be fenced.
    pub async fn wait_empty(&self) {
        self.wait_until(|| self.inside() == 0).await;
    }

    /// Waits for something that is so only once somebody has left.
    async fn wait_until(&self, is_so: impl Fn() -> bool) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if is_so() {
                return;
            }
            left.await;
        }
    }

    /// Opens the gate on `server`. The caller has made the decision durable before.
    /// A PAUSE stays in force: the gate then moves to `epoch` and opens at RESUME.
    pub fn open(&self, server: ServerRole, epoch: Epoch) {
        let mut closed_by = self.lock_closed_by();
        self.reads.fence();
        self.route.store(Arc::new(Route::To { server, epoch }));
        closed_by.cutover = false;
        if closed_by.operator {
            self.gate.move_closed(epoch);
        } else {
            self.gate.open(epoch);
        }
        drop(closed_by);
        self.changed.notify_waiters();
    }

    /// Opens the gate where it stood: an abort. A PAUSE stays in force.
    pub fn reopen(&self) {
        let mut closed_by = self.lock_closed_by();
        self.reads.fence();
        closed_by.cutover = false;
        if !closed_by.operator {
            self.gate.open(self.gate.epoch());
        }
        drop(closed_by);
        self.changed.notify_waiters();
    }

    /// PAUSE: holds new transactions until [`Database::resume`], through a cutover that begins meanwhile. Does not wait
    /// for those that run: see [`Database::wait_empty`]. Returns false when it was paused already.
    pub fn pause(&self) -> Result<bool, CutoverUnderWay> {
        let mut closed_by = self.lock_closed_by();
        if closed_by.cutover || self.prepare.load().is_some() {
            return Err(CutoverUnderWay);
        }
        let first = !std::mem::replace(&mut closed_by.operator, true);
        if first {
            self.gate.fence();
        }
        drop(closed_by);
        self.left.notify_waiters();
        Ok(first)
    }

    /// RESUME: ends a PAUSE; the gate opens unless a cutover keeps it closed. Returns false when it was not paused.
    pub fn resume(&self) -> bool {
        let mut closed_by = self.lock_closed_by();
        let was_paused = std::mem::replace(&mut closed_by.operator, false);
        if was_paused && !closed_by.cutover {
            self.gate.open(self.gate.epoch());
        }
        drop(closed_by);
        self.changed.notify_waiters();
        was_paused
    }

    /// DISABLE and ENABLE: whether new sessions are refused. Those that are connected go on.
    pub fn set_disabled(&self, disabled: bool) {
        self.disabled.store(disabled, Ordering::Release);
    }

    /// Whether new sessions are refused.
    pub fn is_disabled(&self) -> bool {
        self.disabled.load(Ordering::Acquire)
    }

    /// Whether a PAUSE is in force.
    pub fn is_paused(&self) -> bool {
        self.lock_closed_by().operator
    }

    /// Whether a cutover keeps the gate closed, or nobody is known to be active.
    pub fn is_fenced_by_cutover(&self) -> bool {
        self.lock_closed_by().cutover
    }

    /// Says that nobody is known to be active. The gate is fenced; held sessions keep waiting for a verdict.
    pub fn set_unknown(&self, reason: String) {
        let mut closed_by = self.lock_closed_by();
        closed_by.cutover = true;
        self.reads.fence();
        self.gate.fence();
        self.route.store(Arc::new(Route::Unknown { reason }));
        drop(closed_by);
        self.changed.notify_waiters();
    }

    /// Resolves at the next change of gate or route.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock_closed_by(&self) -> std::sync::MutexGuard<'_, ClosedBy> {
        self.closed_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_members(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Cells>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a PAUSE of every database has found, and closed.
#[derive(Debug)]
pub struct PausedAll {
    /// Every database that was known.
    pub databases: Vec<Arc<Database>>,
    /// Those of them that were paused before.
    before: Vec<Arc<Database>>,
}

/// All databases that were ever asked for. Cloned as `Arc`.
#[derive(Debug)]
pub struct Switchboard {
    databases: RwLock<HashMap<String, Arc<Database>>>,
    /// Where a database runs that no cutover ever covered.
    initial: ArcSwap<Route>,
    /// PAUSE without a name: it holds for databases that nobody has asked for yet, too. Written under `databases`.
    paused: AtomicBool,
}

impl Switchboard {
    /// A switchboard whose databases start at `initial`.
    pub fn new(initial: Route) -> Self {
        Self {
            databases: RwLock::new(HashMap::new()),
            initial: ArcSwap::from_pointee(initial),
            paused: AtomicBool::new(false),
        }
    }

    /// The database `name`, made on first use. Whether it exists on the server is the server's business.
    pub fn database(&self, name: &str) -> Arc<Database> {
        if let Some(found) = self.databases.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return found.clone();
        }
        let mut databases = self.databases.write().unwrap_or_else(PoisonError::into_inner);
        let initial = self.initial.load();
        let made = databases.entry(name.to_owned()).or_insert_with(|| {
            let new = Database::new(name, (**initial).clone());
            if self.paused.load(Ordering::Acquire) {
                // Nobody can be cutting over what has just been made.
                let _first = new.pause();
            }
            Arc::new(new)
        });
        made.clone()
    }

    /// PAUSE of every database, and of those that are asked for later. All or none: where a cutover is under way, its
    /// database's name is returned and nothing is paused that was not before.
    pub fn pause_all(&self) -> Result<PausedAll, String> {
        let databases = self.databases.write().unwrap_or_else(PoisonError::into_inner);
        let (mut new, mut before): (Vec<&Arc<Database>>, Vec<_>) = (Vec::new(), Vec::new());
        for database in databases.values() {
            match database.pause() {
                Ok(true) => new.push(database),
                Ok(false) => before.push(database.clone()),
                Err(CutoverUnderWay) => {
                    new.into_iter().for_each(|database| _ = database.resume());
                    return Err(database.name().to_owned());
                }
            }
        }
        self.paused.store(true, Ordering::Release);
        Ok(PausedAll { databases: databases.values().cloned().collect(), before })
    }

    /// Ends that PAUSE as if it had not been: what was paused before it stays so.
    pub fn take_back(&self, paused: &PausedAll) {
        let databases = self.databases.write().unwrap_or_else(PoisonError::into_inner);
        self.paused.store(false, Ordering::Release);
        let was_open = |database: &&Arc<Database>| !paused.before.iter().any(|before| Arc::ptr_eq(before, database));
        for database in databases.values().filter(was_open) {
            database.resume();
        }
    }

    /// Whether PAUSE without a name is in force.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// RESUME of every database. Returns whether any was paused.
    pub fn resume_all(&self) -> bool {
        let databases = self.databases.write().unwrap_or_else(PoisonError::into_inner);
        let mut any = self.paused.swap(false, Ordering::AcqRel);
        for database in databases.values() {
            any |= database.resume();
        }
        any
    }

    /// The database `name`, if any session or cutover has asked for it. Use this for names that clients send before
    /// they are authenticated: it allocates nothing.
    pub fn existing(&self, name: &str) -> Option<Arc<Database>> {
        self.databases.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Where `name` runs, or would run, now. Allocates nothing, so it may be asked for names of strangers.
    pub fn route_of(&self, name: &str) -> Arc<Route> {
        self.existing(name).map_or_else(|| self.initial.load_full(), |database| database.route())
    }

    /// Every known database, by name.
    pub fn all(&self) -> Vec<Arc<Database>> {
        let mut all: Vec<_> = self.databases.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Where databases start that are asked for from now on.
    pub fn initial(&self) -> Arc<Route> {
        self.initial.load_full()
    }

    /// Sets where databases start that are asked for from now on.
    pub fn set_initial(&self, route: Route) {
        self.initial.store(Arc::new(route));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::Cell;

    #[test]
    fn a_fenced_gate_admits_nobody_and_keeps_its_epoch() {
        let gate = Gate::open_at(Epoch(3));
        let cell = Cell::new();
        assert_eq!(gate.enter(&cell), Some(Admission { epoch: Epoch(3) }));
        gate.fence();
        assert!(cell.is_busy(), "who is inside stays inside");
        assert!(cell.leave(&gate), "the leaver learns that somebody waits");
        assert_eq!(gate.enter(&cell), None);
        assert!(!cell.is_busy());
        gate.open(Epoch(4));
        assert_eq!(gate.enter(&cell), Some(Admission { epoch: Epoch(4) }));
    }

    #[tokio::test]
    async fn a_held_session_enters_on_the_new_server() {
        let board = Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) });
        let database = board.database("shop");
        let (first, second) = (database.join(), database.join());
        let admission = first.enter().await;
        assert_eq!(admission.epoch, Epoch(0));
        database.fence();
        assert!(second.try_enter().is_none());
        assert_eq!(database.inside(), 1);

        let waiting = tokio::spawn(async move { second.enter().await.epoch });
        let emptied = {
            let database = database.clone();
            tokio::spawn(async move { database.wait_empty().await })
        };
        tokio::task::yield_now().await;
        assert!(!emptied.is_finished());
        first.leave();
        emptied.await.expect("nobody is inside");
        database.open(ServerRole::Target, Epoch(1));
        assert_eq!(waiting.await.expect("entered"), Epoch(1));
        assert_eq!(*database.route(), Route::To { server: ServerRole::Target, epoch: Epoch(1) });
    }

    #[test]
    fn a_pause_and_a_cutover_each_keep_the_gate_closed() {
        let board = Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) });
        let database = board.database("shop");
        let member = database.join();
        assert_eq!(database.pause(), Ok(true));
        assert_eq!(database.pause(), Ok(false), "paused already");
        assert!(member.try_enter().is_none());
        // A cutover may begin and end while it is paused.
        database.fence();
        assert_eq!(database.pause(), Err(CutoverUnderWay));
        database.open(ServerRole::Target, Epoch(1));
        assert!(member.try_enter().is_none(), "still paused");
        assert_eq!(database.epoch(), Epoch(1));
        assert!(database.resume());
        assert_eq!(member.try_enter(), Some(Admission { epoch: Epoch(1) }));
        member.leave();
        // RESUME in the middle of a cutover ends the pause, not the cutover.
        assert_eq!(database.pause(), Ok(true));
        database.fence();
        assert!(database.resume());
        assert!(member.try_enter().is_none());
        database.reopen();
        assert!(member.try_enter().is_some());
        assert!(!database.resume(), "was not paused");
    }

    #[test]
    fn a_pause_of_all_that_is_taken_back_leaves_what_was_paused_before() {
        let board = Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) });
        let (shop, billing) = (board.database("shop"), board.database("billing"));
        assert_eq!(billing.pause(), Ok(true));
        let paused = board.pause_all().expect("no cutover");
        assert_eq!(paused.databases.len(), 2);
        let later = board.database("later");
        assert!(shop.is_paused() && later.is_paused());
        board.take_back(&paused);
        assert!(!board.is_paused() && !shop.is_paused() && !later.is_paused());
        assert!(billing.is_paused());
    }

    #[tokio::test]
    async fn a_session_that_ends_is_no_longer_waited_for() {
        let board = Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) });
        let database = board.database("shop");
        let member = database.join();
        let _ = member.enter().await;
        database.fence();
        drop(member);
        database.wait_empty().await;
    }
}
