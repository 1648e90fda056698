//! Listeners that the service manager has opened (`sd_listen_fds(3)`): clients may connect before this process runs and while
//! it is started again.
//!
//! Each is used where the configuration names its address; one that it does not name is closed with a warning, because a
//! listener that nobody accepts at lets clients wait for ever. Where the manager passes none, nothing happens here.

use std::io;
use std::net::SocketAddr;

use anyhow::Context as _;
use listenfd::ListenFd;

use crate::proxy::takeover::{Handle, Purpose};

/// Takes what `LISTEN_FDS` counts. `http` is where the HTTP API is to listen. To be called while there is one thread: what is
/// taken is also taken out of the environment.
pub(super) fn listeners(http: Option<SocketAddr>) -> anyhow::Result<Vec<Handle>> {
    let mut passed = ListenFd::from_env();
    (0..passed.len())
        .map(|index| handle(&mut passed, index, http).with_context(|| format!("socket {index} of LISTEN_FDS")))
        .collect()
}

fn handle(passed: &mut ListenFd, index: usize, http: Option<SocketAddr>) -> io::Result<Handle> {
    if let Ok(Some(listener)) = passed.take_unix_listener(index) {
        let path = listener.local_addr()?.as_pathname().map(std::path::Path::to_owned);
        let path = path.ok_or_else(|| io::Error::other("a Unix socket must have a path"))?;
        listener.set_nonblocking(true)?;
        return Ok(Handle { purpose: Purpose::ManagedUnix(path), socket: listener.into() });
    }
    let listener = passed.take_tcp_listener(index)?.ok_or_else(|| io::Error::other("it has been taken"))?;
    listener.set_nonblocking(true)?;
    let purpose = if http.is_some_and(|http| listener.local_addr().is_ok_and(|bound| bound == http)) {
        Purpose::Http
    } else {
        Purpose::Tcp
    };
    Ok(Handle { purpose, socket: listener.into() })
}
