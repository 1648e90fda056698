//! The stream between the console and its client, looked at for two things that the codec does not tell: a message that
//! is too long, before it is kept, and the client's end while an order of its is being waited for.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::postgres::Stream;
use crate::wire::frame::{FrameError, Header};

/// The longest message, in bytes of its body. The codec keeps what has come of one until it is whole, and would take a
/// gigabyte; no order is nearly as long.
pub(super) const MESSAGE_MAX: u32 = 1 << 20;

/// How often it is looked whether a client has gone.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Why no more is read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    /// Longer than [`MESSAGE_MAX`].
    #[error("a message of {0} bytes is longer than the console takes ({MESSAGE_MAX} bytes)")]
    TooLong(u32),
    /// No message.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// What the codec reads from and writes to. Its owner alone waits for it; the lock is never waited for.
pub(super) struct Link {
    stream: Arc<Mutex<Stream>>,
    frames: Frames,
}

impl Link {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream: Arc::new(Mutex::new(stream)), frames: Frames::default() }
    }

    /// To learn whether the client is there while the codec has the link.
    pub(super) fn presence(&self) -> Presence {
        Presence(self.stream.clone())
    }
}

fn lock(stream: &Mutex<Stream>) -> MutexGuard<'_, Stream> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, frames } = self.get_mut();
        let before = into.filled().len();
        ready!(Pin::new(&mut *lock(stream)).poll_read(cx, into))?;
        Poll::Ready(frames.pass(&into.filled()[before..]).map_err(io::Error::other))
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *lock(&self.stream)).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.stream)).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.stream)).poll_shutdown(cx)
    }
}

/// Whether a client is there.
pub(super) struct Presence(Arc<Mutex<Stream>>);

impl Presence {
    /// Resolves once the client has gone, as far as the kernel has told.
    pub(super) async fn ended(&self) {
        while !lock(&self.0).is_closed_by_peer() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Where in the stream of messages the next byte belongs.
#[derive(Default)]
struct Frames {
    /// A header that has come in part.
    header: Vec<u8>,
    body_left: usize,
}

impl Frames {
    /// Looks at the next bytes.
    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), Unreadable> {
        loop {
            let passing = self.body_left.min(bytes.len());
            self.body_left -= passing;
            bytes = &bytes[passing..];
            let Some((first, rest)) = bytes.split_first() else { return Ok(()) };
            self.header.push(*first);
            bytes = rest;
            if let Some(header) = Header::parse(&self.header)? {
                if header.body_bytes > MESSAGE_MAX {
                    return Err(Unreadable::TooLong(header.body_bytes));
                }
                self.body_left = header.body_bytes as usize;
                self.header.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(body_bytes: u32) -> Vec<u8> {
        [&b"Q"[..], &(body_bytes + 4).to_be_bytes()].concat()
    }

    #[test]
    fn a_message_that_is_too_long_is_known_by_its_header() {
        let mut frames = Frames::default();
        assert!(frames.pass(&frame(MESSAGE_MAX)).is_ok());
        assert!(frames.pass(&vec![0; MESSAGE_MAX as usize]).is_ok());
        assert!(matches!(frames.pass(&frame(MESSAGE_MAX + 1)), Err(Unreadable::TooLong(_))));
        assert!(matches!(Frames::default().pass(b"Q\0\0\0\x03"), Err(Unreadable::Frame(_))));
    }

    proptest! {
        #[test]
        fn pieces_are_read_like_the_whole(
            bodies in proptest::collection::vec(0..20usize, 0..6),
            cuts in proptest::collection::vec(1..9usize, 1..40),
        ) {
            let mut whole: Vec<u8> =
                bodies.iter().flat_map(|bytes| [frame(*bytes as u32), vec![255; *bytes]].concat()).collect();
            whole.extend(frame(MESSAGE_MAX + 1));
            let (mut frames, mut rest) = (Frames::default(), &whole[..]);
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                let passed = frames.pass(piece);
                rest = after;
                prop_assert_eq!(passed.is_err(), rest.is_empty());
                if rest.is_empty() {
                    break;
                }
            }
        }
    }
}
