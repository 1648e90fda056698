//! From a file and the environment to a [`Config`]: every key, its default and its check.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::{ConfigError, Origin, Problem};
use super::reader::{KnownKeys, Reader, Section, nearest};
use super::*;

/// Reads what the active server knows of a role; only a superuser can run it. Elsewhere an operator writes a SECURITY
/// DEFINER function and names it here, or lists the users in a file.
pub const DEFAULT_AUTH_QUERY: &str = "SELECT rolname, rolpassword, rolvaliduntil AS valid_until, rolcanlogin AS can_login \
     FROM pg_catalog.pg_authid WHERE rolname = $1";

/// Port of the Unix socket when there is no TCP listener to take it from.
pub const DEFAULT_PORT: u16 = 6432;

const MB: u64 = 1 << 20;
const GB: u64 = 1 << 30;

/// Reads `path` (none: the environment alone) and applies the overrides of `environment`.
pub fn load(path: Option<&Path>, environment: &Environment) -> Result<Config, ConfigError> {
    let (text, base) = contents(path)?;
    let (config, problems, _known) = read(&text, &base, environment);
    if problems.is_empty() {
        return Ok(config);
    }
    Err(ConfigError::Invalid { path: path.map(Path::to_owned), problems })
}

/// Reads `[admin]` alone: the command line needs no more, and whoever runs it may not have the servers' passwords.
pub fn load_admin(path: Option<&Path>, environment: &Environment) -> Result<Admin, ConfigError> {
    let (text, base) = contents(path)?;
    let mut reader = Reader::new(&text, &base, environment);
    let admin = admin(reader.section("admin"));
    let problems = reader.into_problems();
    if problems.is_empty() {
        return Ok(admin);
    }
    Err(ConfigError::Invalid { path: path.map(Path::to_owned), problems })
}

/// The text of the file, and the directory that its relative paths start from.
fn contents(path: Option<&Path>) -> Result<(String, PathBuf), ConfigError> {
    let Some(path) = path else { return Ok((String::new(), PathBuf::new())) };
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    Ok((text, path.parent().map(Path::to_owned).unwrap_or_default()))
}

/// The configuration as far as it can be read, what is wrong with it, and every key that exists.
pub(super) fn read(text: &str, base: &Path, environment: &Environment) -> (Config, Vec<Problem>, KnownKeys) {
    let mut reader = Reader::new(text, base, environment);
    let is_readable = reader.is_readable();
    let config = Config {
        listen: listen(reader.section("listen")),
        control: control(reader.section("control")),
        source: server(reader.section("source")),
        target: server(reader.section("target")),
        auth: auth(reader.section("auth")),
        pool: super::pool::read(&mut reader),
        limits: limits(&mut reader),
        migration: migration(reader.section("migration")),
        cutover: cutover(reader.section("cutover")),
        admin: admin(reader.section("admin")),
        telemetry: telemetry(reader.section("telemetry")),
    };
    check_together(&config, &mut reader);
    let (mut problems, known) = reader.finish();
    if !is_readable {
        // What is missing from a file that could not be parsed is no news.
        problems.truncate(1);
    }
    (config, problems, known)
}

fn listen(mut section: Section<'_>) -> Listen {
    let address = section.socket_address("address");
    let unix_socket_dir = section.path("unix_socket_dir");
    let certificate = section.path("tls_certificate");
    let key = section.path("tls_key");
    let required = section.flag("tls_required", false);
    let versions = [("1.2", TlsVersion::Tls12), ("1.3", TlsVersion::Tls13)];
    let min_version = section.choice("tls_min_version", TlsVersion::Tls12, &versions);
    let (client_ca, client_certificates) = client_certificates(&mut section);
    let proxy_protocol_from = section.networks("proxy_protocol_from");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = section.number("workers", cores.div_ceil(2), 1..=1024);
    let io_uring = section.flag("io_uring", true);
    let tls = match (certificate, key) {
        (Some(certificate), Some(key)) => {
            Some(ListenTls { certificate, key, required, min_version, client_ca, client_certificates })
        }
        (None, None) => {
            let needing = [("tls_required", required), ("tls_client_ca", client_ca.is_some())];
            for (key, _) in needing.into_iter().filter(|(_, set)| *set) {
                let origin = section.origin(key).unwrap_or(Origin::Whole);
                section.bad(key, origin, "needs tls_certificate and tls_key");
            }
            None
        }
        (certificate, _) => {
            let (given, missing) =
                if certificate.is_some() { ("tls_certificate", "tls_key") } else { ("tls_key", "tls_certificate") };
            let origin = section.origin(given).unwrap_or(Origin::Whole);
            section.bad(given, origin, &format!("needs {missing} as well"));
            None
        }
    };
    let tcp = Tcp::read(&mut section, Tcp::OF_CLIENTS);
    let takeover_socket = section.path("takeover_socket");
    let policies = [ReplicationPolicy::Pass, ReplicationPolicy::Refuse].map(|policy| (policy.as_str(), policy));
    let replication = section.choice("replication", ReplicationPolicy::Pass, &policies);
    Listen { address, unix_socket_dir, tls, proxy_protocol_from, replication, takeover_socket, tcp, workers, io_uring }
}

/// Authorities and what is asked for; with authorities alone, certificates are checked where they are given.
fn client_certificates(section: &mut Section<'_>) -> (Option<PathBuf>, ClientCertificates) {
    let authorities = section.path("tls_client_ca");
    let words = [ClientCertificates::Off, ClientCertificates::Verify, ClientCertificates::Require]
        .map(|choice| (choice.as_str(), choice));
    let default = if authorities.is_some() { ClientCertificates::Verify } else { ClientCertificates::Off };
    let asked = section.choice("tls_client_cert", default, &words);
    if asked != ClientCertificates::Off && authorities.is_none() {
        let origin = section.origin("tls_client_cert").unwrap_or(Origin::Whole);
        section.bad("tls_client_cert", origin, "needs tls_client_ca, the PEM file with the authorities to believe");
    }
    (authorities, asked)
}

fn control(mut section: Section<'_>) -> Control {
    Control {
        database: section.text("database").unwrap_or_else(|| "postgres".to_owned()),
        fence: section.choice("fence", FencePolicy::Hard, &[("hard", FencePolicy::Hard), ("soft", FencePolicy::Soft)]),
    }
}

fn server(mut section: Section<'_>) -> Server {
    let host = section.required_text("host", "the server's host name, address or socket directory");
    let port = section.number("port", 5432, 1..=65535);
    let user = section.required_text("user", "the role that pgcutover logs in with");
    let password = section.secret(["password", "password_file", "password_env"]);
    let modes = [
        ("disable", SslMode::Disable),
        ("prefer", SslMode::Prefer),
        ("require", SslMode::Require),
        ("verify-ca", SslMode::VerifyCa),
        ("verify-full", SslMode::VerifyFull),
    ];
    let sslmode = section.choice("sslmode", SslMode::Prefer, &modes);
    let sslrootcert = section.path("sslrootcert");
    let client_certificate = client_certificate(&mut section);
    let connect_timeout = section.duration("connect_timeout", Duration::from_secs(10));
    if connect_timeout.is_zero() {
        let origin = section.origin("connect_timeout").unwrap_or(Origin::Whole);
        section.bad("connect_timeout", origin, "has to be more than zero; a decision waits no longer for its answer");
    }
    let stall_timeout = section.duration("stall_timeout", Duration::from_secs(30));
    let tcp = Tcp::read(&mut section, Tcp::OF_SERVERS);
    let kind = section.choice("kind", ServerKind::Postgres, &ServerKind::WORDS);
    if matches!(sslmode, SslMode::VerifyCa | SslMode::VerifyFull) && sslrootcert.is_none() && !host.starts_with('/') {
        let origin = section.origin("sslmode").unwrap_or(Origin::Whole);
        section.bad(
            "sslmode",
            origin,
            "a mode that verifies needs sslrootcert, the PEM file with the trusted certificates",
        );
    }
    let port = u16::try_from(port).unwrap_or(5432);
    Server {
        host,
        port,
        user,
        password,
        sslmode,
        sslrootcert,
        client_certificate,
        connect_timeout,
        stall_timeout,
        tcp,
        kind,
    }
}

fn client_certificate(section: &mut Section<'_>) -> Option<(PathBuf, PathBuf)> {
    match (section.path("sslcert"), section.path("sslkey")) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (certificate, _) => {
            let (given, missing) = if certificate.is_some() { ("sslcert", "sslkey") } else { ("sslkey", "sslcert") };
            let origin = section.origin(given).unwrap_or(Origin::Whole);
            section.bad(given, origin, &format!("needs {missing} as well"));
            None
        }
    }
}

fn auth(mut section: Section<'_>) -> Auth {
    let methods = [
        ("auto", AuthMethod::Auto),
        ("scram-sha-256", AuthMethod::ScramSha256),
        ("md5", AuthMethod::Md5),
        ("password", AuthMethod::Password),
        ("cert", AuthMethod::Cert),
        ("trust", AuthMethod::Trust),
    ];
    let method = section.choice("method", AuthMethod::Auto, &methods);
    let hba_file = section.path("hba_file");
    if let (Some(_), Some(origin)) = (&hba_file, section.origin("method")) {
        section.bad("method", origin, "hba_file says the method for each connection: leave one of the two out");
    }
    Auth {
        method,
        hba_file,
        ident_file: section.path("ident_file"),
        users_file: section.path("users_file"),
        auth_query: section.text("auth_query").unwrap_or_else(|| DEFAULT_AUTH_QUERY.to_owned()),
        auth_database: section.text("auth_database"),
        verifier_cache: section.duration("verifier_cache", Duration::from_secs(10)),
    }
}

fn limits(reader: &mut Reader) -> Limits {
    let users = limits::read_overrides(reader, "user");
    let databases = limits::read_overrides(reader, "database");
    let mut section = reader.section("limits");
    let buffer = section.size("buffer", 64 << 10, 8 << 10..=16 * MB);
    Limits {
        max_client_connections: section.number("max_client_connections", 10_000, 1..=1_000_000),
        reserved_admin_connections: section.number("reserved_admin_connections", 3, 0..=1000),
        max_user_connections: section.number("max_user_connections", 0, 0..=1_000_000),
        max_database_connections: section.number("max_database_connections", 0, 0..=1_000_000),
        max_address_connections: section.number("max_address_connections", 0, 0..=1_000_000),
        client_login_timeout: section.duration("client_login_timeout", Duration::from_secs(15)),
        timeouts: limits::Timeouts::read(&mut section),
        shadow_connections: section.number("shadow_connections", 2, 2..=100),
        resume_rate: section.number("resume_rate", 0, 0..=1_000_000),
        users,
        databases,
        max_message_bytes: section.size("max_message", GB, MB..=GB),
        buffer_bytes: usize::try_from(buffer).unwrap_or(64 << 10),
    }
}

fn migration(mut section: Section<'_>) -> Migration {
    let queue = section.size("apply_queue", 64 * MB, MB..=64 * GB);
    let memory = section.size("maintenance_work_mem", 512 * MB, MB..=1024 * GB);
    Migration {
        copy_workers: section.number("copy_workers", 4, 1..=256),
        index_workers: section.number("index_workers", 4, 1..=256),
        part_bytes: section.size("part_size", 128 * MB, MB..=u64::MAX),
        maintenance_work_mem: units::format_size(memory),
        without_identity: section.choice(
            "without_identity",
            WithoutIdentity::Full,
            &[("full", WithoutIdentity::Full), ("refuse", WithoutIdentity::Refuse)],
        ),
        ddl: section.choice(
            "ddl",
            Ddl::Detect,
            &[("refuse", Ddl::Refuse), ("detect", Ddl::Detect), ("apply", Ddl::Apply)],
        ),
        apply_queue_bytes: usize::try_from(queue).unwrap_or(usize::MAX),
        bindir: section.path("bindir"),
        verify_workers: section.number("verify_workers", 2, 1..=64),
        verify_part_bytes: section.size("verify_part_size", 32 * MB, 64 << 10..=u64::MAX),
        verify_load_percent: u8::try_from(section.number("verify_load", 100, 1..=100)).unwrap_or(100),
        verify_busy_percent: u8::try_from(section.number("verify_load_busy", 3, 1..=100)).unwrap_or(3),
        slot_timeout: section.duration("slot_timeout", Duration::from_secs(600)),
        validation_interval: section.duration("validation_interval", Duration::from_secs(60)),
        long_transaction: section.duration("long_transaction", Duration::from_secs(300)),
        lock_timeout: section.duration("lock_timeout", Duration::from_secs(5)),
        copy_rate_bytes: Some(section.size("copy_rate", 0, 0..=u64::MAX)).filter(|rate| *rate > 0),
        max_standby_lag: Some(section.duration("max_standby_lag", Duration::ZERO)).filter(|lag| !lag.is_zero()),
        max_retained_wal_bytes: Some(section.size("max_retained_wal", 100 * GB, 0..=u64::MAX)).filter(|wal| *wal > 0),
    }
}

/// Of `throttle_writes`.
const LARGEST_WRITE_DELAY: Duration = Duration::from_secs(1);

fn cutover(mut section: Section<'_>) -> Cutover {
    let cutover = Cutover {
        max_pause: section.duration("max_pause", Duration::from_secs(5)),
        drain_timeout: section.duration("drain_timeout", Duration::from_secs(3)),
        max_lag_at_start_bytes: section.size("max_lag_at_start", 16 * MB, 0..=u64::MAX),
        throttle_writes: section.duration("throttle_writes", Duration::ZERO),
        throttle_for: section.duration("throttle_for", Duration::from_secs(60)),
        max_unstreamed_bytes: section.size("max_unstreamed", 64 * MB, 0..=u64::MAX),
        warm_target: section.duration("warm_target", Duration::from_secs(10)),
        require_verified: section.flag("require_verified", false),
        reads: section.choice("reads", Reads::Pause, &[("pause", Reads::Pause), ("continue", Reads::Continue)]),
        stragglers: section.choice(
            "stragglers",
            Stragglers::Abort,
            &[("abort", Stragglers::Abort), ("terminate", Stragglers::Terminate)],
        ),
    };
    if cutover.throttle_writes > LARGEST_WRITE_DELAY {
        let origin = section.origin("throttle_writes").unwrap_or(Origin::Whole);
        section.bad("throttle_writes", origin, "is longer than a second, which applications take for a failure");
    }
    if cutover.drain_timeout > cutover.max_pause {
        let origin = section.origin("drain_timeout").or(section.origin("max_pause")).unwrap_or(Origin::Whole);
        section.bad("drain_timeout", origin, "is longer than max_pause, which would end the cutover before it");
    }
    cutover
}

fn admin(mut section: Section<'_>) -> Admin {
    let admin = Admin {
        address: section.socket_address("address"),
        users: section.list("users").unwrap_or_default(),
        stats_users: section.list("stats_users").unwrap_or_default(),
        hosts: section.list("hosts").unwrap_or_default(),
        token: section.secret(["token", "token_file", "token_env"]),
    };
    if admin.token.is_some() && admin.address.is_none() {
        let origin = section.origin("token").or(section.origin("token_file")).or(section.origin("token_env"));
        section.bad("token", origin.unwrap_or(Origin::Whole), "is of no use without [admin] address");
    }
    admin
}

/// What a filter says of everything that is logged.
const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Whether a part of a filter is a word alone that is no level: it is taken for a module, and all else is silent.
fn is_no_level(word: &str) -> bool {
    let is_alone = !word.is_empty() && !word.contains(['=', '[', ']', ':', '"']);
    is_alone && word != "pgcutover" && word.parse::<tracing_subscriber::filter::LevelFilter>().is_err()
}

fn telemetry(mut section: Section<'_>) -> Telemetry {
    let log = section.text("log").unwrap_or_else(|| "info".to_owned());
    if let Err(error) = tracing_subscriber::EnvFilter::try_new(&log) {
        let origin = section.origin("log").unwrap_or(Origin::Whole);
        section.bad(
            "log",
            origin,
            &format!("{log:?} is not a filter, such as \"info\" or \"pgcutover=debug\": {error}"),
        );
    } else if let Some(word) = log.split(',').map(str::trim).find(|word| is_no_level(word) && !log.contains('{')) {
        let near = nearest(word, &LOG_LEVELS).map(|near| format!("; did you mean {near:?}?")).unwrap_or_default();
        let levels = LOG_LEVELS.join(", ");
        let message =
            format!("{word:?} is not one of {levels}, and nothing but a module of that name would be logged{near}");
        let origin = section.origin("log").unwrap_or(Origin::Whole);
        section.bad("log", origin, &message);
    }
    Telemetry { log, json: section.choice("format", false, &[("text", false), ("json", true)]) }
}

/// What several sections say together.
fn check_together(config: &Config, reader: &mut Reader) {
    let listen = &config.listen;
    let set = |reader: &mut Reader, section: &'static str, key: &'static str| reader.section(section).origin(key);
    if listen.address.is_none() && listen.unix_socket_dir.is_none() && set(reader, "listen", "address").is_none() {
        reader.problem(
            Origin::Whole,
            "nothing to listen on: set [listen] address (such as \"127.0.0.1:6432\") or [listen] unix_socket_dir",
        );
    }
    let private = listen.unix_socket_dir.is_some() || listen.tls.is_some();
    if config.auth.method == AuthMethod::Password && !private {
        let origin = set(reader, "auth", "method").unwrap_or(Origin::Whole);
        let message =
            "sends passwords in clear text, so it needs [listen] tls_certificate and tls_key, or unix_socket_dir";
        reader.section("auth").bad("method", origin, message);
    }
    let asks_for_certificates = listen.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
    if config.auth.method == AuthMethod::Cert && !asks_for_certificates {
        let origin = set(reader, "auth", "method").unwrap_or(Origin::Whole);
        let message = "needs [listen] tls_client_ca, the authorities that certificates must come from";
        reader.section("auth").bad("method", origin, message);
    }
    let (source, target) = (&config.source, &config.target);
    if !source.host.is_empty() && same_host(&source.host, &target.host) && source.port == target.port {
        let origin = set(reader, "target", "host").unwrap_or(Origin::Whole);
        let message =
            format!("{}:{} is the source as well; the two must be different servers", target.host, target.port);
        reader.section("target").bad("host", origin, &message);
    }
    if let (Some(proxy), Some(http)) = (listen.address, config.admin.address)
        && clash(proxy, http)
    {
        let origin = set(reader, "admin", "address").unwrap_or(Origin::Whole);
        reader.section("admin").bad("address", origin, &format!("{http} is taken by [listen] address"));
    }
    for (section, server) in [("source", source), ("target", target)] {
        let itself = listen.address.is_some_and(|proxy| {
            let address = if same_host(&server.host, "127.0.0.1") {
                Some(Ipv4Addr::LOCALHOST.into())
            } else {
                server.host.parse::<IpAddr>().ok()
            };
            address.is_some_and(|ip| clash(proxy, SocketAddr::new(ip, server.port)))
        });
        if itself {
            let origin = set(reader, section, "port").or(set(reader, section, "host")).unwrap_or(Origin::Whole);
            let message = format!("{}:{} is the proxy's own [listen] address", server.host, server.port);
            reader.section(section).bad("host", origin, &message);
        }
    }
}

/// Whether two listeners, or a listener and a server, meet at the same port of the same address.
fn clash(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

fn same_host(a: &str, b: &str) -> bool {
    let local = |host: &str| matches!(host, "localhost" | "127.0.0.1" | "::1");
    a.eq_ignore_ascii_case(b) || (local(a) && local(b))
}
