//! Every case of the resolution as one table.

use super::super::claims::{DecisionClaim, ServerIdentity};
use super::*;

fn identity(name: &str) -> ServerIdentity {
    let (system_identifier, timeline) = name.split_once('/').unwrap_or((name, "1"));
    ServerIdentity {
        system_identifier: system_identifier.to_owned(),
        timeline: timeline.parse().expect("a number in the table"),
    }
}

fn outcome(text: &str) -> Outcome {
    Outcome::parse(text).expect("a word of the table")
}

/// Reads `S | fence 1 -> T decided; decided 2`: identity (`S`, `S/2` for timeline 2, `standby S`), then rows.
/// `on X` after a row: written by another server. `db other`: covers another database.
fn claims(text: &str, rival: &str) -> Option<Claims> {
    if text == "down" {
        return None;
    }
    let (who, rows) = text.split_once('|').unwrap_or((text, ""));
    let who = who.trim();
    let (standby, who) = who.strip_prefix("standby ").map_or((false, who), |who| (true, who));
    let own = identity(who);
    let mut claims = Claims { identity: own.clone(), standby, fences: Vec::new(), decisions: Vec::new() };
    for row in rows.split(';').map(str::trim).filter(|row| !row.is_empty()) {
        let words: Vec<&str> = row.split_whitespace().collect();
        let after = |word: &str| words.iter().position(|found| *found == word).map(|at| words[at + 1]);
        let databases = vec![after("db").unwrap_or("shop").to_owned()];
        let on = after("on").map_or_else(|| own.clone(), identity);
        let epoch = Epoch(words[1].parse().expect("a number in the table"));
        if words[0] == "fence" {
            let noted = words.iter().skip(2).find(|word| matches!(**word, "decided" | "aborted"));
            claims.fences.push(FenceClaim {
                epoch,
                migration: "m".to_owned(),
                databases,
                on,
                leads_to: identity(after("->").unwrap_or(rival)),
                outcome: noted.map(|word| outcome(word)),
            });
        } else {
            let (migration, outcome) = ("m".to_owned(), outcome(words[0]));
            claims.decisions.push(DecisionClaim { epoch, migration, outcome, databases, on });
        }
    }
    Some(claims)
}

fn verdict(database: &str, source: &str, target: &str) -> String {
    let (source, target) = (claims(source, "T"), claims(target, "S"));
    match resolve(database, source.as_ref(), target.as_ref()) {
        Verdict::Active { server, epoch } => format!("{server} {epoch}"),
        Verdict::Undecided { epoch, fenced } => format!("undecided {epoch} fenced {fenced}"),
        Verdict::Refuse { reason } => format!("refuse: {reason}"),
    }
}

#[test]
fn who_is_active() {
    // source, target, verdict (a refusal: a part of its reason)
    let table = [
        // Nothing was ever begun: a dead target does not stop production.
        ("S", "T", "source 0"),
        ("S", "down", "source 0"),
        ("down", "T", "refuse: the source cannot be read"),
        ("down", "down", "refuse: neither"),
        // Begun and not decided.
        ("S | fence 1", "T", "undecided 1 fenced source"),
        ("S | fence 1", "down", "refuse: cutover 1 was begun"),
        ("down", "T | aborted 1", "refuse: the source cannot be read"),
        // Aborted, noted or not.
        ("S | fence 1", "T | aborted 1", "source 0"),
        ("S | fence 1 aborted", "T | aborted 1", "source 0"),
        ("S | fence 1 aborted", "down", "source 0"),
        // Aborted by its own coordinator while the target could not be reached: never sent, so never decided.
        ("S | fence 1 aborted", "T", "source 0"),
        // Decided, noted or not.
        ("S | fence 1", "T | decided 1", "target 1"),
        ("S | fence 1 decided", "T | decided 1", "target 1"),
        ("down", "T | decided 1", "target 1"),
        ("S | fence 1 decided", "down", "refuse: cutover 1 made the target active"),
        // Several attempts.
        ("S | fence 1 aborted; fence 2", "T | aborted 1", "undecided 2 fenced source"),
        ("S | fence 1 aborted; fence 2", "T | aborted 1; decided 2", "target 2"),
        ("S | fence 1 aborted; fence 2 aborted", "T | aborted 1; aborted 2", "source 0"),
        // Rolled back, and forth again.
        ("S | fence 1 decided", "T | decided 1; fence 2", "undecided 2 fenced target"),
        ("S | fence 1 decided; decided 2", "T | decided 1; fence 2", "source 2"),
        ("S | fence 1 decided; decided 2", "T | decided 1; fence 2 decided", "source 2"),
        ("S | fence 1 decided; aborted 2", "T | decided 1; fence 2 aborted", "target 1"),
        ("S | fence 1 decided; decided 2", "down", "source 2"),
        ("down", "T | decided 1; fence 2", "refuse: cutover 2 was begun"),
        ("down", "T | decided 1; fence 2 decided", "refuse: cutover 2 made the source active"),
        ("down", "T | decided 1; fence 2 aborted", "target 1"),
        ("S | fence 1 decided; decided 2; fence 3", "T | decided 1; fence 2 decided; decided 3", "target 3"),
        ("S | fence 1 decided; decided 2; fence 3", "T | decided 1; fence 2 decided", "undecided 3 fenced source"),
        // The target was failed over to a standby that lacks the decision.
        ("S | fence 1 decided", "T", "refuse: the source says that cutover 1"),
        ("S | fence 1 decided", "T | aborted 1", "refuse: the source says that cutover 1"),
        ("S | fence 1 aborted", "T | decided 1", "refuse: cutover 1 stands as aborted"),
        ("S | fence 1", "T/2", "refuse: cutover 1 is undecided, and the target was promoted"),
        // A promotion of a server that has its decision is ordinary life.
        ("S | fence 1", "T/2 | decided 1 on T", "target 1"),
        ("S/3 | fence 1 decided on S/1", "T/2 | decided 1 on T/1", "target 1"),
        // The source came back without its fence: the decision wins.
        ("S", "T | decided 1", "target 1"),
        ("S", "T | decided 1; fence 2", "undecided 2 fenced target"),
        // Standbys may be behind.
        ("standby S", "T", "refuse: the source is a standby"),
        ("S", "standby T", "refuse: the target is a standby"),
        // Rows of other servers.
        ("S | fence 1 on X decided", "T", "refuse: the pgcutover schema of the source was written by"),
        ("S", "T | decided 1 on X", "refuse: the pgcutover schema of the target was written by"),
        ("S | fence 1 -> X", "T", "refuse: the source gave this database up in cutover 1 to the server"),
        // The tombstone answers a configuration that names the old server, here with a new target Y.
        ("S | fence 1 decided -> T", "Y", "refuse: the source gave this database up"),
        ("S | fence 1 decided -> T", "down", "refuse: cutover 1 made the target active"),
        // The next move: what was the target is the source now.
        ("T | decided 1", "Y", "source 1"),
        ("T | decided 1; fence 2 -> Y", "Y | decided 2", "target 2"),
        ("T | decided 1", "down", "source 1"),
        // Rows about other databases say nothing about this one.
        ("S | fence 1 db other", "T | decided 1 db other", "source 0"),
        ("S | fence 1 db other", "down", "source 0"),
        ("S | fence 1; fence 2 db other decided", "T | decided 2 db other", "undecided 1 fenced source"),
        ("S | fence 1", "T | decided 1 db other", "refuse: cutover 1 made the target active, for other databases"),
    ];
    for (source, target, expected) in table {
        let found = verdict("shop", source, target);
        let matches = if expected.starts_with("refuse") { found.starts_with(expected) } else { found == expected };
        assert!(matches, "source [{source}], target [{target}]: {found}, expected {expected}");
    }
}

#[test]
fn outcomes_that_are_not_noted_yet() {
    let found = |source: &str, target: &str| {
        let (source, target) = (claims(source, "T"), claims(target, "S"));
        let chores = chores(source.as_ref(), target.as_ref());
        chores
            .iter()
            .map(|chore| format!("{} {} {}", chore.on, chore.epoch, chore.outcome.as_str()))
            .collect::<Vec<_>>()
    };
    assert_eq!(found("S | fence 1", "T | decided 1"), ["source 1 decided"]);
    assert_eq!(found("S | fence 1; fence 2", "T | aborted 1; decided 2"), ["source 1 aborted", "source 2 decided"]);
    assert_eq!(found("S | fence 1 decided; decided 2", "T | decided 1; fence 2"), ["target 2 decided"]);
    assert!(found("S | fence 1", "T").is_empty());
    assert!(found("S | fence 1 aborted", "T | aborted 1").is_empty());
    assert!(found("S | fence 1", "down").is_empty());
    assert!(found("S | fence 1 -> X", "T | decided 1").is_empty(), "another server's decision is not ours");
}

#[test]
fn what_an_engine_is_told_that_was_stopped_before_it_heard() {
    let told = |leads_to, source: &str, target: &str| {
        let (source, target) = (claims(source, "T"), claims(target, "S"));
        outcome_of("m", &["shop".to_owned()], leads_to, source.as_ref(), target.as_ref()).map(Outcome::as_str)
    };
    let found = |source: &str, target: &str| told(ServerRole::Target, source, target);
    assert_eq!(found("S", "T"), Some("aborted"), "begun and never fenced");
    assert_eq!(found("S", "down"), Some("aborted"), "nobody else can be active while it was never fenced");
    assert_eq!(found("S | fence 1", "T"), None, "undecided");
    assert_eq!(found("S | fence 1", "T | decided 1"), Some("decided"));
    assert_eq!(found("S | fence 1 aborted", "T"), Some("aborted"));
    assert_eq!(found("down", "T | decided 1"), Some("decided"));
    assert_eq!(found("down", "T | aborted 1"), None, "a second fence may stand on the source");
    assert_eq!(found("S | fence 1 aborted; fence 2", "T | aborted 1"), None);
    assert_eq!(found("S | fence 1 aborted; fence 2", "T | aborted 1; decided 2"), Some("decided"));
    // A rollback: what was decided before it is not its own outcome.
    let back = |source: &str, target: &str| told(ServerRole::Source, source, target);
    assert_eq!(back("S | fence 1 decided", "T | decided 1"), Some("aborted"), "begun and never fenced");
    assert_eq!(back("S | fence 1 decided", "T | decided 1; fence 2"), None, "undecided");
    assert_eq!(back("S | fence 1 decided; decided 2", "T | decided 1; fence 2"), Some("decided"));
    assert_eq!(back("S | fence 1 decided; aborted 2", "T | decided 1; fence 2 aborted"), Some("aborted"));
    assert_eq!(back("down", "T | decided 1; fence 2"), None);
    assert_eq!(back("down", "T | decided 1"), Some("aborted"));
    // And the cutover after it.
    let again = "S | fence 1 decided; decided 2";
    assert_eq!(found(again, "T | decided 1; fence 2 decided"), Some("aborted"), "begun again and not fenced");
    let again = "S | fence 1 decided; decided 2; fence 3";
    assert_eq!(found(again, "T | decided 1; fence 2 decided; decided 3"), Some("decided"));
}

#[test]
fn a_new_epoch_is_above_everything_anybody_used() {
    let both = |source, target| {
        let (source, target) = (claims(source, "T"), claims(target, "S"));
        highest_epoch(&source.expect("up"), &target.expect("up")).0
    };
    assert_eq!(both("S", "T"), 0);
    assert_eq!(both("S | fence 4 db other", "T | aborted 2"), 4);
    assert_eq!(both("S | fence 4", "T | decided 7"), 7);
}
