//! SCRAM-SHA-256 towards a server with keys instead of a password (RFC 5802, RFC 7677).
//!
//! A client that has logged in to the proxy has shown its ClientKey; with it the proxy can log in to a server that
//! holds the same verifier, without ever knowing the password. The ServerKey proves the server in return.
//! Pure: no socket. Never prints a key, a nonce or a proof.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The one mechanism spoken here; channel binding (`-PLUS`) would need the client's own TLS session.
pub(super) const MECHANISM: &str = "SCRAM-SHA-256";

/// GS2 header: no channel binding, no authorization identity.
const GS2_HEADER: &str = "n,,";

/// Why an exchange failed; names no secret.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ScramError {
    /// The server's message is not what RFC 5802 says.
    #[error("malformed SCRAM message from the server")]
    Malformed,
    /// The server's nonce does not continue ours.
    #[error("the server's SCRAM nonce does not continue ours")]
    Nonce,
    /// `e=…` in the server's final message.
    #[error("the server refused the SCRAM proof: {0}")]
    Refused(String),
    /// The server could not show the ServerKey.
    #[error("the server did not prove that it holds this role's verifier")]
    Server,
}

/// More rounds than this are not computed for a server: 4096 are the rule, and they keep a thread busy.
const ROUNDS_MAX: u32 = 1_000_000;

/// A nonce of ours.
pub(super) fn fresh_nonce() -> String {
    BASE64.encode(rand::random::<[u8; 18]>())
}

/// The client-first message. PostgreSQL takes the role from the startup packet and ignores `n=`.
pub(super) fn first_message(nonce: &str) -> String {
    format!("{GS2_HEADER}n=,r={nonce}")
}

/// Salt and number of rounds in a server-first message, for keys that have to be derived from a password.
pub(super) fn salt_and_rounds(server_first: &[u8]) -> Result<(Vec<u8>, u32), ScramError> {
    let server_first = std::str::from_utf8(server_first).map_err(|_| ScramError::Malformed)?;
    let mut attributes = server_first.split(',').skip(1);
    let mut attribute =
        |key: &str| attributes.next().and_then(|text| text.strip_prefix(key)).ok_or(ScramError::Malformed);
    let salt = BASE64.decode(attribute("s=")?).map_err(|_| ScramError::Malformed)?;
    let rounds = attribute("i=")?.parse().map_err(|_| ScramError::Malformed)?;
    if (1..=ROUNDS_MAX).contains(&rounds) { Ok((salt, rounds)) } else { Err(ScramError::Malformed) }
}

/// The exchange before the server's first message.
#[derive(zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub(super) struct ScramClient {
    client_key: [u8; 32],
    server_key: [u8; 32],
    nonce: String,
}

/// The exchange before the server's final message.
pub(super) struct AwaitingServerSignature {
    server_signature: [u8; 32],
}

impl ScramClient {
    /// Starts an exchange with a fresh nonce.
    pub(super) fn new(client_key: [u8; 32], server_key: [u8; 32]) -> Self {
        Self::with_nonce(client_key, server_key, fresh_nonce())
    }

    pub(super) fn with_nonce(client_key: [u8; 32], server_key: [u8; 32], nonce: String) -> Self {
        Self { client_key, server_key, nonce }
    }

    /// The client-first message.
    pub(super) fn first_message(&self) -> String {
        first_message(&self.nonce)
    }

    /// Answers the server-first message with the client-final message.
    pub(super) fn answer(self, server_first: &[u8]) -> Result<(AwaitingServerSignature, String), ScramError> {
        let server_first = std::str::from_utf8(server_first).map_err(|_| ScramError::Malformed)?;
        let mut attributes = server_first.split(',');
        let mut attribute =
            |key: &str| attributes.next().and_then(|text| text.strip_prefix(key)).ok_or(ScramError::Malformed);
        let nonce = attribute("r=")?;
        let _salt = attribute("s=")?;
        let _iterations = attribute("i=")?;
        if nonce.len() <= self.nonce.len() || !nonce.starts_with(&self.nonce) {
            return Err(ScramError::Nonce);
        }

        let without_proof = format!("c={},r={nonce}", BASE64.encode(GS2_HEADER));
        let auth_message = format!("n=,r={},{server_first},{without_proof}", self.nonce);
        let stored_key: [u8; 32] = Sha256::digest(self.client_key).into();
        let mut proof = hmac_sha256(&stored_key, auth_message.as_bytes());
        proof.iter_mut().zip(self.client_key).for_each(|(byte, key)| *byte ^= key);
        let server_signature = hmac_sha256(&self.server_key, auth_message.as_bytes());
        Ok((AwaitingServerSignature { server_signature }, format!("{without_proof},p={}", BASE64.encode(proof))))
    }
}

impl AwaitingServerSignature {
    /// Checks the server-final message in constant time.
    pub(super) fn finish(self, server_final: &[u8]) -> Result<(), ScramError> {
        let text = std::str::from_utf8(server_final).map_err(|_| ScramError::Malformed)?;
        let first = text.split(',').next().unwrap_or_default();
        if let Some(error) = first.strip_prefix("e=") {
            return Err(ScramError::Refused(error.to_owned()));
        }
        let signature = first.strip_prefix("v=").ok_or(ScramError::Malformed)?;
        let signature = BASE64.decode(signature).map_err(|_| ScramError::Malformed)?;
        if bool::from(signature.ct_eq(&self.server_signature)) { Ok(()) } else { Err(ScramError::Server) }
    }
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7677 section 3: user `user`, password `pencil`. There the client sends `n=user`; PostgreSQL's clients send
    /// an empty name, so the signatures are recomputed by a server half written out here.
    fn keys() -> ([u8; 32], [u8; 32]) {
        let salt = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").expect("base64");
        let mut block = hmac_sha256(b"pencil", &[salt.as_slice(), &[0, 0, 0, 1]].concat());
        let mut salted = block;
        for _ in 1..4096 {
            block = hmac_sha256(b"pencil", &block);
            salted.iter_mut().zip(block).for_each(|(sum, byte)| *sum ^= byte);
        }
        (hmac_sha256(&salted, b"Client Key"), hmac_sha256(&salted, b"Server Key"))
    }

    const SERVER_FIRST: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";

    #[test]
    fn proof_recovers_the_client_key_and_the_signature_is_checked() {
        let (client_key, server_key) = keys();
        let client = ScramClient::with_nonce(client_key, server_key, "rOprNGfwEbeRWgbNEkqO".to_owned());
        assert_eq!(client.first_message(), "n,,n=,r=rOprNGfwEbeRWgbNEkqO");
        let (waiting, last) = client.answer(SERVER_FIRST.as_bytes()).expect("valid server-first");
        let (without_proof, proof) = last.split_once(",p=").expect("proof");
        assert_eq!(without_proof, "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0");

        // The server's half: it holds StoredKey = H(ClientKey) and ServerKey.
        let auth_message = format!("n=,r=rOprNGfwEbeRWgbNEkqO,{SERVER_FIRST},{without_proof}");
        let stored_key: [u8; 32] = Sha256::digest(client_key).into();
        let mut recovered = hmac_sha256(&stored_key, auth_message.as_bytes());
        let proof = BASE64.decode(proof).expect("base64");
        recovered.iter_mut().zip(proof).for_each(|(byte, sent)| *byte ^= sent);
        assert_eq!(recovered, client_key);
        let signature = BASE64.encode(hmac_sha256(&server_key, auth_message.as_bytes()));
        assert_eq!(waiting.finish(format!("v={signature}").as_bytes()), Ok(()));
    }

    #[test]
    fn the_keys_are_those_of_rfc_7677() {
        let (client_key, server_key) = keys();
        let auth_message = format!(
            "n=user,r=rOprNGfwEbeRWgbNEkqO,{SERVER_FIRST},c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
        );
        let signature = BASE64.encode(hmac_sha256(&server_key, auth_message.as_bytes()));
        assert_eq!(signature, "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
        let stored_key: [u8; 32] = Sha256::digest(client_key).into();
        let mut proof = hmac_sha256(&stored_key, auth_message.as_bytes());
        proof.iter_mut().zip(client_key).for_each(|(byte, key)| *byte ^= key);
        assert_eq!(BASE64.encode(proof), "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
    }

    #[test]
    fn salt_and_rounds_are_read_and_bounded() {
        assert_eq!(salt_and_rounds(b"r=abc,s=c2FsdA==,i=4096"), Ok((b"salt".to_vec(), 4096)));
        for bad in ["r=abc,s=c2FsdA==,i=0", "r=abc,s=c2FsdA==,i=4294967295", "r=abc,s=!,i=1", "r=abc,i=1,s=", "r=abc"] {
            assert_eq!(salt_and_rounds(bad.as_bytes()), Err(ScramError::Malformed), "{bad}");
        }
    }

    #[test]
    fn a_server_that_lies_is_refused() {
        let client = || ScramClient::with_nonce([1; 32], [2; 32], "abc".to_owned());
        let refused = |first: &str| client().answer(first.as_bytes()).err();
        assert_eq!(refused("r=abd9,s=AA==,i=1"), Some(ScramError::Nonce));
        assert_eq!(refused("r=abc,s=AA==,i=1"), Some(ScramError::Nonce));
        assert_eq!(refused("s=AA==,r=abc1,i=1"), Some(ScramError::Malformed));
        let answered = || client().answer(b"r=abc1,s=AA==,i=1").expect("valid").0;
        assert_eq!(answered().finish(b"v=AAAA"), Err(ScramError::Server));
        assert_eq!(answered().finish(b"e=invalid-proof"), Err(ScramError::Refused("invalid-proof".to_owned())));
        assert_eq!(answered().finish(b"\xff"), Err(ScramError::Malformed));
    }
}
