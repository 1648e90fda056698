//! Indexes and constraints of a table, built as soon as its rows are there.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::{CopyContext, CopyError, SourceTable};
use crate::migration::schema::{self, Archive, Entry, Locking, RestoreFailure, RestoreTarget, Restorer, SchemaError};

/// Tables below this are not worth more than one connection.
const PARALLEL_FROM_BYTES: u64 = 64 * 1024 * 1024;

/// Larger tables are analysed here, beside the work on others; the rest in one go at the end.
const ANALYZE_FROM_BYTES: u64 = 8 * 1024 * 1024;

/// Builds what the archive holds for the table; what could not be built is returned.
pub(super) async fn build(
    context: &CopyContext,
    table: &SourceTable,
    archive: &Arc<Archive>,
) -> Result<Vec<RestoreFailure>, CopyError> {
    let entries = archive.table_entries(table.oid);
    context.progress.indexes(table, 0, entries.len());
    let (alone, beside): (Vec<_>, Vec<_>) = if table.bytes < PARALLEL_FROM_BYTES {
        (entries.to_vec(), Vec::new())
    } else {
        entries.iter().cloned().partition(|entry| !may_run_beside(entry))
    };
    let mut built = alone.len();
    let mut failures = one_by_one(context, table, archive, alone).await.map_err(|source| failed(table, source))?;
    context.progress.indexes(table, built, entries.len());
    // Dropping the set ends every build.
    let mut builds = JoinSet::new();
    for entry in beside {
        let (context, table, archive) = (context.clone(), table.clone(), archive.clone());
        builds.spawn(async move { one_by_one(&context, &table, &archive, vec![entry]).await });
    }
    while let Some(ended) = builds.join_next().await {
        let ended = ended.map_err(|_| CopyError::Unreadable { table: table.name.clone(), what: "index build" })?;
        failures.extend(ended.map_err(|source| failed(table, source))?);
        built += 1;
        context.progress.indexes(table, built, entries.len());
    }
    if failures.is_empty() {
        if table.bytes >= ANALYZE_FROM_BYTES {
            let _permit = context.workers.index.acquire().await.expect("the semaphore is never closed");
            let analyzed = schema::analyze_table(&context.target, &context.database, &table.name).await;
            analyzed.map_err(|source| failed(table, source))?;
        }
        context.hit("copy.indexes_built", table).await?;
        let recorded = context.recorder.indexes_built(table).await;
        recorded.map_err(|source| CopyError::Record { table: table.name.clone(), source })?;
    }
    Ok(failures)
}

fn failed(table: &SourceTable, source: SchemaError) -> CopyError {
    CopyError::Indexes { table: table.name.clone(), source: Box::new(source) }
}

/// `CREATE INDEX` alone shares its lock with others of its kind. Constraints lock the table, and an index that is then
/// made the one to cluster by, or the replica identity, asks for a stronger lock at its end: two of those would wait for
/// each other.
fn may_run_beside(entry: &Entry) -> bool {
    entry.kind == "INDEX" && !entry.sql.contains("\nALTER ")
}

/// Counts a connection as building until it is dropped, however that comes about.
struct Building<'a> {
    context: &'a CopyContext,
    table: &'a SourceTable,
}

impl<'a> Building<'a> {
    fn of(context: &'a CopyContext, table: &'a SourceTable) -> Self {
        context.progress.building(table, 1);
        Self { context, table }
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        self.context.progress.building(self.table, -1);
    }
}

async fn one_by_one(
    context: &CopyContext,
    table: &SourceTable,
    archive: &Archive,
    entries: Vec<Entry>,
) -> Result<Vec<RestoreFailure>, SchemaError> {
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    let _permit = context.workers.index.acquire().await.expect("the semaphore is never closed");
    let _building = Building::of(context, table);
    let target =
        RestoreTarget { connector: &context.target, database: &context.database, guard: context.guard.as_deref() };
    let mut restorer = Restorer::open(target, archive, "index").await?;
    restorer.set("maintenance_work_mem", &context.config.maintenance_work_mem).await?;
    restorer.entries(&entries, Locking::Patient).await?;
    Ok(restorer.finish().failures)
}
