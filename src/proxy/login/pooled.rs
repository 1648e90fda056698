//! Transaction mode: the client joins the pool of its role in its database, and has no connection of its own.
//!
//! What its startup packet asks for is brought to a connection of the pool once, to learn what it comes to; clients that
//! start alike are let in by what is known. Must never keep a connection when the client has been told that it is ready.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{EARLY_INPUT_MAX, Introduced, LoginInProgress, Refused, admit, ended_by};
use crate::postgres::Credential;
use crate::proxy::entry::SessionState;
use crate::proxy::pool::{Link as PoolLink, LocalPool, Profile, Reported, Waiter};
use crate::proxy::pooled::{self, Pooled};
use crate::proxy::worker::LocalDatabase;
use crate::switch::Member;
use crate::wire::ledger::TransactionStatus;
use crate::wire::message;

impl LoginInProgress<'_> {
    /// Learns what the client's settings come to, on a connection of its pool unless that is known already.
    pub(super) async fn join_pool(&mut self, credential: Credential) -> Result<Pooled, Refused> {
        self.may_log_in(self.active_server(false)?).await.map_err(Refused::With)?;
        let Introduced { key, patience } = self.introduce()?;
        self.registration.set_pooled();
        let settings = pooled::settings_of(&self.startup.parameters).map_err(Refused::With)?;
        let login = self.login(credential);
        self.meet(&login).await?;
        let local = self.worker.database(&login.database);
        let pool = self.worker.pool(&local, &login.database, &login.user, &login.credential);
        let member = local.database.join();
        let waiter = Waiter::new(pool.worker, (*self.registration).clone());
        let (profile, told) = match pooled::known(&pool, &settings) {
            Some(known) => known,
            None => {
                let learned = self.learn(&pool, (&local, &member), &waiter, settings, patience).await;
                // Whatever came of it, nobody hands a connection to a waiter that has gone.
                pool.stop_waiting(&waiter);
                learned?
            }
        };
        let out = &mut self.channel.out;
        for (name, value) in told.iter() {
            message::parameter_status(out, name, value);
        }
        message::backend_key_data(out, key.pid, &key.secret);
        message::ready_for_query(out, TransactionStatus::Idle);
        self.registration.set_state(SessionState::Idle);
        Ok(Pooled { login, local, pool, member, waiter, profile, told, key })
    }

    async fn learn(
        &mut self,
        pool: &Rc<LocalPool>,
        (local, member): (&LocalDatabase, &Member),
        waiter: &Arc<Waiter>,
        settings: Vec<(String, String)>,
        patience: Duration,
    ) -> Result<(Arc<Profile>, Reported), Refused> {
        loop {
            let admission = admit(&mut self.channel, local, member, &self.registration, patience).await?;
            // Not inside while it waits in line.
            member.leave();
            pool.server_at(admission.epoch);
            pool.wait(waiter);
            let mut link = self.wait_for_link(pool, waiter).await?;
            let Some(admission) = member.try_enter() else {
                pool.give_back(link, Instant::now().into_std());
                continue;
            };
            if pool.server_at(admission.epoch) != Some(link.server()) {
                member.leave();
                link.close();
                continue;
            }
            let learned = pooled::learn(pool, &mut link, settings).await;
            pool.give_back(link, Instant::now().into_std());
            member.leave();
            return learned.map_err(Refused::With);
        }
    }

    /// Waits in line. A client that goes away meanwhile, or sends more than a client has reason to, ends it.
    async fn wait_for_link(&mut self, pool: &Rc<LocalPool>, waiter: &Arc<Waiter>) -> Result<Box<PoolLink>, Refused> {
        loop {
            let entry = &self.registration;
            let given = std::future::poll_fn(|cx| {
                entry.set_waker(cx.waker());
                match waiter.take() {
                    Some(given) => std::task::Poll::Ready(Some(given)),
                    None if entry.has_orders() => std::task::Poll::Ready(None),
                    None => {
                        pool.open_for_waiting();
                        std::task::Poll::Pending
                    }
                }
            });
            tokio::select! {
                // Dropped and made anew in the next round; what was given stays with the waiter until it is taken.
                given = given => match given {
                    Some(given) => return given.map_err(Refused::With),
                    None => {
                        if let Some(error) = ended_by(entry) {
                            return Err(Refused::With(error));
                        }
                    }
                },
                // Cancel-safe: what was read is in the channel.
                read = self.channel.read_some(), if self.channel.input.len() < EARLY_INPUT_MAX => read?,
            }
        }
    }
}
