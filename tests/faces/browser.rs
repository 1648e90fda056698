//! The dashboard by clicks. Screenshots stay in `target/tmp/screenshots`, and every page is looked over on the way.

use pgcutover::demo::shop::SHOP;
use serde_json::json;

use crate::Face;
use crate::support::world::NAME;
use crate::webdriver::Browser;

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

/// Looks a page over, and keeps a picture of it.
pub fn check(browser: &Browser, name: &str) {
    browser.screenshot(name);
    assert_eq!(browser.run(FAULTS), json!([]), "{name}");
}

/// A person with a mouse.
pub struct Clicks {
    browser: Browser,
    switched: u32,
}

impl Clicks {
    /// Opens the dashboard.
    pub fn at(browser: Browser, admin_port: u16) -> Self {
        browser.open(&format!("http://127.0.0.1:{admin_port}/"));
        Self { browser, switched: 0 }
    }
}

impl Face for Clicks {
    async fn create(&mut self) {
        let browser = &self.browser;
        browser.wait_for("main", "Nothing is being moved");
        browser.wait_for("#link", "Live");
        check(browser, "01-empty");
        browser.click("main a.primary");
        browser.click("#wizard-next");
        browser.wait_for("[role=alert].notice", "Give it a name");
        browser.type_into("#name", NAME);
        browser.click("#test");
        browser.wait_for("#findings", "Both servers answer");
        check(browser, "02-wizard-servers");
        browser.click("#wizard-next");
        browser.click("#which-some");
        browser.click(&format!("#database-{SHOP}"));
        check(browser, "03-wizard-databases");
        browser.click("#wizard-next");
        browser.wait_for("#step-title", "Options");
        check(browser, "04-wizard-options");
        browser.click("#wizard-next");
        browser.wait_for("#summary", SHOP);
        check(browser, "05-wizard-summary");
        browser.click("#wizard-next");

        browser.wait_for("#cut-over", "Cut over");
        browser.wait_for(".pill", "Ready to cut over");
        browser.wait_for(".chart text:nth-of-type(2)", "now");
        check(browser, "06-ready");
        browser.click("#tab-tables");
        browser.wait_for("#panel", "shop.customer");
        browser.type_into("#filter", "customer");
        browser.wait_for("#panel .hint", "1 of");
        check(browser, "07-tables");
        browser.click("#tab-validation");
        browser.wait_for("#panel", "Instance");
        check(browser, "08-validation");
        browser.click("#tab-sessions");
        browser.wait_for("#panel", "127.0.0.1");
        check(browser, "09-sessions");
        browser.click("#tab-events");
        browser.wait_for("#panel", "order create");
        check(browser, "10-events");
        browser.click("#tab-overview");
    }

    async fn verify(&mut self) {
        self.browser.click("#verify");
        self.browser.wait_for("#differences", "0 differences");
    }

    async fn dry_run(&mut self) {
        self.browser.click("#dry-run");
        self.browser.wait_for("#report", "Dry run");
        check(&self.browser, "11-dry-run");
        self.browser.click("#cut-over");
        self.browser.wait_for("#pending", "pending changes");
        check(&self.browser, "12-confirm");
        self.browser.click("#dialog-no");
        assert_eq!(self.browser.run("return !document.getElementById('dialog').open"), json!(true), "turned down");
    }

    async fn cut_over(&mut self) {
        self.browser.click("#cut-over");
        self.browser.click("#dialog-yes");
        self.browser.wait_for("#report", "Switched to the target");
        self.browser.wait_for(".pill.good", "Succeeded");
        self.switched += 1;
        check(&self.browser, &format!("13-switched-{}", self.switched));
    }

    async fn roll_back(&mut self) {
        self.browser.click("#limits summary");
        self.browser.type_into("#max-pause", "50s");
        self.browser.click("#dry-run");
        self.browser.wait_for("#report", "Dry run of a rollback");
        self.browser.click("#roll-back");
        self.browser.click("#dialog-yes");
        self.browser.wait_for("main", "run on the source again");
        self.browser.wait_for("#report", "Rolled back to the source");
        check(&self.browser, "14-rolled-back");
    }

    async fn complete(&mut self) {
        let browser = &self.browser;
        browser.click("#complete");
        browser.click("#dialog-yes");
        browser.wait_for("main", "There is no way back to the source any more");
        check(browser, "15-completed");
        browser.click(".brand");
        browser.wait_for("main table", NAME);
        browser.click("#theme-button");
        check(browser, "16-list-dark");
        let wide = "return [...document.querySelectorAll('.scroll')].some((one) => one.scrollWidth > one.clientWidth)";
        assert_eq!(browser.run(wide), json!(false), "the list scrolls sideways");
        browser.resize(420, 900);
        check(browser, "17-list-narrow");
        browser.click("main table a");
        browser.wait_for("h1", NAME);
        check(browser, "18-detail-narrow");
        assert_eq!(browser.complaints(), [""; 0]);
    }
}
