//! What a migration asks of the source, and what it does when that is too much.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use pgcutover::catalog::decision::Outcome;
use pgcutover::demo::cluster::Stop;
use pgcutover::switch::Epoch;

use crate::support::{connect, wait_for};
use crate::world::{World, create, reach, spec};

const SLOTS: &str = "SELECT count(*) FROM pg_replication_slots";

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_keeps_too_much_is_dropped_before_the_disk_fills() {
    let world = World::same_major().with(|config| {
        config.migration.max_retained_wal_bytes = Some(64 << 20);
        // Asked, and nobody is late.
        config.migration.max_standby_lag = Some(Duration::from_secs(3600));
    });
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("heavy", &["shop"])).await;
    reach(&running, "heavy", "WaitingForCutoverTrigger").await;

    // The target takes nothing while somebody locks a table there.
    let target = connect(&world.target, "shop").await;
    target.batch_execute("BEGIN; LOCK TABLE customer IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    let source = connect(&world.source, "shop").await;
    source.batch_execute("INSERT INTO customer (email) VALUES ('stuck')").await.expect("written");
    let write = "SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1024 * 1024)) FROM generate_series(1, 20)";
    source.batch_execute(&format!("{write}; {write}")).await.expect("written");
    wait_for("the warning", || async {
        let view = running.engine.show("heavy").expect("known");
        view.databases[0].wal_warning && view.databases[0].retained_wal_bytes.is_some_and(|kept| kept > 32 << 20)
    })
    .await;
    let view = running.engine.show("heavy").expect("known");
    assert_eq!(view.substate, "WaitingForCutoverTrigger", "half of the limit is a warning");
    assert_eq!(view.databases[0].retained_wal_limit_bytes, Some(64 << 20));

    source.batch_execute(&format!("{write}; {write}")).await.expect("written");
    wait_for("the end of the migration", || async {
        running.engine.show("heavy").is_ok_and(|view| view.substate == "Failed")
    })
    .await;
    let error = running.engine.show("heavy").expect("known").error.expect("a reason");
    assert_eq!(error.code, "wal_limit", "{error:?}");
    assert!(error.message.contains("64MB") && error.hint.is_some(), "{error:?}");
    let slots: i64 = source.query_one(SLOTS, &[]).await.expect("count").get(0);
    assert_eq!(slots, 0, "what filled the disk is gone");
    target.batch_execute("ROLLBACK").await.expect("released");

    // Going on is not possible, and is said at once; a cancel leaves nothing.
    running.engine.retry("heavy").await.expect("accepted");
    wait_for("the second failure", || async {
        running.engine.show("heavy").is_ok_and(|view| view.error.is_some_and(|error| error.code == "slot_missing"))
    })
    .await;
    running.engine.cancel("heavy").await.expect("cancelled");
    world.assert_clean("shop").await;
    running.stop().await;
}

/// A target that does not answer is why most slots keep much, and what a migration is recorded in is gone with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_keeps_too_much_is_dropped_while_the_target_is_down() {
    let mut world = World::same_major().with(|config| config.migration.max_retained_wal_bytes = Some(64 << 20));
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("alone", &["shop"])).await;
    reach(&running, "alone", "WaitingForCutoverTrigger").await;
    world.target.stop(Stop::Immediate).expect("stopped");
    wait_for("an order to be told that the target cannot be reached", || async {
        let refused = running.engine.cancel("alone").await.expect_err("the target is down").to_string();
        refused.starts_with("the engine is not running here: target ")
    })
    .await;

    let source = connect(&world.source, "shop").await;
    let slots = async || source.query_one(SLOTS, &[]).await.expect("count").get::<_, i64>(0);
    let write = "SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1024 * 1024)) FROM generate_series(1, 40)";
    source.batch_execute(write).await.expect("written");
    wait_for("the warning", || async {
        let view = running.engine.show("alone").expect("known");
        view.databases[0].wal_warning && view.databases[0].retained_wal_bytes.is_some_and(|kept| kept > 32 << 20)
    })
    .await;
    wait_for("the metric, by which an alert is raised", || async {
        running.metrics.slot_retained_wal_bytes.with_label_values(&["alone", "shop"]).get() > 32 << 20
    })
    .await;
    assert_eq!(slots().await, 1, "half of the limit is a warning");

    source.batch_execute(write).await.expect("written");
    wait_for("the slot to go", || async { slots().await == 0 }).await;
    wait_for("the reason", || async {
        running.engine.show("alone").is_ok_and(|view| view.error.is_some_and(|error| error.code == "wal_limit"))
    })
    .await;

    world.target.start_again().expect("started");
    wait_for("the failure", || async {
        let view = running.engine.show("alone").expect("known");
        view.substate == "Failed" && view.error.is_some_and(|error| error.code == "slot_missing")
    })
    .await;
    running.engine.cancel("alone").await.expect("cancelled");
    world.assert_clean("shop").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_has_failed_does_not_fill_the_disk_either() {
    let world = World::same_major().with(|config| config.migration.max_retained_wal_bytes = Some(32 << 20));
    world.furnish("shop").await;
    let running = world.engine("engine.after_schema=error");
    create(&running, spec("idle", &["shop"])).await;
    wait_for("the failure", || async { running.engine.show("idle").is_ok_and(|view| view.substate == "Failed") }).await;
    let source = connect(&world.source, "shop").await;
    let slots: i64 = source.query_one(SLOTS, &[]).await.expect("count").get(0);
    assert_eq!(slots, 1, "it could go on");
    let write = "SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1024 * 1024)) FROM generate_series(1, 40)";
    source.batch_execute(write).await.expect("written");
    wait_for("the slot to go", || async { source.query_one(SLOTS, &[]).await.expect("count").get::<_, i64>(0) == 0 })
        .await;
    wait_for("the reason", || async {
        running.engine.show("idle").is_ok_and(|view| view.error.is_some_and(|error| error.code == "wal_limit"))
    })
    .await;
    running.stop().await;
}

/// Nobody reads the slot that watches the server that was left, and that goes on writing.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_keeps_too_much_is_given_up_with_its_slot() {
    let world = World::same_major().with(|config| config.migration.max_retained_wal_bytes = Some(32 << 20));
    world.furnish("shop").await;
    let running = world.engine("watch.after_start=hang");
    create(&running, spec("left", &["shop"])).await;
    reach(&running, "left", "WaitingForCutoverTrigger").await;
    let lease = running.engine.begin_cutover("left").await.expect("ready");
    lease.prepare_return(Epoch(1)).await.expect("prepared");
    lease.finish(Outcome::Decided).await.expect("recorded");
    reach(&running, "left", "Completed").await;
    wait_for("the watch", || std::future::ready(running.failpoints.is_held("watch.after_start"))).await;
    let source = connect(&world.source, "shop").await;
    let slots: i64 = source.query_one(SLOTS, &[]).await.expect("count").get(0);
    assert_eq!(slots, 1, "it watches");
    let write = "SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1024 * 1024)) FROM generate_series(1, 40)";
    source.batch_execute(write).await.expect("written");
    wait_for("the slot to go", || async { source.query_one(SLOTS, &[]).await.expect("count").get::<_, i64>(0) == 0 })
        .await;
    wait_for("the reason", || async {
        let view = running.engine.show("left").expect("known");
        let watch = view.databases[0].fence_watch.as_ref();
        let why = watch.and_then(|watch| watch.trouble.as_deref());
        why.is_some_and(|why| why.contains("max_retained_wal"))
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_copy_says_how_long_it_will_take() {
    let world = World::same_major().with(|config| config.migration.copy_rate_bytes = Some(12 << 20));
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("slow", &["shop"])).await;
    wait_for("an estimate", || async {
        let tables = running.engine.tables("slow").expect("known");
        let orders = tables.into_iter().find(|table| table.name == "orders").map(|table| table.full_load);
        orders.is_some_and(|load| load.seconds_left.is_some() && load.bytes_per_second.is_some_and(|rate| rate > 0))
    })
    .await;
    reach(&running, "slow", "WaitingForCutoverTrigger").await;
    let tables = running.engine.tables("slow").expect("known");
    assert!(tables.iter().all(|table| table.full_load.seconds_left.is_none()), "nothing is left");
    world.assert_equal("shop").await;
    running.stop().await;
}

/// pg_dump gives up, in words of its own, and is begun again.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_locked_under_pg_dump_is_waited_for() {
    let world = World::same_major().with(|config| config.migration.lock_timeout = Duration::from_millis(300));
    world.furnish("shop").await;
    let running = world.engine("engine.after_barrier=hold");
    create(&running, spec("locked", &["shop"])).await;
    wait_for("the publication", || std::future::ready(running.failpoints.is_held("engine.after_barrier"))).await;
    let (holder, looker) = (connect(&world.source, "shop").await, connect(&world.source, "shop").await);
    holder.batch_execute("BEGIN; LOCK TABLE customer IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    running.failpoints.release("engine.after_barrier");
    let waiting =
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%pg_dump%' AND wait_event_type = 'Lock'";
    let seen = Mutex::new(BTreeSet::new());
    wait_for("a second pg_dump", || async {
        let rows = looker.query(waiting, &[]).await.expect("readable");
        let mut seen = seen.lock().expect("no panic");
        seen.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
        seen.len() > 1
    })
    .await;
    holder.batch_execute("ROLLBACK").await.expect("released");
    reach(&running, "locked", "WaitingForCutoverTrigger").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_goes_down_under_pg_dump_is_waited_for() {
    use std::os::unix::fs::PermissionsExt as _;
    let bindir = tempfile::tempdir().expect("a directory");
    let (began, down) = (bindir.path().join("began"), bindir.path().join("down"));
    let mut real = None;
    let mut world = World::same_major().with(|config| {
        real = config.migration.bindir.replace(bindir.path().to_owned());
    });
    world.furnish("shop").await;
    // The first dump is begun, and never gets further than its server.
    let program = bindir.path().join("pg_dump");
    let script = format!(
        "#!/bin/sh
         if [ \"$1\" != --version ] && ! [ -e '{began}' ]; then
             touch '{began}'
             until [ -e '{down}' ]; do sleep 0.1; done
             exit 1
         fi
         exec '{real}/pg_dump' \"$@\"
        ",
        began = began.display(),
        down = down.display(),
        real = real.expect("client tools").display()
    );
    // Under another name first: a program that is open for writing cannot be run.
    let draft = bindir.path().join("draft");
    std::fs::write(&draft, script).expect("written");
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).expect("made executable");
    std::fs::rename(&draft, &program).expect("renamed");
    let running = world.engine("");
    create(&running, spec("dumped", &["shop"])).await;
    wait_for("the dump", || async { began.exists() }).await;
    world.source.restart(Stop::Immediate).expect("the source comes back");
    std::fs::write(&down, "").expect("written");
    reach(&running, "dumped", "WaitingForCutoverTrigger").await;
    assert!(running.engine.show("dumped").expect("known").error.is_none());
    world.assert_equal("shop").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_goes_without_standing_in_the_way_of_transactions() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("gone", &["shop"])).await;
    reach(&running, "gone", "WaitingForCutoverTrigger").await;
    let source = connect(&world.source, "shop").await;
    let published = "SELECT format('%I.%I', schemaname, tablename) FROM pg_publication_tables WHERE tablename <> 'ddl'";
    let mut tables: Vec<String> =
        source.query(published, &[]).await.expect("listed").iter().map(|row| row.get(0)).collect();
    let last = tables.pop().expect("tables");
    source.batch_execute(&format!("BEGIN; LOCK TABLE {last} IN ROW EXCLUSIVE MODE")).await.expect("locked");
    let watcher = connect(&world.source, "shop").await;
    let cancel = async { running.engine.cancel("gone").await.expect("cancelled") };
    let application = async {
        wait_for("somebody to wait for the application", || async {
            let waiting = format!("SELECT FROM pg_locks WHERE NOT granted AND relation = '{last}'::regclass");
            watcher.query_opt(&waiting, &[]).await.expect("readable").is_some()
        })
        .await;
        // Nothing that the application wants now is held by who waits for it.
        for table in &tables {
            let lock = format!("SET LOCAL lock_timeout = '200ms'; LOCK TABLE {table} IN ROW EXCLUSIVE MODE");
            source.batch_execute(&lock).await.unwrap_or_else(|error| panic!("{table}: {error:?}"));
        }
        source.batch_execute("COMMIT").await.expect("committed");
    };
    tokio::join!(cancel, application);
    world.assert_clean("shop").await;
    running.stop().await;
}

/// Nobody reads it in that time, and every hour of copying would be in vain.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_lost_while_tables_are_copied_ends_the_copy() {
    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("engine.after_schema=hang");
    create(&running, spec("gone", &["shop"])).await;
    let source = connect(&world.source, "shop").await;
    wait_for("the slot to rest", || async {
        let resting = "SELECT count(*) FROM pg_replication_slots WHERE NOT active AND confirmed_flush_lsn IS NOT NULL";
        source.query_one(resting, &[]).await.expect("count").get::<_, i64>(0) == 1
    })
    .await;
    source.batch_execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'").await.expect("set");
    source.batch_execute("SELECT pg_reload_conf()").await.expect("reloaded");
    wait_for("the end of the migration", || async {
        for sql in ["SELECT pg_logical_emit_message(true, 'bulk', 'x')", "SELECT pg_switch_wal()", "CHECKPOINT"] {
            source.batch_execute(sql).await.expect("written");
        }
        running.engine.show("gone").is_ok_and(|view| view.substate == "Failed")
    })
    .await;
    let error = running.engine.show("gone").expect("known").error.expect("a reason");
    assert_eq!(error.code, "slot_lost", "{error:?}");
    running.engine.cancel("gone").await.expect("cancelled");
    world.assert_clean("shop").await;
    running.stop().await;
}
