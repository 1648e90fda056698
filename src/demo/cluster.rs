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
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rand::Rng as _;

pub use crate::demo::installations::{Installation, Installations};

/// How long a server may take to start or stop; generous, because continuous integration machines are slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// What [`Cluster::start`] is told.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Directory with `postgres` and `initdb`.
    pub bindir: PathBuf,
    /// For messages and directory names: `source`, `target`.
    pub name: String,
    /// Lines of postgresql.conf beyond the defaults (which are made for logical replication); later ones win.
    pub settings: Vec<(String, String)>,
    /// How `postgres` and everybody else log in.
    pub auth: ClusterAuth,
    /// Certificate and key; none: no TLS.
    pub tls: Option<ClusterTls>,
}

impl ClusterOptions {
    /// A cluster that trusts everyone on loopback, without TLS.
    pub fn new(installation: &Installation, name: &str) -> Self {
        Self {
            bindir: installation.bindir.clone(),
            name: name.to_owned(),
            settings: Vec::new(),
            auth: ClusterAuth::Trust,
            tls: None,
        }
    }

    /// The same with one more setting of postgresql.conf.
    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with another way to log in.
    #[must_use]
    pub fn auth(mut self, auth: ClusterAuth) -> Self {
        self.auth = auth;
        self
    }

    /// The same with TLS.
    #[must_use]
    pub fn tls(mut self, tls: ClusterTls) -> Self {
        self.tls = Some(tls);
        self
    }
}

/// What pg_hba.conf asks for, on TCP and on the socket.
#[derive(Clone, Debug)]
pub enum ClusterAuth {
    /// Nothing.
    Trust,
    /// SCRAM-SHA-256; the password is the one of `postgres`.
    Scram {
        /// Password of `postgres`.
        password: String,
    },
    /// md5; the password is the one of `postgres`.
    Md5 {
        /// Password of `postgres`.
        password: String,
    },
    /// These lines of pg_hba.conf, and this password of `postgres`.
    Hba {
        /// Password of `postgres`.
        password: String,
        /// Whole lines.
        lines: Vec<String>,
    },
}

impl ClusterAuth {
    fn password(&self) -> Option<&str> {
        match self {
            Self::Trust => None,
            Self::Scram { password } | Self::Md5 { password } | Self::Hba { password, .. } => Some(password),
        }
    }

    fn hba(&self) -> String {
        let method = match self {
            Self::Trust => "trust",
            Self::Scram { .. } => "scram-sha-256",
            Self::Md5 { .. } => "md5",
            Self::Hba { lines, .. } => return lines.join("\n") + "\n",
        };
        ["local all all", "local replication all", "host all all all", "host replication all all"]
            .map(|line| format!("{line} {method}\n"))
            .concat()
    }
}

/// What the server shows on TLS.
#[derive(Clone, Debug)]
pub struct ClusterTls {
    /// Certificate chain, PEM.
    pub certificate_pem: String,
    /// Private key, PEM.
    pub key_pem: String,
    /// Authority that client certificates must come from, PEM; none: they are not asked for.
    pub client_ca_pem: Option<String>,
}

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, everything is written (SIGINT).
    Fast,
    /// As in a crash of the server, but the postmaster reaps its children (SIGQUIT).
    Immediate,
    /// `kill -9` of the postmaster; its children notice by themselves.
    Kill,
}

impl Stop {
    fn signal(self) -> &'static str {
        match self {
            Self::Fast => "INT",
            Self::Immediate => "QUIT",
            Self::Kill => "KILL",
        }
    }
}

/// A throw-away cluster could not be made, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file or directory of the cluster.
    #[error("cluster {name}: cannot {doing}")]
    Io {
        /// Name of the cluster.
        name: String,
        /// What was attempted, on which path.
        doing: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// initdb or postgres ended with an error.
    #[error("cluster {name}: {program} failed: {output}")]
    Program {
        /// Name of the cluster.
        name: String,
        /// The program's path.
        program: String,
        /// The end of what it printed.
        output: String,
    },
    /// The server did not become ready, or did not stop.
    #[error("cluster {name}: the server did not {what} within {seconds} s; the end of its log: {log}")]
    Timeout {
        /// Name of the cluster.
        name: String,
        /// `start` or `stop`.
        what: &'static str,
        /// How long was waited.
        seconds: u64,
        /// The end of the server's log.
        log: String,
    },
}

/// Another account, for root, whom PostgreSQL refuses to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Account {
    uid: u32,
    gid: u32,
}

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
        cluster.initdb()?;
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

    /// A command that runs as the server's account, with nothing of our environment that PostgreSQL would read.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("HOME", &self.path).env("LC_ALL", "C").env("TZ", "UTC").current_dir(&self.path);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if let Some(account) = self.account {
            command.uid(account.uid).gid(account.gid);
        }
        command
    }

    fn initdb(&self) -> Result<(), ClusterError> {
        let program = self.options.bindir.join("initdb");
        let mut output = String::new();
        // Some minimal systems have no C.UTF-8; the encoding is UTF8 either way.
        for locale in ["C.UTF-8", "C"] {
            let mut command = self.command(&program);
            command.arg("-D").arg(self.data_dir()).args(["-U", "postgres", "-E", "UTF8", "--no-sync", "--auth=trust"]);
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
        let mut guardian = self
            .command(Path::new("/bin/sh"))
            .args(["-c", GUARDIAN, "pgcutover-cluster"])
            .arg(&self.path)
            .arg(&program)
            .arg("-D")
            .arg(self.data_dir())
            .args(["-p", &self.port.to_string()])
            .stdin(Stdio::piped())
            .stdout(log.0)
            .stderr(log.1)
            // Ctrl-C at the terminal is for us; we then stop the servers in order.
            .process_group(0)
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

/// Runs the server; ends it and removes the directory when standard input ends without the line `keep`.
/// `$1` is the directory, the rest the server's command line.
const GUARDIAN: &str = r#"
directory=$1; shift
exec 3<&0
"$@" </dev/null 3<&- & server=$!
(
    read -r word <&3
    [ "$word" = keep ] && exit
    : >"$directory/abandoned"
    kill -QUIT "$server"
) 2>/dev/null & watcher=$!
exec 3<&-
wait "$server"; status=$?
kill "$watcher" 2>/dev/null
if [ -e "$directory/abandoned" ]; then cd / && rm -rf "$directory"; fi
exit "$status"
"#;

/// Made for logical replication and for speed; a test of durability sets fsync itself.
const DEFAULT_SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("wal_level", "logical"),
    ("max_replication_slots", "20"),
    ("max_wal_senders", "20"),
    ("max_connections", "200"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "64MB"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("log_min_messages", "warning"),
    ("log_line_prefix", "%m [%p] %q%u@%d %a "),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
];

fn setting_line(name: &str, value: &str) -> String {
    format!("{name} = '{}'\n", value.replace('\'', "''"))
}

/// What postmaster.pid says (miscadmin.h: LOCK_FILE_LINE_…): line 1 pid, line 3 start time, line 4 port, line 8 status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PostmasterStatus {
    pid: u32,
    /// Seconds since 1970.
    started: u64,
    port: u16,
    ready: bool,
}

fn postmaster_status(data: &Path) -> Option<PostmasterStatus> {
    parse_postmaster_pid(&fs::read_to_string(data.join("postmaster.pid")).ok()?)
}

fn parse_postmaster_pid(text: &str) -> Option<PostmasterStatus> {
    let lines: Vec<&str> = text.lines().collect();
    Some(PostmasterStatus {
        pid: lines.first()?.trim().parse().ok()?,
        started: lines.get(2).and_then(|line| line.trim().parse().ok()).unwrap_or(0),
        port: lines.get(3).and_then(|line| line.trim().parse().ok()).unwrap_or(0),
        ready: lines.get(7).is_some_and(|line| line.trim() == "ready"),
    })
}

/// The shell's own `kill`, because the program of that name is not everywhere and the system call is not in `std`.
fn send_signal(pid: u32, signal: &str) {
    let result = Command::new("/bin/sh")
        .args(["-c", "kill -s \"$1\" \"$2\" 2>/dev/null", "kill", signal, &pid.to_string()])
        .status();
    if let Err(error) = result {
        tracing::warn!(pid, signal, %error, "cannot send a signal");
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

/// The last lines of `text`, for messages.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// Below the range that Linux gives to outgoing connections (32768 and up), so that a stopped server's port is still
/// free when it comes back.
pub fn free_port() -> std::io::Result<u16> {
    let mut rng = rand::rng();
    for _ in 0..200 {
        let port = rng.random_range(15_000..32_000);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr().map(|address| address.port())
}

/// A Unix socket's path has at most 107 bytes, and the server's account must be able to walk to it.
fn temp_root() -> PathBuf {
    let configured = std::env::temp_dir();
    let usable = configured.as_os_str().len() < 60 && others_may_enter(&configured);
    if usable { configured } else { PathBuf::from("/tmp") }
}

fn others_may_enter(dir: &Path) -> bool {
    dir.ancestors().all(|dir| fs::metadata(dir).is_ok_and(|metadata| metadata.mode() & 0o001 != 0))
}

/// Who owns what we just created is who we are; root needs somebody else.
fn account_for_server(created: &Path) -> Option<Account> {
    let root = fs::metadata(created).is_ok_and(|metadata| metadata.uid() == 0);
    root.then(|| unprivileged_account(&fs::read_to_string("/etc/passwd").unwrap_or_default()))
}

fn unprivileged_account(passwd: &str) -> Account {
    let find = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        let account = Account { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? };
        (account.uid != 0).then_some(account)
    };
    find("postgres").or_else(|| find("nobody")).unwrap_or(Account { uid: 65_534, gid: 65_534 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postmaster_pid_is_ready_only_when_it_says_so() {
        let text = "123\n/data\n1700000000\n20001\n/tmp\n127.0.0.1\n  12345  1\nready   \n";
        assert_eq!(
            parse_postmaster_pid(text),
            Some(PostmasterStatus { pid: 123, started: 1_700_000_000, port: 20_001, ready: true })
        );
        let starting = text.replace("ready", "starting");
        assert!(!parse_postmaster_pid(&starting).expect("has a pid").ready);
        assert!(!parse_postmaster_pid("123\n").expect("has a pid").ready, "written in two steps");
        assert_eq!(parse_postmaster_pid(""), None);
    }

    #[test]
    fn root_gets_the_first_account_that_is_not_root() {
        let account = |text| unprivileged_account(text);
        assert_eq!(account("root:x:0:0::/:\npostgres:x:101:103::/:\n"), Account { uid: 101, gid: 103 });
        assert_eq!(account("postgres:x:0:0::/:\nnobody:x:99:98::/:\n"), Account { uid: 99, gid: 98 });
        assert_eq!(account(""), Account { uid: 65_534, gid: 65_534 });
    }
}
