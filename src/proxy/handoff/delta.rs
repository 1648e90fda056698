//! What has to be done on a backend that has one state to give it another. Pure.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::state::{Identity, SessionState, Statement, Transport, TypeName, Unnamed};

/// Time-outs that could end our own work. The second is there from PostgreSQL 17 on.
pub(super) const TIMEOUTS: [&str; 2] = ["statement_timeout", "transaction_timeout"];

/// The way from one state to another; from a fresh backend's, it is the whole replay.
#[derive(Clone, Default)]
pub struct Delta {
    pub(super) transport: Transport,
    /// New values; `None` resets to what the backend started with.
    pub(super) settings: Vec<(String, Option<Bytes>)>,
    pub(super) identity: IdentityChange,
    /// `client_encoding` as it has to be in the end; `None`: as the backend started.
    pub(super) client_encoding: Option<Bytes>,
    /// [`TIMEOUTS`] as they have to be in the end; `None`: as the backend started.
    pub(super) timeouts: [Option<Bytes>; 2],
    pub(super) close: BTreeSet<Bytes>,
    pub(super) prepare: BTreeMap<Bytes, Statement>,
    pub(super) types: BTreeMap<u32, TypeName>,
    pub(super) listen: BTreeSet<Bytes>,
    pub(super) unlisten: BTreeSet<Bytes>,
    pub(super) unnamed: UnnamedChange,
}

/// Who the backend acts as, before and after.
#[derive(Clone, Default)]
pub(super) struct IdentityChange {
    pub(super) before: Identity,
    pub(super) after: Identity,
}

/// What becomes of the unnamed statement.
#[derive(Clone, Default)]
pub(super) enum UnnamedChange {
    #[default]
    Keep,
    Close,
    /// Body of the Parse message.
    Parse(Bytes),
}

impl Delta {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        !self.changes_settings()
            && self.close.is_empty()
            && self.prepare.is_empty()
            && self.listen.is_empty()
            && self.unlisten.is_empty()
            && matches!(self.unnamed, UnnamedChange::Keep)
    }

    /// Whether settings or the role change.
    pub(super) fn changes_settings(&self) -> bool {
        !self.settings.is_empty() || self.identity.before != self.identity.after
    }
}

impl std::fmt::Debug for Delta {
    /// Says how much, never what.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delta")
            .field("settings", &self.settings.len())
            .field("close", &self.close.len())
            .field("prepare", &self.prepare.len())
            .field("listen", &self.listen.len())
            .field("unlisten", &self.unlisten.len())
            .finish_non_exhaustive()
    }
}

/// What a backend needs that was given `old` and has to be as `new`. Advisory locks are not part of it.
pub fn delta(old: &SessionState, new: &SessionState) -> Delta {
    let changed = new.settings.iter().filter(|(name, value)| old.settings.get(*name) != Some(*value));
    let reset = old.settings.keys().filter(|name| !new.settings.contains_key(*name));
    let gone = old.statements.iter().filter(|(name, statement)| new.statements.get(*name) != Some(*statement));
    let fresh = new.statements.iter().filter(|(name, statement)| old.statements.get(*name) != Some(*statement));
    Delta {
        transport: new.transport,
        settings: reset
            .map(|name| (name.clone(), None))
            .chain(changed.map(|(name, value)| (name.clone(), Some(value.clone()))))
            .collect(),
        identity: IdentityChange { before: old.identity.clone(), after: new.identity.clone() },
        client_encoding: new.settings.get("client_encoding").cloned(),
        timeouts: TIMEOUTS.map(|name| new.settings.get(name).cloned()),
        close: gone.map(|(name, _)| name.clone()).collect(),
        prepare: fresh.map(|(name, statement)| (name.clone(), statement.clone())).collect(),
        types: new.types.clone(),
        listen: new.channels.difference(&old.channels).cloned().collect(),
        unlisten: old.channels.difference(&new.channels).cloned().collect(),
        unnamed: match (&old.unnamed, &new.unnamed) {
            (Unnamed::Body(old), Unnamed::Body(new)) if old == new => UnnamedChange::Keep,
            (_, Unnamed::Body(new)) => UnnamedChange::Parse(new.clone()),
            (Unnamed::Body(_), Unnamed::Absent | Unnamed::TooLong) => UnnamedChange::Close,
            (Unnamed::Absent | Unnamed::TooLong, Unnamed::Absent | Unnamed::TooLong) => UnnamedChange::Keep,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::Origin;
    use super::*;

    fn statement(text: &'static str) -> Statement {
        Statement { text: Bytes::from_static(text.as_bytes()), origin: Origin::Protocol, parameter_types: vec![23] }
    }

    fn bytes(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn state() -> SessionState {
        let mut state = SessionState::default();
        state.settings.insert("search_path".to_owned(), bytes("a, b"));
        state.settings.insert("app.tenant".to_owned(), bytes("7"));
        state.identity.role = Some(bytes("none"));
        state.statements.insert(bytes("s"), statement("SELECT $1"));
        state.statements.insert(bytes("t"), statement("SELECT 2"));
        state.channels.insert(bytes("news"));
        state.unnamed = Unnamed::Body(bytes("\0SELECT 1\0\0\0"));
        state
    }

    #[test]
    fn nothing_changed_is_nothing_to_do() {
        assert!(delta(&state(), &state()).is_empty());
        assert!(!delta(&SessionState::default(), &state()).is_empty());
    }

    #[test]
    fn changes_resets_and_removals_are_all_part_of_it() {
        let (old, mut new) = (state(), state());
        new.settings.remove("app.tenant");
        new.settings.insert("search_path".to_owned(), bytes("c"));
        new.statements.insert(bytes("s"), statement("SELECT $1 + 1"));
        new.statements.remove(&bytes("t"));
        new.channels.clear();
        new.unnamed = Unnamed::Absent;
        let delta = delta(&old, &new);
        assert_eq!(delta.settings, [("app.tenant".to_owned(), None), ("search_path".to_owned(), Some(bytes("c")))]);
        assert_eq!(delta.close, BTreeSet::from([bytes("s"), bytes("t")]));
        assert_eq!(delta.prepare.keys().collect::<Vec<_>>(), [&bytes("s")]);
        assert_eq!(delta.unlisten, BTreeSet::from([bytes("news")]));
        assert!(delta.listen.is_empty());
        assert!(matches!(delta.unnamed, UnnamedChange::Close));
        assert!(!delta.is_empty());
    }

    #[test]
    fn an_unnamed_statement_that_was_replaced_is_parsed_again() {
        let (old, mut new) = (state(), state());
        new.unnamed = Unnamed::Body(bytes("\0SELECT 2\0\0\0"));
        assert!(matches!(delta(&old, &new).unnamed, UnnamedChange::Parse(_)));
        new.unnamed = Unnamed::TooLong;
        assert!(matches!(delta(&old, &new).unnamed, UnnamedChange::Close));
    }

    #[test]
    fn a_role_that_changed_is_enough() {
        let (old, mut new) = (state(), state());
        new.identity.role = Some(bytes("bob"));
        assert!(!delta(&old, &new).is_empty());
    }

    #[test]
    fn debug_output_shows_no_values() {
        let mut new = state();
        new.settings.insert("app.token".to_owned(), bytes("secret"));
        assert!(!format!("{:?}", delta(&state(), &new)).contains("secret"));
    }
}
