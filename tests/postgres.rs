//! The connection layer against real servers: login, TLS, control sessions, COPY, pipelines.

#[path = "postgres/copy.rs"]
mod copy;
mod support;

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use hmac::{Hmac, Mac as _};
use pgcutover::config::{Secret, Server, SslMode};
use pgcutover::demo::cluster::{Cluster, ClusterAuth, ClusterOptions, ClusterTls};
use pgcutover::postgres::{Connector, Credential, InstanceId, Login, Pipeline, PipelineError, RawConnection, RawError};
use support::{cluster_options, connect, connect_with, installations, one_cluster, server, wait_for};

fn connector(server: &Server) -> Connector {
    Connector::new(server, "source", &InstanceId::random()).expect("certificates are readable")
}

async fn raw(cluster: &Cluster) -> RawConnection {
    let connector = connector(&server(cluster));
    connector.raw(&connector.own_login("postgres", "test")).await.expect("logs in")
}

/// A cluster of the newest installation that can do what is asked: some are built without TLS.
fn cluster_with(change: impl Fn(ClusterOptions) -> ClusterOptions) -> Cluster {
    let found = installations();
    let mut failure = None;
    for installed in found.all().iter().rev().filter(|installed| installed.has_client_tools()) {
        match Cluster::start(change(cluster_options(installed, "postgres"))) {
            Ok(cluster) => return cluster,
            Err(error) if error.to_string().contains("SSL is not supported") => failure = Some(error),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no installation can do it: {failure:?}");
}

async fn setting(client: &tokio_postgres::Client, name: &str) -> String {
    let row = client.query_one("SELECT pg_catalog.current_setting($1)", &[&name]).await.expect("a known setting");
    row.get(0)
}

/// Every installed major takes the startup packet, and what a role could have set to our harm does not count.
#[tokio::test]
async fn own_sessions_keep_their_settings_on_every_major() {
    for installation in installations().all() {
        let cluster = Cluster::start(cluster_options(installation, "settings")).expect("starts");
        let admin = connect(&cluster, "postgres").await;
        let mut harm = vec![
            ("default_transaction_read_only", "on", "off"),
            ("statement_timeout", "1ms", "0"),
            ("lock_timeout", "1ms", "0"),
            ("idle_in_transaction_session_timeout", "1ms", "0"),
            ("synchronous_commit", "off", "on"),
            ("row_security", "on", "off"),
            ("search_path", "public", "pg_catalog"),
            ("\"DateStyle\"", "German", "ISO, YMD"),
            ("\"IntervalStyle\"", "iso_8601", "postgres"),
            ("extra_float_digits", "-5", "3"),
            ("bytea_output", "escape", "hex"),
            ("\"TimeZone\"", "Asia/Tokyo", "UTC"),
            ("default_transaction_isolation", "serializable", "read committed"),
            // What the kernel has for this connection.
            ("tcp_keepalives_idle", "7200", "15"),
            ("tcp_keepalives_interval", "75", "5"),
            ("tcp_keepalives_count", "9", "3"),
        ];
        if installation.major >= 14 {
            harm.push(("idle_session_timeout", "1h", "0"));
        }
        if installation.major >= 17 {
            harm.push(("transaction_timeout", "1h", "0"));
        }
        admin.batch_execute("CREATE ROLE victim SUPERUSER LOGIN").await.expect("created");
        for (name, value, _) in &harm {
            admin.batch_execute(&format!("ALTER ROLE victim SET {name} = '{value}'")).await.expect("altered");
        }
        let mut server = server(&cluster);
        server.user = "victim".to_owned();
        let connector = connector(&server);
        let control = connector.control("postgres", "test").await.expect("logs in");
        assert_eq!(control.version_num() / 10_000, u32::from(installation.major));
        let mut raw = connector.raw(&connector.own_login("postgres", "test")).await.expect("logs in");
        for (name, _, ours) in &harm {
            let name = name.trim_matches('"');
            assert_eq!(setting(&control, name).await, *ours, "{name} on {}", installation.major);
            let rows = raw.simple_query(&format!("SHOW \"{name}\"")).await.expect("known");
            assert_eq!(rows[0][0].as_deref(), Some(*ours), "{name} on {}", installation.major);
        }
        let name = setting(&control, "application_name").await;
        assert_eq!(name, connector.instance().application_name("test"));
        let row = control.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await.expect("answers");
        assert_eq!(row.get::<_, i32>(0), control.pid());
        control.close().await;
        raw.terminate().await.expect("ends");
    }
}

/// ClientKey and ServerKey of a role, from its password and the verifier that the server holds (RFC 5802).
async fn scram_keys(admin: &tokio_postgres::Client, role: &str, password: &str) -> Credential {
    let row = admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = $1", &[&role]).await.expect("a role");
    let verifier: String = row.get(0);
    let mut parts = verifier.split(['$', ':']);
    let (_, iterations, salt) = (parts.next(), parts.next().expect("iterations"), parts.next().expect("salt"));
    let salt = base64::engine::general_purpose::STANDARD.decode(salt).expect("base64");
    let hmac = |key: &[u8], message: &[u8]| -> [u8; 32] {
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(key).expect("any length");
        mac.update(message);
        mac.finalize().into_bytes().into()
    };
    let mut block = hmac(password.as_bytes(), &[&salt[..], &[0, 0, 0, 1]].concat());
    let mut salted = block;
    for _ in 1..iterations.parse::<u32>().expect("a number") {
        block = hmac(password.as_bytes(), &block);
        salted.iter_mut().zip(block).for_each(|(sum, byte)| *sum ^= byte);
    }
    Credential::ScramKeys { client_key: hmac(&salted, b"Client Key"), server_key: hmac(&salted, b"Server Key") }
}

fn login(user: &str, credential: Credential) -> Login {
    Login { user: user.to_owned(), database: "postgres".to_owned(), credential, parameters: Vec::new() }
}

/// Each credential against each method that it can and cannot answer.
#[tokio::test]
async fn every_method_of_login() {
    let lines = [
        "host all postgres all scram-sha-256",
        "host all scram all scram-sha-256",
        "host all clear all password",
        "host all md5 all md5",
        "host all trusted all trust",
    ];
    let cluster = cluster_with(|options| {
        let lines = lines.map(str::to_owned).to_vec();
        options.auth(ClusterAuth::Hba { password: "päss wörd".to_owned(), lines })
    });
    let admin = connect_with(&cluster.config("postgres")).await;
    admin
        .batch_execute(
            "CREATE ROLE scram LOGIN PASSWORD 'secret'; CREATE ROLE clear LOGIN PASSWORD 'secret';
             CREATE ROLE trusted LOGIN; CREATE ROLE rejected LOGIN;
             SET password_encryption = md5; CREATE ROLE md5 LOGIN PASSWORD 'secret'",
        )
        .await
        .expect("roles are made");
    let password = |text: &str| Credential::Password(Secret::new(text));
    let keys = || Credential::ScramKeys { client_key: [1; 32], server_key: [2; 32] };
    let row = admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'md5'", &[]).await.expect("a role");
    let md5_verifier = || Credential::Md5Hash(Secret::new(row.get::<_, String>(0)));
    let connector = connector(&server(&cluster));

    connector.control("postgres", "test").await.expect("the configured user logs in");
    let accepted = [
        ("scram", password("secret")),
        ("scram", scram_keys(&admin, "scram", "secret").await),
        ("clear", password("secret")),
        ("md5", password("secret")),
        ("md5", md5_verifier()),
        ("trusted", Credential::None),
    ];
    for (user, credential) in accepted {
        let mut raw = connector.raw(&login(user, credential)).await.unwrap_or_else(|error| panic!("{user}: {error}"));
        let rows = raw.simple_query("SELECT current_user").await.expect("answers");
        assert_eq!(rows[0][0].as_deref(), Some(user));
        assert!(raw.pid > 0 && raw.cancel_key.len() == 4 && raw.transaction_status() == b'I');
    }

    let refused = [
        ("scram", password("wrong"), "password authentication failed", Some("28P01")),
        ("scram", keys(), "password authentication failed", Some("28P01")),
        ("md5", password("wrong"), "check password, password_file or password_env of [source]", Some("28P01")),
        ("clear", password("wrong"), "password authentication failed", Some("28P01")),
        ("scram", Credential::None, "a login without a password cannot answer", None),
        ("scram", md5_verifier(), "an md5 verifier cannot answer", None),
        ("md5", keys(), "a SCRAM key cannot answer", None),
        ("clear", keys(), "asks for a password in clear text", None),
        ("rejected", Credential::None, "pg_hba.conf", Some("28000")),
    ];
    for (user, credential, words, sqlstate) in refused {
        let error = connector.raw(&login(user, credential)).await.expect_err(user);
        let text = error.to_string();
        assert!(text.contains(words), "{user}: {text}");
        assert!(text.starts_with(&format!("source 127.0.0.1:{}: ", cluster.port())), "{text}");
        assert!(!text.contains("secret") && !text.contains("wrong"), "{text}");
        assert_eq!(error.sqlstate(), sqlstate, "{text}");
    }
    let mut no_password = server(&cluster);
    no_password.password = None;
    let error = self::connector(&no_password).control("postgres", "test").await.expect_err("no password");
    assert!(error.to_string().contains("asks for a password"), "{error}");
}

/// A certificate authority, and what it signs.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("signs itself");
        Self { certificate, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Certificate and key, PEM, for `names`, with the common name `common`.
    fn sign(&self, common: &str, names: &[&str]) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).expect("valid names");
        params.distinguished_name.push(rcgen::DnType::CommonName, common);
        let certificate = params.signed_by(&key, &self.issuer).expect("signs");
        (certificate.pem(), key.serialize_pem())
    }
}

/// A directory for certificates that libpq and we read from files.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).expect("written");
        path
    }
}

/// Every sslmode against a server whose certificate is good, has another name, or comes from elsewhere.
#[tokio::test]
async fn sslmode_means_what_libpq_means() {
    let files = Files::new();
    let (ours, foreign) = (Authority::new("ours"), Authority::new("foreign"));
    let root = files.write("root.crt", &ours.certificate.pem());
    let foreign_root = files.write("foreign.crt", &foreign.certificate.pem());
    let tls_cluster = |names: &[&str]| {
        let (certificate_pem, key_pem) = ours.sign("server", names);
        let tls = ClusterTls { certificate_pem, key_pem, client_ca_pem: None };
        cluster_with(|options| options.tls(tls.clone()))
    };
    let (good, misnamed, plain) =
        (tls_cluster(&["127.0.0.1"]), tls_cluster(&["elsewhere.example"]), one_cluster("plain"));

    let attempt = async |cluster: &Cluster, mode: SslMode, root: Option<&PathBuf>| {
        let mut server = server(cluster);
        server.sslmode = mode;
        server.sslrootcert = root.cloned();
        let connector = connector(&server);
        let raw = connector.raw(&connector.own_login("postgres", "tls")).await;
        let control = connector.control("postgres", "tls").await;
        assert_eq!(raw.is_ok(), control.is_ok(), "both kinds of session agree");
        match (raw, control) {
            (Ok(raw), Ok(control)) => {
                let sql = "SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()";
                let encrypted: bool = control.query_one(sql, &[]).await.expect("answers").get(0);
                assert_eq!(raw.stream.is_private(), encrypted);
                Ok(encrypted)
            }
            (Err(error), _) => Err(error.to_string()),
            (Ok(_), Err(_)) => unreachable!("compared above"),
        }
    };
    assert_eq!(attempt(&good, SslMode::Disable, None).await, Ok(false));
    assert_eq!(attempt(&good, SslMode::Prefer, None).await, Ok(true));
    assert_eq!(attempt(&good, SslMode::Require, None).await, Ok(true));
    assert_eq!(attempt(&good, SslMode::VerifyCa, Some(&root)).await, Ok(true));
    assert_eq!(attempt(&good, SslMode::VerifyFull, Some(&root)).await, Ok(true));
    assert_eq!(attempt(&misnamed, SslMode::VerifyCa, Some(&root)).await, Ok(true));
    assert_eq!(attempt(&plain, SslMode::Prefer, None).await, Ok(false));
    // libpq too goes on in the clear when prefer cannot verify.
    assert_eq!(attempt(&good, SslMode::Prefer, Some(&foreign_root)).await, Ok(false));
    for (cluster, mode, root, words) in [
        (&misnamed, SslMode::VerifyFull, Some(&root), "negotiating TLS"),
        (&good, SslMode::Require, Some(&foreign_root), "negotiating TLS"),
        (&good, SslMode::VerifyCa, Some(&foreign_root), "negotiating TLS"),
        (&plain, SslMode::Require, None, "the server does not offer TLS"),
    ] {
        let error = attempt(cluster, mode, root).await.expect_err("refused");
        assert!(error.contains(words), "{error}");
    }

    // A server whose own certificate is the trusted one.
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate_pem = params.self_signed(&key).expect("signs itself").pem();
    let itself = files.write("self.crt", &certificate_pem);
    let key_pem = key.serialize_pem();
    let tls = ClusterTls { certificate_pem, key_pem, client_ca_pem: None };
    let alone = cluster_with(|options| options.tls(tls.clone()));
    assert_eq!(attempt(&alone, SslMode::VerifyFull, Some(&itself)).await, Ok(true));
    assert!(attempt(&alone, SslMode::VerifyFull, Some(&root)).await.is_err());
}

#[tokio::test]
async fn client_certificates_log_in_and_prefer_avoids_tls_where_the_server_does() {
    let files = Files::new();
    let ours = Authority::new("ours");
    let (certificate_pem, key_pem) = ours.sign("server", &["127.0.0.1"]);
    let tls = ClusterTls { certificate_pem, key_pem, client_ca_pem: Some(ours.certificate.pem()) };
    let lines = ["hostssl all certified all cert", "hostnossl all plain all trust", "host all postgres all trust"];
    let auth = ClusterAuth::Hba { password: "secret".to_owned(), lines: lines.map(str::to_owned).to_vec() };
    let cluster = cluster_with(|options| options.tls(tls.clone()).auth(auth.clone()));
    let admin = connect_with(&cluster.config("postgres")).await;
    admin.batch_execute("CREATE ROLE certified LOGIN; CREATE ROLE plain LOGIN").await.expect("made");

    let (certificate, key) = ours.sign("certified", &[]);
    let mut server = server(&cluster);
    server.password = None;
    server.sslmode = SslMode::VerifyFull;
    server.sslrootcert = Some(files.write("root.crt", &ours.certificate.pem()));
    server.user = "certified".to_owned();
    assert!(connector(&server).control("postgres", "test").await.is_err(), "no certificate, no login");
    server.client_certificate = Some((files.write("client.crt", &certificate), files.write("client.key", &key)));
    connector(&server).control("postgres", "test").await.expect("logs in by certificate");

    // pg_hba.conf lets this role in without TLS only.
    server.user = "plain".to_owned();
    server.sslmode = SslMode::Prefer;
    let connector = connector(&server);
    connector.control("postgres", "test").await.expect("tries again in the clear");
    let raw = connector.raw(&connector.own_login("postgres", "test")).await.expect("tries again in the clear");
    assert!(!raw.stream.is_private());
}

/// A listener that answers each connection with the same bytes, or stays silent.
async fn fake_server(answer: Option<&'static [u8]>) -> (Server, tokio::task::JoinHandle<()>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut server = Server::new("127.0.0.1", listener.local_addr().expect("bound").port(), "postgres");
    server.sslmode = SslMode::Disable;
    // Whoever answers may take its time.
    server.connect_timeout = if answer.is_none() { Duration::from_millis(500) } else { support::PATIENCE };
    let task = tokio::spawn(async move {
        let mut silent = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut packet = [0; 1024];
            let _read = stream.read(&mut packet).await;
            match answer {
                Some(bytes) => {
                    let _written = stream.write_all(bytes).await;
                }
                None => silent.push(stream),
            }
        }
    });
    (server, task)
}

#[tokio::test]
async fn what_is_no_server_gives_an_error_that_says_so() {
    let cases: [(Option<&'static [u8]>, &str); 4] = [
        (None, "no answer within connect_timeout (500ms)"),
        (Some(b""), "the server closed the connection"),
        (Some(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "protocol violation by the source"),
        (Some(b"R\0\0\0\x08\0\0\0\x07"), "GSSAPI"),
    ];
    for (answer, words) in cases {
        let (server, task) = fake_server(answer).await;
        let connector = connector(&server);
        let error = connector.raw(&connector.own_login("postgres", "test")).await.expect_err("no server");
        assert!(error.to_string().contains(words), "{error}");
        assert!(connector.control("postgres", "test").await.is_err());
        task.abort();
    }
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let server = Server::new("127.0.0.1", closed.local_addr().expect("bound").port(), "postgres");
    drop(closed);
    let error = connector(&server).control("postgres", "test").await.expect_err("nobody listens");
    assert!(error.to_string().contains("Connection refused"), "{error}");
    let socket = Server::new("/nonexistent", 5432, "postgres");
    let error = connector(&socket).control("postgres", "test").await.expect_err("no such socket");
    assert!(error.to_string().contains("/nonexistent/.s.PGSQL.5432"), "{error}");
}

#[tokio::test]
async fn unix_sockets_serve_every_kind_of_session() {
    let cluster = one_cluster("unix");
    let host = cluster.socket_dir().display().to_string();
    let mut server = Server::new(host, cluster.port(), "postgres");
    server.sslmode = SslMode::Require;
    let connector = connector(&server);
    connector.control("postgres", "test").await.expect("sslmode is ignored on Unix sockets, as in libpq");
    let raw = connector.raw(&connector.own_login("postgres", "test")).await.expect("logs in");
    assert!(raw.stream.is_private());
    raw.terminate().await.expect("ends");
}

#[tokio::test]
async fn queries_leave_the_unnamed_statement_and_the_connection_usable() {
    let cluster = one_cluster("queries");
    let mut raw = raw(&cluster).await;
    // A client's unnamed statement: Parse, Sync.
    raw.send(b"P\0\0\0\x11\0SELECT 42\0\0\0S\0\0\0\x04").await.expect("sent");
    while raw.next_frame().await.expect("answered").tag != b'Z' {}
    let rows = raw.query_named("pgcutover", "SELECT $1::int + 1, $2::text, $1", &[Some("4"), None]).await;
    assert_eq!(rows.expect("answers"), [[Some("5".to_owned()), None, Some("4".to_owned())]]);
    for broken in ["SELECT 1/0", "SELEC"] {
        assert!(matches!(raw.query_named("pgcutover", broken, &[]).await, Err(RawError::Server { .. })));
    }
    // Bind, Execute of the unnamed statement: it is still there.
    raw.send(b"B\0\0\0\x0c\0\0\0\0\0\0\0\0E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04").await.expect("sent");
    let mut row = None;
    loop {
        let frame = raw.next_frame().await.expect("answered");
        match frame.tag {
            b'D' => row = Some(frame.body),
            b'Z' => break,
            b'E' => panic!("{}", String::from_utf8_lossy(&frame.body)),
            _ => {}
        }
    }
    assert_eq!(row.as_deref(), Some(&b"\0\x01\0\0\0\x0242"[..]));

    let error = raw.simple_query("SELECT 1; SELECT 1/0; SELECT 2").await.expect_err("divides by zero");
    assert_eq!(error.sqlstate(), Some("22012"));
    assert_eq!(raw.simple_query("SELECT 1; SELECT 2").await.expect("usable").len(), 2);
    assert!(raw.simple_query("COPY pg_class FROM STDIN").await.is_err(), "no data for a control query");

    // Failed transactions, notifications and changed parameters are seen.
    assert!(raw.simple_query("BEGIN; SELECT 1/0").await.is_err());
    assert_eq!(raw.transaction_status(), b'E');
    assert!(raw.query_named("pgcutover", "SELECT 1", &[]).await.is_err());
    raw.simple_query("ROLLBACK; LISTEN c; NOTIFY c, 'payload'; SET DateStyle = German").await.expect("usable");
    assert_eq!(raw.query_named("pgcutover", "SELECT 1", &[]).await.expect("closed after errors").len(), 1);
    assert_eq!(raw.take_notifications().len(), 1);
    assert_eq!(raw.parameter("DateStyle"), Some("German, DMY"));

    // A query dropped half-way must not have its answer taken for that of the next.
    let dropped = tokio::time::timeout(Duration::from_millis(50), raw.simple_query("SELECT pg_sleep(600)")).await;
    assert!(dropped.is_err());
    let error = raw.simple_query("SELECT 1").await.expect_err("refused");
    assert!(matches!(error, RawError::Io { .. }), "{error}");
}

#[tokio::test]
async fn cancel_reaches_the_right_backend() {
    let cluster = one_cluster("cancel");
    let connector = connector(&server(&cluster));
    let mut raw = connector.raw(&connector.own_login("postgres", "test")).await.expect("logs in");
    let admin = connect(&cluster, "postgres").await;
    let (pid, key) = (raw.pid, raw.cancel_key.clone());
    let sleeper = tokio::spawn(async move { raw.simple_query("SELECT pg_sleep(600)").await });
    wait_for("the query to run", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
        admin.query_one(sql, &[&pid]).await.expect("answers").get::<_, i64>(0) == 1
    })
    .await;
    connector.cancel(pid, &key).await.expect("sent");
    let error = sleeper.await.expect("no panic").expect_err("cancelled");
    assert_eq!(error.sqlstate(), Some("57014"));
}

#[tokio::test]
async fn a_pipeline_applies_thousands_of_rows_in_one_transaction() {
    let cluster = one_cluster("pipeline");
    let mut raw = raw(&cluster).await;
    raw.simple_query(
        "CREATE TABLE public.t (n int PRIMARY KEY, v text); CREATE TABLE public.progress (lane int, lsn pg_lsn);
         INSERT INTO public.progress VALUES (1, '0/0')",
    )
    .await
    .expect("made");
    let mut pipeline = Pipeline::new();
    pipeline.parse("ins", "INSERT INTO public.t VALUES ($1, $2)", &[]).expect("encodes");
    pipeline.parse("upd", "UPDATE public.t SET v = $1 WHERE n <= $2", &[]).expect("encodes");
    pipeline.describe("upd").expect("encodes");
    pipeline.execute_sql("BEGIN").expect("encodes");
    for n in 0..5000 {
        let n = n.to_string();
        let value = (n.len() > 1).then_some(n.as_bytes());
        pipeline.execute("ins", [Some(n.as_bytes()), value]).expect("encodes");
    }
    pipeline.execute("upd", [Some(&b"x"[..]), Some(b"9")]).expect("encodes");
    pipeline.execute_sql("UPDATE public.progress SET lsn = '0/2A' WHERE lane = 1").expect("encodes");
    pipeline.commit();
    let outcome = raw.run(&mut pipeline).await.expect("applies");
    assert_eq!(outcome.affected.len(), 5004);
    assert_eq!(outcome.affected[0], 0, "BEGIN counts nothing");
    assert!(outcome.affected[1..=5000].iter().all(|rows| *rows == 1));
    assert_eq!(outcome.affected[5001..], [10, 1, 0]);
    assert_eq!(outcome.parameter_types, [[25, 23]]);
    assert!(pipeline.is_empty() && pipeline.encoded_bytes() == 0);
    let rows = raw.simple_query("SELECT count(*), count(v), (SELECT lsn FROM public.progress) FROM public.t").await;
    let text = |value: &str| Some(value.to_owned());
    assert_eq!(rows.expect("answers"), [[text("5000"), text("5000"), text("0/2A")]]);

    // Prepared statements outlive the run; the first error names its step, and what follows did not run.
    pipeline.execute_sql("BEGIN").expect("encodes");
    pipeline.execute("ins", [Some(&b"9000"[..]), None]).expect("encodes");
    let culprit = pipeline.execute("ins", [Some(&b"1"[..]), None]).expect("encodes");
    pipeline.execute("ins", [Some(&b"9001"[..]), None]).expect("encodes");
    pipeline.commit();
    match raw.run(&mut pipeline).await {
        Err(PipelineError::Step { step, error }) => assert_eq!((step, error.sqlstate()), (culprit, Some("23505"))),
        other => panic!("{other:?}"),
    }
    assert_eq!(raw.transaction_status(), b'E');
    pipeline.commit();
    assert!(matches!(raw.run(&mut pipeline).await, Err(PipelineError::RolledBack)), "not taken for a commit");
    let rows = raw.simple_query("SELECT count(*) FROM public.t WHERE n >= 9000").await.expect("usable");
    assert_eq!(rows[0][0].as_deref(), Some("0"));
    pipeline.close("ins").expect("encodes");
    raw.run(&mut pipeline).await.expect("closes");
    assert!(matches!(raw.simple_query("EXECUTE ins(1, 'x')").await, Err(RawError::Server { .. })));
}

/// Megabytes both ways: a side that only wrote would wait for ever for the other, which waits for it.
#[tokio::test]
async fn a_pipeline_reads_while_it_writes() {
    let cluster = one_cluster("deadlock");
    let mut raw = raw(&cluster).await;
    let mut pipeline = Pipeline::new();
    pipeline.parse("echo", "SELECT $1::text", &[]).expect("encodes");
    let large = vec![b'x'; 1_000_000];
    for _ in 0..40 {
        pipeline.execute("echo", [Some(&large[..])]).expect("encodes");
    }
    let outcome = tokio::time::timeout(support::PATIENCE, raw.run(&mut pipeline)).await.expect("no deadlock");
    assert_eq!(outcome.expect("echoes").affected, vec![1; 40]);
}

/// The server's last words are worth more than the lost link.
#[tokio::test]
async fn a_backend_that_is_terminated_says_why() {
    let cluster = one_cluster("terminated");
    let mut raw = raw(&cluster).await;
    let admin = connect(&cluster, "postgres").await;
    admin.execute("SELECT pg_terminate_backend($1)", &[&raw.pid]).await.expect("terminated");
    let mut pipeline = Pipeline::new();
    pipeline.execute_sql("SELECT 1").expect("encodes");
    match raw.run(&mut pipeline).await {
        Err(PipelineError::Raw(RawError::Server { code, .. })) => assert_eq!(code, "57P01"),
        Err(PipelineError::Raw(RawError::Io { .. })) => panic!("the reason was lost"),
        other => panic!("{other:?}"),
    }
}
