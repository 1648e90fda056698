//! Follows a migration: bars on a terminal, a line at every change elsewhere, one JSON object at the end for scripts.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::client::Client;
use super::migration::path;
use super::output::{Output, approximate, typed};
use super::{CliError, Verdict};
use crate::migration::view::{DatabaseView, MigrationName, MigrationView};

const INTERVAL: Duration = Duration::from_millis(500);

/// Follows `name` until it waits for its cutover, has finished or has failed. Bad when it failed.
pub(super) async fn until_settled(name: &MigrationName, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    let mut progress = Progress::new(output);
    loop {
        let answer = client.get(&path(name, "")).await?;
        let migration: MigrationView = typed(&answer)?;
        progress.show(&migration);
        if let Some(verdict) = settled(&migration) {
            progress.end();
            output.migration(&answer)?;
            return Ok(verdict);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn settled(migration: &MigrationView) -> Option<Verdict> {
    match migration.state.as_str() {
        "Succeeded" => Some(Verdict::Good),
        "WaitingForUserAction" if !migration.cutover_when_ready => Some(Verdict::Good),
        "Failed" | "ValidationFailed" | "Cancelled" => Some(Verdict::Bad),
        _ => None,
    }
}

/// What has been shown.
struct Progress<'a> {
    output: &'a Output,
    bars: Option<(MultiProgress, HashMap<String, ProgressBar>)>,
    last: Vec<String>,
}

impl<'a> Progress<'a> {
    fn new(output: &'a Output) -> Self {
        let draws = !output.is_json() && std::io::stderr().is_terminal();
        Self { output, bars: draws.then(|| (MultiProgress::new(), HashMap::new())), last: Vec::new() }
    }

    fn show(&mut self, migration: &MigrationView) {
        let lines = lines(migration);
        match &mut self.bars {
            Some((all, bars)) => migration.databases.iter().for_each(|database| {
                let bar = bars.entry(database.name.clone()).or_insert_with(|| all.add(new_bar(&database.name)));
                bar.set_length(database.tables_total as u64);
                bar.set_position(database.tables_ready as u64);
                bar.set_message(format!("{} {}", migration.substate, latency(database)));
            }),
            None if !self.output.is_json() => {
                lines.iter().filter(|line| !self.last.contains(line)).for_each(|line| self.output.note(line));
            }
            None => {}
        }
        self.last = lines;
    }

    fn end(&self) {
        if let Some((all, _)) = &self.bars {
            // A terminal that cannot be drawn on any more is no reason to fail.
            let _ = all.clear();
        }
    }
}

fn new_bar(database: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>16} [{bar:30}] {pos}/{len} tables  {msg}");
    let bar = ProgressBar::new(0).with_prefix(database.to_owned());
    match style {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

/// What changes rarely enough to be worth a line.
fn lines(migration: &MigrationView) -> Vec<String> {
    let mut lines = vec![format!("{}: {} {}", migration.name, migration.state, migration.substate)];
    for database in &migration.databases {
        let DatabaseView { name, state, tables_ready, tables_total, .. } = database;
        lines.push(format!("{}: {name}: {state}, {tables_ready} of {tables_total} tables", migration.name));
    }
    lines
}

fn latency(database: &DatabaseView) -> String {
    let bytes = database.latency_bytes.map(approximate);
    match (bytes, database.latency_seconds) {
        (Some(bytes), Some(seconds)) => format!("{bytes} ({seconds:.1}s) behind"),
        (Some(bytes), None) => format!("{bytes} behind"),
        (None, Some(seconds)) => format!("{seconds:.1}s behind"),
        (None, None) => String::new(),
    }
}
