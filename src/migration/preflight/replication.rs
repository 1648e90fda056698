//! Rules about streaming changes. Most are asked again as long as a migration streams, and before its cutover: a source
//! whose operator changes something meanwhile is told before it hurts.

use tokio_postgres::types::ToSql;

use super::definition::{Apply, Definition, Hosted, When};
use super::{Outcome, Rule, RuleResult, Servers, Statement};
use crate::catalog::journal::Side;
use crate::config::{FencePolicy, ServerKind};
use crate::migration::late;

/// What most rules here are.
const STREAMED: Definition = Definition { when: When::Repeatedly, ..Definition::USUAL };

const WAL_LEVEL: Definition = Definition {
    code: "wal_level",
    why: "changes are read from the write-ahead log by logical decoding",
    evidence: "its value",
    fix: "ALTER SYSTEM SET wal_level = logical; then restart the source",
    hosted: Hosted::Words {
        amazon: "set rds.logical_replication = 1 in the parameter group, and reboot the source",
        azure: "set the server parameter wal_level = logical, and restart the source",
        google: "set the flag cloudsql.logical_decoding = on (AlloyDB: alloydb.logical_decoding), which restarts the source",
    },
    apply: Apply::Refused("the source has to be restarted for it"),
    ..STREAMED
};

const SLOTS: Definition = Definition {
    code: "replication_slots",
    why: "each database is streamed through a slot of its own",
    evidence: "how many are free and needed",
    fix: "raise max_replication_slots of the source and restart it, or drop slots that nobody uses",
    hosted: Hosted::Parameter("max_replication_slots"),
    apply: Apply::Refused("the source has to be restarted for it"),
    ..STREAMED
};

const SENDERS: Definition = Definition {
    code: "wal_senders",
    why: "each database is streamed by a walsender of its own",
    evidence: "how many are free and needed",
    fix: "raise max_wal_senders of the source and restart it",
    hosted: Hosted::Parameter("max_wal_senders"),
    apply: Apply::Refused("the source has to be restarted for it"),
    ..STREAMED
};

const REPLICATION: Definition = Definition {
    code: "replication_right",
    why: "a slot is made and read through a replication connection",
    evidence: "what the login role lacks",
    fix: "ALTER ROLE … REPLICATION for the source's login role",
    hosted: Hosted::Words {
        amazon: "GRANT rds_replication TO the source's login role",
        azure: "ALTER ROLE … REPLICATION for the source's login role, as the server's administrator",
        google: "ALTER USER … WITH REPLICATION for the source's login role, as a member of cloudsqlsuperuser",
    },
    apply: Apply::Refused("a role cannot give itself rights: another one has to"),
    ..STREAMED
};

const SLOT_WAL: Definition = Definition {
    code: "slot_wal_size",
    worst: Outcome::Warning,
    why: "a slot that falls further behind than this is invalidated, and the migration begins anew",
    evidence: "max_slot_wal_keep_size",
    fix: "set max_slot_wal_keep_size to -1, or well above what the source writes while it is copied (see the rule forecast)",
    hosted: Hosted::Parameter("max_slot_wal_keep_size"),
    apply: Apply::Refused("what a slot keeps could then fill the source's disk"),
    ..STREAMED
};

const SLOT_IDLE: Definition = Definition {
    code: "slot_idle_timeout",
    worst: Outcome::Warning,
    why: "nobody reads the slot while tables are copied, or while the migration has failed and waits for somebody: after this \
          time it is invalidated, and the migration begins anew",
    evidence: "idle_replication_slot_timeout, which came with PostgreSQL 18",
    fix: "set idle_replication_slot_timeout to 0, or well above the time that the copy takes (see the rule forecast)",
    hosted: Hosted::Parameter("idle_replication_slot_timeout"),
    apply: Apply::Refused("slots that are forgotten could then fill the source's disk"),
    ..STREAMED
};

const SYNC_STANDBYS: Definition = Definition {
    code: "sync_standbys",
    worst: Outcome::Warning,
    why: "whoever comes is then a synchronous standby, our walsenders too: a commit may wait for the other server \
          instead of the standby that is meant, and is acknowledged though that one lacks it",
    evidence: "synchronous_standby_names of the server",
    fix: "name the standbys in synchronous_standby_names in place of *, before the migration begins; what pgcutover \
          opens is called pgcutover/…",
    hosted: Hosted::Parameter("synchronous_standby_names"),
    ..STREAMED
};

const TRUNCATE: Definition = Definition {
    code: "truncate",
    when: When::Before,
    worst: Outcome::Warning,
    why: "PostgreSQL 10 does not stream TRUNCATE: a table truncated meanwhile keeps its rows on the target",
    evidence: "the version of the source",
    fix: "truncate no table between the start of the migration and the cutover; DELETE is streamed",
    ..STREAMED
};

const FENCE_SETTINGS: Definition = Definition {
    code: "fence_settings",
    when: When::RepeatedlyOnline,
    why: "the fence makes databases read-only by default; a setting of a role, or of a role in a database, outranks it",
    evidence: "the roles",
    fix: "ALTER ROLE … [IN DATABASE …] RESET default_transaction_read_only, and set control.fence = \"hard\"; where the role would \
          then be read-only, set it off for the database first, or leave the role to the hard fence",
    apply: Apply::Since(0),
    ..STREAMED
};

const LONG_TRANSACTIONS: Definition = Definition {
    code: "long_transactions",
    worst: Outcome::Warning,
    why: "making a slot waits for every transaction that writes, in any database of the source, and so does a cutover",
    evidence: "their process ids, names and ages",
    fix: "let them end, or end them with pg_terminate_backend(pid); GRANT pg_monitor TO the source's login role, to see those of \
          other roles",
    apply: Apply::Refused("the application would lose the transaction"),
    ..STREAMED
};

const PREPARED: Definition = Definition {
    code: "prepared_transactions",
    worst: Outcome::Warning,
    why: "making a slot, and taking the first snapshot, waits until they are committed or rolled back",
    evidence: "their names, databases and ages",
    fix: "COMMIT PREPARED or ROLLBACK PREPARED those that their owner has forgotten",
    apply: Apply::Refused("what they did would be lost"),
    ..STREAMED
};

const WAY_BACK: Definition = Definition {
    code: "way_back",
    when: When::RepeatedlyOnline,
    worst: Outcome::Warning,
    why: "a rollback brings back what was written after the cutover, which is streamed from the target: without it the cutover \
          cannot be rolled back",
    evidence: "what the target lacks: wal_level, replication slots, walsenders or the replication right; or that the source's \
               login role may not set session_replication_role",
    fix: "ALTER SYSTEM SET wal_level = logical, raise max_replication_slots and max_wal_senders of the target, and restart it; \
          ALTER ROLE … REPLICATION for its login role; GRANT SET ON PARAMETER session_replication_role TO the source's (from \
          PostgreSQL 15 on)",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "set rds.logical_replication = 1 in the target's parameter group, and reboot it; GRANT rds_replication TO its login role",
        azure: "set the target's server parameter wal_level = logical, and restart it; ALTER ROLE … REPLICATION for its login role",
        google: "set the target's flag cloudsql.logical_decoding = on (AlloyDB: alloydb.logical_decoding); ALTER USER … WITH \
                 REPLICATION for its login role",
    },
    apply: Apply::Refused("the target has to be restarted for it"),
    ..STREAMED
};

pub(super) const DEFINITIONS: [&Definition; 12] = [
    &WAL_LEVEL,
    &SLOTS,
    &SENDERS,
    &REPLICATION,
    &SLOT_WAL,
    &SLOT_IDLE,
    &SYNC_STANDBYS,
    &TRUNCATE,
    &FENCE_SETTINGS,
    &LONG_TRANSACTIONS,
    &WAY_BACK,
    &PREPARED,
];

/// Whether the login role may stream, here and at Amazon's.
const MAY_REPLICATE: &str = "\
SELECT rolreplication OR rolsuper OR EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'rds_replication'
       AND pg_has_role(r.oid, 'MEMBER')) FROM pg_roles WHERE rolname = current_user";

impl Servers<'_> {
    /// Every rule of this file that is asked now.
    pub(super) async fn replication(&self) -> Vec<RuleResult> {
        let mut results = Vec::new();
        for definition in DEFINITIONS.into_iter().filter(|definition| self.asks(definition)) {
            results.push(match definition.code {
                "wal_level" => self.wal_level().await,
                "replication_slots" => self.slots().await,
                "wal_senders" => self.senders().await,
                "replication_right" => self.replication_right().await,
                "slot_wal_size" => self.slot_limit(&SLOT_WAL, "max_slot_wal_keep_size", "-1").await,
                "slot_idle_timeout" => self.slot_limit(&SLOT_IDLE, "idle_replication_slot_timeout", "0").await,
                "sync_standbys" => self.sync_standbys().await,
                "truncate" => self.truncate(),
                "fence_settings" => self.fence_settings().await,
                "long_transactions" => self.long_transactions().await,
                "way_back" => self.way_back().await,
                _ => self.prepared().await,
            });
        }
        results
    }

    async fn wal_level(&self) -> RuleResult {
        let rule = self.rule(&WAL_LEVEL).mended_by(self.on_source("ALTER SYSTEM SET wal_level = logical"));
        match self.source.query_one("SELECT current_setting('wal_level')", &[]).await {
            Ok(row) => {
                let level: String = row.get(0);
                rule.expect(level == "logical", Outcome::Failed, format!("wal_level = {level}"))
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn slots(&self) -> RuleResult {
        let used = "SELECT count(*) FROM pg_replication_slots WHERE slot_name <> ALL ($1)";
        self.enough(&SLOTS, "max_replication_slots", used).await
    }

    /// Unlike `pg_stat_activity`, `pg_stat_replication` names the process of every walsender to every role.
    async fn senders(&self) -> RuleResult {
        let used = "SELECT count(*) FROM pg_stat_replication WHERE pid NOT IN \
                    (SELECT active_pid FROM pg_replication_slots WHERE slot_name = ANY ($1) AND active_pid IS NOT NULL)";
        self.enough(&SENDERS, "max_wal_senders", used).await
    }

    /// `used` counts what others than this migration use.
    async fn enough(&self, definition: &'static Definition, parameter: &str, used: &str) -> RuleResult {
        let rule = self.rule(definition);
        let needed = i64::try_from(self.preflight.databases.len()).unwrap_or(i64::MAX);
        let query = format!("SELECT current_setting('{parameter}')::int8, ({used})");
        match self.source.query_one(&query, &[&self.preflight.slots]).await {
            Ok(row) => {
                let (most, used): (i64, i64) = (row.get(0), row.get(1));
                let raise = format!("ALTER SYSTEM SET {parameter} = {}", used.saturating_add(needed).max(10));
                let evidence = format!("{} free, {needed} needed", most - used);
                rule.mended_by(self.on_source(raise)).expect(most - used >= needed, Outcome::Failed, evidence)
            }
            Err(error) => rule.unknown(&error),
        }
    }

    async fn replication_right(&self) -> RuleResult {
        let grant = self.replication_grant(Side::Source);
        let rule = self.rule(&REPLICATION).mended_by(self.on_source(grant));
        match self.source.query_one(MAY_REPLICATE, &[]).await {
            Ok(row) if row.get(0) => rule.succeeded(),
            Ok(_) => rule.failed(vec!["the login role has neither REPLICATION nor SUPERUSER".to_owned()]),
            Err(error) => rule.unknown(&error),
        }
    }

    fn replication_grant(&self, side: Side) -> String {
        let login = self.login(side);
        match self.preflight.kind(side) {
            ServerKind::AwsRds | ServerKind::AwsAurora => format!("GRANT rds_replication TO {login}"),
            _ => format!("ALTER ROLE {login} REPLICATION"),
        }
    }

    async fn way_back(&self) -> RuleResult {
        let rule = self.rule(&WAY_BACK);
        let needed = i64::try_from(self.preflight.databases.len()).unwrap_or(i64::MAX);
        let query = format!(
            "SELECT current_setting('wal_level'), ({MAY_REPLICATE}), \
             current_setting('max_replication_slots')::int8, (SELECT count(*) FROM pg_replication_slots), \
             current_setting('max_wal_senders')::int8, (SELECT count(*) FROM pg_stat_replication)"
        );
        let row = match self.target.query_one(&query, &[]).await {
            Ok(row) => row,
            Err(error) => return rule.unknown(&error),
        };
        let (mut lacking, mut statements) = (Vec::new(), Vec::new());
        let level: &str = row.get(0);
        if level != "logical" {
            lacking.push(format!("wal_level = {level}"));
            statements.extend(self.on_target("ALTER SYSTEM SET wal_level = logical"));
        }
        if !row.get::<_, bool>(1) {
            lacking.push("the login role has neither REPLICATION nor SUPERUSER".to_owned());
            statements.extend(self.on_target(self.replication_grant(Side::Target)));
        }
        for (parameter, most, used) in [
            ("max_replication_slots", row.get::<_, i64>(2), row.get::<_, i64>(3)),
            ("max_wal_senders", row.get(4), row.get(5)),
        ] {
            if most - used < needed {
                lacking.push(format!("{parameter}: {} free, {needed} needed", most - used));
                let enough = used.saturating_add(needed).max(10);
                statements.extend(self.on_target(format!("ALTER SYSTEM SET {parameter} = {enough}")));
            }
        }
        match late::may_replicate_silently(self.source).await {
            Ok(true) => {}
            Ok(false) => {
                lacking.push("the source's login role may not set session_replication_role".to_owned());
                statements.extend(self.on_source(self.replica_role_grant(Side::Source)));
            }
            Err(error) => return rule.unknown(&error),
        }
        rule.mended_by(statements).unless_any(Outcome::Warning, lacking)
    }

    /// A parameter that bounds what slots keep, and its value that does not. Older versions have no such bound.
    async fn slot_limit(&self, definition: &'static Definition, parameter: &str, never: &str) -> RuleResult {
        let mut lift = self.on_source(format!("ALTER SYSTEM SET {parameter} = {never}"));
        lift.extend(self.on_source("SELECT pg_catalog.pg_reload_conf()"));
        let rule = self.rule(definition).mended_by(lift);
        match self.source.query_one("SELECT current_setting($1, true)", &[&parameter]).await {
            Ok(row) => match row.get::<_, Option<&str>>(0) {
                Some(value) => rule.expect(value == never, Outcome::Warning, format!("{parameter} = {value}")),
                None => rule.succeeded(),
            },
            Err(error) => rule.unknown(&error),
        }
    }

    /// A star stands for a standby of any name, quoted or not (`SyncRepGetStandbyPriority` in PostgreSQL's syncrep.c),
    /// and a walsender of logical replication counts as one. That of the stream back runs on the target.
    async fn sync_standbys(&self) -> RuleResult {
        let rule = self.rule(&SYNC_STANDBYS);
        let mut anybody = Vec::new();
        for (server, control) in [("source", self.source), ("target", self.target)] {
            let row = match control.query_one("SELECT current_setting('synchronous_standby_names')", &[]).await {
                Ok(row) => row,
                Err(error) => return rule.unknown(&error),
            };
            let names: &str = row.get(0);
            if names.split(|c: char| c.is_whitespace() || "(),\"".contains(c)).any(|name| name == "*") {
                anybody.push(format!("{server}: synchronous_standby_names = {names}"));
            }
        }
        rule.unless_any(Outcome::Warning, anybody)
    }

    fn truncate(&self) -> RuleResult {
        let version = self.source.version_num();
        let evidence = format!("server_version_num {version}");
        self.rule(&TRUNCATE).expect(version >= 110_000, Outcome::Warning, evidence)
    }

    async fn fence_settings(&self) -> RuleResult {
        let rule = self.rule(&FENCE_SETTINGS);
        // Whoever has `off` over an `on` would be read-only without it.
        let query = "WITH setting AS (SELECT s.setrole, s.setdatabase, split_part(u, '=', 2)::boolean AS read_only \
                     FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) u \
                     WHERE lower(split_part(u, '=', 1)) = 'default_transaction_read_only') \
                     SELECT format('role %I%s%s', r.rolname, ' in database ' || quote_ident(d.datname), \
                     CASE WHEN b.needed THEN ', which would be read-only without it' END), \
                     CASE WHEN NOT b.needed THEN format('ALTER ROLE %I%s RESET default_transaction_read_only', r.rolname, \
                     ' IN DATABASE ' || quote_ident(d.datname)) END FROM setting s \
                     JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase \
                     CROSS JOIN LATERAL (SELECT $1::boolean OR EXISTS (SELECT FROM setting o WHERE o.read_only \
                     AND o.setrole IN (0, s.setrole) AND (s.setdatabase = 0 OR o.setdatabase IN (0, s.setdatabase))) AS needed) b \
                     WHERE NOT s.read_only ORDER BY 1";
        let outcome = match self.preflight.config.control.fence {
            FencePolicy::Hard => Outcome::Warning,
            FencePolicy::Soft => Outcome::Failed,
        };
        match self.parameters(self.preflight.source).await {
            Ok(all) => {
                let read_only =
                    all.get("default_transaction_read_only").is_some_and(|parameter| parameter.value == "on");
                self.found(rule, outcome, query, &[&read_only]).await
            }
            Err(error) => rule.unknown(&*error),
        }
    }

    async fn long_transactions(&self) -> RuleResult {
        // Of sessions of other roles only pg_monitor is shown more than who they are.
        let query = "SELECT format('pid %s, %s, database %s, for %s', pid, coalesce(nullif(application_name, ''), 'no name'), \
                     datname, date_trunc('second', now() - xact_start)), format('SELECT pg_catalog.pg_terminate_backend(%s)', pid) \
                     FROM pg_stat_activity WHERE xact_start < now() - $1::float8 * interval '1 second' AND backend_type = 'client backend' \
                     AND application_name !~ '^pgcutover/' UNION ALL \
                     SELECT 'could not be evaluated: when transactions of other roles began is not shown to the login role', \
                     format('GRANT pg_monitor TO %I', current_user) WHERE EXISTS (SELECT FROM pg_stat_activity \
                     WHERE backend_type IS NULL AND datid IS NOT NULL AND usesysid IS NOT NULL)";
        let seconds = self.preflight.config.migration.long_transaction.as_secs_f64();
        self.found(self.rule(&LONG_TRANSACTIONS), Outcome::Warning, query, &[&seconds]).await
    }

    async fn prepared(&self) -> RuleResult {
        let rule = self.rule(&PREPARED);
        let query = "SELECT format('%s in database %s, since %s', gid, database, date_trunc('second', prepared)), database::text, \
                     format('ROLLBACK PREPARED %L', gid) FROM pg_prepared_xacts ORDER BY prepared";
        match self.source.query(query, &[]).await {
            Ok(rows) => {
                let statement = |row: &tokio_postgres::Row| Statement {
                    server: Side::Source,
                    database: row.get(1),
                    sql: row.get(2),
                };
                let found = rows.iter().map(|row| row.get(0)).collect();
                rule.mended_by(rows.iter().map(statement).collect()).unless_any(Outcome::Warning, found)
            }
            Err(error) => rule.unknown(&error),
        }
    }

    /// A query for evidence and the statement against it, or null.
    async fn found(&self, rule: Rule, outcome: Outcome, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> RuleResult {
        match self.source.query(query, parameters).await {
            Ok(rows) => {
                let statements = rows.iter().filter_map(|row| row.get::<_, Option<String>>(1));
                let statements = statements.map(|sql| self.statement(Side::Source, sql));
                let found = rows.iter().map(|row| row.get(0)).collect();
                rule.mended_by(statements.collect()).unless_any(outcome, found)
            }
            Err(error) => rule.unknown(&error),
        }
    }
}
