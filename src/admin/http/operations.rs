//! Every call of the API: its method, its address, what it takes, what it answers, and the handler that does it.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::extract::{Body, Named};
use super::operation::{Answers, Operation, Taken};
use super::problem::Problem;
use super::{Answer, Shared, Site, events, idempotency, openapi};
use crate::admin::command::{
    Command, CutoverRequest, Filter, FixRequest, SetRequest, ShadowRequest, ShutdownWhen, VerifyRequest,
};
use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::reply::{self, Reply};
use crate::admin::service::migration_name;
use crate::admin::view::{
    BlockerView, CheckView, CutoverView, EventView, MemberView, MigrationEntry, SampleView, StatusView,
};
use crate::config::Changes;
use crate::migration::preflight::RuleResult;
use crate::migration::view::{CancelReport, FixReport, MigrationSpec, MigrationView, TableView, VerifyReport};
use crate::proxy::shadow::ShadowView;

fn shape<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn needs<T: JsonSchema>() -> Option<Taken> {
    Some(Taken { shape: shape::<T>, required: true })
}

fn takes<T: JsonSchema>() -> Option<Taken> {
    Some(Taken { shape: shape::<T>, required: false })
}

/// The answer to an order that has nothing to tell.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "it says the shape of `Reply::Done`")]
struct Done {
    /// The order's tag.
    done: String,
}

/// Every call.
pub(super) fn all() -> Vec<Operation> {
    let mut all = vec![
        Operation {
            method: "get",
            path: "/api/v1/openapi.json",
            id: "openapi",
            summary: "This document",
            body: None,
            answers: Answers::Document,
            problems: &[],
            handler: get(|| async { axum::Json(openapi::document()) }),
        },
        Operation {
            method: "get",
            path: "/api/v1/live",
            id: "live",
            summary: "The live state as server-sent events: the whole state whenever it changes, event name `live`",
            body: None,
            answers: Answers::Stream(shape::<crate::admin::view::LiveView>),
            problems: &[503],
            handler: get(events::live),
        },
    ];
    all.extend(tables_of_rows());
    all.extend(views());
    all.extend(migrations());
    all.extend(orders());
    all.extend(orders_on_databases());
    all
}

/// The console's `SHOW` verbs that are rows and nothing else.
fn tables_of_rows() -> Vec<Operation> {
    let rows: [(&str, &str, Command, &str); 15] = [
        ("/api/v1/version", "version", Command::Version, "The program's version"),
        ("/api/v1/config", "config", Command::Config, "Every key of the configuration, without secrets"),
        ("/api/v1/databases", "databases", Command::Databases, "Databases and the server that each runs on"),
        ("/api/v1/pools", "pools", Command::Pools, "Sessions by database and user"),
        ("/api/v1/clients", "clients", Command::Clients, "Client sessions"),
        ("/api/v1/servers", "servers", Command::Servers, "The server side of client sessions"),
        ("/api/v1/stats", "stats", Command::Stats, "Counters by database"),
        ("/api/v1/stats-totals", "statsTotals", Command::StatsTotals, "Counters since the start"),
        ("/api/v1/stats-averages", "statsAverages", Command::StatsAverages, "Counters of the last minute"),
        ("/api/v1/totals", "totals", Command::Totals, "Counters of all databases together"),
        ("/api/v1/sockets", "sockets", Command::Sockets, "Both sides of every session"),
        ("/api/v1/active-sockets", "activeSockets", Command::ActiveSockets, "Both sides of busy sessions"),
        ("/api/v1/mem", "mem", Command::Mem, "Memory"),
        ("/api/v1/state", "state", Command::State, "Whether everything is paused"),
        ("/api/v1/lists", "lists", Command::Lists, "How many of each there are"),
    ];
    let mut operations: Vec<Operation> = rows
        .into_iter()
        .map(|(path, id, command, summary)| {
            let answers = Answers::Rows(reply::columns(&command).unwrap_or_default());
            reading(path, id, summary, answers, &[], command)
        })
        .collect();
    let users = Answers::Rows(reply::columns(&Command::Users).unwrap_or_default());
    operations.push(reading("/api/v1/users", "users", "Roles that have sessions", users, &[], Command::Users));
    let help = Answers::Rows(reply::columns(&Command::Help).unwrap_or_default());
    operations.push(reading("/api/v1/help", "help", "The console's commands", help, &[], Command::Help));
    operations
}

fn views() -> Vec<Operation> {
    let json = |shape| Answers::Json(shape);
    vec![
        reading("/api/v1/status", "status", "Everything at a glance", json(shape::<StatusView>), &[], Command::Status),
        reading(
            "/api/v1/members",
            "members",
            "The proxies that take part in a cutover",
            json(shape::<Vec<MemberView>>),
            &[503],
            Command::Members,
        ),
        reading(
            "/api/v1/blockers",
            "blockers",
            "What would keep a cutover from moving every session",
            json(shape::<Vec<BlockerView>>),
            &[503],
            Command::Blockers,
        ),
        reading(
            "/api/v1/events",
            "events",
            "What has happened since this process began, newest first",
            json(shape::<Vec<EventView>>),
            &[],
            Command::Events,
        ),
        ordering(
            "/api/v1/check",
            "check",
            "Connect to both servers and look at them",
            json(shape::<CheckView>),
            &[],
            Command::Check,
        ),
    ]
}

fn migrations() -> Vec<Operation> {
    let of_one = |path, id, summary, answers, problems, handler| Operation {
        method: "get",
        path,
        id,
        summary,
        body: None,
        answers,
        problems,
        handler,
    };
    let order_one = |path, id, summary, answers, handler| Operation {
        method: "post",
        path,
        id,
        summary,
        body: None,
        answers,
        problems: &[400, 404, 409, 500, 503],
        handler,
    };
    vec![
        Operation {
            method: "get",
            path: "/api/v1/migrations",
            id: "listMigrations",
            summary: "Migrations, newest first",
            body: None,
            answers: Answers::Json(shape::<Vec<MigrationEntry>>),
            problems: &[400, 503],
            handler: get(list),
        },
        Operation {
            method: "post",
            path: "/api/v1/migrations",
            id: "createMigration",
            summary: "Begin a migration; answers once it is accepted",
            body: needs::<MigrationSpec>(),
            answers: Answers::Created(shape::<MigrationView>),
            problems: &[400, 409, 422, 500, 503],
            handler: post(create),
        },
        of_one(
            "/api/v1/migrations/{name}",
            "showMigration",
            "One migration",
            Answers::Json(shape::<MigrationView>),
            &[400, 404, 503],
            get_named(Command::Migration),
        ),
        of_one(
            "/api/v1/migrations/{name}/tables",
            "migrationTables",
            "Its tables: full load, incremental sync, indexes",
            Answers::Json(shape::<Vec<TableView>>),
            &[400, 404, 503],
            get_named(Command::Tables),
        ),
        of_one(
            "/api/v1/migrations/{name}/validation",
            "migrationValidation",
            "Its premigration validation",
            Answers::Json(shape::<Vec<RuleResult>>),
            &[400, 404, 503],
            get_named(Command::Validation),
        ),
        of_one(
            "/api/v1/migrations/{name}/verification",
            "migrationVerification",
            "What its last verification found; null: it had none",
            Answers::Json(shape::<Option<VerifyReport>>),
            &[400, 404, 503],
            get_named(Command::Verification),
        ),
        of_one(
            "/api/v1/migrations/{name}/shadow",
            "shadowReads",
            "What its shadow reads have found, running or last; null: it had none",
            Answers::Json(shape::<Option<ShadowView>>),
            &[400, 404, 503],
            get_named(Command::ShadowOf),
        ),
        of_one(
            "/api/v1/migrations/{name}/history",
            "migrationHistory",
            "How far it was behind over the last minutes, oldest first",
            Answers::Json(shape::<Vec<SampleView>>),
            &[400, 404, 503],
            get_named(Command::History),
        ),
        of_one(
            "/api/v1/migrations/{name}/cutover",
            "cutoverProgress",
            "Its cutover, running or last; null: it had none",
            Answers::Json(shape::<Option<CutoverView>>),
            &[400, 404, 503],
            get_named(Command::CutoverOf),
        ),
        Operation {
            method: "post",
            path: "/api/v1/migrations/{name}/cutover",
            id: "cutOver",
            summary: "Switch its databases to the target, or measure the pause; answers when it has ended",
            body: takes::<CutoverRequest>(),
            answers: Answers::Json(shape::<CutoverView>),
            problems: &[400, 404, 409, 500, 503],
            handler: post(cutover),
        },
        Operation {
            method: "post",
            path: "/api/v1/migrations/{name}/rollback",
            id: "rollBack",
            summary: "Switch its databases back to the source, with everything written since; answers when it has ended",
            body: takes::<CutoverRequest>(),
            answers: Answers::Json(shape::<CutoverView>),
            problems: &[400, 404, 409, 500, 503],
            handler: post(rollback),
        },
        order_one(
            "/api/v1/migrations/{name}/complete",
            "completeMigration",
            "Give up the way back, and list what stays",
            Answers::Json(shape::<CancelReport>),
            post_named(Command::Complete),
        ),
        order_one(
            "/api/v1/migrations/{name}/cancel",
            "cancelMigration",
            "Remove what it made on both servers; the target's data stays",
            Answers::Json(shape::<CancelReport>),
            post_named(Command::Cancel),
        ),
        Operation {
            body: takes::<VerifyRequest>(),
            ..order_one(
                "/api/v1/migrations/{name}/verify",
                "verifyMigration",
                "Compare source and target, and repair rows if asked to; answered when all of it was compared",
                Answers::Json(shape::<VerifyReport>),
                post(verify),
            )
        },
        Operation {
            body: takes::<ShadowRequest>(),
            ..order_one(
                "/api/v1/migrations/{name}/shadow",
                "shadowMigration",
                "Run a share of the reads on the target too, or end that; answers at once",
                Answers::Json(shape::<Option<ShadowView>>),
                post(shadow),
            )
        },
        Operation {
            body: needs::<FixRequest>(),
            ..order_one(
                "/api/v1/migrations/{name}/fix",
                "fixRule",
                "Show what mends a rule of its premigration validation, and run it if asked to",
                Answers::Json(shape::<FixReport>),
                post(fix),
            )
        },
        order_one(
            "/api/v1/migrations/{name}/retry",
            "retryMigration",
            "Go on after a failure whose cause is mended",
            Answers::Json(shape::<Done>),
            post_named(Command::Retry),
        ),
    ]
}

fn orders() -> Vec<Operation> {
    let done = || Answers::Json(shape::<Done>);
    let one = |method, path, id, summary, body, problems, handler| Operation {
        method,
        path,
        id,
        summary,
        body,
        answers: done(),
        problems,
        handler,
    };
    vec![
        ordering(
            "/api/v1/reload",
            "reload",
            "Read the configuration again",
            Answers::Json(shape::<Changes>),
            &[400, 409, 500],
            Command::Reload,
        ),
        one(
            "post",
            "/api/v1/shutdown",
            "shutdown",
            "End the daemon in good order",
            takes::<ShutdownRequest>(),
            &[400],
            post(shutdown),
        ),
        one(
            "put",
            "/api/v1/settings/{key}",
            "set",
            "Change a setting until the next reload",
            needs::<SetRequest>(),
            &[400, 404, 409, 500],
            put(set),
        ),
        one(
            "delete",
            "/api/v1/sessions/{pid}",
            "killSession",
            "End the session whose server side has this process id",
            None,
            &[400, 404, 409],
            delete(kill),
        ),
        one(
            "delete",
            "/api/v1/clients/{id}",
            "killClient",
            "End the session with this id",
            None,
            &[400, 404],
            delete(kill_client),
        ),
        one(
            "delete",
            "/api/v1/databases/{database}",
            "killDatabase",
            "End every session of a database, and hold new ones until it is resumed",
            None,
            &[404, 409],
            delete(kill_database),
        ),
        ordering(
            "/api/v1/pause",
            "pauseAll",
            "Hold new transactions; answers when those that run have ended. Who hangs up before that takes it back",
            done(),
            &[409, 503],
            Command::Pause(None),
        ),
        ordering("/api/v1/resume", "resumeAll", "Let them go on", done(), &[409], Command::Resume(None)),
        ordering(
            "/api/v1/reconnect",
            "reconnectAll",
            "Mark every server connection for replacement",
            done(),
            &[],
            Command::Reconnect(None),
        ),
        ordering(
            "/api/v1/wait-close",
            "waitCloseAll",
            "Answers when every marked server connection has been closed",
            done(),
            &[503],
            Command::WaitClose(None),
        ),
    ]
}

fn orders_on_databases() -> Vec<Operation> {
    let one = |path, id, summary, problems, make: fn(String) -> Command| Operation {
        method: "post",
        path,
        id,
        summary,
        body: None,
        answers: Answers::Json(shape::<Done>),
        problems,
        handler: post(move |state: Shared, Named(database): Named| change(state, make(database))),
    };
    vec![
        one("/api/v1/databases/{database}/pause", "pause", "Hold its new transactions", &[404, 409, 503], |name| {
            Command::Pause(Some(name))
        }),
        one("/api/v1/databases/{database}/resume", "resume", "Let them go on", &[404, 409], |name| {
            Command::Resume(Some(name))
        }),
        one(
            "/api/v1/databases/{database}/disable",
            "disable",
            "Refuse its new sessions",
            &[404, 503],
            Command::Disable,
        ),
        one("/api/v1/databases/{database}/enable", "enable", "Let them in again", &[404, 503], Command::Enable),
        one(
            "/api/v1/databases/{database}/reconnect",
            "reconnect",
            "Mark its server connections for replacement",
            &[404],
            |name| Command::Reconnect(Some(name)),
        ),
        one(
            "/api/v1/databases/{database}/wait-close",
            "waitClose",
            "Answers when its marked server connections have been closed",
            &[404, 503],
            |name| Command::WaitClose(Some(name)),
        ),
    ]
}

fn reading(
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    answers: Answers,
    problems: &'static [u16],
    command: Command,
) -> Operation {
    let handler = get(move |State(site): Shared| async move { json(site.service.execute(command).await?) });
    Operation { method: "get", path, id, summary, body: None, answers, problems, handler }
}

fn ordering(
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    answers: Answers,
    problems: &'static [u16],
    command: Command,
) -> Operation {
    let handler = post(move |state: Shared| change(state, command));
    Operation { method: "post", path, id, summary, body: None, answers, problems, handler }
}

fn get_named(make: fn(crate::migration::view::MigrationName) -> Command) -> MethodRouter<Arc<Site>> {
    get(move |State(site): Shared, Named(name): Named| async move {
        json(site.service.execute(make(migration_name(&name)?)).await?)
    })
}

fn post_named(make: fn(crate::migration::view::MigrationName) -> Command) -> MethodRouter<Arc<Site>> {
    post(move |state: Shared, Named(name): Named| async move { change(state, make(migration_name(&name)?)).await })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    #[serde(default)]
    filter: Filter,
}

async fn list(
    State(site): Shared,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|error| invalid(error.body_text()))?;
    json(site.service.execute(Command::Migrations(query.filter)).await?)
}

/// 201 and the new migration, as it stands; 200 where the same call has made it before.
async fn create(headers: HeaderMap, State(site): Shared, Body(body): Body) -> Answer {
    let key = idempotency::key(&headers)?;
    let spec: MigrationSpec = parse_strictly(&body)?;
    let name = spec.name.clone();
    let show = Command::Migration(name.clone());
    let Some(key) = key else {
        site.service.execute(Command::Create(spec)).await?;
        return created(json(site.service.execute(show).await?)?, &name);
    };
    // A call of its own task: a caller that hangs up half way must find its key again.
    let call = tokio::spawn(async move {
        let mut seen = site.keys.0.lock().await;
        if let Some(name) = seen.find(&key, &body)? {
            let mut answer = json(site.service.execute(Command::Migration(name)).await?)?;
            answer.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
            return Ok(answer);
        }
        site.service.execute(Command::Create(spec)).await?;
        seen.remember(key, &body, name.clone());
        created(json(site.service.execute(show).await?)?, &name)
    });
    call.await.unwrap_or_else(|_| {
        Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the call ended unexpectedly"))
    })
}

fn created(mut answer: Response, name: &crate::migration::view::MigrationName) -> Answer {
    *answer.status_mut() = StatusCode::CREATED;
    if let Ok(location) = HeaderValue::from_str(&format!("/api/v1/migrations/{name}")) {
        answer.headers_mut().insert(header::LOCATION, location);
    }
    Ok(answer)
}

async fn cutover(state: Shared, Named(name): Named, Body(body): Body) -> Answer {
    let request: CutoverRequest = if body.is_empty() { CutoverRequest::default() } else { parse(&body)? };
    change(state, Command::Cutover(migration_name(&name)?, request)).await
}

async fn rollback(state: Shared, Named(name): Named, Body(body): Body) -> Answer {
    let request: CutoverRequest = if body.is_empty() { CutoverRequest::default() } else { parse(&body)? };
    change(state, Command::Rollback(migration_name(&name)?, request)).await
}

async fn verify(state: Shared, Named(name): Named, Body(body): Body) -> Answer {
    let request = if body.is_empty() { VerifyRequest::default() } else { parse(&body)? };
    change(state, Command::Verify(migration_name(&name)?, request)).await
}

async fn shadow(state: Shared, Named(name): Named, Body(body): Body) -> Answer {
    let request = if body.is_empty() { ShadowRequest::default() } else { parse(&body)? };
    change(state, Command::Shadow(migration_name(&name)?, request)).await
}

async fn fix(state: Shared, Named(name): Named, Body(body): Body) -> Answer {
    change(state, Command::Fix(migration_name(&name)?, parse(&body)?)).await
}

async fn kill(state: Shared, Named(pid): Named) -> Answer {
    let pid = pid.parse().map_err(|_| invalid(format!("{pid:?} is not a process id")))?;
    change(state, Command::Kill(pid)).await
}

async fn kill_client(state: Shared, Named(id): Named) -> Answer {
    let id = id.parse().map_err(|_| invalid(format!("{id:?} is not the id of a client")))?;
    change(state, Command::KillClient(id)).await
}

async fn kill_database(state: Shared, Named(name): Named) -> Answer {
    change(state, Command::KillDatabase(name)).await
}

async fn set(state: Shared, Named(key): Named, Body(body): Body) -> Answer {
    let SetRequest { value } = parse(&body)?;
    change(state, Command::Set { key, value }).await
}

/// When a shutdown ends the sessions.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ShutdownRequest {
    /// `now`, unless told otherwise.
    #[serde(default)]
    wait_for: ShutdownWhen,
}

async fn shutdown(state: Shared, Body(body): Body) -> Answer {
    let request: ShutdownRequest = if body.is_empty() { ShutdownRequest::default() } else { parse(&body)? };
    change(state, Command::Shutdown(request.wait_for)).await
}

/// Who hangs up while a pause waits has given it up: nobody else knows that it would have to be resumed.
async fn change(State(site): Shared, command: Command) -> Answer {
    // Dropped with this call, which ends when the connection does.
    let (_call, ended) = tokio::sync::oneshot::channel::<()>();
    let hung_up = async move { _ = ended.await };
    json(site.service.execute_until(command, hung_up).await?)
}

fn json(reply: Reply) -> Answer {
    let value = reply.to_json().map_err(|error| AdminError::from_chain(ErrorKind::Failed, &error))?;
    Ok(axum::Json(value).into_response())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| invalid(format!("the request's body: {error}")))
}

/// The same for a shape that is also stored, and must then be read with keys of a later version: a key that is not
/// known is an error here, because a misspelt one would silently mean something else.
fn parse_strictly<T: DeserializeOwned + Serialize>(body: &[u8]) -> Result<T, Problem> {
    let given: serde_json::Map<String, serde_json::Value> = parse(body)?;
    let read: T = parse(body)?;
    let known = serde_json::to_value(&read).unwrap_or_default();
    match given.keys().find(|key| known.get(key.as_str()).is_none()) {
        Some(key) => Err(invalid(format!("the request's body: unknown field `{key}`"))),
        None => Ok(read),
    }
}

fn invalid(message: impl Into<String>) -> Problem {
    AdminError::new(ErrorKind::Invalid, message).into()
}
