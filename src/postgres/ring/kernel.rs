//! The one place that shares memory with the kernel: an io_uring, the memory that it receives into, and what it sends.
//!
//! This is the crate's only unsafe code. Everything that the kernel is lent is owned here, is not touched while a
//! request that may use it is under way, and is never given back to the allocator before the kernel has answered.
//! What a request is for, and whose it is, must never matter here: that is the business of [`super`].

use std::cell::UnsafeCell;
use std::io;
use std::mem;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use io_uring::{IoUring, cqueue, opcode, types};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most that one request receives.
pub(super) const CHUNK_BYTES: usize = 4096;
/// From one chunk to the next: that all of them begin at the same place within a page would put their first lines, which are
/// often all that is written, into the same few places of the processor's cache.
const CHUNK_STRIDE: usize = CHUNK_BYTES + 192;
/// Chunks of a ring: more sockets than this may have something to read at once, but then read it themselves.
const CHUNKS: u16 = 256;
/// Requests that wait to be submitted; with more of them they are submitted earlier.
const REQUESTS: u32 = 512;
/// Answers that wait to be looked at; the kernel keeps what is more.
const ANSWERS: u32 = 4096;
/// The group of buffers in which the chunks are offered.
const GROUP: u16 = 0;

/// What the kernel is asked to do with a socket: of each kind, one at a time.
pub(super) enum Request {
    /// Receive chunk after chunk, whenever something has come, until this is given up or a chunk is wanting.
    Receive,
    /// Tell once something can be read, or the other side has closed.
    AwaitReadable,
    /// Tell once something can be written.
    AwaitWritable,
    /// Send all of this.
    Send(Vec<u8>),
    /// Give up what was asked.
    Cancel(Kind),
}

/// Kinds of requests, as they stand in the lowest bits of what tells an answer from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Receive = 0,
    AwaitReadable = 1,
    AwaitWritable = 2,
    Send = 3,
    Cancel = 4,
}

const KIND_BITS: u32 = 3;

fn token(socket: usize, kind: Kind) -> u64 {
    (socket as u64) << KIND_BITS | kind as u64
}

fn kind(token: u64) -> Kind {
    match token & ((1 << KIND_BITS) - 1) {
        0 => Kind::Receive,
        1 => Kind::AwaitReadable,
        2 => Kind::AwaitWritable,
        3 => Kind::Send,
        _ => Kind::Cancel,
    }
}

/// What the kernel has done.
pub(super) struct Answer {
    pub(super) socket: usize,
    pub(super) kind: Kind,
    /// A count of bytes, or the events that came.
    pub(super) result: Result<usize, Errno>,
    /// Where received bytes are.
    pub(super) chunk: Option<Chunk>,
    /// What was to be sent.
    pub(super) sent: Vec<u8>,
    /// Nothing more will be answered to this request.
    pub(super) is_last: bool,
}

/// Received bytes. To be given back with [`Kernel::give_back`].
#[derive(Debug)]
pub(super) struct Chunk {
    id: u16,
    start: u16,
    end: u16,
}

impl Chunk {
    pub(super) fn len(&self) -> usize {
        usize::from(self.end - self.start)
    }

    /// Whether it was filled to its end, so that more is likely to follow.
    pub(super) fn came_full(&self) -> bool {
        usize::from(self.end) == CHUNK_BYTES
    }
}

/// One entry of the list in which chunks are offered (`struct io_uring_buf`).
#[repr(C)]
struct Offer {
    address: AtomicU64,
    bytes: AtomicU32,
    id: AtomicU16,
    /// Of the first entry: the number of offers made so far.
    tail: AtomicU16,
}

/// The list must begin at a page.
#[repr(C, align(4096))]
struct Offers([Offer; CHUNKS as usize]);

/// What the kernel may read or write while a request is under way.
#[derive(Default)]
struct Lent {
    /// One list; a slice, so that it can be left behind.
    offers: Box<[Offers]>,
    chunks: Box<[UnsafeCell<u8>]>,
    /// By number of the socket; empty where nothing is being sent.
    sending: Vec<Vec<u8>>,
}

/// An io_uring and what it is lent.
pub(super) struct Kernel {
    ring: IoUring,
    lent: Lent,
    under_way: usize,
}

impl Kernel {
    /// Opens a ring for the calling thread: [`Kernel::submit`] must be called on it alone. Fails where the kernel is older
    /// than 6.0 or refuses io_uring.
    pub(super) fn open() -> io::Result<Self> {
        let ring = IoUring::builder()
            .dontfork()
            .setup_clamp()
            .setup_submit_all()
            .setup_cqsize(ANSWERS)
            // Answers are made when the thread is in the kernel anyway, never by interrupting it.
            .setup_coop_taskrun()
            .setup_single_issuer()
            .build(REQUESTS)?;
        let offer = || Offer {
            address: AtomicU64::new(0),
            bytes: AtomicU32::new(0),
            id: AtomicU16::new(0),
            tail: AtomicU16::new(0),
        };
        let lent = Lent {
            offers: Box::new([Offers(std::array::from_fn(|_| offer()))]),
            chunks: (0..usize::from(CHUNKS) * CHUNK_STRIDE).map(|_| UnsafeCell::new(0)).collect(),
            sending: Vec::new(),
        };
        let mut kernel = Self { ring, lent, under_way: 0 };
        let list = kernel.lent.offers.as_ptr() as u64;
        // SAFETY: the list is CHUNKS entries long, starts at a page, and lives as long as the ring: it is dropped after
        // the ring, or never (see Drop).
        unsafe { kernel.ring.submitter().register_buf_ring_with_flags(list, CHUNKS, GROUP, 0)? };
        (0..CHUNKS).for_each(|id| kernel.offer(id));
        Ok(kernel)
    }

    /// What becomes readable once there are answers. To be called on the runtime that is to be woken.
    pub(super) fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let descriptor = self.ring.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned, and stays the same for as long as it is registered.
        Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE)? })
    }

    /// Notes a request; nothing happens before [`Kernel::submit`]. The socket must stay open until it is answered.
    pub(super) fn request(&mut self, socket: usize, fd: BorrowedFd<'_>, request: Request) -> io::Result<()> {
        let fd = types::Fd(fd.as_raw_fd());
        let mut sending = None;
        let (entry, kind) = match request {
            Request::Receive => (opcode::RecvMulti::new(fd, GROUP).build(), Kind::Receive),
            Request::AwaitReadable => {
                let events = PollFlags::IN | PollFlags::RDHUP;
                (opcode::PollAdd::new(fd, events.bits().into()).build(), Kind::AwaitReadable)
            }
            Request::AwaitWritable => {
                (opcode::PollAdd::new(fd, PollFlags::OUT.bits().into()).build(), Kind::AwaitWritable)
            }
            Request::Send(bytes) => {
                let bytes = sending.insert(bytes);
                let flags = (SendFlags::NOSIGNAL.bits() | RecvFlags::WAITALL.bits()).cast_signed();
                (opcode::Send::new(fd, bytes.as_ptr(), bytes.len() as u32).flags(flags).build(), Kind::Send)
            }
            Request::Cancel(kind) => (opcode::AsyncCancel::new(token(socket, kind)).build(), Kind::Cancel),
        };
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        let entry = entry.user_data(token(socket, kind));
        // SAFETY: a Receive writes only to chunks that are offered, which nobody else touches; a Send reads bytes that
        // `lent.sending` keeps, unchanged, until its answer; the other requests use no memory.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::WouldBlock)?;
        self.under_way += 1;
        if let Some(bytes) = sending {
            self.lend(socket, bytes);
        }
        Ok(())
    }

    /// Keeps what is being sent until the send is answered.
    fn lend(&mut self, socket: usize, bytes: Vec<u8>) {
        let sending = &mut self.lent.sending;
        if sending.len() <= socket {
            sending.resize_with(socket + 1, Vec::new);
        }
        assert!(sending[socket].is_empty(), "a socket sends one thing at a time");
        sending[socket] = bytes;
    }

    /// Hands the noted requests to the kernel, which does at once what it can, and fetches answers that it had no place for.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        loop {
            let queue = self.ring.submission();
            let has_nothing_to_do = queue.is_empty() && !queue.cq_overflow();
            drop(queue);
            if has_nothing_to_do {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(0) => return Ok(()),
                // The rest, if a request was not taken.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether there are answers that have not been looked at.
    pub(super) fn has_answers(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// The next answer.
    pub(super) fn answer(&mut self) -> Option<Answer> {
        let entry = self.ring.completion().next()?;
        let is_last = !cqueue::more(entry.flags());
        self.under_way -= usize::from(is_last);
        let result = usize::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()));
        let received = |id| Chunk { id, start: 0, end: *result.as_ref().unwrap_or(&0) as u16 };
        let mut chunk = cqueue::buffer_select(entry.flags()).map(received);
        if let Some(empty) = chunk.take_if(|chunk| chunk.len() == 0) {
            self.give_back(empty);
        }
        let socket = (entry.user_data() >> KIND_BITS) as usize;
        let kind = kind(entry.user_data());
        let sent = match kind {
            Kind::Send => mem::take(&mut self.lent.sending[socket]),
            Kind::Receive | Kind::AwaitReadable | Kind::AwaitWritable | Kind::Cancel => Vec::new(),
        };
        Some(Answer { socket, kind, result, chunk, sent, is_last })
    }

    /// Takes bytes from the front of a chunk, as many as fit.
    pub(super) fn take(&self, chunk: &mut Chunk, into: &mut tokio::io::ReadBuf<'_>) {
        let count = chunk.len().min(into.remaining());
        let first = &self.lent.chunks[usize::from(chunk.id) * CHUNK_STRIDE + usize::from(chunk.start)];
        // SAFETY: whoever has a Chunk has it alone, the kernel has written `end` bytes of it (at most CHUNK_BYTES), and
        // writes to it again only when it is given back, for which the caller's `chunk` is needed.
        into.put_slice(unsafe { std::slice::from_raw_parts(first.get(), count) });
        chunk.start += count as u16;
    }

    /// The kernel may receive into this chunk again.
    pub(super) fn give_back(&mut self, chunk: Chunk) {
        self.offer(chunk.id);
    }

    fn offer(&mut self, id: u16) {
        let list = &self.lent.offers[0].0;
        let tail = list[0].tail.load(Ordering::Relaxed);
        let offer = &list[usize::from(tail % CHUNKS)];
        offer.address.store(self.lent.chunks[usize::from(id) * CHUNK_STRIDE].get() as u64, Ordering::Relaxed);
        offer.bytes.store(CHUNK_BYTES as u32, Ordering::Relaxed);
        offer.id.store(id, Ordering::Relaxed);
        list[0].tail.store(tail.wrapping_add(1), Ordering::Release);
    }
}

impl Drop for Kernel {
    /// Closing the ring does not wait for what is under way: memory that it may still use is left behind.
    fn drop(&mut self) {
        if self.under_way > 0 {
            mem::forget(mem::take(&mut self.lent));
        }
    }
}
