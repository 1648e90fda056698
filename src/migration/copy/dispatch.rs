//! Who copies what: every permit that is free goes to a table that wants help, else to the largest one that nobody has
//! begun. Indexes are built beside, as tables end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{AcquireError, OwnedSemaphorePermit};
use tokio::task::{JoinError, JoinSet};

use super::table::{self, Board, Sharing};
use super::{CopiedRows, CopyContext, CopyError, CopyReport, SourceTable, Stage, indexes};
use crate::migration::schema::{Archive, RestoreFailure};

/// What one task came to.
#[derive(Default)]
struct Ended {
    copied: Option<CopiedRows>,
    failures: Vec<RestoreFailure>,
}

type Running = JoinSet<Result<Ended, CopyError>>;

/// A place in the queue for permits, kept while other things happen.
type Permit = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// See [`super::copy_database`].
pub(super) async fn run(
    context: &CopyContext,
    tables: &[(SourceTable, Stage)],
    archive: &Arc<Archive>,
) -> Result<CopyReport, CopyError> {
    let board = Arc::new(Board::default());
    let mut report = CopyReport::default();
    // Dropping the set, on an error or from outside, ends every table.
    let mut running = Running::new();
    let mut queue: Vec<SourceTable> = Vec::new();
    for (table, stage) in tables {
        match stage {
            Stage::Rows => queue.push(table.clone()),
            Stage::Indexes => build_indexes(&mut running, context, table.clone(), archive),
        }
    }
    queue.sort_by_key(|table| std::cmp::Reverse(table.bytes));
    let mut queue = VecDeque::from(queue);
    let mut left: u64 = queue.iter().map(|table| table.bytes).sum();
    let mut permit: Option<Permit> = None;
    loop {
        if queue.is_empty() && running.is_empty() {
            return Ok(report);
        }
        if queue.is_empty() && !board.wants_help() {
            // A place that is no longer needed is given up: other databases wait in the same queue.
            permit = None;
        } else if permit.is_none() {
            permit = Some(Box::pin(context.workers.copy.clone().acquire_owned()));
        }
        tokio::select! {
            granted = when_granted(&mut permit) => {
                permit = None;
                if let Some(helper) = board.enlist() {
                    let board = board.clone();
                    running.spawn(async move {
                        helper.help(board, granted).await;
                        Ok(Ended::default())
                    });
                } else if let Some(table) = queue.pop_front() {
                    let sharing = sharing(context, &table, left);
                    left = left.saturating_sub(table.bytes);
                    copy_one(&mut running, context, &board, table, sharing, granted, archive);
                }
            }
            // Cancel-safe. While nothing runs, because other databases have every place, it would be done at once and for
            // ever, and they would never get their turn.
            Some(ended) = running.join_next(), if !running.is_empty() => report.add(finished(ended)?),
            // A notification that came before is kept.
            () = board.opened.notified() => {}
        }
    }
}

async fn when_granted(permit: &mut Option<Permit>) -> OwnedSemaphorePermit {
    match permit {
        Some(permit) => permit.await.expect("the semaphore is never closed"),
        None => std::future::pending().await,
    }
}

/// Whether a table is worth several connections while `left` bytes, its own among them, are still to be begun. Whole is
/// cheaper for both servers (its rows are written frozen), so a table is shared only where one connection would be at it
/// when the others have long run out of work.
fn sharing(context: &CopyContext, table: &SourceTable, left: u64) -> Sharing {
    let workers = context.config.copy_workers.max(1);
    let fair_share = left / u64::try_from(workers).unwrap_or(u64::MAX);
    let is_large = table.bytes > context.config.part_bytes && table.bytes > fair_share;
    if table.filter.is_none() && workers > 1 && is_large { Sharing::InParts } else { Sharing::Whole }
}

fn copy_one(
    running: &mut Running,
    context: &CopyContext,
    board: &Arc<Board>,
    table: SourceTable,
    sharing: Sharing,
    permit: OwnedSemaphorePermit,
    archive: &Arc<Archive>,
) {
    let (context, board, archive) = (context.clone(), board.clone(), archive.clone());
    running.spawn(async move {
        let copied = table::copy(&context, &board, &table, sharing).await?;
        drop(permit);
        let failures = indexes::build(&context, &table, &archive).await?;
        Ok(Ended { copied: Some(copied), failures })
    });
}

fn build_indexes(running: &mut Running, context: &CopyContext, table: SourceTable, archive: &Arc<Archive>) {
    let (context, archive) = (context.clone(), archive.clone());
    running.spawn(async move {
        let failures = indexes::build(&context, &table, &archive).await?;
        Ok(Ended { copied: None, failures })
    });
}

impl CopyReport {
    fn add(&mut self, ended: Ended) {
        if let Some(copied) = ended.copied {
            self.tables += 1;
            self.copied.add(copied);
        }
        self.failures.extend(ended.failures);
    }
}

fn finished(ended: Result<Result<Ended, CopyError>, JoinError>) -> Result<Ended, CopyError> {
    match ended {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Nobody aborts a table; its runtime is shutting down.
            Err(_) => Err(CopyError::Stopped),
        },
    }
}
