//! TLS towards clients.

use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::ListenTls;

/// Reads certificate chain and key. Errors name the file and never show what is in it.
pub(super) fn acceptor(tls: &ListenTls) -> Result<TlsAcceptor, String> {
    let certificate = tls.certificate.display();
    let chain: Vec<_> = CertificateDer::pem_file_iter(&tls.certificate)
        .and_then(Iterator::collect)
        .map_err(|error| format!("certificate {certificate}: {error}"))?;
    if chain.is_empty() {
        return Err(format!("certificate {certificate}: holds no PEM certificate"));
    }
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| format!("key {}: {error}", tls.key.display()))?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| format!("certificate {certificate} and key {}: {error}", tls.key.display()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
