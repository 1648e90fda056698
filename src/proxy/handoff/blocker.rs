//! Why a session cannot be moved.

/// What a session holds that cannot be taken to another server. Displays in words that are safe for clients and
/// operators: no names or values of the application's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Blocker {
    /// A transaction is open, or a statement is running.
    OpenTransaction,
    /// Session-level advisory locks.
    AdvisoryLocks {
        /// How many different ones.
        count: u64,
    },
    /// Cursors declared WITH HOLD.
    HoldableCursors {
        /// How many.
        count: u64,
    },
    /// Temporary tables, views, sequences, functions or types.
    TemporaryObjects {
        /// How many.
        count: u64,
    },
    /// A setting of the session that the other server refuses.
    Setting {
        /// Its name.
        name: String,
        /// What it was refused with.
        sqlstate: String,
    },
    /// SET ROLE or SET SESSION AUTHORIZATION to a role that the other server refuses.
    Role {
        /// What it was refused with.
        sqlstate: String,
    },
    /// LISTEN was refused by the other server.
    Listen {
        /// What it was refused with.
        sqlstate: String,
    },
    /// More different custom settings than are remembered for a session.
    TooManyCustomSettings,
}

impl std::fmt::Display for Blocker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OpenTransaction => f.write_str("a transaction is open"),
            Self::AdvisoryLocks { count } => write!(f, "holds {count} advisory lock(s)"),
            Self::HoldableCursors { count } => write!(f, "holds {count} cursor(s) WITH HOLD"),
            Self::TemporaryObjects { count } => write!(f, "has {count} temporary object(s)"),
            Self::Setting { name, sqlstate } => {
                write!(f, "its setting \"{name}\" is refused by the other server ({sqlstate})")
            }
            Self::Role { sqlstate } => write!(f, "its role is refused by the other server ({sqlstate})"),
            Self::Listen { sqlstate } => write!(f, "LISTEN is refused by the other server ({sqlstate})"),
            Self::TooManyCustomSettings => f.write_str("it has set too many different custom settings"),
        }
    }
}
