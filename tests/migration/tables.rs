//! Tables that a server treats in its own way.

use pgcutover::catalog::decision::Outcome;
use pgcutover::config::Ddl;
use pgcutover::demo::compare;
use pgcutover::ident::QualifiedName;
use pgcutover::switch::Epoch;

use crate::support::{connect, installations, wait_for};
use crate::world::{World, create, drain, reach, spec};

const TABLES: &str = "
    CREATE TABLE computed (k int, twice int GENERATED ALWAYS AS (k * 2) STORED);
    INSERT INTO computed (k) SELECT generate_series(1, 100);
    CREATE TABLE parent (k int PRIMARY KEY);
    CREATE TABLE child (k int PRIMARY KEY, parent int REFERENCES parent) PARTITION BY HASH (k);
    CREATE TABLE child_0 PARTITION OF child FOR VALUES WITH (MODULUS 1, REMAINDER 0);
    CREATE UNLOGGED TABLE fleeting (parent int REFERENCES parent)";

/// The first cannot be changed by the application from PostgreSQL 18 on, if its publication leaves out the generated column
/// by which its rows are identified. Of the others a TRUNCATE is streamed that names the leaf and not its root, to which the
/// foreign key belongs.
#[tokio::test(flavor = "multi_thread")]
async fn generated_columns_of_tables_without_keys_and_truncates_of_what_others_refer_to() {
    let world = World::same_major();
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute(TABLES).await.expect("made");
    let running = world.engine("");
    create(&running, spec("odd", &["shop"])).await;
    reach(&running, "odd", "WaitingForCutoverTrigger").await;
    for sql in [
        "UPDATE computed SET k = k + 1000 WHERE k <= 50",
        "DELETE FROM computed WHERE k BETWEEN 91 AND 999",
        "INSERT INTO parent VALUES (1), (2); INSERT INTO child VALUES (1, 1); INSERT INTO fleeting VALUES (2)",
        "TRUNCATE parent CASCADE",
        "INSERT INTO parent VALUES (3)",
    ] {
        source.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    drain(&running, "odd").await;
    let target = connect(&world.target, "shop").await;
    for client in [&source, &target] {
        compare::pin_text(client).await.expect("set");
    }
    for table in ["computed", "parent", "child_0"] {
        let table = QualifiedName::new("public", table);
        let digest = async |client| compare::digest(client, &table, "true", &[]).await.expect("read");
        assert_eq!(digest(&source).await, digest(&target).await, "{table}");
    }
    running.stop().await;
}

/// What was written down of it by the first attempt is nothing to be copied.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_dropped_before_it_was_published_is_not_asked_for() {
    let world = World::same_major().with(|config| config.migration.ddl = Ddl::Detect);
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    source.batch_execute("CREATE TABLE brief (k int PRIMARY KEY)").await.expect("made");
    let running = world.engine("engine.after_publication=error");
    create(&running, spec("brief", &["shop"])).await;
    wait_for("the failure", || async { running.engine.show("brief").is_ok_and(|view| view.substate == "Failed") })
        .await;
    running.stop().await;
    source.batch_execute("DROP TABLE brief; CREATE TABLE later (k int PRIMARY KEY)").await.expect("dropped");

    let running = world.engine("");
    wait_for("the migration", || async { running.engine.show("brief").is_ok() }).await;
    running.engine.retry("brief").await.expect("accepted");
    wait_for("the retry", || async { running.engine.show("brief").is_ok_and(|view| view.error.is_none()) }).await;
    reach(&running, "brief", "WaitingForCutoverTrigger").await;
    let tables = running.engine.tables("brief").expect("known");
    let has = |name: &str| tables.iter().any(|table| table.name == name);
    assert!(has("later") && !has("brief"), "{tables:?}");
    world.assert_equal("shop").await;
    running.stop().await;
}

/// Two tables of the same columns swap their names.
const SWAP: &str =
    "ALTER TABLE first RENAME TO aside; ALTER TABLE second RENAME TO first; ALTER TABLE aside RENAME TO second";

/// Names, columns and the publication are what they were, and a stream says of a row only what its table is called.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_swap_their_names_are_not_taken_for_each_other() {
    let world = World::same_major().with(|config| config.migration.ddl = Ddl::Detect);
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    let tables = "CREATE TABLE first (k int PRIMARY KEY, v text); CREATE TABLE second (LIKE first INCLUDING ALL);
                  INSERT INTO first VALUES (1, 'of the first'); INSERT INTO second VALUES (2, 'of the second')";
    source.batch_execute(tables).await.expect("made");
    let running = world.engine("");
    create(&running, spec("swapped", &["shop"])).await;
    reach(&running, "swapped", "WaitingForCutoverTrigger").await;

    source.batch_execute(SWAP).await.expect("swapped");
    let refused = running.engine.begin_cutover("swapped").await.map(drop).expect_err("their rows are another's");
    let refused = refused.to_string();
    assert!(refused.contains("rows of table public.first, which was public.second before"), "{refused}");
    // The other way round is as it was.
    source.batch_execute(SWAP).await.expect("swapped back");
    let lease = running.engine.begin_cutover("swapped").await.expect("nothing is wrong any more");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    reach(&running, "swapped", "WaitingForCutoverTrigger").await;

    source.batch_execute(SWAP).await.expect("swapped");
    source.batch_execute("INSERT INTO first VALUES (3, 'of the second')").await.expect("written");
    let failed = || async { running.engine.show("swapped").is_ok_and(|view| view.substate == "Failed") };
    wait_for("the failure", failed).await;
    let error = running.engine.show("swapped").expect("known").error.expect("why");
    assert_eq!(error.code, "schema_differs", "{error:?}");
    assert!(error.message.contains(r#"it was "public"."second""#), "{error:?}");
    let target = connect(&world.target, "shop").await;
    let count = target.query_one("SELECT count(*) FROM first", &[]).await.expect("counted");
    assert_eq!(count.get::<_, i64>(0), 1, "nothing is written where it does not belong");
    running.stop().await;
}

/// Versions write the same thing otherwise, or add to it: the arguments of procedures, identities of partitions, partitioned
/// tables that are said to be unlogged.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_major_writes_otherwise_is_no_difference() {
    let found = installations();
    let (old, new) = found.pair().expect("checked by installations()");
    let world = World::start(old, new);
    world.furnish("shop").await;
    let source = connect(&world.source, "shop").await;
    let tables = "CREATE TABLE visit (id bigint GENERATED BY DEFAULT AS IDENTITY, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
        CREATE TABLE visit_2026 PARTITION OF visit FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')";
    source.batch_execute(tables).await.expect("made");
    if old.major >= 11 {
        let procedure =
            "CREATE PROCEDURE pay(x int, \"IN y\" text, INOUT z int, VARIADIC v int[]) LANGUAGE plpgsql AS 'BEGIN END'";
        source.batch_execute(procedure).await.expect("made");
    }
    if old.major < 18 {
        let unlogged = "CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY) PARTITION BY LIST (id)";
        source.batch_execute(unlogged).await.expect("made");
    }
    let running = world.engine("");
    create(&running, spec("older", &["shop"])).await;
    reach(&running, "older", "WaitingForCutoverTrigger").await;
    let verified = running.engine.verify("older").await.expect("compared");
    assert_eq!(verified.differences, 0, "{verified:?}");
    let lease = running.engine.begin_cutover("older").await.expect("nothing is lacking");
    lease.prepare_return(Epoch(1)).await.expect("prepared");
    lease.finish(Outcome::Decided).await.expect("recorded");
    reach(&running, "older", "Completed").await;
    let lease = running.engine.begin_rollback("older").await.expect("nothing is lacking");
    lease.finish(Outcome::Aborted).await.expect("recorded");
    running.stop().await;
}
