//! SCRAM-SHA-256, the server's side (RFC 5802, RFC 7677; PostgreSQL's `auth-scram.c`).
//!
//! ```text
//! client                                   proxy
//!   n,,n=,r=<nonce>              ────────▶
//!                                ◀────────   r=<nonce><ours>,s=<salt>,i=<iterations>
//!   c=biws,r=<nonce><ours>,p=<proof>  ───▶   proof ⊕ HMAC(StoredKey, everything said) = ClientKey
//!                                ◀────────   v=<HMAC(ServerKey, everything said)>
//! ```
//!
//! A correct proof reveals the ClientKey, with which the proxy can log in to any server that holds the same verifier.
//! A user that is not known goes through the same exchange with a made-up verifier, and fails at its end.
//! Channel binding is not offered, so a client that insists on it is refused.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, Mac as _};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// PostgreSQL's default, used for made-up verifiers.
pub const DEFAULT_ITERATIONS: u32 = 4096;

/// What a server stores instead of a password: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
#[derive(Clone, PartialEq, Eq, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: [u8; 32],
    server_key: [u8; 32],
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier(…)")
    }
}

/// The client did not speak SCRAM as it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// Not the attributes that are expected, in their order.
    #[error("malformed SCRAM message")]
    Malformed,
    /// The client insists on channel binding.
    #[error("SCRAM channel binding is not offered on this connection")]
    ChannelBinding,
    /// The client wants to act as somebody else.
    #[error("client uses authorization identity, but it is not supported")]
    AuthorizationIdentity,
    /// The final message does not belong to the first.
    #[error("SCRAM nonce or channel binding check failed")]
    Mismatch,
}

/// The exchange ended well.
#[derive(Debug, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct Proven {
    /// RFC 5802 ClientKey.
    pub client_key: [u8; 32],
    /// RFC 5802 ServerKey.
    pub server_key: [u8; 32],
    /// The server's final message.
    #[zeroize(skip)]
    pub message: String,
}

impl Verifier {
    /// Reads PostgreSQL's notation; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (head, keys) = text.strip_prefix("SCRAM-SHA-256$")?.split_once('$')?;
        let (iterations, salt) = head.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        Some(Self {
            iterations: iterations.parse().ok().filter(|&count| count > 0)?,
            salt: BASE64.decode(salt).ok()?,
            stored_key: BASE64.decode(stored_key).ok()?.try_into().ok()?,
            server_key: BASE64.decode(server_key).ok()?.try_into().ok()?,
        })
    }

    /// Whether this clear text password is the one. Costs as many rounds of HMAC as the verifier asks for.
    pub fn is_satisfied_by(&self, password: &[u8]) -> bool {
        // The client's side, which normalises passwords as PostgreSQL's clients do, plays against ours.
        let mut client = ScramSha256::new(password, ChannelBinding::unsupported());
        let exchange = Self::begin_with(client.message(), self.clone());
        let proven = exchange.and_then(|exchange| {
            client.update(exchange.server_first().as_bytes()).ok()?;
            exchange.finish(client.message()).ok()?
        });
        proven.is_some()
    }

    fn begin_with(client_first: &[u8], verifier: Self) -> Option<Exchange> {
        Exchange::begin(client_first, Some(verifier.clone()), verifier, "checked").ok()
    }

    /// A verifier that no password satisfies. The salt depends on the name and on a secret of this process, so that
    /// asking twice tells nothing, as in PostgreSQL's `mock_scram_secret`.
    pub fn made_up(user: &str, process_secret: &[u8; 32]) -> Self {
        let salt = hmac(process_secret, &[user.as_bytes()])[..16].to_vec();
        Self { iterations: DEFAULT_ITERATIONS, salt, stored_key: [0; 32], server_key: [0; 32] }
    }
}

/// Waiting for the client's final message.
#[derive(Debug)]
pub struct Exchange {
    verifier: Verifier,
    /// The verifier was made up: every proof is wrong.
    doomed: bool,
    /// `c=` must be this.
    channel_binding: &'static str,
    nonce: String,
    /// client-first-message-bare "," server-first-message ","
    said: String,
    server_first: String,
}

impl Exchange {
    /// Answers the client's first message. `our_nonce` is fresh, random and printable without commas.
    pub fn begin(
        client_first: &[u8],
        verifier: Option<Verifier>,
        made_up: Verifier,
        our_nonce: &str,
    ) -> Result<Self, ScramError> {
        let text = std::str::from_utf8(client_first).map_err(|_| ScramError::Malformed)?;
        let (binding, rest) = text.split_once(',').ok_or(ScramError::Malformed)?;
        let channel_binding = match binding {
            "n" => "biws",
            // The client would bind but believes that we cannot; true, since only SCRAM-SHA-256 was offered.
            "y" => "eSws",
            _ if binding.starts_with("p=") => return Err(ScramError::ChannelBinding),
            _ => return Err(ScramError::Malformed),
        };
        let (identity, bare) = rest.split_once(',').ok_or(ScramError::Malformed)?;
        if !identity.is_empty() {
            return Err(ScramError::AuthorizationIdentity);
        }
        let mut attributes = bare.split(',');
        // The name in here is ignored, as in PostgreSQL: the startup packet's counts.
        attributes.next().and_then(|name| name.strip_prefix("n=")).ok_or(ScramError::Malformed)?;
        let nonce = attributes.next().and_then(|nonce| nonce.strip_prefix("r=")).ok_or(ScramError::Malformed)?;
        if nonce.is_empty() || !nonce.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ScramError::Malformed);
        }
        let doomed = verifier.is_none();
        let verifier = verifier.unwrap_or(made_up);
        let nonce = format!("{nonce}{our_nonce}");
        let server_first = format!("r={nonce},s={},i={}", BASE64.encode(&verifier.salt), verifier.iterations);
        let said = format!("{bare},{server_first},");
        Ok(Self { verifier, doomed, channel_binding, nonce, said, server_first })
    }

    /// The server's first message.
    pub fn server_first(&self) -> &str {
        &self.server_first
    }

    /// Checks the client's final message. `Ok(None)`: the password was wrong, or there is no such user.
    pub fn finish(self, client_final: &[u8]) -> Result<Option<Proven>, ScramError> {
        let text = std::str::from_utf8(client_final).map_err(|_| ScramError::Malformed)?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(ScramError::Malformed)?;
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|text| text.strip_prefix("c=")).ok_or(ScramError::Malformed)?;
        let nonce = attributes.next().and_then(|text| text.strip_prefix("r=")).ok_or(ScramError::Malformed)?;
        if binding != self.channel_binding || nonce != self.nonce {
            return Err(ScramError::Mismatch);
        }
        let proof: [u8; 32] =
            BASE64.decode(proof).ok().and_then(|proof| proof.try_into().ok()).ok_or(ScramError::Malformed)?;
        let said: [&[u8]; 2] = [self.said.as_bytes(), without_proof.as_bytes()];
        let mut client_key = hmac(&self.verifier.stored_key, &said);
        for (byte, proof) in client_key.iter_mut().zip(proof) {
            *byte ^= proof;
        }
        let stored: [u8; 32] = Sha256::digest(client_key).into();
        if !bool::from(stored.ct_eq(&self.verifier.stored_key)) || self.doomed {
            return Ok(None);
        }
        let signature = hmac(&self.verifier.server_key, &said);
        let message = format!("v={}", BASE64.encode(signature));
        Ok(Some(Proven { client_key, server_key: self.verifier.server_key, message }))
    }
}

fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// PostgreSQL's md5 verifier of a password: `md5` and the hexadecimal digest of password and name.
pub fn md5_verifier(password: &[u8], user: &str) -> String {
    format!("md5{}", md5_hex(&[password, user.as_bytes()]))
}

/// What a client that knows the password behind `verifier` answers to `salt`; `verifier` without its `md5` is hashed
/// again with the salt.
pub fn md5_response(verifier: &str, salt: [u8; 4]) -> Option<String> {
    let digest = verifier.strip_prefix("md5").filter(|digest| digest.len() == 32)?;
    Some(format!("md5{}", md5_hex(&[digest.as_bytes(), &salt])))
}

fn md5_hex(parts: &[&[u8]]) -> String {
    let mut hash = md5::Md5::new();
    for part in parts {
        md5::Digest::update(&mut hash, part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use postgres_protocol::password;
    use proptest::prelude::*;

    use super::*;

    const NOBODY: &[u8; 32] = &[7; 32];

    fn converse(given: &str, stored: Option<&str>) -> Option<Proven> {
        let mut client = ScramSha256::new(given.as_bytes(), ChannelBinding::unsupported());
        let verifier =
            stored.map(|stored| Verifier::parse(&password::scram_sha_256(stored.as_bytes())).expect("valid"));
        let exchange = Exchange::begin(client.message(), verifier, Verifier::made_up("ann", NOBODY), "ours")
            .expect("speaks SCRAM");
        client.update(exchange.server_first().as_bytes()).expect("acceptable");
        let proven = exchange.finish(client.message()).expect("speaks SCRAM")?;
        client.finish(proven.message.as_bytes()).expect("the server proves itself too");
        Some(proven)
    }

    #[test]
    fn the_right_password_reveals_the_client_key() {
        let proven = converse("päss", Some("päss")).expect("right");
        assert_ne!(proven.client_key, [0; 32]);
        assert!(converse("wrong", Some("right")).is_none());
        assert!(converse("any", None).is_none(), "an unknown user goes all the way and fails");
    }

    #[test]
    fn a_clear_text_password_is_checked_against_the_verifier() {
        let verifier = Verifier::parse(&password::scram_sha_256("päss".as_bytes())).expect("valid");
        assert!(verifier.is_satisfied_by("päss".as_bytes()));
        assert!(!verifier.is_satisfied_by(b"pass"));
    }

    #[test]
    fn made_up_salts_are_stable_and_differ_between_users() {
        let ann = Verifier::made_up("ann", NOBODY);
        assert_eq!(ann.salt, Verifier::made_up("ann", NOBODY).salt);
        assert_ne!(ann.salt, Verifier::made_up("bob", NOBODY).salt);
    }

    #[test]
    fn who_insists_on_binding_or_another_identity_is_refused() {
        let begin = |first: &[u8]| Exchange::begin(first, None, Verifier::made_up("a", NOBODY), "x").err();
        assert_eq!(begin(b"p=tls-server-end-point,,n=,r=abc"), Some(ScramError::ChannelBinding));
        assert_eq!(begin(b"n,a=bob,n=,r=abc"), Some(ScramError::AuthorizationIdentity));
        assert_eq!(begin(b"n,,m=1,n=,r=abc"), Some(ScramError::Malformed));
        assert_eq!(begin(b"n,,n=,r="), Some(ScramError::Malformed));
    }

    #[test]
    fn md5_matches_postgresql() {
        // select 'md5' || md5('secret' || 'ann')
        assert_eq!(md5_verifier(b"secret", "ann"), password::md5(b"secret", "ann"));
        let expected = postgres_protocol::authentication::md5_hash(b"ann", b"secret", [1, 2, 3, 4]);
        assert_eq!(md5_response(&md5_verifier(b"secret", "ann"), [1, 2, 3, 4]), Some(expected));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(first: Vec<u8>, last: Vec<u8>, text in ".*") {
            let _ = Verifier::parse(&text);
            let _ = Verifier::parse(&format!("SCRAM-SHA-256${text}"));
            let _ = Exchange::begin(&first, None, Verifier::made_up("a", NOBODY), "x");
            let exchange = Exchange::begin(b"n,,n=,r=abc", None, Verifier::made_up("a", NOBODY), "x").expect("valid");
            let _ = exchange.finish(&last);
        }

        #[test]
        fn near_misses_are_read_without_a_panic(first in "[nyp],[a=]?,n=[a-z]{0,3},r=[!-~]{0,5}", last in "c=biws,r=[a-z]{0,5},p=[A-Za-z0-9+/=]{0,44}") {
            if let Ok(exchange) = Exchange::begin(first.as_bytes(), None, Verifier::made_up("a", NOBODY), "x") {
                let _ = exchange.finish(last.as_bytes());
            }
        }
    }
}
