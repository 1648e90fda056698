//! The messages that the proxy says itself, appended to a buffer.

use super::frame::{FrameError, backend, frontend, take_cstr};
use super::ledger::TransactionStatus;
use super::startup::PROTOCOL_3_0;

/// So many parameters of a server are remembered; PostgreSQL reports fifteen, extensions a few more.
const REPORTED_MAX: usize = 256;

/// Terminate, as a client says it to a server.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// Sync, as a client says it to a server.
pub const SYNC: [u8; 5] = [b'S', 0, 0, 0, 4];

/// Appends a message whose body `fill` writes.
fn message(out: &mut Vec<u8>, tag: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    let length_at = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let length = (out.len() - length_at) as u32;
    out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
}

fn cstr(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
    out.push(0);
}

fn authentication(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    message(out, backend::AUTHENTICATION, |out| {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// AuthenticationOk.
pub fn authentication_ok(out: &mut Vec<u8>) {
    authentication(out, 0, &[]);
}

/// AuthenticationCleartextPassword.
pub fn authentication_cleartext(out: &mut Vec<u8>) {
    authentication(out, 3, &[]);
}

/// AuthenticationMD5Password.
pub fn authentication_md5(out: &mut Vec<u8>, salt: [u8; 4]) {
    authentication(out, 5, &salt);
}

/// AuthenticationSASL, offering these mechanisms, the preferred one first.
pub fn authentication_sasl(out: &mut Vec<u8>, mechanisms: &[&str]) {
    let mut list = Vec::new();
    mechanisms.iter().for_each(|name| cstr(&mut list, name));
    list.push(0);
    authentication(out, 10, &list);
}

/// AuthenticationSASLContinue.
pub fn authentication_sasl_continue(out: &mut Vec<u8>, data: &[u8]) {
    authentication(out, 11, data);
}

/// AuthenticationSASLFinal.
pub fn authentication_sasl_final(out: &mut Vec<u8>, data: &[u8]) {
    authentication(out, 12, data);
}

/// NegotiateProtocolVersion: 3.0 is spoken, these options are not known.
pub fn negotiate_protocol_version(out: &mut Vec<u8>, unknown_options: &[String]) {
    message(out, backend::NEGOTIATE_PROTOCOL_VERSION, |out| {
        out.extend_from_slice(&PROTOCOL_3_0.to_be_bytes());
        out.extend_from_slice(&(unknown_options.len() as u32).to_be_bytes());
        for option in unknown_options {
            cstr(out, option);
        }
    });
}

/// ParameterStatus.
pub fn parameter_status(out: &mut Vec<u8>, name: &str, value: &str) {
    message(out, backend::PARAMETER_STATUS, |out| {
        cstr(out, name);
        cstr(out, value);
    });
}

/// BackendKeyData.
pub fn backend_key_data(out: &mut Vec<u8>, pid: i32, key: &[u8]) {
    message(out, backend::BACKEND_KEY_DATA, |out| {
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(key);
    });
}

/// ReadyForQuery.
pub fn ready_for_query(out: &mut Vec<u8>, status: TransactionStatus) {
    let byte = match status {
        TransactionStatus::Idle => b'I',
        TransactionStatus::InBlock => b'T',
        TransactionStatus::Failed => b'E',
    };
    message(out, backend::READY_FOR_QUERY, |out| out.push(byte));
}

/// CommandComplete.
pub fn command_complete(out: &mut Vec<u8>, tag: &str) {
    message(out, backend::COMMAND_COMPLETE, |out| cstr(out, tag));
}

/// A message of any kind.
pub fn raw(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
    message(out, tag, |out| out.extend_from_slice(body));
}

/// Close of a prepared statement whose name may be any bytes.
pub fn close_raw(out: &mut Vec<u8>, name: &[u8]) {
    message(out, frontend::CLOSE, |out| {
        out.push(b'S');
        out.extend_from_slice(name);
        out.push(0);
    });
}

/// Parse; `tail` is what follows the name: the text, the parameter types.
pub fn parse_raw(out: &mut Vec<u8>, name: &[u8], tail: &[u8]) {
    message(out, frontend::PARSE, |out| {
        out.extend_from_slice(name);
        out.push(0);
        out.extend_from_slice(tail);
    });
}

/// Close of a prepared statement, as a client says it.
pub fn close_statement(out: &mut Vec<u8>, name: &str) {
    message(out, frontend::CLOSE, |out| {
        out.push(b'S');
        cstr(out, name);
    });
}

/// The body of a ParameterStatus as name and value; `None` where it is malformed or not UTF-8.
pub fn read_parameter_status(mut body: &[u8]) -> Option<(&str, &str)> {
    let name = std::str::from_utf8(take_cstr(&mut body)?).ok()?;
    let value = std::str::from_utf8(take_cstr(&mut body)?).ok()?;
    Some((name, value))
}

/// Notes in `known` what a ParameterStatus says. A server that makes up names without end is not followed.
pub fn note_parameter(known: &mut Vec<(String, String)>, name: &str, value: &str) {
    match known.iter().position(|(known, _)| known == name) {
        Some(at) => value.clone_into(&mut known[at].1),
        None if known.len() < REPORTED_MAX => known.push((name.to_owned(), value.to_owned())),
        None => {}
    }
}

/// The body of a PasswordMessage: one zero-terminated string and nothing else.
pub fn read_password(mut body: &[u8]) -> Option<&[u8]> {
    let password = take_cstr(&mut body)?;
    body.is_empty().then_some(password)
}

/// The body of a SASLInitialResponse: the mechanism and the client's first message.
pub fn read_sasl_initial(mut body: &[u8]) -> Option<(&[u8], &[u8])> {
    let mechanism = take_cstr(&mut body)?;
    let (length, data) = body.split_first_chunk::<4>()?;
    (usize::try_from(i32::from_be_bytes(*length)).ok()? == data.len()).then_some((mechanism, data))
}

/// The status in the body of a ReadyForQuery.
pub fn read_ready_for_query(body: &[u8]) -> Result<TransactionStatus, FrameError> {
    match body {
        [byte] => TransactionStatus::from_byte(*byte).ok_or(FrameError::Length),
        _ => Err(FrameError::Length),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::frame;

    #[test]
    fn messages_are_laid_out_as_documented() {
        let mut out = Vec::new();
        negotiate_protocol_version(&mut out, &["_pq_.x".to_owned()]);
        assert_eq!(out, b"v\0\0\0\x13\0\x03\0\0\0\0\0\x01_pq_.x\0");
        out.clear();
        ready_for_query(&mut out, TransactionStatus::Failed);
        assert_eq!(out, b"Z\0\0\0\x05E");
        out.clear();
        parameter_status(&mut out, "TimeZone", "UTC");
        let (_, body) = frame::first(&out).expect("valid").expect("whole");
        assert_eq!(read_parameter_status(body), Some(("TimeZone", "UTC")));
    }

    #[test]
    fn parameters_are_noted_once_and_not_without_end() {
        let mut known = Vec::new();
        for number in 0..1000 {
            note_parameter(&mut known, &format!("app.p{number}"), "first");
            note_parameter(&mut known, "app.p0", "second");
        }
        assert_eq!((known.len(), &*known[0].1, &*known[1].1), (REPORTED_MAX, "second", "first"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            let _ = read_parameter_status(&bytes);
            let _ = read_password(&bytes);
            let _ = read_sasl_initial(&bytes);
            let _ = read_ready_for_query(&bytes);
        }
    }
}
