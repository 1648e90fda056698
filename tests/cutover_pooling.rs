//! What pooled clients see of a whole cutover: time, and nothing else.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pgcutover::cutover::coordinator::CutoverOptions;
use pgcutover::cutover::report::CutoverOutcome;
use support::stage::Stage;
use support::{connect_with, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_on_few_connections_see_no_error() {
    let stage = Stage::set().await;
    let life = stage.life_with_pool("", 3).resolved().await;
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut tasks = Vec::new();
    for number in 0..12 {
        let client = connect_with(&life.client("worker")).await;
        client.batch_execute(&format!("SET app.number = '{number}'")).await.expect("settable");
        let select =
            client.prepare("SELECT current_setting('app.number'), count(*) FROM item").await.expect("prepared");
        let (stop, done) = (stop.clone(), done.clone());
        tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let row = client.query_one(&select, &[]).await?;
                assert_eq!(row.get::<_, String>(0), number.to_string());
                client.batch_execute("BEGIN; SELECT count(*) FROM item; COMMIT").await?;
                done.fetch_add(1, Ordering::SeqCst);
            }
            let port: i32 = client.query_one("SELECT inet_server_port()", &[]).await?.get(0);
            Ok::<_, tokio_postgres::Error>(port)
        }));
    }
    let listener = connect_with(&life.client("listener")).await;
    listener.batch_execute("LISTEN news; SET work_mem = '7MB'").await.expect("listens");
    for dry_run in [true, false] {
        let before = done.load(Ordering::SeqCst);
        wait_for("work", || async { done.load(Ordering::SeqCst) > before + 50 }).await;
        let report = life.cut_over_with(CutoverOptions { dry_run, ..life.options() }).await;
        let expected = if dry_run { CutoverOutcome::DryRun } else { CutoverOutcome::Switched };
        assert_eq!(report.outcome, expected, "{report:?}");
    }
    let before = done.load(Ordering::SeqCst);
    wait_for("work on the other server", || async {
        done.load(Ordering::SeqCst) > before + 50 || tasks.iter().any(tokio::task::JoinHandle::is_finished)
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    for task in tasks {
        assert_eq!(task.await.expect("no panic").expect("no error"), i32::from(stage.target.port()));
    }
    let kept: String = listener.query_one("SHOW work_mem", &[]).await.expect("answers").get(0);
    assert_eq!(kept, "7MB");
}
