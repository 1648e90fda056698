//! Every metric: name, help and labels in this one file.

use prometheus::Registry;

/// The program's metrics. Passed as `Arc<Metrics>`; there is no global registry.
#[derive(Debug)]
pub struct Metrics {
    /// What `/metrics` prints.
    pub registry: Registry,
}

impl Metrics {
    /// Registers every metric.
    pub fn new() -> Result<Self, prometheus::Error> {
        Ok(Self { registry: Registry::new() })
    }
}
