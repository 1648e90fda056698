//! The rule about jobs of pg_cron, which is installed in one database of a server and runs its jobs in any.
//!
//! What is read must be the extension's own table: anybody with the right to create schemas can make a view of its name,
//! and what a view calls runs with the rights of whoever reads it.

use super::database::{Database, Finding};
use super::definition::{Apply, Definition};
use super::{Outcome, RuleResult, Statement};
use crate::catalog::journal::Side;
use crate::postgres::Control;
use crate::sqlstate;

const SCHEDULED_JOBS: Definition = Definition {
    code: "scheduled_jobs",
    worst: Outcome::Warning,
    why: "jobs of pg_cron stay with the source: none would run on the target after the cutover",
    evidence: "the jobs that run in this database, and the database that pg_cron is installed in",
    fix: "note the rows of cron.job, SELECT cron.unschedule(jobid) when the cutover begins, and cron.schedule(…) them on the \
          target after it",
    apply: Apply::Refused("they would not run until the cutover"),
    ..Finding::DEFINITION
};

pub(super) const DEFINITIONS: [&Definition; 1] = [&SCHEDULED_JOBS];

/// pg_cron's own default of `cron.database_name`.
const USUAL_HOME: &str = "postgres";

/// Whether `cron.job` is a table that belongs to the extension.
const GENUINE: &str = "\
SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
   AND d.refclassid = 'pg_extension'::regclass
  JOIN pg_extension e ON e.oid = d.refobjid
 WHERE n.nspname = 'cron' AND c.relname = 'job' AND c.relkind = 'r' AND e.extname = 'pg_cron'";

const JOBS: &str = "\
SELECT format('job %s, of pg_cron in database %I', jobid, current_database()), format('SELECT cron.unschedule(%s)', jobid), current_database()::text
  FROM cron.job WHERE active AND database = $1::text ORDER BY jobid";

impl Database<'_> {
    /// See the module.
    pub(super) async fn scheduled_jobs(&self) -> RuleResult {
        let rule = self.rule(&SCHEDULED_JOBS);
        // Shown to some roles only.
        let home = "SELECT current_setting('cron.database_name', true)";
        let home = match self.session.query_one(home, &[]).await {
            Ok(row) => row.get::<_, Option<String>>(0).filter(|name| !name.is_empty()),
            Err(error) if is_refusal(&error) => None,
            Err(error) => return rule.unknown(&error),
        };
        let assumed = home.is_none();
        let home = home.unwrap_or_else(|| USUAL_HOME.to_owned());
        if home == self.name {
            return self.jobs_in(&self.session).await;
        }
        match self.servers.preflight.session(Side::Source, &home).await {
            Ok(session) => self.jobs_in(&session).await,
            // A database that is only assumed does not have to be there.
            Err(error) if assumed && error.sqlstate() == Some(sqlstate::INVALID_CATALOG_NAME) => rule.succeeded(),
            Err(error) => rule.not_connected(&error),
        }
    }

    async fn jobs_in(&self, session: &Control) -> RuleResult {
        let rule = self.rule(&SCHEDULED_JOBS);
        match session.query_opt(GENUINE, &[]).await {
            Ok(None) => return rule.succeeded(),
            Ok(Some(_)) => {}
            Err(error) => return rule.unknown(&error),
        }
        match session.query(JOBS, &[&self.name]).await {
            Ok(rows) => {
                let unschedule = |row: &tokio_postgres::Row| Statement {
                    server: Side::Source,
                    database: row.get(2),
                    sql: row.get(1),
                };
                let found = rows.iter().map(|row| row.get(0)).collect();
                rule.mended_by(rows.iter().map(unschedule).collect()).unless_any(Outcome::Warning, found)
            }
            // A policy of pg_cron shows everybody but superusers their own jobs.
            Err(error) if is_refusal(&error) => rule.answer(
                Outcome::Warning,
                vec!["pg_cron is installed, and the source's login role may not see whose jobs it has".to_owned()],
            ),
            Err(error) => rule.unknown(&error),
        }
    }
}

fn is_refusal(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code() == sqlstate::INSUFFICIENT_PRIVILEGE)
}
