//! What must hold for any bytes that reach the parsers of this module. Built for tests and fuzzing only; each function
//! takes one input and panics where a promise is broken.

use super::error::{self, ErrorFields, Severity};
use super::frame::{self, HEADER_BYTES, Header, take_cstr};
use super::ledger::{Ledger, TransactionStatus};
use super::message;
use super::proxy_protocol::{self, FIXED_BYTES, Origin, REST_MAX};
use super::scanner::{Scanner, Sink};
use super::scram::{ChannelBinding, Exchange, Verifier};
use super::startup::{self, Startup};

/// A client's frames after login: what is taken is what was there, and no more.
pub fn frontend_frames(data: &[u8]) {
    let mut rest = data;
    loop {
        let header = Header::parse(rest);
        match frame::first(rest) {
            Ok(Some((first, body))) => {
                assert_eq!(header, Ok(Some(first)));
                assert_eq!(body.len(), first.body_bytes as usize);
                let written = [&[first.tag][..], &(first.body_bytes + 4).to_be_bytes(), body].concat();
                assert_eq!(written, rest[..HEADER_BYTES + body.len()], "a frame is its own encoding");
                let _known = frame::is_frontend_tag(first.tag);
                rest = &rest[written.len()..];
            }
            Ok(None) => {
                assert!(header.is_ok_and(|header| {
                    header.is_none_or(|header| rest.len() < HEADER_BYTES + header.body_bytes as usize)
                }));
                return;
            }
            Err(error) => return assert_eq!(header, Err(error)),
        }
    }
}

/// A startup packet without its length field.
pub fn startup(data: &[u8]) {
    if let Some(length) = data.first_chunk::<4>() {
        let announced = u32::from_be_bytes(*length);
        if let Ok(body) = startup::body_bytes(*length) {
            assert!(announced <= startup::STARTUP_PACKET_MAX && body + 4 == announced as usize);
        }
    }
    match startup::parse(data) {
        Ok(Startup::Session(session)) => {
            assert!(!session.user.is_empty() && !session.database.is_empty());
            let mut packet = (startup::PROTOCOL_3_0 | u32::from(session.minor)).to_be_bytes().to_vec();
            let mut put = |name: &str, value: &str| {
                packet.extend([name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
            };
            put("user", &session.user);
            put("database", &session.database);
            session.parameters.iter().for_each(|(name, value)| put(name, value));
            session.protocol_options.iter().for_each(|name| put(name, ""));
            packet.push(0);
            assert_eq!(startup::parse(&packet), Ok(Startup::Session(session.clone())), "nothing is lost or made up");
            let parameters = session.parameters.iter().rev();
            for (name, value) in parameters.take(1) {
                assert_eq!(session.parameter(name), Some(value.as_str()), "the last one counts");
            }
        }
        Ok(Startup::Cancel { pid, key }) => {
            assert!((1..=256).contains(&key.len()));
            assert_eq!(&data[4..], [&pid.to_be_bytes()[..], &key].concat());
        }
        Ok(Startup::SslRequest | Startup::GssEncRequest) | Err(_) => {}
    }
}

/// A PROXY protocol header: as long as it says, and an address only where one was written.
pub fn proxy_header(data: &[u8]) {
    let Some((fixed, rest)) = data.split_first_chunk::<FIXED_BYTES>() else { return };
    let Ok(length) = proxy_protocol::rest_bytes(fixed) else { return };
    assert!(length <= REST_MAX);
    let Ok(origin) = proxy_protocol::parse(fixed, rest) else { return };
    assert_eq!(rest.len(), length);
    if let Origin::Client(address) = origin {
        assert!(rest.len() >= if address.is_ipv4() { 12 } else { 36 });
        assert_eq!(address.ip(), address.ip().to_canonical());
    }
}

/// The bodies of a client's PasswordMessage and SASLInitialResponse.
pub fn password_messages(data: &[u8]) {
    if let Some(password) = message::read_password(data) {
        assert_eq!([password, b"\0"].concat(), data);
    }
    if let Some((mechanism, first)) = message::read_sasl_initial(data) {
        let length = i32::try_from(first.len()).expect("read from 31 bits").to_be_bytes();
        assert_eq!([mechanism, b"\0", &length, first].concat(), data);
    }
    let mut rest = data;
    if let Some(text) = take_cstr(&mut rest) {
        assert_eq!([text, b"\0", rest].concat(), data);
    }
}

/// A client's two SCRAM messages, cut apart at the first zero byte: nobody gets in by guessing.
pub fn scram_client_messages(data: &[u8]) {
    let mut last = data;
    let first = take_cstr(&mut last).unwrap_or(data);
    let verifier = Verifier::made_up("ann", &[7; 32]);
    let bindings = [ChannelBinding::NotOffered, ChannelBinding::Declined, ChannelBinding::EndPoint(b"digest")];
    for (binding, known) in bindings.into_iter().zip([Some(verifier.clone()), None, Some(verifier.clone())]) {
        let Ok(exchange) = Exchange::begin(first, binding, known, verifier.clone(), "ours") else { continue };
        let asked = exchange.server_first();
        assert!(asked.starts_with("r=") && asked.contains("ours,s=") && asked.ends_with(",i=4096"));
        assert!(!matches!(exchange.finish(last), Ok(Some(_))), "no proof was given");
    }
}

/// What a server stores for a role (`rolpassword`).
pub fn scram_verifier(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(verifier) = Verifier::parse(text) else { return };
    assert!(text.starts_with("SCRAM-SHA-256$"));
    assert_eq!(format!("{verifier:?}"), "Verifier(…)", "keys are never shown");
    let exchange = Exchange::begin(b"n,,n=,r=abc", ChannelBinding::NotOffered, Some(verifier.clone()), verifier, "x");
    let exchange = exchange.expect("speaks SCRAM");
    assert!(!matches!(exchange.finish(b"c=biws,r=abcx,p=AAAA"), Ok(Some(_))));
}

/// Frames as the scanner has seen them.
#[derive(Debug, Default, PartialEq)]
struct Seen(Vec<(u8, Vec<u8>)>);

impl Sink for Seen {
    fn frame(&mut self, tag: u8, body: &[u8]) {
        self.0.push((tag, body.to_vec()));
    }
}

/// A server's stream: the same frames are seen however it is cut. The first byte says how.
pub fn server_stream(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let mut whole = Seen::default();
    let mut scanner = Scanner::new();
    let outcome = scanner.scan(stream, &mut whole);
    let (mut pieces, mut cutting) = (Seen::default(), Scanner::new());
    let mut size = usize::from(cut % 13) + 1;
    let (mut rest, mut failed) = (stream, Ok(()));
    while !rest.is_empty() && failed.is_ok() {
        let (piece, after) = rest.split_at(size.min(rest.len()));
        failed = cutting.scan(piece, &mut pieces);
        rest = after;
        // Pieces of several sizes, so that cuts fall everywhere in a frame.
        size = size % 29 + usize::from(cut / 13) + 1;
    }
    assert_eq!(outcome, failed);
    assert_eq!(whole, pieces);
    if outcome.is_ok() {
        assert_eq!(scanner.is_at_boundary(), cutting.is_at_boundary());
    }
    for (tag, body) in whole.0 {
        if tag == frame::backend::READY_FOR_QUERY
            && let Ok(status) = message::read_ready_for_query(&body)
        {
            let mut again = Vec::new();
            message::ready_for_query(&mut again, status);
            assert_eq!(again[HEADER_BYTES..], body);
        }
        if let Some((name, value)) = message::read_parameter_status(&body) {
            let mut again = Vec::new();
            message::parameter_status(&mut again, name, value);
            assert!(body.starts_with(&again[HEADER_BYTES..]));
        }
    }
}

/// Any order of frames from both sides: the ledger's counts agree with each other, and a session is never quiet while
/// a ReadyForQuery is owed. Two bits say who speaks, the rest what.
pub fn ledger(data: &[u8]) {
    const CLIENT: &[u8] = b"PBDECSQFHdcfXp?";
    const SERVER: &[u8] = b"123CDEGHInTtsSNAVWdc";
    const STATUS: [TransactionStatus; 3] =
        [TransactionStatus::Idle, TransactionStatus::InBlock, TransactionStatus::Failed];
    let mut ledger = Ledger::new();
    for byte in data {
        let choice = usize::from(byte >> 2);
        match byte & 3 {
            0 | 1 => ledger.forwarded(CLIENT[choice % CLIENT.len()]),
            2 => ledger.answered(SERVER[choice % SERVER.len()]),
            _ => ledger.ready(STATUS[choice % STATUS.len()]),
        }
        assert!(ledger.is_consistent());
        if ledger.is_quiet() {
            assert!(!ledger.awaits_ready() && !ledger.is_copying_in() && !ledger.server_waits());
            assert_eq!(ledger.status(), TransactionStatus::Idle);
        }
    }
}

/// The body of an ErrorResponse or NoticeResponse; and texts of ours come back as they were.
pub fn error_fields(data: &[u8]) {
    for wanted in *b"SVCMDHXs" {
        if let Some(text) = error::field(data, wanted) {
            assert!(!text.contains(&0));
            let written = [&[wanted][..], text, &[0]].concat();
            assert!(data.windows(written.len()).any(|window| window == written));
        }
    }
    let texts: Vec<&str> = data.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok()).collect();
    let [code, message, detail, ..] = texts[..] else { return };
    let fields = ErrorFields { severity: Severity::Error, code, message, detail: Some(detail), hint: None };
    let mut out = Vec::new();
    fields.encode(&mut out);
    let (_, body) = frame::first(&out).expect("valid").expect("whole");
    assert_eq!(error::field(body, b'C'), Some(code.as_bytes()));
    assert_eq!(error::field(body, b'M'), Some(message.as_bytes()));
    assert_eq!(error::field(body, b'D'), Some(detail.as_bytes()));
    assert_eq!(error::field(body, b'H'), None);
}
