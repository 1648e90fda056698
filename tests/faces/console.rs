//! The console: statements of any PostgreSQL client, connected to the database `pgcutover` of the proxy's own port.

use pgcutover::demo::shop::SHOP;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use crate::Face;
use crate::support::daemon::Daemon;
use crate::support::world::NAME;
use crate::support::{connect_with, wait_for};

/// A session of the console.
pub struct Console {
    client: Client,
}

impl Console {
    pub async fn of(daemon: &Daemon) -> Self {
        Self { client: connect_with(&daemon.client("pgcutover")).await }
    }

    async fn rows(&self, statement: &str) -> Vec<SimpleQueryRow> {
        let messages =
            self.client.simple_query(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        let row = |message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None };
        messages.into_iter().filter_map(row).collect()
    }

    /// One value of a statement that answers with one row.
    async fn value(&self, statement: &str, column: &str) -> String {
        let rows = self.rows(statement).await;
        assert_eq!(rows.len(), 1, "{statement}");
        rows[0].get(column).unwrap_or_else(|| panic!("{statement}: {column} is null")).to_owned()
    }
}

impl Face for Console {
    async fn create(&mut self) {
        self.rows(&format!("CREATE MIGRATION {NAME} DATABASES {SHOP}")).await;
        wait_for("SHOW MIGRATIONS to say that it is ready", || async {
            let rows = self.rows("SHOW MIGRATIONS").await;
            let migration = rows.iter().find(|row| row.get("name") == Some(NAME));
            migration.is_some_and(|row| row.get("substatus") == Some("WaitingForCutoverTrigger"))
        })
        .await;
    }

    async fn verify(&mut self) {
        assert_eq!(self.value(&format!("VERIFY {NAME}"), "differences").await, "0");
    }

    async fn dry_run(&mut self) {
        assert_eq!(self.value(&format!("CUTOVER {NAME} DRY RUN"), "outcome").await, "dry-run");
    }

    async fn cut_over(&mut self) {
        assert_eq!(self.value(&format!("CUTOVER {NAME}"), "outcome").await, "switched");
    }

    async fn roll_back(&mut self) {
        assert_eq!(self.value(&format!("ROLLBACK {NAME}"), "outcome").await, "switched");
    }

    async fn complete(&mut self) {
        let rows = self.rows(&format!("COMPLETE {NAME}")).await;
        assert!(rows.iter().any(|row| row.get("kind") == Some("slot")), "{rows:?}");
    }
}
