//! Rights on parameters, which belong to roles and not to databases.

use pgcutover::migration::roles::{self, RoleAction};

use crate::rig::Rig;
use crate::support;

const RIGHTS: &str =
    "SELECT string_agg(concat_ws(' ', parname, grantee::regrole, privilege_type, is_grantable), ',' ORDER BY
        parname, grantee::regrole::text, privilege_type)
    FROM pg_parameter_acl, aclexplode(paracl) WHERE grantee <> 10";

#[tokio::test(flavor = "multi_thread")]
async fn rights_on_parameters_arrive_and_none_is_taken_away() {
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
        GRANT SET ON PARAMETER app.custom TO PUBLIC; GRANT SET ON PARAMETER log_statement TO same";
    source.batch_execute(make).await.expect("a superuser may");
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let make = "CREATE ROLE same; GRANT SET ON PARAMETER log_statement TO same;
        GRANT ALTER SYSTEM ON PARAMETER log_statement TO same";
    target.batch_execute(make).await.expect("a superuser may");

    let reports = roles::copy_roles(&rig.source, &rig.target, &rig.journal).await.expect("carried over");
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
    assert_eq!(noted("parameter_right"), 4, "what was there already is not noted");
    let again = roles::copy_roles(&rig.source, &rig.target, &rig.journal).await.expect("carried over");
    assert!(again.iter().all(|report| report.action == RoleAction::Unchanged), "{again:?}");
}
