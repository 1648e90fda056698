//! Slots that begin with a catalogue that is too old.

use std::time::Duration;

use pgcutover::catalog::decision::{self, Outcome};
use pgcutover::config::Ddl;
use pgcutover::demo::compare;
use pgcutover::ident::QualifiedName;
use pgcutover::switch::Epoch;
use tokio_postgres::Client;

use crate::support::{PATIENCE, connect, wait_for};
use crate::world::{World, create, drain, reach, spec};

/// Begins a transaction, and tells its xid.
async fn begin(client: &Client) -> String {
    client.batch_execute("BEGIN").await.expect("begun");
    client.query_one("SELECT txid_current()::text", &[]).await.expect("an xid").get(0)
}

/// Waits until the slot that is being made waits for the transaction.
async fn awaited(client: &Client, xid: &str) {
    let sql = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'transactionid' AND NOT l.granted AND l.transactionid::text = $1
                 AND a.backend_type = 'walsender'";
    wait_for("the slot to wait", || async { client.query_one(sql, &[&xid]).await.expect("read").get::<_, i64>(0) > 0 })
        .await;
}

/// What a transaction changes in the catalogue between the first and the second step of making a slot, PostgreSQL's decoding
/// forgets: rows written afterwards cannot be decoded, or are decoded without the new column.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_while_the_slot_was_made_is_known_to_the_stream() {
    let world = World::same_major().with(|config| config.migration.ddl = Ddl::Detect);
    world.furnish("shop").await;
    let writer = connect(&world.source, "shop").await;
    let tables = "CREATE TABLE emptied (k serial PRIMARY KEY); INSERT INTO emptied DEFAULT VALUES;
                  CREATE TABLE wider (k serial PRIMARY KEY); CREATE TABLE other (k serial PRIMARY KEY)";
    writer.batch_execute(tables).await.expect("made");
    let (first, second) = (connect(&world.source, "shop").await, connect(&world.source, "shop").await);

    let xid = begin(&first).await;
    let running = world.engine("");
    create(&running, spec("young", &["shop"])).await;
    awaited(&writer, &xid).await;
    let xid = begin(&second).await;
    second.batch_execute("TRUNCATE emptied; ALTER TABLE wider ADD COLUMN late int").await.expect("changed");
    first.batch_execute("COMMIT").await.expect("committed");
    awaited(&writer, &xid).await;
    // The first row that is decoded settles what of the catalogue is seen from then on.
    writer.batch_execute("INSERT INTO other DEFAULT VALUES").await.expect("written");
    second.batch_execute("COMMIT").await.expect("committed");

    let stop = tokio_util::sync::CancellationToken::new();
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            let write = "INSERT INTO emptied DEFAULT VALUES; INSERT INTO wider (late) VALUES (7)";
            while !stop.is_cancelled() {
                writer.batch_execute(write).await.expect("written");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    reach(&running, "young", "WaitingForCutoverTrigger").await;
    stop.cancel();
    writing.await.expect("no panic");
    drain(&running, "young").await;
    let (from, to) = (connect(&world.source, "shop").await, connect(&world.target, "shop").await);
    for client in [&from, &to] {
        compare::pin_text(client).await.expect("set");
    }
    for table in ["emptied", "wider", "other"] {
        let table = QualifiedName::new("public", table);
        let digest = async |client| compare::digest(client, &table, "true", &[]).await.expect("read");
        assert_eq!(digest(&from).await, digest(&to).await, "{table}");
    }
    running.stop().await;
}

/// The same of the slot for the way back, beside whoever writes to the target before a cutover. Behind the boundary all is
/// decoded and applied that is written there.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_while_the_slot_of_the_way_back_was_made_is_known_to_its_stream() {
    let world = World::same_major();
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    let tables = "CREATE TABLE emptied (k int PRIMARY KEY); CREATE TABLE other (k int PRIMARY KEY)";
    source.batch_execute(tables).await.expect("made");
    let running = world.engine("");
    create(&running, spec("back", &["shop"])).await;
    reach(&running, "back", "WaitingForCutoverTrigger").await;
    drain(&running, "back").await;
    let session = async || connect(&world.target, "shop").await;
    let (first, second, writer) = (session().await, session().await, session().await);

    let lease = running.engine.begin_cutover("back").await.expect("ready");
    let xid = begin(&first).await;
    let prepare = lease.prepare_return(Epoch(1));
    let beside = async {
        awaited(&writer, &xid).await;
        let xid = begin(&second).await;
        second.batch_execute("TRUNCATE emptied").await.expect("changed");
        first.batch_execute("COMMIT").await.expect("committed");
        awaited(&writer, &xid).await;
        writer.batch_execute("INSERT INTO other VALUES (1)").await.expect("written");
        second.batch_execute("COMMIT").await.expect("committed");
    };
    let (prepared, ()) = tokio::join!(prepare, beside);
    prepared.expect("prepared");
    // It is decoded, though it is not applied.
    writer.batch_execute("INSERT INTO emptied VALUES (1)").await.expect("written");
    decision::write_boundary(&writer, Epoch(1)).await.expect("written");
    lease.finish(Outcome::Decided).await.expect("recorded");
    reach(&running, "back", "Completed").await;
    writer.batch_execute("INSERT INTO emptied VALUES (2)").await.expect("written");
    wait_for("the row of behind the boundary", || async {
        let view = running.engine.show("back").expect("known");
        assert!(view.error.is_none() && view.databases[0].last_error.is_none(), "{view:?}");
        let row = source.query_opt("SELECT FROM emptied WHERE k = 2", &[]).await;
        row.expect("readable").is_some()
    })
    .await;
    running.stop().await;
}

/// A session that waits to become the leader, say, changes nothing while it waits, and may do so for weeks.
#[tokio::test(flavor = "multi_thread")]
async fn who_only_waits_for_a_lock_keeps_no_slot_from_its_start() {
    let world = World::same_major().with(|config| config.migration.slot_timeout = Duration::from_secs(30));
    world.furnish("shop").await;
    let (leader, other) = (connect(&world.source, "shop").await, connect(&world.source, "shop").await);
    let lead = "SELECT pg_advisory_lock(77)";
    leader.batch_execute(lead).await.expect("granted");
    let waiting = tokio::spawn(async move { other.batch_execute(lead).await });
    wait_for("the other to wait", || async {
        let sql = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        leader.query_opt(sql, &[]).await.expect("readable").is_some()
    })
    .await;
    let running = world.engine("");
    create(&running, spec("led", &["shop"])).await;
    reach(&running, "led", "WaitingForCutoverTrigger").await;
    assert!(!waiting.is_finished(), "it waited all the while");
    waiting.abort();
    running.stop().await;
}

/// Somebody reads a table whose identity is set back, and somebody else has a definition open: the cancel waits for them, and
/// the application does not wait for the cancel.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_waits_for_locks_holds_nobody_up() {
    let world = World::same_major().with(|config| {
        config.migration.ddl = Ddl::Apply;
        config.migration.lock_timeout = Duration::from_millis(300);
    });
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("busy", &["shop"])).await;
    reach(&running, "busy", "WaitingForCutoverTrigger").await;
    let session = async || connect(&world.source, "shop").await;
    let (defining, reading, other) = (session().await, session().await, session().await);
    defining.batch_execute("BEGIN").await.expect("begun");
    defining.batch_execute("ALTER TABLE orders ADD meanwhile int").await.expect("carried over");
    reading.batch_execute("BEGIN; SELECT count(*) FROM log").await.expect("read");
    let engine = running.engine.clone();
    let cancel = tokio::spawn(async move { engine.cancel("busy").await });
    let is = async |sql: &str| other.query_one(sql, &[]).await.expect("asked").get::<_, bool>(0);
    let disarmed = "SELECT NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname LIKE 'pgcutover%')";
    wait_for("the event triggers to go", || async { is(disarmed).await }).await;
    let defined = other.batch_execute("ALTER TABLE customer ADD meanwhile int");
    tokio::time::timeout(PATIENCE, defined).await.expect("nobody is in the way").expect("defined");
    defining.batch_execute("COMMIT").await.expect("committed");
    let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'log'::regclass AND NOT granted)";
    wait_for("the cancel to wait for the reader", || async { is(waits).await }).await;
    let written = other.batch_execute("INSERT INTO log (what) VALUES ('meanwhile')");
    tokio::time::timeout(PATIENCE, written).await.expect("in its turn").expect("written");
    reading.batch_execute("COMMIT").await.expect("read");
    let report = cancel.await.expect("no panic").expect("cancelled");
    assert!(report.left.iter().all(|left| left.object.undo.is_none()), "{report:?}");
    world.assert_clean("shop").await;
    running.stop().await;
}
