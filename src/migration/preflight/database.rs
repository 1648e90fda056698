//! Rules about one database.

use std::collections::HashMap;

use super::{Level, Mode, Outcome, Preflight, Rule, RuleResult, column};
use crate::config::units::format_size;
use crate::ident::quote_ident;
use crate::migration::identity::{self, Remedy};
use crate::migration::unstreamed;
use crate::postgres::Control;

/// Tables that are migrated: what [`crate::migration::copy::list_tables`] lists, near enough for a rule.
const OURS: &str = "n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_'";

/// A rule that is a query for what must not be there.
pub(super) struct Finding {
    pub(super) code: &'static str,
    pub(super) why: &'static str,
    pub(super) fix: &'static str,
    pub(super) outcome: Outcome,
    /// Only where changes are streamed.
    pub(super) online: bool,
    /// First and last version of the source that it applies to.
    pub(super) versions: (u32, u32),
    /// Yields one text for each finding; `{ours}` stands for [`OURS`].
    pub(super) query: &'static str,
}

pub(super) const EVERY: (u32, u32) = (0, u32::MAX);

const FINDINGS: &[Finding] = &[
    Finding {
        code: "unreadable_large_objects",
        why: "large objects are read by the source's login role",
        fix: "GRANT SELECT ON LARGE OBJECT … TO the source's login role, make it a member of their owners, or log in as a superuser",
        outcome: Outcome::Failed,
        online: false,
        versions: EVERY,
        query: "SELECT 'large object ' || m.oid FROM pg_largeobject_metadata m \
                CROSS JOIN (SELECT rolsuper AS sees_all FROM pg_roles WHERE rolname = current_user) me \
                WHERE NOT (me.sees_all OR current_setting('lo_compat_privileges')::boolean OR pg_has_role(m.lomowner, 'USAGE') \
                OR EXISTS (SELECT FROM aclexplode(m.lomacl) a WHERE a.privilege_type = 'SELECT' \
                           AND CASE a.grantee WHEN 0 THEN true ELSE pg_has_role(a.grantee, 'USAGE') END)) \
                ORDER BY m.oid LIMIT 1000",
    },
    Finding {
        code: "always_triggers",
        why: "they fire on replicated changes too and would act a second time on the target",
        fix: "ALTER TABLE … ENABLE TRIGGER … (or RULE …), without ALWAYS or REPLICA, until the migration is complete",
        outcome: Outcome::Failed,
        online: false,
        versions: EVERY,
        query: "SELECT format('trigger %I on %I.%I', t.tgname, n.nspname, c.relname) FROM pg_trigger t \
                JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE t.tgenabled IN ('A', 'R') AND NOT t.tgisinternal AND {ours} UNION ALL \
                SELECT format('rule %I on %I.%I', r.rulename, n.nspname, c.relname) FROM pg_rewrite r \
                JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE r.ev_enabled IN ('A', 'R') AND {ours}",
    },
    Finding {
        code: "row_security",
        why: "rows that the policies hide from the source's login role would not be copied",
        fix: "log in to the source as a superuser, or ALTER ROLE … BYPASSRLS for its login role",
        outcome: Outcome::Failed,
        online: false,
        versions: EVERY,
        query: "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                CROSS JOIN (SELECT rolsuper OR rolbypassrls AS sees_all FROM pg_roles WHERE rolname = current_user) me \
                WHERE c.relrowsecurity AND c.relkind = 'r' AND NOT me.sees_all AND {ours} \
                AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')) ORDER BY 1",
    },
    Finding {
        code: "unreadable_tables",
        why: "every row is read by the source's login role",
        fix: "GRANT USAGE ON the SCHEMA and SELECT ON the TABLE to the source's login role, or log in as a superuser",
        outcome: Outcome::Failed,
        online: false,
        versions: EVERY,
        query: "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't' AND {ours} \
                AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) ORDER BY 1",
    },
    Finding {
        code: "table_ownership",
        why: "only its owner may add a table to a publication or set its replica identity",
        fix: "GRANT the owning role TO the source's login role, or log in as a superuser",
        outcome: Outcome::Failed,
        online: true,
        versions: EVERY,
        query: "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {ours} AND NOT pg_has_role(c.relowner, 'USAGE') ORDER BY 1",
    },
    Finding {
        code: "tables_with_oids",
        why: "PostgreSQL 12 and newer know no tables WITH OIDS",
        fix: "ALTER TABLE … SET WITHOUT OIDS, after what uses the column oid has been changed",
        outcome: Outcome::Failed,
        online: false,
        versions: (0, 119_999),
        query: "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                WHERE c.relkind IN ('r', 'p') AND c.relhasoids AND {ours} ORDER BY 1",
    },
    Finding {
        code: "removed_types",
        why: "PostgreSQL 12 and newer do not have the types abstime, reltime and tinterval",
        fix: "ALTER TABLE … ALTER COLUMN … TYPE timestamptz or interval",
        outcome: Outcome::Failed,
        online: false,
        versions: (0, 119_999),
        query: "SELECT format('%I.%I.%I', n.nspname, c.relname, a.attname) FROM pg_attribute a \
                JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_type t ON t.oid = a.atttypid WHERE NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm') AND {ours} \
                AND t.typnamespace = 'pg_catalog'::regnamespace \
                AND btrim(t.typname, '_') IN ('abstime', 'reltime', 'tinterval') ORDER BY 1",
    },
    Finding {
        code: "invalid_indexes",
        why: "pg_dump leaves indexes out that are not valid",
        fix: "REINDEX or DROP them",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
                JOIN pg_namespace n ON n.oid = c.relnamespace WHERE NOT i.indisvalid AND c.relkind = 'i' AND {ours} ORDER BY 1",
    },
    Finding {
        code: "subscriptions",
        why: "an enabled subscription goes on writing to the source after the cutover, and is not carried over",
        fix: "ALTER SUBSCRIPTION … DISABLE, and make it anew on the target after the cutover",
        outcome: Outcome::Failed,
        online: false,
        versions: EVERY,
        query: "SELECT s.subname::text FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid \
                WHERE d.datname = current_database() AND s.subenabled ORDER BY 1",
    },
    Finding {
        code: "publications",
        why: "publications are not carried over; their subscribers follow the source, which gets no changes after the cutover",
        fix: "make them anew on the target, and let their subscribers follow it",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT pubname::text FROM pg_publication WHERE pubname !~ '^pgcutover' ORDER BY 1",
    },
    Finding {
        code: "foreign_tables",
        why: "the definition is carried over; the target must reach the foreign server too, and user mappings hold passwords",
        fix: "check that the target's host may connect to these servers",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT format('server %I', srvname) FROM pg_foreign_server ORDER BY 1",
    },
    Finding {
        code: "event_triggers",
        why: "one that is ENABLE ALWAYS or REPLICA fires on what pgcutover itself defines",
        fix: "ALTER EVENT TRIGGER … ENABLE, without ALWAYS or REPLICA, until the migration is complete",
        outcome: Outcome::Warning,
        online: false,
        versions: EVERY,
        query: "SELECT evtname::text FROM pg_event_trigger WHERE evtenabled IN ('A', 'R') ORDER BY 1",
    },
];

/// Every rule of one database. `source` and `target` are sessions in the control databases.
pub(super) async fn check(
    preflight: &Preflight<'_>,
    name: &str,
    source: &Control,
    target: &Control,
) -> Vec<RuleResult> {
    let rule = |code| Rule::new(code, Level::Database(name.to_owned()));
    let exists = rule("database_exists")
        .why("what is migrated must be there")
        .fix("check the name; a template, or a database that allows no connections, cannot be migrated");
    let session = match preflight.source.control(name, "validation").await {
        Ok(session) => session,
        Err(error) => return vec![exists.failed(vec![error.to_string()])],
    };
    let mut results = vec![exists.succeeded()];
    results.extend(target_database(preflight, name, source, target).await);
    for finding in FINDINGS.iter().chain(super::findings::FINDINGS) {
        results.push(find(preflight, name, &session, finding).await);
    }
    results.extend(unstreamed(preflight, name, &session).await);
    if preflight.mode == Mode::Online {
        results.push(identities(preflight, name, &session).await);
    }
    results.push(extensions(name, &session, target).await);
    results.push(tablespaces(name, &session, target).await);
    results
}

async fn find(preflight: &Preflight<'_>, name: &str, session: &Control, finding: &Finding) -> RuleResult {
    let rule = Rule::new(finding.code, Level::Database(name.to_owned())).why(finding.why).fix(finding.fix);
    let (first, last) = finding.versions;
    if (finding.online && preflight.mode == Mode::Offline) || !(first..=last).contains(&session.version_num()) {
        return rule.succeeded();
    }
    match column(session, &finding.query.replace("{ours}", OURS), &[]).await {
        Ok(found) => rule.unless_any(finding.outcome, found),
        Err(error) => rule.unknown(&error),
    }
}

/// What `pg_database` says of one database, in words.
async fn locale(control: &Control, name: &str) -> Result<Option<String>, tokio_postgres::Error> {
    let query = "SELECT format('encoding %s, collation %s, ctype %s', pg_encoding_to_char(encoding), datcollate, datctype) \
                 FROM pg_database WHERE datname::text = $1";
    Ok(control.query_opt(query, &[&name]).await?.map(|row| row.get(0)))
}

async fn target_database(preflight: &Preflight<'_>, name: &str, source: &Control, target: &Control) -> Vec<RuleResult> {
    let rule = |code| Rule::new(code, Level::Database(name.to_owned()));
    let empty = rule("target_empty")
        .why("rows and definitions that are there already would be mixed with those of the source")
        .fix(format!(
            "DROP DATABASE {} on the target, or create the migration with --overwrite-target",
            quote_ident(name)
        ));
    let same = rule("encoding")
        .why("text must mean, and sort, the same on both servers")
        .fix(format!("DROP DATABASE {} on the target: it is then made like the source's", quote_ident(name)));
    let (wanted, found) = match (locale(source, name).await, locale(target, name).await) {
        (Ok(wanted), Ok(found)) => (wanted.unwrap_or_default(), found),
        (Err(error), _) | (_, Err(error)) => return vec![same.unknown(&error)],
    };
    let Some(found) = found else {
        return vec![empty.succeeded(), new_database(name, source, target).await];
    };
    if preflight.overwrite_target {
        let evidence = format!("the target's database {} will be dropped", quote_ident(name));
        return vec![empty.answer(Outcome::Warning, vec![evidence]), new_database(name, source, target).await];
    }
    let same = same.expect(found == wanted, Outcome::Failed, format!("source: {wanted}; target: {found}"));
    let query = format!(
        "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE {OURS} AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass \
         AND d.objid = c.oid AND d.deptype = 'e') \
         UNION ALL SELECT 'large object ' || oid FROM pg_largeobject_metadata ORDER BY 1"
    );
    let empty = match preflight.target.control(name, "validation").await {
        Err(error) => empty.failed(vec![error.to_string()]),
        Ok(session) => match column(&session, &query, &[]).await {
            Ok(found) => empty.unless_any(Outcome::Failed, found),
            Err(error) => empty.unknown(&error),
        },
    };
    vec![empty, same]
}

/// The database will be made: may it be, and does the target know the locale?
async fn new_database(name: &str, source: &Control, target: &Control) -> RuleResult {
    let rule = Rule::new("create_database", Level::Database(name.to_owned()))
        .why("the database is made on the target with the source's locale")
        .fix("ALTER ROLE … CREATEDB for the target's login role; install the locale on the target's host");
    let wanted = "SELECT datcollate::text, datctype::text FROM pg_database WHERE datname::text = $1";
    // initdb imports the locales of its host; `C.UTF-8` and `C.utf8` are the same one.
    let known = "SELECT EXISTS (SELECT FROM pg_collation WHERE lower(replace(collcollate, '-', '')) = \
                 lower(replace($1, '-', ''))) OR $1 IN ('C', 'POSIX') OR EXISTS (SELECT FROM pg_database \
                 WHERE lower(replace(datcollate, '-', '')) = lower(replace($1, '-', '')))";
    let read = async {
        let may: bool = target
            .query_one("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user", &[])
            .await?
            .get(0);
        let row = source.query_one(wanted, &[&name]).await?;
        let mut unknown = Vec::new();
        for locale in [row.get::<_, String>(0), row.get(1)] {
            if !target.query_one(known, &[&locale]).await?.get::<_, bool>(0) {
                unknown.push(format!("the target seems not to have the locale {locale}"));
            }
        }
        Ok::<(bool, Vec<String>), tokio_postgres::Error>((may, unknown))
    };
    match read.await {
        Ok((false, _)) => rule.failed(vec!["the target's login role may not create databases".to_owned()]),
        Ok((true, unknown)) => rule.unless_any(Outcome::Warning, unknown),
        Err(error) => rule.unknown(&error),
    }
}

async fn identities(preflight: &Preflight<'_>, name: &str, session: &Control) -> RuleResult {
    let rule = Rule::new("replica_identity", Level::Database(name.to_owned()))
        .why("UPDATE and DELETE of a published table without a replica identity fail in the application")
        .fix("add primary keys; with migration.without_identity = \"full\" these tables are set to REPLICA IDENTITY FULL \
              meanwhile");
    match identity::plan(session, preflight.config.migration.without_identity).await {
        Ok(plan) => {
            let refused = plan.iter().any(|table| table.remedy == Remedy::Refuse);
            let tables =
                plan.iter().filter(|table| table.remedy != Remedy::Nothing).map(|table| table.table.to_string());
            rule.unless_any(if refused { Outcome::Failed } else { Outcome::Warning }, tables.collect())
        }
        Err(error) => rule.unknown(&error),
    }
}

/// What no stream carries is carried inside the pause, if it is small enough.
async fn unstreamed(preflight: &Preflight<'_>, name: &str, session: &Control) -> Vec<RuleResult> {
    let limit = preflight.config.cutover.max_unstreamed_bytes;
    let rule = |code| {
        Rule::new(code, Level::Database(name.to_owned()))
            .why(
                "no stream carries them: they are carried with the copy, and inside the pause of the cutover once more where \
                 they differ, which makes it longer; a cutover refuses more than max_unstreamed of them in a database",
            )
            .fix(format!(
                "raise [cutover] max_unstreamed (now {}) and max_pause, or make them smaller: ALTER TABLE … SET LOGGED, \
                 lo_unlink and VACUUM FULL pg_largeobject",
                format_size(limit)
            ))
    };
    let (tables, objects) = (rule("unlogged_tables"), rule("large_objects"));
    let weight = match unstreamed::weigh(session).await {
        Ok(weight) => weight,
        Err(error) => return vec![tables.unknown(&error), objects.unknown(&error)],
    };
    // Both together have to fit; the operator sees both sizes.
    let fits = preflight.mode == Mode::Offline || weight.must_fit(limit).is_ok();
    let outcome = if fits { Outcome::Warning } else { Outcome::Failed };
    let kilobytes = |bytes: u64| format!("{} kB", bytes.div_ceil(1024));
    let found = weight.tables.iter().map(|(table, bytes)| format!("{table}, {}", kilobytes(*bytes))).collect();
    let count = weight.large_objects;
    let large_objects = format!("{count} large objects, {}", kilobytes(weight.large_object_bytes));
    let large_objects = (count > 0).then_some(large_objects);
    vec![tables.unless_any(outcome, found), objects.unless_any(outcome, large_objects.into_iter().collect())]
}

async fn extensions(name: &str, session: &Control, target: &Control) -> RuleResult {
    let rule = Rule::new("extensions", Level::Database(name.to_owned()))
        .why("definitions that use an extension need it on the target")
        .fix("install the extension's package on the target's host (managed services: add it to the list of allowed ones)");
    let used = "SELECT extname::text, extversion FROM pg_extension ORDER BY 1";
    let there = "SELECT name::text, default_version FROM pg_available_extensions";
    let read = async {
        let there: HashMap<String, Option<String>> =
            target.query(there, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
        let (mut missing, mut other) = (Vec::new(), Vec::new());
        for row in session.query(used, &[]).await? {
            let (extension, version): (String, String) = (row.get(0), row.get(1));
            match there.get(&extension) {
                None => missing.push(format!("{extension} {version}")),
                Some(Some(default)) if *default != version => {
                    other.push(format!("{extension}: {version} on the source, {default} on the target"));
                }
                Some(_) => {}
            }
        }
        Ok::<(Vec<String>, Vec<String>), tokio_postgres::Error>((missing, other))
    };
    match read.await {
        // A newer version is what a newer major has; it is worth knowing and nothing more.
        Ok((missing, other)) if missing.is_empty() => rule.noted(other),
        Ok((missing, _)) => rule.failed(missing),
        Err(error) => rule.unknown(&error),
    }
}

async fn tablespaces(name: &str, session: &Control, target: &Control) -> RuleResult {
    let rule = Rule::new("tablespaces", Level::Database(name.to_owned()))
        .why("definitions name the tablespaces that their tables and indexes are in")
        .fix("CREATE TABLESPACE … with the same names on the target");
    let used = "SELECT DISTINCT t.spcname::text FROM pg_tablespace t JOIN pg_class c ON c.reltablespace = t.oid \
                WHERE t.spcname !~ '^pg_' ORDER BY 1";
    let read = async {
        let there = column(target, "SELECT spcname::text FROM pg_tablespace", &[]).await?;
        let used = column(session, used, &[]).await?;
        Ok::<Vec<String>, tokio_postgres::Error>(used.into_iter().filter(|space| !there.contains(space)).collect())
    };
    match read.await {
        Ok(missing) => rule.unless_any(Outcome::Failed, missing),
        Err(error) => rule.unknown(&error),
    }
}
