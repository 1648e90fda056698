//! Cancel keys of the proxy's own.
//!
//! A client gets a process id and a secret that mean something here only, so they stay valid when its session moves to
//! another server. The process id is that of the session's first backend, unless another session was told the same:
//! clients compare it with `pg_backend_pid()` and with the sender of a notification. The secret is ours. A CancelRequest is passed to the session itself, which alone knows whether it is held, which backend
//! is its own at this moment, and that this backend is not given up while a cancel is on its way to it. A client of the
//! console has a key as well; what waits for one of its orders is told.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use subtle::ConstantTimeEq as _;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

use super::entry::Entry;

/// Bytes of a secret: protocol 3.0 has room for four.
pub(super) const KEY_BYTES: usize = 4;

/// Whose key it is.
#[derive(Clone, Debug)]
pub(super) enum Holder {
    /// A session's.
    Session(Arc<Entry>),
    /// A client's of the console.
    Console(Arc<Notify>),
}

/// A secret and who it was given to.
type Issued = ([u8; KEY_BYTES], Holder);

/// Whom a key belongs to.
#[derive(Debug, Default)]
pub(super) struct CancelKeys {
    keys: Mutex<HashMap<i32, Issued>>,
}

/// A key that was given to somebody; gives it up when dropped.
#[derive(Debug)]
pub(super) struct CancelKey {
    registry: Arc<CancelKeys>,
    /// Shown to the client as its backend's process id.
    pub(super) pid: i32,
    /// Secret.
    pub(super) secret: [u8; KEY_BYTES],
}

/// What a client of the console cancels with, and how the console learns of it. The default is nobody's.
#[derive(Clone, Debug, Default)]
pub struct ConsoleKey {
    pid: i32,
    secret: [u8; KEY_BYTES],
    asked: Arc<Notify>,
}

impl ConsoleKey {
    /// Process id and secret that the client is told.
    pub fn told(&self) -> (i32, [u8; KEY_BYTES]) {
        (self.pid, self.secret)
    }

    /// The client asks for a cancel: what waits for one hears it. Where nothing does it is lost, as a server's is.
    pub fn ask(&self) {
        self.asked.notify_waiters();
    }

    /// Resolves when the client asks for a cancel after this call.
    pub fn asked(&self) -> OwnedNotified {
        self.asked.clone().notified_owned()
    }
}

impl CancelKeys {
    /// A fresh key for a session.
    pub(super) fn issue(self: &Arc<Self>, entry: &Arc<Entry>) -> CancelKey {
        self.give(Holder::Session(entry.clone()))
    }

    /// A fresh key for a client of the console, in force until the first of the two is dropped.
    pub(super) fn issue_to_console(self: &Arc<Self>) -> (CancelKey, ConsoleKey) {
        let asked = Arc::new(Notify::new());
        let key = self.give(Holder::Console(asked.clone()));
        let console_key = ConsoleKey { pid: key.pid, secret: key.secret, asked };
        (key, console_key)
    }

    fn give(self: &Arc<Self>, holder: Holder) -> CancelKey {
        let secret = rand::random();
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let pid = rand::random_range(1..=i32::MAX);
            if let std::collections::hash_map::Entry::Vacant(free) = keys.entry(pid) {
                free.insert((secret, holder));
                return CancelKey { registry: self.clone(), pid, secret };
            }
        }
    }

    /// Who this key was given to.
    pub(super) fn find(&self, pid: i32, key: &[u8]) -> Option<Holder> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (secret, holder) = keys.get(&pid)?;
        bool::from(secret.as_slice().ct_eq(key)).then(|| holder.clone())
    }
}

impl CancelKey {
    /// Changes the process id to that of the session's backend, before the client is told, if it is free.
    pub(super) fn take_pid(&mut self, pid: i32) {
        let mut keys = self.registry.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if pid <= 0 || keys.contains_key(&pid) {
            return;
        }
        if let Some(issued) = keys.remove(&self.pid) {
            keys.insert(pid, issued);
            self.pid = pid;
        }
    }
}

impl Drop for CancelKey {
    fn drop(&mut self) {
        self.registry.keys.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(found: Option<Holder>) -> Option<u64> {
        match found? {
            Holder::Session(entry) => Some(entry.id()),
            Holder::Console(_) => None,
        }
    }

    #[test]
    fn only_the_right_secret_finds_the_session_and_only_while_it_lives() {
        let keys = Arc::new(CancelKeys::default());
        let entry = Entry::for_tests(7);
        let key = keys.issue(&entry);
        assert_eq!(session(keys.find(key.pid, &key.secret)), Some(7));
        let mut wrong = key.secret;
        wrong[3] ^= 1;
        assert!(keys.find(key.pid, &wrong).is_none());
        assert!(keys.find(key.pid, &[]).is_none());
        let (pid, secret) = (key.pid, key.secret);
        drop(key);
        assert!(keys.find(pid, &secret).is_none());
    }

    #[tokio::test]
    async fn a_client_of_the_console_is_heard_by_what_waits_for_it() {
        let keys = Arc::new(CancelKeys::default());
        let (key, console_key) = keys.issue_to_console();
        assert_eq!(console_key.told(), (key.pid, key.secret));
        console_key.ask();
        let asked = console_key.asked();
        let mut asked = std::pin::pin!(asked);
        assert!(futures_util::poll!(asked.as_mut()).is_pending(), "it was asked for before");
        match keys.find(key.pid, &key.secret) {
            Some(Holder::Console(found)) => found.notify_waiters(),
            found => panic!("{found:?}"),
        }
        asked.await;
        drop(key);
        let (pid, secret) = console_key.told();
        assert!(keys.find(pid, &secret).is_none());
    }

    #[test]
    fn a_backends_process_id_is_given_to_one_session_only() {
        let keys = Arc::new(CancelKeys::default());
        let (mut first, mut second) = (keys.issue(&Entry::for_tests(1)), keys.issue(&Entry::for_tests(2)));
        let random = (first.pid, second.pid);
        first.take_pid(4711);
        second.take_pid(4711);
        assert_eq!((first.pid, second.pid), (4711, random.1));
        assert_eq!(session(keys.find(4711, &first.secret)), Some(1));
        assert_eq!(session(keys.find(random.1, &second.secret)), Some(2));
        assert!(keys.find(random.0, &first.secret).is_none());
        drop(first);
        second.take_pid(4711);
        assert_eq!(second.pid, 4711);
    }
}
