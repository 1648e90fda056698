//! What the live view of a migration shows at one moment: lines of text for a window of a given size. Reads nothing and
//! writes nothing.

use std::collections::{HashMap, VecDeque};

use console::{Style, style, truncate_str};

use super::output::{approximate, latency, seconds, word};
use crate::migration::view::{DatabaseView, MigrationView, TableView};

/// Tables of a database that are listed while they are copied.
const LISTED: usize = 6;
/// Characters of a bar.
const BAR: usize = 24;
/// Values of latency that are drawn, one an interval.
const DRAWN: usize = 40;

/// The latency of each database over the last intervals, in bytes; `None`: it was not known.
#[derive(Default)]
pub(super) struct Latencies(HashMap<String, VecDeque<Option<u64>>>);

impl Latencies {
    /// Adds what is known now.
    pub(super) fn note(&mut self, migration: &MigrationView) {
        for database in &migration.databases {
            let values = self.0.entry(database.name.clone()).or_default();
            values.push_back(database.latency_bytes);
            if values.len() > DRAWN {
                values.pop_front();
            }
        }
    }

    /// A character for each value, as high as the value is beside the largest; a gap where nothing was known.
    fn drawn(&self, database: &str) -> String {
        let Some(values) = self.0.get(database) else { return String::new() };
        let largest = values.iter().flatten().copied().max().unwrap_or(0).max(1);
        let height = |value: u64| value.saturating_mul(7).div_ceil(largest).min(7);
        let levels = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let level =
            |value: &Option<u64>| value.map_or(' ', |value| levels[usize::try_from(height(value)).unwrap_or(7)]);
        values.iter().map(level).collect()
    }
}

/// The lines, none wider than `width` and no more than `height`.
pub(super) fn frame(
    migration: &MigrationView,
    tables: &[TableView],
    latencies: &Latencies,
    (height, width): (usize, usize),
) -> Vec<String> {
    let mut lines = vec![
        format!(
            "{}  {}  {}, {}, for {}",
            style(&migration.name).for_stderr().bold(),
            state_style(&migration.state).apply_to(format!("{} {}", migration.state, migration.substate)),
            word(migration.mode),
            word(migration.option),
            seconds(migration.duration_seconds)
        ),
        String::new(),
    ];
    for database in &migration.databases {
        let of: Vec<&TableView> = tables.iter().filter(|table| table.database == database.name).collect();
        lines.extend(database_lines(database, &of, latencies));
    }
    if let Some(verification) = &migration.verification {
        lines.push(format!(
            "verification  {} {} of {} tables, {} rows, {} differences{}",
            bar(verification.bytes_compared, verification.bytes_total),
            verification.tables_compared,
            verification.tables_total,
            verification.rows_compared,
            verification.differences,
            verification.eta_seconds.map_or_else(String::new, |left| format!(", {} left", seconds(left))),
        ));
    }
    if let Some(error) = &migration.error {
        lines.push(format!("{} {error}", Style::new().for_stderr().red().apply_to("error:")));
        lines.extend(error.hint.iter().map(|hint| format!("hint: {hint}")));
    }
    // One line stays free for the cursor.
    lines.truncate(height.saturating_sub(1));
    lines.into_iter().map(|line| truncate_str(&line, width, "…").into_owned()).collect()
}

fn state_style(state: &str) -> Style {
    let plain = Style::new().for_stderr();
    match state {
        "Succeeded" | "WaitingForUserAction" => plain.green(),
        "Failed" | "ValidationFailed" | "Cancelled" => plain.red(),
        _ => plain.cyan(),
    }
}

fn database_lines(database: &DatabaseView, tables: &[&TableView], latencies: &Latencies) -> Vec<String> {
    let bytes = |of: fn(&TableView) -> Option<u64>| tables.iter().filter_map(|table| of(table)).sum::<u64>();
    let (copied, all) = (bytes(|table| Some(table.full_load.bytes)), bytes(|table| table.full_load.bytes_total));
    // In bytes where their number is known: a hundred small tables say little beside a large one.
    let is_ready = database.tables_ready == database.tables_total;
    let done = match all {
        0 => bar(database.tables_ready as u64, database.tables_total as u64),
        _ if is_ready => bar(1, 1),
        _ => bar(copied.min(all), all),
    };
    let DatabaseView { name, state, tables_ready, tables_total, .. } = database;
    let mut lines =
        vec![format!("{name}  {done} {tables_ready} of {tables_total} tables, {}  {state}", approximate(copied))];
    let mut copying: Vec<&&TableView> = tables.iter().filter(|table| table.full_load.state == "copying").collect();
    copying.sort_by_key(|table| std::cmp::Reverse(table.full_load.bytes_total));
    lines.extend(copying.iter().take(LISTED).map(|table| copying_line(table)));
    if copying.len() > LISTED {
        lines.push(format!("    and {} more tables are being copied", copying.len() - LISTED));
    }
    let behind = latency(database);
    if !behind.is_empty() {
        let pending = database.pending_changes.map_or("unknown".to_owned(), |pending| pending.to_string());
        let direction = if database.direction == "reverse" { "source" } else { "target" };
        let drawn = latencies.drawn(name);
        lines.push(format!("    {direction} {behind}, {pending} pending changes  {drawn}"));
    }
    if let (true, Some(kept)) = (database.wal_warning, database.retained_wal_bytes) {
        lines.push(format!("    warning: the source keeps {} of write-ahead log", approximate(kept)));
    }
    if !database.fenced_writes.is_empty() {
        let written: Vec<String> = database.fenced_writes.iter().map(ToString::to_string).collect();
        lines.push(format!("    warning: written past the fence: {}", written.join(", ")));
    }
    if let (true, Some(error)) = (database.retries > 0, &database.last_error) {
        lines.push(format!("    tried again {} times: {error}", database.retries));
    }
    lines
}

fn copying_line(table: &TableView) -> String {
    let load = &table.full_load;
    let total = load.bytes_total.unwrap_or(0);
    let pace = load.bytes_per_second.map_or_else(String::new, |pace| format!("  {}/s", approximate(pace)));
    let left = load.seconds_left.map_or_else(String::new, |left| format!("  {} left", seconds(left)));
    let of = if total == 0 { String::new() } else { format!(" of {}", approximate(total)) };
    let done = bar(load.bytes.min(total), total);
    format!("    {done} {}.{}  {}{of}{pace}{left}", table.schema, table.name, approximate(load.bytes))
}

/// `[=====>    ]`
fn bar(done: u64, all: u64) -> String {
    let filled = if all == 0 { 0 } else { (u128::from(done.min(all)) * BAR as u128 / u128::from(all)) as usize };
    let head = if filled == 0 || filled == BAR { "" } else { ">" };
    format!("[{:<BAR$}]", format!("{}{head}", "=".repeat(filled - head.len())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::migration::view::FullLoadView;

    fn migration() -> MigrationView {
        let database = json!({"name": "shop", "state": "copying", "direction": "forward", "rollback_possible": false,
            "latency_bytes": 20_000, "latency_seconds": 0.25, "pending_changes": 42, "tables_total": 10, "tables_ready": 2,
            "retries": 0, "last_error": null});
        let migration = json!({"name": "move-1", "state": "InProgress", "substate": "MigratingData", "mode": "online",
            "option": "validate-and-migrate", "cutover_when_ready": false, "databases": [database], "error": null,
            "started_at": 0.0, "finished_at": null, "duration_seconds": 184.0, "source": "a:5432", "validation": null});
        serde_json::from_value(migration).expect("valid")
    }

    fn table(name: &str, bytes: u64, total: u64) -> TableView {
        let full_load = FullLoadView {
            state: "copying".to_owned(),
            bytes,
            bytes_total: Some(total),
            bytes_per_second: Some(50 << 20),
            seconds_left: Some(9.0),
            ..FullLoadView::default()
        };
        TableView {
            database: "shop".to_owned(),
            schema: "public".to_owned(),
            name: name.to_owned(),
            full_load,
            incremental_sync: crate::migration::view::IncrementalView::default(),
            indexes: "pending".to_owned(),
            verification: None,
            error: None,
        }
    }

    #[test]
    fn what_is_copied_now_and_how_far_the_target_is_behind_can_be_seen() {
        let mut latencies = Latencies::default();
        let mut migration = migration();
        for bytes in [None, Some(0), Some(5_000), Some(20_000)] {
            migration.databases[0].latency_bytes = bytes;
            latencies.note(&migration);
        }
        let tables = [table("items", 100 << 20, 200 << 20), table("orders", 300 << 20, 600 << 20)];
        let lines = frame(&migration, &tables, &latencies, (40, 200));
        assert_eq!(
            lines,
            [
                "move-1  InProgress MigratingData  online, validate-and-migrate, for 3min 4s",
                "",
                "shop  [===========>            ] 2 of 10 tables, 400MB  copying",
                "    [===========>            ] public.orders  300MB of 600MB  50MB/s  9s left",
                "    [===========>            ] public.items  100MB of 200MB  50MB/s  9s left",
                "    target 19kB (0.2s) behind, 42 pending changes   ▁▃█",
            ]
        );
    }

    #[test]
    fn no_line_is_wider_than_the_window_and_one_stays_free() {
        let tables: Vec<TableView> = (0..9).map(|n| table(&"long".repeat(30), n, 9)).collect();
        for size in [(5, 30), (3, 1), (1, 80), (24, 80)] {
            let lines = frame(&migration(), &tables, &Latencies::default(), size);
            assert!(lines.len() < size.0.max(1), "{lines:#?}");
            assert!(lines.iter().all(|line| console::measure_text_width(line) <= size.1), "{lines:#?}");
        }
        let lines = frame(&migration(), &tables, &Latencies::default(), (24, 80));
        assert!(lines.iter().any(|line| line.contains("and 3 more tables")), "{lines:#?}");
    }

    #[test]
    fn a_bar_is_empty_without_a_total_and_full_at_the_end() {
        assert_eq!(bar(0, 0), format!("[{}]", " ".repeat(BAR)));
        assert_eq!(bar(9, 9), format!("[{}]", "=".repeat(BAR)));
        assert_eq!(bar(u64::MAX, 1), format!("[{}]", "=".repeat(BAR)));
        assert!(bar(1, 9).contains("=>"));
    }
}
