//! Creating with an `Idempotency-Key`: the same call twice has the effect of one.
//!
//! The keys are kept in memory and bounded; when one is forgotten, the migration's name still keeps a repeated call from
//! making a second migration: it is then answered with 409.

use std::collections::VecDeque;

use axum::http::{HeaderMap, StatusCode};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use super::problem::Problem;
use crate::migration::view::MigrationName;

/// The header's name.
pub(super) const HEADER: &str = "idempotency-key";

/// Longest key.
const KEY_BYTES: usize = 255;

/// Keys that are remembered.
const KEYS: usize = 1000;

/// The keys that were seen. Held while a migration is created, so that two calls at once do not both create.
#[derive(Default)]
pub(super) struct Keys(pub(super) Mutex<Seen>);

/// See [`Keys`].
#[derive(Default)]
pub(super) struct Seen(VecDeque<(String, [u8; 32], MigrationName)>);

/// The key of a call, if it has one.
pub(super) fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get(HEADER) else { return Ok(None) };
    let text = value.to_str().ok().filter(|text| !text.is_empty() && text.len() <= KEY_BYTES);
    let wrong = || Problem::new(StatusCode::BAD_REQUEST, "invalid", "Idempotency-Key is 1 to 255 characters of ASCII");
    text.map(|text| Some(text.to_owned())).ok_or_else(wrong)
}

impl Seen {
    /// What this call has made before; an error when the key came with another body.
    pub(super) fn find(&self, key: &str, body: &[u8]) -> Result<Option<MigrationName>, Problem> {
        let Some((_, digest, name)) = self.0.iter().find(|(known, ..)| known == key) else { return Ok(None) };
        if *digest == digest_of(body) {
            return Ok(Some(name.clone()));
        }
        let detail = "this Idempotency-Key was used with another body";
        Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "key_reused", detail)
            .hint("use a new key for each migration"))
    }

    /// Remembers what this call has made.
    pub(super) fn remember(&mut self, key: String, body: &[u8], name: MigrationName) {
        if self.0.len() == KEYS {
            self.0.pop_front();
        }
        self.0.push_back((key, digest_of(body), name));
    }
}

fn digest_of(body: &[u8]) -> [u8; 32] {
    Sha256::digest(body).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_for_one_body_and_the_oldest_is_forgotten() {
        let mut seen = Seen::default();
        let name: MigrationName = "m1".parse().expect("a name");
        seen.remember("k".to_owned(), b"body", name.clone());
        assert_eq!(seen.find("k", b"body"), Ok(Some(name.clone())));
        assert!(seen.find("k", b"other").is_err());
        assert_eq!(seen.find("other", b"body"), Ok(None));
        for number in 0..KEYS {
            seen.remember(number.to_string(), b"", name.clone());
        }
        assert_eq!(seen.find("k", b"body"), Ok(None));
    }
}
