//! What operators see and order: one [`command::Command`], one [`service::Service`], three ways in.
//!
//! * [`console`]: the database `pgcutover` on the proxy's own port, for any PostgreSQL client;
//! * [`http`]: the JSON API, `/metrics`, `/healthz`, `/readyz`; the command line speaks it;
//! * [`parts`]: what the service drives, as traits.
//!
//! Nothing here decides anything about a migration or a cutover, and nothing shows a secret.

pub mod check;
pub mod command;
pub mod console;
pub mod error;
mod gauges;
pub mod http;
mod live;
mod orders;
pub mod parts;
mod pgbouncer;
pub mod reply;
pub mod service;
pub mod show;
mod stats;
pub mod table;
pub mod view;
