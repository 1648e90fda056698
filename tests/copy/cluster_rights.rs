//! Rights on parameters and tablespaces, which belong to roles and not to databases.

use pgcutover::migration::roles::{self, Carried, RoleAction};

use crate::rig::Rig;
use crate::support;

const RIGHTS: &str =
    "SELECT string_agg(concat_ws(' ', name, grantee::regrole, privilege_type, is_grantable), ',' ORDER BY
        name, grantee::regrole::text, privilege_type)
    FROM (SELECT parname, paracl FROM pg_parameter_acl UNION ALL SELECT spcname, spcacl FROM pg_tablespace) o (name, acl),
        aclexplode(acl) WHERE grantee <> 10";

#[tokio::test(flavor = "multi_thread")]
async fn rights_on_what_is_the_clusters_arrive_and_only_what_was_taken_away_goes() {
    let found = support::installations();
    let (_, newest) = found.pair().expect("checked by installations()");
    let source = found.major(15).or(found.newest_with_client_tools()).filter(|source| source.major >= 15);
    let Some(source) = source else {
        eprintln!("skipped: rights on parameters came with PostgreSQL 15");
        return;
    };
    let rig = Rig::of(support::two_clusters_of((source, newest), |options| options, |options| options));
    let source = support::connect(&rig.source_cluster, "postgres").await;
    let make = "CREATE ROLE \"Rôle\"; CREATE ROLE chief; CREATE ROLE same;
        GRANT SET ON PARAMETER session_replication_role, log_statement TO \"Rôle\";
        GRANT ALTER SYSTEM ON PARAMETER work_mem TO chief WITH GRANT OPTION;
        GRANT SET ON PARAMETER app.custom TO PUBLIC; GRANT SET ON PARAMETER log_statement TO same;
        GRANT CREATE ON TABLESPACE pg_default TO \"Rôle\" WITH GRANT OPTION; GRANT CREATE ON TABLESPACE pg_default TO same";
    source.batch_execute(make).await.expect("a superuser may");
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let make = "CREATE ROLE same; GRANT SET ON PARAMETER log_statement TO same;
        GRANT ALTER SYSTEM ON PARAMETER log_statement TO same";
    target.batch_execute(make).await.expect("a superuser may");

    let mut carried = Carried::default();
    let mut copy =
        async || roles::copy_roles(&rig.source, &rig.target, &rig.journal, &mut carried).await.expect("carried over");
    let reports = copy().await;
    assert!(reports.iter().all(|report| report.warnings.is_empty()), "{reports:?}");
    let read = async |client: &tokio_postgres::Client| -> String {
        client.query_one(RIGHTS, &[]).await.expect("readable").get(0)
    };
    let more = "REVOKE ALTER SYSTEM ON PARAMETER log_statement FROM same";
    let everything = read(&target).await;
    target.batch_execute(more).await.expect("a superuser may");
    assert_eq!(read(&target).await, read(&source).await);
    assert!(everything.contains("log_statement same ALTER SYSTEM"), "it was the target's own: {everything}");
    let noted = |made: &str| rig.journal.made.lock().expect("whole").iter().filter(|one| one.kind == made).count();
    assert_eq!(noted("cluster_right"), 6, "what was there already is not noted");
    let again = copy().await;
    assert!(again.iter().all(|report| report.action == RoleAction::Unchanged), "{again:?}");

    let own = "GRANT ALTER SYSTEM ON PARAMETER log_statement TO same";
    target.batch_execute(own).await.expect("a superuser may");
    let take = "REVOKE SET ON PARAMETER log_statement FROM same; REVOKE SET ON PARAMETER app.custom FROM PUBLIC;
        REVOKE GRANT OPTION FOR ALTER SYSTEM ON PARAMETER work_mem FROM chief;
        REVOKE CREATE ON TABLESPACE pg_default FROM same";
    source.batch_execute(take).await.expect("a superuser may");
    copy().await;
    assert!(read(&target).await.contains("log_statement same ALTER SYSTEM"), "it was the target's own");
    target.batch_execute(more).await.expect("a superuser may");
    assert_eq!(read(&target).await, read(&source).await);
}
