//! Server connections that clients share, in transaction mode: one pool for each user in each database.
//!
//! ```text
//! central   one for all workers: who waits, how many connections there are, who logs in        (a lock, slow path only)
//! local     one on each worker: the connections that lie idle there                            (no lock, no atomics
//!                                                                                               but one fence)
//! ```
//!
//! Taking an idle connection and giving it back touch this worker alone. Only when somebody waits does a connection
//! that is given back go through the central line, and to another worker if its turn comes first there: it is then
//! taken from one runtime and registered with the other.
//!
//! ```text
//! who waits                                 who gives back
//!   waiting := waiting + 1                    idle := idle + 1
//!   fence(SeqCst)                             fence(SeqCst)
//!   any worker idle? ask it                   anybody waiting? hand over
//! ```
//!
//! One of the two sees the other, so no connection lies idle while somebody waits. Who leaves the line while it is being
//! served hands back what it is given: [`wait`].
//!
//! What must never happen here: a connection that is given to a client while anything is under way on it, or whose
//! settings are not known.

mod central;
mod line;
mod link;
mod local;
mod profile;
mod registry;
mod statements;
mod wait;

pub(super) use central::Waiter;
pub(super) use link::Link;
pub(super) use local::LocalPool;
pub(super) use profile::{Profile, Reported};
pub(super) use registry::{Pools, Seat};
pub(super) use statements::{NAME_PREFIX as STATEMENT_PREFIX, Statement, Taken};
