//! What a statement's text may leave behind on its backend, so that only sessions that leave something are asked.
//!
//! Where backends are shared, a session's state must be read after a transaction that may have changed it, and reading
//! costs a round trip. This scan says which texts may have: it looks at the first word of each statement, and for calls of
//! the functions that change a session. It errs on the side of asking. What it cannot see is a function of the
//! application's that does such a thing inside.

use super::scan::{end_of_comment, is_name_byte, is_space, skip_space};

/// What a text may leave behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traces(u8);

impl Traces {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// It changes settings until the end of its transaction: texts after it may mean something else there.
    pub const LOCAL: Self = Self(1);
    /// It may change what outlives the transaction: settings, role, LISTEN, locks, statements, temporary objects.
    pub const SESSION: Self = Self(2);

    /// Whether anything outlives the transaction.
    pub fn outlive(self) -> bool {
        self.0 & Self::SESSION.0 != 0
    }

    /// Whether texts that follow may mean something else than they would elsewhere.
    pub fn change_meaning(self) -> bool {
        self.0 != 0
    }
}

impl std::ops::BitOrAssign for Traces {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// Looks through `text`, which is as much as is at hand of `length` bytes.
pub fn traces(text: &[u8], length: usize) -> Traces {
    let mut found = if text.len() < length { Traces::SESSION } else { Traces::NONE };
    let mut at = 0;
    // Words so far in the statement; 0 at its start.
    let mut words = 0usize;
    let mut first = First::Other;
    // Where the quoted name ends that `at` stands in.
    let mut name_end = 0;
    while let Some(&byte) = text.get(at) {
        match byte {
            b';' => {
                words = 0;
                first = First::Other;
                at += 1;
            }
            b'\'' => {
                let escapes = at > 0 && text[at - 1] | 0x20 == b'e' && (at < 2 || !is_name_byte(text[at - 2]));
                let (end, backslash) = end_of_literal(text, at + 1, escapes);
                if backslash && !escapes {
                    // Where backslashes escape, the literal may end elsewhere.
                    found |= Traces::SESSION;
                }
                at = end;
            }
            // Words in a quoted name are looked at like others: it may be that of a function.
            b'"' if at < name_end => at += 1,
            b'"' => {
                name_end = end_of_name(text, at + 1).unwrap_or(text.len());
                if hides_what_follows(&text[at + 1..name_end]) {
                    found |= Traces::SESSION;
                }
                at += 1;
            }
            b'$' => at = end_of_dollars(text, at),
            b'-' if text.get(at + 1) == Some(&b'-') => at = skip_space(text, at),
            b'/' if text.get(at + 1) == Some(&b'*') => at = end_of_comment(text, at),
            _ if is_name_byte(byte) && !byte.is_ascii_digit() => {
                let end = (at..text.len()).find(|end| !is_name_byte(text[*end])).unwrap_or(text.len());
                let word = &text[at..end];
                if words == 0 {
                    first = first_word(text, word, end, &mut found);
                } else {
                    later_word(text, word, end, first, words, &mut found);
                }
                words += 1;
                at = end;
            }
            _ if is_name_byte(byte) => at = (at..text.len()).find(|at| !is_name_byte(text[*at])).unwrap_or(text.len()),
            _ => at += 1,
        }
        if found.outlive() {
            return found;
        }
    }
    found
}

/// What a statement begins with, as far as later words depend on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Create,
    Declare,
    Explain,
    Other,
}

fn is(word: &[u8], keyword: &[u8]) -> bool {
    word.eq_ignore_ascii_case(keyword)
}

fn next_word(text: &[u8], at: usize) -> &[u8] {
    let start = skip_space(text, at);
    let end = (start..text.len()).find(|end| !is_name_byte(text[*end])).unwrap_or(text.len());
    &text[start..end]
}

fn first_word(text: &[u8], word: &[u8], end: usize, found: &mut Traces) -> First {
    match word[0] | 0x20 {
        b's' if is(word, b"set") => {
            let next = next_word(text, end);
            if is(next, b"local") {
                *found |= Traces::LOCAL;
            } else if !is(next, b"transaction") && !is(next, b"constraints") {
                *found |= Traces::SESSION;
            }
        }
        b'r' if is(word, b"reset") => *found |= Traces::SESSION,
        b'd' if is(word, b"declare") => return First::Declare,
        b'e' if is(word, b"explain") => return First::Explain,
        b'd' if is(word, b"discard") || is(word, b"deallocate") || is(word, b"do") => *found |= Traces::SESSION,
        b'l' if is(word, b"listen") || is(word, b"load") => *found |= Traces::SESSION,
        b'u' if is(word, b"unlisten") => *found |= Traces::SESSION,
        b'p' if is(word, b"prepare") && !is(next_word(text, end), b"transaction") => *found |= Traces::SESSION,
        b'c' if is(word, b"call") => *found |= Traces::SESSION,
        b'c' if is(word, b"create") => return First::Create,
        _ => {}
    }
    First::Other
}

fn later_word(text: &[u8], word: &[u8], end: usize, first: First, words: usize, found: &mut Traces) {
    match word[0] | 0x20 {
        b's' if is(word, b"set_config") => *found |= set_config(text, end),
        b'p' if word.len() > 12 && is(&word[..12], b"pg_advisory_") && !starts(&word[12..], b"xact") => {
            *found |= Traces::SESSION;
        }
        b'p' if starts(word, b"pg_try_advisory_lock") => *found |= Traces::SESSION,
        // CREATE TABLE pg_temp.x; SET LOCAL search_path = pg_temp, and an ordinary CREATE TABLE behind it.
        b'p' if starts(word, b"pg_temp") => *found |= Traces::SESSION,
        // CREATE [OR REPLACE] [LOCAL] TEMP …
        b't' if first == First::Create && words <= 4 && (is(word, b"temp") || is(word, b"temporary")) => {
            *found |= Traces::SESSION;
        }
        // SELECT … INTO [LOCAL] TEMP t
        b'i' if is(word, b"into") => {
            let next = next_word(text, end);
            if is(next, b"temp") || is(next, b"temporary") || is(next, b"local") || starts(next, b"pg_temp") {
                *found |= Traces::SESSION;
            }
        }
        b'h' if first == First::Declare && is(word, b"hold") => *found |= Traces::SESSION,
        // Its UPDATE is a SET. Who only reads it is asked once too often.
        b'p' if is(word, b"pg_settings") => *found |= Traces::SESSION,
        // EXPLAIN ANALYZE CREATE TEMP TABLE … AS
        b'c' if first == First::Explain && is(word, b"create") => *found |= Traces::SESSION,
        _ => {}
    }
}

fn starts(word: &[u8], prefix: &[u8]) -> bool {
    word.len() >= prefix.len() && is(&word[..prefix.len()], prefix)
}

/// `set_config(name, value, true)` ends with the transaction; `$3` or an expression may be anything.
fn set_config(text: &[u8], end: usize) -> Traces {
    let mut at = skip_space(text, end);
    // Behind the closing quote of "set_config".
    if text.get(at) == Some(&b'"') {
        at = skip_space(text, at + 1);
    }
    if text.get(at) != Some(&b'(') {
        return Traces::SESSION;
    }
    let (mut depth, mut commas) = (0usize, 0usize);
    while let Some(&byte) = text.get(at) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' if depth <= 1 => return Traces::SESSION,
            b')' | b']' => depth -= 1,
            b'\'' => {
                let escapes = text[at - 1] | 0x20 == b'e';
                let (end, backslash) = end_of_literal(text, at + 1, escapes);
                if backslash && !escapes {
                    return Traces::SESSION;
                }
                at = end;
                continue;
            }
            b'$' => {
                at = end_of_dollars(text, at);
                continue;
            }
            b'"' => {
                at = end_of_name(text, at + 1).unwrap_or(text.len());
                continue;
            }
            b'-' | b'/' => {
                at = skip_space(text, at).max(at + 1);
                continue;
            }
            b',' if depth == 1 => {
                commas += 1;
                if commas == 2 {
                    let start = skip_space(text, at + 1);
                    let end = (start..text.len()).find(|end| matches!(text[*end], b')' | b',')).unwrap_or(text.len());
                    let argument = text[start..end].trim_ascii();
                    let local = [&b"true"[..], b"'true'", b"'t'", b"'on'", b"'1'", b"true::boolean", b"true::bool"];
                    let is_local = local.iter().any(|word| is(argument, word));
                    return if is_local { Traces::LOCAL } else { Traces::SESSION };
                }
            }
            _ => {}
        }
        at += 1;
    }
    Traces::SESSION
}

/// Where the literal whose text begins at `at` ends, and whether there is a backslash in it.
fn end_of_literal(text: &[u8], mut at: usize, escapes: bool) -> (usize, bool) {
    let mut backslash = false;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'\\' => {
                backslash = true;
                at += if escapes { 2 } else { 1 };
            }
            b'\'' if text.get(at + 1) == Some(&b'\'') => at += 2,
            b'\'' => return (at + 1, backslash),
            _ => at += 1,
        }
    }
    (text.len(), backslash)
}

/// Where the quoted name whose text begins at `at` ends, behind its closing quote.
fn end_of_name(text: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += text.get(at..)?.iter().position(|byte| *byte == b'"')? + 1;
        if text.get(at) != Some(&b'"') {
            return Some(at);
        }
        at += 1;
    }
}

/// Whether a quoted name, with its closing quote, holds what would be taken for the beginning of a literal, a comment or
/// a statement, or an escape; or does not end.
fn hides_what_follows(name: &[u8]) -> bool {
    let pair = |pair: &[u8]| matches!(pair, b"--" | b"/*");
    name.last() != Some(&b'"')
        || name.iter().any(|byte| matches!(byte, b'\'' | b'$' | b';' | b'\\'))
        || name.windows(2).any(pair)
}

/// `$tag$ … $tag$` at `at`; a parameter (`$1`) or a stray dollar is one byte.
fn end_of_dollars(text: &[u8], at: usize) -> usize {
    let tag_end = (at + 1..text.len()).find(|end| !(text[*end] != b'$' && is_name_byte(text[*end])));
    let Some(tag_end) = tag_end.filter(|end| text[*end] == b'$') else { return at + 1 };
    if text[at + 1].is_ascii_digit() {
        return at + 1;
    }
    let tag = &text[at..=tag_end];
    let body = &text[tag_end + 1..];
    body.windows(tag.len()).position(|window| window == tag).map_or(text.len(), |found| tag_end + 1 + found + tag.len())
}

/// The server's functions for large objects, which is what FunctionCall is used for (`pg_proc.dat`): they change rows
/// alone.
const OF_LARGE_OBJECTS: [u32; 20] =
    [715, 764, 765, 767, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172, 3457, 3458, 3459, 3460];

/// What the FunctionCall with this body, which is as much of it as is at hand, may leave behind.
pub fn call_traces(body: &[u8]) -> Traces {
    let function = body.first_chunk().map(|oid| u32::from_be_bytes(*oid));
    let is_known = function.is_some_and(|function| OF_LARGE_OBJECTS.contains(&function));
    if is_known { Traces::NONE } else { Traces::SESSION }
}

/// What a DEALLOCATE takes away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deallocated {
    /// Every statement.
    All,
    /// The one of this name.
    Name(Vec<u8>),
}

/// The target of `text`, if it is one DEALLOCATE and nothing else.
pub fn deallocated(text: &[u8]) -> Option<Deallocated> {
    let start = skip_space(text, 0);
    if text.get(start).is_none_or(|byte| byte | 0x20 != b'd') {
        return None;
    }
    let word = next_word(text, start);
    if !is(word, b"deallocate") {
        return None;
    }
    let mut at = skip_space(text, start + word.len());
    let next = next_word(text, at);
    if is(next, b"prepare") {
        at = skip_space(text, at + next.len());
    }
    let (target, end) = if text.get(at) == Some(&b'"') {
        let mut name = Vec::new();
        at += 1;
        loop {
            match text.get(at)? {
                b'"' if text.get(at + 1) == Some(&b'"') => at += 1,
                b'"' => break,
                _ => {}
            }
            name.push(text[at]);
            at += 1;
        }
        (Deallocated::Name(name), at + 1)
    } else {
        let word = next_word(text, at);
        if word.is_empty() {
            return None;
        }
        let target = if is(word, b"all") { Deallocated::All } else { Deallocated::Name(word.to_ascii_lowercase()) };
        (target, at + word.len())
    };
    let rest = text[end..].iter().all(|byte| is_space(*byte) || matches!(byte, b';' | 0));
    rest.then_some(target)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> Traces {
        traces(text.as_bytes(), text.len())
    }

    #[test]
    fn what_outlives_a_transaction_is_seen() {
        for text in [
            "SET work_mem = '1MB'",
            "set session work_mem to 1",
            "begin; set app.x = 1; commit",
            "/* x */ SET ROLE ann",
            "-- why\nRESET ALL",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SET SESSION AUTHORIZATION x",
            "select set_config('a.b', $1, false)",
            "select set_config($1, $2, $3)",
            "select pg_catalog.\"set_config\"('a', 'b', false)",
            "select set_config('a', f('x, true)'), false)",
            "LISTEN x",
            "UNLISTEN *",
            "UPDATE pg_settings SET setting = '1' WHERE name = 'statement_timeout'",
            "EXPLAIN (ANALYZE) CREATE TEMP TABLE t AS SELECT 1",
            "DISCARD ALL",
            "PREPARE p AS SELECT 1",
            "DEALLOCATE ALL",
            "DO $$ begin end $$",
            "CALL p()",
            "select pg_advisory_lock(1)",
            "select pg_try_advisory_lock_shared(1)",
            "select pg_advisory_unlock_all()",
            "CREATE TEMP TABLE t(a int)",
            "create or replace temporary view v as select 1",
            "CREATE TABLE pg_temp.t(a int)",
            "SET LOCAL search_path = pg_temp, public",
            "select 1 into temp t",
            "declare c cursor with hold for select 1",
            "select 'it\\'s; set x = 1'",
            "select $a$ ; $a$; set x = 1",
            "select 1 as \"it's\"; set work_mem = '77MB'",
            "select 1 as \"who's\", set_config('app.tenant', 'a', false)",
            "select 1 as \"a\"\"it's\", pg_advisory_lock(1)",
            "select 1 as \"--\"; set role ann",
            "select 1 as \"/*\"; set role ann",
            "select 1 as \"$$\"; set role ann",
            "select 1 as \"a\", 'it', \"b\"; set role ann",
            "select U&\"\\0073et_config\"('a', 'b', false)",
            "select 1 as \"a; set role ann",
            "select set_config('app.flag' /* why, */, 'true', false)",
            "select set_config('app.flag' -- why, 'true',\n, 'true', false)",
            "select set_config('app.flag', \"a,true,\", false)",
        ] {
            assert!(of(text).outlive(), "{text}");
        }
        assert!(traces(b"SELECT", 100).outlive(), "the rest was not seen");
    }

    #[test]
    fn what_ends_with_a_transaction_or_says_nothing_is_not() {
        for text in [
            "SET LOCAL app.x = 1",
            "select set_config('a.b', $1, true)",
            "select set_config($1, $2, 'true')",
            "select set_config('a.b', \"t\".\"value\" /* why, */, true) from \"t\"",
        ] {
            assert_eq!(of(text), Traces::LOCAL, "{text}");
        }
        for text in [
            "SELECT 1",
            "UPDATE t SET a = 1",
            "update t set reset = 1; insert into discard values (1)",
            "SET TRANSACTION READ ONLY",
            "set constraints all deferred",
            "PREPARE TRANSACTION 'x'",
            "select 'set x = 1; set y = 2'",
            "select $$; set x = 1$$",
            "select E'a\\'; set x = 1'",
            "select \"set\" from t",
            "select \"a\", 'b; set x = 1', \"c\" from \"d e\".\"f\"\"g\"",
            "select \"a-b\", \"c/d\", \"\" from \"t\" -- it's",
            "select temp from weather",
            "insert into temperature values ($1)",
            "select pg_advisory_xact_lock(1), pg_try_advisory_xact_lock(2)",
            "declare c cursor for select 1",
            "-- set x\nselect 1",
            "/* ; set x = 1 */ select 1",
            "select 1e5, $1, a$b from t",
            "",
            ";;",
        ] {
            assert_eq!(of(text), Traces::NONE, "{text}");
        }
    }

    #[test]
    fn a_call_of_a_large_objects_function_leaves_nothing() {
        // lo_open, set_config, pg_advisory_lock
        for (function, left) in [(952u32, Traces::NONE), (2078, Traces::SESSION), (2880, Traces::SESSION)] {
            assert_eq!(call_traces(&[&function.to_be_bytes()[..], &[0; 6]].concat()), left, "{function}");
        }
        assert_eq!(call_traces(&[0, 0, 3]), Traces::SESSION, "its number was not seen");
    }

    #[test]
    fn deallocate_is_read_as_postgresql_reads_it() {
        let name = |text: &str| Some(Deallocated::Name(text.as_bytes().to_vec()));
        for (text, expected) in [
            ("DEALLOCATE p", name("p")),
            ("deallocate prepare \"_pg3_0\" ;", name("_pg3_0")),
            ("DEALLOCATE \"a\"\"b\"\0", name("a\"b")),
            ("deallocate ALL", Some(Deallocated::All)),
            ("deallocate MiXed", name("mixed")),
            ("deallocate p; select 1", None),
            ("select 1", None),
            ("deallocate", None),
            ("deallocate \"p", None),
        ] {
            assert_eq!(deallocated(text.as_bytes()), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "[sSeEtTdD_. ;\"'/*\\-\\\\$a=config(,)DO]{0,60}") {
            traces(text.as_bytes(), text.len());
            deallocated(text.as_bytes());
        }

        #[test]
        fn never_panics_on_bytes(text in proptest::collection::vec(any::<u8>(), 0..80)) {
            traces(&text, text.len());
            deallocated(&text);
        }
    }
}
