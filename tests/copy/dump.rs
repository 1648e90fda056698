//! What `pg_dump` is given to log in with.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use pgcutover::demo::cluster::{ClusterAuth, Stop};
use pgcutover::migration::schema::{self, SchemaError};

use crate::rig::{DATABASE, Rig};
use crate::support;

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

/// Without double quotes `system_user` is a column up to PostgreSQL 15, and from then on whoever has logged in.
#[tokio::test(flavor = "multi_thread")]
async fn names_that_only_the_target_reserves_mean_the_same_there() {
    let mut rig = Rig::start();
    // One of the source's own major would not know these words either.
    rig.config.bindir = support::installations().newest_with_client_tools().map(|tools| tools.bindir.clone());
    rig.make_source(
        "CREATE TABLE t (id int PRIMARY KEY, \"system_user\" text CHECK (\"system_user\" <> 'root'));
         CREATE INDEX by_user ON t (\"system_user\"); CREATE POLICY p ON t USING (\"system_user\" = 'alice');
         CREATE FUNCTION f(\"system_user\" text) RETURNS text LANGUAGE sql AS 'SELECT $1';
         INSERT INTO t VALUES (1, 'alice')",
    )
    .await;
    let archive = rig.dump().await;
    rig.restore_pre_data(&archive).await;
    rig.copy(&archive).await.unwrap();
    rig.finish(&archive).await;
    rig.assert_same_rows().await;
    let meaning = "SELECT concat_ws('; ', (SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint WHERE contype = 'c' \
        AND conrelid = 't'::regclass), (SELECT pg_get_expr(polqual, polrelid) FROM pg_policy))";
    let there = support::connect(&rig.target_cluster, DATABASE).await;
    let text: String = there.query_one(meaning, &[]).await.unwrap().get(0);
    assert!(text.contains("system_user") && !text.contains("SYSTEM_USER"), "{text}");
}

/// The last session that the server takes is our own, which holds the snapshot. Why pg_dump gets none is told by a SQLSTATE,
/// so that it is tried again later.
#[tokio::test(flavor = "multi_thread")]
async fn too_many_sessions_for_pg_dump_are_told_as_such() {
    let mut rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    rig.source_cluster.configure(&[("max_connections", "20")]).unwrap();
    rig.source_cluster.restart(Stop::Fast).unwrap();
    let pg_dump = rig.pg_dump().await;
    let login = rig.source_cluster.config(DATABASE);
    let mut sessions = Vec::new();
    while let Ok(session) = support::try_connect(&login).await {
        sessions.push(session);
    }
    sessions.pop();
    let there = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
    support::wait_for("one to be gone", || async {
        let there: i64 = sessions[0].query_one(there, &[]).await.unwrap().get(0);
        usize::try_from(there) == Ok(sessions.len())
    })
    .await;
    let refused = schema::dump(&pg_dump, &rig.source, DATABASE, rig.config.lock_timeout).await;
    let Err(SchemaError::Connect(error)) = &refused else { panic!("{refused:?}") };
    assert_eq!(error.sqlstate(), Some("53300"), "{error:?}");
    sessions.truncate(5);
    support::wait_for("room", || async { sessions[0].query_one(there, &[]).await.unwrap().get::<_, i64>(0) == 5 })
        .await;
    rig.dump().await;
}

/// Where we get a session ourselves pg_dump is begun again, though not for ever: it may lack what only libpq asks for.
#[tokio::test(flavor = "multi_thread")]
async fn a_pg_dump_that_got_no_session_is_begun_again() {
    let mut rig = Rig::start();
    rig.make_source("CREATE TABLE t (id int PRIMARY KEY)").await;
    rig.config.lock_timeout = Duration::from_millis(20);
    let all = support::installations();
    let real = &all.newest_with_client_tools().expect("checked by installations()").bindir;
    let bindir = tempfile::tempdir().unwrap();
    let (draft, program) = (bindir.path().join("draft"), bindir.path().join("pg_dump"));
    let attempts = || std::fs::read_to_string(bindir.path().join("attempts")).unwrap_or_default().lines().count();
    for (refused, expected) in [(3, 4), (99, 5)] {
        let script = format!(
            "#!/bin/sh
             if [ \"$1\" != --version ]; then
                 echo x >> '{here}/attempts'
                 if [ $(wc -l < '{here}/attempts') -le {refused} ]; then
                     echo 'pg_dump: error: connection to server at \"db\", port 5432 failed: timeout expired' >&2
                     exit 1
                 fi
             fi
             exec '{real}/pg_dump' \"$@\"
            ",
            here = bindir.path().display(),
            real = real.display(),
        );
        // Under another name first: a program that is open for writing cannot be run.
        std::fs::write(&draft, script).unwrap();
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&draft, &program).unwrap();
        rig.config.bindir = Some(bindir.path().to_owned());
        let pg_dump = rig.pg_dump().await;
        let dumped = schema::dump(&pg_dump, &rig.source, DATABASE, rig.config.lock_timeout).await;
        assert_eq!(attempts(), expected, "{dumped:?}");
        match dumped {
            Ok(_) => assert_eq!(refused, 3),
            Err(error) => assert!(matches!(&error, SchemaError::Dump { why, .. } if why.contains("timeout expired"))),
        }
        std::fs::remove_file(bindir.path().join("attempts")).unwrap();
    }
}
