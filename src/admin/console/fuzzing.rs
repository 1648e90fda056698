//! What must hold for any text that is sent to the console. Built for tests and fuzzing only.

use super::parse;

/// A simple query: cut into statements without losing a character of them, each understood or refused.
pub fn console(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut from = 0;
    for statement in parse::split(text) {
        let at = text[from..].find(statement).expect("a piece of the text, in its order");
        assert!(!statement.trim().is_empty());
        from += at + statement.len();
        if let Err(error) = parse::parse(statement) {
            assert!(!error.to_string().is_empty());
        }
    }
    assert!(text[from..].chars().all(|c| c == ';' || c.is_whitespace()));
}
