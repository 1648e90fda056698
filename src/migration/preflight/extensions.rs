//! The rule about rows in tables of extensions, which are carried only where the extension says that they are its
//! users'.
//!
//! Only tables are read, and none with policies that hold for us: what a policy calls runs with our rights.

use super::database::{Database, Finding, OURS};
use super::definition::{Apply, Definition};
use super::{Outcome, RuleResult};
use crate::postgres::Control;

const EXTENSION_TABLES: Definition = Definition {
    code: "extension_tables",
    worst: Outcome::Warning,
    why: "rows of an extension's tables are carried where the extension has marked them as its users' \
          (pg_extension_config_dump), as by pg_dump: of the others the target has what CREATE EXTENSION makes there, \
          and none that were added to the extension since",
    evidence: "the tables that hold rows, or that the source's login role may not read, and their extensions",
    fix: "ALTER EXTENSION … DROP TABLE … where CREATE EXTENSION does not make the table, which is then carried like \
          any other; otherwise copy the rows by hand; nothing has to be done where the extension has written them \
          itself",
    apply: Apply::Refused("where CREATE EXTENSION makes the table, the two would be in each other's way on the target"),
    ..Finding::DEFINITION
};

pub(super) const DEFINITIONS: [&Definition; 1] = [&EXTENSION_TABLES];

/// Tables of extensions that neither the copy nor the stream carries, and whether all of their rows may be read. A
/// partitioned table has none of its own; of pg_cron's tables another rule tells.
const UNCARRIED: &str = "
SELECT format('%I.%I', n.nspname, c.relname), x.extname::text,
       format('ALTER EXTENSION %I DROP TABLE %I.%I', x.extname, n.nspname, c.relname),
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AND NOT row_security_active(c.oid)
  FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid
  JOIN pg_class c ON c.oid = d.objid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
   AND c.relkind = 'r' AND c.relpersistence IN ('p', 'u') AND {ours} AND x.extname <> 'pg_cron'
   AND (c.relpersistence = 'u' OR c.oid <> ALL (coalesce(x.extconfig, '{}'::oid[])))
 ORDER BY 1";

/// What was found, and the statements that make the tables ordinary ones.
type Found = (Vec<String>, Vec<String>);

impl Database<'_> {
    pub(super) async fn extension_tables(&self) -> RuleResult {
        let rule = self.rule(&EXTENSION_TABLES);
        match holding_rows(&self.session).await {
            Ok((found, statements)) => {
                let statements = statements.into_iter().map(|sql| self.statement(sql)).collect();
                rule.mended_by(statements).unless_any(Outcome::Warning, found)
            }
            Err(error) => rule.unknown(&error),
        }
    }
}

async fn holding_rows(session: &Control) -> Result<Found, tokio_postgres::Error> {
    let (mut found, mut statements) = (Vec::new(), Vec::new());
    for row in session.query(UNCARRIED.replace("{ours}", OURS).as_str(), &[]).await? {
        let (table, extension): (String, String) = (row.get(0), row.get(1));
        if !row.get::<_, bool>(3) {
            found.push(format!("{table} of {extension} cannot be read"));
            continue;
        }
        let holds_rows = format!("SELECT EXISTS (SELECT FROM ONLY {table})");
        if session.query_one(holds_rows.as_str(), &[]).await?.get(0) {
            found.push(format!("{table} of {extension}"));
            statements.push(row.get(2));
        }
    }
    Ok((found, statements))
}
