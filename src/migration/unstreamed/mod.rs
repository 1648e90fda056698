//! Rows and values that no logical stream carries: unlogged tables, and large objects.
//!
//! They are carried with the copy, and once more by every cutover: before the pause, so that little is left, and inside it,
//! when nobody writes any more. Each time both servers say what they have as a fingerprint, table by table and object by
//! object, and only what differs is carried. Nothing is remembered in between, so every run can be repeated.
//!
//! Reading all of it twice takes time in which everybody waits: `[cutover] max_unstreamed` bounds it. What is larger is
//! refused before anything is paused, with its name and size, unless it is forced: `max_pause` bounds it then. PostgreSQL keeps no sound account of changes to these: its
//! statistics come late, and their pages' positions in the write-ahead log are not there for unlogged tables.
//!
//! It must never run towards a server that somebody uses: what only that server has is removed.

mod large_objects;
mod unlogged;

use crate::config::units::format_size;
use crate::ident::QualifiedName;
use crate::migration::late;
use crate::postgres::Control;

/// Largest tables that are named when there is too much.
const NAMED: usize = 5;

/// It could not be carried.
#[derive(Debug, thiserror::Error)]
pub enum UnstreamedError {
    /// A statement failed.
    #[error("{object}: {doing} failed")]
    Query {
        /// `large objects`, or the table.
        object: String,
        /// What was being done, and on which server.
        doing: &'static str,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// It would keep everybody waiting for too long.
    #[error(
        "{what}: no stream carries them, so they are carried inside the pause, and together they are larger than \
         max_unstreamed of {limit}; make them smaller (ALTER TABLE … SET LOGGED and begin the migration again, lo_unlink \
         and VACUUM FULL pg_largeobject), or raise [cutover] max_unstreamed, and max_pause with it"
    )]
    TooLarge {
        /// Names and sizes.
        what: String,
        /// As configured.
        limit: String,
    },
}

impl UnstreamedError {
    fn query(object: impl ToString, doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Self {
        move |source| Self::Query { object: object.to_string(), doing, source }
    }
}

/// How much there is on a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Weight {
    /// Unlogged tables with their size in bytes, largest first.
    pub tables: Vec<(QualifiedName, u64)>,
    /// How many large objects there are.
    pub large_objects: u64,
    /// What they take on disk, in bytes.
    pub large_object_bytes: u64,
}

impl Weight {
    /// Whether there is nothing.
    pub fn is_nothing(&self) -> bool {
        self.tables.is_empty() && self.large_objects == 0
    }

    /// All of it, in bytes.
    pub fn bytes(&self) -> u64 {
        self.tables.iter().map(|(_, bytes)| bytes).sum::<u64>() + self.large_object_bytes
    }

    /// Refuses what is too large to be carried inside the pause.
    pub fn must_fit(&self, limit_bytes: u64) -> Result<(), UnstreamedError> {
        if self.is_nothing() || self.bytes() <= limit_bytes {
            return Ok(());
        }
        Err(UnstreamedError::TooLarge { what: self.to_string(), limit: format_size(limit_bytes) })
    }
}

impl std::fmt::Display for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tables = self.tables.iter().take(NAMED);
        let mut parts: Vec<String> =
            tables.map(|(table, bytes)| format!("unlogged table {table} ({} kB)", bytes.div_ceil(1024))).collect();
        if self.tables.len() > NAMED {
            parts.push(format!("{} more unlogged tables", self.tables.len() - NAMED));
        }
        if self.large_objects > 0 {
            let size = self.large_object_bytes.div_ceil(1024);
            parts.push(format!("{} large objects ({size} kB)", self.large_objects));
        }
        f.write_str(&parts.join(", "))
    }
}

/// How much there is to carry. Cheap: sizes on disk.
pub async fn weigh(server: &Control) -> Result<Weight, UnstreamedError> {
    let failed = "measuring them";
    let tables = unlogged::list(server).await.map_err(UnstreamedError::query("unlogged tables", failed))?;
    let row = server
        .query_one(
            "SELECT count(*), CASE WHEN count(*) > 0 THEN pg_catalog.pg_relation_size('pg_catalog.pg_largeobject') ELSE 0 END
               FROM pg_catalog.pg_largeobject_metadata",
            &[],
        )
        .await
        .map_err(UnstreamedError::query("large objects", failed))?;
    let unsigned = |number: i64| u64::try_from(number).unwrap_or(0);
    Ok(Weight { tables, large_objects: unsigned(row.get(0)), large_object_bytes: unsigned(row.get(1)) })
}

/// Whether there are large objects. A new unlogged table is a definition, the first large object is none.
pub async fn has_large_objects(server: &Control) -> Result<bool, UnstreamedError> {
    let any = "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)";
    let row = server.query_typed_one(any, &[]).await;
    Ok(row.map_err(UnstreamedError::query("large objects", "looking for the first"))?.get(0))
}

/// What a run has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Unlogged tables that differed.
    pub tables: usize,
    /// Large objects that differed, or that only the other server had.
    pub large_objects: usize,
}

/// Makes `to` have what `from` has, as one snapshot of `from` shows it. Both sessions are in the database and in no
/// transaction.
pub async fn bring_over(from: &Control, to: &Control) -> Result<Carried, UnstreamedError> {
    let snapshot = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
    from.batch_execute(snapshot).await.map_err(UnstreamedError::query("unlogged tables", "taking a snapshot"))?;
    let carried = carry(from, to).await;
    let ended = from.batch_execute("ROLLBACK").await;
    let carried = carried?;
    ended.map_err(UnstreamedError::query("unlogged tables", "ending the snapshot"))?;
    Ok(carried)
}

/// The same under the snapshot that `from` is in already, and stays in.
pub(in crate::migration) async fn carry(from: &Control, to: &Control) -> Result<Carried, UnstreamedError> {
    let carried = async {
        // What triggers and foreign keys have done on the one server is carried, and not done again. Where the role may not
        // keep them from firing there are none yet.
        let silently = late::write_silently(to).await;
        silently.map_err(UnstreamedError::query("unlogged tables", "preparing the other server"))?;
        let tables = unlogged::bring_over(from, to).await?;
        let large_objects = large_objects::bring_over(from, to).await?;
        Ok(Carried { tables, large_objects })
    };
    let carried = carried.await;
    // After an error whoever called gives the sessions up; what was begun on the target is undone all the same.
    if carried.is_err() {
        let _ = to.batch_execute("ROLLBACK").await;
    }
    carried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_named_with_its_size() {
        let table = |name: &str, bytes| (QualifiedName::new("s", name), bytes);
        let weight =
            Weight { tables: vec![table("t", 4096), table("u", 1)], large_objects: 2, large_object_bytes: 8192 };
        assert_eq!(weight.bytes(), 12_289);
        assert!(weight.must_fit(12_289).is_ok());
        let refused = weight.must_fit(8 << 10).expect_err("too large").to_string();
        let named = "unlogged table \"s\".\"t\" (4 kB), unlogged table \"s\".\"u\" (1 kB), 2 large objects (8 kB): ";
        assert!(refused.starts_with(named) && refused.contains("8kB"), "{refused}");
        assert!(Weight::default().must_fit(0).is_ok(), "nothing always fits");
        let many = Weight { tables: (0..7).map(|n| table(&n.to_string(), 1)).collect(), ..Weight::default() };
        assert!(many.to_string().ends_with(", 2 more unlogged tables"), "{many}");
    }
}
