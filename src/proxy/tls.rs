//! TLS towards clients: certificate, protocol versions, ALPN, client certificates.
//!
//! Everything is read into one [`ServerTls`], which a reload replaces as a whole: connections that stand keep what they
//! were made with, and a broken file changes nothing. Files are named in errors; what is in them never is.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion, version};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::certificate::{self, ClientCertificate};
use crate::config::{ClientCertificates, ListenTls, TlsVersion};

/// The protocol's registered name. A client that offers names must offer this one; one that begins with TLS must
/// offer names, so that bytes meant for another kind of server are never taken for ours (ALPACA).
pub(super) const ALPN: &[u8] = b"postgresql";

/// What clients are shown, and what is asked of them.
pub(super) struct ServerTls {
    pub(super) acceptor: TlsAcceptor,
    /// Refuse clients on TCP that do not ask for TLS.
    pub(super) is_required: bool,
    /// What SCRAM-SHA-256-PLUS binds to; none: it is not offered.
    pub(super) end_point: Option<Arc<[u8]>>,
    /// End of the certificate's validity, in seconds since 1970.
    pub(super) not_after: Option<i64>,
    /// Seed of what must stay the same over restarts and be known to nobody: derived from the private key.
    pub(super) seed: [u8; 32],
}

/// What a TLS connection says of itself once it stands.
#[derive(Clone, Debug, Default)]
pub(super) struct Secured {
    /// See [`ServerTls::end_point`].
    pub(super) end_point: Option<Arc<[u8]>>,
    /// Given and checked, if any.
    pub(super) certificate: Option<ClientCertificate>,
    /// Whether ALPN agreed on [`ALPN`].
    pub(super) alpn: bool,
}

impl ServerTls {
    /// Reads the files.
    pub(super) fn load(tls: &ListenTls) -> Result<Self, String> {
        let chain = certificates("certificate", &tls.certificate)?;
        let key =
            PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| format!("key {}: {error}", tls.key.display()))?;
        let seed = seed(key.secret_der());
        let provider = Arc::new(ring::default_provider());
        let (end_point, not_after) =
            chain.first().map_or((None, None), |own| (certificate::end_point(own), certificate::not_after(own)));
        if end_point.is_none() {
            tracing::info!(
                certificate = %tls.certificate.display(),
                "SCRAM-SHA-256-PLUS is not offered: the signature of the certificate has no hash to bind with"
            );
        }
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions(tls.min_version))
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(client_verifier(tls, provider)?)
            .with_single_cert(chain, key)
            .map_err(|error| {
                format!("certificate {} and key {}: {error}", tls.certificate.display(), tls.key.display())
            })?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // As PostgreSQL: no client resumes a session, and a certificate is checked at every connection.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            is_required: tls.required,
            end_point: end_point.map(Arc::from),
            not_after,
            seed,
        })
    }

    /// What the handshake that has just ended says.
    pub(super) fn facts<S>(&self, stream: &TlsStream<S>) -> Secured {
        let (_, connection) = stream.get_ref();
        let own = connection.peer_certificates().and_then(<[_]>::first);
        Secured {
            end_point: self.end_point.clone(),
            certificate: own.map(|der| ClientCertificate::read(der)),
            alpn: connection.alpn_protocol() == Some(ALPN),
        }
    }
}

fn certificates(what: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| format!("{what} {}: {error}", path.display()))?;
    if read.is_empty() {
        return Err(format!("{what} {}: holds no PEM certificate", path.display()));
    }
    Ok(read)
}

/// Both versions.
static FROM_1_2: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
/// The newer one.
static FROM_1_3: [&SupportedProtocolVersion; 1] = [&version::TLS13];

fn versions(min_version: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    match min_version {
        TlsVersion::Tls12 => &FROM_1_2,
        TlsVersion::Tls13 => &FROM_1_3,
    }
}

fn client_verifier(tls: &ListenTls, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let (Some(path), true) = (&tls.client_ca, tls.client_certificates != ClientCertificates::Off) else {
        return Ok(WebPkiClientVerifier::no_client_auth());
    };
    let mut roots = RootCertStore::empty();
    for root in certificates("client CA", path)? {
        roots.add(root).map_err(|error| format!("client CA {}: {error}", path.display()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = match tls.client_certificates {
        ClientCertificates::Require => builder,
        ClientCertificates::Verify | ClientCertificates::Off => builder.allow_unauthenticated(),
    };
    builder.build().map_err(|error| format!("client CA {}: {error}", path.display()))
}

fn seed(private_key: &[u8]) -> [u8; 32] {
    use hmac::Mac as _;
    let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(private_key).expect("HMAC takes keys of any length");
    mac.update(b"pgcutover mock authentication");
    mac.finalize().into_bytes().into()
}
