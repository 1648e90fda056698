//! The cutover: sessions held, replication drained, one decision made durable, backends switched.
//!
//! [`coordinator`] takes the order and answers with a [`report`]; its `walk` is the whole story. [`steps`] is the
//! protocol itself, one type for each step, and [`work`] what they hand on. [`startup`] finds out after a start who is
//! active and settles what a crash has left. What survives a crash is in [`crate::catalog`]. A decision is durable
//! before any session can act on it, and an abort is a decision too.
//!
//! # What is durable when
//!
//! ```text
//! step      server left (fence row)        server led to (decision row)     after a crash
//! prepare   –                              –                                nothing has happened
//!           fence 1 + read-only default    –                                aborted 1, settings restored
//! pause     connections refused            –                                the same
//! drain     marker                         sequences                        the same: the target is not active
//! decide                                   boundary                         the same
//!                                          decided 1                        switched
//! switch    fence 1 decided                                                 switched
//! ```
//!
//! Where foreign keys and triggers come with the cutover (`late`), the transaction that makes them is open from the drain on and
//! committed first of all in the switch; whoever reads `decided` after a crash makes them before anybody is let in.
//!
//! # Rollback
//!
//! The same steps with source and target exchanged, fed by the stream that has carried everything back since the first
//! write on the target; epochs go on. What it adds is the fence that still stands on the server it leads back to
//! (`home`): ajar from prepare on, lifted after the gates have opened, shut again by an abort. Each cutover and each
//! rollback prepares the stream for the way back before it fences anything ([`parts::Lease::prepare_return`]), so that one
//! can go there and back as often as wanted. A stream begins behind the boundary row of its epoch: what was applied before
//! came from the other side, and is not sent back.
//!
//! # After a decided cutover
//!
//! The server that was left stays fenced, so that a writer that knows its address fails instead of writing where nobody
//! reads any more: read-only by default and no connections to the migrated databases. To look at the old data, or when
//! the old server is to be used for something else, lift it by hand as superuser from another database:
//! `ALTER DATABASE d ALLOW_CONNECTIONS true`, `ALTER DATABASE d CONNECTION LIMIT -1`,
//! `ALTER DATABASE d RESET default_transaction_read_only`. The values from before are in `pgcutover.fence (saved)`.

pub mod coordinator;
mod decide;
mod drain;
pub mod forecast;
mod guardrails;
pub mod hard_fence;
mod home;
mod late;
mod leadership;
mod marker;
pub mod parts;
pub mod phase;
pub mod report;
mod settle;
mod slowdown;
mod soft_fence;
pub mod startup;
pub mod steps;
mod undo;
mod work;

use std::time::Duration;

use self::hard_fence::Obstacle;
use crate::catalog::RecordError;
use crate::catalog::migrations::CatalogError;
use crate::failpoint;
use crate::migration::late::LateError;
use crate::migration::sequences::SequenceError;
use crate::migration::unstreamed::UnstreamedError;
use crate::postgres::ConnectError;

/// Why a cutover stopped. The text is the reason in the report: for operators, never for clients of the proxy.
#[derive(Debug, thiserror::Error)]
pub enum CutoverError {
    /// A server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A statement failed.
    #[error("could not {what}: {}", explain(source))]
    Query {
        /// What was being done.
        what: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The schema with fences and decisions could not be read or written.
    #[error("{}", chain(.0))]
    Record(#[from] RecordError),
    /// The rows of migrations could not be read.
    #[error("{}", chain(.0))]
    Catalog(#[from] CatalogError),
    /// Sequences could not be read or set.
    #[error("{}", chain(.0))]
    Sequences(#[from] SequenceError),
    /// Unlogged tables or large objects could not be carried.
    #[error("{}", chain(.0))]
    Unstreamed(#[from] UnstreamedError),
    /// Definitions that come late could not be made.
    #[error("{}", chain(.0))]
    Late(#[from] LateError),
    /// Something that must hold before a cutover does not, whatever is ordered.
    #[error("{0}")]
    Guardrail(String),
    /// The same of something that can cost time or connections, and never data: `--force` goes past it.
    #[error("{0}")]
    Forceable(String),
    /// Somebody is in the way.
    #[error("{what}: {}", list(obstacles))]
    Blocked {
        /// What could not be done, and after how long.
        what: String,
        /// Who.
        obstacles: Vec<Obstacle>,
    },
    /// Sessions that cannot be moved.
    #[error("sessions cannot be moved: {}", first(words))]
    Sessions {
        /// Who, and why, in words.
        words: Vec<String>,
        /// The same for a list of all of them.
        obstacles: Vec<Obstacle>,
    },
    /// The engine could not take part, or lost the stream.
    #[error("replication: {0}")]
    Engine(String),
    /// What no stream carries could not be brought over before the pause.
    #[error("what no stream carries: {0}")]
    Synchronise(String),
    /// Definitions that the other server lacks, or that were changed after they had been compared.
    #[error("{0}")]
    Definitions(String),
    /// The pause would have become longer than allowed.
    #[error("max_pause of {0:?} reached")]
    MaxPause(Duration),
    /// An order to stop.
    #[error("{0}")]
    Stopped(&'static str),
    /// A test said so.
    #[error(transparent)]
    Failpoint(#[from] failpoint::Failed),
    /// Something that this program holds for impossible.
    #[error("internal error: {0}")]
    Unexpected(String),
}

impl CutoverError {
    fn query(what: &str, source: tokio_postgres::Error) -> Self {
        Self::Query { what: what.to_owned(), source }
    }

    /// What mends it; none: the message says all that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Connect(_) => {
                Some("`pgcutover check` tests both connections; make both servers reachable, then order it again")
            }
            Self::Record(RecordError::Contradiction { .. }) => Some(
                "sessions go on where the rows in schema pgcutover of both servers say, and `pgcutover status` says where that is; \
                 find out who else has written there",
            ),
            Self::Query { .. }
            | Self::Record(_)
            | Self::Catalog(_)
            | Self::Sequences(_)
            | Self::Unstreamed(_)
            | Self::Late(_)
            | Self::Synchronise(_) => {
                Some("`pgcutover check` tests both connections and the rights; the server's log has the statement")
            }
            Self::Definitions(_) => Some(
                "nothing has changed, and --force does not go past it: rows would be lost, or what sessions need be missing; define \
                 the same on both servers, or undo it, then order it again; on a server that is shut: the runbook, \"Something has \
                 to be defined on the server that was left\"",
            ),
            Self::Guardrail(_) => Some(
                "nothing has changed, and --force does not go past it: more than time and connections is at stake; `pgcutover \
                 migration show NAME` says where it stands, and --dry-run rehearses it",
            ),
            Self::Forceable(_) => Some(
                "nothing has changed; no data is at stake, so --force goes past it: the pause may then last as long as max_pause, \
                 which aborts it, and sessions that get no connection keep it from switching",
            ),
            Self::Blocked { .. } => Some(
                "wait until they have ended, end them (`pgcutover kill PID`), allow more with --drain-timeout, \
                 or order it with --stragglers terminate",
            ),
            Self::Sessions { .. } => Some(
                "`blockers` of this report are all of them, and `pgcutover show blockers` lists those that have run \
                 nothing since: let their clients give it up, or end them with `pgcutover kill PID`",
            ),
            Self::Engine(_) => Some(
                "`pgcutover migration show NAME` has the last error of the stream; order it again when it has caught up",
            ),
            Self::MaxPause(_) => Some(
                "the times of the steps say what was slow; allow more with --max-pause, or order it when less is going on",
            ),
            Self::Stopped(_) => Some("order it again when the daemon runs"),
            Self::Failpoint(_) | Self::Unexpected(_) => None,
        }
    }

    /// Who was in the way, if that was it.
    fn obstacles(&self) -> &[Obstacle] {
        match self {
            Self::Blocked { obstacles, .. } | Self::Sessions { obstacles, .. } => obstacles,
            Self::Connect(_)
            | Self::Query { .. }
            | Self::Record(_)
            | Self::Catalog(_)
            | Self::Sequences(_)
            | Self::Unstreamed(_)
            | Self::Late(_)
            | Self::Synchronise(_)
            | Self::Definitions(_)
            | Self::Guardrail(_)
            | Self::Forceable(_)
            | Self::Engine(_)
            | Self::MaxPause(_)
            | Self::Stopped(_)
            | Self::Failpoint(_)
            | Self::Unexpected(_) => &[],
        }
    }

    /// Whether `--force` goes past it.
    fn is_forceable(&self) -> bool {
        matches!(self, Self::Forceable(_))
    }
}

/// Sessions that are named, of many.
const NAMED_SESSIONS: usize = 10;

fn first(sessions: &[String]) -> String {
    let named = sessions.iter().take(NAMED_SESSIONS).map(String::as_str).collect::<Vec<_>>().join("; ");
    match sessions.len().saturating_sub(NAMED_SESSIONS) {
        0 => named,
        more => format!("{named}; and {more} more"),
    }
}

fn list(obstacles: &[Obstacle]) -> String {
    obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The server's own message where there is one; tokio-postgres says only "db error".
fn explain(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(refusal) => format!("{} [{}]", refusal.message(), refusal.code().code()),
        None => chain(error),
    }
}

/// An error with everything that caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut inner = error.source();
    while let Some(next) = inner {
        let said = match next.downcast_ref::<tokio_postgres::Error>() {
            Some(error) => explain(error),
            None => next.to_string(),
        };
        text = format!("{text}: {said}");
        inner = if next.is::<tokio_postgres::Error>() { None } else { next.source() };
    }
    text
}
