//! Follows a migration: a live view on a terminal, a line at every change elsewhere, one JSON object at the end for scripts.

use std::io::IsTerminal;
use std::time::Duration;

use console::Term;

use super::client::Client;
use super::frame::{Latencies, frame};
use super::migration::path;
use super::output::{Output, typed};
use super::{CliError, Verdict};
use crate::migration::view::{DatabaseView, MigrationName, MigrationView, TableView};

const INTERVAL: Duration = Duration::from_millis(500);
/// Of a terminal that does not tell its size, in rows and columns.
const COMMON_SIZE: (usize, usize) = (24, 80);

/// Follows `name` until it waits for its cutover, has finished or has failed. Bad when it failed.
pub(super) async fn until_settled(name: &MigrationName, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    follow(name, client, output, settled).await
}

/// What `show --watch` does: on a terminal it goes on while the migration waits for its cutover, and through it, until it
/// has ended or Ctrl-C; elsewhere as [`until_settled`].
pub(super) async fn watch(name: &MigrationName, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    let until = if draws(output) { ended } else { settled };
    follow(name, client, output, until).await
}

async fn follow(
    name: &MigrationName,
    client: &Client,
    output: &Output,
    until: fn(&MigrationView) -> Option<Verdict>,
) -> Result<Verdict, CliError> {
    let mut progress = Progress::new(output);
    loop {
        let answer = client.get(&path(name, "")).await?;
        let migration: MigrationView = typed(&answer)?;
        match &mut progress {
            Progress::Live(screen) => {
                let tables: Vec<TableView> = typed(&client.get(&path(name, "/tables")).await?)?;
                screen.draw(&migration, &tables);
            }
            Progress::Lines(printed) => printed.print(&migration, output),
            Progress::None => {}
        }
        if let Some(verdict) = until(&migration) {
            if let Progress::Live(screen) = &mut progress {
                screen.clear();
            }
            output.migration(&answer)?;
            return Ok(verdict);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// It needs somebody, or nothing more will come.
fn settled(migration: &MigrationView) -> Option<Verdict> {
    match migration.state.as_str() {
        "WaitingForUserAction" if !migration.cutover_when_ready => Some(Verdict::Good),
        _ => ended(migration),
    }
}

/// Nothing more will come.
fn ended(migration: &MigrationView) -> Option<Verdict> {
    match migration.state.as_str() {
        "Succeeded" => Some(Verdict::Good),
        "Failed" | "ValidationFailed" | "Cancelled" => Some(Verdict::Bad),
        _ => None,
    }
}

fn draws(output: &Output) -> bool {
    !output.is_json() && std::io::stderr().is_terminal()
}

/// How what happens is shown until the answer is printed.
enum Progress {
    Live(Screen),
    Lines(Lines),
    None,
}

impl Progress {
    fn new(output: &Output) -> Self {
        match (draws(output), output.is_json()) {
            (true, _) => Self::Live(Screen { term: Term::stderr(), drawn: 0, latencies: Latencies::default() }),
            (false, false) => Self::Lines(Lines(Vec::new())),
            (false, true) => Self::None,
        }
    }
}

/// The live view: the same lines again and again, in place.
struct Screen {
    term: Term,
    /// Lines above the cursor that are ours.
    drawn: usize,
    latencies: Latencies,
}

impl Screen {
    fn draw(&mut self, migration: &MigrationView, tables: &[TableView]) {
        self.latencies.note(migration);
        let size = self.term.size_checked().map_or(COMMON_SIZE, |(rows, columns)| (rows.into(), columns.into()));
        let lines = frame(migration, tables, &self.latencies, size);
        // In one piece, each line over the old one and its rest wiped (ECMA-48: CPL, EL, ED), so that nothing flickers.
        let back = if self.drawn == 0 { String::new() } else { format!("\x1b[{}F", self.drawn) };
        let text: String = lines.iter().map(|line| format!("{line}\x1b[K\n")).collect();
        // A terminal that cannot be drawn on any more is no reason to fail.
        let _ = self.term.write_str(&format!("{back}{text}\x1b[J"));
        self.drawn = lines.len();
    }

    fn clear(&mut self) {
        let _ = self.term.clear_last_lines(self.drawn);
        self.drawn = 0;
    }
}

/// What was printed last.
struct Lines(Vec<String>);

impl Lines {
    /// Prints what is new.
    fn print(&mut self, migration: &MigrationView, output: &Output) {
        let lines = lines(migration);
        lines.iter().filter(|line| !self.0.contains(line)).for_each(|line| output.note(line));
        self.0 = lines;
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
