//! Taking everything back, in the right order, from wherever a cutover has come to.
//!
//! A step notes here what it is *about* to do, so that a step which was dropped halfway, or whose answer was lost, is
//! undone as well. Every undo succeeds when there is nothing to undo.
//!
//! The order: the verdict (no decision can follow it), the server's fence (new backends can start again), our table
//! locks, what sessions have prepared, and only then the gates: a session that runs again must find nothing of ours.

use std::time::Duration;

use super::CutoverError;
use super::home;
use super::phase::Event;
use super::report::{CutoverOutcome, CutoverReport};
use super::settle::{self, Answer};
use super::work::Work;
use crate::catalog::decision::Outcome;
use crate::catalog::fence::Fence;

/// How long the server that a cutover leads to may take to note its abort. Sessions wait for it, and need not.
const NOTED_WITHIN: Duration = Duration::from_secs(1);

/// Longest wait between two attempts to lift a fence on a server that does not answer.
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// What may have been done.
#[derive(Debug, Default)]
pub(super) struct Undo {
    /// Sessions were asked to prepare their moves.
    pub(super) moves: bool,
    /// The soft fence, and with it everything that the row's saved settings restore.
    pub(super) fence: Option<Fence>,
    /// Gates were closed.
    pub(super) gates: bool,
    /// The fence of the server that a rollback leads back to was opened.
    pub(super) ajar: bool,
}

impl Work {
    /// Undoes everything and says so in a report. `outcome` is what the report calls it: an abort, or the planned end of
    /// a dry run.
    pub(super) async fn undo(
        mut self: Box<Self>,
        outcome: CutoverOutcome,
        error: Option<CutoverError>,
    ) -> CutoverReport {
        if self.phase.may_give_up()
            && let Err(rejected) = self.advance(Event::GiveUp)
        {
            tracing::error!(error = %rejected, "cutover");
        }
        if let Some(fence) = self.undo.fence.take()
            && let Err(standing) = self.take_back_fence(&fence).await
        {
            // The gates stay closed and the resolution takes over: it reads what stands on the servers.
            return self.report(CutoverOutcome::Aborted, Some(&standing));
        }
        for line in &mut self.lines {
            // Closing the sessions releases the table locks; a lock that is still waited for has its own time-out.
            line.sessions = None;
            line.gate.set_prepare_window(None);
            line.gate.set_return_window(None);
        }
        if std::mem::take(&mut self.undo.moves) {
            self.sessions.discard_moves(&self.case.databases);
        }
        if std::mem::take(&mut self.undo.gates) {
            self.open_gates(self.from.role, |line| line.earlier);
            self.let_sessions_go_on().await;
        }
        // The engine removes what it has prepared there; so it is shut after that.
        if let Err(reason) = self.lease.finish(Outcome::Aborted).await {
            tracing::warn!(migration = self.case.migration, reason, "the engine did not take the migration back");
        }
        if std::mem::take(&mut self.undo.ajar)
            && let Some(home) = self.home.take()
            && let Err(error) = home::shut_again(&self.to.connector, &self.control_database, &home).await
        {
            self.leave_chore(&format!("the {} could not be shut again", self.to.role), &error);
        }
        if let Err(rejected) = self.advance(Event::Finished) {
            tracing::error!(error = %rejected, "cutover");
        }
        self.report(outcome, error.as_ref())
    }

    /// Makes the abort durable and lifts the fence. Fails only when something else than an abort stands there, or when
    /// the process is stopping before the server answers: the next start goes on.
    async fn take_back_fence(&mut self, fence: &Fence) -> Result<(), CutoverError> {
        self.pass("abort.before_decision").await;
        let limit = self.to.connector.server().connect_timeout.min(NOTED_WITHIN);
        let asked = settle::ask(&self.to.connector, &self.control_database, &self.case, Some(&self.to.control));
        match tokio::time::timeout(limit, asked).await {
            Ok(Answer::Read(Outcome::Aborted)) => {}
            Ok(Answer::Read(Outcome::Decided)) => {
                let stands = Some(Outcome::Decided);
                let epoch = self.case.epoch;
                let error = crate::catalog::RecordError::Contradiction { epoch, wanted: Outcome::Aborted, stands };
                return Err(error.into());
            }
            // This coordinator alone could have decided this epoch, has not, and from here on never will: the step that
            // could was consumed. So a target that has died does not keep production waiting; the abort becomes durable
            // with the fence row below.
            Ok(Answer::Lost(_)) | Err(_) => {
                tracing::warn!(epoch = self.case.epoch.0, "the abort cannot be written on the {}", self.to.role);
            }
        }
        self.pass("abort.after_decision").await;
        let mut wait = Duration::from_millis(50);
        loop {
            match settle::lift(&self.from.connector, &self.control_database, fence).await {
                Ok(_) => break,
                Err(error @ CutoverError::Record(crate::catalog::RecordError::Contradiction { .. })) => {
                    return Err(error);
                }
                Err(error) => tracing::error!(%error, "the fence cannot be lifted yet; trying again"),
            }
            if self.orders.tasks.is_stopping() {
                return Err(CutoverError::Stopped("stopping while the server that is fenced does not answer"));
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_RETRY);
        }
        self.pass("abort.after_lift").await;
        Ok(())
    }

    /// A failpoint where there is no way back (any more): being told to fail changes nothing.
    pub(super) async fn pass(&self, name: &'static str) {
        if let Err(failed) = self.failpoint(name).await {
            tracing::warn!(%failed, "ignored: there is no way back here");
        }
    }
}
