//! Backend messages as whole frames, and the few fields that control work reads from them. Pure.

use bytes::{Buf as _, Bytes, BytesMut};

/// PostgreSQL never sends a longer message (`PQ_LARGE_MESSAGE_LIMIT`, one gigabyte).
pub(super) const MAX_FRAME_BYTES: usize = 0x4000_0000;

/// Nothing that a server says before it has let us in is nearly so long. Whoever answers there is not yet known to be a
/// PostgreSQL server at all.
pub(super) const LOGIN_FRAME_MAX: usize = 1 << 20;

/// One whole backend message. For control use: the relay forwards pieces and never holds a whole one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Message type (PostgreSQL documentation, "Message Formats").
    pub tag: u8,
    /// What follows the length.
    pub body: Bytes,
}

/// Takes one whole message off the front of `buffer`, or `None` while it is incomplete. A length that lies costs no
/// memory: room is made only for bytes that have come.
pub(super) fn take_frame(buffer: &mut BytesMut, longest: usize) -> Result<Option<Frame>, String> {
    let Some((tag, length)) = buffer.split_first_chunk::<5>().map(|([tag, a, b, c, d], _)| {
        (*tag, usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX))
    }) else {
        return Ok(None);
    };
    if !(4..=longest).contains(&length) {
        return Err(format!("message {:?} of length {length}", char::from(tag)));
    }
    if buffer.len() < length + 1 {
        return Ok(None);
    }
    let mut message = buffer.split_to(length + 1).freeze();
    message.advance(5);
    Ok(Some(Frame { tag, body: message }))
}

/// The row count at the end of a CommandComplete tag (`UPDATE 3`, `INSERT 0 1`, `COPY 7`); `None` where there is none.
pub(super) fn affected_rows(tag: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(tag.strip_suffix(b"\0")?).ok()?;
    text.rsplit_once(' ')?.1.parse().ok()
}

/// The values of a DataRow in text form; `None` where the bytes are not one, or not UTF-8.
pub(super) fn data_row(body: &[u8]) -> Option<Vec<Option<String>>> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut row = Vec::with_capacity(usize::from(u16::from_be_bytes(*count)));
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>()?;
        rest = after;
        row.push(match i32::from_be_bytes(*length) {
            -1 => None,
            length => {
                let (value, after) = rest.split_at_checked(usize::try_from(length).ok()?)?;
                rest = after;
                Some(String::from_utf8(value.to_vec()).ok()?)
            }
        });
    }
    rest.is_empty().then_some(row)
}

/// Name and value of a ParameterStatus.
pub(super) fn parameter_status(body: &[u8]) -> Option<(String, String)> {
    let mut parts = body.split(|byte| *byte == 0);
    let mut text = || parts.next().map(|part| String::from_utf8_lossy(part).into_owned());
    Some((text()?, text()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::postgres::RawError;

    #[test]
    fn frames_are_taken_whole_and_only_whole() {
        let mut buffer = BytesMut::from(&b"Z\0\0\0\x05ID\0\0\0"[..]);
        assert_eq!(
            take_frame(&mut buffer, MAX_FRAME_BYTES),
            Ok(Some(Frame { tag: b'Z', body: Bytes::from_static(b"I") }))
        );
        assert_eq!(take_frame(&mut buffer, MAX_FRAME_BYTES), Ok(None));
        buffer.extend_from_slice(b"\x03");
        assert!(take_frame(&mut buffer, MAX_FRAME_BYTES).is_err(), "a length counts itself");
        assert!(
            take_frame(&mut BytesMut::from(&b"D\x7f\xff\xff\xff"[..]), MAX_FRAME_BYTES).is_err(),
            "longer than any message"
        );
    }

    #[test]
    fn row_counts_of_every_kind_of_tag() {
        for (tag, rows) in [("UPDATE 3", Some(3)), ("INSERT 0 1", Some(1)), ("COPY 7", Some(7)), ("BEGIN", None)] {
            assert_eq!(affected_rows(format!("{tag}\0").as_bytes()), rows, "{tag}");
        }
        assert_eq!(affected_rows(b"UPDATE 3"), None, "not terminated");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(data in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _frame = take_frame(&mut BytesMut::from(&data[..]), MAX_FRAME_BYTES);
            let _row = data_row(&data);
            let _status = parameter_status(&data);
            let _rows = affected_rows(&data);
            let _error = RawError::from_error_response(&data);
        }

        #[test]
        fn rows_round_trip(values in proptest::collection::vec(proptest::option::of(".{0,9}"), 0..9)) {
            let mut body = Vec::from(u16::try_from(values.len()).expect("short").to_be_bytes());
            for value in &values {
                match value {
                    Some(text) => {
                        body.extend(i32::try_from(text.len()).expect("short").to_be_bytes());
                        body.extend(text.as_bytes());
                    }
                    None => body.extend((-1i32).to_be_bytes()),
                }
            }
            prop_assert_eq!(data_row(&body), Some(values));
        }
    }
}
