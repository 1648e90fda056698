//! The fence of the server that a rollback leads back to: it still stands there since the cutover that left it.
//!
//! ```text
//! prepare   ajar: connections as before the fence, read-only by default stays     sessions prepare their moves
//! abort     shut again
//! switch    settings as before the fence; the row notes which cutover brought the databases back
//! ```
//!
//! Strangers find a read-only server until the decision, like between prepare and pause of a cutover; our own sessions
//! are given the default that their role would have had ([`crate::switch::Database::set_return_window`]). Each step is
//! one transaction with its note in the fence row, so a crash leaves what the next start can read and set right.

use std::collections::HashMap;

use super::CutoverError;
use super::hard_fence::Shutting;
use super::soft_fence;
use crate::catalog::door::is_a_strangers;
use crate::catalog::fence::{self, Fence, Standing};
use crate::ident::quote_ident;
use crate::postgres::{Connector, Control};
use crate::switch::{Epoch, PrepareWindow};

/// The fence of `migration` that stands on the server of this control session, if there is one.
pub(super) async fn find(control: &Control, migration: &str) -> Result<Option<Standing>, CutoverError> {
    let standing = fence::standing(&**control).await?;
    Ok(standing.into_iter().rfind(|standing| standing.fence.case.migration == migration))
}

/// Lets connections in again; whoever comes defaults to read-only.
pub(super) async fn set_ajar(control: &mut Control, standing: &Standing) -> Result<(), CutoverError> {
    let failed = |source| CutoverError::query("open the fenced databases for a rollback", source);
    let transaction = control.transaction().await.map_err(failed)?;
    if !fence::note_ajar(&transaction, standing.fence.case.epoch, true).await? {
        return Err(CutoverError::Stopped("the fence of the server that is led back to was lifted by somebody else"));
    }
    for saved in &standing.fence.saved {
        let database = quote_ident(&saved.name);
        let script = format!(
            "ALTER DATABASE {database} CONNECTION LIMIT {}; ALTER DATABASE {database} ALLOW_CONNECTIONS {}",
            saved.connection_limit, saved.allow_connections
        );
        transaction.batch_execute(&only_what_differs(&transaction, saved, script).await?).await.map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

/// A role without the right to change `ALLOW_CONNECTIONS` need not: it was not changed.
async fn only_what_differs(
    transaction: &tokio_postgres::Transaction<'_>,
    saved: &fence::SavedDatabase,
    script: String,
) -> Result<String, CutoverError> {
    let row = transaction
        .query_opt("SELECT datallowconn FROM pg_catalog.pg_database WHERE datname = $1", &[&saved.name])
        .await
        .map_err(|source| CutoverError::query("read the settings of a database", source))?;
    Ok(match row {
        Some(row) if row.get::<_, bool>(0) == saved.allow_connections => {
            script.split(';').next().unwrap_or_default().to_owned()
        }
        Some(_) => script,
        None => String::new(),
    })
}

/// Shuts what was ajar: the rollback was aborted. Nothing when somebody has done it, or the databases have come back.
/// Sessions that came in meanwhile are ended.
pub(super) async fn shut_again(connector: &Connector, database: &str, standing: &Standing) -> Result<(), CutoverError> {
    let mut control = connector.control(database, "shut-again").await?;
    let failed = |source| CutoverError::query("shut the databases again", source);
    let shutting = Shutting::of(&control).await?;
    let transaction = control.transaction().await.map_err(failed)?;
    if !fence::note_ajar(&transaction, standing.fence.case.epoch, false).await? {
        return Ok(());
    }
    if standing.hard {
        for saved in &standing.fence.saved {
            transaction.batch_execute(&shutting.statement(&saved.name)).await.map_err(failed)?;
        }
    }
    transaction.commit().await.map_err(failed)?;
    if standing.hard {
        let own = connector.instance().application_name("");
        control
            .execute(
                &format!(
                    "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
                     WHERE datname = ANY($1) AND {}",
                    is_a_strangers(2)
                ),
                &[&standing.fence.case.databases, &own],
            )
            .await
            .map_err(failed)?;
    }
    Ok(())
}

/// The databases have come back by the cutover `by`: every setting as it was before the fence. Exactly once whoever
/// calls it.
pub(super) async fn give_back(control: &mut Control, fence: &Fence, by: Epoch) -> Result<(), CutoverError> {
    let failed = |source| CutoverError::query("lift the fence of the server that was led back to", source);
    let mut transaction = control.transaction().await.map_err(failed)?;
    if fence::note_returned(&transaction, fence.case.epoch, by).await? {
        for saved in &fence.saved {
            soft_fence::restore(&mut transaction, saved).await?;
        }
    }
    transaction.commit().await.map_err(failed)
}

/// What backends of our sessions must be given while the fence's read-only default stands, by database.
pub(super) async fn windows(
    control: &Control,
    fence: &Fence,
    epoch: Epoch,
) -> Result<HashMap<String, PrepareWindow>, CutoverError> {
    let now = soft_fence::read_before(&**control, &fence.case.databases, epoch).await?;
    let mut windows = HashMap::new();
    for before in now {
        let Some(saved) = fence.saved.iter().find(|saved| saved.name == before.saved.name) else { continue };
        let mut window = before.window;
        window.earlier_read_only = saved.read_only.clone().unwrap_or(before.fallback);
        for role in &saved.roles {
            // Those were overridden because they said, for this database or everywhere, that they write.
            let value = role.read_only.clone().unwrap_or_else(|| "off".to_owned());
            window.earlier_of_roles.insert(role.name.clone(), value);
        }
        windows.insert(saved.name.clone(), window);
    }
    Ok(windows)
}
