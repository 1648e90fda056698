//! Talking to the two servers: connections, TLS, login, control queries, replication protocol, raw COPY.

mod connect;
mod copy;
mod dial;
mod login;
mod pipeline;
mod raw;
mod scram;
mod settings;
mod stream;
mod tls;
pub mod walsender;

pub use connect::{ConnectError, Connector, Control, InstanceId};
pub use copy::{CopyError, CopyIn, CopyOut, Direction};
pub use pipeline::{EncodeError, Outcome, Pipeline, PipelineError};
pub use raw::{Credential, Frame, Login, RawConnection, RawError, TextRows};
pub use stream::Stream;
