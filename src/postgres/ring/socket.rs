//! A socket of a ring, as the relay and everything else that reads and writes streams sees it.
//!
//! `poll_write` of a small message takes it as written once the ring has it: it is on its way to the kernel at the end of
//! the turn, in order, and a failure is told at the next write, flush or read, as the kernel's own buffer would. Whoever
//! must know waits for `poll_flush`. Must never wait for the kernel itself.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

use super::kernel::{CHUNK_BYTES, Kind, Request};
use super::{Reading, Ring, Slot, State, Writing};

/// What is larger is not copied, but written by the task itself.
const SMALL_BYTES: usize = CHUNK_BYTES;

/// A connected socket that a [`Ring`] serves.
#[derive(Debug)]
pub struct Socket {
    pub(super) ring: Ring,
    pub(super) number: usize,
}

impl Socket {
    /// Whether the other side has closed, as far as the kernel has been told.
    pub fn is_read_closed(&self) -> bool {
        let state = self.ring.state();
        let Some(slot) = &state.sockets[self.number] else { return true };
        let mut polled = [PollFd::new(&slot.fd, PollFlags::RDHUP)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}

impl Socket {
    /// Gives up what is under way and returns the socket once more. The ring's own is of no use from then on but to be
    /// dropped, unless this fails.
    pub(super) async fn settle(&self) -> io::Result<OwnedFd> {
        let asked = self.ring.state().sockets[self.number].as_ref().and_then(Slot::is_asked_to_read);
        if let Some(under_way) = asked {
            self.ring.state().ask(self.number, Request::Cancel(under_way))?;
        }
        std::future::poll_fn(|cx| self.ring.state().poll_settled(self.number, cx)).await
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let turn = ready!(coop::poll_proceed(cx));
        let read = self.ring.state().poll_read(self.number, cx, into);
        if read.is_ready() {
            turn.made_progress();
        }
        read.map_err(io::Error::from)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let turn = ready!(coop::poll_proceed(cx));
        let written = self.ring.state().poll_write(self.number, cx, bytes);
        if written.is_ready() {
            turn.made_progress();
        }
        written.map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ring.state().poll_writable(self.number, cx).map_err(io::Error::from)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.ring.state();
        ready!(state.poll_writable(self.number, cx))?;
        let Some(slot) = &state.sockets[self.number] else { return Poll::Ready(Err(Errno::BADF.into())) };
        Poll::Ready(socket2::SockRef::from(&slot.fd).shutdown(Shutdown::Write))
    }
}

impl Drop for Socket {
    /// What was written is still attempted; what the other side does not take is lost, as with any closed socket.
    fn drop(&mut self) {
        let mut state = self.ring.state();
        let Some(slot) = &mut state.sockets[self.number] else { return };
        slot.is_dropped = true;
        let writing = match slot.writing {
            Writing::Sending => Some(Kind::Send),
            Writing::Awaiting => Some(Kind::AwaitWritable),
            Writing::Free | Writing::Failed(_) => None,
        };
        for under_way in [slot.is_asked_to_read(), writing].into_iter().flatten() {
            // If not even this can be asked, the socket stays until its peer closes.
            let _asked = state.ask(self.number, Request::Cancel(under_way));
        }
        state.forget_if_done(self.number);
    }
}

impl Slot {
    /// What the kernel was asked for, to read.
    fn is_asked_to_read(&self) -> Option<Kind> {
        match self.reading {
            Reading::Receiving => Some(Kind::Receive),
            Reading::Awaiting => Some(Kind::AwaitReadable),
            Reading::Empty | Reading::Ready | Reading::Stopping | Reading::Ended | Reading::Failed(_) => None,
        }
    }
}

impl State {
    fn poll_read(&mut self, number: usize, cx: &Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<(), Errno>> {
        let Some(slot) = &mut self.sockets[number] else { return Poll::Ready(Err(Errno::BADF)) };
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let held = into.filled().len();
        while into.remaining() > 0
            && let Some(chunk) = slot.arrived.front_mut()
        {
            self.kernel.take(chunk, into);
            if chunk.len() == 0 {
                slot.arrived.pop_front().into_iter().for_each(|read| self.kernel.give_back(read));
            }
        }
        if into.filled().len() > held {
            return Poll::Ready(Ok(()));
        }
        loop {
            match slot.reading {
                Reading::Ready => {
                    let room = into.initialize_unfilled();
                    let size = room.len();
                    match rustix::net::recv(&slot.fd, room, RecvFlags::DONTWAIT) {
                        Ok((0, _)) => slot.reading = Reading::Ended,
                        Ok((count, _)) => {
                            into.advance(count);
                            // As with a poller that tells of changes: less than there is room for was all there was.
                            if count < size {
                                slot.is_bulk = count >= CHUNK_BYTES;
                                slot.reading = Reading::Empty;
                            }
                            return Poll::Ready(Ok(()));
                        }
                        Err(Errno::AGAIN) => slot.reading = Reading::Empty,
                        Err(Errno::INTR) => {}
                        Err(errno) => slot.reading = Reading::Failed(errno),
                    }
                }
                Reading::Empty => {
                    let (request, reading) = match slot.is_bulk {
                        true => (Request::AwaitReadable, Reading::Awaiting),
                        false => (Request::Receive, Reading::Receiving),
                    };
                    slot.reading = reading;
                    wait(&mut slot.reader, cx);
                    if let Err(errno) = self.ask(number, request) {
                        if let Some(slot) = &mut self.sockets[number] {
                            slot.reading = Reading::Failed(errno);
                        }
                        return Poll::Ready(Err(errno));
                    }
                    return Poll::Pending;
                }
                Reading::Receiving | Reading::Stopping | Reading::Awaiting => {
                    wait(&mut slot.reader, cx);
                    return Poll::Pending;
                }
                Reading::Ended => return Poll::Ready(Ok(())),
                Reading::Failed(errno) => return Poll::Ready(Err(errno)),
            }
        }
    }

    /// Ready once nothing is under way.
    fn poll_settled(&mut self, number: usize, cx: &Context<'_>) -> Poll<io::Result<OwnedFd>> {
        ready!(self.poll_writable(number, cx))?;
        let Some(slot) = &mut self.sockets[number] else { return Poll::Ready(Err(Errno::BADF.into())) };
        match slot.reading {
            Reading::Receiving | Reading::Stopping | Reading::Awaiting => {
                wait(&mut slot.reader, cx);
                Poll::Pending
            }
            _ if !slot.arrived.is_empty() => Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
            Reading::Failed(Errno::CANCELED) | Reading::Empty | Reading::Ready => Poll::Ready(slot.fd.try_clone()),
            Reading::Ended => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            Reading::Failed(errno) => Poll::Ready(Err(errno.into())),
        }
    }

    /// Ready once nothing is being sent.
    fn poll_writable(&mut self, number: usize, cx: &Context<'_>) -> Poll<Result<(), Errno>> {
        let Some(slot) = &mut self.sockets[number] else { return Poll::Ready(Err(Errno::BADF)) };
        match slot.writing {
            Writing::Free => Poll::Ready(Ok(())),
            Writing::Failed(errno) => Poll::Ready(Err(errno)),
            Writing::Sending | Writing::Awaiting => {
                wait(&mut slot.writer, cx);
                Poll::Pending
            }
        }
    }

    fn poll_write(&mut self, number: usize, cx: &Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Errno>> {
        ready!(self.poll_writable(number, cx))?;
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let (request, writing) = if bytes.len() <= SMALL_BYTES {
            let mut copy = self.spare.pop().unwrap_or_default();
            copy.clear();
            copy.extend_from_slice(bytes);
            (Request::Send(copy), Writing::Sending)
        } else {
            match self.send_now(number, bytes) {
                Err(Errno::AGAIN) => (Request::AwaitWritable, Writing::Awaiting),
                sent => return Poll::Ready(sent),
            }
        };
        if let Err(errno) = self.ask(number, request) {
            return Poll::Ready(Err(errno));
        }
        if let Some(slot) = &mut self.sockets[number] {
            slot.writing = writing;
        }
        match writing {
            Writing::Sending => Poll::Ready(Ok(bytes.len())),
            Writing::Awaiting | Writing::Free | Writing::Failed(_) => self.poll_writable(number, cx).map_ok(|()| 0),
        }
    }

    fn send_now(&self, number: usize, bytes: &[u8]) -> Result<usize, Errno> {
        let Some(slot) = &self.sockets[number] else { return Err(Errno::BADF) };
        loop {
            match rustix::net::send(&slot.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                sent => return sent,
            }
        }
    }
}

fn wait(place: &mut Option<Waker>, cx: &Context<'_>) {
    if !place.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *place = Some(cx.waker().clone());
    }
}
