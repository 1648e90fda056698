//! Why a handoff failed.

/// A handoff could not be carried out. Holds no text of the client's or the server's: safe to log and to show.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// The link broke.
    #[error("the backend was lost while {doing}")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The server refused one of our own statements.
    #[error("the server refused ({sqlstate}) while {doing}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// SQLSTATE.
        sqlstate: String,
    },
    /// Bytes that make no sense where they came.
    #[error("the server sent {what} while {doing}")]
    Protocol {
        /// What was being done.
        doing: &'static str,
        /// What was wrong.
        what: &'static str,
    },
    /// The backend was inside a transaction.
    #[error("the session was not at a safe point: its backend is inside a transaction")]
    NotIdle,
    /// More state than is held in memory for one session.
    #[error("the session's state is larger than {limit_bytes} bytes")]
    TooLarge {
        /// The bound.
        limit_bytes: usize,
    },
}
