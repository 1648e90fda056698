//! What an operator can order. Console, HTTP and command line all end here, so that none can do what another cannot.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::Stragglers;
use crate::migration::view::{MigrationName, MigrationSpec};

/// One order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Which orders there are.
    Help,
    /// The program's version.
    Version,
    /// Every key of the configuration, without secrets.
    Config,
    /// Databases and where they run.
    Databases,
    /// Sessions by database and user.
    Pools,
    /// Client sessions.
    Clients,
    /// The server side of client sessions.
    Servers,
    /// Counters by database: totals and averages.
    Stats,
    /// Totals alone.
    StatsTotals,
    /// Averages of the last minute alone.
    StatsAverages,
    /// Both for all databases together.
    Totals,
    /// Both sides of every session.
    Sockets,
    /// Both sides of sessions in a transaction.
    ActiveSockets,
    /// Memory.
    Mem,
    /// Whether everything is paused.
    State,
    /// Host names: none are kept.
    DnsHosts,
    /// Zones: none are kept.
    DnsZones,
    /// Peers in PgBouncer's sense: none.
    Peers,
    /// How many of each there are.
    Lists,
    /// Roles that have sessions.
    Users,
    /// The proxies that take part in a cutover.
    Members,
    /// What would keep a cutover from moving every session.
    Blockers,
    /// Everything at a glance.
    Status,
    /// Migrations, newest first.
    Migrations(Filter),
    /// One migration.
    Migration(MigrationName),
    /// Its tables.
    Tables(MigrationName),
    /// Its premigration validation.
    Validation(MigrationName),
    /// What its last verification found.
    Verification(MigrationName),
    /// What its shadow reads have found, running or last.
    ShadowOf(MigrationName),
    /// Its cutover: the one that runs, or the last.
    CutoverOf(MigrationName),
    /// How far it was behind, and how much had been copied, over the last minutes.
    History(MigrationName),
    /// What has happened since this process began, newest first.
    Events,
    /// Connect to both servers and look at them.
    Check,
    /// Begin a migration.
    Create(MigrationSpec),
    /// Cut over.
    Cutover(MigrationName, CutoverRequest),
    /// Take a cutover back.
    Rollback(MigrationName, CutoverRequest),
    /// Give up the way back.
    Complete(MigrationName),
    /// Undo what a migration made.
    Cancel(MigrationName),
    /// Go on with a migration that failed.
    Retry(MigrationName),
    /// Compare source and target.
    Verify(MigrationName, VerifyRequest),
    /// Run a share of the reads on the target too, or no more.
    Shadow(MigrationName, ShadowRequest),
    /// Show, or run, what mends a rule of its premigration validation.
    Fix(MigrationName, FixRequest),
    /// Read the configuration again.
    Reload,
    /// Hold new transactions of a database, or of all.
    Pause(Option<String>),
    /// Let them go on.
    Resume(Option<String>),
    /// Refuse new sessions of a database.
    Disable(String),
    /// Let them in again.
    Enable(String),
    /// Mark server connections of a database, or of all, for replacement.
    Reconnect(Option<String>),
    /// Wait until the marked ones are closed.
    WaitClose(Option<String>),
    /// Change a setting until the next reload.
    Set {
        /// `section.key`
        key: String,
        /// In the notation of the file.
        value: String,
    },
    /// End one session, named by the process id of its server side.
    Kill(i32),
    /// End one session, named by its number.
    KillClient(u64),
    /// End every session of a database, and hold new ones until it is resumed.
    KillDatabase(String),
    /// End the daemon in good order.
    Shutdown(ShutdownWhen),
}

/// When a shutdown ends the sessions that there are. New ones are refused from the order on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ShutdownWhen {
    /// At once.
    #[default]
    Now,
    /// When every client has gone by itself.
    Clients,
    /// When every transaction has ended; new ones are held.
    Servers,
}

impl Command {
    /// Whether the order changes anything, or makes the servers work: not for those who may only look.
    pub fn changes_state(&self) -> bool {
        matches!(
            self,
            Self::Create(_)
                | Self::Cutover(..)
                | Self::Rollback(..)
                | Self::Complete(_)
                | Self::Cancel(_)
                | Self::Retry(_)
                | Self::Verify(..)
                | Self::Shadow(..)
                | Self::Fix(..)
                | Self::Check
                | Self::Reload
                | Self::Pause(_)
                | Self::Resume(_)
                | Self::Disable(_)
                | Self::Enable(_)
                | Self::Reconnect(_)
                | Self::WaitClose(_)
                | Self::Set { .. }
                | Self::Kill(_)
                | Self::KillClient(_)
                | Self::KillDatabase(_)
                | Self::Shutdown(_)
        )
    }

    /// Whether it takes as long as the tables are large, and a process that stops can leave it as it is.
    pub fn can_be_left(&self) -> bool {
        matches!(self, Self::Verify(..) | Self::WaitClose(_))
    }

    /// Whether it changes nothing and waits, without a bound, for what others do: only as long as somebody wants to know.
    pub fn only_waits(&self) -> bool {
        matches!(self, Self::WaitClose(_))
    }

    /// The migration that it is about.
    pub fn migration(&self) -> Option<&MigrationName> {
        match self {
            Self::Migration(name)
            | Self::Tables(name)
            | Self::Validation(name)
            | Self::Verification(name)
            | Self::ShadowOf(name)
            | Self::CutoverOf(name)
            | Self::History(name)
            | Self::Cutover(name, _)
            | Self::Rollback(name, _)
            | Self::Complete(name)
            | Self::Cancel(name)
            | Self::Retry(name)
            | Self::Verify(name, _)
            | Self::Shadow(name, _)
            | Self::Fix(name, _) => Some(name),
            Self::Create(spec) => Some(&spec.name),
            _ => None,
        }
    }

    /// A word for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Help => "help",
            Self::Version => "version",
            Self::Config => "config",
            Self::Databases => "databases",
            Self::Pools => "pools",
            Self::Clients => "clients",
            Self::Servers => "servers",
            Self::Stats => "stats",
            Self::StatsTotals => "stats_totals",
            Self::StatsAverages => "stats_averages",
            Self::Totals => "totals",
            Self::Sockets => "sockets",
            Self::ActiveSockets => "active_sockets",
            Self::Mem => "mem",
            Self::State => "state",
            Self::DnsHosts => "dns_hosts",
            Self::DnsZones => "dns_zones",
            Self::Peers => "peers",
            Self::Lists => "lists",
            Self::Users => "users",
            Self::Members => "members",
            Self::Blockers => "blockers",
            Self::Status => "status",
            Self::Migrations(_) => "migrations",
            Self::Migration(_) => "migration",
            Self::Tables(_) => "tables",
            Self::Validation(_) => "validation",
            Self::Verification(_) => "verification",
            Self::CutoverOf(_) => "cutover progress",
            Self::History(_) => "history",
            Self::Events => "events",
            Self::Check => "check",
            Self::Create(_) => "create",
            Self::Cutover(..) => "cutover",
            Self::Rollback(..) => "rollback",
            Self::Complete(_) => "complete",
            Self::Cancel(_) => "cancel",
            Self::Retry(_) => "retry",
            Self::Verify(..) => "verify",
            Self::Shadow(..) => "shadow",
            Self::ShadowOf(_) => "shadow reads",
            Self::Fix(..) => "fix",
            Self::Reload => "reload",
            Self::Pause(_) => "pause",
            Self::Resume(_) => "resume",
            Self::Disable(_) => "disable",
            Self::Enable(_) => "enable",
            Self::Reconnect(_) => "reconnect",
            Self::WaitClose(_) => "wait_close",
            Self::Set { .. } => "set",
            Self::Kill(_) => "kill",
            Self::KillClient(_) => "kill_client",
            Self::KillDatabase(_) => "kill database",
            Self::Shutdown(_) => "shutdown",
        }
    }
}

/// Which migrations are listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// Every one.
    #[default]
    All,
    /// Those that are neither finished nor failed nor cancelled.
    Active,
}

/// How to cut over; what is not said is taken from `[cutover]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CutoverRequest {
    /// Measure the pause and resume on the source.
    #[serde(default)]
    pub dry_run: bool,
    /// From the fence to the switch.
    #[serde(default, with = "duration_text")]
    #[schemars(schema_with = "duration_text::schema")]
    pub max_pause: Option<Duration>,
    /// For running transactions to end.
    #[serde(default, with = "duration_text")]
    #[schemars(schema_with = "duration_text::schema")]
    pub drain_timeout: Option<Duration>,
    /// What happens to transactions that outlast the drain.
    #[serde(default)]
    pub stragglers: Option<Stragglers>,
    /// Go past guardrails that only guard time and connections, never past one that guards data.
    #[serde(default)]
    pub force: bool,
}

/// How to compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Write the source's rows over those of the target that differ, and compare these tables again.
    #[serde(default)]
    pub repair: bool,
}

/// Which reads run on the target too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShadowRequest {
    /// Percent of the transactions that are looked at.
    #[serde(default = "ShadowRequest::usual_share")]
    #[schemars(range(min = 1, max = 100))]
    pub share: u8,
    /// For how long; ten minutes unless told otherwise.
    #[serde(default, rename = "for", with = "duration_text")]
    #[schemars(schema_with = "duration_text::schema")]
    pub lasts: Option<Duration>,
    /// End those that are on.
    #[serde(default)]
    pub stop: bool,
}

impl ShadowRequest {
    fn usual_share() -> u8 {
        5
    }
}

impl Default for ShadowRequest {
    fn default() -> Self {
        Self { share: Self::usual_share(), lasts: None, stop: false }
    }
}

/// What to mend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FixRequest {
    /// The rule's code.
    pub rule: String,
    /// Run the statements; otherwise they are shown.
    #[serde(default)]
    pub apply: bool,
}

/// A setting's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// In the notation of the file.
    pub value: String,
}

/// Durations as operators write them: `"5s"`.
mod duration_text {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::config::units;

    /// What is written and read here.
    pub fn schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": ["string", "null"], "pattern": "^[0-9]{1,6}(us|ms|s|min|h|d)$" })
    }

    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        duration.map(units::format_duration).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| units::parse_duration(&text).map_err(serde::de::Error::custom)).transpose()
    }
}
