//! Migrations by roles that are no superusers: with the grants that the guides to managed services give, on plain
//! PostgreSQL. There and back under load, with nothing lost; and what is missing is named before anything is begun.
//!
//! What a service gives in a way of its own is given here in PostgreSQL's: `rds_replication` by REPLICATION, the right to set
//! `session_replication_role` by GRANT SET ON PARAMETER. A role cannot imitate what a service takes from everybody.

#[path = "rights/late.rs"]
mod late;
mod support;

use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use pgcutover::demo::compare;
use pgcutover::demo::shop::{self as demo_shop, SHOP, Size};
use support::daemon::{Daemon, DaemonOptions};
use support::world::{COMPLETED, NAME, READY, World};
use support::{cluster_options, connect, connect_with, installations, shop, try_connect, wait_for};

/// How a service's administrator looks from inside.
#[derive(Clone, Copy)]
struct Profile {
    /// The role that everything is granted to.
    group: &'static str,
    /// Run by the one superuser there is, which belongs to the service.
    sql: &'static str,
    /// The page whose first block of SQL makes the role that pgcutover logs in as.
    guide: &'static str,
    /// What the service's own roles give that role, and these cannot.
    further: &'static str,
    /// What the group may have its sessions do with triggers.
    silence: &'static str,
}

/// The role that every guide makes.
const LOGIN: &str = "pgcutover";

const RDS: Profile = Profile {
    group: "rds_superuser",
    sql: "CREATE ROLE rdsadmin SUPERUSER LOGIN;
          CREATE ROLE rds_superuser; CREATE ROLE rds_replication; CREATE ROLE rds_password;
          GRANT pg_monitor, pg_signal_backend, rds_replication, rds_password TO rds_superuser WITH ADMIN OPTION;
          CREATE ROLE master LOGIN CREATEDB CREATEROLE IN ROLE rds_superuser;
          ALTER DATABASE postgres OWNER TO master",
    guide: include_str!("../docs/guides/rds.md"),
    further: "ALTER ROLE pgcutover REPLICATION",
    silence: REPLICA_ROLE,
};

const AZURE: Profile = Profile {
    group: "azure_pg_admin",
    sql: "CREATE ROLE azuresu SUPERUSER LOGIN;
          CREATE ROLE azure_pg_admin;
          GRANT pg_monitor, pg_signal_backend TO azure_pg_admin WITH ADMIN OPTION;
          CREATE ROLE azureuser LOGIN CREATEDB CREATEROLE REPLICATION IN ROLE azure_pg_admin;
          ALTER DATABASE postgres OWNER TO azureuser",
    guide: include_str!("../docs/guides/azure.md"),
    further: "",
    silence: REPLICA_ROLE,
};

const CLOUD_SQL: Profile = Profile {
    group: "cloudsqlsuperuser",
    sql: "CREATE ROLE cloudsqladmin SUPERUSER LOGIN;
          CREATE ROLE cloudsqlsuperuser CREATEDB CREATEROLE;
          GRANT pg_monitor, pg_signal_backend TO cloudsqlsuperuser WITH ADMIN OPTION;
          CREATE ROLE gcadmin LOGIN CREATEDB CREATEROLE REPLICATION IN ROLE cloudsqlsuperuser;
          ALTER DATABASE postgres OWNER TO gcadmin",
    guide: include_str!("../docs/guides/cloud-sql.md"),
    further: "",
    silence: REPLICA_ROLE,
};

/// One that keeps `session_replication_role` to itself.
const RESERVED: Profile = Profile { silence: "", ..RDS };

/// The one in the guides.
const PASSWORD: &str = "change-me";

/// What most services let their administrator do.
const REPLICA_ROLE: &str = "GRANT SET ON PARAMETER session_replication_role TO {group}";

impl Profile {
    async fn make(&self, cluster: &Cluster) {
        let statements = self.guide.split("```sql\n").nth(1).and_then(|rest| rest.split("```").next());
        let statements = statements.expect("the guide makes a role");
        assert!(statements.contains(&format!("CREATE ROLE {LOGIN} LOGIN PASSWORD '{PASSWORD}'")), "{statements}");
        let sql =
            format!("{}; {}; {statements}{}", self.sql, self.silence, self.further).replace("{group}", self.group);
        connect(cluster, "postgres").await.batch_execute(&sql).await.expect("a superuser may");
    }
}

/// A source of PostgreSQL 15 where it is there, since GRANT SET ON PARAMETER came with it, and the newest target.
fn clusters(auth: &ClusterAuth) -> Option<(Cluster, Cluster)> {
    let found = installations();
    let (_, newest) = found.pair().expect("checked by installations()");
    let source = found.major(15).or(found.newest_with_client_tools()).filter(|source| source.major >= 15);
    let Some(source) = source else {
        eprintln!("skipped: no PostgreSQL 15 or newer to grant a parameter on");
        return None;
    };
    let options = |installation, name| cluster_options(installation, name).auth(auth.clone());
    let started = Cluster::start_two(options(source, "source"), options(newest, "target"));
    Some(started.unwrap_or_else(|error| panic!("{error}")))
}

/// Parameters of the application's role, straight on a server.
fn application_login(cluster: &Cluster) -> tokio_postgres::Config {
    let mut config = cluster.config(SHOP);
    config.user(SHOP).password(shop::PASSWORD);
    config
}

/// The shop, owned by the application's role, which the login role is a member of, as the guides have it.
async fn furnish(source: &Cluster) -> Size {
    let mut login = source.config("postgres");
    let admin = connect_with(login.user(LOGIN)).await;
    let make = format!("CREATE ROLE {SHOP} LOGIN PASSWORD 'a shop''s password'");
    admin.batch_execute(&make).await.expect("CREATEROLE");
    admin.batch_execute(&format!("GRANT {SHOP} TO {LOGIN}")).await.expect("CREATEROLE");
    admin.batch_execute(&format!("CREATE DATABASE {SHOP} OWNER {SHOP}")).await.expect("CREATEDB");
    let size = Size::at_scale(0.01);
    let client = connect_with(&application_login(source)).await;
    demo_shop::build(&client, source.major(), size).await.expect("the owner may");
    size
}

/// The shop on a server of one service, ready to be moved to another's.
async fn begin(from: Profile, to: Profile, auth: ClusterAuth, further: DaemonOptions) -> Option<World> {
    Some(begin_on(clusters(&auth)?, from, to, further).await)
}

async fn begin_on((source, target): (Cluster, Cluster), from: Profile, to: Profile, further: DaemonOptions) -> World {
    from.make(&source).await;
    to.make(&target).await;
    let size = furnish(&source).await;
    let options = further
        .section("cutover", "max_pause = \"60s\"\ndrain_timeout = \"30s\"\nmax_lag_at_start = \"1GB\"")
        .section("source", &format!("user = \"{LOGIN}\""))
        .section("target", &format!("user = \"{LOGIN}\""));
    let daemon = Daemon::start(&source, &target, options);
    World { source, target, daemon, size }
}

/// There and back and there again under load, and both servers hold the same.
async fn there_and_back(from: Profile, to: Profile) {
    let Some(world) = begin(from, to, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    let application = world.application(8);
    world.migrate().await;
    let report = world.daemon.json(&["migration", "cutover", NAME, "--dry-run"]);
    assert_eq!(report["outcome"], "dry-run", "{report}");

    // Past the proxy, on the server that is left: ended, and not let in again.
    let bypass = connect_with(&application_login(&world.source)).await;
    for (order, then, left) in [
        ("cutover", COMPLETED, &world.source),
        ("rollback", READY, &world.target),
        ("cutover", COMPLETED, &world.source),
    ] {
        world.wait_for_writes(&application, 100).await;
        world.must_switch(order);
        world.wait_until(then).await;
        let login = application_login(left);
        wait_for("the application's role to be shut out", || async { try_connect(&login).await.is_err() }).await;
        assert!(bypass.is_closed(), "who went past the proxy is still there");
    }
    // The service's own superuser gets past the fence; the stream back, which writes there as well, is no stranger.
    let fence = |of: fn(&serde_json::Value) -> bool| of(&world.view()["databases"][0]);
    wait_for("the server that was left to be watched", || async {
        fence(|database| database["fence_watch"]["watched"] == true)
    })
    .await;
    world.wait_for_writes(&application, 100).await;
    support::shop::write_past_the_fence(&world.source).await;
    wait_for("the stranger to be found", || async {
        fence(|database| {
            let found = database["fenced_writes"].as_array().cloned().unwrap_or_default();
            let rows =
                |kind: &str| found.iter().find(|one| one["kind"] == kind).and_then(|one| one["changes"].as_u64());
            assert!(found.iter().all(|one| one["table"] == "film"), "{found:?}");
            rows("insert") == Some(2) && rows("delete") == Some(2)
        })
    })
    .await;
    world.wait_for_writes(&application, 100).await;
    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    // Sequences are brought over by a cutover, backwards too.
    world.must_switch("rollback");
    shop::open_fenced(&world.target).await;
    shop::nothing_lost(&outcomes, &world.target, &world.source).await;
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    assert_eq!(compare::differences(&source, &target).await.expect("both can be read"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_rights_that_rds_gives() {
    there_and_back(RDS, RDS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_rights_that_azure_gives() {
    there_and_back(AZURE, AZURE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_rights_that_cloud_sql_gives() {
    there_and_back(CLOUD_SQL, CLOUD_SQL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_service_to_another() {
    there_and_back(RDS, AZURE).await;
}

/// No service shows verifiers: the proxy knows passwords from its file, and the target has none until they are set there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_verifier_can_be_read_passwords_are_set_by_hand() {
    let users = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(users.path(), format!("\"{SHOP}\" \"{}\"\n", shop::PASSWORD)).expect("writable");
    let auth = ClusterAuth::Scram { password: PASSWORD.to_owned() };
    let file = format!("users_file = {:?}", users.path());
    let options = DaemonOptions::default().section("auth", &file);
    let Some(world) = begin(RDS, RDS, auth, options).await else { return };
    let application = world.application(4);
    world.migrate().await;
    let view = world.view();
    let rules = view["validation"].as_array().expect("rules");
    let warned = rules.iter().find(|rule| rule["code"] == "password_verifiers").expect("a rule");
    assert_eq!(warned["outcome"], "Warning", "{warned}");

    let refused = world.daemon.command(&["migration", "cutover", NAME, "--output", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&refused.stdout).expect("a report");
    assert!(!refused.status.success() && report["outcome"] == "aborted", "{report}");
    assert!(report["reason"].as_str().is_some_and(|reason| reason.contains(SHOP)), "{report}");

    let mut login = world.target.config("postgres");
    let admin = connect_with(login.user(LOGIN)).await;
    admin.batch_execute(&format!("ALTER ROLE {SHOP} PASSWORD 'a shop''s password'")).await.expect("its own role");
    world.must_switch("cutover");
    world.wait_for_writes(&application, 100).await;
    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
}
