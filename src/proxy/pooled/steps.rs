//! What is done between a client's transactions, on a connection that it holds: its settings are brought there, what it
//! leaves is read, orders are obeyed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::sync::oneshot;

use super::{Mending, Place, PooledSession, StashState};
use crate::postgres::{RawConnection, RawError};
use crate::proxy::client_error::ClientError;
use crate::proxy::entry::{MoveOutcome, Order};
use crate::proxy::handoff::{HandoffError, SessionState as State, Tie, Traces, apply_delta, capture, delta};
use crate::proxy::pool::{Link, Taken};
use crate::proxy::session::{End, Session, TakenOver};
use crate::sqlstate;
use crate::wire::frame::{backend, frontend};
use crate::wire::message;

/// How long a server may take for what is done between transactions. Then it is given up.
const PATIENCE: Duration = Duration::from_secs(15);

impl PooledSession {
    /// Deals with what the mailbox holds.
    pub(super) async fn obey(&mut self) -> Result<(), End> {
        for order in self.entry.take_orders() {
            match order {
                Order::Cancel { done } => self.cancel(done),
                Order::End(error) => return Err(End::Told(error)),
                // Between transactions nothing of it is on a server, and what is running is waited for anyway.
                Order::Prepare { order, reply } => {
                    let pool = self.pool.clone();
                    tokio::task::spawn_local(async move {
                        let prepared = pool.prepare(order).await;
                        // Whoever asked may have stopped waiting.
                        let _heard = reply.send(prepared.map_or_else(MoveOutcome::Failed, |()| MoveOutcome::Ready));
                    });
                }
                Order::Settle { reply, .. } => drop(reply.send(MoveOutcome::Ready)),
                Order::Discard => self.pool.discard_prepared(),
                Order::Look => self.look()?,
            }
        }
        Ok(())
    }

    /// A statement that waits is cancelled here; one that runs is cancelled on the connection that the client holds at
    /// this moment, which is not given back before the cancel has arrived. Otherwise there is nothing to do.
    fn cancel(&mut self, done: oneshot::Sender<()>) {
        self.cancels.retain(|cancel| !cancel.is_finished());
        match (self.place, &self.link) {
            (Place::Held { .. } | Place::Waiting { .. }, _) => self.cancelled = true,
            (Place::Inside { .. }, Some(_)) => self.cancel_on_server(Some(done)),
            (Place::Outside | Place::Inside { .. }, _) => {}
        }
    }

    /// Cancels what runs on the connection that the client holds; `done` is dropped once the server has been told.
    pub(super) fn cancel_on_server(&mut self, done: Option<oneshot::Sender<()>>) {
        let Some(link) = &self.link else { return };
        let connector = self.worker.shared.connector(link.server()).clone();
        let (pid, key) = (link.pid(), link.backend.connection.cancel_key.clone());
        self.cancels.push(tokio::task::spawn_local(async move {
            if let Err(error) = connector.cancel(pid, &key).await {
                tracing::warn!(%error, pid, "a cancel could not be passed on");
            }
            drop(done);
        }));
        // That nothing is left of it is made certain by a round trip.
        self.traces |= Traces::SESSION;
    }

    /// Waits until no cancel is on its way.
    pub(super) async fn settle_cancels(&mut self) {
        for cancel in self.cancels.drain(..) {
            // A cancel that panicked has ended too.
            let _ended = cancel.await;
        }
    }

    /// Makes the connection as the client needs it. One that fails a check is replaced.
    pub(super) async fn fit(&mut self) -> Result<(), End> {
        let Some(mut link) = self.link.take() else { return Ok(()) };
        let settings = self.pool.central.settings();
        if link.idle_for(Instant::now()) > settings.server_check_delay {
            let query = settings.server_check_query.clone();
            let checked = tokio::time::timeout(PATIENCE, link.connection().simple_query(&query)).await;
            if !matches!(checked, Ok(Ok(_))) {
                tracing::info!(pid = link.pid(), "a connection that lay idle is of no use any more");
                self.replace(link);
                return Ok(());
            }
            link.unnamed = 0;
            link.note_used();
        }
        if let Err(unfit) = bring(&mut link, &self.profile).await {
            if unfit.code == sqlstate::QUERY_CANCELED {
                // By what was meant for the client before, a cancel or a time-out.
                tracing::info!(pid = link.pid(), "a connection could not be made as its next client needs it");
                self.replace(link);
                return Ok(());
            }
            self.link = Some(link);
            return Err(End::Told(ClientError::SettingsLost { code: unfit.code }));
        }
        self.profile.note_reported(link.server(), &link.reported);
        self.link = Some(link);
        self.tell_changes();
        Ok(())
    }

    /// Closes a connection that is of no use; the client takes another one.
    fn replace(&mut self, link: Box<Link>) {
        link.close();
        self.entry.set_backend_pid(0);
        self.member.leave();
        self.place = Place::Outside;
    }

    /// Reads what the transaction has left, and gives the connection back unless something ties the client to it.
    pub(super) async fn settle(&mut self) -> Result<Vec<Tie>, End> {
        let had_cancel = !self.cancels.is_empty();
        self.settle_cancels().await;
        let Some(mut link) = self.link.take() else { return Ok(Vec::new()) };
        let is_to_be_read = self.traces.outlive() || had_cancel || !link.spoiled && !self.told_is(&link);
        if link.spoiled {
            link.close();
            if is_to_be_read {
                return Err(End::Told(ClientError::SettingsLost { code: sqlstate::INTERNAL_ERROR.to_owned() }));
            }
            self.end_stay();
            return Ok(Vec::new());
        }
        let mut ties = Vec::new();
        if is_to_be_read {
            match tokio::time::timeout(PATIENCE, self.read_state(&mut link)).await {
                Ok(Ok(read)) => ties = read,
                Ok(Err(code)) => {
                    link.close();
                    return Err(End::Told(ClientError::SettingsLost { code }));
                }
                Err(_) => {
                    link.close();
                    return Err(End::ServerLost);
                }
            }
        }
        if self.pool.central.settings().max_prepared_statements == 0 && !self.names.is_empty() {
            ties.push(Tie::Statements);
        }
        if !ties.is_empty() {
            let taken_over = tokio::time::timeout(PATIENCE, self.take_over_statements(&mut link)).await;
            if !matches!(taken_over, Ok(Ok(()))) {
                self.link = Some(link);
                return Err(End::ServerLost);
            }
            self.link = Some(link);
            return Ok(ties);
        }
        if self.wipe(&mut link).await.is_err() {
            // Its state is not known: nobody gets it.
            link.spoiled = true;
        }
        self.link = Some(link);
        self.end_stay();
        Ok(ties)
    }

    fn told_is(&self, link: &Link) -> bool {
        *link.reported == *self.told
    }

    fn end_stay(&mut self) {
        self.mending = Mending::None;
        self.expected.clear();
        if self.ledger.is_uncertain() || !self.ledger.is_quiet() {
            self.ledger = crate::wire::ledger::Ledger::new();
            self.entered_turn = 0;
        }
        self.leave(Instant::now());
    }

    /// Reads the connection's state: what can be given to another one becomes the client's profile.
    async fn read_state(&mut self, link: &mut Link) -> Result<Vec<Tie>, String> {
        self.tracked.at_safe_point();
        let mut for_client = BytesMut::new();
        let customs = link.custom_names();
        let captured = capture(link.connection(), &self.tracked, &customs, &mut for_client).await;
        self.say(&for_client);
        let state = captured.map_err(|error| code_of(&error))?;
        link.held.retain(|statement| state.has_statement(&statement.name));
        let ties = state.ties();
        link.note_reported();
        self.told = link.reported.clone();
        let settings = state.into_settings();
        link.profile = self.pool.central.profile(settings.clone());
        self.profile = self.pool.central.profile(settings.reset_to(&self.startup.state));
        if let Some(name) = self.profile.state.application_name() {
            self.entry.set_application_name(name);
        }
        Ok(ties)
    }

    /// Takes off a connection what could not be read, or what the configuration wants taken off.
    async fn wipe(&mut self, link: &mut Link) -> Result<(), RawError> {
        let settings = self.pool.central.settings();
        let is_unknown = self.traces.outlive() && self.tracked.names_uncertain();
        if (settings.server_reset_query_always || is_unknown) && !settings.server_reset_query.is_empty() {
            let query = settings.server_reset_query.clone();
            link.connection().simple_query(&query).await?;
            link.held.clear();
            link.unnamed = 0;
            link.note_reported();
            let mut nobody = BytesMut::new();
            let tracked = crate::proxy::handoff::Tracked::new();
            match capture(link.connection(), &tracked, &[], &mut nobody).await {
                Ok(state) => link.profile = self.pool.central.profile(state),
                Err(_) => link.spoiled = true,
            }
        } else if self.mending == Mending::Statements {
            forget_statements(link).await?;
        }
        Ok(())
    }

    /// Prepares the connection's statements anew and lets the batch be sent again.
    pub(super) async fn mend(&mut self) -> Result<(), End> {
        self.mending = Mending::None;
        let Some(link) = &mut self.link else { return Ok(()) };
        forget_statements(link).await.map_err(|_| End::ServerLost)?;
        let mut batch = std::mem::take(&mut self.stash.frames);
        if std::mem::take(&mut self.up.terminated) {
            // It is looked at again behind the batch.
            batch.extend(message::TERMINATE);
        }
        self.up.buffer.prepend(&batch);
        self.stash.state = StashState::Useless;
        Ok(())
    }

    /// Gives the client's statements, on the connection that it keeps, the names that the client knows.
    async fn take_over_statements(&mut self, link: &mut Link) -> Result<(), RawError> {
        let mut messages = Vec::new();
        let mut count = 0;
        for statement in link.held.iter() {
            message::close_raw(&mut messages, &statement.name);
        }
        messages.extend_from_slice(&message::SYNC);
        count += 1;
        for (name, statement) in self.names.iter() {
            match &statement.takes {
                Some(taken) => message::parse_raw(&mut messages, name, &taken.tail()),
                None => message::parse_raw(&mut messages, name, &statement.tail),
            }
            messages.extend_from_slice(&message::SYNC);
            count += 1;
        }
        let taken = self.unnamed.takes.as_ref().map(Taken::tail);
        let is_there = link.unnamed == self.unnamed.token && taken.is_none();
        if self.unnamed.token != 0 && !is_there && !self.unnamed.body.is_empty() {
            message::parse_raw(&mut messages, b"", taken.as_deref().unwrap_or(&self.unnamed.body[1..]));
            messages.extend_from_slice(&message::SYNC);
            count += 1;
        }
        let connection = link.connection();
        // A small answer each, which would fill up what the server can send before it has read them all.
        connection.send_and_read(&messages).await?;
        let mut for_client = Vec::new();
        while count > 0 {
            let frame = connection.next_frame().await?;
            match frame.tag {
                b'Z' => count -= 1,
                b'A' => message::raw(&mut for_client, frame.tag, &frame.body),
                // One that cannot be prepared any more fails when it is used.
                _ => {}
            }
        }
        link.held.clear();
        self.say(&for_client);
        self.track_unnamed(taken.as_deref());
        Ok(())
    }

    /// From now on the session's unnamed statement is the connection's own, and moves with it.
    fn track_unnamed(&mut self, taken: Option<&[u8]>) {
        let deallocates = taken.map(|tail| [b"\0", tail].concat());
        let body = deallocates.as_ref().unwrap_or(&self.unnamed.body);
        if self.unnamed.token != 0 && !body.is_empty() {
            self.tracked.on_client_frame(frontend::PARSE, body, body.len());
            self.tracked.on_server_frame(backend::PARSE_COMPLETE);
        }
    }

    /// From now on the client is served as in session mode, on this connection.
    pub(super) fn pin(mut self, ties: &[Tie]) -> Option<Session> {
        let link = self.link.take()?;
        let words: Vec<String> = ties.iter().map(ToString::to_string).collect();
        let words = words.join(", ");
        tracing::info!(session = self.entry.id(), pid = link.pid(), ties = words, "a client keeps its connection");
        self.entry.set_pinned(words);
        self.entry.set_backend(Some((link.server(), link.pid())));
        if let Place::Inside { since } = self.place {
            self.local.meters.took(since.elapsed(), self.ledger.readies().wrapping_sub(self.entered_turn));
        }
        self.member.leave();
        if self.up.terminated {
            // What is said last is said there.
            self.up.buffer.append(&message::TERMINATE);
        }
        let Link { backend, seat, .. } = *link;
        let taken = TakenOver {
            client: self.client,
            backend,
            member: self.member,
            login: self.login,
            epoch: self.epoch,
            from_client: self.up.buffer,
            to_client: self.down.buffer,
            tracked: self.tracked,
            registration: self.entry,
            key: self.key,
            watch: self.watch,
            slot: self.slot,
            seat,
        };
        Some(Session::take_over(self.worker, self.local, taken))
    }
}

/// Why a connection could not be made as a client needs it.
#[derive(Debug)]
pub(super) struct Unfit {
    /// SQLSTATE.
    pub(super) code: String,
    /// The setting that its server has refused, if it was one.
    pub(super) setting: Option<String>,
}

/// Brings a connection's settings to those of a profile. Where that fails, the connection is spoiled.
pub(super) async fn bring(link: &mut Link, profile: &Arc<crate::proxy::pool::Profile>) -> Result<(), Unfit> {
    if Arc::ptr_eq(&link.profile, profile) {
        return Ok(());
    }
    let change = delta(&link.profile.state, &profile.state);
    if !change.is_empty() {
        link.spoiled = true;
        let failed = |code: String| Unfit { code, setting: None };
        let applied = tokio::time::timeout(PATIENCE, apply_delta(link.connection(), &change)).await;
        let answered = applied.map_err(|_| failed(sqlstate::CONNECTION_FAILURE.to_owned()))?;
        let report = answered.map_err(|error| failed(code_of(&error)))?;
        if let Some(unfit) = report.blockers().into_iter().find_map(refused_with) {
            return Err(unfit);
        }
        link.spoiled = false;
    }
    link.note_reported();
    link.profile = profile.clone();
    Ok(())
}

fn refused_with(blocker: crate::proxy::handoff::Blocker) -> Option<Unfit> {
    use crate::proxy::handoff::Blocker;
    match blocker {
        Blocker::Setting { name, sqlstate } => Some(Unfit { code: sqlstate, setting: Some(name) }),
        Blocker::Role { sqlstate } => Some(Unfit { code: sqlstate, setting: Some("role".to_owned()) }),
        Blocker::Listen { sqlstate } => Some(Unfit { code: sqlstate, setting: None }),
        _ => None,
    }
}

pub(super) fn code_of(error: &HandoffError) -> String {
    match error {
        HandoffError::Refused { sqlstate, .. } => sqlstate.clone(),
        HandoffError::Lost { .. } => sqlstate::CONNECTION_FAILURE.to_owned(),
        HandoffError::Protocol { .. } | HandoffError::NotIdle | HandoffError::TooLarge { .. } => {
            sqlstate::INTERNAL_ERROR.to_owned()
        }
    }
}

/// Closes every statement of a connection.
async fn forget_statements(link: &mut Link) -> Result<(), RawError> {
    let connection: &mut RawConnection = link.connection();
    connection.simple_query("DEALLOCATE ALL").await?;
    link.held.clear();
    link.unnamed = 0;
    Ok(())
}

/// The state of a client that connects with these settings, on a connection whose own state is `base`.
pub(super) fn with_startup(base: &State, settings: &[(String, String)]) -> State {
    base.clone().with_settings(settings.iter().map(|(name, value)| (name.as_str(), value.as_str())))
}
