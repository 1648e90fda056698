//! Two throw-away servers, and each step of a copy between them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use pgcutover::catalog::journal::MadeObject;
use pgcutover::config::{self, Config, Ddl, Environment, Migration, WithoutIdentity};
use pgcutover::demo::cluster::{Cluster, ClusterOptions};
use pgcutover::failpoint::Failpoints;
use pgcutover::migration::copy::{
    self, CopiedRows, CopyContext, CopyError, CopyProgress, RecordError, SourceTable, Stage, TableRecorder, Workers,
};
use pgcutover::migration::made::{Journal, JournalError};
use pgcutover::migration::materialized;
use pgcutover::migration::roles::{self, Carried, RoleReport, RolesError};
use pgcutover::migration::schema::{self, Archive, Existing, PgDump, RestoreTarget};
use pgcutover::migration::snapshot::HandOver;
use pgcutover::migration::unstreamed;
use pgcutover::postgres::{Connector, InstanceId};

use crate::support;

/// An awkward name.
pub const DATABASE: &str = "shop \"Größe\"";

/// Two servers and what a migration is configured with.
pub struct Rig {
    pub source_cluster: Cluster,
    pub target_cluster: Cluster,
    pub source: Connector,
    pub target: Connector,
    pub config: Migration,
    pub whole: Config,
    pub journal: Recorded,
}

/// A journal and a record of tables in memory.
#[derive(Clone, Default)]
pub struct Recorded {
    pub made: Arc<Mutex<Vec<MadeObject>>>,
    pub snapshots: Arc<Mutex<HashMap<String, HandOver>>>,
    pub copied: Arc<Mutex<BTreeMap<String, CopiedRows>>>,
    pub indexed: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Journal for Recorded {
    async fn record(&self, made: &MadeObject) -> Result<(), JournalError> {
        self.made.lock().unwrap().push(made.clone());
        Ok(())
    }
}

#[async_trait]
impl TableRecorder for Recorded {
    async fn snapshot_taken(&self, table: &SourceTable, hand_over: &HandOver) -> Result<(), RecordError> {
        self.snapshots.lock().unwrap().insert(table.name.name.clone(), hand_over.clone());
        Ok(())
    }
    async fn rows_copied(&self, table: &SourceTable, copied: CopiedRows) -> Result<(), RecordError> {
        self.copied.lock().unwrap().insert(table.name.name.clone(), copied);
        Ok(())
    }
    async fn indexes_built(&self, table: &SourceTable) -> Result<(), RecordError> {
        self.indexed.lock().unwrap().push(table.name.name.clone());
        Ok(())
    }
}

impl CopyProgress for Recorded {
    fn started(&self, _: &SourceTable) {}
    fn moved(&self, _: &SourceTable, _: u64, _: u64) {}
    fn indexes(&self, _: &SourceTable, _: usize, _: usize) {}
    fn building(&self, _: &SourceTable, _: isize) {}
}

fn configuration(source: &Cluster, target: &Cluster) -> Config {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pgcutover.toml");
    let section = |name: &str, cluster: &Cluster| {
        let password = cluster.password().map_or_else(String::new, |password| format!("password = {password:?}\n"));
        format!(
            "[{name}]\nhost = {:?}\nport = {}\nuser = \"postgres\"\nsslmode = \"disable\"\n{password}",
            cluster.host(),
            cluster.port()
        )
    };
    let text =
        format!("[listen]\naddress = \"127.0.0.1:6432\"\n{}{}", section("source", source), section("target", target));
    std::fs::write(&path, text).unwrap();
    config::load(Some(&path), &Environment::default()).unwrap_or_else(|error| panic!("{error}"))
}

impl Rig {
    pub fn start() -> Self {
        Self::start_with(|options| options, |options| options)
    }

    pub fn start_with(
        source: impl FnOnce(ClusterOptions) -> ClusterOptions,
        target: impl FnOnce(ClusterOptions) -> ClusterOptions,
    ) -> Self {
        Self::of(support::two_clusters_with(source, target))
    }

    /// Between these two.
    pub fn of((source_cluster, target_cluster): (Cluster, Cluster)) -> Self {
        let whole = configuration(&source_cluster, &target_cluster);
        let config = Migration {
            copy_workers: 3,
            index_workers: 2,
            part_bytes: 256 * 1024,
            without_identity: WithoutIdentity::Full,
            ddl: Ddl::Apply,
            slot_timeout: support::PATIENCE,
            lock_timeout: Duration::from_millis(500),
            ..whole.migration.clone()
        };
        let whole = Config { migration: config.clone(), ..whole };
        let instance = InstanceId::random();
        let source = Connector::new(&whole.source, "source", &instance).unwrap();
        let target = Connector::new(&whole.target, "target", &instance).unwrap();
        Self { whole, source_cluster, target_cluster, source, target, config, journal: Recorded::default() }
    }

    /// From now on both servers are logged in to as `user`.
    pub fn log_in_as(&mut self, user: &str) {
        for (server, connector) in
            [(&mut self.whole.source, &mut self.source), (&mut self.whole.target, &mut self.target)]
        {
            server.user = user.to_owned();
            *connector = Connector::new(server, connector.label(), connector.instance()).unwrap();
        }
    }

    /// Runs statements on the source, in the database that is migrated.
    pub async fn on_source(&self, sql: &str) {
        let client = support::connect(&self.source_cluster, DATABASE).await;
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    }

    pub async fn make_source(&self, sql: &str) {
        let client = support::connect(&self.source_cluster, "postgres").await;
        client.batch_execute(&format!("CREATE DATABASE \"{}\"", DATABASE.replace('"', "\"\""))).await.unwrap();
        self.on_source(sql).await;
    }

    /// For the first time.
    pub async fn copy_roles(&self) -> Result<Vec<RoleReport>, RolesError> {
        roles::copy_roles(&self.source, &self.target, &self.journal, &mut Carried::default()).await
    }

    pub async fn pg_dump(&self) -> PgDump {
        let majors = [&self.source_cluster, &self.target_cluster].map(|cluster| u32::from(cluster.major()));
        schema::find_pg_dump(&self.config, majors[0], majors[1]).await.unwrap()
    }

    pub async fn dump(&self) -> Archive {
        schema::dump(&self.pg_dump().await, &self.source, DATABASE, self.config.lock_timeout).await.unwrap()
    }

    /// The database and everything before the rows.
    pub async fn restore_pre_data(&self, archive: &Archive) {
        schema::create_database(&self.source, &self.target, DATABASE, Existing::Keep, &self.journal).await.unwrap();
        let report = schema::restore_pre_data(&self.restore_target(), archive).await.unwrap();
        assert_eq!(report.failures, []);
    }

    pub fn restore_target(&self) -> RestoreTarget<'_> {
        RestoreTarget { connector: &self.target, database: DATABASE, guard: None }
    }

    pub fn context(&self, barrier_xid: Option<u64>) -> CopyContext {
        CopyContext {
            source: self.source.clone(),
            target: self.target.clone(),
            database: DATABASE.to_owned(),
            config: self.config.clone(),
            workers: Workers::new(&self.config),
            barrier_xid,
            guard: None,
            recorder: Arc::new(self.journal.clone()),
            progress: Arc::new(self.journal.clone()),
            failpoints: Failpoints::none(),
        }
    }

    pub async fn tables(&self) -> Vec<(SourceTable, Stage)> {
        let control = self.source.control(DATABASE, "test").await.unwrap();
        let tables = copy::list_tables(&control).await.unwrap();
        tables.into_iter().map(|table| (table, Stage::Rows)).collect()
    }

    pub async fn copy(&self, archive: &Archive) -> Result<(), CopyError> {
        let report = copy::copy_database(&self.context(None), &self.tables().await, archive).await?;
        assert_eq!(report.failures, []);
        Ok(())
    }

    /// Everything after the rows.
    pub async fn finish(&self, archive: &Archive) {
        let target = self.restore_target();
        let from = self.source.control(DATABASE, "test").await.unwrap();
        let to = self.target.control(DATABASE, "test").await.unwrap();
        unstreamed::bring_over(&from, &to).await.unwrap();
        for report in [
            schema::restore_after_copy(&target, archive).await.unwrap(),
            schema::restore_foreign_keys(&target, archive).await.unwrap(),
            schema::restore_last(&target, archive).await.unwrap(),
        ] {
            assert_eq!(report.failures, []);
        }
        let refreshed = materialized::refresh(&self.source, &self.target, DATABASE, None).await.unwrap();
        assert_eq!(refreshed, materialized::Refreshed::default());
        schema::analyze(&self.target, DATABASE).await.unwrap();
    }

    pub async fn assert_same_definitions(&self) {
        let pg_dump = self.pg_dump().await;
        if pg_dump.major < u32::from(self.target_cluster.major()) {
            eprintln!("pg_dump is too old to read the target: definitions are not compared");
            return;
        }
        let lock_timeout = self.config.lock_timeout;
        let source = schema::definitions(&pg_dump, &self.source, DATABASE, lock_timeout).await.unwrap();
        let target = schema::definitions(&pg_dump, &self.target, DATABASE, lock_timeout).await.unwrap();
        for (line, (left, right)) in source.lines().zip(target.lines()).enumerate() {
            assert_eq!(left, right, "definitions differ at line {line}");
        }
        assert_eq!(source.len(), target.len());
    }

    /// A digest of every table's rows, on both sides.
    pub async fn assert_same_rows(&self) {
        let tables = self.tables().await;
        let (source, target) = (
            support::connect(&self.source_cluster, DATABASE).await,
            support::connect(&self.target_cluster, DATABASE).await,
        );
        for (table, _) in tables {
            let digest = format!(
                "SELECT count(*), coalesce(md5(string_agg(t::text, E'\\n' ORDER BY t::text)), '') FROM ONLY {} t",
                table.name
            );
            let read = async |client: &tokio_postgres::Client| {
                // Up to 15 digits every version prints the same.
                client.batch_execute("SET extra_float_digits = 0").await.unwrap();
                let row = client.query_one(digest.as_str(), &[]).await.unwrap();
                (row.get::<_, i64>(0), row.get::<_, String>(1))
            };
            assert_eq!(read(&source).await, read(&target).await, "{}", table.name);
        }
        let (from, to) = (self.source.control(DATABASE, "test"), self.target.control(DATABASE, "test"));
        let carried = unstreamed::bring_over(&from.await.unwrap(), &to.await.unwrap()).await.unwrap();
        assert_eq!(carried, unstreamed::Carried::default(), "unlogged tables and large objects are there already");
    }
}
