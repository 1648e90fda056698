//! Who goes on in a pause: which frames begin a transaction that its client has declared read-only (`reads = "continue"`),
//! which end a prepared transaction, and the entry by the gate that lets those in.
//!
//! Declared means that the server holds the client to it: `BEGIN READ ONLY`, or `default_transaction_read_only = on`, which
//! servers report from PostgreSQL 14 on. What is not known to be declared is held like every write. The texts are looked at
//! while a cutover holds everybody else, and at no other time.
//!
//! Nothing may rest on the answer but who waits: a client that leaves its read-only transaction within one message
//! (`BEGIN READ ONLY; COMMIT; INSERT …`) writes on the server that is left, and the drain waits for it as for any other.

use super::entry::SessionState;
use super::handoff::{is_name_byte, skip_space};
use super::session::Session;
use crate::switch::Database;
use crate::wire::frame::{HEADER_BYTES, Header, frontend};

/// Statements that read, by their first word.
const READING: [&[u8]; 8] = [b"select", b"with", b"table", b"values", b"show", b"explain", b"fetch", b"copy"];

/// What a session's transactions are where they do not say it themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ByDefault {
    ReadOnly,
    /// Or not known.
    ReadWrite,
}

impl ByDefault {
    /// As the server has reported it last.
    pub(super) fn of(reported: &[(String, String)]) -> Self {
        let is_on = |(name, value): &(String, String)| name == "default_transaction_read_only" && value == "on";
        if reported.iter().any(is_on) { Self::ReadOnly } else { Self::ReadWrite }
    }
}

/// Whether the frame with this tag, the first of a transaction, begins one that is declared read-only. `body` is as much of
/// it as is at hand; `named` gives the text of a prepared statement, where it is known.
pub(super) fn declares_read_only<'a>(
    tag: u8,
    body: &'a [u8],
    by_default: ByDefault,
    named: impl FnOnce(&[u8]) -> Option<&'a [u8]>,
) -> bool {
    match tag {
        frontend::QUERY => is_read(body, by_default),
        frontend::PARSE => after_name(body).is_some_and(|text| is_read(text, by_default)),
        frontend::BIND => {
            let text = after_name(body).and_then(name_at).and_then(named);
            text.map_or(by_default == ByDefault::ReadOnly, |text| is_read(text, by_default))
        }
        frontend::DESCRIBE | frontend::CLOSE | frontend::SYNC => by_default == ByDefault::ReadOnly,
        _ => false,
    }
}

/// Whether the frame with this tag ends a prepared transaction and does nothing else; `body` and `named` as above.
pub(super) fn ends_prepared<'a>(tag: u8, body: &'a [u8], named: impl FnOnce(&[u8]) -> Option<&'a [u8]>) -> bool {
    let text = match tag {
        frontend::QUERY => Some(body),
        frontend::PARSE => after_name(body),
        frontend::BIND => after_name(body).and_then(name_at).and_then(named),
        _ => None,
    };
    text.is_some_and(is_end_of_prepared)
}

/// `COMMIT PREPARED 'x'` or `ROLLBACK PREPARED 'x'`, to the text's end.
fn is_end_of_prepared(text: &[u8]) -> bool {
    let mut words = Words { text, at: 0 };
    let ends = words.next().is_some_and(|word| is(word, b"commit") || is(word, b"rollback"));
    if !ends || !words.next().is_some_and(|word| is(word, b"prepared")) {
        return false;
    }
    let Some((b'\'', literal)) = text[skip_space(text, words.at)..].split_first() else { return false };
    let Some(end) = literal.iter().position(|byte| *byte == b'\'') else { return false };
    let rest = text.len() - literal.len() + end + 1;
    let semicolon = skip_space(text, rest);
    let after = if text.get(semicolon) == Some(&b';') { skip_space(text, semicolon + 1) } else { semicolon };
    text.get(after).is_none_or(|byte| *byte == 0)
}

/// Whether a text begins a read-only transaction, or is a read of its own in one.
fn is_read(text: &[u8], by_default: ByDefault) -> bool {
    let mut words = Words { text, at: 0 };
    let Some(first) = words.next() else { return false };
    if is(first, b"begin") || is(first, b"start") {
        return declared(words).unwrap_or(by_default) == ByDefault::ReadOnly;
    }
    by_default == ByDefault::ReadOnly && READING.iter().any(|word| is(first, word))
}

/// What the rest of a BEGIN says last about it.
fn declared(words: Words<'_>) -> Option<ByDefault> {
    let mut said = None;
    let mut before: &[u8] = b"";
    for word in words {
        if is(before, b"read") {
            match word {
                word if is(word, b"only") => said = Some(ByDefault::ReadOnly),
                word if is(word, b"write") => said = Some(ByDefault::ReadWrite),
                _ => {}
            }
        }
        before = word;
    }
    said
}

fn is(word: &[u8], expected: &[u8]) -> bool {
    word.eq_ignore_ascii_case(expected)
}

/// The words of a statement, up to its semicolon; commas between them are passed over, anything else ends it.
struct Words<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let mut start = skip_space(self.text, self.at);
        while self.text.get(start) == Some(&b',') {
            start = skip_space(self.text, start + 1);
        }
        let rest = &self.text[start.min(self.text.len())..];
        let word = &rest[..rest.iter().position(|byte| !is_name_byte(*byte)).unwrap_or(rest.len())];
        self.at = start + word.len();
        (!word.is_empty()).then_some(word)
    }
}

/// What follows the first name of a Parse or Bind.
fn after_name(body: &[u8]) -> Option<&[u8]> {
    let end = body.iter().position(|byte| *byte == 0)?;
    Some(&body[end + 1..])
}

fn name_at(body: &[u8]) -> Option<&[u8]> {
    let end = body.iter().position(|byte| *byte == 0)?;
    Some(&body[..end])
}

/// What a session does whose next frame goes on while `database` holds everybody else; `None`: it is held.
pub(super) fn going_on<'a>(
    database: &Database,
    tag: u8,
    body: &'a [u8],
    by_default: ByDefault,
    named: impl Fn(&[u8]) -> Option<&'a [u8]>,
) -> Option<SessionState> {
    if !database.lets_some_in() {
        None
    } else if ends_prepared(tag, body, &named) {
        // Waited for like everybody who writes.
        Some(SessionState::Active)
    } else if database.lets_reads_in() && declares_read_only(tag, body, by_default, &named) {
        Some(SessionState::Reading)
    } else {
        None
    }
}

impl Session {
    /// Enters beside the gate, which has just been found closed, if the next frame is one of those that go on.
    pub(super) fn enter_beside(&mut self, header: Header) -> bool {
        let database = &self.local.database;
        if !database.lets_some_in() {
            return false;
        }
        let (Some(member), Some(backend)) = (&self.member, &self.backend) else { return false };
        let frame = &self.up.buffer.filled()[self.up.cleared..];
        let body = &frame[HEADER_BYTES..frame.len().min(HEADER_BYTES + header.body_bytes as usize)];
        let by_default = ByDefault::of(&backend.connection.parameters);
        let text_of = |name: &[u8]| self.text_when_captured(name);
        let Some(state) = going_on(database, header.tag, body, by_default, text_of) else { return false };
        match member.try_enter_reading() {
            Some(admission) if admission.epoch == self.epoch => {
                self.enter_as(state);
                if state == SessionState::Reading {
                    self.worker.shared.sessions.count_read();
                }
                true
            }
            Some(_) => {
                member.leave();
                false
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prepared_transaction_and_nothing_else_is_one() {
        for text in ["COMMIT PREPARED 'x'", "/* jta */ rollback prepared 'a;b' ; ", "Commit/**/Prepared'1_a_b';"] {
            let body = [text.as_bytes(), b"\0"].concat();
            assert!(ends_prepared(frontend::QUERY, &body, |_| None), "{text}");
            let parse = [b"s1\0", &body[..], b"\0\0"].concat();
            assert!(ends_prepared(frontend::PARSE, &parse, |_| None), "{text}");
            let known = |name: &[u8]| (name == b"s1").then_some(&body[..]);
            assert!(ends_prepared(frontend::BIND, b"\0s1\0\0\0\0\0\0\0", known), "{text}");
            assert!(!ends_prepared(frontend::EXECUTE, &body, |_| None));
        }
        for text in [
            "COMMIT",
            "COMMIT PREPARED",
            "COMMIT PREPARED 'x",
            "COMMIT PREPARED 'x'; INSERT INTO t VALUES (1)",
            "COMMIT PREPARED 'it''s'",
            "COMMIT PREPARED x",
            "PREPARE TRANSACTION 'x'",
            "SELECT 'COMMIT PREPARED'",
            "",
        ] {
            let body = [text.as_bytes(), b"\0"].concat();
            assert!(!ends_prepared(frontend::QUERY, &body, |_| None), "{text}");
        }
    }

    #[test]
    fn what_is_declared_is_told_from_what_is_not() {
        use ByDefault::{ReadOnly, ReadWrite};
        for (text, in_writable, in_read_only) in [
            ("BEGIN READ ONLY", true, true),
            ("begin read only;", true, true),
            ("BEGIN TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY, NOT DEFERRABLE", true, true),
            ("/* who */ START -- it\n TRANSACTION READ/**/ONLY; SELECT 1", true, true),
            ("BEGIN READ WRITE, READ ONLY", true, true),
            ("BEGIN READ ONLY READ WRITE", false, false),
            ("BEGIN ISOLATION LEVEL READ COMMITTED", false, true),
            ("BEGIN; SELECT 'read only'", false, true),
            ("BEGIN", false, true),
            ("BEGIN READ WRITE", false, false),
            ("SELECT 1", false, true),
            ("with a as (select 1) table a", false, true),
            ("SET default_transaction_read_only = off", false, false),
            ("INSERT INTO t VALUES (1)", false, false),
            ("CALL p()", false, false),
            ("selected", false, false),
            ("", false, false),
            (";", false, false),
        ] {
            let body = [text.as_bytes(), b"\0"].concat();
            for (by_default, expected) in [(ReadWrite, in_writable), (ReadOnly, in_read_only)] {
                let told = declares_read_only(frontend::QUERY, &body, by_default, |_| None);
                assert_eq!(told, expected, "{text:?} where transactions are {by_default:?}");
                let parse = [b"s1\0", &body[..], b"\0\0"].concat();
                assert_eq!(declares_read_only(frontend::PARSE, &parse, by_default, |_| None), expected, "{text:?}");
                let known = |name: &[u8]| (name == b"s1").then_some(&body[..]);
                let bind = b"\0s1\0\0\0\0\0\0\0";
                assert_eq!(declares_read_only(frontend::BIND, bind, by_default, known), expected, "{text:?}");
            }
        }
        // Statements that are not known, and frames that are cut, wait unless the session itself is read-only.
        let unknown = |tag, body: &[u8], by_default| declares_read_only(tag, body, by_default, |_| None);
        assert!(!unknown(frontend::BIND, b"\0s2\0", ReadWrite) && unknown(frontend::BIND, b"\0s2\0", ReadOnly));
        assert!(!unknown(frontend::BIND, b"", ReadWrite) && !unknown(frontend::PARSE, b"BEGIN READ ONLY", ReadWrite));
        assert!(!unknown(frontend::FUNCTION_CALL, b"", ReadOnly));
        let reported = [("default_transaction_read_only".to_owned(), "on".to_owned())];
        assert_eq!(ByDefault::of(&reported), ReadOnly);
        assert_eq!(ByDefault::of(&[]), ReadWrite);
    }
}
