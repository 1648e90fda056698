//! Copies a source server's databases to a target server and keeps them the same until a cutover.
//!
//! ```text
//! prerequisites → validation → per database: replica identities, publication, slot, visibility barrier,
//!                 schema, copy (a snapshot for each table), indexes, stream + apply, constraints → ready
//! ```
//!
//! [`state`] is the machine; [`snapshot`] the rule by which a table passes from its copy to the stream without a gap
//! and without a double; [`view`] what operators see.

pub mod apply;
pub mod copy;
pub mod identity;
pub mod made;
pub mod materialized;
pub mod preflight;
pub mod roles;
pub mod schema;
mod settings;
pub mod snapshot;
pub mod state;
pub mod stream;
pub mod view;
