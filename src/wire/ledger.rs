//! The ledger of a session: what was asked of the server and what it has answered.
//!
//! It decides when a session is **quiet**, which is the only state in which it may be held or moved: no unanswered
//! Sync, Query or FunctionCall, no COPY, nothing forwarded since the last Sync, and the last ReadyForQuery said `I`.
//!
//! The order of marks is exact, because three rules of the server cannot be told by counting alone:
//! - after an error in the extended protocol everything up to the next Sync is discarded, a Query too;
//! - in copy-in mode Flush and Sync are ignored ("COPY Operations"), so those Syncs get no ReadyForQuery;
//! - but when the COPY fails before the server has read such a Sync, it *is* answered, and nobody can tell which
//!   happened. Such answers are [`Ledger::is_uncertain`] until a later answer proves that none is under way.

use std::collections::VecDeque;

use super::frame::{backend, frontend};

/// What ReadyForQuery says of the session's transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// `I`: not in a transaction block.
    Idle,
    /// `T`: in a transaction block.
    InBlock,
    /// `E`: in a failed transaction block.
    Failed,
}

impl TransactionStatus {
    /// Reads the status byte.
    #[inline]
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'I' => Some(Self::Idle),
            b'T' => Some(Self::InBlock),
            b'E' => Some(Self::Failed),
            _ => None,
        }
    }
}

/// A forwarded frame whose answer is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// So many Parse, Bind, Describe, Close or Execute, one answer each.
    Steps(u32),
    /// Answered by ReadyForQuery.
    Sync,
    /// Answered by anything, then ReadyForQuery.
    Query,
    /// Answered by FunctionCallResponse or ErrorResponse, then ReadyForQuery.
    Call,
    /// CopyDone or CopyFail sent before the server said CopyInResponse: no answer of its own.
    CopyEnd,
}

/// More marks than this and the relay waits for answers; the kernel's socket buffers hold more than any client needs.
const MARKS_MAX: usize = 8192;

/// What was asked and what is answered.
#[derive(Debug)]
pub struct Ledger {
    marks: VecDeque<Mark>,
    /// Marks that end in ReadyForQuery.
    boundaries: u32,
    /// The Query or Call at the front has had a first answer.
    started: bool,
    /// The server reads CopyData; it left that mode as far as frames already forwarded tell, when false.
    copy_in: bool,
    /// The server discards everything up to a Sync that was not forwarded yet.
    skipping: bool,
    /// Extended-protocol frames were forwarded after the last Sync or Query.
    unsynced: bool,
    /// Syncs that the running COPY has swallowed, unless it failed first.
    swallowed: u32,
    /// Syncs of a failed COPY that may or may not be answered.
    uncertain: u32,
    /// A COPY met other messages than it may: they are used up if they ended the COPY, and executed if it had failed
    /// before. Nobody can tell, so the session is never quiet again. No known driver does this. The same holds where a
    /// ReadyForQuery came that nothing accounts for.
    lost: bool,
    status: TransactionStatus,
    /// ReadyForQuery that came; wraps.
    readies: u32,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// A session that has just seen its first `ReadyForQuery('I')`.
    pub fn new() -> Self {
        Self {
            marks: VecDeque::new(),
            boundaries: 0,
            started: false,
            copy_in: false,
            skipping: false,
            unsynced: false,
            swallowed: 0,
            uncertain: 0,
            lost: false,
            status: TransactionStatus::Idle,
            readies: 0,
        }
    }

    /// The last status the server reported.
    pub fn status(&self) -> TransactionStatus {
        self.status
    }

    /// How many ReadyForQuery came, wrapping: tells one statement of a session from the next.
    #[inline]
    pub fn readies(&self) -> u32 {
        self.readies
    }

    /// Whether a Sync, Query or FunctionCall is unanswered.
    #[inline]
    pub fn awaits_ready(&self) -> bool {
        self.boundaries > 0
    }

    /// Whether the session is at a safe point as far as whole frames go; the relay adds that none is cut.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.marks.is_empty() && self.status == TransactionStatus::Idle && !self.unsynced && !self.copy_in && !self.lost
    }

    /// Whether a ReadyForQuery may still come that nothing else accounts for. Harmless to admission (such a Sync finds
    /// the server idle), but whoever speaks on this connection next must expect it.
    pub fn is_uncertain(&self) -> bool {
        self.uncertain > 0
    }

    /// Whether the server waits for this client: in copy-in mode, or with frames forwarded and no Sync yet.
    pub fn server_waits(&self) -> bool {
        self.copy_in || self.lost || (self.unsynced && !self.awaits_ready())
    }

    /// Whether the server reads CopyData.
    pub fn is_copying_in(&self) -> bool {
        self.copy_in
    }

    /// Whether so much is outstanding that nothing more should be forwarded.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.marks.len() >= MARKS_MAX && !self.lost
    }

    /// A frame with this tag is being forwarded to the server.
    #[inline]
    pub fn forwarded(&mut self, tag: u8) {
        use frontend::*;
        if self.lost {
            return;
        }
        match tag {
            PARSE | BIND | DESCRIBE | EXECUTE | CLOSE => self.forwarded_step(),
            SYNC if self.copy_in => self.swallowed += 1,
            SYNC => {
                self.skipping = false;
                self.push_boundary(Mark::Sync);
            }
            QUERY | FUNCTION_CALL if self.copy_in => self.interrupt_copy(),
            QUERY | FUNCTION_CALL if self.skipping => self.lost |= self.uncertain > 0,
            QUERY => self.push_boundary(Mark::Query),
            FUNCTION_CALL => self.push_boundary(Mark::Call),
            COPY_DONE | COPY_FAIL if self.copy_in => self.copy_in = false,
            COPY_DONE | COPY_FAIL if !self.marks.is_empty() => self.marks.push_back(Mark::CopyEnd),
            _ => {}
        }
    }

    #[inline]
    fn forwarded_step(&mut self) {
        if self.copy_in {
            return self.interrupt_copy();
        }
        self.unsynced = true;
        if self.skipping {
            self.lost |= self.uncertain > 0;
            return;
        }
        match self.marks.back_mut() {
            Some(Mark::Steps(count)) => *count += 1,
            _ => self.marks.push_back(Mark::Steps(1)),
        }
    }

    /// A message that is not CopyData aborts the copy. In the extended protocol it is swept up with the copy's error.
    fn interrupt_copy(&mut self) {
        self.copy_in = false;
        self.lost |= self.swallowed > 0 || self.marks.front() == Some(&Mark::Query);
    }

    fn push_boundary(&mut self, mark: Mark) {
        self.unsynced = false;
        self.boundaries += 1;
        self.marks.push_back(mark);
    }

    /// The server has sent a frame with this tag; ReadyForQuery goes to [`Ledger::ready`] instead.
    #[inline]
    pub fn answered(&mut self, tag: u8) {
        use backend::*;
        if self.lost {
            return;
        }
        match tag {
            PARSE_COMPLETE
            | BIND_COMPLETE
            | CLOSE_COMPLETE
            | NO_DATA
            | ROW_DESCRIPTION
            | EMPTY_QUERY_RESPONSE
            | PORTAL_SUSPENDED
            | FUNCTION_CALL_RESPONSE => self.answered_step(),
            COMMAND_COMPLETE => {
                // The copy ended well, so it read, and ignored, every Sync before its end.
                self.swallowed = 0;
                self.answered_step();
            }
            COPY_IN_RESPONSE => self.copy_in_started(),
            ERROR_RESPONSE => self.failed(),
            _ => {}
        }
    }

    #[inline]
    fn answered_step(&mut self) {
        self.uncertain = 0;
        match self.marks.front_mut() {
            Some(Mark::Steps(1)) => {
                self.marks.pop_front();
                self.drop_copy_ends();
            }
            Some(Mark::Steps(count)) => *count -= 1,
            Some(Mark::Query | Mark::Call) => self.started = true,
            Some(Mark::Sync | Mark::CopyEnd) | None => {}
        }
    }

    /// What follows the COPY's own mark was forwarded before anybody knew of the COPY: replay what the server does
    /// with it.
    fn copy_in_started(&mut self) {
        match self.marks.front() {
            // The next step aborts the copy; the error will sweep up the rest.
            Some(Mark::Steps(count)) if *count > 1 => return,
            Some(Mark::Steps(_)) => self.unsynced = true,
            Some(Mark::Query) => self.started = true,
            Some(Mark::Sync | Mark::Call | Mark::CopyEnd) | None => return,
        }
        let simple = self.marks.front() == Some(&Mark::Query);
        while let Some(mark) = self.marks.get(1) {
            match mark {
                Mark::Sync => {
                    self.boundaries -= 1;
                    self.swallowed += 1;
                    self.marks.remove(1);
                    continue;
                }
                Mark::CopyEnd => {
                    self.marks.remove(1);
                }
                // They abort the copy, and its error sweeps them up.
                Mark::Steps(_) | Mark::Query | Mark::Call => self.lost |= simple,
            }
            let last = self.marks.iter().skip(1).rev().find(|mark| **mark != Mark::CopyEnd);
            if matches!(last, Some(Mark::Sync | Mark::Query | Mark::Call)) {
                self.unsynced = false;
            }
            return;
        }
        self.copy_in = true;
    }

    fn failed(&mut self) {
        self.uncertain += self.swallowed;
        self.swallowed = 0;
        match self.marks.front() {
            Some(Mark::Query | Mark::Call) => {
                self.copy_in = false;
                self.started = true;
            }
            Some(Mark::Steps(steps)) => {
                self.copy_in = false;
                let more = *steps > 1 || !matches!(self.marks.get(1), None | Some(Mark::Sync));
                // A Sync that was not swallowed after all ends the discarding early, and what stands between it and
                // the next Sync is executed.
                self.lost |= self.uncertain > 0 && more;
                self.skip_to_sync();
            }
            // An error while the Sync itself commits; or, with nothing asked, the server's farewell.
            Some(Mark::Sync | Mark::CopyEnd) | None => {}
        }
    }

    fn skip_to_sync(&mut self) {
        while let Some(mark) = self.marks.front() {
            match mark {
                Mark::Sync => return,
                Mark::Query | Mark::Call => self.boundaries -= 1,
                Mark::Steps(_) | Mark::CopyEnd => {}
            }
            self.marks.pop_front();
        }
        self.skipping = true;
        self.unsynced = true;
    }

    /// The server has sent ReadyForQuery.
    #[inline]
    pub fn ready(&mut self, status: TransactionStatus) {
        let answers_front = match self.marks.front() {
            Some(Mark::Sync) => true,
            Some(Mark::Query | Mark::Call) => self.started,
            Some(Mark::Steps(_) | Mark::CopyEnd) | None => false,
        };
        self.status = status;
        self.readies = self.readies.wrapping_add(1);
        if self.lost {
            return;
        }
        if answers_front {
            self.started = false;
            self.boundaries -= 1;
            self.marks.pop_front();
            self.drop_copy_ends();
            return;
        }
        let Some(uncertain) = self.uncertain.checked_sub(1) else {
            self.lost = true;
            return;
        };
        self.uncertain = uncertain;
        if self.skipping {
            // The copy had failed before the server read that Sync, which therefore ended the discarding.
            self.skipping = false;
            self.unsynced = false;
        }
    }

    /// CopyDone and CopyFail outside a copy are ignored by the server.
    #[inline]
    fn drop_copy_ends(&mut self) {
        while let Some(Mark::CopyEnd) = self.marks.front() {
            self.marks.pop_front();
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Ledger {
    /// Whether the counts agree with the marks.
    pub(super) fn is_consistent(&self) -> bool {
        let boundary = |mark: &&Mark| matches!(mark, Mark::Sync | Mark::Query | Mark::Call);
        self.boundaries as usize == self.marks.iter().filter(boundary).count() && !self.marks.contains(&Mark::Steps(0))
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
