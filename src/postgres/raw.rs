//! A connection at the level of protocol frames: what proxied sessions, COPY, apply and replication speak through.

use bytes::BytesMut;

use crate::config::Secret;
use crate::postgres::Stream;

/// How a login proves itself.
#[derive(Clone, Debug)]
pub enum Credential {
    /// Nothing to show (trust, peer, certificate).
    None,
    /// A password, for whatever the server asks.
    Password(Secret),
    /// A SCRAM client key (32 bytes), recovered from a client's own proof. The server key checks the server.
    ScramKeys {
        /// RFC 5802 ClientKey.
        client_key: [u8; 32],
        /// RFC 5802 ServerKey.
        server_key: [u8; 32],
    },
    /// `md5` verifier (`md5` and 32 hexadecimal digits): enough to log in to a server that asks for md5.
    Md5Hash(Secret),
}

/// Everything a startup packet and an authentication exchange need.
#[derive(Clone, Debug)]
pub struct Login {
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// Proof.
    pub credential: Credential,
    /// Further startup parameters, in order (`application_name`, `options`, `replication`, …).
    pub parameters: Vec<(String, String)>,
}

/// An open connection that has been authenticated and has said ReadyForQuery once.
#[derive(Debug)]
pub struct RawConnection {
    /// The socket.
    pub stream: Stream,
    /// Bytes read and not yet consumed.
    pub read_buf: BytesMut,
    /// BackendKeyData: process id.
    pub pid: i32,
    /// BackendKeyData: secret, 4 bytes in protocol 3.0, up to 256 in 3.2.
    pub cancel_key: Vec<u8>,
    /// ParameterStatus values reported so far, in order of first report.
    pub parameters: Vec<(String, String)>,
}

/// The connection failed, or the server answered with an error.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// The link broke.
    #[error("connection to the {label} lost while {doing}")]
    Io {
        /// `source` or `target`.
        label: String,
        /// What was being done.
        doing: String,
        /// Why.
        source: std::io::Error,
    },
    /// The server refused. Message text comes from the server and may quote data: never shown to clients.
    #[error("{severity} {code}: {message}")]
    Server {
        /// `ERROR`, `FATAL`, …
        severity: String,
        /// SQLSTATE.
        code: String,
        /// Primary message.
        message: String,
        /// DETAIL.
        detail: Option<String>,
        /// HINT.
        hint: Option<String>,
    },
    /// Bytes that make no sense where they came.
    #[error("protocol violation by the {label}: {what}")]
    Protocol {
        /// `source` or `target`.
        label: String,
        /// What was wrong.
        what: String,
    },
}
