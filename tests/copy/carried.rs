//! What belongs to the server and not to a database: roles, and the database itself. What is taken away on the source later
//! is taken away on the target too, and what only the target has stays.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use pgcutover::migration::copy::{self, CopyContext, Stage};
use pgcutover::migration::made::{Journal, Mirrored};
use pgcutover::migration::roles::{self, Carried, RoleAction, RoleReport};
use pgcutover::migration::schema::{self, ConnectionLimit, Existing, RestoreTarget, Synced};
use pgcutover::postgres::Connector;
use tokio_postgres::Client;

use crate::rig::Rig;
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn roles_arrive_with_their_passwords_and_only_once() {
    let rig = Rig::start();
    let source = support::connect(&rig.source_cluster, "postgres").await;
    source
        .batch_execute(
            "SET password_encryption = 'scram-sha-256';
             CREATE ROLE app LOGIN PASSWORD 'secret' CONNECTION LIMIT 7 VALID UNTIL '2099-01-01';
             CREATE ROLE \"Grüppe \"\"g\"\"\" NOINHERIT CREATEDB; GRANT \"Grüppe \"\"g\"\"\" TO app WITH ADMIN OPTION;
             GRANT pg_monitor TO app; COMMENT ON ROLE app IS 'it''s the app';
             ALTER ROLE app SET search_path = \"$user\", 'Weird, name', public; ALTER ROLE app SET app.tenant = 'a, b';
             CREATE ROLE repl REPLICATION BYPASSRLS LOGIN PASSWORD 'other';
             CREATE ROLE there LOGIN PASSWORD 'source''s';",
        )
        .await
        .unwrap();
    let target = support::connect(&rig.target_cluster, "postgres").await;
    target.batch_execute("CREATE ROLE there NOLOGIN PASSWORD 'target''s' VALID UNTIL '2000-01-01'").await.unwrap();

    let reports = rig.copy_roles().await.unwrap();
    let actions: BTreeMap<&str, RoleAction> =
        reports.iter().map(|report| (report.role.as_str(), report.action)).collect();
    assert_eq!(actions["app"], RoleAction::Created);
    assert_eq!(actions["there"], RoleAction::Altered);
    assert_eq!(actions["postgres"], RoleAction::Unchanged);
    let everything = "SELECT string_agg(concat_ws('|', rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, \
        rolreplication, rolbypassrls, rolconnlimit, nullif(rolvaliduntil, 'infinity'), rolpassword, \
        (SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = r.oid), shobj_description(r.oid, 'pg_authid'), \
        (SELECT string_agg(format('%s %s', m.roleid::regrole, m.admin_option), ',' ORDER BY m.roleid::regrole::text) \
         FROM pg_auth_members m WHERE m.member = r.oid)), E'\\n' ORDER BY rolname) \
        FROM pg_authid r WHERE rolname !~ '^pg_'";
    let read =
        async |client: &tokio_postgres::Client| -> String { client.query_one(everything, &[]).await.unwrap().get(0) };
    assert_eq!(read(&source).await, read(&target).await);

    let made = rig.journal.made.lock().unwrap().clone();
    assert!(made.iter().any(|made| made.kind == "role_password" && made.name == "\"there\""));
    assert!(!format!("{made:?}").contains("SCRAM"), "verifiers do not reach the journal");
    let again = rig.copy_roles().await.unwrap();
    assert!(again.iter().all(|report| report.action == RoleAction::Unchanged), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_made_like_the_sources() {
    let rig = Rig::start();
    let source = support::connect(&rig.source_cluster, "postgres").await;
    source.batch_execute("CREATE ROLE owner; CREATE ROLE app LOGIN; CREATE ROLE reader").await.unwrap();
    source
        .batch_execute(
            "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' OWNER owner",
        )
        .await
        .unwrap();
    source
        .batch_execute(
            "ALTER DATABASE latin CONNECTION LIMIT 33; COMMENT ON DATABASE latin IS 'it''s';
             ALTER DATABASE latin SET search_path = \"$user\", 'a b', public; ALTER DATABASE latin SET app.x = 'y, z';
             ALTER ROLE app IN DATABASE latin SET work_mem = '3MB';
             REVOKE ALL ON DATABASE latin FROM PUBLIC; GRANT CONNECT ON DATABASE latin TO app WITH GRANT OPTION;
             GRANT TEMPORARY ON DATABASE latin TO reader",
        )
        .await
        .unwrap();
    let client = support::connect(&rig.source_cluster, "latin").await;
    client
        .batch_execute(
            "CREATE TABLE \"Straße\" (\"Größe\" text, n int); INSERT INTO \"Straße\" VALUES ('ÄÖÜ', 1), ('ß', 2)",
        )
        .await
        .unwrap();
    drop(client);

    rig.copy_roles().await.unwrap();
    let made = schema::create_database(&rig.source, &rig.target, "latin", Existing::Keep, &rig.journal).await;
    let mut carried = made.unwrap();
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let everything = "SELECT concat_ws('|', pg_get_userbyid(datdba), pg_encoding_to_char(encoding), datcollate, datctype, \
        datconnlimit, shobj_description(d.oid, 'pg_database'), (SELECT string_agg(a::text, ',' ORDER BY a::text) FROM \
        (SELECT coalesce(r.rolname, 'PUBLIC'), x.privilege_type, x.is_grantable FROM aclexplode(d.datacl) x \
         LEFT JOIN pg_roles r ON r.oid = x.grantee) a), (SELECT string_agg(s.setconfig::text || coalesce(r.rolname, '-'), \
         ',' ORDER BY s.setconfig::text) FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole \
         WHERE s.setdatabase = d.oid)) FROM pg_database d WHERE datname = 'latin'";
    let read =
        async |client: &tokio_postgres::Client| -> String { client.query_one(everything, &[]).await.unwrap().get(0) };
    assert_eq!(read(&source).await, read(&target).await);

    // Settings may change later; what a fence has set is left alone.
    source
        .batch_execute(
            "ALTER DATABASE latin RESET app.x; ALTER DATABASE latin SET work_mem = '5MB';
             ALTER DATABASE latin SET default_transaction_read_only = on",
        )
        .await
        .unwrap();
    let except = ["default_transaction_read_only"];
    let mut sync = async |limit| {
        schema::sync_database(&rig.source, &rig.target, "latin", &except, limit, &mut carried).await.unwrap()
    };
    assert_eq!(sync(ConnectionLimit::IsCarried).await, Synced { changed: 2, left: Vec::new() });
    assert_eq!(sync(ConnectionLimit::IsCarried).await, Synced::default());
    source.batch_execute("ALTER DATABASE latin RESET default_transaction_read_only").await.unwrap();

    // So may whose it is and who may enter.
    for (change, changes) in [
        ("ALTER DATABASE latin CONNECTION LIMIT 7; COMMENT ON DATABASE latin IS NULL", 2),
        ("REVOKE CONNECT ON DATABASE latin FROM app; GRANT CREATE ON DATABASE latin TO reader, PUBLIC", 1),
        ("ALTER DATABASE latin OWNER TO app", 2),
    ] {
        source.batch_execute(change).await.unwrap();
        assert_eq!(sync(ConnectionLimit::IsCarried).await, Synced { changed: changes, left: Vec::new() }, "{change}");
        assert_eq!(read(&source).await, read(&target).await, "{change}");
        assert_eq!(sync(ConnectionLimit::IsCarried).await, Synced::default(), "{change}");
    }
    // A fence keeps what it gives back.
    source.batch_execute("ALTER DATABASE latin CONNECTION LIMIT 8").await.unwrap();
    let kept = sync(ConnectionLimit::IsTheFences).await;
    assert_eq!((kept.changed, kept.left.len()), (0, 1), "{kept:?}");
    assert!(kept.left[0].starts_with("its connection limit is 8 "), "{kept:?}");

    // Bytes of another encoding are not converted on the way.
    let pg_dump = rig.pg_dump().await;
    let archive = schema::dump(&pg_dump, &rig.source, "latin", rig.config.lock_timeout).await.unwrap();
    let place = RestoreTarget { database: "latin", ..rig.restore_target() };
    assert_eq!(schema::restore_pre_data(&place, &archive).await.unwrap().failures, []);
    let control = rig.source.control("latin", "test").await.unwrap();
    let tables: Vec<_> =
        copy::list_tables(&control).await.unwrap().into_iter().map(|table| (table, Stage::Rows)).collect();
    let context = CopyContext { database: "latin".to_owned(), ..rig.context(None) };
    assert_eq!(copy::copy_database(&context, &tables, &archive).await.unwrap().copied.rows, 2);
    let there = support::connect(&rig.target_cluster, "latin").await;
    let text = "SELECT string_agg(\"Größe\", ',' ORDER BY n) FROM \"Straße\"";
    assert_eq!(there.query_one(text, &[]).await.unwrap().get::<_, String>(0), "ÄÖÜ,ß");
    drop(there);

    let again = schema::create_database(&rig.source, &rig.target, "latin", Existing::Keep, &rig.journal).await;
    again.expect("it is the same");
    target.batch_execute("ALTER DATABASE latin RENAME TO latin_1").await.unwrap();
    target.batch_execute("CREATE DATABASE latin").await.unwrap();
    let differs = schema::create_database(&rig.source, &rig.target, "latin", Existing::Keep, &rig.journal).await;
    assert!(matches!(differs, Err(schema::SchemaError::Differs { .. })), "{differs:?}");
    schema::create_database(&rig.source, &rig.target, "latin", Existing::Drop, &rig.journal).await.unwrap();
    let made: Vec<String> = rig.journal.made.lock().unwrap().iter().map(|made| made.kind.clone()).collect();
    assert!(made.ends_with(&["database".to_owned(), "database_dropped".to_owned(), "database".to_owned()]), "{made:?}");

    // What an interrupted DROP has left can only be dropped; a template cannot be.
    for left in
        ["UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'latin'", "ALTER DATABASE latin IS_TEMPLATE true"]
    {
        target.batch_execute(left).await.unwrap();
        let dropped = schema::create_database(&rig.source, &rig.target, "latin", Existing::Drop, &rig.journal).await;
        dropped.unwrap_or_else(|error| panic!("{left}: {error:?}"));
        assert_eq!(read(&source).await, read(&target).await, "{left}");
    }
}

/// A parameter of an application is a superuser's, as those of the server are that its log is written by.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_superuser_may_set_for_a_database_is_left_out_and_told() {
    let mut rig = Rig::start();
    for cluster in [&rig.source_cluster, &rig.target_cluster] {
        let client = support::connect(cluster, "postgres").await;
        client.batch_execute("CREATE ROLE migrator LOGIN CREATEDB CREATEROLE").await.unwrap();
    }
    let source = support::connect(&rig.source_cluster, "postgres").await;
    source.batch_execute("CREATE DATABASE shop OWNER migrator").await.unwrap();
    let set = "ALTER DATABASE shop SET app.x = 'y'; ALTER DATABASE shop SET work_mem = '5MB'; \
        ALTER DATABASE shop SET log_min_duration_statement = '1s'";
    source.batch_execute(set).await.unwrap();
    rig.log_in_as("migrator");
    let made = schema::create_database(&rig.source, &rig.target, "shop", Existing::Keep, &rig.journal).await;
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let settings = "SELECT array_to_string(setconfig, ',') FROM pg_db_role_setting WHERE setdatabase = \
        (SELECT oid FROM pg_database WHERE datname = 'shop')";
    assert_eq!(text(&target, settings).await, "work_mem=5MB");
    let limit = ConnectionLimit::IsCarried;
    let mut carried = made.unwrap();
    let synced = schema::sync_database(&rig.source, &rig.target, "shop", &[], limit, &mut carried).await.unwrap();
    assert_eq!((synced.changed, synced.left.len()), (0, 2), "{synced:?}");
    // Nor does the way back take it from the source, which the target never had it from.
    let back = schema::sync_database(&rig.target, &rig.source, "shop", &[], limit, &mut carried).await.unwrap();
    assert_eq!(back, Synced::default());
    assert_eq!(text(&source, settings).await, "app.x=y,work_mem=5MB,log_min_duration_statement=1s");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_one_server_has_set_or_granted_for_a_database_stays() {
    let rig = Rig::start();
    let source = support::connect(&rig.source_cluster, "postgres").await;
    let target = support::connect(&rig.target_cluster, "postgres").await;
    source.batch_execute("CREATE ROLE app; CREATE ROLE own_backup; CREATE ROLE own_monitoring").await.unwrap();
    source.batch_execute("CREATE DATABASE shop").await.unwrap();
    let make = "ALTER DATABASE shop SET work_mem = '5MB'; ALTER DATABASE shop SET app.x = '1'; \
        GRANT CREATE ON DATABASE shop TO app";
    source.batch_execute(make).await.unwrap();
    rig.copy_roles().await.unwrap();
    let made = schema::create_database(&rig.source, &rig.target, "shop", Existing::Keep, &rig.journal).await;
    let mut carried = made.unwrap();
    let mut go = async |from: &Connector, to: &Connector| {
        // Kept between one time and the next as the engine keeps it.
        let kept = serde_json::to_value(&carried).unwrap();
        carried = serde_json::from_value(kept).unwrap();
        let limit = ConnectionLimit::IsCarried;
        let synced = schema::sync_database(from, to, "shop", &[], limit, &mut carried).await.unwrap();
        assert_eq!(synced.left, [""; 0]);
        synced.changed
    };
    let has = "SELECT concat_ws(' ', array_to_string(s.setconfig, ','), \
        (SELECT string_agg(rolname::text, ',' ORDER BY rolname) FROM pg_roles \
        WHERE rolname !~ '^(pg_|postgres)' AND has_database_privilege(rolname, d.oid, 'CREATE'))) \
        FROM pg_database d JOIN pg_db_role_setting s ON s.setdatabase = d.oid WHERE d.datname = 'shop'";

    let tune = "ALTER DATABASE shop SET enable_sort = off; GRANT CREATE ON DATABASE shop TO own_monitoring";
    target.batch_execute(tune).await.unwrap();
    assert_eq!(go(&rig.source, &rig.target).await, 0);
    assert_eq!(text(&target, has).await, "work_mem=5MB,app.x=1,enable_sort=off app,own_monitoring");
    source.batch_execute("ALTER DATABASE shop RESET app.x; REVOKE CREATE ON DATABASE shop FROM app").await.unwrap();
    assert_eq!(go(&rig.source, &rig.target).await, 2);
    assert_eq!(text(&target, has).await, "work_mem=5MB,enable_sort=off own_monitoring");

    // The way back takes what both had, and leaves what only the server has that it leads to.
    let tune = "ALTER DATABASE shop SET enable_hashjoin = off; GRANT CREATE ON DATABASE shop TO own_backup";
    source.batch_execute(tune).await.unwrap();
    target.batch_execute("ALTER DATABASE shop RESET work_mem").await.unwrap();
    assert_eq!(go(&rig.target, &rig.source).await, 3);
    assert_eq!(text(&source, has).await, "enable_hashjoin=off,enable_sort=off own_backup,own_monitoring");
    assert_eq!(go(&rig.target, &rig.source).await, 0);
}

/// Everything about roles but what is their own servers' on purpose.
const ROLES: &str = "SELECT string_agg(concat_ws('|', rolname, rolcanlogin, nullif(rolvaliduntil, 'infinity'), rolpassword, s.setconfig,
        shobj_description(r.oid, 'pg_authid'),
        (SELECT string_agg(format('%s %s', m.roleid::regrole, m.admin_option), ',' ORDER BY m.roleid::regrole::text)
           FROM pg_auth_members m WHERE m.member = r.oid)), E'\\n' ORDER BY rolname)
    FROM pg_authid r LEFT JOIN pg_db_role_setting s ON s.setrole = r.oid AND s.setdatabase = 0
   WHERE rolname !~ '^pg_' AND rolname !~ '^own_'";

async fn text(client: &Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn warnings(reports: &[RoleReport]) -> Vec<String> {
    reports
        .iter()
        .flat_map(|report| report.warnings.iter().map(|warning| format!("{}: {warning}", report.role)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_the_target_does_not_take_are_left_out_and_told() {
    let rig = Rig::start();
    let source = support::connect(&rig.source_cluster, "postgres").await;
    source.batch_execute("CREATE DATABASE shop").await.unwrap();
    let make = "CREATE ROLE dated; ALTER ROLE dated SET work_mem = '5MB'; ALTER DATABASE shop SET work_mem = '5MB';
        ALTER ROLE ALL SET lock_timeout = '5s';
        UPDATE pg_db_role_setting SET setconfig = ARRAY[split_part(setconfig[1], '=', 1) || '=nonsense']";
    source.batch_execute(make).await.unwrap();
    let told = warnings(&rig.copy_roles().await.unwrap());
    for warning in [
        "dated: the target does not take its value of work_mem; left out",
        "ALL: the target does not take the value of lock_timeout; left out",
    ] {
        assert!(told.iter().any(|told| told == warning), "{told:?}");
    }
    let made = schema::create_database(&rig.source, &rig.target, "shop", Existing::Keep, &rig.journal).await;
    let (limit, mut carried) = (ConnectionLimit::IsCarried, made.unwrap());
    let synced = schema::sync_database(&rig.source, &rig.target, "shop", &[], limit, &mut carried).await.unwrap();
    assert_eq!((synced.changed, synced.left.len()), (0, 1), "{synced:?}");
    assert!(synced.left[0].starts_with("ALTER DATABASE was refused"), "{synced:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_way_back_it_is_the_source_that_is_named() {
    let rig = Rig::start();
    let target = support::connect(&rig.target_cluster, "postgres").await;
    target.batch_execute("ALTER ROLE postgres PASSWORD 'of the target'").await.unwrap();
    let (journal, mut carried) = (Mirrored(&rig.journal), Carried::default());
    let reports = roles::copy_roles(&rig.target, &rig.source, &journal, &mut carried).await.unwrap();
    let told = warnings(&reports);
    let named = "postgres: its password verifier differs on the source and was left";
    assert!(told.iter().any(|told| told.starts_with(named)), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_away_from_roles_goes_and_what_is_the_targets_own_stays() {
    let rig = Rig::start();
    let source = support::connect(&rig.source_cluster, "postgres").await;
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let make =
        "SET password_encryption = 'scram-sha-256'; CREATE ROLE app LOGIN PASSWORD 'secret' VALID UNTIL '2099-01-01';
        CREATE ROLE \"Grüppe\"; CREATE ROLE chief; GRANT \"Grüppe\" TO app; GRANT chief TO app WITH ADMIN OPTION;
        ALTER ROLE app SET search_path = a, b; ALTER ROLE app SET app.x = '1'; COMMENT ON ROLE app IS 'it';
        CREATE ROLE old LOGIN PASSWORD 'old'; GRANT \"Grüppe\" TO old; GRANT old TO chief; CREATE ROLE leaver LOGIN;
        CREATE ROLE shared LOGIN PASSWORD 'p'; GRANT chief TO shared;
        ALTER ROLE ALL SET app.everyone = 'a'; ALTER ROLE ALL SET app.other = 'source''s'";
    source.batch_execute(make).await.unwrap();
    let make = "CREATE ROLE shared; CREATE ROLE own_group; GRANT own_group TO shared WITH ADMIN OPTION;
        ALTER ROLE shared SET app.own = '1'; COMMENT ON ROLE shared IS 'own'; ALTER ROLE ALL SET app.other = 'own'";
    target.batch_execute(make).await.unwrap();
    let mut carried = Carried::default();
    let mut forward = async || roles::copy_roles(&rig.source, &rig.target, &rig.journal, &mut carried).await.unwrap();
    let told = warnings(&forward().await);
    assert!(told.len() == 1 && told[0].starts_with("ALL: the target has another value of app.other"), "{told:?}");
    let everyone =
        "SELECT array_to_string(setconfig, ',') FROM pg_db_role_setting WHERE setrole = 0 AND setdatabase = 0";
    assert_eq!(text(&target, everyone).await, "app.other=own,app.everyone=a");

    let take = "REVOKE \"Grüppe\" FROM app; REVOKE ADMIN OPTION FOR chief FROM app; REVOKE chief FROM shared;
        ALTER ROLE app RESET search_path; ALTER ROLE app PASSWORD NULL VALID UNTIL 'infinity' NOLOGIN;
        COMMENT ON ROLE app IS NULL; ALTER ROLE old RENAME TO \"new 'er\"; DROP ROLE leaver; ALTER ROLE ALL RESET app.everyone";
    source.batch_execute(take).await.unwrap();
    let told = warnings(&forward().await);
    assert!(told.iter().any(|told| told.starts_with("leaver: it was dropped since")), "{told:?}");
    assert_eq!(told.len(), 2, "{told:?}");
    assert_eq!(text(&target, everyone).await, "app.other=own");
    let own = "SELECT concat_ws(' ', pg_has_role('shared', 'own_group', 'MEMBER'), (SELECT setconfig FROM pg_db_role_setting \
        WHERE setrole = 'shared'::regrole), shobj_description('shared'::regrole, 'pg_authid'), (SELECT rolcanlogin FROM pg_roles \
        WHERE rolname = 'leaver'))";
    assert_eq!(text(&target, own).await, "t {app.own=1} own t");
    // What only the target has out of the way, both are the same.
    let apart = "REVOKE own_group FROM shared; ALTER ROLE shared RESET app.own; COMMENT ON ROLE shared IS NULL; DROP ROLE leaver";
    target.batch_execute(apart).await.unwrap();
    assert_eq!(text(&target, ROLES).await, text(&source, ROLES).await);
    let again = forward().await;
    assert!(again.iter().all(|report| report.action == RoleAction::Unchanged), "{again:?}");
    assert!(!format!("{:?}", rig.journal.made.lock().unwrap()).contains("SCRAM"), "verifiers do not reach the journal");

    // The way back is the same, with what was the last to be on both.
    let take = "REVOKE chief FROM app; ALTER ROLE \"new 'er\" RENAME TO newest; ALTER ROLE newest PASSWORD NULL; \
        ALTER ROLE app RESET app.x";
    target.batch_execute(take).await.unwrap();
    source
        .batch_execute("CREATE ROLE own_group; GRANT own_group TO app; ALTER ROLE app SET app.own = '1'")
        .await
        .unwrap();
    let reports = roles::copy_roles(&rig.target, &rig.source, &Mirrored(&rig.journal), &mut carried).await.unwrap();
    let told = warnings(&reports);
    assert!(told.iter().all(|told| told.starts_with("ALL: ")), "{told:?}");
    let own = "SELECT concat_ws(' ', pg_has_role('app', 'own_group', 'MEMBER'), (SELECT setconfig FROM pg_db_role_setting \
        WHERE setrole = 'app'::regrole))";
    assert_eq!(text(&source, own).await, "t {app.own=1}");
    source.batch_execute("REVOKE own_group FROM app; ALTER ROLE app RESET app.own").await.unwrap();
    assert_eq!(text(&source, ROLES).await, text(&target, ROLES).await);
}

/// What the target's rights do not reach differs for ever. A rollback, or only its dry run, takes none of it from the source.
#[tokio::test(flavor = "multi_thread")]
async fn attributes_that_could_not_be_given_are_not_taken_away_on_the_way_back() {
    let mut rig = Rig::start();
    let source = support::connect(&rig.source_cluster, "postgres").await;
    let target = support::connect(&rig.target_cluster, "postgres").await;
    let make = "CREATE ROLE app LOGIN BYPASSRLS REPLICATION CONNECTION LIMIT 9; CREATE ROLE chief SUPERUSER NOLOGIN";
    source.batch_execute(make).await.unwrap();
    target.batch_execute("CREATE ROLE modest LOGIN CREATEROLE CREATEDB").await.unwrap();
    rig.whole.target.user = "modest".to_owned();
    rig.target = Connector::new(&rig.whole.target, "target", rig.target.instance()).unwrap();
    let carried = std::cell::RefCell::new(Carried::default());
    // Kept between one time and the next as the engine keeps it.
    let go = async |from: &Connector, to: &Connector, journal: &dyn Journal| {
        let kept = serde_json::to_value(&*carried.borrow()).unwrap();
        let mut kept: Carried = serde_json::from_value(kept).unwrap();
        let reports = roles::copy_roles(from, to, journal, &mut kept).await.unwrap();
        carried.replace(kept);
        warnings(&reports).iter().filter(|told| told.contains("could not be given")).count()
    };
    let back = Mirrored(&rig.journal);
    let attributes = "SELECT string_agg(concat_ws(' ', rolname, rolsuper, rolreplication, rolbypassrls, rolcanlogin, rolconnlimit), \
        ', ' ORDER BY rolname) FROM pg_roles WHERE rolname IN ('app', 'chief')";
    assert_eq!(go(&rig.source, &rig.target, &rig.journal).await, 2);
    assert_eq!(text(&target, attributes).await, "app f f f t 9, chief f f f f -1");
    for _ in 0..2 {
        go(&rig.target, &rig.source, &back).await;
        assert_eq!(text(&source, attributes).await, "app f t t t 9, chief t f f f -1");
    }
    // It is tried and told each time; what has changed since goes back, and what was given after all and taken away, too.
    assert_eq!(go(&rig.source, &rig.target, &rig.journal).await, 2);
    target.batch_execute("ALTER ROLE app BYPASSRLS CONNECTION LIMIT 8").await.unwrap();
    go(&rig.target, &rig.source, &back).await;
    assert_eq!(text(&source, attributes).await, "app f t t t 8, chief t f f f -1");
    assert_eq!(go(&rig.source, &rig.target, &rig.journal).await, 2);
    target.batch_execute("ALTER ROLE app NOBYPASSRLS NOLOGIN").await.unwrap();
    go(&rig.target, &rig.source, &back).await;
    assert_eq!(text(&source, attributes).await, "app f t f f 8, chief t f f f -1");
}
