//! Finds, in SQL text, the names of custom settings that the text sets.
//!
//! PostgreSQL hides custom settings (`app.tenant_id`) from `pg_settings` and `SHOW ALL` unless a loaded module declared
//! them, so a session's own statements are the only place where their names can be seen. The scan is not a parser: it
//! looks for `SET a.b =`, `SET a.b TO` and `set_config('a.b'`, wherever they stand. A name found in a comment, a string
//! or `UPDATE … SET composite.field =` costs nothing but a question to the server, which answers that it knows no such
//! setting; values are always read from the server, never from the text.
//!
//! It runs on every statement of every session: one pass, no allocation unless a quoted name is found. What follows a
//! word is looked at no further than [`REACH_BYTES`], so that no text, however it is made, costs more than its length
//! times that; a name that does not end within (a comment of a thousand bytes before it) is not found.

use std::borrow::Cow;

/// How far behind `SET` or `set_config` a name is looked for, in bytes. Names that are remembered are far shorter.
const REACH_BYTES: usize = 1024;

/// What a text says about custom settings.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding<'a> {
    /// A name with at least one dot.
    Name(Cow<'a, str>),
    /// `set_config` whose first argument is not a literal: the name cannot be seen here.
    Computed,
}

/// Calls `found` for each place where `text` sets a setting that may be a custom one.
pub(super) fn settings_set<'a>(text: &'a [u8], mut found: impl FnMut(Finding<'a>)) {
    let mut at = 0;
    while let Some(start) = next_set(text, at) {
        at = start + 3;
        let near = within_reach(text, at);
        match text.get(at) {
            Some(b'_') => {
                if let Some(rest) = after_word(near, at + 1, b"config")
                    && let Some(argument) = after_byte(near, behind_quote(near, rest), b'(')
                {
                    name_set(near, argument, &mut found);
                }
            }
            Some(byte) if is_space(*byte) || *byte == b'"' || *byte == b'/' => {
                if let Some(name) = assigned_name(near, at) {
                    found(Finding::Name(name));
                }
            }
            _ => {}
        }
    }
}

/// Calls `found` with each literal name that `text` reads by `current_setting` or sets by `set_config` or `SET`: for
/// policies and function bodies.
pub fn settings_used(text: &str, mut found: impl FnMut(&str)) {
    let bytes = text.as_bytes();
    settings_set(bytes, |finding| {
        if let Finding::Name(name) = finding {
            found(&name);
        }
    });
    let mut at = 0;
    while at < bytes.len() {
        if !starts_word(bytes, at) {
            at += 1;
            continue;
        }
        let near = within_reach(bytes, at);
        if let Some(rest) = after_word(near, at, b"current_setting")
            && let Some(argument) = after_byte(near, behind_quote(near, rest), b'(')
            && let Some((name, _)) = literal(near, argument)
            && name.contains('.')
        {
            found(&name);
        }
        at += 1;
    }
}

/// Calls `found` with each parameter value in the body of a Bind message, as far as it is at hand.
pub(super) fn bound_values(body: &[u8], mut found: impl FnMut(&[u8])) -> Option<()> {
    fn count(body: &mut &[u8]) -> Option<usize> {
        let (count, rest) = body.split_first_chunk::<2>()?;
        *body = rest;
        Some(usize::from(u16::from_be_bytes(*count)))
    }
    let mut rest = body;
    // Portal and statement.
    for _ in 0..2 {
        let end = rest.iter().position(|byte| *byte == 0)?;
        rest = &rest[end + 1..];
    }
    let formats = count(&mut rest)?;
    rest = rest.get(2 * formats..)?;
    for _ in 0..count(&mut rest)? {
        let (length, after) = rest.split_first_chunk::<4>()?;
        rest = after;
        // -1 is NULL.
        if let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) {
            let (value, after) = rest.split_at_checked(length)?;
            found(value);
            rest = after;
        }
    }
    Some(())
}

/// `value` as the name of a custom setting, if it can be one: identifiers joined by dots.
pub(super) fn custom_setting_name(value: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(value).ok()?;
    let is_start = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80;
    let is_part = |part: &str| part.bytes().next().is_some_and(is_start) && part.bytes().all(is_name_byte);
    (name.contains('.') && name.split('.').all(is_part)).then_some(name)
}

/// `text` up to [`REACH_BYTES`] behind `at`.
fn within_reach(text: &[u8], at: usize) -> &[u8] {
    &text[..text.len().min(at + REACH_BYTES)]
}

/// Position of the next `set`, in any case, that starts a word.
fn next_set(text: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    while at + 3 <= text.len() {
        if text[at] | 0x20 == b's'
            && text[at + 1] | 0x20 == b'e'
            && text[at + 2] | 0x20 == b't'
            && starts_word(text, at)
        {
            return Some(at);
        }
        at += 1;
    }
    None
}

pub(super) fn starts_word(text: &[u8], at: usize) -> bool {
    at == 0 || !is_name_byte(text[at - 1])
}

/// `[SESSION|LOCAL] name (=|TO)`, where the name has a dot.
fn assigned_name(text: &[u8], at: usize) -> Option<Cow<'_, str>> {
    let mut at = skip_space(text, at);
    for word in [&b"session"[..], b"local"] {
        if let Some(rest) = after_word(text, at, word)
            && text.get(rest).is_some_and(|byte| is_space(*byte))
        {
            at = skip_space(text, rest);
        }
    }
    let (name, rest) = dotted_name(text, at)?;
    let rest = skip_space(text, rest);
    let assigns = text.get(rest) == Some(&b'=')
        || after_word(text, rest, b"to").is_some_and(|end| text.get(end).is_none_or(|byte| !is_name_byte(*byte)));
    (assigns && name.contains('.')).then_some(name)
}

/// Identifiers joined by dots, and where they end.
fn dotted_name(text: &[u8], start: usize) -> Option<(Cow<'_, str>, usize)> {
    let mut joined: Option<String> = None;
    let mut at = start;
    loop {
        let (part, end) = identifier(text, at)?;
        let plain = matches!(part, Cow::Borrowed(_)) && text[at] != b'"';
        match &mut joined {
            Some(name) => name.push_str(&part),
            None if plain => {}
            None => joined = Some(format!("{}{part}", std::str::from_utf8(&text[start..at]).ok()?)),
        }
        at = end;
        let dot = skip_space(text, at);
        if text.get(dot) != Some(&b'.') {
            return match joined {
                Some(name) => Some((Cow::Owned(name), at)),
                None => Some((Cow::Borrowed(std::str::from_utf8(&text[start..at]).ok()?), at)),
            };
        }
        let next = skip_space(text, dot + 1);
        match &mut joined {
            Some(name) => name.push('.'),
            // Spaces round a dot: the name is no longer one slice of the text.
            None if next != at + 1 => joined = Some(format!("{}.", std::str::from_utf8(&text[start..at]).ok()?)),
            None => {}
        }
        at = next;
    }
}

/// One identifier, quoted or not, and where it ends.
pub(super) fn identifier(text: &[u8], at: usize) -> Option<(Cow<'_, str>, usize)> {
    if text.get(at) == Some(&b'"') {
        return quoted(text, at + 1, b'"');
    }
    let end = (at..text.len()).find(|end| !is_name_byte(text[*end])).unwrap_or(text.len());
    if end == at || text[at].is_ascii_digit() {
        return None;
    }
    Some((Cow::Borrowed(std::str::from_utf8(&text[at..end]).ok()?), end))
}

/// The first argument of `set_config`, which begins at `at`.
fn name_set<'a>(text: &'a [u8], at: usize, found: &mut impl FnMut(Finding<'a>)) {
    // `set_config` may be written without any argument inside a comment or a name.
    let Some((name, end)) = literal(text, at) else { return found(Finding::Computed) };
    let mut end = skip_space(text, end);
    if text[end..].starts_with(b"::") {
        let start = skip_space(text, end + 2);
        end = identifier(text, start).map_or(start, |(_, end)| skip_space(text, end));
    }
    if text.get(end) != Some(&b',') || name.contains('\\') {
        // The literal is only a part of the name, or written otherwise than the name is.
        found(Finding::Computed);
    }
    if name.contains('.') {
        found(Finding::Name(name));
    }
}

/// Behind the closing quote of a function's name, where it has one.
fn behind_quote(text: &[u8], at: usize) -> usize {
    at + usize::from(text.get(at) == Some(&b'"'))
}

/// The string literal at `at`, also with an `E` in front, and where it ends. Escapes are not interpreted: names hold none.
fn literal(text: &[u8], at: usize) -> Option<(Cow<'_, str>, usize)> {
    let mut at = skip_space(text, at);
    if text.get(at).is_some_and(|byte| byte | 0x20 == b'e') && text.get(at + 1) == Some(&b'\'') {
        at += 1;
    }
    (text.get(at) == Some(&b'\'')).then(|| quoted(text, at + 1, b'\''))?
}

/// Text up to the closing `quote`, doubled quotes made single, and where it ends.
fn quoted(text: &[u8], start: usize, quote: u8) -> Option<(Cow<'_, str>, usize)> {
    let mut owned: Option<String> = None;
    let mut piece = start;
    let mut at = start;
    loop {
        if *text.get(at)? != quote {
            at += 1;
            continue;
        }
        let part = std::str::from_utf8(&text[piece..at]).ok()?;
        if text.get(at + 1) != Some(&quote) {
            return Some((
                match owned {
                    Some(name) => Cow::Owned(name + part),
                    None => Cow::Borrowed(part),
                },
                at + 1,
            ));
        }
        let name = owned.get_or_insert_default();
        name.push_str(part);
        name.push(quote as char);
        at += 2;
        piece = at;
    }
}

/// Where `word` ends, when it stands at `at` in any case.
pub(super) fn after_word(text: &[u8], at: usize, word: &[u8]) -> Option<usize> {
    let end = at.checked_add(word.len())?;
    text.get(at..end)?.eq_ignore_ascii_case(word).then_some(end)
}

/// The position after `byte`, which may have spaces before it.
fn after_byte(text: &[u8], at: usize, byte: u8) -> Option<usize> {
    let at = skip_space(text, at);
    (text.get(at) == Some(&byte)).then_some(at + 1)
}

/// Skips white space and comments.
pub(in crate::proxy) fn skip_space(text: &[u8], mut at: usize) -> usize {
    loop {
        match text.get(at) {
            Some(byte) if is_space(*byte) => at += 1,
            Some(b'-') if text.get(at + 1) == Some(&b'-') => {
                at = (at..text.len()).find(|end| matches!(text[*end], b'\n' | b'\r')).unwrap_or(text.len());
            }
            Some(b'/') if text.get(at + 1) == Some(&b'*') => {
                at = end_of_comment(text, at);
            }
            _ => return at,
        }
    }
}

/// Where the block comment at `at` ends. They nest (PostgreSQL documentation, "Comments").
pub(super) fn end_of_comment(text: &[u8], mut at: usize) -> usize {
    let mut depth = 0usize;
    while at < text.len() {
        if text[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

pub(super) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

pub(in crate::proxy) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(text: &str) -> Vec<String> {
        let mut names = Vec::new();
        settings_set(text.as_bytes(), |finding| match finding {
            Finding::Name(name) => names.push(name.into_owned()),
            Finding::Computed => names.push("?".to_owned()),
        });
        names
    }

    #[test]
    fn finds_every_way_to_set_a_custom_setting() {
        for (text, expected) in [
            ("SET app.tenant_id = '7'", vec!["app.tenant_id"]),
            ("set session app.x to 1", vec!["app.x"]),
            ("SET LOCAL app.x TO DEFAULT", vec!["app.x"]),
            ("set\n\tapp.x='1'", vec!["app.x"]),
            ("SET \"my app\".\"x\"\"y\" = 1", vec!["my app.x\"y"]),
            ("SET app . x = 1", vec!["app.x"]),
            ("SET app.\"X\" = 1", vec!["app.X"]),
            ("SET/**/app.x=1", vec!["app.x"]),
            ("SET -- why\n app.a.b = 1", vec!["app.a.b"]),
            ("BEGIN; SET app.x = 1; SET app.y = 2", vec!["app.x", "app.y"]),
            ("select set_config('app.tenant', $1, false)", vec!["app.tenant"]),
            ("select pg_catalog.set_config( 'a.b' , 'c', true)", vec!["a.b"]),
            ("select set_config(E'a.b', 'c', true)", vec!["a.b"]),
            ("select set_config($1, $2, false)", vec!["?"]),
            ("select set_config('app.' || $1, $2, false)", vec!["?", "app."]),
            ("select set_config('app'||'.x', $2, false)", vec!["?"]),
            ("select set_config('app'\n'.x', $2, false)", vec!["?"]),
            ("select set_config(E'app\\x2ex', $2, false)", vec!["?"]),
            ("select set_config('a.b'::text, $1, false)", vec!["a.b"]),
            ("select set_config('a.b' /* why */, $1, false)", vec!["a.b"]),
            ("select pg_catalog.\"set_config\"('a.b', $1, false)", vec!["a.b"]),
            ("select \"set_config\" ($1, $2, false)", vec!["?"]),
            ("SET app.größe = 1", vec!["app.größe"]),
        ] {
            assert_eq!(names(text), expected, "{text}");
        }
    }

    #[test]
    fn ordinary_statements_give_nothing() {
        for text in [
            "SET search_path TO app, public",
            "SET SESSION AUTHORIZATION bob",
            "UPDATE t SET a = b.c FROM b",
            "SELECT a.setting FROM t a OFFSET 3",
            "select current_setting('app.x')",
            "SELECT set_config('search_path', 'x', false)",
            "INSERT INTO sets.x VALUES (1)",
            "SET",
            "SET ",
            "SET app.",
            "SET app.x",
            "SET app.x TOP",
            "select reset.x = 1",
            "SET \"app.x",
            "",
        ] {
            assert_eq!(names(text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn finds_what_policies_and_functions_read() {
        let mut names = Vec::new();
        settings_used(
            "(tenant = (current_setting('app.tenant'::text, true))::int) AND current_setting ( 'x' ) = pg_catalog.CURRENT_SETTING('b.c')",
            |name| names.push(name.to_owned()),
        );
        assert_eq!(names, ["app.tenant", "b.c"]);
    }

    #[test]
    fn no_text_makes_the_scan_look_at_everything_for_every_word() {
        for (repeated, found) in [("set/*", 0), ("set_config(/*", 1000), ("set \"a.", 0), ("set_config('a.b ", 1999)] {
            let text = repeated.repeat(1000);
            assert_eq!(names(&text).len(), found, "{repeated}");
        }
        let far = format!("SET {} app.x = 1; SET app.y = 1", "-".repeat(2 * REACH_BYTES) + "\n");
        assert_eq!(names(&far), ["app.y"]);
    }

    proptest! {
        #[test]
        fn never_panics(text in "[sSeEtT_. \"'/*\\-\u{e4}=config(TO$;]{0,60}") {
            settings_set(text.as_bytes(), |_| {});
            settings_used(&text, |_| {});
        }

        #[test]
        fn never_panics_on_bytes(text in proptest::collection::vec(any::<u8>(), 0..80)) {
            settings_set(&text, |_| {});
        }
    }
}
