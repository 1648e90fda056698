//! Cuts one PREPARE out of the text that it was sent in.
//!
//! For a statement made by SQL-level PREPARE the server keeps the whole text of the message, which may hold more: in
//! `PREPARE a AS …; INSERT …` running it all again would execute the INSERT twice. The cut is therefore made only where
//! it is certain, and what is cut out is sent by the extended protocol, which refuses more than one command.

use super::scan::{after_word, end_of_comment, identifier, is_name_byte, skip_space, starts_word};
use super::state::Backslashes;

/// The one command in `text` that prepares a statement called `name`; `None` when there is none, or more than one.
pub(super) fn prepare_command<'a>(text: &'a [u8], name: &[u8], backslashes: Backslashes) -> Option<&'a [u8]> {
    let mut found = None;
    let mut start = 0;
    while start < text.len() {
        let end = end_of_command(text, start, backslashes);
        let command = &text[start..end];
        if prepares(command, name) {
            if found.is_some() {
                return None;
            }
            found = Some(command);
        }
        start = end + 1;
    }
    found
}

/// Whether `command` is `PREPARE name [(…)] AS …`.
fn prepares(command: &[u8], name: &[u8]) -> bool {
    let at = skip_space(command, 0);
    let Some(after) = after_word(command, at, b"prepare") else { return false };
    if command.get(after).is_none_or(|byte| is_name_byte(*byte)) {
        return false;
    }
    let at = skip_space(command, after);
    let Some((written, end)) = identifier(command, at) else { return false };
    let meant = if command[at] == b'"' { written.into_owned() } else { written.to_ascii_lowercase() };
    if !is_truncated_to(meant.as_bytes(), name) {
        return false;
    }
    let rest = skip_space(command, end);
    command.get(rest) == Some(&b'(')
        || after_word(command, rest, b"as").is_some_and(|end| command.get(end).is_none_or(|byte| !is_name_byte(*byte)))
}

/// Names longer than 63 bytes are cut by the server at a character's start.
fn is_truncated_to(written: &[u8], name: &[u8]) -> bool {
    written == name || (written.len() > 63 && name.len() >= 60 && written.starts_with(name))
}

/// Position of the semicolon that ends the command at `start`, or the end of the text.
fn end_of_command(text: &[u8], start: usize, backslashes: Backslashes) -> usize {
    let mut at = start;
    let mut depth = 0usize;
    while at < text.len() {
        match text[at] {
            b';' if depth == 0 => return at,
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'\'' => {
                let marked = at > start && text[at - 1] | 0x20 == b'e' && starts_word(text, at - 1);
                at = end_of_quoted(text, at, marked || backslashes == Backslashes::Escape);
                continue;
            }
            b'"' => {
                at = end_of_quoted(text, at, false);
                continue;
            }
            b'-' if text.get(at + 1) == Some(&b'-') => {
                at = (at..text.len()).find(|end| text[*end] == b'\n').unwrap_or(text.len());
                continue;
            }
            b'/' if text.get(at + 1) == Some(&b'*') => {
                at = end_of_comment(text, at);
                continue;
            }
            b'$' if starts_word(text, at) => {
                if let Some(end) = end_of_dollar_quoted(text, at) {
                    at = end;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// Where a quoted token that opens at `at` ends. A doubled quote reads as two tokens side by side, which comes to the
/// same end.
fn end_of_quoted(text: &[u8], at: usize, escapes: bool) -> usize {
    let quote = text[at];
    let mut at = at + 1;
    while at < text.len() {
        match text[at] {
            b'\\' if escapes => at += 1,
            byte if byte == quote && text.get(at + 1) == Some(&quote) => at += 1,
            byte if byte == quote => return at + 1,
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// Where `$tag$ … $tag$` ends; `None` when this dollar opens no string.
fn end_of_dollar_quoted(text: &[u8], at: usize) -> Option<usize> {
    let tag_end = (at + 1..text.len()).find(|end| text[*end] == b'$' || !is_name_byte(text[*end]))?;
    if text[tag_end] != b'$' || text[at + 1].is_ascii_digit() {
        return None;
    }
    let tag = &text[at..=tag_end];
    let body = tag_end + 1;
    let close = text[body..].windows(tag.len()).position(|window| window == tag);
    Some(close.map_or(text.len(), |close| body + close + tag.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut<'a>(text: &'a str, name: &str) -> Option<&'a str> {
        prepare_command(text.as_bytes(), name.as_bytes(), Backslashes::Plain)
            .map(|command| std::str::from_utf8(command).expect("cut at ASCII").trim())
    }

    #[test]
    fn only_the_one_command_is_cut_out() {
        for (text, name, expected) in [
            ("PREPARE a AS SELECT 1", "a", Some("PREPARE a AS SELECT 1")),
            ("PREPARE a AS SELECT 1; INSERT INTO t VALUES (1)", "a", Some("PREPARE a AS SELECT 1")),
            ("INSERT INTO t VALUES (';'); prepare A (int) as select $1;", "a", Some("prepare A (int) as select $1")),
            ("PREPARE \"A;\" AS SELECT 1; x", "A;", Some("PREPARE \"A;\" AS SELECT 1")),
            ("PREPARE a AS SELECT $$;$$, $x$;$$;$x$; x", "a", Some("PREPARE a AS SELECT $$;$$, $x$;$$;$x$")),
            ("PREPARE a AS SELECT E'\\';', 'a'';'; x", "a", Some("PREPARE a AS SELECT E'\\';', 'a'';'")),
            ("PREPARE a AS SELECT '\\'; x", "a", Some("PREPARE a AS SELECT '\\'")),
            (
                "/* ; /* ; */ ; */ PREPARE /* x */ a -- ;\n AS SELECT 1",
                "a",
                Some("/* ; /* ; */ ; */ PREPARE /* x */ a -- ;\n AS SELECT 1"),
            ),
            ("PREPARE a AS SELECT 1; DEALLOCATE a; PREPARE a AS SELECT 2", "a", None),
            ("PREPARE b AS SELECT 1", "a", None),
            ("PREPARE TRANSACTION 'x'", "transaction", None),
            ("SELECT 'PREPARE a AS SELECT 1'", "a", None),
            ("PREPARED a AS SELECT 1", "a", None),
            ("", "a", None),
        ] {
            assert_eq!(cut(text, name), expected, "{text}");
        }
    }

    #[test]
    fn escapes_in_plain_literals_count_where_the_session_says_so() {
        let text = b"PREPARE a AS SELECT '\\';'; INSERT";
        assert_eq!(prepare_command(text, b"a", Backslashes::Escape), Some(&b"PREPARE a AS SELECT '\\';'"[..]));
    }

    #[test]
    fn long_names_are_met_as_the_server_cut_them() {
        let long = "n".repeat(70);
        assert!(cut(&format!("PREPARE {long} AS SELECT 1"), &long[..63]).is_some());
        assert!(cut(&format!("PREPARE {long} AS SELECT 1"), &long[..40]).is_none());
    }

    proptest! {
        #[test]
        fn never_panics_and_never_gives_two_commands(text in "(PREPARE a AS |[a;'\"$\\\\ex/*\\-\n ()]{0,9}){0,8}") {
            for backslashes in [Backslashes::Plain, Backslashes::Escape] {
                if let Some(command) = prepare_command(text.as_bytes(), b"a", backslashes) {
                    prop_assert_eq!(end_of_command(command, 0, backslashes), command.len());
                }
            }
        }
    }
}
