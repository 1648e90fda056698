//! The admin console: a small PostgreSQL server over a stream that the proxy has authenticated already.
//!
//! It speaks the simple and the extended protocol, so that psql and every driver work. It holds no state beside the
//! client's prepared statements, and checks the user's right at every statement: a RELOAD that takes a user off the
//! list takes effect on the next one.

mod answer;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod link;
mod parse;

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use pgwire::api::auth::noop::NoopStartupHandler;
use pgwire::api::{ClientInfo, DefaultClient, NoopHandler, PgWireConnectionState};
use pgwire::error::{ErrorInfo, PgWireError};
use pgwire::messages::response::{ReadyForQuery, TransactionStatus};
use pgwire::messages::startup::{BackendKeyData, ParameterStatus, SecretKey};
use pgwire::messages::{PgWireBackendMessage, PgWireFrontendMessage};
use pgwire::tokio::server::{PgWireMessageServerCodec, process_error, process_message};
use tokio_util::codec::Framed;

use self::answer::Answerer;
use self::link::{Link, Unreadable};
use self::parse::Statement;
use super::service::Service;
use crate::postgres::Stream;
use crate::proxy::ConsoleKey;
use crate::shutdown::Tasks;
use crate::sqlstate;

/// How long a console session outlives the order to stop.
const LAST_ANSWER: Duration = Duration::from_millis(200);

/// Reads one statement as the console would, and does nothing of it. What the documentation shows is held against this.
pub fn understands(text: &str) -> Result<(), crate::admin::error::AdminError> {
    parse::parse(text).map(drop)
}

/// Serves the console. Cheap to clone.
#[derive(Clone)]
pub struct Console {
    service: Service,
    tasks: Tasks,
}

/// pgwire asks for a startup handler; the proxy has done the startup.
struct StartupDone;

impl NoopStartupHandler for StartupDone {}

impl Console {
    /// A console over `service`; its sessions end when `tasks` are told to stop.
    pub fn new(service: Service, tasks: Tasks) -> Self {
        Self { service, tasks }
    }

    /// Serves one client until it goes. It has been sent AuthenticationOk and nothing more; it cancels by `key`.
    pub async fn serve(self, stream: Stream, user: String, key: ConsoleKey) {
        let is_private = stream.is_private();
        let link = Link::new(stream);
        let told = key.told();
        let answerer = Arc::new(Answerer::new(self.service, user, link.presence(), key));
        let mut session = Session::new(link, is_private);
        let outcome = tokio::select! {
            outcome = session.run(&answerer, told) => outcome,
            // Safe to drop: what an order has begun runs in a task of the service.
            () = stopped(&self.tasks) => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "console session lost");
        }
    }
}

/// Resolves when the process stops, after the time that an answer may take: an order to stop is answered too.
async fn stopped(tasks: &Tasks) {
    tasks.stopping().await;
    tokio::time::sleep(LAST_ANSWER).await;
}

struct Session {
    socket: Framed<Link, PgWireMessageServerCodec<Statement>>,
}

impl Session {
    fn new(link: Link, is_private: bool) -> Self {
        // The address is not used: there is no authentication left to do.
        let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let client = DefaultClient::new(nowhere, is_private);
        Self { socket: Framed::new(link, PgWireMessageServerCodec::new(client)) }
    }

    async fn run(&mut self, answerer: &Arc<Answerer>, key: (i32, [u8; 4])) -> Result<(), std::io::Error> {
        self.greet(key).await?;
        let (startup, nothing) = (Arc::new(StartupDone), Arc::new(NoopHandler));
        while let Some(message) = self.socket.next().await {
            let message = match message {
                Ok(message) => message,
                Err(error) => return self.refuse(error).await,
            };
            if matches!(message, PgWireFrontendMessage::Terminate(_)) {
                return Ok(());
            }
            let is_extended = message.is_extended_query();
            let result = Box::pin(process_message(
                message,
                &mut self.socket,
                startup.clone(),
                answerer.clone(),
                answerer.clone(),
                nothing.clone(),
                nothing.clone(),
            ));
            if let Err(error) = result.await {
                process_error(&mut self.socket, error, is_extended).await?;
            }
        }
        Ok(())
    }

    /// Ends the session of a client of which nothing more can be read. It is told what it can mend.
    async fn refuse(&mut self, error: PgWireError) -> Result<(), std::io::Error> {
        let PgWireError::IoError(lost) = error else { return Err(std::io::Error::other(error)) };
        let (code, text) = match lost.get_ref().and_then(|cause| cause.downcast_ref::<Unreadable>()) {
            Some(cause @ Unreadable::TooLong(_)) => (sqlstate::PROGRAM_LIMIT_EXCEEDED, cause.to_string()),
            Some(cause @ Unreadable::Frame(_)) => (sqlstate::PROTOCOL_VIOLATION, cause.to_string()),
            None => return Err(lost),
        };
        let told = ErrorInfo::new("FATAL".to_owned(), code.to_owned(), text);
        self.socket.send(PgWireBackendMessage::ErrorResponse(told.into())).await?;
        self.socket.close().await
    }

    /// What a server says between AuthenticationOk and its first ReadyForQuery.
    async fn greet(&mut self, (pid, secret): (i32, [u8; 4])) -> Result<(), std::io::Error> {
        let parameters = [
            // Drivers read features off the number in front.
            ("server_version", concat!("15.0 (pgcutover ", env!("CARGO_PKG_VERSION"), ")")),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("IntervalStyle", "postgres"),
            ("TimeZone", "UTC"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("is_superuser", "off"),
        ];
        for (name, value) in parameters {
            let status = ParameterStatus::new(name.to_owned(), value.to_owned());
            self.socket.feed(PgWireBackendMessage::ParameterStatus(status)).await?;
        }
        let key = BackendKeyData::new(pid, SecretKey::I32(i32::from_be_bytes(secret)));
        self.socket.feed(PgWireBackendMessage::BackendKeyData(key)).await?;
        self.socket.set_state(PgWireConnectionState::ReadyForQuery);
        let ready = ReadyForQuery::new(TransactionStatus::Idle);
        self.socket.send(PgWireBackendMessage::ReadyForQuery(ready)).await
    }
}
