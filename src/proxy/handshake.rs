//! From an accepted socket to a client that has said what it wants: TLS, startup packet, cancel requests.
//!
//! ```text
//! client                         proxy
//!   PROXY header   ───────────▶                         (from a balancer that is believed, and only from one)
//!   GSSENCRequest  ───────────▶  N
//!   SSLRequest     ───────────▶  S, TLS handshake      (N where no certificate is configured)
//!   StartupMessage ───────────▶  authentication …      (CancelRequest: passed to its session, then closed)
//!
//!   TLS ClientHello ──────────▶  TLS handshake         (direct negotiation: no SSLRequest, ALPN is a must)
//!   StartupMessage ───────────▶  authentication …
//! ```
//!
//! Nothing that came in the clear behind a request for encryption is ever taken for encrypted. Nothing here is longer
//! than a startup packet may be, and every request for encryption is answered once.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::client_error::ClientError;
use super::tls::{Secured, ServerTls};
use crate::config::Network;
use crate::postgres::Stream;
use crate::wire::frame::{HEADER_BYTES, Header};
use crate::wire::proxy_protocol::{self, Origin, ProxyHeaderError};
use crate::wire::startup::{self, SessionStartup, Startup, StartupError};

/// First byte of a TLS record that carries a handshake; as the first byte of a startup packet it would be a length of
/// hundreds of megabytes.
const TLS_HANDSHAKE: u8 = 0x16;
/// Room for what a client sends at a time during a login.
const LOGIN_MESSAGE_BYTES: usize = 512;

/// Who is at the other end, as far as it is known before it says so itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Peer {
    /// Where the client is: the socket's other end, or what a balancer says. None: a Unix socket.
    pub(super) address: Option<SocketAddr>,
    /// A balancer has said so.
    is_hearsay: bool,
    /// What the TLS connection says; none: in the clear, or a Unix socket.
    pub(super) secured: Option<Secured>,
}

impl Peer {
    pub(super) fn new(address: Option<SocketAddr>) -> Self {
        Self { address, is_hearsay: false, secured: None }
    }

    /// Whether the client is on this machine: it comes from the address that it connected to, or over loopback, which
    /// is another machine's where a balancer speaks of it.
    pub(super) fn is_on(&self, stream: &Stream) -> bool {
        let Some(address) = self.address.map(|address| address.ip().to_canonical()) else { return false };
        let socket = match stream {
            Stream::Tcp(socket) => socket,
            Stream::Tls(tls) => tls.get_ref().0,
            Stream::Unix(_) | Stream::Ring(_) => return false,
        };
        let own = socket.local_addr().is_ok_and(|own| own.ip().to_canonical() == address);
        if self.is_hearsay { own && !address.is_loopback() } else { own || address.is_loopback() }
    }

    /// `address:port`, or `unix`.
    pub(super) fn shown(&self) -> String {
        self.address.map_or_else(|| "unix".to_owned(), |address| address.to_string())
    }
}

/// A client that is not in the relay yet: reads of exactly what is needed, writes that are gathered.
#[derive(Debug)]
pub(super) struct ClientChannel {
    pub(super) stream: Stream,
    /// Read and not used.
    pub(super) input: Vec<u8>,
    /// To be written.
    pub(super) out: Vec<u8>,
}

impl ClientChannel {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, input: Vec::new(), out: Vec::new() }
    }

    /// The next `count` bytes. Bounded by its callers, who know how long what they wait for may be.
    pub(super) async fn read_exact(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.input.len() < count {
            self.read_some().await?;
        }
        let rest = self.input.split_off(count);
        Ok(std::mem::replace(&mut self.input, rest))
    }

    /// The next `count` bytes, and none beyond: what follows them on the socket is for somebody else.
    async fn read_alone<const COUNT: usize>(&mut self) -> io::Result<[u8; COUNT]> {
        let mut bytes = [0; COUNT];
        self.stream.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    /// Reads what there is. Cancel-safe.
    pub(super) async fn read_some(&mut self) -> io::Result<()> {
        // Room for any message of a login: one read each.
        self.input.reserve(LOGIN_MESSAGE_BYTES);
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// The header of the next frame.
    pub(super) async fn read_header(&mut self) -> io::Result<Header> {
        let bytes = self.read_exact(HEADER_BYTES).await?;
        match Header::parse(&bytes) {
            Ok(Some(header)) => Ok(header),
            Ok(None) | Err(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    async fn answer_byte(&mut self, byte: u8) -> io::Result<()> {
        self.out.push(byte);
        self.flush().await
    }

    /// The TLS handshake. Nothing may have been read beyond the SSLRequest.
    async fn into_tls(self, tls: &ServerTls) -> io::Result<(Self, Secured)> {
        let Stream::Tcp(stream) = self.stream else { return Err(io::ErrorKind::Unsupported.into()) };
        let stream = tls.acceptor.accept(stream).await?.into();
        let facts = tls.facts(&stream);
        Ok((Self::new(Stream::Tls(Box::new(stream))), facts))
    }

    /// Writes what is gathered.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out).await?;
        self.out.clear();
        self.stream.flush().await
    }

    /// Tells the client why it is not let in, and closes.
    pub(super) async fn refuse(mut self, error: &ClientError) {
        self.out.clear();
        error.encode(&mut self.out);
        // The client may be gone already; then there is nobody to tell.
        if self.flush().await.is_ok() {
            let _closed = self.stream.shutdown().await;
        }
    }
}

/// What a client wants.
#[derive(Debug)]
pub(super) enum Request {
    /// A session.
    Session(SessionStartup),
    /// Cancel another session's statement.
    Cancel {
        /// Process id that the proxy gave out.
        pid: i32,
        /// Secret that came with it.
        key: Vec<u8>,
    },
}

/// The handshake did not come to a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// The client must be told this.
    #[error("refused: {0:?}")]
    Refused(ClientError),
    /// A balancer that is to begin with a PROXY protocol header does not.
    #[error(transparent)]
    Header(#[from] ProxyHeaderError),
    /// TLS without SSLRequest, and without ALPN. PostgreSQL closes without a word.
    #[error("received direct SSL connection request without ALPN protocol negotiation extension")]
    NoAlpn,
    /// The link broke, or TLS failed.
    #[error("client lost during the handshake")]
    Lost(#[from] io::Error),
}

impl From<StartupError> for HandshakeError {
    fn from(error: StartupError) -> Self {
        let text = error.to_string().into();
        Self::Refused(match error {
            StartupError::Version { .. } => ClientError::Unsupported(text),
            StartupError::NoUser => ClientError::Authorization(text),
            StartupError::Replication { .. } => ClientError::InvalidReplication(text),
            StartupError::Length | StartupError::Layout | StartupError::Encoding => ClientError::Protocol(text),
        })
    }
}

/// What clients meet before they have said anything.
pub(super) struct Entrance<'a> {
    /// None: TLS is not spoken.
    pub(super) tls: Option<&'a ServerTls>,
    /// Addresses from which a PROXY protocol header must come.
    pub(super) balancers: &'a [Network],
}

/// What follows a startup packet.
enum Next {
    Packet,
    Tls,
    Request(Request),
}

/// Which encryption requests were answered; PostgreSQL allows one of each kind, and none over TLS.
#[derive(Default)]
struct Asked {
    gss: bool,
    tls: bool,
}

/// Negotiates encryption and reads the startup packet. Notes in `peer` what is learnt. A client that is refused has
/// been told.
pub(super) async fn negotiate(
    mut channel: ClientChannel,
    entrance: &Entrance<'_>,
    peer: &mut Peer,
) -> Result<(ClientChannel, Request), HandshakeError> {
    if peer.address.is_some_and(|address| entrance.balancers.iter().any(|known| known.contains(address.ip()))) {
        read_proxy_header(&mut channel, peer).await?;
    }
    let mut asked = Asked::default();
    if let Some(tls) = entrance.tls
        && begins_with_tls(&channel.stream).await?
    {
        channel = secure(channel, tls, &mut asked, peer).await?;
        if !peer.secured.as_ref().is_some_and(|secured| secured.alpn) {
            return Err(HandshakeError::NoAlpn);
        }
    }
    loop {
        match (answer(&mut channel, entrance.tls, &mut asked).await, entrance.tls) {
            (Ok(Next::Request(request)), _) => return Ok((channel, request)),
            (Ok(Next::Tls), Some(tls)) => channel = secure(channel, tls, &mut asked, peer).await?,
            (Ok(Next::Packet | Next::Tls), _) => {}
            (Err(HandshakeError::Refused(error)), _) => {
                channel.refuse(&error).await;
                return Err(HandshakeError::Refused(error));
            }
            (Err(lost), _) => return Err(lost),
        }
    }
}

async fn read_proxy_header(channel: &mut ClientChannel, peer: &mut Peer) -> Result<(), HandshakeError> {
    let fixed = channel.read_alone::<{ proxy_protocol::FIXED_BYTES }>().await?;
    let mut rest = vec![0; proxy_protocol::rest_bytes(&fixed)?];
    channel.stream.read_exact(&mut rest).await?;
    match proxy_protocol::parse(&fixed, &rest)? {
        Origin::Client(address) => {
            peer.address = Some(address);
            peer.is_hearsay = true;
        }
        // Somebody on the balancer's machine, or nobody who is named: the balancer's own address is what is known. A
        // Unix socket over there is not one of ours, whose rules would believe more.
        Origin::Itself | Origin::Unix => {}
    }
    Ok(())
}

/// Whether the client's first byte is that of a TLS handshake. It stays in the socket.
async fn begins_with_tls(stream: &Stream) -> io::Result<bool> {
    let Stream::Tcp(stream) = stream else { return Ok(false) };
    let mut first = [0; 1];
    match stream.peek(&mut first).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(first[0] == TLS_HANDSHAKE),
    }
}

async fn secure(
    channel: ClientChannel,
    tls: &ServerTls,
    asked: &mut Asked,
    peer: &mut Peer,
) -> Result<ClientChannel, HandshakeError> {
    *asked = Asked { gss: true, tls: true };
    let (channel, secured) = channel.into_tls(tls).await?;
    peer.secured = Some(secured);
    Ok(channel)
}

/// Reads one packet and answers it.
async fn answer(
    channel: &mut ClientChannel,
    tls: Option<&ServerTls>,
    asked: &mut Asked,
) -> Result<Next, HandshakeError> {
    let is_plain_tcp = matches!(channel.stream, Stream::Tcp(_));
    let packet = read_startup(channel).await?;
    // One of each is answered, and nothing may stand in the clear behind it.
    match packet {
        Startup::GssEncRequest if !asked.gss => {
            asked.gss = true;
            if !channel.input.is_empty() {
                return Err(HandshakeError::Refused(ClientError::PlaintextAfterRequest {
                    encryption: "GSSAPI encryption",
                }));
            }
            channel.answer_byte(b'N').await?;
            Ok(Next::Packet)
        }
        Startup::SslRequest if !asked.tls => {
            asked.tls = true;
            if !channel.input.is_empty() {
                return Err(HandshakeError::Refused(ClientError::PlaintextAfterRequest { encryption: "SSL" }));
            }
            let offered = tls.is_some() && is_plain_tcp;
            channel.answer_byte(if offered { b'S' } else { b'N' }).await?;
            Ok(if offered { Next::Tls } else { Next::Packet })
        }
        Startup::SslRequest => Err(repeated("1234.5679")),
        Startup::GssEncRequest => Err(repeated("1234.5680")),
        Startup::Cancel { pid, key } => Ok(Next::Request(Request::Cancel { pid, key })),
        Startup::Session(_) if is_plain_tcp && tls.is_some_and(|tls| tls.is_required) => {
            Err(HandshakeError::Refused(ClientError::TlsRequired))
        }
        Startup::Session(session) => Ok(Next::Request(Request::Session(session))),
    }
}

/// PostgreSQL takes a second request for a protocol version that does not exist.
fn repeated(version: &str) -> HandshakeError {
    let text = format!("unsupported frontend protocol {version}: server supports 3.0 to 3.0");
    HandshakeError::Refused(ClientError::Unsupported(text.into()))
}

async fn read_startup(channel: &mut ClientChannel) -> Result<Startup, HandshakeError> {
    let length = channel.read_exact(4).await?;
    let body_bytes = startup::body_bytes([length[0], length[1], length[2], length[3]])?;
    let packet = channel.read_exact(body_bytes).await?;
    Ok(startup::parse(&packet)?)
}
