//! Reading a verdict where it stands, on connections that may be lost at any moment, and acting on an abort.

use super::CutoverError;
use super::soft_fence;
use crate::catalog::decision::{self, Case, Outcome};
use crate::catalog::fence::{self, Ended, Fence};
use crate::catalog::{RecordError, claims};
use crate::postgres::{Connector, Control};
use crate::switch::Epoch;

/// What asking brought.
#[derive(Debug)]
pub(super) enum Answer {
    /// This stands there, durably.
    Read(Outcome),
    /// No answer came; what stands there is not known.
    Lost(CutoverError),
}

/// Proposes to abort and reads what stands there. An open session is tried first, then a new one. A decision in flight
/// is waited for by the insert itself; one that a dead connection still carries loses against ours or wins against it.
pub(super) async fn ask(to: &Connector, control_database: &str, case: &Case, open: Option<&Control>) -> Answer {
    if let Some(control) = open
        && !control.is_closed()
        && let Ok(outcome) = propose_abort(control, case).await
    {
        return Answer::Read(outcome);
    }
    let fresh = async {
        let control = to.control(control_database, "settle").await?;
        propose_abort(&control, case).await
    };
    match fresh.await {
        Ok(outcome) => Answer::Read(outcome),
        Err(error) => Answer::Lost(error),
    }
}

async fn propose_abort(control: &Control, case: &Case) -> Result<Outcome, CutoverError> {
    let (identity, standby) = claims::identify(&**control).await?;
    if standby {
        return Err(CutoverError::Guardrail("the server that holds the decision is a standby now".to_owned()));
    }
    Ok(decision::propose(&**control, case, Outcome::Aborted, &identity).await?)
}

/// Lifts the fence on a new connection, exactly once whoever tries.
pub(super) async fn lift(from: &Connector, control_database: &str, fence: &Fence) -> Result<Ended, CutoverError> {
    let mut control = from.control(control_database, "lift").await?;
    soft_fence::lift(&mut control, fence).await
}

/// Notes in the fence row that the cutover was decided; the fence stays.
pub(super) async fn note_decided(control: &Control, epoch: Epoch) -> Result<(), CutoverError> {
    let Some((fence, _)) = fence::read(&**control, epoch).await? else {
        return Err(RecordError::Unreadable { what: format!("fence row {epoch} is missing") }.into());
    };
    fence::end(&**control, &fence, Outcome::Decided).await?;
    Ok(())
}
