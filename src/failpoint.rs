//! Named points at which a test kills, delays or fails the program.
//!
//! Every durable step has one. They are compiled in always, because what is tested must be what is shipped, and do
//! nothing unless `PGCUTOVER_FAILPOINTS` names them: `name=abort;other=sleep:250ms;third=hang;fourth=error`.
//! The set is a value passed from `app`, never a global.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// What happens at a failpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// End the process at once, with no destructor run: the nearest a process comes to `kill -9` by itself.
    Abort,
    /// Wait.
    Sleep(Duration),
    /// Wait for ever; a test then kills the process from outside. Logged, so that the test can see it.
    Hang,
    /// Make the step fail.
    Error,
    /// Leave the step out and go on as if it had been done: what tests of a checker must find. Only where the code asks.
    Skip,
}

/// A step was made to fail by a failpoint.
#[derive(Debug, thiserror::Error)]
#[error("failpoint {0}")]
pub struct Failed(pub &'static str);

/// The failpoints that are switched on. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct Failpoints {
    active: Option<Arc<HashMap<String, Action>>>,
}

/// The text of `PGCUTOVER_FAILPOINTS` could not be read.
#[derive(Debug, thiserror::Error)]
#[error("PGCUTOVER_FAILPOINTS: {0:?} is not NAME=abort|hang|error|skip|sleep:MILLISECONDSms")]
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
                None if action == "error" => Action::Error,
                None if action == "skip" => Action::Skip,
                Some(("sleep", time)) => {
                    let millis = time.strip_suffix("ms").and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
                    Action::Sleep(Duration::from_millis(millis))
                }
                Some(_) | None => return Err(bad()),
            };
            active.insert(name.to_owned(), action);
        }
        Ok(Self { active: (!active.is_empty()).then(|| Arc::new(active)) })
    }

    /// Whether any is switched on.
    pub fn any(&self) -> bool {
        self.active.is_some()
    }

    /// Passes the point `name`, doing what was ordered there.
    pub async fn hit(&self, name: &'static str) -> Result<(), Failed> {
        let Some(action) = self.active.as_ref().and_then(|active| active.get(name)) else { return Ok(()) };
        tracing::warn!(failpoint = name, ?action, "failpoint reached");
        match action {
            Action::Abort => std::process::abort(),
            Action::Sleep(time) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
            Action::Hang => std::future::pending().await,
            Action::Error => Err(Failed(name)),
            Action::Skip => Ok(()),
        }
    }

    /// Whether the step `name` is to be left out.
    pub fn skips(&self, name: &'static str) -> bool {
        let skips = self.active.as_ref().and_then(|active| active.get(name)) == Some(&Action::Skip);
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
        for bad in ["a", "a=", "a=sleep", "a=sleep:1s", "a=explode"] {
            assert!(Failpoints::parse(bad).is_err(), "{bad:?} must be refused");
        }
    }
}
