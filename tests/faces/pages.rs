//! Pages of the dashboard beside the story: without a mouse, with a token, with what goes wrong.

use pgcutover::demo::cluster::Cluster;
use serde_json::json;

use crate::browser::check;
use crate::support;
use crate::support::daemon::{Daemon, DaemonOptions};
use crate::webdriver::Browser;

const TOKEN: &str = "t0ken-of-the-operator";

async fn shop() -> (Cluster, Cluster) {
    let (source, target) = support::two_clusters();
    support::connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.unwrap();
    let sql = "CREATE TABLE customer (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);
               CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text);
               INSERT INTO customer (name) SELECT 'c' || g FROM generate_series(1, 20000) g;
               INSERT INTO orders (note) SELECT repeat('x', 50) FROM generate_series(1, 20000) g";
    support::connect(&source, "shop").await.batch_execute(sql).await.unwrap();
    (source, target)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_token_it_is_created_and_cancelled_by_clicks() {
    let Some(browser) = Browser::found("cancel") else { return };
    let (source, target) = shop().await;
    let daemon =
        Daemon::start(&source, &target, DaemonOptions::default().section("admin", &format!("token = \"{TOKEN}\"")));
    browser.open(&format!("http://127.0.0.1:{}/#/new", daemon.admin_port));
    browser.type_into("#name", "move-1");
    browser.click("#wizard-next");
    browser.wait_for("#dialog", "token");
    check(&browser, "01-the-token-is-asked-for");
    browser.type_into("#token", TOKEN);
    browser.click("#dialog-yes");
    browser.wait_for("#step-title", "Databases");
    browser.click("#wizard-next");
    browser.wait_for("#step-title", "Options");
    browser.click("#wizard-next");
    browser.wait_for("#summary", "move-1");
    browser.click("#wizard-next");
    browser.wait_for("#cut-over", "Cut over");
    browser.click("#cancel");
    browser.wait_for("#dialog", "rows that were copied to the target stay there");
    browser.click("#dialog-yes");
    browser.wait_for("main", "Cancelled:");
    browser.wait_for(".pill", "Cancelled");
    check(&browser, "02-cancelled");
    let admin = support::connect(&source, "postgres").await;
    let slots = admin.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.unwrap();
    assert_eq!(slots.get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_keyboard_alone_and_with_a_validation_that_fails() {
    let Some(browser) = Browser::found("keyboard") else { return };
    let (source, target) = shop().await;
    // What the migration would lose is a finding, with its fix.
    support::connect(&target, "postgres").await.batch_execute("CREATE DATABASE shop").await.unwrap();
    support::connect(&target, "shop").await.batch_execute("CREATE TABLE other (id int)").await.unwrap();
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());
    browser.open(&format!("http://127.0.0.1:{}/#/new", daemon.admin_port));
    browser.wait_for("#servers", "127.0.0.1");
    // Codes of keys: WebDriver, section 17.4.2.
    let (tab, enter, right, space) = ("\u{e004}", "\u{e007}", "\u{e014}", " ");
    let focused = || browser.run("return document.activeElement.id");
    let reach = |id: &str| {
        let mut tries = 0;
        while focused() != json!(id) {
            browser.press(tab);
            tries += 1;
            assert!(tries < 30, "{id} cannot be reached by Tab; the focus is at {}", focused());
        }
    };
    reach("name");
    browser.press("by-keyboard");
    browser.press(enter);
    browser.wait_for("#step-title", "Databases");
    assert_eq!(focused(), json!("step-title"), "the focus follows the step");
    reach("wizard-next");
    browser.press(enter);
    browser.wait_for("#step-title", "Options");
    reach("mode-online");
    browser.press(tab);
    reach("wizard-next");
    browser.press(space);
    browser.wait_for("#step-title", "Summary");
    reach("wizard-next");
    browser.press(enter);
    browser.wait_for(".pill.bad", "ValidationFailed");
    browser.wait_for("#retry", "Retry");
    reach("tab-overview");
    browser.press(right);
    browser.press(right);
    assert_eq!(focused(), json!("tab-validation"));
    browser.wait_for("#panel .pill.bad", "Failed");
    browser.wait_for("#panel pre", " ");
    check(&browser, "01-validation-failed");
    assert_eq!(browser.complaints(), [""; 0]);
}

/// Everything is shown before it is done, and turned down once.
#[tokio::test(flavor = "multi_thread")]
async fn what_differs_is_repaired_and_a_rule_is_mended_by_clicks() {
    let Some(browser) = Browser::found("mend") else { return };
    let (source, target) = shop().await;
    let here = support::connect(&source, "shop").await;
    let make = "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER always BEFORE INSERT ON customer FOR EACH ROW EXECUTE PROCEDURE later()";
    here.batch_execute(make).await.unwrap();
    let options = DaemonOptions::default().section("migration", "validation_interval = \"200ms\"");
    let daemon = Daemon::start(&source, &target, options);
    daemon.must(&["migration", "create", "mend", "--database", "shop", "--wait"]);
    let there = support::connect(&target, "shop").await;
    let harm = "UPDATE customer SET name = 'other' WHERE id = 7; DELETE FROM orders WHERE id IN (8, 9)";
    there.batch_execute(harm).await.unwrap();

    browser.open(&format!("http://127.0.0.1:{}/#/m/mend/overview", daemon.admin_port));
    browser.click("#verify");
    browser.wait_for("#differences", "3 differences");
    browser.run("document.querySelectorAll('#differences details').forEach((one) => { one.open = true; });");
    for listed in ["public.customer, 1 row", "differs (7)", "public.orders, 2 rows", "missing (8)", "missing (9)"] {
        browser.wait_for("#differences", listed);
    }
    check(&browser, "01-differences");
    browser.click("#repair");
    browser.wait_for("#to-repair", "shop: public.orders, 2");
    check(&browser, "02-repair");
    browser.click("#dialog-no");
    let count = "SELECT count(*) FROM orders WHERE id IN (8, 9)";
    assert_eq!(there.query_one(count, &[]).await.unwrap().get::<_, i64>(0), 0, "turned down");
    browser.click("#repair");
    browser.click("#dialog-yes");
    browser.wait_for("main", "Repaired 3 rows");
    browser.wait_for("#differences", "0 differences");
    assert_eq!(there.query_one(count, &[]).await.unwrap().get::<_, i64>(0), 2);

    here.batch_execute("ALTER TABLE customer ENABLE ALWAYS TRIGGER always").await.unwrap();
    browser.click("#tab-validation");
    let button = "[data-act=fix][data-rule=always_triggers]";
    browser.wait_for(button, "Fix");
    check(&browser, "03-rule");
    let enabled = async || {
        let sql = "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'always'";
        here.query_one(sql, &[]).await.unwrap().get::<_, String>(0)
    };
    browser.click(button);
    browser.wait_for("#dialog", "ENABLE TRIGGER");
    check(&browser, "04-fix");
    browser.click("#dialog-no");
    assert_eq!(enabled().await, "A", "shown, and nothing done");
    browser.click(button);
    browser.wait_for("#dialog", "ENABLE TRIGGER");
    browser.click("#dialog-yes");
    browser.wait_for("main", "always_triggers: Succeeded");
    assert_eq!(enabled().await, "O");
    assert_eq!(browser.complaints(), [""; 0]);
}

/// Nothing has moved, and the page must not say that it has.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_only_validated_or_copied_is_not_shown_as_switched() {
    let Some(browser) = Browser::found("validated") else { return };
    let (source, target) = shop().await;
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());
    let steps = || {
        let script = "const list = document.querySelector('[aria-label=\"Steps of the migration\"]');
            return [...list.children].map((step) => `${step.textContent} ${step.className}`);";
        browser.run(script)
    };
    let buttons = || browser.run("return document.querySelectorAll('section[aria-labelledby=cutover] button').length");
    let page = |name: &str| format!("http://127.0.0.1:{}/#/m/{name}/overview", daemon.admin_port);
    daemon.must(&["migration", "create", "looked", "--database", "shop", "--option", "validate", "--wait"]);
    browser.open(&page("looked"));
    browser.wait_for("section[aria-labelledby=cutover]", "the databases run where they ran");
    browser.wait_for(".pill", "Succeeded");
    assert_eq!(steps(), json!(["Prepare done", "Validate done", "Completed done"]));
    assert_eq!(buttons(), json!(0));
    check(&browser, "01-validated");
    daemon.must(&["migration", "create", "copied", "--database", "shop", "--mode", "offline", "--wait"]);
    browser.open(&page("copied"));
    browser.wait_for("h1", "copied");
    browser.wait_for(".pill", "Succeeded");
    assert_eq!(steps(), json!(["Prepare done", "Validate done", "Copy done", "Completed done"]));
    // It keeps its database from the next migration until it is completed.
    browser.wait_for("#complete", "Complete");
    browser.click("#complete");
    browser.wait_for("#dialog", "free for the next migration");
    browser.click("#dialog-yes");
    support::wait_for("the buttons to go", || async { buttons() == json!(0) }).await;
    assert_eq!(daemon.json(&["migration", "show", "copied"])["substate"], "Closed");
    assert_eq!(browser.complaints(), [""; 0]);
}
