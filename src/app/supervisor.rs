//! What the service manager is told: one datagram for each change of state, as `sd_notify(3)` describes it.
//!
//! Where `NOTIFY_SOCKET` is not set nobody is told anything. A manager that does not listen changes nothing here: it is
//! told, never waited for.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Supervisor {
    /// Connected to the manager's socket.
    socket: Option<UnixDatagram>,
}

/// A change of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Clients are let in.
    Ready,
    /// Clients are let in by this process, which was not started by the manager: the service's main process from now on.
    TakenOver,
    /// The configuration is being read again; [`Change::Ready`] follows.
    Reloading,
    /// The service ends.
    Stopping,
}

impl Supervisor {
    /// The manager that the environment names.
    pub(super) fn from_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        let socket = connect(&name).inspect_err(|error| {
            tracing::warn!(%error, "NOTIFY_SOCKET cannot be reached: the service manager is told nothing");
        });
        Self { socket: socket.ok() }
    }

    /// Tells it.
    pub(super) fn tell(&self, change: Change) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(words(change).as_bytes()) {
            tracing::warn!(%error, ?change, "the service manager could not be told");
        }
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    // A manager with a full queue must not hold a client up.
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address(name)?)?;
    Ok(socket)
}

/// A path, or with `@` in front a name in the abstract namespace.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    #[cfg(target_os = "linux")]
    if let Some(name) = name.as_bytes().strip_prefix(b"@") {
        return <SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name);
    }
    SocketAddr::from_pathname(name)
}

fn words(change: Change) -> String {
    match change {
        Change::Ready => "READY=1".to_owned(),
        Change::TakenOver => format!("MAINPID={}\nREADY=1", std::process::id()),
        // Without the time that `Type=notify-reload` asks for: `Type=notify` is what this speaks.
        Change::Reloading => "RELOADING=1".to_owned(),
        Change::Stopping => "STOPPING=1".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 256];
        let count = socket.recv(&mut bytes).expect("told");
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    #[test]
    fn each_change_is_one_datagram() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("bound");
        let supervisor = Supervisor { socket: Some(connect(path.as_os_str()).expect("connected")) };
        for (change, expected) in
            [(Change::Ready, "READY=1"), (Change::Reloading, "RELOADING=1"), (Change::Stopping, "STOPPING=1")]
        {
            supervisor.tell(change);
            assert_eq!(told(&manager), expected);
        }
        supervisor.tell(Change::TakenOver);
        assert_eq!(told(&manager), format!("MAINPID={}\nREADY=1", std::process::id()));
        // Nobody there, or gone: nothing happens.
        drop(manager);
        supervisor.tell(Change::Ready);
        Supervisor::default().tell(Change::Ready);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_abstract_name_is_understood() {
        let name = format!("@pgcutover-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&address(OsStr::new(&name)).expect("valid")).expect("bound");
        let supervisor = Supervisor { socket: Some(connect(OsStr::new(&name)).expect("connected")) };
        supervisor.tell(Change::Ready);
        assert_eq!(told(&manager), "READY=1");
    }
}
