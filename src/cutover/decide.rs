//! The decision: exact sequence values, the boundary, and the one row that makes the other server active.

use futures_util::future::try_join_all;

use super::CutoverError;
use super::settle::{self, Answer};
use super::work::{LineSessions, Work};
use crate::catalog::decision::{self, Outcome};
use crate::ident::{QualifiedName, quote_literal};
use crate::postgres::Control;
use crate::switch::Epoch;

/// Sequences read by one statement.
const SEQUENCES_AT_ONCE: usize = 200;

/// A sequence as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SequenceValue {
    /// Quoted, ready for SQL.
    name: String,
    last_value: i64,
    is_called: bool,
}

impl Work {
    /// Writes sequences and boundary of every database, one transaction each. The other server is not active yet, so a
    /// retry sets everything again and nobody has seen it.
    pub(super) async fn write_target(&self) -> Result<(), CutoverError> {
        let epoch = self.case.epoch;
        let written =
            self.lines.iter().filter_map(|line| line.sessions.as_ref()).map(|sessions| write_one(sessions, epoch));
        try_join_all(written).await?;
        Ok(())
    }

    /// Sends the decision. From here on the answer is the other server's.
    pub(super) async fn send_decision(&self) -> Answer {
        let proposed = decision::propose(&*self.to.control, &self.case, Outcome::Decided, &self.to.identity);
        let limit = self.to.connector.server().connect_timeout;
        match tokio::time::timeout(limit, proposed).await {
            Ok(Ok(outcome)) => Answer::Read(outcome),
            Ok(Err(error)) => Answer::Lost(error.into()),
            Err(_) => Answer::Lost(CutoverError::Unexpected(format!("no answer to the decision within {limit:?}"))),
        }
    }

    /// Asks on a new connection what became of the decision.
    pub(super) async fn ask_again(&self) -> Answer {
        let limit = self.to.connector.server().connect_timeout;
        let asked = settle::ask(&self.to.connector, &self.control_database, &self.case, None);
        match tokio::time::timeout(limit, asked).await {
            Ok(answer) => answer,
            Err(_) => Answer::Lost(CutoverError::Unexpected(format!("no answer within {limit:?}"))),
        }
    }
}

async fn write_one(sessions: &LineSessions, epoch: Epoch) -> Result<(), CutoverError> {
    let sequences = read_sequences(&sessions.marker).await?;
    let failed = |source| CutoverError::query("set the sequences", source);
    let onward = &sessions.onward;
    onward.batch_execute("BEGIN").await.map_err(failed)?;
    let (names, values): (Vec<&str>, Vec<i64>) =
        sequences.iter().map(|sequence| (sequence.name.as_str(), sequence.last_value)).unzip();
    let called: Vec<bool> = sequences.iter().map(|sequence| sequence.is_called).collect();
    onward
        .execute(
            "SELECT pg_catalog.setval(s.name::regclass, s.value, s.called)
             FROM unnest($1::text[], $2::bigint[], $3::boolean[]) s (name, value, called)",
            &[&names, &values, &called],
        )
        .await
        .map_err(failed)?;
    decision::write_boundary(&**onward, epoch).await?;
    onward.batch_execute("COMMIT").await.map_err(failed)
}

/// Reads every sequence of the database from the sequence itself: the views hide the value of one that was set and
/// never called.
async fn read_sequences(control: &Control) -> Result<Vec<SequenceValue>, CutoverError> {
    let failed = |source| CutoverError::query("read the sequences", source);
    let names: Vec<QualifiedName> = control
        .query(
            "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname <> 'pgcutover' ORDER BY 1, 2",
            &[],
        )
        .await
        .map_err(failed)?
        .iter()
        .map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)))
        .collect();
    let mut values = Vec::with_capacity(names.len());
    for chunk in names.chunks(SEQUENCES_AT_ONCE) {
        let selects: Vec<String> = chunk
            .iter()
            .map(|name| format!("SELECT {}, last_value, is_called FROM {name}", quote_literal(&name.to_string())))
            .collect();
        for row in control.query(&selects.join(" UNION ALL "), &[]).await.map_err(failed)? {
            values.push(SequenceValue { name: row.get(0), last_value: row.get(1), is_called: row.get(2) });
        }
    }
    Ok(values)
}
