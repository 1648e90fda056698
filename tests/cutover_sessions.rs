//! What clients of the proxy see of a cutover: time, and nothing else.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pgcutover::config::Stragglers;
use pgcutover::cutover::coordinator::CutoverOptions;
use pgcutover::cutover::forecast::Intention;
use pgcutover::cutover::report::CutoverOutcome;
use pgcutover::demo::cluster::Stop;
use pgcutover::proxy::SessionState;
use pgcutover::switch::ServerRole;
use support::stage::{NAME, Stage};
use support::{connect, connect_with, try_connect, wait_for};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::Client;

/// Port of the server that the session's backend runs on.
async fn port(client: &Client) -> i32 {
    client.query_one("SELECT inet_server_port()", &[]).await.expect("answers").get(0)
}

/// A session whose socket can be torn away: aborting the task closes it with whatever is under way.
async fn connect_loosely(config: &tokio_postgres::Config) -> (Client, tokio::task::AbortHandle) {
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.expect("let in");
    let driver = tokio::spawn(async move {
        let _ = connection.await;
    });
    (client, driver.abort_handle())
}

/// A session without a driver: what is written goes out as it is.
async fn connect_raw(port: u16, parameter: &[u8]) -> TcpStream {
    let mut startup = vec![0, 0, 0, 0, 0, 3, 0, 0];
    startup.extend_from_slice(b"user\0postgres\0database\0shop\0");
    startup.extend_from_slice(parameter);
    startup.extend_from_slice(b"\0\0");
    startup[3] = u8::try_from(startup.len()).expect("a short packet");
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the proxy listens");
    stream.write_all(&startup).await.expect("taken");
    let mut greeting = Vec::new();
    while !greeting.ends_with(b"Z\0\0\0\x05I") {
        assert!(stream.read_buf(&mut greeting).await.expect("answered") > 0, "let in");
    }
    stream
}

/// Counts what a crowd of clients has done and what went wrong.
#[derive(Default)]
struct Crowd {
    stop: AtomicBool,
    transactions: AtomicU64,
    logins: AtomicU64,
    errors: std::sync::Mutex<Vec<String>>,
}

impl Crowd {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }

    fn failed(&self, what: &str, error: &tokio_postgres::Error) {
        let said = error
            .as_db_error()
            .map_or_else(|| error.to_string(), |error| format!("{} {}", error.code().code(), error.message()));
        self.errors.lock().expect("not poisoned").push(format!("{what}: {said}"));
    }

    /// Transactions on one connection for ever.
    async fn work(&self, client: Client) {
        while self.goes_on() {
            match client.batch_execute("BEGIN; SELECT count(*) FROM item; COMMIT").await {
                Ok(()) => self.transactions.fetch_add(1, Ordering::SeqCst),
                Err(error) => return self.failed("transaction", &error),
            };
        }
    }

    /// A new connection for each statement.
    async fn come_and_go(&self, config: tokio_postgres::Config) {
        while self.goes_on() {
            let visit = async {
                let client = try_connect(&config).await?;
                client.simple_query("SELECT 1").await
            };
            match visit.await {
                Ok(_) => self.logins.fetch_add(1, Ordering::SeqCst),
                Err(error) => return self.failed("login", &error),
            };
        }
    }
}

/// Nobody has asked for the database before the cutover begins; one session does while it is prepared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_whose_task_dies_leaves_nothing_of_a_session_that_came_meanwhile() {
    let stage = Stage::set().await;
    let failpoints = "prepare.before_fence=hold;drain.after_applied=hold;decide.before_boundary=panic";
    let life = stage.life_with_proxy(failpoints).resolved().await;
    let (coordinator, options) = (life.coordinator.clone(), life.options());
    assert!(life.switchboard.existing("shop").is_none(), "nobody has asked for it");
    let running = tokio::spawn(async move { coordinator.run(NAME, options).await });
    wait_for("the sessions to be prepared", || async { life.failpoints.is_held("prepare.before_fence") }).await;
    let late = connect_with(&life.client("late")).await;
    late.batch_execute("SELECT 1").await.expect("is let in");
    life.failpoints.release("prepare.before_fence");
    wait_for("the drain", || async { life.failpoints.is_held("drain.after_applied") }).await;

    let target = connect(&stage.target, "postgres").await;
    let prepared = async || {
        let ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'shop' AND backend_type = 'client backend'
                       AND application_name NOT LIKE 'pgcutover/%'";
        target.query_one(ours, &[]).await.expect("readable").get::<_, i64>(0)
    };
    assert!(prepared().await > 0, "it would be moved");
    life.failpoints.release("drain.after_applied");
    let died = running.await.expect("it is another task that dies").expect_err("and that is said").to_string();
    assert!(died.contains("task died"), "{died}");
    wait_for("the gate to open", || async { life.runs_on(ServerRole::Source, 0) }).await;
    wait_for("what was prepared to be closed", || async { prepared().await == 0 }).await;
    assert_eq!(port(&late).await, i32::from(stage.source.port()));
}

/// A login that is on its way when the pause begins: the soft fence stands, and stays until the abort lifts it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_logs_in_as_the_pause_begins_may_write_when_it_was_aborted() {
    let stage = Stage::set().await;
    let delay_logins = async |delay: &str| {
        stage.source.configure(&[("pre_auth_delay", delay)]).expect("writable");
        stage.source.reload();
        wait_for("the setting to be read", || async {
            let client = connect(&stage.source, "postgres").await;
            client.query_one("SHOW pre_auth_delay", &[]).await.expect("shown").get::<_, &str>(0) == delay
        })
        .await;
    };
    for pool in [None, Some(1)] {
        let failpoints = "prepare.after_fence=hold;drain.after_marker=error";
        let life = match pool {
            None => stage.life_with_proxy(failpoints),
            Some(size) => stage.life_with_pool(failpoints, size),
        };
        let life = life.resolved().await;
        let running = life.cut_over_up_to("prepare.after_fence", life.options()).await;
        delay_logins("1s").await;
        let config = life.client("late");
        let logging_in = tokio::spawn(async move { connect_with(&config).await });
        let database = life.switchboard.database("shop");
        wait_for("a login to be on its way", || async { database.inside() > 0 }).await;
        life.failpoints.release("prepare.after_fence");
        let report = running.await.expect("no panic");
        assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
        let client = logging_in.await.expect("let in");
        let shown = client.query_one("SHOW default_transaction_read_only", &[]).await.expect("shown");
        assert_eq!(shown.get::<_, &str>(0), "off", "{pool:?}");
        client.batch_execute("INSERT INTO item (name) VALUES ('late')").await.expect("nothing is fenced any more");
        drop(client);
        delay_logins("0").await;
        life.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_at_work_and_clients_that_come_and_go_see_no_error() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("").resolved().await;
    let crowd = Arc::new(Crowd::default());
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let client = connect_with(&life.client("worker")).await;
        let crowd = crowd.clone();
        tasks.push(tokio::spawn(async move { crowd.work(client).await }));
    }
    for _ in 0..4 {
        let (crowd, config) = (crowd.clone(), life.client("visitor"));
        tasks.push(tokio::spawn(async move { crowd.come_and_go(config).await }));
    }
    let idle = connect_with(&life.client("idle")).await;
    idle.batch_execute("SET work_mem = '7MB'").await.expect("settable");
    assert_eq!(port(&idle).await, i32::from(stage.source.port()));

    // Dry runs and aborts are felt no more than the switch.
    for dry_run in [true, true, false] {
        let before = crowd.transactions.load(Ordering::SeqCst);
        wait_for("work", || async { crowd.transactions.load(Ordering::SeqCst) > before + 20 }).await;
        let report = life.cut_over_with(CutoverOptions { dry_run, ..life.options() }).await;
        let expected = if dry_run { CutoverOutcome::DryRun } else { CutoverOutcome::Switched };
        assert_eq!(report.outcome, expected, "{report:?}");
        assert!(report.pause_ms > 0 && report.sessions_moved >= 9, "{report:?}");
    }
    let (transactions, logins) = (crowd.transactions.load(Ordering::SeqCst), crowd.logins.load(Ordering::SeqCst));
    wait_for("work on the other server", || async {
        crowd.transactions.load(Ordering::SeqCst) > transactions + 20
            && crowd.logins.load(Ordering::SeqCst) > logins + 4
            || !crowd.errors.lock().expect("not poisoned").is_empty()
    })
    .await;
    crowd.stop.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!(*crowd.errors.lock().expect("not poisoned"), Vec::<String>::new());
    assert_eq!(port(&idle).await, i32::from(stage.target.port()));
    let kept: String = idle.query_one("SHOW work_mem", &[]).await.expect("answers").get(0);
    assert_eq!(kept, "7MB");
}

/// Nothing of its database was read when the cutover was prepared, and a shut server answers no question about it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_session_of_a_database_may_come_between_preparation_and_pause() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("prepare.after_fence=hold").resolved().await;
    let names = "CREATE FUNCTION tenant() RETURNS text LANGUAGE sql AS 'SELECT current_setting(''app.tenant'')'";
    for cluster in [&stage.source, &stage.target] {
        connect(cluster, "shop").await.batch_execute(names).await.expect("a new function");
    }
    let running = life.cut_over_up_to("prepare.after_fence", life.options()).await;
    let late = connect_with(&life.client("late")).await;
    // Only the database's own function says that this setting matters: its name is not in any text sent.
    let set = "DO $$ BEGIN PERFORM set_config('app.' || 'tenant', 'seven', false); END $$";
    late.batch_execute(set).await.expect("settable");
    life.failpoints.release("prepare.after_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert_eq!(port(&late).await, i32::from(stage.target.port()));
    let kept: String = late.query_one("SELECT tenant()", &[]).await.expect("answers").get(0);
    assert_eq!(kept, "seven");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_at_every_step_is_felt_by_nobody() {
    let stage = Stage::set().await;
    for failpoint in ["prepare.after_fence", "pause.after_hard_fence", "drain.after_applied", "decide.before_decision"]
    {
        let life = stage.life_with_proxy(&format!("{failpoint}=error")).resolved().await;
        let crowd = Arc::new(Crowd::default());
        let mut tasks = Vec::new();
        for _ in 0..4 {
            let client = connect_with(&life.client("worker")).await;
            let (worker, visitor, config) = (crowd.clone(), crowd.clone(), life.client("visitor"));
            tasks.push(tokio::spawn(async move { worker.work(client).await }));
            tasks.push(tokio::spawn(async move { visitor.come_and_go(config).await }));
        }
        let report = life.cut_over().await;
        assert_eq!(report.reason, format!("failpoint {failpoint}"));
        let after = crowd.transactions.load(Ordering::SeqCst);
        wait_for("work after the abort", || async {
            crowd.transactions.load(Ordering::SeqCst) > after + 20
                || !crowd.errors.lock().expect("not poisoned").is_empty()
        })
        .await;
        crowd.stop.store(true, Ordering::SeqCst);
        for task in tasks {
            task.await.expect("no panic");
        }
        assert_eq!(*crowd.errors.lock().expect("not poisoned"), Vec::<String>::new(), "{failpoint}");
        assert!(life.runs_on(ServerRole::Source, 0), "{failpoint}");
        life.tasks.stop();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_transaction_through_the_proxy_aborts_and_carries_on() {
    let mut stage = Stage::set().await;
    stage.connect_timeout = Duration::from_secs(10);
    let life = stage.life_with_proxy("prepare.after_fence=hold").resolved().await;
    let client = connect_with(&life.client("nightly-report")).await;
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("answers").get(0);
    let options = CutoverOptions { drain_timeout: Duration::from_millis(400), ..life.options() };
    // Begun once the session has been prepared.
    let running = life.cut_over_up_to("prepare.after_fence", options).await;
    client.batch_execute("BEGIN; INSERT INTO item (name) VALUES ('slow')").await.expect("writable");
    life.failpoints.release("prepare.after_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted);
    assert!(report.reason.contains("drain_timeout"), "{}", report.reason);
    assert!(report.reason.contains(&format!("pid {pid} (\"nightly-report\")")), "{}", report.reason);
    client.batch_execute("INSERT INTO item (name) VALUES ('still'); COMMIT").await.expect("carries on");

    // By policy it is ended instead, and told so. This one is there before the cutover is.
    life.failpoints.release("prepare.after_fence");
    client.batch_execute("BEGIN; INSERT INTO item (name) VALUES ('slow')").await.expect("writable");
    let report = life.cut_over_with(CutoverOptions { stragglers: Stragglers::Terminate, ..options }).await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert!(client.batch_execute("COMMIT").await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_whose_client_has_vanished_is_waited_for() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("").resolved().await;
    let (client, socket) = connect_loosely(&life.client("vanishing")).await;
    let slow = "INSERT INTO item (name) SELECT 'vanished' FROM generate_series(1, 10), pg_sleep(2)";
    let sent = tokio::spawn(async move {
        let _ = client.batch_execute(slow).await;
    });
    let watcher = connect(&stage.source, "postgres").await;
    wait_for("the statement to run", || async {
        let running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'vanishing' AND state = 'active'";
        watcher.query_one(running, &[]).await.expect("answers").get::<_, i64>(0) == 1
    })
    .await;
    // The client vanishes; its statement goes on and will commit.
    socket.abort();
    sent.await.expect("no panic");
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    // The sequence was read after the statement had committed or had been proven gone.
    watcher.batch_execute("ALTER DATABASE shop ALLOW_CONNECTIONS true").await.expect("an operator lifts it so");
    let left = connect(&stage.source, "shop").await;
    let left: i64 = left.query_one("SELECT coalesce(max(id), 0) FROM item", &[]).await.expect("readable").get(0);
    let next = connect(&stage.target, "shop").await;
    let next: i64 = next.query_one("SELECT nextval('item_id_seq')", &[]).await.expect("readable").get(0);
    assert!(next > left, "{next} follows {left}");
}

/// A number of `item`'s sequence, taken on a session without a driver; none: the session is ended.
async fn next_number(stream: &mut TcpStream) -> Option<i64> {
    let sql = b"SELECT nextval('item_id_seq')\0";
    let mut query = vec![b'Q', 0, 0, 0, u8::try_from(sql.len() + 4).expect("a short query")];
    query.extend_from_slice(sql);
    stream.write_all(&query).await.ok()?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"Z\0\0\0\x05I") {
        if stream.read_buf(&mut answer).await.ok()? == 0 {
            return None;
        }
    }
    let mut rest = &answer[..];
    loop {
        let (tag, length) = (*rest.first()?, rest.get(1..5)?);
        let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
        if tag == b'D' {
            // Behind how many columns there are, and how long the first one is.
            return std::str::from_utf8(&rest[11..=length]).expect("ASCII").parse().ok();
        }
        rest = &rest[length + 1..];
    }
}

/// A replication connection with a database takes SQL, and no gate holds it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_replication_connection_takes_a_number_twice() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("").resolved().await;
    let port = life.proxy.as_ref().expect("there is one").address().expect("on TCP").port();
    let mut walsender = connect_raw(port, b"replication\0database").await;
    let first = next_number(&mut walsender).await.expect("it takes SQL");
    let rehearsed = life.cut_over_with(CutoverOptions { dry_run: true, ..life.options() }).await;
    assert_eq!((rehearsed.outcome, rehearsed.sessions_ended), (CutoverOutcome::DryRun, 0), "{rehearsed:?}");
    let told = |one: &Intention| one.detail.contains("replication connection");
    assert!(rehearsed.would.iter().any(told), "{rehearsed:?}");
    assert_eq!(next_number(&mut walsender).await, Some(first + 1), "a dry run ends nobody");

    let taking = tokio::spawn(async move {
        let mut last = 0;
        while let Some(number) = next_number(&mut walsender).await {
            last = number;
        }
        last
    });
    let report = life.cut_over().await;
    assert_eq!((report.outcome, report.sessions_ended), (CutoverOutcome::Switched, 1), "{report:?}");
    let last = taking.await.expect("no panic");
    let next = connect(&stage.target, "shop").await;
    let next: i64 = next.query_one("SELECT nextval('item_id_seq')", &[]).await.expect("readable").get(0);
    assert!(last > first && next > last, "{last} was taken on the source, {next} on the target");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_client_may_leave_and_may_cancel() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("pause.after_hard_fence=hold").resolved().await;
    let proxy = life.proxy.as_ref().expect("a proxy");
    let sessions = proxy.sessions();
    let held =
        |name: &str| sessions.list().iter().any(|one| one.application_name == name && one.state == SessionState::Held);
    let mut leaver = connect_raw(proxy.address().expect("on TCP").port(), b"application_name\0leaver").await;
    let (torn, socket) = connect_loosely(&life.client("torn")).await;
    let canceller = connect_with(&life.client("canceller")).await;
    let patient = connect_with(&life.client("patient")).await;
    let running = life.cut_over_up_to("pause.after_hard_fence", life.options()).await;
    let gate = life.switchboard.database("shop");
    assert!(gate.is_fenced());
    let patient = tokio::spawn(async move {
        patient.simple_query("SELECT 1").await.expect("only held");
        patient
    });
    // Cancelled while it is held: 57014 at once, and the session goes on. A cancel of what is not held yet would be lost.
    let token = canceller.cancel_token();
    let cancelled = tokio::spawn(async move {
        let refused = canceller.simple_query("SELECT 2").await.expect_err("cancelled");
        (canceller, refused)
    });
    wait_for("the statement to be held", || async { held("canceller") }).await;
    token.cancel_query(tokio_postgres::NoTls).await.expect("accepted");
    let (canceller, refused) = cancelled.await.expect("no panic");
    assert_eq!(refused.code().map(|code| code.code()), Some("57014"));
    assert!(gate.is_fenced(), "answered while the gate was closed");
    // One that says goodbye while it is held, and one whose link breaks, are not waited for.
    let count = sessions.list().len();
    leaver.write_all(b"Q\0\0\0\x0dSELECT 3\0X\0\0\0\x04").await.expect("taken");
    let tearing = tokio::spawn(async move { torn.simple_query("SELECT 4").await });
    wait_for("the statement to be held", || async { held("torn") }).await;
    socket.abort();
    wait_for("both to be gone", || async { sessions.list().len() + 2 == count }).await;
    assert!(gate.is_fenced(), "noticed while the gate was closed");
    assert!(tearing.await.expect("no panic").is_err());

    life.failpoints.release("pause.after_hard_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    let patient = patient.await.expect("no panic");
    assert_eq!(port(&patient).await, i32::from(stage.target.port()));
    assert_eq!(port(&canceller).await, i32::from(stage.target.port()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeliner_without_end_is_held_at_a_sync() {
    let stage = Stage::set().await;
    let life = stage.life_with_proxy("").resolved().await;
    let client = Arc::new(connect_with(&life.client("pipeliner")).await);
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    // Always sixteen statements under way on one connection, each with its own Sync.
    let pipeline: Vec<_> = (0..16)
        .map(|_| {
            let (client, stop, done) = (client.clone(), stop.clone(), done.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    client.simple_query("SELECT 1").await?;
                    done.fetch_add(1, Ordering::SeqCst);
                }
                Ok::<_, tokio_postgres::Error>(())
            })
        })
        .collect();
    wait_for("the pipeline to flow", || async { done.load(Ordering::SeqCst) > 100 }).await;
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    let after = done.load(Ordering::SeqCst);
    wait_for("the pipeline to flow on", || async { done.load(Ordering::SeqCst) > after + 100 }).await;
    stop.store(true, Ordering::SeqCst);
    for lane in pipeline {
        lane.await.expect("no panic").expect("no error");
    }
    assert_eq!(port(&client).await, i32::from(stage.target.port()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_without_room_for_the_sessions_is_refused_before_anything_is_done() {
    let mut stage = Stage::set().await;
    stage.target.configure(&[("max_connections", "20"), ("superuser_reserved_connections", "3")]).expect("writable");
    stage.target.restart(Stop::Fast).expect("it starts again");
    let life = stage.life_with_proxy("").resolved().await;
    let mut clients = Vec::new();
    for _ in 0..16 {
        clients.push(connect_with(&life.client("many")).await);
    }
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    assert!(report.reason.contains("free connections, and 16 sessions would move there"), "{}", report.reason);
    assert_eq!(stage.rows().await.0, Vec::new(), "no fence was raised");
    for client in &clients {
        assert_eq!(port(client).await, i32::from(stage.source.port()));
    }

    clients.truncate(2);
    wait_for("the others to have left", || async {
        life.proxy.as_ref().is_some_and(|proxy| proxy.sessions().list().len() == 2)
    })
    .await;
    let report = life.cut_over().await;
    assert_eq!((report.outcome, report.sessions_moved), (CutoverOutcome::Switched, 2), "{report:?}");
}
