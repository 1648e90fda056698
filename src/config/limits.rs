//! Limits and time-outs of client sessions, with what is said otherwise for single roles and databases.
//!
//! Resolving them is pure: who is nearer decides, the role before the database before the general value.

use std::collections::BTreeMap;
use std::time::Duration;

use super::reader::{Reader, Section};
use super::units::format_duration;

/// Time-outs of a session; zero: off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// A statement, from its first message to ReadyForQuery; it is cancelled (57014).
    pub query: Duration,
    /// A session outside of a transaction whose client says nothing (57P05).
    pub idle: Duration,
    /// A session in a transaction whose client says nothing (25P03).
    pub idle_transaction: Duration,
    /// A transaction from its first message to its end (25P04).
    pub transaction: Duration,
    /// The first message of a transaction that waits: because of PAUSE (57014), or for a connection of its pool (53300).
    /// Not counted while a cutover holds it: `max_pause` bounds that.
    pub query_wait: Duration,
    /// A session since it connected; it is ended where nothing is under way (57P01).
    pub lifetime: Duration,
}

/// Which time-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Query,
    Idle,
    IdleTransaction,
    Transaction,
    QueryWait,
    Lifetime,
}

/// `query_wait_timeout` unless configured otherwise, as PgBouncer's.
const QUERY_WAIT: Duration = Duration::from_secs(120);

/// Every time-out with its key.
const TIMEOUTS: [(&str, Which); 6] = [
    ("query_timeout", Which::Query),
    ("idle_timeout", Which::Idle),
    ("idle_transaction_timeout", Which::IdleTransaction),
    ("transaction_timeout", Which::Transaction),
    ("query_wait_timeout", Which::QueryWait),
    ("client_lifetime", Which::Lifetime),
];

impl Timeouts {
    fn get(&self, which: Which) -> Duration {
        match which {
            Which::Query => self.query,
            Which::Idle => self.idle,
            Which::IdleTransaction => self.idle_transaction,
            Which::Transaction => self.transaction,
            Which::QueryWait => self.query_wait,
            Which::Lifetime => self.lifetime,
        }
    }

    fn slot(&mut self, which: Which) -> &mut Duration {
        match which {
            Which::Query => &mut self.query,
            Which::Idle => &mut self.idle,
            Which::IdleTransaction => &mut self.idle_transaction,
            Which::Transaction => &mut self.transaction,
            Which::QueryWait => &mut self.query_wait,
            Which::Lifetime => &mut self.lifetime,
        }
    }

    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let mut timeouts = Self::default();
        for (key, which) in TIMEOUTS {
            let default = if which == Which::QueryWait { QUERY_WAIT } else { Duration::ZERO };
            *timeouts.slot(which) = section.duration(key, default);
        }
        timeouts
    }

    /// Key and value of each, in the order of the example file.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let values = TIMEOUTS.map(|(key, which)| (key, self.get(which)));
        values.into_iter()
    }

    /// The shortest that is on.
    pub fn shortest(&self) -> Option<Duration> {
        self.pairs().map(|(_, value)| value).filter(|value| !value.is_zero()).min()
    }
}

/// What is said otherwise for one role or one database; absent: as in general.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Override {
    max_connections: Option<usize>,
    timeouts: Vec<(&'static str, Duration)>,
}

impl Override {
    /// So many client connections at one time; 0: any number.
    pub fn connections(max: usize) -> Self {
        Self { max_connections: Some(max), ..Self::default() }
    }

    /// The same with this time-out, by the key of the configuration. Unknown keys are passed over.
    #[must_use]
    pub fn timeout(mut self, key: &str, value: Duration) -> Self {
        self.timeouts.extend(TIMEOUTS.iter().find(|(known, _)| *known == key).map(|(known, _)| (*known, value)));
        self
    }

    fn apply(&self, timeouts: &mut Timeouts) {
        for (key, which) in TIMEOUTS {
            if let Some((_, value)) = self.timeouts.iter().find(|(known, _)| *known == key) {
                *timeouts.slot(which) = *value;
            }
        }
    }

    fn read(section: &mut Section<'_>) -> Self {
        let max_connections = section.number("max_connections", usize::MAX, 0..=1_000_000);
        let timeouts = TIMEOUTS.iter().filter_map(|(key, _)| {
            let unset = Duration::MAX;
            Some((*key, section.duration(key, unset))).filter(|(_, value)| *value != unset)
        });
        Self { timeouts: timeouts.collect(), max_connections: Some(max_connections).filter(|max| *max != usize::MAX) }
    }

    fn describe(&self, name: &str) -> String {
        let connections = self.max_connections.map(|max| format!("max_connections={max}"));
        let timeouts = self.timeouts.iter().map(|(key, value)| format!("{key}={}", format_duration(*value)));
        let words: Vec<String> = connections.into_iter().chain(timeouts).collect();
        format!("{name}: {}", words.join(" "))
    }
}

/// What is said otherwise, by the name of a role or database.
pub type Overrides = BTreeMap<String, Override>;

/// The tables `[limits.user.NAME]` or `[limits.database.NAME]`.
pub(super) fn read_overrides(reader: &mut Reader, key: &'static str) -> Overrides {
    let names = reader.section("limits").names(key);
    names.into_iter().map(|name| (name.clone(), Override::read(&mut reader.entry("limits", key, name)))).collect()
}

/// As `SHOW CONFIG` prints them.
pub(super) fn describe(overrides: &Overrides) -> String {
    overrides.iter().map(|(name, other)| other.describe(name)).collect::<Vec<_>>().join("; ")
}

impl super::Limits {
    /// The time-outs of a session.
    pub fn timeouts_of(&self, user: &str, database: &str) -> Timeouts {
        let mut timeouts = self.timeouts;
        for nearer in [self.databases.get(database), self.users.get(user)].into_iter().flatten() {
            nearer.apply(&mut timeouts);
        }
        timeouts
    }

    /// The shortest value that each time-out has for any session; zero: off for all.
    pub fn shortest_timeouts(&self) -> Timeouts {
        let mut shortest = self.timeouts;
        for other in self.users.values().chain(self.databases.values()) {
            let mut own = Timeouts::default();
            other.apply(&mut own);
            for (_, which) in TIMEOUTS {
                let (known, new) = (shortest.slot(which), own.get(which));
                if !new.is_zero() && (known.is_zero() || new < *known) {
                    *known = new;
                }
            }
        }
        shortest
    }

    /// Client connections that `user` may have at one time; none: any number.
    pub fn max_connections_of_user(&self, user: &str) -> Option<usize> {
        let own = self.users.get(user).and_then(|own| own.max_connections);
        Some(own.unwrap_or(self.max_user_connections)).filter(|max| *max > 0)
    }

    /// Client connections to `database` at one time; none: any number.
    pub fn max_connections_of_database(&self, database: &str) -> Option<usize> {
        let own = self.databases.get(database).and_then(|own| own.max_connections);
        Some(own.unwrap_or(self.max_database_connections)).filter(|max| *max > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Server};

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_role_goes_before_the_database_and_both_before_the_general_value() {
        let mut limits = Config::new(Server::new("a", 1, "u"), Server::new("b", 1, "u")).limits;
        limits.timeouts.query = 9 * SECOND;
        limits.max_user_connections = 5;
        let ann = Override::connections(0).timeout("query_timeout", SECOND);
        limits.users.insert("ann".to_owned(), ann);
        let shop = Override::connections(7).timeout("query_timeout", 3 * SECOND).timeout("idle_timeout", 4 * SECOND);
        limits.databases.insert("shop".to_owned(), shop);
        let of = |user, database| limits.timeouts_of(user, database);
        assert_eq!((of("ann", "shop").query, of("ann", "shop").idle), (SECOND, 4 * SECOND));
        assert_eq!((of("bob", "shop").query, of("bob", "x").query), (3 * SECOND, 9 * SECOND));
        assert_eq!(of("bob", "x").idle, Duration::ZERO);
        let expected = Timeouts { query: SECOND, idle: 4 * SECOND, query_wait: QUERY_WAIT, ..Timeouts::default() };
        assert_eq!(limits.shortest_timeouts(), expected);
        assert_eq!((limits.max_connections_of_user("ann"), limits.max_connections_of_user("bob")), (None, Some(5)));
        assert_eq!(limits.max_connections_of_database("shop"), Some(7));
        assert_eq!(limits.max_connections_of_database("x"), None);
    }
}
