//! Talking to the two servers: connections, TLS, login, control queries, replication protocol, raw COPY.
//!
//! Three kinds of connection, all opened by a [`Connector`] over the same sockets, TLS and time-out:
//!
//! * [`Control`]: SQL of our own, by tokio-postgres;
//! * [`RawConnection`]: protocol frames, for proxied sessions, COPY (`copy`) and apply ([`Pipeline`]);
//! * [`walsender`]: slots and the stream of changes.
//!
//! Nothing here knows of migrations, routes or cutovers, and nothing here decides to try again: an error says what
//! happened, and whoever asked for the connection knows what it means. Secrets go into the one message that carries
//! them; errors, logs and `Debug` never show them, nor row values.

mod connect;
mod copy;
mod derived_keys;
mod dial;
mod error;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod login;
mod pipeline;
mod raw;
pub mod ring;
mod scram;
mod settings;
mod stall;
mod stream;
mod tls;
pub mod walsender;

pub use connect::{ConnectError, Connector, Control, InstanceId};
pub use copy::{CopyError, CopyIn, CopyOut, Direction, Moved};
pub use dial::watch_link;
pub use error::{ErrorReport, RawError, without_values};
pub use frame::Frame;
pub use pipeline::{EncodeError, Outcome, Pipeline, PipelineError, Sent};
pub use raw::{Credential, Login, ParkedConnection, RawConnection, TextRows};
pub use stream::{Parked, Stream};
