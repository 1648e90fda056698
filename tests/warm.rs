//! Warming a server before a cutover leads to it, on two real ones: what is read most is in its memory afterwards, what
//! nobody reads is not, tables without statistics have some, and nothing of it stays.

mod support;

use std::time::{Duration, Instant};

use pgcutover::catalog::{Place, bootstrap};
use pgcutover::demo::cluster::{Cluster, Stop};
use pgcutover::migration::warm;
use pgcutover::postgres::{Connector, InstanceId};
use support::{connect, two_clusters, wait_for};

/// A table with names that need quotes and values out of line, one that nobody reads, and no statistics.
const FURNITURE: &str = r#"
CREATE TABLE "Hot ""tåble" (id int PRIMARY KEY, t text, long text);
ALTER TABLE "Hot ""tåble" ALTER long SET STORAGE EXTERNAL;
ALTER TABLE "Hot ""tåble" SET (autovacuum_enabled = off);
CREATE TABLE cold (id int PRIMARY KEY, t text);
ALTER TABLE cold SET (autovacuum_enabled = off);
INSERT INTO "Hot ""tåble" SELECT g, repeat('x', 200), repeat('y', 4000) FROM generate_series(1, 500) g;
INSERT INTO cold SELECT g, repeat('x', 200) FROM generate_series(1, 500) g;
"#;

/// Blocks that a query had to read from outside of the shared buffers.
async fn missed(cluster: &Cluster, query: &str) -> i64 {
    let client = connect(cluster, "postgres").await;
    client.batch_execute("SET enable_seqscan = off; SET enable_bitmapscan = off").await.expect("settings");
    let sql = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}");
    let plan: serde_json::Value = client.query_one(&sql, &[]).await.expect("explained").get(0);
    plan[0]["Plan"]["Shared Read Blocks"].as_i64().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_most_is_in_memory_afterwards() {
    let (source, mut target) = two_clusters();
    for cluster in [&source, &target] {
        connect(cluster, "postgres").await.batch_execute(FURNITURE).await.expect("furnished");
    }
    let of = |table: &'static str| {
        let source = &source;
        async move {
            let sql = "SELECT coalesce(sum(heap_blks_hit), 0)::bigint FROM pg_statio_user_tables WHERE relname = $1";
            connect(source, "postgres").await.query_one(sql, &[&table]).await.expect("readable").get::<_, i64>(0)
        }
    };
    // Making them has touched both: that is reported, and forgotten.
    wait_for("the statistics", || async { of("cold").await > 0 && of("Hot \"tåble").await > 0 }).await;
    connect(&source, "postgres").await.batch_execute("SELECT pg_stat_reset()").await.expect("reset");
    let sum = r#"SELECT sum(length(long)) FROM "Hot ""tåble" WHERE id > 0"#;
    connect(&source, "postgres").await.batch_execute(&[sum; 20].join(";")).await.expect("read");
    wait_for("the statistics of what is read", || async { of("Hot \"tåble").await > 100 }).await;
    target.restart(Stop::Fast).expect("restarted");

    let connector = |cluster: &Cluster, label| {
        Connector::new(&support::server(cluster), label, &InstanceId::random()).expect("no TLS to prepare")
    };
    let (from, to) = (connector(&source, "source"), connector(&target, "target"));
    let (from, to) =
        (from.control("postgres", "warm").await.expect("in"), to.control("postgres", "warm").await.expect("in"));
    bootstrap(&to, Place::TargetDatabase).await.expect("our schema");
    let before = objects(&target).await;

    let soon = Instant::now() + Duration::from_secs(60);
    // Room for the table, its key and its long values, not for the other table.
    let sized =
        r#"SELECT pg_total_relation_size('public."Hot ""tåble"') - pg_relation_size('public."Hot ""tåble"', 'fsm')"#;
    let budget: i64 = to.query_one(sized, &[]).await.expect("sized").get(0);
    let warmed = warm::warm(&from, &to, budget.unsigned_abs(), soon).await.expect("warmed");
    assert!(!warmed.cut_short && warmed.analysed == 2, "{warmed:?}");
    assert_eq!(objects(&target).await, before, "nothing of it stays");
    if warmed.by == warm::Means::Prewarm {
        assert!(warmed.relations >= 4, "table, key, long values and their key: {warmed:?}");
        assert_eq!(missed(&target, sum).await, 0);
        assert!(missed(&target, "SELECT t FROM cold WHERE id > 0").await > 0, "the test can fail");
    }

    // No time, nothing done; and the sessions are as they were.
    let none = warm::warm(&from, &to, budget.unsigned_abs(), Instant::now()).await.expect("looked");
    assert!(none.cut_short && none.relations == 0, "{none:?}");
    let timeout: String = to.query_one("SHOW statement_timeout", &[]).await.expect("shown").get(0);
    assert_eq!(timeout, "0");
}

/// Extensions and functions.
async fn objects(cluster: &Cluster) -> Vec<String> {
    let sql = "SELECT extname::text FROM pg_extension UNION ALL SELECT oid::regprocedure::text FROM pg_proc
               WHERE oid >= 16384 ORDER BY 1";
    let rows = connect(cluster, "postgres").await.query(sql, &[]).await.expect("listed");
    rows.iter().map(|row| row.get(0)).collect()
}
