//! What our own sessions pin, so that no role, database or server setting can change them to our harm.
//!
//! The text of values depends on settings (`DateStyle`, `bytea_output`, …), completeness does (`row_security`), and so
//! does durability (`synchronous_commit`). They go into the startup packet, where they outrank what
//! `ALTER ROLE … SET` and `ALTER DATABASE … SET` say. A setting that the server does not know would be FATAL there:
//! the packet holds only those that every version from 10 to 18 knows, the rest is set by [`after_login`].

/// Settings that PostgreSQL 10 to 18 all know and every role may set.
const PINNED: &[(&str, &str)] = &[
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    ("synchronous_commit", "on"),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, YMD"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("TimeZone", "UTC"),
    ("xmloption", "content"),
    // The text of `money`, and of NULL in an array.
    ("lc_monetary", "C"),
    ("array_nulls", "on"),
    ("standard_conforming_strings", "on"),
    ("search_path", "pg_catalog"),
    ("row_security", "off"),
    // "Already exists, skipping" is no news for a log.
    ("client_min_messages", "warning"),
    // When our host is lost the server has to notice, because our sessions hold locks; the default is two hours. Ignored
    // on Unix sockets.
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
];

/// Time-outs that came later: the version that brought each, and its name.
const LATER_TIMEOUTS: &[(u32, &str)] = &[(140_000, "idle_session_timeout"), (170_000, "transaction_timeout")];

/// The `options` startup parameter of our own sessions.
pub(super) fn startup_options() -> String {
    let switches: Vec<String> = PINNED.iter().map(|(name, value)| format!("-c {name}={}", escape(value))).collect();
    switches.join(" ")
}

/// One statement that pins what the startup packet could not, for a server of `version_num`; none where there is
/// nothing to pin.
pub(super) fn after_login(version_num: u32) -> Option<String> {
    let statements: Vec<String> = LATER_TIMEOUTS
        .iter()
        .filter(|(since, _)| version_num >= *since)
        .map(|(_, name)| format!("SET {name} = 0"))
        .collect();
    (!statements.is_empty()).then(|| statements.join("; "))
}

/// A statement for sessions that carry rows. In a database in SQL_ASCII texts are any bytes: nothing can be converted, and a
/// session in UTF8 would be refused what is none (`pg_server_to_any` in PostgreSQL's `mbutils.c`).
pub(super) fn unconverted(server_encoding: &str) -> Option<&'static str> {
    (server_encoding == "SQL_ASCII").then_some("SET client_encoding = SQL_ASCII")
}

/// `server_version_num` from the `server_version` that every server reports at login (`15.18 (Debian …)`, `18beta1`,
/// `10.23`). From version 10 on the number is major × 10000 + minor.
pub(super) fn version_num(server_version: &str) -> Option<u32> {
    let digits = |text: &str| -> Option<u32> {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse().ok()
    };
    let major = digits(server_version)?;
    let minor = server_version.split_once('.').and_then(|(_, rest)| digits(rest)).unwrap_or(0);
    (major < 10_000).then(|| major * 10_000 + minor.min(9_999))
}

/// A value inside `options`: the server splits at white space and takes a backslash as an escape
/// (`pg_split_opts` in PostgreSQL's `postinit.c`).
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if c == '\\' || c.is_ascii_whitespace() || c == '\u{b}' {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_escape_what_the_server_splits_at() {
        assert_eq!(escape("read committed"), "read\\ committed");
        assert_eq!(escape("a\\b\tc"), "a\\\\b\\\tc");
        assert!(startup_options().starts_with("-c statement_timeout=0 -c lock_timeout=0 "));
    }

    #[test]
    fn later_time_outs_only_where_they_exist() {
        assert_eq!(after_login(130_022), None);
        assert_eq!(after_login(140_000).as_deref(), Some("SET idle_session_timeout = 0"));
        assert_eq!(after_login(180_001).as_deref(), Some("SET idle_session_timeout = 0; SET transaction_timeout = 0"));
    }

    #[test]
    fn bytes_of_no_encoding_are_left_alone() {
        assert_eq!(unconverted("SQL_ASCII"), Some("SET client_encoding = SQL_ASCII"));
        assert_eq!(unconverted("LATIN1"), None);
    }

    #[test]
    fn version_numbers_from_what_servers_report() {
        for (text, number) in [
            ("10.23", 100_023),
            ("15.18 (Debian 15.18-0+deb12u1)", 150_018),
            ("18beta1", 180_000),
            ("17rc1 x", 170_000),
        ] {
            assert_eq!(version_num(text), Some(number), "{text}");
        }
        assert_eq!(version_num("PostgreSQL"), None);
        assert_eq!(version_num("99999999999"), None);
        assert_eq!(version_num("999999.1"), None);
    }
}
