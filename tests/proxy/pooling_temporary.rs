//! Temporary objects of pooled clients that no word of the statement tells of, or that are no tables.

use crate::pooling::{ask, pooled};
use crate::support::{one_cluster, wait_for};
use crate::wire_client::{WireClient, query};

#[tokio::test(flavor = "multi_thread")]
async fn temporary_objects_keep_their_client_on_its_connection_however_they_are_made() {
    let cluster = one_cluster("temporary");
    let rig = pooled(&cluster, 8);
    let table = "CREATE TABLE mine(a int)";
    let local = format!("BEGIN; SET LOCAL search_path = pg_temp; {table}; COMMIT");
    for (options, statements) in [
        ("", vec!["SET search_path = pg_temp, public", table]),
        ("-c search_path=pg_temp", vec![table]),
        ("", vec![local.as_str()]),
        ("", vec!["CREATE COLLATION pg_temp.mine FROM \"C\""]),
    ] {
        let mut client = WireClient::connect(rig.port).await;
        client.start(&[("user", "postgres"), ("database", "postgres"), ("options", options)]).await;
        client.until_ready().await;
        for statement in &statements {
            ask(&mut client, &query(statement)).await;
        }
        wait_for("the pin to be shown", || async {
            rig.sessions.list().iter().any(|session| session.pinned.as_deref() == Some("temporary object"))
        })
        .await;
        drop(client);
        rig.until_no_session().await;
    }
    rig.stop().await;
}
