//! What a cutover asks of the proxy's sessions and of the engine.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use crate::catalog::decision::Outcome;
use crate::switch::{Epoch, ServerRole};

/// The proxied sessions.
#[async_trait]
pub trait Sessions: Send + Sync {
    /// Backends on the active server that serve sessions of `database`, those whose client has vanished and whose end
    /// is not proven included.
    fn backend_pids(&self, database: &str) -> Vec<i32>;

    /// Sessions of `database` that are inside a transaction.
    fn stragglers(&self, database: &str) -> Vec<Straggler>;

    /// Lets every session at a safe point open and fill its backend on the other server. Sessions that are busy do it
    /// at their next safe point.
    async fn prepare_moves(
        &self,
        databases: &[String],
        to: ServerRole,
        epoch: Epoch,
        deadline: Instant,
    ) -> Vec<MoveReport>;

    /// In the pause: held sessions bring their other backend up to date.
    async fn settle_moves(&self, databases: &[String], deadline: Instant) -> Vec<MoveReport>;

    /// Drops everything prepared.
    fn discard_moves(&self, databases: &[String]);

    /// Ends sessions with an error that their clients see.
    fn end(&self, sessions: &[u64], sqlstate: &'static str, message: &str);
}

/// A session that is inside a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Straggler {
    /// Number of the session.
    pub session: u64,
    /// Its backend.
    pub pid: Option<i32>,
}

/// How far the move of one session is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveReport {
    /// Number of the session.
    pub session: u64,
    /// How far.
    pub outcome: MoveOutcome,
}

/// How far the move of one session is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MoveOutcome {
    /// Its backend on the other server stands ready.
    Ready,
    /// It is not at a safe point.
    Busy,
    /// It holds what cannot be moved.
    Blocked(Vec<String>),
    /// It could not be done.
    Failed(String),
}

/// A migration, held by one cutover.
#[async_trait]
pub trait Lease: Send + Sync {
    /// Its databases, by name.
    fn databases(&self) -> Vec<String>;

    /// How far the target is behind, in bytes; none when unknown.
    fn lag_bytes(&self) -> Option<u64>;

    /// Slot and publication of one database on the source.
    fn replication(&self, database: &str) -> Replication;

    /// Resolves once every lane has durably applied the commit that set the marker of `database` to `nonce`.
    async fn wait_marker(&self, database: &str, nonce: &str) -> Result<(), String>;

    /// Gives the migration back.
    async fn finish(&self, outcome: Outcome) -> Result<(), String>;
}

/// Names on the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// Replication slot.
    pub slot: String,
    /// Publication.
    pub publication: String,
}

/// The engine.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Takes a migration that is ready to be cut over.
    async fn begin_cutover(&self, migration: &str) -> Result<Arc<dyn Lease>, String>;

    /// Tells what became of a cutover that another process, or an earlier life of this one, has begun.
    async fn cutover_settled(&self, migration: &str, outcome: Outcome) -> Result<(), String>;
}
