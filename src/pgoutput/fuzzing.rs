//! What must hold for any bytes that reach the decoder. Built for tests and fuzzing only.

use bytes::{BufMut as _, Bytes};

use super::{Column, Commit, Message, OldTuple, Relation, ReplicaIdentity, Timestamp, Tuple, TupleValue, decode};
use crate::lsn::Lsn;

/// One message, inside and outside of a streamed block: what is understood is written back byte by byte, so nothing
/// was guessed, skipped or made up.
pub fn pgoutput(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    for streaming in [false, true] {
        let Ok(message) = decode(&bytes, streaming) else { continue };
        let mut written = Vec::with_capacity(data.len());
        encode(&message, &mut written);
        // pg_catalog may be sent by its name or as nothing.
        let full = b"pg_catalog\0";
        let same = written == data
            || written
                .windows(full.len())
                .position(|window| window == full)
                .is_some_and(|at| [&written[..at], b"\0", &written[at + full.len()..]].concat() == data);
        assert!(same, "{message:?}");
    }
}

fn cstr(out: &mut Vec<u8>, text: &str) {
    out.put_slice(text.as_bytes());
    out.put_u8(0);
}

fn change(out: &mut Vec<u8>, tag: u8, xid: Option<u32>) {
    out.put_u8(tag);
    if let Some(xid) = xid {
        out.put_u32(xid);
    }
}

fn positions(out: &mut Vec<u8>, first: Lsn, second: Lsn, timestamp: Timestamp) {
    out.put_u64(first.0);
    out.put_u64(second.0);
    out.put_i64(timestamp.0);
}

fn commit(out: &mut Vec<u8>, commit: &Commit) {
    out.put_u8(0);
    positions(out, commit.commit_lsn, commit.end_lsn, commit.timestamp);
}

fn tuple(out: &mut Vec<u8>, kind: u8, tuple: &Tuple) {
    out.put_u8(kind);
    out.put_u16(u16::try_from(tuple.values.len()).expect("read from 16 bits"));
    for value in &tuple.values {
        let (kind, bytes) = match value {
            TupleValue::Null => (b'n', None),
            TupleValue::UnchangedToast => (b'u', None),
            TupleValue::Text(bytes) => (b't', Some(bytes)),
            TupleValue::Binary(bytes) => (b'b', Some(bytes)),
        };
        out.put_u8(kind);
        if let Some(bytes) = bytes {
            out.put_u32(u32::try_from(bytes.len()).expect("read from 31 bits"));
            out.put_slice(bytes);
        }
    }
}

fn old(out: &mut Vec<u8>, old: &OldTuple) {
    match old {
        OldTuple::Key(key) => tuple(out, b'K', key),
        OldTuple::Full(row) => tuple(out, b'O', row),
    }
}

fn relation(out: &mut Vec<u8>, relation: &Relation) {
    change(out, b'R', relation.xid);
    out.put_u32(relation.oid);
    cstr(out, &relation.schema);
    cstr(out, &relation.name);
    out.put_u8(match relation.replica_identity {
        ReplicaIdentity::Default => b'd',
        ReplicaIdentity::Nothing => b'n',
        ReplicaIdentity::Full => b'f',
        ReplicaIdentity::Index => b'i',
    });
    out.put_u16(u16::try_from(relation.columns.len()).expect("read from 16 bits"));
    for Column { key, name, type_oid, type_modifier } in &relation.columns {
        out.put_u8(u8::from(*key));
        cstr(out, name);
        out.put_u32(*type_oid);
        out.put_i32(*type_modifier);
    }
}

/// As `proto.c` writes it.
fn encode(message: &Message, out: &mut Vec<u8>) {
    match message {
        Message::Begin(begin) => {
            out.put_u8(b'B');
            out.put_u64(begin.final_lsn.0);
            out.put_i64(begin.timestamp.0);
            out.put_u32(begin.xid);
        }
        Message::Commit(end) => {
            out.put_u8(b'C');
            commit(out, end);
        }
        Message::Origin(origin) => {
            out.put_u8(b'O');
            out.put_u64(origin.commit_lsn.0);
            cstr(out, &origin.name);
        }
        Message::Relation(known) => relation(out, known),
        Message::Type(name) => {
            change(out, b'Y', name.xid);
            out.put_u32(name.oid);
            cstr(out, &name.schema);
            cstr(out, &name.name);
        }
        Message::Insert(insert) => {
            change(out, b'I', insert.xid);
            out.put_u32(insert.relation);
            tuple(out, b'N', &insert.new);
        }
        Message::Update(update) => {
            change(out, b'U', update.xid);
            out.put_u32(update.relation);
            update.old.iter().for_each(|row| old(out, row));
            tuple(out, b'N', &update.new);
        }
        Message::Delete(delete) => {
            change(out, b'D', delete.xid);
            out.put_u32(delete.relation);
            old(out, &delete.old);
        }
        Message::Truncate(truncate) => {
            change(out, b'T', truncate.xid);
            out.put_u32(u32::try_from(truncate.relations.len()).expect("read from 32 bits"));
            out.put_u8(u8::from(truncate.cascade) | u8::from(truncate.restart_identity) << 1);
            truncate.relations.iter().for_each(|oid| out.put_u32(*oid));
        }
        Message::Logical(logical) => {
            change(out, b'M', logical.xid);
            out.put_u8(u8::from(logical.transactional));
            out.put_u64(logical.lsn.0);
            cstr(out, &logical.prefix);
            out.put_u32(u32::try_from(logical.content.len()).expect("read from 31 bits"));
            out.put_slice(&logical.content);
        }
        Message::StreamStart(start) => {
            out.put_u8(b'S');
            out.put_u32(start.xid);
            out.put_u8(u8::from(start.first));
        }
        Message::StreamStop => out.put_u8(b'E'),
        Message::StreamCommit(end) => {
            out.put_u8(b'c');
            out.put_u32(end.xid);
            commit(out, &end.commit);
        }
        Message::StreamAbort(abort) => {
            out.put_u8(b'A');
            out.put_u32(abort.xid);
            out.put_u32(abort.subtransaction_xid);
            if let Some((lsn, timestamp)) = abort.aborted {
                out.put_u64(lsn.0);
                out.put_i64(timestamp.0);
            }
        }
        Message::BeginPrepare(begin) => {
            out.put_u8(b'b');
            positions(out, begin.prepare_lsn, begin.end_lsn, begin.timestamp);
            out.put_u32(begin.xid);
            cstr(out, &begin.gid);
        }
        Message::Prepare(prepare) | Message::StreamPrepare(prepare) => {
            out.put_u8(if matches!(message, Message::Prepare(_)) { b'P' } else { b'p' });
            out.put_u8(0);
            positions(out, prepare.prepare_lsn, prepare.end_lsn, prepare.timestamp);
            out.put_u32(prepare.xid);
            cstr(out, &prepare.gid);
        }
        Message::CommitPrepared(end) => {
            out.put_u8(b'K');
            out.put_u8(0);
            positions(out, end.commit_lsn, end.end_lsn, end.timestamp);
            out.put_u32(end.xid);
            cstr(out, &end.gid);
        }
        Message::RollbackPrepared(end) => {
            out.put_u8(b'r');
            out.put_u8(0);
            positions(out, end.prepare_end_lsn, end.rollback_end_lsn, end.prepare_timestamp);
            out.put_i64(end.rollback_timestamp.0);
            out.put_u32(end.xid);
            cstr(out, &end.gid);
        }
    }
}
