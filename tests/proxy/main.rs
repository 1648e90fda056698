//! The proxy in front of real servers and of a scripted one: what applications rely on, and what a cutover must be able
//! to rely on.

#[path = "../support/mod.rs"]
mod support;

mod auth;
mod cancel;
mod fence;
mod moves;
mod orphans;
mod protocol;
mod rig;
mod scripted;
mod wire_client;
