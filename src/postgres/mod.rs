//! Talking to the two servers: connections, TLS, login, control queries, replication protocol, raw COPY.

mod connect;
mod raw;
mod stream;

pub use connect::{ConnectError, Connector, Control, InstanceId};
pub use raw::{Credential, Login, RawConnection, RawError};
pub use stream::Stream;
