//! The side of a client that shares connections (transaction pooling): one transaction of it that may become a sample.
//!
//! What such a client has set is known at any time, as the profile that each of its connections is given, so no server is
//! asked for it. A statement that was prepared before is known by its text, as the pool knows it, and not by a name. Nothing of
//! this outlasts the transaction, and a client that is not being sampled has none of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::taking::{REQUEST_BYTES, Taking};
use super::tally::Skip;
use super::{Desk, Run, Sample};
use crate::postgres::Login;
use crate::proxy::pool::{Profile, Reported};
use crate::wire::frame::Header;

/// See the module.
pub(in crate::proxy) struct Sampling {
    run: Arc<Run>,
    login: Arc<Login>,
    /// What the client had set when the transaction began.
    profile: Arc<Profile>,
    /// What a Parse has after the name, of the statement that is bound.
    prepared: Option<Bytes>,
    taking: Taking,
    has_failed: bool,
}

impl Sampling {
    /// A transaction on the source begins while shadow reads may be on; none: it is no sample. `told` is what the client knows
    /// of its settings.
    pub(in crate::proxy) fn begin(
        desk: &Desk,
        login: &Login,
        profile: &Arc<Profile>,
        told: &Reported,
    ) -> Option<Box<Self>> {
        let run = desk.current().filter(|run| run.covers(&login.database) && run.is_chosen())?;
        run.sampled();
        let begun = Self::with(&run, login, profile, told);
        begun.map_err(|why| run.skipped(why)).ok()
    }

    fn with(run: &Arc<Run>, login: &Login, profile: &Arc<Profile>, told: &Reported) -> Result<Box<Self>, Skip> {
        // Statements in another encoding, or with escapes that are read otherwise, are not judged here.
        let says = |name, expected| told.iter().any(|(known, value)| known == name && value == expected);
        if !says("client_encoding", "UTF8") || !says("standard_conforming_strings", "on") {
            return Err(Skip::Session);
        }
        let slot = run.slot().ok_or(Skip::Busy)?;
        // As the connections of its pool log in: what the client asked for at its start is in the profile.
        let login = Login { parameters: Vec::new(), ..login.clone() };
        Ok(Box::new(Self {
            run: run.clone(),
            login: run.login(&login),
            profile: profile.clone(),
            prepared: None,
            taking: Taking::new(slot),
            has_failed: false,
        }))
    }

    /// A frame of the client's is sent on, under whatever name; `body` is as much of it as is at hand. `bound`: what a Parse has
    /// after the name, of the statement that a Bind is of.
    pub(in crate::proxy) fn on_client_frame(
        mut self: Box<Self>,
        header: Header,
        body: &[u8],
        bound: Option<&[u8]>,
    ) -> Option<Box<Self>> {
        let mut noted = self.taking.on_client_frame(header, body);
        if let Some(tail) = bound {
            if tail.len() > REQUEST_BYTES {
                noted = noted.and(Err(Skip::TooLarge));
            } else {
                self.prepared = Some(Bytes::copy_from_slice(tail));
            }
        }
        self.go_on_if(noted)
    }

    /// The client is sent these bytes of the server's.
    pub(in crate::proxy) fn on_server_bytes(mut self: Box<Self>, bytes: &[u8]) -> Option<Box<Self>> {
        let noted = self.taking.on_server_bytes(bytes);
        self.go_on_if(noted)
    }

    fn go_on_if(self: Box<Self>, noted: Result<(), Skip>) -> Option<Box<Self>> {
        match noted {
            Ok(()) => Some(self),
            Err(why) => {
                self.run.skipped(why);
                None
            }
        }
    }

    /// The server has sent an error.
    pub(in crate::proxy) fn on_server_error(&mut self) {
        self.has_failed = true;
    }

    /// The transaction is over; it took so long.
    pub(in crate::proxy) fn end(self, took: Duration) {
        let Self { run, login, profile, prepared, taking, has_failed } = self;
        if has_failed {
            return run.skipped(Skip::Failed);
        }
        let Taking { request, answer, slot, .. } = taking;
        run.push(Sample { login, state: profile.state.clone(), request, prepared, answer, took, _slot: slot });
    }
}
