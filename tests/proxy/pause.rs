//! PAUSE and a cutover at the same time.

use std::time::{Duration, Instant};

use pgcutover::proxy::{MoveOrder, MoveOutcome, SessionState};
use pgcutover::switch::{CutoverUnderWay, Epoch, ServerRole};

use crate::rig::{Rig, server, text};
use crate::support::two_clusters;

#[tokio::test(flavor = "multi_thread")]
async fn a_cutover_that_begins_while_paused_leads_to_the_other_server_at_resume() {
    let (source, target) = two_clusters();
    let rig = Rig::start(server(&source), server(&target), |_| {});
    let database = rig.database();
    let client = rig.connect("postgres").await;
    client.batch_execute("SET app.tenant_id = '7'").await.expect("set");
    assert_eq!(database.pause(), Ok(true));
    let asked = tokio::spawn(async move {
        text(&client, "SELECT inet_server_port() || ' ' || current_setting('app.tenant_id')").await
    });
    rig.until(SessionState::Held).await;

    let order = MoveOrder { to: ServerRole::Target, epoch: Epoch(1) };
    let (databases, deadline) = (["postgres".to_owned()], Instant::now() + Duration::from_secs(60));
    let prepared = rig.sessions.prepare_moves(&databases, order, deadline).await;
    assert!(prepared.iter().all(|report| report.outcome == MoveOutcome::Ready), "{prepared:?}");
    database.fence();
    assert_eq!(database.pause(), Err(CutoverUnderWay));
    database.wait_empty().await;
    let settled = rig.sessions.settle_moves(&databases, deadline).await;
    assert!(settled.iter().all(|report| report.outcome == MoveOutcome::Ready), "{settled:?}");
    database.open(ServerRole::Target, Epoch(1));
    assert!(database.is_paused() && !asked.is_finished(), "the operator's word stands");
    assert_eq!(rig.sessions.list()[0].state, SessionState::Held);

    assert!(database.resume());
    assert_eq!(asked.await.expect("answered"), format!("{} 7", target.port()));
    rig.stop().await;
}
