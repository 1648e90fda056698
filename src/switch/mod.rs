//! Which server a database's sessions run on, and how they are all held at once.
//!
//! [`Switchboard`] has one [`Database`] for each database name. It joins a [`Gate`] (may a transaction begin?), a
//! [`Route`] (where does it run?) and the registered session cells (who is inside?). This module knows nothing of
//! migrations, sockets or SQL.
//!
//! ```text
//! session                                   coordinator
//!   cell := busy                              gate := fenced
//!   fence(SeqCst)                             fence(SeqCst)
//!   load gate                                 read every cell
//!   fenced? cell := idle, wait                busy? wait until it is told
//!   open?   load route, run                   all idle: nobody is inside, nobody can enter
//! ```
//!
//! Either the session sees the fence or the coordinator sees the session; the two fences make "neither" impossible.

/// The atomics of [`gate`]; the model test puts loom's in their place.
mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
}
mod gate;
mod switchboard;

pub use gate::{Admission, Cell, Epoch, Gate};
pub use switchboard::{CutoverUnderWay, Database, Member, PausedAll, PrepareWindow, Route, ServerRole, Switchboard};
