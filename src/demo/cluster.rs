//! Throw-away PostgreSQL clusters, for the demo and for the tests.
//!
//! A [`Cluster`] is initdb'ed into a temporary directory of its own, listens on a loopback port and on a Unix socket in
//! that directory, and is gone when the value is dropped. It never touches a server that it did not start.
//!
//! PostgreSQL refuses to run as root; started by root, the cluster runs as `postgres`, else as `nobody`.
//!
//! If this process dies without running destructors, the servers end too: each one is the child of a small shell that
//! waits for the end of its standard input, which only this process holds open; it then stops the server and removes
//! the directory. (`PR_SET_PDEATHSIG` would follow the thread that spawned it, not the process.)

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

mod initialised;
mod options;
mod process;

pub use crate::demo::installations::{Installation, Installations};
pub use options::{ClusterAuth, ClusterError, ClusterOptions, ClusterTls, Stop};
use process::{Account, DEFAULT_SETTINGS, account_for_server, pause, postmaster_status, setting_line, tail, temp_root};
pub use process::{free_port, guarded, send_signal, send_signal_to_group};

/// How long a server may take to start or stop; generous, because continuous integration machines are slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// One running (or stopped, see [`Cluster::stop`]) server. Dropped: stopped and removed.
#[derive(Debug)]
pub struct Cluster {
    /// What it was started with.
    options: ClusterOptions,
    /// Loopback port; stays the same over restarts.
    port: u16,
    /// Who the server runs as, when that is not us.
    account: Option<Account>,
    /// Server version, for example 15.
    major: u16,
    /// The shell around the server; none: stopped.
    guardian: Option<Child>,
    /// Holds data directory, socket and log. None after [`Cluster::keep`].
    directory: Option<tempfile::TempDir>,
    /// The same path, for after `keep`.
    path: PathBuf,
}

impl Cluster {
    /// Makes and starts a cluster. Blocks for a second or two; call it from `spawn_blocking` in async programs.
    pub fn start(options: ClusterOptions) -> Result<Self, ClusterError> {
        let name = options.name.clone();
        let io = |doing: String| move |source| ClusterError::Io { name: name.clone(), doing, source };
        let directory = tempfile::Builder::new()
            .prefix(&format!("pgc-{}-", options.name))
            .tempdir_in(temp_root())
            .map_err(io.clone()("create a temporary directory".into()))?;
        let path = directory.path().to_owned();
        let account = account_for_server(&path);
        if let Some(account) = account {
            std::os::unix::fs::chown(&path, Some(account.uid), Some(account.gid))
                .map_err(io.clone()(format!("give {} to the server's account", path.display())))?;
        }
        let major = Installation::in_dir(&options.bindir).map_or(0, |installation| installation.major);
        let mut cluster = Self { options, port: 0, account, major, guardian: None, directory: Some(directory), path };
        cluster.initialise()?;
        cluster.write_configuration().map_err(io("write the configuration".into()))?;
        cluster.run_on_free_port()?;
        Ok(cluster)
    }

    /// Makes and starts two clusters at the same time.
    pub fn start_two(first: ClusterOptions, second: ClusterOptions) -> Result<(Self, Self), ClusterError> {
        std::thread::scope(|scope| {
            let first = scope.spawn(|| Self::start(first));
            let second = Self::start(second);
            let first = first.join().expect("starting a cluster does not panic");
            Ok((first?, second?))
        })
    }

    /// Its name, as given.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Major version of the server.
    pub fn major(&self) -> u16 {
        self.major
    }

    /// Where its programs are.
    pub fn bindir(&self) -> &Path {
        &self.options.bindir
    }

    /// `127.0.0.1`.
    pub fn host(&self) -> &'static str {
        "127.0.0.1"
    }

    /// TCP port, and the number of the Unix socket.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Host and port.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Directory of the Unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.path
    }

    /// Data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Password of `postgres`, where one is asked for.
    pub fn password(&self) -> Option<&str> {
        self.options.auth.password()
    }

    /// Connection parameters of `postgres` for `database`.
    pub fn config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host(self.host()).port(self.port).user("postgres").dbname(database);
        if let Some(password) = self.password() {
            config.password(password);
        }
        config
    }

    /// libpq connection string of `postgres` for `database`, password included.
    pub fn dsn(&self, database: &str) -> String {
        let mut text = format!("host={} port={} user=postgres dbname={database}", self.host(), self.port);
        if let Some(password) = self.password() {
            text.push_str(&format!(" password={password}"));
        }
        text
    }

    /// Everything the server has logged since it was made.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// Process id of the postmaster; none: stopped.
    pub fn pid(&self) -> Option<u32> {
        self.guardian.as_ref()?;
        postmaster_status(&self.data_dir()).map(|status| status.pid)
    }

    /// Stops the server and waits until it is gone. The data stays; [`Cluster::start_again`] brings it back.
    pub fn stop(&mut self, how: Stop) -> Result<(), ClusterError> {
        let Some(mut guardian) = self.guardian.take() else { return Ok(()) };
        if let Some(status) = postmaster_status(&self.data_dir()) {
            send_signal(status.pid, how.signal());
        } else {
            // Never became ready: the end of standard input makes the guardian end it.
            drop(guardian.stdin.take());
        }
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if matches!(guardian.try_wait(), Ok(Some(_))) {
                return Ok(());
            }
            pause();
        }
        self.guardian = Some(guardian);
        Err(self.timeout("stop"))
    }

    /// Starts a stopped server on the same port.
    pub fn start_again(&mut self) -> Result<(), ClusterError> {
        if self.guardian.is_some() {
            return Ok(());
        }
        self.run()
    }

    /// Stops and starts.
    pub fn restart(&mut self, how: Stop) -> Result<(), ClusterError> {
        self.stop(how)?;
        self.start_again()
    }

    /// Adds lines to postgresql.conf; they count from the next restart or reload.
    pub fn configure(&self, settings: &[(&str, &str)]) -> Result<(), ClusterError> {
        let lines: String = settings.iter().map(|(name, value)| setting_line(name, value)).collect();
        let path = self.data_dir().join("postgresql.conf");
        fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(|source| self.io_error(format!("write to {}", path.display()), source))
    }

    /// Makes the server read its configuration again.
    pub fn reload(&self) {
        if let Some(pid) = self.pid() {
            send_signal(pid, "HUP");
        }
    }

    /// Leaves the server running, and its directory in place, after this process has ended; returns the directory.
    pub fn keep(mut self) -> PathBuf {
        if let Some(mut guardian) = self.guardian.take()
            && let Some(mut stdin) = guardian.stdin.take()
        {
            // One line tells the guardian that the coming end of input is meant.
            if stdin.write_all(b"keep\n").is_err() {
                tracing::warn!(cluster = self.name(), "the server had ended before it could be kept");
            }
        }
        if let Some(directory) = self.directory.take() {
            let _ = directory.keep();
        }
        self.path.clone()
    }

    fn log_path(&self) -> PathBuf {
        self.path.join("server.log")
    }

    fn io_error(&self, doing: String, source: std::io::Error) -> ClusterError {
        ClusterError::Io { name: self.options.name.clone(), doing, source }
    }

    fn timeout(&self, what: &'static str) -> ClusterError {
        ClusterError::Timeout {
            name: self.options.name.clone(),
            what,
            seconds: PATIENCE.as_secs(),
            log: tail(&self.log()),
        }
    }

    /// The command runs as the server's account, with nothing of our environment that PostgreSQL would read.
    fn set_account(&self, command: &mut Command) {
        command.env_clear().env("HOME", &self.path).env("LC_ALL", "C").env("TZ", "UTC").current_dir(&self.path);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if let Some(account) = self.account {
            command.uid(account.uid).gid(account.gid);
        }
    }

    /// A data directory as initdb makes it.
    fn initialise(&self) -> Result<(), ClusterError> {
        let Some(kept) = initialised::place(&self.options, self.major) else { return self.initdb() };
        let keeping = |source| self.io_error(format!("keep a data directory in {}", kept.display()), source);
        if initialised::copy(&kept, &self.data_dir()).map_err(keeping)? {
            return Ok(());
        }
        self.initdb()?;
        initialised::keep(&self.data_dir(), &kept).map_err(keeping)
    }

    fn initdb(&self) -> Result<(), ClusterError> {
        let program = self.options.bindir.join("initdb");
        let mut output = String::new();
        // Some minimal systems have no C.UTF-8; the encoding is UTF8 either way.
        for locale in ["C.UTF-8", "C"] {
            let mut command = Command::new(&program);
            self.set_account(&mut command);
            command.arg("-D").arg(self.data_dir()).args(["-U", "postgres", "-E", "UTF8", "--no-sync"]);
            // initdb hashes the password of `postgres` in the way that this needs; pg_hba.conf is written later.
            command.arg(format!("--auth={}", self.options.auth.method()));
            command.arg(format!("--locale={locale}")).stdin(Stdio::null());
            if let Some(password) = self.password() {
                let path = self.write_private("password", password)?;
                command.arg("--pwfile").arg(path);
            }
            let result =
                command.output().map_err(|source| self.io_error(format!("run {}", program.display()), source))?;
            if result.status.success() {
                return Ok(());
            }
            output = String::from_utf8_lossy(&result.stdout).into_owned() + &String::from_utf8_lossy(&result.stderr);
            if self.data_dir().exists() {
                fs::remove_dir_all(self.data_dir())
                    .map_err(|source| self.io_error("remove the data directory".into(), source))?;
            }
        }
        Err(ClusterError::Program {
            name: self.options.name.clone(),
            program: program.display().to_string(),
            output: tail(&output),
        })
    }

    /// A file that only the server's account may read.
    fn write_private(&self, name: &str, content: &str) -> Result<PathBuf, ClusterError> {
        let path = self.path.join(name);
        let write = || -> std::io::Result<()> {
            fs::write(&path, content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            if let Some(account) = self.account {
                std::os::unix::fs::chown(&path, Some(account.uid), Some(account.gid))?;
            }
            Ok(())
        };
        write().map_err(|source| self.io_error(format!("write {}", path.display()), source))?;
        Ok(path)
    }

    fn write_configuration(&self) -> std::io::Result<()> {
        let data = self.data_dir();
        let mut lines = String::new();
        for (name, value) in DEFAULT_SETTINGS {
            lines.push_str(&setting_line(name, value));
        }
        lines.push_str(&setting_line("unix_socket_directories", &self.path.display().to_string()));
        if matches!(self.options.auth, ClusterAuth::Md5 { .. }) {
            lines.push_str(&setting_line("password_encryption", "md5"));
        } else if self.password().is_some() {
            lines.push_str(&setting_line("password_encryption", "scram-sha-256"));
        }
        if let Some(tls) = &self.options.tls {
            let write = |name: &str, pem: &str| self.write_private(name, pem).map_err(std::io::Error::other);
            lines.push_str(&setting_line("ssl", "on"));
            let certificate = write("server.crt", &tls.certificate_pem)?;
            lines.push_str(&setting_line("ssl_cert_file", &certificate.display().to_string()));
            let key = write("server.key", &tls.key_pem)?;
            lines.push_str(&setting_line("ssl_key_file", &key.display().to_string()));
            if let Some(ca) = &tls.client_ca_pem {
                let ca = write("clients.crt", ca)?;
                lines.push_str(&setting_line("ssl_ca_file", &ca.display().to_string()));
            }
        }
        for (name, value) in &self.options.settings {
            lines.push_str(&setting_line(name, value));
        }
        fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"))?.write_all(lines.as_bytes())?;
        fs::write(data.join("pg_hba.conf"), self.options.auth.hba())
    }

    /// Another program may take the port between our look and the server's bind: then another one is tried.
    fn run_on_free_port(&mut self) -> Result<(), ClusterError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            self.port = free_port().map_err(|source| self.io_error("find a free port".into(), source))?;
            match self.run() {
                Err(ClusterError::Program { output, .. })
                    if attempts < 5 && output.contains("Address already in use") => {}
                result => return result,
            }
        }
    }

    /// Starts the server and waits until it accepts connections.
    fn run(&mut self) -> Result<(), ClusterError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.spawn_and_wait(deadline) {
                // After a kill -9 the old children may still hold the shared memory for a moment.
                Err(ClusterError::Program { output, .. })
                    if output.contains("shared memory block") && Instant::now() < deadline =>
                {
                    pause();
                }
                result => return result,
            }
        }
    }

    fn spawn_and_wait(&mut self, deadline: Instant) -> Result<(), ClusterError> {
        let program = self.options.bindir.join("postgres");
        // A killed server leaves its file behind, and it says "ready".
        let stale = postmaster_status(&self.data_dir());
        let log_before = fs::metadata(self.log_path()).map_or(0, |metadata| metadata.len());
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .and_then(|log| Ok((log.try_clone()?, log)))
            .map_err(|source| self.io_error("open the server's log".into(), source))?;
        let mut command = guarded(&self.path, "QUIT", &program);
        self.set_account(&mut command);
        let mut guardian = command
            .arg("-D")
            .arg(self.data_dir())
            .args(["-p", &self.port.to_string()])
            .stdout(log.0)
            .stderr(log.1)
            .spawn()
            .map_err(|source| self.io_error(format!("run {}", program.display()), source))?;
        while Instant::now() < deadline {
            if let Ok(Some(_)) = guardian.try_wait() {
                let log = self.log();
                let output = log.get(usize::try_from(log_before).unwrap_or(0)..).unwrap_or(&log);
                return Err(ClusterError::Program {
                    name: self.options.name.clone(),
                    program: program.display().to_string(),
                    output: tail(output),
                });
            }
            let status = postmaster_status(&self.data_dir()).filter(|status| status.ready && Some(*status) != stale);
            if status.is_some() {
                self.guardian = Some(guardian);
                return Ok(());
            }
            pause();
        }
        self.guardian = Some(guardian);
        Err(self.timeout("start"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.stop(Stop::Immediate) {
            tracing::warn!(cluster = self.name(), %error, "a throw-away server was left behind");
        }
        // The TempDir removes the files.
    }
}
