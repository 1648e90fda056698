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
const SETTINGS: [(&str, &str, &str, Notation); 14] = [
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
    let mut rows: Vec<_> = SETTINGS.iter().map(row).collect();
    // Server connections of one role are as many as its clients need.
    rows.push(vec!["max_user_connections".into(), "0".into(), "0".into(), "no".into()]);
    rows
}

/// `5s` as `5`, `250ms` as `0.25`.
fn seconds(value: &str) -> String {
    parse_duration(value).map_or_else(|_| value.to_owned(), |duration| duration.as_secs_f64().to_string())
}

/// What `SET key = value` means: our section and key, and the value in our notation. `None`: none of ours and none of
/// PgBouncer's, so a driver is talking to the server that it takes us for.
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
    key.contains('.').then(|| (key.to_ascii_lowercase(), value.to_owned()))
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
        assert_eq!(of("extra_float_digits", "3"), None);
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
