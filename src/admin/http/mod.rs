//! HTTP: the dashboard at `/`, the JSON API under `/api/v1`, `/metrics`, `/healthz` and `/readyz`.
//!
//! Reading is open to whoever reaches the address, by a name of ours; what changes state is guarded by [`guard`]. Every error is
//! `application/problem+json` (RFC 9457). [`operations`] is the one table of the API: the router and the OpenAPI
//! document are both made from it, so that neither can know a call that the other does not.

mod caller;
mod connections;
mod dashboard;
mod events;
mod extract;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod guard;
mod idempotency;
mod openapi;
mod operation;
mod operations;
mod problem;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use self::caller::Caller;
use self::problem::Problem;
use super::service::Service;
use crate::shutdown::Tasks;
use crate::telemetry::metrics;

type Answer = Result<Response, Problem>;

/// What every call works with.
struct Site {
    service: Service,
    keys: idempotency::Keys,
    streams: events::Streams,
    tasks: Tasks,
}

type Shared = State<Arc<Site>>;

/// The API's description in the form of OpenAPI 3.1.
pub fn description() -> serde_json::Value {
    openapi::document()
}

/// Listens on `address` and serves until `tasks` are told to stop. Returns the address that was taken.
pub async fn start(address: SocketAddr, service: Service, tasks: &Tasks) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let taken = listener.local_addr()?;
    serve(listener, service, tasks);
    Ok(taken)
}

/// Serves on a socket that listens already until `tasks` are told to stop.
pub fn serve(listener: tokio::net::TcpListener, service: Service, tasks: &Tasks) {
    let routes = router(service, tasks);
    tasks.spawn(connections::serve(listener, routes, connections::Bounds::default(), tasks.clone()));
}

fn router(service: Service, tasks: &Tasks) -> Router {
    let site =
        Site { service, keys: idempotency::Keys::default(), streams: events::Streams::default(), tasks: tasks.clone() };
    let mut router = Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready));
    for operation in operations::all() {
        router = router.route(operation.path, operation.handler);
    }
    let site = Arc::new(site);
    dashboard::routes(router)
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address") })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this address takes another method")
        })
        .layer(axum::middleware::from_fn_with_state(site.clone(), let_through))
        .with_state(site)
}

/// Lets through who asks by a name of ours, and may give orders if this is one: before its body is read.
async fn let_through(
    State(site): Shared,
    caller: Caller,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let config = site.service.config();
    let allowed = guard::may_ask(&config, &caller.headers).and_then(|()| match *request.method() {
        Method::GET | Method::HEAD | Method::OPTIONS => Ok(()),
        _ => guard::may_change(&config, caller.peer, &caller.headers),
    });
    match allowed {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

async fn metrics_text(State(site): Shared) -> Answer {
    let text = site.service.metrics().await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn ready(State(site): Shared) -> Response {
    match site.service.not_ready() {
        None => "ready\n".into_response(),
        Some(reason) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", &reason).into_response(),
    }
}
