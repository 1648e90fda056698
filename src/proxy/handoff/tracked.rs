//! What the relay notices about a session from the client's own frames, because no server will tell it later.
//!
//! Two things only: the names of custom settings, which `pg_settings` hides, and the unnamed prepared statement, which
//! `pg_prepared_statements` does not list. It is called for a few kinds of frames on the hot path, so it scans once,
//! copies only an unnamed Parse into a buffer that it keeps, and allocates only when it learns a new name.
//!
//! Whether a Parse succeeded is known by counting, because servers answer in order: the n-th ParseComplete between two
//! ReadyForQuery belongs to the n-th Parse between two Syncs. A Parse that failed or was skipped after an error leaves
//! nothing to move: an unnamed statement of which it is not certain that it is the server's is forgotten, because
//! running the wrong one would be worse than answering that there is none.

use super::scan::{self, Finding};
use super::traces::call_traces;

/// Custom setting names remembered for one session. Real applications use a handful.
const NAMES_LIMIT: usize = 256;

/// Bytes of one name. PostgreSQL has no limit of its own for the names of settings.
const NAME_LIMIT_BYTES: usize = 256;

/// The largest unnamed Parse that is remembered, in bytes of its body. Drivers that send longer ones (generated bulk
/// inserts) bind them at once and never again.
pub const UNNAMED_LIMIT_BYTES: usize = 16 * 1024;

/// What the relay noticed about one session.
#[derive(Default)]
pub struct Tracked {
    names: Vec<Box<str>>,
    overflowed: bool,
    computed: bool,
    incomplete: bool,
    /// Body of the last unnamed Parse; meaningful as `unnamed` says. Kept for its capacity.
    buffer: Vec<u8>,
    unnamed: Unnamed,
    sent: Place,
    answered: Place,
}

/// A position in the stream of batches: each Sync, Query or FunctionCall ends one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    batch: u64,
    parses: u32,
}

/// What is known about the unnamed statement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Unnamed {
    /// There is none, or none that is certain.
    #[default]
    Absent,
    /// The Parse at this place has not been answered yet.
    Sent { at: Place, fits: Fits },
    /// The server has it.
    Held { fits: Fits },
}

/// Whether the buffer holds the whole of an unnamed Parse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fits {
    Whole,
    TooLong,
}

/// The unnamed statement at a safe point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnnamedStatement<'a> {
    /// The session has none.
    Absent,
    /// The body of the Parse message that made it: an empty name, the text, the parameter types.
    Body(&'a [u8]),
    /// It has one, longer than [`UNNAMED_LIMIT_BYTES`].
    TooLong,
}

impl std::fmt::Debug for Tracked {
    /// Says how much, never what: statement texts hold values.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracked").field("names", &self.names.len()).field("unnamed", &self.unnamed).finish()
    }
}

impl Tracked {
    /// Nothing noticed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether Bind frames are wanted too: some statement computes the name of a setting, mostly as `set_config($1, $2,
    /// false)`, so a name may be among the parameters.
    #[inline]
    pub fn reads_binds(&self) -> bool {
        self.computed
    }

    /// A frame was sent on to the server: `Q`, `P`, `C`, `S`, `F` or `B` (others are ignored). `prefix` is as much of the
    /// body as is at hand, up to all of its `body_length` bytes.
    pub fn on_client_frame(&mut self, tag: u8, prefix: &[u8], body_length: usize) {
        match tag {
            b'Q' => {
                // "a simple Query message also destroys the unnamed statement" (protocol-flow, "Extended Query").
                self.unnamed = Unnamed::Absent;
                self.scan(prefix, body_length);
                self.end_batch();
            }
            b'P' => {
                self.sent.parses += 1;
                let name_end = prefix.iter().position(|byte| *byte == 0).unwrap_or(prefix.len());
                if name_end == 0 {
                    self.remember_unnamed(prefix, body_length);
                }
                let text = prefix.get(name_end + 1..).unwrap_or_default();
                self.scan(text, body_length.saturating_sub(name_end + 1));
            }
            b'B' if self.computed => self.scan_bind(prefix, body_length),
            b'C' if prefix.starts_with(b"S\0") => self.unnamed = Unnamed::Absent,
            b'S' => self.end_batch(),
            b'F' => {
                // Its arguments may be those of `set_config`, in whatever form.
                self.incomplete |= call_traces(prefix).outlive();
                self.end_batch();
            }
            _ => {}
        }
    }

    /// The server sent a frame: `1` (ParseComplete) and `Z` (ReadyForQuery) matter.
    pub fn on_server_frame(&mut self, tag: u8) {
        match tag {
            b'1' => {
                self.answered.parses += 1;
                if let Unnamed::Sent { at, fits } = self.unnamed
                    && at == self.answered
                {
                    self.unnamed = Unnamed::Held { fits };
                }
            }
            b'Z' => {
                self.answered = Place { batch: self.answered.batch + 1, parses: 0 };
                if let Unnamed::Sent { at, .. } = self.unnamed
                    && at.batch < self.answered.batch
                {
                    self.unnamed = Unnamed::Absent;
                }
            }
            _ => {}
        }
    }

    /// Everything sent has been answered. To be called before the state is read: it settles what is open and the
    /// counts, which a Sync that the server ignored (as it does inside a COPY) sets apart.
    pub fn at_safe_point(&mut self) {
        if let Unnamed::Sent { .. } = self.unnamed {
            self.unnamed = Unnamed::Absent;
        }
        self.sent = Place::default();
        self.answered = Place::default();
    }

    /// Names of custom settings that the session may have set, each once, in any order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(AsRef::as_ref)
    }

    /// Whether there were more names than are remembered.
    pub fn names_overflowed(&self) -> bool {
        self.overflowed
    }

    /// Whether some text may have set a custom setting whose name could not be seen: it was computed, or stood past
    /// the part of a long text that was looked at, or in a FunctionCall.
    pub fn names_uncertain(&self) -> bool {
        self.computed || self.incomplete
    }

    /// The unnamed statement. Meaningful after [`Tracked::at_safe_point`].
    pub fn unnamed(&self) -> UnnamedStatement<'_> {
        match self.unnamed {
            Unnamed::Held { fits: Fits::Whole } => UnnamedStatement::Body(&self.buffer),
            Unnamed::Held { fits: Fits::TooLong } => UnnamedStatement::TooLong,
            Unnamed::Absent | Unnamed::Sent { .. } => UnnamedStatement::Absent,
        }
    }

    fn end_batch(&mut self) {
        self.sent = Place { batch: self.sent.batch + 1, parses: 0 };
    }

    fn remember_unnamed(&mut self, prefix: &[u8], body_length: usize) {
        self.buffer.clear();
        let fits =
            if prefix.len() == body_length && body_length <= UNNAMED_LIMIT_BYTES { Fits::Whole } else { Fits::TooLong };
        if fits == Fits::Whole {
            self.buffer.extend_from_slice(prefix);
        }
        self.unnamed = Unnamed::Sent { at: self.sent, fits };
    }

    fn scan(&mut self, text: &[u8], length: usize) {
        self.incomplete |= text.len() < length;
        let mut computed = false;
        scan::settings_set(text, |finding| match finding {
            Finding::Computed => computed = true,
            Finding::Name(name) => self.learn(&name),
        });
        self.computed |= computed;
    }

    /// Learns every parameter that reads like the name of a custom setting. One that is none costs a question later.
    fn scan_bind(&mut self, prefix: &[u8], body_length: usize) {
        self.incomplete |= prefix.len() < body_length;
        scan::bound_values(prefix, |value| {
            if let Some(name) = scan::custom_setting_name(value) {
                self.learn(name);
            }
        });
    }

    fn learn(&mut self, name: &str) {
        if self.names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
        } else if self.names.len() < NAMES_LIMIT && name.len() <= NAME_LIMIT_BYTES {
            self.names.push(name.into());
        } else {
            self.overflowed = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(tracked: &mut Tracked, tag: u8, body: &[u8]) {
        tracked.on_client_frame(tag, body, body.len());
    }

    fn answer(tracked: &mut Tracked, tags: &[u8]) {
        for tag in tags {
            tracked.on_server_frame(*tag);
        }
    }

    const A: &[u8] = b"\0SELECT 1\0\0\0";
    const B: &[u8] = b"\0SELECT 2\0\0\x01\0\0\0\x17";

    #[test]
    fn the_last_unnamed_parse_that_succeeded_is_held() {
        let mut tracked = Tracked::new();
        send(&mut tracked, b'P', A);
        send(&mut tracked, b'P', b"named\0SELECT 3\0\0\0");
        send(&mut tracked, b'P', B);
        assert_eq!(tracked.unnamed(), UnnamedStatement::Absent, "not answered yet");
        send(&mut tracked, b'S', b"");
        answer(&mut tracked, b"111Z");
        tracked.at_safe_point();
        assert_eq!(tracked.unnamed(), UnnamedStatement::Body(B));
    }

    #[test]
    fn a_failed_or_skipped_parse_is_not_kept() {
        let mut tracked = Tracked::new();
        send(&mut tracked, b'P', A);
        send(&mut tracked, b'S', b"");
        send(&mut tracked, b'P', b"named\0SELECT 3\0\0\0");
        send(&mut tracked, b'P', B);
        send(&mut tracked, b'S', b"");
        // The first batch succeeds; in the second one the named statement fails, so that B is skipped.
        answer(&mut tracked, b"1ZEZ");
        assert_eq!(tracked.unnamed(), UnnamedStatement::Absent);
        tracked.at_safe_point();
        assert_eq!(tracked.unnamed(), UnnamedStatement::Absent);
    }

    #[test]
    fn batches_in_flight_are_told_apart() {
        let mut tracked = Tracked::new();
        send(&mut tracked, b'P', A);
        send(&mut tracked, b'S', b"");
        send(&mut tracked, b'P', B);
        send(&mut tracked, b'S', b"");
        answer(&mut tracked, b"1Z");
        assert_eq!(tracked.unnamed(), UnnamedStatement::Absent, "that was the answer to A");
        answer(&mut tracked, b"1");
        assert_eq!(tracked.unnamed(), UnnamedStatement::Body(B));
    }

    #[test]
    fn a_simple_query_and_a_close_destroy_it() {
        for (tag, body) in [(b'Q', &b"SELECT 1\0"[..]), (b'C', b"S\0")] {
            let mut tracked = Tracked::new();
            send(&mut tracked, b'P', A);
            send(&mut tracked, b'S', b"");
            answer(&mut tracked, b"1Z");
            send(&mut tracked, b'C', b"Snamed\0");
            send(&mut tracked, b'C', b"P\0");
            assert_eq!(tracked.unnamed(), UnnamedStatement::Body(A));
            send(&mut tracked, tag, body);
            assert_eq!(tracked.unnamed(), UnnamedStatement::Absent);
        }
    }

    #[test]
    fn counts_that_drifted_apart_are_settled_at_a_safe_point() {
        let mut tracked = Tracked::new();
        // Execute of COPY FROM STDIN: the server ignores the first of the two Syncs.
        send(&mut tracked, b'P', A);
        send(&mut tracked, b'S', b"");
        send(&mut tracked, b'S', b"");
        answer(&mut tracked, b"1Z");
        tracked.at_safe_point();
        send(&mut tracked, b'P', B);
        send(&mut tracked, b'S', b"");
        answer(&mut tracked, b"1Z");
        tracked.at_safe_point();
        assert_eq!(tracked.unnamed(), UnnamedStatement::Body(B));
    }

    #[test]
    fn a_name_that_comes_as_a_parameter_is_learned() {
        let bind = |values: &[&[u8]]| {
            let mut body = b"\0s1\0\0\x01\0\0".to_vec();
            body.extend(u16::try_from(values.len()).expect("few").to_be_bytes());
            for value in values {
                body.extend(u32::try_from(value.len()).expect("short").to_be_bytes());
                body.extend(*value);
            }
            body
        };
        let mut tracked = Tracked::new();
        send(&mut tracked, b'B', &bind(&[b"app.early", b"x"]));
        send(&mut tracked, b'P', b"s1\0SELECT set_config($1, $2, false)\0\0\0");
        assert!(tracked.reads_binds());
        send(&mut tracked, b'B', &bind(&[b"app.tenant", b"tenant-7"]));
        send(&mut tracked, b'B', &bind(&[b"TimeZone", b"1.5"]));
        send(&mut tracked, b'B', &[0, 0, 0, 9, 0]);
        assert_eq!(tracked.names().collect::<Vec<_>>(), ["app.tenant"]);
    }

    #[test]
    fn long_texts_are_scanned_as_far_as_they_are_at_hand() {
        let mut tracked = Tracked::new();
        tracked.on_client_frame(b'P', b"\0SET app.x = 1; INSERT", 100_000);
        send(&mut tracked, b'S', b"");
        answer(&mut tracked, b"1Z");
        tracked.at_safe_point();
        assert_eq!(tracked.unnamed(), UnnamedStatement::TooLong);
        assert_eq!(tracked.names().collect::<Vec<_>>(), ["app.x"]);
        assert!(tracked.names_uncertain());
    }

    #[test]
    fn names_are_kept_once_and_bounded() {
        let mut tracked = Tracked::new();
        for number in 0..1000 {
            send(&mut tracked, b'Q', format!("SET app.X{} = 1; SET APP.x0 = 2\0", number % 300).as_bytes());
        }
        assert_eq!(tracked.names().count(), NAMES_LIMIT);
        assert!(tracked.names_overflowed());
        assert!(!tracked.names_uncertain());
    }

    #[test]
    fn a_function_call_may_have_set_anything() {
        let mut tracked = Tracked::new();
        // lo_open
        send(&mut tracked, b'F', &952u32.to_be_bytes());
        assert!(!tracked.names_uncertain());
        // set_config
        send(&mut tracked, b'F', &2078u32.to_be_bytes());
        assert!(tracked.names_uncertain());
    }

    #[test]
    fn debug_output_shows_no_text() {
        let mut tracked = Tracked::new();
        send(&mut tracked, b'P', b"\0SELECT 'secret'\0\0\0");
        assert!(!format!("{tracked:?}").contains("secret"));
    }
}
