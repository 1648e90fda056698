//! Sockets served by an io_uring: what many sessions have to send goes to the kernel in one system call.
//!
//! A thread that relays small messages spends its time in system calls, one for each message that it reads or writes, and
//! one to wait. A [`Ring`] gathers them: a [`Socket`] only notes what it wants; when every task that could run has run, the
//! ring's own task ([`Ring::drive`]) submits all of it at once. The runtime goes on waiting as it always does: to its
//! poller, the ring is one more descriptor that becomes readable. What comes while it sleeps ends the wait before that, and
//! is looked at when the thread wakes ([`Ring::look`]).
//!
//! ```text
//! the runtime wakes ─▶ drive: looks at the answers, wakes the tasks ─▶ tasks read what came, note what they send
//!        ▲                                                                             │
//!        └──────── sleeps ◀── drive: one io_uring_enter submits everything ◀───────────┘
//! ```
//!
//! What is small is received without being asked for again each time, into chunks that all sockets of the ring share. What
//! is large is not worth a copy and is read and written by the task itself; the ring then only tells when that is possible.
//! A socket whose chunks are not read in time stops receiving, and it owns at most one buffer that is being sent, so a peer
//! that does not read holds the other side back, as with any socket. Where a kernel has no io_uring, or forbids it, nobody
//! has a ring and everything works without.

#[expect(unsafe_code, reason = "memory is shared with the kernel; measured: a third less processor time a transaction")]
mod kernel;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use rustix::io::Errno;
use tokio::net::{TcpStream, UnixStream};

use super::Stream;
use kernel::{Answer, Chunk, Kernel, Kind, Request};
pub use socket::Socket;

/// A thread's io_uring. Sockets may be used anywhere, but only the thread that opened it submits.
#[derive(Clone, Debug)]
pub struct Ring(Arc<Mutex<State>>);

struct State {
    kernel: Kernel,
    sockets: Vec<Option<Slot>>,
    /// Numbers of sockets that are free.
    free: Vec<usize>,
    /// Buffers to send from that nobody uses.
    spare: Vec<Vec<u8>>,
    /// Wakes the task that submits.
    driver: Option<Waker>,
    /// It has been woken and has not run yet.
    is_called: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("sockets", &self.sockets.len()).finish_non_exhaustive()
    }
}

/// A socket as its ring knows it.
struct Slot {
    fd: OwnedFd,
    /// Received and not read yet, in order.
    arrived: VecDeque<Chunk>,
    reading: Reading,
    writing: Writing,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Chunks that came full since the last that did not.
    full_run: usize,
    /// Much was read last time: it is read into its place by the task, not through a chunk.
    is_bulk: bool,
    /// Its [`Socket`] is gone.
    is_dropped: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Found empty, and nothing is asked.
    Empty,
    /// There may be something to read.
    Ready,
    /// The kernel receives whatever comes.
    Receiving,
    /// It was asked to give that up: what comes is more than the reader takes.
    Stopping,
    /// The kernel was asked to tell when there is something.
    Awaiting,
    /// The other side has closed.
    Ended,
    Failed(Errno),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Writing {
    Free,
    /// The kernel sends.
    Sending,
    /// The kernel was asked to tell when there is room.
    Awaiting,
    Failed(Errno),
}

/// Chunks of a socket that may lie unread before the kernel is asked to stop receiving.
const UNREAD_MAX: usize = 4;
/// So many chunks that are full, one after the other, are much of something: it is asked to stop, too.
const FULL_RUN: usize = 4;
/// Buffers to send from that are kept.
const SPARE: usize = 256;

impl Ring {
    /// A ring for the calling thread. Its sockets work once [`Ring::drive`] runs there.
    pub fn open() -> io::Result<Self> {
        let kernel = Kernel::open()?;
        let (sockets, free, spare) = Default::default();
        Ok(Self(Arc::new(Mutex::new(State { kernel, sockets, free, spare, driver: None, is_called: false }))))
    }

    /// Lets the ring serve a plain stream from now on; one under TLS stays as it is.
    pub fn serve(&self, stream: &mut Stream) -> io::Result<()> {
        let fd = match stream {
            Stream::Tcp(socket) => socket.as_fd().try_clone_to_owned()?,
            Stream::Unix(socket) => socket.as_fd().try_clone_to_owned()?,
            Stream::Tls(_) | Stream::Ring(_) => return Ok(()),
        };
        // The kernel waits only for sockets that are allowed to block; whoever reads them here says that it will not.
        rustix::io::ioctl_fionbio(&fd, false)?;
        *stream = Stream::Ring(self.socket(fd));
        Ok(())
    }

    /// Takes a stream back from its ring, for who may use it on another thread. Fails, and leaves it where it is, if it has
    /// been closed or something has come that nobody has read.
    pub async fn release(stream: &mut Stream) -> io::Result<()> {
        let Stream::Ring(served) = stream else { return Ok(()) };
        let socket = socket2::Socket::from(served.settle().await?);
        socket.set_nonblocking(true)?;
        *stream = match socket.domain()? {
            socket2::Domain::UNIX => Stream::Unix(UnixStream::from_std(socket.into())?),
            _ => Stream::Tcp(TcpStream::from_std(socket.into())?),
        };
        Ok(())
    }

    fn socket(&self, fd: OwnedFd) -> Socket {
        let slot = Slot {
            fd,
            arrived: VecDeque::new(),
            reading: Reading::Empty,
            writing: Writing::Free,
            reader: None,
            writer: None,
            full_run: 0,
            is_bulk: false,
            is_dropped: false,
        };
        let mut state = self.state();
        let number = state.free.pop().unwrap_or(state.sockets.len());
        if number == state.sockets.len() {
            state.sockets.push(Some(slot));
        } else {
            state.sockets[number] = Some(slot);
        }
        Socket { ring: self.clone(), number }
    }

    /// Submits and looks at answers until it is dropped. To be run on the thread that opened the ring.
    pub async fn drive(self) -> io::Result<()> {
        let answers = self.state().kernel.watch()?;
        std::future::poll_fn(|cx| {
            loop {
                let mut state = self.state();
                if !state.driver.as_ref().is_some_and(|driver| driver.will_wake(cx.waker())) {
                    state.driver = Some(cx.waker().clone());
                }
                state.turn();
                drop(state);
                match answers.poll_read_ready(cx) {
                    // What was answered before this is looked at in the next turn; what comes after it wakes.
                    Poll::Ready(Ok(mut ready)) => ready.clear_ready(),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// To be called on the ring's thread whenever it has slept. What arrives meanwhile cuts the runtime's wait short, and
    /// its answer is made on the way out of the kernel: the runtime sees nothing, and would wait once more to be told of it.
    pub fn look(&self) {
        let mut state = self.state();
        if state.kernel.has_answers() {
            state.call_driver();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn turn(&mut self) {
        self.is_called = false;
        loop {
            if let Err(error) = self.kernel.submit() {
                // Short of memory: what was noted is still there for the next turn.
                tracing::warn!(%error, "io_uring_enter failed");
                return self.call_driver();
            }
            let Some(first) = self.kernel.answer() else { return };
            self.accept(first);
            while let Some(next) = self.kernel.answer() {
                self.accept(next);
            }
        }
    }

    fn call_driver(&mut self) {
        if !std::mem::replace(&mut self.is_called, true)
            && let Some(driver) = &self.driver
        {
            driver.wake_by_ref();
        }
    }

    /// Asks something of the kernel at the next turn. Whoever calls notes that it is under way.
    fn ask(&mut self, number: usize, request: Request) -> Result<(), Errno> {
        let Some(slot) = &self.sockets[number] else { return Err(Errno::BADF) };
        let asked = self.kernel.request(number, slot.fd.as_fd(), request);
        self.call_driver();
        asked.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    fn accept(&mut self, answer: Answer) {
        let Answer { socket: number, kind, result, chunk, sent, is_last } = answer;
        let Some(Some(slot)) = self.sockets.get_mut(number) else { return };
        match (kind, result) {
            (Kind::Receive, result) => {
                let has_come = chunk.is_some();
                slot.full_run = if chunk.as_ref().is_some_and(Chunk::came_full) { slot.full_run + 1 } else { 0 };
                slot.arrived.extend(chunk);
                let is_much = slot.arrived.len() > UNREAD_MAX || slot.full_run >= FULL_RUN;
                if is_last {
                    // Where chunks are wanting it reads by itself this time.
                    slot.is_bulk |= result == Err(Errno::NOBUFS);
                    slot.reading = match result {
                        Ok(_) if !has_come => Reading::Ended,
                        // Whatever made it stop, more may be there.
                        Ok(_) | Err(Errno::INTR | Errno::AGAIN | Errno::NOBUFS | Errno::CANCELED) => Reading::Ready,
                        Err(errno) => Reading::Failed(errno),
                    };
                } else if is_much && slot.reading == Reading::Receiving && !slot.is_dropped {
                    // The reader goes on by itself, as fast as it likes.
                    slot.reading = Reading::Stopping;
                    // If it cannot be asked, it goes on until there are no chunks left.
                    let _asked = self.ask(number, Request::Cancel(Kind::Receive));
                }
            }
            (Kind::AwaitReadable, Ok(_)) => slot.reading = Reading::Ready,
            (Kind::AwaitReadable, Err(errno)) => slot.reading = Reading::Failed(errno),
            (Kind::Send, result) => {
                slot.writing = match result {
                    Ok(count) if count == sent.len() => Writing::Free,
                    Ok(_) => Writing::Failed(Errno::PIPE),
                    Err(errno) => Writing::Failed(errno),
                };
                if self.spare.len() < SPARE {
                    self.spare.push(sent);
                }
            }
            (Kind::AwaitWritable, Ok(_)) => slot.writing = Writing::Free,
            (Kind::AwaitWritable, Err(errno)) => slot.writing = Writing::Failed(errno),
            (Kind::Cancel, _) => return,
        }
        let Some(Some(slot)) = self.sockets.get_mut(number) else { return };
        match kind {
            _ if slot.is_dropped => self.forget_if_done(number),
            // Who reads waits for nearly every answer, so its waker is kept; who writes, only when it was held back.
            Kind::Receive | Kind::AwaitReadable => slot.reader.iter().for_each(Waker::wake_by_ref),
            Kind::Send | Kind::AwaitWritable => slot.writer.take().into_iter().for_each(Waker::wake),
            Kind::Cancel => {}
        }
    }

    /// Closes a socket that nobody has any more, once the kernel is done with it.
    fn forget_if_done(&mut self, number: usize) {
        let Some(slot) = &mut self.sockets[number] else { return };
        if matches!(slot.reading, Reading::Receiving | Reading::Stopping | Reading::Awaiting)
            || matches!(slot.writing, Writing::Sending | Writing::Awaiting)
        {
            return;
        }
        let arrived = self.sockets[number].take().into_iter().flat_map(|slot| slot.arrived);
        arrived.for_each(|chunk| self.kernel.give_back(chunk));
        self.free.push(number);
    }
}
