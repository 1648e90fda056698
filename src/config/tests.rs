//! The configuration as operators meet it: the two documented files, and what each mistake is answered with.

use std::collections::BTreeSet;
use std::path::Path;

use super::load::read;
use super::*;

const EXAMPLE: &str = include_str!("../../config/pgcutover.toml");

const MINIMAL: &str = r#"
[listen]
address = "127.0.0.1:6432"

[admin]
address = "127.0.0.1:8432"
users = ["postgres"]

[source]
host = "10.0.0.5"
user = "postgres"
password_file = "source"

[target]
host = "10.0.0.6"
user = "postgres"
password_env = "TARGET_PASSWORD"
"#;

/// Every key with another value than in MINIMAL, but `[auth] method`, which goes with no `hba_file`.
const OTHERWISE: &str = r#"
[listen]
address = "127.0.0.1:6433"
unix_socket_dir = "s"
tls_certificate = "c"
tls_key = "k"
tls_required = true
tls_min_version = "1.3"
tls_client_ca = "ca"
tls_client_cert = "require"
proxy_protocol_from = ["10.0.0.0/8"]
replication = "refuse"
takeover_socket = "t"
tcp_keepalives_idle = "7s"
tcp_keepalives_interval = "7s"
tcp_keepalives_count = 7
tcp_user_timeout = "7s"
workers = 1023
io_uring = false
[control]
database = "d"
fence = "soft"
[source]
host = "10.0.0.7"
port = 5433
user = "u"
password = "p"
sslmode = "disable"
sslrootcert = "r"
sslcert = "c"
sslkey = "k"
connect_timeout = "7s"
stall_timeout = "7s"
tcp_keepalives_idle = "7s"
tcp_keepalives_interval = "7s"
tcp_keepalives_count = 7
tcp_user_timeout = "7s"
kind = "other"
[target]
host = "10.0.0.8"
port = 5433
user = "u"
password = "p"
sslmode = "disable"
sslrootcert = "r"
sslcert = "c"
sslkey = "k"
connect_timeout = "7s"
stall_timeout = "7s"
tcp_keepalives_idle = "7s"
tcp_keepalives_interval = "7s"
tcp_keepalives_count = 7
tcp_user_timeout = "7s"
kind = "other"
[auth]
hba_file = "h"
ident_file = "i"
users_file = "u"
auth_query = "q"
auth_database = "d"
verifier_cache = "7s"
[pool]
mode = "transaction"
default_pool_size = 7
min_pool_size = 7
reserve_pool_size = 7
reserve_pool_timeout = "7s"
max_db_connections = 7
max_user_connections = 7
max_prepared_statements = 7
max_client_statements = 7
max_client_statements_size = "7MB"
server_lifetime = "7s"
server_idle_timeout = "7s"
server_linger = "7s"
server_check_delay = "7s"
server_check_query = "q"
server_reset_query = "q"
server_reset_query_always = true
[pool.database.shop]
mode = "session"
[pool.user.ann]
mode = "session"
[limits]
max_client_connections = 7
reserved_admin_connections = 7
max_user_connections = 7
max_database_connections = 7
max_address_connections = 7
client_login_timeout = "7s"
query_timeout = "7s"
idle_timeout = "7s"
idle_transaction_timeout = "7s"
transaction_timeout = "7s"
query_wait_timeout = "7s"
client_lifetime = "7s"
shadow_connections = 7
resume_rate = 7
max_message = "7MB"
buffer = "8kB"
[limits.user.ann]
query_timeout = "7s"
[limits.database.shop]
query_timeout = "7s"
[migration]
copy_workers = 7
index_workers = 7
part_size = "7MB"
maintenance_work_mem = "7MB"
without_identity = "refuse"
ddl = "refuse"
apply_queue = "7MB"
bindir = "b"
verify_workers = 7
verify_part_size = "7MB"
verify_load = 7
verify_load_busy = 7
slot_timeout = "7s"
validation_interval = "7s"
long_transaction = "7s"
lock_timeout = "7s"
copy_rate = "7MB"
max_standby_lag = "7s"
max_retained_wal = "7MB"
[cutover]
max_pause = "7s"
drain_timeout = "7s"
max_lag_at_start = "7MB"
throttle_writes = "7ms"
throttle_for = "7s"
max_unstreamed = "7MB"
warm_target = "7s"
require_verified = true
reads = "continue"
stragglers = "terminate"
[admin]
address = "127.0.0.1:8433"
users = ["ann"]
stats_users = ["bob"]
hosts = ["h"]
token = "t"
[telemetry]
log = "debug"
format = "json"
"#;

fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A directory that holds the file `source` with a password.
fn secrets() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    std::fs::write(directory.path().join("source"), "s3cret\n").expect("written");
    directory
}

/// The configuration of a text that must be right.
fn good(text: &str, pairs: &[(&str, &str)]) -> Config {
    let directory = secrets();
    let (config, problems, _) = read(text, directory.path(), &environment(pairs));
    assert_eq!(problems, [], "{text}");
    config
}

/// Everything that is wrong with MINIMAL after `change`.
fn problems(change: impl Fn(String) -> String, pairs: &[(&str, &str)]) -> Vec<String> {
    let directory = secrets();
    let mut pairs = pairs.to_vec();
    pairs.push(("TARGET_PASSWORD", "t4rget"));
    let (_, problems, _) = read(&change(MINIMAL.to_owned()), directory.path(), &environment(&pairs));
    let error = ConfigError::Invalid { path: Some("f".into()), problems };
    error.to_string().lines().map(str::to_owned).collect()
}

#[test]
fn the_smallest_file_works_and_has_the_documented_defaults() {
    let config = good(MINIMAL, &[("TARGET_PASSWORD", "t4rget")]);
    assert_eq!(config.source.password, Some(Secret::new("s3cret")));
    assert_eq!(config.target.password, Some(Secret::new("t4rget")));
    assert_eq!(config.source.port, 5432);
    assert_eq!(config.source.sslmode, SslMode::Prefer);
    assert_eq!(config.control.database, "postgres");
    assert_eq!(config.cutover.max_pause, Duration::from_secs(5));
    assert_eq!(config.cutover.drain_timeout, Duration::from_secs(3));
    assert_eq!(config.cutover.max_lag_at_start_bytes, 16 << 20);
    assert_eq!(config.cutover.throttle_writes, Duration::ZERO);
    assert_eq!(config.cutover.throttle_for, Duration::from_secs(60));
    assert_eq!(config.cutover.max_unstreamed_bytes, 64 << 20);
    assert_eq!(config.cutover.warm_target, Duration::from_secs(10));
    assert_eq!(config.cutover.stragglers, Stragglers::Abort);
    assert_eq!(config.limits.max_message_bytes, 1 << 30);
    assert_eq!(config.limits.client_login_timeout, Duration::from_secs(15));
    assert_eq!(config.limits.max_client_connections, 10_000);
}

#[test]
fn the_example_explains_every_key_and_says_the_defaults() {
    // The example's one file outside of the repository.
    let text = EXAMPLE.replace("/run/secrets/source", "source");
    let directory = secrets();
    let environment = environment(&[("TARGET_PASSWORD", "t4rget")]);
    let (config, problems, known) = read(&text, directory.path(), &environment);
    assert_eq!(problems, []);
    let mut section = "";
    let mut mentioned = BTreeSet::new();
    for line in text.lines() {
        if let Some(table) = line.strip_prefix("# [").and_then(|line| line.strip_suffix(']')) {
            // `[section.key.name]`: what is said otherwise for one user or database.
            mentioned.extend(
                table
                    .rsplit_once('.')
                    .and_then(|(parent, _)| parent.split_once('.'))
                    .map(|(a, b)| (a.to_owned(), b.to_owned())),
            );
        } else if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
        } else if let Some((key, _)) = line.trim_start_matches("# ").split_once(" = ") {
            mentioned.insert((section.to_owned(), key.to_owned()));
        }
    }
    for (section, keys) in &known.0 {
        for key in keys {
            assert!(
                mentioned.contains(&((*section).to_owned(), (*key).to_owned())),
                "[{section}] {key} is not explained"
            );
        }
    }
    let minimal = good(MINIMAL, &[("TARGET_PASSWORD", "t4rget")]);
    assert_eq!(config.settings(), minimal.settings(), "the example must show the defaults");
}

#[test]
fn show_config_lists_every_key_and_no_secret() {
    let config = good(MINIMAL, &[("TARGET_PASSWORD", "t4rget"), ("PGCUTOVER_ADMIN_TOKEN", "t0ken")]);
    let (_, _, known) = read(MINIMAL, Path::new(""), &Environment::new());
    let listed: Vec<_> = config.settings().into_iter().map(|setting| (setting.section, setting.key)).collect();
    for (section, keys) in &known.0 {
        for key in keys.iter().filter(|key| {
            !key.ends_with("_file") && !key.ends_with("_env")
                || matches!(**key, "users_file" | "hba_file" | "ident_file")
        }) {
            assert!(listed.contains(&(section, key)), "[{section}] {key} is not listed");
        }
    }
    for secret in ["s3cret", "t4rget", "t0ken"] {
        assert!(!format!("{config:?}").contains(secret));
        assert!(!format!("{:?}", config.settings()).contains(secret));
    }
}

#[test]
fn mistakes_are_named_with_their_line_and_the_nearest_key() {
    type Case = (fn(String) -> String, &'static str);
    let cases: [Case; 25] = [
        (|f| f.replace("users =", "user ="), "f:7: unknown key `user` in [admin]; did you mean `users`?"),
        (|f| f.replace("[target]", "[targets]"), "f:14: unknown section [targets]; did you mean `target`?"),
        (|f| f + "sslmod = \"require\"\n", "f:18: unknown key `sslmod` in [target]; did you mean `sslmode`?"),
        (|f| f + "sslmode = \"requires\"\n", "f:18: [target] sslmode: \"requires\" is not one of"),
        (|f| f + "sslmode = \"verify-full\"\n", "f:18: [target] sslmode: a mode that verifies needs sslrootcert"),
        (|f| f + "port = 99999\n", "f:18: [target] port: 99999 is not a whole number between 1 and 65535"),
        (|f| f + "connect_timeout = \"5\"\n", "f:18: [target] connect_timeout: \"5\" is not a duration"),
        (|f| f + "connect_timeout = 5\n", "f:18: [target] connect_timeout: expected a duration in quotes"),
        (|f| f + "connect_timeout = \"0s\"\n", "f:18: [target] connect_timeout: has to be more than zero"),
        (|f| f + "sslcert = \"c.pem\"\n", "f:18: [target] sslcert: needs sslkey as well"),
        (|f| f + "password = \"x\"\n", "f:18: [target] password: set only one of password, password_file"),
        (|f| f.replace("10.0.0.6", "10.0.0.5"), "f:15: [target] host: 10.0.0.5:5432 is the source as well"),
        (|f| f.replace(":8432", ":6432"), "f:6: [admin] address: 127.0.0.1:6432 is taken by [listen] address"),
        (|f| f.replace("address = \"127.0.0.1:6432\"", ""), "f: nothing to listen on"),
        (|f| f.replace("host = \"10.0.0.6\"", ""), "f:14: [target] host is missing"),
        (
            |f| f.replace("\"TARGET_PASSWORD\"", "\"NO_SUCH\""),
            "f:17: [target] password_env: the environment variable NO_SUCH",
        ),
        (|f| f.replace("\"source\"", "\"nowhere\""), "f:12: [source] password_file: cannot read"),
        (|f| f + "[cutover]\ndrain_timeout = \"9s\"\n", "f:19: [cutover] drain_timeout: is longer than max_pause"),
        (
            |f| f + "[pool]\nmode = \"statement\"\n",
            "f:19: [pool] mode: \"statement\" is not one of \"session\", \"transaction\"",
        ),
        (
            |f| f + "[pool.user.ann]\nmod = \"session\"\n",
            "f:19: unknown key `mod` in [pool.user.ann]; did you mean `mode`?",
        ),
        (
            |f| f + "[pool]\nquery_wait_timeout = \"1s\"\n",
            "f:19: `query_wait_timeout` does not stand in [pool]; it is a key of [limits]",
        ),
        (|f| f + "[pool.users.ann]\nmode = \"session\"\n", "f:18: unknown key `users` in [pool]"),
        (|f| f + "[auth]\nmethod = \"password\"\n", "f:19: [auth] method: sends passwords in clear text"),
        (|f| f + "[telemetry]\nlog = \"inof\"\n", "f:19: [telemetry] log: \"inof\" is not one of off, error"),
        (|f| f + "[telemetry]\nlog = \"a=info,warning\"\n", "f:19: [telemetry] log: \"warning\" is not one of off"),
    ];
    for (change, expected) in cases {
        let found = problems(change, &[]);
        assert!(found.iter().any(|line| line.starts_with(expected)), "expected {expected:?}, found {found:#?}");
    }
}

#[test]
fn what_clients_meet_before_they_log_in_is_checked_together() {
    let listen = |line: &'static str| problems(|f| f.replace("[admin]", &format!("{line}\n[admin]")), &[]);
    for (line, expected) in [
        ("tls_client_cert = \"require\"", "f:5: [listen] tls_client_cert: needs tls_client_ca"),
        ("tls_client_ca = \"ca.crt\"", "f:5: [listen] tls_client_ca: needs tls_certificate and tls_key"),
        ("tls_min_version = \"1.1\"", "f:5: [listen] tls_min_version: \"1.1\" is not one of \"1.2\", \"1.3\""),
        ("proxy_protocol_from = [\"10.0.0.0/99\"]", "f:5: [listen] proxy_protocol_from: \"10.0.0.0/99\" is not an"),
    ] {
        let found = listen(line);
        assert!(found.iter().any(|line| line.starts_with(expected)), "expected {expected:?}, found {found:#?}");
    }
    let tls = "tls_certificate = \"a\"\ntls_key = \"b\"\ntls_client_ca = \"ca.crt\"\n[admin]";
    let config = good(&MINIMAL.replace("[admin]", tls), &[("TARGET_PASSWORD", "t4rget")]);
    let tls = config.listen.tls.expect("set");
    assert_eq!(tls.client_certificates, ClientCertificates::Verify, "the default where authorities are named");
}

#[test]
fn more_mistakes_at_once_are_all_reported() {
    let found = problems(|f| f.replace("users =", "uses =").replace("host = \"10.0.0.6\"", "hots = \"10.0.0.6\""), &[]);
    assert_eq!(found.len(), 3, "{found:#?}");
}

#[test]
fn a_syntax_error_never_quotes_the_line() {
    let found = problems(|f| f.replace("password_env = \"TARGET_PASSWORD\"", "password = hunter2"), &[]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with("f:17: not valid TOML"), "{found:#?}");
    assert!(!found[0].contains("hunter2"), "{found:#?}");
    let found = problems(|f| f.replace("password_env = \"TARGET_PASSWORD\"", "password = 12345"), &[]);
    assert!(found[0].starts_with("f:17: [target] password: expected text in quotes, found a number"), "{found:#?}");
    assert!(!found[0].contains("12345"), "{found:#?}");
}

#[test]
fn the_environment_overrides_the_file() {
    let variables = [
        ("TARGET_PASSWORD", "t4rget"),
        ("PGCUTOVER_SOURCE_PORT", "5433"),
        ("PGCUTOVER_ADMIN_USERS", "alice, bob"),
        ("PGCUTOVER_CUTOVER_MAX_PAUSE", "7s"),
        ("PGCUTOVER_LISTEN_ADDRESS", "127.0.0.1:7000"),
        ("PGCUTOVER_PORT", "tcp://10.0.0.1:6432"),
        // What an orchestrator makes for a service of the name pgcutover-admin.
        ("PGCUTOVER_ADMIN_SERVICE_HOST", "10.0.0.1"),
        ("PGCUTOVER_ADMIN_SERVICE_PORT_HTTP", "8432"),
        ("PGCUTOVER_ADMIN_PORT", "tcp://10.0.0.1:8432"),
        ("PGCUTOVER_ADMIN_PORT_8432_TCP", "tcp://10.0.0.1:8432"),
        ("PGCUTOVER_ADMIN_PORT_8432_TCP_PROTO", "tcp"),
        ("PGCUTOVER_ADMIN_PORT_8432_TCP_PORT", "8432"),
        ("PGCUTOVER_ADMIN_PORT_8432_TCP_ADDR", "10.0.0.1"),
    ];
    let config = good(MINIMAL, &variables);
    assert_eq!(config.source.port, 5433);
    assert_eq!(config.admin.users, ["alice", "bob"]);
    assert_eq!(config.cutover.max_pause, Duration::from_secs(7));
    assert_eq!(config.listen.address.map(|address| address.port()), Some(7000));

    assert_eq!(problems(|f| f, &[("PGCUTOVER_ADMIN_PORT", "8432")]).len(), 1, "meant for us, and no key");
    let found = problems(|f| f, &[("PGCUTOVER_SOURCE_HSOT", "x")]);
    let expected =
        "environment variable PGCUTOVER_SOURCE_HSOT: no such key in [source]; did you mean `PGCUTOVER_SOURCE_HOST`?";
    assert_eq!(found, [expected]);
    let found = problems(|f| f, &[("PGCUTOVER_SOURCE_PORT", "high")]);
    assert!(
        found[0].starts_with("environment variable PGCUTOVER_SOURCE_PORT: [source] port: high is not"),
        "{found:?}"
    );
}

#[test]
fn a_reload_says_what_it_cannot_change() {
    let variables = [("TARGET_PASSWORD", "t4rget")];
    let old = good(MINIMAL, &variables);
    let new = good(&format!("{MINIMAL}\n[cutover]\nmax_pause = \"6s\"\n[telemetry]\nlog = \"debug\"\n"), &variables);
    assert_eq!(old.changes(&new).applied, ["cutover.max_pause", "telemetry.log"]);
    let new = good(MINIMAL, &[("TARGET_PASSWORD", "other"), ("PGCUTOVER_SOURCE_HOST", "10.0.0.9")]);
    assert_eq!(old.changes(&new).needs_restart, ["source.host", "target.password"]);
    assert_eq!(old.changes(&old), Changes::default());
    let both = good(&format!("{MINIMAL}\n[cutover]\nmax_pause = \"6s\"\n[limits]\nbuffer = \"8kB\"\n"), &variables);
    let merged = old.with_live_changes(both.clone());
    assert_eq!(merged.changes(&both).applied, [""; 0], "everything that a reload applies was applied");
    assert_eq!(merged.changes(&both).needs_restart, ["limits.buffer"]);
}

/// What is shown as in force is: a value that waits for a restart is neither shown nor forgotten.
#[test]
fn a_reload_takes_every_key_that_it_may_and_no_other() {
    let old = good(MINIMAL, &[("TARGET_PASSWORD", "t4rget")]);
    let mut new = good(OTHERWISE, &[]);
    new.auth.method = AuthMethod::Md5;
    let keys = |live: Live| -> BTreeSet<String> {
        let those = old.settings().into_iter().filter(|setting| setting.live == live);
        those.map(|setting| format!("{}.{}", setting.section, setting.key)).collect()
    };
    let changes = old.changes(&new);
    assert_eq!(BTreeSet::from_iter(changes.applied), keys(Live::Reload), "every key has another value");
    assert_eq!(BTreeSet::from_iter(changes.needs_restart), keys(Live::Restart), "every key has another value");
    let left = old.with_live_changes(new.clone()).changes(&new);
    assert_eq!(left.applied, [""; 0]);
    assert_eq!(BTreeSet::from_iter(left.needs_restart), keys(Live::Restart));
}

#[test]
fn a_reload_changes_whatever_decides_who_is_let_in() {
    let old = good(MINIMAL, &[("TARGET_PASSWORD", "t4rget")]);
    let listen = "tls_certificate = \"c\"\ntls_key = \"k\"\ntls_required = true\ntls_min_version = \"1.3\"\n\
                  tls_client_ca = \"ca\"\ntls_client_cert = \"require\"\nproxy_protocol_from = [\"10.0.0.0/8\"]\n\n[admin]";
    let auth = "[auth]\nhba_file = \"h\"\nident_file = \"i\"\nusers_file = \"u\"\nauth_query = \"q\"\n\
                auth_database = \"d\"\nverifier_cache = \"1s\"\n";
    let text = MINIMAL.replace("[admin]", listen) + auth;
    let new = good(&text, &[("TARGET_PASSWORD", "t4rget")]);
    let changes = old.changes(&new);
    assert_eq!(changes.needs_restart, [""; 0]);
    assert_eq!(changes.applied.len(), 7 + 6, "{changes:?}");
    assert_eq!(old.with_live_changes(new.clone()).changes(&new), Changes::default());
    let both = problems(|f| f + "[auth]\nhba_file = \"h\"\nmethod = \"md5\"\n", &[]);
    assert!(both[0].starts_with("f:20: [auth] method: hba_file says the method"), "{both:?}");
    let unchecked = problems(|f| f + "[auth]\nmethod = \"cert\"\n", &[]);
    assert!(unchecked[0].starts_with("f:19: [auth] method: needs [listen] tls_client_ca"), "{unchecked:?}");
}

#[test]
fn a_missing_file_is_named() {
    let error = load(Some(Path::new("/no/such/file.toml")), &Environment::new()).expect_err("there is none");
    assert!(error.to_string().starts_with("cannot read the configuration file /no/such/file.toml"), "{error}");
}

#[test]
fn limits_of_single_roles_are_tables_below_the_section() {
    let text = MINIMAL.to_owned()
        + "[limits.user.ann]\nquery_timeout = \"5s\"\n[limits.database]\nshop = { max_connections = 9 }\n";
    let config = good(&text, &[("TARGET_PASSWORD", "t4rget")]);
    assert_eq!(config.limits.timeouts_of("ann", "shop").query, Duration::from_secs(5));
    assert_eq!(config.limits.timeouts_of("bob", "shop").query, Duration::ZERO);
    assert_eq!(config.limits.max_connections_of_database("shop"), Some(9));
    let value = |key| config.settings().into_iter().find(|one| one.section == "limits" && one.key == key);
    assert_eq!(value("user").expect("listed").value, "ann: query_timeout=5s");
    for (line, expected) in [
        (
            "[limits.user.ann]\nquery_timeut = \"5s\"",
            "f:19: unknown key `query_timeut` in [limits.user.ann]; did you mean",
        ),
        ("[limits.user.ann]\nquery_timeout = 5", "f:19: [limits.user.ann] query_timeout: expected a duration"),
        ("[limits]\nuser = 5", "f:19: [limits] user: expected tables, such as [limits.user.name], found a number"),
        ("[limits.user]\nann = 5", "f:19: `ann` must be a table: [limits.user.ann]"),
        ("[limits]\nusers.ann.max_connections = 5", "f:19: unknown key `users` in [limits]; did you mean `user`?"),
    ] {
        let found = problems(|file| file + line + "\n", &[]);
        assert!(found.iter().any(|problem| problem.starts_with(expected)), "expected {expected:?}, found {found:#?}");
    }
}
