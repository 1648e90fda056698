//! `pgcutover check`: prints what the test of both connections found.

use super::output::Output;
use super::{CliError, Verdict};
use crate::admin::check;
use crate::config::Config;

/// Connects to both servers. Bad when something is in the way.
pub(super) async fn check(config: &Config, output: &Output) -> Result<Verdict, CliError> {
    let view = check::check(config).await;
    if output.is_json() {
        output.json(&serde_json::to_value(&view).unwrap_or_default());
    } else {
        for finding in &view.checks {
            let mark = if finding.ok { "ok   " } else { "FAIL " };
            output.line(&format!("{mark} {}: {}", finding.check, finding.found));
            if let Some(fix) = &finding.fix {
                output.line(&format!("      fix: {fix}"));
            }
        }
    }
    Ok(if view.ok { Verdict::Good } else { Verdict::Bad })
}
