//! Every interleaving of the admission gate, explored by loom.
//!
//! loom models explicit fences but neither ArcSwap nor SeqCst accesses, so the route is an atomic here.

mod atomic {
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
}
#[path = "../src/switch/gate.rs"]
#[expect(dead_code, reason = "the model needs only what decides who is inside")]
mod gate;

use atomic::{AtomicU64, Ordering};
use gate::{Cell, Epoch, Gate};
use loom::sync::Arc;
use loom::thread;

/// The route is modelled by an atomic that the coordinator changes only while it believes nobody is inside. A
/// session that was admitted must see one value of it from entry to leave.
#[test]
fn nobody_is_inside_while_the_route_changes() {
    // Three preemptions cover every known gate bug (two suffice to break check-then-act); unbounded takes hours.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let gate = Arc::new(Gate::open_at(Epoch(0)));
        let cells = [Arc::new(Cell::new()), Arc::new(Cell::new())];
        let route = Arc::new(AtomicU64::new(0));
        let sessions: Vec<_> = cells
            .iter()
            .map(|cell| {
                let (gate, cell, route) = (gate.clone(), cell.clone(), route.clone());
                thread::spawn(move || {
                    if let Some(admission) = gate.enter(&cell) {
                        let first = route.load(Ordering::Relaxed);
                        let second = route.load(Ordering::Relaxed);
                        assert_eq!(first, second, "the route moved under an admitted session");
                        assert!(first >= admission.epoch.0, "a newer epoch came with an older route");
                        cell.leave(&gate);
                    }
                })
            })
            .collect();
        gate.fence();
        if cells.iter().all(|cell| !cell.is_busy()) {
            route.store(1, Ordering::Relaxed);
            gate.open(Epoch(1));
        }
        for session in sessions {
            session.join().expect("no panic");
        }
    });
}
