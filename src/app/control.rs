//! What the process can be told from outside: signals, reload, shutdown.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::parts::Daemon;
use crate::config::{self, Changes, Config, Environment};
use crate::proxy::AccessError;
use crate::telemetry::LogControl;

/// The running daemon, as far as orders to it go.
pub(super) struct Control {
    path: Option<PathBuf>,
    config: Arc<ArcSwap<Config>>,
    log: LogControl,
    stop: CancellationToken,
    /// What takes a reload over.
    followers: Mutex<Vec<Follower>>,
    /// What may refuse a reload.
    reader: OnceLock<Reader>,
}

/// Called with every new configuration.
type Follower = Box<dyn Fn(&Config) + Send + Sync>;

/// Reads the files that a new configuration names; an error keeps everything as it is.
type Reader = Box<dyn Fn(&Config) -> Result<(), AccessError> + Send + Sync>;

impl Control {
    pub(super) fn new(path: Option<PathBuf>, config: Arc<ArcSwap<Config>>, log: LogControl) -> Self {
        let (followers, reader) = (Mutex::default(), OnceLock::new());
        Self { path, config, log, stop: CancellationToken::new(), followers, reader }
    }

    /// From now on `reader` is asked first at every reload.
    pub(super) fn consult(&self, reader: impl Fn(&Config) -> Result<(), AccessError> + Send + Sync + 'static) {
        // There is one proxy in a process, so it is set once.
        let _first = self.reader.set(Box::new(reader));
    }

    /// `follower` is called with every configuration that a reload brings into force.
    pub(super) fn follow(&self, follower: impl Fn(&Config) + Send + Sync + 'static) {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(follower));
    }

    /// Resolves once the daemon was told to stop, by a signal or an order.
    pub(super) async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Obeys signals until the process ends: SIGHUP reloads; SIGTERM and SIGINT stop in good order, a second one at once.
    pub(super) async fn obey_signals(self: Arc<Self>) -> std::io::Result<()> {
        let mut hangup = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::spawn(async move {
            loop {
                // Every arm is safe to drop: a signal that was not received yet stays pending.
                let status = tokio::select! {
                    Some(()) = hangup.recv() => {
                        // Logged there.
                        let _outcome = self.reload();
                        continue;
                    }
                    Some(()) = terminate.recv() => 143,
                    Some(()) = interrupt.recv() => 130,
                };
                if self.stop.is_cancelled() {
                    tracing::warn!("told to stop again: ending at once");
                    std::process::exit(status);
                }
                tracing::info!("told to stop");
                self.stop.cancel();
            }
        });
        Ok(())
    }
}

impl Daemon for Control {
    fn reload(&self) -> Result<Changes, AdminError> {
        let result = self.try_reload();
        match &result {
            Ok(changes) => {
                tracing::info!(applied = ?changes.applied, needs_restart = ?changes.needs_restart, "configuration read again");
            }
            Err(error) => {
                tracing::error!(%error, "the configuration could not be read again; the old one stays in force")
            }
        }
        result
    }

    fn shutdown(&self) {
        tracing::info!("ordered to stop");
        self.stop.cancel();
    }
}

impl Control {
    fn try_reload(&self) -> Result<Changes, AdminError> {
        let environment: Environment = environment();
        let new = config::load(self.path.as_deref(), &environment)
            .map_err(|error| AdminError::new(ErrorKind::Invalid, error.to_string()))?;
        let old = self.config.load_full();
        let changes = old.changes(&new);
        let config = Arc::new(old.with_live_changes(new));
        if let Some(read) = self.reader.get() {
            read(&config).map_err(|error| AdminError::new(ErrorKind::Invalid, error.to_string()))?;
        }
        self.log.set(&config.telemetry.log).map_err(|error| AdminError::from_chain(ErrorKind::Failed, &error))?;
        self.config.store(config.clone());
        self.followers.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|follower| follower(&config));
        Ok(changes)
    }
}

/// The environment of the process. Variables that are not Unicode cannot be ours.
pub fn environment() -> Environment {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
