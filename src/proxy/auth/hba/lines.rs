//! Lines, fields and tokens of PostgreSQL's authentication files, as `hba.c` cuts them.
//!
//! Fields are separated by blanks, the items of a field by commas; `#` begins a comment. A double quote begins and ends
//! text in which none of these counts; two of them inside are one. A backslash at the end of a line joins it to the
//! next.

/// An item of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::proxy) struct Token {
    pub(in crate::proxy) text: String,
    /// Begins with a quote: it is a name, even if it is spelt like a keyword.
    pub(in crate::proxy) quoted: bool,
}

impl Token {
    /// Whether it is this word and not a name.
    pub(in crate::proxy) fn is_keyword(&self, word: &str) -> bool {
        !self.quoted && self.text == word
    }

    /// What follows `mark` in a token that is not quoted.
    pub(in crate::proxy) fn after(&self, mark: char) -> Option<&str> {
        if self.quoted { None } else { self.text.strip_prefix(mark) }
    }
}

/// A line that says something.
#[derive(Debug)]
pub(in crate::proxy) struct Line {
    /// Counted from 1; the first one where several were joined.
    pub(in crate::proxy) number: usize,
    /// Each has at least one token; or what is wrong with the line.
    pub(in crate::proxy) fields: Result<Vec<Vec<Token>>, String>,
}

/// Cuts a file. Empty lines and comments are left out.
pub(in crate::proxy) fn read_lines(text: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut physical = text.lines().enumerate();
    while let Some((index, first)) = physical.next() {
        let mut whole = first.trim_end_matches('\r').to_owned();
        while whole.ends_with('\\') {
            whole.pop();
            let Some((_, next)) = physical.next() else { break };
            whole.push_str(next.trim_end_matches('\r'));
        }
        let fields = fields(&whole);
        if fields.as_ref().map_or(true, |fields| !fields.is_empty()) {
            lines.push(Line { number: index + 1, fields });
        }
    }
    lines
}

fn fields(line: &str) -> Result<Vec<Vec<Token>>, String> {
    let mut rest = line;
    let mut fields = Vec::new();
    loop {
        let mut field = Vec::new();
        loop {
            let (token, goes_on) = next_token(&mut rest)?;
            field.extend(token);
            if !goes_on {
                break;
            }
        }
        if field.is_empty() {
            return Ok(fields);
        }
        fields.push(field);
    }
}

/// The next token, if there is one, and whether a comma behind it says that its field goes on.
fn next_token(rest: &mut &str) -> Result<(Option<Token>, bool), String> {
    *rest = rest.trim_start_matches([' ', '\t', ',']);
    let quoted = rest.starts_with('"');
    let (mut text, mut inside, mut anything) = (String::new(), false, false);
    let mut characters = rest.char_indices().peekable();
    let mut goes_on = false;
    let mut end = rest.len();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' if inside && characters.peek().is_some_and(|(_, next)| *next == '"') => {
                characters.next();
                text.push('"');
            }
            '"' => {
                inside = !inside;
                anything = true;
            }
            '#' if !inside => {
                // The comment is everything that follows.
                *rest = "";
                return Ok((token(text, quoted, anything), false));
            }
            ' ' | '\t' | ',' if !inside => {
                goes_on = character == ',';
                end = at + 1;
                break;
            }
            _ => {
                anything = true;
                text.push(character);
            }
        }
    }
    if inside {
        return Err("unterminated quoted string".to_owned());
    }
    *rest = &rest[end..];
    Ok((token(text, quoted, anything), goes_on))
}

fn token(text: String, quoted: bool, anything: bool) -> Option<Token> {
    anything.then_some(Token { text, quoted })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fields by `|`, tokens by `,`, quoted ones in brackets.
    fn shown(text: &str) -> Vec<String> {
        let show = |token: &Token| if token.quoted { format!("[{}]", token.text) } else { token.text.clone() };
        let lines = read_lines(text).into_iter();
        lines
            .map(|line| {
                let fields = line.fields.expect("valid").into_iter();
                let fields = fields.map(|field| field.iter().map(show).collect::<Vec<_>>().join(","));
                format!("{}: {}", line.number, fields.collect::<Vec<_>>().join("|"))
            })
            .collect()
    }

    #[test]
    fn lines_are_cut_as_postgresql_cuts_them() {
        assert_eq!(shown("a b\tc # d\n\n  # only a comment\ne"), ["1: a|b|c", "4: e"]);
        assert_eq!(shown("a,b, c d"), ["1: a,b,c|d"]);
        assert_eq!(shown("a ,b"), ["1: a|b"]);
        assert_eq!(shown("\"a b\" \"c\"\"d\" \"#\" x\"y z\""), ["1: [a b]|[c\"d]|[#]|xy z"]);
        assert_eq!(shown("\"\" a"), ["1: []|a"]);
        assert_eq!(shown("a \\\n  b\nc"), ["1: a|b", "3: c"]);
        assert_eq!(shown("a#b\r\n"), ["1: a"]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "[a\"#, \\\\\\n\\tß]{0,40}") {
            let _ = read_lines(&text);
        }
    }
}
