//! One type for every byte stream: TCP, Unix socket, or TLS over either, towards clients and towards servers.

use std::io::{self, Read as _};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;

use super::ring;

/// A connected byte stream.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP, `TCP_NODELAY` set.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS over TCP, client or server side.
    Tls(Box<TlsStream<TcpStream>>),
    /// TCP or a Unix socket that an io_uring serves: a session's, once it relays.
    Ring(ring::Socket),
}

impl Stream {
    /// Whether what is sent cannot be read on the way: TLS, or a Unix socket that never leaves the machine.
    pub fn is_private(&self) -> bool {
        !matches!(self, Self::Tcp(_) | Self::Ring(_))
    }

    /// Breaks the connection once sent bytes stay unacknowledged for `limit`; the kernel's own limit is about a quarter
    /// of an hour, because keepalive probes wait until everything sent is acknowledged. Only for peers that always
    /// read: a full receive window counts as silence too. Does nothing for Unix sockets and those of a ring, nor where the system cannot.
    pub(super) fn limit_unacknowledged(&self, limit: Duration) -> io::Result<()> {
        let Some(tcp) = self.as_tcp() else { return Ok(()) };
        #[cfg(target_os = "linux")]
        socket2::SockRef::from(tcp).set_tcp_user_timeout(Some(limit))?;
        #[cfg(not(target_os = "linux"))]
        let _unsupported = (tcp, limit);
        Ok(())
    }

    /// Lets the kernel take no more from us once `bytes` of what it has cannot be sent yet, because the other side does not
    /// read as fast. Does nothing where the one above does nothing.
    pub fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        let Some(tcp) = self.as_tcp() else { return Ok(()) };
        #[cfg(target_os = "linux")]
        socket2::SockRef::from(tcp).set_tcp_notsent_lowat(bytes)?;
        #[cfg(not(target_os = "linux"))]
        let _unsupported = (tcp, bytes);
        Ok(())
    }

    /// Whether the other side has closed, as far as the kernel has told already.
    pub fn is_closed_by_peer(&self) -> bool {
        let ready = match self {
            Self::Tcp(socket) => socket.ready(Interest::READABLE).now_or_never(),
            Self::Unix(socket) => socket.ready(Interest::READABLE).now_or_never(),
            Self::Tls(tls) => tls.get_ref().0.ready(Interest::READABLE).now_or_never(),
            Self::Ring(socket) => return socket.is_read_closed(),
        };
        matches!(ready, Some(Ok(ready)) if ready.is_read_closed())
    }

    fn as_tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(stream) => Some(stream),
            Self::Tls(stream) => Some(stream.get_ref().0),
            Self::Unix(_) | Self::Ring(_) => None,
        }
    }
}

impl Stream {
    /// Reads what has come, without waiting; `WouldBlock` where nothing has. Asks the socket itself: one that has just
    /// been registered with a runtime looks empty to it until the runtime has polled. (Behind TLS, and on a ring, only that
    /// will do.)
    pub fn read_now(&mut self, into: &mut ReadBuf<'_>) -> io::Result<usize> {
        let socket = match self {
            Self::Tcp(stream) => socket2::SockRef::from(&*stream),
            Self::Unix(stream) => socket2::SockRef::from(&*stream),
            Self::Tls(_) | Self::Ring(_) => {
                let before = into.filled().len();
                let mut cx = Context::from_waker(futures_util::task::noop_waker_ref());
                return match Pin::new(self).poll_read(&mut cx, into) {
                    Poll::Ready(read) => read.map(|()| into.filled().len() - before),
                    Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
                };
            }
        };
        let count = (&*socket).read(into.initialize_unfilled())?;
        into.advance(count);
        Ok(count)
    }
}

/// A stream that belongs to no runtime for the moment: on its way from one thread to another.
#[derive(Debug)]
pub struct Parked(Parts);

#[derive(Debug)]
enum Parts {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
    /// Its socket cannot be taken out: it stays with the runtime that it was opened on, which wakes the new owner.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Takes the stream from the runtime that it is registered with.
    pub fn park(self) -> io::Result<Parked> {
        Ok(Parked(match self {
            Self::Tcp(stream) => Parts::Tcp(stream.into_std()?),
            Self::Unix(stream) => Parts::Unix(stream.into_std()?),
            Self::Tls(stream) => Parts::Tls(stream),
            // A session that relays keeps its sockets to its end.
            Self::Ring(_) => return Err(io::ErrorKind::Unsupported.into()),
        }))
    }
}

impl Parked {
    /// Registers the stream with the runtime of the calling thread.
    pub fn resume(self) -> io::Result<Stream> {
        Ok(match self.0 {
            Parts::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)?),
            Parts::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)?),
            Parts::Tls(stream) => Stream::Tls(stream),
        })
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Ring(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Ring(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Ring(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
            Self::Ring(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::Ring(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Ring(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
