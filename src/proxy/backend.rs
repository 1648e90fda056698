//! A session's connection to a server.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::task::noop_waker_ref;
use tokio::io::{AsyncRead as _, ReadBuf};

use super::Shared;
use super::client_error::ClientError;
use crate::postgres::{ConnectError, Login, RawConnection, Stream};
use crate::sqlstate;
use crate::switch::{Database, ServerRole};
use crate::wire::frame::{self, HEADER_BYTES, backend as tags};
use crate::wire::message;

/// The setting that a soft fence changes for a database.
const READ_ONLY: &str = "default_transaction_read_only";

/// So many bytes wait here for the server to take them, not the megabytes that the kernel would gather. A client that sends
/// without a pause must feel that the server is slow, as if it were connected to it: only then it looks for answers, and
/// learns of an error before it has sent everything.
const UNSENT_BYTES: u32 = 128 << 10;

/// So much of what a server says unasked is kept for who reads next.
const KEPT_BYTES: usize = 64 << 10;

/// How long a connection that is of no use may take to close.
const CLOSING: Duration = Duration::from_secs(5);

/// An open backend and where it is.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) connection: RawConnection,
    pub(super) server: ServerRole,
}

/// What came on a connection that lay idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing.
    Nothing,
    /// Changes of reported parameters, and notices.
    Reports,
    /// Anything else, or its end: the connection is of no use any more.
    Unusable,
}

impl Backend {
    /// Looks, without waiting, whether the server has said anything while nobody listened, as far as the runtime knows.
    pub(super) fn listen_in(&mut self) -> Heard {
        let mut cx = std::task::Context::from_waker(noop_waker_ref());
        self.hear(|stream, into| match std::pin::Pin::new(stream).poll_read(&mut cx, into) {
            std::task::Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
            std::task::Poll::Ready(read) => read,
        })
    }

    /// The same, asking the socket itself: for a connection that has just come to this runtime.
    pub(super) fn listen_in_anew(&mut self) -> Heard {
        self.hear(|stream, into| stream.read_now(into).map(drop))
    }

    /// Whether the server has said that its transactions begin read-only (PostgreSQL 14 and later say so).
    pub(super) fn is_read_only(&self) -> bool {
        self.connection.parameters.iter().any(|(name, value)| name == READ_ONLY && value == "on")
    }

    /// Whether the server has closed the connection, or has said that it does, while nobody listened. What else has come is
    /// kept for who reads next.
    pub(super) fn is_gone(&mut self) -> bool {
        let RawConnection { stream, read_buf, .. } = &mut self.connection;
        let mut piece = [std::mem::MaybeUninit::uninit(); 512];
        // A server that never stops talking is there.
        while read_buf.len() < KEPT_BYTES {
            let mut into = ReadBuf::uninit(&mut piece);
            match stream.read_now(&mut into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(1..) => read_buf.extend_from_slice(into.filled()),
                Ok(0) | Err(_) => return true,
            }
        }
        let mut rest = &read_buf[..];
        while let Ok(Some((header, _))) = frame::first(rest) {
            if header.tag == tags::ERROR_RESPONSE {
                return true;
            }
            rest = &rest[HEADER_BYTES + header.body_bytes as usize..];
        }
        false
    }

    fn hear(&mut self, mut read_some: impl FnMut(&mut Stream, &mut ReadBuf<'_>) -> io::Result<()>) -> Heard {
        let mut piece = [std::mem::MaybeUninit::uninit(); 512];
        let mut read = BytesMut::new();
        loop {
            let mut into = ReadBuf::uninit(&mut piece);
            match read_some(&mut self.connection.stream, &mut into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(()) if !into.filled().is_empty() => read.extend_from_slice(into.filled()),
                Ok(()) | Err(_) => return Heard::Unusable,
            }
        }
        match read.is_empty() {
            true => Heard::Nothing,
            false if self.take_reports(&read) => Heard::Reports,
            false => Heard::Unusable,
        }
    }

    /// Whether `bytes` are ParameterStatus and notices, whole ones.
    fn take_reports(&mut self, mut bytes: &[u8]) -> bool {
        while let Ok(Some((header, body))) = frame::first(bytes) {
            match header.tag {
                tags::PARAMETER_STATUS => {
                    if let Some((name, value)) = message::read_parameter_status(body) {
                        message::note_parameter(&mut self.connection.parameters, name, value);
                    }
                }
                tags::NOTICE_RESPONSE => {}
                _ => return false,
            }
            bytes = &bytes[HEADER_BYTES + header.body_bytes as usize..];
        }
        bytes.is_empty()
    }
}

/// Logs in to `server` as the session's user. Where a fence of ours has changed the read-only default, and the session must
/// not feel it, the backend starts with the one that its role would have had before the fence.
pub(super) async fn open(
    shared: &Shared,
    login: &Login,
    database: &Database,
    server: ServerRole,
) -> Result<Backend, ConnectError> {
    open_noting(shared, login, database, server).await.map(|(backend, _given)| backend)
}

/// Logs in on behalf of nobody who waits: where the server is full, connections that wait for clients stay.
pub(super) async fn open_aside(
    shared: &Shared,
    login: &Login,
    database: &Database,
    server: ServerRole,
) -> Result<Backend, ConnectError> {
    open_with(shared, login, database, server, Room::AsItIs).await.map(|(backend, _given)| backend)
}

/// Whether connections that wait for clients are closed where the server is full.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Made,
    AsItIs,
}

/// As [`open`], with the read-only default that the backend was given.
pub(super) async fn open_noting(
    shared: &Shared,
    login: &Login,
    database: &Database,
    server: ServerRole,
) -> Result<(Backend, Option<String>), ConnectError> {
    open_with(shared, login, database, server, Room::Made).await
}

async fn open_with(
    shared: &Shared,
    login: &Login,
    database: &Database,
    server: ServerRole,
    room: Room,
) -> Result<(Backend, Option<String>), ConnectError> {
    loop {
        let given = given_read_only(login, database, server);
        let connection = log_in(shared, login, given.as_deref(), server, room).await?;
        // A fence may have been raised or lifted since it was looked at. The window is opened before its fence can be felt
        // and closed after that, so what it is now tells what the server started with.
        if given_read_only(login, database, server) == given {
            return Ok((Backend { connection, server }, given));
        }
        // The link may be gone; the server notices that too.
        let _closed = tokio::time::timeout(CLOSING, connection.terminate()).await;
    }
}

/// The read-only default that a backend of this login is given on `server` as things are; none: it has its own.
pub(super) fn given_read_only(login: &Login, database: &Database, server: ServerRole) -> Option<String> {
    database.read_only_default(server, &login.user).filter(|_| !sets_read_only(login))
}

async fn log_in(
    shared: &Shared,
    login: &Login,
    read_only: Option<&str>,
    server: ServerRole,
    room: Room,
) -> Result<RawConnection, ConnectError> {
    let connector = shared.connector(server);
    let in_window = read_only.map(|default| {
        let mut login = login.clone();
        login.parameters.push((READ_ONLY.to_owned(), default.to_owned()));
        login
    });
    let login = in_window.as_ref().unwrap_or(login);
    let mut connection = match connector.raw(login).await {
        Err(error) if room == Room::Made && is_full(&error) && shared.vacancies.make_room(server).await => {
            connector.raw(login).await?
        }
        opened => opened?,
    };
    // Where the system cannot, more waits here; that is no reason to refuse the client.
    let _limited = connection.stream.limit_unsent(UNSENT_BYTES);
    if connection.read_buf.is_empty() {
        // Its capacity is of no use any more: the relay has buffers of its own.
        connection.read_buf = bytes::BytesMut::new();
    }
    Ok(connection)
}

/// Whether the server, the database or the role has as many connections as it may have.
fn is_full(error: &ConnectError) -> bool {
    error.sqlstate() == Some(sqlstate::TOO_MANY_CONNECTIONS)
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
