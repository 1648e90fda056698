//! The dashboard in a real browser: the whole story by clicks, from the wizard to the cutover and what may follow, while
//! an application writes. Screenshots stay in `target/tmp/screenshots`.
//!
//! Needs Chromium and its driver (Debian: chromium and chromium-driver); where they are missing, the tests say so.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;
mod webdriver;

use pgcutover::demo::cluster::Cluster;
use serde_json::json;

use support::daemon::{Daemon, DaemonOptions};
use webdriver::Browser;

const TOKEN: &str = "t0ken-of-the-operator";

/// What must be true of every page, for people who do not see it or do not use a mouse.
const FAULTS: &str = "
    const faults = [];
    const named = (e) => (e.labels && e.labels.length) || e.getAttribute('aria-label') || e.textContent.trim();
    for (const e of document.querySelectorAll('button, a, input, select, progress')) if (!named(e)) faults.push(`no name: ${e.outerHTML}`);
    const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
    for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`twice: ${id}`);
    for (const e of document.querySelectorAll('[aria-labelledby], [aria-describedby], [aria-controls]'))
        for (const name of ['aria-labelledby', 'aria-describedby', 'aria-controls'])
            for (const id of (e.getAttribute(name) || '').split(' ').filter(Boolean))
                if (id !== 'dialog-title' && !document.getElementById(id)) faults.push(`${name} leads nowhere: ${id}`);
    if (document.querySelectorAll('h1').length !== 1) faults.push(`${document.querySelectorAll('h1').length} h1`);
    if (!document.documentElement.lang) faults.push('no language');
    if (document.documentElement.scrollWidth > innerWidth) faults.push(`wider than the window: ${document.documentElement.scrollWidth}`);
    return faults;";

/// A browser, or the reason why there is none, said aloud.
fn browser(name: &str) -> Option<Browser> {
    match Browser::start(name) {
        Ok(browser) => Some(browser),
        Err(missing) => {
            println!("not run: {missing}");
            eprintln!("{name}: not run: {missing}");
            None
        }
    }
}

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

fn check(browser: &Browser, name: &str) {
    browser.screenshot(name);
    assert_eq!(browser.run(FAULTS), json!([]), "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_story_by_clicks() {
    let Some(browser) = browser("story") else { return };
    let (source, target) = shop().await;
    let options = DaemonOptions::default().section("admin", &format!("token = \"{TOKEN}\""));
    let daemon = Daemon::start(&source, &target, options);
    let application = support::connect_with(&daemon.client("shop")).await;
    let pid = |row: tokio_postgres::Row| row.get::<_, i32>(0);
    let port = async || application.query_one("SELECT current_setting('port')::int", &[]).await.map(pid).unwrap();
    assert_eq!(port().await, i32::from(source.port()));

    browser.open(&format!("http://127.0.0.1:{}/", daemon.admin_port));
    browser.wait_for("main", "Nothing is being moved");
    browser.wait_for("#link", "Live");
    check(&browser, "01-empty");
    browser.click("#token-button");
    browser.type_into("#token", TOKEN);
    browser.click("#dialog-yes");

    browser.click("main a.primary");
    browser.click("#wizard-next");
    browser.wait_for("[role=alert].notice", "Give it a name");
    browser.type_into("#name", "move-1");
    browser.click("#test");
    browser.wait_for("#findings", "Both servers answer");
    check(&browser, "02-wizard-servers");
    browser.click("#wizard-next");
    browser.click("#which-some");
    browser.click("#database-shop");
    check(&browser, "03-wizard-databases");
    browser.click("#wizard-next");
    browser.wait_for("#step-title", "Options");
    check(&browser, "04-wizard-options");
    browser.click("#wizard-next");
    browser.wait_for("#summary", "shop");
    check(&browser, "05-wizard-summary");
    browser.click("#wizard-next");

    browser.wait_for("#cut-over", "Cut over");
    browser.wait_for(".pill", "Ready to cut over");
    application.execute("INSERT INTO orders (note) VALUES ('while it runs')", &[]).await.unwrap();
    browser.wait_for(".chart text:nth-of-type(2)", "now");
    check(&browser, "06-ready");
    browser.click("#tab-tables");
    browser.wait_for("#panel", "public.customer");
    browser.type_into("#filter", "orders");
    browser.wait_for("#panel .hint", "1 of 2 tables");
    check(&browser, "07-tables");
    browser.click("#tab-validation");
    browser.wait_for("#panel", "Instance");
    check(&browser, "08-validation");
    browser.click("#tab-sessions");
    browser.wait_for("#panel", "127.0.0.1");
    check(&browser, "09-sessions");
    browser.click("#tab-events");
    browser.wait_for("#panel", "order create");
    check(&browser, "10-events");
    browser.click("#tab-overview");

    browser.click("#dry-run");
    browser.wait_for("#report", "Dry run");
    assert_eq!(port().await, i32::from(source.port()));
    check(&browser, "11-dry-run");
    browser.click("#cut-over");
    browser.wait_for("#pending", "pending changes");
    check(&browser, "12-confirm");
    browser.click("#dialog-no");
    assert_eq!(port().await, i32::from(source.port()), "it was turned down");
    browser.click("#cut-over");
    browser.click("#dialog-yes");
    browser.wait_for("#report", "Switched");
    browser.wait_for(".pill.good", "Succeeded");
    assert_eq!(port().await, i32::from(target.port()), "the same connection, on the target");
    application.execute("INSERT INTO orders (note) VALUES ('on the target')", &[]).await.unwrap();
    check(&browser, "13-switched");
    if browser.run("return document.getElementById('roll-back') !== null") == json!(true) {
        browser.click("#roll-back");
        browser.click("#dialog-yes");
        browser.wait_for("main", "run on the source again");
        assert_eq!(port().await, i32::from(source.port()));
        check(&browser, "14-rolled-back");
    }

    browser.click(".brand");
    browser.wait_for("main table", "move-1");
    browser.click("#theme-button");
    check(&browser, "15-list-dark");
    browser.resize(420, 900);
    check(&browser, "16-list-narrow");
    browser.click("main table a");
    browser.wait_for("h1", "move-1");
    check(&browser, "17-detail-narrow");
    assert_eq!(browser.complaints(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_keyboard_alone_and_with_a_validation_that_fails() {
    let Some(browser) = browser("keyboard") else { return };
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
