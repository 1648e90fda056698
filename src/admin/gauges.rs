//! Gauges that are read off the live state when somebody scrapes, instead of being kept up to date all the time.

use std::collections::BTreeMap;

use super::view::ClientView;
use crate::migration::state::State;
use crate::migration::view::MigrationView;
use crate::switch::{Route, ServerRole, Switchboard};
use crate::telemetry::metrics::{BackendState, ClientState, Metrics};

/// Sets every gauge that belongs to routes and sessions.
pub(super) fn set_sessions(metrics: &Metrics, switchboard: &Switchboard, clients: &[ClientView]) {
    // A database that has gone must not keep its last value.
    metrics.client_connections.reset();
    metrics.server_connections.reset();
    metrics.held_sessions.reset();
    for database in switchboard.all() {
        let name = database.name();
        let own: Vec<&ClientView> = clients.iter().filter(|client| client.database == name).collect();
        let count = |wanted: &dyn Fn(&ClientView) -> bool| {
            i64::try_from(own.iter().filter(|client| wanted(client)).count()).unwrap_or(i64::MAX)
        };
        for state in ClientState::ALL {
            let gauge = metrics.client_connections.with_label_values(&[name, state.as_str()]);
            gauge.set(count(&|client| client_state(client) == *state));
        }
        for server in [ServerRole::Source, ServerRole::Target] {
            for state in [BackendState::Idle, BackendState::Active] {
                let labels = [name, role(server), state.as_str()];
                let here = |client: &ClientView| client.server == Some(server) && client.backend_pid.is_some();
                let active = state == BackendState::Active;
                let gauge = metrics.server_connections.with_label_values(&labels);
                gauge.set(count(&|client| here(client) && client.in_transaction == active));
            }
            let labels = [name, role(server), BackendState::Prepared.as_str()];
            let there = |client: &ClientView| client.prepared && client.server == Some(server.other());
            metrics.server_connections.with_label_values(&labels).set(count(&there));
        }
        metrics
            .held_sessions
            .with_label_values(&[name])
            .set(count(&|client| client_state(client) == ClientState::Waiting));
        metrics.route_epoch.with_label_values(&[name]).set(i64::try_from(database.epoch().0).unwrap_or(i64::MAX));
        let route = database.route();
        for server in [ServerRole::Source, ServerRole::Target] {
            let is_active = matches!(&*route, Route::To { server: active, .. } if *active == server);
            metrics.active_server.with_label_values(&[name, role(server)]).set(i64::from(is_active));
        }
    }
}

/// Sets the state of each migration; one that is gone has no series. What is known of replication the engine sets itself.
pub(super) fn set_migrations(metrics: &Metrics, migrations: &[MigrationView]) {
    metrics.migration_state.reset();
    let states: BTreeMap<&str, State> = State::ALL.iter().map(|state| (state.substate(), *state)).collect();
    for migration in migrations {
        for substate in states.keys() {
            let gauge = metrics.migration_state.with_label_values(&[migration.name.as_str(), substate]);
            gauge.set(i64::from(migration.substate == *substate));
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
