//! Who a client is, and what it proved that can be used towards the servers.
//!
//! [`hba`] says what a client is asked for, from where it comes and where it wants to go. [`verifiers`] finds what is stored for a user; [`exchange`] lets the client prove that it knows the password. What
//! comes out is a [`Credential`](crate::postgres::Credential) that logs in to the source and to the target alike.

mod exchange;
pub(super) mod hba;
pub(super) mod user_maps;
pub(super) mod users_file;
mod verifiers;

pub(super) use exchange::{Asked, AuthError, authenticate};
pub(super) use verifiers::{Lookup, Verifiers};
