//! Reading into a buffer and writing out of one, as far as a socket goes now: what every relay does in either direction.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};

use super::buffers::Buffer;
use crate::postgres::Stream;

/// So many blocks in each direction, then others have their turn: an error must reach a client that sends without a pause.
pub(super) const BLOCKS_AT_ONCE: usize = 4;

/// Wakes the task once the poller has been asked. Who only wakes itself is run again before that, and does not learn that
/// its other socket has something to say.
pub(super) fn go_on_after_poller(cx: &mut Context<'_>) {
    let _pending = std::pin::pin!(tokio::task::yield_now()).poll(cx);
}

/// What was done in one direction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Some,
    None,
}

impl Progress {
    pub(super) fn or(self, other: Self) -> Self {
        if self == Self::Some { self } else { other }
    }
}

/// Reads once into the buffer's room, which must not be empty, and says how much came; it counts once [`Buffer::fill`] is
/// told. Nothing: the end of the stream.
#[inline]
pub(super) fn read(stream: &mut Stream, buffer: &mut Buffer, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let mut into = ReadBuf::new(buffer.room());
    Pin::new(stream).poll_read(cx, &mut into).map_ok(|()| into.filled().len())
}

/// Writes from the front of the buffer, no more than the `most` bytes that may go, which it counts down. Says how many went.
#[inline]
pub(super) fn write(
    stream: &mut Stream,
    buffer: &mut Buffer,
    most: &mut usize,
    cx: &mut Context<'_>,
) -> io::Result<usize> {
    let before = *most;
    while *most > 0 {
        match Pin::new(&mut *stream).poll_write(cx, &buffer.filled()[..*most]) {
            Poll::Pending => break,
            Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(Ok(count)) => {
                buffer.consume(count);
                *most -= count;
            }
            Poll::Ready(Err(error)) => return Err(error),
        }
    }
    flush_tls(stream, cx)?;
    Ok(before - *most)
}

/// Only TLS holds written bytes back.
#[inline]
fn flush_tls(stream: &mut Stream, cx: &mut Context<'_>) -> io::Result<()> {
    if let Stream::Tls(tls) = stream
        && let Poll::Ready(flushed) = Pin::new(tls).poll_flush(cx)
    {
        return flushed;
    }
    Ok(())
}
