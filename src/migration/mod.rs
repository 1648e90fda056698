//! migration.

pub mod copy;
pub mod identity;
pub mod made;
pub mod materialized;
pub mod preflight;
pub mod roles;
pub mod schema;
