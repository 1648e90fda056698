//! Asking the client for its proof.

use std::sync::Arc;
use std::time::SystemTime;

use subtle::ConstantTimeEq as _;

use super::hba::{CertificateCheck, CertificateName, Demand};
use super::user_maps::UserMaps;
use super::users_file::Stored;
use super::verifiers::{Lookup, VerifierError, Verifiers};
use crate::config::{AuthMethod, Secret};
use crate::postgres::Credential;
use crate::proxy::certificate::ClientCertificate;
use crate::proxy::client_error::ClientError;
use crate::proxy::handshake::ClientChannel;
use crate::proxy::tls::Secured;
use crate::switch::ServerRole;
use crate::wire::frame::frontend;
use crate::wire::message;
use crate::wire::scram::{self, ChannelBinding, Exchange, ScramError, Verifier};

/// Longest PasswordMessage, as in PostgreSQL (`PG_MAX_AUTH_TOKEN_LENGTH`).
const PASSWORD_MESSAGE_MAX: u32 = 65_535;
/// Longest SASL message, as in PostgreSQL (`PG_MAX_SASL_MESSAGE_LENGTH`).
const SASL_MESSAGE_MAX: u32 = 1024;

/// The client is not let in.
#[derive(Debug, thiserror::Error)]
pub(in crate::proxy) enum AuthError {
    /// The client must be told this.
    #[error("refused: {0:?}")]
    Refused(ClientError),
    /// No proof: told as PostgreSQL tells it, the same whether the user exists or not.
    #[error("no proof of being {user:?}")]
    NoProof {
        /// Role asked for.
        user: String,
        /// Whether anything is stored for it.
        known: bool,
    },
    /// It has shown no certificate, or one of another name.
    #[error("no certificate of {user:?}")]
    Certificate {
        /// What the client is told.
        told: ClientError,
        /// Role asked for.
        user: String,
        /// The names that it has, of the kind that is asked for.
        found: Vec<String>,
    },
    /// It has proved who it is, and that role may not log in.
    #[error("{user:?} is not permitted to log in")]
    NotPermitted {
        /// Role.
        user: String,
    },
    /// What is stored for the user could not be found out; the client learns no more than that.
    #[error(transparent)]
    Lookup(#[from] VerifierError),
    /// The link broke.
    #[error("client lost during authentication")]
    Lost(#[from] std::io::Error),
}

/// What the client is asked for, after method and verifier were taken together.
enum Challenge {
    Nothing(Credential),
    Scram { verifier: Option<Verifier>, login: Option<Credential> },
    Md5 { verifier: Option<Secret>, login: Option<Credential> },
    Cleartext { stored: Option<Stored> },
}

impl Challenge {
    fn is_of_known_user(&self) -> bool {
        match self {
            Self::Nothing(_) => true,
            Self::Scram { verifier, .. } => verifier.is_some(),
            Self::Md5 { verifier, .. } => verifier.is_some(),
            Self::Cleartext { stored } => stored.is_some(),
        }
    }
}

/// Who is asked, and for what.
pub(in crate::proxy) struct Asked<'a> {
    /// What the rules say.
    pub(in crate::proxy) demand: &'a Demand,
    /// From names in certificates to roles.
    pub(in crate::proxy) maps: &'a UserMaps,
    /// Where verifiers are found.
    pub(in crate::proxy) lookup: &'a Arc<Lookup>,
    /// What the TLS connection says, if there is one.
    pub(in crate::proxy) secured: Option<&'a Secured>,
    /// Role that the client says it is.
    pub(in crate::proxy) user: &'a str,
}

impl Asked<'_> {
    fn certificate(&self) -> Option<&ClientCertificate> {
        self.secured.and_then(|secured| secured.certificate.as_ref())
    }

    /// What SCRAM-SHA-256-PLUS binds to; none: it is not offered.
    fn end_point(&self) -> Option<&[u8]> {
        self.secured.and_then(|secured| secured.end_point.as_deref())
    }

    /// Whether the certificate is of a name that may be this role.
    fn is_named(&self) -> bool {
        let CertificateCheck::Named(_) = self.demand.certificate else { return true };
        let map = self.demand.map.as_deref();
        self.certificate_names().iter().any(|name| !name.is_empty() && self.maps.lets(map, name, self.user))
    }

    /// The certificate's names of the kind that is asked for.
    fn certificate_names(&self) -> &[String] {
        let CertificateCheck::Named(name) = self.demand.certificate else { return &[] };
        let Some(certificate) = self.certificate() else { return &[] };
        match name {
            CertificateName::Common => certificate.common_name.as_slice(),
            CertificateName::Distinguished => std::slice::from_ref(&certificate.distinguished_name),
            CertificateName::Alternative => &certificate.alternative_names,
        }
    }

    /// The client is told what PostgreSQL tells where a certificate is missing or is of another name.
    fn certificate_refused(&self) -> AuthError {
        let user = self.user;
        let told = if self.certificate().is_none() {
            ClientError::Authorization("connection requires a valid client certificate".into())
        } else {
            match self.demand.method {
                AuthMethod::Cert => {
                    ClientError::Authorization(format!("certificate authentication failed for user \"{user}\"").into())
                }
                AuthMethod::Trust => {
                    ClientError::Authorization(format!("\"trust\" authentication failed for user \"{user}\"").into())
                }
                AuthMethod::Auto | AuthMethod::ScramSha256 | AuthMethod::Md5 | AuthMethod::Password => {
                    ClientError::password_failed(user)
                }
            }
        };
        AuthError::Certificate { told, user: user.to_owned(), found: self.certificate_names().to_vec() }
    }
}

/// Lets the client prove that it is who it says. Ends with AuthenticationOk queued on `channel`.
pub(in crate::proxy) async fn authenticate(
    channel: &mut ClientChannel,
    asked: &Asked<'_>,
    verifiers: &Arc<Verifiers>,
    active: ServerRole,
) -> Result<Credential, AuthError> {
    let user = asked.user;
    let method = asked.demand.method;
    if asked.demand.certificate != CertificateCheck::None && asked.certificate().is_none() {
        return Err(asked.certificate_refused());
    }
    if method == AuthMethod::Password && !channel.stream.is_private() {
        return Err(AuthError::Refused(ClientError::CleartextRefused));
    }
    let Found { challenge, can_login, trouble } = find(asked, verifiers, active).await?;
    let known = challenge.is_of_known_user();
    let outcome = match challenge {
        Challenge::Nothing(credential) => Ok(Some(credential)),
        Challenge::Scram { verifier, login } => scram_exchange(channel, verifiers, asked, verifier, login).await,
        Challenge::Md5 { verifier, login } => md5_exchange(channel, verifier, login).await,
        Challenge::Cleartext { stored } => cleartext_exchange(channel, verifiers, user, stored).await,
    }?;
    let Some(credential) = outcome else {
        if let Some(trouble) = trouble {
            return Err(AuthError::Lookup(trouble));
        }
        // The password may have been changed since it was read: the next attempt asks the server again.
        verifiers.doubt(active, user);
        return Err(AuthError::NoProof { user: user.to_owned(), known });
    };
    if !asked.is_named() {
        return Err(asked.certificate_refused());
    }
    message::authentication_ok(&mut channel.out);
    if !can_login {
        verifiers.doubt(active, user);
        // As from PostgreSQL, which looks at the role once authentication is over.
        channel.flush().await?;
        return Err(AuthError::NotPermitted { user: user.to_owned() });
    }
    Ok(credential)
}

/// What a client is to be checked against.
struct Found {
    challenge: Challenge,
    can_login: bool,
    /// Nothing could be found out. The client goes through the exchange all the same, and fails at its end: whether it
    /// is known elsewhere (in the users file) must not show.
    trouble: Option<VerifierError>,
}

async fn find(asked: &Asked<'_>, verifiers: &Arc<Verifiers>, active: ServerRole) -> Result<Found, AuthError> {
    let method = asked.demand.method;
    if matches!(method, AuthMethod::Trust | AuthMethod::Cert) {
        // Somebody must still log in to the server; the users file may know how.
        let credential = match asked.lookup.users.get(asked.user) {
            Some(Stored::Plain { password, .. }) => Credential::Password(password.clone()),
            Some(Stored::Md5(hash)) => Credential::Md5Hash(hash.clone()),
            Some(Stored::Scram(_)) | None => Credential::None,
        };
        return Ok(Found { challenge: Challenge::Nothing(credential), can_login: true, trouble: None });
    }
    let (account, trouble) = match verifiers.find(asked.lookup, active, asked.user).await {
        Ok(account) => (account, None),
        Err(error) if error.is_unreachable() => return Err(AuthError::Lookup(error)),
        Err(error) => (None, Some(error)),
    };
    let stored = account.as_ref().and_then(|account| account.usable(SystemTime::now()));
    let can_login = account.is_none_or(|account| account.can_login);
    let method = match (method, &stored) {
        (AuthMethod::Auto, None) if verifiers.made_up_is_md5(asked.lookup, active) => AuthMethod::Md5,
        _ => method,
    };
    Ok(Found { challenge: challenge(method, stored, asked.user), can_login, trouble })
}

fn challenge(method: AuthMethod, stored: Option<Stored>, user: &str) -> Challenge {
    match (method, stored) {
        (AuthMethod::Password, stored) => Challenge::Cleartext { stored },
        (AuthMethod::Md5 | AuthMethod::Auto, Some(Stored::Md5(hash))) => {
            Challenge::Md5 { verifier: Some(hash), login: None }
        }
        (AuthMethod::Md5, Some(Stored::Plain { password, .. })) => {
            let verifier = Secret::new(scram::md5_verifier(password.expose().as_bytes(), user));
            Challenge::Md5 { verifier: Some(verifier), login: Some(Credential::Password(password)) }
        }
        // PostgreSQL does SCRAM where a role has a SCRAM verifier and pg_hba.conf says md5.
        (_, Some(stored @ (Stored::Scram(_) | Stored::Plain { .. }))) => {
            let verifier = stored.scram_verifier();
            let login = match stored {
                Stored::Plain { password, .. } => Some(Credential::Password(password)),
                Stored::Scram(_) | Stored::Md5(_) => None,
            };
            Challenge::Scram { verifier, login }
        }
        (AuthMethod::Md5, None) => Challenge::Md5 { verifier: None, login: None },
        (_, Some(Stored::Md5(_)) | None) => Challenge::Scram { verifier: None, login: None },
    }
}

async fn scram_exchange(
    channel: &mut ClientChannel,
    verifiers: &Verifiers,
    asked: &Asked<'_>,
    verifier: Option<Verifier>,
    login: Option<Credential>,
) -> Result<Option<Credential>, AuthError> {
    let offered: &[&str] = if asked.end_point().is_some() { &[scram::PLUS, scram::PLAIN] } else { &[scram::PLAIN] };
    message::authentication_sasl(&mut channel.out, offered);
    let body = password_message(channel, SASL_MESSAGE_MAX).await?;
    let (mechanism, first) = message::read_sasl_initial(&body).ok_or_else(|| malformed("malformed SCRAM message"))?;
    let binding = match (mechanism, asked.end_point()) {
        (b"SCRAM-SHA-256-PLUS", Some(end_point)) => ChannelBinding::EndPoint(end_point),
        (b"SCRAM-SHA-256", Some(_)) => ChannelBinding::Declined,
        (b"SCRAM-SHA-256", None) => ChannelBinding::NotOffered,
        _ => return Err(malformed("client selected an invalid SASL authentication mechanism")),
    };
    let nonce = random_nonce();
    let made_up = verifiers.made_up(asked.user);
    let exchange = Exchange::begin(first, binding, verifier, made_up, &nonce).map_err(refused)?;
    message::authentication_sasl_continue(&mut channel.out, exchange.server_first().as_bytes());
    let body = password_message(channel, SASL_MESSAGE_MAX).await?;
    let Some(proven) = exchange.finish(&body).map_err(refused)? else { return Ok(None) };
    message::authentication_sasl_final(&mut channel.out, proven.message.as_bytes());
    // With the password at hand any method of the server will do; without, the keys are as good for SCRAM.
    let keys = Credential::ScramKeys { client_key: proven.client_key, server_key: proven.server_key };
    Ok(Some(login.unwrap_or(keys)))
}

async fn md5_exchange(
    channel: &mut ClientChannel,
    verifier: Option<Secret>,
    login: Option<Credential>,
) -> Result<Option<Credential>, AuthError> {
    let salt: [u8; 4] = rand::random();
    message::authentication_md5(&mut channel.out, salt);
    let body = password_message(channel, PASSWORD_MESSAGE_MAX).await?;
    let answer = message::read_password(&body).ok_or_else(|| malformed("invalid password packet size"))?;
    // An unknown user is compared too, with a digest that nothing matches.
    let stored = verifier.as_ref().map_or("md5ffffffffffffffffffffffffffffffff", Secret::expose);
    let expected = scram::md5_response(stored, salt).unwrap_or_default();
    let right = bool::from(expected.as_bytes().ct_eq(answer));
    Ok(verifier.filter(|_| right).map(|hash| login.unwrap_or(Credential::Md5Hash(hash))))
}

async fn cleartext_exchange(
    channel: &mut ClientChannel,
    verifiers: &Verifiers,
    user: &str,
    stored: Option<Stored>,
) -> Result<Option<Credential>, AuthError> {
    message::authentication_cleartext(&mut channel.out);
    let body = password_message(channel, PASSWORD_MESSAGE_MAX).await?;
    let answer = message::read_password(&body).ok_or_else(|| malformed("invalid password packet size"))?;
    let right = match &stored {
        Some(Stored::Plain { password, .. }) => bool::from(password.expose().as_bytes().ct_eq(answer)),
        Some(Stored::Md5(hash)) => {
            bool::from(scram::md5_verifier(answer, user).as_bytes().ct_eq(hash.expose().as_bytes()))
        }
        Some(Stored::Scram(verifier)) => verifiers.satisfies(verifier.clone(), answer).await,
        None => false,
    };
    if !right && !matches!(stored, Some(Stored::Scram(_))) {
        // Every refusal takes as long as that of a user with a SCRAM verifier.
        let _never = verifiers.satisfies(verifiers.made_up(user), answer).await;
    }
    let Ok(password) = std::str::from_utf8(answer) else { return Ok(None) };
    Ok(right.then(|| Credential::Password(Secret::new(password))))
}

/// The body of the next message, which must be the client's answer and not longer than `body_max`.
async fn password_message(
    channel: &mut ClientChannel,
    body_max: u32,
) -> Result<zeroize::Zeroizing<Vec<u8>>, AuthError> {
    channel.flush().await?;
    let header = channel.read_header().await?;
    if header.tag != frontend::PASSWORD || header.body_bytes > body_max {
        return Err(malformed("expected password response"));
    }
    let body = channel.read_exact(header.body_bytes as usize).await?;
    Ok(zeroize::Zeroizing::new(body))
}

fn malformed(text: &'static str) -> AuthError {
    AuthError::Refused(ClientError::Protocol(text.into()))
}

fn refused(error: ScramError) -> AuthError {
    let text = error.to_string().into();
    AuthError::Refused(if error.is_authorization() {
        ClientError::Authorization(text)
    } else {
        ClientError::Protocol(text)
    })
}

/// 18 random bytes in base64, as PostgreSQL's.
fn random_nonce() -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 18]>())
}
