//! Console and HTTP over one fake engine: the same order has the same effect whichever way it comes in.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pgcutover::admin::command::CutoverRequest;
use pgcutover::admin::console::Console;
use pgcutover::admin::error::{AdminError, ErrorKind};
use pgcutover::admin::http;
use pgcutover::admin::parts::{Clients, Cutovers, Daemon, Migrations};
use pgcutover::admin::service::{Service, ServiceDeps};
use pgcutover::admin::view::{BlockerView, ClientView, CutoverView, MemberView, PhasesView};
use pgcutover::config::{Changes, Config, Secret, Server};
use pgcutover::migration::preflight::{Level, Outcome, RuleResult};
use pgcutover::migration::view::{CancelReport, DatabaseView, MigrationName, MigrationSpec, MigrationView, TableView};
use pgcutover::postgres::Stream;
use pgcutover::shutdown::Tasks;
use pgcutover::switch::{Epoch, Route, ServerRole, Switchboard};
use pgcutover::telemetry::metrics::Metrics;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Remembers what was ordered; knows the migrations that were created.
#[derive(Default)]
struct Fake {
    orders: Mutex<Vec<String>>,
    migrations: Mutex<Vec<MigrationView>>,
}

impl Fake {
    fn note(&self, order: impl Into<String>) {
        self.orders.lock().unwrap().push(order.into());
    }

    fn orders(&self) -> Vec<String> {
        self.orders.lock().unwrap().clone()
    }
}

#[async_trait]
impl Migrations for Fake {
    async fn create(&self, spec: MigrationSpec) -> Result<(), AdminError> {
        self.note(format!("create {} {}", spec.name, spec.databases.join(",")));
        let view: MigrationView = serde_json::from_value(json!({
            "name": spec.name, "state": "InProgress", "substate": "MigratingData", "mode": spec.mode,
            "option": spec.option, "cutover_when_ready": false, "databases": [], "error": null,
            "started_at": 1.0, "finished_at": null, "duration_seconds": 2.5, "source": "a:1", "validation": null,
        }))
        .unwrap();
        let database = DatabaseView {
            name: "shop".to_owned(),
            state: "copying".to_owned(),
            latency_bytes: None,
            latency_seconds: Some(0.5),
            pending_changes: Some(7),
            tables_total: 3,
            tables_ready: 1,
            retries: 0,
            last_error: None,
        };
        self.migrations.lock().unwrap().push(MigrationView { databases: vec![database], ..view });
        Ok(())
    }

    async fn list(&self) -> Result<Vec<MigrationView>, AdminError> {
        Ok(self.migrations.lock().unwrap().clone())
    }

    async fn show(&self, name: &MigrationName) -> Result<MigrationView, AdminError> {
        let found = self.migrations.lock().unwrap().iter().find(|view| view.name == name.as_str()).cloned();
        found.ok_or_else(|| {
            AdminError::new(ErrorKind::NotFound, format!("there is no migration {name}")).hint("SHOW MIGRATIONS")
        })
    }

    async fn tables(&self, name: &MigrationName) -> Result<Vec<TableView>, AdminError> {
        self.show(name).await.map(|_| Vec::new())
    }

    async fn validation(&self, name: &MigrationName) -> Result<Vec<RuleResult>, AdminError> {
        self.show(name).await?;
        Ok(vec![RuleResult {
            code: "wal_level".to_owned(),
            level: Level::Instance,
            outcome: Outcome::Failed,
            evidence: vec!["wal_level is replica".to_owned()],
            evidence_total: 1,
            why: "w".to_owned(),
            fix: "f".to_owned(),
        }])
    }

    async fn cancel(&self, name: &MigrationName) -> Result<CancelReport, AdminError> {
        self.note(format!("cancel {name}"));
        self.show(name).await.map(|_| CancelReport::default())
    }

    async fn retry(&self, name: &MigrationName) -> Result<(), AdminError> {
        self.note(format!("retry {name}"));
        Err(AdminError::new(ErrorKind::Conflict, "it has not failed"))
    }
}

#[async_trait]
impl Cutovers for Fake {
    async fn run(&self, name: &MigrationName, request: CutoverRequest) -> Result<CutoverView, AdminError> {
        let pause = request.max_pause.map(|pause| pause.as_millis());
        self.note(format!("cutover {name} dry={} pause={pause:?}", request.dry_run));
        let phases_ms = PhasesView { prepare: 12, ..PhasesView::default() };
        Ok(CutoverView { outcome: "switched".to_owned(), pause_ms: 41, phases_ms, ..CutoverView::default() })
    }

    async fn progress(&self, _name: &MigrationName) -> Result<Option<CutoverView>, AdminError> {
        Ok(None)
    }

    async fn stop(&self, _name: &MigrationName) -> Result<(), AdminError> {
        Ok(())
    }

    async fn blockers(&self) -> Result<Vec<BlockerView>, AdminError> {
        Err(AdminError::new(ErrorKind::Unavailable, "the source cannot be reached"))
    }

    async fn members(&self) -> Result<Vec<MemberView>, AdminError> {
        Ok(Vec::new())
    }
}

impl Clients for Fake {
    fn list(&self) -> Vec<ClientView> {
        vec![ClientView {
            id: 1,
            user: "ann".to_owned(),
            database: "shop".to_owned(),
            client: "10.0.0.7:5001".to_owned(),
            server: Some(ServerRole::Source),
            backend_pid: Some(42),
            state: "idle".to_owned(),
            connected_at: Some(0.0),
            ..ClientView::default()
        }]
    }

    fn end(&self, backend_pid: i32) -> bool {
        self.note(format!("kill {backend_pid}"));
        backend_pid == 42
    }
}

impl Daemon for Fake {
    fn reload(&self) -> Result<Changes, AdminError> {
        self.note("reload");
        let applied = vec!["cutover.max_pause".to_owned()];
        Ok(Changes { applied, needs_restart: vec!["source.host".to_owned()] })
    }

    fn shutdown(&self) {
        self.note("shutdown");
    }
}

/// The admin side of a daemon, listening.
struct Admin {
    fake: Arc<Fake>,
    switchboard: Arc<Switchboard>,
    http: SocketAddr,
    console: SocketAddr,
    _tasks: Tasks,
}

async fn admin(change: impl FnOnce(&mut Config)) -> Admin {
    let mut source = Server::new("10.0.0.5", 5432, "postgres");
    source.password = Some(Secret::new("s3cret"));
    let mut config = Config::new(source, Server::new("10.0.0.6", 5432, "postgres"));
    config.admin.users = vec!["ann".to_owned()];
    change(&mut config);
    let (fake, tasks) = (Arc::new(Fake::default()), Tasks::new());
    let switchboard = Arc::new(Switchboard::new(Route::To { server: ServerRole::Source, epoch: Epoch(0) }));
    let _known = switchboard.database("shop");
    let service = Service::new(ServiceDeps {
        config: Arc::new(ArcSwap::from_pointee(config)),
        switchboard: switchboard.clone(),
        metrics: Arc::new(Metrics::new().unwrap()),
        migrations: fake.clone(),
        cutovers: fake.clone(),
        clients: fake.clone(),
        daemon: fake.clone(),
        tasks: tasks.clone(),
    });
    let http = http::start(([127, 0, 0, 1], 0).into(), service.clone(), &tasks).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let console = Console::new(service, tasks.clone());
    tasks.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(authenticated(stream, console.clone()));
        }
    });
    Admin { fake, switchboard, http, console: address, _tasks: tasks }
}

/// What the proxy does before it hands a client to the console: the startup, here without any proof.
async fn authenticated(mut stream: tokio::net::TcpStream, console: Console) {
    let length = stream.read_u32().await.unwrap() as usize;
    let mut startup = vec![0; length - 4];
    stream.read_exact(&mut startup).await.unwrap();
    let words: Vec<&[u8]> = startup[4..].split(|byte| *byte == 0).collect();
    let user = words.chunks(2).find(|pair| pair[0] == b"user").map(|pair| pair[1]).unwrap();
    stream.write_all(b"R\0\0\0\x08\0\0\0\0").await.unwrap();
    console.serve(Stream::Tcp(stream), String::from_utf8(user.to_vec()).unwrap()).await;
}

impl Admin {
    async fn connect(&self, user: &str) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.console.port()).user(user).dbname("pgcutover");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Status, content type and body.
    async fn http(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String, String) {
        let mut stream = tokio::net::TcpStream::connect(self.http).await.unwrap();
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += &format!("content-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let kind = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default();
        (status, kind.to_owned(), body.to_owned())
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let (status, _, body) = self.http("GET", path, &[], "").await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, _, body) = self.http("POST", path, &[], &body).await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }
}

#[tokio::test]
async fn a_migration_is_created_shown_and_cut_over_by_http() {
    let admin = admin(|_| {}).await;
    assert_eq!(admin.get("/healthz").await, (200, json!("ok\n")));
    assert_eq!(admin.get("/readyz").await, (200, json!("ready\n")));
    assert_eq!(admin.get("/api/v1/migrations").await, (200, json!([])));
    let (status, created) = admin.post("/api/v1/migrations", &json!({"name": "m1", "databases": ["shop"]})).await;
    assert_eq!((status, &created["name"]), (201, &json!("m1")));
    let (status, shown) = admin.get("/api/v1/migrations/m1").await;
    assert_eq!(status, 200);
    for key in ["name", "state", "substate", "mode", "databases", "error"] {
        assert!(shown.get(key).is_some(), "{key}");
    }
    assert_eq!(shown["databases"][0]["latency_bytes"], Value::Null, "unknown is not zero");
    let (_, listed) = admin.get("/api/v1/migrations?filter=active").await;
    assert_eq!((&listed[0]["name"], &listed[0]["source_server_type"]), (&json!("m1"), &json!("postgresql")));
    let (status, report) = admin.post("/api/v1/migrations/m1/cutover", &Value::Null).await;
    assert_eq!((status, &report["outcome"], &report["pause_ms"]), (200, &json!("switched"), &json!(41)));
    assert_eq!(report["phases_ms"]["prepare"], json!(12));
    let request = json!({"dry_run": true, "max_pause": "250ms"});
    assert_eq!(admin.post("/api/v1/migrations/m1/cutover", &request).await.0, 200);
    let orders = ["create m1 shop", "cutover m1 dry=false pause=Some(5000)", "cutover m1 dry=true pause=Some(250)"];
    assert_eq!(admin.fake.orders(), orders, "what is not said is taken from the configuration");
}

#[tokio::test]
async fn http_errors_are_problems_with_a_status_of_their_own() {
    let admin = admin(|_| {}).await;
    for (method, path, body, status, detail) in [
        ("GET", "/nowhere", "", 404, "nothing at this address"),
        ("PUT", "/api/v1/migrations", "", 405, "another method"),
        ("GET", "/api/v1/migrations/none", "", 404, "there is no migration none"),
        ("GET", "/api/v1/migrations/-x", "", 400, "is not a migration name"),
        ("GET", "/api/v1/migrations?filter=new", "", 400, "filter"),
        ("POST", "/api/v1/migrations", "{", 400, "the request's body"),
        ("POST", "/api/v1/migrations/none/cutover", "{\"max_pause\":\"5\"}", 400, "is not a duration"),
        ("POST", "/api/v1/migrations/none/cutover", "{\"dryrun\":true}", 400, "unknown field"),
        ("POST", "/api/v1/migrations/none/retry", "", 409, "it has not failed"),
        ("GET", "/api/v1/blockers", "", 503, "the source cannot be reached"),
        ("DELETE", "/api/v1/sessions/7", "", 404, "no session has a server side"),
    ] {
        let (found, kind, text) = admin.http(method, path, &[], body).await;
        assert_eq!((found, kind.as_str()), (status, "application/problem+json"), "{method} {path}: {text}");
        let problem: Value = serde_json::from_str(&text).unwrap();
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
        assert_eq!(problem["status"], json!(status));
    }
}

#[tokio::test]
async fn changing_state_needs_the_token_or_this_machine() {
    let guarded = admin(|config| config.admin.token = Some(Secret::new("t0ken"))).await;
    let (status, _, body) = guarded.http("POST", "/api/v1/reload", &[], "").await;
    assert_eq!(status, 401, "{body}");
    let wrong = [("authorization", "Bearer wrong")];
    assert_eq!(guarded.http("POST", "/api/v1/migrations", &wrong, "{\"name\":\"m\"}").await.0, 401);
    assert_eq!(guarded.fake.orders(), [""; 0]);
    let right = [("authorization", "Bearer t0ken")];
    assert_eq!(guarded.http("POST", "/api/v1/reload", &right, "").await.0, 200);
    assert_eq!(guarded.fake.orders(), ["reload"]);

    let open = admin(|_| {}).await;
    let page = [("origin", "https://evil.example")];
    assert_eq!(open.http("POST", "/api/v1/shutdown", &page, "").await.0, 403);
    assert_eq!(open.fake.orders(), [""; 0]);
}

#[tokio::test]
async fn readiness_and_status_follow_the_route() {
    let admin = admin(|_| {}).await;
    admin.switchboard.database("shop").set_unknown("both servers are away".to_owned());
    let (status, problem) = admin.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(problem["detail"].as_str().unwrap().contains("both servers are away"), "{problem}");
    let (_, status) = admin.get("/api/v1/status").await;
    assert_eq!((&status["ready"], &status["blockers"]), (&json!(false), &Value::Null));
    assert_eq!(status["routes"][0]["held"], json!(true));
    let (_, metrics) = admin.get("/metrics").await;
    assert!(metrics.as_str().unwrap().contains("pgcutover_cutovers_total"));
}

#[tokio::test]
async fn every_show_verb_answers_in_both_protocols() {
    let admin = admin(|_| {}).await;
    let client = admin.connect("ann").await;
    client.batch_execute("CREATE MIGRATION m1 DATABASES shop").await.unwrap();
    let verbs = "HELP VERSION CONFIG DATABASES POOLS CLIENTS SERVERS STATS LISTS USERS STATUS MIGRATIONS,MIGRATION m1,\
                 TABLES m1,VALIDATION m1,CUTOVER m1,MEMBERS";
    for verb in
        verbs.split(',').flat_map(|part| if part.contains(" m1") { vec![part] } else { part.split(' ').collect() })
    {
        let sql = format!("SHOW {verb}");
        let simple = client.simple_query(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        let count = simple.iter().filter(|m| matches!(m, tokio_postgres::SimpleQueryMessage::Row(_))).count();
        let statement = client.prepare(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert!(!statement.columns().is_empty(), "{sql}");
        let rows = client.query(&statement, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert_eq!(rows.len(), count, "{sql}");
    }
    let row = client.query_one("SHOW MIGRATION m1", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>("status"), "InProgress");
    assert_eq!(row.get::<_, Option<i64>>("latency_bytes"), None, "unknown is NULL");
    assert_eq!(row.get::<_, f64>("latency_seconds"), 0.5);
    let row = client.query_one("SHOW CLIENTS", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>("addr"), row.get::<_, i64>("remote_pid")), ("10.0.0.7", 42));
    let row = client.query_one("SHOW DATABASES", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>("host"), row.get::<_, i64>("paused")), ("10.0.0.5", 0));
}

#[tokio::test]
async fn the_console_gives_orders_and_names_what_it_refuses() {
    let admin = admin(|_| {}).await;
    let client = admin.connect("ann").await;
    client.batch_execute("CREATE MIGRATION m1 DATABASES shop, \"a b\"; KILL 42").await.unwrap();
    let row = client.query_one("CUTOVER m1 DRY RUN MAX PAUSE 2s", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>("outcome"), row.get::<_, i64>("pause_ms")), ("switched", 41));
    let orders = ["create m1 shop,a b", "kill 42", "cutover m1 dry=true pause=Some(2000)"];
    assert_eq!(admin.fake.orders(), orders);
    for (sql, code, hint) in [
        ("SHOW MIGRATONS", "42601", Some("SHOW HELP lists the commands")),
        ("SELECT * FROM pg_class", "42601", Some("SHOW HELP lists the commands")),
        ("SHOW MIGRATION none", "42704", Some("SHOW MIGRATIONS")),
        ("RETRY m1", "55000", None),
        ("ROLLBACK m1", "0A000", None),
        ("SHOW BLOCKERS", "57P03", None),
    ] {
        for error in [client.simple_query(sql).await.err(), client.query(sql, &[]).await.err()] {
            let error = error.expect(sql);
            let error = error.as_db_error().expect("from the server");
            assert_eq!((error.code().code(), error.hint()), (code, hint), "{sql}: {error}");
        }
    }
    // A typing error in the second order: the first is not carried out either.
    client.simple_query("RELOAD; CUTOVR m1").await.expect_err("misspelt");
    assert!(!admin.fake.orders().contains(&"reload".to_owned()));
    client.batch_execute("BEGIN; SET x = 1; COMMIT; DISCARD ALL").await.unwrap();
    assert_eq!(client.query_one("SHOW VERSION", &[]).await.unwrap().len(), 1, "still in step");
}

#[tokio::test]
async fn only_listed_roles_use_the_console_and_nobody_reads_a_secret() {
    let admin = admin(|config| config.admin.token = Some(Secret::new("t0ken"))).await;
    let stranger = admin.connect("bob").await;
    for sql in ["SHOW HELP", "CUTOVER m1", "SHUTDOWN"] {
        let error = stranger.simple_query(sql).await.expect_err("bob is not listed");
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{sql}");
    }
    assert_eq!(admin.fake.orders(), [""; 0]);
    let rows = admin.connect("ann").await.query("SHOW CONFIG", &[]).await.unwrap();
    let shown: Vec<(String, String)> = rows.iter().map(|row| (row.get("key"), row.get("value"))).collect();
    assert!(shown.contains(&("source.password".to_owned(), "(set)".to_owned())), "{shown:?}");
    let (_, config) = admin.get("/api/v1/config").await;
    let all = format!("{shown:?}{config}");
    for secret in ["s3cret", "t0ken"] {
        assert!(!all.contains(secret));
    }
}
