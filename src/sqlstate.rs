//! The SQLSTATEs this program sends or acts on (PostgreSQL documentation, appendix A).

/// `08P01` protocol_violation.
pub const PROTOCOL_VIOLATION: &str = "08P01";
/// `0A000` feature_not_supported.
pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
/// `28000` invalid_authorization_specification.
pub const INVALID_AUTHORIZATION: &str = "28000";
/// `28P01` invalid_password.
pub const INVALID_PASSWORD: &str = "28P01";
/// `3D000` invalid_catalog_name: no such database.
pub const INVALID_CATALOG_NAME: &str = "3D000";
/// `22023` invalid_parameter_value.
pub const INVALID_PARAMETER_VALUE: &str = "22023";
/// `23503` foreign_key_violation.
pub const FOREIGN_KEY_VIOLATION: &str = "23503";
/// `42501` insufficient_privilege.
pub const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// `42601` syntax_error.
pub const SYNTAX_ERROR: &str = "42601";
/// `53300` too_many_connections.
pub const TOO_MANY_CONNECTIONS: &str = "53300";
/// `54000` program_limit_exceeded.
pub const PROGRAM_LIMIT_EXCEEDED: &str = "54000";
/// `55P03` lock_not_available.
pub const LOCK_NOT_AVAILABLE: &str = "55P03";
/// `57014` query_canceled.
pub const QUERY_CANCELED: &str = "57014";
/// `25P03` idle_in_transaction_session_timeout.
pub const IDLE_IN_TRANSACTION_TIMEOUT: &str = "25P03";
/// `25P04` transaction_timeout (PostgreSQL 17).
pub const TRANSACTION_TIMEOUT: &str = "25P04";
/// `57P05` idle_session_timeout (PostgreSQL 14).
pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
/// `57P01` admin_shutdown: this session was ended on an operator's order.
pub const ADMIN_SHUTDOWN: &str = "57P01";
/// `57P03` cannot_connect_now: nobody is known to be the active server, or we are starting or stopping.
pub const CANNOT_CONNECT_NOW: &str = "57P03";
/// `08006` connection_failure: the server's side was lost.
pub const CONNECTION_FAILURE: &str = "08006";
/// `08001` the server could not be reached.
pub const CANNOT_ESTABLISH_CONNECTION: &str = "08001";
/// `42622` name_too_long.
pub const NAME_TOO_LONG: &str = "42622";
/// `42704` undefined_object.
pub const UNDEFINED_OBJECT: &str = "42704";
/// `55000` object_not_in_prerequisite_state.
pub const OBJECT_NOT_IN_PREREQUISITE_STATE: &str = "55000";
/// `XX000` internal_error.
pub const INTERNAL_ERROR: &str = "XX000";
