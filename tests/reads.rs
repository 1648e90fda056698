//! Who goes on in a pause: reads (`reads = "continue"`), on the server that is left while writes wait, then on the other
//! one; and who ends a transaction that was prepared for COMMIT PREPARED.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgcutover::config::{Reads, Stragglers};
use pgcutover::cutover::coordinator::CutoverOptions;
use pgcutover::cutover::report::{CutoverOutcome, CutoverReport};
use pgcutover::demo::cluster::ClusterOptions;
use pgcutover::proxy::{SessionState, SessionView};
use pgcutover::switch::{Database, Epoch, Route, ServerRole};
use support::stage::{Life, Stage};
use support::{connect_with, two_clusters_with, wait_for};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error};

const PORT: &str = "SELECT inet_server_port()";

/// Bounds that no test reaches unless it wants to.
fn patiently(life: &Life) -> CutoverOptions {
    CutoverOptions {
        reads: Reads::Continue,
        max_pause: Duration::from_secs(240),
        drain_timeout: Duration::from_secs(120),
        ..life.options()
    }
}

fn gate(life: &Life) -> Arc<Database> {
    life.switchboard.database("shop")
}

fn session(life: &Life, name: &str) -> SessionView {
    let sessions = life.proxy.as_ref().expect("a proxy").sessions().list();
    sessions.into_iter().find(|session| session.application_name == name).expect("connected")
}

/// The failpoint at which a cutover stands, prepared, until somebody writes who keeps the drain waiting.
const PREPARED: &str = "prepare.after_fence";

/// Begins a cutover whose drain waits for what `slow` has begun to write.
async fn begin(life: &Life, slow: &Client, options: CutoverOptions) -> JoinHandle<CutoverReport> {
    let running = life.cut_over_up_to(PREPARED, options).await;
    slow.batch_execute("BEGIN; INSERT INTO item (name) VALUES ('slow')").await.expect("writable");
    life.failpoints.release(PREPARED);
    running
}

async fn until_reads_alone_go_on(life: &Life) {
    wait_for("the pause in which reads go on", || async { gate(life).lets_reads_in() }).await;
}

async fn until_held(life: &Life, name: &str) {
    wait_for("a session to be held", || async { session(life, name).state == SessionState::Held }).await;
}

/// How a reader says that it reads.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// `BEGIN READ ONLY`, by itself.
    Begin,
    /// The same as a prepared statement, as some drivers do.
    Prepared,
    /// The whole transaction in one message.
    Batch,
    /// All its transactions are, and it runs a prepared statement.
    Always,
}

/// A client that reads all the time, and never goes back to a server that it has left.
struct Reader {
    stop: Arc<AtomicBool>,
    /// How often it has read on the source and on the target.
    read: Arc<[AtomicU64; 2]>,
    /// Why it reads no more.
    failure: Arc<Mutex<Option<Error>>>,
    task: JoinHandle<()>,
}

impl Reader {
    fn start(client: Client, way: Way, source: u16) -> Self {
        let (stop, read) = (Arc::<AtomicBool>::default(), Arc::<[AtomicU64; 2]>::default());
        let (stopped, counts) = (stop.clone(), read.clone());
        let failure = Arc::<Mutex<Option<Error>>>::default();
        let failed = failure.clone();
        let reading = async move {
            if way == Way::Always {
                client.batch_execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY").await?;
            }
            let begin = if way == Way::Prepared { Some(client.prepare("BEGIN READ ONLY").await?) } else { None };
            let select = client.prepare(PORT).await?;
            let mut has_left = false;
            while !stopped.load(Ordering::SeqCst) {
                let port = match (way, &begin) {
                    (Way::Batch, _) => {
                        let batch = format!("BEGIN READ ONLY; {PORT}; COMMIT");
                        let answers = client.simple_query(&batch).await?;
                        let rows = answers.iter().filter_map(|answer| match answer {
                            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                            _ => None,
                        });
                        rows.last().expect("a row").parse().expect("a number")
                    }
                    (Way::Always, _) => client.query_one(&select, &[]).await?.get::<_, i32>(0),
                    (Way::Begin | Way::Prepared, begin) => {
                        match begin {
                            Some(begin) => client.execute(begin, &[]).await.map(drop)?,
                            None => client.batch_execute("BEGIN READ ONLY").await?,
                        }
                        let port = client.query_one(&select, &[]).await?.get::<_, i32>(0);
                        client.batch_execute("COMMIT").await?;
                        port
                    }
                };
                let is_source = port == i32::from(source);
                assert!(!(is_source && has_left), "read on the source after the target");
                has_left = !is_source;
                counts[usize::from(has_left)].fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        };
        let task = tokio::spawn(async move { *failed.lock().expect("not poisoned") = reading.await.err() });
        Self { stop, read, failure, task }
    }

    /// Waits until it has read more on this server.
    async fn goes_on_on(&self, server: ServerRole) {
        let count = &self.read[usize::from(server == ServerRole::Target)];
        let before = count.load(Ordering::SeqCst);
        wait_for(&format!("reads on the {server}"), || async {
            count.load(Ordering::SeqCst) > before + 5 || self.task.is_finished()
        })
        .await;
        assert!(!self.task.is_finished(), "a reader has failed: {:?}", self.failure.lock().expect("not poisoned"));
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.expect("no panic");
        assert!(self.failure.lock().expect("not poisoned").is_none(), "{:?}", self.failure);
    }
}

/// Readers in every way that this server's reports allow; with a pool, in those that name nothing on a connection.
async fn readers(stage: &Stage, life: &Life) -> Vec<Reader> {
    let mut readers = Vec::new();
    for way in [Way::Begin, Way::Prepared, Way::Batch, Way::Always] {
        let client = connect_with(&life.client("reader")).await;
        let version: String = client.query_one("SHOW server_version_num", &[]).await.expect("answers").get(0);
        if way != Way::Always || version.parse::<u32>().expect("a number") >= 140_000 {
            readers.push(Reader::start(client, way, stage.source.port()));
        }
    }
    for reader in &readers {
        reader.goes_on_on(ServerRole::Source).await;
    }
    readers
}

/// A whole cutover with a long drain: reads go on in it, a write waits, and all of them end on the target.
async fn goes_on_and_follows(stage: &Stage, life: Life) {
    let readers = readers(stage, &life).await;
    let late = connect_with(&life.client("late")).await;
    let slow = connect_with(&life.client("writer")).await;
    let running = begin(&life, &slow, patiently(&life)).await;
    until_reads_alone_go_on(&life).await;
    let insert = "INSERT INTO item (name) VALUES ('late') RETURNING inet_server_port()";
    let write = tokio::spawn(async move { late.query_one(insert, &[]).await });
    until_held(&life, "late").await;
    for reader in &readers {
        reader.goes_on_on(ServerRole::Source).await;
    }
    assert_eq!(session(&life, "late").state, SessionState::Held, "writes wait");
    slow.batch_execute("COMMIT").await.expect("it is waited for");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert!(report.notes.iter().any(|note| note.contains("went on during the pause")), "{report:?}");
    let port: i32 = write.await.expect("no panic").expect("no error").get(0);
    assert_eq!(port, i32::from(stage.target.port()));
    for reader in readers {
        reader.goes_on_on(ServerRole::Target).await;
        reader.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_go_on_while_writes_wait_and_follow_to_the_target() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy(&format!("{PREPARED}=hold")).resolved().await;
    goes_on_and_follows(&stage, life).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_share_connections_go_on_as_well() {
    let stage = Stage::set().await;
    let life = stage.life_with_pool(&format!("{PREPARED}=hold"), 3).resolved().await;
    goes_on_and_follows(&stage, life).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_while_reads_go_on_is_not_felt_by_them() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy(&format!("{PREPARED}=hold")).resolved().await;
    let readers = readers(&stage, &life).await;
    let slow = connect_with(&life.client("writer")).await;
    let options = CutoverOptions { drain_timeout: Duration::from_millis(400), ..patiently(&life) };
    let report = begin(&life, &slow, options).await.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    assert!(report.reason.contains("(\"writer\")") && !report.reason.contains("\"reader\""), "{}", report.reason);
    assert!(!gate(&life).lets_reads_in());
    for reader in &readers {
        reader.goes_on_on(ServerRole::Source).await;
    }
    slow.batch_execute("INSERT INTO item (name) VALUES ('still'); COMMIT").await.expect("carries on");
    for reader in readers {
        reader.finish().await;
    }

    // By policy it is ended instead.
    let options = CutoverOptions { stragglers: Stragglers::Terminate, ..options };
    let report = begin(&life, &slow, options).await.await.expect("no panic");
    assert_eq!((report.outcome, report.sessions_ended), (CutoverOutcome::Switched, 1), "{report:?}");
    assert!(slow.batch_execute("COMMIT").await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_have_begun_are_over_before_the_decision() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy(&format!("{PREPARED}=hold")).resolved().await;
    let long = connect_with(&life.client("long")).await;
    let next = connect_with(&life.client("next")).await;
    let slow = connect_with(&life.client("writer")).await;
    let running = begin(&life, &slow, patiently(&life)).await;
    until_reads_alone_go_on(&life).await;
    long.batch_execute("BEGIN READ ONLY").await.expect("it goes on");
    assert_eq!(session(&life, "long").state, SessionState::Reading);
    slow.batch_execute("COMMIT").await.expect("it is waited for");
    // What was written has arrived: the decision is near.
    wait_for("reads to be held", || async { !gate(&life).lets_reads_in() }).await;
    let read = tokio::spawn(async move { next.batch_execute("BEGIN READ ONLY; SELECT 1; COMMIT").await });
    until_held(&life, "next").await;
    let port: i32 = long.query_one(PORT, &[]).await.expect("inside, it goes on").get(0);
    assert_eq!(port, i32::from(stage.source.port()));
    let undecided = Route::To { server: ServerRole::Source, epoch: Epoch(0) };
    assert_eq!(life.route(), undecided, "nothing is decided while somebody reads");
    long.batch_execute("COMMIT").await.expect("read to its end");
    read.await.expect("no panic").expect("no error");
    let report = running.await.expect("no panic");
    assert_eq!((report.outcome, report.sessions_ended), (CutoverOutcome::Switched, 0), "{report:?}");
    let port: i32 = long.query_one(PORT, &[]).await.expect("answers").get(0);
    assert_eq!(port, i32::from(stage.target.port()));
}

/// The drain waits for a prepared transaction as for every other, and who would end it is held by the gate.
async fn ends_what_was_prepared(life: Life, stage: &Stage, reads: Reads) {
    let (commit, rollback) = (connect_with(&life.client("c")).await, connect_with(&life.client("r")).await);
    let another = connect_with(&life.client("another")).await;
    let running = life.cut_over_up_to(PREPARED, CutoverOptions { reads, ..patiently(&life) }).await;
    for (client, name) in [(&commit, "c"), (&rollback, "r")] {
        let prepare = format!("BEGIN; INSERT INTO item (name) VALUES ('{name}'); PREPARE TRANSACTION '{name}'");
        client.batch_execute(&prepare).await.expect("prepared");
    }
    life.failpoints.release(PREPARED);
    wait_for("the pause", || async { gate(&life).is_fenced() }).await;
    let another = tokio::spawn(async move { another.query_one(PORT, &[]).await });
    until_held(&life, "another").await;
    commit.batch_execute("COMMIT PREPARED 'c'").await.expect("let in");
    rollback.batch_execute("ROLLBACK PREPARED 'r'").await.expect("let in");
    let report = running.await.expect("no panic");
    assert_eq!((report.outcome, report.sessions_ended), (CutoverOutcome::Switched, 0), "{report:?}");
    let port: i32 = another.await.expect("no panic").expect("no error").get(0);
    assert_eq!(port, i32::from(stage.target.port()), "who was held went on behind the switch");
    assert!(!gate(&life).lets_some_in());
    commit.batch_execute("COMMIT PREPARED 'c'").await.expect_err("it is there no more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_prepared_a_transaction_ends_it_in_the_pause() {
    let prepares = |options: ClusterOptions| options.setting("max_prepared_transactions", "4");
    for reads in [Reads::Pause, Reads::Continue] {
        let stage = Stage::on(two_clusters_with(prepares, prepares)).await;
        let held = format!("{PREPARED}=hold");
        let life = if reads == Reads::Pause { stage.life_with_proxy(&held) } else { stage.life_with_pool(&held, 4) };
        ends_what_was_prepared(life.resolved().await, &stage, reads).await;
    }
}
