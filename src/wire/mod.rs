//! The PostgreSQL frontend/backend protocol, version 3, as pure functions and state machines.
//!
//! Framing, startup packets, the messages the proxy says itself, SCRAM on the server's side and the ledger that knows
//! when a session is at a safe point. Nothing here reads a socket, a clock or a random number; every parser accepts
//! any bytes without a panic. Message formats: PostgreSQL documentation, "Frontend/Backend Protocol".

pub mod error;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod ledger;
pub mod message;
pub mod proxy_protocol;
pub mod scanner;
pub mod scram;
pub mod startup;
