//! What happens to the ledger: orders, and what goes wrong while they are carried out. Everything follows from a seed.

use std::process::Child;
use std::time::Duration;

use pgcutover::cutover::steps::{ALL_FAILPOINTS, ROLLBACK_FAILPOINTS};
use pgcutover::demo::cluster::Cluster;
use pgcutover::demo::compare;
use pgcutover::switch::ServerRole;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::clients::{self, LEDGER, Memory, TABLES, Violations};
use crate::support::daemon::{Daemon, DaemonOptions};
use crate::support::link::Link;
use crate::support::world::{COMPLETED, NAME, READY, World};
use crate::support::{connect, connect_with, try_connect, two_clusters, wait_for};

/// Steps of one schedule.
const STEPS: usize = 3;

/// Steps of the engine, for the way back: it is made before the fence, and turned to after the decision.
const RETURN_FAILPOINTS: &[&str] =
    &["return.after_publication", "return.after_slot", "return.after_prepared", "return.after_turn"];

/// About as long as an order takes here.
const LATEST_MS: u64 = 2500;

/// Every step is lengthened by so much, in milliseconds, so that what goes wrong at one has come before it is over.
const STEP_MS: u64 = 15;

/// What goes wrong while an order is carried out.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Something happens to a process or a link.
    Befalls(Mishap, Moment),
    /// The daemon runs with a step that fails.
    Fail(&'static str),
    /// The daemon dies at a step.
    DieAt(&'static str),
}

/// What happens to processes and links.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mishap {
    /// The daemon is killed, and started again.
    Kill,
    /// The daemon is stopped for a while.
    StopDaemon,
    /// This server is, with all its processes.
    Stop(ServerRole),
    /// Every connection between the daemon and this server is cut.
    Cut(ServerRole),
    /// Nothing passes between the daemon and this server for a while.
    Stall(ServerRole),
}

/// When it happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Moment {
    /// So many milliseconds after the order: mostly while the cutover is being prepared.
    Later(u64),
    /// When a step has been reached, or the order has ended without it.
    At(&'static str),
}

/// One order with its fault.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// A rehearsal only.
    pub dry_run: bool,
    pub fault: Fault,
}

/// Everything that happens.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    pub steps: Vec<Step>,
}

impl Schedule {
    pub fn of(seed: u64) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        let steps = (0..STEPS).map(|_| {
            let place = places()[dice.random_range(0..places().len())];
            // What fails in the engine by order is no mishap that it may get over by itself.
            let failing = ALL_FAILPOINTS[dice.random_range(0..ALL_FAILPOINTS.len())];
            let moment = match dice.random_range(0..3) {
                0 => Moment::Later(dice.random_range(0..LATEST_MS)),
                _ => Moment::At(place),
            };
            let server = if dice.random_bool(0.5) { ServerRole::Source } else { ServerRole::Target };
            let fault = match dice.random_range(0..12) {
                0 | 1 => Fault::None,
                2 | 3 => Fault::Befalls(Mishap::Kill, moment),
                4 => Fault::Befalls(Mishap::StopDaemon, moment),
                5 | 6 => Fault::Befalls(Mishap::Stop(server), moment),
                7 => Fault::Befalls(Mishap::Stall(server), moment),
                8 | 9 => Fault::Befalls(Mishap::Cut(server), moment),
                10 => Fault::Fail(failing),
                _ => Fault::DieAt(place),
            };
            Step { dry_run: dice.random_bool(0.15), fault }
        });
        Self { steps: steps.collect() }
    }

    /// Whether a client may have noticed: its proxy died, or its connection did. Nothing else may be felt.
    pub fn may_be_felt(&self) -> bool {
        self.steps.iter().any(|step| match step.fault {
            Fault::None => false,
            Fault::Befalls(mishap, _) => matches!(mishap, Mishap::Kill | Mishap::Cut(_)),
            // Failing steps are switched on by starting the daemon again.
            Fault::Fail(_) | Fault::DieAt(_) => true,
        })
    }
}

/// Where something may happen.
fn places() -> Vec<&'static str> {
    [ALL_FAILPOINTS, ROLLBACK_FAILPOINTS, RETURN_FAILPOINTS].concat()
}

/// The servers and the daemon; they live through many schedules, because a migration can go there and back for ever.
pub struct Stage {
    pub world: World,
    /// To the source, and to the target.
    links: [Link; 2],
    failpoints: String,
}

impl Stage {
    /// With these failpoints besides the lengthened steps.
    pub async fn set(failpoints: &str) -> Self {
        let lengthened = places().into_iter().map(|name| format!("{name}=sleep:{STEP_MS}ms;"));
        let failpoints = &(lengthened.collect::<String>() + failpoints);
        let (source, target) = two_clusters();
        let admin = connect(&source, "postgres").await;
        admin.batch_execute(&format!("CREATE DATABASE {LEDGER}")).await.expect("a new database");
        connect(&source, LEDGER).await.batch_execute(TABLES).await.expect("new tables");
        let links = [Link::to(source.address()).await, Link::to(target.address()).await];
        let through =
            |link: &Link| format!("host = \"127.0.0.1\"\nport = {}\nconnect_timeout = \"30s\"", link.address.port());
        let options = DaemonOptions::default()
            .section(
                "cutover",
                "max_pause = \"60s\"\ndrain_timeout = \"30s\"\nmax_lag_at_start = \"1GB\"\nreads = \"continue\"",
            )
            .section("source", &through(&links[0]))
            .section("target", &through(&links[1]))
            .failpoints(failpoints);
        let daemon = Daemon::start(&source, &target, options);
        let size = pgcutover::demo::shop::Size::at_scale(0.01);
        let world = World { source, target, daemon, size };
        world.daemon.must(&["migration", "create", NAME, "--database", LEDGER]);
        world.wait_until(READY).await;
        Self { world, links, failpoints: failpoints.to_owned() }
    }

    /// Entries of earlier schedules are of no use to later ones, and would be compared again each time.
    pub async fn forget_entries(&mut self) {
        self.settle().await;
        let client = connect_with(&self.world.daemon.client(LEDGER)).await;
        client.batch_execute("TRUNCATE entry").await.expect("nobody writes");
    }

    /// Carries an order out, with its fault.
    pub async fn play(&mut self, step: &Step) {
        self.settle().await;
        let state = self.world.state();
        let order = if state == READY { "cutover" } else { "rollback" };
        if let Fault::Fail(name) | Fault::DieAt(name) = step.fault {
            let action = if matches!(step.fault, Fault::Fail(_)) { "error" } else { "abort" };
            let needs_abort = if name.starts_with("abort.") { "decide.before_decision=error;" } else { "" };
            self.world.daemon.restart_with(&format!("{};{needs_abort}{name}={action}", self.failpoints));
            self.world.wait_until(&state).await;
        }
        let arguments: &[&str] =
            if step.dry_run { &["migration", order, NAME, "--dry-run"] } else { &["migration", order, NAME] };
        let logged = self.world.daemon.log_bytes();
        let mut ordered = self.world.daemon.begin(arguments);
        if let Fault::Befalls(mishap, moment) = &step.fault {
            match moment {
                Moment::Later(milliseconds) => pause(*milliseconds).await,
                Moment::At(name) => self.wait_reached(name, logged, &mut ordered).await,
            }
            self.go_wrong(*mishap).await;
        }
        wait_for("the order to end", || {
            let ended = ordered.try_wait().expect("a child process").is_some();
            async move { ended }
        })
        .await;
        if matches!(step.fault, Fault::Fail(_) | Fault::DieAt(_)) {
            self.world.daemon.restart_with(&self.failpoints);
        }
    }

    /// Until this step is reached, behind so much of the log, or the order has ended without.
    async fn wait_reached(&self, name: &str, logged: u64, ordered: &mut Child) {
        let words = format!("failpoint={name:?}");
        loop {
            let has_ended = ordered.try_wait().expect("a child process").is_some();
            if has_ended || self.world.daemon.log_since(logged).contains(&words) {
                return;
            }
            pause(2).await;
        }
    }

    async fn go_wrong(&mut self, mishap: Mishap) {
        let a_while = 700;
        match mishap {
            Mishap::Kill => self.world.daemon.restart(),
            Mishap::StopDaemon => {
                // It may have ended by a failing step of before, and be about to be found so.
                let Some(pid) = self.world.daemon.pid() else { return };
                signal(&[pid], "STOP");
                pause(a_while).await;
                signal(&[pid], "CONT");
            }
            Mishap::Stop(server) => {
                let processes = family(match server {
                    ServerRole::Source => &self.world.source,
                    ServerRole::Target => &self.world.target,
                });
                signal(&processes, "STOP");
                pause(a_while).await;
                signal(&processes, "CONT");
            }
            Mishap::Cut(server) => self.link(server).cut_all(),
            Mishap::Stall(server) => {
                self.link(server).stall(true);
                pause(a_while).await;
                self.link(server).stall(false);
            }
        }
    }

    fn link(&self, server: ServerRole) -> &Link {
        match server {
            ServerRole::Source => &self.links[0],
            ServerRole::Target => &self.links[1],
        }
    }

    /// Waits until the daemon serves, and the migration can go either way.
    pub async fn settle(&mut self) {
        if self.world.daemon.has_ended() {
            self.world.daemon.kill();
            self.world.daemon.start_again();
        }
        wait_for("the proxy to serve", || async {
            let Ok(client) = try_connect(&self.world.daemon.client(LEDGER)).await else { return false };
            client.query_one("SELECT 1", &[]).await.is_ok()
        })
        .await;
        wait_for("the migration to be at rest", || async {
            // Looking takes a process each time.
            pause(100).await;
            let view = self.world.view();
            let word = |key: &str| view[key].as_str().unwrap_or("?").to_owned();
            let state = format!("{}/{}", word("state"), word("substate"));
            [READY, COMPLETED].contains(&state.as_str()) && view["databases"][0]["latency_bytes"].is_u64()
        })
        .await;
    }

    /// Gives an order that has to go through, as often as something of before is still being put in order.
    pub async fn must_switch(&mut self, order: &str) {
        wait_for(&format!("a {order} that goes through"), || async {
            let output = self.world.daemon.command(&["migration", order, NAME, "--output", "json"]);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if !output.status.success() {
                println!("  {order}: {text}{}", String::from_utf8_lossy(&output.stderr));
            }
            output.status.success()
        })
        .await;
    }

    /// What the clients remember against the server that serves, and the two servers against each other. The other one
    /// is opened for it, and shut again by the next switch.
    pub async fn check(&self, memories: &[Memory]) -> Violations {
        let serving = self.world.serving_port_of(LEDGER).await;
        let (active, other) = if serving == self.world.source.port() {
            (&self.world.source, &self.world.target)
        } else {
            (&self.world.target, &self.world.source)
        };
        let active = connect(active, LEDGER).await;
        let mut found = clients::check(memories, &active).await.expect("the server that serves can be read");
        let admin = connect(other, "postgres").await;
        admin.batch_execute(&format!("ALTER DATABASE {LEDGER} ALLOW_CONNECTIONS true")).await.expect("a superuser may");
        let left = connect(other, LEDGER).await;
        found.differences = compare::differences(&active, &left).await.expect("both can be read");
        drop(left);
        admin
            .batch_execute(&format!("ALTER DATABASE {LEDGER} ALLOW_CONNECTIONS false"))
            .await
            .expect("a superuser may");
        found
    }
}

async fn pause(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

/// The postmaster and every process that it has started.
fn family(cluster: &Cluster) -> Vec<u32> {
    let postmaster = cluster.pid().expect("it runs");
    let children = format!("/proc/{postmaster}/task/{postmaster}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    std::iter::once(postmaster).chain(children).collect()
}

fn signal(processes: &[u32], signal: &str) {
    for process in processes {
        pgcutover::demo::cluster::send_signal(*process, signal);
    }
}
