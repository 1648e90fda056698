//! The first packet of a connection: it has a length and no tag.

use super::frame::take_cstr;

/// Longest startup packet, as in PostgreSQL (`MAX_STARTUP_PACKET_LENGTH`), length field included.
pub const STARTUP_PACKET_MAX: u32 = 10_000;

/// Protocol 3.0, the only one spoken here.
pub const PROTOCOL_3_0: u32 = 3 << 16;

const SSL_REQUEST: u32 = 1234 << 16 | 5679;
const GSSENC_REQUEST: u32 = 1234 << 16 | 5680;
const CANCEL_REQUEST: u32 = 1234 << 16 | 5678;

/// A startup packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// May we speak TLS?
    SslRequest,
    /// May we speak GSSAPI encryption?
    GssEncRequest,
    /// Cancel what the session with this key runs.
    Cancel {
        /// Process id from BackendKeyData.
        pid: i32,
        /// Secret from BackendKeyData.
        key: Vec<u8>,
    },
    /// A session is wanted.
    Session(SessionStartup),
}

/// What a client says of the session it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStartup {
    /// Role.
    pub user: String,
    /// Database; the role's name where none was given.
    pub database: String,
    /// Everything else, in order, without protocol options.
    pub parameters: Vec<(String, String)>,
    /// Names of `_pq_.` options, none of which is known here.
    pub protocol_options: Vec<String>,
    /// Minor version that was asked for; 0 is what will be spoken.
    pub minor: u16,
    /// What its `replication` parameters come to.
    pub replication: Replication,
}

/// What a client asks for with `replication`. A server decides by the same rule what kind of backend it makes, so
/// whoever reads the value otherwise lets an ordinary session pass for a walsender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replication {
    /// An ordinary session.
    #[default]
    Off,
    /// A walsender of no database, which takes no SQL.
    Physical,
    /// A walsender of a database, which takes SQL too.
    Database,
}

impl SessionStartup {
    /// The value of a parameter, the last one where it was given twice.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether the client must be told that it asked for more than is spoken here (NegotiateProtocolVersion).
    pub fn needs_negotiation(&self) -> bool {
        self.minor > 0 || !self.protocol_options.is_empty()
    }
}

/// The packet is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    /// Shorter or longer than a startup packet may be.
    #[error("invalid length of startup packet")]
    Length,
    /// The parameters are not pairs of zero-terminated strings.
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
    /// A major version that is not 3.
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.0")]
    Version {
        /// Upper half.
        major: u16,
        /// Lower half.
        minor: u16,
    },
    /// No `user`.
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    /// Text that is not UTF-8: it could not be passed on unchanged.
    #[error("invalid byte sequence in startup packet")]
    Encoding,
    /// `replication` is neither a boolean nor `database`.
    #[error("invalid value for parameter \"replication\": \"{value}\"")]
    Replication {
        /// What it is.
        value: String,
    },
}

/// The size of the packet after its length field, from that field.
pub fn body_bytes(length: [u8; 4]) -> Result<usize, StartupError> {
    match u32::from_be_bytes(length) {
        length @ 8..=STARTUP_PACKET_MAX => Ok(length as usize - 4),
        _ => Err(StartupError::Length),
    }
}

/// Reads a packet, without its length field.
pub fn parse(packet: &[u8]) -> Result<Startup, StartupError> {
    let (code, rest) = packet.split_first_chunk::<4>().ok_or(StartupError::Length)?;
    match u32::from_be_bytes(*code) {
        SSL_REQUEST => Ok(Startup::SslRequest),
        GSSENC_REQUEST => Ok(Startup::GssEncRequest),
        CANCEL_REQUEST => {
            let (pid, key) = rest.split_first_chunk::<4>().ok_or(StartupError::Length)?;
            if key.is_empty() || key.len() > 256 {
                return Err(StartupError::Length);
            }
            Ok(Startup::Cancel { pid: i32::from_be_bytes(*pid), key: key.to_vec() })
        }
        version => parse_session((version >> 16) as u16, version as u16, rest),
    }
}

fn parse_session(major: u16, minor: u16, mut rest: &[u8]) -> Result<Startup, StartupError> {
    if major != 3 {
        return Err(StartupError::Version { major, minor });
    }
    let mut session = SessionStartup {
        user: String::new(),
        database: String::new(),
        parameters: Vec::new(),
        protocol_options: Vec::new(),
        minor,
        replication: Replication::Off,
    };
    let mut walsender = Walsender::default();
    loop {
        let name = text(&mut rest)?;
        if name.is_empty() {
            break;
        }
        let value = text(&mut rest)?;
        if name == "replication" {
            walsender.take(value)?;
        }
        match name {
            "user" => value.clone_into(&mut session.user),
            "database" => value.clone_into(&mut session.database),
            _ if name.starts_with("_pq_.") => session.protocol_options.push(name.to_owned()),
            _ => session.parameters.push((name.to_owned(), value.to_owned())),
        }
    }
    if !rest.is_empty() {
        return Err(StartupError::Layout);
    }
    if session.user.is_empty() {
        return Err(StartupError::NoUser);
    }
    if session.database.is_empty() {
        session.user.clone_into(&mut session.database);
    }
    cut(&mut session.user);
    cut(&mut session.database);
    session.replication = walsender.asked();
    Ok(Startup::Session(session))
}

/// `replication`, as `ProcessStartupPacket` reads it (`postmaster.c`, from PostgreSQL 17 on `backend_startup.c`): each
/// that is given is checked, the last boolean counts, and `database` is not forgotten.
#[derive(Default)]
struct Walsender {
    is_wanted: bool,
    of_database: bool,
}

impl Walsender {
    fn take(&mut self, value: &str) -> Result<(), StartupError> {
        if value == "database" {
            (self.is_wanted, self.of_database) = (true, true);
            return Ok(());
        }
        self.is_wanted = parse_bool(value).ok_or_else(|| StartupError::Replication { value: value.to_owned() })?;
        Ok(())
    }

    fn asked(&self) -> Replication {
        match (self.is_wanted, self.of_database) {
            (false, _) => Replication::Off,
            (true, false) => Replication::Physical,
            (true, true) => Replication::Database,
        }
    }
}

/// A boolean as PostgreSQL's `parse_bool` (`bool.c`) reads it: 0, 1, or any beginning of a word that no other word has,
/// in any case.
pub fn parse_bool(text: &str) -> Option<bool> {
    let begins = |word: &str, least: usize| {
        text.len() >= least && word.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text))
    };
    if text == "1" || begins("true", 1) || begins("yes", 1) || begins("on", 2) {
        Some(true)
    } else if text == "0" || begins("false", 1) || begins("no", 1) || begins("off", 2) {
        Some(false)
    } else {
        None
    }
}

/// Longest name that a server knows (`NAMEDATALEN` in PostgreSQL's `pg_config_manual.h`, less the byte at its end).
const LONGEST_NAME: usize = 63;

/// Servers cut longer names (`ProcessStartupPacket`): whoever adds a byte to one must not be somebody else to rules, gates and
/// limits. What is left is what the server is asked for.
fn cut(name: &mut String) {
    let mut end = LONGEST_NAME.min(name.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
}

fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, StartupError> {
    std::str::from_utf8(take_cstr(rest).ok_or(StartupError::Layout)?).map_err(|_| StartupError::Encoding)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        [&code.to_be_bytes()[..], body].concat()
    }

    #[test]
    fn names_are_cut_where_the_server_cuts_them() {
        let long = "d".repeat(62);
        for (asked, read) in [("x", "dx"), ("xy", "dx"), ("é", "d"), ("", "d")] {
            let body = format!("user\0{long}d{asked}\0database\0{long}{asked}\0\0");
            let Ok(Startup::Session(session)) = parse(&packet(PROTOCOL_3_0, body.as_bytes())) else {
                panic!("a session")
            };
            assert_eq!(session.user, format!("{long}d"));
            assert_eq!(session.database, format!("{long}{}", &read[1..]), "{asked}");
        }
    }

    #[test]
    fn a_session_defaults_to_the_users_database_and_keeps_its_parameters() {
        let body = b"user\0ann\0application_name\0app\0_pq_.command_tag\0x\0options\0-c a=b\0\0";
        let Ok(Startup::Session(session)) = parse(&packet(PROTOCOL_3_0 | 2, body)) else { panic!("a session") };
        assert_eq!((session.user.as_str(), session.database.as_str(), session.minor), ("ann", "ann", 2));
        assert_eq!(session.parameter("options"), Some("-c a=b"));
        assert_eq!(session.protocol_options, ["_pq_.command_tag"]);
        assert!(session.needs_negotiation());
    }

    #[test]
    fn what_postgresql_refuses_is_refused() {
        assert_eq!(parse(&packet(PROTOCOL_3_0, b"user\0ann")), Err(StartupError::Layout));
        assert_eq!(parse(&packet(PROTOCOL_3_0, b"user\0ann\0\0x")), Err(StartupError::Layout));
        assert_eq!(parse(&packet(PROTOCOL_3_0, b"database\0ann\0\0")), Err(StartupError::NoUser));
        assert_eq!(parse(&packet(2 << 16, b"")), Err(StartupError::Version { major: 2, minor: 0 }));
        assert_eq!(body_bytes(7u32.to_be_bytes()), Err(StartupError::Length));
        assert_eq!(body_bytes(10_001u32.to_be_bytes()), Err(StartupError::Length));
    }

    /// What PostgreSQL 15 was seen to make of each.
    #[test]
    fn replication_is_read_as_the_server_reads_it() {
        let read = |values: &[&str]| {
            let mut body = b"user\0ann\0".to_vec();
            values.iter().for_each(|value| body.extend(format!("replication\0{value}\0").bytes()));
            body.push(0);
            match parse(&packet(PROTOCOL_3_0, &body)) {
                Ok(Startup::Session(session)) => Ok(session.replication),
                Ok(other) => panic!("{other:?}"),
                Err(error) => Err(error),
            }
        };
        assert_eq!(read(&[]), Ok(Replication::Off));
        for off in ["0", "f", "fa", "fal", "fals", "false", "FALSE", "n", "no", "No", "of", "off"] {
            assert_eq!(read(&[off]), Ok(Replication::Off), "{off}");
        }
        for on in ["1", "t", "tr", "tru", "true", "TRUE", "y", "ye", "yes", "on", "oN"] {
            assert_eq!(read(&[on]), Ok(Replication::Physical), "{on}");
        }
        assert_eq!(read(&["database"]), Ok(Replication::Database));
        for wrong in ["", "o", "2", "00", "01", "falsey", "offf", "nope", " on", "on ", "Database", "data", "é"] {
            assert_eq!(read(&[wrong]), Err(StartupError::Replication { value: wrong.to_owned() }), "{wrong:?}");
        }
        assert_eq!(read(&["on", "off"]), Ok(Replication::Off));
        assert_eq!(read(&["database", "off"]), Ok(Replication::Off));
        assert_eq!(read(&["database", "on"]), Ok(Replication::Database));
        assert_eq!(read(&["x", "on"]), Err(StartupError::Replication { value: "x".to_owned() }));
    }

    #[test]
    fn requests_are_told_apart() {
        assert_eq!(parse(&packet(SSL_REQUEST, b"")), Ok(Startup::SslRequest));
        assert_eq!(parse(&packet(GSSENC_REQUEST, b"")), Ok(Startup::GssEncRequest));
        let cancel = parse(&packet(CANCEL_REQUEST, &[0, 0, 0, 7, 1, 2, 3, 4]));
        assert_eq!(cancel, Ok(Startup::Cancel { pid: 7, key: vec![1, 2, 3, 4] }));
        assert_eq!(parse(&packet(CANCEL_REQUEST, &[0, 0, 0, 7])), Err(StartupError::Length));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let _ = parse(&packet(PROTOCOL_3_0, &bytes));
        }
    }
}
