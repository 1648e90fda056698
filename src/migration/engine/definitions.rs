//! Carrying definitions over (`ddl = "apply"`), as far as the engine has to do with it: making what records them, opening
//! and shutting the gate through which commands pass, and knowing which tables there are since.
//!
//! ```text
//! publish … copy … constraints    shut: a command would meet tables that are being restored
//! following                       open
//! a cutover prepares              shut, and everything that has passed is applied: the way back is made for these tables
//! aborted                         open again
//! switched, rolled back           shut for good: the streams that follow carry rows alone
//! ```

use std::collections::HashSet;
use std::time::Duration;

use super::context::Context;
use super::error::WorkError;
use super::live::{DatabaseLive, Step};
use crate::catalog::migrations::MigrationCatalog;
use crate::catalog::streams::Direction;
use crate::catalog::tables::DatabaseRow;
use crate::config::{Ddl, WithoutIdentity};
use crate::ident::QualifiedName;
use crate::migration::copy;
use crate::migration::ddl::carry::{self, Carry};
use crate::migration::view::Mode;
use crate::postgres::Control;
use crate::switch::Epoch;

/// Bound on the wait for commands that were recorded. They are few, and what was not applied by then is found out as a
/// difference.
const APPLIED_BOUND: Duration = Duration::from_secs(60);

/// Has the source record what changes its definitions.
pub(super) async fn record(context: &Context, source: &mut Control, publication: &str) -> Result<(), WorkError> {
    let target = context.target.control(&context.config.control.database, "ddl").await?;
    let carry = Carry {
        migration: context.live.name(),
        publication,
        full_identity: context.config.migration.without_identity == WithoutIdentity::Full,
        target_version: target.version_num(),
    };
    Ok(carry::make(source, carry).await?)
}

/// Lets commands pass, where the stream carries them and no cutover has begun.
pub(super) async fn open(context: &Context, row: &DatabaseRow) -> Result<(), WorkError> {
    if !carried(context, row) || context.live.spec.mode == Mode::Offline {
        return Ok(());
    }
    set_gate(context, &row.database, None).await?;
    Ok(())
}

/// Lets no more commands pass, because tables are still being copied.
pub(super) async fn shut(context: &Context, row: &DatabaseRow) -> Result<(), WorkError> {
    if carried(context, row) {
        set_gate(context, &row.database, Some(carry::WHILE_COPYING)).await?;
    }
    Ok(())
}

/// Lets no more commands pass, and waits until those that have are applied.
pub(super) async fn shut_for_cutover(context: &Context, row: &DatabaseRow) -> Result<(), WorkError> {
    if carried(context, row)
        && set_gate(context, &row.database, Some(carry::WHILE_CUTTING_OVER)).await?
        && let Some(live) = context.live.database(&row.database)
    {
        let source = context.source_control(&row.database, "ddl").await?;
        applied(&source, live).await?;
    }
    Ok(())
}

/// Opens what [`shut_for_cutover`] has shut, where the cutover came to nothing.
pub(super) async fn open_again(context: &Context, row: &DatabaseRow) -> Result<(), WorkError> {
    match context.live.database(&row.database) {
        Some(live) if live.step() == Step::Constrained => open(context, row).await,
        Some(_) | None => Ok(()),
    }
}

fn carried(context: &Context, row: &DatabaseRow) -> bool {
    let first_stream = row.direction == Direction::Forward && row.epoch == Epoch(0);
    context.config.migration.ddl == Ddl::Apply && first_stream && !row.slot.is_empty()
}

async fn set_gate(context: &Context, database: &str, shut_because: Option<&str>) -> Result<bool, WorkError> {
    let source = context.source_control(database, "ddl").await?;
    let lock_timeout = format!("SET lock_timeout = {}", context.config.migration.lock_timeout.as_millis().max(1));
    let set = async {
        source.batch_execute(&lock_timeout).await?;
        carry::set_gate(&*source, shut_because).await
    };
    let doing =
        "opening or shutting the gate for changes of definitions on the source (a transaction with one may be open)";
    set.await.map_err(|source| WorkError::Query { doing, source })
}

/// Waits until everything that the source has committed is applied, or the stream has ended.
pub(super) async fn applied(source: &Control, live: &DatabaseLive) -> Result<(), WorkError> {
    let nonce = format!("ddl-{:016x}", rand::random::<u64>());
    source
        .execute("UPDATE pgcutover.marker SET nonce = $1", &[&nonce])
        .await
        .map_err(|source| WorkError::Query { doing: "writing the marker row on the source", source })?;
    let (mut applied, mut broken) = (live.stream.applied.subscribe(), live.broken.subscribe());
    // Waiting for values loses nothing when dropped.
    tokio::select! {
        _ = applied.wait_for(|applied| applied.has_reached(&nonce)) => {}
        _ = broken.wait_for(Option::is_some) => {}
        () = tokio::time::sleep(APPLIED_BOUND) => {}
    }
    Ok(())
}

/// Writes down the tables that both servers have now: some were made or dropped by commands. They have no copy.
pub(super) async fn refresh_tables(
    catalog: &MigrationCatalog,
    migration: &str,
    live: &DatabaseLive,
    source: &Control,
    target: &Control,
) -> Result<(), WorkError> {
    let list = async |server| {
        let tables = copy::list_tables_unmeasured(server).await;
        let tables = tables.map_err(|source| WorkError::Query { doing: "listing the tables", source })?;
        Ok::<_, WorkError>(tables.into_iter().map(|table| table.name))
    };
    let there: HashSet<QualifiedName> = list(target).await?.collect();
    let here = list(source).await?;
    let tables: Vec<QualifiedName> = here.filter(|name| there.contains(name)).collect();
    catalog.set_tables(migration, &live.name, &tables).await?;
    live.load_tables(&catalog.tables(migration, &live.name).await?);
    Ok(())
}

/// Keeps the list of tables up to date while commands are applied. Ends only by an error.
pub(super) async fn follow(context: &Context, live: &DatabaseLive) -> Result<(), WorkError> {
    let mut applied = live.stream.applied.subscribe();
    let mut seen = None;
    loop {
        let alterations = applied.borrow_and_update().alterations;
        if seen.replace(alterations) != Some(alterations) {
            let source = context.source_control(&live.name, "ddl-tables").await?;
            let target = context.target.control(&live.name, "ddl-tables").await?;
            refresh_tables(&context.catalog, context.live.name(), live, &source, &target).await?;
        }
        if applied.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
