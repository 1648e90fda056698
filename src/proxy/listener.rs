//! Accepting connections and giving each to one worker.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;

use super::takeover::{Handle, Purpose};
use crate::config::Tcp;
use crate::postgres::{Stream, watch_link};
use crate::shutdown::Tasks;

/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 1024;

/// A socket that is not registered with any runtime yet.
#[derive(Debug)]
enum Raw {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

/// An accepted connection on its way to a worker.
#[derive(Debug)]
pub(super) struct Accepted {
    socket: Raw,
    /// The other end; none: a Unix socket.
    pub(super) peer: Option<SocketAddr>,
}

impl Accepted {
    /// Registers the socket with the runtime of the calling worker.
    pub(super) fn into_stream(self) -> io::Result<Stream> {
        Ok(match self.socket {
            Raw::Tcp(socket) => Stream::Tcp(tokio::net::TcpStream::from_std(socket)?),
            Raw::Unix(socket) => Stream::Unix(tokio::net::UnixStream::from_std(socket)?),
        })
    }
}

/// Whose a Unix socket's file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum File {
    /// Removed when this process stops listening, unless a successor goes on.
    Ours,
    /// The service manager's, which keeps it.
    Managed,
}

/// A bound socket.
#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix { listener: UnixListener, path: PathBuf, handed_over: Arc<AtomicBool>, file: File },
}

/// Where clients connect.
#[derive(Debug)]
pub(super) struct Listener(Bound);

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Bound::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(_) => f.write_str("tcp"),
            },
            Bound::Unix { path, .. } => write!(f, "{}", path.display()),
        }
    }
}

impl Listener {
    /// Binds a TCP address.
    pub(super) fn tcp(address: SocketAddr, tcp: &Tcp) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        // What accepted connections inherit from it.
        socket.set_tcp_nodelay(true)?;
        watch_link(&SockRef::from(&socket), tcp)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(Self(Bound::Tcp(TcpListener::from_std(socket.into())?)))
    }

    /// Binds `.s.PGSQL.<port>` in `directory`. A socket file that nobody answers at is replaced.
    pub(super) fn unix(directory: &Path, port: u16) -> io::Result<Self> {
        let path = directory.join(format!(".s.PGSQL.{port}"));
        if path.exists() {
            if std::os::unix::net::UnixStream::connect(&path).is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another server answers at this socket"));
            }
            std::fs::remove_file(&path)?;
        }
        let listener = UnixListener::bind(&path)?;
        // As PostgreSQL's default unix_socket_permissions: authentication decides, not the file system.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777))?;
        Ok(Self(Bound::Unix { listener, path, handed_over: Arc::default(), file: File::Ours }))
    }

    /// The listener that a predecessor or the service manager has handed over for this address; port 0 takes any.
    pub(super) fn inherited_tcp(
        address: SocketAddr,
        tcp: &Tcp,
        inherited: &mut Vec<Handle>,
    ) -> io::Result<Option<Self>> {
        for index in 0..inherited.len() {
            if inherited[index].purpose != Purpose::Tcp {
                continue;
            }
            let listener = std::net::TcpListener::from(inherited[index].socket.try_clone()?);
            let bound = listener.local_addr()?;
            if bound == address || (address.port() == 0 && bound.ip() == address.ip()) {
                inherited.swap_remove(index);
                SockRef::from(&listener).set_tcp_nodelay(true)?;
                watch_link(&SockRef::from(&listener), tcp)?;
                return Ok(Some(Self(Bound::Tcp(TcpListener::from_std(listener)?))));
            }
        }
        Ok(None)
    }

    /// The Unix listener that a predecessor or the service manager has handed over for this directory and port.
    pub(super) fn inherited_unix(directory: &Path, port: u16, inherited: &mut Vec<Handle>) -> io::Result<Option<Self>> {
        let path = directory.join(format!(".s.PGSQL.{port}"));
        let owners = [(Purpose::Unix(path.clone()), File::Ours), (Purpose::ManagedUnix(path.clone()), File::Managed)];
        let fits = |(purpose, _): &(Purpose, File)| inherited.iter().position(|one| one.purpose == *purpose);
        let Some((index, file)) = owners.iter().find_map(|owner| Some((fits(owner)?, owner.1))) else {
            return Ok(None);
        };
        let listener = std::os::unix::net::UnixListener::from(inherited.swap_remove(index).socket);
        let listener = UnixListener::from_std(listener)?;
        Ok(Some(Self(Bound::Unix { listener, path, handed_over: Arc::default(), file })))
    }

    /// The same socket once more, for a successor.
    pub(super) fn handle(&self) -> io::Result<Handle> {
        let (socket, purpose) = match &self.0 {
            Bound::Tcp(listener) => (listener.as_fd().try_clone_to_owned()?, Purpose::Tcp),
            Bound::Unix { listener, path, file, .. } => {
                let purpose = match file {
                    File::Ours => Purpose::Unix(path.clone()),
                    File::Managed => Purpose::ManagedUnix(path.clone()),
                };
                (listener.as_fd().try_clone_to_owned()?, purpose)
            }
        };
        Ok(Handle { purpose, socket })
    }

    /// Set once a successor listens at the same place: its socket file then stays.
    pub(super) fn stay_when(&mut self, is_handed_over: &Arc<AtomicBool>) {
        if let Bound::Unix { handed_over, .. } = &mut self.0 {
            *handed_over = is_handed_over.clone();
        }
    }

    /// The TCP address that was bound; with port 0 the kernel chose it.
    pub(super) fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.0 {
            Bound::Tcp(listener) => listener.local_addr().ok(),
            Bound::Unix { .. } => None,
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match &self.0 {
            Bound::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                Ok(Accepted { socket: Raw::Tcp(socket.into_std()?), peer: Some(peer) })
            }
            Bound::Unix { listener, .. } => {
                let (socket, _) = listener.accept().await?;
                Ok(Accepted { socket: Raw::Unix(socket.into_std()?), peer: None })
            }
        }
    }

    /// Accepts until the tasks are told to stop, giving connections to the workers in turn.
    pub(super) async fn run(self, workers: Vec<mpsc::Sender<Accepted>>, tasks: Tasks) {
        tracing::info!(address = %self, "listening");
        let mut next = 0;
        loop {
            let accepted = tokio::select! {
                // Dropping an accept that has not resolved loses no connection: it stays in the kernel's queue.
                accepted = self.accept() => accepted,
                () = tasks.stopping() => break,
            };
            match accepted {
                Ok(accepted) => {
                    next = (next + 1) % workers.len();
                    // A worker that does not take connections any more has ended with the process.
                    if workers[next].send(accepted).await.is_err() {
                        break;
                    }
                }
                // Too many open files, or a client that has gone again: neither is a reason to stop listening.
                Err(error) => {
                    tracing::warn!(address = %self, %error, "accepting a connection failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Bound::Unix { path, handed_over, file: File::Ours, .. } = &self.0
            && !handed_over.load(Ordering::Acquire)
        {
            // Best effort: a socket file that stays is replaced at the next start.
            let _removed = std::fs::remove_file(path);
        }
    }
}
