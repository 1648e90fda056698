//! What operators and scripts know from PgBouncer beside its `SHOW` tables: names of its settings, and the tables that
//! say little here but must be there.

use std::time::Duration;

use super::show;
use super::table::Kind::{Integer, Text};
use super::table::{Cell, Column, Table};
use super::view::ClientView;
use crate::config::units::parse_duration;
use crate::config::{Config, Setting};
use crate::switch::Switchboard;

pub(super) const MEM: &[Column] =
    &[("name", Text), ("size", Integer), ("used", Integer), ("free", Integer), ("memtotal", Integer)];
pub(super) const STATE: &[Column] = &[("key", Text), ("value", Text)];
pub(super) const DNS_HOSTS: &[Column] = &[("hostname", Text), ("ttl", Integer), ("addrs", Text)];
pub(super) const DNS_ZONES: &[Column] = &[("zonename", Text), ("serial", Integer), ("count", Integer)];
pub(super) const PEERS: &[Column] = &[("peer_id", Integer), ("host", Text), ("port", Integer), ("pool_size", Integer)];

/// How PgBouncer writes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notation {
    /// As it is.
    Same,
    /// Seconds without a unit.
    Seconds,
}

/// PgBouncer's settings that have their like here: its name, our section and key.
const SETTINGS: [(&str, &str, &str, Notation); 33] = [
    ("max_client_conn", "limits", "max_client_connections", Notation::Same),
    ("max_user_client_connections", "limits", "max_user_connections", Notation::Same),
    ("max_db_client_connections", "limits", "max_database_connections", Notation::Same),
    ("client_login_timeout", "limits", "client_login_timeout", Notation::Seconds),
    ("client_idle_timeout", "limits", "idle_timeout", Notation::Seconds),
    ("idle_transaction_timeout", "limits", "idle_transaction_timeout", Notation::Seconds),
    ("transaction_timeout", "limits", "transaction_timeout", Notation::Seconds),
    ("query_timeout", "limits", "query_timeout", Notation::Seconds),
    ("query_wait_timeout", "limits", "query_wait_timeout", Notation::Seconds),
    ("tcp_keepcnt", "listen", "tcp_keepalives_count", Notation::Same),
    ("tcp_keepidle", "listen", "tcp_keepalives_idle", Notation::Seconds),
    ("tcp_keepintvl", "listen", "tcp_keepalives_interval", Notation::Seconds),
    ("admin_users", "admin", "users", Notation::Same),
    ("stats_users", "admin", "stats_users", Notation::Same),
    ("auth_dbname", "auth", "auth_database", Notation::Same),
    ("auth_file", "auth", "users_file", Notation::Same),
    ("auth_hba_file", "auth", "hba_file", Notation::Same),
    ("auth_ident_file", "auth", "ident_file", Notation::Same),
    ("auth_query", "auth", "auth_query", Notation::Same),
    ("pool_mode", "pool", "mode", Notation::Same),
    ("default_pool_size", "pool", "default_pool_size", Notation::Same),
    ("min_pool_size", "pool", "min_pool_size", Notation::Same),
    ("reserve_pool_size", "pool", "reserve_pool_size", Notation::Same),
    ("reserve_pool_timeout", "pool", "reserve_pool_timeout", Notation::Seconds),
    ("max_db_connections", "pool", "max_db_connections", Notation::Same),
    ("max_user_connections", "pool", "max_user_connections", Notation::Same),
    ("max_prepared_statements", "pool", "max_prepared_statements", Notation::Same),
    ("server_lifetime", "pool", "server_lifetime", Notation::Seconds),
    ("server_idle_timeout", "pool", "server_idle_timeout", Notation::Seconds),
    ("server_check_delay", "pool", "server_check_delay", Notation::Seconds),
    ("server_check_query", "pool", "server_check_query", Notation::Same),
    ("server_reset_query", "pool", "server_reset_query", Notation::Same),
    ("server_reset_query_always", "pool", "server_reset_query_always", Notation::Same),
];

/// Settings of PgBouncer's that operators change while it runs and that have no like here: whoever sets one must learn
/// that nothing came of it, where a driver's setting is taken without a word.
const UNKNOWN_HERE: [&str; 17] = [
    "application_name_add_host",
    "auth_type",
    "auth_user",
    "autodb_idle_timeout",
    "cancel_wait_timeout",
    "ignore_startup_parameters",
    "log_connections",
    "log_disconnections",
    "log_pooler_errors",
    "log_stats",
    "max_packet_size",
    "server_connect_timeout",
    "server_fast_close",
    "server_login_retry",
    "server_round_robin",
    "stats_period",
    "verbose",
];

/// Rows of `SHOW CONFIG` under PgBouncer's names, for scripts that look for them.
pub(super) fn config_rows(running: &[Setting], defaults: &[Setting]) -> Vec<Vec<Cell>> {
    let value = |list: &[Setting], section: &str, key: &str, notation| {
        let found = list.iter().find(|one| one.section == section && one.key == key)?;
        Some(match notation {
            Notation::Same => found.value.clone(),
            Notation::Seconds => seconds(&found.value),
        })
    };
    let row = |(name, section, key, notation): &(&str, &str, &str, Notation)| {
        let live = running.iter().any(|one| one.section == *section && one.key == *key && show::is_live(one));
        vec![
            (*name).into(),
            value(running, section, key, *notation).into(),
            value(defaults, section, key, *notation).into(),
            if live { "yes" } else { "no" }.into(),
        ]
    };
    SETTINGS.iter().map(row).collect()
}

/// `5s` as `5`, `250ms` as `0.25`.
fn seconds(value: &str) -> String {
    parse_duration(value).map_or_else(|_| value.to_owned(), |duration| duration.as_secs_f64().to_string())
}

/// What `SET key = value` means: our section and key, and the value in our notation; PgBouncer's own key where there is
/// no such thing here. `None`: none of ours and none of PgBouncer's, so a driver is talking to the server that it takes
/// us for.
pub(super) fn setting(key: &str, value: &str) -> Option<(String, String)> {
    if let Some((_, section, key, notation)) = SETTINGS.iter().find(|(name, ..)| name.eq_ignore_ascii_case(key)) {
        let value = match (notation, value.parse::<f64>()) {
            (Notation::Seconds, Ok(seconds)) if (0.0..1e9).contains(&seconds) => {
                format!("{}us", Duration::from_secs_f64(seconds).as_micros())
            }
            (Notation::Same | Notation::Seconds, _) => value.to_owned(),
        };
        return Some((format!("{section}.{key}"), value));
    }
    let key = key.to_ascii_lowercase();
    (key.contains('.') || UNKNOWN_HERE.contains(&key.as_str())).then(|| (key, value.to_owned()))
}

/// `SHOW STATE`
pub(super) fn state(switchboard: &Switchboard) -> Table {
    let databases = switchboard.all();
    let paused = switchboard.is_paused() || (!databases.is_empty() && databases.iter().all(|one| one.is_paused()));
    let word = |yes: bool| if yes { "yes" } else { "no" };
    let rows = [("active", !paused), ("paused", paused), ("suspended", false)];
    Table { columns: STATE, rows: rows.into_iter().map(|(key, yes)| vec![key.into(), word(yes).into()]).collect() }
}

/// `SHOW MEM`: memory of the process, and what the buffers of sessions may take at most.
pub(super) fn mem(config: &Config, clients: &[ClientView]) -> Table {
    let mut table = Table::new(MEM);
    let buffers = (clients.len() * 2).into();
    let most = clients.len() * 2 * config.limits.buffer_bytes;
    table.push(vec!["session_buffers".into(), config.limits.buffer_bytes.into(), buffers, Cell::Null, most.into()]);
    let resident = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok().map(|kilobytes| kilobytes * 1024)
    });
    table.push(vec!["process_resident".into(), Cell::Null, Cell::Null, Cell::Null, resident.into()]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_known_under_both_names() {
        let of = |key, value| setting(key, value).map(|(key, value)| format!("{key}={value}"));
        assert_eq!(of("query_timeout", "1.5").as_deref(), Some("limits.query_timeout=1500000us"));
        assert_eq!(of("Max_Client_Conn", "7").as_deref(), Some("limits.max_client_connections=7"));
        assert_eq!(of("limits.query_timeout", "5s").as_deref(), Some("limits.query_timeout=5s"));
        assert_eq!(of("query_timeout", "5s").as_deref(), Some("limits.query_timeout=5s"));
        assert_eq!(of("default_pool_size", "5").as_deref(), Some("pool.default_pool_size=5"));
        assert_eq!(of("server_idle_timeout", "60").as_deref(), Some("pool.server_idle_timeout=60000000us"));
        assert_eq!(of("Verbose", "1").as_deref(), Some("verbose=1"));
        assert_eq!(of("extra_float_digits", "3"), None);
    }

    #[test]
    fn what_pools_have_is_shown_under_pgbouncers_names() {
        let server = || crate::config::Server::new("a", 1, "u");
        let defaults = Config::new(server(), server());
        let mut running = defaults.clone();
        running.pool.max_user_connections = 7;
        let rows = config_rows(&running.settings(), &defaults.settings());
        for [name, value, default] in [["max_user_connections", "7", "0"], ["server_lifetime", "3600", "3600"]] {
            let row: Vec<Cell> = vec![name.into(), value.into(), default.into(), "no".into()];
            assert!(rows.contains(&row), "{rows:?}");
        }
    }

    #[test]
    fn every_setting_exists_here() {
        let server = || crate::config::Server::new("a", 1, "u");
        let own = Config::new(server(), server()).settings();
        for (name, section, key, notation) in SETTINGS {
            let found = own.iter().find(|one| one.section == section && one.key == key);
            let value = &found.unwrap_or_else(|| panic!("{name}: no [{section}] {key}")).value;
            assert!(notation == Notation::Same || seconds(value).parse::<f64>().is_ok(), "{name}: {value}");
        }
    }
}
