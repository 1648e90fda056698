//! The gate has opened on the other server: the session goes on there, with the backend that was prepared or with one that
//! is opened and given its state now.

use super::{Moving, OLD_BACKEND, Opened, Stage, Unmoved, append, close, close_later, open};
use crate::postgres::{Frame, RawConnection, RawError};
use crate::proxy::backend::Backend;
use crate::proxy::client_error::ClientError;
use crate::proxy::entry::{MoveOrder, MoveState};
use crate::proxy::handoff::changed_parameters;
use crate::proxy::session::{End, Session};
use crate::switch::{Epoch, Route, ServerRole};
use crate::wire::frame::backend as server;
use crate::wire::ledger::Ledger;
use crate::wire::message;

impl Session {
    /// The gate is open and the session inside it; its backend is not where the database is now.
    pub(in crate::proxy) async fn adopt(&mut self, epoch: Epoch) -> Result<(), End> {
        let route = self.local.database.route();
        let Route::To { server: to, .. } = *route else {
            // The route was lost again; the session leaves and is held.
            self.leave_if_quiet();
            return Ok(());
        };
        if self.backend.as_ref().is_some_and(|own| own.server == to) {
            self.epoch = epoch;
            if self.moving.as_ref().is_some_and(|moving| moving.order.epoch <= epoch) {
                // There and back before it has followed.
                self.discard_move();
            }
            self.leave_if_quiet();
            return Ok(());
        }
        self.settle_cancels().await;
        if let Err(error) = self.worker.shared.failpoints.hit("session.adopt").await {
            return Err(End::Told(ClientError::MoveFailed { reason: error.to_string().into() }));
        }
        let order = MoveOrder { to, epoch };
        self.forget_if_lost();
        let (opened, listens) = match self.prepared_for(to) {
            Some(prepared) => prepared,
            None => {
                let moved = self.move_late(order).await;
                if moved.is_err() {
                    self.worker.shared.sessions.count_left_behind();
                }
                moved?
            }
        };
        self.exchange(opened.backend, listens).await?;
        self.epoch = epoch;
        self.moving = None;
        self.entry.set_settled_for(None);
        self.entry.set_moving(MoveState::Moved, Vec::new());
        self.leave_if_quiet();
        Ok(())
    }

    fn prepared_for(&mut self, to: ServerRole) -> Option<(Box<Opened>, bool)> {
        if !self.is_prepared() || self.moving.as_ref().is_none_or(|moving| moving.order.to != to) {
            return None;
        }
        match self.moving.take()?.stage {
            Stage::Filled { opened, state, .. } => Some((opened, state.listens())),
            Stage::Opening(_) | Stage::Filling(_) | Stage::Open(_) | Stage::Failed => None,
        }
    }

    /// A session that was not prepared, or was touched since, moves itself now.
    async fn move_late(&mut self, order: MoveOrder) -> Result<(Box<Opened>, bool), End> {
        let told = |reason: String| End::Told(ClientError::MoveFailed { reason: reason.into() });
        let stage = match self.moving.take().map(|moving| *moving) {
            Some(Moving { order: known, stage, .. }) if known.to == order.to => stage,
            other => {
                self.moving = other.map(Box::new);
                self.discard_move();
                Stage::Failed
            }
        };
        let stage = match stage {
            Stage::Opening(opening) => match opening.await {
                Ok(Ok(opened)) => Stage::Open(opened),
                Ok(Err(_)) | Err(_) => Stage::Failed,
            },
            Stage::Filling(filling) => match filling.await {
                Ok(Ok((opened, state, report))) => Stage::Filled { opened, state, report },
                Ok(Err(_)) | Err(_) => Stage::Failed,
            },
            stage => stage,
        };
        let stage = match stage {
            Stage::Failed => {
                let from = self.backend.as_ref().map_or(order.to, |own| own.server);
                let (shared, login) = (self.worker.shared.clone(), self.login.clone());
                let opened = open(shared, login, from, order, self.local.database.clone()).await;
                Stage::Open(opened.map_err(told)?)
            }
            stage => stage,
        };
        match self.fill(stage).await {
            Ok((opened, replayed, blockers)) => {
                if let Some(blocker) = blockers.first() {
                    tokio::task::spawn_local(close(opened.backend));
                    return Err(told(format!("The session {blocker}.")));
                }
                Ok((opened, replayed.is_some_and(|(state, _)| state.listens())))
            }
            Err(Unmoved::OwnLost) => {
                Err(told("Its connection to the old server was lost before its state could be read.".to_owned()))
            }
            Err(Unmoved::Because(reason)) => Err(told(reason)),
        }
    }

    /// The old backend's last notifications, then the new one's, then what is reported differently there.
    async fn exchange(&mut self, mut new: Backend, listens: bool) -> Result<(), End> {
        let told: Vec<_> = self.backend.as_ref().map(|own| own.connection.parameters.clone()).unwrap_or_default();
        let mut old = self.backend.take();
        if listens {
            let (from_old, from_new) = tokio::join!(
                last_words(old.as_mut().map(|old| &mut old.connection)),
                last_words(Some(&mut new.connection))
            );
            from_old.iter().for_each(|frame| append(&mut self.down.buffer, frame));
            // Asked after the words came: a session that moved meanwhile may be among those who sent them.
            let mut ours = self.worker.shared.sessions.senders(new.server, self.local.database.name());
            ours.insert(new.connection.pid);
            // What the target's own triggers sent while changes were applied has been heard already, from the source.
            let heard = from_new.iter().filter(|frame| sender(frame).is_none_or(|pid| ours.contains(&pid)));
            heard.for_each(|frame| append(&mut self.down.buffer, frame));
        }
        old.map(|old| tokio::task::spawn_local(close_later(old, self.entry.id())));
        let mut changes = Vec::new();
        for (name, value) in changed_parameters(&told, &new.connection.parameters) {
            message::parameter_status(&mut changes, &name, &value);
        }
        self.down.buffer.append(&changes);
        self.entry.set_backend(Some((new.server, new.connection.pid)));
        if let Some(seat) = &mut self.seat {
            seat.sit(new.server, new.connection.pid);
        }
        tracing::debug!(session = self.entry.id(), server = %new.server, pid = new.connection.pid, "session moved");
        self.backend = Some(new);
        self.origin = None;
        self.ledger = Ledger::new();
        self.entered_turn = 0;
        self.touched = true;
        self.absorb_leftovers()
    }
}

/// A round trip that brings in every notification that was sent before it.
async fn last_words(connection: Option<&mut RawConnection>) -> Vec<Frame> {
    let mut words = Vec::new();
    let Some(connection) = connection else { return words };
    let talk = async {
        connection.send(&message::SYNC).await?;
        loop {
            let frame = connection.next_frame().await?;
            match frame.tag {
                server::READY_FOR_QUERY => return Ok::<(), RawError>(()),
                server::NOTIFICATION_RESPONSE => words.push(frame),
                _ => {}
            }
        }
    };
    // An old backend that is gone, or silent, has nothing to say any more.
    let _ended = tokio::time::timeout(OLD_BACKEND, talk).await;
    words
}

/// Process id of the backend that sent a notification.
fn sender(frame: &Frame) -> Option<i32> {
    frame.body.first_chunk::<4>().map(|pid| i32::from_be_bytes(*pid))
}
