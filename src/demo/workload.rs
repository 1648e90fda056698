//! The application: many connections with one fixed connection string, each doing what real programs do.
//!
//! A client opens one connection and keeps it. It never retries on its own: an error is an error of the demo. After a
//! broken connection it connects anew, which is counted, so that one failure does not hide the rest.

mod client;
mod listener;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::demo::ledger::ClientLedger;
use crate::demo::shop::Size;

/// An answer that takes longer is remembered with its time, in case it turns out to be the longest.
const REMEMBERED_WAIT: Duration = Duration::from_millis(2);

/// A client that has waited this long gives up and reports it.
const ANSWER_BOUND: Duration = Duration::from_secs(120);

/// What a client does, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Named prepared statements, each a transaction of its own.
    Prepared,
    /// BEGIN, several statements, NOTIFY, COMMIT.
    Transactions,
    /// Settings made once at the start, read back before each write.
    Settings,
    /// COPY FROM STDIN, a batch at a time.
    Copy,
    /// LISTEN once, then only wait.
    Listener,
}

impl Kind {
    /// One listener, then the others in turn, most of them prepared statements and transactions.
    pub fn of_client(client: usize) -> Self {
        match client {
            1 => Self::Listener,
            _ => [Self::Prepared, Self::Transactions, Self::Prepared, Self::Settings, Self::Transactions, Self::Copy]
                [client % 6],
        }
    }
}

/// One request, from sending it to its answer.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    /// When it was sent.
    pub began: Instant,
    /// How long the answer took.
    pub lasted: Duration,
}

/// What one client has to tell at its end.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Its writes.
    pub ledger: ClientLedger,
    /// Requests answered.
    pub requests: u64,
    /// What went wrong, each a line; the first ones only.
    pub errors: Vec<String>,
    /// How often something went wrong.
    pub error_count: u64,
    /// Connections opened after the first.
    pub reconnects: u64,
    /// The long waits.
    pub waits: Vec<Wait>,
    /// Write numbers sent with NOTIFY in transactions that were acknowledged.
    pub notified: Vec<i64>,
    /// Write numbers that came as notifications.
    pub heard: Vec<i64>,
}

impl Outcome {
    fn new(client: usize) -> Self {
        Self { ledger: ClientLedger::new(i64::try_from(client).unwrap_or(i64::MAX)), ..Self::default() }
    }

    /// Remembers an error; only the first few keep their text.
    pub fn error(&mut self, text: String) {
        self.error_count += 1;
        if self.errors.len() < 5 {
            self.errors.push(text);
        }
    }

    fn answered(&mut self, began: Instant) {
        self.requests += 1;
        let lasted = began.elapsed();
        if lasted > REMEMBERED_WAIT {
            self.waits.push(Wait { began, lasted });
        }
    }
}

/// For the progress line while the application runs.
#[derive(Debug, Default)]
pub struct Tally {
    /// Writes acknowledged.
    pub writes: AtomicU64,
    /// Errors of any client.
    pub errors: AtomicU64,
    /// Notifications that came.
    pub heard: AtomicU64,
}

/// What every client is given.
#[derive(Clone)]
struct Orders {
    client: usize,
    kind: Kind,
    config: tokio_postgres::Config,
    size: Size,
    /// Between two rounds of one client.
    think_time: Duration,
    tally: Arc<Tally>,
    stop: CancellationToken,
    /// The listener listens: nobody sends before.
    listening: CancellationToken,
}

/// The running application. Dropped: its clients are aborted.
pub struct Workload {
    clients: JoinSet<Outcome>,
    stop: CancellationToken,
    stop_listening: CancellationToken,
    tally: Arc<Tally>,
}

impl Workload {
    /// Starts `clients` connections to `config`.
    pub fn start(config: &tokio_postgres::Config, clients: usize, size: Size) -> Self {
        let stop = CancellationToken::new();
        let stop_listening = CancellationToken::new();
        let listening = CancellationToken::new();
        let tally = Arc::new(Tally::default());
        let mut running = JoinSet::new();
        for client in 1..=clients {
            let kind = Kind::of_client(client);
            let mut config = config.clone();
            config.application_name(format!("shop-{client}"));
            let stop = if kind == Kind::Listener { &stop_listening } else { &stop };
            let orders = Orders {
                client,
                kind,
                config,
                size,
                think_time: Duration::from_millis(15),
                tally: Arc::clone(&tally),
                stop: stop.clone(),
                listening: listening.clone(),
            };
            match kind {
                Kind::Listener => running.spawn(listener::run(orders)),
                Kind::Prepared | Kind::Transactions | Kind::Settings | Kind::Copy => running.spawn(client::run(orders)),
            };
        }
        Self { clients: running, stop, stop_listening, tally }
    }

    /// Counts so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Ends every client after its round, the listener last, and collects what they have to tell.
    pub async fn finish(mut self) -> Vec<Outcome> {
        self.stop.cancel();
        let mut outcomes = Vec::new();
        // The listener hears what the last transactions sent, so it goes on until the others are done.
        while self.clients.len() > 1 {
            collect(self.clients.join_next().await, &mut outcomes);
        }
        let awaited: usize = outcomes.iter().map(|outcome| outcome.notified.len()).sum();
        let awaited = u64::try_from(awaited).unwrap_or(u64::MAX);
        // Notifications are sent after the commit is answered: they may be on their way still.
        let patience = Instant::now() + Duration::from_secs(10);
        while self.tally.heard.load(Ordering::Relaxed) < awaited && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.stop_listening.cancel();
        while let Some(outcome) = self.clients.join_next().await {
            collect(Some(outcome), &mut outcomes);
        }
        check_notifications(&mut outcomes);
        outcomes
    }
}

fn collect(joined: Option<Result<Outcome, tokio::task::JoinError>>, outcomes: &mut Vec<Outcome>) {
    match joined {
        Some(Ok(outcome)) => outcomes.push(outcome),
        Some(Err(error)) => {
            let mut outcome = Outcome::default();
            outcome.error(format!("a client of the demo ended early: {error}"));
            outcomes.push(outcome);
        }
        None => {}
    }
}

/// A notification that was sent and did not come, or came twice, is an error that the application felt.
fn check_notifications(outcomes: &mut [Outcome]) {
    let mut heard: HashMap<i64, u64> = HashMap::new();
    for number in outcomes.iter().flat_map(|outcome| &outcome.heard) {
        *heard.entry(*number).or_default() += 1;
    }
    let lost: Vec<i64> = outcomes
        .iter()
        .flat_map(|outcome| &outcome.notified)
        .filter(|number| !heard.contains_key(number))
        .copied()
        .collect();
    let twice = heard.iter().filter(|(_, times)| **times > 1).map(|(number, _)| *number);
    let complaints: Vec<String> = lost
        .iter()
        .map(|number| format!("notification {number} was sent and never came"))
        .chain(twice.map(|number| format!("notification {number} came more than once")))
        .collect();
    if let Some(first) = outcomes.first_mut() {
        complaints.into_iter().for_each(|complaint| first.error(complaint));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_repeated_notifications_are_errors() {
        let sender = Outcome { notified: vec![1, 2, 3], ..Outcome::default() };
        let listener = Outcome { heard: vec![1, 3, 3], ..Outcome::default() };
        let mut outcomes = vec![sender, listener];
        check_notifications(&mut outcomes);
        assert_eq!(outcomes[0].error_count, 2, "{:?}", outcomes[0].errors);
    }

    #[test]
    fn the_default_application_does_everything() {
        let kinds: Vec<Kind> = (1..=32).map(Kind::of_client).collect();
        for kind in [Kind::Prepared, Kind::Transactions, Kind::Settings, Kind::Copy, Kind::Listener] {
            assert!(kinds.contains(&kind), "{kind:?}");
        }
        assert_eq!(kinds.iter().filter(|kind| **kind == Kind::Listener).count(), 1);
    }
}
