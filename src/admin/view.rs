//! The JSON shapes that scripts rely on, beside those of a migration (`migration::view`).
//!
//! Keys may be added, none may be taken away. Unknown is `null`, never 0.

use serde::{Deserialize, Serialize};

use crate::catalog::streams::Direction;
use crate::migration::view::MigrationView;
use crate::switch::ServerRole;

/// How a cutover ended, or how far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CutoverView {
    /// `forward`: a cutover; `reverse`: a rollback; null: said by a daemon that did not say it yet.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub direction: Option<Direction>,
    /// `switched`, `aborted`, `dry-run`, or `running`.
    pub outcome: String,
    /// Why it did not switch; empty: it did, or a dry run would have.
    pub reason: String,
    /// What mends that; null: the reason says it, or it went well.
    #[serde(default)]
    pub hint: Option<String>,
    /// Whether the same order with `--force` goes past what it was refused for.
    #[serde(default)]
    pub forceable: bool,
    /// Guardrails that it went past because of `--force`.
    #[serde(default)]
    pub forced: Vec<String>,
    /// From the closing of the gates to their opening, in milliseconds; 0: they were never closed.
    pub pause_ms: u64,
    /// Each phase.
    pub phases_ms: PhasesView,
    /// What prepare was spent on, in the order of the protocol.
    #[serde(default)]
    pub prepare_steps: Vec<TimedStepView>,
    /// What the pause was spent on, in the order of the protocol; some steps run beside each other.
    #[serde(default)]
    pub pause_steps: Vec<TimedStepView>,
    /// Sessions that waited for the pause to end.
    #[serde(default)]
    pub sessions_held: u64,
    /// The longest that any of them waited for that, in milliseconds.
    #[serde(default)]
    pub longest_hold_ms: f64,
    /// What a real cutover would have done, after a dry run.
    #[serde(default)]
    pub would: Vec<IntentionView>,
    /// Sessions that went on without being reconnected.
    pub sessions_moved: u64,
    /// Sessions that were ended.
    pub sessions_ended: u64,
    /// Number of the cutover; null: it never got one.
    pub epoch: Option<u64>,
    /// What it is doing; null: it has ended.
    pub phase: Option<String>,
    /// What stood in the way when it was aborted.
    pub blockers: Vec<String>,
    /// What the operator should know all the same.
    pub notes: Vec<String>,
}

/// One thing that a cutover would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct IntentionView {
    /// `move-sessions`, `end-session`, `set-sequences`, `carry-unstreamed`, `change-setting`, `shut-database`,
    /// `lock-tables`, `make-way-back` or `lose-way-back`.
    pub action: String,
    /// Where; null: on the whole server.
    pub database: Option<String>,
    /// To what.
    pub detail: String,
}

impl std::fmt::Display for IntentionView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let database = self.database.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        write!(f, "{}{database}: {}", self.action.replace('-', " "), self.detail)
    }
}

/// One part of prepare or of the pause.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TimedStepView {
    /// What was done or waited for.
    pub step: String,
    /// How long, in milliseconds.
    pub ms: f64,
}

/// Length of each phase in milliseconds; 0: it was not reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PhasesView {
    /// Before anybody waits.
    pub prepare: u64,
    /// New transactions wait.
    pub pause: u64,
    /// The last transactions end and are applied.
    pub drain: u64,
    /// The decision is made durable.
    pub decide: u64,
    /// Sessions go on.
    pub switch: u64,
}

impl PhasesView {
    /// Name and length, in order.
    pub fn pairs(&self) -> [(&'static str, u64); 5] {
        [
            ("prepare", self.prepare),
            ("pause", self.pause),
            ("drain", self.drain),
            ("decide", self.decide),
            ("switch", self.switch),
        ]
    }
}

/// A migration in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MigrationEntry {
    /// As `show` shows it.
    #[serde(flatten)]
    pub migration: MigrationView,
    /// `kind` of `[source]`.
    pub source_server_type: String,
}

/// One thing that would keep a cutover from moving a session, or from draining.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct BlockerView {
    /// Database.
    pub database: String,
    /// Process id on the server.
    pub pid: Option<i32>,
    /// Role.
    pub user: Option<String>,
    /// The client's `application_name`.
    pub application_name: Option<String>,
    /// Where the client is.
    pub client: Option<String>,
    /// A word that scripts may compare.
    pub code: String,
    /// What it is.
    pub reason: String,
    /// What mends it.
    pub hint: Option<String>,
}

/// One proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MemberView {
    /// Its random name.
    pub instance: String,
    /// Where it listens.
    pub address: Option<String>,
    /// `leader` runs the engine.
    pub role: String,
    /// The program's version.
    pub version: String,
}

/// One client session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ClientView {
    /// Number of the session in this process.
    pub id: u64,
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// Address of the client; `unix` for a Unix socket.
    pub client: String,
    /// Whether the client's side is encrypted.
    pub tls: Option<bool>,
    /// The client's `application_name`.
    pub application_name: Option<String>,
    /// Which server it runs on; null: none yet.
    pub server: Option<ServerRole>,
    /// Process id of its server side.
    pub backend_pid: Option<i32>,
    /// `idle`, `active`, `waiting`, …
    pub state: String,
    /// A cutover or PAUSE holds it; who waits for a server connection of its pool is not held.
    #[serde(default)]
    pub held: bool,
    /// In a transaction.
    pub in_transaction: bool,
    /// When it connected, in seconds since the Unix epoch.
    pub connected_at: Option<f64>,
    /// How long it has been in its state, in seconds.
    pub since_seconds: Option<f64>,
    /// What would keep it from being moved.
    pub blockers: Vec<String>,
    /// A server connection in preparation for a cutover is ready on the other server.
    #[serde(default)]
    pub prepared: bool,
    /// RECONNECT wants its server connection replaced.
    #[serde(default)]
    pub close_needed: bool,
    /// Whether it shares server connections with others, having one for each transaction.
    #[serde(default)]
    pub pooled: bool,
    /// What makes it keep the server connection that it has all the same.
    #[serde(default)]
    pub pinned: Option<String>,
}

/// One database of the proxy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RouteView {
    /// Database.
    pub database: String,
    /// The active server; null: nobody is known to be active.
    pub server: Option<ServerRole>,
    /// The cutover that made it active.
    pub epoch: u64,
    /// Whether new transactions are held.
    pub held: bool,
    /// By how much each writing transaction is slowed down while a cutover is prepared, in milliseconds; 0: not at all.
    #[serde(default)]
    pub write_delay_ms: f64,
    /// Why nobody is known to be active.
    pub reason: Option<String>,
    /// Client sessions.
    pub sessions: usize,
    /// Sessions inside a transaction.
    pub inside: usize,
}

/// `status`: proxies, routes, sessions, blockers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StatusView {
    /// The program's version.
    pub version: String,
    /// Seconds since this process began.
    pub uptime_seconds: f64,
    /// Whether clients are served.
    pub ready: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Why databases are refused that no cutover has covered; null: they are served.
    #[serde(default)]
    pub refused_elsewhere: Option<String>,
    /// `host:port` of the source.
    pub source: String,
    /// `host:port` of the target.
    pub target: String,
    /// The proxies that take part; null: the control database could not be asked.
    pub proxies: Option<Vec<MemberView>>,
    /// Where each database runs.
    pub routes: Vec<RouteView>,
    /// Every client session.
    pub sessions: Vec<ClientView>,
    /// What would keep a cutover from moving every session; null: could not be found out.
    pub blockers: Option<Vec<BlockerView>>,
    /// Migrations, newest first; null: the engine could not be asked.
    pub migrations: Option<Vec<MigrationBrief>>,
}

/// One thing that `check` looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct FindingView {
    /// What.
    pub check: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// What mends it.
    pub fix: Option<String>,
}

/// A database of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SourceDatabaseView {
    /// Its name.
    pub name: String,
    /// On disk; null: the role may not know.
    pub size_bytes: Option<i64>,
    /// Whether the target has one of this name; null: the target could not be asked.
    pub on_target: Option<bool>,
}

/// `check`: are the two servers what the configuration says?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CheckView {
    /// Whether everything is as it should be.
    pub ok: bool,
    /// What was looked at.
    pub checks: Vec<FindingView>,
    /// What can be migrated; null: the source could not be asked.
    pub databases: Option<Vec<SourceDatabaseView>>,
}

/// How far a migration was at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SampleView {
    /// Seconds since the Unix epoch.
    pub at: f64,
    /// Database.
    pub database: String,
    /// How far the target was behind, in bytes of WAL; null: not known.
    pub latency_bytes: Option<u64>,
    /// How far the target was behind, in seconds; null: not known.
    pub latency_seconds: Option<f64>,
    /// Row changes received and not yet applied; null: not known.
    pub pending_changes: Option<u64>,
    /// Rows copied by full loads since this process began, of every migration.
    pub copied_rows: u64,
    /// Bytes copied by full loads since this process began, of every migration.
    pub copied_bytes: u64,
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct EventView {
    /// Counts from 1 since this process began.
    pub number: u64,
    /// Seconds since the Unix epoch.
    pub at: f64,
    /// Of which migration; null: of none.
    pub migration: Option<String>,
    /// `state`, `database`, `cutover`, `route` or `order`.
    pub kind: String,
    /// Whether it is something to look at.
    pub failed: bool,
    /// What.
    pub text: String,
}

/// What the stream of live state sends, whenever it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LiveView {
    /// Seconds since the Unix epoch.
    pub at: f64,
    /// The program's version.
    pub version: String,
    /// Why clients are not served; null: they are.
    pub not_ready: Option<String>,
    /// `host:port` of the source.
    pub source: String,
    /// `host:port` of the target.
    pub target: String,
    /// Where each database runs.
    pub routes: Vec<RouteView>,
    /// Migrations, newest first, without the answers of their validation; null: the engine could not be asked.
    pub migrations: Option<Vec<MigrationEntry>>,
    /// The cutover of each migration that had one since this process began.
    pub cutovers: std::collections::BTreeMap<String, CutoverView>,
    /// Rows copied by full loads since this process began.
    pub copied_rows: u64,
    /// Bytes copied by full loads since this process began.
    pub copied_bytes: u64,
    /// Number of the newest event.
    pub newest_event: u64,
}

/// A migration in `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MigrationBrief {
    /// Name.
    pub name: String,
    /// State.
    pub state: String,
    /// Substate.
    pub substate: String,
}
