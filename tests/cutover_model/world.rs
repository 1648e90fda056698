//! What stands on the two servers of the model, and what its processes know.

use pgcutover::catalog::claims::{Claims, DecisionClaim, FenceClaim, ServerIdentity};
use pgcutover::catalog::decision::Outcome;
use pgcutover::catalog::resolve::{self, Verdict};
use pgcutover::switch::{Epoch, ServerRole};

const DATABASE: &str = "shop";
const MIGRATION: &str = "move";

/// Processes of pgcutover.
pub const PROCESSES: usize = 2;

/// A transaction on the source, of a process's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Running {
    /// The process that opened it has died: the server does not know that yet.
    pub orphan: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    // The source, durable.
    pub fences: Vec<Option<Outcome>>,
    pub shut: bool,
    /// Committed writes.
    pub log: u8,
    pub running: [Option<Running>; PROCESSES],
    /// Processes that have sessions there, which a shut door does not end.
    pub connected: [bool; PROCESSES],
    // The target, durable.
    pub decisions: Vec<Option<Outcome>>,
    pub applied: u8,
    /// Writes of clients.
    pub target_writes: u8,
    /// Whose session holds the coordinator's lock.
    pub lock: Option<usize>,
    /// A decision that a lost connection may still carry.
    pub in_flight: Option<usize>,
    pub processes: [Process; PROCESSES],
    pub begun_writes: u8,
    /// A write was committed on the source after the decision.
    pub late_write: bool,
    /// Misfortunes that may still happen, of whatever kind.
    pub misfortunes: u8,
    /// The last failpoint that was passed, so that each can be shown to be reached.
    pub passed: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Life {
    Up,
    /// Stopped by a signal: its sessions stay, it does nothing.
    Frozen,
    Down,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub life: Life,
    /// None: not known, to be resolved.
    pub route: Option<ServerRole>,
    pub fenced: bool,
    /// What was read of both servers, not acted on yet.
    pub read: Option<Option<ServerRole>>,
    pub job: Option<Job>,
}

/// A cutover that this process coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Job {
    /// Index of its fence.
    pub epoch: usize,
    pub passed: &'static str,
    /// Its session on the target is lost.
    pub unlinked: bool,
    /// What the log must have arrived up to.
    pub marker: u8,
    pub in_doubt: bool,
}

impl World {
    pub fn is_decided(&self) -> bool {
        self.decisions.contains(&Some(Outcome::Decided))
    }

    pub fn identity(server: ServerRole) -> ServerIdentity {
        ServerIdentity { system_identifier: server.to_string(), timeline: 1 }
    }

    /// What the two servers say, for the code's own resolution.
    pub fn claims(&self) -> (Claims, Claims) {
        let (source, target) = (Self::identity(ServerRole::Source), Self::identity(ServerRole::Target));
        let epoch = |index: usize| Epoch(index as u64 + 1);
        let fences = self.fences.iter().enumerate().map(|(index, outcome)| FenceClaim {
            epoch: epoch(index),
            migration: MIGRATION.to_owned(),
            databases: vec![DATABASE.to_owned()],
            on: source.clone(),
            leads_to: target.clone(),
            outcome: *outcome,
        });
        let decisions = self.decisions.iter().enumerate().filter_map(|(index, outcome)| {
            Some(DecisionClaim {
                epoch: epoch(index),
                migration: MIGRATION.to_owned(),
                outcome: (*outcome)?,
                databases: vec![DATABASE.to_owned()],
                on: target.clone(),
            })
        });
        let of_source =
            Claims { identity: source.clone(), standby: false, fences: fences.collect(), decisions: Vec::new() };
        let of_target =
            Claims { identity: target.clone(), standby: false, fences: Vec::new(), decisions: decisions.collect() };
        (of_source, of_target)
    }

    pub fn verdict(&self) -> Verdict {
        let (source, target) = self.claims();
        resolve::resolve(DATABASE, Some(&source), Some(&target))
    }

    /// The unique key: the first proposal stands.
    pub fn propose(&mut self, epoch: usize, outcome: Outcome) -> Outcome {
        *self.decisions[epoch].get_or_insert(outcome)
    }

    /// Whether the fence could be ended as aborted; restores the settings if it was not ended before.
    pub fn lift(&mut self, epoch: usize) -> bool {
        match self.fences[epoch] {
            None => {
                self.fences[epoch] = Some(Outcome::Aborted);
                self.shut = false;
                true
            }
            Some(Outcome::Aborted) => true,
            Some(Outcome::Decided) => false,
        }
    }

    pub fn release_lock(&mut self, process: usize) {
        if self.lock == Some(process) {
            self.lock = None;
        }
    }

    pub fn end_job(&mut self, process: usize, route: Option<ServerRole>) {
        self.release_lock(process);
        let process = &mut self.processes[process];
        process.job = None;
        process.route = route;
        process.fenced = false;
        process.read = None;
    }
}
