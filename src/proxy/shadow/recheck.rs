//! Looks again at answers that differ: the target is behind, so another answer may be an older one.
//!
//! ```text
//! t1  the source answers a client with S1; the target answers otherwise
//! L   the source's insert position, read after t1
//!     … until the migration's slot is confirmed at L or past it: all that was committed before L is durable on the target
//! t2  the target again: the rows of S1       → caught up
//! t3  the source again: other rows than S1   → undecided: they have changed meanwhile, or the statement answers so
//!                       the rows of S1       → different
//! ```
//!
//! At t2 the target stands where the source stood at some moment between t1 and t3. If the source had the same answer all
//! that time, as it had at both ends, the target has it wrong. Time alone proves nothing: what does not arrive is undecided.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::compare::{Answer, Match};
use super::runner::{Link, Unanswered};
use super::tally::Outcome;
use super::{Doubt, Run, lock};
use crate::proxy::Shared;
use crate::switch::ServerRole;

/// Between two looks at how far the target is.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Who is not there by then is not waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// The furthest slot of ours in the database: it is confirmed only at what the target has made durable.
const IS_THERE: &str = "SELECT COALESCE(pg_catalog.max(confirmed_flush_lsn) >= $1::pg_catalog.text::pg_catalog.pg_lsn, false) \
    FROM pg_catalog.pg_replication_slots \
    WHERE database = pg_catalog.current_database() AND slot_name ~ '^pgcutover_[0-9a-f]{16}$'";

/// Takes what is in doubt, all of it at a time, and decides it.
pub(super) async fn work(shared: Arc<Shared>, run: Arc<Run>) {
    let (mut target, mut source) = (Link::default(), Link::default());
    tokio::select! {
        biased;
        // What is left on a server is cancelled below.
        () = run.ended() => {}
        // Ends never; what is dropped half way is not counted: the run is over.
        () = async {
            loop {
                batch(&shared, &run, &mut target, &mut source).await;
                // Nothing of it stays on the source while there is nothing to do.
                source.close(&shared).await;
            }
        } => {}
    }
    tokio::join!(target.close(&shared), source.close(&shared));
}

async fn batch(shared: &Shared, run: &Run, target: &mut Link, source: &mut Link) {
    let doubts = loop {
        let doubted = run.doubted.notified();
        let doubts: Vec<Doubt> = lock(&run.doubts).drain(..).collect();
        if !doubts.is_empty() {
            break doubts;
        }
        doubted.await;
    };
    let mut arrived = HashMap::new();
    for doubt in doubts {
        let database = doubt.login.database.clone();
        let has_arrived = match arrived.get(&database) {
            Some(known) => *known,
            None => {
                let now = target_is_there(shared, &database).await;
                arrived.insert(database, now);
                now
            }
        };
        let outcome = if has_arrived { decide(shared, &doubt, target, source).await } else { Outcome::Undecided };
        let mut tally = lock(&run.tally);
        if outcome == Outcome::Different {
            tally.different(doubt.call.text());
        }
        tally.ended(outcome, &run.metrics);
        run.in_doubt.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Waits until the target has what the source has now.
async fn target_is_there(shared: &Shared, database: &str) -> bool {
    let Ok(control) = shared.source.control(database, "shadow").await else { return false };
    let asked = async {
        let at: String = control.query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[]).await?.get(0);
        loop {
            if control.query_one(IS_THERE, &[&at]).await?.get(0) {
                return Ok::<_, tokio_postgres::Error>(true);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let arrived = tokio::time::timeout(PATIENCE, asked).await;
    control.close().await;
    matches!(arrived, Ok(Ok(true)))
}

async fn decide(shared: &Shared, doubt: &Doubt, target: &mut Link, source: &mut Link) -> Outcome {
    let theirs = match ask(shared, ServerRole::Target, doubt, target).await {
        Ok(answer) => answer,
        Err(Unanswered::TooMuch) => Answer::default(),
        Err(Unanswered::Closed(_) | Unanswered::Unlike | Unanswered::Lost) => return Outcome::Undecided,
    };
    if theirs.failure.is_some() {
        return Outcome::Undecided;
    }
    if is_same(&doubt.answer, &theirs) {
        return Outcome::CaughtUp;
    }
    match ask(shared, ServerRole::Source, doubt, source).await {
        Ok(ours) if ours.failure.is_none() && is_same(&doubt.answer, &ours) => Outcome::Different,
        Ok(_) | Err(_) => Outcome::Undecided,
    }
}

async fn ask(shared: &Shared, server: ServerRole, doubt: &Doubt, link: &mut Link) -> Result<Answer, Unanswered> {
    let answered = link.run(shared, server, &doubt.login, &doubt.state, &doubt.call, Duration::ZERO).await;
    answered.map(|(answer, _took)| answer)
}

fn is_same(one: &Answer, other: &Answer) -> bool {
    matches!(one.compare(other), Match::Equal | Match::Reordered)
}
