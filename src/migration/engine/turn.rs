//! Turning the streams of a migration round: what a cutover prepares for the way back, and what becomes of it.
//!
//! [`prepare`] makes the next stream on the server that the cutover leads to, before anything is fenced. [`align`] is
//! called when the outcome is durable, and again at every start: it makes the streams fit the state, whatever was done
//! of it before. Which stream is which is in [`crate::catalog::streams`].

use super::cancel::{self, Shut, Undone};
use super::context::Context;
use super::definitions;
use super::error::WorkError;
use super::fence_watch;
use super::late;
use super::live::{Current, Live};
use crate::catalog::door::Door;
use crate::catalog::fence::{self, Standing};
use crate::catalog::journal::{Journal, MadeObject, Side};
use crate::catalog::streams::{Direction, NextStream};
use crate::catalog::tables::DatabaseRow;
use crate::catalog::watches::OldSlot;
use crate::catalog::{Place, bootstrap};
use crate::migration::identity::{self, Remedy};
use crate::migration::publication::Renames;
use crate::migration::view::{FencedWriteView, Left, MigrationOption, Mode};
use crate::migration::{made, publication, stream};
use crate::postgres::walsender::ReplicationConnection;
use crate::postgres::{Connector, Control};
use crate::switch::{Epoch, ServerRole};

/// Makes publication and slot of the stream that begins at the boundary of cutover `epoch`, in every database. Returns
/// why there will be none, where the server cannot send one; then nothing is made, and the cutover cannot be taken back.
pub(super) async fn prepare(context: &Context, epoch: Epoch) -> Result<Option<String>, WorkError> {
    let rows = context.catalog.databases(context.live.name()).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    for row in &rows {
        Box::pin(definitions::shut_for_cutover(context, row)).await?;
    }
    let (from, to) = first.direction.ends(&context.source, &context.target);
    if let Some(why) = late::cannot_apply([from, to], &context.config.control.database).await? {
        return Ok(Some(why));
    }
    let (spare, control_database) = (watching(&context.live), &context.config.control.database);
    if let Some(why) = cannot_send(to, control_database, rows.len(), &spare).await? {
        return Ok(Some(why));
    }
    if !spare.is_empty() && cannot_send(to, control_database, rows.len(), &[]).await?.is_some() {
        let why = "its replication slot was needed for the way back";
        for live in &context.live.databases {
            fence_watch::end(context, live, to, why).await?;
        }
    }
    for row in &rows {
        Box::pin(prepare_one(context, row, epoch)).await?;
    }
    Ok(None)
}

/// The slots that watch the server which is fenced now. A cutover leads back to it, and ends the watch.
pub(super) fn watching(live: &Live) -> Vec<String> {
    live.databases.iter().filter_map(|live| live.fenced.watched_slot()).collect()
}

/// Why `server` cannot send so many streams, in words for the operator. The slots of `spare` count as free.
pub(super) async fn cannot_send(
    server: &Connector,
    control_database: &str,
    streams: usize,
    spare: &[String],
) -> Result<Option<String>, WorkError> {
    let control = server.control(control_database, "return").await?;
    let row = control
        .query_one(
            "SELECT pg_catalog.current_setting('wal_level'),
                    pg_catalog.current_setting('max_replication_slots')::bigint
                      - (SELECT count(*) FROM pg_catalog.pg_replication_slots WHERE slot_name <> ALL ($1))",
            &[&spare],
        )
        .await
        .map_err(|source| WorkError::Query { doing: "looking whether changes can be sent back", source })?;
    let (level, free): (&str, i64) = (row.get(0), row.get(1));
    let label = server.label();
    if level != "logical" {
        return Ok(Some(format!(
            "this cutover cannot be rolled back: the {label} has wal_level {level}; set wal_level = logical there and \
             restart it to be able to"
        )));
    }
    if free < i64::try_from(streams).unwrap_or(i64::MAX) {
        return Ok(Some(format!(
            "this cutover cannot be rolled back: the {label} has {free} free replication slots and {streams} are needed; \
             raise max_replication_slots there"
        )));
    }
    Ok(None)
}

async fn prepare_one(context: &Context, row: &DatabaseRow, epoch: Epoch) -> Result<(), WorkError> {
    let (from, to) = row.direction.ends(&context.source, &context.target);
    let side = side_of(row.direction.to());
    let journal = Journal::new(context.catalog.clone(), context.live.name());
    let own = async |server: &Connector| -> Result<Control, WorkError> {
        let control = server.control(&row.database, "return").await?;
        bootstrap(&control, Place::BothWays).await?;
        Ok(control)
    };
    let server_left = from;
    let (from, mut control) = (own(from).await?, own(to).await?);

    let tables = publication::published(&from, &row.publication).await;
    let tables = tables.map_err(|source| WorkError::Query { doing: "listing the published tables", source })?;
    let lock_timeout = context.config.migration.lock_timeout;
    for table in identity::plan(&control, context.config.migration.without_identity).await? {
        if !tables.contains(&table.table) {
            continue;
        }
        if table.remedy == Remedy::Refuse {
            return Err(WorkError::NoIdentity(vec![table.table.to_string()]));
        }
        identity::mend(side, &control, &row.database, &table, lock_timeout, &journal).await?;
    }

    let made = |kind: &str, name: &str, undo: String| MadeObject {
        side,
        database: Some(row.database.clone()),
        kind: kind.to_owned(),
        name: name.to_owned(),
        undo: Some(undo),
        note: String::new(),
    };
    let mut next = NextStream {
        epoch,
        slot: format!("pgcutover_{:016x}", rand::random::<u64>()),
        publication: format!("pgcutover_{}_{epoch}", context.live.name()),
        slot_start: None,
    };
    let undo = publication::drop_publication_sql(&next.publication);
    if let Some(live) = context.live.database(&row.database) {
        live.set_prepared(&next.slot);
    }
    journal.record(&made("publication", &next.publication, undo)).await?;
    journal.record(&made("slot", &next.slot, publication::drop_slot_sql(&next.slot))).await?;
    context.catalog.set_next(context.live.name(), &row.database, &next).await?;
    publication::create(&mut control, &next.publication, &tables, Renames::Unforeseen, lock_timeout).await?;
    context.failpoints.hit("return.after_publication").await?;
    // Waits for every transaction that is open there.
    let mut replication = ReplicationConnection::connect(to, &row.database).await?;
    let slot_timeout = context.config.migration.slot_timeout;
    replication.create_logical_slot(&next.slot, slot_timeout).await?;
    replication.terminate().await?;
    context.failpoints.hit("return.after_slot").await?;
    next.slot_start = Some(publication::start(&mut control, slot_timeout).await?.position);
    context.catalog.set_next(context.live.name(), &row.database, &next).await?;
    context.failpoints.hit("return.after_prepared").await?;
    // What is applied to the server that is left, once it is shut, is applied through these.
    if let Some(live) = context.live.database(&row.database) {
        live.reserve.keep(epoch, stream::open_apply_sessions(server_left, &row.database).await?);
        // Without it, the watch goes through the door.
        if let Ok(watcher) = Box::pin(ReplicationConnection::connect(server_left, &row.database)).await {
            live.fenced.reserve.keep(epoch, watcher);
        }
    }
    Ok(())
}

/// A slot that was followed to a cutover's drain can watch what it left; that of a copy alone, or of none, cannot.
fn old_slot(context: &Context, row: &DatabaseRow) -> OldSlot {
    let spec = &context.live.spec;
    let was_cut_over =
        spec.mode == Mode::Online && spec.option != MigrationOption::Validate && row.slot_start.is_some();
    if was_cut_over { OldSlot::Watches } else { OldSlot::Goes }
}

/// Makes the streams flow `to_be`: the prepared one becomes the current one if it has to, what was prepared in vain is
/// forgotten, and every slot and publication of ours that is not the current stream's is removed. Nobody may be applying
/// when a stream is turned.
pub(super) async fn align(context: &Context, to_be: Direction) -> Result<Undone, WorkError> {
    let name = context.live.name();
    for row in context.catalog.databases(name).await? {
        if row.direction != to_be {
            context.catalog.turn(name, &row.database, to_be, old_slot(context, &row)).await?;
            context.failpoints.hit("return.after_turn").await?;
        } else {
            if row.next.is_some() {
                context.catalog.drop_next(name, &row.database).await?;
            }
            if let Some(live) = context.live.database(&row.database) {
                live.reserve.empty();
                live.fenced.reserve.empty();
            }
            Box::pin(definitions::open_again(context, &row)).await?;
        }
    }
    let rows = context.catalog.databases(name).await?;
    for row in &rows {
        if let Some(live) = context.live.database(&row.database) {
            live.set_current(Current::of(row));
            live.fenced.set_watch(row.watch.clone());
        }
    }
    let chosen = |object: &MadeObject| is_stream(object) && !is_current(object, &rows);
    cancel::undo(context, chosen, Shut::Stays).await
}

/// Removes every stream and what served it: the migration is closed. What was brought over stays, and is the target's own.
pub(super) async fn end(context: &Context) -> Result<Undone, WorkError> {
    let name = context.live.name();
    for row in context.catalog.databases(name).await? {
        context.catalog.end_stream(name, &row.database).await?;
    }
    for row in context.catalog.databases(name).await? {
        if let Some(live) = context.live.database(&row.database) {
            live.set_current(Current::of(&row));
            live.fenced.set_watch(None);
        }
    }
    let chosen = |object: &MadeObject| is_stream(object) || SERVED.contains(&object.kind.as_str());
    let mut undone = cancel::undo(context, chosen, Shut::Entered).await?;
    if undone.complete {
        shut_again(context, &mut undone).await;
    }
    Ok(undone)
}

/// Shuts what fences cover. A process that was killed while it removed something in there may have left a door open, and
/// from now on nobody goes through it.
async fn shut_again(context: &Context, undone: &mut Undone) {
    let control_database = &context.config.control.database;
    for (side, server) in [(Side::Source, &context.source), (Side::Target, &context.target)] {
        for live in &context.live.databases {
            let door = Door::new(server, control_database, &live.name, &live.turns);
            let Err(error) = Box::pin(door.shut_again()).await else { continue };
            let object = MadeObject {
                side,
                database: Some(live.name.clone()),
                kind: "fence".to_owned(),
                name: live.name.clone(),
                undo: None,
                note: String::new(),
            };
            undone.complete = false;
            undone.report.left.push(Left { object, reason: stream::describe(&error) });
        }
    }
}

/// What stays on the servers when a migration is closed, and why: who is active is read from it.
pub(super) async fn tombstones(context: &Context) -> Vec<Left> {
    let mut left = Vec::new();
    for (side, server) in [(Side::Source, &context.source), (Side::Target, &context.target)] {
        let standing = async {
            let control = server.control(&context.config.control.database, "return").await.ok()?;
            fence::standing(&*control).await.ok()
        };
        for Standing { fence, hard, .. } in standing.await.unwrap_or_default() {
            if fence.case.migration != context.live.name() {
                continue;
            }
            let made = |kind: &str, name: String| MadeObject {
                side,
                database: None,
                kind: kind.to_owned(),
                name,
                undo: None,
                note: String::new(),
            };
            let reason = "tells who still uses this server where its databases have gone".to_owned();
            left.push(Left { object: made("fence_row", format!("pgcutover.fence {}", fence.case.epoch)), reason });
            // What shuts a database depends on the rights of the role that did: so does what opens it.
            let stays = if hard {
                "stays shut and read-only by default on the server that was left; docs/runbook.md, \"When it is done \
                 for good\", says how it is opened"
            } else {
                "stays read-only by default on the server that was left; ALTER DATABASE … RESET \
                 default_transaction_read_only ends that"
            };
            for database in &fence.case.databases {
                left.push(Left { object: made("fence", database.clone()), reason: stays.to_owned() });
            }
        }
    }
    for database in &context.live.databases {
        for found in database.fenced.found.borrow().iter() {
            let object = MadeObject {
                side: side_of(found.server),
                database: Some(database.name.clone()),
                kind: "fenced_write".to_owned(),
                name: FencedWriteView::of(found).to_string(),
                undo: None,
                note: String::new(),
            };
            let reason = "was written past the fence by somebody else and is on that server alone".to_owned();
            left.push(Left { object, reason });
        }
    }
    left
}

/// Kinds of objects that are of use to streams only.
pub(super) const SERVED: [&str; 2] = [made::REPLICA_IDENTITY, "schema"];

pub(super) fn is_stream(object: &MadeObject) -> bool {
    matches!(object.kind.as_str(), "slot" | "publication" | "event_trigger")
}

fn is_current(object: &MadeObject, rows: &[DatabaseRow]) -> bool {
    rows.iter().filter(|row| object.database.as_deref() == Some(row.database.as_str())).any(|row| {
        let streams = object.side == side_of(row.direction.from())
            && (object.name == row.slot
                || object.name == row.publication
                // What keeps definitions from changing while the source is followed.
                || object.kind == "event_trigger" && !row.slot.is_empty());
        let watches = row.watch.as_ref().filter(|watch| watch.ended.is_none()).is_some_and(|watch| {
            object.side == side_of(row.direction.to())
                && (object.name == watch.slot || object.name == watch.publication)
        });
        streams || watches
    })
}

fn side_of(server: ServerRole) -> Side {
    match server {
        ServerRole::Source => Side::Source,
        ServerRole::Target => Side::Target,
    }
}
