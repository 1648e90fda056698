//! Logs and metrics.
//!
//! Logs go to standard error, as text or as one JSON object a line. Row values, parameters, query text and secrets are
//! never logged, at any level.

pub mod metrics;

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config;

/// Logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error("[telemetry] log: {filter:?} is not a filter")]
    Filter {
        /// What was given.
        filter: String,
        /// Why it is refused.
        source: tracing_subscriber::filter::ParseError,
    },
    /// A second subscriber in one process.
    #[error("logging is set up already")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// The subscriber is gone.
    #[error("the log filter can no longer be changed")]
    Gone(#[from] reload::Error),
}

/// Changes the filter of a running program.
#[derive(Clone, Debug)]
pub struct LogControl(reload::Handle<EnvFilter, Registry>);

/// Sends the program's events to standard error from now on. Once in a process.
pub fn init(telemetry: &config::Telemetry) -> Result<LogControl, TelemetryError> {
    let (filter, handle) = reload::Layer::new(filter(&telemetry.log)?);
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let format = if telemetry.json {
        format.json().flatten_event(true).boxed()
    } else {
        format.with_ansi(std::io::stderr().is_terminal()).boxed()
    };
    tracing_subscriber::registry().with(filter).with(format).try_init()?;
    Ok(LogControl(handle))
}

impl LogControl {
    /// Puts `log` in force.
    pub fn set(&self, log: &str) -> Result<(), TelemetryError> {
        Ok(self.0.reload(filter(log)?)?)
    }

    /// One of a filter that nothing is sent through; it works as long as that is kept.
    #[cfg(test)]
    pub(crate) fn for_tests() -> (Self, impl Sized) {
        let (filter, handle) = reload::Layer::new(EnvFilter::new("off"));
        (Self(handle), filter)
    }
}

fn filter(log: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(log).map_err(|source| TelemetryError::Filter { filter: log.to_owned(), source })
}
