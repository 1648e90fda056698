//! From the stream's messages to committed rows on the target.
//!
//! [`plan`] finds out what each decoded change means for the target without touching a socket, [`plan_table`] which row
//! it means, and [`plan_net`] what is left of many changes; [`shape`] is what must be known of the target's tables.
//! [`command`] is a change of a definition.
//! [`gather`] makes pieces of them, [`executor`] runs a piece as a few large statements, and [`applier`] has both work at
//! the same time.

pub mod applier;
pub mod command;
mod encode;
pub mod executor;
mod gather;
pub mod plan;
pub mod plan_net;
pub mod plan_table;
#[cfg(test)]
mod plan_tests;
pub mod shape;
mod shapes;
mod statement;
