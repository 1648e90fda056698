//! A move that has been decided and not been made yet, when orders of the next cutover come.
//!
//! The gate has opened on the other server, but the session has not been woken yet (few are let in at a time), or a PAUSE
//! keeps it from following. What was prepared may be all that is left of the session: its old backend is of no use to
//! anybody and may be gone. So no later order gives it up.

use super::Moving;
use crate::proxy::session::{End, Session, Step};
use crate::switch::Route;

impl Session {
    /// Orders of the next cutover may come before the session has followed the last one, where few are let in at a time. It
    /// follows first, if it can.
    pub(in crate::proxy) async fn follow_first(&mut self) -> Result<(), End> {
        match self.catch_up_with_route() {
            Some(Step::Adopt(epoch)) => self.adopt(epoch).await,
            Some(Step::End(end)) => Err(end),
            Some(_) | None => Ok(()),
        }
    }

    /// Whether its move has been decided, and it cannot follow yet: a PAUSE keeps the gate closed. What was prepared is
    /// then not the next cutover's to give up.
    pub(super) fn is_to_follow(&self) -> bool {
        let database = &self.local.database;
        let is_behind = database.epoch() != self.epoch;
        let is_there =
            |moving: &Moving| matches!(*database.route(), Route::To { server, .. } if server == moving.order.to);
        is_behind && self.moving.as_deref().is_some_and(is_there)
    }

    /// An abort: what was prepared for it is closed.
    pub(in crate::proxy) fn give_up_move(&mut self) {
        if !self.is_to_follow() {
            self.discard_move();
        }
    }
}
