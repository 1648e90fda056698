//! Large objects: contents, owner, grants and comment, under the OIDs that they have.
//!
//! They are read through their functions and not from `pg_largeobject`, which a superuser alone may do. One that differs in
//! anything is made anew.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::UnstreamedError;
use crate::ident::{quote_ident, quote_literal};

/// Objects that are compared by one statement, which opens them all; and, at most, that are written by one transaction,
/// which locks them all.
const AT_ONCE: usize = 500;

/// One piece of a large object, in bytes.
const PIECE: i32 = 1 << 20;

/// Objects that are written by one statement amount to about this.
const BATCH_BYTES: i64 = 8 << 20;

/// Everything there is to an object. The list of grants is spelt out where it is the default one. `lo_open` is volatile, so
/// that no part of it is moved into another and done twice; 262144 is `INV_READ`. It is closed at the end of the
/// transaction.
const STATE: &str = "
SELECT m.oid, pg_catalog.pg_get_userbyid(m.lomowner)::text,
       (SELECT coalesce(string_agg(pg_catalog.format('GRANT %s ON LARGE OBJECT %s TO %s%s', a.privilege_type, m.oid,
                   CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END,
                   CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END), '; '
                   ORDER BY coalesce(r.rolname, ''), a.privilege_type), '')
          FROM pg_catalog.aclexplode(coalesce(m.lomacl, pg_catalog.acldefault('L', m.lomowner))) a
          LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee),
       m.lomacl IS NULL,
       pg_catalog.obj_description(m.oid, 'pg_largeobject'), s.size,
       (SELECT pg_catalog.md5(string_agg(pg_catalog.md5(pg_catalog.lo_get(m.oid, o, 1048576)), '' ORDER BY o))
          FROM pg_catalog.generate_series(0, s.size, 1048576) o)
  FROM (SELECT oid, lomowner, lomacl FROM pg_catalog.pg_largeobject_metadata WHERE oid > $1 AND oid <= $2) m
 CROSS JOIN LATERAL (SELECT pg_catalog.lo_open(m.oid, 262144) AS fd) f
 CROSS JOIN LATERAL (SELECT pg_catalog.lo_lseek64(f.fd, 0, 2) AS size) s";

/// The OIDs in order; a statement opens no more than its share.
const OIDS: &str = "SELECT oid FROM pg_catalog.pg_largeobject_metadata ORDER BY oid";

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    owner: String,
    /// Statements.
    grants: String,
    comment: Option<String>,
    size: i64,
    /// Of the contents.
    hash: String,
}

/// An object as the source has it.
struct Object {
    state: State,
    default_grants: bool,
}

/// Makes the objects of `to` those of `from`. Returns how many had to be written or removed.
pub(super) async fn bring_over(from: &Client, to: &Client) -> Result<usize, UnstreamedError> {
    let listing = "listing them";
    let (wanted, found) = tokio::try_join!(oids(from), oids(to)).map_err(failed(listing))?;
    if wanted.is_empty() && found.is_empty() {
        return Ok(0);
    }
    // Bounds that hold about as many objects of either.
    let mut all: Vec<u32> = wanted.into_iter().chain(found).collect();
    all.sort_unstable();
    all.dedup();
    let mut carried = 0;
    let mut low = 0;
    for chunk in all.chunks(AT_ONCE) {
        let high = chunk.last().copied().unwrap_or(u32::MAX);
        let (wanted, found) = tokio::join!(states(from, low, high), states(to, low, high));
        let wanted = wanted.map_err(failed("reading them"))?;
        let found = found.map_err(failed("reading them on the other server"))?;
        carried += carry(from, to, &wanted, &found).await?;
        low = high;
    }
    Ok(carried)
}

fn failed(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> UnstreamedError {
    UnstreamedError::query("large objects", doing)
}

async fn oids(server: &Client) -> Result<Vec<u32>, tokio_postgres::Error> {
    Ok(server.query(OIDS, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Those with an OID above `low`, up to `high`.
async fn states(server: &Client, low: u32, high: u32) -> Result<BTreeMap<u32, Object>, tokio_postgres::Error> {
    let rows = server.query(STATE, &[&low, &high]).await?;
    let object = |row: &tokio_postgres::Row| {
        let state =
            State { owner: row.get(1), grants: row.get(2), comment: row.get(4), size: row.get(5), hash: row.get(6) };
        (row.get(0), Object { state, default_grants: row.get(3) })
    };
    Ok(rows.iter().map(object).collect())
}

/// Removes and writes what differs, in one transaction.
async fn carry(
    from: &Client,
    to: &Client,
    wanted: &BTreeMap<u32, Object>,
    found: &BTreeMap<u32, Object>,
) -> Result<usize, UnstreamedError> {
    let differs = |oid: &u32| wanted.get(oid).map(|object| &object.state) != found.get(oid).map(|object| &object.state);
    let gone: Vec<u32> = found.keys().copied().filter(differs).collect();
    let new: Vec<(u32, &Object)> =
        wanted.iter().filter(|(oid, _)| differs(oid)).map(|(oid, object)| (*oid, object)).collect();
    if gone.is_empty() && new.is_empty() {
        return Ok(0);
    }
    to.batch_execute("BEGIN").await.map_err(failed("beginning a transaction on the other server"))?;
    to.execute("SELECT pg_catalog.lo_unlink(oid) FROM pg_catalog.unnest($1::oid[]) AS g (oid)", &[&gone])
        .await
        .map_err(failed("removing them on the other server"))?;
    let mut batch = Vec::new();
    let mut bytes = 0;
    for (oid, object) in &new {
        if object.state.size > i64::from(PIECE) {
            write_in_pieces(from, to, *oid, object.state.size).await?;
            continue;
        }
        batch.push(*oid);
        bytes += object.state.size;
        if bytes >= BATCH_BYTES {
            write(from, to, &std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
    }
    write(from, to, &batch).await?;
    let dress: Vec<String> = new.iter().map(|(oid, object)| dress(*oid, object)).collect();
    to.batch_execute(&dress.join("; ")).await.map_err(failed("setting owner and grants on the other server"))?;
    to.batch_execute("COMMIT").await.map_err(failed("committing them on the other server"))?;
    let removed = gone.iter().filter(|oid| !wanted.contains_key(oid)).count();
    Ok(new.len() + removed)
}

/// Small ones, many at once.
async fn write(from: &Client, to: &Client, oids: &[u32]) -> Result<(), UnstreamedError> {
    if oids.is_empty() {
        return Ok(());
    }
    let read = "SELECT oid, pg_catalog.lo_get(oid) FROM pg_catalog.unnest($1::oid[]) AS g (oid)";
    let rows = from.query(read, &[&oids]).await.map_err(failed("reading them"))?;
    let (oids, contents): (Vec<u32>, Vec<&[u8]>) =
        rows.iter().map(|row| (row.get::<_, u32>(0), row.get::<_, &[u8]>(1))).unzip();
    to.execute(
        "SELECT pg_catalog.lo_from_bytea(oid, contents)
           FROM ROWS FROM (pg_catalog.unnest($1::oid[]), pg_catalog.unnest($2::bytea[])) AS g (oid, contents)",
        &[&oids, &contents],
    )
    .await
    .map(|_| ())
    .map_err(failed("writing them on the other server"))
}

/// A large one.
async fn write_in_pieces(from: &Client, to: &Client, oid: u32, size: i64) -> Result<(), UnstreamedError> {
    to.execute("SELECT pg_catalog.lo_create($1)", &[&oid]).await.map_err(failed("making one on the other server"))?;
    let mut at = 0;
    while at < size {
        let read = from.query_one("SELECT pg_catalog.lo_get($1, $2, $3)", &[&oid, &at, &PIECE]).await;
        let row = read.map_err(failed("reading them"))?;
        let piece: &[u8] = row.get(0);
        to.execute("SELECT pg_catalog.lo_put($1, $2, $3)", &[&oid, &at, &piece])
            .await
            .map_err(failed("writing them on the other server"))?;
        at += i64::from(PIECE);
    }
    Ok(())
}

/// The statements that give a new object its comment, owner and grants. The role that made it may be another one than its
/// owner: it must be a member of the owner's, or a superuser.
fn dress(oid: u32, object: &Object) -> String {
    let mut statements = Vec::new();
    let owner = quote_ident(&object.state.owner);
    if let Some(comment) = &object.state.comment {
        statements.push(format!("COMMENT ON LARGE OBJECT {oid} IS {}", quote_literal(comment)));
    }
    statements.push(format!("ALTER LARGE OBJECT {oid} OWNER TO {owner}"));
    if !object.default_grants {
        statements.push(format!("REVOKE ALL ON LARGE OBJECT {oid} FROM PUBLIC, {owner}"));
        if !object.state.grants.is_empty() {
            statements.push(object.state.grants.clone());
        }
    }
    statements.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_are_set_only_where_they_are_not_the_default() {
        let state = State {
            owner: "Ann".to_owned(),
            grants: "GRANT SELECT ON LARGE OBJECT 7 TO PUBLIC".to_owned(),
            comment: Some("it's".to_owned()),
            size: 0,
            hash: String::new(),
        };
        let plain = dress(7, &Object { state: state.clone(), default_grants: true });
        assert_eq!(plain, "COMMENT ON LARGE OBJECT 7 IS 'it''s'; ALTER LARGE OBJECT 7 OWNER TO \"Ann\"");
        let granted = dress(7, &Object { state, default_grants: false });
        let grants = "; REVOKE ALL ON LARGE OBJECT 7 FROM PUBLIC, \"Ann\"; GRANT SELECT ON LARGE OBJECT 7 TO PUBLIC";
        assert_eq!(granted, format!("{plain}{grants}"));
    }
}
