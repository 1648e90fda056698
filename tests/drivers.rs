//! Client libraries that people use, each on one connection, across a cutover. `tests/drivers/README.md` says what the
//! scripts do. A library that cannot be installed here is skipped, and the reason is printed.

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pgcutover::switch::ServerRole;
use support::daemon::{Daemon, DaemonOptions};
use support::proxy::LoneProxy;
use support::{connect, installations, one_cluster, two_clusters, wait_for};

const SCHEMA: &str = "CREATE SCHEMA shop; CREATE TYPE shop.mood AS ENUM ('glad', 'sad'); \
    CREATE TABLE shop.driver_writes (driver text, n int, mood shop.mood NOT NULL, note text, PRIMARY KEY (driver, n))";

/// How many numbers a driver has written, and the last.
const COUNT: &str = "SELECT count(*), coalesce(max(n), 0)::int8 FROM shop.driver_writes WHERE driver = $1";

/// For a script to start, and to end once it has been told that the database has moved.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often sessions are moved where no migration has to be run for it.
const MOVES: u64 = 25;

/// A client library, and how its script is started.
struct Driver {
    /// As its script calls itself in the table.
    name: &'static str,
    command: Command,
}

/// A script that runs.
struct Running {
    name: &'static str,
    process: Child,
    directory: PathBuf,
}

/// What can be run here; the rest is said to be skipped.
fn drivers() -> Vec<Driver> {
    let mut drivers = Vec::new();
    for (name, found) in [
        ("psycopg3", python("psycopg3.py")),
        ("asyncpg", python("asyncpg_driver.py")),
        ("node-pg", node()),
        ("pgjdbc", jdbc()),
        ("psql", psql()),
    ] {
        match found {
            Ok(command) => drivers.push(Driver { name, command }),
            Err(reason) => say(&format!("SKIPPED {name}: {reason}")),
        }
    }
    assert!(drivers.iter().any(|driver| driver.name == "psql"), "psql comes with the servers of the tests");
    drivers
}

/// Starts every script against `port`, and returns when all of them work.
fn start_all(directory: &Path, port: u16) -> Vec<Running> {
    let mut running: Vec<_> = drivers().into_iter().map(|driver| driver.start(directory, port)).collect();
    running.iter_mut().for_each(Running::wait_until_ready);
    running
}

#[tokio::test]
async fn each_driver_keeps_its_one_connection_across_a_cutover() {
    let (source, target) = two_clusters();
    connect(&source, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("created");
    connect(&source, "shop").await.batch_execute(SCHEMA).await.expect("created");
    let daemon = Daemon::start(&source, &target, DaemonOptions::default());

    let directory = tempfile::tempdir().expect("temporary directory");
    let mut running = start_all(directory.path(), daemon.port);

    daemon.must(&["migration", "create", "drivers", "--database", "shop", "--wait"]);
    let report = daemon.json(&["migration", "cutover", "drivers"]);
    assert_eq!(report["outcome"], "switched", "{report}\n{}", daemon.log());

    running.iter().for_each(|script| script.tell_switched(target.port()));
    let mut counted = Vec::new();
    for script in &mut running {
        let acknowledged = script.wait_for_pass();
        let name = script.name;
        let row = connect(&target, "shop").await.query_one(COUNT, &[&name]).await.expect("counted");
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (acknowledged, acknowledged), "{name}");
        say(&format!("{name}: {acknowledged} acknowledged writes, all on the target"));
        counted.push((name, acknowledged));
    }
    // The old server has been shut to everyone but the stream back, which brings what was written after the switch.
    let open = "ALTER DATABASE shop ALLOW_CONNECTIONS true CONNECTION LIMIT -1";
    connect(&source, "postgres").await.batch_execute(open).await.expect("opened");
    let old = connect(&source, "shop").await;
    for (name, acknowledged) in counted {
        wait_for("the source to have every write", || async {
            let row = old.query_one(COUNT, &[&name]).await.expect("counted");
            (row.get::<_, i64>(0), row.get::<_, i64>(1)) == (acknowledged, acknowledged)
        })
        .await;
    }
    wait_for("backends of the scripts to end", || async {
        let left = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'driver-%'";
        let left: i64 = connect(&target, "shop").await.query_one(left, &[]).await.expect("counted").get(0);
        left == 0
    })
    .await;
}

/// The proxy alone, with one server on both sides: sessions are moved from backend to backend under load, many times.
#[tokio::test(flavor = "multi_thread")]
async fn each_driver_goes_on_through_many_moves() {
    let cluster = one_cluster("moves");
    connect(&cluster, "postgres").await.batch_execute("CREATE DATABASE shop").await.expect("created");
    connect(&cluster, "shop").await.batch_execute(SCHEMA).await.expect("created");
    let mut proxy = LoneProxy::start(&cluster, &cluster);
    let directory = tempfile::tempdir().expect("temporary directory");
    let mut running = start_all(directory.path(), proxy.port);

    let sessions = proxy.sessions.clone();
    let pids = || [ServerRole::Source, ServerRole::Target].map(|server| sessions.backend_pids(server, "shop")).concat();
    let mut before = pids();
    assert_eq!(before.len(), running.len());
    for _ in 0..MOVES {
        proxy.move_all("shop").await;
        wait_for("every session to be on a new backend", || async {
            let now = pids();
            now.len() == before.len() && now.iter().all(|pid| !before.contains(pid))
        })
        .await;
        before = pids();
    }

    running.iter().for_each(|script| script.tell_switched(cluster.port()));
    for script in &mut running {
        let acknowledged = script.wait_for_pass();
        say(&format!("{}: {acknowledged} acknowledged writes over {MOVES} moves", script.name));
    }
    proxy.stop().await;
}

impl Driver {
    fn start(mut self, directory: &Path, port: u16) -> Running {
        let directory = directory.join(self.name);
        fs::create_dir(&directory).expect("created");
        let output = File::create(directory.join("output")).expect("created");
        self.command
            .env("DRIVER_DIR", &directory)
            .envs([("PGHOST", "127.0.0.1"), ("PGDATABASE", "shop"), ("PGUSER", "postgres")])
            .env("PGPORT", port.to_string())
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("file handles can be copied"))
            .stderr(output);
        let process = self.command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.name));
        Running { name: self.name, process, directory }
    }
}

impl Running {
    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.directory.join("ready").exists() {
            let ended = self.process.try_wait().expect("a child can be asked");
            assert!(ended.is_none(), "{} has ended:\n{}", self.name, self.output());
            assert!(Instant::now() < deadline, "{} does not get ready:\n{}", self.name, self.output());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The database is on this port now.
    fn tell_switched(&self, port: u16) {
        // Written whole before it appears under its name.
        let (made, name) = (self.directory.join("switched.new"), self.directory.join("switched"));
        fs::write(&made, port.to_string()).expect("written");
        fs::rename(made, name).expect("renamed");
    }

    /// How many writes were acknowledged.
    fn wait_for_pass(&mut self) -> i64 {
        let status = self.wait();
        let output = self.output();
        assert!(status.success() && output.lines().any(|line| line == "PASS"), "{}: {status}\n{output}", self.name);
        let acknowledged = output.lines().find_map(|line| line.strip_prefix("ACKNOWLEDGED "));
        acknowledged.expect("printed before PASS").parse().expect("a number")
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().expect("a child can be asked") {
                return status;
            }
            assert!(Instant::now() < deadline, "{} goes on:\n{}", self.name, self.output());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn output(&self) -> String {
        fs::read_to_string(self.directory.join("output")).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Where the scripts are.
fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers")
}

/// Where libraries are installed; kept from one run to the next.
fn installed(what: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("drivers").join(what)
}

fn python(script: &str) -> Result<Command, String> {
    let venv = installed("venv");
    install_once(&venv, "requirements.txt", |venv| {
        quietly(Command::new("python3").args(["-m", "venv", "--clear"]).arg(venv))?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
        quietly(Command::new(venv.join("bin/python")).args(pip).arg(scripts().join("requirements.txt")))
    })?;
    let mut command = Command::new(venv.join("bin/python"));
    command.arg(scripts().join(script));
    Ok(command)
}

fn node() -> Result<Command, String> {
    let directory = installed("node");
    install_once(&directory, "package.json", |directory| {
        fs::create_dir_all(directory).map_err(|error| error.to_string())?;
        fs::copy(scripts().join("package.json"), directory.join("package.json")).map_err(|error| error.to_string())?;
        let npm = ["install", "--silent", "--no-fund", "--no-audit", "--no-package-lock"];
        quietly(Command::new("npm").args(npm).current_dir(directory))
    })?;
    let mut command = Command::new("node");
    command.arg(scripts().join("node_pg.js")).env("NODE_PATH", directory.join("node_modules"));
    Ok(command)
}

fn jdbc() -> Result<Command, String> {
    let jar = std::env::var_os("PGCUTOVER_PGJDBC_JAR").map(PathBuf::from);
    let jar = jar.unwrap_or_else(|| PathBuf::from("/usr/share/java/postgresql.jar"));
    if !jar.is_file() {
        return Err(format!("no {}: apt-get install libpostgresql-jdbc-java", jar.display()));
    }
    // Single source files are compiled as they are run, which takes the compiler.
    quietly(Command::new("javac").arg("-version"))
        .map_err(|why| format!("{why}: apt-get install default-jdk-headless"))?;
    let mut command = Command::new("java");
    command.arg("-cp").arg(jar).arg(scripts().join("Jdbc.java"));
    Ok(command)
}

fn psql() -> Result<Command, String> {
    let found = installations();
    let program = found.newest_with_client_tools().and_then(|installation| installation.program("psql"));
    let mut command = Command::new("bash");
    command.arg(scripts().join("psql.sh")).env("PSQL", program.ok_or("no installation with client tools")?);
    Ok(command)
}

/// Installs into `directory` unless that was done with this very `list` before.
fn install_once(directory: &Path, list: &str, install: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
    let wanted = fs::read(scripts().join(list)).map_err(|error| error.to_string())?;
    // Two tests at once must not install into the same place.
    let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
    fs::create_dir_all(installed("")).map_err(failed)?;
    let lock = File::create(directory.with_extension("lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let stamp = directory.join("installed");
    if fs::read(&stamp).is_ok_and(|done| done == wanted) {
        return Ok(());
    }
    install(directory)?;
    fs::write(stamp, wanted).map_err(|error| error.to_string())
}

/// Runs a command; its output is the reason if it fails.
fn quietly(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}: {}", output.status, said.lines().last().unwrap_or_default()))
}

/// Printed even where the test runner keeps the output of tests that pass to itself.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
