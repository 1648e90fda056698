//! The place of the reverse stream, by which a cutover can be taken back. Not built yet; this page says what it will
//! join, so that nothing built now stands in its way.
//!
//! ```text
//! prepare   on the target, in every migrated database: publication pgcutover_reverse_<migration>, then slot
//! decide    one transaction on the target: exact sequence values and the row pgcutover.boundary (epoch)
//! after     source ← applier ← stream from that slot; everything up to and including the boundary's commit is discarded
//! ```
//!
//! * It is [`super::stream::run`] with a [`super::stream::StreamContext`] whose source and target are exchanged, without
//!   hand-overs, and a planner that discards up to the boundary.
//! * Its progress row lies in the old source's databases: [`crate::catalog::progress`] is made there by the same DDL.
//! * Slot and publication go into the journal with side `target`, like everything else that is made.
//! * Until it is there, `rollback` is refused, and the forward slot is dropped as soon as the decision is known
//!   ([`super::state::Effect::EndStream`]).
