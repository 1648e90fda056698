//! Every message from hand-made bytes, and no input that panics.

use bytes::{BufMut as _, Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::lsn::Lsn;

/// Writes a message the way `proto.c` does.
struct Wire(BytesMut);

impl Wire {
    fn tag(tag: u8) -> Self {
        let mut bytes = BytesMut::new();
        bytes.put_u8(tag);
        Self(bytes)
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.put_u8(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.put_u16(value);
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.put_u32(value);
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.put_u64(value);
        self
    }

    fn text(mut self, value: &str) -> Self {
        self.0.put_slice(value.as_bytes());
        self.0.put_u8(0);
        self
    }

    fn counted(mut self, value: &[u8]) -> Self {
        self.0.put_u32(u32::try_from(value.len()).expect("short"));
        self.0.put_slice(value);
        self
    }

    fn end(self) -> Bytes {
        self.0.freeze()
    }
}

fn text(value: &'static str) -> TupleValue {
    TupleValue::Text(Bytes::from_static(value.as_bytes()))
}

#[test]
fn transaction_frame() {
    let begin = Wire::tag(b'B').u64(0x16B_2D10).u64(800_000_000_000_000).u32(742).end();
    let expected = Begin { final_lsn: Lsn(0x16B_2D10), timestamp: Timestamp(800_000_000_000_000), xid: 742 };
    assert_eq!(decode(&begin, false), Ok(Message::Begin(expected)));

    let commit = Wire::tag(b'C').u8(0).u64(0x16B_2D10).u64(0x16B_2D40).u64(5).end();
    let expected = Commit { commit_lsn: Lsn(0x16B_2D10), end_lsn: Lsn(0x16B_2D40), timestamp: Timestamp(5) };
    assert_eq!(decode(&commit, false), Ok(Message::Commit(expected)));

    let origin = Wire::tag(b'O').u64(9).text("elsewhere").end();
    let expected = Origin { commit_lsn: Lsn(9), name: "elsewhere".to_owned() };
    assert_eq!(decode(&origin, false), Ok(Message::Origin(expected)));
    assert_eq!(Timestamp(0).unix_micros(), 946_684_800_000_000);
}

#[test]
fn relation_and_type() {
    let relation = Wire::tag(b'R').u32(16_385).text("public").text("film").u8(b'd').u16(2);
    let relation = relation.u8(1).text("film_id").u32(23).u32(u32::MAX).u8(0).text("title").u32(1043).u32(259).end();
    let columns = vec![
        Column { key: true, name: "film_id".to_owned(), type_oid: 23, type_modifier: -1 },
        Column { key: false, name: "title".to_owned(), type_oid: 1043, type_modifier: 259 },
    ];
    let expected = Relation {
        xid: None,
        oid: 16_385,
        schema: "public".to_owned(),
        name: "film".to_owned(),
        replica_identity: ReplicaIdentity::Default,
        columns,
    };
    assert_eq!(decode(&relation, false), Ok(Message::Relation(expected)));

    let kind = Wire::tag(b'Y').u32(77).u32(16_400).text("").text("mood").end();
    let expected = TypeName { xid: Some(77), oid: 16_400, schema: "pg_catalog".to_owned(), name: "mood".to_owned() };
    assert_eq!(decode(&kind, true), Ok(Message::Type(expected)));
}

#[test]
fn rows_with_every_kind_of_value() {
    let insert = Wire::tag(b'I').u32(7).u8(b'N').u16(4).u8(b't').counted(b"1").u8(b'n').u8(b'u').u8(b'b');
    let insert = insert.counted(&[0, 255]).end();
    let values = vec![
        text("1"),
        TupleValue::Null,
        TupleValue::UnchangedToast,
        TupleValue::Binary(Bytes::from_static(&[0, 255])),
    ];
    let expected = Insert { xid: None, relation: 7, new: Tuple { values } };
    assert_eq!(decode(&insert, false), Ok(Message::Insert(expected)));
}

#[test]
fn updates_and_deletes_with_each_kind_of_old_tuple() {
    let one = || Tuple { values: vec![text("1")] };
    let two = || Tuple { values: vec![text("2")] };
    let tuple = |wire: Wire, kind: u8, value: &[u8]| wire.u8(kind).u16(1).u8(b't').counted(value);

    let plain = tuple(Wire::tag(b'U').u32(7), b'N', b"2").end();
    let expected = Update { xid: None, relation: 7, old: None, new: two() };
    assert_eq!(decode(&plain, false), Ok(Message::Update(expected)));

    let keyed = tuple(tuple(Wire::tag(b'U').u32(7), b'K', b"1"), b'N', b"2").end();
    let expected = Update { xid: None, relation: 7, old: Some(OldTuple::Key(one())), new: two() };
    assert_eq!(decode(&keyed, false), Ok(Message::Update(expected)));

    let full = tuple(tuple(Wire::tag(b'U').u32(99).u32(7), b'O', b"1"), b'N', b"2").end();
    let expected = Update { xid: Some(99), relation: 7, old: Some(OldTuple::Full(one())), new: two() };
    assert_eq!(decode(&full, true), Ok(Message::Update(expected)));

    let delete = tuple(Wire::tag(b'D').u32(7), b'K', b"1").end();
    let expected = Delete { xid: None, relation: 7, old: OldTuple::Key(one()) };
    assert_eq!(decode(&delete, false), Ok(Message::Delete(expected)));

    let no_new = tuple(Wire::tag(b'U').u32(7), b'K', b"1").end();
    assert!(matches!(decode(&no_new, false), Err(DecodeError::Truncated { message: 'U', .. })));
    let new_in_delete = tuple(Wire::tag(b'D').u32(7), b'N', b"1").end();
    assert!(matches!(decode(&new_in_delete, false), Err(DecodeError::Invalid { message: 'D', .. })));
}

#[test]
fn truncate_and_logical_message() {
    let truncate = Wire::tag(b'T').u32(2).u8(3).u32(7).u32(8).end();
    let expected = Truncate { xid: None, cascade: true, restart_identity: true, relations: vec![7, 8] };
    assert_eq!(decode(&truncate, false), Ok(Message::Truncate(expected)));
    let lying = Wire::tag(b'T').u32(u32::MAX).u8(0).u32(7).end();
    assert!(matches!(decode(&lying, false), Err(DecodeError::Truncated { message: 'T', .. })));

    let logical = Wire::tag(b'M').u8(1).u64(5).text("app").counted(b"x").end();
    let expected = LogicalMessage {
        xid: None,
        transactional: true,
        lsn: Lsn(5),
        prefix: "app".to_owned(),
        content: Bytes::from_static(b"x"),
    };
    assert_eq!(decode(&logical, false), Ok(Message::Logical(expected)));
}

#[test]
fn streamed_transactions() {
    let start = Wire::tag(b'S').u32(742).u8(1).end();
    assert_eq!(decode(&start, false), Ok(Message::StreamStart(StreamStart { xid: 742, first: true })));
    assert_eq!(decode(&Wire::tag(b'E').end(), true), Ok(Message::StreamStop));

    let commit = Wire::tag(b'c').u32(742).u8(0).u64(1).u64(2).u64(3).end();
    let expected = Commit { commit_lsn: Lsn(1), end_lsn: Lsn(2), timestamp: Timestamp(3) };
    assert_eq!(decode(&commit, false), Ok(Message::StreamCommit(StreamCommit { xid: 742, commit: expected })));

    let abort = Wire::tag(b'A').u32(742).u32(743).end();
    let expected = StreamAbort { xid: 742, subtransaction_xid: 743, aborted: None };
    assert_eq!(decode(&abort, false), Ok(Message::StreamAbort(expected.clone())));
    let parallel = Wire::tag(b'A').u32(742).u32(743).u64(4).u64(5).end();
    let expected = StreamAbort { aborted: Some((Lsn(4), Timestamp(5))), ..expected };
    assert_eq!(decode(&parallel, false), Ok(Message::StreamAbort(expected)));
}

#[test]
fn two_phase_commit() {
    let (prepare_lsn, end_lsn, timestamp, gid) = (Lsn(1), Lsn(2), Timestamp(3), "gid".to_owned());
    let begin = Wire::tag(b'b').u64(1).u64(2).u64(3).u32(742).text("gid").end();
    let expected = BeginPrepare { prepare_lsn, end_lsn, timestamp, xid: 742, gid: gid.clone() };
    assert_eq!(decode(&begin, false), Ok(Message::BeginPrepare(expected)));

    let prepare = Prepare { prepare_lsn, end_lsn, timestamp, xid: 742, gid: gid.clone() };
    let wire = |tag| Wire::tag(tag).u8(0).u64(1).u64(2).u64(3).u32(742).text("gid").end();
    assert_eq!(decode(&wire(b'P'), false), Ok(Message::Prepare(prepare.clone())));
    assert_eq!(decode(&wire(b'p'), false), Ok(Message::StreamPrepare(prepare)));
    let expected = CommitPrepared { commit_lsn: Lsn(1), end_lsn, timestamp, xid: 742, gid: gid.clone() };
    assert_eq!(decode(&wire(b'K'), false), Ok(Message::CommitPrepared(expected)));

    let rollback = Wire::tag(b'r').u8(0).u64(1).u64(2).u64(3).u64(4).u32(742).text("gid").end();
    let expected = RollbackPrepared {
        prepare_end_lsn: Lsn(1),
        rollback_end_lsn: Lsn(2),
        prepare_timestamp: Timestamp(3),
        rollback_timestamp: Timestamp(4),
        xid: 742,
        gid,
    };
    assert_eq!(decode(&rollback, false), Ok(Message::RollbackPrepared(expected)));
}

#[test]
fn what_is_no_message_is_an_error() {
    assert_eq!(decode(&Bytes::new(), false), Err(DecodeError::Empty));
    assert_eq!(decode(&Bytes::from_static(b"Z"), false), Err(DecodeError::UnknownMessage(b'Z')));
    let trailing = Wire::tag(b'S').u32(1).u8(1).u8(9).end();
    assert_eq!(decode(&trailing, false), Err(DecodeError::Trailing { message: 'S', bytes: 1 }));
    let negative = Wire::tag(b'I').u32(7).u8(b'N').u16(1).u8(b't').u32(u32::MAX).end();
    assert_eq!(decode(&negative, false), Err(DecodeError::Invalid { message: 'I', field: "value" }));
    let not_utf8 = Bytes::from_static(b"O\0\0\0\0\0\0\0\0\xff\0");
    assert_eq!(decode(&not_utf8, false), Err(DecodeError::Invalid { message: 'O', field: "origin name" }));
    let flags = Wire::tag(b'C').u8(1).u64(1).u64(2).u64(3).end();
    assert_eq!(decode(&flags, false), Err(DecodeError::Invalid { message: 'C', field: "flags" }));
}

/// Every tag that [`decode`] knows.
const TAGS: &[u8] = b"BCORYIUDTMSEcAbPKrp";

proptest! {
    #[test]
    fn no_bytes_panic(data in proptest::collection::vec(any::<u8>(), 0..256), streaming: bool) {
        let _outcome = decode(&Bytes::from(data), streaming);
    }

    /// Random bytes behind a tag that exists reach deeper than wholly random ones.
    #[test]
    fn no_bytes_behind_a_known_tag_panic(
        tag in proptest::sample::select(TAGS),
        data in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(b'N'), Just(b'K'), Just(b't'), any::<u8>()], 0..128),
        streaming: bool,
    ) {
        let mut message = vec![tag];
        message.extend(data);
        let _outcome = decode(&Bytes::from(message), streaming);
    }

    /// A valid insert decodes to what was written; cut anywhere, it is an error.
    #[test]
    fn inserts_round_trip_and_cuts_are_noticed(
        values in proptest::collection::vec(proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20)), 0..8),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut wire = Wire::tag(b'I').u32(7).u8(b'N').u16(u16::try_from(values.len()).expect("short"));
        for value in &values {
            wire = match value {
                Some(bytes) => wire.u8(b't').counted(bytes),
                None => wire.u8(b'n'),
            };
        }
        let data = wire.end();
        let expected = values.into_iter()
            .map(|value| value.map_or(TupleValue::Null, |bytes| TupleValue::Text(Bytes::from(bytes))))
            .collect();
        let expected = Insert { xid: None, relation: 7, new: Tuple { values: expected } };
        prop_assert_eq!(decode(&data, false), Ok(Message::Insert(expected)));
        let short = data.slice(..cut.index(data.len()));
        prop_assert!(decode(&short, false).is_err());
    }
}
