//! The admission gate: one atomic for a database, one cell for each session.
//!
//! Check-then-act is the bug this file exists to rule out: "not paused, so forward" leaves a moment in which the
//! coordinator counts nobody and the session has not yet said that it is inside. See the timeline in [`super`].
//!
//! `tests/gate_model.rs` compiles this very file against loom's atomics and explores every interleaving.

use super::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Number of a cutover; the original source starts with 0 and every attempt takes a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
pub struct Epoch(pub u64);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

const FENCED: u64 = 1;

/// `epoch << 1 | fenced`, read by sessions at every transaction, written under the lock of its database alone.
#[derive(Debug)]
pub struct Gate(AtomicU64);

/// A session's own mark that it is inside a transaction. Only its session writes it, so sessions never contend.
#[derive(Debug)]
pub struct Cell(AtomicBool);

/// The gate was open and the session is inside until it calls [`Cell::leave`].
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The epoch the gate stood at; the route read after this one is at least as new.
    pub epoch: Epoch,
}

impl Default for Cell {
    fn default() -> Self {
        Self::new()
    }
}

impl Cell {
    /// An idle cell. It must be registered with its database before its first use.
    pub fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Whether the session is inside.
    pub fn is_busy(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Marks the session as outside. What it did inside happens before whatever the coordinator does after seeing it.
    /// Returns whether the gate is fenced, that is, whether somebody may be waiting to be told.
    pub fn leave(&self, gate: &Gate) -> bool {
        self.0.store(false, Ordering::Release);
        fence(Ordering::SeqCst);
        gate.is_fenced()
    }
}

impl Gate {
    /// An open gate at `epoch`.
    pub fn open_at(epoch: Epoch) -> Self {
        Self(AtomicU64::new(epoch.0 << 1))
    }

    /// Enters, or returns `None` when the gate is fenced; the cell is then idle again.
    pub fn enter(&self, cell: &Cell) -> Option<Admission> {
        cell.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let value = self.0.load(Ordering::Acquire);
        if value & FENCED == 0 {
            return Some(Admission { epoch: Epoch(value >> 1) });
        }
        cell.0.store(false, Ordering::Release);
        None
    }

    /// Whether new transactions are held. A session that is inside asks this at every Sync.
    pub fn is_fenced(&self) -> bool {
        self.0.load(Ordering::Acquire) & FENCED != 0
    }

    /// The epoch the gate stands at, fenced or not.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.0.load(Ordering::Acquire) >> 1)
    }

    /// Closes the gate, keeping its epoch. After this call every cell that is read idle stays idle.
    pub fn fence(&self) {
        let epoch = self.epoch();
        self.0.store(epoch.0 << 1 | FENCED, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Opens the gate at `epoch`. The route must have been published before.
    pub fn open(&self, epoch: Epoch) {
        self.0.store(epoch.0 << 1, Ordering::Release);
    }

    /// Moves a closed gate to `epoch` and keeps it closed: nobody is admitted in between.
    pub fn move_closed(&self, epoch: Epoch) {
        self.0.store(epoch.0 << 1 | FENCED, Ordering::Release);
    }
}
