//! The clients of the ledger: what they do, what they remember, and how it is held against a server.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, Error, Statement};

use crate::support::daemon::Daemon;
use crate::support::{try_connect, wait_for};

/// Clients at work.
const CLIENTS: i64 = 8;

/// They wait up to so many milliseconds between two operations, so that several stages can share a machine.
const THINK_MS: u64 = 300;

/// Accounts, and what each begins with. Their sum never changes.
const ACCOUNTS: i64 = 20;
const BALANCE: i64 = 1000;

/// The database of the ledger.
pub const LEDGER: &str = "ledger";

/// Entries have no key on what they say, so that a write that was done twice can be seen; `place` is in the order in
/// which the server gave them out.
pub const TABLES: &str = "
    CREATE TABLE entry (place bigserial PRIMARY KEY, seed bigint NOT NULL, client bigint NOT NULL, number bigint NOT NULL);
    CREATE INDEX ON entry (seed, client, number);
    CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL);
    INSERT INTO account SELECT id, 1000 FROM generate_series(1, 20) id";

/// A numbered entry.
const ENTRY: &str = "INSERT INTO entry (seed, client, number) VALUES ($1, $2, $3)";

/// What one client remembers.
#[derive(Debug, Default)]
pub struct Memory {
    seed: i64,
    client: i64,
    /// Numbers whose commit was acknowledged.
    acknowledged: Vec<i64>,
    /// Numbers whose outcome was never told.
    in_doubt: Vec<i64>,
    /// Numbers that were refused.
    refused: Vec<i64>,
    /// Reads that contradicted what was known.
    violations: Violations,
    /// Errors of any kind.
    pub errors: u64,
}

/// What must not be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    /// Acknowledged and not there.
    pub lost: u64,
    /// There more than once.
    pub doubled: u64,
    /// A later number stands before an earlier one.
    pub reordered: u64,
    /// Refused and there all the same.
    pub phantoms: u64,
    /// A client did not see what it had written.
    pub not_read: u64,
    /// A client saw something go back.
    pub went_back: u64,
    /// The accounts do not add up.
    pub sums: u64,
    /// The two servers hold something different.
    pub differences: Vec<String>,
}

/// A connection with what its client runs again and again: prepared once, so that a switch has it to carry over.
struct Connection {
    client: Client,
    update: Statement,
    entry: Statement,
    read: Statement,
}

impl Connection {
    async fn open(config: &Config) -> Result<Self, Error> {
        let client = try_connect(config).await?;
        let update = client.prepare("UPDATE account SET balance = balance + $2 WHERE id = $1").await?;
        let entry = client.prepare(ENTRY).await?;
        let read = client
            .prepare(
                "SELECT coalesce(max(number), 0), (SELECT sum(balance)::bigint FROM account)
                 FROM entry WHERE seed = $1 AND client = $2",
            )
            .await?;
        Ok(Self { client, update, entry, read })
    }
}

/// Clients at work.
pub struct Clients {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<Memory>>,
}

impl Clients {
    /// Starts them on the daemon's proxy.
    pub fn start(daemon: &Daemon, seed: u64) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tasks = (1..=CLIENTS).map(|client| {
            let worker = Worker {
                config: daemon.client(LEDGER),
                stop: stop.clone(),
                written: written.clone(),
                dice: StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(client.unsigned_abs())),
                seen: 0,
                memory: Memory { seed: i64::try_from(seed).expect("small"), client, ..Memory::default() },
            };
            tokio::spawn(worker.run())
        });
        Self { tasks: tasks.collect(), stop, written }
    }

    /// Waits until they have written for a while.
    pub async fn go_on_writing(&self) {
        let wanted = self.written.load(Ordering::SeqCst) + 100;
        wait_for("the clients to write", || async { self.written.load(Ordering::SeqCst) >= wanted }).await;
    }

    /// Stops them and takes what they remember.
    pub async fn finish(self) -> Vec<Memory> {
        self.stop.store(true, Ordering::SeqCst);
        let mut memories = Vec::new();
        for task in self.tasks {
            memories.push(task.await.expect("a client panicked"));
        }
        memories
    }
}

struct Worker {
    config: Config,
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    dice: StdRng,
    /// The highest number that was read back.
    seen: i64,
    memory: Memory,
}

impl Worker {
    async fn run(mut self) -> Memory {
        let mut number = 0;
        let mut kept: Option<Connection> = None;
        while !self.stop.load(Ordering::SeqCst) {
            let connection = match kept.take() {
                Some(connection) => connection,
                None => match Connection::open(&self.config).await {
                    Ok(connection) => connection,
                    Err(_) => {
                        self.memory.errors += 1;
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                },
            };
            number += 1;
            match self.write(&connection, number).await {
                Ok(()) => {
                    self.memory.acknowledged.push(number);
                    self.written.fetch_add(1, Ordering::SeqCst);
                }
                Err(error) => {
                    self.memory.errors += 1;
                    if is_refused(&error) { &mut self.memory.refused } else { &mut self.memory.in_doubt }.push(number);
                    continue;
                }
            }
            if self.read(&connection, number).await.is_ok() {
                kept = Some(connection);
            } else {
                self.memory.errors += 1;
            }
            tokio::time::sleep(Duration::from_millis(self.dice.random_range(0..THINK_MS))).await;
        }
        self.memory
    }

    /// A numbered entry, by itself or together with a transfer.
    async fn write(&mut self, connection: &Connection, number: i64) -> Result<(), Error> {
        let (client, seed, own) = (&connection.client, self.memory.seed, self.memory.client);
        if self.dice.random_bool(0.5) {
            // As most libraries run a statement: prepared, and closed again.
            client.execute(ENTRY, &[&seed, &own, &number]).await?;
            return Ok(());
        }
        let (from, to) = (self.dice.random_range(1..=ACCOUNTS), self.dice.random_range(1..=ACCOUNTS));
        let amount = self.dice.random_range(1..50_i64);
        client.batch_execute("BEGIN").await?;
        // In the order of their numbers, so that no two clients wait for each other.
        let mut moves = [(from, -amount), (to, amount)];
        moves.sort_unstable();
        for (account, change) in moves {
            client.execute(&connection.update, &[&account, &change]).await?;
        }
        client.execute(&connection.entry, &[&seed, &own, &number]).await?;
        client.batch_execute("COMMIT").await
    }

    /// Its own last entry is there, nothing that was seen is gone, and the accounts add up.
    async fn read(&mut self, connection: &Connection, written: i64) -> Result<(), Error> {
        let client = &connection.client;
        // Such reads go on while a cutover holds everything else.
        let declared = self.dice.random_bool(0.5);
        if declared {
            client.batch_execute("BEGIN READ ONLY").await?;
        }
        let row = client.query_one(&connection.read, &[&self.memory.seed, &self.memory.client]).await?;
        if declared {
            client.batch_execute("COMMIT").await?;
        }
        let (found, sum): (i64, i64) = (row.get(0), row.get(1));
        let violations = &mut self.memory.violations;
        violations.not_read += u64::from(found < written);
        violations.went_back += u64::from(found < self.seen);
        violations.sums += u64::from(sum != ACCOUNTS * BALANCE);
        self.seen = self.seen.max(found);
        Ok(())
    }
}

/// A server that says no has done nothing. One that was ended, or whose connection was lost in the middle, may have.
fn is_refused(error: &Error) -> bool {
    let Some(told) = error.as_db_error() else { return false };
    match told.code().code().get(..2) {
        Some("57") => false,
        // The proxy says whether something was under way.
        Some("08") => told.detail().is_none(),
        _ => true,
    }
}

/// Holds what the clients remember against what the server has.
pub async fn check(memories: &[Memory], server: &Client) -> Result<Violations, Error> {
    let mut found = Violations::default();
    let sum = server.query_one("SELECT sum(balance)::bigint FROM account", &[]).await?;
    found.sums += u64::from(sum.get::<_, i64>(0) != ACCOUNTS * BALANCE);
    for memory in memories {
        let rows = server
            .query(
                "SELECT number FROM entry WHERE seed = $1 AND client = $2 ORDER BY place",
                &[&memory.seed, &memory.client],
            )
            .await?;
        let numbers: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        let mut times: HashMap<i64, u64> = HashMap::new();
        for number in &numbers {
            *times.entry(*number).or_default() += 1;
        }
        let count = |wanted: &[i64]| wanted.iter().filter(|number| times.contains_key(number)).count() as u64;
        found.lost += memory.acknowledged.len() as u64 - count(&memory.acknowledged);
        found.phantoms += count(&memory.refused);
        found.doubled += times.values().filter(|times| **times > 1).count() as u64;
        found.reordered += numbers.windows(2).filter(|pair| pair[0] > pair[1]).count() as u64;
        let known = memory.acknowledged.len() + memory.in_doubt.len() + memory.refused.len();
        found.phantoms += (times.len() as u64).saturating_sub(known as u64);
        found.not_read += memory.violations.not_read;
        found.went_back += memory.violations.went_back;
        found.sums += memory.violations.sums;
    }
    Ok(found)
}
