//! What `pg_dump` is given to log in with.

use pgcutover::demo::cluster::ClusterAuth;

use crate::rig::Rig;

#[tokio::test(flavor = "multi_thread")]
async fn passwords_reach_pg_dump_without_being_seen() {
    let auth = || ClusterAuth::Scram { password: "it's: a \\ \"secret\"".to_owned() };
    let rig = Rig::start_with(|source| source.auth(auth()), |target| target.auth(auth()));
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)").await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    rig.assert_same_rows().await;
}
