//! One worker's part of a pool: its idle connections, and the task that opens, checks and closes them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;

use super::central::{Central, Waiter};
use super::link::Link;
use super::profile::Profile;
use super::registry::Seat;
use crate::postgres::ConnectError;
use crate::proxy::Shared;
use crate::proxy::backend;
use crate::proxy::client_error::ClientError;
use crate::proxy::entry::MoveOrder;
use crate::proxy::handoff::{HandoffError, Tracked, capture};
use crate::proxy::moves;
use crate::proxy::worker::LocalDatabase;
use crate::switch::{Database, Epoch, Route, ServerRole};

/// So many idle connections are looked at for one that is as the client needs it.
const LOOKED_AT: usize = 8;

/// See the module.
#[expect(clippy::vec_box, reason = "a link goes to sessions and lines as it is: its pointer is moved, not the link")]
pub(in crate::proxy) struct LocalPool {
    pub(in crate::proxy) central: Arc<Central>,
    shared: Arc<Shared>,
    pub(in crate::proxy) worker: usize,
    local: Rc<LocalDatabase>,
    /// The last one that was used is at the end.
    idle: RefCell<Vec<Box<Link>>>,
    /// Where the database runs, as of this epoch.
    route: Cell<Option<(Epoch, ServerRole)>>,
    /// Connections to this server are kept though it is not the active one: a cutover is being prepared.
    preparing: Cell<Option<MoveOrder>>,
    /// RECONNECT: connections that were opened by then are closed when nobody has them.
    retired: Cell<Option<Instant>>,
}

/// A connection could not be opened.
#[derive(Debug)]
enum Unopened {
    Connect(ConnectError),
    State(HandoffError),
    Nowhere(String),
}

impl Unopened {
    /// What those who wait are told, unless another attempt is worth making: somebody has ended the backend.
    fn words(&self) -> Option<ClientError> {
        match self {
            Self::Connect(error) => Some(backend::refusal(error)),
            Self::State(HandoffError::Lost { .. }) => None,
            Self::State(_) => Some(ClientError::ServerUnreachable),
            Self::Nowhere(reason) => Some(ClientError::RouteUnknown { reason: reason.clone() }),
        }
    }

    /// The same for who prepares a cutover.
    fn reason(&self) -> String {
        match self {
            Self::Connect(error) => moves::describe(error),
            Self::State(error) => error.to_string(),
            Self::Nowhere(reason) => reason.clone(),
        }
    }
}

impl LocalPool {
    pub(in crate::proxy) fn new(
        central: Arc<Central>,
        shared: Arc<Shared>,
        worker: usize,
        local: Rc<LocalDatabase>,
    ) -> Rc<Self> {
        let epoch = local.database.epoch();
        let retired = shared.sessions.retired(&central.database);
        let this = Self {
            central,
            shared,
            worker,
            local,
            idle: RefCell::default(),
            route: Cell::new(None),
            preparing: Cell::new(None),
            retired: Cell::new(retired),
        };
        this.read_route(epoch);
        Rc::new(this)
    }

    pub(in crate::proxy) fn database(&self) -> &Database {
        &self.local.database
    }

    /// Where the database runs at `epoch`, for who has been admitted at it.
    #[inline]
    pub(in crate::proxy) fn server_at(&self, epoch: Epoch) -> Option<ServerRole> {
        match self.route.get() {
            Some((known, server)) if known == epoch => Some(server),
            Some(_) | None => self.read_route(epoch),
        }
    }

    fn read_route(&self, epoch: Epoch) -> Option<ServerRole> {
        let Route::To { server, .. } = *self.local.database.route() else { return None };
        self.route.set(Some((epoch, server)));
        self.preparing.set(None);
        self.close_strays();
        let successors = |link: &mut Box<Link>| link.seat.serve();
        self.idle.borrow_mut().iter_mut().for_each(successors);
        Some(server)
    }

    /// An idle connection to `server`, best one that is set as `profile` says. None while others wait: they come first.
    pub(in crate::proxy) fn check_out(&self, profile: &Arc<Profile>, server: ServerRole) -> Option<Box<Link>> {
        if self.central.is_waited_for() {
            return None;
        }
        loop {
            let mut link = self.pick(profile, server)?;
            if link.is_fresh() {
                return Some(link);
            }
            link.close();
        }
    }

    fn pick(&self, profile: &Arc<Profile>, server: ServerRole) -> Option<Box<Link>> {
        let mut idle = self.idle.borrow_mut();
        let end = idle.len();
        let near = end.saturating_sub(LOOKED_AT);
        let fits = |link: &Link| link.server() == server && Arc::ptr_eq(&link.profile, profile);
        let at = match idle[near..].iter().rposition(|link| fits(link)) {
            Some(at) => near + at,
            None => idle.iter().rposition(|link| link.server() == server)?,
        };
        let link = idle.remove(at);
        self.central.set_idle(self.worker, idle.len());
        Some(link)
    }

    /// Gives a connection back that nothing is under way on.
    pub(in crate::proxy) fn give_back(&self, mut link: Box<Link>, now: Instant) {
        let settings = self.central.settings();
        let lifetime = settings.server_lifetime;
        let is_old = !lifetime.is_zero() && now.saturating_duration_since(link.opened) >= lifetime;
        if link.spoiled || is_old || self.is_retired(&link) || self.is_stray(&link) {
            link.close();
            return;
        }
        if !self.is_elsewhere(&link) {
            link.seat.serve();
        }
        link.idle_since = now;
        let mut idle = self.idle.borrow_mut();
        idle.push(link);
        self.central.set_idle(self.worker, idle.len());
        drop(idle);
        if self.central.is_waited_for() {
            self.serve_waiting();
        }
    }

    /// Hands idle connections to those who wait, on whatever worker.
    pub(in crate::proxy) fn serve_waiting(&self) {
        while self.central.is_waited_for() {
            let Some(link) = self.pop() else { return };
            if let Some(unwanted) = self.central.hand_over(link, self.worker) {
                let mut idle = self.idle.borrow_mut();
                idle.push(unwanted);
                self.central.set_idle(self.worker, idle.len());
            }
        }
    }

    /// The idle connection that was used last, if it is of any use.
    fn pop(&self) -> Option<Box<Link>> {
        loop {
            let mut idle = self.idle.borrow_mut();
            let at = idle.iter().rposition(|link| !self.is_elsewhere(link))?;
            let mut link = idle.remove(at);
            self.central.set_idle(self.worker, idle.len());
            drop(idle);
            if link.is_fresh() {
                return Some(link);
            }
            link.close();
        }
    }

    /// Joins the line. The session is woken when its turn has come.
    pub(in crate::proxy) fn wait(self: &Rc<Self>, waiter: &Arc<Waiter>) {
        self.central.join(waiter);
        self.open_for_waiting();
    }

    /// Gives up waiting.
    pub(in crate::proxy) fn stop_waiting(&self, waiter: &Arc<Waiter>) {
        if let Some(link) = self.central.leave(waiter) {
            self.give_back(link, Instant::now());
        }
    }

    /// Opens what is wanted and allowed.
    pub(in crate::proxy) fn open_for_waiting(self: &Rc<Self>) {
        while let Some(seat) = self.central.seat_for_waiting() {
            self.open(seat);
        }
    }

    /// Opens a connection to the active server in the background, for those who wait or will.
    fn open(self: &Rc<Self>, seat: Seat) {
        let this = self.clone();
        tokio::task::spawn_local(async move {
            match this.connect(seat, None).await {
                Ok(link) => {
                    this.central.opened(None);
                    this.give_back(link, Instant::now());
                }
                Err((unopened, seat)) => {
                    this.complain(&unopened);
                    this.central.opened(unopened.words().as_ref());
                    drop(seat);
                }
            }
        });
    }

    /// Opens one for after a switch. Nobody waits for it, so that nobody is told of its failure but who prepares the switch.
    async fn open_successor(self: Rc<Self>, to: ServerRole) -> Result<(), String> {
        match self.connect(self.central.seat_for_successor(), Some(to)).await {
            Ok(link) => {
                self.give_back(link, Instant::now());
                Ok(())
            }
            Err((unopened, _seat)) => {
                self.complain(&unopened);
                Err(unopened.reason())
            }
        }
    }

    fn complain(&self, unopened: &Unopened) {
        if let Some(others) = self.shared.complaints.tell("pool", Instant::now()) {
            let database = &self.central.database;
            tracing::warn!(database, error = ?unopened, others, "no connection for a pool");
        }
    }

    /// Inside the gate, so that a cutover never meets a login half done.
    async fn connect(&self, mut seat: Seat, other: Option<ServerRole>) -> Result<Box<Link>, (Unopened, Seat)> {
        let database = &self.local.database;
        let member = database.join();
        let server = match other {
            Some(server) => server,
            None => {
                let _admission = member.enter().await;
                match &*database.route() {
                    Route::To { server, .. } => *server,
                    Route::Unknown { reason } => return Err((Unopened::Nowhere(reason.clone()), seat)),
                }
            }
        };
        let login = self.central.login();
        let mut opened = match backend::open(&self.shared, &login, database, server).await {
            Ok(opened) => opened,
            Err(error) => return Err((Unopened::Connect(error), seat)),
        };
        seat.sit(server, opened.connection.pid);
        let mut notified = BytesMut::new();
        let profile = match capture(&mut opened.connection, &Tracked::new(), &[], &mut notified).await {
            Ok(state) => self.central.profile(state),
            Err(error) => return Err((Unopened::State(error), seat)),
        };
        Ok(Box::new(Link::new(opened, profile, seat)))
    }

    /// Opens as many connections to the other server as there are now, so that nobody has to log in after the switch. Fails
    /// where none could be opened: nobody could after the switch.
    pub(in crate::proxy) async fn prepare(self: Rc<Self>, order: MoveOrder) -> Result<(), String> {
        if self.preparing.replace(Some(order)) == Some(order) {
            return Ok(());
        }
        self.close_strays();
        let there = self.idle.borrow().iter().filter(|link| link.server() == order.to).count();
        let wanted = (self.central.connections() / self.central.pools_workers()).max(1);
        let missing = wanted.saturating_sub(there);
        let opening = (0..missing).map(|_| tokio::task::spawn_local(self.clone().open_successor(order.to)));
        let opening: Vec<_> = opening.collect();
        let mut failed = None;
        let mut opened = there;
        for one in opening {
            match one.await {
                Ok(Ok(())) => opened += 1,
                Ok(Err(reason)) => failed = Some(reason),
                Err(_) => {}
            }
        }
        // One of several that could not be opened is opened when it is needed.
        failed.filter(|_| opened == 0).map_or(Ok(()), Err)
    }

    /// A cutover was given up.
    pub(in crate::proxy) fn discard_prepared(&self) {
        self.preparing.set(None);
        self.close_strays();
    }

    fn is_retired(&self, link: &Link) -> bool {
        self.retired.get().is_some_and(|by| link.opened <= by)
    }

    /// RECONNECT was ordered for some database, maybe this one.
    pub(in crate::proxy) fn retire(&self) {
        self.retired.set(self.shared.sessions.retired(&self.central.database));
        self.close_idle(|link| self.is_retired(link));
    }

    /// Whether there is nothing here, nobody waits, and nothing has to be kept open.
    pub(in crate::proxy) fn is_empty(&self) -> bool {
        self.idle.borrow().is_empty() && !self.central.is_waited_for() && self.central.sizes.min_pool_size == 0
    }

    /// Whether the connection is not to where the database runs, as far as is known.
    fn is_elsewhere(&self, link: &Link) -> bool {
        self.route.get().is_some_and(|(_, server)| server != link.server())
    }

    fn is_stray(&self, link: &Link) -> bool {
        self.is_elsewhere(link) && self.preparing.get().is_none_or(|order| order.to != link.server())
    }

    fn close_strays(&self) {
        self.close_idle(|link| self.is_stray(link));
    }

    fn close_idle(&self, closes: impl Fn(&mut Link) -> bool) {
        let mut gone = Vec::new();
        {
            let mut idle = self.idle.borrow_mut();
            let mut at = 0;
            while at < idle.len() {
                if closes(&mut idle[at]) { gone.push(idle.remove(at)) } else { at += 1 }
            }
            self.central.set_idle(self.worker, idle.len());
        }
        gone.into_iter().for_each(|link| link.close());
    }

    /// Once a second: what is old, idle for long, lost or on the wrong server is closed, what is missing is opened.
    pub(in crate::proxy) fn look_after(self: &Rc<Self>) {
        let database = &self.local.database;
        if !database.is_fenced() {
            self.server_at(database.epoch());
        }
        if self.preparing.get().is_some_and(|order| !self.shared.sessions.is_ordered(&self.central.database, order)) {
            // Given up while no client was here to be told.
            self.discard_prepared();
        }
        // What its server has ended (a restart, `idle_session_timeout`) would count as one that clients can have, keep
        // the pool below its least size, and let a stranger who is given its process id one day pass for ours.
        self.close_idle(|link| !link.is_fresh());
        let now = Instant::now();
        let settings = self.central.settings();
        let (lifetime, idle_timeout) = (settings.server_lifetime, settings.server_idle_timeout);
        let mut spare = self.central.connections().saturating_sub(self.central.sizes.min_pool_size);
        let is_old = |link: &mut Link| !lifetime.is_zero() && now.saturating_duration_since(link.opened) >= lifetime;
        let unused = |link: &mut Link| !idle_timeout.is_zero() && link.idle_for(now) >= idle_timeout;
        self.close_idle(is_old);
        let spare = Cell::new(std::mem::take(&mut spare));
        self.close_idle(|link| {
            let closes = spare.get() > 0 && unused(link);
            spare.set(spare.get() - usize::from(closes));
            closes
        });
        if self.central.pools_want_room()
            && let Some(link) = self.pop()
        {
            link.close();
        }
        let limits = self.shared.limits.load();
        let patience = limits.timeouts_of(&self.central.user, &self.central.database).query_wait;
        self.central.end_long_waits(patience);
        if self.central.is_waited_for() {
            self.serve_waiting();
            self.open_for_waiting();
        }
        if !database.is_fenced()
            && let Some(seat) = self.central.seat_up_to(self.central.sizes.min_pool_size)
        {
            self.open(seat);
        }
    }
}

impl Drop for LocalPool {
    fn drop(&mut self) {
        self.central.set_idle(self.worker, 0);
    }
}
