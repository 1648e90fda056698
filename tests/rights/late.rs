//! Targets whose login role may not keep foreign keys and triggers from firing: they come with the cutover, and not without
//! it.

use pgcutover::demo::cluster::{Cluster, ClusterAuth};
use pgcutover::demo::compare;
use pgcutover::demo::shop::SHOP;

use crate::support::daemon::DaemonOptions;
use crate::support::link::{Cut, Link};
use crate::support::world::{COMPLETED, NAME, READY, World};
use crate::support::{connect, connect_with, shop, wait_for};
use crate::{LOGIN, RDS, RESERVED, application_login, begin, begin_on, clusters};

/// More of what acts on rows that are written, and of what hangs on it.
const ACTING: &str = "
    COMMENT ON CONSTRAINT rental_customer_id_fkey ON shop.rental IS 'whose';
    COMMENT ON TRIGGER rental_noted ON shop.rental IS 'noted';
    CREATE TRIGGER never BEFORE DELETE ON shop.film FOR EACH ROW EXECUTE PROCEDURE shop.note_rental();
    ALTER TABLE shop.film DISABLE TRIGGER never;
    CREATE RULE kept AS ON DELETE TO shop.film_stats DO ALSO NOTHING;
    CREATE POLICY everybody ON shop.film USING (true);
    ALTER TABLE shop.film ENABLE ROW LEVEL SECURITY";

/// What there is of that on a server, with all that is said of it.
async fn acting(cluster: &Cluster) -> Vec<String> {
    let sql = "
        SELECT format('foreign key %s of %s: %s, valid %s, %s', conname, conrelid::regclass, pg_get_constraintdef(oid),
                      convalidated, obj_description(oid, 'pg_constraint'))
          FROM pg_constraint WHERE contype = 'f' AND connamespace = 'shop'::regnamespace
        UNION ALL
        SELECT format('%s, enabled %s, %s', pg_get_triggerdef(t.oid), tgenabled, obj_description(t.oid, 'pg_trigger'))
          FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
         WHERE NOT tgisinternal AND c.relnamespace = 'shop'::regnamespace
        UNION ALL
        SELECT definition FROM pg_rules WHERE schemaname = 'shop'
        UNION ALL
        SELECT format('policy %s: %s', policyname, qual) FROM pg_policies
        UNION ALL
        SELECT format('row security of %s', oid::regclass) FROM pg_class WHERE relrowsecurity
        ORDER BY 1";
    let rows = connect(cluster, SHOP).await.query(sql, &[]).await.expect("readable");
    rows.iter().map(|row| row.get(0)).collect()
}

impl World {
    async fn make_acting(&self) {
        connect_with(&application_login(&self.source)).await.batch_execute(ACTING).await.expect("the owner may");
    }

    /// Until nothing is left of a cutover that made foreign keys without looking at rows.
    async fn wait_validated(&self) {
        wait_for("foreign keys to be validated", || async {
            let state = &self.view()["databases"][0]["state"];
            self.state() == COMPLETED && state == "Completed"
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_session_replication_role_foreign_keys_and_triggers_come_with_the_cutover() {
    let Some(world) = begin(RDS, RESERVED, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    world.make_acting().await;
    let source = connect_with(&application_login(&world.source)).await;
    let table = "CREATE TABLE shop.swapped (id int PRIMARY KEY, u int UNIQUE DEFERRABLE);
                 INSERT INTO shop.swapped VALUES (1, 1), (2, 2), (3, 3)";
    source.batch_execute(table).await.expect("the owner may");
    let application = world.application(6);
    world.migrate().await;
    // A table is emptied behind rows whose constraint is still to be looked at.
    let swap = "BEGIN; UPDATE shop.swapped SET u = 4 - u WHERE u <> 2; TRUNCATE shop.swapped;
                INSERT INTO shop.swapped VALUES (9, 9); COMMIT";
    source.batch_execute(swap).await.expect("written");
    drop(source);
    let view = world.view();
    let rules = view["validation"].as_array().expect("rules");
    let warned = rules.iter().find(|rule| rule["code"] == "session_replication_role").expect("a rule");
    assert_eq!(warned["outcome"], "Warning", "{warned}");
    world.wait_for_writes(&application, 100).await;
    assert_eq!(acting(&world.target).await, Vec::<String>::new());
    // Compared is what the cutover will make, and that takes it back.
    let report = world.daemon.json(&["migration", "verify", NAME]);
    assert_eq!(report["differences"], serde_json::json!(0), "{report}");
    let report = world.daemon.json(&["migration", "cutover", NAME, "--dry-run"]);
    assert!(report["would"].to_string().contains("lose-way-back"), "{report}");
    assert_eq!(acting(&world.target).await, Vec::<String>::new());

    world.wait_for_writes(&application, 100).await;
    let report = world.must_switch("cutover");
    assert!(report["notes"].to_string().contains("may not set session_replication_role"), "{report}");
    world.wait_for_writes(&application, 100).await;
    world.wait_validated().await;
    let refused = world.daemon.command(&["migration", "rollback", NAME]);
    assert!(!refused.status.success());
    world.wait_for_writes(&application, 100).await;
    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    let swapped = connect(&world.target, SHOP).await.query_one("SELECT sum(id) FROM shop.swapped", &[]).await;
    assert_eq!(swapped.expect("read").get::<_, i64>(0), 9);
    assert_eq!(acting(&world.source).await, acting(&world.target).await);
    world.daemon.must(&["migration", "complete", NAME]);
}

/// Nobody is let in before they are there, whatever happens between the decision and their commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_killed_before_they_are_committed_makes_them_at_the_next_start() {
    let Some(mut world) = begin(RESERVED, RESERVED, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    world.make_acting().await;
    let application = world.application(4);
    world.migrate().await;
    let here = acting(&world.source).await;
    let report = world.daemon.json(&["migration", "cutover", NAME, "--dry-run"]);
    assert!(report["would"].to_string().contains("the source's login role may not set"), "{report}");
    world.crash_at(READY, "cutover", "drain.after_applied=hang", "drain.after_applied").await;
    assert_eq!(world.serving_port().await, world.source.port());
    world.wait_until(READY).await;
    assert_eq!(acting(&world.target).await, Vec::<String>::new());
    world.wait_for_writes(&application, 50).await;

    world.crash_at(READY, "cutover", "switch.before_open=hang", "switch.before_open").await;
    assert_eq!(world.serving_port().await, world.target.port());
    assert_eq!(acting(&world.target).await.len(), here.len());
    world.wait_validated().await;
    assert_eq!(acting(&world.target).await, here);
    world.wait_for_writes(&application, 50).await;
    let outcomes = application.finish().await;
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offline_migration_ends_with_them() {
    let Some(world) = begin(RDS, RESERVED, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    world.make_acting().await;
    world.daemon.must(&["migration", "create", NAME, "--database", SHOP, "--mode", "offline", "--wait"]);
    assert_eq!(world.state(), COMPLETED);
    assert_eq!(acting(&world.source).await, acting(&world.target).await);
    let (source, target) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    assert_eq!(compare::differences(&source, &target).await.expect("both can be read"), Vec::<String>::new());
}

/// The code of what is wrong with a migration; empty: nothing.
fn error_code(view: &serde_json::Value) -> &str {
    view["error"]["code"].as_str().unwrap_or_default()
}

/// Between the decision and the answer to the COMMIT that puts them in force, the connection is lost.
async fn the_commit_is_lost(cut: Cut) {
    let Some((source, target)) = clusters(&ClusterAuth::Trust) else { return };
    let link = Link::to(target.address()).await;
    let through = DaemonOptions::default().section("target", &format!("port = {}", link.address.port()));
    let world = begin_on((source, target), RDS, RESERVED, through).await;
    world.make_acting().await;
    let application = world.application(4);
    world.migrate().await;
    world.wait_for_writes(&application, 50).await;
    link.cut_once_behind("UPDATE pgcutover.late_definition SET state = 'made'", cut);
    let report = world.daemon.json(&["migration", "cutover", NAME]);
    assert_eq!((report["outcome"].as_str(), link.cuts()), (Some("switched"), 1), "{report}");
    assert!(world.daemon.log().contains("foreign keys and triggers are made anew"));
    world.wait_for_writes(&application, 50).await;
    world.wait_validated().await;
    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    assert_eq!(acting(&world.source).await, acting(&world.target).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_never_arrives_is_made_up_for() {
    the_commit_is_lost(Cut::Before("COMMIT")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_is_lost_is_not_repeated() {
    the_commit_is_lost(Cut::After("COMMIT")).await;
}

const VALIDATED: &str = "SELECT convalidated FROM pg_constraint WHERE conname = 'rental_customer_id_fkey'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_violate_a_foreign_key_are_told_after_the_cutover_until_they_are_mended() {
    let Some(world) = begin(RDS, RESERVED, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    // As a superuser can, and a restore with triggers off.
    let violate = "BEGIN; SET LOCAL session_replication_role = replica;
                   UPDATE shop.rental SET customer_id = -1 WHERE id = (SELECT min(id) FROM shop.rental); COMMIT";
    connect(&world.source, SHOP).await.batch_execute(violate).await.expect("written");
    world.migrate().await;
    world.must_switch("cutover");
    wait_for("the violation to be told", || async { error_code(&world.view()) == "not_valid" }).await;
    let view = world.view();
    assert!(
        view["error"]["object"].as_str().is_some_and(|object| object.contains("rental_customer_id_fkey")),
        "{view}"
    );
    assert!(view["error"]["hint"].as_str().is_some_and(|hint| hint.contains("retry")), "{view}");
    let target = connect(&world.target, SHOP).await;
    let validated = async || target.query_one(VALIDATED, &[]).await.expect("it is there").get::<_, bool>(0);
    assert!(!validated().await);
    // It holds for what is written from now on.
    let refused = target.batch_execute("UPDATE shop.rental SET customer_id = -2 WHERE customer_id <> -1").await;
    assert_eq!(refused.expect_err("violates").code().map(|code| code.code()), Some("23503"));
    // Asked again too soon it is told again, after a restart as well.
    world.daemon.must(&["migration", "retry", NAME]);
    wait_for("the violation to be told again", || async { error_code(&world.view()) == "not_valid" }).await;

    target.batch_execute("DELETE FROM shop.rental WHERE customer_id = -1").await.expect("mended");
    world.daemon.must(&["migration", "retry", NAME]);
    wait_for("nothing to be wrong any more", || async {
        let view = world.view();
        error_code(&view).is_empty() && view["substate"] == "Completed"
    })
    .await;
    wait_for("the foreign key to be validated", || async { validated().await }).await;
    world.wait_validated().await;
    world.daemon.must(&["migration", "complete", NAME]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_applied_where_it_would_fire() {
    let Some(mut world) = begin(RDS, RESERVED, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    world.migrate().await;
    // Somebody makes a trigger on the target, which nobody hinders.
    let target = connect_with(&application_login(&world.target)).await;
    let trigger = "CREATE TRIGGER early BEFORE UPDATE ON shop.film FOR EACH ROW EXECUTE PROCEDURE shop.note_rental()";
    target.batch_execute(trigger).await.expect("the owner may");
    world.daemon.kill();
    world.daemon.start_again();
    wait_for("the trigger to be found", || async { error_code(&world.view()) == "would_fire" }).await;
    let view = world.view();
    assert!(view["error"]["message"].as_str().is_some_and(|message| message.contains("trigger early on shop.film")));
    target.batch_execute("DROP TRIGGER early ON shop.film").await.expect("the owner may");
    let change = "UPDATE shop.film SET title = title || ' again'";
    connect_with(&application_login(&world.source)).await.batch_execute(change).await.expect("written");
    world.daemon.must(&["migration", "retry", NAME]);
    world.wait_until(READY).await;
    world.daemon.must(&["migration", "cancel", NAME]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn definitions_are_not_carried_to_where_they_would_fire() {
    let options = DaemonOptions::default().section("migration", "ddl = \"apply\"");
    let Some(world) = begin(RDS, RESERVED, ClusterAuth::Trust, options).await else { return };
    let superuser = format!("ALTER ROLE {LOGIN} SUPERUSER");
    connect(&world.source, "postgres").await.batch_execute(&superuser).await.expect("a superuser may");
    // The validation says so too.
    world.daemon.must(&["migration", "create", NAME, "--database", SHOP, "--option", "migrate"]);
    wait_for("it to be refused", || async { error_code(&world.view()) == "would_fire" }).await;
    let view = world.view();
    assert!(view["error"]["message"].as_str().is_some_and(|message| message.contains("migration.ddl")), "{view}");
    world.daemon.must(&["migration", "cancel", NAME]);
}

/// What was kept for a cutover that never came is gone from the database that is also the control database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_forgets_them_in_the_control_database_too() {
    let Some(world) = begin(RDS, RESERVED, ClusterAuth::Trust, DaemonOptions::default()).await else { return };
    let make = format!(
        "CREATE SCHEMA kept AUTHORIZATION {SHOP}; SET ROLE {SHOP};
         CREATE TABLE kept.one (id int PRIMARY KEY); CREATE TABLE kept.other (id int PRIMARY KEY REFERENCES kept.one);
         INSERT INTO kept.one VALUES (1); INSERT INTO kept.other VALUES (1)"
    );
    connect(&world.source, "postgres").await.batch_execute(&make).await.expect("a superuser may");
    for cluster in [&world.source, &world.target] {
        let own = "ALTER DATABASE postgres OWNER TO pgcutover";
        connect(cluster, "postgres").await.batch_execute(own).await.expect("a superuser may");
    }
    world.daemon.must(&["migration", "create", NAME, "--database", "postgres"]);
    world.wait_until(READY).await;
    let target = connect(&world.target, "postgres").await;
    let kept = "SELECT count(*) FROM pgcutover.late_definition WHERE kind <> 'SETTINGS'";
    assert_eq!(target.query_one(kept, &[]).await.expect("kept").get::<_, i64>(0), 1);
    let report = world.daemon.json(&["migration", "cancel", NAME]);
    assert!(!report["left"].to_string().contains("\"schema\""), "{report}");
    let gone = "SELECT to_regclass('pgcutover.late_definition') IS NULL, to_regclass('pgcutover.fence') IS NOT NULL";
    let row = target.query_one(gone, &[]).await.expect("readable");
    assert!(row.get::<_, bool>(0) && row.get::<_, bool>(1), "forgotten, and what is not the migration's stays");
}
