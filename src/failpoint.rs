//! Named points at which a test kills, delays or fails the program.
//!
//! Every durable step has one. They are compiled in always, because what is tested must be what is shipped, and do
//! nothing unless `PGCUTOVER_FAILPOINTS` names them: `name=abort;other=sleep:250ms;third=hang;fourth=error`.
//! The set is a value passed from `app`, never a global.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

/// What happens at a failpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// End the process at once, with no destructor run: the nearest a process comes to `kill -9` by itself.
    Abort,
    /// Wait.
    Sleep(Duration),
    /// Wait for ever; a test then kills the process from outside. Logged, so that the test can see it.
    Hang,
    /// Wait for [`Failpoints::release`], which only a test in the same process can call.
    Hold,
    /// Make the step fail.
    Error,
    /// End the task by a panic, the first time only: who cleans up behind it may pass here too.
    Panic,
    /// Leave the step out and go on as if it had been done: what tests of a checker must find. Only where the code asks.
    Skip,
}

/// A step was made to fail by a failpoint.
#[derive(Debug, thiserror::Error)]
#[error("failpoint {0}")]
pub struct Failed(pub &'static str);

/// The failpoints that are switched on. Clones are the same failpoints.
#[derive(Clone, Debug, Default)]
pub struct Failpoints {
    active: Option<Arc<HashMap<String, Point>>>,
}

/// One that is switched on.
#[derive(Debug)]
struct Point {
    action: Action,
    /// How many wait here, held or hanging.
    waiting: AtomicUsize,
    /// How many more may go on from here.
    released: Semaphore,
    /// Whether a panic has been.
    spent: AtomicBool,
}

/// Counted as waiting at a point until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn at(point: &'a Point) -> Self {
        point.waiting.fetch_add(1, Ordering::SeqCst);
        Self(&point.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The text of `PGCUTOVER_FAILPOINTS` could not be read.
#[derive(Debug, thiserror::Error)]
#[error("PGCUTOVER_FAILPOINTS: {0:?} is not NAME=abort|hang|hold|error|panic|skip|sleep:MILLISECONDSms")]
pub struct ParseFailpointsError(String);

impl Failpoints {
    /// None switched on.
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads `name=action;name=action`; empty text switches none on.
    pub fn parse(text: &str) -> Result<Self, ParseFailpointsError> {
        let mut active = HashMap::new();
        for item in text.split(';').map(str::trim).filter(|item| !item.is_empty()) {
            let bad = || ParseFailpointsError(item.to_owned());
            let (name, action) = item.split_once('=').ok_or_else(bad)?;
            let action = match action.split_once(':') {
                None if action == "abort" => Action::Abort,
                None if action == "hang" => Action::Hang,
                None if action == "hold" => Action::Hold,
                None if action == "error" => Action::Error,
                None if action == "panic" => Action::Panic,
                None if action == "skip" => Action::Skip,
                Some(("sleep", time)) => {
                    let millis = time.strip_suffix("ms").and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
                    Action::Sleep(Duration::from_millis(millis))
                }
                Some(_) | None => return Err(bad()),
            };
            let (waiting, released, spent) = (AtomicUsize::new(0), Semaphore::new(0), AtomicBool::new(false));
            let point = Point { action, waiting, released, spent };
            active.insert(name.to_owned(), point);
        }
        Ok(Self { active: (!active.is_empty()).then(|| Arc::new(active)) })
    }

    /// Whether any is switched on.
    pub fn any(&self) -> bool {
        self.active.is_some()
    }

    /// Passes the point `name`, doing what was ordered there.
    pub async fn hit(&self, name: &'static str) -> Result<(), Failed> {
        let Some(point) = self.point(name) else { return Ok(()) };
        tracing::warn!(failpoint = name, action = ?point.action, "failpoint reached");
        match &point.action {
            Action::Abort => std::process::abort(),
            Action::Sleep(time) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
            Action::Hang => {
                let _waiting = Waiting::at(point);
                std::future::pending().await
            }
            Action::Hold => {
                let _waiting = Waiting::at(point);
                if let Ok(released) = point.released.acquire().await {
                    released.forget();
                }
                Ok(())
            }
            Action::Error => Err(Failed(name)),
            Action::Panic => {
                assert!(point.spent.swap(true, Ordering::SeqCst), "failpoint {name}");
                Ok(())
            }
            Action::Skip => Ok(()),
        }
    }

    /// Whether somebody waits at the point `name`, held or hanging.
    pub fn is_held(&self, name: &str) -> bool {
        self.point(name).is_some_and(|point| point.waiting.load(Ordering::SeqCst) > 0)
    }

    /// Lets one of those held at `name` go on, or the next one that comes there.
    pub fn release(&self, name: &str) {
        if let Some(point) = self.point(name) {
            point.released.add_permits(1);
        }
    }

    fn point(&self, name: &str) -> Option<&Point> {
        self.active.as_ref()?.get(name)
    }

    /// Whether the step `name` is to be left out.
    pub fn skips(&self, name: &'static str) -> bool {
        let skips = self.point(name).is_some_and(|point| point.action == Action::Skip);
        if skips {
            tracing::warn!(failpoint = name, "a step is left out");
        }
        skips
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_named_points_act() {
        let points = Failpoints::parse("a=error; b=sleep:1ms; d=skip").expect("valid");
        assert!(points.skips("d") && !points.skips("a") && !points.skips("c"));
        assert!(points.hit("d").await.is_ok());
        assert!(points.hit("a").await.is_err());
        assert!(points.hit("b").await.is_ok());
        assert!(points.hit("c").await.is_ok());
        assert!(!Failpoints::parse("").expect("empty").any());
        for bad in ["a", "a=", "a=holds", "a=sleep", "a=sleep:1s", "a=explode"] {
            assert!(Failpoints::parse(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[tokio::test]
    async fn a_test_sees_who_is_held_and_lets_one_at_a_time_go() {
        let points = Failpoints::parse("a=hold; b=hang").expect("valid");
        let mut first = Box::pin(points.hit("a"));
        assert!(futures_util::poll!(&mut first).is_pending() && points.is_held("a") && !points.is_held("b"));
        points.clone().release("a");
        assert!(futures_util::poll!(&mut first).is_ready() && !points.is_held("a"));
        let mut second = Box::pin(points.hit("a"));
        assert!(futures_util::poll!(&mut second).is_pending(), "one was released, not all");
        points.release("b");
        let mut hanging = Box::pin(points.hit("b"));
        assert!(futures_util::poll!(&mut hanging).is_pending() && points.is_held("b"), "nothing lets it go");
        drop((second, hanging));
        assert!(!points.is_held("a") && !points.is_held("b"), "who has given up is not held");
    }
}
