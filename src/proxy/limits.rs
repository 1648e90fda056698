//! How many clients there may be: of one role, to one database, from one address.
//!
//! Counted at login and nowhere else. A place is taken before the session gets anything, and given up when its guard
//! is dropped, however the session ends.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::client_error::ClientError;
use crate::config::Limits;

/// What connections are counted by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Role(String),
    Database(String),
    Address(IpAddr),
}

impl Key {
    fn refusal(&self) -> ClientError {
        let (what, name) = match self {
            Self::Role(name) => ("role", name.clone()),
            Self::Database(name) => ("database", name.clone()),
            Self::Address(address) => ("address", address.to_string()),
        };
        ClientError::TooManyOf { what, name }
    }
}

/// The counts.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<HashMap<Key, usize>>);

/// One place; given up when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    key: Key,
}

impl Places {
    /// A place among the connections from the client's address. A Unix socket has none.
    pub(super) fn of_address(
        self: &Arc<Self>,
        limits: &Limits,
        client_address: &str,
    ) -> Result<Option<Place>, ClientError> {
        let Ok(address) = client_address.parse::<SocketAddr>() else { return Ok(None) };
        let max = Some(limits.max_address_connections).filter(|max| *max > 0);
        self.take(Key::Address(address.ip().to_canonical()), max).map(Some)
    }

    /// A place among the role's connections and one among the database's, for who has proved to be `user`.
    pub(super) fn of_session(
        self: &Arc<Self>,
        limits: &Limits,
        user: &str,
        database: &str,
    ) -> Result<[Place; 2], ClientError> {
        let of_user = self.take(Key::Role(user.to_owned()), limits.max_connections_of_user(user))?;
        let of_database =
            self.take(Key::Database(database.to_owned()), limits.max_connections_of_database(database))?;
        Ok([of_user, of_database])
    }

    fn take(self: &Arc<Self>, key: Key, max: Option<usize>) -> Result<Place, ClientError> {
        let mut counts = self.lock();
        let taken = counts.get(&key).copied().unwrap_or(0);
        if max.is_some_and(|max| taken >= max) {
            return Err(key.refusal());
        }
        counts.insert(key.clone(), taken + 1);
        Ok(Place { places: self.clone(), key })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.places.lock();
        match counts.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            // Nobody is left: the name must not stay for ever.
            Some(_) | None => drop(counts.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::limits::Override;
    use crate::config::{Config, Server};

    #[test]
    fn places_are_counted_by_role_database_and_address_and_given_back() {
        let mut limits = Config::new(Server::new("a", 1, "u"), Server::new("b", 1, "u")).limits;
        limits.max_user_connections = 1;
        limits.users.insert("ann".to_owned(), Override::connections(2));
        limits.max_database_connections = 2;
        limits.max_address_connections = 1;
        let places = Arc::new(Places::default());
        let refused = |what, name: &str| ClientError::TooManyOf { what, name: name.to_owned() };
        let first = places.of_session(&limits, "ann", "shop").expect("free");
        let _second = places.of_session(&limits, "ann", "x").expect("free");
        assert_eq!(places.of_session(&limits, "ann", "y").expect_err("two"), refused("role", "ann"));
        let _bob = places.of_session(&limits, "bob", "shop").expect("free");
        assert_eq!(places.of_session(&limits, "bob", "y").expect_err("one"), refused("role", "bob"));
        assert_eq!(places.of_session(&limits, "eve", "shop").expect_err("two"), refused("database", "shop"));
        drop(first);
        let _eve = places.of_session(&limits, "eve", "shop").expect("given back, eve's own too");
        let here = places.of_address(&limits, "127.0.0.1:5").expect("free");
        assert_eq!(places.of_address(&limits, "127.0.0.1:6").expect_err("one"), refused("address", "127.0.0.1"));
        assert_eq!(
            places.of_address(&limits, "[::ffff:127.0.0.1]:6").expect_err("one"),
            refused("address", "127.0.0.1")
        );
        assert!(places.of_address(&limits, "unix").expect("free").is_none());
        drop(here);
        assert!(places.of_address(&limits, "127.0.0.1:6").is_ok());
    }
}
