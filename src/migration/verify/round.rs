//! One round: a pair of snapshots, and as much as is read under it.
//!
//! As long as a snapshot lives, no version of a row that was replaced since can be removed, and a row that is updated all
//! the time has more of them every second. So a round is short where there is other work, and the rest that follows is taken
//! when its snapshots are gone; only what must be read under one snapshot is read to its end.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, TryStreamExt as _};
use tokio::time::Instant;

use super::align::{Pair, align};
use super::chunks::{Begun, ChunkResult};
use super::descend::Found;
use super::expression::Hasher;
use super::repair::Damage;
use super::table::{self, Part, Plan, Sums};
use super::{Damaged, Past, TableResult, VerifyContext, VerifyError, descend, hasher, prepare, unreadable};
use crate::ident::QualifiedName;
use crate::postgres::Control;

/// A round ends with the part that makes it this large, in bytes, or with the table where that is compared as a whole: no
/// snapshot holds back vacuum for ever.
const ROUND_BYTES: u64 = 16 << 30;

/// No part is begun later than this in a round, but for those of tables that are compared as a whole.
const ROUND_TIME: Duration = Duration::from_secs(30);

/// A longer rest ends the round.
const SHORT_REST: Duration = Duration::from_millis(250);

/// Tables are looked at for so long before those that were are read.
const PLAN_TIME: Duration = Duration::from_secs(2);

/// A source that had other work to do is spared for so long.
const BUSY: Duration = Duration::from_secs(5);

/// Whether a client that is none of ours has a statement or a transaction open. Sessions of which nothing is shown count.
const OTHERS: &str = "
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE coalesce(backend_type, 'client backend') = 'client backend' AND coalesce(state, 'active') <> 'idle'
                  AND coalesce(application_name, '') !~ '^pgcutover/' AND pid <> pg_backend_pid())";

/// Times that a table is repaired before what still differs is reported.
const REPAIRS: u32 = 20;

/// What a round came to.
pub(super) enum Ended {
    Compared(TableResult),
    /// It is compared range by range from now on.
    Begun(QualifiedName, Begun),
    /// One of its ranges is.
    Chunk(QualifiedName, u32, ChunkResult),
    Rewritten(QualifiedName),
    /// It is to be repaired.
    Damaged(Arc<Plan>, Damage),
}

/// Compares the first of `left`, or `locked` if there are any, under one pair of snapshots. What is in `done` is done, also
/// when it fails. Returns how long to rest before the next one.
pub(super) async fn round(
    context: &VerifyContext,
    left: &VecDeque<QualifiedName>,
    locked: &[QualifiedName],
    pasts: &HashMap<QualifiedName, Past>,
    done: &Mutex<Vec<Ended>>,
) -> Result<Duration, VerifyError> {
    let pair = match align(&context.sides, locked).await {
        // Nothing but the lock says a word about a table.
        Err(error) if !locked.is_empty() && error.about_a_definition().is_some() => {
            for table in locked {
                let problem = if error.is_about_a_missing_table() { table::MISSING } else { &refusal(&error) };
                refused(context, done, table, problem).await?;
            }
            return Ok(Duration::ZERO);
        }
        pair => pair?,
    };
    let hasher = hasher(&pair).await?;
    let mut round = Round {
        context,
        locked: !locked.is_empty(),
        pair: &pair,
        pasts,
        done,
        plans: Vec::new(),
        progress: Vec::new(),
        reading_since: Instant::now(),
        rest: Mutex::default(),
        busy: Mutex::default(),
        idle: Mutex::default(),
    };
    if round.locked {
        // A session of its own would queue for its lock behind a TRUNCATE that waits for the holder's.
        prepare(&pair.source, &pair.target).await?;
    }
    // What is locked is read alone, to be done with it soon.
    let tables = left.iter().filter(|table| locked.is_empty() || locked.contains(table));
    let parts = Box::pin(round.plan(tables, &hasher)).await?;
    let workers = if round.locked { 1 } else { context.workers.max(1) };
    round.reading_since = Instant::now();
    let round = &round;
    let parts = stream::iter(parts.into_iter().map(Ok));
    parts.try_for_each_concurrent(workers, |(index, part)| round.part(index, part)).await?;
    Ok(*lock(&round.rest))
}

fn note(done: &Mutex<Vec<Ended>>, ended: Ended) {
    lock(done).push(ended);
}

/// A table cannot be read, which says nothing about the others.
async fn refused(
    context: &VerifyContext,
    done: &Mutex<Vec<Ended>>,
    table: &QualifiedName,
    problem: &str,
) -> Result<(), VerifyError> {
    tracing::warn!(%table, problem, "a table cannot be compared");
    let result = unreadable(table, problem);
    context.observer.finished(&result).await?;
    note(done, Ended::Compared(result));
    Ok(())
}

/// What a server has said.
fn refusal(error: &VerifyError) -> String {
    let said = error.about_a_definition().map_or_else(|| error.to_string(), |error| error.message().to_owned());
    format!("it cannot be read: {said}")
}

/// What became of an attempt to read.
enum Tried {
    Done,
    /// The table is not any more what was looked at.
    Replaced,
    /// It is, and a server will not have it read.
    Refused(String),
}

/// What the workers of a round share.
struct Round<'a> {
    context: &'a VerifyContext,
    /// The holders themselves read.
    locked: bool,
    pair: &'a Pair,
    plans: Vec<Arc<Plan>>,
    pasts: &'a HashMap<QualifiedName, Past>,
    /// For each plan, what was found so far.
    progress: Vec<Mutex<Progress>>,
    done: &'a Mutex<Vec<Ended>>,
    /// When the first part was begun.
    reading_since: Instant,
    /// The longest that is left to take; not zero: the round ends.
    rest: Mutex<Duration>,
    /// When the source was last seen at other work.
    busy: Mutex<Option<Instant>>,
    /// Sessions that no worker has at the moment.
    idle: Mutex<Vec<Worker>>,
}

/// What a round has found of one table.
#[derive(Default)]
struct Progress {
    /// Parts that are not read yet.
    left: usize,
    /// One of them is, or is being read.
    begun: bool,
    /// One of them is for another round.
    put_off: bool,
    /// Of a table that is compared as a whole.
    sums: Sums,
    /// Of one that is not: what this round has compared.
    chunks: BTreeMap<u32, ChunkResult>,
    /// Rows to repair; their ranges are read again.
    damage: Damage,
    /// It was rewritten under the snapshot; the ranges in which that was seen are read again.
    rewritten: bool,
    /// It cannot be read at all.
    problem: Option<String>,
}

impl Progress {
    fn note(&mut self, tried: Tried) {
        match tried {
            Tried::Done => {}
            Tried::Replaced => self.rewritten = true,
            Tried::Refused(problem) => self.problem = Some(problem),
        }
    }
}

/// Who reads one part.
#[derive(Clone, Copy)]
pub(super) struct Readers<'a> {
    pub(super) source: &'a Control,
    pub(super) target: &'a Control,
    /// The snapshots to join for it; none: they are the holders.
    snapshots: Option<(&'a str, &'a str)>,
}

impl Readers<'_> {
    pub(super) async fn join(&self) -> Result<(), VerifyError> {
        let Some((source, target)) = self.snapshots else { return Ok(()) };
        tokio::try_join!(table::join(self.source, source), table::join(self.target, target)).map(|_| ())
    }

    /// Locks on tables are held no longer.
    pub(super) async fn leave(&self) -> Result<(), VerifyError> {
        if self.snapshots.is_none() {
            return Ok(());
        }
        tokio::try_join!(table::leave(self.source), table::leave(self.target)).map(|_| ())
    }
}

/// A session on each server.
struct Worker {
    source: Control,
    target: Control,
}

impl Round<'_> {
    /// What is to be read: number of the plan, number of the part.
    async fn plan(
        &mut self,
        tables: impl Iterator<Item = &QualifiedName>,
        hasher: &Hasher,
    ) -> Result<Vec<(usize, u32)>, VerifyError> {
        let (mut parts, mut bytes) = (Vec::new(), 0);
        // Under no snapshot: a sample's lock on the table is gone with the statement.
        let own = if self.locked { None } else { Some(self.worker().await?) };
        let (source, target) =
            own.as_ref().map_or((&self.pair.source, &self.pair.target), |own| (&own.source, &own.target));
        let samplers = Readers { source, target, snapshots: None };
        let since = Instant::now();
        for table in tables {
            let begun = self.pasts.get(table).and_then(|past| past.begun.as_ref());
            let made = match Plan::make(self.pair, samplers, self.context, table, hasher, begun).await {
                Err(error) if error.about_a_definition().is_some() && self.locked => {
                    self.refused(table, &refusal(&error)).await?;
                    // It was the only one, and the holders' transactions have failed.
                    break;
                }
                // If that is not why, it is told when the table is locked.
                Err(error) if error.about_a_definition().is_some() => {
                    self.rewritten(table);
                    continue;
                }
                made => made?,
            };
            let plan = match made {
                Ok(plan) => Arc::new(plan),
                Err(problem) => {
                    self.refused(table, &problem).await?;
                    continue;
                }
            };
            if let Some(new) = plan.begun().filter(|new| begun.is_none_or(|begun| begun.layout != new.layout)) {
                self.context.observer.begun(table, new).await?;
                note(self.done, Ended::Begun(table.clone(), new.clone()));
                // What was compared of it is void. Counted, so that it comes to an end.
                if begun.is_some_and(|begun| !begun.done.is_empty()) {
                    self.rewritten(table);
                    continue;
                }
            }
            let mut left = plan.left();
            if plan.begun().is_some() {
                let room = ROUND_BYTES.saturating_sub(bytes) / plan.part_bytes().max(1);
                left.truncate(usize::try_from(room).unwrap_or(usize::MAX).max(1));
            }
            bytes += plan.part_bytes() * left.len() as u64;
            if left.is_empty() {
                self.complete_chunks(&plan, Progress::default()).await?;
            }
            parts.extend(left.iter().map(|part| (self.plans.len(), *part)));
            self.progress.push(Mutex::new(Progress { left: left.len(), ..Progress::default() }));
            self.plans.push(plan);
            if bytes >= ROUND_BYTES || since.elapsed() >= PLAN_TIME {
                break;
            }
        }
        lock(&self.idle).extend(own);
        Ok(parts)
    }

    async fn worker(&self) -> Result<Worker, VerifyError> {
        let idle = lock(&self.idle).pop();
        if let Some(worker) = idle {
            return Ok(worker);
        }
        let sides = &self.context.sides;
        let (source, target) = tokio::try_join!(sides.enter_source("verify"), sides.enter_target("verify"),)?;
        prepare(&source, &target).await?;
        Ok(Worker { source, target })
    }

    async fn part(&self, index: usize, number: u32) -> Result<(), VerifyError> {
        if self.locked {
            let (source, target) = (&self.pair.source, &self.pair.target);
            return self.part_by(index, number, Readers { source, target, snapshots: None }).await;
        }
        let worker = self.worker().await?;
        let (source, target) = (&worker.source, &worker.target);
        let snapshots = Some((self.pair.source_snapshot.as_str(), self.pair.target_snapshot.as_str()));
        self.part_by(index, number, Readers { source, target, snapshots }).await?;
        lock(&self.idle).push(worker);
        Ok(())
    }

    /// Whether nothing is begun any more that can wait.
    fn is_over(&self) -> bool {
        !self.locked && (!lock(&self.rest).is_zero() || self.reading_since.elapsed() >= ROUND_TIME)
    }

    /// Whether this part of a table must be read in this round if any is.
    fn must_be_read(&self, plan: &Plan, progress: &Mutex<Progress>) -> bool {
        let mut progress = lock(progress);
        if progress.problem.is_some() {
            return false;
        }
        let put_off = self.is_over() && (plan.begun().is_some() || !progress.begun);
        progress.begun |= !put_off;
        progress.put_off |= put_off;
        !put_off
    }

    async fn part_by(&self, index: usize, number: u32, readers: Readers<'_>) -> Result<(), VerifyError> {
        let (Some(plan), Some(progress)) = (self.plans.get(index), self.progress.get(index)) else { return Ok(()) };
        let began = Instant::now();
        let is_read = self.must_be_read(plan, progress);
        if is_read {
            let tried = self.tried(plan, self.read(plan, progress, number, readers).await, readers).await?;
            lock(progress).note(tried);
        }
        let complete = {
            let mut progress = lock(progress);
            progress.left -= 1;
            (progress.left == 0).then(|| std::mem::take(&mut *progress))
        };
        let goes_on = complete.is_none() && plan.begun().is_none();
        match complete {
            Some(Progress { problem: Some(problem), .. }) => self.refused(&plan.table, &problem).await?,
            Some(progress) if plan.begun().is_some() => self.complete_chunks(plan, progress).await?,
            Some(progress) if progress.rewritten => self.rewritten(&plan.table),
            Some(progress) if !progress.put_off => {
                match self.tried(plan, self.complete(plan, progress.sums, readers).await, readers).await? {
                    Tried::Done => {}
                    Tried::Replaced => self.rewritten(&plan.table),
                    Tried::Refused(problem) => self.refused(&plan.table, &problem).await?,
                }
            }
            Some(_) | None => {}
        }
        if !is_read {
            return Ok(());
        }
        let share = if self.is_busy(readers).await { self.context.busy_percent } else { self.context.load_percent };
        let rest = rest(began.elapsed(), share);
        if goes_on || self.locked || rest <= SHORT_REST {
            tokio::time::sleep(rest).await;
        } else {
            let mut longest = lock(&self.rest);
            *longest = rest.max(*longest);
        }
        Ok(())
    }

    /// Reads one part, and compares it where that can be done by itself.
    async fn read(
        &self,
        plan: &Arc<Plan>,
        progress: &Mutex<Progress>,
        number: u32,
        readers: Readers<'_>,
    ) -> Result<(), VerifyError> {
        let Part { sums, rows, bytes } = plan.read(readers, number).await?;
        self.context.observer.moved(rows, bytes);
        if plan.begun().is_some() {
            self.chunk(plan, progress, number, sums, readers).await?;
        } else {
            lock(progress).sums.add(sums);
        }
        Ok(())
    }

    /// Whether what was tried failed because the table is not any more what was looked at, or because it is. What is locked
    /// stays what it is.
    async fn tried(
        &self,
        plan: &Plan,
        tried: Result<(), VerifyError>,
        readers: Readers<'_>,
    ) -> Result<Tried, VerifyError> {
        let error = match tried {
            Ok(()) => return Ok(Tried::Done),
            Err(error) if error.about_a_definition().is_some() => error,
            Err(error) => return Err(error),
        };
        readers.leave().await?;
        // The transactions of the holders have failed.
        if !self.locked && plan.rewritten(readers.source, readers.target).await? {
            tracing::debug!(%error, "a table was replaced while it was read");
            return Ok(Tried::Replaced);
        }
        Ok(Tried::Refused(refusal(&error)))
    }

    /// Whether the source had other work to do just now. Asked after each part, and remembered for a while, because one
    /// look may fall between two statements.
    async fn is_busy(&self, readers: Readers<'_>) -> bool {
        // Within a transaction the answer would stay the same; what is locked is to be read soon in any case.
        if !self.locked {
            let others = readers.source.query_one(OTHERS, &[]).await;
            // What cannot be told is spared.
            if others.map_or(true, |row| row.get(0)) {
                *lock(&self.busy) = Some(Instant::now());
            }
        }
        let seen = *lock(&self.busy);
        seen.is_some_and(|seen| seen.elapsed() < BUSY)
    }

    /// What is wrong where the sums of a part, or of all, tell that something is.
    async fn look(&self, plan: &Plan, number: u32, sums: &Sums, readers: Readers<'_>) -> Result<Found, VerifyError> {
        if sums.differing().is_empty() {
            return Ok(Found::default());
        }
        let buckets = plan.buckets(readers, number).await?;
        descend::rows(plan, readers, number, &buckets).await
    }

    /// Whether what was read means nothing. Asked after it was read.
    async fn is_void(&self, plan: &Plan, readers: Readers<'_>) -> Result<bool, VerifyError> {
        Ok(!self.locked && plan.rewritten(readers.source, readers.target).await?)
    }

    fn past(&self, plan: &Plan) -> Past {
        self.pasts.get(&plan.table).cloned().unwrap_or_default()
    }

    fn repairs(&self, plan: &Plan, differences: u64) -> bool {
        differences > 0 && self.context.damaged == Damaged::Repaired && self.past(plan).repairs < REPAIRS
    }

    /// All of a table was read, which is compared as a whole.
    async fn complete(&self, plan: &Arc<Plan>, sums: Sums, readers: Readers<'_>) -> Result<(), VerifyError> {
        let found = self.look(plan, 0, &sums, readers).await?;
        if self.is_void(plan, readers).await? {
            self.rewritten(&plan.table);
        } else if self.repairs(plan, found.differences) {
            note(self.done, Ended::Damaged(plan.clone(), found.damage));
        } else {
            let Found { differences, listed, .. } = found;
            self.compared(plan, ChunkResult { rows: sums.rows(), differences, listed }).await?;
        }
        Ok(())
    }

    /// One range of a table was read.
    async fn chunk(
        &self,
        plan: &Arc<Plan>,
        progress: &Mutex<Progress>,
        number: u32,
        sums: Sums,
        readers: Readers<'_>,
    ) -> Result<(), VerifyError> {
        let found = self.look(plan, number, &sums, readers).await?;
        if self.is_void(plan, readers).await? {
            lock(progress).rewritten = true;
        } else if self.repairs(plan, found.differences) {
            lock(progress).damage.add(found.damage);
        } else {
            let Found { differences, listed, .. } = found;
            let result = ChunkResult { rows: sums.rows(), differences, listed };
            self.context.observer.chunk(&plan.table, number, &result).await?;
            note(self.done, Ended::Chunk(plan.table.clone(), number, result.clone()));
            lock(progress).chunks.insert(number, result);
        }
        Ok(())
    }

    /// All was read that this round reads of a table in ranges.
    async fn complete_chunks(&self, plan: &Arc<Plan>, progress: Progress) -> Result<(), VerifyError> {
        let Some(begun) = plan.begun() else { return Ok(()) };
        let mut begun = begun.clone();
        begun.done.extend(progress.chunks);
        if progress.rewritten {
            self.rewritten(&plan.table);
        } else if !progress.damage.is_empty() {
            note(self.done, Ended::Damaged(plan.clone(), progress.damage));
        } else if begun.left().is_empty() {
            self.compared(plan, begun.sum()).await?;
        }
        Ok(())
    }

    async fn refused(&self, table: &QualifiedName, problem: &str) -> Result<(), VerifyError> {
        refused(self.context, self.done, table, problem).await
    }

    fn rewritten(&self, table: &QualifiedName) {
        tracing::info!(%table, "rewritten while it was read; it is read again");
        note(self.done, Ended::Rewritten(table.clone()));
    }

    async fn compared(&self, plan: &Plan, found: ChunkResult) -> Result<(), VerifyError> {
        let ChunkResult { rows, differences, listed } = found;
        let repaired = self.past(plan).repaired;
        let QualifiedName { schema, name } = plan.table.clone();
        let result = TableResult { schema, name, rows, differences, listed, repaired, problem: None };
        self.context.observer.finished(&result).await?;
        if differences > 0 {
            tracing::warn!(table = %plan.table, differences, "source and target differ");
        }
        note(self.done, Ended::Compared(result));
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a worker rests that has read for `took`, to read for `share` percent of its time.
fn rest(took: Duration, share: u8) -> Duration {
    let share = u32::from(share.clamp(1, 100));
    took * (100 - share) / share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_rests_for_the_remainder_of_its_time() {
        let took = Duration::from_millis(200);
        assert_eq!(rest(took, 100), Duration::ZERO);
        assert_eq!(rest(took, 50), took);
        assert_eq!(rest(took, 4), took * 24);
        assert_eq!(rest(took, 0), took * 99, "never for ever");
    }
}
