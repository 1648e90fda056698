//! Writes on a server that a cutover has left, by somebody who gets past the fence: found, listed, reported and warned of,
//! by rows and times and never by values; what the stream back writes there is not taken for one, whatever crashes.

mod support;

use pgcutover::catalog::door::{Door, DoorError, Turns};
use pgcutover::catalog::{Place, bootstrap};
use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::compare;
use pgcutover::demo::shop::SHOP;
use pgcutover::postgres::{Connector, InstanceId};
use serde_json::Value;
use support::world::{COMPLETED, NAME, READY, World};
use support::{connect, one_cluster, server, shop, wait_for};

/// Server, cutover, table, kind and rows of everything that was found.
fn found(view: &Value) -> Vec<(String, u64, String, String, u64)> {
    let text = |one: &Value, key: &str| one[key].as_str().unwrap_or("?").to_owned();
    let number = |one: &Value, key: &str| one[key].as_u64().expect("a number");
    let writes = view["databases"][0]["fenced_writes"].as_array().cloned().unwrap_or_default();
    let of = |one: &Value| {
        let table = format!("{}.{}", text(one, "schema"), text(one, "table"));
        (text(one, "server"), number(one, "epoch"), table, text(one, "kind"), number(one, "changes"))
    };
    writes.iter().map(of).collect()
}

fn film(server: &str, epoch: u64, kind: &str, changes: u64) -> (String, u64, String, String, u64) {
    (server.to_owned(), epoch, "shop.film".to_owned(), kind.to_owned(), changes)
}

async fn wait_until_found(world: &World, expected: &[(String, u64, String, String, u64)]) {
    wait_for(&format!("{expected:?} to be found"), || async {
        let found = found(&world.view());
        let total = |list: &[(String, u64, String, String, u64)]| list.iter().map(|one| one.4).sum::<u64>();
        assert!(total(&found) <= total(expected), "{found:?}");
        found == expected
    })
    .await;
}

async fn wait_until_watched(world: &World, server: &str) {
    wait_for(&format!("the {server} to be watched"), || async {
        let watch = world.view()["databases"][0]["fence_watch"].clone();
        watch["server"] == server && watch["watched"] == true
    })
    .await;
}

async fn slots(cluster: &Cluster) -> i64 {
    let admin = connect(cluster, "postgres").await;
    admin.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.expect("readable").get(0)
}

/// There, back and there again under load, with a stranger on each server that was left, and a daemon that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_found_on_whichever_server_was_left_and_nobody_else_is() {
    let mut world = World::begin(0.01).await;
    let application = world.application(6);
    world.migrate().await;
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    wait_until_watched(&world, "source").await;
    world.wait_for_writes(&application, 100).await;
    assert_eq!(found(&world.view()), [], "the stream back is no stranger");

    shop::write_past_the_fence(&world.source).await;
    wait_until_found(&world, &[film("source", 1, "delete", 2), film("source", 1, "insert", 2)]).await;

    // What is written while nobody looks is found afterwards, and what was found is not found again.
    world.daemon.kill();
    shop::write_past_the_fence(&world.source).await;
    world.daemon.start_again();
    let on_source = [film("source", 1, "delete", 4), film("source", 1, "insert", 4)];
    wait_until_found(&world, &on_source).await;
    let view = world.view();
    let write = &view["databases"][0]["fenced_writes"][0];
    assert!(write["first_at"].as_f64() < write["last_at"].as_f64(), "{write}");
    assert!(!view.to_string().contains("never shown") && !world.daemon.log().contains("never shown"));
    assert!(world.daemon.log().contains("somebody writes on the fenced server"));

    // A rollback warns, and the server that it leaves is watched instead.
    world.wait_until(COMPLETED).await;
    let report = world.must_switch("rollback");
    assert!(report["notes"].to_string().contains("shop.film on the source"), "{report}");
    world.wait_until(READY).await;
    wait_until_watched(&world, "target").await;
    world.wait_for_writes(&application, 100).await;
    assert_eq!(found(&world.view()), on_source, "the application is no stranger on the server that it came back to");
    shop::write_past_the_fence(&world.target).await;
    let mut everywhere = on_source.to_vec();
    everywhere.extend([film("target", 2, "delete", 2), film("target", 2, "insert", 2)]);
    wait_until_found(&world, &everywhere).await;

    // There again, which brings the sequences over; `complete` lists what was found and leaves no slot.
    world.wait_for_writes(&application, 100).await;
    let outcomes = application.finish().await;
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    wait_until_watched(&world, "source").await;
    assert_eq!(found(&world.view()), everywhere);
    assert_eq!((slots(&world.source).await, slots(&world.target).await), (1, 1), "a watch, and a stream back");
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    assert_eq!(compare::differences(&source, &target).await.expect("both can be read"), Vec::<String>::new());
    drop((source, target));
    let report = world.daemon.json(&["migration", "complete", NAME]);
    let left = report["left"].as_array().expect("a list");
    assert_eq!(left.iter().filter(|one| one["kind"] == "fenced_write").count(), 4, "{report}");
    assert_eq!((slots(&world.source).await, slots(&world.target).await), (0, 0));
}

/// Killed where the watch keeps what it has found, and where it begins: everything is counted once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_it_counts_it_counts_once() {
    let mut world = World::begin(0.01).await;
    world.migrate().await;
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    wait_until_watched(&world, "source").await;
    let mut rows = 0;
    for name in ["watch.after_start", "watch.before_keep", "watch.after_keep"] {
        world.daemon.kill();
        shop::write_past_the_fence(&world.source).await;
        rows += 2;
        world.daemon.set_failpoints(&format!("{name}=hang"));
        world.daemon.start_again();
        let seen = format!("failpoint=\"{name}\"");
        wait_for(name, || async { world.daemon.log().contains(&seen) }).await;
        world.daemon.restart_with("");
        wait_until_found(&world, &[film("source", 1, "delete", rows), film("source", 1, "insert", rows)]).await;
    }
}

/// An aborted rollback leaves the watch where it was, also when the boundary had been written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_rollback_is_no_end_of_the_watch() {
    let mut world = World::begin(0.01).await;
    world.migrate().await;
    world.must_switch("cutover");
    world.wait_until(COMPLETED).await;
    world.daemon.restart_with("decide.before_decision=error");
    world.wait_until(COMPLETED).await;
    wait_until_watched(&world, "source").await;
    let aborted = world.daemon.command(&["migration", "rollback", NAME]);
    assert!(!aborted.status.success(), "a failpoint says so");
    world.wait_until(COMPLETED).await;
    wait_until_watched(&world, "source").await;
    shop::write_past_the_fence(&world.source).await;
    wait_until_found(&world, &[film("source", 1, "delete", 2), film("source", 1, "insert", 2)]).await;
    assert_eq!((slots(&world.source).await, slots(&world.target).await), (1, 1));
}

/// A soft fence does not hold whoever was there before, only our locks do. What waits for one of them is written behind
/// all that the stream has brought over, and nothing brings it over any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_waited_for_the_locks_of_a_cutover_writes_on_the_server_that_was_left_alone() {
    let mut world = World::begin_with(0.01, |options| options.section("control", "fence = \"soft\"")).await;
    world.migrate().await;
    // Time for the stranger to come before it is decided, and for a stream that goes on to bring its row over.
    world.daemon.restart_with("decide.before_boundary=sleep:5000ms;engine.after_state=sleep:1000ms");
    world.wait_until(READY).await;
    let (admin, stranger) = (connect(&world.source, "postgres").await, connect(&world.source, SHOP).await);
    let pid: i32 = stranger.query_one("SELECT pg_backend_pid()", &[]).await.expect("answers").get(0);

    let mut order = world.daemon.begin(&["migration", "cutover", NAME]);
    let locked = "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                                  WHERE d.datname = 'shop' AND l.locktype = 'relation'
                                    AND l.mode = 'ExclusiveLock' AND l.granted)";
    wait_for("the tables to be locked", || async {
        admin.query_one(locked, &[]).await.expect("readable").get::<_, bool>(0)
    })
    .await;
    let write = "INSERT INTO shop.film (id, title, rate, length, languages)
                 VALUES (900000001, 'never shown', 1, '1 hour', '{}')";
    let writing = tokio::spawn(async move { stranger.batch_execute(write).await });
    let waits = "SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' FROM pg_stat_activity WHERE pid = $1";
    wait_for("the stranger to wait", || async {
        admin.query_one(waits, &[&pid]).await.expect("connected").get::<_, bool>(0)
    })
    .await;
    assert!(order.wait().expect("it ends").success(), "{}", world.daemon.log());
    writing.await.expect("no panic").expect("nothing else is in its way");
    world.wait_until(COMPLETED).await;
    wait_until_found(&world, &[film("source", 1, "insert", 1)]).await;
    let target = connect(&world.target, SHOP).await;
    let brought = "SELECT count(*) FROM shop.film WHERE id > 900000000";
    assert_eq!(target.query_one(brought, &[]).await.expect("readable").get::<_, i64>(0), 0);
}

/// Work that goes through the door of a fenced database is ended at any moment by who completes or retries a migration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_called_away_on_the_doorstep_leaves_no_door_open() {
    let cluster = one_cluster("left");
    let admin = connect(&cluster, "postgres").await;
    let own = Connector::new(&server(&cluster), "source", &InstanceId::random()).expect("no certificates to read");
    bootstrap(&own.control("postgres", "test").await.expect("logs in"), Place::SourceControl)
        .await
        .expect("makes tables");
    admin.batch_execute("CREATE DATABASE shop ALLOW_CONNECTIONS false").await.expect("is created");
    let fence = "INSERT INTO pgcutover.fence (epoch, migration, databases, system_identifier, timeline, leads_to,
                                              leads_to_timeline, saved, outcome, hard)
                 VALUES (1, 'main', '{shop}', '1', 1, '2', 1, '[]', 'decided', true)";
    admin.batch_execute(fence).await.expect("is fenced");
    let admin = &admin;
    let open = async || {
        let found = admin.query_one("SELECT datallowconn FROM pg_database WHERE datname = 'shop'", &[]).await;
        found.expect("is listed").get::<_, bool>(0)
    };

    let door = Door::new(&own, "postgres", "shop", &Turns::default());
    let called_away = tokio_util::sync::CancellationToken::new();
    let caller = {
        let (door, called_away) = (door.clone(), called_away.clone());
        tokio::spawn(async move {
            tokio::select! {
                entered = door.through(std::future::pending::<Result<(), DoorError>>()) => entered.expect("never"),
                () = called_away.cancelled() => {}
            }
        })
    };
    wait_for("the door to be opened", open).await;
    called_away.cancel();
    caller.await.expect("has ended");
    wait_for("the door to be shut", async || !open().await).await;

    // And who comes next gets in all the same.
    let login = async { Ok::<_, DoorError>(own.control("shop", "test").await?) };
    door.through(login).await.expect("gets in");
    assert!(!open().await);
}
