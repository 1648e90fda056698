//! The demo's application and its ledger, on a plain server: they must be silent when all is well, and must speak when
//! a write is lost or doubled.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use pgcutover::demo::compare;
use pgcutover::demo::ledger::{self, ClientLedger, Reconciliation};
use pgcutover::demo::workload::Workload;
use support::{connect, one_cluster, wait_for};

#[tokio::test]
async fn the_ledger_agrees_with_the_server_and_notices_what_is_lost() {
    let cluster = one_cluster("shop");
    let size = support::shop::build(&cluster, 0.01).await;
    let shop = connect(&cluster, "shop").await;
    let mut config = cluster.config("shop");
    config.user("shop");
    let application = Workload::start(&config, 12, size);
    wait_for("three thousand writes", async || {
        application.tally().writes.load(std::sync::atomic::Ordering::Relaxed) > 3_000
    })
    .await;
    let outcomes = tokio::time::timeout(Duration::from_secs(60), application.finish()).await.expect("clients end");
    for outcome in &outcomes {
        assert_eq!(outcome.error_count, 0, "{:?}", outcome.errors);
        assert_eq!(outcome.reconnects, 0);
    }
    assert!(outcomes.iter().any(|outcome| !outcome.heard.is_empty()), "the listener heard something");
    let ledgers: Vec<ClientLedger> = outcomes.into_iter().map(|outcome| outcome.ledger).collect();

    let recorded = ledger::recorded(&shop).await.expect("readable");
    let found = ledger::reconcile(&ledgers, &recorded, &recorded);
    assert_eq!(found, Reconciliation { acknowledged: found.acknowledged, ..Reconciliation::default() });
    assert!(found.acknowledged > 3_000);

    shop.batch_execute(
        "DELETE FROM shop.write_log WHERE id = (SELECT min(id) FROM shop.write_log);
         INSERT INTO shop.write_log (write_no, kind) SELECT write_no, kind FROM shop.write_log ORDER BY id LIMIT 2",
    )
    .await
    .expect("damaged on purpose");
    let damaged = ledger::recorded(&shop).await.expect("readable");
    let found = ledger::reconcile(&ledgers, &recorded, &damaged);
    assert_eq!((found.missing, found.duplicates, found.late_on_source), (1, 2, 1));
}

#[tokio::test]
async fn databases_of_different_majors_compare_equal_until_a_row_differs() {
    let (older, newer) = support::two_clusters();
    let mut clients = HashMap::new();
    for cluster in [&older, &newer] {
        let client = connect(cluster, "postgres").await;
        client
            .batch_execute(
                "CREATE TABLE t (a bigserial PRIMARY KEY, f float8, r real, b bytea, j jsonb, at timestamptz, i interval);
                 INSERT INTO t (f, r, b, j, at, i) SELECT n / 3.0, n / 7.0, decode(md5(n::text), 'hex'), jsonb_build_object('n', n),
                     timestamptz '2024-01-01 00:00:00+00' + n * interval '1 hour', n * interval '1 day 3 seconds'
                 FROM generate_series(1, 1000) n;
                 CREATE MATERIALIZED VIEW m AS SELECT count(*) FROM t",
            )
            .await
            .expect("the same on every major");
        clients.insert(cluster.name().to_owned(), client);
    }
    let (older, newer) = (&clients["source"], &clients["target"]);
    assert_eq!(compare::differences(older, newer).await.expect("comparable"), Vec::<String>::new());

    newer.batch_execute("UPDATE public.t SET f = f + 1 WHERE a = 500").await.expect("changed");
    newer.batch_execute("CREATE INDEX ON public.t (f)").await.expect("changed");
    newer.batch_execute("SELECT nextval('public.t_a_seq')").await.expect("changed");
    let found = compare::differences(older, newer).await.expect("comparable");
    assert_eq!(found.len(), 4, "an index is a relation too: {found:#?}");
}
