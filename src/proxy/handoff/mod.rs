//! A session's state, read from its own backend and replayed on a fresh backend of the other server.
//!
//! The client never notices a cutover only if everything it has set up on its connection is there afterwards: settings,
//! role, prepared statements with their names, LISTEN, the unnamed statement. The backend is asked for all of it, because
//! no reading of the client's statements could follow functions, `DO` blocks and `DISCARD`; only what no backend tells is
//! noticed on the way ([`Tracked`]).
//!
//! ```text
//! session idle on the source            capture ── SessionState ──► replay on a fresh backend of the target
//! … it runs more transactions …
//! held in the pause                     capture again ── delta ──► apply_delta          (nothing, for most)
//! gate opens at the target              old backend: terminate
//! ```
//!
//! What must never happen here: a simple Query on the client's backend (it would destroy the client's unnamed
//! statement), a name without its schema (the session's `search_path` is hostile), a statement text of the client
//! executed rather than parsed or planned (`PREPARE` excepted, which runs nothing), a value or a text in a log or an error.
//!
//! Not seen and not moved: `currval`/`lastval`, variables of procedural languages, loaded libraries, `setseed`. A
//! custom setting is moved when its name can be learned from a literal `SET` or `set_config` that the session sent, or
//! from a policy or function of the database.

mod blocker;
mod capture;
mod catalogue;
mod delta;
mod error;
mod exchange;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod prepare;
mod replay;
mod scan;
mod shared;
mod state;
mod traces;
mod tracked;

pub use blocker::Blocker;
pub(super) use capture::FIRST_UNSTABLE_OID;
pub use capture::capture;
pub use catalogue::catalogue_settings;
pub use delta::{Delta, delta};
pub use error::HandoffError;
pub use replay::{FailedStatement, ReplayReport, StatementFailure, apply_delta, replay, replay_and_plan};
pub use scan::settings_used;
pub(super) use scan::{is_name_byte, skip_space};
pub use shared::Tie;
pub use state::{SessionState, changed_parameters};
pub use traces::{Deallocated, Traces, call_traces, deallocated, traces};
pub use tracked::{Tracked, UNNAMED_LIMIT_BYTES, UnnamedStatement};
