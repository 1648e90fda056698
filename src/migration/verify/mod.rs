//! Compares source and target while both are live: no false alarm, no blind spot.
//!
//! ```text
//! round      two snapshots that see the same transactions (align), for as many tables as are read in a while
//! parts      each table is read once on each server, in parts, several at a time and with rests; the rows' hashes
//!            (expression) are summed up. A sum, unlike an exclusive or, also tells two rows from four, so tables without
//!            a key are compared as multisets by the same means
//! chunks     the parts of large tables are ranges of the key, where that costs nothing: each is compared on its own, and
//!            stays compared when the run is interrupted. Other tables are read in ranges of blocks and compared as a whole
//! descend    only where the sums differ, and under the same snapshots: once more in buckets, and then the rows of those
//!            buckets that differ side by side, by the hash of their key
//! ```
//!
//! Neither server sorts, no collation is asked, nothing is written, and locks are held for one part at a time, so that
//! TRUNCATE and ALTER TABLE of the application go on. They are not MVCC-safe: a table that was rewritten meanwhile is
//! read again in the next round, and one to which that happens again and again is locked against them while it is read.
//!
//! Values never leave the servers, but for the keys of rows that differ: those are in the report, and nowhere else.
//!
//! Source and target are roles, not servers: after a cutover the same runs the other way round, along the reverse stream.

pub mod align;
pub mod chunks;
pub mod definitions;
mod descend;
mod expression;
pub mod identity;
mod repair;
mod round;
mod sequences;
mod shape;
mod table;
mod type_tree;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_postgres::error::{DbError, SqlState};

use self::align::{Pair, Sides};
use self::chunks::{Begun, ChunkResult};
use self::expression::{Floats, Hasher, Method};
use self::repair::Damage;
use self::round::{Ended, round};
use self::table::Plan;
use crate::catalog::RecordError;
use crate::catalog::door::DoorError;
use crate::catalog::migrations::CatalogError;
use crate::ident::QualifiedName;
use crate::migration::late::LateError;
use crate::migration::stream::{transient_query, transient_sqlstate};
use crate::postgres::{ConnectError, Control};

/// Times that a table is read again because it was rewritten meanwhile.
const REWRITES: u32 = 10;

/// After so many times it is locked.
const RESTLESS: u32 = 2;

/// Times that a round is begun again after a lost connection.
const RETRIES: u32 = 8;

/// Rows that are listed for each table; the rest is counted.
pub const LISTED: usize = 100;

/// What to compare, and how gently.
#[derive(Clone)]
pub struct VerifyContext {
    /// Both servers and the stream between them.
    pub sides: Sides,
    /// Tables, or parts of large ones, that are read at the same time.
    pub workers: usize,
    /// Size of a part on the source: what is read between two rests, and of large tables what is not read again after an
    /// interruption.
    pub part_bytes: u64,
    /// Share of its time in which each worker reads; it rests for the remainder.
    pub load_percent: u8,
    /// The same while other sessions of the source are at work.
    pub busy_percent: u8,
    /// Told of everything that is done.
    pub observer: Arc<dyn Observer>,
    /// What becomes of rows that differ.
    pub damaged: Damaged,
}

/// What becomes of rows that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damaged {
    /// They are listed.
    Listed,
    /// Those of the source are written to the target, and the table is compared again.
    Repaired,
}

/// Learns how far a verification is.
#[async_trait]
pub trait Observer: Send + Sync {
    /// This many rows and bytes of the source were read.
    fn moved(&self, rows: u64, bytes: u64);
    /// A large table is about to be compared range by range; durable when it returns. What was begun earlier is void.
    async fn begun(&self, table: &QualifiedName, begun: &Begun) -> Result<(), CatalogError>;
    /// One of its ranges is done; durable when it returns.
    async fn chunk(&self, table: &QualifiedName, number: u32, result: &ChunkResult) -> Result<(), CatalogError>;
    /// A table is done; durable when it returns.
    async fn finished(&self, result: &TableResult) -> Result<(), CatalogError>;
    /// Rows of a table are about to be written or removed on the target: keys and counts; durable when it returns.
    async fn repairing(&self, table: &QualifiedName, what: &serde_json::Value) -> Result<(), CatalogError>;
}

/// What the comparison of one table came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TableResult {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// Its rows on the source.
    pub rows: u64,
    /// Rows that differ, are missing on the target or stand there alone.
    pub differences: u64,
    /// The first of them.
    pub listed: Vec<RowDifference>,
    /// Rows that were written or removed to make it equal.
    #[serde(default)]
    pub repaired: u64,
    /// What could not be compared; null: everything was.
    pub problem: Option<String>,
}

impl TableResult {
    /// Its name.
    pub fn table(&self) -> QualifiedName {
        QualifiedName::new(&self.schema, &self.name)
    }

    /// Nothing differs, and everything could be compared.
    pub fn is_equal(&self) -> bool {
        self.differences == 0 && self.problem.is_none()
    }

    /// One word for tables of tables.
    pub fn summary(&self) -> String {
        match (&self.problem, self.differences) {
            (Some(_), _) => "not compared".to_owned(),
            (None, 0) => "equal".to_owned(),
            (None, 1) => "1 difference".to_owned(),
            (None, differences) => format!("{differences} differences"),
        }
    }
}

/// One row that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RowDifference {
    /// What is wrong with it.
    pub kind: DifferenceKind,
    /// The columns of its key as text; of a table without a key `ctid` on the server that has the row.
    pub key: Vec<Option<String>>,
}

impl RowDifference {
    /// The key in one text, as a row is written.
    pub fn shown_key(&self) -> String {
        let parts: Vec<&str> = self.key.iter().map(|part| part.as_deref().unwrap_or("NULL")).collect();
        format!("({})", parts.join(", "))
    }
}

/// What can be wrong with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DifferenceKind {
    /// On both servers, not the same.
    Differs,
    /// Not on the target.
    Missing,
    /// Not on the source.
    Extra,
}

/// Tables could not be compared. Names objects, never values.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A statement failed.
    #[error("{doing} failed")]
    Query {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// No two snapshots could be made to fit.
    #[error(
        "no moment was found within {waited:?} at which the target of database {database} had just what the source showed: the stream is interrupted, or a transaction is too large"
    )]
    NoCommonSnapshot {
        /// The database.
        database: String,
        /// How long it was tried.
        waited: Duration,
    },
    /// The stream went on, or another one began, while it had to stand.
    #[error("the stream did not stand still for as long as it had to")]
    Moved,
    /// Something would fire on what a repair writes, and the role may not prevent it.
    #[error("the login role may not set session_replication_role, and a repair would fire: {}", .0.join(", "))]
    WouldFire(Vec<String>),
    /// Definitions that come late could not be tried out.
    #[error(transparent)]
    Late(#[from] LateError),
    /// The server that a cutover has left could not be entered.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// A server's answer makes no sense.
    #[error("{0} cannot be read")]
    Unreadable(&'static str),
    /// A result could not be kept.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// What was noted of earlier cutovers could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl VerifyError {
    fn query(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Query { doing, source }
    }

    pub(in crate::migration) fn is_transient(&self) -> bool {
        match self {
            Self::Connect(error) => error.sqlstate().is_none_or(transient_sqlstate),
            // 22023 and 58P01: the snapshot of a holder that has gone.
            Self::Query { source, .. } => {
                transient_query(source) || source.code().is_some_and(|code| matches!(code.code(), "22023" | "42704"))
            }
            Self::Late(LateError::Failed { source, .. }) => transient_query(source),
            Self::Moved => true,
            Self::Door(DoorError::Connect(error)) => error.sqlstate().is_none_or(transient_sqlstate),
            Self::Door(_)
            | Self::NoCommonSnapshot { .. }
            | Self::Unreadable(_)
            | Self::WouldFire(_)
            | Self::Catalog(_)
            | Self::Record(_)
            | Self::Late(LateError::Record(_)) => false,
        }
    }

    /// What a server says against a statement, and not against a value: a table, a column or a function is not there, is
    /// something else, or may not be used. Either what was looked at was replaced since, or it is so that it cannot be read.
    /// The server's message names objects alone.
    fn about_a_definition(&self) -> Option<&DbError> {
        let Self::Query { source, .. } = self else { return None };
        let code = source.code()?;
        let about = code.code().starts_with("42") || *code == SqlState::INVALID_SCHEMA_NAME;
        source.as_db_error().filter(|_| about && !self.is_transient())
    }

    /// There is no table of the name.
    fn is_about_a_missing_table(&self) -> bool {
        let missing = [SqlState::UNDEFINED_TABLE, SqlState::WRONG_OBJECT_TYPE, SqlState::INVALID_SCHEMA_NAME];
        self.about_a_definition().is_some_and(|error| missing.contains(error.code()))
    }
}

/// Compares these tables, and returns what it found in the order in which it was done. Dropping it stops it; what the
/// observer was told of stays done. `begun` are large tables that an interrupted run has come to.
pub async fn tables(
    context: &VerifyContext,
    wanted: Vec<QualifiedName>,
    begun: HashMap<QualifiedName, Begun>,
) -> Result<Vec<TableResult>, VerifyError> {
    let mut left: VecDeque<QualifiedName> = wanted.into();
    let past = |begun: Begun| Past { begun: Some(begun), ..Past::default() };
    let mut pasts: HashMap<QualifiedName, Past> =
        begun.into_iter().map(|(table, begun)| (table, past(begun))).collect();
    let mut results = Vec::new();
    let mut retries = 0;
    while !left.is_empty() {
        let done = Mutex::new(Vec::new());
        let restless = |table: &&QualifiedName| pasts.get(*table).is_some_and(|past| past.rewrites >= RESTLESS);
        let locked: Vec<QualifiedName> = left.iter().filter(restless).take(1).cloned().collect();
        let ended = Box::pin(round(context, &left, &locked, &pasts, &done)).await;
        for ended in done.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let table = match ended {
                Ended::Compared(result) => {
                    let table = result.table();
                    results.push(result);
                    table
                }
                Ended::Begun(table, begun) => {
                    pasts.entry(table).or_default().begun = Some(begun);
                    continue;
                }
                Ended::Chunk(table, number, result) => {
                    if let Some(begun) = &mut pasts.entry(table).or_default().begun {
                        begun.done.insert(number, result);
                    }
                    continue;
                }
                Ended::Damaged(plan, damage) => {
                    let past = pasts.entry(plan.table.clone()).or_default();
                    past.repairs += 1;
                    past.repaired += Box::pin(mend(context, &plan, &damage)).await;
                    continue;
                }
                Ended::Rewritten(table) => {
                    let past = pasts.entry(table.clone()).or_default();
                    past.rewrites += 1;
                    if past.rewrites <= REWRITES {
                        continue;
                    }
                    let result = unreadable(&table, "it was rewritten or truncated again and again");
                    context.observer.finished(&result).await?;
                    results.push(result);
                    table
                }
            };
            left.retain(|name| *name != table);
        }
        match ended {
            Ok(rest) => {
                retries = 0;
                if !left.is_empty() {
                    tokio::time::sleep(rest).await;
                }
            }
            Err(error) if error.is_transient() && retries < RETRIES => {
                retries += 1;
                let error = crate::migration::stream::describe(&error);
                tracing::warn!(
                    database = context.sides.database,
                    retries,
                    error,
                    "the verification begins its round again"
                );
                tokio::time::sleep(Duration::from_millis(250) * 2_u32.pow(retries.min(6))).await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(results)
}

/// Repairs one table as far as it can be. What could not be is found when the table is compared again.
async fn mend(context: &VerifyContext, plan: &Plan, damage: &Damage) -> u64 {
    match repair::table(context, plan, damage).await {
        Ok(rows) => {
            tracing::warn!(table = %plan.table, rows, "rows were repaired");
            rows
        }
        Err(error) => {
            let error = crate::migration::stream::describe(&error);
            tracing::warn!(table = %plan.table, error, "rows could not be repaired");
            0
        }
    }
}

fn unreadable(table: &QualifiedName, problem: &str) -> TableResult {
    TableResult {
        schema: table.schema.clone(),
        name: table.name.clone(),
        rows: 0,
        differences: 0,
        listed: Vec::new(),
        repaired: 0,
        problem: Some(problem.to_owned()),
    }
}

/// What has befallen a table in earlier rounds.
#[derive(Clone, Debug, Default)]
struct Past {
    rewrites: u32,
    repairs: u32,
    /// Rows.
    repaired: u64,
    /// Its ranges, and those that are compared.
    begun: Option<Begun>,
}

async fn prepare(source: &Control, target: &Control) -> Result<(), VerifyError> {
    let floats = versions(source, target);
    for server in [source, target] {
        let set = server.batch_execute(&settings(server.version_num(), floats)).await;
        set.map_err(VerifyError::query("preparing a session"))?;
    }
    Ok(())
}

/// What the sessions that read need beside what every session of ours has.
fn settings(version_num: u32, floats: Floats) -> String {
    let mut sql = "SET max_parallel_workers_per_gather = 0; SET lc_monetary = 'C'".to_owned();
    if version_num >= 110_000 {
        sql.push_str("; SET jit = off");
    }
    if floats == Floats::Apart {
        sql.push_str("; SET extra_float_digits = 0");
    }
    sql
}

fn versions(source: &Control, target: &Control) -> Floats {
    let shortest = |control: &Control| control.version_num() >= 120_000;
    if shortest(source) == shortest(target) { Floats::Alike } else { Floats::Apart }
}

/// Stands for NULL among whole numbers. No number of 32 bits is ever mistaken for it.
fn null_number() -> i64 {
    loop {
        let number: i64 = rand::random();
        if i32::try_from(number).is_err() && u32::try_from(number).is_err() {
            return number;
        }
    }
}

/// How these two servers hash: asked, because a hash function may depend on the machine.
async fn hasher(pair: &Pair) -> Result<Hasher, VerifyError> {
    let floats = versions(&pair.source, &pair.target);
    let old = pair.source.version_num().min(pair.target.version_num()) < 110_000;
    let mut answers = Vec::new();
    for server in [&pair.source, &pair.target] {
        if !old {
            let sql = "SELECT hashtextextended('pgcutover asks' COLLATE \"C\", hashint4extended(0, 4711)), current_setting('server_encoding')";
            let row = server.query_one(sql, &[]).await.map_err(VerifyError::query("asking for a hash"))?;
            answers.push((row.get::<_, i64>(0), row.get::<_, String>(1)));
        }
    }
    let same = answers.len() == 2 && answers[0] == answers[1];
    let method = if same {
        Method::Extended { null_word: format!("{:032x}", rand::random::<u128>()), null_number: null_number() }
    } else {
        Method::Md5
    };
    Ok(Hasher { method, floats })
}

/// The error that a stream of rows ended with.
fn streamed<T>(doing: &'static str) -> impl Fn(Result<T, tokio_postgres::Error>) -> Result<T, VerifyError> {
    move |row| row.map_err(VerifyError::query(doing))
}
