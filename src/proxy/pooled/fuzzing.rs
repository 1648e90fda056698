//! What must hold for any order of messages on a shared connection. Built for tests and fuzzing only.

use std::sync::Arc;

use super::expected::{Expected, Meaning, Sent};
use super::login::settings_of;
use crate::proxy::handoff::Traces;
use crate::proxy::pool::Statement;
use crate::wire::frame::backend;

/// Messages of a client and of ours, and answers in any order: each is counted once, and a name stands for what was
/// sent under it.
pub fn expected(data: &[u8]) {
    const ANSWERS: &[u8] = b"123nTCIsGEZDtNSA";
    let mut expected = Expected::default();
    for byte in data {
        let choice = byte >> 1;
        if byte & 1 == 0 {
            expected.push(sent(choice));
        } else {
            match expected.answered(ANSWERS[usize::from(choice) % ANSWERS.len()]) {
                Meaning::Named { name, statement, .. } | Meaning::Overwritten { name, statement, .. } => {
                    assert_eq!(name[0], statement.tail[0], "its own statement")
                }
                Meaning::Closed(name) => assert_eq!(name.len(), 1),
                Meaning::Failed => drop(expected.skipped()),
                Meaning::Plain | Meaning::Ours => {}
            }
        }
        assert!(expected.is_consistent());
        for name in [b"a", b"b"] {
            if let Some(Some(statement)) = expected.pending(name) {
                assert_eq!(&*statement.tail, name);
            }
        }
    }
    let _ready = expected.answered(backend::READY_FOR_QUERY);
    expected.clear();
    assert!(expected.is_empty() && expected.is_consistent() && !expected.is_confused());
}

fn sent(choice: u8) -> Sent {
    let name: Box<[u8]> = if choice & 1 == 0 { b"a" } else { b"b" }.as_slice().into();
    let (name_of_ours, traces) = (b"ours"[..].into(), Traces::NONE);
    let statement =
        Arc::new(Statement { id: 1, name: name_of_ours, tail: name.clone(), traces, meaning: None, takes: None });
    match choice >> 1 & 15 {
        0 => Sent::Parse { name, statement, known: false },
        1 => Sent::Parse { name, statement, known: true },
        2 => Sent::Taken { name, taken: 1, statement },
        3 => Sent::ParseUnnamed,
        4 => Sent::Added(statement),
        5 => Sent::AddedUnnamed,
        6 => Sent::Evicted(statement),
        7 => Sent::ClosedUnnamed,
        8 => Sent::Close(name),
        9 => Sent::CloseOther,
        10 => Sent::Bind,
        11 => Sent::Describe,
        12 if choice & 32 == 0 => Sent::Deallocate { name, instead: statement },
        12 => Sent::Execute,
        13 => Sent::Query,
        14 => Sent::Call,
        _ => Sent::Sync,
    }
}

/// The `options` of a startup packet: what is understood is the same when it is written down again.
pub fn startup_options(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let read = |text: &str| settings_of(&[("options".to_owned(), text.to_owned())]);
    let Ok(settings) = read(text) else { return };
    let mut written = String::new();
    for (name, value) in &settings {
        written.push_str(" -c ");
        for character in name.chars().chain(['=']).chain(value.chars()) {
            if character == '\\' || character.is_ascii_whitespace() {
                written.push('\\');
            }
            written.push(character);
        }
    }
    assert_eq!(read(&written).ok(), Some(settings));
}
