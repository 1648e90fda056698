//! What an operator is answered when an order cannot be carried out.
//!
//! One type for all three ways in: the console shows its SQLSTATE, HTTP its status, the command line its words.

use crate::sqlstate;

/// What kind of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The order makes no sense.
    Invalid,
    /// No such migration, session or database.
    NotFound,
    /// Not in the state it is in.
    Conflict,
    /// Not for this user.
    Forbidden,
    /// Planned, and not there yet.
    Unsupported,
    /// A server or a part of the daemon is not reachable now.
    Unavailable,
    /// It was tried, and failed.
    Failed,
    /// Taken back by who had given the order, while it waited.
    Cancelled,
}

impl ErrorKind {
    /// HTTP status (RFC 9110).
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Conflict | Self::Cancelled => 409,
            Self::Failed => 500,
            Self::Unsupported => 501,
            Self::Unavailable => 503,
        }
    }

    /// SQLSTATE for the console.
    pub fn sqlstate(self) -> &'static str {
        match self {
            Self::Invalid => sqlstate::SYNTAX_ERROR,
            Self::Forbidden => sqlstate::INSUFFICIENT_PRIVILEGE,
            Self::NotFound => sqlstate::UNDEFINED_OBJECT,
            Self::Conflict => sqlstate::OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::Failed => sqlstate::INTERNAL_ERROR,
            Self::Unsupported => sqlstate::FEATURE_NOT_SUPPORTED,
            Self::Unavailable => sqlstate::CANNOT_CONNECT_NOW,
            Self::Cancelled => sqlstate::QUERY_CANCELED,
        }
    }

    /// A word that scripts may compare.
    pub fn code(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
            Self::Unsupported => "unsupported",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
        }
    }
}

/// An order was not carried out. Holds no secret and no row value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    /// What kind of refusal it is.
    pub kind: ErrorKind,
    /// What was attempted and failed.
    pub message: String,
    /// The SQL, setting or command that mends it.
    pub hint: Option<String>,
}

impl AdminError {
    /// An error without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The one who gave the order does not want it any more. In the words of a server, which clients know.
    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "canceling statement due to user request")
    }

    /// Adds what mends it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The message with every cause below `error`, for errors of other modules.
    pub fn from_chain(kind: ErrorKind, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !message.ends_with(&text) {
                message = format!("{message}: {text}");
            }
            cause = error.source();
        }
        Self::new(kind, message)
    }
}
