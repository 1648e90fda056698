//! The command line: what can be typed, and with which status it ends.
//!
//! `run` is the daemon. Every other command but `check` and `demo` speaks HTTP to it, so that the command line can do
//! nothing that console and API cannot. The address and the token are those of `[admin]` in the same file.

mod check;
mod client;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod interrupted;
mod manual;
mod migration;
mod output;
mod properties;
mod watch;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use self::client::{Client, ClientError};
use self::output::Output;
use crate::admin::command::{Filter, ShutdownWhen};
use crate::app::{Begin, environment};
use crate::config::{self, ConfigError, Stragglers, units};
use crate::demo::DemoArgs;
use crate::migration::view::{MigrationName, MigrationOption, Mode};

/// Files that are tried when none is named.
const DEFAULT_FILES: [&str; 2] = ["pgcutover.toml", "/etc/pgcutover/pgcutover.toml"];

const EXIT_STATUSES: &str = "Exit status:\n  \
    0  done; for `migration cutover`: switched, or with --dry-run: it would have;\n     for `migration verify`: nothing differs\n  \
    1  it was tried and failed, was refused, a cutover was aborted, or a verification found differences\n  \
    2  wrong usage, or a configuration that cannot be used\n  \
    3  the daemon cannot be reached\n  \
    130  Ctrl-C, or another SIGINT, before the answer came";

/// Moves a live PostgreSQL database to another server without the application noticing.
#[derive(Debug, Parser)]
#[command(name = "pgcutover", version, after_help = EXIT_STATUSES, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Args)]
struct Global {
    /// Configuration file [default: ./pgcutover.toml, then /etc/pgcutover/pgcutover.toml, then the environment alone]
    #[arg(short, long, global = true, value_name = "FILE", env = "PGCUTOVER_CONFIG")]
    config: Option<PathBuf>,
    /// How answers are printed
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    output: Format,
    /// HTTP address of the daemon [default: address of the section admin]
    #[arg(long, global = true, value_name = "HOST:PORT")]
    address: Option<String>,
    /// File with the bearer token [default: token of the section admin]
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people: tables, and progress bars on a terminal.
    Text,
    /// The JSON shapes that scripts may rely on.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: proxy, engine, console, HTTP API, metrics
    Run {
        /// Take the listeners over from the process that runs; it serves its sessions to their end
        #[arg(long)]
        takeover: bool,
    },
    /// Validate the configuration and test both connections
    Check,
    /// Show the whole thing on throw-away clusters
    Demo(DemoArgs),
    /// Print the completions of a shell, such as `pgcutover completions bash >/etc/bash_completion.d/pgcutover`
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the manual page, such as `pgcutover man | man -l -`
    Man,
    /// Print the description (OpenAPI) of the HTTP API, and so of what --output json prints
    Openapi,
    /// Create, watch, cut over and cancel migrations
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// Proxies, routes, sessions, blockers
    Status,
    /// What the console's SHOW shows
    Show {
        /// What to show
        #[arg(value_enum)]
        what: Shown,
    },
    /// Read the configuration again; says what waits for a restart
    Reload,
    /// End the session whose server side has this process id
    Kill {
        /// Process id, as `show clients` lists it under remote_pid
        pid: i32,
    },
    /// End the session with this id, as `show clients` lists it
    KillClient {
        /// Its id
        id: u64,
    },
    /// End every session of a database, and hold new ones until `resume`
    KillDatabase {
        /// The database
        database: String,
    },
    /// Hold new transactions; returns when those that run have ended
    Pause {
        /// The database [default: all]
        database: Option<String>,
    },
    /// Let transactions go on that `pause` holds
    Resume {
        /// The database [default: all]
        database: Option<String>,
    },
    /// Refuse new sessions of a database
    Disable {
        /// The database
        database: String,
    },
    /// Let new sessions in again
    Enable {
        /// The database
        database: String,
    },
    /// Mark every server connection for replacement when its session ends
    Reconnect {
        /// The database [default: all]
        database: Option<String>,
    },
    /// Wait until every marked server connection has been closed
    WaitClose {
        /// The database [default: all]
        database: Option<String>,
    },
    /// Change a setting that needs no restart, until the next reload
    Set {
        /// Section and key, such as limits.query_timeout
        key: String,
        /// Its value in the notation of the configuration file
        value: String,
    },
    /// End the daemon in good order
    Shutdown {
        /// Refuse new clients now, and stop when all have gone, or when every transaction has ended
        #[arg(long, value_enum, default_value_t = ShutdownWhen::Now)]
        wait_for: ShutdownWhen,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shown {
    Databases,
    Pools,
    Clients,
    Servers,
    Stats,
    StatsTotals,
    StatsAverages,
    Totals,
    Sockets,
    ActiveSockets,
    Mem,
    State,
    Lists,
    Users,
    Config,
    Members,
    Blockers,
    Events,
    Help,
}

#[derive(Debug, Subcommand)]
enum MigrationCommand {
    /// Begin a migration; returns once it is accepted
    Create(Create),
    /// Migrations, newest first
    List {
        /// Which ones
        #[arg(long, value_enum, default_value_t = Filter::All)]
        filter: Filter,
    },
    /// One migration: state, databases, latency
    Show {
        /// Its name
        name: MigrationName,
        /// Follow it: on a terminal a live view until it has ended or Ctrl-C, elsewhere a line at every change until it is
        /// ready to cut over, finished or failed
        #[arg(long)]
        watch: bool,
    },
    /// Its tables: full load, incremental sync, indexes
    Tables {
        /// Its name
        name: MigrationName,
    },
    /// The answers of its premigration validation
    Validation {
        /// Its name
        name: MigrationName,
        /// Validate anew and show what mends this rule
        #[arg(long, value_name = "RULE")]
        fix: Option<String>,
        /// Run it, where that costs nothing
        #[arg(long, requires = "fix")]
        yes: bool,
    },
    /// What its last verification found
    Verification {
        /// Its name
        name: MigrationName,
    },
    /// Its cutover or rollback: the one that runs, or the last
    CutoverReport {
        /// Its name
        name: MigrationName,
    },
    /// How far it was behind over the last minutes
    History {
        /// Its name
        name: MigrationName,
    },
    /// Switch its databases to the target
    Cutover(Cutover),
    /// Take a cutover back: switch its databases to the source again, with everything written since
    Rollback(Cutover),
    /// Give up the way back: end the stream to the old server and remove what served it, and list what stays
    Complete {
        /// Its name
        name: MigrationName,
    },
    /// Remove what it made on both servers, and list it; the target's data stays
    Cancel {
        /// Its name
        name: MigrationName,
    },
    /// Compare source and target, row by row and definition by definition, while both are live
    Verify {
        /// Its name
        name: MigrationName,
        /// Write the source's rows over those of the target that differ, and compare these tables again
        #[arg(long)]
        repair: bool,
    },
    /// Run a share of the clients' reads on the target too, and compare answers and latencies; alone: what was found
    Shadow {
        /// Its name
        name: MigrationName,
        /// Percent of the transactions, such as 5%
        #[arg(long, value_name = "N%", value_parser = percent)]
        share: Option<u8>,
        /// For how long, such as 10min [default: 10min]
        #[arg(long = "for", value_name = "T", value_parser = units::parse_duration)]
        lasts: Option<Duration>,
        /// End it
        #[arg(long, conflicts_with_all = ["share", "lasts"])]
        stop: bool,
    },
    /// Go on after a failure whose cause is mended
    Retry {
        /// Its name
        name: MigrationName,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// Letters, digits and hyphens, not starting with a hyphen
    name: MigrationName,
    /// Database to migrate; may be repeated [default: every database of the source but its templates]
    #[arg(long = "database", value_name = "D")]
    databases: Vec<String>,
    /// Stream changes until a cutover, or copy once [default: online]
    #[arg(long, value_parser = word::<Mode>, value_name = "online|offline")]
    mode: Option<Mode>,
    /// How much is asked for [default: validate-and-migrate]
    #[arg(long, value_parser = word::<MigrationOption>, value_name = "validate|migrate|validate-and-migrate")]
    option: Option<MigrationOption>,
    /// Empty databases of the target that already hold something
    #[arg(long)]
    overwrite_target: bool,
    /// JSON file in the form of the Azure migration service
    #[arg(long, value_name = "FILE.json")]
    properties: Option<PathBuf>,
    /// Cut over without being told, as soon as everything is ready
    #[arg(long)]
    cutover_when_ready: bool,
    /// Stay until it is ready to cut over, finished or failed
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
struct Cutover {
    /// Its name
    name: MigrationName,
    /// Measure the pause and resume on the source
    #[arg(long)]
    dry_run: bool,
    /// Longest time that transactions may wait, such as 5s [default: that of the section cutover]
    #[arg(long, value_name = "T", value_parser = units::parse_duration)]
    max_pause: Option<Duration>,
    /// Time for running transactions to end, such as 3s [default: that of the section cutover]
    #[arg(long, value_name = "T", value_parser = units::parse_duration)]
    drain_timeout: Option<Duration>,
    /// What happens to transactions that outlast it: give up, or end their sessions
    #[arg(long, value_parser = word::<Stragglers>, value_name = "abort|terminate")]
    stragglers: Option<Stragglers>,
    /// Go past what can cost time or connections and never data: a target that is known to be far behind, much to carry
    /// in the pause, too few connections, owners and grants that the target lacks
    #[arg(long)]
    force: bool,
}

fn percent(text: &str) -> Result<u8, String> {
    let number = text.trim_end_matches('%').parse().ok().filter(|share| (1..=100).contains(share));
    number.ok_or_else(|| "1% to 100% are possible".to_owned())
}

/// One of the words that serde knows for `T`.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    let error = |error: serde_json::Error| error.to_string();
    serde_json::from_value(serde_json::Value::String(text.to_owned())).map_err(error)
}

/// Why a command failed, and so its exit status.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// Status 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Status 2.
    #[error("{0}")]
    Usage(String),
    /// Status 1 or 3.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Status 1.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
    /// Status 130.
    #[error("interrupted: {0}")]
    Interrupted(String),
}

impl CliError {
    fn status(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Usage(_) => 2,
            Self::Client(error) if error.is_unreachable() => 3,
            Self::Client(_) | Self::Failed(_) => 1,
            Self::Interrupted(_) => 130,
        }
    }
}

/// The result of a command that ran: status 0 or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    Bad,
}

/// Reads a command line, program's name included, as the program would, and does nothing of it. What the documentation
/// shows is held against this.
pub fn understands(words: &[&str]) -> Result<(), String> {
    Cli::try_parse_from(words).map(drop).map_err(|error| error.to_string())
}

/// Everything that the process does.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && asks_for_json(std::env::args_os()) => {
            let error = CliError::Usage(error.render().to_string());
            Output::new(Format::Json).error(&error);
            return ExitCode::from(error.status());
        }
        // Help and the version are no errors.
        Err(error) => error.exit(),
    };
    let output = Output::new(cli.global.output);
    match dispatch(cli, &output) {
        Ok(status) => status,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.status())
        }
    }
}

/// Whether the words say so where they could not be understood as a whole.
fn asks_for_json(words: impl Iterator<Item = OsString>) -> bool {
    let words: Vec<OsString> = words.collect();
    let apart = words.windows(2).any(|pair| pair[0] == "--output" && pair[1] == "json");
    apart || words.iter().any(|word| word == "--output=json")
}

fn dispatch(cli: Cli, output: &Output) -> Result<ExitCode, CliError> {
    let global = cli.global;
    let command = match cli.command {
        // Its statuses are its own; see `pgcutover demo --help`.
        Command::Demo(arguments) => return demo(arguments.or_json(global.output == Format::Json)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "pgcutover", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man => return manual(),
        Command::Openapi => {
            output.json(&crate::admin::http::description());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Run { takeover } => return run(&global, if takeover { Begin::Takeover } else { Begin::Fresh }),
        command => command,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| anyhow::anyhow!("cannot start: {error}"))?;
    let verdict = runtime.block_on(async {
        match command {
            Command::Check => check::check(&load(&global)?, output).await,
            other => {
                let (daemon, goes_on) = (client(&global)?, interrupted::what_goes_on(&other));
                let Some(goes_on) = goes_on else { return order(other, &daemon, output).await };
                tokio::select! {
                    verdict = order(other, &daemon, output) => verdict,
                    // Dropping the order hangs up; the daemon takes back what only waits.
                    Ok(()) = tokio::signal::ctrl_c() => Err(CliError::Interrupted(goes_on)),
                }
            }
        }
    })?;
    Ok(if verdict == Verdict::Good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn order(command: Command, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    match command {
        Command::Migration(command) => return migration::run(command, client, output).await,
        Command::Status => output.status(&client.get("/api/v1/status").await?)?,
        Command::Show { what } => {
            let name = what.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            let answer = client.get(&format!("/api/v1/{name}")).await?;
            if what == Shown::Events { output.dated(&answer)? } else { output.rows(&answer)? }
        }
        Command::Reload => output.reloaded(&client.post("/api/v1/reload", None).await?)?,
        Command::Kill { pid } => output.done(&client.delete(&format!("/api/v1/sessions/{pid}")).await?, "ended")?,
        Command::KillClient { id } => output.done(&client.delete(&format!("/api/v1/clients/{id}")).await?, "ended")?,
        Command::KillDatabase { database } => {
            output.done(
                &client.delete(&format!("/api/v1/databases/{}", encoded(&database))).await?,
                "ended and paused",
            )?;
        }
        Command::Pause { database } => on_database(client, output, database, "pause", "paused").await?,
        Command::Resume { database } => on_database(client, output, database, "resume", "resumed").await?,
        Command::Disable { database } => on_database(client, output, Some(database), "disable", "disabled").await?,
        Command::Enable { database } => on_database(client, output, Some(database), "enable", "enabled").await?,
        Command::Reconnect { database } => on_database(client, output, database, "reconnect", "marked").await?,
        Command::WaitClose { database } => on_database(client, output, database, "wait-close", "closed").await?,
        Command::Set { key, value } => {
            let body = serde_json::json!({ "value": value });
            output.done(&client.put(&format!("/api/v1/settings/{}", encoded(&key)), &body).await?, "set")?;
        }
        Command::Shutdown { wait_for } => {
            let body = serde_json::json!({ "wait_for": wait_for });
            output.done(&client.post("/api/v1/shutdown", Some(&body)).await?, "stopping")?;
        }
        Command::Run { .. }
        | Command::Check
        | Command::Demo(_)
        | Command::Completions { .. }
        | Command::Man
        | Command::Openapi => {
            let message = Cli::command().render_usage().to_string();
            return Err(CliError::Usage(message));
        }
    }
    Ok(Verdict::Good)
}

async fn on_database(
    client: &Client,
    output: &Output,
    database: Option<String>,
    order: &str,
    done: &str,
) -> Result<(), CliError> {
    let path = match database {
        Some(name) => format!("/api/v1/databases/{}/{order}", encoded(&name)),
        None => format!("/api/v1/{order}"),
    };
    output.done(&client.post(&path, None).await?, done)
}

/// A part of a path: what is not plain is written as `%xx`.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn run(global: &Global, begin: Begin) -> Result<ExitCode, CliError> {
    let path = config_path(global);
    let config = config::load(path.as_deref(), &environment())?;
    crate::app::run(config, path, begin)?;
    Ok(ExitCode::SUCCESS)
}

fn manual() -> Result<ExitCode, CliError> {
    let text = manual::text(Cli::command()).map_err(|error| anyhow::anyhow!("cannot write the manual: {error}"))?;
    let printed = std::io::Write::write_all(&mut std::io::stdout(), &text);
    printed.map_err(|error| anyhow::anyhow!("cannot print the manual: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

fn demo(arguments: DemoArgs) -> Result<ExitCode, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| anyhow::anyhow!("cannot start: {error}"))?;
    Ok(runtime.block_on(crate::demo::run(arguments)))
}

fn load(global: &Global) -> Result<config::Config, CliError> {
    Ok(config::load(config_path(global).as_deref(), &environment())?)
}

fn client(global: &Global) -> Result<Client, CliError> {
    let admin = config::load_admin(config_path(global).as_deref(), &environment());
    // Both may be named on the command line, and then no file is needed.
    let admin = match (admin, &global.address) {
        (Ok(admin), _) => Some(admin),
        (Err(ConfigError::Read { .. }), Some(_)) if global.config.is_none() => None,
        (Err(error), _) => return Err(error.into()),
    };
    let address = match (&global.address, admin.as_ref().and_then(|admin| admin.address)) {
        (Some(address), _) => address.clone(),
        (None, Some(address)) => reachable(address).to_string(),
        (None, None) => {
            let message = "the daemon's HTTP address is not known: set [admin] address in the configuration file, \
                           name the file with -c, or the address with --address";
            return Err(CliError::Usage(message.to_owned()));
        }
    };
    let token = match &global.token_file {
        Some(path) => Some(read_token(path)?),
        None => admin.and_then(|admin| admin.token),
    };
    Ok(Client::new(address, token))
}

/// A daemon that listens on every address is reached on this machine.
fn reachable(mut address: std::net::SocketAddr) -> std::net::SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    address
}

fn read_token(path: &Path) -> Result<config::Secret, CliError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(config::Secret::new(text.trim_end())),
        Err(error) => Err(CliError::Usage(format!("--token-file {}: {error}", path.display()))),
    }
}

fn config_path(global: &Global) -> Option<PathBuf> {
    global.config.clone().or_else(|| DEFAULT_FILES.map(PathBuf::from).into_iter().find(|path| path.exists()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_says_what_is_expected() {
        for (arguments, expected) in [
            ("migration create -x", "unexpected argument '-x'"),
            ("migration create a_b", "letters, digits and hyphens"),
            ("migration create shop --mode live", "expected `online` or `offline`"),
            ("migration cutover shop --max-pause 5", "write a number with us, ms, s, min, h or d"),
            ("migration cutover shop --stragglers kill", "expected `abort` or `terminate`"),
            ("migration rollback shop --max-pause 5", "write a number with us, ms, s, min, h or d"),
            ("show nothing", "possible values: databases"),
        ] {
            let words = std::iter::once("pgcutover").chain(arguments.split(' '));
            let error = Cli::try_parse_from(words).expect_err(arguments);
            let text = error.to_string();
            assert!(text.contains(expected), "{arguments}: {text}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn options_may_stand_after_the_command() {
        let words = ["pgcutover", "migration", "cutover", "shop", "--dry-run", "-c", "f.toml", "--output", "json"];
        let cli = Cli::try_parse_from(words).expect("valid");
        assert_eq!((cli.global.config, cli.global.output), (Some(PathBuf::from("f.toml")), Format::Json));
    }
}
