//! From an accepted socket to a session with a backend, or to one of the other things a client may want.

mod pooled;
mod standing;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, pin::pin};

use self::standing::Proof;
use super::access::Access;
use super::auth::hba::{Client, Demand, Verdict};
use super::auth::{Asked, AuthError, authenticate};
use super::cancel::{CancelKey, Holder};
use super::client_error::ClientError;
use super::entry::{Entry, Order, SessionState};
use super::handshake::{ClientChannel, Entrance, HandshakeError, Peer, Request, negotiate};
use super::limits::Place;
use super::listener::Accepted;
use super::pooled::{Pooled, PooledSession};
use super::session::{Link, Session};
use super::sessions::Registration;
use super::vacant::Origin;
use super::worker::{LocalDatabase, Worker};
use super::{CONSOLE_ALIAS, CONSOLE_DATABASE, Shared, backend};
use crate::config::PoolMode;
use crate::config::ReplicationPolicy;
use crate::postgres::{Credential, Login, Stream};
use crate::switch::{Admission, Member, Route, ServerRole};
use crate::telemetry::metrics::AuthFailure;
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;
use crate::wire::startup::{Replication, SessionStartup};
use tokio::time::Instant;

/// Connections beyond the limit that may be in handshake at one time, so that they can be told; others are just closed.
const REFUSALS_MAX: usize = 1000;

/// How long a connection that only asked may take to close.
const CLOSING: Duration = Duration::from_secs(5);

/// What physical replication is counted as where its client names no database that is known: the name that libpq sends.
const PHYSICAL_REPLICATION: &str = "replication";

/// Bytes that a client may send while its login is held.
const EARLY_INPUT_MAX: usize = 64 * 1024;

/// A client's place among those that are connected.
pub(super) struct ClientSlot {
    shared: Arc<Shared>,
    /// How many were connected with it.
    number: usize,
    /// Its places among those of its role, database and address.
    places: Vec<Place>,
}

impl ClientSlot {
    fn take(shared: &Arc<Shared>) -> Self {
        let number = shared.clients.fetch_add(1, Ordering::AcqRel) + 1;
        Self { shared: shared.clone(), number, places: Vec::new() }
    }

    fn excess(&self) -> usize {
        self.number.saturating_sub(self.shared.limits.load().max_client_connections)
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.shared.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The client is not let in, or is gone.
enum Refused {
    With(ClientError),
    Lost,
}

impl From<io::Error> for Refused {
    fn from(_: io::Error) -> Self {
        Self::Lost
    }
}

/// A client that is logged in.
pub(super) enum Served {
    /// With a backend of its own.
    Alone(Box<Session>),
    /// With one of the pool's for each transaction.
    Pooled(Box<PooledSession>),
}

/// Takes a connection through handshake, authentication and login. `None`: it is dealt with.
pub(super) async fn log_in(worker: &Rc<Worker>, accepted: Accepted) -> Option<Served> {
    let shared = &worker.shared;
    let slot = ClientSlot::take(shared);
    if slot.excess() > REFUSALS_MAX {
        return None;
    }
    let mut peer = Peer::new(accepted.peer);
    let channel = ClientChannel::new(accepted.into_stream().ok()?);
    let deadline = tokio::time::Instant::now() + shared.limits.load().login_bound();
    let access = shared.access.load_full();
    let entrance = Entrance { tls: access.tls.as_ref(), balancers: &access.balancers };
    let negotiation = async {
        tokio::select! {
            negotiated = negotiate(channel, &entrance, &mut peer) => Some(negotiated),
            // Whoever has not said what it wants yet is not told either.
            () = shared.tasks.stopping() => None,
        }
    };
    let (channel, startup) = match tokio::time::timeout_at(deadline, negotiation).await.ok().flatten() {
        Some(Ok((channel, Request::Session(startup)))) => (channel, startup),
        Some(Ok((channel, Request::Cancel { pid, key }))) => {
            cancel(shared, channel, pid, &key).await;
            return None;
        }
        Some(Err(error)) => {
            log_handshake(&peer.shown(), &error);
            return None;
        }
        // PostgreSQL too closes without a word when authentication_timeout ends before the startup packet came.
        None => return None,
    };
    let registration = shared.sessions.register(peer.shown());
    let proof = Proof::default();
    let mut login = LoginInProgress { worker, access, channel, peer, startup, proof, registration, slot, deadline };
    let ready = tokio::select! {
        ready = login.until_ready() => ready,
        // Who never ends its login must not keep us until client_login_timeout.
        () = shared.tasks.stopping() => Err(Refused::With(ClientError::Terminated)),
    };
    match ready {
        Ok(Done::Session(parts)) => {
            Some(Served::Alone(Box::new(Session::start(worker.clone(), login.finish(), *parts))))
        }
        Ok(Done::Pooled(parts)) => {
            Some(Served::Pooled(Box::new(PooledSession::start(worker.clone(), login.finish(), *parts))))
        }
        Ok(Done::Console) => {
            login.hand_to_console().await;
            None
        }
        Err(Refused::With(error)) => {
            login.log_refusal(&error);
            if let Some(full) = error.full() {
                login.shared().metrics.clients_refused.with_label_values(&[full.as_str()]).inc();
            }
            login.channel.refuse(&error).await;
            None
        }
        Err(Refused::Lost) => None,
    }
}

fn log_handshake(address: &str, error: &HandshakeError) {
    match error {
        HandshakeError::Refused(refused) => {
            tracing::info!(client = address, sqlstate = refused.code(), "client refused in the handshake");
        }
        HandshakeError::Header(error) => tracing::warn!(
            client = address,
            %error,
            "connection closed: from this address a PROXY protocol header must come first (listen.proxy_protocol_from)"
        ),
        HandshakeError::NoAlpn => tracing::info!(client = address, %error, "client refused in the handshake"),
        // Port scanners and health checks do this all day.
        HandshakeError::Lost(cause) => tracing::debug!(client = address, %cause, "client lost in the handshake"),
    }
}

/// Passes a CancelRequest to its session. The connection is closed when the cancel has been dealt with, as PostgreSQL
/// does; the requester learns nothing else.
async fn cancel(shared: &Shared, channel: ClientChannel, pid: i32, key: &[u8]) {
    if !cancel_own(shared, pid, key).await
        && let Some(rendezvous) = &shared.rendezvous
    {
        // It may be a session of a process that this one has taken over from.
        rendezvous.pass_cancel(pid, key).await;
    }
    drop(channel);
}

/// Passes a cancel to its session, or to what waits in the console, if the key is one of this process. Returns when it
/// was dealt with.
pub(super) async fn cancel_own(shared: &Shared, pid: i32, key: &[u8]) -> bool {
    let entry = match shared.keys.find(pid, key) {
        None => return false,
        Some(Holder::Console(asked)) => {
            asked.notify_waiters();
            return true;
        }
        Some(Holder::Session(entry)) => entry,
    };
    let (done, dealt_with) = tokio::sync::oneshot::channel();
    entry.order(Order::Cancel { done });
    // An error means that the session has ended: dealt with.
    let bound = shared.limits.load().login_bound();
    let _dropped = tokio::time::timeout(bound, dealt_with).await;
    true
}

/// What a login came to.
enum Done {
    Session(Box<Link>),
    Pooled(Box<Pooled>),
    Console,
}

/// What a client has once it is listed.
struct Introduced {
    key: CancelKey,
    /// How long it may wait for a server.
    patience: Duration,
}

struct LoginInProgress<'a> {
    worker: &'a Rc<Worker>,
    /// What was in force when the connection came.
    access: Arc<Access>,
    channel: ClientChannel,
    peer: Peer,
    startup: SessionStartup,
    proof: Proof,
    registration: Registration,
    slot: ClientSlot,
    deadline: tokio::time::Instant,
}

/// What a session takes over from its login.
pub(super) struct LoggedIn {
    pub(super) channel: ClientChannel,
    pub(super) registration: Registration,
    pub(super) slot: ClientSlot,
}

impl LoginInProgress<'_> {
    fn finish(self) -> LoggedIn {
        LoggedIn { channel: self.channel, registration: self.registration, slot: self.slot }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.worker.shared
    }

    /// Another failure that has nothing to do with who the client is: how many were not logged, if it is to be logged.
    fn complain(&self, kind: &'static str) -> Option<u64> {
        self.shared().complaints.tell(kind, Instant::now().into_std())
    }

    fn log_refusal(&self, error: &ClientError) {
        let others = match error.of_all() {
            Some(kind) => self.complain(kind),
            None => Some(0),
        };
        if let Some(others) = others {
            tracing::info!(
                client = self.registration.view().client_address,
                user = self.startup.user,
                database = self.startup.database,
                sqlstate = error.code(),
                others,
                "client refused"
            );
        }
    }

    async fn until_ready(&mut self) -> Result<Done, Refused> {
        let is_console = [CONSOLE_DATABASE, CONSOLE_ALIAS].contains(&self.startup.database.as_str());
        self.take_place(is_console)?;
        let demand = self.demand(is_console)?;
        let active = self.active_server(is_console)?;
        if self.startup.needs_negotiation() {
            message::negotiate_protocol_version(&mut self.channel.out, &self.startup.protocol_options);
        }
        let credential = self.authenticate(&demand, active).await?;
        self.proof = Proof::of(&demand, self.access.lookup.users.contains_key(&self.startup.user));
        if is_console {
            return self.may_use_console().map(|()| Done::Console);
        }
        let sizes = self.shared().config.pool.sizes(&self.startup.database, &self.startup.user);
        if sizes.mode == PoolMode::Transaction && self.startup.replication == Replication::Off {
            return self.join_pool(credential).await.map(|parts| Done::Pooled(Box::new(parts)));
        }
        self.connect(credential).await.map(|link| Done::Session(Box::new(link)))
    }

    /// Refuses who is too many before anything is looked up for it.
    fn take_place(&mut self, is_console: bool) -> Result<(), Refused> {
        let shared = self.worker.shared.clone();
        let limits = shared.limits.load();
        let excess = self.slot.excess();
        if excess > 0 && (excess > limits.reserved_admin_connections || !shared.console.admits(&self.startup.user)) {
            return Err(Refused::With(ClientError::TooManyClients));
        }
        if is_console {
            return Ok(());
        }
        let policy = shared.config.listen.replication;
        if policy == ReplicationPolicy::Refuse && self.startup.replication != Replication::Off {
            return Err(Refused::With(ClientError::ReplicationRefused));
        }
        let place = shared.places.of_address(&limits, self.registration.client_address());
        self.slot.places.extend(place.map_err(Refused::With)?);
        match shared.switchboard.existing(&self.startup.database) {
            Some(database) if database.is_disabled() => {
                Err(Refused::With(ClientError::DatabaseDisabled { database: self.startup.database.clone() }))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Where verifiers are read: the server that the database runs on. The console answers whoever is active, and when
    /// nobody is, so that it can be used to find out why.
    fn active_server(&self, is_console: bool) -> Result<ServerRole, Refused> {
        match &*self.shared().switchboard.route_of(&self.startup.database) {
            Route::To { server, .. } => Ok(*server),
            Route::Unknown { .. } if is_console => Ok(ServerRole::Source),
            Route::Unknown { reason } => Err(Refused::With(ClientError::RouteUnknown { reason: reason.clone() })),
        }
    }

    /// What the rules ask of this client, before anything is looked up for it.
    fn demand(&self, is_console: bool) -> Result<Demand, Refused> {
        let startup = &self.startup;
        // Rules know the console by one name, so that nobody gets round them by the other.
        let database = if is_console { CONSOLE_DATABASE } else { startup.database.as_str() };
        let client = Client {
            address: self.peer.address.map(|address| address.ip()),
            same_host: self.access.rules.ask_for_same_host() && self.peer.is_on(&self.channel.stream),
            tls: self.peer.secured.is_some(),
            user: &startup.user,
            database,
            physical_replication: !is_console && startup.replication == Replication::Physical,
        };
        let rejected = match self.access.rules.decide(&client) {
            Verdict::Ask(demand) => return Ok(demand.clone()),
            Verdict::Rejected => true,
            Verdict::NoEntry => false,
        };
        self.count_failure(AuthFailure::Rule);
        Err(Refused::With(ClientError::no_rule(&client, rejected)))
    }

    async fn authenticate(&mut self, demand: &Demand, active: ServerRole) -> Result<Credential, Refused> {
        let shared = self.worker.shared.clone();
        let asked = Asked {
            demand,
            maps: &self.access.maps,
            lookup: &self.access.lookup,
            secured: self.peer.secured.as_ref(),
            user: &self.startup.user,
        };
        let proof = authenticate(&mut self.channel, &asked, &shared.verifiers, active);
        let error = match tokio::time::timeout_at(self.deadline, proof).await {
            Ok(Ok(credential)) => return Ok(credential),
            Ok(Err(error)) => error,
            Err(_) => {
                self.count_failure(AuthFailure::Timeout);
                return Err(Refused::With(ClientError::LoginTimeout));
            }
        };
        Err(match error {
            AuthError::Refused(error) => {
                self.count_failure(AuthFailure::Method);
                Refused::With(error)
            }
            AuthError::NoProof { user, known } => {
                self.count_failure(if known { AuthFailure::Password } else { AuthFailure::UnknownUser });
                Refused::With(ClientError::password_failed(&user))
            }
            AuthError::Certificate { told, user, found } => {
                tracing::info!(user, ?found, "the client's certificate is missing, or is of another name");
                self.count_failure(AuthFailure::Certificate);
                Refused::With(told)
            }
            AuthError::NotPermitted { user } => {
                self.count_failure(AuthFailure::UnknownUser);
                Refused::With(ClientError::not_permitted(&user))
            }
            AuthError::Lookup(error) => {
                if let Some(others) = self.complain("authentication") {
                    tracing::error!(%error, others, "clients cannot be authenticated");
                }
                self.count_failure(AuthFailure::Unavailable);
                Refused::With(if error.is_unreachable() {
                    ClientError::ServerUnreachable
                } else {
                    ClientError::password_failed(&self.startup.user)
                })
            }
            AuthError::Lost(_) => Refused::Lost,
        })
    }

    fn count_failure(&self, reason: AuthFailure) {
        self.shared().metrics.auth_failures.with_label_values(&[reason.as_str()]).inc();
    }

    fn may_use_console(&self) -> Result<(), Refused> {
        let user = &self.startup.user;
        if self.shared().console.admits(user) {
            return Ok(());
        }
        Err(Refused::With(ClientError::ConsoleForbidden { user: user.clone() }))
    }

    /// Returns when the client has left the console. It is served on the threads of the runtime, because orders take
    /// their time, but its socket belongs to this worker: were the worker to end before it, as the last session's end
    /// would have it after the listeners are closed, the answer to the order to stop would never be read.
    async fn hand_to_console(mut self) {
        let shared = self.worker.shared.clone();
        let SessionStartup { user, .. } = self.startup;
        // Who orders a shutdown that waits for the sessions is not one of them.
        drop(self.registration);
        let (key, console_key) = shared.keys.issue_to_console();
        let runtime = shared.runtime.clone();
        let served = runtime.spawn(async move {
            // Held until the console is left, so that its clients count as clients.
            let _slot = self.slot;
            // It cancels nothing after that.
            let _key = key;
            if self.channel.input.is_empty() && self.channel.flush().await.is_ok() {
                shared.console.serve(self.channel.stream, user, console_key).await;
            }
        });
        // A console that panicked has reported it already.
        let _ended = served.await;
    }

    /// A database that nobody has been in yet is taken for one when the server has let this client into it: names that
    /// clients make up leave no gate, no pool and no metric behind. What is opened here is closed again.
    async fn meet(&self, login: &Login) -> Result<(), Refused> {
        let shared = self.shared();
        if shared.switchboard.existing(&login.database).is_some() {
            return Ok(());
        }
        let server = self.active_server(false)?;
        let connection = shared.connector(server).raw(login).await.map_err(|error| {
            tracing::info!(%error, "a client asks for a database that was not asked for before, and is not let in");
            Refused::With(backend::refusal(&error))
        })?;
        // Waited for: it may be the only one that the role may have. Best effort: the server notices a closed socket too.
        let _closed = tokio::time::timeout(CLOSING, connection.terminate()).await;
        Ok(())
    }

    /// Takes the places that limits leave for the client, and has it listed by its name.
    fn introduce(&mut self) -> Result<Introduced, Refused> {
        let SessionStartup { user, database, .. } = &self.startup;
        let limits = self.shared().limits.load_full();
        let places = self.shared().places.of_session(&limits, user, database).map_err(Refused::With)?;
        let key = self.shared().keys.issue(&self.registration);
        let application_name = self.startup.parameter("application_name").unwrap_or_default();
        let tls = matches!(self.channel.stream, Stream::Tls(_));
        self.registration.set_identity(user, database, application_name, key.pid, tls);
        let patience = limits.timeouts_of(user, database).query_wait;
        self.slot.places.extend(places);
        Ok(Introduced { key, patience })
    }

    /// What the client logs in as; its parameters are moved into it.
    fn login(&mut self, credential: Credential) -> Login {
        let SessionStartup { user, database, parameters, .. } = &mut self.startup;
        Login { user: user.clone(), database: database.clone(), credential, parameters: std::mem::take(parameters) }
    }

    /// Waits for admission and opens the backend inside it, so that a cutover never meets a login half done.
    async fn connect(&mut self, credential: Credential) -> Result<Link, Refused> {
        let exempt = self.startup.replication != Replication::Off;
        let is_physical = self.startup.replication == Replication::Physical;
        if is_physical && self.shared().switchboard.existing(&self.startup.database).is_none() {
            // The server takes any name then, so an invented one must not be believed.
            PHYSICAL_REPLICATION.clone_into(&mut self.startup.database);
        }
        let Introduced { mut key, patience } = self.introduce()?;
        let login = self.login(credential);
        self.meet(&login).await?;
        let local = self.worker.database(&login.database);
        let member = local.database.join();
        let admission = admit(&mut self.channel, &local, &member, &self.registration, patience).await?;
        let server = match &*local.database.route() {
            Route::To { server, .. } => *server,
            Route::Unknown { reason } => {
                return Err(Refused::With(ClientError::RouteUnknown { reason: reason.clone() }));
            }
        };
        let given = backend::given_read_only(&login, &local.database, server);
        let vacancies = &self.shared().vacancies;
        let vacant = (!exempt).then(|| vacancies.take((&login, given.as_deref()), server, admission.epoch)).flatten();
        let (backend, origin) = match vacant {
            Some(vacant) => vacant,
            None => {
                let opened = backend::open_noting(self.shared(), &login, &local.database, server).await;
                let (backend, given) = opened.map_err(|error| {
                    if let Some(others) = self.complain("backend") {
                        tracing::warn!(%error, others, "no backend for a client");
                    }
                    Refused::With(backend::refusal(&error))
                })?;
                let origin = Origin::of(&backend, given, Instant::now().into_std()).filter(|_| !exempt);
                (backend, origin)
            }
        };
        key.take_pid(backend.connection.pid);
        self.registration.set_client_pid(key.pid);
        let out = &mut self.channel.out;
        for (name, value) in &backend.connection.parameters {
            message::parameter_status(out, name, value);
        }
        message::backend_key_data(out, key.pid, &key.secret);
        message::ready_for_query(out, TransactionStatus::Idle);
        let state = if exempt { SessionState::Replication } else { SessionState::Idle };
        self.registration.set_backend(Some((backend.server, backend.connection.pid)));
        self.registration.set_state(state);
        // From here on a move that is ordered finds the session; only then may the coordinator stop waiting for it.
        member.leave();
        let member = (!exempt).then_some(member);
        Ok(Link { login, local, member, backend, epoch: admission.epoch, origin, key })
    }
}

/// Waits until the gate is open. A client that goes away meanwhile, or sends more than a client has reason to, ends it.
/// So does a PAUSE that lasts longer than `patience`, unless that is zero. After a pause it waits for its turn, where so
/// much is configured (`limits.resume_rate`).
async fn admit(
    channel: &mut ClientChannel,
    local: &LocalDatabase,
    member: &Member,
    entry: &Arc<Entry>,
    patience: Duration,
) -> Result<Admission, Refused> {
    let database = member.database();
    let mut patience_ends = Instant::now() + patience;
    let (mut was_held, mut turn) = (false, None);
    loop {
        let mut changed = pin!(database.changed());
        // Listening begins before looking, so that no change falls between.
        if futures_util::poll!(changed.as_mut()).is_ready() {
            continue;
        }
        if let Route::Unknown { reason } = &*database.route() {
            return Err(Refused::With(ClientError::RouteUnknown { reason: reason.clone() }));
        }
        was_held |= database.is_fenced();
        if was_held && !database.is_fenced() && turn.is_none() {
            turn = Some(local.next_turn());
        }
        if turn.is_none_or(|turn| turn <= Instant::now())
            && let Some(admission) = member.try_enter()
        {
            return Ok(admission);
        }
        if database.is_fenced() {
            turn = None;
        }
        tokio::select! {
            // Dropped and made anew in the next round.
            () = changed => {}
            // Only looks at the clock.
            () = tokio::time::sleep_until(turn.unwrap_or_else(Instant::now)), if turn.is_some() => {}
            // Cancel-safe: what was read is in the channel.
            read = channel.read_some(), if channel.input.len() < EARLY_INPUT_MAX => read?,
            // Only looks at the clock.
            () = tokio::time::sleep_until(patience_ends), if !patience.is_zero() && turn.is_none() => {
                if !database.is_fenced_by_cutover() {
                    return Err(Refused::With(ClientError::LoginWaitTimeout));
                }
                patience_ends = Instant::now() + patience;
            }
            // Looks at a flag only.
            () = entry.ordered() => {
                if let Some(error) = ended_by(entry) {
                    return Err(Refused::With(error));
                }
            }
        }
    }
}

/// The order to end, if there is one; a session in login has nothing to do for the others.
fn ended_by(entry: &Entry) -> Option<ClientError> {
    entry.take_orders().into_iter().find_map(|order| match order {
        Order::End(error) => Some(error),
        Order::Cancel { .. } | Order::Prepare { .. } | Order::Settle { .. } | Order::Discard | Order::Look => None,
    })
}
