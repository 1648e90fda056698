//! The cutover on two real clusters, with its surroundings scripted: no sessions, and an engine whose stream is instant.
//!
//! What sessions see is in `cutover_sessions.rs`; what only a whole daemon can show is in `crash.rs`.

#[path = "cutover/doubt.rs"]
mod doubt;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pgcutover::catalog::decision::Outcome;
use pgcutover::config::{FencePolicy, Stragglers};
use pgcutover::cutover::coordinator::{CutoverOptions, CutoverState};
use pgcutover::cutover::report::CutoverOutcome;
use pgcutover::switch::{Route, ServerRole};
use support::link::{Cut, Link};
use support::stage::{Life, NAME, Stage};
use support::{configure_read_only, connect, connect_with, try_connect, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_switches_and_leaves_the_old_server_fenced() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    assert!(life.runs_on(ServerRole::Source, 0), "{:?}", life.route());
    let shop = connect(&stage.source, "shop").await;
    shop.batch_execute("INSERT INTO item (name) SELECT 'x' FROM generate_series(1, 5)").await.expect("writable");
    drop(shop);

    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert!(life.runs_on(ServerRole::Target, 1), "{:?}", life.route());
    assert_eq!(stage.rows().await, (vec![Some("decided".to_owned())], vec!["decided".to_owned()]));
    assert_eq!(*life.engine.finished.lock().expect("not poisoned"), [Outcome::Decided]);

    let target = connect(&stage.target, "shop").await;
    let sequences = target
        .query_one(
            "SELECT nextval('item_id_seq'), nextval('never_called'), (SELECT count(*) FROM pgcutover.boundary)",
            &[],
        )
        .await
        .expect("sequences can be read");
    assert_eq!((sequences.get::<_, i64>(0), sequences.get::<_, i64>(1), sequences.get::<_, i64>(2)), (6, 7, 1));
    let Err(refused) = try_connect(&stage.source.config("shop")).await else { panic!("the old server is shut") };
    assert_eq!(refused.code().map(|code| code.code()), Some("55000"));

    // A second start finds the same, and the same order again is refused with a reason.
    let next = stage.life("").resolved().await;
    assert!(next.runs_on(ServerRole::Target, 1), "{:?}", next.route());
    let again = next.cut_over().await;
    assert_eq!(again.outcome, CutoverOutcome::Aborted);
    assert!(again.reason.contains("runs on the target already"), "{}", again.reason);
}

/// Whoever writes, in whichever database of the server, is given a transaction id: with others at it, the marker that was
/// written before the last look proves nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_marker_with_writers_beside_it_is_written_again() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    let elsewhere = connect(&stage.source, "postgres").await;
    elsewhere.batch_execute("BEGIN; CREATE TABLE being_written ()").await.expect("written");
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    let steps: Vec<&str> = report.pause_steps.iter().map(|one| one.step).collect();
    assert!(steps.contains(&"marker is written, with nobody left"), "{steps:?}");
    elsewhere.batch_execute("ROLLBACK").await.expect("another database is none of a cutover's business");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_restores_every_setting_exactly() {
    let stage = Stage::set().await;
    let admin = connect(&stage.source, "postgres").await;
    admin
        .batch_execute(
            "CREATE ROLE writer; CREATE ROLE reader; CREATE ROLE \"odd 'name'\";
             ALTER DATABASE shop SET default_transaction_read_only = 'off';
             ALTER DATABASE shop SET work_mem = '5MB';
             ALTER DATABASE shop CONNECTION LIMIT 77;
             ALTER ROLE writer SET default_transaction_read_only = off;
             ALTER ROLE reader SET default_transaction_read_only = on;
             ALTER ROLE \"odd 'name'\" IN DATABASE shop SET default_transaction_read_only = 'no';
             ALTER ROLE \"odd 'name'\" IN DATABASE shop SET work_mem = '6MB';",
        )
        .await
        .expect("a superuser may");
    let before = stage.settings().await;
    for failpoint in [
        "prepare.before_fence",
        "prepare.after_fence",
        "pause.after_gate",
        "pause.after_hard_fence",
        "drain.after_sessions",
        "drain.after_marker",
        "drain.after_applied",
        "decide.before_boundary",
        "decide.before_decision",
    ] {
        let life = stage.life(&format!("{failpoint}=error")).resolved().await;
        let report = life.cut_over().await;
        assert_eq!(report.outcome, CutoverOutcome::Aborted, "{failpoint}");
        assert_eq!(report.reason, format!("failpoint {failpoint}"));
        assert_eq!(stage.settings().await, before, "{failpoint}");
        assert!(life.runs_on(ServerRole::Source, 0), "{failpoint}: {:?}", life.route());
        assert!(life.switchboard.database("shop").prepare_window().is_none());
        assert_eq!(*life.engine.finished.lock().expect("not poisoned"), [Outcome::Aborted], "{failpoint}");
        life.stop().await;
    }
    let (fences, decisions) = stage.rows().await;
    assert_eq!(fences, vec![Some("aborted".to_owned()); 8], "one fence for each attempt that came to it");
    assert_eq!(decisions, vec!["aborted".to_owned(); 8]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn during_the_fence_roles_with_their_own_setting_are_read_only_too() {
    let stage = Stage::set().await;
    let admin = connect(&stage.source, "postgres").await;
    admin
        .batch_execute(
            "CREATE ROLE writer LOGIN; ALTER ROLE writer SET default_transaction_read_only = off;
             CREATE ROLE reader LOGIN; ALTER ROLE reader SET default_transaction_read_only = on",
        )
        .await
        .expect("a superuser may");
    let life = stage.life("prepare.after_fence=hold;pause.after_gate=error").resolved().await;
    let database = life.switchboard.database("shop");
    let running = life.cut_over_up_to("prepare.after_fence", life.options()).await;
    let opened = database.prepare_window().expect("opened before the fence commits");
    let (server, window) = &*opened;
    assert_eq!(*server, ServerRole::Source);
    assert_eq!((window.earlier_read_only_of("postgres"), window.earlier_read_only_of("reader")), ("off", "on"));
    for role in ["postgres", "writer"] {
        let mut config = stage.source.config("shop");
        config.user(role);
        let stranger = connect_with(&config).await;
        let shown = stranger.query_one("SHOW default_transaction_read_only", &[]).await.expect("shown");
        assert_eq!(shown.get::<_, &str>(0), "on", "{role}");
    }
    life.failpoints.release("prepare.after_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_that_bypass_the_proxy_are_ended_and_kept_out() {
    let stage = Stage::set().await;
    let life = stage.life("drain.after_applied=hold").resolved().await;
    // Each says BEGIN READ WRITE in a session that was there before, and comes back in a loop.
    #[derive(Default)]
    struct Writer {
        stop: AtomicBool,
        acknowledged: AtomicU64,
        refused: AtomicU64,
    }
    // One is a role that calls itself what our sessions are called: everybody can read that.
    let owner = connect(&stage.source, "shop").await;
    let role = "CREATE ROLE mimic LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO mimic;
                GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO mimic";
    owner.batch_execute(role).await.expect("made");
    let ours = life.source.instance().application_name("mimic");
    drop(owner);
    let (mut tasks, mut writers) = (Vec::new(), Vec::new());
    for number in 0..3 {
        let (mut config, writer) = (stage.source.config("shop"), Arc::new(Writer::default()));
        if number == 0 {
            config.user("mimic").application_name(&*ours);
        }
        writers.push(writer.clone());
        tasks.push(tokio::spawn(async move {
            while !writer.stop.load(Ordering::SeqCst) {
                if let Ok(client) = try_connect(&config).await {
                    let script = "BEGIN READ WRITE; INSERT INTO item (name) VALUES ('bypass'); COMMIT";
                    while client.batch_execute(script).await.is_ok() {
                        writer.acknowledged.fetch_add(1, Ordering::SeqCst);
                    }
                } else {
                    writer.refused.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }));
    }
    let counted = |count: fn(&Writer) -> &AtomicU64| -> Vec<u64> {
        writers.iter().map(|writer| count(writer).load(Ordering::SeqCst)).collect()
    };
    wait_for("the writers to write", || async { counted(|writer| &writer.acknowledged).iter().all(|done| *done > 0) })
        .await;
    let refused_again = async || {
        let before = counted(|writer| &writer.refused);
        wait_for("the writers to be kept out", || async {
            counted(|writer| &writer.refused).iter().zip(&before).all(|(now, before)| *now >= before + 20)
        })
        .await;
    };
    let running = life.cut_over_up_to("drain.after_applied", life.options()).await;
    refused_again().await;
    life.failpoints.release("drain.after_applied");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert!(report.sessions_ended >= 3, "{report:?}");
    refused_again().await;
    for writer in &writers {
        writer.stop.store(true, Ordering::SeqCst);
    }
    for task in tasks {
        task.await.expect("no panic");
    }
    // The sequence was read after the last of them: the next number on the target is above every row of the source.
    let next = connect(&stage.target, "shop").await;
    let next: i64 = next.query_one("SELECT nextval('item_id_seq')", &[]).await.expect("readable").get(0);
    let admin = connect(&stage.source, "postgres").await;
    admin.batch_execute("ALTER DATABASE shop ALLOW_CONNECTIONS true").await.expect("an operator lifts it so");
    let left = connect(&stage.source, "shop").await;
    let left: i64 = left.query_one("SELECT coalesce(max(id), 0) FROM item", &[]).await.expect("readable").get(0);
    assert!(next > left, "a write after the sequences were read: {left} on the source, next {next} on the target");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_transaction_aborts_the_cutover_and_is_named() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    let mut config = stage.source.config("shop");
    config.application_name("nightly-report");
    let reporter = connect_with(&config).await;
    let pid: i32 = reporter.query_one("SELECT pg_backend_pid()", &[]).await.expect("answers").get(0);
    reporter.batch_execute("BEGIN; INSERT INTO item (name) VALUES ('slow')").await.expect("writable");
    let before = stage.settings().await;
    let options = CutoverOptions {
        // The soft fence leaves strangers alone, so the drain has to wait for this one.
        fence: FencePolicy::Soft,
        drain_timeout: Duration::from_millis(300),
        stragglers: Stragglers::Abort,
        ..life.options()
    };
    let report = life.cut_over_with(options).await;
    assert_eq!(report.outcome, CutoverOutcome::Aborted);
    assert!(report.reason.contains("drain_timeout"), "{}", report.reason);
    assert!(report.reason.contains(&format!("pid {pid} (\"nightly-report\")")), "{}", report.reason);
    assert_eq!(report.blockers.len(), 1);
    assert_eq!(stage.settings().await, before);
    assert!(life.runs_on(ServerRole::Source, 0));
    reporter.batch_execute("COMMIT").await.expect("carries on");

    // The other policy ends it.
    reporter.batch_execute("BEGIN; INSERT INTO item (name) VALUES ('slow')").await.expect("writable");
    let report = life.cut_over_with(CutoverOptions { stragglers: Stragglers::Terminate, ..options }).await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert_eq!(report.sessions_ended, 1);
    assert!(reporter.batch_execute("COMMIT").await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_leaves_strangers_and_settings_alone() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    let stranger = connect(&stage.source, "shop").await;
    stranger.batch_execute("BEGIN; INSERT INTO item (name) VALUES ('x')").await.expect("writable");
    let before = stage.settings().await;
    let report = life.cut_over_with(CutoverOptions { dry_run: true, ..life.options() }).await;
    assert_eq!(report.outcome, CutoverOutcome::DryRun, "{report:?}");
    assert!(report.is_success());
    assert_eq!(stage.settings().await, before);
    assert_eq!(stage.rows().await, (Vec::new(), Vec::new()));
    stranger.batch_execute("COMMIT").await.expect("not ended");
    assert!(life.runs_on(ServerRole::Source, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_whose_answer_is_lost_counts_as_what_the_server_says() {
    let stage = Stage::set().await;
    // Two parameters of the insert, one behind the other with its length.
    let decision = "decided\0\0\0\u{4}move";
    for (cut, decided) in [(Cut::Before(decision), false), (Cut::After(decision), true)] {
        let link = Link::to(stage.target.address()).await;
        let life = stage.life_through("", &link).resolved().await;
        let before = stage.settings().await;
        link.cut_once(cut.clone());
        let report = life.cut_over().await;
        assert_eq!(link.cuts(), 1, "the test must hit the decision");
        let (fences, decisions) = stage.rows().await;
        if decided {
            assert_eq!(report.outcome, CutoverOutcome::Switched, "{cut:?}: {report:?}");
            assert!(life.runs_on(ServerRole::Target, 1), "{:?}", life.route());
            assert_eq!((fences, decisions), (vec![Some("decided".to_owned())], vec!["decided".to_owned()]));
        } else {
            assert_eq!(report.outcome, CutoverOutcome::Aborted, "{cut:?}: {report:?}");
            assert!(life.runs_on(ServerRole::Source, 0), "{:?}", life.route());
            assert_eq!((fences, decisions), (vec![Some("aborted".to_owned())], vec!["aborted".to_owned()]));
            assert_eq!(stage.settings().await, before);
        }
        life.stop().await;
        drop(life);
        stage.reset().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_coordinators_that_meet_an_undecided_cutover_read_the_same() {
    let stage = Stage::set().await;
    leave_behind_at(&stage, "drain.after_applied=hang", "drain.after_applied").await;
    assert_eq!(stage.rows().await, (vec![None], Vec::new()), "the first coordinator left it undecided");
    let lives = [stage.life(""), stage.life("")];
    let settle = |life: &Life| {
        let coordinator = life.coordinator.clone();
        tokio::spawn(async move { coordinator.resolve_at_startup().await })
    };
    for settling in [settle(&lives[0]), settle(&lives[1])] {
        settling.await.expect("no panic");
    }
    for life in &lives {
        wait_for("a verdict", || async { life.runs_on(ServerRole::Source, 0) }).await;
    }
    assert_eq!(stage.rows().await, (vec![Some("aborted".to_owned())], vec!["aborted".to_owned()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_decision_loses_against_the_abort_of_another_coordinator() {
    let stage = Stage::set().await;
    let slow = stage.life("decide.before_decision=hold").resolved().await;
    let running = slow.cut_over_up_to("decide.before_decision", slow.options()).await;
    // The other one sees a live coordinator and waits; then somebody aborts all the same.
    let other = stage.life("").resolved().await;
    assert!(matches!(other.route(), Route::Unknown { .. }), "{:?}", other.route());
    stage.somebody_writes("aborted").await;
    slow.failpoints.release("decide.before_decision");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    assert!(slow.runs_on(ServerRole::Source, 0));
    wait_for("the other one to learn of it", || async { other.runs_on(ServerRole::Source, 0) }).await;
    assert_eq!(stage.rows().await, (vec![Some("aborted".to_owned())], vec!["aborted".to_owned()]));
}

/// What it would save as the settings from before are those of the fence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_is_not_begun_over_a_fence_that_is_still_to_be_lifted() {
    let stage = Stage::set().await;
    let before = stage.settings().await;
    leave_behind_at(&stage, "drain.after_applied=error;abort.after_decision=hang", "abort.after_decision").await;
    assert_eq!(stage.rows().await, (vec![None], vec!["aborted".to_owned()]));
    let hasty = stage.life("");
    wait_for("the refusal", || async {
        let report = hasty.cut_over().await;
        report.outcome == CutoverOutcome::Aborted && report.reason.contains("fence of cutover 1 has not been lifted")
    })
    .await;
    let life = stage.life("").resolved().await;
    assert_eq!(stage.settings().await, before);
    assert_eq!(life.cut_over().await.outcome, CutoverOutcome::Switched);
}

/// The first coordinator sleeps, as a stopped process does, and its session on the target is lost meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_wakes_up_after_its_cutover_was_aborted_shuts_nobody_out() {
    let stage = Stage::set().await;
    let slow = stage.life("prepare.after_fence=hold").resolved().await;
    let running = slow.cut_over_up_to("prepare.after_fence", slow.options()).await;
    let lost = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2
                AND classid <> 0 AND pid <> pg_backend_pid()";
    connect(&stage.target, "postgres").await.batch_execute(lost).await.expect("ended");
    let other = stage.life("").resolved().await;
    wait_for("the other one to settle it", || async { other.runs_on(ServerRole::Source, 0) }).await;
    let client = connect(&stage.source, "shop").await;
    slow.failpoints.release("prepare.after_fence");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Aborted, "{report:?}");
    client.batch_execute("INSERT INTO item (name) VALUES ('after')").await.expect("the session was left alone");
    connect(&stage.source, "shop")
        .await
        .batch_execute("INSERT INTO item (name) VALUES ('new')")
        .await
        .expect("writable");
    assert!(slow.runs_on(ServerRole::Source, 0));
    assert_eq!(stage.rows().await, (vec![Some("aborted".to_owned())], vec!["aborted".to_owned()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_failpoint_ends_on_exactly_one_side() {
    let stage = Stage::set().await;
    for failpoint in pgcutover::cutover::steps::ALL_FAILPOINTS {
        let before = stage.settings().await;
        // Failpoints of an abort are reached by failing just before the decision.
        let failpoints = match failpoint.strip_prefix("abort.") {
            Some(_) => format!("decide.before_decision=error;{failpoint}=hang"),
            None => format!("{failpoint}=hang"),
        };
        leave_behind_at(&stage, &failpoints, failpoint).await;
        let next = stage.life("").resolved().await;
        wait_for("a verdict", || async { !matches!(next.route(), Route::Unknown { .. }) }).await;
        let (fences, decisions) = stage.rows().await;
        if decisions == ["decided"] {
            assert!(next.runs_on(ServerRole::Target, 1), "{failpoint}: {:?}", next.route());
            assert_eq!(fences, [Some("decided".to_owned())], "{failpoint}");
            assert!(try_connect(&stage.source.config("shop")).await.is_err(), "{failpoint}");
        } else {
            assert!(next.runs_on(ServerRole::Source, 0), "{failpoint}: {:?}", next.route());
            assert!(fences.iter().all(|outcome| outcome.as_deref() == Some("aborted")), "{failpoint}: {fences:?}");
            assert_eq!(stage.settings().await, before, "{failpoint}");
        }
        let past_the_decision = failpoint.starts_with("switch.") || *failpoint == "decide.after_decision";
        assert_eq!(decisions == ["decided"], past_the_decision, "{failpoint}: {decisions:?}");
        next.stop().await;
        stage.reset().await;
    }
}

/// Runs a cutover until it hangs at a failpoint and lets its whole process vanish, connections and all.
async fn leave_behind_at(stage: &Stage, failpoints: &str, hangs_at: &str) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let life = stage.life(failpoints);
    let cutover = runtime.spawn({
        let (coordinator, options) = (life.coordinator.clone(), life.options());
        async move {
            coordinator.resolve_at_startup().await;
            coordinator.run(NAME, options).await
        }
    });
    wait_for("the cutover to hang", || async {
        assert!(!cutover.is_finished(), "{hangs_at} was not reached");
        life.failpoints.is_held(hangs_at)
    })
    .await;
    cutover.abort();
    runtime.shutdown_background();
}

/// A begin whose answer was lost, or another process, has left a migration that its engine takes for being cut over.
#[tokio::test]
async fn an_engine_that_takes_a_cutover_for_open_is_told_what_became_of_it() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    let target = connect(&stage.target, "postgres").await;
    target
        .batch_execute(
            "INSERT INTO pgcutover.migration (name, definition, state, generation)
                  VALUES ('move', '{}', 'CompletingMigration', 1);
             INSERT INTO pgcutover.migration_database (migration, database, step, slot, publication)
                  VALUES ('move', 'shop', 'Streaming', 's', 'p')",
        )
        .await
        .expect("written");
    life.engine.changes.send_modify(|changes| *changes += 1);
    wait_for("the engine to be told", || async { !life.engine.settled.lock().expect("not poisoned").is_empty() }).await;
    assert_eq!(*life.engine.settled.lock().expect("not poisoned"), [Outcome::Aborted]);
    life.stop().await;
    // After a restart nobody waits for what it puts away.
    let life = stage.life("");
    life.engine.is_settling.store(true, Ordering::SeqCst);
    let life = life.resolved().await;
    assert!(life.runs_on(ServerRole::Source, 0));
    life.engine.is_settling.store(false, Ordering::SeqCst);
    wait_for("the engine to be told", || async { !life.engine.settled.lock().expect("not poisoned").is_empty() }).await;
    life.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn force_goes_past_what_cannot_lose_data_and_past_nothing_else() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    let forced = CutoverOptions { force: true, ..life.options() };
    let behind = |bytes| *life.engine.lag_bytes.lock().expect("not poisoned") = bytes;
    let refused = async |options: CutoverOptions, said: &str, forceable: bool| {
        let report = life.cut_over_with(options).await;
        assert_eq!((report.outcome, report.forceable), (CutoverOutcome::Aborted, forceable), "{report:?}");
        assert!(report.reason.contains(said), "{report:?}");
        let hint = report.hint.expect("a guardrail says what may be done");
        assert!(
            hint.contains(if forceable { "so --force goes past it" } else { "--force does not go past it" }),
            "{hint}"
        );
        assert!(life.runs_on(ServerRole::Source, 0));
        report.forced
    };
    // A target that would not take writes, which is found after the lag.
    behind(Some(1 << 40));
    let target = connect(&stage.target, "postgres").await;
    target.batch_execute("ALTER DATABASE shop SET default_transaction_read_only = on").await.expect("a superuser may");
    let passed = refused(forced, "read-only by default", false).await;
    assert!(passed.len() == 1 && passed[0].contains("max_lag_at_start"), "{passed:?}");
    behind(Some(0));
    refused(life.options(), "read-only by default", false).await;
    target.batch_execute("ALTER DATABASE shop RESET default_transaction_read_only").await.expect("a superuser may");
    // This session goes on to write when the server's default changes.
    target.batch_execute("SET default_transaction_read_only = off").await.expect("anybody may");
    configure_read_only(&stage.target, "on").await;
    refused(CutoverOptions { dry_run: true, ..forced }, "its configuration has", false).await;
    refused(forced, "its configuration has", false).await;
    // A database that says otherwise takes writes all the same.
    target.batch_execute("ALTER DATABASE shop SET default_transaction_read_only = off").await.expect("a superuser may");
    let rehearsed = life.cut_over_with(CutoverOptions { dry_run: true, ..forced }).await;
    assert_eq!(rehearsed.outcome, CutoverOutcome::DryRun, "{rehearsed:?}");
    target.batch_execute("ALTER DATABASE shop RESET default_transaction_read_only").await.expect("a superuser may");
    configure_read_only(&stage.target, "off").await;

    behind(Some(1 << 40));
    assert_eq!(refused(life.options(), "max_lag_at_start", true).await, [""; 0]);
    let report = life.cut_over_with(forced).await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert!(report.forced.len() == 1 && report.forced[0].contains("max_lag_at_start"), "{report:?}");
}

/// An order that waits is shown as running, and what it waited for does not bring it about after it was stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_that_waits_to_begin_can_be_stopped() {
    let stage = Stage::set().await;
    let life = stage.life("").resolved().await;
    life.engine.is_waiting.store(true, Ordering::SeqCst);
    let (coordinator, options) = (life.coordinator.clone(), life.options());
    let waiting = tokio::spawn(async move { coordinator.run(NAME, options).await });
    wait_for("the order", || async { matches!(life.coordinator.progress(NAME), Some(CutoverState::Running(_))) }).await;
    assert!(life.coordinator.cancel(NAME));
    let stopped = waiting.await.expect("no panic").expect_err("it was not begun");
    assert!(stopped.to_string().contains("cancelled"), "{stopped}");
    assert_eq!(life.coordinator.progress(NAME), None);
    life.engine.is_waiting.store(false, Ordering::SeqCst);
    let report = life.cut_over().await;
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
}

/// Rollback and the stream back depend on that note; the switch does not wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_lost_between_switch_and_note_is_told_later() {
    let stage = Stage::set().await;
    let life = stage.life("switch.after_open=hold").resolved().await;
    let running = life.cut_over_up_to("switch.after_open", life.options()).await;
    let lost = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                 WHERE datname = 'postgres' AND application_name LIKE 'pgcutover/%' AND pid <> pg_backend_pid()";
    connect(&stage.source, "postgres").await.batch_execute(lost).await.expect("ended");
    life.failpoints.release("switch.after_open");
    let report = running.await.expect("no panic");
    assert_eq!(report.outcome, CutoverOutcome::Switched, "{report:?}");
    assert!(report.notes.iter().any(|note| note.contains("could not be told")), "{report:?}");
    wait_for("the note", || async { stage.rows().await.0 == [Some("decided".to_owned())] }).await;
    assert!(life.runs_on(ServerRole::Target, 1), "{:?}", life.route());
    life.stop().await;
}
