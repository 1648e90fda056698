//! The configuration as a list of keys and values: what `SHOW CONFIG` prints and what a reload compares.
//!
//! Secrets appear only as set or not set.

use super::units::{format_duration, format_size};
use super::*;

/// One key with its value in force.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Setting {
    /// Section of the file.
    pub section: &'static str,
    /// Key in the section.
    pub key: &'static str,
    /// Value in the notation of the file; empty when not set.
    pub value: String,
    /// Whether a reload applies a change.
    pub live: Live,
}

/// Whether a changed value takes effect without a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Live {
    /// `RELOAD` or SIGHUP applies it.
    Reload,
    /// The daemon has to be restarted.
    Restart,
}

/// What a reload did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct Changes {
    /// `section.key` of what is in force now.
    pub applied: Vec<String>,
    /// `section.key` of what waits for a restart.
    pub needs_restart: Vec<String>,
}

impl Config {
    /// Every key in the order of the example file.
    pub fn settings(&self) -> Vec<Setting> {
        use Live::{Reload, Restart};
        let mut list = Vec::new();
        let mut add = |section, key, value, live| list.push(Setting { section, key, value, live });
        let path = |path: Option<&PathBuf>| path.map(|path| path.display().to_string()).unwrap_or_default();
        let address = |address: Option<SocketAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        let listen = &self.listen;
        add("listen", "address", address(listen.address), Restart);
        add("listen", "unix_socket_dir", path(listen.unix_socket_dir.as_ref()), Restart);
        let tls = listen.tls.as_ref();
        add("listen", "tls_certificate", path(tls.map(|tls| &tls.certificate)), Reload);
        add("listen", "tls_key", path(tls.map(|tls| &tls.key)), Reload);
        add("listen", "tls_required", tls.is_some_and(|tls| tls.required).to_string(), Reload);
        let min_version = tls.map_or(TlsVersion::Tls12, |tls| tls.min_version);
        add("listen", "tls_min_version", min_version.as_str().to_owned(), Reload);
        add("listen", "tls_client_ca", path(tls.and_then(|tls| tls.client_ca.as_ref())), Reload);
        let asked = tls.map_or(ClientCertificates::Off, |tls| tls.client_certificates);
        add("listen", "tls_client_cert", asked.as_str().to_owned(), Reload);
        let balancers: Vec<_> = listen.proxy_protocol_from.iter().map(Network::to_string).collect();
        add("listen", "proxy_protocol_from", balancers.join(","), Reload);
        add("listen", "replication", listen.replication.as_str().to_owned(), Restart);
        add("listen", "takeover_socket", path(listen.takeover_socket.as_ref()), Restart);
        for (key, value) in listen.tcp.pairs() {
            add("listen", key, value, Restart);
        }
        add("listen", "workers", listen.workers.to_string(), Restart);
        add("listen", "io_uring", listen.io_uring.to_string(), Restart);
        add("control", "database", self.control.database.clone(), Restart);
        let fence = if self.control.fence == FencePolicy::Hard { "hard" } else { "soft" };
        add("control", "fence", fence.to_owned(), Restart);
        for (section, server) in [("source", &self.source), ("target", &self.target)] {
            let certificate = server.client_certificate.as_ref();
            add(section, "host", server.host.clone(), Restart);
            add(section, "port", server.port.to_string(), Restart);
            add(section, "user", server.user.clone(), Restart);
            add(section, "password", hidden(server.password.as_ref()), Restart);
            add(section, "sslmode", server.sslmode.as_str().to_owned(), Restart);
            add(section, "sslrootcert", path(server.sslrootcert.as_ref()), Restart);
            add(section, "sslcert", path(certificate.map(|(certificate, _)| certificate)), Restart);
            add(section, "sslkey", path(certificate.map(|(_, key)| key)), Restart);
            add(section, "connect_timeout", format_duration(server.connect_timeout), Restart);
            add(section, "stall_timeout", format_duration(server.stall_timeout), Restart);
            for (key, value) in server.tcp.pairs() {
                add(section, key, value, Restart);
            }
            add(section, "kind", server.kind.as_str().to_owned(), Restart);
        }
        let auth = &self.auth;
        add("auth", "method", auth.method.as_str().to_owned(), Reload);
        add("auth", "hba_file", path(auth.hba_file.as_ref()), Reload);
        add("auth", "ident_file", path(auth.ident_file.as_ref()), Reload);
        add("auth", "users_file", path(auth.users_file.as_ref()), Reload);
        add("auth", "auth_query", auth.auth_query.clone(), Reload);
        add("auth", "auth_database", auth.auth_database.clone().unwrap_or_default(), Reload);
        add("auth", "verifier_cache", format_duration(auth.verifier_cache), Reload);
        let pool = &self.pool;
        add("pool", "mode", pool.mode.as_str().to_owned(), Restart);
        for (key, number) in [
            ("default_pool_size", pool.default_pool_size),
            ("min_pool_size", pool.min_pool_size),
            ("reserve_pool_size", pool.reserve_pool_size),
            ("max_db_connections", pool.max_db_connections),
            ("max_user_connections", pool.max_user_connections),
            ("max_prepared_statements", pool.max_prepared_statements),
            ("max_client_statements", pool.max_client_statements),
        ] {
            add("pool", key, number.to_string(), Restart);
        }
        add("pool", "max_client_statements_size", format_size(pool.max_client_statement_bytes), Restart);
        for (key, time) in [
            ("reserve_pool_timeout", pool.reserve_pool_timeout),
            ("server_lifetime", pool.server_lifetime),
            ("server_idle_timeout", pool.server_idle_timeout),
            ("server_linger", pool.server_linger),
            ("server_check_delay", pool.server_check_delay),
        ] {
            add("pool", key, format_duration(time), Restart);
        }
        add("pool", "server_check_query", pool.server_check_query.clone(), Restart);
        add("pool", "server_reset_query", pool.server_reset_query.clone(), Restart);
        add("pool", "database", super::pool::describe(&pool.databases), Restart);
        add("pool", "user", super::pool::describe(&pool.users), Restart);
        add("pool", "server_reset_query_always", pool.server_reset_query_always.to_string(), Restart);
        let limits = &self.limits;
        add("limits", "max_client_connections", limits.max_client_connections.to_string(), Reload);
        add("limits", "reserved_admin_connections", limits.reserved_admin_connections.to_string(), Reload);
        add("limits", "max_user_connections", limits.max_user_connections.to_string(), Reload);
        add("limits", "max_database_connections", limits.max_database_connections.to_string(), Reload);
        add("limits", "max_address_connections", limits.max_address_connections.to_string(), Reload);
        add("limits", "client_login_timeout", format_duration(limits.client_login_timeout), Reload);
        for (key, value) in limits.timeouts.pairs() {
            add("limits", key, format_duration(value), Reload);
        }
        add("limits", "shadow_connections", limits.shadow_connections.to_string(), Reload);
        add("limits", "resume_rate", limits.resume_rate.to_string(), Reload);
        add("limits", "user", limits::describe(&limits.users), Reload);
        add("limits", "database", limits::describe(&limits.databases), Reload);
        add("limits", "max_message", format_size(limits.max_message_bytes), Restart);
        add("limits", "buffer", format_size(limits.buffer_bytes as u64), Restart);
        let migration = &self.migration;
        add("migration", "copy_workers", migration.copy_workers.to_string(), Restart);
        add("migration", "index_workers", migration.index_workers.to_string(), Restart);
        add("migration", "part_size", format_size(migration.part_bytes), Restart);
        add("migration", "maintenance_work_mem", migration.maintenance_work_mem.clone(), Restart);
        let without = if migration.without_identity == WithoutIdentity::Full { "full" } else { "refuse" };
        add("migration", "without_identity", without.to_owned(), Restart);
        let ddl = match migration.ddl {
            Ddl::Refuse => "refuse",
            Ddl::Detect => "detect",
            Ddl::Apply => "apply",
        };
        add("migration", "ddl", ddl.to_owned(), Restart);
        add("migration", "apply_queue", format_size(migration.apply_queue_bytes as u64), Restart);
        add("migration", "bindir", path(migration.bindir.as_ref()), Restart);
        add("migration", "verify_workers", migration.verify_workers.to_string(), Restart);
        add("migration", "verify_part_size", format_size(migration.verify_part_bytes), Restart);
        add("migration", "verify_load", migration.verify_load_percent.to_string(), Restart);
        add("migration", "verify_load_busy", migration.verify_busy_percent.to_string(), Restart);
        add("migration", "slot_timeout", format_duration(migration.slot_timeout), Restart);
        add("migration", "validation_interval", format_duration(migration.validation_interval), Restart);
        add("migration", "long_transaction", format_duration(migration.long_transaction), Restart);
        add("migration", "lock_timeout", format_duration(migration.lock_timeout), Restart);
        add("migration", "copy_rate", format_size(migration.copy_rate_bytes.unwrap_or(0)), Restart);
        let lag = migration.max_standby_lag.unwrap_or_default();
        add("migration", "max_standby_lag", format_duration(lag), Restart);
        let retained = migration.max_retained_wal_bytes.unwrap_or(0);
        add("migration", "max_retained_wal", format_size(retained), Restart);
        let cutover = &self.cutover;
        add("cutover", "max_pause", format_duration(cutover.max_pause), Reload);
        add("cutover", "drain_timeout", format_duration(cutover.drain_timeout), Reload);
        add("cutover", "max_lag_at_start", format_size(cutover.max_lag_at_start_bytes), Reload);
        add("cutover", "throttle_writes", format_duration(cutover.throttle_writes), Reload);
        add("cutover", "throttle_for", format_duration(cutover.throttle_for), Reload);
        add("cutover", "max_unstreamed", format_size(cutover.max_unstreamed_bytes), Restart);
        add("cutover", "warm_target", format_duration(cutover.warm_target), Restart);
        add("cutover", "require_verified", cutover.require_verified.to_string(), Restart);
        add("cutover", "reads", cutover.reads.as_str().to_owned(), Reload);
        add("cutover", "stragglers", cutover.stragglers.as_str().to_owned(), Reload);
        add("admin", "address", address(self.admin.address), Restart);
        add("admin", "users", self.admin.users.join(","), Reload);
        add("admin", "stats_users", self.admin.stats_users.join(","), Reload);
        add("admin", "hosts", self.admin.hosts.join(","), Reload);
        add("admin", "token", hidden(self.admin.token.as_ref()), Reload);
        add("telemetry", "log", self.telemetry.log.clone(), Reload);
        let format = if self.telemetry.json { "json" } else { "text" };
        add("telemetry", "format", format.to_owned(), Restart);
        list
    }

    /// This configuration with what a reload can change taken from `new`.
    pub fn with_live_changes(&self, new: Self) -> Self {
        let mut config = self.clone();
        config.listen.tls = new.listen.tls;
        config.listen.proxy_protocol_from = new.listen.proxy_protocol_from;
        config.auth = new.auth;
        // What the engine and the coordinator have been started with stays as it is.
        config.cutover = Cutover {
            max_unstreamed_bytes: self.cutover.max_unstreamed_bytes,
            warm_target: self.cutover.warm_target,
            require_verified: self.cutover.require_verified,
            ..new.cutover
        };
        // What a session's memory is made of stays as it is.
        config.limits = Limits {
            max_message_bytes: self.limits.max_message_bytes,
            buffer_bytes: self.limits.buffer_bytes,
            ..new.limits
        };
        config.admin.users = new.admin.users;
        config.admin.stats_users = new.admin.stats_users;
        config.admin.hosts = new.admin.hosts;
        config.admin.token = new.admin.token;
        config.telemetry.log = new.telemetry.log;
        config
    }

    /// Which keys differ in `new`, by what a reload can do about them. Secrets are compared, never shown.
    pub fn changes(&self, new: &Self) -> Changes {
        let mut changes = Changes::default();
        for (old, new) in self.settings().into_iter().zip(new.settings()) {
            if old.value != new.value {
                changes.note(&old);
            }
        }
        let secrets = [
            ("source", "password", self.source.password != new.source.password, Live::Restart),
            ("target", "password", self.target.password != new.target.password, Live::Restart),
            ("admin", "token", self.admin.token != new.admin.token, Live::Reload),
        ];
        for (section, key, differs, live) in secrets {
            if differs {
                changes.note(&Setting { section, key, value: String::new(), live });
            }
        }
        changes
    }
}

impl Changes {
    fn note(&mut self, setting: &Setting) {
        let name = format!("{}.{}", setting.section, setting.key);
        let list = match setting.live {
            Live::Reload => &mut self.applied,
            Live::Restart => &mut self.needs_restart,
        };
        if !list.contains(&name) {
            list.push(name);
        }
    }
}

fn hidden(secret: Option<&Secret>) -> String {
    if secret.is_some() { "(set)".to_owned() } else { String::new() }
}
