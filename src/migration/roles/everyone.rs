//! What `ALTER ROLE ALL SET` has set for everyone, in every database.
//!
//! Other databases of the target live by it too: a value that it has of its own stays, and is told.

use super::server::Roles;
use super::{Done, RoleAction, RoleReport, RolesError, Writer};
use crate::ident::quote_ident;
use crate::migration::made;

/// What stands for the name of a role.
const EVERYONE: &str = "ALL";

impl Writer<'_> {
    /// Brings it over; none: there is nothing to tell.
    pub(super) async fn settings_of_everyone(&self, wanted: &Roles) -> Result<Option<RoleReport>, RolesError> {
        let mut report = RoleReport { role: EVERYONE.to_owned(), action: RoleAction::Unchanged, warnings: Vec::new() };
        let to = self.to;
        let (found, carried) = (&self.found.of_everyone, &self.before.of_everyone);
        for setting in wanted.of_everyone.iter().filter(|setting| !found.contains(setting)) {
            let (name, clause) = (&setting.name, setting.clause());
            if !setting.is_custom() && !self.known.contains(&name.to_lowercase()) {
                report.warnings.push(format!("the {to} does not know the setting {name}; left out"));
            } else if found.iter().any(|there| there.name == *name) && !carried.contains(name) {
                report.warnings.push(format!(
                    "the {to} has another value of {name}, which stays: ALTER ROLE ALL {clause}, or ALTER DATABASE … \
                     {clause} for what is migrated"
                ));
            } else {
                self.alter_everyone(name, &clause).await?.note(&mut report);
            }
        }
        for setting in found.iter().filter(|there| carried.contains(&there.name)) {
            let name = &setting.name;
            if !wanted.of_everyone.iter().any(|now| now.name == *name) {
                self.alter_everyone(name, &format!("RESET {}", quote_ident(name))).await?.note(&mut report);
            }
        }
        let told = report.action != RoleAction::Unchanged || !report.warnings.is_empty();
        Ok(told.then_some(report))
    }

    async fn alter_everyone(&self, name: &str, clause: &str) -> Result<Done, RolesError> {
        let note = "was brought in line with the other server, for every database of this one";
        self.record(made::ROLE_SETTING, &format!("{EVERYONE}.{name}"), note).await?;
        let statement = format!("ALTER ROLE ALL {clause}");
        match self.control.batch_execute(&statement).await {
            Ok(()) => Ok(Done { changed: true, warning: None }),
            Err(source) => {
                let error = self.unwritten(EVERYONE, "given its settings", source);
                let warning = match (error.is_right(), error.is_value()) {
                    (true, _) => format!("{statement} takes a superuser of the {}", self.to),
                    (false, true) => format!("the {} does not take the value of {name}; left out", self.to),
                    (false, false) => return Err(error),
                };
                Ok(Done { changed: false, warning: Some(warning) })
            }
        }
    }
}
