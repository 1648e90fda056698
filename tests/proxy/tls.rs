//! What comes before a client says who it is: TLS in every way it is begun, channel binding, and balancers in front.

use std::path::PathBuf;
use std::sync::Arc;

use pgcutover::config::{AuthMethod, ClientCertificates, ListenTls, Network, TlsVersion};
use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use pgcutover::wire::error::field;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};

use crate::rig::{Rig, server};
use crate::support::{installations, one_cluster, two_clusters_with};
use crate::wire_client::{WireClient, frame, query, rows};

const SSL_REQUEST: u32 = 1234 << 16 | 5679;
const GSSENC_REQUEST: u32 = 1234 << 16 | 5680;

/// An authority with certificates of its own making, in files.
pub struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("made");
        let mut parameters = CertificateParams::new(Vec::new()).expect("valid");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, "test authority");
        let pem = parameters.self_signed(&key).expect("signed").pem();
        let directory = tempfile::tempdir().expect("made");
        std::fs::write(directory.path().join("ca.crt"), &pem).expect("written");
        Self { directory, issuer: Issuer::new(parameters, key), pem }
    }

    /// Its own certificate.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// Certificate and key of a client that is called `name`, in files that only their owner can read.
    pub fn client(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (PathBuf, PathBuf) {
        self.issue(name, ExtendedKeyUsagePurpose::ClientAuth, change)
    }

    /// What a server on `localhost` is configured with.
    pub fn server(&self) -> ListenTls {
        let (certificate, key) = self.issue("localhost", ExtendedKeyUsagePurpose::ServerAuth, |_| {});
        ListenTls::new(certificate, key)
    }

    /// The same, with a certificate that ends with the year before.
    pub fn server_until(&self, year: i32) -> ListenTls {
        let (certificate, key) = self.issue("localhost", ExtendedKeyUsagePurpose::ServerAuth, |parameters| {
            parameters.not_after = rcgen::date_time_ymd(year, 1, 1);
        });
        ListenTls::new(certificate, key)
    }

    fn issue(
        &self,
        name: &str,
        usage: ExtendedKeyUsagePurpose,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (PathBuf, PathBuf) {
        use std::os::unix::fs::PermissionsExt as _;
        let key = KeyPair::generate().expect("made");
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned()]).expect("valid");
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.extended_key_usages = vec![usage];
        change(&mut parameters);
        let certificate = parameters.signed_by(&key, &self.issuer).expect("signed");
        let number = rand::random::<u32>();
        let paths = ["crt", "key"].map(|kind| self.directory.path().join(format!("{number}.{kind}")));
        std::fs::write(&paths[0], certificate.pem()).expect("written");
        std::fs::write(&paths[1], key.serialize_pem()).expect("written");
        std::fs::set_permissions(&paths[1], std::fs::Permissions::from_mode(0o600)).expect("set");
        let [certificate, key] = paths;
        (certificate, key)
    }

    /// A client's side that believes this authority.
    pub fn connector(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        alpn: &[&str],
        own: Option<&(PathBuf, PathBuf)>,
    ) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("PEM")).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(versions).expect("versions").with_root_certificates(roots);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_file(certificate).expect("PEM")];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).expect("PEM")).expect("fits")
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }
}

const BOTH: &[&SupportedProtocolVersion] = &[&version::TLS13, &version::TLS12];

/// TLS from the first byte on, or behind what `before` sends.
async fn begin_tls(
    port: u16,
    connector: TlsConnector,
    before: &[u8],
) -> std::io::Result<WireClient<TlsStream<TcpStream>>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(before).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    Ok(WireClient { stream: connector.connect(name, stream).await?, key: None })
}

fn request(code: u32) -> Vec<u8> {
    [8u32.to_be_bytes(), code.to_be_bytes()].concat()
}

/// One cluster that trusts everyone, and a proxy with TLS that does so too.
fn trusting(authority: &Authority, change: impl FnOnce(&mut ListenTls)) -> (Cluster, Rig) {
    let cluster = one_cluster("tls");
    let mut tls = authority.server();
    change(&mut tls);
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.listen.tls = Some(tls));
    (cluster, rig)
}

/// `postgres` with a password, on one server.
fn with_passwords(authority: &Authority) -> (Cluster, Cluster, Rig) {
    let auth = ClusterAuth::Scram { password: "secret".to_owned() };
    let (source, target) =
        two_clusters_with(|options| options.auth(auth.clone()), |options| options.auth(auth.clone()));
    let tls = authority.server();
    let rig = Rig::start(server(&source), server(&target), |config| {
        config.auth.method = AuthMethod::Auto;
        config.listen.tls = Some(tls);
    });
    (source, target, rig)
}

/// What `psql` prints, or what it complains of. Some are built without TLS: the newest that speaks it is taken.
pub fn psql(conninfo: &str, password: &str, sql: &str) -> Result<String, String> {
    let found = installations();
    for program in found.all().iter().rev().filter_map(|installation| installation.program("psql")) {
        let mut command = std::process::Command::new(program);
        command.env("PGPASSWORD", password).args(["-X", "-A", "-t", "-c", sql]).arg(conninfo);
        let output = command.output().expect("psql runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let complaint = text(&output.stderr);
        if !complaint.contains("SSL support is not compiled in") {
            return if output.status.success() { Ok(text(&output.stdout)) } else { Err(complaint) };
        }
    }
    panic!("no psql here speaks TLS: install PostgreSQL's client of your distribution")
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_required_and_not_to_be_injected_into() {
    let authority = Authority::new();
    let (_cluster, rig) = trusting(&authority, |tls| tls.required = true);
    let mut plain = WireClient::connect(rig.port).await;
    plain.start(&[("user", "ann")]).await;
    assert_eq!(plain.next().await.expect("an error").code(), "28000");
    // A startup packet in the clear right behind the request must not be taken for an encrypted one.
    for (code, words) in [
        (SSL_REQUEST, "received unencrypted data after SSL request"),
        (GSSENC_REQUEST, "received unencrypted data after GSSAPI encryption request"),
    ] {
        let mut injected = WireClient::connect(rig.port).await;
        injected.send(&[request(code), vec![0; 20]].concat()).await;
        let error = injected.next().await.expect("an error");
        assert_eq!((error.code().as_str(), field(&error.body, b'M')), ("08P01", Some(words.as_bytes())));
    }
    // psql speaks TLS through libpq.
    let conninfo = format!("host=localhost port={} user=postgres dbname=postgres sslmode=verify-full", rig.port);
    let conninfo = format!("{conninfo} sslrootcert={}", authority.path().display());
    let answer = psql(&conninfo, "", "SELECT repeat('x', 300000), 'end'").expect("comes in");
    assert_eq!(answer.len(), 300_000 + "|end".len());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_for_encryption_is_answered_once() {
    let authority = Authority::new();
    let (_cluster, rig) = trusting(&authority, |_| {});
    let mut client = WireClient::connect(rig.port).await;
    client.send(&request(GSSENC_REQUEST)).await;
    assert_eq!(client.stream.read_u8().await.expect("an answer"), b'N');
    client.send(&request(GSSENC_REQUEST)).await;
    let error = client.next().await.expect("an error");
    let words = "unsupported frontend protocol 1234.5680: server supports 3.0 to 3.0";
    assert_eq!((error.code().as_str(), field(&error.body, b'M')), ("0A000", Some(words.as_bytes())));
    assert_eq!(client.next().await, None, "and the connection is closed");

    // Inside of TLS neither is answered.
    for code in [SSL_REQUEST, GSSENC_REQUEST] {
        let connector = authority.connector(BOTH, &["postgresql"], None);
        let mut client = begin_tls(rig.port, connector, &[]).await.expect("TLS");
        client.send(&request(code)).await;
        assert_eq!(client.next().await.expect("an error").code(), "0A000");
    }
    // A packet that says it is longer than any may be.
    let mut client = WireClient::connect(rig.port).await;
    client.send(&[10_001u32.to_be_bytes(), (3u32 << 16).to_be_bytes()].concat()).await;
    assert_eq!(client.next().await.expect("an error").code(), "08P01");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_can_begin_at_once_and_then_names_its_protocol() {
    let authority = Authority::new();
    let (_cluster, rig) = trusting(&authority, |tls| tls.required = true);
    let connector = authority.connector(BOTH, &["postgresql"], None);
    let mut client = begin_tls(rig.port, connector, &[]).await.expect("TLS");
    client.start(&[("user", "postgres")]).await;
    client.until_ready().await;
    client.send(&query("SELECT 7")).await;
    assert_eq!(rows(&client.until_ready().await), ["7"]);
    assert!(rig.sessions.list()[0].tls);

    let connector = authority.connector(BOTH, &[], None);
    if let Ok(mut client) = begin_tls(rig.port, connector, &[]).await {
        client.start(&[("user", "postgres")]).await;
        assert_eq!(client.next().await, None, "closed without a word");
    }
    let connector = authority.connector(BOTH, &["http/1.1"], None);
    let mut client = begin_tls(rig.port, connector, &[]).await;
    let error = match &mut client {
        Ok(client) => client.stream.read_u8().await.expect_err("refused").to_string(),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("NoApplicationProtocol"), "{error}");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn older_versions_than_the_oldest_are_refused() {
    let authority = Authority::new();
    let (_cluster, rig) = trusting(&authority, |tls| tls.min_version = TlsVersion::Tls13);
    let begin = |version: &'static SupportedProtocolVersion| {
        begin_tls(rig.port, authority.connector(&[version], &["postgresql"], None), &[])
    };
    let old = begin(&version::TLS12).await.err().expect("refused").to_string();
    assert!(old.contains("ProtocolVersion"), "{old}");
    assert!(begin(&version::TLS13).await.is_ok());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_bound_to_the_certificate_that_the_client_sees() {
    let authority = Authority::new();
    let (_source, _target, rig) = with_passwords(&authority);
    let conninfo = format!("host=localhost port={} user=postgres dbname=postgres", rig.port);
    let psql = |more: &str, password| psql(&format!("{conninfo} {more}"), password, "SELECT 1");
    assert_eq!(psql("sslmode=require channel_binding=require", "secret"), Ok("1".to_owned()));
    assert_eq!(psql("sslmode=require channel_binding=disable", "secret"), Ok("1".to_owned()));
    assert_eq!(psql("sslmode=disable", "secret"), Ok("1".to_owned()));
    let wrong = psql("sslmode=require channel_binding=require", "wrong").expect_err("refused");
    assert!(wrong.contains("password authentication failed for user \"postgres\""), "{wrong}");

    // The list is PostgreSQL's, over TLS and in the clear.
    let mechanisms = |body: &[u8]| String::from_utf8_lossy(&body[4..]).replace('\0', " ");
    let mut plain = WireClient::connect(rig.port).await;
    plain.start(&[("user", "postgres")]).await;
    assert_eq!(mechanisms(&plain.next().await.expect("asked").body), "SCRAM-SHA-256  ");
    let say = async |mechanism: &str, first: &str| {
        let connector = authority.connector(BOTH, &["postgresql"], None);
        let mut client = begin_tls(rig.port, connector, &[]).await.expect("TLS");
        client.start(&[("user", "postgres")]).await;
        let asked = client.next().await.expect("asked");
        assert_eq!(mechanisms(&asked.body), "SCRAM-SHA-256-PLUS SCRAM-SHA-256  ");
        let length = (first.len() as u32).to_be_bytes();
        client.send(&frame(b'p', &[mechanism.as_bytes(), &[0], &length, first.as_bytes()].concat())).await;
        client.next().await.expect("an answer")
    };
    // Somebody has taken the better mechanism off the list that the client saw.
    let error = say("SCRAM-SHA-256", "y,,n=,r=abc").await;
    assert_eq!(error.code(), "28000");
    assert_eq!(field(&error.body, b'M'), Some(&b"SCRAM channel binding negotiation error"[..]));
    assert_eq!(say("SCRAM-SHA-256", "n,,n=,r=abc").await.tag, 'R');
    assert_eq!(say("SCRAM-SHA-256-PLUS", "n,,n=,r=abc").await.code(), "08P01");
    assert_eq!(say("SCRAM-SHA-256-PLUS", "p=tls-unique,,n=,r=abc").await.code(), "08P01");
    assert_eq!(say("SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,n=,r=abc").await.tag, 'R');
    assert_eq!(say("SCRAM-SHA-1", "n,,n=,r=abc").await.code(), "08P01");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_clients_are_checked_and_may_be_required() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let own = authority.client("ann", |_| {});
    let foreign = stranger.client("ann", |_| {});
    for (asked, without) in [(ClientCertificates::Verify, true), (ClientCertificates::Require, false)] {
        let (_cluster, rig) = trusting(&authority, |tls| {
            tls.client_ca = Some(authority.path());
            tls.client_certificates = asked;
        });
        let comes_in = async |own: Option<&(PathBuf, PathBuf)>| {
            let connector = authority.connector(BOTH, &["postgresql"], own);
            let Ok(mut client) = begin_tls(rig.port, connector, &[]).await else { return false };
            let startup = b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0";
            // With TLS 1.3 the refusal comes after the client's side of the handshake.
            client.stream.write_all(startup).await.is_ok() && client.next().await.is_some()
        };
        assert!(comes_in(Some(&own)).await, "{asked:?}");
        assert!(!comes_in(Some(&foreign)).await, "{asked:?}");
        assert_eq!(comes_in(None).await, without, "{asked:?}");
        rig.stop().await;
    }
}

/// A PROXY protocol header for a client at this IPv4 address.
pub fn header(command: u8, client: [u8; 4], port: u16) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([command, 0x11, 0, 12]);
    header.extend(client);
    header.extend([127, 0, 0, 1]);
    header.extend(port.to_be_bytes());
    header.extend(6432u16.to_be_bytes());
    header
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_tells_who_the_client_is() {
    let cluster = one_cluster("balancer");
    let authority = Authority::new();
    let tls = authority.server();
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.listen.tls = Some(tls);
        config.listen.proxy_protocol_from = vec![Network::parse("127.0.0.0/8").expect("valid")];
    });
    let shown = || rig.sessions.list().into_iter().map(|session| session.client_address).collect::<Vec<_>>();

    // Header and startup packet in one segment.
    let mut client = WireClient::connect(rig.port).await;
    client.send(&header(0x21, [10, 1, 2, 3], 4711)).await;
    client.start(&[("user", "postgres")]).await;
    client.until_ready().await;
    assert_eq!(shown(), ["10.1.2.3:4711"]);
    drop(client);
    rig.until_no_session().await;

    // In front of TLS that begins at once, and of TLS that is asked for.
    let connector = || authority.connector(BOTH, &["postgresql"], None);
    let mut client = begin_tls(rig.port, connector(), &header(0x21, [10, 1, 2, 4], 1)).await.expect("TLS");
    client.start(&[("user", "postgres")]).await;
    client.until_ready().await;
    assert_eq!(shown(), ["10.1.2.4:1"]);
    drop(client);
    let mut asking = WireClient::connect(rig.port).await;
    asking.send(&[header(0x21, [10, 1, 2, 5], 2), request(SSL_REQUEST)].concat()).await;
    assert_eq!(asking.stream.read_u8().await.expect("an answer"), b'S');
    drop(asking);

    // A health check of the balancer has its own address.
    rig.until_no_session().await;
    let mut local = WireClient::connect(rig.port).await;
    let port = local.stream.local_addr().expect("an address").port();
    local.send(&header(0x20, [10, 1, 2, 3], 4711)).await;
    local.start(&[("user", "postgres")]).await;
    local.until_ready().await;
    assert_eq!(shown(), [format!("127.0.0.1:{port}")]);

    // Without a header nobody comes in from there, nor with one that makes no sense.
    let mut bare = WireClient::connect(rig.port).await;
    bare.start(&[("user", "postgres"), ("application_name", "long enough")]).await;
    assert_eq!(bare.next().await, None);
    let mut wrong = WireClient::connect(rig.port).await;
    let mut bytes = header(0x21, [10, 1, 2, 3], 4711);
    bytes[14..16].copy_from_slice(&0xffffu16.to_be_bytes());
    wrong.send(&bytes).await;
    assert_eq!(wrong.next().await, None);
    rig.stop().await;

    // From anybody else a header is not believed.
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.listen.proxy_protocol_from = vec![Network::parse("10.0.0.0/8").expect("valid")];
    });
    let mut client = WireClient::connect(rig.port).await;
    client.send(&header(0x21, [10, 1, 2, 3], 4711)).await;
    assert_eq!(client.next().await.expect("an error").code(), "08P01");
    rig.stop().await;
}
