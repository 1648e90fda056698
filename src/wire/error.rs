//! ErrorResponse: writing our own and reading a server's.

use super::frame::backend;

/// How bad an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The statement failed, the session goes on.
    Error,
    /// The session ends.
    Fatal,
}

impl Severity {
    /// PostgreSQL's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
        }
    }
}

/// An error as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorFields<'a> {
    /// ERROR or FATAL.
    pub severity: Severity,
    /// SQLSTATE.
    pub code: &'a str,
    /// Primary message.
    pub message: &'a str,
    /// DETAIL.
    pub detail: Option<&'a str>,
    /// HINT.
    pub hint: Option<&'a str>,
}

impl ErrorFields<'_> {
    /// Appends the ErrorResponse.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(backend::ERROR_RESPONSE);
        let length_at = out.len();
        out.extend_from_slice(&[0; 4]);
        let mut field = |kind: u8, text: &str| {
            out.push(kind);
            // A zero byte would end the field; none of our texts has one, names sent by clients cannot.
            out.extend(text.bytes().filter(|&byte| byte != 0));
            out.push(0);
        };
        field(b'S', self.severity.as_str());
        field(b'V', self.severity.as_str());
        field(b'C', self.code);
        field(b'M', self.message);
        if let Some(detail) = self.detail {
            field(b'D', detail);
        }
        if let Some(hint) = self.hint {
            field(b'H', hint);
        }
        out.push(0);
        let length = (out.len() - length_at) as u32;
        out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
    }
}

/// One field of an ErrorResponse or NoticeResponse body, such as `b'C'` for the SQLSTATE.
pub fn field(mut body: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        let (&kind, mut rest) = body.split_first()?;
        if kind == 0 {
            return None;
        }
        let text = super::frame::take_cstr(&mut rest)?;
        if kind == wanted {
            return Some(text);
        }
        body = rest;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::frame;

    proptest! {
        #[test]
        fn fields_come_back(message in "[^\0]{0,80}", detail in prop::option::of("[^\0]{0,80}")) {
            let fields = ErrorFields { severity: Severity::Fatal, code: "57P01", message: &message, detail: detail.as_deref(), hint: None };
            let mut out = Vec::new();
            fields.encode(&mut out);
            let (header, body) = frame::first(&out).expect("valid").expect("whole");
            prop_assert_eq!(header.tag, b'E');
            prop_assert_eq!(field(body, b'S'), Some(&b"FATAL"[..]));
            prop_assert_eq!(field(body, b'C'), Some(&b"57P01"[..]));
            prop_assert_eq!(field(body, b'M'), Some(message.as_bytes()));
            prop_assert_eq!(field(body, b'D'), detail.as_deref().map(str::as_bytes));
            prop_assert_eq!(field(body, b'H'), None);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>, wanted: u8) {
            let _ = field(&bytes, wanted);
        }
    }
}
