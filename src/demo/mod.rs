//! The demo: two throw-away clusters, an application that never notices, and a report.

pub mod cluster;
mod installations;
