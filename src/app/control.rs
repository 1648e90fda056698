//! What the process can be told from outside: signals, reload, shutdown.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::supervisor::{Change, Supervisor};
use crate::admin::check;
use crate::admin::command::{Command, ShutdownWhen};
use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::parts::Daemon;
use crate::admin::service::Service;
use crate::admin::view::CheckView;
use crate::config::{self, Changes, Config, Environment, Live};
use crate::proxy::AccessError;
use crate::telemetry::LogControl;

/// The running daemon, as far as orders to it go.
pub(super) struct Control {
    path: Option<PathBuf>,
    config: Arc<ArcSwap<Config>>,
    log: LogControl,
    supervisor: Arc<Supervisor>,
    stop: CancellationToken,
    /// When a shutdown that was ordered is to end the sessions.
    winding_down: watch::Sender<Option<ShutdownWhen>>,
    /// What SET has said since the last reload, as variables of the environment. Locked from reading the configuration
    /// in force to putting the next one there: of two changes at once, neither may be made from what the other replaces.
    overrides: Mutex<Environment>,
    /// What takes a reload over.
    followers: Mutex<Vec<Follower>>,
    /// What may refuse a reload.
    reader: OnceLock<Reader>,
    /// Carries out what a signal orders, once there is something to order.
    service: OnceLock<Service>,
    /// Clients are let in, and the service manager was told.
    serving: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Called with every new configuration.
type Follower = Box<dyn Fn(&Config) + Send + Sync>;

/// Reads the files that a new configuration names; an error keeps everything as it is.
type Reader = Box<dyn Fn(&Config) -> Result<(), AccessError> + Send + Sync>;

impl Control {
    pub(super) fn new(
        path: Option<PathBuf>,
        config: Arc<ArcSwap<Config>>,
        log: LogControl,
        supervisor: Arc<Supervisor>,
    ) -> Self {
        Self {
            path,
            config,
            log,
            supervisor,
            stop: CancellationToken::new(),
            winding_down: watch::Sender::new(None),
            overrides: Mutex::default(),
            followers: Mutex::default(),
            reader: OnceLock::new(),
            service: OnceLock::new(),
            serving: AtomicBool::new(false),
        }
    }

    /// From now on a signal orders what an operator would: it is refused where an operator's order is.
    pub(super) fn obey_through(&self, service: Service) {
        // There is one in a process.
        let _first = self.service.set(service);
    }

    /// Tells the service manager what becomes of the service.
    pub(super) fn tell(&self, change: Change) {
        self.serving.store(change != Change::Stopping, Ordering::SeqCst);
        self.supervisor.tell(change);
    }

    /// Gives those who follow what came into force since `prepared_with`, while nobody did.
    pub(super) fn catch_up(&self, prepared_with: &Config) {
        let _nothing_changes = lock(&self.overrides);
        let now = self.config.load_full();
        if now.changes(prepared_with).applied.is_empty() {
            return;
        }
        if let Some(Err(error)) = self.reader.get().map(|read| read(&now)) {
            tracing::error!(%error, "what was reloaded while the daemon started cannot be taken over; reload once more");
            return;
        }
        lock(&self.followers).iter().for_each(|follower| follower(&now));
    }

    /// From now on `reader` is asked first at every reload.
    pub(super) fn consult(&self, reader: impl Fn(&Config) -> Result<(), AccessError> + Send + Sync + 'static) {
        // There is one proxy in a process, so it is set once.
        let _first = self.reader.set(Box::new(reader));
    }

    /// `follower` is called with every configuration that a reload brings into force.
    pub(super) fn follow(&self, follower: impl Fn(&Config) + Send + Sync + 'static) {
        lock(&self.followers).push(Box::new(follower));
    }

    /// Resolves once the daemon was told to stop, by a signal or an order.
    pub(super) async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// The orders to stop when the clients or their transactions have ended, one that was given before included.
    pub(super) fn winding_down(&self) -> WindingDown {
        let mut orders = self.winding_down.subscribe();
        orders.mark_changed();
        WindingDown(orders)
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
                        match self.service.get().cloned() {
                            // Nothing keeps us from the next signal meanwhile; what came of it is logged there.
                            Some(service) => drop(tokio::spawn(async move { service.execute(Command::Reload).await })),
                            None => drop(self.reload()),
                        }
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

/// Orders to stop later, as they are given.
pub(super) struct WindingDown(watch::Receiver<Option<ShutdownWhen>>);

impl WindingDown {
    /// The next one; of several at once the last. Dropping the future loses none.
    pub(super) async fn next(&mut self) -> ShutdownWhen {
        loop {
            if self.0.changed().await.is_err() {
                // Who gives orders lives as long as the process.
                return std::future::pending().await;
            }
            let order = *self.0.borrow_and_update();
            if let Some(when) = order {
                return when;
            }
        }
    }
}

#[async_trait::async_trait]
impl Daemon for Control {
    async fn check(&self) -> CheckView {
        check::check(&self.config.load_full()).await
    }

    fn reload(&self) -> Result<Changes, AdminError> {
        // A service that is not there yet, or ends, is not made ready by this.
        let tell = |change| {
            if self.serving.load(Ordering::SeqCst) {
                self.supervisor.tell(change);
            }
        };
        tell(Change::Reloading);
        let result = self.try_reload();
        tell(Change::Ready);
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

    fn set(&self, key: &str, value: &str) -> Result<(), AdminError> {
        let result = self.try_set(key, value);
        if result.is_ok() {
            tracing::info!(key, "changed by an operator, until the next reload");
        }
        result
    }

    fn shutdown(&self, when: ShutdownWhen) {
        tracing::info!(?when, "ordered to stop");
        match when {
            ShutdownWhen::Now => self.stop.cancel(),
            ShutdownWhen::Clients | ShutdownWhen::Servers => _ = self.winding_down.send_replace(Some(when)),
        }
    }
}

impl Control {
    fn try_reload(&self) -> Result<Changes, AdminError> {
        let mut overrides = lock(&self.overrides);
        let new = self.read(&environment())?;
        let old = self.config.load_full();
        let changes = old.changes(&new);
        self.apply(&old, new)?;
        overrides.clear();
        Ok(changes)
    }

    /// Reads the file with one more variable set, and applies that alone.
    fn try_set(&self, key: &str, value: &str) -> Result<(), AdminError> {
        let mut overrides = lock(&self.overrides);
        let old = self.config.load_full();
        let setting = old.settings().into_iter().find(|one| format!("{}.{}", one.section, one.key) == key);
        let Some(setting) = setting else {
            return Err(
                AdminError::new(ErrorKind::NotFound, format!("there is no setting {key:?}")).hint("SHOW CONFIG")
            );
        };
        if setting.live == Live::Restart {
            let hint = "change the configuration file and start again";
            return Err(AdminError::new(ErrorKind::Conflict, format!("{key} needs a restart")).hint(hint));
        }
        let variable = format!("PGCUTOVER_{}", key.to_ascii_uppercase().replacen('.', "_", 1));
        let mut with_it = overrides.clone();
        with_it.insert(variable.clone(), value.to_owned());
        let mut environment = environment();
        environment.extend(with_it.clone());
        let new = self.read(&environment).map_err(|error| named(error, &variable, key))?;
        let changes = old.changes(&new);
        if changes.applied.iter().any(|changed| changed != key) {
            let message = "the configuration file has changed since it was read";
            return Err(AdminError::new(ErrorKind::Conflict, message).hint("RELOAD first"));
        }
        self.apply(&old, new)?;
        *overrides = with_it;
        Ok(())
    }

    fn read(&self, environment: &Environment) -> Result<Config, AdminError> {
        config::load(self.path.as_deref(), environment)
            .map_err(|error| AdminError::new(ErrorKind::Invalid, error.to_string()))
    }

    fn apply(&self, old: &Config, new: Config) -> Result<(), AdminError> {
        let config = Arc::new(old.with_live_changes(new));
        if let Some(read) = self.reader.get() {
            read(&config).map_err(|error| AdminError::new(ErrorKind::Invalid, error.to_string()))?;
        }
        self.log.set(&config.telemetry.log).map_err(|error| AdminError::from_chain(ErrorKind::Failed, &error))?;
        self.config.store(config.clone());
        lock(&self.followers).iter().for_each(|follower| follower(&config));
        Ok(())
    }
}

/// The way by which a value is set is nothing to who has set it: the setting's name is.
fn named(error: AdminError, variable: &str, key: &str) -> AdminError {
    let section = key.split_once('.').map_or_else(String::new, |(section, key)| format!("[{section}] {key}: "));
    let way = format!("environment variable {variable}: ");
    let message = error.message.replace(&format!("{way}{section}"), &format!("{key}: "));
    // Of another setting, which does not go with this value.
    let message = message.replace(&way, &format!("{key}: "));
    AdminError { message, ..error }.hint("SHOW CONFIG has its value now")
}

/// The environment of the process. Variables that are not Unicode cannot be ours.
pub fn environment() -> Environment {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_settings_that_are_changed_at_once_neither_is_lost() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pgcutover.toml");
        let server = |name: &str| format!("[{name}]\nhost = \"{name}\"\nuser = \"u\"\n");
        let listen = "[listen]\naddress = \"127.0.0.1:6432\"\n";
        std::fs::write(&path, server("source") + &server("target") + listen).expect("written");
        let config = config::load(Some(&path), &environment()).expect("valid");
        let live = Arc::new(ArcSwap::from_pointee(config));
        let (log, _filter) = LogControl::for_tests();
        let control = Arc::new(Control::new(Some(path), live.clone(), log, Arc::default()));
        let (inside, first_is_inside) = std::sync::mpsc::channel();
        let inside = Mutex::new(Some(inside));
        control.consult(move |_| {
            // The first change lets the second one begin, and gives it time to end if it can.
            if let Some(inside) = lock(&inside).take() {
                inside.send(()).expect("waited for");
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            Ok(())
        });
        std::thread::scope(|scope| {
            scope.spawn(|| control.set("cutover.max_pause", "7s").expect("set"));
            first_is_inside.recv().expect("it has begun");
            control.set("cutover.drain_timeout", "2s").expect("set");
        });
        let now = live.load();
        let seconds = |duration: std::time::Duration| duration.as_secs();
        assert_eq!((seconds(now.cutover.max_pause), seconds(now.cutover.drain_timeout)), (7, 2));
        assert_eq!(lock(&control.overrides).len(), 2);
    }

    #[test]
    fn a_wrong_value_is_told_by_the_name_of_its_setting() {
        let variable = "PGCUTOVER_CUTOVER_MAX_PAUSE";
        let environment = Environment::from([
            ("PGCUTOVER_SOURCE_HOST".to_owned(), "a".to_owned()),
            ("PGCUTOVER_SOURCE_USER".to_owned(), "u".to_owned()),
            ("PGCUTOVER_TARGET_HOST".to_owned(), "b".to_owned()),
            ("PGCUTOVER_TARGET_USER".to_owned(), "u".to_owned()),
        ]);
        // No unit; and less than what another setting is.
        for (value, said) in [("5", "cutover.max_pause: "), ("1s", "cutover.max_pause: [cutover] drain_timeout: ")] {
            let mut environment = environment.clone();
            environment.insert(variable.to_owned(), value.to_owned());
            let error = config::load(None, &environment).expect_err(value);
            let error = AdminError::new(ErrorKind::Invalid, error.to_string());
            let named = named(error, variable, "cutover.max_pause").message;
            assert!(named.contains(said) && !named.contains("environment"), "{named}");
        }
    }
}
