//! The clients that write: each round is one write or a few, every one numbered before it is sent.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use futures_util::{SinkExt as _, TryStreamExt as _};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Row, Statement};

use crate::demo::ledger::CLIENT_SPAN;
use crate::demo::workload::{ANSWER_BOUND, Kind, Orders, Outcome};

/// Rows of one COPY.
const COPY_ROWS: usize = 20;

/// What the settings client has set, and expects to read back for ever.
const SETTINGS: [(&str, &str); 4] = [
    ("TimeZone", "Asia/Tokyo"),
    ("app.tenant", "tenant-7"),
    ("statement_timeout", "55s"),
    ("search_path", "shop, pg_catalog"),
];

/// Opens the connection and makes rounds until told to stop.
pub(super) async fn run(orders: Orders) -> Outcome {
    let mut outcome = Outcome::new(orders.client);
    let mut random = StdRng::seed_from_u64(u64::try_from(orders.client).unwrap_or_default());
    let mut connections = 0_u64;
    // Both arms only wait; dropping either loses nothing.
    tokio::select! {
        () = orders.listening.cancelled() => {}
        () = orders.stop.cancelled() => {}
    }
    while !orders.stop.is_cancelled() {
        connections += 1;
        outcome.reconnects = connections - 1;
        match Session::open(&orders).await {
            Ok(mut session) => session.rounds(&orders, &mut outcome, &mut random).await,
            Err(error) => failed(&orders, &mut outcome, &format!("cannot connect: {}", describe(&error))),
        }
        // Reached early only after an error; without this a server that is away would be asked without pause.
        pause(&orders).await;
    }
    outcome
}

/// One request failed: no acknowledgement.
struct Failure {
    text: String,
    /// The server said no, so the write is not there. Otherwise the answer was lost.
    refused: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { text: describe(&error), refused: error.code().is_some() }
    }
}

struct Session {
    client: Client,
    statements: Vec<Statement>,
    /// Reservations that this session has made and not taken back.
    reservations: Vec<i64>,
    /// Rentals that this session has made and not ended.
    rentals: Vec<i64>,
}

const SET_POINTS: usize = 0;
const RESERVE: usize = 1;
const UNRESERVE: usize = 2;
const READ_OWN: usize = 3;
const RENT: usize = 4;
const PAY: usize = 5;
const NOTE: usize = 6;
const NOTIFY: usize = 7;
const RETURN: usize = 8;

/// Prepared once per connection, in the order of the constants above.
const STATEMENTS: [&str; 9] = [
    "WITH noted AS (INSERT INTO shop.write_log (write_no, kind, ref) VALUES ($1, 'customer', $2))
     UPDATE shop.customer SET profile = jsonb_set(profile, '{points}', to_jsonb($1::bigint)),
            tags = tags[1:2] || ('w' || $1::bigint)::text, write_no = $1 WHERE id = $2",
    "WITH noted AS (INSERT INTO shop.write_log (write_no, kind, ref) VALUES ($1, 'reserve', $2))
     INSERT INTO shop.reservation (customer_id, note, write_no) VALUES ($2, $3, $1) RETURNING id",
    "WITH gone AS (DELETE FROM shop.reservation WHERE id = $2 RETURNING id)
     INSERT INTO shop.write_log (write_no, kind, ref) SELECT $1::bigint, 'unreserve', id FROM gone",
    "SELECT max(write_no) FROM shop.write_log WHERE write_no BETWEEN $1 AND $2",
    "INSERT INTO shop.rental (inventory_id, customer_id, status, period, write_no)
     VALUES ($2, $3, $4::text::shop.rental_status, tstzrange(now(), now() + interval '3 days'), $1) RETURNING id",
    "INSERT INTO shop.payment (customer_id, amount, paid, write_no)
     VALUES ($2, ($1::bigint % 1000) / 100.0, date '2023-06-01' + ($1::bigint % 1200)::integer, $1)",
    "INSERT INTO shop.write_log (write_no, kind, ref) VALUES ($1, 'rental', $2)",
    "SELECT pg_notify('shop_events', $1::bigint::text)",
    "UPDATE shop.rental SET status = 'returned', write_no = $1 WHERE id = $2",
];

impl Session {
    async fn open(orders: &Orders) -> Result<Self, Error> {
        let (client, connection) = orders.config.connect(tokio_postgres::NoTls).await?;
        // Ends with the client; what breaks shows at the next request.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let mut statements = Vec::new();
        match orders.kind {
            Kind::Prepared | Kind::Transactions => {
                for sql in STATEMENTS {
                    statements.push(client.prepare(sql).await?);
                }
            }
            Kind::Settings => {
                for (name, value) in SETTINGS {
                    client.execute("SELECT set_config($1, $2, false)", &[&name, &value]).await?;
                }
            }
            Kind::Copy | Kind::Listener => {}
        }
        Ok(Self { client, statements, reservations: Vec::new(), rentals: Vec::new() })
    }

    /// Rounds until told to stop, or until the connection is gone.
    async fn rounds(&mut self, orders: &Orders, outcome: &mut Outcome, random: &mut StdRng) {
        while !orders.stop.is_cancelled() {
            let count = if orders.kind == Kind::Copy { COPY_ROWS } else { 1 };
            let numbers: Vec<i64> = (0..count).map(|_| outcome.ledger.next_number()).collect();
            let round = self.round(orders, outcome, random, &numbers);
            let result = match tokio::time::timeout(ANSWER_BOUND, round).await {
                Ok(result) => result,
                Err(_) => Err(Failure { text: format!("no answer for {ANSWER_BOUND:?}"), refused: false }),
            };
            match result {
                Ok(Write::Done) => {
                    orders.tally.writes.fetch_add(u64::try_from(count).unwrap_or_default(), Ordering::Relaxed);
                    numbers.iter().for_each(|number| outcome.ledger.acknowledge(*number));
                }
                Ok(Write::RolledBack) => numbers.iter().for_each(|number| outcome.ledger.refuse(*number)),
                Err(failure) => {
                    failed(orders, outcome, &failure.text);
                    for number in numbers {
                        if failure.refused { outcome.ledger.refuse(number) } else { outcome.ledger.doubt(number) }
                    }
                    // A failed transaction block would fail every further request.
                    if self.client.is_closed()
                        || !failure.refused
                        || self.client.batch_execute("ROLLBACK").await.is_err()
                    {
                        return;
                    }
                }
            }
            pause(orders).await;
        }
    }

    async fn round(
        &mut self,
        orders: &Orders,
        outcome: &mut Outcome,
        random: &mut StdRng,
        numbers: &[i64],
    ) -> Result<Write, Failure> {
        match orders.kind {
            Kind::Prepared => self.prepared(orders, outcome, random, numbers[0]).await,
            Kind::Transactions => self.transaction(orders, outcome, random, numbers[0]).await,
            Kind::Settings => self.settings(outcome, numbers[0]).await,
            Kind::Copy => self.copy(outcome, numbers).await,
            Kind::Listener => Ok(Write::RolledBack),
        }
    }

    async fn prepared(
        &mut self,
        orders: &Orders,
        outcome: &mut Outcome,
        random: &mut StdRng,
        number: i64,
    ) -> Result<Write, Failure> {
        let customer = random.random_range(1..=orders.size.customers());
        let last = outcome.ledger.acknowledged().last().copied();
        match random.random_range(0..10) {
            0..3 => {
                let note = format!("ä\t\\N\n{}", "x".repeat(random.random_range(0..4000)));
                let rows = self.query(outcome, RESERVE, &[&number, &customer, &note]).await?;
                self.reservations.extend(rows.iter().map(|row| row.get::<_, i64>(0)));
            }
            3..5 if !self.reservations.is_empty() => {
                let reservation = self.reservations.remove(0);
                self.query(outcome, UNRESERVE, &[&number, &reservation]).await?;
            }
            _ => {
                self.query(outcome, SET_POINTS, &[&number, &customer]).await?;
            }
        }
        if let Some(last) = last {
            let lowest = last / CLIENT_SPAN * CLIENT_SPAN;
            let row = self.query(outcome, READ_OWN, &[&lowest, &number]).await?;
            let seen: Option<i64> = row.first().and_then(|row| row.get(0));
            if seen != Some(number) {
                outcome.error(format!("wrote {number}, then read {seen:?}: a write was acknowledged and is not there"));
            }
        }
        Ok(Write::Done)
    }

    async fn transaction(
        &mut self,
        orders: &Orders,
        outcome: &mut Outcome,
        random: &mut StdRng,
        number: i64,
    ) -> Result<Write, Failure> {
        let copy = random.random_range(1..=orders.size.copies());
        let customer = random.random_range(1..=orders.size.customers());
        self.simple(outcome, "BEGIN").await?;
        let rental: i64 = self.query(outcome, RENT, &[&number, &copy, &customer, &"out"]).await?[0].get(0);
        self.query(outcome, PAY, &[&number, &customer]).await?;
        let returned = (self.rentals.len() > 3).then(|| self.rentals.remove(0));
        if let Some(returned) = returned {
            self.query(outcome, RETURN, &[&number, &returned]).await?;
        }
        self.query(outcome, NOTE, &[&number, &rental]).await?;
        self.query(outcome, NOTIFY, &[&number]).await?;
        if random.random_range(0..12) == 0 {
            self.simple(outcome, "ROLLBACK").await?;
            return Ok(Write::RolledBack);
        }
        self.simple(outcome, "COMMIT").await?;
        self.rentals.push(rental);
        outcome.notified.push(number);
        Ok(Write::Done)
    }

    async fn settings(&mut self, outcome: &mut Outcome, number: i64) -> Result<Write, Failure> {
        for (name, expected) in SETTINGS {
            let began = Instant::now();
            let row = self.client.query_one("SELECT current_setting($1, true)", &[&name]).await?;
            outcome.answered(began);
            let value: Option<String> = row.get(0);
            if value.as_deref() != Some(expected) {
                outcome.error(format!("setting {name} is {value:?}, was set to {expected:?}"));
            }
        }
        let began = Instant::now();
        // Unqualified: found by the search_path that was set.
        self.client
            .execute("INSERT INTO write_log (write_no, kind) VALUES ($1, current_setting('app.tenant'))", &[&number])
            .await?;
        outcome.answered(began);
        Ok(Write::Done)
    }

    async fn copy(&mut self, outcome: &mut Outcome, numbers: &[i64]) -> Result<Write, Failure> {
        let began = Instant::now();
        let sink = self.client.copy_in("COPY shop.write_log (write_no, kind, note) FROM STDIN").await?;
        let mut sink = pin!(sink);
        for number in numbers {
            sink.send(Bytes::from(format!("{number}\tcopy\tline\\none\\ttwo {number}\n"))).await?;
        }
        let rows = sink.finish().await?;
        outcome.answered(began);
        if usize::try_from(rows) != Ok(numbers.len()) {
            outcome.error(format!("COPY of {} rows took {rows}", numbers.len()));
        }
        let (Some(first), Some(last)) = (numbers.first(), numbers.last()) else { return Ok(Write::Done) };
        let began = Instant::now();
        let sql =
            format!("COPY (SELECT write_no FROM shop.write_log WHERE write_no BETWEEN {first} AND {last}) TO STDOUT");
        let lines: Vec<Bytes> = self.client.copy_out(sql.as_str()).await?.try_collect().await?;
        outcome.answered(began);
        if lines.len() != numbers.len() {
            outcome.error(format!("copied {} rows in and {} out", numbers.len(), lines.len()));
        }
        Ok(Write::Done)
    }

    async fn query(
        &self,
        outcome: &mut Outcome,
        statement: usize,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let began = Instant::now();
        let rows = self.client.query(&self.statements[statement], parameters).await?;
        outcome.answered(began);
        Ok(rows)
    }

    async fn simple(&self, outcome: &mut Outcome, sql: &str) -> Result<(), Error> {
        let began = Instant::now();
        self.client.batch_execute(sql).await?;
        outcome.answered(began);
        Ok(())
    }
}

/// How a round ended that did not fail.
enum Write {
    Done,
    RolledBack,
}

fn failed(orders: &Orders, outcome: &mut Outcome, text: &str) {
    orders.tally.errors.fetch_add(1, Ordering::Relaxed);
    outcome.error(format!("client {}: {text}", orders.client));
}

/// The demo's data are its own, so the server's message may be shown whole.
pub(super) fn describe(error: &Error) -> String {
    match error.as_db_error() {
        Some(error) => {
            let detail = error.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
            format!("{} {}: {}{detail}", error.severity(), error.code().code(), error.message())
        }
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{error}{cause}")
        }
    }
}

async fn pause(orders: &Orders) {
    // Both arms only wait; dropping either loses nothing.
    tokio::select! {
        () = tokio::time::sleep(orders.think_time) => {}
        () = orders.stop.cancelled() => {}
    }
}
