//! What becomes of a pool's connections while nobody uses them.

use std::collections::BTreeSet;

use crate::pooling::{first_row, pooled_with};
use crate::rig::text;
use crate::support::{connect, one_cluster, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_their_server_has_ended_are_replaced_before_anybody_wants_them() {
    let cluster = one_cluster("ended");
    let rig = pooled_with(&cluster, 3, |config| config.pool.min_pool_size = 2);
    let direct = connect(&cluster, "postgres").await;
    let mut client = rig.wire("postgres").await;
    assert_eq!(first_row(&mut client, "SELECT 'in'").await, "in");
    let idle = || rig.sessions.idle_backends().iter().map(|one| one.pid).collect::<BTreeSet<i32>>();
    wait_for("the least number of connections", || async { idle().len() == 2 }).await;
    let before = idle();
    let pids = before.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let end = format!("SELECT count(pg_terminate_backend(pid)) FROM unnest(ARRAY[{pids}]) pid");
    assert_eq!(text(&direct, &end).await, "2");
    wait_for("others in their place", || async { idle().len() == 2 && idle().is_disjoint(&before) }).await;
    rig.stop().await;
}
