//! Prints answers: JSON for scripts, tables for people. Answers go to standard output, everything else to standard error.

use std::borrow::Cow;
use std::io::Write;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::ClientError;
use super::{CliError, Format};
use crate::admin::view::{CutoverView, MigrationEntry, StatusView};
use crate::catalog::streams::Direction;
use crate::config::units::format_size;
use crate::migration::view::{
    CancelReport, DatabaseView, FenceWatchView, FencedWriteView, FixReport, MigrationView, TableView, VerifyReport,
};
use crate::proxy::shadow::ShadowView;

/// Prints.
pub(super) struct Output {
    format: Format,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    pub(super) fn json(&self, value: &Value) {
        self.line(&serde_json::to_string_pretty(value).unwrap_or_default());
    }

    /// One line to standard output. A reader that has gone away is no error of ours.
    pub(super) fn line(&self, text: &str) {
        let _ = writeln!(std::io::stdout(), "{}", printable(text));
    }

    /// Something that is not part of the answer.
    pub(super) fn note(&self, text: &str) {
        let _ = writeln!(std::io::stderr(), "{}", printable(text));
    }

    pub(super) fn error(&self, error: &CliError) {
        let (code, hint) = match error {
            CliError::Client(ClientError::Refused(refusal)) => (refusal.code.as_str(), refusal.hint.clone()),
            CliError::Client(ClientError::Lost { .. }) => {
                ("lost", Some("`pgcutover migration show` and `migration cutover-report` say what became of it".into()))
            }
            CliError::Client(_) => {
                ("unreachable", Some("is `pgcutover run` running, with [admin] address set?".into()))
            }
            CliError::Config(_) => ("configuration", None),
            CliError::Usage(_) => ("usage", None),
            CliError::Failed(_) => ("failed", None),
            CliError::Interrupted(_) => ("interrupted", None),
        };
        if self.is_json() {
            self.note(&json!({"error": {"code": code, "message": error.to_string(), "hint": hint}}).to_string());
            return;
        }
        self.note(&format!("pgcutover: {error}"));
        if let Some(hint) = hint {
            self.note(&format!("hint: {hint}"));
        }
    }

    /// The JSON answer as it is, or the text that `text` makes of its typed form.
    pub(super) fn either<T: DeserializeOwned>(
        &self,
        answer: &Value,
        text: impl FnOnce(&Self, T),
    ) -> Result<(), CliError> {
        if self.is_json() {
            self.json(answer);
        } else {
            text(self, typed(answer)?);
        }
        Ok(())
    }

    pub(super) fn done(&self, answer: &Value, text: &str) -> Result<(), CliError> {
        self.either(answer, |output, _: Value| output.line(text))
    }

    /// A list of flat objects, as the console's SHOW gives it.
    pub(super) fn rows(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, rows: Vec<serde_json::Map<String, Value>>| {
            let Some(first) = rows.first() else { return output.line("(none)") };
            let columns: Vec<&str> = first.keys().map(String::as_str).collect();
            let cells = rows.iter().map(|row| columns.iter().map(|column| plain(row.get(*column))).collect()).collect();
            output.table(&columns, cells);
        })
    }

    /// The same of what has a time, which the JSON has in seconds since 1970.
    pub(super) fn dated(&self, answer: &Value) -> Result<(), CliError> {
        if self.is_json() {
            return self.rows(answer);
        }
        let mut answer = answer.clone();
        for row in answer.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            if let Some(at) = row.remove("at").as_ref().and_then(Value::as_f64) {
                row.insert("time".to_owned(), crate::admin::show::timestamp(at).into());
            }
        }
        self.rows(&answer)
    }

    pub(super) fn reloaded(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, changes: crate::config::Changes| {
            changes.applied.iter().for_each(|key| output.line(&format!("{key}: applied")));
            changes.needs_restart.iter().for_each(|key| output.line(&format!("{key}: needs a restart")));
            if changes.applied.is_empty() && changes.needs_restart.is_empty() {
                output.line("nothing has changed");
            }
        })
    }

    pub(super) fn status(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, status: StatusView| {
            let ready = status.reason.as_ref().map_or("serving".to_owned(), |reason| format!("not serving: {reason}"));
            output.line(&format!("pgcutover {} {ready}", status.version));
            output.line(&format!("source {}  target {}", status.source, status.target));
            if let (None, Some(reason)) = (&status.reason, &status.refused_elsewhere) {
                output.line(&format!("databases that no cutover has covered are refused: {reason}"));
            }
            output.line("");
            let routes = status.routes.iter().map(|route| {
                let server = route.server.map_or("unknown".to_owned(), |server| server.to_string());
                let held = match route.write_delay_ms {
                    _ if route.held => "held".to_owned(),
                    0.0 => String::new(),
                    delay => format!("writes delayed by {delay:.1} ms"),
                };
                let counts = [route.epoch.to_string(), route.sessions.to_string(), route.inside.to_string()];
                let [epoch, sessions, inside] = counts;
                vec![route.database.clone(), server, epoch, sessions, inside, held]
            });
            if status.routes.is_empty() {
                output.line("no client has asked for a database yet");
            } else {
                output.table(&["Database", "Runs on", "Epoch", "Sessions", "In transaction", ""], routes.collect());
            }
            match &status.migrations {
                None => output.line("migrations: cannot be asked now"),
                Some(list) => {
                    list.iter().for_each(|m| output.line(&format!("migration {}: {} {}", m.name, m.state, m.substate)));
                }
            }
            match &status.blockers {
                None => output.line("blockers: cannot be found out now"),
                Some(list) if list.is_empty() => output.line("blockers: none"),
                Some(list) => list.iter().for_each(|blocker| {
                    let pid = blocker.pid.map_or("?".to_owned(), |pid| pid.to_string());
                    output.line(&format!("blocker: {} pid {pid}: {}", blocker.database, blocker.reason));
                    blocker.hint.iter().for_each(|hint| output.line(&format!("    hint: {hint}")));
                }),
            }
        })
    }

    pub(super) fn migrations(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, entries: Vec<MigrationEntry>| {
            let columns = [
                "Name",
                "Status",
                "Migration mode",
                "Migration type",
                "Source server",
                "Source server type",
                "Databases",
                "Duration",
                "Start time",
            ];
            if entries.is_empty() {
                output.line("no migration: `pgcutover migration create` begins one");
                return;
            }
            let row = |entry: &MigrationEntry| {
                let migration = &entry.migration;
                let databases: Vec<&str> = migration.databases.iter().map(|d| d.name.as_str()).collect();
                vec![
                    migration.name.clone(),
                    format!("{} {}", migration.state, migration.substate),
                    word(migration.mode),
                    word(migration.option),
                    migration.source.clone(),
                    entry.source_server_type.clone(),
                    databases.join(","),
                    seconds(migration.duration_seconds),
                    crate::admin::show::timestamp(migration.started_at),
                ]
            };
            output.table(&columns, entries.iter().map(row).collect());
        })
    }

    pub(super) fn migration(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, migration: MigrationView| output.migration_text(&migration))
    }

    pub(super) fn migration_text(&self, migration: &MigrationView) {
        self.line(&format!("{}: {} {}", migration.name, migration.state, migration.substate));
        self.line(&format!(
            "{}, {}, for {}",
            word(migration.mode),
            word(migration.option),
            seconds(migration.duration_seconds)
        ));
        if let Some(error) = &migration.error {
            self.line(&format!("error: {error}"));
            if let Some(hint) = &error.hint {
                self.line(&format!("hint: {hint}"));
            }
        }
        let unknown = || "unknown".to_owned();
        let rows = migration.databases.iter().map(|database| {
            vec![
                database.name.clone(),
                database.state.clone(),
                format!("{}/{}", database.tables_ready, database.tables_total),
                database.latency_bytes.map_or_else(unknown, approximate),
                database.latency_seconds.map_or_else(unknown, |latency| format!("{latency:.1}s")),
                database.pending_changes.map_or_else(unknown, |pending| pending.to_string()),
            ]
        });
        self.table(
            &["Database", "State", "Tables", "Latency bytes", "Latency seconds", "Pending changes"],
            rows.collect(),
        );
        for database in migration.databases.iter().filter(|database| database.wal_warning) {
            let kept = database.retained_wal_bytes.map_or_else(unknown, approximate);
            let most = match (database.retained_wal_limit_bytes, database.safe_wal_bytes) {
                (Some(limit), _) => {
                    format!("at {} (migration.max_retained_wal) the migration is ended", approximate(limit))
                }
                (None, Some(safe)) => format!("after another {} it drops the slot", approximate(safe)),
                (None, None) => "without a limit".to_owned(),
            };
            self.line(&format!("warning: {}: the source keeps {kept} of write-ahead log; {most}", database.name));
        }
        for database in &migration.databases {
            self.fence_text(database);
        }
    }

    /// What was written past a fence, and whether somebody looks.
    fn fence_text(&self, database: &DatabaseView) {
        if let Some(FenceWatchView { server, trouble: Some(trouble), .. }) = &database.fence_watch {
            self.line(&format!(
                "warning: {}: writes on the fenced {server} are not watched for: {trouble}",
                database.name
            ));
        }
        if database.fenced_writes.is_empty() {
            return;
        }
        self.line(&format!(
            "warning: {}: somebody has written past the fence; these rows are on that server alone",
            database.name
        ));
        let row = |write: &FencedWriteView| {
            vec![
                write.server.clone(),
                format!("{}.{}", write.schema, write.table),
                write.kind.clone(),
                write.changes.to_string(),
                crate::admin::show::timestamp(write.first_at),
                crate::admin::show::timestamp(write.last_at),
            ]
        };
        let columns = ["Server", "Table", "Kind", "Changes", "First", "Last"];
        self.table(&columns, database.fenced_writes.iter().map(row).collect());
    }

    pub(super) fn tables(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, tables: Vec<TableView>| {
            let columns = [
                "Table",
                "Full load",
                "Rows",
                "Bytes",
                "Left",
                "Inserts",
                "Updates",
                "Deletes",
                "Pending",
                "Indexes",
                "Verification",
            ];
            let row = |table: &TableView| {
                let (load, sync) = (&table.full_load, &table.incremental_sync);
                vec![
                    format!("{}.{}.{}", table.database, table.schema, table.name),
                    load.state.clone(),
                    load.rows.to_string(),
                    approximate(load.bytes),
                    load.seconds_left.map_or_else(String::new, |left| format!("{left:.0}s")),
                    sync.inserts.to_string(),
                    sync.updates.to_string(),
                    sync.deletes.to_string(),
                    sync.pending.map_or("unknown".to_owned(), |pending| pending.to_string()),
                    table.indexes.clone(),
                    table.verification.clone().unwrap_or_default(),
                ]
            };
            output.table(&columns, tables.iter().map(row).collect());
            for table in &tables {
                if let Some(error) = &table.error {
                    output.line(&format!("{}.{}: {error}", table.schema, table.name));
                }
            }
        })
    }

    /// A cutover that is asked for afterwards; there may have been none.
    pub(super) fn cutover_of(&self, answer: &Value) -> Result<(), CliError> {
        if answer.is_null() && !self.is_json() {
            self.line("there was no cutover since the daemon began");
            return Ok(());
        }
        self.cutover(answer)
    }

    pub(super) fn cutover(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, report: CutoverView| {
            match (report.outcome.as_str(), report.direction) {
                ("switched", Some(Direction::Forward)) => output.line("switched: the databases run on the target"),
                ("switched", Some(Direction::Reverse)) => output.line("switched back: the databases run on the source"),
                ("switched", None) => output.line("switched: the databases run on the other server"),
                ("dry-run", _) if report.reason.is_empty() => {
                    output.line("dry run: it would have switched; everything runs where it ran");
                }
                ("dry-run", _) => output.line(&format!("dry run: it would not have switched: {}", report.reason)),
                ("running", _) => output.line(&format!("running: {}", report.phase.as_deref().unwrap_or_default())),
                (other, _) => output.line(&format!("{other}: {}", report.reason)),
            }
            report.hint.iter().for_each(|hint| output.line(&format!("hint: {hint}")));
            let phases: Vec<String> =
                report.phases_ms.pairs().iter().map(|(phase, length)| format!("{phase} {length} ms")).collect();
            output.line(&format!("transactions waited {} ms ({})", report.pause_ms, phases.join(", ")));
            for step in report.prepare_steps.iter().chain(&report.pause_steps) {
                output.line(&format!("  {}: {} ms", step.step, step.ms));
            }
            if report.sessions_held > 0 {
                let (held, longest) = (report.sessions_held, report.longest_hold_ms);
                output.line(&format!("{held} sessions waited, the longest {longest} ms"));
            }
            report.would.iter().for_each(|one| output.line(&format!("would {one}")));
            output.line(&format!("sessions moved {}, ended {}", report.sessions_moved, report.sessions_ended));
            report.blockers.iter().for_each(|blocker| output.line(&format!("blocker: {blocker}")));
            report.forced.iter().for_each(|passed| output.line(&format!("gone past by --force: {passed}")));
            report.notes.iter().for_each(|note| output.line(&format!("note: {note}")));
        })
    }

    /// A verification that is asked for afterwards; there may have been none.
    pub(super) fn verification(&self, answer: &Value) -> Result<(), CliError> {
        if answer.is_null() && !self.is_json() {
            self.line("nothing was verified yet: `pgcutover migration verify` does it");
            return Ok(());
        }
        self.verified(answer)
    }

    pub(super) fn verified(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, report: VerifyReport| {
            output.line(&format!(
                "compared {} tables with {} rows: {} differences",
                report.tables_compared, report.rows_compared, report.differences
            ));
            if report.repaired > 0 {
                output.line(&format!("repaired {} rows", report.repaired));
            }
            for table in &report.tables {
                let (database, result) = (&table.database, &table.result);
                if let Some(problem) = &result.problem {
                    output.line(&format!("{database}: table {}: not compared: {problem}", result.table()));
                }
                for row in &result.listed {
                    output.line(&format!(
                        "{database}: table {}: {} {}",
                        result.table(),
                        word(row.kind),
                        row.shown_key()
                    ));
                }
                let more = result.differences.saturating_sub(result.listed.len() as u64);
                if more > 0 {
                    output.line(&format!("{database}: table {}: {more} more rows", result.table()));
                }
            }
            for found in &report.definitions {
                for definition in &found.definitions {
                    let (kind, name, difference) = (&definition.kind, &definition.name, &definition.difference);
                    output.line(&format!("{}: {kind} {name}: {difference}", found.database));
                }
            }
        })
    }

    pub(super) fn shadow(&self, answer: &Value) -> Result<(), CliError> {
        if answer.is_null() && !self.is_json() {
            self.line("no reads have run on the target yet: `pgcutover migration shadow NAME --share 5%` begins it");
            return Ok(());
        }
        self.either(answer, |output, view: ShadowView| {
            view.lines().iter().for_each(|[what, name, value]| output.line(&format!("{what}: {name}: {value}")));
        })
    }

    pub(super) fn fixed(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, report: FixReport| {
            match (&report.refused, report.applied) {
                (_, true) => output.line(&format!("{}: run:", report.rule)),
                (Some(why), false) => output.line(&format!("{}: not run for you, because {why}:", report.rule)),
                (None, false) if report.statements.is_empty() => {
                    output.line(&format!("{}: there is nothing to run", report.rule));
                }
                (None, false) => output.line(&format!("{}: with --yes, this is run:", report.rule)),
            }
            report.statements.iter().for_each(|statement| output.line(&format!("    {statement}")));
            report.found.iter().for_each(|rule| super::migration::show(rule, output));
        })
    }

    pub(super) fn cancelled(&self, answer: &Value) -> Result<(), CliError> {
        self.either(answer, |output, report: CancelReport| {
            for object in &report.removed {
                output.line(&format!("removed {} {} on the {}", object.kind, object.name, object.side));
            }
            for left in &report.left {
                let object = &left.object;
                output.line(&format!("left {} {} on the {}: {}", object.kind, object.name, object.side, left.reason));
            }
        })
    }

    /// Columns as wide as their widest cell; the last one is not padded.
    pub(super) fn table(&self, columns: &[&str], rows: Vec<Vec<String>>) {
        let width = |index: usize| {
            let cells = rows.iter().filter_map(|row| row.get(index)).map(|cell| cell.chars().count());
            cells.chain([columns[index].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns.len()).map(width).collect();
        let header: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
        for row in std::iter::once(&header).chain(&rows) {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            self.line(cells.join("  ").trim_end());
        }
    }
}

/// Without what a terminal would obey: names are in it that clients have given themselves.
fn printable(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(obeyed) { Cow::Owned(text.replace(obeyed, "?")) } else { Cow::Borrowed(text) }
}

/// The typed form of an answer; the daemon is of another version when it has none.
pub(super) fn typed<T: DeserializeOwned>(answer: &Value) -> Result<T, CliError> {
    T::deserialize(answer).map_err(|error| {
        CliError::Failed(anyhow::anyhow!("the daemon's answer is not understood, is it of another version? ({error})"))
    })
}

fn plain(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// `20kB (0.1s) behind`; empty: nothing is known.
pub(super) fn latency(database: &DatabaseView) -> String {
    let bytes = database.latency_bytes.map(approximate);
    match (bytes, database.latency_seconds) {
        (Some(bytes), Some(seconds)) => format!("{bytes} ({seconds:.1}s) behind"),
        (Some(bytes), None) => format!("{bytes} behind"),
        (None, Some(seconds)) => format!("{seconds:.1}s behind"),
        (None, None) => String::new(),
    }
}

/// The word that serde writes for a unit variant.
pub(super) fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// `1d 2h`, `3min 4s`, `5s`: the two largest units.
pub(super) fn seconds(seconds: f64) -> String {
    let total = std::time::Duration::try_from_secs_f64(seconds).map_or(0, |duration| duration.as_secs());
    let parts = [(total / 86_400, "d"), (total / 3600 % 24, "h"), (total / 60 % 60, "min"), (total % 60, "s")];
    let shown: Vec<String> = parts
        .iter()
        .skip_while(|(number, _)| *number == 0)
        .take(2)
        .map(|(number, unit)| format!("{number}{unit}"))
        .collect();
    if shown.is_empty() { "0s".to_owned() } else { shown.join(" ") }
}

/// A size to the unit that has at most four digits.
pub(super) fn approximate(bytes: u64) -> String {
    let scale = [40, 30, 20, 10].into_iter().map(|bits| 1_u64 << bits).find(|scale| bytes >= 10 * scale).unwrap_or(1);
    format_size(bytes / scale * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_for_people() {
        for (input, text) in [(0.4, "0s"), (61.0, "1min 1s"), (90_061.0, "1d 1h"), (3600.0, "1h 0min")] {
            assert_eq!(seconds(input), text);
        }
        for (input, text) in [(0, "0B"), (5_000, "5000B"), (20_000, "19kB"), (50 << 20, "50MB")] {
            assert_eq!(approximate(input), text);
        }
    }

    #[test]
    fn no_name_moves_the_cursor() {
        assert_eq!(printable("\u{1b}[2Kshop\r\nä\tb\u{9b}1A"), "?[2Kshop?\nä\tb?1A");
    }
}
