//! The database itself: made like the source's, with what belongs to it and stands in no dump of its contents.

use std::collections::HashSet;

use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use super::{Existing, SchemaError};
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
    /// Grants: grantee (none: PUBLIC), privilege, with grant option. None: the default grants.
    grants: Option<Vec<(Option<String>, String, bool)>>,
    /// Role (none: everyone) and setting.
    settings: Vec<(Option<String>, Setting)>,
}

/// See [`super::create_database`].
pub(super) async fn create(
    source: &Connector,
    target: &Connector,
    name: &str,
    existing: Existing,
    journal: &dyn Journal,
) -> Result<(), SchemaError> {
    let from = source.control(name, "schema").await?;
    let wanted = read(&from, name).await.map_err(|source| read_error(name, source))?;
    let wanted = wanted.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let control = maintenance(target, name).await?;
    let mut found = read(&control, name).await.map_err(|source| read_error(name, source))?;
    if found.is_some() && existing == Existing::Drop {
        drop_database(&control, name, journal).await?;
        found = None;
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
    carry_over(&control, name, &wanted).await
}

/// See [`super::sync_database`].
pub(super) async fn sync(
    source: &Connector,
    target: &Connector,
    name: &str,
    except: &[&str],
) -> Result<usize, SchemaError> {
    let from = source.control(name, "schema").await?;
    let wanted = read(&from, name).await.map_err(|source| read_error(name, source))?;
    let wanted = wanted.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let control = maintenance(target, name).await?;
    let found = read(&control, name).await.map_err(|source| read_error(name, source))?;
    let found = found.ok_or_else(|| SchemaError::NoDatabase(name.to_owned()))?;
    let known = parameters(&control).await.map_err(|source| read_error(name, source))?;
    let counts = |setting: &Setting| !except.contains(&setting.name.to_lowercase().as_str());
    let mut statements = Vec::new();
    for (role, setting) in wanted.settings.iter().filter(|(_, setting)| counts(setting)) {
        let same = found.settings.iter().any(|there| there == &(role.clone(), setting.clone()));
        if !same && (setting.is_custom() || known.contains(&setting.name.to_lowercase())) {
            statements.push(format!("{} {}", whose(name, role.as_deref()), setting.clause()));
        }
    }
    for (role, setting) in found.settings.iter().filter(|(_, setting)| counts(setting)) {
        let stays = |(whose, wanted): &(Option<String>, Setting)| whose == role && wanted.name == setting.name;
        if !wanted.settings.iter().any(stays) {
            statements.push(format!("{} RESET {}", whose(name, role.as_deref()), quote_ident(&setting.name)));
        }
    }
    for statement in &statements {
        run(&control, name, "bringing its settings in line", statement).await?;
    }
    Ok(statements.len())
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

async fn drop_database(control: &Control, name: &str, journal: &dyn Journal) -> Result<(), SchemaError> {
    let made = MadeObject {
        side: Side::Target,
        database: None,
        kind: made::DATABASE_DROPPED.to_owned(),
        name: quote_ident(name),
        undo: None,
        note: "dropped by --overwrite-target; its contents cannot be brought back".to_owned(),
    };
    journal.record(&made).await?;
    // A template cannot be dropped, and who is connected keeps a database alive.
    run(control, name, "ALTER DATABASE", &format!("ALTER DATABASE {} IS_TEMPLATE false", quote_ident(name))).await?;
    if control.version_num() >= 130_000 {
        return run(control, name, "DROP DATABASE", &format!("DROP DATABASE {} WITH (FORCE)", quote_ident(name))).await;
    }
    run(control, name, "ALTER DATABASE", &format!("ALTER DATABASE {} CONNECTION LIMIT 0", quote_ident(name))).await?;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()";
    control.query(end, &[&name]).await.map_err(|source| SchemaError::Database {
        database: name.to_owned(),
        doing: "ending its sessions".to_owned(),
        source,
    })?;
    // DROP DATABASE itself waits some seconds for sessions that are on their way out.
    run(control, name, "DROP DATABASE", &format!("DROP DATABASE {}", quote_ident(name))).await
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
    let (found, wanted) = (describe(found), describe(wanted));
    if found == wanted {
        return Ok(());
    }
    Err(SchemaError::Differs { database: name.to_owned(), found, wanted })
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

/// Owner, settings, limits, comment and grants. Every statement may be repeated.
async fn carry_over(control: &Control, name: &str, wanted: &Database) -> Result<(), SchemaError> {
    let database = quote_ident(name);
    let owner = quote_ident(&wanted.owner);
    let mut statements = vec![
        format!("ALTER DATABASE {database} OWNER TO {owner}"),
        format!("ALTER DATABASE {database} CONNECTION LIMIT {}", wanted.connection_limit),
        format!("ALTER DATABASE {database} IS_TEMPLATE {}", wanted.is_template),
    ];
    if let Some(comment) = &wanted.comment {
        statements.push(format!("COMMENT ON DATABASE {database} IS {}", quote_literal(comment)));
    }
    if let Some(grants) = &wanted.grants {
        statements.push(format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC"));
        statements.push(format!("REVOKE ALL ON DATABASE {database} FROM {owner}"));
        for (grantee, privilege, grantable) in grants {
            let grantee = grantee.as_deref().map_or_else(|| "PUBLIC".to_owned(), quote_ident);
            let option = if *grantable { " WITH GRANT OPTION" } else { "" };
            statements.push(format!("GRANT {privilege} ON DATABASE {database} TO {grantee}{option}"));
        }
    }
    let known = parameters(control).await.map_err(|source| read_error(name, source))?;
    for (role, setting) in &wanted.settings {
        if !setting.is_custom() && !known.contains(&setting.name.to_lowercase()) {
            tracing::warn!(database = name, setting = setting.name, "the target does not know this setting; left out");
            continue;
        }
        statements.push(format!("{} {}", whose(name, role.as_deref()), setting.clause()));
    }
    for statement in statements {
        let doing: String = statement.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        run(control, name, &doing, &statement).await?;
    }
    Ok(())
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
         shobj_description(d.oid, 'pg_database'), d.datacl IS NOT NULL, d.oid \
         FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE d.datname::text = $1"
    );
    let Some(row) = control.query_opt(query.as_str(), &[&name]).await? else { return Ok(None) };
    let oid: u32 = row.get(12);
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
        grants: None,
        settings: Vec::new(),
    };
    if row.get(11) {
        let grants = "SELECT r.rolname::text, a.privilege_type::text, a.is_grantable \
                      FROM pg_database d CROSS JOIN aclexplode(d.datacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee \
                      WHERE d.oid = $1 AND (a.grantee = 0 OR r.oid IS NOT NULL)";
        let rows = control.query(grants, &[&oid]).await?;
        database.grants = Some(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect());
    }
    let settings = "SELECT r.rolname::text, unnest(s.setconfig) FROM pg_db_role_setting s \
                    LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = $1 AND (s.setrole = 0 OR r.oid IS NOT NULL)";
    for row in control.query(settings, &[&oid]).await? {
        if let Some(setting) = Setting::parse(row.get(1)) {
            database.settings.push((row.get(0), setting));
        }
    }
    Ok(Some(database))
}
