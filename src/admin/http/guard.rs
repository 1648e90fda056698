//! Who may ask, and who may change state, by HTTP.
//!
//! Reading: whoever reaches the address. On a loopback address that is this machine, and so every page that its browser
//! has open, if such a page could give its own name our address (DNS rebinding): a name that is not ours is refused.
//!
//! With a token: who shows it. Without: who calls from this machine, unless a browser says that it acts for a page from
//! elsewhere – a page that an operator has open must not be able to cut over.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, StatusCode, header};
use subtle::ConstantTimeEq;

use super::problem::Problem;
use crate::config::Config;

/// Whether the caller asks for us, or for a name that somebody else has made to lead here. Browsers say the name of the
/// page's address, and no page can change that.
pub(super) fn may_ask(config: &Config, headers: &HeaderMap) -> Result<(), Problem> {
    let is_here = config.admin.address.is_some_and(|address| address.ip().to_canonical().is_loopback());
    if config.admin.token.is_some() || !is_here {
        return Ok(());
    }
    let own = |host: &header::HeaderValue| {
        std::str::from_utf8(host.as_bytes()).is_ok_and(|host| is_our_name(name_of(host), config))
    };
    if headers.get_all(header::HOST).iter().all(own) {
        return Ok(());
    }
    let detail =
        "without [admin] token, only localhost, loopback addresses and the names in [admin] hosts may be asked for";
    let hint = "ask for 127.0.0.1 or localhost, add the name to [admin] hosts, or set [admin] token";
    Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail).hint(hint))
}

/// The host of `host`, `host:port` or `[address]:port`.
fn name_of(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

fn is_our_name(name: &str, config: &Config) -> bool {
    let is_loopback = name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    let named = |own: &str| name.trim_end_matches('.').eq_ignore_ascii_case(own);
    is_loopback || named("localhost") || config.admin.hosts.iter().any(|own| named(own))
}

/// Lets the caller through, or says why not.
pub(super) fn may_change(config: &Config, peer: SocketAddr, headers: &HeaderMap) -> Result<(), Problem> {
    if let Some(token) = &config.admin.token {
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
        let right = shown.is_some_and(|shown| bool::from(shown.ct_eq(token.expose().as_bytes())));
        if right {
            return Ok(());
        }
        let problem = Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", "this call needs the bearer token");
        return Err(problem.hint("send `Authorization: Bearer` with the value of [admin] token"));
    }
    if !peer.ip().to_canonical().is_loopback() {
        let detail = "without [admin] token, calls that change state are taken from this machine only";
        return Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail).hint("set [admin] token"));
    }
    let foreign = headers.get_all(header::ORIGIN).iter().any(|origin| !is_own(origin.as_bytes(), config));
    // Browsers say this of every request, and no page can change it (W3C, Fetch Metadata).
    let sites = headers.get_all("sec-fetch-site");
    let elsewhere = sites.iter().any(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"));
    if foreign || elsewhere {
        let detail = "a page from elsewhere may not change state here";
        let hint = "open the dashboard at the daemon's own address and port; where it is reached by others (ssh -L, a \
                    reverse proxy), set [admin] token";
        return Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail).hint(hint));
    }
    Ok(())
}

/// The token of `Bearer token`; the scheme's name is not case-sensitive (RFC 9110, section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Whether a page of this origin was served by us. Its host must be an address of ours and not a name: a name can be
/// made to point here by anybody (DNS rebinding).
fn is_own(origin: &[u8], config: &Config) -> bool {
    let Some(host) = std::str::from_utf8(origin).ok().and_then(|origin| origin.strip_prefix("http://")) else {
        return false;
    };
    let Some((host, port)) = host.rsplit_once(':') else { return false };
    let Some(own) = config.admin.address else { return false };
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let ours = host == "localhost" || address.is_ok_and(|ip| ip.is_loopback() || ip == own.ip());
    ours && port.parse() == Ok(own.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Secret, Server};

    fn config(token: Option<&str>) -> Config {
        let mut config = Config::new(Server::new("a", 1, "u"), Server::new("b", 2, "u"));
        config.admin.address = Some(([127, 0, 0, 1], 8432).into());
        config.admin.token = token.map(Secret::new);
        config
    }

    fn headers(pairs: &[(header::HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), header::HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_name_that_somebody_else_has_made_to_lead_here_is_not_ours() {
        let mut open = config(None);
        open.admin.hosts = vec!["pgcutover.internal".to_owned()];
        for (host, ours) in [
            ("localhost", true),
            ("LocalHost.:8432", true),
            ("127.0.0.1:8432", true),
            ("127.8.9.1", true),
            ("[::1]:8432", true),
            ("pgcutover.internal", true),
            ("evil.example:8432", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example:8432", false),
            ("10.0.0.9", false),
            ("[::2]:8432", false),
            ("", false),
        ] {
            let asked = headers(&[(header::HOST, host)]);
            assert_eq!(may_ask(&open, &asked).is_ok(), ours, "{host}");
            assert!(may_ask(&config(Some("t0ken")), &asked).is_ok(), "{host}: reading is open, and changing needs it");
            let mut anywhere = config(None);
            anywhere.admin.address = Some(([0, 0, 0, 0], 8432).into());
            assert!(may_ask(&anywhere, &asked).is_ok(), "{host}: open to everybody");
        }
        assert!(may_ask(&open, &HeaderMap::new()).is_ok(), "no browser leaves it out");
    }

    #[test]
    fn only_the_token_or_this_machine_may_change_state() {
        let (here, there): (SocketAddr, SocketAddr) = (([127, 0, 0, 1], 5).into(), ([10, 0, 0, 9], 5).into());
        let mapped: SocketAddr = "[::ffff:127.0.0.1]:5".parse().expect("address");
        let (auth, origin) = (header::AUTHORIZATION, header::ORIGIN);
        type Case = (Option<&'static str>, SocketAddr, Vec<(header::HeaderName, &'static str)>, bool);
        let cases: Vec<Case> = vec![
            (None, here, vec![], true),
            (None, mapped, vec![], true),
            (None, there, vec![], false),
            (None, here, vec![(origin.clone(), "http://127.0.0.1:8432")], true),
            (None, here, vec![(origin.clone(), "http://localhost:8432")], true),
            (None, here, vec![(origin.clone(), "http://127.0.0.1:9999")], false),
            (None, here, vec![(origin.clone(), "https://evil.example")], false),
            (None, here, vec![(origin.clone(), "http://evil.example:8432")], false),
            (None, here, vec![(origin.clone(), "null")], false),
            (Some("t0ken"), there, vec![(auth.clone(), "Bearer t0ken")], true),
            (Some("t0ken"), there, vec![(auth.clone(), "bearer t0ken")], true),
            (Some("t0ken"), here, vec![], false),
            (Some("t0ken"), here, vec![(auth.clone(), "Bearer t0ke")], false),
            (Some("t0ken"), here, vec![(auth.clone(), "Basic t0ken")], false),
            (Some("t0ken"), here, vec![(auth, "Bearer")], false),
        ];
        for (token, peer, pairs, allowed) in cases {
            let result = may_change(&config(token), peer, &headers(&pairs));
            assert_eq!(result.is_ok(), allowed, "{token:?} {peer} {pairs:?}");
            assert!(!format!("{result:?}").contains("t0ken"));
        }
    }
}
