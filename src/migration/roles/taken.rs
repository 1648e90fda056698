//! What was taken away from roles on the server that is led from, since they were last brought over; see [`super::carried`].
//!
//! A role is never dropped, because it may own what was copied, or serve others there.

use super::server::{Role, Roles};
use super::{Done, RoleAction, RoleReport, RolesError, Writer};
use crate::catalog::journal::{MadeObject, Side};
use crate::ident::quote_ident;
use crate::migration::made;
use crate::migration::settings::Setting;

impl Writer<'_> {
    /// Gives roles that were renamed since their new names, where this migration has made them. What else stands under the
    /// old name is told, and the comparison of owners and grants refuses the cutover where it matters.
    pub(super) async fn follow_renames(&mut self, wanted: &Roles, from: &str) -> Result<Vec<RoleReport>, RolesError> {
        let mut left = self.before.renamed(wanted, from);
        let mut reports = Vec::new();
        // One may have taken the name that another has given up.
        while let Some(at) =
            left.iter().position(|(old, new)| self.found.get(old).is_none() || self.found.get(new).is_none())
        {
            let (old, new) = left.swap_remove(at);
            if let Some(there) = self.found.get(&old) {
                if !self.before.roles.get(&old).is_some_and(|had| had.made) || there.bootstrap || old == self.own {
                    reports.push(told(&new, still_there(&old, &new)));
                    continue;
                }
                let done = self.rename(&old, &new).await?;
                let followed = done.changed;
                let mut report = told(&new, None);
                done.note(&mut report);
                reports.push(report);
                if !followed {
                    continue;
                }
            }
            if let Some(had) = self.before.roles.remove(&old) {
                self.before.roles.insert(new, had);
            }
        }
        reports.extend(left.into_iter().map(|(old, new)| told(&new, still_there(&old, &new))));
        Ok(reports)
    }

    async fn rename(&mut self, old: &str, new: &str) -> Result<Done, RolesError> {
        let note = format!("was {} before it was renamed on the other server", quote_ident(old));
        self.record(made::ROLE_NAME, new, &note).await?;
        let Some(role) = self.found.get(old).cloned() else { return Ok(Done::default()) };
        let statement = format!("ALTER ROLE {} RENAME TO {}", quote_ident(old), quote_ident(new));
        let done = self.where_allowed(&role, "renamed", &statement).await?;
        if done.changed {
            for role in self.found.roles.iter_mut().filter(|role| role.name == old) {
                new.clone_into(&mut role.name);
                // An MD5 verifier holds the name and is gone.
                role.verifier.take_if(|verifier| verifier.expose().starts_with("md5"));
            }
            for membership in &mut self.found.memberships {
                for name in [&mut membership.role, &mut membership.member] {
                    if name == old {
                        new.clone_into(name);
                    }
                }
            }
        }
        Ok(done)
    }

    /// `PASSWORD NULL`
    pub(super) async fn take_password(&self, role: &Role, found: Option<&Role>) -> Result<Done, RolesError> {
        let had_one = self.before.roles.get(&role.name).is_some_and(|had| had.password);
        let may_be_there = found.is_some_and(|found| found.verifier.is_some() || !self.found.verifiers_readable);
        if !had_one || !may_be_there {
            return Ok(Done::default());
        }
        if role.name == self.own {
            let warning = "it has no password any more, and was left the one that it has there, because pgcutover logs in with it";
            return Ok(Done { changed: false, warning: Some(warning.to_owned()) });
        }
        self.record(made::ROLE_PASSWORD, &role.name, "its password was taken away on the other server too").await?;
        let statement = format!("ALTER ROLE {} PASSWORD NULL", quote_ident(&role.name));
        self.where_allowed(role, "relieved of its password", &statement).await
    }

    /// Settings that both had; `before` are those that it has here.
    pub(super) async fn take_settings(&self, role: &Role, before: &[Setting]) -> Result<Done, RolesError> {
        let mut done = Done::default();
        let Some(had) = self.before.roles.get(&role.name) else { return Ok(done) };
        let gone = |name: &String| had.settings.contains(name) && !role.settings.iter().any(|now| now.name == *name);
        for name in before.iter().map(|setting| &setting.name).filter(|name| gone(name)) {
            let object = format!("{}.{name}", role.name);
            self.record(made::ROLE_SETTING, &object, "was reset on the other server too").await?;
            let statement = format!("ALTER ROLE {} RESET {}", quote_ident(&role.name), quote_ident(name));
            done = done.and(self.where_allowed(role, "relieved of a setting", &statement).await?);
        }
        Ok(done)
    }

    /// Memberships that both had.
    pub(super) async fn take_memberships(&self, wanted: &Roles, reports: &mut [RoleReport]) -> Result<(), RolesError> {
        for (member, had) in &self.before.roles {
            if *member == self.own || wanted.get(member).is_none() {
                continue;
            }
            for role in had.member_of.keys() {
                let is_there = self.found.membership(role, member).is_some();
                if !is_there || wanted.membership(role, member).is_some() {
                    continue;
                }
                let done = self.revoke(role, member, "").await?;
                if let Some(report) = reports.iter_mut().find(|report| report.role == *member) {
                    done.note(report);
                }
            }
        }
        Ok(())
    }

    /// Takes a membership away, or with `what` only an option of it.
    pub(super) async fn revoke(&self, role: &str, member: &str, what: &str) -> Result<Done, RolesError> {
        let (group, name) = (quote_ident(role), quote_ident(member));
        let made = MadeObject {
            side: Side::Target,
            database: None,
            kind: made::ROLE_MEMBERSHIP.to_owned(),
            name: format!("{what}{role} from {member}"),
            undo: None,
            note: format!("was taken away on the other server too; GRANT {group} TO {name} gives it back"),
        };
        self.journal.record(&made).await?;
        // From PostgreSQL 16 on every grantor's is one of its own.
        let mut by = vec![String::new()];
        if self.control.version_num() >= 160_000 {
            let grantors = "SELECT pg_get_userbyid(m.grantor)::text FROM pg_auth_members m \
                            JOIN pg_roles r ON r.oid = m.roleid JOIN pg_roles u ON u.oid = m.member \
                            WHERE r.rolname = $1::text AND u.rolname = $2::text";
            let rows = self.control.query(grantors, &[&role, &member]).await;
            let rows = rows.map_err(|source| self.unread(source))?;
            by = rows.iter().map(|row| format!(" GRANTED BY {}", quote_ident(row.get(0)))).collect();
        }
        let mut done = Done::default();
        for by in by {
            match self.control.batch_execute(&format!("REVOKE {what}{group} FROM {name}{by}")).await {
                Ok(()) => done.changed = true,
                Err(error) => match error.as_db_error() {
                    // No right to, or others have it from this one.
                    Some(refusal) => {
                        let warning =
                            format!("REVOKE {what}{group} FROM {name}{by} was refused: {}", refusal.message());
                        done.warning = Some(warning);
                    }
                    None => return Err(self.unwritten(member, "relieved of a membership", error)),
                },
            }
        }
        Ok(done)
    }

    /// Roles that were brought over and are not there any more.
    pub(super) fn gone(&self, wanted: &Roles, from: &str) -> Vec<RoleReport> {
        let renamed = self.before.renamed(wanted, from);
        let gone = |name: &&String| {
            let is_renamed = renamed.iter().any(|(old, _)| old == *name);
            wanted.get(name).is_none() && self.found.get(name).is_some() && !is_renamed
        };
        let told_of = self.before.roles.keys().filter(gone).map(|name| {
            let warning = format!(
                "it was dropped since it was brought over, and stays as it is on the other server, where it may \
                 still log in: DROP ROLE {} there",
                quote_ident(name)
            );
            told(name, Some(warning))
        });
        told_of.collect()
    }
}

fn told(role: &str, warning: Option<String>) -> RoleReport {
    RoleReport { role: role.to_owned(), action: RoleAction::Unchanged, warnings: warning.into_iter().collect() }
}

fn still_there(old: &str, new: &str) -> Option<String> {
    let (old, new) = (quote_ident(old), quote_ident(new));
    Some(format!(
        "it was {old} when it was brought over, and the other server's {old} was not renamed, because it was there before or \
         {new} is: what it owns and may do there is not this role's; ALTER ROLE {old} RENAME TO {new}, or REASSIGN OWNED BY \
         {old} TO {new} and grant {new} the same"
    ))
}
