//! Writes that are slowed down while a cutover waits for the other server. Who is held back stays so until it is let go:
//! the delays here are longer than any test.

use std::time::Duration;

use pgcutover::config::PoolMode;
use tokio_postgres::Client;

use crate::rig::{Rig, server, text};
use crate::support::{connect, one_cluster, wait_for};
use crate::wire_client::{query, tags};

const FOR_EVER: Duration = Duration::from_secs(3600);

async fn wait_for_rows(direct: &Client, rows: &str) {
    wait_for("the write to be there", || async { text(direct, "SELECT count(*) FROM slow").await == rows }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_answered_later_and_a_read_is_not() {
    let cluster = one_cluster("slowed");
    let direct = connect(&cluster, "postgres").await;
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let rig = Rig::start(server(&cluster), server(&cluster), |config| config.pool.mode = mode);
        direct.batch_execute("DROP TABLE IF EXISTS slow; CREATE TABLE slow(n int)").await.expect("created");
        let database = rig.database();
        let (writer, copier, reader) =
            (rig.connect("postgres").await, rig.connect("postgres").await, rig.connect("postgres").await);
        database.set_write_delay(FOR_EVER);

        let writing = tokio::spawn(async move {
            writer.execute("INSERT INTO slow VALUES ($1)", &[&1]).await.map(|rows| (rows, writer))
        });
        wait_for_rows(&direct, "1").await;
        let copying = tokio::spawn(async move {
            let mut sink = Box::pin(copier.copy_in("COPY slow FROM STDIN").await?);
            futures_util::SinkExt::send(&mut sink, bytes::Bytes::from_static(b"2\n")).await?;
            sink.as_mut().finish().await
        });
        wait_for_rows(&direct, "2").await;
        for _ in 0..5 {
            assert_eq!(text(&reader, "SELECT count(*) FROM slow").await, "2");
            reader.query_one("SELECT $1::int", &[&1]).await.expect("prepared reads");
            reader.batch_execute("BEGIN; SELECT 1; COMMIT").await.expect("transactions that read");
            let rows = reader.copy_out("COPY slow TO STDOUT").await.expect("copied out");
            assert_eq!(futures_util::StreamExt::count(Box::pin(rows)).await, 2);
            reader.execute("UPDATE slow SET n = 3 WHERE n = $1", &[&7]).await.expect("what finds nothing");
        }
        // They wait for their answers and for nothing else: a pause has nobody to wait for.
        database.fence();
        database.wait_empty().await;
        database.reopen();
        assert!(!writing.is_finished() && !copying.is_finished(), "{mode:?}");

        database.set_write_delay(Duration::ZERO);
        let (rows, writer) = writing.await.expect("no panic").expect("acknowledged");
        assert_eq!(rows, 1);
        assert_eq!(copying.await.expect("no panic").expect("acknowledged"), 1);
        writer.execute("INSERT INTO slow VALUES ($1)", &[&3]).await.expect("acknowledged");
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_goodbye_behind_a_write_is_answered_first() {
    let cluster = one_cluster("slowed_bye");
    let direct = connect(&cluster, "postgres").await;
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let rig = Rig::start(server(&cluster), server(&cluster), |config| config.pool.mode = mode);
        direct.batch_execute("DROP TABLE IF EXISTS slow; CREATE TABLE slow(n int)").await.expect("created");
        // It comes when the answer is held back already: alone, and behind another write.
        let goodbye = b"X\0\0\0\x04".to_vec();
        let another = [query("INSERT INTO slow VALUES (2)"), goodbye.clone()].concat();
        for (n, (last, expected)) in [(goodbye, "CZI"), (another, "CZICZI")].into_iter().enumerate() {
            let mut client = rig.wire("postgres").await;
            rig.database().set_write_delay(FOR_EVER);
            client.send(&query("INSERT INTO slow VALUES (1)")).await;
            wait_for_rows(&direct, &(n + 1).to_string()).await;
            client.send(&last).await;
            rig.database().set_write_delay(Duration::ZERO);
            let mut answers = Vec::new();
            while let Some(message) = client.next().await {
                answers.push(message);
            }
            assert_eq!(tags(&answers), expected, "{mode:?}");
        }
        wait_for_rows(&direct, "3").await;
        rig.until_no_session().await;
        rig.stop().await;
    }
}
