//! What may be run a second time, and what a statement is called in a report. Pure.
//!
//! The judgement is lexical and errs on the side of leaving a statement out. Nothing rests on it that must not happen: the
//! target runs a sample as one statement of the extended protocol in a read-only transaction that is rolled back. It
//! keeps out what such a transaction does not hold back (advisory locks, calls to other servers), and what answers
//! differently each time it is asked.

use std::borrow::Cow;
use std::collections::HashSet;

use super::tally::Skip;
use crate::proxy::handoff::{is_name_byte, skip_space};

/// Bytes of a statement's text in a report.
const SHOWN_BYTES: usize = 300;

/// First words of statements that may be reads.
const READS: [&str; 4] = ["select", "with", "values", "table"];

/// Words that no read has: they write or lock. `for` is looked at with what follows it.
const WRITES: [&str; 5] = ["insert", "update", "delete", "merge", "into"];

/// Words whose value is another one on each server, or each time.
const CHANGING: [&str; 14] = [
    "current_timestamp",
    "current_time",
    "current_date",
    "localtimestamp",
    "localtime",
    "ctid",
    "xmin",
    "xmax",
    "cmin",
    "cmax",
    "tableoid",
    "tablesample",
    "information_schema",
    "nextval",
];

/// Functions that are not volatile and yet are about the server, the session or the time.
const CHANGING_CALLS: [&str; 8] = [
    "now",
    "age",
    "version",
    "transaction_timestamp",
    "statement_timestamp",
    "query_to_xml",
    "table_to_xml",
    "database_to_xml",
];

/// Names with these beginnings are the server's own catalogues and functions, other servers, or large objects.
const OWN: [&str; 6] = ["pg_", "txid_", "inet_", "lo_", "dblink", "has_"];

/// Literals that are a point in time.
const TIMES: [&str; 4] = ["now", "today", "tomorrow", "yesterday"];

/// What a database's own objects add: names that a sample must not have.
#[derive(Debug, Default)]
pub(super) struct Avoided {
    /// Volatile functions.
    pub(super) functions: HashSet<String>,
    /// Views and tables whose definition or policies use what a sample must not have.
    pub(super) relations: HashSet<String>,
}

/// Whether a statement can be run again and compared.
pub(super) fn judge(text: &[u8], avoided: &Avoided) -> Result<(), Skip> {
    let mut tokens = Tokens::of(text);
    let mut is_first = true;
    let mut before: Cow<'_, str> = Cow::Borrowed("");
    while let Some(token) = tokens.next() {
        let name = match token {
            Token::Semicolon if tokens.next().is_none() && !is_first => return Ok(()),
            Token::Semicolon => return Err(Skip::NotARead),
            Token::Other(b'(') if is_first => continue,
            Token::Literal(text) => {
                let text = text.trim_ascii();
                if TIMES.iter().any(|time| text.eq_ignore_ascii_case(time.as_bytes())) {
                    return Err(Skip::NotComparable);
                }
                before = Cow::Borrowed("");
                continue;
            }
            Token::Word(name) => name,
            Token::Quoted(_) | Token::Other(_) | Token::Number | Token::Parameter(_) if is_first => {
                return Err(Skip::NotARead);
            }
            Token::Quoted(name) => name,
            Token::Other(b'.') => {
                before = Cow::Borrowed(".");
                continue;
            }
            Token::Other(_) | Token::Number | Token::Parameter(_) => {
                before = Cow::Borrowed("");
                continue;
            }
        };
        let locks = before == "for" && matches!(&*name, "share" | "key" | "no");
        if (is_first && !READS.contains(&&*name)) || WRITES.contains(&&*name) || locks {
            return Err(Skip::NotARead);
        }
        // A name in Unicode escapes is not read here.
        if name == "u" && tokens.text.get(tokens.at) == Some(&b'&') {
            return Err(Skip::NotComparable);
        }
        let is_call = tokens.peeks(b'(');
        // A function of a row may be written as if it were one of its columns.
        let may_call = is_call || before == ".";
        if CHANGING.contains(&&*name)
            || OWN.iter().any(|prefix| name.starts_with(prefix))
            || avoided.relations.contains(&*name)
            || (is_call && CHANGING_CALLS.contains(&&*name))
            || (may_call && avoided.functions.contains(&*name))
        {
            return Err(Skip::NotComparable);
        }
        is_first = false;
        before = name;
    }
    if is_first { Err(Skip::NotARead) } else { Ok(()) }
}

/// The statement without anything that a client may have put a value into: literals, numbers and comments.
pub(super) fn normalised(text: &[u8]) -> String {
    let mut out = String::new();
    let mut needs_space = false;
    let mut tokens = Tokens::of(text);
    while let Some(token) = tokens.next() {
        let is_name = !matches!(token, Token::Other(_) | Token::Semicolon);
        let is_operator = matches!(token, Token::Other(b'=' | b'<' | b'>' | b'*' | b'+' | b'-' | b'/' | b'|'));
        if (is_name || is_operator) && needs_space {
            out.push(' ');
        }
        match token {
            Token::Word(word) => out.push_str(&word),
            Token::Quoted(name) => {
                out.push('"');
                out.push_str(&name);
                out.push('"');
            }
            Token::Literal(_) | Token::Number => out.push('?'),
            Token::Parameter(number) => {
                out.push('$');
                out.push_str(&String::from_utf8_lossy(number));
            }
            Token::Semicolon => break,
            Token::Other(byte) => out.push(char::from(byte)),
        }
        needs_space = is_name || out.ends_with([',', ')', '=', '<', '>', '*']);
    }
    // Lists of values differ in length from one call to the next.
    while out.contains("?, ?") {
        out = out.replace("?, ?", "?");
    }
    if out.len() > SHOWN_BYTES {
        let cut = (0..=SHOWN_BYTES).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out.truncate(cut);
        out.push('…');
    }
    out
}

enum Token<'a> {
    /// An unquoted word, in lower case.
    Word(Cow<'a, str>),
    /// What stands in double quotes.
    Quoted(Cow<'a, str>),
    /// A string of any kind, without its quotes.
    Literal(&'a [u8]),
    Number,
    /// What follows the `$`.
    Parameter(&'a [u8]),
    Semicolon,
    Other(u8),
}

/// Where backslashes escape in plain literals (`standard_conforming_strings = off`) no text is looked at.
struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
    /// The last one was a literal with escapes. One that follows it is its continuation, and has them too.
    escapes: bool,
}

impl<'a> Tokens<'a> {
    fn of(text: &'a [u8]) -> Self {
        Self { text, at: 0, escapes: false }
    }

    fn next(&mut self) -> Option<Token<'a>> {
        let text = self.text;
        self.at = skip_space(text, self.at);
        let start = self.at;
        let byte = *text.get(start)?;
        self.at += 1;
        let continues = std::mem::take(&mut self.escapes);
        Some(match byte {
            // The end of a text in a message.
            0 => return None,
            b';' => Token::Semicolon,
            b'\'' if continues => self.escaped(),
            b'\'' => self.literal(b'\'', Backslash::Plain),
            b'"' => {
                let Token::Literal(name) = self.literal(b'"', Backslash::Plain) else { return None };
                Token::Quoted(String::from_utf8_lossy(name))
            }
            b'$' if text.get(self.at).is_some_and(u8::is_ascii_digit) => {
                self.at = end_of(text, self.at, u8::is_ascii_digit);
                Token::Parameter(&text[start + 1..self.at])
            }
            b'$' => self.dollars(start),
            b'0'..=b'9' => {
                self.at = end_of(text, self.at, |byte| is_name_byte(*byte) || *byte == b'.');
                Token::Number
            }
            _ if is_name_byte(byte) => {
                self.at = end_of(text, self.at, |byte| is_name_byte(*byte));
                let word = &text[start..self.at];
                let prefixed = text.get(self.at) == Some(&b'\'');
                if prefixed && matches!(word, b"e" | b"E") {
                    self.at += 1;
                    return Some(self.escaped());
                }
                if prefixed && matches!(word, b"b" | b"B" | b"x" | b"X" | b"n" | b"N") {
                    self.at += 1;
                    return Some(self.literal(b'\'', Backslash::Plain));
                }
                Token::Word(Cow::Owned(String::from_utf8_lossy(word).to_lowercase()))
            }
            _ => Token::Other(byte),
        })
    }

    fn escaped(&mut self) -> Token<'a> {
        self.escapes = true;
        self.literal(b'\'', Backslash::Escapes)
    }

    /// Up to the closing quote; one that does not close goes to the end.
    fn literal(&mut self, quote: u8, backslash: Backslash) -> Token<'a> {
        let start = self.at;
        loop {
            match self.text.get(self.at) {
                None => return Token::Literal(&self.text[start..]),
                Some(b'\\') if backslash == Backslash::Escapes => self.at += 2,
                Some(byte) if *byte == quote => {
                    let end = self.at;
                    self.at += 1;
                    if self.text.get(self.at) != Some(&quote) {
                        return Token::Literal(&self.text[start.min(end)..end]);
                    }
                    self.at += 1;
                }
                Some(_) => self.at += 1,
            }
        }
    }

    /// `$tag$ … $tag$`, where it is one.
    fn dollars(&mut self, start: usize) -> Token<'a> {
        let text = self.text;
        let end = end_of(text, start + 1, |byte| is_name_byte(*byte) && *byte != b'$');
        if text.get(end) != Some(&b'$') {
            return Token::Other(b'$');
        }
        let (tag, body) = (&text[start..=end], end + 1);
        let close = text[body..].windows(tag.len()).position(|window| window == tag).map(|found| body + found);
        self.at = close.map_or(text.len(), |close| close + tag.len());
        Token::Literal(&text[body..close.unwrap_or(text.len())])
    }

    fn peeks(&self, byte: u8) -> bool {
        self.text.get(skip_space(self.text, self.at)) == Some(&byte)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Backslash {
    Plain,
    Escapes,
}

fn end_of(text: &[u8], from: usize, belongs: impl Fn(&u8) -> bool) -> usize {
    (from..text.len()).find(|at| !belongs(&text[*at])).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn avoided() -> Avoided {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Avoided { functions: set(&["random", "touch", "Touch Me"]), relations: set(&["recent"]) }
    }

    #[test]
    fn only_a_single_read_that_answers_the_same_each_time_is_run_again() {
        for text in [
            "SELECT 1",
            "select * from item where name = 'update; now()' ;  -- why",
            "(SELECT 1) UNION (SELECT 2)",
            "WITH a AS (SELECT 1) SELECT * FROM a",
            "VALUES (1), (2)",
            "TABLE item",
            "SELECT substring(name FOR 3), version, random FROM item",
            "SELECT $$delete$$, $a$ $$ nextval $a$, $1",
            "SELECT E'it\\'s; delete'",
            "SELECT E'a'\n'b\\'; delete ' -- ; delete",
            "SELECT u & 1, touch FROM item",
            "SELECT 1\0",
        ] {
            assert_eq!(judge(text.as_bytes(), &avoided()), Ok(()), "{text}");
        }
        for text in [
            "",
            ";",
            "BEGIN",
            "INSERT INTO t VALUES (1)",
            "SELECT 1; SELECT 2",
            "SELECT 1; COMMIT",
            "SELECT 1;;",
            "WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a",
            "SELECT * INTO u FROM t",
            "SELECT * FROM t FOR UPDATE",
            "SELECT * FROM t FOR NO KEY UPDATE",
            "select * from t for/**/share",
            "SELECT E'\\'; DELETE FROM t; --'; DELETE FROM t",
            "SELECT 'a' -- why\r; DELETE FROM t",
            "EXECUTE s",
            "SHOW all",
            "1",
        ] {
            assert_eq!(judge(text.as_bytes(), &avoided()), Err(Skip::NotARead), "{text}");
        }
        for text in [
            "SELECT now()",
            "SELECT current_timestamp",
            "SELECT pg_advisory_lock(1)",
            "SELECT nextval('s')",
            "SELECT \"touch\" (1)",
            "SELECT public . \"Touch Me\"()",
            "SELECT random()",
            "SELECT item.touch FROM item",
            "SELECT (item) . \"Touch Me\" FROM item",
            "SELECT U&\"\\0074ouch\"(1)",
            "SELECT * FROM recent",
            "SELECT * FROM pg_class",
            "SELECT ctid FROM item",
            "SELECT ' Today '::date",
            "SELECT * FROM dblink('host=x', 'select 1') AS t(a int)",
        ] {
            assert_eq!(judge(text.as_bytes(), &avoided()), Err(Skip::NotComparable), "{text}");
        }
    }

    #[test]
    fn what_is_shown_has_no_values() {
        for (text, shown) in [
            ("SELECT  a FROM t WHERE b = 'secret' AND c=17 -- secret", "select a from t where b = ? and c = ?"),
            ("SELECT * FROM t WHERE a IN (1, 2, 3)", "select * from t where a in(?)"),
            ("SELECT $1::int, E'se\\'cret', $$se'cret$$, X'5e', 1.5e3", "select $1::int, ?"),
            ("SELECT 'secret", "select ?"),
            ("SELECT E'a'\n'b\\' secret', c", "select ? ?, c"),
            ("SELECT E'a' -- why\r'b\\' secret'", "select ? ?"),
            ("SELECT E'a', 'b\\', c", "select ?, c"),
            ("SELECT \"Name\" /* secret */ FROM \"T\"", "select \"Name\" from \"T\""),
        ] {
            assert_eq!(normalised(text.as_bytes()), shown);
        }
        assert!(normalised("a, ".repeat(1000).as_bytes()).len() < 310);
    }

    proptest! {
        #[test]
        fn never_panics(text in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _judged = judge(&text, &avoided());
            let _shown = normalised(&text);
        }

        #[test]
        fn no_letter_of_a_literal_is_shown(text in "[a-f '\"$\\\\;Ee()-]{0,40}", secret in "[x-z]{4}") {
            let shown = normalised(format!("{} '{secret}'", text.replace(['\'', '"', '$', '-'], "")).as_bytes());
            prop_assert!(!shown.contains(&secret));
        }
    }
}
