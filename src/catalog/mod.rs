//! The pgcutover schema on both servers: the truth that outlives every process.

pub mod journal;
pub mod migrations;
pub mod progress;
pub mod tables;
