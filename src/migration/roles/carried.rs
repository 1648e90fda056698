//! What roles had on both servers when they were last brought over: by it is told what one server has lost since from what
//! only the other has ever had.
//!
//! ```text
//! last time   source now   target now
//!     x           –            x        was taken away on the source: goes on the target
//!     –           –            x        the target's own: stays
//! ```
//!
//! Kept with the migration, as names alone: values of settings may be secrets.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::rights::Right;
use super::server::{Attributes, Role, Roles};
use crate::migration::settings::Setting;

/// What both servers had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Carried {
    /// By name.
    pub(super) roles: BTreeMap<String, CarriedRole>,
    /// Names of the settings of everyone.
    pub(super) of_everyone: BTreeSet<String>,
    /// Rights on parameters and tablespaces.
    pub(super) rights: BTreeSet<Right>,
}

/// What one role had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct CarriedRole {
    /// `pg_authid.oid` by the server's label. A role that is renamed keeps it.
    pub(super) oids: BTreeMap<String, u32>,
    /// This migration has made it.
    pub(super) made: bool,
    pub(super) password: bool,
    pub(super) comment: bool,
    /// Names.
    pub(super) settings: BTreeSet<String>,
    /// Roles that it was a member of, and whether with the ADMIN option.
    pub(super) member_of: BTreeMap<String, bool>,
    /// By the label of a server that was led from: its attributes, and what came of them on the other. What that server's
    /// rights did not reach differs, and is not taken away here on the way back.
    pub(super) attributes: BTreeMap<String, (Attributes, Attributes)>,
}

impl Carried {
    /// Whether `member` had the ADMIN option on `role`.
    pub(super) fn admin(&self, role: &str, member: &str) -> bool {
        self.roles.get(member).and_then(|had| had.member_of.get(role)).copied().unwrap_or(false)
    }

    /// Takes out of `wanted` the attributes of roles that differ from those `found` on the server `to` only because they could
    /// not be brought over from there.
    pub(super) fn leave(&self, wanted: &mut Roles, found: &Roles, to: &str) {
        for role in &mut wanted.roles {
            let left = self.roles.get(&role.name).and_then(|had| had.attributes.get(to));
            if let (Some(left), Some(found)) = (left, found.get(&role.name)) {
                role.attributes = role.attributes.but_for(&found.attributes, left);
            }
        }
    }

    /// Old and new names of roles that were renamed on the server `from` since.
    pub(super) fn renamed(&self, wanted: &Roles, from: &str) -> Vec<(String, String)> {
        let renamed = |(old, had): (&String, &CarriedRole)| {
            let oid = had.oids.get(from)?;
            let now = wanted.roles.iter().find(|role| role.oid == *oid && role.name != *old && !role.bootstrap)?;
            Some((old.clone(), now.name.clone()))
        };
        self.roles.iter().filter_map(renamed).collect()
    }

    /// What is to be known the next time, where `wanted` is what the server `from` has and `after` what `to` has by now.
    /// What could not be taken away stays in it, so that it is tried and told again.
    pub(super) fn next(
        &self,
        wanted: &Roles,
        from: &str,
        after: &Roles,
        to: &str,
        made: &HashSet<String>,
        rights: BTreeSet<Right>,
    ) -> Self {
        let mut next = Self { rights, ..Self::default() };
        let names = |settings: &[Setting]| -> BTreeSet<String> {
            settings.iter().map(|setting| setting.name.clone()).collect()
        };
        let both = |here: BTreeSet<String>, before: &BTreeSet<String>, there: BTreeSet<String>| -> BTreeSet<String> {
            there.into_iter().filter(|name| here.contains(name) || before.contains(name)).collect()
        };
        // Another value there is the other server's own.
        let mut same = wanted.of_everyone.clone();
        same.retain(|setting| after.of_everyone.contains(setting));
        next.of_everyone = both(names(&same), &self.of_everyone, names(&after.of_everyone));
        for there in &after.roles {
            let had = self.roles.get(&there.name);
            let Some(here) = wanted.get(&there.name) else {
                next.roles.extend(had.map(|had| (there.name.clone(), had.clone())));
                continue;
            };
            let mut had = had.cloned().unwrap_or_default();
            had.attributes.insert(from.to_owned(), (here.attributes.clone(), there.attributes.clone()));
            let of_member = after.memberships.iter().filter(|membership| membership.member == there.name);
            let member_of = of_member.filter_map(|there| {
                let here = wanted.membership(&there.role, &there.member).map(|here| here.admin);
                let before = had.member_of.get(&there.role).copied();
                let admin = there.admin && (here.unwrap_or(false) || before.unwrap_or(false));
                here.or(before).map(|_| (there.role.clone(), admin))
            });
            let role = CarriedRole {
                oids: BTreeMap::from([(from.to_owned(), here.oid), (to.to_owned(), there.oid)]),
                made: had.made || made.contains(&there.name),
                password: password(wanted, here, after, there, had.password),
                comment: there.comment.is_some() && (here.comment.is_some() || had.comment),
                settings: both(names(&here.settings), &had.settings, names(&there.settings)),
                member_of: member_of.collect(),
                attributes: had.attributes,
            };
            next.roles.insert(there.name.clone(), role);
        }
        next
    }
}

/// Whether both have a password, as far as that can be read.
fn password(wanted: &Roles, here: &Role, after: &Roles, there: &Role, before: bool) -> bool {
    match (wanted.verifiers_readable, after.verifiers_readable) {
        (false, _) => before,
        (true, true) => there.verifier.is_some() && (here.verifier.is_some() || before),
        (true, false) => here.verifier.is_some(),
    }
}
