//! `dashboards/`: every expression names metrics that exist, with labels that they have; every alert says what to do and
//! has a test; and promtool, where it is installed, takes the rules and runs their tests.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use pgcutover::telemetry::metrics::Metrics;
use serde_json::Value;

const DASHBOARDS: [(&str, &str); 3] = [
    ("overview", include_str!("../dashboards/overview.json")),
    ("migration", include_str!("../dashboards/migration.json")),
    ("proxy", include_str!("../dashboards/proxy.json")),
];
const ALERTS: &str = include_str!("../dashboards/alerts.yml");
const ALERT_TESTS: &str = include_str!("../dashboards/alerts_test.yml");

/// Labels that Prometheus adds, and those of histograms.
const ADDED: [&str; 3] = ["instance", "job", "le"];

/// Names of every series, with the labels that each can have.
fn known() -> BTreeMap<String, BTreeSet<String>> {
    let metrics = Metrics::new().unwrap();
    let histograms = [
        "client_wait_seconds",
        "transaction_seconds",
        "cutover_phase_seconds",
        "cutover_pause_seconds",
        "shadow_read_seconds",
    ];
    let mut known = BTreeMap::new();
    for name in metrics.names() {
        let is_histogram = histograms.iter().any(|histogram| *name == format!("pgcutover_{histogram}"));
        let suffixes: &[&str] = if is_histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
        let described = metrics.described().get(name);
        let own: BTreeSet<String> = described.into_iter().flat_map(|metric| metric.labels.clone()).collect();
        known.extend(suffixes.iter().map(|suffix| (format!("{name}{suffix}"), own.clone())));
    }
    known
}

/// Names that an expression uses, each with the labels that it selects by. Recorded names have a colon.
fn used(expression: &str) -> Vec<(String, Vec<String>)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find(is_word) {
        let word: String = rest[start..].chars().take_while(|c| is_word(*c)).collect();
        rest = &rest[start + word.len()..];
        let is_metric = word.starts_with("pgcutover_") || word.starts_with("process_") || word.contains(":pgcutover_");
        if !is_metric {
            continue;
        }
        let selector = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(inner, _)| inner);
        let labels = selector.split(',').filter_map(|part| part.split(['=', '!']).next()).map(str::trim);
        found.push((word, labels.filter(|label| !label.is_empty()).map(str::to_owned).collect()));
        rest = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or(rest, |(_, after)| after);
    }
    found
}

/// What an expression names that is not there.
fn faults(expression: &str, recorded: &BTreeSet<String>) -> Vec<String> {
    let known = known();
    let mut faults = Vec::new();
    for (name, labels) in used(expression) {
        match known.get(&name) {
            None if recorded.contains(&name) => {}
            None => faults.push(format!("there is no {name}")),
            Some(own) => {
                let strange = labels.iter().filter(|label| !own.contains(*label) && !ADDED.contains(&label.as_str()));
                faults.extend(strange.map(|label| format!("{name} has no label {label}")));
            }
        }
    }
    faults
}

#[test]
fn a_name_that_is_not_there_is_seen() {
    let none = BTreeSet::new();
    assert_eq!(faults("rate(pgcutover_bytes_total{direction=\"to_client\"}[1m])", &none), [""; 0]);
    assert_eq!(faults("rate(pgcutover_bites_total[1m])", &none), ["there is no pgcutover_bites_total"]);
    let expected = ["pgcutover_bytes_total has no label way"];
    assert_eq!(faults("pgcutover_bytes_total{database=~\"a\", way!=\"x\"}", &none), expected);
    assert_eq!(faults("a:pgcutover_b:c", &none), ["there is no a:pgcutover_b:c"]);
}

#[test]
fn every_panel_shows_metrics_that_exist() {
    for (file, text) in DASHBOARDS {
        let dashboard: Value = serde_json::from_str(text).unwrap();
        assert_eq!(dashboard["uid"], format!("pgcutover-{file}"));
        let mut ids = BTreeSet::new();
        let mut taken = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = &panel["title"];
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title} has the id of another panel");
            let side = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            for (x, y) in (0..side("w")).flat_map(|x| (0..side("h")).map(move |y| (x, y))) {
                assert!(taken.insert((side("x") + x, side("y") + y)), "{file}: {title} lies on another panel");
            }
            assert!(side("x") + side("w") <= 24, "{file}: {title} is outside");
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{title} shows nothing");
            for expression in targets.iter().map(|target| target["expr"].as_str().unwrap()) {
                assert!(!used(expression).is_empty(), "{expression}");
                assert_eq!(faults(expression, &BTreeSet::new()), [""; 0], "{file}: {title}");
            }
        }
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            if let Some(query) = variable["query"].as_str().filter(|query| query.starts_with("label_values(")) {
                assert_eq!(faults(query, &BTreeSet::new()), [""; 0], "{file}: {}", variable["name"]);
            }
        }
    }
}

/// Metrics that no panel needs to show.
const NOT_SHOWN: [&str; 1] = ["process_virtual_memory_bytes"];

#[test]
fn every_metric_is_in_a_panel() {
    let panels = DASHBOARDS.into_iter().flat_map(|(_, text)| {
        let dashboard: Value = serde_json::from_str(text).unwrap();
        dashboard["panels"].as_array().unwrap().clone()
    });
    let expressions = panels.flat_map(|panel| panel["targets"].as_array().unwrap().clone());
    let shown: BTreeSet<String> = expressions
        .flat_map(|target| used(target["expr"].as_str().unwrap()))
        .map(|(name, _)| {
            ["_bucket", "_sum", "_count"].iter().fold(name, |name, end| name.trim_end_matches(end).to_owned())
        })
        .collect();
    let metrics = Metrics::new().unwrap();
    let missing: Vec<&String> =
        metrics.names().iter().filter(|name| !shown.contains(*name) && !NOT_SHOWN.contains(&name.as_str())).collect();
    assert!(missing.is_empty(), "no panel of dashboards/ shows {missing:?}");
}

/// The values of a key of the rules' file, each on the key's own line or on the lines below it.
fn values(key: &str) -> Vec<String> {
    let lines: Vec<&str> = ALERTS.lines().collect();
    let starts = lines.iter().enumerate().filter_map(|(at, line)| {
        let value = line.trim_start().trim_start_matches("- ").strip_prefix(&format!("{key}: "))?;
        Some((at, value))
    });
    let folded = |at: usize| {
        let indent = lines[at].len() - lines[at].trim_start().len();
        let below = lines[at + 1..].iter().take_while(|line| line.len() - line.trim_start().len() > indent);
        below.map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    };
    starts.map(|(at, value)| if value == ">-" { folded(at) } else { value.to_owned() }).collect()
}

#[test]
fn every_rule_watches_metrics_that_exist() {
    let recorded: BTreeSet<String> = values("record").into_iter().collect();
    let expressions = values("expr");
    assert!(expressions.len() > 15 && !recorded.is_empty(), "{expressions:?}");
    for expression in expressions {
        assert!(!used(&expression).is_empty() || recorded.iter().any(|name| expression.contains(name)), "{expression}");
        assert_eq!(faults(&expression, &recorded), [""; 0], "{expression}");
    }
}

#[test]
fn every_alert_says_what_to_do_and_has_a_test() {
    let alerts = values("alert");
    assert_eq!(values("runbook").len(), alerts.len());
    assert_eq!(values("summary").len(), alerts.len());
    for alert in alerts {
        let tests = ALERT_TESTS.matches(&format!("alertname: {alert}\n")).count();
        assert!(tests > 0, "{alert} has no test");
    }
}

#[test]
fn promtool_takes_the_rules_and_their_tests_and_what_the_daemon_exports() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/dashboards");
    let run = |arguments: &[&str]| Command::new("promtool").args(arguments).current_dir(directory).output();
    let Ok(checked) = run(&["check", "rules", "alerts.yml"]) else {
        eprintln!("not run: promtool is not installed (Debian: prometheus)");
        return;
    };
    let text = |output: &std::process::Output| {
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    assert!(checked.status.success(), "{}", text(&checked));
    let tested = run(&["test", "rules", "alerts_test.yml"]).unwrap();
    assert!(tested.status.success(), "{}", text(&tested));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Metrics::new().unwrap().render().unwrap()).unwrap();
    let metrics = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::fs::File::open(file.path()).unwrap())
        .output()
        .unwrap();
    assert!(metrics.status.success(), "{}", text(&metrics));
}
