//! What is read from a certificate: whose it is, until when, and the digest that SCRAM binds to.
//!
//! Whether a certificate is to be believed is decided before, in the TLS handshake; nothing here does that.

use sha2::{Digest as _, Sha256, Sha384, Sha512};
use x509_cert::Certificate as X509;
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::distinguished_name::rfc2253;

/// Signature algorithms whose digest is SHA-256, or an older one for which RFC 5929 takes SHA-256.
const SHA256_SIGNATURES: [&str; 5] = [
    "1.2.840.113549.1.1.11", // RSA with SHA-256
    "1.2.840.10045.4.3.2",   // ECDSA with SHA-256
    "1.2.840.113549.1.1.5",  // RSA with SHA-1
    "1.2.840.10045.4.1",     // ECDSA with SHA-1
    "1.2.840.113549.1.1.4",  // RSA with MD5
];
/// RSA and ECDSA with SHA-384.
const SHA384_SIGNATURES: [&str; 2] = ["1.2.840.113549.1.1.12", "1.2.840.10045.4.3.3"];
/// RSA and ECDSA with SHA-512.
const SHA512_SIGNATURES: [&str; 2] = ["1.2.840.113549.1.1.13", "1.2.840.10045.4.3.4"];

/// A client's certificate, which the TLS handshake has checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ClientCertificate {
    /// CN of the subject.
    pub(super) common_name: Option<String>,
    /// The subject, as PostgreSQL's `clientname=DN` has it.
    pub(super) distinguished_name: String,
    /// DNS names, e-mail addresses and URIs of subjectAltName.
    pub(super) alternative_names: Vec<String>,
}

impl ClientCertificate {
    /// Reads the names. An unreadable certificate has none, and so is nobody's.
    pub(super) fn read(der: &[u8]) -> Self {
        let Ok(certificate) = X509::from_der(der) else { return Self::default() };
        let subject = certificate.tbs_certificate().subject();
        let common_name = subject.common_name().ok().flatten().map(|name| name.value().into_owned());
        let alternative_names = match certificate.tbs_certificate().get_extension::<SubjectAltName>() {
            Ok(Some((_, names))) => names.0.iter().filter_map(text_of).collect(),
            Ok(None) | Err(_) => Vec::new(),
        };
        Self {
            // As in PostgreSQL: a zero byte in a name is an attempt to be taken for somebody else.
            common_name: common_name.filter(|name| !name.contains('\0')),
            distinguished_name: rfc2253(subject).unwrap_or_default(),
            alternative_names: alternative_names.into_iter().filter(|name| !name.contains('\0')).collect(),
        }
    }
}

fn text_of(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::Rfc822Name(text) | GeneralName::DnsName(text) | GeneralName::UniformResourceIdentifier(text) => {
            Some(text.as_str().to_owned())
        }
        _ => None,
    }
}

/// `tls-server-end-point` of our own certificate: its digest with the hash of its signature (RFC 5929, section 4.1).
/// `None`: the signature has no hash of its own (Ed25519) or hides it (RSA-PSS), so there is nothing to bind to.
pub(super) fn end_point(der: &[u8]) -> Option<Vec<u8>> {
    let certificate = X509::from_der(der).ok()?;
    let algorithm = certificate.signature_algorithm().oid.to_string();
    let is_of = |list: &[&str]| list.contains(&algorithm.as_str());
    if is_of(&SHA256_SIGNATURES) {
        Some(Sha256::digest(der).to_vec())
    } else if is_of(&SHA384_SIGNATURES) {
        Some(Sha384::digest(der).to_vec())
    } else if is_of(&SHA512_SIGNATURES) {
        Some(Sha512::digest(der).to_vec())
    } else {
        None
    }
}

/// The moment up to which the certificate may be used, in seconds since 1970.
pub(super) fn not_after(der: &[u8]) -> Option<i64> {
    let certificate = X509::from_der(der).ok()?;
    let until = certificate.tbs_certificate().validity().not_after;
    i64::try_from(until.to_unix_duration().as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn make(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let key = KeyPair::generate().expect("made");
        let mut parameters = CertificateParams::new(vec!["ann.example".to_owned()]).expect("valid");
        parameters.distinguished_name = DistinguishedName::new();
        change(&mut parameters);
        parameters.self_signed(&key).expect("signed").der().to_vec()
    }

    #[test]
    fn names_are_read_as_postgresql_shows_them() {
        let der = make(|parameters| {
            parameters.distinguished_name.push(DnType::OrganizationName, "Shop, Ltd");
            parameters.distinguished_name.push(DnType::OrganizationalUnitName, "Sales");
            parameters.distinguished_name.push(DnType::CommonName, "Ann \"A\" Größe");
            let email = "ann@example.org".try_into().expect("ASCII");
            parameters.subject_alt_names.push(SanType::Rfc822Name(email));
        });
        let read = ClientCertificate::read(&der);
        assert_eq!(read.common_name.as_deref(), Some("Ann \"A\" Größe"));
        assert_eq!(read.distinguished_name, "CN=Ann \\\"A\\\" Gr\\C3\\B6\\C3\\9Fe,OU=Sales,O=Shop\\, Ltd");
        assert_eq!(read.alternative_names, ["ann.example", "ann@example.org"]);
    }

    #[test]
    fn nameless_and_unreadable_certificates_are_nobodys() {
        let read = ClientCertificate::read(&make(|_| {}));
        assert_eq!((read.common_name, read.distinguished_name.as_str()), (None, ""));
        assert_eq!(ClientCertificate::read(b"nonsense"), ClientCertificate::default());
        assert_eq!(end_point(b"nonsense"), None);
        assert_eq!(not_after(b"nonsense"), None);
    }

    #[test]
    fn the_digest_is_that_of_the_signature() {
        let signed = |algorithm| {
            let key = KeyPair::generate_for(algorithm).expect("made");
            let parameters = CertificateParams::new(Vec::new()).expect("valid");
            parameters.self_signed(&key).expect("signed").der().to_vec()
        };
        let der = signed(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(end_point(&der), Some(Sha256::digest(&der).to_vec()));
        let der = signed(&rcgen::PKCS_ECDSA_P384_SHA384);
        assert_eq!(end_point(&der), Some(Sha384::digest(&der).to_vec()));
        assert_eq!(end_point(&signed(&rcgen::PKCS_ED25519)), None);
    }

    #[test]
    fn the_end_of_validity_is_read() {
        let der = make(|parameters| parameters.not_after = rcgen::date_time_ymd(2031, 2, 3));
        assert_eq!(not_after(&der), Some(1_927_843_200));
    }
}
