//! What the integration tests share: throw-away clusters, connections, the daemon as a process, waiting.
//!
//! Every wait polls a condition and has a deadline; nothing here sleeps for a fixed time and hopes.

#![expect(dead_code, reason = "each test binary uses its own part of this module")]

pub mod daemon;
pub mod link;
pub mod proxy;
pub mod shop;
pub mod stage;
pub mod stopped;
pub mod streamed;
pub mod world;

use std::future::Future;
use std::time::{Duration, Instant};

use pgcutover::config;
use pgcutover::demo::cluster::{Cluster, ClusterOptions, Installation, Installations};

/// For conditions that depend on servers and processes of a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What is installed; `make servers` sees to it that there is something.
pub fn installations() -> Installations {
    let found = Installations::find();
    assert!(found.pair().is_some(), "no complete PostgreSQL installation found: run `make servers`");
    found
}

/// A source and a target that trust everyone: the oldest and the newest major that fit together.
pub fn two_clusters() -> (Cluster, Cluster) {
    two_clusters_with(|options| options, |options| options)
}

/// The same, with the options changed before the start.
pub fn two_clusters_with(
    source: impl FnOnce(ClusterOptions) -> ClusterOptions,
    target: impl FnOnce(ClusterOptions) -> ClusterOptions,
) -> (Cluster, Cluster) {
    let found = installations();
    two_clusters_of(found.pair().expect("checked by installations()"), source, target)
}

/// The same of two chosen installations.
pub fn two_clusters_of(
    majors: (&Installation, &Installation),
    source: impl FnOnce(ClusterOptions) -> ClusterOptions,
    target: impl FnOnce(ClusterOptions) -> ClusterOptions,
) -> (Cluster, Cluster) {
    let source = source(cluster_options(majors.0, "source"));
    let target = target(cluster_options(majors.1, "target"));
    Cluster::start_two(source, target).unwrap_or_else(|error| panic!("{error}"))
}

/// One cluster of the newest complete installation.
pub fn one_cluster(name: &str) -> Cluster {
    let found = installations();
    let newest = found.newest_with_client_tools().expect("checked by installations()");
    Cluster::start(cluster_options(newest, name)).unwrap_or_else(|error| panic!("{error}"))
}

/// Options of a cluster that is not initialised anew for every test. Source and target are two systems.
pub fn cluster_options(installation: &Installation, name: &str) -> ClusterOptions {
    let system = if matches!(name, "source" | "target") { name } else { "alone" };
    let kept = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("clusters").join(system);
    ClusterOptions::new(installation, name).initialised_in(kept)
}

/// The cluster as a `[source]` or `[target]` section. A busy machine takes its time to log in.
pub fn server(cluster: &Cluster) -> config::Server {
    let mut server = config::Server::new(cluster.host(), cluster.port(), "postgres");
    server.password = cluster.password().map(config::Secret::new);
    server.connect_timeout = PATIENCE;
    server
}

/// A session of `postgres`, straight on the server. Its driver task ends with the client.
pub async fn connect(cluster: &Cluster, database: &str) -> tokio_postgres::Client {
    connect_with(&cluster.config(database)).await
}

/// A session with these parameters; panics with the server's message.
pub async fn connect_with(config: &tokio_postgres::Config) -> tokio_postgres::Client {
    try_connect(config).await.unwrap_or_else(|error| panic!("cannot connect: {error:?}"))
}

/// A session with these parameters.
pub async fn try_connect(config: &tokio_postgres::Config) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    // The task ends when the client is dropped; errors of the link show up at the client's next call.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

/// Sets the server's own `default_transaction_read_only`; returns when new sessions find it.
pub async fn configure_read_only(cluster: &Cluster, value: &str) {
    let admin = connect(cluster, "postgres").await;
    let statement = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
    admin.batch_execute(&statement).await.expect("a superuser may");
    admin.batch_execute("SELECT pg_reload_conf()").await.expect("a superuser may");
    wait_for("the configuration to be read again", || async {
        let session = connect(cluster, "postgres").await;
        let row = session.query_one("SHOW default_transaction_read_only", &[]).await.expect("readable");
        row.get::<_, String>(0) == value
    })
    .await;
}

/// Polls `condition` until it holds; panics with `what` after [`PATIENCE`].
pub async fn wait_for<F, Fut>(what: &str, condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    wait_for_within(PATIENCE, what, condition).await;
}

/// The same with another deadline.
pub async fn wait_for_within<F, Fut>(patience: Duration, what: &str, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let deadline = Instant::now() + patience;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited {patience:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
