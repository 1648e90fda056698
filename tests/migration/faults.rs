//! What goes wrong on the way: links that break in the middle of a row, fall silent or stall, servers that stand still, time-outs of
//! roles and walsenders, a full disk. Each is tried again by itself until the cause is gone, and nothing is lost.

use std::process::Command;
use std::time::Duration;

use pgcutover::demo::cluster::Cluster;
use pgcutover::migration::view::MigrationOption;

use crate::support::link::{Cut, Link};
use crate::support::{connect, connect_with, wait_for};
use crate::world::{Load, World, create, drain, reach, spec};

/// A database whose largest rows are larger than any buffer on the way.
async fn furnish(world: &World) {
    world.furnish("shop").await;
    let wide = "UPDATE orders SET note = (SELECT string_agg(md5(g::text || id), '') FROM generate_series(1, 20000) g)
                WHERE id % 500 = 0";
    connect(&world.source, "shop").await.batch_execute(wide).await.expect("written");
}

/// Rows of several hundred kilobytes, one transaction each.
async fn write_wide(client: &tokio_postgres::Client, rows: i32) {
    for n in 0..rows {
        let insert = format!(
            "INSERT INTO orders (customer, total, note)
             SELECT 1, {n}, string_agg(md5(g::text || {n}), '') FROM generate_series(1, 20000) g"
        );
        client.batch_execute(&insert).await.expect("written");
    }
}

/// Every attempt gets further than the one before, and none gets through a whole row at first.
#[tokio::test(flavor = "multi_thread")]
async fn links_that_break_in_the_middle_of_a_row() {
    let world = World::same_major();
    let (source, target) = (Link::to(world.source.address()).await, Link::to(world.target.address()).await);
    let world = world.with(|config| {
        config.source.port = source.address.port();
        config.target.port = target.address.port();
    });
    furnish(&world).await;
    let running = world.engine("");
    create(&running, spec("cut", &["shop"])).await;
    reach(&running, "cut", "MigratingData").await;
    // The copy is cut where the source sends, and where the target is sent to.
    source.cut_after_answers(400_000);
    let cut = |link: &Link, cuts: u64| {
        if let Ok(view) = running.engine.show("cut") {
            assert_ne!(view.substate, "Failed", "{:?}", view.error);
        }
        link.cuts() == cuts
    };
    wait_for("the first cut", || async { cut(&source, 1) }).await;
    target.cut_after_requests(700_000);
    wait_for("the second cut", || async { cut(&target, 1) }).await;
    reach(&running, "cut", "WaitingForCutoverTrigger").await;

    let direct = connect(&world.source, "shop").await;
    for round in 0..4_u64 {
        source.cut_after_answers(300_000 + 100_000 * round);
        target.cut_after_requests(500_000 + 50_000 * round);
        write_wide(&direct, 3).await;
        wait_for("both cuts", || async { cut(&source, round + 2) && cut(&target, round + 2) }).await;
    }
    drain(&running, "cut").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

/// What a server that is lost has not said is no reason to give up.
#[tokio::test(flavor = "multi_thread")]
async fn a_validation_that_is_interrupted_begins_again() {
    let world = World::same_major();
    let (source, target) = (Link::to(world.source.address()).await, Link::to(world.target.address()).await);
    let world = world.with(|config| {
        config.source.port = source.address.port();
        config.target.port = target.address.port();
    });
    // What rules alone ask.
    for (name, database, link, question) in [
        ("asks-source", "shop", &source, "pg_foreign_server"),
        ("asks-target", "other", &target, "pg_available_extensions"),
    ] {
        world.furnish(database).await;
        let running = world.engine("");
        let mut wanted = spec(name, &[database]);
        wanted.option = MigrationOption::Validate;
        let cuts = link.cuts();
        link.cut_once(Cut::Before(question));
        create(&running, wanted).await;
        wait_for("the cut", || async { link.cuts() > cuts }).await;
        let done = reach(&running, name, "Completed").await;
        assert_eq!(done.state, "Succeeded");
        running.stop().await;
    }
}

/// The walsender hears nothing and gives up; the engine hears nothing either, and finds out by the end of the silence.
#[tokio::test(flavor = "multi_thread")]
async fn a_walsender_that_gives_up_is_asked_again() {
    let world = World::same_major();
    let link = Link::to(world.source.address()).await;
    let world = world.with(|config| config.source.port = link.address.port());
    world.furnish("shop").await;
    let running = world.engine("");
    create(&running, spec("silent", &["shop"])).await;
    reach(&running, "silent", "WaitingForCutoverTrigger").await;
    let direct = connect(&world.source, "shop").await;
    let walsenders = async || {
        let sql = "SELECT pid FROM pg_stat_replication ORDER BY pid";
        let rows = direct.query(sql, &[]).await.expect("readable");
        rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>()
    };
    let first = walsenders().await;
    assert_eq!(first.len(), 1);
    // In force for the silence alone: a busy machine may be silent for as long.
    let patience = |time: &str| {
        world.source.configure(&[("wal_sender_timeout", time)]).expect("configured");
        world.source.reload();
    };
    patience("1s");
    link.stall(true);
    write_wide(&direct, 2).await;
    wait_for("the walsender to give up", || async { walsenders().await.is_empty() }).await;
    patience("60s");
    link.stall(false);
    wait_for("another walsender", || async { walsenders().await.iter().any(|pid| !first.contains(pid)) }).await;
    drain(&running, "silent").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

/// Nothing passes any more on the links that are there, and neither end is told; those that are opened later are well. Only
/// the servers know that their processes wait for us.
#[tokio::test(flavor = "multi_thread")]
async fn links_that_stall_for_ever_are_opened_anew() {
    let world = World::same_major();
    let (source, target) = (Link::to(world.source.address()).await, Link::to(world.target.address()).await);
    let world = world.with(|config| {
        config.source.port = source.address.port();
        config.target.port = target.address.port();
        config.source.stall_timeout = Duration::from_secs(1);
        config.target.stall_timeout = Duration::from_secs(1);
        // About ten seconds for the largest table.
        config.migration.copy_rate_bytes = Some(2_500_000);
    });
    furnish(&world).await;
    // Walsenders are asked for a sign of life the more often, the less of them this allows.
    world.source.configure(&[("wal_sender_timeout", "6s")]).expect("configured");
    world.source.reload();
    let running = world.engine("");
    create(&running, spec("stalled", &["shop"])).await;
    let copying = connect(&world.target, "postgres").await;
    for link in [&target, &source] {
        let copies = async || {
            let sql = "SELECT count(*) FROM pg_stat_progress_copy WHERE datname = 'shop' AND bytes_processed > 1000000";
            copying.query_one(sql, &[]).await.expect("readable").get::<_, i64>(0) > 0
        };
        wait_for("rows on their way", copies).await;
        link.stall_those_there();
    }
    reach(&running, "stalled", "WaitingForCutoverTrigger").await;

    // While changes stream.
    let load = Load::start(&world.source, "shop", 2).await;
    for link in [&target, &source] {
        load.writes(30).await;
        link.stall_those_there();
        load.writes(30).await;
        drain(&running, "stalled").await;
    }
    load.stop().await;
    drain(&running, "stalled").await;
    reach(&running, "stalled", "WaitingForCutoverTrigger").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

/// All processes of a server stand still: its sockets stay open, and nobody answers.
fn hold(cluster: &Cluster, signal: &str) {
    let postmaster = cluster.pid().expect("it runs").to_string();
    let children = Command::new("ps").args(["--ppid", &postmaster, "-o", "pid="]).output().expect("ps can be run");
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    for pid in children.split_whitespace().chain([postmaster.as_str()]) {
        // One may have ended since.
        let _ = Command::new("kill").args([signal, pid]).status();
    }
}

/// For longer than the source waits for a sign of life.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stands_still_is_waited_for() {
    let world = World::same_major();
    world.furnish("shop").await;
    world.source.configure(&[("wal_sender_timeout", "2s")]).expect("configured");
    world.source.reload();
    let running = world.engine("");
    create(&running, spec("still", &["shop"])).await;
    reach(&running, "still", "WaitingForCutoverTrigger").await;
    let load = Load::start(&world.source, "shop", 2).await;
    hold(&world.target, "-STOP");
    load.writes(100).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    load.writes(100).await;
    hold(&world.target, "-CONT");
    load.writes(50).await;
    load.stop().await;
    reach(&running, "still", "WaitingForCutoverTrigger").await;
    drain(&running, "still").await;
    world.assert_equal("shop").await;
    running.stop().await;
}

/// Settings of the login role that would end or refuse whatever is done here.
const HURRIED: [(&str, &str); 7] = [
    ("statement_timeout", "20ms"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "5ms"),
    ("idle_session_timeout", "200ms"),
    ("transaction_timeout", "300ms"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "serializable"),
];

#[tokio::test(flavor = "multi_thread")]
async fn time_outs_of_the_role_reach_nothing() {
    let world = World::same_major();
    furnish(&world).await;
    // Both are of one major, and know the same settings.
    let sql = "SELECT name FROM pg_settings WHERE name = ANY ($1)";
    let names: Vec<&str> = HURRIED.iter().map(|(name, _)| *name).collect();
    let known = connect(&world.source, "postgres").await.query(sql, &[&names]).await.expect("readable");
    let known: Vec<String> = known.iter().map(|row| row.get(0)).collect();
    for cluster in [&world.source, &world.target] {
        let admin = connect(cluster, "postgres").await;
        for (name, value) in HURRIED.iter().filter(|(name, _)| known.iter().any(|known| known == name)) {
            let alter = format!("ALTER ROLE postgres SET {name} = '{value}'");
            admin.batch_execute(&alter).await.expect("a superuser may");
        }
    }
    // The tests' own sessions, too, are the role's.
    let unbounded: String = known
        .iter()
        .filter(|name| name.ends_with("_timeout"))
        .map(|name| format!("-c {name}=0 "))
        .chain(["-c default_transaction_read_only=off".to_owned()])
        .collect();
    let mut login = world.source.config("shop");
    let direct = connect_with(login.options(&unbounded)).await;
    let running = world.engine("");
    create(&running, spec("hurried", &["shop"])).await;
    reach(&running, "hurried", "WaitingForCutoverTrigger").await;
    write_wide(&direct, 5).await;
    drain(&running, "hurried").await;
    let view = running.engine.show("hurried").expect("known");
    assert!(view.error.is_none() && view.databases[0].last_error.is_none(), "{view:?}");
    for cluster in [&world.source, &world.target] {
        let mut login = cluster.config("postgres");
        let admin = connect_with(login.options(&unbounded)).await;
        admin.batch_execute("ALTER ROLE postgres RESET ALL").await.expect("a superuser may");
    }
    world.assert_equal("shop").await;
    running.stop().await;
}

/// A file system of its own, as small as it is said to be.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// None where nothing may be mounted here.
    fn mount(owner_like: &std::path::Path, bytes: &str) -> Option<Self> {
        let place = owner_like.join("small-disk");
        std::fs::create_dir(&place).expect("a directory");
        let disk = Self(place);
        let mounted = disk.run("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]);
        if !mounted {
            eprintln!("skipped: nothing may be mounted here");
            return None;
        }
        let like = format!("--reference={}", owner_like.join("PG_VERSION").display());
        assert!(disk.run("chown", &[&like]) && disk.run("chmod", &["700"]));
        Some(disk)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> bool {
        let output = Command::new(program).args(arguments).arg(&self.0).output();
        output.is_ok_and(|output| output.status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.run("umount", &["-l"]);
    }
}

/// In the copy, and again in the stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_of_the_target_is_waited_for() {
    let world = World::same_major();
    let Some(disk) = SmallDisk::mount(&world.target.data_dir(), "12m") else { return };
    let place = tempfile::tempdir_in(world.source.data_dir()).expect("a directory");
    let like = format!("--reference={}", world.source.data_dir().join("PG_VERSION").display());
    assert!(Command::new("chown").args([&like]).arg(place.path()).status().expect("chown").success());
    for (cluster, path) in [(&world.source, place.path()), (&world.target, disk.0.as_path())] {
        let make = format!("CREATE TABLESPACE small LOCATION '{}'", path.display());
        connect(cluster, "postgres").await.batch_execute(&make).await.expect("a superuser may");
    }
    furnish(&world).await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute("ALTER TABLE orders SET TABLESPACE small").await.expect("moved");
    let running = world.engine("");
    create(&running, spec("full", &["shop"])).await;
    let complains = || async {
        let view = running.engine.show("full").expect("known");
        assert_ne!(view.substate, "Failed", "{:?}", view.error);
        let why = view.databases[0].last_error.clone().unwrap_or_default();
        why.contains("No space left on device") || why.contains("53100")
    };
    wait_for("the copy to find the disk full", complains).await;
    assert!(disk.run("mount", &["-o", "remount,size=80m"]));
    reach(&running, "full", "WaitingForCutoverTrigger").await;

    for _ in 0..20 {
        write_wide(&source, 10).await;
        if complains().await {
            break;
        }
    }
    wait_for("the stream to find the disk full", complains).await;
    assert!(disk.run("mount", &["-o", "remount,size=600m"]));
    drain(&running, "full").await;
    world.assert_equal("shop").await;
    running.stop().await;
    // It cannot be taken from a server that runs there.
    drop(world);
}

/// Everybody but the engine may make it; the engine may, too, once the target's setting says so.
const GATED: &str = "
    CREATE FUNCTION gate() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
        IF current_setting('application_name') LIKE 'pgcutover/%' AND current_setting('app.open', true) IS DISTINCT FROM 'yes'
        THEN RAISE lock_not_available USING MESSAGE = 'not at the moment'; END IF;
        RETURN 1;
    END $$;
    CREATE MATERIALIZED VIEW gated AS SELECT gate() AS one";

/// The last definitions are made at the end of a copy that has taken hours.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_does_not_take_at_the_moment_is_tried_again() {
    let world = World::same_major();
    world.furnish("shop").await;
    connect(&world.source, "shop").await.batch_execute(GATED).await.expect("made");
    let running = world.engine("");
    create(&running, spec("gated", &["shop"])).await;
    wait_for("the refusal", || async {
        let view = running.engine.show("gated").expect("known");
        assert_ne!(view.substate, "Failed", "{:?}", view.error);
        view.databases[0].last_error.as_ref().is_some_and(|error| error.contains("not at the moment"))
    })
    .await;
    let target = connect(&world.target, "shop").await;
    target.batch_execute("ALTER DATABASE shop SET app.open = 'yes'").await.expect("set");
    reach(&running, "gated", "WaitingForCutoverTrigger").await;
    assert_eq!(target.query_one("SELECT one FROM gated", &[]).await.expect("populated").get::<_, i32>(0), 1);
    world.assert_equal("shop").await;
    running.stop().await;
}
