//! Watches the engine, the cutovers and the routes: keeps the last minutes for charts, what has happened for the log,
//! and sends the whole live state to those who follow it.
//!
//! One observer serves every follower, so that many browsers cost what one costs. Everything kept is bounded, and
//! nothing of it decides anything: after a restart it begins anew.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, watch};

use super::view::{CutoverView, EventView, LiveView, RouteView, SampleView};
use crate::catalog::streams::Direction;
use crate::migration::view::{DatabaseView, FencedWriteView, MigrationView};

/// How often the observer looks.
const LOOK: Duration = Duration::from_millis(500);

/// How often it looks while nothing goes on and nobody follows.
const LOOK_IDLE: Duration = Duration::from_secs(2);

/// Every so many looks make a sample.
const LOOKS_PER_SAMPLE: u64 = 4;

/// Samples of all databases together: half an hour of one, or less of many.
const SAMPLES: usize = 7200;

/// Samples of one database that an answer has: fifteen minutes.
const SAMPLES_SHOWN: usize = 450;

/// None of them is older: where it is rarely looked, or no more, so many would be hours old.
const SHOWN: Duration = Duration::from_secs(15 * 60);

/// Events that are remembered.
const EVENTS: usize = 1000;

/// See the module.
pub(super) struct Live {
    state: Mutex<Kept>,
    sent: watch::Sender<Option<Arc<LiveView>>>,
    /// Somebody has begun to follow, or has ordered something.
    called: Notify,
}

#[derive(Default)]
struct Kept {
    samples: VecDeque<(String, SampleView)>,
    events: VecDeque<EventView>,
    newest_event: u64,
    looks: u64,
    seen: BTreeMap<Subject, String>,
}

/// What has a state that is worth an event when it changes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Migration(String),
    Database(String, String),
    /// Writes past a fence: migration, and what was written where.
    FencedWrite(String, String),
    /// The watch over the server that was left.
    FenceWatch(String, String),
    Cutover(String),
    Route(String),
    /// Writes are slowed down.
    WriteDelay(String),
}

impl Live {
    pub(super) fn new() -> Self {
        Self { state: Mutex::default(), sent: watch::Sender::new(None), called: Notify::new() }
    }

    /// Whether anybody follows.
    pub(super) fn is_followed(&self) -> bool {
        self.sent.receiver_count() > 0
    }

    /// The live state from now on, whenever it has changed.
    pub(super) fn follow(&self) -> watch::Receiver<Option<Arc<LiveView>>> {
        let mut receiver = self.sent.subscribe();
        // What was sent to others is as good a beginning as what comes next.
        receiver.mark_changed();
        self.called.notify_one();
        receiver
    }

    /// Until the next look. While nothing is active and nobody follows it may be late, unless there is an order.
    pub(super) async fn pause(&self, is_active: bool) {
        if is_active || self.is_followed() {
            return tokio::time::sleep(LOOK).await;
        }
        // Called or not, it is time to look.
        let _called = tokio::time::timeout(LOOK_IDLE, self.called.notified()).await;
    }

    pub(super) fn send(&self, view: LiveView) {
        let view = Arc::new(view);
        self.sent.send_if_modified(|last| {
            let same = last.as_ref().is_some_and(|last| is_same(last, &view));
            if !same {
                *last = Some(view);
            }
            !same
        });
    }

    /// What changed since the last look becomes events, and every so often a sample.
    pub(super) fn observe(
        &self,
        migrations: &[MigrationView],
        cutovers: &BTreeMap<String, CutoverView>,
        routes: &[RouteView],
        copied: (u64, u64),
    ) {
        let (at, mut kept) = (now(), self.kept());
        for migration in migrations {
            let name = &migration.name;
            let mut text = format!("{} {}", migration.state, migration.substate);
            if let Some(error) = &migration.error {
                text = format!("{text}: {error}");
            }
            kept.note_change(at, Subject::Migration(name.clone()), text, migration.error.is_some());
            for database in &migration.databases {
                let text = format!("database {}: {}", database.name, database.state);
                kept.note_change(at, Subject::Database(name.clone(), database.name.clone()), text, false);
                kept.note_fence(at, name, database);
            }
        }
        for (name, cutover) in cutovers {
            kept.note_change(at, Subject::Cutover(name.clone()), of_cutover(cutover), cutover.outcome == "aborted");
        }
        for route in routes {
            let server = route.server.map_or_else(|| "nowhere".to_owned(), |server| format!("on the {server}"));
            let text = format!("database {} runs {server} (epoch {})", route.database, route.epoch);
            kept.note_change(at, Subject::Route(route.database.clone()), text, route.server.is_none());
            kept.note_delay(at, route);
        }
        kept.looks += 1;
        if kept.looks % LOOKS_PER_SAMPLE == 1 {
            kept.sample(at, migrations, copied);
        }
    }

    /// An order that was carried out or refused.
    pub(super) fn note_order(&self, migration: Option<String>, text: String, failed: bool) {
        self.called.notify_one();
        self.kept().note(now(), migration, "order", text, failed);
    }

    /// Newest first.
    pub(super) fn events(&self) -> Vec<EventView> {
        self.kept().events.iter().rev().cloned().collect()
    }

    pub(super) fn newest_event(&self) -> u64 {
        self.kept().newest_event
    }

    /// Oldest first, the last fifteen minutes of each database.
    pub(super) fn history(&self, migration: &str) -> Vec<SampleView> {
        self.history_at(now(), migration)
    }

    fn history_at(&self, at: f64, migration: &str) -> Vec<SampleView> {
        let (kept, oldest) = (self.kept(), at - SHOWN.as_secs_f64());
        let mut left: BTreeMap<&str, usize> = BTreeMap::new();
        let mut samples = Vec::new();
        let is_shown = |(of, sample): &&(String, SampleView)| of == migration && sample.at >= oldest;
        for (_, sample) in kept.samples.iter().rev().filter(is_shown) {
            let left = left.entry(&sample.database).or_insert(SAMPLES_SHOWN);
            if *left > 0 {
                *left -= 1;
                samples.push(sample.clone());
            }
        }
        samples.reverse();
        samples
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// One event for each table and kind, however much is written: how much, the migration shows.
    fn note_fence(&mut self, at: f64, migration: &str, database: &DatabaseView) {
        let name = &database.name;
        for FencedWriteView { server, epoch, schema, table, kind, .. } in &database.fenced_writes {
            let text = format!(
                "database {name}: somebody writes past the fence on the {server}: {kind} in {schema}.{table} (epoch {epoch})"
            );
            self.note_change(at, Subject::FencedWrite(migration.to_owned(), text.clone()), text, true);
        }
        let Some(watch) = &database.fence_watch else { return };
        let text = match &watch.trouble {
            None => format!("database {name}: writes on the fenced {} are watched for", watch.server),
            Some(why) => format!("database {name}: writes on the fenced {} are not watched for: {why}", watch.server),
        };
        self.note_change(at, Subject::FenceWatch(migration.to_owned(), name.clone()), text, !watch.watched);
    }

    /// One event when it begins, and one when it ends.
    fn note_delay(&mut self, at: f64, route: &RouteView) {
        let subject = Subject::WriteDelay(route.database.clone());
        let text = match route.write_delay_ms > 0.0 {
            true => format!("database {}: writes are slowed down until the target has caught up", route.database),
            false if self.seen.contains_key(&subject) => {
                format!("database {}: writes are not slowed down any more", route.database)
            }
            false => return,
        };
        self.note_change(at, subject, text, false);
    }

    fn note_change(&mut self, at: f64, subject: Subject, text: String, failed: bool) {
        if self.seen.get(&subject) == Some(&text) {
            return;
        }
        let (migration, kind) = match &subject {
            Subject::Migration(name) => (Some(name.clone()), "state"),
            Subject::Database(name, _) => (Some(name.clone()), "database"),
            Subject::Cutover(name) => (Some(name.clone()), "cutover"),
            Subject::FencedWrite(name, _) | Subject::FenceWatch(name, _) => (Some(name.clone()), "fence"),
            Subject::Route(_) | Subject::WriteDelay(_) => (None, "route"),
        };
        self.note(at, migration, kind, text.clone(), failed);
        self.seen.insert(subject, text);
    }

    fn note(&mut self, at: f64, migration: Option<String>, kind: &str, text: String, failed: bool) {
        self.newest_event += 1;
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(EventView {
            number: self.newest_event,
            at,
            migration,
            kind: kind.to_owned(),
            failed,
            text,
        });
    }

    fn sample(&mut self, at: f64, migrations: &[MigrationView], (copied_rows, copied_bytes): (u64, u64)) {
        for migration in migrations.iter().filter(|migration| is_behind(migration)) {
            for database in &migration.databases {
                let sample = SampleView {
                    at,
                    database: database.name.clone(),
                    latency_bytes: database.latency_bytes,
                    latency_seconds: database.latency_seconds,
                    pending_changes: database.pending_changes,
                    copied_rows,
                    copied_bytes,
                };
                if self.samples.len() == SAMPLES {
                    self.samples.pop_front();
                }
                self.samples.push_back((migration.name.clone(), sample));
            }
        }
    }
}

/// Whether a server follows another one: the target, or after a cutover the source.
fn is_behind(migration: &MigrationView) -> bool {
    super::service::is_active(migration) || migration.databases.iter().any(|database| database.rollback_possible)
}

fn of_cutover(cutover: &CutoverView) -> String {
    let order = if cutover.direction == Some(Direction::Reverse) { "rollback" } else { "cutover" };
    let ended = match (&cutover.phase, cutover.outcome.as_str()) {
        (Some(phase), _) => format!("{order}: {phase}"),
        (None, "switched") => format!("{order}: switched, paused for {} ms", cutover.pause_ms),
        (None, "dry-run") if cutover.reason.is_empty() => format!("dry run: would have paused {} ms", cutover.pause_ms),
        (None, "dry-run") => format!("dry run: would not have switched: {}", cutover.reason),
        (None, outcome) => format!("{order}: {outcome}: {}", cutover.reason),
    };
    match cutover.forced.as_slice() {
        [] => ended,
        forced => format!("{ended} (gone past by --force: {})", forced.join("; ")),
    }
}

/// Whether nothing but the clock has moved.
fn is_same(last: &LiveView, next: &LiveView) -> bool {
    let duration = |view: &LiveView| {
        let mut view = view.clone();
        view.at = 0.0;
        // It grows with the clock, and everybody can count.
        view.migrations.iter_mut().flatten().for_each(|entry| entry.migration.duration_seconds = 0.0);
        view
    };
    duration(last) == duration(next)
}

/// Seconds since the Unix epoch.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(state: &str, bytes: Option<u64>) -> MigrationView {
        serde_json::from_value(serde_json::json!({
            "name": "m1", "state": state, "substate": "s", "mode": "online", "option": "validate",
            "cutover_when_ready": false, "error": null, "started_at": 1.0, "finished_at": null, "duration_seconds": 2.5,
            "source": "a:1", "validation": null,
            "databases": [{"name": "shop", "state": "copying", "latency_bytes": bytes, "latency_seconds": null,
                "pending_changes": null, "tables_total": 1, "tables_ready": 0, "retries": 0, "last_error": null}],
        }))
        .expect("a view")
    }

    #[test]
    fn a_change_is_one_event_and_a_look_without_one_is_none() {
        let live = Live::new();
        let look = |state| live.observe(&[migration(state, None)], &BTreeMap::new(), &[], (0, 0));
        look("InProgress");
        look("InProgress");
        look("Failed");
        live.note_order(Some("m1".to_owned()), "retry".to_owned(), false);
        let texts: Vec<String> = live.events().into_iter().map(|event| event.text).collect();
        assert_eq!(texts, ["retry", "Failed s", "database shop: copying", "InProgress s"]);
        assert_eq!(live.newest_event(), 4);
    }

    #[test]
    fn a_rollback_is_not_told_as_a_cutover() {
        let switched = |direction| CutoverView {
            outcome: "switched".to_owned(),
            pause_ms: 60,
            direction: Some(direction),
            ..CutoverView::default()
        };
        assert_eq!(of_cutover(&switched(Direction::Reverse)), "rollback: switched, paused for 60 ms");
        assert_eq!(of_cutover(&switched(Direction::Forward)), "cutover: switched, paused for 60 ms");
        let forced = CutoverView { forced: vec!["a".to_owned(), "b".to_owned()], ..switched(Direction::Forward) };
        assert_eq!(of_cutover(&forced), "cutover: switched, paused for 60 ms (gone past by --force: a; b)");
    }

    #[test]
    fn writes_that_are_slowed_down_are_an_event_when_it_begins_and_when_it_ends() {
        let live = Live::new();
        for write_delay_ms in [0.0, 0.0, 2.5, 7.0, 0.0, 0.0] {
            let route = serde_json::json!({
                "database": "shop", "server": "source", "epoch": 0, "held": false, "reason": null, "sessions": 1, "inside": 0,
                "write_delay_ms": write_delay_ms,
            });
            live.observe(&[], &BTreeMap::new(), &[serde_json::from_value(route).expect("a view")], (0, 0));
        }
        let texts: Vec<String> = live.events().into_iter().map(|event| event.text).collect();
        let of_writes = texts.iter().filter(|text| text.contains("slowed down")).collect::<Vec<_>>();
        assert_eq!(of_writes.len(), 2, "{texts:?}");
        assert!(of_writes[0].ends_with("not slowed down any more"), "{texts:?}");
    }

    #[test]
    fn what_is_kept_is_bounded_and_samples_come_oldest_first() {
        let live = Live::new();
        for bytes in 0..(LOOKS_PER_SAMPLE * 500) {
            live.observe(&[migration("InProgress", Some(bytes))], &BTreeMap::new(), &[], (0, 0));
            live.note_order(None, String::new(), false);
        }
        let history = live.history("m1");
        assert_eq!(history.len(), SAMPLES_SHOWN);
        assert_eq!(history.last().and_then(|sample| sample.latency_bytes), Some(LOOKS_PER_SAMPLE * 499));
        assert!(history.windows(2).all(|pair| pair[0].latency_bytes < pair[1].latency_bytes));
        assert_eq!(live.events().len(), EVENTS);
        assert!(live.history("m2").is_empty());
    }

    #[test]
    fn the_way_back_is_sampled_and_what_is_old_is_not_shown() {
        let live = Live::new();
        let mut switched = migration("Succeeded", Some(7));
        let look = |migration: &MigrationView| {
            for _ in 0..LOOKS_PER_SAMPLE {
                live.observe(std::slice::from_ref(migration), &BTreeMap::new(), &[], (0, 0));
            }
        };
        look(&switched);
        assert!(live.history("m1").is_empty(), "nothing follows it");
        switched.databases[0].rollback_possible = true;
        look(&switched);
        let behind: Vec<_> = live.history("m1").iter().map(|sample| sample.latency_bytes).collect();
        assert_eq!(behind, [Some(7)]);
        assert!(live.history_at(now() + SHOWN.as_secs_f64() + 1.0, "m1").is_empty());
    }

    #[test]
    fn followers_hear_of_changes_and_not_of_the_clock() {
        let live = Live::new();
        let view = |at, source: &str| LiveView {
            at,
            version: String::new(),
            not_ready: None,
            source: source.to_owned(),
            target: String::new(),
            routes: Vec::new(),
            migrations: None,
            cutovers: BTreeMap::new(),
            copied_rows: 0,
            copied_bytes: 0,
            newest_event: 0,
        };
        let mut follower = live.follow();
        live.send(view(1.0, "a"));
        assert!(follower.has_changed().expect("the sender lives"));
        follower.mark_unchanged();
        live.send(view(2.0, "a"));
        assert!(!follower.has_changed().expect("the sender lives"));
        live.send(view(3.0, "b"));
        assert!(follower.has_changed().expect("the sender lives"));
    }
}
