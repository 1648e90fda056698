//! One table: held, emptied on the target, and filled, by one pair of connections or by several.
//!
//! A table that one pair fills is emptied in the same transaction, so its rows are written frozen: nobody has to visit
//! them again to note that their transaction has committed (index builds would be the first, and on a server with data
//! checksums each such note is a page image in its write-ahead log). One that is worth more than a fair share of the
//! connections is opened for others to help with: they take part after part, under the same snapshot.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, watch};

use super::holder::{self, Holder};
use super::pairs::Pairs;
use super::parts::{self, Axis, Cutter, Part};
use super::tables::{self, Format};
use super::{CopiedRows, CopyContext, CopyError, SourceTable};
use crate::postgres::{RawConnection, RawError};

/// Attempts at a table whose connections break; each begins it anew.
const ATTEMPTS: u32 = 5;

/// Rows and bytes are reported, and a limit is kept, each time that about so many bytes were moved.
const REPORT_BYTES: u64 = 512 * 1024;

/// Whether others may help with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    Whole,
    InParts,
}

/// What the tables of a database share while they are copied.
#[derive(Default)]
pub(super) struct Board {
    pub(super) pairs: Pairs,
    open: Mutex<Vec<Arc<OpenTable>>>,
    /// A table was opened for others.
    pub(super) opened: Notify,
}

impl Board {
    fn post(&self, table: &Arc<OpenTable>) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).push(table.clone());
        self.opened.notify_one();
    }

    fn withdraw(&self, table: &Arc<OpenTable>) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).retain(|posted| !Arc::ptr_eq(posted, table));
    }

    /// Whether a further pair of connections would find something to do.
    pub(super) fn wants_help(&self) -> bool {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|table| table.wants_help())
    }

    /// Puts a helper's name down for the table that was opened first of those that want one.
    pub(super) fn enlist(&self) -> Option<Helper> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().find(|table| table.wants_help()).map(|table| {
            table.state.send_modify(|state| state.helpers += 1);
            Helper { table: table.clone() }
        })
    }
}

/// A table that others may help with: one attempt at it.
pub(super) struct OpenTable {
    work: Work,
    snapshot: String,
    state: watch::Sender<Attempt>,
}

struct Attempt {
    cutter: Cutter,
    helpers: usize,
    copied: CopiedRows,
    failure: Option<CopyError>,
}

impl OpenTable {
    fn wants_help(&self) -> bool {
        let state = self.state.borrow();
        state.failure.is_none() && state.cutter.is_worth_sharing()
    }

    fn next_part(&self) -> Option<Part> {
        let mut part = None;
        self.state.send_modify(|state| {
            if state.failure.is_none() {
                // As if somebody helped already: who opens it would take half of it before the others have come.
                part = state.cutter.cut((state.helpers + 1).max(2));
            }
        });
        part
    }

    /// Copies the parts that nobody else has taken, each in a transaction of the target.
    async fn take_parts(&self, source: &mut RawConnection, target: &mut RawConnection) -> Result<(), CopyError> {
        while let Some(part) = self.next_part() {
            self.work.begin(target).await?;
            let copied = self.work.pump(source, target, &part, Rows::Added).await?;
            self.work.on_target(target, "committing its rows", "COMMIT").await?;
            self.state.send_modify(|state| state.copied.add(copied));
            self.work.context.hit("copy.part_committed", &self.work.table).await?;
        }
        Ok(())
    }

    /// Resolves when somebody has failed; whoever waits for it gives up what it has in hand.
    async fn failed(&self) {
        self.until(|state| state.failure.is_some()).await;
    }

    /// The first failure is the one that is told.
    fn fail(&self, error: CopyError) {
        self.state.send_modify(|state| {
            state.failure.get_or_insert(error);
        });
    }

    async fn until(&self, condition: impl FnMut(&Attempt) -> bool) {
        let mut changes = self.state.subscribe();
        // The sender lives in self.
        let _met = changes.wait_for(condition).await;
    }
}

/// One that helps with a table. The table's own attempt ends only after every helper has been dropped, and with them
/// their connections: a part that was committed later would double its rows.
pub(super) struct Helper {
    table: Arc<OpenTable>,
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.table.state.send_modify(|state| state.helpers -= 1);
    }
}

impl Helper {
    /// Helps until nothing is left to take. What fails is reported by the table's own attempt.
    pub(super) async fn help(self, board: Arc<Board>, permit: OwnedSemaphorePermit) {
        let done = tokio::select! {
            done = self.take_parts(&board) => done,
            // Dropped connections make both servers roll back.
            () = self.table.failed() => Ok(()),
        };
        if let Err(error) = done {
            self.table.fail(error);
        }
        drop(self);
        drop(permit);
    }

    async fn take_parts(&self, board: &Board) -> Result<(), CopyError> {
        let work = &self.table.work;
        let mut source = board.pairs.source(&work.context).await?;
        let mut target = board.pairs.target(&work.context, &work.table).await?;
        holder::join(&work.context, &work.table, &self.table.snapshot, &mut source).await?;
        self.table.take_parts(&mut source, &mut target).await?;
        let ended = source.simple_query("COMMIT").await;
        ended.map_err(|source| error(&work.table, "source", "ending its transaction", source))?;
        board.pairs.give_back(source, target);
        Ok(())
    }
}

/// Copies the table. Every attempt begins with an empty table and a snapshot of its own.
pub(super) async fn copy(
    context: &CopyContext,
    board: &Board,
    table: &SourceTable,
    sharing: Sharing,
) -> Result<CopiedRows, CopyError> {
    let mut pause = Duration::from_secs(1);
    let mut attempt = 1;
    loop {
        match attempt_once(context, board, table, sharing).await {
            Err(error) if attempt < ATTEMPTS && error.may_pass() => {
                tracing::warn!(database = context.database, table = %table.name, attempt, %error, "copying the table again");
                board.pairs.forget();
                tokio::time::sleep(pause).await;
                pause *= 2;
                attempt += 1;
            }
            other => return other,
        }
    }
}

async fn attempt_once(
    context: &CopyContext,
    board: &Board,
    table: &SourceTable,
    sharing: Sharing,
) -> Result<CopiedRows, CopyError> {
    let mut holder = Holder::open(context, table, board.pairs.source(context).await?).await?;
    let mut target = board.pairs.target(context, table).await?;
    check_columns(table, &holder, &mut target).await?;
    context
        .recorder
        .snapshot_taken(table, &holder.hand_over)
        .await
        .map_err(|source| CopyError::Record { table: table.name.clone(), source })?;
    context.hit("copy.snapshot_taken", table).await?;

    let axis = if sharing == Sharing::InParts { holder.axis(table).await? } else { Axis::None };
    context.progress.started(table);
    let work = Work::new(context, table, &holder, axis);
    let copied = if work.axis == Axis::None {
        work.whole(&mut holder.connection, &mut target).await?
    } else {
        in_parts(board, &mut holder, &mut target, work).await?
    };
    let source = holder.end(table).await?;
    context.hit("copy.committed", table).await?;
    context
        .recorder
        .rows_copied(table, copied)
        .await
        .map_err(|source| CopyError::Record { table: table.name.clone(), source })?;
    context.hit("copy.recorded", table).await?;
    board.pairs.give_back(source, target);
    Ok(copied)
}

/// Opens the table for others, and takes parts of it like them.
async fn in_parts(
    board: &Board,
    holder: &mut Holder,
    target: &mut RawConnection,
    work: Work,
) -> Result<CopiedRows, CopyError> {
    let snapshot = holder.export(&work.table).await?;
    work.empty(target).await?;
    let cutter = Cutter::new(&work.axis, work.table.bytes, work.context.config.part_bytes);
    let attempt = Attempt { cutter, helpers: 0, copied: CopiedRows::default(), failure: None };
    let open = Arc::new(OpenTable { work, snapshot, state: watch::Sender::new(attempt) });
    board.post(&open);
    let done = tokio::select! {
        done = open.take_parts(&mut holder.connection, target) => done,
        () = open.failed() => Ok(()),
    };
    board.withdraw(&open);
    if let Err(error) = done {
        open.fail(error);
    }
    open.until(|state| state.helpers == 0).await;
    let mut result = Ok(CopiedRows::default());
    open.state.send_modify(|state| result = state.failure.take().map_or(Ok(state.copied), Err));
    result
}

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    /// Into a table that this very transaction has emptied.
    Frozen,
    /// Beside others.
    Added,
}

/// The statements of a table's copy.
struct Work {
    context: CopyContext,
    table: SourceTable,
    columns: Option<String>,
    options: String,
    axis: Axis,
}

impl Work {
    fn new(context: &CopyContext, table: &SourceTable, holder: &Holder, axis: Axis) -> Self {
        let options = match tables::format(&holder.columns, &holder.encoding) {
            Format::Binary => "FORMAT binary".to_owned(),
            Format::Text => format!("FORMAT text, ENCODING '{}'", holder.encoding),
        };
        let columns = tables::column_list(&holder.columns);
        Self { context: context.clone(), table: table.clone(), columns, options, axis }
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

    fn in_(&self, rows: Rows) -> String {
        let columns = self.columns.as_ref().map_or_else(String::new, |columns| format!(" ({columns})"));
        let freeze = if rows == Rows::Frozen { ", FREEZE" } else { "" };
        format!("COPY {}{columns} FROM STDIN WITH ({}{freeze})", self.table.name, self.options)
    }

    /// The statement that removes what an earlier attempt left.
    fn emptying(&self) -> String {
        match &self.table.filter {
            Some(filter) => format!("DELETE FROM ONLY {} {filter}", self.table.name),
            // Another one of the extension's may refer to it, by a foreign key that came with it: TRUNCATE is refused then.
            None if self.table.of_extension => format!("DELETE FROM ONLY {}", self.table.name),
            None => format!("TRUNCATE ONLY {}", self.table.name),
        }
    }

    /// Everything in one transaction: emptied, and filled.
    async fn whole(&self, source: &mut RawConnection, target: &mut RawConnection) -> Result<CopiedRows, CopyError> {
        self.begin(target).await?;
        self.on_target(target, "emptying it", &self.emptying()).await?;
        // FREEZE needs a table that was truncated.
        let rows = if self.table.of_extension { Rows::Added } else { Rows::Frozen };
        let copied = self.pump(source, target, &parts::WHOLE, rows).await?;
        self.on_target(target, "committing its rows", "COMMIT").await?;
        Ok(copied)
    }

    async fn empty(&self, target: &mut RawConnection) -> Result<(), CopyError> {
        self.begin(target).await?;
        self.on_target(target, "emptying it", &self.emptying()).await?;
        self.on_target(target, "emptying it", "COMMIT").await
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
        rows: Rows,
    ) -> Result<CopiedRows, CopyError> {
        let copy = |source| CopyError::Copy { table: self.table.name.clone(), source };
        let mut reader = source.copy_out(&self.out(part)).await.map_err(copy)?;
        let mut writer = target.copy_in(&self.in_(rows)).await.map_err(copy)?;
        let mut bytes = 0;
        while let Some(moved) = reader.hand_on(&mut writer, REPORT_BYTES).await.map_err(copy)? {
            bytes += moved.bytes;
            // One message for each row, so this is exact but for binary's trailer.
            self.context.progress.moved(&self.table, moved.messages, moved.bytes);
            self.context.workers.pace.moved(moved.bytes).await;
        }
        let sent = reader.rows().unwrap_or_default();
        let taken = writer.finish().await.map_err(copy)?;
        if sent != taken {
            return Err(CopyError::Count { table: self.table.name.clone(), sent, taken });
        }
        Ok(CopiedRows { rows: taken, bytes })
    }
}

/// The definitions were dumped before the table was locked; in between it may have been altered.
async fn check_columns(table: &SourceTable, holder: &Holder, target: &mut RawConnection) -> Result<(), CopyError> {
    let there = tables::columns(target, &table.name).await;
    let there = there.map_err(|source| error(table, "target", "reading its columns", source))?;
    match tables::difference(&holder.columns, &there, table.of_extension) {
        None => Ok(()),
        Some(difference) => Err(CopyError::Columns { table: table.name.clone(), difference }),
    }
}

fn error(table: &SourceTable, server: &'static str, doing: &'static str, source: RawError) -> CopyError {
    CopyError::Server { table: table.name.clone(), server, doing, source: Box::new(source) }
}
