//! What an order is answered with: typed for HTTP and the command line, a table for the console.

use serde_json::Value;

use super::table::Kind::{Float, Integer, Text};
use super::table::{Cell, Column, Table};
use super::view::{BlockerView, CheckView, CutoverView, EventView, MemberView, MigrationEntry, SampleView, StatusView};
use super::{command::Command, pgbouncer, show, stats};
use crate::catalog::streams::Direction;
use crate::config::Changes;
use crate::migration::preflight::{Level, RuleResult, Statement};
use crate::migration::view::{
    CancelReport, DatabaseView, FencedWriteView, FixReport, MigrationView, TableView, VerifyReport,
};
use crate::proxy::shadow::ShadowView;

/// An answer.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one answer for each order of a person")]
pub enum Reply {
    /// Rows that have no shape of their own beside the table.
    Table(Table),
    /// `status`
    Status(Box<StatusView>),
    /// Migrations, newest first.
    Migrations(Vec<MigrationEntry>),
    /// One migration.
    Migration(Box<MigrationView>),
    /// Its tables.
    Tables(Vec<TableView>),
    /// Its premigration validation.
    Validation(Vec<RuleResult>),
    /// A cutover; `None`: there was none.
    Cutover(Option<CutoverView>),
    /// What stands in the way of a cutover.
    Blockers(Vec<BlockerView>),
    /// Proxies.
    Members(Vec<MemberView>),
    /// What a verification found.
    Verified(Box<VerifyReport>),
    /// What the last verification found; `None`: there was none.
    Verification(Option<Box<VerifyReport>>),
    /// What shadow reads have found; `None`: there were none.
    Shadow(Option<Box<ShadowView>>),
    /// What mends a rule.
    Fixed(FixReport),
    /// What a cancel removed and left.
    Cancelled(CancelReport),
    /// How far a migration was, over the last minutes.
    History(Vec<SampleView>),
    /// What has happened.
    Events(Vec<EventView>),
    /// What the test of both connections found.
    Checked(CheckView),
    /// What a reload changed.
    Reloaded(Changes),
    /// It is done; the tag says what.
    Done(&'static str),
}

const MIGRATIONS: &[Column] = &[
    ("name", Text),
    ("status", Text),
    ("substatus", Text),
    ("migration_mode", Text),
    ("migration_type", Text),
    ("source_server", Text),
    ("source_server_type", Text),
    ("databases", Text),
    ("duration_seconds", Float),
    ("start_time", Text),
];
const MIGRATION: &[Column] = &[
    ("database", Text),
    ("state", Text),
    ("latency_bytes", Integer),
    ("latency_seconds", Float),
    ("pending_changes", Integer),
    ("tables_ready", Integer),
    ("tables_total", Integer),
    ("status", Text),
    ("substatus", Text),
    ("error", Text),
    ("hint", Text),
    ("fence_watch", Text),
    ("fenced_writes", Text),
];
const TABLES: &[Column] = &[
    ("database", Text),
    ("schema", Text),
    ("table", Text),
    ("full_load", Text),
    ("rows", Integer),
    ("rows_total", Integer),
    ("bytes", Integer),
    ("bytes_total", Integer),
    ("inserts", Integer),
    ("updates", Integer),
    ("deletes", Integer),
    ("truncates", Integer),
    ("pending", Integer),
    ("indexes", Text),
    ("verification", Text),
    ("error", Text),
    ("bytes_per_second", Integer),
    ("seconds_left", Integer),
];
const VALIDATION: &[Column] = &[
    ("level", Text),
    ("database", Text),
    ("rule", Text),
    ("result", Text),
    ("evidence", Text),
    ("why", Text),
    ("fix", Text),
];
const CUTOVER: &[Column] = &[
    ("outcome", Text),
    ("phase", Text),
    ("reason", Text),
    ("pause_ms", Integer),
    ("prepare_ms", Integer),
    ("pause_phase_ms", Integer),
    ("drain_ms", Integer),
    ("decide_ms", Integer),
    ("switch_ms", Integer),
    ("sessions_moved", Integer),
    ("sessions_ended", Integer),
    ("blockers", Text),
    ("notes", Text),
    ("direction", Text),
    ("hint", Text),
    ("sessions_held", Integer),
    ("longest_hold_ms", Float),
    ("would", Text),
    ("steps", Text),
    ("forceable", Integer),
    ("forced", Text),
];
const BLOCKERS: &[Column] = &[
    ("database", Text),
    ("pid", Integer),
    ("user", Text),
    ("application_name", Text),
    ("client", Text),
    ("code", Text),
    ("reason", Text),
    ("hint", Text),
];
const MEMBERS: &[Column] = &[("instance", Text), ("address", Text), ("role", Text), ("version", Text)];
const CANCEL: &[Column] =
    &[("result", Text), ("side", Text), ("database", Text), ("kind", Text), ("name", Text), ("reason", Text)];
const HISTORY: &[Column] = &[
    ("time", Text),
    ("database", Text),
    ("latency_bytes", Integer),
    ("latency_seconds", Float),
    ("pending_changes", Integer),
    ("copied_rows", Integer),
    ("copied_bytes", Integer),
];
const EVENTS: &[Column] =
    &[("number", Integer), ("time", Text), ("migration", Text), ("kind", Text), ("failed", Text), ("event", Text)];
const CHECK: &[Column] = &[("check", Text), ("ok", Text), ("found", Text), ("fix", Text)];
const VERIFY: &[Column] = &[
    ("tables_compared", Integer),
    ("rows_compared", Integer),
    ("differences", Integer),
    ("database", Text),
    ("object", Text),
    ("difference", Text),
    ("key", Text),
];
const SHADOW: &[Column] = &[("what", Text), ("name", Text), ("value", Text)];
const FIX: &[Column] = &[("server", Text), ("database", Text), ("statement", Text), ("result", Text)];
const RELOAD: &[Column] = &[("key", Text), ("result", Text)];
const STATUS: &[Column] = &[
    ("database", Text),
    ("server", Text),
    ("epoch", Integer),
    ("held", Text),
    ("sessions", Integer),
    ("inside", Integer),
    ("reason", Text),
    ("write_delay_ms", Float),
];

/// The columns that `command` is answered with; `None`: it is answered with a tag alone.
pub fn columns(command: &Command) -> Option<&'static [Column]> {
    match command {
        Command::Help => Some(show::HELP),
        Command::Version => Some(show::VERSION),
        Command::Config => Some(show::CONFIG),
        Command::Databases => Some(show::DATABASES),
        Command::Pools => Some(show::POOLS),
        Command::Clients | Command::Servers => Some(show::SESSIONS),
        Command::Stats => Some(stats::STATS),
        Command::StatsTotals | Command::StatsAverages => Some(stats::STATS_PART),
        Command::Totals => Some(stats::TOTALS),
        Command::Sockets | Command::ActiveSockets => Some(show::SOCKETS),
        Command::Mem => Some(pgbouncer::MEM),
        Command::State => Some(pgbouncer::STATE),
        Command::DnsHosts => Some(pgbouncer::DNS_HOSTS),
        Command::DnsZones => Some(pgbouncer::DNS_ZONES),
        Command::Peers => Some(pgbouncer::PEERS),
        Command::Lists => Some(show::LISTS),
        Command::Users => Some(show::USERS),
        Command::Members => Some(MEMBERS),
        Command::Blockers => Some(BLOCKERS),
        Command::Status => Some(STATUS),
        Command::Migrations(_) => Some(MIGRATIONS),
        Command::Migration(_) => Some(MIGRATION),
        Command::Tables(_) => Some(TABLES),
        Command::Validation(_) => Some(VALIDATION),
        Command::CutoverOf(_) | Command::Cutover(..) | Command::Rollback(..) => Some(CUTOVER),
        Command::Cancel(_) | Command::Complete(_) => Some(CANCEL),
        Command::History(_) => Some(HISTORY),
        Command::Events => Some(EVENTS),
        Command::Check => Some(CHECK),
        Command::Verify(..) | Command::Verification(_) => Some(VERIFY),
        Command::Shadow(..) | Command::ShadowOf(_) => Some(SHADOW),
        Command::Fix(..) => Some(FIX),
        Command::Reload => Some(RELOAD),
        Command::Create(_)
        | Command::Retry(_)
        | Command::Pause(_)
        | Command::Resume(_)
        | Command::Disable(_)
        | Command::Enable(_)
        | Command::Reconnect(_)
        | Command::WaitClose(_)
        | Command::Set { .. }
        | Command::Kill(_)
        | Command::KillClient(_)
        | Command::KillDatabase(_)
        | Command::Shutdown(_) => None,
    }
}

impl Reply {
    /// The shape that scripts rely on.
    pub fn to_json(&self) -> Result<Value, serde_json::Error> {
        match self {
            Self::Table(table) => Ok(table.to_json()),
            Self::Status(status) => serde_json::to_value(status),
            Self::Migrations(migrations) => serde_json::to_value(migrations),
            Self::Migration(migration) => serde_json::to_value(migration),
            Self::Tables(tables) => serde_json::to_value(tables),
            Self::Validation(rules) => serde_json::to_value(rules),
            Self::Cutover(cutover) => serde_json::to_value(cutover),
            Self::Blockers(blockers) => serde_json::to_value(blockers),
            Self::Members(members) => serde_json::to_value(members),
            Self::Verified(report) => serde_json::to_value(report),
            Self::Verification(report) => serde_json::to_value(report),
            Self::Shadow(view) => serde_json::to_value(view),
            Self::Fixed(report) => serde_json::to_value(report),
            Self::Cancelled(report) => serde_json::to_value(report),
            Self::History(samples) => serde_json::to_value(samples),
            Self::Events(events) => serde_json::to_value(events),
            Self::Checked(check) => serde_json::to_value(check),
            Self::Reloaded(changes) => serde_json::to_value(changes),
            Self::Done(tag) => Ok(serde_json::json!({ "done": tag })),
        }
    }

    /// The answer as rows, or the tag of an answer that has none.
    pub fn into_table(self) -> Result<Table, &'static str> {
        let filled = |columns, rows| Ok(Table { columns, rows });
        match self {
            Self::Table(table) => Ok(table),
            Self::Status(status) => filled(STATUS, status.routes.iter().map(route_row).collect()),
            Self::Migrations(migrations) => filled(MIGRATIONS, migrations.iter().map(migration_row).collect()),
            Self::Migration(migration) => filled(MIGRATION, database_rows(&migration)),
            Self::Tables(tables) => filled(TABLES, tables.iter().map(table_row).collect()),
            Self::Validation(rules) => filled(VALIDATION, rules.iter().map(rule_row).collect()),
            Self::Cutover(cutover) => filled(CUTOVER, cutover.iter().map(cutover_row).collect()),
            Self::Blockers(blockers) => filled(BLOCKERS, blockers.into_iter().map(blocker_row).collect()),
            Self::Members(members) => filled(MEMBERS, members.into_iter().map(member_row).collect()),
            Self::Verified(report) => filled(VERIFY, verify_rows(&report)),
            Self::Verification(report) => {
                filled(VERIFY, report.iter().flat_map(|report| verify_rows(report)).collect())
            }
            Self::Shadow(view) => filled(SHADOW, view.iter().flat_map(|view| shadow_rows(view)).collect()),
            Self::Fixed(report) => filled(FIX, fix_rows(&report)),
            Self::Cancelled(report) => filled(CANCEL, cancel_rows(&report)),
            Self::History(samples) => filled(HISTORY, samples.into_iter().map(sample_row).collect()),
            Self::Events(events) => filled(EVENTS, events.into_iter().map(event_row).collect()),
            Self::Checked(check) => filled(CHECK, check_rows(check)),
            Self::Reloaded(changes) => filled(RELOAD, reload_rows(&changes)),
            Self::Done(tag) => Err(tag),
        }
    }
}

fn route_row(route: &super::view::RouteView) -> Vec<Cell> {
    vec![
        route.database.clone().into(),
        route.server.map(|server| server.to_string()).into(),
        route.epoch.into(),
        if route.held { "yes" } else { "no" }.into(),
        route.sessions.into(),
        route.inside.into(),
        route.reason.clone().into(),
        route.write_delay_ms.into(),
    ]
}

/// The word that serde writes for a unit variant.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn migration_row(entry: &MigrationEntry) -> Vec<Cell> {
    let migration = &entry.migration;
    let databases: Vec<&str> = migration.databases.iter().map(|database| database.name.as_str()).collect();
    vec![
        migration.name.clone().into(),
        migration.state.clone().into(),
        migration.substate.clone().into(),
        word(migration.mode).into(),
        word(migration.option).into(),
        migration.source.clone().into(),
        entry.source_server_type.clone().into(),
        databases.join(",").into(),
        migration.duration_seconds.into(),
        show::timestamp(migration.started_at).into(),
    ]
}

/// One row a database; a migration that has none yet is one row all the same.
fn database_rows(migration: &MigrationView) -> Vec<Vec<Cell>> {
    let error = migration.error.as_ref();
    let tail = [
        Cell::from(migration.state.clone()),
        Cell::from(migration.substate.clone()),
        Cell::from(error.map(ToString::to_string)),
        Cell::from(error.and_then(|error| error.hint.clone())),
    ];
    let fences = migration.databases.iter().map(fence_cells);
    let mut rows: Vec<Vec<Cell>> = migration
        .databases
        .iter()
        .map(|database| {
            vec![
                database.name.clone().into(),
                database.state.clone().into(),
                database.latency_bytes.into(),
                database.latency_seconds.into(),
                database.pending_changes.into(),
                database.tables_ready.into(),
                database.tables_total.into(),
            ]
        })
        .collect();
    if rows.is_empty() {
        rows.push(vec![Cell::Null; MIGRATION.len() - tail.len() - 2]);
    }
    for (row, fence) in rows.iter_mut().zip(fences.chain(std::iter::once([Cell::Null, Cell::Null]))) {
        row.extend(tail.iter().cloned().chain(fence));
    }
    rows
}

/// Whether the server that was left is watched, and what was written there past the fence; nothing is NULL.
fn fence_cells(database: &DatabaseView) -> [Cell; 2] {
    let watch = database.fence_watch.as_ref().map(|watch| match &watch.trouble {
        None => watch.server.clone(),
        Some(trouble) => format!("not watching {}: {trouble}", watch.server),
    });
    let of = |write: &FencedWriteView| {
        let (first, last) = (show::timestamp(write.first_at), show::timestamp(write.last_at));
        format!("{write}, {first} to {last}")
    };
    let written: Vec<String> = database.fenced_writes.iter().map(of).collect();
    [watch.into(), (!written.is_empty()).then(|| written.join("; ")).into()]
}

/// Rounded up: not 0 while something is left.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and no copy takes so long")]
fn whole_seconds(seconds: f64) -> u64 {
    seconds.ceil() as u64
}

fn table_row(table: &TableView) -> Vec<Cell> {
    let (load, sync) = (&table.full_load, &table.incremental_sync);
    vec![
        table.database.clone().into(),
        table.schema.clone().into(),
        table.name.clone().into(),
        load.state.clone().into(),
        load.rows.into(),
        load.rows_total.into(),
        load.bytes.into(),
        load.bytes_total.into(),
        sync.inserts.into(),
        sync.updates.into(),
        sync.deletes.into(),
        sync.truncates.into(),
        sync.pending.into(),
        table.indexes.clone().into(),
        table.verification.clone().into(),
        table.error.as_ref().map(ToString::to_string).into(),
        load.bytes_per_second.into(),
        load.seconds_left.map(whole_seconds).into(),
    ]
}

fn rule_row(rule: &RuleResult) -> Vec<Cell> {
    let (level, database) = match &rule.level {
        Level::Instance => ("instance", Cell::Null),
        Level::Database(name) => ("database", name.clone().into()),
    };
    vec![
        level.into(),
        database,
        rule.code.clone().into(),
        word(rule.outcome).into(),
        rule.evidence.join("; ").into(),
        rule.why.clone().into(),
        rule.fix.clone().into(),
    ]
}

fn cutover_row(cutover: &CutoverView) -> Vec<Cell> {
    let mut row = vec![
        cutover.outcome.clone().into(),
        cutover.phase.clone().into(),
        cutover.reason.clone().into(),
        cutover.pause_ms.into(),
    ];
    row.extend(cutover.phases_ms.pairs().map(|(_, length)| length.into()));
    row.extend([cutover.sessions_moved.into(), cutover.sessions_ended.into()]);
    row.extend([cutover.blockers.join("; ").into(), cutover.notes.join("; ").into()]);
    let would = cutover.would.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let steps =
        cutover.prepare_steps.iter().chain(&cutover.pause_steps).map(|one| format!("{} {} ms", one.step, one.ms));
    row.extend([
        cutover.direction.map(Direction::as_str).into(),
        cutover.hint.clone().into(),
        cutover.sessions_held.into(),
        cutover.longest_hold_ms.into(),
        would.into(),
        steps.collect::<Vec<_>>().join("; ").into(),
        u64::from(cutover.forceable).into(),
        cutover.forced.join("; ").into(),
    ]);
    row
}

fn blocker_row(blocker: BlockerView) -> Vec<Cell> {
    vec![
        blocker.database.into(),
        blocker.pid.into(),
        blocker.user.into(),
        blocker.application_name.into(),
        blocker.client.into(),
        blocker.code.into(),
        blocker.reason.into(),
        blocker.hint.into(),
    ]
}

fn member_row(member: MemberView) -> Vec<Cell> {
    vec![member.instance.into(), member.address.into(), member.role.into(), member.version.into()]
}

fn fix_rows(report: &FixReport) -> Vec<Vec<Cell>> {
    let result = match (&report.refused, report.applied) {
        (_, true) => "run".to_owned(),
        (Some(why), false) => format!("not run: {why}"),
        (None, false) => "shown".to_owned(),
    };
    let row = |statement: &Statement| {
        let server = statement.server.to_string();
        vec![server.into(), statement.database.clone().into(), statement.sql.clone().into(), result.clone().into()]
    };
    report.statements.iter().map(row).collect()
}

/// What it is about, its name, its value.
fn shadow_rows(view: &ShadowView) -> Vec<Vec<Cell>> {
    view.lines().into_iter().map(|line| line.map(Cell::from).to_vec()).collect()
}

/// A first row with the counts, then one for each difference that is listed.
fn verify_rows(report: &VerifyReport) -> Vec<Vec<Cell>> {
    let counts = vec![
        report.tables_compared.into(),
        report.rows_compared.into(),
        report.differences.into(),
        Cell::Null,
        Cell::Null,
        Cell::Null,
        Cell::Null,
    ];
    let row = |database: &str, object: String, difference: String, key: Option<String>| {
        vec![
            Cell::Null,
            Cell::Null,
            Cell::Null,
            database.to_owned().into(),
            object.into(),
            difference.into(),
            key.into(),
        ]
    };
    let mut rows = vec![counts];
    for table in &report.tables {
        let (database, result) = (&table.database, &table.result);
        let object = format!("table {}", result.table());
        if let Some(problem) = &result.problem {
            rows.push(row(database, object.clone(), format!("not compared: {problem}"), None));
        }
        rows.extend(
            result.listed.iter().map(|found| row(database, object.clone(), word(found.kind), Some(found.shown_key()))),
        );
    }
    for found in &report.definitions {
        rows.extend(found.definitions.iter().map(|definition| {
            let object = format!("{} {}", definition.kind, definition.name);
            row(&found.database, object, definition.difference.clone(), None)
        }));
    }
    rows
}

fn cancel_rows(report: &CancelReport) -> Vec<Vec<Cell>> {
    let row = |result: &str, object: &crate::catalog::journal::MadeObject, reason: Cell| {
        vec![
            result.into(),
            object.side.to_string().into(),
            object.database.clone().into(),
            object.kind.clone().into(),
            object.name.clone().into(),
            reason,
        ]
    };
    let removed = report.removed.iter().map(|object| row("removed", object, Cell::Null));
    let left = report.left.iter().map(|left| row("left", &left.object, left.reason.clone().into()));
    removed.chain(left).collect()
}

fn sample_row(sample: SampleView) -> Vec<Cell> {
    vec![
        show::timestamp(sample.at).into(),
        sample.database.into(),
        sample.latency_bytes.into(),
        sample.latency_seconds.into(),
        sample.pending_changes.into(),
        sample.copied_rows.into(),
        sample.copied_bytes.into(),
    ]
}

fn event_row(event: EventView) -> Vec<Cell> {
    vec![
        event.number.into(),
        show::timestamp(event.at).into(),
        event.migration.into(),
        event.kind.into(),
        yes_or_no(event.failed),
        event.text.into(),
    ]
}

fn check_rows(check: CheckView) -> Vec<Vec<Cell>> {
    let rows = check.checks.into_iter();
    rows.map(|found| vec![found.check.into(), yes_or_no(found.ok), found.found.into(), found.fix.into()]).collect()
}

fn yes_or_no(is: bool) -> Cell {
    if is { "yes" } else { "no" }.into()
}

fn reload_rows(changes: &Changes) -> Vec<Vec<Cell>> {
    let row = |result: &'static str| move |key: &String| vec![key.clone().into(), result.into()];
    changes.applied.iter().map(row("applied")).chain(changes.needs_restart.iter().map(row("needs a restart"))).collect()
}
