//! A session's connection to a server.

use super::Shared;
use super::client_error::ClientError;
use crate::postgres::{ConnectError, Login, RawConnection};
use crate::switch::{Database, Route, ServerRole};

/// The setting that a soft fence changes for a database.
const READ_ONLY: &str = "default_transaction_read_only";

/// An open backend and where it is.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) connection: RawConnection,
    pub(super) server: ServerRole,
}

/// Logs in to `server` as the session's user. Between prepare and pause of a cutover the backend on the active server
/// starts with the read-only default that its role would have had before the fence.
pub(super) async fn open(
    shared: &Shared,
    login: &Login,
    database: &Database,
    server: ServerRole,
) -> Result<Backend, ConnectError> {
    let connector = shared.connector(server);
    let is_active = matches!(&*database.route(), Route::To { server: active, .. } if *active == server);
    let mut connection = match database.prepare_window() {
        Some(window) if is_active && !sets_read_only(login) => {
            let mut login = login.clone();
            login.parameters.push((READ_ONLY.to_owned(), window.earlier_read_only_of(&login.user).to_owned()));
            connector.raw(&login).await?
        }
        Some(_) | None => connector.raw(login).await?,
    };
    if connection.read_buf.is_empty() {
        // Its capacity is of no use any more: the relay has buffers of its own.
        connection.read_buf = bytes::BytesMut::new();
    }
    Ok(Backend { connection, server })
}

/// Whether the client itself says what it wants.
fn sets_read_only(login: &Login) -> bool {
    login.parameters.iter().any(|(name, value)| {
        name.eq_ignore_ascii_case(READ_ONLY)
            || (name == "options" && value.to_ascii_lowercase().replace('-', "_").contains(READ_ONLY))
    })
}

/// What a client is told when its backend could not be opened.
pub(super) fn refusal(error: &ConnectError) -> ClientError {
    match (error.sqlstate(), error.server_message()) {
        (Some(code), Some(message)) => {
            ClientError::ServerRefused { code: code.to_owned(), message: message.to_owned() }
        }
        _ => ClientError::ServerUnreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Credential;

    #[test]
    fn a_clients_own_wish_is_seen_in_options_too() {
        let login = |name: &str, value: &str| Login {
            user: String::new(),
            database: String::new(),
            credential: Credential::None,
            parameters: vec![(name.to_owned(), value.to_owned())],
        };
        assert!(sets_read_only(&login("default_transaction_read_only", "on")));
        assert!(sets_read_only(&login("options", "-c default_transaction_read_only=on")));
        assert!(sets_read_only(&login("options", "--default-transaction-read-only=on")));
        assert!(!sets_read_only(&login("options", "-c work_mem=1MB")));
    }
}
