//! Sequences: no logical stream carries their values, so they are read from the source and set on the target.
//!
//! They are read from the sequences themselves: `pg_sequences` does not tell where a sequence stands that was set
//! without having been called. `setval` is not transactional, which is harmless: until the switch nobody uses the
//! target's sequences, and setting them again is setting them.

use tokio_postgres::GenericClient;

use crate::ident::QualifiedName;

/// Sequences read by one query.
const READ_AT_ONCE: usize = 500;

/// Where a sequence stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceValue {
    /// Its name.
    pub name: QualifiedName,
    /// The value it gave last, or will give next when it was not called.
    pub last_value: i64,
    /// Whether `last_value` was given already.
    pub is_called: bool,
    /// Step; negative when it counts down.
    pub increment: i64,
    /// Lowest value.
    pub min: i64,
    /// Highest value.
    pub max: i64,
}

/// Sequences could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    /// A statement failed.
    #[error("the sequences could not be {doing}")]
    Query {
        /// `read on the source` or `set on the target`.
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// The target lacks sequences.
    #[error("sequences are missing on the target: {0}")]
    Missing(String),
}

/// Reads every sequence of the database, in a few queries however many there are.
pub async fn read(source: &impl GenericClient) -> Result<Vec<SequenceValue>, SequenceError> {
    let failed = |source| SequenceError::Query { doing: "read on the source", source };
    let listed = source
        .query(
            "SELECT n.nspname::text, c.relname::text, s.seqincrement, s.seqmin, s.seqmax
               FROM pg_catalog.pg_sequence s
               JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
              WHERE c.relpersistence <> 't' AND n.nspname !~ '^pg_'
                AND n.nspname NOT IN ('information_schema', 'pgcutover')
              ORDER BY 1, 2",
            &[],
        )
        .await
        .map_err(failed)?;
    let mut values: Vec<SequenceValue> = listed
        .iter()
        .map(|row| SequenceValue {
            name: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
            last_value: 0,
            is_called: false,
            increment: row.get(2),
            min: row.get(3),
            max: row.get(4),
        })
        .collect();
    for chunk in values.chunks_mut(READ_AT_ONCE) {
        let selects: Vec<String> = chunk
            .iter()
            .enumerate()
            .map(|(index, value)| format!("SELECT {index}, last_value, is_called FROM {}", value.name))
            .collect();
        let rows = source.query(&selects.join(" UNION ALL "), &[]).await.map_err(failed)?;
        for row in rows {
            let index = usize::try_from(row.get::<_, i32>(0)).unwrap_or(usize::MAX);
            if let Some(value) = chunk.get_mut(index) {
                (value.last_value, value.is_called) = (row.get(1), row.get(2));
            }
        }
    }
    Ok(values)
}

/// Sets the sequences of the same names, all by one statement.
pub async fn set(target: &impl GenericClient, values: &[SequenceValue]) -> Result<(), SequenceError> {
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

/// The values that the sequences will not reach before they are set exactly: `steps` further on, inside their bounds.
pub fn ahead(values: &[SequenceValue], steps: i64) -> Vec<SequenceValue> {
    let further = |value: &SequenceValue| {
        let last_value = value.last_value.saturating_add(value.increment.saturating_mul(steps));
        SequenceValue { last_value: last_value.clamp(value.min, value.max), is_called: true, ..value.clone() }
    };
    values.iter().map(further).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(last_value: i64, increment: i64) -> SequenceValue {
        let name = QualifiedName::new("s", "it's");
        SequenceValue { name, last_value, is_called: false, increment, min: -100, max: 1000 }
    }

    #[test]
    fn ahead_goes_the_sequences_own_way_and_stays_in_bounds() {
        let last = |last, increment| ahead(&[value(last, increment)], 50)[0].last_value;
        assert_eq!(last(10, 2), 110);
        assert_eq!(last(10, -1), -40);
        assert_eq!(last(990, 1), 1000);
        assert_eq!(last(10, i64::MIN), -100);
    }
}
