//! A server connection of a pool, and what is known of it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::profile::{Profile, Reported};
use super::registry::Seat;
use super::statements::Held;
use crate::postgres::{ParkedConnection, RawConnection};
use crate::proxy::backend::{Backend, Heard};
use crate::switch::ServerRole;

/// How long a connection that is given up may take to close.
const CLOSING: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(in crate::proxy) struct Link {
    pub(in crate::proxy) backend: Backend,
    /// What is set on it.
    pub(in crate::proxy) profile: Arc<Profile>,
    /// What was set on it when it was opened.
    pub(in crate::proxy) base: Arc<Profile>,
    /// What it has reported.
    pub(in crate::proxy) reported: Reported,
    /// The prepared statements that it has.
    pub(in crate::proxy) held: Held,
    /// Whose unnamed statement it has; 0: nobody's.
    pub(in crate::proxy) unnamed: u64,
    /// Something on it went otherwise than it was expected: it is not given to anybody else.
    pub(in crate::proxy) spoiled: bool,
    /// Its place among the connections of the pool.
    pub(in crate::proxy) seat: Seat,
    pub(super) opened: Instant,
    pub(super) idle_since: Instant,
}

/// A link on its way to another worker.
#[derive(Debug)]
pub(super) struct ParkedLink {
    connection: ParkedConnection,
    rest: Rest,
}

/// A link without its connection.
#[derive(Debug)]
struct Rest {
    server: ServerRole,
    profile: Arc<Profile>,
    base: Arc<Profile>,
    reported: Reported,
    held: Held,
    unnamed: u64,
    seat: Seat,
    opened: Instant,
    idle_since: Instant,
}

impl Link {
    pub(super) fn new(backend: Backend, profile: Arc<Profile>, seat: Seat) -> Self {
        let now = Instant::now();
        let reported = Arc::new(backend.connection.parameters.clone());
        Self {
            backend,
            base: profile.clone(),
            profile,
            reported,
            held: Held::default(),
            unnamed: 0,
            spoiled: false,
            opened: seat.opened().unwrap_or(now),
            seat,
            idle_since: now,
        }
    }

    pub(in crate::proxy) fn server(&self) -> ServerRole {
        self.backend.server
    }

    pub(in crate::proxy) fn pid(&self) -> i32 {
        self.backend.connection.pid
    }

    pub(in crate::proxy) fn connection(&mut self) -> &mut RawConnection {
        &mut self.backend.connection
    }

    /// It has just answered.
    pub(in crate::proxy) fn note_used(&mut self) {
        self.idle_since = Instant::now();
    }

    /// Custom settings that may be set on it. A server does not list them.
    pub(in crate::proxy) fn custom_names(&self) -> Vec<String> {
        self.profile.state.custom_names()
    }

    /// How long nobody has used it.
    pub(in crate::proxy) fn idle_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.idle_since)
    }

    /// Takes over what the connection has reported while something was done on it.
    pub(in crate::proxy) fn note_reported(&mut self) {
        if *self.reported != self.backend.connection.parameters {
            self.reported = Arc::new(self.backend.connection.parameters.clone());
        }
    }

    /// Whether the server has said nothing meanwhile but what it reports.
    pub(super) fn is_fresh(&mut self) -> bool {
        let heard = self.backend.listen_in();
        if heard == Heard::Reports {
            self.note_reported();
        }
        heard != Heard::Unusable
    }

    /// The body of a ParameterStatus.
    pub(in crate::proxy) fn note_parameter(&mut self, body: &[u8]) {
        let Some((name, value)) = crate::wire::message::read_parameter_status(body) else { return };
        crate::wire::message::note_parameter(&mut self.backend.connection.parameters, name, value);
        self.note_reported();
    }

    pub(super) fn park(self) -> io::Result<ParkedLink> {
        let Self { backend, profile, base, reported, held, unnamed, seat, opened, idle_since, spoiled: _ } = self;
        let connection = backend.connection.park()?;
        let rest = Rest { server: backend.server, profile, base, reported, held, unnamed, seat, opened, idle_since };
        Ok(ParkedLink { connection, rest })
    }

    /// Ends it in good order, in the background.
    pub(in crate::proxy) fn close(self) {
        let Self { backend, seat, .. } = self;
        drop(seat);
        tokio::task::spawn_local(async move {
            // Best effort: the server notices a closed socket too.
            let _closed = tokio::time::timeout(CLOSING, backend.connection.terminate()).await;
        });
    }
}

impl ParkedLink {
    pub(super) fn resume(self) -> io::Result<Link> {
        let Rest { server, profile, base, reported, held, unnamed, seat, opened, idle_since } = self.rest;
        let backend = Backend { connection: self.connection.resume()?, server };
        Ok(Link { backend, profile, base, reported, held, unnamed, spoiled: false, seat, opened, idle_since })
    }
}
