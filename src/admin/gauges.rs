//! Gauges that are read off the live state when somebody scrapes, instead of being kept up to date all the time.

use std::collections::BTreeMap;

use super::view::ClientView;
use crate::config::Config;
use crate::migration::state::State;
use crate::migration::view::MigrationView;
use crate::switch::{Route, ServerRole, Switchboard};
use crate::telemetry::metrics::{BackendState, ClientState, Metrics};

/// Sets every gauge that belongs to routes and sessions, with `idle_servers`, the connections of pools that nobody has.
pub(super) fn set_sessions(
    metrics: &Metrics,
    switchboard: &Switchboard,
    clients: &[ClientView],
    idle_servers: &[ClientView],
) {
    // A database that has gone must not keep its last value.
    metrics.client_connections.reset();
    metrics.server_connections.reset();
    metrics.held_sessions.reset();
    metrics.write_delay_seconds.reset();
    for database in switchboard.all() {
        let name = database.name();
        let own = of(clients, name);
        let servers = [own.clone(), of(idle_servers, name)].concat();
        for state in ClientState::ALL {
            let gauge = metrics.client_connections.with_label_values(&[name, state.as_str()]);
            gauge.set(count(&own, |client| client_state(client) == *state));
        }
        for server in [ServerRole::Source, ServerRole::Target] {
            for state in [BackendState::Idle, BackendState::Active] {
                let labels = [name, role(server), state.as_str()];
                let here = |client: &ClientView| client.server == Some(server) && client.backend_pid.is_some();
                let active = state == BackendState::Active;
                let gauge = metrics.server_connections.with_label_values(&labels);
                gauge.set(count(&servers, |client| here(client) && client.in_transaction == active));
            }
            let labels = [name, role(server), BackendState::Prepared.as_str()];
            let there = |client: &ClientView| client.prepared && client.server == Some(server.other());
            metrics.server_connections.with_label_values(&labels).set(count(&own, there));
        }
        metrics.held_sessions.with_label_values(&[name]).set(count(&own, |client| client.held));
        metrics.write_delay_seconds.with_label_values(&[name]).set(database.write_delay().as_secs_f64());
        metrics.route_epoch.with_label_values(&[name]).set(i64::try_from(database.epoch().0).unwrap_or(i64::MAX));
        let route = database.route();
        for server in [ServerRole::Source, ServerRole::Target] {
            let is_active = matches!(&*route, Route::To { server: active, .. } if *active == server);
            metrics.active_server.with_label_values(&[name, role(server)]).set(i64::from(is_active));
        }
    }
}

fn of<'a>(views: &'a [ClientView], database: &str) -> Vec<&'a ClientView> {
    views.iter().filter(|view| view.database == database).collect()
}

fn count(views: &[&ClientView], wanted: impl Fn(&ClientView) -> bool) -> i64 {
    i64::try_from(views.iter().filter(|view| wanted(view)).count()).unwrap_or(i64::MAX)
}

/// Sets what the configuration allows, which a reload may change.
pub(super) fn set_limits(metrics: &Metrics, config: &Config) {
    metrics.max_client_connections.set(i64::try_from(config.limits.max_client_connections).unwrap_or(i64::MAX));
    metrics.cutover_max_pause_seconds.set(config.cutover.max_pause.as_secs_f64());
}

/// Sets how many sessions could not be moved; `None`: it is not known.
pub(super) fn set_blockers(metrics: &Metrics, blockers: Option<usize>) {
    metrics.cutover_blockers.reset();
    if let Some(count) = blockers {
        metrics.cutover_blockers.with_label_values::<&str>(&[]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

/// Sets the state of each migration; one that is gone has no series. What is known of replication the engine sets itself.
pub(super) fn set_migrations(metrics: &Metrics, migrations: &[MigrationView]) {
    metrics.migration_state.reset();
    metrics.migration_database.reset();
    let states: BTreeMap<&str, State> = State::ALL.iter().map(|state| (state.substate(), *state)).collect();
    for migration in migrations {
        for substate in states.keys() {
            let gauge = metrics.migration_state.with_label_values(&[migration.name.as_str(), substate]);
            gauge.set(i64::from(migration.substate == *substate));
        }
        for database in &migration.databases {
            metrics.migration_database.with_label_values(&[migration.name.as_str(), database.name.as_str()]).set(1);
        }
    }
}

fn client_state(client: &ClientView) -> ClientState {
    match client.state.as_str() {
        "waiting" => ClientState::Waiting,
        _ if client.in_transaction => ClientState::Active,
        _ => ClientState::Idle,
    }
}

fn role(server: ServerRole) -> &'static str {
    match server {
        ServerRole::Source => "source",
        ServerRole::Target => "target",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::Epoch;

    #[test]
    fn who_waits_for_a_pool_is_not_held() {
        let (metrics, board) = (
            Metrics::new().expect("names are distinct"),
            Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) }),
        );
        let _known = board.database("shop");
        let waiting = ClientView { database: "shop".to_owned(), state: "waiting".to_owned(), ..ClientView::default() };
        set_sessions(&metrics, &board, &[waiting.clone(), ClientView { held: true, ..waiting }], &[]);
        assert_eq!(metrics.held_sessions.with_label_values(&["shop"]).get(), 1);
        assert_eq!(metrics.client_connections.with_label_values(&["shop", "waiting"]).get(), 2);
    }

    #[test]
    fn a_connection_that_waits_in_a_pool_is_one_to_its_server_and_of_no_client() {
        let (metrics, board) = (
            Metrics::new().expect("names are distinct"),
            Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) }),
        );
        let _known = board.database("shop");
        let session = ClientView { database: "shop".to_owned(), state: "idle".to_owned(), ..ClientView::default() };
        let server =
            ClientView { server: Some(ServerRole::Source), backend_pid: Some(7), pooled: true, ..session.clone() };
        set_sessions(&metrics, &board, &[session], &[server]);
        let servers = |server, state| metrics.server_connections.with_label_values(&["shop", server, state]).get();
        assert_eq!((servers("source", "idle"), servers("source", "active"), servers("target", "idle")), (1, 0, 0));
        assert_eq!(metrics.client_connections.with_label_values(&["shop", "idle"]).get(), 1);
    }

    #[test]
    fn blockers_that_are_not_known_are_no_number() {
        let metrics = Metrics::new().expect("names are distinct");
        let text = |blockers| {
            set_blockers(&metrics, blockers);
            metrics.render().expect("text")
        };
        assert!(text(Some(3)).contains("\npgcutover_cutover_blockers 3\n"));
        assert!(!text(None).contains("\npgcutover_cutover_blockers"));
    }
}
