//! How many clients there may be, and that an operator gets in all the same.

use std::time::Duration;

use futures_util::StreamExt as _;
use pgcutover::config::limits::Override;
use pgcutover::config::{self, PoolMode};
use pgcutover::proxy::SessionState;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::rig::{Rig, server, text};
use crate::support::{self, one_cluster, wait_for};
use crate::wire_client::{WireClient, bind, execute, frame, parse, query, rows, sync};

/// SQLSTATE and message of a refused login.
async fn refusal(config: &tokio_postgres::Config) -> (String, String) {
    let error = support::try_connect(config).await.expect_err("refused");
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (error.code().code().to_owned(), error.message().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_databases_have_their_limits_and_places_are_given_back() {
    let cluster = one_cluster("limits");
    let direct = support::connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN").await.expect("created");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.limits.max_user_connections = 2;
        let one = Override::connections(1);
        config.limits.users.insert("ann".to_owned(), one);
        let one = Override::connections(1);
        config.limits.databases.insert("template1".to_owned(), one);
    });
    let mut ann = rig.client("postgres");
    ann.user("ann");
    let held = support::connect_with(&ann).await;
    let said = |what: &str| ("53300".to_owned(), format!("too many connections for {what}"));
    assert_eq!(refusal(&ann).await, said("role \"ann\""));
    let first = rig.connect("template1").await;
    assert_eq!(refusal(&rig.client("template1")).await, said("database \"template1\""));
    let _second = rig.connect("postgres").await;
    assert_eq!(refusal(&rig.client("postgres")).await, said("role \"postgres\""));
    assert_eq!(rig.metrics.clients_refused.with_label_values(&["share"]).get(), 3);
    drop((held, first));
    wait_for("places to be given back", || async { rig.sessions.list().len() == 1 }).await;
    support::connect_with(&ann).await;
    rig.connect("template1").await;
    rig.stop().await;
}

/// A server's own limit leaves no place for a connection beside the client's, not even where its database is new to us.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_one_connection_gets_in_where_nobody_was_before() {
    let cluster = one_cluster("single");
    let direct = support::connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE ROLE single LOGIN NOSUPERUSER CONNECTION LIMIT 1").await.expect("created");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.pool.server_linger = Duration::ZERO);
    for database in ["one", "two", "three", "four"] {
        direct.batch_execute(&format!("CREATE DATABASE {database}")).await.expect("created");
        let mut single = rig.client(database);
        single.user("single");
        drop(support::connect_with(&single).await);
        wait_for("it to be gone", || async {
            text(&direct, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'single'").await == "0"
        })
        .await;
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_limit_and_a_reload_changes_it() {
    let cluster = one_cluster("address");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| config.limits.max_address_connections = 1);
    let _first = rig.connect("postgres").await;
    let expected = "too many connections for address \"127.0.0.1\"".to_owned();
    assert_eq!(refusal(&rig.client("postgres")).await, ("53300".to_owned(), expected));
    rig.reload(|config| config.limits.max_address_connections = 2);
    let _second = rig.connect("postgres").await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_have_places_of_their_own() {
    let cluster = one_cluster("reserved");
    let direct = support::connect(&cluster, "postgres").await;
    direct.batch_execute("CREATE ROLE ann LOGIN").await.expect("created");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.limits.max_client_connections = 1;
        config.limits.reserved_admin_connections = 1;
        config.admin.users = vec!["postgres".to_owned()];
    });
    let mut ann = rig.client("postgres");
    ann.user("ann");
    let _first = support::connect_with(&ann).await;
    let full = ("53300".to_owned(), "sorry, too many clients already".to_owned());
    assert_eq!(refusal(&ann).await, full);
    // Who was refused has its place until its connection is closed.
    let let_in = async {
        loop {
            match support::try_connect(&rig.client("postgres")).await {
                Ok(operator) => break operator,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let operator = tokio::time::timeout(support::PATIENCE, let_in).await.expect("a place of its own");
    assert_eq!(refusal(&rig.client("postgres")).await, full, "their places are counted too");
    drop(operator);
    rig.stop().await;
}

/// A server that has one database, lets in whoever asks for it, and says nothing more.
async fn server_of_one() -> config::Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(let_in(stream));
        }
    });
    config::Server::new("127.0.0.1", port, "postgres")
}

async fn let_in(mut stream: TcpStream) -> std::io::Result<()> {
    loop {
        let length = stream.read_u32().await?;
        let mut packet = vec![0; length as usize - 4];
        stream.read_exact(&mut packet).await?;
        if packet[..4] != (3u32 << 16).to_be_bytes() {
            stream.write_all(b"N").await?;
            continue;
        }
        let answer = match packet.windows(14).any(|part| part == b"database\0shop\0") {
            true => [frame(b'R', &[0; 4]), frame(b'K', &[0, 0, 0, 1, 7, 7, 7, 7]), frame(b'Z', b"I")].concat(),
            false => frame(b'E', b"SFATAL\0VFATAL\0C3D000\0Mdatabase does not exist\0\0"),
        };
        stream.write_all(&answer).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_clients_make_up_leave_nothing_behind() {
    let server = server_of_one().await;
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let rig = Rig::start(server.clone(), server.clone(), |config| config.pool.mode = mode);
        let known = rig.board.all().len();
        let series =
            || rig.metrics.render().expect("rendered").lines().filter(|line| line.contains("invented")).count();
        let answers: Vec<String> = futures_util::stream::iter(0..2000)
            .map(|number| {
                let port = rig.port;
                async move {
                    let mut client = WireClient::connect(port).await;
                    client.start(&[("user", "postgres"), ("database", &format!("invented{number}"))]).await;
                    let error = client.until_ready().await.pop().expect("an answer");
                    error.code()
                }
            })
            .buffer_unordered(16)
            .collect()
            .await;
        assert!(answers.len() == 2000 && answers.iter().all(|code| code == "3D000"), "{mode:?}");
        rig.until_no_session().await;
        assert_eq!(rig.board.all().len(), known, "{mode:?}");
        assert_eq!((series(), rig.sessions.idle_backends().len()), (0, 0), "{mode:?}");
        // One that is there is met once and known from then on.
        if mode == PoolMode::Session {
            let mut client = WireClient::connect(rig.port).await;
            client.start(&[("user", "postgres"), ("database", "shop")]).await;
            assert!(client.tags_until_ready().await.ends_with("ZI"));
            assert!(rig.board.existing("shop").is_some());
        }
        rig.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooled_client_has_only_so_many_statements() {
    let cluster = one_cluster("statements");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.max_client_statements = 3;
    });
    let mut client = rig.wire("postgres").await;
    for name in ["a", "b", "c"] {
        client.send(&[parse(name, "SELECT 1"), sync()].concat()).await;
        assert_eq!(client.tags_until_ready().await, "1ZI");
    }
    // The unnamed one is none of them, one that is taken is an error of its own, and one that is closed makes room.
    client.send(&[parse("", "SELECT 2"), sync(), parse("a", "SELECT 1"), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "1ZI");
    assert_eq!(client.tags_until_ready().await, "EZI");
    client.send(&[frame(b'C', b"Sa\0"), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "3ZI");
    client.send(&[parse("d", "SELECT 3"), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "1ZI");
    client.send(&[parse("e", "SELECT 4"), sync()].concat()).await;
    let error = client.next().await.expect("an error");
    assert_eq!((error.tag, error.code().as_str()), ('E', "54000"));
    assert_eq!(client.next().await, None);
    // Somebody else has room, and the connection serves on.
    let mut other = rig.wire("postgres").await;
    other.send(&query("SELECT 1")).await;
    assert!(other.tags_until_ready().await.ends_with("ZI"));
    rig.stop().await;
}

/// Zero is no time at all to PgBouncer either: without one, there is no reserve.
#[tokio::test(flavor = "multi_thread")]
async fn a_reserve_without_a_time_is_never_opened() {
    let cluster = one_cluster("no_reserve");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = 1;
        config.pool.reserve_pool_size = 1;
        config.pool.reserve_pool_timeout = Duration::ZERO;
    });
    let (mut ann, mut bob) = (rig.wire("postgres").await, rig.wire("postgres").await);
    ann.send(&query("BEGIN")).await;
    assert_eq!(ann.tags_until_ready().await, "CZT");
    bob.send(&query("SELECT 1")).await;
    rig.until(SessionState::Waiting).await;
    assert!(bob.is_silent(Duration::from_millis(500)).await);
    ann.send(&query("COMMIT")).await;
    assert_eq!(ann.tags_until_ready().await, "CZI");
    assert_eq!(bob.tags_until_ready().await, "TDCZI");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooled_client_has_only_so_many_bytes_of_statements() {
    let cluster = one_cluster("statement_bytes");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.max_client_statement_bytes = 2 << 20;
    });
    let large = |name: &str| parse(name, &format!("SELECT '{name}' -- {}", "x".repeat(900_000)));
    let mut client = rig.wire("postgres").await;
    for name in ["a", "b"] {
        client.send(&[large(name), sync()].concat()).await;
        assert_eq!(client.tags_until_ready().await, "1ZI");
    }
    // As with their number.
    client.send(&[large(""), sync(), frame(b'C', b"Sa\0"), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "1ZI");
    assert_eq!(client.tags_until_ready().await, "3ZI");
    client.send(&[large("c"), sync(), bind("b"), execute(0), sync()].concat()).await;
    assert_eq!(client.tags_until_ready().await, "1ZI");
    assert_eq!(client.tags_until_ready().await, "2DCZI");
    client.send(&large("d")).await;
    let error = client.next().await.expect("an error");
    assert_eq!((error.tag, error.code().as_str()), ('E', "54000"));
    assert_eq!(client.next().await, None);
    // What is not answered counts as well.
    let mut hasty = rig.wire("postgres").await;
    hasty.send(&[large("a"), large("b"), large("c")].concat()).await;
    let mut last = String::new();
    while let Some(message) = hasty.next().await {
        last = message.code();
    }
    assert_eq!(last, "54000");
    rig.stop().await;
}

/// Statements outlive their clients on the connections that have them, where others would evict them one by one.
#[tokio::test(flavor = "multi_thread")]
async fn large_statements_go_for_others_on_a_connection() {
    let cluster = one_cluster("evicted_bytes");
    let rig = Rig::start(server(&cluster), server(&cluster), |config| {
        config.pool.mode = PoolMode::Transaction;
        config.pool.default_pool_size = 1;
    });
    let mut client = rig.wire("postgres").await;
    for number in 0..8 {
        let text = format!("SELECT {number} -- {}", "x".repeat(3 << 20));
        client.send(&[parse(&number.to_string(), &text), sync()].concat()).await;
        assert_eq!(client.tags_until_ready().await, "1ZI");
    }
    client.send(&query("SELECT sum(length(statement)) FROM pg_prepared_statements WHERE from_sql = false")).await;
    let there: u64 = rows(&client.until_ready().await)[0].parse().expect("a number");
    assert!((9 << 20..=16 << 20).contains(&there), "{there} bytes");
    // Those that went are prepared again when they are asked for.
    for number in 0..8 {
        client.send(&[bind(&number.to_string()), execute(0), sync()].concat()).await;
        assert_eq!(rows(&client.until_ready().await), [number.to_string()]);
    }
    rig.stop().await;
}
