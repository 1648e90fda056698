//! A ring's sockets against plain ones. Where the kernel has no io_uring, or forbids it, there is nothing to test.

use std::future::Future;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream as Plain;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{Ring, kernel};
use crate::postgres::Stream;

/// Runs `test` on a thread with a ring that is driven.
fn with_ring<F: Future<Output = ()>>(test: impl FnOnce(Ring) -> F) {
    let place = Arc::new(OnceLock::<Ring>::new());
    let sleeps = place.clone();
    let look = move || sleeps.get().into_iter().for_each(Ring::look);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().on_thread_unpark(look).build();
    let runtime = runtime.expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let Ok(ring) = Ring::open() else {
            eprintln!("no io_uring here");
            return;
        };
        place.get_or_init(|| ring.clone());
        let driver = tokio::task::spawn_local(ring.clone().drive());
        tokio::time::timeout(Duration::from_secs(60), test(ring)).await.expect("it comes to an end");
        driver.abort();
    });
}

/// A socket of the ring, and its other end.
fn pair(ring: &Ring) -> (Stream, Plain) {
    let (ours, theirs) = Plain::pair().expect("a pair");
    ours.set_nonblocking(true).expect("it can be");
    let mut stream = Stream::Unix(UnixStream::from_std(ours).expect("registered"));
    ring.serve(&mut stream).expect("served");
    assert!(matches!(stream, Stream::Ring(_)));
    (stream, theirs)
}

/// `count` bytes that tell where they belong.
fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at % 251) as u8 ^ (at >> 12) as u8).collect()
}

/// The other end sends back what it gets.
fn echo(mut theirs: Plain) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut piece = [0; 10_000];
        while let Ok(count @ 1..) = theirs.read(&mut piece) {
            theirs.write_all(&piece[..count]).expect("it is read");
        }
    })
}

#[test]
fn what_is_written_comes_back_whatever_its_size() {
    with_ring(|ring| async move {
        let (stream, theirs) = pair(&ring);
        let other = echo(theirs);
        let (mut reader, mut writer) = tokio::io::split(stream);
        for size in [1, 100, kernel::CHUNK_BYTES, kernel::CHUNK_BYTES + 1, 100, 3_000_000, 5] {
            let (sent, mut got) = (pattern(size), vec![0; size]);
            let (written, read) = tokio::join!(writer.write_all(&sent), reader.read_exact(&mut got));
            written.expect("written");
            read.expect("read");
            assert!(sent == got, "{size} bytes came back changed");
        }
        writer.shutdown().await.expect("shut down");
        assert_eq!(reader.read(&mut [0; 8]).await.expect("the end"), 0);
        assert_eq!(reader.read(&mut [0; 8]).await.expect("still the end"), 0);
        other.join().expect("it ended");
    });
}

#[test]
fn a_peer_that_does_not_read_holds_the_writer_back() {
    with_ring(|ring| async move {
        let (mut stream, mut theirs) = pair(&ring);
        let mut taken = 0;
        let mut piece = vec![0; 1000];
        // Small pieces go by the ring: what the kernel does not take must not pile up there.
        while let Ok(count) = tokio::time::timeout(Duration::from_millis(300), stream.write(&piece)).await {
            taken += count.expect("written");
            assert!(taken < 64 << 20, "written without end");
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).expect("read");
            all.len()
        });
        piece.fill(1);
        stream.write_all(&piece).await.expect("there is room again");
        stream.shutdown().await.expect("shut down");
        assert_eq!(reader.join().expect("it ended"), taken + 1000);
    });
}

#[test]
fn a_dropped_socket_is_closed_after_what_was_written_has_gone() {
    with_ring(|ring| async move {
        let (mut stream, mut theirs) = pair(&ring);
        // A receive is under way when it is dropped, and a send has only been noted.
        assert!(stream.read(&mut [0; 8]).now_or_never().is_none());
        tokio::task::yield_now().await;
        stream.write_all(b"the last words").await.expect("noted");
        drop(stream);
        let words = tokio::task::spawn_blocking(move || {
            let mut words = String::new();
            theirs.read_to_string(&mut words).map(|_| words)
        });
        assert_eq!(words.await.expect("no panic").expect("read"), "the last words");
        assert_eq!(ring.state().sockets.iter().flatten().count(), 0);
    });
}

#[test]
fn more_sockets_than_chunks_may_have_something_to_read() {
    with_ring(|ring| async move {
        let mut pairs: Vec<_> = (0..400).map(|_| pair(&ring)).collect();
        for (stream, _) in &mut pairs {
            // From now on the kernel is asked to receive, and nobody looks.
            assert!(stream.read(&mut [0; 8]).now_or_never().is_none());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        for (number, (_, theirs)) in pairs.iter_mut().enumerate() {
            theirs.write_all(&(number as u64).to_be_bytes()).expect("written");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        for (number, (stream, _)) in pairs.iter_mut().enumerate().rev() {
            assert_eq!(stream.read_u64().await.expect("read"), number as u64);
        }
    });
}

#[test]
fn what_comes_without_end_is_read_without_the_rings_help() {
    with_ring(|ring| async move {
        let (mut stream, mut theirs) = pair(&ring);
        let reading = || ring.state().sockets[0].as_ref().map(|slot| slot.reading);
        let mut piece = [0; kernel::CHUNK_BYTES];
        for full in 1..=super::FULL_RUN {
            theirs.write_all(&piece).expect("written");
            stream.read_exact(&mut piece).await.expect("read");
            assert_eq!(reading() == Some(super::Reading::Receiving), full < super::FULL_RUN, "{full}");
        }
        // And small things by the ring again.
        for _ in 0..2 {
            theirs.write_all(b"small").expect("written");
            stream.read_exact(&mut piece[..5]).await.expect("read");
        }
        assert!(stream.read(&mut piece).now_or_never().is_none());
        assert!(reading() == Some(super::Reading::Receiving));
    });
}

#[test]
fn a_peer_that_is_gone_is_told_to_reader_and_writer() {
    with_ring(|ring| async move {
        let (mut stream, theirs) = pair(&ring);
        drop(theirs);
        // The first write may be taken before it fails.
        let first = stream.write_all(b"anybody?").await;
        let flushed = stream.flush().await;
        assert!(first.is_err() || flushed.is_err());
        assert!(stream.write_all(b"anybody?").await.is_err());
        assert!(!matches!(stream.read(&mut [0; 8]).await, Ok(1..)));
        let Stream::Ring(socket) = &stream else { unreachable!("it is served by the ring") };
        assert!(socket.is_read_closed());
    });
}

#[test]
fn a_socket_leaves_the_ring_and_loses_nothing() {
    with_ring(|ring| async move {
        let (mut stream, mut theirs) = pair(&ring);
        assert!(stream.read(&mut [0; 8]).now_or_never().is_none());
        stream.write_all(b"before").await.expect("written");
        Ring::release(&mut stream).await.expect("nothing was unread");
        assert!(matches!(stream, Stream::Unix(_)));
        theirs.write_all(b"after").expect("written");
        let mut got = [0; 5];
        stream.read_exact(&mut got).await.expect("read");
        assert_eq!(&got, b"after");
        stream.write_all(b" and after").await.expect("written");
        let mut got = [0; 16];
        theirs.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"before and after");
        assert_eq!(ring.state().sockets.iter().flatten().count(), 0);
    });
}

#[test]
fn a_socket_with_something_unread_stays_on_the_ring() {
    with_ring(|ring| async move {
        let (mut stream, mut theirs) = pair(&ring);
        assert!(stream.read(&mut [0; 8]).now_or_never().is_none());
        tokio::task::yield_now().await;
        theirs.write_all(b"unread").expect("written");
        while ring.state().sockets[0].as_ref().is_some_and(|slot| slot.arrived.is_empty()) {
            tokio::task::yield_now().await;
        }
        assert!(Ring::release(&mut stream).await.is_err());
        let mut got = [0; 6];
        stream.read_exact(&mut got).await.expect("read");
        assert_eq!(&got, b"unread");
    });
}
