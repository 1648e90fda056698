//! What a cutover asks of the engine.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::catalog::decision::Outcome;
use crate::catalog::streams::Direction;
use crate::switch::Epoch;

/// A migration, held by one cutover.
#[async_trait]
pub trait Lease: Send + Sync {
    /// Its databases, by name.
    fn databases(&self) -> Vec<String>;

    /// How far the target is behind, in bytes; none when unknown.
    fn lag_bytes(&self) -> Option<u64>;

    /// Compares the definitions of both servers; `Err` says what is missing on the one that the cutover leads to.
    async fn compare_definitions(&self) -> Result<(), String>;

    /// Owners and grants that the server lacks to which the cutover leads, named by database.
    async fn lacking_rights(&self) -> Result<Vec<String>, String>;

    /// Brings over once more roles with their passwords, memberships and settings, and the settings of the databases.
    /// Returns notes for the operator.
    async fn synchronise_rights(&self) -> Result<Vec<String>, String>;

    /// Brings over once more what no stream carries, and warms the other server. Returns notes for the operator.
    async fn synchronise(&self) -> Result<Vec<String>, String>;

    /// Makes what the stream needs that will carry back what is written after cutover `epoch`, on the server that it leads
    /// to. Returns notes for the operator: where a server cannot send one, the cutover cannot be taken back.
    async fn prepare_return(&self, epoch: Epoch) -> Result<Vec<String>, String>;

    /// Why there would be no stream back after a cutover now, for the operator; none: there would be one. Changes nothing.
    async fn foresee_return(&self) -> Result<Option<String>, String>;

    /// Slot and publication of one database on the server that is left.
    fn replication(&self, database: &str) -> Replication;

    /// Resolves once every lane has durably applied the commit that set the marker of `database` to `nonce`.
    async fn wait_marker(&self, database: &str, nonce: &str) -> Result<(), String>;

    /// Gives the migration back.
    async fn finish(&self, outcome: Outcome) -> Result<(), String>;
}

/// Names on the server that is left.
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
    /// Takes a migration that is ready to be cut over, or was cut over and is to be rolled back.
    async fn begin_cutover(&self, migration: &str, direction: Direction) -> Result<Arc<dyn Lease>, String>;

    /// Tells what became of a cutover that another process, or an earlier life of this one, has begun.
    async fn cutover_settled(&self, migration: &str, outcome: Outcome) -> Result<(), String>;

    /// Counts up whenever a migration changed its state or was read from the catalogue.
    fn changes(&self) -> watch::Receiver<u64>;
}
