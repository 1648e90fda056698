//! What decides who is let in, as far as it is read from files: one value, replaced as a whole by a reload.
//!
//! A login works with the value that was in force when its connection came. What cannot be read never replaces what
//! can: either everything is new, or everything stays.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use super::auth::Lookup;
use super::auth::hba::{CertificateCheck, Rules};
use super::auth::user_maps::UserMaps;
use super::auth::users_file::{self, Stored};
use super::tls::ServerTls;
use crate::config::{ClientCertificates, Config, Network};
use crate::shutdown::Tasks;
use crate::telemetry::metrics::Metrics;

/// Everything a login needs to know about files. Never changed once it is made.
pub(super) struct Access {
    /// None: TLS is not spoken.
    pub(super) tls: Option<ServerTls>,
    /// See `listen.proxy_protocol_from`.
    pub(super) balancers: Vec<Network>,
    /// Who is asked for what.
    pub(super) rules: Rules,
    /// From names in certificates to roles.
    pub(super) maps: UserMaps,
    /// Where verifiers are found.
    pub(super) lookup: Arc<Lookup>,
}

/// A file that the configuration names cannot be used. Says which, and where in it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AccessError(String);

impl Access {
    /// Reads every file that `config` names.
    pub(super) fn load(config: &Config) -> Result<Self, AccessError> {
        let tls = config.listen.tls.as_ref().map(ServerTls::load).transpose();
        let auth = &config.auth;
        let rules = match &auth.hba_file {
            Some(path) => parsed("hba_file", path, Rules::parse)?,
            None => Rules::everybody(auth.method),
        };
        let maps = match &auth.ident_file {
            Some(path) => parsed("ident_file", path, UserMaps::parse)?,
            None => UserMaps::default(),
        };
        let users = match &auth.users_file {
            Some(path) => parsed("users_file", path, users)?,
            None => HashMap::new(),
        };
        let access = Self {
            tls: tls.map_err(|error| AccessError(format!("[listen] TLS: {error}")))?,
            balancers: config.listen.proxy_protocol_from.clone(),
            rules,
            maps,
            lookup: Arc::new(Lookup {
                query: auth.auth_query.clone(),
                database: auth.auth_database.clone().unwrap_or_else(|| config.control.database.clone()),
                keep: auth.verifier_cache,
                users,
            }),
        };
        access.check_rules(config)?;
        Ok(access)
    }

    /// Rules that ask for something that nobody can have.
    fn check_rules(&self, config: &Config) -> Result<(), AccessError> {
        let Some(path) = &config.auth.hba_file else { return Ok(()) };
        let asks = config.listen.tls.as_ref().is_some_and(|tls| tls.client_certificates != ClientCertificates::Off);
        let mut problems = Vec::new();
        for (line, demand) in self.rules.demands() {
            if demand.certificate != CertificateCheck::None && !asks {
                problems.push((line, "asks for a client certificate, which needs [listen] tls_client_ca".to_owned()));
            }
            if let Some(map) = demand.map.as_ref().filter(|map| !self.maps.has(map)) {
                problems.push((line, format!("there is no map {map:?} in auth.ident_file")));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(listed("hba_file", path, &problems)) }
    }

    /// The same with the keys that `earlier` has derived from passwords which have stayed the same.
    pub(super) fn with_work_of(mut self, earlier: &Self) -> Self {
        if let Some(lookup) = Arc::get_mut(&mut self.lookup) {
            for (name, stored) in &mut lookup.users {
                if let Some(known) = earlier.lookup.users.get(name) {
                    stored.keep_work_of(known);
                }
            }
        }
        self
    }

    /// Derives the keys of clear text passwords before anybody asks, so that no worker has to, and so that the first
    /// login of a user that exists takes no longer than that of one that does not.
    pub(super) fn prepare(self: &Arc<Self>, tasks: &Tasks, runtime: &tokio::runtime::Handle) {
        if self.lookup.users.values().all(Stored::is_ready) {
            return;
        }
        let (lookup, tasks) = (self.lookup.clone(), tasks.clone());
        // Ends with the tasks, at the latest after the one key it is at.
        let _ends_by_itself = runtime.spawn_blocking(move || {
            for stored in lookup.users.values().take_while(|_| !tasks.is_stopping()) {
                let _derived = stored.scram_verifier();
            }
        });
    }

    /// What is worth watching from outside.
    pub(super) fn show_in(&self, metrics: &Metrics) {
        let not_after = self.tls.as_ref().and_then(|tls| tls.not_after);
        metrics.tls_certificate_not_after_seconds.set(not_after.unwrap_or(0));
    }
}

/// Lines by number, and what is wrong with them.
type Problems = Vec<(usize, String)>;

fn users(text: &str) -> Result<HashMap<String, Stored>, Problems> {
    let (users, bad) = users_file::parse(text);
    if bad.is_empty() {
        return Ok(users);
    }
    let words = "expected \"name\" \"password or verifier\", each in double quotes";
    Err(bad.into_iter().map(|line| (line, words.to_owned())).collect())
}

fn parsed<T>(key: &str, path: &Path, parse: impl Fn(&str) -> Result<T, Problems>) -> Result<T, AccessError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| AccessError(format!("[auth] {key}: cannot read {}: {error}", path.display())))?;
    // It may hold passwords.
    let text = zeroize::Zeroizing::new(text);
    parse(&text).map_err(|problems| listed(key, path, &problems))
}

fn listed(key: &str, path: &Path, problems: &Problems) -> AccessError {
    let mut text = format!("[auth] {key}:");
    for (line, message) in problems {
        let _infallible = write!(text, "\n{}:{line}: {message}", path.display());
    }
    AccessError(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Server;

    fn load(rules: &str, maps: &str, users: &str) -> Result<Access, String> {
        let directory = tempfile::tempdir().expect("made");
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).expect("written");
            path
        };
        let mut config = Config::new(Server::new("a", 1, "u"), Server::new("b", 1, "u"));
        config.auth.hba_file = Some(file("hba", rules));
        config.auth.ident_file = Some(file("ident", maps));
        config.auth.users_file = Some(file("users", users));
        let directory = directory.path().display().to_string();
        Access::load(&config).map_err(|error| error.to_string().replace(&directory, "D"))
    }

    #[test]
    fn derived_keys_are_kept_as_long_as_their_password_is() {
        let users = "\"ann\" \"secret\"\n\"bob\" \"secret\"\n\"cy\" \"md50123456789abcdef0123456789abcdef\"";
        let verifier = |access: &Access, name: &str| access.lookup.users[name].scram_verifier();
        let first = load("", "", users).expect("valid");
        let (ann, bob) = (verifier(&first, "ann"), verifier(&first, "bob"));
        assert!(ann.is_some() && ann != bob, "each has a salt of its own");
        let second = load("", "", &users.replace("\"bob\" \"secret\"", "\"bob\" \"changed\"")).expect("valid");
        let second = second.with_work_of(&first);
        assert!(second.lookup.users["ann"].is_ready() && !second.lookup.users["bob"].is_ready());
        assert!(second.lookup.users["cy"].is_ready(), "there is nothing to derive");
        assert_eq!(verifier(&second, "ann"), ann);
        assert_ne!(verifier(&second, "bob"), bob);
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_line() {
        assert!(load("local all all trust", "m a b", "\"ann\" \"secret\"").is_ok());
        let found = |rules, maps, users| load(rules, maps, users).err().expect("refused");
        assert_eq!(
            found("local all all what\n\nhost all", "", ""),
            "[auth] hba_file:\nD/hba:1: authentication method \"what\" is not supported; it may be trust, reject, \
             scram-sha-256, md5, password or cert\nD/hba:3: end-of-line before role specification"
        );
        assert_eq!(found("", "a b", ""), "[auth] ident_file:\nD/ident:1: missing entry at end of line: the role");
        let error = found("", "", "\"ann\" \"s3cret\"\n\"bob s3cret");
        assert!(error.starts_with("[auth] users_file:\nD/users:2: expected") && !error.contains("s3cret"), "{error}");
        assert_eq!(
            found("hostssl all all all cert map=m", "", ""),
            "[auth] hba_file:\nD/hba:1: asks for a client certificate, which needs [listen] tls_client_ca\n\
             D/hba:1: there is no map \"m\" in auth.ident_file"
        );
    }
}
