//! Cutovers that are taken back, with the real daemon under load: nothing is lost and nobody notices, however often; a
//! daemon that is killed at any step of a rollback ends up wholly on one side; a completed migration leaves what it lists.

mod support;

use pgcutover::cutover::steps::{ALL_FAILPOINTS, ROLLBACK_FAILPOINTS};
use pgcutover::demo::cluster::Stop;
use pgcutover::demo::compare;
use pgcutover::demo::shop::SHOP;
use support::daemon::DaemonOptions;
use support::world::{COMPLETED, NAME, READY, World};
use support::{configure_read_only, connect, connect_with, shop, try_connect, wait_for};

/// Five times there and back while 16 clients write; then nobody writes any more, and both servers hold the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_alternating_cutovers_and_rollbacks_under_load_lose_nothing() {
    let world = World::begin(0.01).await;
    let application = world.application(16);
    world.migrate().await;
    let mut epoch = 0;
    for _ in 0..5 {
        for (order, then, port) in
            [("cutover", COMPLETED, world.target.port()), ("rollback", READY, world.source.port())]
        {
            world.wait_for_writes(&application, 100).await;
            let report = world.must_switch(order);
            epoch += 1;
            assert_eq!(report["epoch"], epoch, "{order}");
            assert_eq!(world.serving_port().await, port, "{order}");
            world.wait_until(then).await;
            let view = world.view();
            let direction = if order == "cutover" { "reverse" } else { "forward" };
            assert_eq!(view["databases"][0]["direction"], direction, "{view}");
            assert_eq!(view["databases"][0]["rollback_possible"], order == "cutover", "{view}");
        }
    }
    world.wait_for_writes(&application, 100).await;
    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    // Sequences are brought over by a cutover.
    world.must_switch("cutover");
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    assert_eq!(compare::differences(&source, &target).await.expect("both can be read"), Vec::<String>::new());
    // One slot for the one stream that there is, one for the watch over the server that was left, and no other.
    for cluster in [&world.source, &world.target] {
        let admin = connect(cluster, "postgres").await;
        let count = admin.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.expect("readable");
        assert_eq!(count.get::<_, i64>(0), 1);
    }
    assert_eq!(world.view()["databases"][0]["fenced_writes"], serde_json::json!([]), "nobody else wrote");
}

/// The server that is led back to is fenced by us, which its own configuration is no part of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_became_read_only_is_not_led_back_to() {
    let world = World::begin(0.01).await;
    world.migrate().await;
    let (cutover, rollback) = (("cutover", COMPLETED, &world.target), ("rollback", READY, &world.source));
    for (order, then, onto) in [cutover, rollback, cutover] {
        configure_read_only(onto, "on").await;
        for rehearsed in [true, false] {
            let mut arguments = vec!["migration", order, NAME, "--output", "json"];
            arguments.extend(rehearsed.then_some("--dry-run"));
            let answer = world.daemon.command(&arguments);
            let report: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap_or_default();
            assert!(!answer.status.success(), "{order}: {report}");
            assert!(report["reason"].as_str().is_some_and(|said| said.contains("read-only by default")), "{report}");
        }
        let checked = world.daemon.command(&["check"]);
        let said = String::from_utf8_lossy(&checked.stdout).contains("default_transaction_read_only = on");
        assert_eq!(said, order == "cutover", "{checked:?}");
        configure_read_only(onto, "off").await;
        world.must_switch(order);
        world.wait_until(then).await;
    }
}

/// Killed at each step of a rollback: before the decision it goes on on the target and can be rolled back all the same,
/// after it on the source and can be cut over again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_step_of_a_rollback_it_is_wholly_on_one_side() {
    let mut world = World::begin(0.01).await;
    let application = world.application(6);
    world.migrate().await;
    world.must_switch("cutover");
    let engine = ["return.after_publication", "return.after_slot", "return.after_prepared", "return.after_turn"];
    for name in ALL_FAILPOINTS.iter().chain(ROLLBACK_FAILPOINTS).chain(&engine) {
        let failpoints = match name.strip_prefix("abort.") {
            Some(_) => format!("decide.before_decision=error;{name}=hang"),
            None => format!("{name}=hang"),
        };
        world.crash_at(COMPLETED, "rollback", &failpoints, name).await;
        let decided = name.starts_with("switch.") || ["decide.after_decision", "return.after_turn"].contains(name);
        if decided {
            assert_eq!(world.serving_port().await, world.source.port(), "{name}");
            world.wait_until(READY).await;
            world.must_be_shut(&world.target).await;
            world.wait_for_writes(&application, 20).await;
            let report = world.daemon.json(&["migration", "cutover", NAME]);
            assert_eq!(report["outcome"], "switched", "{name}: {report}");
        } else {
            assert_eq!(world.serving_port().await, world.target.port(), "{name}");
            world.wait_until(COMPLETED).await;
            world.must_be_shut(&world.source).await;
        }
        world.wait_for_writes(&application, 20).await;
    }
    let outcomes = application.finish().await;
    world.must_switch("rollback");
    // What was lost or late is looked for on the server that serves now: the source.
    shop::nothing_lost(&outcomes, &world.target, &world.source).await;
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    assert_eq!(compare::differences(&source, &target).await.expect("both can be read"), Vec::<String>::new());
}

/// The host of the process that decided a rollback is lost: on the server its session still stands, and holds the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_let_in_before_the_fence_is_lifted_may_write() {
    let mut world = World::begin(0.01).await;
    world.migrate().await;
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    world.daemon.restart_with("switch.after_open=hang");
    world.wait_until(COMPLETED).await;
    let mut order = world.daemon.begin(&["migration", "rollback", NAME]);
    wait_for("the gates to open", || async { world.daemon.log().contains("failpoint=\"switch.after_open\"") }).await;
    // Next in line for the coordinator's lock.
    let dead = connect(&world.source, "postgres").await;
    let lock = format!("SELECT pg_advisory_lock({}, hashtext('{NAME}'))", 0x7067_6375);
    let taken = tokio::spawn(async move { dead.batch_execute(&lock).await.map(|()| dead) });
    let admin = connect(&world.source, "postgres").await;
    wait_for("it to be waited for", || async {
        let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        admin.query_one(waits, &[]).await.expect("readable").get::<_, i64>(0) > 0
    })
    .await;
    world.daemon.kill();
    order.wait().expect("the command ends when its daemon does");
    let dead = taken.await.expect("no panic").expect("it is free when its session has ended");
    world.daemon.set_failpoints("");
    world.daemon.start_again();
    assert_eq!(world.serving_port().await, world.source.port());
    let client = connect_with(&world.daemon.client(SHOP)).await;
    client.batch_execute("CREATE TABLE written (); DROP TABLE written").await.expect("the fence is not felt");
    let stranger = async || {
        let stranger = connect(&world.source, SHOP).await;
        let shown = stranger.query_one("SHOW default_transaction_read_only", &[]).await.expect("shown");
        shown.get::<_, String>(0)
    };
    assert_eq!(stranger().await, "on", "it stands");
    drop(dead);
    wait_for("it to be lifted", || async { stranger().await == "off" }).await;
    world.wait_until(READY).await;
}

/// Who has rolled back says when it is cut over again, also where nobody had to say so the first time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_rolled_back_is_not_cut_over_again_by_itself() {
    let world = World::begin(0.01).await;
    world.daemon.must(&["migration", "create", NAME, "--database", SHOP, "--cutover-when-ready"]);
    world.wait_until(COMPLETED).await;
    world.must_switch("rollback");
    assert_eq!(world.view()["cutover_when_ready"], false, "it is looked for such migrations once a second");
    let report = world.daemon.json(&["migration", "cutover", NAME]);
    assert_eq!(
        (&report["outcome"], &report["epoch"]),
        (&"switched".into(), &3.into()),
        "the order was the first: {report}"
    );
}

/// Complete ends the way back, and says what stays; an order that comes too late is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completed_migration_leaves_what_it_lists() {
    let world = World::begin(0.01).await;
    world.migrate().await;
    let refused = world.daemon.command(&["migration", "rollback", NAME]);
    assert!(!refused.status.success(), "nothing was cut over yet");
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    let report = world.daemon.json(&["migration", "complete", NAME]);
    let left: Vec<&str> =
        report["left"].as_array().expect("a list").iter().filter_map(|one| one["kind"].as_str()).collect();
    assert_eq!(left, ["fence_row", "fence"], "{report}");
    wait_for("the migration to be closed", || async { world.state() == "Succeeded/Closed" }).await;
    for cluster in [&world.source, &world.target] {
        let admin = connect(cluster, "postgres").await;
        let slots = admin.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.expect("readable");
        assert_eq!(slots.get::<_, i64>(0), 0);
    }
    world.must_be_shut(&world.source).await;
    shop::open_fenced(&world.source).await;
    for cluster in [&world.source, &world.target] {
        let client = connect(cluster, SHOP).await;
        let ours = "SELECT (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_namespace WHERE nspname = 'pgcutover')";
        assert_eq!(client.query_one(ours, &[]).await.expect("readable").get::<_, i64>(0), 0);
    }
    let refused = world.daemon.command(&["migration", "rollback", NAME]);
    assert!(!refused.status.success(), "there is no way back any more");
    assert_eq!(world.serving_port().await, world.target.port());
    // What is in use is not replaced by what was left, not even on request.
    let database = "SELECT oid::text FROM pg_database WHERE datname = current_database()";
    let oid = async || {
        let target = connect(&world.target, SHOP).await;
        target.query_one(database, &[]).await.expect("readable").get::<_, String>(0)
    };
    let before = oid().await;
    world.daemon.must(&["migration", "create", "again", "--database", SHOP, "--overwrite-target"]);
    wait_for("it to be refused", || async {
        world.daemon.json(&["migration", "show", "again"])["error"]["code"] == "not_the_source"
    })
    .await;
    assert_eq!(oid().await, before);
}

/// What is left in the old server's database is removed through its fence's door. Who was killed in it has left it open, and
/// nobody goes through it afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_door_that_was_left_open_is_shut_before_the_migration_is_closed() {
    let mut world = World::begin(0.01).await;
    world.migrate().await;
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    world.daemon.restart_with("engine.before_undo=hang");
    world.wait_until(COMPLETED).await;
    let undoings = || world.daemon.log().matches("failpoint=\"engine.before_undo\"").count();
    let before = undoings();
    let mut order = world.daemon.begin(&["migration", "complete", NAME]);
    wait_for("the undoing", || async { undoings() > before }).await;
    shop::open_fenced(&world.source).await;
    world.daemon.kill();
    order.wait().expect("the command ends when its daemon does");
    world.daemon.set_failpoints("");
    world.daemon.start_again();
    wait_for("the migration to be closed", || async { world.state() == "Succeeded/Closed" }).await;
    assert!(try_connect(&world.source.config(SHOP)).await.is_err(), "the server that was left lets somebody in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_is_cancelled_after_a_rollback_leaves_no_fence() {
    let world = World::begin(0.01).await;
    world.migrate().await;
    for (order, then) in [("cutover", COMPLETED), ("rollback", READY)] {
        world.must_switch(order);
        world.wait_until(then).await;
    }
    world.must_be_shut(&world.target).await;
    world.daemon.must(&["migration", "cancel", NAME]);
    wait_for("the target to be open again", || async { try_connect(&world.target.config(SHOP)).await.is_ok() }).await;
    let target = connect(&world.target, SHOP).await;
    let settings = "SELECT count(*) FROM pg_db_role_setting WHERE array_to_string(setconfig, ',') ~ 'read_only'";
    assert_eq!(target.query_one(settings, &[]).await.expect("readable").get::<_, i64>(0), 0);
    drop(target);
    // Nothing of it is in the way of another one.
    let again = ["migration", "create", "again", "--database", SHOP, "--overwrite-target"];
    world.daemon.must(&again);
    wait_for("the other migration to be ready", || async {
        world.daemon.json(&["migration", "show", "again"])["substate"] == "WaitingForCutoverTrigger"
    })
    .await;
    let report = world.daemon.json(&["migration", "cutover", "again"]);
    assert_eq!(report["outcome"], "switched", "{report}");
    assert_eq!(world.serving_port().await, world.target.port());
}

/// A source that is restarted just as it is left: what could not be noted there is noted later, by the same daemon, and the
/// stream back and a rollback find it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_restarts_as_it_is_left_can_be_gone_back_to() {
    let mut world = World::begin_with(0.01, |options| options.failpoints("switch.after_open=sleep:3000ms")).await;
    world.migrate().await;
    let mut order = world.daemon.begin(&["migration", "cutover", NAME]);
    wait_for("the switch", || async { world.daemon.log().contains("failpoint=\"switch.after_open\"") }).await;
    world.source.restart(Stop::Fast).expect("it runs again");
    assert!(order.wait().expect("it ends").success(), "{}", world.daemon.log());
    wait_for("the note", || async { world.rows(&world.source).await.0 == [Some("decided".to_owned())] }).await;
    world.wait_until(COMPLETED).await;
    world.must_switch("rollback");
    assert_eq!(world.serving_port().await, world.source.port());
}

/// What is opened beforehand on the server that is left is for the stream back. The one that still runs the other way leaves it
/// alone when it has to begin again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_begins_again_while_the_way_back_is_made_goes_where_it_went() {
    let slow = |options: DaemonOptions| options.failpoints("prepare.after_return=sleep:5000ms");
    let world = World::begin_with(0.01, slow).await;
    world.migrate().await;
    let streams = || world.daemon.log().matches("migration::stream: streaming").count();
    let before = streams();
    let mut order = world.daemon.begin(&["migration", "cutover", NAME]);
    wait_for("the way back", || async { world.daemon.log().contains("failpoint=\"prepare.after_return\"") }).await;
    end_apply(&world).await;
    // It finds out with the next row.
    let row = "UPDATE shop.customer SET email = email";
    connect(&world.source, SHOP).await.batch_execute(row).await.expect("written");
    wait_for("the stream", || async { streams() > before }).await;
    assert!(order.wait().expect("it ends").success(), "{}", world.daemon.log());
    world.wait_until(COMPLETED).await;
    // The source is shut.
    assert_eq!(world.daemon.json(&["migration", "rollback", NAME])["outcome"], "switched");
    let source = connect(&world.source, SHOP).await;
    let progress = "SELECT migration FROM pgcutover.progress ORDER BY migration";
    let rows = source.query(progress, &[]).await.expect("readable");
    let applied: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(applied, [format!("{NAME}/1")], "only the stream back has been applied to the source");
}

/// Behind the fence a stream cannot begin again, so nobody waits for it, not even until max_pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_lost_in_the_pause_ends_the_cutover() {
    let slow = |options: DaemonOptions| {
        options.section("cutover", "max_pause = \"1h\"").failpoints("drain.after_sessions=sleep:1000ms")
    };
    let world = World::begin_with(0.01, slow).await;
    world.migrate().await;
    let mut order = world.daemon.begin(&["migration", "cutover", NAME]);
    wait_for("the pause", || async { world.daemon.log().contains("failpoint=\"drain.after_sessions\"") }).await;
    end_apply(&world).await;
    assert!(!order.wait().expect("it ends").success(), "it went through");
    assert!(
        world.daemon.log().contains("it was interrupted, and a pause does not wait for it"),
        "{}",
        world.daemon.log()
    );
    world.wait_until(READY).await;
    assert_eq!(world.daemon.json(&["migration", "cutover", NAME])["outcome"], "switched");
}

/// Ends the session that applies, on the target.
async fn end_apply(world: &World) {
    let target = connect(&world.target, SHOP).await;
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE '%/apply'";
    assert_eq!(target.query_one(ended, &[]).await.expect("ended").get::<_, i64>(0), 1);
}
