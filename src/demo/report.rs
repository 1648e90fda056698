//! The demo's last word, for people and for scripts.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::demo::inspection::Inspection;
use crate::demo::ledger::{self, ClientLedger};
use crate::demo::workload::{Outcome, Wait};

/// What `--json` prints. Keys may be added, none may be taken away.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// From the fence to the moment sessions went on.
    pub pause_ms: f64,
    /// The longest any client waited for any answer, over the whole run.
    pub longest_stall_ms: f64,
    /// The same, of requests that were under way during the cutover.
    pub longest_stall_at_cutover_ms: f64,
    /// Failed requests, wrong settings, lost notifications.
    pub client_errors: u64,
    /// Connections opened after a client's first.
    pub reconnects: u64,
    /// Acknowledged writes that the target does not have.
    pub missing_writes: u64,
    /// Rows beyond the first for one write.
    pub duplicate_writes: u64,
    /// Writes that the source accepted after the drain.
    pub late_source_writes: u64,
    /// Tables and materialised views compared.
    pub tables_compared: u64,
    /// What differs.
    pub differences: u64,
    /// Milliseconds of each phase of the cutover.
    pub phases: serde_json::Value,
    /// Majors, as in `15`.
    pub source_version: String,
    /// Majors, as in `18`.
    pub target_version: String,
    /// Connections of the application.
    pub clients: u64,
    /// Requests answered.
    pub requests: u64,
    /// Writes acknowledged over the whole run.
    pub acknowledged_writes: u64,
    /// Of these, the ones made on the target after the switch.
    pub writes_after_switch: u64,
    /// Notifications received.
    pub notifications: u64,
    /// Rows compared.
    pub rows_compared: u64,
    /// Attempts to write on the source after the switch; each must be refused.
    pub direct_write_attempts: u64,
    /// Cutovers that were aborted, and changed nothing, before the one that switched.
    pub aborted_cutovers: u64,
    /// Seconds from `migration create` to "ready to cut over".
    pub copy_seconds: f64,
    /// The first of everything that went wrong.
    pub complaints: Vec<String>,
}

/// What the run itself measured.
#[derive(Debug, Default)]
pub struct Run {
    /// The answer of `migration cutover`.
    pub cutover: serde_json::Value,
    /// Sent and answered.
    pub cutover_window: Option<Wait>,
    /// Writes acknowledged until its answer came: a few of them may have been made on the target already.
    pub writes_until_switch: u64,
    /// Aborted before it.
    pub aborted_cutovers: u64,
    /// From `create` to ready.
    pub copy: Duration,
    /// Majors of source and target.
    pub majors: (u16, u16),
    /// Direct writes tried on the source after the switch.
    pub direct_write_attempts: u64,
    /// Those that were not refused.
    pub direct_writes_accepted: Vec<String>,
}

impl Report {
    /// Puts everything together.
    pub fn new(run: &Run, outcomes: &[Outcome], inspection: &Inspection) -> Self {
        let ledgers: Vec<ClientLedger> = outcomes.iter().map(|outcome| outcome.ledger.clone()).collect();
        let writes = ledger::reconcile(&ledgers, &inspection.source_writes, &inspection.target_writes);
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let waits = || outcomes.iter().flat_map(|outcome| &outcome.waits);
        let at_cutover = waits().filter(|wait| run.cutover_window.is_some_and(|window| overlap(&window, wait)));
        let mut complaints: Vec<String> = outcomes.iter().flat_map(|outcome| outcome.errors.clone()).take(20).collect();
        complaints.extend(run.direct_writes_accepted.iter().cloned());
        complaints.extend(inspection.differences.iter().take(20).cloned());
        let heard: HashSet<i64> = outcomes.iter().flat_map(|outcome| &outcome.heard).copied().collect();
        let sent = outcomes.iter().flat_map(|outcome| &outcome.notified);
        let lost = sent.filter(|number| !heard.contains(number)).count();
        if lost > 0 {
            complaints.push(format!("notifications lost: {lost}"));
        }
        if writes.phantoms > 0 {
            complaints.push(format!("{} writes that were rolled back are on the target", writes.phantoms));
        }
        Self {
            pause_ms: number(&run.cutover["pause_ms"]),
            longest_stall_ms: longest_ms(waits()),
            longest_stall_at_cutover_ms: longest_ms(at_cutover),
            client_errors: outcomes.iter().map(|outcome| outcome.error_count).sum(),
            reconnects: outcomes.iter().map(|outcome| outcome.reconnects).sum(),
            missing_writes: writes.missing,
            duplicate_writes: writes.duplicates,
            late_source_writes: writes.late_on_source + count(run.direct_writes_accepted.len()),
            tables_compared: inspection.tables_compared,
            differences: count(inspection.differences.len()) + writes.phantoms,
            phases: run.cutover["phases_ms"].clone(),
            source_version: run.majors.0.to_string(),
            target_version: run.majors.1.to_string(),
            clients: count(outcomes.len()),
            requests: outcomes.iter().map(|outcome| outcome.requests).sum(),
            acknowledged_writes: writes.acknowledged,
            writes_after_switch: writes.acknowledged.saturating_sub(run.writes_until_switch),
            notifications: count(outcomes.iter().map(|outcome| outcome.heard.len()).sum()),
            rows_compared: inspection.rows_compared,
            direct_write_attempts: run.direct_write_attempts,
            aborted_cutovers: run.aborted_cutovers,
            copy_seconds: run.copy.as_secs_f64(),
            complaints,
        }
    }

    /// Whether nobody noticed and nothing was lost.
    pub fn is_clean(&self) -> bool {
        let bad = self.client_errors
            + self.reconnects
            + self.missing_writes
            + self.duplicate_writes
            + self.late_source_writes
            + self.differences;
        // A run in which nothing was written on the target, or nothing compared, has shown nothing.
        bad == 0 && self.writes_after_switch > 0 && self.tables_compared > 0
    }
}

fn overlap(window: &Wait, wait: &Wait) -> bool {
    wait.began <= window.began + window.lasted && window.began <= wait.began + wait.lasted
}

fn longest_ms<'a>(waits: impl Iterator<Item = &'a Wait>) -> f64 {
    waits.map(|wait| wait.lasted).max().unwrap_or_default().as_secs_f64() * 1000.0
}

fn number(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: String| writeln!(f, "  {name:<44}{value:>14}");
        line("moved", format!("{} → {}", self.source_version, self.target_version))?;
        line("connections of the application", self.clients.to_string())?;
        line("requests answered", self.requests.to_string())?;
        line("writes acknowledged", self.acknowledged_writes.to_string())?;
        line("  of these on the target, after the switch", self.writes_after_switch.to_string())?;
        line("notifications received", self.notifications.to_string())?;
        line("copy, from `create` to ready, s", format!("{:.1}", self.copy_seconds))?;
        for phase in ["prepare", "pause", "drain", "decide", "switch"] {
            let text = self.phases[phase].as_f64().map_or("unknown".to_owned(), |value| format!("{value:.1}"));
            line(&format!("cutover, {phase}, ms"), text)?;
        }
        line("pause, ms", format!("{:.1}", self.pause_ms))?;
        line("longest stall of a client at the cutover, ms", format!("{:.1}", self.longest_stall_at_cutover_ms))?;
        line("longest stall of a client, whole run, ms", format!("{:.1}", self.longest_stall_ms))?;
        if self.aborted_cutovers > 0 {
            line("cutovers aborted before", self.aborted_cutovers.to_string())?;
        }
        line("tables compared", self.tables_compared.to_string())?;
        line("rows compared", self.rows_compared.to_string())?;
        line("direct writes tried on the source afterwards", self.direct_write_attempts.to_string())?;
        line("client errors", self.client_errors.to_string())?;
        line("reconnects", self.reconnects.to_string())?;
        line("acknowledged writes missing", self.missing_writes.to_string())?;
        line("duplicate writes", self.duplicate_writes.to_string())?;
        line("writes on the source after the switch", self.late_source_writes.to_string())?;
        line("differences", self.differences.to_string())?;
        for complaint in &self.complaints {
            writeln!(f, "  ! {complaint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Instant;

    use super::*;

    fn good() -> Report {
        Report { writes_after_switch: 1, tables_compared: 1, ..Report::default() }
    }

    #[test]
    fn each_kind_of_harm_alone_makes_the_report_bad() {
        assert!(good().is_clean());
        assert!(!Report::default().is_clean(), "nothing was shown");
        for harm in [
            Report { client_errors: 1, ..good() },
            Report { reconnects: 1, ..good() },
            Report { missing_writes: 1, ..good() },
            Report { duplicate_writes: 1, ..good() },
            Report { late_source_writes: 1, ..good() },
            Report { differences: 1, ..good() },
        ] {
            assert!(!harm.is_clean());
        }
    }

    #[test]
    fn only_waits_that_meet_the_cutover_count_for_it() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let wait = |from, lasted| Wait { began: start + ms(from), lasted: ms(lasted) };
        let outcome = Outcome { waits: vec![wait(0, 900), wait(950, 100), wait(1_500, 300)], ..Outcome::default() };
        let run = Run { cutover_window: Some(wait(1_000, 100)), ..Run::default() };
        let report = Report::new(&run, &[outcome], &Inspection::default());
        assert!((report.longest_stall_ms - 900.0).abs() < 0.01);
        assert!((report.longest_stall_at_cutover_ms - 100.0).abs() < 0.01);
    }

    #[test]
    fn a_write_that_only_the_source_has_is_late_and_missing() {
        let mut ledger = ClientLedger::new(1);
        let number = ledger.next_number();
        ledger.acknowledge(number);
        let outcome = Outcome { ledger, ..Outcome::default() };
        let inspection = Inspection { source_writes: HashMap::from([(number, 1)]), ..Inspection::default() };
        let run = Run { writes_until_switch: 1, ..Run::default() };
        let report = Report::new(&run, &[outcome], &inspection);
        assert_eq!((report.missing_writes, report.late_source_writes, report.writes_after_switch), (1, 1, 0));
    }
}
