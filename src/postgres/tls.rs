//! TLS towards the two servers, with the meaning that libpq gives to `sslmode` (PostgreSQL documentation, "SSL
//! Support": "Protection Provided in Different Modes").
//!
//! `prefer` and `require` check nothing unless `sslrootcert` is given, `verify-ca` checks the chain, `verify-full` the
//! chain and the name. Only rustls with ring is used; a server that speaks nothing newer than TLS 1.1 is refused.
//!
//! Stricter than libpq where something is checked: certificates must be X.509 version 3, and their name must be in
//! subjectAltName (libpq falls back to the common name).

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    self, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use crate::config::{self, SslMode};

/// What `sslmode` asks of a server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// Nor its signature: with any certificate accepted, that would prove nothing, and rustls cannot read version 1,
    /// which is what PostgreSQL's own instructions make with OpenSSL before 3.2.
    Nothing,
    Chain,
    ChainAndName,
}

/// A TLS client for one server; none where `sslmode` or the kind of socket never uses TLS.
pub(super) fn connector(server: &config::Server) -> Result<Option<(TlsConnector, ServerName<'static>)>, String> {
    // libpq ignores sslmode on Unix sockets.
    if server.sslmode == SslMode::Disable || server.host.starts_with('/') {
        return Ok(None);
    }
    let check = match (server.sslmode, &server.sslrootcert) {
        (SslMode::Disable | SslMode::Prefer | SslMode::Require, None) => Check::Nothing,
        (SslMode::Disable | SslMode::Prefer | SslMode::Require | SslMode::VerifyCa, Some(_)) => Check::Chain,
        (SslMode::VerifyFull, Some(_)) => Check::ChainAndName,
        (SslMode::VerifyCa | SslMode::VerifyFull, None) => {
            return Err(
                "sslmode verify-ca and verify-full need sslrootcert, a file with the certificates to trust".to_owned()
            );
        }
    };
    let name = match ServerName::try_from(server.host.clone()) {
        Ok(name) => name,
        Err(_) if check == Check::ChainAndName => {
            return Err(format!("host {:?} is not a name that a certificate can be checked against", server.host));
        }
        // Not sent and not checked: an address never goes into the SNI extension.
        Err(_) => ServerName::from(std::net::IpAddr::from([0, 0, 0, 0])),
    };

    let provider = Arc::new(ring::default_provider());
    let roots = server.sslrootcert.as_deref().map(read_certificates).transpose()?.unwrap_or_default();
    let verifier = Arc::new(Verifier::new(check, roots, Arc::clone(&provider))?);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let config = match &server.client_certificate {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let private_key = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("cannot read the client key {}: {error}", key.display()))?;
            builder
                .with_client_auth_cert(read_certificates(chain)?, private_key)
                .map_err(|error| format!("cannot use the client certificate {}: {error}", chain.display()))?
        }
    };
    Ok(Some((TlsConnector::from(Arc::new(config)), name)))
}

/// Every certificate of a PEM file; an empty file is an error.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| format!("cannot read certificates from {}: {error}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!("no certificate in {}", path.display()));
    }
    Ok(certificates)
}

/// Checks as much of a server's certificate as `sslmode` asks for.
#[derive(Debug)]
struct Verifier {
    check: Check,
    /// Trusted as they stand, whatever their dates: OpenSSL, and so libpq, takes a server whose own certificate is in
    /// `sslrootcert`.
    pinned: Vec<CertificateDer<'static>>,
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(check: Check, trusted: Vec<CertificateDer<'static>>, provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let chain = match check {
            Check::Nothing => None,
            Check::Chain | Check::ChainAndName => {
                let mut roots = RootCertStore::empty();
                let (added, _) = roots.add_parsable_certificates(trusted.iter().cloned());
                if added == 0 {
                    return Err("no certificate of sslrootcert can serve as a root".to_owned());
                }
                let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                    .build()
                    .map_err(|error| format!("cannot use sslrootcert: {error}"))?;
                Some(verifier)
            }
        };
        Ok(Self { check, pinned: trusted, chain, provider })
    }

    /// Whether the chain check failed only because of the name.
    fn is_name_error(error: &rustls::Error) -> bool {
        matches!(
            error,
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            )
        )
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        if self.pinned.contains(end_entity) {
            if self.check == Check::ChainAndName {
                let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
                rustls::client::verify_server_name(&parsed, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(error) if self.check == Check::Chain && Self::is_name_error(&error) => {
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match self.check {
            Check::Nothing => Ok(HandshakeSignatureValid::assertion()),
            Check::Chain | Check::ChainAndName => {
                verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
            }
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match self.check {
            Check::Nothing => Ok(HandshakeSignatureValid::assertion()),
            Check::Chain | Check::ChainAndName => {
                verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
            }
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
