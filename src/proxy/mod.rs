//! proxy.

pub mod handoff;
