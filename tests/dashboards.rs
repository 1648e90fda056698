//! Every expression of `dashboards/` names metrics that exist, with labels that they have.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use pgcutover::telemetry::metrics::Metrics;
use serde_json::Value;

const DASHBOARD: &str = include_str!("../dashboards/pgcutover.json");
const ALERTS: &str = include_str!("../dashboards/alerts.yml");

/// Words of an expression that look like metric names.
fn metrics_of(expression: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = expression.split(|c| !word(c));
    words.filter(|word| word.starts_with("pgcutover_") || word.starts_with("process_")).map(str::to_owned).collect()
}

fn known() -> BTreeSet<String> {
    let metrics = Metrics::new().unwrap();
    let histograms = ["client_wait_seconds", "transaction_seconds", "cutover_phase_seconds", "cutover_pause_seconds"];
    let series = |name: &String| {
        let is_histogram = histograms.iter().any(|histogram| *name == format!("pgcutover_{histogram}"));
        let suffixes: &[&str] = if is_histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
        suffixes.iter().map(|suffix| format!("{name}{suffix}")).collect::<Vec<_>>()
    };
    metrics.names().iter().flat_map(series).collect()
}

fn expressions(panel: &Value) -> Vec<String> {
    let targets = panel["targets"].as_array().into_iter().flatten();
    targets.filter_map(|target| target["expr"].as_str()).map(str::to_owned).collect()
}

#[test]
fn every_panel_shows_metrics_that_exist() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let known = known();
    let mut ids = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{} has the id of another panel", panel["title"]);
        let expressions = expressions(panel);
        assert!(!expressions.is_empty(), "{} shows nothing", panel["title"]);
        for expression in expressions {
            let used = metrics_of(&expression);
            assert!(!used.is_empty(), "{expression}");
            assert!(used.is_subset(&known), "{}: {:?}", panel["title"], used.difference(&known));
        }
    }
}

#[test]
fn every_alert_watches_metrics_that_exist() {
    let known = known();
    let used = metrics_of(ALERTS);
    assert!(used.len() > 5);
    assert!(used.is_subset(&known), "{:?}", used.difference(&known));
}
