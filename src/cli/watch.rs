//! Follows a migration: a live view on a terminal, a line at every change elsewhere, one JSON object at the end for scripts.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use console::Term;
use serde_json::Value;

use super::client::{Client, ClientError};
use super::frame::{Latencies, frame};
use super::migration::path;
use super::output::{Output, typed};
use super::{CliError, Verdict};
use crate::admin::view::CutoverView;
use crate::migration::view::{DatabaseView, MigrationName, MigrationView, TableView, VerificationView};

const INTERVAL: Duration = Duration::from_millis(500);
/// So long a daemon that was there may be away: it is restarted, or another process takes over.
const AWAY: Duration = Duration::from_secs(120);
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
    let (mut seen, mut away) = (false, None);
    loop {
        let answer = match client.get(&path(name, "")).await {
            Ok(answer) => answer,
            Err(error) if seen && error.may_pass() && away.is_none_or(|since: Instant| since.elapsed() < AWAY) => {
                if away.is_none() {
                    output.note(&format!("{error}; waiting for the daemon"));
                }
                away.get_or_insert_with(Instant::now);
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        (seen, away) = (true, None);
        let migration: MigrationView = typed(&answer)?;
        match &mut progress {
            Progress::Live(screen) => {
                // What cannot be read now is shown the next time.
                if let Ok(tables) = client.get(&path(name, "/tables")).await {
                    screen.draw(&migration, &typed::<Vec<TableView>>(&tables)?);
                }
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

/// Waits for `call`, and shows meanwhile how far the order is that it carries. What is shown may fail: the call's answer
/// is what counts.
pub(super) async fn beside(
    name: &MigrationName,
    client: &Client,
    output: &Output,
    call: impl Future<Output = Result<Value, ClientError>>,
) -> Result<Value, CliError> {
    let mut progress = Progress::new(output);
    let showing = async {
        loop {
            tokio::time::sleep(INTERVAL).await;
            // Whatever cannot be read now is shown the next time.
            let _shown = show_once(name, client, output, &mut progress).await;
        }
    };
    let answer = tokio::select! {
        answer = call => answer,
        // It only reads and draws, so dropping it is safe.
        () = showing => return Err(CliError::Failed(anyhow::anyhow!("the answer was lost"))),
    };
    if let Progress::Live(screen) = &mut progress {
        screen.clear();
    }
    Ok(answer?)
}

async fn show_once(
    name: &MigrationName,
    client: &Client,
    output: &Output,
    progress: &mut Progress,
) -> Result<(), CliError> {
    if matches!(progress, Progress::None) {
        return Ok(());
    }
    let migration: MigrationView = typed(&client.get(&path(name, "")).await?)?;
    let cutover: Option<CutoverView> = typed(&client.get(&path(name, "/cutover")).await?)?;
    let phase = cutover.filter(|one| one.outcome == "running").and_then(|one| one.phase);
    match progress {
        Progress::Live(screen) => {
            let tables: Vec<TableView> = typed(&client.get(&path(name, "/tables")).await?)?;
            screen.draw_with(&migration, &tables, phase.map(|phase| format!("phase         {phase}")));
        }
        Progress::Lines(printed) => printed.print_with(&migration, phase, output),
        Progress::None => {}
    }
    Ok(())
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
        self.draw_with(migration, tables, None);
    }

    /// With a line more below.
    fn draw_with(&mut self, migration: &MigrationView, tables: &[TableView], more: Option<String>) {
        self.latencies.note(migration);
        let size = self.term.size_checked().map_or(COMMON_SIZE, |(rows, columns)| (rows.into(), columns.into()));
        let (rows, columns) = size;
        let mut lines = frame(migration, tables, &self.latencies, (rows - usize::from(more.is_some()), columns));
        lines.extend(more);
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
        self.print_with(migration, None, output);
    }

    /// With the phase of a cutover that runs.
    fn print_with(&mut self, migration: &MigrationView, phase: Option<String>, output: &Output) {
        let lines = lines(migration, phase.as_deref());
        lines.iter().filter(|line| !self.0.contains(line)).for_each(|line| output.note(line));
        self.0 = lines;
    }
}

/// What changes rarely enough to be worth a line.
fn lines(migration: &MigrationView, phase: Option<&str>) -> Vec<String> {
    let mut lines = vec![format!("{}: {} {}", migration.name, migration.state, migration.substate)];
    for database in &migration.databases {
        let DatabaseView { name, state, tables_ready, tables_total, .. } = database;
        lines.push(format!("{}: {name}: {state}, {tables_ready} of {tables_total} tables", migration.name));
    }
    if let Some(VerificationView { tables_compared, tables_total, differences, .. }) = &migration.verification {
        lines.push(format!(
            "{}: verified {tables_compared} of {tables_total} tables, {differences} differences",
            migration.name
        ));
    }
    lines.extend(phase.map(|phase| format!("{}: phase {phase}", migration.name)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verification_and_a_phase_are_lines_of_their_own() {
        let migration: MigrationView = serde_json::from_value(serde_json::json!({
            "name": "m1", "state": "WaitingForUserAction", "substate": "WaitingForCutoverTrigger", "mode": "online",
            "option": "migrate", "cutover_when_ready": false, "databases": [], "error": null, "started_at": 1.0,
            "finished_at": null, "duration_seconds": 2.5, "source": "a:1", "validation": null,
            "verification": {"tables_total": 9, "tables_compared": 4, "bytes_total": 0, "bytes_compared": 0,
                "rows_compared": 70, "differences": 1, "eta_seconds": null},
        }))
        .expect("a view");
        let shown = lines(&migration, Some("drain"));
        let expected = [
            "m1: WaitingForUserAction WaitingForCutoverTrigger",
            "m1: verified 4 of 9 tables, 1 differences",
            "m1: phase drain",
        ];
        assert_eq!(shown, expected);
    }
}
