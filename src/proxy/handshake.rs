//! From an accepted socket to a client that has said what it wants: TLS, startup packet, cancel requests.
//!
//! ```text
//! client                         proxy
//!   GSSENCRequest  ───────────▶  N
//!   SSLRequest     ───────────▶  S, TLS handshake      (N where no certificate is configured)
//!   StartupMessage ───────────▶  authentication …      (CancelRequest: passed to its session, then closed)
//! ```
//!
//! Nothing that came in the clear behind an SSLRequest is ever taken for encrypted.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use super::client_error::ClientError;
use crate::postgres::Stream;
use crate::wire::frame::{HEADER_BYTES, Header};
use crate::wire::startup::{self, SessionStartup, Startup, StartupError};

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

    /// Reads what there is. Cancel-safe.
    pub(super) async fn read_some(&mut self) -> io::Result<()> {
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
    async fn into_tls(self, offer: &TlsOffer<'_>) -> io::Result<Self> {
        match (offer.acceptor, self.stream) {
            (Some(acceptor), Stream::Tcp(stream)) => {
                let stream = acceptor.accept(stream).await?;
                Ok(Self::new(Stream::Tls(Box::new(stream.into()))))
            }
            (_, stream) => Ok(Self { stream, input: self.input, out: self.out }),
        }
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
    /// The link broke, or TLS failed.
    #[error("client lost during the handshake")]
    Lost(#[from] io::Error),
}

impl From<StartupError> for HandshakeError {
    fn from(error: StartupError) -> Self {
        Self::Refused(match error {
            StartupError::Version { .. } => ClientError::Unsupported(error.to_string().into()),
            StartupError::NoUser => ClientError::NoUser,
            StartupError::Length | StartupError::Layout | StartupError::Encoding => {
                ClientError::Protocol(error.to_string().into())
            }
        })
    }
}

/// Whether clients must, may or cannot speak TLS.
pub(super) struct TlsOffer<'a> {
    pub(super) acceptor: Option<&'a TlsAcceptor>,
    /// Refuse clients on TCP that do not ask for it.
    pub(super) required: bool,
}

/// What follows a startup packet.
enum Next {
    Packet,
    Tls,
    Request(Request),
}

/// Which encryption requests were answered; PostgreSQL allows one of each kind.
#[derive(Default)]
struct Asked {
    gss: bool,
    tls: bool,
}

/// Negotiates encryption and reads the startup packet. A client that is refused has been told.
pub(super) async fn negotiate(
    mut channel: ClientChannel,
    tls: &TlsOffer<'_>,
) -> Result<(ClientChannel, Request), HandshakeError> {
    let mut asked = Asked::default();
    loop {
        match answer(&mut channel, tls, &mut asked).await {
            Ok(Next::Packet) => {}
            Ok(Next::Tls) => channel = channel.into_tls(tls).await?,
            Ok(Next::Request(request)) => return Ok((channel, request)),
            Err(HandshakeError::Refused(error)) => {
                channel.refuse(&error).await;
                return Err(HandshakeError::Refused(error));
            }
            Err(lost @ HandshakeError::Lost(_)) => return Err(lost),
        }
    }
}

/// Reads one packet and answers it.
async fn answer(channel: &mut ClientChannel, tls: &TlsOffer<'_>, asked: &mut Asked) -> Result<Next, HandshakeError> {
    let offered = tls.acceptor.is_some() && matches!(channel.stream, Stream::Tcp(_));
    match read_startup(channel).await? {
        Startup::GssEncRequest if !asked.gss => {
            asked.gss = true;
            channel.answer_byte(b'N').await?;
            Ok(Next::Packet)
        }
        Startup::SslRequest if !asked.tls => {
            asked.tls = true;
            if !channel.input.is_empty() {
                return Err(HandshakeError::Refused(ClientError::PlaintextAfterSslRequest));
            }
            channel.answer_byte(if offered { b'S' } else { b'N' }).await?;
            Ok(if offered { Next::Tls } else { Next::Packet })
        }
        Startup::GssEncRequest | Startup::SslRequest => {
            let text = "unsupported frontend protocol 1234.5679: server supports 3.0 to 3.0";
            Err(HandshakeError::Refused(ClientError::Unsupported(text.into())))
        }
        Startup::Cancel { pid, key } => Ok(Next::Request(Request::Cancel { pid, key })),
        Startup::Session(_) if tls.required && matches!(channel.stream, Stream::Tcp(_)) => {
            Err(HandshakeError::Refused(ClientError::TlsRequired))
        }
        Startup::Session(session) => Ok(Next::Request(Request::Session(session))),
    }
}

async fn read_startup(channel: &mut ClientChannel) -> Result<Startup, HandshakeError> {
    let length = channel.read_exact(4).await?;
    let body_bytes = startup::body_bytes([length[0], length[1], length[2], length[3]])?;
    let packet = channel.read_exact(body_bytes).await?;
    Ok(startup::parse(&packet)?)
}

/// Whether the `replication` parameter asks for a walsender, as PostgreSQL reads it.
pub(super) fn wants_replication(session: &SessionStartup) -> bool {
    session.parameter("replication").is_some_and(|value| {
        !matches!(value.to_ascii_lowercase().as_str(), "" | "0" | "f" | "false" | "n" | "no" | "of" | "off")
    })
}
