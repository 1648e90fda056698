//! Who is active? Pure: from what the two servers claim to where a database runs.
//!
//! The rules, from the top:
//!
//! 1. A server is active for a database iff its highest *decided* epoch covering it (the configured source starts with
//!    0) is above its highest fence covering it that was not aborted. The highest decided epoch wins.
//! 2. If nobody is active, a cutover stood between its fence and its decision: *undecided*, to be settled by a proposal
//!    to abort (see [`super::decision`]).
//! 3. Nothing counts that could have been overtaken by something a server we cannot read says. A server's own fences
//!    tell: without one above its claim, nobody else can have been made active. So a source that was never fenced is
//!    active without a target: a dead target must not stop production.
//! 4. What contradicts itself is refused, loudly and with a reason: a fence noted as decided whose decision is missing
//!    (the other server failed over to a standby that had not received it), rows of another server (restored from a
//!    dump, or the address was given to another machine), a fence that leads to a server which is not configured (the
//!    tombstone that answers a configuration naming the old server).
//!
//! ```text
//! source                      target                      database
//! –                           –                           source, epoch 0
//! fence 1                     –                           undecided 1
//! fence 1                     decided 1                   target, epoch 1   (and the source is to note it)
//! fence 1 decided             decided 1                   target, epoch 1
//! fence 1 decided             –                           refuse: stale standby
//! fence 1                     aborted 1                   source, epoch 0   (and the source is to be unfenced)
//! fence 1 aborted             (unreachable)               source, epoch 0
//! fence 1                     (unreachable)               refuse until it is back
//! (unreachable)               decided 1                   target, epoch 1
//! fence 1 decided, decided 2  decided 1, fence 2 decided  source, epoch 2   (rolled back)
//! ```
//!
//! On timelines: a promotion by itself is ordinary life of a server that is active. While a cutover is undecided it is
//! not: the standby may lack a decision that clients have already acted on, so nothing is settled on another timeline.

use std::collections::BTreeSet;

use super::claims::{Claims, FenceClaim};
use super::decision::Outcome;
use crate::switch::{Epoch, ServerRole};

/// Where one database runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On this server since this epoch.
    Active {
        /// The active server.
        server: ServerRole,
        /// The cutover that made it active; 0 for the original source.
        epoch: Epoch,
    },
    /// A cutover was begun and neither decided nor aborted; it must be settled on the server that it leads to.
    Undecided {
        /// Number of the cutover.
        epoch: Epoch,
        /// The server that is fenced.
        fenced: ServerRole,
    },
    /// Nobody may be taken for active.
    Refuse {
        /// Why, and what helps. Safe to show to clients: names of databases and servers, no more.
        reason: String,
    },
}

/// What remains to be done on a server whose cutover has an outcome that its fence row does not say yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chore {
    /// The fenced server.
    pub on: ServerRole,
    /// Number of the cutover.
    pub epoch: Epoch,
    /// What was decided: `Aborted` unfences, `Decided` is noted.
    pub outcome: Outcome,
}

/// Every database that a fence or a decision of a reachable server covers.
pub fn covered(source: Option<&Claims>, target: Option<&Claims>) -> BTreeSet<String> {
    let both = [source, target].into_iter().flatten();
    both.flat_map(|claims| {
        let fences = claims.fences.iter().flat_map(|fence| &fence.databases);
        fences.chain(claims.decisions.iter().flat_map(|decision| &decision.databases)).cloned()
    })
    .collect()
}

/// The highest epoch that anybody has used. The next cutover takes the one after it.
pub fn highest_epoch(source: &Claims, target: &Claims) -> Epoch {
    let both = [source, target].into_iter();
    both.flat_map(|claims| {
        claims.fences.iter().map(|fence| fence.epoch).chain(claims.decisions.iter().map(|decision| decision.epoch))
    })
    .max()
    .unwrap_or_default()
}

/// Fences whose outcome stands on the other server and is not noted in their own row yet.
pub fn chores(source: Option<&Claims>, target: Option<&Claims>) -> Vec<Chore> {
    let sides = [(ServerRole::Source, source, target), (ServerRole::Target, target, source)];
    let mut chores = Vec::new();
    for (on, own, other) in sides {
        let (Some(own), Some(other)) = (own, other) else { continue };
        for fence in own.fences.iter().filter(|fence| fence.outcome.is_none()) {
            if let Some(outcome) = decision_for(fence, other) {
                chores.push(Chore { on, epoch: fence.epoch, outcome });
            }
        }
    }
    chores
}

/// What became of the cutover of `migration` towards `leads_to`, for an engine that was stopped before it heard. `None`:
/// not known, or not settled yet. It was decided iff it made that server active; one that was never fenced was not.
pub fn outcome_of(
    migration: &str,
    databases: &[String],
    leads_to: ServerRole,
    source: Option<&Claims>,
    target: Option<&Claims>,
) -> Option<Outcome> {
    let by_it = |epoch: Epoch| {
        let decisions = [source, target].into_iter().flatten().flat_map(|claims| &claims.decisions);
        decisions.into_iter().any(|decision| decision.epoch == epoch && decision.migration == migration)
    };
    let outcome = |database: &String| match resolve(database, source, target) {
        Verdict::Active { server, epoch } if server == leads_to && by_it(epoch) => Some(Outcome::Decided),
        Verdict::Active { .. } => Some(Outcome::Aborted),
        Verdict::Undecided { .. } | Verdict::Refuse { .. } => None,
    };
    let first = outcome(databases.first()?)?;
    // One row covers all of them.
    databases.iter().all(|database| outcome(database) == Some(first)).then_some(first)
}

/// Where `database` runs. `None` stands for a server that could not be read.
pub fn resolve(database: &str, source: Option<&Claims>, target: Option<&Claims>) -> Verdict {
    let sides = [(ServerRole::Source, source, target), (ServerRole::Target, target, source)];
    for (role, own, _) in sides {
        if let Some(reason) = own.and_then(|claims| untrustworthy(database, role, claims)) {
            return Verdict::Refuse { reason };
        }
    }
    // The highest decided epoch wins, so only its holder can be active, and only its fences above it can say no.
    let holders = sides.into_iter().filter_map(|(role, own, other)| {
        let own = own?;
        decided(database, role, own).map(|epoch| (epoch, role, own, other))
    });
    let Some((epoch, server, own, other)) = holders.max_by_key(|(epoch, ..)| *epoch) else {
        return refuse(match target {
            Some(_) => "the source cannot be read, and the target has never been made active".to_owned(),
            None => "neither the source nor the target can be read".to_owned(),
        });
    };
    if let Some(reason) = other.and_then(|other| contradiction(database, server.other(), other, own, epoch)) {
        return Verdict::Refuse { reason };
    }
    for fence in fences_from(database, own, Epoch(epoch.0 + 1)) {
        match judge(fence, server, other) {
            Judgement::Aborted => {}
            Judgement::Undecided => return Verdict::Undecided { epoch: fence.epoch, fenced: server },
            Judgement::Unreadable(reason) | Judgement::Contradiction(reason) => return refuse(reason),
            Judgement::Away => {
                return refuse(format!(
                    "cutover {} made the {} active, for other databases than it fenced",
                    fence.epoch,
                    server.other()
                ));
            }
        }
    }
    Verdict::Active { server, epoch }
}

/// The highest epoch in which `own` was made active; the configured source starts with 0.
fn decided(database: &str, role: ServerRole, own: &Claims) -> Option<Epoch> {
    let decided = own.decisions.iter().filter(|decision| decision.outcome == Outcome::Decided);
    let covering = decided.filter(|decision| covers(&decision.databases, database));
    let highest = covering.map(|decision| decision.epoch).max();
    match role {
        ServerRole::Source => Some(highest.unwrap_or_default()),
        ServerRole::Target => highest,
    }
}

/// Fences over `database` from `epoch` on, the latest first.
fn fences_from<'a>(database: &str, own: &'a Claims, epoch: Epoch) -> Vec<&'a FenceClaim> {
    let from = own.fences.iter().filter(|fence| fence.epoch >= epoch);
    let mut fences: Vec<_> = from.filter(|fence| covers(&fence.databases, database)).collect();
    fences.sort_by_key(|fence| std::cmp::Reverse(fence.epoch));
    fences
}

/// Whether the server that is not active says something that its rival's claim at `epoch` rules out.
fn contradiction(database: &str, role: ServerRole, own: &Claims, rival: &Claims, epoch: Epoch) -> Option<String> {
    fences_from(database, own, epoch).into_iter().find_map(|fence| match judge(fence, role, Some(rival)) {
        Judgement::Contradiction(reason) => Some(reason),
        Judgement::Aborted | Judgement::Away | Judgement::Undecided | Judgement::Unreadable(_) => None,
    })
}

/// What became of a fence.
enum Judgement {
    /// It counts no more.
    Aborted,
    /// The other server decided for itself.
    Away,
    /// No outcome stands anywhere.
    Undecided,
    /// The outcome stands, or would stand, on a server that cannot be read.
    Unreadable(String),
    /// What stands there contradicts itself.
    Contradiction(String),
}

fn covers(databases: &[String], database: &str) -> bool {
    databases.iter().any(|covered| covered == database)
}

fn judge(fence: &FenceClaim, role: ServerRole, other: Option<&Claims>) -> Judgement {
    let (epoch, away) = (fence.epoch, role.other());
    let Some(other) = other else {
        return match fence.outcome {
            Some(Outcome::Aborted) => Judgement::Aborted,
            Some(Outcome::Decided) => {
                Judgement::Unreadable(format!("cutover {epoch} made the {away} active, and the {away} cannot be read"))
            }
            None => Judgement::Unreadable(format!(
                "cutover {epoch} was begun; whether it was decided stands on the {away}, which cannot be read"
            )),
        };
    };
    let same_server = other.identity.system_identifier == fence.leads_to.system_identifier;
    match (fence.outcome, decision_for(fence, other)) {
        (Some(Outcome::Aborted), Some(Outcome::Decided)) => Judgement::Contradiction(format!(
            "cutover {epoch} stands as aborted on the {role} and as decided on the {away}: a person must look at both"
        )),
        (Some(Outcome::Aborted), _) | (None, Some(Outcome::Aborted)) => Judgement::Aborted,
        _ if !same_server => Judgement::Contradiction(format!(
            "the {role} gave this database up in cutover {epoch} to the server with system identifier {}, and the \
             configured {away} has {}: name the server that the database moved to",
            fence.leads_to.system_identifier, other.identity.system_identifier
        )),
        (Some(Outcome::Decided) | None, Some(Outcome::Decided)) => Judgement::Away,
        (Some(Outcome::Decided), Some(Outcome::Aborted) | None) => Judgement::Contradiction(format!(
            "the {role} says that cutover {epoch} made the {away} active, and the {away} does not know of it: it was \
             probably failed over to a standby that had not received everything. Bring back the server that has it"
        )),
        (None, None) if other.identity.timeline != fence.leads_to.timeline => Judgement::Contradiction(format!(
            "cutover {epoch} is undecided, and the {away} was promoted since it was begun (timeline {} then, {} now): a \
             decision may have been lost with the failover, so a person must settle it",
            fence.leads_to.timeline, other.identity.timeline
        )),
        (None, None) => Judgement::Undecided,
    }
}

/// The decision about `fence`, if the other server is the one that the fence leads to and holds one.
fn decision_for(fence: &FenceClaim, other: &Claims) -> Option<Outcome> {
    let same_server = other.identity.system_identifier == fence.leads_to.system_identifier;
    let decision = other.decisions.iter().find(|decision| decision.epoch == fence.epoch);
    decision.filter(|_| same_server).map(|decision| decision.outcome)
}

/// A server whose rows about `database` cannot be believed.
fn untrustworthy(database: &str, role: ServerRole, claims: &Claims) -> Option<String> {
    if claims.standby {
        return Some(format!("the {role} is a standby; what it has not received yet cannot be known"));
    }
    let fences = claims.fences.iter().map(|fence| (&fence.databases, &fence.on));
    let decisions = claims.decisions.iter().map(|decision| (&decision.databases, &decision.on));
    let covering = fences.chain(decisions).filter(|(databases, _)| databases.iter().any(|covered| covered == database));
    let own = &claims.identity.system_identifier;
    let foreign = covering.map(|(_, on)| &on.system_identifier).find(|written_by| *written_by != own)?;
    Some(format!(
        "the pgcutover schema of the {role} was written by the server with system identifier {foreign}, and this server \
         has {own}: its rows came with a restored dump or an upgrade, or the address belongs to another machine now"
    ))
}

fn refuse(reason: String) -> Verdict {
    Verdict::Refuse { reason }
}

#[cfg(test)]
mod tests;
