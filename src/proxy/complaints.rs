//! What many clients meet at once, such as a server that is down, is logged once and then counted.
//!
//! Applications that find no server try again at once, all of them: a line for each attempt would fill a disk and tell
//! nothing. So the first of a kind is logged, and then at most one line in [`QUIET`] that says how many others there were.
//! Metrics count every one. What a single client does wrong, such as a password, is never left out: a log is where
//! attacks are found. Must never keep anything that a client has said: kinds are names of ours.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of one kind.
const QUIET: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<BTreeMap<&'static str, Heard>>);

#[derive(Debug)]
struct Heard {
    told: Instant,
    /// Since then.
    untold: u64,
}

impl Complaints {
    /// Another of this kind. `Some`: it is to be logged, with the number of those that were not since the last one was.
    pub(super) fn tell(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(heard) = kinds.get_mut(kind) else {
            kinds.insert(kind, Heard { told: now, untold: 0 });
            return Some(0);
        };
        if now.saturating_duration_since(heard.told) < QUIET {
            heard.untold += 1;
            return None;
        }
        heard.told = now;
        Some(std::mem::take(&mut heard.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_and_then_how_many_others_there_were() {
        let (complaints, begin) = (Complaints::default(), Instant::now());
        assert_eq!(complaints.tell("down", begin), Some(0));
        let soon = begin + Duration::from_secs(1);
        assert_eq!([complaints.tell("down", soon), complaints.tell("down", soon)], [None, None]);
        assert_eq!(complaints.tell("full", soon), Some(0), "another kind");
        assert_eq!(complaints.tell("down", begin + QUIET), Some(2));
        assert_eq!(complaints.tell("down", begin + QUIET + soon.duration_since(begin)), None);
        assert_eq!(complaints.tell("down", begin + QUIET * 3), Some(1));
    }
}
