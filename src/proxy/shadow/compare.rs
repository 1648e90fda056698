//! Two answers to the same statement, compared. Pure.
//!
//! Rows are compared as the bytes that were sent. Where the order differs and the rows do not, that is said: a statement
//! without ORDER BY may answer so. Values that name something by a number of one server are not compared.

use crate::proxy::handoff::FIRST_UNSTABLE_OID;
use crate::wire::frame::{self, HEADER_BYTES, backend as tags};

/// DataRow and ParameterDescription, which nobody else looks for.
const DATA_ROW: u8 = b'D';
const PARAMETER_DESCRIPTION: u8 = b't';

/// `oid`, `tid`, `xid`, `cid`, `xid8` and `pg_lsn` with their arrays: numbers of one server in any format.
const OF_ONE_SERVER: [u32; 12] = [26, 27, 28, 29, 5069, 3220, 1028, 1010, 1011, 1012, 271, 3221];

/// `record`, `reg…` and their arrays: in binary they carry OIDs.
const WITH_OIDS: [u32; 24] = [
    2249, 2287, 24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4089, 4096, 4191, 1008, 2207, 2208, 2209, 2210, 2211,
    3735, 3770, 4090, 4097, 4192,
];

/// How two answers compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match {
    /// The same rows in the same order.
    Equal,
    /// The same rows in another order.
    Reordered,
    /// Other rows, or another shape.
    Unequal,
    /// Something in it is not the same on two servers by its nature.
    NotComparable,
}

/// What a server has answered to one statement.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// Type and format of each column; none: it was not described.
    columns: Option<Vec<(u32, u16)>>,
    /// DataRow bodies: where they are in the bytes.
    rows: Vec<std::ops::Range<usize>>,
    bytes: Vec<u8>,
    /// Whether CommandComplete came.
    pub(super) is_complete: bool,
    /// SQLSTATE of an error.
    pub(super) failure: Option<String>,
}

impl Answer {
    /// Reads what a server has sent; none: it is cut, or says something that belongs to no read.
    pub(super) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let mut answer = Self::default();
        let mut at = 0;
        while at < bytes.len() {
            let (header, body) = frame::first(&bytes[at..]).ok()??;
            let start = at + HEADER_BYTES;
            match header.tag {
                DATA_ROW => answer.rows.push(start..start + body.len()),
                tags::ROW_DESCRIPTION => answer.columns = Some(columns(body)?),
                tags::COMMAND_COMPLETE if answer.is_complete => return None,
                tags::COMMAND_COMPLETE => answer.is_complete = true,
                tags::ERROR_RESPONSE => answer.failure = Some(sqlstate(body)),
                tags::PARSE_COMPLETE
                | tags::BIND_COMPLETE
                | PARAMETER_DESCRIPTION
                | tags::NO_DATA
                | tags::READY_FOR_QUERY
                | tags::NOTICE_RESPONSE
                | tags::NOTIFICATION_RESPONSE
                | tags::PARAMETER_STATUS => {}
                _ => return None,
            }
            at = start + body.len();
        }
        answer.bytes = bytes;
        Some(answer)
    }

    fn row(&self, range: &std::ops::Range<usize>) -> &[u8] {
        &self.bytes[range.clone()]
    }

    /// Compares with what the target has answered, which has been described.
    pub(super) fn compare(&self, target: &Self) -> Match {
        let Some(described) = &target.columns else { return Match::NotComparable };
        let is_bound_to_server = |(oid, format): &(u32, u16)| {
            OF_ONE_SERVER.contains(oid) || (*format == 1 && (*oid >= FIRST_UNSTABLE_OID || WITH_OIDS.contains(oid)))
        };
        if described.iter().any(is_bound_to_server) {
            return Match::NotComparable;
        }
        if let Some(columns) = &self.columns {
            // Types of the application's own have other numbers there. The description of a statement knows no format yet and
            // says 0, whatever the rows come in.
            let differ = |(one, other): (&(u32, u16), &(u32, u16))| {
                (one.0 != other.0 && one.0.min(other.0) < FIRST_UNSTABLE_OID) || (one.1 != 0 && one.1 != other.1)
            };
            if columns.len() != described.len() || columns.iter().zip(described).any(differ) {
                return Match::Unequal;
            }
        }
        if self.rows.len() != target.rows.len() {
            return Match::Unequal;
        }
        if self.rows.iter().zip(&target.rows).all(|(one, other)| self.row(one) == target.row(other)) {
            return Match::Equal;
        }
        let mut ours: Vec<&[u8]> = self.rows.iter().map(|range| self.row(range)).collect();
        let mut theirs: Vec<&[u8]> = target.rows.iter().map(|range| target.row(range)).collect();
        ours.sort_unstable();
        theirs.sort_unstable();
        if ours == theirs { Match::Reordered } else { Match::Unequal }
    }
}

/// Type and format of each column of a RowDescription (PostgreSQL documentation, "Message Formats").
fn columns(body: &[u8]) -> Option<Vec<(u32, u16)>> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let name_end = rest.iter().position(|byte| *byte == 0)?;
        // Table, column number; type, its size and modifier; format.
        let (fields, after) = rest.get(name_end + 1..)?.split_first_chunk::<18>()?;
        let oid = u32::from_be_bytes(*fields[6..].first_chunk()?);
        columns.push((oid, u16::from_be_bytes(*fields[16..].first_chunk()?)));
        rest = after;
    }
    Some(columns)
}

/// SQLSTATE of an ErrorResponse; the rest of it may quote values and is dropped here.
fn sqlstate(body: &[u8]) -> String {
    let code = body.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"C"));
    let is_code = |code: &&[u8]| code.len() == 5 && code.iter().all(u8::is_ascii_alphanumeric);
    code.filter(is_code).map_or_else(|| "XX000".to_owned(), |code| String::from_utf8_lossy(code).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn described(oid: u32, format: u16) -> Vec<u8> {
        let mut body = b"\0\x01a\0\0\0\0\0\0\0".to_vec();
        body.extend(oid.to_be_bytes());
        body.extend([0, 4, 0, 0, 0, 0]);
        body.extend(format.to_be_bytes());
        frame(b'T', &body)
    }

    fn answer(columns: &[u8], rows: &[&str]) -> Answer {
        let mut bytes = columns.to_vec();
        for row in rows {
            bytes.extend(frame(b'D', row.as_bytes()));
        }
        bytes.extend(frame(b'C', b"SELECT\0"));
        Answer::parse(bytes).expect("whole")
    }

    #[test]
    fn rows_are_told_apart_from_their_order() {
        let text = described(25, 0);
        let source = answer(&text, &["a", "b", "b"]);
        assert_eq!(source.compare(&answer(&text, &["a", "b", "b"])), Match::Equal);
        assert_eq!(source.compare(&answer(&text, &["b", "a", "b"])), Match::Reordered);
        assert_eq!(source.compare(&answer(&text, &["b", "a", "a"])), Match::Unequal);
        assert_eq!(source.compare(&answer(&text, &["a", "b"])), Match::Unequal);
        assert_eq!(source.compare(&answer(&described(23, 0), &["a", "b", "b"])), Match::Unequal);
        let binary = answer(&described(23, 1), &["a"]);
        assert_eq!(answer(&described(23, 0), &["a"]).compare(&binary), Match::Equal);
        assert_eq!(binary.compare(&answer(&described(23, 0), &["a"])), Match::Unequal);
        assert_eq!(source.compare(&answer(&[], &["a", "b", "b"])), Match::NotComparable, "not described");
        assert_eq!(answer(&[], &["a"]).compare(&answer(&text, &["a"])), Match::Equal, "described before");
    }

    #[test]
    fn what_is_numbered_by_each_server_is_not_compared() {
        for (oid, format, expected) in [
            (26, 0, Match::NotComparable),
            (20_000, 0, Match::Equal),
            (20_000, 1, Match::NotComparable),
            (2249, 1, Match::NotComparable),
            (2205, 0, Match::Equal),
            (23, 1, Match::Equal),
        ] {
            assert_eq!(answer(&[], &["a"]).compare(&answer(&described(oid, format), &["a"])), expected, "{oid}");
        }
        assert_eq!(answer(&described(16_400, 0), &["a"]).compare(&answer(&described(16_500, 0), &["a"])), Match::Equal);
    }

    #[test]
    fn what_is_cut_or_strange_is_no_answer() {
        assert!(Answer::parse(b"D\0\0\0\x09a".to_vec()).is_none());
        assert!(Answer::parse(frame(b'G', b"\0\0\0")).is_none());
        let two = [frame(b'C', b"SELECT 1\0"), frame(b'C', b"SELECT 1\0")].concat();
        assert!(Answer::parse(two).is_none());
        let failed = Answer::parse(frame(b'E', b"SERROR\0C42P01\0Msecret\0\0")).expect("whole");
        assert_eq!(failed.failure.as_deref(), Some("42P01"));
    }
}
