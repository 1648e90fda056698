//! Builds everything, owns the tasks, and stops them in order.

use std::path::PathBuf;

use crate::config::Config;

/// Runs the daemon until it is told to stop.
pub fn run(_config: Config, _path: Option<PathBuf>) -> anyhow::Result<()> {
    anyhow::bail!("the daemon is not put together yet")
}
