//! `[pool]`: how server connections are shared, and what a database or a user has of its own.
//!
//! Names are PgBouncer's where it has them. `[pool.database.NAME]` and `[pool.user.NAME]` change some keys; a user's
//! value wins over a database's, which wins over `[pool]`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::reader::{Reader, Section};

/// The longest a server connection or a wait may be told to last.
const CONNECTIONS_MAX: usize = 100_000;

/// When a client gives its server connection back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoolMode {
    /// When it disconnects.
    #[default]
    Session,
    /// When its transaction ends.
    Transaction,
}

impl PoolMode {
    /// The words of the configuration.
    const WORDS: [(&'static str, Self); 2] = [("session", Self::Session), ("transaction", Self::Transaction)];

    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Transaction => "transaction",
        }
    }
}

/// `[pool]`
#[derive(Clone, Debug)]
pub struct Pool {
    /// When server connections are given back.
    pub mode: PoolMode,
    /// Server connections of one user in one database.
    pub default_pool_size: usize,
    /// So many are kept open, used or not.
    pub min_pool_size: usize,
    /// So many more may be opened when clients wait for long.
    pub reserve_pool_size: usize,
    /// How long is long.
    pub reserve_pool_timeout: Duration,
    /// Pooled server connections in one database, of all users; 0: no bound.
    pub max_db_connections: usize,
    /// Pooled server connections of one user, in all databases; 0: no bound.
    pub max_user_connections: usize,
    /// An idle connection older than this is closed; 0: never.
    pub server_lifetime: Duration,
    /// A connection idle for this long is closed; 0: never.
    pub server_idle_timeout: Duration,
    /// How long a connection that its client has left waits for another client, in session mode; 0: it is closed.
    pub server_linger: Duration,
    /// A connection idle for longer than this is checked before it is used; 0: always.
    pub server_check_delay: Duration,
    /// What is sent to check it; empty: an empty query.
    pub server_check_query: String,
    /// What wipes a connection whose state is not known, and in session mode every one that another client may get;
    /// empty: nothing does, and connections of session mode are closed.
    pub server_reset_query: String,
    /// Whether it is sent whenever a connection is given back, known or not.
    pub server_reset_query_always: bool,
    /// Protocol-level prepared statements kept on each server connection; 0: none are shared.
    pub max_prepared_statements: usize,
    /// Named prepared statements of one client in transaction mode; 0: any number.
    pub max_client_statements: usize,
    /// Bytes of their texts; 0: any number.
    pub max_client_statement_bytes: u64,
    /// What databases have of their own, by name.
    pub databases: BTreeMap<String, PoolOverride>,
    /// What users have of their own, by name.
    pub users: BTreeMap<String, PoolOverride>,
}

/// `[pool.database.NAME]` or `[pool.user.NAME]`: what is not set is as elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolOverride {
    /// When server connections are given back.
    pub mode: Option<PoolMode>,
    /// Server connections of one user in one database.
    pub default_pool_size: Option<usize>,
    /// So many are kept open.
    pub min_pool_size: Option<usize>,
    /// So many more when clients wait for long.
    pub reserve_pool_size: Option<usize>,
    /// The bound over all pools of the database, or of the user.
    pub max_connections: Option<usize>,
}

/// What holds for one user in one database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSizes {
    /// When server connections are given back.
    pub mode: PoolMode,
    /// Server connections.
    pub pool_size: usize,
    /// So many are kept open.
    pub min_pool_size: usize,
    /// So many more when clients wait for long.
    pub reserve_pool_size: usize,
    /// Bound over all pools of the database; 0: none.
    pub max_db_connections: usize,
    /// Bound over all pools of the user; 0: none.
    pub max_user_connections: usize,
}

impl Pool {
    /// What holds for `user` in `database`.
    pub fn sizes(&self, database: &str, user: &str) -> PoolSizes {
        let (of_database, of_user) = (self.databases.get(database), self.users.get(user));
        fn pick<T>(
            user: Option<&PoolOverride>,
            database: Option<&PoolOverride>,
            of: impl Fn(&PoolOverride) -> Option<T>,
            general: T,
        ) -> T {
            user.and_then(&of).or_else(|| database.and_then(&of)).unwrap_or(general)
        }
        PoolSizes {
            mode: pick(of_user, of_database, |own| own.mode, self.mode),
            pool_size: pick(of_user, of_database, |own| own.default_pool_size, self.default_pool_size),
            min_pool_size: pick(of_user, of_database, |own| own.min_pool_size, self.min_pool_size),
            reserve_pool_size: pick(of_user, of_database, |own| own.reserve_pool_size, self.reserve_pool_size),
            max_db_connections: of_database.and_then(|own| own.max_connections).unwrap_or(self.max_db_connections),
            max_user_connections: of_user.and_then(|own| own.max_connections).unwrap_or(self.max_user_connections),
        }
    }
}

impl PoolOverride {
    /// As `SHOW CONFIG` prints it.
    fn describe(&self, name: &str) -> String {
        let numbers = [
            ("default_pool_size", self.default_pool_size),
            ("min_pool_size", self.min_pool_size),
            ("reserve_pool_size", self.reserve_pool_size),
            ("max_connections", self.max_connections),
        ];
        let mode = self.mode.map(|mode| format!("mode={}", mode.as_str()));
        let numbers = numbers.iter().filter_map(|(key, number)| number.map(|number| format!("{key}={number}")));
        format!("{name}: {}", mode.into_iter().chain(numbers).collect::<Vec<_>>().join(" "))
    }
}

/// As `SHOW CONFIG` prints them.
pub(super) fn describe(overrides: &BTreeMap<String, PoolOverride>) -> String {
    overrides.iter().map(|(name, other)| other.describe(name)).collect::<Vec<_>>().join("; ")
}

/// Reads `[pool]` and what stands below it.
pub(super) fn read(reader: &mut Reader) -> Pool {
    let mut section = reader.section("pool");
    let count = |section: &mut Section<'_>, key, default, low| section.number(key, default, low..=CONNECTIONS_MAX);
    let mut pool = Pool {
        mode: section.choice("mode", PoolMode::Session, &PoolMode::WORDS),
        default_pool_size: count(&mut section, "default_pool_size", 20, 1),
        min_pool_size: count(&mut section, "min_pool_size", 0, 0),
        reserve_pool_size: count(&mut section, "reserve_pool_size", 0, 0),
        reserve_pool_timeout: section.duration("reserve_pool_timeout", Duration::from_secs(5)),
        max_db_connections: count(&mut section, "max_db_connections", 0, 0),
        max_user_connections: count(&mut section, "max_user_connections", 0, 0),
        server_lifetime: section.duration("server_lifetime", Duration::from_secs(3600)),
        server_idle_timeout: section.duration("server_idle_timeout", Duration::from_secs(600)),
        server_linger: section.duration("server_linger", Duration::from_secs(3)),
        server_check_delay: section.duration("server_check_delay", Duration::from_secs(30)),
        server_check_query: section.text("server_check_query").unwrap_or_default(),
        server_reset_query: section.text("server_reset_query").unwrap_or_else(|| "DISCARD ALL".to_owned()),
        server_reset_query_always: section.flag("server_reset_query_always", false),
        max_prepared_statements: section.number("max_prepared_statements", 200, 0..=1_000_000),
        max_client_statements: section.number("max_client_statements", 10_000, 0..=1_000_000),
        max_client_statement_bytes: section.size("max_client_statements_size", 64 << 20, 0..=1 << 40),
        databases: BTreeMap::new(),
        users: BTreeMap::new(),
    };
    section.moved("query_wait_timeout", "limits");
    drop(section);
    pool.databases = overrides(reader, "database");
    pool.users = overrides(reader, "user");
    pool
}

fn overrides(reader: &mut Reader, kind: &'static str) -> BTreeMap<String, PoolOverride> {
    let mut all = BTreeMap::new();
    let names = reader.section("pool").names(kind);
    for name in names {
        let mut section = reader.entry("pool", kind, name.clone());
        let mut count = |key, low| {
            let general = usize::MAX;
            let found = section.number(key, general, low..=CONNECTIONS_MAX);
            (found != general).then_some(found)
        };
        let own = PoolOverride {
            default_pool_size: count("default_pool_size", 1),
            min_pool_size: count("min_pool_size", 0),
            reserve_pool_size: count("reserve_pool_size", 0),
            max_connections: count(if kind == "user" { "max_user_connections" } else { "max_db_connections" }, 0),
            mode: None,
        };
        let choices = PoolMode::WORDS.map(|(word, mode)| (word, Some(mode)));
        let mode = section.choice("mode", None, &choices);
        drop(section);
        all.insert(name, PoolOverride { mode, ..own });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_wins_over_a_database_and_both_over_the_rest() {
        let config = crate::config::Config::new(
            crate::config::Server::new("a", 1, "postgres"),
            crate::config::Server::new("b", 1, "postgres"),
        );
        let mut pool = config.pool;
        assert_eq!((pool.sizes("shop", "ann").mode, pool.sizes("shop", "ann").pool_size), (PoolMode::Session, 20));
        let shop = PoolOverride {
            mode: Some(PoolMode::Transaction),
            default_pool_size: Some(5),
            max_connections: Some(9),
            ..PoolOverride::default()
        };
        let ann = PoolOverride { default_pool_size: Some(2), max_connections: Some(3), ..PoolOverride::default() };
        pool.databases.insert("shop".to_owned(), shop);
        pool.users.insert("ann".to_owned(), ann);
        let sizes = pool.sizes("shop", "ann");
        assert_eq!((sizes.mode, sizes.pool_size), (PoolMode::Transaction, 2));
        assert_eq!((sizes.max_db_connections, sizes.max_user_connections), (9, 3));
        assert_eq!(pool.sizes("shop", "bob").pool_size, 5);
        assert_eq!(pool.sizes("other", "bob").mode, PoolMode::Session);
    }
}
