//! pgcutover moves a live PostgreSQL database to another server without the application noticing.
//!
//! Applications connect to the proxy once. Behind it an engine copies and replicates a **source** server to a
//! **target** server; a **cutover** pauses writes, drains replication to zero and switches the backends atomically.
//!
//! # Three paths to read first
//!
//! * One query, from socket to backend and back: [`proxy`] (`listener` → `login` → `session` → `relay`).
//! * One row, from the source's WAL to the target: [`postgres`] (`walsender`) → [`migration`] (`stream` → `gate` →
//!   `apply`, which decodes it with [`pgoutput`]).
//! * One cutover, from command to switched route: [`admin`] (`service`) → [`app`] (`cutovers`) → [`cutover`]
//!   (`coordinator` → `steps`) → [`switch`].
//!
//! # Layers
//!
//! `use crate::…` points only downwards; `tests/tidy.rs` holds this table and fails the build otherwise.
//!
//! ```text
//! 5  main cli app demo
//! 4  admin
//! 3  cutover
//! 2  proxy | migration            never each other
//! 1  switch | catalog | postgres | wire | pgoutput     catalog may use postgres and switch, postgres may use wire
//! 0  lsn ident sqlstate config shutdown failpoint telemetry
//! ```

pub mod admin;
pub mod app;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod cutover;
pub mod demo;
pub mod failpoint;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod ident;
pub mod lsn;
pub mod migration;
pub mod pgoutput;
pub mod postgres;
pub mod proxy;
pub mod shutdown;
pub mod sqlstate;
pub mod switch;
pub mod telemetry;
pub mod wire;
