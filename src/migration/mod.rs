//! Copies a source server's databases to a target server and keeps them the same until a cutover.
//!
//! ```text
//! prerequisites → validation → per database: replica identities, publication, slot, visibility barrier,
//!                 schema, copy (a snapshot for each table), indexes, stream + apply, constraints → ready
//! ```
//!
//! [`engine`] owns the migrations of a target and is the way in. [`state`] is the machine; [`snapshot`] the rule by
//! which a table passes from its copy to the stream without a gap and without a double; [`view`] what operators see.
//!
//! # One row, from the source's WAL to the target
//!
//! 1. The source's walsender sends it, once its transaction has committed; [`crate::postgres::walsender`] receives it.
//! 2. [`stream`] is one connection's life: a thread of its own reads messages, undecoded, into a queue that is bounded
//!    in bytes.
//! 3. [`gate`] lets them pass, unless somebody compares the servers and has it hold.
//! 4. [`apply`] decodes them ([`crate::pgoutput`]), drops what the copy has already ([`apply::plan`]), gathers whole
//!    transactions, and commits their rows together with the progress row ([`apply::applier`]).
//! 5. Only then is the slot told: `confirm` in [`stream`].

pub mod apply;
mod backoff;
pub mod copy;
pub mod ddl;
pub mod drift;
pub mod engine;
pub mod fenced_writes;
pub mod gate;
pub mod identity;
pub mod lag;
pub mod late;
pub mod made;
pub mod materialized;
pub mod preflight;
pub mod publication;
pub mod reserve;
pub mod roles;
pub mod schema;
pub mod sequences;
mod settings;
pub mod snapshot;
pub mod standstill;
pub mod state;
pub mod stream;
pub mod unstreamed;
pub mod verify;
pub mod view;
mod wal_limit;
pub mod warm;
