//! Keys of passwords: 4096 rounds of HMAC each, so they are computed once and remembered.
//!
//! A proxy that knows a password in clear text logs in to the same server with it again and again, and the server's salt
//! stays the same until the password is changed. What is remembered is found by a digest under a secret of this process;
//! passwords themselves are not kept here.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use zeroize::{Zeroize as _, Zeroizing};

/// Passwords whose keys are remembered at one time; beyond it, all are forgotten.
const KNOWN_MAX: usize = 10_000;

/// ClientKey and ServerKey of RFC 5802. Wiped when dropped.
#[derive(Clone, PartialEq, Eq, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub(super) struct Keys {
    pub(super) client_key: [u8; 32],
    pub(super) server_key: [u8; 32],
}

/// What has been derived so far. Shared by all logins to one server.
pub(super) struct DerivedKeys {
    secret: [u8; 32],
    known: Mutex<HashMap<[u8; 32], Keys>>,
}

impl DerivedKeys {
    /// Nothing is known yet.
    pub(super) fn new() -> Self {
        Self { secret: rand::random(), known: Mutex::default() }
    }

    /// The keys of `password` with a server's salt and number of rounds.
    pub(super) fn of(&self, password: &str, salt: &[u8], rounds: u32) -> Keys {
        let name = self.name_of(password, salt, rounds);
        if let Some(known) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&name) {
            return known.clone();
        }
        // Outside of the lock: several logins at once may all compute it, once.
        let keys = derive(password, salt, rounds);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(name, keys.clone());
        keys
    }

    fn name_of(&self, password: &str, salt: &[u8], rounds: u32) -> [u8; 32] {
        let mut mac = keyed(&self.secret);
        mac.update(&rounds.to_be_bytes());
        mac.update(&(salt.len() as u64).to_be_bytes());
        mac.update(salt);
        mac.update(password.as_bytes());
        mac.finalize().into_bytes().into()
    }
}

/// RFC 5802, section 3: Hi, ClientKey and ServerKey. The password is prepared as PostgreSQL's clients do: where SASLprep
/// refuses it, it is taken as it is.
fn derive(password: &str, salt: &[u8], rounds: u32) -> Keys {
    let prepared = stringprep::saslprep(password).map_or_else(|_| password.to_owned(), std::borrow::Cow::into_owned);
    let prepared = Zeroizing::new(prepared);
    let password = keyed(prepared.as_bytes());
    let mut first = password.clone();
    first.update(salt);
    first.update(&1u32.to_be_bytes());
    let mut block: [u8; 32] = first.finalize().into_bytes().into();
    let mut salted = Zeroizing::new(block);
    for _ in 1..rounds {
        let mut next = password.clone();
        next.update(&block);
        block = next.finalize().into_bytes().into();
        salted.iter_mut().zip(block).for_each(|(sum, byte)| *sum ^= byte);
    }
    block.zeroize();
    let key = |label: &[u8]| {
        let mut mac = keyed(&*salted);
        mac.update(label);
        mac.finalize().into_bytes().into()
    };
    Keys { client_key: key(b"Client Key"), server_key: key(b"Server Key") }
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use postgres_protocol::password;

    use super::*;

    /// `SCRAM-SHA-256$<rounds>:<salt>$<StoredKey>:<ServerKey>`, as PostgreSQL's client library makes it.
    fn matches(given: &str) -> bool {
        let verifier = password::scram_sha_256(given.as_bytes());
        let mut parts = verifier.split(['$', ':']).skip(1);
        let rounds = parts.next().and_then(|rounds| rounds.parse().ok()).expect("rounds");
        let mut bytes = || BASE64.decode(parts.next().expect("a part")).expect("base64");
        let (salt, stored_key, server_key) = (bytes(), bytes(), bytes());
        let keys = DerivedKeys::new().of(given, &salt, rounds);
        let digest: [u8; 32] =
            sha2::Digest::finalize(<Sha256 as sha2::Digest>::new_with_prefix(keys.client_key)).into();
        digest[..] == stored_key && keys.server_key[..] == server_key
    }

    #[test]
    fn the_keys_are_those_of_postgresqls_verifiers() {
        // The third is prepared (a soft hyphen and a full-width letter), the fourth cannot be (a control character).
        for given in ["pencil", "pässwörd", "I\u{ad}X \u{ff21}", "bell\u{7}", ""] {
            assert!(matches(given), "{given:?}");
        }
    }

    #[test]
    fn a_password_is_derived_once_for_each_salt_and_number_of_rounds() {
        let derived = DerivedKeys::new();
        let count = || derived.known.lock().expect("no panic").len();
        let first = derived.of("secret", b"salt", 2);
        assert!(first == derived.of("secret", b"salt", 2));
        assert_eq!(count(), 1);
        for (password, salt, rounds) in [("other", &b"salt"[..], 2), ("secret", b"pepper", 2), ("secret", b"salt", 3)] {
            assert!(first != derived.of(password, salt, rounds), "{password} {salt:?} {rounds}");
        }
        assert_eq!(count(), 4);
        for number in 0..KNOWN_MAX {
            derived.of(&number.to_string(), b"salt", 1);
        }
        assert!(count() <= KNOWN_MAX);
    }
}
