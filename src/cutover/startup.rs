//! After a start: who is active? And whatever a crash has left is settled.
//!
//! Both servers are asked, the conclusion is [`crate::catalog::resolve`]'s. A cutover without an outcome is settled by
//! proposing to abort it, unless its coordinator lives; a fence that was aborted is lifted, one that was decided is told
//! so. Only then are routes published. What cannot be read now is tried again in the background: a restart never
//! reverts a decided cutover and never stays paused. The engine is told the outcome of a cutover that it takes for open
//! whenever its migrations change: the answer to its own note may have been lost, or another process have begun it. At
//! a start nobody waits for what it then puts away, which takes connections to each database: who is active is known.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};

use super::CutoverError;
use super::home;
use super::late;
use super::leadership::{claim_coordination, release_coordination};
use super::parts::Engine;
use super::settle;
use crate::catalog::claims::{self, Claims};
use crate::catalog::decision::{self, Case, Outcome};
use crate::catalog::fence::Fence;
use crate::catalog::resolve::{self, Verdict};
use crate::catalog::{fence, migrations};
use crate::postgres::{Connector, Control};
use crate::proxy::Sessions;
use crate::shutdown::Tasks;
use crate::switch::{Database, Epoch, Route, ServerRole, Switchboard};

/// Between two attempts while something is not settled.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// See the module.
pub(super) struct Resolver {
    switchboard: Arc<Switchboard>,
    sessions: Arc<Sessions>,
    engine: Arc<dyn Engine>,
    source: Connector,
    target: Connector,
    control_database: String,
    /// Held by a cutover or by a pass of the resolution: neither may look at what the other is doing.
    turn: Mutex<()>,
    /// Which server could not be read the last time, and why: it is said when that changes.
    unreadable: std::sync::Mutex<[Option<String>; 2]>,
}

/// Of which cutovers the engine was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Of all that it takes for open and whose outcome stands.
    Everything,
    /// Of those without a coordinator that lives, here or in another process.
    AllButTheLiving,
}

/// Whether a pass waits until the engine has acted on what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Telling {
    /// It does.
    Now,
    /// It is told by [`Resolver::keep_engine_informed`]: clients wait for this pass.
    Later,
}

/// A server that can be read.
struct Readable {
    control: Control,
    claims: Claims,
}

impl Resolver {
    pub(super) fn new(
        switchboard: Arc<Switchboard>,
        sessions: Arc<Sessions>,
        engine: Arc<dyn Engine>,
        source: Connector,
        target: Connector,
        control_database: String,
    ) -> Self {
        Self {
            switchboard,
            sessions,
            engine,
            source,
            target,
            control_database,
            turn: Mutex::new(()),
            unreadable: std::sync::Mutex::default(),
        }
    }

    /// Waits until nobody else resolves or cuts over.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// One pass now, which clients wait for. In the background: more while something remains, and the engine is told.
    pub(super) async fn resolve_at_startup(self: Arc<Self>, tasks: &Tasks) {
        if !self.pass(Telling::Later).await {
            self.clone().settle_in_background(tasks);
        }
        tasks.spawn(self.keep_engine_informed(tasks.clone()));
    }

    /// One pass now; more in the background while something remains.
    pub(super) async fn resolve_until_settled(self: Arc<Self>, tasks: &Tasks) {
        if self.pass(Telling::Now).await {
            return;
        }
        self.settle_in_background(tasks);
    }

    /// Settles what a cutover has left that has ended.
    pub(super) fn settle_in_background(self: Arc<Self>, tasks: &Tasks) {
        let stop = tasks.clone();
        tasks.spawn(async move {
            loop {
                tokio::select! {
                    // The sleep is lost, nothing else.
                    () = stop.stopping() => return,
                    () = tokio::time::sleep(TRY_AGAIN) => {}
                }
                if self.pass(Telling::Now).await {
                    return;
                }
            }
        });
    }

    /// Until the process stops: tells the engine what became of cutovers that it takes for open and nobody works on, and
    /// lifts the fences of migrations that were cancelled.
    async fn keep_engine_informed(self: Arc<Self>, tasks: Tasks) {
        let mut changes = self.engine.changes();
        // A read, a watch that is kept, a sleep and a token: nothing is lost by dropping a wait for them.
        let mut untold = tokio::select! {
            () = tasks.stopping() => return,
            untold = self.has_to_be_told() => untold,
        };
        loop {
            if !untold {
                tokio::select! {
                    () = tasks.stopping() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
            untold = false;
            loop {
                tokio::select! {
                    () = tasks.stopping() => return,
                    // Each of its steps is one transaction, and what is left of them is found by the next start.
                    informed = Box::pin(self.inform_engine()) => if informed { break },
                }
                tokio::select! {
                    () = tasks.stopping() => return,
                    () = tokio::time::sleep(TRY_AGAIN) => {}
                }
            }
        }
    }

    /// Whether the engine may take a cutover for open. Not, as far as that is known, where the target cannot be read:
    /// the engine cannot either, and changes when it can.
    async fn has_to_be_told(&self) -> bool {
        let Some(target) = self.read(ServerRole::Target).await else { return false };
        !migrations::completing(&target.control).await.is_ok_and(|open| open.is_empty())
    }

    /// Returns whether nothing remains to be told or done.
    async fn inform_engine(&self) -> bool {
        let _turn = self.turn().await;
        let (source, target) = tokio::join!(self.read(ServerRole::Source), self.read(ServerRole::Target));
        let told = Box::pin(self.tell_engine(source.as_ref(), target.as_ref())).await;
        let told =
            told.inspect_err(|error| tracing::debug!(%error, "the engine does not know yet how its cutover ended"));
        // A migration that was cancelled after a rollback leaves a fence that nobody needs any more.
        let (mut source, mut target) = (source, target);
        let in_order = Box::pin(self.settle_homes(&mut source, &mut target)).await;
        let in_order = in_order.inspect_err(
            |error| tracing::debug!(%error, "a server that was left, or led back to, is not in order yet"),
        );
        target.is_some() && told.is_ok_and(|of| of == Told::Everything) && in_order.is_ok_and(|in_order| in_order)
    }

    /// Reads, settles, publishes. Returns whether nothing remains to be done. A database into which sessions are let is left as
    /// it is: a server that does not answer just now takes nothing back.
    async fn pass(&self, telling: Telling) -> bool {
        let _turn = self.turn().await;
        let (source, target) = tokio::join!(self.read(ServerRole::Source), self.read(ServerRole::Target));
        let (mut source, mut target) = (source, target);
        let mut settled = source.is_some() && target.is_some();
        if let Err(error) = Box::pin(self.settle(source.as_ref(), target.as_ref())).await {
            tracing::warn!(%error, "what an earlier cutover has left is not settled yet");
            settled = false;
        }
        // What was settled changes what the servers say.
        for server in [&mut source, &mut target].into_iter().flatten() {
            match claims::read(&*server.control).await {
                Ok(claims) => server.claims = claims,
                Err(error) => {
                    tracing::warn!(%error, "a server stopped answering while an earlier cutover was being settled");
                    return false;
                }
            }
        }
        // Before clients are let in: they would find a server that is read-only by default.
        match Box::pin(self.settle_homes(&mut source, &mut target)).await {
            Ok(in_order) => settled &= in_order,
            Err(error) => {
                tracing::warn!(%error, "a server that was left, or led back to, is not in order yet");
                settled = false;
            }
        }
        let source_claims = source.as_ref().map(|server| &server.claims);
        let target_claims = target.as_ref().map(|server| &server.claims);
        // They would write what foreign keys refuse, and no trigger would see it.
        let unsettled = Box::pin(self.settle_late(source_claims, target_claims)).await;
        let published = self.publish(source_claims, target_claims, &unsettled);
        if telling == Telling::Now
            && let Err(error) = Box::pin(self.tell_engine(source.as_ref(), target.as_ref())).await
        {
            tracing::warn!(%error, "the engine does not know yet how its cutover ended");
            settled = false;
        }
        settled && published
    }

    async fn read(&self, role: ServerRole) -> Option<Readable> {
        let attempt = async {
            let control = self.connector(role).control(&self.control_database, "resolve").await?;
            let claims = claims::read(&*control).await?;
            Ok::<_, CutoverError>(Readable { control, claims })
        };
        match attempt.await {
            Ok(readable) => {
                if self.note_unreadable(role, None) {
                    tracing::info!(server = %role, "can be read again");
                }
                Some(readable)
            }
            Err(error) => {
                if self.note_unreadable(role, Some(error.to_string())) {
                    tracing::warn!(server = %role, %error, "cannot read what this server says of who is active; asking on");
                } else {
                    tracing::debug!(server = %role, %error, "still cannot be read");
                }
                None
            }
        }
    }

    /// Returns whether that is news.
    fn note_unreadable(&self, role: ServerRole, error: Option<String>) -> bool {
        let mut unreadable = self.unreadable.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = &mut unreadable[role as usize];
        let is_news = known.is_some() != error.is_some();
        *known = error;
        is_news
    }

    fn connector(&self, role: ServerRole) -> &Connector {
        match role {
            ServerRole::Source => &self.source,
            ServerRole::Target => &self.target,
        }
    }

    /// Gives every cutover without an outcome one, and acts on outcomes that were not acted on.
    async fn settle(&self, source: Option<&Readable>, target: Option<&Readable>) -> Result<(), CutoverError> {
        let (Some(source), Some(target)) = (source, target) else { return Ok(()) };
        let mut chores = resolve::chores(Some(&source.claims), Some(&target.claims));
        for (own, other, role) in [(source, target, ServerRole::Source), (target, source, ServerRole::Target)] {
            for epoch in undecided(own, role, &source.claims, &target.claims) {
                let Some((fence, _)) = fence::read(&*own.control, epoch).await? else { continue };
                if let Some(outcome) = self.settle_one(&fence.case, other).await? {
                    chores.push(resolve::Chore { on: role, epoch, outcome });
                }
            }
        }
        for chore in chores {
            let on = match chore.on {
                ServerRole::Source => source,
                ServerRole::Target => target,
            };
            match chore.outcome {
                Outcome::Decided => settle::note_decided(&on.control, chore.epoch).await?,
                Outcome::Aborted => {
                    if let Some((fence, _)) = fence::read(&*on.control, chore.epoch).await? {
                        settle::lift(self.connector(chore.on), &self.control_database, &fence).await?;
                    }
                }
            }
            tracing::info!(epoch = chore.epoch.0, server = %chore.on, outcome = chore.outcome.as_str(), "settled a cutover");
        }
        Ok(())
    }

    /// Proposes to abort, unless the coordinator lives.
    async fn settle_one(&self, case: &Case, other: &Readable) -> Result<Option<Outcome>, CutoverError> {
        if !claim_coordination(&other.control, &case.migration).await? {
            tracing::warn!(epoch = case.epoch.0, "a cutover is undecided and its coordinator lives: waiting for it");
            return Ok(None);
        }
        let outcome = decision::propose(&*other.control, case, Outcome::Aborted, &other.claims.identity).await?;
        release_coordination(&other.control, &case.migration).await?;
        Ok(Some(outcome))
    }

    /// Makes the foreign keys and triggers of cutovers to the target that were interrupted before. Returns the databases
    /// that lack them, with the reason.
    async fn settle_late(&self, source: Option<&Claims>, target: Option<&Claims>) -> BTreeMap<String, String> {
        let active = |name: &String| {
            matches!(resolve::resolve(name, source, target), Verdict::Active { server: ServerRole::Target, .. })
        };
        let concerned = |name: &String| is_closed(&self.switchboard.database(name));
        let databases = resolve::covered(source, target).into_iter().filter(|name| active(name) && concerned(name));
        late::settle(&self.target, databases).await
    }

    /// Publishes what is known, but for databases that nobody may be let into. Returns whether everything is.
    fn publish(&self, source: Option<&Claims>, target: Option<&Claims>, unsettled: &BTreeMap<String, String>) -> bool {
        // Before it is said where the others run: one that is first seen here would be taken for one of them.
        for name in resolve::covered(source, target) {
            self.switchboard.database(&name);
        }
        // Databases that no cutover ever covered have no name in the claims; the empty name stands for them.
        let elsewhere = resolve::resolve("", source, target);
        let mut known = matches!(elsewhere, Verdict::Active { .. });
        self.switchboard.set_initial(route(&elsewhere));
        let mut verdicts = Vec::new();
        for database in self.switchboard.all().into_iter().filter(|database| is_closed(database)) {
            let verdict = match unsettled.get(database.name()) {
                Some(reason) => Verdict::Refuse { reason: reason.clone() },
                None => resolve::resolve(database.name(), source, target),
            };
            known &= matches!(verdict, Verdict::Active { .. });
            verdicts.push((database, verdict));
        }
        self.forget_cutovers(&verdicts);
        for (database, verdict) in &verdicts {
            apply(database, verdict);
        }
        known
    }

    /// Where a cutover came to nothing, sessions go on at the epoch at which they were stopped: they must find nothing
    /// of what they had prepared for it.
    fn forget_cutovers(&self, verdicts: &[(Arc<Database>, Verdict)]) {
        let mut stayed = Vec::new();
        for (database, verdict) in verdicts {
            if matches!(verdict, Verdict::Active { epoch, .. } if *epoch == database.epoch()) {
                database.set_return_window(None);
                stayed.push(database.name().to_owned());
            }
        }
        if !stayed.is_empty() {
            self.sessions.discard_moves(&stayed);
        }
    }

    /// Fences that stand since a decision: lifted where a later one has brought the databases back, or the migration was
    /// cancelled after a rollback; shut where a rollback that came to nothing has left them ajar. Returns whether nothing
    /// remains.
    async fn settle_homes(
        &self,
        source: &mut Option<Readable>,
        target: &mut Option<Readable>,
    ) -> Result<bool, CutoverError> {
        let mut in_order = true;
        let claims = |server: &Option<Readable>| server.as_ref().map(|server| server.claims.clone());
        let (of_source, of_target) = (claims(source), claims(target));
        let cancelled = match &*target {
            Some(server) => migrations::cancelled(&server.control).await?,
            None => HashSet::new(),
        };
        for (role, server) in [(ServerRole::Source, source), (ServerRole::Target, target)] {
            let Some(server) = server else { continue };
            for standing in fence::standing(&*server.control).await? {
                let Case { migration, databases, epoch } = &standing.fence.case;
                let verdict = |database: &String| resolve::resolve(database, of_source.as_ref(), of_target.as_ref());
                let Some(Verdict::Active { server: active, epoch: since }) = databases.first().map(verdict) else {
                    continue;
                };
                let came_back = active == role && since > *epoch;
                let given_up = active != role && cancelled.contains(migration);
                if !came_back && !given_up && !standing.ajar {
                    continue;
                }
                // A rollback under way has opened it, or is about to lift it.
                if !claim_coordination(&server.control, migration).await? {
                    if came_back {
                        self.override_fence(role, server, &standing.fence, since).await?;
                    }
                    in_order = false;
                    continue;
                }
                if came_back || given_up {
                    let by = server.claims.decisions.iter().find(|decision| decision.epoch == since);
                    if came_back && by.is_some_and(|decision| decision.migration != *migration) {
                        // Somebody has opened it since for another migration: what was saved then is not what is wanted now.
                        fence::note_returned(&*server.control, *epoch, since).await?;
                    } else {
                        home::give_back(&mut server.control, &standing.fence, since).await?;
                    }
                    for name in databases {
                        self.switchboard.database(name).set_return_window(None);
                    }
                } else {
                    home::shut_again(self.connector(role), &self.control_database, &standing).await?;
                }
                tracing::info!(epoch = epoch.0, server = %role, came_back, given_up, "the fence of an earlier cutover is in order");
                release_coordination(&server.control, migration).await?;
            }
        }
        Ok(in_order)
    }

    /// Until the fence of a server that was led back to is lifted, sessions that are let in there are given the default
    /// that they would have had. Who serves already does so by itself.
    async fn override_fence(
        &self,
        role: ServerRole,
        server: &Readable,
        fence: &Fence,
        since: Epoch,
    ) -> Result<(), CutoverError> {
        for (name, window) in home::windows(&server.control, fence, since).await? {
            let database = self.switchboard.database(&name);
            if is_closed(&database) {
                database.set_return_window(Some((role, window)));
            }
        }
        Ok(())
    }

    /// The engine may have been stopped between a verdict and its own note of it, or before there was a fence.
    async fn tell_engine(&self, source: Option<&Readable>, target: Option<&Readable>) -> Result<Told, CutoverError> {
        let Some(control) = target.map(|server| &server.control) else { return Ok(Told::Everything) };
        let mut told = Told::Everything;
        for migrations::Completing { name: migration, leads_to, databases } in migrations::completing(control).await? {
            // Who holds the lock is about to fence, or deciding, and tells its engine itself.
            if !claim_coordination(control, &migration).await? {
                told = Told::AllButTheLiving;
                continue;
            }
            // Read under the lock: a coordinator may have come to its end since the last look.
            let (source, target) = (reread(source).await?, reread(target).await?);
            let outcome = resolve::outcome_of(&migration, &databases, leads_to, source.as_ref(), target.as_ref());
            if let Some(outcome) = outcome {
                tracing::info!(migration, outcome = outcome.as_str(), "telling the engine how its cutover ended");
                self.engine.cutover_settled(&migration, outcome).await.map_err(CutoverError::Engine)?;
            }
            release_coordination(control, &migration).await?;
        }
        Ok(told)
    }
}

async fn reread(server: Option<&Readable>) -> Result<Option<Claims>, CutoverError> {
    match server {
        Some(server) => Ok(Some(claims::read(&*server.control).await?)),
        None => Ok(None),
    }
}

/// Fences of `own` that resolve as undecided.
fn undecided(own: &Readable, role: ServerRole, source: &Claims, target: &Claims) -> Vec<Epoch> {
    let open = own.claims.fences.iter().filter(|fence| fence.outcome.is_none());
    open.filter(|fence| {
        fence.databases.iter().any(|database| {
            let verdict = resolve::resolve(database, Some(source), Some(target));
            verdict == Verdict::Undecided { epoch: fence.epoch, fenced: role }
        })
    })
    .map(|fence| fence.epoch)
    .collect()
}

fn route(verdict: &Verdict) -> Route {
    match verdict {
        Verdict::Active { server, epoch } => Route::To { server: *server, epoch: *epoch },
        Verdict::Undecided { epoch, .. } => Route::Unknown { reason: format!("cutover {epoch} is being decided") },
        Verdict::Refuse { reason } => Route::Unknown { reason: reason.clone() },
    }
}

/// Whether nobody is let in: it is not known where, or a cutover that came to no end keeps the gate closed. While a pass runs
/// none is under way.
pub(super) fn is_closed(database: &Database) -> bool {
    matches!(&*database.route(), Route::Unknown { .. }) || database.is_fenced_by_cutover()
}

fn apply(database: &Database, verdict: &Verdict) {
    match route(verdict) {
        Route::To { server, epoch } => {
            tracing::info!(database = database.name(), server = %server, epoch = epoch.0, "active");
            database.set_prepare_window(None);
            database.open(server, epoch);
        }
        Route::Unknown { reason } => {
            if *database.route() == (Route::Unknown { reason: reason.clone() }) {
                return;
            }
            tracing::error!(database = database.name(), reason, "nobody is known to be active: clients are refused");
            database.set_unknown(reason);
        }
    }
}
