//! Console and HTTP over one fake engine: the same order has the same effect whichever way it comes in.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod contract;
mod fake;

use std::sync::atomic::Ordering;
use std::time::Duration;

use pgcutover::config::Secret;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use fake::admin;

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
        ("DELETE", "/api/v1/sessions/8", "", 404, "no session has a server side"),
        ("DELETE", "/api/v1/sessions/7", "", 409, "sessions on both servers"),
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
    admin.service.expect_to_open();
    let (status, problem) = admin.get("/readyz").await;
    assert!(status == 503 && problem["detail"].as_str().unwrap().contains("is starting"), "{status} {problem}");
    admin.service.open();
    assert_eq!(admin.get("/readyz").await.0, 200);
    admin.switchboard.database("shop").set_unknown("both servers are away".to_owned());
    let (status, problem) = admin.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(problem["detail"].as_str().unwrap().contains("both servers are away"), "{problem}");
    let (_, status) = admin.get("/api/v1/status").await;
    assert_eq!((&status["ready"], &status["blockers"]), (&json!(false), &Value::Null));
    assert_eq!(status["routes"][0]["held"], json!(true));
    let (_, metrics) = admin.get("/metrics").await;
    let metrics = metrics.as_str().unwrap();
    for line in ["pgcutover_ready 0", "pgcutover_max_client_connections 10000", "pgcutover_cutover_max_pause_seconds 5"]
    {
        assert!(metrics.lines().any(|shown| shown == line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn every_show_verb_answers_in_both_protocols() {
    let admin = admin(|_| {}).await;
    let client = admin.connect("ann").await;
    client.batch_execute("CREATE MIGRATION m1 DATABASES shop").await.unwrap();
    let verbs = "HELP VERSION CONFIG DATABASES POOLS CLIENTS SERVERS STATS STATS_TOTALS STATS_AVERAGES TOTALS LISTS USERS \
                 SOCKETS ACTIVE_SOCKETS MEM STATE DNS_HOSTS DNS_ZONES PEERS STATUS MIGRATIONS,MIGRATION m1,TABLES m1,VALIDATION m1,CUTOVER m1,VERIFICATION m1,MEMBERS";
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
    for row in client.query("SHOW SOCKETS", &[]).await.unwrap() {
        assert_eq!((row.get::<_, &str>("pinned"), row.get::<_, Option<i64>>("recv_pos")), ("it listens", None));
    }
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
    let row = client.query_one("ROLLBACK m1", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>("outcome"), row.get::<_, &str>("direction")), ("switched", "reverse"));
    assert_eq!(row.get::<_, &str>("would"), "set sequences: 2");
    assert_eq!((row.get::<_, &str>("steps"), row.get::<_, i64>("sessions_held")), ("move sessions 1.5 ms", 3));
    client.batch_execute("COMPLETE m1").await.unwrap();
    let orders = [
        "create m1 shop,a b",
        "kill 42",
        "cutover m1 dry=true pause=Some(2000)",
        "rollback m1 dry=false pause=Some(5000)",
        "complete m1",
    ];
    assert_eq!(admin.fake.orders(), orders);
    for (sql, code, hint) in [
        ("SHOW MIGRATONS", "42601", Some("SHOW HELP lists the commands")),
        ("SELECT * FROM pg_class", "42601", Some("SHOW HELP lists the commands")),
        ("SHOW MIGRATION none", "42704", Some("SHOW MIGRATIONS")),
        ("RETRY m1", "55000", None),
        ("SHOW BLOCKERS", "57P03", None),
        ("KILL 7", "55000", Some("KILL_CLIENT with the id of SHOW CLIENTS")),
    ] {
        for error in [client.simple_query(sql).await.err(), client.query(sql, &[]).await.err()] {
            let error = error.expect(sql);
            let error = error.as_db_error().expect("from the server");
            assert_eq!((error.code().code(), error.hint()), (code, hint), "{sql}: {error}");
        }
    }
    // All rows of a message are in memory before the first is sent.
    client.simple_query(&"SHOW CONFIG;".repeat(16)).await.expect("answered");
    let error = client.simple_query(&"SHOW CONFIG;".repeat(17)).await.expect_err("too many");
    assert!(error.as_db_error().is_some_and(|error| error.message().contains("more than 16 statements")), "{error}");
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

#[tokio::test]
async fn orders_on_databases_are_those_of_pgbouncer_and_close_the_real_gate() {
    let admin = admin(|config| config.admin.stats_users = vec!["exporter".to_owned()]).await;
    let client = admin.connect("ann").await;
    let shop = admin.switchboard.database("shop");
    let member = shop.join();
    client.batch_execute("PAUSE shop").await.unwrap();
    assert!(member.try_enter().is_none(), "nobody is admitted");
    let refused = async |sql: &str| {
        let error = client.batch_execute(sql).await.expect_err(sql);
        let error = error.as_db_error().expect("from the server").clone();
        (error.code().code().to_owned(), error.message().to_owned())
    };
    assert_eq!(refused("PAUSE shop").await, ("55000".to_owned(), "database \"shop\" is paused already".to_owned()));
    assert_eq!(refused("PAUSE nowhere").await, ("42704".to_owned(), "no such database: nowhere".to_owned()));
    client.batch_execute("RESUME shop").await.unwrap();
    assert_eq!(refused("RESUME shop").await.0, "55000");

    // PAUSE answers when the last transaction has ended, and not before.
    let _admission = member.try_enter().expect("open again");
    let pausing = admin.connect("ann").await;
    let mut pause = std::pin::pin!(pausing.batch_execute("PAUSE"));
    let state = async || client.query("SHOW STATE", &[]).await.unwrap()[1].get::<_, String>("value");
    while state().await != "yes" {
        assert!(futures_util::poll!(pause.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    assert!(futures_util::poll!(pause.as_mut()).is_pending(), "a transaction runs");
    assert!(admin.switchboard.database("later").is_paused(), "databases that are asked for later, too");
    member.leave();
    pause.await.unwrap();
    client.batch_execute("RESUME").await.unwrap();

    // A cutover holds and releases by itself.
    shop.fence();
    let busy = ("55000".to_owned(), "a cutover of database \"shop\" is under way".to_owned());
    assert_eq!(refused("PAUSE").await, busy);
    assert_eq!(refused("PAUSE shop").await, busy);
    assert!(!admin.switchboard.database("later").is_paused(), "all or none");
    shop.reopen();

    client.batch_execute("DISABLE shop").await.unwrap();
    let row = &client.query("SHOW DATABASES", &[]).await.unwrap()[1];
    assert_eq!((row.get::<_, &str>("name"), row.get::<_, i64>("disabled")), ("shop", 1));
    client.batch_execute("ENABLE shop; RECONNECT shop").await.unwrap();
    let row = client.query_one("SHOW SERVERS", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>("close_needed"), 1, "it was connected before");
    client.batch_execute("WAIT_CLOSE later; KILL_CLIENT session-1; KILL shop; SET query_timeout = 2").await.unwrap();
    assert!(shop.is_paused(), "new sessions wait until RESUME");
    assert_eq!(refused("KILL_CLIENT 2").await.0, "42704");
    assert_eq!(refused("SUSPEND").await.0, "0A000");
    client.batch_execute("SHUTDOWN WAIT_FOR_CLIENTS").await.unwrap();
    let orders = [
        "kill client 1",
        "kill database shop",
        "set limits.query_timeout 2000000us",
        "kill client 2",
        "shutdown Clients",
    ];
    assert_eq!(admin.fake.orders(), orders);

    let exporter = admin.connect("exporter").await;
    exporter.simple_query("SHOW POOLS").await.expect("may look");
    let error = exporter.simple_query("PAUSE").await.expect_err("may do nothing");
    assert_eq!(error.code().map(|code| code.code()), Some("42501"));
}

#[tokio::test]
async fn http_gives_the_same_orders() {
    let admin = admin(|_| {}).await;
    for (path, status) in [
        ("/api/v1/databases/shop/pause", 200),
        ("/api/v1/databases/shop/pause", 409),
        ("/api/v1/databases/shop/resume", 200),
        ("/api/v1/databases/nowhere/pause", 404),
        ("/api/v1/databases/shop/dance", 404),
        ("/api/v1/pause", 200),
        ("/api/v1/resume", 200),
        ("/api/v1/databases/shop/disable", 200),
        ("/api/v1/reconnect", 200),
    ] {
        assert_eq!(admin.post(path, &Value::Null).await.0, status, "{path}");
    }
    assert!(admin.switchboard.database("shop").is_disabled());
    // Only what is there can be disabled, and what a migration is about to bring.
    assert_eq!(admin.post("/api/v1/migrations", &json!({"name": "m1"})).await.0, 201);
    assert_eq!(admin.post("/api/v1/databases/nosuch/disable", &Value::Null).await.0, 404);
    assert!(admin.switchboard.existing("nosuch").is_none(), "nothing is invented");
    assert_eq!(admin.http("DELETE", "/api/v1/clients/1", &[], "").await.0, 200);
    assert_eq!(admin.http("PUT", "/api/v1/settings/limits.resume_rate", &[], "{\"value\":\"5\"}").await.0, 200);
    assert_eq!(admin.post("/api/v1/shutdown", &json!({"wait_for": "servers"})).await.0, 200);
    let orders = ["create m1 ", "kill client 1", "set limits.resume_rate 5", "shutdown Servers"];
    assert_eq!(admin.fake.orders(), orders);
}

#[tokio::test]
async fn what_waits_is_taken_back_by_who_cancels_it() {
    let admin = admin(|_| {}).await;
    let client = admin.connect("ann").await;
    let (shop, billing) = (admin.switchboard.database("shop"), admin.switchboard.database("billing"));
    assert_eq!(billing.pause(), Ok(true));
    let member = shop.join();
    let _admission = member.try_enter().expect("it is open");
    for sql in ["PAUSE shop", "PAUSE"] {
        let mut pause = std::pin::pin!(client.batch_execute(sql));
        while !shop.is_paused() {
            assert!(futures_util::poll!(pause.as_mut()).is_pending());
            tokio::task::yield_now().await;
        }
        admin.key.ask();
        let error = pause.await.expect_err("taken back");
        assert_eq!(error.code().map(|code| code.code()), Some("57014"), "{sql}");
        assert!(!shop.is_paused() && !admin.switchboard.is_paused(), "{sql}");
        assert!(billing.is_paused(), "by an order of its own");
    }
    member.leave();
    client.batch_execute("PAUSE").await.unwrap();
    admin.key.ask();
    assert!(shop.is_paused(), "it does not wait any more");

    client.batch_execute("RESUME; RECONNECT shop").await.unwrap();
    let looks = || admin.fake.looks.load(Ordering::SeqCst);
    let before = looks();
    let mut wait = std::pin::pin!(client.batch_execute("WAIT_CLOSE shop"));
    while looks() == before {
        assert!(futures_util::poll!(wait.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    admin.key.ask();
    let error = wait.await.expect_err("taken back");
    assert_eq!(error.code().map(|code| code.code()), Some("57014"));
}

#[tokio::test]
async fn who_waits_for_connections_to_close_and_goes_is_not_waited_for() {
    let admin = admin(|_| {}).await;
    let looks = || admin.fake.looks.load(Ordering::SeqCst);
    let more_looks = async || {
        let before = looks();
        tokio::time::timeout(Duration::from_secs(30), async {
            while looks() < before + 3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("somebody looks");
    };
    admin.connect("ann").await.batch_execute("RECONNECT shop").await.unwrap();
    // By the console and by HTTP: the client closes its socket, and says nothing before.
    let mut stream = say_hello(&admin).await;
    stream.write_all(b"Q\0\0\0\x14WAIT_CLOSE shop\0").await.unwrap();
    more_looks().await;
    drop(stream);
    nobody_looks(&looks).await;
    let mut stream = tokio::net::TcpStream::connect(admin.http).await.unwrap();
    let request = "POST /api/v1/databases/shop/wait-close HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    more_looks().await;
    drop(stream);
    nobody_looks(&looks).await;
}

#[tokio::test]
async fn a_pause_whose_caller_hangs_up_is_taken_back() {
    let admin = admin(|_| {}).await;
    let shop = admin.switchboard.database("shop");
    let member = shop.join();
    let _admission = member.try_enter().expect("it is open");
    let becomes = async |paused: bool| {
        tokio::time::timeout(Duration::from_secs(30), async {
            while shop.is_paused() != paused || (!paused && admin.switchboard.is_paused()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("paused: {paused}"));
    };
    for path in ["/api/v1/databases/shop/pause", "/api/v1/pause"] {
        let mut stream = tokio::net::TcpStream::connect(admin.http).await.unwrap();
        let request = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        becomes(true).await;
        drop(stream);
        becomes(false).await;
    }
    member.leave();
    assert_eq!(admin.post("/api/v1/databases/shop/pause", &Value::Null).await.0, 200);
    assert!(shop.is_paused(), "it was answered");
}

/// A client of the console that has sent its startup packet.
async fn say_hello(admin: &fake::Admin) -> tokio::net::TcpStream {
    let mut stream = tokio::net::TcpStream::connect(admin.console).await.unwrap();
    let startup = b"\0\x03\0\0user\0ann\0\0";
    stream.write_u32(startup.len() as u32 + 4).await.unwrap();
    stream.write_all(startup).await.unwrap();
    stream
}

/// Waits until the sessions are not looked through any more.
async fn nobody_looks(looks: &impl Fn() -> usize) {
    let mut before = looks();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        match looks() {
            now if now == before => return,
            now => before = now,
        }
    }
    panic!("it is still waited for");
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused_before_it_is_read() {
    let admin = admin(|_| {}).await;
    let mut stream = say_hello(&admin).await;
    // Its first bytes only: nobody waits for the rest.
    stream.write_all(b"Q\x12\0\0\0SELECT").await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer))
        .await
        .expect("it is closed")
        .unwrap();
    let told = String::from_utf8_lossy(&answer);
    assert!(told.contains("FATAL\0C54000\0M") && told.contains("is longer than the console takes"), "{told:?}");
}

/// Columns of PgBouncer 1.24, in its order; ours may follow behind them.
const PGBOUNCER: [(&str, &str); 15] = [
    (
        "CLIENTS",
        "type user database replication state addr port local_addr local_port connect_time request_time wait wait_us \
         close_needed ptr link remote_pid tls application_name prepared_statements id",
    ),
    (
        "SERVERS",
        "type user database replication state addr port local_addr local_port connect_time request_time wait wait_us \
         close_needed ptr link remote_pid tls application_name prepared_statements id",
    ),
    (
        "POOLS",
        "database user cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active sv_active_cancel \
         sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us pool_mode load_balance_hosts",
    ),
    (
        "DATABASES",
        "name host port database force_user pool_size min_pool_size reserve_pool_size server_lifetime pool_mode \
         load_balance_hosts max_connections current_connections max_client_connections current_client_connections paused \
         disabled",
    ),
    (
        "STATS",
        "database total_server_assignment_count total_xact_count total_query_count total_received total_sent \
         total_xact_time total_query_time total_wait_time total_client_parse_count total_server_parse_count \
         total_bind_count avg_server_assignment_count avg_xact_count avg_query_count avg_recv avg_sent avg_xact_time \
         avg_query_time avg_wait_time avg_client_parse_count avg_server_parse_count avg_bind_count",
    ),
    (
        "STATS_TOTALS",
        "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time wait_time \
         client_parse_count server_parse_count bind_count",
    ),
    (
        "STATS_AVERAGES",
        "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time wait_time \
         client_parse_count server_parse_count bind_count",
    ),
    ("TOTALS", "name value"),
    ("LISTS", "list items"),
    (
        "USERS",
        "name pool_size reserve_pool_size pool_mode max_user_connections current_connections \
         max_user_client_connections current_client_connections",
    ),
    ("CONFIG", "key value default changeable"),
    ("MEM", "name size used free memtotal"),
    ("DNS_HOSTS", "hostname ttl addrs"),
    ("DNS_ZONES", "zonename serial count"),
    ("STATE", "key value"),
];

#[tokio::test]
async fn columns_are_those_of_pgbouncer() {
    let admin = admin(|_| {}).await;
    let client = admin.connect("ann").await;
    for (verb, expected) in PGBOUNCER {
        let statement = client.prepare(&format!("SHOW {verb}")).await.unwrap();
        let found: Vec<&str> = statement.columns().iter().map(|column| column.name()).collect();
        let expected: Vec<&str> = expected.split_whitespace().collect();
        assert_eq!(found[..expected.len()], expected, "SHOW {verb}");
    }
}

/// What prometheus-community/pgbouncer_exporter asks and how it reads the answer: text columns as labels, the others as
/// numbers, NULL as NaN; of lists and settings every value it knows must be a number.
#[tokio::test]
async fn the_prometheus_exporter_of_pgbouncer_reads_what_it_needs() {
    let admin = admin(|_| {}).await;
    let client = admin.connect("ann").await;
    let labels = "name host database force_user pool_mode user";
    for (sql, columns) in [
        (
            "SHOW DATABASES;",
            "name host port database force_user pool_size reserve_pool pool_mode max_connections current_connections \
             paused disabled",
        ),
        (
            "SHOW STATS_TOTALS;",
            "database query_count query_time bytes_received bytes_sent wait_time xact_count xact_time \
             client_parse_count server_parse_count bind_count",
        ),
        (
            "SHOW POOLS;",
            "database user cl_active cl_active_cancel_req cl_waiting cl_waiting_cancel_req sv_active sv_active_cancel \
             sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait",
        ),
    ] {
        let rows = client.query(sql, &[]).await.unwrap();
        assert!(!rows.is_empty(), "{sql}");
        for (row, column) in rows.iter().flat_map(|row| columns.split_whitespace().map(move |column| (row, column))) {
            let kind = row.columns().iter().find(|one| one.name() == column).map(|one| one.type_().name());
            let expected = if labels.split(' ').any(|label| label == column) { "text" } else { "int8" };
            assert_eq!(kind, Some(expected), "{sql} {column}");
        }
    }
    let value = |message: &tokio_postgres::SimpleQueryMessage, column| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(column).map(str::to_owned),
        _ => None,
    };
    let lists = client.simple_query("SHOW LISTS;").await.unwrap();
    let rows: Vec<_> = lists.iter().filter(|message| value(message, 0).is_some()).collect();
    assert!(rows.len() >= 12 && rows.iter().all(|row| value(row, 1).is_some_and(|items| items.parse::<f64>().is_ok())));
    let config = client.simple_query("SHOW CONFIG;").await.unwrap();
    for key in ["max_client_conn", "max_user_connections"] {
        let row = config.iter().find(|row| value(row, 0).as_deref() == Some(key)).expect(key);
        value(row, 1).and_then(|value| value.parse::<f64>().ok()).expect("a number");
    }
    assert!(!client.simple_query("SHOW VERSION;").await.unwrap().is_empty());
    // How its driver looks whether the connection lives.
    client.simple_query(";").await.expect("an empty query has an empty answer");
}
