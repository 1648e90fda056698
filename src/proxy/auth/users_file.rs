//! The users file: `"user" "password or verifier"` lines, PgBouncer's format.
//!
//! Names and secrets stand in double quotes, a double quote inside is doubled; lines that do not begin with a quote are
//! comments. A secret that begins with `SCRAM-SHA-256$` or is `md5` and 32 hexadecimal digits is a verifier.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::config::Secret;
use crate::wire::scram::Verifier;

/// What is stored for a user.
#[derive(Clone, Debug)]
pub(in crate::proxy) enum Stored {
    /// A SCRAM verifier.
    Scram(Verifier),
    /// `md5` and the digest.
    Md5(Secret),
    /// The password itself.
    Plain {
        /// In clear text.
        password: Secret,
        /// Made from it when it is first needed (4096 rounds), with a salt that then stays.
        verifier: Arc<OnceLock<Option<Verifier>>>,
    },
}

impl Stored {
    /// Tells what kind of secret `text` is.
    pub(in crate::proxy) fn read(text: &str) -> Option<Self> {
        if text.is_empty() {
            return None;
        }
        if let Some(verifier) = Verifier::parse(text) {
            return Some(Self::Scram(verifier));
        }
        if text.strip_prefix("md5").is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Some(Self::Md5(Secret::new(text)));
        }
        Some(Self::Plain { password: Secret::new(text), verifier: Arc::default() })
    }

    /// A secret that nobody has: an empty one lets nobody in, as in PgBouncer, whatever the server would say of the user.
    fn nobodys() -> Self {
        let password = Secret::new(format!("{:032x}", rand::random::<u128>()));
        Self::Plain { password, verifier: Arc::default() }
    }

    /// The SCRAM verifier, where there is or can be one.
    pub(in crate::proxy) fn scram_verifier(&self) -> Option<Verifier> {
        match self {
            Self::Scram(verifier) => Some(verifier.clone()),
            Self::Md5(_) => None,
            Self::Plain { password, verifier } => {
                let made =
                    || Verifier::parse(&postgres_protocol::password::scram_sha_256(password.expose().as_bytes()));
                verifier.get_or_init(made).clone()
            }
        }
    }
}

impl Stored {
    /// Whether nothing has to be computed before a client can be asked.
    pub(in crate::proxy) fn is_ready(&self) -> bool {
        match self {
            Self::Scram(_) | Self::Md5(_) => true,
            Self::Plain { verifier, .. } => verifier.get().is_some(),
        }
    }

    /// Takes over what `earlier` has computed, if it is the same secret.
    pub(in crate::proxy) fn keep_work_of(&mut self, earlier: &Self) {
        if let (Self::Plain { password, verifier }, Self::Plain { password: same, verifier: made }) = (self, earlier)
            && *password == *same
        {
            verifier.clone_from(made);
        }
    }
}

/// Reads the file's text. Returns the users and the numbers of lines that make no sense.
pub(in crate::proxy) fn parse(text: &str) -> (HashMap<String, Stored>, Vec<usize>) {
    let mut users = HashMap::new();
    let mut bad = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if !line.starts_with('"') {
            continue;
        }
        let parsed = quoted(line).and_then(|(user, rest)| {
            let (secret, _rest) = quoted(rest.trim_start())?;
            Some((user, secret))
        });
        match parsed {
            Some((user, secret)) => {
                users.insert(user, Stored::read(&secret).unwrap_or_else(Stored::nobodys));
            }
            None => bad.push(index + 1),
        }
    }
    (users, bad)
}

/// A quoted string at the front of `text`, unquoted, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut rest = text.strip_prefix('"')?;
    let mut value = String::new();
    loop {
        let end = rest.find('"')?;
        value.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(after) => {
                value.push('"');
                rest = after;
            }
            None => return Some((value, rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pgbouncers_format_is_read() {
        let text = concat!(
            "; comment\n\"ann\" \"secret\"\n",
            "\"b\"\"ob\" \"md50123456789abcdef0123456789abcdef\" ignored\n",
            "\"cy\" \"SCRAM-SHA-256$4096:c2FsdA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\n",
            "\"dee\" \"known\"\n\"dee\" \"\"\n\"broken\n",
        );
        let (users, bad) = parse(text);
        assert!(matches!(users.get("ann"), Some(Stored::Plain { password, .. }) if password.expose() == "secret"));
        assert!(matches!(users.get("b\"ob"), Some(Stored::Md5(_))));
        assert!(matches!(users.get("cy"), Some(Stored::Scram(_))));
        let nobodys = |password: &str| !password.is_empty() && password != "known";
        assert!(matches!(users.get("dee"), Some(Stored::Plain { password, .. }) if nobodys(password.expose())));
        assert_eq!(bad, [7]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "[\"a\\n ]{0,60}") {
            let _ = parse(&text);
        }
    }
}
