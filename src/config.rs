//! The configuration, validated: what the rest of the program sees.
//!
//! Reading TOML, environment overrides and secrets is in the submodules; a [`Config`] that exists is consistent.

mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod limits;
mod load;
pub mod network;
mod pool;
mod reader;
mod settings;
mod tcp;
#[cfg(test)]
mod tests;
pub mod units;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use error::{ConfigError, Origin, Problem};
pub use load::{DEFAULT_AUTH_QUERY, DEFAULT_PORT, load, load_admin};
pub use network::Network;
pub use pool::{Pool, PoolMode, PoolOverride, PoolSizes};
pub use reader::nearest;
pub use settings::{Changes, Live, Setting};
pub use tcp::Tcp;

/// The environment's variables by name, passed in so that a test has its own.
pub type Environment = BTreeMap<String, String>;

/// A password or key. Never printed; wiped when dropped.
#[derive(Clone, Default, PartialEq, Eq, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct Secret(String);

impl Secret {
    /// Takes ownership of the plain text.
    pub fn new(plain: impl Into<String>) -> Self {
        Self(plain.into())
    }

    /// The plain text, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Everything the daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where applications connect.
    pub listen: Listen,
    /// Where the pgcutover schema lives, and how strongly the old server is fenced.
    pub control: Control,
    /// The server that holds the data now.
    pub source: Server,
    /// The server that the data moves to.
    pub target: Server,
    /// How applications prove who they are.
    pub auth: Auth,
    /// How server connections are shared.
    pub pool: Pool,
    /// Bounds on what clients may use.
    pub limits: Limits,
    /// Copy and replication.
    pub migration: Migration,
    /// The cutover's bounds.
    pub cutover: Cutover,
    /// Console, HTTP API.
    pub admin: Admin,
    /// Logs.
    pub telemetry: Telemetry,
}

impl Config {
    /// Every default, for these two servers; listens nowhere. What the demo and tests start from.
    pub fn new(source: Server, target: Server) -> Self {
        let (defaults, _missing, _known) = load::read("", std::path::Path::new(""), &Environment::new());
        Self { source, target, ..defaults }
    }
}

impl Server {
    /// Every default, for this address and role, without a password.
    pub fn new(host: impl Into<String>, port: u16, user: impl Into<String>) -> Self {
        Self {
            host: host.into(),
            port,
            user: user.into(),
            password: None,
            sslmode: SslMode::Prefer,
            sslrootcert: None,
            client_certificate: None,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            tcp: Tcp::OF_SERVERS,
            kind: ServerKind::Postgres,
        }
    }
}

/// `[listen]`
#[derive(Clone, Debug)]
pub struct Listen {
    /// TCP address of the proxy; none: no TCP listener.
    pub address: Option<SocketAddr>,
    /// Directory for the Unix socket `.s.PGSQL.<port>`; none: no Unix listener.
    pub unix_socket_dir: Option<PathBuf>,
    /// Certificate and key offered to clients; none: SSLRequest is answered `N`.
    pub tls: Option<ListenTls>,
    /// Balancers that begin every connection with a PROXY protocol header of version 2, and are believed.
    pub proxy_protocol_from: Vec<Network>,
    /// What happens to replication connections.
    pub replication: ReplicationPolicy,
    /// Where a new process of this proxy takes over from the old one; none: it cannot.
    pub takeover_socket: Option<PathBuf>,
    /// How the kernel watches links to clients.
    pub tcp: Tcp,
    /// Threads that serve sessions, one runtime each; default: half the number of cores.
    pub workers: usize,
    /// Whether workers use io_uring where the kernel has it.
    pub io_uring: bool,
}

/// What happens to clients that ask for a replication connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationPolicy {
    /// It is passed through to the active server, and ended at a cutover.
    Pass,
    /// It is refused.
    Refuse,
}

impl ReplicationPolicy {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Refuse => "refuse",
        }
    }
}

/// TLS towards clients.
#[derive(Clone, Debug)]
pub struct ListenTls {
    /// PEM certificate chain.
    pub certificate: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
    /// Refuse clients on TCP that do not ask for TLS.
    pub required: bool,
    /// Oldest version of the protocol that is spoken.
    pub min_version: TlsVersion,
    /// PEM certificates of authorities that client certificates must come from; none: clients are asked for none.
    pub client_ca: Option<PathBuf>,
    /// What clients are asked for.
    pub client_certificates: ClientCertificates,
}

impl ListenTls {
    /// Every default, for this certificate chain and key.
    pub fn new(certificate: PathBuf, key: PathBuf) -> Self {
        Self {
            certificate,
            key,
            required: false,
            min_version: TlsVersion::Tls12,
            client_ca: None,
            client_certificates: ClientCertificates::Off,
        }
    }
}

/// Version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

impl TlsVersion {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tls12 => "1.2",
            Self::Tls13 => "1.3",
        }
    }
}

/// Whether TLS clients are asked for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// No.
    Off,
    /// Yes; one that is given must be good, and rules may ask for it (`cert`, `clientcert=`).
    Verify,
    /// Yes, and nobody comes in without.
    Require,
}

impl ClientCertificates {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Verify => "verify",
            Self::Require => "require",
        }
    }
}

/// `[control]`
#[derive(Clone, Debug)]
pub struct Control {
    /// Database, on both servers, that holds the pgcutover schema with fences and decisions.
    pub database: String,
    /// How the old server is kept from accepting writes during a cutover.
    pub fence: FencePolicy,
}

/// How strongly the old server is fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FencePolicy {
    /// Read-only default, connections refused, unknown backends terminated.
    Hard,
    /// Read-only default alone; writers that bypass the proxy can get round it.
    Soft,
}

/// `[source]` and `[target]`
#[derive(Clone, Debug)]
pub struct Server {
    /// Host name, address, or the directory of a Unix socket (starts with `/`).
    pub host: String,
    /// TCP port, or the socket's number.
    pub port: u16,
    /// The role that pgcutover itself logs in with.
    pub user: String,
    /// Its password; none: trust, peer or a client certificate.
    pub password: Option<Secret>,
    /// libpq's sslmode.
    pub sslmode: SslMode,
    /// PEM certificates that are trusted; needed from `verify-ca` on.
    pub sslrootcert: Option<PathBuf>,
    /// Client certificate chain and key, PEM.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// Bound on TCP connect, TLS and login together, and on the answer to a decision; more than zero.
    pub connect_timeout: Duration,
    /// Silence after which the server is asked whether it waits for us; zero: never.
    pub stall_timeout: Duration,
    /// How the kernel watches links to it.
    pub tcp: Tcp,
    /// Which product or service it is; shown, and used where services differ.
    pub kind: ServerKind,
}

/// Which product or service a server is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServerKind {
    /// PostgreSQL that the operator runs.
    #[default]
    Postgres,
    /// Amazon RDS for PostgreSQL.
    AwsRds,
    /// Amazon Aurora PostgreSQL.
    AwsAurora,
    /// Azure Database for PostgreSQL.
    Azure,
    /// Google Cloud SQL.
    GcpCloudSql,
    /// Google AlloyDB.
    GcpAlloyDb,
    /// Any other service.
    Other,
}

impl ServerKind {
    /// The words of the configuration.
    pub const WORDS: [(&'static str, Self); 7] = [
        ("postgresql", Self::Postgres),
        ("aws-rds", Self::AwsRds),
        ("aws-aurora", Self::AwsAurora),
        ("azure", Self::Azure),
        ("gcp-cloudsql", Self::GcpCloudSql),
        ("gcp-alloydb", Self::GcpAlloyDb),
        ("other", Self::Other),
    ];

    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        Self::WORDS.iter().find(|(_, kind)| *kind == self).map_or("other", |(word, _)| word)
    }
}

/// libpq's sslmode (PostgreSQL documentation, "SSL Support", table 34.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS where the server offers it.
    Prefer,
    /// TLS, certificate not checked (checked like verify-ca when `sslrootcert` is set, as in libpq).
    Require,
    /// TLS, certificate chain checked.
    VerifyCa,
    /// TLS, certificate chain and host name checked.
    VerifyFull,
}

impl SslMode {
    /// libpq's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

/// `[auth]`
#[derive(Clone, Debug)]
pub struct Auth {
    /// What clients are asked for.
    pub method: AuthMethod,
    /// `"user" "password or verifier"` lines, for servers whose verifiers cannot be read.
    pub users_file: Option<PathBuf>,
    /// Rules in the form of pg_hba.conf, which then decide instead of `method`.
    pub hba_file: Option<PathBuf>,
    /// Maps from names in certificates to roles, in the form of pg_ident.conf.
    pub ident_file: Option<PathBuf>,
    /// Query run on the active server, `$1` the user name: one row (name, verifier), with `valid_until` and `can_login`
    /// where it has columns of these names.
    pub auth_query: String,
    /// The database it is run in; none: that of `[control]`.
    pub auth_database: Option<String>,
    /// How long a verifier that was read may be used again.
    pub verifier_cache: Duration,
}

/// What a client is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// SCRAM-SHA-256 or md5, after the kind of the user's verifier.
    Auto,
    /// SCRAM-SHA-256 only.
    ScramSha256,
    /// md5 only.
    Md5,
    /// Clear text, over TLS or a Unix socket only.
    Password,
    /// A certificate of the role's name, over TLS.
    Cert,
    /// Nothing; the client's name is believed.
    Trust,
}

impl AuthMethod {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::ScramSha256 => "scram-sha-256",
            Self::Md5 => "md5",
            Self::Password => "password",
            Self::Cert => "cert",
            Self::Trust => "trust",
        }
    }
}

/// Longer than any process lives.
const WITHOUT_A_BOUND: Duration = Duration::from_secs(100 * 365 * 86_400);

/// `[limits]`
#[derive(Clone, Debug)]
pub struct Limits {
    /// Client connections at one time.
    pub max_client_connections: usize,
    /// Places beyond `max_client_connections` for users of the console.
    pub reserved_admin_connections: usize,
    /// Client connections of one role, unless `users` says otherwise; 0: any number.
    pub max_user_connections: usize,
    /// Client connections to one database, unless `databases` says otherwise; 0: any number.
    pub max_database_connections: usize,
    /// Client connections from one IP address; 0: any number.
    pub max_address_connections: usize,
    /// From accept to the end of authentication; zero: as long as it takes.
    pub client_login_timeout: Duration,
    /// Time-outs of sessions, unless `users` or `databases` say otherwise.
    pub timeouts: limits::Timeouts,
    /// Connections to the target that shadow reads have at one time.
    pub shadow_connections: usize,
    /// Held sessions that are let in each 10 ms after a resume; 0: all at once.
    pub resume_rate: usize,
    /// What is said otherwise for roles.
    pub users: limits::Overrides,
    /// What is said otherwise for databases.
    pub databases: limits::Overrides,
    /// Largest single message, streamed and never held, in bytes.
    pub max_message_bytes: u64,
    /// Buffer for each direction of a session, in bytes.
    pub buffer_bytes: usize,
}

impl Limits {
    /// How long a client may take for its login.
    pub fn login_bound(&self) -> Duration {
        Some(self.client_login_timeout).filter(|bound| !bound.is_zero()).unwrap_or(WITHOUT_A_BOUND)
    }
}

/// What happens to a table that has no usable replica identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WithoutIdentity {
    /// `REPLICA IDENTITY FULL` is set on the source, listed, and set back on cancel.
    Full,
    /// The migration is refused, naming the tables.
    Refuse,
}

/// What happens to changes of definitions on the source while a migration runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ddl {
    /// An event trigger refuses them, where the role may make one.
    Refuse,
    /// They are found out, and stop the stream or the cutover.
    Detect,
    /// Event triggers record them, and they are executed on the target in stream order; what cannot be is refused.
    Apply,
}

/// `[migration]`
#[derive(Clone, Debug)]
pub struct Migration {
    /// Connections that copy tables at the same time.
    pub copy_workers: usize,
    /// Connections that build indexes at the same time.
    pub index_workers: usize,
    /// Tables larger than this are copied in parts, in bytes.
    pub part_bytes: u64,
    /// `maintenance_work_mem` of index builds, in PostgreSQL's notation.
    pub maintenance_work_mem: String,
    /// What is done with tables that have no usable replica identity.
    pub without_identity: WithoutIdentity,
    /// What is done about changes of definitions on the source.
    pub ddl: Ddl,
    /// Memory of the apply queue of one database, in bytes.
    pub apply_queue_bytes: usize,
    /// Directory with pg_dump; none: searched for, the newest wins.
    pub bindir: Option<PathBuf>,
    /// Tables, or parts of large ones, that a verification reads at the same time.
    pub verify_workers: usize,
    /// What each of them reads between two rests, in bytes.
    pub verify_part_bytes: u64,
    /// Share of its time in which each of them reads, in percent; it rests for the remainder.
    pub verify_load_percent: u8,
    /// The same while other sessions of the source are at work.
    pub verify_busy_percent: u8,
    /// Bound on the wait for every transaction that was open when the slot was made.
    pub slot_timeout: Duration,
    /// How often rules about replication are asked again while a migration streams.
    pub validation_interval: Duration,
    /// Validation warns of transactions on the source that are older.
    pub long_transaction: Duration,
    /// Bound on one attempt to lock a table of the source.
    pub lock_timeout: Duration,
    /// Bytes that all databases together are copied by, each second; none: no limit.
    pub copy_rate_bytes: Option<u64>,
    /// The copy halts while a physical standby of the source replays later than this; none: it never does.
    pub max_standby_lag: Option<Duration>,
    /// A migration fails, and its slots are dropped, when one of them makes the source keep this much; none: no limit.
    pub max_retained_wal_bytes: Option<u64>,
}

/// What happens to a transaction that is still running when `drain_timeout` ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stragglers {
    /// The cutover is aborted; the application never notices.
    Abort,
    /// The session is ended with 57P01.
    Terminate,
}

impl Stragglers {
    /// The word of the configuration and the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Terminate => "terminate",
        }
    }
}

/// What happens in the pause to transactions that their clients have declared read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// They wait like all others.
    Pause,
    /// They go on on the server that is left, until the decision is near.
    Continue,
}

impl Reads {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Continue => "continue",
        }
    }
}

/// `[cutover]`
#[derive(Clone, Debug)]
pub struct Cutover {
    /// From the fence to the switch; then abort.
    pub max_pause: Duration,
    /// For running transactions to end.
    pub drain_timeout: Duration,
    /// A cutover is not begun with more than this to replay, in bytes.
    pub max_lag_at_start_bytes: u64,
    /// The largest delay of a writing transaction while a cutover is prepared and the lag is large; zero: none.
    pub throttle_writes: Duration,
    /// How long writes may be slowed down until a cutover goes on, or is refused.
    pub throttle_for: Duration,
    /// Unlogged tables and large objects may be so large in all, in bytes: they are carried inside the pause.
    pub max_unstreamed_bytes: u64,
    /// How long the server that a cutover leads to may be warmed before the pause; zero: not at all.
    pub warm_target: Duration,
    /// Transactions that outlast the drain.
    pub stragglers: Stragglers,
    /// Transactions that are declared read-only, in the pause.
    pub reads: Reads,
    /// A cutover begins only when every table was found equal since it was last written to.
    pub require_verified: bool,
}

/// `[admin]`
#[derive(Clone, Debug)]
pub struct Admin {
    /// HTTP address; none: no HTTP.
    pub address: Option<SocketAddr>,
    /// Roles that may use the console.
    pub users: Vec<String>,
    /// Roles that may use its SHOW alone.
    pub stats_users: Vec<String>,
    /// Names, beside those of this machine, by which HTTP may be asked where there is no token.
    pub hosts: Vec<String>,
    /// Bearer token for calls that change state; none: such calls are refused unless they come from loopback.
    pub token: Option<Secret>,
}

/// `[telemetry]`
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// `tracing` filter, such as `info` or `pgcutover=debug`.
    pub log: String,
    /// One JSON object a line instead of text.
    pub json: bool,
}
