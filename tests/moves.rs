//! Sessions that are moved by a proxy from one real server to another, and what they find there.

mod support;

use pgcutover::demo::cluster::Cluster;
use pgcutover::proxy::handoff::Blocker;
use pgcutover::proxy::{MoveOutcome, MoveReport};
use support::proxy::LoneProxy;
use support::{connect, connect_with, two_clusters};
use tokio_postgres::Client;

/// Two servers with the same (empty) application, and a proxy in front of them.
async fn start() -> (Cluster, Cluster, LoneProxy) {
    let (source, target) = two_clusters();
    for cluster in [&source, &target] {
        connect(cluster, "postgres").await.batch_execute("CREATE DATABASE app").await.expect("created");
    }
    let proxy = LoneProxy::start(&source, &target);
    (source, target, proxy)
}

async fn client(proxy: &LoneProxy) -> Client {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(proxy.port).user("postgres").dbname("app");
    connect_with(&config).await
}

async fn text(client: &Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn outcomes(reports: Vec<MoveReport>) -> Vec<MoveOutcome> {
    reports.into_iter().map(|report| report.outcome).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_blocked_at_first_moves_whole() {
    let (_source, target, mut proxy) = start().await;
    let client = client(&proxy).await;
    client.batch_execute("SET app.tenant = 'seven'; SET work_mem = '7MB'").await.expect("set");
    let kept = client.prepare("SELECT current_setting('app.tenant') || inet_server_port()").await.expect("prepared");
    client.batch_execute("CREATE TEMP TABLE mine (a int)").await.expect("created");
    let blocked = MoveOutcome::Blocked(vec![Blocker::TemporaryObjects { count: 1 }]);
    assert_eq!(outcomes(proxy.prepare("app").await), [blocked]);

    client.batch_execute("DROP TABLE mine").await.expect("dropped");
    assert_eq!(outcomes(proxy.switch("app").await), [MoveOutcome::Ready]);
    let found: String = client.query_one(&kept, &[]).await.expect("the statement is there").get(0);
    assert_eq!(found, format!("seven{}", target.port()));
    assert_eq!(text(&client, "SELECT current_setting('work_mem')").await, "7MB");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_between_preparation_and_pause_arrives_too() {
    let (source, target, mut proxy) = start().await;
    let client = client(&proxy).await;
    client.batch_execute("SET app.gone = 'x'; SET app.tenant = 'six'; LISTEN one").await.expect("set");
    let closed = client.prepare("SELECT 1").await.expect("prepared");
    assert_eq!(outcomes(proxy.prepare("app").await), [MoveOutcome::Ready]);
    client.batch_execute("RESET app.gone; SET app.tenant = 'seven'; UNLISTEN one; LISTEN two").await.expect("set");
    drop(closed);
    let fresh = client.prepare("SELECT current_setting('app.tenant')").await.expect("prepared");
    assert_eq!(outcomes(proxy.switch("app").await), [MoveOutcome::Ready]);

    assert_eq!(text(&client, "SELECT inet_server_port()::text").await, target.port().to_string());
    assert_eq!(client.query_one(&fresh, &[]).await.expect("there").get::<_, String>(0), "seven");
    assert_eq!(text(&client, "SELECT coalesce(current_setting('app.gone', true), '')").await, "");
    assert_eq!(text(&client, "SELECT string_agg(c, ',') FROM pg_listening_channels() c").await, "two");
    let left = "SELECT count(*)::text FROM pg_prepared_statements WHERE statement = 'SELECT 1'";
    assert_eq!(text(&client, left).await, "0");

    // And back, with what has been set up on the target.
    client.batch_execute("SET app.tenant = 'eight'").await.expect("set");
    proxy.move_all("app").await;
    assert_eq!(text(&client, "SELECT inet_server_port()::text").await, source.port().to_string());
    assert_eq!(client.query_one(&fresh, &[]).await.expect("there").get::<_, String>(0), "eight");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_comes_in_the_pause_or_after_the_preparation_moves_as_well() {
    let (_source, target, mut proxy) = start().await;
    let early = client(&proxy).await;
    assert_eq!(outcomes(proxy.prepare("app").await), [MoveOutcome::Ready]);
    let late = client(&proxy).await;
    late.batch_execute("SET app.tenant = 'late'; PREPARE p AS SELECT current_setting('app.tenant')")
        .await
        .expect("set");
    assert_eq!(outcomes(proxy.switch("app").await), [MoveOutcome::Ready, MoveOutcome::Ready]);
    for session in [&early, &late] {
        assert_eq!(text(session, "SELECT inet_server_port()::text").await, target.port().to_string());
    }
    assert_eq!(text(&late, "EXECUTE p").await, "late");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_are_heard_once_on_either_side_of_the_switch() {
    let (source, target, mut proxy) = start().await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(proxy.port).user("postgres").dbname("app");
    let (listener, mut connection) = config.connect(tokio_postgres::NoTls).await.expect("connects");
    let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let tokio_postgres::AsyncMessage::Notification(notification) = message {
                let _ = heard.send(notification.payload().to_owned());
            }
        }
    });
    listener.batch_execute("LISTEN news").await.expect("listens");
    let speaker = client(&proxy).await;
    speaker.batch_execute("NOTIFY news, 'before'").await.expect("said");
    assert_eq!(outcomes(proxy.prepare("app").await).len(), 2);
    speaker.batch_execute("NOTIFY news, 'prepared'").await.expect("said");
    // What the target's own triggers send while changes are applied there.
    connect(&target, "app").await.batch_execute("NOTIFY news, 'echo'").await.expect("said");
    assert_eq!(outcomes(proxy.switch("app").await), [MoveOutcome::Ready, MoveOutcome::Ready]);
    speaker.batch_execute("NOTIFY news, 'after'").await.expect("said");
    listener.batch_execute("SELECT 1").await.expect("answers");
    connect(&source, "app").await.batch_execute("NOTIFY news, 'late'").await.expect("said");
    connect(&target, "app").await.batch_execute("NOTIFY news, 'last'").await.expect("said");
    let mut all = Vec::new();
    while all.last().is_none_or(|last| last != "last") {
        let next = tokio::time::timeout(support::PATIENCE, hears.recv()).await.expect("in time");
        all.push(next.expect("the connection lives"));
    }
    assert_eq!(all, ["before", "prepared", "after", "last"]);
    drop(listener);
    proxy.stop().await;
}
