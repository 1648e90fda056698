//! Many clients on few scripted connections, in any order: each sees what it would see alone, to the byte.
//!
//! A failure prints its seed; `PGCUTOVER_TEST_SEED=n` runs that one alone.

use std::sync::Arc;

use pgcutover::config::{PoolMode, Server};
use pgcutover::proxy::Sessions;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;

use crate::pooling::ask;
use crate::rig::Rig;
use crate::scripted::{self, Backend};
use crate::support::wait_for;
use crate::wire_client::{Message, WireClient, bind, execute, frame, parse, query, rows, sync, tags};

const CLIENTS: usize = 9;
const STEPS: usize = 500;
const NAMES: [&str; 3] = ["a", "b", "c"];
const SETTINGS: [&str; 3] = ["application_name", "work_mem", "search_path"];

/// A client, what it would see alone, and what it is waiting for.
pub struct Client {
    number: usize,
    pub wire: WireClient,
    alone: Backend,
    /// The application's name that it began with.
    name: String,
    asked: u64,
    /// Expected answers of what was sent and not read yet.
    pub due: Option<Vec<Message>>,
    pub in_block: bool,
    /// What it has sent last, and where sessions are seen, for who reads a failure.
    sent: Vec<u8>,
    sessions: Arc<Sessions>,
}

/// What it is compared by: an error's code alone; parameters are checked apart.
fn comparable(messages: &[Message]) -> Vec<(char, Vec<u8>)> {
    let shown = messages.iter().filter(|message| message.tag != 'S');
    shown
        .map(|message| match message.tag {
            'E' => ('E', message.code().into_bytes()),
            tag => (tag, message.body.clone()),
        })
        .collect()
}

fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while bytes.len() >= 5 {
        let whole = 1 + u32::from_be_bytes(bytes[1..5].try_into().expect("four bytes")) as usize;
        messages.push(Message { tag: char::from(bytes[0]), body: bytes[5..whole].to_vec() });
        bytes = &bytes[whole..];
    }
    messages
}

impl Client {
    async fn connect(rig: &Rig, number: usize) -> Self {
        let name = format!("app-{number}-0");
        let parameters = [("user", "postgres"), ("database", "postgres"), ("application_name", &name)];
        Self::log_in(rig, number, &parameters).await
    }

    /// Client `number`, which no other client has.
    pub async fn log_in(rig: &Rig, number: usize, parameters: &[(&str, &str)]) -> Self {
        let mut wire = WireClient::connect(rig.port).await;
        wire.start(parameters).await;
        let greeting = wire.until_ready().await;
        assert_eq!(greeting.last().map(|message| message.tag), Some('Z'), "{greeting:?}");
        let name = parameters.iter().find(|(name, _)| *name == "application_name").map_or("", |(_, value)| value);
        let client = Self {
            number,
            wire,
            alone: Backend::of_login(parameters),
            name: name.to_owned(),
            asked: 0,
            due: None,
            in_block: false,
            sent: Vec::new(),
            sessions: rig.sessions.clone(),
        };
        client.check_reports(&greeting);
        client
    }

    fn token(&mut self) -> String {
        self.asked += 1;
        format!("{}.{}", self.number, self.asked)
    }

    /// What it sends next: whole batches, the last of which ends in a ReadyForQuery.
    fn next(&mut self, random: &mut StdRng, may_begin: bool) -> Vec<u8> {
        let name = NAMES[random.random_range(0..NAMES.len())];
        let setting = SETTINGS[random.random_range(0..SETTINGS.len())];
        let token = self.token();
        // Tells whose value it is, wherever it turns up.
        let value = format!("app-{}-{}", self.number, self.asked);
        // Texts that clients share, so that their statements are one on the server.
        let shared = format!("ECHO shared-{}", random.random_range(0..4));
        match random.random_range(0..20) {
            0..3 => query(&format!("ECHO {token}")),
            3 => query(&format!("SET {setting} = '{value}'")),
            4 => query(&format!("SET {setting} = '{value}'; ECHO {token}; FAIL")),
            5 if self.in_block => query(&format!("SET LOCAL {setting} = '{value}'; ECHO {token}")),
            5 => query("RESET ALL"),
            6 | 7 if may_begin || self.in_block => query("BEGIN"),
            6 | 7 => query(&format!("BEGIN; SET LOCAL {setting} = '{value}'; ECHO {token}; COMMIT")),
            8 => query(&format!("ECHO {token}; COMMIT")),
            9 => query("ROLLBACK"),
            10 => [parse(name, &shared), sync()].concat(),
            11 => [parse(name, &format!("ECHO {token}")), bind(name), execute(0), sync()].concat(),
            12..15 => [bind(name), execute(0), sync()].concat(),
            15 => [frame(b'C', format!("S{name}\0").as_bytes()), parse(name, &shared), bind(name), execute(0), sync()]
                .concat(),
            16 => [parse("", &format!("ECHO {token}")), sync()].concat(),
            17 => [bind(""), execute(0), bind(name), execute(0), sync()].concat(),
            18 => match random.random_range(0..6) {
                0 => [parse(name, "BAD"), bind(name), execute(0), sync()].concat(),
                1 => query(&format!("DEALLOCATE {name}")),
                2 if !self.in_block => query("DISCARD ALL"),
                // A name is free again before anybody has said so.
                3 if !self.in_block => {
                    [query("DISCARD ALL"), parse(name, &shared), bind(name), execute(0), sync()].concat()
                }
                4 => [query("ROLLBACK"), parse(name, &shared), bind(name), execute(0), sync()].concat(),
                _ => [parse("", "FAIL"), bind(""), execute(0), parse(name, &shared), sync()].concat(),
            },
            // Several batches at once.
            _ => [query(&format!("ECHO {token}")), bind(name), execute(0), sync(), query(&format!("ECHO {token}+"))]
                .concat(),
        }
    }

    pub async fn send(&mut self, random: &mut StdRng, may_begin: bool) {
        let bytes = self.next(random, may_begin);
        self.say(random, bytes).await;
    }

    /// Sends this, and knows what it should be answered with.
    pub async fn say(&mut self, random: &mut StdRng, bytes: Vec<u8>) {
        let mut expected = Vec::new();
        for message in messages(&bytes) {
            self.alone.take(message.tag as u8, &message.body, &mut expected);
        }
        let expected = messages(&expected);
        self.in_block = expected.last().is_some_and(|message| message.body != b"I");
        self.due = Some(expected);
        // In pieces, so that frames are cut.
        self.sent.clone_from(&bytes);
        let cut = random.random_range(0..=bytes.len());
        self.wire.send(&bytes[..cut]).await;
        if random.random_bool(0.2) {
            tokio::task::yield_now().await;
        }
        self.wire.send(&bytes[cut..]).await;
    }

    /// Reads what is due and compares.
    pub async fn receive(&mut self) {
        let Some(expected) = self.due.take() else { return };
        let batches = expected.iter().filter(|message| message.tag == 'Z').count();
        let mut seen = Vec::new();
        for _ in 0..batches {
            let patience = crate::support::PATIENCE;
            match tokio::time::timeout(patience, self.wire.until_ready()).await {
                Ok(batch) => seen.extend(batch),
                Err(_) => panic!(
                    "client {} got no answer to {:?} after {seen:?}; expected {expected:?}; {:#?}",
                    self.number,
                    String::from_utf8_lossy(&self.sent),
                    self.sessions.list()
                ),
            }
        }
        self.check_reports(&seen);
        let text = |messages: &[Message]| -> Vec<(char, String)> {
            comparable(messages)
                .into_iter()
                .map(|(tag, body)| (tag, String::from_utf8_lossy(&body).into_owned()))
                .collect()
        };
        assert_eq!(text(&seen), text(&expected), "client {}", self.number);
    }

    /// No reported value may be another client's.
    fn check_reports(&self, seen: &[Message]) {
        for message in seen.iter().filter(|message| message.tag == 'S') {
            let text = String::from_utf8_lossy(&message.body);
            if let Some(value) = text.strip_prefix("application_name\0") {
                let own = format!("app-{}-", self.number);
                // Nobody's: what the connection began with, until the next transaction resets it to the client's own.
                let began = value.trim_end_matches('\0') == self.name;
                assert!(value.starts_with(&own) || value == "\0" || began, "client {} was told {value:?}", self.number);
            }
        }
    }
}

async fn play(seed: u64) {
    println!("PGCUTOVER_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let address = scripted::serve().await;
    let server = || Server::new("127.0.0.1", address.port(), "postgres");
    let (size, kept) = (random.random_range(1..5), random.random_range(1..5));
    // Without one sockets are polled.
    let is_ring = random.random_bool(0.7);
    // Many, where connections are to be met on their way from one worker to somebody who has just given up waiting.
    let cancels = if random.random_bool(0.3) { 0.3 } else { 0.02 };
    let rig = Rig::start(server(), server(), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = size;
        config.pool.max_prepared_statements = kept;
        config.listen.io_uring = is_ring;
    });
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        clients.push(Client::connect(&rig, number).await);
    }
    for _ in 0..STEPS {
        let number = random.random_range(0..CLIENTS);
        let open = clients.iter().filter(|client| client.in_block).count();
        let client = &mut clients[number];
        if client.due.is_some() {
            client.receive().await;
        } else {
            // One connection is left for those who have no transaction open, so that everybody gets an answer.
            client.send(&mut random, open + 1 < size).await;
            if random.random_bool(0.3) {
                client.receive().await;
            }
        }
        if random.random_bool(0.02) {
            // It vanishes, in the middle of whatever it does; another one comes in its place.
            clients[number] = Client::connect(&rig, number).await;
        }
        if random.random_bool(cancels) {
            cancelled(&mut clients[number], &rig).await;
        }
    }
    for client in &mut clients {
        client.receive().await;
    }
    rig.stop().await;
}

/// A statement that ends by nothing but its own cancel.
pub async fn cancelled(client: &mut Client, rig: &Rig) {
    client.receive().await;
    if client.in_block {
        return;
    }
    client.wire.send(&query("WAIT")).await;
    let mut expected = Vec::new();
    client.alone.take(b'Q', b"WAIT\0", &mut expected);
    client.due = Some(messages(&expected));
    let mut canceller = WireClient::connect(rig.port).await;
    canceller.key = client.wire.key;
    let answered = CancellationToken::new();
    let cancels = async {
        // It may not be where it can be cancelled yet: asked for until it is. Each request is waited for, because one that
        // is still on its way when the answer has come would meet the next statement.
        while !answered.is_cancelled() {
            canceller.cancel(rig.port).await;
            let _answered = tokio::time::timeout(std::time::Duration::from_millis(20), answered.cancelled()).await;
        }
    };
    let receives = async {
        client.receive().await;
        answered.cancel();
    };
    tokio::join!(receives, cancels);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sees_anothers_bytes_or_settings() {
    if let Ok(seed) = std::env::var("PGCUTOVER_TEST_SEED") {
        return play(seed.parse().expect("a number")).await;
    }
    for _ in 0..24 {
        play(rand::random()).await;
    }
}

/// One schedule that is always the same.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_sees_anothers_bytes_or_settings_in_one_known_schedule() {
    play(20_261_121).await;
}

/// A proxy whose clients share one scripted connection.
async fn on_one_connection() -> Rig {
    let address = scripted::serve().await;
    let server = || Server::new("127.0.0.1", address.port(), "postgres");
    Rig::start(server(), server(), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = 1;
    })
}

/// What a server says unasked may come along behind the end of a transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_notice_behind_the_end_of_a_transaction_does_not_keep_its_connection() {
    let rig = on_one_connection().await;
    let (mut first, mut second) = (rig.wire("postgres").await, rig.wire("postgres").await);
    first.send(&query("LATE")).await;
    assert_eq!(first.tags_until_ready().await, "CZI");
    second.send(&query("ECHO x")).await;
    assert_eq!(second.tags_until_ready().await, "DCZI");
    assert_eq!(first.next().await.map(|message| message.tag), Some('N'));
    rig.stop().await;
}

/// The server refuses it while its client is ahead: the rest is still on its way, and is thrown away.
#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_copy_that_has_failed_does_not_keep_its_client() {
    let rig = on_one_connection().await;
    let (read, mut write) = rig.wire("postgres").await.stream.into_split();
    let mut client = WireClient { stream: tokio::io::join(read, tokio::io::sink()), key: None };
    let data = frame(b'd', &[b'x'; 100]).repeat(160_000);
    let asked = [query("COPY"), data, frame(b'c', &[]), query("ECHO x")].concat();
    let answers = async { [client.tags_until_ready().await, client.tags_until_ready().await] };
    let (sent, answers) = tokio::join!(write.write_all(&asked), answers);
    sent.expect("all of it is read");
    assert_eq!(answers, ["GEZI", "DCZI"]);
    drop((write, client));
    rig.stop().await;
}

/// All that the proxy asks on its own account takes longer than one of them lets its statements run.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_statement_timeout_ends_neither_its_client_nor_the_next() {
    let rig = on_one_connection().await;
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    let settings = async |client: &mut WireClient| rows(&ask(client, &query("ECHO x")).await).concat();
    let open = || rig.sessions.idle_backends().iter().map(|one| one.pid).collect::<Vec<_>>();
    assert!(!settings(&mut bob).await.contains("statement_timeout"));
    wait_for("the connection to be given back", || async { open().len() == 1 }).await;
    let before = open();
    for _ in 0..3 {
        assert_eq!(tags(&ask(&mut ann, &query("SET statement_timeout = 1ms")).await), "CZI");
        let (of_bob, of_ann) = (settings(&mut bob).await, settings(&mut ann).await);
        assert!(of_bob.starts_with("x|") && !of_bob.contains("statement_timeout"), "{of_bob}");
        assert!(of_ann.contains("statement_timeout=1ms"), "{of_ann}");
    }
    wait_for("it to be given back once more", || async { open() == before }).await;
    rig.stop().await;
}
