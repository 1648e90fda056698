//! What goes wrong on a connection that was open.

use tokio_postgres::error::DbError;

/// The fields of an ErrorResponse (PostgreSQL documentation, "Error and Notice Message Fields").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorReport {
    /// `ERROR`, `FATAL` or `PANIC`.
    pub severity: String,
    /// Primary message; may quote data.
    pub message: String,
    /// DETAIL; often quotes data.
    pub detail: Option<String>,
    /// HINT.
    pub hint: Option<String>,
    /// Schema of the object that the error is about.
    pub schema: Option<String>,
    /// Table that the error is about.
    pub table: Option<String>,
    /// Constraint that was violated.
    pub constraint: Option<String>,
}

impl ErrorReport {
    /// The primary message, unless it is of a kind that quotes values: data exceptions (class 22, `invalid input syntax
    /// for type integer: "…"`) and what functions raise themselves (class P0).
    fn without_data(&self, code: &str) -> &str {
        if quotes_data(code) { IN_THE_LOG } else { &self.message }
    }
}

/// Instead of a message that may quote data.
const IN_THE_LOG: &str = "the message may quote data and is in the server's log";

/// Whether messages of this SQLSTATE quote values.
fn quotes_data(code: &str) -> bool {
    matches!(code.get(..2), Some("22" | "P0"))
}

/// A server's answer as it may be logged and shown: neither the message nor DETAIL of a kind that quotes values. Integrity
/// violations (class 23) name the constraint in the message, and quote the row in DETAIL.
pub fn without_values(report: &DbError) -> String {
    let (severity, code) = (report.severity(), report.code().code());
    if quotes_data(code) {
        format!("{severity} {code}: {IN_THE_LOG}")
    } else if code.starts_with("23") {
        format!("{severity} {code}: {}", report.message())
    } else {
        format!("db error: {report}")
    }
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
    /// The server refused. What is displayed quotes no row value; the report itself may.
    #[error("{} {code}: {}", .report.severity, .report.without_data(code))]
    Server {
        /// SQLSTATE.
        code: String,
        /// The rest of what it said.
        report: Box<ErrorReport>,
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

impl RawError {
    /// The SQLSTATE, where the server refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server { code, .. } => Some(code),
            Self::Io { .. } | Self::Protocol { .. } => None,
        }
    }

    /// Reads an ErrorResponse. Fields that are missing are empty: an error that cannot be read in full is still an error.
    pub(crate) fn from_error_response(body: &[u8]) -> Self {
        let (mut code, mut report) = (String::new(), Box::<ErrorReport>::default());
        for field in body.split(|byte| *byte == 0) {
            let Some((kind, text)) = field.split_first() else { continue };
            let text = String::from_utf8_lossy(text).into_owned();
            match kind {
                // `V` is `S` in English whatever lc_messages says; it comes after `S`.
                b'S' | b'V' => report.severity = text,
                b'C' => code = text,
                b'M' => report.message = text,
                b'D' => report.detail = Some(text),
                b'H' => report.hint = Some(text),
                b's' => report.schema = Some(text),
                b't' => report.table = Some(text),
                b'n' => report.constraint = Some(text),
                _ => {}
            }
        }
        Self::Server { code, report }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_response_is_read_in_english() {
        let body = b"SFEHLER\0VERROR\0C23505\0Mdoppelt\0Dd\0Hh\0ss\0tt\0nn\0Rroutine\0\0";
        let RawError::Server { code, report } = RawError::from_error_response(body) else { panic!("not Server") };
        let text = |text: &str| Some(text.to_owned());
        let expected = ErrorReport {
            severity: "ERROR".to_owned(),
            message: "doppelt".to_owned(),
            detail: text("d"),
            hint: text("h"),
            schema: text("s"),
            table: text("t"),
            constraint: text("n"),
        };
        assert_eq!((code.as_str(), *report), ("23505", expected));
    }

    #[test]
    fn what_is_displayed_quotes_no_values() {
        let data =
            RawError::from_error_response(b"SERROR\0C22P02\0Minvalid input syntax for type integer: \"1234\"\0\0");
        assert!(!data.to_string().contains("1234"), "{data}");
        let name = RawError::from_error_response(b"SERROR\0C42P01\0Mrelation \"t\" does not exist\0Dsecret\0\0");
        assert_eq!(name.to_string(), "ERROR 42P01: relation \"t\" does not exist");
    }
}
