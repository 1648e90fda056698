//! Carries definitions over: what changes them on the source is recorded in a published table, in stream order, and is
//! executed on the target at that place ([`crate::migration::apply::command`]).
//!
//! ```text
//! source   BEGIN; INSERT a; ALTER TABLE a ADD c …   the event trigger inserts into pgcutover.command; INSERT a; COMMIT
//! stream   Begin  Insert a  Insert command  Relation a (with c)  Insert a  Commit
//! target   BEGIN; INSERT a; ALTER TABLE a ADD c …; INSERT a; progress; COMMIT
//! ```
//!
//! A command is recorded only where its text can be executed by itself and comes to the same on the target; everything else
//! that would change a definition is refused, by what it is. The functions are in `carry.sql`: the record is written by a
//! SECURITY DEFINER function into a table that nobody else was given a right on.
//!
//! While the rows are copied, and from the preparation of a cutover on, the gate is shut: every command is refused.

use tokio_postgres::GenericClient;

use super::DdlError;

const MAKE_SQL: &str = include_str!("carry.sql");

/// Schema and name of the table of the commands.
pub const COMMANDS: (&str, &str) = ("pgcutover", "command");

/// Sets the replica identity of tables back that came without one while definitions were carried. The publication must be
/// gone: without, they could not be updated.
pub const UNDO_IDENTITIES_SQL: &str = "DO $undo$ DECLARE t pg_catalog.regclass; BEGIN \
        IF pg_catalog.to_regclass('pgcutover.full_identity') IS NULL THEN RETURN; END IF; \
        FOR t IN SELECT c.oid FROM pgcutover.full_identity f JOIN pg_catalog.pg_class c ON c.oid = f.oid \
                  WHERE c.relreplident = 'f' LOOP \
            EXECUTE pg_catalog.format('ALTER TABLE ONLY %s REPLICA IDENTITY DEFAULT', t); \
        END LOOP; \
        DROP TABLE pgcutover.full_identity; \
    END $undo$";

/// Why commands are refused before the rows are there.
pub const WHILE_COPYING: &str =
    "tables are being copied; definitions may be changed again as soon as the migration waits for its cutover";

/// Why commands are refused once a cutover has begun to prepare.
pub const WHILE_CUTTING_OVER: &str =
    "the database is being cut over; try again afterwards, on the server that is then in use";

/// What the source has to know.
#[derive(Clone, Copy, Debug)]
pub struct Carry<'a> {
    /// Name of the migration, for messages.
    pub migration: &'a str,
    /// The publication that new tables join.
    pub publication: &'a str,
    /// Whether tables without an identity are given REPLICA IDENTITY FULL; they are refused otherwise.
    pub full_identity: bool,
    /// `server_version_num` of the target.
    pub target_version: u32,
}

/// Makes the tables, functions and event triggers, anew where they are there already; the gate is shut. The table
/// [`COMMANDS`] has to be published.
pub async fn make(source: &mut tokio_postgres::Client, carry: Carry<'_>) -> Result<(), DdlError> {
    let transaction = source.transaction().await?;
    let made = async {
        transaction.batch_execute(super::UNDO_SQL).await?;
        transaction.batch_execute(MAKE_SQL).await?;
        let target_version = i32::try_from(carry.target_version).unwrap_or(i32::MAX);
        transaction
            .execute(
                "INSERT INTO pgcutover.ddl_gate (shut_because, migration, publication, full_identity, target_version)
                 VALUES ($1, $2, $3, $4, $5)",
                &[&WHILE_COPYING, &carry.migration, &carry.publication, &carry.full_identity, &target_version],
            )
            .await
    };
    made.await.map_err(super::not_allowed)?;
    transaction.commit().await.map_err(DdlError::Query)
}

/// Shuts the gate, or opens it where there is no reason to keep it shut, and waits for the transactions whose commands
/// have passed. False: nothing is carried here.
pub async fn set_gate(source: &impl GenericClient, shut_because: Option<&str>) -> Result<bool, tokio_postgres::Error> {
    let there = source.query_one("SELECT pg_catalog.to_regclass('pgcutover.ddl_gate') IS NOT NULL", &[]).await?;
    if !there.get::<_, bool>(0) {
        return Ok(false);
    }
    let set = "UPDATE pgcutover.ddl_gate SET shut_because = $1 WHERE shut_because IS DISTINCT FROM $1";
    source.execute(set, &[&shut_because]).await?;
    Ok(true)
}
