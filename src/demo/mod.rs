//! The demo: two throw-away clusters, an application that never notices, and a report.
//!
//! Everything is the real thing: the daemon runs as a process of its own, is ordered about by the commands that users
//! have, and the application knows one connection string and nothing else. What is said at the end is counted on the
//! two servers, never taken from the daemon, but for the length of the pause and its phases.
//!
//! ```text
//! clusters → shop → daemon → application starts → migration create → ready → cutover → application goes on
//!          → direct writes on the source are tried → application ends → both servers are compared → report
//! ```

pub mod cluster;
pub mod compare;
mod daemon;
mod inspection;
mod installations;
pub mod ledger;
mod progress;
mod report;
mod run;
pub mod shop;
pub mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

pub use run::DemoError;

/// `pgcutover demo`
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// Leave the servers, the daemon and their files for a look; says how to end them
    #[arg(long)]
    pub keep: bool,
    /// Size of the database; 1 is about 400 000 rows
    #[arg(long, default_value_t = 1.0, value_parser = scale)]
    pub scale: f64,
    /// Connections of the application
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(6..=150))]
    pub clients: u16,
    /// Directory with postgres and initdb for the source; default: the oldest installed
    #[arg(long, value_name = "DIR")]
    pub source_bindir: Option<PathBuf>,
    /// The same for the target; default: the newest installed
    #[arg(long, value_name = "DIR")]
    pub target_bindir: Option<PathBuf>,
    /// Print the report as JSON, as --output json does
    #[arg(long)]
    pub json: bool,
}

impl DemoArgs {
    /// With the report as JSON where `--output json` asks for it, as it does of every command.
    #[must_use]
    pub fn or_json(mut self, asked: bool) -> Self {
        self.json |= asked;
        self
    }
}

fn scale(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(scale) if (0.001..=1000.0).contains(&scale) => Ok(scale),
        _ => Err("a number from 0.001 to 1000".to_owned()),
    }
}

/// Runs the demo. Exit status: 0 clean, 1 harm was found, 2 it could not be run, 130 interrupted.
pub async fn run(args: DemoArgs) -> ExitCode {
    // Dropping the run stops the daemon and the servers and removes their files.
    let result = tokio::select! {
        result = run::run(&args) => result,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("demo: interrupted; the servers are stopped and removed");
            return ExitCode::from(130);
        }
    };
    match result {
        Ok(report) => {
            if args.json {
                match serde_json::to_string(&report) {
                    Ok(text) => println!("{text}"),
                    Err(error) => eprintln!("demo: the report cannot be printed: {error}"),
                }
            } else {
                println!("\n{report}");
                println!("{}", if report.is_clean() { "The application did not notice." } else { "HARM WAS DONE." });
            }
            if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(1) }
        }
        Err(error) => {
            eprintln!("demo: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(source) = cause {
                eprintln!("demo:   because: {source}");
                cause = source.source();
            }
            ExitCode::from(2)
        }
    }
}
