//! The test of both connections: the configuration is valid by the time this runs; are the two servers what it says?
//!
//! Read-only, and short: what a migration needs beyond this is asked by its own validation.

use super::view::{CheckView, FindingView, SourceDatabaseView};
use crate::config::Config;
use crate::postgres::{ConnectError, Connector, Control, InstanceId};
use crate::proxy;

/// What one server says of itself.
struct Facts {
    version_num: u32,
    system_identifier: Option<String>,
    in_recovery: bool,
    /// Transactions are read-only there unless they say otherwise, by the server's own configuration.
    read_only: bool,
    wal_level: String,
    /// The role may stream changes.
    may_replicate: bool,
    /// The role may create databases.
    may_create_databases: bool,
    /// Slots and senders that are not in use.
    free_slots: i64,
    free_senders: i64,
    /// Name and size, without templates; null where the role may not read the size.
    databases: Vec<(String, Option<i64>)>,
}

/// Connects to both servers and looks at them.
pub async fn check(config: &Config) -> CheckView {
    let mut findings = vec![finding("configuration", Ok("valid".to_owned())), finding("files", files(config))];
    let instance = InstanceId::random();
    let (mut source, mut target) = (None, None);
    for (label, server, facts) in [("source", &config.source, &mut source), ("target", &config.target, &mut target)] {
        let connected = match Connector::new(server, label, &instance) {
            Ok(connector) => facts_of(&connector, &config.control.database).await,
            Err(error) => Err(refused(label, &error)),
        };
        match connected {
            Ok(found) => {
                let version = format!("PostgreSQL {} at {}:{}", version(found.version_num), server.host, server.port);
                findings.push(finding(format!("{label}: connection"), Ok(version)));
                *facts = Some(found);
            }
            Err(problem) => findings.push(finding(format!("{label}: connection"), Err(problem))),
        }
    }
    if let Some(source) = &source {
        findings.push(finding("source: version", version_of_source(source)));
        findings.push(finding("source: wal_level", wal_level(source)));
        findings.push(finding("source: replication", replication(source, &config.source.user)));
        findings.push(finding("source: slots", slots(source)));
    }
    if let Some(target) = &target {
        findings.push(finding("target: primary", primary(target)));
        findings.push(finding("target: databases", creation(target, &config.target.user)));
    }
    if let (Some(source), Some(target)) = (&source, &target) {
        findings.push(finding("target: version", version_of_target(source, target)));
        findings.push(finding("different servers", different(source, target)));
    }
    let ok = findings.iter().all(|finding| finding.ok);
    let databases = source.map(|source| listed(source.databases, target.as_ref()));
    CheckView { ok, checks: findings, databases }
}

/// What can be migrated, and whether the target has something of that name.
fn listed(databases: Vec<(String, Option<i64>)>, target: Option<&Facts>) -> Vec<SourceDatabaseView> {
    let on_target = |name: &str| target.map(|target| target.databases.iter().any(|(known, _)| known == name));
    let view = |(name, size_bytes): (String, _)| SourceDatabaseView { on_target: on_target(&name), name, size_bytes };
    databases.into_iter().map(view).collect()
}

/// Certificates, keys, rules, maps and users.
fn files(config: &Config) -> Found {
    let fix = "mend the file, or the key that names it".to_owned();
    proxy::check_files(config)
        .map(|()| "certificates, rules and users can be used".to_owned())
        .map_err(|error| (error.to_string(), fix))
}

/// What was found, or what is wrong and what mends it.
type Found = Result<String, (String, String)>;

fn finding(check: impl Into<String>, found: Found) -> FindingView {
    let check = check.into();
    match found {
        Ok(found) => FindingView { check, ok: true, found, fix: None },
        Err((found, fix)) => FindingView { check, ok: false, found, fix: Some(fix) },
    }
}

async fn facts_of(connector: &Connector, database: &str) -> Result<Facts, (String, String)> {
    let control = connector.control(database, "check").await.map_err(|error| refused(connector.label(), &error))?;
    let sql = "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('wal_level')";
    let failed = |error: tokio_postgres::Error| {
        let reason = error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().to_owned());
        (format!("connected, but cannot be asked: {reason}"), "grant the role the right to run it".to_owned())
    };
    let row = control.query_one(sql, &[]).await.map_err(failed)?;
    let rights = control.query_one(RIGHTS, &[]).await.map_err(failed)?;
    let databases = databases(&control).await.map_err(failed)?;
    // Needs a right that not every role has; without it the comparison of the two servers is left out.
    let sql = "SELECT system_identifier::text FROM pg_catalog.pg_control_system()";
    let system = control.query_one(sql, &[]).await.ok().map(|row| row.get(0));
    let read_only = connector.server_setting(database, "default_transaction_read_only").await;
    let read_only = read_only.map_err(|error| refused(connector.label(), &error))?;
    Ok(Facts {
        version_num: control.version_num(),
        system_identifier: system,
        in_recovery: row.get(0),
        read_only: read_only.as_deref() == Some("on"),
        wal_level: row.get(1),
        may_replicate: rights.get(0),
        may_create_databases: rights.get(1),
        free_slots: rights.get(2),
        free_senders: rights.get(3),
        databases,
    })
}

/// Managed services have roles of their own that pass the right to replicate on to their members.
const RIGHTS: &str = "SELECT r.rolsuper OR r.rolreplication OR EXISTS (
        SELECT FROM pg_catalog.pg_roles g WHERE g.rolname IN ('rds_replication', 'rds_superuser', 'cloudsqlsuperuser')
        AND pg_catalog.pg_has_role(r.oid, g.oid, 'MEMBER')),
    r.rolsuper OR r.rolcreatedb,
    pg_catalog.current_setting('max_replication_slots')::bigint - (SELECT count(*) FROM pg_catalog.pg_replication_slots),
    pg_catalog.current_setting('max_wal_senders')::bigint - (SELECT count(*) FROM pg_catalog.pg_stat_replication)
    FROM pg_catalog.pg_roles r WHERE r.rolname = current_user";

/// The size of a database that the role may not connect to is not its to know.
async fn databases(control: &Control) -> Result<Vec<(String, Option<i64>)>, tokio_postgres::Error> {
    let sql = "SELECT d.datname::text, CASE WHEN pg_catalog.has_database_privilege(d.oid, 'CONNECT')
                   THEN pg_catalog.pg_database_size(d.oid) END
               FROM pg_catalog.pg_database d WHERE NOT d.datistemplate AND d.datallowconn ORDER BY 1";
    Ok(control.query(sql, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn refused(label: &str, error: &ConnectError) -> (String, String) {
    let fix = match error.sqlstate() {
        Some("28P01") => format!("set the right password in [{label}] password, password_file or password_env"),
        Some("28000") => "allow this role and address in the server's pg_hba.conf, or set sslmode".to_owned(),
        Some("3D000") => "set [control] database to a database that exists on both servers".to_owned(),
        Some("53300") => "raise the server's max_connections, or free connections".to_owned(),
        Some(_) | None => format!("check [{label}] host, port and sslmode, and that the server accepts connections"),
    };
    (error.to_string(), fix)
}

fn version(num: u32) -> String {
    if num >= 100_000 { format!("{}.{}", num / 10_000, num % 10_000) } else { format!("9 ({num})") }
}

fn version_of_source(source: &Facts) -> Found {
    if source.version_num >= 100_000 {
        return Ok(version(source.version_num));
    }
    Err(("older than PostgreSQL 10".to_owned(), "logical replication as used here needs 10 or later".to_owned()))
}

fn version_of_target(source: &Facts, target: &Facts) -> Found {
    if target.version_num / 10_000 >= source.version_num / 10_000 {
        return Ok(version(target.version_num));
    }
    let found = format!("{} is older than the source", version(target.version_num));
    Err((found, "use a target of the same major version or a later one".to_owned()))
}

fn wal_level(source: &Facts) -> Found {
    if source.wal_level == "logical" {
        return Ok("logical".to_owned());
    }
    let fix = "ALTER SYSTEM SET wal_level = 'logical', then restart the source";
    Err((format!("{}, so changes cannot be streamed", source.wal_level), fix.to_owned()))
}

fn replication(source: &Facts, role: &str) -> Found {
    if source.may_replicate {
        return Ok("the role may stream changes".to_owned());
    }
    let fix = format!("ALTER ROLE {} REPLICATION", quoted(role));
    Err(("the role may not stream changes".to_owned(), fix))
}

fn slots(source: &Facts) -> Found {
    let found = format!("{} slots and {} senders are free", source.free_slots, source.free_senders);
    if source.free_slots > 0 && source.free_senders > 0 {
        return Ok(found);
    }
    let fix = "raise max_replication_slots and max_wal_senders on the source, one for each database, and restart it";
    Err((found, fix.to_owned()))
}

fn creation(target: &Facts, role: &str) -> Found {
    if target.may_create_databases {
        return Ok("the role may create them".to_owned());
    }
    let fix = format!("ALTER ROLE {} CREATEDB", quoted(role));
    Err(("the role may not create databases".to_owned(), fix))
}

fn quoted(role: &str) -> String {
    format!("\"{}\"", role.replace('"', "\"\""))
}

fn primary(target: &Facts) -> Found {
    if target.in_recovery {
        return Err(("a standby, which takes no writes".to_owned(), "name the primary in [target] host".to_owned()));
    }
    if target.read_only {
        let fix = "ALTER SYSTEM RESET default_transaction_read_only on the target, SELECT pg_reload_conf(); services \
                   set it when the disk is full: give it more storage if that was why";
        return Err((
            "a primary whose configuration has default_transaction_read_only = on".to_owned(),
            fix.to_owned(),
        ));
    }
    Ok("takes writes".to_owned())
}

fn different(source: &Facts, target: &Facts) -> Found {
    match (&source.system_identifier, &target.system_identifier) {
        (Some(a), Some(b)) if a == b => Err((
            "source and target are one server, or a copy of its files".to_owned(),
            "name a server of its own (initdb) in [target]".to_owned(),
        )),
        (Some(_), Some(_)) => Ok("yes".to_owned()),
        (None, _) | (_, None) => Ok("not known: the role may not call pg_control_system()".to_owned()),
    }
}
