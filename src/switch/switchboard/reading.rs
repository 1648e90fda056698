//! Who goes on during a pause: reads (`reads = "continue"`), and who ends a prepared transaction.
//!
//! A second gate beside the first one, closed except in such a pause. Who has declared its transaction read-only enters by
//! it while the first one holds everybody else; each session has a cell for either, so that the coordinator can wait for
//! those who write without waiting for those who read:
//!
//! ```text
//! coordinator                                  sessions
//!   reads open, gate fenced                      writers are held, reads go on where they were
//!   wait for the cells of the gate               the last writers leave; what they wrote arrives on the other side
//!   reads fenced                                 reads are held too
//!   wait for all cells                           the last reads leave; from here on it is a pause like any other
//! ```
//!
//! A transaction that was prepared for COMMIT PREPARED is waited for like every other, while the client that would end it
//! is held. So whoever comes to do that is let in by the second gate, in the pause of reads and, as long as there is such a
//! transaction, behind it ([`Database::let_finish`]).
//!
//! Nothing rests on the declaration being true: the drain that counts begins when everybody has left by either gate, so a
//! "read" that wrote something after all has done so before it.

use std::sync::atomic::Ordering;

use super::super::gate::{Admission, Cell, Epoch, Gate};
use super::{Database, Member};

/// A session's marks; at most one of them is set.
#[derive(Debug, Default)]
pub(super) struct Cells {
    /// Inside by the gate: anything may be done.
    pub(super) any: Cell,
    /// Inside by the gate for reads.
    reading: Cell,
}

impl Cells {
    pub(super) fn is_busy(&self) -> bool {
        self.any.is_busy() || self.reading.is_busy()
    }

    /// Leaves by the gate that was entered by. Returns whether somebody may be waiting to be told.
    #[inline]
    pub(super) fn leave(&self, gate: &Gate, reads: &Gate) -> bool {
        if self.reading.is_busy() { self.reading.leave(reads) } else { self.any.leave(gate) }
    }
}

/// A gate for reads as it is outside a pause.
pub(super) fn closed() -> Gate {
    let gate = Gate::open_at(Epoch(0));
    gate.fence();
    gate
}

impl Member {
    /// Enters for one transaction that its client has declared read-only, or for the end of a prepared one, where those go
    /// on. The session must not be inside.
    pub fn try_enter_reading(&self) -> Option<Admission> {
        self.database.reads.enter(&self.cells.reading)
    }
}

impl Database {
    /// Like [`Database::fence`], but reads go on until [`Database::fence_reads`]. Under a PAUSE they are held as well.
    pub fn fence_writers(&self) {
        let mut closed_by = self.lock_closed_by();
        closed_by.cutover = true;
        if !closed_by.operator {
            // Before the gate closes: no read finds both closed.
            self.finishing.store(false, Ordering::Release);
            self.reads.open(self.gate.epoch());
        }
        self.gate.fence();
        drop(closed_by);
        self.left.notify_waiters();
    }

    /// With everybody held by a cutover: lets in who ends a prepared transaction, until [`Database::fence_reads`]. Under a
    /// PAUSE they are held as well.
    pub fn let_finish(&self) {
        let closed_by = self.lock_closed_by();
        if closed_by.cutover && !closed_by.operator && self.reads.is_fenced() {
            self.finishing.store(true, Ordering::Release);
            self.reads.open(self.gate.epoch());
        }
        drop(closed_by);
        self.changed.notify_waiters();
    }

    /// Reads, and who ends a prepared transaction, are held from now on, too. Does not wait for those that run.
    pub fn fence_reads(&self) {
        let closed_by = self.lock_closed_by();
        self.reads.fence();
        drop(closed_by);
        self.left.notify_waiters();
    }

    /// Whether reads go on while everybody else is held.
    pub fn lets_reads_in(&self) -> bool {
        self.lets_some_in() && !self.finishing.load(Ordering::Acquire)
    }

    /// Whether anybody goes on while everybody else is held: who ends a prepared transaction at least.
    pub fn lets_some_in(&self) -> bool {
        !self.reads.is_fenced()
    }

    /// Waits until nobody is inside who may write. The gate must be fenced.
    pub async fn wait_writers(&self) {
        self.wait_until(|| !self.lock_members().values().any(|cells| cells.any.is_busy())).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt as _;

    use super::super::{Route, ServerRole, Switchboard};
    use super::*;

    fn database() -> Arc<Database> {
        Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(4) }).database("shop")
    }

    #[test]
    fn reads_enter_only_while_writers_alone_are_held() {
        let database = database();
        let (reader, writer) = (database.join(), database.join());
        assert_eq!(reader.try_enter_reading(), None, "no pause");
        database.fence_writers();
        assert_eq!(writer.try_enter(), None);
        assert_eq!(reader.try_enter_reading(), Some(Admission { epoch: Epoch(4) }));
        assert!(reader.is_inside() && database.inside() == 1);
        assert!(database.wait_writers().now_or_never().is_some(), "nobody who writes is inside");
        assert!(database.wait_empty().now_or_never().is_none());

        database.fence_reads();
        assert_eq!(writer.try_enter_reading(), None);
        let mut empty = Box::pin(database.wait_empty());
        assert!(empty.as_mut().now_or_never().is_none(), "who is inside stays inside");
        reader.leave();
        assert!(empty.now_or_never().is_some(), "who waits is told");
    }

    #[test]
    fn who_ends_a_prepared_transaction_is_let_in_where_reads_are_not() {
        let database = database();
        let (session, another) = (database.join(), database.join());
        database.let_finish();
        assert!(!database.lets_some_in(), "nobody is held");
        database.fence();
        database.let_finish();
        assert!(database.lets_some_in() && !database.lets_reads_in());
        assert_eq!(session.try_enter_reading(), Some(Admission { epoch: Epoch(4) }));
        assert_eq!(another.try_enter(), None);
        database.fence_reads();
        assert_eq!(another.try_enter_reading(), None);
        let mut empty = Box::pin(database.wait_empty());
        assert!(empty.as_mut().now_or_never().is_none(), "the drain waits for it");
        session.leave();
        assert!(empty.now_or_never().is_some());

        let database = self::database();
        assert_eq!(database.pause(), Ok(true));
        database.fence();
        database.let_finish();
        assert!(!database.lets_some_in(), "a PAUSE holds everybody");
    }

    #[test]
    fn every_end_of_a_pause_closes_the_gate_for_reads() {
        let ends: [fn(&Database); 4] = [
            |database| database.open(ServerRole::Target, Epoch(5)),
            Database::reopen,
            |database| database.set_unknown("in doubt".to_owned()),
            Database::fence,
        ];
        for end in ends {
            let database = database();
            let (reader, another) = (database.join(), database.join());
            database.fence_writers();
            assert!(reader.try_enter_reading().is_some());
            end(&database);
            assert!(!database.lets_reads_in());
            assert_eq!(another.try_enter_reading(), None);
            assert_eq!(database.inside(), 1, "a read that outlasts the pause still counts");
            reader.leave();
            assert_eq!(database.inside(), 0);
        }
    }

    #[test]
    fn a_pause_that_an_operator_has_ordered_holds_reads_as_well() {
        let database = database();
        let reader = database.join();
        assert_eq!(database.pause(), Ok(true));
        database.fence_writers();
        assert_eq!(reader.try_enter_reading(), None);
    }
}
