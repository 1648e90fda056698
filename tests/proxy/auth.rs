//! Who is let in, and with what the proxy logs in for them.

use std::io::Write as _;
use std::time::Duration;

use pgcutover::config::{AuthMethod, Config, PoolMode};
use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use tokio::io::AsyncReadExt as _;

use crate::rig::{Rig, server, text};
use crate::support::{connect, try_connect, two_clusters_with};
use crate::wire_client::WireClient;

/// `in`, or the SQLSTATE of the refusal.
pub async fn attempt(rig: &Rig, user: &str, password: &str) -> String {
    let mut config = rig.client("postgres");
    config.user(user).password(password);
    match try_connect(&config).await {
        Ok(client) => {
            assert_eq!(text(&client, "SELECT current_user").await, user);
            "in".to_owned()
        }
        Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()),
    }
}

/// Two servers that ask for passwords, the same role with the same verifier on both.
async fn two(auth: ClusterAuth) -> (Cluster, Cluster) {
    let (source, target) =
        two_clusters_with(|options| options.auth(auth.clone()), |options| options.auth(auth.clone()));
    let direct = connect(&source, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'right'").await.expect("created");
    let verifier = text(&direct, "SELECT rolpassword FROM pg_authid WHERE rolname = 'ann'").await;
    let direct = connect(&target, "postgres").await;
    direct.batch_execute(&format!("CREATE ROLE ann LOGIN PASSWORD '{verifier}'")).await.expect("created");
    (source, target)
}

fn auto(config: &mut Config) {
    config.auth.method = AuthMethod::Auto;
}

fn scram() -> ClusterAuth {
    ClusterAuth::Scram { password: "super".to_owned() }
}

fn users_file(lines: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("made");
    file.write_all(lines.as_bytes()).expect("written");
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn scram_lets_in_with_the_clients_own_key_on_both_servers() {
    let (source, target) = two(scram()).await;
    let rig = Rig::start(server(&source), server(&target), auto);
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    assert_eq!(attempt(&rig, "ann", "wrong").await, "28P01");
    assert_eq!(attempt(&rig, "nobody", "right").await, "28P01");
    // After a switch the verifier is read from the target, and the key opens it too.
    let database = rig.database();
    database.fence();
    database.wait_empty().await;
    database.open(pgcutover::switch::ServerRole::Target, pgcutover::switch::Epoch(1));
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    // A changed password counts at once.
    let direct = connect(&target, "postgres").await;
    direct.batch_execute("ALTER ROLE ann PASSWORD 'newer'").await.expect("changed");
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let _first = attempt(&rig, "ann", "newer").await;
    assert_eq!(attempt(&rig, "ann", "newer").await, "in");
    assert_eq!(rig.metrics.auth_failures.with_label_values(&["unknown_user"]).get(), 1);
    assert!(rig.metrics.auth_failures.with_label_values(&["password"]).get() >= 1);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn md5_verifiers_are_used_on_both_sides() {
    let (source, target) = two(ClusterAuth::Md5 { password: "super".to_owned() }).await;
    let rig = Rig::start(server(&source), server(&target), auto);
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    assert_eq!(attempt(&rig, "ann", "wrong").await, "28P01");
    // Where roles have md5 verifiers, an unknown one is asked as if it had one.
    for user in ["ann", "nobody"] {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", user), ("database", "postgres")]).await;
        assert_eq!(client.next().await.expect("asked").body[..4], [0, 0, 0, 5], "{user}");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_file_does_without_the_servers_verifiers() {
    let (source, target) = two(scram()).await;
    let direct = connect(&source, "postgres").await;
    let verifier = text(&direct, "SELECT rolpassword FROM pg_authid WHERE rolname = 'ann'").await;
    for lines in ["\"ann\" \"right\"\n".to_owned(), format!("\"ann\" \"{verifier}\"\n")] {
        let file = users_file(&lines);
        let path = file.path().to_owned();
        let rig = Rig::start(server(&source), server(&target), |config| {
            auto(config);
            config.auth.users_file = Some(path);
            config.auth.auth_query = String::new();
        });
        assert_eq!(attempt(&rig, "ann", "right").await, "in");
        assert_eq!(attempt(&rig, "ann", "wrong").await, "28P01");
        assert_eq!(attempt(&rig, "postgres", "super").await, "28P01", "not listed");
        rig.stop().await;
    }
    // A plain password does for md5 too, and for a client that is believed.
    for method in [AuthMethod::Md5, AuthMethod::Trust] {
        let file = users_file("\"ann\" \"right\"\n");
        let path = file.path().to_owned();
        let rig = Rig::start(server(&source), server(&target), |config| {
            config.auth.method = method;
            config.auth.users_file = Some(path);
        });
        assert_eq!(attempt(&rig, "ann", "right").await, "in", "{method:?}");
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_to_read_verifiers_clients_get_postgresqls_words() {
    let (source, target) = two(scram()).await;
    let mut weak = server(&source);
    weak.user = "ann".to_owned();
    weak.password = Some(pgcutover::config::Secret::new("right"));
    let rig = Rig::start(weak, server(&target), auto);
    assert_eq!(attempt(&rig, "ann", "right").await, "28P01");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clear_text_passwords_need_a_private_connection() {
    let (source, target) = two(scram()).await;
    let directory = tempfile::tempdir().expect("made");
    let path = directory.path().to_owned();
    let rig = Rig::start(server(&source), server(&target), |config| {
        config.auth.method = AuthMethod::Password;
        config.listen.unix_socket_dir = Some(path.clone());
    });
    assert_eq!(attempt(&rig, "ann", "right").await, "28000");
    let mut config = tokio_postgres::Config::new();
    config.host_path(&path).port(rig.port).user("ann").password("right").dbname("postgres");
    assert_eq!(text(&crate::support::connect_with(&config).await, "SELECT 1").await, "1");
    assert_eq!(rig.sessions.list().first().map(|session| session.client_address.clone()), Some("unix".to_owned()));
    for (user, password) in [("ann", "wrong"), ("nobody", "right")] {
        config.user(user).password(password);
        let error = try_connect(&config).await.expect_err("refused");
        assert_eq!(error.code().map(|code| code.code()), Some("28P01"), "{user}");
    }
    rig.stop().await;
    assert_eq!(std::fs::read_dir(&path).expect("there").count(), 0, "the socket file is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_is_for_its_users() {
    let cluster = crate::support::one_cluster("console");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.admin.users = vec!["postgres".to_owned()]);
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "postgres"), ("database", "pgcutover")]).await;
    assert_eq!(client.next().await.map(|message| message.body), Some(vec![0; 4]));
    let mut words = String::new();
    client.stream.read_to_string(&mut words).await.expect("text");
    assert_eq!(words, "console for postgres");
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", "ann"), ("database", "pgcutover")]).await;
    assert_eq!(client.next().await.expect("an error").code(), "42501");
    rig.stop().await;
}

/// The whole refusal: SQLSTATE and message.
async fn refusal(rig: &Rig, user: &str, password: &str) -> String {
    let mut config = rig.client("postgres");
    config.user(user).password(password);
    let error = try_connect(&config).await.expect_err("refused");
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    format!("{} {}", error.code().code(), error.message())
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_are_let_in_under_whatever_name_they_have() {
    let (source, target) = two(scram()).await;
    let direct = connect(&source, "postgres").await;
    let longest = "n".repeat(63);
    let names = ["Ann", "größe", "a \"quoted\" one", "with,comma=and\\more", "'; drop role ann; --", &longest];
    for name in names {
        let quoted = name.replace('"', "\"\"");
        direct.batch_execute(&format!("CREATE ROLE \"{quoted}\" LOGIN PASSWORD 'pass wörd'")).await.expect("created");
    }
    let rig = Rig::start(server(&source), server(&target), auto);
    for name in names {
        assert_eq!(attempt(&rig, name, "pass wörd").await, "in", "{name}");
        assert_eq!(attempt(&rig, name, "pass word").await, "28P01", "{name}");
    }
    assert_eq!(attempt(&rig, "ANN", "pass wörd").await, "28P01");
    // What is too long is cut, as servers do, and is the name of a role that must prove itself like any other.
    assert_eq!(attempt(&rig, &"n".repeat(64), "pass word").await, "28P01");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_passwords_and_roles_without_login_are_refused_as_postgresql_does() {
    let (source, target) = two(scram()).await;
    let direct = connect(&source, "postgres").await;
    direct
        .batch_execute(
            "CREATE ROLE old LOGIN PASSWORD 'right' VALID UNTIL '2001-01-01';
             CREATE ROLE young LOGIN PASSWORD 'right' VALID UNTIL '2999-01-01';
             CREATE ROLE forever LOGIN PASSWORD 'right' VALID UNTIL 'infinity';
             CREATE ROLE never LOGIN PASSWORD 'right' VALID UNTIL '-infinity';
             CREATE ROLE resting NOLOGIN PASSWORD 'right';
             CREATE ROLE bare LOGIN",
        )
        .await
        .expect("created");
    let rig = Rig::start(server(&source), server(&target), auto);
    let direct = |user: &str, password: &str| {
        let mut config = source.config("postgres");
        config.user(user).password(password);
        config
    };
    for (user, password, expected) in [
        ("old", "right", "28P01 password authentication failed for user \"old\""),
        ("never", "right", "28P01 password authentication failed for user \"never\""),
        ("bare", "right", "28P01 password authentication failed for user \"bare\""),
        ("nobody", "right", "28P01 password authentication failed for user \"nobody\""),
        ("resting", "right", "28000 role \"resting\" is not permitted to log in"),
        ("resting", "wrong", "28P01 password authentication failed for user \"resting\""),
    ] {
        assert_eq!(refusal(&rig, user, password).await, expected);
        let error = try_connect(&direct(user, password)).await.expect_err("refused");
        let error = error.as_db_error().expect("by the server");
        assert_eq!(format!("{} {}", error.code().code(), error.message()), expected, "straight from the server");
    }
    assert_eq!(attempt(&rig, "young", "right").await, "in");
    assert_eq!(attempt(&rig, "forever", "right").await, "in");
    // It was the proxy that refused them: the servers would have too.
    let failures = |reason| rig.metrics.auth_failures.with_label_values(&[reason]).get();
    assert_eq!((failures("unknown_user"), failures("password")), (5, 1));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_password_is_refused_where_the_server_asks_for_none() {
    let cluster = crate::support::one_cluster("expired");
    let direct = connect(&cluster, "postgres").await;
    let sql =
        "CREATE ROLE old LOGIN PASSWORD 'right' VALID UNTIL '2001-01-01'; CREATE ROLE young LOGIN PASSWORD 'right'";
    direct.batch_execute(sql).await.expect("created");
    let rig = Rig::start(server(&cluster), server(&cluster), auto);
    assert_eq!(attempt(&rig, "old", "right").await, "28P01");
    assert_eq!(attempt(&rig, "young", "right").await, "in");
    assert_eq!(attempt(&rig, "young", "wrong").await, "28P01");
    rig.stop().await;
}

/// Those whose proof is not the server's, and who are given a pool's connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_log_in_any_more_is_not_given_an_open_connection() {
    let cluster = crate::support::one_cluster("standing");
    let direct = connect(&cluster, "postgres").await;
    let users = users_file("\"listed\" \"right\"\n");
    for (method, user) in [(AuthMethod::Trust, "believed"), (AuthMethod::Auto, "listed")] {
        direct.batch_execute(&format!("CREATE ROLE {user} LOGIN")).await.expect("created");
        let rig = Rig::start(server(&cluster), server(&cluster), |config| {
            config.auth.method = method;
            config.auth.users_file = Some(users.path().to_owned());
            config.auth.verifier_cache = Duration::ZERO;
            config.pool.mode = PoolMode::Transaction;
        });
        // A connection stays behind.
        assert_eq!(attempt(&rig, user, "right").await, "in");
        direct.batch_execute(&format!("ALTER ROLE {user} NOLOGIN")).await.expect("altered");
        let refused = format!("28000 role \"{user}\" is not permitted to log in");
        assert_eq!(refusal(&rig, user, "right").await, refused);
        direct.batch_execute(&format!("ALTER ROLE {user} LOGIN VALID UNTIL '2001-01-01'")).await.expect("altered");
        // The time is that of a password.
        let by_password = user == "listed";
        assert_eq!(attempt(&rig, user, "right").await, if by_password { "28P01" } else { "in" });
        rig.until_no_session().await;
        direct.batch_execute(&format!("DROP ROLE {user}")).await.expect("dropped");
        let gone = match by_password {
            true => format!("28P01 password authentication failed for user \"{user}\""),
            false => format!("28000 role \"{user}\" does not exist"),
        };
        assert_eq!(refusal(&rig, user, "right").await, gone);
        rig.stop().await;
    }
}

/// What an unknown or a known user is asked, up to the salt.
async fn salt(rig: &Rig, user: &str) -> String {
    let mut client = WireClient::connect(rig.port).await;
    client.start(&[("user", user), ("database", "postgres")]).await;
    assert_eq!(client.next().await.expect("asked").body[..4], [0, 0, 0, 10]);
    let first = "n,,n=,r=abc";
    let body = [b"SCRAM-SHA-256\0", &(first.len() as u32).to_be_bytes()[..], first.as_bytes()].concat();
    client.send(&crate::wire_client::frame(b'p', &body)).await;
    let answer = client.next().await.expect("a challenge").body;
    let answer = String::from_utf8_lossy(&answer[4..]).into_owned();
    let (salt, iterations) = answer.split_once(",s=").and_then(|(_, rest)| rest.split_once(",i=")).expect("a salt");
    assert_eq!(iterations, "4096");
    salt.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_tells_whether_a_user_exists() {
    let (source, target) = two(scram()).await;
    let mut weak = server(&source);
    let rig = Rig::start(weak.clone(), server(&target), auto);
    let known = salt(&rig, "ann").await;
    let unknown = salt(&rig, "nobody").await;
    assert_eq!((salt(&rig, "ann").await, salt(&rig, "nobody").await), (known.clone(), unknown.clone()), "stable");
    assert_eq!(known.len(), unknown.len());
    rig.stop().await;
    // Not even where the query fails, while a user of the file is found.
    weak.user = "ann".to_owned();
    weak.password = Some(pgcutover::config::Secret::new("right"));
    let file = users_file("\"ann\" \"right\"\n");
    let path = file.path().to_owned();
    let rig = Rig::start(weak, server(&target), |config| {
        auto(config);
        config.auth.users_file = Some(path);
    });
    assert_eq!(salt(&rig, "ann").await.len(), salt(&rig, "nobody").await.len());
    assert_eq!(attempt(&rig, "nobody", "right").await, "28P01");
    assert_eq!(rig.metrics.auth_failures.with_label_values(&["unavailable"]).get(), 1);
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_rights_reads_verifiers_through_a_function_that_nobody_can_trick() {
    let (source, target) = two(scram()).await;
    // As the example file has it.
    let example = include_str!("../../config/pgcutover.toml");
    let lines =
        example.lines().skip_while(|line| !line.contains("CREATE SCHEMA gate")).take_while(|l| l.starts_with("#   "));
    let function: String = lines.map(|line| format!("{}\n", line.trim_start_matches('#'))).collect();
    let direct = connect(&source, "postgres").await;
    direct.batch_execute("CREATE DATABASE vault").await.expect("made");
    direct.batch_execute("CREATE ROLE pgcutover LOGIN PASSWORD 'own'").await.expect("made");
    let vault = connect(&source, "vault").await;
    vault.batch_execute(&function).await.expect("the documented function can be made");
    // What an unqualified name would find, if anything looked there.
    vault
        .batch_execute("CREATE TABLE public.pg_authid AS SELECT * FROM pg_catalog.pg_authid; UPDATE public.pg_authid SET rolpassword = 'known'; \
                        ALTER ROLE pgcutover SET search_path = public, pg_catalog; GRANT ALL ON public.pg_authid TO PUBLIC")
        .await
        .expect("made");
    let mut weak = server(&source);
    weak.user = "pgcutover".to_owned();
    weak.password = Some(pgcutover::config::Secret::new("own"));
    let rig = Rig::start(weak, server(&target), |config| {
        auto(config);
        config.auth.auth_query = "SELECT * FROM gate.account($1)".to_owned();
        config.auth.auth_database = Some("vault".to_owned());
    });
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    assert_eq!(attempt(&rig, "ann", "known").await, "28P01");
    // The search path of the session is pinned too, whatever the role's own is.
    rig.try_reload(|config| {
        config.auth.auth_query = "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = $1".to_owned();
    })
    .expect("nothing to read");
    assert_eq!(attempt(&rig, "ann", "known").await, "28P01", "pg_catalog's table, which it may not read");
    // A column that does not say what its name promises lets nobody in.
    rig.try_reload(|config| {
        config.auth.auth_query = "SELECT name, verifier, 'soon' AS valid_until FROM gate.account($1)".to_owned();
    })
    .expect("nothing to read");
    assert_eq!(attempt(&rig, "ann", "right").await, "28P01");
    rig.stop().await;
}
