//! A cursor over one message. Every read checks its bounds and names the field it was reading.

use bytes::Bytes;

use crate::lsn::Lsn;
use crate::pgoutput::{DecodeError, Timestamp};

pub(super) struct Reader {
    rest: Bytes,
    message: char,
}

impl Reader {
    /// Stands behind the tag.
    pub(super) fn new(data: &Bytes, tag: u8) -> Self {
        Self { rest: data.slice(1..), message: char::from(tag) }
    }

    /// The next `length` bytes, a slice of the message.
    pub(super) fn bytes(&mut self, length: usize, field: &'static str) -> Result<Bytes, DecodeError> {
        if self.rest.len() < length {
            return Err(DecodeError::Truncated { message: self.message, field });
        }
        Ok(self.rest.split_to(length))
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let bytes = self.bytes(N, field)?;
        <[u8; N]>::try_from(&bytes[..]).map_err(|_| DecodeError::Truncated { message: self.message, field })
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
        self.bytes(length, field)
    }

    /// Text up to a zero byte.
    pub(super) fn string(&mut self, field: &'static str) -> Result<String, DecodeError> {
        let Some(length) = self.rest.iter().position(|byte| *byte == 0) else {
            return Err(DecodeError::Truncated { message: self.message, field });
        };
        let bytes = self.bytes(length + 1, field)?;
        String::from_utf8(bytes[..length].to_vec()).map_err(|_| self.invalid(field))
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
        self.rest.len()
    }

    pub(super) fn invalid(&self, field: &'static str) -> DecodeError {
        DecodeError::Invalid { message: self.message, field }
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(DecodeError::Trailing { message: self.message, bytes }),
        }
    }
}
