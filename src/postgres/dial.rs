//! From an address to a byte stream: TCP or Unix socket, and the SSLRequest that comes before anything else.

use std::io;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::config::{self, SslMode};
use crate::postgres::Stream;

/// SSLRequest: its length, and the code 1234·2^16 + 5679 in place of a protocol version.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Whether TLS is tried at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// As `sslmode` says.
    AsConfigured,
    /// The second attempt of `prefer`, after TLS was refused further up.
    Without,
}

/// Where bytes wait that we have not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// Here, as far as the kernel likes.
    Here,
    /// With a sender on this machine, but for a few. A process that sends many small messages over loopback carries each
    /// to the receiver by itself, through the whole network stack, unless the receive window is full: then they are put
    /// together, and whoever reads fetches them. That halves what sending costs a walsender.
    WithSender,
}

/// Receive buffer of a connection whose unread bytes are to stay with the sender. It is set before connecting: shrunk
/// later, the window could close for ever, because it would be told in units larger than the buffer.
const SMALL_BUFFER_BYTES: u32 = 16 * 1024;

/// Why there is no stream: at which step, why, and what mends it.
#[derive(Debug)]
pub(super) struct DialError {
    pub(super) step: &'static str,
    pub(super) cause: String,
    pub(super) hint: &'static str,
}

/// Connects, and negotiates TLS as `sslmode` says. Does not bound its time: the caller does.
pub(super) async fn open(
    server: &config::Server,
    tls: Option<&(TlsConnector, ServerName<'static>)>,
    encryption: Encryption,
    unread: Unread,
) -> Result<Stream, DialError> {
    if server.host.starts_with('/') {
        let path = format!("{}/.s.PGSQL.{}", server.host.trim_end_matches('/'), server.port);
        let stream = UnixStream::connect(&path).await.map_err(|error| DialError {
            step: "connecting to the Unix socket",
            cause: format!("{path}: {error}"),
            hint: "is the server running, and is this its socket directory and port?",
        })?;
        return Ok(Stream::Unix(stream));
    }

    let stream = connect_tcp(server, unread).await.map_err(|error| DialError {
        step: "connecting",
        cause: error.to_string(),
        hint: "is the server running there, does listen_addresses include that address, and does the network let it through?",
    })?;
    match tls {
        Some((connector, name)) if encryption == Encryption::AsConfigured => {
            negotiate(server, stream, connector, name.clone(), unread).await
        }
        Some(_) | None => Ok(Stream::Tcp(stream)),
    }
}

async fn connect_tcp(server: &config::Server, unread: Unread) -> io::Result<TcpStream> {
    let address = (server.host.as_str(), server.port);
    let stream = match unread {
        Unread::Here => TcpStream::connect(address).await?,
        Unread::WithSender => connect_small(address).await?,
    };
    stream.set_nodelay(true)?;
    watch_link(&SockRef::from(&stream), &server.tcp)?;
    Ok(stream)
}

/// The first of the addresses that answers. Only over loopback is the buffer small: elsewhere it would be waited for the
/// network after every few bytes.
async fn connect_small(address: (&str, u16)) -> io::Result<TcpStream> {
    let mut failure = io::ErrorKind::AddrNotAvailable.into();
    for address in tokio::net::lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if address.ip().to_canonical().is_loopback() {
            socket.set_recv_buffer_size(SMALL_BUFFER_BYTES)?;
        }
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Lets the kernel watch a link, or every link that a listening socket accepts: Linux hands these options down.
pub fn watch_link(socket: &SockRef<'_>, tcp: &config::Tcp) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(tcp.keepalives_idle)
        .with_interval(tcp.keepalives_interval)
        .with_retries(tcp.keepalives_count);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(tcp.user_timeout).filter(|timeout| !timeout.is_zero()))
}

/// Sends SSLRequest and does what the one byte of answer says. Exactly one byte is read: anything that follows it in
/// the clear reaches the TLS handshake and breaks it, so nobody on the way can slip in a message (CVE-2021-23222).
async fn negotiate(
    server: &config::Server,
    mut stream: TcpStream,
    connector: &TlsConnector,
    name: ServerName<'static>,
    unread: Unread,
) -> Result<Stream, DialError> {
    let lost = |error: io::Error| DialError {
        step: "asking for TLS",
        cause: error.to_string(),
        hint: "is this a PostgreSQL server, and has it a free connection slot?",
    };
    stream.write_all(&SSL_REQUEST).await.map_err(lost)?;
    let answer = stream.read_u8().await.map_err(lost)?;
    match (answer, server.sslmode) {
        (b'S', _) => {
            let handshake = Box::pin(connector.connect(name, stream)).await;
            match handshake {
                Ok(stream) => Ok(Stream::Tls(Box::new(stream.into()))),
                Err(error) if server.sslmode == SslMode::Prefer => {
                    // As libpq does: prefer protects against nothing that can break a handshake.
                    tracing::debug!(host = server.host, port = server.port, %error, "no TLS, goes on without");
                    Box::pin(open(server, None, Encryption::Without, unread)).await
                }
                Err(error) => Err(DialError {
                    step: "negotiating TLS",
                    cause: error.to_string(),
                    hint: "check sslrootcert against the issuer of the server's certificate, and for verify-full the host \
                           against its subjectAltName; it must be a version 3 certificate",
                }),
            }
        }
        (b'N', SslMode::Prefer) => Ok(Stream::Tcp(stream)),
        (b'N', _) => Err(DialError {
            step: "asking for TLS",
            cause: "the server does not offer TLS".to_owned(),
            hint: "switch on ssl there, or choose sslmode prefer or disable",
        }),
        (other, _) => Err(DialError {
            step: "asking for TLS",
            cause: format!("the answer to SSLRequest was byte {other:#04x}"),
            hint: "is this a PostgreSQL server, and has it a free connection slot?",
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// Asked of the kernel: on a listener too, whose connections begin with what it has.
    #[test]
    fn the_kernel_watches_a_link_as_it_is_told() {
        let tcp = config::Tcp {
            keepalives_idle: Duration::from_secs(41),
            keepalives_interval: Duration::from_secs(7),
            keepalives_count: 3,
            user_timeout: Duration::from_secs(19),
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        watch_link(&SockRef::from(&listener), &tcp).expect("set");
        let client = TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
        let (accepted, _) = listener.accept().expect("accepted");
        let before = SockRef::from(&client).keepalive().expect("asked");
        watch_link(&SockRef::from(&client), &tcp).expect("set");
        assert!(!before, "not by itself");
        for socket in [SockRef::from(&client), SockRef::from(&accepted)] {
            assert!(socket.keepalive().expect("asked"));
            assert_eq!(socket.tcp_keepalive_time().expect("asked"), tcp.keepalives_idle);
            assert_eq!(socket.tcp_keepalive_interval().expect("asked"), tcp.keepalives_interval);
            assert_eq!(socket.tcp_keepalive_retries().expect("asked"), tcp.keepalives_count);
            assert_eq!(socket.tcp_user_timeout().expect("asked"), Some(tcp.user_timeout));
        }
        watch_link(&SockRef::from(&client), &config::Tcp { user_timeout: Duration::ZERO, ..tcp }).expect("set");
        assert_eq!(SockRef::from(&client).tcp_user_timeout().expect("asked"), None, "the kernel's own patience");
    }
}
