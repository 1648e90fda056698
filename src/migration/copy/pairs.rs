//! Connections of a copy, used for one table after another.
//!
//! A database may have tens of thousands of small tables: a login on both servers for each of them would cost more than
//! their rows. Whoever takes a connection owns it; only one that stands outside any transaction comes back.

use std::sync::{Mutex, PoisonError};

use super::{CopyContext, CopyError, SourceTable};
use crate::migration::late;
use crate::postgres::{Connector, RawConnection};
use crate::sqlstate::INSUFFICIENT_PRIVILEGE;

/// Idle connections to both servers.
#[derive(Default)]
pub(super) struct Pairs {
    source: Mutex<Vec<RawConnection>>,
    target: Mutex<Vec<RawConnection>>,
}

impl Pairs {
    /// A reader.
    pub(super) async fn source(&self, context: &CopyContext) -> Result<RawConnection, CopyError> {
        match pop(&self.source) {
            Some(connection) => Ok(connection),
            None => open(&context.source, &context.database).await,
        }
    }

    /// A writer: no trigger, rule or foreign key acts on what it writes. They are restored after the copy, so a login that
    /// may not set this parameter loses nothing by it.
    pub(super) async fn target(&self, context: &CopyContext, table: &SourceTable) -> Result<RawConnection, CopyError> {
        if let Some(connection) = pop(&self.target) {
            return Ok(connection);
        }
        let mut connection = open(&context.target, &context.database).await?;
        match connection.simple_query(late::REPLICA).await {
            Err(error) if error.sqlstate() != Some(INSUFFICIENT_PRIVILEGE) => {
                let (table, source) = (table.name.clone(), Box::new(error));
                Err(CopyError::Server { table, server: "target", doing: "setting session_replication_role", source })
            }
            Ok(_) | Err(_) => Ok(connection),
        }
    }

    /// For the next table; both must have ended their transactions.
    pub(super) fn give_back(&self, source: RawConnection, target: RawConnection) {
        for (connection, idle) in [(source, &self.source), (target, &self.target)] {
            if connection.transaction_status() == b'I' {
                idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            }
        }
    }

    /// Drops every idle connection: one of their kind has broken, and these may be as old.
    pub(super) fn forget(&self) {
        for idle in [&self.source, &self.target] {
            idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}

fn pop(idle: &Mutex<Vec<RawConnection>>) -> Option<RawConnection> {
    idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

async fn open(server: &Connector, database: &str) -> Result<RawConnection, CopyError> {
    Ok(server.raw(&server.own_login(database, "copy")).await?)
}
