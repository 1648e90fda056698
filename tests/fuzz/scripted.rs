//! Runs targets that need a runtime: one for the whole process, because making one costs more than most inputs.

use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
}

/// Gives `check` its runtime.
pub fn scripted(check: fn(&Runtime, &[u8]), data: &[u8]) {
    RUNTIME.with(|runtime| check(runtime, data));
}
