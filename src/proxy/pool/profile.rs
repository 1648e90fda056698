//! What a client has set: settings and role, as they must be on whichever connection it gets.
//!
//! Equal ones are the same object within a pool, so that the usual question (is this connection as this client left
//! the last one?) compares two pointers.

use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use crate::proxy::handoff::{SessionState, Traces};
use crate::switch::ServerRole;

/// More than this, and those that nobody uses are forgotten.
const KEPT: usize = 1024;

/// ParameterStatus values, in the order of their first report.
pub(in crate::proxy) type Reported = Arc<Vec<(String, String)>>;

/// What was asked for in a startup packet, by name.
pub(in crate::proxy) type Startup = Vec<(String, String)>;

/// See the module.
pub(in crate::proxy) struct Profile {
    /// Settings and role.
    pub(in crate::proxy) state: Arc<SessionState>,
    /// The part of it that statements depend on. Equal ones are the same object.
    pub(in crate::proxy) meaning: Arc<SessionState>,
    /// What each transaction under it may leave behind, whatever it says.
    pub(in crate::proxy) leaves: Traces,
    /// What a server last reported under it.
    reported: Mutex<Option<(ServerRole, Reported)>>,
}

impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state.fmt(f)
    }
}

impl Profile {
    /// What a client is to be told that has this profile on `server`, if that is known.
    pub(in crate::proxy) fn reported(&self, server: ServerRole) -> Option<Reported> {
        let known = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|(on, _)| *on == server).map(|(_, reported)| reported.clone())
    }

    /// A server has reported this under it.
    pub(in crate::proxy) fn note_reported(&self, server: ServerRole, reported: &Reported) {
        *self.reported.lock().unwrap_or_else(PoisonError::into_inner) = Some((server, reported.clone()));
    }
}

/// Profiles are told apart by their state.
struct ByState(Arc<Profile>);

impl PartialEq for ByState {
    fn eq(&self, other: &Self) -> bool {
        self.0.state == other.0.state
    }
}

impl Eq for ByState {}

impl Hash for ByState {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.0.state.hash(hasher);
    }
}

impl std::borrow::Borrow<SessionState> for ByState {
    fn borrow(&self) -> &SessionState {
        &self.0.state
    }
}

/// All profiles of a pool.
#[derive(Default)]
pub(super) struct Profiles {
    known: HashSet<ByState>,
    meanings: HashSet<Arc<SessionState>>,
    /// What startup packets came to.
    startups: HashMap<Startup, Arc<Profile>>,
}

impl Profiles {
    /// The profile with this state.
    pub(super) fn of(&mut self, state: SessionState) -> Arc<Profile> {
        let state = state.into_settings();
        if let Some(ByState(known)) = self.known.get(&state) {
            return known.clone();
        }
        if self.known.len() >= KEPT {
            self.known.retain(|ByState(profile)| Arc::strong_count(profile) > 1);
            self.meanings.retain(|meaning| Arc::strong_count(meaning) > 1);
        }
        let meaning = state.meaning();
        let meaning = match self.meanings.get(&meaning) {
            Some(known) => known.clone(),
            None => {
                let meaning = Arc::new(meaning);
                self.meanings.insert(meaning.clone());
                meaning
            }
        };
        let leaves = state.leaves();
        let profile = Arc::new(Profile { state: Arc::new(state), meaning, leaves, reported: Mutex::new(None) });
        self.known.insert(ByState(profile.clone()));
        profile
    }

    /// What a client that starts like this has, once one such client has been served.
    pub(super) fn of_startup(&self, startup: &Startup) -> Option<Arc<Profile>> {
        self.startups.get(startup).cloned()
    }

    /// Remembers what a startup packet came to.
    pub(super) fn note_startup(&mut self, startup: Startup, profile: &Arc<Profile>) {
        if self.startups.len() >= KEPT {
            self.startups.clear();
        }
        self.startups.insert(startup, profile.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_states_are_one_object_and_share_their_meaning() {
        let mut profiles = Profiles::default();
        let state = |name: &str| SessionState::default().with_settings([("application_name", name), ("a.b", "c")]);
        let (a, again, b) = (profiles.of(state("a")), profiles.of(state("a")), profiles.of(state("b")));
        assert!(Arc::ptr_eq(&a, &again) && !Arc::ptr_eq(&a, &b));
        assert!(Arc::ptr_eq(&a.meaning, &b.meaning), "a name changes no statement's meaning");
        let startup = vec![("application_name".to_owned(), "a".to_owned())];
        assert!(profiles.of_startup(&startup).is_none());
        profiles.note_startup(startup.clone(), &a);
        assert!(profiles.of_startup(&startup).is_some_and(|known| Arc::ptr_eq(&known, &a)));
    }
}
