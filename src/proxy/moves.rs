//! Taking sessions to the other server.
//!
//! ```text
//! order      a task of its own opens a backend on the other server; the client's traffic goes on
//! safe point state is captured from the session's backend; the client's traffic goes on while it is replayed there → Ready
//! pause      touched since? captured again, the difference replayed               → Ready
//! gate opens the backends are exchanged, changed parameters reported, the old one is closed
//! ```
//!
//! A session that was never ordered to move, because it came late, does all of it when the gate has opened. It is inside
//! the gate meanwhile, so no cutover overtakes it.

mod adopted;
mod decided;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Shared;
use super::backend::{self, Backend};
use super::entry::{MoveOrder, MoveOutcome, MoveState};
use super::handoff::{
    Blocker, HandoffError, ReplayReport, SessionState as State, apply_delta, capture, delta, replay, replay_and_plan,
};
use super::session::{End, Session, Step};
use crate::postgres::{ConnectError, Frame, RawError};
use crate::switch::ServerRole;
use crate::wire::frame::backend as server;
use crate::wire::message;

/// How long an old backend may take to hand over its last notifications and to close.
const OLD_BACKEND: Duration = Duration::from_secs(1);

/// Before the first of the backends that are left is closed.
const BEFORE_CLOSING: Duration = Duration::from_millis(300);

/// Between two of them.
const BETWEEN_CLOSINGS: Duration = Duration::from_millis(10);

/// So many have a moment of their own; with more sessions than this, several share one.
const CLOSING_PLACES: u64 = 256;

/// A backend on the other server, and the names that are needed to read the session's state.
struct Opened {
    backend: Backend,
    names: Arc<Vec<String>>,
}

/// How far a move is.
enum Stage {
    /// The backend is being opened.
    Opening(JoinHandle<Result<Box<Opened>, String>>),
    /// It is open; no state is on it.
    Open(Box<Opened>),
    /// It is given the session's state as of the first capture; the client's traffic goes on.
    Filling(JoinHandle<Result<Filling, String>>),
    /// It has the session's state as of the last capture.
    Filled { opened: Box<Opened>, state: Box<State>, report: ReplayReport },
    /// It could not be opened or filled.
    Failed,
}

/// A backend, and what was replayed on it.
type Filling = (Box<Opened>, Box<State>, ReplayReport);

/// A backend, what was replayed on it, if anything, and why the session cannot be moved.
type Filled = (Box<Opened>, Option<(Box<State>, ReplayReport)>, Vec<Blocker>);

/// A move that was ordered.
pub(super) struct Moving {
    order: MoveOrder,
    stage: Stage,
    /// Who waits to hear how far it is.
    replies: Vec<oneshot::Sender<MoveOutcome>>,
    /// A capture is wanted at the next safe point.
    wanted: bool,
    blockers: Vec<Blocker>,
}

impl Moving {
    fn answer(&mut self, outcome: &MoveOutcome) {
        for reply in self.replies.drain(..) {
            // Whoever asked may have stopped waiting.
            let _heard = reply.send(outcome.clone());
        }
    }
}

/// Why a capture or a replay came to nothing.
pub(super) enum Unmoved {
    /// The session's own backend is gone: the session ends.
    OwnLost,
    /// Anything else.
    Because(String),
}

/// Opens a backend on `to` for a session, and learns the names.
async fn open(
    shared: Arc<Shared>,
    login: crate::postgres::Login,
    from: ServerRole,
    order: MoveOrder,
    database: Arc<crate::switch::Database>,
) -> Result<Box<Opened>, String> {
    // Reading goes on on the main runtime when this session is given up: others wait for the names.
    let (reader, name) = (shared.clone(), database.name().to_owned());
    let read = shared.runtime.spawn(async move {
        reader.sessions.catalogue_names.of(from, reader.connector(from), &name, order.epoch).await
    });
    let names = read.await.unwrap_or_else(|failure| Err(failure.to_string()))?;
    let _turn = shared.sessions.turns.next().await.ok_or("the cutover was given up")?;
    let backend = backend::open(&shared, &login, &database, order.to).await.map_err(|error| describe(&error))?;
    Ok(Box::new(Opened { backend, names }))
}

/// In words that are safe to show.
pub(super) fn describe(error: &ConnectError) -> String {
    // Where it was tried to connect to is nothing for clients.
    tracing::debug!(%error, "the backend of a move could not be opened");
    match error.sqlstate() {
        Some(code) => format!("the other server refuses the session's login ({code})"),
        None => "the other server cannot be reached".to_owned(),
    }
}

impl Session {
    /// Orders a move. A session that is there already, or has no backend to move, is ready at once.
    pub(super) fn begin_move(&mut self, order: MoveOrder, reply: Option<oneshot::Sender<MoveOutcome>>) {
        self.forget_if_lost();
        if self.moving.as_ref().is_some_and(|moving| moving.order == order && !matches!(moving.stage, Stage::Failed)) {
            self.join_move(reply, false);
            return;
        }
        if self.is_to_follow() {
            // A way back is no way while what the session has is nowhere but on the server that it goes to.
            let outcome = if self.backend.is_some() { MoveOutcome::Ready } else { MoveOutcome::Busy };
            reply.map(|reply| reply.send(outcome));
            return;
        }
        self.discard_move();
        let Some(from) = self.backend.as_ref().map(|own| own.server).filter(|from| *from != order.to) else {
            reply.map(|reply| reply.send(MoveOutcome::Ready));
            return;
        };
        let (shared, login) = (self.worker.shared.clone(), self.login.clone());
        let opening = tokio::task::spawn_local(open(shared, login, from, order, self.local.database.clone()));
        self.moving = Some(Box::new(Moving {
            order,
            stage: Stage::Opening(opening),
            replies: reply.into_iter().collect(),
            wanted: true,
            blockers: Vec::new(),
        }));
        self.entry.set_moving(MoveState::Preparing, Vec::new());
    }

    /// The pause: what changed since the capture is wanted too.
    pub(super) fn settle_move(&mut self, order: MoveOrder, reply: oneshot::Sender<MoveOutcome>) {
        self.forget_if_lost();
        match &self.moving {
            Some(moving) if moving.order == order && !matches!(moving.stage, Stage::Failed) => {
                self.join_move(Some(reply), true);
            }
            Some(_) | None => self.begin_move(order, Some(reply)),
        }
    }

    fn join_move(&mut self, reply: Option<oneshot::Sender<MoveOutcome>>, up_to_date: bool) {
        let Some(moving) = &mut self.moving else { return };
        moving.replies.extend(reply);
        let (filled, filling) =
            (matches!(moving.stage, Stage::Filled { .. }), matches!(moving.stage, Stage::Filling(_)));
        if filling && !(up_to_date && self.touched) {
            // Answered when that has ended.
        } else if filled && moving.blockers.is_empty() && !(up_to_date && self.touched) {
            moving.answer(&MoveOutcome::Ready);
        } else {
            moving.wanted = true;
        }
    }

    /// Nobody has listened to the other backend since it was filled: where it is gone, another one is wanted.
    fn forget_if_lost(&mut self) {
        let Some(moving) = &mut self.moving else { return };
        let (Stage::Open(opened) | Stage::Filled { opened, .. }) = &mut moving.stage else { return };
        if opened.backend.is_gone() {
            tracing::info!(session = self.entry.id(), "the backend that was prepared on the other server is gone");
            moving.stage = Stage::Failed;
            self.entry.set_settled_for(None);
        }
    }

    /// Closes what was prepared. What stands in the way of the next attempt as well is shown on.
    pub(super) fn discard_move(&mut self) {
        let Some(mut moving) = self.moving.take() else { return };
        self.entry.set_settled_for(None);
        let blockers = if self.touched { Vec::new() } else { std::mem::take(&mut moving.blockers) };
        self.shows_blockers = !blockers.is_empty();
        self.entry.set_moving(MoveState::None, blockers);
        // Who waits for an answer learns that there is nothing to move: an abort, or a client that has left.
        drop(moving.replies);
        match moving.stage {
            Stage::Opening(opening) => {
                let id = self.entry.id();
                tokio::task::spawn_local(async move {
                    if let Ok(Ok(opened)) = opening.await {
                        close_later(opened.backend, id).await;
                    }
                });
            }
            Stage::Filling(filling) => {
                let id = self.entry.id();
                tokio::task::spawn_local(async move {
                    if let Ok(Ok((opened, ..))) = filling.await {
                        close_later(opened.backend, id).await;
                    }
                });
            }
            Stage::Open(opened) | Stage::Filled { opened, .. } => {
                tokio::task::spawn_local(close_later(opened.backend, self.entry.id()));
            }
            Stage::Failed => {}
        }
    }

    /// Looks whether the other backend has been opened, or filled.
    pub(super) fn poll_move(&mut self, cx: &mut Context<'_>) -> Option<Step> {
        let moving = self.moving.as_mut()?;
        let outcome = match &mut moving.stage {
            Stage::Opening(opening) => match Pin::new(opening).poll(cx) {
                Poll::Ready(opened) => ended(opened).map(|opened| moving.stage = Stage::Open(opened)),
                Poll::Pending => Ok(()),
            },
            Stage::Filling(filling) => match Pin::new(filling).poll(cx) {
                Poll::Ready(filled) => ended(filled).map(|filled| self.end_filling(filled)),
                Poll::Pending => Ok(()),
            },
            Stage::Open(_) | Stage::Filled { .. } | Stage::Failed => Ok(()),
        };
        if let Err(failure) = outcome {
            self.fail_move(failure);
        }
        None
    }

    /// The first capture. The client goes on as soon as its own backend has answered.
    async fn begin_filling(&mut self, mut opened: Box<Opened>) -> Result<(), End> {
        let state = match self.capture(&opened.names).await {
            Ok(state) => Box::new(state),
            Err(Unmoved::OwnLost) => return Err(End::ServerLost),
            Err(Unmoved::Because(failure)) => {
                self.fail_move(failure);
                return Ok(());
            }
        };
        self.touched = false;
        let blockers = state.blockers().to_vec();
        if !blockers.is_empty() {
            // Nothing is replayed that cannot be complete; the backend stays for another try.
            self.tell_filled(Stage::Open(opened), blockers);
            return Ok(());
        }
        // In a pause, and after it, somebody waits.
        let has_time = !self.local.database.is_fenced() && self.local.database.epoch() == self.epoch;
        let filling = tokio::task::spawn_local(async move {
            let connection = &mut opened.backend.connection;
            let replayed = match has_time {
                true => replay_and_plan(connection, &state).await,
                false => replay(connection, &state).await,
            };
            replayed.map(|report| (opened, state, report)).map_err(|error| error.to_string())
        });
        if let Some(moving) = &mut self.moving {
            moving.stage = Stage::Filling(filling);
        }
        Ok(())
    }

    fn end_filling(&mut self, (opened, state, report): Filling) {
        let blockers = report.blockers();
        let stage = Stage::Filled { opened, state, report };
        match &mut self.moving {
            // Wanted once more, because of what the client has done meanwhile; answered after that.
            Some(moving) if moving.wanted && blockers.is_empty() => moving.stage = stage,
            Some(_) | None => self.tell_filled(stage, blockers),
        }
    }

    /// Notes how far the move is, and tells who waits.
    fn tell_filled(&mut self, stage: Stage, blockers: Vec<Blocker>) {
        let (seen, outcome) = if blockers.is_empty() {
            (MoveState::Prepared, MoveOutcome::Ready)
        } else {
            (MoveState::Blocked, MoveOutcome::Blocked(blockers.clone()))
        };
        self.entry.set_moving(seen, blockers.clone());
        if let Some(moving) = &mut self.moving {
            let is_settled = blockers.is_empty() && !self.touched;
            self.entry.set_settled_for(is_settled.then_some(moving.order.epoch));
            moving.stage = stage;
            moving.blockers = blockers;
            moving.answer(&outcome);
        }
    }

    fn fail_move(&mut self, failure: String) {
        tracing::warn!(session = self.entry.id(), failure, "a session cannot be prepared for the other server");
        self.entry.set_settled_for(None);
        self.entry.set_moving(MoveState::Failed, Vec::new());
        if let Some(moving) = &mut self.moving {
            moving.stage = Stage::Failed;
            moving.wanted = false;
            moving.answer(&MoveOutcome::Failed(failure));
        }
    }

    /// Whether a capture is wanted and possible.
    pub(super) fn ready_to_move(&self) -> Option<Step> {
        let moving = self.moving.as_ref()?;
        let open = matches!(moving.stage, Stage::Open(_) | Stage::Filled { .. });
        (moving.wanted && open && self.is_at_safe_point() && self.backend.is_some()).then_some(Step::Move)
    }

    /// Whether the other backend has the session's state as it is now.
    pub(super) fn is_prepared(&self) -> bool {
        !self.touched
            && self
                .moving
                .as_ref()
                .is_some_and(|moving| matches!(moving.stage, Stage::Filled { .. }) && moving.blockers.is_empty())
    }

    /// The text of a named statement that the session had when its state was last captured.
    pub(super) fn text_when_captured(&self, name: &[u8]) -> Option<&[u8]> {
        match &self.moving.as_ref()?.stage {
            Stage::Filled { state, .. } => state.statement_text(name),
            Stage::Opening(_) | Stage::Open(_) | Stage::Filling(_) | Stage::Failed => None,
        }
    }

    /// Captures and replays at a safe point.
    pub(super) async fn advance_move(&mut self) -> Result<(), End> {
        let Some(moving) = &mut self.moving else { return Ok(()) };
        self.entry.set_settled_for(None);
        moving.wanted = false;
        let stage = match std::mem::replace(&mut moving.stage, Stage::Failed) {
            Stage::Open(opened) => return self.begin_filling(opened).await,
            stage => stage,
        };
        match self.fill(stage).await {
            Ok((opened, replayed, blockers)) => {
                self.touched = false;
                let stage = match replayed {
                    Some((state, report)) => Stage::Filled { opened, state, report },
                    None => Stage::Open(opened),
                };
                self.tell_filled(stage, blockers);
                Ok(())
            }
            Err(Unmoved::OwnLost) => Err(End::ServerLost),
            Err(Unmoved::Because(failure)) => {
                self.fail_move(failure);
                Ok(())
            }
        }
    }

    /// Brings the state of the session's backend to the other one. What is returned as replayed is there, and only
    /// that: a later difference is taken from it.
    async fn fill(&mut self, stage: Stage) -> Result<Filled, Unmoved> {
        let (mut opened, before) = match stage {
            Stage::Open(opened) => (opened, None),
            Stage::Filled { opened, state, report } => (opened, Some((state, report))),
            Stage::Opening(_) | Stage::Filling(_) | Stage::Failed => {
                return Err(Unmoved::Because("no backend on the other server".to_owned()));
            }
        };
        let state = Box::new(self.capture(&opened.names).await?);
        let mut blockers = state.blockers().to_vec();
        if !blockers.is_empty() && before.is_none() {
            // Nothing is replayed that cannot be complete; the backend stays for another try.
            return Ok((opened, None, blockers));
        }
        let other = &mut opened.backend.connection;
        let replayed = match before {
            None => replay(other, &state).await,
            Some((old, report)) => {
                let change = delta(&old, &state);
                apply_delta(other, &change).await.map(|later| report.then(&change, later))
            }
        };
        match replayed {
            Ok(report) => {
                blockers.extend(report.blockers());
                Ok((opened, Some((state, report)), blockers))
            }
            Err(error) => Err(Unmoved::Because(error.to_string())),
        }
    }

    /// Reads the state of the session's own backend. What arrives for the client meanwhile is kept for it.
    pub(super) async fn capture(&mut self, names: &[String]) -> Result<State, Unmoved> {
        // One that was meant for what the client has run would hit what is read here.
        self.settle_cancels().await;
        self.expect_stray_answers().await.map_err(|_| Unmoved::OwnLost)?;
        let Some(own) = &mut self.backend else { return Err(Unmoved::OwnLost) };
        self.tracked.at_safe_point();
        let mut for_client = BytesMut::new();
        let captured = capture(&mut own.connection, &self.tracked, names, &mut for_client).await;
        self.down.buffer.append(&for_client);
        self.absorb_leftovers().map_err(|_| Unmoved::OwnLost)?;
        captured.map_err(|error| match error {
            HandoffError::Refused { .. } | HandoffError::TooLarge { .. } => Unmoved::Because(error.to_string()),
            // What is left of our answers there must not become the client's.
            HandoffError::Lost { .. } | HandoffError::Protocol { .. } | HandoffError::NotIdle => Unmoved::OwnLost,
        })
    }

    /// After a failed COPY a ReadyForQuery may still be under way; a round trip brings it in, and to the client.
    async fn expect_stray_answers(&mut self) -> Result<(), RawError> {
        let Some(own) = self.backend.as_mut().filter(|_| self.ledger.is_uncertain()) else { return Ok(()) };
        let mut probe = Vec::new();
        message::close_statement(&mut probe, "pgcutover_probe");
        probe.extend_from_slice(&message::SYNC);
        own.connection.send(&probe).await?;
        let mut probed = false;
        loop {
            let frame = own.connection.next_frame().await?;
            match frame.tag {
                server::CLOSE_COMPLETE => probed = true,
                server::READY_FOR_QUERY if probed => break,
                _ => append(&mut self.down.buffer, &frame),
            }
        }
        self.ledger = crate::wire::ledger::Ledger::new();
        self.entered_turn = 0;
        Ok(())
    }

    /// The session's backend said good-bye while the session waits with its state on the other server: it goes on there.
    pub(super) fn survives_loss(&mut self) -> bool {
        // A frame that is cut cannot be ended by anybody else.
        if !self.is_at_safe_point() || !self.is_prepared() {
            return false;
        }
        self.backend = None;
        self.entry.set_backend(None);
        true
    }
}

/// What a task of a move has come to.
fn ended<T>(joined: Result<Result<T, String>, tokio::task::JoinError>) -> Result<T, String> {
    joined.unwrap_or_else(|_| Err("the attempt was aborted".to_owned()))
}

fn append(buffer: &mut super::buffers::Buffer, frame: &Frame) {
    let mut bytes = Vec::with_capacity(frame.body.len() + 5);
    bytes.push(frame.tag);
    bytes.extend_from_slice(&(frame.body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(&frame.body);
    buffer.append(&bytes);
}

/// Closes a backend of session `id` that is of no use any more, when the sessions that have just gone on have had a moment,
/// and not together with all others: the end of a process costs its server, too. A link that is cut meanwhile, with this
/// process or otherwise, ends it as well.
async fn close_later(backend: Backend, id: u64) {
    let place = u32::try_from(id % CLOSING_PLACES).unwrap_or_default();
    tokio::time::sleep(BEFORE_CLOSING + BETWEEN_CLOSINGS * place).await;
    close(backend).await;
}

async fn close(backend: Backend) {
    // Best effort: the server notices a closed socket too.
    let _closed = tokio::time::timeout(OLD_BACKEND, backend.connection.terminate()).await;
}
