//! The soft fence: read-only as the default of every database of a migration, and the row that says so.
//!
//! Both are one transaction in the control database of the server that is left. By itself it is advisory – anyone may
//! say `BEGIN READ WRITE`, and drivers do – so the hard fence follows in the pause. What it buys is that backends
//! started by strangers from now on default to read-only, and that a crash at any later moment is found in the catalogue.
//!
//! PostgreSQL applies settings in the order role in database, role, database, everyone (`process_settings` in
//! `postinit.c`), first one wins: a role whose own setting says `off` would not notice the database's. Such roles get an
//! entry for this database too. Everything found before is saved in the fence row and restored exactly.

use tokio_postgres::{GenericClient, Transaction};

use super::CutoverError;
use crate::catalog::decision::Outcome;
use crate::catalog::fence::{self, Ended, Fence, SavedDatabase, SavedRole};
use crate::ident::{quote_ident, quote_literal};
use crate::postgres::Control;
use crate::sqlstate;
use crate::switch::{Epoch, PrepareWindow};

pub(super) const READ_ONLY: &str = "default_transaction_read_only";

/// A database before the fence: what restores it, and what backends must be given until the pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Before {
    pub(super) saved: SavedDatabase,
    pub(super) window: PrepareWindow,
    /// What counts where the database has no setting of its own.
    pub(super) fallback: String,
}

#[derive(serde::Deserialize)]
struct RoleSetting {
    name: String,
    /// `ALTER ROLE … IN DATABASE … SET`
    in_database: Option<String>,
    /// `ALTER ROLE … SET`
    everywhere: Option<String>,
    /// Whether the one that counts is off.
    writes: bool,
}

/// Reads what the fence is about to change. Fails when a database does not exist.
pub(super) async fn read_before(
    control: &impl GenericClient,
    databases: &[String],
    epoch: Epoch,
) -> Result<Vec<Before>, CutoverError> {
    let failed = |source| CutoverError::query("read the settings of the databases", source);
    let server_default = server_default(control).await?;
    let rows = control
        .query(
            "WITH setting AS (
                SELECT s.setdatabase, s.setrole, substr(c, strpos(c, '=') + 1) AS value
                FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) c
                WHERE lower(split_part(c, '=', 1)) = 'default_transaction_read_only')
             SELECT d.datname, d.datallowconn, d.datconnlimit,
                    (SELECT value FROM setting WHERE setdatabase = d.oid AND setrole = 0),
                    (SELECT value FROM setting WHERE setdatabase = 0 AND setrole = 0),
                    coalesce((
                        SELECT jsonb_agg(jsonb_build_object(
                            'name', r.rolname, 'in_database', i.value, 'everywhere', e.value,
                            'writes', NOT coalesce(i.value, e.value)::boolean) ORDER BY r.rolname)
                        FROM pg_catalog.pg_roles r
                        LEFT JOIN setting i ON i.setdatabase = d.oid AND i.setrole = r.oid
                        LEFT JOIN setting e ON e.setdatabase = 0 AND e.setrole = r.oid
                        WHERE i.value IS NOT NULL OR e.value IS NOT NULL), '[]')
             FROM pg_catalog.pg_database d WHERE d.datname = ANY($1) ORDER BY d.datname",
            &[&databases],
        )
        .await
        .map_err(failed)?;
    let mut found = Vec::new();
    for row in rows {
        let (read_only, everyone): (Option<String>, Option<String>) = (row.get(3), row.get(4));
        let roles: Vec<RoleSetting> = serde_json::from_value(row.get(5))
            .map_err(|error| CutoverError::Unexpected(format!("settings of roles: {error}")))?;
        let overridden = roles.iter().filter(|role| role.writes);
        let saved = SavedDatabase {
            name: row.get(0),
            read_only: read_only.clone(),
            roles: overridden
                .map(|role| SavedRole { name: role.name.clone(), read_only: role.in_database.clone() })
                .collect(),
            allow_connections: row.get(1),
            connection_limit: row.get(2),
        };
        let fallback = everyone.unwrap_or_else(|| server_default.clone());
        let window = PrepareWindow {
            epoch,
            earlier_read_only: read_only.unwrap_or_else(|| fallback.clone()),
            earlier_of_roles: roles
                .into_iter()
                .filter_map(|role| Some((role.name, role.in_database.or(role.everywhere)?)))
                .collect(),
        };
        found.push(Before { saved, window, fallback });
    }
    match databases.iter().find(|name| !found.iter().any(|before| before.saved.name == **name)) {
        Some(missing) => Err(CutoverError::Guardrail(format!("database {missing:?} does not exist on the server"))),
        None => Ok(found),
    }
}

/// `default_transaction_read_only` of the configuration files; our own session pins it and cannot tell. A role that may
/// not read the files leaves us with PostgreSQL's default.
pub(super) async fn server_default(control: &impl GenericClient) -> Result<String, CutoverError> {
    let failed = |source| CutoverError::query("read the server's configuration", source);
    let readable = control
        .query_one("SELECT pg_catalog.has_function_privilege('pg_catalog.pg_show_all_file_settings()', 'execute')", &[])
        .await
        .map_err(failed)?;
    if !readable.get::<_, bool>(0) {
        return Ok("off".to_owned());
    }
    let row = control
        .query_opt(
            "SELECT setting FROM pg_catalog.pg_show_all_file_settings() WHERE applied AND name = $1",
            &[&READ_ONLY],
        )
        .await
        .map_err(failed)?;
    Ok(row.and_then(|row| row.get(0)).unwrap_or_else(|| "off".to_owned()))
}

/// The statement that fences a database.
pub(super) fn of_database(database: &str) -> String {
    format!("ALTER DATABASE {} SET {READ_ONLY} = on", quote_ident(database))
}

/// The statement that makes the fence of a database hold for a role which has a setting of its own.
pub(super) fn of_role(role: &str, database: &str) -> String {
    format!("ALTER ROLE {} IN DATABASE {} SET {READ_ONLY} = on", quote_ident(role), quote_ident(database))
}

/// Fences and writes the row, in one transaction. Returns the roles that we may not override; the hard fence covers them.
pub(super) async fn raise(control: &mut Control, fence: &Fence) -> Result<Vec<String>, CutoverError> {
    let failed = |source| CutoverError::query("fence the databases", source);
    let mut transaction = control.transaction().await.map_err(failed)?;
    fence::insert(&transaction, fence).await?;
    let mut spared = Vec::new();
    for saved in &fence.saved {
        transaction.batch_execute(&of_database(&saved.name)).await.map_err(failed)?;
        for role in &saved.roles {
            if !permitted(&mut transaction, &of_role(&role.name, &saved.name)).await? {
                spared.push(role.name.clone());
            }
        }
    }
    transaction.commit().await.map_err(failed)?;
    Ok(spared)
}

/// Runs a statement that we may lack the right for; everything else is an error.
async fn permitted(transaction: &mut Transaction<'_>, statement: &str) -> Result<bool, CutoverError> {
    let failed = |source| CutoverError::query("change the settings of a role", source);
    let attempt = transaction.transaction().await.map_err(failed)?;
    match attempt.batch_execute(statement).await {
        Ok(()) => attempt.commit().await.map(|()| true).map_err(failed),
        Err(error) if error.code().is_some_and(|code| code.code() == sqlstate::INSUFFICIENT_PRIVILEGE) => {
            attempt.rollback().await.map(|()| false).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Notes the abort in the fence row and puts every setting, hard and soft, back to what was saved: one transaction, so
/// that it happens exactly once whoever calls it. Only for a cutover whose decision was read as aborted, or was never
/// sent by its own coordinator.
pub(super) async fn lift(control: &mut Control, fence: &Fence) -> Result<Ended, CutoverError> {
    let failed = |source| CutoverError::query("lift the fence", source);
    let mut transaction = control.transaction().await.map_err(failed)?;
    let ended = fence::end(&transaction, fence, Outcome::Aborted).await?;
    if ended == Ended::Now {
        for saved in &fence.saved {
            restore(&mut transaction, saved).await?;
        }
    }
    transaction.commit().await.map_err(failed)?;
    Ok(ended)
}

/// Puts one database back to what was saved. Part of the transaction that notes it.
pub(super) async fn restore(transaction: &mut Transaction<'_>, saved: &SavedDatabase) -> Result<(), CutoverError> {
    let failed = |source| CutoverError::query("restore the settings of a database", source);
    let row = transaction
        .query_opt("SELECT datallowconn, datconnlimit FROM pg_catalog.pg_database WHERE datname = $1", &[&saved.name])
        .await
        .map_err(failed)?;
    // Dropped in the meantime: its settings went with it.
    let Some(row) = row else { return Ok(()) };
    let database = quote_ident(&saved.name);
    let mut script = match &saved.read_only {
        Some(value) => format!("ALTER DATABASE {database} SET {READ_ONLY} = {};", quote_literal(value)),
        None => format!("ALTER DATABASE {database} RESET {READ_ONLY};"),
    };
    if row.get::<_, bool>(0) != saved.allow_connections {
        script.push_str(&format!("ALTER DATABASE {database} ALLOW_CONNECTIONS {};", saved.allow_connections));
    }
    if row.get::<_, i32>(1) != saved.connection_limit {
        script.push_str(&format!("ALTER DATABASE {database} CONNECTION LIMIT {};", saved.connection_limit));
    }
    transaction.batch_execute(&script).await.map_err(failed)?;
    for role in &saved.roles {
        let there = transaction
            .query_opt("SELECT FROM pg_catalog.pg_roles WHERE rolname = $1", &[&role.name])
            .await
            .map_err(failed)?;
        if there.is_none() {
            continue;
        }
        let name = quote_ident(&role.name);
        let statement = match &role.read_only {
            Some(value) => {
                format!("ALTER ROLE {name} IN DATABASE {database} SET {READ_ONLY} = {}", quote_literal(value))
            }
            None => format!("ALTER ROLE {name} IN DATABASE {database} RESET {READ_ONLY}"),
        };
        // Those that we may not change were not changed by the fence either.
        permitted(transaction, &statement).await?;
    }
    Ok(())
}
