//! How many clients there may be, and that an operator gets in all the same.

use pgcutover::config::limits::Override;

use crate::rig::{Rig, server};
use crate::support::{self, one_cluster, wait_for};

/// SQLSTATE and message of a refused login.
async fn refusal(config: &tokio_postgres::Config) -> (String, String) {
    let error = support::try_connect(config).await.expect_err("refused");
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (error.code().code().to_owned(), error.message().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_databases_have_their_limits_and_places_are_given_back() {
    let cluster = one_cluster("limits");
    let direct = support::connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN").await.expect("created");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.limits.max_user_connections = 2;
        let one = Override::connections(1);
        config.limits.users.insert("ann".to_owned(), one);
        let one = Override::connections(1);
        config.limits.databases.insert("template1".to_owned(), one);
    });
    let mut ann = rig.client("postgres");
    ann.user("ann");
    let held = support::connect_with(&ann).await;
    let said = |what: &str| ("53300".to_owned(), format!("too many connections for {what}"));
    assert_eq!(refusal(&ann).await, said("role \"ann\""));
    let first = rig.connect("template1").await;
    assert_eq!(refusal(&rig.client("template1")).await, said("database \"template1\""));
    let _second = rig.connect("postgres").await;
    assert_eq!(refusal(&rig.client("postgres")).await, said("role \"postgres\""));
    drop((held, first));
    wait_for("places to be given back", || async { rig.sessions.list().len() == 1 }).await;
    support::connect_with(&ann).await;
    rig.connect("template1").await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_limit_and_a_reload_changes_it() {
    let cluster = one_cluster("address");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.limits.max_address_connections = 1);
    let _first = rig.connect("postgres").await;
    let expected = "too many connections for address \"127.0.0.1\"".to_owned();
    assert_eq!(refusal(&rig.client("postgres")).await, ("53300".to_owned(), expected));
    rig.reload(|config| config.limits.max_address_connections = 2);
    let _second = rig.connect("postgres").await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_have_places_of_their_own() {
    let cluster = one_cluster("reserved");
    let direct = support::connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN").await.expect("created");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.limits.max_client_connections = 1;
        config.limits.reserved_admin_connections = 1;
        config.admin.users = vec!["postgres".to_owned()];
    });
    let mut ann = rig.client("postgres");
    ann.user("ann");
    let _first = support::connect_with(&ann).await;
    let full = ("53300".to_owned(), "sorry, too many clients already".to_owned());
    assert_eq!(refusal(&ann).await, full);
    let _operator = rig.connect("postgres").await;
    assert_eq!(refusal(&rig.client("postgres")).await, full, "their places are counted too");
    rig.stop().await;
}
