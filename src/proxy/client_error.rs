//! The one place that decides what a client is told when something goes wrong.
//!
//! Where PostgreSQL has a text for a case, it is PostgreSQL's, so that drivers and people recognise it. Internal
//! causes (addresses, errno, verifiers) never reach a client: they are logged where they are handled.

use std::borrow::Cow;

use super::auth::hba::Client;
use crate::sqlstate;
use crate::telemetry::metrics::Full;
use crate::wire::error::{ErrorFields, Severity};

/// `08P01`-like refusals quote only what the client itself sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// Authentication failed; also for users that do not exist.
    PasswordFailed {
        /// Role asked for.
        user: String,
        /// The method that was spoken, which PostgreSQL does not tell, but decides the code: SCRAM and passwords 28P01.
        code: &'static str,
    },
    /// The message or its order was wrong during authentication or later.
    Protocol(Cow<'static, str>),
    /// The startup packet asks for something that does not exist here.
    Unsupported(Cow<'static, str>),
    /// The startup packet's `replication` is nothing that a server knows.
    InvalidReplication(Cow<'static, str>),
    /// The client is not let in, in PostgreSQL's words for the case.
    Authorization(Cow<'static, str>),
    /// Bytes came in the clear behind a request for encryption: somebody may have injected them.
    PlaintextAfterRequest {
        /// PostgreSQL's name of the encryption.
        encryption: &'static str,
    },
    /// TLS is required on TCP.
    TlsRequired,
    /// Clear text passwords are asked for, and the connection is not private.
    CleartextRefused,
    /// `max_client_connections` reached.
    TooManyClients,
    /// One of the limits on connections by role, database or address reached.
    TooManyOf {
        /// `role`, `database` or `address`.
        what: &'static str,
        /// Which one.
        name: String,
    },
    /// `replication = "refuse"`.
    ReplicationRefused,
    /// DISABLE is in force.
    DatabaseDisabled {
        /// Its name.
        database: String,
    },
    /// `idle_timeout` reached.
    IdleTimeout,
    /// `idle_transaction_timeout` reached.
    IdleTransactionTimeout,
    /// `transaction_timeout` reached.
    TransactionTimeout,
    /// `query_timeout` reached, and the cancel of the statement did not end it.
    QueryTimeout,
    /// `query_wait_timeout` reached while the session was held; it goes on.
    WaitTimeout,
    /// `query_wait_timeout` reached before the session could be let in.
    LoginWaitTimeout,
    /// `client_lifetime` reached.
    LifetimeReached,
    /// `client_login_timeout` reached.
    LoginTimeout,
    /// Nobody is known to be the active server.
    RouteUnknown {
        /// Why, written for clients.
        reason: String,
    },
    /// The active server could not be reached, or said nothing that a client should see.
    ServerUnreachable,
    /// The active server refused the login and said so itself.
    ServerRefused {
        /// SQLSTATE of the server.
        code: String,
        /// Primary message of the server, as a direct connection would have shown it.
        message: String,
    },
    /// The console is for the users named in the configuration.
    ConsoleForbidden {
        /// Role asked for.
        user: String,
    },
    /// The link to the server broke, or the server closed it, in the middle of something.
    ServerLost {
        /// A statement was under way, and nobody knows whether it took effect.
        in_doubt: bool,
    },
    /// The session was held, and its client cancelled.
    CancelledWhileHeld,
    /// An operator ended the session, or the proxy stops.
    Terminated,
    /// A replication connection at a switch.
    ReplicationEnded,
    /// The session could not be moved to the new server.
    MoveFailed {
        /// What was missing, in words for a client.
        reason: Cow<'static, str>,
    },
    /// A coordinator ended the session with words of its own.
    Ordered {
        /// SQLSTATE.
        code: String,
        /// Primary message.
        message: String,
    },
    /// `query_wait_timeout` reached.
    QueryWaitTimeout,
    /// A pooled session's settings could not be read or brought to another connection.
    SettingsLost {
        /// SQLSTATE of the server, where it said one.
        code: String,
    },
    /// A prepared statement too large to be shared.
    StatementTooLarge,
    /// More named statements than a client may have in transaction mode, or more bytes of them.
    TooManyStatements,
    /// The session's task failed; the backend is being looked after.
    Internal,
}

impl ClientError {
    /// Every client with a wrong password and every unknown user gets the same.
    pub fn password_failed(user: &str) -> Self {
        Self::PasswordFailed { user: user.to_owned(), code: sqlstate::INVALID_PASSWORD }
    }

    /// A rule turns the client away, or none is about it. It is called pg_hba.conf because that is what clients know.
    pub(super) fn no_rule(client: &Client<'_>, rejected: bool) -> Self {
        let host = client.address.map_or_else(|| "[local]".to_owned(), |address| address.to_string());
        let encryption = if client.tls { "SSL encryption" } else { "no encryption" };
        let what = match (rejected, client.physical_replication) {
            (true, false) => "pg_hba.conf rejects connection for",
            (true, true) => "pg_hba.conf rejects replication connection for",
            (false, false) => "no pg_hba.conf entry for",
            (false, true) => "no pg_hba.conf entry for replication connection from",
        };
        let (user, database) = (client.user, client.database);
        let to = if client.physical_replication { String::new() } else { format!(", database \"{database}\"") };
        Self::Authorization(format!("{what} host \"{host}\", user \"{user}\"{to}, {encryption}").into())
    }

    /// The role has NOLOGIN.
    pub(super) fn not_permitted(user: &str) -> Self {
        Self::Authorization(format!("role \"{user}\" is not permitted to log in").into())
    }

    /// There is no such role, where that may be told.
    pub(super) fn no_role(user: &str) -> Self {
        Self::Authorization(format!("role \"{user}\" does not exist").into())
    }

    /// SQLSTATE.
    pub fn code(&self) -> &str {
        match self {
            Self::PasswordFailed { code, .. } => code,
            Self::Protocol(_) | Self::PlaintextAfterRequest { .. } => sqlstate::PROTOCOL_VIOLATION,
            Self::Unsupported(_) => sqlstate::FEATURE_NOT_SUPPORTED,
            Self::InvalidReplication(_) => sqlstate::INVALID_PARAMETER_VALUE,
            Self::TlsRequired | Self::CleartextRefused | Self::Authorization(_) => sqlstate::INVALID_AUTHORIZATION,
            Self::TooManyClients | Self::TooManyOf { .. } | Self::QueryWaitTimeout => sqlstate::TOO_MANY_CONNECTIONS,
            Self::ReplicationRefused => sqlstate::INVALID_AUTHORIZATION,
            Self::DatabaseDisabled { .. } => sqlstate::OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::IdleTimeout => sqlstate::IDLE_SESSION_TIMEOUT,
            Self::IdleTransactionTimeout => sqlstate::IDLE_IN_TRANSACTION_TIMEOUT,
            Self::TransactionTimeout => sqlstate::TRANSACTION_TIMEOUT,
            Self::QueryTimeout | Self::WaitTimeout | Self::LoginWaitTimeout => sqlstate::QUERY_CANCELED,
            Self::LifetimeReached => sqlstate::ADMIN_SHUTDOWN,
            Self::LoginTimeout => sqlstate::INVALID_AUTHORIZATION,
            Self::RouteUnknown { .. } => sqlstate::CANNOT_CONNECT_NOW,
            Self::ServerUnreachable => sqlstate::CANNOT_ESTABLISH_CONNECTION,
            Self::ServerRefused { code, .. } | Self::Ordered { code, .. } => code,
            Self::ConsoleForbidden { .. } => sqlstate::INSUFFICIENT_PRIVILEGE,
            Self::ServerLost { .. } => sqlstate::CONNECTION_FAILURE,
            Self::CancelledWhileHeld => sqlstate::QUERY_CANCELED,
            Self::Terminated | Self::ReplicationEnded | Self::MoveFailed { .. } => sqlstate::ADMIN_SHUTDOWN,
            Self::SettingsLost { code } => code,
            Self::StatementTooLarge | Self::TooManyStatements => sqlstate::PROGRAM_LIMIT_EXCEEDED,
            Self::Internal => sqlstate::INTERNAL_ERROR,
        }
    }

    /// What kind of failure it is that meets every client alike, whoever it is; `None`: it is this one's own.
    pub(super) fn of_all(&self) -> Option<&'static str> {
        match self {
            Self::TooManyClients => Some("too many clients"),
            Self::RouteUnknown { .. } => Some("nobody is known to be active"),
            Self::ServerUnreachable => Some("server unreachable"),
            // Class 53: it is full; class 57: it starts, stops or was told to end them.
            Self::ServerRefused { code, .. } if code.starts_with("53") || code.starts_with("57") => {
                Some("server refuses")
            }
            Self::LoginWaitTimeout | Self::QueryWaitTimeout => Some("waited too long"),
            _ => None,
        }
    }

    /// What is full, where the client is one too many; none: it is not.
    pub(super) fn full(&self) -> Option<Full> {
        match self {
            Self::TooManyClients => Some(Full::Proxy),
            Self::TooManyOf { .. } => Some(Full::Share),
            _ => (self.code() == sqlstate::TOO_MANY_CONNECTIONS).then_some(Full::Server),
        }
    }

    /// Whether the session goes on.
    pub fn severity(&self) -> Severity {
        match self {
            Self::CancelledWhileHeld | Self::WaitTimeout => Severity::Error,
            _ => Severity::Fatal,
        }
    }

    fn message(&self) -> Cow<'_, str> {
        match self {
            Self::PasswordFailed { user, .. } => format!("password authentication failed for user \"{user}\"").into(),
            Self::Protocol(text)
            | Self::Unsupported(text)
            | Self::InvalidReplication(text)
            | Self::Authorization(text) => text.as_ref().into(),
            Self::PlaintextAfterRequest { encryption } => {
                format!("received unencrypted data after {encryption} request").into()
            }
            Self::TlsRequired => "connection requires TLS".into(),
            Self::CleartextRefused => "clear text passwords need TLS or a Unix socket".into(),
            Self::TooManyClients => "sorry, too many clients already".into(),
            Self::TooManyOf { what, name } => format!("too many connections for {what} \"{name}\"").into(),
            Self::ReplicationRefused => "replication connections are refused by this proxy".into(),
            Self::DatabaseDisabled { database } => {
                format!("database \"{database}\" is not currently accepting connections").into()
            }
            Self::IdleTimeout => "terminating connection due to idle-session timeout".into(),
            Self::IdleTransactionTimeout => "terminating connection due to idle-in-transaction timeout".into(),
            Self::TransactionTimeout => "terminating connection due to transaction timeout".into(),
            Self::QueryTimeout => "canceling statement due to statement timeout".into(),
            Self::WaitTimeout | Self::LoginWaitTimeout => "canceling statement due to query_wait_timeout".into(),
            Self::LifetimeReached => "terminating connection due to client_lifetime".into(),
            Self::LoginTimeout => "canceling authentication due to timeout".into(),
            Self::RouteUnknown { reason } => {
                format!("the database is not available through this proxy now: {reason}").into()
            }
            Self::ServerUnreachable => "the database server could not be reached".into(),
            Self::ServerRefused { message, .. } | Self::Ordered { message, .. } => message.into(),
            Self::ConsoleForbidden { user } => format!("user \"{user}\" may not use the administration console").into(),
            Self::ServerLost { .. } => "the connection to the database server was lost".into(),
            Self::CancelledWhileHeld => "canceling statement due to user request".into(),
            Self::Terminated => "terminating connection due to administrator command".into(),
            Self::ReplicationEnded => {
                "terminating replication connection: the database has moved to another server".into()
            }
            Self::MoveFailed { .. } => {
                "terminating connection: the session could not follow its database to another server".into()
            }
            Self::QueryWaitTimeout => "query_wait_timeout".into(),
            Self::SettingsLost { .. } => {
                "terminating connection: its settings could not be brought to another server connection".into()
            }
            Self::StatementTooLarge => "prepared statement is too large for transaction pooling".into(),
            Self::TooManyStatements => "terminating connection: it has too many prepared statements".into(),
            Self::Internal => "internal error of the proxy".into(),
        }
    }

    fn detail(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::PlaintextAfterRequest { .. } => {
                Some("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.".into())
            }
            Self::ServerLost { in_doubt: true } => {
                Some("A statement was being executed. Whether it, or a COMMIT among it, took effect is not known; it was not sent again.".into())
            }
            Self::WaitTimeout => Some("The database is paused; the statement had not been sent to a server.".into()),
            Self::QueryTimeout => Some("The server did not answer the cancel; whether the statement took effect is not known.".into()),
            Self::CancelledWhileHeld => Some("The statement was waiting for a cutover to end and had not been sent to a server.".into()),
            Self::MoveFailed { reason } => Some(reason.as_ref().into()),
            Self::QueryWaitTimeout => Some("No server connection of the pool became free in time.".into()),
            _ => None,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::ReplicationRefused => {
                Some("Connect to the server itself, or change [listen] replication in the proxy's configuration.")
            }
            Self::InvalidReplication(_) => Some("Valid values are: \"false\", 0, \"true\", 1, \"database\"."),
            Self::TlsRequired => Some("Use sslmode=require or stronger."),
            Self::CleartextRefused => Some("Use sslmode=require or stronger, or the Unix socket."),
            Self::ServerLost { in_doubt: true } => {
                Some("Connect again and look whether the change is there before repeating it.")
            }
            Self::ServerLost { in_doubt: false }
            | Self::MoveFailed { .. }
            | Self::ReplicationEnded
            | Self::LifetimeReached => Some("Connect again."),
            Self::RouteUnknown { .. } | Self::ServerUnreachable => Some("Try again in a moment."),
            Self::TooManyStatements => Some(
                "Close those that are not used any more, or raise max_client_statements or max_client_statements_size.",
            ),
            Self::ConsoleForbidden { .. } => Some("The users that may are listed in the proxy's configuration."),
            _ => None,
        }
    }

    /// Appends the ErrorResponse.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (message, detail) = (self.message(), self.detail());
        let fields = ErrorFields {
            severity: self.severity(),
            code: self.code(),
            message: &message,
            detail: detail.as_deref(),
            hint: self.hint(),
        };
        fields.encode(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{error, frame};

    #[test]
    fn rules_refuse_in_postgresqls_words() {
        let local = Client {
            address: None,
            same_host: false,
            tls: false,
            user: "ann",
            database: "shop",
            physical_replication: false,
        };
        let far = Client { address: Some([10, 0, 0, 1].into()), tls: true, ..local };
        let walsender = Client { physical_replication: true, ..far };
        for (client, rejected, expected) in [
            (local, false, "no pg_hba.conf entry for host \"[local]\", user \"ann\", database \"shop\", no encryption"),
            (
                far,
                true,
                "pg_hba.conf rejects connection for host \"10.0.0.1\", user \"ann\", database \"shop\", SSL encryption",
            ),
            (
                walsender,
                true,
                "pg_hba.conf rejects replication connection for host \"10.0.0.1\", user \"ann\", SSL encryption",
            ),
            (
                walsender,
                false,
                "no pg_hba.conf entry for replication connection from host \"10.0.0.1\", user \"ann\", SSL encryption",
            ),
        ] {
            assert_eq!(ClientError::no_rule(&client, rejected).message(), expected);
        }
    }

    #[test]
    fn every_error_has_its_code_and_severity() {
        let table: &[(ClientError, &str, &str)] = &[
            (ClientError::password_failed("ann"), "FATAL", "28P01"),
            (ClientError::Protocol("x".into()), "FATAL", "08P01"),
            (ClientError::Unsupported("x".into()), "FATAL", "0A000"),
            (ClientError::InvalidReplication("x".into()), "FATAL", "22023"),
            (ClientError::Authorization("x".into()), "FATAL", "28000"),
            (ClientError::PlaintextAfterRequest { encryption: "SSL" }, "FATAL", "08P01"),
            (ClientError::TlsRequired, "FATAL", "28000"),
            (ClientError::CleartextRefused, "FATAL", "28000"),
            (ClientError::TooManyClients, "FATAL", "53300"),
            (ClientError::LoginTimeout, "FATAL", "28000"),
            (ClientError::TooManyOf { what: "role", name: "ann".to_owned() }, "FATAL", "53300"),
            (ClientError::DatabaseDisabled { database: "shop".to_owned() }, "FATAL", "55000"),
            (ClientError::ReplicationRefused, "FATAL", "28000"),
            (ClientError::IdleTimeout, "FATAL", "57P05"),
            (ClientError::IdleTransactionTimeout, "FATAL", "25P03"),
            (ClientError::TransactionTimeout, "FATAL", "25P04"),
            (ClientError::QueryTimeout, "FATAL", "57014"),
            (ClientError::WaitTimeout, "ERROR", "57014"),
            (ClientError::LoginWaitTimeout, "FATAL", "57014"),
            (ClientError::LifetimeReached, "FATAL", "57P01"),
            (ClientError::RouteUnknown { reason: "r".to_owned() }, "FATAL", "57P03"),
            (ClientError::ServerUnreachable, "FATAL", "08001"),
            (ClientError::ServerRefused { code: "3D000".to_owned(), message: "m".to_owned() }, "FATAL", "3D000"),
            (ClientError::ConsoleForbidden { user: "ann".to_owned() }, "FATAL", "42501"),
            (ClientError::ServerLost { in_doubt: true }, "FATAL", "08006"),
            (ClientError::ServerLost { in_doubt: false }, "FATAL", "08006"),
            (ClientError::CancelledWhileHeld, "ERROR", "57014"),
            (ClientError::Terminated, "FATAL", "57P01"),
            (ClientError::ReplicationEnded, "FATAL", "57P01"),
            (ClientError::MoveFailed { reason: "r".into() }, "FATAL", "57P01"),
            (ClientError::Ordered { code: "57P01".to_owned(), message: "m".to_owned() }, "FATAL", "57P01"),
            (ClientError::QueryWaitTimeout, "FATAL", "53300"),
            (ClientError::SettingsLost { code: "42704".to_owned() }, "FATAL", "42704"),
            (ClientError::StatementTooLarge, "FATAL", "54000"),
            (ClientError::TooManyStatements, "FATAL", "54000"),
            (ClientError::Internal, "FATAL", "XX000"),
        ];
        for (error, severity, code) in table {
            let mut out = Vec::new();
            error.encode(&mut out);
            let (_, body) = frame::first(&out).expect("valid").expect("whole");
            assert_eq!(error::field(body, b'S'), Some(severity.as_bytes()), "{error:?}");
            assert_eq!(error::field(body, b'V'), Some(severity.as_bytes()), "{error:?}");
            assert_eq!(error::field(body, b'C'), Some(code.as_bytes()), "{error:?}");
            assert!(!error::field(body, b'M').unwrap_or_default().is_empty(), "{error:?}");
        }
    }
}
