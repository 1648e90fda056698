//! The demo's course, step by step.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::Rng as _;
use tokio_postgres::Client;

use crate::demo::DemoArgs;
use crate::demo::cluster::{Cluster, ClusterAuth, ClusterError, ClusterOptions, Installation, Installations};
use crate::demo::daemon::{Daemon, DaemonError};
use crate::demo::inspection::{Inspection, inspect};
use crate::demo::progress::Progress;
use crate::demo::report::{Report, Run};
use crate::demo::shop::{self, SHOP, Size};
use crate::demo::workload::{Wait, Workload};
use crate::ident::quote_literal;

/// How long the application runs before the copy begins, and after the switch.
const QUIET_TIME: Duration = Duration::from_secs(3);

/// A cutover that aborts has changed nothing: it is tried again, and the report says how often.
const CUTOVER_ATTEMPTS: u64 = 5;

/// Name of the demo's migration.
const MIGRATION: &str = "shop-move";

/// The demo could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// No programs to run.
    #[error("no complete PostgreSQL installation (postgres, initdb, pg_dump, psql) was found: run `make servers`")]
    NoInstallation,
    /// A directory given by hand.
    #[error("{0} has no postgres and initdb that run")]
    NotAnInstallation(std::path::PathBuf),
    /// A cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The daemon, or an order to it.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// A query of the demo itself.
    #[error("cannot {doing}")]
    Sql {
        /// What was attempted.
        doing: &'static str,
        /// Why it failed.
        source: tokio_postgres::Error,
    },
    /// The migration went wrong.
    #[error("the migration is in state {state}: {error}\nThe end of the daemon's log:\n{log}")]
    Migration {
        /// Its state.
        state: String,
        /// Its error, as the API gives it.
        error: String,
        /// The end of the daemon's log.
        log: String,
    },
    /// No cutover switched.
    #[error("no cutover switched; the last one said: {answer}\nThe end of the daemon's log:\n{log}")]
    NoCutover {
        /// What the last attempt printed.
        answer: String,
        /// The end of the daemon's log.
        log: String,
    },
    /// The proxy leads to the wrong server.
    #[error("after the switch the proxy leads to port {0}, and not to the target")]
    WrongServer(String),
    /// A thread of the demo panicked.
    #[error("a part of the demo ended early")]
    Joined(#[from] tokio::task::JoinError),
}

fn sql(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> DemoError {
    move |source| DemoError::Sql { doing, source }
}

/// Everything that lives as long as the demo. Fields are dropped in order: the daemon before its servers.
struct Stage {
    daemon: Daemon,
    source: Cluster,
    target: Cluster,
    size: Size,
    /// Password of the role that the application logs in with.
    password: String,
}

pub(super) async fn run(args: &DemoArgs) -> Result<Report, DemoError> {
    let mut progress = Progress::new();
    let stage = set_up(args, &mut progress).await?;
    let clients = usize::from(args.clients);
    let application = Workload::start(&stage.application(), clients, stage.size);
    let mut run = Run { majors: (stage.source.major(), stage.target.major()), ..Run::default() };

    progress.begin("the application works on the source");
    watch(&application, &mut progress, QUIET_TIME).await;
    progress.end(None);
    progress.begin("the migration copies, and follows");
    run.copy = copy(&stage, &application, &mut progress).await?;
    progress.begin("the cutover");
    cut_over(&stage, &mut run, &mut progress).await?;
    run.writes_until_switch = application.tally().writes.load(Ordering::Relaxed);
    progress.begin("the application works on the target");
    watch(&application, &mut progress, QUIET_TIME).await;
    stage.must_lead_to_target().await?;
    stage.try_direct_writes(&mut run).await;
    watch(&application, &mut progress, QUIET_TIME).await;
    let outcomes = application.finish().await;
    progress.begin("both servers are compared");
    // The stream back to the source ends, so that it holds still while it is read.
    stage.daemon.order(&["migration", "complete", MIGRATION]).await?;
    let inspection = stage.inspect(clients).await?;
    progress.end(None);

    let report = Report::new(&run, &outcomes, &inspection);
    if args.keep {
        stage.keep();
    }
    Ok(report)
}

async fn set_up(args: &DemoArgs, progress: &mut Progress) -> Result<Stage, DemoError> {
    let found = Installations::find();
    let (oldest, newest) = found.pair().ok_or(DemoError::NoInstallation)?;
    let tools = found.newest_with_client_tools().ok_or(DemoError::NoInstallation)?;
    let given = |dir: &Option<std::path::PathBuf>, default: &Installation| match dir {
        Some(dir) => Installation::in_dir(dir).ok_or_else(|| DemoError::NotAnInstallation(dir.clone())),
        None => Ok(default.clone()),
    };
    let source = given(&args.source_bindir, oldest)?;
    let target = given(&args.target_bindir, newest)?;

    progress.begin(&format!("a source of version {} and a target of version {}", source.version, target.version));
    let options = |installation: &Installation, name: &str| {
        ClusterOptions::new(installation, name).auth(ClusterAuth::Scram { password: random_password() })
    };
    let (first, second) = (options(&source, "source"), options(&target, "target"));
    let (source, target) = tokio::task::spawn_blocking(move || Cluster::start_two(first, second)).await??;

    progress.begin("the rental shop's database");
    let password = random_password();
    let size = Size::at_scale(args.scale);
    build_shop(&source, &password, size).await.map_err(sql("build the shop's database"))?;

    progress.begin("the daemon");
    let bindir = tools.bindir.clone();
    let (daemon, source, target) = tokio::task::spawn_blocking(move || {
        let daemon = Daemon::start(&source, &target, &bindir)?;
        Ok::<_, DaemonError>((daemon, source, target))
    })
    .await??;
    let stage = Stage { daemon, source, target, size, password };
    progress.end(Some(&format!("postgresql://shop:…@{}/{SHOP} is all the application knows", stage.daemon.address())));
    Ok(stage)
}

async fn build_shop(source: &Cluster, password: &str, size: Size) -> Result<(), tokio_postgres::Error> {
    let admin = connect(&source.config("postgres")).await?;
    let role = format!("CREATE ROLE {SHOP} LOGIN PASSWORD {}", quote_literal(password));
    admin.batch_execute(&role).await?;
    admin.batch_execute(&format!("CREATE DATABASE {SHOP}")).await?;
    let shop = connect(&source.config(SHOP)).await?;
    shop::build(&shop, source.major(), size).await
}

/// Shows what the application does, for `time`.
async fn watch(application: &Workload, progress: &mut Progress, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        progress.update(0, 0, &tally_words(application));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn tally_words(application: &Workload) -> String {
    let tally = application.tally();
    let (writes, errors) = (tally.writes.load(Ordering::Relaxed), tally.errors.load(Ordering::Relaxed));
    format!("{writes} writes acknowledged, {errors} errors")
}

/// Creates the migration and waits until it is ready to cut over.
async fn copy(stage: &Stage, application: &Workload, progress: &mut Progress) -> Result<Duration, DemoError> {
    let began = Instant::now();
    stage.daemon.order(&["migration", "create", MIGRATION, "--database", SHOP]).await?;
    loop {
        let view = stage.daemon.order(&["migration", "show", MIGRATION]).await?;
        let (state, substate) = (text(&view["state"]), text(&view["substate"]));
        match state.as_str() {
            "WaitingForUserAction" => break,
            "InProgress" => {}
            _ => {
                let error = view["error"].to_string();
                return Err(DemoError::Migration { state, error, log: stage.daemon.log_tail() });
            }
        }
        let database = &view["databases"][0];
        let (ready, total) = (database["tables_ready"].as_u64(), database["tables_total"].as_u64());
        let words = format!("{substate}, {}", tally_words(application));
        progress.update(ready.unwrap_or(0), total.unwrap_or(0), &words);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let took = began.elapsed();
    progress.end(Some(&tally_words(application)));
    Ok(took)
}

async fn cut_over(stage: &Stage, run: &mut Run, progress: &mut Progress) -> Result<(), DemoError> {
    let mut answer = String::new();
    for _ in 0..CUTOVER_ATTEMPTS {
        let began = Instant::now();
        let (switched, view, printed) = stage.daemon.ask(&["migration", "cutover", MIGRATION]).await?;
        let window = Wait { began, lasted: began.elapsed() };
        if let (true, Some(view)) = (switched, view) {
            run.cutover_window = Some(window);
            progress.end(Some(&format!("switched, pause {:.1} ms", view["pause_ms"].as_f64().unwrap_or(f64::NAN))));
            run.cutover = view;
            return Ok(());
        }
        run.aborted_cutovers += 1;
        progress.update(0, 0, &format!("aborted: {printed}"));
        answer = printed;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Err(DemoError::NoCutover { answer, log: stage.daemon.log_tail() })
}

impl Stage {
    /// The one connection string of the application.
    fn application(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.daemon.address().port());
        config.user(SHOP).password(&self.password).dbname(SHOP);
        config
    }

    async fn must_lead_to_target(&self) -> Result<(), DemoError> {
        let doing = sql("connect through the proxy after the switch");
        let client = connect(&self.application()).await.map_err(&doing)?;
        let row = client.query_one("SELECT current_setting('port')", &[]).await.map_err(&doing)?;
        let port: String = row.get(0);
        if port == self.target.port().to_string() { Ok(()) } else { Err(DemoError::WrongServer(port)) }
    }

    /// Programs that bypass the proxy: the application's role and a superuser, both insisting on writing.
    async fn try_direct_writes(&self, run: &mut Run) {
        let superuser = self.source.config(SHOP);
        let mut application = self.source.config(SHOP);
        application.user(SHOP).password(&self.password);
        for (who, config) in [("the application's role", application), ("a superuser", superuser)] {
            for sql in [
                "INSERT INTO shop.write_log (write_no, kind) VALUES (-1, 'late')",
                "BEGIN READ WRITE; INSERT INTO shop.write_log (write_no, kind) VALUES (-1, 'late'); COMMIT",
                "SET default_transaction_read_only = off; INSERT INTO shop.write_log (write_no, kind) VALUES (-1, 'late')",
            ] {
                run.direct_write_attempts += 1;
                let Ok(client) = connect(&config).await else { continue };
                if client.batch_execute(sql).await.is_ok() {
                    run.direct_writes_accepted.push(format!("the source accepted a direct write of {who}: {sql}"));
                }
            }
        }
    }

    /// The source is opened again for this, from another database: the fence holds superusers too.
    async fn inspect(&self, clients: usize) -> Result<Inspection, DemoError> {
        let admin = connect(&self.source.config("postgres")).await.map_err(sql("connect to the source"))?;
        for change in [
            format!("ALTER DATABASE {SHOP} ALLOW_CONNECTIONS true"),
            format!("ALTER DATABASE {SHOP} CONNECTION LIMIT -1"),
        ] {
            admin.batch_execute(&change).await.map_err(sql("open the source for the comparison"))?;
        }
        let source = connect(&self.source.config(SHOP)).await.map_err(sql("connect to the source"))?;
        let target = connect(&self.target.config(SHOP)).await.map_err(sql("connect to the target"))?;
        inspect(&source, &target, clients).await.map_err(sql("compare the two servers"))
    }

    fn keep(self) {
        let Self { daemon, source, target, password, .. } = self;
        let (proxy, admin) = (daemon.address(), daemon.admin_address());
        eprintln!("demo: kept, and running:");
        eprintln!("demo:   proxy      postgresql://{SHOP}:{password}@{proxy}/{SHOP}");
        eprintln!("demo:   dashboard  http://{admin}/");
        for cluster in [&source, &target] {
            eprintln!("demo:   {:<10} {}", cluster.name(), cluster.dsn(SHOP));
        }
        let pids = [source.pid(), target.pid()].map(|pid| pid.map_or_else(String::new, |pid| pid.to_string()));
        let daemon = daemon.keep();
        let (source, target) = (source.keep(), target.keep());
        eprintln!("demo: to end and remove all of it:");
        eprintln!("demo:   pgcutover shutdown -c {}", daemon.join("pgcutover.toml").display());
        eprintln!("demo:   kill -INT {}", pids.join(" "));
        eprintln!("demo:   rm -rf {} {} {}", daemon.display(), source.display(), target.display());
    }
}

async fn connect(config: &tokio_postgres::Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    // Ends with the client; what breaks shows at the next request.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

fn text(value: &serde_json::Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn random_password() -> String {
    let mut random = rand::rng();
    (0..24).map(|_| char::from(random.sample(rand::distr::Alphanumeric))).collect()
}
