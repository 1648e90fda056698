//! Buffers of the relay: borrowed from the worker's pool while they hold bytes, given back when empty.
//!
//! An idle session owns none, so thousands of idle clients cost little. One direction of a session never owns more
//! than one block: when it is full, nothing is read until something was written, which is the backpressure.

use std::cell::RefCell;
use std::rc::Rc;

/// A block for bulk data is so many times larger than the usual one: fewer system calls for large results.
const LARGE_FACTOR: usize = 8;
/// Blocks of each size that a worker keeps when nobody uses them.
const SPARE_SMALL: usize = 256;
const SPARE_LARGE: usize = 8;

/// A worker's spare blocks.
#[derive(Debug)]
pub(super) struct Pool {
    small_bytes: usize,
    small: RefCell<Vec<Box<[u8]>>>,
    large: RefCell<Vec<Box<[u8]>>>,
}

impl Pool {
    /// `small_bytes`: the usual block, from `limits.buffer_bytes`.
    pub(super) fn new(small_bytes: usize) -> Rc<Self> {
        Rc::new(Self {
            small_bytes: small_bytes.max(1024),
            small: RefCell::new(Vec::new()),
            large: RefCell::new(Vec::new()),
        })
    }

    fn take(&self, size: Size) -> Box<[u8]> {
        let (spare, bytes) = match size {
            Size::Small => (&self.small, self.small_bytes),
            Size::Large => (&self.large, self.small_bytes * LARGE_FACTOR),
        };
        spare.borrow_mut().pop().unwrap_or_else(|| vec![0; bytes].into_boxed_slice())
    }

    fn give_back(&self, block: Box<[u8]>) {
        let (spare, keep) =
            if block.len() == self.small_bytes { (&self.small, SPARE_SMALL) } else { (&self.large, SPARE_LARGE) };
        let mut spare = spare.borrow_mut();
        if spare.len() < keep {
            spare.push(block);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    Small,
    Large,
}

/// Bytes of one direction, in the order they came: `block[start..end]`.
#[derive(Debug)]
pub(super) struct Buffer {
    pool: Rc<Pool>,
    block: Option<Box<[u8]>>,
    start: usize,
    end: usize,
    /// What to borrow next: large after a read filled a whole block.
    size: Size,
    may_be_large: bool,
}

impl Buffer {
    pub(super) fn new(pool: Rc<Pool>) -> Self {
        Self { pool, block: None, start: 0, end: 0, size: Size::Small, may_be_large: true }
    }

    /// One that borrows the usual blocks only.
    pub(super) fn small(pool: Rc<Pool>) -> Self {
        let mut buffer = Self::new(pool);
        buffer.may_be_large = false;
        buffer
    }

    /// Bytes held.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The bytes held.
    #[inline]
    pub(super) fn filled(&self) -> &[u8] {
        self.block.as_ref().map_or(&[], |block| &block[self.start..self.end])
    }

    /// Size of the block in use, or of the one that would be borrowed.
    #[inline]
    pub(super) fn capacity(&self) -> usize {
        match (&self.block, self.size) {
            (Some(block), _) => block.len(),
            (None, Size::Small) => self.pool.small_bytes,
            (None, Size::Large) => self.pool.small_bytes * LARGE_FACTOR,
        }
    }

    /// Whether nothing more can be read until something is consumed.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.block.is_some() && self.end - self.start == self.capacity()
    }

    /// Free space behind the bytes held; moves them to the front of the block when there is none left behind them.
    /// Not empty unless the buffer is full.
    #[inline]
    pub(super) fn room(&mut self) -> &mut [u8] {
        let block = self.block.get_or_insert_with(|| self.pool.take(self.size));
        if self.end == block.len() && self.start > 0 {
            block.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut block[self.end..]
    }

    /// `count` bytes of the room were filled.
    #[inline]
    pub(super) fn fill(&mut self, count: usize) {
        self.end += count;
        let capacity = self.capacity();
        if count == capacity && self.may_be_large {
            self.size = Size::Large;
        } else if count < self.pool.small_bytes / 2 {
            self.size = Size::Small;
        }
    }

    /// The first `count` bytes were used up. An empty buffer gives its block back at [`Buffer::release`].
    #[inline]
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Gives the block back if the buffer is empty.
    #[inline]
    pub(super) fn release(&mut self) {
        if self.is_empty()
            && let Some(block) = self.block.take()
        {
            self.pool.give_back(block);
        }
    }

    /// Appends bytes of our own, which may need a block of unusual size. For the slow path only.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        if self.room().len() < bytes.len() {
            let mut grown = Vec::with_capacity(self.len() + bytes.len());
            grown.extend_from_slice(self.filled());
            grown.resize((self.len() + bytes.len()).max(self.capacity()), 0);
            self.end = self.len();
            self.start = 0;
            self.block = Some(grown.into_boxed_slice());
        }
        let at = self.end;
        if let Some(block) = &mut self.block {
            block[at..at + bytes.len()].copy_from_slice(bytes);
            self.end += bytes.len();
        }
    }
}

/// What only sessions need that share backends, where not every byte is passed on as it came.
impl Buffer {
    /// Takes `count` bytes at `at` out.
    pub(super) fn remove(&mut self, at: usize, count: usize) {
        if at == 0 {
            self.consume(count);
        } else if let Some(block) = &mut self.block {
            block.copy_within(self.start + at + count..self.end, self.start + at);
            self.end -= count;
        }
    }

    /// Changes the byte at `at`.
    pub(super) fn set(&mut self, at: usize, byte: u8) {
        if let Some(block) = &mut self.block {
            block[self.start + at] = byte;
        }
    }

    /// Puts bytes in front of those held. For the slow path only.
    pub(super) fn prepend(&mut self, bytes: &[u8]) {
        let held = self.filled().to_vec();
        self.consume(held.len());
        self.append(&[bytes, &held].concat());
    }

    /// Makes room for `bytes` in all, which may need a block of unusual size. For the slow path only.
    pub(super) fn grow(&mut self, bytes: usize) {
        if self.capacity() < bytes {
            let mut grown = vec![0; bytes];
            grown[..self.len()].copy_from_slice(self.filled());
            (self.start, self.end) = (0, self.len());
            self.block = Some(grown.into_boxed_slice());
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_in_order_and_blocks_go_back() {
        let pool = Pool::new(1024);
        let mut buffer = Buffer::new(pool.clone());
        assert!(buffer.is_empty() && !buffer.is_full());
        buffer.room()[..1000].fill(1);
        buffer.fill(1000);
        buffer.room()[..24].fill(2);
        buffer.fill(24);
        assert!(buffer.is_full() && buffer.room().is_empty());
        buffer.consume(900);
        assert_eq!(buffer.room().len(), 900);
        assert_eq!(&buffer.filled()[99..101], &[1, 2]);
        buffer.append(&[3; 2000]);
        assert_eq!((buffer.len(), buffer.filled()[124], buffer.filled()[2123]), (2124, 3, 3));
        buffer.consume(2124);
        buffer.release();
        assert!(buffer.is_empty());
        drop(buffer);
        assert!(pool.small.borrow().len() <= 1);
    }

    #[test]
    fn a_read_that_fills_a_block_asks_for_a_large_one_next() {
        let mut buffer = Buffer::new(Pool::new(1024));
        assert_eq!(buffer.room().len(), 1024);
        buffer.fill(1024);
        buffer.consume(1024);
        buffer.release();
        assert_eq!(buffer.room().len(), 8192);
        buffer.fill(10);
        buffer.consume(10);
        buffer.release();
        assert_eq!(buffer.room().len(), 1024);

        let mut small = Buffer::small(Pool::new(1024));
        small.room();
        small.fill(1024);
        small.consume(1024);
        small.release();
        assert_eq!(small.room().len(), 1024);
    }
}
