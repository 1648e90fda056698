//! One table: held, emptied on the target, read in parts and written by as many connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::holder::{self, Holder};
use super::parts::{self, Axis, Part};
use super::tables::{self, Format};
use super::{CopiedRows, CopyContext, CopyError, SourceTable};
use crate::postgres::{RawConnection, RawError};

/// Attempts at a table whose connections break; each begins it anew.
const ATTEMPTS: u32 = 5;

/// Rows and bytes are reported after about so many bytes.
const REPORT_BYTES: u64 = 256 * 1024;

/// Copies the table with one connection pair for each permit. Every attempt begins with an empty table and a snapshot of
/// its own.
pub(super) async fn copy(
    context: &CopyContext,
    table: &SourceTable,
    permits: OwnedSemaphorePermit,
) -> Result<CopiedRows, CopyError> {
    let readers = permits.num_permits();
    let permits = PermitPool(std::sync::Mutex::new(Some(permits)));
    let mut pause = Duration::from_secs(1);
    let mut attempt = 1;
    loop {
        match attempt_once(context, table, readers, &permits).await {
            Err(error) if attempt < ATTEMPTS && error.may_pass() => {
                tracing::warn!(database = context.database, table = %table.name, attempt, %error, "copying the table again");
                tokio::time::sleep(pause).await;
                pause *= 2;
                attempt += 1;
            }
            other => return other,
        }
    }
}

/// The permits of a table, given back one by one as its readers run out of parts.
struct PermitPool(std::sync::Mutex<Option<OwnedSemaphorePermit>>);

impl PermitPool {
    /// Gives one back, but the last.
    fn release_one(&self) {
        let mut permits = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(permits) = permits.as_mut().filter(|permits| permits.num_permits() > 1) {
            drop(permits.split(1));
        }
    }
}

async fn attempt_once(
    context: &CopyContext,
    table: &SourceTable,
    readers: usize,
    permits: &PermitPool,
) -> Result<CopiedRows, CopyError> {
    let mut holder = Holder::open(context, table).await?;
    let mut first = target_connection(context, table).await?;
    check_columns(table, &holder, &mut first).await?;
    context
        .recorder
        .snapshot_taken(table, &holder.hand_over)
        .await
        .map_err(|source| CopyError::Record { table: table.name.clone(), source })?;
    context.hit("copy.snapshot_taken", table).await?;

    let axis = if readers > 1 { holder.axis(table).await? } else { Axis::None };
    let parts = parts::cut(&axis, if readers > 1 { parts::wanted(table.bytes, context.config.part_bytes) } else { 1 });
    context.progress.started(table, parts.len());
    let work = Arc::new(Work::new(context, table, &holder, axis, parts));
    let copied = if work.parts.len() == 1 {
        (1..readers).for_each(|_| permits.release_one());
        work.whole(&mut holder.connection, &mut first).await?
    } else {
        in_parts(context, table, &mut holder, first, &work, readers, permits).await?
    };
    // Ends the transaction, and with it the lock.
    let ended = holder.connection.simple_query("COMMIT").await;
    ended.map_err(|source| error(table, "source", "ending its transaction", source))?;
    context.hit("copy.committed", table).await?;
    context
        .recorder
        .rows_copied(table, copied)
        .await
        .map_err(|source| CopyError::Record { table: table.name.clone(), source })?;
    context.hit("copy.recorded", table).await?;
    Ok(copied)
}

/// Several readers take part after part; the holder is one of them.
async fn in_parts(
    context: &CopyContext,
    table: &SourceTable,
    holder: &mut Holder,
    mut first: RawConnection,
    work: &Arc<Work>,
    readers: usize,
    permits: &PermitPool,
) -> Result<CopiedRows, CopyError> {
    let snapshot = holder.export(table).await?;
    let mut joined = Vec::new();
    for _ in 1..readers.min(work.parts.len()) {
        joined.push((holder::join(context, table, &snapshot).await?, target_connection(context, table).await?));
    }
    for _ in work.parts.len()..readers {
        permits.release_one();
    }
    work.empty(&mut first).await?;
    // Dropping the set, on an error or from outside, ends every reader: their transactions roll back.
    let mut others = JoinSet::new();
    for (mut source, mut target) in joined {
        let work = work.clone();
        others.spawn(async move { work.take_parts(&mut source, &mut target).await });
    }
    let mut total = work.take_parts(&mut holder.connection, &mut first).await?;
    permits.release_one();
    while let Some(ended) = others.join_next().await {
        let copied = ended.map_err(|_| CopyError::Unreadable { table: table.name.clone(), what: "part" })??;
        permits.release_one();
        total.add(copied);
    }
    Ok(total)
}

/// The statements of a table's copy, and its parts.
struct Work {
    context: CopyContext,
    table: SourceTable,
    columns: Option<String>,
    options: String,
    axis: Axis,
    parts: Vec<Part>,
    next: AtomicUsize,
}

impl Work {
    fn new(context: &CopyContext, table: &SourceTable, holder: &Holder, axis: Axis, parts: Vec<Part>) -> Self {
        let options = match tables::format(&holder.columns, &holder.encoding) {
            Format::Binary => "FORMAT binary".to_owned(),
            Format::Text => format!("FORMAT text, ENCODING '{}'", holder.encoding),
        };
        Self {
            context: context.clone(),
            table: table.clone(),
            columns: tables::column_list(&holder.columns),
            options,
            axis,
            parts,
            next: AtomicUsize::new(0),
        }
    }

    fn out(&self, part: &Part) -> String {
        let name = &self.table.name;
        let condition = match &self.table.filter {
            // The extension's own text begins with WHERE.
            Some(filter) => Some(filter.clone()),
            None => part.condition(&self.axis).map(|condition| format!("WHERE {condition}")),
        };
        match (&self.columns, condition) {
            (columns, Some(condition)) => format!(
                "COPY (SELECT {} FROM ONLY {name} {condition}) TO STDOUT WITH ({})",
                columns.as_deref().unwrap_or_default(),
                self.options
            ),
            (Some(columns), None) => format!("COPY {name} ({columns}) TO STDOUT WITH ({})", self.options),
            (None, None) => format!("COPY {name} TO STDOUT WITH ({})", self.options),
        }
    }

    fn in_(&self) -> String {
        let columns = self.columns.as_ref().map_or_else(String::new, |columns| format!(" ({columns})"));
        format!("COPY {}{columns} FROM STDIN WITH ({})", self.table.name, self.options)
    }

    /// The statement that removes what an earlier attempt left.
    fn emptying(&self) -> String {
        match &self.table.filter {
            Some(filter) => format!("DELETE FROM ONLY {} {filter}", self.table.name),
            None => format!("TRUNCATE ONLY {}", self.table.name),
        }
    }

    /// Everything in one transaction: emptied, and filled.
    async fn whole(&self, source: &mut RawConnection, target: &mut RawConnection) -> Result<CopiedRows, CopyError> {
        self.begin(target).await?;
        self.on_target(target, "emptying it", &self.emptying()).await?;
        let copied = self.pump(source, target, &parts::WHOLE).await?;
        self.on_target(target, "committing its rows", "COMMIT").await?;
        Ok(copied)
    }

    async fn empty(&self, target: &mut RawConnection) -> Result<(), CopyError> {
        self.begin(target).await?;
        self.on_target(target, "emptying it", &self.emptying()).await?;
        self.on_target(target, "emptying it", "COMMIT").await
    }

    /// Copies the parts that nobody else has taken, each in a transaction of the target.
    async fn take_parts(
        &self,
        source: &mut RawConnection,
        target: &mut RawConnection,
    ) -> Result<CopiedRows, CopyError> {
        let mut total = CopiedRows::default();
        while let Some(part) = self.parts.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            self.begin(target).await?;
            total.add(self.pump(source, target, part).await?);
            self.on_target(target, "committing its rows", "COMMIT").await?;
            self.context.hit("copy.part_committed", &self.table).await?;
        }
        Ok(total)
    }

    /// Begins a transaction on the target, if no other engine has taken over.
    async fn begin(&self, target: &mut RawConnection) -> Result<(), CopyError> {
        self.on_target(target, "beginning a transaction", "BEGIN").await?;
        let Some(guard) = &self.context.guard else { return Ok(()) };
        let rows = target.simple_query(guard).await;
        let rows = rows.map_err(|source| error(&self.table, "target", "asking who owns the migration", source))?;
        if rows.is_empty() {
            return Err(CopyError::Superseded { table: self.table.name.clone() });
        }
        Ok(())
    }

    async fn on_target(&self, target: &mut RawConnection, doing: &'static str, sql: &str) -> Result<(), CopyError> {
        let done = target.simple_query(sql).await;
        done.map(|_| ()).map_err(|source| error(&self.table, "target", doing, source))
    }

    /// Bytes from COPY to COPY. Both servers count rows, and must agree.
    async fn pump(
        &self,
        source: &mut RawConnection,
        target: &mut RawConnection,
        part: &Part,
    ) -> Result<CopiedRows, CopyError> {
        let copy = |source| CopyError::Copy { table: self.table.name.clone(), source };
        let mut reader = source.copy_out(&self.out(part)).await.map_err(copy)?;
        let mut writer = target.copy_in(&self.in_()).await.map_err(copy)?;
        let mut copied = CopiedRows::default();
        let mut unreported = CopiedRows::default();
        while let Some(data) = reader.next().await.map_err(copy)? {
            writer.send(&data).await.map_err(copy)?;
            // A server sends one message for each row, so this is exact but for binary's trailer.
            unreported.add(CopiedRows { rows: 1, bytes: data.len() as u64 });
            if unreported.bytes >= REPORT_BYTES {
                copied.add(unreported);
                self.context.progress.moved(&self.table, unreported.rows, unreported.bytes);
                unreported = CopiedRows::default();
            }
        }
        copied.add(unreported);
        self.context.progress.moved(&self.table, unreported.rows, unreported.bytes);
        let sent = reader.rows().unwrap_or_default();
        let taken = writer.finish().await.map_err(copy)?;
        if sent != taken {
            return Err(CopyError::Count { table: self.table.name.clone(), sent, taken });
        }
        Ok(CopiedRows { rows: taken, bytes: copied.bytes })
    }
}

/// A writer on the target: no trigger, rule or foreign key acts on what it writes.
async fn target_connection(context: &CopyContext, table: &SourceTable) -> Result<RawConnection, CopyError> {
    let mut connection = context.target.raw(&context.target.own_login(&context.database, "copy")).await?;
    let set = connection.simple_query("SET session_replication_role = replica").await;
    set.map_err(|source| error(table, "target", "setting session_replication_role", source))?;
    Ok(connection)
}

/// The definitions were dumped before the table was locked; in between it may have been altered.
async fn check_columns(table: &SourceTable, holder: &Holder, target: &mut RawConnection) -> Result<(), CopyError> {
    let there = tables::columns(target, &table.name).await;
    let there = there.map_err(|source| error(table, "target", "reading its columns", source))?;
    match tables::difference(&holder.columns, &there) {
        None => Ok(()),
        Some(difference) => Err(CopyError::Columns { table: table.name.clone(), difference }),
    }
}

fn error(table: &SourceTable, server: &'static str, doing: &'static str, source: RawError) -> CopyError {
    CopyError::Server { table: table.name.clone(), server, doing, source: Box::new(source) }
}
