//! What a server has of roles, and how it is said in SQL.

use tokio_postgres::Row;

use crate::config::Secret;
use crate::ident::quote_literal;
use crate::migration::settings::Setting;
use crate::postgres::Control;

/// What a server has.
pub(super) struct Roles {
    pub(super) roles: Vec<Role>,
    pub(super) memberships: Vec<Membership>,
    /// What `ALTER ROLE ALL` has set, in every database.
    pub(super) of_everyone: Vec<Setting>,
    pub(super) verifiers_readable: bool,
}

/// One role, as `pg_authid` has it.
#[derive(Clone)]
pub(super) struct Role {
    pub(super) name: String,
    /// `pg_authid.oid`, which a role keeps when it is renamed.
    pub(super) oid: u32,
    pub(super) attributes: Attributes,
    /// `VALID UNTIL`, in ISO form.
    pub(super) valid_until: Option<String>,
    pub(super) verifier: Option<Secret>,
    pub(super) comment: Option<String>,
    pub(super) settings: Vec<Setting>,
    /// Made by initdb, the owner of everything that is built in.
    pub(super) bootstrap: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Attributes {
    pub(super) superuser: bool,
    pub(super) inherit: bool,
    pub(super) create_role: bool,
    pub(super) create_db: bool,
    pub(super) login: bool,
    pub(super) replication: bool,
    pub(super) bypass_rls: bool,
    pub(super) connection_limit: i32,
}

/// A membership with its options; those that came with PostgreSQL 16 are none below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Membership {
    pub(super) role: String,
    pub(super) member: String,
    pub(super) admin: bool,
    pub(super) inherit: Option<bool>,
    pub(super) set: Option<bool>,
}

impl Roles {
    pub(super) async fn read(control: &Control) -> Result<Self, tokio_postgres::Error> {
        let readable = control.query_one("SELECT has_table_privilege('pg_authid', 'SELECT')", &[]).await?.get(0);
        let (table, verifier) = if readable { ("pg_authid", "r.rolpassword") } else { ("pg_roles", "NULL::text") };
        let query = format!(
            "SELECT r.rolname::text, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, \
             r.rolreplication, r.rolbypassrls, r.rolconnlimit, r.rolvaliduntil::text, {verifier}, \
             shobj_description(r.oid, 'pg_authid'), r.oid = 10, coalesce(s.setconfig, '{{}}'), \
             r.oid FROM {table} r LEFT JOIN pg_db_role_setting s ON s.setrole = r.oid AND s.setdatabase = 0 \
             WHERE r.rolname !~ '^pg_' ORDER BY r.oid"
        );
        let roles = control.query(query.as_str(), &[]).await?.iter().map(Role::from_row).collect();
        let options = if control.version_num() >= 160_000 {
            "bool_or(m.inherit_option), bool_or(m.set_option)"
        } else {
            "NULL::bool, NULL::bool"
        };
        // From PostgreSQL 16 on one membership may have been granted by several; together they give what any gives.
        let query = format!(
            "SELECT r.rolname::text, u.rolname::text, bool_or(m.admin_option), {options} FROM pg_auth_members m \
             JOIN pg_roles r ON r.oid = m.roleid JOIN pg_roles u ON u.oid = m.member \
             WHERE u.rolname !~ '^pg_' GROUP BY 1, 2 ORDER BY 1, 2"
        );
        let memberships = control
            .query(query.as_str(), &[])
            .await?
            .iter()
            .map(|row| Membership {
                role: row.get(0),
                member: row.get(1),
                admin: row.get(2),
                inherit: row.get(3),
                set: row.get(4),
            })
            .collect();
        let everyone = "SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setrole = 0 AND setdatabase = 0";
        let of_everyone = control.query(everyone, &[]).await?;
        let of_everyone = of_everyone.iter().filter_map(|row| Setting::parse(row.get(0))).collect();
        Ok(Self { roles, memberships, of_everyone, verifiers_readable: readable })
    }

    pub(super) fn get(&self, name: &str) -> Option<&Role> {
        self.roles.iter().find(|role| role.name == name)
    }

    pub(super) fn membership(&self, role: &str, member: &str) -> Option<&Membership> {
        self.memberships.iter().find(|found| (found.role.as_str(), found.member.as_str()) == (role, member))
    }
}

impl Role {
    fn from_row(row: &Row) -> Self {
        let settings: Vec<String> = row.get(13);
        Self {
            name: row.get(0),
            oid: row.get(14),
            attributes: Attributes {
                superuser: row.get(1),
                inherit: row.get(2),
                create_role: row.get(3),
                create_db: row.get(4),
                login: row.get(5),
                replication: row.get(6),
                bypass_rls: row.get(7),
                connection_limit: row.get(8),
            },
            // Never ending is the same, said or unsaid.
            valid_until: row.get::<_, Option<String>>(9).filter(|until| until != "infinity"),
            verifier: row.get::<_, Option<String>>(10).map(Secret::new),
            comment: row.get(11),
            settings: settings.iter().filter_map(|text| Setting::parse(text)).collect(),
            bootstrap: row.get(12),
        }
    }
}

impl Attributes {
    /// As options of CREATE ROLE and ALTER ROLE; those that only a superuser may give, and only where they differ from
    /// `found`, since to name them at all needs the right.
    pub(super) fn options(&self, found: Option<&Self>) -> String {
        let word = |on: bool, name: &str| format!(" {}{name}", if on { "" } else { "NO" });
        let mut options = String::new();
        for (on, before, name) in [
            (self.superuser, found.is_some_and(|found| found.superuser), "SUPERUSER"),
            (self.replication, found.is_some_and(|found| found.replication), "REPLICATION"),
            (self.bypass_rls, found.is_some_and(|found| found.bypass_rls), "BYPASSRLS"),
        ] {
            if on != before {
                options.push_str(&word(on, name));
            }
        }
        for (on, name) in [
            (self.inherit, "INHERIT"),
            (self.create_role, "CREATEROLE"),
            (self.create_db, "CREATEDB"),
            (self.login, "LOGIN"),
        ] {
            options.push_str(&word(on, name));
        }
        options.push_str(&format!(" CONNECTION LIMIT {}", self.connection_limit));
        options
    }

    /// Without what only a superuser may give.
    pub(super) fn modest(&self, found: Option<&Self>) -> Self {
        let was = |pick: fn(&Self) -> bool| found.is_some_and(pick);
        Self {
            superuser: was(|found| found.superuser),
            replication: was(|found| found.replication),
            bypass_rls: was(|found| found.bypass_rls),
            ..self.clone()
        }
    }
}

impl Attributes {
    /// These, but for those in which both servers differ as `left` has them, this one and the other: they stay as `found`.
    pub(super) fn but_for(&self, found: &Self, left: &(Self, Self)) -> Self {
        fn pick<T: Copy + PartialEq>(of: fn(&Attributes) -> T, all: [&Attributes; 4]) -> T {
            let [wanted, found, there, here] = all.map(of);
            if there != here && (found, wanted) == (there, here) { found } else { wanted }
        }
        let all = [self, found, &left.0, &left.1];
        Self {
            superuser: pick(|one| one.superuser, all),
            inherit: pick(|one| one.inherit, all),
            create_role: pick(|one| one.create_role, all),
            create_db: pick(|one| one.create_db, all),
            login: pick(|one| one.login, all),
            replication: pick(|one| one.replication, all),
            bypass_rls: pick(|one| one.bypass_rls, all),
            connection_limit: pick(|one| one.connection_limit, all),
        }
    }
}

impl Membership {
    pub(super) fn options(&self, target_version: u32) -> String {
        if target_version < 160_000 {
            return if self.admin { " WITH ADMIN OPTION".to_owned() } else { String::new() };
        }
        let mut options = vec![format!("ADMIN {}", self.admin)];
        // Below 16 inheriting is an attribute of the member, which has been carried over and is the default here.
        options.extend(self.inherit.map(|inherit| format!("INHERIT {inherit}")));
        options.extend(self.set.map(|set| format!("SET {set}")));
        format!(" WITH {}", options.join(", "))
    }
}

pub(super) fn valid_until(role: &Role, found: Option<&Role>) -> String {
    match (&role.valid_until, found.and_then(|found| found.valid_until.as_ref())) {
        (Some(until), _) => format!(" VALID UNTIL {}", quote_literal(until)),
        (None, Some(_)) => " VALID UNTIL 'infinity'".to_owned(),
        (None, None) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Attributes {
        Attributes {
            superuser: false,
            inherit: true,
            create_role: false,
            create_db: false,
            login: true,
            replication: false,
            bypass_rls: false,
            connection_limit: -1,
        }
    }

    #[test]
    fn what_needs_a_superuser_is_named_only_where_it_changes() {
        let common = " INHERIT NOCREATEROLE NOCREATEDB LOGIN CONNECTION LIMIT -1";
        assert_eq!(plain().options(None), common);
        let repl = Attributes { replication: true, ..plain() };
        assert_eq!(repl.options(None), format!(" REPLICATION{common}"));
        assert_eq!(repl.options(Some(&repl)), common);
        assert_eq!(plain().options(Some(&repl)), format!(" NOREPLICATION{common}"));
        assert_eq!(repl.modest(None), plain());
        assert_eq!(plain().modest(Some(&repl)), repl);
    }

    #[test]
    fn memberships_say_what_the_target_understands() {
        let membership =
            |inherit, set| Membership { role: "a".to_owned(), member: "b".to_owned(), admin: true, inherit, set };
        assert_eq!(membership(None, None).options(150_000), " WITH ADMIN OPTION");
        assert_eq!(membership(None, None).options(160_000), " WITH ADMIN true");
        let full = membership(Some(false), Some(true));
        assert_eq!(full.options(170_000), " WITH ADMIN true, INHERIT false, SET true");
    }
}
