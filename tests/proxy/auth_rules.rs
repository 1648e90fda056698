//! Rules, certificates and maps in front of real servers, and what a reload does to them.

use std::path::{Path, PathBuf};

use pgcutover::config::{AuthMethod, ClientCertificates, Config, Network};
use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use rcgen::DnType;

use crate::auth::attempt;
use crate::rig::{Rig, server, text};
use crate::support::{connect, connect_with, one_cluster, try_connect, two_clusters_with};
use crate::tls::{Authority, psql};
use crate::wire_client::WireClient;

/// Files of one proxy.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("made"))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).expect("written");
        path
    }
}

/// SQLSTATE and message of a refusal over TCP in the clear.
async fn refusal(rig: &Rig, user: &str, database: &str) -> String {
    let mut config = rig.client(database);
    config.user(user).password("right");
    match try_connect(&config).await {
        Ok(_) => "in".to_owned(),
        Err(error) => {
            let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
            format!("{} {}", error.code().code(), error.message())
        }
    }
}

/// One server that asks for passwords, with the roles ann and bob.
async fn server_with_roles() -> (Cluster, Cluster) {
    let auth = ClusterAuth::Scram { password: "super".to_owned() };
    let (source, target) =
        two_clusters_with(|options| options.auth(auth.clone()), |options| options.auth(auth.clone()));
    let direct = connect(&source, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'right'").await.expect("created");
    direct.batch_execute("CREATE ROLE \"Bob B\" LOGIN PASSWORD 'right'").await.expect("created");
    (source, target)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_rule_that_fits_decides_and_a_reload_changes_the_rules() {
    let (source, target) = server_with_roles().await;
    let files = Files::new();
    let sockets = files.0.path().to_owned();
    let rules = files.write(
        "pg_hba.conf",
        "local all postgres scram-sha-256\n\
         host template1 all all reject\n\
         host pgcutover ann all reject\n\
         host all ann 127.0.0.0/8 scram-sha-256\n\
         host \"pgcutover\" postgres samehost md5\n\
         host replication ann all trust\n\
         host all \"Bob B\" 10.0.0.0/8 scram-sha-256\n",
    );
    let rig = Rig::start(server(&source), server(&target), |config| {
        config.auth.method = AuthMethod::Auto;
        config.auth.hba_file = Some(rules.clone());
        config.auth.users_file = None;
        config.listen.unix_socket_dir = Some(sockets.clone());
        config.admin.users = vec!["postgres".to_owned()];
    });
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    assert_eq!(attempt(&rig, "ann", "wrong").await, "28P01");
    let words = |what: &str, user: &str, database: &str| {
        format!("28000 {what} host \"127.0.0.1\", user \"{user}\", database \"{database}\", no encryption")
    };
    let none = "no pg_hba.conf entry for";
    assert_eq!(
        refusal(&rig, "ann", "template1").await,
        words("pg_hba.conf rejects connection for", "ann", "template1")
    );
    assert_eq!(refusal(&rig, "Bob B", "postgres").await, words(none, "Bob B", "postgres"));
    assert_eq!(refusal(&rig, "nobody", "postgres").await, words(none, "nobody", "postgres"));
    assert_eq!(rig.metrics.auth_failures.with_label_values(&["rule"]).get(), 3);
    // The console is a database like any other.
    let mut console = WireClient::connect(rig.port).await;
    console.start(&[("user", "postgres"), ("database", "pgcutover")]).await;
    assert_eq!(console.next().await.expect("asked").body[..4], [0, 0, 0, 10]);
    // It has another name, which leads round no rule.
    let mut alias = WireClient::connect(rig.port).await;
    alias.start(&[("user", "ann"), ("database", "pgbouncer")]).await;
    assert_eq!(alias.next().await.expect("an error").code(), "28000");
    // Nor does a word that would make it a connection of no database.
    let mut walsender = WireClient::connect(rig.port).await;
    walsender.start(&[("user", "ann"), ("database", "pgcutover"), ("replication", "true")]).await;
    assert_eq!(walsender.next().await.expect("an error").code(), "28000");
    // Nor does one that asks for an ordinary session, however short it is.
    for no in ["fa", "fal", "fals"] {
        let mut ordinary = WireClient::connect(rig.port).await;
        ordinary.start(&[("user", "ann"), ("database", "template1"), ("replication", no)]).await;
        assert_eq!(ordinary.next().await.expect("an error").code(), "28000", "{no}");
    }
    let mut socket = tokio_postgres::Config::new();
    socket.host_path(&sockets).port(rig.port).user("postgres").password("super").dbname("postgres");
    assert_eq!(text(&connect_with(&socket).await, "SELECT 1").await, "1");

    // A session that stands is not touched, new ones meet the new rules.
    let stays = connect_with(rig.client("postgres").user("ann").password("right")).await;
    files.write("pg_hba.conf", "host all \"Bob B\" all scram-sha-256\n");
    rig.try_reload(|_| {}).expect("valid");
    assert_eq!(refusal(&rig, "ann", "postgres").await, words(none, "ann", "postgres"));
    assert_eq!(attempt(&rig, "Bob B", "right").await, "in");
    assert_eq!(text(&stays, "SELECT 2").await, "2");
    // What is wrong changes nothing.
    files.write("pg_hba.conf", "host all all all trust\nhost all all all ldap\n");
    let error = rig.try_reload(|_| {}).expect_err("a method that is not supported");
    assert!(error.contains("pg_hba.conf:2: authentication method \"ldap\" is not supported"), "{error}");
    assert_eq!(refusal(&rig, "ann", "postgres").await, words(none, "ann", "postgres"));
    std::fs::remove_file(&rules).expect("removed");
    let error = rig.try_reload(|_| {}).expect_err("no such file");
    assert!(error.contains("[auth] hba_file: cannot read "), "{error}");
    assert_eq!(attempt(&rig, "Bob B", "right").await, "in");
    drop(stays);
    // The console's client has not answered yet, and is not waited for.
    rig.stop().await;
    assert_eq!(console.next().await.expect("an error").code(), "57P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_read_again() {
    let (source, target) = server_with_roles().await;
    let files = Files::new();
    let users = files.write("users.txt", "\"ann\" \"right\"\n");
    let rig = Rig::start(server(&source), server(&target), |config| {
        config.auth.method = AuthMethod::Auto;
        config.auth.users_file = Some(users.clone());
        config.auth.auth_query = String::new();
    });
    assert_eq!(attempt(&rig, "ann", "right").await, "in");
    assert_eq!(attempt(&rig, "Bob B", "right").await, "28P01");
    files.write("users.txt", "\"Bob B\" \"right\"\n");
    assert_eq!(attempt(&rig, "ann", "right").await, "in", "not before it is asked for");
    rig.try_reload(|_| {}).expect("valid");
    assert_eq!(attempt(&rig, "ann", "right").await, "28P01");
    assert_eq!(attempt(&rig, "Bob B", "right").await, "in");
    files.write("users.txt", "\"Bob B\" \"right\"\n\"ann right\n");
    let error = rig.try_reload(|_| {}).expect_err("a quote is missing");
    assert!(error.contains("users.txt:2: expected") && !error.contains("right"), "{error}");
    assert_eq!(attempt(&rig, "Bob B", "right").await, "in");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_balancer_says_is_what_rules_see() {
    let cluster = one_cluster("hearsay");
    let files = Files::new();
    let rules = files.write("pg_hba.conf", "host all all 10.1.0.0/16 trust\nhost all all samehost trust\n");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.auth.hba_file = Some(rules);
        config.listen.proxy_protocol_from = vec![Network::parse("127.0.0.1").expect("valid")];
    });
    let first = async |header: Vec<u8>| {
        let mut client = WireClient::connect(rig.port).await;
        client.send(&header).await;
        client.start(&[("user", "postgres")]).await;
        client.next().await.expect("an answer")
    };
    let header = |address: [u8; 4]| crate::tls::header(0x21, address, 5);
    assert_eq!(first(header([10, 1, 7, 7])).await.tag, 'R');
    let error = first(header([10, 2, 7, 7])).await;
    let words = "no pg_hba.conf entry for host \"10.2.7.7\", user \"postgres\", database \"postgres\", no encryption";
    assert_eq!(pgcutover::wire::error::field(&error.body, b'M'), Some(words.as_bytes()));
    // Loopback over there is not this machine.
    assert_eq!(first(header([127, 0, 0, 1])).await.code(), "28000");
    // A client of a Unix socket over there is at most the balancer itself, which is on this machine here.
    let mut unix = b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\xd8".to_vec();
    unix.extend([0; 216]);
    assert_eq!(first(unix).await.tag, 'R');
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_mapped_to_roles() {
    let cluster = one_cluster("certificates");
    let direct = connect(&cluster, "postgres").await;
    direct
        .batch_execute("CREATE ROLE ann LOGIN; CREATE ROLE shop LOGIN; CREATE ROLE auditor LOGIN")
        .await
        .expect("made");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let files = Files::new();
    let rules = files.write(
        "pg_hba.conf",
        "hostssl template1 all all cert map=people clientname=DN\n\
         hostssl postgres shop all cert map=services clientname=SAN\n\
         hostssl postgres auditor all trust clientcert=verify-ca\n\
         hostssl postgres postgres all trust clientcert=verify-full\n\
         hostssl postgres all all cert\n\
         host all all all reject\n",
    );
    let maps = files
        .write("pg_ident.conf", "people \"CN=Ann Smith,O=Shop\" ann\nservices /^(.*)\\.svc\\.example\\.org$ \\1\n");
    let mut tls = authority.server();
    tls.client_ca = Some(authority.path());
    tls.client_certificates = ClientCertificates::Verify;
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.listen.tls = Some(tls);
        config.auth.hba_file = Some(rules);
        config.auth.ident_file = Some(maps);
    });
    let ann = authority.client("ann", |_| {});
    let smith = authority.client("Ann Smith", |parameters| {
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(DnType::OrganizationName, "Shop");
        parameters.distinguished_name.push(DnType::CommonName, "Ann Smith");
    });
    let service = authority.client("anything", |parameters| {
        let name = "shop.svc.example.org".try_into().expect("ASCII");
        parameters.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
    });
    let foreign = stranger.client("ann", |_| {});
    let come = |user: &str, database: &str, own: Option<&(PathBuf, PathBuf)>| {
        let mut conninfo = format!("host=localhost port={} user={user} dbname={database} sslmode=require", rig.port);
        let none = (Path::new("/none").to_owned(), Path::new("/none").to_owned());
        let (certificate, key) = own.unwrap_or(&none);
        conninfo = format!("{conninfo} sslcert={} sslkey={}", certificate.display(), key.display());
        psql(&conninfo, "", "SELECT current_user")
            .unwrap_or_else(|error| error.rsplit_once("FATAL:  ").map_or(error.clone(), |(_, words)| words.to_owned()))
    };
    let required = "connection requires a valid client certificate";
    let refused = |user: &str| format!("certificate authentication failed for user \"{user}\"");
    assert_eq!(come("ann", "postgres", Some(&ann)), "ann");
    assert_eq!(come("ann", "postgres", None), required);
    assert_eq!(come("ann", "postgres", Some(&smith)), refused("ann"));
    assert_eq!(come("shop", "postgres", Some(&service)), "shop");
    assert_eq!(come("shop", "postgres", Some(&ann)), refused("shop"));
    assert_eq!(come("ann", "template1", Some(&smith)), "ann");
    assert_eq!(come("ann", "template1", Some(&ann)), refused("ann"));
    assert_eq!(come("auditor", "postgres", Some(&smith)), "auditor", "any certificate of the authority");
    assert_eq!(come("auditor", "postgres", None), required);
    assert_eq!(come("postgres", "postgres", Some(&ann)), "\"trust\" authentication failed for user \"postgres\"");
    let unknown = come("ann", "postgres", Some(&foreign));
    assert!(unknown.contains("alert unknown ca") || unknown.contains("SSL error"), "{unknown}");
    assert!(rig.metrics.auth_failures.with_label_values(&["certificate"]).get() >= 5);

    // Another authority from now on; then a file that is none, which changes nothing.
    let mut tls = authority.server();
    tls.client_ca = Some(stranger.path());
    tls.client_certificates = ClientCertificates::Verify;
    let with = |tls: &pgcutover::config::ListenTls| {
        let tls = tls.clone();
        move |config: &mut Config| config.listen.tls = Some(tls)
    };
    rig.try_reload(with(&tls)).expect("valid");
    assert_eq!(come("ann", "postgres", Some(&foreign)), "ann");
    tls.client_ca = Some(files.write("empty.crt", ""));
    let error = rig.try_reload(with(&tls)).expect_err("no certificate in it");
    assert!(error.contains("[listen] TLS: client CA") && error.contains("holds no PEM certificate"), "{error}");
    assert_eq!(come("ann", "postgres", Some(&foreign)), "ann");
    tls.client_ca = Some(stranger.path());
    tls.key = authority.server().key;
    let error = rig.try_reload(with(&tls)).expect_err("the key of another certificate");
    assert!(error.contains("[listen] TLS: certificate"), "{error}");
    // Without authorities there are rules that nobody could meet.
    let error = rig.try_reload(|config| config.listen.tls = Some(authority.server())).expect_err("no authorities");
    assert!(error.contains("pg_hba.conf:1: asks for a client certificate"), "{error}");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_shown_to_new_connections_and_watched() {
    let cluster = one_cluster("renewed");
    let authority = Authority::new();
    let first = authority.server_until(2031);
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.listen.tls = Some(first));
    let not_after = || rig.metrics.tls_certificate_not_after_seconds.get();
    assert_eq!(not_after(), 1_924_992_000);
    let conninfo = |authority: &Authority| {
        let file = authority.path();
        let port = rig.port;
        format!(
            "host=localhost port={port} user=postgres dbname=postgres sslmode=verify-full sslrootcert={}",
            file.display()
        )
    };
    let answer = psql(&conninfo(&authority), "", "SELECT 1");
    assert_eq!(answer, Ok("1".to_owned()));
    let other = Authority::new();
    rig.try_reload(|config| config.listen.tls = Some(other.server_until(2032))).expect("valid");
    assert_eq!(not_after(), 1_956_528_000);
    assert!(psql(&conninfo(&authority), "", "SELECT 1").is_err());
    assert_eq!(psql(&conninfo(&other), "", "SELECT 1"), Ok("1".to_owned()));
    rig.stop().await;
}
