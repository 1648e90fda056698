//! What operators give to and see of a migration: the definition of a new one, and the JSON shapes that scripts rely on.
//!
//! Keys may be added, none may be taken away. Unknown is `null`, never 0. Nothing here holds a secret or a row value.

use serde::{Deserialize, Serialize};

use crate::catalog::journal::MadeObject;
use crate::catalog::watches::FencedWrite;
use crate::migration::preflight::{RuleResult, Statement};
use crate::migration::verify::TableResult;
use crate::migration::verify::definitions::DefinitionDifference;

/// A name that is fit for a migration: 1 to 40 ASCII letters, digits and hyphens, not starting with a hyphen. It becomes
/// part of the publication's name, which PostgreSQL cuts at 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct MigrationName(String);

/// The name is not fit for a migration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a migration name: use 1 to 40 letters, digits and hyphens, and no hyphen at the start")]
pub struct BadName(String);

impl MigrationName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for MigrationName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fit = (1..=40).contains(&text.len())
            && !text.starts_with('-')
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if fit { Ok(Self(text.to_owned())) } else { Err(BadName(text.to_owned())) }
    }
}

impl std::fmt::Display for MigrationName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl schemars::JsonSchema for MigrationName {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MigrationName".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9-]{0,39}$" })
    }
}

impl<'de> Deserialize<'de> for MigrationName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Whether changes are streamed until a cutover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Copy, then stream until a cutover.
    Online,
    /// One consistent copy, then done.
    Offline,
}

/// How much is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationOption {
    /// The premigration validation only.
    Validate,
    /// No validation first.
    Migrate,
    /// Validation, then the migration if nothing failed.
    ValidateAndMigrate,
}

/// What `create` is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MigrationSpec {
    /// Unique on the target.
    pub name: MigrationName,
    /// Databases, the same name on both servers; empty: every database of the source but its templates.
    #[serde(default)]
    pub databases: Vec<String>,
    /// Whether changes are streamed until a cutover.
    #[serde(default = "online")]
    pub mode: Mode,
    /// How much is asked for.
    #[serde(default = "validate_and_migrate")]
    pub option: MigrationOption,
    /// Databases of the target that already hold something are emptied first.
    #[serde(default)]
    pub overwrite_target: bool,
    /// Begin the cutover without being told, as soon as everything is ready.
    #[serde(default)]
    pub cutover_when_ready: bool,
}

fn online() -> Mode {
    Mode::Online
}

fn validate_and_migrate() -> MigrationOption {
    MigrationOption::ValidateAndMigrate
}

/// Why a migration, database or table cannot go on, in an operator's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Problem {
    /// A word that scripts may compare, such as `slot_missing`.
    pub code: String,
    /// What failed.
    pub message: String,
    /// On which object.
    pub object: Option<String>,
    /// What mends it.
    pub hint: Option<String>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if let Some(object) = &self.object {
            write!(f, " ({object})")?;
        }
        Ok(())
    }
}

/// `migration show`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MigrationView {
    /// Its name.
    pub name: String,
    /// SPEC section 2, first column.
    pub state: String,
    /// SPEC section 2, second column.
    pub substate: String,
    /// `online` or `offline`.
    pub mode: Mode,
    /// How much was asked for.
    pub option: MigrationOption,
    /// Begin the cutover without being told; false from the first one on, so that a rollback stays.
    pub cutover_when_ready: bool,
    /// Each database.
    pub databases: Vec<DatabaseView>,
    /// Why it failed.
    pub error: Option<Problem>,
    /// Seconds since the Unix epoch.
    pub started_at: f64,
    /// Seconds since the Unix epoch; null while it has not ended.
    pub finished_at: Option<f64>,
    /// From the start to the end, or to now.
    pub duration_seconds: f64,
    /// `host:port` of the source.
    pub source: String,
    /// How far the verification is that runs; null: none does.
    #[serde(default)]
    pub verification: Option<VerificationView>,
    /// Results of the last premigration validation.
    pub validation: Option<serde_json::Value>,
}

/// One database of `migration show`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DatabaseView {
    /// Its name.
    pub name: String,
    /// The step it is in.
    pub state: String,
    /// Which way its changes flow: `forward` from source to target; `reverse` from target to source, after a cutover.
    #[serde(default)]
    pub direction: String,
    /// Whether the stream back exists by which a cutover can be taken back.
    #[serde(default)]
    pub rollback_possible: bool,
    /// How far the target is behind, in bytes of WAL; null: not known.
    pub latency_bytes: Option<u64>,
    /// How far the target is behind, in seconds; null: not known.
    pub latency_seconds: Option<f64>,
    /// Row changes received and not yet applied; null: not known.
    pub pending_changes: Option<u64>,
    /// Tables to migrate.
    pub tables_total: usize,
    /// Tables that are copied and have their indexes.
    pub tables_ready: usize,
    /// How often a connection was lost and made again since the last success.
    pub retries: u32,
    /// Why, the last time.
    pub last_error: Option<String>,
    /// Write-ahead log that the source keeps for the slot; null: there is no slot, or it is not known.
    #[serde(default)]
    pub retained_wal_bytes: Option<u64>,
    /// `migration.max_retained_wal`; null: no limit.
    #[serde(default)]
    pub retained_wal_limit_bytes: Option<u64>,
    /// What can still be written before the source itself drops the slot; null: no such bound.
    #[serde(default)]
    pub safe_wal_bytes: Option<u64>,
    /// The source keeps more than half of what it may.
    #[serde(default)]
    pub wal_warning: bool,
    /// The watch over the server that the last cutover or rollback left; null: none was left.
    #[serde(default)]
    pub fence_watch: Option<FenceWatchView>,
    /// What was written past the fence on a server that was left: it is on that server and not on the other one.
    #[serde(default)]
    pub fenced_writes: Vec<FencedWriteView>,
}

/// Whether writes on the server that was left are noticed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct FenceWatchView {
    /// `source` or `target`.
    pub server: String,
    /// Whether somebody looks at this moment. What is written meanwhile is found later, unless the watch has ended.
    pub watched: bool,
    /// Why not.
    pub trouble: Option<String>,
}

/// What was written past the fence in one table, in one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct FencedWriteView {
    /// `source` or `target`: where it was written.
    pub server: String,
    /// The cutover or rollback that had left that server.
    pub epoch: u64,
    /// Schema, unquoted.
    pub schema: String,
    /// Table, unquoted.
    pub table: String,
    /// `insert`, `update`, `delete` or `truncate`.
    pub kind: String,
    /// Rows; of a truncation, how often.
    pub changes: u64,
    /// Commit of the first one, in seconds since the Unix epoch, by that server's clock.
    pub first_at: f64,
    /// Commit of the last one.
    pub last_at: f64,
}

impl FencedWriteView {
    /// As it was found.
    pub fn of(found: &FencedWrite) -> Self {
        Self {
            server: found.server.to_string(),
            epoch: found.epoch.0,
            schema: found.table.schema.clone(),
            table: found.table.name.clone(),
            kind: found.kind.clone(),
            changes: found.changes,
            first_at: found.first_at,
            last_at: found.last_at,
        }
    }
}

impl std::fmt::Display for FencedWriteView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { server, schema, table, kind, changes, .. } = self;
        write!(f, "{schema}.{table} on the {server}: {changes} \u{d7} {kind}")
    }
}

/// One row of `migration tables`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TableView {
    /// Database.
    pub database: String,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// The full load.
    pub full_load: FullLoadView,
    /// The incremental sync.
    pub incremental_sync: IncrementalView,
    /// `pending`, so many of so many (`2/3`), or `built`.
    pub indexes: String,
    /// Result of the last verification; null: not verified.
    pub verification: Option<String>,
    /// Why it failed.
    pub error: Option<Problem>,
}

/// Counters of a table's full load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct FullLoadView {
    /// `waiting`, `copying`, `copied`, `ready` or `failed`.
    pub state: String,
    /// Rows copied.
    pub rows: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// Estimate of all rows; null: not known.
    pub rows_total: Option<u64>,
    /// Estimate of all bytes; null: not known.
    pub bytes_total: Option<u64>,
    /// Since this copy of the table began; null: it is not being copied.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    /// Estimate; null: not known, or not being copied.
    #[serde(default)]
    pub seconds_left: Option<f64>,
}

/// Counters of a table's incremental sync, since this process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct IncrementalView {
    /// Rows inserted.
    pub inserts: u64,
    /// Rows updated.
    pub updates: u64,
    /// Rows deleted.
    pub deletes: u64,
    /// Times it was truncated.
    pub truncates: u64,
    /// Received and not yet applied; null: not known.
    pub pending: Option<u64>,
}

/// How far a verification is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct VerificationView {
    /// Tables that are done.
    pub tables_compared: u64,
    /// All tables.
    pub tables_total: u64,
    /// Rows read on the source.
    pub rows_compared: u64,
    /// Bytes read on the source.
    pub bytes_compared: u64,
    /// Estimate of all bytes.
    pub bytes_total: u64,
    /// Differences found.
    pub differences: u64,
    /// Seconds until it is done, at the pace so far; null: not known.
    pub eta_seconds: Option<f64>,
}

/// Definitions of one database that are listed when they differ; all of them count.
const DEFINITIONS_LISTED: usize = 200;

/// What a verification came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct VerifyReport {
    /// Tables that were compared, also those that an interrupted verification had compared before.
    pub tables_compared: u64,
    /// Their rows on the source.
    pub rows_compared: u64,
    /// Rows and definitions that differ, and tables that could not be compared. Zero: nothing does.
    pub differences: u64,
    /// Rows that were written, or removed, on the server that is followed to make it equal.
    #[serde(default)]
    pub repaired: u64,
    /// Tables that are not the same, with the keys of rows that differ, as far as they are listed.
    pub tables: Vec<VerifiedTable>,
    /// Definitions that are not the same.
    pub definitions: Vec<VerifiedDatabase>,
}

/// What mends a rule of the validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct FixReport {
    /// Its code.
    pub rule: String,
    /// Whether the statements were run.
    pub applied: bool,
    /// Why they are not run for the operator, where that could cost something; null: they may be.
    pub refused: Option<String>,
    /// Every one, in their order.
    pub statements: Vec<Statement>,
    /// The rule's answers afterwards.
    pub found: Vec<RuleResult>,
}

/// A table that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct VerifiedTable {
    /// The database.
    pub database: String,
    /// What was found.
    #[serde(flatten)]
    pub result: TableResult,
}

/// Definitions of a database that are not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct VerifiedDatabase {
    /// The database.
    pub database: String,
    /// What differs.
    pub definitions: Vec<DefinitionDifference>,
}

impl VerifyReport {
    /// Adds a table; only those that differ are listed.
    pub fn add_table(&mut self, database: &str, result: TableResult) {
        self.tables_compared += 1;
        self.rows_compared += result.rows;
        self.repaired += result.repaired;
        self.differences += result.differences + u64::from(result.problem.is_some());
        if !result.is_equal() {
            self.tables.push(VerifiedTable { database: database.to_owned(), result });
        }
    }

    /// Adds what was found among the definitions of a database.
    pub fn add_definitions(&mut self, mut found: VerifiedDatabase) {
        self.differences += found.definitions.len() as u64;
        found.definitions.truncate(DEFINITIONS_LISTED);
        if !found.definitions.is_empty() {
            self.definitions.push(found);
        }
    }
}

/// What a cancel removed, and what it left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CancelReport {
    /// Gone.
    pub removed: Vec<MadeObject>,
    /// Still there: on purpose, or because it could not be removed.
    pub left: Vec<Left>,
}

/// One object that a cancel left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Left {
    /// The object.
    #[serde(flatten)]
    pub object: MadeObject,
    /// Why it is still there.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_letters_digits_and_inner_hyphens() {
        for good in ["a", "Shop-2", "1st", &"x".repeat(40)] {
            assert!(good.parse::<MigrationName>().is_ok(), "{good:?}");
        }
        for bad in ["", "-a", "a_b", "ä", "a b", &"x".repeat(41)] {
            assert!(bad.parse::<MigrationName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_spec_needs_only_its_name() {
        let spec: MigrationSpec = serde_json::from_str(r#"{"name":"shop"}"#).expect("valid");
        assert_eq!(spec.mode, Mode::Online);
        assert_eq!(spec.option, MigrationOption::ValidateAndMigrate);
        assert!(serde_json::from_str::<MigrationSpec>(r#"{"name":"-shop"}"#).is_err());
    }
}
