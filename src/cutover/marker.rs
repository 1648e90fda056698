//! The marker: a row of ours that is updated behind everything that was written, and what shows that it was.
//!
//! "Arrived" is proven by that row: its update goes the same way as every other change, and is seen by the applier when
//! everything before it is durable on the other side. There is no arithmetic with WAL positions: an insert position can
//! stand behind a page header that nothing ever flushes, and who waits for it waits for ever.
//!
//! "Behind everything" is proven by what was done before, or by transaction ids, of which a server gives each out once and
//! in order, for all its databases, and to whoever writes:
//!
//! ```text
//! the marker is written   as transaction 731, and every one below 731 has ended
//! nobody is left          … and nobody can write any more
//! an id is asked for      732: nobody was given one in between, so nothing was written behind the marker
//!                         733: perhaps something was
//! ```
//!
//! A transaction that has ended has written its commit record before, so it stands before the marker's.

use futures_util::future::try_join_all;
use tokio_postgres::types::Type;

use super::CutoverError;
use super::work::Work;

/// A marker that was committed, in every database of a cutover.
#[derive(Debug)]
pub(super) struct Marker {
    /// What it set the row to.
    pub(super) nonce: String,
    commits: Vec<Commit>,
}

/// The commit in one database.
#[derive(Clone, Copy, Debug)]
struct Commit {
    xid: i64,
    /// Every transaction below this one had ended when it began.
    ended_below: i64,
}

impl Marker {
    /// Whether nothing was written behind it, on a server that gives out `next_xid` after it.
    fn is_last(&self, next_xid: i64) -> bool {
        let Some(first_xid) = self.commits.iter().map(|commit| commit.xid).min() else { return false };
        let given_out = usize::try_from(next_xid - first_xid);
        given_out == Ok(self.commits.len()) && self.commits.iter().all(|commit| commit.ended_below >= first_xid)
    }
}

impl Work {
    /// Commits a marker in every database.
    pub(super) async fn write_marker(&self, purpose: &str) -> Result<Marker, CutoverError> {
        let nonce = format!("{}{purpose}-{:016x}", self.case.epoch, rand::random::<u64>());
        let written = self.lines.iter().filter_map(|line| line.sessions.as_ref()).map(|sessions| async {
            // synchronous_commit is pinned on for our sessions, so the answer means durable. The snapshot is the
            // statement's, from before it was given an id: what it does not know has not ended.
            let updated = sessions
                .marker
                .query_typed(
                    "UPDATE pgcutover.marker SET nonce = $1 WHERE id = 1
                     RETURNING pg_catalog.txid_current(),
                               pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot())",
                    &[(&nonce, Type::TEXT)],
                )
                .await
                .map_err(|source| CutoverError::query("write the marker", source))?;
            match updated.as_slice() {
                [row] => Ok(Commit { xid: row.get(0), ended_below: row.get(1) }),
                _ => Err(CutoverError::Unexpected("the marker row is missing".to_owned())),
            }
        });
        let commits = try_join_all(written).await?;
        Ok(Marker { nonce, commits })
    }

    /// Whether nothing was written behind `marker` on the server that is left, where nobody can write now. `false` means
    /// that it is not known: another database's writers were given ids as well.
    pub(super) async fn is_last(&self, marker: &Marker) -> Result<bool, CutoverError> {
        let row = self.from.control.query_typed_one("SELECT pg_catalog.txid_current()", &[]).await;
        let row = row.map_err(|source| CutoverError::query("ask for a transaction id", source))?;
        Ok(marker.is_last(row.get(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_last(commits: &[(i64, i64)], next_xid: i64) -> bool {
        let commits = commits.iter().map(|&(xid, ended_below)| Commit { xid, ended_below }).collect();
        Marker { nonce: String::new(), commits }.is_last(next_xid)
    }

    #[test]
    fn a_marker_is_the_last_only_where_nobody_else_was_given_an_id() {
        assert!(is_last(&[(731, 731)], 732));
        assert!(!is_last(&[(731, 731)], 733), "somebody began to write behind it");
        assert!(!is_last(&[(731, 729)], 732), "somebody was writing and may have ended behind it");
        assert!(!is_last(&[], 732), "nothing is known");
    }

    #[test]
    fn markers_of_several_databases_count_as_one() {
        // The second began while the first was under way, the third behind both.
        assert!(is_last(&[(732, 731), (731, 731), (733, 733)], 734));
        assert!(!is_last(&[(732, 731), (731, 731), (734, 733)], 735), "733 was somebody else's");
        assert!(!is_last(&[(732, 730), (731, 731)], 733), "730 had not ended when one of them was written");
    }
}
