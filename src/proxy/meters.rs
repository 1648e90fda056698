//! Counters of a worker: plain cells that are handed to the metrics once a second, so that no two cores contend for a
//! cache line at every transaction.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use prometheus::local::LocalHistogram;
use prometheus::{IntCounter, IntGauge};

use crate::switch::ServerRole;
use crate::telemetry::metrics::{BackendState, ByteDirection, ClientState, Metrics};

/// What is counted for one database on one worker.
pub(super) struct DatabaseMeters {
    transactions: Tally,
    bytes_from_client: Tally,
    bytes_to_client: Tally,
    /// By [`ClientState`]: idle, active, waiting.
    clients: [Level; 3],
    held: Level,
    /// By server, then by [`BackendState`]: idle, active, prepared.
    backends: [[Level; 3]; 2],
    client_wait_seconds: RefCell<LocalHistogram>,
    transaction_seconds: RefCell<LocalHistogram>,
}

/// Something that is counted up.
struct Tally {
    since_flush: Cell<u64>,
    total: IntCounter,
}

/// Something that goes up and down.
struct Level {
    change: Cell<i64>,
    gauge: IntGauge,
}

impl Tally {
    fn new(total: IntCounter) -> Self {
        Self { since_flush: Cell::new(0), total }
    }

    #[inline]
    fn add(&self, amount: u64) {
        self.since_flush.set(self.since_flush.get().wrapping_add(amount));
    }

    fn flush(&self) {
        self.total.inc_by(self.since_flush.take());
    }
}

impl Level {
    fn new(gauge: IntGauge) -> Self {
        Self { change: Cell::new(0), gauge }
    }

    #[inline]
    fn add(&self, amount: i64) {
        self.change.set(self.change.get() + amount);
    }

    fn flush(&self) {
        self.gauge.add(self.change.take());
    }
}

/// What one session counts as at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) client: Option<ClientState>,
    pub(super) backend: Option<(ServerRole, BackendState)>,
    pub(super) prepared: Option<ServerRole>,
}

fn client_index(state: ClientState) -> usize {
    match state {
        ClientState::Idle => 0,
        ClientState::Active => 1,
        ClientState::Waiting => 2,
    }
}

fn backend_index(state: BackendState) -> usize {
    match state {
        BackendState::Idle => 0,
        BackendState::Active => 1,
        BackendState::Prepared => 2,
    }
}

impl DatabaseMeters {
    pub(super) fn new(metrics: &Metrics, database: &str) -> Self {
        let bytes = |direction: ByteDirection| metrics.bytes.with_label_values(&[database, direction.as_str()]);
        let clients = [ClientState::Idle, ClientState::Active, ClientState::Waiting];
        let backends = [BackendState::Idle, BackendState::Active, BackendState::Prepared];
        let backend = |server: ServerRole, state: BackendState| {
            let server = server.to_string();
            Level::new(metrics.server_connections.with_label_values(&[database, &server, state.as_str()]))
        };
        Self {
            transactions: Tally::new(metrics.transactions.with_label_values(&[database])),
            bytes_from_client: Tally::new(bytes(ByteDirection::FromClient)),
            bytes_to_client: Tally::new(bytes(ByteDirection::ToClient)),
            clients: clients
                .map(|state| Level::new(metrics.client_connections.with_label_values(&[database, state.as_str()]))),
            held: Level::new(metrics.held_sessions.with_label_values(&[database])),
            backends: [ServerRole::Source, ServerRole::Target]
                .map(|server| backends.map(|state| backend(server, state))),
            client_wait_seconds: RefCell::new(metrics.client_wait_seconds.local()),
            transaction_seconds: RefCell::new(metrics.transaction_seconds.local()),
        }
    }

    /// Bytes that were written to the backend.
    #[inline]
    pub(super) fn sent_up(&self, bytes: usize) {
        self.bytes_from_client.add(bytes as u64);
    }

    /// Bytes that were written to the client.
    #[inline]
    pub(super) fn sent_down(&self, bytes: usize) {
        self.bytes_to_client.add(bytes as u64);
    }

    /// A transaction waited so long for its admission. Those that did not wait are not observed.
    pub(super) fn waited(&self, time: Duration) {
        self.client_wait_seconds.borrow_mut().observe(time.as_secs_f64());
    }

    /// A transaction has ended.
    #[inline]
    pub(super) fn took(&self, time: Duration) {
        self.transactions.add(1);
        self.transaction_seconds.borrow_mut().observe(time.as_secs_f64());
    }

    /// A session counts as something else from now on.
    #[inline]
    pub(super) fn shift(&self, from: Counted, to: Counted) {
        self.count(from, -1);
        self.count(to, 1);
    }

    #[inline]
    fn count(&self, what: Counted, amount: i64) {
        if let Some(state) = what.client {
            self.clients[client_index(state)].add(amount);
            if state == ClientState::Waiting {
                self.held.add(amount);
            }
        }
        if let Some((server, state)) = what.backend {
            self.backends[server as usize][backend_index(state)].add(amount);
        }
        if let Some(server) = what.prepared {
            self.backends[server as usize][backend_index(BackendState::Prepared)].add(amount);
        }
    }

    /// Hands over what was counted since the last time.
    pub(super) fn flush(&self) {
        self.transactions.flush();
        self.bytes_from_client.flush();
        self.bytes_to_client.flush();
        self.clients.iter().for_each(Level::flush);
        self.held.flush();
        self.backends.iter().flatten().for_each(Level::flush);
        self.client_wait_seconds.borrow().flush();
        self.transaction_seconds.borrow().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_shows_after_a_flush() {
        let metrics = Metrics::new().expect("names are distinct");
        let meters = DatabaseMeters::new(&metrics, "shop");
        let idle = Counted {
            client: Some(ClientState::Idle),
            backend: Some((ServerRole::Target, BackendState::Idle)),
            prepared: Some(ServerRole::Source),
        };
        let held = Counted { client: Some(ClientState::Waiting), ..idle };
        meters.shift(Counted::default(), idle);
        meters.shift(idle, held);
        meters.took(Duration::from_millis(1));
        meters.sent_up(7);
        meters.flush();
        assert_eq!(metrics.client_connections.with_label_values(&["shop", "idle"]).get(), 0);
        assert_eq!(metrics.client_connections.with_label_values(&["shop", "waiting"]).get(), 1);
        assert_eq!(metrics.held_sessions.with_label_values(&["shop"]).get(), 1);
        assert_eq!(metrics.server_connections.with_label_values(&["shop", "target", "idle"]).get(), 1);
        assert_eq!(metrics.server_connections.with_label_values(&["shop", "source", "prepared"]).get(), 1);
        assert_eq!(metrics.bytes.with_label_values(&["shop", "from_client"]).get(), 7);
        assert_eq!(metrics.transaction_seconds.get_sample_count(), 1);
        meters.shift(held, Counted::default());
        meters.flush();
        assert_eq!(metrics.held_sessions.with_label_values(&["shop"]).get(), 0);
    }
}
