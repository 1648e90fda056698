//! Who is let in, and with what the proxy logs in for them.

use std::io::Write as _;

use pgcutover::config::{AuthMethod, Config};
use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use tokio::io::AsyncReadExt as _;

use crate::rig::{Rig, server, text};
use crate::support::{connect, try_connect, two_clusters_with};
use crate::wire_client::WireClient;

/// `in`, or the SQLSTATE of the refusal.
async fn attempt(rig: &Rig, user: &str, password: &str) -> String {
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
    config.password("wrong");
    assert_eq!(
        try_connect(&config).await.err().and_then(|error| error.code().cloned()).expect("refused").code(),
        "28P01"
    );
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
