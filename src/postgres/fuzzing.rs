//! What must hold for any bytes that a server may send. Built for tests and fuzzing only.
//!
//! Parsers that sit inside an exchange are met by a server that has said everything beforehand and then closes its side:
//! whatever it said, the exchange must come to an end.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use bytes::{Bytes, BytesMut};
use tokio::runtime::Runtime;

use super::frame::{MAX_FRAME_BYTES, affected_rows, data_row, parameter_status, take_frame};
use super::scram::ScramClient;
use super::{Credential, Login, Pipeline, RawConnection, RawError, Stream, login, settings, walsender};
use crate::config::Secret;

/// More than the socket takes at once would block the one thread.
const SAID_MAX: usize = 64 * 1024;

/// A connection to a server that has said `said` and nothing after it; and its end of the socket, to be kept. Must be
/// called inside a runtime.
pub fn scripted(said: &[u8]) -> (RawConnection, UnixStream) {
    let (ours, mut server) = UnixStream::pair().expect("socket pair");
    server.write_all(&said[..said.len().min(SAID_MAX)]).expect("fits");
    server.shutdown(std::net::Shutdown::Write).expect("open");
    ours.set_nonblocking(true).expect("a socket");
    let stream = tokio::net::UnixStream::from_std(ours).expect("inside a runtime");
    (RawConnection::before_login(Stream::Unix(stream), "source"), server)
}

/// Frames of a server: taken whole however they arrive, and the readers of their bodies.
pub fn backend_frames(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let mut buffer = BytesMut::from(stream);
    let mut whole = Vec::new();
    let outcome = loop {
        match take_frame(&mut buffer, MAX_FRAME_BYTES) {
            Ok(Some(frame)) => whole.push(frame),
            Ok(None) => break Ok(()),
            Err(what) => break Err(what),
        }
    };
    let (mut buffer, mut pieces, mut failed) = (BytesMut::new(), Vec::new(), Ok(()));
    'stream: for piece in stream.chunks(usize::from(cut % 31) + 1) {
        buffer.extend_from_slice(piece);
        loop {
            match take_frame(&mut buffer, MAX_FRAME_BYTES) {
                Ok(Some(frame)) => pieces.push(frame),
                Ok(None) => break,
                Err(what) => {
                    failed = Err(what);
                    break 'stream;
                }
            }
        }
    }
    assert_eq!(outcome, failed);
    assert_eq!(whole, pieces);
    for frame in whole {
        let _rows = affected_rows(&frame.body);
        let _parameter = parameter_status(&frame.body);
        let _error = RawError::from_error_response(&frame.body).to_string();
        if let Some(row) = data_row(&frame.body) {
            let size: usize = row.iter().map(|value| 4 + value.as_ref().map_or(0, String::len)).sum();
            assert_eq!(size + 2, frame.body.len(), "every byte belongs to a value");
        }
    }
}

/// A whole login, the first byte says with what.
pub fn authentication(runtime: &Runtime, data: &[u8]) {
    let Some((&kind, said)) = data.split_first() else { return };
    let credential = match kind % 4 {
        0 => Credential::None,
        1 => Credential::Password(Secret::new("secret")),
        2 => Credential::ScramKeys { client_key: [1; 32], server_key: [2; 32] },
        _ => Credential::Md5Hash(Secret::new("md5d2ffbd3ca78e0a2b5b2d2e2ffea4a7a1")),
    };
    let login = Login { user: "ann".to_owned(), database: "shop".to_owned(), credential, parameters: Vec::new() };
    let derived = super::derived_keys::DerivedKeys::new();
    runtime.block_on(async {
        let (mut connection, _server) = scripted(said);
        if let Err(error) = login::log_in(&mut connection, &login, &derived).await {
            assert!(!error.to_string().contains("secret") || contains(said, b"secret"), "{error}");
        }
    });
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// A server's two SCRAM messages, cut apart at the first zero byte: a server that does not know the key is refused.
pub fn scram_server_messages(data: &[u8]) {
    let cut = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (first, last) = (&data[..cut], data.get(cut + 1..).unwrap_or_default());
    let client = ScramClient::with_nonce([1; 32], [2; 32], "abc".to_owned());
    let Ok((waiting, answer)) = client.answer(first) else { return };
    assert!(answer.starts_with("c=biws,r=abc") && answer.contains(",p="));
    assert!(waiting.finish(last).is_err(), "the signature cannot be guessed");
}

/// What answers control queries, pipelines and COPY; the first byte says which of them was asked for.
pub fn control_answers(runtime: &Runtime, data: &[u8]) {
    let Some((&kind, said)) = data.split_first() else { return };
    runtime.block_on(async {
        let (mut connection, _server) = scripted(said);
        connection.logged_in();
        match kind % 5 {
            0 => while connection.simple_query("SELECT 1").await.is_ok() {},
            1 => while connection.query_named("s", "SELECT $1", &[Some("x")]).await.is_ok() {},
            2 => {
                let mut pipeline = Pipeline::new();
                pipeline.parse("s", "SELECT $1", &[]).expect("can be encoded");
                pipeline.describe("s").expect("can be encoded");
                pipeline.execute("s", [Some(&b"x"[..]), None]).expect("can be encoded");
                pipeline.close("s").expect("can be encoded");
                pipeline.commit();
                if let Ok(outcome) = connection.run(&mut pipeline).await {
                    assert_eq!(outcome.affected.len(), 2, "each executed step has been answered");
                }
                assert!(pipeline.is_empty());
            }
            3 => {
                if let Ok(mut copy) = connection.copy_out("COPY t TO STDOUT").await {
                    let mut received = 0;
                    while let Ok(Some(bytes)) = copy.next().await {
                        received += bytes.len();
                    }
                    assert!(received <= said.len());
                }
            }
            _ => {
                if let Ok(mut copy) = connection.copy_in("COPY t FROM STDIN").await
                    && copy.send(b"1\n").await.is_ok()
                {
                    let _ended = copy.finish().await;
                }
            }
        }
        let _version = connection.version_num();
    });
}

/// What a walsender puts into CopyData.
pub fn walsender_messages(data: &[u8]) {
    use walsender::ReplicationMessage::{Keepalive, XLogData};
    match walsender::read_message(Bytes::copy_from_slice(data)) {
        Some(XLogData { start, end, sent_at_us, data: payload }) => {
            let header = [start.0.to_be_bytes(), end.0.to_be_bytes(), sent_at_us.to_be_bytes()];
            let written = [&b"w"[..], &header.concat()].concat();
            assert!(data.starts_with(&written) && data[25..] == payload);
        }
        Some(Keepalive { end, reply_requested }) => {
            assert!(data.len() == 18 && data[1..9] == end.0.to_be_bytes() && reply_requested == (data[17] != 0));
        }
        None => {}
    }
}

/// Numbers that servers send as text.
pub fn server_texts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(number) = settings::version_num(text) {
        assert!(number < 100_000_000);
    }
    if let Ok(lsn) = text.parse::<crate::lsn::Lsn>() {
        assert_eq!(lsn.to_string().parse::<crate::lsn::Lsn>().ok(), Some(lsn));
    }
}
