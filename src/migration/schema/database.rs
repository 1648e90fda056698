//! The database itself: made like the source's, with what belongs to it and stands in no dump of its contents.

use std::collections::{BTreeSet, HashSet};

use serde::{Deserialize, Serialize};
use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use super::{ConnectionLimit, Existing, SchemaError, Synced};
use crate::catalog::journal::{MadeObject, Side};
use crate::ident::{quote_ident, quote_literal};
use crate::migration::made::{self, Journal};
use crate::migration::settings::Setting;
use crate::postgres::{ConnectError, Connector, Control};
use crate::sqlstate;

/// What `pg_database` says.
#[derive(Clone, Debug)]
struct Database {
    owner: String,
    encoding: String,
    collate: String,
    ctype: String,
    /// `c` libc, `i` ICU, `b` built in.
    provider: String,
    /// Locale of the provider where it is not libc.
    locale: Option<String>,
    icu_rules: Option<String>,
    tablespace: String,
    connection_limit: i32,
    is_template: bool,
    comment: Option<String>,
    /// Those of the owner among them, and those by default.
    grants: BTreeSet<Grant>,
    /// Role (none: everyone) and setting.
    settings: Vec<(Option<String>, Setting)>,
}

/// Grantee (none: PUBLIC), privilege, with grant option.
type Grant = (Option<String>, String, bool);

/// Settings and grants that a database had on both servers when it was last brought in line. What one server has lost
/// since is told by it from what only the other has ever had, which stays: see [`crate::migration::roles::Carried`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CarriedDatabase {
    /// Role (none: everyone) and name: values may be secrets.
    settings: BTreeSet<(Option<String>, String)>,
    /// Grantee (none: PUBLIC) and privilege.
    grants: BTreeSet<(Option<String>, String)>,
}

impl CarriedDatabase {
    fn had_setting(&self, role: Option<&str>, name: &str) -> bool {
        self.settings.contains(&(role.map(str::to_owned), name.to_owned()))
    }

    /// `wanted`, with the grants beside it that only the other server has ever made. What owners and everyone have
    /// comes with a database that is made, and is as on the server that is led from.
    fn with_own_grants(&self, wanted: &Database, found: &Database) -> Database {
        let is_own = |(grantee, privilege, _): &&Grant| {
            let has_name = grantee.as_ref().is_some_and(|name| *name != wanted.owner && *name != found.owner);
            let is_wanted = wanted.grants.iter().any(|(who, what, _)| who == grantee && what == privilege);
            has_name && !is_wanted && !self.grants.contains(&(grantee.clone(), privilege.clone()))
        };
        let mut with_own = wanted.clone();
        with_own.grants.extend(found.grants.iter().filter(is_own).cloned());
        with_own
    }

    /// What is to be known the next time, where `wanted` is what the server has that was led from, and `after` what the
    /// other has by now. What could not be taken away stays in it, so that it is tried and told again.
    fn next(&self, wanted: &Database, after: &Database) -> Self {
        let settings = |of: &Database| -> BTreeSet<(Option<String>, String)> {
            of.settings.iter().map(|(role, setting)| (role.clone(), setting.name.clone())).collect()
        };
        let grants = |of: &Database| -> BTreeSet<(Option<String>, String)> {
            of.grants.iter().map(|(grantee, privilege, _)| (grantee.clone(), privilege.clone())).collect()
        };
        let (mut next, here) = (Self { settings: settings(after), grants: grants(after) }, settings(wanted));
        next.settings.retain(|setting| here.contains(setting) || self.settings.contains(setting));
        let here = grants(wanted);
        next.grants.retain(|grant| here.contains(grant) || self.grants.contains(grant));
        next
    }
}

/// See [`super::create_database`].
pub(super) async fn create(
    source: &Connector,
    target: &Connector,
    name: &str,
    existing: Existing,
    journal: &dyn Journal,
) -> Result<CarriedDatabase, SchemaError> {
    let from = source.control(name, "schema").await?;
    let wanted = read(&from, name).await.map_err(|source| read_error(name, source))?;
    let wanted = wanted.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let control = maintenance(target, name).await?;
    let mut found = read(&control, name).await.map_err(|source| read_error(name, source))?;
    if existing == Existing::Drop
        && let Some(there) = found.take()
    {
        drop_database(&control, name, &there, journal).await?;
    }
    match found {
        Some(found) => check_same(name, &found, &wanted)?,
        None => {
            let made = MadeObject {
                side: Side::Target,
                database: None,
                kind: made::DATABASE.to_owned(),
                name: quote_ident(name),
                undo: None,
                note: "holds the copied data".to_owned(),
            };
            journal.record(&made).await?;
            let sql = create_sql(&control, name, &wanted).await.map_err(|source| read_error(name, source))?;
            match run(&control, name, "CREATE DATABASE", &sql).await {
                // The statement of an engine that was killed runs to its end: it was faster, and the database is ours.
                Err(SchemaError::Database { source, .. }) if is_taken(&source) => {
                    let found = read(&control, name).await.map_err(|source| read_error(name, source))?;
                    check_same(name, &found.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?, &wanted)?;
                }
                outcome => outcome?,
            }
        }
    }
    let found = read(&control, name).await.map_err(|source| read_error(name, source))?;
    let found = found.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let carried = CarriedDatabase::default();
    let with_own = carried.with_own_grants(&wanted, &found);
    let mut statements = properties(name, &with_own, &found, ConnectionLimit::IsCarried);
    let known = parameters(&control).await.map_err(|source| read_error(name, source))?;
    for (role, setting) in &wanted.settings {
        if !setting.is_custom() && !known.contains(&setting.name.to_lowercase()) {
            tracing::warn!(database = name, setting = setting.name, "the target does not know this setting; left out");
            continue;
        }
        statements.push(format!("{} {}", whose(name, role.as_deref()), setting.clause()));
    }
    for statement in statements {
        match run(&control, name, &doing(&statement), &statement).await {
            // Before each cutover it is tried, and told, once more.
            Err(SchemaError::Database { doing, source, .. }) if is_right(&source) => {
                tracing::warn!(database = name, doing, "more than the target's login role may do; left out");
            }
            Err(SchemaError::Database { doing, source, .. }) if is_value(&source) => {
                tracing::warn!(database = name, doing, "the target does not take the value of a setting; left out");
            }
            done => done?,
        }
    }
    let after = read(&control, name).await.map_err(|source| read_error(name, source))?;
    let after = after.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    Ok(carried.next(&wanted, &after))
}

/// See [`super::sync_database`].
pub(super) async fn sync(
    source: &Connector,
    target: &Connector,
    name: &str,
    except: &[&str],
    limit: ConnectionLimit,
    carried: &mut CarriedDatabase,
) -> Result<Synced, SchemaError> {
    let from = source.control(name, "schema").await?;
    let wanted = read(&from, name).await.map_err(|source| read_error(name, source))?;
    let wanted = wanted.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let control = maintenance(target, name).await?;
    let found = read(&control, name).await.map_err(|source| read_error(name, source))?;
    let found = found.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let known = parameters(&control).await.map_err(|source| read_error(name, source))?;
    let counts = |setting: &Setting| !except.contains(&setting.name.to_lowercase().as_str());
    let with_own = carried.with_own_grants(&wanted, &found);
    let mut statements = properties(name, &with_own, &found, limit);
    for (role, setting) in wanted.settings.iter().filter(|(_, setting)| counts(setting)) {
        let same = found.settings.iter().any(|there| there == &(role.clone(), setting.clone()));
        if !same && (setting.is_custom() || known.contains(&setting.name.to_lowercase())) {
            statements.push(format!("{} {}", whose(name, role.as_deref()), setting.clause()));
        }
    }
    for (role, setting) in found.settings.iter().filter(|(_, setting)| counts(setting)) {
        let stays = |(whose, wanted): &(Option<String>, Setting)| whose == role && wanted.name == setting.name;
        if carried.had_setting(role.as_deref(), &setting.name) && !wanted.settings.iter().any(stays) {
            statements.push(format!("{} RESET {}", whose(name, role.as_deref()), quote_ident(&setting.name)));
        }
    }
    let mut synced = Synced::default();
    if limit == ConnectionLimit::IsTheFences && wanted.connection_limit != found.connection_limit {
        synced.left.push(format!(
            "its connection limit is {} where it is left, and will be again what it was before where it is led to",
            wanted.connection_limit
        ));
    }
    for statement in &statements {
        match run(&control, name, &doing(statement), statement).await {
            Ok(()) => synced.changed += 1,
            Err(SchemaError::Database { doing, source, .. }) if is_right(&source) => {
                synced.left.push(format!("{doing} is more than the login role of the server that is led to may do"));
            }
            Err(SchemaError::Database { doing, source, .. }) if is_value(&source) => {
                let why = source.as_db_error().map_or("", DbError::message);
                synced.left.push(format!("{doing} was refused by the server that is led to: {why}"));
            }
            Err(error) => return Err(error),
        }
    }
    let after = read(&control, name).await.map_err(|source| read_error(name, source))?;
    let after = after.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    *carried = carried.next(&wanted, &after);
    Ok(synced)
}

/// What a setting is altered of.
fn whose(database: &str, role: Option<&str>) -> String {
    let database = quote_ident(database);
    match role {
        Some(role) => format!("ALTER ROLE {} IN DATABASE {database}", quote_ident(role)),
        None => format!("ALTER DATABASE {database}"),
    }
}

fn read_error(database: &str, source: Error) -> SchemaError {
    SchemaError::Read { database: database.to_owned(), source }
}

/// A session in a database other than `name`.
async fn maintenance(target: &Connector, name: &str) -> Result<Control, ConnectError> {
    let first = if name == "postgres" { "template1" } else { "postgres" };
    match target.control(first, "schema").await {
        Err(error) if error.sqlstate() == Some(sqlstate::INVALID_CATALOG_NAME) => {
            target.control("template1", "schema").await
        }
        other => other,
    }
}

/// `pg_database.datconnlimit` of a database whose DROP was interrupted: it can be dropped again, and nothing else.
const IS_INVALID: i32 = -2;

async fn drop_database(
    control: &Control,
    name: &str,
    there: &Database,
    journal: &dyn Journal,
) -> Result<(), SchemaError> {
    let made = MadeObject {
        side: Side::Target,
        database: None,
        kind: made::DATABASE_DROPPED.to_owned(),
        name: quote_ident(name),
        undo: None,
        note: "dropped by --overwrite-target; its contents cannot be brought back".to_owned(),
    };
    journal.record(&made).await?;
    let database = quote_ident(name);
    // A template cannot be dropped, and who is connected keeps a database alive.
    if there.is_template {
        run(control, name, "ALTER DATABASE", &format!("ALTER DATABASE {database} IS_TEMPLATE false")).await?;
    }
    // The statement of an engine that was killed may have been faster.
    let drop = format!("DROP DATABASE IF EXISTS {database}");
    if control.version_num() >= 130_000 {
        return run(control, name, "DROP DATABASE", &format!("{drop} WITH (FORCE)")).await;
    }
    if there.connection_limit != IS_INVALID {
        run(control, name, "ALTER DATABASE", &format!("ALTER DATABASE {database} CONNECTION LIMIT 0")).await?;
    }
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()";
    control.query(end, &[&name]).await.map_err(|source| SchemaError::Database {
        database: name.to_owned(),
        doing: "ending its sessions".to_owned(),
        source,
    })?;
    // DROP DATABASE itself waits some seconds for sessions that are on their way out.
    run(control, name, "DROP DATABASE", &drop).await
}

/// Whether it was the rights that did not reach.
fn is_right(error: &Error) -> bool {
    error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)
}

/// Whether it was the value of a setting: see [`crate::migration::roles`].
fn is_value(error: &Error) -> bool {
    error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE)
}

/// Whether a database has the name already. Two statements at the same time meet in the unique index of the catalogue.
fn is_taken(error: &Error) -> bool {
    error.code().is_some_and(|code| [SqlState::DUPLICATE_DATABASE, SqlState::UNIQUE_VIOLATION].contains(code))
}

fn check_same(name: &str, found: &Database, wanted: &Database) -> Result<(), SchemaError> {
    let describe = |one: &Database| {
        let provider = match (one.provider.as_str(), &one.locale) {
            ("i", Some(locale)) => format!(", ICU locale {locale}"),
            ("b", Some(locale)) => format!(", built-in locale {locale}"),
            _ => String::new(),
        };
        format!("encoding {}, collation {}, ctype {}{provider}", one.encoding, one.collate, one.ctype)
    };
    let mut spelled = found.clone();
    if let (Some(there), Some(here)) = (&found.locale, &wanted.locale)
        && (found.provider.as_str(), wanted.provider.as_str()) == ("i", "i")
        && is_same_icu_locale(there, here)
    {
        spelled.locale = Some(here.clone());
    }
    if describe(&spelled) == describe(wanted) {
        return Ok(());
    }
    Err(SchemaError::Differs { database: name.to_owned(), found: describe(found), wanted: describe(wanted) })
}

/// Whether two names of ICU mean the same locale. PostgreSQL 15 keeps what CREATE DATABASE was given (`en_US`,
/// `de@collation=phonebook`); newer ones make a language tag of it (`en-US`, `de-u-co-phonebk`; `createdb` in
/// `dbcommands.c`). What stands behind the language has other words in each: it must be there in both.
pub(in crate::migration) fn is_same_icu_locale(one: &str, other: &str) -> bool {
    let is_tag = |name: &str| !name.is_empty() && name != "root" && !name.contains(['_', '@']);
    if is_tag(one) && is_tag(other) {
        return one == other;
    }
    let parts = |name: &str| {
        let name = name.to_lowercase().replace('_', "-");
        let (language, words) = match name.split_once('@').or_else(|| name.split_once("-u-")) {
            Some((language, _)) => (language, true),
            None => name.strip_suffix("-posix").map_or((name.as_str(), false), |language| (language, true)),
        };
        let language = if ["", "root"].contains(&language) { "und" } else { language };
        (language.to_owned(), words)
    };
    parts(one) == parts(other)
}

async fn create_sql(target: &Control, name: &str, wanted: &Database) -> Result<String, Error> {
    let mut sql = format!(
        "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        quote_ident(name),
        quote_literal(&wanted.encoding),
        quote_literal(&wanted.collate),
        quote_literal(&wanted.ctype),
    );
    if target.version_num() >= 150_000 {
        let (provider, option) = match wanted.provider.as_str() {
            "i" => ("icu", "ICU_LOCALE"),
            "b" => ("builtin", "BUILTIN_LOCALE"),
            _ => ("libc", ""),
        };
        sql.push_str(&format!(" LOCALE_PROVIDER {provider}"));
        if let (false, Some(locale)) = (option.is_empty(), &wanted.locale) {
            sql.push_str(&format!(" {option} {}", quote_literal(locale)));
        }
        if let Some(rules) = &wanted.icu_rules {
            sql.push_str(&format!(" ICU_RULES {}", quote_literal(rules)));
        }
    }
    let tablespace = &wanted.tablespace;
    let known = target.query_opt("SELECT 1 FROM pg_tablespace WHERE spcname::text = $1", &[tablespace]).await?;
    if tablespace != "pg_default" && known.is_some() {
        sql.push_str(&format!(" TABLESPACE {}", quote_ident(tablespace)));
    }
    Ok(sql)
}

/// Statements that bring owner, limits, comment and grants in line. Each may be repeated.
fn properties(name: &str, wanted: &Database, found: &Database, limit: ConnectionLimit) -> Vec<String> {
    let database = quote_ident(name);
    let owner = quote_ident(&wanted.owner);
    let mut statements = Vec::new();
    if wanted.owner != found.owner {
        statements.push(format!("ALTER DATABASE {database} OWNER TO {owner}"));
    }
    if limit == ConnectionLimit::IsCarried && wanted.connection_limit != found.connection_limit {
        statements.push(format!("ALTER DATABASE {database} CONNECTION LIMIT {}", wanted.connection_limit));
    }
    if wanted.is_template != found.is_template {
        statements.push(format!("ALTER DATABASE {database} IS_TEMPLATE {}", wanted.is_template));
    }
    if wanted.comment != found.comment {
        let comment = wanted.comment.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal);
        statements.push(format!("COMMENT ON DATABASE {database} IS {comment}"));
    }
    // What the old owner has goes over to the new one, so that it cannot be told before what will be there.
    if wanted.grants != found.grants || wanted.owner != found.owner {
        statements.push(grants(name, wanted, found));
    }
    statements
}

/// All anew, sent as one and so carried out wholly or not at all: at no time is somebody without a right that stays.
fn grants(name: &str, wanted: &Database, found: &Database) -> String {
    let on = format!("ON DATABASE {}", quote_ident(name));
    let who = |grantee: &Option<String>| grantee.as_deref().map_or_else(|| "PUBLIC".to_owned(), quote_ident);
    let mut all: BTreeSet<String> = found.grants.iter().map(|(grantee, ..)| who(grantee)).collect();
    all.extend([who(&None), quote_ident(&wanted.owner)]);
    let mut sql: String = all.iter().map(|grantee| format!("REVOKE ALL {on} FROM {grantee} CASCADE;\n")).collect();
    for (grantee, privilege, grantable) in &wanted.grants {
        let option = if *grantable { " WITH GRANT OPTION" } else { "" };
        sql.push_str(&format!("GRANT {privilege} {on} TO {}{option};\n", who(grantee)));
    }
    sql
}

/// The first words of a statement, for an error.
fn doing(statement: &str) -> String {
    statement.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

/// Names of the parameters that a server knows, in lower case.
pub(in crate::migration) async fn parameters(control: &Control) -> Result<HashSet<String>, Error> {
    let rows = control.query("SELECT lower(name) FROM pg_settings", &[]).await?;
    // `session_authorization` and `role` can be set and are shown to nobody.
    let hidden = ["role", "session_authorization"].map(str::to_owned);
    Ok(rows.iter().map(|row| row.get(0)).chain(hidden).collect())
}

async fn run(control: &Control, database: &str, doing: &str, sql: &str) -> Result<(), SchemaError> {
    control.batch_execute(sql).await.map_err(|source| SchemaError::Database {
        database: database.to_owned(),
        doing: doing.to_owned(),
        source,
    })
}

async fn read(control: &Control, name: &str) -> Result<Option<Database>, Error> {
    let version = control.version_num();
    let provider = if version >= 150_000 { "d.datlocprovider::text" } else { "'c'" };
    let locale = match version {
        170_000.. => "d.datlocale",
        150_000.. => "d.daticulocale",
        _ => "NULL::text",
    };
    let rules = if version >= 160_000 { "d.daticurules" } else { "NULL::text" };
    let query = format!(
        "SELECT pg_get_userbyid(d.datdba)::text, pg_encoding_to_char(d.encoding)::text, d.datcollate::text, \
         d.datctype::text, {provider}, {locale}, {rules}, t.spcname::text, d.datconnlimit, d.datistemplate, \
         shobj_description(d.oid, 'pg_database'), d.oid \
         FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE d.datname::text = $1"
    );
    let Some(row) = control.query_opt(query.as_str(), &[&name]).await? else { return Ok(None) };
    let oid: u32 = row.get(11);
    let mut database = Database {
        owner: row.get(0),
        encoding: row.get(1),
        collate: row.get(2),
        ctype: row.get(3),
        provider: row.get(4),
        locale: row.get(5),
        icu_rules: row.get(6),
        tablespace: row.get(7),
        connection_limit: row.get(8),
        is_template: row.get(9),
        comment: row.get(10),
        grants: BTreeSet::new(),
        settings: Vec::new(),
    };
    let grants = "SELECT r.rolname::text, a.privilege_type::text, bool_or(a.is_grantable) FROM pg_database d \
                  CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a \
                  LEFT JOIN pg_roles r ON r.oid = a.grantee \
                  WHERE d.oid = $1 AND (a.grantee = 0 OR r.oid IS NOT NULL) GROUP BY 1, 2";
    let rows = control.query(grants, &[&oid]).await?;
    database.grants = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let settings = "SELECT r.rolname::text, unnest(s.setconfig) FROM pg_db_role_setting s \
                    LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = $1 AND (s.setrole = 0 OR r.oid IS NOT NULL)";
    for row in control.query(settings, &[&oid]).await? {
        if let Some(setting) = Setting::parse(row.get(1)) {
            database.settings.push((row.get(0), setting));
        }
    }
    Ok(Some(database))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_icu(locale: &str) -> Database {
        Database {
            owner: "o".to_owned(),
            encoding: "UTF8".to_owned(),
            collate: "C".to_owned(),
            ctype: "C".to_owned(),
            provider: "i".to_owned(),
            locale: Some(locale.to_owned()),
            icu_rules: None,
            tablespace: "pg_default".to_owned(),
            connection_limit: -1,
            is_template: false,
            comment: None,
            grants: BTreeSet::new(),
            settings: Vec::new(),
        }
    }

    /// What PostgreSQL 15 has, and what newer ones make of it: the database is found again by a retry.
    #[test]
    fn locales_of_icu_are_the_same_in_either_spelling() {
        for (kept, tag) in [
            ("en_US", "en-US"),
            ("en-US", "en-US"),
            ("de@collation=phonebook", "de-u-co-phonebk"),
            ("en_US_POSIX", "en-US-u-va-posix"),
            ("root", "und"),
            ("", "und"),
        ] {
            check_same("d", &of_icu(tag), &of_icu(kept)).unwrap_or_else(|error| panic!("{kept}, {tag}: {error}"));
        }
        for (kept, tag) in [
            ("en_US", "en-GB"),
            ("de", "de-u-ks-level1"),
            ("de@collation=phonebook", "de"),
            ("de-u-co-phonebk", "de-u-ks-level1"),
        ] {
            assert!(check_same("d", &of_icu(tag), &of_icu(kept)).is_err(), "{kept}, {tag}");
        }
        let of_libc = Database { provider: "c".to_owned(), locale: None, ..of_icu("en-US") };
        assert!(check_same("d", &of_libc, &of_icu("en_US")).is_err());
    }
}
