//! Where the sequences of the two servers stand.
//!
//! As long as a cutover is to come, which sets them exactly, the target's are behind the source's by what the application
//! has used since. A target's sequence that would give a greater number than the source's is one that somebody has used or
//! set there, unless it stands
//!
//! * where it was made: at its start, never called;
//! * where this program has set it: a dry run or an aborted cutover has, and the source's was set back, or came round, since; after a
//!   cutover that is where the server that was left stands ([`crate::catalog::positions`], of either server);
//! * never called, where the stream carries definitions and one of them said RESTART.
//!
//! Where no cutover is to come, each must stand where the source's does, or further.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use tokio_postgres::error::SqlState;

use super::VerifyError;
use super::definitions::{DefinitionDifference, unquoted};
use crate::catalog::has_table;
use crate::catalog::positions::{self, Position};
use crate::ident::QualifiedName;
use crate::migration::sequences;
use crate::postgres::Control;

/// How it is shown, and what does not change.
const SEQUENCES: &str = "
SELECT n.nspname::text, c.relname::text, format('%I.%I', n.nspname, c.relname), s.seqincrement, s.seqstart
  FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace";

/// Whether the stream has carried a command that sets a sequence without calling it.
const RESTARTED: &str = r"SELECT EXISTS (SELECT FROM pgcutover.command WHERE command ~* '\mrestart\M')";

/// Times that they are read again because one was dropped meanwhile.
const ATTEMPTS: u32 = 10;

/// Of one server.
struct Sequence {
    shown: String,
    increment: i64,
    start: i64,
}

/// What is known of the target's sequences beside their values.
struct Known {
    sequences: HashMap<QualifiedName, Sequence>,
    noted: HashSet<Position>,
    restarted: bool,
}

/// Sequences that both have, and that stand where they should not. `cutover_to_come`: one will set those of the target.
pub(super) async fn compare(
    source: &Control,
    target: &Control,
    cutover_to_come: bool,
) -> Result<Vec<DefinitionDifference>, VerifyError> {
    let rows = target.query(SEQUENCES, &[]).await.map_err(VerifyError::query("reading sequences"))?;
    let sequence = |row: &tokio_postgres::Row| {
        let name = QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        (name, Sequence { shown: unquoted(row.get(2)), increment: row.get(3), start: row.get(4) })
    };
    // The target first: what the source gives out meanwhile only brings it further.
    let there = positions(target).await?;
    let mut noted = positions::noted(&**target).await?;
    noted.extend(positions::noted(&**source).await?);
    let known =
        Known { sequences: rows.iter().map(sequence).collect(), noted, restarted: was_restarted(source).await? };
    let here: HashMap<QualifiedName, Position> =
        positions(source).await?.into_iter().map(|position| (position.name.clone(), position)).collect();
    let apart = there.iter().filter_map(|target| {
        let (sequence, source) = (known.sequences.get(&target.name)?, here.get(&target.name)?);
        let difference = match next(target, sequence.increment).cmp(&next(source, sequence.increment)) {
            Ordering::Greater if !(cutover_to_come && known.is_ours(target)) => "ahead",
            Ordering::Less if !cutover_to_come => "behind",
            Ordering::Greater | Ordering::Less | Ordering::Equal => return None,
        };
        let name = sequence.shown.clone();
        Some(DefinitionDifference { kind: "sequence".to_owned(), name, difference: difference.to_owned() })
    });
    Ok(apart.collect())
}

impl Known {
    /// Nobody but this program has brought it there.
    fn is_ours(&self, target: &Position) -> bool {
        let as_made = || {
            let start = self.sequences.get(&target.name).map(|sequence| sequence.start);
            !target.is_called && (self.restarted || start == Some(target.last_value))
        };
        self.noted.contains(target) || as_made()
    }
}

/// The number that it gives next, whichever way it counts: the greater, the further it is.
fn next(position: &Position, increment: i64) -> i128 {
    let step = if position.is_called { increment } else { 0 };
    (i128::from(position.last_value) + i128::from(step)) * i128::from(increment.signum())
}

/// Where all of them stand. One that is dropped between being listed and being read is no error.
async fn positions(server: &Control) -> Result<Vec<Position>, VerifyError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match sequences::read(server).await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) && attempt < ATTEMPTS => {}
            read => return read.map_err(VerifyError::query("reading sequences")),
        }
    }
}

async fn was_restarted(source: &Control) -> Result<bool, VerifyError> {
    if !has_table(&**source, "command").await? {
        return Ok(false);
    }
    let restarted = source.query_one(RESTARTED, &[]).await;
    Ok(restarted.map_err(VerifyError::query("reading which definitions were carried over"))?.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last_value: i64, is_called: bool) -> Position {
        Position { name: QualifiedName::new("s", "q"), last_value, is_called }
    }

    #[test]
    fn the_number_that_comes_next_tells_which_is_further() {
        assert_eq!(next(&at(5, true), 1), next(&at(6, false), 1));
        assert!(next(&at(5, true), 10) > next(&at(5, false), 10));
        assert!(next(&at(3, true), -3) > next(&at(40, true), -3), "it counts downwards");
        assert!(next(&at(i64::MAX, true), 1) > next(&at(i64::MAX, false), 1));
    }

    #[test]
    fn only_what_was_made_or_set_by_us_is_ours() {
        let sequence = Sequence { shown: String::new(), increment: 1, start: 7 };
        let mut known = Known {
            sequences: HashMap::from([(QualifiedName::new("s", "q"), sequence)]),
            noted: [at(20, true)].into(),
            restarted: false,
        };
        assert!(known.is_ours(&at(7, false)) && known.is_ours(&at(20, true)));
        assert!(!known.is_ours(&at(7, true)), "its first number was taken");
        assert!(!known.is_ours(&at(20, false)) && !known.is_ours(&at(21, true)) && !known.is_ours(&at(9, false)));
        known.restarted = true;
        assert!(known.is_ours(&at(9, false)) && !known.is_ours(&at(9, true)));
    }
}
