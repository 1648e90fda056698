//! Rights on what belongs to the cluster: parameters (`GRANT SET ON PARAMETER … TO …`, since PostgreSQL 15) and tablespaces.
//!
//! A role that may set a parameter on the source and not on the target, or make tables in a tablespace, gets an error from a
//! statement that it has always used. Rights that are missing are given; only those are taken away that both servers had the
//! last time (see [`super::carried`]), because whoever runs the target may have reasons of their own.

use std::collections::{BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::{RoleAction, RoleReport, RolesError};
use crate::catalog::journal::{MadeObject, Side};
use crate::ident::quote_ident;
use crate::migration::made::{self, Journal};
use crate::postgres::Control;

/// The first version that has rights on parameters.
const PARAMETERS_SINCE: u32 = 150_000;

/// What belongs to the cluster's owner by itself, and what roles have that every server makes, is left out. The name is of the
/// server's making: words of letters, digits and underscores, with dots between them.
const ON_PARAMETERS: &str = "\
SELECT 'PARAMETER ' || p.parname, coalesce(r.rolname::text, ''), a.privilege_type, a.is_grantable
  FROM pg_catalog.pg_parameter_acl p
 CROSS JOIN LATERAL pg_catalog.aclexplode(p.paracl) a
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
 WHERE (a.grantee = 0 OR r.oid IS NOT NULL AND r.oid <> 10 AND r.rolname !~ '^pg_')
   AND p.parname ~ '^[a-z_][a-z0-9_]*(\\.[a-z_][a-z0-9_]*)*$'
 ORDER BY 1, 2, 3";

/// What the owner of a tablespace has by itself is left out.
const ON_TABLESPACES: &str = "\
SELECT 'TABLESPACE ' || pg_catalog.quote_ident(t.spcname), coalesce(r.rolname::text, ''), a.privilege_type, a.is_grantable
  FROM pg_catalog.pg_tablespace t
 CROSS JOIN LATERAL pg_catalog.aclexplode(t.spcacl) a
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
 WHERE a.grantee <> t.spcowner AND (a.grantee = 0 OR r.oid IS NOT NULL AND r.oid <> 10 AND r.rolname !~ '^pg_')
 ORDER BY 1, 2, 3";

/// One right.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Right {
    /// `PARAMETER work_mem`, `TABLESPACE fast`.
    object: String,
    /// Empty: PUBLIC.
    role: String,
    /// `SET`, `ALTER SYSTEM` or `CREATE`.
    privilege: String,
    grantable: bool,
}

impl Right {
    fn grantee(&self) -> String {
        if self.role.is_empty() { "PUBLIC".to_owned() } else { quote_ident(&self.role) }
    }

    fn grant(&self) -> String {
        let Self { object, privilege, grantable, .. } = self;
        let option = if *grantable { " WITH GRANT OPTION" } else { "" };
        format!("GRANT {privilege} ON {object} TO {}{option}", self.grantee())
    }

    fn revoke(&self) -> String {
        format!("REVOKE {} ON {} FROM {}", self.privilege, self.object, self.grantee())
    }
}

/// Gives the roles of the second server what those of the first have, takes from them what both had `before` and the
/// first's have no longer, and notes it in their reports. Returns what both have by now.
pub(super) async fn copy(
    (from, from_label): (&Control, &str),
    (to, to_label): (&Control, &str),
    journal: &dyn Journal,
    before: &BTreeSet<Right>,
    reports: &mut [RoleReport],
) -> Result<BTreeSet<Right>, RolesError> {
    let with_parameters = from.version_num().min(to.version_num()) >= PARAMETERS_SINCE;
    let wanted = read(from, from_label, with_parameters).await?;
    let found: HashSet<Right> = read(to, to_label, with_parameters).await?.into_iter().collect();
    let here: HashSet<Right> = wanted.iter().cloned().collect();
    let (goes, stays): (HashSet<Right>, _) =
        found.into_iter().partition(|right| before.contains(right) && !here.contains(right));
    let taken = |right: Right| {
        let note = format!("was taken away on the other server too; {} gives it back", right.grant());
        (right.revoke(), "from", note, right)
    };
    let given =
        |right: Right| (right.grant(), "to", format!("stays with its role; {} takes it back", right.revoke()), right);
    // Who keeps a right and may not pass it on any more is given it anew.
    let given = missing(wanted, &stays).into_iter().map(given);
    for (statement, word, note, right) in goes.into_iter().map(taken).chain(given) {
        let made = MadeObject {
            side: Side::Target,
            database: None,
            kind: made::CLUSTER_RIGHT.to_owned(),
            name: format!("{} on {} {word} {}", right.privilege, right.object, right.grantee()),
            undo: None,
            note,
        };
        journal.record(&made).await?;
        let done = to.batch_execute(&statement).await;
        let report = reports.iter_mut().find(|report| report.role == right.role);
        match (done, report) {
            (Ok(()), Some(report)) if report.action == RoleAction::Unchanged => report.action = RoleAction::Altered,
            (Ok(()), _) => {}
            // Answers of the server: no right to, no such object. The role can do without until it is used.
            (Err(error), report) if error.as_db_error().is_some() => {
                let why = error.as_db_error().map_or_else(String::new, |refusal| refusal.message().to_owned());
                let warning = format!("{statement} was refused by the {to_label}: {why}");
                match report {
                    Some(report) => report.warnings.push(warning),
                    None => tracing::warn!(warning, "a right that everybody has on the other server"),
                }
            }
            (Err(source), _) => {
                return Err(RolesError::Write {
                    role: right.role,
                    doing: "given rights on parameters and tablespaces",
                    server: to_label.to_owned(),
                    source,
                });
            }
        }
    }
    let after = read(to, to_label, with_parameters).await?.into_iter();
    Ok(after.filter(|right| here.contains(right) || before.contains(right)).collect())
}

/// What `found` does not cover. Who may pass a right on has it.
fn missing(wanted: Vec<Right>, found: &HashSet<Right>) -> Vec<Right> {
    let covers = |right: &Right| {
        found.contains(right) || !right.grantable && found.contains(&Right { grantable: true, ..right.clone() })
    };
    wanted.into_iter().filter(|right| !covers(right)).collect()
}

async fn read(control: &Control, server: &str, with_parameters: bool) -> Result<Vec<Right>, RolesError> {
    let failed = |source| RolesError::Read { server: server.to_owned(), source };
    let mut rows = control.query(ON_TABLESPACES, &[]).await.map_err(failed)?;
    if with_parameters {
        rows.extend(control.query(ON_PARAMETERS, &[]).await.map_err(failed)?);
    }
    let right = |row: &tokio_postgres::Row| Right {
        object: row.get(0),
        role: row.get(1),
        privilege: row.get(2),
        grantable: row.get(3),
    };
    Ok(rows.iter().map(right).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(role: &str, grantable: bool) -> Right {
        Right { object: "PARAMETER work_mem".to_owned(), role: role.to_owned(), privilege: "SET".to_owned(), grantable }
    }

    #[test]
    fn what_is_missing_is_given_and_nothing_twice() {
        let found = HashSet::from([right("has", false), right("more", true)]);
        let wanted = vec![right("has", false), right("more", false), right("has", true), right("new", false)];
        assert_eq!(missing(wanted, &found), [right("has", true), right("new", false)]);
    }

    #[test]
    fn statements_quote_roles_and_say_public() {
        assert_eq!(
            right("it's \"x\"", true).grant(),
            "GRANT SET ON PARAMETER work_mem TO \"it's \"\"x\"\"\" WITH GRANT OPTION"
        );
        assert_eq!(right("", false).revoke(), "REVOKE SET ON PARAMETER work_mem FROM PUBLIC");
    }
}
