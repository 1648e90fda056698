//! What a session has set up on its backend.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;

use super::Blocker;

/// Everything of a session that moves. Texts are bytes in [`Transport`] encoding. Its parts are read only in this
/// module's neighbours; nobody else has a use for an application's values.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SessionState {
    pub(super) transport: Transport,
    /// Value of every setting that the session set, by name, custom ones included.
    pub(super) settings: BTreeMap<String, Bytes>,
    pub(super) identity: Identity,
    pub(super) statements: BTreeMap<Bytes, Statement>,
    /// Names of the types whose OIDs differ between servers and that some statement has as a parameter.
    pub(super) types: BTreeMap<u32, TypeName>,
    pub(super) channels: BTreeSet<Bytes>,
    pub(super) unnamed: Unnamed,
    pub(super) blockers: Vec<Blocker>,
}

/// `client_encoding` in which texts are read and written by us, whatever the client's is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Transport {
    /// For every database that has an encoding.
    #[default]
    Utf8,
    /// For databases in SQL_ASCII: bytes are neither converted nor checked.
    SqlAscii,
}

impl Transport {
    /// As `client_encoding` has it.
    pub(super) fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::Utf8 => b"UTF8",
            Self::SqlAscii => b"SQL_ASCII",
        }
    }
}

/// Who the session acts as.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Identity {
    /// SET SESSION AUTHORIZATION, where it differs from who logged in.
    pub(super) session_authorization: Option<Bytes>,
    /// The role in force, `none` where it is the session's own. Always replayed: a role's own settings may start its
    /// sessions in another one. `None` stands for a fresh backend, whose role is not known.
    pub(super) role: Option<Bytes>,
}

/// A named prepared statement.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Statement {
    /// What the client sent: for SQL-level PREPARE the whole text it stood in.
    pub(super) text: Bytes,
    pub(super) origin: Origin,
    /// As resolved by the server that the state was read from.
    pub(super) parameter_types: Vec<u32>,
}

/// How a statement was prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// By a Parse message.
    Protocol,
    /// By PREPARE. `standard_conforming_strings` says how its text is read.
    Sql { backslashes: Backslashes },
}

/// What a backslash in a plain string literal is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Backslashes {
    /// A character like any other (`standard_conforming_strings = on`).
    #[default]
    Plain,
    /// The start of an escape.
    Escape,
}

/// Name of a type that is not built in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TypeName {
    pub(super) schema: Bytes,
    pub(super) name: Bytes,
    /// The type is the array over the type with this name.
    pub(super) form: TypeForm,
}

/// Array types are looked up by their element: their own names are made up by the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TypeForm {
    Itself,
    ArrayOver,
}

/// The unnamed statement.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) enum Unnamed {
    #[default]
    Absent,
    /// Body of its Parse message, in the client's encoding.
    Body(Bytes),
    /// Too long to have been remembered: the other server will not have one.
    TooLong,
}

impl SessionState {
    /// Why this session cannot be moved; empty when it can.
    pub fn blockers(&self) -> &[Blocker] {
        &self.blockers
    }

    /// How many named prepared statements it has.
    pub fn statements(&self) -> usize {
        self.statements.len()
    }

    /// The text of a named statement of the protocol.
    pub fn statement_text(&self, name: &[u8]) -> Option<&[u8]> {
        let statement = self.statements.get(name)?;
        (statement.origin == Origin::Protocol).then_some(&statement.text[..])
    }

    /// A named statement of the protocol as its Parse has it after the name; none where a parameter's type has another
    /// number on another server.
    pub fn parse_of(&self, name: &[u8]) -> Option<Bytes> {
        let statement = self.statements.get(name).filter(|statement| statement.origin == Origin::Protocol)?;
        let types = &statement.parameter_types;
        if types.iter().any(|oid| *oid >= super::capture::FIRST_UNSTABLE_OID) {
            return None;
        }
        let mut parse = [&statement.text[..], b"\0"].concat();
        parse.extend(u16::try_from(types.len()).ok()?.to_be_bytes());
        parse.extend(types.iter().flat_map(|oid| oid.to_be_bytes()));
        Some(parse.into())
    }

    /// Names and texts of all its statements, of PREPARE too; the unnamed one is "". `None`: a text that is not at hand.
    pub fn texts(&self) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        let unnamed = match &self.unnamed {
            Unnamed::Absent => None,
            Unnamed::Body(body) => Some(body.get(1..).and_then(|text| text.split(|byte| *byte == 0).next())),
            Unnamed::TooLong => Some(None),
        };
        let named = self.statements.iter().map(|(name, statement)| (&name[..], Some(&statement.text[..])));
        named.chain(unnamed.map(|text| (&b""[..], text)))
    }

    /// What its settings take, in bytes.
    pub fn settings_bytes(&self) -> usize {
        self.settings.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// Settings and role, holding nothing of the buffer that they were read into.
    #[must_use]
    pub fn detached_settings(&self) -> Self {
        let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        Self {
            transport: self.transport,
            settings: self.settings.iter().map(|(name, value)| (name.clone(), copy(value))).collect(),
            identity: Identity {
                session_authorization: self.identity.session_authorization.as_ref().map(copy),
                role: self.identity.role.as_ref().map(copy),
            },
            ..Self::default()
        }
    }

    /// Whether it listens.
    pub fn listens(&self) -> bool {
        !self.channels.is_empty()
    }
}

impl fmt::Debug for SessionState {
    /// Says how much, never what.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionState")
            .field("settings", &self.settings.len())
            .field("statements", &self.statements.len())
            .field("channels", &self.channels.len())
            .field("blockers", &self.blockers)
            .finish_non_exhaustive()
    }
}

/// Reported values that differ from what a client was told: to be sent to it as ParameterStatus, in order.
///
/// `told` is what the client knows, `now` what its new backend has reported.
pub fn changed_parameters(told: &[(String, String)], now: &[(String, String)]) -> Vec<(String, String)> {
    now.iter()
        .filter(|(name, value)| told.iter().find(|(known, _)| known == name).is_none_or(|(_, known)| known != value))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_reported() {
        let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let told = pairs(&[("server_version", "15.18"), ("client_encoding", "UTF8"), ("TimeZone", "UTC")]);
        let now = pairs(&[("server_version", "18.4"), ("client_encoding", "UTF8"), ("search_path", "public")]);
        assert_eq!(changed_parameters(&told, &now), pairs(&[("server_version", "18.4"), ("search_path", "public")]));
        assert_eq!(changed_parameters(&now, &now), []);
    }

    #[test]
    fn debug_output_shows_no_values() {
        let mut state = SessionState::default();
        state.settings.insert("app.token".to_owned(), Bytes::from_static(b"secret"));
        assert!(!format!("{state:?}").contains("secret"));
    }
}
