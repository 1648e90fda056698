//! Whether the server that is followed still has everything that was taken from it.
//!
//! A failover to a standby that lagged, or a restore, takes commits back that the target has already. The slot may have come
//! along, and then nothing else tells: START_REPLICATION at a position that the server has not reached waits until other
//! changes have got there, and leaves out those that were made meanwhile.
//!
//! ```text
//! source, timeline 1    0/1A000 … 0/1B050   streamed, durable on the target
//! standby               0/1A000             promoted: timeline 2 begins here; what it writes up to 0/1B050 nobody would get
//! ```
//!
//! So identifier and timeline of the server stand beside the progress, and where the timeline has changed, the position at
//! which the old one ended must not be behind what the target has. The judgement is pure.
//!
//! A server that was restored on its own timeline is behind only until it has written as much again: then nothing tells any
//! more. So that it was behind is kept in the place of its identifier, and nobody follows it again.

use super::{StreamError, transient_query};
use crate::catalog::claims::{self, ServerIdentity};
use crate::catalog::migrations::{CatalogError, Generation};
use crate::catalog::{RecordError, progress};
use crate::lsn::Lsn;
use crate::postgres::walsender::ReplicationConnection;
use crate::postgres::{Connector, Control};

/// The server cannot be followed, or not now.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// Its identity could not be read or kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It is a standby for now.
    #[error("the {server} is in recovery: it can be followed again once it was promoted")]
    InRecovery {
        /// `source` or `target`.
        server: String,
    },
    /// It has been taken back to an earlier state.
    #[error(
        "the {server} has been taken back to {flushed}, before {reached}, up to which its changes were taken over: it was restored, or is a standby that lagged; the target has changes that it has not"
    )]
    TakenBack {
        /// `source` or `target`.
        server: String,
        /// Where it stands.
        flushed: Lsn,
        /// What was taken over.
        reached: Lsn,
    },
    /// It had been taken back when it was looked at before; how far it is now tells nothing.
    #[error(
        "the {server} had been taken back when it was looked at before, to where changes of it were missing that the target has; what it has written since stands in their place"
    )]
    WasTakenBack {
        /// `source` or `target`.
        server: String,
    },
    /// The same, seen by what the engine has written on the other server, where it counts up with every start.
    #[error(
        "the {server} has been taken back: its changes were taken over by a later run of the engine than any that it knows of; it was restored, or is a standby that lagged"
    )]
    Forgotten {
        /// `source` or `target`.
        server: String,
    },
    /// It was promoted without the last changes.
    #[error(
        "the {server} was promoted at {switched}, before {reached}, up to which its changes were taken over: the target has changes that it has not"
    )]
    Lagged {
        /// `source` or `target`.
        server: String,
        /// Where the old timeline ended.
        switched: Lsn,
        /// What was taken over.
        reached: Lsn,
    },
    /// It is another cluster.
    #[error(
        "the {server} is not the cluster any more that changes were taken from: its system identifier, or the history of its timelines, is another"
    )]
    Replaced {
        /// `source` or `target`.
        server: String,
    },
}

impl HistoryError {
    /// Whether waiting helps.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::InRecovery { .. } => true,
            Self::Record(RecordError::Query { source, .. }) => transient_query(source),
            Self::Record(_)
            | Self::TakenBack { .. }
            | Self::WasTakenBack { .. }
            | Self::Forgotten { .. }
            | Self::Lagged { .. }
            | Self::Replaced { .. } => false,
        }
    }
}

/// What has to be done about a server.
#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    /// It is the one that was followed.
    Same,
    /// None was followed yet.
    First,
    /// It was promoted since: its history tells where the timeline that was followed ended.
    Promoted,
    TakenBack,
    /// It had been at an earlier look.
    WasTakenBack,
    Replaced,
}

/// Stands where the identifier of the server was that had been taken back; no server has such a one.
const TAKEN_BACK: &str = "taken back";

fn judge(followed: Option<&ServerIdentity>, now: &ServerIdentity, flushed: Lsn, reached: Lsn) -> Judgement {
    match followed {
        Some(followed) if followed.system_identifier == TAKEN_BACK => Judgement::WasTakenBack,
        Some(followed) if followed.system_identifier != now.system_identifier => Judgement::Replaced,
        Some(followed) if followed.timeline > now.timeline => Judgement::Replaced,
        Some(_) | None if flushed < reached => Judgement::TakenBack,
        Some(followed) if followed.timeline < now.timeline => Judgement::Promoted,
        Some(_) => Judgement::Same,
        None => Judgement::First,
    }
}

/// Where `timeline` ended, by the lines of a history file: `1<tab>0/3000148<tab>no recovery target specified`. None: it is no
/// ancestor.
fn ended_at(history: &str, timeline: i32) -> Option<Lsn> {
    let line = history.lines().find(|line| {
        let number = line.split_whitespace().next();
        number.and_then(|number| number.parse().ok()) == Some(timeline)
    })?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Makes sure that `server` has everything up to `reached`, and keeps who it is beside the progress. `control` and `target`
/// are sessions in the migrated database: of the server, and where the progress is.
pub async fn check(
    server: &Connector,
    control: &Control,
    target: &Control,
    migration: &str,
    generation: Generation,
    reached: Lsn,
) -> Result<(), StreamError> {
    let label = || server.label().to_owned();
    let (now, standby) = claims::identify(&**control).await.map_err(HistoryError::from)?;
    if standby {
        return Err(HistoryError::InRecovery { server: label() }.into());
    }
    let row = control
        .query_one("SELECT pg_catalog.pg_current_wal_flush_lsn(), pg_catalog.current_database()::text", &[])
        .await
        .map_err(|source| CatalogError::query("read the position of the server that is followed", source))?;
    let (flushed, database): (Lsn, &str) = (row.get(0), row.get(1));
    let followed = progress::followed(&**target, migration).await?;
    match judge(followed.as_ref(), &now, flushed, reached) {
        Judgement::Same => return Ok(()),
        Judgement::First => {}
        Judgement::TakenBack => return Err(HistoryError::TakenBack { server: label(), flushed, reached }.into()),
        Judgement::WasTakenBack => return Err(HistoryError::WasTakenBack { server: label() }.into()),
        Judgement::Replaced => return Err(HistoryError::Replaced { server: label() }.into()),
        Judgement::Promoted => {
            let before = followed.as_ref().map_or(now.timeline, |followed| followed.timeline);
            let mut replication = ReplicationConnection::connect(server, database).await?;
            let history = replication.timeline_history(now.timeline.unsigned_abs()).await?;
            replication.terminate().await?;
            match ended_at(&history, before) {
                Some(switched) if switched >= reached => tracing::info!(
                    migration,
                    server = server.label(),
                    from = before,
                    to = now.timeline,
                    %switched,
                    %reached,
                    "the server that is followed was promoted, and has everything"
                ),
                Some(switched) => return Err(HistoryError::Lagged { server: label(), switched, reached }.into()),
                None => return Err(HistoryError::Replaced { server: label() }.into()),
            }
        }
    }
    Ok(progress::follow(&**target, migration, generation, &now).await?)
}

/// Keeps what [`check`] has found, where it is certain: the server was behind `applied`, and nothing is applied that it had
/// not flushed. Positions of a copy are no such proof.
pub(super) async fn keep_taken_back(
    found: &StreamError,
    target: &Control,
    migration: &str,
    generation: Generation,
    applied: Lsn,
) -> Result<(), StreamError> {
    match found {
        StreamError::History(HistoryError::TakenBack { flushed, .. }) if *flushed < applied => {
            let nobody = ServerIdentity { system_identifier: TAKEN_BACK.to_owned(), timeline: 0 };
            Ok(progress::follow(&**target, migration, generation, &nobody).await?)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(system_identifier: &str, timeline: i32) -> ServerIdentity {
        ServerIdentity { system_identifier: system_identifier.to_owned(), timeline }
    }

    #[test]
    fn only_a_server_that_lacks_nothing_is_followed() {
        let (a1, a2, b1) = (server("a", 1), server("a", 2), server("b", 1));
        let was = server(TAKEN_BACK, 0);
        for (followed, now, flushed, judgement) in [
            (None, &a1, 9, Judgement::First),
            (None, &a1, 4, Judgement::TakenBack),
            (Some(&a1), &a1, 9, Judgement::Same),
            (Some(&a1), &a1, 5, Judgement::Same),
            (Some(&a1), &a1, 4, Judgement::TakenBack),
            (Some(&a1), &a2, 9, Judgement::Promoted),
            (Some(&a1), &a2, 4, Judgement::TakenBack),
            (Some(&a2), &a1, 9, Judgement::Replaced),
            (Some(&a1), &b1, 9, Judgement::Replaced),
            (Some(&was), &a1, 4, Judgement::WasTakenBack),
            (Some(&was), &a1, 9, Judgement::WasTakenBack),
            (Some(&was), &a2, 9, Judgement::WasTakenBack),
        ] {
            assert_eq!(judge(followed, now, Lsn(flushed), Lsn(5)), judgement, "{followed:?} {now:?} {flushed}");
        }
    }

    #[test]
    fn a_history_tells_where_each_timeline_ended() {
        let history = "1\t0/3000148\tno recovery target specified\n\n2\t16/B374D848\tat restore point \"x\"\n";
        assert_eq!(ended_at(history, 1), Some(Lsn(0x300_0148)));
        assert_eq!(ended_at(history, 2), Some(Lsn(0x16_B374_D848)));
        assert_eq!(ended_at(history, 3), None);
        assert_eq!(ended_at("", 1), None);
    }
}
