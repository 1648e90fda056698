//! Keeps definitions on the source as they are while a migration runs, where rights allow it; [`carry`] has what changes them
//! executed on the target too.
//!
//! No logical stream carries definitions. Where the configuration says so, an event trigger on the source refuses whatever
//! would change them, with a message that says why and what to do. Temporary objects may come and go. It fires for
//! nobody with `session_replication_role = replica`, and passes over sessions of pgcutover by their application name: it is
//! a guard against a mistake, not against ill will, and [`drift`](super::drift) looks again before a cutover.
//!
//! It must never outlive the migration: it is in the journal before it is made, and it is not restored on the target.

pub mod carry;

use tokio_postgres::GenericClient;

use crate::ident::quote_literal;

/// Names of the event triggers are this with what they wait for behind it.
const TRIGGER: &str = "pgcutover_ddl";

/// `DROP` of the event triggers, as text that constants are made of.
macro_rules! disarm {
    () => {
        "DROP EVENT TRIGGER IF EXISTS pgcutover_ddl_end; DROP EVENT TRIGGER IF EXISTS pgcutover_ddl_drop; \
         DROP EVENT TRIGGER IF EXISTS pgcutover_ddl_start; DROP EVENT TRIGGER IF EXISTS pgcutover_ddl_rewrite"
    };
}

/// The part of [`UNDO_SQL`] that must come first, in a transaction of its own, where commands may be under way: one that waits
/// for one of the tables would find it gone.
pub const DISARM_SQL: &str = disarm!();

/// Removes it all, but for what [`carry::UNDO_IDENTITIES_SQL`] removes; nothing when it is not there.
pub const UNDO_SQL: &str = concat!(
    disarm!(),
    "; DROP FUNCTION IF EXISTS pgcutover.refuse_ddl(); DROP FUNCTION IF EXISTS pgcutover.on_ddl(); \
     DROP FUNCTION IF EXISTS pgcutover.record_ddl(text, text, text, text, json); \
     DROP FUNCTION IF EXISTS pgcutover.refuse(text, text); DROP FUNCTION IF EXISTS pgcutover.unsettled(text); \
     DROP FUNCTION IF EXISTS pgcutover.bare(text, boolean); \
     DROP FUNCTION IF EXISTS pgcutover.bare(text, boolean, boolean); \
     DROP FUNCTION IF EXISTS pgcutover.is_several(text, text); \
     DROP TABLE IF EXISTS pgcutover.ddl_gate; DROP TABLE IF EXISTS pgcutover.command"
);

/// Whether an event trigger is one of ours.
pub fn is_own_trigger(name: &str) -> bool {
    name.starts_with(TRIGGER)
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum DdlError {
    /// The role may not create event triggers.
    #[error("the role may not create event triggers on the source")]
    NotAllowed,
    /// A statement failed.
    #[error("the event trigger that refuses changes of definitions could not be made on the source")]
    Query(#[from] tokio_postgres::Error),
}

/// Makes the event triggers of `migration`, anew where they are there already.
pub async fn refuse(source: &impl GenericClient, migration: &str) -> Result<(), DdlError> {
    source.batch_execute(&create_sql(migration)).await.map_err(not_allowed)
}

fn not_allowed(error: tokio_postgres::Error) -> DdlError {
    match error.code() {
        Some(code) if code.code() == "42501" => DdlError::NotAllowed,
        Some(_) | None => DdlError::Query(error),
    }
}

/// Sent as one query, which is one transaction.
fn create_sql(migration: &str) -> String {
    let detail = format!("The database is being moved by the pgcutover migration {migration}.");
    format!(
        "{UNDO_SQL};
CREATE FUNCTION pgcutover.refuse_ddl() RETURNS event_trigger LANGUAGE plpgsql
    SET search_path = pg_catalog SET standard_conforming_strings = on AS $body$
DECLARE
    what text;
BEGIN
    IF pg_catalog.current_setting('application_name') LIKE 'pgcutover/%' THEN
        RETURN;
    END IF;
    IF TG_EVENT = 'ddl_command_start' THEN
        -- Refused at its end, it would leave an invalid index behind. Inside a REFRESH … CONCURRENTLY the server alters
        -- temporary tables of its own.
        SELECT 'CONCURRENTLY' INTO what WHERE pg_catalog.current_query() ~* '\\mconcurrently\\M'
           AND pg_catalog.current_query() !~* '\\mrefresh\\s+materialized\\s+view\\M';
    ELSIF TG_EVENT = 'ddl_command_end' AND TG_TAG = 'DROP OWNED' THEN
        -- No event tells which rights it takes.
        SELECT 'the objects or rights of a role' INTO what;
    ELSIF TG_EVENT = 'sql_drop' THEN
        SELECT d.object_type || ' ' || d.object_identity INTO what
          FROM pg_catalog.pg_event_trigger_dropped_objects() d WHERE d.original AND NOT d.is_temporary LIMIT 1;
    ELSE
        SELECT coalesce(d.object_type || ' ' || d.object_identity, '') INTO what
          FROM pg_catalog.pg_event_trigger_ddl_commands() d
         WHERE d.command_tag NOT IN ('REFRESH MATERIALIZED VIEW', 'REINDEX') AND pg_catalog.lower(d.object_type) <> 'large object'
           AND d.schema_name IS DISTINCT FROM 'pg_temp' LIMIT 1;
    END IF;
    IF FOUND THEN
        RAISE EXCEPTION '% is refused while the database is being moved: %', TG_TAG, what
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = {detail},
                  HINT = 'Wait until the migration is complete, or cancel it.';
    END IF;
END
$body$;
CREATE EVENT TRIGGER {TRIGGER}_start ON ddl_command_start
    WHEN TAG IN ('CREATE INDEX', 'DROP INDEX', 'ALTER TABLE') EXECUTE PROCEDURE pgcutover.refuse_ddl();
CREATE EVENT TRIGGER {TRIGGER}_end ON ddl_command_end EXECUTE PROCEDURE pgcutover.refuse_ddl();
CREATE EVENT TRIGGER {TRIGGER}_drop ON sql_drop EXECUTE PROCEDURE pgcutover.refuse_ddl()",
        detail = quote_literal(&detail),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_migration_is_named_and_only_our_triggers_are_ours() {
        assert!(create_sql("it's").contains("migration it''s."));
        assert!(is_own_trigger("pgcutover_ddl_end") && !is_own_trigger("somebody_elses"));
    }
}
