//! A client's session: its sockets, where it stands, and the slow path around the relay.
//!
//! One task owns both sockets for the session's whole life. It relays ([`super::relay`]) until something else is to be
//! done (an order, a switch, an end), does that, and relays on. Whatever ends it, a panic included, the backend is
//! looked after before the gate is left ([`super::orphan`]).

use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::io::AsyncWriteExt as _;

use super::backend::Backend;
use super::brake::Brake;
use super::buffers::Buffer;
use super::cancel::CancelKey;
use super::client_error::ClientError;
use super::entry::{Order, SessionState};
use super::handoff::Tracked;
use super::listener::Accepted;
use super::login::{ClientSlot, LoggedIn, Served, log_in};
use super::moves::Moving;
use super::orphan;
use super::pool::Seat;
use super::sessions::Registration;
use super::shadow::Shadowing;
use super::timeouts::Seen;
use super::vacant::Origin;
use super::worker::{LocalDatabase, Watch, Worker};
use crate::postgres::{Login, Stream};
use crate::switch::{Epoch, Member};
use crate::wire::ledger::Ledger;
use crate::wire::scanner::Scanner;

/// How long a client may take to read its last words.
const FAREWELL: Duration = Duration::from_secs(5);
/// Who has had so many answers stays for longer.
const READIES_BEFORE_RING: u32 = 3;
/// How long the backend of an idle session may take to close.
const CLOSING: Duration = Duration::from_secs(5);

/// What login hands to a session, apart from the client's side.
pub(super) struct Link {
    pub(super) login: Login,
    pub(super) local: Rc<LocalDatabase>,
    /// None for a replication connection, which is exempt from admission.
    pub(super) member: Option<Member>,
    pub(super) backend: Backend,
    /// Epoch of the gate when the backend was opened.
    pub(super) epoch: Epoch,
    /// Where another client may get the backend after this one.
    pub(super) origin: Option<Origin>,
    pub(super) key: CancelKey,
}

/// Bytes from the client to the backend.
pub(super) struct Up {
    pub(super) buffer: Buffer,
    /// So many bytes at the front of the buffer may be written to the backend.
    pub(super) cleared: usize,
    /// Body bytes of the last cleared frame that have not been cleared yet, because they have not been read.
    pub(super) body_left: usize,
    /// Bytes that are to be thrown away once they come.
    pub(super) discard_left: usize,
    /// A cancelled client's messages are thrown away up to its Sync.
    pub(super) discard_to_sync: bool,
    /// Nothing more can be read in this wake-up: the client's socket was found empty, and will wake the task.
    pub(super) is_drained: bool,
    /// The client has closed its side: it is gone. One that only writes no more cannot be told from one that has
    /// crashed, whose statement must not wait for a pause to end, and so gets no answer.
    pub(super) ended: bool,
    /// The client has said Terminate while answers were due: it still gets them, as from PostgreSQL.
    pub(super) terminated: bool,
}

impl Up {
    fn new(buffer: Buffer) -> Self {
        Self {
            buffer,
            cleared: 0,
            body_left: 0,
            discard_left: 0,
            discard_to_sync: false,
            is_drained: false,
            ended: false,
            terminated: false,
        }
    }
}

/// Bytes from the backend to the client.
pub(super) struct Down {
    pub(super) buffer: Buffer,
    pub(super) scanner: Scanner,
    /// Nothing more can be read in this wake-up: the backend's socket was found empty, and will wake the task.
    pub(super) is_drained: bool,
    /// The last frame was an ErrorResponse: if the server closes now, it has said why.
    pub(super) last_was_error: bool,
}

/// Where a session stands with admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At a safe point.
    Outside,
    /// Outside, and its next frame may not pass.
    Held { since: std::time::Instant },
    /// In a transaction or statement.
    Inside { since: std::time::Instant },
}

/// A client's session.
pub(super) struct Session {
    pub(super) worker: Rc<Worker>,
    pub(super) local: Rc<LocalDatabase>,
    pub(super) entry: Registration,
    pub(super) client: Stream,
    /// Taken when the session ends, and while it is exchanged.
    pub(super) backend: Option<Backend>,
    pub(super) member: Option<Member>,
    pub(super) login: Login,
    pub(super) epoch: Epoch,
    /// Where another client may get the backend after this one; never after a move.
    pub(super) origin: Option<Origin>,
    pub(super) place: Place,
    pub(super) up: Up,
    pub(super) down: Down,
    pub(super) ledger: Ledger,
    pub(super) tracked: Tracked,
    /// A move to the other server that was ordered.
    pub(super) moving: Option<Box<Moving>>,
    /// Something was forwarded since the state was captured.
    pub(super) touched: bool,
    /// What stood in the way of a move that was given up is still shown to operators.
    pub(super) shows_blockers: bool,
    /// Cancels on their way to the backend, which must not be given up before they have arrived.
    pub(super) cancels: Vec<tokio::task::JoinHandle<()>>,
    /// The client has cancelled what is not on a server yet. If it is held, it is told at the next frame boundary.
    pub(super) cancelled: bool,
    /// Who cancelled at a safe point, where the client may have asked for something that nobody has read yet.
    pub(super) cancelled_by: Option<tokio::sync::oneshot::Sender<()>>,
    /// It is told that it has waited too long.
    pub(super) waited_too_long: bool,
    /// Which statement it was when the gate was entered.
    pub(super) entered_turn: u32,
    /// Its sockets are served by the worker's ring, as far as they can be.
    is_aboard: bool,
    /// Holds answers back while writes are slowed down.
    pub(super) brake: Brake,
    /// While some of its transactions run on the target too.
    pub(super) shadow: Option<Box<Shadowing>>,
    /// What the sweep of time-outs last saw.
    pub(super) seen: Option<Seen>,
    /// When a held client with a full buffer is looked at again.
    pub(super) look_again: super::hold::LookAgain,
    _key: CancelKey,
    _watch: Watch,
    pub(super) slot: ClientSlot,
    /// Of a session that was a pooled one: its backend still counts among those of the pool.
    pub(super) seat: Option<Seat>,
}

/// A pooled session that keeps its backend from now on.
pub(super) struct TakenOver {
    pub(super) client: Stream,
    pub(super) backend: Backend,
    pub(super) member: Member,
    pub(super) login: Login,
    pub(super) epoch: Epoch,
    pub(super) from_client: Buffer,
    pub(super) to_client: Buffer,
    pub(super) tracked: Tracked,
    pub(super) registration: Registration,
    pub(super) key: CancelKey,
    pub(super) watch: Watch,
    pub(super) slot: ClientSlot,
    pub(super) seat: Seat,
}

/// What the relay needs done.
pub(super) enum Step {
    /// The mailbox is not empty.
    Orders,
    /// It has asked often enough for its sockets to be worth a place in the ring.
    Board,
    /// The backend is not on the active server, and the session has been admitted for the exchange.
    Adopt(Epoch),
    /// A move can go on at this safe point.
    Move,
    /// Its backend is to say what the session has set up, for shadow reads.
    Look,
    /// The session ends.
    End(End),
}

/// Why a session ends.
#[derive(Debug)]
pub(super) enum End {
    /// Terminate, or the link to the client is gone.
    ClientLeft,
    /// The link to the server is gone.
    ServerLost,
    /// The client is told this and closed.
    Told(ClientError),
    /// The session's code panicked.
    Panicked,
}

/// Serves one accepted connection to its end.
pub(super) async fn serve(worker: Rc<Worker>, accepted: Accepted) {
    // Boxed, so that what only the login needs is freed before the relay begins: not in the head of the `match`, where it
    // would live as long as the session does.
    let served = Box::pin(log_in(&worker, accepted)).await;
    let session = match served {
        Some(Served::Alone(session)) => Some(session),
        Some(Served::Pooled(pooled)) => Box::pin(pooled.run()).await.map(Box::new),
        None => None,
    };
    if let Some(session) = session {
        session.run().await;
    }
}

impl Session {
    /// A session whose client waits for ReadyForQuery, which stands in its channel's output.
    pub(super) fn start(worker: Rc<Worker>, client: LoggedIn, link: Link) -> Self {
        let LoggedIn { channel, registration, slot } = client;
        // A server that has much to do is not to have much more from here than it reads: see [`super::backend`].
        let mut up = Buffer::small(worker.pool.clone());
        let mut down = Buffer::new(worker.pool.clone());
        if !channel.input.is_empty() {
            up.append(&channel.input);
        }
        down.append(&channel.out);
        let watch = link.local.watch(&registration);
        Self {
            local: link.local,
            client: channel.stream,
            backend: Some(link.backend),
            member: link.member,
            login: link.login,
            epoch: link.epoch,
            origin: link.origin,
            place: Place::Outside,
            up: Up::new(up),
            down: Down { buffer: down, scanner: Scanner::new(), is_drained: false, last_was_error: false },
            ledger: Ledger::new(),
            tracked: Tracked::new(),
            moving: None,
            touched: true,
            shows_blockers: false,
            cancels: Vec::new(),
            cancelled: false,
            cancelled_by: None,
            waited_too_long: false,
            entered_turn: 0,
            is_aboard: false,
            brake: Brake::default(),
            shadow: None,
            seen: None,
            look_again: None,
            _key: link.key,
            _watch: watch,
            slot,
            seat: None,
            entry: registration,
            worker,
        }
    }

    /// Goes on with a session at a safe point that was a pooled one.
    pub(super) fn take_over(worker: Rc<Worker>, local: Rc<LocalDatabase>, taken: TakenOver) -> Self {
        taken.registration.set_state(SessionState::Idle);
        Self {
            local,
            client: taken.client,
            backend: Some(taken.backend),
            member: Some(taken.member),
            login: taken.login,
            epoch: taken.epoch,
            origin: None,
            place: Place::Outside,
            up: Up::new(taken.from_client),
            down: Down { buffer: taken.to_client, scanner: Scanner::new(), is_drained: false, last_was_error: false },
            ledger: Ledger::new(),
            tracked: taken.tracked,
            moving: None,
            touched: true,
            shows_blockers: false,
            cancels: Vec::new(),
            cancelled: false,
            cancelled_by: None,
            waited_too_long: false,
            entered_turn: 0,
            is_aboard: false,
            brake: Brake::default(),
            shadow: None,
            seen: None,
            look_again: None,
            _key: taken.key,
            _watch: taken.watch,
            slot: taken.slot,
            seat: Some(taken.seat),
            entry: taken.registration,
            worker,
        }
    }

    /// Relays until the session ends, and sees to it that nothing of it is left behind.
    async fn run(mut self: Box<Self>) {
        let end = match AssertUnwindSafe(self.serve()).catch_unwind().await {
            Ok(end) => end,
            // The panic hook has reported it; here it must only not break the promise that admission makes.
            Err(_panic) => End::Panicked,
        };
        // Boxed like every rare state: an idle client pays for the relay alone.
        Box::pin(self.finish(end)).await;
    }

    async fn serve(&mut self) -> End {
        std::future::poll_fn(|cx| {
            self.entry.set_waker(cx.waker());
            std::task::Poll::Ready(())
        })
        .await;
        if let Err(end) = self.absorb_leftovers() {
            return end;
        }
        loop {
            // A backend may be a new one. What cannot board is polled as before.
            if self.is_aboard
                && let Err(error) = self.board_ring()
            {
                tracing::debug!(session = self.entry.id(), %error, "a socket is not served by the ring");
            }
            let step = std::future::poll_fn(|cx| self.poll_relay(cx)).await;
            let outcome = match step {
                Step::Orders => Box::pin(self.obey()).await,
                Step::Board => {
                    self.is_aboard = true;
                    Ok(())
                }
                Step::Adopt(epoch) => Box::pin(self.adopt(epoch)).await,
                Step::Look => Box::pin(self.look_for_shadow()).await,
                Step::Move => Box::pin(self.advance_move()).await,
                Step::End(end) => Err(end),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    /// Whether the ring is to serve its sockets from now on. Getting there and back takes a dozen system calls, more than a
    /// client that connects for each statement saves.
    #[inline]
    pub(super) fn is_to_board(&self) -> bool {
        !self.is_aboard && self.ledger.readies() >= READIES_BEFORE_RING && self.worker.ring.is_some()
    }

    /// The worker's ring serves both sockets while they are plain ones.
    fn board_ring(&mut self) -> std::io::Result<()> {
        let Some(ring) = &self.worker.ring else { return Ok(()) };
        if let Some(backend) = &mut self.backend {
            ring.serve(&mut backend.connection.stream)?;
        }
        ring.serve(&mut self.client)
    }

    /// Deals with what the mailbox holds.
    async fn obey(&mut self) -> Result<(), End> {
        if let Err(failed) = self.worker.shared.failpoints.hit("session.orders").await {
            panic!("{failed}");
        }
        for order in self.entry.take_orders() {
            match order {
                Order::Cancel { done } => self.cancel(done),
                Order::End(error) => return Err(End::Told(error)),
                Order::Prepare { order, reply } => {
                    self.follow_first().await?;
                    self.begin_move(order, Some(reply));
                }
                Order::Settle { order, reply } => {
                    self.follow_first().await?;
                    self.settle_move(order, reply);
                }
                Order::Discard => {
                    self.follow_first().await?;
                    self.give_up_move();
                }
                Order::Look => self.look()?,
            }
        }
        Ok(())
    }

    /// A client asked for a cancel. A held statement is cancelled here; one that runs, or is at hand, is cancelled on the
    /// session's own backend; with none there is nothing to do, as in PostgreSQL.
    fn cancel(&mut self, done: tokio::sync::oneshot::Sender<()>) {
        self.cancels.retain(|cancel| !cancel.is_finished());
        match (self.place, &self.backend) {
            (Place::Held { .. }, _) => self.cancelled = true,
            (Place::Outside, _) if self.member.is_some() => {
                // While it moved, nobody has read what it may have asked for before it cancelled: that is read first.
                self.cancelled = true;
                self.cancelled_by = Some(done);
            }
            (_, None) => {}
            (_, Some(_)) => self.cancel_on_server(Some(done)),
        }
    }

    /// Cancels what runs on the session's own backend; `done` is dropped once the server has been told.
    pub(super) fn cancel_on_server(&mut self, done: Option<tokio::sync::oneshot::Sender<()>>) {
        let Some(backend) = &self.backend else { return };
        let connector = self.worker.shared.connector(backend.server).clone();
        let (pid, key) = (backend.connection.pid, backend.connection.cancel_key.clone());
        self.cancels.push(tokio::task::spawn_local(async move {
            if let Err(error) = connector.cancel(pid, &key).await {
                tracing::warn!(%error, pid, "a cancel could not be passed on");
            }
            drop(done);
        }));
    }

    /// Waits until no cancel is on its way: its backend may then be given up.
    pub(super) async fn settle_cancels(&mut self) {
        for cancel in self.cancels.drain(..) {
            // A cancel that panicked has ended too.
            let _ended = cancel.await;
        }
    }

    /// Says good-bye on both sides. When this returns, nothing of the session runs anywhere.
    async fn finish(mut self: Box<Self>, end: End) {
        tracing::debug!(session = self.entry.id(), ?end, "session ends");
        // A pause must not wait for the good-byes of a session that has nothing to move.
        self.entry.take_no_more_orders();
        let in_doubt = self.is_inside();
        let words = match &end {
            End::ClientLeft => None,
            End::ServerLost if self.down.last_was_error => None,
            End::ServerLost => Some(ClientError::ServerLost { in_doubt }),
            End::Told(error) => Some(error.clone()),
            End::Panicked => Some(ClientError::Internal),
        };
        self.discard_move();
        // A replication connection runs statements too, and is never inside.
        if (in_doubt || self.member.is_none()) && matches!(end, End::Told(_)) {
            // Who is told that it ends must not leave a statement behind, as with pg_terminate_backend.
            self.cancel_on_server(None);
        }
        if !matches!(end, End::ClientLeft) {
            self.say_farewell(words).await;
        }
        self.settle_cancels().await;
        let Some(backend) = self.backend.take() else { return };
        let is_inside = self.member.as_ref().is_some_and(Member::is_inside);
        if is_inside {
            let remains = orphan::Remains {
                backend,
                ledger: std::mem::take(&mut self.ledger),
                scanner: std::mem::take(&mut self.down.scanner),
                cut: self.up.cleared > 0 || self.up.body_left > 0,
                lost: matches!(end, End::ServerLost | End::Panicked),
            };
            self.entry.set_state(SessionState::Orphan);
            let Self { worker, entry, member, client, .. } = *self;
            drop(client);
            orphan::bury(&worker.shared, &entry, remains).await;
            drop(member);
        } else if self.is_vacated_by(&end) {
            self.vacate(backend).await;
        } else if !matches!(end, End::ServerLost) {
            // No gate waits for a replication connection: until its backend has closed, a cutover finds it in the list.
            if self.member.is_some() {
                self.entry.leave_backend();
            }
            drop(self.member.take());
            // The link may be gone; the server notices that too.
            let _closed = tokio::time::timeout(CLOSING, backend.connection.terminate()).await;
        }
    }

    /// Lets the client have what is still in the buffer, and the last words, as far as it reads them.
    async fn say_farewell(&mut self, words: Option<ClientError>) {
        let whole = self.down.scanner.is_at_boundary();
        if let Some(error) = words.filter(|_| whole) {
            let mut message = Vec::new();
            error.encode(&mut message);
            self.down.buffer.append(&message);
        }
        let send = async {
            self.client.write_all(self.down.buffer.filled()).await?;
            self.client.flush().await?;
            self.client.shutdown().await
        };
        // A client that does not read in time, or is gone, misses them.
        let _sent = tokio::time::timeout(FAREWELL, send).await;
    }
}
