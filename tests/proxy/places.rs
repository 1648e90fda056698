//! Two servers that say which of them they are, and what tests of moves between them share.

use std::time::Instant;

use pgcutover::demo::cluster::{Cluster, ClusterOptions};
use pgcutover::proxy::MoveOrder;
use pgcutover::switch::{Epoch, ServerRole};

use crate::support::{PATIENCE, connect, two_clusters_with};

pub const POSTGRES: &str = "postgres";
pub const WHERE_AM_I: &str = "SELECT name FROM place";
pub const TO_TARGET: MoveOrder = MoveOrder { to: ServerRole::Target, epoch: Epoch(1) };

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

pub fn databases() -> Vec<String> {
    vec![POSTGRES.to_owned()]
}

/// The target reports another time zone: values that servers report differ, whatever their majors are.
pub async fn two_places() -> (Cluster, Cluster) {
    let abroad = |options: ClusterOptions| options.setting("timezone", "Asia/Tokyo");
    let (source, target) = two_clusters_with(|options| options, abroad);
    for (cluster, place) in [(&source, "source"), (&target, "target")] {
        let made = format!("CREATE TABLE place(name text); INSERT INTO place VALUES ('{place}')");
        connect(cluster, POSTGRES).await.batch_execute(&made).await.expect("made");
    }
    (source, target)
}
