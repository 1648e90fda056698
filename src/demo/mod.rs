//! The demo: two throw-away clusters, an application that never notices, and a report.

pub mod cluster;
pub mod compare;
mod installations;
pub mod ledger;
pub mod shop;
pub mod workload;
