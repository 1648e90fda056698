//! The proxy in front of real servers: what applications rely on, and what a cutover must be able
//! to rely on.

#[path = "../support/mod.rs"]
mod support;

mod auth;
mod auth_rules;
mod cancel;
mod evil_server;
mod fence;
mod hostile;
mod limits;
mod links;
mod moves;
mod moves_and_links;
mod orphans;
mod pause;
mod places;
mod pooling;
mod pooling_frames;
mod pooling_idle;
mod pooling_model;
mod pooling_moves;
mod pooling_temporary;
mod protocol;
mod replication;
mod rig;
mod scripted;
mod slowed;
mod timeouts;
mod tls;
mod vacant;
mod vacant_model;
mod wire;
mod wire_client;
