//! The console's language: text to [`Statement`]. Pure.
//!
//! Keywords are not case-sensitive; names are, and need quotes only when they hold spaces or commas.

use std::time::Duration;

use crate::admin::command::{Command, CutoverRequest, Filter, FixRequest, ShadowRequest, ShutdownWhen, VerifyRequest};
use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::pgbouncer;
use crate::admin::service::migration_name;
use crate::config::{Stragglers, nearest, units};
use crate::migration::view::{MigrationName, MigrationOption, MigrationSpec, Mode};

/// One statement of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// An order.
    Command(Command),
    /// Something that drivers send and that has no effect here.
    NoEffect(NoEffect),
}

/// What drivers send without meaning us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoEffect {
    /// `BEGIN`, `START TRANSACTION`
    Begin,
    /// `COMMIT`, `END`
    Commit,
    /// `ROLLBACK`, `ABORT`
    Rollback,
    /// `SET`
    Set,
    /// `RESET`
    Reset,
    /// `DISCARD`
    Discard,
    /// `DEALLOCATE`
    Deallocate,
}

impl NoEffect {
    /// The tag it is answered with.
    pub fn tag(self) -> &'static str {
        match self {
            Self::Begin => "BEGIN",
            Self::Commit => "COMMIT",
            Self::Rollback => "ROLLBACK",
            Self::Set => "SET",
            Self::Reset => "RESET",
            Self::Discard => "DISCARD ALL",
            Self::Deallocate => "DEALLOCATE",
        }
    }
}

/// A word, and whether it was quoted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Word {
    text: String,
    quoted: bool,
}

const VERBS: &str = "SHOW CHECK CREATE CUTOVER CANCEL RETRY RELOAD KILL KILL_CLIENT SHUTDOWN PAUSE RESUME RECONNECT WAIT_CLOSE \
    DISABLE ENABLE SUSPEND ROLLBACK COMPLETE VERIFY SHADOW BEGIN COMMIT SET RESET DISCARD DEALLOCATE";
const SHOWN: &str = "HELP VERSION CONFIG DATABASES POOLS CLIENTS SERVERS STATS STATS_TOTALS STATS_AVERAGES TOTALS LISTS USERS \
    SOCKETS ACTIVE_SOCKETS MEM STATE DNS_HOSTS DNS_ZONES PEERS STATUS MEMBERS BLOCKERS \
    MIGRATIONS MIGRATION TABLES VALIDATION VERIFICATION SHADOW CUTOVER HISTORY EVENTS";
const OPTIONS: [(&str, MigrationOption); 3] = [
    ("validate", MigrationOption::Validate),
    ("migrate", MigrationOption::Migrate),
    ("validate-and-migrate", MigrationOption::ValidateAndMigrate),
];

/// Splits a simple query into its statements, at semicolons outside of quotes.
pub fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut quote) = (Vec::new(), 0, None);
    for (index, byte) in text.bytes().enumerate() {
        match (quote, byte) {
            (None, b'\'' | b'"') => quote = Some(byte),
            (Some(open), close) if open == close => quote = None,
            (None, b';') => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            (None | Some(_), _) => {}
        }
    }
    parts.push(&text[start..]);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

/// Reads one statement.
pub fn parse(text: &str) -> Result<Statement, AdminError> {
    let words = words(text)?;
    let mut rest = Words { words: &words };
    let Some(verb) = rest.keyword() else { return Err(syntax("there is no statement")) };
    if let Some(nothing) = no_effect(&verb, &rest) {
        return Ok(Statement::NoEffect(nothing));
    }
    let command = match verb.as_str() {
        "SHOW" => show(&mut rest)?,
        "CHECK" => Command::Check,
        "CREATE" => create(&mut rest)?,
        "CUTOVER" => cutover(&mut rest, Command::Cutover)?,
        "ROLLBACK" => cutover(&mut rest, Command::Rollback)?,
        "COMPLETE" => Command::Complete(rest.named_migration()?),
        "CANCEL" => Command::Cancel(rest.named_migration()?),
        "RETRY" => Command::Retry(rest.named_migration()?),
        "VERIFY" => verify(&mut rest)?,
        "SHADOW" => shadow(&mut rest)?,
        "FIX" => fix(&mut rest)?,
        "RELOAD" => Command::Reload,
        "SHUTDOWN" => shutdown(&mut rest)?,
        "KILL" => kill(&mut rest)?,
        "KILL_CLIENT" => kill_client(&mut rest)?,
        "PAUSE" => Command::Pause(rest.database()?),
        "RESUME" => Command::Resume(rest.database()?),
        "RECONNECT" => Command::Reconnect(rest.database()?),
        "WAIT_CLOSE" => Command::WaitClose(rest.database()?),
        "DISABLE" => Command::Disable(rest.text("a database")?),
        "ENABLE" => Command::Enable(rest.text("a database")?),
        "SET" => return set(&mut rest),
        "SUSPEND" => {
            let hint = "PAUSE holds new transactions; the README says how a new process takes over without a pause";
            return Err(AdminError::new(ErrorKind::Unsupported, "SUSPEND is not needed here").hint(hint));
        }
        _ => return Err(unknown("command", &verb, VERBS)),
    };
    match rest.words.first() {
        None => Ok(Statement::Command(command)),
        Some(word) => Err(syntax(format!("syntax error at or near {:?}", word.text))),
    }
}

fn no_effect(verb: &str, rest: &Words<'_>) -> Option<NoEffect> {
    match verb {
        "BEGIN" | "START" => Some(NoEffect::Begin),
        "COMMIT" | "END" => Some(NoEffect::Commit),
        // With a name it is an order of ours.
        "ROLLBACK" | "ABORT" if rest.is_of_transaction() => Some(NoEffect::Rollback),
        "RESET" => Some(NoEffect::Reset),
        "DISCARD" => Some(NoEffect::Discard),
        "DEALLOCATE" => Some(NoEffect::Deallocate),
        _ => None,
    }
}

fn show(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let Some(what) = rest.keyword() else { return Ok(Command::Help) };
    Ok(match what.as_str() {
        "HELP" => Command::Help,
        "VERSION" => Command::Version,
        "CONFIG" => Command::Config,
        "DATABASES" => Command::Databases,
        "POOLS" => Command::Pools,
        "CLIENTS" => Command::Clients,
        "SERVERS" => Command::Servers,
        "STATS" => Command::Stats,
        "STATS_TOTALS" => Command::StatsTotals,
        "STATS_AVERAGES" => Command::StatsAverages,
        "TOTALS" => Command::Totals,
        "SOCKETS" => Command::Sockets,
        "ACTIVE_SOCKETS" => Command::ActiveSockets,
        "MEM" => Command::Mem,
        "STATE" => Command::State,
        "DNS_HOSTS" => Command::DnsHosts,
        "DNS_ZONES" => Command::DnsZones,
        "PEERS" => Command::Peers,
        "LISTS" => Command::Lists,
        "USERS" => Command::Users,
        "STATUS" => Command::Status,
        "MEMBERS" => Command::Members,
        "BLOCKERS" => Command::Blockers,
        "MIGRATIONS" if rest.take("ACTIVE") => Command::Migrations(Filter::Active),
        "MIGRATIONS" => Command::Migrations(Filter::All),
        "MIGRATION" => Command::Migration(rest.migration()?),
        "TABLES" => Command::Tables(rest.migration()?),
        "VALIDATION" => Command::Validation(rest.migration()?),
        "VERIFICATION" => Command::Verification(rest.migration()?),
        "SHADOW" => Command::ShadowOf(rest.migration()?),
        "CUTOVER" => Command::CutoverOf(rest.migration()?),
        "HISTORY" => Command::History(rest.migration()?),
        "EVENTS" => Command::Events,
        _ => return Err(unknown("SHOW", &what, SHOWN)),
    })
}

fn create(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    rest.expect("MIGRATION")?;
    let mut spec = MigrationSpec {
        name: rest.migration()?,
        databases: Vec::new(),
        mode: Mode::Online,
        option: MigrationOption::ValidateAndMigrate,
        overwrite_target: false,
        cutover_when_ready: false,
    };
    while let Some(option) = rest.keyword() {
        match option.as_str() {
            "DATABASE" | "DATABASES" => {
                spec.databases.push(rest.text("a database")?);
                while rest.take(",") {
                    spec.databases.push(rest.text("a database")?);
                }
            }
            "MODE" => spec.mode = rest.choice("MODE", &[("online", Mode::Online), ("offline", Mode::Offline)])?,
            "OPTION" => spec.option = rest.choice("OPTION", &OPTIONS)?,
            "OVERWRITE" => {
                rest.expect("TARGET")?;
                spec.overwrite_target = true;
            }
            "CUTOVER" => {
                rest.expect("WHEN")?;
                rest.expect("READY")?;
                spec.cutover_when_ready = true;
            }
            _ => return Err(unknown("option", &option, "DATABASES MODE OPTION OVERWRITE CUTOVER")),
        }
    }
    Ok(Command::Create(spec))
}

fn verify(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let name = rest.named_migration()?;
    match rest.keyword() {
        None => Ok(Command::Verify(name, VerifyRequest { repair: false })),
        Some(word) if word == "REPAIR" => Ok(Command::Verify(name, VerifyRequest { repair: true })),
        Some(word) => Err(unknown("option", &word, "REPAIR")),
    }
}

fn shadow(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let name = rest.named_migration()?;
    let mut request = ShadowRequest::default();
    while let Some(option) = rest.keyword() {
        match option.as_str() {
            "SHARE" => {
                let share = rest.text("a percentage")?;
                let number = share.trim_end_matches('%').parse();
                request.share = number.map_err(|_| syntax(format!("{share:?} is not a percentage")))?;
            }
            "FOR" => request.lasts = Some(rest.duration()?),
            "STOP" => request.stop = true,
            _ => return Err(unknown("option", &option, "SHARE FOR STOP")),
        }
    }
    Ok(Command::Shadow(name, request))
}

fn fix(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let (name, rule) = (rest.named_migration()?, rest.text("a rule")?);
    match rest.keyword() {
        None => Ok(Command::Fix(name, FixRequest { rule, apply: false })),
        Some(word) if word == "APPLY" => Ok(Command::Fix(name, FixRequest { rule, apply: true })),
        Some(word) => Err(unknown("option", &word, "APPLY")),
    }
}

fn cutover(
    rest: &mut Words<'_>,
    order: impl FnOnce(MigrationName, CutoverRequest) -> Command,
) -> Result<Command, AdminError> {
    let name = rest.named_migration()?;
    let mut request = CutoverRequest::default();
    while let Some(option) = rest.keyword() {
        match option.as_str() {
            "DRY" => {
                rest.expect("RUN")?;
                request.dry_run = true;
            }
            "MAX" => {
                rest.expect("PAUSE")?;
                request.max_pause = Some(rest.duration()?);
            }
            "DRAIN" => {
                rest.expect("TIMEOUT")?;
                request.drain_timeout = Some(rest.duration()?);
            }
            "STRAGGLERS" => {
                let choices = [("abort", Stragglers::Abort), ("terminate", Stragglers::Terminate)];
                request.stragglers = Some(rest.choice("STRAGGLERS", &choices)?);
            }
            "FORCE" => request.force = true,
            _ => return Err(unknown("option", &option, "DRY MAX DRAIN STRAGGLERS FORCE")),
        }
    }
    Ok(order(name, request))
}

fn kill(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let (text, quoted) = rest.word("a process id or a database")?;
    match text.parse() {
        Ok(pid) if !quoted => Ok(Command::Kill(pid)),
        Ok(_) | Err(_) => Ok(Command::KillDatabase(text)),
    }
}

/// PgBouncer's `ptr`, which is `session-` and the id here, or the id alone.
fn kill_client(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let text = rest.text("the id of a client")?;
    let id = text.strip_prefix("session-").unwrap_or(&text).parse();
    id.map(Command::KillClient).map_err(|_| syntax(format!("{text:?} is not the id of a client")))
}

fn shutdown(rest: &mut Words<'_>) -> Result<Command, AdminError> {
    let Some(when) = rest.keyword() else { return Ok(Command::Shutdown(ShutdownWhen::Now)) };
    match when.as_str() {
        "WAIT_FOR_CLIENTS" => Ok(Command::Shutdown(ShutdownWhen::Clients)),
        "WAIT_FOR_SERVERS" => Ok(Command::Shutdown(ShutdownWhen::Servers)),
        _ => Err(unknown("SHUTDOWN", &when, "WAIT_FOR_CLIENTS WAIT_FOR_SERVERS")),
    }
}

/// `SET key = value` or `SET key TO value`, where the key is one of ours or PgBouncer's; drivers' settings have no effect.
fn set(rest: &mut Words<'_>) -> Result<Statement, AdminError> {
    let key = rest.text("a setting")?;
    let value: String = match rest.words {
        [equals, value @ ..] if equals.text == "=" || equals.text.eq_ignore_ascii_case("TO") => {
            rest.words = &[];
            value.iter().map(|word| word.text.as_str()).collect()
        }
        _ => String::new(),
    };
    rest.words = &[];
    Ok(match pgbouncer::setting(&key, &value) {
        Some((key, value)) => Statement::Command(Command::Set { key, value }),
        None => Statement::NoEffect(NoEffect::Set),
    })
}

/// The words that are not read yet.
struct Words<'a> {
    words: &'a [Word],
}

impl Words<'_> {
    /// Whether what follows ROLLBACK is the transaction's and not a migration's name.
    fn is_of_transaction(&self) -> bool {
        let known = ["WORK", "TRANSACTION", "AND", "TO"];
        let of = |word: &Word| !word.quoted && known.iter().any(|known| word.text.eq_ignore_ascii_case(known));
        self.words.first().is_none_or(of)
    }

    /// The next word in capitals, if there is one.
    fn keyword(&mut self) -> Option<String> {
        let (word, rest) = self.words.split_first()?;
        self.words = rest;
        Some(word.text.to_ascii_uppercase())
    }

    /// Takes the next word if it is `keyword`.
    fn take(&mut self, keyword: &str) -> bool {
        let found = self.words.first().is_some_and(|word| !word.quoted && word.text.eq_ignore_ascii_case(keyword));
        if found {
            self.words = &self.words[1..];
        }
        found
    }

    fn expect(&mut self, keyword: &str) -> Result<(), AdminError> {
        if self.take(keyword) {
            return Ok(());
        }
        let found = self.words.first().map_or("the end".to_owned(), |word| format!("{:?}", word.text));
        Err(syntax(format!("expected {keyword}, found {found}")))
    }

    fn text(&mut self, what: &str) -> Result<String, AdminError> {
        self.word(what).map(|(text, _quoted)| text)
    }

    /// A word, and whether it was quoted.
    fn word(&mut self, what: &str) -> Result<(String, bool), AdminError> {
        let (word, rest) = self.words.split_first().ok_or_else(|| syntax(format!("{what} is missing")))?;
        self.words = rest;
        Ok((word.text.clone(), word.quoted))
    }

    /// A database, where one may be named.
    fn database(&mut self) -> Result<Option<String>, AdminError> {
        if self.words.is_empty() { Ok(None) } else { self.text("a database").map(Some) }
    }

    fn migration(&mut self) -> Result<MigrationName, AdminError> {
        migration_name(&self.text("the name of a migration")?)
    }

    /// `name` or `MIGRATION name`.
    fn named_migration(&mut self) -> Result<MigrationName, AdminError> {
        if self.words.len() > 1 {
            self.take("MIGRATION");
        }
        self.migration()
    }

    fn duration(&mut self) -> Result<Duration, AdminError> {
        units::parse_duration(&self.text("a duration")?).map_err(syntax)
    }

    fn choice<T: Copy>(&mut self, what: &str, choices: &[(&str, T)]) -> Result<T, AdminError> {
        let text = self.text(&format!("the value of {what}"))?;
        let found = choices.iter().find(|(word, _)| text.eq_ignore_ascii_case(word));
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        found.map(|(_, value)| *value).ok_or_else(|| unknown(what, &text, &words.join(" ")))
    }
}

fn words(text: &str) -> Result<Vec<Word>, AdminError> {
    let mut words = Vec::new();
    let mut chars = text.trim().trim_end_matches(';').chars().peekable();
    while let Some(&next) = chars.peek() {
        match next {
            c if c.is_whitespace() => {
                chars.next();
            }
            ',' | '=' => {
                chars.next();
                words.push(Word { text: next.to_string(), quoted: false });
            }
            '\'' | '"' => {
                chars.next();
                words.push(Word { text: quoted(&mut chars, next)?, quoted: true });
            }
            _ => {
                let mut text = String::new();
                while let Some(c) = chars.next_if(|c| !c.is_whitespace() && !matches!(c, ',' | '=' | '\'' | '"')) {
                    text.push(c);
                }
                words.push(Word { text, quoted: false });
            }
        }
    }
    Ok(words)
}

/// What stands before the closing quote; a doubled quote is one.
fn quoted(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, quote: char) -> Result<String, AdminError> {
    let mut text = String::new();
    while let Some(c) = chars.next() {
        if c != quote {
            text.push(c);
        } else if chars.next_if_eq(&quote).is_some() {
            text.push(quote);
        } else {
            return Ok(text);
        }
    }
    Err(syntax("unterminated quote"))
}

fn syntax(message: impl Into<String>) -> AdminError {
    AdminError::new(ErrorKind::Invalid, message).hint("SHOW HELP lists the commands")
}

/// `known`: words separated by spaces.
fn unknown(what: &str, word: &str, known: &str) -> AdminError {
    let known: Vec<&str> = known.split_whitespace().collect();
    let near = nearest(&word.to_ascii_uppercase(), &known).or_else(|| nearest(word, &known));
    let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
    syntax(format!("unknown {what} {word:?}{near}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> MigrationName {
        text.parse().expect("valid")
    }

    fn command(text: &str) -> Command {
        match parse(text) {
            Ok(Statement::Command(command)) => command,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn orders_are_read() {
        assert_eq!(command("show help"), Command::Help);
        assert_eq!(command(" SHOW Migrations ; "), Command::Migrations(Filter::All));
        assert_eq!(command("SHOW MIGRATIONS ACTIVE"), Command::Migrations(Filter::Active));
        assert_eq!(command("SHOW TABLES shop-1"), Command::Tables(name("shop-1")));
        assert_eq!(command("SHOW CUTOVER 'shop'"), Command::CutoverOf(name("shop")));
        assert_eq!(command("show verification shop"), Command::Verification(name("shop")));
        assert_eq!(command("show shadow shop"), Command::ShadowOf(name("shop")));
        let request = ShadowRequest { share: 7, lasts: Some(Duration::from_secs(60)), stop: false };
        assert_eq!(command("shadow shop share 7% for 1min"), Command::Shadow(name("shop"), request));
        let stop = ShadowRequest { stop: true, ..ShadowRequest::default() };
        assert_eq!(command("shadow shop stop"), Command::Shadow(name("shop"), stop));
        assert_eq!(command("CUTOVER shop"), Command::Cutover(name("shop"), CutoverRequest::default()));
        assert_eq!(command("rollback shop"), Command::Rollback(name("shop"), CutoverRequest::default()));
        assert_eq!(command("COMPLETE shop"), Command::Complete(name("shop")));
        assert_eq!(command("CUTOVER MIGRATION migration"), command("cutover migration"));
        let request = CutoverRequest {
            dry_run: true,
            max_pause: Some(Duration::from_secs(2)),
            drain_timeout: Some(Duration::from_millis(500)),
            stragglers: Some(Stragglers::Terminate),
            force: true,
        };
        let text = "CUTOVER shop DRY RUN MAX PAUSE '2s' DRAIN TIMEOUT 500ms STRAGGLERS terminate FORCE";
        assert_eq!(command(text), Command::Cutover(name("shop"), request));
        assert_eq!(command("KILL 42"), Command::Kill(42));
        assert_eq!(command("KILL shop"), Command::KillDatabase("shop".to_owned()));
        assert_eq!(command("KILL \"42\""), Command::KillDatabase("42".to_owned()));
        assert_eq!(command("KILL_CLIENT session-7"), Command::KillClient(7));
        assert_eq!(command("PAUSE"), Command::Pause(None));
        assert_eq!(command("pause Shop;"), Command::Pause(Some("Shop".to_owned())));
        assert_eq!(command("RESUME shop"), Command::Resume(Some("shop".to_owned())));
        assert_eq!(command("SHUTDOWN WAIT_FOR_CLIENTS"), Command::Shutdown(ShutdownWhen::Clients));
        let set = |value: &str| Command::Set { key: "limits.query_timeout".to_owned(), value: value.to_owned() };
        assert_eq!(command("SET query_timeout = 2"), set("2000000us"));
        assert_eq!(command("SET limits.query_timeout TO '2s'"), set("2s"));
        let spec = MigrationSpec {
            name: name("shop"),
            databases: vec!["shop".to_owned(), "a, \"b\"".to_owned()],
            mode: Mode::Offline,
            option: MigrationOption::Migrate,
            overwrite_target: true,
            cutover_when_ready: true,
        };
        let text = "CREATE MIGRATION shop DATABASES shop, \"a, \"\"b\"\"\" MODE offline OPTION migrate \
                    OVERWRITE TARGET CUTOVER WHEN READY";
        assert_eq!(command(text), Command::Create(spec));
    }

    #[test]
    fn what_drivers_send_has_no_effect() {
        let sent = "BEGIN|begin isolation level serializable|SET extra_float_digits = 3|ROLLBACK|ROLLBACK WORK|COMMIT|\
                    DISCARD ALL|RESET ALL|SET client_encoding TO 'UTF8'";
        for text in sent.split('|') {
            assert!(matches!(parse(text), Ok(Statement::NoEffect(_))), "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, message) in [
            ("SHOW MIGRATONS", "unknown SHOW \"MIGRATONS\"; did you mean MIGRATIONS?"),
            ("SELECT 1", "unknown command \"SELECT\""),
            ("CUTOVR shop", "unknown command \"CUTOVR\"; did you mean CUTOVER?"),
            ("CUTOVER", "the name of a migration is missing"),
            ("CUTOVER shop DRY", "expected RUN, found the end"),
            ("CUTOVER shop MAX PAUSE 5", "\"5\" is not a duration"),
            ("SHOW HELP me", "syntax error at or near \"me\""),
            ("SHOW TABLES -x", "\"-x\" is not a migration name"),
            ("KILL", "a process id or a database is missing"),
            ("DISABLE", "a database is missing"),
            ("KILL_CLIENT me", "\"me\" is not the id of a client"),
            ("SHUTDOWN NOW", "unknown SHUTDOWN \"NOW\""),
            ("SHOW 'HELP", "unterminated quote"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.message.starts_with(message), "{text}: {error}");
            assert_eq!(error.kind, ErrorKind::Invalid);
        }
    }

    #[test]
    fn statements_are_split_outside_of_quotes() {
        assert_eq!(split("SHOW HELP; SHOW TABLES 'a;b';;"), ["SHOW HELP", " SHOW TABLES 'a;b'"]);
    }
}
