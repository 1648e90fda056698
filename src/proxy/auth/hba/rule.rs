//! One line of rules. What is wrong is said in PostgreSQL's words where it has some.

use std::net::IpAddr;

use regex_lite::Regex;

use super::{
    CertificateCheck, CertificateName, Connection, DatabaseName, Demand, Encryption, From, Outcome, Rule, Token,
    UserName,
};
use crate::config::{AuthMethod, Network};

const NO_GROUPS: &str = "groups of roles are not known here: list the roles";
const NO_FILES: &str = "included files are not read: write the lines here";

/// Reads a line's fields.
pub(super) fn read(line: usize, fields: &[Vec<Token>]) -> Result<Rule, String> {
    let mut fields = fields.iter();
    let kind = single(fields.next(), "connection type")?;
    if kind.text.starts_with("include") {
        return Err(NO_FILES.to_owned());
    }
    let encryption = match kind.text.as_str() {
        "local" => None,
        "host" | "hostnogssenc" => Some(Encryption::Any),
        "hostssl" => Some(Encryption::Tls),
        "hostnossl" => Some(Encryption::None),
        "hostgssenc" => return Err("GSSAPI encryption is not spoken here, so the rule would fit nobody".to_owned()),
        other => return Err(format!("invalid connection type {other:?}")),
    };
    let databases = fields.next().ok_or("end-of-line before database specification")?;
    let databases = databases.iter().map(database).collect::<Result<_, _>>()?;
    let users = fields.next().ok_or("end-of-line before role specification")?;
    let users = users.iter().map(user).collect::<Result<_, _>>()?;
    let connection = match encryption {
        None => Connection::Local,
        Some(encryption) => Connection::Host { encryption, from: from(&mut fields)? },
    };
    let method = single(fields.next(), "authentication method")?;
    let outcome = if method.text == "reject" {
        Outcome::Reject
    } else {
        let method = method_of(&method.text)?;
        Outcome::Ask(demand(method, encryption, fields.flatten())?)
    };
    Ok(Rule { line, connection, databases, users, outcome })
}

/// The one token of a field.
fn single<'a>(field: Option<&'a Vec<Token>>, what: &str) -> Result<&'a Token, String> {
    match field.map(Vec::as_slice) {
        Some([token]) => Ok(token),
        Some(_) => Err(format!("multiple values specified for {what}")),
        None => Err(format!("end-of-line before {what}{}", if what.contains(' ') { "" } else { " specification" })),
    }
}

fn database(token: &Token) -> Result<DatabaseName, String> {
    if let Some(pattern) = token.after('/') {
        return Ok(DatabaseName::Pattern(regex(pattern)?));
    }
    if token.after('@').is_some() {
        return Err(NO_FILES.to_owned());
    }
    if token.is_keyword("samerole") || token.is_keyword("samegroup") || token.after('+').is_some() {
        return Err(NO_GROUPS.to_owned());
    }
    Ok(if token.is_keyword("all") {
        DatabaseName::All
    } else if token.is_keyword("sameuser") {
        DatabaseName::SameUser
    } else if token.is_keyword("replication") {
        DatabaseName::Replication
    } else {
        DatabaseName::Named(token.text.clone())
    })
}

fn user(token: &Token) -> Result<UserName, String> {
    if let Some(pattern) = token.after('/') {
        return Ok(UserName::Pattern(regex(pattern)?));
    }
    if token.after('@').is_some() {
        return Err(NO_FILES.to_owned());
    }
    if token.after('+').is_some() {
        return Err(NO_GROUPS.to_owned());
    }
    Ok(if token.is_keyword("all") { UserName::All } else { UserName::Named(token.text.clone()) })
}

fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| format!("invalid regular expression {pattern:?}: {error}"))
}

/// The address, and the mask where it stands in a field of its own.
fn from<'a>(fields: &mut impl Iterator<Item = &'a Vec<Token>>) -> Result<From, String> {
    let token = match fields.next().map(Vec::as_slice) {
        Some([token]) => token,
        Some(_) => return Err("multiple values specified for host address".to_owned()),
        None => return Err("end-of-line before IP address specification".to_owned()),
    };
    if token.is_keyword("all") {
        return Ok(From::Anywhere);
    }
    if token.is_keyword("samehost") {
        return Ok(From::SameHost);
    }
    if token.is_keyword("samenet") {
        return Err("samenet is not supported: write the network".to_owned());
    }
    if token.text.contains('/') {
        return Network::parse(&token.text).map(From::Network);
    }
    let Ok(address) = token.text.parse::<IpAddr>() else {
        return Err(format!("host names are not looked up: write an address instead of {:?}", token.text));
    };
    let mask = match fields.next().map(Vec::as_slice) {
        Some([mask]) => mask,
        Some(_) => return Err("multiple values specified for netmask".to_owned()),
        None => return Err("end-of-line before netmask specification".to_owned()),
    };
    let mask = mask.text.parse::<IpAddr>().map_err(|_| format!("invalid IP mask {:?}", mask.text))?;
    let network = Network::with_mask(address, mask).ok_or("IP address and mask do not match")?;
    Ok(From::Network(network))
}

fn method_of(word: &str) -> Result<AuthMethod, String> {
    match word {
        "trust" => Ok(AuthMethod::Trust),
        "scram-sha-256" => Ok(AuthMethod::ScramSha256),
        // In pg_hba.conf md5 means: whatever the role's verifier is made for.
        "md5" => Ok(AuthMethod::Auto),
        "password" => Ok(AuthMethod::Password),
        "cert" => Ok(AuthMethod::Cert),
        other => Err(format!(
            "authentication method {other:?} is not supported; it may be trust, reject, scram-sha-256, md5, password or cert"
        )),
    }
}

fn demand<'a>(
    method: AuthMethod,
    encryption: Option<Encryption>,
    options: impl Iterator<Item = &'a Token>,
) -> Result<Demand, String> {
    let is_tls = encryption == Some(Encryption::Tls);
    if method == AuthMethod::Cert && !is_tls {
        return Err("cert authentication is only supported on hostssl connections".to_owned());
    }
    let mut demand = Demand::of_method(method);
    let mut name = None;
    for option in options {
        let text = &option.text;
        let (key, value) =
            text.split_once('=').ok_or_else(|| format!("authentication option not in name=value format: {text}"))?;
        match (key, value) {
            ("map", value) => demand.map = Some(value.to_owned()),
            ("clientcert", "verify-ca" | "verify-full") if !is_tls => {
                return Err("clientcert can only be configured for hostssl rows".to_owned());
            }
            ("clientcert", "verify-ca") if method == AuthMethod::Cert => {
                return Err("clientcert only accepts \"verify-full\" when using cert authentication".to_owned());
            }
            ("clientcert", "verify-ca") => demand.certificate = CertificateCheck::Present,
            ("clientcert", "verify-full") => demand.certificate = CertificateCheck::Named(CertificateName::Common),
            ("clientname", "CN") => name = Some(CertificateName::Common),
            ("clientname", "DN") => name = Some(CertificateName::Distinguished),
            ("clientname", "SAN") => name = Some(CertificateName::Alternative),
            ("clientcert" | "clientname", _) => return Err(format!("invalid value for {key}: {value:?}")),
            _ => return Err(format!("unrecognized authentication option name: {key:?}")),
        }
    }
    match (&mut demand.certificate, name) {
        (CertificateCheck::Named(asked), Some(name)) => *asked = name,
        (CertificateCheck::Named(_), None) | (_, None) => {}
        (_, Some(_)) => return Err("clientname needs method cert or clientcert=verify-full".to_owned()),
    }
    if demand.map.is_some() && !matches!(demand.certificate, CertificateCheck::Named(_)) {
        return Err("map is only valid for authentication by certificate".to_owned());
    }
    Ok(demand)
}
