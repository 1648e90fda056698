//! What must hold for whatever headers a caller sends. Built for tests and fuzzing only.

use std::net::SocketAddr;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use super::guard::may_change;
use crate::config::{Config, Secret, Server};

const TOKEN: &str = "t0ken";

/// Headers, one a line. The first byte says whether there is a token, and whether the caller is on this machine.
pub fn http_guard(data: &[u8]) {
    let Some((&kind, lines)) = data.split_first() else { return };
    let (has_token, is_here) = (kind & 1 == 1, kind & 2 == 2);
    let mut config = Config::new(Server::new("a", 1, "u"), Server::new("b", 2, "u"));
    config.admin.address = Some(([127, 0, 0, 1], 8432).into());
    config.admin.token = has_token.then(|| Secret::new(TOKEN));
    let peer: SocketAddr = if is_here { ([127, 0, 0, 1], 9).into() } else { ([10, 0, 0, 9], 9).into() };
    let mut headers = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n').take(64) {
        let mut halves = line.splitn(2, |byte| *byte == b':');
        let name = HeaderName::from_bytes(halves.next().unwrap_or_default());
        let value = HeaderValue::from_bytes(halves.next().unwrap_or_default());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let is_let_in = may_change(&config, peer, &headers).is_ok();
    if has_token {
        let shown = headers.get("authorization").map(|value| value.as_bytes().to_ascii_lowercase());
        let ends = shown.as_ref().is_some_and(|shown| shown.trim_ascii_end().ends_with(TOKEN.as_bytes()));
        let begins = shown.as_ref().is_some_and(|shown| shown.starts_with(b"bearer "));
        assert!(!is_let_in || ends && begins, "who does not show the token is not let in");
        return;
    }
    let own = |origin: &HeaderValue| {
        let origin = String::from_utf8_lossy(origin.as_bytes()).into_owned();
        origin.starts_with("http://") && origin.rsplit(':').next().and_then(|port| port.parse().ok()) == Some(8432u16)
    };
    assert!(!is_let_in || is_here && headers.get_all("origin").iter().all(own), "a page from elsewhere is not let in");
}
