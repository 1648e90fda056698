//! One fake engine behind a console and an HTTP server, and how the tests speak to both.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pgcutover::admin::command::{CutoverRequest, FixRequest, ShutdownWhen, VerifyRequest};
use pgcutover::admin::console::Console;
use pgcutover::admin::error::{AdminError, ErrorKind};
use pgcutover::admin::http;
use pgcutover::admin::parts::{Clients, Cutovers, Daemon, Migrations};
use pgcutover::admin::service::{Service, ServiceDeps};
use pgcutover::admin::view::{
    BlockerView, CheckView, ClientView, CutoverView, FindingView, IntentionView, MemberView, PhasesView,
    SourceDatabaseView, TimedStepView,
};
use pgcutover::catalog::streams::Direction;
use pgcutover::config::{Changes, Config, Secret, Server};
use pgcutover::migration::preflight::{Asking, Level, Outcome, RuleResult};
use pgcutover::migration::verify::{DifferenceKind, RowDifference, TableResult};
use pgcutover::migration::view::{
    CancelReport, DatabaseView, FixReport, FullLoadView, IncrementalView, MigrationName, MigrationSpec, MigrationView,
    TableView, VerifyReport,
};
use pgcutover::postgres::Stream;
use pgcutover::proxy::ConsoleKey;
use pgcutover::shutdown::Tasks;
use pgcutover::switch::{Epoch, Route, ServerRole, Switchboard};
use pgcutover::telemetry::metrics::Metrics;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Remembers what was ordered; knows the migrations that were created.
#[derive(Default)]
pub struct Fake {
    orders: Mutex<Vec<String>>,
    /// How often the sessions were looked through.
    pub looks: AtomicUsize,
    migrations: Mutex<Vec<MigrationView>>,
}

impl Fake {
    fn note(&self, order: impl Into<String>) {
        self.orders.lock().unwrap().push(order.into());
    }

    pub fn orders(&self) -> Vec<String> {
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
            direction: "forward".to_owned(),
            rollback_possible: false,
            tables_total: 3,
            tables_ready: 1,
            retries: 0,
            last_error: None,
            retained_wal_bytes: None,
            retained_wal_limit_bytes: None,
            safe_wal_bytes: None,
            wal_warning: false,
            fence_watch: None,
            fenced_writes: Vec::new(),
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
        self.show(name).await?;
        let full_load = FullLoadView { state: "ready".to_owned(), rows: 3, bytes: 99, ..FullLoadView::default() };
        Ok(vec![TableView {
            database: "shop".to_owned(),
            schema: "public".to_owned(),
            name: "item".to_owned(),
            full_load,
            incremental_sync: IncrementalView::default(),
            indexes: "built".to_owned(),
            verification: None,
            error: None,
        }])
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
            statements: Vec::new(),
            asking: Asking::Done,
        }])
    }

    async fn cancel(&self, name: &MigrationName) -> Result<CancelReport, AdminError> {
        self.note(format!("cancel {name}"));
        self.show(name).await.map(|_| CancelReport::default())
    }

    async fn complete(&self, name: &MigrationName) -> Result<CancelReport, AdminError> {
        self.note(format!("complete {name}"));
        self.show(name).await.map(|_| CancelReport::default())
    }

    async fn fix(&self, name: &MigrationName, request: FixRequest) -> Result<FixReport, AdminError> {
        self.note(format!("fix {name} {} {}", request.rule, request.apply));
        self.show(name).await?;
        Ok(FixReport {
            rule: request.rule,
            applied: request.apply,
            refused: None,
            statements: Vec::new(),
            found: Vec::new(),
        })
    }

    async fn verify(&self, name: &MigrationName, request: VerifyRequest) -> Result<VerifyReport, AdminError> {
        self.note(format!("verify {name}{}", if request.repair { " and repair" } else { "" }));
        Ok(found())
    }

    async fn verification(&self, name: &MigrationName) -> Result<Option<VerifyReport>, AdminError> {
        self.show(name).await?;
        let is_verified = self.orders().iter().any(|order| order.starts_with(&format!("verify {name}")));
        Ok(is_verified.then(found))
    }

    async fn retry(&self, name: &MigrationName) -> Result<(), AdminError> {
        self.note(format!("retry {name}"));
        Err(AdminError::new(ErrorKind::Conflict, "it has not failed"))
    }
}

/// What the fake's verification finds.
fn found() -> VerifyReport {
    let listed = vec![RowDifference { kind: DifferenceKind::Missing, key: vec![Some("7".to_owned())] }];
    let result = TableResult {
        schema: "public".to_owned(),
        name: "item".to_owned(),
        rows: 10,
        repaired: 0,
        differences: 1,
        listed,
        problem: None,
    };
    let mut report = VerifyReport::default();
    report.add_table("shop", result);
    report
}

#[async_trait]
impl Cutovers for Fake {
    async fn run(
        &self,
        name: &MigrationName,
        direction: Direction,
        request: CutoverRequest,
    ) -> Result<CutoverView, AdminError> {
        let pause = request.max_pause.map(|pause| pause.as_millis());
        let order = if direction == Direction::Forward { "cutover" } else { "rollback" };
        self.note(format!("{order} {name} dry={} pause={pause:?}", request.dry_run));
        let phases_ms = PhasesView { prepare: 12, ..PhasesView::default() };
        let would = IntentionView { action: "set-sequences".to_owned(), database: None, detail: "2".to_owned() };
        let step = TimedStepView { step: "move sessions".to_owned(), ms: 1.5 };
        Ok(CutoverView {
            outcome: "switched".to_owned(),
            direction: Some(direction),
            pause_ms: 41,
            phases_ms,
            sessions_held: 3,
            would: vec![would],
            prepare_steps: vec![step],
            ..CutoverView::default()
        })
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
        self.looks.fetch_add(1, Ordering::SeqCst);
        vec![ClientView {
            id: 1,
            user: "ann".to_owned(),
            database: "shop".to_owned(),
            client: "10.0.0.7:5001".to_owned(),
            server: Some(ServerRole::Source),
            backend_pid: Some(42),
            state: "idle".to_owned(),
            connected_at: Some(0.0),
            pinned: Some("it listens".to_owned()),
            ..ClientView::default()
        }]
    }

    fn end(&self, backend_pid: i32) -> usize {
        self.note(format!("kill {backend_pid}"));
        match backend_pid {
            42 => 1,
            // On both servers.
            7 => 2,
            _ => 0,
        }
    }

    fn end_client(&self, id: u64) -> bool {
        self.note(format!("kill client {id}"));
        id == 1
    }

    fn end_database(&self, database: &str) -> usize {
        self.note(format!("kill database {database}"));
        1
    }
}

#[async_trait]
impl Daemon for Fake {
    async fn check(&self) -> CheckView {
        self.note("check");
        let found = FindingView { check: "source".to_owned(), ok: true, found: "yes".to_owned(), fix: None };
        let database = SourceDatabaseView { name: "shop".to_owned(), size_bytes: None, on_target: Some(false) };
        CheckView { ok: true, checks: vec![found], databases: Some(vec![database]) }
    }

    fn reload(&self) -> Result<Changes, AdminError> {
        self.note("reload");
        let applied = vec!["cutover.max_pause".to_owned()];
        Ok(Changes { applied, needs_restart: vec!["source.host".to_owned()] })
    }

    fn set(&self, key: &str, value: &str) -> Result<(), AdminError> {
        self.note(format!("set {key} {value}"));
        Ok(())
    }

    fn shutdown(&self, when: ShutdownWhen) {
        self.note(format!("shutdown {when:?}"));
    }
}

/// The admin side of a daemon, listening.
pub struct Admin {
    pub fake: Arc<Fake>,
    pub switchboard: Arc<Switchboard>,
    pub service: Service,
    pub http: SocketAddr,
    pub console: SocketAddr,
    /// What every client of the console cancels with.
    pub key: ConsoleKey,
    pub tasks: Tasks,
}

pub async fn admin(change: impl FnOnce(&mut Config)) -> Admin {
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
    let console = Console::new(service.clone(), tasks.clone());
    let key = ConsoleKey::default();
    let given = key.clone();
    tasks.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(authenticated(stream, console.clone(), given.clone()));
        }
    });
    Admin { fake, switchboard, service, http, console: address, key, tasks }
}

/// What the proxy does before it hands a client to the console: the startup, here without any proof.
async fn authenticated(mut stream: tokio::net::TcpStream, console: Console, key: ConsoleKey) {
    let length = stream.read_u32().await.unwrap() as usize;
    let mut startup = vec![0; length - 4];
    stream.read_exact(&mut startup).await.unwrap();
    let words: Vec<&[u8]> = startup[4..].split(|byte| *byte == 0).collect();
    let user = words.chunks(2).find(|pair| pair[0] == b"user").map(|pair| pair[1]).unwrap();
    stream.write_all(b"R\0\0\0\x08\0\0\0\0").await.unwrap();
    console.serve(Stream::Tcp(stream), String::from_utf8(user.to_vec()).unwrap(), key).await;
}

impl Admin {
    pub async fn connect(&self, user: &str) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.console.port()).user(user).dbname("pgcutover");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Status, content type and body.
    pub async fn http(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String, String) {
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

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let (status, _, body) = self.http("GET", path, &[], "").await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, _, body) = self.http("POST", path, &[], &body).await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }
}
