//! One table: what is read of it, in which parts, and what the parts sum up to.

use std::collections::BTreeMap;

use super::align::Pair;
use super::chunks::{Begun, Pages, divide, sorted};
use super::expression::{Column, Floats, Hasher, reconcile};
use super::identity::{Identity, identity};
use super::round::Readers;
use super::shape::Shape;
use super::type_tree::Types;
use super::{VerifyContext, VerifyError};
use crate::ident::{QualifiedName, quote_ident, quote_literal};
use crate::postgres::Control;

/// Rows that one bucket is to hold.
const BUCKET_ROWS: u64 = 4096;

/// A guess, for tables that were never analysed.
const LIKELY_ROW_BYTES: u64 = 200;

/// Most buckets of a table; each part brings one row for each.
const BUCKETS: u64 = 1024;

/// Ranges of blocks are found without reading the rest from here on.
const TID_RANGES: u32 = 140_000;

/// There is nothing to compare with.
pub(super) const MISSING: &str = "the table is not on both servers";

/// Columns, with the types that lie under domains.
const COLUMNS: &str = "
WITH RECURSIVE base AS (
    SELECT a.attnum, a.attname::text AS name, format_type(a.atttypid, a.atttypmod) AS shown, a.atttypid AS oid
      FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT b.attnum, b.name, b.shown, t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.oid WHERE t.typtype = 'd')
SELECT b.name, b.shown,
       CASE WHEN n.nspname = 'pg_catalog' THEN t.typname::text ELSE n.nspname || '.' || t.typname END,
       format('%I.%I', m.nspname, p.proname), t.oid,
       CASE WHEN t.oid <> (SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum = b.attnum)
            THEN format('%I.%I', n.nspname, t.typname) END
  FROM base b JOIN pg_type t ON t.oid = b.oid AND t.typtype <> 'd' JOIN pg_namespace n ON n.oid = t.typnamespace
  JOIN pg_proc p ON p.oid = t.typoutput JOIN pg_namespace m ON m.oid = p.pronamespace
 ORDER BY b.attnum";

/// The key that rows are told apart by: the primary key, or else the replica identity's index.
const KEY: &str = "
SELECT a.attname::text, i.indisprimary
  FROM pg_index i CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
 WHERE i.indexrelid = (SELECT x.indexrelid FROM pg_index x
                        WHERE x.indrelid = $1 AND x.indisvalid AND (x.indisprimary OR x.indisreplident)
                        ORDER BY x.indisprimary DESC LIMIT 1)
   AND k.position <= coalesce((to_jsonb(i) ->> 'indnkeyatts')::int, i.indnatts)
 ORDER BY k.position";

/// A table on one server, as its snapshot has it.
#[derive(Debug)]
struct Place {
    identity: Identity,
    blocks: u64,
    rows: u64,
    block_size: u64,
    columns: Vec<Column>,
    tid_ranges: bool,
}

/// What to read of one table.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) table: QualifiedName,
    source: Place,
    target: Place,
    /// Names of the key's columns; empty: none.
    pub(super) key: Vec<String>,
    /// Rows that belong to the migration, as SQL beginning with WHERE; of an extension's table perhaps not all.
    pub(super) filter: String,
    pub(super) hasher: Hasher,
    /// One less than the number of buckets, which is a power of two.
    mask: i64,
    cut: Cut,
}

/// What one part is.
#[derive(Debug)]
enum Cut {
    /// A range of blocks; so many on each server, which are the same rows only all together.
    Blocks(u32),
    /// A range of the key's first columns: the same rows on both servers.
    Key(Vec<Column>, Begun),
}

/// What one part came to.
pub(super) struct Part {
    pub(super) sums: Sums,
    /// Rows of the source.
    pub(super) rows: u64,
    /// Bytes of the source.
    pub(super) bytes: u64,
}

/// Number of rows and sum of their hashes, for each bucket, on both servers.
#[derive(Debug, Default)]
pub(super) struct Sums {
    source: BTreeMap<i64, (i64, i128)>,
    target: BTreeMap<i64, (i64, i128)>,
}

impl Sums {
    pub(super) fn add(&mut self, more: Self) {
        for (sums, more) in [(&mut self.source, more.source), (&mut self.target, more.target)] {
            for (bucket, (rows, sum)) in more {
                let entry = sums.entry(bucket).or_default();
                *entry = (entry.0 + rows, entry.1.wrapping_add(sum));
            }
        }
    }

    /// Rows on the source.
    pub(super) fn rows(&self) -> u64 {
        self.source.values().map(|(rows, _)| rows.unsigned_abs()).sum()
    }

    /// Buckets that are not the same.
    pub(super) fn differing(&self) -> Vec<i64> {
        let mut buckets: Vec<i64> = self.source.keys().chain(self.target.keys()).copied().collect();
        buckets.sort_unstable();
        buckets.dedup();
        buckets.retain(|bucket| self.source.get(bucket) != self.target.get(bucket));
        buckets
    }
}

impl Plan {
    /// Looks at the table on both servers; the inner error says why it cannot be compared. `begun` is what was compared of
    /// it already. A sample of a large table is read by `samplers`.
    pub(super) async fn make(
        pair: &Pair,
        samplers: Readers<'_>,
        context: &VerifyContext,
        table: &QualifiedName,
        hasher: &Hasher,
        begun: Option<&Begun>,
    ) -> Result<Result<Self, String>, VerifyError> {
        let (source, target) =
            (place(&pair.source, table, hasher.floats).await?, place(&pair.target, table, hasher.floats).await?);
        let (Some(mut source), Some(mut target)) = (source, target) else {
            return Ok(Err(MISSING.to_owned()));
        };
        let alone: Vec<&str> = [(&source.columns, &target.columns), (&target.columns, &source.columns)]
            .into_iter()
            .flat_map(|(here, there)| here.iter().filter(|column| !there.iter().any(|other| other.name == column.name)))
            .map(|column| column.name.as_str())
            .collect();
        if !alone.is_empty() {
            return Ok(Err(format!("columns that only one of the servers has: {}", alone.join(", "))));
        }
        (source.columns, target.columns) = reconcile(&source.columns, &target.columns);
        let (key, is_primary) = key(&pair.source, source.identity.oid).await?;
        let filter = pair
            .source
            .query_opt(
                "SELECT u.condition FROM pg_extension x
                  CROSS JOIN LATERAL unnest(x.extconfig, x.extcondition) AS u (relation, condition)
                  WHERE u.relation = $1 AND u.condition <> ''",
                &[&source.identity.oid],
            )
            .await
            .map_err(VerifyError::query("reading what belongs to an extension"))?;
        let filter: String = filter.map(|row| row.get(0)).unwrap_or_default();
        let bytes = source.bytes().max(target.bytes());
        let parts = u32::try_from(bytes.div_ceil(context.part_bytes.max(1)).clamp(1, 1 << 20)).unwrap_or(1);
        let mut cut = Cut::Blocks(if source.tid_ranges && target.tid_ranges { parts } else { 1 });
        if is_primary && filter.is_empty() && self::key(&pair.target, target.identity.oid).await? == (key.clone(), true)
        {
            let columns = sorted(&key, &source.columns, &target.columns);
            let layout = layout(&columns, &source, &target);
            let begun = match begun.filter(|begun| begun.layout == layout) {
                Some(begun) => Some(begun.clone()),
                None => {
                    let here = Pages { server: samplers.source, blocks: source.blocks };
                    let there = Pages { server: samplers.target, blocks: target.blocks };
                    let bounds = divide(here, there, table, &columns, parts).await?;
                    bounds.map(|bounds| Begun { layout, bounds, ..Begun::default() })
                }
            };
            if let Some(begun) = begun {
                cut = Cut::Key(columns, begun);
            }
        }
        let rows_likely = source.rows.max(target.rows).max(source.bytes() / LIKELY_ROW_BYTES);
        let apart = match &cut {
            Cut::Blocks(_) => 1,
            Cut::Key(_, begun) => u64::from(begun.chunks()),
        };
        let buckets = (rows_likely / apart / BUCKET_ROWS).clamp(1, BUCKETS).next_power_of_two();
        Ok(Ok(Self {
            table: table.clone(),
            source,
            target,
            key,
            filter,
            hasher: hasher.clone(),
            mask: i64::try_from(buckets - 1).unwrap_or(0),
            cut,
        }))
    }

    /// Where its parts are compared each on its own: which there are, and which were compared already.
    pub(super) fn begun(&self) -> Option<&Begun> {
        match &self.cut {
            Cut::Blocks(_) => None,
            Cut::Key(_, begun) => Some(begun),
        }
    }

    /// Its columns on one server, in the same order on both.
    pub(super) fn columns(&self, side: Side) -> &[Column] {
        match side {
            Side::Source => &self.source.columns,
            Side::Target => &self.target.columns,
        }
    }

    /// Its number on the target.
    pub(super) fn target_oid(&self) -> u32 {
        self.target.identity.oid
    }

    /// Size on the source.
    pub(super) fn bytes(&self) -> u64 {
        self.source.bytes()
    }

    /// How many parts there are, at least one.
    pub(super) fn parts(&self) -> u32 {
        match &self.cut {
            Cut::Blocks(parts) => *parts,
            Cut::Key(_, begun) => begun.chunks(),
        }
    }

    /// The parts that are to be read.
    pub(super) fn left(&self) -> Vec<u32> {
        match &self.cut {
            Cut::Blocks(parts) => (0..*parts).collect(),
            Cut::Key(_, begun) => begun.left(),
        }
    }

    /// Size of one of them.
    pub(super) fn part_bytes(&self) -> u64 {
        self.bytes() / u64::from(self.parts())
    }

    /// Reads one part on both servers at the same time.
    pub(super) async fn read(&self, readers: Readers<'_>, number: u32) -> Result<Part, VerifyError> {
        self.join(readers).await?;
        let sums = self.both(readers, number, Grain::Part).await?;
        readers.leave().await?;
        let rows = sums.rows();
        Ok(Part { sums, rows, bytes: self.part_bytes() })
    }

    /// The buckets that differ, of one range of the key or of all blocks. Reads the rows once more, under the same
    /// snapshots, so the work is done only where it is known to find something.
    pub(super) async fn buckets(&self, readers: Readers<'_>, number: u32) -> Result<Vec<i64>, VerifyError> {
        if self.mask == 0 {
            return Ok(vec![0]);
        }
        let parts = match &self.cut {
            Cut::Blocks(parts) => 0..*parts,
            Cut::Key(..) => number..number + 1,
        };
        let mut sums = Sums::default();
        self.join(readers).await?;
        for number in parts {
            sums.add(self.both(readers, number, Grain::Buckets).await?);
        }
        readers.leave().await?;
        Ok(sums.differing())
    }

    /// Begins to read under the snapshots.
    pub(super) async fn join(&self, readers: Readers<'_>) -> Result<(), VerifyError> {
        readers.join().await?;
        if let Cut::Key(..) = self.cut {
            // What a table without statistics looks like to the planner must not have all of it read for each range. By a
            // bitmap each page is read once and in the order of the disk, which was 5 % faster than by the index alone.
            let by_bitmap = "SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off";
            for server in [readers.source, readers.target] {
                let set = server.batch_execute(by_bitmap).await;
                set.map_err(VerifyError::query("preparing to read a range"))?;
            }
        }
        Ok(())
    }

    /// The condition for one part on one server; empty: all rows.
    fn range(&self, place: &Place, number: u32) -> String {
        match &self.cut {
            Cut::Blocks(parts) => place.range(number, *parts),
            Cut::Key(columns, begun) => begun.range(columns, number),
        }
    }

    async fn both(&self, readers: Readers<'_>, number: u32, grain: Grain) -> Result<Sums, VerifyError> {
        let (source, target) = tokio::try_join!(
            self.sums(readers.source, &self.source, number, grain),
            self.sums(readers.target, &self.target, number, grain),
        )?;
        Ok(Sums { source, target })
    }

    async fn sums(
        &self,
        server: &Control,
        place: &Place,
        number: u32,
        grain: Grain,
    ) -> Result<BTreeMap<i64, (i64, i128)>, VerifyError> {
        let (bucket, group) = match grain {
            Grain::Part => ("0::bigint".to_owned(), "HAVING count(*) > 0"),
            Grain::Buckets => (format!("h & {}", self.mask), "GROUP BY 1"),
        };
        let sql = format!(
            "SELECT {bucket}, count(*), sum(h)::text FROM (SELECT {} AS h FROM ONLY {} {} OFFSET 0) AS r {group}",
            self.hasher.hash(&place.columns),
            self.table,
            condition(&[&self.filter, &self.range(place, number)]),
        );
        let rows = server.query(&sql, &[]).await.map_err(VerifyError::query("reading a table"))?;
        rows.iter()
            .map(|row| {
                let sum: &str = row.get(2);
                let sum = sum.parse().map_err(|_| VerifyError::Unreadable("a sum of hashes"))?;
                Ok((row.get(0), (row.get(1), sum)))
            })
            .collect()
    }

    /// The rows of some buckets on one server, of one range of the key or of all blocks: hash of the key, hash of the row,
    /// the key or the place as text; in the order of the hashes.
    pub(super) fn rows_sql(&self, side: Side, number: u32, buckets: &[i64]) -> String {
        let place = match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        };
        let keys: Vec<&Column> =
            self.key.iter().filter_map(|name| place.columns.iter().find(|column| column.name == *name)).collect();
        let (key_hash, shown) = if keys.is_empty() {
            (None, "ARRAY[ctid::text]".to_owned())
        } else {
            let shown: Vec<String> = keys.iter().map(|column| self.hasher.key_text(column)).collect();
            (Some(self.hasher.hash(keys)), format!("ARRAY[{}]", shown.join(", ")))
        };
        let row_hash = self.hasher.hash(&place.columns);
        let key_column = key_hash.map_or_else(String::new, |hash| format!(", {hash} AS k"));
        let key = if key_column.is_empty() { "h" } else { "k" };
        let list: Vec<String> = buckets.iter().map(i64::to_string).collect();
        let range = match &self.cut {
            Cut::Blocks(_) => String::new(),
            Cut::Key(columns, begun) => begun.range(columns, number),
        };
        format!(
            "SELECT {key}, h, shown FROM (SELECT {row_hash} AS h{key_column}, {shown} AS shown FROM ONLY {} {} OFFSET 0) AS r
             WHERE h & {} IN ({}) ORDER BY 1, 2",
            self.table,
            condition(&[&self.filter, &range]),
            self.mask,
            list.join(", "),
        )
    }

    /// Whether the table was rewritten, truncated, replaced or dropped since the snapshots were taken, on either server.
    pub(super) async fn rewritten(&self, source: &Control, target: &Control) -> Result<bool, VerifyError> {
        for (server, place) in [(source, &self.source), (target, &self.target)] {
            if identity(server, &self.table).await?.as_ref() != Some(&place.identity) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What is summed up on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grain {
    /// All that is read: cheap, and enough where nothing differs.
    Part,
    /// Each bucket.
    Buckets,
}

/// Which of the two.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Source,
    Target,
}

impl Place {
    fn bytes(&self) -> u64 {
        self.blocks * self.block_size
    }

    /// The condition for one of `parts` parts; the last one is open, so that nothing is beyond it.
    fn range(&self, number: u32, parts: u32) -> String {
        if parts == 1 {
            return String::new();
        }
        let at = |part: u32| self.blocks * u64::from(part) / u64::from(parts);
        let from = format!("ctid >= '({},0)'", at(number));
        if number + 1 == parts { from } else { format!("{from} AND ctid < '({},0)'", at(number + 1)) }
    }
}

/// `filter` begins with WHERE, in any case, or is empty.
fn condition([filter, range]: &[&str; 2]) -> String {
    match (filter.trim(), *range) {
        (filter, "") => filter.to_owned(),
        ("", range) => format!("WHERE {range}"),
        // What an extension has written may hold an OR, and end with a comment.
        (filter, range) => format!("WHERE ({}\n) AND {range}", filter.get("WHERE".len()..).unwrap_or_default()),
    }
}

/// Columns of the table's key in their order, and whether it is the primary one.
async fn key(holder: &Control, table: u32) -> Result<(Vec<String>, bool), VerifyError> {
    let rows = holder.query(KEY, &[&table]).await.map_err(VerifyError::query("reading a key"))?;
    let is_primary = rows.first().is_some_and(|row| row.get(1));
    Ok((rows.iter().map(|row| row.get(0)).collect(), is_primary))
}

/// What ranges of a key belong to: a table that was rewritten may have other rows in those that were compared.
fn layout(key: &[Column], source: &Place, target: &Place) -> String {
    let list = |columns: &[Column]| {
        let texts: Vec<String> =
            columns.iter().map(|column| format!("{} {}", quote_ident(&column.name), column.type_name)).collect();
        texts.join(", ")
    };
    format!(
        "({}) ({}) ({}) {} {}",
        list(key),
        list(&source.columns),
        list(&target.columns),
        source.identity,
        target.identity
    )
}

async fn place(holder: &Control, table: &QualifiedName, floats: Floats) -> Result<Option<Place>, VerifyError> {
    let Some(identity) = identity(holder, table).await? else { return Ok(None) };
    let oid = identity.oid;
    let row = holder
        .query_one(
            "SELECT pg_relation_size(c.oid) / current_setting('block_size')::int8,
                    greatest(c.reltuples, 0)::float8, current_setting('block_size')::int8
               FROM pg_class c WHERE c.oid = $1",
            &[&oid],
        )
        .await
        .map_err(VerifyError::query("looking a table up"))?;
    let columns = holder.query(COLUMNS, &[&oid]).await.map_err(VerifyError::query("reading columns"))?;
    let types = match floats {
        Floats::Alike => Types::default(),
        Floats::Apart => Types::of_table(holder, oid).await?,
    };
    let columns = columns
        .iter()
        .map(|row| Column {
            name: row.get(0),
            type_name: row.get(1),
            base: row.get(2),
            output: row.get(3),
            shape: types.shape(row.get(4)).filter(Shape::holds_numbers),
            domain_over: row.get(5),
        })
        .collect();
    let unsigned = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate")]
    let rows = row.get::<_, f64>(1) as u64;
    Ok(Some(Place {
        identity,
        blocks: unsigned(row.get(0)),
        rows,
        block_size: unsigned(row.get(2)),
        columns,
        tid_ranges: holder.version_num() >= TID_RANGES,
    }))
}

/// Begins a transaction under a holder's snapshot.
pub(super) async fn join(server: &Control, snapshot: &str) -> Result<(), VerifyError> {
    let sql = format!(
        "ROLLBACK; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        quote_literal(snapshot)
    );
    server.batch_execute(&sql).await.map_err(VerifyError::query("joining a snapshot"))
}

/// Ends it; locks on tables are held no longer.
pub(super) async fn leave(server: &Control) -> Result<(), VerifyError> {
    server.batch_execute("COMMIT").await.map_err(VerifyError::query("leaving a snapshot"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_tell_duplicates_and_name_the_buckets_that_differ() {
        let one_side =
            |list: &[(i64, i64, i128)]| list.iter().map(|&(b, n, s)| (b, (n, s))).collect::<BTreeMap<_, _>>();
        let mut sums = Sums::default();
        sums.add(Sums { source: one_side(&[(0, 2, 10), (1, 1, 7)]), target: one_side(&[(0, 1, 4)]) });
        sums.add(Sums { source: one_side(&[(2, 1, 1)]), target: one_side(&[(0, 1, 6), (1, 2, 7), (3, 1, 0)]) });
        assert_eq!(sums.differing(), [1, 2, 3], "bucket 0 came in two parts, bucket 1 has a row of hash 0 more");
        assert_eq!(sums.rows(), 4);
    }

    #[test]
    fn parts_cover_every_block_and_the_last_is_open() {
        let identity = Identity::default();
        let place = Place { identity, blocks: 100, rows: 0, block_size: 8192, columns: Vec::new(), tid_ranges: true };
        assert_eq!(place.range(0, 1), "");
        assert_eq!(place.range(0, 3), "ctid >= '(0,0)' AND ctid < '(33,0)'");
        assert_eq!(place.range(2, 3), "ctid >= '(66,0)'");
        assert_eq!(condition(&["where a OR c", "b"]), "WHERE ( a OR c\n) AND b");
        assert_eq!(condition(&["", "b"]), "WHERE b");
    }
}
