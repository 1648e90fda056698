//! Who coordinates the cutover of a migration: a lock on the target that lives as long as the coordinator's session there.
//!
//! It keeps others from settling what is being decided. It protects nothing: the decision's unique key does.

use super::CutoverError;
use crate::postgres::Control;

/// First half of the key of the advisory lock that says a coordinator of a migration lives; the second half is a hash of
/// the migration's name. `pgcu` in ASCII.
const COORDINATOR_LOCK: i32 = 0x7067_6375;

/// Takes the lock that says a coordinator of `migration` lives, for as long as this session does. Returns whether it
/// was free.
pub(super) async fn claim_coordination(control: &Control, migration: &str) -> Result<bool, CutoverError> {
    let row = control
        .query_one(
            "SELECT pg_catalog.pg_try_advisory_lock($1, pg_catalog.hashtext($2))",
            &[&COORDINATOR_LOCK, &migration],
        )
        .await
        .map_err(|source| CutoverError::query("take the coordinator's lock", source))?;
    Ok(row.get(0))
}

/// Gives the lock back.
pub(super) async fn release_coordination(control: &Control, migration: &str) -> Result<(), CutoverError> {
    control
        .execute("SELECT pg_catalog.pg_advisory_unlock($1, pg_catalog.hashtext($2))", &[&COORDINATOR_LOCK, &migration])
        .await
        .map_err(|source| CutoverError::query("give the coordinator's lock back", source))?;
    Ok(())
}
