//! Who may come from where, and what is asked of them: rules in the form of pg_hba.conf (PostgreSQL documentation,
//! "The pg_hba.conf File"; PgBouncer's `auth_hba_file`).
//!
//! The first rule that fits decides; where none fits, the client is refused. Whether a rule fits depends on nothing but
//! the [`Client`] it is held against: no socket, no clock, no look-up of names. What PostgreSQL knows and this does not
//! (groups of roles, host names, `samenet`, included files, GSSAPI and other outside methods) is an error when the file
//! is read, never a rule that silently fits nobody.

mod lines;
mod rule;

use std::net::IpAddr;

pub(in crate::proxy) use lines::{Token, read_lines};

use crate::config::{AuthMethod, Network};

/// Who wants to come in, as far as it is known before any proof.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct Client<'a> {
    /// None: over a Unix socket.
    pub(in crate::proxy) address: Option<IpAddr>,
    /// Whether the client's address is one of this machine, as far as the socket tells.
    pub(in crate::proxy) same_host: bool,
    /// Over TLS.
    pub(in crate::proxy) tls: bool,
    /// Role.
    pub(in crate::proxy) user: &'a str,
    /// Database.
    pub(in crate::proxy) database: &'a str,
    /// Asks for a walsender that is of no database.
    pub(in crate::proxy) physical_replication: bool,
}

/// Which name of a client's certificate must be the role's, or be mapped to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum CertificateName {
    /// CN of the subject.
    Common,
    /// The whole subject.
    Distinguished,
    /// Any DNS name, e-mail address or URI of subjectAltName. Not in PostgreSQL.
    Alternative,
}

/// What a certificate is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum CertificateCheck {
    /// Nothing.
    None,
    /// It must be there.
    Present,
    /// It must be there and carry the role's name.
    Named(CertificateName),
}

/// What a client that may come in has to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::proxy) struct Demand {
    /// How it proves that it is the role.
    pub(in crate::proxy) method: AuthMethod,
    /// What its certificate must be.
    pub(in crate::proxy) certificate: CertificateCheck,
    /// Name of the map from the certificate's name to roles; none: the two must be equal.
    pub(in crate::proxy) map: Option<String>,
}

impl Demand {
    /// What `auth.method` means where there are no rules.
    pub(in crate::proxy) fn of_method(method: AuthMethod) -> Self {
        let certificate = match method {
            AuthMethod::Cert => CertificateCheck::Named(CertificateName::Common),
            AuthMethod::Auto | AuthMethod::ScramSha256 | AuthMethod::Md5 | AuthMethod::Password | AuthMethod::Trust => {
                CertificateCheck::None
            }
        };
        Self { method, certificate, map: None }
    }
}

/// What the rules say of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Verdict<'a> {
    /// It may come in with this.
    Ask(&'a Demand),
    /// A rule turns it away.
    Rejected,
    /// No rule is about it.
    NoEntry,
}

/// The rules in force.
#[derive(Debug)]
pub(in crate::proxy) struct Rules {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    /// Counted from 1.
    line: usize,
    connection: Connection,
    databases: Vec<DatabaseName>,
    users: Vec<UserName>,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Ask(Demand),
    Reject,
}

/// Type and address of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Connection {
    Local,
    Host { encryption: Encryption, from: From },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encryption {
    Any,
    Tls,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Anywhere,
    SameHost,
    Network(Network),
}

#[derive(Debug)]
enum DatabaseName {
    All,
    SameUser,
    /// Physical replication, which is of no database.
    Replication,
    Named(String),
    Pattern(regex_lite::Regex),
}

#[derive(Debug)]
enum UserName {
    All,
    Named(String),
    Pattern(regex_lite::Regex),
}

impl Rules {
    /// One rule for everybody.
    pub(in crate::proxy) fn everybody(method: AuthMethod) -> Self {
        let outcome = || Outcome::Ask(Demand::of_method(method));
        let anywhere = Connection::Host { encryption: Encryption::Any, from: From::Anywhere };
        let rule = |connection| Rule {
            line: 0,
            connection,
            databases: vec![DatabaseName::All, DatabaseName::Replication],
            users: vec![UserName::All],
            outcome: outcome(),
        };
        Self { rules: vec![rule(Connection::Local), rule(anywhere)] }
    }

    /// Reads a file. Every line that cannot be used is named with its number.
    pub(in crate::proxy) fn parse(text: &str) -> Result<Self, Vec<(usize, String)>> {
        let (mut rules, mut problems) = (Vec::new(), Vec::new());
        for line in read_lines(text) {
            let number = line.number;
            match line.fields.and_then(|fields| rule::read(number, &fields)) {
                Ok(rule) => rules.push(rule),
                Err(message) => problems.push((number, message)),
            }
        }
        if problems.is_empty() { Ok(Self { rules }) } else { Err(problems) }
    }

    /// What the first rule that fits says.
    pub(in crate::proxy) fn decide(&self, client: &Client<'_>) -> Verdict<'_> {
        match self.rules.iter().find(|rule| rule.fits(client)).map(|rule| &rule.outcome) {
            Some(Outcome::Ask(demand)) => Verdict::Ask(demand),
            Some(Outcome::Reject) => Verdict::Rejected,
            None => Verdict::NoEntry,
        }
    }

    /// Whether any rule is about clients on this machine.
    pub(in crate::proxy) fn ask_for_same_host(&self) -> bool {
        let is_local = |rule: &Rule| matches!(rule.connection, Connection::Host { from: From::SameHost, .. });
        self.rules.iter().any(is_local)
    }

    /// Every demand, with its line.
    pub(in crate::proxy) fn demands(&self) -> impl Iterator<Item = (usize, &Demand)> {
        self.rules.iter().filter_map(|rule| match &rule.outcome {
            Outcome::Ask(demand) => Some((rule.line, demand)),
            Outcome::Reject => None,
        })
    }
}

impl Rule {
    fn fits(&self, client: &Client<'_>) -> bool {
        let by_connection = match (&self.connection, client.address) {
            (Connection::Local, None) => true,
            (Connection::Host { encryption, from }, Some(address)) => {
                let by_encryption = match encryption {
                    Encryption::Any => true,
                    Encryption::Tls => client.tls,
                    Encryption::None => !client.tls,
                };
                by_encryption
                    && match from {
                        From::Anywhere => true,
                        From::SameHost => client.same_host,
                        From::Network(network) => network.contains(address),
                    }
            }
            (Connection::Local, Some(_)) | (Connection::Host { .. }, None) => false,
        };
        by_connection
            && self.databases.iter().any(|name| name.fits(client))
            && self.users.iter().any(|name| name.fits(client.user))
    }
}

impl DatabaseName {
    fn fits(&self, client: &Client<'_>) -> bool {
        // As in PostgreSQL: `all` is about databases, and a physical walsender is of none.
        match self {
            Self::Replication => client.physical_replication,
            _ if client.physical_replication => false,
            Self::All => true,
            Self::SameUser => client.database == client.user,
            Self::Named(name) => client.database == name,
            Self::Pattern(pattern) => pattern.is_match(client.database),
        }
    }
}

impl UserName {
    fn fits(&self, user: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(name) => user == name,
            Self::Pattern(pattern) => pattern.is_match(user),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn client<'a>(user: &'a str, database: &'a str, address: &str, tls: bool) -> Client<'a> {
        let address = (address != "local").then(|| address.parse().expect("an address"));
        Client { address, same_host: false, tls, user, database, physical_replication: false }
    }

    /// `reject`, `none`, or the method.
    fn word(verdict: Verdict<'_>) -> &'static str {
        match verdict {
            Verdict::Ask(demand) => demand.method.as_str(),
            Verdict::Rejected => "reject",
            Verdict::NoEntry => "none",
        }
    }

    const FILE: &str = r#"
# TYPE    DATABASE        USER            ADDRESS                 METHOD
local     all             postgres                                trust
local     all             all                                     scram-sha-256
hostssl   payroll         "Ann B",carl    0.0.0.0/0               cert
host      payroll         all             all                     reject
host      sameuser        all             10.0.0.0 255.0.0.0      md5
hostnossl "all", test     all             192.168.1.0/24          password
host      "replication"   all             192.168.1.0/24          md5
host      replication     repl            ::1/128                 trust
host      all             /^svc_          2001:db8::/32           scram-sha-256
host      "sameuser"      "all"           samehost                trust
"#;

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = Rules::parse(FILE).expect("valid");
        let table = [
            ("postgres", "x", "local", false, "trust"),
            ("Postgres", "x", "local", false, "scram-sha-256"),
            ("Ann B", "payroll", "1.2.3.4", true, "cert"),
            ("carl", "payroll", "1.2.3.4", true, "cert"),
            ("Ann B", "payroll", "1.2.3.4", false, "reject"),
            ("ann b", "payroll", "1.2.3.4", true, "reject"),
            ("Ann B", "payroll", "::1", true, "reject"),
            ("dora", "dora", "10.9.9.9", false, "auto"),
            ("dora", "dora", "::ffff:10.9.9.9", false, "auto"),
            ("dora", "other", "10.9.9.9", false, "none"),
            ("dora", "dora", "11.9.9.9", false, "none"),
            ("dora", "all", "192.168.1.7", false, "password"),
            ("dora", "test", "192.168.1.7", false, "password"),
            ("dora", "test", "192.168.1.7", true, "none"),
            ("dora", "test2", "192.168.1.7", false, "none"),
            ("dora", "replication", "192.168.1.7", false, "auto"),
            ("svc_a", "shop", "2001:db8::1", false, "scram-sha-256"),
            ("a_svc_", "shop", "2001:db8::1", false, "none"),
            ("repl", "shop", "::1", false, "none"),
        ];
        for (user, database, address, tls, expected) in table {
            let found = word(rules.decide(&client(user, database, address, tls)));
            assert_eq!(found, expected, "{user} to {database} from {address}, tls {tls}");
        }
    }

    #[test]
    fn keywords_in_quotes_are_names() {
        let rules = Rules::parse(FILE).expect("valid");
        let here = |user, database| Client { same_host: true, ..client(user, database, "127.0.0.1", false) };
        assert_eq!(word(rules.decide(&here("all", "sameuser"))), "trust");
        assert_eq!(word(rules.decide(&here("ann", "ann"))), "none");
        assert_eq!(word(rules.decide(&Client { same_host: false, ..here("all", "sameuser") })), "none");
    }

    #[test]
    fn physical_replication_has_rules_of_its_own() {
        let rules = Rules::parse(FILE).expect("valid");
        let walsender = |user, address| Client { physical_replication: true, ..client(user, "", address, false) };
        assert_eq!(word(rules.decide(&walsender("repl", "::1"))), "trust");
        assert_eq!(word(rules.decide(&walsender("repl", "2001:db8::1"))), "none");
        assert_eq!(word(rules.decide(&walsender("postgres", "local"))), "none", "all is about databases");
        assert_eq!(word(rules.decide(&walsender("x", "192.168.1.7"))), "none", "a database of that name");
        let everybody = Rules::everybody(AuthMethod::Trust);
        assert_eq!(word(everybody.decide(&walsender("repl", "::1"))), "trust");
        assert_eq!(word(everybody.decide(&client("a", "b", "local", false))), "trust");
    }

    #[test]
    fn options_say_what_a_certificate_must_be() {
        let demand = |line: &str| match Rules::parse(line).expect("valid").rules.remove(0).outcome {
            Outcome::Ask(demand) => demand,
            Outcome::Reject => panic!("asks"),
        };
        let cert = |certificate, map: Option<&str>| Demand {
            method: AuthMethod::Cert,
            certificate,
            map: map.map(str::to_owned),
        };
        let named = CertificateCheck::Named;
        let line = "hostssl all all all cert";
        assert_eq!(demand(line), cert(named(CertificateName::Common), None));
        assert_eq!(
            demand(&format!("{line} map=m clientname=DN")),
            cert(named(CertificateName::Distinguished), Some("m"))
        );
        assert_eq!(
            demand(&format!("{line} clientcert=verify-full clientname=SAN")),
            cert(named(CertificateName::Alternative), None)
        );
        let scram = |certificate| Demand { method: AuthMethod::ScramSha256, certificate, map: None };
        let line = "hostssl all all all scram-sha-256";
        assert_eq!(demand(&format!("{line} clientcert=verify-ca")), scram(CertificateCheck::Present));
        assert_eq!(demand(&format!("{line} \"clientcert=verify-full\"")), scram(named(CertificateName::Common)));
    }

    #[test]
    fn what_cannot_be_used_is_named_with_its_line() {
        let problem = |line: &str| {
            let mut problems = Rules::parse(&format!("\n{line}\n")).expect_err(line);
            assert_eq!(problems.len(), 1, "{problems:?}");
            let (number, message) = problems.remove(0);
            assert_eq!(number, 2, "{line}");
            message
        };
        for (line, expected) in [
            ("hosts all all all md5", "invalid connection type \"hosts\""),
            ("hostgssenc all all all md5", "GSSAPI encryption is not spoken here"),
            ("local,host all all md5", "multiple values specified for connection type"),
            ("local", "end-of-line before database specification"),
            ("local all", "end-of-line before role specification"),
            ("local all all", "end-of-line before authentication method"),
            ("host all all", "end-of-line before IP address specification"),
            ("host all all 10.0.0.1", "end-of-line before netmask specification"),
            ("host all all 10.0.0.1 md5", "invalid IP mask \"md5\""),
            ("host all all 10.0.0.1 255.0.255.0 md5", "IP address and mask do not match"),
            ("host all all 10.0.0.0/33 md5", "\"10.0.0.0/33\" is not an address"),
            ("host all all example.org md5", "host names are not looked up"),
            ("host all all samenet md5", "samenet is not supported"),
            ("host all +admins all md5", "groups of roles are not known here"),
            ("host samerole all all md5", "groups of roles are not known here"),
            ("host @list all all md5", "included files are not read"),
            ("include other.conf", "included files are not read"),
            ("host all /( all md5", "invalid regular expression \"(\""),
            ("host all all all ldap", "authentication method \"ldap\" is not supported"),
            ("local all all cert", "cert authentication is only supported on hostssl connections"),
            ("host all all all scram-sha-256 clientcert=verify-ca", "clientcert can only be configured for hostssl"),
            ("hostssl all all all cert clientcert=verify-ca", "clientcert only accepts \"verify-full\""),
            ("hostssl all all all md5 clientcert=1", "invalid value for clientcert: \"1\""),
            ("hostssl all all all cert clientname=X", "invalid value for clientname: \"X\""),
            ("hostssl all all all md5 map=m", "map is only valid for authentication by certificate"),
            ("host all all all md5 map", "authentication option not in name=value format: map"),
            ("host all all all md5 radius=x", "unrecognized authentication option name: \"radius\""),
            ("host all \"ann all md5", "unterminated quoted string"),
        ] {
            let found = problem(line);
            assert!(found.starts_with(expected), "{line}: expected {expected:?}, found {found:?}");
        }
        let problems = Rules::parse("x\nlocal all all trust\ny\n").expect_err("two");
        assert_eq!(problems.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 3]);
    }

    const WORDS: &[&str] = &[
        "local",
        "host",
        "hostssl",
        "all",
        "sameuser",
        "replication",
        "\"",
        ",",
        " ",
        "\t",
        "/^a",
        "/(",
        "10.0.0.0/8",
        "10.0.0.1",
        "255.0.0.0",
        "::1/128",
        "samehost",
        "trust",
        "md5",
        "cert",
        "reject",
        "map=",
        "clientcert=",
        "=",
        "\\",
        "verify-full",
        "clientname=DN",
        "#",
        "\n",
        "@",
        "+",
        "ß",
    ];

    proptest! {
        #[test]
        fn any_line_is_read_without_a_panic(words in prop::collection::vec(prop::sample::select(WORDS), 0..12), text: String) {
            let _ = Rules::parse(&words.join(" "));
            let _ = Rules::parse(&words.concat());
            let _ = Rules::parse(&text);
        }
    }
}
