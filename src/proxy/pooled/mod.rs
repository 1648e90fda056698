//! Transaction mode: a client that has a server connection only while a transaction or statement runs.
//!
//! ```text
//! client ──read──▶ up.buffer ──pass──▶ up.out ──▶ connection       pass: the gate, names of statements, what texts leave
//! client ◀─write── down.buffer ◀─look── connection                 look: what answers ours, ReadyForQuery
//! ```
//!
//! # One transaction
//!
//! 1. Its first frame takes a connection out of the pool ([`super::pool`]), or waits for one, outside the gate; with the
//!    connection in hand it asks the gate, exactly as in session mode.
//! 2. A connection that is not set as this client has left its last one is made so ([`steps`]).
//! 3. Statements of the protocol have names of ours on the server; one that the connection lacks is prepared there first.
//! 4. `ReadyForQuery('I')` with nothing outstanding ends it: the connection goes back, and the gate is left.
//!
//! # What a session leaves behind
//!
//! After a transaction whose texts may have changed the session ([`super::handoff::traces`]) the server is asked for its
//! state. Settings and role become the client's *profile*, which whichever connection it gets next is given. What cannot
//! be given to another connection (LISTEN, advisory locks, temporary objects, cursors WITH HOLD, PREPARE) *pins*: from
//! then on the client is served as in session mode, on that connection, until it leaves.
//!
//! What must never happen here: a connection that is given back while an answer is due, a cancel is under way or its
//! settings are unknown; a byte of one of our own answers that reaches the client.

mod answers;
mod expected;
mod frames;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod held;
mod kept;
mod login;
mod passing;
mod shadow;
mod steps;
mod timeouts;
mod wire;

use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::io::AsyncWriteExt as _;

use self::expected::Expected;
use self::kept::Kept;
pub(super) use self::login::{known, learn, settings_of};
use super::brake::Brake;
use super::buffers::Buffer;
use super::cancel::CancelKey;
use super::client_error::ClientError;
use super::entry::SessionState;
use super::handoff::{Tie, Traces, Tracked};
use super::login::{ClientSlot, LoggedIn};
use super::orphan;
use super::pool::{Link, LocalPool, Profile, Reported, Taken, Waiter};
use super::session::{End, Session};
use super::sessions::Registration;
use super::shadow::Sampling;
use super::timeouts::Seen;
use super::worker::{LocalDatabase, Watch, Worker};
use crate::postgres::{Login, Stream};
use crate::switch::{Epoch, Member, ServerRole};
use crate::wire::ledger::Ledger;
use crate::wire::scanner::Scanner;

/// How long a client may take to read its last words.
const FAREWELL: Duration = Duration::from_secs(5);

/// So much room for an unnamed statement is kept by a session that has none, or a shorter one.
const UNNAMED_KEPT_BYTES: usize = 16 * 1024;

/// What login hands to a pooled session, apart from the client's side.
pub(super) struct Pooled {
    pub(super) login: Login,
    pub(super) local: Rc<LocalDatabase>,
    pub(super) pool: Rc<LocalPool>,
    pub(super) member: Member,
    pub(super) waiter: Arc<Waiter>,
    /// What it connected with.
    pub(super) profile: Arc<Profile>,
    /// What it was told.
    pub(super) told: Reported,
    pub(super) key: CancelKey,
}

/// Bytes from the client.
struct Up {
    buffer: Buffer,
    /// What goes to the server.
    out: Buffer,
    /// Body bytes of the last passed frame that have not come yet.
    body_left: usize,
    /// Bytes that are to be thrown away once they come.
    discard_left: usize,
    /// A cancelled client's messages are thrown away up to its Sync.
    discard_to_sync: bool,
    /// The client has closed its side.
    ended: bool,
    /// The client has said Terminate while answers were due.
    terminated: bool,
}

/// Bytes from the server.
struct Down {
    buffer: Buffer,
    /// So many bytes at the front have been looked at and may be written to the client.
    looked_at: usize,
    /// Body bytes of the last frame that have not come yet.
    body_left: usize,
    /// The last frame was an ErrorResponse: if the server closes now, it has said why.
    last_was_error: bool,
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Between transactions.
    Outside,
    /// A fence holds its next frame.
    Held { since: Instant },
    /// It waits for a connection.
    Waiting { since: Instant },
    /// It has a connection and is inside the gate.
    Inside { since: Instant },
}

/// The client's unnamed statement.
#[derive(Default)]
struct Unnamed {
    /// Tells it from every other one; 0: there is none.
    token: u64,
    /// The body of its Parse message; empty where that was too long to be held. Kept for its capacity, up to
    /// [`UNNAMED_KEPT_BYTES`].
    body: Vec<u8>,
    /// What executing it may leave behind.
    traces: Traces,
    /// It is a DEALLOCATE of one of the client's statements.
    takes: Option<Taken>,
}

impl Unnamed {
    /// Makes the body ready for another one.
    fn make_room(&mut self, body_bytes: usize) {
        if self.body.capacity() > UNNAMED_KEPT_BYTES.max(2 * body_bytes) {
            self.body = Vec::new();
        }
        self.body.clear();
    }

    /// Gives the room of a long statement back once there is none any more.
    #[inline]
    fn release(&mut self) {
        if self.token == 0 && self.body.capacity() > UNNAMED_KEPT_BYTES {
            self.body = Vec::new();
        }
    }
}

/// The frames of a transaction that is one batch, as the client sent them, so that they can be sent again if the server
/// has done nothing with them.
#[derive(Default)]
struct Stash {
    frames: Vec<u8>,
    state: StashState,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum StashState {
    /// More of the batch may come.
    #[default]
    Open,
    /// Its Sync has come.
    Whole,
    /// It is more than one batch, or too long, or something was answered, or it was sent again already.
    Useless,
}

/// What the server has refused that another attempt would mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mending {
    /// Nothing.
    None,
    /// The connection's statements are to be prepared anew, before it is given back.
    Statements,
    /// That, and the batch is to be sent again.
    Batch,
}

/// A client's session in transaction mode.
pub(super) struct PooledSession {
    worker: Rc<Worker>,
    local: Rc<LocalDatabase>,
    pool: Rc<LocalPool>,
    entry: Registration,
    client: Stream,
    member: Member,
    login: Login,
    /// What it connected with; RESET leads there.
    startup: Arc<Profile>,
    /// What it has set.
    profile: Arc<Profile>,
    told: Reported,
    link: Option<Box<Link>>,
    waiter: Arc<Waiter>,
    place: Place,
    /// Where its last connection was.
    server: Option<ServerRole>,
    /// Epoch of its last admission.
    epoch: Epoch,
    up: Up,
    down: Down,
    ledger: Ledger,
    expected: Expected,
    /// What the client's names stand for.
    names: Kept<Box<[u8]>>,
    /// What stands in for a statement, by its number, where its connection lacks it and settings are others than those
    /// that it was meant under.
    stand_ins: Kept<u64>,
    unnamed: Unnamed,
    next_token: u32,
    /// Portals of this transaction whose execution takes a statement of the client's away.
    takers: Vec<(Box<[u8]>, Taken)>,
    tracked: Tracked,
    /// What this transaction may leave behind.
    traces: Traces,
    stash: Stash,
    mending: Mending,
    /// Cancels on their way to the connection, which must not be given back before they have arrived.
    cancels: Vec<tokio::task::JoinHandle<()>>,
    /// The client has cancelled while it waited; it is told at the next frame boundary.
    cancelled: bool,
    /// It is told that it has waited too long.
    waited_too_long: bool,
    /// Which statement it was when the gate was entered.
    entered_turn: u32,
    /// Holds answers back while writes are slowed down.
    brake: Brake,
    /// The transaction may become a sample of shadow reads.
    sampling: Option<Box<Sampling>>,
    /// What the sweep of time-outs last saw.
    seen: Option<Seen>,
    look_again: crate::proxy::hold::LookAgain,
    key: CancelKey,
    watch: Watch,
    slot: ClientSlot,
}

/// What the loop needs done.
enum Step {
    /// The mailbox is not empty.
    Orders,
    /// The connection is not as the client needs it.
    Fit,
    /// The transaction may have left something, and is over.
    Settle,
    /// The batch is to be sent again.
    Mend,
    /// The session ends.
    End(End),
}

/// How the loop ended.
enum Outcome {
    Ended(End),
    /// The session keeps its connection from now on.
    Pinned(Vec<Tie>),
}

impl PooledSession {
    /// A session whose client waits for ReadyForQuery, which stands in its channel's output.
    pub(super) fn start(worker: Rc<Worker>, client: LoggedIn, parts: Pooled) -> Self {
        let LoggedIn { channel, registration, slot } = client;
        let buffer = || Buffer::new(worker.pool.clone());
        let (mut up, mut down) = (buffer(), buffer());
        up.append(&channel.input);
        down.append(&channel.out);
        let watch = parts.local.watch(&registration);
        Self {
            down: Down { looked_at: down.len(), buffer: down, body_left: 0, last_was_error: false },
            up: Up {
                buffer: up,
                out: buffer(),
                body_left: 0,
                discard_left: 0,
                discard_to_sync: false,
                ended: false,
                terminated: false,
            },
            epoch: parts.local.database.epoch(),
            local: parts.local,
            pool: parts.pool,
            client: channel.stream,
            member: parts.member,
            login: parts.login,
            startup: parts.profile.clone(),
            profile: parts.profile,
            told: parts.told,
            link: None,
            waiter: parts.waiter,
            place: Place::Outside,
            server: None,
            ledger: Ledger::new(),
            expected: Expected::default(),
            names: Kept::default(),
            stand_ins: Kept::default(),
            unnamed: Unnamed::default(),
            next_token: 0,
            takers: Vec::new(),
            tracked: Tracked::new(),
            traces: Traces::NONE,
            stash: Stash::default(),
            mending: Mending::None,
            cancels: Vec::new(),
            cancelled: false,
            waited_too_long: false,
            entered_turn: 0,
            brake: Brake::default(),
            sampling: None,
            seen: None,
            look_again: None,
            key: parts.key,
            watch,
            slot,
            entry: registration,
            worker,
        }
    }

    /// Serves the client until it leaves, or until it keeps its connection: then the rest is a session of the other kind.
    pub(super) async fn run(mut self) -> Option<Session> {
        let outcome = match AssertUnwindSafe(self.serve()).catch_unwind().await {
            Ok(outcome) => outcome,
            // The panic hook has reported it; here it must only not break the promise that admission makes.
            Err(_panic) => Outcome::Ended(End::Panicked),
        };
        match outcome {
            Outcome::Ended(end) => {
                Box::pin(self.finish(end)).await;
                None
            }
            Outcome::Pinned(ties) => self.pin(&ties),
        }
    }

    async fn serve(&mut self) -> Outcome {
        std::future::poll_fn(|cx| {
            self.entry.set_waker(cx.waker());
            std::task::Poll::Ready(())
        })
        .await;
        loop {
            let step = std::future::poll_fn(|cx| self.poll_serve(cx)).await;
            let outcome = match step {
                // Boxed like every rare state: an idle client pays for the relay alone.
                Step::Orders => Box::pin(self.obey()).await,
                Step::Fit => Box::pin(self.fit()).await,
                Step::Settle => match Box::pin(self.settle()).await {
                    Ok(ties) if !ties.is_empty() => return Outcome::Pinned(ties),
                    Ok(_) => Ok(()),
                    Err(end) => Err(end),
                },
                Step::Mend => Box::pin(self.mend()).await,
                Step::End(end) => Err(end),
            };
            if let Err(end) = outcome {
                return Outcome::Ended(end);
            }
        }
    }

    /// Says good-bye. When this returns, nothing of the session runs anywhere.
    async fn finish(mut self, end: End) {
        tracing::debug!(session = self.entry.id(), ?end, "session ends");
        self.entry.take_no_more_orders();
        self.pool.stop_waiting(&self.waiter);
        let words = match &end {
            End::ClientLeft => None,
            End::ServerLost if self.down.last_was_error => None,
            End::ServerLost => Some(ClientError::ServerLost { in_doubt: self.link.is_some() }),
            End::Told(error) => Some(error.clone()),
            End::Panicked => Some(ClientError::Internal),
        };
        if matches!(end, End::Told(_)) {
            // Who is told that it ends must not leave a statement behind, as with pg_terminate_backend.
            self.cancel_on_server(None);
        }
        if !matches!(end, End::ClientLeft) {
            self.say_farewell(words).await;
        }
        self.settle_cancels().await;
        let Some(link) = self.link.take() else { return };
        let lost = matches!(end, End::ServerLost | End::Panicked);
        let cut = !self.up.out.is_empty() || self.up.body_left > 0;
        let (scanner, ledger) = self.leftovers();
        let Self { worker, entry, member, client, .. } = self;
        entry.set_state(SessionState::Orphan);
        drop(client);
        let Link { backend, seat, .. } = *link;
        orphan::bury(&worker.shared, &entry, orphan::Remains { backend, ledger, scanner, cut, lost }).await;
        drop((seat, member));
    }

    /// Where the server's stream stands, for who reads it from here on.
    fn leftovers(&mut self) -> (Scanner, Ledger) {
        let mut scanner = Scanner::new();
        let mut answers = orphan::Answers(&mut self.ledger);
        if self.down.body_left > 0 {
            // A frame whose tag says nothing, cut where this one is.
            let length = u32::try_from(self.down.body_left + 4).unwrap_or(u32::MAX);
            let header = [&b"d"[..], &length.to_be_bytes()].concat();
            // A header that was valid once.
            let _begun = scanner.scan(&header, &mut answers);
        }
        let rest = &self.down.buffer.filled()[self.down.looked_at.min(self.down.buffer.len())..];
        // A server that does not speak the protocol is found out by the next scan.
        let _scanned = scanner.scan(rest, &mut answers);
        (scanner, std::mem::take(&mut self.ledger))
    }

    /// Lets the client have what is still in the buffer, and the last words, as far as it reads them.
    async fn say_farewell(&mut self, words: Option<ClientError>) {
        let shown = self.down.looked_at.min(self.down.buffer.len());
        let mut last = self.down.buffer.filled()[..shown].to_vec();
        if let Some(error) = words.filter(|_| self.down.body_left == 0) {
            error.encode(&mut last);
        }
        let send = async {
            self.client.write_all(&last).await?;
            self.client.flush().await?;
            self.client.shutdown().await
        };
        // A client that does not read in time, or is gone, misses them.
        let _sent = tokio::time::timeout(FAREWELL, send).await;
    }
}
