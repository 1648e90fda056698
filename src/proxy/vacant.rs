//! Server connections that their clients have left, in session mode: each waits a little for another client, so that
//! who connects for every request costs the server no login.
//!
//! ```text
//! client leaves at a safe point ─▶ server_reset_query ─▶ waits (server_linger) ─▶ next client, or closed
//!                                  inside the gate       registered as ours       inside the gate
//! ```
//!
//! A client gets one only where a login of its own would have given the same: the same user, database, proof and startup
//! parameters. So RESET leads to what this client asked for, and no setting has to be brought to the connection. A fence
//! that is being raised changes what a login gives, too: what it was given against the fence, if anything, must be the
//! same, and one that has felt a fence is not kept. Nor is one with something that no command takes off again: a temporary
//! schema, which PREPARE TRANSACTION can tell, and a custom setting, which is empty after RESET and not unknown. Those that
//! functions make are asked for by the names that the database's own objects have for them.
//!
//! What must never happen here: a connection that is handed out while an answer is due on it, after its reset has failed
//! or has left anything that the server reports otherwise than at the login; one of another epoch, which may be one of
//! the server that was left.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::backend::{Backend, Heard};
use super::entry::SessionState;
use super::session::{End, Session};
use super::sessions::{PooledBackend, Sessions};
use crate::config::{Config, Pool};
use crate::postgres::ring::Ring;
use crate::postgres::{Login, ParkedConnection};
use crate::switch::{Epoch, ServerRole};

/// 0 where the session has never had anything temporary: a schema that was made for it stays, empty, until it ends.
///
/// The role that the login gave, by ALTER ROLE … SET or a startup parameter, is taken back first: before the minor releases
/// of November 2024, SET SESSION AUTHORIZATION DEFAULT, and so DISCARD ALL, left none.
const TEMPORARY_SCHEMA: &str = "RESET ROLE; SELECT pg_catalog.pg_my_temp_schema()";

/// 0 where, moreover, none of the custom settings with these names is left empty, as RESET leaves what was not set by the
/// login. Names beyond ASCII, which the session's encoding may not have, are not asked for.
fn nothing_left(names: &[String]) -> String {
    let literal = |name: &String| format!("E'{}'", name.replace('\\', "\\\\").replace('\'', "''"));
    let names: Vec<String> = names.iter().filter(|name| name.is_ascii()).map(literal).collect();
    if names.is_empty() {
        return TEMPORARY_SCHEMA.to_owned();
    }
    let names = names.join(", ");
    format!(
        "{TEMPORARY_SCHEMA}::pg_catalog.int8 OPERATOR(pg_catalog.+) (SELECT pg_catalog.count(*) \
         FROM pg_catalog.unnest(ARRAY[{names}]::pg_catalog.text[]) AS name \
         WHERE pg_catalog.current_setting(name, true) OPERATOR(pg_catalog.=) '')"
    )
}

/// How long a connection may take to be wiped, and to close.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a connection was like right after its login.
#[derive(Debug)]
pub(super) struct Origin {
    /// Stands for what the server reported then.
    reported: u64,
    /// The read-only default that it was given against a fence ([`super::backend::given_read_only`]).
    given: Option<String>,
    /// When it was opened.
    opened: Instant,
}

impl Origin {
    /// Of a connection on which nothing has been done yet. None: it must not be another client's, because it may have felt
    /// the fence of a cutover that this process knows nothing of.
    pub(super) fn of(backend: &Backend, given: Option<String>, opened: Instant) -> Option<Self> {
        let may_be_fenced = given.is_none() && backend.is_read_only();
        (!may_be_fenced).then(|| Self { reported: reported(backend), given, opened })
    }
}

/// Stands for what the server has reported. Compared within this process alone.
fn reported(backend: &Backend) -> u64 {
    let mut hasher = DefaultHasher::new();
    backend.connection.parameters.hash(&mut hasher);
    hasher.finish()
}

/// A connection without a client.
struct Vacant {
    connection: ParkedConnection,
    /// What it was opened with.
    login: Login,
    /// And was given beside that.
    given: Option<String>,
    /// The gate stood at this epoch all the time since it was opened.
    epoch: Epoch,
    opened: Instant,
    since: Instant,
    listed: Listed,
}

/// A backend's place among those that are known to be ours; given up when dropped.
struct Listed {
    sessions: Arc<Sessions>,
    backend: PooledBackend,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.sessions.forget_pooled(&self.backend);
    }
}

/// By database and user, the one that was left last at the end.
type Waiting = HashMap<(String, String), Vec<Vacant>>;

/// See the module. Shared by all workers.
pub(super) struct Vacancies {
    config: Arc<Config>,
    sessions: Arc<Sessions>,
    /// Where connections are closed.
    runtime: tokio::runtime::Handle,
    /// `None`: closed for good.
    waiting: Mutex<Option<Waiting>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vacancies {
    pub(super) fn new(config: Arc<Config>, sessions: Arc<Sessions>, runtime: tokio::runtime::Handle) -> Self {
        Self { config, sessions, runtime, waiting: Mutex::new(Some(HashMap::new())) }
    }

    fn settings(&self) -> &Pool {
        &self.config.pool
    }

    /// Whether connections are kept at all.
    fn is_on(&self) -> bool {
        let settings = self.settings();
        !settings.server_linger.is_zero() && !settings.server_reset_query.is_empty() && lock(&self.waiting).is_some()
    }

    /// A connection that is what `login` would give now, with this read-only default, for who is inside the gate at
    /// `epoch`.
    pub(super) fn take(
        &self,
        (login, given): (&Login, Option<&str>),
        server: ServerRole,
        epoch: Epoch,
    ) -> Option<(Backend, Option<Origin>)> {
        loop {
            let vacant = {
                let mut waiting = lock(&self.waiting);
                let of = waiting.as_mut()?.get_mut(&(login.database.clone(), login.user.clone()))?;
                let fits = |vacant: &Vacant| {
                    vacant.epoch == epoch
                        && vacant.listed.backend.server == server
                        && vacant.given.as_deref() == given
                        && vacant.login.is_same_as(login)
                };
                let at = of.iter().rposition(fits)?;
                of.remove(at)
            };
            // One that cannot be registered, for want of file descriptors or the like, is closed by being dropped.
            let Ok(connection) = vacant.connection.resume() else { continue };
            let mut backend = Backend { connection, server };
            if backend.listen_in_anew() == Heard::Unusable {
                tracing::debug!(pid = backend.connection.pid, "a connection that waited is of no use any more");
                continue;
            }
            let origin = Origin::of(&backend, vacant.given, vacant.opened);
            return Some((backend, origin));
        }
    }

    /// Keeps a connection that has been wiped. The caller is inside the gate at `epoch`.
    fn keep(&self, login: Login, backend: Backend, origin: Origin, epoch: Epoch) {
        let Origin { given, opened, .. } = origin;
        let (server, pid) = (backend.server, backend.connection.pid);
        let Ok(connection) = backend.connection.park() else { return };
        let (database, user) = (login.database.clone(), login.user.clone());
        let listing = PooledBackend { database, user, server, pid, opened };
        self.sessions.note_pooled(listing.clone());
        let listed = Listed { sessions: self.sessions.clone(), backend: listing };
        let most = self.settings().sizes(&login.database, &login.user).pool_size;
        let key = (login.database.clone(), login.user.clone());
        let vacant = Vacant { connection, login, given, epoch, opened, since: Instant::now(), listed };
        let unwanted = match lock(&self.waiting).as_mut() {
            Some(waiting) if !self.is_retired(&vacant) => {
                let of = waiting.entry(key).or_default();
                of.push(vacant);
                (of.len() > most).then(|| of.remove(0))
            }
            Some(_) | None => Some(vacant),
        };
        self.close(unwanted);
    }

    fn close(&self, gone: impl IntoIterator<Item = Vacant>) {
        gone.into_iter().for_each(|vacant| drop(self.runtime.spawn(end(vacant))));
    }

    /// Takes out those for which `wanted` holds.
    fn take_out(&self, wanted: impl Fn(&Vacant) -> bool) -> Vec<Vacant> {
        let mut waiting = lock(&self.waiting);
        let Some(waiting) = waiting.as_mut() else { return Vec::new() };
        let gone = waiting.values_mut().flat_map(|of| of.extract_if(.., |vacant| wanted(vacant))).collect();
        waiting.retain(|_, of| !of.is_empty());
        gone
    }

    /// Once a second: what has waited or lived for long enough is closed.
    pub(super) fn look_after(&self) {
        let now = Instant::now();
        let (linger, lifetime) = (self.settings().server_linger, self.settings().server_lifetime);
        let is_old = |vacant: &Vacant| !lifetime.is_zero() && now.saturating_duration_since(vacant.opened) >= lifetime;
        self.close(self.take_out(|vacant| now.saturating_duration_since(vacant.since) >= linger || is_old(vacant)));
    }

    /// RECONNECT was ordered for some database.
    pub(super) fn close_retired(&self) {
        self.close(self.take_out(|vacant| self.is_retired(vacant)));
    }

    fn is_retired(&self, vacant: &Vacant) -> bool {
        self.sessions.retired(&vacant.login.database).is_some_and(|by| vacant.opened <= by)
    }

    /// The gate of a database has moved: nothing of an earlier epoch is kept.
    pub(super) fn keep_only(&self, database: &str, epoch: Epoch) {
        self.close(self.take_out(|vacant| vacant.login.database == database && vacant.epoch != epoch));
    }

    /// The server has no room for one more connection: those that wait there make some. Whether there were any.
    pub(super) async fn make_room(&self, server: ServerRole) -> bool {
        let gone = self.take_out(|vacant| vacant.listed.backend.server == server);
        let ends: Vec<_> = gone.into_iter().map(|vacant| self.runtime.spawn(end(vacant))).collect();
        let any = !ends.is_empty();
        for end in ends {
            // One that panicked has ended too.
            let _ended = end.await;
        }
        any
    }

    /// Closes them all, and keeps none any more.
    pub(super) fn shut(&self) {
        let all = lock(&self.waiting).take();
        self.close(all.into_iter().flat_map(HashMap::into_values).flatten());
    }
}

/// Returns when the server has closed the connection too, or has had time enough.
async fn end(vacant: Vacant) {
    let Vacant { connection, listed, .. } = vacant;
    if let Ok(connection) = connection.resume() {
        // Best effort: the server notices a closed socket too.
        let _closed = tokio::time::timeout(PATIENCE, connection.terminate()).await;
    }
    drop(listed);
}

impl Session {
    /// Whether the session ends so that its connection may be another client's. It must stand where nothing is asked,
    /// nothing is answered and no cancel is on its way.
    pub(super) fn is_vacated_by(&self, end: &End) -> bool {
        matches!(end, End::ClientLeft)
            && self.origin.is_some()
            && self.tracked.names().next().is_none()
            && !self.tracked.names_uncertain()
            && self.is_at_safe_point()
            && !self.ledger.is_uncertain()
            && self.moving.is_none()
            && self.worker.shared.vacancies.is_on()
    }

    /// Wipes the connection and keeps it for another client, unless the gate is closed or the server says anything but
    /// that it is as new.
    pub(super) async fn vacate(self: Box<Self>, mut backend: Backend) {
        let Self { worker, entry, member, login, epoch, origin, client, slot, .. } = *self;
        // The client is gone, and so is its place among the clients.
        drop((client, slot));
        let vacancies = &worker.shared.vacancies;
        // Outside the gate: a pause does not wait for it. A server that is shut would refuse it.
        let names = match worker.shared.switchboard.database(&login.database).is_fenced() {
            true => None,
            false => {
                let (server, known) = (backend.server, &worker.shared.sessions.catalogue_names);
                let read = known.lately(server, worker.shared.connector(server), &login.database, Instant::now());
                tokio::time::timeout(PATIENCE, read).await.ok().flatten()
            }
        };
        let admission = member.as_ref().and_then(|member| member.try_enter());
        let is_wiped = match (admission, &origin, names) {
            (Some(admission), Some(origin), Some(names)) if admission.epoch == epoch => {
                entry.set_state(SessionState::Orphan);
                let query = &vacancies.settings().server_reset_query;
                let look = nothing_left(&names);
                let wiped = tokio::time::timeout(PATIENCE, wipe(&mut backend, query, &look)).await == Ok(true);
                wiped && reported(&backend) == origin.reported
            }
            (Some(_) | None, ..) => false,
        };
        match origin {
            Some(origin) if is_wiped => vacancies.keep(login, backend, origin, epoch),
            Some(_) | None => {
                entry.leave_backend();
                drop(member);
                // The link may be gone; the server notices that too.
                let _closed = tokio::time::timeout(PATIENCE, backend.connection.terminate()).await;
            }
        }
    }
}

/// Whether the connection has been wiped, is idle, and nothing more has come.
async fn wipe(backend: &mut Backend, query: &str, look: &str) -> bool {
    let connection = &mut backend.connection;
    // The next client may be another worker's.
    if Ring::release(&mut connection.stream).await.is_err() {
        return false;
    }
    if !connection.read_buf.is_empty() {
        return false;
    }
    let Ok((status, left)) = connection.simple_queries(query, look).await else { return false };
    if status != b'I' || left != [[Some("0".to_owned())]] {
        return false;
    }
    // Of channels that the session listened to.
    connection.take_notifications();
    let is_idle = connection.transaction_status() == b'I' && connection.read_buf.is_empty();
    connection.read_buf = bytes::BytesMut::new();
    is_idle && backend.listen_in() != Heard::Unusable
}
