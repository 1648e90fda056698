//! A cursor over one message. Every read checks its bounds and names the field it was reading.

use std::ops::Range;

use bytes::Bytes;

use crate::lsn::Lsn;
use crate::pgoutput::{DecodeError, Timestamp};

pub(super) struct Reader<'m> {
    data: &'m Bytes,
    /// How much of it has been read.
    at: usize,
    message: char,
}

impl<'m> Reader<'m> {
    /// Stands behind the tag.
    pub(super) fn new(data: &'m Bytes, tag: u8) -> Self {
        Self { data, at: 1, message: char::from(tag) }
    }

    /// Where the next `length` bytes are. Only a value is worth a [`Bytes`] of its own: it counts its references.
    fn take(&mut self, length: usize, field: &'static str) -> Result<Range<usize>, DecodeError> {
        if self.remaining() < length {
            return Err(DecodeError::Truncated { message: self.message, field });
        }
        let from = self.at;
        self.at += length;
        Ok(from..self.at)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let range = self.take(N, field)?;
        <[u8; N]>::try_from(&self.data[range]).map_err(|_| DecodeError::Truncated { message: self.message, field })
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_be_bytes)
    }

    pub(super) fn i32(&mut self, field: &'static str) -> Result<i32, DecodeError> {
        self.array(field).map(i32::from_be_bytes)
    }

    pub(super) fn lsn(&mut self, field: &'static str) -> Result<Lsn, DecodeError> {
        self.array(field).map(|bytes| Lsn(u64::from_be_bytes(bytes)))
    }

    pub(super) fn timestamp(&mut self, field: &'static str) -> Result<Timestamp, DecodeError> {
        self.array(field).map(|bytes| Timestamp(i64::from_be_bytes(bytes)))
    }

    /// A length in 32 bits, never negative, and the bytes it announces.
    pub(super) fn counted_bytes(&mut self, field: &'static str) -> Result<Bytes, DecodeError> {
        let length = usize::try_from(self.i32(field)?).map_err(|_| self.invalid(field))?;
        let range = self.take(length, field)?;
        Ok(self.data.slice(range))
    }

    /// Text up to a zero byte.
    pub(super) fn string(&mut self, field: &'static str) -> Result<String, DecodeError> {
        let Some(length) = self.data[self.at..].iter().position(|byte| *byte == 0) else {
            return Err(DecodeError::Truncated { message: self.message, field });
        };
        let text = self.data[self.at..self.at + length].to_vec();
        self.at += length + 1;
        String::from_utf8(text).map_err(|_| self.invalid(field))
    }

    /// The xid that stands first in every change of a streamed block.
    pub(super) fn streamed_xid(&mut self, streaming: bool) -> Result<Option<u32>, DecodeError> {
        streaming.then(|| self.u32("xid")).transpose()
    }

    /// Flags that are defined as 0.
    pub(super) fn no_flags(&mut self) -> Result<(), DecodeError> {
        match self.u8("flags")? {
            0 => Ok(()),
            _ => Err(self.invalid("flags")),
        }
    }

    pub(super) fn remaining(&self) -> usize {
        self.data.len() - self.at
    }

    pub(super) fn invalid(&self, field: &'static str) -> DecodeError {
        DecodeError::Invalid { message: self.message, field }
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), DecodeError> {
        match self.remaining() {
            0 => Ok(()),
            bytes => Err(DecodeError::Trailing { message: self.message, bytes }),
        }
    }
}
