//! Asking the client for its proof.

use std::sync::Arc;

use subtle::ConstantTimeEq as _;

use super::users_file::Stored;
use super::verifiers::{VerifierError, Verifiers};
use crate::config::{Auth, AuthMethod, Secret};
use crate::postgres::Credential;
use crate::proxy::client_error::ClientError;
use crate::proxy::handshake::ClientChannel;
use crate::switch::ServerRole;
use crate::wire::frame::{Header, frontend};
use crate::wire::message;
use crate::wire::scram::{self, Exchange, ScramError, Verifier};

/// Longest message of a client that is not authenticated yet; PostgreSQL allows 65535 for passwords.
const AUTH_MESSAGE_MAX: u32 = 65_535;

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

/// Lets the client prove that it is `user`. Ends with AuthenticationOk queued on `channel`.
pub(in crate::proxy) async fn authenticate(
    channel: &mut ClientChannel,
    auth: &Auth,
    verifiers: &Arc<Verifiers>,
    active: ServerRole,
    user: &str,
) -> Result<Credential, AuthError> {
    let private = channel.stream.is_private();
    if auth.method == AuthMethod::Password && !private {
        return Err(AuthError::Refused(ClientError::CleartextRefused));
    }
    let challenge = challenge(auth, verifiers, active, user).await?;
    let known = challenge.is_of_known_user();
    let outcome = match challenge {
        Challenge::Nothing(credential) => Ok(Some(credential)),
        Challenge::Scram { verifier, login } => scram_exchange(channel, verifiers, user, verifier, login).await,
        Challenge::Md5 { verifier, login } => md5_exchange(channel, verifier, login).await,
        Challenge::Cleartext { stored } => cleartext_exchange(channel, user, stored).await,
    }?;
    let Some(credential) = outcome else {
        // The password may have been changed since it was read: the next attempt asks the server again.
        verifiers.doubt(active, user);
        return Err(AuthError::NoProof { user: user.to_owned(), known });
    };
    message::authentication_ok(&mut channel.out);
    Ok(credential)
}

async fn challenge(
    auth: &Auth,
    verifiers: &Arc<Verifiers>,
    active: ServerRole,
    user: &str,
) -> Result<Challenge, AuthError> {
    if auth.method == AuthMethod::Trust {
        // Somebody must still log in to the server; the users file may know how.
        let credential = match verifiers.in_file(user) {
            Some(Stored::Plain { password, .. }) => Credential::Password(password),
            Some(Stored::Md5(hash)) => Credential::Md5Hash(hash),
            Some(Stored::Scram(_)) | None => Credential::None,
        };
        return Ok(Challenge::Nothing(credential));
    }
    let stored = verifiers.find(active, user).await?;
    Ok(match (auth.method, stored) {
        (AuthMethod::Password, stored) => Challenge::Cleartext { stored },
        (AuthMethod::Md5, Some(Stored::Md5(hash))) | (AuthMethod::Auto, Some(Stored::Md5(hash))) => {
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
    })
}

async fn scram_exchange(
    channel: &mut ClientChannel,
    verifiers: &Verifiers,
    user: &str,
    verifier: Option<Verifier>,
    login: Option<Credential>,
) -> Result<Option<Credential>, AuthError> {
    message::authentication_sasl(&mut channel.out);
    let body = password_message(channel).await?;
    let (mechanism, first) = message::read_sasl_initial(&body).ok_or_else(|| malformed("malformed SCRAM message"))?;
    if mechanism != b"SCRAM-SHA-256" {
        return Err(malformed("client selected an invalid SASL authentication mechanism"));
    }
    let nonce = random_nonce();
    let exchange = Exchange::begin(first, verifier, verifiers.made_up(user), &nonce).map_err(refused)?;
    message::authentication_sasl_continue(&mut channel.out, exchange.server_first().as_bytes());
    let body = password_message(channel).await?;
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
    let body = password_message(channel).await?;
    let answer = message::read_password(&body).ok_or_else(|| malformed("invalid password packet size"))?;
    // An unknown user is compared too, with a digest that nothing matches.
    let stored = verifier.as_ref().map_or("md5ffffffffffffffffffffffffffffffff", Secret::expose);
    let expected = scram::md5_response(stored, salt).unwrap_or_default();
    let right = bool::from(expected.as_bytes().ct_eq(answer));
    Ok(verifier.filter(|_| right).map(|hash| login.unwrap_or(Credential::Md5Hash(hash))))
}

async fn cleartext_exchange(
    channel: &mut ClientChannel,
    user: &str,
    stored: Option<Stored>,
) -> Result<Option<Credential>, AuthError> {
    message::authentication_cleartext(&mut channel.out);
    let body = password_message(channel).await?;
    let answer = message::read_password(&body).ok_or_else(|| malformed("invalid password packet size"))?;
    let right = match &stored {
        Some(Stored::Plain { password, .. }) => bool::from(password.expose().as_bytes().ct_eq(answer)),
        Some(Stored::Md5(hash)) => {
            bool::from(scram::md5_verifier(answer, user).as_bytes().ct_eq(hash.expose().as_bytes()))
        }
        Some(Stored::Scram(verifier)) => verifier.is_satisfied_by(answer),
        None => false,
    };
    let Ok(password) = std::str::from_utf8(answer) else { return Ok(None) };
    Ok(right.then(|| Credential::Password(Secret::new(password))))
}

async fn password_message(channel: &mut ClientChannel) -> Result<zeroize::Zeroizing<Vec<u8>>, AuthError> {
    channel.flush().await?;
    let header = channel.read_header().await?;
    let Header { tag: frontend::PASSWORD, body_bytes: length @ 0..=AUTH_MESSAGE_MAX } = header else {
        return Err(malformed("expected password response"));
    };
    let body = channel.read_exact(length as usize).await?;
    Ok(zeroize::Zeroizing::new(body))
}

fn malformed(text: &'static str) -> AuthError {
    AuthError::Refused(ClientError::Protocol(text.into()))
}

fn refused(error: ScramError) -> AuthError {
    AuthError::Refused(ClientError::Protocol(error.to_string().into()))
}

/// 18 random bytes in base64, as PostgreSQL's.
fn random_nonce() -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 18]>())
}
