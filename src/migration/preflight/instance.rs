//! Rules about the two servers.

use std::collections::HashSet;

use super::{Level, Mode, Outcome, Preflight, Rule, RuleResult, column};
use crate::config::FencePolicy;
use crate::migration::schema::{database_parameters, find_pg_dump};
use crate::postgres::Control;

/// Connections that a migration opens beside those of its workers.
const OWN_CONNECTIONS: i64 = 10;

/// Every rule at instance level.
pub(super) async fn check(preflight: &Preflight<'_>, source: &Control, target: &Control) -> Vec<RuleResult> {
    let mut results = vec![
        version(source, target),
        primary(source, "source_primary", "the source").await,
        primary(target, "target_primary", "the target").await,
        pg_dump(preflight, source, target).await,
        roles(source, target).await,
        replica_role(target).await,
        verifiers(source).await,
        signal(source, "source_signal").await,
        connections(preflight, source, "source_connections").await,
        connections(preflight, target, "target_connections").await,
        preload_libraries(source, target).await,
        settings(source, target).await,
        control_database(preflight),
    ];
    if preflight.mode == Mode::Online {
        results.push(wal_level(source).await);
        results.push(slots(preflight, source).await);
        results.push(senders(preflight, source).await);
        results.push(replication(source).await);
        results.push(slot_wal(source).await);
        results.push(truncate(source));
        results.push(fence_settings(preflight, source).await);
        results.push(long_transactions(source).await);
        results.push(prepared_transactions(source).await);
    }
    results
}

fn rule(code: &'static str) -> Rule {
    Rule::new(code, Level::Instance)
}

fn version(source: &Control, target: &Control) -> RuleResult {
    let (from, to) = (source.version_num() / 10_000, target.version_num() / 10_000);
    rule("version")
        .why("logical decoding by pgoutput came with PostgreSQL 10, and definitions are not written for older servers")
        .fix("use a source of version 10 or newer and a target that is not older than it")
        .expect(from >= 10 && to >= from, Outcome::Failed, format!("source {from}, target {to}"))
}

async fn primary(control: &Control, code: &'static str, which: &str) -> RuleResult {
    let rule = rule(code)
        .why("a standby takes no writes, and a snapshot taken there does not fit the stream")
        .fix(format!("name the primary of {which} in the configuration"));
    match control.query_one("SELECT pg_is_in_recovery()", &[]).await {
        Ok(row) if row.get(0) => rule.failed(vec![format!("{which} is in recovery")]),
        Ok(_) => rule.succeeded(),
        Err(error) => rule.unknown(&error),
    }
}

async fn pg_dump(preflight: &Preflight<'_>, source: &Control, target: &Control) -> RuleResult {
    let rule = rule("pg_dump")
        .why(
            "definitions are dumped by pg_dump, which must be at least as new as the source; only one as new as the \
              target can compare the two in the end",
        )
        .fix("install the client package of the target's version, or set migration.bindir");
    let (from, to) = (source.version_num() / 10_000, target.version_num() / 10_000);
    match find_pg_dump(&preflight.config.migration, from, to).await {
        Ok(found) => {
            let evidence = format!("{} is version {}", found.path.display(), found.major);
            rule.expect(found.major >= to, Outcome::Warning, evidence)
        }
        Err(error) => rule.failed(vec![error.to_string()]),
    }
}

async fn roles(source: &Control, target: &Control) -> RuleResult {
    let rule = rule("create_roles")
        .why("roles and their grants are carried over before definitions that name them")
        .fix("ALTER ROLE … CREATEROLE for the target's login role, or make these roles on the target by hand");
    let names = "SELECT rolname::text FROM pg_roles WHERE rolname !~ '^pg_'";
    let right = "SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user";
    let read = async {
        let there: HashSet<String> = column(target, names, &[]).await?.into_iter().collect();
        let missing = column(source, names, &[]).await?.into_iter().filter(|name| !there.contains(name)).collect();
        let may: bool = target.query_one(right, &[]).await?.get(0);
        Ok::<(Vec<String>, bool), tokio_postgres::Error>((missing, may))
    };
    match read.await {
        Ok((missing, false)) => rule.unless_any(Outcome::Failed, missing),
        Ok((_, true)) => rule.succeeded(),
        Err(error) => rule.unknown(&error),
    }
}

/// Tried, because nothing else tells: superusers may, and from PostgreSQL 15 on who was granted it.
async fn replica_role(target: &Control) -> RuleResult {
    let rule = rule("session_replication_role")
        .why("triggers, rules and foreign keys of the target must not act a second time on what is copied and applied")
        .fix(
            "make the target's login role a superuser, or from PostgreSQL 15 on: GRANT SET ON PARAMETER \
              session_replication_role TO it",
        );
    match target.batch_execute("BEGIN READ ONLY; SET LOCAL session_replication_role = replica; ROLLBACK").await {
        Ok(()) => rule.succeeded(),
        Err(error) => {
            let evidence =
                error.as_db_error().map_or_else(|| error.to_string(), |refusal| refusal.message().to_owned());
            // The rules that follow use the same session.
            let _ended = target.batch_execute("ROLLBACK").await;
            rule.failed(vec![evidence])
        }
    }
}

async fn verifiers(source: &Control) -> RuleResult {
    let rule = rule("password_verifiers")
        .why("clients are logged in to the target with what they proved to the proxy, which needs the same verifier there")
        .fix("log in to the source as a superuser, or set the same passwords on the target by hand");
    match source.query_one("SELECT has_table_privilege('pg_authid', 'SELECT')", &[]).await {
        Ok(row) => rule.expect(row.get(0), Outcome::Warning, format!("pg_authid readable: {}", row.get::<_, bool>(0))),
        Err(error) => rule.unknown(&error),
    }
}

async fn signal(source: &Control, code: &'static str) -> RuleResult {
    let rule = rule(code)
        .why("at the cutover, sessions that bypass the proxy are ended")
        .fix("GRANT pg_signal_backend, pg_monitor TO the source's login role");
    let query = "SELECT rolsuper OR (pg_has_role('pg_signal_backend', 'USAGE') AND pg_has_role('pg_monitor', 'USAGE')) \
                 FROM pg_roles WHERE rolname = current_user";
    match source.query_one(query, &[]).await {
        Ok(row) if row.get(0) => rule.succeeded(),
        Ok(_) => rule.answer(Outcome::Warning, vec!["neither a superuser nor a member of both".to_owned()]),
        Err(error) => rule.unknown(&error),
    }
}

async fn connections(preflight: &Preflight<'_>, control: &Control, code: &'static str) -> RuleResult {
    let workers = preflight.config.migration.copy_workers + preflight.config.migration.index_workers;
    let needed = i64::try_from(workers).unwrap_or(i64::MAX).saturating_add(OWN_CONNECTIONS);
    let rule = rule(code)
        .why("copying, building indexes and streaming each have connections of their own, beside the application's")
        .fix("raise max_connections, or lower migration.copy_workers and index_workers");
    let query = "SELECT current_setting('max_connections')::int8 - current_setting('superuser_reserved_connections')::int8 \
                 - count(*) FROM pg_stat_activity WHERE datid IS NOT NULL";
    match control.query_one(query, &[]).await {
        Ok(row) => {
            let free: i64 = row.get(0);
            rule.expect(free >= needed, Outcome::Warning, format!("{free} free, up to {needed} used"))
        }
        Err(error) => rule.unknown(&error),
    }
}

async fn preload_libraries(source: &Control, target: &Control) -> RuleResult {
    let rule = rule("shared_preload_libraries")
        .why("extensions that must be preloaded do not work, or cannot be created, without")
        .fix("add these libraries to shared_preload_libraries of the target and restart it, or drop their use");
    let query = "SELECT btrim(btrim(u), '\"') FROM unnest(string_to_array(current_setting('shared_preload_libraries'), ',')) u \
                 WHERE btrim(u) <> ''";
    let read = async {
        let there = column(target, query, &[]).await?;
        let missing = column(source, query, &[]).await?.into_iter().filter(|name| !there.contains(name)).collect();
        Ok::<Vec<String>, tokio_postgres::Error>(missing)
    };
    match read.await {
        Ok(missing) => rule.unless_any(Outcome::Warning, missing),
        // Only pg_read_all_settings may look; an extension that needs a library fails by itself.
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) => {
            rule.answer(Outcome::Warning, vec!["not allowed to read shared_preload_libraries".to_owned()])
        }
        Err(error) => rule.unknown(&error),
    }
}

async fn settings(source: &Control, target: &Control) -> RuleResult {
    let rule = rule("unknown_settings")
        .why("ALTER DATABASE … SET and ALTER ROLE … SET of parameters that the target does not know are left out")
        .fix("look up what replaced them in the target's release notes");
    let query = "SELECT DISTINCT lower(split_part(u, '=', 1)) FROM pg_db_role_setting, unnest(setconfig) u ORDER BY 1";
    let read = async {
        let known = database_parameters(target).await?;
        let used = column(source, query, &[]).await?;
        Ok::<Vec<String>, tokio_postgres::Error>(
            used.into_iter().filter(|name| !name.contains('.') && !known.contains(name)).collect(),
        )
    };
    match read.await {
        Ok(unknown) => rule.unless_any(Outcome::Warning, unknown),
        Err(error) => rule.unknown(&error),
    }
}

fn control_database(preflight: &Preflight<'_>) -> RuleResult {
    let control = &preflight.config.control.database;
    let hit = preflight.overwrite_target && preflight.databases.contains(control);
    rule("control_database")
        .why("the control database holds the decisions of cutovers, so it cannot be dropped and made again")
        .fix("set control.database to another database, or migrate this one without overwriting")
        .unless_any(Outcome::Failed, if hit { vec![control.clone()] } else { Vec::new() })
}

async fn wal_level(source: &Control) -> RuleResult {
    let rule = rule("wal_level").why("changes are read from the write-ahead log by logical decoding").fix(
        "ALTER SYSTEM SET wal_level = logical; then restart the source (managed services: the parameter that \
              switches logical replication on)",
    );
    match source.query_one("SELECT current_setting('wal_level')", &[]).await {
        Ok(row) => {
            let level: String = row.get(0);
            rule.expect(level == "logical", Outcome::Failed, format!("wal_level = {level}"))
        }
        Err(error) => rule.unknown(&error),
    }
}

async fn slots(preflight: &Preflight<'_>, source: &Control) -> RuleResult {
    let rule = rule("replication_slots")
        .why("each database is streamed through a slot of its own")
        .fix("raise max_replication_slots of the source and restart it, or drop slots that nobody uses");
    let query = "SELECT current_setting('max_replication_slots')::int8 - count(*) FROM pg_replication_slots \
                 WHERE slot_name !~ '^pgcutover_'";
    enough(rule, preflight, source, query).await
}

async fn senders(preflight: &Preflight<'_>, source: &Control) -> RuleResult {
    let rule = rule("wal_senders")
        .why("each database is streamed by a walsender of its own")
        .fix("raise max_wal_senders of the source and restart it");
    let query = "SELECT current_setting('max_wal_senders')::int8 - count(*) FROM pg_stat_activity \
                 WHERE backend_type = 'walsender' AND application_name !~ '^pgcutover/'";
    enough(rule, preflight, source, query).await
}

async fn enough(rule: Rule, preflight: &Preflight<'_>, source: &Control, query: &str) -> RuleResult {
    let needed = i64::try_from(preflight.databases.len()).unwrap_or(i64::MAX);
    match source.query_one(query, &[]).await {
        Ok(row) => {
            let free: i64 = row.get(0);
            rule.expect(free >= needed, Outcome::Failed, format!("{free} free, {needed} needed"))
        }
        Err(error) => rule.unknown(&error),
    }
}

async fn replication(source: &Control) -> RuleResult {
    let rule = rule("replication_right")
        .why("a slot is made and read through a replication connection")
        .fix("ALTER ROLE … REPLICATION for the source's login role (Amazon RDS: GRANT rds_replication TO it)");
    let query = "SELECT rolreplication OR rolsuper OR EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'rds_replication' \
                 AND pg_has_role(r.oid, 'MEMBER')) FROM pg_roles WHERE rolname = current_user";
    match source.query_one(query, &[]).await {
        Ok(row) if row.get(0) => rule.succeeded(),
        Ok(_) => rule.failed(vec!["the login role has neither REPLICATION nor SUPERUSER".to_owned()]),
        Err(error) => rule.unknown(&error),
    }
}

async fn slot_wal(source: &Control) -> RuleResult {
    let rule = rule("slot_wal_size")
        .why("a slot that falls further behind than this is invalidated, and the migration begins anew")
        .fix("set max_slot_wal_keep_size to -1, or well above what the source writes while it is copied");
    if source.version_num() < 130_000 {
        return rule.succeeded();
    }
    match source.query_one("SELECT current_setting('max_slot_wal_keep_size')", &[]).await {
        Ok(row) => {
            let size: String = row.get(0);
            rule.expect(size == "-1", Outcome::Warning, format!("max_slot_wal_keep_size = {size}"))
        }
        Err(error) => rule.unknown(&error),
    }
}

fn truncate(source: &Control) -> RuleResult {
    rule("truncate")
        .why("PostgreSQL 10 does not stream TRUNCATE: a table truncated meanwhile keeps its rows on the target")
        .fix("truncate no table between the start of the migration and the cutover; DELETE is streamed")
        .expect(
            source.version_num() >= 110_000,
            Outcome::Warning,
            format!("server_version_num {}", source.version_num()),
        )
}

async fn fence_settings(preflight: &Preflight<'_>, source: &Control) -> RuleResult {
    let rule = rule("fence_settings")
        .why("the fence makes databases read-only by default; a setting of a role, or of a role in a database, outranks it")
        .fix("ALTER ROLE … [IN DATABASE …] RESET default_transaction_read_only, and set control.fence = \"hard\"");
    let query = "SELECT format('role %s%s', r.rolname, ' in database ' || d.datname) FROM pg_db_role_setting s \
                 JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase \
                 WHERE EXISTS (SELECT FROM unnest(s.setconfig) u WHERE lower(u) IN ('default_transaction_read_only=off', \
                 'default_transaction_read_only=false', 'default_transaction_read_only=no', 'default_transaction_read_only=0'))";
    let outcome = match preflight.config.control.fence {
        FencePolicy::Hard => Outcome::Warning,
        FencePolicy::Soft => Outcome::Failed,
    };
    match column(source, query, &[]).await {
        Ok(found) => rule.unless_any(outcome, found),
        Err(error) => rule.unknown(&error),
    }
}

async fn long_transactions(source: &Control) -> RuleResult {
    let rule = rule("long_transactions")
        .why("making a slot waits for every transaction that writes, in any database of the source, and so does a cutover")
        .fix("let them end, or end them with pg_terminate_backend(pid)");
    let query = "SELECT format('pid %s, %s, database %s, for %s', pid, coalesce(nullif(application_name, ''), 'no name'), \
                 datname, date_trunc('second', now() - xact_start)) FROM pg_stat_activity \
                 WHERE xact_start < now() - interval '5 minutes' AND backend_type = 'client backend' ORDER BY xact_start";
    match column(source, query, &[]).await {
        Ok(found) => rule.unless_any(Outcome::Warning, found),
        Err(error) => rule.unknown(&error),
    }
}

async fn prepared_transactions(source: &Control) -> RuleResult {
    let rule = rule("prepared_transactions")
        .why("making a slot, and taking the first snapshot, waits until they are committed or rolled back")
        .fix("COMMIT PREPARED or ROLLBACK PREPARED those that their owner has forgotten");
    let query = "SELECT format('%s in database %s, since %s', gid, database, date_trunc('second', prepared)) \
                 FROM pg_prepared_xacts ORDER BY prepared";
    match column(source, query, &[]).await {
        Ok(found) => rule.unless_any(Outcome::Warning, found),
        Err(error) => rule.unknown(&error),
    }
}
