//! Follows the server's stream of frames in whatever pieces it arrives, keeping only what must be looked at.
//!
//! Bytes are never held back or copied, except the bodies of the few small messages that the proxy reads
//! (ReadyForQuery, ParameterStatus, CommandComplete where it is asked for) when they arrive cut in two.

use super::frame::{FrameError, HEADER_BYTES, Header, backend};

/// A ParameterStatus longer than this is passed on and not remembered. `search_path` is the longest that is reported.
const KEPT_MAX: u32 = 64 * 1024;

/// Where in the stream of frames the next byte belongs.
#[derive(Debug, Default)]
pub struct Scanner {
    /// Bytes of the current frame's body that have not come yet.
    body_left: u32,
    /// Tag of the frame whose body is being kept; 0 when the body just passes.
    keeping: u8,
    /// A header, or a kept body, that arrived in part.
    partial: Vec<u8>,
}

/// Who is told of frames.
pub trait Sink {
    /// A frame has begun; for a kept one: has come whole, with its body.
    fn frame(&mut self, tag: u8, body: &[u8]);

    /// Whether it is to be given the body of CommandComplete too.
    #[inline]
    fn reads_commands(&self) -> bool {
        false
    }
}

/// Whether frames of this kind are given to the sink with their body.
#[inline]
fn is_kept(header: Header, sink: &impl Sink) -> bool {
    let is_read = match header.tag {
        backend::READY_FOR_QUERY | backend::PARAMETER_STATUS => true,
        backend::COMMAND_COMPLETE => sink.reads_commands(),
        _ => false,
    };
    is_read && header.body_bytes <= KEPT_MAX
}

impl Scanner {
    /// At the start of a frame.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether every frame that has begun has ended.
    #[inline]
    pub fn is_at_boundary(&self) -> bool {
        self.body_left == 0 && self.keeping == 0 && self.partial.is_empty()
    }

    /// Looks at the next bytes of the stream.
    #[inline]
    pub fn scan(&mut self, mut bytes: &[u8], sink: &mut impl Sink) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            if self.body_left > 0 && self.keeping == 0 {
                let passing = (self.body_left as usize).min(bytes.len());
                self.body_left -= passing as u32;
                bytes = &bytes[passing..];
                continue;
            }
            if !self.partial.is_empty() || self.keeping != 0 {
                bytes = self.complete(bytes, sink)?;
                continue;
            }
            let Some(header) = Header::parse(bytes)? else {
                self.partial.extend_from_slice(bytes);
                return Ok(());
            };
            bytes = self.begin(header, &bytes[HEADER_BYTES..], sink);
        }
        Ok(())
    }

    /// A header is known, `rest` follows it. Returns what follows the part that was used.
    #[inline]
    fn begin<'a>(&mut self, header: Header, rest: &'a [u8], sink: &mut impl Sink) -> &'a [u8] {
        let body_bytes = header.body_bytes as usize;
        if !is_kept(header, sink) {
            sink.frame(header.tag, &[]);
            let passing = body_bytes.min(rest.len());
            self.body_left = header.body_bytes - passing as u32;
            return &rest[passing..];
        }
        if let Some((body, rest)) = rest.split_at_checked(body_bytes) {
            sink.frame(header.tag, body);
            return rest;
        }
        self.keeping = header.tag;
        self.body_left = header.body_bytes - rest.len() as u32;
        self.partial.extend_from_slice(rest);
        &[]
    }

    /// Goes on with a header or a kept body that arrived in part.
    fn complete<'a>(&mut self, bytes: &'a [u8], sink: &mut impl Sink) -> Result<&'a [u8], FrameError> {
        if self.keeping != 0 {
            let taken = (self.body_left as usize).min(bytes.len());
            self.partial.extend_from_slice(&bytes[..taken]);
            self.body_left -= taken as u32;
            if self.body_left == 0 {
                sink.frame(self.keeping, &self.partial);
                self.keeping = 0;
                self.partial.clear();
            }
            return Ok(&bytes[taken..]);
        }
        let taken = (HEADER_BYTES - self.partial.len()).min(bytes.len());
        self.partial.extend_from_slice(&bytes[..taken]);
        let rest = &bytes[taken..];
        let Some(header) = Header::parse(&self.partial)? else { return Ok(rest) };
        self.partial.clear();
        Ok(self.begin(header, rest, sink))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default, PartialEq, Debug)]
    struct Seen(Vec<(u8, Vec<u8>)>);

    impl Sink for Seen {
        fn frame(&mut self, tag: u8, body: &[u8]) {
            self.0.push((tag, body.to_vec()));
        }
    }

    fn stream(frames: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (tag, body) in frames {
            bytes.push(*tag);
            bytes.extend((body.len() as u32 + 4).to_be_bytes());
            bytes.extend(body);
        }
        bytes
    }

    proptest! {
        #[test]
        fn the_same_frames_are_seen_however_the_stream_is_cut(
            frames in prop::collection::vec((prop::sample::select(b"DZSTCEN".to_vec()), prop::collection::vec(any::<u8>(), 0..40)), 0..20),
            cuts in prop::collection::vec(1usize..30, 0..200),
        ) {
            let bytes = stream(&frames);
            let mut whole = Seen::default();
            Scanner::new().scan(&bytes, &mut whole).expect("valid");
            let (mut cut, mut scanner, mut rest) = (Seen::default(), Scanner::new(), bytes.as_slice());
            for size in cuts {
                let (piece, left) = rest.split_at(size.min(rest.len()));
                scanner.scan(piece, &mut cut).expect("valid");
                rest = left;
            }
            scanner.scan(rest, &mut cut).expect("valid");
            prop_assert!(scanner.is_at_boundary());
            prop_assert_eq!(&whole, &cut);
            let expected: Vec<_> = frames.into_iter().map(|(tag, body)| (tag, if b"ZS".contains(&tag) { body } else { vec![] })).collect();
            prop_assert_eq!(whole.0, expected);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(pieces: Vec<Vec<u8>>) {
            let mut scanner = Scanner::new();
            for piece in pieces {
                if scanner.scan(&piece, &mut Seen::default()).is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_frame_larger_than_memory_passes() {
        let mut scanner = Scanner::new();
        let mut seen = Seen::default();
        scanner.scan(b"D\x7f\xff\xff\xff", &mut seen).expect("valid");
        scanner.scan(&[0; 4096], &mut seen).expect("valid");
        assert!(!scanner.is_at_boundary());
        assert_eq!(seen.0, vec![(b'D', vec![])]);
    }
}
