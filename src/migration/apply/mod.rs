//! From the stream's messages to committed rows on the target.
//!
//! [`plan`] turns decoded changes into statements without touching a socket; [`shape`] is what it must know of the
//! target's tables; [`executor`] runs the statements, pipelined; [`applier`] is the loop that joins them.

pub mod applier;
pub mod executor;
pub mod plan;
#[cfg(test)]
mod plan_tests;
pub mod shape;
mod statement;
