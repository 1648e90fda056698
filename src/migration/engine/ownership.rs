//! Whether the engine runs in this process, and why it does not.

use crate::catalog::migrations::MigrationCatalog;
use crate::shutdown::Tasks;

/// Why the engine does not run in this process, for whoever waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHere {
    /// It has not tried yet.
    Untried,
    /// Another process runs it.
    Another,
    /// The target cannot be used, or this process is stopping.
    Away,
}

/// Whether this process runs the engine.
#[derive(Clone, Debug)]
pub(super) enum Ownership {
    /// It has just begun to look for the target.
    Untried,
    /// No, and nobody else is known to: the target cannot be used, or it is stopping. And why.
    No(String),
    /// No: another process does.
    Another,
    /// Yes, in this generation; the actors are stopped and joined when it is over.
    Yes { catalog: MigrationCatalog, actors: Tasks },
}

impl Ownership {
    /// Why this process does not run it; none: it does.
    pub(super) fn why_not(&self) -> Option<&str> {
        match self {
            Self::Untried => Some("the target has not been reached yet"),
            Self::No(reason) => Some(reason),
            Self::Another => Some("another pgcutover runs the engine of this target"),
            Self::Yes { .. } => None,
        }
    }

    pub(super) fn not_here(&self) -> Option<NotHere> {
        match self {
            Self::Untried => Some(NotHere::Untried),
            Self::Another => Some(NotHere::Another),
            Self::No(_) => Some(NotHere::Away),
            Self::Yes { .. } => None,
        }
    }
}
