//! The whole story, from a new migration to its completion, by each face of the program alone: the command line, the
//! console, the browser. While the shop's application writes, and with the same outcome.
//!
//! The browser's needs Chromium and its driver (Debian: chromium and chromium-driver); where they are missing, the tests
//! say so.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod browser;
mod command_line;
mod console;
mod pages;
#[path = "../support/mod.rs"]
mod support;
mod webdriver;

use pgcutover::demo::compare;
use pgcutover::demo::shop::SHOP;

use support::world::{COMPLETED, READY, World};
use support::{connect, shop, wait_for};

/// What an operator does, by one face. Each returns once the face itself says that it is done.
trait Face {
    /// Begins the migration of the shop, and follows it until it can be cut over.
    async fn create(&mut self);
    async fn verify(&mut self);
    async fn dry_run(&mut self);
    async fn cut_over(&mut self);
    async fn roll_back(&mut self);
    async fn complete(&mut self);
}

/// The story. Everything that is asserted is the same for every face.
async fn tell(world: World, mut face: impl Face) {
    let application = world.application(4);
    let session = support::connect_with(&world.daemon.client(SHOP)).await;
    let port = async || {
        let row = session.query_one("SELECT inet_server_port()", &[]).await.expect("the session goes on");
        u16::try_from(row.get::<_, i32>(0)).expect("a port")
    };
    let (source, target) = (world.source.port(), world.target.port());

    face.create().await;
    world.wait_until(READY).await;
    face.verify().await;
    face.dry_run().await;
    assert_eq!((world.state().as_str(), port().await), (READY, source));
    face.cut_over().await;
    assert_eq!(port().await, target);
    world.wait_until(COMPLETED).await;
    world.wait_for_writes(&application, 20).await;
    face.roll_back().await;
    assert_eq!(port().await, source);
    world.wait_until(READY).await;
    world.wait_for_writes(&application, 20).await;
    face.cut_over().await;
    assert_eq!(port().await, target);
    world.wait_until(COMPLETED).await;
    world.wait_for_writes(&application, 20).await;
    face.complete().await;
    wait_for("the migration to be closed", || async { world.state() == "Succeeded/Closed" }).await;

    let outcomes = application.finish().await;
    shop::nobody_noticed(&outcomes);
    shop::nothing_lost(&outcomes, &world.source, &world.target).await;
    assert_eq!(port().await, target, "one session, from the beginning to the end");
    for cluster in [&world.source, &world.target] {
        let client = connect(cluster, SHOP).await;
        let ours = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
        assert_eq!(client.query_one(ours, &[]).await.expect("readable").get::<_, i64>(0), 0);
    }
    // Rows that were written after the completion are on the target alone; definitions are the same.
    let (from, to) = (connect(&world.source, SHOP).await, connect(&world.target, SHOP).await);
    let mut differences = compare::differences(&from, &to).await.expect("both can be read");
    differences.retain(|one| !one.contains("their content differs") && !one.starts_with("sequence"));
    assert_eq!(differences, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_story_by_the_command_line_alone() {
    let world = World::begin(0.01).await;
    let face = command_line::CommandLine::of(&world.daemon);
    tell(world, face).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_story_by_the_console_alone() {
    let world = World::begin(0.01).await;
    let face = console::Console::of(&world.daemon).await;
    tell(world, face).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_story_by_clicks_alone() {
    let Some(browser) = webdriver::Browser::found("story") else { return };
    let world = World::begin(0.01).await;
    let face = browser::Clicks::at(browser, world.daemon.admin_port);
    tell(world, face).await;
}
