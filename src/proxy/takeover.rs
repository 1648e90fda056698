//! A new process takes over from the one that serves: listeners, cancels, and the knowledge of who still serves.
//!
//! Both meet at a Unix socket, `[listen] takeover_socket`, which only processes of the same user can use.
//!
//! ```text
//! new                                        old
//!  │ {"take_over":…}                          │ refuses while a cutover or a PAUSE is in force
//!  │◀──────────── listeners (SCM_RIGHTS) ─────│
//!  │ reads who is active, loads everything    │ goes on serving
//!  │ {"ready"} ──────────────────────────────▶│ stops accepting; moves its socket to takeover_socket.PID
//!  │◀────────────────────────────── {"closed"}│
//!  │ accepts                                  │ gives up engine, console, HTTP; serves its sessions to their end
//! ```
//!
//! The listening sockets stay open throughout, so a client that connects in between waits in the kernel's queue and is
//! never refused. As long as a predecessor answers at its socket it serves sessions that a cutover by this process would
//! not include, so there is none; a cancel with a key that is not known here is passed on to it. It is found by its
//! file, not by memory: a successor that is killed and started again knows it too.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};

/// Longest message.
const MESSAGE_MAX: usize = 16 * 1024;
/// Descriptors in one message.
const DESCRIPTORS_MAX: usize = 16;
/// For an answer that only has to be looked up.
const ANSWER_BOUND: Duration = Duration::from_secs(10);
/// For a successor to get ready: it reads both servers.
const READY_BOUND: Duration = Duration::from_secs(180);

/// Why a takeover did not happen.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// Nobody answers at the socket.
    #[error("nobody to take over from answers at {path}: {source}")]
    Nobody {
        /// The socket.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The other process said no.
    #[error("the process that serves refuses to be taken over from: {0}")]
    Refused(String),
    /// The other process broke off, or does not speak as expected.
    #[error("the other process broke off: {0}")]
    Broken(#[from] io::Error),
    /// The socket cannot be made.
    #[error("cannot listen for a successor at {path}: {source}")]
    Socket {
        /// The socket.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// What a descriptor that is handed over listens for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Clients over TCP.
    Tcp,
    /// Clients at this Unix socket.
    Unix(PathBuf),
    /// The same, where the socket's file belongs to the service manager.
    ManagedUnix(PathBuf),
    /// The HTTP API.
    Http,
}

/// A listening socket on its way from one process to the next.
#[derive(Debug)]
pub struct Handle {
    /// What it listens for.
    pub purpose: Purpose,
    /// The socket.
    pub socket: OwnedFd,
}

/// What is said.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// Successor: hand over.
    TakeOver,
    /// Successor: everything is loaded.
    Ready,
    /// Anybody: who are you?
    Who,
    /// A process that was asked for a cancel: is this your session?
    Cancel { pid: i32, key: Vec<u8> },
    /// No.
    Refused(String),
    /// With the descriptors.
    Listeners(Vec<Purpose>),
    /// Nobody is accepted any more.
    Closed,
    /// A process that serves sessions.
    Serving { pid: u32, clients: usize },
    /// The cancel was dealt with, or is nobody's.
    Done,
}

/// What a line says.
fn read_message(line: &[u8]) -> io::Result<Message> {
    Ok(serde_json::from_slice(line)?)
}

async fn send(stream: &mut UnixStream, message: &Message) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

async fn receive(stream: &mut UnixStream) -> io::Result<Message> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return read_message(&line),
            _ if line.len() >= MESSAGE_MAX => return Err(io::ErrorKind::InvalidData.into()),
            byte => line.push(byte),
        }
    }
}

async fn within<T>(bound: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(bound, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Sends a message and descriptors with its first byte.
async fn send_with(stream: &mut UnixStream, message: &Message, sockets: &[OwnedFd]) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let sockets: Vec<_> = sockets.iter().map(OwnedFd::as_fd).collect();
    let sent = stream.async_io(Interest::WRITABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&sockets)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(sendmsg(&*stream, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL)?)
    });
    let sent = sent.await?;
    stream.write_all(&line[sent..]).await
}

/// Receives a message and the descriptors that come with it.
async fn receive_with(stream: &UnixStream) -> io::Result<(Message, Vec<OwnedFd>)> {
    let (mut line, mut sockets) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let mut piece = [0; 4096];
        let count = stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let flags = RecvFlags::CMSG_CLOEXEC;
                let received = recvmsg(stream, &mut [IoSliceMut::new(&mut piece)], &mut ancillary, flags)?;
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(received) = message {
                        sockets.extend(received);
                    }
                }
                Ok(received.bytes)
            })
            .await?;
        if count == 0 || line.len() > MESSAGE_MAX {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&piece[..count]);
    }
    Ok((read_message(&line)?, sockets))
}

/// The side of the process that takes over.
#[derive(Debug)]
pub struct Successor {
    stream: UnixStream,
}

impl Successor {
    /// Asks the process at `path` to hand over. It goes on serving until [`Successor::ready`].
    pub async fn ask(path: &Path) -> Result<(Self, Vec<Handle>), TakeoverError> {
        let nobody = |source| TakeoverError::Nobody { path: path.display().to_string(), source };
        let mut stream = UnixStream::connect(path).await.map_err(nobody)?;
        send(&mut stream, &Message::TakeOver).await?;
        match within(ANSWER_BOUND, receive_with(&stream)).await? {
            (Message::Listeners(purposes), sockets) if purposes.len() == sockets.len() => {
                let handles = purposes.into_iter().zip(sockets);
                let handles = handles.map(|(purpose, socket)| Handle { purpose, socket });
                Ok((Self { stream }, handles.collect()))
            }
            (Message::Refused(reason), _) => Err(TakeoverError::Refused(reason)),
            (_, _) => Err(TakeoverError::Broken(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Says that everything is loaded. When this returns the predecessor accepts nobody any more, or is gone.
    pub async fn ready(mut self) {
        let closed = async {
            send(&mut self.stream, &Message::Ready).await?;
            receive(&mut self.stream).await
        };
        match within(ANSWER_BOUND, closed).await {
            Ok(_) => tracing::info!("the predecessor accepts nobody any more"),
            Err(error) => tracing::warn!(%error, "the predecessor did not say that it has stopped accepting"),
        }
    }
}

/// Somebody who asks this process to hand over.
#[derive(Debug)]
pub struct Request {
    stream: UnixStream,
}

impl Request {
    /// Says no, and why.
    pub async fn refuse(mut self, reason: &str) {
        // Whoever asked and does not listen knows that it has not been given anything.
        let _sent = within(ANSWER_BOUND, send(&mut self.stream, &Message::Refused(reason.to_owned()))).await;
    }

    /// Hands the listeners over and waits until the successor is ready. An error: there is none.
    pub async fn hand_over(&mut self, handles: Vec<Handle>) -> io::Result<()> {
        let (purposes, sockets): (Vec<_>, Vec<_>) = handles.into_iter().map(|one| (one.purpose, one.socket)).unzip();
        within(ANSWER_BOUND, send_with(&mut self.stream, &Message::Listeners(purposes), &sockets)).await?;
        match within(READY_BOUND, receive(&mut self.stream)).await? {
            Message::Ready => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Says that nobody is accepted any more.
    pub async fn closed(mut self) {
        // A successor that is gone leaves us where we are.
        let _sent = within(ANSWER_BOUND, send(&mut self.stream, &Message::Closed)).await;
    }
}

/// A process that has been taken over from and still serves sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Predecessor {
    /// Its process id.
    pub pid: u32,
    /// Its client connections.
    pub clients: usize,
}

/// Where the processes of one proxy meet.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    path: PathBuf,
}

/// What this process is asked at its socket.
pub(super) trait Served: Send + Sync + 'static {
    /// Client connections of this process.
    fn clients(&self) -> usize;
    /// Cancels what the session with this key runs; ready when it was dealt with. None of ours: at once.
    fn cancel(&self, pid: i32, key: &[u8]) -> futures_util::future::BoxFuture<'static, ()>;
}

impl Rendezvous {
    /// The meeting place at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn retired_path(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{}", std::process::id()));
        path.into()
    }

    /// Opens this process's own socket. One that nobody answers at is replaced.
    pub(super) fn bind(&self) -> Result<UnixListener, TakeoverError> {
        let failed = |source| TakeoverError::Socket { path: self.path.display().to_string(), source };
        if self.path.exists() {
            if std::os::unix::net::UnixStream::connect(&self.path).is_ok() {
                let taken = io::Error::new(io::ErrorKind::AddrInUse, "a process serves there; start with --takeover");
                return Err(failed(taken));
            }
            std::fs::remove_file(&self.path).map_err(failed)?;
        }
        let listener = UnixListener::bind(&self.path).map_err(failed)?;
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(listener)
    }

    /// Makes room for the successor's socket; this process is found at another name from now on.
    pub(super) fn retire(&self) -> io::Result<()> {
        std::fs::rename(&self.path, self.retired_path())
    }

    /// Removes this process's socket, whichever it is.
    pub(super) fn leave(&self, retired: bool) {
        // A file that stays is recognised by that nobody answers.
        let _removed = std::fs::remove_file(if retired { self.retired_path() } else { self.path.clone() });
    }

    /// Those that were taken over from and still serve.
    pub async fn predecessors(&self) -> Vec<Predecessor> {
        let mut found = Vec::new();
        for path in self.retired_paths() {
            match ask(&path, &Message::Who).await {
                Ok(Message::Serving { pid, clients }) if pid != std::process::id() => {
                    found.push(Predecessor { pid, clients });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    // It has ended without tidying up.
                    let _removed = std::fs::remove_file(&path);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a process that was taken over from does not answer");
                    // It is there, so it may serve.
                    found.push(Predecessor { pid: pid_of(&path).unwrap_or_default(), clients: 1 });
                }
            }
        }
        found
    }

    /// Passes a cancel on to those that were taken over from.
    pub(super) async fn pass_cancel(&self, pid: i32, key: &[u8]) {
        for path in self.retired_paths() {
            let cancel = Message::Cancel { pid, key: key.to_vec() };
            if let Err(error) = ask(&path, &cancel).await {
                tracing::debug!(path = %path.display(), %error, "a cancel could not be passed to a predecessor");
            }
        }
    }

    fn retired_paths(&self) -> Vec<PathBuf> {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let entries = std::fs::read_dir(directory.unwrap_or(Path::new("."))).into_iter().flatten().flatten();
        let own = std::process::id();
        let is_retired = |path: &PathBuf| {
            pid_of(path).is_some_and(|pid| pid != own) && path.with_extension("").file_name() == self.path.file_name()
        };
        entries.map(|entry| entry.path()).filter(is_retired).collect()
    }
}

/// `takeover.sock.4711` → 4711
fn pid_of(path: &Path) -> Option<u32> {
    path.extension()?.to_str()?.parse().ok()
}

async fn ask(path: &Path, question: &Message) -> io::Result<Message> {
    within(ANSWER_BOUND, async {
        let mut stream = UnixStream::connect(path).await?;
        send(&mut stream, question).await?;
        receive(&mut stream).await
    })
    .await
}

/// Answers at this process's socket. Requests to take over come out of `requests`; the others are dealt with here.
pub(super) async fn serve(
    listener: UnixListener,
    served: std::sync::Arc<dyn Served>,
    requests: tokio::sync::mpsc::Sender<Request>,
) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting at the takeover socket failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (served, requests) = (served.clone(), requests.clone());
        // Each ends by itself within its bound; a cancel within that of its session.
        tokio::spawn(async move {
            if let Err(error) = answer(stream, &*served, &requests).await {
                tracing::debug!(%error, "a conversation at the takeover socket broke off");
            }
        });
    }
}

async fn answer(
    mut stream: UnixStream,
    served: &dyn Served,
    requests: &tokio::sync::mpsc::Sender<Request>,
) -> io::Result<()> {
    // The file's mode says the same; a directory that others can write to must not change that.
    if stream.peer_cred()?.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    match within(ANSWER_BOUND, receive(&mut stream)).await? {
        Message::Who => {
            let answer = Message::Serving { pid: std::process::id(), clients: served.clients() };
            within(ANSWER_BOUND, send(&mut stream, &answer)).await
        }
        Message::Cancel { pid, key } => {
            served.cancel(pid, &key).await;
            within(ANSWER_BOUND, send(&mut stream, &Message::Done)).await
        }
        Message::TakeOver => {
            // A process that is ending, or has been taken over from, does not answer.
            let _sent = requests.send(Request { stream }).await;
            Ok(())
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing {
    use super::{Message, read_message};

    /// Lines that another process says at the socket: each is refused, or means the same once it is written again.
    pub fn takeover_messages(data: &[u8]) {
        for line in data.split(|byte| *byte == b'\n').take(64) {
            let Ok(message) = read_message(line) else { continue };
            let again = serde_json::to_vec(&message).expect("it can be written");
            assert!(!again.contains(&b'\n'), "a message is one line");
            assert_eq!(read_message(&again).expect("it can be read"), message);
            if let Message::Listeners(purposes) = message {
                assert!(purposes.len() <= line.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_is_handed_over_and_serves_on() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let rendezvous = Rendezvous::new(directory.path().join("takeover.sock"));
        let listening = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listening.local_addr().expect("bound");
        let socket = rendezvous.bind().expect("bound");
        assert!(matches!(rendezvous.bind(), Err(TakeoverError::Socket { .. })), "it is served");
        let old = async {
            let (_who_looked_whether_it_is_served, _) = socket.accept().await.expect("the second bind");
            let (stream, _) = socket.accept().await.expect("somebody asks");
            let (sender, mut requests) = tokio::sync::mpsc::channel(1);
            answer(stream, &Nothing, &sender).await.expect("asked");
            let mut request = requests.recv().await.expect("to take over");
            let handle = Handle { purpose: Purpose::Tcp, socket: listening.into() };
            request.hand_over(vec![handle]).await.expect("ready");
            rendezvous.retire().expect("renamed");
            request.closed().await;
        };
        let new = async {
            let (successor, mut handles) = Successor::ask(rendezvous.path()).await.expect("handed over");
            // In the kernel's queue before the old one closes and the new one accepts.
            let waiting = std::net::TcpStream::connect(address).expect("never refused");
            successor.ready().await;
            let handle = handles.pop().expect("one");
            assert_eq!(handle.purpose, Purpose::Tcp);
            let listening = std::net::TcpListener::from(handle.socket);
            let (accepted, _) = listening.accept().expect("was waiting");
            assert_eq!(accepted.peer_addr().expect("a peer"), waiting.local_addr().expect("bound"));
        };
        tokio::join!(old, new);
        assert_eq!(rendezvous.retired_paths(), Vec::<PathBuf>::new(), "its own is not its predecessor");
        assert!(rendezvous.retired_path().exists());
        rendezvous.leave(true);
        assert!(!rendezvous.retired_path().exists());
    }

    #[tokio::test]
    async fn a_predecessor_is_found_by_its_file_and_a_dead_one_is_forgotten() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let rendezvous = Rendezvous::new(directory.path().join("takeover.sock"));
        let (alive, dead) = (directory.path().join("takeover.sock.1"), directory.path().join("takeover.sock.2"));
        std::fs::write(directory.path().join("other.sock.3"), "").expect("written");
        drop(UnixListener::bind(&dead).expect("bound"));
        let listener = UnixListener::bind(&alive).expect("bound");
        let answering = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("asked");
            receive(&mut stream).await.expect("a question");
            send(&mut stream, &Message::Serving { pid: 1, clients: 5 }).await.expect("answered");
        });
        assert_eq!(rendezvous.predecessors().await, [Predecessor { pid: 1, clients: 5 }]);
        answering.await.expect("answered");
        assert!(!dead.exists() && alive.exists());
    }

    struct Nothing;

    impl Served for Nothing {
        fn clients(&self) -> usize {
            0
        }

        fn cancel(&self, _: i32, _: &[u8]) -> futures_util::future::BoxFuture<'static, ()> {
            Box::pin(async {})
        }
    }
}
