//! From the stream's messages to committed rows on the target.
//!
//! [`plan`] turns decoded changes into statements without touching a socket; [`shape`] is what it must know of the
//! target's tables.

pub mod plan;
#[cfg(test)]
mod plan_tests;
pub mod shape;
mod statement;
