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
//!
//! Over TLS, SCRAM-SHA-256-PLUS is offered too: the client's first message then begins with `p=tls-server-end-point,,`
//! and `c=` carries a digest of the certificate that the client sees (RFC 5929), so that nobody in the middle with
//! another certificate can pass the exchange on. A client that says `y` ("I could bind, but you cannot") while binding
//! was offered has been lied to, and is refused.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, Mac as _};
use postgres_protocol::authentication::sasl::{ChannelBinding as ClientBinding, ScramSha256};
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

/// Name of the mechanism without channel binding.
pub const PLAIN: &str = "SCRAM-SHA-256";
/// Name of the mechanism with it; PostgreSQL offers it first, and only over TLS.
pub const PLUS: &str = "SCRAM-SHA-256-PLUS";

/// The one kind of channel binding that PostgreSQL knows.
const END_POINT: &str = "tls-server-end-point";

/// How the exchange stands to the TLS connection under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding<'a> {
    /// SCRAM-SHA-256-PLUS was not offered.
    NotOffered,
    /// It was offered, and the client chose SCRAM-SHA-256.
    Declined,
    /// The client chose SCRAM-SHA-256-PLUS; the digest of our certificate.
    EndPoint(&'a [u8]),
}

/// The client did not speak SCRAM as it must. The words are PostgreSQL's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// Not the attributes that are expected, in their order, or not those of the mechanism that was chosen.
    #[error("malformed SCRAM message")]
    Malformed,
    /// A kind of binding that does not exist here.
    #[error("unsupported SCRAM channel-binding type")]
    BindingType,
    /// The client believes that binding is not offered, and it is: somebody between may have taken it off the list.
    #[error("SCRAM channel binding negotiation error")]
    Downgraded,
    /// The client sees another certificate than ours.
    #[error("SCRAM channel binding check failed")]
    OtherEndPoint,
    /// `c=` does not repeat what the first message said.
    #[error("unexpected SCRAM channel-binding attribute in client-final-message")]
    BindingAttribute,
    /// The client wants to act as somebody else.
    #[error("client uses authorization identity, but it is not supported")]
    AuthorizationIdentity,
    /// The final message does not belong to the first.
    #[error("invalid SCRAM response")]
    Nonce,
}

impl ScramError {
    /// Whether it is about who may come in, and not about the form of a message (SQLSTATE 28000 instead of 08P01).
    pub fn is_authorization(&self) -> bool {
        matches!(self, Self::Downgraded | Self::OtherEndPoint)
    }
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
        let mut client = ScramSha256::new(password, ClientBinding::unsupported());
        let exchange = Self::begin_with(client.message(), self.clone());
        let proven = exchange.and_then(|exchange| {
            client.update(exchange.server_first().as_bytes()).ok()?;
            exchange.finish(client.message()).ok()?
        });
        proven.is_some()
    }

    fn begin_with(client_first: &[u8], verifier: Self) -> Option<Exchange> {
        Exchange::begin(client_first, ChannelBinding::NotOffered, Some(verifier.clone()), verifier, "checked").ok()
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
    expected_binding: String,
    is_bound: bool,
    nonce: String,
    /// client-first-message-bare "," server-first-message ","
    said: String,
    server_first: String,
}

impl Exchange {
    /// Answers the client's first message. `our_nonce` is fresh, random and printable without commas.
    pub fn begin(
        client_first: &[u8],
        binding: ChannelBinding<'_>,
        verifier: Option<Verifier>,
        made_up: Verifier,
        our_nonce: &str,
    ) -> Result<Self, ScramError> {
        let text = std::str::from_utf8(client_first).map_err(|_| ScramError::Malformed)?;
        let (flag, rest) = text.split_once(',').ok_or(ScramError::Malformed)?;
        let expected_binding = expected_binding(flag, binding)?;
        let is_bound = matches!(binding, ChannelBinding::EndPoint(_));
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
        Ok(Self { verifier, doomed, expected_binding, is_bound, nonce, said, server_first })
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
        if binding != self.expected_binding {
            return Err(if self.is_bound { ScramError::OtherEndPoint } else { ScramError::BindingAttribute });
        }
        if nonce != self.nonce {
            return Err(ScramError::Nonce);
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

/// What `c=` must say after a first message with this flag: the flag again, and what is bound to, in base64.
fn expected_binding(flag: &str, binding: ChannelBinding<'_>) -> Result<String, ScramError> {
    let kind = flag.strip_prefix("p=");
    match (flag, binding) {
        ("n", ChannelBinding::NotOffered | ChannelBinding::Declined) => Ok(BASE64.encode("n,,")),
        ("y", ChannelBinding::NotOffered) => Ok(BASE64.encode("y,,")),
        ("y", ChannelBinding::Declined) => Err(ScramError::Downgraded),
        (_, ChannelBinding::EndPoint(digest)) => match kind {
            Some(END_POINT) => Ok(BASE64.encode([b"p=", END_POINT.as_bytes(), b",,", digest].concat())),
            Some(_) => Err(ScramError::BindingType),
            None => Err(ScramError::Malformed),
        },
        (_, ChannelBinding::NotOffered | ChannelBinding::Declined) => Err(ScramError::Malformed),
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
        let mut client = ScramSha256::new(given.as_bytes(), ClientBinding::unsupported());
        let verifier =
            stored.map(|stored| Verifier::parse(&password::scram_sha_256(stored.as_bytes())).expect("valid"));
        let made_up = Verifier::made_up("ann", NOBODY);
        let exchange = Exchange::begin(client.message(), ChannelBinding::NotOffered, verifier, made_up, "ours")
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

    fn answered(first: &str, binding: ChannelBinding<'_>) -> Result<Exchange, ScramError> {
        Exchange::begin(first.as_bytes(), binding, None, Verifier::made_up("a", NOBODY), "x")
    }

    #[test]
    fn the_flags_mean_what_rfc_5802_says() {
        use ChannelBinding::{Declined, EndPoint, NotOffered};
        let bound = EndPoint(b"digest");
        let table = [
            ("n", NotOffered, Ok("biws")),
            ("y", NotOffered, Ok("eSws")),
            ("p=tls-server-end-point", NotOffered, Err(ScramError::Malformed)),
            ("n", Declined, Ok("biws")),
            ("y", Declined, Err(ScramError::Downgraded)),
            ("p=tls-server-end-point", Declined, Err(ScramError::Malformed)),
            ("n", bound, Err(ScramError::Malformed)),
            ("y", bound, Err(ScramError::Malformed)),
            ("p=tls-unique", bound, Err(ScramError::BindingType)),
            ("p=tls-server-end-point", bound, Ok("cD10bHMtc2VydmVyLWVuZC1wb2ludCwsZGlnZXN0")),
            ("", NotOffered, Err(ScramError::Malformed)),
        ];
        for (flag, binding, expected) in table {
            let found = answered(&format!("{flag},,n=,r=abc"), binding);
            let found = found.map(|exchange| exchange.expected_binding);
            assert_eq!(found, expected.map(str::to_owned), "{flag} with {binding:?}");
        }
    }

    #[test]
    fn a_digest_of_another_certificate_is_refused() {
        let verifier = || Verifier::parse(&password::scram_sha_256(b"secret")).expect("valid");
        let converse = |seen: &[u8], ours: &[u8]| {
            let mut client = ScramSha256::new(b"secret", ClientBinding::tls_server_end_point(seen.to_vec()));
            let binding = ChannelBinding::EndPoint(ours);
            let exchange = Exchange::begin(client.message(), binding, Some(verifier()), verifier(), "ours")?;
            client.update(exchange.server_first().as_bytes()).expect("acceptable");
            exchange.finish(client.message())
        };
        assert!(converse(b"the same", b"the same").expect("bound").is_some());
        assert_eq!(converse(b"another", b"the same").err(), Some(ScramError::OtherEndPoint));
    }

    #[test]
    fn who_wants_another_identity_or_an_extension_is_refused() {
        let begin = |first| answered(first, ChannelBinding::NotOffered).err();
        assert_eq!(begin("n,a=bob,n=,r=abc"), Some(ScramError::AuthorizationIdentity));
        assert_eq!(begin("n,,m=1,n=,r=abc"), Some(ScramError::Malformed));
        assert_eq!(begin("n,,n=,r="), Some(ScramError::Malformed));
        let exchange = || answered("y,,n=,r=abc", ChannelBinding::NotOffered).expect("valid");
        let proof = BASE64.encode([0; 32]);
        let last =
            |binding: &str, nonce: &str| exchange().finish(format!("c={binding},r={nonce},p={proof}").as_bytes()).err();
        assert_eq!(last("biws", "abcx"), Some(ScramError::BindingAttribute));
        assert_eq!(last("eSws", "abcy"), Some(ScramError::Nonce));
        assert_eq!(last("eSws", "abcx"), None, "a wrong proof, but well formed");
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
            for binding in [ChannelBinding::NotOffered, ChannelBinding::Declined, ChannelBinding::EndPoint(&last)] {
                let _ = Exchange::begin(&first, binding, None, Verifier::made_up("a", NOBODY), "x");
            }
            let exchange = answered("n,,n=,r=abc", ChannelBinding::NotOffered).expect("valid");
            let _ = exchange.finish(&last);
        }

        #[test]
        fn near_misses_are_read_without_a_panic(first in "[nyp],[a=]?,n=[a-z]{0,3},r=[!-~]{0,5}", last in "c=biws,r=[a-z]{0,5},p=[A-Za-z0-9+/=]{0,44}") {
            if let Ok(exchange) = answered(&first, ChannelBinding::NotOffered) {
                let _ = exchange.finish(last.as_bytes());
            }
        }
    }
}
