//! Shadow reads: a share of the reads that clients run also runs on the target before the cutover, and the answers and
//! latencies are compared.
//!
//! ```text
//! relay ──copies what passes── Shadowing ──at the safe point──▶ queue ──▶ runner: target, read-only, rolled back ──▶ tally
//!                                                                           │ other rows?
//!                                                                           └──▶ recheck: once the target has applied
//!                                                                                all of the source: target, then source
//! ```
//!
//! With transaction pooling it is [`Sampling`] that copies, for one transaction; what the client has set is known there.
//!
//! Clients are not touched: nothing waits for the target, what is over a bound is skipped and counted, and while no run is
//! on the relay looks at one cell of its database for each transaction.
//!
//! What must never happen here: a statement on the target outside of a read-only transaction, a connection of one login
//! used for another, a value in a view, a metric or a log.

mod compare;
mod judge;
mod pooled;
mod recheck;
mod runner;
mod taking;
mod tally;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use self::compare::Answer;
use self::judge::{Avoided, judge};
pub(super) use self::pooled::Sampling;
use self::runner::Call;
use self::taking::Learned;
pub(super) use self::taking::Shadowing;
pub use self::tally::{LatencyView, ShadowStatementView};
use self::tally::{Skip, Tally};
use super::Shared;
use super::entry::lock;
use super::handoff::SessionState;
use crate::postgres::Login;
use crate::switch::{Route, ServerRole};
use crate::telemetry::metrics::Metrics;

/// Samples that are being taken, wait or run, at the most: what bounds the memory of a run.
const IN_FLIGHT: usize = 128;

/// Sessions whose state is kept, at the most; no transaction of further ones is sampled.
const SESSIONS: usize = 512;

/// Sessions whose backends are asked for their state, in a second and at one time, at the most.
const LOOKS: u32 = 20;
const LOOKS_AT_ONCE: usize = 2;

/// Answers that differ and wait to be looked at again, at the most.
const DOUBTS: usize = 32;

/// For how long the target is not asked again for a login that it has refused, or not given a setting of, and how many of
/// them are remembered.
const REFUSED: Duration = Duration::from_secs(10);
const REFUSED_LOGINS: usize = 64;

/// How long the end of a run may take.
const ENDING: Duration = Duration::from_secs(2);

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct ShadowOrder {
    /// The migration's name.
    pub migration: String,
    /// Its databases.
    pub databases: Vec<String>,
    /// Percent of the transactions that are sampled.
    pub share: u8,
    /// For how long.
    pub lasts: Duration,
}

/// What shadow reads have found so far.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct ShadowView {
    /// The migration's name.
    pub migration: String,
    /// Whether samples are still taken.
    pub running: bool,
    /// Why they are not.
    pub ended: Option<String>,
    /// Percent of the transactions that are sampled.
    pub share: u8,
    /// In seconds since the Unix epoch.
    pub started_at: f64,
    /// Until it ends by itself.
    pub seconds_left: f64,
    /// Transactions that were chosen.
    pub sampled: u64,
    /// Those that were not run on the target, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// What the others came to.
    pub outcomes: BTreeMap<String, u64>,
    /// How often the target refused a read, by SQLSTATE.
    pub failed: BTreeMap<String, u64>,
    /// Answers that differed and wait to be looked at again.
    pub waiting: usize,
    /// Of the reads that both have answered, in milliseconds.
    pub source_ms: Option<LatencyView>,
    /// The same on the target.
    pub target_ms: Option<LatencyView>,
    /// Statements: those that differ or fail first, then those that take the target longest.
    pub statements: Vec<ShadowStatementView>,
}

/// Why shadow reads could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ShadowError {
    /// They are on.
    #[error("shadow reads of migration {0} are on")]
    IsOn(String),
    /// The proxy has not been started.
    #[error("the proxy does not serve yet")]
    NoProxy,
    /// They are not.
    #[error("no shadow reads of migration {0} are on")]
    IsOff(String),
    /// Clients are served by the target.
    #[error("database {0} is not served by the source")]
    NotOnSource(String),
    /// Its clients are about to leave the source.
    #[error("a cutover of database {0} is under way")]
    Leaving(String),
    /// A server did not say what is needed.
    #[error("database {database}: {reason}")]
    Unknown {
        /// Which.
        database: String,
        /// Why.
        reason: String,
    },
}

/// A transaction that was chosen, as its session saw it.
struct Sample {
    login: Arc<Login>,
    /// What the session had set up.
    state: Arc<SessionState>,
    /// Frames of the client.
    request: Vec<u8>,
    /// Of a statement that was prepared earlier: what a Parse has after the name.
    prepared: Option<Bytes>,
    /// Frames of the source.
    answer: Vec<u8>,
    took: Duration,
    _slot: Slot,
}

/// An answer of the target's that is another one.
struct Doubt {
    login: Arc<Login>,
    state: Arc<SessionState>,
    call: Call,
    answer: Answer,
    _slot: Slot,
}

/// A place among a number of them; given up when dropped.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn among(places: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let taken = places.fetch_add(1, Ordering::AcqRel);
        let slot = Self(places.clone());
        (taken < most).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What is known of a database from the start.
struct Facts {
    avoided: Avoided,
    /// Names of custom settings.
    names: Arc<Vec<String>>,
}

/// Shadow reads from an order to their end.
struct Run {
    order: ShadowOrder,
    /// Of all numbers.
    threshold: u32,
    facts: HashMap<String, Facts>,
    metrics: Arc<Metrics>,
    started: SystemTime,
    ends_at: Instant,
    tally: Mutex<Tally>,
    queue: Mutex<VecDeque<Sample>>,
    queued: Notify,
    doubts: Mutex<VecDeque<Doubt>>,
    doubted: Notify,
    /// Those that wait and those that are looked at.
    in_doubt: AtomicUsize,
    in_flight: Arc<AtomicUsize>,
    sessions: Arc<AtomicUsize>,
    /// Logins that the target has refused, and when.
    refusals: Mutex<VecDeque<(Arc<Login>, Instant)>>,
    /// What they have learned; `None` once the run is over.
    learned: Mutex<Option<Vec<Weak<Mutex<Learned>>>>>,
    looking: Arc<AtomicUsize>,
    /// Looks in the second that began then.
    looks: Mutex<(Instant, u32)>,
    /// Why it has ended.
    over: watch::Sender<Option<&'static str>>,
    /// Its connections are closed.
    closed: watch::Sender<bool>,
}

impl Run {
    fn is_over(&self) -> bool {
        self.over.borrow().is_some()
    }

    fn end(&self, why: &'static str) {
        let ends = self.over.send_if_modified(|over| {
            let is_first = over.is_none();
            over.get_or_insert(why);
            is_first
        });
        if ends {
            tracing::info!(migration = self.order.migration, why, "shadow reads end");
        }
    }

    async fn ended(&self) {
        // The sender lives as long as this does.
        let mut over = self.over.subscribe();
        let _changed = over.wait_for(Option::is_some).await;
    }

    fn covers(&self, database: &str) -> bool {
        self.facts.contains_key(database)
    }

    fn names(&self, database: &str) -> Option<Arc<Vec<String>>> {
        self.facts.get(database).map(|facts| facts.names.clone())
    }

    fn is_chosen(&self) -> bool {
        self.order.share >= 100 || rand::random::<u32>() < self.threshold
    }

    /// What its backends on the target log in with: like the session's, and read-only from the start.
    fn login(&self, own: &Login) -> Arc<Login> {
        let mut login = own.clone();
        let set = ["default_transaction_read_only", "application_name"];
        login.parameters.retain(|(name, _)| !set.iter().any(|own| name.eq_ignore_ascii_case(own)));
        login.parameters.push((set[0].to_owned(), "on".to_owned()));
        login.parameters.push((set[1].to_owned(), APPLICATION.to_owned()));
        Arc::new(login)
    }

    fn slot(&self) -> Option<Slot> {
        Slot::among(&self.in_flight, IN_FLIGHT)
    }

    fn seat(&self) -> Option<Slot> {
        Slot::among(&self.sessions, SESSIONS)
    }

    /// What a session learns, until the run is over.
    fn learner(&self) -> Arc<Mutex<Learned>> {
        let learner = Arc::new(Mutex::new(Learned::default()));
        match &mut *lock(&self.learned) {
            Some(all) => {
                if all.len() >= 2 * SESSIONS {
                    all.retain(|one| one.strong_count() > 0);
                }
                all.push(Arc::downgrade(&learner));
            }
            None => lock(&learner).forget(),
        }
        learner
    }

    /// Nothing of any session is kept any more.
    fn forget(&self) {
        lock(&self.refusals).clear();
        let all = lock(&self.learned).take();
        all.iter().flatten().filter_map(Weak::upgrade).for_each(|one| lock(&one).forget());
    }

    /// Leave to ask one backend, if not too many are asked.
    fn look(&self) -> Option<Slot> {
        let slot = Slot::among(&self.looking, LOOKS_AT_ONCE)?;
        let mut looks = lock(&self.looks);
        if looks.0.elapsed() >= Duration::from_secs(1) {
            *looks = (Instant::now(), 0);
        }
        looks.1 += 1;
        (looks.1 <= LOOKS).then_some(slot)
    }

    fn refused(&self, login: &Arc<Login>) {
        let mut refusals = lock(&self.refusals);
        if refusals.len() >= REFUSED_LOGINS {
            refusals.pop_front();
        }
        refusals.push_back((login.clone(), Instant::now()));
    }

    fn is_refused(&self, login: &Login) -> bool {
        let mut refusals = lock(&self.refusals);
        refusals.retain(|(_, at)| at.elapsed() < REFUSED);
        refusals.iter().any(|(refused, _)| refused.is_same_as(login))
    }

    fn sampled(&self) {
        lock(&self.tally).sampled();
    }

    fn skipped(&self, why: Skip) {
        lock(&self.tally).skipped(why, &self.metrics);
    }

    /// Nothing once the run is over: who empties the queue then does so after that is said.
    fn push(&self, sample: Sample) {
        let mut queue = lock(&self.queue);
        if self.is_over() {
            return;
        }
        // As many as there are slots.
        queue.push_back(sample);
        self.queued.notify_one();
    }

    /// The next sample, one of `login` before others: a connection to the target is then used again.
    async fn next(&self, login: Option<&Arc<Login>>) -> Sample {
        loop {
            let queued = self.queued.notified();
            {
                let mut queue = lock(&self.queue);
                let same = |sample: &Sample| login.is_some_and(|login| login.is_same_as(&sample.login));
                let at = queue.iter().position(same).unwrap_or(0);
                if let Some(sample) = queue.remove(at) {
                    return sample;
                }
            }
            queued.await;
        }
    }

    /// What is to be sent for a sample, if it may be run again.
    fn judged(&self, sample: &Sample) -> Result<Call, Skip> {
        let call = Call::of(&sample.request, sample.prepared.as_ref())?;
        let facts = self.facts.get(&sample.login.database).ok_or(Skip::NotKnown)?;
        judge(call.text(), &facts.avoided)?;
        Ok(call)
    }

    fn view(&self) -> ShadowView {
        let tally = lock(&self.tally);
        let ended = *self.over.borrow();
        let (source_ms, target_ms) = tally.latencies();
        ShadowView {
            migration: self.order.migration.clone(),
            running: ended.is_none(),
            ended: ended.map(str::to_owned),
            share: self.order.share,
            started_at: self.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            seconds_left: match ended {
                None => self.ends_at.saturating_duration_since(Instant::now()).as_secs_f64(),
                Some(_) => 0.0,
            },
            sampled: tally.sampled_so_far(),
            skipped: tally.skips(),
            outcomes: tally.outcomes(),
            failed: tally.sqlstates(),
            waiting: self.in_doubt.load(Ordering::Acquire),
            source_ms,
            target_ms,
            statements: tally.listed(),
        }
    }
}

/// `application_name` of connections to the target.
const APPLICATION: &str = "pgcutover shadow reads";

/// Where sessions and cutovers find the run, if there is one.
#[derive(Default)]
pub(super) struct Desk {
    /// The last one, whether it has ended or not.
    last: Mutex<Option<Arc<Run>>>,
    /// Sessions are there before their proxy is.
    proxy: OnceLock<Weak<Shared>>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Desk")
    }
}

impl Desk {
    pub(super) fn belongs_to(&self, proxy: &Arc<Shared>) {
        // Sessions have one proxy.
        let _first = self.proxy.set(Arc::downgrade(proxy));
    }

    /// None while there is no proxy.
    pub(super) fn reads(&self) -> Option<ShadowReads> {
        self.proxy.get().and_then(Weak::upgrade).map(ShadowReads)
    }

    fn last(&self) -> Option<Arc<Run>> {
        lock(&self.last).clone()
    }

    fn current(&self) -> Option<Arc<Run>> {
        self.last().filter(|run| !run.is_over())
    }

    /// Whether transactions of `database` may be samples.
    pub(super) fn is_on_for(&self, database: &str) -> bool {
        self.current().is_some_and(|run| run.covers(database))
    }

    /// Ends the run and waits until its connections are closed.
    pub(super) async fn end(&self, why: &'static str) {
        let Some(run) = self.last() else { return };
        run.end(why);
        let mut closed = run.closed.subscribe();
        // Those that do not close in time are dropped by then.
        let _closed = tokio::time::timeout(2 * ENDING, closed.wait_for(|closed| *closed)).await;
    }
}

/// Whether a database is served by the source, and no cutover of it is under way.
fn stays(shared: &Shared, name: &str) -> Result<(), ShadowError> {
    let database = shared.switchboard.database(name);
    if !matches!(&*database.route(), Route::To { server: ServerRole::Source, .. }) {
        return Err(ShadowError::NotOnSource(name.to_owned()));
    }
    if database.is_fenced() || shared.sessions.is_to_move(name, database.epoch()) {
        return Err(ShadowError::Leaving(name.to_owned()));
    }
    Ok(())
}

/// Begins shadow reads, shows and ends them.
#[derive(Clone)]
pub struct ShadowReads(Arc<Shared>);

impl ShadowReads {
    /// Begins to sample. Comes back once both servers have said what is needed to know.
    pub async fn start(&self, order: ShadowOrder) -> Result<ShadowView, ShadowError> {
        let shared = &self.0;
        if let Some(run) = shared.sessions.shadow.current() {
            return Err(ShadowError::IsOn(run.order.migration.clone()));
        }
        let mut facts = HashMap::new();
        for name in &order.databases {
            let database = shared.switchboard.database(name);
            stays(shared, name)?;
            let unknown = |reason| ShadowError::Unknown { database: name.clone(), reason };
            let avoided = runner::avoided(&shared.target, name).await.map_err(unknown)?;
            let known = &shared.sessions.catalogue_names;
            let names =
                known.aside(ServerRole::Source, &shared.source, name, database.epoch()).await.map_err(unknown)?;
            facts.insert(name.clone(), Facts { avoided, names });
        }
        let run = Arc::new(Run {
            threshold: u32::MAX / 100 * u32::from(order.share.min(100)),
            facts,
            metrics: shared.metrics.clone(),
            started: SystemTime::now(),
            ends_at: Instant::now() + order.lasts,
            order,
            tally: Mutex::default(),
            queue: Mutex::default(),
            queued: Notify::new(),
            doubts: Mutex::default(),
            doubted: Notify::new(),
            in_doubt: AtomicUsize::new(0),
            in_flight: Arc::default(),
            sessions: Arc::default(),
            refusals: Mutex::default(),
            learned: Mutex::new(Some(Vec::new())),
            looking: Arc::default(),
            looks: Mutex::new((Instant::now(), 0)),
            over: watch::Sender::new(None),
            closed: watch::Sender::new(false),
        });
        {
            let mut last = lock(&shared.sessions.shadow.last);
            if let Some(other) = last.as_ref().filter(|other| !other.is_over()) {
                return Err(ShadowError::IsOn(other.order.migration.clone()));
            }
            // A cutover that is prepared from here on ends this run: it looks under the same lock.
            run.order.databases.iter().try_for_each(|name| stays(shared, name))?;
            *last = Some(run.clone());
        }
        tracing::info!(migration = run.order.migration, share = run.order.share, "shadow reads begin");
        shared.tasks.spawn(runner::drive(shared.clone(), run.clone()));
        Ok(run.view())
    }

    /// Ends those of a migration, and waits until nothing of them is left.
    pub async fn stop(&self, migration: &str, why: &'static str) -> Result<ShadowView, ShadowError> {
        let run = self.0.sessions.shadow.current().filter(|run| run.order.migration == migration);
        let run = run.ok_or_else(|| ShadowError::IsOff(migration.to_owned()))?;
        self.0.sessions.shadow.end(why).await;
        Ok(run.view())
    }

    /// Those of a migration, running or last; `None`: there were none since this process began.
    pub fn view(&self, migration: &str) -> Option<ShadowView> {
        self.0.sessions.shadow.last().filter(|run| run.order.migration == migration).map(|run| run.view())
    }
}
