//! Startup packet and authentication of a raw connection (PostgreSQL documentation, "Message Flow: Start-up").
//!
//! ```text
//! us                                the server
//! StartupMessage(3.0, user, …)  →
//!                               ←   Authentication{Cleartext, MD5(salt), SASL(mechanisms)} | AuthenticationOk
//! PasswordMessage / SASL …      →
//!                               ←   AuthenticationOk, ParameterStatus…, BackendKeyData, ReadyForQuery
//! ```
//!
//! A secret goes into the one message that carries it and nowhere else.

use bytes::{BufMut as _, BytesMut};
use md5::{Digest as _, Md5};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::message::frontend;

use crate::postgres::derived_keys::DerivedKeys;
use crate::postgres::scram::{self, MECHANISM, ScramClient, ScramError};
use crate::postgres::{Credential, Frame, Login, RawConnection, RawError};

/// How often a server may ask before it has to let us in.
const ASKED_MAX: usize = 3;

/// Why a login failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoginError {
    /// The link broke, the server refused, or it broke the protocol.
    #[error(transparent)]
    Raw(#[from] RawError),
    /// The server asks for something that the credential cannot give.
    #[error("the server asks for {asked}, which {has} cannot answer")]
    Credential { asked: &'static str, has: &'static str },
    /// A method that is not spoken here.
    #[error("the server asks for {0}, which is not supported")]
    Method(String),
    /// The SASL exchange failed on our side.
    #[error("{0}")]
    Sasl(String),
}

impl Credential {
    /// For messages; names the kind and never the value.
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "a login without a password",
            Self::Password(_) => "a password",
            Self::ScramKeys { .. } => "a SCRAM key",
            Self::Md5Hash(_) => "an md5 verifier",
        }
    }
}

/// Logs in on a fresh connection; returns once ReadyForQuery has come.
/// `derived` remembers the keys of passwords.
pub(super) async fn log_in(
    connection: &mut RawConnection,
    login: &Login,
    derived: &DerivedKeys,
) -> Result<(), LoginError> {
    let mut packet = BytesMut::new();
    let fixed = [("user", login.user.as_str()), ("database", login.database.as_str())];
    let further = login.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    frontend::startup_message(fixed.into_iter().chain(further), &mut packet)
        .map_err(|error| connection.violation(format!("startup packet: {error}")))?;
    connection.send(&packet).await?;
    authenticate(connection, login, derived).await?;
    await_ready(connection).await?;
    connection.logged_in();
    Ok(())
}

/// Answers what the server asks until AuthenticationOk. Servers ask once; one that goes on asking is no server.
async fn authenticate(connection: &mut RawConnection, login: &Login, derived: &DerivedKeys) -> Result<(), LoginError> {
    for _ in 0..=ASKED_MAX {
        let frame = expect_answer(connection).await?;
        let (code, rest) = authentication(connection, &frame)?;
        let cannot = |asked| LoginError::Credential { asked, has: login.credential.kind() };
        match code {
            0 => return Ok(()),
            3 => match &login.credential {
                Credential::Password(password) => send_password(connection, password.expose().as_bytes()).await?,
                Credential::None | Credential::ScramKeys { .. } | Credential::Md5Hash(_) => {
                    return Err(cannot("a password in clear text"));
                }
            },
            5 => {
                let salt = <[u8; 4]>::try_from(rest).map_err(|_| connection.violation("md5 salt".to_owned()))?;
                let answer = match &login.credential {
                    Credential::Password(password) => {
                        md5_hash(login.user.as_bytes(), password.expose().as_bytes(), salt)
                    }
                    Credential::Md5Hash(verifier) => salted_md5(verifier.expose(), salt),
                    Credential::None | Credential::ScramKeys { .. } => return Err(cannot("an md5 password")),
                };
                send_password(connection, answer.as_bytes()).await?;
            }
            10 => {
                if !rest.split(|byte| *byte == 0).any(|name| name == MECHANISM.as_bytes()) {
                    let offered = String::from_utf8_lossy(rest).replace('\0', " ");
                    return Err(LoginError::Method(format!("SASL {}", offered.trim())));
                }
                match &login.credential {
                    Credential::Password(password) => {
                        scram_with_password(connection, password.expose(), derived).await?
                    }
                    Credential::ScramKeys { client_key, server_key } => {
                        scram_with_keys(connection, ScramClient::new(*client_key, *server_key)).await?;
                    }
                    Credential::None | Credential::Md5Hash(_) => return Err(cannot("SCRAM-SHA-256")),
                }
            }
            2 => return Err(LoginError::Method("Kerberos V5".to_owned())),
            6 => return Err(LoginError::Method("SCM credentials".to_owned())),
            7..=9 => return Err(LoginError::Method("GSSAPI or SSPI".to_owned())),
            other => return Err(LoginError::Method(format!("authentication method {other}"))),
        }
    }
    Err(connection.violation("asks for authentication again and again".to_owned()).into())
}

/// ParameterStatus, BackendKeyData and notices until the first ReadyForQuery.
async fn await_ready(connection: &mut RawConnection) -> Result<(), LoginError> {
    loop {
        let frame = expect_answer(connection).await?;
        match frame.tag {
            b'S' => {}
            b'K' => {
                let (pid, key) = frame
                    .body
                    .split_first_chunk::<4>()
                    .ok_or_else(|| connection.violation("malformed BackendKeyData".to_owned()))?;
                connection.pid = i32::from_be_bytes(*pid);
                connection.cancel_key = key.to_vec();
            }
            b'Z' => return Ok(()),
            other => {
                return Err(connection.violation(format!("message {:?} during login", char::from(other))).into());
            }
        }
    }
}

/// SCRAM with a password, whose keys are known once the server has said its salt.
async fn scram_with_password(
    connection: &mut RawConnection,
    password: &str,
    derived: &DerivedKeys,
) -> Result<(), LoginError> {
    let nonce = scram::fresh_nonce();
    send_sasl_initial(connection, scram::first_message(&nonce).as_bytes()).await?;
    let server_first = expect_sasl(connection, 11).await?;
    let (salt, rounds) = scram::salt_and_rounds(&server_first).map_err(sasl)?;
    let keys = derived.of(password, &salt, rounds);
    let exchange = ScramClient::with_nonce(keys.client_key, keys.server_key, nonce);
    prove(connection, exchange, &server_first).await
}

/// SCRAM with a client key.
async fn scram_with_keys(connection: &mut RawConnection, exchange: ScramClient) -> Result<(), LoginError> {
    send_sasl_initial(connection, exchange.first_message().as_bytes()).await?;
    let server_first = expect_sasl(connection, 11).await?;
    prove(connection, exchange, &server_first).await
}

/// The second half of an exchange.
async fn prove(connection: &mut RawConnection, exchange: ScramClient, server_first: &[u8]) -> Result<(), LoginError> {
    let (exchange, client_final) = exchange.answer(server_first).map_err(sasl)?;
    send_sasl(connection, client_final.as_bytes()).await?;
    let server_final = expect_sasl(connection, 12).await?;
    exchange.finish(&server_final).map_err(sasl)
}

fn sasl(error: ScramError) -> LoginError {
    LoginError::Sasl(error.to_string())
}

/// The next frame that is no notice and no NegotiateProtocolVersion (`v`: the server speaks an older minor version or
/// ignores `_pq_.` options; we ask for 3.0, so nothing follows from it). An ErrorResponse is an error.
async fn expect_answer(connection: &mut RawConnection) -> Result<Frame, RawError> {
    loop {
        let frame = connection.next_frame().await?;
        match frame.tag {
            b'N' | b'v' => {}
            b'E' => return Err(RawError::from_error_response(&frame.body)),
            _ => return Ok(frame),
        }
    }
}

/// Code and data of an Authentication message.
fn authentication<'a>(connection: &RawConnection, frame: &'a Frame) -> Result<(u32, &'a [u8]), RawError> {
    match (frame.tag, frame.body.split_first_chunk::<4>()) {
        (b'R', Some((code, rest))) => Ok((u32::from_be_bytes(*code), rest)),
        (b'R', None) => Err(connection.violation("malformed Authentication message".to_owned())),
        (tag, _) => Err(connection.violation(format!("message {:?} before AuthenticationOk", char::from(tag)))),
    }
}

/// The data of AuthenticationSASLContinue (11) or AuthenticationSASLFinal (12).
async fn expect_sasl(connection: &mut RawConnection, expected: u32) -> Result<Vec<u8>, LoginError> {
    let frame = expect_answer(connection).await?;
    let (code, data) = authentication(connection, &frame)?;
    if code == expected {
        return Ok(data.to_vec());
    }
    Err(connection.violation(format!("authentication message {code} instead of {expected}")).into())
}

/// PasswordMessage; also carries md5 answers.
async fn send_password(connection: &mut RawConnection, text: &[u8]) -> Result<(), LoginError> {
    let mut message = BytesMut::new();
    frontend::password_message(text, &mut message)
        .map_err(|_| LoginError::Sasl("the password holds a zero byte".to_owned()))?;
    Ok(connection.send(&message).await?)
}

async fn send_sasl_initial(connection: &mut RawConnection, data: &[u8]) -> Result<(), LoginError> {
    let mut message = BytesMut::new();
    frontend::sasl_initial_response(MECHANISM, data, &mut message)
        .map_err(|error| LoginError::Sasl(format!("SCRAM exchange: {error}")))?;
    Ok(connection.send(&message).await?)
}

async fn send_sasl(connection: &mut RawConnection, data: &[u8]) -> Result<(), LoginError> {
    let mut message = BytesMut::new();
    frontend::sasl_response(data, &mut message)
        .map_err(|error| LoginError::Sasl(format!("SCRAM exchange: {error}")))?;
    Ok(connection.send(&message).await?)
}

/// `md5` + md5(hex digits of the verifier + salt): the verifier is md5(password + role) already.
fn salted_md5(verifier: &str, salt: [u8; 4]) -> String {
    let mut hash = Md5::new();
    hash.update(verifier.strip_prefix("md5").unwrap_or(verifier));
    hash.update(salt);
    format!("md5{:x}", hash.finalize())
}

/// CancelRequest (PostgreSQL documentation, "Canceling Requests in Progress"): length, 1234·2^16 + 5678, process id, key.
pub(super) fn cancel_request(pid: i32, key: &[u8]) -> BytesMut {
    let length = u32::try_from(12 + key.len()).unwrap_or(u32::MAX);
    let mut packet = BytesMut::with_capacity(12 + key.len());
    packet.put_u32(length);
    packet.put_u32(80_877_102);
    packet.put_i32(pid);
    packet.put_slice(key);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_md5_verifier_answers_like_its_password() {
        let salt = [1, 2, 3, 4];
        let mut hash = Md5::new();
        hash.update("secretalice");
        let verifier = format!("md5{:x}", hash.finalize());
        assert_eq!(salted_md5(&verifier, salt), md5_hash(b"alice", b"secret", salt));
    }

    #[test]
    fn cancel_requests_carry_keys_of_any_length() {
        assert_eq!(cancel_request(7, &[9; 4])[..], [0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 7, 9, 9, 9, 9]);
        assert_eq!(cancel_request(7, &[9; 32]).len(), 44);
    }
}
