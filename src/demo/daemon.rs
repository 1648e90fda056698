//! The daemon as a user runs it: the same program, as a process, with a configuration file; ordered about by the same
//! commands.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::demo::cluster::{Cluster, free_port, guarded, send_signal_to_group};

/// From the start of the process to the first connection.
const START_BOUND: Duration = Duration::from_secs(60);

/// From asking it to stop to killing it.
const STOP_BOUND: Duration = Duration::from_secs(15);

/// The daemon could not be run, or an order was refused.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A file or a process.
    #[error("cannot {doing}")]
    Io {
        /// What was attempted.
        doing: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// It ended, or never listened.
    #[error("the daemon {what}; the end of its log:\n{log}")]
    NotServing {
        /// `ended at once` or `does not listen`.
        what: &'static str,
        /// The end of its log.
        log: String,
    },
    /// A command ended with an error.
    #[error("`pgcutover {command}` failed: {output}\nThe end of the daemon's log:\n{log}")]
    Order {
        /// Its arguments.
        command: String,
        /// What it printed.
        output: String,
        /// The end of the daemon's log.
        log: String,
    },
}

/// The daemon between two clusters. Dropped: stopped.
#[derive(Debug)]
pub struct Daemon {
    /// The shell around the process, see [`guarded`]; none after the end.
    guardian: Option<Child>,
    program: PathBuf,
    directory: Option<tempfile::TempDir>,
    path: PathBuf,
    port: u16,
    admin_port: u16,
}

impl Daemon {
    /// Writes the configuration and starts the process. `bindir` is where pg_dump is.
    pub fn start(source: &Cluster, target: &Cluster, bindir: &Path) -> Result<Self, DaemonError> {
        let io = |doing: &str| {
            let doing = doing.to_owned();
            move |source| DaemonError::Io { doing, source }
        };
        let directory =
            tempfile::Builder::new().prefix("pgc-daemon-").tempdir().map_err(io("create a temporary directory"))?;
        let program = std::env::current_exe().map_err(io("find the running program"))?;
        let port = free_port().map_err(io("find a free port"))?;
        let admin_port = free_port().map_err(io("find a free port"))?;
        let path = directory.path().to_owned();
        let mut daemon = Self { guardian: None, program, directory: Some(directory), path, port, admin_port };
        daemon.write_configuration(source, target, bindir).map_err(io("write the daemon's configuration"))?;
        daemon.spawn().map_err(io("run the daemon"))?;
        daemon.wait_until_serving()?;
        Ok(daemon)
    }

    /// Where applications connect.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Dashboard, API and metrics.
    pub fn admin_address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.admin_port))
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.path.join("pgcutover.toml")
    }

    /// The end of what it has logged.
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Runs `pgcutover ARGUMENTS --output json` and returns what it printed; the exit status must be 0.
    pub async fn order(&self, arguments: &[&str]) -> Result<serde_json::Value, DaemonError> {
        let output = self.run(arguments).await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let failed = || self.order_failed(arguments, &output);
        if !output.status.success() {
            return Err(failed());
        }
        serde_json::from_str(&text).map_err(|_| failed())
    }

    /// The same, whatever the exit status; none: no JSON was printed.
    pub async fn ask(&self, arguments: &[&str]) -> Result<(bool, Option<serde_json::Value>, String), DaemonError> {
        let output = self.run(arguments).await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ok((output.status.success(), serde_json::from_slice(&output.stdout).ok(), text))
    }

    /// Leaves it running after this process; returns its directory.
    pub fn keep(mut self) -> PathBuf {
        use std::io::Write as _;
        if let Some(mut guardian) = self.guardian.take()
            && let Some(mut stdin) = guardian.stdin.take()
            && let Err(error) = stdin.write_all(b"keep\n")
        {
            tracing::warn!(%error, "the daemon had ended before it could be kept");
        }
        if let Some(directory) = self.directory.take() {
            let _ = directory.keep();
        }
        self.path.clone()
    }

    /// Asks it to end, waits, and kills it if it does not.
    pub fn stop(&mut self) {
        let Some(mut guardian) = self.guardian.take() else { return };
        drop(guardian.stdin.take());
        let deadline = Instant::now() + STOP_BOUND;
        while matches!(guardian.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                tracing::warn!("the daemon does not end; killing it");
                send_signal_to_group(guardian.id(), "KILL");
                let _ = guardian.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    async fn run(&self, arguments: &[&str]) -> Result<Output, DaemonError> {
        let mut command = tokio::process::Command::new(&self.program);
        command.args(arguments).arg("-c").arg(self.config_path()).args(["--output", "json"]);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let doing = format!("run `pgcutover {}`", arguments.join(" "));
        command.output().await.map_err(|source| DaemonError::Io { doing, source })
    }

    fn order_failed(&self, arguments: &[&str], output: &Output) -> DaemonError {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        DaemonError::Order { command: arguments.join(" "), output: printed, log: self.log_tail() }
    }

    fn write_configuration(&self, source: &Cluster, target: &Cluster, bindir: &Path) -> std::io::Result<()> {
        let server = |cluster: &Cluster| {
            let mut table = toml::Table::new();
            table.insert("host".into(), cluster.host().into());
            table.insert("port".into(), i64::from(cluster.port()).into());
            table.insert("user".into(), "postgres".into());
            if let Some(password) = cluster.password() {
                table.insert("password".into(), password.into());
            }
            table
        };
        let section = |pairs: Vec<(&str, toml::Value)>| -> toml::Table {
            pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
        };
        let mut file = toml::Table::new();
        let mut put = |name: &str, table: toml::Table| file.insert(name.to_owned(), toml::Value::Table(table));
        put("listen", section(vec![("address", self.address().to_string().into())]));
        let users = toml::Value::Array(vec!["postgres".into()]);
        put("admin", section(vec![("address", self.admin_address().to_string().into()), ("users", users)]));
        put("source", server(source));
        put("target", server(target));
        put("migration", section(vec![("bindir", bindir.display().to_string().into())]));
        let mut options = fs::OpenOptions::new();
        // It holds passwords.
        let mut config = options.write(true).create_new(true).mode(0o600).open(self.config_path())?;
        std::io::Write::write_all(&mut config, file.to_string().as_bytes())
    }

    fn spawn(&mut self) -> std::io::Result<()> {
        let log = fs::File::create(self.log_path())?;
        let mut command: Command = guarded(&self.path, "TERM", &self.program);
        command.arg("run").arg("-c").arg(self.config_path());
        self.guardian = Some(command.stdout(log.try_clone()?).stderr(log).spawn()?);
        Ok(())
    }

    fn wait_until_serving(&mut self) -> Result<(), DaemonError> {
        let deadline = Instant::now() + START_BOUND;
        while TcpStream::connect_timeout(&self.address(), Duration::from_secs(1)).is_err() {
            let ended = self.guardian.as_mut().is_none_or(|guardian| !matches!(guardian.try_wait(), Ok(None)));
            if ended || Instant::now() > deadline {
                let what = if ended { "ended at once" } else { "does not listen" };
                return Err(DaemonError::NotServing { what, log: self.log_tail() });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn log_path(&self) -> PathBuf {
        self.path.join("daemon.log")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}
