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
    reach("tab-overview");
    browser.press(right);
    browser.press(right);
    assert_eq!(focused(), json!("tab-validation"));
    browser.wait_for("#panel .pill.bad", "Failed");
    browser.wait_for("#panel pre", " ");
    check(&browser, "01-validation-failed");
    assert_eq!(browser.complaints(), [""; 0]);
}
