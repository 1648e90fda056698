//! Sequences: no logical stream carries their values, so they are read from the source and set on the target.
//!
//! They are read from the sequences themselves: `pg_sequences` does not tell where a sequence stands that was set
//! without having been called. `setval` is not transactional, which is harmless: until the switch nobody uses the
//! target's sequences, and setting them again is setting them. Where they were set is noted ([`positions`]), so that it is
//! known whether somebody has used them after all.
//!
//! A session that was given up in the middle of a `setval`, because that waited for somebody's lock on the sequence, carries
//! it out when the lock is let go of: minutes later, perhaps, on a server that is in use by then. So whoever sets sequences
//! holds an advisory lock of the session for as long as it could ([`take_over`]), and who comes next ends that session first.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::{try_join, try_join_all};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::catalog::positions::{self, Position};
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

/// Something that changes when [`NAMES`] does: a row of the catalogue that is made or renamed is a row of another
/// transaction. It may change when the names do not. Putting a thousand names together takes as long as reading where they
/// stand.
const DIGEST: &str = "
    SELECT pg_catalog.md5(pg_catalog.concat(
        (SELECT pg_catalog.array_agg(n.xmin) FROM pg_catalog.pg_namespace n WHERE n.nspname !~ '^pg_'),
        pg_catalog.array_agg(c.oid), pg_catalog.array_agg(c.xmin)))
    FROM pg_catalog.pg_class c
    WHERE c.relkind = 'S' AND c.relpersistence <> 't'";

/// Sets the sequences of the same names, all by one statement; answers with those that are not there.
const SET: &str = "
    SELECT s.schema_name, s.name
      FROM unnest($1::text[], $2::text[], $3::bigint[], $4::boolean[]) AS s (schema_name, name, value, called)
     WHERE pg_catalog.setval(pg_catalog.to_regclass(pg_catalog.format('%I.%I', s.schema_name, s.name)), s.value, s.called) IS NULL";

/// Which of these of the source the target has to have: all but those of extensions, of which it has what its own
/// version makes. One that numbers the rows of a table belongs where the table does.
const OF_NO_EXTENSION: &str = "
    SELECT s.schema_name, s.name
      FROM unnest($1::text[], $2::text[]) AS s (schema_name, name)
     CROSS JOIN LATERAL (
        SELECT pg_catalog.to_regclass(pg_catalog.format('%I.%I', s.schema_name, s.name))::oid) AS q (oid)
     WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_depend d
         WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.deptype = 'e'
           AND (d.objid = q.oid OR d.objid IN (
                SELECT o.refobjid FROM pg_catalog.pg_depend o
                 WHERE o.classid = 'pg_catalog.pg_class'::regclass AND o.objid = q.oid
                   AND o.refclassid = 'pg_catalog.pg_class'::regclass AND o.deptype IN ('a', 'i'))))";

/// Key of the advisory lock, in each database, whose holder may set its sequences (`pgcut` in ASCII, then 3).
const SETTER_LOCK: i64 = 0x70_67_63_75_74_03;

/// Ends those of our own sessions that hold the lock $1; answers with whoever holds it.
const END_SETTERS: &str = "
    SELECT 'pid ' || l.pid || ' (' || coalesce(nullif(a.application_name, ''), 'no name') || ')',
           CASE WHEN a.application_name LIKE 'pgcutover/%' AND a.usename = session_user
                THEN pg_catalog.pg_terminate_backend(l.pid) END
      FROM pg_catalog.pg_locks l
      JOIN pg_catalog.pg_database d ON d.oid = l.database AND d.datname = pg_catalog.current_database()
      LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.pid <> pg_catalog.pg_backend_pid()
       AND l.classid::bigint << 32 | l.objid::bigint = $1";

/// For a session that was ended to be gone; one that stands in the middle of a write to the disk goes after that.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Between two looks whether it is.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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
    /// The target lacks sequences that are no extension's.
    #[error("sequences are missing on the target: {0}")]
    Missing(String),
    /// A session that may still set them does not end.
    #[error(
        "sequences of the target are still being set by {0}, which does not end: end it, or wait until it has ended"
    )]
    Held(String),
}

/// Statements that read every sequence of one server's database, planned once: planning a thousand of them costs many
/// times what reading them does.
#[derive(Debug)]
struct Reader {
    names: Vec<QualifiedName>,
    statements: Vec<Statement>,
    /// Answers whether the names are still these.
    digest: Statement,
    /// Its answer, from before the names were listed.
    expected: Option<String>,
}

impl Reader {
    /// Plans how all sequences of the database are read.
    async fn of(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let digest = client.prepare(DIGEST).await?;
        let expected = client.query_one(&digest, &[]).await?.get(0);
        let rows = client.query(NAMES, &[]).await?;
        let name = |row: &Row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        let names: Vec<QualifiedName> = rows.iter().map(name).collect();
        let select = |(index, name)| format!("SELECT {index}, last_value, is_called FROM {name}");
        let texts = names.chunks(READ_AT_ONCE).map(|chunk| {
            let selects: Vec<String> = chunk.iter().enumerate().map(select).collect();
            selects.join(" UNION ALL ")
        });
        let statements = try_join_all(texts.map(|text| async move { client.prepare(&text).await })).await?;
        Ok(Self { names, statements, digest, expected })
    }

    /// Reads them as they are now, or `None` when some were made, renamed or dropped meanwhile.
    async fn read(&self, client: &Client) -> Result<Option<Vec<Position>>, tokio_postgres::Error> {
        let answers = try_join_all(self.statements.iter().map(|statement| client.query(statement, &[])));
        // Sent together. One that was dropped fails its statement, which is no failure of ours.
        let (found, answers) = tokio::join!(client.query_one(&self.digest, &[]), answers);
        if found?.get::<_, Option<String>>(0) != self.expected {
            return Ok(None);
        }
        let chunks = self.names.chunks(READ_AT_ONCE).zip(answers?);
        let values = chunks.flat_map(|(names, rows)| {
            rows.into_iter().filter_map(|row| {
                let name = names.get(usize::try_from(row.get::<_, i32>(0)).ok()?)?;
                Some(Position { name: name.clone(), last_value: row.get(1), is_called: row.get(2) })
            })
        });
        Ok(Some(values.collect()))
    }

    /// Reads them as they are now, whichever there are.
    async fn read_all(&mut self, client: &Client) -> Result<Vec<Position>, tokio_postgres::Error> {
        loop {
            if let Some(positions) = self.read(client).await? {
                return Ok(positions);
            }
            *self = Self::of(client).await?;
        }
    }
}

/// Where every sequence of the database stands.
pub async fn read(client: &Client) -> Result<Vec<Position>, tokio_postgres::Error> {
    Reader::of(client).await?.read_all(client).await
}

/// The sequences of a database on both servers.
#[derive(Debug)]
pub struct SequencePair {
    from: Reader,
    to: Reader,
    note: Statement,
    set: Statement,
    /// Where those of the second server have stood since they were last brought over.
    standing: HashSet<Position>,
}

impl SequencePair {
    /// Plans the reading on both sides and brings the values over a first time, so that in the pause only those are set
    /// that have moved since. Where all of them stand then is noted, and what earlier attempts have set is forgotten.
    /// Whoever else could set those of `to` is ended, and `to` has that to itself until its session ends.
    pub async fn prepare(from: &Client, to: &Client) -> Result<Self, SequenceError> {
        take_over(to).await?;
        let (from_reader, to_reader) = try_join(Reader::of(from), Reader::of(to)).await.map_err(read_failed)?;
        let mut pair = Self {
            from: from_reader,
            to: to_reader,
            note: to.prepare(positions::NOTE_SQL).await.map_err(set_failed)?,
            set: to.prepare(SET).await.map_err(set_failed)?,
            standing: HashSet::new(),
        };
        pair.bring_over(from, to).await?;
        let columns = Columns::of(&pair.standing);
        to.execute(positions::NOTE_ONLY_SQL, &columns.parameters()).await.map_err(set_failed)?;
        Ok(pair)
    }

    /// The sequences that were found when this was prepared.
    pub fn names(&self) -> &[QualifiedName] {
        &self.from.names
    }

    /// Sets the sequences of `to` that stand elsewhere than those of `from`. Returns how many that were. Both are the
    /// sessions that this was prepared with.
    pub async fn bring_over(&mut self, from: &Client, to: &Client) -> Result<usize, SequenceError> {
        let (wanted, found) = try_join(self.from.read_all(from), self.to.read_all(to)).await.map_err(read_failed)?;
        self.standing = found.into_iter().collect();
        let moved = self.set_moved(&wanted, from, to).await?;
        self.standing = wanted.into_iter().collect();
        Ok(moved)
    }

    /// The same in the pause, which begins right after [`Self::bring_over`]: `to` is not asked again where its sequences
    /// stand. Nobody uses it but the applier, which must not have moved any since: it never does, unless it applies
    /// definitions. Once only: what this sets is not remembered.
    pub async fn bring_moved(&self, from: &Client, to: &Client) -> Result<usize, SequenceError> {
        let wanted = match self.from.read(from).await.map_err(read_failed)? {
            Some(wanted) => wanted,
            None => read(from).await.map_err(read_failed)?,
        };
        self.set_moved(&wanted, from, to).await
    }

    async fn set_moved(&self, wanted: &[Position], from: &Client, to: &Client) -> Result<usize, SequenceError> {
        let moved = Columns::of(wanted.iter().filter(|position| !self.standing.contains(position)));
        if moved.names.is_empty() {
            return Ok(0);
        }
        // Two transactions, sent in this order and answered by one round trip.
        let parameters = moved.parameters();
        let (_, missing) = try_join(to.execute(&self.note, &parameters), to.query(&self.set, &parameters))
            .await
            .map_err(set_failed)?;
        if missing.is_empty() {
            return Ok(moved.names.len());
        }
        let schemas: Vec<&str> = missing.iter().map(|row| row.get(0)).collect();
        let names: Vec<&str> = missing.iter().map(|row| row.get(1)).collect();
        let needed = from.query(OF_NO_EXTENSION, &[&schemas, &names]).await.map_err(read_failed)?;
        let name = |row: &Row| format!("{}.{}", row.get::<_, &str>(0), row.get::<_, &str>(1));
        let needed: Vec<String> = needed.iter().map(name).collect();
        if needed.is_empty() {
            Ok(moved.names.len() - missing.len())
        } else {
            Err(SequenceError::Missing(needed.join(", ")))
        }
    }
}

/// Sees to it that from now on nobody but this session sets sequences for us in its database: ends the sessions of earlier
/// attempts, this process's or another's. The lock goes with the session.
async fn take_over(to: &Client) -> Result<(), SequenceError> {
    let deadline = tokio::time::Instant::now() + GONE_WITHIN;
    loop {
        let taken = to.query_one("SELECT pg_catalog.pg_try_advisory_lock($1)", &[&SETTER_LOCK]).await;
        if taken.map_err(set_failed)?.get(0) {
            return Ok(());
        }
        let holders = to.query(END_SETTERS, &[&SETTER_LOCK]).await.map_err(set_failed)?;
        if tokio::time::Instant::now() > deadline {
            let holders: Vec<&str> = holders.iter().map(|row| row.get(0)).collect();
            return Err(SequenceError::Held(holders.join(", ")));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Positions as the parameters of a statement.
#[derive(Default)]
struct Columns<'a> {
    schemas: Vec<&'a str>,
    names: Vec<&'a str>,
    last_values: Vec<i64>,
    are_called: Vec<bool>,
}

impl<'a> Columns<'a> {
    fn of(positions: impl IntoIterator<Item = &'a Position>) -> Self {
        let mut columns = Self::default();
        for Position { name, last_value, is_called } in positions {
            columns.schemas.push(&name.schema);
            columns.names.push(&name.name);
            columns.last_values.push(*last_value);
            columns.are_called.push(*is_called);
        }
        columns
    }

    fn parameters(&self) -> [&(dyn ToSql + Sync); 4] {
        [&self.schemas, &self.names, &self.last_values, &self.are_called]
    }
}

fn read_failed(source: tokio_postgres::Error) -> SequenceError {
    SequenceError::Query { doing: "read", source }
}

fn set_failed(source: tokio_postgres::Error) -> SequenceError {
    SequenceError::Query { doing: "set on the target", source }
}
