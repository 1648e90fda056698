//! What is granted by somebody else than the owner, who was given it to give on.

use pgcutover::demo::cluster::Cluster;
use pgcutover::migration::schema;

use crate::rig::{DATABASE, Rig};
use crate::support;

const ROLES: &str =
    "CREATE ROLE owner; CREATE ROLE \"Middle \"\"man\"\"\"; CREATE ROLE last; CREATE ROLE migrator LOGIN REPLICATION;
     GRANT owner, \"Middle \"\"man\"\"\" TO migrator";

const OBJECTS: &str = "
CREATE SCHEMA s AUTHORIZATION owner; SET ROLE owner;
CREATE TABLE s.t (id int PRIMARY KEY, v text);
CREATE SEQUENCE s.q;
CREATE VIEW s.seen AS SELECT id FROM s.t;
CREATE MATERIALIZED VIEW s.kept AS SELECT id FROM s.t;
CREATE FUNCTION s.f() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE TYPE s.mood AS ENUM ('sad');
CREATE DOMAIN s.small AS int;
GRANT USAGE ON SCHEMA s TO \"Middle \"\"man\"\"\";
RESET ROLE;
";

/// Privileges that are given on.
const GIVEN: [&str; 10] = [
    "SELECT ON TABLE s.t",
    "UPDATE (v), REFERENCES (v) ON TABLE s.t",
    "SELECT ON TABLE s.seen",
    "SELECT ON TABLE s.kept",
    "USAGE ON SEQUENCE s.q",
    "EXECUTE ON FUNCTION s.f()",
    "USAGE ON TYPE s.mood",
    "USAGE ON DOMAIN s.small",
    "CREATE ON SCHEMA s",
    "USAGE ON SCHEMA s",
];

/// The objects, and who has given what to whom.
fn chains(given: &[&str]) -> String {
    let chain = |what: &&str| {
        format!(
            "SET ROLE owner; GRANT {what} TO \"Middle \"\"man\"\"\" WITH GRANT OPTION;
             SET ROLE \"Middle \"\"man\"\"\"; GRANT {what} TO last; RESET ROLE;\n"
        )
    };
    given.iter().map(chain).collect()
}

/// Who has given what, by the servers themselves: not every pg_dump can read the target.
async fn given(cluster: &Cluster) -> Vec<String> {
    let sql = "
        SELECT format('%s %s: %s to %s by %s', what, name, a.privilege_type, a.grantee::regrole, a.grantor::regrole) FROM (
            SELECT 'relation', oid::regclass::text, relacl FROM pg_class UNION ALL
            SELECT 'column', attrelid::regclass::text, attacl FROM pg_attribute UNION ALL
            SELECT 'function', oid::regprocedure::text, proacl FROM pg_proc UNION ALL
            SELECT 'type', oid::regtype::text, typacl FROM pg_type UNION ALL
            SELECT 'schema', nspname::text, nspacl FROM pg_namespace UNION ALL
            SELECT 'wrapper', fdwname::text, fdwacl FROM pg_foreign_data_wrapper UNION ALL
            SELECT 'server', srvname::text, srvacl FROM pg_foreign_server) o (what, name, acl)
         CROSS JOIN LATERAL aclexplode(acl) a WHERE a.grantee::regrole::text = 'last' ORDER BY 1";
    let client = support::connect(cluster, DATABASE).await;
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn arrive(rig: &Rig) {
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    rig.finish(&archive).await;
    rig.assert_same_definitions().await;
    let (here, there) = (given(&rig.source_cluster).await, given(&rig.target_cluster).await);
    assert_eq!(here, there);
    assert!(
        here.len() > GIVEN.len() && here.iter().all(|line| line.ends_with("by \"Middle \"\"man\"\"\"")),
        "{here:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_given_on_arrives_as_given_by_the_same_roles() {
    let rig = Rig::start();
    support::connect(&rig.source_cluster, "postgres").await.batch_execute(ROLES).await.unwrap();
    let far = "CREATE FOREIGN DATA WRAPPER w; GRANT USAGE ON FOREIGN DATA WRAPPER w TO owner;
               SET ROLE owner; CREATE SERVER far FOREIGN DATA WRAPPER w; RESET ROLE;";
    let also = ["USAGE ON FOREIGN SERVER far"];
    rig.make_source(&format!("{OBJECTS}{far}{}{}", chains(&GIVEN), chains(&also))).await;
    rig.copy_roles().await.unwrap();
    arrive(&rig).await;
}

/// Nobody but a superuser can become another role; a member can act as it.
#[tokio::test(flavor = "multi_thread")]
async fn members_of_the_granting_roles_need_be_no_superusers() {
    let mut rig = Rig::start();
    if rig.target_cluster.major() < 15 {
        eprintln!("below PostgreSQL 15 only a superuser may set session_replication_role");
        return;
    }
    let admin = support::connect(&rig.source_cluster, "postgres").await;
    admin.batch_execute(ROLES).await.unwrap();
    rig.make_source(&format!("{OBJECTS}{}", chains(&GIVEN))).await;
    let database = format!("ALTER DATABASE \"{}\" OWNER TO owner", DATABASE.replace('"', "\"\""));
    admin.batch_execute(&database).await.unwrap();
    let there = support::connect(&rig.target_cluster, "postgres").await;
    let login =
        "CREATE ROLE migrator LOGIN CREATEDB CREATEROLE; GRANT SET ON PARAMETER session_replication_role TO migrator";
    there.batch_execute(login).await.unwrap();
    rig.log_in_as("migrator");
    rig.copy_roles().await.unwrap();
    arrive(&rig).await;
}

/// The extension is on the target already, and belongs to whoever made the cluster. A dump leaves out what initdb made.
#[tokio::test(flavor = "multi_thread")]
async fn comments_on_extensions_of_somebody_else_are_left_out() {
    let mut rig = Rig::start();
    let admin = support::connect(&rig.source_cluster, "postgres").await;
    admin.batch_execute(ROLES).await.unwrap();
    rig.make_source("DROP EXTENSION plpgsql; CREATE EXTENSION plpgsql; COMMENT ON EXTENSION plpgsql IS 'ours'").await;
    let database = format!("ALTER DATABASE \"{}\" OWNER TO owner", DATABASE.replace('"', "\"\""));
    admin.batch_execute(&database).await.unwrap();
    let there = support::connect(&rig.target_cluster, "postgres").await;
    there.batch_execute("CREATE ROLE migrator LOGIN CREATEDB CREATEROLE").await.unwrap();
    rig.log_in_as("migrator");
    rig.copy_roles().await.unwrap();
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    let comment = "SELECT obj_description(oid, 'pg_extension') FROM pg_extension WHERE extname = 'plpgsql'";
    let comment = async |cluster: &Cluster| -> String {
        support::connect(cluster, DATABASE).await.query_one(comment, &[]).await.unwrap().get(0)
    };
    assert_eq!(comment(&rig.source_cluster).await, "ours");
    assert_ne!(comment(&rig.target_cluster).await, "ours", "it was nobody's to change");
    let again = schema::restore_pre_data(&rig.restore_target(), &archive).await.unwrap();
    assert_eq!((again.executed, again.failures), (0, Vec::new()), "what was left out is not tried again");
}
