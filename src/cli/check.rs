//! `pgcutover check`: the configuration is valid by the time this runs; are the two servers what it says?

use serde::Serialize;

use super::output::Output;
use super::{CliError, Verdict};
use crate::config::Config;
use crate::postgres::{ConnectError, Connector, InstanceId};
use crate::proxy;

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    check: String,
    ok: bool,
    found: String,
    fix: Option<String>,
}

/// What one server says of itself.
struct Facts {
    version_num: u32,
    system_identifier: Option<String>,
    in_recovery: bool,
    wal_level: String,
}

/// Connects to both servers. Bad when something is in the way.
pub(super) async fn check(config: &Config, output: &Output) -> Result<Verdict, CliError> {
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
    }
    if let Some(target) = &target {
        findings.push(finding("target: primary", primary(target)));
    }
    if let (Some(source), Some(target)) = (&source, &target) {
        findings.push(finding("target: version", version_of_target(source, target)));
        findings.push(finding("different servers", different(source, target)));
    }
    let good = findings.iter().all(|finding| finding.ok);
    print(&findings, good, output);
    Ok(if good { Verdict::Good } else { Verdict::Bad })
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

fn finding(check: impl Into<String>, found: Found) -> Finding {
    let check = check.into();
    match found {
        Ok(found) => Finding { check, ok: true, found, fix: None },
        Err((found, fix)) => Finding { check, ok: false, found, fix: Some(fix) },
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
    // Needs a right that not every role has; without it the comparison of the two servers is left out.
    let sql = "SELECT system_identifier::text FROM pg_catalog.pg_control_system()";
    let system = control.query_one(sql, &[]).await.ok().map(|row| row.get(0));
    Ok(Facts {
        version_num: control.version_num(),
        system_identifier: system,
        in_recovery: row.get(0),
        wal_level: row.get(1),
    })
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
    let fix = "ALTER SYSTEM SET wal_level = 'logical', then restart the source (an offline migration can do without)";
    Err((format!("{}, so changes cannot be streamed", source.wal_level), fix.to_owned()))
}

fn primary(target: &Facts) -> Found {
    if target.in_recovery {
        return Err(("a standby, which takes no writes".to_owned(), "name the primary in [target] host".to_owned()));
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

fn print(findings: &[Finding], good: bool, output: &Output) {
    if output.is_json() {
        output.json(&serde_json::json!({"ok": good, "checks": findings}));
        return;
    }
    for finding in findings {
        let mark = if finding.ok { "ok   " } else { "FAIL " };
        output.line(&format!("{mark} {}: {}", finding.check, finding.found));
        if let Some(fix) = &finding.fix {
            output.line(&format!("      fix: {fix}"));
        }
    }
}
