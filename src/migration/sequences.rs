//! Sequences: no logical stream carries their values, so they are read from the source and set on the target.
//!
//! They are read from the sequences themselves: `pg_sequences` does not tell where a sequence stands that was set
//! without having been called. `setval` is not transactional, which is harmless: until the switch nobody uses the
//! target's sequences, and setting them again is setting them.

use std::collections::HashMap;

use futures_util::future::try_join_all;
use tokio_postgres::{Client, GenericClient, Statement};

use crate::ident::QualifiedName;

/// Sequences read by one statement.
const READ_AT_ONCE: usize = 500;

/// Every sequence of the database: schema and name.
const NAMES: &str = "
    SELECT n.nspname::text, c.relname::text
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'pgcutover')
    ORDER BY 1, 2";

/// Where a sequence stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceValue {
    /// Its name.
    pub name: QualifiedName,
    /// The value it gave last, or will give next when it was not called.
    pub last_value: i64,
    /// Whether `last_value` was given already.
    pub is_called: bool,
}

/// Sequences could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    /// A statement failed.
    #[error("the sequences could not be {doing}")]
    Query {
        /// `read` or `set on the target`.
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The target lacks sequences.
    #[error("sequences are missing on the target: {0}")]
    Missing(String),
}

/// Statements that read every sequence of one server's database, planned once: planning a thousand of them costs many
/// times what reading them does.
#[derive(Debug)]
struct Reader {
    names: Vec<QualifiedName>,
    statements: Vec<Statement>,
}

impl Reader {
    async fn prepare(client: &Client, names: Vec<QualifiedName>) -> Result<Self, tokio_postgres::Error> {
        let select = |(index, name)| format!("SELECT {index}, last_value, is_called FROM {name}");
        let texts = names.chunks(READ_AT_ONCE).map(|chunk| {
            let selects: Vec<String> = chunk.iter().enumerate().map(select).collect();
            selects.join(" UNION ALL ")
        });
        let statements = try_join_all(texts.map(|text| async move { client.prepare(&text).await })).await?;
        Ok(Self { names, statements })
    }

    /// Reads them as they are now; sequences that were made or dropped meanwhile are noticed.
    async fn read(&mut self, client: &Client) -> Result<Vec<SequenceValue>, tokio_postgres::Error> {
        let names = list(client).await?;
        if names != self.names {
            *self = Self::prepare(client, names).await?;
        }
        let answers = try_join_all(self.statements.iter().map(|statement| client.query(statement, &[]))).await?;
        let chunks = self.names.chunks(READ_AT_ONCE).zip(answers);
        let values = chunks.flat_map(|(names, rows)| {
            rows.into_iter().filter_map(|row| {
                let name = names.get(usize::try_from(row.get::<_, i32>(0)).ok()?)?;
                Some(SequenceValue { name: name.clone(), last_value: row.get(1), is_called: row.get(2) })
            })
        });
        Ok(values.collect())
    }
}

async fn list(client: &Client) -> Result<Vec<QualifiedName>, tokio_postgres::Error> {
    let rows = client.query(NAMES, &[]).await?;
    Ok(rows.iter().map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
}

/// The sequences of a database on both servers.
#[derive(Debug)]
pub struct SequencePair {
    from: Reader,
    to: Reader,
}

impl SequencePair {
    /// Plans the reading on both sides and brings the values over a first time, so that in the pause only those are set
    /// that have moved since.
    pub async fn prepare(from: &Client, to: &Client) -> Result<Self, SequenceError> {
        let reader = async |client: &Client| {
            let names = list(client).await.map_err(read_failed)?;
            Reader::prepare(client, names).await.map_err(read_failed)
        };
        let mut pair = Self { from: reader(from).await?, to: reader(to).await? };
        pair.bring_over(from, to).await?;
        Ok(pair)
    }

    /// The sequences that were found when this was prepared.
    pub fn names(&self) -> &[QualifiedName] {
        &self.from.names
    }

    /// Sets the sequences of `to` that stand elsewhere than those of `from`. Returns how many that were.
    pub async fn bring_over(&mut self, from: &Client, to: &Client) -> Result<usize, SequenceError> {
        let (wanted, found) = tokio::try_join!(self.from.read(from), self.to.read(to)).map_err(read_failed)?;
        let found: HashMap<&QualifiedName, &SequenceValue> = found.iter().map(|value| (&value.name, value)).collect();
        let moved: Vec<SequenceValue> =
            wanted.into_iter().filter(|value| found.get(&value.name) != Some(&value)).collect();
        if !moved.is_empty() {
            set(to, &moved).await?;
        }
        Ok(moved.len())
    }
}

fn read_failed(source: tokio_postgres::Error) -> SequenceError {
    SequenceError::Query { doing: "read", source }
}

/// Sets the sequences of the same names, all by one statement.
async fn set(target: &impl GenericClient, values: &[SequenceValue]) -> Result<(), SequenceError> {
    let names: Vec<String> = values.iter().map(|value| value.name.to_string()).collect();
    let numbers: Vec<i64> = values.iter().map(|value| value.last_value).collect();
    let called: Vec<bool> = values.iter().map(|value| value.is_called).collect();
    let rows = target
        .query(
            "SELECT name FROM unnest($1::text[], $2::bigint[], $3::boolean[]) AS s (name, value, called)
              WHERE pg_catalog.setval(pg_catalog.to_regclass(name), value, called) IS NULL",
            &[&names, &numbers, &called],
        )
        .await
        .map_err(|source| SequenceError::Query { doing: "set on the target", source })?;
    if rows.is_empty() {
        return Ok(());
    }
    let missing: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    Err(SequenceError::Missing(missing.join(", ")))
}
