//! The line of those who wait for a connection. Pure.
//!
//! First come, first served, with one exception that saves moving connections between threads: a connection may go to
//! somebody who waits on the worker that gives it back, ahead of others who came at most [`OVERTAKEN_MAX`] places
//! earlier. So nobody is overtaken by more than so many.

use std::collections::VecDeque;

/// How many later comers may be served before somebody.
pub(super) const OVERTAKEN_MAX: u64 = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Line<T> {
    waiting: VecDeque<Place<T>>,
    next: u64,
}

#[derive(Debug)]
struct Place<T> {
    number: u64,
    worker: usize,
    who: T,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), next: 0 }
    }
}

impl<T> Line<T> {
    /// Joins at the end.
    pub(super) fn join(&mut self, worker: usize, who: T) {
        self.waiting.push_back(Place { number: self.next, worker, who });
        self.next += 1;
    }

    /// Whose turn it is, where the connection is on `worker`.
    pub(super) fn next_for(&mut self, worker: usize) -> Option<T> {
        let first = self.waiting.front()?.number;
        let near = self.waiting.iter().take_while(|place| place.number <= first + OVERTAKEN_MAX);
        let at = near.into_iter().position(|place| place.worker == worker).unwrap_or(0);
        self.waiting.remove(at).map(|place| place.who)
    }

    /// Who has waited longest.
    pub(super) fn first(&self) -> Option<&T> {
        self.waiting.front().map(|place| &place.who)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Those for whom `leaves` holds leave the line, and are returned.
    pub(super) fn leave(&mut self, leaves: impl Fn(&T) -> bool) -> Vec<T> {
        let (mut gone, mut kept) = (Vec::new(), VecDeque::with_capacity(self.waiting.len()));
        for place in self.waiting.drain(..) {
            if leaves(&place.who) { gone.push(place.who) } else { kept.push_back(place) }
        }
        self.waiting = kept;
        gone
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_worker_serves_in_the_order_of_arrival() {
        let mut line = Line::default();
        (0..5).for_each(|who| line.join(0, who));
        assert_eq!(line.leave(|who| *who == 2), [2]);
        assert_eq!((0..4).map(|_| line.next_for(0)).collect::<Vec<_>>(), [Some(0), Some(1), Some(3), Some(4)]);
        assert_eq!(line.next_for(0), None);
    }

    proptest! {
        #[test]
        fn nobody_is_overtaken_by_many(steps in prop::collection::vec((any::<bool>(), 0usize..3), 0..400)) {
            let mut line = Line::default();
            let (mut arrived, mut overtaken) = (0u64, std::collections::BTreeMap::new());
            for (arrives, worker) in steps {
                if arrives {
                    line.join(worker, arrived);
                    overtaken.insert(arrived, 0u64);
                    arrived += 1;
                } else if let Some(served) = line.next_for(worker) {
                    overtaken.remove(&served);
                    for (_, count) in overtaken.range_mut(..served) {
                        *count += 1;
                        prop_assert!(*count <= OVERTAKEN_MAX);
                    }
                }
            }
            prop_assert_eq!(line.len(), overtaken.len());
        }
    }
}
