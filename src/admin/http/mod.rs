//! HTTP: the JSON API under `/api/v1`, `/metrics`, `/healthz` and `/readyz`.
//!
//! Reading is open to whoever reaches the address; what changes state is guarded by [`guard`]. Every error is
//! `application/problem+json` (RFC 9457).

mod guard;
mod problem;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use self::problem::Problem;
use super::command::{Command, CutoverRequest, Filter, ShutdownWhen};
use super::error::{AdminError, ErrorKind};
use super::reply::Reply;
use super::service::{Service, migration_name};
use crate::migration::view::MigrationSpec;
use crate::shutdown::Tasks;
use crate::telemetry::metrics;

type Answer = Result<Response, Problem>;

/// Listens on `address` and serves until `tasks` are told to stop. Returns the address that was taken.
pub async fn start(address: SocketAddr, service: Service, tasks: &Tasks) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let taken = listener.local_addr()?;
    serve(listener, service, tasks);
    Ok(taken)
}

/// Serves on a socket that listens already until `tasks` are told to stop.
pub fn serve(listener: tokio::net::TcpListener, service: Service, tasks: &Tasks) {
    let app = router(service).into_make_service_with_connect_info::<SocketAddr>();
    let stopping = tasks.clone();
    tasks.spawn(async move {
        let served = axum::serve(listener, app).with_graceful_shutdown(async move { stopping.stopping().await });
        if let Err(error) = served.await {
            tracing::error!(%error, "HTTP server ended");
        }
    });
}

fn router(service: Service) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/api/v1/status", get(|state| read(state, Command::Status)))
        .route("/api/v1/version", get(|state| read(state, Command::Version)))
        .route("/api/v1/config", get(|state| read(state, Command::Config)))
        .route("/api/v1/databases", get(|state| read(state, Command::Databases)))
        .route("/api/v1/pools", get(|state| read(state, Command::Pools)))
        .route("/api/v1/clients", get(|state| read(state, Command::Clients)))
        .route("/api/v1/servers", get(|state| read(state, Command::Servers)))
        .route("/api/v1/stats", get(|state| read(state, Command::Stats)))
        .route("/api/v1/stats-totals", get(|state| read(state, Command::StatsTotals)))
        .route("/api/v1/stats-averages", get(|state| read(state, Command::StatsAverages)))
        .route("/api/v1/totals", get(|state| read(state, Command::Totals)))
        .route("/api/v1/sockets", get(|state| read(state, Command::Sockets)))
        .route("/api/v1/active-sockets", get(|state| read(state, Command::ActiveSockets)))
        .route("/api/v1/mem", get(|state| read(state, Command::Mem)))
        .route("/api/v1/state", get(|state| read(state, Command::State)))
        .route("/api/v1/lists", get(|state| read(state, Command::Lists)))
        .route("/api/v1/users", get(|state| read(state, Command::Users)))
        .route("/api/v1/members", get(|state| read(state, Command::Members)))
        .route("/api/v1/blockers", get(|state| read(state, Command::Blockers)))
        .route("/api/v1/migrations", get(list).post(create))
        .route("/api/v1/migrations/{name}", get(show))
        .route("/api/v1/migrations/{name}/tables", get(tables))
        .route("/api/v1/migrations/{name}/validation", get(validation))
        .route("/api/v1/migrations/{name}/cutover", get(cutover_progress).post(cutover))
        .route("/api/v1/migrations/{name}/cancel", post(cancel))
        .route("/api/v1/migrations/{name}/retry", post(retry))
        .route("/api/v1/reload", post(|caller: Caller, state| change(state, caller, Command::Reload)))
        .route("/api/v1/shutdown", post(shutdown))
        .route("/api/v1/settings/{key}", put(set))
        .route("/api/v1/sessions/{pid}", delete(kill))
        .route("/api/v1/clients/{id}", delete(kill_client))
        .route("/api/v1/databases/{name}", delete(kill_database))
        .route("/api/v1/pause", post(|caller: Caller, state| change(state, caller, Command::Pause(None))))
        .route("/api/v1/resume", post(|caller: Caller, state| change(state, caller, Command::Resume(None))))
        .route("/api/v1/reconnect", post(|caller: Caller, state| change(state, caller, Command::Reconnect(None))))
        .route("/api/v1/wait-close", post(|caller: Caller, state| change(state, caller, Command::WaitClose(None))))
        .route("/api/v1/databases/{name}/{order}", post(order_database))
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address") })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this address takes another method")
        })
        .with_state(Arc::new(service))
}

type Shared = State<Arc<Service>>;

/// Who asks: where from, and with which headers.
struct Caller {
    peer: SocketAddr,
    headers: HeaderMap,
}

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _state: &S) -> Result<Self, Self::Rejection> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| *peer);
        let peer = peer.ok_or_else(|| {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the caller's address is not known")
        })?;
        Ok(Self { peer, headers: parts.headers.clone() })
    }
}

async fn metrics_text(State(service): Shared) -> Answer {
    let text = service.metrics().await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn ready(State(service): Shared) -> Response {
    match service.not_ready() {
        None => "ready\n".into_response(),
        Some(reason) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", &reason).into_response(),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    #[serde(default)]
    filter: Filter,
}

async fn list(
    State(service): Shared,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|error| invalid(error.body_text()))?;
    json(service.execute(Command::Migrations(query.filter)).await?)
}

async fn show(State(service): Shared, Path(name): Path<String>) -> Answer {
    json(service.execute(Command::Migration(migration_name(&name)?)).await?)
}

async fn tables(State(service): Shared, Path(name): Path<String>) -> Answer {
    json(service.execute(Command::Tables(migration_name(&name)?)).await?)
}

async fn validation(State(service): Shared, Path(name): Path<String>) -> Answer {
    json(service.execute(Command::Validation(migration_name(&name)?)).await?)
}

async fn cutover_progress(State(service): Shared, Path(name): Path<String>) -> Answer {
    json(service.execute(Command::CutoverOf(migration_name(&name)?)).await?)
}

/// 201 and the new migration, as it stands.
async fn create(caller: Caller, State(service): Shared, body: Bytes) -> Answer {
    guard::may_change(&service.config(), caller.peer, &caller.headers)?;
    let spec: MigrationSpec = parse(&body)?;
    let name = spec.name.clone();
    service.execute(Command::Create(spec)).await?;
    let mut answer = json(service.execute(Command::Migration(name.clone())).await?)?;
    *answer.status_mut() = StatusCode::CREATED;
    if let Ok(location) = HeaderValue::from_str(&format!("/api/v1/migrations/{name}")) {
        answer.headers_mut().insert(header::LOCATION, location);
    }
    Ok(answer)
}

async fn cutover(caller: Caller, State(service): Shared, Path(name): Path<String>, body: Bytes) -> Answer {
    let request: CutoverRequest = if body.is_empty() { CutoverRequest::default() } else { parse(&body)? };
    change(State(service), caller, Command::Cutover(migration_name(&name)?, request)).await
}

async fn cancel(caller: Caller, state: Shared, Path(name): Path<String>) -> Answer {
    change(state, caller, Command::Cancel(migration_name(&name)?)).await
}

async fn retry(caller: Caller, state: Shared, Path(name): Path<String>) -> Answer {
    change(state, caller, Command::Retry(migration_name(&name)?)).await
}

async fn kill(caller: Caller, state: Shared, Path(pid): Path<String>) -> Answer {
    let pid = pid.parse().map_err(|_| invalid(format!("{pid:?} is not a process id")))?;
    change(state, caller, Command::Kill(pid)).await
}

async fn kill_client(caller: Caller, state: Shared, Path(id): Path<String>) -> Answer {
    let id = id.parse().map_err(|_| invalid(format!("{id:?} is not the id of a client")))?;
    change(state, caller, Command::KillClient(id)).await
}

async fn kill_database(caller: Caller, state: Shared, Path(name): Path<String>) -> Answer {
    change(state, caller, Command::KillDatabase(name)).await
}

async fn order_database(caller: Caller, state: Shared, Path((name, order)): Path<(String, String)>) -> Answer {
    let command = match order.as_str() {
        "pause" => Command::Pause(Some(name)),
        "resume" => Command::Resume(Some(name)),
        "disable" => Command::Disable(name),
        "enable" => Command::Enable(name),
        "reconnect" => Command::Reconnect(Some(name)),
        "wait-close" => Command::WaitClose(Some(name)),
        _ => return Err(Problem::new(StatusCode::NOT_FOUND, "not_found", "there is no such order for a database")),
    };
    change(state, caller, command).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetRequest {
    /// In the notation of the configuration file.
    value: String,
}

async fn set(caller: Caller, state: Shared, Path(key): Path<String>, body: Bytes) -> Answer {
    let SetRequest { value } = parse(&body)?;
    change(state, caller, Command::Set { key, value }).await
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShutdownRequest {
    #[serde(default)]
    wait_for: ShutdownWhen,
}

async fn shutdown(caller: Caller, state: Shared, body: Bytes) -> Answer {
    let request: ShutdownRequest = if body.is_empty() { ShutdownRequest::default() } else { parse(&body)? };
    change(state, caller, Command::Shutdown(request.wait_for)).await
}

async fn read(State(service): Shared, command: Command) -> Answer {
    json(service.execute(command).await?)
}

async fn change(State(service): Shared, caller: Caller, command: Command) -> Answer {
    guard::may_change(&service.config(), caller.peer, &caller.headers)?;
    json(service.execute(command).await?)
}

fn json(reply: Reply) -> Answer {
    let value = reply.to_json().map_err(|error| AdminError::from_chain(ErrorKind::Failed, &error))?;
    Ok(axum::Json(value).into_response())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| invalid(format!("the request's body: {error}")))
}

fn invalid(message: impl Into<String>) -> Problem {
    AdminError::new(ErrorKind::Invalid, message).into()
}
