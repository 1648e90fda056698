//! Two servers with the same tables, a publication and a slot made by hand, and the stream between them in this process:
//! for tests of the stream and of what looks at it, without an engine.

use std::collections::HashMap;
use std::sync::Arc;

use pgcutover::catalog::migrations::Generation;
use pgcutover::catalog::{Place, bootstrap};
use pgcutover::demo::cluster::{Cluster, Installation};
use pgcutover::failpoint::Failpoints;
use pgcutover::migration::stream::{self, StreamContext, StreamError, StreamStatus};
use pgcutover::postgres::walsender::ReplicationConnection;
use pgcutover::postgres::{Connector, InstanceId};
use pgcutover::telemetry::metrics::Metrics;
use tokio::task::JoinHandle;

use super::{PATIENCE, connect, server, two_clusters_of};

/// See the module.
pub struct Streamed {
    pub source: Cluster,
    pub target: Cluster,
    pub context: StreamContext,
}

impl Streamed {
    /// Runs `sql` on both servers, in the database `shop`, and publishes `tables` of the source.
    pub async fn between(majors: (&Installation, &Installation), sql: &str, tables: &[&str]) -> Self {
        let (source, target) = two_clusters_of(majors, |options| options, |options| options);
        for cluster in [&source, &target] {
            connect(cluster, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("made");
            connect(cluster, "shop").await.batch_execute(sql).await.expect("tables");
        }
        let instance = InstanceId::random();
        let connector =
            |cluster: &Cluster, label| Connector::new(&server(cluster), label, &instance).expect("connector");
        let (from, to) = (connector(&source, "source"), connector(&target, "target"));
        bootstrap(&from.control("shop", "test").await.expect("source"), Place::SourceDatabase).await.expect("made");
        bootstrap(&to.control("shop", "test").await.expect("target"), Place::TargetDatabase).await.expect("made");
        let publish = format!("CREATE PUBLICATION p FOR TABLE {}, pgcutover.marker", tables.join(", "));
        connect(&source, "shop").await.batch_execute(&publish).await.expect("publication");
        let mut replication = ReplicationConnection::connect(&from, "shop").await.expect("walsender");
        let slot = replication.create_logical_slot("s", PATIENCE).await.expect("slot");
        replication.terminate().await.expect("ended");
        let context = StreamContext {
            source: from,
            target: to,
            database: "shop".to_owned(),
            migration: "m".to_owned(),
            generation: Generation(1),
            slot: "s".to_owned(),
            slot_start: slot.consistent_point,
            publication: "p".to_owned(),
            hand_overs: HashMap::new(),
            boundary: None,
            reserve: Arc::default(),
            door: None,
            queue_bytes: 1 << 20,
            metrics: Arc::new(Metrics::new().expect("metrics")),
            failpoints: Failpoints::none(),
        };
        Self { source, target, context }
    }

    /// Begins to stream.
    pub fn run(&self) -> (StreamStatus, JoinHandle<StreamError>) {
        let (status, context) = (StreamStatus::default(), self.context.clone());
        let shared = status.clone();
        (status, tokio::spawn(async move { stream::run(&context, &shared).await }))
    }
}
