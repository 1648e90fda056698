//! The `pgcutover` schema: what must survive this process, kept in the two servers themselves.
//!
//! * [`fence`], [`decision`]: append-only rows in the control database of each server; they alone say who is active.
//!   [`claims`] reads them, [`resolve`] (pure) draws the conclusion.
//! * [`migrations`], [`tables`], [`streams`], [`watches`], [`progress`], [`journal`], [`verification`]: rows of the
//!   engine, of everything that it was asked, has done, has made and has found.
//! * [`positions`]: rows of where sequences were set.
//! * [`door`]: how our own sessions get into databases that a fence keeps shut.
//!
//! [`bootstrap`] makes the tables. Each part owns its DDL and a version number; nothing here is ever dropped by it.

pub mod claims;
pub mod decision;
pub mod door;
pub mod fence;
pub mod journal;
pub mod migrations;
pub mod positions;
pub mod progress;
pub mod resolve;
pub mod streams;
pub mod tables;
pub mod verification;
pub mod watches;

use tokio_postgres::GenericClient;

use self::decision::Outcome;
use crate::postgres::Control;
use crate::switch::Epoch;

/// Where a session stands, and so which tables belong there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The control database of the source.
    SourceControl,
    /// The control database of the target.
    TargetControl,
    /// A migrated database on the source.
    SourceDatabase,
    /// A migrated database on the target.
    TargetDatabase,
    /// A migrated database, on either server, once changes flow both ways.
    BothWays,
}

/// Tables that are made together and change version together.
struct Part {
    name: &'static str,
    /// Raised with every change of the DDL, which must bring every earlier version up to this one.
    version: i32,
    /// Idempotent.
    ddl: &'static str,
}

const fn part(name: &'static str, version: i32, ddl: &'static str) -> Part {
    Part { name, version, ddl }
}

impl Place {
    const fn parts(self) -> &'static [Part] {
        const FENCE: Part = part("fence", 2, fence::DDL);
        const DECISION: Part = part("decision", 1, decision::DDL);
        const BOUNDARY: Part = part("boundary", 1, decision::BOUNDARY_DDL);
        const MIGRATIONS: Part = part("migrations", 4, migrations::TARGET_CONTROL_DDL);
        const VERIFICATION: Part = part("verification", 2, verification::TARGET_CONTROL_DDL);
        const MARKER: Part = part("marker", 1, progress::SOURCE_DATABASE_DDL);
        const PROGRESS: Part = part("progress", 2, progress::TARGET_DATABASE_DDL);
        const POSITIONS: Part = part("sequence_positions", 1, positions::DDL);
        // A rollback leads the other way, so both control databases hold fences and decisions.
        match self {
            Self::SourceControl => &[FENCE, DECISION],
            Self::TargetControl => &[FENCE, DECISION, MIGRATIONS, VERIFICATION],
            Self::TargetDatabase => &[BOUNDARY, PROGRESS, POSITIONS],
            // A publication names all of them from the beginning: what serves the way back is what tells, on a server that
            // was left, our own writes from those of strangers.
            Self::SourceDatabase | Self::BothWays => &[MARKER, BOUNDARY, PROGRESS, POSITIONS],
        }
    }
}

/// The schema could not be made, or a row in it could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A statement failed.
    #[error("could not {what}")]
    Query {
        /// What was being done.
        what: String,
        /// Why.
        source: tokio_postgres::Error,
    },
    /// A row holds what this version does not understand.
    #[error("the pgcutover schema holds something this version does not know: {what}")]
    Unreadable {
        /// What was found.
        what: String,
    },
    /// A newer pgcutover has changed the tables.
    #[error(
        "part {part:?} of the pgcutover schema is at version {found}, this program knows {known}: run the newer program"
    )]
    Newer {
        /// Which part.
        part: &'static str,
        /// The version that stands there.
        found: i32,
        /// The version that this program makes.
        known: i32,
    },
    /// The schema is somebody else's.
    #[error(
        "the schema pgcutover belongs to {owner}, who may not act as this login role: what is in it would be run with its \
         rights; look at what it is, then DROP SCHEMA pgcutover CASCADE or ALTER SCHEMA pgcutover OWNER TO the login role"
    )]
    Foreign {
        /// Whose it is.
        owner: String,
    },
    /// A fence was to be ended one way and had been ended the other way.
    #[error("fence {epoch} was to be noted as {wanted:?} and stands as {stands:?}: a person must look at both servers")]
    Contradiction {
        /// Which.
        epoch: Epoch,
        /// What was to be noted.
        wanted: Outcome,
        /// What stands there.
        stands: Option<Outcome>,
    },
}

impl RecordError {
    pub(super) fn query(what: &str, source: tokio_postgres::Error) -> Self {
        Self::Query { what: what.to_owned(), source }
    }

    /// SQLSTATE, where a server refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Query { source, .. } => source.code().map(tokio_postgres::error::SqlState::code),
            Self::Unreadable { .. } | Self::Newer { .. } | Self::Foreign { .. } | Self::Contradiction { .. } => None,
        }
    }
}

/// Key of the advisory lock under which the schema is made (`pgcut` in ASCII, then 0): `IF NOT EXISTS` alone races.
const BOOTSTRAP_LOCK: i64 = 0x7067_6375_7400_0000;

/// Makes, or brings up to date, the tables that belong to `place`. Idempotent; when everything is there it only reads,
/// so a role without the right to create is enough from then on.
pub async fn bootstrap(control: &Control, place: Place) -> Result<(), RecordError> {
    let mut wanted = Vec::new();
    for part in place.parts() {
        match version(control, part.name).await? {
            Some(found) if found == part.version => {}
            Some(found) if found > part.version => {
                return Err(RecordError::Newer { part: part.name, found, known: part.version });
            }
            Some(_) | None => wanted.push(part),
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let failed = |source| RecordError::query("make the pgcutover schema", source);
    // Each sent as one simple query, which is one transaction. Whoever made the schema a moment ago has not made it for us.
    let lock = format!("SELECT pg_catalog.pg_advisory_xact_lock({BOOTSTRAP_LOCK})");
    control.batch_execute(&format!("{lock}; CREATE SCHEMA IF NOT EXISTS pgcutover")).await.map_err(failed)?;
    if !has_table(&**control, "part").await? {
        keep_to_owner(control).await.map_err(failed)?;
    }
    let mut script = format!(
        "{lock};
         CREATE TABLE IF NOT EXISTS pgcutover.part (name text PRIMARY KEY, version integer NOT NULL);\n"
    );
    for part in wanted {
        script.push_str(part.ddl);
        script.push_str(&format!(
            "INSERT INTO pgcutover.part VALUES ('{}', {}) ON CONFLICT (name) DO UPDATE SET version = excluded.version;\n",
            part.name, part.version
        ));
    }
    control.batch_execute(&script).await.map_err(failed)
}

/// Takes back what the login role's default privileges have given others on the schema that it has just made. Without a
/// right on the schema none on its tables is of use: who could write there could give orders in our name.
async fn keep_to_owner(control: &Control) -> Result<(), tokio_postgres::Error> {
    let query = "SELECT DISTINCT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END
                   FROM pg_catalog.pg_namespace n CROSS JOIN LATERAL pg_catalog.aclexplode(n.nspacl) x
                   LEFT JOIN pg_catalog.pg_roles r ON r.oid = x.grantee
                  WHERE n.nspname = 'pgcutover' AND x.grantee <> n.nspowner AND (x.grantee = 0 OR r.rolname <> current_user)";
    for row in control.query(query, &[]).await? {
        let grantee: &str = row.get(0);
        control.batch_execute(&format!("REVOKE ALL ON SCHEMA pgcutover FROM {grantee}")).await?;
    }
    Ok(())
}

/// Whether a table of ours is there. A role with the right to create schemas can make one of our name, and a view, a
/// trigger or a function in it would run with our rights: its owner must be somebody who may act as us in any case.
pub(crate) async fn has_table(control: &impl GenericClient, table: &str) -> Result<bool, RecordError> {
    let query = "SELECT pg_catalog.to_regclass($1::text) IS NOT NULL,
                        (SELECT pg_catalog.pg_get_userbyid(nspowner)::text FROM pg_catalog.pg_namespace
                          WHERE nspname = 'pgcutover' AND NOT pg_catalog.pg_has_role(nspowner, current_user, 'MEMBER'))";
    let row = control.query_one(query, &[&format!("pgcutover.{table}")]).await;
    let row = row.map_err(|source| RecordError::query("look for the pgcutover schema", source))?;
    match row.get(1) {
        Some(owner) => Err(RecordError::Foreign { owner }),
        None => Ok(row.get(0)),
    }
}

/// The version of one part, if it has been made.
async fn version(control: &Control, part: &'static str) -> Result<Option<i32>, RecordError> {
    let failed = |source| RecordError::query("read the versions of the pgcutover schema", source);
    if !has_table(&**control, "part").await? {
        return Ok(None);
    }
    let row = control.query_opt("SELECT version FROM pgcutover.part WHERE name = $1", &[&part]).await;
    Ok(row.map_err(failed)?.map(|row| row.get(0)))
}

fn epoch_to_sql(epoch: Epoch) -> i64 {
    i64::try_from(epoch.0).expect("epochs count attempts and stay far below 2^63")
}

fn epoch_from_sql(epoch: i64) -> Result<Epoch, RecordError> {
    u64::try_from(epoch).map(Epoch).map_err(|_| RecordError::Unreadable { what: format!("epoch {epoch}") })
}
