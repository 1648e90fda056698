//! The console's `SHOW` verbs that PgBouncer has too, with PgBouncer's column names, so that scripts and exporters
//! written for it work. A column whose value this program does not have is NULL, never an invented number.

use std::collections::{BTreeMap, BTreeSet};

use super::pgbouncer;
use super::table::Kind::{Integer, Text};
use super::table::{Cell, Column, Table};
use super::view::ClientView;
use crate::config::{Config, Live, PoolMode, Setting};
use crate::switch::{Route, ServerRole, Switchboard};

pub(super) const HELP: &[Column] = &[("command", Text), ("description", Text)];
pub(super) const VERSION: &[Column] = &[("version", Text)];
pub(super) const CONFIG: &[Column] = &[("key", Text), ("value", Text), ("default", Text), ("changeable", Text)];
pub(super) const DATABASES: &[Column] = &[
    ("name", Text),
    ("host", Text),
    ("port", Integer),
    ("database", Text),
    ("force_user", Text),
    ("pool_size", Integer),
    ("min_pool_size", Integer),
    ("reserve_pool_size", Integer),
    ("server_lifetime", Integer),
    ("pool_mode", Text),
    ("load_balance_hosts", Text),
    ("max_connections", Integer),
    ("current_connections", Integer),
    ("max_client_connections", Integer),
    ("current_client_connections", Integer),
    ("paused", Integer),
    ("disabled", Integer),
    // What PgBouncer up to 1.23 called reserve_pool_size.
    ("reserve_pool", Integer),
    ("server", Text),
    ("epoch", Integer),
    ("reason", Text),
];
pub(super) const POOLS: &[Column] = &[
    ("database", Text),
    ("user", Text),
    ("cl_active", Integer),
    ("cl_waiting", Integer),
    ("cl_active_cancel_req", Integer),
    ("cl_waiting_cancel_req", Integer),
    ("sv_active", Integer),
    ("sv_active_cancel", Integer),
    ("sv_being_canceled", Integer),
    ("sv_idle", Integer),
    ("sv_used", Integer),
    ("sv_tested", Integer),
    ("sv_login", Integer),
    ("maxwait", Integer),
    ("maxwait_us", Integer),
    ("pool_mode", Text),
    ("load_balance_hosts", Text),
];
/// `SHOW CLIENTS` and `SHOW SERVERS`; the last columns are ours.
pub(super) const SESSIONS: &[Column] = &[
    ("type", Text),
    ("user", Text),
    ("database", Text),
    ("replication", Text),
    ("state", Text),
    ("addr", Text),
    ("port", Integer),
    ("local_addr", Text),
    ("local_port", Integer),
    ("connect_time", Text),
    ("request_time", Text),
    ("wait", Integer),
    ("wait_us", Integer),
    ("close_needed", Integer),
    ("ptr", Text),
    ("link", Text),
    ("remote_pid", Integer),
    ("tls", Text),
    ("application_name", Text),
    ("prepared_statements", Integer),
    ("id", Integer),
    ("server", Text),
    ("in_transaction", Text),
    ("blockers", Text),
    ("pinned", Text),
];
/// Positions in PgBouncer's buffers, which have no like here.
const POSITIONS: &[Column] = &[
    ("recv_pos", Integer),
    ("pkt_pos", Integer),
    ("pkt_remain", Integer),
    ("send_pos", Integer),
    ("send_remain", Integer),
    ("pkt_avail", Integer),
    ("send_avail", Integer),
];
/// `SHOW SOCKETS` and `SHOW ACTIVE_SOCKETS`: all of [`SESSIONS`], then those.
pub(super) const SOCKETS: &[Column] = &{
    let mut columns = [("", Text); SESSIONS.len() + POSITIONS.len()];
    let (sessions, positions) = columns.split_at_mut(SESSIONS.len());
    sessions.copy_from_slice(SESSIONS);
    positions.copy_from_slice(POSITIONS);
    columns
};
pub(super) const LISTS: &[Column] = &[("list", Text), ("items", Integer)];
pub(super) const USERS: &[Column] = &[
    ("name", Text),
    ("pool_size", Integer),
    ("reserve_pool_size", Integer),
    ("pool_mode", Text),
    ("max_user_connections", Integer),
    ("current_connections", Integer),
    ("max_user_client_connections", Integer),
    ("current_client_connections", Integer),
];

const COMMANDS: [(&str, &str); 49] = [
    ("SHOW HELP", "this list"),
    ("SHOW VERSION", "the program's version"),
    ("SHOW CONFIG", "every key of the configuration, and whether RELOAD applies a change"),
    ("SHOW DATABASES", "databases, the server that each runs on, and since which cutover"),
    ("SHOW POOLS", "sessions by database and user"),
    ("SHOW CLIENTS", "client sessions"),
    ("SHOW SERVERS", "the server side of client sessions"),
    ("SHOW STATS | STATS_TOTALS | STATS_AVERAGES", "counters by database: since the start, and in the last minute"),
    ("SHOW TOTALS", "the same for all databases together"),
    ("SHOW SOCKETS | ACTIVE_SOCKETS", "both sides of every session, or of those in a transaction"),
    ("SHOW STATE", "whether everything is paused"),
    ("SHOW MEM", "memory"),
    ("SHOW DNS_HOSTS | DNS_ZONES | PEERS", "empty: names are resolved by the system, and there are no peers"),
    ("SHOW LISTS", "how many of each there are"),
    ("SHOW USERS", "roles that have sessions"),
    ("SHOW STATUS", "where each database runs, and what is inside"),
    ("SHOW MEMBERS", "proxies that take part in a cutover"),
    ("SHOW BLOCKERS", "long transactions, and what a rehearsal has found that keeps sessions from being moved"),
    ("SHOW MIGRATIONS [ACTIVE]", "migrations, newest first"),
    ("SHOW MIGRATION name", "one migration, a row for each database"),
    ("SHOW TABLES name", "its tables: full load, incremental sync, indexes"),
    ("SHOW VALIDATION name", "its premigration validation"),
    ("SHOW VERIFICATION name", "what its last verification found, with the keys of rows that differ"),
    ("SHOW CUTOVER name", "its cutover, running or last"),
    ("SHOW HISTORY name", "how far it was behind over the last minutes"),
    ("SHOW EVENTS", "what has happened since this process began, newest first"),
    ("CHECK", "connect to both servers and look at them"),
    (
        "CREATE MIGRATION name [DATABASES a, b] [MODE online|offline] [OPTION validate|migrate|validate-and-migrate] \
         [OVERWRITE TARGET] [CUTOVER WHEN READY]",
        "begin a migration",
    ),
    (
        "CUTOVER name [DRY RUN] [MAX PAUSE 5s] [DRAIN TIMEOUT 3s] [STRAGGLERS abort|terminate] [FORCE]",
        "switch its databases to the target, or measure the pause",
    ),
    ("ROLLBACK name [the same options]", "switch its databases back to the source, with everything written since"),
    ("COMPLETE name", "give up the way back"),
    ("CANCEL name", "remove what the migration made; the target's data stays"),
    (
        "VERIFY name [REPAIR]",
        "compare source and target, row by row and definition by definition, and write the source's rows over those that differ",
    ),
    (
        "SHADOW name [SHARE 5%] [FOR 10min] | SHADOW name STOP",
        "run a share of the clients' reads on the target too and compare the answers; SHOW SHADOW name: what was found",
    ),
    ("FIX name rule [APPLY]", "show what mends a rule of its validation, or run it where that costs nothing"),
    ("RETRY name", "go on with a migration that failed"),
    ("RELOAD", "read the configuration again"),
    ("PAUSE [database]", "hold new transactions; answers when those that run have ended"),
    ("RESUME [database]", "let them go on"),
    ("DISABLE database", "refuse new sessions"),
    ("ENABLE database", "let them in again"),
    ("RECONNECT [database]", "mark every server connection for replacement when its session ends"),
    ("WAIT_CLOSE [database]", "answers when every marked server connection has been closed"),
    ("KILL pid", "end the session whose server side has this process id"),
    ("KILL database", "end every session of a database, and hold new ones until RESUME"),
    ("KILL_CLIENT id", "end the session with this id"),
    ("SET key = value", "change a setting that needs no restart, until the next RELOAD"),
    (
        "SHUTDOWN [WAIT_FOR_CLIENTS | WAIT_FOR_SERVERS]",
        "end the daemon in good order: at once, when every client has \
      gone, or when every transaction has ended",
    ),
    ("BEGIN, COMMIT, ROLLBACK, SET, RESET, DISCARD", "accepted and without effect, for drivers that send them"),
];

pub(super) fn help() -> Table {
    let rows = COMMANDS.iter().map(|(command, text)| vec![(*command).into(), (*text).into()]).collect();
    Table { columns: HELP, rows }
}

pub(super) fn version() -> Table {
    Table { columns: VERSION, rows: vec![vec![format!("pgcutover {}", env!("CARGO_PKG_VERSION")).into()]] }
}

/// `running` is what this process works with: a key that waits for a restart shows its old value.
pub(super) fn config(running: &Config, defaults: &Config) -> Table {
    let mut table = Table::new(CONFIG);
    let row = |(setting, default): (Setting, Setting)| {
        let own = matches!(setting.key, "host" | "user");
        vec![
            format!("{}.{}", setting.section, setting.key).into(),
            setting.value.into(),
            if own { Cell::Null } else { default.value.into() },
            if setting.live == Live::Reload { "yes" } else { "no" }.into(),
        ]
    };
    let (running, defaults) = (running.settings(), defaults.settings());
    pgbouncer::config_rows(&running, &defaults).into_iter().for_each(|row| table.push(row));
    running.into_iter().zip(defaults).for_each(|pair| table.push(row(pair)));
    table
}

/// Whether a reload applies a change.
pub(super) fn is_live(setting: &Setting) -> bool {
    setting.live == Live::Reload
}

/// `idle`: server connections that no client has now.
pub(super) fn databases(
    config: &Config,
    switchboard: &Switchboard,
    clients: &[ClientView],
    idle: &[ClientView],
) -> Table {
    let mut table = Table::new(DATABASES);
    for database in switchboard.all() {
        let (server, epoch, reason) = match &*database.route() {
            Route::To { server, epoch } => (Some(*server), Some(epoch.0), None),
            Route::Unknown { reason } => (None, None, Some(reason.clone())),
        };
        let address = server.map(|server| match server {
            ServerRole::Source => &config.source,
            ServerRole::Target => &config.target,
        });
        let own = clients.iter().filter(|client| client.database == database.name());
        let sizes = config.pool.sizes(database.name(), "");
        // Sessions with a connection of their own are bounded by the clients alone.
        let is_pooled = sizes.mode == PoolMode::Transaction;
        let of_pool = |size: usize| Cell::from(if is_pooled { size } else { 0 });
        let waiting = idle.iter().filter(|server| server.database == database.name()).count();
        let backends = waiting + own.clone().filter(|client| client.backend_pid.is_some()).count();
        table.push(vec![
            database.name().into(),
            address.map(|server| server.host.clone()).into(),
            address.map(|server| i64::from(server.port)).into(),
            database.name().into(),
            Cell::Null,
            of_pool(sizes.pool_size),
            of_pool(sizes.min_pool_size),
            of_pool(sizes.reserve_pool_size),
            Some(config.pool.server_lifetime.as_secs()).filter(|_| is_pooled).into(),
            sizes.mode.as_str().into(),
            Cell::Null,
            of_pool(sizes.max_db_connections),
            backends.into(),
            config.limits.max_connections_of_database(database.name()).unwrap_or(0).into(),
            own.count().into(),
            i64::from(database.is_fenced()).into(),
            i64::from(database.is_disabled()).into(),
            of_pool(sizes.reserve_pool_size),
            server.map(|server| server.to_string()).into(),
            epoch.into(),
            reason.into(),
        ]);
    }
    table
}

/// `idle`: server connections that no client has now.
pub(super) fn pools(config: &Config, clients: &[ClientView], idle: &[ClientView]) -> Table {
    let mut pools: BTreeMap<(&str, &str), (Vec<&ClientView>, usize)> = BTreeMap::new();
    for client in clients {
        pools.entry((&client.database, &client.user)).or_default().0.push(client);
    }
    for server in idle {
        pools.entry((&server.database, &server.user)).or_default().1 += 1;
    }
    let mut table = Table::new(POOLS);
    for ((database, user), (clients, idle)) in pools {
        let count = |wanted: fn(&ClientView) -> bool| clients.iter().filter(|client| wanted(client)).count();
        let waits = clients.iter().filter(|client| is_waiting(client)).filter_map(|client| client.since_seconds);
        let longest = waits.fold(0.0, f64::max);
        table.push(vec![
            database.into(),
            user.into(),
            count(|client| !is_waiting(client)).into(),
            count(is_waiting).into(),
            0.into(),
            0.into(),
            count(|client| client.backend_pid.is_some() && client.in_transaction).into(),
            0.into(),
            0.into(),
            (idle + count(|client| client.backend_pid.is_some() && !client.in_transaction)).into(),
            0.into(),
            0.into(),
            count(|client| client.backend_pid.is_none() && !client.pooled).into(),
            whole_seconds(longest).into(),
            micros(longest).into(),
            config.pool.sizes(database, user).mode.as_str().into(),
            Cell::Null,
        ]);
    }
    table
}

/// Which side of a session a row is about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

pub(super) fn sessions(config: &Config, clients: &[ClientView], side: Side) -> Table {
    Table { columns: SESSIONS, rows: session_rows(config, clients, side) }
}

/// Both sides of every session; `busy`: of those alone that are in a transaction.
pub(super) fn sockets(config: &Config, clients: &[ClientView], busy: bool) -> Table {
    let chosen: Vec<ClientView> = clients.iter().filter(|client| !busy || client.in_transaction).cloned().collect();
    let sides = [Side::Client, Side::Server].into_iter().flat_map(|side| session_rows(config, &chosen, side));
    let widened = sides.map(|mut row| {
        row.resize(SOCKETS.len(), Cell::Null);
        row
    });
    Table { columns: SOCKETS, rows: widened.collect() }
}

fn session_rows(config: &Config, clients: &[ClientView], side: Side) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    for client in clients.iter().filter(|client| side == Side::Client || client.backend_pid.is_some()) {
        let (kind, (address, port)) = match side {
            Side::Client => ("C", host_and_port(&client.client)),
            Side::Server => {
                let server = if client.server == Some(ServerRole::Target) { &config.target } else { &config.source };
                ("S", (server.host.clone(), Some(i64::from(server.port))))
            }
        };
        let wait = if is_waiting(client) { client.since_seconds.unwrap_or(0.0) } else { 0.0 };
        let tls = match (side, client.tls) {
            (Side::Client, Some(true)) => "yes".into(),
            (Side::Client, Some(false)) => "".into(),
            (Side::Client, None) | (Side::Server, _) => Cell::Null,
        };
        rows.push(vec![
            kind.into(),
            client.user.clone().into(),
            client.database.clone().into(),
            // Which of PgBouncer's two kinds it is, is not kept.
            if client.state == "replication" { Cell::Null } else { "none".into() },
            client.state.clone().into(),
            address.into(),
            port.into(),
            Cell::Null,
            Cell::Null,
            client.connected_at.map(timestamp).into(),
            Cell::Null,
            whole_seconds(wait).into(),
            micros(wait).into(),
            i64::from(client.close_needed).into(),
            match (client.id, client.backend_pid) {
                (0, Some(pid)) => format!("server-{pid}").into(),
                (id, _) => format!("session-{id}").into(),
            },
            client.backend_pid.map(|pid| pid.to_string()).into(),
            client.backend_pid.into(),
            tls,
            client.application_name.clone().into(),
            Cell::Null,
            client.id.into(),
            client.server.map(|server| server.to_string()).into(),
            if client.in_transaction { "yes" } else { "no" }.into(),
            client.blockers.join("; ").into(),
            client.pinned.clone().into(),
        ]);
    }
    rows
}

/// `idle`: server connections that no client has now.
pub(super) fn lists(switchboard: &Switchboard, clients: &[ClientView], idle: &[ClientView]) -> Table {
    let users: BTreeSet<&str> = clients.iter().map(|client| client.user.as_str()).collect();
    let both = || clients.iter().chain(idle);
    let pools: BTreeSet<(&str, &str)> = both().map(|one| (one.database.as_str(), one.user.as_str())).collect();
    let backends = both().filter(|one| one.backend_pid.is_some()).count();
    let items: [(&str, Cell); 14] = [
        ("databases", switchboard.all().len().into()),
        ("users", users.len().into()),
        ("peers", 0.into()),
        ("pools", pools.len().into()),
        ("peer_pools", 0.into()),
        ("free_clients", 0.into()),
        ("used_clients", clients.len().into()),
        ("login_clients", clients.iter().filter(|client| client.state == "login").count().into()),
        ("free_servers", 0.into()),
        ("used_servers", backends.into()),
        ("dns_names", 0.into()),
        ("dns_zones", 0.into()),
        ("dns_queries", 0.into()),
        ("dns_pending", 0.into()),
    ];
    Table { columns: LISTS, rows: items.into_iter().map(|(list, items)| vec![list.into(), items]).collect() }
}

/// `idle`: server connections that no client has now. What a user has no value of its own for is NULL, as in PgBouncer.
pub(super) fn users(config: &Config, clients: &[ClientView], idle: &[ClientView]) -> Table {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for client in clients {
        let count = counts.entry(&client.user).or_default();
        count.0 += 1;
        count.1 += usize::from(client.backend_pid.is_some());
    }
    for server in idle {
        counts.entry(&server.user).or_default().1 += 1;
    }
    let mut table = Table::new(USERS);
    for (user, (sessions, backends)) in counts {
        let own = config.pool.users.get(user);
        table.push(vec![
            user.into(),
            own.and_then(|own| own.default_pool_size).into(),
            own.and_then(|own| own.reserve_pool_size).into(),
            own.and_then(|own| own.mode).map(PoolMode::as_str).into(),
            config.pool.sizes("", user).max_user_connections.into(),
            backends.into(),
            config.limits.max_connections_of_user(user).unwrap_or(0).into(),
            sessions.into(),
        ]);
    }
    table
}

fn is_waiting(client: &ClientView) -> bool {
    client.state == "waiting"
}

#[expect(clippy::cast_possible_truncation, reason = "a wait in seconds; as saturates")]
fn whole_seconds(seconds: f64) -> i64 {
    seconds as i64
}

/// The microseconds beyond the whole seconds.
#[expect(clippy::cast_possible_truncation, reason = "below one million; as saturates")]
fn micros(seconds: f64) -> i64 {
    (seconds.fract() * 1e6) as i64
}

fn host_and_port(address: &str) -> (String, Option<i64>) {
    match address.parse::<std::net::SocketAddr>() {
        Ok(address) => (address.ip().to_string(), Some(address.port().into())),
        Err(_) => (address.to_owned(), None),
    }
}

/// Seconds since the Unix epoch as `2026-11-21 02:11:03 UTC`, the form PgBouncer uses.
#[expect(clippy::cast_possible_truncation, reason = "seconds since 1970; as saturates")]
pub fn timestamp(seconds: f64) -> String {
    let total = seconds.floor() as i64;
    let (days, rest) = (total.div_euclid(86_400), total.rem_euclid(86_400));
    // Days since 1970 to a date of the Gregorian calendar, in years that begin in March: the leap day comes last.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PoolOverride, Server};
    use crate::switch::Epoch;

    #[test]
    fn server_connections_that_nobody_has_now_are_counted() {
        let server = || Server::new("a", 1, "u");
        let mut config = Config::new(server(), server());
        config.pool.mode = PoolMode::Transaction;
        let own = PoolOverride { mode: Some(PoolMode::Session), max_connections: Some(7), ..PoolOverride::default() };
        config.pool.users.insert("bob".to_owned(), own);
        let board = Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) });
        let _known = board.database("shop");
        let of =
            |user: &str| ClientView { user: user.to_owned(), database: "shop".to_owned(), ..ClientView::default() };
        let clients = [ClientView { state: "idle".to_owned(), pooled: true, ..of("ann") }];
        let idle = ["ann", "bob"].map(|user| ClientView { backend_pid: Some(7), pooled: true, ..of(user) });
        let column = |table: &Table, name: &str| -> Vec<Cell> {
            let at = table.columns.iter().position(|(column, _)| *column == name).expect("a column");
            table.rows.iter().map(|row| row[at].clone()).collect()
        };
        let (number, word) = (Cell::Integer, |word: &str| Cell::Text(word.to_owned()));
        assert_eq!(column(&databases(&config, &board, &clients, &idle), "current_connections"), [number(2)]);
        let shown = pools(&config, &clients, &idle);
        assert_eq!(column(&shown, "pool_mode"), [word("transaction"), word("session")]);
        let shown = users(&config, &clients, &idle);
        assert_eq!(column(&shown, "name"), [word("ann"), word("bob")]);
        assert_eq!(column(&shown, "pool_mode"), [Cell::Null, word("session")]);
        assert_eq!(column(&shown, "max_user_connections"), [number(0), number(7)]);
        assert_eq!(column(&shown, "current_connections"), [number(1), number(1)]);
        let shown = lists(&board, &clients, &idle);
        let at = column(&shown, "list").iter().position(|list| *list == word("used_servers")).expect("a row");
        assert_eq!(column(&shown, "items")[at], number(2));
    }

    #[test]
    fn timestamps_are_dates_of_the_calendar() {
        for (seconds, text) in [
            (0.0, "1970-01-01 00:00:00 UTC"),
            (951_782_399.0, "2000-02-28 23:59:59 UTC"),
            (951_782_400.0, "2000-02-29 00:00:00 UTC"),
            (1_795_227_063.5, "2026-11-21 02:11:03 UTC"),
        ] {
            assert_eq!(timestamp(seconds), text);
        }
    }
}
