//! A session's state where several clients share a backend: the part that is given to whichever backend the client
//! gets next, and the part that keeps it on the one that it has.

use std::hash::{Hash, Hasher};

use bytes::Bytes;

use super::state::{Origin, SessionState};
use super::{Blocker, Traces};

/// Settings that change neither what a statement means nor what it answers, so that statements may be shared by
/// sessions that differ in them.
const WITHOUT_MEANING: [&str; 10] = [
    "application_name",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "transaction_timeout",
    "client_min_messages",
    "log_statement",
    "log_min_duration_statement",
    "tcp_keepalives_idle",
];

/// What a session has that stays on its backend. Displays in words for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tie {
    /// LISTEN.
    Listen,
    /// PREPARE by SQL.
    SqlPrepare,
    /// Something that no other backend can be given.
    Holds(Blocker),
    /// A prepared statement of the protocol, where these are not shared.
    Statements,
}

impl std::fmt::Display for Tie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Listen => f.write_str("LISTEN"),
            Self::SqlPrepare => f.write_str("PREPARE"),
            Self::Holds(Blocker::AdvisoryLocks { .. }) => f.write_str("advisory lock"),
            Self::Holds(Blocker::HoldableCursors { .. }) => f.write_str("cursor WITH HOLD"),
            Self::Holds(Blocker::TemporaryObjects { .. }) => f.write_str("temporary object"),
            Self::Holds(blocker) => blocker.fmt(f),
            Self::Statements => f.write_str("prepared statement"),
        }
    }
}

impl SessionState {
    /// What keeps the session on its backend.
    pub fn ties(&self) -> Vec<Tie> {
        let mut ties: Vec<Tie> = self.blockers.iter().cloned().map(Tie::Holds).collect();
        if !self.channels.is_empty() {
            ties.push(Tie::Listen);
        }
        if self.statements.values().any(|statement| matches!(statement.origin, Origin::Sql { .. })) {
            ties.push(Tie::SqlPrepare);
        }
        ties
    }

    /// Names of the custom settings, which no server lists.
    pub fn custom_names(&self) -> Vec<String> {
        self.settings.keys().filter(|name| name.contains('.')).cloned().collect()
    }

    /// Whether the backend has a statement of this name.
    pub fn has_statement(&self, name: &[u8]) -> bool {
        self.statements.contains_key(name)
    }

    /// Settings and role alone: what another backend is given.
    #[must_use]
    pub fn into_settings(self) -> Self {
        Self { transport: self.transport, settings: self.settings, identity: self.identity, ..Self::default() }
    }

    /// With what a client asked for in its startup packet.
    #[must_use]
    pub fn with_settings<'a>(mut self, settings: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        for (name, value) in settings {
            let value = Bytes::copy_from_slice(value.as_bytes());
            // Who the session acts as is brought behind the settings, and would take the place of these two.
            match name.to_ascii_lowercase().as_str() {
                "role" => self.identity.role = Some(value),
                "session_authorization" => self.identity.session_authorization = Some(value),
                _ => drop(self.settings.insert(name.to_owned(), value)),
            }
        }
        self
    }

    /// RESET takes a setting back to what the client connected with, so what is missing here is taken from there.
    #[must_use]
    pub fn reset_to(mut self, startup: &Self) -> Self {
        for (name, value) in &startup.settings {
            if !self.settings.contains_key(name) {
                self.settings.insert(name.clone(), value.clone());
            }
        }
        self
    }

    /// What the meaning of a statement's text depends on.
    #[must_use]
    pub fn meaning(&self) -> Self {
        let mut meaning = self.clone().into_settings();
        meaning.settings.retain(|name, _| !WITHOUT_MEANING.contains(&name.as_str()));
        meaning
    }

    /// What each transaction of the session may leave behind, whatever it says: where its `search_path` leads to the
    /// temporary schema first, an ordinary CREATE TABLE makes a temporary table.
    pub fn leaves(&self) -> Traces {
        let Some(path) = self.settings.get("search_path") else { return Traces::NONE };
        let path = String::from_utf8_lossy(path);
        // "$user" seldom exists.
        let first = path.split(',').map(|name| name.trim().trim_matches('"')).find(|name| *name != "$user");
        let is_temporary = first.is_some_and(|name| name.to_ascii_lowercase().starts_with("pg_temp"));
        if is_temporary { Traces::SESSION } else { Traces::NONE }
    }

    /// The session's `application_name`, where it has set one.
    pub fn application_name(&self) -> Option<&str> {
        self.settings.get("application_name").and_then(|value| std::str::from_utf8(value).ok())
    }
}

impl Hash for SessionState {
    /// Settings and role, which are what states are told apart by.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.settings.hash(state);
        self.identity.session_authorization.hash(state);
        self.identity.role.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_leads_back_to_what_the_client_connected_with() {
        let startup = SessionState::default().with_settings([("TimeZone", "UTC"), ("application_name", "a")]);
        let captured = SessionState::default().with_settings([("application_name", "b"), ("work_mem", "1MB")]);
        let state = captured.reset_to(&startup);
        let expected = [("TimeZone", "UTC"), ("application_name", "b"), ("work_mem", "1MB")];
        assert_eq!(state, SessionState::default().with_settings(expected));
        assert_eq!(state.meaning(), SessionState::default().with_settings([("TimeZone", "UTC"), ("work_mem", "1MB")]));
        assert_eq!(state.application_name(), Some("b"));
        assert_eq!(state.ties(), []);
    }

    #[test]
    fn who_makes_temporary_tables_by_default_may_always_leave_some() {
        for (path, leaves) in [
            ("pg_temp", Traces::SESSION),
            ("\"$user\", pg_temp, public", Traces::SESSION),
            ("\"$user\", public", Traces::NONE),
            ("app, pg_temp", Traces::NONE),
            ("", Traces::NONE),
        ] {
            assert_eq!(SessionState::default().with_settings([("search_path", path)]).leaves(), leaves, "{path}");
        }
        assert_eq!(SessionState::default().leaves(), Traces::NONE);
    }

    #[test]
    fn ties_are_named_in_one_or_two_words() {
        let state = SessionState { blockers: vec![Blocker::AdvisoryLocks { count: 2 }], ..SessionState::default() };
        assert_eq!(state.ties().iter().map(ToString::to_string).collect::<Vec<_>>(), ["advisory lock"]);
    }
}
