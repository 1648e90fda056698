//! Opening connections to one of the two configured servers.

use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;
use tokio_postgres::tls::NoTlsStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::config::{self, SslMode};
use crate::postgres::derived_keys::DerivedKeys;
use crate::postgres::dial::{self, Encryption, Unread};
use crate::postgres::login::{LoginError, cancel_request, log_in};
use crate::postgres::stall::{Departed, Metered, StallWatch};
use crate::postgres::{Credential, Login, RawConnection, RawError, Stream, settings, tls};
use crate::sqlstate;

/// A control session whose server does not even acknowledge what it is sent is given up after this.
const MAX_UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// All of them, because a condition would need an operator, and the search_path of such a session is anybody's.
const SETTINGS: &str = "SELECT name, setting, source FROM pg_catalog.pg_settings";

/// Sources of values that are not the server's.
const NOT_THE_SERVERS: [&str; 3] = ["user", "database", "database user"];

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
    server_message: Option<String>,
}

impl ConnectError {
    /// SQLSTATE that the server refused with, if it was the server.
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }

    /// The primary message that the server refused with, if it was the server: what a client that connects directly
    /// would have been shown.
    pub fn server_message(&self) -> Option<&str> {
        self.server_message.as_deref()
    }
}

/// Opens connections to one server. Cheap to clone.
#[derive(Clone)]
pub struct Connector {
    inner: Arc<Inner>,
}

struct Inner {
    server: config::Server,
    label: String,
    instance: InstanceId,
    /// Where `sslmode` and the kind of socket may use TLS.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    /// Keys of the passwords that were used here.
    derived: DerivedKeys,
    departed: Departed,
    /// Outlives whoever closes a connection: streams have short-lived runtimes of their own.
    runtime: Option<tokio::runtime::Handle>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connector({})", self.place())
    }
}

impl Connector {
    /// Reads certificates; `label` is `source` or `target`, for messages.
    pub fn new(server: &config::Server, label: &str, instance: &InstanceId) -> Result<Self, ConnectError> {
        let tls = tls::connector(server).map_err(|cause| ConnectError {
            message: format!("{label} {}:{}: preparing TLS: {cause}", server.host, server.port),
            sqlstate: None,
            server_message: None,
        })?;
        let derived = DerivedKeys::new();
        let inner = Inner {
            server: server.clone(),
            label: label.to_owned(),
            instance: instance.clone(),
            tls,
            derived,
            departed: Departed::default(),
            runtime: tokio::runtime::Handle::try_current().ok(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The configured address.
    pub fn server(&self) -> &config::Server {
        &self.inner.server
    }

    /// `source` or `target`.
    pub fn label(&self) -> &str {
        &self.inner.label
    }

    pub(super) fn departed(&self) -> &Departed {
        &self.inner.departed
    }

    /// The runtime that it was made on; none: there was none.
    pub(super) fn runtime(&self) -> Option<&tokio::runtime::Handle> {
        self.inner.runtime.as_ref()
    }

    /// Who we are.
    pub fn instance(&self) -> &InstanceId {
        &self.inner.instance
    }

    /// A control session: tokio-postgres as the configured user, with every setting that a role or database could
    /// have changed to our harm pinned: no statement, lock, idle or transaction time-outs,
    /// `default_transaction_read_only=off`, `synchronous_commit=on`, UTF8, ISO dates, `IntervalStyle=postgres`, `extra_float_digits=3`,
    /// `bytea_output=hex`, `TimeZone=UTC`, `search_path=pg_catalog`, `row_security=off`.
    pub async fn control(&self, database: &str, purpose: &str) -> Result<Control, ConnectError> {
        self.bounded(async {
            let mut attempt = Box::pin(self.control_once(database, purpose, Encryption::AsConfigured)).await;
            if self.tries_again_in_plain(&attempt) {
                attempt = Box::pin(self.control_once(database, purpose, Encryption::Without)).await;
            }
            attempt
        })
        .await
    }

    /// The configured user's own login, for raw connections (COPY, apply, replication) with the same pinned settings.
    /// [`Self::raw`] completes them after login with those that only newer servers know.
    pub fn own_login(&self, database: &str, purpose: &str) -> Login {
        let server = &self.inner.server;
        Login {
            user: server.user.clone(),
            database: database.to_owned(),
            credential: server.password.clone().map_or(Credential::None, Credential::Password),
            parameters: vec![
                ("client_encoding".to_owned(), "UTF8".to_owned()),
                ("application_name".to_owned(), self.inner.instance.application_name(purpose)),
                ("options".to_owned(), settings::startup_options()),
            ],
        }
    }

    /// A raw connection that has seen its first ReadyForQuery.
    pub async fn raw(&self, login: &Login) -> Result<RawConnection, ConnectError> {
        self.bounded(async {
            let mut attempt = Box::pin(self.raw_once(login, Encryption::AsConfigured)).await;
            if self.tries_again_in_plain(&attempt) {
                attempt = Box::pin(self.raw_once(login, Encryption::Without)).await;
            }
            attempt
        })
        .await
    }

    /// The server's own value of the setting `name`, as a session of `database` finds it that pins nothing, unlike
    /// ours. None where the login role or the database has a value of its own, which hides it, or the server knows no
    /// such setting.
    pub async fn server_setting(&self, database: &str, name: &str) -> Result<Option<String>, ConnectError> {
        let mut login = self.own_login(database, "settings");
        login.parameters.retain(|(parameter, _)| parameter != "options");
        self.bounded(async {
            let mut connection = Box::pin(self.raw(&login)).await?;
            let rows = connection.simple_query(SETTINGS).await;
            let rows = rows.map_err(|error| self.login_error(&login, &error.into()))?;
            // The answer is here; how the session ends does not matter.
            let _ended = connection.terminate().await;
            Ok(rows.into_iter().find_map(|row| {
                let [known, value, source] = <[Option<String>; 3]>::try_from(row).ok()?;
                value
                    .filter(|_| known.is_some_and(|known| known == name))
                    .filter(|_| source.is_some_and(|source| !NOT_THE_SERVERS.contains(&source.as_str())))
            }))
        })
        .await
    }

    /// Sends a CancelRequest and waits until the server has closed the connection (it has then sent the signal).
    pub async fn cancel(&self, pid: i32, key: &[u8]) -> Result<(), ConnectError> {
        self.bounded(async {
            let mut stream = self.open(Encryption::AsConfigured, Unread::Here).await?;
            let sent = async {
                stream.write_all(&cancel_request(pid, key)).await?;
                stream.flush().await?;
                // The server answers nothing; it closes, and a reset is a close too.
                match stream.read(&mut [0; 1]).await {
                    Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
                    Ok(_) | Err(_) => Ok(()),
                }
            };
            sent.await.map_err(|error: io::Error| self.error("cancelling a query", &error.to_string(), ""))
        })
        .await
    }

    async fn control_once(
        &self,
        database: &str,
        purpose: &str,
        encryption: Encryption,
    ) -> Result<Control, ConnectError> {
        let stream = self.open(encryption, Unread::Here).await?;
        let limited = stream.limit_unacknowledged(MAX_UNACKNOWLEDGED);
        limited.map_err(|error| self.error("preparing the socket", &error.to_string(), ""))?;
        let mut config = tokio_postgres::Config::new();
        config
            .user(&self.inner.server.user)
            .dbname(database)
            .application_name(self.inner.instance.application_name(purpose))
            .options(settings::startup_options())
            // TLS has been negotiated already, below tokio-postgres.
            .ssl_mode(tokio_postgres::config::SslMode::Disable);
        if let Some(password) = &self.inner.server.password {
            config.password(password.expose());
        }
        let refused = |error: tokio_postgres::Error| self.control_error(database, &error);
        let (stream, meter) = Metered::new(stream);
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(refused)?;
        let version_num = connection.parameter("server_version").and_then(settings::version_num).unwrap_or(0);
        let (place, patience, watching) = (self.place(), self.inner.server.stall_timeout, meter.clone());
        let driver = tokio::spawn(async move {
            tokio::select! {
                () = drive(connection, place) => {}
                // The socket is dropped, and whoever uses the session is told that it is closed.
                () = watching.stalled(patience) => {}
            }
        });
        let mut control = Control { client, version_num, pid: 0, driver };
        if let Some(statement) = settings::after_login(version_num) {
            control.client.batch_execute(&statement).await.map_err(refused)?;
        }
        let row = control.client.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await.map_err(refused)?;
        control.pid = row.get(0);
        let name = self.inner.instance.application_name(purpose);
        meter.watched_by(StallWatch::over(self, database, &name, control.pid));
        Ok(control)
    }

    async fn raw_once(&self, login: &Login, encryption: Encryption) -> Result<RawConnection, ConnectError> {
        let streams = self.is_own(login) && login.parameters.iter().any(|(name, _)| name == "replication");
        let unread = if streams { Unread::WithSender } else { Unread::Here };
        let stream = self.open(encryption, unread).await?;
        let mut connection = RawConnection::before_login(stream, &self.inner.label);
        log_in(&mut connection, login, &self.inner.derived).await.map_err(|error| self.login_error(login, &error))?;
        if self.is_own(login) {
            let name = login.parameters.iter().find(|(name, _)| name == "application_name").map(|(_, value)| value);
            let name = name.map_or("", String::as_str);
            connection.watched_by(StallWatch::over(self, &login.database, name, connection.pid));
            let unconverted = connection.parameter("server_encoding").and_then(settings::unconverted);
            let later = settings::after_login(connection.version_num());
            let statements: Vec<&str> = later.as_deref().into_iter().chain(unconverted).collect();
            if statements.is_empty() {
                return Ok(connection);
            }
            let pinned = connection.simple_query(&statements.join("; ")).await;
            pinned.map_err(|error| self.login_error(login, &error.into()))?;
        }
        Ok(connection)
    }

    /// Whether `login` is one of [`Self::own_login`]. A client may have read this process's name and call itself by it.
    fn is_own(&self, login: &Login) -> bool {
        let ours = self.inner.instance.application_name("");
        let has = |wanted: &str, is: &dyn Fn(&str) -> bool| {
            login.parameters.iter().any(|(name, value)| name == wanted && is(value))
        };
        login.user == self.inner.server.user
            && has("application_name", &|value| value.starts_with(&ours))
            && has("options", &|value| value == settings::startup_options())
    }

    async fn open(&self, encryption: Encryption, unread: Unread) -> Result<Stream, ConnectError> {
        let opened = dial::open(&self.inner.server, self.inner.tls.as_ref(), encryption, unread).await;
        opened.map_err(|error| self.error(error.step, &error.cause, error.hint))
    }

    /// `prefer` connects without TLS where the server's pg_hba.conf lets nobody in with it, as libpq does.
    fn tries_again_in_plain<T>(&self, attempt: &Result<T, ConnectError>) -> bool {
        self.inner.server.sslmode == SslMode::Prefer
            && self.inner.tls.is_some()
            && attempt.as_ref().is_err_and(|error| error.sqlstate() == Some(sqlstate::INVALID_AUTHORIZATION))
    }

    /// Bounds everything from the first packet to ReadyForQuery by `connect_timeout`.
    async fn bounded<T>(&self, attempt: impl Future<Output = Result<T, ConnectError>>) -> Result<T, ConnectError> {
        let limit = self.inner.server.connect_timeout;
        match tokio::time::timeout(limit, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.error(
                "connecting",
                &format!("no answer within connect_timeout ({limit:?})"),
                "is the address right, and does a firewall drop packets on the way?",
            )),
        }
    }

    /// `source 10.0.0.5:5432`, for messages.
    fn place(&self) -> String {
        format!("{} {}:{}", self.inner.label, self.inner.server.host, self.inner.server.port)
    }

    fn error(&self, step: &str, cause: &str, hint: &str) -> ConnectError {
        let hint = if hint.is_empty() { String::new() } else { format!(" ({hint})") };
        ConnectError {
            message: format!("{}: {step}: {cause}{hint}", self.place()),
            sqlstate: None,
            server_message: None,
        }
    }

    fn login_error(&self, login: &Login, error: &LoginError) -> ConnectError {
        let step = format!("logging in as {:?} to database {:?}", login.user, login.database);
        match error {
            LoginError::Raw(RawError::Server { code, report }) => self.refused(&step, code, &report.message),
            LoginError::Raw(RawError::Io { source, .. }) => {
                let cause = if source.kind() == io::ErrorKind::UnexpectedEof {
                    "the server closed the connection".to_owned()
                } else {
                    source.to_string()
                };
                self.error(&step, &cause, "the server's log says why")
            }
            LoginError::Raw(RawError::Protocol { .. }) | LoginError::Sasl(_) => {
                self.error(&step, &error.to_string(), "")
            }
            LoginError::Credential { .. } | LoginError::Method(_) => self.error(
                &step,
                &error.to_string(),
                "change the method for this role in the server's pg_hba.conf, or the credential given here",
            ),
        }
    }

    fn control_error(&self, database: &str, error: &tokio_postgres::Error) -> ConnectError {
        let step = format!("logging in as {:?} to database {database:?}", self.inner.server.user);
        if let Some(refusal) = error.as_db_error() {
            return self.refused(&step, refusal.code().code(), refusal.message());
        }
        let mut cause = error.to_string();
        let mut inner = std::error::Error::source(error);
        while let Some(next) = inner {
            let text = next.to_string();
            if !cause.contains(&text) {
                cause = format!("{cause}: {text}");
            }
            inner = next.source();
        }
        if cause.contains("password missing") {
            return self.error(&step, "the server asks for a password", &self.password_hint());
        }
        self.error(&step, &cause, "the server's log says why")
    }

    /// The server said no: its words, and what mends it.
    fn refused(&self, step: &str, code: &str, message: &str) -> ConnectError {
        let hint = match code {
            sqlstate::INVALID_PASSWORD => self.password_hint(),
            sqlstate::INVALID_AUTHORIZATION => "pg_hba.conf there must let this role in from this host, or the role \
                                                must exist and have LOGIN"
                .to_owned(),
            sqlstate::TOO_MANY_CONNECTIONS => "raise max_connections there, or end idle sessions".to_owned(),
            sqlstate::CANNOT_CONNECT_NOW => "the server starts, stops or recovers: try again".to_owned(),
            _ => String::new(),
        };
        let mut error = self.error(step, &format!("{message} [{code}]"), &hint);
        error.sqlstate = Some(code.to_owned());
        error.server_message = Some(message.to_owned());
        error
    }

    fn password_hint(&self) -> String {
        format!("check password, password_file or password_env of [{}]", self.inner.label)
    }
}

/// Runs the driver of a control session until the session is dropped or the link breaks.
async fn drive(connection: tokio_postgres::Connection<Metered, NoTlsStream>, place: String) {
    if let Err(error) = connection.await {
        // Whoever uses the session gets the error and handles it; here it only helps to find the reason.
        tracing::debug!(server = place, %error, "control session ended");
    }
}

/// A control session. Dereferences to `tokio_postgres::Client`; its driver task ends with it.
#[derive(Debug)]
pub struct Control {
    client: tokio_postgres::Client,
    version_num: u32,
    pid: i32,
    driver: JoinHandle<()>,
}

impl Control {
    /// `server_version_num`, for example 150018.
    pub fn version_num(&self) -> u32 {
        self.version_num
    }

    /// The server process that serves this session.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends the session in order: returns once Terminate has been sent and the socket closed. Dropping a session does
    /// the same a moment later.
    pub async fn close(self) {
        let Self { client, driver, .. } = self;
        drop(client);
        // A driver that panicked or was aborted has closed its socket too.
        let _ended = driver.await;
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
