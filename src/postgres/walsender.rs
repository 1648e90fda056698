//! Client of the walsender: slots, and the stream of decoded changes (PostgreSQL documentation, "Streaming Replication
//! Protocol"; `src/backend/replication/walsender.c`). tokio-postgres has no replication mode.
//!
//! # The protocol
//!
//! A connection whose startup packet says `replication=database` takes replication commands, and SQL, as simple queries:
//!
//! ```text
//! us                                            the walsender
//! CREATE_REPLICATION_SLOT "s" LOGICAL pgoutput
//!                         NOEXPORT_SNAPSHOT  →
//!                                            ←  row (slot_name, consistent_point, …), once every transaction
//!                                               that was open has ended
//! START_REPLICATION SLOT "s" LOGICAL 0/0
//!   (proto_version '1', …)                   →
//!                                            ←  CopyBothResponse
//!                                            ←  CopyData 'w' XLogData(start, end, send time, one pgoutput message)
//!                                            ←  CopyData 'k' keepalive(end, send time, reply requested)
//! CopyData 'r' status(written, flushed,
//!              applied, time, reply wanted)  →
//! ```
//!
//! From CopyBothResponse on both sides send when they like. A walsender that hears nothing for `wal_sender_timeout`
//! ends the connection, so status must flow even while the applier is blocked for minutes on a lock: a task of its own,
//! owned by [`ReplicationStream`], holds the writing half of the socket. It sends the last status reported through
//! [`Feedback`] whenever that changed (gathering changes for a moment), at once when the server asks, and otherwise every
//! third of `wal_sender_timeout`, at most ten seconds apart. It never invents a position.
//!
//! # What is durable: one timeline
//!
//! Only `flushed` matters to a logical slot: it becomes `confirmed_flush_lsn`, and what is before it will never be sent
//! again. It is to be reported only once the target has it on disk.
//!
//! ```text
//! source WAL    0/1500000  xid 742 begins (a large transaction)
//!               0/1500400  xid 743 begins
//!               0/1500900  commit record of 743, ends at 0/1500930
//!               0/1501000  commit record of 742, ends at 0/1501030
//!               0/1502000  a transaction of an unpublished table ends
//!
//! we receive    w Begin  (743) final_lsn=0/1500900        transactions come whole, in the order of their commits
//!               w Commit (743) end_lsn=0/1500930
//!               w Begin  (742) final_lsn=0/1501000
//!               k end=0/1500930                           in the middle of 742: `end` is never past a commit that
//!               w Commit (742) end_lsn=0/1501030          has not been sent whole
//!               k end=0/1502000                           nothing of ours up to here: idle time moves the slot too
//!
//! target        COMMIT of 743 durable   →  report flushed = 0/1500930
//!               742 still being applied →  report nothing new, the periodic status repeats 0/1500930
//!               COMMIT of 742 durable   →  report flushed = 0/1501030
//!               keepalive position 0/1502000 stored in the progress row, durable → report 0/1502000
//! ```
//!
//! Crash with 0/1500930 confirmed: the slot sends 742 again from its Begin, although it began before 0/1500930, because
//! a transaction belongs to the position of its *commit*. `START_REPLICATION … 0/X` with X before the confirmed position
//! is silently moved forward to it; the caller compares its progress with `confirmed_flush_lsn` before it starts.
//! The positions in the XLogData header are those of the decoded record and say nothing about progress.
//!
//! Positions reported never go back here: older servers would take `confirmed_flush_lsn` back with them.
//!
//! A server that is asked to stop (`fast`) waits until all it has written is confirmed, and then ends the stream. So
//! positions of keepalives are to be reported too, or the source cannot be shut down while we are connected.

mod nap;
mod stream;

use std::pin::pin;
use std::time::Duration;

use crate::ident::{quote_ident, quote_literal};
use crate::lsn::Lsn;
use crate::postgres::{ConnectError, Connector, RawConnection, RawError};
use crate::sqlstate;

pub use nap::Age;
#[cfg(any(test, fuzzing))]
pub(super) use stream::replication_message as read_message;
pub use stream::{Feedback, ReplicationMessage, ReplicationStream};

/// Longest time between two statuses.
const MAX_PERIOD: Duration = Duration::from_secs(10);

/// A server that does not even acknowledge our statuses for this long is gone.
const MAX_UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// A replication command failed, or the stream ended.
#[derive(Debug, thiserror::Error)]
pub enum WalsenderError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Somebody else streams from this slot, or holds it (55006).
    #[error("replication slot {slot:?} is in use: {message}")]
    SlotInUse {
        /// The slot.
        slot: String,
        /// The server's words; they name the process.
        message: String,
    },
    /// No such slot (42704).
    #[error("replication slot {slot:?} does not exist")]
    SlotMissing {
        /// The slot.
        slot: String,
    },
    /// A slot of this name is there already (42710).
    #[error("replication slot {slot:?} exists already")]
    SlotExists {
        /// The slot.
        slot: String,
    },
    /// The slot can give no changes any more: WAL that it needs is gone, or it was invalidated (55000).
    #[error("replication slot {slot:?} cannot be used: {message}")]
    SlotLost {
        /// The slot.
        slot: String,
        /// The server's words.
        message: String,
    },
    /// Transactions that were open did not end in time. The attempt was cancelled, nothing was left behind.
    #[error(
        "replication slot {slot:?} was not ready within {limit:?}: it waits for every transaction open on the server"
    )]
    SlotTimeout {
        /// The slot.
        slot: String,
        /// How long was waited.
        limit: Duration,
    },
    /// Anything else.
    #[error(transparent)]
    Raw(#[from] RawError),
}

impl WalsenderError {
    /// What an error about `slot` is.
    fn about(slot: &str, error: RawError) -> Self {
        let slot = slot.to_owned();
        match error {
            RawError::Server { code, report } if code == "55006" => Self::SlotInUse { slot, message: report.message },
            RawError::Server { code, .. } if code == "42704" => Self::SlotMissing { slot },
            RawError::Server { code, .. } if code == "42710" => Self::SlotExists { slot },
            RawError::Server { code, report } if code == "55000" => Self::SlotLost { slot, message: report.message },
            other => Self::Raw(other),
        }
    }
}

/// What a new slot starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreatedSlot {
    /// Transactions that commit after this position are sent.
    pub consistent_point: Lsn,
}

/// What dropping does with a slot that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenInUse {
    /// Wait until it is released.
    Wait,
    /// Fail with [`WalsenderError::SlotInUse`].
    Fail,
}

/// A connection in replication mode that is not streaming.
#[derive(Debug)]
pub struct ReplicationConnection {
    connection: RawConnection,
    connector: Connector,
}

impl ReplicationConnection {
    /// Connects as the configured user to `database`, with the settings pinned that the text of values depends on.
    pub async fn connect(connector: &Connector, database: &str) -> Result<Self, WalsenderError> {
        let mut login = connector.own_login(database, "walsender");
        login.parameters.push(("replication".to_owned(), "database".to_owned()));
        let connection = Box::pin(connector.raw(&login)).await?;
        // A walsender always reads, also while it sends.
        let limited = connection.stream.limit_unacknowledged(MAX_UNACKNOWLEDGED);
        limited.map_err(|error| connection.lost("preparing the socket", error))?;
        Ok(Self { connection, connector: connector.clone() })
    }

    /// `server_version_num`.
    pub fn version_num(&self) -> u32 {
        self.connection.version_num()
    }

    /// The walsender's process id.
    pub fn pid(&self) -> i32 {
        self.connection.pid
    }

    /// The history file of `timeline`: a line for each timeline before it, with its number and where it ended.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<String, WalsenderError> {
        let rows = self.connection.simple_query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.first().and_then(|row| row.get(1)?.clone());
        Ok(content.ok_or_else(|| self.connection.violation("answer to TIMELINE_HISTORY".to_owned()))?)
    }

    /// Makes a permanent pgoutput slot. The server waits until every transaction that is open has ended; after `limit`
    /// the attempt is cancelled on the server, which removes what it had made. (A connection merely dropped would leave
    /// the server waiting, and in the end a slot that nobody reads and that holds back WAL for ever.)
    pub async fn create_logical_slot(&mut self, name: &str, limit: Duration) -> Result<CreatedSlot, WalsenderError> {
        let sql = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput NOEXPORT_SNAPSHOT", quote_ident(name));
        let (pid, key) = (self.connection.pid, self.connection.cancel_key.clone());
        self.connection.send_query(&sql).await?;
        let mut cancelled = false;
        let answer = {
            let mut creation = pin!(self.connection.collect_rows());
            match tokio::time::timeout(limit, &mut creation).await {
                Ok(answer) => answer,
                Err(_) => {
                    cancelled = true;
                    self.connector.cancel(pid, &key).await?;
                    // It may still have succeeded before the cancel arrived.
                    creation.await
                }
            }
        };
        if cancelled && answer.as_ref().is_err_and(|error| error.sqlstate() == Some(sqlstate::QUERY_CANCELED)) {
            return Err(WalsenderError::SlotTimeout { slot: name.to_owned(), limit });
        }
        let rows = answer.map_err(|error| WalsenderError::about(name, error))?;
        let point = rows.first().and_then(|row| row.get(1)?.as_deref()?.parse().ok());
        let consistent_point =
            point.ok_or_else(|| self.connection.violation("answer to CREATE_REPLICATION_SLOT".to_owned()))?;
        Ok(CreatedSlot { consistent_point })
    }

    /// Removes a slot.
    pub async fn drop_slot(&mut self, name: &str, when_in_use: WhenInUse) -> Result<(), WalsenderError> {
        let wait = match when_in_use {
            WhenInUse::Wait => " WAIT",
            WhenInUse::Fail => "",
        };
        let sql = format!("DROP_REPLICATION_SLOT {}{wait}", quote_ident(name));
        let dropped = self.connection.simple_query(&sql).await;
        dropped.map(|_| ()).map_err(|error| WalsenderError::about(name, error))
    }

    /// Starts to stream `publication` from `slot`, at `from` or the slot's confirmed position, whichever is later.
    /// `proto_version`: 1 for every server; 2 needs 14, 3 needs 15, 4 needs 16. Streaming of running transactions and
    /// binary values stay off. Whether the publication exists is not known before the first change is decoded.
    pub async fn start(
        mut self,
        slot: &str,
        from: Lsn,
        publication: &str,
        proto_version: u32,
    ) -> Result<ReplicationStream, WalsenderError> {
        let period = self.status_period().await?;
        let sql = start_command(slot, from, publication, proto_version);
        self.connection.send_query(&sql).await?;
        loop {
            let frame = self.connection.next_frame().await?;
            match frame.tag {
                b'W' => return Ok(ReplicationStream::new(self.connection, period)),
                b'E' => return Err(WalsenderError::about(slot, RawError::from_error_response(&frame.body))),
                b'N' | b'S' => {}
                other => {
                    let what = format!("message {:?} in answer to START_REPLICATION", char::from(other));
                    return Err(self.connection.violation(what).into());
                }
            }
        }
    }

    /// Ends the connection.
    pub async fn terminate(self) -> Result<(), WalsenderError> {
        Ok(self.connection.terminate().await?)
    }

    /// A third of the server's `wal_sender_timeout`, at most [`MAX_PERIOD`].
    async fn status_period(&mut self) -> Result<Duration, WalsenderError> {
        let sql = "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";
        let rows = self.connection.simple_query(sql).await?;
        let timeout_ms: Option<u64> = rows.first().and_then(|row| row.first()?.as_deref()?.parse().ok());
        Ok(match timeout_ms {
            // 0: the server waits for ever.
            None | Some(0) => MAX_PERIOD,
            Some(ms) => Duration::from_millis((ms / 3).max(1)).min(MAX_PERIOD),
        })
    }
}

/// `publication_names` is a list of identifiers inside a string literal: quoted twice.
fn start_command(slot: &str, from: Lsn, publication: &str, proto_version: u32) -> String {
    format!(
        "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '{proto_version}', publication_names {})",
        quote_ident(slot),
        // The replication grammar knows '…' with doubled quotes and no E'…'; it takes a backslash as it stands.
        quote_literal(&quote_ident(publication)).trim_start_matches(" E").replace("\\\\", "\\"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_quote_what_they_name() {
        assert_eq!(
            start_command("s", Lsn(0x16_B374_D848), "it's \"a\\b\"", 1),
            "START_REPLICATION SLOT \"s\" LOGICAL 16/B374D848 (proto_version '1', \
             publication_names '\"it''s \"\"a\\b\"\"\"')"
        );
    }
}
