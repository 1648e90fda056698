//! What decides who is let in, as far as it is read from files: one value, replaced as a whole by a reload.
//!
//! A login works with the value that was in force when its connection came. What cannot be read never replaces what
//! can: either everything is new, or everything stays.

use super::tls::ServerTls;
use crate::config::{Config, Network};
use crate::telemetry::metrics::Metrics;

/// Everything a login needs to know about files. Never changed once it is made.
pub(super) struct Access {
    /// None: TLS is not spoken.
    pub(super) tls: Option<ServerTls>,
    /// See `listen.proxy_protocol_from`.
    pub(super) balancers: Vec<Network>,
}

/// A file that the configuration names cannot be used. Says which, and where in it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AccessError(String);

impl Access {
    /// Reads every file that `config` names.
    pub(super) fn load(config: &Config) -> Result<Self, AccessError> {
        let tls = config.listen.tls.as_ref().map(ServerTls::load).transpose();
        Ok(Self {
            tls: tls.map_err(|error| AccessError(format!("[listen] TLS: {error}")))?,
            balancers: config.listen.proxy_protocol_from.clone(),
        })
    }

    /// What is worth watching from outside.
    pub(super) fn show_in(&self, metrics: &Metrics) {
        let not_after = self.tls.as_ref().and_then(|tls| tls.not_after);
        metrics.tls_certificate_not_after_seconds.set(not_after.unwrap_or(0));
    }
}
