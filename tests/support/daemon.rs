//! The daemon as a user runs it: `pgcutover run -c FILE`, a process that can be killed and started again.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgcutover::demo::cluster::{Cluster, Installations, free_port};

/// How the daemon is configured.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// Failpoints, as in `PGCUTOVER_FAILPOINTS`.
    pub failpoints: String,
    /// TOML, by section: `("cutover", "max_pause = \"2s\"")`. Sections given twice are joined.
    pub sections: Vec<(String, String)>,
    /// Further environment variables.
    pub environment: Vec<(String, String)>,
}

impl DaemonOptions {
    /// The same with one more line in a section.
    #[must_use]
    pub fn section(mut self, name: &str, toml: &str) -> Self {
        self.sections.push((name.to_owned(), toml.to_owned()));
        self
    }

    /// The same with failpoints.
    #[must_use]
    pub fn failpoints(mut self, text: &str) -> Self {
        text.clone_into(&mut self.failpoints);
        self
    }
}

/// A daemon in front of two clusters. Dropped: killed.
pub struct Daemon {
    options: DaemonOptions,
    process: Option<Child>,
    directory: tempfile::TempDir,
    /// Port of the proxy; the same over restarts.
    pub port: u16,
    /// Port of the HTTP API.
    pub admin_port: u16,
}

impl Daemon {
    /// Writes a configuration and starts the daemon; returns when the proxy accepts connections.
    pub fn start(source: &Cluster, target: &Cluster, options: DaemonOptions) -> Self {
        let mut daemon = Self::prepare(source, target, options);
        daemon.start_again();
        daemon
    }

    /// Writes a configuration, starts nothing.
    pub fn prepare(source: &Cluster, target: &Cluster, options: DaemonOptions) -> Self {
        let directory = tempfile::Builder::new().prefix("pgc-daemon-").tempdir().expect("temporary directory");
        let port = free_port().expect("a free port");
        let admin_port = free_port().expect("a free port");
        let daemon = Self { options, process: None, directory, port, admin_port };
        let mut sections = vec![
            ("listen".to_owned(), format!("address = \"127.0.0.1:{port}\"")),
            ("admin".to_owned(), format!("address = \"127.0.0.1:{admin_port}\"\nusers = [\"postgres\"]")),
            ("source".to_owned(), server_lines(source)),
            ("target".to_owned(), server_lines(target)),
            // A machine that runs everything at once is no measure for pauses and logins.
            ("cutover".to_owned(), "max_pause = \"120s\"\ndrain_timeout = \"30s\"".to_owned()),
            ("limits".to_owned(), "client_login_timeout = \"120s\"".to_owned()),
        ];
        if let (None, None) = (source.password(), target.password()) {
            // Clusters that trust everyone have no verifiers to check clients against.
            sections.push(("auth".to_owned(), "method = \"trust\"".to_owned()));
        }
        if let Some(tools) = Installations::find().newest_with_client_tools() {
            // The newest pg_dump reads sources of every major.
            sections.push(("migration".to_owned(), format!("bindir = \"{}\"", tools.bindir.display())));
        }
        sections.extend(daemon.options.sections.clone());
        fs::write(daemon.config_path(), toml_text(&sections)).expect("temporary directory is writable");
        daemon
    }

    /// Path of the configuration, for `pgcutover … -c`.
    pub fn config_path(&self) -> PathBuf {
        self.directory.path().join("pgcutover.toml")
    }

    /// Everything the daemon has logged, over all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// How much that is, in bytes.
    pub fn log_bytes(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |found| found.len())
    }

    /// What it has logged behind so many bytes.
    pub fn log_since(&self, bytes: u64) -> String {
        let mut text = Vec::new();
        let read = fs::File::open(self.log_path()).and_then(|mut log| {
            log.seek(SeekFrom::Start(bytes))?;
            log.read_to_end(&mut text)
        });
        read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&text).into_owned())
    }

    /// Changes what the next start does.
    pub fn set_failpoints(&mut self, text: &str) {
        text.clone_into(&mut self.options.failpoints);
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Starts the process without waiting for anything.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "the daemon runs already");
        self.process = Some(self.process_with(&["run"]));
    }

    /// Starts another process that takes over, and returns the one that ran until now. Does not wait for anything.
    pub fn succeed(&mut self) -> Child {
        let successor = self.process_with(&["run", "--takeover"]);
        self.process.replace(successor).expect("it runs")
    }

    /// Starts the process as a service manager does that listens for it, at these two sockets.
    pub fn spawn_activated(&mut self, listeners: [OwnedFd; 2]) {
        assert!(self.process.is_none(), "the daemon runs already");
        let [third, fourth] = listeners;
        let mut command = Command::new("sh");
        let script = r#"exec 3<&0 4<&1 </dev/null >&2; LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" "$@""#;
        command.args(["-c", script, env!("CARGO_BIN_EXE_pgcutover"), "run", "-c"]).arg(self.config_path());
        command.stdin(third).stdout(fourth).stderr(self.open_log());
        self.process = Some(self.spawn_with_environment(command));
    }

    fn process_with(&self, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgcutover"));
        command.args(arguments).arg("-c").arg(self.config_path()).stdin(Stdio::null());
        command.stdout(self.open_log()).stderr(self.open_log());
        self.spawn_with_environment(command)
    }

    fn open_log(&self) -> fs::File {
        fs::OpenOptions::new().create(true).append(true).open(self.log_path()).expect("log is writable")
    }

    fn spawn_with_environment(&self, mut command: Command) -> Child {
        command.env("PGCUTOVER_FAILPOINTS", &self.options.failpoints);
        command.envs(self.options.environment.iter().map(|(name, value)| (name, value)));
        command.spawn().expect("the daemon can be run")
    }

    /// Starts the process and waits until the proxy's port answers.
    pub fn start_again(&mut self) {
        self.spawn();
        let deadline = Instant::now() + super::PATIENCE;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            assert!(!self.has_ended(), "the daemon ended at once:\n{}", self.log());
            assert!(Instant::now() < deadline, "the daemon does not listen:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the process has ended by itself (at a failpoint).
    pub fn has_ended(&mut self) -> bool {
        match &mut self.process {
            Some(process) => process.try_wait().is_ok_and(|status| status.is_some()),
            None => true,
        }
    }

    /// Waits until the process has ended by itself.
    pub fn wait_for_end(&mut self) {
        let deadline = Instant::now() + super::PATIENCE;
        while !self.has_ended() {
            assert!(Instant::now() < deadline, "the daemon goes on:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.process = None;
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// `kill -9`, and a new start.
    pub fn restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// The same with other failpoints.
    pub fn restart_with(&mut self, failpoints: &str) {
        self.set_failpoints(failpoints);
        self.restart();
    }

    /// Runs `pgcutover ARGUMENTS -c CONFIG` to its end.
    pub fn command(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_pgcutover"))
            .args(arguments)
            .arg("-c")
            .arg(self.config_path())
            .stdin(Stdio::null())
            .output()
            .expect("the program can be run")
    }

    /// Starts `pgcutover ARGUMENTS -c CONFIG` and does not wait for its end.
    pub fn begin(&self, arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_pgcutover"))
            .args(arguments)
            .arg("-c")
            .arg(self.config_path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program can be run")
    }

    /// Runs `pgcutover ARGUMENTS -c CONFIG` to its end; panics with everything known if it fails, returns standard output.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments);
        assert!(
            output.status.success(),
            "pgcutover {arguments:?}: {}\n{}{}\ndaemon's log:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same with `--output json`, parsed.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--output", "json"]);
        let text = self.must(&arguments);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?} printed no JSON ({error}): {text}"))
    }

    /// Connection parameters of a client of the proxy.
    pub fn client(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").dbname(database);
        config
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("daemon.log")
    }

    /// A copy of the log that outlives the directory.
    fn keep_log(&self) -> PathBuf {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("daemon-{}.log", self.port));
        let _ = fs::copy(self.log_path(), &kept);
        kept
    }

    /// Where this daemon keeps its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            // The end of it, so that what the test says of its failure is not lost before it.
            let (log, kept) = (self.log(), self.keep_log());
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(40)..].join("\n");
            eprintln!("--- end of the daemon's log, {} lines in {} ---\n{end}", lines.len(), kept.display());
        }
    }
}

fn server_lines(cluster: &Cluster) -> String {
    let mut lines = format!(
        "host = \"{}\"\nport = {}\nuser = \"postgres\"\nconnect_timeout = \"30s\"",
        cluster.host(),
        cluster.port()
    );
    if let Some(password) = cluster.password() {
        lines.push_str(&format!("\npassword = {password:?}"));
    }
    lines
}

/// Lines of one section are joined; a key given later replaces an earlier one.
fn toml_text(sections: &[(String, String)]) -> String {
    let mut table = toml::Table::new();
    for (name, lines) in sections {
        let lines: toml::Table = lines.parse().unwrap_or_else(|error| panic!("[{name}] {lines}: {error}"));
        let section = table.entry(name.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let section = section.as_table_mut().expect("made as a table just above");
        section.extend(lines);
    }
    table.to_string()
}
