//! Opening connections to one of the two configured servers.

use crate::config;
use crate::postgres::{Login, RawConnection};

/// A random name of this process, part of the `application_name` of everything it opens
/// (`pgcutover/<instance>/<purpose>`), so that its own backends can be told from strangers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceId(String);

impl InstanceId {
    /// A fresh random id, 16 hexadecimal digits.
    pub fn random() -> Self {
        Self(format!("{:016x}", rand::random::<u64>()))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `application_name` of a connection opened for `purpose`, at most 63 bytes.
    pub fn application_name(&self, purpose: &str) -> String {
        format!("pgcutover/{}/{purpose}", self.0)
    }
}

/// A connection could not be opened. Says which server, at which step, and what mends it; holds no secret.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConnectError {
    message: String,
    sqlstate: Option<String>,
}

impl ConnectError {
    /// SQLSTATE that the server refused with, if it was the server.
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }
}

/// Opens connections to one server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connector {
    server: config::Server,
    label: String,
    instance: InstanceId,
}

impl Connector {
    /// Reads certificates; `label` is `source` or `target`, for messages.
    pub fn new(server: &config::Server, label: &str, instance: &InstanceId) -> Result<Self, ConnectError> {
        Ok(Self { server: server.clone(), label: label.to_owned(), instance: instance.clone() })
    }

    /// The configured address.
    pub fn server(&self) -> &config::Server {
        &self.server
    }

    /// `source` or `target`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Who we are.
    pub fn instance(&self) -> &InstanceId {
        &self.instance
    }

    /// A control session: tokio-postgres as the configured user, with every setting that a role or database could
    /// have changed to our harm pinned in the startup packet: no statement, lock, idle or transaction time-outs,
    /// `default_transaction_read_only=off`, `synchronous_commit=on`, UTF8, ISO dates, `IntervalStyle=postgres`, `extra_float_digits=3`,
    /// `bytea_output=hex`, `TimeZone=UTC`, `search_path=pg_catalog`, `row_security=off`.
    pub async fn control(&self, database: &str, purpose: &str) -> Result<Control, ConnectError> {
        let _ = (database, purpose);
        unimplemented!()
    }

    /// The configured user's own login, for raw connections (COPY, apply, replication) with the same pinned settings.
    pub fn own_login(&self, database: &str, purpose: &str) -> Login {
        let _ = (database, purpose);
        unimplemented!()
    }

    /// A raw connection that has seen its first ReadyForQuery.
    pub async fn raw(&self, login: &Login) -> Result<RawConnection, ConnectError> {
        let _ = login;
        unimplemented!()
    }

    /// Sends a CancelRequest and waits until the server has closed the connection (it has then sent the signal).
    pub async fn cancel(&self, pid: i32, key: &[u8]) -> Result<(), ConnectError> {
        let _ = (pid, key);
        unimplemented!()
    }
}

/// A control session. Dereferences to `tokio_postgres::Client`; its driver task ends with it.
pub struct Control {
    client: tokio_postgres::Client,
}

impl Control {
    /// `server_version_num`, for example 150018.
    pub fn version_num(&self) -> u32 {
        unimplemented!()
    }

    /// The server process that serves this session.
    pub fn pid(&self) -> i32 {
        unimplemented!()
    }
}

impl std::ops::Deref for Control {
    type Target = tokio_postgres::Client;
    fn deref(&self) -> &Self::Target {
        &self.client
    }
}

impl std::ops::DerefMut for Control {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.client
    }
}
