//! A model of the cutover, checked exhaustively: two pgcutover processes, two servers, and everything that goes wrong
//! between them.
//!
//! Its program counter is the name of the last failpoint that a coordinator has passed
//! ([`ALL_FAILPOINTS`]), so the model and the code have the same steps; who is active after a restart is answered by the
//! code itself ([`resolve`]). What the servers do, and what a network and an operator may do to processes, is written
//! down here. The bounds are in [`Model`]: with two cutovers and two writes, any two misfortunes in any place are tried (a
//! crash, a stopped process, a lost session, a lost answer, an order to abort).
//!
//! A model that cannot fail shows nothing: each [`Flaw`] takes one rule away, and the checker must find what it breaks.

mod world;

use pgcutover::catalog::decision::Outcome;
use pgcutover::catalog::resolve::{self, Verdict};
use pgcutover::cutover::steps::ALL_FAILPOINTS;
use pgcutover::switch::{Epoch, ServerRole};
use stateright::{Checker, HasDiscoveries, Model as _, Property};
use world::{Job, Life, PROCESSES, Process, Running, World};

/// A rule that is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// None: as the code does it.
    None,
    /// The gate is opened towards the target before the decision stands there.
    PublishesBeforeDeciding,
    /// The drain does not wait for transactions that were let in.
    DrainsWithoutWaiting,
    /// The decision is sent without waiting for the marker.
    DecidesWithoutMarker,
    /// Strangers keep their sessions on the shut server.
    EndsNoStrangers,
    /// Who is in doubt and finds no decision aborts, and writes no verdict down.
    AbortsWithoutVerdict,
    /// A cutover is begun while the fence of an aborted one is still to be lifted.
    BeginsOverAnOpenFence,
    /// The server is shut without a look at the fence row.
    ShutsUnseen,
    /// An undecided cutover is settled although its coordinator may be deciding, and nothing is written down about it.
    SettlesWithoutRow,
}

/// The bounds of the search.
struct Model {
    flaw: Flaw,
    /// Cutovers that may be begun.
    cutovers: u8,
    /// Writes that clients may begin.
    writes: u8,
    /// Crashes, stopped processes, lost sessions, lost answers and orders to abort, all together.
    misfortunes: u8,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Begin(usize),
    Step(usize),
    SendAndLoseAnswer(usize),
    SendIntoNowhere(usize),
    GiveUp(usize),
    AbortWithoutTarget(usize),
    Ask(usize),
    Read(usize),
    Publish(usize),
    Settle(usize),
    Write(usize),
    Commit(usize),
    Apply,
    Arrive,
    Vanish,
    Crash(usize),
    Start(usize),
    Freeze(usize),
    Thaw(usize),
    LoseSession(usize),
}

/// Before this point a cutover can be given up.
fn may_give_up(job: &Job) -> bool {
    let position = |name| ALL_FAILPOINTS.iter().position(|known| *known == name);
    !job.in_doubt && position(job.passed) < position("decide.after_decision")
}

impl Model {
    /// What a coordinator does next; none: it has to wait.
    fn step(&self, world: &World, me: usize) -> Option<World> {
        let job = world.processes[me].job?;
        if job.in_doubt {
            return None;
        }
        let mut next = world.clone();
        let e = job.epoch;
        let passed = match job.passed {
            "prepare.after_return" => "prepare.before_fence",
            "prepare.before_fence" => {
                next.fences.push(None);
                next.decisions.push(None);
                "prepare.after_fence"
            }
            "prepare.after_fence" => {
                next.processes[me].fenced = true;
                "pause.after_gate"
            }
            "pause.after_gate" => {
                if next.fences[e].is_some() && self.flaw != Flaw::ShutsUnseen {
                    "abort.before_decision"
                } else {
                    next.shut = true;
                    for other in 0..PROCESSES {
                        let is_known = other == me && next.running[other].is_none_or(|running| !running.orphan);
                        if !is_known && self.flaw != Flaw::EndsNoStrangers {
                            next.running[other] = None;
                            next.connected[other] = next.connected[other] && other == me;
                        }
                    }
                    "pause.after_hard_fence"
                }
            }
            "pause.after_hard_fence" => {
                if next.running.iter().any(Option::is_some) && self.flaw != Flaw::DrainsWithoutWaiting {
                    return None;
                }
                "drain.after_sessions"
            }
            "drain.after_sessions" => {
                next.processes[me].job.as_mut()?.marker = next.log;
                "drain.after_marker"
            }
            "drain.after_marker" => {
                if next.applied < job.marker && self.flaw != Flaw::DecidesWithoutMarker {
                    return None;
                }
                "drain.after_applied"
            }
            "drain.after_applied" => "decide.before_boundary",
            "decide.before_boundary" => {
                if self.flaw == Flaw::PublishesBeforeDeciding {
                    next.processes[me].fenced = false;
                    next.processes[me].route = Some(ServerRole::Target);
                }
                "decide.before_decision"
            }
            "decide.before_decision" if job.unlinked => {
                // The statement cannot be sent; that is not told from an answer that was lost.
                next.processes[me].job.as_mut()?.in_doubt = true;
                job.passed
            }
            "decide.before_decision" => match next.propose(e, Outcome::Decided) {
                Outcome::Decided => "decide.after_decision",
                Outcome::Aborted => "abort.before_decision",
            },
            "decide.after_decision" => "switch.before_open",
            "switch.before_open" => {
                next.processes[me].fenced = false;
                next.processes[me].route = Some(ServerRole::Target);
                "switch.after_open"
            }
            "switch.after_open" => {
                if next.fences[e].is_none() {
                    next.fences[e] = Some(Outcome::Decided);
                }
                "switch.after_note"
            }
            "switch.after_note" => "switch.after_finish",
            "switch.after_finish" => {
                next.end_job(me, Some(ServerRole::Target));
                return Some(next);
            }
            "abort.before_decision" => {
                let verdict = match next.decisions[e] {
                    None if self.flaw == Flaw::AbortsWithoutVerdict => Outcome::Aborted,
                    Some(_) | None => next.propose(e, Outcome::Aborted),
                };
                if verdict == Outcome::Decided {
                    // A contradiction: the rows decide.
                    next.end_job(me, None);
                    return Some(next);
                }
                "abort.after_decision"
            }
            "abort.after_decision" => {
                if !next.lift(e) {
                    next.end_job(me, None);
                    return Some(next);
                }
                "abort.after_lift"
            }
            "abort.after_lift" => {
                next.end_job(me, Some(ServerRole::Source));
                return Some(next);
            }
            unknown => panic!("the code has no step {unknown}"),
        };
        next.processes[me].job.as_mut()?.passed = passed;
        next.passed = passed;
        Some(next)
    }

    /// What is left of an earlier cutover gets an outcome, and outcomes are acted on.
    fn settle(&self, world: &World, me: usize) -> Option<World> {
        let mut next = world.clone();
        let (source, target) = world.claims();
        if let Some(chore) = resolve::chores(Some(&source), Some(&target)).first() {
            let epoch = usize::try_from(chore.epoch.0).ok()? - 1;
            match chore.outcome {
                Outcome::Decided => next.fences[epoch] = Some(Outcome::Decided),
                Outcome::Aborted => assert!(next.lift(epoch), "a chore is about an open fence"),
            }
            return Some(next);
        }
        let Verdict::Undecided { epoch, .. } = world.verdict() else { return None };
        let epoch = usize::try_from(epoch.0).ok()? - 1;
        if self.flaw == Flaw::SettlesWithoutRow {
            next.lift(epoch);
            return Some(next);
        }
        // The coordinator lives if its session does.
        if world.lock.is_some_and(|holder| holder != me) {
            return None;
        }
        next.propose(epoch, Outcome::Aborted);
        Some(next)
    }

    /// A client's statement, as far as the process lets it pass and the server takes it.
    fn write(&self, world: &World, me: usize) -> Option<World> {
        let mut next = world.clone();
        let process = &world.processes[me];
        if process.fenced || world.begun_writes >= self.writes {
            return None;
        }
        match process.route? {
            ServerRole::Source => {
                if world.running[me].is_some() {
                    return None;
                }
                if !world.connected[me] && world.shut {
                    // Refused: who is active is asked again.
                    next.processes[me].route = None;
                    next.processes[me].read = None;
                    return Some(next);
                }
                next.connected[me] = true;
                next.running[me] = Some(Running { orphan: false });
            }
            ServerRole::Target => next.target_writes += 1,
        }
        next.begun_writes += 1;
        Some(next)
    }

    /// Something that a process does by itself.
    fn act(&self, world: &World, action: &Action, me: usize) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Begin(_) => {
                let active = Verdict::Active { server: ServerRole::Source, epoch: Epoch(0) };
                let free = world.lock.is_none() && world.processes[me].job.is_none();
                let knows = world.processes[me].route == Some(ServerRole::Source);
                let lifted = world.fences.iter().all(Option::is_some) || self.flaw == Flaw::BeginsOverAnOpenFence;
                if !free
                    || !knows
                    || !lifted
                    || world.verdict() != active
                    || world.fences.len() >= usize::from(self.cutovers)
                {
                    return None;
                }
                // The next number is taken when the fence is written; nobody else can be before it: the lock.
                next.lock = Some(me);
                next.passed = "prepare.after_return";
                let epoch = world.fences.len();
                next.processes[me].job =
                    Some(Job { epoch, passed: "prepare.after_return", unlinked: false, marker: 0, in_doubt: false });
            }
            Action::Step(_) => {
                // A number that another process has taken meanwhile makes the insert fail.
                let job = world.processes[me].job?;
                if job.passed == "prepare.before_fence" && job.epoch != world.fences.len() {
                    next.end_job(me, None);
                } else {
                    return self.step(world, me);
                }
            }
            Action::SendAndLoseAnswer(_) | Action::SendIntoNowhere(_) => {
                let job = world.processes[me].job?;
                if job.passed != "decide.before_decision" || job.in_doubt || job.unlinked || world.misfortunes == 0 {
                    return None;
                }
                next.misfortunes -= 1;
                if *action == Action::SendAndLoseAnswer(me) {
                    next.propose(job.epoch, Outcome::Decided);
                } else {
                    next.in_flight = Some(job.epoch);
                }
                next.release_lock(me);
                let job = next.processes[me].job.as_mut()?;
                (job.in_doubt, job.unlinked) = (true, true);
            }
            Action::GiveUp(_) => {
                let job = world.processes[me].job?;
                let begun = !["prepare.after_return", "prepare.before_fence"].contains(&job.passed)
                    && !job.passed.starts_with("abort");
                if !may_give_up(&job) || !begun || world.misfortunes == 0 {
                    return None;
                }
                next.misfortunes -= 1;
                next.processes[me].job.as_mut()?.passed = "abort.before_decision";
                next.passed = "abort.before_decision";
            }
            Action::AbortWithoutTarget(_) => {
                // The target does not answer. This coordinator has not sent its decision and never will.
                let job = world.processes[me].job?;
                if job.passed != "abort.before_decision" || world.decisions[job.epoch].is_some() || !job.unlinked {
                    return None;
                }
                next.processes[me].job.as_mut()?.passed = "abort.after_decision";
            }
            Action::Ask(_) => {
                let job = world.processes[me].job.filter(|job| job.in_doubt)?;
                let outcome = match world.decisions[job.epoch] {
                    None if self.flaw == Flaw::AbortsWithoutVerdict => Outcome::Aborted,
                    Some(_) | None => next.propose(job.epoch, Outcome::Aborted),
                };
                let job = next.processes[me].job.as_mut()?;
                job.in_doubt = false;
                job.passed = match outcome {
                    Outcome::Decided => "decide.after_decision",
                    Outcome::Aborted => "abort.before_decision",
                };
            }
            Action::Read(_) => {
                let process = &world.processes[me];
                if process.route.is_some() || process.job.is_some() || process.read.is_some() {
                    return None;
                }
                let Verdict::Active { server, .. } = world.verdict() else { return None };
                next.processes[me].read = Some(Some(server));
            }
            Action::Publish(_) => {
                let read = world.processes[me].read?;
                next.processes[me].route = read;
                next.processes[me].read = None;
            }
            Action::Settle(_) => {
                let process = &world.processes[me];
                if process.route.is_some() || process.job.is_some() {
                    return None;
                }
                return self.settle(world, me);
            }
            Action::Write(_) => return self.write(world, me),
            _ => return None,
        }
        Some(next)
    }
}

impl stateright::Model for Model {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let process = Process { life: Life::Up, route: Some(ServerRole::Source), fenced: false, read: None, job: None };
        vec![World {
            fences: Vec::new(),
            shut: false,
            log: 0,
            running: [None; PROCESSES],
            connected: [true; PROCESSES],
            decisions: Vec::new(),
            applied: 0,
            target_writes: 0,
            lock: None,
            in_flight: None,
            processes: [process.clone(), process],
            begun_writes: 0,
            late_write: false,
            misfortunes: self.misfortunes,
            passed: "",
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (me, process) in world.processes.iter().enumerate() {
            match process.life {
                Life::Up => actions.extend([
                    Action::Begin(me),
                    Action::Step(me),
                    Action::SendAndLoseAnswer(me),
                    Action::SendIntoNowhere(me),
                    Action::GiveUp(me),
                    Action::AbortWithoutTarget(me),
                    Action::Ask(me),
                    Action::Read(me),
                    Action::Publish(me),
                    Action::Settle(me),
                    Action::Write(me),
                    Action::Crash(me),
                    Action::Freeze(me),
                    Action::LoseSession(me),
                ]),
                Life::Frozen => actions.extend([Action::Thaw(me), Action::LoseSession(me), Action::Crash(me)]),
                Life::Down => actions.push(Action::Start(me)),
            }
            actions.push(Action::Commit(me));
        }
        actions.extend([Action::Apply, Action::Arrive, Action::Vanish]);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Commit(of) => {
                world.running[of]?;
                next.running[of] = None;
                next.log += 1;
                next.late_write |= world.is_decided();
            }
            Action::Apply if world.applied < world.log => next.applied += 1,
            Action::Arrive => {
                let epoch = world.in_flight?;
                next.propose(epoch, Outcome::Decided);
                next.in_flight = None;
            }
            Action::Vanish => {
                world.in_flight?;
                next.in_flight = None;
            }
            Action::Crash(me) if world.misfortunes > 0 => {
                next.misfortunes -= 1;
                next.end_job(me, None);
                next.processes[me].life = Life::Down;
                next.running[me] = world.running[me].map(|_| Running { orphan: true });
                next.connected[me] = false;
            }
            Action::Start(me) => next.processes[me].life = Life::Up,
            Action::Freeze(me) if world.misfortunes > 0 => {
                next.misfortunes -= 1;
                next.processes[me].life = Life::Frozen;
            }
            Action::Thaw(me) => next.processes[me].life = Life::Up,
            Action::LoseSession(me) if world.misfortunes > 0 && world.lock == Some(me) => {
                next.misfortunes -= 1;
                next.release_lock(me);
                if let Some(job) = &mut next.processes[me].job {
                    job.unlinked = true;
                }
            }
            Action::Apply | Action::Crash(_) | Action::Freeze(_) | Action::LoseSession(_) => return None,
            Action::Begin(me)
            | Action::Step(me)
            | Action::SendAndLoseAnswer(me)
            | Action::SendIntoNowhere(me)
            | Action::GiveUp(me)
            | Action::AbortWithoutTarget(me)
            | Action::Ask(me)
            | Action::Read(me)
            | Action::Publish(me)
            | Action::Settle(me)
            | Action::Write(me) => return self.act(world, &action, me),
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::<Self>::always("every committed write is on the target when it is decided", |_, world| {
                !world.is_decided() || world.applied == world.log
            }),
            Property::<Self>::always("no write is accepted by the old server after the decision", |_, world| {
                !world.late_write
            }),
            Property::<Self>::always("nobody writes on the target before the decision", |_, world| {
                world.target_writes == 0 || world.is_decided()
            }),
            Property::<Self>::always("a cutover is decided or aborted, never both", |_, world| {
                let sides = world.fences.iter().zip(&world.decisions);
                sides.into_iter().all(|(fence, decision)| match (fence, decision) {
                    (Some(Outcome::Aborted), Some(Outcome::Decided))
                    | (Some(Outcome::Decided), None | Some(Outcome::Aborted)) => false,
                    (None | Some(Outcome::Aborted | Outcome::Decided), _) => true,
                })
            }),
            Property::<Self>::always("with every cutover settled, the active server takes its clients", |_, world| {
                let at_rest = |process: &Process| process.life == Life::Up && process.job.is_none();
                let settled = world.fences.iter().all(Option::is_some) && world.processes.iter().all(at_rest);
                let fenced = world.processes.iter().any(|process| process.fenced);
                !settled || !fenced && (world.is_decided() || !world.shut)
            }),
            Property::<Self>::always("there is always something that can be done to serve again", |model, world| {
                // The operator's orders, misfortune and clients left aside.
                let lost = |me: usize| world.processes[me].route.is_none() || world.processes[me].job.is_some();
                let helps =
                    |action: &Action| model.next_state(world, action.clone()).is_some_and(|next| next != *world);
                (0..PROCESSES).all(|me| match world.processes[me].life {
                    Life::Frozen | Life::Down => true,
                    Life::Up if !lost(me) => true,
                    // Somebody else's cutover, or a transaction that ends by itself, is waited for.
                    Life::Up => {
                        let own = [
                            Action::Step(me),
                            Action::Ask(me),
                            Action::Read(me),
                            Action::Publish(me),
                            Action::Settle(me),
                        ];
                        own.iter().any(helps)
                            || world.running.iter().any(Option::is_some)
                            || world.applied < world.log
                            || world.lock.is_some_and(|holder| holder != me)
                    }
                })
            }),
        ];
        // What is never reached is not checked.
        properties.extend([
            Property::<Self>::sometimes("a write is committed on the source", |_, world| world.log > 0),
            Property::<Self>::sometimes("a write is taken by the target", |_, world| world.target_writes > 0),
            Property::<Self>::sometimes("a second cutover is decided", |_, world| {
                world.decisions == [Some(Outcome::Aborted), Some(Outcome::Decided)]
            }),
            Property::<Self>::sometimes("a decision arrives late and loses", |_, world| {
                world.in_flight.is_some_and(|epoch| world.decisions[epoch] == Some(Outcome::Aborted))
            }),
        ]);
        properties
    }
}

fn search(flaw: Flaw) -> impl Checker<Model> {
    let model = Model { flaw, cutovers: 2, writes: 2, misfortunes: 2 };
    model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join()
}

#[test]
fn every_order_of_events_keeps_the_invariants() {
    let checker = search(Flaw::None);
    println!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
}

#[test]
fn the_checker_finds_what_each_missing_rule_breaks() {
    for flaw in [
        Flaw::PublishesBeforeDeciding,
        Flaw::DrainsWithoutWaiting,
        Flaw::DecidesWithoutMarker,
        Flaw::EndsNoStrangers,
        Flaw::AbortsWithoutVerdict,
        Flaw::BeginsOverAnOpenFence,
        Flaw::ShutsUnseen,
        Flaw::SettlesWithoutRow,
    ] {
        let checker = search(flaw);
        let broken: Vec<&str> = checker
            .discoveries()
            .into_keys()
            .filter(|name| checker.model().property(name).expectation == stateright::Expectation::Always)
            .collect();
        println!("{flaw:?}: {broken:?}");
        assert!(!broken.is_empty(), "{flaw:?} breaks nothing");
    }
}

/// The model's steps are the code's: every one is passed by some cutover of the model.
#[test]
fn the_model_passes_every_step_of_the_code() {
    let mut left: Vec<&str> = ALL_FAILPOINTS.to_vec();
    let model = Model { flaw: Flaw::None, cutovers: 1, writes: 0, misfortunes: 1 };
    let mut known = std::collections::HashSet::new();
    let mut open = model.init_states();
    while let Some(world) = open.pop() {
        left.retain(|name| *name != world.passed);
        for (_, next) in model.next_steps(&world) {
            if known.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    assert_eq!(left, Vec::<&str>::new());
}
