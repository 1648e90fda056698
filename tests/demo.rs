//! The demo as scripts use it: `pgcutover demo --json`, small, with the real daemon.

mod support;

use std::process::{Command, Stdio};

#[test]
fn the_application_does_not_notice() {
    support::installations();
    let output = Command::new(env!("CARGO_BIN_EXE_pgcutover"))
        .args(["demo", "--json", "--scale", "0.05", "--clients", "32"])
        .stdin(Stdio::null())
        .output()
        .expect("the program can be run");
    let told = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}\n{printed}\n{told}", output.status);

    let report: serde_json::Value = serde_json::from_str(&printed).expect("standard output is the report alone");
    for key in
        ["client_errors", "reconnects", "missing_writes", "duplicate_writes", "late_source_writes", "differences"]
    {
        assert_eq!(report[key], 0, "{key}: {printed}");
    }
    for key in ["pause_ms", "longest_stall_ms", "tables_compared", "writes_after_switch", "direct_write_attempts"] {
        assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {printed}");
    }
    for phase in ["prepare", "pause", "drain", "decide", "switch"] {
        assert!(report["phases"][phase].is_number(), "{phase}: {printed}");
    }
}
