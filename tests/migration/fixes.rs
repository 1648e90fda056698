//! Every fix that `--fix RULE --yes` runs: its rule is silent afterwards.

use std::collections::BTreeSet;
use std::sync::Mutex;

use pgcutover::migration::engine::Applied;
use pgcutover::migration::preflight::{self, Apply, Outcome};
use pgcutover::migration::view::{FixReport, MigrationOption};

use crate::support::{connect, wait_for};
use crate::world::{World, create, reach, spec};

/// On which server, in which database.
#[derive(Clone, Copy, Debug)]
enum At {
    Source,
    Target,
}

/// The rule, and what makes it speak; each statement by itself.
const BROKEN: &[(&str, At, &str, &[&str])] = &[
    ("replica_identity", At::Source, "shop", &["CREATE TABLE bare (id int)"]),
    ("always_triggers", At::Source, "shop", &["ALTER TABLE orders ENABLE ALWAYS TRIGGER remember"]),
    (
        "invalid_indexes",
        At::Source,
        "shop",
        &[
            "CREATE INDEX broken ON orders (total)",
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken'::regclass",
        ],
    ),
    (
        "event_triggers",
        At::Source,
        "shop",
        &[
            "CREATE FUNCTION watched() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'",
            "CREATE EVENT TRIGGER watching ON sql_drop WHEN TAG IN ('DROP VIEW') EXECUTE FUNCTION watched()",
            "ALTER EVENT TRIGGER watching ENABLE ALWAYS",
        ],
    ),
    (
        "fence_settings",
        At::Source,
        "shop",
        &["CREATE ROLE stubborn", "ALTER ROLE stubborn SET default_transaction_read_only = off"],
    ),
    (
        "server_parameters",
        At::Source,
        "postgres",
        &["ALTER SYSTEM SET statement_timeout = '1h'", "SELECT pg_reload_conf()"],
    ),
    (
        "target_writable",
        At::Target,
        "postgres",
        &["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"],
    ),
];

fn is_silent(report: &FixReport) -> bool {
    report.found.iter().all(|result| result.outcome == Outcome::Succeeded)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fix_that_is_run_turns_its_rule_green() {
    let automatic: BTreeSet<&str> =
        preflight::rules().filter(|rule| matches!(rule.apply, Apply::Since(_))).map(|rule| rule.code).collect();
    assert_eq!(BROKEN.iter().map(|(rule, ..)| *rule).collect::<BTreeSet<_>>(), automatic, "each has a line");

    let world = World::same_major();
    world.furnish("shop").await;
    let running = world.engine("");
    let mut wanted = spec("look", &["shop"]);
    wanted.option = MigrationOption::Validate;
    create(&running, wanted).await;
    reach(&running, "look", "Completed").await;
    for (_, at, database, statements) in BROKEN {
        let cluster = match at {
            At::Source => &world.source,
            At::Target => &world.target,
        };
        let client = connect(cluster, database).await;
        for sql in *statements {
            client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
    }
    for (rule, ..) in BROKEN {
        // A server reads its configuration again when it gets to it; before that there is nothing to mend.
        let done = Mutex::new(None);
        wait_for(rule, || async {
            let run = running
                .engine
                .fix("look", rule, Applied::Now)
                .await
                .unwrap_or_else(|error| panic!("{rule}: {error:?}"));
            let applied = run.applied;
            *done.lock().expect("nobody panicked") = Some(run);
            applied
        })
        .await;
        let run = done.into_inner().expect("nobody panicked").expect("it was asked");
        assert!(!run.statements.is_empty() && run.refused.is_none() && !run.found.is_empty(), "{rule}: {run:#?}");
        assert!(is_silent(&run), "{rule}: {run:#?}");
    }
    running.stop().await;
}
