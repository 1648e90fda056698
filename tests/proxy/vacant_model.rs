//! Session mode: clients of several users, databases and startup parameters come, do whatever they like and leave in any
//! way. Each sees what it would see on a new connection of its own, to the byte, whoever had it before.
//!
//! A failure prints its seed; `PGCUTOVER_TEST_SEED=n` runs that one alone.

use std::collections::HashSet;
use std::time::Duration;

use pgcutover::config::Server;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::pooling_model::{Client, cancelled};
use crate::rig::Rig;
use crate::scripted;
use crate::wire_client::{frame, query};

const AT_ONCE: usize = 4;
const STEPS: usize = 400;
const USERS: [&str; 2] = ["ann", "bob"];
const DATABASES: [&str; 2] = ["shop", "stock"];
/// None: not said. Few, so that connections find another client.
const NAMES: [Option<&str>; 3] = [None, Some("web"), Some("worker")];
const MEMORY: [Option<&str>; 3] = [None, None, Some("64MB")];

async fn newcomer(rig: &Rig, random: &mut StdRng, number: usize) -> Client {
    let one = |of: &[&'static str], random: &mut StdRng| *of.choose(random).expect("not empty");
    let mut parameters = vec![("user", one(&USERS, random)), ("database", one(&DATABASES, random))];
    for (name, values) in [("application_name", &NAMES), ("work_mem", &MEMORY)] {
        let value = values.choose(random).expect("not empty");
        parameters.extend(value.map(|value| (name, value)));
    }
    let mut client = Client::log_in(rig, number, &parameters).await;
    // Who it is and everything that is set, before it has done anything itself.
    client.say(random, [query("WHO"), query("ECHO first")].concat()).await;
    client.receive().await;
    client
}

/// In good order, or not, and maybe in the middle of something.
async fn leave(mut client: Client, random: &mut StdRng) {
    match random.random_range(0..5) {
        0 => {}
        1 => client.wire.send(&frame(b'X', &[])[..3]).await,
        2 => client.wire.send(&query("SET work_mem = 'nobody knows'")).await,
        3 => client.wire.send(&frame(b'X', &[])).await,
        _ => {
            client.receive().await;
            client.wire.send(&frame(b'X', &[])).await;
            // Its connection is vacant soon after this.
            while client.wire.next().await.is_some() {}
        }
    }
}

/// Returns how many logins there were and how many connections they had.
async fn play(seed: u64) -> (usize, usize) {
    println!("PGCUTOVER_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let address = scripted::serve().await;
    let server = || Server::new("127.0.0.1", address.port(), "postgres");
    let most = random.random_range(1..4);
    // Without one sockets are polled.
    let is_ring = random.random_bool(0.7);
    let rig = Rig::start(server(), server(), |config| {
        config.pool.server_linger = Duration::from_secs(600);
        config.pool.default_pool_size = most;
        config.listen.io_uring = is_ring;
    });
    let (mut clients, mut logins, mut backends) = (Vec::new(), 0, HashSet::new());
    for _ in 0..STEPS {
        if clients.len() < AT_ONCE && random.random_bool(0.5) {
            logins += 1;
            let client = newcomer(&rig, &mut random, logins).await;
            backends.extend(client.wire.key.map(|(pid, _)| pid));
            clients.push(client);
            continue;
        }
        if clients.is_empty() {
            continue;
        }
        let at = random.random_range(0..clients.len());
        match random.random_range(0..20) {
            0..4 => leave(clients.swap_remove(at), &mut random).await,
            4 => cancelled(&mut clients[at], &rig).await,
            _ if clients[at].due.is_some() => clients[at].receive().await,
            _ => clients[at].send(&mut random, true).await,
        }
    }
    for client in &mut clients {
        client.receive().await;
    }
    drop(clients);
    rig.stop().await;
    (logins, backends.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sees_what_was_on_its_connection_before() {
    if let Ok(seed) = std::env::var("PGCUTOVER_TEST_SEED") {
        play(seed.parse().expect("a number")).await;
        return;
    }
    let (mut logins, mut backends) = (0, 0);
    for _ in 0..24 {
        let (more_logins, more_backends) = play(rand::random()).await;
        (logins, backends) = (logins + more_logins, backends + more_backends);
    }
    assert!(backends < logins * 9 / 10, "{logins} logins had {backends} connections: hardly any had one before");
}

/// One schedule that is always the same.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_sees_what_was_on_its_connection_before_in_one_known_schedule() {
    let (logins, backends) = play(20_261_121).await;
    assert!(backends < logins, "{logins} logins had {backends} connections");
}
