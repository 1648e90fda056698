//! Two snapshots, one on each server, that see the same transactions of the source.
//!
//! Exported, so that any number of sessions read under them; they live as long as the [`Pair`]. The rule by which they
//! are made to fit is told in [`crate::migration::gate`].

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio::time::timeout;

use super::VerifyError;
use crate::catalog::door::Door;
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::gate::{Fit, Gate, Hold, Interrupted};
use crate::migration::snapshot::TxidSnapshot;
use crate::postgres::{Connector, Control};
use crate::sqlstate;

/// The longest that the apply is held without anything passing; a stream that is far behind may take longer to come to the
/// place, and is not held meanwhile.
const HOLD: Duration = Duration::from_secs(5);

/// Bound on all attempts together.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two attempts the apply goes on.
const REST: Duration = Duration::from_millis(250);

/// The holders of two snapshots that fit.
#[derive(Debug)]
pub struct Pair {
    /// Holds the source's.
    pub source: Control,
    /// Holds the target's.
    pub target: Control,
    /// Name of the source's.
    pub source_snapshot: String,
    /// Name of the target's.
    pub target_snapshot: String,
}

/// What two snapshots are taken of.
#[derive(Clone, Debug)]
pub struct Sides {
    /// The server that the changes come from.
    pub source: Connector,
    /// The server that they are applied to.
    pub target: Connector,
    /// The database, the same name on both.
    pub database: String,
    /// Where the stream between them can be held; none: nobody writes to either.
    pub gate: Option<Gate>,
    /// How to get into the target, where a cutover has shut it; none: as everybody does. One at a time.
    pub door: Option<Arc<tokio::sync::Mutex<Door>>>,
}

/// Times that the door is tried: the stream may shut it behind itself while we come in.
const DOOR_ATTEMPTS: u32 = 5;

impl Sides {
    /// A session on the server that the changes come from.
    pub(super) async fn enter_source(&self, purpose: &str) -> Result<Control, VerifyError> {
        Ok(self.source.control(&self.database, purpose).await?)
    }

    /// A session on the server that they are applied to.
    pub(super) async fn enter_target(&self, purpose: &str) -> Result<Control, VerifyError> {
        let Some(door) = &self.door else { return Ok(self.target.control(&self.database, purpose).await?) };
        let door = door.lock().await;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let connect = async { Ok::<_, VerifyError>(self.target.control(&self.database, purpose).await?) };
            match Box::pin(door.through(connect)).await {
                Err(VerifyError::Connect(_)) if attempt < DOOR_ATTEMPTS => tokio::time::sleep(REST).await,
                entered => return entered,
            }
        }
    }
}

/// The apply stands, and nothing is on the target that the source's snapshot does not see. Dropping it lets it go on.
#[derive(Debug)]
pub(in crate::migration) struct Still {
    /// In a transaction under the snapshot.
    pub(in crate::migration) source: Control,
    /// In no transaction.
    pub(in crate::migration) target: Control,
    hold: Hold,
}

impl Still {
    /// Whether it still does.
    pub(super) fn stands(&self) -> bool {
        self.hold.stands()
    }
}

/// The transaction of a holder.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Bound on the wait for a lock; the apply is held meanwhile.
const LOCK_TIMEOUT_MS: u32 = 1000;

/// Takes both, with a lock on the tables of `locked` that lets writers pass but not TRUNCATE and ALTER TABLE, so that
/// nobody can rewrite them as long as the snapshots are held. Tries again while the stream is interrupted or too far behind to be held for long.
pub async fn align(sides: &Sides, locked: &[QualifiedName]) -> Result<Pair, VerifyError> {
    let begin = begin(locked);
    let source = sides.enter_source("verify-snapshot").await?;
    let target = sides.enter_target("verify-snapshot").await?;
    let Some(gate) = &sides.gate else {
        let (source_snapshot, ..) = take(&source, &begin).await?;
        let target_snapshot = export(&target).await?;
        return Ok(Pair { source, target, source_snapshot, target_snapshot });
    };
    let (hold, source_snapshot) = stand(sides, gate, &source, &begin).await?;
    let target_snapshot = export(&target).await?;
    if !hold.stands() {
        return Err(VerifyError::Moved);
    }
    Ok(Pair { source, target, source_snapshot, target_snapshot })
}

/// Has the apply stand where a snapshot of the source looks.
pub(in crate::migration) async fn still(sides: &Sides) -> Result<Still, VerifyError> {
    let Some(gate) = &sides.gate else { return Err(VerifyError::Moved) };
    let source = sides.enter_source("repair").await?;
    let target = sides.enter_target("repair").await?;
    let (hold, _snapshot) = stand(sides, gate, &source, BEGIN).await?;
    super::prepare(&source, &target).await?;
    Ok(Still { source, target, hold })
}

/// Holds the stream at a snapshot that `source` takes with `begin`.
async fn stand(sides: &Sides, gate: &Gate, source: &Control, begin: &str) -> Result<(Hold, String), VerifyError> {
    let marker = sides.enter_source("verify-marker").await?;
    // A marker is worth nothing on a standby.
    let local = marker.batch_execute("SET synchronous_commit = local").await;
    local.map_err(VerifyError::query("preparing a session on the source"))?;
    let began = Instant::now();
    let mut attempts = 0;
    loop {
        attempts += 1;
        match while_it_moves(gate, held(gate, source, begin, &marker)).await {
            Ok(Ok(Some(standing))) => {
                tracing::debug!(database = sides.database, attempts, "the stream stands where a snapshot looks");
                return Ok(standing);
            }
            // Somebody has a table locked.
            Ok(Err(VerifyError::Query { source, .. }))
                if source.code().is_some_and(|code| code.code() == sqlstate::LOCK_NOT_AVAILABLE)
                    && began.elapsed() < PATIENCE => {}
            Ok(Err(error)) => return Err(error),
            // The stream was interrupted, or is busy with something large.
            Ok(Ok(None)) | Err(Stuck) if began.elapsed() < PATIENCE => {}
            Ok(Ok(None)) | Err(Stuck) => {
                return Err(VerifyError::NoCommonSnapshot {
                    database: sides.database.clone(),
                    waited: began.elapsed(),
                });
            }
        }
        tokio::time::sleep(REST).await;
        // Without a transaction this is a warning that nobody sees.
        source.batch_execute("ROLLBACK").await.map_err(VerifyError::query("giving up a snapshot"))?;
    }
}

/// Nothing has passed for too long.
struct Stuck;

/// Waits for `attempt` as long as the stream goes on. Dropping it gives the hold up.
async fn while_it_moves<T>(gate: &Gate, attempt: impl Future<Output = T>) -> Result<T, Stuck> {
    let mut attempt = std::pin::pin!(attempt);
    loop {
        let passed = gate.passed();
        match timeout(HOLD, &mut attempt).await {
            Ok(done) => return Ok(done),
            Err(_) if gate.passed() > passed => {}
            Err(_) => return Err(Stuck),
        }
    }
}

/// One hold of the apply; none: it was interrupted.
async fn held(
    gate: &Gate,
    source: &Control,
    begin: &str,
    marker: &Control,
) -> Result<Option<(Hold, String)>, VerifyError> {
    let Ok(mut hold) = gate.hold().await else { return Ok(None) };
    match fitting(&mut hold, source, begin, marker).await? {
        Ok(snapshot) => Ok(Some((hold, snapshot))),
        Err(Interrupted) => Ok(None),
    }
}

/// Takes snapshots of the source until one fits.
async fn fitting(
    hold: &mut Hold,
    source: &Control,
    begin: &str,
    marker: &Control,
) -> Result<Result<String, Interrupted>, VerifyError> {
    loop {
        let (name, snapshot, position) = take(source, begin).await?;
        // The nonce stays as it is, so that nobody who waits for one is misled.
        let marked = marker.batch_execute("UPDATE pgcutover.marker SET nonce = nonce").await;
        marked.map_err(VerifyError::query("writing the marker row on the source"))?;
        match hold.fit(&snapshot, position).await {
            Ok(Fit::Exact) => return Ok(Ok(name)),
            Ok(Fit::Disordered) => {}
            Err(Interrupted) => return Ok(Err(Interrupted)),
        }
        source.batch_execute("ROLLBACK").await.map_err(VerifyError::query("giving up a snapshot"))?;
    }
}

/// Begins the source's transaction: locks first, because taking one takes no snapshot.
fn begin(locked: &[QualifiedName]) -> String {
    let mut sql = BEGIN.to_owned();
    if !locked.is_empty() {
        let names: Vec<String> = locked.iter().map(|table| format!("ONLY {table}")).collect();
        let names = names.join(", ");
        sql.push_str(&format!("; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; LOCK TABLE {names} IN ACCESS SHARE MODE"));
    }
    sql
}

async fn take(holder: &Control, begin: &str) -> Result<(String, TxidSnapshot, Lsn), VerifyError> {
    holder.batch_execute(begin).await.map_err(VerifyError::query("beginning a snapshot on the source"))?;
    let row = holder
        .query_one("SELECT pg_export_snapshot(), txid_current_snapshot()::text, pg_current_wal_insert_lsn()", &[])
        .await
        .map_err(VerifyError::query("taking a snapshot of the source"))?;
    let snapshot: &str = row.get(1);
    let snapshot = snapshot.parse().map_err(|_| VerifyError::Unreadable("the source's snapshot"))?;
    Ok((row.get(0), snapshot, row.get(2)))
}

async fn export(holder: &Control) -> Result<String, VerifyError> {
    holder.batch_execute(BEGIN).await.map_err(VerifyError::query("beginning a snapshot on the target"))?;
    let row = holder.query_one("SELECT pg_export_snapshot()", &[]).await;
    Ok(row.map_err(VerifyError::query("taking a snapshot of the target"))?.get(0))
}
