//! The decision: the boundary, and the one row that makes the other server active.

use futures_util::future::try_join_all;

use super::CutoverError;
use super::hard_fence::Shutting;
use super::settle::{self, Answer};
use super::work::{LineSessions, Work};
use crate::catalog::decision::{self, Outcome};
use crate::config::FencePolicy;

impl Work {
    /// Writes the boundary of every database, behind everything that was applied. Beside that, where our locks on the tables are
    /// all that keeps out who gets round the fence, each session that has them answers: with one that was lost, rows may have
    /// been written behind the marker.
    pub(super) async fn write_boundaries(&self) -> Result<(), CutoverError> {
        let epoch = self.case.epoch;
        let sessions = || self.lines.iter().filter_map(|line| line.sessions.as_ref());
        let written = async {
            let written = sessions().map(|sessions| decision::write_boundary(&*sessions.onward, epoch));
            try_join_all(written).await.map(drop).map_err(CutoverError::from)
        };
        let locked = async {
            if self.options.fence == FencePolicy::Hard && self.shutting == Shutting::Everybody {
                return Ok(());
            }
            let answered = sessions().flat_map(|sessions| &sessions.locks).map(|locks| locks.batch_execute(""));
            let answered = try_join_all(answered).await.map(drop);
            answered.map_err(|source| CutoverError::query("keep the migrated tables locked", source))
        };
        tokio::try_join!(written, locked).map(drop)
    }

    /// Brings over where the sequences of every database stand. The other server is not active yet, so a retry sets
    /// everything again and nobody has seen it.
    pub(super) async fn bring_sequences(&mut self) -> Result<(), CutoverError> {
        let sessions = self.lines.iter_mut().filter_map(|line| line.sessions.as_mut());
        let brought = sessions
            .map(|LineSessions { marker, onward, sequences, .. }| async { sequences.bring_over(marker, onward).await });
        try_join_all(brought).await?;
        Ok(())
    }

    /// The same for those that have moved since they were brought over last.
    pub(super) async fn bring_moved_sequences(&self) -> Result<(), CutoverError> {
        let sessions = self.lines.iter().filter_map(|line| line.sessions.as_ref());
        let brought = sessions.map(|LineSessions { marker, onward, sequences, .. }| async {
            sequences.bring_moved(marker, onward).await
        });
        try_join_all(brought).await?;
        Ok(())
    }

    /// Sends the decision. From here on the answer is the other server's.
    pub(super) async fn send_decision(&self) -> Answer {
        let proposed = decision::propose(&*self.to.control, &self.case, Outcome::Decided, &self.to.identity);
        let limit = self.to.connector.server().connect_timeout;
        match tokio::time::timeout(limit, proposed).await {
            Ok(Ok(outcome)) => Answer::Read(outcome),
            Ok(Err(error)) => Answer::Lost(error.into()),
            Err(_) => Answer::Lost(CutoverError::Unexpected(format!("no answer to the decision within {limit:?}"))),
        }
    }

    /// Asks on a new connection what became of the decision.
    pub(super) async fn ask_again(&self) -> Answer {
        let limit = self.to.connector.server().connect_timeout;
        let asked = settle::ask(&self.to.connector, &self.control_database, &self.case, None);
        match tokio::time::timeout(limit, asked).await {
            Ok(answer) => answer,
            Err(_) => Answer::Lost(CutoverError::Unexpected(format!("no answer within {limit:?}"))),
        }
    }
}
