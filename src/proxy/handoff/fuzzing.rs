//! What must hold for any statement that a client sends and any answer that a server gives to a handoff. Built for
//! tests and fuzzing only.

use bytes::BytesMut;
use tokio::runtime::Runtime;

use super::exchange::Pipeline;
use super::prepare::prepare_command;
use super::scan::{Finding, bound_values, custom_setting_name, settings_set, settings_used};
use super::state::Backslashes;
use super::tracked::{Tracked, UNNAMED_LIMIT_BYTES, UnnamedStatement};
use super::{Deallocated, SessionState, capture, delta};
use crate::postgres::fuzzing::scripted;

/// SQL text of a client: every name that is found can be one, and the look at functions finds no less.
pub fn sql_scan(data: &[u8]) {
    let mut names = Vec::new();
    settings_set(data, |finding| {
        if let Finding::Name(name) = finding {
            assert!(name.contains('.') && name.len() <= data.len());
            names.push(name.into_owned());
        }
    });
    if let Ok(text) = std::str::from_utf8(data) {
        let mut used = Vec::new();
        settings_used(text, |name| used.push(name.to_owned()));
        assert!(names.iter().all(|name| used.contains(name)));
    }
    if let Some(name) = custom_setting_name(data) {
        assert!(name.as_bytes() == data && name.contains('.') && !name.contains([' ', '\'', '"', ';', '\0']));
    }
}

/// What a text may leave behind: whoever sees only its beginning must assume the worst, and what takes a statement
/// away leaves something.
pub fn traces(data: &[u8]) {
    let whole = super::traces(data, data.len());
    assert!(super::traces(data, data.len() + 1).outlive());
    if let Some(taken) = super::deallocated(data) {
        assert!(whole.outlive(), "{taken:?}");
        if let Deallocated::Name(name) = taken {
            assert!(name.len() <= data.len());
        }
    }
    let followed = [data, b"\n; SET x = 1"].concat();
    let found = super::traces(&followed, followed.len());
    assert!(found.outlive() || is_open(data), "a statement behind it is seen");
}

/// Whether something in `text` may go on behind it: a literal, a quoted name, a comment.
fn is_open(text: &[u8]) -> bool {
    text.iter().any(|byte| matches!(byte, b'\'' | b'$')) || text.windows(2).any(|pair| pair == b"/*")
}

/// The body of a Bind, cut short or not: values are pieces of it, in order.
pub fn bind(data: &[u8]) {
    let mut values: Vec<Vec<u8>> = Vec::new();
    let whole = bound_values(data, |value| values.push(value.to_vec()));
    assert!(values.iter().map(|value| value.len() + 4).sum::<usize>() <= data.len());
    let mut again: Vec<Vec<u8>> = Vec::new();
    for end in [data.len() / 2, data.len().saturating_sub(1)] {
        again.clear();
        let _cut = bound_values(&data[..end], |value| again.push(value.to_vec()));
        assert!(values.starts_with(&again), "a prefix tells the same as far as it goes");
    }
    if whole.is_some() {
        assert!(data.iter().filter(|byte| **byte == 0).count() >= 2);
    }
}

/// Frames of a client and answers of a server in any order: what is remembered was sent, and is bounded. Each frame is
/// a tag, a length and so much of the rest.
pub fn tracked(data: &[u8]) {
    let mut tracked = Tracked::new();
    let mut unnamed: Vec<&[u8]> = Vec::new();
    let mut rest = data;
    while let Some((&[tag, length], after)) = rest.split_first_chunk::<2>() {
        let (body, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        match tag {
            b'1' | b'Z' => tracked.on_server_frame(tag),
            b'.' => tracked.at_safe_point(),
            _ => {
                if tag == b'P' && body.first().is_none_or(|byte| *byte == 0) {
                    unnamed.push(body);
                }
                tracked.on_client_frame(tag, body, usize::from(length));
            }
        }
        if let UnnamedStatement::Body(held) = tracked.unnamed() {
            assert!(held.len() <= UNNAMED_LIMIT_BYTES && unnamed.contains(&held));
            assert_eq!(unnamed.last(), Some(&held), "an older statement must not come back");
        }
    }
    let names: Vec<&str> = tracked.names().collect();
    assert!(names.len() <= 256 && names.iter().all(|name| name.len() <= 256 && name.contains('.')));
}

/// The text that `pg_prepared_statements` shows for an SQL PREPARE, behind its name and a zero byte: what is cut out is
/// one command of it, and is found in itself.
pub fn prepare(data: &[u8]) {
    let cut = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (name, text) = (&data[..cut], data.get(cut + 1..).unwrap_or_default());
    for backslashes in [Backslashes::Plain, Backslashes::Escape] {
        let Some(command) = prepare_command(text, name, backslashes) else { continue };
        assert!(text.windows(command.len()).any(|window| window == command));
        assert_eq!(prepare_command(command, name, backslashes), Some(command));
    }
}

/// What a server answers when a session's state is read.
pub fn handoff_answers(runtime: &Runtime, data: &[u8]) {
    let Some((&kind, said)) = data.split_first() else { return };
    runtime.block_on(async {
        let (mut connection, _server) = scripted(said);
        let mut for_client = BytesMut::new();
        if kind % 2 == 0 {
            let mut pipeline = Pipeline::default();
            for _ in 0..kind / 2 % 4 {
                pipeline.run(b"s", b"SELECT $1", &[Some(b"x"), None]);
                pipeline.sync();
            }
            if let Ok(answers) = pipeline.exchange(&mut connection, &mut for_client, "testing").await {
                assert_eq!(answers.len(), usize::from(kind / 2 % 4));
            }
        } else if let Ok(state) = capture(&mut connection, &Tracked::new(), &[], &mut for_client).await {
            assert!(delta(&state, &state).is_empty(), "a state differs from itself in nothing");
            let _from_nothing = delta(&SessionState::default(), &state);
        }
        assert!(for_client.len() <= said.len(), "notifications are passed on, not made");
    });
}
